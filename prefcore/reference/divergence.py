"""Oracle of ``prefcore.divergence``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefcore._types import PairStats
from prefcore.reference.logprobs import logprobs, transform


def divergence(
    logits: Tensor,
    other_logits: Tensor,
    targets: Tensor | None = None,
    *,
    kind: str,
    alpha: float = 0.5,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    other_temperature: float | Tensor = 1.0,
    other_softcap: float | None = None,
    other_logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
) -> PairStats:
    """A divergence of p = softmax(z) and q = softmax(other z) for each row, from its definition."""
    skipped = logits.new_zeros(logits.shape[:-1], dtype=torch.bool) if targets is None else targets == ignore_index
    scored = torch.zeros_like(skipped, dtype=torch.int64) if targets is None else targets
    if targets is None:
        ignore_index = -1  # none of these zeros

    def side(x: Tensor, entropy: str, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        log_p = transform(x.masked_fill(skipped[..., None], 0), **options).log_softmax(-1)
        wanted = ("entropy",) if entropy in outputs else ()
        stats = logprobs(x, scored, ignore_index=ignore_index, outputs=wanted, **options)
        return log_p, None if targets is None else stats.logps, stats.entropy

    log_p, logps, entropy = side(
        logits, "entropy", temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )  # fmt: skip
    log_q, other_logps, other_entropy = side(
        other_logits, "other_entropy", temperature=other_temperature, softcap=other_softcap,
        logit_scale=other_logit_scale,
    )  # fmt: skip
    value = _DIVERGENCES[kind](log_p, log_q, {"alpha": alpha, "js": beta}.get(kind, 0.5)).masked_fill(skipped, 0)
    return PairStats(value, logps, other_logps, entropy, other_entropy)


def _expectation(log_p: Tensor, value: Tensor) -> Tensor:
    """The sum of p·value, where p = 0 counts nothing."""
    return (log_p.exp() * value.masked_fill(log_p == -torch.inf, 0)).sum(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _expectation(log_p, log_p - log_q)


def _js(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    mixture = beta * log_p.exp() + (1 - beta) * log_q.exp()
    log_m = mixture.where(mixture > 0, 1).log()
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _alpha(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    overlap = (alpha * log_p + (1 - alpha) * log_q).exp().sum(-1)
    return (1 - overlap) / (alpha * (1 - alpha))


_DIVERGENCES = {
    "kl_pq": lambda log_p, log_q, _: _kl(log_p, log_q),
    "kl_qp": lambda log_p, log_q, _: _kl(log_q, log_p),
    "js": _js,
    "alpha": _alpha,
    "tv": lambda log_p, log_q, _: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
}
