"""logprobs against its float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prefcore
from prefcore import _impl, reference
from prefcore.ops.logprobs import OPERATORS
from prefcore.testing import assert_no_worse_than

ALL = ("entropy", "logsumexp", "is_top1", "mean_logits", "log_sum_sq_probs")
IGNORE = -100
interpreted = pytest.mark.skipif(
    not _impl.interpreting(), reason="Triton's interpreter is off: TRITON_INTERPRET=1 turns it on"
)
CPU = pytest.param("cpu", "cpu", id="cpu")
TRITON = pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted)
CUDA = pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu)
EVERY = pytest.mark.parametrize(("impl", "device"), [CPU, TRITON, CUDA])
NATIVE = pytest.mark.parametrize(("impl", "device"), [CPU, CUDA])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, ignored: str = "some"
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(sum(shape))
    logits = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, shape[-1], shape[:-1], generator=g)
    flat = targets.view(-1)
    if flat.numel() > 1:
        flat[0], flat[-1] = 0, shape[-1] - 1
    if ignored != "none":
        flat[:: 1 if ignored == "all" else 2] = IGNORE
    return logits, targets


def run(op: Any, logits: torch.Tensor, targets: torch.Tensor, upstream: dict[str, torch.Tensor], **options: Any):
    leaf = logits.detach().clone().requires_grad_()
    stats = op(leaf, targets, **options)
    named = {k: v for k, v in stats._asdict().items() if v is not None}
    loss = sum((named[k].double() * g.to(leaf.device)).sum() for k, g in upstream.items())
    (named["d_logits"],) = torch.autograd.grad(loss, leaf)
    return {k: v.detach().cpu() for k, v in named.items()}


def check(logits, targets, impl, device, gradient="random", **options) -> dict[str, torch.Tensor]:
    wanted = options.get("outputs", ())
    g = torch.Generator().manual_seed(1)
    upstream = {
        k: torch.randn(targets.shape, generator=g, dtype=torch.float64)
        for k in ("logps", "entropy", "logsumexp")
        if k == "logps" or k in wanted
    }
    if gradient == "zero":
        upstream = {k: torch.zeros_like(v) for k, v in upstream.items()}
    elif gradient == "entropy":
        upstream = {"entropy": upstream["entropy"]}
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    truth = run(reference.logprobs, logits.double(), targets, upstream, **exact)
    eager = run(reference.logprobs, logits, targets, upstream, **options)
    actual = run(prefcore.logprobs, logits.to(device), targets.to(device), upstream, impl=impl, **there)
    assert set(actual) == set(truth)
    assert actual["d_logits"].dtype == logits.dtype
    kept = targets != IGNORE
    largest = logits[kept].double().abs().max().item() if kept.any() else 0.0
    for name, value in actual.items():
        if value.dtype == torch.bool:
            assert torch.equal(value, truth[name]), name
            continue
        # In float32 a logit of size z is known, and z - max is taken, to within eps·z.
        eps = torch.finfo(torch.float64 if logits.dtype == torch.float64 else torch.float32).eps
        factor = truth[name].abs().max().item() if name == "d_logits" and value.numel() else 1.0
        assert_no_worse_than(value, eager[name], truth[name], name, band=eps * (1 + largest) * factor)
    assert (actual["logps"] <= 0).all()
    assert (actual["logps"][~kept] == 0).all()
    assert (actual["d_logits"][~kept] == 0).all()
    return actual


@EVERY
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.5, "logit_scale": 0.6, "temperature": 0.7}], ids=["plain", "all"]
)
def test_values_and_gradient(dtype, options, impl, device):
    check(*make((6, 1100), dtype), impl, device, **options)
    check(*make((6, 1100), dtype), impl, device, outputs=ALL, **options)


@NATIVE
@pytest.mark.parametrize("shape", [(0, 17), (1, 1), (1, 17), (3, 32001), (2, 50257), (2, 151936), (600_000, 3)])
def test_shapes(shape, impl, device):
    check(*make(shape), impl, device, outputs=ALL)


@EVERY
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (2, 0, 9), (2, 2, 3, 9)])
def test_leading_dimensions_are_kept(shape, impl, device):
    actual = check(*make(shape, ignored="none"), impl, device, outputs=ALL)
    assert actual["logps"].shape == shape[:-1]


@EVERY
@pytest.mark.parametrize("gradient", ["zero", "entropy"])
def test_upstream_gradients(gradient, impl, device):
    actual = check(*make((7, 300)), impl, device, gradient=gradient, outputs=ALL)
    if gradient == "zero":
        assert (actual["d_logits"] == 0).all()


@EVERY
@pytest.mark.parametrize("ignored", ["some", "all"])
def test_ignored_rows_are_inert_whatever_they_hold(ignored, impl, device):
    logits, targets = make((8, 300), ignored=ignored)
    logits[targets == IGNORE] = torch.nan
    check(logits, targets, impl, device, outputs=ALL)


@EVERY
@pytest.mark.parametrize("kind", ["large", "very negative", "ties", "one-hot"])
def test_hostile_logits(kind, impl, device):
    logits, targets = make((4, 1100), ignored="none")
    if kind == "large":
        logits *= 1e4 / logits.abs().max()
    elif kind == "very negative":
        logits -= 1e4
    elif kind == "ties":
        logits[:] = 2.5
    else:
        logits.scatter_(1, targets[:, None], 1e4)
    actual = check(logits, targets, impl, device, outputs=ALL)
    if kind == "ties":
        assert torch.equal(actual["is_top1"], targets == 0)
    if kind == "one-hot":
        assert (actual["logps"] == 0).all()
        assert (actual["entropy"] == 0).all()


@EVERY
def test_a_temperature_per_row(impl, device):
    logits, targets = make((2, 5, 300))
    check(logits, targets, impl, device, outputs=ALL, temperature=torch.rand(2, 5) + 0.5)


@EVERY
def test_views_are_neither_copied_nor_changed(impl, device):
    logits, targets = make((3, 6, 200), ignored="none")
    logits = logits.to(device)
    before = logits.clone()
    leaf = logits.requires_grad_()
    shifted = targets[:, 1:].to(device)
    prefcore.logprobs(leaf[:, :-1], shifted, impl=impl).logps.sum().backward()
    expected = torch.autograd.grad(reference.logprobs(leaf[:, :-1], shifted).logps.sum(), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected)
    assert torch.equal(logits, before)
    transposed = logits.detach().transpose(0, 1)
    torch.testing.assert_close(
        prefcore.logprobs(transposed, targets.t().to(device), impl=impl).logps,
        prefcore.logprobs(logits.detach(), targets.to(device), impl=impl).logps.t(),
    )
    columns = torch.randn(200, 7, device=device).t()
    wanted = targets.view(-1)[:7].to(device)
    torch.testing.assert_close(
        prefcore.logprobs(columns, wanted, impl=impl).logps, reference.logprobs(columns, wanted).logps
    )


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_writes_the_gradient_over_the_logits(dtype, impl, device):
    leaf, targets = make((3, 6, 200), dtype)
    leaf, targets = leaf.to(device).requires_grad_(), targets[:, 1:].to(device)
    (expected,) = torch.autograd.grad(prefcore.logprobs(leaf[:, :-1], targets, impl=impl).logps.sum(), leaf)
    logits = leaf.clone()
    view = logits[:, :-1]
    loss = prefcore.logprobs(view, targets, impl=impl, inplace=True).logps.sum()
    version = view._version
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(view.detach(), expected[:, :-1])
    assert view._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_refusals():
    targets = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="leaf"):
        prefcore.logprobs(torch.randn(4, 9, requires_grad=True), targets, inplace=True)
    with pytest.raises(ValueError, match="unit stride"):
        prefcore.logprobs(torch.randn(9, 4).t(), targets, inplace=True)
    with pytest.raises(ValueError, match="overlap"):
        prefcore.logprobs(torch.randn(1, 9).expand(4, 9), targets, inplace=True)
    with pytest.raises(NotImplementedError, match="reference"):
        prefcore.logprobs(torch.randn(4, 9), targets, inplace=True, impl="reference")


@EVERY
def test_float64_gradcheck(impl, device):
    logits, targets = make((3, 7), torch.float64)

    def op(logits):
        stats = prefcore.logprobs(logits, targets.to(device), outputs=ALL, softcap=2.0, temperature=0.8, impl=impl)
        return stats.logps, stats.entropy, stats.logsumexp

    assert torch.autograd.gradcheck(op, logits.to(device).requires_grad_(), nondet_tol=0.0)


@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("outputs", [(), ALL], ids=["logps", "all"])
def test_operators_are_registered_soundly(outputs, impl):
    logits, targets = make((5, 60))
    scalars = (0.7, 2.0, 1.0, IGNORE, *(name in outputs for name in ALL))
    inputs = (logits, targets, None, *scalars)
    torch.library.opcheck(OPERATORS[impl].forward, inputs)
    stats = OPERATORS[impl].forward(*inputs)
    grads = (torch.randn(5), torch.randn(5) if outputs else None, None)
    arguments = (*grads, logits, targets, None, stats[1], stats[6], *scalars)
    torch.library.opcheck(OPERATORS[impl].backward, arguments)
    torch.library.opcheck(OPERATORS[impl].inplace, arguments)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=interpreted)])
def test_one_compiled_graph_serves_every_length(impl, inplace):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits, targets):
        stats = prefcore.logprobs(logits * 1.5, targets, outputs=("entropy",), inplace=inplace, impl=impl)
        return stats.logps.sum() + 0.1 * stats.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (3, 8, 30):
        logits, targets = make((rows, 300))
        results = []
        for function in (step, compiled):
            leaf = logits.clone().requires_grad_()
            loss = function(leaf, targets)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0])
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[0], f"compiled again for another length: {graphs}"


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 2500),
    dtype=st.sampled_from(DTYPES),
    outputs=st.sets(st.sampled_from(ALL)),
    ignored=st.sampled_from(["none", "some", "all"]),
    softcap=st.sampled_from([None, 3.0]),
    temperature=st.sampled_from([1.0, 0.3]),
)
def test_combinations(rows, vocab, dtype, outputs, ignored, softcap, temperature):
    logits, targets = make((rows, vocab), dtype, ignored)
    check(logits, targets, "cpu", "cpu", outputs=tuple(outputs), softcap=softcap, temperature=temperature)


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 99))
def test_a_shift_of_all_logits_changes_nothing(shift, seed):
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    targets = torch.tensor([0, 5, 299, IGNORE])
    plain = prefcore.logprobs(logits, targets, outputs=("entropy",))
    moved = prefcore.logprobs(logits + shift, targets, outputs=("entropy",))
    torch.testing.assert_close(moved.logps, plain.logps, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(moved.entropy, plain.entropy, atol=1e-12, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99))
def test_a_permuted_vocabulary_permutes_the_gradient(seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 50, generator=g, dtype=torch.float64)
    targets, order = torch.tensor([0, 7, 49]), torch.randperm(50, generator=g)
    new_targets = order.argsort()[targets]
    results = []
    for x, y in ((logits, targets), (logits[:, order], new_targets)):
        leaf = x.clone().requires_grad_()
        logps = prefcore.logprobs(leaf, y).logps
        results.append((logps.detach(), torch.autograd.grad(logps.sum(), leaf)[0]))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(results[1][1], results[0][1][:, order], atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits": 1}, TypeError, "logits must be a Tensor"),
        ({"targets": [1]}, TypeError, "targets must be a Tensor"),
        ({"inplace": 1}, TypeError, "inplace must be a bool"),
        ({"logits": torch.randn(3, 9)}, ValueError, r"logits \[..., V\]"),
        ({"logits": torch.randn(4, 0)}, ValueError, "V >= 1"),
        ({"logits": torch.ones(4, 9, dtype=torch.int64)}, ValueError, "float32"),
        ({"targets": torch.zeros(4)}, ValueError, "int64"),
        ({"targets": torch.tensor([0, 9, 0, 0])}, ValueError, "got 9 at row 1"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"outputs": ("logps",)}, ValueError, "outputs may name"),
        ({"impl": "cuda"}, ValueError, "impl of logprobs"),
    ],
)
def test_refusals(change, error, match):
    with pytest.raises(error, match=match):
        prefcore.logprobs(**({"logits": torch.randn(4, 9), "targets": torch.zeros(4, dtype=torch.int64)} | change))


@pytest.mark.gpu
def test_a_bad_target_on_a_gpu_is_nan_or_refused(monkeypatch):
    logits = torch.randn(3, 9, device="cuda", requires_grad=True)
    targets = torch.tensor([1, 9, 2], device="cuda")
    logps = prefcore.logprobs(logits, targets).logps
    assert logps.isnan().tolist() == [False, True, False]
    monkeypatch.setenv("PREFCORE_CHECK", "1")
    with pytest.raises(ValueError, match="got 9 at row 1"):
        prefcore.logprobs(logits, targets)
