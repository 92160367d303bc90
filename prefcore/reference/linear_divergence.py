"""Oracle of ``prefcore.linear_divergence``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefcore._types import PairStats
from prefcore.reference.divergence import divergence


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    **options: Any,
) -> PairStats:
    """:func:`divergence` of the logits ``hidden @ weight.T + bias`` of both sides; ``options`` are its own."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = logits_dtype or hidden.dtype
        if targets is not None:
            hidden = hidden.where((targets != ignore_index)[..., None], 0)  # an ignored row may hold anything
        return torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    return divergence(
        logits(hidden, weight, bias),
        logits(other_hidden, other_weight, other_bias),
        targets,
        ignore_index=ignore_index,
        **options,
    )
