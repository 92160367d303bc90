"""The tile loops of two heads over one vocabulary: from hidden states to divergences and back."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from prefcore.ops import _pair, _plan, _walk
from prefcore.ops._memory import empty
from prefcore.ops._pair import PairGrads, PairSettings, RowPair
from prefcore.ops._spec import CROSS_ROWS, Side
from prefcore.ops._stats import accumulator_dtype, new_state
from prefcore.ops._walk import HeadGradients, HeadSettings, Into, Needs, Operands, Saved, Slice, spans


@dataclass(frozen=True)
class LinearPairSettings(PairSettings):
    """What a call of ``linear_divergence`` is asked for, in the order of the operators' scalar arguments."""

    logits_dtype: torch.dtype | None
    schedule: str
    memory_budget: int | None
    replan: bool  # as in HeadSettings

    SCHEMA = f"{PairSettings.SCHEMA}, ScalarType? logits_dtype, str schedule, int? memory_budget, bool replan"

    @property
    def heads(self) -> tuple[HeadSettings, HeadSettings]:
        """Of each side as if it were alone; what it retains are logits, as where a logsumexp is wanted."""
        p, q = (
            HeadSettings(
                **(vars(side) | {"logsumexp": True}), logits_dtype=self.logits_dtype, schedule="recompute",
                memory_budget=self.memory_budget, replan=self.replan,
            )
            for side in self.sides
        )  # fmt: skip
        return p, q


class HeadInputs(NamedTuple):
    """One side's."""

    hidden: Tensor  # [T, D], or with outer [T, D + R]
    weight: Tensor  # [V, D]
    bias: Tensor | None
    temperature: Tensor | None  # [T]
    outer: Tensor | None  # [V, R], which then has the gradient that is called the weight's

    @property
    def trained(self) -> Tensor:
        return self.weight if self.outer is None else self.outer


class PairSaved(NamedTuple):
    """What the forward leaves for the backward."""

    states: Tensor  # [2, 3, T]: PEAK, TOTAL, TARGET of each side
    retained: Tensor  # [2, rows, V]: logits


class Kernels(NamedTuple):
    """One back end."""

    rows: ModuleType  # of one distribution
    pairs: ModuleType  # of two


def limits(p: HeadInputs, settings: LinearPairSettings) -> _plan.Limits:
    """Tile sizes of a call, the same for its forward, its backward and the shapes that tracing predicts."""
    kinds = _plan.types(p.hidden.device, p.hidden.dtype, settings.logits_dtype)
    return _plan.limits(
        p.weight.shape[0], kinds, True, p.hidden.device, settings.schedule, settings.memory_budget, sides=2
    )


def retained_like(p: HeadInputs, settings: LinearPairSettings, rows: int | torch.SymInt) -> Tensor:
    """The buffer for the retained logits of ``rows`` rows of both sides."""
    kinds = _plan.types(p.hidden.device, p.hidden.dtype, settings.logits_dtype)
    return p.hidden.new_empty((2, rows, p.weight.shape[0]), dtype=kinds.tile)


class _Pair:
    """The inputs of one call as GEMMs and row kernels take them."""

    def __init__(
        self, kernels: Kernels, p: HeadInputs, q: HeadInputs, targets: Tensor, settings: LinearPairSettings
    ) -> None:
        self.kernels, self.spec = kernels, settings.spec
        self.heads = tuple(
            Operands(side.hidden, side.weight, targets, side.bias, side.temperature, side.outer, own)
            for side, own in zip((p, q), settings.heads, strict=True)
        )
        self.targets, self.rows, self.vocab = self.heads[0].targets, self.heads[0].rows, p.weight.shape[0]

    def sides(self, tiles: list[Tensor], states: list[Tensor], rows: slice, cols: slice) -> tuple[Side, Side]:
        def side(head: Operands, tile: Tensor, state: Tensor) -> Side:
            temperature = None if head.temperature is None else head.temperature[rows]
            return Side(tile, temperature, head.bias_slice(cols), head.spec, state[:, rows])

        p, q = (side(*each) for each in zip(self.heads, tiles, states, strict=True))
        return p, q

    def buffers(self, rows: int, cols: int) -> list[Tensor]:
        """Room for a tile of each side."""
        like = self.heads[0]
        return [empty(rows, cols, dtype=like.types.tile, device=like.hidden.device) for _ in self.heads]

    def fill(self, tiles: list[Tensor], rows: slice, weights: list[Slice]) -> None:
        """Logits of both sides."""
        for head, tile, weight in zip(self.heads, tiles, weights, strict=True):
            weight.logits(tile, head.hidden[rows])


def forward(
    kernels: Kernels, p: HeadInputs, q: HeadInputs, targets: Tensor, settings: LinearPairSettings
) -> tuple[RowPair, PairSaved]:
    """Divergence and token statistics of every row, with what the backward needs."""
    total = targets.shape[0]
    pair = _Pair(kernels, p, q, targets, settings)
    bounds = limits(p, settings)
    retained = _walk.allocate_retained(
        lambda rows: retained_like(p, settings, rows), min(total, bounds.retained_rows), settings.replan
    )
    walk = _ForwardWalk(pair, p.hidden)
    kept = min(pair.rows, retained.shape[1])
    if kept:
        walk.whole(slice(0, kept), list(retained[:, :kept].unbind(0)), bounds)
    walk.rest(kept, bounds)
    head = pair.heads[0]
    stats = _pair.finish((walk.states[0], walk.states[1]), walk.cross, pair.targets, settings)
    states = torch.stack([state[:3] for state in walk.states])
    if head.keep is not None:
        keep = head.keep

        def restore(x: Tensor, wanted: bool = True) -> Tensor:
            """Of rows in the last dimension."""
            return x.new_zeros(*x.shape[:-1], total).index_copy_(-1, keep, x) if wanted else x

        stats = RowPair(*(restore(*each) for each in zip(stats, settings.wanted, strict=True)))
        states = restore(states)
    return stats, PairSaved(states, retained)


class _ForwardWalk:
    def __init__(self, pair: _Pair, like: Tensor) -> None:
        self.pair = pair
        self.states = [new_state(pair.rows, like) for _ in pair.heads]
        dtype = accumulator_dtype(like.dtype)
        self.cross = torch.zeros(CROSS_ROWS, pair.rows, dtype=dtype, device=like.device)

    def whole(self, rows: slice, tiles: list[Tensor], bounds: _plan.Limits) -> None:
        """Rows of the whole vocabulary, whose logits stay in ``tiles``."""
        pair = self.pair
        for head, tile in zip(pair.heads, tiles, strict=True):
            # A weight that must be converted is converted slice by slice.
            width = bounds.tile_cols if head.converts else pair.vocab
            for cols in spans(0, pair.vocab, width):
                head.weight_slice(cols).logits(tile[:, cols], head.hidden[rows])
        everything = slice(0, pair.vocab)
        self._first(rows, everything, tiles)
        if pair.spec.needs_totals:
            self._second(rows, everything, tiles)

    def rest(self, first_row: int, bounds: _plan.Limits) -> None:
        """The rows from ``first_row`` on, through one tile of each side."""
        pair, left = self.pair, self.pair.rows - first_row
        if not left:
            return
        if pair.spec.needs_totals and _plan.in_whole_rows(bounds, left):
            buffers = pair.buffers(min(bounds.whole_rows, left), pair.vocab)
            for rows in spans(first_row, pair.rows, bounds.whole_rows):
                self.whole(rows, [buffer[: rows.stop - rows.start] for buffer in buffers], bounds)
            return
        buffers = pair.buffers(min(bounds.tile_rows, left), min(bounds.tile_cols, pair.vocab))
        for process in (self._first, self._second)[: 2 if pair.spec.needs_totals else 1]:
            for cols in spans(0, pair.vocab, bounds.tile_cols):
                weights = [head.weight_slice(cols) for head in pair.heads]
                for rows in spans(first_row, pair.rows, bounds.tile_rows):
                    tiles = [buffer[: rows.stop - rows.start, : cols.stop - cols.start] for buffer in buffers]
                    pair.fill(tiles, rows, weights)
                    process(rows, cols, tiles)

    def _first(self, rows: slice, cols: slice, tiles: list[Tensor]) -> None:
        pair = self.pair
        targets = pair.targets[rows]
        p, q = pair.sides(tiles, self.states, rows, cols)
        if not pair.spec.needs_totals:
            pair.kernels.pairs.stats(p, q, cols.start, targets, pair.spec, self.cross[:, rows])
            return
        for side in (p, q):
            pair.kernels.rows.stats(
                side.tile, cols.start, targets, side.temperature, side.bias, side.spec, side.state
            )  # fmt: skip

    def _second(self, rows: slice, cols: slice, tiles: list[Tensor]) -> None:
        pair = self.pair
        p, q = pair.sides(tiles, self.states, rows, cols)
        pair.kernels.pairs.sums(p, q, cols.start, pair.targets[rows], pair.spec, self.cross[:, rows])


def backward(
    kernels: Kernels,
    grads: PairGrads,
    p: HeadInputs,
    q: HeadInputs,
    targets: Tensor,
    stats: RowPair,
    saved: PairSaved,
    needs: tuple[Needs, Needs],
    drop_zero_rows: bool,
    into: tuple[Into, Into],
    settings: LinearPairSettings,
) -> list[Tensor]:
    """Gradients of hidden states, weight and bias of the first side, then of the other; empty where not needed."""
    if grads.divergence is None:  # no side then needs the other's logits
        return [
            gradient
            for index, (side, own) in enumerate(zip((p, q), settings.heads, strict=True))
            for gradient in _alone(
                kernels, grads.of_side(index), side, targets, (stats.entropy, stats.other_entropy)[index],
                Saved(saved.states[index], saved.retained[index], saved.states.new_empty(0)), needs[index],
                drop_zero_rows, into[index], own,
            )
        ]  # fmt: skip
    walk = _BackwardWalk(_Pair(kernels, p, q, targets, settings), grads, stats, saved, needs, into, settings)
    if drop_zero_rows or targets.device.type == "cpu":
        walk.drop_zero_rows()
    return walk.run((p, q), limits(p, settings))


def _alone(
    kernels: Kernels, grads: tuple, side: HeadInputs, targets: Tensor, entropy: Tensor, saved: Saved, needs: Needs,
    drop_zero_rows: bool, into: Into, settings: HeadSettings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    hidden, weight, bias, temperature, outer = side
    if not any(needs) or all(g is None for g in grads):
        returned = needs.weight and into.weight is None
        return (
            hidden.new_zeros(hidden.shape if needs.states else (0, hidden.shape[1])),
            side.trained.new_zeros(side.trained.shape if returned else (0,)),
            hidden.new_zeros((weight.shape[0] if needs.bias else 0,)),
        )
    return _walk.backward(
        kernels.rows, grads, hidden, weight, targets, bias, temperature, outer, entropy, saved, needs, drop_zero_rows,
        into, settings,
    )  # fmt: skip


class _BackwardWalk:
    """Slices of the vocabulary outside, rows inside, as for one head; each element of both tiles is read once."""

    def __init__(
        self, pair: _Pair, grads: PairGrads, stats: RowPair, saved: PairSaved, needs: tuple[Needs, Needs],
        into: tuple[Into, Into], settings: LinearPairSettings,
    ) -> None:  # fmt: skip
        self.pair, self.needs, self.into = pair, needs, into
        head = pair.heads[0]

        def pick(x: Tensor) -> Tensor:
            """Of rows in the last dimension."""
            return x if head.keep is None or not x.numel() else x.index_select(-1, head.keep)

        picked = PairGrads(*(None if g is None else pick(g) for g in grads))
        own = RowPair(*(pick(x) for x in stats))
        ignored = pair.targets == settings.ignore_index
        self.active = [index for index in (0, 1) if any(needs[index])]
        self.scale_coef = {index: _pair.coefficients(picked, index, own, ignored) for index in self.active}
        self.states = list(pick(saved.states).unbind(0))
        self.retained = saved.retained
        self.kept_rows = min(pair.rows, saved.retained.shape[1])

    def drop_zero_rows(self) -> None:
        """As of one head, where neither side has a gradient."""
        pair = self.pair
        either = torch.stack([scale != 0 for scale, _ in self.scale_coef.values()]).any(0)
        chosen = _walk.rows_worth_gathering(either)
        if chosen is None:
            return
        everything = self.kept_rows == pair.rows
        self.kept_rows = chosen.shape[0] if everything else int((chosen < self.kept_rows).sum())
        for head in pair.heads:
            head.select(chosen)
        pair.targets, pair.rows = pair.heads[0].targets, chosen.shape[0]
        self.scale_coef = {
            index: (scale.index_select(0, chosen), coef.index_select(1, chosen))
            for index, (scale, coef) in self.scale_coef.items()
        }
        self.states = [state.index_select(1, chosen) for state in self.states]

    def run(self, inputs: tuple[HeadInputs, HeadInputs], bounds: _plan.Limits) -> list[Tensor]:
        pair, width = self.pair, min(self.pair.vocab, bounds.tile_cols)
        chunks = [
            *spans(0, self.kept_rows, bounds.tile_rows),
            *spans(self.kept_rows, pair.rows, bounds.tile_rows),
        ]
        largest = max((rows.stop - rows.start for rows in chunks), default=0)
        recomputed = self.kept_rows < pair.rows
        tiles = pair.buffers(largest, width) if recomputed else []
        types = pair.heads[0].types
        # Logits that nobody needs any more make room for their gradient.
        apart = not recomputed or types.operand != types.tile
        outs = {
            index: empty(largest, width, dtype=types.operand, device=pair.targets.device)
            if apart or self.kept_rows
            else tiles[index]
            for index in self.active
        }
        gradients = {
            index: HeadGradients(
                pair.heads[index], self.scale_coef[index][0], self.needs[index], len(chunks), self.into[index]
            )
            for index in self.active
        }
        for cols in spans(0, pair.vocab, width):
            weights = [
                head.weight_slice(cols if recomputed or index in self.active else slice(0, 0))
                for index, head in enumerate(pair.heads)
            ]
            for rows in chunks:
                written = self._gradient_tiles(rows, cols, weights, tiles, outs)
                for index, tile in written.items():
                    gradients[index].add(rows, cols, tile, weights[index])
        results: list[Tensor] = []
        for index, (side, needs) in enumerate(zip(inputs, self.needs, strict=True)):
            if index in gradients:
                results += gradients[index].finish(side.hidden)
            else:
                results += _none(side, needs)
        return results

    def _gradient_tiles(
        self, rows: slice, cols: slice, weights: list[Slice], tiles: list[Tensor], outs: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """The logits' gradients over scale, of the sides that need them, in the operands' type."""
        pair = self.pair
        window = slice(0, rows.stop - rows.start), slice(0, cols.stop - cols.start)
        if rows.start < self.kept_rows:
            logits = [side[rows, cols] for side in self.retained]
            chosen = pair.heads[0].chosen
            if chosen is not None:
                logits = [side[:, cols].index_select(0, chosen[rows]) for side in self.retained]
        else:
            logits = [tile[window] for tile in tiles]
            pair.fill(logits, rows, weights)
        written = {index: out[window] for index, out in outs.items()}
        coefs = [self.scale_coef[index][1][:, rows] if index in written else None for index in (0, 1)]
        p, q = pair.sides(logits, self.states, rows, cols)
        pair.kernels.pairs.grad(
            p, q, written.get(0), written.get(1), cols.start, pair.targets[rows], pair.spec, *coefs
        )  # fmt: skip
        return written


def _none(side: HeadInputs, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    return side.hidden.new_empty(0, side.hidden.shape[1]), side.trained.new_empty(0), side.hidden.new_empty(0)
