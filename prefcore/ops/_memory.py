"""Room for tiles and for whatever else is as large."""

from __future__ import annotations

import torch
from torch import Tensor

from prefcore import _native


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, in huge pages where the system has them to give."""
    return advise_huge(torch.empty(shape, dtype=dtype, device=device))


def advise_huge(fresh: Tensor) -> Tensor:
    """Ask the system to back a new buffer with huge pages, before its first touch; returns it.

    A CPU's large buffers come from the system anew each time, and the first touch of their pages is a cost beside the
    GEMMs: one fault for every 4 KiB, or one for every 2 MiB.
    """
    extension = _native.load() if fresh.device.type == "cpu" else None
    if extension is not None:
        extension.advise_huge(fresh.data_ptr(), fresh.untyped_storage().nbytes())
    return fresh
