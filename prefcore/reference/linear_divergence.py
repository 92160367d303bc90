"""Oracle of ``prefcore.linear_divergence``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefcore._types import PairStats
from prefcore.reference.divergence import divergence
from prefcore.reference.linear_logprobs import logits


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    other_low_rank: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    **options: Any,
) -> PairStats:
    """:func:`divergence` of both sides' logits, as :func:`linear_logprobs` has them; ``options`` are its own."""

    def side(hidden: Tensor, weight: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None) -> Tensor:
        scored = None if targets is None else targets != ignore_index
        return logits(hidden, weight, bias, low_rank, scored, logits_dtype)

    return divergence(
        side(hidden, weight, bias, low_rank),
        side(other_hidden, other_weight, other_bias, other_low_rank),
        targets,
        ignore_index=ignore_index,
        **options,
    )
