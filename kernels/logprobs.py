"""Statistics of rows of logits, and their gradient: one program per row, which it walks in 16-byte vectors.

The functions are those of the CPU back end. ``spec`` and the rows of ``state`` are explained in
``prefcore/ops/_spec.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefcore.kernels import _launch as launch
from prefcore.kernels._launch import ONE_PASS, TWO_PASSES, VECTOR_BYTES, Ladder, row_config

if TYPE_CHECKING:
    from prefcore.ops._spec import LogitSpec

# prefcore.ops._spec.Row
PEAK = tl.constexpr(0)
TOTAL = tl.constexpr(1)
TARGET = tl.constexpr(2)
SHIFTED = tl.constexpr(3)
SUM = tl.constexpr(4)
SQUARES = tl.constexpr(5)
BEFORE = tl.constexpr(6)

# The peak of a lane that has seen nothing: finite (float32's lowest), so no difference of peaks is -inf - -inf.
FLOOR = tl.constexpr(-3.4028234663852886e38)
# Differences from a peak are cut here where their exp multiplies them: it is 0 then, and 0 * -inf would be NaN.
DROP = tl.constexpr(-1e4)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: no sizes, strides, offsets or scales, which vary at run time."""

    acc: tl.dtype  # of all arithmetic
    lanes: int
    k: int  # elements of a lane, 16 bytes
    peel: bool  # rows need not start at a multiple of k elements
    scaled: bool  # z is not x (+ bias) itself
    softcap: bool
    select: bool  # -inf at masked-off elements would not stay -inf
    flush: bool  # subnormal results of exp are 0
    round_to: tl.dtype | None
    bias: bool
    out_like_tile: bool = False  # rows of out are aligned as those of the tile
    entropy: bool = False
    mean: bool = False
    squares: bool = False
    top1: bool = False

    def __post_init__(self) -> None:
        # Before 3.9 Triton hands a kernel the plain attribute, which is no constant in a tuple or an expression.
        if not INTERPRETED:
            for field in fields(self):
                object.__setattr__(self, field.name, tl.constexpr(getattr(self, field.name)))


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
def _round(x, DTYPE: tl.constexpr):
    """To the nearest, ties to even; from float64 by way of float32, as torch does."""
    if DTYPE == tl.float64:  # noqa: SIM300
        return x
    x = x.to(tl.float32)
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300 - its own conversion truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _widen(x, V: tl.constexpr):
    if INTERPRETED and x.dtype == tl.bfloat16:  # where a plain conversion misreads subnormal numbers
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(V.acc)


@triton.jit
def _exp(x, V: tl.constexpr):
    if V.flush:  # without three instructions per element for results below 1e-38
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


@triton.jit
def _fma(x, y, z, V: tl.constexpr):
    if INTERPRETED and V.acc == tl.float32:  # before 3.9 its own rounds twice
        return (x.to(tl.float64) * y + z).to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def _tanh(y, V: tl.constexpr):
    """Below 1/2 the [7/6] Padé approximant, good to 2e-16 there; else by exp."""
    a = tl.abs(y)
    q = a * a
    e = _exp(-2.0 * a, V)
    near = a < 0.5
    upper = a * tl.fma(tl.fma(q + 378.0, q, 17325.0), q, 135135.0)
    lower = tl.fma(tl.fma(tl.fma(q, 28.0, 3150.0), q, 62370.0), q, 135135.0)
    t = tl.where(near, upper, 1.0 - e) / tl.where(near, lower, 1.0 + e)
    return tl.where(y < 0, -t, t)


@triton.jit
def _span(row, stride, C, V: tl.constexpr):
    """A row is ``head`` elements up to a 16-byte boundary, ``groups`` of k elements, and a tail."""
    head = 0
    if V.peel:
        head = (-(row * stride) & (V.k - 1)).to(tl.int32)
    return head, tl.maximum(C - head, 0) // V.k, C


@triton.jit
def _groups(pointer, row, stride, span, ALIGNED: tl.constexpr, V: tl.constexpr):
    """Where a row's groups start."""
    first = row * stride + span[0]
    if ALIGNED:
        first = first // V.k * V.k  # the same number, but now the compiler knows its divisor
    return pointer + first


@triton.jit
def _steps(span, EDGE: tl.constexpr, V: tl.constexpr):
    """The bounds of the two loops over a row: over its groups, then one step for head and tail, if any."""
    if EDGE:
        return (span[1] * V.k < span[2]).to(tl.int32)
    return span[1]


@triton.jit
def _columns(start, span, EDGE: tl.constexpr, V: tl.constexpr):
    """Offsets [lanes, k] from the first group; their mask, in groups one bit a lane: vectors stay whole."""
    head, groups, C = span
    lane = tl.arange(0, V.lanes)[:, None]
    k = tl.arange(0, V.k)[None, :]
    if EDGE:
        offsets = k + tl.where(lane == 0, -head, groups * V.k)
        mask = (lane < 2) & (offsets + head < C) & ((lane == 1) | (offsets < 0))
    else:
        offsets = (start + lane) * V.k + k
        mask = tl.broadcast_to(start + lane < groups, (V.lanes, V.k))
    return offsets, mask


@triton.jit
def _source(tile_ptr, tile_stride, bias_ptr, temperature_ptr, row, span, inner, outer, slope, V: tl.constexpr):
    """What :func:`_logits` reads (pointers to the row's first group, factors); dz/dx without the softcap."""
    tile_ptr = _groups(tile_ptr, row, tile_stride, span, True, V)
    if V.bias:
        bias_ptr += span[0]
    else:
        bias_ptr = tile_ptr  # not read; before 3.7 None cannot be part of a result
    factor = tl.full((), inner, tl.float64)
    inner = factor.to(V.acc)
    rest = (factor - inner.to(tl.float64)).to(V.acc)
    outer = tl.full((), outer, V.acc)
    slope = tl.full((), slope, V.acc)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        if V.softcap:
            outer /= temperature
            slope /= temperature
        else:
            slope /= temperature
            rest = (_fma(-slope, temperature, inner, V) + rest) / temperature
            inner = slope
    return (tile_ptr, bias_ptr, inner, rest, outer), slope


@triton.jit
def _logits(source, offsets, mask, V: tl.constexpr):
    """z, -inf where masked off, and the softcap's slope 1 - tanh²."""
    tile_ptr, bias_ptr, inner, rest, outer = source
    x = tl.load(tile_ptr + offsets, mask=mask, other=-float("inf"))
    if V.round_to is not None:
        x = _round(x, V.round_to)
    x = _widen(x, V)
    if V.bias:
        x += _widen(tl.load(bias_ptr + offsets, mask=mask, other=0.0), V)
    flatness = 1.0
    if V.softcap:
        t = _tanh(x * inner, V)
        z = t * outer
        flatness = 1.0 - t * t
    elif V.scaled:
        # A large x times a rounded 1 / temperature is further off than x / temperature: add what rounding took.
        z = _fma(x, inner, tl.clamp(x, FLOOR, -FLOOR) * rest, V)
    else:
        z = x
    if V.select:
        z = tl.where(mask, z, -float("inf"))
    return z, flatness


@triton.jit
def _locate(target, col0, span):
    """Whether the target lies in the tile, and its offset from the first group, cut to the tile's range."""
    column = target - col0
    return (column >= 0) & (column < span[2]), tl.minimum(tl.maximum(column, 0), span[2]).to(tl.int32) - span[0]


@triton.jit
def _open_state(state_ptr, stride, source, target, vocab, inside, offset, V: tl.constexpr):
    """Note the target's z in a row's state; the old peak and total, and that z.

    All threads load these, and one of them overwrites them later, as others may the tile: call this before
    the row's reductions, whose barriers lie between.
    """
    z, _ = _logits(source, offset, inside, V)
    outside = (target < 0) | (target >= vocab)
    z = tl.where(outside, float("nan"), z)
    tl.store(state_ptr + TARGET * stride, z, mask=inside | outside)
    return tl.load(state_ptr + PEAK * stride), tl.load(state_ptr + TOTAL * stride), z


@triton.jit
def _shift(peak, reference):
    return tl.maximum(peak - reference, DROP)


@triton.jit
def _sweep(source, span, target_offset, V: tl.constexpr):
    """One pass over a row: its peak, and its other statistics relative to that."""
    # Each lane has a state of its own and reduces no more than its k neighbours, which one thread holds:
    # threads exchange nothing before the row's end, and one exp in k + 1 is for rescaling.
    peak = tl.full((V.lanes,), FLOOR, V.acc)
    total = tl.full((V.lanes,), 0.0, V.acc)
    shifted = tl.full((V.lanes,), 0.0, V.acc)
    summed = tl.full((V.lanes,), 0.0, V.acc)
    squares = tl.full((V.lanes,), 0.0, V.acc)
    before = tl.full((V.lanes,), -float("inf"), V.acc)
    for EDGE in tl.static_range(2):
        for start in range(0, _steps(span, EDGE, V), V.lanes):
            offsets, mask = _columns(start, span, EDGE, V)
            z, _ = _logits(source, offsets, mask, V)
            higher = tl.maximum(peak, tl.max(z, 1))
            moved = _shift(peak, higher)
            scale = _exp(moved, V)
            d = z - higher[:, None]
            e = _exp(d, V)
            if V.entropy:
                shifted = (shifted + total * moved) * scale + tl.sum(e * tl.maximum(d, DROP), 1)
            if V.mean:
                summed += tl.sum(tl.where(mask, z, 0.0), 1)
            if V.squares:
                squares = squares * (scale * scale) + tl.sum(e * e, 1)
            if V.top1:
                before = tl.maximum(before, tl.max(tl.where(offsets < target_offset, z, -float("inf")), 1))
            total = total * scale + tl.sum(e, 1)
            peak = higher
    highest = tl.max(peak, 0)
    moved = _shift(peak, highest)
    scale = _exp(moved, V)
    shifted = tl.sum((shifted + total * moved) * scale, 0)
    squares = tl.sum(squares * (scale * scale), 0)
    return highest, tl.sum(total * scale, 0), shifted, tl.sum(summed, 0), squares, tl.max(before, 0)


@triton.jit
def _merge(state_ptr, stride, old_peak, old_total, statistics, V: tl.constexpr):
    """Add the statistics of a tile's row to its state; the new peak and total."""
    peak, total, shifted, summed, squares, before = statistics
    reference = tl.maximum(old_peak, peak)
    old_moved = _shift(old_peak, reference)
    old_scale = _exp(old_moved, V)
    moved = _shift(peak, reference)
    scale = _exp(moved, V)
    new_total = old_total * old_scale + total * scale
    new_peak = tl.where(new_total == 0, -float("inf"), reference)  # there has been nothing but -inf
    tl.store(state_ptr + PEAK * stride, new_peak)
    tl.store(state_ptr + TOTAL * stride, new_total)
    if V.entropy:
        old = tl.load(state_ptr + SHIFTED * stride) + old_total * old_moved
        tl.store(state_ptr + SHIFTED * stride, old * old_scale + (shifted + total * moved) * scale)
    if V.mean:
        tl.store(state_ptr + SUM * stride, tl.load(state_ptr + SUM * stride) + summed)
    if V.squares:
        old = tl.load(state_ptr + SQUARES * stride) * (old_scale * old_scale)
        tl.store(state_ptr + SQUARES * stride, old + squares * (scale * scale))
    if V.top1:
        tl.store(state_ptr + BEFORE * stride, tl.maximum(tl.load(state_ptr + BEFORE * stride), before))
    return new_peak, new_total


@triton.jit
def _write_zeros(out_ptr, span, V: tl.constexpr):
    zeros = tl.full((V.lanes, V.k), 0.0, out_ptr.dtype.element_ty)
    for EDGE in tl.static_range(2):
        for start in range(0, _steps(span, EDGE, V), V.lanes):
            offsets, mask = _columns(start, span, EDGE, V)
            tl.store(out_ptr + offsets, zeros, mask=mask)


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
        for start in range(0, _steps(span, EDGE, V), V.lanes):
            offsets, mask = _columns(start, span, EDGE, V)
            z, flatness = _logits(source, offsets, mask, V)
            logp = (z - peak) - log_total
            p = _exp(logp, V)
            if coef_ptr is None:
                gradient = tl.where(offsets == hit, 1.0 - p, -p)
            else:
                gradient = tl.where(offsets == hit, a, 0.0) - b * p
                if entropy_ptr is not None:
                    gradient -= c * (p * (tl.maximum(logp, DROP) + entropy))
            tl.store(out_ptr + offsets, _round(gradient * (slope * flatness), out_ptr.dtype.element_ty), mask=mask)


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
        span = _span(row, tile_stride, C, V)
        source, _ = _source(tile_ptr, tile_stride, bias_ptr, temperature_ptr, row, span, inner, outer, slope, V)
        inside, offset = _locate(target, col0, span)
        state_ptr += row
        peak, total, _ = _open_state(state_ptr, state_stride, source, target, vocab, inside, offset, V)
        _merge(state_ptr, state_stride, peak, total, _sweep(source, span, offset, V), V)


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
    span = _span(row, tile_stride, C, V)
    out_ptr = _groups(out_ptr, row, out_stride, span, V.out_like_tile, V)
    if target == ignore_index:
        _write_zeros(out_ptr, span, V)
    else:
        source, _ = _source(tile_ptr, tile_stride, bias_ptr, temperature_ptr, row, span, inner, outer, slope, V)
        inside, offset = _locate(target, col0, span)
        state_ptr += row
        old_peak, old_total, _ = _open_state(state_ptr, state_stride, source, target, vocab, inside, offset, V)

        peaks = tl.full((V.lanes,), FLOOR, V.acc)
        for EDGE in tl.static_range(2):
            for start in range(0, _steps(span, EDGE, V), V.lanes):
                offsets, mask = _columns(start, span, EDGE, V)
                peaks = tl.maximum(peaks, tl.max(_logits(source, offsets, mask, V)[0], 1))
        peak = tl.maximum(old_peak, tl.max(peaks, 0))

        total = tl.full((V.lanes,), 0.0, V.acc)
        shifted = tl.full((V.lanes,), 0.0, V.acc)
        summed = tl.full((V.lanes,), 0.0, V.acc)
        squares = tl.full((V.lanes,), 0.0, V.acc)
        before = tl.full((V.lanes,), -float("inf"), V.acc)
        for EDGE in tl.static_range(2):
            for start in range(0, _steps(span, EDGE, V), V.lanes):
                offsets, mask = _columns(start, span, EDGE, V)
                z, flatness = _logits(source, offsets, mask, V)
                d = z - peak
                e = _exp(d, V)
                tl.store(out_ptr + offsets, _round(e * flatness, out_ptr.dtype.element_ty), mask=mask)
                total += tl.sum(e, 1)
                if V.entropy:
                    shifted += tl.sum(e * tl.maximum(d, DROP), 1)
                if V.mean:
                    summed += tl.sum(tl.where(mask, z, 0.0), 1)
                if V.squares:
                    squares += tl.sum(e * e, 1)
                if V.top1:
                    before = tl.maximum(before, tl.max(tl.where(offsets < offset, z, -float("inf")), 1))
        first, second = tl.sum(total, 0), tl.sum(shifted, 0)
        statistics = (peak, first, second, tl.sum(summed, 0), tl.sum(squares, 0), tl.max(before, 0))
        new_peak, _ = _merge(state_ptr, state_stride, old_peak, old_total, statistics, V)
        # Over a whole walk a row's peak moves about as often as the logarithm of the number of tiles.
        if acc_ptr is not None and new_peak > old_peak:
            scale = _exp(_shift(old_peak, new_peak), V)
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
    span = _span(row, tile_stride, C, V)
    out_ptr = _groups(out_ptr, row, out_stride, span, V.out_like_tile, V)
    if target == ignore_index:
        _write_zeros(out_ptr, span, V)
    else:
        source, flat = _source(tile_ptr, tile_stride, bias_ptr, temperature_ptr, row, span, inner, outer, slope, V)
        inside, offset = _locate(target, col0, span)
        state_ptr += row
        z = tl.load(state_ptr + TARGET * state_stride)
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
            tl.load(state_ptr + PEAK * state_stride),
            tl.load(state_ptr + TOTAL * state_stride),
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
    span = _span(row, tile_stride, C, V)
    out_ptr = _groups(out_ptr, row, out_stride, span, V.out_like_tile, V)
    if target == ignore_index:
        _write_zeros(out_ptr, span, V)
    else:
        source, flat = _source(tile_ptr, tile_stride, bias_ptr, temperature_ptr, row, span, inner, outer, slope, V)
        inside, offset = _locate(target, col0, span)
        state_ptr += row
        old_peak, old_total, z = _open_state(state_ptr, state_stride, source, target, vocab, inside, offset, V)
        statistics = _sweep(source, span, offset, V)
        peak, total = _merge(state_ptr, state_stride, old_peak, old_total, statistics, V)
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
    rows, columns = tile.shape
    if rows == 0 or columns == 0:
        return
    flags = {name: statistics and getattr(spec, name) for name in ("entropy", "mean", "squares", "top1")}
    config = row_config(ladder, columns, tile.dtype, 2 + sum(flags.values()))
    k = VECTOR_BYTES // tile.element_size()
    variant = Variant(
        acc=TYPES[state.dtype],
        lanes=config.threads * config.vectors,
        k=k,
        peel=tile.stride(0) % k != 0,
        scaled=temperature is not None or spec.logit_scale != spec.temperature,
        softcap=spec.softcap is not None,
        select=spec.softcap is not None or spec.logit_scale <= 0,
        flush=state.dtype == torch.float32 and launch.nvidia(tile.device),
        bias=bias is not None,
        round_to=None if spec.round_to in (None, tile.dtype) else TYPES[spec.round_to],
        out_like_tile=out is not None and (out.stride(0) - tile.stride(0)) % k == 0,
        **flags,
    )
    divisor = spec.temperature if temperature is None else 1.0
    if out is not None:
        others |= {"out_ptr": out, "out_stride": out.stride(0)}
    with torch.cuda.device_of(tile):
        kernel[(rows,)](
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
            inner=spec.logit_scale / (divisor if spec.softcap is None else spec.softcap),
            outer=(spec.softcap or 1.0) / divisor,
            slope=spec.logit_scale / divisor,
            V=variant,
            # x * scale - peak must round its product as the peak's own was, or exp(0) at the peak is not 1.
            enable_fp_fusion=False,
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
    """Refuse what a kernel would misread."""
    rows, columns = tile.shape
    wide = torch.float64 if tile.dtype == torch.float64 else torch.float32
    for name, tensor, dtype, shape in (
        ("tile", tile, None, (rows, columns)),
        ("out", out, None, (rows, columns)),
        ("targets", targets, torch.int64, (rows,)),
        ("temperature", temperature, wide, (rows,)),
        ("bias", bias, None, (columns,)),
        ("state", state, wide, (None, rows)),
        ("acc", acc, wide, (rows, None)),
        ("entropy", entropy, wide, (rows,)),
        ("coef", coef, wide, (3, rows)),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in TYPES if dtype is None else tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype or 'of a floating-point type'}, got {tensor.dtype}")
        sizes = tuple(tensor.shape)
        if len(sizes) != len(shape) or any(n not in (None, m) for n, m in zip(shape, sizes, strict=True)):
            raise ValueError(f"{name} must have shape {shape}, got {sizes}")
        if sizes[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tensor.stride()}")
        if tensor.device != tile.device:
            raise ValueError(f"{name} must be on {tile.device} like the tile, got {tensor.device}")
    layouts = {(x.dtype, x.stride()) for x in (tile, out) if x is not None and x.data_ptr() == tile.data_ptr()}
    if rows > 0 and columns > 0 and len(layouts) > 1:
        raise ValueError("out in the tile's own memory must have its dtype and strides")


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
