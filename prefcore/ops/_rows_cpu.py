"""Row kernels over one tile of raw logits, on the CPU (``csrc/cpu/logprobs*``).

A tile ``x`` ``[R, C]`` holds columns ``[col0, col0 + C)`` of the vocabulary, in float32, bfloat16, float16 or
float64; ``z`` is what :class:`prefcore.ops._spec.LogitSpec` makes of it. Sums are float32, or float64 for a
float64 tile ("acc" below). Arguments of the four functions:

- ``tile``, ``out`` ``[R, C]``: unit stride along C, any row stride. ``out`` may be ``tile`` itself; it has
  the tile's type, or bfloat16 or float16 beside a float32 tile.
- ``targets`` ``[R]`` int64. Rows at ``spec.ignore_index`` leave the state alone and give zeros; a target
  outside the vocabulary makes ``Row.TARGET`` and the row's gradient NaN.
- ``temperature`` ``[R]`` acc, or None for ``spec.temperature``.
- ``bias`` ``[C]`` of any of the types, or None.
- ``state`` ``[len(Row), R]`` acc, unit stride along R: 0 to begin with, ``Row.PEAK`` and ``Row.BEFORE`` -inf.

Each row is one thread's work, so results do not depend on the number of threads, which is torch's.
``PREFCORE_CPU_ISA`` in the environment names an instruction set to use instead of the best one.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from prefcore import _native
from prefcore.ops._spec import LogitSpec, Row


def stats(
    tile: torch.Tensor,
    col0: int,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: LogitSpec,
    state: torch.Tensor,
) -> None:
    """Add a tile to the state, in one pass over it."""
    rows, _keep = _describe(tile, None, col0, targets, temperature, bias, spec, state)
    _native.require().logprobs_stats(rows, _level(), torch.get_num_threads())


def weigh(
    tile: torch.Tensor,
    out: torch.Tensor,
    col0: int,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: LogitSpec,
    state: torch.Tensor,
    acc: torch.Tensor | None,
) -> None:
    """As :func:`stats`, and ``out = exp(z - PEAK) * d``.

    PEAK is the one after this tile; d is the softcap's slope ``1 - tanh²``, 1 without a softcap. Rows of
    ``acc`` ``[R, D]`` (acc type, unit stride along D) are multiplied by ``exp(PEAK before - PEAK after)``.
    """
    rows, _keep = _describe(tile, out, col0, targets, temperature, bias, spec, state)
    pointer, columns, stride = 0, 0, 0
    if acc is not None:
        _check("acc", acc, state.dtype, (tile.shape[0], None))
        pointer, columns, stride = acc.data_ptr(), acc.shape[1], acc.stride(0)
    _native.require().logprobs_weigh(rows, pointer, columns, stride, _level(), torch.get_num_threads())


def grad(
    tile: torch.Tensor,
    out: torch.Tensor,
    col0: int,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: LogitSpec,
    state: torch.Tensor,
    entropy: torch.Tensor | None,
    coef: torch.Tensor | None,
) -> None:
    """``out = dz/dx * (a * onehot(target) - b * p - c * p * (log p + H))``, from the final state.

    ``coef`` ``[3, R]`` (acc type, unit stride along R) holds a, b, c; None is a = b = 1, c = 0. ``entropy``
    ``[R]`` (acc type) is H; without it there is no entropy term, whatever c.
    """
    # Of the state only what comes first is read: PEAK, TOTAL and TARGET.
    rows, _keep = _describe(tile, out, col0, targets, temperature, bias, spec, state, known=Row.TARGET + 1)
    entropies, pointer, stride = 0, 0, 0
    if coef is not None:
        _check("coef", coef, state.dtype, (3, tile.shape[0]))
        pointer, stride = coef.data_ptr(), coef.stride(0)
        if entropy is not None:
            _check("entropy", entropy, state.dtype, (tile.shape[0],))
            entropies = entropy.data_ptr()
    _native.require().logprobs_grad(rows, entropies, pointer, stride, _level(), torch.get_num_threads())


def stats_grad(
    tile: torch.Tensor,
    out: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: LogitSpec,
    state: torch.Tensor,
) -> None:
    """:func:`stats`, then :func:`grad` without coefficients, of whole rows, in one pass over memory."""
    rows, _keep = _describe(tile, out, 0, targets, temperature, bias, spec, state)
    _native.require().logprobs_stats_grad(rows, _level(), torch.get_num_threads())


@functools.cache
def _level() -> int:
    """Which of the machine's instruction sets to use, counted from the slowest."""
    names = _native.require().cpu_isa_names()
    wanted = os.environ.get("PREFCORE_CPU_ISA")
    if wanted is None:
        return len(names) - 1
    if wanted not in names:
        raise ValueError(f"PREFCORE_CPU_ISA must be one of {names} on this machine, got {wanted!r}")
    return names.index(wanted)


def _describe(
    tile: torch.Tensor,
    out: torch.Tensor | None,
    col0: int,
    targets: torch.Tensor,
    temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: LogitSpec,
    state: torch.Tensor,
    known: int = len(Row),
) -> tuple[Any, torch.Tensor | None]:
    """Check the arguments and describe them to the extension; the second result must outlive the call."""
    code = _native.TYPE_CODES.get(tile.dtype)
    if code is None:
        raise ValueError(f"tile must be one of {list(_native.TYPE_CODES)}, got {tile.dtype}")
    acc = torch.float64 if tile.dtype == torch.float64 else torch.float32
    _check("tile", tile, tile.dtype, (None, None))
    rows, columns = tile.shape
    _check("targets", targets, torch.int64, (rows,))
    _check("state", state, acc, (None, rows))
    if state.shape[0] < known:
        raise ValueError(f"state must have at least {known} rows, got {state.shape[0]}")
    out_pointer, out_stride, out_code = 0, 0, code
    if out is not None:
        narrowed = tile.dtype == torch.float32 and out.dtype in (torch.bfloat16, torch.float16)
        _check("out", out, out.dtype if narrowed else tile.dtype, (rows, columns))
        out_pointer, out_stride, out_code = out.data_ptr(), out.stride(0), _native.TYPE_CODES[out.dtype]
    if temperature is not None:
        _check("temperature", temperature, acc, (rows,))
    if bias is not None:
        bias = bias.to(acc)
        _check("bias", bias, acc, (columns,))
    return _native.require().LogitRows(
        tile.data_ptr(),
        tile.stride(0),
        code,
        out_pointer,
        out_stride,
        out_code,
        rows,
        columns,
        col0,
        targets.data_ptr(),
        0 if temperature is None else temperature.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        state.data_ptr(),
        state.stride(0),
        spec.vocab,
        spec.ignore_index,
        spec.logit_scale,
        spec.temperature,
        0.0 if spec.softcap is None else spec.softcap,
        code if spec.round_to is None else _native.TYPE_CODES[spec.round_to],
        spec.entropy,
        spec.mean,
        spec.squares,
        spec.top1,
    ), bias


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Refuse what the kernels would misread; None in ``shape`` is any size."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} on the CPU, got {tensor.dtype} on {tensor.device}")
    if tensor.dim() != len(shape) or any(
        want is not None and want != size for want, size in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tensor.stride()}")
