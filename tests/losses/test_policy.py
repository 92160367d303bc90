"""Policy losses against their papers' formulas, TRL's, and each other."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch

import prefcore
import prefcore.losses as losses

LENGTHS = (5, 1, 0, 7, 3)
S, T = len(LENGTHS), sum(LENGTHS)
CU = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
F64 = torch.float64


def draw(size, scale=1.0, seed=0):
    return scale * torch.randn(size, dtype=F64, generator=torch.Generator().manual_seed(seed))


LOGPS = draw(T, 0.5, 1) - 2
OLD = LOGPS + draw(T, 0.4, 2)
REF = LOGPS + draw(T, 0.4, 3)
TOKEN_ADVANTAGES, ADVANTAGES = draw(T, 1.0, 4), draw(S, 1.0, 5)
WEIGHTS, ENTROPY = draw(T, 1.0, 6).abs(), draw(T, 1.0, 7).abs()
PREFERENCES, COSTS = torch.sigmoid(draw(S, 1.0, 8)), draw(S, 1.0, 9)
CU_MACROS = torch.tensor([0, 2, 5, 6, 9, 13, 14, 16], dtype=torch.int32)
MACROS = draw(7, 1.0, 10)
CU_TURNS = torch.tensor([0, 3, 5, 6, 10, 13, 16], dtype=torch.int32)
TURN_BETAS = torch.tensor([0.3, 0.0, 0.3, 0.1, 0.3, 0.1], dtype=F64)
OWNERS = [s for s, length in enumerate(LENGTHS) for _ in range(length)]
SPANS = list(itertools.pairwise(CU.tolist()))


def clip(x, low, high):
    return torch.clamp(x, low, high)


def surrogate(rho, a, low, high):
    return torch.max(-rho * a, -clip(rho, low, high) * a)


def of_sequences(function):
    """``[S]`` of each non-empty sequence's tokens; zeros for the others."""
    return lambda lp: torch.stack(
        [function(lp[a:b], slice(a, b), s) if b > a else 0 * lp.sum() for s, (a, b) in enumerate(SPANS)]
    )


def of_tokens(function, advantages=TOKEN_ADVANTAGES):
    return lambda lp: torch.stack([function(lp[t], OLD[t], advantages[t], t) for t in range(T)])


def spread(values, owners=OWNERS):
    return torch.stack([values[s] for s in owners])


def k3(lp, t):
    u = REF[t] - lp
    return torch.exp(u) - u - 1


def sapo(lp, old, a, t):
    tau = 1.0 if a > 0 else 1.05
    return -torch.sigmoid(tau * (torch.exp(lp - old) - 1)) * 4 / tau * a


def dual(lp, old, a, t):
    loss = surrogate(torch.exp(lp - old), a, 0.8, 1.2)
    return torch.min(loss, -1.5 * a) if a < 0 else loss


def gmpo(lp, span, s):
    q, old = [], OLD[span]
    for x, y in zip(lp, old, strict=True):
        held = torch.clamp(x - y, -0.4, 0.4)
        q.append(torch.min(x - y, held) if ADVANTAGES[s] > 0 else torch.max(x - y, held))
    return -ADVANTAGES[s] * torch.exp(sum(q) / len(q))


def nash(klr):
    def formula(lp):
        total = 0 * lp
        for s, (a, b) in enumerate(SPANS):
            ell = (lp[a:b] - REF[a:b]).detach()
            for t in range(a, b):
                pull = {"sequence": ell.sum(), "reverse_cumsum": ell[t - a :].sum(), "same_token": ell[t - a]}[klr]
                total[t] = -(PREFERENCES[s] - 0.5) * lp[t] + 0.3 * pull * lp[t]
        return total

    return formula


def safe(lp):
    mixed = (TOKEN_ADVANTAGES - 2.0 * draw(T, 1.0, 20)) / 3.0
    return of_tokens(lambda x, old, a, t: surrogate(torch.exp(x - old), a, 0.8, 1.2), mixed)(lp)


def hc(lp):
    k, mean, std = 1.5, 0.2, 0.7
    bent = [c + k * (c**2 - 2 * c * mean) / (2 * std) for c in COSTS.tolist()]
    return torch.stack([-(ADVANTAGES[s] - 0.5 * bent[s] - COSTS[s]) * lp[t] for t, s in enumerate(OWNERS)])


def vespo(lp):
    out = []
    for t, s in enumerate(OWNERS):
        a, b = SPANS[s]
        log_w = (lp[a:b] - OLD[a:b]).detach().sum()
        k, lam = (2.0, 3.0) if ADVANTAGES[s] >= 0 else (3.0, 2.0)
        out.append(-torch.exp(lam + k * log_w - lam * torch.exp(log_w)) * ADVANTAGES[s] * lp[t])
    return torch.stack(out)


def covariant(dropped):
    """Three of sixteen tokens, those of the largest covariance with the advantages."""

    def formula(lp):
        given, x = TOKEN_ADVANTAGES.tolist(), lp.tolist()
        covariance = [(a - sum(given) / T) * (y - sum(x) / T) for a, y in zip(given, x, strict=True)]
        chosen = sorted(range(T), key=lambda t: -covariance[t])[: int(0.2 * T)]
        out = []
        for t in range(T):
            rho = torch.exp(lp[t] - OLD[t])
            if dropped:
                out.append(0 * lp[t] if t in chosen else surrogate(rho, TOKEN_ADVANTAGES[t], 0.8, 1.2))
            else:
                out.append(-rho * TOKEN_ADVANTAGES[t] + (0.7 * (lp[t] - OLD[t]).abs() if t in chosen else 0))
        return torch.stack(out)

    return formula


def dppo_tv(lp, old, a, t):
    moved = torch.exp(lp.detach()) - torch.exp(old)
    if (a > 0 and moved > 0.02) or (a < 0 and moved < -0.01):
        return 0 * lp
    return -torch.exp(lp - old).clamp(max=1.1).detach() * a * lp


def copg(lp, span, s):
    group = (0, 1) if s < 2 else range(2, S)
    bent = [float(ADVANTAGES[j] - 0.3 * (LOGPS - REF)[slice(*SPANS[j])].sum()) for j in group]
    own = bent[s - group[0]]
    return -(own - (sum(bent) - own) / (len(bent) - 1)) * lp.sum()


def gspo_token(lp):
    out = []
    for t, s in enumerate(OWNERS):
        a, b = SPANS[s]
        ratio = torch.exp((lp[a:b] - OLD[a:b]).mean()).detach() * torch.exp(lp[t] - lp[t].detach())
        out.append(surrogate(ratio, TOKEN_ADVANTAGES[t], 0.9, 1.05))
    return torch.stack(out)


def ppo_max(lp):
    base = of_tokens(
        lambda x, old, a, t: surrogate(torch.exp(x - old), a, 0.8, 1.2), TOKEN_ADVANTAGES.clamp(-0.5, 0.5)
    )(lp)
    return base + 0.2 * math.copysign(1, ENTROPY.mean() - 3.0) * (ENTROPY - 3.0)


def clipped(x, old, a, t):
    return surrogate(torch.exp(x - old), a, 0.8, 1.2)


PLAIN = of_tokens(clipped)
BY_SEQUENCE = of_tokens(clipped, spread(ADVANTAGES))

# Each method: a call on log-probs, and the formula of the same in float64, by loops.
CASES = {
    "ppo": (lambda x: losses.ppo(x, OLD, TOKEN_ADVANTAGES), PLAIN),
    "ppo of sequences": (lambda x: losses.ppo(x, OLD, ADVANTAGES, cu_seqlens=CU), BY_SEQUENCE),
    "ppo dual": (lambda x: losses.ppo(x, OLD, TOKEN_ADVANTAGES, dual_clip=1.5), of_tokens(dual)),
    "ppo weighted, entropy": (
        lambda x: losses.ppo(x, OLD, TOKEN_ADVANTAGES, weights=WEIGHTS, entropy=ENTROPY, entropy_coef=0.1),
        lambda x: WEIGHTS * PLAIN(x) - 0.1 * ENTROPY,
    ),
    "ppo_max": (
        lambda x: losses.ppo_max(
            x, OLD, TOKEN_ADVANTAGES, advantage_clip=0.5, entropy=ENTROPY, entropy_weight=0.2, entropy_target=3.0
        ),
        ppo_max,
    ),
    "ma_ppo": (
        lambda x: losses.ma_ppo(x, OLD, MACROS, CU_MACROS),
        of_tokens(clipped, spread(MACROS, [0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 4, 5, 6, 6])),
    ),
    "rto": (lambda x: losses.rto(x, OLD, TOKEN_ADVANTAGES), PLAIN),
    "self_debug_ppo": (lambda x: losses.self_debug_ppo(x, OLD, TOKEN_ADVANTAGES), PLAIN),
    "loop_ppo": (
        lambda x: losses.loop_ppo(x, OLD, ADVANTAGES, cu_seqlens=CU),
        # As printed: g = (1 + eps) A if A >= 0 else A / (1 + eps).
        of_tokens(
            lambda x, old, a, t: -torch.min(torch.exp(x - old) * a, 1.1 * a if a >= 0 else a / 1.1), spread(ADVANTAGES)
        ),
    ),
    "loop_ppo of trajectories": (
        lambda x: losses.loop_ppo(x, OLD, ADVANTAGES, cu_ratios=CU),
        of_sequences(lambda x, i, s: surrogate(torch.exp((x - OLD[i]).sum()), ADVANTAGES[s], 1 / 1.1, 1.1)),
    ),
    "score_rl": (
        lambda x: losses.score_rl(x, ADVANTAGES, TURN_BETAS, CU_TURNS, cu_seqlens=CU, ref_logps=REF),
        lambda x: (
            -spread(ADVANTAGES) * x
            + spread(TURN_BETAS, [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 5]) * (x - REF) ** 2 / 2
        ),
    ),
    **{
        f"nash_md_pg {klr}": (
            lambda x, klr=klr: losses.nash_md_pg(x, REF, PREFERENCES, CU, tau=0.3, klr=klr),
            nash(klr),
        )
        for klr in ("sequence", "reverse_cumsum", "same_token")
    },
    "safe_rlhf_v": (lambda x: losses.safe_rlhf_v(x, OLD, TOKEN_ADVANTAGES, draw(T, 1.0, 20), lam=2.0), safe),
    "reinforce": (lambda x: losses.reinforce(x, TOKEN_ADVANTAGES), lambda x: -TOKEN_ADVANTAGES * x),
    "rloo": (
        lambda x: losses.rloo(x, OLD, ADVANTAGES, CU),
        of_sequences(lambda x, i, s: surrogate(torch.exp((x - OLD[i]).sum()), ADVANTAGES[s], 0.8, 1.2)),
    ),
    "reinforce_pp": (lambda x: losses.reinforce_pp(x, OLD, TOKEN_ADVANTAGES), PLAIN),
    "reinforce_pp_baseline": (lambda x: losses.reinforce_pp_baseline(x, OLD, TOKEN_ADVANTAGES), PLAIN),
    "grpo": (
        lambda x: losses.grpo(x, OLD, ADVANTAGES, cu_seqlens=CU, ref_logps=REF, beta=0.04),
        lambda x: BY_SEQUENCE(x) + 0.04 * torch.stack([k3(x[t], t) for t in range(T)]),
    ),
    "grpo corrected": (
        lambda x: losses.grpo(x, OLD, ADVANTAGES, cu_seqlens=CU, ref_logps=REF, beta=0.04, kl="k3_corrected"),
        lambda x: BY_SEQUENCE(x) + 0.04 * torch.stack([torch.exp(x[t] - OLD[t]) * k3(x[t], t) for t in range(T)]),
    ),
    "dr_grpo": (lambda x: losses.dr_grpo(x, OLD, ADVANTAGES, cu_seqlens=CU), BY_SEQUENCE),
    "bnpo": (lambda x: losses.bnpo(x, OLD, ADVANTAGES, cu_seqlens=CU), BY_SEQUENCE),
    "dyna_grpo": (lambda x: losses.dyna_grpo(x, OLD, ADVANTAGES, cu_seqlens=CU), BY_SEQUENCE),
    "dapo": (
        lambda x: losses.dapo(x, OLD, TOKEN_ADVANTAGES),
        of_tokens(lambda x, old, a, t: surrogate(torch.exp(x - old), a, 0.8, 1.28)),
    ),
    "gspo": (
        lambda x: losses.gspo(x, OLD, ADVANTAGES, CU, eps=0.1, eps_high=0.05),
        of_sequences(lambda x, i, s: surrogate(torch.exp((x - OLD[i]).mean()), ADVANTAGES[s], 0.9, 1.05)),
    ),
    "gspo_token": (
        lambda x: losses.gspo_token(x, OLD, TOKEN_ADVANTAGES, CU, eps=0.1, eps_high=0.05),
        gspo_token,
    ),
    "luspo": (
        lambda x: losses.luspo(x, OLD, ADVANTAGES, CU),
        of_sequences(
            lambda x, i, s: len(x) * surrogate(torch.exp((x - OLD[i]).mean()), ADVANTAGES[s], 1 - 3e-4, 1 + 4e-4)
        ),
    ),
    "cispo": (
        lambda x: losses.cispo(x, OLD, TOKEN_ADVANTAGES, low=0.8, high=1.3),
        of_tokens(lambda x, old, a, t: -clip(torch.exp(x - old), 0.8, 1.3).detach() * a * x),
    ),
    "gmpo": (lambda x: losses.gmpo(x, OLD, ADVANTAGES, CU), of_sequences(gmpo)),
    "sapo": (lambda x: losses.sapo(x, OLD, TOKEN_ADVANTAGES), of_tokens(sapo)),
    "vespo": (lambda x: losses.vespo(x, OLD, ADVANTAGES, CU), vespo),
    "clip_cov": (lambda x: losses.clip_cov(x, OLD, TOKEN_ADVANTAGES, share=0.2), covariant(dropped=True)),
    "kl_cov": (lambda x: losses.kl_cov(x, OLD, TOKEN_ADVANTAGES, share=0.2, coef=0.7), covariant(dropped=False)),
    "dppo_tv": (
        lambda x: losses.dppo_tv(x, OLD, TOKEN_ADVANTAGES, low=0.01, high=0.02, ratio_max=1.1),
        of_tokens(dppo_tv),
    ),
    "dro_token": (
        lambda x: losses.dro_token(x, OLD, TOKEN_ADVANTAGES, beta=0.4),
        of_tokens(lambda x, old, a, t: -(a * x - 0.5 * 0.4 * (x - old) ** 2)),
    ),
    "copg_policy": (
        lambda x: losses.copg_policy(x, REF, ADVANTAGES, CU, torch.tensor([0, 2, S], dtype=torch.int32), beta=0.3),
        of_sequences(copg),
    ),
    "hc_rlhf": (
        lambda x: losses.hc_rlhf(x, ADVANTAGES, COSTS, CU, lam=0.5, mean=0.2, std=0.7, k=1.5, baselines=COSTS),
        hc,
    ),
    "pf_ppo": (
        lambda x: losses.pf_ppo(x, OLD, TOKEN_ADVANTAGES, ADVANTAGES.abs(), CU),
        lambda x: spread(ADVANTAGES.abs()) * PLAIN(x),
    ),
}


def both(function, logps=LOGPS):
    """Value and gradient of the sum under fixed factors."""
    leaf = logps.clone().requires_grad_()
    out = function(leaf)
    value = out.losses if isinstance(out, prefcore.PolicyTerms) else out
    (grad,) = torch.autograd.grad((value * draw(value.shape[0], 1.0, 30)).sum(), leaf)
    return value.detach(), grad


@pytest.mark.quick
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_papers_formulas(name):
    function, formula = CASES[name]
    for actual, expected in zip(both(function), both(formula), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_float32_and_narrower_log_probs_are_computed_in_float32(name):
    function, _ = CASES[name]
    value, grad = both(function, LOGPS.float())
    assert (value.dtype, grad.dtype) == (torch.float32, torch.float32)
    assert both(function, LOGPS.bfloat16())[0].dtype == torch.float32


def test_every_method_has_a_transcription_and_its_paper_in_the_docstring():
    policy = {name for name in losses.names() if losses.get(name).family == "policy"}
    assert policy == {name.split()[0] for name in CASES}
    for name in policy:
        method = losses.get(name)
        assert method.function is getattr(losses, name)
        assert method.paper in " ".join(inspect.getdoc(method.function).split())


# METHODS: what one is of another.

ON_POLICY = ["ppo", "cispo", "sapo", "gspo", "gmpo", "rloo", "loop_ppo", "dapo", "grpo", "dr_grpo", "bnpo"]


@pytest.mark.parametrize("old", [None, LOGPS], ids=["none", "equal"])
@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_the_gradient_is_that_of_reinforce(name, old):
    leaf = LOGPS.clone().requires_grad_()
    if name in ("gspo", "gmpo", "rloo"):
        out = getattr(losses, name)(leaf, old, ADVANTAGES, CU).losses.sum()
        how = "sum" if name == "rloo" else "mean"
        plain = prefcore.sequence_reduce(losses.reinforce(leaf, ADVANTAGES, cu_seqlens=CU).losses, CU, how).sum()
    else:
        options = {"high": 1.2} if name == "cispo" else {}
        out = getattr(losses, name)(leaf, old, TOKEN_ADVANTAGES, **options).losses.sum()
        plain = losses.reinforce(leaf, TOKEN_ADVANTAGES).losses.sum()
    for actual, expected in zip(torch.autograd.grad(out, leaf), torch.autograd.grad(plain, leaf), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-15)


def test_copgs_policy_view_has_the_gradient_of_its_squares():
    leaf, beta = LOGPS.clone().requires_grad_(), 0.3
    out = losses.copg_policy(leaf, REF, ADVANTAGES, CU, torch.tensor([0, 2, S], dtype=torch.int32), beta=beta)
    ell = prefcore.sequence_reduce(leaf - REF, CU, "sum")
    total = 0
    for group in ((0, 1), tuple(range(2, S))):
        for i, j in itertools.combinations(group, 2):
            gap = (ADVANTAGES[i] - ADVANTAGES[j]) / beta
            total = total + beta / 2 * (ell[i] - ell[j] - gap) ** 2 / (len(group) - 1)
    actual, expected = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (out.losses.sum(), total))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_sapo_on_policy_is_two_over_tau_times_the_advantage():
    value = losses.sapo(LOGPS, LOGPS, TOKEN_ADVANTAGES).losses
    tau = torch.where(TOKEN_ADVANTAGES > 0, torch.ones(T, dtype=F64), 1.05)
    torch.testing.assert_close(value, -2 / tau * TOKEN_ADVANTAGES)


def test_reinforces_gradient_is_minus_the_advantage_over_the_normaliser():
    leaf = LOGPS.clone().requires_grad_()
    prefcore.aggregate(losses.reinforce(leaf, TOKEN_ADVANTAGES).losses, CU, "token_mean", 37).backward()
    torch.testing.assert_close(leaf.grad, -TOKEN_ADVANTAGES / 37)


def test_ppo_max_without_switches_is_ppo():
    assert torch.equal(
        losses.ppo_max(LOGPS, OLD, TOKEN_ADVANTAGES).losses, losses.ppo(LOGPS, OLD, TOKEN_ADVANTAGES).losses
    )


def test_ppo_maxs_entropy_term_is_the_distance_of_the_mean_to_its_target():
    entropy = ENTROPY.clone().requires_grad_()
    out = losses.ppo_max(LOGPS, OLD, 0 * OLD, entropy=entropy, entropy_weight=0.2, entropy_target=3.0)
    loss = prefcore.aggregate(out.losses, CU, "token_mean")
    other = ENTROPY.clone().requires_grad_()
    expected = 0.2 * (other.mean() - 3.0).abs()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x, leaf in ((loss, entropy), (expected, other))))


def test_macro_actions_of_one_token_are_ppo_and_of_a_response_a_bandit():
    steps = torch.arange(T + 1, dtype=torch.int32)
    assert torch.equal(
        losses.ma_ppo(LOGPS, OLD, TOKEN_ADVANTAGES, steps).losses, losses.ppo(LOGPS, OLD, TOKEN_ADVANTAGES).losses
    )
    assert torch.equal(
        losses.ma_ppo(LOGPS, OLD, ADVANTAGES, CU).losses, losses.ppo(LOGPS, OLD, ADVANTAGES, cu_seqlens=CU).losses
    )


def test_advantages_of_macro_gae_are_those_of_ma_ppo():
    starts = prefcore.advantages.ngram_starts(CU, T, 2)
    found = prefcore.advantages.macro_gae(ENTROPY, REF, CU, starts, gamma=1.0, lam=0.9).advantages
    offsets = torch.cat([starts.nonzero()[:, 0], torch.tensor([T])]).int()
    of_actions = losses.ma_ppo(LOGPS, OLD, found[offsets[:-1].long()], offsets)
    assert torch.equal(losses.ma_ppo(LOGPS, OLD, found).losses, of_actions.losses)


def test_loops_interval_is_its_printed_form():
    low = losses.loop_ppo(LOGPS, OLD, TOKEN_ADVANTAGES, eps=0.1)
    again = prefcore.policy_terms(LOGPS, OLD, TOKEN_ADVANTAGES, form="clip", low=1 / 1.1, high=1.1)
    assert torch.equal(low.losses, again.losses)


def test_score_with_equal_betas_on_one_turn_is_reinforce_with_kl():
    betas = torch.full((S,), 0.3, dtype=F64)
    out = losses.score_rl(LOGPS, ADVANTAGES, betas, CU, cu_seqlens=CU, ref_logps=REF)
    plain = losses.reinforce(LOGPS, ADVANTAGES, cu_seqlens=CU).losses
    torch.testing.assert_close(out.losses, plain + 0.3 * losses.kl_loss(LOGPS, REF, kl="k2"))


def test_the_lagrangians_ends():
    costs = draw(T, 1.0, 20)
    at = [losses.safe_rlhf_v(LOGPS, OLD, TOKEN_ADVANTAGES, costs, lam=lam).losses for lam in (0.0, 1e12)]
    torch.testing.assert_close(at[0], losses.ppo(LOGPS, OLD, TOKEN_ADVANTAGES).losses)
    torch.testing.assert_close(at[1], losses.ppo(LOGPS, OLD, -costs).losses, rtol=1e-9, atol=1e-9)
    log_lam = torch.tensor(0.5, dtype=F64, requires_grad=True)
    losses.lagrangian_dual(log_lam, COSTS.mean() - 0.1).backward()
    torch.testing.assert_close(log_lam.grad, -(COSTS.mean() - 0.1) * math.exp(0.5))


def test_both_forms_of_gspo_agree_where_a_sequence_has_one_advantage():
    leaf = LOGPS.clone().requires_grad_()
    whole = prefcore.aggregate(
        losses.gspo(leaf, OLD, ADVANTAGES, CU, eps=0.1, eps_high=0.05).losses,
        torch.tensor([0, S], dtype=torch.int32),
        "token_mean",
        num_items=4,
    )
    tokens = losses.gspo_token(leaf, OLD, spread(ADVANTAGES), CU, eps=0.1, eps_high=0.05)
    parts = prefcore.aggregate(tokens.losses, CU, "seq_mean_token_mean")
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (whole, parts)))


def test_gmpo_without_active_clips_is_gspo_without_clip():
    wide = losses.gmpo(LOGPS, OLD, ADVANTAGES, CU, eps=50.0).losses
    torch.testing.assert_close(wide, losses.gspo(LOGPS, OLD, ADVANTAGES, CU, eps=1.0, eps_high=1e9).losses)


def test_cispo_leaves_no_token_without_gradient():
    leaf = LOGPS.clone().requires_grad_()
    losses.cispo(leaf, LOGPS + 100 * draw(T, 1.0, 12), TOKEN_ADVANTAGES, low=0.5, high=2.0).losses.sum().backward()
    assert (leaf.grad != 0).all()


def test_clipped_tokens_have_zero_gradient():
    leaf = LOGPS.clone().requires_grad_()
    out = losses.ppo(leaf, OLD, TOKEN_ADVANTAGES)
    out.losses.sum().backward()
    rho = (LOGPS - OLD).exp()
    clipped = ((rho > 1.2) & (TOKEN_ADVANTAGES > 0)) | ((rho < 0.8) & (TOKEN_ADVANTAGES < 0))
    assert torch.equal(leaf.grad == 0, clipped)
    assert out.stats.clipped_low + out.stats.clipped_high == clipped.sum()


def test_filtering_weights():
    cu_groups = torch.tensor([0, 3, 3, 4, 8], dtype=torch.int32)
    rewards = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.0, 2.0, 0.0, 0.0])
    best = torch.tensor([0, 1, 0, 1, 1, 0, 0, 0.0])
    worst = torch.tensor([1, 0, 0, 1, 0, 0, 1, 0.0])
    assert torch.equal(losses.pf_ppo_weights(rewards, cu_groups, "best"), best)
    assert torch.equal(losses.pf_ppo_weights(rewards, cu_groups, "best_worst"), torch.maximum(best, worst))
    assert torch.equal(losses.pf_ppo_weights(rewards, cu_groups, "best_random"), torch.where(best > 0, 0.4, 0.1))
    assert torch.equal(losses.pf_ppo_weights(rewards, cu_groups, "power"), rewards.square())


def test_a_response_of_weight_zero_has_zero_gradient_in_both_losses_and_ones_are_ppo():
    kept = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=F64)
    policy, values = LOGPS.clone().requires_grad_(), LOGPS.clone().requires_grad_()
    losses.pf_ppo(policy, OLD, TOKEN_ADVANTAGES, kept, CU).losses.sum().backward()
    losses.ppo_value(values, OLD, TOKEN_ADVANTAGES, weights=spread(kept)).losses.sum().backward()
    dropped = spread(kept) == 0
    assert not policy.grad[dropped].any()
    assert not values.grad[dropped].any()
    ones = losses.pf_ppo(LOGPS, OLD, TOKEN_ADVANTAGES, torch.ones(S), CU).losses
    assert torch.equal(ones, losses.ppo(LOGPS, OLD, TOKEN_ADVANTAGES).losses)


@pytest.mark.parametrize("old", [OLD, None])
def test_the_value_loss_is_half_the_larger_square(old):
    def formula(v):
        near = v if old is None else old + torch.clamp(v - old, -0.2, 0.2)
        return 0.5 * torch.max((v - TOKEN_ADVANTAGES) ** 2, (near - TOKEN_ADVANTAGES) ** 2)

    results = (both(lambda v: losses.ppo_value(v, old, TOKEN_ADVANTAGES)), both(formula))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_importance_weights_are_bounded_ratios(level, mode):
    out = losses.importance_weights(OLD, REF, CU, level=level, mode=mode, low=0.7, high=1.4)
    for t, s in enumerate(OWNERS):
        a, b = SPANS[s]
        log = {"token": OLD[t] - REF[t], "sequence": (OLD - REF)[a:b].sum(), "geometric": (OLD - REF)[a:b].mean()}
        ratio = math.exp(log[level])
        inside = 0.7 <= ratio <= 1.4
        expected = min(max(ratio, 0.7), 1.4) if mode == "truncate" else ratio * inside
        assert out[t].item() == pytest.approx(expected, rel=1e-13)


def test_sequences_far_off_policy_are_masked_where_their_advantage_is_negative():
    mask = losses.off_policy_mask(LOGPS, OLD, ADVANTAGES, CU, threshold=0.05)
    for t, s in enumerate(OWNERS):
        a, b = SPANS[s]
        assert mask[t] == float(ADVANTAGES[s] >= 0 or (OLD - LOGPS)[a:b].mean() <= 0.05)


# By enumeration.


def tables(seed=0):
    """Two steps over three tokens: logits of a policy and of a reference."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, dtype=F64, generator=generator).requires_grad_() for n in (1, 3)], [
        torch.randn(n, 3, dtype=F64, generator=generator) for n in (1, 3)
    ]


def step_logps(table, first, second):
    one, two = (x.log_softmax(-1) for x in table)
    return torch.stack([one[0, first], two[first, second]])


def expected_gradient(loss, policy):
    """Of ``loss(logps [2], first, second)`` over samples of the policy, by the sum over all of them."""
    total = [torch.zeros_like(x) for x in policy]
    for first, second in itertools.product(range(3), repeat=2):
        logps = step_logps(policy, first, second)
        grads = torch.autograd.grad(loss(logps, first, second), policy)
        for t, g in zip(total, grads, strict=True):
            t += logps.detach().sum().exp() * g
    return torch.cat([x.flatten() for x in total])


def exact_gradient(divergence, policy):
    return torch.cat([x.flatten() for x in torch.autograd.grad(divergence, policy)])


def kl_of_sequences(policy, reference):
    total = 0
    for first, second in itertools.product(range(3), repeat=2):
        p, q = step_logps(policy, first, second).sum(), step_logps(reference, first, second).sum()
        total = total + p.exp() * (p - q)
    return total


@pytest.mark.parametrize(("klr", "exact"), [("sequence", True), ("reverse_cumsum", True), ("same_token", False)])
def test_which_forms_of_nash_md_have_the_gradient_of_the_sequences_kl(klr, exact):
    policy, reference = tables()
    cu = torch.tensor([0, 2], dtype=torch.int32)

    def loss(logps, first, second):
        ref = step_logps(reference, first, second)
        half = torch.tensor([0.5], dtype=F64)
        return losses.nash_md_pg(logps, ref, half, cu, tau=1.0, klr=klr).losses.sum()

    gap = expected_gradient(loss, policy) - exact_gradient(kl_of_sequences(policy, reference), policy)
    assert (gap.abs().max() < 1e-14) == exact


def token_kl(p, q):
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize(
    ("kl", "gradient"),
    [
        ("k1", "none"),
        ("k2", "kl"),
        ("k3", "reverse"),
        ("k1_straight", "kl"),
        ("k3_straight", "kl"),
        ("k3_corrected", "kl"),
    ],
)
def test_values_and_gradients_of_the_kl_terms(kl, gradient):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, dtype=F64, generator=generator).requires_grad_()
    q = torch.randn(5, dtype=F64, generator=generator).log_softmax(-1)
    p = logits.log_softmax(-1)
    terms = losses.kl_loss(p, q, kl=kl, old_logps=p.detach())
    value = (p.detach().exp() * terms).sum()
    if kl != "k2":
        torch.testing.assert_close(value.detach(), token_kl(p, q).detach())
    exact = {"none": 0 * p.sum(), "kl": token_kl(p, q), "reverse": token_kl(q, p)}[gradient]
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (value, exact)))
    if "straight" not in kl and kl != "k1":
        assert (terms >= 0).all()


def test_the_full_divergence_of_linear_divergence_is_a_kl_term():
    hidden, weight = draw((6, 4), 1.0, 1).requires_grad_(), draw((9, 4), 1.0, 2)
    ref_hidden, targets = draw((6, 4), 1.0, 3), torch.arange(6)
    pair = prefcore.linear_divergence(hidden, weight, ref_hidden, weight, targets, kind="kl_pq")
    out = losses.grpo(pair.logps, None, draw(6), kl_values=pair.divergence, beta=0.3)
    (grad,) = torch.autograd.grad(out.losses.sum(), hidden, retain_graph=True)
    plain = (-draw(6) + -draw(6) * (pair.logps - pair.logps.detach()) + 0.3 * pair.divergence).sum()
    torch.testing.assert_close(out.losses.sum(), plain)
    torch.testing.assert_close(grad, torch.autograd.grad(plain, hidden)[0])
    torch.testing.assert_close(out.stats.kl, pair.divergence.sum().detach())


def test_a_constant_baseline_leaves_reinforces_expected_gradient():
    policy, _ = tables()

    def loss(baseline):
        return lambda logps, first, second: losses.reinforce(
            logps, torch.tensor([first + 2.0 * second - baseline] * 2, dtype=F64)
        ).losses.sum()

    torch.testing.assert_close(expected_gradient(loss(0.0), policy), expected_gradient(loss(7.0), policy))


def test_hc_rlhfs_cost_has_the_gradient_of_mean_plus_k_deviations():
    policy, _ = tables()
    costs = {pair: float(i % 4) - 0.7 * i for i, pair in enumerate(itertools.product(range(3), repeat=2))}
    cu, zero, k = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(1, dtype=F64), 1.7
    chances = {pair: step_logps(policy, *pair).sum().exp() for pair in costs}
    mean = sum(chances[pair] * c for pair, c in costs.items())
    std = (sum(chances[pair] * c**2 for pair, c in costs.items()) - mean**2).sqrt()

    def loss(logps, first, second):
        cost = torch.tensor([costs[first, second]], dtype=F64)
        return losses.hc_rlhf(logps, zero, cost, cu, lam=1.0, mean=mean, std=std, k=k).losses.sum()

    torch.testing.assert_close(expected_gradient(loss, policy), exact_gradient(mean + k * std, policy))


# TRL 1.16, transcribed from GRPOTrainer._compute_loss and RLOOTrainer._compute_loss, which need a trainer.


def trl_grpo(
    loss_type, per_token_logps, old, ref, advantages, mask, *, level="token", beta=0.0, delta=None, bias=False
):
    advantages = advantages.unsqueeze(1)
    log_ratio = per_token_logps - old
    if level == "token":
        log_importance_weights = log_ratio
    else:
        log_importance_weights = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_importance_weights)
    if beta != 0.0:
        per_token_kl = torch.exp(ref - per_token_logps) - (ref - per_token_logps) - 1
        if bias:
            per_token_kl = per_token_kl * coef_1
    if loss_type == "cispo":
        per_token_loss = -torch.clamp(coef_1, max=1.3).detach() * advantages * per_token_logps
    elif loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
        if delta is not None:
            coef_1 = torch.clamp(coef_1, max=delta)
        per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    elif loss_type == "sapo":
        temperatures = torch.where(advantages > 0, 1.0, 1.05)
        per_token_loss = -torch.sigmoid(temperatures * (coef_1 - 1)) * 4 / temperatures * advantages
    else:  # vespo
        with torch.no_grad():
            log_w_seq = (log_ratio.clamp(-20.0, 20.0) * mask).sum(-1, keepdim=True).clamp(math.log(1e-8), 20.0)
            k_seq = torch.where(advantages >= 0, 2.0, 3.0)
            lambda_seq = torch.where(advantages >= 0, 3.0, 2.0).clamp(min=1e-4)
            phi_seq = torch.exp(lambda_seq + k_seq * log_w_seq - lambda_seq * torch.exp(log_w_seq))
        per_token_loss = -phi_seq * advantages * per_token_logps
    if beta != 0.0:
        per_token_loss = per_token_loss + beta * per_token_kl
    if loss_type in ("grpo", "sapo"):
        return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "bnpo":
        return (per_token_loss * mask).sum() / mask.sum().clamp(min=1.0)
    if loss_type == "dr_grpo":
        return (per_token_loss * mask).sum() / (per_token_loss.size(0) * 9)
    if loss_type == "luspo":
        return (per_token_loss * mask).sum(-1).mean()
    return (per_token_loss * mask).sum() / 41.0


FULL = (5, 1, 7, 3)  # TRL has no empty responses
MASK = torch.arange(7) < torch.tensor(FULL)[:, None]
FULL_CU = torch.tensor([0, *itertools.accumulate(FULL)], dtype=torch.int32)
FULL_ADVANTAGES = draw(4, 1.0, 40)
KL_TERMS = {"ref_logps": REF, "beta": 0.04}
TRL = {
    "grpo": (losses.grpo, {"eps_high": 0.28, **KL_TERMS}, {"beta": 0.04}),
    "grpo bias": (losses.grpo, {"eps_high": 0.28, **KL_TERMS, "kl": "k3_corrected"}, {"beta": 0.04, "bias": True}),
    "grpo delta": (losses.grpo, {"eps_high": 0.28, "dual_clip": 1.5}, {"delta": 1.5}),
    "bnpo": (losses.bnpo, {"eps_high": 0.28, **KL_TERMS}, {"beta": 0.04}),
    "dr_grpo": (losses.dr_grpo, {"eps_high": 0.28}, {}),
    "dapo": (losses.dapo, {}, {}),
    "cispo": (losses.cispo, {"high": 1.3}, {}),
    "sapo": (losses.sapo, {}, {}),
    "vespo": (losses.vespo, {}, {}),
    "vespo bias": (losses.vespo, {**KL_TERMS, "kl": "k3_corrected"}, {"beta": 0.04, "bias": True}),
    "grpo sequence": (losses.gspo, {"eps": 0.2, "eps_high": 0.28}, {"level": "sequence"}),
    "luspo": (losses.luspo, {"eps": 0.2, "eps_high": 0.28}, {"level": "sequence"}),
}


@pytest.mark.parametrize("name", TRL)
def test_parity_with_trls_grpo(name):
    function, options, trl_options = TRL[name]
    leaf = LOGPS.clone().requires_grad_()
    padded = [torch.zeros(MASK.shape, dtype=F64).masked_scatter(MASK, x) for x in (leaf, OLD, REF)]
    expected = trl_grpo(name.split()[0], *padded, FULL_ADVANTAGES, MASK, **trl_options)
    if function in (losses.gspo, losses.luspo):
        loss = function(leaf, OLD, FULL_ADVANTAGES, FULL_CU, **options).losses.mean()
    else:
        out = function(leaf, OLD, FULL_ADVANTAGES, cu_seqlens=FULL_CU, **options)
        how = losses.get(function.__name__).aggregation
        items = {"items": 41.0} if name.split()[0] in ("dapo", "cispo", "vespo") else {}
        horizon = {"horizon": 9.0} if name == "dr_grpo" else {}
        loss = prefcore.aggregate(out.losses, FULL_CU, how, items.get("items"), **horizon)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (loss, expected)))


def test_parity_with_trls_rloo():
    leaf = LOGPS.clone().requires_grad_()
    padded, old = (torch.zeros(MASK.shape, dtype=F64).masked_scatter(MASK, x) for x in (leaf, OLD))
    coef_1 = torch.exp((padded * MASK).sum(1) - (old * MASK).sum(1))
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.2)
    expected = -torch.min(coef_1 * FULL_ADVANTAGES, coef_2 * FULL_ADVANTAGES).mean()
    loss = losses.rloo(leaf, OLD, FULL_ADVANTAGES, FULL_CU).losses.mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (loss, expected)))


def test_parity_with_trls_corrections_of_the_rollout_engine():
    out = losses.importance_weights(OLD, REF, FULL_CU, level="sequence", mode="mask", low=0.5, high=2.0)
    padded = torch.zeros(MASK.shape, dtype=F64).masked_scatter(MASK, OLD - REF)
    ratio = torch.exp((padded * MASK).sum(-1, keepdim=True)).expand(-1, 7)
    ratio = ratio.masked_fill((ratio < 0.5) | (ratio > 2.0), 0.0)
    torch.testing.assert_close(out, ratio[MASK])


def test_tokens_that_the_rollout_engine_did_not_score_are_not_corrected_for():
    rollout = REF.clone()
    rollout[[0, 9]] = float("nan")
    scored = torch.where(rollout.isnan(), OLD, rollout)
    for level in ("token", "sequence", "geometric"):
        expected = losses.importance_weights(OLD, scored, CU, level=level)
        assert torch.equal(losses.importance_weights(OLD, rollout, CU, level=level), expected)
    kept = losses.off_policy_mask(OLD, rollout, -torch.ones(S), CU, threshold=1e3)
    assert kept.all()


# Splitting, extremes, refusals.


@pytest.mark.parametrize("how", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
@pytest.mark.parametrize("name", ["dapo", "grpo", "cispo", "sapo", "ppo"])
def test_micro_batches_with_the_steps_count_change_no_gradient_and_no_statistic(name, how):
    options = {"high": 1.3} if name == "cispo" else {}
    items = T if how == "token_mean" else sum(length > 0 for length in LENGTHS)

    def step(leaf, first, last):
        a, b = CU[first], CU[last]
        out = getattr(losses, name)(
            leaf[a:b], OLD[a:b], ADVANTAGES[first:last], cu_seqlens=CU[first : last + 1] - a,
            ref_logps=REF[a:b], beta=0.1, **options,
        )  # fmt: skip
        prefcore.aggregate(out.losses, CU[first : last + 1] - a, how, items).backward()
        return torch.stack(tuple(out.stats))

    whole, parts = LOGPS.clone().requires_grad_(), LOGPS.clone().requires_grad_()
    stats = step(whole, 0, S)
    added = step(parts, 0, 2) + step(parts, 2, 3) + step(parts, 3, S)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(added, stats, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("apart", [-1e3, 1e3])
@pytest.mark.parametrize("name", [name for name in CASES if "score" not in name and "nash" not in name])
def test_log_ratios_of_a_thousand_are_finite(name, apart):
    for actual in both(CASES[name][0], OLD + apart):
        assert torch.isfinite(actual).all()


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_reaches_what_is_no_target_of_learning(name):
    fixed = [OLD, REF, TOKEN_ADVANTAGES, ADVANTAGES, WEIGHTS, PREFERENCES, COSTS, MACROS, TURN_BETAS]
    for x in fixed:
        x.requires_grad_()
    try:
        CASES[name][0](LOGPS.clone().requires_grad_()).losses.sum().backward()
        assert all(x.grad is None for x in fixed)
    finally:
        for x in fixed:
            x.requires_grad_(False)


@pytest.mark.parametrize("name", ["grpo", "gspo", "gmpo", "vespo", "nash_md_pg"])
def test_traces_into_one_graph_for_all_sizes(name):
    torch._dynamo.reset()

    def step(logps, old, advantages, cu_seqlens):
        if name == "grpo":
            out = losses.grpo(logps, old, advantages, cu_seqlens=cu_seqlens, ref_logps=old, beta=0.1)
        elif name == "nash_md_pg":
            out = losses.nash_md_pg(logps, old, advantages, cu_seqlens, tau=0.1)
        else:
            out = getattr(losses, name)(logps, old, advantages, cu_seqlens)
        return out.losses, out.stats.approx_kl

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 4), (5, 0, 6, 1), (7, 2, 2)):
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        logps, old, advantages = draw(sum(lengths), 1.0, 1), draw(sum(lengths), 1.0, 2), draw(len(lengths), 1.0, 3)
        leaf, other = (logps.clone().requires_grad_() for _ in range(2))
        (value, kl), (expected, expected_kl) = (
            f(x, old, advantages, cu_seqlens) for f, x in ((compiled, leaf), (step, other))
        )
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(kl, expected_kl)
        value.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad)


def test_batches_without_tokens_or_with_empty_sequences_alone():
    none, cu = torch.zeros(0), torch.tensor([0, 0, 0], dtype=torch.int32)
    advantages = torch.ones(2)
    for name in ("ppo", "grpo", "sapo", "dapo"):
        out = getattr(losses, name)(none, none, advantages, cu_seqlens=cu)
        assert out.losses.shape == (0,)
        assert prefcore.aggregate(out.losses, cu, "seq_mean_token_mean") == 0
    for name in ("gspo", "rloo", "gmpo", "luspo"):
        assert torch.equal(getattr(losses, name)(none, none, advantages, cu).losses, torch.zeros(2))


def test_statistics_of_sequence_ratios_do_not_count_empty_sequences():
    for function in (losses.gspo, losses.rloo, losses.luspo):
        stats = function(LOGPS, OLD, ADVANTAGES, CU).stats
        kept = [s for s, length in enumerate(LENGTHS) if length]
        alone = function(LOGPS, OLD, ADVANTAGES[kept], FULL_CU).stats
        assert stats.tokens == len(kept)
        torch.testing.assert_close(stats, alone)


def test_statistics_are_of_the_ratio_where_the_loss_has_another_or_none():
    for stats in (
        losses.vespo(LOGPS, OLD, ADVANTAGES, CU).stats,
        losses.dro_token(LOGPS, OLD, TOKEN_ADVANTAGES, beta=0.1).stats,
    ):
        torch.testing.assert_close(stats.ratio, torch.exp(LOGPS - OLD).sum())


def test_a_multiplier_beyond_its_bound_can_fall_again():
    for log_lam, excess, gradient in ((12.0, -2.0, 2.0), (12.0, 2.0, 0.0), (1.0, -2.0, 2.0), (1.0, 2.0, -2.0)):
        lam = math.exp(min(log_lam, 3.0))
        for over in (excess, torch.tensor(excess, dtype=F64)):
            leaf = torch.tensor(log_lam, dtype=F64, requires_grad=True)
            loss = losses.lagrangian_dual(leaf, over, log_lam_max=3.0)
            loss.backward()
            torch.testing.assert_close(loss.detach(), torch.tensor(-lam * excess, dtype=F64))
            torch.testing.assert_close(leaf.grad, torch.tensor(lam * gradient, dtype=F64))


REFUSALS = [
    (TypeError, "unexpected keyword argument 'eps'", lambda: losses.sapo(LOGPS, OLD, TOKEN_ADVANTAGES, eps=0.2)),
    (ValueError, "kl needs ref_logps or kl_values", lambda: losses.ppo(LOGPS, OLD, TOKEN_ADVANTAGES, kl="k2")),
    (
        ValueError,
        "entropy_coef needs entropy",
        lambda: losses.ppo(LOGPS, OLD, TOKEN_ADVANTAGES, entropy_coef=0.01),
    ),
    (
        ValueError,
        r"costs must have rewards' shape \[5\], got \[1\]",
        lambda: losses.hc_rlhf(LOGPS, ADVANTAGES, COSTS[:1], CU, lam=1.0, mean=0.0, std=1.0, k=1.0),
    ),
    (ValueError, "finite, got inf", lambda: losses.safe_rlhf_v(LOGPS, OLD, OLD, OLD, lam=math.inf)),
    (ValueError, "beta needs ref_logps or kl_values", lambda: losses.grpo(LOGPS, OLD, TOKEN_ADVANTAGES, beta=0.1)),
    (ValueError, r"advantages must have the log-probs' shape \[16\]", lambda: losses.ppo(LOGPS, OLD, ADVANTAGES)),
    (
        ValueError,
        r"advantages beside cu_seqlens must have shape \[5\], got \[16\]",
        lambda: losses.ppo(LOGPS, OLD, TOKEN_ADVANTAGES, cu_seqlens=CU),
    ),
    (ValueError, "old_logps must have the log-probs' shape", lambda: losses.ppo(LOGPS, OLD[1:], TOKEN_ADVANTAGES)),
    (TypeError, "old_logps must be a Tensor", lambda: losses.ppo(LOGPS, 0.0, TOKEN_ADVANTAGES)),
    (ValueError, "logps must have a floating-point dtype", lambda: losses.reinforce(torch.arange(3), torch.ones(3))),
    (ValueError, "eps must be at least 0", lambda: losses.ppo(LOGPS, OLD, TOKEN_ADVANTAGES, eps=-0.1)),
    (ValueError, "dual must be at least high", lambda: losses.ppo(LOGPS, OLD, TOKEN_ADVANTAGES, dual_clip=1.1)),
    (ValueError, "low must not exceed high", lambda: losses.cispo(LOGPS, OLD, TOKEN_ADVANTAGES, low=2.0, high=1.0)),
    (ValueError, "klr must be", lambda: losses.nash_md_pg(LOGPS, REF, PREFERENCES, CU, tau=0.1, klr="token")),
    (ValueError, "level must be", lambda: losses.importance_weights(OLD, REF, CU, level="turn")),
    (ValueError, "mode must be", lambda: losses.importance_weights(OLD, REF, CU, mode="drop")),
    (ValueError, "how must be", lambda: losses.pf_ppo_weights(ADVANTAGES, CU_MACROS[:3], "worst")),
    (
        ValueError,
        "lam must be at least 0 and finite, got -1",
        lambda: losses.safe_rlhf_v(LOGPS, OLD, OLD, OLD, lam=-1.0),
    ),
    (
        ValueError,
        "cu_ratios does not use beta, ref_logps",
        lambda: losses.loop_ppo(LOGPS, OLD, ADVANTAGES, cu_ratios=CU, ref_logps=REF, beta=0.1),
    ),
    (ValueError, "entropy_weight needs entropy", lambda: losses.ppo_max(LOGPS, OLD, OLD, entropy_weight=0.1)),
    (
        ValueError,
        "must end at the number of rows",
        lambda: losses.ppo(LOGPS, OLD, ADVANTAGES, cu_seqlens=CU.clamp(max=9)),
    ),
]


@pytest.mark.parametrize(("error", "text", "call"), REFUSALS, ids=[row[1] for row in REFUSALS])
def test_refusals(error, text, call):
    with pytest.raises(error, match=text):
        call()
