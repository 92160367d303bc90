"""``prefcore.adapters.verl`` against verl 0.9.1: signatures, formulas in float64, its own code if it is there."""

import importlib
import inspect
import math
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prefcore.adapters import verl as ours

LOSS = "old_log_prob, log_prob, advantages, response_mask, loss_agg_mode={mode!r}, config=None, rollout_is_weights=None"
TOKENS = LOSS.format(mode="token-mean")
SEQUENCES = LOSS.format(mode="seq-mean-token-mean")
COUNTS = "dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None"
GROUPS = "token_level_rewards, response_mask, index, epsilon=1e-06"
NORM = f"{GROUPS}, norm_adv_by_std_in_grpo=True, config=None"
# As they are in verl 0.9.1, without annotations.
SIGNATURES = {
    "verl.utils.torch_functional": {
        "logprobs_from_logits": "logits, labels, inplace_backward=True",
        "entropy_from_logits": "logits",
        "entropy_from_logits_with_chunking": "logits, chunk_size=2048",
        "calculate_sum_pi_squared_from_logits": "logits",
    },
    "verl.utils.experimental.torch_functional": {
        "FusedLinearForPPO": {
            "__init__": "self, chunk_size=512, impl_backend='torch'",
            "forward": "self, hidden_states, vocab_weights, input_ids, temperature=1.0",
        }
    },
    "verl.utils.kernel.linear_cross_entropy": {
        # The apply of an autograd.Function, whose forward takes ctx first.
        "linear_cross_entropy": "hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None"
    },
    "verl.trainer.ppo.core_algos": {
        "agg_loss": f"loss_mat, loss_mask, loss_agg_mode, {COUNTS}",
        "kl_penalty": "logprob, ref_logprob, kl_penalty",
        "compute_value_loss": "vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode='token-mean', "
        + COUNTS,
        "compute_entropy_loss": "logits, response_mask, loss_agg_mode='token-mean'",
        "compute_policy_loss_vanilla": TOKENS,
        "compute_policy_loss_gspo": SEQUENCES,
        "compute_policy_loss_sapo": SEQUENCES,
        "compute_policy_loss_gpg": TOKENS,
        "compute_policy_loss_reinforce": LOSS.format(mode="seq-mean-token-sum").replace("old", "rollout"),
        "compute_policy_loss_cispo": TOKENS,
        "compute_policy_loss_dppo_tv": TOKENS,
        "compute_policy_loss_dppo_kl": TOKENS,
        "compute_policy_loss_clip_cov": TOKENS,
        "compute_policy_loss_kl_cov": TOKENS,
        "compute_policy_loss_geo_mean": TOKENS,
        "compute_policy_loss_dro": TOKENS,
        "compute_gae_advantage_return": "token_level_rewards, values, response_mask, gamma, lam",
        "compute_grpo_outcome_advantage": NORM,
        "compute_grpo_vectorized_outcome_advantage": NORM,
        "compute_rloo_outcome_advantage": f"{GROUPS}, config=None, **kwargs",
        "compute_rloo_vectorized_outcome_advantage": f"{GROUPS}, config=None, **kwargs",
        "compute_opo_outcome_advantage": f"{GROUPS}, config=None, **kwargs",
        "compute_gpg_outcome_advantage": f"{GROUPS}, f_norm=1.0, alpha=1.0, config=None, **kwargs",
        "compute_reinforce_plus_plus_outcome_advantage": "token_level_rewards, response_mask, config=None, **kwargs",
        "compute_reinforce_plus_plus_baseline_outcome_advantage": f"{GROUPS}, config=None, **kwargs",
        "compute_remax_outcome_advantage": "token_level_rewards, reward_baselines, response_mask, config=None, "
        "**kwargs",
    },
}

try:
    installed = version("verl")
except PackageNotFoundError:
    installed = ""
needs_verl = pytest.mark.skipif(installed not in ours.VERSIONS, reason=f"needs verl {ours.VERSIONS}, has {installed!r}")

INF = float("inf")
LOW, HIGH, DUAL = 0.2, 0.28, 2.5
# Of probabilities, and of divergences, rather than of ratios.
BOUNDS = {"dppo_tv": (0.02, 0.07), "dppo_kl": (0.002, 0.01)}
# 31 tokens in a sum, some 30 roundings of each, of numbers up to about 8.
SLACK64, SLACK32 = (2**13 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32))
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
INDEX = np.array(["a", "b", "a", "c", "b", "a"], dtype=object)  # uneven, interleaved, one alone


def config(low=LOW, high=HIGH, **info):
    return SimpleNamespace(
        clip_ratio=0.5,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=DUAL,
        tau_pos=1.0,
        tau_neg=1.05,
        global_batch_info=info,
        policy_loss=SimpleNamespace(
            clip_cov_ratio=0.15, clip_cov_lb=0.05, clip_cov_ub=5.0, kl_cov_ratio=0.2, ppo_kl_coef=0.7, dro_beta=0.4
        ),
    )


def close(got, want, slack=SLACK64):
    torch.testing.assert_close(got, want, rtol=slack, atol=slack, check_dtype=False)


def whole(rows):
    return torch.cat(rows) if rows else torch.zeros(0)


def by_mode(rows, mode, width):
    """A scalar from losses of responses, by the definition of each mode."""
    full = [row for row in rows if len(row)]
    if mode == "token-mean":
        return sum(row.sum() for row in full) / sum(len(row) for row in full)
    if mode == "token-sum":
        return sum(row.sum() for row in full)
    if mode == "seq-mean-token-mean":
        return sum(row.mean() for row in full) / len(full)
    return sum(row.sum() for row in full) / len(full) / (width if mode.endswith("norm") else 1)


# -- what is offered


def test_every_signature_is_that_of_the_version_named(assert_signatures):
    assert_signatures(ours, SIGNATURES)


# -- log-probs and entropies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_logits_give_log_probs_entropies_and_collisions(dtype, scale):
    torch.manual_seed(0)
    logits = (scale * torch.randn(2, 5, 33)).to(dtype).requires_grad_()
    labels = torch.randint(33, (2, 5))
    labels[1, 3] = -100
    logps = ours.logprobs_from_logits(logits, labels)
    entropy, chunked = ours.entropy_from_logits(logits), ours.entropy_from_logits_with_chunking(logits, 3)
    squares = ours.calculate_sum_pi_squared_from_logits(logits)
    assert logps.dtype == torch.promote_types(dtype, torch.float32)
    assert (entropy.dtype, squares.dtype, chunked.dtype) == (dtype, dtype, torch.float32)

    exact = logits.detach().double().requires_grad_()
    p = exact.log_softmax(-1)
    kept = labels != -100
    truth = p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * kept
    h = -(p.exp() * p).sum(-1)
    # Some 8 roundings of numbers as large as the largest logit, and one to the result's dtype.
    largest = 1 + float(exact.detach().abs().max())
    eps = torch.finfo(logps.dtype).eps
    slack = 8 * eps * largest
    torch.testing.assert_close(logps.double(), truth, rtol=0, atol=slack)
    torch.testing.assert_close(entropy.double(), h, rtol=torch.finfo(dtype).eps, atol=slack)
    torch.testing.assert_close(chunked.double(), h, rtol=0, atol=8 * torch.finfo(chunked.dtype).eps * largest)
    rounded = torch.finfo(dtype).eps
    torch.testing.assert_close(squares.double(), (2 * p).exp().sum(-1), rtol=rounded + 4 * slack, atol=0)

    g = torch.randn(2, 2, 5, dtype=torch.float64)
    (logps * g[0] + entropy * g[1]).sum().backward()
    (truth * g[0] + h * g[1]).sum().backward()
    # The entropy's gradient is p (log p + h): the error of log p is that of the largest logit.
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=4 * rounded, atol=8 * slack + 4 * rounded)
    assert not logits.grad[1, 3].isnan().any()


def test_the_gradient_is_written_over_logits_only_where_autograd_allows():
    torch.manual_seed(0)
    leaf, labels = torch.randn(4, 33, requires_grad=True), torch.randint(33, (4,))
    before = leaf.detach().clone()
    ours.logprobs_from_logits(leaf, labels).sum().backward()
    assert torch.equal(leaf, before)

    logits = leaf * 1.0
    ours.logprobs_from_logits(logits, labels).sum().backward()
    assert not torch.equal(logits.detach(), before)
    logits = leaf * 1.0
    ours.logprobs_from_logits(logits, labels, inplace_backward=False).sum().backward()
    assert torch.equal(logits.detach(), before)

    # Who saved the logits before must not read the gradient in their place.
    logits = leaf * 1.0
    entropy = ours.entropy_from_logits(logits)
    ours.logprobs_from_logits(logits, labels).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hidden_states_give_log_probs_and_entropies(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 16).to(dtype).requires_grad_()
    weight = torch.randn(33, 16).to(dtype).requires_grad_()
    labels = torch.randint(33, (2, 5), dtype=torch.int32)
    logps, entropy = ours.FusedLinearForPPO(chunk_size=3)(hidden, weight, labels, temperature=0.7)
    assert (logps.shape, entropy.shape) == ((2, 5), (2, 5))
    assert (logps.dtype, entropy.dtype) == (torch.promote_types(dtype, torch.float32), dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].T / 0.7
    p = logits.log_softmax(-1)
    truth, h = p.gather(-1, labels.long()[..., None])[..., 0], -(p.exp() * p).sum(-1)
    # Logits are rounded to the inputs' dtype, sums of 16 products before.
    slack = 16 * torch.finfo(dtype).eps * float(logits.detach().abs().max())
    torch.testing.assert_close(logps.double(), truth, rtol=0, atol=slack)
    torch.testing.assert_close(entropy.double(), h, rtol=0, atol=slack)
    g = torch.randn(2, 2, 5, dtype=torch.float64)
    (logps * g[0] + entropy * g[1]).sum().backward()
    (truth * g[0] + h * g[1]).sum().backward()
    for got, want in zip((hidden.grad, weight.grad), (exact[0].grad, exact[1].grad), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=16 * slack)

    for reduction in ("none", "sum", "MEAN"):
        flat, flat_entropy = ours.linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
        reduced = {"none": truth.flatten(), "sum": truth.sum(), "MEAN": truth.mean()}[reduction]
        torch.testing.assert_close(flat.double(), reduced, rtol=0, atol=10 * slack)
        torch.testing.assert_close(flat_entropy.double(), h.flatten(), rtol=0, atol=slack)


def test_heads_that_prefcore_does_not_serve_are_refused():
    hidden, weight, labels = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 6])
    ranks = [SimpleNamespace(size=lambda n=n: n) for n in (1, 2)]
    alone = ours.linear_cross_entropy(hidden, weight, labels, dist_process_group=ranks[0])
    assert torch.equal(alone[0], ours.linear_cross_entropy(hidden, weight, labels)[0])
    with pytest.raises(NotImplementedError, match=r"skip=\('linear_cross_entropy',\)"):
        ours.linear_cross_entropy(hidden, weight, labels, dist_process_group=ranks[1])
    with pytest.raises(ValueError, match="reduction"):
        ours.linear_cross_entropy(hidden, weight, labels, reduction="max")
    with pytest.raises(ValueError, match="impl_backend"):
        ours.FusedLinearForPPO(impl_backend="triton")


# -- aggregation, KL, values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_losses_aggregate_by_every_mode(make_batch, mode, mask_dtype):
    batch = make_batch()
    losses = batch.advantages.clone().requires_grad_()
    mask = batch.mask.to(mask_dtype)
    got = ours.agg_loss(losses, mask, mode)
    rows = [row for (row,) in batch.rows(losses)]
    close(got, by_mode(rows, mode, 7))
    (gradient,) = torch.autograd.grad(got, losses)
    assert not gradient.isnan().any()
    assert not gradient[batch.mask == 0].any()

    counts = {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": torch.tensor(9), "loss_scale_factor": 11}
    got = ours.agg_loss(losses, mask, mode, **counts)
    factor = {"token-mean": 20 / 50, "token-sum": 1}.get(mode, 5 / 9)
    want = by_mode(rows, mode, 11) * factor * 2
    close(got, want)
    if mode != "token-sum":
        with pytest.raises(ValueError, match="needs"):
            ours.agg_loss(losses, mask, mode, dp_size=2)


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="loss_agg_mode must be one of"):
        ours.agg_loss(torch.zeros(1, 2), torch.ones(1, 2), "mean")
    with pytest.raises(ValueError, match="loss_mat must have the mask's shape"):
        ours.agg_loss(torch.zeros(1, 3), torch.ones(1, 2), "token-mean")


@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
@pytest.mark.parametrize("plus", ["", "+"])
def test_kl_estimates_have_the_value_and_the_gradient_of_their_name(name, plus):
    logps = torch.tensor([[-0.5, -2.0, -30.0, -0.1], [-1.0, -1.0, -4.0, -45.0]], dtype=torch.float64)
    ref = torch.tensor([[-0.75, -0.3, -0.1, -45.0], [-1.0, -1.001, -1.7, -1.0]], dtype=torch.float64)
    logps.requires_grad_()
    got = ours.kl_penalty(logps, ref, name + plus)
    u = ref - logps
    value = {"kl": -u, "k1": -u, "abs": u.abs(), "mse": u**2 / 2, "k2": u**2 / 2}.get(name)
    if value is None:
        bounded = u.clamp(-20, 20)
        value = (torch.expm1(bounded) - bounded).clamp(-10, 10)
    close(got, value)
    (gradient,) = torch.autograd.grad(got.sum(), logps)
    (want,) = torch.autograd.grad((u**2 / 2 if plus else value).sum(), logps)
    close(gradient, want)


def test_kl_estimates_keep_dtype_and_refuse_other_names():
    logps = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)
    assert ours.kl_penalty(logps, logps - 1, "k3").dtype == torch.bfloat16
    assert ours.kl_penalty(logps[:0], logps[:0], "kl").shape == (0,)
    with pytest.raises(NotImplementedError, match="full"):
        ours.kl_penalty(logps, logps, "full")


@pytest.mark.parametrize("mode", MODES)
def test_values_have_a_clipped_loss(make_batch, mode):
    batch = make_batch()
    values = batch.values.clone().requires_grad_()
    loss, clipped = ours.compute_value_loss(values, batch.rewards, batch.old_values, batch.mask, 0.3, mode)
    rows, counts = [], []
    for v, old, target in batch.rows(values, batch.old_values, batch.rewards):
        held = torch.minimum(torch.maximum(v, old - 0.3), old + 0.3)
        rows.append(torch.maximum((v - target) ** 2, (held - target) ** 2) / 2)
        counts.append(((held - target) ** 2 > (v - target) ** 2).double())
    want = by_mode(rows, mode, 7)
    close(loss, want)
    assert float(clipped) == pytest.approx(float(whole(counts).mean()), rel=SLACK32)
    close(torch.autograd.grad(loss, values)[0], torch.autograd.grad(want, values)[0])


def test_a_loss_of_values_is_rounded_to_16_bits_only_where_all_are(make_batch):
    batch = make_batch(dtype=torch.bfloat16)
    given = batch.values, batch.rewards, batch.old_values
    assert ours.compute_value_loss(*given, batch.mask, 0.3)[0].dtype == torch.bfloat16
    loss, _ = ours.compute_value_loss(given[0], given[1].float(), given[2], batch.mask, 0.3)
    assert loss.dtype == torch.float32
    assert loss == ours.compute_value_loss(*(x.float() for x in given), batch.mask, 0.3)[0]


@pytest.mark.parametrize("mode", MODES)
def test_entropies_aggregate_and_masked_rows_are_skipped(make_batch, mode):
    batch = make_batch()
    torch.manual_seed(0)
    logits = torch.randn(6, 7, 33, dtype=torch.float64).masked_fill(batch.mask[..., None] == 0, float("nan"))
    logits.requires_grad_()
    got = ours.compute_entropy_loss(logits, batch.mask, mode)
    rows = []
    for (z,) in batch.rows(logits):
        p = z.log_softmax(-1)
        rows.append(-(p.exp() * p).sum(-1))
    want = by_mode(rows, mode, 7)
    close(got, want)
    close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])


# -- policy losses


def clip(rho, a, low=1 - LOW, high=1 + HIGH, dual=INF):
    loss = torch.maximum(-rho * a, -rho.clamp(low, high) * a)
    return torch.where(a < 0, torch.minimum(loss, -dual * a), loss)


def of_tokens(name, logps, old, a, count=None):
    """The losses of a response's tokens, by the formula of each name; of ``w`` and what is global see below."""
    q = logps - old
    rho, now = q.exp(), q.detach().exp()
    p, before = logps.detach().exp(), old.exp()
    low, high = BOUNDS.get(name, (LOW, HIGH))
    if name == "vanilla":
        return clip(rho, a, dual=DUAL)
    if name == "gspo":
        return clip(q.mean().exp().detach() * (logps - logps.detach()).exp(), a)
    if name == "sapo":
        tau = torch.where(a > 0, 1.0, 0 * a + 1.05)
        return -4 / tau * a / (1 + (-tau * (rho - 1)).exp())
    if name in ("gpg", "reinforce"):
        return -a * logps
    if name == "cispo":
        return -now.clamp(1 - LOW, 1 + HIGH) * a * logps
    if name == "dro":
        return -(a * logps - 0.4 / 2 * q**2)
    if name == "dppo_tv":
        kept = torch.where(a > 0, p - before <= high, p - before >= -low)
    else:
        kl = before * (old - logps.detach()) + (1 - before) * ((1 - before) / (1 - p)).log()
        kept = torch.where(a > 0, (kl <= high) | (p <= before), (kl <= low) | (p >= before))
    if count is not None:
        count.append(torch.stack([~kept, kept & (now > DUAL)]).double())
    return -now.clamp(max=DUAL) * a * logps * kept


def call(name, batch, logps, weights, mode=None, **info):
    function = getattr(ours, f"compute_policy_loss_{name}")
    options = {} if mode is None else {"loss_agg_mode": mode}
    return function(
        batch.old_logps,
        logps,
        batch.advantages,
        batch.mask.bool(),
        config=config(*BOUNDS.get(name, (LOW, HIGH)), **info),
        rollout_is_weights=batch.weights if weights else None,
        **options,
    )


PER_TOKEN = ("vanilla", "gspo", "sapo", "gpg", "reinforce", "cispo", "dppo_tv", "dppo_kl", "dro")


@pytest.mark.parametrize("name", PER_TOKEN)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", [False, True])
def test_policy_losses_of_tokens_follow_their_formulas(make_batch, name, mode, weights):
    batch = make_batch()
    logps = batch.logps.clone().requires_grad_()
    loss, metrics = call(name, batch, logps, weights, mode)
    rows = []
    for x, old, a, w in batch.rows(logps, batch.old_logps, batch.advantages, batch.weights):
        rows.append(of_tokens(name, x, old, a) * (w if weights else 1))
    want = by_mode(rows, "seq-mean-token-mean" if name == "sapo" else mode, 7)
    close(loss, want)
    close(torch.autograd.grad(loss, logps)[0], torch.autograd.grad(want, logps)[0])
    drift = whole([old - x for x, old in batch.rows(batch.logps, batch.old_logps)]).mean()
    if name != "gpg":
        assert metrics["actor/ppo_kl"] == pytest.approx(float(drift), rel=SLACK64)


def test_what_is_clipped_is_counted(make_batch):
    batch = make_batch()
    tokens = [whole(x) for x in zip(*batch.rows(batch.logps, batch.old_logps, batch.advantages), strict=True)]
    rho, a = (tokens[0] - tokens[1]).exp(), tokens[2]
    below, above = rho < 1 - LOW, rho > 1 + HIGH
    inner = (below & (a < 0)) | (above & (a > 0))
    dual = (rho > DUAL) & (a < 0)
    assert min(inner.sum(), dual.sum(), below.sum()) > 0
    expected = [("vanilla", inner, dual), ("cispo", below | above, dual & False)]
    for name in BOUNDS:
        count = []
        of_tokens(name, *tokens, count)
        # Of all bounds something is outside, and something inside.
        assert all(0 < x.sum() < len(x) for x in count[0])
        expected.append((name, *count[0]))
    for name, clipped, lower in expected:
        metrics = call(name, batch, batch.logps, False)[1]
        assert metrics["actor/pg_clipfrac"] == pytest.approx(float(clipped.double().mean()))
        assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(float(lower.double().mean()))


def test_clip_cov_draws_what_verl_draws(make_batch):
    batch = make_batch()
    logps = batch.logps.clone().requires_grad_()
    torch.manual_seed(5)
    loss, metrics = call("clip_cov", batch, logps, True)
    x, old, a, w = (
        whole(t) for t in zip(*batch.rows(logps, batch.old_logps, batch.advantages, batch.weights), strict=True)
    )
    rho = (x - old).exp()
    cov = ((a - a.mean()) * (x - x.mean())).detach()
    free = ~((rho < 1 - LOW) & (a < 0)) & ~((rho > 1 + HIGH) & (a > 0))
    candidates = [i for i in range(len(x)) if free[i] and 0.05 < cov[i] < 5]
    torch.manual_seed(5)
    drawn = [candidates[i] for i in torch.randperm(len(candidates))[: int(0.15 * len(x))]]
    assert 0 < len(drawn) < len(candidates)
    kept = torch.ones_like(x)
    kept[drawn] = 0
    want = (clip(rho, a) * kept.detach() * w).mean()
    close(loss, want)
    close(torch.autograd.grad(loss, logps)[0], torch.autograd.grad(want, logps)[0])
    assert metrics["actor/pg_clipfrac"] == pytest.approx(len(drawn) / len(x))


def test_kl_cov_penalises_the_tokens_of_highest_covariance(make_batch):
    batch = make_batch()
    logps = batch.logps.clone().requires_grad_()
    loss, metrics = call("kl_cov", batch, logps, True)
    x, old, a, w = (
        whole(t) for t in zip(*batch.rows(logps, batch.old_logps, batch.advantages, batch.weights), strict=True)
    )
    cov = ((a - a.mean()) * (x - x.mean())).detach()
    chosen = torch.zeros_like(cov)
    chosen[cov.topk(int(0.2 * len(x))).indices] = 1
    want = ((-(x - old).exp() * a + 0.7 * chosen * (x - old).abs()) * w).mean()
    close(loss, want)
    close(torch.autograd.grad(loss, logps)[0], torch.autograd.grad(want, logps)[0])
    assert metrics == {"actor/ppo_kl": pytest.approx(float((x - old).abs().mean().detach()))}


@pytest.mark.parametrize("weights", [False, True])
def test_geo_mean_takes_the_mean_over_all_rows(make_batch, weights):
    batch = make_batch()
    logps = batch.logps.clone().requires_grad_()
    loss, metrics = call("geo_mean", batch, logps, weights)
    rows = []
    for x, old, a, w in batch.rows(logps, batch.old_logps, batch.advantages, batch.weights):
        q = x - old
        held = torch.where(a > 0, q.clamp(max=HIGH), torch.where(a < 0, q.clamp(min=-LOW), 0 * q))
        if len(x):
            rows.append(-a.mean() * held.mean().exp() * ((w + 1e-10).log().mean().exp() if weights else 1))
    want = sum(rows) / 6
    close(loss, want)
    close(torch.autograd.grad(loss, logps)[0], torch.autograd.grad(want, logps)[0])
    x, old, a = (whole(t) for t in zip(*batch.rows(batch.logps, batch.old_logps, batch.advantages), strict=True))
    outside = (x - old < -LOW) | (x - old > HIGH)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float((outside & (a > 0)).double().mean()))
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(float((outside & (a < 0)).double().mean()))


EVERY = (*PER_TOKEN, "clip_cov", "kl_cov", "geo_mean")


@pytest.mark.parametrize("name", EVERY)
def test_policy_losses_survive_batches_without_tokens(make_batch, name):
    for mask in (torch.zeros(3, 4), torch.zeros(0, 4), torch.zeros(2, 0)):
        batch = make_batch(mask)
        logps = batch.logps.clone().requires_grad_()
        loss, metrics = call(name, batch, logps, True)
        loss.backward()
        assert loss == 0
        assert not logps.grad.any()
        assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("name", EVERY)
def test_policy_losses_are_of_the_common_dtype_and_divide_by_what_they_are_told(make_batch, name):
    batch = make_batch(dtype=torch.bfloat16)
    loss, _ = call(name, batch, batch.logps, False, "token-mean", batch_num_tokens=40, global_batch_size=10, dp_size=2)
    assert loss.dtype == torch.bfloat16
    if name in PER_TOKEN:
        plain, _ = call(name, batch, batch.logps.float(), False, "token-mean")
        assert plain.dtype == torch.float32
        # 20 tokens of 40, or 5 responses of 10, times 2; the result is rounded once.
        torch.testing.assert_close(loss.float(), plain, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_configurations_are_read_as_attributes_or_by_get(make_batch):
    batch = make_batch()
    names = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "global_batch_info")
    mapping = {name: getattr(config(), name) for name in names}
    given = (batch.old_logps, batch.logps, batch.advantages, batch.mask)
    want = call("vanilla", batch, batch.logps, False)[0]
    assert torch.equal(ours.compute_policy_loss_vanilla(*given, config=mapping)[0], want)
    mapping |= {"clip_ratio": LOW, "clip_ratio_low": None, "clip_ratio_high": None, "clip_ratio_c": None}
    both = ours.compute_policy_loss_vanilla(*given, config=mapping)[0]
    rows = [clip((x - y).exp(), a, 1 - LOW, 1 + LOW, 3.0) for x, y, a in batch.rows(*given[1::-1], given[2])]
    close(both, whole(rows).mean())
    with pytest.raises(ValueError, match="config"):
        ours.compute_policy_loss_vanilla(*given)
    with pytest.raises(ValueError, match="dro_beta"):
        ours.compute_policy_loss_dro(*given, config=mapping)


# -- advantages


def whitened(rows):
    tokens = torch.cat(rows)
    scale = torch.sqrt(tokens.var() + 1e-8)
    return [(row - tokens.mean()) / scale for row in rows]


def padded(rows, mask):
    out = torch.zeros(mask.shape, dtype=torch.float64)
    out[mask != 0] = torch.cat(rows)
    return out


def run_gae(batch, gamma, lam):
    advantages, returns = [], []
    for r, v in batch.rows(batch.rewards, batch.values):
        found, ahead, value = [], 0.0, 0.0
        for i in reversed(range(len(r))):
            ahead = float(r[i]) + gamma * value - float(v[i]) + gamma * lam * ahead
            value = float(v[i])
            found.insert(0, ahead)
        advantages.append(torch.tensor(found, dtype=torch.float64))
        returns.append(advantages[-1] + v)
    return advantages, returns


def test_gae_steps_over_masked_tokens_and_whitens(make_batch):
    batch = make_batch()
    advantages, returns = ours.compute_gae_advantage_return(
        batch.rewards, batch.values, batch.mask, torch.tensor(0.9, dtype=torch.float64), 0.7
    )
    found, targets = run_gae(batch, 0.9, 0.7)
    close(advantages, padded(whitened(found), batch.mask))
    close(returns, padded(targets, batch.mask))


def grouped(rewards, form):
    """Advantages of rewards under INDEX, one group after another, from plain numbers."""
    members = defaultdict(list)
    for i, label in enumerate(INDEX):
        members[label].append(i)
    out = [0.0] * len(rewards)
    for group in members.values():
        values = [rewards[i] for i in group]
        middle = sum(values) / len(values)
        for i in group:
            out[i] = form(rewards[i], values, middle, i)
    return out


@pytest.mark.parametrize(
    "name", ["grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "gpg", "reinforce_plus_plus_baseline"]
)
@pytest.mark.parametrize("norm", [True, False])
def test_advantages_of_groups(make_batch, name, norm):
    batch = make_batch(hidden=0.0)
    lengths = batch.mask.sum(-1).tolist()
    scores = batch.rewards.sum(-1)
    factor = 6 / int(scores.count_nonzero()) / 0.5
    positions = {i: lengths[i] for i in range(6)}
    members = {i: [j for j in range(6) if INDEX[j] == INDEX[i]] for i in range(6)}

    def form(r, values, middle, i):
        n = len(values)
        if name.startswith("grpo"):
            if n == 1:
                return r / (1 + 1e-3) if norm else r
            spread = math.sqrt(sum((x - middle) ** 2 for x in values) / (n - 1))
            return (r - middle) / (spread + 1e-3) if norm else r - middle
        if name.startswith("rloo"):
            return (r - middle) * n / (n - 1) if n > 1 else (0.0 if name.endswith("vectorized") else r)
        if n == 1:
            return r * factor if name == "gpg" else r
        if name == "opo":
            own = [positions[j] for j in members[i]]
            return r - sum(x * y for x, y in zip(own, values, strict=True)) / sum(own)
        return (r - middle) * (factor if name == "gpg" else 1)

    options = {"norm_adv_by_std_in_grpo": norm, "epsilon": 1e-3} if name.startswith("grpo") else {}
    options |= {"f_norm": 0.5} if name == "gpg" else {}
    want = torch.tensor(grouped(scores.tolist(), form), dtype=torch.float64)
    function = getattr(ours, f"compute_{name}_outcome_advantage")
    codes = torch.tensor([ord(label) for label in INDEX])
    for index in (INDEX, codes, list(INDEX)):
        advantages, returns = function(batch.rewards, batch.mask.bool(), index, **options)
        rows = [want[i].repeat(lengths[i]) for i in range(6)]
        rows = whitened(rows) if name.endswith("baseline") else rows
        close(advantages, padded(rows, batch.mask))
        assert torch.equal(advantages, returns)


def test_equal_rewards_have_no_advantage():
    rewards = torch.full((3, 1), 0.1)  # whose mean of three rounds
    for name in ("grpo", "grpo_vectorized"):
        function = getattr(ours, f"compute_{name}_outcome_advantage")
        assert not function(rewards, torch.ones(3, 1), np.zeros(3))[0].any()


def test_returns_of_reinforce_plus_plus_and_remax(make_batch):
    batch = make_batch()
    returns = []
    for (r,) in batch.rows(batch.rewards):
        ahead, found = 0.0, []
        for x in reversed(r.tolist()):
            ahead = x + 0.9 * ahead
            found.insert(0, ahead)
        returns.append(torch.tensor(found, dtype=torch.float64))
    got = ours.compute_reinforce_plus_plus_outcome_advantage(batch.rewards, batch.mask, SimpleNamespace(gamma=0.9))
    close(got[0], padded(whitened(returns), batch.mask))
    close(got[1], padded(returns, batch.mask))

    baselines = torch.linspace(-1, 1, 6, dtype=torch.float64)
    sums = [r.flip(0).cumsum(0).flip(0) for (r,) in batch.rows(batch.rewards)]
    got = ours.compute_remax_outcome_advantage(batch.rewards, baselines, batch.mask)
    close(got[0], padded([row - baselines[i] for i, row in enumerate(sums)], batch.mask))
    close(got[1], padded(sums, batch.mask))


@pytest.mark.parametrize("mask", [torch.zeros(3, 4), torch.zeros(0, 4)])
def test_advantages_survive_batches_without_tokens(mask):
    rewards, index = torch.zeros(mask.shape), np.arange(len(mask))
    settings = SimpleNamespace(gamma=1.0)
    for place in ours.ADAPTERS["verl.trainer.ppo.core_algos"]:
        if "advantage" not in place:
            continue
        function = getattr(ours, place)
        names = inspect.signature(function).parameters
        given = {
            "token_level_rewards": rewards,
            "values": rewards,
            "response_mask": mask,
            "index": index,
            "gamma": 1.0,
            "lam": 1.0,
            "config": settings,
            "reward_baselines": rewards.new_zeros(len(mask)),
        }
        out = function(**{name: value for name, value in given.items() if name in names})
        assert [x.shape for x in out] == [mask.shape] * 2
        assert not any(x.any() for x in out)
    with pytest.raises(ValueError, match="index must have"):
        ours.compute_grpo_outcome_advantage(rewards, mask, np.arange(7))


# -- in verl's place


def pretended(changes=()):
    """Modules with verl's signatures and nothing in them, as sources."""
    modules = {}
    for place, names in SIGNATURES.items():
        source = "import torch\nREGISTRY = {}\n"
        for name, signature in names.items():
            signature = dict(changes).get(name, signature)
            if isinstance(signature, dict):
                source += f"class {name}:\n" + "".join(f"    def {m}({s}): ...\n" for m, s in signature.items())
            elif name == "linear_cross_entropy":
                source += "class Kernel(torch.autograd.Function):\n    @staticmethod\n"
                source += f"    def forward(ctx, {signature}): ...\n{name} = Kernel.apply\n"
            elif signature is not None:
                source += f"def {name}({signature}): ...\nREGISTRY['{name}'] = {name}\n"
        modules[place] = source
    modules["verl.trainer.early"] = "from verl.trainer.ppo.core_algos import agg_loss as aggregate\n"
    modules["verl.trainer.late"] = "from verl.trainer.ppo.core_algos import agg_loss, kl_penalty\n"
    return modules


def test_enabling_replaces_functions_wherever_verl_has_imported_them(pretend):
    pretend("verl", "0.9.1", pretended())
    from verl.trainer import early
    from verl.trainer.ppo import core_algos

    theirs = core_algos.agg_loss, core_algos.kl_penalty
    with ours.enable(skip=("kl_penalty",)):
        assert ours.enabled()
        from verl.trainer import late

        assert core_algos.agg_loss is early.aggregate is late.agg_loss is ours.agg_loss
        assert core_algos.REGISTRY["compute_policy_loss_gspo"] is ours.compute_policy_loss_gspo
        assert core_algos.kl_penalty is late.kl_penalty is theirs[1]
        assert sys.modules["verl.utils.kernel.linear_cross_entropy"].linear_cross_entropy is ours.linear_cross_entropy
        with pytest.raises(ValueError, match="nothing"):
            ours.enable(skip=("nothing",))
        assert core_algos.agg_loss is ours.agg_loss
        ours.enable()
        assert core_algos.kl_penalty is late.kl_penalty is ours.kl_penalty
        ours.enable(skip=("agg_loss",))
        assert core_algos.agg_loss is early.aggregate is late.agg_loss is theirs[0]
        assert core_algos.kl_penalty is late.kl_penalty is ours.kl_penalty
    assert not ours.enabled()
    assert (late.agg_loss, late.kl_penalty) == theirs
    assert core_algos.agg_loss is early.aggregate is core_algos.REGISTRY["agg_loss"] is theirs[0]
    with pytest.raises(ValueError, match="nothing"):
        ours.enable(skip=("nothing",))


def test_the_readmes_lines_serve_what_verl_imports_after_them(pretend, readme_snippet):
    pretend("verl", "0.9.1", pretended())
    try:
        exec(readme_snippet("verl"), {})
        from verl.trainer import late

        assert late.agg_loss is ours.agg_loss
    finally:
        ours.disable()


@pytest.mark.parametrize(
    ("release", "changes", "message"),
    [
        ("0.10.0", {}, r"looked for verl 0\.9\.1 and found 0\.10\.0"),
        ("0.9.1", {"agg_loss": None}, r"core_algos\.agg_loss\(loss_mat, .*\) in verl 0\.9\.1 and did not find it"),
        (
            "0.9.1",
            {"agg_loss": "loss_mat, loss_mask"},
            r"agg_loss\(loss_mat, .*\) .* the parameters \(loss_mat, loss_mask\)",
        ),
        ("0.9.1", {"linear_cross_entropy": "hidden"}, r"linear_cross_entropy\(hidden, .*\) .* parameters \(hidden\)"),
    ],
)
def test_an_unknown_verl_is_refused_and_left_alone(pretend, release, changes, message):
    pretend("verl", release, pretended(changes))
    from verl.trainer.ppo import core_algos

    before = dict(vars(core_algos))
    with pytest.raises(RuntimeError, match=message):
        ours.enable()
    assert vars(core_algos) == before
    assert not ours.enabled()


@pytest.mark.parametrize("missing", ["tensordict_", "verl.utils.gone"])
def test_what_cannot_be_imported_is_told_from_what_verl_lacks(pretend, missing):
    core = "verl.trainer.ppo.core_algos"
    pretend("verl", "0.9.1", pretended() | {core: f"import {missing}\n"})
    kind, message = (RuntimeError, "did not find it") if "gone" in missing else (ImportError, "cannot be imported")
    with pytest.raises(kind, match=rf"looked for {core}\.agg_loss\(.* in verl 0\.9\.1.*{message}.*{missing}"):
        ours.enable()
    functional = importlib.import_module("verl.utils.torch_functional")
    assert functional.entropy_from_logits is not ours.entropy_from_logits
    assert not ours.enabled()


@pytest.mark.skipif(bool(installed), reason="verl is installed")
def test_without_verl_enabling_says_so():
    with pytest.raises(ImportError, match=r"looked for verl 0\.9\.1: .*verl"):
        ours.enable()


# -- verl itself


@needs_verl
def test_verl_returns_the_same(make_batch):
    from verl.trainer.ppo import core_algos
    from verl.utils import torch_functional
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.workers.config import ActorConfig

    batch = make_batch(dtype=torch.float32, hidden=0.0)
    actor = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_high=HIGH)
    for name, value in vars(config().policy_loss).items():
        object.__setattr__(actor.policy_loss, name, value)
    mask = batch.mask.bool()

    def both(name, *arguments, slope=True, **options):
        out = []
        for home in (ours, core_algos if hasattr(core_algos, name) else torch_functional):
            torch.manual_seed(3)
            leaf = arguments[0].clone().requires_grad_(arguments[0].is_floating_point())
            found = getattr(home, name)(leaf, *arguments[1:], **options)
            first = found[0] if isinstance(found, tuple) else found
            gradient = torch.autograd.grad(first.sum(), leaf)[0] if first.requires_grad else None
            out.append((found if isinstance(found, tuple) else (found,), gradient))
        for got, want in zip(out[0][0], out[1][0], strict=True):
            if isinstance(want, dict):
                assert got == pytest.approx(want, rel=SLACK32, abs=SLACK32)
            else:
                assert got.dtype == want.dtype
                assert got.shape == want.shape
                close(got, want, SLACK32)
        if slope:
            close(out[0][1], out[1][1], SLACK32)

    logits, labels = 3 * torch.randn(6, 7, 33), torch.randint(33, (6, 7))
    both("logprobs_from_logits", logits, labels)
    both("entropy_from_logits", logits)
    both("entropy_from_logits_with_chunking", logits.flatten(0, 1), 5)
    both("calculate_sum_pi_squared_from_logits", logits, slope=False)
    both("compute_entropy_loss", logits, mask)
    hidden, weight = torch.randn(6, 7, 16), torch.randn(33, 16)
    for got, want in zip(
        ours.FusedLinearForPPO()(hidden, weight, labels, 0.7),
        FusedLinearForPPO()(hidden, weight, labels, 0.7),
        strict=True,
    ):
        assert got.dtype == want.dtype
        close(got, want, SLACK32)
    for mode in MODES:
        both("agg_loss", batch.values, mask, mode)
        both("compute_value_loss", batch.values, batch.rewards, batch.old_values, mask, 0.3, mode)
    for kl in ("kl", "abs", "mse", "low_var_kl", "k1+", "abs+", "k2+", "k3+"):
        both("kl_penalty", batch.logps, batch.ref_logps, kl)
    # Their own order of arguments, for gradients of the log-probs.
    for name in EVERY:
        function = f"compute_policy_loss_{name}"
        for weights in (None, batch.weights):
            results = []
            for home in (ours, core_algos):
                logps = batch.logps.clone().requires_grad_()
                torch.manual_seed(3)
                given = (batch.old_logps, logps, batch.advantages, mask)
                loss, metrics = getattr(home, function)(*given, config=actor, rollout_is_weights=weights)
                results.append((loss, torch.autograd.grad(loss, logps)[0], metrics))
            (loss, gradient, metrics), (true, slope, numbers) = results
            assert loss.dtype == true.dtype
            close(loss, true, SLACK32)
            close(gradient, slope, SLACK32)
            assert metrics == pytest.approx(numbers, rel=SLACK32, abs=SLACK32), name
    for name in ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "gpg", "reinforce_plus_plus_baseline"):
        function = f"compute_{name}_outcome_advantage"
        index = np.array([0, 1, 0, 2, 1, 0]) if name.endswith("vectorized") else INDEX
        results = [getattr(home, function)(batch.rewards, batch.mask, index) for home in (ours, core_algos)]
        for got, want in zip(*results, strict=True):
            assert got.dtype == want.dtype
            close(got, want, SLACK32)
    inside = batch.mask.float()
    for name, given in (
        ("gae_advantage_return", (batch.rewards, batch.values, batch.mask, 0.9, 0.7)),
        ("reinforce_plus_plus_outcome_advantage", (batch.rewards, batch.mask, SimpleNamespace(gamma=0.9))),
        ("remax_outcome_advantage", (batch.rewards, batch.rewards[:, 0], batch.mask)),
    ):
        results = [getattr(home, f"compute_{name}")(*given) for home in (ours, core_algos)]
        for got, want in zip(*results, strict=True):
            assert got.dtype == want.dtype
            close(got * inside, want * inside, SLACK32)


@needs_verl
def test_verl_itself_is_served():
    from verl.trainer.ppo import core_algos

    theirs = core_algos.POLICY_LOSS_REGISTRY["gspo"], core_algos.ADV_ESTIMATOR_REGISTRY["gae"]
    with ours.enable():
        assert core_algos.POLICY_LOSS_REGISTRY["gspo"] is ours.compute_policy_loss_gspo
        assert core_algos.ADV_ESTIMATOR_REGISTRY["gae"] is ours.compute_gae_advantage_return
    assert theirs == (core_algos.POLICY_LOSS_REGISTRY["gspo"], core_algos.ADV_ESTIMATOR_REGISTRY["gae"])
