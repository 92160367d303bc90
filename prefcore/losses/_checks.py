"""Arguments that losses share: what is refused, and in which dtype the rest is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from prefcore.ops._checks import check_number, check_tensor, check_values


def log_ratios(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> tuple[Tensor, Tensor]:
    """Chosen and rejected ``logps - ref_logps``, ``[P]`` each; the reference carries no gradient."""
    given = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    for name, value in given.items():
        check_tensor(name, value)
        if not value.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {value.dtype}")
        if value.dim() != 1:
            raise ValueError(f"{name} must have shape [P], one log-prob per sequence, got {list(value.shape)}")
        _check_like(name, value, chosen_logps)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (wide(value) for value in given.values())
    return policy_chosen - ref_chosen.detach(), policy_rejected - ref_rejected.detach()


def wide(value: Tensor) -> Tensor:
    """``value`` in float32, or in float64 if that is its dtype."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def coefficient(
    name: str, value: float | Tensor, like: Tensor, *, low: float, high: float, low_allowed: bool = False
) -> float | Tensor:
    """Check a coefficient, a number or a tensor ``[P]`` or 0-d, that lies between ``low`` and ``high``.

    A tensor's values are checked where that costs no synchronisation, and it comes back detached in
    ``like``'s dtype.
    """
    domain = f"{'[' if low_allowed else '('}{low}, {high})"
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise ValueError(f"{name} must have a real dtype, got {value.dtype}")
        if value.dim() != 0:
            _check_like(name, value, like)
        elif value.device != like.device:
            raise ValueError(f"{name} must be on device {like.device}, got {value.device}")
        value = value.detach()
        if not torch.compiler.is_compiling() and check_values(value.device):
            inside = (value >= low if low_allowed else value > low) & (value < high)
            if not bool(inside.all()):
                raise ValueError(f"{name} must be in {domain}, got {value[~inside].flatten()[0].item()}")
        return value.to(like.dtype)
    check_number(name, value, " or a torch.Tensor")
    if not ((value >= low if low_allowed else value > low) and value < high):
        raise ValueError(f"{name} must be in {domain}, got {value}")
    return value


def token_counts(name: str, value: Tensor, like: Tensor) -> Tensor:
    """``[P]`` numbers of tokens as divisors in ``like``'s dtype: at least 1, an empty response sums to 0."""
    check_tensor(name, value)
    _check_like(name, value, like)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must have an integer dtype, got {value.dtype}")
    if not torch.compiler.is_compiling() and check_values(value.device) and bool((value < 0).any()):
        raise ValueError(f"{name} must not be negative, got {value.min().item()}")
    return value.detach().clamp(min=1).to(like.dtype)


def _check_like(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)} as chosen_logps, got {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on device {like.device} as chosen_logps, got {value.device}")
