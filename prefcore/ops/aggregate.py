"""From tokens to one scalar: the aggregations that policy losses share."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from prefcore import reference
from prefcore._impl import Impl, resolve
from prefcore.ops import _checks
from prefcore.ops._register import register
from prefcore.ops.sequence_reduce import sequence_reduce

How = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "token_sum"]
_HOWS: tuple[str, ...] = get_args(How)


def aggregate(
    values: Tensor,
    cu_seqlens: Tensor,
    how: How,
    num_items: float | Tensor | None = None,
    *,
    horizon: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Aggregate per-token values of a packed batch to a scalar.

    With an external ``num_items`` the results of the parts of a batch add up to the result of the whole, and
    each token's gradient is the same in a part as in the whole: under gradient accumulation or data
    parallelism give the whole step's count. Empty sequences do not count; a batch without tokens gives 0.

    Args:
        values: ``[T]`` float32 or float64.
        cu_seqlens: ``[S + 1]`` int32 offsets into ``values``, from 0 to T, on its device.
        how: ``"token_mean"``, the sum over tokens / number of tokens; ``"token_sum"``; or, over non-empty
            sequences, the mean of each one's mean (``"seq_mean_token_mean"``), sum
            (``"seq_mean_token_sum"``), or sum / ``horizon`` (``"seq_mean_token_sum_norm"``).
        num_items: positive, replaces the number of tokens (``token_mean``) or of non-empty sequences
            (``seq_mean_*``): a number, or a 0-d tensor of a real dtype on the values' device, which is not
            differentiated, nor read by the host where that is a GPU (unless ``PREFCORE_CHECK=1``).
        horizon: a positive constant, for ``"seq_mean_token_sum_norm"`` alone.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"``.

    Returns:
        A 0-d tensor in the values' dtype, differentiable once.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: shapes, dtypes, devices or values other than these, or an option that ``how`` does not
            use.
    """
    _checks.check_ragged("values", values, cu_seqlens)
    _checks.check_type("how", how, str)
    if how not in _HOWS:
        raise ValueError(f"how must be one of {_HOWS}, got {how!r}")
    _check_num_items(values, how, num_items)
    if (horizon is None) == (how == "seq_mean_token_sum_norm"):
        verb = "needs" if horizon is None else "does not use"
        raise ValueError(f"how={how!r} {verb} horizon")
    if horizon is not None:
        _check_positive("horizon", horizon)
    chosen = resolve(impl, "aggregate", values.device)
    if isinstance(num_items, Tensor):
        num_items = num_items.detach().to(values.dtype)
        if _checks.check_values(num_items.device):
            num_items = _CHECKED(num_items)
    if chosen == "reference":
        _checks.check_reference_offsets("cu_seqlens", cu_seqlens, values.shape[0])
        return reference.aggregate(values, cu_seqlens, how, num_items, horizon=horizon)

    per_token_mean = how == "seq_mean_token_mean"
    per_sequence = sequence_reduce(values, cu_seqlens, "mean" if per_token_mean else "sum", impl=chosen)
    if horizon is not None:
        per_sequence = per_sequence / horizon
    total = per_sequence.sum()
    if how == "token_sum":
        return total
    if num_items is None:
        if how == "token_mean":
            num_items = max(values.shape[0], 1)
        else:
            num_items = torch.clamp((cu_seqlens.diff() > 0).sum(), min=1)
    return total / num_items


def _check_num_items(values: Tensor, how: str, num_items: float | Tensor | None) -> None:
    if num_items is None:
        return
    if how == "token_sum":
        raise ValueError("how='token_sum' does not use num_items")
    if not isinstance(num_items, Tensor):
        _check_positive("num_items", num_items)
    elif num_items.dim() != 0:
        raise ValueError(f"num_items must be a 0-d tensor, got shape {list(num_items.shape)}")
    elif num_items.device != values.device:
        raise ValueError(f"num_items must be on the values' device {values.device}, got {num_items.device}")
    elif num_items.dtype == torch.bool or num_items.is_complex():
        raise ValueError(f"num_items must have a real dtype, got {num_items.dtype}")


def _check_positive(name: str, value: float) -> None:
    _checks.check_number(name, value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _launch_check(num_items: Tensor) -> Tensor:
    _check_positive("num_items", num_items.item())
    return num_items.clone()


# Of any device: it launches nothing of its own.
_CHECKED = register(
    "aggregate_num_items(Tensor num_items) -> Tensor", _launch_check, torch.empty_like, "CompositeExplicitAutograd"
)
