"""Checks and conversions that ``linear_logprobs``, ``linear_loss`` and ``logprobs`` share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefcore._types import OUTPUTS, TokenStats
from prefcore.ops._checks import check_number, check_type, check_values
from prefcore.ops._stats import accumulator_dtype

LowRank = tuple[Tensor, Tensor]  # inner [..., R], outer [V, R]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_logit_options(
    softcap: float | None, logit_scale: float, ignore_index: int, outputs: Sequence[str]
) -> frozenset[str]:
    """Refuse options out of their domain; return the names of the wanted outputs."""
    names = check_outputs(outputs)
    if softcap is not None:
        check_number("softcap", softcap, " or None")
        if not 0 < softcap < math.inf:
            raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    check_number("logit_scale", logit_scale)
    if not abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit int64, got {ignore_index}")
    return names


def check_outputs(outputs: Sequence[str], allowed: tuple[str, ...] = OUTPUTS) -> frozenset[str]:
    """Refuse what does not name outputs; return the names."""
    if not isinstance(outputs, list | tuple | set | frozenset):
        raise TypeError(f"outputs must be a sequence of names, got {type(outputs).__name__} {outputs!r}")
    for name in outputs:
        check_type("each of outputs", name, str)
        if name not in allowed:
            raise ValueError(f"outputs may name {allowed}, got {name!r}")
    return frozenset(outputs)


def check_logits_dtype(dtype: torch.dtype, logits_dtype: torch.dtype | None) -> None:
    check_type("logits_dtype", logits_dtype, torch.dtype, optional=True)
    allowed = {dtype, torch.promote_types(dtype, torch.float32)}
    if logits_dtype is not None and logits_dtype not in allowed:
        raise ValueError(f"logits_dtype must be None or one of {sorted(map(str, allowed))}, got {logits_dtype}")


def check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {dtype}")


def check_precision(name: str, dtype: torch.dtype, hidden: torch.dtype) -> None:
    """Refuse float64 beside another type: no GEMM serves it."""
    if (dtype == torch.float64) != (hidden == torch.float64):
        raise ValueError(
            f"{name} must be float64 beside float64 hidden states, and beside no others, got {dtype} beside {hidden}"
        )


def check_memory_budget(memory_budget: int | None) -> None:
    if isinstance(memory_budget, bool):
        raise TypeError("memory_budget must be an int, got a bool")
    check_type("memory_budget", memory_budget, int, optional=True)
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget must not be negative, got {memory_budget}")


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"expected all tensors on one device, got { ({n: str(d) for n, d in devices.items()}) }")


def check_target_dtype(targets: Tensor) -> None:
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")


def check_head_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    check_type("hidden", hidden, Tensor)
    check_type("weight", weight, Tensor)
    check_type("targets", targets, Tensor)
    check_type("bias", bias, Tensor, optional=True)
    if hidden.ndim < 1 or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"expected hidden [..., D] and targets [...], got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ValueError(f"expected weight [V, D] with D = {hidden.shape[-1]} and V >= 1, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [V] with V = {weight.shape[0]}, got {tuple(bias.shape)}")
    check_same_device(hidden=hidden, weight=weight, targets=targets, bias=bias)
    check_target_dtype(targets)


def check_low_rank(low_rank: LowRank | None, hidden: Tensor, weight: Tensor, name: str = "low_rank") -> None:
    """Refuse what is no low-rank part of this head's weight; and a weight that trains beside it."""
    if low_rank is None:
        return
    if not isinstance(low_rank, tuple) or len(low_rank) != 2:
        count = f" of {len(low_rank)}" if isinstance(low_rank, tuple) else ""
        raise TypeError(f"{name} must be a tuple (inner, outer) or None, got {type(low_rank).__name__}{count}")
    inner, outer = low_rank
    check_type(f"inner of {name}", inner, Tensor)
    check_type(f"outer of {name}", outer, Tensor)
    if inner.ndim != hidden.ndim or inner.shape[:-1] != hidden.shape[:-1] or inner.shape[-1] < 1:
        raise ValueError(
            f"expected inner of {name} [..., R] with the rows of hidden, {tuple(hidden.shape)}, and R >= 1, "
            f"got {tuple(inner.shape)}"
        )
    if outer.shape != (weight.shape[0], inner.shape[-1]):
        raise ValueError(
            f"expected outer of {name} [V, R] with V = {weight.shape[0]} and R = {inner.shape[-1]}, "
            f"got {tuple(outer.shape)}"
        )
    check_same_device(hidden=hidden, inner=inner, outer=outer)
    if torch.is_grad_enabled() and weight.requires_grad:
        raise NotImplementedError(
            f"{name} is for a weight that does not train, but the weight has requires_grad=True: no gradient of its "
            "size is made; detach it, or fold the product into it"
        )


def join_low_rank(hidden: Tensor, low_rank: LowRank | None) -> tuple[Tensor, Tensor | None]:
    """Hidden states with ``inner`` as columns behind their own, and ``outer``: the form in which operators take them.

    Both are filled up with zeros to a multiple of eight columns, so that rows lie where a GPU's GEMMs read them fast.
    """
    if low_rank is None:
        return hidden, None
    inner, outer = low_rank
    missing = -inner.shape[-1] % 8
    if missing:
        inner, outer = (torch.nn.functional.pad(x, (0, missing)) for x in low_rank)
    return torch.cat((hidden, inner), -1), outer


def head_of_one_type(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None, logits_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, LowRank | None]:
    """Hidden states, bias and low-rank part in the type in which the op computes; or refuse theirs or the weight's.

    That is the type of the hidden states, or under autocast, as ``torch.nn.functional.linear`` has it, autocast's for
    everything but float64. The weight stays as it is: it is converted slice by slice, where it is used, and its
    gradient, which may be wider, is not rounded on its way through a cast.
    """
    kind = hidden.device.type
    inner, outer = low_rank or (None, None)
    given = {"hidden": hidden, "weight": weight, "bias": bias, "inner": inner, "outer": outer}
    named = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in named.items():
        check_float(name, tensor.dtype)
    dtype, cast = hidden.dtype, torch.is_autocast_enabled(kind)
    if cast and not any(tensor.dtype == torch.float64 for name, tensor in named.items() if name != "bias"):
        dtype = torch.get_autocast_dtype(kind)
    else:
        for name, tensor in named.items():
            if name in ("inner", "outer") and tensor.dtype != dtype:
                raise ValueError(f"{name} must have the dtype of hidden, {dtype}, got {tensor.dtype}")
            check_precision(name, tensor.dtype, dtype)
    check_logits_dtype(dtype, logits_dtype)
    return (
        hidden.to(dtype),
        None if bias is None else bias.to(dtype),
        None if low_rank is None else (low_rank[0].to(dtype), low_rank[1].to(dtype)),
    )


def check_weight_grad_out(out: Tensor | None, weight: Tensor) -> None:
    check_type("weight_grad_out", out, Tensor, optional=True)
    if out is None:
        return
    if not weight.requires_grad:
        raise ValueError("weight_grad_out takes the weight's gradient, but the weight does not require one")
    if out.requires_grad:
        raise ValueError("weight_grad_out is a buffer that is written in place: it must not require a gradient")
    if not torch.compiler.is_compiling() and out.data_ptr() == weight.data_ptr():
        raise ValueError("weight_grad_out must not be the weight itself")
    D = weight.shape[1]
    if out.shape != weight.shape or out.stride(1) != 1 or out.stride(0) < D or out.device != weight.device:
        raise ValueError(
            f"expected weight_grad_out {tuple(weight.shape)} on {weight.device} with rows of unit stride apart, "
            f"got {tuple(out.shape)} on {out.device} with strides {out.stride()}"
        )
    if out.dtype not in (weight.dtype, torch.promote_types(weight.dtype, torch.float32)):
        raise ValueError(f"weight_grad_out must be float32 or {weight.dtype}, got {out.dtype}")


def row_temperature(temperature: float | Tensor, targets: Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """A number, and ``[T]`` temperatures in the accumulator's type where they differ by row."""
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, " or a tensor")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        return float(temperature), None
    if temperature.requires_grad:
        raise NotImplementedError("temperature is not differentiable here; detach it")
    if temperature.shape != targets.shape or not temperature.is_floating_point():
        raise ValueError(
            f"temperature must be a number or a float tensor shaped like targets, {tuple(targets.shape)}, "
            f"got {tuple(temperature.shape)} of {temperature.dtype}"
        )
    check_same_device(targets=targets, temperature=temperature)
    return 1.0, temperature.to(accumulator_dtype(like.dtype)).reshape(-1).contiguous()


def check_targets(targets: Tensor, vocab: int, ignore_index: int, temperature: Tensor | None) -> None:
    """Refuse values out of range, where looking at them costs no synchronisation or was asked for."""
    if not check_values(targets.device):
        return
    bad = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"targets must be in [0, {vocab}) or ignore_index {ignore_index}, got {int(targets[row])} at row {row}"
        )
    if temperature is None:
        return
    cold = ~((temperature > 0) & (temperature < math.inf)) & (targets != ignore_index)
    if bool(cold.any()):
        row = int(cold.nonzero()[0, 0])
        raise ValueError(f"temperature must be positive and finite, got {float(temperature[row])} at row {row}")


def stats_settings(
    temperature: float, softcap: float | None, logit_scale: float, ignore_index: int, names: frozenset[str]
) -> dict[str, Any]:
    """The fields of ``StatsSettings``."""
    return {
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
        "entropy": "entropy" in names,
        "logsumexp": "logsumexp" in names,
        "top1": "is_top1" in names,
        "mean": "mean_logits" in names,
        "squares": "log_sum_sq_probs" in names,
    }


def token_stats(values: Sequence[Tensor], names: frozenset[str], shape: torch.Size) -> TokenStats:
    """Statistics in the order of :class:`TokenStats`, None where not requested."""
    logps, *others = (value.view(shape) if value.shape[0] == shape.numel() else value for value in values)
    return TokenStats(logps, *(v if name in names else None for name, v in zip(OUTPUTS, others, strict=True)))
