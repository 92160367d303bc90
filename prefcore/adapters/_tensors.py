"""Between padded ``[B, L]`` tensors with a mask, as trainers have them, and prefcore's packed ``[T]``."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefcore.losses._checks import wide
from prefcore.losses.policy import kl_loss
from prefcore.ops._checks import check_tensor
from prefcore.ops.logprobs import logprobs
from prefcore.ops.policy_terms import Kl


class Responses:
    """The tokens of a batch that a mask keeps, one response after another."""

    def __init__(self, mask: Tensor) -> None:
        check_tensor("mask", mask)
        if mask.dim() == 0:
            raise ValueError("the mask must have shape [..., L], got a scalar")
        self.kept = mask != 0
        self.lengths = self.kept.sum(-1).flatten()  # [B]
        self.cu_seqlens = pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    def pack(self, name: str, padded: Tensor) -> Tensor:
        """``[T]`` in float32, or float64; what is masked is not read, whatever it holds."""
        check_tensor(name, padded)
        if padded.shape != self.kept.shape:
            raise ValueError(f"{name} must have the mask's shape {list(self.kept.shape)}, got {list(padded.shape)}")
        return wide(padded[self.kept])

    def pad(self, packed: Tensor, like: Tensor) -> Tensor:
        """Shaped like the mask, in the dtype of ``like``, with zeros where it masks."""
        out = torch.zeros(self.kept.shape, dtype=like.dtype, device=like.device)
        out[self.kept] = packed.to(like.dtype)
        return out


def common_dtype(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


def mean(values: Tensor) -> Tensor:
    """The mean, 0 of nothing."""
    return values.sum() / max(values.numel(), 1)


def entropies(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """``[...]`` in float32 or float64, of ``[..., V]``; 0 where a target is -100."""
    if targets is None:
        targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return cast(Tensor, logprobs(logits, targets, outputs=("entropy",)).entropy)


def kl_estimates(logps: Tensor, ref_logps: Tensor, kl: Kl) -> Tensor:
    """Of any shape, where :func:`prefcore.losses.kl_loss` takes ``[T]``."""
    return kl_loss(logps.flatten(), ref_logps.flatten(), kl=kl).reshape(logps.shape)
