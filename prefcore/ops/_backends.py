"""The back ends of the row kernels, imported when first launched."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from prefcore._impl import interpreting


def _cpu() -> ModuleType:
    from prefcore.ops import _rows_cpu

    return _rows_cpu


def _triton() -> ModuleType:
    from prefcore.kernels import logprobs

    return logprobs


class Backend(NamedTuple):
    """Four functions, ``stats``, ``weigh``, ``grad`` and ``stats_grad``, over one tile of logits."""

    load: Callable[[], ModuleType]
    key: str  # dispatch key of the tensors it takes


BACKENDS = {"cpu": Backend(_cpu, "CPU"), "triton": Backend(_triton, "CPU" if interpreting() else "CUDA")}
