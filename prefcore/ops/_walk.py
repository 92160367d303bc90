"""The tile loops of the head: from hidden states to token statistics and back, over one back end's row kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from prefcore.ops import _plan
from prefcore.ops._gemm import addmm, mm
from prefcore.ops._memory import advise_huge, empty
from prefcore.ops._spec import Row
from prefcore.ops._stats import (
    RowGradient,
    Stats,
    StatsSettings,
    accumulator_dtype,
    finish,
    new_state,
    row_gradient,
)

_log = logging.getLogger("prefcore")


@dataclass(frozen=True)
class HeadSettings(StatsSettings):
    """What a head call is asked for, in the order of the operators' scalar arguments."""

    logits_dtype: torch.dtype | None
    schedule: str
    memory_budget: int | None
    replan: bool  # an out-of-memory error while logits are being retained turns to recomputing them

    SCHEMA = f"{StatsSettings.SCHEMA}, ScalarType? logits_dtype, str schedule, int? memory_budget, bool replan"

    @property
    def raw(self) -> bool:
        """Whether retained logits stay logits: a gradient of these outputs cannot be taken from onehot - p."""
        return self.entropy or self.logsumexp


class Saved(NamedTuple):
    """What the forward leaves for the backward."""

    state: Tensor  # [3, T]: PEAK, TOTAL, TARGET
    retained: Tensor  # [rows, V]: logits, or onehot - p
    # [T, D]: sum over v of p_v·dz_v/dx_v·W[v], the part of ∂logps/∂hidden that frozen saves; with outer [T, D + R]
    mean_weight: Tensor


class Slice(NamedTuple):
    """A slice of the vocabulary: rows of the weight, and of its low-rank part where it has one.

    The low-rank part takes GEMMs of its own, over columns of the hidden states. One GEMM over both would need a copy of
    the weight beside it, which on a CPU cost more than the second pass over the tile, most at few rows.
    """

    weight: Tensor  # [cols, D]
    outer: Tensor | None  # [cols, R]

    def logits(self, out: Tensor, hidden: Tensor) -> None:
        """``out [rows, cols]`` = ``hidden @ [weight, outer].T``."""
        if self.outer is None:
            mm(out, hidden, self.weight.t())
            return
        D = self.weight.shape[1]
        # A 16-bit tile is rounded after each: the small part first, so that the sum is rounded once.
        mm(out, hidden[:, D:], self.outer.t())
        addmm(out, hidden[:, :D], self.weight.t())

    def combine(self, out: Tensor, tile: Tensor, add: bool, inner_only: bool = False) -> None:
        """``out [rows, D + R]`` = ``tile @ [weight, outer]``, or has that added to it; or its last R columns alone."""
        product = addmm if add else mm
        if self.outer is None:
            product(out, tile, self.weight)
            return
        D = self.weight.shape[1]
        if not inner_only:
            product(out[:, :D], tile, self.weight)
        product(out[:, D:], tile, self.outer)


class Operands:
    """The inputs of one call as the GEMMs take them, rows that nobody scores left out where that costs no wait.

    With ``outer [V, R]`` the raw logits are ``hidden[:, :D] @ weight.T + hidden[:, D:] @ outer.T``, and the gradient
    that is called the weight's is that of ``outer``.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
        outer: Tensor | None, settings: HeadSettings,
    ) -> None:  # fmt: skip
        self.dtype = hidden.dtype
        self.types = _plan.types(hidden.device, hidden.dtype, settings.logits_dtype)
        self.accumulate = accumulator_dtype(hidden.dtype)
        self.spec = settings.spec(weight.shape[0], self.types.round_to)
        self.keep: Tensor | None = None
        self.chosen: Tensor | None = None  # indices, among the rows kept, of those that select() left
        if hidden.device.type == "cpu":
            keep = (targets != settings.ignore_index).nonzero()[:, 0]
            if keep.shape[0] < targets.shape[0]:
                self.keep = keep
        self.weight, self.bias = weight, None if bias is None else bias.contiguous()
        self.converts = not weight.dtype == self.dtype == self.types.operand
        self.outer, self.trained = outer, weight if outer is None else outer
        self.hidden = self.pick(hidden).to(self.types.operand)
        self.targets = self.pick(targets)
        self.temperature = None if temperature is None else self.pick(temperature)
        self.rows = self.targets.shape[0]

    def pick(self, per_row: Tensor) -> Tensor:
        """The scored rows of a tensor that has one entry a row."""
        return per_row if self.keep is None else per_row.index_select(0, self.keep)

    def restore(self, picked: Tensor, total: int) -> Tensor:
        """The inverse of :meth:`pick`, zeros elsewhere."""
        if self.keep is None:
            return picked
        return picked.new_zeros(total, *picked.shape[1:]).index_copy_(0, self.keep, picked)

    def select(self, chosen: Tensor) -> None:
        """Leave out all rows but ``chosen``."""
        self.chosen = chosen
        self.hidden, self.targets = self.hidden.index_select(0, chosen), self.targets.index_select(0, chosen)
        if self.temperature is not None:
            self.temperature = self.temperature.index_select(0, chosen)
        self.rows = chosen.shape[0]

    def restore_gradient(self, picked: Tensor, total: int) -> Tensor:
        """The inverse of :meth:`pick` and :meth:`select`, zeros elsewhere."""
        if self.chosen is None:
            return self.restore(picked, total)
        rows = self.chosen if self.keep is None else self.keep.index_select(0, self.chosen)
        return picked.new_zeros(total, *picked.shape[1:]).index_copy_(0, rows, picked)

    def weight_slice(self, cols: slice) -> Slice:
        """Views, unless they must be converted."""
        outer = None if self.outer is None else self.outer[cols].to(self.types.operand)
        return Slice(self.rounded(self.weight[cols]).to(self.types.operand), outer)

    def rounded(self, rows: Tensor) -> Tensor:
        """Rows of the weight in the type of the hidden states, in which the product is taken, whatever computes it."""
        return rows.to(self.dtype)

    @property
    def trained_hidden(self) -> Tensor:
        """The columns of the hidden states that meet ``trained``."""
        return self.hidden if self.outer is None else self.hidden[:, self.weight.shape[1] :]

    def row_arguments(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        return self.targets[rows], None if self.temperature is None else self.temperature[rows]

    def bias_slice(self, cols: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[cols]

    def slope(self) -> Tensor | float:
        """dz/dx where nothing is capped: a number, or one per row."""
        if self.temperature is None:
            return self.spec.logit_scale / self.spec.temperature
        return self.spec.logit_scale / self.temperature


def spans(start: int, stop: int, step: int) -> Iterator[slice]:
    for low in range(start, stop, step):
        yield slice(low, min(low + step, stop))


def limits(hidden: Tensor, weight: Tensor, settings: HeadSettings) -> _plan.Limits:
    """Tile sizes of a call, the same for its forward, its backward and the shapes that tracing predicts."""
    kinds = _plan.types(hidden.device, hidden.dtype, settings.logits_dtype)
    return _plan.limits(weight.shape[0], kinds, settings.raw, hidden.device, settings.schedule, settings.memory_budget)


def retained_like(hidden: Tensor, weight: Tensor, settings: HeadSettings, rows: int | torch.SymInt) -> Tensor:
    """The buffer for the retained logits of ``rows`` rows."""
    kinds = _plan.types(hidden.device, hidden.dtype, settings.logits_dtype)
    return hidden.new_empty((rows, weight.shape[0]), dtype=kinds.kept(settings.raw))


def forward(
    kernels: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    outer: Tensor | None,
    settings: HeadSettings,
    retained: Tensor | None = None,
) -> tuple[Stats, Saved]:
    """Token statistics of every row, with whatever the schedule saves for the backward.

    ``retained`` is room for the logits of as many leading rows as it has, where the caller brings its own.
    """
    total, V = hidden.shape[0], weight.shape[0]
    head = Operands(hidden, weight, targets, bias, temperature, outer, settings)
    bounds = limits(hidden, weight, settings)
    if retained is None:
        rows = min(total, bounds.retained_rows)
        retained = allocate_retained(lambda n: retained_like(hidden, weight, settings, n), rows, settings.replan)
    state = new_state(head.rows, hidden)
    kept_rows = min(head.rows, retained.shape[0])
    if kept_rows:
        _retain(kernels, head, state, retained[:kept_rows], settings, bounds)
    mean_weight = state.new_empty(0, hidden.shape[1])
    if settings.schedule == "frozen":
        mean_weight = state.new_zeros(head.rows, hidden.shape[1])
    if head.rows > kept_rows:
        _sweep(kernels, head, state, mean_weight, kept_rows, bounds)
    if settings.schedule == "frozen":
        scale = (head.slope() / state[Row.TOTAL]).masked_fill_(head.targets == settings.ignore_index, 0)
        mean_weight = head.restore(mean_weight.mul_(scale[:, None]), total)
    stats = finish(state, head.targets, settings, V)
    if head.keep is not None:
        stats = Stats(
            *(head.restore(x, total) if wanted else x for x, wanted in zip(stats, settings.wanted, strict=True))
        )
    saved = state[:3].clone() if head.keep is None else state.new_zeros(3, total).index_copy_(1, head.keep, state[:3])
    return stats, Saved(saved, retained, mean_weight)


def allocate_retained(make: Callable[[int], Tensor], rows: int, replan: bool) -> Tensor:
    """Room for the logits of ``rows`` rows; of none, with a warning, where memory does not suffice for them."""
    try:
        return advise_huge(make(rows))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU allocator raises a plain RuntimeError.
        scarce = isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)
        if not (scarce and replan):
            raise
        _log.warning("no memory to retain the logits of %d rows; recomputing them in the backward: %s", rows, error)
        return make(0)


def _retain(
    kernels: ModuleType,
    head: Operands,
    state: Tensor,
    retained: Tensor,
    settings: HeadSettings,
    bounds: _plan.Limits,
) -> None:
    """Statistics of the leading rows, whose logits, or onehot - p, stay in ``retained``."""
    V = retained.shape[1]
    # Logits held wider than the GEMMs' operands pass through a scratch tile of whole rows.
    wide = retained.dtype != head.types.tile
    step = max(1, bounds.tile_rows * bounds.tile_cols // V) if wide else retained.shape[0]
    for rows in spans(0, retained.shape[0], step):
        kept = retained[rows]
        tile = empty(*kept.shape, dtype=head.types.tile, device=kept.device) if wide else kept
        # A weight that must be converted is converted slice by slice.
        width = bounds.tile_cols if head.converts else V
        for cols in spans(0, V, width):
            head.weight_slice(cols).logits(tile[:, cols], head.hidden[rows])
        arguments = (*head.row_arguments(rows), head.bias, head.spec, state[:, rows])
        if settings.raw:
            kernels.stats(tile, 0, *arguments)
        else:
            kernels.stats_grad(tile, kept, *arguments)


def _sweep(
    kernels: ModuleType,
    head: Operands,
    state: Tensor,
    mean_weight: Tensor,
    first_row: int,
    bounds: _plan.Limits,
) -> None:
    """Statistics of the rows from ``first_row`` on, through one tile; also Σ exp(z - PEAK)·d·W[v] where wanted."""
    V, frozen = head.weight.shape[0], mean_weight.numel() > 0
    shape = min(bounds.tile_rows, head.rows - first_row), min(bounds.tile_cols, V)
    buffer = empty(*shape, dtype=head.types.tile, device=state.device)
    weights = buffer
    if frozen and head.types.tile != head.types.operand:
        weights = empty(*shape, dtype=head.types.operand, device=state.device)
    for cols in spans(0, V, bounds.tile_cols):
        weight = head.weight_slice(cols)
        for rows in spans(first_row, head.rows, bounds.tile_rows):
            window = slice(0, rows.stop - rows.start), slice(0, cols.stop - cols.start)
            tile = buffer[window]
            weight.logits(tile, head.hidden[rows])
            arguments = (*head.row_arguments(rows), head.bias_slice(cols), head.spec, state[:, rows])
            if not frozen:
                kernels.stats(tile, cols.start, *arguments)
                continue
            sums = mean_weight[rows]
            kernels.weigh(tile, weights[window], cols.start, *arguments, sums if cols.start else None)
            weight.combine(sums, weights[window], add=cols.start > 0)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool  # or, where there is a low-rank part, outer
    bias: bool
    inner: bool = False  # the hidden states' columns beyond the weight's

    @property
    def states(self) -> bool:
        """Whether any column of the hidden states needs one."""
        return self.hidden or self.inner


class Into(NamedTuple):
    """Where gradients go."""

    weight: Tensor | None = None  # in place of a new one
    add: bool = True  # to what that holds
    # Of hidden states and bias in the accumulator's type, sums of the weight's exact for gradients of any magnitude.
    wide: bool = False


def backward(
    kernels: ModuleType,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    outer: Tensor | None,
    entropy: Tensor,
    saved: Saved,
    needs: Needs,
    drop_zero_rows: bool,
    into: Into,
    settings: HeadSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; empty where not needed."""
    head = Operands(hidden, weight, targets, bias, temperature, outer, settings)
    ignored = head.targets == settings.ignore_index
    picked = [None if g is None else head.pick(g) for g in grads]
    gradient = row_gradient(picked[0], picked[1], picked[2], ignored, head.accumulate)
    state = saved.state if head.keep is None else saved.state.index_select(1, head.keep)
    per_row_entropy = None if picked[1] is None else head.pick(entropy)

    if settings.schedule == "frozen" and picked[1] is None:
        d_hidden = _frozen_gradient(head, gradient, state, head.pick(saved.mean_weight))
        d_hidden = d_hidden.to(head.accumulate if into.wide else hidden.dtype)
        return head.restore(d_hidden, hidden.shape[0]), head.trained.new_empty(0), hidden.new_empty(0)
    walk = _BackwardWalk(kernels, head, gradient, state, per_row_entropy, saved.retained, needs, settings, into)
    if drop_zero_rows or hidden.device.type == "cpu":
        walk.drop_zero_rows()
    return walk.run(hidden, limits(hidden, weight, settings))


def _frozen_gradient(head: Operands, row: RowGradient, state: Tensor, mean_weight: Tensor) -> Tensor:
    """a·dz_y/dx·W[y] - b·mean_weight, a row of which depends on the upstream gradient through two numbers."""
    z = state[Row.TARGET]
    slope = head.slope()
    if head.spec.softcap is not None:
        u = z * (head.spec.temperature if head.temperature is None else head.temperature)
        slope = slope * (1 - (u / head.spec.softcap).square())
    # A target outside the vocabulary has no row of W: its z is NaN, and so must this be.
    own = (row.a * slope).masked_fill(z.isnan(), torch.nan).masked_fill_(row.a == 0, 0)
    index = head.targets.clamp(0, head.weight.shape[0] - 1)
    chosen = head.rounded(head.weight.index_select(0, index))
    if head.outer is not None:
        chosen = torch.cat((chosen, head.outer.index_select(0, index)), 1)
    chosen = chosen.to(head.accumulate)
    return chosen.mul_(own[:, None]).addcmul_(row.b[:, None], mean_weight, value=-1)


class _BackwardWalk:
    """Slices of the vocabulary outside, rows inside: a slice of dL/dW is summed up and written once."""

    def __init__(
        self, kernels: ModuleType, head: Operands, gradient: RowGradient, state: Tensor, entropy: Tensor | None,
        retained: Tensor, needs: Needs, settings: HeadSettings, into: Into,
    ) -> None:  # fmt: skip
        self.kernels, self.head, self.state, self.entropy = kernels, head, state, entropy
        self.into = into
        self.scale, self.coef = gradient.folded()
        self.retained, self.needs, self.settings = retained, needs, settings
        self.kept_rows = min(head.rows, retained.shape[0])

    def drop_zero_rows(self) -> None:
        """Leave out rows whose gradient is zero, where enough are to pay for gathering the rest."""
        chosen = rows_worth_gathering(self.scale)
        if chosen is None:
            return
        everything = self.kept_rows == self.head.rows
        self.kept_rows = chosen.shape[0] if everything else int((chosen < self.kept_rows).sum())
        self.head.select(chosen)
        self.scale = self.scale.index_select(0, chosen)
        if self.coef is not None:
            self.coef = self.coef.index_select(1, chosen)
        self.state = self.state.index_select(1, chosen)
        if self.entropy is not None:
            self.entropy = self.entropy.index_select(0, chosen)

    def run(self, hidden: Tensor, bounds: _plan.Limits) -> tuple[Tensor, Tensor, Tensor]:
        head, needs, V = self.head, self.needs, self.head.weight.shape[0]
        # Retained onehot - p enters the GEMMs as it lies. Where that serves every row, one slice is the vocabulary.
        direct = head.chosen is None and not self.settings.raw
        whole = direct and self.kept_rows == head.rows and not head.converts
        # Nor where a slice of dL/dW needs room of its own.
        whole = whole and not (_scaled_apart(head, self.into) or _converts(head, self.into))
        width = V if whole else min(V, bounds.tile_cols)
        chunks = list(spans(0, self.kept_rows, max(1, self.kept_rows) if direct else bounds.tile_rows))
        tiled = [] if direct else list(chunks)
        for rows in spans(self.kept_rows, head.rows, bounds.tile_rows):
            chunks.append(rows)
            tiled.append(rows)
        scratch = self._scratch(max((rows.stop - rows.start for rows in tiled), default=0), width)
        gradients = HeadGradients(head, self.scale, needs, len(chunks), self.into)
        for cols in spans(0, V, width):
            weight = head.weight_slice(cols)
            for rows in chunks:
                gradients.add(rows, cols, self._gradient_tile(rows, cols, weight, scratch, direct), weight)
        return gradients.finish(hidden)

    def _scratch(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Room for one tile of logits and, where it has another type, one of their gradient."""
        logits = empty(rows, width, dtype=self.head.types.tile, device=self.state.device)
        if self.head.types.operand == self.head.types.tile:
            return logits, logits
        return logits, empty(rows, width, dtype=self.head.types.operand, device=self.state.device)

    def _gradient_tile(
        self, rows: slice, cols: slice, weight: Slice, scratch: tuple[Tensor, Tensor], direct: bool
    ) -> Tensor:
        """The logits' gradient over scale, in the operands' type."""
        head, kept = self.head, rows.start < self.kept_rows
        if kept and direct:
            return self.retained[rows, cols]
        tile, out = (buffer[: rows.stop - rows.start, : cols.stop - cols.start] for buffer in scratch)
        if kept:
            logits = self.retained[rows, cols]
            if head.chosen is not None:
                logits = self.retained[:, cols].index_select(0, head.chosen[rows])
            if not self.settings.raw:
                return logits
        else:
            weight.logits(tile, head.hidden[rows])
            logits = tile
        self.kernels.grad(
            logits,
            out,
            cols.start,
            *head.row_arguments(rows),
            head.bias_slice(cols),
            head.spec,
            self.state[:, rows],
            None if self.entropy is None else self.entropy[rows],
            None if self.coef is None else self.coef[:, rows],
        )
        return out


def _scaled_apart(head: Operands, into: Into) -> bool:
    """Whether a gradient that nobody has scaled up yet goes through operands of a narrow range."""
    return into.wide and head.types.operand == torch.float16


def _converts(head: Operands, into: Into) -> bool:
    """Whether GEMMs convert their operands, as a CPU's do where the result is wider, so that large ones cost memory."""
    return into.wide and head.types.operand != head.accumulate and head.hidden.device.type == "cpu"


def rows_worth_gathering(scale: Tensor) -> Tensor | None:
    """Indices of the rows that have a gradient, if they are few enough to pay for it; reads a count back."""
    chosen = scale.nonzero()[:, 0]
    return None if chosen.shape[0] > 0.875 * scale.shape[0] else chosen


class HeadGradients:
    """Gradients of hidden states, weight and bias, summed up from tiles of the logits' gradient over ``scale``."""

    def __init__(self, head: Operands, scale: Tensor, needs: Needs, chunks: int, into: Into) -> None:
        V, columns = head.weight.shape[0], head.hidden.shape[1]
        self.head, self.scale, self.needs, self.into = head, scale, needs, into
        self.d_hidden = self._zeros(head.rows if needs.states else 0, columns)
        self.d_bias = self._zeros(V if needs.bias else 0)
        self.bias_unit = _power_of_two(scale) if needs.bias and _scaled_apart(head, into) else None
        self.bias_side = (scale if self.bias_unit is None else scale / self.bias_unit).to(head.types.operand)
        self.d_weight = _WeightGradient(head, scale, needs.weight, chunks, into)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.head.accumulate, device=self.scale.device)

    def add(self, rows: slice, cols: slice, tile: Tensor, weight: Slice) -> None:
        """Chunks of rows come in ascending order within each slice of the vocabulary."""
        if self.needs.states:
            weight.combine(self.d_hidden[rows], tile, add=cols.start > 0, inner_only=not self.needs.hidden)
        if self.needs.weight:
            self.d_weight.add(rows, cols, tile)
        if self.needs.bias:
            addmm(self.d_bias[None, cols], self.bias_side[None, rows], tile)

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden states shaped like ``hidden``, weight and bias; empty where not needed."""
        dtype = self.head.accumulate if self.into.wide else hidden.dtype
        d_hidden = self.d_hidden
        if self.needs.states:
            d_hidden = self.head.restore_gradient(d_hidden.mul_(self.scale[:, None]).to(dtype), hidden.shape[0])
        if self.bias_unit is not None:
            self.d_bias.mul_(self.bias_unit)
        return d_hidden.to(dtype), self.d_weight.result, self.d_bias.to(dtype)


class _WeightGradient:
    """dL/dW slice by slice; a slice to which several chunks of rows contribute is summed in the accumulator's type."""

    def __init__(self, head: Operands, scale: Tensor, needed: bool, chunks: int, into: Into) -> None:
        self.head, self.add_to = head, into.weight is not None and into.add
        self.slice_sum: Tensor | None = None
        self.unit: Tensor | None = None
        self.result = head.trained.new_empty(0)
        if not needed:
            return
        scale = scale[:, None]
        # A row without gradient may hold inf or NaN, which a product with zero would keep.
        scaled = (head.trained_hidden.to(head.accumulate) * scale).masked_fill_(scale == 0, 0)
        if _scaled_apart(head, into):
            self.unit = _power_of_two(scaled)
            scaled.div_(self.unit)
        self.scaled = scaled.to(head.types.operand)
        if into.weight is None:
            self.result = empty(*head.trained.shape, dtype=head.trained.dtype, device=head.trained.device)
        self.target = self.result if into.weight is None else into.weight
        if not chunks and not self.add_to:
            self.target.zero_()

    def add(self, rows: slice, cols: slice, tile: Tensor) -> None:
        first, last = rows.start == 0, rows.stop == self.head.rows
        out, side = self.target[cols], self.scaled[rows]
        if self.add_to and self.unit is None:
            addmm(out, tile.t(), side)
        elif first and last and self.unit is None:
            mm(out, tile.t(), side)
        else:
            if first or self.slice_sum is None:
                self.slice_sum = empty(*out.shape, dtype=self.head.accumulate, device=out.device)
                mm(self.slice_sum, tile.t(), side)
            else:
                addmm(self.slice_sum, tile.t(), side)
            if last:
                total = self.slice_sum if self.unit is None else self.slice_sum.mul_(self.unit)
                if self.add_to:
                    out.add_(total)
                else:
                    out.copy_(total)


def _power_of_two(x: Tensor) -> Tensor:
    """The one at or below the largest magnitude, without asking the device for it; 1 where there is none."""
    peak = x.abs().amax() if x.numel() else x.new_zeros(())
    unit = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent - 1)
    return unit.where(peak.isfinite() & (unit > 0), 1)
