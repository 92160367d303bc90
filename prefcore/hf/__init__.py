"""Plugs into Hugging Face transformers: the language-model head, scoring, fused losses, and the Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefcore.hf.fused import TokenStatsOutput, fuse_head, unfuse_head
    from prefcore.hf.head import Head, find_head
    from prefcore.hf.scoring import Scores, response_logps, score, token_logps
    from prefcore.hf.trainer import PreferenceTrainer

__all__ = [
    "Head",
    "PreferenceTrainer",
    "Scores",
    "TokenStatsOutput",
    "find_head",
    "fuse_head",
    "response_logps",
    "score",
    "token_logps",
    "unfuse_head",
]

_HOMES = {
    "Head": "head",
    "Scores": "scoring",
    "TokenStatsOutput": "fused",
    "find_head": "head",
    "fuse_head": "fused",
    "response_logps": "scoring",
    "score": "scoring",
    "token_logps": "scoring",
    "unfuse_head": "fused",
    "PreferenceTrainer": "trainer",
}


# The trainer imports transformers.Trainer, which takes seconds; scoring does without it.
def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"prefcore.hf.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
