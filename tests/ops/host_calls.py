"""Call the head as on a GPU, without one: on a device that knows shapes and types, but holds no values.

It stands in for CUDA where the host decides (``Tensor.is_cuda`` included). Prints the cases that ran and what went
wrong in them. A process of its own, since a device cannot be unregistered.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import prefcore
from prefcore import _impl
from prefcore.ops import _backends, _walk
from prefcore.ops._walk import HeadSettings, Into, Needs

DEVICE = "elsewhere"
T, D, V = 300, 16, 3000
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALL = ("entropy", "logsumexp", "top1", "mean", "squares")


class Waits(Exception):
    pass


class Watch(TorchDispatchMode):
    """Refuses what would wait for the device: to read its values, and to copy from memory that is not pinned."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            target, source = (args[0].device, args[1]) if name == "copy_" else (kwargs.get("device"), args[0])
            elsewhere = target is not None and torch.device(target).type != source.device.type
            if elsewhere and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                raise Waits(f"{name} from {source.device.type} to {target}")
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Waits(f"{func} reads values") from error


def strict(name: str) -> Callable:
    """``torch.mm`` or ``addmm``, of which torch has a variant with ``out_dtype`` for CUDA alone, and no fake of it."""
    original = getattr(torch, name)

    def product(*arguments, out_dtype=None, out=None):
        if out_dtype is None:
            return original(*arguments, **({} if out is None else {"out": out}))
        *before, a, b = arguments
        assert a.dtype == b.dtype
        assert a.dtype in (torch.bfloat16, torch.float16)
        assert out_dtype == out.dtype == torch.float32
        assert all(x is out for x in before), "another tensor would be copied into out"
        assert out.device == a.device == b.device
        assert out.shape == (a.shape[0], b.shape[1])
        assert a.shape[1] == b.shape[0]
        return out

    return product


def kernel(*arguments) -> None:
    assert {x.device.type for x in arguments if isinstance(x, torch.Tensor)} == {DEVICE}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def head(
    schedule: str, dtype: torch.dtype, every: bool, *, drop_zero_rows: bool = False,
    logits: torch.dtype | None = None, rank: int = 0,
) -> None:  # fmt: skip
    chosen = HeadSettings(
        temperature=1.0, softcap=None, logit_scale=1.0, ignore_index=-100, logits_dtype=logits, schedule=schedule,
        memory_budget=1 << 20, replan=True, **dict.fromkeys(ALL, every),
    )  # fmt: skip
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = (
        *(empty(T, D + rank, dtype=dtype), empty(V, D, dtype=dtype), empty(T, dtype=torch.int64)),
        *(empty(V, dtype=dtype), empty(T, dtype=wide)),
        empty(V, rank, dtype=dtype) if rank else None,
    )
    stats, saved = _walk.forward(KERNELS, *inputs, chosen)
    assert stats.logps.device.type == DEVICE
    train = schedule != "frozen"
    for entropy in (None, empty(T, dtype=wide)) if every else (None,):
        for out in (None, empty(V, D), empty(V, D, dtype=dtype)) if train and not rank else (None,):
            if schedule == "forward" or (out is not None and out.dtype not in (dtype, wide)):
                continue
            found, *_ = _walk.backward(
                KERNELS, (empty(T, dtype=wide), entropy, None), *inputs, stats.entropy, saved,
                Needs(True, train, train, rank > 0), drop_zero_rows, Into(out), chosen,
            )  # fmt: skip
            assert found.shape == (T, D + rank)
            assert found.dtype == dtype


def loss(dtype: torch.dtype, train: bool, entropy: bool, promise: float | str | None) -> None:
    known = empty() if promise == "there" else promise
    hidden = empty(T, D, dtype=dtype).requires_grad_()
    weight, bias = (empty(*shape, dtype=dtype).requires_grad_(train) for shape in ((V, D), (V,)))
    constants = empty(T // 10)

    def loss_fn(stats, tile):
        assert tile.cu_seqlens.device.type == tile.cu_groups.device.type == DEVICE
        each = stats.logps + stats.entropy if entropy else stats.logps
        return each.view(-1, 10).sum(1) * constants[tile.sequences]

    for out in (None, empty(V, D, dtype=torch.promote_types(dtype, torch.float32))) if train else (None,):
        found = prefcore.linear_loss(
            hidden, weight, empty(T, dtype=torch.int64), list(range(0, T + 1, 10)), loss_fn, bias=bias,
            outputs=("entropy",) if entropy else (), memory_budget=200 * V * 4, weight_grad_out=out,
            grad_scale=known, normalizer=3.0, impl="triton", cu_groups=list(range(0, T // 10 + 1, 2)),
        )  # fmt: skip
        assert found.loss.device.type == DEVICE
        found.loss.backward()
        assert hidden.grad.dtype == dtype


def waits(call: Callable[[], object]) -> None:
    try:
        call()
    except Waits:
        return
    raise AssertionError("it did not wait, or nobody saw it")


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {
        "the watch sees an item": lambda: waits(lambda: empty(3).sum().item()),
        "the watch sees a mask": lambda: waits(lambda: empty(3)[empty(3) > 0]),
        "the watch sees a copy there": lambda: waits(lambda: torch.zeros(3).to(DEVICE)),
        "the watch sees a copy back": lambda: waits(lambda: empty(3).cpu()),
        "the watch sees a copy into": lambda: waits(lambda: empty(3).copy_(torch.zeros(3))),
        "drop_zero_rows": lambda: waits(lambda: head("retain", torch.float32, False, drop_zero_rows=True)),
        "wide logits": lambda: head("retain", torch.bfloat16, False, logits=torch.float32),
    }
    for schedule, dtype, every in itertools.product(("forward", "frozen", "retain", "recompute"), DTYPES, (0, 1)):
        found[f"head {schedule} {dtype} {every}"] = lambda s=schedule, d=dtype, e=every: head(s, d, bool(e))
    for schedule, wide in itertools.product(("frozen", "retain", "recompute"), (None, torch.float32)):
        found[f"low rank {schedule} {wide}"] = lambda s=schedule, w=wide: head(
            s, torch.bfloat16, True, logits=w, rank=8
        )  # fmt: skip
    for dtype, train, entropy, promise in itertools.product(DTYPES, (0, 1), (0, 1), (None, 2.0, "there")):
        arguments = dtype, bool(train), bool(entropy), promise
        found[f"loss {' '.join(map(str, arguments))}"] = lambda a=arguments: loss(*a)
    return found


def main() -> None:
    _setup_privateuseone_for_python_backend(DEVICE)
    getattr(torch, DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    FakeTensor.is_cuda = property(lambda self: self.device.type == DEVICE)
    FakeTensor.data_ptr = lambda self: id(self)  # no two tensors are found to be one
    torch.cuda.is_current_stream_capturing = lambda: False
    for name in ("mm", "addmm"):
        setattr(torch, name, strict(name))
    _backends.BACKENDS["triton"] = _backends.BACKENDS["triton"]._replace(load=lambda: KERNELS)
    _impl.IMPLEMENTATIONS["linear_loss"][DEVICE] = "triton"
    # Offsets that the host holds have no values here either.
    sys.modules["prefcore.ops.linear_loss"].check_offset_values = lambda *arguments: None
    wrong = {}
    ran = cases()
    for name, case in ran.items():
        with FakeTensorMode(allow_non_fake_inputs=True), Watch():
            try:
                case()
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)
                place = next((frame for frame in reversed(where) if "prefcore" in frame.filename), where[-1])
                wrong[name] = f"{place.filename}:{place.lineno}: {type(error).__name__}: {error}"
    json.dump({"ran": list(ran), "wrong": wrong}, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # the device's thread of autograd does not end by itself


KERNELS = SimpleNamespace(stats=kernel, weigh=kernel, grad=kernel, stats_grad=kernel)

if __name__ == "__main__":
    main()
