"""What stands for TRL's functions: their names, signatures and results, computed by prefcore's ops."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

import prefcore

# What TRL computes besides log-probabilities, in the order in which it returns them.
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_IGNORED = -100

# TRL's own objects by the names of those here; kept when they are put back, since ours may still be held somewhere.
own: dict[str, Any] = {}
# Of every call of a head op.
memory_budget: int | None = None


def _sharded() -> bool:
    """Whether ZeRO-3 shards parameters: TRL's own functions gather the head around its use, in the backward too."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, common: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A head whose products are of values of ``dtype``, taken exactly to the wider ``common``, as a head op takes it.

    The op itself converts the weight, slice by slice, where that goes from its type to ``common`` in one step.
    """
    once = dtype == common or torch.promote_types(weight.dtype, dtype) == dtype
    if not once or torch.float64 in (weight.dtype, common):
        weight = weight.to(dtype).to(common)
    return hidden.to(dtype).to(common), weight, None if bias is None else bias.to(dtype).to(common)


class ChunkedLogProbFunction:
    """Stands for TRL's autograd function of this name, of which TRL uses ``apply``."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = _OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probabilities ``[N]``, then entropy, log Σ p², mean logit and top-1 where ``outputs`` names them.

        Args:
            hidden: ``[N, D]``.
            weight, bias: ``[V, D]`` and ``[V]`` or None, converted to the type of hidden, or to autocast's, the weight
                slice by slice.
            targets: ``[N]`` token ids.
            chunk_size: TRL's width of a tile; the plan of prefcore stands instead.
        """
        if _sharded():
            trls = own["ChunkedLogProbFunction"]
            return trls.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        dtype = _compute_dtype(hidden)
        hidden, weight, bias = _head(hidden, weight, bias, dtype, dtype)
        stats = prefcore.linear_logprobs(
            hidden,
            weight,
            targets.long(),
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            outputs=[name for name in _OUTPUTS if name in outputs],
            memory_budget=memory_budget,
        )
        # TRL's statistics are float32 of float64 hidden states too.
        entropy, squares, mean = (
            None if x is None else x.float() for x in (stats.entropy, stats.log_sum_sq_probs, stats.mean_logits)
        )
        return stats.logps.float(), entropy, squares, mean, stats.is_top1


class ChunkedDivergenceFunction:
    """Stands for TRL's autograd function of this name, of which TRL uses ``apply``."""

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Divergence ``[N]`` and the student's entropy ``[N]``; gradients to the student's tensors alone.

        ``beta`` 0 is KL(teacher‖student), 1 KL(student‖teacher), between them the Jensen-Shannon divergence in which
        the teacher's share is ``beta``. A larger vocabulary of the teacher is cut to the student's.
        """
        if _sharded():
            return own["ChunkedDivergenceFunction"].apply(
                student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, beta,
                temperature, student_logit_scale, student_final_logit_softcapping, teacher_logit_scale,
                teacher_final_logit_softcapping,
            )  # fmt: skip
        student, teacher = _compute_dtype(student_hidden), _compute_dtype(teacher_hidden)
        # Each side is rounded to its own type and then, exactly, taken to the wider one.
        common = torch.promote_types(student, teacher)
        vocab = student_weight.shape[0]
        hidden, weight, bias = _head(student_hidden, student_weight, student_bias, student, common)
        teacher_weight = teacher_weight.detach()[:vocab]
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()[:vocab]
        other = _head(teacher_hidden.detach(), teacher_weight, teacher_bias, teacher, common)
        kind, share = _kind(beta)
        stats = prefcore.linear_divergence(
            hidden,
            weight,
            other[0],
            other[1],
            kind=kind,
            beta=share,
            bias=bias,
            temperature=temperature,
            softcap=student_final_logit_softcapping,
            logit_scale=student_logit_scale,
            other_bias=other[2],
            other_softcap=teacher_final_logit_softcapping,
            other_logit_scale=teacher_logit_scale,
            outputs=("entropy",),
            memory_budget=memory_budget,
            # As TRL: 16-bit logits would be rounded before their difference is taken.
            logits_dtype=torch.promote_types(common, torch.float32),
        )
        return stats.divergence.float(), cast(Tensor, stats.entropy).detach().float()


def _kind(beta: float) -> tuple[Any, float | None]:
    """TRL's ``beta``, the teacher's share, as prefcore's kind and the student's share."""
    if beta in (0, 1):
        return ("kl_qp", "kl_pq")[int(beta)], None
    return "js", 1 - float(beta)


def _results(logits: Tensor, kernel: bool) -> torch.dtype:
    """The type of TRL's own results.

    Its kernel for GPUs returns float32. Elsewhere, and for several tokens per position, it gathers from a log-softmax,
    which has the type of the logits, float32 under a GPU's autocast. prefcore computes in float32 and rounds once.
    """
    widened = logits.is_cuda and (kernel or torch.is_autocast_enabled("cuda"))
    return torch.promote_types(logits.dtype, torch.float32) if widened else logits.dtype


def _positive(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError("temperature must be positive")


def _masked(index: Tensor, row_mask: Tensor | None) -> Tensor:
    index = index.long()
    return index if row_mask is None else index.masked_fill(row_mask == 0, _IGNORED)


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of the tokens ``index``, ``[...]`` or ``[..., K]``, of logits ``[..., V]``.

    Where ``row_mask``, shaped like ``index``, is zero, the result is zero, and so is the gradient whatever the logits
    hold. An index of -100 is likewise skipped.
    """
    _positive(temperature)
    index = _masked(index, row_mask)
    if index.ndim == logits.ndim - 1:
        return prefcore.logprobs(logits, index, temperature=temperature).logps.to(_results(logits, True))
    kept = index != _IGNORED
    rows = torch.where(kept.any(-1), 0, _IGNORED)
    lse = cast(Tensor, prefcore.logprobs(logits, rows, temperature=temperature, outputs=("logsumexp",)).logsumexp)
    chosen = logits.gather(-1, index.clamp(min=0)).to(lse.dtype) / temperature
    return torch.where(kept, chosen - lse[..., None], 0.0).to(_results(logits, False))


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropies ``[...]`` in nats of logits ``[..., V]``; ``chunk_size`` is TRL's, and has no use here."""
    rows = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = prefcore.logprobs(logits, rows, outputs=("entropy",)).entropy
    return cast(Tensor, entropy).to(_results(logits, True))


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens ``index`` ``[...]`` and entropies ``[...]`` of logits ``[..., V]``, in one pass.

    Masked rows are zero in both, as in :func:`selective_log_softmax`.
    """
    _positive(temperature)
    stats = prefcore.logprobs(logits, _masked(index, row_mask), temperature=temperature, outputs=("entropy",))
    dtype = _results(logits, True)
    entropy = cast(Tensor, stats.entropy).to(dtype)
    return stats.logps.to(dtype), entropy if entropy_requires_grad else entropy.detach()


def fused_logprob_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`selective_log_softmax_and_entropy` by the signature of TRL's kernel."""
    return selective_log_softmax_and_entropy(logits, index, temperature=temperature, row_mask=row_mask)


def use_triton(device: torch.device) -> bool:
    """Whether TRL's fused head and distillation score the labelled positions alone, rather than all and drop some."""
    return device.type == "cpu" or own["use_triton"](device)


def _divergences(
    student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0, labels: Tensor | None = None
) -> Tensor:
    """Per token, of logits ``[..., V]``; by TRL's ``beta``, zero where the label is -100."""
    kind, share = _kind(beta)
    rows = None if labels is None else torch.where(labels == _IGNORED, _IGNORED, 0)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    stats = prefcore.divergence(
        student.to(dtype), teacher.to(dtype), rows, kind=kind, beta=share, temperature=temperature
    )
    return stats.divergence


def generalized_jsd_loss(trls: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The static method of this name of GKD, GOLD and IW-OPD, with the signature of ``trls``, the trainer's own.

    That one runs for what is no divergence of whole softmaxes per token: ``reduction="none"``, which is not summed over
    the vocabulary, probabilities in the stead of logits, and a support of ``top_k`` tokens.
    """
    signature = inspect.signature(trls)

    @functools.wraps(trls)
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        student, labels, reduction, items = (
            given[name] for name in ("student_logits", "labels", "reduction", "num_items_in_batch")
        )
        summed = items is not None or reduction in ("batchmean", "sum", "mean")
        if not summed or given.get("logits_are_probs") or given.get("top_k", 0) > 0:
            return trls(*args, **kwargs)
        values = _divergences(student, given["teacher_logits"], given["beta"], given["temperature"], labels)
        total = values.sum().to(_results(student, False))
        if items is not None:
            return total / (items.to(total.device) if isinstance(items, Tensor) else items)
        if reduction == "sum":
            return total
        kept = None if labels is None else (labels != _IGNORED).sum()
        if reduction == "mean":
            return total / ((values.numel() if kept is None else kept) * student.shape[-1])
        return total / (max(student.shape[0], 1) if kept is None else kept.clamp_min(1))

    return loss


def compute_full_logit_self_distillation_loss(trls: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of this name of SDFT and SDPO, each of which has its own."""

    @functools.wraps(trls)
    def loss(student_logits: Tensor, teacher_logits: Tensor, *, distillation_alpha: float) -> Tensor:
        return _divergences(student_logits, teacher_logits, distillation_alpha).to(_results(student_logits, False))

    return loss
