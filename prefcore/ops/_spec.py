"""How a raw logit becomes z, and which statistics of z are wanted: the settings every row kernel shares."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch


class Row(IntEnum):
    """Rows of the running state ``[len(Row), R]`` that row kernels keep between slices of the vocabulary."""

    PEAK = 0  # max z so far; -inf before the first slice
    TOTAL = 1  # sum of exp(z - PEAK)
    TARGET = 2  # z of the target, once its slice has been seen; NaN for a target outside the vocabulary
    SHIFTED = 3  # sum of exp(z - PEAK) * (z - PEAK), for the entropy
    SUM = 4  # sum of z
    SQUARES = 5  # sum of exp(2 * (z - PEAK))
    BEFORE = 6  # max z at columns before the target's; -inf before the first slice. Ties go to the first, as in argmax


@dataclass(frozen=True)
class LogitSpec:
    """z = softcap(logit_scale * (x + bias)) / temperature, where x is a tile's raw value."""

    vocab: int
    logit_scale: float = 1.0
    softcap: float | None = None  # softcap(u) = softcap * tanh(u / softcap)
    temperature: float = 1.0  # ignored where a tensor of temperatures is given
    ignore_index: int = -100
    round_to: torch.dtype | None = None  # x is rounded to this type first: the tile is held wider than the logits
    entropy: bool = False  # keep Row.SHIFTED
    mean: bool = False  # keep Row.SUM
    squares: bool = False  # keep Row.SQUARES
    top1: bool = False  # keep Row.BEFORE
