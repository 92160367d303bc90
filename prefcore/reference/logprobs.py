"""Oracle of ``prefcore.logprobs``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefcore._types import TokenStats


def logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
) -> TokenStats:
    """Token statistics of materialised logits, in the logits' dtype (float32 below that)."""
    keep = targets != ignore_index
    # An ignored row may hold anything.
    z = transform(logits.where(keep[..., None], 0), temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    index = targets.where(keep, 0)
    stats = {
        "logps": log_p.gather(-1, index[..., None])[..., 0],
        "entropy": -(p * log_p.where(p > 0, 0)).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "is_top1": z.argmax(-1) == index,
        "mean_logits": z.mean(-1).detach(),
        "log_sum_sq_probs": p.square().sum(-1).log().detach(),
    }
    return TokenStats(**{k: v.where(keep, 0) for k, v in stats.items() if k == "logps" or k in outputs})


def transform(logits: Tensor, *, temperature: float | Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """z = softcap(logit_scale·logits)/temperature, in float32 at the least."""
    z = (logits if logits.dtype.itemsize >= 4 else logits.float()) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
