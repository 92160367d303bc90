"""linear_logprobs against its float64 oracle, in every schedule and implementation."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prefcore
from prefcore import _impl, reference
from prefcore.ops import _plan, _walk
from prefcore.ops.linear_logprobs import OPERATORS
from prefcore.testing import assert_no_worse_than

ALL = ("entropy", "logsumexp", "is_top1", "mean_logits", "log_sum_sq_probs")
IGNORE = -100
CPU = pytest.param("cpu", "cpu", id="cpu")
interpreted = pytest.mark.skipif(
    not _impl.interpreting(), reason="Triton's interpreter is off: TRITON_INTERPRET=1 turns it on"
)
TRITON = pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted)
CUDA = pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu)
EVERY = pytest.mark.parametrize(("impl", "device"), [CPU, TRITON, CUDA])
NATIVE = pytest.mark.parametrize(("impl", "device"), [CPU, CUDA])  # too large for the interpreter
# One tile of 128 x 1024 at a time: several chunks of rows and slices of the vocabulary.
TINY = 1
SCHEDULES = [
    pytest.param("auto", None, True, id="auto"),
    pytest.param("retain", None, True, id="retain"),
    pytest.param("retain", None, False, id="retain-frozen"),
    pytest.param("retain", 2_800_000, True, id="mixed"),
    pytest.param("recompute", None, True, id="recompute"),
    pytest.param("recompute", TINY, True, id="recompute-tiles"),
    pytest.param("frozen", None, False, id="frozen"),
    pytest.param("frozen", TINY, False, id="frozen-tiles"),
]


def few(T: int, impl: str, device: str) -> int:
    """Rows for a test: the interpreter takes a millisecond or more for each, and walks over tiles are not its own."""
    return min(T, 9) if (impl, device) == ("triton", "cpu") else T


@dataclasses.dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    train_head: bool = True
    upstream: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def to(self, device: str) -> Case:
        def move(x: Any) -> Any:
            if isinstance(x, dict):
                return {k: move(v) for k, v in x.items()}
            return x.to(device) if isinstance(x, torch.Tensor) else x

        return Case(**{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})


def make(
    T: int,
    V: int,
    D: int = 8,
    dtype: torch.dtype = torch.float32,
    *,
    magnitude: float = 1.0,
    ignored: str = "some",
    extras: str = "",
    outputs: tuple[str, ...] = (),
    train_head: bool = True,
    gradient: str = "random",
) -> Case:
    """A seeded case. ``extras`` names any of bias, temperature, temperatures, softcap, scale."""
    g = torch.Generator().manual_seed(T * 1000003 + V)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    targets = torch.randint(0, V, (T,), generator=g)
    if T > 2:
        targets[0], targets[1] = 0, V - 1
    if ignored == "some":
        targets[2::3] = IGNORE
    elif ignored == "all":
        targets[:] = IGNORE
    case = Case(
        (randn(T, D) * magnitude).to(dtype), randn(V, D).to(dtype), targets, outputs=outputs, train_head=train_head
    )
    wanted = set(extras.split())
    if "bias" in wanted:
        case.bias = randn(V).to(dtype)
    if "temperature" in wanted:
        case.options["temperature"] = 0.7
    if "temperatures" in wanted:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        case.options["temperature"] = (torch.rand(T, generator=g, dtype=torch.float64) + 0.5).to(acc)
    if "softcap" in wanted:
        case.options["softcap"] = 3.0
    if "scale" in wanted:
        case.options["logit_scale"] = 0.6
    for name in ("logps", "entropy", "logsumexp"):
        if name == "logps" or name in outputs:
            case.upstream[name] = randn(T)
    if gradient == "zero":
        case.upstream = {k: torch.zeros_like(v) for k, v in case.upstream.items()}
    elif gradient == "negative":
        case.upstream = {k: -v.abs() for k, v in case.upstream.items()}
    elif gradient == "entropy":
        case.upstream = {"entropy": case.upstream["entropy"]}
    elif gradient == "sparse":
        for v in case.upstream.values():
            v[: T * 3 // 4] = 0
    return case


def run(case: Case, op: Any, dtype: torch.dtype | None = None, **arguments: Any) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name; in ``dtype`` if given."""

    def leaf(x: torch.Tensor, grad: bool) -> torch.Tensor:
        return (x if dtype is None else x.to(dtype)).detach().clone().requires_grad_(grad)

    leaves = {"hidden": leaf(case.hidden, True), "weight": leaf(case.weight, case.train_head)}
    if case.bias is not None:
        leaves["bias"] = leaf(case.bias, case.train_head)
    options = dict(case.options)
    if dtype is not None and isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].to(dtype)
    stats = op(
        leaves["hidden"], leaves["weight"], case.targets, bias=leaves.get("bias"), outputs=case.outputs,
        **options, **arguments,
    )  # fmt: skip
    named = {k: v for k, v in stats._asdict().items() if v is not None}
    loss = sum((named[k].double() * g.to(named[k].device)).sum() for k, g in case.upstream.items())
    wanted = {k: v for k, v in leaves.items() if v.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    named |= {
        f"d_{k}": torch.zeros_like(v) if g is None else g for (k, v), g in zip(wanted.items(), grads, strict=True)
    }
    return {k: v.detach().cpu() for k, v in named.items()}


def check(case: Case, impl: str, device: str, **arguments: Any) -> dict[str, torch.Tensor]:
    """Compare with the oracle: values, gradients, and what must hold of both."""
    truth = run(case, reference.linear_logprobs, torch.float64)
    eager = run(case, reference.linear_logprobs)
    before = case.hidden.clone(), case.weight.clone(), case.targets.clone()
    there = case.to(device)
    actual = run(there, prefcore.linear_logprobs, impl=impl, **arguments)
    for x, kept in zip((case.hidden, case.weight, case.targets), before, strict=True):
        assert torch.equal(x.nan_to_num(), kept.nan_to_num()), "an input was changed"
    assert set(actual) == set(truth)
    dtype = case.hidden.dtype
    for name, value in actual.items():
        if value.dtype == torch.bool:
            low = dtype.itemsize < 4  # rounding makes and breaks ties
            assert torch.equal(value, eager[name]) or (low and (value == truth[name]).float().mean() > 0.5), name
            continue
        assert_no_worse_than(value, eager[name], truth[name], name, band=band(case, name, truth[name]))
    keep = case.targets != IGNORE
    assert (actual["logps"] <= 0).all()
    assert (actual["logps"][~keep] == 0).all()
    assert (actual["d_hidden"][~keep] == 0).all()
    return actual


def band(case: Case, name: str, truth: torch.Tensor) -> float:
    """What one rounding of an intermediate value does to a result.

    A rounded logit is off by eps·|z|: so is a statistic, and so, relatively, a probability and a gradient. The parts of
    a gradient, a row of W or of the hidden states each, may cancel and leave their own roundings.
    """
    kept = case.targets != IGNORE
    if not truth.numel() or not kept.any():
        return 0.0
    hidden, weight = case.hidden[kept].double(), case.weight.double()
    z = hidden @ weight.t() + (0 if case.bias is None else case.bias.double())
    eps = torch.finfo(case.hidden.dtype).eps
    magnitude = max(1.0, z.abs().max().item())
    if not name.startswith("d_"):
        return eps * magnitude
    g = max(g[kept].abs().max().item() for g in case.upstream.values())
    parts = {"d_hidden": weight, "d_weight": hidden, "d_bias": torch.ones(1)}[name].abs().max().item()
    wide = torch.finfo(torch.promote_types(case.hidden.dtype, torch.float32)).eps
    return eps * (1 + magnitude) * truth.abs().max().item() + wide * g * parts


@EVERY
@pytest.mark.quick
@pytest.mark.parametrize("outputs", [(), ALL], ids=["logps", "all"])
@pytest.mark.parametrize(("schedule", "budget", "train_head"), SCHEDULES)
def test_every_schedule_equals_the_oracle(schedule, budget, train_head, outputs, impl, device):
    case = make(
        few(301, impl, device), 2500, outputs=outputs, train_head=train_head, extras="bias temperatures softcap scale"
    )
    check(case, impl, device, schedule=schedule, memory_budget=budget)


@EVERY
@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype, schedule, impl, device):
    case = make(
        few(150, impl, device), 1300, dtype=dtype, outputs=ALL[:2], extras="bias", train_head=schedule != "frozen"
    )
    check(case, impl, device, schedule=schedule)
    check(
        dataclasses.replace(case, outputs=(), upstream={"logps": case.upstream["logps"]}),
        impl,
        device,
        schedule=schedule,
    )


@EVERY
@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_logits_are_not_rounded(dtype, schedule, impl, device):
    case = make(few(150, impl, device), 1300, dtype=dtype, train_head=False)
    exact = reference.linear_logprobs(case.hidden.double(), case.weight.double(), case.targets).logps
    wide = check(case, impl, device, schedule=schedule, logits_dtype=torch.float32)
    assert (wide["logps"] - exact).abs().max() < 1e-4
    rounded = check(case, impl, device, schedule=schedule)
    assert (rounded["logps"] - exact).abs().max() > 1e-4


@NATIVE
@pytest.mark.parametrize(
    ("T", "V"), [(0, 17), (1, 17), (1, 1), (7, 1000), (1500, 17), (9, 32001), (5, 50257), (3, 151936)]
)
@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
def test_shapes(T, V, schedule, impl, device):
    case = make(T, V, outputs=ALL, extras="bias", train_head=schedule != "frozen")
    check(case, impl, device, schedule=schedule)
    check(case, impl, device, schedule=schedule, memory_budget=TINY)


@EVERY
@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
@pytest.mark.parametrize("T", [0, 1, 3])
def test_few_rows(T, schedule, impl, device):
    check(make(T, 17, outputs=ALL, extras="bias", train_head=schedule != "frozen"), impl, device, schedule=schedule)


@EVERY
@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_ignored_rows_are_inert_whatever_they_hold(ignored, schedule, impl, device):
    case = make(
        few(131, impl, device), 300, ignored=ignored, outputs=ALL, extras="bias", train_head=schedule != "frozen"
    )
    case.hidden[case.targets == IGNORE] = torch.nan
    actual = check(case, impl, device, schedule=schedule)
    if ignored == "all":
        assert all((value == 0).all() for value in actual.values())


@EVERY
@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
@pytest.mark.parametrize("gradient", ["zero", "negative", "entropy", "sparse"])
def test_upstream_gradients(gradient, schedule, impl, device):
    case = make(
        few(301, impl, device), 1200, outputs=ALL, extras="bias", train_head=schedule != "frozen", gradient=gradient
    )
    actual = check(case, impl, device, schedule=schedule, drop_zero_rows=True)
    if gradient == "zero":
        assert all((value == 0).all() for name, value in actual.items() if name.startswith("d_"))
    check(case, impl, device, schedule=schedule, memory_budget=TINY)


@EVERY
@pytest.mark.parametrize(("schedule", "budget", "train_head"), SCHEDULES)
def test_rows_without_gradient_are_left_out_alike(schedule, budget, train_head, impl, device):
    case = make(few(301, impl, device), 2500, train_head=train_head, gradient="sparse", extras="bias")
    case.hidden[: len(case.targets) * 3 // 4] *= 1e3  # would show if these rows took part
    check(case, impl, device, schedule=schedule, memory_budget=budget, drop_zero_rows=True)


@EVERY
@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
@pytest.mark.parametrize("kind", ["large", "very negative", "ties", "one-hot"])
def test_hostile_logits(kind, schedule, impl, device):
    case = make(9, 1100, D=4, outputs=ALL, extras="bias", train_head=schedule != "frozen", ignored="none")
    case.bias.zero_()
    if kind == "large":
        case.hidden *= 1e4 / (case.hidden @ case.weight.t()).abs().max()
    elif kind == "very negative":
        case.bias -= 1e4
    elif kind == "ties":
        case.weight[:] = case.weight[:1]
        case.targets[:] = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 1099])
    else:
        case.bias[case.targets[0]] = 1e4
    actual = check(case, impl, device, schedule=schedule)
    if kind == "ties":
        assert actual["is_top1"].tolist() == (case.targets == 0).tolist(), "the first of equal logits is the top one"
    if kind == "one-hot":
        assert actual["logps"][0] == 0
        assert actual["is_top1"][0]


@EVERY
def test_masked_vocabulary_entries_do_not_count(impl, device):
    case = make(9, 1100, outputs=ALL, extras="bias", ignored="none")
    case.outputs = ("entropy", "logsumexp", "is_top1", "log_sum_sq_probs")
    case.bias[100:900] = -torch.inf
    case.targets.clamp_(max=99)
    case.train_head = False
    truth, actual = (
        run(case, reference.linear_logprobs, torch.float64),
        run(case.to(device), prefcore.linear_logprobs, impl=impl),
    )
    for name in actual:
        torch.testing.assert_close(actual[name].double(), truth[name].double(), rtol=2e-5, atol=2e-5, msg=name)


@EVERY
@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
def test_float64_gradcheck(schedule, impl, device):
    case = make(
        min(5, few(22, impl, device) // 3), 11, D=3, dtype=torch.float64, extras="bias temperatures softcap scale"
    ).to(device)
    train = schedule != "frozen"

    def op(hidden, weight, bias):
        stats = prefcore.linear_logprobs(
            hidden, weight, case.targets, bias=bias, schedule=schedule, outputs=ALL, impl=impl, **case.options
        )
        return stats.logps, stats.entropy, stats.logsumexp

    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_(train), case.bias.requires_grad_(train)]
    assert torch.autograd.gradcheck(op, leaves, nondet_tol=0.0)


@EVERY
def test_small_gradients_do_not_underflow_in_half_precision(impl, device):
    case = make(few(64, impl, device), 4000, dtype=torch.float16, ignored="none")
    case.upstream["logps"] *= 1e-4
    truth = run(case, reference.linear_logprobs, torch.float64)["d_weight"]
    actual = run(case.to(device), prefcore.linear_logprobs, impl=impl)["d_weight"]
    hit = torch.zeros(4000, dtype=torch.bool)
    hit[case.targets] = True
    others = ~hit
    error = (actual.double() - truth)[others].norm() / truth[others].norm()
    assert error < 0.1  # the result itself is subnormal in float16: its own rounding is that of 6e-8


@EVERY
@pytest.mark.parametrize("schedule", ["retain", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_grad_out_accumulates(dtype, schedule, impl, device):
    case = make(few(140, impl, device), 1100, dtype=dtype, extras="bias").to(device)
    expected = run(case, prefcore.linear_logprobs, impl=impl, schedule=schedule)["d_weight"].float()
    start = torch.randn(1100, 8, device=device)
    buffer = start.clone()
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    version = buffer._version
    for _ in range(2):
        stats = prefcore.linear_logprobs(
            hidden, weight, case.targets, bias=case.bias, schedule=schedule, weight_grad_out=buffer, impl=impl
        )
        (stats.logps.double() * case.upstream["logps"]).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert buffer._version > version
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close((buffer - start).cpu() / 2, expected, rtol=tolerance, atol=tolerance)


@EVERY
def test_inputs_of_any_layout(impl, device):
    case = make(20, 500, ignored="some").to(device)
    plain = run(case, prefcore.linear_logprobs, impl=impl)
    padded = torch.full((40, 16), torch.nan, device=device)
    padded[::2, 4:12] = case.hidden
    wide = torch.empty(500, 20, device=device)
    wide[:, 6:14] = case.weight
    targets = torch.zeros(61, dtype=torch.int64, device=device)
    targets[1::3] = case.targets
    hidden, weight = padded[::2, 4:12].requires_grad_(), wide[:, 6:14].requires_grad_()
    stats = prefcore.linear_logprobs(hidden, weight, targets[1::3], impl=impl)
    (stats.logps.double() * case.upstream["logps"]).sum().backward()
    torch.testing.assert_close(stats.logps.cpu(), plain["logps"])
    torch.testing.assert_close(hidden.grad.cpu(), plain["d_hidden"])
    torch.testing.assert_close(weight.grad.cpu(), plain["d_weight"])
    batched = prefcore.linear_logprobs(
        hidden.reshape(4, 5, 8),
        weight,
        targets[1::3].reshape(4, 5),
        impl=impl,
    )
    assert batched.logps.shape == (4, 5)
    torch.testing.assert_close(batched.logps.flatten(), stats.logps)


@EVERY
def test_strided_targets_temperatures_and_bias(impl, device):
    case = make(20, 300, ignored="none", extras="bias temperatures", train_head=False).to(device)
    plain = run(case, prefcore.linear_logprobs, impl=impl)

    def strided(x):
        wide = x.new_zeros(2 * x.shape[0])
        wide[::2] = x
        return wide[::2]

    case.targets, case.options["temperature"] = strided(case.targets), strided(case.options["temperature"])
    bias = strided(case.bias)
    stats = prefcore.linear_logprobs(
        case.hidden, case.weight, case.targets, bias=bias, temperature=case.options["temperature"], impl=impl
    )
    assert torch.equal(stats.logps.cpu(), plain["logps"])


@EVERY
@pytest.mark.parametrize(("schedule", "budget", "train_head"), SCHEDULES)
def test_a_second_backward_gives_the_same(schedule, budget, train_head, impl, device):
    case = make(few(301, impl, device), 1500, outputs=("entropy",), train_head=train_head).to(device)
    hidden = case.hidden.requires_grad_()
    weight = case.weight.requires_grad_(train_head)
    for outputs in ((), ("entropy",)):
        stats = prefcore.linear_logprobs(
            hidden, weight, case.targets, outputs=outputs, schedule=schedule, memory_budget=budget, impl=impl
        )
        loss = (stats.logps * case.upstream["logps"].float()).sum()
        leaves = [hidden, weight] if train_head else [hidden]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@NATIVE
@pytest.mark.parametrize(("schedule", "budget", "train_head"), SCHEDULES)
def test_same_inputs_give_the_same_bits(schedule, budget, train_head, impl, device):
    case = make(301, 2500, outputs=ALL, train_head=train_head, extras="bias").to(device)
    first, second = (
        run(case, prefcore.linear_logprobs, impl=impl, schedule=schedule, memory_budget=budget) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@EVERY
def test_without_grad_every_name_runs_forward(impl, device):
    case = make(20, 100).to(device)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    expected = prefcore.linear_logprobs(hidden, weight, case.targets, impl=impl).logps
    for schedule in _plan.SCHEDULES:
        with torch.no_grad():
            logps = prefcore.linear_logprobs(hidden, weight, case.targets, schedule=schedule, impl=impl).logps
        assert not logps.requires_grad
        torch.testing.assert_close(logps, expected)


@EVERY
def test_autocast_casts_as_linear_does(impl, device):
    case = make(20, 500, extras="bias").to(device)
    hidden, weight, bias = (x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias))
    with torch.autocast(device, dtype=torch.bfloat16):
        stats = prefcore.linear_logprobs(hidden, weight, case.targets, bias=bias, impl=impl)
    stats.logps.sum().backward()
    low = Case(
        *(x.detach().bfloat16() for x in (hidden, weight)), case.targets, bias.detach().bfloat16(), train_head=True
    )
    low.upstream["logps"] = torch.ones(20, device=device)
    plain = run(low, prefcore.linear_logprobs, impl=impl)
    assert stats.logps.dtype == torch.float32
    assert torch.equal(stats.logps.cpu(), plain["logps"])
    for leaf, name in ((hidden, "d_hidden"), (bias, "d_bias")):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad.cpu(), plain[name].float())
    # The weight's own is of sums that no cast has rounded.
    assert weight.grad.dtype == torch.float32
    assert impl == "reference" or not torch.equal(weight.grad.cpu(), plain["d_weight"].float())
    terms = 20 * torch.finfo(torch.float32).eps * plain["d_weight"].abs().max().item()  # added in another order
    rounding = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(weight.grad.cpu().bfloat16(), plain["d_weight"], rtol=rounding, atol=terms)


def test_a_frozen_head_allocates_nothing_of_its_size(monkeypatch):
    case = make(64, 9000, train_head=False)
    hidden = case.hidden.requires_grad_()
    sizes = []
    for name in ("empty", "zeros", "empty_like", "zeros_like"):
        original = getattr(torch, name)

        def counting(*args, _original=original, **kwargs):
            made = _original(*args, **kwargs)
            sizes.append(made.numel())
            return made

        monkeypatch.setattr(torch, name, counting)
    prefcore.linear_logprobs(hidden, case.weight, case.targets, impl="cpu").logps.sum().backward()
    assert case.weight.grad is None
    assert sizes
    assert max(sizes) < case.weight.numel() * 8


@EVERY
def test_memory_runs_out_while_retaining(impl, device, monkeypatch, caplog):
    case = make(few(40, impl, device), 300).to(device)
    expected = run(case, prefcore.linear_logprobs, impl=impl, schedule="recompute")
    original = _walk.retained_like

    def scarce(hidden, weight, settings, rows):
        if rows:
            raise torch.OutOfMemoryError("no memory")
        return original(hidden, weight, settings, rows)

    monkeypatch.setattr(_walk, "retained_like", scarce)
    with caplog.at_level(logging.WARNING, "prefcore"):
        actual = run(case, prefcore.linear_logprobs, impl=impl, schedule="retain")
    assert len(caplog.records) == 1
    assert "recomputing" in caplog.text
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("outputs", [(), ALL], ids=["logps", "all"])
@pytest.mark.parametrize("schedule", ["forward", "frozen", "retain", "recompute"])
def test_operators_are_registered_soundly(schedule, outputs, impl):
    case = make(6, 50, extras="bias temperatures softcap", ignored="none")
    number, per_row = 1.0, case.options["temperature"]
    flags = [name in outputs for name in ALL]
    scalars = (number, 3.0, 1.0, IGNORE, *flags, None, schedule, None, True)
    inputs = (case.hidden, case.weight, case.targets, case.bias, per_row, None)
    torch.library.opcheck(OPERATORS[impl].forward, (*inputs, *scalars))
    if schedule == "forward":
        return
    stats = OPERATORS[impl].forward(*inputs, *scalars)
    grads = [torch.randn(6), torch.randn(6) if outputs else None, None]
    train = schedule != "frozen"
    low = tuple(
        None if x is None else x.bfloat16() if x.is_floating_point() and x is not per_row else x for x in inputs
    )
    if train:
        saved = OPERATORS[impl].forward(*low, *scalars)
        needs = (False, True, True, False, False, None)
        torch.library.opcheck(OPERATORS[impl].backward, (*grads, *low, saved[1], *saved[6:], *needs, *scalars))
    for out in (None, torch.zeros(50, 8) if train else None):
        arguments = (*grads, *inputs, stats[1], *stats[6:], True, train, train, False, False, out, *scalars)
        torch.library.opcheck(OPERATORS[impl].backward, arguments)


@NATIVE
@pytest.mark.parametrize(("schedule", "budget", "train_head"), SCHEDULES)
def test_one_compiled_graph_serves_every_length(schedule, budget, train_head, impl, device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden, weight, targets, temperature):
        stats = prefcore.linear_logprobs(
            hidden, weight, targets, temperature=temperature, schedule=schedule, memory_budget=budget,
            outputs=("entropy", "is_top1"), impl=impl,
        )  # fmt: skip
        return stats.logps.sum() + 0.1 * stats.entropy.sum(), stats.is_top1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for T in (7, 40, 301, 302):
        case = make(T, 1100, train_head=train_head, extras="temperatures").to(device)
        results = []
        for function in (step, compiled):
            hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(train_head)
            loss, top1 = function(hidden, weight, case.targets, case.options["temperature"])
            loss.backward()
            results.append((loss.detach(), top1, hidden.grad, weight.grad))
        torch.testing.assert_close(results[1], results[0])
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[0], f"compiled again for another length: {graphs}"


@NATIVE
def test_weight_grad_out_accumulates_when_compiled(impl, device):
    torch.compiler.reset()
    case = make(20, 300).to(device)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def step(buffer):
        return prefcore.linear_logprobs(hidden, weight, case.targets, weight_grad_out=buffer, impl=impl).logps.sum()

    buffers = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")):
        buffers.append(torch.ones(300, 8, device=device))
        function(buffers[-1]).backward()
    assert weight.grad is None
    assert not torch.equal(buffers[0], torch.ones_like(buffers[0]))
    torch.testing.assert_close(buffers[1], buffers[0])


def test_an_unused_entropy_costs_no_second_sweep_when_compiled(monkeypatch):
    walks = []
    original = _walk._BackwardWalk.run
    monkeypatch.setattr(_walk._BackwardWalk, "run", lambda self, *a: (walks.append(1), original(self, *a))[1])
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(hidden, weight, targets):
        stats = prefcore.linear_logprobs(hidden, weight, targets, outputs=("entropy",))
        return stats.logps.sum(), stats.entropy.detach()

    case = make(20, 100, train_head=False)
    step(case.hidden.requires_grad_(), case.weight, case.targets)[0].backward()
    assert not walks, "the backward of frozen recomputed the logits for a gradient that nobody asked for"


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(0, 40),
    V=st.integers(1, 1400),
    D=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    schedule=st.sampled_from(["auto", "retain", "recompute", "frozen"]),
    budget=st.sampled_from([None, TINY, 700_000]),
    extras=st.sets(st.sampled_from(["bias", "temperature", "softcap", "scale"])),
    outputs=st.sets(st.sampled_from(ALL)),
    ignored=st.sampled_from(["none", "some", "all"]),
    drop=st.booleans(),
)
def test_combinations(T, V, D, dtype, schedule, budget, extras, outputs, ignored, drop):
    case = make(
        T, V, D, dtype, extras=" ".join(extras), outputs=tuple(outputs), ignored=ignored,
        train_head=schedule != "frozen",
    )  # fmt: skip
    check(case, "cpu", "cpu", schedule=schedule, memory_budget=budget, drop_zero_rows=drop)


def good() -> dict[str, Any]:
    return {
        "hidden": torch.randn(4, 8),
        "weight": torch.randn(10, 8),
        "targets": torch.tensor([0, 9, IGNORE, 3]),
    }


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"hidden": [[1.0]]}, TypeError, "hidden must be a Tensor, got list"),
        ({"weight": None}, TypeError, "weight must be a Tensor"),
        ({"bias": 1.0}, TypeError, "bias must be a Tensor or None"),
        ({"hidden": torch.randn(5, 8)}, ValueError, r"hidden \[..., D\]"),
        ({"weight": torch.randn(10, 7)}, ValueError, r"weight \[V, D\] with D = 8"),
        ({"weight": torch.randn(0, 8)}, ValueError, "V >= 1"),
        ({"bias": torch.randn(9)}, ValueError, "V = 10"),
        ({"bias": torch.randn(10).double()}, ValueError, "bias must be float64 beside float64"),
        ({"weight": torch.randn(10, 8).double()}, ValueError, "weight must be float64 beside float64"),
        ({"hidden": torch.randn(4, 8).double()}, ValueError, "weight must be float64 beside float64"),
        ({"weight": torch.ones(10, 8, dtype=torch.int64)}, ValueError, "weight must be float32"),
        ({"hidden": torch.ones(4, 8, dtype=torch.int64)}, ValueError, "hidden must be float32"),
        ({"targets": torch.tensor([0, 9, IGNORE, 3], dtype=torch.int32)}, ValueError, "int64"),
        ({"targets": torch.tensor([0, 10, IGNORE, 3])}, ValueError, "got 10 at row 1"),
        ({"targets": torch.tensor([0, -1, IGNORE, 3])}, ValueError, "got -1 at row 1"),
        ({"targets": torch.tensor([0, 1, IGNORE, 3], device="meta")}, ValueError, "one device"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": "1"}, TypeError, "temperature"),
        ({"temperature": torch.ones(3)}, ValueError, "shaped like targets"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(4, requires_grad=True)}, NotImplementedError, "temperature"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index"),
        ({"outputs": "entropy"}, TypeError, "sequence of names"),
        ({"outputs": ("perplexity",)}, ValueError, "perplexity"),
        ({"outputs": (name for name in ("entropy",))}, TypeError, "generator"),
        ({"outputs": [5]}, TypeError, "each of outputs"),
        ({"ignore_index": 2**70}, ValueError, "int64"),
        ({"temperature": torch.tensor([1.0, torch.inf, 1.0, 1.0])}, ValueError, "inf at row 1"),
        (
            {name: torch.randn(*shape, device="meta") for name, shape in (("hidden", (4, 8)), ("weight", (10, 8)))}
            | {"targets": torch.zeros(4, dtype=torch.int64, device="meta")},
            NotImplementedError,
            "meta tensors",
        ),
        ({"schedule": "loop"}, ValueError, "schedule must be one of"),
        ({"schedule": None}, TypeError, "schedule"),
        ({"memory_budget": -1}, ValueError, "memory_budget"),
        ({"memory_budget": 1.5}, TypeError, "memory_budget"),
        ({"memory_budget": True}, TypeError, "memory_budget"),
        ({"logits_dtype": torch.float64}, ValueError, "logits_dtype"),
        ({"logits_dtype": "float32"}, TypeError, "logits_dtype"),
        ({"drop_zero_rows": 1}, TypeError, "drop_zero_rows"),
        ({"process_group": object()}, NotImplementedError, "process_group"),
        ({"impl": "cuda"}, ValueError, "impl of linear_logprobs"),
        ({"impl": "reference", "schedule": "retain"}, NotImplementedError, "reference"),
        ({"weight_grad_out": torch.zeros(10, 8)}, ValueError, "does not require one"),
    ],
)
def test_refusals(change, error, match):
    with pytest.raises(error, match=match):
        prefcore.linear_logprobs(**(good() | change))


@pytest.mark.parametrize(
    ("buffer", "match"),
    [
        (torch.zeros(9, 8), "expected weight_grad_out"),
        (torch.zeros(8, 10).t(), "unit stride"),
        (torch.zeros(10, 8).half(), "float32"),
        (torch.zeros(1, 8).expand(10, 8), "rows of unit stride apart"),
        (torch.zeros(10, 8, requires_grad=True), "must not require"),
    ],
)
def test_refused_buffers(buffer, match):
    arguments = good()
    arguments["weight"].requires_grad_()
    with pytest.raises(ValueError, match=match):
        prefcore.linear_logprobs(**arguments, weight_grad_out=buffer)


def test_the_weight_is_no_buffer_for_its_own_gradient():
    arguments = good()
    weight = arguments["weight"].requires_grad_()
    with pytest.raises(ValueError, match="the weight itself"):
        prefcore.linear_logprobs(**arguments, weight_grad_out=weight.detach())


def test_an_ignored_row_may_have_any_temperature():
    arguments = good()
    arguments["temperature"] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert torch.isfinite(prefcore.linear_logprobs(**arguments).logps).all()


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_autocast_casts_floats_only(name):
    arguments = good()
    arguments[name] = arguments[name].long()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=f"{name} must be float32"):
        prefcore.linear_logprobs(**arguments)
    arguments = good() | {"weight": torch.randn(10, 8).double()}
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="weight must be float64"):
        prefcore.linear_logprobs(**arguments)


def test_a_sharded_weight_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        arguments = good() | {"weight": distribute_tensor(torch.randn(10, 8), mesh)}
        with pytest.raises(NotImplementedError, match="DTensor"):
            prefcore.linear_logprobs(**arguments)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_frozen_refuses_a_head_that_trains(name):
    arguments = good() | {"bias": torch.zeros(10)}
    arguments["hidden"].requires_grad_()
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match="frozen"):
        prefcore.linear_logprobs(**arguments, schedule="frozen")
    with torch.no_grad():
        prefcore.linear_logprobs(**arguments, schedule="frozen")


def test_forward_refuses_to_drop_a_gradient_silently():
    arguments = good()
    arguments["hidden"].requires_grad_()
    with pytest.raises(ValueError, match="schedule='forward'"):
        prefcore.linear_logprobs(**arguments, schedule="forward")


def test_double_backward_is_refused():
    arguments = good()
    hidden = arguments["hidden"].requires_grad_()
    logps = prefcore.linear_logprobs(**arguments).logps
    for loss in (logps.sum(), logps.square().sum()):
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_the_reference_serves_by_name():
    arguments = good()
    truth = reference.linear_logprobs(**arguments)
    named = prefcore.linear_logprobs(**arguments, impl="reference")
    assert torch.equal(named.logps, truth.logps)
    assert named.entropy is None


def test_settings_follow_the_schema():
    names = [field.name for field in dataclasses.fields(_walk.HeadSettings)]
    declared = [part.split()[-1] for part in _walk.HeadSettings.SCHEMA.split(", ")]
    assert names == [name.removeprefix("want_").removesuffix("_value") for name in declared]


def test_every_pair_of_schedules_agrees():
    case = make(200, 1500, extras="bias")
    results = [
        run(case, prefcore.linear_logprobs, schedule=schedule, memory_budget=budget)
        for schedule, budget in (("retain", None), ("retain", 1_500_000), ("recompute", None), ("recompute", TINY))
    ]
    frozen = dataclasses.replace(case, train_head=False)
    results.append(run(frozen, prefcore.linear_logprobs, schedule="frozen"))
    for a, b in itertools.combinations(results, 2):
        for name in a.keys() & b.keys():
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)
