"""Advantages: reverse scans over tokens and macro actions, baselines of groups, whitening.

Everything is packed, takes and returns float32 or float64, and carries no gradient: an advantage, like a return, is a
constant of the loss. Nothing waits for a GPU but :func:`select_groups`, whose results' sizes the host must know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from prefcore._types import GAE
from prefcore.ops import _checks
from prefcore.ops.aggregate import How
from prefcore.ops.gae import gae
from prefcore.ops.sequence_reduce import sequence_reduce

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # a torch without it has no ranks either

__all__ = [
    "GAE",
    "Kept",
    "Selection",
    "discounted_returns",
    "dr_grpo",
    "gae",
    "groups_with_signal",
    "grpo",
    "lagrangian",
    "lambda_returns",
    "loop_ppo",
    "macro_gae",
    "ngram_starts",
    "num_items",
    "opo",
    "perplexity_starts",
    "random_ngram_starts",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "rloo",
    "segment_starts",
    "select_groups",
    "think_rm",
    "to_tokens",
    "whiten",
]

Reduce = Literal["mean", "sum", "first", "last", "position"]
RewardReduce = Literal["discounted", "sum", "weighted"]
Single = Literal["zero", "reward"]


class Kept(NamedTuple):
    """Advantages ``[S]`` of which some are dropped."""

    advantages: Tensor  #: zero where dropped
    keep: Tensor  #: ``[S]`` bool: false rows should not count in a mean either


class Selection(NamedTuple):
    """Whole groups of a packed batch: what to index it by, and its offsets afterwards."""

    sequences: Tensor  #: int64 rows of ``[S]`` tensors
    tokens: Tensor  #: int64 rows of ``[T]`` tensors
    cu_seqlens: Tensor  #: int32
    cu_groups: Tensor  #: int32


def discounted_returns(
    rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """Rewards to come of every token, ``G_t = r_t + gamma * G_next``; arguments and errors as :func:`gae` has them.

    Equal to ``gae(rewards, None, cu_seqlens, gamma=gamma, lam=1, ...).returns``.
    """
    return gae(rewards, None, cu_seqlens, gamma=gamma, lam=1, mask=mask, bootstrap=bootstrap).returns


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """λ-returns, ``G_t = r_t + gamma * ((1 - lam) * V_next + lam * G_next)``; arguments and errors as :func:`gae` has.

    Equal to ``gae(rewards, values, cu_seqlens, ...).returns``.
    """
    return gae(rewards, values, cu_seqlens, gamma=gamma, lam=lam, mask=mask, bootstrap=bootstrap).returns


def segment_starts(ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Where macro actions begin that are given as ids: turns, sentences, the constituents of a parse.

    Args:
        ids: ``[T]`` of an integer dtype, equal within each segment and different from one to the next.
        cu_seqlens: ``[S + 1]`` int32 offsets into ``ids``.

    Returns:
        ``[T]`` bool: the first token of each sequence, and every token whose id is not that of the one before.
    """
    _check_vector("ids", ids, "T")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must have an integer dtype, got {ids.dtype}")
    starts = _first_tokens(cu_seqlens, ids.shape[0], ids)
    starts[1:] |= ids[1:] != ids[:-1]
    return starts


def ngram_starts(cu_seqlens: Tensor, total: int, n: int, *, last_alone: bool = True) -> Tensor:
    """Where macro actions of ``n`` tokens begin, counted anew in each sequence (`ma_ppo`'s fixed n-grams).

    MA-RLHF: Reinforcement Learning from Human Feedback with Macro Actions, 2024. The published code counts from the
    beginning of the batch's rows; here a sequence's segments do not depend on the batch.

    Args:
        cu_seqlens: ``[S + 1]`` int32 offsets from 0 to T.
        total: T.
        n: positive. 1 makes every token an action, as in PPO; the longest length and more make a response a single
            one, a bandit's, if ``last_alone`` is false.
        last_alone: make a sequence's last token a segment of its own, as MA-RLHF does.

    Returns:
        ``[T]`` bool, true at the first token of each segment.
    """
    _check_positive_int("n", n)
    starts = _first_tokens(cu_seqlens, total)
    within = torch.arange(total, device=starts.device) - to_tokens(cu_seqlens[:-1], cu_seqlens, total)
    return _with_last(starts | (within % n == 0), cu_seqlens, last_alone)


def random_ngram_starts(
    cu_seqlens: Tensor,
    total: int,
    sizes: Sequence[int] = (1, 2, 3, 5, 10),
    *,
    last_alone: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Where macro actions of random lengths begin, each drawn from ``sizes`` (`ma_ppo`'s random n-grams).

    Args:
        cu_seqlens: ``[S + 1]`` int32 offsets from 0 to T.
        total: T.
        sizes: the lengths to draw from, positive.
        last_alone: as :func:`ngram_starts` has it.
        generator: of the offsets' device.

    Returns:
        ``[T]`` bool, true at the first token of each segment.
    """
    if len(sizes) == 0:
        raise ValueError("sizes must not be empty")
    for size in sizes:
        _check_positive_int("sizes", size)
    starts = _first_tokens(cu_seqlens, total)
    device = starts.device
    # As many draws as a sequence has tokens, more than it can need; where one begins is the sum of those before.
    draws = torch.randint(len(sizes), (total,), device=device, generator=generator)
    lengths = torch.zeros_like(draws)
    for code, size in enumerate(sizes):  # not by a tensor of sizes: copying one to a GPU waits for it
        lengths = torch.where(draws == code, size, lengths)
    before = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    first, behind = (to_tokens(x.long(), cu_seqlens, total) for x in (cu_seqlens[:-1], cu_seqlens[1:]))
    places = first + before[:-1] - before[first]
    places = torch.where(places < behind, places, first)
    return _with_last(starts.index_fill_(0, places, True), cu_seqlens, last_alone)


def perplexity_starts(logps: Tensor, cu_seqlens: Tensor, *, last_alone: bool = True) -> Tensor:
    """Where macro actions begin that end before perplexity rises (`ma_ppo`'s perplexity-based ones).

    Args:
        logps: ``[T]`` log-probs of the tokens, of the policy that sampled them.
        cu_seqlens: ``[S + 1]`` int32 offsets into ``logps``.
        last_alone: as :func:`ngram_starts` has it.

    Returns:
        ``[T]`` bool: the first token of each sequence, and each whose log-prob is below that of the one before.
    """
    _checks.check_ragged("logps", logps, cu_seqlens)
    starts = _first_tokens(cu_seqlens, logps.shape[0], logps)
    starts[1:] |= logps.detach()[1:] < logps.detach()[:-1]
    return _with_last(starts, cu_seqlens, last_alone)


@torch.no_grad()
def macro_gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    starts: Tensor,
    *,
    gamma: float,
    lam: float,
    value_reduce: Reduce = "mean",
    reward_reduce: RewardReduce = "discounted",
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> GAE:
    """:func:`gae` over macro actions instead of tokens: n-grams, constituents, turns.

    ``delta = R + gamma * V_next - V``, ``A = delta + gamma * lam * A_next``, ``G = A + V`` with one step a segment,
    whose A and G all its tokens get (MA-RLHF: Reinforcement Learning from Human Feedback with Macro Actions, 2024).
    Segments of one token give :func:`gae`; one segment a response gives a bandit's advantage, ``R - V``.

    Args:
        rewards, values: ``[T]`` of one dtype, float32 or float64.
        cu_seqlens: ``[S + 1]`` int32 offsets from 0 to T.
        starts: ``[T]`` bool, true at the first token of each segment; the functions ``*_starts`` make it. A sequence's
            first token begins one in any case.
        gamma, lam: discount and λ of a step from one segment to the next, in [0, 1].
        value_reduce: V of a segment: the ``"mean"`` or the ``"sum"`` of its tokens' values, that of the ``"first"`` or
            ``"last"`` token, or their average by weights 1/i, i from 1 at the segment's first token (``"position"``).
        reward_reduce: R of a segment: the sum of ``gamma**i * r``, i from 0, as the paper has it (``"discounted"``);
            the plain ``"sum"``; or ``"weighted"``, reduced like the values, as the published code does, which averages
            a KL penalty within a segment.
        mask: ``[T]`` bool, the tokens that count; a segment is made of those alone, and is stepped over if it has none.
        bootstrap: ``[S]``, V behind the last token.

    Returns:
        ``GAE(advantages, returns)``, ``[T]`` each, zero where masked.

    Raises:
        TypeError, ValueError: as :func:`gae`.
    """
    _checks.check_ragged("rewards", rewards, cu_seqlens)
    total = rewards.shape[0]
    dtypes = {"values": rewards.dtype, "starts": torch.bool, "mask": torch.bool}
    for name, given in (("values", values), ("starts", starts), ("mask", starts if mask is None else mask)):
        _check_vector(name, given, "T", rewards)
        if given.dtype != dtypes[name]:
            raise ValueError(f"{name} must be {dtypes[name]}, got {given.dtype}")
    _check_choice("value_reduce", value_reduce, Reduce)
    _check_choice("reward_reduce", reward_reduce, RewardReduce)
    counts = torch.ones_like(starts) if mask is None else mask
    segment, cu_segments = _segments(starts | _first_tokens(cu_seqlens, total, rewards))

    # The tokens that count are numbered from 1 in each segment.
    so_far = counts.cumsum(0)
    first = cu_segments[segment].long()
    number = (so_far - so_far[first] + counts[first].long()).to(rewards.dtype)
    ones = counts.to(rewards.dtype)
    size = sequence_reduce(ones, cu_segments)
    weights = {
        "mean": ones,
        "sum": ones,
        "first": ones * (number == 1),
        "last": ones * (number == size[segment]),
        "position": ones / number.clamp(min=1),
    }[value_reduce]

    def weighted(x: Tensor) -> Tensor:
        total_of = sequence_reduce(torch.where(counts, x, 0), cu_segments, "weighted", weights)
        if value_reduce == "sum":
            return total_of
        norm = sequence_reduce(weights, cu_segments)
        return total_of / torch.where(norm == 0, 1, norm)

    if reward_reduce == "weighted":
        reward = weighted(rewards)
    else:
        powers = ones if reward_reduce == "sum" else torch.full_like(ones, gamma).pow((number - 1).clamp(min=0))
        reward = sequence_reduce(torch.where(counts, rewards, 0), cu_segments, "weighted", powers)
    # A segment's step is taken at its first token that counts: the others are masked, so nothing need be packed anew.
    steps = counts & (number == 1)
    out = gae(
        reward[segment],
        weighted(values)[segment],
        cu_seqlens,
        gamma=gamma,
        lam=lam,
        mask=steps,
        bootstrap=bootstrap,
    )
    # The sum of one number and zeros.
    return GAE(*(torch.where(counts, sequence_reduce(x, cu_segments)[segment], 0) for x in out))


@torch.no_grad()
def grpo(rewards: Tensor, cu_groups: Tensor, *, eps: float = 1e-4, ddof: int = 1, single: Single = "zero") -> Tensor:
    """Rewards less their group's mean, over its standard deviation: ``A = (R - mean) / (std + eps)``.

    DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, 2024.

    Args:
        rewards: ``[S]`` float32 or float64, of each sequence.
        cu_groups: ``[G + 1]`` int32 offsets into ``rewards``, from 0 to S.
        eps: not negative: 1e-4 in TRL, 1e-6 in verl.
        ddof: the divisor of the variance is K - ddof for a group of K.
        single: A of a group of one: ``"zero"``, or its ``"reward"`` (verl).

    Returns:
        ``[S]``; exact zeros in groups whose rewards are all equal.

    Raises:
        TypeError, ValueError: arguments of other types, shapes, dtypes or values.
    """
    _checks.check_number("eps", eps)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must not be negative, got {eps}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    centred = dr_grpo(rewards, cu_groups)
    sizes = cu_groups.diff()
    variance = sequence_reduce(centred.square(), cu_groups) / (sizes - ddof).clamp(min=1)
    scale = to_tokens(variance.sqrt() + eps, cu_groups, rewards.shape[0])
    # Where there is no spread, centred is zero, and with eps=0 so is the scale.
    return _or_single(torch.where(centred == 0, 0, centred / scale), rewards, cu_groups, single)


@torch.no_grad()
def dr_grpo(rewards: Tensor, cu_groups: Tensor, *, single: Single = "zero") -> Tensor:
    """Rewards less their group's mean, ``A = R - mean``, without the bias of a division by its spread.

    Understanding R1-Zero-Like Training: A Critical Perspective, 2025. Arguments, zeros and errors as :func:`grpo` has.
    """
    _check_groups(rewards, cu_groups)
    total = rewards.shape[0]
    mean = to_tokens(sequence_reduce(rewards, cu_groups, "mean"), cu_groups, total)
    signal = to_tokens(groups_with_signal(rewards, cu_groups), cu_groups, total)
    return _or_single(torch.where(signal, rewards - mean, 0), rewards, cu_groups, single)


@torch.no_grad()
def rloo(rewards: Tensor, cu_groups: Tensor, *, single: Single = "reward") -> Tensor:
    """Rewards less the mean of the others in the group, ``A_i = R_i - mean_{j != i} R_j``.

    Equal to ``K / (K - 1) * (R - mean)``. Back to Basics: Revisiting REINFORCE Style Optimization for Learning from
    Human Feedback in LLMs, 2024; there R has the KL penalty of the whole response in it. Arguments, zeros and errors
    as :func:`grpo` has; a group of one has no others to compare with, and its advantage is its reward by default.
    """
    centred = dr_grpo(rewards, cu_groups)
    sizes = cu_groups.diff().to(rewards.dtype)
    factor = to_tokens(sizes / (sizes - 1).clamp(min=1), cu_groups, rewards.shape[0])
    return _or_single(factor * centred, rewards, cu_groups, single)


@torch.no_grad()
def opo(rewards: Tensor, cu_groups: Tensor, cu_seqlens: Tensor, *, single: Single = "zero") -> Tensor:
    """Rewards less their group's mean weighted by length, ``A_i = R_i - sum_j len_j * R_j / sum_j len_j``.

    That is the baseline of least variance if a response's score grows with its length. On-Policy RL with Optimal Reward
    Baseline, 2025. Groups without signal, or without tokens, give zeros; arguments and errors as :func:`grpo` has, and
    ``cu_seqlens [S + 1]``.
    """
    _check_groups(rewards, cu_groups)
    _check_offsets("cu_seqlens", cu_seqlens)
    lengths = cu_seqlens.diff().to(rewards.dtype)
    if lengths.shape != rewards.shape:
        raise ValueError(f"cu_seqlens must have shape [{rewards.shape[0] + 1}], got {list(cu_seqlens.shape)}")
    total = sequence_reduce(lengths, cu_groups, "sum")
    mean = sequence_reduce(lengths * rewards, cu_groups, "sum") / total.clamp(min=1)
    signal = groups_with_signal(rewards, cu_groups) & (total > 0)
    there, baseline = (to_tokens(x, cu_groups, rewards.shape[0]) for x in (signal, mean))
    return _or_single(torch.where(there, rewards - baseline, 0), rewards, cu_groups, single)


@torch.no_grad()
def remax(rewards: Tensor, greedy_rewards: Tensor, cu_groups: Tensor) -> Tensor:
    """Rewards less that of the greedy response to the same prompt, ``A_i = R_i - R_greedy``.

    ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models, 2023.

    Args:
        rewards: ``[S]`` float32 or float64.
        greedy_rewards: ``[G]``, one for each prompt.
        cu_groups: ``[G + 1]`` int32.

    Returns:
        ``[S]``.

    Raises:
        TypeError, ValueError: arguments of other types, shapes, dtypes or values.
    """
    _check_groups(rewards, cu_groups)
    _check_vector("greedy_rewards", greedy_rewards, "G")
    if greedy_rewards.shape[0] != cu_groups.shape[0] - 1:
        raise ValueError(f"greedy_rewards must have shape [{cu_groups.shape[0] - 1}], got {list(greedy_rewards.shape)}")
    return rewards - to_tokens(greedy_rewards, cu_groups, rewards.shape[0])


@torch.no_grad()
def loop_ppo(rewards: Tensor, cu_groups: Tensor, *, threshold: float = 0.01, single: Single = "reward") -> Kept:
    """:func:`rloo`'s advantages without those below ``threshold`` in magnitude.

    LOOP: Reinforcement Learning for Long-Horizon Interactive LLM Agents, 2025. What is dropped there is no member of
    the batch any more: give the number of the kept ones to ``aggregate``.
    """
    _checks.check_number("threshold", threshold)
    advantages = rloo(rewards, cu_groups, single=single)
    keep = advantages.abs() >= threshold
    return Kept(torch.where(keep, advantages, 0), keep)


@torch.no_grad()
def think_rm(strengths: Tensor, cu_groups: Tensor, total: int, *, eps: float = 1e-8) -> Tensor:
    """Advantages from how strongly each response of a group is preferred to each other one.

    ``A_i = mean_j d_ij / sqrt(sum_ij d_ij**2 / (2 * K * (K - 1)) + eps)``. With ``d_ij = R_i - R_j`` that is
    ``(R - mean) / sqrt(var + eps)``, :func:`grpo`'s. Think-RM: Enabling Long-Horizon Reasoning in Generative Reward
    Models, 2025.

    Args:
        strengths: ``[sum of K * K]`` float32 or float64, each group's matrix d row by row, antisymmetric.
        cu_groups: ``[G + 1]`` int32, the offsets of groups among the S sequences.
        total: S.
        eps: positive.

    Returns:
        ``[S]``; 0 for a group of one.

    Raises:
        TypeError, ValueError: arguments of other types, shapes, dtypes or values.
    """
    _checks.check_ragged("strengths", strengths, cu_groups, "cu_groups")
    _checks.check_number("eps", eps)
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive, got {eps}")
    sizes = cu_groups.diff().long()
    squares = sizes.square()
    if not torch.compiler.is_compiling() and _checks.check_values(strengths.device):
        _checks.check_offset_values("cu_groups", cu_groups, total)
        if int(squares.sum()) != strengths.shape[0]:
            raise ValueError(f"strengths must have shape {[int(squares.sum())]}, got {list(strengths.shape)}")
    rows = to_tokens(sizes, cu_groups, total)
    means = sequence_reduce(strengths, _offsets(rows), "mean")
    energy = sequence_reduce(strengths.square(), _offsets(squares))
    scale = (energy / (2 * squares - 2 * sizes).clamp(min=1) + eps).sqrt()
    return means / to_tokens(scale, cu_groups, total)


def reinforce_pp(
    rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Rewards to come, whitened over all tokens of the global batch.

    REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models, 2025; there rewards are
    ``-beta * (old_logps - ref_logps)`` and the score at the last token.

    Args:
        rewards: ``[T]`` float32 or float64.
        cu_seqlens: ``[S + 1]`` int32 offsets from 0 to T.
        gamma: discount in [0, 1].
        mask: ``[T]`` bool, the tokens that count.
        process_group: the ranks among whom the batch is divided; None: this one has all of it.

    Returns:
        ``[T]``, zero where masked.
    """
    return whiten(
        discounted_returns(rewards, cu_seqlens, gamma=gamma, mask=mask), mask=mask, process_group=process_group
    )


def reinforce_pp_baseline(
    rewards: Tensor,
    cu_groups: Tensor,
    cu_seqlens: Tensor,
    total: int,
    *,
    mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Rewards of responses less their group's mean, at each token, whitened over all tokens of the global batch.

    The variant with a baseline of REINFORCE++ (:func:`reinforce_pp`), whose KL penalty is a term of the loss.

    Args:
        rewards: ``[S]`` float32 or float64, of each sequence.
        cu_groups: ``[G + 1]`` int32 offsets into ``rewards``; a group is on one rank.
        cu_seqlens: ``[S + 1]`` int32 offsets from 0 to T.
        total: T.
        mask: ``[T]`` bool, the tokens that count.
        process_group: the ranks among whom the batch is divided; None: this one has all of it.

    Returns:
        ``[T]``, zero where masked.
    """
    return whiten(to_tokens(dr_grpo(rewards, cu_groups), cu_seqlens, total), mask=mask, process_group=process_group)


@torch.no_grad()
def whiten(
    x: Tensor,
    *,
    mask: Tensor | None = None,
    shift_mean: bool = True,
    ddof: int = 1,
    eps: float = 1e-8,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps)``, mean and variance in float64, over the batch of all ranks.

    Args:
        x: ``[T]`` or ``[S]``, float32 or float64: tokens or sequences are what is counted.
        mask: bool of the same shape, the elements that count.
        shift_mean: whether the mean becomes 0; else it is added again.
        ddof: the divisor of the variance is the count less this; 0 or 1.
        eps: not negative.
        process_group: the ranks over which to count, in one all-reduce of three numbers for each; None: this rank
            alone. Every rank must call, also one without elements.

    Returns:
        As ``x``; exact zeros where masked.

    Raises:
        TypeError, ValueError: arguments of other types, shapes, dtypes or values.
    """
    _check_vector("x", x, "T")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64, got {x.dtype}")
    if mask is not None:
        _check_vector("mask", mask, "T", x)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be torch.bool, got {mask.dtype}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    _checks.check_number("eps", eps)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must not be negative, got {eps}")
    wide = x.double() if mask is None else torch.where(mask, x.double(), 0)
    count = torch.full_like(wide.sum(), x.shape[0]) if mask is None else mask.sum().double()
    mean = wide.sum() / count.clamp(min=1)
    centred = wide - mean if mask is None else torch.where(mask, wide - mean, 0)
    spread = centred.square().sum()
    if process_group is not None:
        # Each rank's count, mean and sum of squares around it: sums of squares around 0 would cancel.
        ranks = _of_all_ranks(torch.stack([count, mean, spread]), process_group)
        counts, means, spreads = ranks.unbind(1)
        count = counts.sum()
        whole = (counts * means).sum() / count.clamp(min=1)
        spread = spreads.sum() + (counts * (means - whole).square()).sum()
        centred, mean = centred + (mean - whole), whole
    # Where there is no spread, centred is zero, and with eps=0 so is the scale.
    scaled = torch.where(centred == 0, 0, centred / (spread / (count - ddof).clamp(min=1) + eps).sqrt())
    if not shift_mean:
        scaled = scaled + mean
    return (scaled if mask is None else torch.where(mask, scaled, 0)).to(x.dtype)


@torch.no_grad()
def num_items(
    cu_seqlens: Tensor, how: How, *, mask: Tensor | None = None, process_group: ProcessGroup | None = None
) -> Tensor:
    """What ``aggregate`` with the same ``how`` divides by, over the batches of all ranks.

    Args:
        cu_seqlens: ``[S + 1]`` int32 offsets from 0 to T.
        how: as ``aggregate`` has it: ``"token_mean"`` counts tokens, ``"seq_mean_*"`` sequences that have any.
        mask: ``[T]`` bool, the tokens that count.
        process_group: the ranks over which to count, in one all-reduce; None: this rank alone.

    Returns:
        0-d int64 on the offsets' device, at least 1.

    Raises:
        ValueError: ``"token_sum"``, which divides by nothing, or another ``how`` that is none.
    """
    _check_choice("how", how, How)
    _check_offsets("cu_seqlens", cu_seqlens)
    if how == "token_sum":
        raise ValueError("how='token_sum' divides by nothing")
    if mask is None:
        lengths = cu_seqlens.diff()
    else:
        _check_vector("mask", mask, "T")
        lengths = sequence_reduce(mask.double(), cu_seqlens)
    count = (lengths if how == "token_mean" else lengths > 0).sum().long()
    if process_group is not None:
        torch.distributed.all_reduce(count, group=process_group)
    return count.clamp(min=1)


def lagrangian(reward_advantages: Tensor, cost_advantages: Tensor, lam: float | Tensor) -> Tensor:
    """One advantage from two, of reward and of cost: ``(A_R - lam * A_C) / (1 + lam)``.

    PPO-Lagrangian, as in Safe RLHF-V: Safe Reinforcement Learning from Human Feedback in Multimodal Large Language
    Models, 2025. With ``lam=0`` it is A_R; as lam grows it tends to -A_C.

    Args:
        reward_advantages, cost_advantages: of one shape, float32 or float64.
        lam: the multiplier, not negative: a number or a 0-d tensor.

    Returns:
        The same shape, without gradient: the multiplier learns from costs, not from advantages.
    """
    for name, value in (("reward_advantages", reward_advantages), ("cost_advantages", cost_advantages)):
        _checks.check_tensor(name, value)
        if value.shape != reward_advantages.shape:
            raise ValueError(f"{name} must have shape {list(reward_advantages.shape)}, got {list(value.shape)}")
    if isinstance(lam, Tensor):
        if lam.dim() != 0:
            raise ValueError(f"lam must be a number or a 0-d tensor, got shape {list(lam.shape)}")
        lam = lam.detach()
    else:
        _checks.check_number("lam", lam, " or a 0-d torch.Tensor")
        if not 0 <= lam < float("inf"):
            raise ValueError(f"lam must not be negative, got {lam}")
    return (reward_advantages.detach() - lam * cost_advantages.detach()) / (1 + lam)


@torch.no_grad()
def groups_with_signal(rewards: Tensor, cu_groups: Tensor) -> Tensor:
    """Which groups have rewards that differ: the others' advantages are zero (DAPO's dynamic sampling).

    DAPO: An Open-Source LLM Reinforcement Learning System at Scale, 2025. Spread over sequences by
    ``to_tokens(..., cu_groups, S)`` it is a mask or a weight; :func:`select_groups` takes the groups out of the batch.

    Args:
        rewards: ``[S]`` float32 or float64, of each sequence.
        cu_groups: ``[G + 1]`` int32 offsets into ``rewards``, from 0 to S.

    Returns:
        ``[G]`` bool; false for a group of one or none.
    """
    _check_groups(rewards, cu_groups)
    total = rewards.shape[0]
    first = to_tokens(cu_groups[:-1], cu_groups, total).long()
    return sequence_reduce((rewards != rewards[first]).to(rewards.dtype), cu_groups) > 0


@torch.no_grad()
def select_groups(keep: Tensor, cu_groups: Tensor, cu_seqlens: Tensor) -> Selection:
    """The groups of a batch for which ``keep`` holds, as what to index its tensors by. On a GPU this waits for it.

    Args:
        keep: ``[G]`` bool.
        cu_groups: ``[G + 1]`` int32 offsets of groups among sequences.
        cu_seqlens: ``[S + 1]`` int32 offsets of sequences among tokens.

    Returns:
        :class:`Selection`; sequences and tokens in their order.

    Example:
        >>> import torch
        >>> from prefcore import advantages
        >>> cu_groups = torch.tensor([0, 2, 4], dtype=torch.int32)
        >>> cu_seqlens = torch.tensor([0, 3, 5, 9, 10], dtype=torch.int32)
        >>> keep = advantages.groups_with_signal(torch.tensor([1.0, 1.0, 0.0, 1.0]), cu_groups)
        >>> advantages.select_groups(keep, cu_groups, cu_seqlens).tokens.tolist()
        [5, 6, 7, 8, 9]
    """
    _check_vector("keep", keep, "G")
    if keep.dtype != torch.bool:
        raise ValueError(f"keep must be torch.bool, got {keep.dtype}")
    for name, offsets in (("cu_groups", cu_groups), ("cu_seqlens", cu_seqlens)):
        _check_offsets(name, offsets)
    if cu_groups.shape[0] != keep.shape[0] + 1:
        raise ValueError(f"cu_groups must have shape {[keep.shape[0] + 1]}, got {list(cu_groups.shape)}")
    _checks.check_offset_values("cu_groups", cu_groups, cu_seqlens.shape[0] - 1)
    total = int(cu_seqlens[-1])
    _checks.check_offset_values("cu_seqlens", cu_seqlens, total)
    sequences = to_tokens(keep, cu_groups, cu_seqlens.shape[0] - 1)
    tokens = to_tokens(sequences, cu_seqlens, total)
    return Selection(
        sequences.nonzero()[:, 0],
        tokens.nonzero()[:, 0],
        _offsets(cu_seqlens.diff()[sequences]),
        _offsets(cu_groups.diff()[keep]),
    )


def to_tokens(x: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """What each sequence has, at each of its tokens; or what each group has, at each of its sequences.

    Equal to ``x.repeat_interleave(cu_seqlens.diff())``.

    Args:
        x: ``[S, ...]`` of any dtype.
        cu_seqlens: ``[S + 1]`` int32 offsets from 0 to T.
        total: T, which the host must know beforehand, or it would have to wait for a GPU. There it is checked against
            the offsets where ``PREFCORE_CHECK=1`` is in the environment.

    Returns:
        ``[T, ...]`` in ``x``'s dtype.

    Raises:
        TypeError, ValueError: arguments of other types, shapes, dtypes or values.
    """
    _checks.check_tensor("x", x)
    _check_offsets("cu_seqlens", cu_seqlens)
    if x.dim() == 0 or x.shape[0] != cu_seqlens.shape[0] - 1:
        raise ValueError(f"x must have shape [{cu_seqlens.shape[0] - 1}, ...], got {list(x.shape)}")
    if not torch.compiler.is_compiling() and _checks.check_values(cu_seqlens.device):
        _checks.check_offset_values("cu_seqlens", cu_seqlens, total)
    return x.repeat_interleave(cu_seqlens.diff(), dim=0, output_size=total)


def _first_tokens(cu_seqlens: Tensor, total: int, like: Tensor | None = None) -> Tensor:
    """``[T]`` bool, true where a sequence begins."""
    _check_offsets("cu_seqlens", cu_seqlens)
    if like is not None and cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens must be on device {like.device}, got {cu_seqlens.device}")
    if not torch.compiler.is_compiling() and _checks.check_values(cu_seqlens.device):
        _checks.check_offset_values("cu_seqlens", cu_seqlens, total)
    # An empty sequence begins where the next one does, or behind all tokens.
    flags = torch.zeros(total + 1, dtype=torch.bool, device=cu_seqlens.device)
    return flags.index_fill_(0, cu_seqlens.long(), True)[:total]


def _with_last(starts: Tensor, cu_seqlens: Tensor, last_alone: bool) -> Tensor:
    if last_alone and starts.shape[0] > 0:
        starts = starts.index_fill(0, (cu_seqlens.long() - 1).clamp(min=0), True)
    return starts


def _segments(starts: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's segment, ``[T]``, and the segments' offsets, ``[T + 1]``, of which the rest is empty.

    The number of segments is not known to the host, but there are at most T.
    """
    total = starts.shape[0]
    segment = starts.cumsum(0) - 1
    places = torch.arange(total, device=starts.device)
    offsets = torch.full((total + 1,), total, device=starts.device)
    return segment, offsets.scatter_reduce_(0, segment, places, "amin").to(torch.int32)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _or_single(advantages: Tensor, rewards: Tensor, cu_groups: Tensor, single: Single) -> Tensor:
    _check_choice("single", single, Single)
    if single == "zero":
        return advantages
    alone = to_tokens(cu_groups.diff() == 1, cu_groups, rewards.shape[0])
    return torch.where(alone, rewards, advantages)


def _of_all_ranks(numbers: Tensor, process_group: ProcessGroup) -> Tensor:
    """``[ranks, n]``, by one all-reduce: a sum with zeros is exact, so every rank has the same bits."""
    rows = numbers.new_zeros(process_group.size(), numbers.shape[0])
    rows[process_group.rank()] = numbers
    torch.distributed.all_reduce(rows, group=process_group)
    return rows


def _check_choice(name: str, value: str, choices: object) -> None:
    _checks.check_type(name, value, str)
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")


def _check_positive_int(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")


def _check_vector(name: str, x: Tensor, size: str, like: Tensor | None = None) -> None:
    _checks.check_tensor(name, x)
    if x.dim() != 1:
        raise ValueError(f"{name} must have shape [{size}], got {list(x.shape)}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name} must have shape {list(like.shape)}, got {list(x.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on device {like.device}, got {x.device}")


def _check_offsets(name: str, offsets: Tensor) -> None:
    _checks.check_tensor(name, offsets)
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name} must have one offset more than there are parts, got shape {list(offsets.shape)}")
    if offsets.dtype != torch.int32:
        raise ValueError(f"{name} must be int32, got {offsets.dtype}")


def _check_groups(rewards: Tensor, cu_groups: Tensor) -> None:
    _check_vector("rewards", rewards, "S")
    if rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rewards must be float32 or float64, got {rewards.dtype}")
    _check_offsets("cu_groups", cu_groups)
    if cu_groups.device != rewards.device:
        raise ValueError(f"cu_groups must be on device {rewards.device}, got {cu_groups.device}")
    if not torch.compiler.is_compiling() and _checks.check_values(rewards.device):
        _checks.check_offset_values("cu_groups", cu_groups, rewards.shape[0])
