"""Divergences of two distributions per token, of logits that exist already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefcore import reference
from prefcore._impl import Impl, resolve
from prefcore._types import PairStats
from prefcore.ops import _pair
from prefcore.ops._arguments import check_float, check_same_device, check_target_dtype, check_targets
from prefcore.ops._autograd import once_differentiable
from prefcore.ops._backends import BACKENDS, Backend
from prefcore.ops._checks import check_type
from prefcore.ops._pair import PairGrads, PairSettings, RowPair
from prefcore.ops._pair_arguments import NO_TOKEN, Kind, Same, check_kind, check_sides, pair_settings, pair_stats
from prefcore.ops._register import register
from prefcore.ops._spec import CROSS_ROWS, Coef, Side
from prefcore.ops._stats import accumulator_dtype, new_state, row_gradient
from prefcore.ops.logprobs import matrices

_INPUTS = "Tensor logits, Tensor? temperature, Tensor other_logits, Tensor? other_temperature, Tensor targets"
_GRADS = ", ".join(f"Tensor? g_{name}" for name in PairGrads._fields)
_SAVED = ", ".join(f"Tensor {name}" for name in (*RowPair._fields, "states"))


def _forward_fake(
    logits: Tensor, temperature: Tensor | None, other_logits: Tensor, other_temperature: Tensor | None,
    targets: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    T = targets.shape[0]
    states = logits.new_empty((2, 3, T), dtype=accumulator_dtype(logits.dtype))
    return *_pair.stats_like(T, logits, PairSettings(*rest)), states


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    logits, other_logits, needs = arguments[5], arguments[7], arguments[17:19]
    return _room(logits, needs[0]), _room(other_logits, needs[1])


def _room(logits: Tensor, needed: bool) -> Tensor:
    """For a gradient."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format) if needed else logits.new_empty(0)


class _Launchers:
    """The operators' bodies over one back end."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def forward(
        self, logits: Tensor, temperature: Tensor | None, other_logits: Tensor, other_temperature: Tensor | None,
        targets: Tensor, *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        settings, vocab = PairSettings(*rest), logits.shape[-1]
        for own in (temperature, other_temperature):
            check_targets(targets, vocab, settings.ignore_index, own)
        states = [new_state(targets.shape[0], logits) for _ in range(2)]
        cross = states[0].new_zeros(CROSS_ROWS, targets.shape[0])
        pairs = self.backend.load_pairs()
        for rows, p, q in _sides((logits, other_logits), (temperature, other_temperature), states, settings):
            if settings.spec.needs_totals:
                for side in (p, q):
                    self.backend.load().stats(
                        side.tile, 0, targets[rows], side.temperature, None, side.spec, side.state
                    )  # fmt: skip
                pairs.sums(p, q, 0, targets[rows], settings.spec, cross[:, rows])
            else:
                pairs.stats(p, q, 0, targets[rows], settings.spec, cross[:, rows])
        stats = _pair.finish((states[0], states[1]), cross, targets, settings)
        return *stats, torch.stack([state[:3] for state in states])

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        grads, inputs, stats = PairGrads(*arguments[:5]), arguments[5:10], RowPair(*arguments[10:16])
        logits, temperature, other_logits, other_temperature, targets = inputs
        states, needs, settings = arguments[16], arguments[17:19], PairSettings(*arguments[19:])
        found = [_room(x, needed) for x, needed in zip((logits, other_logits), needs, strict=True)]
        ignored = targets == settings.ignore_index
        coefs = []
        for index in (0, 1):
            scale, coef = _pair.coefficients(grads, index, stats, ignored)
            coef[: Coef.H] *= scale  # nothing follows that could multiply it
            coefs.append(coef)
        outs = [out.view(-1, logits.shape[-1]) if needed else None for out, needed in zip(found, needs, strict=True)]
        both = (logits, other_logits), (temperature, other_temperature), list(states), settings
        if grads.divergence is None:  # no side then needs the other's logits
            for rows, *sides in _sides(*both):
                for index, (side, out) in enumerate(zip(sides, outs, strict=True)):
                    if out is not None:
                        own = row_gradient(*grads.of_side(index), ignored, stats.divergence.dtype).coefficients()
                        entropy = (stats.entropy, stats.other_entropy)[index]
                        self.backend.load().grad(
                            side.tile, out[rows], 0, targets[rows], side.temperature, None, side.spec, side.state,
                            entropy[rows] if entropy.numel() else None, own[:, rows],
                        )  # fmt: skip
            return found[0], found[1]
        for rows, p, q in _sides(*both):
            p_out, q_out = (None if out is None else out[rows] for out in outs)
            p_coef, q_coef = (coef[:, rows] if need else None for coef, need in zip(coefs, needs, strict=True))
            self.backend.load_pairs().grad(p, q, p_out, q_out, 0, targets[rows], settings.spec, p_coef, q_coef)
        return found[0], found[1]


def _sides(logits: tuple, temperatures: tuple, states: list[Tensor], settings: PairSettings) -> Iterator:
    """Rows, and both sides of them, as often as views of both as matrices take."""
    vocab = logits[0].shape[-1]
    for rows, tiles in matrices(*logits):
        p, q = (
            Side(tile, None if own is None else own[rows], None, side.spec(vocab), state[:, rows])
            for tile, own, side, state in zip(tiles, temperatures, settings.sides, states, strict=True)
        )
        yield rows, p, q


class _Operators(NamedTuple):
    forward: Any
    backward: Any


def _register(impl: str) -> _Operators:
    backend = BACKENDS[impl]
    launch, schema = _Launchers(backend), PairSettings.SCHEMA
    stats = ", ".join(["Tensor"] * 7)
    return _Operators(
        register(f"divergence_forward_{impl}({_INPUTS}, {schema}) -> ({stats})", launch.forward, _forward_fake,
                 backend.key),
        register(
            f"divergence_backward_{impl}({_GRADS}, {_INPUTS}, {_SAVED}, bool logits_grad, bool other_logits_grad, "
            f"{schema}) -> (Tensor, Tensor)",
            launch.backward, _backward_fake, backend.key,
        ),
    )  # fmt: skip


OPERATORS = {impl: _register(impl) for impl in BACKENDS}


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, impl, settings = arguments
        ctx.set_materialize_grads(False)
        *stats, states = OPERATORS[impl].forward(*inputs, *settings.flat())
        ctx.save_for_backward(*inputs, *stats, states)
        ctx.options = impl, settings
        return tuple(stats[:5])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        impl, settings = ctx.options
        # Traced, an output that was not wanted receives an empty gradient instead of none.
        found = [g if want else None for g, want in zip(grads, settings.wanted[:5], strict=True)]
        if all(g is None for g in found):
            return (None,) * 7
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        d_logits, d_other = OPERATORS[impl].backward(*found, *ctx.saved_tensors, *needs, *settings.flat())
        return (d_logits if needs[0] else None, None, d_other if needs[1] else None, *(None,) * 4)


def divergence(
    logits: Tensor,
    other_logits: Tensor,
    targets: Tensor | None = None,
    *,
    kind: Kind,
    alpha: float | None = None,
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    other_temperature: float | Tensor | Same = "same",
    other_softcap: float | Same | None = "same",
    other_logit_scale: float | Same = "same",
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    impl: Impl = "auto",
) -> PairStats:
    """A divergence over the whole vocabulary between p = softmax(z) and q = softmax(other z), for each row of logits.

    z = softcap(logit_scale·logits)/temperature, on each side with its own. ``kind``, its parameter and the results are
    those of :func:`prefcore.linear_divergence`, which needs no logits. The KLs and ``alpha`` read the logits once,
    ``js`` and ``tv`` twice; no tensor of their size is made but, in the backward, the gradient of each side that
    requires one.

    Args:
        logits: ``[..., V]``, float32, float64, bfloat16 or float16; a view such as ``logits[:, :-1]`` is not copied.
        other_logits: of the same shape, type and device.
        targets: ``[...]`` int64 token ids, for ``logps`` and ``other_logps``; ``ignore_index`` marks a row to skip.
            None scores no token and skips no row.
        kind, alpha, beta: as in :func:`prefcore.linear_divergence`.
        temperature, softcap, logit_scale: as in :func:`prefcore.logprobs`.
        other_temperature, other_softcap, other_logit_scale: of the other side; by default the same as the first's.
        ignore_index: such rows return zeros and get zero gradients, whatever their logits hold.
        outputs: any of ``entropy``, ``other_entropy``.
        impl: ``auto`` is ``cpu`` or ``triton`` by the tensors' device; a named one is used or refused.

    Returns:
        :class:`PairStats`, shaped like the rows, float32 (float64 for float64 logits), differentiable once with any
        upstream gradients.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: a shape, dtype, device or value that does not fit; on a CPU, and on a GPU with
            ``PREFCORE_CHECK=1``, a target outside the vocabulary. Unchecked, its log-probabilities are NaN.
        NotImplementedError: a temperature that requires a gradient, a DTensor, an implementation that this
            installation lacks.

    Example:
        >>> import torch, prefcore
        >>> student, teacher = torch.randn(2, 5, 100, requires_grad=True), torch.randn(2, 5, 100)
        >>> stats = prefcore.divergence(student, teacher, kind="js", beta=0.1)
        >>> stats.divergence.mean().backward()
    """
    chosen = check_kind(kind, alpha, beta)
    check_type("logits", logits, Tensor)
    check_type("other_logits", other_logits, Tensor)
    check_type("targets", targets, Tensor, optional=True)
    if logits.ndim < 1 or logits.shape[-1] == 0 or other_logits.shape != logits.shape:
        raise ValueError(
            f"expected logits and other_logits [..., V] of one shape with V >= 1, got {tuple(logits.shape)} and "
            f"{tuple(other_logits.shape)}"
        )
    rows = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device) if targets is None else targets
    if rows.shape != logits.shape[:-1]:
        raise ValueError(f"expected targets {tuple(logits.shape[:-1])} as logits have rows, got {tuple(rows.shape)}")
    check_float("logits", logits.dtype)
    if other_logits.dtype != logits.dtype:
        raise ValueError(f"other_logits must have the dtype of logits, {logits.dtype}, got {other_logits.dtype}")
    check_same_device(logits=logits, other_logits=other_logits, targets=rows)
    check_target_dtype(rows)
    first, other, names = check_sides(
        logits, rows, temperature, softcap, logit_scale, other_temperature, other_softcap, other_logit_scale,
        ignore_index, outputs,
    )  # fmt: skip
    if targets is None:
        ignore_index = NO_TOKEN
    run = resolve(impl, "divergence", logits.device)
    if run == "reference":
        check_targets(rows.reshape(-1), logits.shape[-1], ignore_index, None)
        return reference.divergence(
            logits, other_logits, targets, kind=kind, alpha=chosen.mixture, beta=chosen.mixture,
            temperature=temperature, softcap=softcap, logit_scale=logit_scale,
            other_temperature=temperature if isinstance(other_temperature, str) else other_temperature,
            other_softcap=other.softcap, other_logit_scale=other.logit_scale, ignore_index=ignore_index,
            outputs=tuple(names),
        )  # fmt: skip

    def rows_apart(x: Tensor) -> Tensor:
        return x.contiguous() if x.stride(-1) != 1 and x.shape[-1] > 1 else x

    sides = [(rows_apart(logits), first.temperatures), (rows_apart(other_logits), other.temperatures)]
    options = [first, other]
    if chosen.exchanged:
        sides, options = sides[::-1], options[::-1]
    settings = PairSettings(**pair_settings(chosen, (options[0], options[1]), ignore_index, names))
    values = _Divergence.apply(*sides[0], *sides[1], rows.reshape(-1).contiguous(), run, settings)
    return pair_stats(values, chosen, names, targets is not None, rows)
