"""A head's weight of another float type than the hidden states: as one that is cast first, without the copy."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prefcore
from prefcore import _impl, reference
from prefcore.ops._backends import BACKENDS
from prefcore.testing import assert_no_worse_than

IGNORE = -100
TINY = 1  # bytes: one tile of 128 x 1024 at a time
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
PAIRS = pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(BF16, F32), (F32, F16), (F16, BF16)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
HEAD, FROZEN, PART = ("hidden", "weight", "bias"), ("hidden",), ("hidden", "inner", "outer", "bias")
# Of linear_loss the last two are arguments that lead to other code.
CASES = [
    pytest.param("linear_logprobs", {"schedule": "retain"}, HEAD, id="retain"),
    pytest.param("linear_logprobs", {"schedule": "retain", "memory_budget": 600_000}, HEAD, id="mixed"),
    pytest.param("linear_logprobs", {"schedule": "recompute", "memory_budget": TINY}, HEAD, id="recompute"),
    pytest.param("linear_logprobs", {"schedule": "retain"}, ("weight",), id="weight-alone"),
    pytest.param("linear_logprobs", {"schedule": "frozen", "memory_budget": TINY}, FROZEN, id="frozen"),
    pytest.param("linear_logprobs", {}, (), id="forward"),
    pytest.param("linear_logprobs", {"schedule": "retain"}, PART, id="retain-low-rank"),
    pytest.param("linear_logprobs", {"schedule": "recompute", "memory_budget": TINY}, PART, id="recompute-low-rank"),
    pytest.param("linear_logprobs", {}, ("hidden", "inner"), id="frozen-low-rank"),
    pytest.param("linear_loss", {}, HEAD, id="loss"),
    pytest.param("linear_loss", {"memory_budget": TINY}, HEAD, id="loss-tiles"),
    pytest.param("linear_loss", {"grad_scale": 2.0}, HEAD, id="loss-grad-scale"),
    pytest.param("linear_loss", {"grad_scale": 2.0, "memory_budget": TINY}, HEAD, id="loss-grad-scale-tiles"),
    pytest.param("linear_loss", {}, FROZEN, id="loss-frozen"),
    pytest.param("linear_loss", {}, PART, id="loss-low-rank"),
    pytest.param("linear_loss", {"grad_scale": 2.0}, PART, id="loss-grad-scale-low-rank"),
    pytest.param("linear_divergence", {"kind": "kl_qp", "schedule": "retain"}, HEAD, id="kl-retain"),
    pytest.param("linear_divergence", {"kind": "kl_pq", "memory_budget": TINY}, HEAD, id="kl-tiles"),
    pytest.param("linear_divergence", {"kind": "js"}, HEAD, id="js"),
    pytest.param("linear_divergence", {"kind": "tv", "memory_budget": TINY}, HEAD, id="tv-tiles"),
    pytest.param("linear_divergence", {"kind": "kl_qp"}, FROZEN, id="kl-frozen"),
    pytest.param("linear_divergence", {"kind": "alpha"}, PART, id="alpha-low-rank"),
]
interpreted = pytest.mark.skipif(
    not _impl.interpreting(), reason="Triton's interpreter is off: TRITON_INTERPRET=1 turns it on"
)
OFFSETS = [0, 40, 75, 150]


def make(trained: tuple[str, ...], op: str, T: int = 40, V: int = 1500, D: int = 8) -> dict[str, torch.Tensor]:
    """Tensors in float32 of one head; of a divergence of two, both sides' alike."""
    g = torch.Generator().manual_seed(V + D)
    shapes = {"hidden": (T, D), "weight": (V, D), "bias": (V,)}
    if "inner" in trained:
        shapes |= {"inner": (T, 3), "outer": (V, 3)}
    if op == "linear_divergence":
        shapes |= {f"other_{name}": (*shape[:1], *(size - 2 for size in shape[1:])) for name, shape in shapes.items()}
    tensors = {name: torch.randn(*shape, generator=g) * 0.7 for name, shape in shapes.items()}
    tensors["targets"] = torch.randint(V, (T,), generator=g).index_fill(0, torch.arange(2, T, 3), IGNORE)
    return tensors


def as_op_takes_them(tensors: dict, dtype: torch.dtype, weight_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weight and the bias in ``weight_dtype``, all others in ``dtype``."""
    heads = ("weight", "bias", "other_weight", "other_bias")
    return {k: x if k == "targets" else x.to(weight_dtype if k in heads else dtype) for k, x in tensors.items()}


def rounded(given: dict, dtype: torch.dtype, computed: torch.dtype) -> dict[str, torch.Tensor]:
    """What the products are of, the weight having been cast to ``dtype`` first; in ``computed``."""
    return {k: x if k == "targets" else x.to(dtype).to(computed) for k, x in given.items()}


def loss_fn(stats: prefcore.TokenStats, tile: prefcore.Tile) -> torch.Tensor:
    return -torch.nn.functional.logsigmoid(prefcore.sequence_reduce(stats.logps, tile.cu_seqlens, "mean"))


def weigh(statistics: Iterable[torch.Tensor]) -> torch.Tensor:
    """A number that depends on each entry of each of them in another way."""
    total = torch.zeros((), dtype=F64)
    for k, x in enumerate(statistics):
        total = total + (x * torch.linspace(-1, 2, len(x), dtype=F64) * (1 + 0.3 * k)).sum()
    return total


def run(module: Any, op: str, given: dict, trained: tuple[str, ...], **arguments: Any) -> dict[str, torch.Tensor]:
    """Results and gradients by name."""
    if op == "linear_divergence":
        trained = (*trained, *(f"other_{name}" for name in trained))
    call = {k: x.detach().clone().requires_grad_(k in trained) for k, x in given.items()}
    leaves = [call[name] for name in trained]
    for prefix in ("", "other_"):
        if f"{prefix}inner" in call:
            call[f"{prefix}low_rank"] = call.pop(f"{prefix}inner"), call.pop(f"{prefix}outer")
    scale = arguments.get("grad_scale", 1.0)
    if op == "linear_loss":
        offsets = torch.tensor(OFFSETS, dtype=torch.int32)
        if module is reference:
            arguments.pop("grad_scale", None)
        found = module.linear_loss(
            call.pop("hidden"), call.pop("weight"), call.pop("targets"), offsets, loss_fn, normalizer=3.0, **call,
            **arguments,
        )  # fmt: skip
        named = {"loss": found.loss, "logps": found.stats.logps}
        total = found.loss * scale
    else:
        stats = getattr(module, op)(**call, outputs=("entropy",), **arguments)
        named = {k: x for k, x in stats._asdict().items() if x is not None}
        # In the schedule frozen an entropy's gradient is another walk.
        total = weigh(named.values())
    grads = torch.autograd.grad(total, leaves) if trained else ()
    return {k: x.detach() for k, x in named.items()} | {f"d_{k}": g for k, g in zip(trained, grads, strict=True)}


def check(actual: dict, given: dict, dtype: torch.dtype, op: str, trained: tuple[str, ...], **arguments: Any) -> None:
    """Against the oracle of rounded operands in float64, by the error that it has in float32."""
    options = {k: v for k, v in arguments.items() if k in ("kind", "grad_scale")}
    eager, truth = (run(reference, op, rounded(given, dtype, wide), trained, **options) for wide in (F32, F64))
    assert set(actual) == set(truth)
    operands = rounded(given, dtype, F64)
    size = (operands["hidden"].abs() @ operands["weight"].abs().t()).max().item()
    eps = torch.finfo(F32).eps
    for name, value in actual.items():
        # A logit's rounding: of a value as it is, of a gradient relative to its size.
        own = max(1.0, truth[name].abs().max().item()) if name.startswith("d_") else 1.0
        if name.endswith("bias"):  # that is cast first indeed, and so is its gradient
            value = value.to(max(dtype, given["bias"].dtype, key=lambda each: torch.finfo(each).eps))
        assert_no_worse_than(value, eager[name], truth[name], name, band=eps * max(1.0, size) * own)


@PAIRS
@pytest.mark.parametrize(("op", "arguments", "trained"), CASES)
def test_a_weight_is_rounded_as_if_cast_first_and_its_gradient_is_not(op, arguments, trained, dtype, weight_dtype):
    given = as_op_takes_them(make(trained, op, T=OFFSETS[-1] if op == "linear_loss" else 40), dtype, weight_dtype)
    actual = run(prefcore, op, given, trained, logits_dtype=F32, **arguments)
    check(actual, given, dtype, op, trained, **arguments)
    assert all(x.dtype == given[name[2:]].dtype for name, x in actual.items() if name.startswith("d_"))


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=interpreted), "reference"])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(F16, F32), (F32, F16)])
def test_every_implementation_takes_it(dtype, weight_dtype, impl):
    for op, options in (("linear_logprobs", {}), ("linear_divergence", {"kind": "kl_qp"})):
        given = as_op_takes_them(make(HEAD, op, T=7, V=300), dtype, weight_dtype)
        actual = run(prefcore, op, given, HEAD, logits_dtype=F32, impl=impl, **options)
        if impl == "reference":  # where a cast's own backward rounds
            actual = {k: x for k, x in actual.items() if not k.endswith(("weight", "bias"))}
            expected = run(reference, op, rounded(given, dtype, F32), HEAD, **options)
            for name, value in actual.items():
                torch.testing.assert_close(value, expected[name].to(value.dtype), msg=name)
        else:
            check(actual, given, dtype, op, HEAD, **options)


@pytest.mark.parametrize("trained", [HEAD, FROZEN, PART], ids="-".join)
@pytest.mark.parametrize("op", ["linear_logprobs", "linear_loss", "linear_divergence"])
def test_autocast_is_bitwise_that_of_a_weight_cast_first(op, trained):
    """float16, since every CPU computes that in float32."""
    tensors = make(trained, op, T=OFFSETS[-1])
    options = {"kind": "js"} if op == "linear_divergence" else {}
    with torch.autocast("cpu", dtype=F16):
        actual = run(prefcore, op, tensors, trained, **options)
    expected = run(prefcore, op, as_op_takes_them(tensors, F16, F16), trained, **options)
    for name, value in actual.items():
        assert value.dtype == F32
        assert torch.equal(value.to(expected[name].dtype), expected[name]), name
        if name.endswith("weight"):
            assert not torch.equal(value, value.half().float())


def test_autocast_does_not_round_the_gradient_of_a_weight_beside_states_of_its_type():
    given = as_op_takes_them(make(HEAD, "linear_logprobs"), F16, F32)
    with torch.autocast("cpu", dtype=F16):
        first = run(prefcore, "linear_logprobs", given, HEAD)
    second = run(prefcore, "linear_logprobs", given, HEAD)
    assert all(torch.equal(first[name], second[name]) for name in first)


class Largest(TorchDispatchMode):
    """The types of the tensors of ``size`` elements or more that have memory of their own."""

    def __init__(self, size: int, *known: torch.Tensor) -> None:
        super().__init__()
        self.size, self.kept = size, list(known)
        self.seen = {x.untyped_storage().data_ptr() for x in known}
        self.made: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.numel() >= self.size:
                pointer = x.untyped_storage().data_ptr()
                if pointer not in self.seen:
                    self.made.append(x.dtype)
                self.seen.add(pointer)
                self.kept.append(x)  # so that no other gets its address
        return out


@pytest.fixture
def opened(monkeypatch):
    """No dispatch mode sees into a registered operator: its body is called instead."""
    for op, argument in (("linear_logprobs", BACKENDS["cpu"].load), ("linear_divergence", BACKENDS["cpu"])):
        module = importlib.import_module(f"prefcore.ops.{op}")
        launch = module._Launchers(argument)
        monkeypatch.setitem(module.OPERATORS, "cpu", module._Operators(launch.forward, launch.backward))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("weight_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("op", "arguments", "trained", "gradients"),
    [
        ("linear_logprobs", {"schedule": "retain"}, HEAD, 1),
        ("linear_logprobs", {"schedule": "recompute"}, HEAD, 1),
        ("linear_logprobs", {"schedule": "retain"}, ("weight",), 1),
        ("linear_logprobs", {"schedule": "frozen"}, FROZEN, 0),
        ("linear_logprobs", {}, (), 0),
        ("linear_logprobs", {}, PART, 0),
        ("linear_loss", {}, HEAD, 1),
        ("linear_loss", {"grad_scale": 1.0}, HEAD, 1),
        ("linear_loss", {}, FROZEN, 0),
        ("linear_loss", {}, PART, 0),
        ("linear_divergence", {"kind": "kl_qp"}, HEAD, 2),
        ("linear_divergence", {"kind": "tv"}, FROZEN, 0),
    ],
)
@pytest.mark.usefixtures("opened")
def test_nothing_of_the_weights_size_is_made_but_its_gradient(
    op, arguments, trained, gradients, weight_dtype, autocast
):
    T, V, D = 7, 20000, 18  # 2 x T x V < V x D: the logits of both sides may be whole
    tensors = make(trained, op, T, V, D)
    dtype = BF16 if weight_dtype == F32 else F32
    given = as_op_takes_them(tensors, F32 if autocast else dtype, weight_dtype)
    weights = [x for name, x in given.items() if name.endswith("weight")]
    with pytest.MonkeyPatch.context() as patch, Largest(V * (D - 2), *weights) as made:
        patch.setitem(globals(), "OFFSETS", [0, 5, T])
        # A clone of each leaf is the test's own.
        patch.setattr(torch.Tensor, "clone", lambda x, clone=torch.Tensor.clone: x if x.numel() > V else clone(x))
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            run(prefcore, op, given, trained, **arguments)
    sums = op == "linear_loss" and "grad_scale" not in arguments and weight_dtype != F32 and gradients
    assert made.made == [F32] * bool(sums) + [weight_dtype] * gradients


def whole_targets(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without ignored rows, which leave memory unwritten that two calls then differ in."""
    return given | {"targets": given["targets"].clamp(min=0)}


@pytest.mark.parametrize("schedule", ["frozen", "retain"])
def test_operators_are_registered_soundly(schedule):
    dtype = F16
    operators = importlib.import_module("prefcore.ops.linear_logprobs").OPERATORS["cpu"]
    given = whole_targets(as_op_takes_them(make(HEAD, "linear_logprobs", 6, 50), dtype, F32))
    scalars = (1.0, 3.0, 1.0, IGNORE, *(True,) * 5, None, schedule, None, True)
    inputs = (given["hidden"], given["weight"], given["targets"], given["bias"].to(dtype), None, None)
    torch.library.opcheck(operators.forward, (*inputs, *scalars))
    stats = operators.forward(*inputs, *scalars)
    head = schedule != "frozen"
    grads, needs = (torch.randn(6), torch.randn(6) if head else None, None), (True, head, head, False, False, None)
    torch.library.opcheck(operators.backward, (*grads, *inputs, stats[1], *stats[6:], *needs, *scalars))


def test_a_divergences_operators_are_registered_soundly(monkeypatch):
    operators = importlib.import_module("prefcore.ops.linear_divergence").OPERATORS
    called = []

    class Recorded:
        def __init__(self, pair):
            self.forward = lambda *args: called.append((pair.forward, args)) or pair.forward(*args)
            self.backward = lambda *args: called.append((pair.backward, args)) or pair.backward(*args)

    monkeypatch.setitem(operators, "cpu", Recorded(operators["cpu"]))
    given = whole_targets(as_op_takes_them(make(HEAD, "linear_divergence", 6, 50), F16, F32))
    run(prefcore, "linear_divergence", given, HEAD, kind="js")
    assert len(called) == 2
    for operator, arguments in called:
        arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_one_compiled_graph_serves_every_length():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden, weight, targets):
        return prefcore.linear_logprobs(hidden, weight, targets).logps.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for T in (7, 40):
        given = as_op_takes_them(make(HEAD, "linear_logprobs", T, 300), BF16, F32)
        results = []
        for function in (step, compiled):
            hidden, weight = (given[name].clone().requires_grad_() for name in ("hidden", "weight"))
            loss = function(hidden, weight, given["targets"])
            loss.backward()
            results.append((loss.detach(), hidden.grad, weight.grad))
        torch.testing.assert_close(results[1], results[0])
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0] > 0


@pytest.mark.parametrize("op", ["linear_logprobs", "linear_loss", "linear_divergence"])
def test_a_buffer_for_the_gradient_gets_it_unrounded(op):
    given = as_op_takes_them(make(HEAD, op, OFFSETS[-1]), F16, F32)
    options = {"kind": "kl_qp"} if op == "linear_divergence" else {}
    plain = run(prefcore, op, given, HEAD, **options)["d_weight"]
    peak = plain.abs().max().item()
    out = torch.full_like(plain, peak)
    leaf = given["weight"].requires_grad_()
    call = given | options | {"weight_grad_out": out}
    if op == "linear_loss":
        cu_seqlens = torch.tensor(OFFSETS, dtype=torch.int32)
        prefcore.linear_loss(**call, cu_seqlens=cu_seqlens, loss_fn=loss_fn, normalizer=3.0).loss.backward()
    else:
        stats = getattr(prefcore, op)(**call, outputs=("entropy",))
        weigh(x for x in stats if x is not None).backward()
    # A sum of as many terms as there are rows, in another order.
    rounding = OFFSETS[-1] * torch.finfo(F32).eps * 2 * peak
    torch.testing.assert_close(out - peak, plain, rtol=0, atol=rounding)
    assert leaf.grad is None
    with pytest.raises(ValueError, match="weight_grad_out must be float32"):
        prefcore.linear_logprobs(given["hidden"], leaf, given["targets"], weight_grad_out=out.half())


@pytest.mark.parametrize("options", [{}, {"schedule": "loop"}, {"weight_requires_grad": False}, {"divergence": "js"}])
def test_a_plan_counts_the_slice_that_is_converted(options):
    T, D, V = 512, 1024, 100_000
    made = {
        dtype: prefcore.plan(T, D, V, memory_budget=2**28, weight_dtype=dtype, **options) for dtype in (None, F32, BF16)
    }
    assert made[None] == made[BF16]
    slices = (made[F32].peak_bytes - made[None].peak_bytes) / (1 + ("divergence" in options))
    if "schedule" in options:  # a gradient in float32 is returned as it is summed up
        slices += 4 * D * V
    assert 0 < slices < 2 * D * V
    assert made[F32].flops == made[None].flops


def test_float64_goes_with_float64_alone():
    for dtypes in ((F64, F32), (F32, F64), (BF16, F64)):
        given = as_op_takes_them(make(HEAD, "linear_logprobs", 4, 10), *dtypes)
        given.pop("bias")
        with pytest.raises(ValueError, match="weight must be float64 beside float64 hidden states"):
            prefcore.linear_logprobs(**given)
        with pytest.raises(ValueError, match="weight_dtype must be float64 beside float64"):
            prefcore.plan(4, 8, 10, memory_budget=TINY, dtype=dtypes[0], weight_dtype=dtypes[1])
