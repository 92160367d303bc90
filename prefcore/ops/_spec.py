"""How a raw logit becomes z, and which statistics of z are wanted: the settings every row kernel shares."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor


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


class Side(NamedTuple):
    """One of two distributions over the same vocabulary, as the row kernels of a pair take it."""

    tile: Tensor  # [R, C]
    temperature: Tensor | None  # [R]
    bias: Tensor | None  # [C]
    spec: LogitSpec
    state: Tensor  # [len(Row), R]


@dataclass(frozen=True)
class PairSpec:
    """A divergence of p and q, m = weight·p + (1 - weight)·q for ``js``, r = p^weight·q^(1 - weight) for ``alpha``."""

    kind: Literal["kl", "alpha", "js", "tv"]
    weight: float = 0.5  # in (0, 1)

    @property
    def needs_totals(self) -> bool:
        """Whether its sums need final states."""
        return self.kind in ("js", "tv")


# What row kernels of a pair sum up per row, in `cross [3, R]`. With final P, T = Row.PEAK, Row.TOTAL of each side:
#   kl     0: sum of exp(z_p - P_p)·((z_p - P_p) - (z_q - P_q))
#   alpha  0: sum of exp(weight·(z_p - P_p) + (1 - weight)·(z_q - P_q))
#   js     0: sum of p·log(p/m)   1: sum of q·log(q/m)   2: sum of weight·p·log(p/m) + (1 - weight)·q·log(q/m)
#   tv     0: sum of p·sign(p - q)   1: sum of q·sign(p - q)   2: sum of |p - q|
CROSS_ROWS = 3


class Coef(IntEnum):
    """Rows of a side's coefficients ``[len(Coef), R]`` in the gradient of a pair.

    dL/dz = ONEHOT·onehot - P·p - ENTROPY·p·(log p + H) + DIVERGENCE·g. For the first side (p) and the second (q) g is

        kl     p·(log p - log q - OFFSET)                q - p
        alpha  (OFFSET·p - r)/(1 - weight)               (OFFSET·q - r)/weight
        js     weight·p·(log(p/m) - OFFSET)              (1 - weight)·q·(log(q/m) - OFFSET)
        tv     p·(sign(p - q) - OFFSET)/2                q·(OFFSET - sign(p - q))/2
    """

    ONEHOT = 0
    P = 1
    ENTROPY = 2
    DIVERGENCE = 3
    H = 4
    OFFSET = 5
