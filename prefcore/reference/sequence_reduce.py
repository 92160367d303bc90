"""The oracle of :func:`prefcore.sequence_reduce`."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_reduce(
    x: Tensor,
    cu_seqlens: Tensor,
    mode: str = "sum",
    weights: Tensor | None = None,
    *,
    gamma: float | None = None,
) -> Tensor:
    """Equal to ``stack([(factors * x)[a:b].sum() for a, b in pairwise(cu_seqlens)])``, in ``x``'s dtype."""
    lengths = cu_seqlens.diff().long()
    sequence = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths, output_size=len(x))
    if weights is not None:
        x = weights * x
    if gamma is not None:
        time = torch.arange(len(x), device=x.device) - cu_seqlens[sequence]
        x = torch.full_like(x, gamma).pow(time) * x
    sums = x.new_zeros(len(lengths)).index_add(0, sequence, x)
    return sums / lengths.clamp(min=1) if mode == "mean" else sums
