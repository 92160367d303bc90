"""Checks of arguments that ops share. Those on values run inside launchers, so that ops can be traced."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def check_values(device: torch.device) -> bool:
    """Whether to check tensor values: on the CPU always, on a GPU, where that synchronises, on request."""
    return device.type == "cpu" or os.environ.get("PREFCORE_CHECK") == "1"


def check_type(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    """Refuse anything of another type, and tensors that are spread over ranks."""
    if not isinstance(value, kind) and not (optional and value is None):
        expected = f"{kind.__name__}{' or None' if optional else ''}"
        raise TypeError(f"{name} must be a {expected}, got {type(value).__name__}")
    if isinstance(value, Tensor) and hasattr(value, "full_tensor"):
        raise NotImplementedError(
            f"{name} is a DTensor; gather it first, `{name}.full_tensor()`, or hand over the local computation"
        )


def check_tensor(name: str, value: object) -> None:
    """Refuse anything but a plain tensor."""
    check_type(name, value, Tensor)


def check_number(name: str, value: object, alternative: str = "") -> None:
    """Refuse anything but an int or a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number{alternative}, got {type(value).__name__}")


def check_ragged(name: str, x: Tensor, offsets: Tensor, called: str = "cu_seqlens") -> None:
    """Check all but values: ``x [T]`` float32 or float64, ``offsets [S + 1]`` int32 on the same device."""
    check_tensor(name, x)
    check_tensor(called, offsets)
    if x.dim() != 1:
        raise ValueError(f"{name} must have shape [T], got {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {x.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{called} must have shape [S + 1], got {list(offsets.shape)}")
    if offsets.dtype != torch.int32:
        raise ValueError(f"{called} must be int32, got {offsets.dtype}")
    if offsets.device != x.device:
        raise ValueError(f"{called} must be on {name}'s device {x.device}, got {offsets.device}")


def check_offset_values(name: str, offsets: Tensor, total: int) -> None:
    """Check that ``offsets`` start at 0, do not decrease, and end at ``total``.

    Reads the values, so it synchronises with a GPU.
    """
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise ValueError(f"{name} must start at 0, got {first}")
    if last != total:
        raise ValueError(f"{name} must end at the number of rows, {total}, got {last}")
    falls = offsets[1:] < offsets[:-1]
    if bool(falls.any()):
        at = int(falls.to(torch.int32).argmax())
        raise ValueError(f"{name} must not decrease, got {int(offsets[at])} before {int(offsets[at + 1])} (index {at})")


def check_reference_offsets(name: str, offsets: Tensor, total: int) -> None:
    """:func:`check_offset_values` for the reference, which has no launcher; not while a compiler traces."""
    if not torch.compiler.is_compiling() and check_values(offsets.device):
        check_offset_values(name, offsets, total)
