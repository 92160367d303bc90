"""Token losses of policy gradients against the float64 oracle."""

from __future__ import annotations

import importlib

import pytest
import torch

import prefcore
from prefcore import _impl, _native, reference
from prefcore._types import FORMS, KLS
from prefcore.testing import assert_no_worse_than

ops = importlib.import_module("prefcore.ops.policy_terms")
interpreted = pytest.mark.skipif(
    not _impl.interpreting(), reason="Triton's interpreter is off: TRITON_INTERPRET=1 turns it on"
)
CPU = pytest.param("cpu", "cpu", id="cpu")
TRITON = pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted)
CUDA = pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu)
EVERY = pytest.mark.parametrize(("impl", "device"), [CPU, TRITON, CUDA])
BOUNDS = {
    "clip": {"low": 0.8, "high": 1.25, "dual": 1.5},
    "cispo": {"low": 0.7, "high": 1.4},
    "sapo": {"low": 1.05, "high": 1.0},
    "log_clip": {"low": -0.3, "high": 0.4},
    "value": {"high": 0.2},
}
COMBINATIONS = [(form, kl) for form in FORMS for kl in KLS if kl == "none" or form not in ("log_clip", "value")]
DIFFERENTIABLE = ("logps", "entropy", "kl_values")


def make(form, kl, T, *, dtype=torch.float64, scale=0.3, seed=0, extras=True, device="cpu"):
    """Arguments of the op, as float32 numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale=scale):
        return (scale * torch.randn(T, generator=generator)).to(device, dtype)

    logps = draw() - 2
    given = {"logps": logps, "old_logps": (logps.float() + draw().float()).to(dtype)}
    if form != "none":
        given["advantages"] = draw(1.0)
    if form not in ("none", "log_clip") and extras:
        given["weights"] = draw(1.0).abs()
    if form not in ("log_clip", "value") and extras:
        given |= {"entropy": draw(1.0).abs(), "entropy_coef": 0.125}
    if kl == "exact":
        given["kl_values"] = draw().abs()
    elif kl != "none":
        given["ref_logps"] = (logps.float() + draw().float()).to(dtype)
    if kl != "none":
        given["kl_coef"] = draw().abs() if extras else 0.25
    return {**given, "form": form, "kl": kl, **BOUNDS.get(form, {})}


def evaluate(function, given, upstream, dtype=None, **options):
    """Losses, statistics, and the gradients of those inputs that get one."""
    own = {name: x.to(dtype or x.dtype) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    leaves = {name: own[name].clone().requires_grad_() for name in DIFFERENTIABLE if name in own}
    terms = function(**{**own, **leaves}, **options)
    used = (
        torch.autograd.grad(
            terms.losses, list(leaves.values()), upstream.to(terms.losses), allow_unused=True, materialize_grads=True
        )
        if terms.losses.requires_grad
        else [torch.zeros_like(x) for x in leaves.values()]
    )
    return {
        "losses": terms.losses.detach(),
        "stats": torch.stack(tuple(terms.stats)),
        **dict(zip(leaves, used, strict=True)),
    }


def check(given, impl, dtype):
    upstream = torch.randn(given["logps"].shape, generator=torch.Generator().manual_seed(9)).to(given["logps"].device)
    truth = evaluate(reference.policy_terms, given, upstream, torch.float64)
    eager = evaluate(reference.policy_terms, given, upstream, dtype)
    actual = evaluate(prefcore.policy_terms, given, upstream, dtype, impl=impl)
    assert actual.keys() == truth.keys()
    for name, values in actual.items():
        assert values.dtype == (torch.float64 if name == "stats" else dtype)
        if name != "stats":
            assert_no_worse_than(values, eager[name], truth[name], name)
            continue
        # Sums of T numbers, each with roundings of its own.
        eps, total = torch.finfo(dtype).eps, given["logps"].shape[0]
        for field, a, e, t in zip(prefcore.PolicyStats._fields, values, eager[name], truth[name], strict=True):
            assert abs(a - t) <= 2 * abs(e - t) + 4 * eps * (abs(t) + total), field


@pytest.mark.quick
@EVERY
@pytest.mark.parametrize(("form", "kl"), COMBINATIONS)
def test_losses_gradients_and_statistics_equal_the_oracles(form, kl, impl, device):
    check(
        make(form, kl, 2100, dtype=torch.float32, device=device),
        impl,
        torch.float32,
    )


@EVERY
@pytest.mark.parametrize("form", FORMS)
def test_float64_stays_float64(form, impl, device):
    kl = "none" if form in ("log_clip", "value") else "k3_corrected"
    check(make(form, kl, 700, device=device), impl, torch.float64)


@pytest.mark.parametrize("isa", _native.require().cpu_isa_names())
@pytest.mark.parametrize("T", [0, 1, 7, 16, 8191, 8193, 20000])
def test_every_instruction_set_at_every_kind_of_length(T, isa, monkeypatch):
    monkeypatch.setattr(ops, "_level", lambda: _native.require().cpu_isa_names().index(isa))
    check(make("clip", "k3", T, dtype=torch.float32), "cpu", torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_without_old_log_probs_the_ratio_is_one_and_keeps_its_gradient(form):
    given = make(form, "none" if form in ("log_clip", "value") else "k3_corrected", 50, extras=False)
    del given["old_logps"]
    check(given, "cpu", torch.float64)


@pytest.mark.parametrize("form", ["clip", "cispo", "sapo", "log_clip"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_log_ratio_of_its_own_has_the_gradient_of_the_log_probs(form, impl):
    given = make(form, "none", 50)
    same = {**given, "log_ratio": given["logps"] - given["old_logps"]}
    del same["old_logps"]
    upstream = torch.ones(50)
    plain = evaluate(prefcore.policy_terms, given, upstream, impl=impl)
    for name, values in evaluate(prefcore.policy_terms, same, upstream, impl=impl).items():
        torch.testing.assert_close(values, plain[name], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("apart", [-1e4, -1e3, -100.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize(("form", "kl"), COMBINATIONS)
def test_huge_log_ratios_are_finite_in_value_and_gradient(form, kl, apart):
    given = make(form, kl, 40, dtype=torch.float32)
    for name in ("old_logps", "ref_logps"):
        if name in given:
            given[name] = given["logps"] + apart
    results = evaluate(prefcore.policy_terms, given, torch.ones(40))
    assert all(torch.isfinite(values).all() for values in results.values())
    check(given, "cpu", torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_number_stays_in_its_token(bad):
    for form, kl in COMBINATIONS:
        given = make(form, kl, 40, dtype=torch.float32)
        whole = evaluate(prefcore.policy_terms, given, torch.ones(40))
        given["logps"] = given["logps"].clone()
        given["logps"][17] = bad
        out = evaluate(prefcore.policy_terms, given, torch.ones(40))
        others = torch.arange(40) != 17
        for name in ("losses", "logps"):
            assert torch.equal(out[name][others], whole[name][others])
        if bad != bad and (form, kl) not in (("none", "none"), ("none", "exact")):
            assert out["losses"][17].isnan()


def test_bits_do_not_depend_on_the_number_of_threads():
    given = make("clip", "k3", 50000, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(evaluate(prefcore.policy_terms, given, torch.ones(50000)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_strided_inputs():
    given = make("clip", "k3", 300)
    wide = {k: torch.stack([v, v], 1)[:, 0] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    plain = evaluate(prefcore.policy_terms, given, torch.ones(300))
    for name, values in evaluate(prefcore.policy_terms, wide, torch.ones(300)).items():
        assert torch.equal(values, plain[name])


def test_small_log_ratios_keep_their_relative_accuracy():
    logps = torch.zeros(3)
    ref = torch.tensor([1e-4, -1e-3, 3e-3])
    terms = prefcore.policy_terms(logps, ref, form="none", kl="k3", ref_logps=ref, kl_coef=1.0)
    expected = torch.expm1(ref.double()) - ref.double()
    # One rounding of u and one of expm1(u), where the difference is u^2 / 2.
    assert ((terms.losses - expected).abs() <= 2 * torch.finfo(torch.float32).eps * ref.abs()).all()
    assert terms.stats.approx_kl.item() == pytest.approx(
        (torch.expm1(-ref.double()) + ref.double()).sum().item(), rel=1e-3
    )


def test_statistics_are_what_they_are_called():
    old = torch.zeros(4)
    logps = torch.tensor([0.5, -0.5, 1.0, 0.0])
    advantages = torch.tensor([1.0, -1.0, -1.0, 2.0])
    terms = prefcore.policy_terms(logps, old, advantages, form="clip", low=0.8, high=1.2, dual=2.0)
    assert (terms.stats.clipped_high, terms.stats.clipped_low, terms.stats.clipped_dual) == (1, 1, 1)
    assert terms.stats.tokens == 4
    assert terms.stats.surrogate.item() == pytest.approx(terms.losses.sum().item())
    assert terms.stats.means()["ratio"].item() == pytest.approx(logps.exp().mean().item())
    empty = prefcore.policy_terms(logps[:0], form="none")
    assert not any(empty.stats.means().values())


@pytest.mark.parametrize(("form", "kl"), [x for x in COMBINATIONS if x[0] != "cispo" and "straight" not in x[1]])
def test_gradcheck(form, kl):
    # The others hold constants, so that their gradients are no derivatives of their values.
    given = make(form, kl, 5)
    names = [name for name in DIFFERENTIABLE if name in given]
    leaves = [given.pop(name).requires_grad_() for name in names]

    def losses(*values):
        return prefcore.policy_terms(**dict(zip(names, values, strict=True)), **given).losses

    assert torch.autograd.gradcheck(losses, leaves)


@EVERY
def test_opcheck(impl, device):
    given = make("clip", "k3", 40, device=device)
    tensors = [given.get(name) for name in ("logps", *ops._TENSORS)]
    torch.library.opcheck(ops._OPERATORS[impl], (*tensors, "clip", "k3", 0.8, 1.2, 3.0, 0.1, 0.1, 20.0, True))


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()

    def step(logps, old, advantages, entropy):
        terms = prefcore.policy_terms(
            logps, old, advantages, form="clip", low=0.8, high=1.2, entropy=entropy, entropy_coef=0.1
        )
        return terms.losses.sum(), terms.stats.approx_kl

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 9, 33):
        inputs = [torch.randn(T) for _ in range(4)]
        leaf, other = (inputs[0].clone().requires_grad_() for _ in range(2))
        loss, approx_kl = compiled(leaf, *inputs[1:])
        expected, expected_kl = step(other, *inputs[1:])
        loss.backward()
        expected.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(approx_kl, expected_kl)
        assert torch.equal(leaf.grad, other.grad)


def test_what_is_there_for_the_statistics_alone_gets_no_gradient():
    given = make("clip", "exact", 20)
    given |= {"entropy_coef": 0.0, "kl_coef": 0.0}
    leaves = [given[name].requires_grad_() for name in DIFFERENTIABLE]
    terms = prefcore.policy_terms(**given)
    grads = torch.autograd.grad(terms.losses.sum(), leaves, allow_unused=True)
    assert [g is None for g in grads] == [False, True, True]
    torch.testing.assert_close(terms.stats.entropy, given["entropy"].detach().sum())


def test_no_second_derivative_is_left_out_in_silence():
    logps = torch.zeros(3, requires_grad=True)
    terms = prefcore.policy_terms(logps, torch.zeros(3), torch.ones(3), form="clip", low=0.8, high=1.2)
    (grad,) = torch.autograd.grad(terms.losses.sum(), logps, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        grad.sum().backward()


ZEROS = torch.zeros(4)


def test_a_log_ratio_given_gets_no_gradient():
    for impl in ("reference", "cpu"):
        logps, log_ratio = (torch.zeros(4, requires_grad=True) for _ in range(2))
        out = prefcore.policy_terms(logps, None, torch.ones(4), form="clip", log_ratio=log_ratio, impl=impl)
        out.losses.sum().backward()
        assert log_ratio.grad is None
        assert logps.grad is not None


def test_values_within_their_bounds_are_not_counted_as_clipped():
    values, old, returns = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(0))
    for impl in ("reference", "cpu"):
        stats = prefcore.policy_terms(values, old, returns, form="value", high=20.0, impl=impl).stats
        assert stats.clipped_low == 0
        assert stats.clipped_high == 0


REFUSALS = [
    (ValueError, "entropy_coef needs entropy", {"entropy_coef": 0.1}),
    (TypeError, "form must be a str", {"form": 3}),
    (ValueError, "form must be one of", {"form": "clipped"}),
    (ValueError, "kl must be one of", {"kl": "k4"}),
    (TypeError, "logps must be a Tensor", {"logps": [0.0]}),
    (ValueError, r"logps must have shape \[T\], got \[2, 2\]", {"logps": torch.zeros(2, 2)}),
    (ValueError, "logps must be float32 or float64, got torch.float16", {"logps": ZEROS.half()}),
    (ValueError, r"old_logps must have logps' shape \[4\], got \[3\]", {"old_logps": torch.zeros(3)}),
    (ValueError, "advantages must have logps' dtype", {"advantages": ZEROS.double()}),
    (ValueError, "weights must be on logps' device", {"weights": torch.zeros(4, device="meta")}),
    (ValueError, "form 'clip' needs advantages", {"advantages": None}),
    (ValueError, "kl 'k3' needs ref_logps", {"kl": "k3"}),
    (ValueError, "kl 'none' does not use ref_logps", {"ref_logps": ZEROS}),
    (ValueError, "kl 'exact' needs kl_values", {"kl": "exact"}),
    (ValueError, "form 'none' does not use advantages", {"form": "none"}),
    (ValueError, "form 'log_clip' does not use weights", {"form": "log_clip", "weights": ZEROS}),
    (ValueError, "form 'value' does not use kl", {"form": "value", "kl": "k1", "ref_logps": ZEROS}),
    (ValueError, "give one of log_ratio and old_logps", {"log_ratio": ZEROS}),
    (ValueError, "low must not exceed high", {"low": 1.3}),
    (ValueError, "dual must be at least high", {"dual": 1.1}),
    (ValueError, "form 'sapo' needs positive temperatures", {"form": "sapo", "low": 0.0}),
    (ValueError, "form 'value' needs a positive high", {"form": "value", "high": 0}),
    (ValueError, r"clamp must be in \(0, 80\], got 100", {"clamp": 100}),
    (TypeError, "kl_coef must be a number or a torch.Tensor", {"kl_coef": "0.1"}),
    (ValueError, "high must not be NaN", {"high": float("nan")}),
    (ValueError, "impl of policy_terms must be one of", {"impl": "cuda"}),
]


@pytest.mark.parametrize(("error", "text", "change"), REFUSALS, ids=[row[1] for row in REFUSALS])
def test_refusals(error, text, change):
    given = {"logps": ZEROS, "old_logps": ZEROS, "advantages": ZEROS, "form": "clip", "low": 0.8, "high": 1.2}
    with pytest.raises(error, match=text):
        prefcore.policy_terms(**{**given, **change})
