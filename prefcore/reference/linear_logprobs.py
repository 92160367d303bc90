"""Oracle of ``prefcore.linear_logprobs``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefcore._types import TokenStats
from prefcore.reference.logprobs import logprobs


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    logits_dtype: torch.dtype | None = None,
) -> TokenStats:
    """Token statistics of ``hidden @ weight.T + inner @ outer.T + bias``, with the logits materialised."""
    dtype = logits_dtype or hidden.dtype
    scored = (targets != ignore_index)[..., None]
    hidden = hidden.where(scored, 0)  # an ignored row may hold anything
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if low_rank is not None:
        inner, outer = low_rank
        logits = logits + torch.nn.functional.linear(inner.where(scored, 0).to(dtype), outer.to(dtype))
    return logprobs(
        logits,
        targets,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        outputs=outputs,
    )
