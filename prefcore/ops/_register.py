"""Registration of an op's implementations with torch: each one is an operator of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._ops import OpOverload


def register(schema: str, launcher: Callable, fake: Callable, key: str) -> OpOverload:
    """Define ``prefcore::<schema>``, run by ``launcher`` on tensors of one device type.

    A launcher imports what it launches (the extension, a Triton module) when it is called: registering must
    need torch alone. Autograd is not registered; an ``autograd.Function`` around the operators provides it.

    Args:
        schema: name and signature of fixed arity, such as ``"halve_cpu(Tensor x) -> Tensor"``.
        launcher: called with the schema's arguments; allocates, launches and returns the outputs.
        fake: the same signature on tensors without storage; returns outputs of the right shape and dtype.
        key: dispatch key of the device type, ``"CPU"`` or ``"CUDA"``.

    Returns:
        The operator's handle, to be bound once at module level.
    """
    name, parenthesis, signature = schema.partition("(")
    qualified = f"prefcore::{name}"
    torch.library.define(qualified, parenthesis + signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, key, launcher)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.prefcore, name).default


def register_ragged(name: str, signature: str, launcher: Callable, fake: Callable) -> dict[str, OpOverload]:
    """Register ``prefcore::<name>_cpu`` and ``<name>_cuda``, which one launcher of the extension serves."""
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    return {impl: register(f"{name}_{impl}{signature}", launcher, fake, key) for impl, key in keys.items()}
