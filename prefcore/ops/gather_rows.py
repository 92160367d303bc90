"""Copies of rows by an index, and the gradient: for each row, the sum over the places it was copied to."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefcore import _native, reference
from prefcore._impl import Impl, resolve
from prefcore.ops import _checks
from prefcore.ops._arguments import check_float
from prefcore.ops._register import register_ragged


class RowInverse(NamedTuple):
    """Where each of N rows went: row n to ``places[offsets[n] : offsets[n + 1]]``, in rising order."""

    offsets: Tensor  #: ``[N + 1]`` int32; the first is the number of places without a row
    places: Tensor  #: ``[M]`` int32, those without a row first


def gather_rows(x: Tensor, index: Tensor, *, inverse: RowInverse | None = None, impl: Impl = "auto") -> Tensor:
    """Copy rows of ``x`` to the places of ``index``, with one pass over memory in each direction.

    Equal to ``where(index[:, None] < 0, 0, x[index.clamp(min=0)])`` for a matrix ``x``. The gradient of row n is the
    sum of the upstream gradient's rows at the places where ``index`` is n, in rising order, in float32 (float64 for
    float64), rounded once: the same bits in every run, on any number of threads, on the CPU and on a GPU. Rows that
    nobody gathers get exact zeros.

    Args:
        x: ``[N, ...]`` float32, float64, bfloat16 or float16. Rows that are dense but apart, such as a column slice
            of a matrix, are read where they lie.
        index: ``[M]`` int32 on ``x``'s device: a row of ``x`` for each place, or -1 for a row of zeros.
        inverse: ``invert_rows(index, N)``, which the backward otherwise computes itself. Give it where one index
            serves several calls.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"``.

    Returns:
        ``[M, ...]`` in ``x``'s dtype, contiguous; differentiable once, with respect to ``x``.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: shapes, dtypes, devices or values other than these. The values of ``index`` and ``inverse`` on a
            GPU are checked where ``PREFCORE_CHECK=1`` is in the environment. Unchecked, an index out of range gives a
            row of NaN, whose gradient goes nowhere; with an inverse of another index the gradient is undefined.
        NotImplementedError: a DTensor, or an implementation that this installation lacks.

    Example:
        >>> import torch, prefcore
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> prefcore.gather_rows(x, torch.tensor([1, -1, 1], dtype=torch.int32)).tolist()
        [[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]]
    """
    _check(x, index, inverse)
    chosen = resolve(impl, "gather_rows", x.device)
    offsets, places = (None, None) if inverse is None else inverse
    if chosen == "reference":
        if not torch.compiler.is_compiling():
            _check_values(index, offsets, places, x.shape[0])
        return reference.gather_rows(x, index)
    return _GatherRows.apply(x, index, offsets, places, chosen)


def invert_rows(index: Tensor, rows: int) -> RowInverse:
    """Find where each of ``rows`` rows goes when ``index`` gathers them.

    Equal to ``RowInverse(searchsorted(index.sort().values, arange(rows + 1)), index.argsort(stable=True))``. Runs on
    any device and does not synchronise with a GPU. Entries outside ``[0, rows)`` are places of no row.

    Args:
        index: ``[M]`` int32, as :func:`gather_rows` takes it.
        rows: the number N of rows that are gathered from.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: another shape or dtype, or negative ``rows``.

    Example:
        >>> import torch, prefcore
        >>> inverse = prefcore.invert_rows(torch.tensor([1, -1, 1], dtype=torch.int32), 2)
        >>> inverse.offsets.tolist(), inverse.places.tolist()
        ([1, 1, 3], [1, 0, 2])
    """
    _check_index(index)
    if isinstance(rows, bool):
        raise TypeError("rows must be an int, got a bool")
    _checks.check_type("rows", rows, int)
    if rows < 0:
        raise ValueError(f"rows must not be negative, got {rows}")
    return _invert(index, rows)


def _invert(index: Tensor, rows: int) -> RowInverse:
    sorted_index, places = index.sort(stable=True)
    return RowInverse(_starts(sorted_index, rows), places.to(torch.int32))


def _starts(sorted_index: Tensor, rows: int) -> Tensor:
    numbers = torch.arange(rows + 1, dtype=torch.int32, device=sorted_index.device)
    return torch.searchsorted(sorted_index, numbers, out_int32=True)


def _check_index(index: Tensor) -> None:
    _checks.check_tensor("index", index)
    if index.dim() != 1:
        raise ValueError(f"index must have shape [M], got {list(index.shape)}")
    if index.dtype != torch.int32:
        raise ValueError(f"index must be int32, got {index.dtype}")


def _check(x: Tensor, index: Tensor, inverse: RowInverse | None) -> None:
    _checks.check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x must have shape [N, ...], got []")
    check_float("x", x.dtype)
    _check_index(index)
    if index.device != x.device:
        raise ValueError(f"index must be on x's device {x.device}, got {index.device}")
    _checks.check_type("inverse", inverse, RowInverse, optional=True)
    if inverse is None:
        return
    for name, field, size in zip(inverse._fields, inverse, (x.shape[0] + 1, index.shape[0]), strict=True):
        name = f"inverse.{name}"
        _checks.check_tensor(name, field)
        if field.dtype != torch.int32 or field.dim() != 1 or field.shape[0] != size:
            raise ValueError(f"{name} must be int32 of shape [{size}], got {field.dtype} of {list(field.shape)}")
        if field.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {field.device}")


def _check_range(name: str, values: Tensor, first: int, end: int) -> None:
    bad = (values < first) | (values >= end)
    if bool(bad.any()):
        at = int(bad.to(torch.int32).argmax())
        raise ValueError(f"{name} must be in [{first}, {end}), got {int(values[at])} at {at}")


def _check_values(index: Tensor, offsets: Tensor | None, places: Tensor | None, rows: int) -> None:
    if not _checks.check_values(index.device):
        return
    _check_range("index", index, -1, rows)
    if offsets is None or places is None:
        return
    _check_range("inverse.places", places, 0, index.shape[0])
    # Rising pairs of row and place name every place once.
    sorted_index = index[places]
    step = sorted_index.diff()
    rising = (step > 0) | ((step == 0) & (places.diff() > 0))
    if not (bool(rising.all()) and torch.equal(offsets, _starts(sorted_index, rows))):
        raise ValueError("inverse must be invert_rows(index, rows of x), got another's")


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, offsets: Tensor | None, places: Tensor | None, impl: str) -> Tensor:
        if offsets is None or places is None:
            ctx.save_for_backward(index)
        else:
            ctx.save_for_backward(index, offsets, places)
        ctx.rows, ctx.impl = x.shape[0], impl
        return _FORWARD[impl](x, index, offsets, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, *inverse = ctx.saved_tensors
        offsets, places = inverse or _invert(index, ctx.rows)
        return _BACKWARD[ctx.impl](grad, offsets, places), None, None, None, None


def _forward_fake(x: Tensor, index: Tensor, offsets: Tensor | None, places: Tensor | None) -> Tensor:
    return x.new_empty(index.shape[0], *x.shape[1:])


def _backward_fake(grad: Tensor, offsets: Tensor, places: Tensor) -> Tensor:
    return grad.new_empty(offsets.shape[0] - 1, *grad.shape[1:])


def _with_dense_rows(x: Tensor) -> Tensor:
    """``x`` where each row is dense, whatever lies between rows; else a copy."""
    dense = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != dense:
            return x.contiguous()
        dense *= size
    return x


def _where(x: Tensor) -> tuple[int, ...]:
    if x.device.type == "cuda":
        return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream
    return (torch.get_num_threads(),)


def _launch_forward(x: Tensor, index: Tensor, offsets: Tensor | None, places: Tensor | None) -> Tensor:
    _check_values(index, offsets, places, x.shape[0])
    extension = _native.require()
    x, index = _with_dense_rows(x), index.contiguous()
    out = _forward_fake(x, index, offsets, places)
    size = x.element_size()
    gather = extension.Gather(
        x.data_ptr(),
        x.stride(0) * size,
        x.shape[0],
        index.data_ptr(),
        index.shape[0],
        math.prod(x.shape[1:]) * size,
        out.data_ptr(),
    )
    getattr(extension, f"gather_rows_forward_{x.device.type}")(gather, *_where(x))
    return out


def _launch_backward(grad: Tensor, offsets: Tensor, places: Tensor) -> Tensor:
    extension = _native.require()
    grad, offsets, places = _with_dense_rows(grad), offsets.contiguous(), places.contiguous()
    out = _backward_fake(grad, offsets, places)
    gather = extension.GatherGrad(
        _native.TYPE_CODES[grad.dtype],
        grad.data_ptr(),
        grad.stride(0),
        offsets.data_ptr(),
        places.data_ptr(),
        offsets.shape[0] - 1,
        math.prod(grad.shape[1:]),
        out.data_ptr(),
    )
    getattr(extension, f"gather_rows_backward_{grad.device.type}")(gather, *_where(grad))
    return out


_FORWARD = register_ragged(
    "gather_rows_forward",
    "(Tensor x, Tensor index, Tensor? offsets, Tensor? places) -> Tensor",
    _launch_forward,
    _forward_fake,
)
_BACKWARD = register_ragged(
    "gather_rows_backward",
    "(Tensor grad, Tensor offsets, Tensor places) -> Tensor",
    _launch_backward,
    _backward_fake,
)
