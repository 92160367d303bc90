"""Which of TRL's functions are replaced by ours."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager

from prefcore._patching import Package, Patch, Target
from prefcore.ops._arguments import check_memory_budget
from prefcore.trl import _functions

_OLDEST = (1, 16)


def _version() -> str:
    return importlib.import_module("trl").__version__


def _fits(version: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version).release >= _OLDEST
    except InvalidVersion:
        return False


_TARGETS = (
    Target("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", _functions.ChunkedLogProbFunction),
    Target("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", _functions.ChunkedDivergenceFunction),
    Target("trl.trainer.utils", "selective_log_softmax", _functions.selective_log_softmax),
    Target("trl.trainer.utils", "entropy_from_logits", _functions.entropy_from_logits),
    Target("trl.trainer.utils", "selective_log_softmax_and_entropy", _functions.selective_log_softmax_and_entropy),
    # Under this name alone: the kernels ask the same function whether they may run on Triton.
    Target("trl.trainer.utils", "_use_triton", _functions.use_triton, alone=True),
)
# Beside Triton alone.
_KERNEL = Target("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy", _functions.fused_logprob_entropy)

_JSD = ("student_logits", "teacher_logits", "labels", "beta", "temperature", "reduction")
_SELF = ("student_logits", "teacher_logits", "distillation_alpha")
# What single trainers have of their own, or import from the kernels; enabling imports none of them.
_LATER = (
    Target("trl.trainer.distillation_trainer", "_use_triton", lambda _: _functions.use_triton, ("device",), alone=True),
    *(
        Target(f"trl.experimental.{module}_trainer", f"{trainer}.generalized_jsd_loss",
               _functions.generalized_jsd_loss, (*_JSD, *more, "num_items_in_batch"))
        for module, trainer, more in (
            ("gkd.gkd", "GKDTrainer", ()),
            ("gold.gold", "GOLDTrainer", ("logits_are_probs",)),
            ("iw_opd.iw_opd", "IWOPDTrainer", ("top_k", "add_tail")),
        )
    ),
    *(
        Target(f"trl.experimental.{name}.loss_utils", "compute_full_logit_self_distillation_loss",
               _functions.compute_full_logit_self_distillation_loss, _SELF)
        for name in ("sdft", "sdpo")
    ),
)  # fmt: skip


def _targets() -> tuple[Target, ...]:
    from transformers.utils import is_triton_available

    return (*_TARGETS, *((_KERNEL,) if is_triton_available() else ()))


_PATCH = Patch(
    "prefcore.trl",
    Package("trl", f">= {'.'.join(map(str, _OLDEST))}", _version, _fits),
    _targets,
    later=_LATER,  # most are experimental: TRL promises nothing
    own=_functions.own,
    defaults=False,
)


def enable(*, memory_budget: int | None = None) -> AbstractContextManager:
    """Compute the log-probabilities, entropies and divergences of TRL's trainers by prefcore, from now on.

    Losses, metrics and configurations stay TRL's own. Trainers imported earlier or later, and models that TRL gave its
    fused head earlier, are served alike. Enabled already, it changes the options, and serves what was reloaded.

    | TRL's | computed by |
    | --- | --- |
    | ``ChunkedLogProbFunction``: the fused head | :func:`prefcore.linear_logprobs` |
    | ``ChunkedDivergenceFunction`` | :func:`prefcore.linear_divergence` |
    | ``selective_log_softmax``, ``entropy_from_logits``, both in one, and its kernel | :func:`prefcore.logprobs` |
    | divergences of whole logits: GKD, GOLD, IW-OPD, SDFT, SDPO | :func:`prefcore.divergence` |

    On a CPU the fused functions score the labelled positions alone, as TRL itself does on GPUs. Where ZeRO-3 shards the
    parameters, TRL's own fused functions run. What a script outside TRL imported by name before is not reached.

    Args:
        memory_budget: of every call of a head op, as in :func:`prefcore.linear_logprobs`.

    Returns:
        A context manager that calls :func:`disable` on leaving; it need not be used as one.

    Raises:
        TypeError, ValueError: a ``memory_budget`` that is none.
        ImportError: TRL, or something that it needs, cannot be imported.
        RuntimeError: TRL is older than 1.16, or lacks a function by its name and parameters; nothing is replaced then.
            For what a single trainer has of its own it is a RuntimeWarning, and that stays as it is.

    Example:
        >>> import prefcore.trl
        >>> prefcore.trl.enabled()
        False
    """
    check_memory_budget(memory_budget)
    with _PATCH.lock:
        _PATCH.enable()
        _functions.memory_budget = memory_budget
    return _PATCH


def disable() -> None:
    """Give TRL its own functions back, in every module that holds ours; nothing where not enabled."""
    _PATCH.disable()


def enabled() -> bool:
    """Whether TRL's functions are replaced by ours."""
    return _PATCH.enabled()
