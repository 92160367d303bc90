"""Where TRL's functions are replaced, and how they are put back.

TRL's modules import these functions by name from one another, so a function is replaced by its identity wherever a
module of TRL holds it. The modules that define them are among those, so that a trainer imported later gets ours too.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

from prefcore.ops._arguments import check_memory_budget
from prefcore.trl import _functions

_OLDEST = (1, 16)

_lock = threading.RLock()
_enabled = False
# What puts back the functions of TRL's experimental trainers.
_undo: list[Callable[[], None]] = []


class _Target(NamedTuple):
    """An object of TRL that has one of ours in its stead."""

    module: str
    name: str
    parameters: tuple[str, ...]
    ours: Any

    def __str__(self) -> str:
        return f"{self.module}.{self.name}({', '.join(self.parameters)})"


def _parameters(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _by_signature(module: str, name: str, ours: Any) -> _Target:
    """TRL's object has the parameters of ours."""
    return _Target(module, name, _parameters(getattr(ours, "apply", ours)), ours)


_TARGETS = (
    _by_signature("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", _functions.ChunkedLogProbFunction),
    _by_signature("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", _functions.ChunkedDivergenceFunction),
    _by_signature("trl.trainer.utils", "selective_log_softmax", _functions.selective_log_softmax),
    _by_signature("trl.trainer.utils", "entropy_from_logits", _functions.entropy_from_logits),
    _by_signature(
        "trl.trainer.utils", "selective_log_softmax_and_entropy", _functions.selective_log_softmax_and_entropy
    ),
)
# Beside Triton alone.
_KERNEL = _by_signature(
    "trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy", _functions.fused_logprob_entropy
)
# Replaced under this name alone: the kernels ask the same function whether they may run on Triton.
_COMPACT = _by_signature("trl.trainer.utils", "_use_triton", _functions.use_triton)

_JSD = ("student_logits", "teacher_logits", "labels", "beta", "temperature", "reduction")
_SELF = ("student_logits", "teacher_logits", "distillation_alpha")
_EXPERIMENTAL = {
    target.module: target
    for target in (
        *(
            _Target(f"trl.experimental.{module}_trainer", f"{trainer}.generalized_jsd_loss",
                    (*_JSD, *more, "num_items_in_batch"), _functions.generalized_jsd_loss)
            for module, trainer, more in (
                ("gkd.gkd", "GKDTrainer", ()),
                ("gold.gold", "GOLDTrainer", ("logits_are_probs",)),
                ("iw_opd.iw_opd", "IWOPDTrainer", ("top_k", "add_tail")),
            )
        ),
        *(
            _Target(f"trl.experimental.{name}.loss_utils", "compute_full_logit_self_distillation_loss", _SELF,
                    _functions.compute_full_logit_self_distillation_loss)
            for name in ("sdft", "sdpo")
        ),
    )
}  # fmt: skip


def _targets() -> tuple[_Target, ...]:
    from transformers.utils import is_triton_available

    return (*_TARGETS, *((_KERNEL,) if is_triton_available() else ()))


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
    """TRL's own object, as its module or class holds it, or a refusal."""
    refusal = f"prefcore.trl looked for {target} in trl {importlib.import_module('trl').__version__}"
    try:
        *holders, name = target.name.split(".")
        holder = importlib.import_module(target.module)
        for outer in holders:
            holder = getattr(holder, outer)
        found = vars(holder)[name]
    except (ImportError, AttributeError, KeyError) as error:
        raise RuntimeError(f"{refusal} and did not find it: {error!r}") from error
    function = found.__func__ if isinstance(found, staticmethod) else found
    # What `apply` of an autograd function takes is what its `forward` takes behind the context.
    forward = getattr(function, "forward", None)
    try:
        called = _parameters(function) if forward is None else _parameters(forward)[1:]
    except (TypeError, ValueError) as error:
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


def _replace_experimental(target: _Target) -> None:
    """In a module that is loaded. TRL promises nothing of these: one that has changed is left as it is, and told."""
    try:
        found = _find(target)
    except RuntimeError as error:
        warnings.warn(f"{error}; it stays TRL's own", RuntimeWarning, stacklevel=2)
        return
    if isinstance(found, staticmethod):
        holder, name = target.name.split(".")
        trainer = getattr(sys.modules[target.module], holder)
        setattr(trainer, name, staticmethod(target.ours(found.__func__)))
        _undo.append(lambda: setattr(trainer, name, found))
    else:
        mine = target.ours(found)
        _replace({id(found): mine})
        _undo.append(lambda: _replace({id(mine): found}))


class _Later(importlib.abc.MetaPathFinder):
    """Replaces functions of TRL's experimental trainers as these are imported: enabling must not import them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname in _EXPERIMENTAL else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            with _lock:
                if _enabled:
                    _replace_experimental(_EXPERIMENTAL[fullname])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_later = _Later()


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
    | ``ChunkedLogProbFunction``: the fused head | :func:`prefcore.linear_logprobs` |
    | ``ChunkedDivergenceFunction`` | :func:`prefcore.linear_divergence` |
    | ``selective_log_softmax``, ``entropy_from_logits``, both in one, and its kernel | :func:`prefcore.logprobs` |
    | divergences of whole logits: GKD, GOLD, IW-OPD, SDFT, SDPO | :func:`prefcore.divergence` |

    On a CPU the fused head also scores the labelled positions alone, as TRL itself does on GPUs. Where ZeRO-3 shards
    the parameters, TRL's own fused functions run. What a script outside TRL imported by name before is not reached.

    Args:
        memory_budget: of every call of a head op, as in :func:`prefcore.linear_logprobs`.

    Returns:
        A context manager that calls :func:`disable` on leaving; it need not be used as one.

    Raises:
        TypeError, ValueError: a ``memory_budget`` that is none.
        ImportError: TRL cannot be imported.
        RuntimeError: TRL is older than 1.16, or lacks a function by its name and parameters; nothing is replaced then.
            For a function of an experimental trainer it is a RuntimeWarning, and that one stays as it is.

    Example:
        >>> import prefcore.trl
        >>> prefcore.trl.enabled()
        False
    """
    global _enabled
    check_memory_budget(memory_budget)
    with _lock:
        if not _enabled:
            _check_version()
            targets = _targets()
            found = [(target.ours, _find(target)) for target in (*targets, _COMPACT)]
            _functions.own.update({ours.__name__: own for ours, own in found})
            _replace({id(own): ours for ours, own in found[:-1]})
            setattr(sys.modules[_COMPACT.module], _COMPACT.name, _COMPACT.ours)
            _enabled = True
            sys.meta_path.insert(0, _later)
            for module in _EXPERIMENTAL.keys() & sys.modules.keys():
                _replace_experimental(_EXPERIMENTAL[module])
        _functions.memory_budget = memory_budget
    return _Enabled()


def disable() -> None:
    """Give TRL its own functions back, in every module that holds ours; nothing where not enabled."""
    global _enabled
    with _lock:
        if not _enabled:
            return
        sys.meta_path.remove(_later)
        while _undo:
            _undo.pop()()
        ours = [target.ours for target in (*_targets(), _COMPACT)]
        _replace({id(mine): _functions.own[mine.__name__] for mine in ours})
        _enabled = False


def enabled() -> bool:
    """Whether TRL's functions are replaced by ours."""
    return _enabled
