"""Divergences of two distributions per token, from hidden states and head weights, without ``[T, V]`` logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prefcore import reference
from prefcore._impl import Impl, resolve
from prefcore._types import PairStats
from prefcore.ops import _pair, _pair_walk, _plan
from prefcore.ops._arguments import (
    check_head_tensors,
    check_low_rank,
    check_memory_budget,
    check_targets,
    check_weight_grad_out,
    head_of_one_type,
    join_low_rank,
)
from prefcore.ops._autograd import once_differentiable
from prefcore.ops._backends import BACKENDS, Backend
from prefcore.ops._checks import check_type
from prefcore.ops._pair import PairGrads, RowPair
from prefcore.ops._pair_arguments import NO_TOKEN, Kind, Same, check_kind, check_sides, pair_settings, pair_stats
from prefcore.ops._pair_walk import HeadInputs, Kernels, LinearPairSettings, PairSaved
from prefcore.ops._register import register
from prefcore.ops._stats import accumulator_dtype
from prefcore.ops._walk import Into, Needs

Schedule = Literal["auto", "forward", "retain", "recompute"]

_SIDE = "Tensor {0}hidden, Tensor {0}weight, Tensor? {0}bias, Tensor? {0}temperature, Tensor? {0}outer"
_INPUTS = f"{_SIDE.format('')}, {_SIDE.format('other_')}, Tensor targets"
_GRADS = ", ".join(f"Tensor? g_{name}" for name in PairGrads._fields)
_SAVED = ", ".join(f"Tensor {name}" for name in (*RowPair._fields, *PairSaved._fields))
_NEEDS = ", ".join(f"bool {prefix}{name}_grad" for prefix in ("", "other_") for name in Needs._fields)
_OPTIONS = "bool drop_zero_rows, Tensor(a!)? weight_grad_out, Tensor(b!)? other_weight_grad_out"
_OUTPUTS = len(RowPair._fields) + len(PairSaved._fields)


def _read(inputs: Sequence[Any]) -> tuple[HeadInputs, HeadInputs, Tensor, LinearPairSettings]:
    """Inputs and settings, as they lie in an operator's arguments."""
    return HeadInputs(*inputs[:5]), HeadInputs(*inputs[5:10]), inputs[10], LinearPairSettings(*inputs[11:])


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    p, _, targets, settings = _read(arguments)
    T = targets.shape[0]
    rows = torch.sym_min(T, _pair_walk.limits(p, settings).retained_rows)
    states = p.hidden.new_empty((2, 3, T), dtype=accumulator_dtype(p.hidden.dtype))
    return *_pair.stats_like(T, p.hidden, settings), states, _pair_walk.retained_like(p, settings, rows)


class _BackwardArguments(NamedTuple):
    grads: PairGrads
    inputs: tuple
    stats: RowPair
    saved: PairSaved
    needs: tuple[Needs, Needs]
    drop_zero_rows: bool
    outs: tuple[Tensor | None, Tensor | None]
    settings: tuple

    @classmethod
    def read(cls, arguments: Sequence[Any]) -> _BackwardArguments:
        left = iter(arguments)

        def take(count: int) -> tuple:
            return tuple(next(left) for _ in range(count))

        return cls(
            PairGrads(*take(5)), take(11), RowPair(*take(6)), PairSaved(*take(2)), (Needs(*take(4)), Needs(*take(4))),
            next(left), (next(left), next(left)), tuple(left),
        )  # fmt: skip

    def flat(self) -> tuple:
        return (
            *self.grads, *self.inputs, *self.stats, *self.saved, *self.needs[0], *self.needs[1], self.drop_zero_rows,
            *self.outs, *self.settings,
        )  # fmt: skip


def _backward_fake(*arguments: Any) -> list[Tensor]:
    call = _BackwardArguments.read(arguments)
    results = []
    for inputs, needs, out in zip((call.inputs[:5], call.inputs[5:10]), call.needs, call.outs, strict=True):
        side, returned = HeadInputs(*inputs), needs.weight and out is None
        hidden, weight = side.hidden, side.weight
        results += [
            hidden.new_empty(hidden.shape if needs.states else (0, hidden.shape[1])),
            side.trained.new_empty(side.trained.shape if returned else (0,)),
            hidden.new_empty((weight.shape[0] if needs.bias else 0,)),
        ]
    return results


class _Launchers:
    """The operators' bodies over one back end."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def kernels(self) -> Kernels:
        return Kernels(self.backend.load(), self.backend.load_pairs())

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        p, q, targets, settings = _read(arguments)
        for side in (p, q):
            check_targets(targets, side.weight.shape[0], settings.ignore_index, side.temperature)
        with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):
            stats, saved = _pair_walk.forward(self.kernels(), p, q, targets, settings)
        return *stats, *saved

    def backward(self, *arguments: Any) -> list[Tensor]:
        call = _BackwardArguments.read(arguments)
        p, q, targets, settings = _read((*call.inputs, *call.settings))
        into = Into(call.outs[0]), Into(call.outs[1])
        with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):
            return _pair_walk.backward(
                self.kernels(), call.grads, p, q, targets, call.stats, call.saved, call.needs, call.drop_zero_rows,
                into, settings,
            )  # fmt: skip


class _Operators(NamedTuple):
    forward: Any
    backward: Any


def _register(impl: str) -> _Operators:
    backend = BACKENDS[impl]
    launch, schema = _Launchers(backend), LinearPairSettings.SCHEMA
    outputs = ", ".join(["Tensor"] * _OUTPUTS)
    gradients = ", ".join(["Tensor"] * 6)
    return _Operators(
        register(
            f"linear_divergence_forward_{impl}({_INPUTS}, {schema}) -> ({outputs})",
            launch.forward,
            _forward_fake,
            backend.key,
        ),
        register(
            f"linear_divergence_backward_{impl}({_GRADS}, {_INPUTS}, {_SAVED}, {_NEEDS}, {_OPTIONS}, {schema}) "
            f"-> ({gradients})",
            lambda *arguments: tuple(launch.backward(*arguments)),
            lambda *arguments: tuple(_backward_fake(*arguments)),
            backend.key,
        ),
    )


OPERATORS = {impl: _register(impl) for impl in BACKENDS}


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, out, other_out, drop_zero_rows, inner_only, impl, settings = arguments
        ctx.set_materialize_grads(False)
        outputs = OPERATORS[impl].forward(*inputs, *settings.flat())
        stats, saved = RowPair(*outputs[:6]), PairSaved(*outputs[6:])
        ctx.save_for_backward(*inputs, *stats, *saved)
        # The buffers are not saved through autograd: others may add to them between forward and backward.
        ctx.options = (out, other_out), drop_zero_rows, inner_only, impl, settings
        return tuple(stats[:5])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        outs, drop_zero_rows, inner_only, impl, settings = ctx.options
        # Traced, an output that was not wanted receives an empty gradient instead of none.
        found = PairGrads(*(g if want else None for g, want in zip(grads, settings.wanted[:5], strict=True)))
        nothing: tuple[None, ...] = (None,) * 17
        if all(g is None for g in found):
            return nothing
        saved = ctx.saved_tensors
        if drop_zero_rows and saved[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("drop_zero_rows=True reads a count back from the device, which a graph cannot capture")

        def wanted(first: int, side: HeadInputs, inner_only: bool) -> Needs:
            hidden, weight, bias, _, outer = ctx.needs_input_grad[first : first + 5]
            low_rank = side.outer is not None
            return Needs(hidden and not inner_only, outer if low_rank else weight, bias, hidden and low_rank)

        sides = HeadInputs(*saved[:5]), HeadInputs(*saved[5:10])
        needs = wanted(0, sides[0], inner_only[0]), wanted(5, sides[1], inner_only[1])
        call = _BackwardArguments(
            found, saved[:11], RowPair(*saved[11:17]), PairSaved(*saved[17:]), needs, drop_zero_rows, outs,
            settings.flat(),
        )  # fmt: skip
        gradients = OPERATORS[impl].backward(*call.flat())
        for out in outs:
            if out is not None:
                torch.autograd.graph.increment_version(out)

        def given(side: HeadInputs, need: Needs, out: Tensor | None, found: Sequence[Tensor]) -> tuple:
            d_hidden, d_trained, d_bias = (
                gradient if wanted else None
                for gradient, wanted in zip(found, (need.states, need.weight and out is None, need.bias), strict=True)
            )
            d_weight, d_outer = (d_trained, None) if side.outer is None else (None, d_trained)
            return d_hidden, d_weight, d_bias, None, d_outer

        return (
            *given(sides[0], needs[0], outs[0], gradients[:3]),
            *given(sides[1], needs[1], outs[1], gradients[3:]),
            *nothing[10:],
        )


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    targets: Tensor | None = None,
    *,
    kind: Kind,
    alpha: float | None = None,
    beta: float | None = None,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    other_bias: Tensor | None = None,
    other_low_rank: tuple[Tensor, Tensor] | None = None,
    other_temperature: float | Tensor | Same = "same",
    other_softcap: float | Same | None = "same",
    other_logit_scale: float | Same = "same",
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    schedule: Schedule = "auto",
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    weight_grad_out: Tensor | None = None,
    other_weight_grad_out: Tensor | None = None,
    drop_zero_rows: bool = False,
    process_group: Any = None,
    impl: Impl = "auto",
) -> PairStats:
    """A divergence over the whole vocabulary between p = softmax(z) and q = softmax(other z), for each token.

    Equal to ``prefcore.divergence(linear(hidden, weight, bias), linear(other_hidden, other_weight, other_bias), …)``
    without the logits. z = softcap(logit_scale·(h·Wᵀ + b))/temperature, on each side with its own. Where p is a policy
    and q its reference, ``kl_pq`` is the penalty of RLHF, KL(π‖π_ref); where q is a teacher, ``kl_qp`` is the forward
    KL of distillation, KL(teacher‖student).

    | kind | value | parameter |
    | --- | --- | --- |
    | ``kl_pq`` | KL(p‖q) = Σ p·log(p/q) | |
    | ``kl_qp`` | KL(q‖p) | |
    | ``js`` | beta·KL(p‖m) + (1 - beta)·KL(q‖m), m = beta·p + (1 - beta)·q (Agarwal et al. 2023, GKD) | ``beta`` |
    | ``alpha`` | (1 - Σ p^alpha·q^(1 - alpha))/(alpha·(1 - alpha)) (Amari); at 1/2, 4 - 4·Σ √(p·q) | ``alpha`` |
    | ``tv`` | total variation, Σ abs(p - q)/2 | |

    Either side gets its gradient if it requires one; a side that does not costs no product for it, only its logits. U,
    the product of the size of a head, is 2·T·D·V flops. In the forward each side costs 1 U (2 U for ``js`` and ``tv``
    if a tile cannot hold 256 whole rows of both), in the backward 1 U for each hidden state and each weight
    that requires a gradient, and another for each side whose logits were not retained. Log-probabilities and entropies
    come from the same logits; a backward through them alone computes no logits of the other side.

    Args:
        hidden: ``[..., D]``, float32, float64, bfloat16 or float16.
        weight: ``[V, D]``, the head's weight, on the same device, of any type that :func:`prefcore.linear_logprobs`
            takes beside that of ``hidden``: converted slice by slice, with a gradient in its own.
        other_hidden: ``[..., E]``, of the same leading shape, type and device; E may differ from D.
        other_weight: ``[V, E]``, of any such type; it may be ``weight`` itself.
        targets: ``[...]`` int64 token ids, for ``logps`` and ``other_logps``; ``ignore_index`` marks a row to skip.
            None scores no token and skips no row.
        kind: which divergence, as above. A KL is infinite where the distribution that it averages over has probability
            and the other has none; that one's gradient is then infinite or NaN, or none if the loss masks the row out.
        alpha, beta: the parameter of ``alpha`` and ``js``, between 0 and 1; 1/2 by default. ``beta`` is p's share of
            the mixture: where q is the teacher, the beta of GKD and of TRL, the teacher's share, is 1 - ``beta``. Near
            0 and 1 rounding errors of ``alpha`` grow by 1/(alpha·(1 - alpha)); its limits are the KLs.
        bias, other_bias: ``[V]`` or None, of any such type; they are cast to that of ``hidden``.
        low_rank, other_low_rank: ``(inner [..., R], outer [V, R])`` or None, of either side, as in
            :func:`prefcore.linear_logprobs`: ``outer`` trains in place of that side's weight.
        temperature, softcap, logit_scale: as in :func:`prefcore.linear_logprobs`.
        other_temperature, other_softcap, other_logit_scale: of the other side; by default the same as the first's.
        ignore_index: such rows return zeros and get zero gradients, whatever their hidden states hold.
        outputs: any of ``entropy``, ``other_entropy``.
        schedule: ``retain`` keeps the logits of both sides until the backward, ``recompute`` none; ``auto`` keeps those
            of as many rows as the budget holds. Without a gradient to take every name runs ``forward``.
        memory_budget: bytes of logits of both sides held at once; 1/16 of the device's memory by default. Tiles have
            128 rows and 1024 columns at the least. ``retain`` exceeds the default budget, not a given one.
        logits_dtype: None rounds logits to the type of ``hidden``, as models do; ``torch.float32`` keeps the GEMM's
            sums.
        weight_grad_out, other_weight_grad_out: ``[V, D]`` and ``[V, E]``, float32 or of the weight's type: the weight's
            gradient is added to it in place, and autograd gets none for that weight.
        drop_zero_rows: leave rows whose upstream gradients are zero out of the backward. On a GPU it costs one
            synchronisation per backward; on a CPU it is done where they are an eighth or more.
        process_group: for heads sharded over their vocabulary; not built yet.
        impl: ``auto`` is ``cpu`` or ``triton`` by the tensors' device; a named one is used or refused.

    Returns:
        :class:`PairStats`, shaped like the rows, float32 (float64 for float64 inputs), differentiable once with any
        upstream gradients.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device or value that does not fit, vocabularies of different sizes among them; on a
            CPU, and on a GPU with ``PREFCORE_CHECK=1``, a target outside the vocabulary. Unchecked, that row's
            log-probabilities and gradients are NaN.
        NotImplementedError: ``process_group``; a temperature that requires a gradient; a weight that does beside its
            low-rank part; a sharded weight (DTensor); an implementation that this installation lacks.
        RuntimeError: ``drop_zero_rows`` while a CUDA graph is captured.

    Example:
        >>> import torch, prefcore
        >>> hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(100, 8)
        >>> reference = torch.randn(5, 8)
        >>> stats = prefcore.linear_divergence(hidden, weight, reference, weight, kind="kl_pq")
        >>> stats.divergence.sum().backward()
    """
    divergence = check_kind(kind, alpha, beta)
    check_type("hidden", hidden, Tensor)
    rows = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device) if targets is None else targets
    check_head_tensors(hidden, weight, rows, bias)
    _check_other(hidden, weight, other_hidden, other_weight, rows, other_bias)
    check_low_rank(low_rank, hidden, weight)
    check_low_rank(other_low_rank, other_hidden, other_weight, "other_low_rank")
    _check_options(schedule, memory_budget, drop_zero_rows, process_group)
    run = resolve(impl, "linear_divergence", hidden.device)
    hidden, bias, low_rank = head_of_one_type(hidden, weight, bias, low_rank, logits_dtype)
    other_hidden, other_bias, other_low_rank = head_of_one_type(
        other_hidden, other_weight, other_bias, other_low_rank, logits_dtype
    )
    if other_hidden.dtype != hidden.dtype:
        raise ValueError(f"expected both sides of one dtype, got {hidden.dtype} and {other_hidden.dtype}; convert one")
    check_weight_grad_out(weight_grad_out, weight)
    try:
        check_weight_grad_out(other_weight_grad_out, other_weight)
    except (TypeError, ValueError) as error:
        raise type(error)(f"other_{error}") from None
    first, other, names = check_sides(
        hidden, rows, temperature, softcap, logit_scale, other_temperature, other_softcap, other_logit_scale,
        ignore_index, outputs,
    )  # fmt: skip
    if targets is None:
        ignore_index = NO_TOKEN
    if run == "reference":
        if schedule != "auto" or memory_budget is not None or drop_zero_rows:
            raise NotImplementedError(
                "impl='reference' materialises the logits: it serves neither schedule nor memory_budget nor "
                "drop_zero_rows"
            )
        if weight_grad_out is not None or other_weight_grad_out is not None:
            raise NotImplementedError("impl='reference' hands gradients to autograd alone: no weight_grad_out")
        check_targets(rows.reshape(-1), weight.shape[0], ignore_index, None)
        return reference.linear_divergence(
            hidden, weight, other_hidden, other_weight, targets, kind=kind, bias=bias, other_bias=other_bias,
            low_rank=low_rank, other_low_rank=other_low_rank,
            alpha=divergence.mixture, beta=divergence.mixture, ignore_index=ignore_index, logits_dtype=logits_dtype,
            temperature=temperature, softcap=softcap, logit_scale=logit_scale, outputs=tuple(names),
            other_temperature=temperature if other_temperature == "same" else other_temperature,
            other_softcap=other.softcap, other_logit_scale=other.logit_scale,
        )  # fmt: skip
    # Dynamo does not trace a function that gets one tensor twice, such as a head that both sides share, or its buffer.
    inner_only = tuple(
        part is not None and not states.requires_grad
        for states, part in ((hidden, low_rank), (other_hidden, other_low_rank))
    )
    hidden, outer = join_low_rank(hidden, low_rank)
    other_hidden, other_outer = join_low_rank(other_hidden, other_low_rank)
    flat, other_flat = (x.reshape(-1, x.shape[-1]) for x in (hidden, other_hidden))
    sides = [
        (flat, weight, bias, first.temperatures, outer),
        tuple(
            y.view_as(y) if y is not None and y is x else y
            for x, y in zip(
                (flat, weight, bias, first.temperatures, outer),
                (other_flat, other_weight, other_bias, other.temperatures, other_outer),
                strict=True,
            )
        ),
    ]
    if other_weight_grad_out is weight_grad_out and other_weight_grad_out is not None:
        other_weight_grad_out = other_weight_grad_out.view_as(other_weight_grad_out)
    options, outs = [first, other], (weight_grad_out, other_weight_grad_out)
    if divergence.exchanged:
        sides, options, outs, inner_only = sides[::-1], options[::-1], outs[::-1], inner_only[::-1]
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for side in sides for x in side)
    settings = LinearPairSettings(
        **pair_settings(divergence, (options[0], options[1]), ignore_index, names),
        logits_dtype=logits_dtype,
        schedule=_plan.choose_pair(schedule, grad),
        memory_budget=memory_budget,
        # A compiled graph has fixed the shape of what is retained.
        replan=not torch.compiler.is_compiling(),
    )
    values = _LinearDivergence.apply(
        *sides[0], *sides[1], rows.reshape(-1).contiguous(), *outs, drop_zero_rows, inner_only, run, settings
    )
    return pair_stats(values, divergence, names, targets is not None, rows)


def _check_other(
    hidden: Tensor, weight: Tensor, other_hidden: Tensor, other_weight: Tensor, rows: Tensor, other_bias: Tensor | None
) -> None:
    check_type("other_hidden", other_hidden, Tensor)
    check_type("other_weight", other_weight, Tensor)
    if other_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"expected other_hidden [..., E] with the rows of hidden, {tuple(hidden.shape)}, "
            f"got {tuple(other_hidden.shape)}"
        )
    try:
        check_head_tensors(other_hidden, other_weight, rows, other_bias)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"of the other side: {error}") from None
    if other_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"expected one vocabulary, got weight {tuple(weight.shape)} and other_weight {tuple(other_weight.shape)}; "
            "where one is padded, cut it: other_weight[:V]"
        )


def _check_options(schedule: str, memory_budget: int | None, drop_zero_rows: bool, process_group: Any) -> None:
    if process_group is not None:
        raise NotImplementedError("process_group: a head sharded over its vocabulary is not built yet; pass None")
    _plan.check_schedule(schedule, _plan.PAIR_SCHEDULES)
    check_type("drop_zero_rows", drop_zero_rows, bool)
    check_memory_budget(memory_budget)
