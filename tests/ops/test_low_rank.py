"""A low-rank part of the head's weight, LoRA on the head, against the float64 oracle of the whole weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prefcore
from prefcore import _impl, reference
from prefcore.ops import _walk
from prefcore.ops._backends import BACKENDS
from prefcore.ops.linear_logprobs import OPERATORS, _Launchers, _Operators
from prefcore.testing import assert_no_worse_than

ALL = ("entropy", "logsumexp", "is_top1", "mean_logits", "log_sum_sq_probs")
IGNORE = -100
TINY = 1  # bytes: one tile of 128 x 1024 at a time
EVERYTHING = ("hidden", "inner", "outer", "bias")
FROZEN = ("hidden", "inner")
interpreted = pytest.mark.skipif(
    not _impl.interpreting(), reason="Triton's interpreter is off: TRITON_INTERPRET=1 turns it on"
)
BOTH = pytest.mark.parametrize("impl", ["cpu", pytest.param("triton", marks=interpreted)])
SCHEDULES = pytest.mark.parametrize(
    ("schedule", "budget", "trained"),
    [
        pytest.param("auto", None, EVERYTHING, id="auto"),
        pytest.param("retain", None, EVERYTHING, id="retain"),
        pytest.param("retain", None, FROZEN, id="retain-frozen"),
        pytest.param("retain", None, ("inner", "outer"), id="retain-head-alone"),
        pytest.param("retain", 2_800_000, EVERYTHING, id="mixed"),
        pytest.param("recompute", None, EVERYTHING, id="recompute"),
        pytest.param("recompute", TINY, EVERYTHING, id="recompute-tiles"),
        pytest.param("recompute", TINY, ("inner", "outer"), id="recompute-tiles-head-alone"),
        pytest.param("retain", None, ("hidden", "outer"), id="retain-outer"),
        pytest.param("recompute", None, ("outer",), id="recompute-outer-alone"),
        pytest.param("recompute", None, ("inner", "bias"), id="recompute-bias"),
        pytest.param("frozen", None, FROZEN, id="frozen"),
        pytest.param("frozen", TINY, FROZEN, id="frozen-tiles"),
        pytest.param("frozen", None, ("inner",), id="frozen-inner-alone"),
    ],
)


@dataclasses.dataclass
class Case:
    tensors: dict[str, torch.Tensor]  # hidden, inner, outer, bias and weight
    targets: torch.Tensor
    options: dict[str, Any]
    outputs: tuple[str, ...]
    upstream: dict[str, torch.Tensor]
    trained: tuple[str, ...]


def make(
    T: int, V: int, D: int = 8, R: int = 3, dtype: torch.dtype = torch.float32, *,
    trained: tuple[str, ...] = EVERYTHING, outputs: tuple[str, ...] = (), plain: bool = False, ignored: str = "some",
) -> Case:  # fmt: skip
    """A seeded case; unless ``plain``, with a temperature per row, a softcap and a scale."""
    g = torch.Generator().manual_seed(T * 1000003 + V + R)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shapes = {"hidden": (T, D), "inner": (T, R), "outer": (V, R), "weight": (V, D), "bias": (V,)}
    tensors = {name: randn(*shape) for name, shape in shapes.items()}
    targets = torch.randint(0, V, (T,), generator=g)
    if T > 2:
        targets[0], targets[1] = 0, V - 1
    if ignored == "some":
        targets[2::3] = IGNORE
    elif ignored == "all":
        targets[:] = IGNORE
    wide = torch.promote_types(dtype, torch.float32)
    options: dict[str, Any] = {}
    if not plain:
        temperature = (torch.rand(T, generator=g, dtype=torch.float64) + 0.5).to(wide)
        options = {"temperature": temperature, "softcap": 3.0, "logit_scale": 0.6}
    upstream = {name: randn(T) for name in ("logps", "entropy", "logsumexp") if name == "logps" or name in outputs}
    return Case({k: x.to(dtype) for k, x in tensors.items()}, targets, options, outputs, upstream, trained)


def whole(hidden, weight, targets, *, low_rank, **options):
    """The oracle of the whole weight, which knows nothing of low rank."""
    inner, outer = low_rank
    return reference.linear_logprobs(
        torch.cat((hidden, inner), -1), torch.cat((weight, outer), -1), targets, **options
    )  # fmt: skip


def leaves_of(case: Case, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {
        name: (x if dtype is None else x.to(dtype)).detach().clone().requires_grad_(name in case.trained)
        for name, x in case.tensors.items()
    }


def run(case: Case, op: Any, dtype: torch.dtype | None = None, **arguments: Any) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name; in ``dtype`` if given."""
    leaves = leaves_of(case, dtype)
    options = dict(case.options)
    if dtype is not None and "temperature" in options:
        options["temperature"] = options["temperature"].to(dtype)
    stats = op(
        leaves["hidden"], leaves["weight"], case.targets, low_rank=(leaves["inner"], leaves["outer"]),
        bias=leaves["bias"], outputs=case.outputs, **options, **arguments,
    )  # fmt: skip
    named = {k: v for k, v in stats._asdict().items() if v is not None}
    loss = sum((named[k].double() * g).sum() for k, g in case.upstream.items())
    grads = torch.autograd.grad(loss, [leaves[name] for name in case.trained])
    return {k: v.detach() for k, v in (named | {f"d_{k}": g for k, g in zip(case.trained, grads, strict=True)}).items()}


def check(case: Case, impl: str, **arguments: Any) -> dict[str, torch.Tensor]:
    truth, eager = run(case, whole, torch.float64), run(case, whole)
    actual = run(case, prefcore.linear_logprobs, impl=impl, **arguments)
    assert set(actual) == set(truth)
    for name, value in actual.items():
        if not value.is_floating_point():
            low = case.tensors["hidden"].dtype.itemsize < 4  # rounding makes and breaks ties
            assert low or torch.equal(value, truth[name]), name
            continue
        assert_no_worse_than(value, eager[name], truth[name], name, band=band(case, name, truth[name]))
    ignored = case.targets == IGNORE
    assert (actual["logps"][ignored] == 0).all()
    assert all((actual[name][ignored] == 0).all() for name in ("d_hidden", "d_inner") if name in actual)
    return actual


def band(case: Case, name: str, truth: torch.Tensor) -> float:
    """What one rounding of an intermediate value does to a result: as in test_linear_logprobs.py.

    A logit is the sum of two products, each of which a 16-bit tile rounds.
    """
    kept = case.targets != IGNORE
    if not truth.numel() or not kept.any():
        return 0.0
    wide = {k: x.double() for k, x in case.tensors.items()}
    hidden, inner = wide["hidden"][kept], wide["inner"][kept]
    products = hidden @ wide["weight"].t(), inner @ wide["outer"].t()
    eps = torch.finfo(case.tensors["hidden"].dtype).eps
    magnitude = max(1.0, (products[0].abs() + products[1].abs() + wide["bias"].abs()).max().item())
    if not name.startswith("d_"):
        return eps * magnitude
    g = max(g[kept].abs().max().item() for g in case.upstream.values())
    other = {"hidden": wide["weight"], "inner": wide["outer"], "outer": inner, "bias": torch.ones(1)}
    parts = other[name.removeprefix("d_")].abs().max().item()
    accumulated = torch.finfo(torch.promote_types(case.tensors["hidden"].dtype, torch.float32)).eps
    return eps * (1 + magnitude) * truth.abs().max().item() + accumulated * g * parts


@BOTH
@pytest.mark.quick
@pytest.mark.parametrize("outputs", [(), ALL], ids=["logps", "all"])
@SCHEDULES
def test_every_schedule_equals_the_oracle(schedule, budget, trained, outputs, impl):
    T, V = (301, 2500) if impl == "cpu" else (7, 1100)
    case = make(T, V, outputs=outputs, trained=trained)
    for name in ("hidden", "inner"):
        case.tensors[name][case.targets == IGNORE] = torch.nan
    check(case, impl, schedule=schedule, memory_budget=budget)


@pytest.mark.parametrize("outputs", [(), ALL], ids=["logps", "all"])
def test_the_reference_equals_the_oracle(outputs):
    case = make(20, 90, outputs=outputs)
    for name in ("hidden", "inner"):
        case.tensors[name][case.targets == IGNORE] = torch.nan
    check(case, "reference")


@BOTH
@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype, schedule, impl):
    case = make(
        *((150, 1300) if impl == "cpu" else (7, 300)), dtype=dtype, outputs=ALL[:2],
        trained=FROZEN if schedule == "frozen" else EVERYTHING,
    )  # fmt: skip
    check(case, impl, schedule=schedule)
    check(case, impl, schedule=schedule, logits_dtype=torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
@pytest.mark.parametrize(
    ("T", "V", "D", "R"), [(0, 17, 8, 4), (1, 1, 1, 1), (3, 9001, 5, 1), (7, 300, 4, 13), (5, 64, 8, 8)]
)
def test_shapes(T, V, D, R, schedule):
    case = make(T, V, D, R, outputs=ALL, trained=FROZEN if schedule == "frozen" else EVERYTHING)
    check(case, "cpu", schedule=schedule)
    check(case, "cpu", schedule=schedule, memory_budget=TINY)


@BOTH
@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
@pytest.mark.parametrize("kind", ["large", "masked", "no gradient", "few gradients"])
def test_hostile_inputs(kind, schedule, impl):
    trained = FROZEN if schedule == "frozen" else EVERYTHING
    case = make(
        *((40, 1100) if impl == "cpu" else (8, 300)), plain=kind == "large", outputs=("entropy", "logsumexp"),
        trained=trained, ignored="all" if kind == "masked" else "none",
    )  # fmt: skip
    if kind == "large":
        tensors = case.tensors
        logits = tensors["hidden"] @ tensors["weight"].t() + tensors["inner"] @ tensors["outer"].t()
        for name in ("hidden", "inner"):
            tensors[name] *= 1e4 / logits.abs().max()
    elif kind == "no gradient":
        case.upstream = {k: torch.zeros_like(g) for k, g in case.upstream.items()}
    elif kind == "few gradients":
        for g in case.upstream.values():
            g[: len(g) * 3 // 4] = 0
        case.tensors["inner"][: len(case.targets) * 3 // 4] *= 1e3  # would show if these rows took part
    actual = check(case, impl, schedule=schedule, drop_zero_rows=kind == "few gradients")
    if kind in ("masked", "no gradient"):
        assert all((value == 0).all() for name, value in actual.items() if name.startswith("d_"))


def test_a_part_of_zeros_changes_no_statistic():
    """LoRA begins with B = 0: the policy is the reference then."""
    case = make(40, 900)
    case.tensors["outer"].zero_()
    hidden, weight, inner, outer = (case.tensors[name] for name in ("hidden", "weight", "inner", "outer"))
    options = case.options | {"outputs": ("entropy",)}
    without = prefcore.linear_logprobs(hidden, weight, case.targets, **options)
    beside = prefcore.linear_logprobs(hidden, weight, case.targets, low_rank=(inner, outer), **options)
    torch.testing.assert_close(beside, without, rtol=0, atol=torch.finfo(torch.float32).eps * 30)


@pytest.mark.parametrize("schedule", ["retain", "recompute", "frozen"])
def test_a_lora_of_the_head_gets_the_gradients_of_its_dense_self(schedule):
    g = torch.Generator().manual_seed(7)
    D, V, R, scaling = 6, 70, 2, 1.5
    A, B, hidden, weight = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((R, D), (V, R), (2, 9, D), (V, D))
    )
    targets = torch.randint(V, (2, 9), generator=g)
    A.requires_grad_()
    hidden.requires_grad_()
    B.requires_grad_(schedule != "frozen")
    trained = [x for x in (A, B, hidden) if x.requires_grad]

    def grads(logps):
        return torch.autograd.grad((logps * torch.arange(18.0).view(2, 9)).sum(), trained, retain_graph=True)

    dense = torch.log_softmax(hidden @ (weight + scaling * B @ A).t(), -1).gather(-1, targets[..., None])[..., 0]
    logps = prefcore.linear_logprobs(
        hidden, weight, targets, low_rank=(scaling * hidden @ A.t(), B), schedule=schedule
    ).logps
    torch.testing.assert_close(logps, dense)
    torch.testing.assert_close(grads(logps), grads(dense))
    torch.testing.assert_close(grads(logps), grads(logps), rtol=0, atol=0)


def test_inputs_of_any_layout():
    case = make(20, 500, R=5, plain=True)
    plain = run(case, prefcore.linear_logprobs)
    leaves = {}
    for name, x in case.tensors.items():
        spread = torch.full([2 * size for size in x.shape], torch.nan)
        view = spread[tuple(slice(0, None, 2) for _ in x.shape)]
        leaves[name] = view.copy_(x).requires_grad_(name in case.trained)
    stats = prefcore.linear_logprobs(
        leaves["hidden"].view(4, 5, 8), leaves["weight"], case.targets.view(4, 5), bias=leaves["bias"],
        low_rank=(leaves["inner"].view(4, 5, 5), leaves["outer"]),
    )  # fmt: skip
    (stats.logps.double() * case.upstream["logps"].view(4, 5)).sum().backward()
    torch.testing.assert_close(stats.logps.flatten(), plain["logps"])
    for name in case.trained:
        torch.testing.assert_close(leaves[name].grad, plain[f"d_{name}"], msg=name)


@pytest.mark.parametrize("op", ["linear_logprobs", "linear_loss"])
def test_autocast_casts_both(op):
    case = make(20, 500, plain=True)
    low = dataclasses.replace(case, tensors={k: x.bfloat16() for k, x in case.tensors.items()})
    results = []
    for given, on in ((case, True), (low, False)):
        leaves = leaves_of(given)
        low_rank = leaves["inner"], leaves["outer"]
        head = leaves["hidden"], leaves["weight"], case.targets
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            if op == "linear_logprobs":
                stats = prefcore.linear_logprobs(*head, bias=leaves["bias"], low_rank=low_rank)
                loss = stats.logps.sum()
            else:
                loss, _, stats = prefcore.linear_loss(
                    *head, [0, 20], lambda stats, tile: stats.logps, bias=leaves["bias"], low_rank=low_rank
                )  # fmt: skip
        loss.backward()
        assert all(leaves[name].grad.dtype == leaves[name].dtype for name in case.trained)
        results.append((stats.logps, *(leaves[name].grad.float() for name in case.trained)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


OFFSETS = [0, 40, 70, 71, 200, 260, 301]


def loss_fn(stats, tile):
    entropy = 0 if stats.entropy is None else 0.1 * stats.entropy
    return -torch.nn.functional.logsigmoid(prefcore.sequence_reduce(stats.logps + entropy, tile.cu_seqlens, "mean"))


def run_loss(case: Case, op: Any, dtype: torch.dtype | None = None, scale: float = 1.0, **arguments: Any) -> dict:
    leaves = leaves_of(case, dtype)
    options = dict(case.options)
    if dtype is not None and "temperature" in options:
        options["temperature"] = options["temperature"].to(dtype)
    found = op(
        leaves["hidden"], leaves["weight"], case.targets, torch.tensor(OFFSETS, dtype=torch.int32), loss_fn,
        low_rank=(leaves["inner"], leaves["outer"]), bias=leaves["bias"], outputs=case.outputs, normalizer=3.0,
        **options, **arguments,
    )  # fmt: skip
    grads = torch.autograd.grad(found.loss * scale, [leaves[name] for name in case.trained])
    return {"loss": found.loss.detach(), "logps": found.stats.logps} | {
        f"d_{name}": g for name, g in zip(case.trained, grads, strict=True)
    }


def oracle_loss(hidden, weight, targets, cu_seqlens, loss_fn, *, low_rank, **options):
    """As :func:`whole`."""
    inner, outer = low_rank
    return reference.linear_loss(
        torch.cat((hidden, inner), -1), torch.cat((weight, outer), -1), targets, cu_seqlens, loss_fn, **options
    )


@pytest.mark.parametrize("trained", [EVERYTHING, FROZEN, ("inner", "outer"), ("outer",)], ids="-".join)
@pytest.mark.parametrize("outputs", [(), ("entropy",)], ids=["logps", "entropy"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"memory_budget": 150 * 2500 * 4 * 8 // 7},
        {"memory_budget": TINY},
        {"grad_scale": 1.0},
        {"impl": "reference"},
    ],
    ids=["whole", "tiles", "tiny", "known", "reference"],
)
def test_linear_loss_equals_the_oracle(arguments, outputs, trained):
    case = make(301, 2500, outputs=outputs, trained=trained)
    truth, eager = run_loss(case, oracle_loss, torch.float64), run_loss(case, oracle_loss)
    actual = run_loss(case, prefcore.linear_loss, **arguments)
    assert set(actual) == set(truth)
    for name, value in actual.items():
        assert_no_worse_than(value, eager[name], truth[name], name, band=band(case, name, truth[name]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("known", [False, True])
def test_loss_scaling_is_exact(known, dtype):
    """A gradient that would vanish in 16 bits arrives as large as the scale makes it."""
    case = make(301, 700, dtype=dtype, plain=True, trained=("hidden", "inner", "outer"))
    scale = 2.0**14
    small = {"normalizer": 2.0**14}

    def op(*arguments, normalizer, **options):
        return prefcore.linear_loss(*arguments, **options, **small)

    def truth_op(*arguments, normalizer, **options):
        return oracle_loss(*arguments, **options, **small)

    truth = run_loss(case, truth_op, torch.float64, scale)
    actual = run_loss(case, op, None, scale, **({"grad_scale": scale} if known else {}))
    eps = torch.finfo(dtype).eps
    for name in ("d_hidden", "d_inner", "d_outer"):
        error = (actual[name].double() - truth[name]).norm() / truth[name].norm()
        # Operands, logits and results rounded: a hidden state, a weight and a probability, each twice at the most.
        magnitude = 1 + max(x.abs().max().item() for x in case.tensors.values())
        assert error < 8 * magnitude * eps, name


class Watch(TorchDispatchMode):
    """Flops of matrix products, and the largest tensor that has memory of its own."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.flops, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.numel())
        return out


def watch(case: Case, op: str, **arguments: Any) -> Watch:
    leaves = leaves_of(case)
    head = leaves["hidden"], leaves["weight"], case.targets
    arguments |= {"low_rank": (leaves["inner"], leaves["outer"])}
    seen = Watch(leaves["weight"])
    with seen:
        if op == "linear_loss":
            loss = prefcore.linear_loss(
                *head, [0, len(case.targets)], lambda stats, tile: stats.logps, **arguments
            ).loss
        else:
            loss = prefcore.linear_logprobs(*head, **arguments).logps.sum()
        if case.trained:
            loss.backward()
    return seen


WORK = pytest.mark.parametrize(
    ("op", "arguments", "trained", "of_weight", "of_outer"),
    [
        ("linear_logprobs", {}, (), 1, 1),
        ("linear_logprobs", {"schedule": "frozen"}, FROZEN, 2, 2),
        ("linear_logprobs", {"schedule": "retain"}, ("hidden", "inner", "outer"), 2, 3),
        ("linear_logprobs", {"schedule": "recompute"}, ("hidden", "inner", "outer"), 3, 4),
        ("linear_logprobs", {"schedule": "retain"}, ("inner", "outer"), 1, 3),
        ("linear_logprobs", {"schedule": "recompute"}, ("inner", "outer"), 2, 4),
        ("linear_loss", {}, ("hidden", "inner", "outer"), 2, 3),
        ("linear_loss", {}, ("inner", "outer"), 1, 3),
        ("linear_loss", {}, FROZEN, 2, 2),
        ("linear_loss", {}, (), 1, 1),
    ],
)


@pytest.fixture
def opened(monkeypatch):
    """No dispatch mode sees into a registered operator: its body is called instead."""
    launch = _Launchers(BACKENDS["cpu"].load)
    monkeypatch.setitem(OPERATORS, "cpu", _Operators(launch.forward, launch.backward))


@WORK
@pytest.mark.usefixtures("opened")
def test_work_is_what_the_schedule_says(op, arguments, trained, of_weight, of_outer):
    """Products of the size of the head, and of its low-rank part, whose rank is filled up to eight."""
    T, V, D, R = 60, 20000, 64, 5
    case = make(T, V, D, R, plain=True, ignored="none", trained=trained)
    expected = 2 * T * V * (of_weight * D + of_outer * 8)
    assert watch(case, op, **arguments).flops == expected
    options = {"schedule": "loop"} if op == "linear_loss" else arguments
    made = prefcore.plan(
        T, D, V, dtype=torch.float32, device="cpu", low_rank=R, hidden_requires_grad="hidden" in trained,
        weight_requires_grad="outer" in trained, **options,
    )  # fmt: skip
    assert made.flops == expected


def test_a_plan_counts_what_is_recomputed_and_kept():
    T, D, V, R = 4096, 4096, 128256, 16
    made = prefcore.plan(T, D, V, low_rank=R, schedule="loop", memory_budget=0)
    assert made.flops == 2 * T * V * (3 * D + 4 * R)
    mixed = prefcore.plan(T, D, V, low_rank=R, memory_budget=2048 * V * 2 * 8 // 7 + V * 2)
    assert mixed.tiles.retained == 2048
    assert mixed.flops == 2 * T * V * (2 * D + 3 * R) + 2 * 2048 * V * (D + R)
    dense = prefcore.plan(T, D, V, schedule="loop", memory_budget=2**30)
    loop = prefcore.plan(T, D, V, low_rank=R, schedule="loop", memory_budget=2**30)
    assert dense.peak_bytes - loop.peak_bytes > 4 * V * D * 0.9, "no gradient of the weight's size is kept"
    assert loop.bytes < dense.bytes


@pytest.mark.parametrize(("rank", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_plan_refuses_what_is_no_rank(rank, error):
    with pytest.raises(error, match="low_rank"):
        prefcore.plan(10, 8, 100, memory_budget=10**6, low_rank=rank)


@WORK
@pytest.mark.usefixtures("opened")
def test_nothing_of_the_weights_size_is_made(op, arguments, trained, of_weight, of_outer):
    V, D = 3000, 64
    case = make(D - 1, V, D, 7, plain=True, ignored="none", trained=trained)  # T x V < V x D: logits may be whole
    assert 0 < watch(case, op, **arguments).largest < V * D


@pytest.mark.parametrize("schedule", ["forward", "frozen", "retain", "recompute"])
def test_operators_are_registered_soundly(schedule):
    case = make(6, 50, R=8, ignored="none")
    hidden, weight, inner, outer, bias = (case.tensors[k] for k in ("hidden", "weight", "inner", "outer", "bias"))
    joined = torch.cat((hidden, inner), 1)
    scalars = (1.0, 3.0, 1.0, IGNORE, *(True,) * 5, None, schedule, None, True)
    inputs = (joined, weight, case.targets, bias, case.options["temperature"], outer)
    torch.library.opcheck(OPERATORS["cpu"].forward, (*inputs, *scalars))
    if schedule == "forward":
        return
    stats = OPERATORS["cpu"].forward(*inputs, *scalars)
    head = schedule != "frozen"
    for hidden_grad, inner_grad in ((True, True), (False, head)):
        needs = (hidden_grad, head, head, inner_grad, False, None)
        grads = torch.randn(6), torch.randn(6), None
        torch.library.opcheck(OPERATORS["cpu"].backward, (*grads, *inputs, stats[1], *stats[6:], *needs, *scalars))


@pytest.mark.parametrize(("schedule", "trained"), [("auto", ("A", "B", "hidden")), ("recompute", ("A", "B"))])
def test_one_compiled_graph_serves_every_length(schedule, trained):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden, weight, targets, A, B):
        stats = prefcore.linear_logprobs(
            hidden, weight, targets, low_rank=(2 * hidden @ A.t(), B), schedule=schedule, outputs=("entropy",)
        )
        return stats.logps.sum() + 0.1 * stats.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    g = torch.Generator().manual_seed(3)
    A, B, weight = (torch.randn(*shape, generator=g) for shape in ((3, 8), (1100, 3), (1100, 8)))
    graphs = []
    for T in (7, 40):
        hidden, targets = torch.randn(T, 8, generator=g), torch.randint(1100, (T,), generator=g)
        results = []
        for function in (step, compiled):
            given = {"A": A, "B": B, "hidden": hidden}
            leaves = {k: x.clone().requires_grad_(k in trained) for k, x in given.items()}
            loss = function(leaves["hidden"], weight, targets, leaves["A"], leaves["B"])
            loss.backward()
            results.append((loss.detach(), *(leaves[k].grad for k in trained)))
        torch.testing.assert_close(results[1], results[0])
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[0], f"compiled again for another length: {graphs}"


def good() -> dict[str, Any]:
    return {
        "hidden": torch.randn(4, 8),
        "weight": torch.randn(10, 8),
        "targets": torch.tensor([0, 9, IGNORE, 3]),
        "low_rank": (torch.randn(4, 2), torch.randn(10, 2)),
    }


INNER, OUTER = torch.ones(4, 2), torch.ones(10, 2)


@pytest.mark.parametrize("op", ["linear_logprobs", "linear_loss"])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"low_rank": INNER}, TypeError, r"low_rank must be a tuple \(inner, outer\) or None, got Tensor"),
        ({"low_rank": [INNER, OUTER]}, TypeError, "got list"),
        ({"low_rank": (INNER,)}, TypeError, "got tuple of 1"),
        ({"low_rank": (INNER, None)}, TypeError, "outer of low_rank must be a Tensor, got NoneType"),
        ({"low_rank": (INNER[:3], OUTER)}, ValueError, r"inner of low_rank .* the rows of hidden, \(4, 8\)"),
        ({"low_rank": (INNER[:, :0], OUTER[:, :0])}, ValueError, "R >= 1"),
        ({"low_rank": (INNER[0, 0], OUTER)}, ValueError, r"inner of low_rank \[..., R\]"),
        ({"low_rank": (INNER, OUTER[:9])}, ValueError, r"outer of low_rank \[V, R\] with V = 10 and R = 2"),
        ({"low_rank": (INNER, OUTER.t())}, ValueError, r"got \(2, 10\)"),
        ({"low_rank": (INNER.half(), OUTER)}, ValueError, "inner must have the dtype of hidden"),
        ({"low_rank": (INNER, OUTER.double())}, ValueError, "outer must have the dtype of hidden"),
        ({"low_rank": (INNER, OUTER.to("meta"))}, ValueError, "one device"),
        ({"weight": torch.ones(10, 8, requires_grad=True)}, NotImplementedError, "a weight that does not train"),
        ({"weight_grad_out": torch.zeros(10, 8)}, ValueError, "does not require one"),
    ],
)  # fmt: skip
def test_refusals(change, error, match, op):
    arguments = good() | change
    if op == "linear_loss":
        arguments |= {"cu_seqlens": [0, 4], "loss_fn": lambda stats, tile: stats.logps}
    with pytest.raises(error, match=match):
        getattr(prefcore, op)(**arguments)


def test_a_weight_that_trains_is_served_where_no_gradient_is_taken():
    arguments = good()
    expected = prefcore.linear_logprobs(**arguments).logps
    arguments["weight"].requires_grad_()
    with torch.no_grad():
        assert torch.equal(prefcore.linear_logprobs(**arguments).logps, expected)


def test_frozen_refuses_an_outer_factor_that_trains():
    arguments = good()
    arguments["low_rank"][1].requires_grad_()
    with pytest.raises(ValueError, match="frozen"):
        prefcore.linear_logprobs(**arguments, schedule="frozen")


PAIR = ("hidden", "inner", "outer", "bias", "other_hidden", "other_inner", "other_outer", "other_bias")


def make_pair(T: int, V: int, dtype: torch.dtype, trained: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Both sides' tensors, of other widths and ranks."""
    first = make(T, V, 8, 3, dtype, trained=trained).tensors
    other = make(T, V, 6, 9, dtype, trained=trained).tensors
    both = first | {f"other_{name}": x for name, x in other.items()}
    return {name: (x / 2).requires_grad_(name in trained) for name, x in both.items()}


def run_pair(op: Any, tensors: dict, targets: torch.Tensor | None, trained: tuple, joined: bool = False, **arguments):
    given = {name: x.detach().requires_grad_(name in trained) for name, x in tensors.items()}
    call = dict(given)
    for prefix in ("", "other_"):
        inner, outer = call.pop(f"{prefix}inner"), call.pop(f"{prefix}outer")
        if joined:
            call[f"{prefix}hidden"] = torch.cat((call[f"{prefix}hidden"], inner), -1)
            call[f"{prefix}weight"] = torch.cat((call[f"{prefix}weight"], outer), -1)
        else:
            call[f"{prefix}low_rank"] = inner, outer
    stats = op(**call, targets=targets, outputs=("entropy", "other_entropy"), other_softcap=2.0, **arguments)
    named = {name: x for name, x in stats._asdict().items() if x is not None}
    weights = torch.linspace(-1, 2, stats.divergence.shape[0], dtype=torch.float64)
    loss = sum((x * weights * (1 + 0.3 * k)).sum() for k, x in enumerate(named.values()) if x.requires_grad)
    grads = torch.autograd.grad(loss, [given[name] for name in trained], allow_unused=True)
    return {k: x.detach() for k, x in named.items()} | {
        f"d_{k}": torch.zeros_like(given[k]) if g is None else g for k, g in zip(trained, grads, strict=True)
    }


def check_pair(kind: str, impl: str, trained: tuple[str, ...], T: int = 150, V: int = 1300, **arguments: Any) -> None:
    tensors, targets = make_pair(T, V, torch.float32, trained), make(T, V).targets
    for name in ("hidden", "inner", "other_inner"):
        tensors[name].detach()[targets == IGNORE] = torch.nan
    wide = {name: x.detach().double() for name, x in tensors.items()}
    truth = run_pair(reference.linear_divergence, wide, targets, trained, joined=True, kind=kind)
    eager = run_pair(reference.linear_divergence, tensors, targets, trained, joined=True, kind=kind)
    actual = run_pair(prefcore.linear_divergence, tensors, targets, trained, kind=kind, impl=impl, **arguments)
    kept = targets != IGNORE
    logits = max(
        (wide[f"{side}hidden"] @ wide[f"{side}weight"].t())[kept].abs().max().item()
        + (wide[f"{side}inner"] @ wide[f"{side}outer"].t())[kept].abs().max().item()
        for side in ("", "other_")
    )
    eps = torch.finfo(torch.float32).eps
    for name, value in actual.items():
        # As a logit's rounding; of a gradient relative to its own size.
        size = max(1.0, logits) * (max(1.0, truth[name].abs().max().item()) if name.startswith("d_") else 1.0)
        assert_no_worse_than(value, eager[name], truth[name], name, band=eps * size * 4)  # 1/(alpha·(1 - alpha))


@pytest.mark.parametrize("kind", ["kl_pq", "kl_qp", "js", "alpha", "tv"])
@pytest.mark.parametrize(
    "trained",
    [PAIR, PAIR[:4], PAIR[4:], ("inner", "outer"), ("hidden", "other_outer"), ("other_inner", "other_outer", "bias")],
    ids="-".join,
)
def test_a_divergence_of_either_side_or_both(trained, kind):
    check_pair(kind, "cpu", trained)
    check_pair(kind, "cpu", trained, memory_budget=TINY)


@pytest.mark.parametrize("kind", ["kl_qp", "js"])
@pytest.mark.parametrize("impl", [pytest.param("triton", marks=interpreted), "reference"])
def test_a_divergence_in_every_implementation(impl, kind):
    check_pair(kind, impl, PAIR, T=7, V=300)


@pytest.mark.parametrize("kind", ["kl_qp", "tv"])
def test_a_policy_may_share_its_weight_and_its_factors_with_the_other_side(kind):
    tensors = make_pair(20, 300, torch.float64, ())
    hidden, weight, inner, outer, other = (
        tensors[k] for k in ("hidden", "weight", "inner", "outer", "hidden")
    )  # fmt: skip
    results = []
    for copied in (False, True):
        factor, state = outer.clone().requires_grad_(), hidden.clone().requires_grad_()
        second = factor.clone() if copied else factor
        stats = prefcore.linear_divergence(
            state, weight, other.flip(0), weight.clone() if copied else weight, kind=kind,
            low_rank=(inner, factor), other_low_rank=(inner, second),
        )  # fmt: skip
        (stats.divergence * torch.arange(20)).sum().backward()
        results.append((stats.divergence.detach(), factor.grad, state.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_divergence_with_one_low_rank_part_alone_compiles():
    torch.compiler.reset()
    tensors = make_pair(20, 300, torch.float32, ())

    def step(hidden, inner, outer):
        return prefcore.linear_divergence(
            hidden, tensors["weight"], tensors["other_hidden"], tensors["other_weight"], kind="kl_qp",
            low_rank=(inner, outer),
        ).divergence.sum()  # fmt: skip

    results = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")):
        leaves = [tensors[name].clone().requires_grad_() for name in ("hidden", "inner", "outer")]
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[1], results[0])


def test_a_divergences_work_is_that_of_the_factors(monkeypatch):
    T, V, D, E, R = 50, 9000, 8, 6, 8
    tensors = make_pair(T, V, torch.float32, ())
    counted: list[int] = []
    for name in ("mm", "addmm"):
        product = getattr(_walk, name)
        monkeypatch.setattr(
            _walk,
            name,
            lambda out, a, b, product=product: (
                counted.append(2 * a.shape[0] * a.shape[1] * b.shape[1]),
                product(out, a, b),
            ),
        )
    inner, outer = tensors["inner"].requires_grad_(), tensors["outer"].requires_grad_()
    stats = prefcore.linear_divergence(
        tensors["hidden"], tensors["weight"], tensors["other_hidden"], tensors["other_weight"], kind="kl_qp",
        low_rank=(inner, outer),
    )  # fmt: skip
    stats.divergence.sum().backward()
    assert sum(counted) == 2 * T * V * (D + E + 3 * R)


@pytest.mark.parametrize("name", ["low_rank", "other_low_rank"])
def test_refusals_of_a_divergence_name_the_side(name):
    prefix = name.removesuffix("low_rank")
    tensors = make_pair(4, 10, torch.float32, ())
    sides = {k: tensors[k] for k in ("hidden", "weight", "other_hidden", "other_weight")}
    inner, outer = tensors[f"{prefix}inner"], tensors[f"{prefix}outer"]
    with pytest.raises(ValueError, match=f"outer of {name}"):
        prefcore.linear_divergence(**sides, kind="js", **{name: (inner, outer[1:])})
    sides[f"{prefix}weight"].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"^{name} is for a weight that does not train"):
        prefcore.linear_divergence(**sides, kind="js", **{name: (inner, outer)})
