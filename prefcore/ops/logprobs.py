"""Token statistics of logits that exist already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefcore import reference
from prefcore._impl import Impl, resolve
from prefcore._types import TokenStats
from prefcore.ops._arguments import (
    check_float,
    check_logit_options,
    check_same_device,
    check_target_dtype,
    check_targets,
    row_temperature,
    stats_settings,
    token_stats,
)
from prefcore.ops._autograd import once_differentiable
from prefcore.ops._backends import BACKENDS
from prefcore.ops._checks import check_type
from prefcore.ops._register import register
from prefcore.ops._stats import StatsSettings, accumulator_dtype, finish, new_state, row_gradient, stats_like

_GRADS = "Tensor? g_logps, Tensor? g_entropy, Tensor? g_logsumexp"
_SAVED = "Tensor targets, Tensor? temperature, Tensor entropy, Tensor state"


def matrices(*logits: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows, and views ``[R, V]`` of them: ``logits[:, :-1]`` is not one matrix, and need not be copied.

    Of several tensors of one shape, views of the same rows at a time.
    """
    pending, start = [logits], 0
    while pending:
        parts = pending.pop()
        try:
            views = [part.view(-1, part.shape[-1]) for part in parts]
        except RuntimeError:
            pending.extend(reversed(list(zip(*(part.unbind(0) for part in parts), strict=True))))
            continue
        yield slice(start, start + views[0].shape[0]), views
        start += views[0].shape[0]


def _forward_fake(logits: Tensor, targets: Tensor, temperature: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    state = logits.new_empty((3, targets.shape[0]), dtype=accumulator_dtype(logits.dtype))
    return *stats_like(targets.shape[0], logits, StatsSettings(*rest)), state


def _backward_fake(
    g_logps: Tensor | None, g_entropy: Tensor | None, g_logsumexp: Tensor | None, logits: Tensor, *rest: Any
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _inplace_fake(*_: Any) -> None:
    return None


class _Launchers:
    """The operators' bodies over one back end."""

    def __init__(self, load: Callable[[], ModuleType]) -> None:
        self.load = load

    def forward(self, logits: Tensor, targets: Tensor, temperature: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        settings, vocab = StatsSettings(*rest), logits.shape[-1]
        check_targets(targets, vocab, settings.ignore_index, temperature)
        state = new_state(targets.shape[0], logits)
        for rows, (tile,) in matrices(logits):
            own = None if temperature is None else temperature[rows]
            self.load().stats(tile, 0, targets[rows], own, None, settings.spec(vocab), state[:, rows])
        return *finish(state, targets, settings, vocab), state[:3].clone()

    def backward(
        self,
        g_logps: Tensor | None,
        g_entropy: Tensor | None,
        g_logsumexp: Tensor | None,
        logits: Tensor,
        *rest: Any,
    ) -> Tensor:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        matrix = out.view(-1, logits.shape[-1])
        parts = ((rows, tile, matrix[rows]) for rows, (tile,) in matrices(logits))
        self._write((g_logps, g_entropy, g_logsumexp), parts, *rest)
        return out

    def inplace(
        self,
        g_logps: Tensor | None,
        g_entropy: Tensor | None,
        g_logsumexp: Tensor | None,
        logits: Tensor,
        *rest: Any,
    ) -> None:
        parts = ((rows, tile, tile) for rows, (tile,) in matrices(logits))
        self._write((g_logps, g_entropy, g_logsumexp), parts, *rest)

    def _write(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        parts: Iterator[tuple[slice, Tensor, Tensor]],
        targets: Tensor,
        temperature: Tensor | None,
        entropy: Tensor,
        state: Tensor,
        *rest: Any,
    ) -> None:
        settings = StatsSettings(*rest)
        coef = row_gradient(*grads, targets == settings.ignore_index, state.dtype).coefficients()
        for rows, tile, out in parts:
            self.load().grad(
                tile,
                out,
                0,
                targets[rows],
                None if temperature is None else temperature[rows],
                None,
                settings.spec(tile.shape[1]),
                state[:, rows],
                None if grads[1] is None else entropy[rows],
                coef[:, rows],
            )


class _Operators(NamedTuple):
    forward: Callable
    backward: Callable
    inplace: Callable


def _register(impl: str) -> _Operators:
    load, _, key = BACKENDS[impl]
    launch, schema = _Launchers(load), StatsSettings.SCHEMA
    stats = ", ".join(["Tensor"] * 7)
    return _Operators(
        register(
            f"logprobs_forward_{impl}(Tensor logits, Tensor targets, Tensor? temperature, {schema}) -> ({stats})",
            launch.forward,
            _forward_fake,
            key,
        ),
        register(
            f"logprobs_backward_{impl}({_GRADS}, Tensor logits, {_SAVED}, {schema}) -> Tensor",
            launch.backward,
            _backward_fake,
            key,
        ),
        register(
            f"logprobs_backward_inplace_{impl}({_GRADS}, Tensor(a!) logits, {_SAVED}, {schema}) -> ()",
            launch.inplace,
            _inplace_fake,
            key,
        ),
    )


OPERATORS = {impl: _register(impl) for impl in BACKENDS}


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: Tensor | None,
        inplace: bool,
        impl: str,
        settings: StatsSettings,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        *stats, state = OPERATORS[impl].forward(logits, targets, temperature, *settings.flat())
        ctx.save_for_backward(logits, targets, temperature, stats[1], state)
        ctx.options = inplace, impl, settings
        ctx.mark_non_differentiable(*stats[3:])
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        inplace, impl, settings = ctx.options
        # Traced, an output that was not wanted receives an empty gradient instead of none.
        wanted = [g if want else None for g, want in zip(grads[:3], settings.wanted[:3], strict=True)]
        if all(g is None for g in wanted):
            return (None,) * 6
        arguments = (*wanted, logits, *saved, *settings.flat())
        if inplace:
            OPERATORS[impl].inplace(*arguments)
            # Whoever else saved the logits, a second backward among them, is then refused by autograd.
            torch.autograd.graph.increment_version(logits)
            return (logits.detach(), *(None,) * 5)
        return (OPERATORS[impl].backward(*arguments), *(None,) * 5)


def logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    inplace: bool = False,
    impl: Impl = "auto",
) -> TokenStats:
    """Statistics of the distributions softmax(z), z = softcap(logit_scale·logits)/temperature, in one pass.

    ``logps`` is equal to ``log_softmax(z, -1).gather(-1, targets[..., None])[..., 0]`` with zeros at ignored rows. No
    tensor of the logits' size is made in the forward, and one, the gradient, in the backward.

    Args:
        logits: ``[..., V]``, float32, float64, bfloat16 or float16; a view such as ``logits[:, :-1]`` is not copied.
        targets: ``[...]`` int64 token ids; ``ignore_index`` marks a row to skip.
        temperature: positive; a number, or a tensor shaped like ``targets`` (no gradient).
        softcap: positive; softcap(u) = softcap·tanh(u/softcap). None for none.
        logit_scale: factor of the logits.
        ignore_index: such rows return zeros and get zero gradient, whatever their logits hold.
        outputs: any of ``entropy``, ``logsumexp``, ``is_top1``, ``mean_logits``, ``log_sum_sq_probs``.
        inplace: the backward writes the gradient over the logits. They must not be a leaf, must have unit stride in
            V and must not overlap themselves; a second backward then raises RuntimeError.
        impl: ``auto`` is ``cpu`` or ``triton`` by the tensors' device; a named one is used or refused.

    Returns:
        :class:`TokenStats`, shaped like ``targets``, float32 (float64 for float64 logits). ``logps``, ``entropy`` and
        ``logsumexp`` are differentiable, once, with any upstream gradient.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device or value that does not fit; on a CPU, and on a GPU with
            ``PREFCORE_CHECK=1``, a target outside the vocabulary. Unchecked, its statistics are NaN.
        NotImplementedError: a temperature that requires a gradient, a DTensor, ``inplace`` with the reference, an
            implementation that this installation lacks.

    Example:
        >>> import torch, prefcore
        >>> logits = torch.randn(2, 5, 100, requires_grad=True)
        >>> stats = prefcore.logprobs(logits[:, :-1], torch.randint(100, (2, 4)))
        >>> stats.logps.sum().backward()
    """
    names = check_logit_options(softcap, logit_scale, ignore_index, outputs)
    check_type("logits", logits, Tensor)
    check_type("targets", targets, Tensor)
    check_type("inplace", inplace, bool)
    if logits.ndim < 1 or targets.shape != logits.shape[:-1] or logits.shape[-1] == 0:
        raise ValueError(
            f"expected logits [..., V] with V >= 1 and targets [...], got {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    check_float("logits", logits.dtype)
    check_same_device(logits=logits, targets=targets)
    check_target_dtype(targets)
    number, per_row = row_temperature(temperature, targets, logits)
    run = resolve(impl, "logprobs", logits.device)
    if run == "reference":
        if inplace:
            raise NotImplementedError("impl='reference' does not write the gradient over the logits")
        check_targets(targets.reshape(-1), logits.shape[-1], ignore_index, per_row)
        return reference.logprobs(
            logits,
            targets,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            outputs=tuple(names),
        )
    if inplace:
        _check_inplace(logits)
    elif logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    settings = StatsSettings(**stats_settings(number, softcap, logit_scale, ignore_index, names))
    values = _Logprobs.apply(logits, targets.reshape(-1).contiguous(), per_row, inplace, run, settings)
    return token_stats(values, names, targets.shape)


def _check_inplace(logits: Tensor) -> None:
    if logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace=True writes the gradient over the logits, which must not be a leaf that requires one")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"inplace=True needs logits with unit stride in V, got strides {logits.stride()}")
    if torch.compiler.is_compiling():
        return  # sizes are symbols there, and the gradient goes to a copy that does not overlap
    # Dimensions by rising stride; each must step over all the memory of those before it.
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride < extent:
                raise ValueError(f"inplace=True needs logits that do not overlap, got strides {logits.stride()}")
            extent = stride * (size - 1) + extent
