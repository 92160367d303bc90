"""Row kernels over the tiles of two distributions, on the CPU (``csrc/cpu/divergence*``).

What is summed up and written is told by :data:`~prefcore.ops._spec.CROSS_ROWS` and
:class:`~prefcore.ops._spec.Coef`; tiles, targets, temperatures, biases, states and ignored rows are as in
:mod:`prefcore.ops._rows_cpu`, and results do not depend on the number of threads here either. Both tiles are of
one type and shape; each has a row stride of its own.

Where one probability is 0 its terms are 0, whatever the other side. ``cross`` ``[CROSS_ROWS, R]`` is acc, with
unit stride along R, 0 to begin with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefcore import _native
from prefcore.ops._rows_cpu import _check, _describe, _level
from prefcore.ops._spec import CROSS_ROWS, Coef, PairSpec, Row, Side


def stats(p: Side, q: Side, col0: int, targets: Tensor, pair: PairSpec, cross: Tensor) -> None:
    """Add the tiles to both states and to ``cross[0]``, in one pass: ``kl`` and ``alpha``."""
    if pair.needs_totals:
        raise ValueError(f"{pair.kind} has no running sums")
    _add("divergence_stats", p, q, col0, targets, pair, cross, len(Row))


def sums(p: Side, q: Side, col0: int, targets: Tensor, pair: PairSpec, cross: Tensor) -> None:
    """Add the tiles to ``cross``, given final states (rows up to ``Row.TARGET``): ``js`` and ``tv``."""
    if not pair.needs_totals:
        raise ValueError(f"the sums of {pair.kind} are those of stats")
    _add("divergence_sums", p, q, col0, targets, pair, cross, Row.TARGET + 1)


def grad(
    p: Side,
    q: Side,
    p_out: Tensor | None,
    q_out: Tensor | None,
    col0: int,
    targets: Tensor,
    pair: PairSpec,
    p_coef: Tensor | None,
    q_coef: Tensor | None,
) -> None:
    """``out = dz/dx * dL/dz`` of the sides that have one, from final states (rows up to ``Row.TARGET``).

    ``coef`` ``[len(Coef), R]`` is acc, with unit stride along R. An ``out`` may be its own side's tile.
    """
    described, _keep = _describe_pair(p, q, p_out, q_out, col0, targets, Row.TARGET + 1)
    places: list[int] = []
    for name, out, coef in (("p_coef", p_out, p_coef), ("q_coef", q_out, q_coef)):
        if out is None:
            places += 0, 0
            continue
        if coef is None:
            raise ValueError(f"{name} is missing for a gradient that is asked for")
        _check(name, coef, p.state.dtype, (len(Coef), p.tile.shape[0]))
        places += coef.data_ptr(), coef.stride(0)
    _native.require().divergence_grad(*described, *_kind(pair), *places, _level(), torch.get_num_threads())


def _add(name: str, p: Side, q: Side, col0: int, targets: Tensor, pair: PairSpec, cross: Tensor, known: int) -> None:
    described, _keep = _describe_pair(p, q, None, None, col0, targets, known)
    _check("cross", cross, p.state.dtype, (CROSS_ROWS, p.tile.shape[0]))
    kernel = getattr(_native.require(), name)
    kernel(*described, *_kind(pair), cross.data_ptr(), cross.stride(0), _level(), torch.get_num_threads())


def _kind(pair: PairSpec) -> tuple[Any, float]:
    return getattr(_native.require().Divergence, pair.kind), pair.weight


def _describe_pair(
    p: Side, q: Side, p_out: Tensor | None, q_out: Tensor | None, col0: int, targets: Tensor, known: int
) -> tuple[list[Any], list[Tensor | None]]:
    """Both sides for the extension; the second result must outlive the call."""
    if (q.tile.dtype, q.tile.shape) != (p.tile.dtype, p.tile.shape):
        raise ValueError(
            f"the tiles must be alike, got {p.tile.dtype} {tuple(p.tile.shape)} and "
            f"{q.tile.dtype} {tuple(q.tile.shape)}"
        )
    described = [
        _describe(side.tile, out, col0, targets, side.temperature, side.bias, side.spec, side.state, known)
        for side, out in ((p, p_out), (q, q_out))
    ]
    return [rows for rows, _ in described], [bias for _, bias in described]
