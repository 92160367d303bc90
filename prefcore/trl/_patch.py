"""TRL's trainers as they are, with their log-probabilities and divergences computed by prefcore.

TRL's modules import these functions by name from one another, so a function is replaced by its identity wherever a
module of TRL holds it. The modules that define them are among those, so that a trainer imported later gets ours too.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import prefcore
from prefcore.ops._arguments import check_memory_budget

_OLDEST = (1, 16)
# What TRL computes besides log-probabilities, in the order in which it returns them.
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_IGNORED = -100

_lock = threading.RLock()
# TRL's own objects by the name of their target, while enabled and after: whoever still holds ours may need them.
_originals: dict[str, Any] = {}
_enabled = False
_memory_budget: int | None = None


def _sharded() -> bool:
    """Whether ZeRO-3 shards parameters: TRL's own functions gather the head around its use, in the backward too."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


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
            weight, bias: ``[V, D]`` and ``[V]`` or None, converted to the type of hidden, or to autocast's: a copy of
                the weight where they differ, as with ``cast_lm_head_to_fp32`` of TRL.
            targets: ``[N]`` token ids.
            chunk_size: TRL's width of a tile; the plan of prefcore stands instead.
        """
        if _sharded():
            own = _originals["ChunkedLogProbFunction"]
            return own.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        hidden, weight, bias = _head(hidden, weight, bias, _compute_dtype(hidden))
        stats = prefcore.linear_logprobs(
            hidden,
            weight,
            targets.long(),
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            outputs=[name for name in _OUTPUTS if name in outputs],
            memory_budget=_memory_budget,
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
            return _originals["ChunkedDivergenceFunction"].apply(
                student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, beta,
                temperature, student_logit_scale, student_final_logit_softcapping, teacher_logit_scale,
                teacher_final_logit_softcapping,
            )  # fmt: skip
        student, teacher = _compute_dtype(student_hidden), _compute_dtype(teacher_hidden)
        # Each side is rounded to its own type and then, exactly, taken to the wider one.
        common = torch.promote_types(student, teacher)
        vocab = student_weight.shape[0]
        hidden, weight, bias = _head(*_head(student_hidden, student_weight, student_bias, student), common)
        teacher_weight = teacher_weight.detach()[:vocab]
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()[:vocab]
        other = _head(*_head(teacher_hidden.detach(), teacher_weight, teacher_bias, teacher), common)
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
            memory_budget=_memory_budget,
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


def _fused_logprob_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`selective_log_softmax_and_entropy` by the signature of TRL's kernel."""
    return selective_log_softmax_and_entropy(logits, index, temperature=temperature, row_mask=row_mask)


def _use_triton(device: torch.device) -> bool:
    """Whether TRL's fused head scores the labelled positions alone, rather than all of them with a label put in."""
    return device.type == "cpu" or _originals["_use_triton"](device)


class _Target(NamedTuple):
    """An object of TRL that has one of ours in its stead."""

    module: str
    name: str
    parameters: tuple[str, ...]
    ours: Any


def _parameters(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


_CALLED = _parameters(ChunkedLogProbFunction.apply), _parameters(ChunkedDivergenceFunction.apply)
_TARGETS = (
    _Target("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", _CALLED[0], ChunkedLogProbFunction),
    _Target("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", _CALLED[1], ChunkedDivergenceFunction),
    *(
        _Target("trl.trainer.utils", function.__name__, _parameters(function), function)
        for function in (selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy)
    ),
)
_TWIN = _Target(
    "trl.kernels.logprob_entropy",
    "selective_log_softmax_and_entropy",
    _parameters(_fused_logprob_entropy),
    _fused_logprob_entropy,
)
# Replaced under this name alone: the kernels ask the same function whether they may run on Triton.
_COMPACT = _Target("trl.trainer.utils", "_use_triton", ("device",), _use_triton)


def _targets() -> tuple[_Target, ...]:
    from transformers.utils import is_triton_available

    return (*_TARGETS, *((_TWIN,) if is_triton_available() else ()))


def _check_version() -> None:
    wanted = ".".join(map(str, _OLDEST))
    try:
        trl = importlib.import_module("trl")
    except ImportError as error:
        raise ImportError(f"prefcore.trl.enable() looked for trl >= {wanted}: {error}") from error
    from packaging.version import InvalidVersion, Version

    try:
        known = Version(trl.__version__).release >= _OLDEST
    except InvalidVersion:
        known = False
    if not known:
        raise RuntimeError(f"prefcore.trl.enable() looked for trl >= {wanted} and found {trl.__version__}")


def _find(target: _Target) -> Any:
    """TRL's own object, or a refusal."""
    sought = f"{target.module}.{target.name}({', '.join(target.parameters)})"
    refusal = f"prefcore.trl.enable() looked for {sought} in trl {importlib.import_module('trl').__version__}"
    try:
        found = getattr(importlib.import_module(target.module), target.name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"{refusal} and did not find it: {error}") from error
    try:
        # What `apply` of an autograd function takes is what its `forward` takes behind the context.
        forward = getattr(found, "forward", None)
        called = _parameters(found) if forward is None else _parameters(forward)[1:]
    except (AttributeError, TypeError, ValueError) as error:
        raise RuntimeError(f"{refusal} and cannot read the signature of what is there: {error}") from error
    if called != target.parameters:
        raise RuntimeError(f"{refusal} and found it with the parameters ({', '.join(called)})")
    return found


def _replace(stead: dict[int, Any]) -> None:
    """Put objects, by the id of those that they replace, into every loaded module of TRL."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "trl":
            continue
        # Of a lazy module only what it holds already: its attributes would be imported.
        members = getattr(module, "__dict__", {})
        for key, value in list(members.items()):
            if id(value) in stead:
                members[key] = stead[id(value)]


class _Enabled(AbstractContextManager):
    """Of :func:`enable`: leaving it disables."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        disable()


def enable(*, memory_budget: int | None = None) -> AbstractContextManager:
    """Compute the log-probabilities, entropies and divergences of TRL's trainers by prefcore, from now on.

    Losses, metrics and configurations stay TRL's own. Trainers imported earlier or later, and models that TRL gave its
    fused head earlier, are served alike. Enabled already, it changes the options alone.

    | TRL's | computed by |
    | --- | --- |
    | ``ChunkedLogProbFunction`` (the fused head) | :func:`prefcore.linear_logprobs` |
    | ``ChunkedDivergenceFunction`` | :func:`prefcore.linear_divergence` |
    | ``selective_log_softmax``, ``entropy_from_logits``, ``selective_log_softmax_and_entropy`` and its kernel | :func:`prefcore.logprobs` |

    On a CPU the fused head also scores the labelled positions alone, as TRL itself does on GPUs. Where ZeRO-3 shards the
    parameters, TRL's own fused functions run. Functions that a script outside TRL imported before are not reached.

    Args:
        memory_budget: as in :func:`prefcore.linear_logprobs`, for every call.

    Returns:
        A context manager that calls :func:`disable` on leaving; it need not be used as one.

    Raises:
        TypeError, ValueError: a ``memory_budget`` that is none.
        ImportError: TRL cannot be imported.
        RuntimeError: TRL is older than 1.16, or lacks a function by its name and parameters. Nothing is replaced then.

    Example:
        >>> import prefcore.trl
        >>> with prefcore.trl.enable():  # doctest: +SKIP
        ...     trl.DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer).train()
    """  # noqa: E501
    global _enabled, _memory_budget
    check_memory_budget(memory_budget)
    with _lock:
        if not _enabled:
            _check_version()
            targets = _targets()
            found = {target.module + target.name: _find(target) for target in (*targets, _COMPACT)}
            _originals.update({target.ours.__name__: found[target.module + target.name] for target in targets})
            _originals["_use_triton"] = found[_COMPACT.module + _COMPACT.name]
            _replace({id(found[target.module + target.name]): target.ours for target in targets})
            setattr(sys.modules[_COMPACT.module], _COMPACT.name, _use_triton)
            _enabled = True
        _memory_budget = memory_budget
    return _Enabled()


def disable() -> None:
    """Give TRL its own functions back, in every module that holds ours; nothing where not enabled."""
    global _enabled
    with _lock:
        if _enabled:
            ours = (*(target.ours for target in _targets()), _use_triton)
            _replace({id(mine): _originals[mine.__name__] for mine in ours})
            _enabled = False


def enabled() -> bool:
    """Whether TRL's functions are replaced by ours."""
    return _enabled
