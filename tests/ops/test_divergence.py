"""divergence against its float64 oracle, known values and known inequalities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prefcore
from prefcore import _impl, reference
from prefcore.testing import assert_no_worse_than

KINDS = ["kl_pq", "kl_qp", "js", "alpha", "tv"]
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
OUTPUTS = ("entropy", "other_entropy")
IGNORE = -100
interpreted = pytest.mark.skipif(
    not _impl.interpreting(), reason="Triton's interpreter is off: TRITON_INTERPRET=1 turns it on"
)
CPU = pytest.param("cpu", "cpu", id="cpu")
TRITON = pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted)
CUDA = pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu)
EVERY = pytest.mark.parametrize(("impl", "device"), [CPU, TRITON, CUDA])
# The interpreter is slow, and tests/ops/test_pair_rows.py holds its kernels to the same cases.
NATIVE = pytest.mark.parametrize(("impl", "device"), [CPU, CUDA])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, ignored: str = "some"):
    g = torch.Generator().manual_seed(sum(shape))
    logits, other = ((2 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype) for _ in range(2))
    targets = torch.randint(0, shape[-1], shape[:-1], generator=g)
    if ignored != "none":
        targets.view(-1)[:: 1 if ignored == "all" else 2] = IGNORE
    return logits, other, targets


def run(op: Any, logits, other, targets, upstream, trained=(True, True), **options: Any) -> dict[str, torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_(need) for x, need in zip((logits, other), trained, strict=True)]
    stats = op(*leaves, targets, **options)
    named = {k: v for k, v in stats._asdict().items() if v is not None}
    loss = sum((named[k].double() * g.to(leaves[0].device)).sum() for k, g in upstream.items() if k in named)
    wanted = {name: x for name, x in zip(("d_logits", "d_other"), leaves, strict=True) if x.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    named |= {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(wanted.items(), grads, strict=True)}
    return {k: v.detach().cpu() for k, v in named.items()}


def check(kind, logits, other, targets, impl, device, trained=(True, True), gradient=None, **options):
    outputs = options.setdefault("outputs", OUTPUTS)
    g = torch.Generator().manual_seed(1)
    upstream = {
        k: torch.randn(logits.shape[:-1], generator=g, dtype=torch.float64)
        for k in ("divergence", "logps", "other_logps", *outputs)
        if gradient is None or k in gradient
    }
    # The oracle has no default of being the same on both sides.
    told = {f"other_{k}": options[k] for k in ("temperature", "softcap", "logit_scale") if k in options} | options
    exact, there = (
        {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        for given, change in ((told, torch.Tensor.double), (options, lambda v: v.to(device)))
    )
    moved = [x if x is None else x.to(device) for x in (logits, other, targets)]
    truth = run(reference.divergence, logits.double(), other.double(), targets, upstream, trained, kind=kind, **exact)
    eager = run(reference.divergence, logits, other, targets, upstream, trained, kind=kind, **told)
    actual = run(prefcore.divergence, *moved, upstream, trained, kind=kind, impl=impl, **there)
    assert set(actual) == set(truth)
    assert (actual["divergence"] >= 0).all()
    eps = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).eps
    # In float32 a logit of size z is known, and z - max is taken, to within eps·z; alpha and js divide by w·(1 - w).
    largest = max((x.nan_to_num().double().abs().max().item() for x in (logits, other) if x.numel()), default=0.0)
    mixture = options.get("alpha", options.get("beta", 0.5))
    for name, value in actual.items():
        factor = truth[name].abs().max().item() if name.startswith("d_") and value.numel() else 1.0
        band = eps * (1 + largest) * max(factor, 0.0) / (mixture * (1 - mixture))
        assert_no_worse_than(value, eager[name], truth[name], name, band=band)
    return actual


@EVERY
@pytest.mark.quick
@ALL_KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 2.5, "logit_scale": 0.6, "temperature": 0.7},
        {"softcap": 4.0, "other_softcap": None, "other_logit_scale": 1.5, "other_temperature": 2.0},
    ],
    ids=["plain", "both", "different"],
)
def test_values_and_gradients(options, dtype, kind, impl, device):
    rows = 4 if (impl, device) == ("triton", "cpu") else 6  # the interpreter takes tens of milliseconds for each
    check(kind, *make((rows, 1100), dtype), impl, device, **options)


@NATIVE
@ALL_KINDS
@pytest.mark.parametrize("trained", [(True, False), (False, True)], ids=["first", "other"])
def test_one_side_alone(trained, kind, impl, device):
    check(kind, *make((5, 300)), impl, device, trained=trained)


@NATIVE
@ALL_KINDS
@pytest.mark.parametrize("gradient", [("divergence",), ("logps", "other_entropy"), ("other_logps",)], ids=str)
def test_upstream_gradients_of_some(gradient, kind, impl, device):
    check(kind, *make((5, 300)), impl, device, gradient=gradient)


@NATIVE
@ALL_KINDS
@pytest.mark.parametrize("shape", [(0, 17), (1, 1), (1, 17), (3, 32001), (2, 151936), (100_000, 3)])
def test_shapes(shape, kind, impl, device):
    check(kind, *make(shape), impl, device)


@NATIVE
@pytest.mark.parametrize("shape", [(9,), (2, 3, 9), (2, 0, 9)])
def test_leading_dimensions_are_kept(shape, impl, device):
    actual = check("js", *make(shape, ignored="none"), impl, device)
    assert all(actual[name].shape == shape[:-1] for name in ("divergence", "logps", "other_entropy"))


@NATIVE
@ALL_KINDS
@pytest.mark.parametrize("ignored", ["some", "all"])
def test_ignored_rows_are_inert_whatever_they_hold(ignored, kind, impl, device):
    logits, other, targets = make((8, 300), ignored=ignored)
    logits[targets == IGNORE] = torch.nan
    other[targets == IGNORE] = torch.inf
    actual = check(kind, logits, other, targets, impl, device)
    for value in actual.values():
        assert (value[targets == IGNORE] == 0).all()


@NATIVE
@ALL_KINDS
def test_without_targets_every_row_counts(kind, impl, device):
    logits, other, _ = make((4, 300))
    actual = check(kind, logits, other, None, impl, device)
    assert "logps" not in actual
    assert (actual["divergence"] > 0).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("op", ["divergence", "linear_divergence"])
def test_without_targets_no_ignore_index_skips_a_row(op, impl):
    logits, other, _ = make((4, 300))
    head = (torch.eye(300),) if op == "linear_divergence" else ()
    stats = getattr(prefcore, op)(
        logits, *head, other, *head, kind="js", ignore_index=0, outputs=("entropy", "other_entropy"), impl=impl
    )
    assert all((x > 0).all() for x in (stats.divergence, stats.entropy, stats.other_entropy))


@EVERY
@pytest.mark.parametrize("rest", [True, False], ids=["beside-others", "alone"])
def test_an_infinite_divergence_masked_out_of_a_loss_sends_no_gradient(rest, impl, device):
    logits, other, targets = (x.to(device) for x in make((12, 300), ignored="none"))
    logits.requires_grad_()
    other[3, 7] = -torch.inf
    targets[3] = 5
    stats = prefcore.divergence(logits, other, targets, kind="kl_pq", impl=impl)
    assert stats.divergence.isinf().nonzero().tolist() == [[3]]
    loss = stats.divergence.where(stats.divergence.isfinite(), 0).sum()
    (found,) = torch.autograd.grad(loss + stats.logps.sum() if rest else loss, logits)
    keep = torch.arange(12, device=device) != 3
    again = prefcore.divergence(logits, other, targets, kind="kl_pq", impl=impl)
    loss = again.divergence[keep].sum()
    expected = torch.autograd.grad(logits.log_softmax(-1)[3, 5], logits)[0] if rest else torch.zeros_like(logits)
    (kept,) = torch.autograd.grad(loss + again.logps[keep].sum() if rest else loss, logits)
    torch.testing.assert_close(found[3], expected[3], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[keep], kept[keep])


@EVERY
@ALL_KINDS
@pytest.mark.parametrize("scale", [1e4, 1e-4], ids=["large", "small"])
def test_logits_of_any_magnitude(scale, kind, impl, device):
    logits, other, targets = make((4, 1100), ignored="none")
    check(kind, logits * scale, other * scale, targets, impl, device)


@NATIVE
@ALL_KINDS
def test_close_distributions_keep_their_distance(kind, impl, device):
    """What is of second order in the difference of the logits is not lost among first-order roundings."""
    logits, other, _ = make((6, 1100), torch.float32)
    other = logits + 1e-2 * other
    truth = reference.divergence(logits.double(), other.double(), kind=kind).divergence
    actual = prefcore.divergence(logits.to(device), other.to(device), kind=kind, impl=impl).divergence.cpu()
    # A total of 1100 terms is rounded to a few eps, of which the first order of tv takes 1/0.01 less.
    assert (actual - truth).abs().max() < 32 * torch.finfo(torch.float32).eps
    if kind == "js":  # whose terms are each of second order
        assert ((actual - truth) / truth).abs().max() < 1e-4


@NATIVE
@ALL_KINDS
def test_equal_distributions_do_not_differ(kind, impl, device):
    logits, _, targets = make((6, 1100), torch.float16)
    actual = check(kind, logits, logits, targets, impl, device)
    assert actual["divergence"].max() < 1e-6


@EVERY
def test_known_values(impl, device):
    """Two coins, 1/2 and 1/4."""
    logits = torch.tensor([[0.5, 0.5]]).log().to(device)
    other = torch.tensor([[0.25, 0.75]]).log().to(device)
    found = {
        kind: prefcore.divergence(logits, other, kind=kind, impl=impl, outputs=OUTPUTS) for kind in KINDS
    }  # fmt: skip
    overlap = math.sqrt(1 / 8) + math.sqrt(3 / 8)
    expected = {
        "kl_pq": math.log(2) - math.log(3) / 2,
        "kl_qp": 0.75 * math.log(3) - math.log(2),
        "js": (math.log(4 / 3) + math.log(4 / 5)) / 4 + (math.log(2 / 3) / 4 + 0.75 * math.log(6 / 5)) / 2,
        "alpha": 4 - 4 * overlap,
        "tv": 0.25,
    }
    for kind, value in expected.items():
        assert found[kind].divergence.item() == pytest.approx(value, rel=1e-5), kind
        assert found[kind].entropy.item() == pytest.approx(math.log(2), rel=1e-6)
        assert found[kind].other_entropy.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 30.0), beta=st.floats(0.05, 0.95))
def test_inequalities_between_the_kinds(seed, scale, beta):
    g = torch.Generator().manual_seed(seed)
    p, q = (scale * torch.randn(3, 50, generator=g, dtype=torch.float64) for _ in range(2))

    def value(kind: str, a: torch.Tensor = p, b: torch.Tensor = q, **options: float) -> torch.Tensor:
        return prefcore.divergence(a, b, kind=kind, **options).divergence

    torch.testing.assert_close(value("kl_pq"), value("kl_qp", q, p))
    torch.testing.assert_close(value("js", beta=beta), value("js", q, p, beta=1 - beta))
    torch.testing.assert_close(value("alpha", alpha=beta), value("alpha", q, p, alpha=1 - beta))
    tv, slack = value("tv"), 1e-9
    assert (tv <= 1 + slack).all()
    assert (2 * tv.square() <= value("kl_pq") * (1 + slack) + slack).all(), "Pinsker"
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (value("js", beta=beta) <= entropy * tv.clamp_max(1) + slack).all()
    hellinger = value("alpha") / 8  # 1 - the overlap is twice the square of its own half
    assert (2 * hellinger <= tv + slack).all()
    assert (tv <= (2 * hellinger * (2 - 2 * hellinger)).clamp_min(0).sqrt() + 1e-6).all()
    near_one, near_zero = value("alpha", alpha=1 - 1e-6), value("alpha", alpha=1e-6)
    torch.testing.assert_close(near_one, value("kl_pq"), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(near_zero, value("kl_qp"), rtol=1e-2, atol=1e-4)


@NATIVE
@ALL_KINDS
def test_float64_gradcheck(kind, impl, device):
    logits, other, targets = (x.to(device) for x in make((3, 7), torch.float64))

    def op(*logits):
        return tuple(
            prefcore.divergence(
                *logits, targets, kind=kind, outputs=OUTPUTS, softcap=3.0, other_temperature=0.8, impl=impl
            )
        )

    assert torch.autograd.gradcheck(op, (logits.requires_grad_(), other.requires_grad_()))


@EVERY
def test_views_are_neither_copied_nor_changed(impl, device):
    logits, other, targets = (x.to(device) for x in make((3, 6, 200), ignored="none"))
    before = logits.clone(), other.clone()
    leaves = logits.requires_grad_(), other.requires_grad_()
    wanted = targets[:, 1:]
    # Each side is laid out its own way: rows of the other are longer, and start elsewhere.
    wide = torch.nn.functional.pad(leaves[1], (3, 2))[..., 3:-2]
    for op in (prefcore.divergence, reference.divergence):
        options = {"impl": impl} if op is prefcore.divergence else {}
        stats = op(leaves[0][:, :-1], wide[:, :-1], wanted, kind="js", **options)
        grads = torch.autograd.grad(stats.divergence.sum() + stats.other_logps.sum(), leaves, retain_graph=True)
        if op is prefcore.divergence:
            own = stats, grads
    for actual, expected in zip((own[0].divergence, *own[1]), (stats.divergence, *grads), strict=True):
        torch.testing.assert_close(actual, expected)
    assert all(torch.equal(x, y) for x, y in zip((logits, other), before, strict=True))


@EVERY
def test_a_temperature_per_row(impl, device):
    logits, other, targets = make((2, 5, 300))
    check("kl_pq", logits, other, targets, impl, device, temperature=torch.rand(2, 5) + 0.5)
    check("js", logits, other, targets, impl, device, other_temperature=torch.rand(2, 5) + 0.5)


@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=interpreted)])
def test_one_compiled_graph_serves_every_length(impl):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits, other, targets):
        stats = prefcore.divergence(logits * 1.5, other, targets, kind="kl_qp", outputs=("entropy",), impl=impl)
        return stats.divergence.sum() + stats.logps.sum() + 0.1 * stats.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (3, 8, 30):
        logits, other, targets = make((rows, 300))
        results = []
        for function in (step, compiled):
            leaf = logits.clone().requires_grad_()
            loss = function(leaf, other, targets)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0])
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[0], f"compiled again for another length: {graphs}"


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 9),
    vocab=st.integers(1, 2500),
    dtype=st.sampled_from(DTYPES),
    outputs=st.sets(st.sampled_from(OUTPUTS)),
    ignored=st.sampled_from(["none", "some", "all"]),
    softcap=st.sampled_from([None, 3.0]),
    temperature=st.sampled_from([1.0, 0.3]),
)
def test_combinations(kind, rows, vocab, dtype, outputs, ignored, softcap, temperature):
    inputs = make((rows, vocab), dtype, ignored)
    check(kind, *inputs, "cpu", "cpu", outputs=tuple(outputs), softcap=softcap, other_temperature=temperature)


def test_the_reference_serves_by_name():
    inputs = make((5, 60))
    actual = prefcore.divergence(*inputs, kind="js", beta=0.2, softcap=3.0, impl="reference")
    expected = reference.divergence(*inputs, kind="js", beta=0.2, softcap=3.0, other_softcap=3.0)
    assert torch.equal(actual.divergence, expected.divergence)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits": 1}, TypeError, "logits must be a Tensor"),
        ({"other_logits": 1}, TypeError, "other_logits must be a Tensor"),
        ({"other_logits": torch.randn(3, 9)}, ValueError, "of one shape"),
        ({"other_logits": torch.randn(4, 9).double()}, ValueError, "other_logits must have the dtype"),
        ({"logits": torch.randn(4, 0), "other_logits": torch.randn(4, 0)}, ValueError, "V >= 1"),
        ({"targets": torch.zeros(4)}, ValueError, "int64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected targets"),
        ({"targets": torch.tensor([0, 9, 0, 0])}, ValueError, "got 9 at row 1"),
        ({"kind": "reverse_kl"}, ValueError, "kind must be one of"),
        ({"beta": 0.3}, ValueError, "beta belongs to"),
        ({"temperature": torch.ones(4, requires_grad=True)}, NotImplementedError, "temperature is not differentiable"),
        ({"impl": "cuda"}, ValueError, "impl of divergence"),
    ],
)
def test_refusals(change, error, match):
    arguments = {"logits": torch.randn(4, 9), "other_logits": torch.randn(4, 9), "kind": "kl_pq"} | change
    with pytest.raises(error, match=match):
        prefcore.divergence(**arguments)
