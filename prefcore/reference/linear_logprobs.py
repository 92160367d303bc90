"""Oracle of ``prefcore.linear_logprobs``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefcore._types import TokenStats
from prefcore.reference.logprobs import logprobs


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    scored: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """``hidden @ weight.T + inner @ outer.T + bias`` in ``dtype``, that of hidden by default.

    A weight or bias of another type is rounded to that of hidden first, whatever ``dtype`` is.
    An ignored row may hold anything: where ``scored [...]`` is given, what it does not name counts as zeros.
    """
    dtype = dtype or hidden.dtype

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x if scored is None else x.where(scored[..., None], 0)
        bias = None if bias is None else bias.to(hidden.dtype).to(dtype)
        return torch.nn.functional.linear(x.to(dtype), weight.to(hidden.dtype).to(dtype), bias)

    made = linear(hidden, weight, bias)
    return made if low_rank is None else made + linear(*low_rank)


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
    return logprobs(
        logits(hidden, weight, bias, low_rank, targets != ignore_index, logits_dtype),
        targets,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        outputs=outputs,
    )
