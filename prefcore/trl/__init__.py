"""TRL's trainers over prefcore: :func:`enable` keeps them as they are; ``DPOTrainer`` and ``GRPOTrainer`` also pack."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefcore.trl._dpo import DPOTrainer
    from prefcore.trl._grpo import GRPOTrainer
    from prefcore.trl._patch import disable, enable, enabled

__all__ = ["DPOTrainer", "GRPOTrainer", "disable", "enable", "enabled"]

_HOMES = {"DPOTrainer": "_dpo", "GRPOTrainer": "_grpo", "disable": "_patch", "enable": "_patch", "enabled": "_patch"}


# Each of TRL's trainers takes seconds to import.
def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"prefcore.trl.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
