"""Oracle of ``prefcore.linear_loss``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefcore._types import LinearLoss, Tile, TokenStats
from prefcore.reference.linear_logprobs import linear_logprobs


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    loss_fn: Callable[[TokenStats, Tile], Tensor],
    *,
    cu_groups: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> LinearLoss:
    """Equal to ``(weights * losses).sum() / normalizer``, the losses being those of one tile that is the batch.

    ``options`` are those of :func:`linear_logprobs`.
    """
    stats = linear_logprobs(hidden, weight, targets, **options)
    S = cu_seqlens.shape[0] - 1
    if cu_groups is None:
        cu_groups = torch.arange(S + 1, dtype=torch.int32, device=hidden.device)
    G = cu_groups.shape[0] - 1
    tile = Tile(slice(0, targets.shape[0]), slice(0, S), slice(0, G), cu_seqlens, cu_groups)
    losses = loss_fn(stats, tile)
    weighted = losses if weights is None else losses * weights
    loss = weighted.sum() / (max(losses.shape[0], 1) if normalizer is None else normalizer)
    return LinearLoss(loss, losses.detach(), TokenStats._make(x if x is None else x.detach() for x in stats))
