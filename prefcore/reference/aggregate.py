"""The oracle of :func:`prefcore.aggregate`."""

from __future__ import annotations

from torch import Tensor

from prefcore.reference.sequence_reduce import sequence_reduce


def aggregate(
    values: Tensor,
    cu_seqlens: Tensor,
    how: str,
    num_items: float | Tensor | None = None,
    *,
    horizon: float | None = None,
) -> Tensor:
    """Equal to ``values.sum() / num_items`` for ``token_mean``, and for the means over sequences to
    ``sum(reduce(values[a:b]) for a, b in pairwise(cu_seqlens)) / num_items``.
    """
    if how == "token_sum":
        return values.sum()
    if how == "token_mean":
        return values.sum() / (max(len(values), 1) if num_items is None else num_items)
    total = sequence_reduce(values, cu_seqlens, "mean" if how == "seq_mean_token_mean" else "sum").sum()
    if horizon is not None:
        total = total / horizon
    return total / ((cu_seqlens.diff() > 0).sum().clamp(min=1) if num_items is None else num_items)
