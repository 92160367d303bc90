"""Which schedule a head call runs, in which tiles, and what that costs."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from prefcore._types import PAIR_OUTPUTS
from prefcore.ops._arguments import (
    check_float,
    check_logits_dtype,
    check_memory_budget,
    check_outputs,
    check_precision,
)
from prefcore.ops._checks import check_type
from prefcore.ops._pair_arguments import Kind, check_kind
from prefcore.ops._spec import PairSpec

Schedule = Literal["auto", "forward", "frozen", "retain", "recompute"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
PAIR_SCHEDULES = ("auto", "forward", "retain", "recompute")  # of linear_divergence

# Width of a vocabulary slice. Wide slices keep the traffic of the float32 accumulators [T, D] small beside the GEMMs.
# On a CPU narrower slices than these were slower in every schedule, and wider ones no faster.
_COLS = {"cpu": 8192, "cuda": 32768}
# No budget makes tiles smaller than this: below it a GEMM wastes more than the memory is worth.
_MIN_ROWS, _MIN_COLS = 128, 1024
# Rows in a tile of the whole vocabulary, below which two sweeps in slices are cheaper: each tile reads the weight anew.
_MIN_WHOLE_ROWS = 256
_UNBOUNDED = 1 << 62


class Tiles(NamedTuple):
    """How the ``[T, V]`` logits are walked."""

    rows: int  #: tokens in one tile
    cols: int  #: vocabulary entries in one tile
    retained: int  #: leading tokens whose logits stay in memory until the backward


@dataclass(frozen=True)
class Plan:
    """What a call of ``linear_logprobs``, ``linear_loss`` or ``linear_divergence`` does, forward and backward."""

    schedule: str  #: ``forward``, ``frozen``, ``retain``, ``mixed``, ``recompute`` or ``loop``
    tiles: Tiles
    sweeps: int  #: how often a row's logits are computed, of the rows for which that is most often
    flops: int  #: of the GEMMs
    bytes: int  #: estimated memory traffic, each operand of a GEMM or row pass counted once per use
    peak_bytes: int  #: most memory held beside the caller's tensors and the gradients returned
    reason: str


class Limits(NamedTuple):
    """The part of a plan that does not depend on the number of tokens."""

    tile_rows: int
    tile_cols: int
    retained_rows: int
    whole_rows: int  #: rows of a tile of all V columns


@functools.cache
def default_budget(device: torch.device) -> int:
    """1/16 of the device's total memory: every step and every rank of a job decides alike."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // 16


@functools.cache
def _cpu_has_bfloat16_units() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


class Types(NamedTuple):
    """The element types of one call."""

    operand: torch.dtype  #: of the GEMMs' operands, the logits' gradient among them
    tile: torch.dtype  #: of the logits
    round_to: torch.dtype | None  #: what the logits are rounded to where the tile is wider

    def kept(self, raw: bool) -> torch.dtype:
        """Of retained rows: logits where a gradient may need them again, else onehot - p."""
        return self.tile if raw else self.operand


def types(device: torch.device, dtype: torch.dtype, logits_dtype: torch.dtype | None) -> Types:
    """The input's type throughout, but float32 on a CPU that has no units for a 16-bit type.

    A CPU's 16-bit GEMM cannot write float32 either, so float32 logits of 16-bit inputs are upcast there too.
    """
    if device.type != "cpu" or dtype.itemsize >= 4:
        return Types(dtype, logits_dtype or dtype, None)
    if dtype == torch.bfloat16 and logits_dtype in (None, dtype) and _cpu_has_bfloat16_units():
        return Types(dtype, dtype, None)
    return Types(torch.float32, torch.float32, None if logits_dtype == torch.float32 else dtype)


def limits(
    V: int, kinds: Types, raw: bool, device: torch.device, schedule: str, memory_budget: int | None, sides: int = 1
) -> Limits:
    """Tile sizes, and the number of rows that may be retained, where ``sides`` tiles are held at once."""
    itemsize = max(kinds.kept(raw).itemsize, kinds.tile.itemsize) * sides
    budget = default_budget(device) if memory_budget is None else memory_budget
    tile_bytes = budget // 8
    target = _COLS.get(device.type, _COLS["cuda"])
    while True:
        even = -(-V // -(-V // target))  # the width of equally wide slices
        cols = min(V, -(-even // 256) * 256)
        rows = tile_bytes // (cols * itemsize) // _MIN_ROWS * _MIN_ROWS
        if rows >= 1024 or target <= _MIN_COLS:
            break
        target //= 2
    rows = max(rows, _MIN_ROWS)
    if schedule == "retain" and memory_budget is None:
        retained = _UNBOUNDED
    elif schedule in ("auto", "retain", "loop"):
        # An eighth, or the smallest tile, is for the rows that do not fit.
        retained = max(0, budget - max(tile_bytes, rows * cols * itemsize)) // (V * itemsize)
    else:
        retained = 0
    whole = tile_bytes // (V * itemsize)
    if not retained:  # all of the budget is there for as many rows as save a sweep
        whole = max(whole, min(_MIN_WHOLE_ROWS, budget // (V * itemsize)))
    return Limits(rows, cols, retained, whole)


def in_whole_rows(bounds: Limits, rows: int) -> bool:
    """Whether rows that are read twice stay in tiles of whole rows between: a tile narrower than these wastes GEMMs."""
    return bounds.whole_rows >= min(rows, _MIN_WHOLE_ROWS)


def loop_rows(bounds: Limits) -> int:
    """Rows of a tile of ``linear_loss`` at which it is full; only a group that is larger makes a larger one.

    Whole rows as many as may be retained, if that is enough for a GEMM; else tiles that are recomputed anyway.
    """
    return bounds.retained_rows if bounds.retained_rows >= _MIN_ROWS else bounds.tile_rows


def loop_tiles(offsets: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Ranges of groups, those that follow one another as long as they have ``rows`` rows at most; one at the least.

    ``offsets [G + 1]`` are those of the groups into the rows. Every group is in one tile.
    """
    tiles, first = [], 0
    for group in range(1, len(offsets) - 1):
        if offsets[group + 1] - offsets[first] > rows and offsets[group + 1] > offsets[group]:
            tiles.append((first, group))
            first = group
    if len(offsets) > 1:
        tiles.append((first, len(offsets) - 1))
    return tiles


def check_schedule(schedule: str, allowed: tuple[str, ...] = SCHEDULES) -> None:
    check_type("schedule", schedule, str)
    if schedule not in allowed:
        raise ValueError(f"schedule must be one of {allowed}, got {schedule!r}")


def _device(device: torch.device | str, memory_budget: int | None) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must name a device, got {device!r}") from error
    if device.type not in _COLS:
        raise ValueError(f"device must be a CPU or a CUDA device, got {str(device)!r}")
    if device.type == "cuda" and memory_budget is None and not torch.cuda.is_available():
        raise ValueError("no CUDA device is there to take the default memory_budget from; give one")
    return device


def choose(schedule: str, hidden_grad: bool, weight_grad: bool) -> str:
    """The schedule to run: ``auto`` made concrete, except that ``auto`` stays for logits kept as far as they fit.

    Raises:
        ValueError: ``frozen`` while the weight or the bias needs a gradient.
    """
    if not (hidden_grad or weight_grad):
        return "forward"
    if schedule == "frozen" and weight_grad:
        raise ValueError(
            "schedule='frozen' needs a weight and a bias without gradient, got one with requires_grad=True; "
            "detach them or use schedule='auto'"
        )
    if schedule == "auto" and not weight_grad:
        return "frozen"
    return choose_pair(schedule, True)


def choose_pair(schedule: str, grad: bool) -> str:
    """The schedule of ``linear_divergence``: ``auto`` stays for logits kept as far as they fit.

    Raises:
        ValueError: ``forward`` while an input needs a gradient.
    """
    if not grad:
        return "forward"
    if schedule == "forward":
        raise ValueError("schedule='forward' computes no gradient, but an input has requires_grad=True; use 'auto'")
    return schedule


def plan(
    T: int,
    D: int,
    V: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    hidden_requires_grad: bool = True,
    weight_requires_grad: bool = True,
    outputs: tuple[str, ...] = (),
    schedule: Schedule | Literal["loop"] = "auto",
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    low_rank: int | None = None,
    groups: Sequence[int] | None = None,
    divergence: Kind | None = None,
    other_D: int | None = None,
    other_hidden_requires_grad: bool = False,
    other_weight_requires_grad: bool = False,
    weight_dtype: torch.dtype | None = None,
) -> Plan:
    """What ``linear_logprobs``, ``linear_loss`` or ``linear_divergence`` will do for these shapes, without doing it.

    A pure function of its arguments when ``memory_budget`` is given; without it the budget is 1/16 of the total
    memory of ``device``, which must then be present.

    Args:
        T: target rows. D: hidden size. V: vocabulary size.
        dtype: of the hidden states.
        device: where they are; decides tile shapes.
        hidden_requires_grad: whether the hidden states need a gradient.
        weight_requires_grad: whether the weight or the bias needs one.
        outputs: as in ``linear_logprobs``; ``entropy`` and ``logsumexp`` keep raw logits in ``retain``.
        schedule: as in ``linear_logprobs``, or ``loop`` for ``linear_loss``.
        memory_budget: bytes of logits held at once.
        logits_dtype: as in ``linear_logprobs``.
        low_rank: the rank R of ``low_rank`` in ``linear_logprobs`` or ``linear_loss``. ``weight_requires_grad`` is then
            that of ``outer`` or the bias, and ``inner`` is taken to need a gradient where any other does.
        groups: for ``loop``, the number of rows of each group; by default each row is one.
        divergence: the kind, for a call of ``linear_divergence``; ``outputs`` are then those of that.
        other_D: hidden size of the other side of a divergence; by default ``D``.
        other_hidden_requires_grad, other_weight_requires_grad: of the other side of a divergence.
        weight_dtype: of the weight, or of both weights of a divergence; by default ``dtype``.

    Returns:
        A :class:`Plan`.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a size, budget or dtype out of range, an unknown output or schedule, a schedule that these flags
            rule out, or a device that is not there while ``memory_budget`` is not given.
    """
    for name, size in (("T", T), ("D", D), ("V", V)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
    if T < 0 or D < 1 or V < 1:
        raise ValueError(f"expected T >= 0, D >= 1 and V >= 1, got T={T}, D={D}, V={V}")
    check_type("dtype", dtype, torch.dtype)
    check_float("dtype", dtype)
    check_type("weight_dtype", weight_dtype, torch.dtype, optional=True)
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    check_float("weight_dtype", weight_dtype)
    check_precision("weight_dtype", weight_dtype, dtype)
    check_logits_dtype(dtype, logits_dtype)
    check_memory_budget(memory_budget)
    _check_rank(low_rank)
    if divergence is not None:
        if low_rank is not None:
            raise NotImplementedError("low_rank: of a divergence no plan is made with one yet; pass None")
        return _plan_pair(
            T, D, V, dtype, _device(device, memory_budget), hidden_requires_grad, weight_requires_grad, outputs,
            schedule, memory_budget, logits_dtype, groups, divergence, other_D, other_hidden_requires_grad,
            other_weight_requires_grad, weight_dtype,
        )  # fmt: skip
    if other_D is not None or other_hidden_requires_grad or other_weight_requires_grad:
        raise ValueError("other_D and the other side's gradients belong to a divergence; name its kind")
    check_schedule(schedule, (*SCHEDULES, "loop"))
    names = check_outputs(outputs)
    offsets = _group_offsets(T, schedule, groups)
    device = _device(device, memory_budget)
    chosen = choose(schedule, hidden_requires_grad, weight_requires_grad)
    kinds = types(device, dtype, logits_dtype)
    raw = bool({"entropy", "logsumexp"} & names)
    bounds = limits(V, kinds, raw, device, chosen, memory_budget)
    head = _Products.of(D, low_rank, hidden_requires_grad, weight_requires_grad)
    if chosen == "loop":
        converted = _converted(bounds, D, V, dtype, weight_dtype, kinds)
        trained_dtype = weight_dtype if low_rank is None else dtype
        return _plan_loop(T, V, (dtype, trained_dtype), kinds, raw, bounds, offsets, head, converted)
    retained = min(T, bounds.retained_rows) if chosen in ("auto", "retain") else 0
    rows, cols = min(T, bounds.tile_rows), bounds.tile_cols
    walked = T - retained
    slices = -(-V // cols)

    columns, unit = sum(head.logits), 2 * T * V * sum(head.logits)
    size, tile_size, kept_size = kinds.operand.itemsize, kinds.tile.itemsize, kinds.kept(raw).itemsize
    tile_pass = T * V * tile_size
    operands = (T * slices + V) * size  # per column
    gemm = columns * operands + head.logits_passes * tile_pass
    accumulator = T * columns * max(4, size)
    if chosen == "forward":
        flops, traffic, peak = unit, gemm + tile_pass, rows * cols * tile_size
        name, reason = "forward", "no gradient is wanted: one sweep over the vocabulary"
    elif chosen == "frozen":
        flops = 2 * unit
        traffic = 2 * columns * operands + (head.logits_passes + len(head.logits) + 3) * tile_pass
        traffic += 2 * slices * accumulator
        peak = rows * cols * (tile_size + (size if tile_size != size else 0)) + accumulator
        name, reason = (
            "frozen",
            "neither weight nor bias needs a gradient: the forward finds all the backward needs",
        )
    else:
        gradients = head.hidden + head.weight
        flops = unit + 2 * T * V * sum(gradients) + 2 * walked * V * columns
        traffic = gemm + sum(gradients) * operands + len(gradients) * tile_pass
        traffic += (walked * slices + V) * columns * size + 3 * tile_pass
        scratch = rows * cols * tile_size if walked or raw else 0
        peak = retained * V * kept_size + scratch + 2 * accumulator
        name, reason = _retention(
            schedule, T, retained, default_budget(device) if memory_budget is None else memory_budget
        )
    sweeps = 1 + (name in ("mixed", "recompute"))
    peak += _converted(bounds, D, V, dtype, weight_dtype, kinds)
    return Plan(name, Tiles(rows, cols, retained), sweeps, flops, traffic, peak, reason)


def _converted(bounds: Limits, D: int, V: int, dtype: torch.dtype, weight_dtype: torch.dtype, kinds: Types) -> int:
    """Bytes of a slice of the weight beside the weight itself, while it is converted."""
    rounded = dtype.itemsize if weight_dtype != dtype else 0
    widened = kinds.operand.itemsize if dtype != kinds.operand else 0
    return min(V, bounds.tile_cols) * D * (rounded + widened)


def _retention(schedule: str, T: int, retained: int, budget: int) -> tuple[str, str]:
    """The name of a schedule that retains the logits of so many rows, and the reason for it."""
    name = "retain" if retained == T else "recompute" if retained == 0 else "mixed"
    if schedule == name:
        return name, f"schedule={name!r} was asked for"
    if name == "retain":
        return name, f"the logits of all {T} rows fit 7/8 of the budget of {budget:,} bytes"
    if name == "recompute":
        return name, f"7/8 of the budget of {budget:,} bytes hold the logits of no row"
    return name, f"{retained} of {T} rows' logits fit 7/8 of the budget of {budget:,} bytes; the rest is recomputed"


def _plan_pair(
    T: int, D: int, V: int, dtype: torch.dtype, device: torch.device, hidden_grad: bool, weight_grad: bool,
    outputs: tuple[str, ...], schedule: str, memory_budget: int | None, logits_dtype: torch.dtype | None,
    groups: Sequence[int] | None, divergence: str, other_D: int | None, other_hidden_grad: bool,
    other_weight_grad: bool, weight_dtype: torch.dtype,
) -> Plan:  # fmt: skip
    check_outputs(outputs, PAIR_OUTPUTS)
    two_phases = PairSpec(check_kind(divergence, None, None).kind).needs_totals  # type: ignore[arg-type]
    check_schedule(schedule, PAIR_SCHEDULES)
    if groups is not None:
        raise ValueError("groups is for schedule='loop', which linear_divergence does not have")
    if other_D is not None and type(other_D) is not int:
        raise TypeError(f"other_D must be an int or None, got {type(other_D).__name__}")
    if other_D is not None and other_D < 1:
        raise ValueError(f"expected other_D >= 1, got {other_D}")
    widths = (D, D if other_D is None else other_D)
    grads = (hidden_grad, weight_grad), (other_hidden_grad, other_weight_grad)
    chosen = choose_pair(schedule, any(grads[0]) or any(grads[1]))
    kinds = types(device, dtype, logits_dtype)
    bounds = limits(V, kinds, True, device, chosen, memory_budget, sides=2)
    retained = min(T, bounds.retained_rows) if chosen in ("auto", "retain") else 0
    walked = T - retained

    again = two_phases and walked > 0 and not in_whole_rows(bounds, walked)
    in_slices = not two_phases or again
    rows = min(walked, bounds.tile_rows if in_slices else bounds.whole_rows)
    cols = min(V, bounds.tile_cols) if in_slices else V
    backward = chosen != "forward"
    products = sum(width * sum(own) for width, own in zip(widths, grads, strict=True))  # of gradients, per row and V
    forward_rows = retained + walked * (1 + again)
    backward_rows = walked if backward else 0
    flops = 2 * V * (sum(widths) * (forward_rows + backward_rows) + products * T)

    size, tile_size = kinds.operand.itemsize, kinds.tile.itemsize
    wide = max(4, size)
    slices = -(-V // bounds.tile_cols)
    sweep = (T * slices + V) * size  # of operands, per unit of width
    sides = sum(any(own) for own in grads)
    traffic = sum(widths) * sweep * (1 + again + bool(backward_rows)) + products * sweep
    traffic += 2 * V * tile_size * (2 * forward_rows + 2 * backward_rows)  # written by the GEMM, read by the kernel
    traffic += T * V * (2 * tile_size * (two_phases + backward) + 3 * sides * size)
    accumulators = sum(T * width * wide for width, own in zip(widths, grads, strict=True) if own[0])
    scratch = 2 * rows * cols * tile_size if walked else 0
    if backward:
        tile = min(T, bounds.tile_rows) * min(V, bounds.tile_cols)
        apart = sides * size if retained or size != tile_size else 0
        scratch = max(scratch, tile * ((2 * tile_size if walked else 0) + apart))
    peak = 2 * retained * V * tile_size + scratch + 2 * accumulators
    peak += sum(_converted(bounds, width, V, dtype, weight_dtype, kinds) for width in widths)
    if not backward:
        name, reason = "forward", "no gradient is wanted"
    else:
        budget = default_budget(device) if memory_budget is None else memory_budget
        name, reason = _retention(schedule, T, retained, budget)
    if again:
        reason += f"; {divergence} needs two sweeps, since a tile does not hold {_MIN_WHOLE_ROWS} whole rows of both"
    sweeps = 1 + again + (backward_rows > 0)
    return Plan(name, Tiles(rows or min(T, bounds.tile_rows), cols, retained), sweeps, flops, traffic, peak, reason)


def _group_offsets(T: int, schedule: str, groups: Sequence[int] | None) -> Sequence[int]:
    if groups is None:
        return range(T + 1)
    if schedule != "loop":
        raise ValueError(f"groups is for schedule='loop', got schedule={schedule!r}")
    if not isinstance(groups, list | tuple | range) or not all(type(rows) is int for rows in groups):
        raise TypeError("groups must be a sequence of ints, the number of rows of each group")
    if any(rows < 0 for rows in groups) or sum(groups) != T:
        raise ValueError(f"groups must not be negative and add up to T, {T}, got the sum {sum(groups)}")
    return (0, *itertools.accumulate(groups))


class _Products(NamedTuple):
    """Of each GEMM of the head, the side that is neither tokens nor vocabulary."""

    logits: tuple[int, ...]
    hidden: tuple[int, ...]  # the gradient of the hidden states
    weight: tuple[int, ...]

    @classmethod
    def of(cls, D: int, low_rank: int | None, hidden_grad: bool, weight_grad: bool) -> _Products:
        if low_rank is None:
            return cls((D,), (D,) * hidden_grad, (D,) * weight_grad)
        R = -(-low_rank // 8) * 8  # as join_low_rank fills it up
        return cls((R, D), (D, R) if hidden_grad else (R,) * weight_grad, (R,) * weight_grad)

    @property
    def logits_passes(self) -> int:
        """How often the GEMMs that make logits go over them: one after the first reads and writes."""
        return 2 * len(self.logits) - 1


def _check_rank(low_rank: int | None) -> None:
    if low_rank is None:
        return
    if type(low_rank) is not int:
        raise TypeError(f"low_rank must be an int or None, got {type(low_rank).__name__}")
    if low_rank < 1:
        raise ValueError(f"expected low_rank >= 1, got {low_rank}")


def _plan_loop(
    T: int, V: int, dtypes: tuple[torch.dtype, torch.dtype], kinds: Types, raw: bool, bounds: Limits,
    offsets: Sequence[int], head: _Products, converted: int,
) -> Plan:  # fmt: skip
    """``dtypes`` of the hidden states and of what trains of the head, ``converted`` the bytes of a slice of that."""
    weight_grad, columns = bool(head.weight), sum(head.logits)
    tiles = [offsets[stop] - offsets[start] for start, stop in loop_tiles(offsets, loop_rows(bounds))]
    # A tile runs `frozen`, which keeps no logits, where that costs nothing more.
    keeps = weight_grad or raw
    larger = [rows for rows in tiles if rows > bounds.retained_rows] if keeps else []
    again = sum(rows - bounds.retained_rows for rows in larger) if weight_grad else 0
    fit = [min(rows, bounds.retained_rows) for rows in tiles if weight_grad or rows <= bounds.retained_rows]
    held = max(fit, default=0) if keeps else 0
    every = head.logits + head.hidden + head.weight
    flops = 2 * V * (T * sum(every) + again * columns)

    size, tile_size, kept_size = kinds.operand.itemsize, kinds.tile.itemsize, kinds.kept(raw).itemsize
    wide = max(4, size)
    count, most = len(tiles), max(tiles, default=0)
    sweeps = sum(every) * (T + count * V) + again * columns * -(-V // bounds.tile_cols)
    passes = T * (head.logits_passes + len(head.hidden + head.weight) + 3) + again * head.logits_passes
    traffic = sweeps * size + passes * V * tile_size
    sums = T * columns if head.hidden else 0, V * sum(head.weight)
    traffic += wide * (T * columns + 2 * count * V * sum(head.weight))
    scratch = 0
    if larger or raw or not keeps or kept_size != tile_size:
        scratch = (
            min(most, bounds.tile_rows) * min(V, bounds.tile_cols) * (tile_size + (size if size != tile_size else 0))
        )
    # What is kept until the backward is returned by it where it has the type of the input.
    kept = sum(each * wide for each, dtype in zip(sums, dtypes, strict=True) if dtype.itemsize != wide)
    peak = held * V * kept_size + scratch + kept + 2 * most * columns * wide + converted
    reason = f"{count} tile(s) of whole groups, of {most} rows at most"
    if larger:
        reason += f"; {len(larger)} of them exceed the {bounds.retained_rows} rows that fit the budget"
    return Plan(
        "loop",
        Tiles(most, V if keeps and not larger else bounds.tile_cols, held),
        1 + bool(again),
        flops,
        traffic,
        peak,
        reason,
    )
