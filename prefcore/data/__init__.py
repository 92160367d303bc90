"""Preference data: files, tokenised pairs, and the batches that scoring takes."""

from prefcore.data.pairs import PairCollator, PairDataset, tokenize_pairs
from prefcore.data.preferences import DataError, Preference, read_preferences, split_by_prompt

__all__ = [
    "DataError",
    "PairCollator",
    "PairDataset",
    "Preference",
    "read_preferences",
    "split_by_prompt",
    "tokenize_pairs",
]
