"""Divergences of two distributions from rows of their logits, and the gradients: one program per row of both tiles.

The functions are those of the CPU back end. Sides, the rows of ``state``, ``cross`` and ``coef`` are explained in
``prefcore/ops/_spec.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefcore.kernels import _rows as rows
from prefcore.kernels._launch import PAIR, row_config

if TYPE_CHECKING:
    from prefcore.ops._spec import PairSpec, Side

# prefcore.ops._spec.Coef
ONEHOT = tl.constexpr(0)
P = tl.constexpr(1)
ENTROPY = tl.constexpr(2)
DIVERGENCE = tl.constexpr(3)
H = tl.constexpr(4)
OFFSET = tl.constexpr(5)

# As in logprobs.py: only pointers to rows are specialised.
UNSPECIALISED = [
    "col0",
    "C",
    "targets_ptr",
    "vocab",
    "ignore_index",
    "cross_ptr",
    "cross_stride",
    *(
        f"{side}_{name}"
        for side in "pq"
        for name in (
            "tile_stride",
            "out_stride",
            "temperature_ptr",
            "state_ptr",
            "state_stride",
            "coef_ptr",
            "coef_stride",
        )
    ),
]


@triton.jit
def _log(x, V: tl.constexpr):
    if V.flush:
        log2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        return log2 * 0.6931471805599453
    return tl.log(x)


@triton.jit
def _expm1(x, e, V: tl.constexpr):
    """For x <= 0 and e = exp(x), to relative accuracy."""
    if V.acc == tl.float64:
        # e's rounding has moved x to log(e): scale by what that did to x.
        between = (e > 0.5) & (e < 1.0)
        corrected = (e - 1.0) * (x / tl.log(tl.where(between, e, 0.5)))
        return tl.where(between, corrected, tl.where(e == 1.0, x, e - 1.0))
    # Minimax over [-1/2, 0], good to 2e-9.
    series = tl.fma(tl.fma(tl.fma(tl.fma(x, 0.0011259224, 0.0081932954), x, 0.041632049), x, 0.16666289), x, 0.49999985)
    return tl.where(x > -0.5, tl.fma(x * series, x, x), e - 1.0)


@triton.jit
def _log1p(y, u, V: tl.constexpr):
    """For -1 < y <= 0 and u = 1 + y, to relative accuracy; u is used where y has lost digits of it."""
    if V.acc == tl.float64:
        rounded = 1.0 + y
        near = (y > -0.5) & (rounded < 1.0)
        rounded = tl.where(near, rounded, 0.5)
        corrected = tl.log(rounded) * (y / (rounded - 1.0))
        return tl.where(near, corrected, tl.where(y > -0.5, y, tl.log(u)))
    # Minimax over [-0.3, 0], good to 1e-8.
    series = tl.fma(tl.fma(tl.fma(y, 0.40002567, -0.040458336), y, 0.22768131), y, -0.24704348)
    series = tl.fma(tl.fma(series, y, 0.33347577), y, -0.49999774)
    return tl.where(y > -0.3, tl.fma(y * series, y, y), _log(u, V))


@triton.jit
def _weights(weight, V: tl.constexpr):
    """p's weight and q's."""
    weight = tl.full((), weight, tl.float64)
    return weight.to(V.acc), (1.0 - weight).to(V.acc)


@triton.jit
def _against_mixture(log_p, log_q, weights, V: tl.constexpr):
    """Whether q > p; the larger and the smaller of both, and the logarithms of their ratios to m.

    With a = log(smaller/larger) and the smaller's weight s, log(larger/m) is -log1p(s·expm1(a)): no digits are lost
    where p and q are close, nor is there anything to overflow where they are not.
    """
    d = tl.maximum(log_q, rows.DROP) - tl.maximum(log_p, rows.DROP)  # finite where p and q are both 0
    a = -tl.abs(d)
    q_larger = d > 0
    s = tl.where(q_larger, weights[0], weights[1])
    rest = tl.where(q_larger, weights[1], weights[0])
    ratio = rows.exp(a, V)
    larger = rows.exp(tl.maximum(log_p, log_q, propagate_nan=tl.PropagateNan.ALL), V)
    smaller = larger * ratio
    log_larger = -_log1p(s * _expm1(a, ratio, V), tl.fma(s, ratio, rest), V)
    return q_larger, larger, smaller, log_larger, log_larger + a


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # NaN of NaN


@triton.jit
def _fall(peak, reference):
    """By how much a peak lies below another; finite, as a lane's that has seen nothing may be any distance below."""
    return tl.maximum(peak - reference, rows.FLOOR)


@triton.jit
def _carry(cross, p_total, p_fall, q_fall, weights, V: tl.constexpr, KIND: tl.constexpr):
    """A cross sum relative to peaks that are higher than its own."""
    if KIND == "kl":
        scale = rows.exp(p_fall, V)
        # An infinite sum whose p has come down to 0 counts no more.
        return tl.where(scale > 0, (cross + p_total * (p_fall - q_fall)) * scale, 0.0)
    return cross * rows.exp(weights[0] * p_fall + weights[1] * q_fall, V)


@triton.jit
def _advance(peak, total, shifted, z, V: tl.constexpr):
    """A side's running statistics after k more values a lane; z - peak, exp of that, and the old peak's fall."""
    higher = tl.maximum(peak, tl.max(z, 1))
    moved = rows.shift(peak, higher)
    scale = rows.exp(moved, V)
    d = z - higher[:, None]
    e = rows.exp(d, V)
    if V.entropy:
        shifted = (shifted + total * moved) * scale + tl.sum(e * tl.maximum(d, rows.DROP), 1)
    return higher, total * scale + tl.sum(e, 1), shifted, d, e, _fall(peak, higher)


@triton.jit
def _reduce(peak, total, shifted, V: tl.constexpr):
    """The statistics of a row from those of its lanes, as :func:`rows.merge` takes them, and the lanes' falls."""
    highest = tl.max(peak, 0)
    moved = rows.shift(peak, highest)
    scale = rows.exp(moved, V)
    shifted = tl.sum((shifted + total * moved) * scale, 0)
    return (highest, tl.sum(total * scale, 0), shifted, 0.0, 0.0, 0.0), _fall(peak, highest)


@triton.jit
def _sweep(p_source, q_source, span, weights, V: tl.constexpr, W: tl.constexpr, KIND: tl.constexpr):
    """One pass over a row of both tiles: each side's statistics, and the cross sum relative to their peaks."""
    p_peak = tl.full((V.lanes,), rows.FLOOR, V.acc)
    p_total = tl.full((V.lanes,), 0.0, V.acc)
    p_shifted = tl.full((V.lanes,), 0.0, V.acc)
    q_peak = tl.full((V.lanes,), rows.FLOOR, V.acc)
    q_total = tl.full((V.lanes,), 0.0, V.acc)
    q_shifted = tl.full((V.lanes,), 0.0, V.acc)
    cross = tl.full((V.lanes,), 0.0, V.acc)
    for EDGE in tl.static_range(2):
        for start in range(0, rows.steps(span, EDGE, V), V.lanes):
            offsets, mask = rows.columns(start, span, EDGE, V)
            p_z, _ = rows.logits(p_source, offsets, mask, V)
            q_z, _ = rows.logits(q_source, offsets, mask, W)
            seen = p_total
            p_peak, p_total, p_shifted, p_d, p_e, p_fall = _advance(p_peak, p_total, p_shifted, p_z, V)
            q_peak, q_total, q_shifted, q_d, _, q_fall = _advance(q_peak, q_total, q_shifted, q_z, W)
            if KIND == "kl":
                term = tl.where(p_e == 0, 0.0, p_e * (p_d - q_d))
            else:
                term = rows.exp(weights[0] * p_d + weights[1] * q_d, V)
            cross = _carry(cross, seen, p_fall, q_fall, weights, V, KIND) + tl.sum(term, 1)
    p_statistics, p_fall = _reduce(p_peak, p_total, p_shifted, V)
    q_statistics, q_fall = _reduce(q_peak, q_total, q_shifted, W)
    cross = tl.sum(_carry(cross, p_total, p_fall, q_fall, weights, V, KIND), 0)
    return p_statistics, q_statistics, cross


@triton.jit
def _final(state_ptr, stride):
    """A row's peak and the logarithm of its total."""
    return tl.load(state_ptr + rows.PEAK * stride), tl.log(tl.load(state_ptr + rows.TOTAL * stride))


@triton.jit(do_not_specialize=UNSPECIALISED)
def _stats_kernel(
    p_tile_ptr,
    p_tile_stride,
    p_temperature_ptr,
    p_bias_ptr,
    p_state_ptr,
    p_state_stride,
    p_inner: tl.float64,
    p_outer: tl.float64,
    p_slope: tl.float64,
    q_tile_ptr,
    q_tile_stride,
    q_temperature_ptr,
    q_bias_ptr,
    q_state_ptr,
    q_state_stride,
    q_inner: tl.float64,
    q_outer: tl.float64,
    q_slope: tl.float64,
    col0,
    C,
    targets_ptr,
    vocab,
    ignore_index,
    weight: tl.float64,
    cross_ptr,
    cross_stride,
    V: tl.constexpr,
    W: tl.constexpr,
    KIND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target != ignore_index:
        span = rows.span(row, p_tile_stride, C, V)
        p_source, _ = rows.source(
            p_tile_ptr, p_tile_stride, p_bias_ptr, p_temperature_ptr, row, span, p_inner, p_outer, p_slope, V
        )
        q_source, _ = rows.source(
            q_tile_ptr, q_tile_stride, q_bias_ptr, q_temperature_ptr, row, span, q_inner, q_outer, q_slope, W
        )
        inside, offset = rows.locate(target, col0, span)
        p_state_ptr += row
        q_state_ptr += row
        p_old, p_seen, _ = rows.open_state(p_state_ptr, p_state_stride, p_source, target, vocab, inside, offset, V)
        q_old, q_seen, _ = rows.open_state(q_state_ptr, q_state_stride, q_source, target, vocab, inside, offset, W)
        weights = _weights(weight, V)
        p_new, q_new, cross = _sweep(p_source, q_source, span, weights, V, W, KIND)
        p_peak = tl.maximum(p_old, p_new[0])
        q_peak = tl.maximum(q_old, q_new[0])
        cross = _carry(cross, p_new[1], _fall(p_new[0], p_peak), _fall(q_new[0], q_peak), weights, V, KIND)
        old = tl.load(cross_ptr + row)
        old = _carry(old, p_seen, _fall(p_old, p_peak), _fall(q_old, q_peak), weights, V, KIND)
        tl.store(cross_ptr + row, old + cross)
        rows.merge(p_state_ptr, p_state_stride, p_old, p_seen, p_new, V)
        rows.merge(q_state_ptr, q_state_stride, q_old, q_seen, q_new, W)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _sums_kernel(
    p_tile_ptr,
    p_tile_stride,
    p_temperature_ptr,
    p_bias_ptr,
    p_state_ptr,
    p_state_stride,
    p_inner: tl.float64,
    p_outer: tl.float64,
    p_slope: tl.float64,
    q_tile_ptr,
    q_tile_stride,
    q_temperature_ptr,
    q_bias_ptr,
    q_state_ptr,
    q_state_stride,
    q_inner: tl.float64,
    q_outer: tl.float64,
    q_slope: tl.float64,
    col0,
    C,
    targets_ptr,
    vocab,
    ignore_index,
    weight: tl.float64,
    cross_ptr,
    cross_stride,
    V: tl.constexpr,
    W: tl.constexpr,
    KIND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(targets_ptr + row) != ignore_index:
        span = rows.span(row, p_tile_stride, C, V)
        p_source, _ = rows.source(
            p_tile_ptr, p_tile_stride, p_bias_ptr, p_temperature_ptr, row, span, p_inner, p_outer, p_slope, V
        )
        q_source, _ = rows.source(
            q_tile_ptr, q_tile_stride, q_bias_ptr, q_temperature_ptr, row, span, q_inner, q_outer, q_slope, W
        )
        p_peak, p_log_total = _final(p_state_ptr + row, p_state_stride)
        q_peak, q_log_total = _final(q_state_ptr + row, q_state_stride)
        weights = _weights(weight, V)
        p_sum = tl.full((V.lanes,), 0.0, V.acc)
        q_sum = tl.full((V.lanes,), 0.0, V.acc)
        sum_of_both = tl.full((V.lanes,), 0.0, V.acc)
        for EDGE in tl.static_range(2):
            for start in range(0, rows.steps(span, EDGE, V), V.lanes):
                offsets, mask = rows.columns(start, span, EDGE, V)
                log_p = (rows.logits(p_source, offsets, mask, V)[0] - p_peak) - p_log_total
                log_q = (rows.logits(q_source, offsets, mask, W)[0] - q_peak) - q_log_total
                if KIND == "js":
                    q_larger, larger, smaller, log_larger, log_smaller = _against_mixture(log_p, log_q, weights, V)
                    larger *= log_larger
                    smaller *= log_smaller
                    p_term = tl.where(q_larger, smaller, larger)
                    q_term = tl.where(q_larger, larger, smaller)
                    # For close p and q much smaller than either: not to be had from sums of them.
                    both = weights[0] * p_term + weights[1] * q_term
                else:
                    p, q = rows.exp(log_p, V), rows.exp(log_q, V)
                    both = tl.abs(p - q)
                    sign = _sign(p - q)
                    p_term, q_term = p * sign, q * sign
                p_sum += tl.sum(p_term, 1)
                q_sum += tl.sum(q_term, 1)
                sum_of_both += tl.sum(both, 1)
        cross_ptr += row
        tl.store(cross_ptr, tl.load(cross_ptr) + tl.sum(p_sum, 0))
        cross_ptr += cross_stride
        tl.store(cross_ptr, tl.load(cross_ptr) + tl.sum(q_sum, 0))
        cross_ptr += cross_stride
        tl.store(cross_ptr, tl.load(cross_ptr) + tl.sum(sum_of_both, 0))


@triton.jit
def _coefficients(coef_ptr, stride, own_weight, other_weight, SECOND: tl.constexpr, KIND: tl.constexpr):
    """A side's coefficients: of the onehot, of p, of p·log p, of what g is made of, and that one's offset.

    The factor that a row's g have in common has gone into the last but one, and where g is p·(part - offset) the
    offset into that of p.
    """
    entropic = tl.load(coef_ptr + ENTROPY * stride)
    normal = tl.load(coef_ptr + P * stride) + entropic * tl.load(coef_ptr + H * stride)
    divergence = tl.load(coef_ptr + DIVERGENCE * stride)
    offset = tl.load(coef_ptr + OFFSET * stride)
    if KIND == "alpha":
        divergence /= other_weight
    elif KIND == "js":
        divergence *= own_weight
    elif KIND == "tv":
        divergence *= -0.5 if SECOND else 0.5
    if KIND != "alpha" and (KIND != "kl" or not SECOND):
        normal += divergence * offset
    return tl.load(coef_ptr + ONEHOT * stride), -normal, -entropic, divergence, offset


@triton.jit
def _pair(log_p, log_q, weights, V: tl.constexpr, KIND: tl.constexpr):
    """p, q, and what each side's g is made of beside them."""
    if KIND == "js":
        q_larger, larger, smaller, log_larger, log_smaller = _against_mixture(log_p, log_q, weights, V)
        p, p_part = tl.where(q_larger, smaller, larger), tl.where(q_larger, log_smaller, log_larger)
        q, q_part = tl.where(q_larger, larger, smaller), tl.where(q_larger, log_larger, log_smaller)
    else:
        p, q = rows.exp(log_p, V), rows.exp(log_q, V)
        if KIND == "kl":
            # Finite, so that a coefficient of 0 makes 0 of it.
            p_part, q_part = tl.where(p == 0, 0.0, tl.minimum(log_p - log_q, -rows.FLOOR)), p
        elif KIND == "alpha":
            p_part = rows.exp(weights[0] * log_p + weights[1] * log_q, V)
            q_part = p_part
        else:
            p_part = _sign(p - q)
            q_part = p_part
    return p, q, p_part, q_part


@triton.jit
def _gradient(p, log_p, part, hits, coef, SECOND: tl.constexpr, KIND: tl.constexpr):
    """dL/dz of one side, whose probabilities are p."""
    onehot, normal, entropic, divergence, offset = coef
    first = tl.where(hits, onehot, 0.0)
    factor = tl.fma(entropic, tl.maximum(log_p, rows.DROP), normal)
    # Differences of values that are about alike come first.
    if KIND == "alpha":
        return tl.fma(divergence, tl.fma(offset, p, -part), tl.fma(p, factor, first))
    if KIND == "kl" and SECOND:
        return tl.fma(divergence, p - part, tl.fma(p, factor, first))
    return tl.fma(p, tl.fma(divergence, part, factor), first)


@triton.jit
def _slope(slope, state_ptr, stride, outside):
    """dz/dx but for the softcap; NaN in a row whose target is outside the vocabulary."""
    z = tl.load(state_ptr + rows.TARGET * stride)
    return tl.where(outside | (z != z), float("nan"), slope)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _grad_kernel(
    p_tile_ptr,
    p_tile_stride,
    p_out_ptr,
    p_out_stride,
    p_coef_ptr,
    p_coef_stride,
    p_temperature_ptr,
    p_bias_ptr,
    p_state_ptr,
    p_state_stride,
    p_inner: tl.float64,
    p_outer: tl.float64,
    p_slope: tl.float64,
    q_tile_ptr,
    q_tile_stride,
    q_out_ptr,
    q_out_stride,
    q_coef_ptr,
    q_coef_stride,
    q_temperature_ptr,
    q_bias_ptr,
    q_state_ptr,
    q_state_stride,
    q_inner: tl.float64,
    q_outer: tl.float64,
    q_slope: tl.float64,
    col0,
    C,
    targets_ptr,
    vocab,
    ignore_index,
    weight: tl.float64,
    V: tl.constexpr,
    W: tl.constexpr,
    KIND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    span = rows.span(row, p_tile_stride, C, V)
    if p_out_ptr is not None:
        p_out_ptr = rows.groups(p_out_ptr, row, p_out_stride, span, V.out_aligned, V)
    if q_out_ptr is not None:
        q_out_ptr = rows.groups(q_out_ptr, row, q_out_stride, span, W.out_aligned, W)
    if target == ignore_index:
        if p_out_ptr is not None:
            rows.write_zeros(p_out_ptr, span, V)
        if q_out_ptr is not None:
            rows.write_zeros(q_out_ptr, span, W)
    else:
        p_source, p_flat = rows.source(
            p_tile_ptr, p_tile_stride, p_bias_ptr, p_temperature_ptr, row, span, p_inner, p_outer, p_slope, V
        )
        q_source, q_flat = rows.source(
            q_tile_ptr, q_tile_stride, q_bias_ptr, q_temperature_ptr, row, span, q_inner, q_outer, q_slope, W
        )
        inside, offset = rows.locate(target, col0, span)
        hit = tl.where(inside, offset, C)
        outside = (target < 0) | (target >= vocab)
        p_flat = _slope(p_flat, p_state_ptr + row, p_state_stride, outside)
        q_flat = _slope(q_flat, q_state_ptr + row, q_state_stride, outside)
        p_peak, p_log_total = _final(p_state_ptr + row, p_state_stride)
        q_peak, q_log_total = _final(q_state_ptr + row, q_state_stride)
        weights = _weights(weight, V)
        if p_out_ptr is not None:
            p_coef = _coefficients(p_coef_ptr + row, p_coef_stride, weights[0], weights[1], False, KIND)
        if q_out_ptr is not None:
            q_coef = _coefficients(q_coef_ptr + row, q_coef_stride, weights[1], weights[0], True, KIND)
        for EDGE in tl.static_range(2):
            for start in range(0, rows.steps(span, EDGE, V), V.lanes):
                offsets, mask = rows.columns(start, span, EDGE, V)
                p_z, p_flatness = rows.logits(p_source, offsets, mask, V)
                q_z, q_flatness = rows.logits(q_source, offsets, mask, W)
                log_p, log_q = (p_z - p_peak) - p_log_total, (q_z - q_peak) - q_log_total
                p, q, p_part, q_part = _pair(log_p, log_q, weights, V, KIND)
                hits = offsets == hit
                if p_out_ptr is not None:
                    gradient = _gradient(p, log_p, p_part, hits, p_coef, False, KIND) * (p_flat * p_flatness)
                    tl.store(p_out_ptr + offsets, rows.round(gradient, p_out_ptr.dtype.element_ty), mask=mask)
                if q_out_ptr is not None:
                    gradient = _gradient(q, log_q, q_part, hits, q_coef, True, KIND) * (q_flat * q_flatness)
                    tl.store(q_out_ptr + offsets, rows.round(gradient, q_out_ptr.dtype.element_ty), mask=mask)


def _launch(
    kernel: triton.runtime.JITFunction,
    p: Side,
    q: Side,
    col0: int,
    targets: Tensor,
    pair: PairSpec,
    outs: tuple[Tensor | None, Tensor | None] = (None, None),
    statistics: bool = False,
    **others: object,
) -> None:
    height, columns = p.tile.shape
    if height == 0 or columns == 0:
        return
    # A side's peak, total and shifted, the cross sum.
    config = row_config(PAIR, columns, p.tile.dtype, 7)
    variants = []
    for name, side, out in zip("pq", (p, q), outs, strict=True):
        variants.append(
            rows.variant(
                side.tile,
                side.temperature,
                side.bias,
                side.spec,
                side.state,
                config,
                # The span is of p's rows.
                aligned=rows.aligned_alike(p.tile, side.tile),
                out_aligned=out is not None and rows.aligned_alike(p.tile, out),
                entropy=statistics and side.spec.entropy,
            )
        )
        arguments = {
            "tile_ptr": side.tile,
            "tile_stride": side.tile.stride(0),
            "temperature_ptr": side.temperature,
            "bias_ptr": side.bias,
            "state_ptr": side.state,
            "state_stride": side.state.stride(0),
            **rows.factors(side.spec, side.temperature),
        }
        others |= {f"{name}_{argument}": value for argument, value in arguments.items()}
    with torch.cuda.device_of(p.tile):
        kernel[(height,)](
            col0=col0,
            C=columns,
            targets_ptr=targets,
            vocab=p.spec.vocab,
            ignore_index=p.spec.ignore_index,
            weight=float(pair.weight),
            V=variants[0],
            W=variants[1],
            KIND=pair.kind,
            enable_fp_fusion=False,  # as in logprobs.py
            **config.options(p.tile.device),
            **others,
        )


def _check(
    p: Side,
    q: Side,
    targets: Tensor,
    pair: PairSpec,
    kinds: tuple[str, ...],
    cross: Tensor | None = None,
    outs: tuple[Tensor | None, Tensor | None] = (None, None),
    coefs: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    if pair.kind not in kinds:
        raise ValueError(f"kind must be one of {kinds}, got {pair.kind!r}")
    if not 0 < pair.weight < 1:
        raise ValueError(f"weight must be in (0, 1), got {pair.weight}")
    height, columns = p.tile.shape
    wide = rows.acc_type(p.tile)
    rows.check(
        p.tile,
        ("p.tile", p.tile, None, (height, columns)),
        ("q.tile", q.tile, p.tile.dtype, (height, columns)),
        ("targets", targets, torch.int64, (height,)),
        ("cross", cross, wide, (3, height)),
    )
    for name, side, out, coef in zip("pq", (p, q), outs, coefs, strict=True):
        rows.check(
            p.tile,
            (f"{name}.temperature", side.temperature, wide, (height,)),
            (f"{name}.bias", side.bias, None, (columns,)),
            (f"{name}.state", side.state, wide, (None, height)),
            (f"{name}_out", out, None, (height, columns)),
            (f"{name}_coef", coef, wide, (6, height)),
        )
        if (out is None) != (coef is None):
            raise ValueError(f"{name}_coef goes with {name}_out")
        rows.check_in_place(f"{name}_out", out, side.tile)


def stats(p: Side, q: Side, col0: int, targets: Tensor, pair: PairSpec, cross: Tensor) -> None:
    """Bring both states and ``cross[0]`` up to date with tiles ``[R, C]``, the columns from ``col0`` on.

    For ``kl`` and ``alpha``. Reads both tiles once.
    Rows whose target is ``spec.ignore_index`` are left alone.

    Raises:
        ValueError: another kind; a dtype, shape, stride or device that the kernels do not read.
    """
    _check(p, q, targets, pair, ("kl", "alpha"), cross)
    others = {"cross_ptr": cross, "cross_stride": cross.stride(0)}
    _launch(_stats_kernel, p, q, col0, targets, pair, statistics=True, **others)


def sums(p: Side, q: Side, col0: int, targets: Tensor, pair: PairSpec, cross: Tensor) -> None:
    """Add what tiles ``[R, C]``, the columns from ``col0`` on, have of the sums to ``cross [3, R]``.

    For ``js`` and ``tv``, given final states. Reads both tiles once.
    Rows whose target is ``spec.ignore_index`` are left alone.

    Raises:
        ValueError: another kind; a dtype, shape, stride or device that the kernels do not read.
    """
    _check(p, q, targets, pair, ("js", "tv"), cross)
    _launch(_sums_kernel, p, q, col0, targets, pair, cross_ptr=cross, cross_stride=cross.stride(0))


def grad(
    p: Side,
    q: Side,
    p_out: Tensor | None,
    q_out: Tensor | None,
    col0: int,
    targets: Tensor,
    pair: PairSpec,
    p_coef: Tensor | None,
    q_coef: Tensor | None,
) -> None:
    """Write dz/dx · dL/dz of each side that has an ``out [R, C]``, by its ``coef [len(Coef), R]`` and final states.

    Reads both tiles once. Zeros in ignored rows, NaN in rows whose target lies outside the vocabulary. ``p_out``
    may be ``p.tile``, ``q_out`` may be ``q.tile``. Of the states the first three rows are read.

    Raises:
        ValueError: an output without coefficients, or the reverse; a dtype, shape, stride or device that the kernels
            do not read.
    """
    outs = (p_out, q_out)
    _check(p, q, targets, pair, ("kl", "alpha", "js", "tv"), outs=outs, coefs=(p_coef, q_coef))
    if p_out is None and q_out is None:
        return
    others: dict[str, object] = {}
    for name, out, coef in (("p", p_out, p_coef), ("q", q_out, q_coef)):
        others |= {
            f"{name}_out_ptr": out,
            f"{name}_out_stride": 0 if out is None else out.stride(0),
            f"{name}_coef_ptr": coef,
            f"{name}_coef_stride": 0 if coef is None else coef.stride(0),
        }
    _launch(_grad_kernel, p, q, col0, targets, pair, outs, **others)
