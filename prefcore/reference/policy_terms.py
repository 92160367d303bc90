"""The oracle of :func:`prefcore.policy_terms`."""

from __future__ import annotations

import torch
from torch import Tensor

from prefcore._types import PolicyStats, PolicyTerms


def policy_terms(
    logps: Tensor,
    old_logps: Tensor | None = None,
    advantages: Tensor | None = None,
    *,
    form: str,
    low: float = float("-inf"),
    high: float = float("inf"),
    dual: float = float("inf"),
    log_ratio: Tensor | None = None,
    weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl: str = "none",
    kl_coef: float | Tensor = 0.0,
    kl_values: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    clamp: float = 20.0,
) -> PolicyTerms:
    """Equal to ``weights * surrogate + kl_coef * kl - entropy_coef * entropy``, each of them by its formula."""
    zero = torch.zeros_like(logps)
    a = zero if advantages is None else advantages.detach()
    w = torch.ones_like(logps) if weights is None else weights.detach()
    q = zero
    if form != "value":
        own = logps - logps.detach()  # 0, with the gradient of logps
        q = logps - old_logps.detach() if old_logps is not None else own
        if log_ratio is not None:
            q = log_ratio.detach() + own
    rho = q.clamp(-clamp, clamp).exp()
    with torch.no_grad():
        below, above = rho < low, rho > high
    dual_hit = torch.zeros_like(below)
    if form == "none":
        surrogate = zero
        below, above = dual_hit, dual_hit
    elif form == "reinforce":
        surrogate = -a * logps
        below, above = dual_hit, dual_hit
    elif form == "clip":
        surrogate = torch.maximum(-rho * a, -rho.clamp(low, high) * a)
        dual_hit = (a < 0) & (surrogate > -dual * a)
        surrogate = torch.where(dual_hit, -dual * a, surrogate)
        below, above = below & (a < 0), above & (a > 0)
        below, above = below & ~dual_hit, above & ~dual_hit
    elif form == "cispo":
        surrogate = -rho.detach().clamp(low, high) * a * logps
    elif form == "sapo":
        tau = torch.where(a > 0, zero + high, zero + low)
        surrogate = -torch.sigmoid(tau * (rho - 1)) * (4 / tau) * a
        below, above = dual_hit, dual_hit
    elif form == "log_clip":
        surrogate = torch.where(a > 0, q.clamp(max=high), q.clamp(min=low))
        below, above = (q < low) & ~(a > 0), (q > high) & (a > 0)
    else:
        near = logps
        if old_logps is not None:
            moved = logps - old_logps.detach()
            held = moved.clamp(-high, high)
            # Not V_old + (V - V_old) within the bounds: its rounding would count as a clip.
            near = torch.where(moved == held, logps, old_logps.detach() + held)
        plain, held = (logps - a).square() / 2, (near - a).square() / 2
        surrogate = torch.maximum(plain, held)
        below, above = (held > plain) & (near > logps), (held > plain) & (near < logps)
    surrogate = surrogate if form == "log_clip" else w * surrogate
    penalty = kl_values if kl_values is not None else _kl(kl, logps, ref_logps, rho, clamp)
    losses = surrogate + kl_coef * penalty
    if entropy is not None:
        losses = losses - entropy_coef * entropy
    h = zero if entropy is None else entropy
    # Not log(rho): that would lose log-ratios near 0.
    drift = torch.expm1(q.clamp(-clamp, clamp)) - q.clamp(-clamp, clamp)
    sums = (surrogate, rho, drift, below, above, dual_hit, penalty, h, torch.ones_like(logps))
    return PolicyTerms(losses, PolicyStats(*(x.detach().double().sum() for x in sums)))


def _kl(kl: str, logps: Tensor, ref_logps: Tensor | None, rho: Tensor, clamp: float) -> Tensor:
    if ref_logps is None:
        return torch.zeros_like(logps)
    u = ref_logps.detach() - logps
    k1, k2 = -u, u.square() / 2
    k3 = torch.expm1(u.clamp(-clamp, clamp)) - u.clamp(-clamp, clamp)
    if kl == "k3_corrected":
        return rho * k3
    if kl in ("k1_straight", "k3_straight"):
        value = k1 if kl == "k1_straight" else k3
        return value.detach() + (k2 - k2.detach())
    return {"k1": k1, "k2": k2, "k3": k3}[kl]
