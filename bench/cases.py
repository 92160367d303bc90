"""What is measured: every way to token log-probabilities and their gradients, on the same tensors."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

import prefcore


@dataclasses.dataclass(frozen=True)
class Shape:
    T: int  # rows
    D: int  # hidden size
    V: int  # vocabulary
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclasses.dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor  # gradient of each row's log-probability

    @classmethod
    def make(cls, shape: Shape, train_head: bool) -> Inputs:
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(shape.T, shape.D, generator=g)
        weight = torch.randn(shape.V, shape.D, generator=g) / shape.D**0.5
        targets = torch.randint(shape.V, (shape.T,), generator=g)
        upstream = torch.randn(shape.T, generator=g) / shape.T
        there = {"device": shape.device, "dtype": shape.dtype}
        return cls(
            hidden.to(**there).requires_grad_(),
            weight.to(**there).requires_grad_(train_head),
            targets.to(shape.device),
            upstream.to(shape.device),
        )


Logps = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One provider in one setting. ``floor`` counts the GEMMs [T, D] x [D, V] that nobody can do without."""

    provider: str
    schedule: str
    train_head: bool
    floor: int
    load: Callable[[], Logps]
    gradient: bool = True
    note: str = ""

    @property
    def name(self) -> str:
        head = "no gradient" if not self.gradient else "head trained" if self.train_head else "head frozen"
        return f"{self.provider} {self.schedule}".strip() + f", {head}"

    def step(self, logps: Logps, inputs: Inputs) -> Tensor:
        """Forward and, where the case has one, backward; returns the log-probabilities."""
        if not self.gradient:
            with torch.no_grad():
                return logps(inputs.hidden, inputs.weight, inputs.targets)
        inputs.hidden.grad = inputs.weight.grad = None
        out = logps(inputs.hidden, inputs.weight, inputs.targets)
        out.backward(inputs.upstream.to(out.dtype))
        return out.detach()


@dataclasses.dataclass(frozen=True)
class LossCase(Case):
    """The provider takes the loss as well, the sum of upstream gradients times log-probabilities."""

    def step(self, logps: Callable, inputs: Inputs) -> Tensor:
        inputs.hidden.grad = inputs.weight.grad = None
        out = logps(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            list(range(inputs.targets.shape[0] + 1)),
            lambda stats, tile: stats.logps * inputs.upstream[tile.tokens].to(stats.logps.dtype),
            normalizer=1,
        )
        out.loss.backward()
        return out.stats.logps


def _prefcore(schedule: str) -> Callable[[], Logps]:
    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return prefcore.linear_logprobs(hidden, weight, targets, schedule=schedule).logps

    return lambda: logps


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _compiled() -> Logps:
    return torch.compile(_eager, dynamic=False)


def _trl() -> Logps:
    if importlib.util.find_spec("trl") is None:
        raise LookupError("trl is not installed")
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK  # what its trainers use

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, ())[0]

    return logps


_TRL_NOTE = "on a CPU it runs its PyTorch fallback, not its Triton kernels"

CASES = [
    Case("prefcore", "forward", False, 1, _prefcore("forward"), gradient=False),
    Case("prefcore", "frozen", False, 2, _prefcore("frozen")),
    LossCase("prefcore", "loop", False, 2, lambda: prefcore.linear_loss),
    Case("PyTorch", "autograd", False, 2, lambda: _eager),
    Case("torch.compile", "", False, 2, _compiled),
    Case("TRL", "chunked", False, 2, _trl, note=_TRL_NOTE),
    Case("prefcore", "retain", True, 3, _prefcore("retain")),
    LossCase("prefcore", "loop", True, 3, lambda: prefcore.linear_loss),
    Case("prefcore", "recompute", True, 3, _prefcore("recompute")),
    Case("PyTorch", "autograd", True, 3, lambda: _eager),
    Case("torch.compile", "", True, 3, _compiled),
    Case("TRL", "chunked", True, 3, _trl, note=_TRL_NOTE),
]
