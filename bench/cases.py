"""What is measured: every op of the head, by every provider that can do the same job, on the same tensors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from bench.inputs import INPUTS, Inputs, Shape
from bench.providers import BUILDERS, Step

TITLES = {
    "prefcore": "prefcore",
    "pytorch": "PyTorch",
    "compile": "torch.compile",
    "trl": "TRL",
    "liger": "Liger-Kernel",
    "cce": "cut-cross-entropy",
}
OF_LOGITS = ("logprobs", "divergence")
HEADS = {"none": "no gradient", "frozen": "head frozen", "trained": "head trained"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One provider's way to one op. ``head`` says which gradients are computed."""

    op: str
    provider: str
    schedule: str = ""
    head: str = "trained"  # "none": no gradient at all; "frozen": the hidden states' (or logits') alone
    note: str = ""

    @property
    def key(self) -> str:
        return "/".join((self.op, self.provider, self.schedule, self.head))

    @property
    def name(self) -> str:
        gradient = "with gradient" if self.op in OF_LOGITS and self.head == "frozen" else HEADS[self.head]
        return f"{TITLES[self.provider]} {self.schedule}".strip() + f", {gradient}"

    @property
    def gemms(self) -> int:
        """The GEMMs ``[T, D] x [D, V]`` that nobody can do without."""
        if self.op in OF_LOGITS:
            return 0
        other = self.op == "linear_divergence"  # the logits of the other model, which gets no gradient
        return {"none": 1, "frozen": 2, "trained": 3}[self.head] + other

    def flops(self, shape: Shape) -> int:
        return self.gemms * 2 * shape.T * shape.D * shape.V

    def bytes(self, shape: Shape) -> int:
        """The least traffic: what is given is read once and what is returned is written once.

        Gradients of given logits cost a second read, since the gradient of the log-probs comes after the first.
        """
        size = shape.dtype.itemsize
        if self.op in OF_LOGITS:
            read = 1 if self.op == "logprobs" else 2
            return shape.T * shape.V * size * (read if self.head == "none" else 2 * read + 1)
        hidden, weight = shape.T * shape.D * size, shape.V * shape.D * size
        read = (hidden + weight) * (2 if self.op == "linear_divergence" else 1)
        return read + (hidden if self.head != "none" else 0) + (weight if self.head == "trained" else 0)

    def held(self, shape: Shape) -> int:
        """A rough upper estimate of the bytes held at once beside the inputs."""
        rows = shape.T + (shape.prompts if self.schedule == "all rows" else 0)
        if self.provider in ("pytorch", "compile"):
            # Logits, then in float32 the same, their log-softmax and its gradient.
            return rows * shape.V * (2 * shape.dtype.itemsize + 12) * (2 if "divergence" in self.op else 1)
        if self.op in OF_LOGITS:
            return shape.T * shape.V * 12
        if self.schedule == "retain":
            return rows * shape.V * shape.dtype.itemsize
        return rows * shape.D * 8 + shape.V * shape.D * 8 + min(rows, 4096) * min(shape.V, 32768) * 12

    def inputs(self, shape: Shape) -> Inputs:
        return INPUTS[self.op](shape, self.head)

    def build(self, inputs: Inputs) -> Step:
        """The step to be timed; raises LookupError with the reason where it cannot be taken."""
        return BUILDERS[self.op, self.provider](inputs, self.schedule)


_TRL = "on a CPU it runs its PyTorch fallback, not its Triton kernels"
_FILTER = "leaves out blocks of softmax values below eps / 32 from the gradients: of random inputs nearly all"
_CCE = {"filtered": _FILTER, "exact": "filter_eps=None"}
_CHUNKED = "a loop over pairs; not compiled on a CPU"
_LIGER_PAIRS = {
    "all rows": "prompt rows meet the head too; ",
    "response rows": "cut to the response rows beforehand, which takes responses of one length; ",
}


def _linear_logprobs() -> Iterator[Case]:
    yield Case("linear_logprobs", "prefcore", "forward", "none")
    for head in ("frozen", "trained"):
        schedules = ("auto", "frozen") if head == "frozen" else ("auto", "retain", "recompute")
        for schedule in schedules:
            yield Case("linear_logprobs", "prefcore", schedule, head)
        yield Case("linear_logprobs", "pytorch", "autograd", head)
        yield Case("linear_logprobs", "compile", "", head)
        yield Case("linear_logprobs", "trl", "chunked", head, _TRL)
        yield Case("linear_logprobs", "liger", "fused", head, "linear cross-entropy, reduction='none'")
        for schedule, note in _CCE.items():
            yield Case("linear_logprobs", "cce", schedule, head, f"reduction='none'; {note}")


def _linear_loss() -> Iterator[Case]:
    for head in ("frozen", "trained"):
        yield Case("linear_loss", "prefcore", "loop", head)
        yield Case("linear_loss", "pytorch", "autograd", head)
        yield Case("linear_loss", "trl", "chunked", head, _TRL)


def _cross_entropy() -> Iterator[Case]:
    for head in ("frozen", "trained"):
        yield Case("cross_entropy", "prefcore", "loop", head)
        yield Case("cross_entropy", "pytorch", "autograd", head, "F.cross_entropy of the logits")
        yield Case("cross_entropy", "compile", "", head, "F.cross_entropy of the logits")
        yield Case("cross_entropy", "trl", "chunked", head, _TRL)
        yield Case("cross_entropy", "liger", "fused", head, "accumulates the weight's gradient in its own type")
        for schedule, note in _CCE.items():
            yield Case("cross_entropy", "cce", schedule, head, note)


def _pairs(op: str) -> Iterator[Case]:
    for head in ("frozen", "trained"):
        yield Case(op, "prefcore", "loop", head)
        yield Case(op, "prefcore", "auto", head, "linear_logprobs, then the loss by autograd")
        for schedule in ("response rows", "all rows"):
            yield Case(op, "pytorch", schedule, head)
        yield Case(op, "compile", "response rows", head)
        yield Case(op, "trl", "chunked", head, f"response rows; {_TRL}")
        for schedule, note in _LIGER_PAIRS.items():
            if op == "orpo":
                yield Case(op, "liger", schedule, head, note + _CHUNKED)
                continue
            yield Case(op, "liger", schedule, head, f"{note}computes the reference's logits as well; {_CHUNKED}")
            if schedule == "response rows":
                free = f"{note}another loss, with a reference of 0: what it would cost to be given one; {_CHUNKED}"
                yield Case(op, "liger", "response rows, no reference", head, free)


def _grpo() -> Iterator[Case]:
    for head in ("frozen", "trained"):
        yield Case("grpo", "prefcore", "loop", head)
        yield Case("grpo", "prefcore", "auto", head, "linear_logprobs, then the loss by autograd")
        yield Case("grpo", "pytorch", "autograd", head)
        yield Case("grpo", "compile", "", head)
        yield Case("grpo", "trl", "chunked", head, _TRL)
        yield Case("grpo", "liger", "fused", head, "a loop over sequences; its loss is not compiled on a CPU")


def _linear_divergence() -> Iterator[Case]:
    for head in ("frozen", "trained"):
        for schedule in ("auto", "retain", "recompute"):
            yield Case("linear_divergence", "prefcore", schedule, head)
        yield Case("linear_divergence", "pytorch", "autograd", head)
        yield Case("linear_divergence", "compile", "", head)
        yield Case("linear_divergence", "trl", "chunked", head, _TRL)
        yield Case("linear_divergence", "liger", "fused", head)
        yield Case("linear_divergence", "liger", "chunked", head, "in the type of the logits; not compiled on a CPU")


def _logprobs() -> Iterator[Case]:
    for head in ("none", "frozen"):
        yield Case("logprobs", "prefcore", "", head)
        yield Case("logprobs", "pytorch", "", head)
        yield Case("logprobs", "compile", "", head)
        yield Case("logprobs", "trl", "", head, "computes the entropy as well; on a CPU one row after another")


def _divergence() -> Iterator[Case]:
    for head in ("none", "frozen"):
        for provider in ("prefcore", "pytorch", "compile"):
            yield Case("divergence", provider, "", head)


CASES = {
    case.key: case
    for case in itertools.chain(
        _linear_logprobs(), _linear_loss(), _cross_entropy(), _pairs("dpo"), _pairs("orpo"), _grpo(),
        _linear_divergence(), _logprobs(), _divergence(),
    )
}  # fmt: skip
OPS = tuple(dict.fromkeys(case.op for case in CASES.values()))
