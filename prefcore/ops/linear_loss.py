"""A loss of token statistics and its gradients tile by tile: whole groups go forward, through the loss, and back."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefcore import reference
from prefcore._impl import Impl, resolve
from prefcore._types import LinearLoss, Tile, TokenStats
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
from prefcore.ops._checks import check_number, check_offset_values, check_type, check_values
from prefcore.ops._memory import empty
from prefcore.ops._stats import accumulator_dtype
from prefcore.ops._walk import HeadSettings, Into, Needs, Saved

LossFn = Callable[[TokenStats, Tile], Tensor]
Offsets = Tensor | Sequence[int]


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Offsets,
    loss_fn: LossFn,
    *,
    cu_groups: Offsets | None = None,
    weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    outputs: Sequence[str] = (),
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    weight_grad_out: Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    drop_zero_rows: bool = False,
    process_group: Any = None,
    impl: Impl = "auto",
) -> LinearLoss:
    """A loss that separates over groups of sequences, and its gradients, in 3 U at the memory of one tile.

    Equal to ``(weights * losses).sum() / normalizer`` with ``losses = loss_fn(linear_logprobs(…), batch)``. A tile of
    whole groups goes forward, ``loss_fn`` is differentiated with respect to its token statistics, and the tile's logits
    become gradients in place: the logits of the batch never exist, and none are computed twice (U = 2·T·D·V flops; 2 U
    where neither weight nor bias needs a gradient, 1 U where nothing does). A group whose logits exceed the budget is
    recomputed as far as they do, up to 4 U for its rows. ``prefcore.plan(…, schedule="loop")`` says beforehand.

    All gradients are found in the forward, for an upstream gradient of 1, and kept in float32 until the backward
    multiplies them: ``[T, D]``, and ``[V, D]`` where the weight trains. So loss scaling is exact in every dtype.
    ``backward(retain_graph=True)`` may be repeated; without it the backward scales them in place and so consumes them.

    Not traced: ``torch.compile`` breaks its graph here and runs this call as it is.

    Args:
        hidden: ``[T, D]``, float32, float64, bfloat16 or float16.
        weight: ``[V, D]``, the head's weight, on the same device, of any type that :func:`linear_logprobs` takes beside
            that of ``hidden``; it is converted slice by slice, and its gradient not rounded to another type than its.
        targets: ``[T]`` int64 token ids; ``ignore_index`` marks a row to skip.
        cu_seqlens: int32 ``[S + 1]``, offsets of the sequences into T. The host reads them: a GPU's tensor
            synchronises, a CPU's tensor or a list of ints does not. A CUDA graph can only be captured with a pinned
            tensor of the CPU, whose values must stay, as each replay copies them.
        loss_fn: ``loss_fn(stats, tile) -> [n]``, float32 or float64: unreduced losses of the tile's groups, sequences
            or tokens, such that those of one tile after another are those of the batch. They may depend on the tile's
            own statistics (a :class:`TokenStats` of the tile's tokens) and on constants alone, which
            ``tile.tokens``, ``tile.sequences`` and ``tile.groups`` index. With ``PREFCORE_CHECK=1`` it is called
            again on other tiles, and must return the same.
        cu_groups: int32 ``[G + 1]``, offsets of the groups into S, as ``cu_seqlens``. A group is never divided between
            tiles. By default each sequence is a group.
        weights: ``[n]`` float constants, of the losses of the whole batch; 1 by default.
        normalizer: a positive number, or a 0-dim tensor, which is neither differentiated nor read by the host; by
            default the number of losses. Under gradient accumulation give the whole step's.
        outputs: statistics beside ``logps`` that ``loss_fn`` sees, as in :func:`linear_logprobs`.
        bias, low_rank, temperature, softcap, logit_scale, ignore_index, logits_dtype: as in :func:`linear_logprobs`. Of
            ``low_rank``, ``outer`` takes the weight's part: its gradient is ``[V, R]``, and 2 U pay for all.
        memory_budget: bytes of logits held at once; 1/16 of the device's memory by default. If it holds fewer than 128
            rows of logits, groups are gathered into larger tiles, which are recomputed.
        weight_grad_out: ``[V, D]``, float32 or of the weight's type: ∂L/∂weight is added to it in place by the
            backward, and autograd gets none for the weight.
        grad_scale: the gradient that will arrive at ``loss``, where it is known (a loss scale; 1 for a plain
            ``loss.backward()``): a number, or a 0-dim tensor. Then the forward itself adds to ``weight_grad_out``, and
            keeps the other gradients in the inputs' types: no float32 buffer lasts until the backward. ``normalizer``
            or ``weights`` must be given. ``weight_grad_out`` is then added to once for each forward, whatever number of
            backwards follows, and rounded once for each tile if it has 16 bits; so not for code that activation
            checkpointing runs twice. If another gradient arrives, those of hidden states and bias and the first row of
            the weight's are NaN (what ``weight_grad_out`` got stays); on a CPU, and on a GPU with
            ``PREFCORE_CHECK=1``, the backward raises.
        drop_zero_rows: leave rows whose gradient is zero out of the gradients' GEMMs. On a GPU it costs one
            synchronisation per tile; on a CPU it is done where they are an eighth or more.
        process_group: for a head sharded over its vocabulary; not built yet.
        impl: ``auto`` is ``cpu`` or ``triton`` by the tensors' device; a named one is used or refused.

    Returns:
        :class:`LinearLoss`: ``loss`` 0-dim, float32 (float64 for float64 inputs), differentiable once with respect to
        hidden states, weight and bias; ``losses [n]`` and ``stats`` (``[T]`` each), detached.

    Raises:
        TypeError: an argument, or a result of ``loss_fn``, of the wrong Python type.
        ValueError: a shape, dtype, device, value or offset that does not fit; losses that change with the tiling, with
            ``PREFCORE_CHECK=1``; a gradient other than ``grad_scale``.
        NotImplementedError: losses that depend on another tensor that requires a gradient; ``weights``, ``normalizer``
            or a temperature that does; a weight that does beside ``low_rank``; ``process_group``; a sharded weight
            (DTensor); an implementation that this installation lacks.
        RuntimeError: a backward after one that consumed the gradients; ``drop_zero_rows`` while a CUDA graph is
            captured.

    Example:
        >>> import torch, prefcore
        >>> hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
        >>> def loss_fn(stats, tile):
        ...     return -prefcore.sequence_reduce(stats.logps, tile.cu_seqlens, "mean")
        >>> out = prefcore.linear_loss(hidden, weight, torch.tensor([1, 2, 3, 4, 5]), [0, 2, 5], loss_fn)
        >>> out.loss.backward()
        >>> out.losses.shape, out.stats.logps.shape
        (torch.Size([2]), torch.Size([5]))
    """
    if torch.compiler.is_compiling():  # an arbitrary function of Python cannot be part of a registered operator
        return torch.compiler.disable(linear_loss)(
            hidden, weight, targets, cu_seqlens, loss_fn, cu_groups=cu_groups, weights=weights, normalizer=normalizer,
            outputs=outputs, bias=bias, low_rank=low_rank, temperature=temperature, softcap=softcap,
            logit_scale=logit_scale, ignore_index=ignore_index, memory_budget=memory_budget, logits_dtype=logits_dtype,
            weight_grad_out=weight_grad_out, grad_scale=grad_scale, drop_zero_rows=drop_zero_rows,
            process_group=process_group, impl=impl,
        )  # fmt: skip
    names = check_logit_options(softcap, logit_scale, ignore_index, outputs)
    check_head_tensors(hidden, weight, targets, bias)
    check_low_rank(low_rank, hidden, weight)
    if hidden.ndim != 2:
        raise ValueError(f"expected hidden [T, D], got {tuple(hidden.shape)}")
    if process_group is not None:
        raise NotImplementedError("process_group: a head sharded over its vocabulary is not built yet; pass None")
    check_memory_budget(memory_budget)
    check_type("drop_zero_rows", drop_zero_rows, bool)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    run = resolve(impl, "linear_loss", hidden.device)
    hidden, bias, low_rank = head_of_one_type(hidden, weight, bias, low_rank, logits_dtype)
    check_weight_grad_out(weight_grad_out, weight)
    number, per_row = row_temperature(temperature, targets, hidden)
    weights = _check_weights(weights, hidden)
    _check_scalar("normalizer", normalizer, hidden, positive=True)
    _check_scalar("grad_scale", grad_scale, hidden, positive=False)
    if grad_scale is not None and normalizer is None and weights is None:
        raise ValueError("grad_scale needs normalizer or weights: the forward must know what the losses are divided by")
    check_targets(targets, weight.shape[0], ignore_index, per_row)
    if drop_zero_rows and hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("drop_zero_rows=True reads a count back from the device, which a graph cannot capture")
    batch = _Batch.make(cu_seqlens, cu_groups, hidden)
    if run == "reference":
        if memory_budget is not None or weight_grad_out is not None or grad_scale is not None or drop_zero_rows:
            raise NotImplementedError(
                "impl='reference' materialises the logits: it serves neither memory_budget nor weight_grad_out nor "
                "grad_scale nor drop_zero_rows"
            )
        return reference.linear_loss(
            hidden, weight, targets, batch.cu_seqlens, loss_fn, cu_groups=batch.cu_groups, weights=weights,
            normalizer=normalizer, bias=bias, low_rank=low_rank, temperature=temperature, softcap=softcap,
            logit_scale=logit_scale, ignore_index=ignore_index, outputs=tuple(names), logits_dtype=logits_dtype,
        )  # fmt: skip
    inner, outer = low_rank or (None, None)
    needs = Needs._make(
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (hidden, weight if outer is None else outer, bias, inner)
    )
    hidden, outer = join_low_rank(hidden, low_rank)
    head = _Head(
        BACKENDS[run].load(), hidden, weight, targets.contiguous(), bias, per_row, outer, needs,
        HeadSettings(
            **stats_settings(number, softcap, logit_scale, ignore_index, names),
            logits_dtype=logits_dtype,
            schedule="loop",
            memory_budget=memory_budget,
            replan=True,
        ),
        names, drop_zero_rows,
    )  # fmt: skip
    # The backward reads them again: the caller's own may have changed by then.
    kept = (x.clone() if isinstance(x, Tensor) else x for x in (normalizer, grad_scale))
    return _run(head, batch, _Reduction(weights, *kept), loss_fn, weight_grad_out)


def _check_weights(weights: Tensor | None, hidden: Tensor) -> Tensor | None:
    check_type("weights", weights, Tensor, optional=True)
    if weights is None:
        return None
    if weights.requires_grad:
        raise NotImplementedError("weights is not differentiable here; detach it")
    if weights.dim() != 1 or not weights.is_floating_point() or weights.device != hidden.device:
        raise ValueError(
            f"expected weights [n] of a float dtype on {hidden.device}, "
            f"got {tuple(weights.shape)} of {weights.dtype} on {weights.device}"
        )
    return weights.to(accumulator_dtype(hidden.dtype))


def _check_scalar(name: str, value: float | Tensor | None, hidden: Tensor, *, positive: bool) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        check_number(name, value, " or a tensor or None")
    else:
        if value.requires_grad:
            raise NotImplementedError(f"{name} is not differentiable here; detach it")
        if value.dim() != 0 or value.dtype == torch.bool or value.is_complex():
            raise ValueError(f"{name} must be 0-dim and real, got {tuple(value.shape)} of {value.dtype}")
        if value.device not in (hidden.device, torch.device("cpu")):
            raise ValueError(f"{name} must be on {hidden.device} or the CPU, got {value.device}")
        if not check_values(value.device):
            return
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} must be {'positive and ' if positive else ''}finite, got {float(value)}")


class _Batch(NamedTuple):
    """The offsets of a batch, where the host reads them and where the closure does."""

    tokens: list[int]  # cu_seqlens
    sequences: list[int]  # cu_groups
    cu_seqlens: Tensor
    cu_groups: Tensor

    @classmethod
    def make(cls, cu_seqlens: Offsets, cu_groups: Offsets | None, hidden: Tensor) -> _Batch:
        tokens = _read_offsets("cu_seqlens", cu_seqlens, hidden.shape[0])
        S = len(tokens) - 1
        sequences = list(range(S + 1)) if cu_groups is None else _read_offsets("cu_groups", cu_groups, S)

        capturing = hidden.is_cuda and torch.cuda.is_current_stream_capturing()

        def there(given: Offsets | None, offsets: list[int]) -> Tensor:
            if given is None:
                return torch.arange(S + 1, dtype=torch.int32, device=hidden.device)
            if isinstance(given, Tensor) and given.device == hidden.device:
                return given
            # A graph copies from where it copied when it was captured: from the caller's pinned memory.
            source = given if capturing and isinstance(given, Tensor) else torch.tensor(offsets, dtype=torch.int32)
            return source.to(hidden.device, non_blocking=True)

        return cls(tokens, sequences, there(cu_seqlens, tokens), there(cu_groups, sequences))

    def tile(self, first: int, last: int) -> Tile:
        """The groups from ``first`` to before ``last``."""
        sequences = slice(self.sequences[first], self.sequences[last])
        tokens = slice(self.tokens[sequences.start], self.tokens[sequences.stop])
        return Tile(
            tokens,
            sequences,
            slice(first, last),
            self.cu_seqlens[sequences.start : sequences.stop + 1] - tokens.start,
            self.cu_groups[first : last + 1] - sequences.start,
        )

    @property
    def groups(self) -> int:
        return len(self.sequences) - 1


def _read_offsets(name: str, offsets: Offsets, total: int) -> list[int]:
    if isinstance(offsets, Tensor):
        check_type(name, offsets, Tensor)
        if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 [n + 1], got {tuple(offsets.shape)} of {offsets.dtype}")
        read = offsets.tolist()
    elif isinstance(offsets, list | tuple) and all(type(x) is int for x in offsets):
        if not offsets:
            raise ValueError(f"{name} must have n + 1 entries, got none")
        read = list(offsets)
    else:
        raise TypeError(f"{name} must be a Tensor or a list of ints, got {type(offsets).__name__}")
    check_offset_values(name, torch.tensor(read), total)
    return read


@dataclasses.dataclass(frozen=True)
class _Head:
    """One call's inputs, and what is wanted of them."""

    kernels: ModuleType
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    temperature: Tensor | None  # [T]
    outer: Tensor | None  # [V, R], for the hidden states' last R columns
    needs: Needs
    settings: HeadSettings
    names: frozenset[str]
    drop_zero_rows: bool

    def schedule(self, name: str) -> HeadSettings:
        return dataclasses.replace(self.settings, schedule=name)

    @property
    def trained(self) -> Tensor:
        """What the weight's gradient is of."""
        return self.weight if self.outer is None else self.outer

    def rows(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        temperature = None if self.temperature is None else self.temperature[rows]
        return self.hidden[rows], self.weight, self.targets[rows], self.bias, temperature, self.outer


class _Reduction(NamedTuple):
    """From losses to a number and its gradient."""

    weights: Tensor | None
    normalizer: float | Tensor | None
    grad_scale: float | Tensor | None

    def divisor(self, count: int) -> float | Tensor:
        return max(count, 1) if self.normalizer is None else self.normalizer

    def weigh(self, losses: Tensor, seen: int) -> Tensor:
        """Losses times their weights, of which ``seen`` belong to the tiles before."""
        if self.weights is None:
            return losses
        stop = seen + losses.shape[0]
        if stop > self.weights.shape[0]:
            raise ValueError(f"weights has {self.weights.shape[0]} entries, but loss_fn returned {stop} losses or more")
        return losses * self.weights[seen:stop]


@dataclasses.dataclass
class _Gradients:
    """What the forward finds for the backward: of an upstream gradient of 1, or of ``promised``."""

    hidden: Tensor | None
    weight: Tensor | None  # None too where it has gone into weight_grad_out
    bias: Tensor | None
    weight_grad_out: Tensor | None  # still to be added to
    divisor: float | Tensor
    promised: float | Tensor | None


def _run(
    head: _Head, batch: _Batch, reduction: _Reduction, loss_fn: LossFn, weight_grad_out: Tensor | None
) -> LinearLoss:
    acc = accumulator_dtype(head.hidden.dtype)
    with torch.no_grad():
        walk = _Tiles(head, batch, reduction, loss_fn, weight_grad_out)
        for first, last in walk.tiles:
            walk.step(batch.tile(first, last))
        losses = torch.cat(walk.losses) if walk.losses else head.hidden.new_empty(0, dtype=acc)
        given = losses if reduction.weights is None else reduction.weights
        if given.shape != losses.shape:
            raise ValueError(f"weights has {given.shape[0]} entries, but loss_fn returned {losses.shape[0]} losses")
        parts = walk.stats or [walk.forward(slice(0, 0), "forward")[0]]
        stats = TokenStats._make(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))
        if os.environ.get("PREFCORE_CHECK") == "1":
            _check_separates(loss_fn, stats, batch, walk.tiles, losses)
        divisor = reduction.divisor(losses.shape[0])
        loss = (reduction.weigh(losses, 0).sum() / divisor).to(acc)
        gradients = walk.gradients(divisor)
    if any(head.needs):
        loss = _Deliver.apply(loss, head.hidden, head.trained, head.bias, gradients)
    return LinearLoss(loss, losses, stats)


class _Tiles:
    """The loop over tiles, with what it gathers."""

    def __init__(
        self, head: _Head, batch: _Batch, reduction: _Reduction, loss_fn: LossFn, weight_grad_out: Tensor | None
    ) -> None:
        self.head, self.reduction, self.loss_fn, self.weight_grad_out = head, reduction, loss_fn, weight_grad_out
        bounds = _walk.limits(head.hidden, head.weight, head.settings)
        offsets = [batch.tokens[sequence] for sequence in batch.sequences]
        self.tiles = _plan.loop_tiles(offsets, _plan.loop_rows(bounds))
        self.losses: list[Tensor] = []
        self.stats: list[TokenStats] = []
        self.seen = 0
        self.final = reduction.grad_scale is not None
        self.grad = any(head.needs)
        self.head_trains = head.needs.weight or head.needs.bias
        if not self.grad:
            return
        rows = [offsets[last] - offsets[first] for first, last in self.tiles]
        held = [min(n, bounds.retained_rows) for n in rows if self._keeps(n, bounds.retained_rows)]
        # One buffer for the logits of every tile.
        self.retained = _walk.allocate_retained(
            lambda rows: _walk.retained_like(head.hidden, head.weight, head.settings, rows),
            max(held, default=0),
            head.settings.replan,
        )
        acc = accumulator_dtype(head.hidden.dtype)
        V, device = head.weight.shape[0], head.hidden.device
        dtype = head.hidden.dtype if self.final else acc
        self.d_hidden = empty(*head.hidden.shape, dtype=dtype, device=device) if head.needs.states else None
        self.d_bias = torch.zeros(V, dtype=acc, device=device) if head.needs.bias else None
        self.d_weight: Tensor | None = None
        self.started = False  # whether d_weight holds anything
        if head.needs.weight and self.final and weight_grad_out is not None:
            self.d_weight, self.started = weight_grad_out, True
        elif head.needs.weight:
            # What is neither scaled nor added to any more needs no wider type.
            dtype = head.trained.dtype if self.final and len(self.tiles) == 1 else acc
            self.d_weight = empty(*head.trained.shape, dtype=dtype, device=device)

    def step(self, tile: Tile) -> None:
        """Take one tile forward, through the closure, and back."""
        head, schedule = self.head, self._schedule(tile)
        stats, entropy, saved = self.forward(tile.tokens, schedule)
        self.stats.append(stats)
        # Copies: what a closure does to them in place is not done to the statistics returned.
        leaves = [None if x is None else x.clone().requires_grad_(self.grad) for x in stats[:3]]
        others = [None if x is None else x.clone() for x in stats[3:]]
        # The graph of a closure ends here: hooks around the call, such as a checkpoint's, are not for it.
        own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.set_grad_enabled(self.grad), own:
            losses = _call(self.loss_fn, TokenStats._make((*leaves, *others)), tile)
            weighted = self.reduction.weigh(losses, self.seen)
        self.seen += losses.shape[0]
        self.losses.append(losses.detach())
        if not self.grad:
            return
        g_logps, g_entropy, g_logsumexp = self._differentiate(weighted, leaves)
        if g_logps is None and g_entropy is None and g_logsumexp is None:
            if self.d_hidden is not None:
                self.d_hidden[tile.tokens] = 0
            return
        into = Into(self.d_weight, self.started, wide=True)
        with torch.autocast(head.hidden.device.type, enabled=False):
            d_hidden, _, d_bias = _walk.backward(
                head.kernels, (g_logps, g_entropy, g_logsumexp), *head.rows(tile.tokens), entropy, saved, head.needs,
                head.drop_zero_rows, into, head.schedule(schedule),
            )  # fmt: skip
        self.started = True
        if self.d_hidden is not None:
            self.d_hidden[tile.tokens] = d_hidden
        if self.d_bias is not None:
            self.d_bias += d_bias

    def forward(self, rows: slice, schedule: str) -> tuple[TokenStats, Tensor, Saved]:
        """Statistics of some rows, their entropy (empty where not wanted) and what their backward needs."""
        head, inputs = self.head, self.head.rows(rows)
        retained = self.retained[: inputs[0].shape[0]] if schedule == "loop" else None
        with torch.autocast(head.hidden.device.type, enabled=False):
            found, saved = _walk.forward(head.kernels, *inputs, head.schedule(schedule), retained)
        return token_stats(found, head.names, inputs[2].shape), found.entropy, saved

    def _schedule(self, tile: Tile) -> str:
        if not self.grad:
            return "forward"
        return "loop" if self._keeps(tile.tokens.stop - tile.tokens.start, self.retained.shape[0]) else "frozen"

    def _keeps(self, rows: int, limit: int) -> bool:
        """Whether logits stay until the closure has been differentiated, as many as fit.

        Without a gradient of the head ``frozen`` does without them, unless it is that of an entropy.
        """
        return self.head_trains or (self.head.settings.raw and rows <= limit)

    def _differentiate(self, weighted: Tensor, leaves: list[Tensor | None]) -> list[Tensor | None]:
        """The gradient that the closure sends to each of logps, entropy and logsumexp."""
        if not weighted.requires_grad:
            return [None] * 3
        _refuse_others(weighted, leaves, self.loss_fn)
        one = torch.ones_like(weighted)
        if self.reduction.grad_scale is not None:
            one.mul_(self.reduction.grad_scale).div_(self.reduction.divisor(self._count()))
        there = [leaf for leaf in leaves if leaf is not None]
        grads = iter(torch.autograd.grad(weighted, there, one, allow_unused=True))
        return [None if leaf is None else next(grads) for leaf in leaves]

    def _count(self) -> int:
        return 0 if self.reduction.weights is None else self.reduction.weights.shape[0]

    def gradients(self, divisor: float | Tensor) -> _Gradients | None:
        if not self.grad:
            return None
        weight, out = self.d_weight, self.weight_grad_out
        if weight is not None and not self.started:
            weight.zero_()
        if self.final:
            weight = None if out is not None or weight is None else weight.to(self.head.trained.dtype)
            out = None
        return _Gradients(self.d_hidden, weight, self.d_bias, out, divisor, self.reduction.grad_scale)


def _call(loss_fn: LossFn, stats: TokenStats, tile: Tile) -> Tensor:
    losses = loss_fn(stats, tile)
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss_fn must return a Tensor, got {type(losses).__name__}")
    logps = stats.logps
    if losses.dim() != 1 or losses.dtype not in (torch.float32, torch.float64) or losses.device != logps.device:
        raise ValueError(
            f"loss_fn must return unreduced losses [n], float32 or float64, on {logps.device}, "
            f"got {tuple(losses.shape)} of {losses.dtype} on {losses.device}"
        )
    return losses


def _refuse_others(losses: Tensor, leaves: list[Tensor | None], loss_fn: LossFn) -> None:
    """Refuse losses of which another tensor than the statistics would get a gradient: it would be lost."""
    todo: list[Any] = [torch.autograd.graph.get_gradient_edge(losses).node]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of the node that accumulates a leaf's gradient
        if isinstance(leaf, Tensor) and not any(leaf is known for known in leaves):
            raise NotImplementedError(
                f"loss_fn's losses depend on {_describe(leaf, loss_fn)}, which requires a gradient and is none of the "
                "statistics: linear_loss has none for it; detach it, or use linear_logprobs"
            )
        todo += [following for following, _ in node.next_functions]


def _describe(leaf: Tensor, loss_fn: LossFn) -> str:
    names: list[str] = []
    if inspect.isfunction(loss_fn):
        known = inspect.getclosurevars(loss_fn)
        names = [name for name, value in {**known.globals, **known.nonlocals}.items() if value is leaf]
    return f"{names[0] if names else 'a tensor'} of shape {tuple(leaf.shape)}"


def _check_separates(
    loss_fn: LossFn, stats: TokenStats, batch: _Batch, tiles: list[tuple[int, int]], losses: Tensor
) -> None:
    """Call the closure on other tiles: each group alone, or all at once where that is what ran."""
    singles = [(group, group + 1) for group in range(batch.groups)]
    others = singles if tiles != singles else [(0, batch.groups)] if batch.groups > 1 else []
    if not others:
        return
    again = []
    for first, last in others:
        tile = batch.tile(first, last)
        seen = TokenStats._make(None if x is None else x[tile.tokens] for x in stats)
        again.append(_call(loss_fn, seen, tile))
    other = torch.cat(again)
    # A closure's own sums may run in another order.
    rounding = 1024 * torch.finfo(losses.dtype).eps
    finite = losses[losses.isfinite()]
    scale = finite.abs().max() if finite.numel() else 0.0
    if other.shape != losses.shape:
        raise ValueError(f"loss_fn returned {losses.shape[0]} losses, and {other.shape[0]} on another tiling")
    changed = ~torch.isclose(other, losses, rtol=rounding, atol=float(rounding * scale), equal_nan=True)
    if bool(changed.any()):
        at = int(changed.to(torch.int32).argmax())
        raise ValueError(
            f"loss_fn mixes groups: loss {at} is {float(losses[at])}, and {float(other[at])} on another tiling; "
            "compute what depends on several groups beforehand, or use linear_logprobs"
        )


class _Deliver(torch.autograd.Function):
    """Hands out gradients that exist already, times the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, gradients: _Gradients
    ) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, (hidden.dtype, weight.dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        found: _Gradients | None = ctx.gradients
        if found is None:
            raise RuntimeError(
                "linear_loss: an earlier backward has consumed the gradients; give that one retain_graph=True"
            )
        again = _graph_is_kept()
        if not again:
            ctx.gradients = None
        promised, out, weight = found.promised, found.weight_grad_out, found.weight
        factor = upstream / found.divisor if promised is None else _kept_promise(upstream, promised)

        def scaled(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            """In the input's type, by one pass over memory."""
            if x is None:
                return None
            if x.dtype == dtype and not again:
                return x.mul_(factor)
            return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))

        if weight is not None and out is not None:
            out.add_(weight * factor if again else weight.mul_(factor))
            weight = None
        elif weight is not None and promised is not None:  # a broken promise shows in one row as well as in all
            weight = weight.clone() if again else weight
            weight[0] *= factor
        else:
            weight = scaled(weight, ctx.dtypes[1])
        # A bias has the type of the hidden states here.
        return None, scaled(found.hidden, ctx.dtypes[0]), weight, scaled(found.bias, ctx.dtypes[0]), None


def _graph_is_kept() -> bool:
    """Whether this backward runs with ``retain_graph=True``; where torch does not tell, it may."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if tell is None else tell()


def _kept_promise(upstream: Tensor, promised: float | Tensor) -> Tensor:
    """1, or NaN where another gradient arrived than the one that the forward has multiplied by."""
    kept = (upstream - promised).abs() <= 8 * torch.finfo(upstream.dtype).eps * upstream.abs()
    if check_values(upstream.device) and not bool(kept):
        raise ValueError(f"grad_scale was {float(promised)}, but the gradient that arrived is {float(upstream)}")
    return torch.where(kept, 1.0, torch.nan).to(upstream.dtype)
