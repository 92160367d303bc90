import inspect
import itertools
import math

import pytest
import torch

import prefcore
from prefcore import losses, rewards

F64 = torch.float64
LENGTHS = (3, 0, 5, 1, 4)
GENERATOR = torch.Generator().manual_seed(0)


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


CU = offsets(LENGTHS)
TOTAL, COUNT = sum(LENGTHS), len(LENGTHS)
BOUNDS = list(itertools.pairwise(CU.tolist()))
FULL = [s for s, n in enumerate(LENGTHS) if n]


def normal(*size):
    return torch.randn(*size, dtype=F64, generator=GENERATOR)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def batch():
    """Terminal rewards, log-probs of the rollout and the reference, with gradients asked for in vain."""
    made = normal(COUNT), normal(TOTAL) - 2, normal(TOTAL) - 2
    return tuple(x.requires_grad_() for x in made)


def literal(terms, old, ref, beta):
    """Rewards [T] from {token: score} dictionaries and a k1 penalty."""
    old, ref = old.tolist(), ref.tolist()
    out = [-beta * (a - b) for a, b in zip(old, ref, strict=True)]
    for scores in terms:
        for t, score in scores.items():
            out[t] += score
    return torch.tensor(out, dtype=F64)


def last_tokens(values):
    return {BOUNDS[s][1] - 1: values[s].item() for s in FULL}


def close(ours, expected):
    assert not ours.requires_grad
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_the_reward_of_rlhf_is_the_penalty_and_the_terminal_reward(batch):
    terminal, old, ref = batch
    close(rewards.kl_reward(terminal, old, ref, CU, beta=0.3), literal([last_tokens(terminal)], old, ref, 0.3))
    clipped = rewards.kl_reward(terminal, old, ref, CU, beta=0.3, reward_clamp=0.5)
    close(clipped, literal([last_tokens(terminal.clamp(-0.5, 0.5))], old, ref, 0.3))


@pytest.mark.quick
def test_kl_estimators_on_a_small_vocabulary_by_exact_summation():
    policy, reference = (torch.log_softmax(normal(7), 0) for _ in range(2))
    kl = (policy.exp() * (policy - reference)).sum()
    for estimate in (rewards.kl_k1, rewards.kl_k3):
        close((policy.exp() * estimate(policy, reference)).sum(), kl)
    close(rewards.kl_k2(policy, reference), (policy - reference).square() / 2)
    assert bool((rewards.kl_k3(policy, reference) >= 0).all())
    assert rewards.kl_k1(policy[:0], reference[:0]).shape == (0,)


def test_gradients_that_the_kl_estimators_would_have_as_losses():
    """k1's expected gradient is 0, k2's that of KL(policy, reference), k3's that of KL(reference, policy)."""
    logits = normal(6).requires_grad_()
    reference = torch.log_softmax(normal(6), 0)
    policy = torch.log_softmax(logits, 0)
    u = policy - reference
    forms = {"k1": u, "k2": u.square() / 2, "k3": torch.expm1(-u) + u}
    for kl, name in (("k1", "kl_k1"), ("k2", "kl_k2"), ("k3", "kl_k3")):
        close(getattr(rewards, name)(policy, reference), forms[kl].detach())

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    weights = policy.detach().exp()
    close(gradient((weights * forms["k1"]).sum()), torch.zeros(6, dtype=F64))
    close(gradient((weights * forms["k2"]).sum()), gradient((policy.exp() * u).sum()))
    close(gradient((weights * forms["k3"]).sum()), gradient((reference.exp() * (reference - policy)).sum()))


def test_kl_log_ratios_and_k3_are_clamped_where_asked():
    logps, ref = torch.tensor([-1.0, -40.0, 0.0]), torch.tensor([-31.0, -1.0, 0.0])
    assert rewards.kl_k1(logps, ref).tolist() == [20, -20, 0]
    assert rewards.kl_k1(logps, ref, max_log_ratio=None).tolist() == [30, -39, 0]
    assert rewards.kl_k3(logps, ref, clamp=10.0).tolist()[1:] == [10, 0]


def test_the_full_kl_is_that_of_both_heads_and_has_no_gradient():
    g = torch.Generator().manual_seed(0)
    hidden, weight, ref_hidden, ref_weight = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((7, 5), (40, 5), (7, 3), (40, 3))
    )
    found = rewards.kl_full(hidden.requires_grad_(), weight, ref_hidden, ref_weight, temperature=0.7)
    p, q = ((h @ w.T / 0.7).log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1).detach(), rtol=1e-12, atol=1e-13)
    assert not found.requires_grad


def test_fine_grained_rewards_sum_to_the_weighted_scores(batch):
    _, old, ref = batch
    counts = (2, 0, 3, 1, 0)
    sets = [
        rewards.SegmentReward(ints(1, 2, 0, 0, 4, 0), normal(6), offsets(counts), 0.3),
        rewards.SegmentReward(ints(2, 4), normal(2), offsets((1, 0, 1, 0, 0)), -1.0),
    ]
    places = ([1, 2, 3, 3, 7, 8], [2, 7])
    terms = [
        {t: item.weight * score}
        for item, at in zip(sets, places, strict=True)
        for t, score in zip(at, item.scores.tolist(), strict=True)
    ]
    out = rewards.fine_grained_reward(sets, old, ref, CU, beta=0.1)
    close(out, literal(terms, old, ref, 0.1))
    weighted = sum(item.weight * item.scores.sum() for item in sets)
    close((out - rewards.fine_grained_reward([], old, ref, CU, beta=0.1)).sum(), weighted)


def test_one_segment_of_full_length_is_the_reward_of_rlhf(batch):
    terminal, old, ref = batch
    ends = torch.tensor([n - 1 for n in LENGTHS if n], dtype=torch.int32)
    full = rewards.SegmentReward(ends, terminal[FULL], offsets([min(n, 1) for n in LENGTHS]))
    expected = rewards.kl_reward(terminal, old, ref, CU, beta=0.2)
    assert torch.equal(rewards.fine_grained_reward([full], old, ref, CU, beta=0.2), expected)
    cut = full._replace(ends=ends + 7)
    assert torch.equal(rewards.fine_grained_reward([cut], old, ref, CU, beta=0.2, past_end="move"), expected)
    dropped = rewards.fine_grained_reward([cut], old, ref, CU, beta=0.2, past_end="drop")
    assert torch.equal(dropped, rewards.fine_grained_reward([], old, ref, CU, beta=0.2))


def test_scores_are_normalised_to_a_scale_and_bias():
    scores = normal(4)
    close(rewards.normalize_scores(scores, 0.5, 2.0, scale=3.0, bias=-1.0), (scores - 0.5) / 2 * 3 - 1)


def test_rto_without_its_dense_term_is_the_reward_of_rlhf(batch):
    terminal, old, ref = batch
    dpo = normal(TOTAL)
    out = rewards.rto_reward(terminal, dpo, old, ref, CU, b1=0.0, b2=0.2)
    assert torch.equal(out, rewards.kl_reward(terminal, old, ref, CU, beta=0.2))


def test_rtos_dense_term_sums_to_the_implicit_reward_of_the_sequence(batch):
    terminal, old, ref = batch
    dpo = normal(TOTAL)
    with_term = rewards.rto_reward(terminal, dpo, old, ref, CU, b1=0.4, b2=0.2, b3=2.0)
    dense = with_term - rewards.kl_reward(2 * terminal, old, ref, CU, beta=0.2)
    expected = torch.stack([0.4 * (dpo[a:b] - ref[a:b]).sum() for a, b in BOUNDS])
    close(prefcore.sequence_reduce(dense, CU), expected.detach())


def test_rtos_clamps_bound_the_dense_term_and_the_reward(batch):
    terminal, old, ref = batch
    dpo = normal(TOTAL)
    out = rewards.rto_reward(terminal, dpo, old, ref, CU, b1=0.4, b2=0.2, b3=-2.0, dense_clamp=0.1, reward_clamp=0.5)
    dense = dict(enumerate((0.4 * (dpo - ref)).clamp(-0.1, 0.1).tolist()))
    close(out, literal([dense, last_tokens(-2 * terminal.clamp(-0.5, 0.5))], old, ref, 0.2))


def test_the_penalty_is_taken_from_the_reward_and_added_to_the_cost(batch):
    terminal, old, ref = batch
    costs = normal(COUNT)
    out = rewards.safe_rlhf_v_rewards(terminal, costs, old, ref, CU, beta=0.3)
    close(out.rewards, literal([last_tokens(terminal)], old, ref, 0.3))
    close(out.costs, literal([last_tokens(costs)], old, ref, -0.3))


def test_equal_span_ends_of_self_debugging_are_one_summed_terminal_reward(batch):
    terminal, old, ref = batch
    other = normal(COUNT)
    ends = torch.tensor(LENGTHS, dtype=torch.int32)  # one behind the last token: moved to it
    out = rewards.self_debug_reward(terminal, other, ends, ends, old, ref, CU, beta=0.2)
    close(out, rewards.kl_reward(terminal + other, old, ref, CU, beta=0.2))
    apart = rewards.self_debug_reward(terminal, other, torch.zeros_like(ends), ends, old, ref, CU, beta=0.2)
    at_first = {BOUNDS[s][0]: terminal[s].item() for s in FULL}
    close(apart, literal([at_first, last_tokens(other)], old, ref, 0.2))


def test_an_identical_rewrite_gives_only_agreement(batch):
    _, old, ref = batch
    tokens = torch.arange(TOTAL)
    out = rewards.seq2seq_rm(tokens, tokens, old, ref, CU, beta=0.0, agree=0.7)
    assert bool((out == 0.7).all())


def test_behind_the_first_difference_only_further_ones_count(batch):
    _, old, ref = batch
    tokens = torch.arange(TOTAL)
    rewritten = tokens.clone()
    rewritten[[1, 4, 6, 8]] += 1
    expected = [1, -2, 0, 1, -2, 0, -2, 0, -2, 1, 1, 1, 1]
    out = rewards.seq2seq_rm(tokens, rewritten, old, ref, CU, beta=0.1, differ=2.0)
    close(out, literal([dict(enumerate(map(float, expected)))], old, ref, 0.1))
    assert torch.equal(rewards.seq2seq_rm(tokens, rewritten, old, ref, CU, beta=0.1, differ=2.0, mask=None), out)
    mask = torch.ones(TOTAL, dtype=torch.bool)
    mask[4] = False
    out = rewards.seq2seq_rm(tokens, rewritten, old, ref, CU, beta=0.0, differ=2.0, mask=mask)
    assert out.tolist() == [1, -2, 0, 1, 0, 1, -2, 0, -2, 1, 1, 1, 1]


def test_an_antisymmetric_gap_of_equal_responses_is_zero(batch):
    gaps, old, ref = batch
    same = rewards.pit_gap(gaps, old, ref, CU, beta=0.1, reversed_gaps=gaps)
    close(same, rewards.kl_reward(torch.zeros_like(gaps), old, ref, CU, beta=0.1))
    both = rewards.pit_gap(gaps, old, ref, CU, beta=0.1, reversed_gaps=-gaps)
    assert torch.equal(both, rewards.pit_gap(gaps, old, ref, CU, beta=0.1))
    assert torch.equal(both, rewards.kl_reward(gaps, old, ref, CU, beta=0.1))


def test_score_bonus_and_turns(batch):
    first, second = normal(4), normal(4)
    close(rewards.score_bonus(first, second, alpha=10.0), second + 10 * (second - first))
    assert torch.equal(rewards.score_bonus(first, second, alpha=0.0), second)
    _, old, ref = batch
    turns = torch.arange(TOTAL, dtype=torch.int32) % 3
    betas = torch.tensor([0.5, 0.25, 0.0], dtype=F64)
    coefficients = rewards.turn_coefficients(betas, turns)
    assert coefficients.tolist() == [betas[t] for t in turns.tolist()]
    assert rewards.turn_coefficients(betas, turns - 1)[0] == 0
    none = torch.zeros(COUNT, dtype=F64)
    by_turn = rewards.kl_reward(none, old, ref, CU, beta=betas, turns=turns)
    assert torch.equal(by_turn, rewards.kl_reward(none, old, ref, CU, beta=coefficients))


def test_equal_coefficients_of_turns_are_one_coefficient(batch):
    terminal, old, ref = batch
    turns = torch.arange(TOTAL, dtype=torch.int32) % 2
    betas = torch.full((2,), 0.3, dtype=F64)
    by_turn = rewards.kl_reward(terminal, old, ref, CU, beta=betas, turns=turns)
    assert torch.equal(by_turn, rewards.kl_reward(terminal, old, ref, CU, beta=0.3))


def test_overlong_responses_lose_linearly():
    lengths = ints(0, 1, 80, 81, 90, 100, 101, 5000)
    expected = [max(-1.0, min(0.0, (80 - n) / 20)) for n in lengths.tolist()]
    assert rewards.dapo_overlong(lengths, max_length=100, cache=20).tolist() == torch.tensor(expected).tolist()


def matrices(sizes):
    made = []
    for k in sizes:
        p = torch.rand(k, k, dtype=F64, generator=GENERATOR).triu(1)
        made.append((p + (1 - p).T.tril(-1)).fill_diagonal_(math.nan))
    return made


def test_win_rates_sum_to_half_the_group_and_follow_its_permutations():
    sizes = (4, 0, 1, 3)
    p = matrices(sizes)
    cu_groups = offsets(sizes)
    packed = torch.cat([x.flatten() for x in p])
    out = rewards.selfplay_winrate(packed, cu_groups, sum(sizes))
    expected = [
        sum(x[i, j].item() for j in range(len(x)) if j != i) / (len(x) - 1) if len(x) > 1 else 0.5
        for x in p
        for i in range(len(x))
    ]
    close(out, torch.tensor(expected, dtype=F64))
    close(out[:4].sum(), torch.tensor(2.0, dtype=F64))
    order = [2, 0, 3, 1]
    p[0] = p[0][order][:, order]
    permuted = rewards.selfplay_winrate(torch.cat([x.flatten() for x in p]), cu_groups, sum(sizes))
    close(permuted[:4], out[:4][order])


def test_win_rates_of_a_total_order_are_rescaled_ranks():
    scores = normal(5)
    out = rewards.selfplay_winrate((scores[:, None] > scores).to(F64).flatten(), offsets((5,)), 5, symmetrize=False)
    close(out, scores.argsort().argsort().to(F64) / 4)


def test_a_judge_that_depends_on_the_order_is_symmetrised():
    p = torch.rand(3, 3, dtype=F64, generator=GENERATOR)
    fair = (p + 1 - p.T) / 2
    out = rewards.selfplay_winrate(p.flatten(), offsets((3,)), 3)
    close(out, rewards.selfplay_winrate(fair.flatten(), offsets((3,)), 3, symmetrize=False))
    close(out.sum(), torch.tensor(1.5, dtype=F64))


def test_an_ensemble_of_one_is_its_score():
    scores = normal(6, 1)
    for how in ("mean", "wco", "uwo"):
        for ddof in (0, 1):
            assert torch.equal(rewards.reward_ensemble(scores, how, ddof=ddof), scores[:, 0])


@pytest.mark.parametrize("ddof", [0, 1])
def test_ensembles_are_their_formulas(ddof):
    scores = normal(6, 4).requires_grad_()
    rows = scores.tolist()
    mean = [math.fsum(row) / 4 for row in rows]
    variance = [math.fsum((x - m) ** 2 for x in row) / (4 - ddof) for row, m in zip(rows, mean, strict=True)]
    uwo = [m - 0.5 * v for m, v in zip(mean, variance, strict=True)]
    close(rewards.reward_ensemble(scores, "mean"), torch.tensor(mean, dtype=F64))
    close(rewards.reward_ensemble(scores, "uwo", lam=0.5, ddof=ddof), torch.tensor(uwo, dtype=F64))
    worst = rewards.reward_ensemble(scores, "wco")
    assert worst.tolist() == [min(row) for row in rows]
    assert bool((worst <= rewards.reward_ensemble(scores, "mean")).all())


def test_kl_of_best_of_n():
    assert rewards.best_of_n_kl(1) == 0
    assert rewards.best_of_n_kl(4) == math.log(4) - 0.75
    # The best of n ranks: density n u^(n - 1) on [0, 1], against 1.
    u = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    density = 4 * u**3
    assert (density * density.log()).mean().item() == pytest.approx(rewards.best_of_n_kl(4), abs=1e-6)


def test_the_robust_reward_is_the_worst_or_the_nominal_one():
    scores, stds = normal(5, 3), torch.rand(5, 3, dtype=F64, generator=GENERATOR)
    worst = rewards.reward_ensemble(scores, "wco")
    assert torch.equal(rewards.reward_robust(scores, stds, lam=0.0), worst)
    nominal = scores[torch.arange(5), stds.argmin(1)]
    assert torch.equal(rewards.reward_robust(scores, stds, lam=1.0), nominal)
    close(rewards.reward_robust(scores, stds, lam=0.3), 0.3 * nominal + 0.7 * worst)
    same = scores[:, :1].expand(5, 3).contiguous()
    close(rewards.reward_robust(same, stds, lam=0.3), same[:, 0])


def test_maxmin_takes_the_group_that_fares_worst():
    scores = normal(8, 3)
    scores[:, 1] -= 2
    out = rewards.maxmin_rlhf(scores)
    assert torch.equal(out.rewards, scores[:, 1])
    assert out.weights.tolist() == [0, 1, 0]
    sharp = rewards.maxmin_rlhf(scores, temperature=1e-3)
    close(sharp.rewards, out.rewards)
    means = [math.fsum(column) / 8 for column in scores.T.tolist()]
    weights = [math.exp(-m / 0.7) for m in means]
    weights = torch.tensor(weights, dtype=F64) / sum(weights)
    soft = rewards.maxmin_rlhf(scores, temperature=0.7)
    close(soft.weights, weights)
    close(soft.rewards, scores @ weights)


def test_maxmin_of_one_group_is_its_reward():
    scores = normal(4, 1)
    for temperature in (None, 0.5):
        out = rewards.maxmin_rlhf(scores, temperature=temperature)
        assert torch.equal(out.rewards, scores[:, 0])
        assert out.weights.tolist() == [1]


def test_exchanging_positive_and_negative_follow_ups_negates_the_reward():
    positive, negative = normal(4, 3), normal(4, 2)
    lengths = ints(2, 5, 1)
    out = rewards.flr_reward(positive, negative)
    close(out, positive.sum(1) / 3 - negative.sum(1) / 2)
    assert torch.equal(rewards.flr_reward(negative, positive), -out)
    per_token = rewards.flr_reward(positive, negative, positive_lengths=lengths)
    close(per_token, (positive / lengths).sum(1) / 3 - negative.sum(1) / 2)
    assert torch.equal(rewards.flr_reward(negative, positive, negative_lengths=lengths), -per_token)
    single = rewards.flr_reward(positive.float(), negative.float(), positive_lengths=lengths.double())
    assert single.dtype == torch.float32


def test_love_is_the_probability_of_a_reaction():
    helpful, safe, love = normal(3, 4)
    out = rewards.rluf_reward(helpful, safe, love, weights=(0.5, 0.3, 0.2))
    close(out, 0.5 * helpful + 0.3 * safe + 0.2 / (1 + (-love).exp()))
    # The loss of its reward model is Bradley-Terry's against a score of 0.
    softplus = torch.nn.functional.softplus
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(love, torch.ones_like(love))
    close(cross_entropy, softplus(-(love - 0)).mean())


def test_exchanging_the_pair_maps_the_probability_to_one_less_it():
    first, second = normal(6, 2), normal(6, 2)
    out = rewards.pairwise_rl(first, second)
    # The response is now where the anchor was: what was asked second is asked first, with it as B.
    exchanged = rewards.pairwise_rl(second, first)
    close(exchanged, 1 - out)
    p, q = (torch.softmax(x, 1)[:, 0] for x in (first, second))
    close(out, (p + 1 - q) / 2)
    close(rewards.pairwise_rl(first, second, logit=True), (out / (1 - out)).log())
    huge = rewards.pairwise_rl(torch.tensor([[500.0, 0.0]]), torch.tensor([[0.0, 500.0]]), logit=True)
    assert huge.isfinite().all()


def test_small_mixtures():
    a, b, c, d = normal(4, 5)
    close(rewards.debate_reward(a, b, lam=0.25), 0.75 * a + 0.25 * b)
    close(rewards.alphadrive_reward(a, b, c, d), a * b * c + d)
    out = rewards.bstar_balance(ints(0, 4, 8, 16, 0, 3), ints(4, 8, 8, 32, 0, 0))
    assert out.tolist() == [0, 0.25, 1, 0.5, 0, 0]
    assert rewards.bstar_balance(ints(4), torch.full((1,), 8.0, dtype=F64)).dtype == torch.float32


def test_running_moments_are_those_of_all_rewards_so_far():
    batches = [normal(n) * 3 + 5 for n in (4, 0, 1, 7)]
    normalize = rewards.RewardNormalizer(clip=1.0)
    seen = torch.zeros(0, dtype=F64)
    for batch in batches:
        seen = torch.cat([seen, batch])
        close(normalize(batch.requires_grad_()), ((batch - seen.mean()) / seen.std()).clamp(-1, 1).detach())
    fresh = normal(3)
    close(normalize(fresh, update=False), ((fresh - seen.mean()) / seen.std()).clamp(-1, 1).detach())
    state = normalize.state_dict()
    again = rewards.RewardNormalizer(clip=1.0)
    again.load_state_dict(state)
    for _ in range(2):
        assert torch.equal(again(fresh), normalize(fresh))
    assert state["moments"][0] == 12  # a copy


def test_switches_of_the_normaliser():
    batch = normal(5).float()
    assert torch.equal(rewards.RewardNormalizer(None, shift=False, scale=False)(batch), batch)
    close(rewards.RewardNormalizer(None, scale=False)(batch), (batch.double() - batch.double().mean()).float())
    assert rewards.RewardNormalizer()(batch[:1]).tolist() == [0]
    assert rewards.RewardNormalizer()(torch.full((3,), 2.0)).tolist() == [0, 0, 0]


def _worker(rank, path):
    group = torch.distributed.group.WORLD
    scores = torch.arange(12, dtype=F64).view(6, 2).cos()
    own = scores[:2] if rank == 0 else scores[2:]
    normalize = rewards.RewardNormalizer(process_group=group)
    out = [normalize(own[:, 0]), normalize(own[:, 1]), *rewards.maxmin_rlhf(own, process_group=group)]
    torch.save([x.tolist() for x in out], path / f"{rank}.pt")


def test_two_ranks_are_one(two_ranks):
    path = two_ranks(_worker)
    results = [torch.load(path / f"{rank}.pt") for rank in (0, 1)]
    scores = torch.arange(12, dtype=F64).view(6, 2).cos()
    normalize = rewards.RewardNormalizer()
    whole = [normalize(scores[:, 0]), normalize(scores[:, 1]), *rewards.maxmin_rlhf(scores)]
    for i in range(3):
        close(torch.tensor(results[0][i] + results[1][i], dtype=F64), whole[i])
    for rank in range(2):
        assert results[rank][3] == whole[3].tolist()


def test_reward_ids_are_in_the_registry_apart_from_losses():
    ids = losses.names("reward")
    assert {"kl_k1", "kl_k2", "kl_k3", "fine_grained_reward", "selfplay_winrate", "maxmin_rlhf"} <= set(ids)
    assert not set(ids) & set(losses.names())
    assert "dpo" in losses.names("pairwise")
    for name in ids:
        method = losses.get(name)
        assert method.function is getattr(rewards, name)
        assert method.family == "reward"
        assert method.paper in " ".join(inspect.getdoc(method.function).split())
        assert ("old" in method.needs) == ("old_logps" in inspect.signature(method.function).parameters)


S = torch.zeros(2)
M = torch.zeros(2, 3)
REFUSALS = [
    (TypeError, "rewards must be a Tensor", lambda: rewards.rto_reward([1.0], S, S, S, CU, b1=1, b2=1)),
    (TypeError, "alpha must be a number", lambda: rewards.score_bonus(S, S, alpha="1")),
    (TypeError, "cache must be an int", lambda: rewards.dapo_overlong(ints(1), max_length=4, cache=1.0)),
    (TypeError, "total must be an int", lambda: rewards.selfplay_winrate(S, offsets((1, 1)), 2.0)),
    (TypeError, "n must be an int", lambda: rewards.best_of_n_kl(2.0)),
    (TypeError, "clip must be a number", lambda: rewards.RewardNormalizer("1")),
    (ValueError, "cache must be in", lambda: rewards.dapo_overlong(ints(1), max_length=4, cache=5)),
    (ValueError, "lengths must be integers", lambda: rewards.dapo_overlong(S, max_length=4, cache=2)),
    (ValueError, r"preferences must have shape \[5\]", lambda: rewards.selfplay_winrate(S, offsets((1, 2)), 3)),
    (ValueError, "how must be one of", lambda: rewards.reward_ensemble(M, "median")),
    (ValueError, "ddof must be 0 or 1", lambda: rewards.reward_ensemble(M, "uwo", ddof=2)),
    (ValueError, r"scores must have shape \[S, k\]", lambda: rewards.reward_ensemble(S, "mean")),
    (ValueError, r"stds must have shape \[2, 3\], got \[2\]", lambda: rewards.reward_robust(M, S, lam=0.5)),
    (ValueError, r"lam must be in \[0, 1\]", lambda: rewards.reward_robust(M, M, lam=2)),
    (ValueError, "temperature must be positive", lambda: rewards.maxmin_rlhf(M, temperature=0)),
    (ValueError, "positive_lengths must have shape", lambda: rewards.flr_reward(M, M, positive_lengths=ints(1))),
    (ValueError, "negative_logps must be of 2 responses", lambda: rewards.flr_reward(M, M[:1])),
    (ValueError, "weights must be", lambda: rewards.rluf_reward(S, S, S, weights=(1, 1))),
    (ValueError, r"first_logits must have shape \[S, 2\]", lambda: rewards.pairwise_rl(M, M)),
    (ValueError, "turns must be below 2, got 2", lambda: rewards.turn_coefficients(S, ints(0, 2))),
    (ValueError, "turns must be integers", lambda: rewards.turn_coefficients(S, S)),
    (ValueError, "std must be positive", lambda: rewards.normalize_scores(S, 0.0, 0.0)),
    (ValueError, "tokens must be integers", lambda: rewards.seq2seq_rm(S, S, S, S, offsets((2,)), beta=0.1)),
    (ValueError, "logps must have shape", lambda: rewards.kl_k1(M, M)),
    (TypeError, "clamp must be a number", lambda: rewards.kl_k3(S, S, clamp="1")),
    (
        ValueError,
        r"mask must be torch.bool \[2\], got torch.float32 \[2\]",
        lambda: rewards.seq2seq_rm(ints(1, 2), ints(1, 2), S, S, offsets((2,)), beta=0.1, mask=S),
    ),
    (
        ValueError,
        r"cu_seqlens must have shape \[S \+ 1\], got \[\]",
        lambda: rewards.self_debug_reward(S, S, ints(0, 0), ints(0, 0), S, S, torch.tensor(2), beta=0.1),
    ),
    (ValueError, "cu_groups must be int32", lambda: rewards.selfplay_winrate(S, offsets((1, 1)).long(), 2)),
    (ValueError, "negative_logps must be torch.float32", lambda: rewards.flr_reward(M, M.double())),
    (ValueError, r"selected must have shape \[1\], got \[2\]", lambda: rewards.bstar_balance(ints(1), ints(1, 2))),
    (ValueError, "eps must be positive", lambda: rewards.RewardNormalizer(eps=0.0)),
    (ValueError, r"moments must have shape \[3\]", lambda: rewards.RewardNormalizer().load_state_dict({"moments": S})),
    (ValueError, "target must be positive", lambda: rewards.bstar_balance(ints(1), ints(1), target=0)),
]


@pytest.mark.parametrize(("error", "text", "call"), REFUSALS, ids=[text for _, text, _ in REFUSALS])
def test_refusals(error, text, call):
    with pytest.raises(error, match=text):
        call()
