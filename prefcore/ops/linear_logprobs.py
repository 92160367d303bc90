"""Token statistics from hidden states and the head's weight, without the ``[T, V]`` logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefcore import reference
from prefcore._impl import Impl, resolve
from prefcore._types import TokenStats
from prefcore.ops import _plan, _walk
from prefcore.ops._arguments import (
    check_head_tensors,
    check_logit_options,
    check_low_rank,
    check_memory_budget,
    check_targets,
    check_weight_grad_out,
    head_of_one_type,
    join_low_rank,
    row_temperature,
    stats_settings,
    token_stats,
)
from prefcore.ops._autograd import once_differentiable
from prefcore.ops._backends import BACKENDS
from prefcore.ops._checks import check_type
from prefcore.ops._plan import Schedule
from prefcore.ops._register import register
from prefcore.ops._stats import Stats, accumulator_dtype, stats_like
from prefcore.ops._walk import HeadSettings, Into, Needs, Saved

_GRADS = "Tensor? g_logps, Tensor? g_entropy, Tensor? g_logsumexp"
_INPUTS = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? temperature, Tensor? outer"
_SAVED = "Tensor entropy, Tensor state, Tensor retained, Tensor mean_weight"
_NEEDS = ", ".join(
    (*(f"bool {name}_grad" for name in Needs._fields), "bool drop_zero_rows", "Tensor(a!)? weight_grad_out")
)


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    outer: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    settings = HeadSettings(*rest)
    T, D = hidden.shape
    rows = torch.sym_min(T, _walk.limits(hidden, weight, settings).retained_rows)
    dtype = accumulator_dtype(hidden.dtype)
    saved = Saved(
        state=hidden.new_empty((3, T), dtype=dtype),
        retained=_walk.retained_like(hidden, weight, settings, rows),
        mean_weight=hidden.new_empty((T if settings.schedule == "frozen" else 0, D), dtype=dtype),
    )
    return *stats_like(T, hidden, settings), *saved


def _backward_fake(
    g_logps: Tensor | None, g_entropy: Tensor | None, g_logsumexp: Tensor | None,
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
    outer: Tensor | None, entropy: Tensor, state: Tensor, retained: Tensor, mean_weight: Tensor,
    hidden_grad: bool, weight_grad: bool, bias_grad: bool, inner_grad: bool, drop_zero_rows: bool,
    weight_grad_out: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    returned = weight_grad and weight_grad_out is None
    trained = weight if outer is None else outer
    return (
        hidden.new_empty(hidden.shape if hidden_grad or inner_grad else (0, hidden.shape[1])),
        trained.new_empty(trained.shape if returned else (0,)),
        hidden.new_empty((weight.shape[0] if bias_grad else 0,)),
    )


class _Launchers:
    """The operators' bodies over one back end."""

    def __init__(self, load: Callable[[], ModuleType]) -> None:
        self.load = load

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
        outer: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        settings = HeadSettings(*rest)
        check_targets(targets, weight.shape[0], settings.ignore_index, temperature)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            stats, saved = _walk.forward(self.load(), hidden, weight, targets, bias, temperature, outer, settings)
        return *stats, *saved

    def backward(
        self,
        g_logps: Tensor | None, g_entropy: Tensor | None, g_logsumexp: Tensor | None,
        hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
        outer: Tensor | None, entropy: Tensor, state: Tensor, retained: Tensor, mean_weight: Tensor,
        hidden_grad: bool, weight_grad: bool, bias_grad: bool, inner_grad: bool, drop_zero_rows: bool,
        weight_grad_out: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return _walk.backward(
                self.load(), (g_logps, g_entropy, g_logsumexp), hidden, weight, targets, bias, temperature,
                outer, entropy, Saved(state, retained, mean_weight),
                Needs(hidden_grad, weight_grad, bias_grad, inner_grad), drop_zero_rows,
                Into(weight_grad_out), HeadSettings(*rest),
            )  # fmt: skip


class _Operators(NamedTuple):
    forward: Callable
    backward: Callable


def _register(impl: str) -> _Operators:
    load, _, key = BACKENDS[impl]
    launch, schema = _Launchers(load), HeadSettings.SCHEMA
    forward_outputs = ", ".join(["Tensor"] * (len(Stats._fields) + len(Saved._fields)))
    return _Operators(
        register(
            f"linear_logprobs_forward_{impl}({_INPUTS}, {schema}) -> ({forward_outputs})",
            launch.forward,
            _forward_fake,
            key,
        ),
        register(
            f"linear_logprobs_backward_{impl}({_GRADS}, {_INPUTS}, {_SAVED}, {_NEEDS}, {schema}) "
            "-> (Tensor, Tensor, Tensor)",
            launch.backward,
            _backward_fake,
            key,
        ),
    )


OPERATORS = {impl: _register(impl) for impl in BACKENDS}


def _gradients(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of hidden states, of weight or outer, and of bias, for what arrived at logps, entropy and logsumexp."""
    hidden, weight, targets, bias, temperature, outer, *saved = ctx.saved_tensors
    drop_zero_rows, inner_only, weight_grad_out, impl, settings = ctx.options
    # Traced, an output that was not wanted receives an empty gradient instead of none.
    wanted = [g if want else None for g, want in zip(grads, settings.wanted[:3], strict=True)]
    if all(g is None for g in wanted):
        return None, None, None
    if drop_zero_rows and hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("drop_zero_rows=True reads a count back from the device, which a graph cannot capture")
    needed = ctx.needs_input_grad
    needs = Needs(
        hidden=needed[0] and not inner_only,
        weight=needed[1 if outer is None else 5],
        bias=needed[3],
        inner=needed[0] and outer is not None,
    )
    d_hidden, d_weight, d_bias = OPERATORS[impl].backward(
        *wanted, hidden, weight, targets, bias, temperature, outer, *saved,
        *needs, drop_zero_rows, weight_grad_out, *settings.flat(),
    )  # fmt: skip
    if weight_grad_out is not None:
        torch.autograd.graph.increment_version(weight_grad_out)
    return (
        d_hidden if needs.states else None,
        d_weight if needs.weight and weight_grad_out is None else None,
        d_bias if needs.bias else None,
    )


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
        outer: Tensor | None, weight_grad_out: Tensor | None, drop_zero_rows: bool, inner_only: bool, impl: str,
        settings: HeadSettings,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        outputs = OPERATORS[impl].forward(hidden, weight, targets, bias, temperature, outer, *settings.flat())
        stats, saved = Stats(*outputs[: len(Stats._fields)]), Saved(*outputs[len(Stats._fields) :])
        ctx.save_for_backward(hidden, weight, targets, bias, temperature, outer, stats.entropy, *saved)
        # The buffer is not saved through autograd: others may add to it between forward and backward.
        ctx.options = drop_zero_rows, inner_only, weight_grad_out, impl, settings
        frozen = (stats.entropy,) if settings.schedule == "frozen" else ()
        ctx.mark_non_differentiable(*frozen, *stats[3:], saved.state)
        return *stats, saved.state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g_logps, g_entropy, g_logsumexp = grads[:3]
        if ctx.options[-1].schedule == "frozen":
            g_entropy = None  # not differentiable here; traced, zeros arrive all the same
        d_hidden, d_trained, d_bias = _gradients(ctx, (g_logps, g_entropy, g_logsumexp))
        d_weight, d_outer = (d_trained, None) if ctx.saved_tensors[5] is None else (None, d_trained)
        return d_hidden, d_weight, None, d_bias, None, d_outer, *(None,) * 5


class _FrozenEntropy(torch.autograd.Function):
    """The entropy's own way back in the schedule ``frozen``.

    There it costs a sweep over the vocabulary that the log-probabilities do not need, so it must not run for an entropy
    that is only logged. A traced graph hands zeros to an output without gradient, but runs no node that nothing needs.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | None,
        outer: Tensor | None, entropy: Tensor, state: Tensor, drop_zero_rows: bool, inner_only: bool, impl: str,
        settings: HeadSettings,
    ) -> Tensor:  # fmt: skip
        none = hidden.new_empty((0, hidden.shape[1]))
        ctx.save_for_backward(hidden, weight, targets, bias, temperature, outer, entropy, state, none, none.clone())
        ctx.options = drop_zero_rows, inner_only, None, impl, settings
        return entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_entropy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, (None, g_entropy, None))[0], *(None,) * 11


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    schedule: Schedule = "auto",
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    weight_grad_out: Tensor | None = None,
    drop_zero_rows: bool = False,
    process_group: Any = None,
    impl: Impl = "auto",
) -> TokenStats:
    """Statistics of the next-token distributions softmax(z), z = softcap(logit_scale·(h·Wᵀ + b))/temperature.

    Equal to ``prefcore.logprobs(linear(hidden, weight, bias), targets, …)`` without the ``[T, V]`` logits:
    they exist as tiles, or, in the schedule ``retain``, once, in the type of ``hidden`` (float32 for 16-bit states on a
    CPU that has no units for their type). ``T`` is the number of rows, that is of elements of ``targets``.

    The call computes in the type of ``hidden``, under autocast in autocast's. A weight of another type is rounded to
    that as if cast first, but a slice of a tile's width at a time, so without a copy; and its gradient, in its own
    type, is not rounded to that of ``hidden``: that of a float32 weight keeps float32 sums of 16-bit factors.

    Args:
        hidden: ``[..., D]``, float32, float64, bfloat16 or float16.
        weight: ``[V, D]``, the head's weight, on the same device, of any of these types, but float64 beside float64
            alone.
        targets: ``[...]`` int64 token ids; ``ignore_index`` marks a row to skip.
        bias: ``[V]`` or None, of a type as the weight may have; it is cast to that of ``hidden``.
        low_rank: ``(inner [..., R], outer [V, R])``, of the type and device of ``hidden``, or None: ``inner @ outer.T``
            is added to the raw logits. LoRA on the head (Hu et al. 2021, arXiv:2106.09685) is
            inner = scaling·dropout(h)·Aᵀ, outer = B. Gradients go to both, and ``outer`` is what trains: the weight may
            not, so none of its size is made. Schedules count ``outer`` as the weight, but its GEMMs are R columns wide:
            ``retain`` then costs 2 U, ``recompute`` 3 U, and each 1 U less where the hidden states need no gradient,
            only ``inner``.
        temperature: positive; a number, or a tensor shaped like ``targets`` (no gradient).
        softcap: positive; softcap(u) = softcap·tanh(u/softcap). None for none.
        logit_scale: factor of the raw logits.
        ignore_index: such rows return zeros and get zero gradient, whatever their hidden states hold.
        outputs: any of ``entropy``, ``logsumexp``, ``is_top1``, ``mean_logits``, ``log_sum_sq_probs``.
        schedule: how forward and backward share the work, counted in U = 2·T·D·V flops. Without a gradient to
            take, every name runs ``forward``, 1 U. ``frozen`` (no gradient for weight, ``outer`` and bias) 2 U, keeps
            ``[T, D]`` float32; an entropy gradient that arrives costs 2 U more. ``retain`` 3 U, keeps ``[T, V]``.
            ``recompute`` 4 U, keeps nothing. ``auto`` takes ``frozen`` where it can, else retains the logits of as
            many rows as the budget holds and recomputes the others.
        memory_budget: bytes of logits held at once; 1/16 of the device's memory by default. Tiles have 128 rows and
            1024 columns at the least, however small the budget. ``retain`` exceeds the default budget, not a given one.
        logits_dtype: None rounds logits to the type of ``hidden``, as models do; ``torch.float32`` keeps the GEMM's
            sums.
        weight_grad_out: ``[V, D]``, float32 or of the weight's type: ∂L/∂weight is added to it in place, and
            autograd gets none for the weight.
        drop_zero_rows: leave rows whose upstream gradient is zero out of the backward's GEMMs. On a GPU it costs one
            synchronisation per backward; on a CPU it is done where they are an eighth or more.
        process_group: for a head sharded over its vocabulary; not built yet.
        impl: ``auto`` is ``cpu`` or ``triton`` by the tensors' device; a named one is used or refused.

    Returns:
        :class:`TokenStats`, shaped like ``targets``, float32 (float64 for float64 inputs). ``logps``, ``entropy`` and
        ``logsumexp`` are differentiable, once, with any upstream gradient.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device or value that does not fit; on a CPU, and on a GPU with
            ``PREFCORE_CHECK=1``, a target outside the vocabulary. Unchecked, its statistics are NaN.
        NotImplementedError: ``process_group``; a temperature that requires a gradient; a weight that does beside
            ``low_rank``; a sharded weight (DTensor); an implementation that this installation lacks.
        RuntimeError: ``drop_zero_rows`` while a CUDA graph is captured.

    Example:
        >>> import torch, prefcore
        >>> hidden, weight = torch.randn(5, 8), torch.randn(100, 8, requires_grad=True)
        >>> targets = torch.tensor([1, 2, 3, -100, 5])
        >>> stats = prefcore.linear_logprobs(hidden, weight, targets, outputs=("entropy",))
        >>> stats.logps.sum().backward()
    """
    names = check_logit_options(softcap, logit_scale, ignore_index, outputs)
    check_head_tensors(hidden, weight, targets, bias)
    check_low_rank(low_rank, hidden, weight)
    _check_options(schedule, memory_budget, drop_zero_rows, process_group)
    run = resolve(impl, "linear_logprobs", hidden.device)
    hidden, bias, low_rank = head_of_one_type(hidden, weight, bias, low_rank, logits_dtype)
    check_weight_grad_out(weight_grad_out, weight)
    number, per_row = row_temperature(temperature, targets, hidden)
    grad = torch.is_grad_enabled()
    inner, outer = low_rank or (None, None)
    states_grad, head_grad = (
        grad and any(x is not None and x.requires_grad for x in tensors)
        for tensors in ((hidden, inner), (weight, outer, bias))
    )
    chosen = _plan.choose(schedule, states_grad, head_grad)
    if run == "reference":
        if schedule != "auto" or memory_budget is not None or weight_grad_out is not None or drop_zero_rows:
            raise NotImplementedError(
                "impl='reference' materialises the logits: it serves neither schedule nor memory_budget nor "
                "weight_grad_out nor drop_zero_rows"
            )
        check_targets(targets.reshape(-1), weight.shape[0], ignore_index, per_row)
        return reference.linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            low_rank=low_rank,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            outputs=tuple(names),
            logits_dtype=logits_dtype,
        )
    settings = HeadSettings(
        **stats_settings(number, softcap, logit_scale, ignore_index, names),
        logits_dtype=logits_dtype,
        schedule=chosen,
        memory_budget=memory_budget,
        # A compiled graph has fixed the shape of what is retained.
        replan=not torch.compiler.is_compiling(),
    )
    inner_only = low_rank is not None and not hidden.requires_grad
    hidden, outer = join_low_rank(hidden, low_rank)
    inputs = hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1).contiguous(), bias, per_row, outer
    *stats, state = _LinearLogprobs.apply(*inputs, weight_grad_out, drop_zero_rows, inner_only, run, settings)
    values = list(stats)
    if chosen == "frozen" and settings.entropy:
        values[1] = _FrozenEntropy.apply(*inputs, values[1], state, drop_zero_rows, inner_only, run, settings)
    return token_stats(values, names, targets.shape)


def _check_options(schedule: str, memory_budget: int | None, drop_zero_rows: bool, process_group: Any) -> None:
    if process_group is not None:
        raise NotImplementedError("process_group: a head sharded over its vocabulary is not built yet; pass None")
    _plan.check_schedule(schedule)
    check_type("drop_zero_rows", drop_zero_rows, bool)
    check_memory_budget(memory_budget)
