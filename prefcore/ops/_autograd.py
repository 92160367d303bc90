"""Backward passes that nothing may differentiate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable) -> Callable:
    """``torch.autograd.function.once_differentiable``, also where what arrives is a constant.

    torch's own refuses a second derivative if an upstream gradient requires one. The gradients of a head depend on its
    inputs besides, which ``create_graph=True`` alone would leave out in silence.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = tuple(g if g is None else g.detach().requires_grad_(g.is_floating_point()) for g in grads)
        return guarded(ctx, *grads)

    return wrapper
