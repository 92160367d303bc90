"""What row kernels are made of: how a program walks its row, how a raw logit becomes z, how states merge.

``spec`` and the rows of ``state`` are explained in ``prefcore/ops/_spec.py``. A row is walked in 16-byte vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefcore.kernels import _launch as launch
from prefcore.kernels._launch import VECTOR_BYTES, RowConfig

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
    aligned: bool = True  # the span's groups start at multiples of k elements, in the tile
    out_aligned: bool = False  # and in out
    entropy: bool = False
    mean: bool = False
    squares: bool = False
    top1: bool = False

    def __post_init__(self) -> None:
        # Before 3.9 Triton hands a kernel the plain attribute, which is no constant in a tuple or an expression.
        if not INTERPRETED:
            for field in fields(self):
                object.__setattr__(self, field.name, tl.constexpr(getattr(self, field.name)))


@triton.jit
def round(x, DTYPE: tl.constexpr):
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
def widen(x, V: tl.constexpr):
    if INTERPRETED and x.dtype == tl.bfloat16:  # where a plain conversion misreads subnormal numbers
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(V.acc)


@triton.jit
def exp(x, V: tl.constexpr):
    if V.flush:  # without three instructions per element for results below 1e-38
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


@triton.jit
def fma(x, y, z, V: tl.constexpr):
    if INTERPRETED and V.acc == tl.float32:  # before 3.9 its own rounds twice
        return (x.to(tl.float64) * y + z).to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def tanh(y, V: tl.constexpr):
    """Below 1/2 the [7/6] Padé approximant, good to 2e-16 there; else by exp."""
    a = tl.abs(y)
    q = a * a
    e = exp(-2.0 * a, V)
    near = a < 0.5
    upper = a * tl.fma(tl.fma(q + 378.0, q, 17325.0), q, 135135.0)
    lower = tl.fma(tl.fma(tl.fma(q, 28.0, 3150.0), q, 62370.0), q, 135135.0)
    t = tl.where(near, upper, 1.0 - e) / tl.where(near, lower, 1.0 + e)
    return tl.where(y < 0, -t, t)


@triton.jit
def span(row, stride, C, V: tl.constexpr):
    """A row is ``head`` elements up to a 16-byte boundary, ``groups`` of k elements, and a tail."""
    head = 0
    if V.peel:
        head = (-(row * stride) & (V.k - 1)).to(tl.int32)
    return head, tl.maximum(C - head, 0) // V.k, C


@triton.jit
def groups(pointer, row, stride, span, ALIGNED: tl.constexpr, V: tl.constexpr):
    """Where a row's groups start."""
    first = row * stride + span[0]
    if ALIGNED:
        first = first // V.k * V.k  # the same number, but now the compiler knows its divisor
    return pointer + first


@triton.jit
def steps(span, EDGE: tl.constexpr, V: tl.constexpr):
    """The bounds of the two loops over a row: over its groups, then one step for head and tail, if any."""
    if EDGE:
        return (span[1] * V.k < span[2]).to(tl.int32)
    return span[1]


@triton.jit
def columns(start, span, EDGE: tl.constexpr, V: tl.constexpr):
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
def source(tile_ptr, tile_stride, bias_ptr, temperature_ptr, row, span, inner, outer, slope, V: tl.constexpr):
    """What :func:`logits` reads (pointers to the row's first group, factors); dz/dx without the softcap."""
    tile_ptr = groups(tile_ptr, row, tile_stride, span, V.aligned, V)
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
            rest = (fma(-slope, temperature, inner, V) + rest) / temperature
            inner = slope
    return (tile_ptr, bias_ptr, inner, rest, outer), slope


@triton.jit
def logits(source, offsets, mask, V: tl.constexpr):
    """z, -inf where masked off, and the softcap's slope 1 - tanh²."""
    tile_ptr, bias_ptr, inner, rest, outer = source
    x = tl.load(tile_ptr + offsets, mask=mask, other=-float("inf"))
    if V.round_to is not None:
        x = round(x, V.round_to)
    x = widen(x, V)
    if V.bias:
        x += widen(tl.load(bias_ptr + offsets, mask=mask, other=0.0), V)
    flatness = 1.0
    if V.softcap:
        t = tanh(x * inner, V)
        z = t * outer
        flatness = 1.0 - t * t
    elif V.scaled:
        # A large x times a rounded 1 / temperature is further off than x / temperature: add what rounding took.
        z = fma(x, inner, tl.clamp(x, FLOOR, -FLOOR) * rest, V)
    else:
        z = x
    if V.select:
        z = tl.where(mask, z, -float("inf"))
    return z, flatness


@triton.jit
def locate(target, col0, span):
    """Whether the target lies in the tile, and its offset from the first group, cut to the tile's range."""
    column = target - col0
    return (column >= 0) & (column < span[2]), tl.minimum(tl.maximum(column, 0), span[2]).to(tl.int32) - span[0]


@triton.jit
def open_state(state_ptr, stride, source, target, vocab, inside, offset, V: tl.constexpr):
    """Note the target's z in a row's state; the old peak and total, and that z.

    All threads load these, and one of them overwrites them later, as others may the tile: call this before
    the row's reductions, whose barriers lie between.
    """
    z, _ = logits(source, offset, inside, V)
    outside = (target < 0) | (target >= vocab)
    z = tl.where(outside, float("nan"), z)
    tl.store(state_ptr + TARGET * stride, z, mask=inside | outside)
    return tl.load(state_ptr + PEAK * stride), tl.load(state_ptr + TOTAL * stride), z


@triton.jit
def shift(peak, reference):
    return tl.maximum(peak - reference, DROP)


@triton.jit
def merge(state_ptr, stride, old_peak, old_total, statistics, V: tl.constexpr):
    """Add the statistics of a tile's row to its state; the new peak and total."""
    peak, total, shifted, summed, squares, before = statistics
    reference = tl.maximum(old_peak, peak)
    old_moved = shift(old_peak, reference)
    old_scale = exp(old_moved, V)
    moved = shift(peak, reference)
    scale = exp(moved, V)
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
def write_zeros(out_ptr, span, V: tl.constexpr):
    zeros = tl.full((V.lanes, V.k), 0.0, out_ptr.dtype.element_ty)
    for EDGE in tl.static_range(2):
        for start in range(0, steps(span, EDGE, V), V.lanes):
            offsets, mask = columns(start, span, EDGE, V)
            tl.store(out_ptr + offsets, zeros, mask=mask)


def aligned_alike(tile: Tensor, other: Tensor) -> bool:
    """Whether rows of ``other`` start as far from a multiple of a vector as those of ``tile`` do."""
    return (other.stride(0) - tile.stride(0)) % (VECTOR_BYTES // tile.element_size()) == 0


def variant(
    tile: Tensor,
    temperature: Tensor | None,
    bias: Tensor | None,
    spec: LogitSpec,
    state: Tensor,
    config: RowConfig,
    **others: bool,
) -> Variant:
    """What a kernel is compiled for, by the arguments of a launch."""
    k = VECTOR_BYTES // tile.element_size()
    return Variant(
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
        **others,
    )


def factors(spec: LogitSpec, temperature: Tensor | None) -> dict[str, float]:
    """What :func:`source` takes; divided by the temperature unless that is a tensor."""
    divisor = spec.temperature if temperature is None else 1.0
    return {
        "inner": spec.logit_scale / (divisor if spec.softcap is None else spec.softcap),
        "outer": (spec.softcap or 1.0) / divisor,
        "slope": spec.logit_scale / divisor,
    }


def acc_type(tile: Tensor) -> torch.dtype:
    return torch.float64 if tile.dtype == torch.float64 else torch.float32


def check(tile: Tensor, *expected: tuple[str, Tensor | None, torch.dtype | None, tuple[int | None, ...]]) -> None:
    """Refuse what a kernel would misread.

    ``expected`` holds (name, tensor, dtype, shape), where a dtype of None is any of TYPES, a size of None any size.
    """
    for name, tensor, dtype, shape in expected:
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


def check_in_place(name: str, out: Tensor | None, tile: Tensor) -> None:
    """Refuse an output in the tile's memory that is not the tile."""
    if out is None or tile.numel() == 0 or out.data_ptr() != tile.data_ptr():
        return
    if out.dtype != tile.dtype or out.stride() != tile.stride():
        raise ValueError(f"{name} in the tile's own memory must have its dtype and strides")
