"""Who computes an op, and how it is asked: adapters to prefcore and its peers, each called as its own trainers do.

A builder takes the inputs of an op and the name of a schedule and returns the step that is timed: forward and, unless
no gradient is wanted, backward. It raises LookupError with the reason where the provider cannot do the job.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import prefcore
from bench.inputs import (
    BETA,
    CLIP,
    GRPO,
    KL,
    ORPO,
    CrossEntropy,
    Divergence,
    Inputs,
    LogitPairs,
    Logits,
    Pairs,
    Sequences,
    capped,
    divergences,
)

# The versions that the adapters below were written for.
VERSIONS = {"trl": "1.16", "liger-kernel": "0.8.5", "cut-cross-entropy": "25.1.1"}


class Result(NamedTuple):
    """Detached: the values of the rows (log-probs, or divergences), and the loss; None where the provider has none."""

    rows: Tensor | None = None
    loss: Tensor | None = None


Step = Callable[[], Result]
Logps = Callable[[Tensor, Tensor, Tensor], Tensor]


def require(package: str) -> None:
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise LookupError(f"{package} is not installed") from None
    if not f"{found}.".startswith(f"{VERSIONS[package]}."):
        raise LookupError(f"{package} is {found}, not {VERSIONS[package]}")


def need_cuda(inputs: Inputs) -> None:
    if inputs.shape.device != "cuda":
        raise LookupError("needs a CUDA device")


def refuse_softcap(inputs: Inputs, what: str) -> None:
    if inputs.shape.softcap is not None:
        raise LookupError(f"{what} has no softcap")


# Token log-probabilities [T] of hidden states, weight and targets, differentiable.


def prefcore_logps(inputs: Inputs, schedule: str) -> Logps:
    softcap = inputs.shape.softcap

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return prefcore.linear_logprobs(hidden, weight, targets, schedule=schedule, softcap=softcap).logps

    return logps


def eager_logps(inputs: Inputs, schedule: str) -> Logps:
    softcap = inputs.shape.softcap

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return eager_of_logits(capped(F.linear(hidden, weight), softcap), targets)

    return logps


def eager_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def trl_logps(inputs: Inputs, schedule: str) -> Logps:
    require("trl")
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK  # what its trainers use

    softcap = inputs.shape.softcap

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, softcap, 1.0, ())[0]

    return logps


def liger_logps(inputs: Inputs, schedule: str) -> Logps:
    require("liger-kernel")
    need_cuda(inputs)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    softcap = inputs.shape.softcap

    def logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none", softcap=softcap)

    return logps


def cce_nll(inputs: Inputs, schedule: str, reduction: str) -> Logps:
    require("cut-cross-entropy")
    need_cuda(inputs)
    if inputs.shape.dtype == torch.float32:
        raise LookupError("cut-cross-entropy is for 16-bit inputs")
    from cut_cross_entropy import linear_cross_entropy

    options = {"softcap": inputs.shape.softcap, "reduction": reduction, "impl": "cce"}
    if schedule == "exact":
        options["filter_eps"] = None

    def nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, **options)

    return nll


def cce_logps(inputs: Inputs, schedule: str) -> Logps:
    nll = cce_nll(inputs, schedule, "none")
    return lambda hidden, weight, targets: -nll(hidden, weight, targets)


# Steps from them.


def from_logps(load: Callable[[Inputs, str], Logps]) -> Callable[[Inputs, str], Step]:
    """The op's rows alone: the backward starts from the gradient of the log-probabilities."""

    def build(inputs: Inputs, schedule: str) -> Step:
        logps = load(inputs, schedule)

        def step() -> Result:
            inputs.clear()
            with torch.set_grad_enabled(inputs.gradient):
                rows = logps(inputs.hidden, inputs.weight, inputs.targets)
            if inputs.gradient:
                rows.backward(inputs.upstream.to(rows.dtype))
            return Result(rows=rows.detach())

        return step

    return build


def loss_of(load: Callable[[Inputs, str], Logps]) -> Callable[[Inputs, str], Step]:
    """The op's loss, a formula of the log-probabilities that autograd differentiates."""

    def build(inputs: Inputs, schedule: str) -> Step:
        logps = load(inputs, schedule)

        def step() -> Result:
            inputs.clear()
            rows = logps(inputs.rows(), inputs.weight, inputs.targets)
            loss = inputs.loss(rows)
            loss.backward()
            return Result(rows.detach(), loss.detach())

        return step

    return build


def compiled(build: Callable[[Inputs, str], Logps]) -> Callable[[Inputs, str], Logps]:
    return lambda inputs, schedule: torch.compile(build(inputs, schedule), dynamic=False)


def loss_alone(load: Callable[[Inputs, str], Callable[[], Tensor]]) -> Callable[[Inputs, str], Step]:
    """The provider has the loss and keeps the log-probabilities to itself; without a reference it is not the op's."""

    def build(inputs: Inputs, schedule: str) -> Step:
        forward = load(inputs, schedule)

        def step() -> Result:
            inputs.clear()
            loss = forward()
            loss.backward()
            return Result() if schedule.endswith("no reference") else Result(loss=loss.detach())

        return step

    return build


def prefcore_loop(inputs: Inputs, schedule: str) -> Step:
    # Groups as a batch has them: one for each token would cost the host more than the rest.
    offsets = [*range(0, inputs.shape.T, inputs.shape.length), inputs.shape.T]
    options: dict[str, Any] = {"normalizer": 1}

    def closure(stats: prefcore.TokenStats, tile: prefcore.Tile) -> Tensor:
        return stats.logps * inputs.upstream[tile.tokens].to(stats.logps.dtype)

    if isinstance(inputs, CrossEntropy):

        def closure(stats: prefcore.TokenStats, tile: prefcore.Tile) -> Tensor:
            return -stats.logps

        options = {}
    elif isinstance(inputs, Sequences):

        def closure(stats: prefcore.TokenStats, tile: prefcore.Tile) -> Tensor:
            return inputs.losses(stats.logps, tile.tokens)

        options = {"cu_groups": inputs.cu_groups} if isinstance(inputs, Pairs) else {}

    def step() -> Result:
        inputs.clear()
        out = prefcore.linear_loss(
            inputs.rows(),
            inputs.weight,
            inputs.targets,
            offsets,
            closure,
            softcap=inputs.shape.softcap,
            **options,
        )
        out.loss.backward()
        return Result(out.stats.logps, out.loss.detach())

    return step


def eager_cross_entropy(inputs: Inputs, schedule: str) -> Callable[[], Tensor]:
    softcap = inputs.shape.softcap

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(capped(F.linear(hidden, weight), softcap).float(), targets)

    run = torch.compile(forward, dynamic=False) if schedule == "" else forward
    return lambda: run(inputs.hidden, inputs.weight, inputs.targets)


def cce_cross_entropy(inputs: Inputs, schedule: str) -> Callable[[], Tensor]:
    nll = cce_nll(inputs, schedule, "mean")
    return lambda: nll(inputs.hidden, inputs.weight, inputs.targets)


def liger_cross_entropy(inputs: Inputs, schedule: str) -> Callable[[], Tensor]:
    require("liger-kernel")
    need_cuda(inputs)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    softcap = inputs.shape.softcap
    return lambda: liger_fused_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, softcap=softcap)


# Plain PyTorch and TRL's seam on pairs.


def eager_pairs(inputs: Pairs, schedule: str) -> Step:
    if schedule == "response rows":
        return loss_of(eager_logps)(inputs, schedule)
    softcap = inputs.shape.softcap

    def logps() -> Tensor:
        hidden = inputs.hidden.view(-1, inputs.shape.D)
        logits = capped(F.linear(hidden, inputs.weight), softcap)
        labels = inputs.labels.flatten().clamp(min=0)
        return eager_of_logits(logits, labels)[inputs.index]

    def step() -> Result:
        inputs.clear()
        rows = logps()
        loss = inputs.loss(rows)
        loss.backward()
        return Result(rows.detach(), loss.detach())

    return step


def liger_pairs(inputs: Pairs, schedule: str) -> Callable[[], Tensor]:
    require("liger-kernel")
    refuse_softcap(inputs, "its fused preference loss")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearORPOLoss

    # Compilation is for GPUs; where it is left out a note of the case says so.
    compile_it = inputs.shape.device == "cuda"
    first = inputs.shape.prompt if schedule.startswith("response rows") else 0
    labels = inputs.labels[:, first:].contiguous()
    if isinstance(inputs, ORPO):
        orpo = LigerFusedLinearORPOLoss(beta=BETA, compiled=compile_it)
        return lambda: orpo(inputs.weight, inputs.hidden[:, first:], labels)[0]
    given = not schedule.endswith("no reference")
    dpo = LigerFusedLinearDPOLoss(beta=BETA, compiled=compile_it, use_ref_model=given)
    ref_weight = inputs.weight.detach()
    reference = {"ref_input": inputs.ref_hidden[:, first:], "ref_weight": ref_weight} if given else {}
    return lambda: dpo(inputs.weight, inputs.hidden[:, first:], labels, **reference)[0]


def liger_grpo(inputs: GRPO, schedule: str) -> Callable[[], Tensor]:
    require("liger-kernel")
    refuse_softcap(inputs, "its fused GRPO loss")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=KL, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="dapo", compiled=inputs.shape.device == "cuda"
    )
    size = (inputs.shape.sequences, inputs.shape.length)
    mask = torch.ones(size, device=inputs.shape.device)
    return lambda: loss(
        inputs.hidden.view(*size, -1),
        inputs.weight,
        inputs.targets.view(size),
        mask,
        inputs.advantages,
        ref_per_token_logps=inputs.ref_logps.view(size),
        old_per_token_logps=inputs.old_logps.view(size),
    )[0]


# Divergences of two models.


def from_divergences(load: Callable[[Divergence, str], Callable[[], Tensor]]) -> Callable[[Divergence, str], Step]:
    def build(inputs: Divergence, schedule: str) -> Step:
        forward = load(inputs, schedule)

        def step() -> Result:
            inputs.clear()
            rows = forward()
            loss = inputs.loss(rows)
            loss.backward()
            return Result(rows.detach(), loss.detach())

        return step

    return build


def prefcore_divergence(inputs: Divergence, schedule: str) -> Callable[[], Tensor]:
    op = getattr(prefcore, "linear_divergence", None)
    if op is None:
        raise LookupError("this prefcore has no linear_divergence")
    given = (inputs.hidden, inputs.weight, inputs.other_hidden, inputs.other_weight)
    return lambda: op(*given, kind="js", schedule=schedule, softcap=inputs.shape.softcap).divergence


def eager_divergence(inputs: Divergence, schedule: str) -> Callable[[], Tensor]:
    def forward(hidden: Tensor, weight: Tensor, other_hidden: Tensor, other_weight: Tensor) -> Tensor:
        return divergences(F.linear(hidden, weight), F.linear(other_hidden, other_weight), inputs.shape.softcap)

    run = torch.compile(forward, dynamic=False) if schedule == "" else forward
    return lambda: run(inputs.hidden, inputs.weight, inputs.other_hidden, inputs.other_weight)


def trl_divergence(inputs: Divergence, schedule: str) -> Callable[[], Tensor]:
    require("trl")
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    softcap = inputs.shape.softcap
    student, teacher = (inputs.hidden, inputs.weight, None), (inputs.other_hidden, inputs.other_weight, None)
    options = (0.5, 1.0, 1.0, softcap, 1.0, softcap)
    return lambda: ChunkedDivergenceFunction.apply(*student, *teacher, *options)[0]


def liger_divergence(inputs: Divergence, schedule: str) -> Callable[[], Tensor]:
    require("liger-kernel")
    refuse_softcap(inputs, "its fused linear JSD")
    if schedule == "chunked":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        compile_it = inputs.shape.device == "cuda"
        chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=compile_it)
        given = (inputs.hidden, inputs.weight, inputs.other_hidden, inputs.other_weight, inputs.targets)
        return lambda: chunked(*given)
    need_cuda(inputs)
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=0.5)
    return lambda: fused(inputs.hidden, inputs.weight, inputs.other_hidden, inputs.other_weight, inputs.targets)


# Statistics of given logits.


def of_logits(load: Callable[[Logits], Callable[[Tensor, Tensor], Tensor]]) -> Callable[[Logits, str], Step]:
    def build(inputs: Logits, schedule: str) -> Step:
        logps = load(inputs)

        def step() -> Result:
            inputs.clear()
            with torch.set_grad_enabled(inputs.gradient):
                rows = logps(inputs.logits, inputs.targets)
            if inputs.gradient:
                rows.backward(inputs.upstream.to(rows.dtype))
            return Result(rows=rows.detach())

        return step

    return build


def prefcore_of_logits(inputs: Logits) -> Callable[[Tensor, Tensor], Tensor]:
    softcap = inputs.shape.softcap
    return lambda logits, targets: prefcore.logprobs(logits, targets, softcap=softcap).logps


def plain_of_logits(inputs: Logits) -> Callable[[Tensor, Tensor], Tensor]:
    softcap = inputs.shape.softcap
    return lambda logits, targets: eager_of_logits(capped(logits, softcap), targets)


def trl_of_logits(inputs: Logits) -> Callable[[Tensor, Tensor], Tensor]:
    require("trl")
    refuse_softcap(inputs, "its selective_log_softmax")
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def prefcore_loss(inputs: Inputs, schedule: str) -> Step:
    return prefcore_loop(inputs, schedule) if schedule == "loop" else loss_of(prefcore_logps)(inputs, schedule)


def prefcore_divergence_of_logits(inputs: LogitPairs) -> Callable[[Tensor, Tensor], Tensor]:
    op = getattr(prefcore, "divergence", None)
    if op is None:
        raise LookupError("this prefcore has no divergence")
    softcap = inputs.shape.softcap
    return lambda logits, targets: op(logits, inputs.other_logits, kind="js", softcap=softcap).divergence


def plain_divergence_of_logits(inputs: LogitPairs) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, targets: divergences(logits, inputs.other_logits, inputs.shape.softcap)


Builder = Callable[[Any, str], Step]
BUILDERS: dict[tuple[str, str], Builder] = {
    ("linear_logprobs", "prefcore"): from_logps(prefcore_logps),
    ("linear_logprobs", "pytorch"): from_logps(eager_logps),
    ("linear_logprobs", "compile"): from_logps(compiled(eager_logps)),
    ("linear_logprobs", "trl"): from_logps(trl_logps),
    ("linear_logprobs", "liger"): from_logps(liger_logps),
    ("linear_logprobs", "cce"): from_logps(cce_logps),
    ("linear_loss", "prefcore"): prefcore_loop,
    ("linear_loss", "pytorch"): loss_of(eager_logps),
    ("linear_loss", "trl"): loss_of(trl_logps),
    ("cross_entropy", "prefcore"): prefcore_loop,
    ("cross_entropy", "pytorch"): loss_alone(eager_cross_entropy),
    ("cross_entropy", "compile"): loss_alone(eager_cross_entropy),
    ("cross_entropy", "trl"): loss_of(trl_logps),
    ("cross_entropy", "liger"): loss_alone(liger_cross_entropy),
    ("cross_entropy", "cce"): loss_alone(cce_cross_entropy),
    **{(op, "prefcore"): prefcore_loss for op in ("dpo", "orpo", "grpo")},
    **{(op, "pytorch"): eager_pairs for op in ("dpo", "orpo")},
    ("grpo", "pytorch"): loss_of(eager_logps),
    **{(op, "compile"): loss_of(compiled(eager_logps)) for op in ("dpo", "orpo", "grpo")},
    **{(op, "trl"): loss_of(trl_logps) for op in ("dpo", "orpo", "grpo")},
    **{(op, "liger"): loss_alone(liger_pairs) for op in ("dpo", "orpo")},
    ("grpo", "liger"): loss_alone(liger_grpo),
    ("linear_divergence", "prefcore"): from_divergences(prefcore_divergence),
    ("linear_divergence", "pytorch"): from_divergences(eager_divergence),
    ("linear_divergence", "compile"): from_divergences(eager_divergence),
    ("linear_divergence", "trl"): from_divergences(trl_divergence),
    ("linear_divergence", "liger"): loss_alone(liger_divergence),
    ("logprobs", "prefcore"): of_logits(prefcore_of_logits),
    ("logprobs", "pytorch"): of_logits(plain_of_logits),
    ("logprobs", "compile"): of_logits(lambda inputs: torch.compile(plain_of_logits(inputs), dynamic=False)),
    ("logprobs", "trl"): of_logits(trl_of_logits),
    ("divergence", "prefcore"): of_logits(prefcore_divergence_of_logits),
    ("divergence", "pytorch"): of_logits(plain_divergence_of_logits),
    ("divergence", "compile"): of_logits(
        lambda inputs: torch.compile(plain_divergence_of_logits(inputs), dynamic=False)
    ),
}
