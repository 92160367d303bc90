"""Token losses of policy gradients, their derivatives and statistics: one program per block of tokens.

The functions and codes are those of ``csrc/cpu/policy_terms*``, explained in ``prefcore/ops/policy_terms.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefcore._types import FORMS, KLS
from prefcore.kernels._launch import VECTOR_BYTES, RowConfig

# Sums of a second vector of each thread would cost it 40 registers.
LAUNCH = RowConfig(threads=128, vectors=1)

NONE, REINFORCE, CLIP, CISPO, SAPO, LOG_CLIP, VALUE = (tl.constexpr(code) for code in range(len(FORMS)))
NO_KL, K1, K2, K3, K1_STRAIGHT, K3_STRAIGHT, K3_CORRECTED, EXACT = (tl.constexpr(code) for code in range(len(KLS)))


@triton.jit
def _read(pointer, offsets, mask, EDGE: tl.constexpr):
    if EDGE:
        return tl.load(pointer + offsets, mask=mask, other=0.0)
    return tl.load(pointer + offsets)


@triton.jit
def _write(pointer, offsets, mask, value, EDGE: tl.constexpr):
    if EDGE:
        tl.store(pointer + offsets, value, mask=mask)
    else:
        tl.store(pointer + offsets, value)


@triton.jit
def _between(x, low, high):
    """Clamped; a NaN in x stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _expm1(x, e):
    """e - 1, where e = exp(x): near 0 by Taylor's series, whose remainder below 1/2 is less than a rounding."""
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 8
    series = tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(TERMS, 1, -1):
        series = series * x * (1.0 / k) + 1.0
    return tl.where(tl.abs(x) < 0.5, series * x, e - 1.0)


@triton.jit
def _block(
    logps_ptr,
    old_ptr,
    advantages_ptr,
    log_ratio_ptr,
    weights_ptr,
    ref_ptr,
    kl_values_ptr,
    kl_coefs_ptr,
    entropy_ptr,
    losses_ptr,
    slopes_ptr,
    sums_ptr,
    T,
    low,
    high,
    dual,
    kl_coef,
    entropy_coef,
    clamp,
    FORM: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < T
    x = _read(logps_ptr, offsets, mask, EDGE)
    zero = tl.zeros(x.shape, x.dtype)
    one = zero + 1.0

    ratio, slope, bounded, drift, q = one, one, zero, zero, zero
    HAS_RATIO: tl.constexpr = FORM != VALUE and (old_ptr is not None or log_ratio_ptr is not None)
    if HAS_RATIO:
        if log_ratio_ptr is not None:
            q = _read(log_ratio_ptr, offsets, mask, EDGE)
        else:
            q = x - _read(old_ptr, offsets, mask, EDGE)
        bounded = _between(q, -clamp, clamp)
        ratio = tl.exp(bounded)
        slope = tl.where(q == bounded, ratio, 0.0)
        drift = _expm1(bounded, ratio) - bounded

    value, d, below, above, capped = zero, zero, zero, zero, zero
    if FORM != NONE:
        a = _read(advantages_ptr, offsets, mask, EDGE)
    w = one
    if weights_ptr is not None:
        w = _read(weights_ptr, offsets, mask, EDGE)
    if FORM == REINFORCE:
        d = -a * w
        value = d * x
    elif FORM == CLIP:
        free = -ratio * a
        held = -_between(ratio, low, high) * a
        under = (ratio < low) & (a < 0)
        over = (ratio > high) & (a > 0)
        worst = tl.where(free > held, free, held)
        most = dual * -a
        most_hit = (a < 0) & (worst > most)
        value = tl.where(most_hit, most, worst) * w
        d = tl.where(under | over | most_hit, 0.0, -slope * a * w)
        below = tl.where(under & ~most_hit, one, zero)
        above = tl.where(over, one, zero)
        capped = tl.where(most_hit, one, zero)
    elif FORM == CISPO:
        d = -_between(ratio, low, high) * a * w
        value = d * x
        below = tl.where(ratio < low, one, zero)
        above = tl.where(ratio > high, one, zero)
    elif FORM == SAPO:
        tau = tl.where(a > 0, zero + high, zero + low)
        z = tau * (ratio - 1.0)
        fall = tl.exp(-tl.abs(z))
        small = fall / (1.0 + fall)
        large = 1.0 / (1.0 + fall)
        value = -tl.where(z > 0, large, small) * (4.0 / tau) * a * w
        d = -4.0 * small * large * slope * a * w
    elif FORM == LOG_CLIP:
        under = (q < low) & ~(a > 0)
        over = (q > high) & (a > 0)
        value = tl.where(over, high, tl.where(under, low, q))
        d = tl.where(under | over, zero, one)
        below = tl.where(under, one, zero)
        above = tl.where(over, one, zero)
    elif FORM == VALUE:
        error = x - a
        near = x
        if old_ptr is not None:
            before = _read(old_ptr, offsets, mask, EDGE)
            moved = x - before
            reach = _between(moved, -high, high)
            near = tl.where(moved == reach, x, before + reach)
        other = near - a
        plain = error * error
        clipped = other * other
        worse = clipped > plain
        value = 0.5 * tl.where(worse, clipped, plain) * w
        d = tl.where(worse, 0.0, error * w)
        below = tl.where(worse & (near > x), one, zero)
        above = tl.where(worse & (near < x), one, zero)

    loss, penalty = value, zero
    if KL != NO_KL:
        coef = zero + kl_coef
        if kl_coefs_ptr is not None:
            coef = _read(kl_coefs_ptr, offsets, mask, EDGE)
        if KL == EXACT:
            penalty = _read(kl_values_ptr, offsets, mask, EDGE)
        else:
            u = _read(ref_ptr, offsets, mask, EDGE) - x
            pull = -u
            if KL == K2:
                penalty = 0.5 * u * u
            elif KL == K3 or KL >= K3_STRAIGHT:
                held_u = _between(u, -clamp, clamp)
                grown = _expm1(held_u, tl.exp(held_u))
                penalty = grown - held_u
                push = tl.where(u == held_u, -grown, 0.0)
                if KL == K3:
                    pull = push
                elif KL == K3_CORRECTED:
                    pull = slope * penalty + ratio * push
                    penalty = ratio * penalty
            else:
                penalty = -u
            if KL == K1:
                pull = one
            d += coef * pull
        loss += coef * penalty
    entropy = zero
    if entropy_ptr is not None:
        entropy = _read(entropy_ptr, offsets, mask, EDGE)
        loss -= entropy_coef * entropy
    _write(losses_ptr, offsets, mask, loss, EDGE)
    if slopes_ptr is not None:
        _write(slopes_ptr, offsets, mask, d, EDGE)

    if EDGE:
        value = tl.where(mask, value, 0.0)
        ratio = tl.where(mask, ratio, 0.0)
        drift = tl.where(mask, drift, 0.0)
        below = tl.where(mask, below, 0.0)
        above = tl.where(mask, above, 0.0)
        capped = tl.where(mask, capped, 0.0)
        penalty = tl.where(mask, penalty, 0.0)
        entropy = tl.where(mask, entropy, 0.0)
    # In the order of PolicyStats.
    sums_ptr += block * 8
    tl.store(sums_ptr, tl.sum(value, 0).to(tl.float64))
    tl.store(sums_ptr + 1, tl.sum(ratio, 0).to(tl.float64))
    tl.store(sums_ptr + 2, tl.sum(drift, 0).to(tl.float64))
    tl.store(sums_ptr + 3, tl.sum(below, 0).to(tl.float64))
    tl.store(sums_ptr + 4, tl.sum(above, 0).to(tl.float64))
    tl.store(sums_ptr + 5, tl.sum(capped, 0).to(tl.float64))
    tl.store(sums_ptr + 6, tl.sum(penalty, 0).to(tl.float64))
    tl.store(sums_ptr + 7, tl.sum(entropy, 0).to(tl.float64))


@triton.jit(do_not_specialize=["T"])
def _policy_terms_kernel(
    logps_ptr,
    old_ptr,
    advantages_ptr,
    log_ratio_ptr,
    weights_ptr,
    ref_ptr,
    kl_values_ptr,
    kl_coefs_ptr,
    entropy_ptr,
    losses_ptr,
    slopes_ptr,
    sums_ptr,
    T,
    low: tl.float64,
    high: tl.float64,
    dual: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    clamp: tl.float64,
    FORM: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    kind = logps_ptr.dtype.element_ty
    low = tl.full((), low, kind)
    high = tl.full((), high, kind)
    dual = tl.full((), dual, kind)
    kl_coef = tl.full((), kl_coef, kind)
    entropy_coef = tl.full((), entropy_coef, kind)
    clamp = tl.full((), clamp, kind)
    # Without a mask, loads are of 16 bytes whatever T.
    if (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= T:
        _block(
            logps_ptr,
            old_ptr,
            advantages_ptr,
            log_ratio_ptr,
            weights_ptr,
            ref_ptr,
            kl_values_ptr,
            kl_coefs_ptr,
            entropy_ptr,
            losses_ptr,
            slopes_ptr,
            sums_ptr,
            T,
            low,
            high,
            dual,
            kl_coef,
            entropy_coef,
            clamp,
            FORM,
            KL,
            BLOCK,
            False,
        )
    else:
        _block(
            logps_ptr,
            old_ptr,
            advantages_ptr,
            log_ratio_ptr,
            weights_ptr,
            ref_ptr,
            kl_values_ptr,
            kl_coefs_ptr,
            entropy_ptr,
            losses_ptr,
            slopes_ptr,
            sums_ptr,
            T,
            low,
            high,
            dual,
            kl_coef,
            entropy_coef,
            clamp,
            FORM,
            KL,
            BLOCK,
            True,
        )


def _block_size(dtype: torch.dtype) -> int:
    return LAUNCH.threads * LAUNCH.vectors * VECTOR_BYTES // dtype.itemsize


def blocks(logps: Tensor) -> int:
    """Programs of a launch, each of which writes one row of ``parts``."""
    return -(-logps.shape[0] // _block_size(logps.dtype))


def policy_terms(
    logps: Tensor,
    tensors: list[Tensor | None],
    form: str,
    kl: str,
    numbers: dict[str, float],
    losses: Tensor,
    slopes: Tensor | None,
    parts: Tensor,
) -> None:
    """Write ``losses``, ``slopes`` and, for each block, ``parts`` ``[blocks, 8]`` float64.

    ``tensors`` are old_logps, advantages, log_ratio, weights, ref_logps, kl_values, kl_coefs and entropy; each is
    contiguous or None, as everything else is contiguous. ``numbers`` are the kernel's, by name.
    """
    if logps.shape[0] == 0:
        return
    names = ("old", "advantages", "log_ratio", "weights", "ref", "kl_values", "kl_coefs", "entropy")
    with torch.cuda.device_of(logps):
        _policy_terms_kernel[(parts.shape[0],)](
            logps_ptr=logps,
            **{f"{name}_ptr": tensor for name, tensor in zip(names, tensors, strict=True)},
            losses_ptr=losses,
            slopes_ptr=slopes,
            sums_ptr=parts,
            T=logps.shape[0],
            **numbers,
            FORM=FORMS.index(form),
            KL=KLS.index(kl),
            BLOCK=_block_size(logps.dtype),
            **LAUNCH.options(logps.device),
        )
