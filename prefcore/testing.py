"""Assertions that tests of the ops share, here and in projects that build on them."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse_than(actual: Tensor, eager: Tensor, truth: Tensor, name: str, *, band: float = 0.0) -> None:
    """``actual`` errs at most twice as far from the float64 ``truth`` as eager PyTorch does, up to four roundings.

    Args:
        actual: what is tested.
        eager: the same by PyTorch in the same dtypes.
        truth: the same in float64.
        name: what the message calls it.
        band: a rounding of some intermediate value, where it weighs more than a rounding of the result.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if actual.dtype == torch.bool:
        raise AssertionError(f"{name}: compare booleans exactly")
    if actual.numel() == 0:
        return
    if not torch.isfinite(actual).all():
        raise AssertionError(f"{name} is not finite")
    error, budget = ((x.double() - truth.double()).abs().max().item() for x in (actual, eager))
    band = 4 * max(band, torch.finfo(actual.dtype).eps * truth.abs().max().item())
    if not error <= 2 * budget + band:
        raise AssertionError(f"{name}: error {error:.3e}, eager's {budget:.3e}, band {band:.3e}")
