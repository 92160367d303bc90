"""The back ends of the row kernels, imported when first launched."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from prefcore._impl import interpreting


def _cpu() -> ModuleType:
    from prefcore.ops import _rows_cpu

    return _rows_cpu


def _cpu_pairs() -> ModuleType:
    from prefcore.ops import _pair_rows_cpu

    return _pair_rows_cpu


def _triton() -> ModuleType:
    from prefcore.kernels import logprobs

    return logprobs


def _triton_pairs() -> ModuleType:
    from prefcore.kernels import divergence

    return divergence


class Backend(NamedTuple):
    """The row kernels over tiles of logits."""

    load: Callable[[], ModuleType]  # of one distribution: ``stats``, ``weigh``, ``grad`` and ``stats_grad``
    load_pairs: Callable[[], ModuleType]  # of two: ``stats``, ``sums`` and ``grad``
    key: str  # dispatch key of the tensors they take


BACKENDS = {
    "cpu": Backend(_cpu, _cpu_pairs, "CPU"),
    "triton": Backend(_triton, _triton_pairs, "CPU" if interpreting() else "CUDA"),
}
