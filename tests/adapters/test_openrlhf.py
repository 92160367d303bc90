"""``prefcore.adapters.openrlhf`` against OpenRLHF 0.11.2: signatures, formulas in float64, its own code if there."""

import importlib
import inspect
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from torch.nn.functional import cross_entropy

from prefcore.adapters import openrlhf as ours

COUNTS = "dp_size=1, batch_num_tokens=None, global_batch_size=None"
PAIR = "self, chosen_reward, reject_reward, margin=None"
# As they are in OpenRLHF 0.11.2, without annotations.
SIGNATURES = {
    "openrlhf.models.utils": {
        "compute_approx_kl": "log_probs, log_probs_base, log_probs_old=None, kl_estimator='k1', "
        "unbiased_gradient=False",
        "compute_entropy": "logits",
        "log_probs_from_logits": "logits, labels, temperature=1.0",
    },
    "openrlhf.models.loss": {
        "aggregate_loss": f"loss, loss_mask, token_level_loss=True, {COUNTS}",
        "DPOLoss": {
            "__init__": "self, beta, label_smoothing=0.0, ipo=False",
            "forward": "self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, "
            "reference_rejected_logps",
        },
        "LogExpLoss": {
            "__init__": "self, *args, **kwargs",
            "forward": "self, chosen_reward, reject_reward, margin=None",
        },
        "PairWiseLoss": {
            "__init__": "self, *args, **kwargs",
            "forward": "self, chosen_reward, reject_reward, margin=None",
        },
        "GPTLMLoss": {"__init__": "self, ring_attn_group=None", "forward": "self, logits, labels"},
        "PolicyLoss": {
            "__init__": "self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, "
            "policy_loss_type='ppo', is_correction_level='off', is_correction_mode='mask', "
            "is_correction_gating='ratio', is_correction_threshold=(0.5, 5.0)",
            "forward": "self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, "
            + COUNTS,
        },
        "SFTLoss": {
            "__init__": "self, token_level_loss=True",
            "forward": f"self, per_token_logps, loss_mask, {COUNTS}",
        },
        "ValueLoss": {
            "__init__": "self, clip_eps=None, token_level_loss=True",
            "forward": f"self, values, old_values, returns, action_mask=None, {COUNTS}",
        },
    },
}


def theirs():
    """OpenRLHF's modules of losses and functions, or a skip that says why not."""
    try:
        found = version("openrlhf")
    except PackageNotFoundError:
        pytest.skip("OpenRLHF is not installed")
    if found not in ours.VERSIONS:
        pytest.skip(f"what is compared is that of {ours.VERSIONS}, not {found}")
    try:
        return [importlib.import_module(place) for place in ours.ADAPTERS]
    except ImportError as error:
        pytest.skip(f"OpenRLHF cannot be imported here: {error}")


INF = float("inf")
LOW, HIGH, DUAL = 0.2, 0.28, 2.0
# 31 tokens in a sum, some 30 roundings of each, of numbers up to about 8.
SLACK64, SLACK32 = (2**13 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32))


def close(got, want, slack=SLACK64):
    torch.testing.assert_close(got, want, rtol=slack, atol=slack, check_dtype=False)


def by_mode(rows, of_tokens):
    full = [row for row in rows if len(row)]
    if of_tokens:
        return sum(row.sum() for row in full) / sum(len(row) for row in full)
    return sum(row.mean() for row in full) / len(full)


def test_every_signature_is_that_of_the_version_named(assert_signatures):
    assert_signatures(ours, SIGNATURES)


# -- log-probs, entropies, KL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_logits_give_log_probs_and_entropies(dtype, scale):
    torch.manual_seed(0)
    logits = (scale * torch.randn(2, 5, 33)).to(dtype).requires_grad_()
    before = logits.detach().clone()
    labels = torch.randint(33, (2, 5))
    labels[1, 3] = -100
    logps, entropy = ours.log_probs_from_logits(logits, labels, 0.7), ours.compute_entropy(logits)
    assert (logps.dtype, entropy.dtype) == (dtype, dtype)
    assert torch.equal(logits, before)
    exact = logits.detach().double().requires_grad_()
    p, cold = exact.log_softmax(-1), (exact / 0.7).log_softmax(-1)
    truth = cold.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    h = -(p.exp() * p).sum(-1)
    # Some 8 roundings of numbers as large as the largest logit over 0.7, and one to the result's dtype.
    slack = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (1 + float(before.abs().max()) / 0.7)
    rounded = torch.finfo(dtype).eps
    torch.testing.assert_close(logps.double(), truth, rtol=rounded, atol=slack)
    torch.testing.assert_close(entropy.double(), h, rtol=rounded, atol=slack)
    g = torch.randn(2, 2, 5, dtype=torch.float64)
    (logps * g[0] + entropy * g[1]).sum().backward()
    (truth * g[0] + h * g[1]).sum().backward()
    # Upstream gradients are rounded to the dtype of what they are of, and the two results before they are added.
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=8 * rounded, atol=16 * slack + 8 * rounded)


def test_no_rows_give_no_results():
    logits, labels = torch.zeros(0, 4, 9), torch.zeros(0, 4, dtype=torch.int64)
    assert ours.log_probs_from_logits(logits, labels).shape == (0, 4)
    assert ours.compute_entropy(logits).shape == (0, 4)
    assert ours.compute_approx_kl(logits, logits).shape == (0, 4, 9)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("off_policy", [False, True])
def test_kl_estimates_are_clamped_and_may_have_the_unbiased_gradient(name, unbiased, off_policy):
    logps = torch.tensor([[-0.5, -2.0, -30.0, -0.1], [-1.0, -1.0, -4.0, -45.0]], requires_grad=True)
    base = torch.tensor([[-0.75, -0.3, -0.1, -45.0], [-1.0, -1.001, -1.7, -1.0]])
    old = torch.tensor([[-0.7, -2.1, -35.0, -0.1], [-1.5, -1.0, -4.0, -45.0]]) if off_policy else None
    got = ours.compute_approx_kl(logps, base, old, name, unbiased)
    exact = logps.detach().double().requires_grad_()
    u = base.double() - exact
    value = {"k1": -u, "k2": u**2 / 2, "k3": torch.expm1(u.clamp(max=10)) - u.clamp(max=10)}[name].clamp(-10, 10)
    assert got.dtype == torch.float32
    # Some 8 roundings of log-ratios up to 45, and of values of at most 10.
    slack = 8 * torch.finfo(torch.float32).eps * 45
    torch.testing.assert_close(got.double(), value, rtol=0, atol=slack)
    surrogate = value
    if unbiased:
        ratio = 1.0 if old is None else (exact.detach() - old).exp().clamp(max=10)
        surrogate = ratio * u**2 / 2
    gradients = [torch.autograd.grad(x.sum(), leaf)[0] for x, leaf in ((got, logps), (surrogate, exact))]
    # k3's slope is exp(u) - 1 where its value is at most 10; the surrogate's up to 10 * 45.
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=slack, atol=slack)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="kl_estimator"):
        ours.compute_approx_kl(torch.zeros(2), torch.zeros(2), kl_estimator="k4")


# -- losses


@pytest.mark.parametrize("of_tokens", [True, False])
def test_losses_aggregate_over_tokens_or_sequences(make_batch, of_tokens):
    batch = make_batch()
    losses = batch.advantages.clone().requires_grad_()
    got = ours.aggregate_loss(losses, batch.mask, of_tokens)
    want = by_mode([row for (row,) in batch.rows(losses)], of_tokens)
    close(got, want)
    close(torch.autograd.grad(got, losses)[0], torch.autograd.grad(want, losses)[0])
    close(ours.SFTLoss(of_tokens)(losses, batch.mask), -want)
    close(ours.aggregate_loss(losses, batch.mask, of_tokens, dp_size=2), want)  # unused without a count
    counts = {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": torch.tensor(9.0)}
    scaled = want * 2 * (20 / 50 if of_tokens else 5 / 9)
    close(ours.aggregate_loss(losses, batch.mask, of_tokens, **counts), scaled)
    full = make_batch(torch.ones(3, 4))
    close(ours.aggregate_loss(full.values, None, of_tokens), full.values.mean())


def test_next_tokens_have_their_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 33, dtype=torch.float64, requires_grad=True), torch.randint(33, (2, 6))
    labels[0, 3:], labels[1, 0] = -100, -100
    got = ours.GPTLMLoss()(logits, labels)
    want = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(got, want)
    close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])
    assert ours.GPTLMLoss()(logits, torch.full_like(labels, -100)) == 0
    with pytest.raises(NotImplementedError, match=r"skip=\('GPTLMLoss',\)"):
        ours.GPTLMLoss(object())


def clip(rho, a, dual=None):
    loss = torch.maximum(-rho * a, -rho.clamp(1 - LOW, 1 + HIGH) * a)
    return loss if dual is None else torch.where(a < 0, torch.minimum(loss, -dual * a), loss)


CORRECTIONS = [
    ("off", "mask", "ratio", (0.5, 5.0)),
    ("token", "mask", "ratio", (0.9, 1.4)),
    ("token", "clip", "ratio", (0.9, 1.4)),
    ("seq", "mask", "ratio", (0.9, 1.4)),
    ("token", "mask", "binary_kl", (0.0, 0.02)),
    ("seq", "mask", "binary_kl", (0.0, 0.02)),
    ("token", "mask", "tv", (0.0, 0.08)),
    ("seq", "mask", "tv", (0.0, 0.08)),
]


def correction(old, rollout, level, mode, gating, bounds):
    """Weights of a response's tokens, and what is outside: of tokens, or of the response."""
    rho, p, q = (old - rollout).exp(), rollout.exp(), old.exp()
    gate = {
        "ratio": old - rollout,
        "tv": (p - q).abs(),
        "binary_kl": p * (rollout - old) + (1 - p) * ((1 - p) / (1 - q)).log(),
    }[gating]
    gate = gate.mean()[None] if level == "seq" else gate
    gate = gate.exp() if gating == "ratio" else gate
    outside = (gate < bounds[0]) | (gate > bounds[1])
    if mode == "clip":
        return gate.clamp(*bounds), outside
    return rho * ~outside, outside


@pytest.mark.parametrize("settings", CORRECTIONS, ids=lambda s: "-".join(map(str, s[:3])))
@pytest.mark.parametrize("of_tokens", [True, False])
@pytest.mark.parametrize("dual", [None, DUAL])
def test_ppo_with_every_correction(make_batch, settings, of_tokens, dual):
    level, _, _, bounds = settings
    batch = make_batch()
    logps = batch.logps.clone().requires_grad_()
    rollout = batch.old_logps + 0.4 * (batch.weights - 1)
    module = ours.PolicyLoss(LOW, HIGH, dual, of_tokens, "ppo", *settings[:3], list(bounds))
    got = module(logps, batch.old_logps, batch.advantages, batch.mask, rollout)
    rows, outside, clipped, drift, away = [], [], [], [], []
    for x, old, a, r in batch.rows(logps, batch.old_logps, batch.advantages, rollout):
        if not len(x):
            continue
        rho = (x - old).exp()
        weights, out = (1, a != a) if level == "off" else correction(old, r, *settings)
        rows.append(weights * clip(rho, a, dual))
        outside.append(out.double())
        clipped.append((((rho < 1 - LOW) & (a < 0)) | ((rho > 1 + HIGH) & (a > 0))).double())
        drift.append((old - x).detach())
        away.append(r - old)
    want = by_mode(rows, of_tokens)
    close(got[0], want)
    close(torch.autograd.grad(got[0], logps)[0], torch.autograd.grad(want, logps)[0])
    close(got[2], torch.cat(drift).mean())
    assert float(got[1]) == pytest.approx(float(torch.cat(clipped).mean()), rel=SLACK32)
    if level == "off":
        assert got[3:] == (None, None)
    else:
        share = float(torch.cat(outside).mean())
        assert 0 < share < 1
        assert float(got[4]) == pytest.approx(share, rel=SLACK32)
        close(got[3], torch.cat(away).mean())


@pytest.mark.parametrize("level", ["off", "token"])
@pytest.mark.parametrize("dual", [None, DUAL])
def test_gspo_has_the_gradient_of_the_mean(make_batch, level, dual):
    batch = make_batch()
    logps = batch.logps.clone().requires_grad_()
    rollout = batch.old_logps + 0.4 * (batch.weights - 1)
    module = ours.PolicyLoss(LOW, HIGH, dual, True, "gspo", level)
    assert not module.token_level_loss
    got = module(logps, batch.old_logps, batch.advantages, batch.mask, rollout)
    base = batch.old_logps if level == "off" else rollout
    rows = [clip((x - b).mean().exp(), a, dual) for x, b, a in batch.rows(logps, base, batch.advantages)]
    want = by_mode(rows, False)
    close(got[0], want)
    close(torch.autograd.grad(got[0], logps)[0], torch.autograd.grad(want, logps)[0])
    assert got[3:] == (None, None)


@pytest.mark.parametrize("clip_eps", [None, 0.3])
@pytest.mark.parametrize("of_tokens", [True, False])
def test_values_have_a_clipped_loss(make_batch, clip_eps, of_tokens):
    batch = make_batch()
    values = batch.values.clone().requires_grad_()
    got = ours.ValueLoss(clip_eps, of_tokens)(values, batch.old_values, batch.rewards, batch.mask)
    rows = []
    for v, old, target in batch.rows(values, batch.old_values, batch.rewards):
        held = v if clip_eps is None else old + (v - old).clamp(-clip_eps, clip_eps)
        rows.append(torch.maximum((v - target) ** 2, (held - target) ** 2) / 2)
    want = by_mode(rows, of_tokens)
    close(got, want)
    close(torch.autograd.grad(got, values)[0], torch.autograd.grad(want, values)[0])


@pytest.mark.parametrize(("smoothing", "ipo"), [(0.0, False), (0.2, False), (0.0, True)])
def test_preferences(smoothing, ipo):
    torch.manual_seed(0)
    given = [20 * torch.randn(7, dtype=torch.float64) for _ in range(4)]
    given[0][0] += 1e4
    leaves = [x.requires_grad_(i < 2) for i, x in enumerate(given)]
    loss, *rewards = ours.DPOLoss(0.3, smoothing, ipo)(*leaves)
    margin = leaves[0] - leaves[1] - leaves[2] + leaves[3]
    terms = []
    for m in margin:
        z = 0.3 * m
        softplus = torch.relu(-z) + torch.log1p((-z.abs()).exp())
        terms.append((m - 1 / 0.6) ** 2 if ipo else (1 - smoothing) * softplus + smoothing * (softplus + z))
    want = sum(terms) / 7
    close(loss, want)
    for got, true in zip(torch.autograd.grad(loss, leaves[:2]), torch.autograd.grad(want, leaves[:2]), strict=True):
        close(got, true)
    for reward, x, ref in zip(rewards, leaves[:2], leaves[2:], strict=True):
        assert not reward.requires_grad
        close(reward, 0.3 * (x - ref).detach())
    none = [torch.zeros(0) for _ in range(4)]
    assert ours.DPOLoss(0.3, smoothing, ipo)(*none)[0] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rewards_of_pairs(dtype):
    chosen, reject = (x.to(dtype).requires_grad_() for x in 3 * torch.randn(2, 9, generator=torch.manual_seed(0)))
    margin = torch.rand(9, generator=torch.manual_seed(1)).to(dtype)
    for module, given, gap in (
        (ours.PairWiseLoss(), (), chosen.double() - reject.double()),
        (ours.PairWiseLoss(), (margin,), chosen.double() - reject.double() - margin.double()),
        (ours.LogExpLoss(), (margin,), chosen.double() - reject.double()),
    ):
        got, want = module(chosen, reject, *given), (1 + (-gap).exp()).log().mean()
        assert got.dtype == dtype
        # Some ten roundings of float32, or float64, and one of the result.
        slack = 16 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps if dtype == torch.bfloat16 else SLACK64
        close(got.double(), want, slack)
        for slope, true in zip(*(torch.autograd.grad(x, (chosen, reject)) for x in (got, want)), strict=True):
            close(slope.double(), true.double(), slack)
    far = torch.tensor([1e4]), torch.tensor([-1e4])
    assert ours.LogExpLoss()(far[1], far[0]) == 2e4
    assert ours.PairWiseLoss()(torch.zeros(0), torch.zeros(0)) == 0


@pytest.mark.parametrize("mask", [torch.zeros(3, 4), torch.zeros(0, 4), torch.zeros(2, 0)])
@pytest.mark.parametrize("settings", CORRECTIONS, ids=lambda s: "-".join(map(str, s[:3])))
def test_batches_without_tokens_have_losses_of_zero(make_batch, mask, settings):
    batch = make_batch(mask)
    for kind in ("ppo", "gspo"):
        logps = batch.logps.clone().requires_grad_()
        module = ours.PolicyLoss(LOW, HIGH, DUAL, True, kind, *settings)
        found = module(logps, batch.old_logps, batch.advantages, mask, batch.ref_logps)
        found[0].backward()
        assert not logps.grad.any()
        assert all(x == 0 for x in found if x is not None)
    assert ours.ValueLoss(0.2)(batch.values, batch.old_values, batch.rewards, mask) == 0
    assert ours.SFTLoss(False)(batch.logps, mask) == 0


def test_a_loss_of_values_is_rounded_to_16_bits_only_where_all_are(make_batch):
    batch = make_batch(dtype=torch.bfloat16)
    values, old, returns = batch.values, batch.old_values, batch.rewards
    for clip_eps in (None, 0.2):
        module = ours.ValueLoss(clip_eps)
        assert module(values, old, returns, batch.mask).dtype == torch.bfloat16
        loss = module(values, old, returns.float(), batch.mask)
        assert loss.dtype == torch.float32
        assert loss == module(values.float(), old.float(), returns.float(), batch.mask)


def test_metrics_of_16_bits_are_not_rounded(make_batch):
    batch = make_batch(dtype=torch.bfloat16)
    given = batch.logps, batch.old_logps, batch.advantages, batch.mask, batch.ref_logps
    for kind in ("ppo", "gspo"):
        module = ours.PolicyLoss(policy_loss_type=kind, is_correction_level="token")
        loss, *metrics = module(*given)
        wide, *plain = module(*(x.float() for x in given))
        assert metrics == plain
        assert (loss.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
        assert module(given[0], given[1].float(), *given[2:])[0].dtype == torch.float32


def test_losses_keep_16_bits(make_batch):
    batch = make_batch(dtype=torch.bfloat16)
    for kind in ("ppo", "gspo"):
        loss = ours.PolicyLoss(policy_loss_type=kind)(batch.logps, batch.old_logps, batch.advantages, batch.mask)[0]
        plain = ours.PolicyLoss(policy_loss_type=kind)(
            batch.logps.float(), batch.old_logps.float(), batch.advantages.float(), batch.mask
        )[0]
        assert (loss.dtype, plain.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(loss.float(), plain, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"policy_loss_type": "cispo"}, "policy_loss_type"),
        ({"is_correction_level": "word"}, "is_correction_level"),
        ({"is_correction_mode": "drop"}, "is_correction_mode"),
        ({"is_correction_gating": "kl"}, "is_correction_gating"),
        ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "of tokens"),
        ({"is_correction_level": "seq", "is_correction_gating": "tv"}, "upper bound"),
    ],
)
def test_settings_that_openrlhf_refuses_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ours.PolicyLoss(**settings)


def test_a_correction_needs_the_rollouts_log_probs():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="rollout_log_probs"):
        ours.PolicyLoss(is_correction_level="token")(x, x, x, x)


# -- in OpenRLHF's place


def pretended():
    modules = {}
    for place, names in SIGNATURES.items():
        source = ""
        for name, signature in names.items():
            if isinstance(signature, dict):
                source += f"class {name}:\n" + "".join(f"    def {m}({s}): ...\n" for m, s in signature.items())
            else:
                source += f"def {name}({signature}): ...\n"
        modules[place] = source
    modules["openrlhf.trainer"] = "from openrlhf.models.loss import DPOLoss\n"
    modules["openrlhf.cli.train_dpo"] = (
        "import openrlhf.trainer\nopenrlhf.trainer.seen = __name__, openrlhf.trainer.DPOLoss\n"
    )
    return modules


def test_enabling_replaces_what_trainers_have_imported(pretend):
    pretend("openrlhf", "0.11.2", pretended())
    trainer = importlib.import_module("openrlhf.trainer")
    before = trainer.DPOLoss
    with ours.enable():
        assert trainer.DPOLoss is ours.DPOLoss
        assert sys.modules["openrlhf.models.utils"].compute_entropy is ours.compute_entropy
    assert trainer.DPOLoss is before
    assert not ours.enabled()


def test_the_readmes_lines_run_its_command_with_ours(pretend, readme_snippet):
    pretend("openrlhf", "0.11.2", pretended())
    try:
        exec(readme_snippet("openrlhf"), {})
        assert sys.modules["openrlhf.trainer"].seen == ("__main__", ours.DPOLoss)
    finally:
        ours.disable()


def test_another_openrlhf_is_refused(pretend):
    pretend("openrlhf", "0.8.0", pretended())
    with pytest.raises(RuntimeError, match=r"looked for openrlhf 0\.11\.2 and found 0\.8\.0"):
        ours.enable()
    assert not ours.enabled()


# -- OpenRLHF itself


def test_openrlhf_returns_the_same(make_batch):
    utils, loss = theirs()
    batch = make_batch(dtype=torch.float32, hidden=0.0)
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(6, 7, 33), torch.randint(33, (6, 7))

    def both(run, leaf):
        results = []
        for homes in ((ours, ours), (utils, loss)):
            own = leaf.clone().requires_grad_()
            found = run(*homes, own)
            found = found if isinstance(found, tuple) else (found,)
            results.append((*found, torch.autograd.grad(found[0].sum(), own)[0]))
        for got, want in zip(*results, strict=True):
            if want is None:
                assert got is None
            else:
                assert (got.dtype, got.shape) == (want.dtype, want.shape)
                close(got, want, SLACK32)

    both(lambda u, _, x: u.log_probs_from_logits(x * 1, labels, 0.7), logits)
    both(lambda u, _, x: inspect.unwrap(u.compute_entropy)(x), logits)
    labels[0, 4:] = -100
    both(lambda _, m, x: m.GPTLMLoss()(x, labels), logits)
    for kl in ("k1", "k2", "k3"):
        for unbiased in (False, True):
            both(
                lambda u, _, x, k=kl, b=unbiased: u.compute_approx_kl(x, batch.ref_logps, batch.old_logps, k, b),
                batch.logps,
            )
    # OpenRLHF's mean of a row without tokens is NaN, and counts as a sequence that is filtered.
    kept = batch.mask.sum(-1) > 0
    x, old, a, mask, w = (t[kept] for t in (batch.logps, batch.old_logps, batch.advantages, batch.mask, batch.weights))
    for of_tokens in (True, False):
        counts = {"dp_size": 2, "batch_num_tokens": torch.tensor(30.0), "global_batch_size": torch.tensor(8.0)}
        for more in ({}, counts):
            both(lambda _, m, y, o=of_tokens, c=more: m.SFTLoss(o)(y, batch.mask, **c), batch.logps)
            for eps in (None, 0.3):
                both(
                    lambda _, m, y, o=of_tokens, c=more, e=eps: m.ValueLoss(e, o)(
                        y, batch.old_values, batch.rewards, batch.mask, **c
                    ),
                    batch.values,
                )
            for kind in ("ppo", "gspo"):
                for settings in CORRECTIONS:
                    for dual in (None, DUAL):
                        both(
                            lambda _, m, y, o=of_tokens, c=more, k=kind, s=settings, d=dual: m.PolicyLoss(
                                LOW, HIGH, d, o, k, *s
                            )(y, old, a, mask, old + 0.4 * (w - 1), **c),
                            x,
                        )
    sums = [20 * torch.randn(7) for _ in range(3)]
    for more in ((), (torch.rand(7),)):
        both(lambda _, m, y, given=more: m.PairWiseLoss()(y, sums[0], *given), torch.randn(7))
        both(lambda _, m, y, given=more: m.LogExpLoss()(y, sums[0], *given), torch.randn(7))
    for smoothing, ipo in ((0.0, False), (0.2, False), (0.0, True)):
        both(lambda _, m, y, s=smoothing, i=ipo: m.DPOLoss(0.3, s, i)(y, *sums), 20 * torch.randn(7))
