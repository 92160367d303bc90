import functools
import itertools
import math
import statistics

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import prefcore
from prefcore import advantages

GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = (7, 0, 1, 12, 3, 30, 0)
GROUPS = (3, 0, 1, 2, 5, 1, 8)


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def rewards_of(groups, dtype=torch.float64):
    rewards = torch.randn(sum(groups), dtype=dtype, generator=GENERATOR)
    rewards[4:6] = 0.1  # the two of one group
    return rewards


def parts(x, lengths):
    return [part.tolist() for part in x.split(list(lengths))]


def close(actual, expected, dtype=torch.float64):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype), rtol=1e-11, atol=1e-11)


def test_returns_are_those_of_gae():
    rewards, values, bootstrap = (torch.randn(n, generator=GENERATOR) for n in (53, 53, 7))
    mask = torch.rand(53, generator=GENERATOR) < 0.7
    common = {"cu_seqlens": offsets(LENGTHS), "mask": mask, "bootstrap": bootstrap}
    out = prefcore.gae(rewards, values, **common, gamma=0.9, lam=0.8)
    assert torch.equal(advantages.lambda_returns(rewards, values, **common, gamma=0.9, lam=0.8), out.returns)
    expected = torch.zeros(53, dtype=torch.float64)
    for s, (a, b) in enumerate(itertools.pairwise(offsets(LENGTHS).tolist())):
        to_come = float(bootstrap[s])
        for t in range(b - 1, a - 1, -1):
            if mask[t]:
                expected[t] = to_come = float(rewards[t]) + 0.9 * to_come
    # One rounding to float32.
    ours = advantages.discounted_returns(rewards, **common, gamma=0.9)
    torch.testing.assert_close(ours.double(), expected, rtol=2.0**-23, atol=1e-12)


# Where segments begin.


def literal_segments(starts, lengths):
    """Ranges of tokens, by plain Python."""
    found = []
    for a, b in itertools.pairwise(offsets(lengths).tolist()):
        marks = [t for t in range(a, b) if t == a or starts[t]]
        found.append([range(x, y) for x, y in itertools.pairwise([*marks, b])])
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_ngrams_count_anew_in_each_sequence(n):
    starts = advantages.ngram_starts(offsets(LENGTHS), 53, n, last_alone=False)
    assert parts(starts, LENGTHS) == [[t % n == 0 for t in range(length)] for length in LENGTHS]
    starts = advantages.ngram_starts(offsets(LENGTHS), 53, n)
    expected = [[t % n == 0 or t == length - 1 for t in range(length)] for length in LENGTHS]
    assert parts(starts, LENGTHS) == expected


def test_random_ngrams_have_the_lengths_to_choose_from_and_all_of_them():
    lengths = (3000, 0, 4, 500)
    generator = torch.Generator().manual_seed(3)
    starts = advantages.random_ngram_starts(offsets(lengths), 3504, (2, 3, 10), last_alone=False, generator=generator)
    drawn = [len(segment) for sequence in literal_segments(starts, lengths) for segment in sequence[:-1]]
    assert set(drawn) == {2, 3, 10}
    share = 1 / 3
    for size in (2, 3, 10):
        # Five standard deviations of a binomial.
        assert abs(drawn.count(size) / len(drawn) - share) < 5 * math.sqrt(share * (1 - share) / len(drawn))
    again = torch.Generator().manual_seed(3)
    alone = advantages.random_ngram_starts(offsets(lengths), 3504, (2, 3, 10), generator=again)
    assert torch.equal(alone.nonzero(), (starts | _last_tokens(lengths)).nonzero())


def _last_tokens(lengths):
    return torch.tensor([t == length - 1 for length in lengths for t in range(length)], dtype=torch.bool)


def test_segments_begin_where_ids_change_and_with_each_sequence():
    ids = torch.tensor([5, 5, 2, 2, 2, 7, 7, 7])
    starts = advantages.segment_starts(ids, offsets((4, 0, 4)))
    assert starts.tolist() == [True, False, True, False, True, True, False, False]


def test_perplexity_segments_end_before_a_rise():
    logps = torch.tensor([-1.0, -0.5, -0.5, -2.0, -0.1, -0.3, -0.2, -0.1])
    starts = advantages.perplexity_starts(logps, offsets((5, 3)), last_alone=False)
    assert starts.tolist() == [True, False, False, True, False, True, False, False]
    starts = advantages.perplexity_starts(logps, offsets((5, 3)))
    assert starts.tolist() == [True, False, False, True, True, True, False, True]


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_batches_without_tokens_have_no_segments(lengths):
    cu_seqlens, none = offsets(lengths), torch.zeros(0)
    for starts in (
        advantages.ngram_starts(cu_seqlens, 0, 3),
        advantages.random_ngram_starts(cu_seqlens, 0),
        advantages.perplexity_starts(none, cu_seqlens),
        advantages.segment_starts(none.long(), cu_seqlens),
    ):
        assert starts.shape == (0,)
        out = advantages.macro_gae(none, none, cu_seqlens, starts, gamma=1, lam=1)
        assert out.advantages.shape == out.returns.shape == (0,)


# Macro actions.


def literal_macro(segments, total, rewards, values, mask, bootstrap, gamma, lam, value_reduce, reward_reduce):
    advantage_of, return_of = [0.0] * total, [0.0] * total
    for sequence, following in zip(segments, bootstrap, strict=True):
        advantage, value = 0.0, following
        for segment in reversed(sequence):
            tokens = [t for t in segment if mask[t]]
            if not tokens:
                continue

            def weighted(x, tokens=tokens):
                n = len(tokens)
                weights = {
                    "sum": [1.0] * n,
                    "mean": [1 / n] * n,
                    "first": [1.0] + [0.0] * (n - 1),
                    "last": [0.0] * (n - 1) + [1.0],
                    "position": [1 / i / sum(1 / j for j in range(1, n + 1)) for i in range(1, n + 1)],
                }[value_reduce]
                return sum(w * x[t] for w, t in zip(weights, tokens, strict=True))

            if reward_reduce == "weighted":
                reward = weighted(rewards)
            else:
                reward = sum(
                    (gamma**i if reward_reduce == "discounted" else 1) * rewards[t] for i, t in enumerate(tokens)
                )
            own = weighted(values)
            advantage = reward + gamma * value - own + gamma * lam * advantage
            value = own
            for t in tokens:
                advantage_of[t], return_of[t] = advantage, advantage + own
    return advantage_of, return_of


@pytest.mark.parametrize("reward_reduce", ["discounted", "sum", "weighted"])
@pytest.mark.parametrize("value_reduce", ["mean", "sum", "first", "last", "position"])
def test_macro_gae_is_the_recurrence_over_segments(value_reduce, reward_reduce):
    rewards, values = torch.randn(2, 53, dtype=torch.float64, generator=GENERATOR)
    bootstrap = torch.randn(7, dtype=torch.float64, generator=GENERATOR)
    options = {"gamma": 0.9, "lam": 0.8, "value_reduce": value_reduce, "reward_reduce": reward_reduce}
    some = torch.rand(53, generator=GENERATOR) < 0.6
    some[11:20] = False  # whole segments
    for starts, mask in itertools.product(
        (
            advantages.ngram_starts(offsets(LENGTHS), 53, 3),
            advantages.random_ngram_starts(offsets(LENGTHS), 53, generator=GENERATOR),
            torch.zeros(53, dtype=torch.bool),  # a sequence begins a segment in any case
        ),
        (None, some),
    ):
        bad = values if mask is None else values.masked_fill(~mask, float("nan"))  # not read
        out = advantages.macro_gae(rewards, bad, offsets(LENGTHS), starts, mask=mask, bootstrap=bootstrap, **options)
        flags = [True] * 53 if mask is None else mask.tolist()
        expected = literal_macro(
            literal_segments(starts, LENGTHS),
            53,
            rewards.tolist(),
            values.tolist(),
            flags,
            bootstrap.tolist(),
            **options,
        )
        close(out.advantages, expected[0])
        close(out.returns, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_macro_actions_of_one_token_are_token_gae_bit_for_bit(dtype):
    rewards, values = torch.randn(2, 53, dtype=dtype, generator=GENERATOR)
    mask = torch.rand(53, generator=GENERATOR) < 0.7
    starts = advantages.ngram_starts(offsets(LENGTHS), 53, 1)
    for value_reduce in ("mean", "sum", "first", "last", "position"):
        for ours, expected in zip(
            advantages.macro_gae(
                *(rewards, values, offsets(LENGTHS), starts), gamma=0.9, lam=0.8, value_reduce=value_reduce, mask=mask
            ),
            advantages.gae(rewards, values, offsets(LENGTHS), gamma=0.9, lam=0.8, mask=mask),
            strict=True,
        ):
            assert torch.equal(ours, expected)


def test_one_macro_action_a_response_is_a_bandit():
    rewards, values = torch.randn(2, 53, dtype=torch.float64, generator=GENERATOR)
    starts = advantages.ngram_starts(offsets(LENGTHS), 53, 53, last_alone=False)
    out = advantages.macro_gae(rewards, values, offsets(LENGTHS), starts, gamma=1, lam=0.95)
    pairs = zip(parts(rewards, LENGTHS), parts(values, LENGTHS), strict=True)
    expected = [sum(r) - statistics.fmean(v) for r, v in pairs if r]
    close(out.advantages, [a for a, n in zip(expected, filter(None, LENGTHS), strict=True) for _ in range(n)])


def test_macro_gae_does_not_depend_on_the_rest_of_the_batch():
    rewards, values = torch.randn(2, 53, generator=GENERATOR)
    starts = advantages.ngram_starts(offsets(LENGTHS), 53, 3)
    packed = advantages.macro_gae(rewards, values, offsets(LENGTHS), starts, gamma=1, lam=0.95)
    for a, b in itertools.pairwise(offsets(LENGTHS).tolist()):
        own = (rewards[a:b], values[a:b], offsets((b - a,)), starts[a:b])
        alone = advantages.macro_gae(*own, gamma=1, lam=0.95)
        assert torch.equal(alone.advantages, packed.advantages[a:b])


# Groups.


def literal_groups(rewards, function):
    return [a for group in parts(rewards, GROUPS) for a in function(group)]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [0, 1e-4])
def test_grpo_is_centred_and_scaled(eps, ddof):
    rewards = rewards_of(GROUPS)

    def expected(group):
        if len(set(group)) < 2:
            return [0.0] * len(group)
        std = statistics.stdev(group) if ddof else statistics.pstdev(group)
        return [(r - statistics.fmean(group)) / (std + eps) for r in group]

    ours = advantages.grpo(rewards, offsets(GROUPS), eps=eps, ddof=ddof)
    close(ours, literal_groups(rewards, expected))
    shifted = advantages.grpo(8 * rewards + 3, offsets(GROUPS), eps=8 * eps, ddof=ddof)
    torch.testing.assert_close(shifted, ours, rtol=1e-10, atol=1e-10)


def test_opo_weights_its_baseline_by_length():
    rewards = rewards_of(GROUPS)
    lengths = [3, 1, 0, 7, 2, 5, 4, 0, 6, 1, 1, 2, 9, 3, 3, 0, 8, 2, 2, 5]
    assert len(lengths) == sum(GROUPS)
    expected = []
    for group, own in zip(parts(rewards, GROUPS), parts(torch.tensor(lengths), GROUPS), strict=True):
        total = sum(own)
        baseline = sum(n * r for n, r in zip(own, group, strict=True)) / max(total, 1)
        signal = total > 0 and max(group) > min(group)
        expected += [r - baseline if signal else 0.0 for r in group]
    close(advantages.opo(rewards, offsets(GROUPS), offsets(lengths)), expected)
    alone = advantages.opo(rewards, offsets(GROUPS), offsets(lengths), single="reward")
    assert alone[3] == rewards[3], "the group of one"
    equal = advantages.opo(rewards, offsets(GROUPS), offsets([4] * len(lengths)))
    torch.testing.assert_close(equal, advantages.dr_grpo(rewards, offsets(GROUPS)), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="cu_seqlens must have shape"):
        advantages.opo(rewards, offsets(GROUPS), offsets(lengths[1:]))


def test_remax_subtracts_the_greedy_responses_reward():
    rewards = rewards_of(GROUPS)
    greedy = torch.randn(len(GROUPS), dtype=torch.float64, generator=GENERATOR)
    expected = [r - g for group, g in zip(parts(rewards, GROUPS), greedy.tolist(), strict=True) for r in group]
    close(advantages.remax(rewards, greedy, offsets(GROUPS)), expected)
    with pytest.raises(ValueError, match="greedy_rewards must have shape"):
        advantages.remax(rewards, greedy[1:], offsets(GROUPS))


def test_dr_grpo_is_centred():
    rewards = rewards_of(GROUPS)
    expected = literal_groups(rewards, lambda group: [r - statistics.fmean(group) for r in group])
    close(advantages.dr_grpo(rewards, offsets(GROUPS)), expected)


def test_rloo_leaves_one_out():
    rewards = rewards_of(GROUPS)

    def expected(group):
        return [r - (sum(group) - r) / max(len(group) - 1, 1) for r in group]

    ours = advantages.rloo(rewards, offsets(GROUPS))
    close(ours, literal_groups(rewards, expected))
    lonely = offsets(GROUPS).diff().repeat_interleave(offsets(GROUPS).diff()) == 1
    assert torch.equal(ours[lonely], rewards[lonely])
    sums = prefcore.sequence_reduce(torch.where(lonely, 0, ours), offsets(GROUPS))
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-14)


@pytest.mark.parametrize("single", ["zero", "reward"])
def test_a_group_of_one_has_no_advantage_or_its_reward(single):
    rewards, cu_groups = torch.tensor([2.0, 1.0, 0.0]), offsets((1, 2))
    for method in (advantages.grpo, advantages.dr_grpo, advantages.rloo):
        assert method(rewards, cu_groups, single=single)[0].item() == (2.0 if single == "reward" else 0.0)


def test_loop_drops_what_is_nearly_average():
    rewards = torch.tensor([1.0, 1.015, 1.0, 0.0, 1.0])
    out = advantages.loop_ppo(rewards, offsets((3, 2)))
    assert out.keep.tolist() == [False, True, False, True, True]
    expected = torch.where(out.keep, advantages.rloo(rewards, offsets((3, 2))), 0)
    assert torch.equal(out.advantages, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exact_zeros(dtype):
    rewards = torch.full((13,), 0.1, dtype=dtype)
    for method in (advantages.grpo, advantages.dr_grpo, advantages.rloo):
        assert not method(rewards, offsets((7, 6))).any()
    assert not advantages.grpo(rewards, offsets((7, 6)), eps=0).any()


def test_think_rm_on_differences_is_grpo():
    rewards = rewards_of(GROUPS)
    differences = [a - b for group in parts(rewards, GROUPS) for a in group for b in group]
    strengths = torch.tensor(differences, dtype=torch.float64)
    ours = advantages.think_rm(strengths, offsets(GROUPS), sum(GROUPS), eps=1e-30)
    expected = advantages.grpo(rewards, offsets(GROUPS), eps=0)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_lagrangian_mixes_reward_and_cost():
    reward, cost = torch.randn(2, 9, dtype=torch.float64, generator=GENERATOR)
    assert torch.equal(advantages.lagrangian(reward, cost, 0), reward)
    lam = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    mixed = advantages.lagrangian(reward, cost, lam)
    assert not mixed.requires_grad
    torch.testing.assert_close(mixed, (reward - 0.7 * cost) / 1.7)
    torch.testing.assert_close(advantages.lagrangian(reward, cost, 1e12), -cost)


def test_groups_without_signal_are_dropped():
    lengths, groups = (3, 1, 0, 2, 4, 2), (2, 1, 0, 3)
    rewards = torch.tensor([1.0, 1.0, 5.0, 0.0, 0.0, 1.0])
    cu_groups, cu_seqlens = offsets(groups), offsets(lengths)
    keep = advantages.groups_with_signal(rewards, cu_groups)
    assert keep.tolist() == [False, False, False, True]
    assert advantages.to_tokens(keep, cu_groups, 6).tolist() == [False] * 3 + [True] * 3
    picked = advantages.select_groups(keep, cu_groups, cu_seqlens)
    assert picked.sequences.tolist() == [3, 4, 5]
    assert picked.tokens.tolist() == list(range(4, 12))
    assert torch.equal(picked.cu_seqlens, offsets((2, 4, 2)))
    assert torch.equal(picked.cu_groups, offsets((3,)))
    # Advantages do not notice.
    kept = advantages.grpo(rewards[picked.sequences], picked.cu_groups)
    assert torch.equal(kept, advantages.grpo(rewards, cu_groups)[picked.sequences])
    nothing = advantages.select_groups(keep & False, cu_groups, cu_seqlens)
    assert nothing.cu_seqlens.tolist() == nothing.cu_groups.tolist() == [0]


def test_to_tokens_repeats():
    x = torch.randn(7, 2)
    expected = x.repeat_interleave(torch.tensor(LENGTHS), dim=0)
    assert torch.equal(advantages.to_tokens(x, offsets(LENGTHS), 53), expected)


# Whitening.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_whitening_gives_mean_zero_and_variance_one(masked, shift_mean, ddof, dtype):
    x = (torch.randn(999, dtype=torch.float64, generator=GENERATOR) * 3 + 1000).to(dtype)
    mask = torch.rand(999, generator=GENERATOR) < 0.7 if masked else torch.ones(999, dtype=torch.bool)
    dirty = x.masked_fill(~mask, float("nan"))  # not read
    out = advantages.whiten(dirty, mask=mask if masked else None, shift_mean=shift_mean, ddof=ddof, eps=0)
    assert out.dtype == dtype
    assert not out[~mask].any()
    kept = x[mask].tolist()
    mean, deviation = statistics.fmean(kept), (statistics.stdev if ddof else statistics.pstdev)(kept)
    expected = torch.tensor([(v - mean) / deviation + (0 if shift_mean else mean) for v in kept], dtype=torch.float64)
    torch.testing.assert_close(out[mask].double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-11)


def test_whitening_one_element_or_none_gives_zeros():
    assert not advantages.whiten(torch.tensor([3.0])).any()
    assert not advantages.whiten(torch.ones(4)).any()
    assert not advantages.whiten(torch.ones(4), eps=0).any()
    assert not advantages.whiten(torch.ones(4), mask=torch.zeros(4, dtype=torch.bool)).any()
    assert advantages.whiten(torch.zeros(0)).shape == (0,)


def test_reinforce_pp_whitens_returns_over_tokens():
    rewards = torch.zeros(53)
    ends = [b - 1 for a, b in itertools.pairwise(offsets(LENGTHS).tolist()) if b > a]
    rewards[ends] = torch.randn(5, generator=GENERATOR)
    out = advantages.reinforce_pp(rewards, offsets(LENGTHS))
    # Without a discount and a penalty all tokens of a response have one advantage.
    assert all(len(set(part)) == 1 for part in parts(out, LENGTHS) if part)
    spread = advantages.to_tokens(prefcore.sequence_reduce(rewards, offsets(LENGTHS)), offsets(LENGTHS), 53)
    torch.testing.assert_close(out, advantages.whiten(spread))
    torch.testing.assert_close(out.double().mean().item(), 0.0, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.double().var().item(), 1.0, rtol=1e-6, atol=0)


def test_reinforce_pp_with_a_baseline_subtracts_the_groups_mean_first():
    rewards, groups = torch.randn(7, generator=GENERATOR), (3, 2, 2)
    mask = torch.rand(53, generator=GENERATOR) < 0.7
    centred = advantages.dr_grpo(rewards, offsets(groups)).repeat_interleave(torch.tensor(LENGTHS))
    out = advantages.reinforce_pp_baseline(rewards, offsets(groups), offsets(LENGTHS), 53, mask=mask)
    assert torch.equal(out, advantages.whiten(centred, mask=mask))


@pytest.mark.parametrize("how", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_num_items_is_what_aggregate_divides_by(how):
    values, cu_seqlens = torch.randn(53), offsets(LENGTHS)
    count = advantages.num_items(cu_seqlens, how)
    assert count.item() == (53 if how == "token_mean" else 5)
    expected = prefcore.aggregate(values, cu_seqlens, how)
    torch.testing.assert_close(prefcore.aggregate(values, cu_seqlens, how, count), expected)
    mask = torch.zeros(53, dtype=torch.bool)
    mask[[0, 1, 9]] = True
    assert advantages.num_items(cu_seqlens, how, mask=mask).item() == (3 if how == "token_mean" else 2)
    assert advantages.num_items(offsets((0, 0)), how).item() == 1


def _share(rank):
    """A rank's part of a batch of 53 tokens: sequences 0 to 3, and 4 to 6."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(53, generator=generator) * 2 + 100
    mask = torch.rand(53, generator=generator) < 0.7
    sequences = {0: LENGTHS[:4], 1: LENGTHS[4:], None: LENGTHS}[rank]
    tokens = {0: slice(0, 20), 1: slice(20, 53), None: slice(0, 53)}[rank]
    return x[tokens], mask[tokens], offsets(sequences)


def _compute(rank, group):
    x, mask, cu_seqlens = _share(rank)
    none = x[:0] if rank == 1 else x  # one rank without elements
    return {
        "whiten": advantages.whiten(x, mask=mask, process_group=group),
        "tokens": advantages.whiten(x, process_group=group),
        "uneven": advantages.whiten(none, process_group=group),
        "returns": advantages.reinforce_pp(x - 100, cu_seqlens, gamma=0.9, mask=mask, process_group=group),
        "token_mean": advantages.num_items(cu_seqlens, "token_mean", mask=mask, process_group=group),
        "seq_mean": advantages.num_items(cu_seqlens, "seq_mean_token_sum", process_group=group),
    }


def _worker(rank, path):
    torch.save(_compute(rank, torch.distributed.group.WORLD), path / f"{rank}.pt")


def test_two_ranks_have_the_whitening_and_the_counts_of_one(two_ranks):
    path = two_ranks(_worker)
    ranks = [torch.load(path / f"{rank}.pt") for rank in (0, 1)]
    whole = _compute(None, None)
    for name in ("whiten", "tokens", "returns"):
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), whole[name], rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(ranks[0]["uneven"], advantages.whiten(_share(0)[0]), rtol=2e-7, atol=1e-7)
    for name in ("token_mean", "seq_mean"):
        assert ranks[0][name].item() == ranks[1][name].item() == whole[name].item()


def test_nothing_carries_gradient():
    rewards, values = torch.randn(53, requires_grad=True), torch.randn(53, requires_grad=True)
    scores = torch.randn(20, requires_grad=True)
    cu_seqlens, cu_groups = offsets(LENGTHS), offsets(GROUPS)
    starts = advantages.ngram_starts(cu_seqlens, 53, 3)
    for out in (
        *advantages.macro_gae(rewards, values, cu_seqlens, starts, gamma=1, lam=1),
        advantages.discounted_returns(rewards, cu_seqlens, gamma=1),
        advantages.reinforce_pp(rewards, cu_seqlens),
        advantages.grpo(scores, cu_groups),
        advantages.rloo(scores, cu_groups),
        advantages.loop_ppo(scores, cu_groups).advantages,
        advantages.lagrangian(rewards, values, 1.0),
        advantages.whiten(rewards),
    ):
        assert not out.requires_grad


def test_everything_without_dynamic_sizes_compiles_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(cu_seqlens, cu_groups, rewards, values, scores, mask):
        total = rewards.shape[0]
        starts = advantages.ngram_starts(cu_seqlens, total, 3)
        macro = advantages.macro_gae(rewards, values, cu_seqlens, starts, gamma=1.0, lam=0.95, mask=mask)
        signal = advantages.to_tokens(advantages.groups_with_signal(scores, cu_groups), cu_groups, scores.shape[0])
        grouped = advantages.to_tokens(advantages.grpo(scores, cu_groups) * signal, cu_seqlens, total)
        return advantages.whiten(macro.advantages, mask=mask) + grouped + advantages.reinforce_pp(rewards, cu_seqlens)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    frames = 0
    for lengths, groups in (((5, 2, 9, 1), (2, 2)), ((2, 3, 4, 0, 8, 1), (2, 2, 2)), ((40, 2, 0, 7, 30), (3, 0, 2))):
        total = sum(lengths)
        inputs = (torch.randn(total), torch.randn(total), torch.randn(len(lengths)), torch.rand(total) < 0.7)
        arguments = (offsets(lengths), offsets(groups), *inputs)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


R, CU = torch.zeros(4), offsets((1, 3))
FLAGS = torch.zeros(4, dtype=torch.bool)
MACRO = functools.partial(advantages.macro_gae, gamma=1, lam=1)
REFUSALS = [
    (ValueError, "ids must have an integer dtype", lambda: advantages.segment_starts(R, CU)),
    (ValueError, "n must be positive, got 0", lambda: advantages.ngram_starts(CU, 4, 0)),
    (TypeError, "n must be an int, got float", lambda: advantages.ngram_starts(CU, 4, 2.0)),
    (ValueError, "cu_seqlens must end at the number of rows, 5, got 4", lambda: advantages.ngram_starts(CU, 5, 2)),
    (ValueError, "sizes must not be empty", lambda: advantages.random_ngram_starts(CU, 4, ())),
    (ValueError, "sizes must be positive, got -1", lambda: advantages.random_ngram_starts(CU, 4, (2, -1))),
    (TypeError, "values must be a Tensor, got NoneType", lambda: MACRO(R, None, CU, FLAGS)),
    (ValueError, "values must be torch.float32, got torch.float64", lambda: MACRO(R, R.double(), CU, FLAGS)),
    (ValueError, "starts must be torch.bool, got torch.float32", lambda: MACRO(R, R, CU, R)),
    (ValueError, r"mask must have shape \[4\], got \[2\]", lambda: MACRO(R, R, CU, FLAGS, mask=FLAGS[:2])),
    (ValueError, "value_reduce must be one of", lambda: MACRO(R, R, CU, FLAGS, value_reduce="max")),
    (ValueError, "reward_reduce must be one of", lambda: MACRO(R, R, CU, FLAGS, reward_reduce="mean")),
    (ValueError, "rewards must be float32 or float64", lambda: advantages.grpo(R.half(), CU)),
    (ValueError, "cu_groups must end at the number of rows, 4, got 1", lambda: advantages.rloo(R, CU[:2])),
    (ValueError, "cu_groups must be int32", lambda: advantages.dr_grpo(R, CU.long())),
    (ValueError, "eps must not be negative, got -1", lambda: advantages.grpo(R, CU, eps=-1)),
    (ValueError, "ddof must be 0 or 1, got 2", lambda: advantages.grpo(R, CU, ddof=2)),
    (ValueError, "single must be one of", lambda: advantages.rloo(R, CU, single="error")),
    (ValueError, r"strengths must have shape \[10\], got \[4\]", lambda: advantages.think_rm(R, CU, 4)),
    (ValueError, "x must be float32 or float64", lambda: advantages.whiten(R.long())),
    (ValueError, "eps must not be negative, got -1", lambda: advantages.whiten(R, eps=-1)),
    (ValueError, "mask must be torch.bool", lambda: advantages.whiten(R, mask=R)),
    (ValueError, "divides by nothing", lambda: advantages.num_items(CU, "token_sum")),
    (ValueError, "lam must not be negative, got -1", lambda: advantages.lagrangian(R, R, -1)),
    (ValueError, r"cost_advantages must have shape \[4\]", lambda: advantages.lagrangian(R, R[:2], 1)),
    (ValueError, r"x must have shape \[2, ...\], got \[4\]", lambda: advantages.to_tokens(R, CU, 4)),
    (ValueError, "cu_seqlens must end at the number of rows, 5, got 4", lambda: advantages.to_tokens(R[:2], CU, 5)),
    (ValueError, "keep must be torch.bool", lambda: advantages.select_groups(R[:2], offsets((1, 1)), CU)),
]


@pytest.mark.parametrize(("error", "text", "call"), REFUSALS, ids=[text for _, text, _ in REFUSALS])
def test_refusals(error, text, call):
    with pytest.raises(error, match=text):
        call()
