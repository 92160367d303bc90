"""Rewards of tokens from all that a batch is rewarded and penalised for: one pass over packed sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from prefcore import _native, reference
from prefcore._impl import Impl, resolve
from prefcore._types import DenseReward, SegmentReward
from prefcore.ops import _checks
from prefcore.ops._register import register_ragged

Estimator = Literal["k1", "k2", "k3"]
PastEnd = Literal["drop", "move"]
_KINDS = {"none": 0, "given": 1, "k1": 2, "k2": 3, "k3": 4}  # prefcore::rewards::Kl in csrc/core/token_rewards.h
_MOST = 32  # kMost there
_INF = math.inf

_Item = TypeVar("_Item", DenseReward, SegmentReward)


def token_rewards(
    terminal: Tensor | None,
    cu_seqlens: Tensor,
    *,
    streams: Sequence[DenseReward] = (),
    segments: Sequence[SegmentReward] = (),
    past_end: PastEnd = "drop",
    logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    divergence: Tensor | None = None,
    kl: Estimator = "k1",
    kl_coef: float | Tensor | None = None,
    turns: Tensor | None = None,
    max_log_ratio: float | None = 20.0,
    terminal_clamp: float | None = None,
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    total: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""The reward of every token, from terminal, dense and segment rewards and a KL penalty, in one launch.

    Equal to ``segments + terminal at the last token + sum(streams) - kl_coef * KL``, clipped; with only ``terminal``,
    ``logps`` and ``ref_logps`` it is the reward of RLHF (Stiennon et al., Learning to summarize from human feedback,
    2020), with ``segments`` that of Wu et al. (Fine-Grained Human Feedback Gives Better Rewards for Language Model
    Training, 2023). Of n terms each token's sum runs in float64 in a fixed order for either dtype. A result is exact to
    within one rounding and :math:`(n + 80)\,2^{-53}` times the sum of the terms' magnitudes, and has the same bits on
    the CPU, on a GPU, and in any batch.

    Args:
        terminal: ``[S]`` float32 or float64, a reward for each whole sequence, which its last token that counts gets;
            or None. A sequence of which nothing counts gets nothing.
        cu_seqlens: ``[S + 1]`` int32 offsets of the sequences' tokens, from 0 to T. Sequences may be empty.
        streams: up to 32 :class:`DenseReward`, or plain tuples, of ``[T]`` tensors: each adds
            ``clip(weight * (values - baseline), -clamp, clamp)``.
        segments: up to 32 :class:`SegmentReward`, or plain tuples. Scores are added to what is there: several segments
            may end at one token. Within a sequence ``ends`` must not decrease.
        past_end: what becomes of a score whose end lies behind its sequence, which was truncated, or is masked:
            ``"drop"``, or ``"move"`` to the last token before it that counts.
        logps, ref_logps: ``[T]`` log-probs of the tokens under the policy that sampled them and the reference.
        divergence: ``[T]``, a penalty handed in instead, such as the exact KL of
            :func:`prefcore.linear_divergence`.
        kl: estimator from ``u = logps - ref_logps``: ``"k1"``, u; ``"k2"``, u²/2; ``"k3"``, exp(-u) - 1 + u. Of rewards
            only k1's sum to the sequence's.
        kl_coef: coefficient of the penalty: a number, a 0-dim tensor, ``[T]``, or with ``turns`` ``[K]``, one a turn.
            Negative, it rewards.
        turns: ``[T]`` int32, number of each token's turn, from 0 to K - 1.
        max_log_ratio: bound of the magnitude of u; None: no bound.
        terminal_clamp: bound of the magnitude of ``terminal``.
        clamp: least and greatest reward of a token, all terms together.
        mask: ``[T]`` bool, the tokens that count; the others get exact zeros, and nobody reads what they hold.
        total: T, needed only where no argument of shape ``[T]`` is given.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"``.

    Returns:
        ``[T]`` in the dtype that all float tensors share. Rewards are constants of a loss: no gradient comes back.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: shapes, dtypes, devices, values or combinations other than these. Values on a GPU are checked where
            ``PREFCORE_CHECK=1`` is in the environment; without it the tokens of a turn without coefficient get NaN.

    Example:
        >>> import torch, prefcore
        >>> cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32)
        >>> logps, ref_logps = torch.tensor([-1.0, -2.0, -1.0, -3.0]), torch.tensor([-2.0, -2.0, -2.0, -1.0])
        >>> rewards = torch.tensor([1.0, 5.0])
        >>> prefcore.token_rewards(rewards, cu_seqlens, logps=logps, ref_logps=ref_logps, kl_coef=0.5).tolist()
        [-0.5, 0.0, 0.5, 6.0]
    """
    dense = tuple(_made("streams", DenseReward, item) for item in streams)
    sets = tuple(_made("segments", SegmentReward, item) for item in segments)
    for name, items in (("streams", dense), ("segments", sets)):
        if len(items) > _MOST:
            raise ValueError(f"{name} must be {_MOST} at the most, got {len(items)}")
    floats: dict[str, Tensor | None] = {"logps": logps, "ref_logps": ref_logps, "divergence": divergence}
    for k, stream in enumerate(dense):
        floats |= {f"streams[{k}].values": stream.values, f"streams[{k}].baseline": stream.baseline}
    if isinstance(kl_coef, Tensor) and turns is None and kl_coef.dim() != 0:
        floats["kl_coef"] = kl_coef
    like, size = _check_sizes(terminal, cu_seqlens, floats, mask, turns, total, sets)
    _check_numbers(dense, sets, past_end, terminal_clamp, clamp)
    _check_penalty(logps, ref_logps, divergence, kl, kl_coef, turns, max_log_ratio, like)
    chosen = resolve(impl, "token_rewards", cu_seqlens.device)
    if chosen == "reference":
        if not torch.compiler.is_compiling():
            _check_values(cu_seqlens, size, turns, kl_coef, mask, [s.ends for s in sets], [s.cu_segments for s in sets])
        return reference.token_rewards(
            terminal,
            cu_seqlens,
            total=size,
            dtype=like.dtype,
            streams=dense,
            segments=sets,
            past_end=past_end,
            logps=logps,
            ref_logps=ref_logps,
            divergence=divergence,
            kl=kl,
            kl_coef=0.0 if kl_coef is None else kl_coef,
            turns=turns,
            max_log_ratio=max_log_ratio,
            terminal_clamp=terminal_clamp,
            clamp=clamp,
            mask=mask,
        )
    penalty = logps if divergence is None else divergence
    kind: str = kl if logps is not None else "none" if divergence is None else "given"
    coefficients = None
    if isinstance(kl_coef, Tensor):
        coefficients = kl_coef.expand(size) if kl_coef.dim() == 0 else kl_coef
    low, high = (-_INF, _INF) if clamp is None else clamp
    out: Tensor = _TOKEN_REWARDS[chosen](
        like.detach()[:0],
        cu_seqlens,
        size,
        _detached(mask),
        _detached(terminal),
        _bound(terminal_clamp),
        [s.values.detach() for s in dense],
        [_detached(s.baseline) for s in dense],
        [float(s.weight) for s in dense],
        [_bound(s.clamp) for s in dense],
        [s.ends for s in sets],
        [s.scores.detach() for s in sets],
        [s.cu_segments for s in sets],
        [float(s.weight) for s in sets],
        past_end == "move",
        kind,
        _detached(penalty),
        _detached(ref_logps),
        _bound(max_log_ratio),
        _detached(coefficients),
        turns,
        0.0 if kl_coef is None or coefficients is not None else float(kl_coef),
        float(low),
        float(high),
    )
    return out


def _made(name: str, kind: type[_Item], item: object) -> _Item:
    """``item``, which may be a plain tuple, as a NamedTuple."""
    if isinstance(item, kind):
        return item
    if not isinstance(item, tuple):
        raise TypeError(f"each of {name} must be a {kind.__name__}, got {type(item).__name__}")
    try:
        return kind(*item)
    except TypeError:
        raise TypeError(f"each of {name} must be a {kind.__name__}{kind._fields}, got {len(item)} items") from None


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _bound(most: float | None) -> float:
    return _INF if most is None else float(most)


def _check_tensor(name: str, x: Tensor, size: int | None, dtype: torch.dtype, like: Tensor, symbol: str) -> None:
    _checks.check_tensor(name, x)
    if x.dim() != 1 or (size is not None and x.shape[0] != size):
        raise ValueError(f"{name} must have shape [{symbol if size is None else size}], got {list(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on cu_seqlens's device {like.device}, got {x.device}")


def _check_sizes(
    terminal: Tensor | None,
    cu_seqlens: Tensor,
    floats: dict[str, Tensor | None],
    mask: Tensor | None,
    turns: Tensor | None,
    total: int | None,
    sets: tuple[SegmentReward, ...],
) -> tuple[Tensor, int]:
    """Check shapes, dtypes and devices; the first float tensor, and T."""
    _checks.check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [S + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    sequences = cu_seqlens.shape[0] - 1
    given = {name: x for name, x in floats.items() if x is not None}
    sparse = {} if terminal is None else {"terminal": terminal}
    sparse |= {f"segments[{k}].scores": s.scores for k, s in enumerate(sets)}
    if not given and not sparse:
        raise ValueError("there must be a reward or a penalty: terminal, streams, segments, logps or divergence")
    name, like = next(iter((given | sparse).items()))
    _checks.check_tensor(name, like)
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {like.dtype}")
    sized = {n: x for n, x in {**given, "mask": mask, "turns": turns}.items() if x is not None}
    if total is not None:
        _checks.check_type("total", total, int)
        size = total
    elif sized:
        name, x = next(iter(sized.items()))
        _check_tensor(name, x, None, x.dtype, cu_seqlens, "T")
        size = x.shape[0]
    else:
        raise ValueError("total must be given: no argument has a value for each token")
    for name, x in sized.items():
        dtype = torch.bool if name == "mask" else torch.int32 if name == "turns" else like.dtype
        _check_tensor(name, x, size, dtype, cu_seqlens, "T")
    if terminal is not None:
        _check_tensor("terminal", terminal, sequences, like.dtype, cu_seqlens, "S")
    for k, (ends, scores, cu_segments, _) in enumerate(sets):
        _check_tensor(f"segments[{k}].ends", ends, None, torch.int32, cu_seqlens, "J")
        _check_tensor(f"segments[{k}].scores", scores, ends.shape[0], like.dtype, cu_seqlens, "J")
        _check_tensor(f"segments[{k}].cu_segments", cu_segments, sequences + 1, torch.int32, cu_seqlens, "S + 1")
    if sequences == 0 and size > 0:
        raise ValueError(f"cu_seqlens must end at the number of rows, {size}, got no sequence")
    return like, size


def _check_numbers(
    dense: tuple[DenseReward, ...],
    sets: tuple[SegmentReward, ...],
    past_end: str,
    terminal_clamp: float | None,
    clamp: tuple[float, float] | None,
) -> None:
    for k, stream in enumerate(dense):
        _checks.check_number(f"streams[{k}].weight", stream.weight)
        _check_bound(f"streams[{k}].clamp", stream.clamp)
    for k, segment in enumerate(sets):
        _checks.check_number(f"segments[{k}].weight", segment.weight)
    _check_bound("terminal_clamp", terminal_clamp)
    if past_end not in get_args(PastEnd):
        raise ValueError(f"past_end must be one of {get_args(PastEnd)}, got {past_end!r}")
    if clamp is not None:
        _checks.check_type("clamp", clamp, tuple)
        if len(clamp) != 2:
            raise ValueError(f"clamp must be (least, greatest), got {clamp}")
        for limit in clamp:
            _checks.check_number("clamp", limit)
        if not clamp[0] <= clamp[1]:
            raise ValueError(f"clamp must be (least, greatest), got {clamp}")


def _check_bound(name: str, most: float | None) -> None:
    if most is None:
        return
    _checks.check_number(name, most)
    if not most >= 0:
        raise ValueError(f"{name} must not be negative, got {most}")


def _check_penalty(
    logps: Tensor | None,
    ref_logps: Tensor | None,
    divergence: Tensor | None,
    kl: str,
    kl_coef: float | Tensor | None,
    turns: Tensor | None,
    max_log_ratio: float | None,
    like: Tensor,
) -> None:
    if (logps is None) != (ref_logps is None):
        raise ValueError("logps and ref_logps must be given together")
    if logps is not None and divergence is not None:
        raise ValueError("divergence is instead of logps and ref_logps, got all")
    if kl not in get_args(Estimator):
        raise ValueError(f"kl must be one of {get_args(Estimator)}, got {kl!r}")
    penalised = logps is not None or divergence is not None
    if penalised != (kl_coef is not None):
        raise ValueError(
            "kl_coef must be given with logps and ref_logps or divergence"
            + (", got None" if penalised else ", got it without them")
        )
    _check_bound("max_log_ratio", max_log_ratio)
    if kl_coef is None:
        if turns is not None:
            raise ValueError("turns need a kl_coef of shape [K]")
    elif not isinstance(kl_coef, Tensor):
        _checks.check_number("kl_coef", kl_coef, " or a torch.Tensor")
        if turns is not None:
            raise ValueError("turns need a kl_coef of shape [K], got a number")
    elif turns is not None:
        _check_tensor("kl_coef", kl_coef, None, like.dtype, turns, "K")
        if kl_coef.shape[0] == 0:
            raise ValueError("kl_coef must have a coefficient for each turn, got none")
    elif kl_coef.dim() == 0 and (kl_coef.dtype != like.dtype or kl_coef.device != like.device):
        raise ValueError(
            f"kl_coef must be {like.dtype} on {like.device}, as the rewards, got {kl_coef.dtype} on {kl_coef.device}"
        )


def _check_values(
    cu_seqlens: Tensor,
    total: int,
    turns: Tensor | None,
    coefficients: Tensor | float | None,
    mask: Tensor | None,
    ends: list[Tensor],
    cu_segments: list[Tensor],
) -> None:
    if not _checks.check_values(cu_seqlens.device):
        return
    _checks.check_offset_values("cu_seqlens", cu_seqlens, total)
    if turns is not None and isinstance(coefficients, Tensor):
        counted = turns if mask is None else turns[mask]
        bad = counted[(counted < 0) | (counted >= coefficients.shape[0])]
        if bad.shape[0]:
            raise ValueError(f"turns must be in [0, {coefficients.shape[0]}) where tokens count, got {int(bad[0])}")
    for k, (places, offsets) in enumerate(zip(ends, cu_segments, strict=True)):
        _checks.check_offset_values(f"segments[{k}].cu_segments", offsets, places.shape[0])
        if bool((places < 0).any()):
            raise ValueError(f"segments[{k}].ends must not be negative, got {int(places.min())}")
        falls = places[1:] < places[:-1]
        # From one sequence's last end to the next one's first.
        begins = offsets[1:-1][(offsets[1:-1] > 0) & (offsets[1:-1] < places.shape[0])].long()
        falls[begins - 1] = False
        if bool(falls.any()):
            at = int(falls.to(torch.int32).argmax())
            raise ValueError(
                f"segments[{k}].ends must not decrease within a sequence, got {int(places[at])} before "
                f"{int(places[at + 1])} (index {at})"
            )


def _fake(like: Tensor, cu_seqlens: Tensor, total: int, *_: Any) -> Tensor:
    return like.new_empty(total)


def _launch(
    like: Tensor,
    cu_seqlens: Tensor,
    total: int,
    mask: Tensor | None,
    terminal: Tensor | None,
    terminal_most: float,
    values: list[Tensor],
    baselines: list[Tensor | None],
    weights: list[float],
    mosts: list[float],
    ends: list[Tensor],
    scores: list[Tensor],
    cu_segments: list[Tensor],
    segment_weights: list[float],
    moves: bool,
    kind: str,
    penalty: Tensor | None,
    reference_logps: Tensor | None,
    max_log_ratio: float,
    coefficients: Tensor | None,
    turns: Tensor | None,
    coefficient: float,
    low: float,
    high: float,
) -> Tensor:
    _check_values(cu_seqlens, total, turns, coefficients, mask, ends, cu_segments)
    held: list[Tensor] = []  # copies, alive until the kernel is launched

    def address(x: Tensor | None) -> int:
        if x is None:
            return 0
        held.append(x.contiguous())
        return held[-1].data_ptr()

    out = like.new_empty(total)
    device = cu_seqlens.device
    where: tuple[int, ...]
    if device.type == "cuda":
        where = (cu_seqlens.get_device(), torch.cuda.current_stream(device).cuda_stream)
    else:
        where = (torch.get_num_threads(),)
    getattr(_native.require(), f"token_rewards_{device.type}")(
        like.element_size(),
        address(cu_seqlens),
        cu_seqlens.shape[0] - 1,
        total,
        address(mask),
        address(terminal),
        terminal_most,
        list(zip(map(address, values), map(address, baselines), weights, mosts, strict=True)),
        list(zip(*(map(address, x) for x in (ends, scores, cu_segments)), segment_weights, strict=True)),
        moves,
        (
            _KINDS[kind],
            address(penalty),
            address(reference_logps),
            max_log_ratio,
            address(coefficients),
            address(turns),
            0 if coefficients is None else coefficients.shape[0],
            coefficient,
        ),
        low,
        high,
        out.data_ptr(),
        *where,
    )
    return out


_TOKEN_REWARDS = register_ragged(
    "token_rewards",
    "(Tensor like, Tensor cu_seqlens, SymInt total, Tensor? mask, Tensor? terminal, float terminal_most, "
    "Tensor[] values, Tensor?[] baselines, float[] weights, float[] mosts, "
    "Tensor[] ends, Tensor[] scores, Tensor[] cu_segments, float[] segment_weights, bool moves, "
    "str kind, Tensor? penalty, Tensor? reference_logps, float max_log_ratio, Tensor? coefficients, Tensor? turns, "
    "float coefficient, float low, float high) -> Tensor",
    _launch,
    _fake,
)
