"""Statistics of rows of logits, and their gradient: one program per row, which it walks in 16-byte vectors.

The functions are those of the CPU back end. ``spec`` and the rows of ``state`` are explained in
``prefcore/ops/_spec.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefcore.kernels import _rows as rows
from prefcore.kernels._launch import ONE_PASS, TWO_PASSES, Ladder, row_config

if TYPE_CHECKING:
    from prefcore.ops._spec import LogitSpec

# The kernels see to the alignment of rows themselves (_span): nothing but pointers to rows is specialised.
UNSPECIALISED = [
    "tile_stride",
    "out_stride",
    "acc_stride",
    "targets_ptr",
    "temperature_ptr",
    "state_ptr",
    "state_stride",
    "entropy_ptr",
    "coef_ptr",
    "coef_stride",
    "col0",
    "C",
    "D",
    "vocab",
    "ignore_index",
]


@triton.jit
def _sweep(source, span, target_offset, V: tl.constexpr):
    """One pass over a row: its peak, and its other statistics relative to that."""
    # Each lane has a state of its own and reduces no more than its k neighbours, which one thread holds:
    # threads exchange nothing before the row's end, and one exp in k + 1 is for rescaling.
    peak = tl.full((V.lanes,), rows.FLOOR, V.acc)
    total = tl.full((V.lanes,), 0.0, V.acc)
    shifted = tl.full((V.lanes,), 0.0, V.acc)
    summed = tl.full((V.lanes,), 0.0, V.acc)
    squares = tl.full((V.lanes,), 0.0, V.acc)
    before = tl.full((V.lanes,), -float("inf"), V.acc)
    for EDGE in tl.static_range(2):
        for start in range(0, rows.steps(span, EDGE, V), V.lanes):
            offsets, mask = rows.columns(start, span, EDGE, V)
            z, _ = rows.logits(source, offsets, mask, V)
            higher = tl.maximum(peak, tl.max(z, 1))
            moved = rows.shift(peak, higher)
            scale = rows.exp(moved, V)
            d = z - higher[:, None]
            e = rows.exp(d, V)
            if V.entropy:
                shifted = (shifted + total * moved) * scale + tl.sum(e * tl.maximum(d, rows.DROP), 1)
            if V.mean:
                summed += tl.sum(tl.where(mask, z, 0.0), 1)
            if V.squares:
                squares = squares * (scale * scale) + tl.sum(e * e, 1)
            if V.top1:
                before = tl.maximum(before, tl.max(tl.where(offsets < target_offset, z, -float("inf")), 1))
            total = total * scale + tl.sum(e, 1)
            peak = higher
    highest = tl.max(peak, 0)
    moved = rows.shift(peak, highest)
    scale = rows.exp(moved, V)
    shifted = tl.sum((shifted + total * moved) * scale, 0)
    squares = tl.sum(squares * (scale * scale), 0)
    return highest, tl.sum(total * scale, 0), shifted, tl.sum(summed, 0), squares, tl.max(before, 0)


@triton.jit
def _write_gradient(
    source, out_ptr, span, hit, slope, peak, total, coef_ptr, coef_stride, entropy_ptr, V: tl.constexpr
):
    log_total = tl.log(total)
    if coef_ptr is not None:
        a = tl.load(coef_ptr)
        b = tl.load(coef_ptr + coef_stride)
        if entropy_ptr is not None:
            c = tl.load(coef_ptr + 2 * coef_stride)
            entropy = tl.load(entropy_ptr)
    for EDGE in tl.static_range(2):
        for start in range(0, rows.steps(span, EDGE, V), V.lanes):
            offsets, mask = rows.columns(start, span, EDGE, V)
            z, flatness = rows.logits(source, offsets, mask, V)
            logp = (z - peak) - log_total
            p = rows.exp(logp, V)
            if coef_ptr is None:
                gradient = tl.where(offsets == hit, 1.0 - p, -p)
            else:
                gradient = tl.where(offsets == hit, a, 0.0) - b * p
                if entropy_ptr is not None:
                    gradient -= c * (p * (tl.maximum(logp, rows.DROP) + entropy))
            tl.store(out_ptr + offsets, rows.round(gradient * (slope * flatness), out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _stats_kernel(
    tile_ptr,
    tile_stride,
    col0,
    C,
    targets_ptr,
    temperature_ptr,
    bias_ptr,
    state_ptr,
    state_stride,
    vocab,
    ignore_index,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target != ignore_index:
        span = rows.span(row, tile_stride, C, V)
        source, _ = rows.source(tile_ptr, tile_stride, bias_ptr, temperature_ptr, row, span, inner, outer, slope, V)
        inside, offset = rows.locate(target, col0, span)
        state_ptr += row
        peak, total, _ = rows.open_state(state_ptr, state_stride, source, target, vocab, inside, offset, V)
        rows.merge(state_ptr, state_stride, peak, total, _sweep(source, span, offset, V), V)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _weigh_kernel(
    tile_ptr,
    tile_stride,
    out_ptr,
    out_stride,
    acc_ptr,
    acc_stride,
    D,
    col0,
    C,
    targets_ptr,
    temperature_ptr,
    bias_ptr,
    state_ptr,
    state_stride,
    vocab,
    ignore_index,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    span = rows.span(row, tile_stride, C, V)
    out_ptr = rows.groups(out_ptr, row, out_stride, span, V.out_aligned, V)
    if target == ignore_index:
        rows.write_zeros(out_ptr, span, V)
    else:
        source, _ = rows.source(tile_ptr, tile_stride, bias_ptr, temperature_ptr, row, span, inner, outer, slope, V)
        inside, offset = rows.locate(target, col0, span)
        state_ptr += row
        old_peak, old_total, _ = rows.open_state(state_ptr, state_stride, source, target, vocab, inside, offset, V)

        peaks = tl.full((V.lanes,), rows.FLOOR, V.acc)
        for EDGE in tl.static_range(2):
            for start in range(0, rows.steps(span, EDGE, V), V.lanes):
                offsets, mask = rows.columns(start, span, EDGE, V)
                peaks = tl.maximum(peaks, tl.max(rows.logits(source, offsets, mask, V)[0], 1))
        peak = tl.maximum(old_peak, tl.max(peaks, 0))

        total = tl.full((V.lanes,), 0.0, V.acc)
        shifted = tl.full((V.lanes,), 0.0, V.acc)
        summed = tl.full((V.lanes,), 0.0, V.acc)
        squares = tl.full((V.lanes,), 0.0, V.acc)
        before = tl.full((V.lanes,), -float("inf"), V.acc)
        for EDGE in tl.static_range(2):
            for start in range(0, rows.steps(span, EDGE, V), V.lanes):
                offsets, mask = rows.columns(start, span, EDGE, V)
                z, flatness = rows.logits(source, offsets, mask, V)
                d = z - peak
                e = rows.exp(d, V)
                tl.store(out_ptr + offsets, rows.round(e * flatness, out_ptr.dtype.element_ty), mask=mask)
                total += tl.sum(e, 1)
                if V.entropy:
                    shifted += tl.sum(e * tl.maximum(d, rows.DROP), 1)
                if V.mean:
                    summed += tl.sum(tl.where(mask, z, 0.0), 1)
                if V.squares:
                    squares += tl.sum(e * e, 1)
                if V.top1:
                    before = tl.maximum(before, tl.max(tl.where(offsets < offset, z, -float("inf")), 1))
        first, second = tl.sum(total, 0), tl.sum(shifted, 0)
        statistics = (peak, first, second, tl.sum(summed, 0), tl.sum(squares, 0), tl.max(before, 0))
        new_peak, _ = rows.merge(state_ptr, state_stride, old_peak, old_total, statistics, V)
        # Over a whole walk a row's peak moves about as often as the logarithm of the number of tiles.
        if acc_ptr is not None and new_peak > old_peak:
            scale = rows.exp(rows.shift(old_peak, new_peak), V)
            acc_ptr += row * acc_stride
            for start in range(0, D, V.lanes):
                columns = start + tl.arange(0, V.lanes)
                scaled = tl.load(acc_ptr + columns, mask=columns < D, other=0.0) * scale
                tl.store(acc_ptr + columns, scaled, mask=columns < D)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _grad_kernel(
    tile_ptr,
    tile_stride,
    out_ptr,
    out_stride,
    entropy_ptr,
    coef_ptr,
    coef_stride,
    col0,
    C,
    targets_ptr,
    temperature_ptr,
    bias_ptr,
    state_ptr,
    state_stride,
    vocab,
    ignore_index,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    span = rows.span(row, tile_stride, C, V)
    out_ptr = rows.groups(out_ptr, row, out_stride, span, V.out_aligned, V)
    if target == ignore_index:
        rows.write_zeros(out_ptr, span, V)
    else:
        source, flat = rows.source(tile_ptr, tile_stride, bias_ptr, temperature_ptr, row, span, inner, outer, slope, V)
        inside, offset = rows.locate(target, col0, span)
        state_ptr += row
        z = tl.load(state_ptr + rows.TARGET * state_stride)
        wrong = (z != z) | (target < 0) | (target >= vocab)
        if coef_ptr is not None:
            coef_ptr += row
        if entropy_ptr is not None:
            entropy_ptr += row
        _write_gradient(
            source,
            out_ptr,
            span,
            tl.where(inside, offset, C),
            tl.where(wrong, float("nan"), flat),
            tl.load(state_ptr + rows.PEAK * state_stride),
            tl.load(state_ptr + rows.TOTAL * state_stride),
            coef_ptr,
            coef_stride,
            entropy_ptr,
            V,
        )


@triton.jit(do_not_specialize=UNSPECIALISED)
def _stats_grad_kernel(
    tile_ptr,
    tile_stride,
    out_ptr,
    out_stride,
    col0,
    C,
    targets_ptr,
    temperature_ptr,
    bias_ptr,
    state_ptr,
    state_stride,
    vocab,
    ignore_index,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    span = rows.span(row, tile_stride, C, V)
    out_ptr = rows.groups(out_ptr, row, out_stride, span, V.out_aligned, V)
    if target == ignore_index:
        rows.write_zeros(out_ptr, span, V)
    else:
        source, flat = rows.source(tile_ptr, tile_stride, bias_ptr, temperature_ptr, row, span, inner, outer, slope, V)
        inside, offset = rows.locate(target, col0, span)
        state_ptr += row
        old_peak, old_total, z = rows.open_state(state_ptr, state_stride, source, target, vocab, inside, offset, V)
        statistics = _sweep(source, span, offset, V)
        peak, total = rows.merge(state_ptr, state_stride, old_peak, old_total, statistics, V)
        hit = tl.where(inside, offset, C)
        flat = tl.where(z != z, float("nan"), flat)
        _write_gradient(source, out_ptr, span, hit, flat, peak, total, None, 0, None, V)


def _launch(
    kernel: triton.runtime.JITFunction,
    ladder: Ladder,
    tile: Tensor,
    col0: int,
    targets: Tensor,
    temperature: Tensor | None,
    bias: Tensor | None,
    spec: LogitSpec,
    state: Tensor,
    out: Tensor | None = None,
    statistics: bool = True,
    **others: object,
) -> None:
    height, columns = tile.shape
    if height == 0 or columns == 0:
        return
    flags = {name: statistics and getattr(spec, name) for name in ("entropy", "mean", "squares", "top1")}
    config = row_config(ladder, columns, tile.dtype, 2 + sum(flags.values()))
    if out is not None:
        flags["out_aligned"] = rows.aligned_alike(tile, out)
        others |= {"out_ptr": out, "out_stride": out.stride(0)}
    with torch.cuda.device_of(tile):
        kernel[(height,)](
            tile_ptr=tile,
            tile_stride=tile.stride(0),
            col0=col0,
            C=columns,
            targets_ptr=targets,
            temperature_ptr=temperature,
            bias_ptr=bias,
            state_ptr=state,
            state_stride=state.stride(0),
            vocab=spec.vocab,
            ignore_index=spec.ignore_index,
            V=rows.variant(tile, temperature, bias, spec, state, config, **flags),
            # x * scale - peak must round its product as the peak's own was, or exp(0) at the peak is not 1.
            enable_fp_fusion=False,
            **rows.factors(spec, temperature),
            **config.options(tile.device),
            **others,
        )


def _check(
    tile: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    bias: Tensor | None,
    state: Tensor,
    *,
    out: Tensor | None = None,
    acc: Tensor | None = None,
    entropy: Tensor | None = None,
    coef: Tensor | None = None,
) -> None:
    height, columns = tile.shape
    wide = rows.acc_type(tile)
    rows.check(
        tile,
        ("tile", tile, None, (height, columns)),
        ("out", out, None, (height, columns)),
        ("targets", targets, torch.int64, (height,)),
        ("temperature", temperature, wide, (height,)),
        ("bias", bias, None, (columns,)),
        ("state", state, wide, (None, height)),
        ("acc", acc, wide, (height, None)),
        ("entropy", entropy, wide, (height,)),
        ("coef", coef, wide, (3, height)),
    )
    rows.check_in_place("out", out, tile)


def stats(
    tile: Tensor,
    col0: int,
    targets: Tensor,
    temperature: Tensor | None,
    bias: Tensor | None,
    spec: LogitSpec,
    state: Tensor,
) -> None:
    """Bring ``state [len(Row), R]`` up to date with ``tile [R, C]``, the columns from ``col0`` on.

    Reads the tile once. Rows whose target is ``spec.ignore_index`` are left alone.

    Raises:
        ValueError: a dtype, shape, stride or device that the kernels do not read.
    """
    _check(tile, targets, temperature, bias, state)
    _launch(_stats_kernel, ONE_PASS, tile, col0, targets, temperature, bias, spec, state)


def weigh(
    tile: Tensor,
    out: Tensor,
    col0: int,
    targets: Tensor,
    temperature: Tensor | None,
    bias: Tensor | None,
    spec: LogitSpec,
    state: Tensor,
    acc: Tensor | None,
) -> None:
    """As :func:`stats`; also writes exp(z - new peak) · (1 - tanh²) to ``out [R, C]``, zeros in ignored rows.

    Rows of ``acc [R, D]`` are multiplied by exp(old peak - new peak). ``out`` may be ``tile``.
    """
    _check(tile, targets, temperature, bias, state, out=out, acc=acc)
    rescaled = {
        "acc_ptr": acc,
        "acc_stride": 0 if acc is None else acc.stride(0),
        "D": 0 if acc is None else acc.shape[1],
    }
    _launch(_weigh_kernel, TWO_PASSES, tile, col0, targets, temperature, bias, spec, state, out, **rescaled)


def grad(
    tile: Tensor,
    out: Tensor,
    col0: int,
    targets: Tensor,
    temperature: Tensor | None,
    bias: Tensor | None,
    spec: LogitSpec,
    state: Tensor,
    entropy: Tensor | None,
    coef: Tensor | None,
) -> None:
    """Write dz/dx · (a·onehot - b·p - c·p·(logp + H)) to ``out [R, C]``, given the final ``state``.

    ``coef [3, R]`` holds a, b, c (None: 1, 1, 0); ``entropy [R]`` is H, and without it c does not count.
    Zeros in ignored rows, NaN in rows whose target lies outside the vocabulary. ``out`` may be ``tile``.
    """
    _check(tile, targets, temperature, bias, state, out=out, entropy=entropy, coef=coef)
    upstream = {
        "entropy_ptr": entropy if coef is not None else None,
        "coef_ptr": coef,
        "coef_stride": 0 if coef is None else coef.stride(0),
    }
    _launch(
        _grad_kernel,
        ONE_PASS,
        tile,
        col0,
        targets,
        temperature,
        bias,
        spec,
        state,
        out,
        statistics=False,
        **upstream,
    )


def stats_grad(
    tile: Tensor,
    out: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    bias: Tensor | None,
    spec: LogitSpec,
    state: Tensor,
) -> None:
    """:func:`stats` and :func:`grad` (without coefficients) of whole rows, read from memory once."""
    _check(tile, targets, temperature, bias, state, out=out)
    _launch(_stats_grad_kernel, TWO_PASSES, tile, 0, targets, temperature, bias, spec, state, out)
