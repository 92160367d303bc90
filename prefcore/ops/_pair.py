"""Divergences of two distributions: from the row kernels' sums to numbers, from upstream gradients to coefficients."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from prefcore.ops import _stats
from prefcore.ops._spec import Coef, PairSpec, Row
from prefcore.ops._stats import StatsSettings

# A tile of the divergence's gradient is about this factor times the root of the divergence, and 1 at the most.
_SMALLEST_UNIT = 2.0**-12


@dataclass(frozen=True)
class PairSettings:
    """What is asked of two distributions, in the order of the operators' scalar arguments."""

    kind: str  # of PairSpec
    mixture: float  # PairSpec.weight
    temperature: float
    softcap: float | None
    logit_scale: float
    entropy: bool
    other_temperature: float
    other_softcap: float | None
    other_logit_scale: float
    other_entropy: bool
    ignore_index: int

    SCHEMA = (
        "str kind, float mixture, float temperature_value, float? softcap, float logit_scale, bool want_entropy, "
        "float other_temperature_value, float? other_softcap, float other_logit_scale, bool want_other_entropy, "
        "int ignore_index"
    )

    def flat(self) -> tuple:
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def spec(self) -> PairSpec:
        return PairSpec(self.kind, self.mixture)  # type: ignore[arg-type]

    @property
    def wanted(self) -> tuple[bool, ...]:
        """For each of :class:`RowPair`."""
        return True, True, True, self.entropy, self.other_entropy, True

    @property
    def sides(self) -> tuple[StatsSettings, StatsSettings]:
        def side(temperature: float, softcap: float | None, logit_scale: float, entropy: bool) -> StatsSettings:
            return StatsSettings(
                temperature, softcap, logit_scale, self.ignore_index, entropy,
                logsumexp=False, top1=False, mean=False, squares=False,
            )  # fmt: skip

        return (
            side(self.temperature, self.softcap, self.logit_scale, self.entropy),
            side(self.other_temperature, self.other_softcap, self.other_logit_scale, self.other_entropy),
        )


class RowPair(NamedTuple):
    """Per row, or empty where not wanted."""

    divergence: Tensor
    logps: Tensor
    other_logps: Tensor
    entropy: Tensor
    other_entropy: Tensor
    offsets: Tensor  # [2, rows]: Coef.OFFSET of each side


def finish(states: tuple[Tensor, Tensor], cross: Tensor, targets: Tensor, settings: PairSettings) -> RowPair:
    """Statistics after the last slice of the vocabulary; zeros at ignored rows."""
    ignored = targets == settings.ignore_index
    p, q = (
        # The vocabulary's size is for statistics that are not asked for.
        _stats.finish(state, targets, side, vocab=1)
        for state, side in zip(states, settings.sides, strict=True)
    )
    totals = states[0][Row.TOTAL], states[1][Row.TOTAL]
    logs = totals[0].log(), totals[1].log()
    w = settings.mixture
    offsets = cross[:2]
    if settings.kind == "kl":
        value = cross[0] / totals[0] - (logs[0] - logs[1])
        offsets = torch.stack((value, value))
    elif settings.kind == "alpha":
        log_overlap = cross[0].log() - w * logs[0] - (1 - w) * logs[1]
        value = -torch.expm1(log_overlap) / (w * (1 - w))
        overlap = log_overlap.exp()
        offsets = torch.stack((overlap, overlap))
    elif settings.kind == "js":
        value = cross[2]
    else:
        value = cross[2] / 2
    # None is negative but by rounding; and 0 has no sign.
    divergence = value.clamp_min(0).add_(0).masked_fill_(ignored, 0)
    return RowPair(
        divergence, p.logps, q.logps, p.entropy, q.entropy, offsets.masked_fill(ignored, 0),
    )  # fmt: skip


def stats_like(rows: int | torch.SymInt, like: Tensor, settings: PairSettings) -> RowPair:
    """What :func:`finish` returns, without values."""
    dtype = _stats.accumulator_dtype(like.dtype)

    def empty(*shape: int | torch.SymInt) -> Tensor:
        return like.new_empty(shape, dtype=dtype)

    return RowPair(
        empty(rows), empty(rows), empty(rows), empty(rows if settings.entropy else 0),
        empty(rows if settings.other_entropy else 0), empty(2, rows),
    )  # fmt: skip


class PairGrads(NamedTuple):
    """What arrives at the first five of :class:`RowPair`; None for nothing."""

    divergence: Tensor | None
    logps: Tensor | None
    other_logps: Tensor | None
    entropy: Tensor | None
    other_entropy: Tensor | None

    def of_side(self, index: int) -> tuple[Tensor | None, Tensor | None, None]:
        """At logps, entropy and logsumexp of one side."""
        return (self.logps, self.entropy, None) if index == 0 else (self.other_logps, self.other_entropy, None)


def coefficients(grads: PairGrads, index: int, stats: RowPair, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """A scale per row and the coefficients ``[len(Coef), rows]`` of one side over it.

    The scale multiplies the ``[rows, D]`` sides of the head's GEMMs, so that a 16-bit tile cannot underflow; not where
    close distributions make a small tile either.
    """

    def clean(g: Tensor | None) -> Tensor:
        value = stats.divergence.new_zeros(ignored.shape) if g is None else g.to(stats.divergence.dtype)
        return value.masked_fill(ignored, 0)

    g_logps, g_entropy, _ = (clean(g) for g in grads.of_side(index))
    g_divergence = clean(grads.divergence)
    unit = stats.divergence.sqrt().clamp(_SMALLEST_UNIT, 1)
    scale = torch.stack((g_logps.abs(), g_entropy.abs(), g_divergence.abs() * unit)).amax(0)
    safe = scale.where(scale != 0, 1)
    entropy = (stats.entropy, stats.other_entropy)[index]
    rows = [torch.zeros_like(scale)] * len(Coef)
    rows[Coef.ONEHOT] = rows[Coef.P] = g_logps / safe
    rows[Coef.ENTROPY], rows[Coef.DIVERGENCE] = g_entropy / safe, g_divergence / safe
    if entropy.shape == scale.shape:
        rows[Coef.H] = entropy
    # An infinite divergence whose gradient is masked out sends none.
    rows[Coef.OFFSET] = stats.offsets[index].masked_fill(g_divergence == 0, 0)
    return scale, torch.stack(rows)
