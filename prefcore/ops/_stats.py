"""From the row kernels' running state to token statistics, and from upstream gradients to the kernels' coefficients."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from prefcore.ops._spec import LogitSpec, Row


@dataclass(frozen=True)
class StatsSettings:
    """What is asked of a distribution, in the order of the operators' scalar arguments."""

    temperature: float
    softcap: float | None
    logit_scale: float
    ignore_index: int
    entropy: bool
    logsumexp: bool
    top1: bool
    mean: bool
    squares: bool

    SCHEMA = (
        "float temperature_value, float? softcap, float logit_scale, int ignore_index, "
        "bool want_entropy, bool want_logsumexp, bool want_top1, bool want_mean, bool want_squares"
    )

    def flat(self) -> tuple:
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def wanted(self) -> tuple[bool, ...]:
        """For each of :class:`Stats`."""
        return True, self.entropy, self.logsumexp, self.top1, self.mean, self.squares

    def spec(self, vocab: int, round_to: torch.dtype | None = None) -> LogitSpec:
        return LogitSpec(
            vocab=vocab,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            round_to=round_to,
            entropy=self.entropy,
            mean=self.mean,
            squares=self.squares,
            top1=self.top1,
        )


class Stats(NamedTuple):
    """Per row, or empty where not wanted."""

    logps: Tensor
    entropy: Tensor
    logsumexp: Tensor
    top1: Tensor
    mean: Tensor
    squares: Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32, float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_state(rows: int, like: Tensor) -> Tensor:
    """The state ``[len(Row), rows]`` before any logits were seen."""
    state = torch.zeros(len(Row), rows, dtype=accumulator_dtype(like.dtype), device=like.device)
    state[Row.PEAK] = state[Row.BEFORE] = -torch.inf
    return state


def finish(state: Tensor, targets: Tensor, settings: StatsSettings, vocab: int) -> Stats:
    """Statistics from the state after the last logit; zeros at ignored rows."""
    ignored = targets == settings.ignore_index
    peak, log_total, target = state[Row.PEAK], state[Row.TOTAL].log(), state[Row.TARGET]
    none, no_bool = state.new_empty(0), state.new_empty(0, dtype=torch.bool)

    def masked(value: Tensor) -> Tensor:
        return value.masked_fill_(ignored, 0)

    return Stats(
        # A difference from the peak is exact where logits are large, and both terms are <= 0.
        logps=masked((target - peak) - log_total),
        entropy=masked(log_total - state[Row.SHIFTED] / state[Row.TOTAL]) if settings.entropy else none,
        logsumexp=masked(peak + log_total) if settings.logsumexp else none.clone(),
        top1=masked((target >= peak) & (target > state[Row.BEFORE])) if settings.top1 else no_bool,
        mean=masked(state[Row.SUM] / vocab) if settings.mean else none.clone(),
        squares=masked(state[Row.SQUARES].log() - 2 * log_total) if settings.squares else none.clone(),
    )


def stats_like(rows: int | torch.SymInt, like: Tensor, settings: StatsSettings) -> Stats:
    """What :func:`finish` returns, without values."""
    dtype = accumulator_dtype(like.dtype)
    stats = Stats(*(like.new_empty((rows if wanted else 0,), dtype=dtype) for wanted in settings.wanted))
    return stats._replace(top1=stats.top1.to(torch.bool))


class RowGradient(NamedTuple):
    """dL/dz = a·onehot - b·p - c·p·(logp + H) of each row."""

    a: Tensor
    b: Tensor
    c: Tensor | None  # None for zeros

    def coefficients(self) -> Tensor:
        """``[3, rows]``."""
        return torch.stack((self.a, self.b, torch.zeros_like(self.a) if self.c is None else self.c))

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """A scale per row and the coefficients over it, None for 1, 1, 0.

        The scale multiplies the ``[rows, D]`` sides of the head's GEMMs, so that a 16-bit tile cannot underflow.
        """
        if self.b is self.a and self.c is None:
            return self.a, None
        parts = self.coefficients()
        scale = parts.abs().amax(0)
        return scale, parts / scale.where(scale != 0, 1)


def row_gradient(
    g_logps: Tensor | None,
    g_entropy: Tensor | None,
    g_logsumexp: Tensor | None,
    ignored: Tensor,
    dtype: torch.dtype,
) -> RowGradient:
    """The coefficients of what arrives at logps, entropy and logsumexp; zero at ignored rows."""

    def clean(g: Tensor | None) -> Tensor | None:
        return None if g is None else g.to(dtype).masked_fill(ignored, 0)

    g, g_h, g_l = clean(g_logps), clean(g_entropy), clean(g_logsumexp)
    if g is None:
        g = torch.zeros(ignored.shape, dtype=dtype, device=ignored.device)
    return RowGradient(a=g, b=g if g_l is None else g - g_l, c=g_h)
