"""linear_divergence against its float64 oracle: every kind, schedule and implementation, gradients to either side."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prefcore
from prefcore import _impl, reference
from prefcore.ops import _pair_walk, _walk, linear_divergence
from prefcore.testing import assert_no_worse_than

KINDS = ["kl_pq", "kl_qp", "js", "alpha", "tv"]
OUTPUTS = ("entropy", "other_entropy")
IGNORE = -100
CPU = pytest.param("cpu", "cpu", id="cpu")
interpreted = pytest.mark.skipif(
    not _impl.interpreting(), reason="Triton's interpreter is off: TRITON_INTERPRET=1 turns it on"
)
TRITON = pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted)
CUDA = pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu)
EVERY = pytest.mark.parametrize(("impl", "device"), [CPU, TRITON, CUDA])
# The interpreter is slow, and how tiles are walked is not its own.
NATIVE = pytest.mark.parametrize(("impl", "device"), [CPU, CUDA])
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
# One tile of 128 x 1024 of each side at a time: several chunks of rows and slices of the vocabulary, two sweeps.
TINY = 1
SCHEDULES = [
    pytest.param("auto", None, id="auto"),
    pytest.param("retain", None, id="retain"),
    pytest.param("retain", 4_000_000, id="mixed"),
    pytest.param("recompute", None, id="recompute"),
    pytest.param("recompute", TINY, id="recompute-tiles"),
]
LEAVES = ("hidden", "weight", "bias", "other_hidden", "other_weight", "other_bias")
TRAINED = {
    "both": LEAVES,
    "first": LEAVES[:3],
    "other": LEAVES[3:],
    "backbones": ("hidden", "other_hidden"),
    "heads": ("weight", "other_bias"),
}


def few(T: int, impl: str, device: str) -> int:
    """Rows for a test: the interpreter takes milliseconds for each, and walks over tiles are not its own."""
    return min(T, 7) if (impl, device) == ("triton", "cpu") else T


@dataclasses.dataclass
class Case:
    kind: str
    tensors: dict[str, torch.Tensor]  # by the names of LEAVES
    targets: torch.Tensor | None
    trained: tuple[str, ...] = LEAVES
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    upstream: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def make(
    kind: str,
    T: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    *,
    D: int = 8,
    E: int = 6,
    trained: str = "both",
    ignored: str = "some",
    extras: str = "bias",
    outputs: tuple[str, ...] = OUTPUTS,
    gradient: str = "random",
) -> Case:
    """A seeded case; ``extras`` names any of bias, temperature, temperatures, softcap, scale."""
    g = torch.Generator().manual_seed(T * 1000003 + V)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = {
        "hidden": randn(T, D), "weight": randn(V, D) / 2, "bias": randn(V),
        "other_hidden": randn(T, E), "other_weight": randn(V, E) / 2, "other_bias": randn(V),
    }  # fmt: skip
    wanted = set(extras.split())
    if "bias" not in wanted:
        del tensors["bias"], tensors["other_bias"]
    targets = torch.randint(0, V, (T,), generator=g)
    if ignored == "some":
        targets[2::3] = IGNORE
    elif ignored == "all":
        targets[:] = IGNORE
    options: dict[str, Any] = {"outputs": outputs}
    if kind in ("js", "alpha"):
        options["beta" if kind == "js" else "alpha"] = 0.3
    if "temperature" in wanted:
        options |= {"temperature": 0.7, "other_temperature": 1.3}
    if "temperatures" in wanted:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        temperatures = (torch.rand(2, T, generator=g, dtype=torch.float64) + 0.5).to(acc)
        options |= {"temperature": temperatures[0], "other_temperature": temperatures[1]}
    if "softcap" in wanted:
        options |= {"softcap": 3.0, "other_softcap": None}
    if "scale" in wanted:
        options |= {"logit_scale": 0.6, "other_logit_scale": 0.9}
    names = ("divergence", "logps", "other_logps", *outputs)
    upstream = {name: randn(T) for name in names}
    if gradient == "zero":
        upstream = {k: torch.zeros_like(v) for k, v in upstream.items()}
    elif gradient == "sparse":
        for v in upstream.values():
            v[: T * 3 // 4] = 0
    elif gradient != "random":
        upstream = {k: v for k, v in upstream.items() if k in gradient.split()}
    kept = {k: v.to(dtype) for k, v in tensors.items()}
    return Case(kind, kept, targets, tuple(x for x in TRAINED[trained] if x in kept), options, upstream)


def run(case: Case, op: Any, dtype: torch.dtype | None = None, device: str = "cpu", **arguments: Any):
    """Outputs and gradients by name; in ``dtype`` if given."""

    def there(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(device).to(dtype if dtype is not None and x.is_floating_point() else x.dtype)

    leaves = {k: there(v).detach().clone().requires_grad_(k in case.trained) for k, v in case.tensors.items()}
    options = {k: there(v) for k, v in case.options.items()}
    stats = op(**leaves, targets=there(case.targets), kind=case.kind, **options, **arguments)
    named = {k: v for k, v in stats._asdict().items() if v is not None}
    loss = sum(
        (named[k].double() * g.to(device)).sum()
        for k, g in case.upstream.items()
        if k in named and named[k].requires_grad
    )
    wanted = [leaves[k] for k in case.trained]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    named |= {
        f"d_{k}": torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(case.trained, grads, strict=True)
    }
    return {k: v.detach().cpu() for k, v in named.items()}


def check(case: Case, impl: str, device: str, **arguments: Any) -> dict[str, torch.Tensor]:
    """Compare with the oracle: values, gradients, and what must hold of both."""
    truth = run(case, reference.linear_divergence, torch.float64)
    eager = run(case, reference.linear_divergence)
    before = {k: v.clone() for k, v in case.tensors.items()}
    actual = run(case, prefcore.linear_divergence, device=device, impl=impl, **arguments)
    for k, x in case.tensors.items():
        assert torch.equal(x.nan_to_num(), before[k].nan_to_num()), "an input was changed"
    assert set(actual) == set(truth)
    for name, value in actual.items():
        if name == "divergence":
            assert (value >= 0).all()
        assert_no_worse_than(value, eager[name], truth[name], name, band=band(case, name, truth[name]))
    if case.targets is not None:
        skipped = case.targets == IGNORE
        for name in ("divergence", "logps", "other_logps", "d_hidden", "d_other_hidden"):
            assert name not in actual or (actual[name][skipped] == 0).all()
    return actual


def logits(case: Case, prefix: str) -> torch.Tensor:
    """The raw ones of one side, in float64, of the rows that count."""
    kept = slice(None) if case.targets is None else case.targets != IGNORE
    hidden, weight = case.tensors[f"{prefix}hidden"][kept].double(), case.tensors[f"{prefix}weight"].double()
    bias = case.tensors.get(f"{prefix}bias")
    return hidden @ weight.t() + (0 if bias is None else bias.double())


def band(case: Case, name: str, truth: torch.Tensor) -> float:
    """What one rounding of an intermediate value does to a result.

    A rounded logit is off by eps·|z|: so is a log-probability, and what is an expectation of differences of such. A
    gradient's terms, p times such a difference, are off by as much times the largest difference or 1; and rows of W, or
    of hidden states, whose parts cancel leave roundings of their own.
    """
    z = [logits(case, prefix) for prefix in ("", "other_")]
    if not truth.numel() or not z[0].numel():
        return 0.0
    dtype = case.tensors["hidden"].dtype
    eps = torch.finfo(dtype).eps
    coldest = min(
        [1.0, *(float(torch.as_tensor(v).min()) for k, v in case.options.items() if "temperature" in k)]
    )  # fmt: skip
    magnitude = max(1.0, *(x.abs().max().item() / coldest for x in z))
    divisor = 1.0
    if case.kind in ("js", "alpha"):
        divisor = 0.3 * 0.7
    if not name.startswith("d_"):
        return eps * magnitude / (divisor if name == "divergence" else 1)
    g = max(g.abs().max().item() for g in case.upstream.values())
    side = "other_" if name.startswith("d_other") else ""
    parts = {
        "hidden": case.tensors[f"{side}weight"], "weight": case.tensors[f"{side}hidden"].nan_to_num(),
        "bias": torch.ones(1),
    }[name.rpartition("_")[2]].abs().max().item()  # fmt: skip
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return eps * (1 + magnitude) / divisor * truth.abs().max().item() + wide * g * parts * magnitude


@EVERY
@pytest.mark.quick
@ALL_KINDS
@pytest.mark.parametrize(("schedule", "budget"), SCHEDULES)
def test_every_schedule_equals_the_oracle(schedule, budget, kind, impl, device):
    case = make(kind, few(301, impl, device), 2500, extras="bias temperatures softcap scale")
    check(case, impl, device, schedule=schedule, memory_budget=budget)


@NATIVE
@ALL_KINDS
@pytest.mark.parametrize("trained", list(TRAINED))
def test_gradient_to_either_side_or_both(trained, kind, impl, device):
    case = make(kind, few(150, impl, device), 1300, trained=trained)
    for schedule, budget in (("retain", None), ("recompute", TINY)):
        check(case, impl, device, schedule=schedule, memory_budget=budget)


@EVERY
@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype, kind, impl, device):
    case = make(kind, few(150, impl, device), 1300, dtype)
    for schedule in ("retain", "recompute"):
        check(case, impl, device, schedule=schedule)


@NATIVE
@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_logits_are_not_rounded(dtype, kind, impl, device):
    case = make(kind, few(150, impl, device), 1300, dtype, extras="")
    exact = run(case, reference.linear_divergence, torch.float64)["divergence"]
    wide = check(case, impl, device, logits_dtype=torch.float32)["divergence"]
    rounded = check(case, impl, device)["divergence"]
    assert (wide - exact).abs().max() < 2e-5
    assert (rounded - exact).abs().max() > 10 * (wide - exact).abs().max()


@NATIVE
@ALL_KINDS
@pytest.mark.parametrize(("T", "V"), [(0, 17), (1, 17), (1, 1), (7, 1000), (1500, 17), (9, 32001), (3, 151936)])
def test_shapes(T, V, kind, impl, device):
    case = make(kind, T, V)
    check(case, impl, device)
    check(case, impl, device, schedule="recompute", memory_budget=TINY)


@NATIVE
@ALL_KINDS
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_ignored_rows_are_inert_whatever_they_hold(ignored, kind, impl, device):
    case = make(kind, few(131, impl, device), 300, ignored=ignored)
    for name in ("hidden", "other_hidden"):
        case.tensors[name][case.targets == IGNORE] = torch.nan
    for schedule in ("retain", "recompute"):
        actual = check(case, impl, device, schedule=schedule)
        if ignored == "all":
            assert all((value == 0).all() for value in actual.values())


@NATIVE
@ALL_KINDS
@pytest.mark.parametrize(
    "gradient", ["zero", "sparse", "divergence", "logps", "logps other_logps entropy", "divergence other_entropy"]
)
def test_upstream_gradients(gradient, kind, impl, device):
    case = make(kind, few(301, impl, device), 1200, gradient=gradient)
    for schedule, budget in (("retain", None), ("retain", 2_000_000), ("recompute", TINY)):
        actual = check(case, impl, device, schedule=schedule, memory_budget=budget, drop_zero_rows=True)
        if gradient == "zero":
            assert all((value == 0).all() for name, value in actual.items() if name.startswith("d_"))


@NATIVE
@ALL_KINDS
def test_without_targets_every_row_counts(kind, impl, device):
    case = make(kind, few(40, impl, device), 300)
    case.targets = None
    actual = check(case, impl, device)
    assert not {"logps", "other_logps"} & set(actual)
    assert (actual["divergence"] > 0).all()


@NATIVE
@ALL_KINDS
def test_equal_sides_do_not_differ(kind, impl, device):
    case = make(kind, 9, 1100, D=6)
    for name in LEAVES[:3]:
        case.tensors[f"other_{name}"] = case.tensors[name].clone()
    case.upstream = {"divergence": case.upstream["divergence"]}
    for budget in (None, TINY):
        actual = check(case, impl, device, memory_budget=budget)
        assert actual["divergence"].max() < 2e-6
        assert max(actual[f"d_{name}"].abs().max() for name in LEAVES) < 1e-5


@EVERY
@ALL_KINDS
def test_large_logits(kind, impl, device):
    case = make(kind, 9, 1100, ignored="none")
    for prefix in ("", "other_"):
        case.tensors[f"{prefix}bias"].zero_()
        case.tensors[f"{prefix}hidden"] *= 1e4 / logits(case, prefix).abs().max()
    check(case, impl, device)


@NATIVE
@ALL_KINDS
def test_disjoint_distributions_reach_the_maximum(kind, impl, device):
    case = make(kind, 5, 1100, ignored="none", outputs=())
    case.tensors["hidden"].zero_(), case.tensors["other_hidden"].zero_()
    for prefix, column in (("", 3), ("other_", 1050)):
        case.tensors[f"{prefix}bias"].zero_()[column] = 60.0
    actual = check(case, impl, device, memory_budget=TINY)
    most = {"js": -0.3 * math.log(0.3) - 0.7 * math.log(0.7), "tv": 1.0, "alpha": 1 / (0.3 * 0.7)}
    torch.testing.assert_close(actual["divergence"], torch.full((5,), most.get(kind, 60.0)), rtol=1e-5, atol=0)


@EVERY
@ALL_KINDS
def test_masked_vocabulary_entries_do_not_count(kind, impl, device):
    case = make(kind, 9, 1100, ignored="none")
    case.tensors["bias"][100:900] = case.tensors["other_bias"][100:900] = -torch.inf
    case.targets.clamp_(max=99)
    cut = dataclasses.replace(
        case,
        tensors={
            k: torch.cat((v[:100], v[900:])) if k.endswith(("weight", "bias")) else v for k, v in case.tensors.items()
        },
    )
    for budget in (None, TINY):
        actual = run(case, prefcore.linear_divergence, device=device, impl=impl, memory_budget=budget)
        expected = run(cut, reference.linear_divergence, torch.float64)
        for name, value in actual.items():
            if name.endswith(("weight", "bias")):
                assert (value[100:900] == 0).all()
                value = torch.cat((value[:100], value[900:]))
            torch.testing.assert_close(value.double(), expected[name], rtol=2e-5, atol=2e-5, msg=name)


@NATIVE
def test_a_missing_support_is_infinitely_far_in_kl_and_finitely_in_the_others(impl, device):
    values = {}
    for kind in KINDS:
        case = make(kind, 5, 300, ignored="none", outputs=())
        case.tensors["other_bias"][:100] = -torch.inf
        case.targets.clamp_(min=100)
        case.trained = ("hidden",)
        values[kind] = run(case, prefcore.linear_divergence, device=device, impl=impl)
        if kind != "kl_pq":
            check(case, impl, device)
    assert (values["kl_pq"]["divergence"] == torch.inf).all()
    assert values["kl_pq"]["d_hidden"].isnan().all(), "no plausible number"


@NATIVE
@pytest.mark.parametrize("kind", ["kl_pq", "kl_qp", "js"])
@pytest.mark.parametrize("budget", [None, TINY])
def test_rows_of_which_one_side_alone_has_a_gradient_are_not_dropped(budget, kind, impl, device):
    case = make(kind, 40, 300, ignored="none", outputs=())
    for name, rows in (("divergence", slice(0, 2)), ("logps", slice(4, 8)), ("other_logps", slice(20, 26))):
        kept = case.upstream[name][rows].clone()
        case.upstream[name] = torch.zeros(40, dtype=torch.float64)
        case.upstream[name][rows] = kept
    check(case, impl, device, memory_budget=budget, drop_zero_rows=True)


@pytest.mark.parametrize("budget", [None, TINY])
def test_an_infinite_divergence_masked_out_of_a_loss_leaves_the_weight_its_gradient(budget):
    case = make("kl_pq", 12, 300, ignored="none", extras="", outputs=())
    case.tensors["other_hidden"][:, 0] = 0
    case.tensors["other_hidden"][3, 0], case.tensors["other_weight"][7, 0] = 1e3, -1e38
    hidden, weight, other_hidden, other_weight = (
        case.tensors[name] for name in ("hidden", "weight", "other_hidden", "other_weight")
    )

    def gradients(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaves = hidden[rows].requires_grad_(), weight.clone().requires_grad_()
        stats = prefcore.linear_divergence(
            *leaves, other_hidden[rows], other_weight, kind="kl_pq", memory_budget=budget
        )
        return torch.autograd.grad(stats.divergence.where(stats.divergence.isfinite(), 0).sum(), leaves)

    rows = torch.arange(12)
    every, finite = gradients(rows), gradients(rows[rows != 3])
    assert (every[0][3] == 0).all()
    torch.testing.assert_close(every[0][rows != 3], finite[0])
    torch.testing.assert_close(every[1], finite[1])


@NATIVE
@ALL_KINDS
@pytest.mark.parametrize("schedule", ["retain", "recompute"])
def test_float64_gradcheck(schedule, kind, impl, device):
    rows = 3 if (impl, device) == ("triton", "cpu") else 5
    case = make(kind, rows, 11, torch.float64, D=3, E=2, extras="bias temperatures softcap scale")
    tensors = [case.tensors[k].to(device).requires_grad_() for k in LEAVES]

    def op(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
        named = dict(zip(LEAVES, tensors, strict=True))
        return tuple(
            prefcore.linear_divergence(
                **named, targets=case.targets.to(device), kind=kind, schedule=schedule, impl=impl, **options
            )
        )

    assert torch.autograd.gradcheck(op, tensors)


@NATIVE
@pytest.mark.parametrize("kind", ["kl_pq", "kl_qp", "js", "alpha"])  # tv's gradient jumps where p = q
def test_small_gradients_do_not_underflow_in_half_precision(kind, impl, device):
    """Sides as close as half precision can tell apart, and upstream gradients of a mean over many tokens."""
    case = make(kind, few(64, impl, device), 1300, torch.float16, D=6, ignored="none", outputs=(), trained="first")
    for name in LEAVES[:3]:
        case.tensors[f"other_{name}"] = case.tensors[name].clone()
    case.tensors["other_hidden"] *= 1 + 2**-7
    case.upstream = {"divergence": case.upstream["divergence"] * 1e-3}
    wide = run(dataclasses.replace(case), reference.linear_divergence, torch.float64)
    for schedule in ("retain", "recompute"):
        actual = run(
            case, prefcore.linear_divergence, device=device, impl=impl, schedule=schedule, logits_dtype=torch.float32
        )
        for name in ("d_weight", "d_hidden"):
            error = (actual[name].double() - wide[name]).norm() / wide[name].norm()
            # The gradient is written in half precision: its smallest normal number is 6e-5, the step below it 6e-8.
            floor = 2**-25 * math.sqrt(wide[name].numel()) / wide[name].norm()
            assert error < 2**-9 + floor, (name, schedule, error, floor)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["retain", "recompute"])
@pytest.mark.parametrize("kind", ["kl_pq", "kl_qp"])
def test_weight_grad_out_accumulates(kind, schedule, dtype, impl, device):
    case = make(kind, few(60, impl, device), 300, dtype)
    plain = run(case, prefcore.linear_divergence, device=device, impl=impl, schedule=schedule)
    outs = {f"{k}_grad_out": torch.ones_like(case.tensors[k], dtype=torch.float32).to(device) for k in LEAVES[1::3]}
    for _ in range(2):  # micro-batches
        actual = run(case, prefcore.linear_divergence, device=device, impl=impl, schedule=schedule, **outs)
        for name in ("d_weight", "d_other_weight"):
            assert (actual[name] == 0).all(), "autograd got a gradient too"
        torch.testing.assert_close(actual["d_hidden"], plain["d_hidden"])
    wide = run(case, prefcore.linear_divergence, device=device, impl=impl, schedule=schedule)
    for name in ("weight", "other_weight"):
        # Of two sums that are rounded once each, and of a gradient that is rounded to its type.
        twice = 2 * wide[f"d_{name}"].float()
        rounding = 4 * torch.finfo(torch.float32).eps * (1 + twice.abs().max())
        error = (outs[f"{name}_grad_out"].cpu() - 1 - twice).abs()
        assert (error <= torch.finfo(dtype).eps * twice.abs() + rounding).all()


@NATIVE
def test_both_sides_may_be_one_head(impl, device):
    case = make("kl_pq", few(40, impl, device), 300, D=6, extras="")
    case.tensors["other_weight"] = case.tensors["weight"]
    truth = run(case, reference.linear_divergence, torch.float64)
    weight = case.tensors["weight"].clone().to(device).requires_grad_()
    hidden, other = (case.tensors[f"{k}hidden"].to(device).requires_grad_() for k in ("", "other_"))
    stats = prefcore.linear_divergence(
        hidden, weight, other, weight, case.targets.to(device), kind="kl_pq", outputs=OUTPUTS, impl=impl
    )
    sum((getattr(stats, k).double() * g.to(device)).sum() for k, g in case.upstream.items()).backward()
    expected = truth["d_weight"] + truth["d_other_weight"]
    torch.testing.assert_close(weight.grad.cpu().double(), expected, rtol=1e-4, atol=1e-4)


@NATIVE
@pytest.mark.parametrize("kind", ["kl_qp", "js"])
def test_inputs_of_any_layout(kind, impl, device):
    case = make(kind, 12, 300, extras="bias temperatures")
    plain = check(case, impl, device)
    for name in LEAVES:  # transposed, offset, strided
        x = case.tensors[name]
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
        wide[..., 1::2] = x
        case.tensors[name] = wide[..., 1::2]
    strided = check(case, impl, device)
    for name, value in plain.items():
        torch.testing.assert_close(strided[name], value, rtol=1e-4, atol=1e-5, msg=name)
    shaped = dataclasses.replace(
        case,
        tensors={k: v.reshape(3, 4, -1) if k.endswith("hidden") else v for k, v in case.tensors.items()},
        targets=case.targets.view(3, 4),
        options={k: v.view(3, 4) if isinstance(v, torch.Tensor) else v for k, v in case.options.items()},
        upstream={k: v.view(3, 4) for k, v in case.upstream.items()},
    )
    actual = run(shaped, prefcore.linear_divergence, device=device, impl=impl)
    assert actual["divergence"].shape == (3, 4)
    for name, value in plain.items():
        torch.testing.assert_close(actual[name].view(value.shape), value, rtol=1e-4, atol=1e-5, msg=name)


@NATIVE
@ALL_KINDS
@pytest.mark.parametrize(("schedule", "budget"), SCHEDULES)
def test_same_inputs_give_the_same_bits_and_a_second_backward_too(schedule, budget, kind, impl, device):
    case = make(kind, 301, 2500)
    first, second = (
        run(case, prefcore.linear_divergence, device=device, impl=impl, schedule=schedule, memory_budget=budget)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    leaves = {k: v.to(device).requires_grad_() for k, v in case.tensors.items()}
    stats = prefcore.linear_divergence(
        **leaves, targets=case.targets.to(device), kind=kind, schedule=schedule, memory_budget=budget, impl=impl
    )
    loss = stats.divergence.sum() + stats.logps.sum()
    once = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    again = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiply-adds of each GEMM that follows."""
    counted: list[int] = []
    for module in (_walk, _pair_walk):
        for name in ("mm", "addmm"):
            if hasattr(module, name):
                whole = getattr(module, name)

                def counting(out, a, b, whole=whole):
                    counted.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
                    whole(out, a, b)

                monkeypatch.setattr(module, name, counting)
    return counted


@ALL_KINDS
@pytest.mark.parametrize("trained", [*TRAINED, "nothing"])
@pytest.mark.parametrize("budget", [None, 4_000_000, TINY])
def test_the_call_computes_what_the_plan_says(budget, trained, kind, monkeypatch):
    T, D, E, V = 400, 8, 6, 2500
    case = make(kind, T, V, ignored="none", extras="", outputs=())
    names = [x for x in TRAINED.get(trained, ()) if x in case.tensors]
    made = prefcore.plan(
        T, D, V, dtype=torch.float32, device="cpu", memory_budget=budget, divergence=kind, other_D=E,
        **{f"{name}_requires_grad": name in names for name in ("hidden", "weight", "other_hidden", "other_weight")},
    )  # fmt: skip
    counted = count_products(monkeypatch)
    for name, x in case.tensors.items():
        x.requires_grad_(name in names)
    stats = prefcore.linear_divergence(**case.tensors, targets=case.targets, kind=kind, memory_budget=budget)
    in_forward = sum(counted)
    if names:
        (stats.divergence.sum() + stats.logps.sum() + stats.other_logps.sum()).backward()
    assert sum(counted) == made.flops
    sweep = 2 * T * (D + E) * V
    assert in_forward == sweep if made.sweeps == 1 or kind.startswith(("kl", "alpha")) else in_forward <= 2 * sweep
    assert made.schedule == ("forward" if not names else {None: "retain", TINY: "recompute"}.get(budget, "mixed"))
    assert made.sweeps == (1 if budget is None else (1 if kind in ("kl_pq", "kl_qp", "alpha") else 2) + bool(names))


@pytest.mark.parametrize("kind", ["js", "tv"])
@pytest.mark.parametrize("schedule", ["auto", "recompute"])
def test_a_budget_of_256_whole_rows_saves_the_second_sweep_where_nothing_is_retained(schedule, kind, monkeypatch):
    T, D, E, V = 400, 8, 6, 2500
    budget = 256 * 2 * V * 4
    case = make(kind, T, V, ignored="none", extras="", outputs=())
    case.tensors["hidden"].requires_grad_(schedule == "recompute")
    counted = count_products(monkeypatch)
    prefcore.linear_divergence(**case.tensors, kind=kind, schedule=schedule, memory_budget=budget)
    assert sum(counted) == 2 * T * (D + E) * V
    options = {
        "dtype": torch.float32, "device": "cpu", "divergence": kind, "other_D": E, "schedule": schedule,
        "hidden_requires_grad": schedule == "recompute", "weight_requires_grad": False,
    }  # fmt: skip
    made = prefcore.plan(T, D, V, memory_budget=budget, **options)
    assert made.sweeps == 1 + (schedule == "recompute")
    assert made.peak_bytes <= budget + 2 * T * D * 4
    assert prefcore.plan(T, D, V, memory_budget=budget - 1, **options).sweeps == made.sweeps + 1


def test_a_frozen_side_costs_no_gradient_product(monkeypatch):
    T, D, E, V = 60, 8, 6, 300
    case = make("kl_pq", T, V, ignored="none", extras="", trained="first")
    for name in case.trained:
        case.tensors[name].requires_grad_()
    stats = prefcore.linear_divergence(**case.tensors, targets=case.targets, kind="kl_pq", schedule="recompute")
    counted = count_products(monkeypatch)
    stats.logps.sum().backward(retain_graph=True)
    assert sum(counted) == 3 * 2 * T * D * V, "log-probabilities alone need no logits of the other side"
    counted.clear()
    (stats.divergence.sum() + stats.logps.sum()).backward()
    assert sum(counted) == 3 * 2 * T * D * V + 2 * T * E * V, "only its logits"


@NATIVE
def test_memory_runs_out_while_retaining(impl, device, monkeypatch, caplog):
    case = make("js", 20, 300)
    expected = run(case, prefcore.linear_divergence, device=device, impl=impl, schedule="recompute")
    real = _pair_walk.retained_like

    def scarce(p, settings, rows):
        if rows:
            raise torch.OutOfMemoryError("no room")
        return real(p, settings, rows)

    monkeypatch.setattr(_pair_walk, "retained_like", scarce)
    with caplog.at_level(logging.WARNING, "prefcore"):
        actual = run(case, prefcore.linear_divergence, device=device, impl=impl, schedule="retain")
    assert "recomputing" in caplog.text
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("kind", ["kl_pq", "js"])
@pytest.mark.parametrize("schedule", ["forward", "retain", "recompute"])
def test_operators_are_registered_soundly(schedule, kind, impl):
    case = make(kind, 4, 40)
    calls: list[tuple] = []
    operators = linear_divergence.OPERATORS[impl]

    class Spy:
        def forward(self, *arguments):
            calls.append((operators.forward, arguments))
            return operators.forward(*arguments)

        def backward(self, *arguments):
            calls.append((operators.backward, arguments))
            return operators.backward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(linear_divergence.OPERATORS, impl, Spy())
        leaves = {k: v.requires_grad_(schedule != "forward") for k, v in case.tensors.items()}
        stats = prefcore.linear_divergence(**leaves, targets=case.targets, kind=kind, schedule=schedule, impl=impl)
        if schedule != "forward":
            (stats.divergence.sum() + stats.logps.sum()).backward()
    for operator, arguments in calls:
        detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        torch.library.opcheck(operator, detached, test_utils=("test_schema", "test_faketensor"))
    assert len(calls) == (1 if schedule == "forward" else 2)


@NATIVE
@pytest.mark.parametrize("kind", ["kl_qp", "tv"])
@pytest.mark.parametrize("budget", [None, 300_000])
def test_one_compiled_graph_serves_every_length(budget, kind, impl, device):
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    def step(hidden, weight, other, targets):
        stats = prefcore.linear_divergence(
            hidden, weight, other, weight, targets, kind=kind, memory_budget=budget, impl=impl
        )
        return stats.divergence.sum() + stats.logps.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, dynamic=True, fullgraph=True)
    for T in (20, 33, 47):
        case = make(kind, T, 300, D=6, extras="")
        hidden, weight = (case.tensors[k].to(device).requires_grad_() for k in ("hidden", "weight"))
        inputs = hidden, weight, case.tensors["other_hidden"].to(device), case.targets.to(device)
        expected = torch.autograd.grad(step(*inputs), inputs[:2])
        actual = torch.autograd.grad(compiled(*inputs), inputs[:2])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(frames) == 1


@pytest.mark.parametrize("kind", ["kl_qp", "js"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_one_buffer_takes_the_weight_gradients_of_both_sides(compiled, kind):
    case = make(kind, 20, 300, D=6, extras="")
    hidden, weight, other = (case.tensors[k].requires_grad_() for k in ("hidden", "weight", "other_hidden"))

    def step(hidden, other, out=None):
        return prefcore.linear_divergence(
            hidden, weight, other, weight, kind=kind, weight_grad_out=out, other_weight_grad_out=out
        ).divergence.sum()

    expected = torch.autograd.grad(step(hidden, other), (weight, hidden, other))
    torch._dynamo.reset()
    run = torch.compile(step, backend="aot_eager", dynamic=True, fullgraph=True) if compiled else step
    out = torch.ones(300, 6)
    for _ in range(2):  # micro-batches
        actual = torch.autograd.grad(run(hidden, other, out), (weight, hidden, other), allow_unused=True)
        assert actual[0] is None
        torch.testing.assert_close(actual[1:], expected[1:])
    torch.testing.assert_close(out, 1 + 2 * expected[0])


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(0, 40),
    V=st.sampled_from([1, 2, 17, 300, 1025]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    schedule=st.sampled_from(["auto", "retain", "recompute"]),
    budget=st.sampled_from([None, TINY, 100_000]),
    extras=st.sets(st.sampled_from(["bias", "temperature", "temperatures", "softcap", "scale"])),
    trained=st.sampled_from(list(TRAINED)),
    ignored=st.sampled_from(["none", "some", "all"]),
)
def test_combinations(T, V, kind, dtype, schedule, budget, extras, trained, ignored):
    case = make(kind, T, V, dtype, extras=" ".join(sorted(extras)), trained=trained, ignored=ignored)
    check(case, "cpu", "cpu", schedule=schedule, memory_budget=budget)


def test_autocast_casts_as_linear_does():
    case = make("js", 20, 300)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(case, prefcore.linear_divergence)
    narrow = dataclasses.replace(case, tensors={k: v.bfloat16() for k, v in case.tensors.items()})
    expected = run(narrow, prefcore.linear_divergence)
    for name, value in actual.items():
        assert value.dtype == torch.float32
        # Of the weights no cast rounds the sums.
        torch.testing.assert_close(value.to(expected[name].dtype), expected[name])


def test_double_backward_is_refused():
    case = make("kl_pq", 5, 30)
    hidden = case.tensors["hidden"].requires_grad_()
    stats = prefcore.linear_divergence(**case.tensors, kind="kl_pq")
    for upstream in (torch.ones(5), torch.ones(5, requires_grad=True)):
        (gradient,) = torch.autograd.grad(stats.divergence, hidden, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@ALL_KINDS
@pytest.mark.parametrize("schedule", ["retain", "recompute"])
def test_without_grad_every_name_runs_forward(schedule, kind):
    case = make(kind, 20, 300)
    with torch.no_grad():
        stats = prefcore.linear_divergence(**case.tensors, targets=case.targets, kind=kind, schedule=schedule)
    forward = prefcore.linear_divergence(**case.tensors, targets=case.targets, kind=kind, schedule="forward")
    assert not stats.divergence.requires_grad
    assert torch.equal(stats.divergence, forward.divergence)


def test_the_reference_serves_by_name():
    case = make("js", 20, 300, extras="bias temperatures softcap scale")
    actual = run(case, prefcore.linear_divergence, impl="reference")
    expected = run(case, reference.linear_divergence)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"kind": "kl"}, ValueError, "kind must be one of"),
        ({"kind": 1}, TypeError, "kind"),
        ({"alpha": 0.5}, ValueError, "alpha belongs to kind='alpha'"),
        ({"beta": 0.5}, ValueError, "beta belongs to kind='js'"),
        ({"kind": "js", "beta": 0.0}, ValueError, "its limits are the kinds kl_pq"),
        ({"kind": "alpha", "alpha": 1.5}, ValueError, "alpha must be between 0 and 1"),
        ({"kind": "js", "beta": "half"}, TypeError, "beta"),
        ({"other_hidden": torch.zeros(3, 6)}, ValueError, "other_hidden"),
        ({"other_weight": torch.zeros(29, 6)}, ValueError, r"other_weight\[:V\]"),
        ({"other_weight": torch.zeros(30, 7)}, ValueError, "of the other side: expected weight"),
        ({"hidden": None, "targets": None}, TypeError, "hidden"),
        ({"other_weight": None}, TypeError, "other_weight"),
        ({"other_bias": torch.zeros(29)}, ValueError, "of the other side: expected bias"),
        (
            {"other_hidden": torch.zeros(4, 6).double(), "other_weight": torch.zeros(30, 6).double()},
            ValueError,
            "of one dtype",
        ),
        ({"targets": torch.tensor([0, 1, 2, 30])}, ValueError, r"targets must be in \[0, 30\)"),
        ({"targets": torch.tensor([0, 1, 2])}, ValueError, "targets"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"other_temperature": -1.0}, ValueError, "other_temperature must be positive"),
        ({"other_temperature": "equal"}, TypeError, "other_temperature must be a number"),
        ({"other_softcap": 0.0}, ValueError, "other_softcap must be positive"),
        ({"other_logit_scale": "x"}, TypeError, "other_logit_scale"),
        ({"outputs": ("logsumexp",)}, ValueError, "outputs may name"),
        ({"schedule": "frozen"}, ValueError, "schedule must be one of"),
        ({"memory_budget": -1}, ValueError, "memory_budget"),
        ({"process_group": object()}, NotImplementedError, "process_group"),
        ({"weight_grad_out": torch.zeros(30, 8)}, ValueError, "does not require one"),
        ({"other_weight_grad_out": torch.zeros(30, 6)}, ValueError, "other_weight_grad_out"),
        ({"impl": "reference", "schedule": "retain"}, NotImplementedError, "materialises"),
    ],
)
def test_refusals(change, error, match):
    arguments = {
        "hidden": torch.zeros(4, 8), "weight": torch.zeros(30, 8), "other_hidden": torch.zeros(4, 6),
        "other_weight": torch.zeros(30, 6), "targets": torch.tensor([0, 1, 2, -100]), "kind": "kl_pq",
    }  # fmt: skip
    with pytest.raises(error, match=match):
        prefcore.linear_divergence(**(arguments | change))


def test_forward_refuses_to_drop_a_gradient_silently():
    case = make("kl_pq", 5, 30)
    case.tensors["other_bias"].requires_grad_()
    with pytest.raises(ValueError, match="computes no gradient"):
        prefcore.linear_divergence(**case.tensors, kind="kl_pq", schedule="forward")
