"""The loss of each token under a policy gradient: surrogate, KL term and entropy bonus, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from prefcore import _native, reference
from prefcore._impl import Impl, interpreting, resolve
from prefcore._types import FORMS, KLS, PolicyStats, PolicyTerms
from prefcore.ops import _checks
from prefcore.ops._autograd import once_differentiable
from prefcore.ops._register import register
from prefcore.ops._rows_cpu import _level

Form = Literal["none", "reinforce", "clip", "cispo", "sapo", "log_clip", "value"]
Kl = Literal["none", "k1", "k2", "k3", "k1_straight", "k3_straight", "k3_corrected", "exact"]

_INF = float("inf")
_UNUSED = {"none": ("weights",), "log_clip": ("weights", "entropy"), "value": ("log_ratio", "entropy")}
_MAX_CLAMP = 80.0  # its exponential is a float32 yet


@dataclass(frozen=True)
class _Settings:
    form: str
    kl: str
    low: float
    high: float
    dual: float
    kl_coef: float
    entropy_coef: float
    clamp: float


_TENSORS = ("old_logps", "advantages", "log_ratio", "weights", "ref_logps", "kl_values", "kl_coefs", "entropy")
_SCHEMA = (
    "(Tensor logps, "
    + ", ".join(f"Tensor? {name}" for name in _TENSORS)
    + ", str form, str kl, float low, float high, float dual, float kl_coef, float entropy_coef, float clamp, "
    "bool slopes) -> (Tensor, Tensor, Tensor)"
)


def policy_terms(
    logps: Tensor,
    old_logps: Tensor | None = None,
    advantages: Tensor | None = None,
    *,
    form: Form,
    low: float = -_INF,
    high: float = _INF,
    dual: float = _INF,
    log_ratio: Tensor | None = None,
    weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl: Kl = "none",
    kl_coef: float | Tensor = 0.0,
    kl_values: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    clamp: float = 20.0,
    impl: Impl = "auto",
) -> PolicyTerms:
    r"""Losses of tokens: ``weights * surrogate + kl_coef * kl - entropy_coef * entropy``, with their statistics.

    One pass over memory computes the losses, their derivatives, which the backward multiplies by what arrives, and
    the sums of the statistics. Notation: q = logps - old_logps, clamped; rho = exp(q); A the advantages;
    u = ref_logps - logps, clamped in k3. Whatever is clamped has no gradient beyond.

    ========== ================================================================================================
    ``form``   surrogate
    ========== ================================================================================================
    none       0
    reinforce  -A * logps
    clip       max(-rho * A, -clip(rho, low, high) * A), for A < 0 at most -dual * A
    cispo      -clip(rho, low, high) * A * logps, where rho is a constant
    sapo       -sigmoid(tau * (rho - 1)) * 4 / tau * A, where tau is ``high`` for A > 0 and ``low`` elsewhere
    log_clip   min(q, high) for A > 0 and max(q, low) elsewhere, of q as it is: no loss yet; without weights
    value      max((V - A)^2, (V_old + clip(V - V_old, -high, high) - A)^2) / 2, where logps are values V
    ========== ================================================================================================

    ================ ==========================================================================================
    ``kl``           term
    ================ ==========================================================================================
    none             0
    k1               -u; under samples of the policy its gradient is 0 on average
    k2               u^2 / 2; its gradient is on average that of KL(policy, reference)
    k3               exp(u) - u - 1; its gradient is on average that of KL(reference, policy)
    k1_straight      the value of k1, the gradient of k2
    k3_straight      the value of k3, the gradient of k2
    k3_corrected     rho * k3; on policy its gradient is on average that of KL(policy, reference)
    exact            ``kl_values``, as ``linear_divergence`` computes them, which get gradient
    ================ ==========================================================================================

    Args:
        logps: ``[T]`` float32 or float64 log-probs of the taken tokens (or ``[S]``, of whatever the ratio is of);
            gets gradient.
        old_logps: ``[T]`` under the behaviour policy; None for ``logps`` themselves, rho = 1. For ``value``,
            V_old; None for no clip.
        advantages: ``[T]``, needed by every form but ``none``.
        low, high, dual: bounds, as the form has them.
        log_ratio: ``[T]`` in place of q's value; its gradient stays that of q.
        weights: ``[T]``, at least 0, factors of the surrogate, such as importance corrections; None for 1.
        ref_logps: ``[T]`` under the reference, for the sampled KL terms.
        kl_coef: a number, or a tensor ``[T]``.
        kl_values: ``[T]``, for ``exact``; gets gradient.
        entropy: ``[T]``; gets gradient.
        entropy_coef: a number; 0 where the entropy is there for the statistics alone.
        clamp: bound of q and of u, in (0, 80].
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns:
        :class:`PolicyTerms`: losses ``[T]`` in the dtype of ``logps``, differentiable once with respect to
        ``logps``, ``entropy`` and ``kl_values`` alone, and :class:`PolicyStats`.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: shapes, dtypes, devices or values other than these, an input that is missing, or one that
            nothing uses.

    Example:
        >>> import torch, prefcore
        >>> logps, old_logps, advantages = torch.randn(3, 6)
        >>> terms = prefcore.policy_terms(
        ...     logps.requires_grad_(), old_logps, advantages, form="clip", low=0.8, high=1.2
        ... )
        >>> terms.losses.mean().backward()
    """
    if not isinstance(kl_coef, Tensor):
        _checks.check_number("kl_coef", kl_coef, " or a torch.Tensor")
    coefficient = 0.0 if isinstance(kl_coef, Tensor) else float(kl_coef)
    settings = _Settings(form, kl, low, high, dual, coefficient, entropy_coef, clamp)
    given: dict[str, Tensor | None] = {
        "old_logps": old_logps,
        "advantages": advantages,
        "log_ratio": log_ratio,
        "weights": weights,
        "ref_logps": ref_logps,
        "kl_values": kl_values,
        "kl_coefs": kl_coef if isinstance(kl_coef, Tensor) else None,
        "entropy": entropy,
    }
    _check(logps, given, settings)
    chosen = resolve(impl, "policy_terms", logps.device)
    if chosen == "reference":
        return reference.policy_terms(
            logps,
            old_logps,
            advantages,
            form=form,
            low=low,
            high=high,
            dual=dual,
            log_ratio=log_ratio,
            weights=weights,
            ref_logps=ref_logps,
            kl=kl,
            kl_coef=kl_coef.detach() if isinstance(kl_coef, Tensor) else kl_coef,
            kl_values=kl_values,
            entropy=entropy,
            entropy_coef=entropy_coef,
            clamp=clamp,
        )
    losses, sums = _PolicyTerms.apply(logps, *given.values(), settings, chosen)
    return PolicyTerms(losses, PolicyStats(*sums.unbind()))


def _check(logps: Tensor, given: dict[str, Tensor | None], settings: _Settings) -> None:
    for name, value, known in (("form", settings.form, FORMS), ("kl", settings.kl, KLS)):
        _checks.check_type(name, value, str)
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    for name in ("low", "high", "dual", "entropy_coef", "clamp"):
        value = getattr(settings, name)
        _checks.check_number(name, value)
        if value != value:  # math.isnan does not trace
            raise ValueError(f"{name} must not be NaN")
    if not 0 < settings.clamp <= _MAX_CLAMP:
        raise ValueError(f"clamp must be in (0, {_MAX_CLAMP:g}], got {settings.clamp}")
    if settings.form == "sapo" and not (0 < settings.low < _INF and 0 < settings.high < _INF):
        raise ValueError(f"form 'sapo' needs positive temperatures low and high, got {settings.low}, {settings.high}")
    if settings.form == "value" and not settings.high > 0:
        raise ValueError(f"form 'value' needs a positive high, got {settings.high}")
    if settings.low > settings.high and settings.form in ("clip", "cispo", "log_clip"):
        raise ValueError(f"low must not exceed high, got {settings.low} and {settings.high}")
    if settings.dual < settings.high and settings.form == "clip" and settings.dual != _INF:
        raise ValueError(f"dual must be at least high, {settings.high}, got {settings.dual}")
    _checks.check_tensor("logps", logps)
    if logps.dim() != 1:
        raise ValueError(f"logps must have shape [T], got {list(logps.shape)}")
    if logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logps must be float32 or float64, got {logps.dtype}")
    for name, tensor in given.items():
        if tensor is None:
            continue
        shown = "kl_coef" if name == "kl_coefs" else name
        _checks.check_tensor(shown, tensor)
        if tensor.shape != logps.shape:
            raise ValueError(f"{shown} must have logps' shape {list(logps.shape)}, got {list(tensor.shape)}")
        if tensor.dtype != logps.dtype:
            raise ValueError(f"{shown} must have logps' dtype {logps.dtype}, got {tensor.dtype}")
        if tensor.device != logps.device:
            raise ValueError(f"{shown} must be on logps' device {logps.device}, got {tensor.device}")
    sampled = settings.kl not in ("none", "exact")
    _need("advantages", given["advantages"], settings.form != "none", f"form {settings.form!r}")
    _need("ref_logps", given["ref_logps"], sampled, f"kl {settings.kl!r}")
    _need("kl_values", given["kl_values"], settings.kl == "exact", f"kl {settings.kl!r}")
    for name in _UNUSED.get(settings.form, ()):
        _need(name, given[name], False, f"form {settings.form!r}")
    if settings.entropy_coef != 0 and given["entropy"] is None:
        raise ValueError("entropy_coef needs entropy")
    if settings.form in ("log_clip", "value") and settings.kl != "none":
        raise ValueError(f"form {settings.form!r} does not use kl, got {settings.kl!r}")
    if given["log_ratio"] is not None and given["old_logps"] is not None:
        raise ValueError("log_ratio stands in for logps - old_logps: give one of log_ratio and old_logps")


def _need(name: str, tensor: Tensor | None, needed: bool, by: str) -> None:
    if (tensor is None) == needed:
        raise ValueError(f"{by} {'needs' if needed else 'does not use'} {name}")


class _PolicyTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logps: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *tensors, settings, impl = rest
        losses, slopes, sums = _OPERATORS[impl](logps, *tensors, *astuple(settings), ctx.needs_input_grad[0])
        ctx.save_for_backward(slopes, tensors[_TENSORS.index("kl_coefs")])
        ctx.settings = settings
        ctx.mark_non_differentiable(sums)
        return losses, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        slopes, kl_coefs = ctx.saved_tensors
        settings = ctx.settings
        grads: list[Tensor | None] = [None] * (len(_TENSORS) + 3)
        wanted = ctx.needs_input_grad
        if wanted[0]:
            grads[0] = grad * slopes
        coefficients = {
            "kl_values": settings.kl_coef if kl_coefs is None else kl_coefs,
            "entropy": -settings.entropy_coef,
        }
        for name, coefficient in coefficients.items():
            place = 1 + _TENSORS.index(name)
            # What is there for the statistics alone gets none: zeros would cost a head as much as others do.
            if wanted[place] and (isinstance(coefficient, Tensor) or coefficient != 0):
                grads[place] = grad * coefficient
        return tuple(grads)


def _fake(logps: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    total = logps.shape[0]
    sums = logps.new_empty(len(PolicyStats._fields), dtype=torch.float64)
    return logps.new_empty(total), logps.new_empty(total if rest[-1] else 0), sums


def _allocate(logps: Tensor, blocks: int, slopes: bool) -> tuple[Tensor, Tensor, Tensor]:
    total = logps.shape[0]
    parts = logps.new_empty((blocks, len(PolicyStats._fields) - 1), dtype=torch.float64)
    return logps.new_empty(total), logps.new_empty(total if slopes else 0), parts


def _add(parts: Tensor, total: int) -> Tensor:
    """The sums of all blocks, and the number of tokens."""
    return torch.cat([parts.sum(0), parts.new_full((1,), total)])


def _launch_cpu(logps: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *options, wanted = rest
    tensors = [None if x is None else x.contiguous() for x in options[: len(_TENSORS)]]
    form, kl, *numbers = options[len(_TENSORS) :]
    logps, total = logps.contiguous(), logps.shape[0]
    extension = _native.require()
    losses, slopes, parts = _allocate(logps, -(-total // extension.policy_block), wanted)
    extension.policy_terms(
        _native.TYPE_CODES[logps.dtype],
        total,
        FORMS.index(form),
        KLS.index(kl),
        logps.data_ptr(),
        *(0 if x is None else x.data_ptr() for x in tensors),
        *numbers,
        losses.data_ptr(),
        slopes.data_ptr() if wanted else 0,
        parts.data_ptr(),
        _level(),
        torch.get_num_threads(),
    )
    return losses, slopes, _add(parts, total)


def _launch_triton(logps: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from prefcore.kernels import policy_terms as kernel

    *options, wanted = rest
    tensors = [None if x is None else x.contiguous() for x in options[: len(_TENSORS)]]
    logps, total = logps.contiguous(), logps.shape[0]
    losses, slopes, parts = _allocate(logps, kernel.blocks(logps), wanted)
    form, kl, *numbers = options[len(_TENSORS) :]
    names = (field.name for field in fields(_Settings)[2:])
    named = dict(zip(names, numbers, strict=True))
    kernel.policy_terms(logps, tensors, form, kl, named, losses, slopes if wanted else None, parts)
    return losses, slopes, _add(parts, total)


def _register(impl: str, launch: Callable, key: str) -> Any:
    return register(f"policy_terms_{impl}{_SCHEMA}", launch, _fake, key)


_OPERATORS = {
    "cpu": _register("cpu", _launch_cpu, "CPU"),
    "triton": _register("triton", _launch_triton, "CPU" if interpreting() else "CUDA"),
}
