"""Access to the compiled extension, which may be missing from a source tree that was never built."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

# prefcore::Type in csrc/core/number.h
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@functools.cache
def load() -> ModuleType | None:
    """The extension ``prefcore._C``, or None where this installation has none."""
    try:
        return importlib.import_module("prefcore._C")
    except ModuleNotFoundError as error:
        if error.name == "prefcore._C":
            return None
        raise


def require() -> ModuleType:
    """The extension, for callers that :mod:`prefcore._impl` has already let through."""
    extension = load()
    if extension is None:
        raise NotImplementedError("prefcore._C is not built; run `pip install .` in a checkout with a C++17 compiler")
    return extension


def has_cuda() -> bool:
    """Whether the extension holds CUDA code (not whether a GPU is present)."""
    extension = load()
    return extension is not None and bool(extension.has_cuda)
