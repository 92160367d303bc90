"""The row kernels of every back end against float64: one contract, one set of cases."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from prefcore import _impl, _native
from prefcore.ops._memory import advise_huge
from prefcore.ops._spec import LogitSpec, Row


class Backend(NamedTuple):
    module: ModuleType
    device: torch.device


def cpu() -> Backend:
    return Backend(importlib.import_module("prefcore.ops._rows_cpu"), torch.device("cpu"))


def triton_interpreted() -> Backend:
    if not _impl.interpreting():
        pytest.skip("Triton's interpreter is off: TRITON_INTERPRET=1 turns it on")
    return Backend(importlib.import_module("prefcore.kernels.logprobs"), torch.device("cpu"))


def triton_cuda() -> Backend:
    return Backend(importlib.import_module("prefcore.kernels.logprobs"), torch.device("cuda"))


# How to get each back end: a function, so that one that is missing here fails or skips only its own cases.
BACKENDS: dict[str, Callable[[], Backend]] = {
    "cpu-baseline": cpu,
    "cpu-avx2": cpu,
    "cpu-avx512": cpu,
    "triton-interpreted": triton_interpreted,
    "triton-cuda": triton_cuda,
}

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
IGNORE = -100


def interpreted(backend: Backend) -> bool:
    return backend.module.__name__.startswith("prefcore.kernels") and backend.device.type == "cpu"


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.gpu] if name.endswith("cuda") else []) for name in BACKENDS]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    found = BACKENDS[request.param]()
    kind, _, isa = request.param.partition("-")
    if kind == "cpu":
        names = _native.require().cpu_isa_names()
        if isa not in names:
            pytest.skip(f"this machine's instruction sets are {names}")
        monkeypatch.setattr(found.module, "_level", lambda: names.index(isa))
    return found


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# The oracle is dense and computes in the dtype it is told: float64 is the truth, float32 is eager PyTorch.


class Logits(NamedTuple):
    z: torch.Tensor  # [R, V]
    slope: torch.Tensor  # [R, V], 1 - tanh^2 of the softcap
    factor: torch.Tensor  # [R, 1], logit_scale / temperature


class Truth(NamedTuple):
    logits: Logits
    logp: torch.Tensor  # [R, V]
    entropy: torch.Tensor  # [R]
    onehot: torch.Tensor  # [R, V]


@dataclasses.dataclass
class Case:
    x: torch.Tensor
    targets: torch.Tensor
    spec: LogitSpec
    temperature: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def acc(self) -> torch.dtype:
        return acc_dtype(self.x.dtype)

    @property
    def valid(self) -> torch.Tensor:
        return (self.targets >= 0) & (self.targets < self.spec.vocab)

    def oracle(self, dtype: torch.dtype) -> Truth:
        spec = self.spec
        x = self.x if spec.round_to is None else self.x.to(spec.round_to)
        x = x.to(dtype)
        u = spec.logit_scale * (x if self.bias is None else x + self.bias.to(dtype))
        slope = torch.ones_like(u)
        if spec.softcap is not None:
            t = torch.tanh(u / spec.softcap)
            u, slope = spec.softcap * t, 1 - t * t
        column = torch.full_like(u[:, :1], spec.temperature)
        if self.temperature is not None:
            column = self.temperature.to(dtype)[:, None]
        z = u / column
        logp = torch.log_softmax(z, -1)
        p = logp.exp()
        entropy = -torch.where(p == 0, 0.0, p * logp).sum(-1)
        columns = torch.arange(spec.vocab, device=z.device)
        onehot = (self.targets[:, None] == columns).to(dtype)
        return Truth(Logits(z, slope, spec.logit_scale / column), logp, entropy, onehot)


def make(
    backend: Backend,
    dtype: torch.dtype = torch.float32,
    rows: int = 5,
    vocab: int = 1000,
    magnitude: float = 3.0,
    options: str = "",
    **spec: object,
) -> Case:
    """A seeded case; ``options`` are among bias, half_bias, temperature, masked, ignored, softcap, scale."""
    chosen = set(options.split())
    generator = torch.Generator().manual_seed(rows * 100003 + vocab)
    x = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * magnitude
    if "masked" in chosen:
        x[torch.rand(rows, vocab, generator=generator) < 0.3] = -math.inf
        x[:, vocab // 2] = 0.5
    targets = torch.randint(vocab, (rows,), generator=generator)
    if rows > 1:
        targets[0], targets[-1] = 0, vocab - 1
    if "masked" in chosen:
        targets[:] = vocab // 2
    x = x.to(dtype)
    if "ignored" in chosen:
        targets[1::2] = IGNORE
        x[1::2] = math.nan
    temperature = bias = None
    if "temperature" in chosen:
        temperature = (torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5).to(acc_dtype(dtype))
    if "bias" in chosen:
        bias = torch.randn(vocab, generator=generator, dtype=torch.float64).to(dtype)
    if "half_bias" in chosen:
        bias = torch.randn(vocab, generator=generator, dtype=torch.float64).to(torch.bfloat16)
    if "softcap" in chosen:
        spec["softcap"] = 2.5
    if "scale" in chosen:
        spec |= {"logit_scale": 0.7, "temperature": 1.3}
    where = backend.device
    return Case(
        x.to(where),
        targets.to(where),
        LogitSpec(vocab, entropy=True, mean=True, squares=True, top1=True, **spec),  # type: ignore[arg-type]
        None if temperature is None else temperature.to(where),
        None if bias is None else bias.to(where),
    )


OPTIONS = [
    "",
    "bias temperature",
    "softcap scale half_bias",
    "masked",
    "ignored",
    "ignored bias softcap temperature",
]


def assert_within_eager(
    actual: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor, band: torch.Tensor | float = 0.0
) -> None:
    """At most twice eager's largest error from float64, plus one rounding of the result and ``band``.

    For a float64 result eager's error is the one it makes in float32, to scale; the truth has as much.
    """
    assert actual.shape == truth.shape
    assert torch.equal(actual.isnan(), truth.isnan())
    info = torch.finfo(actual.dtype)
    error = (actual.double() - truth).abs().nan_to_num(0.0, posinf=math.inf)
    error[actual.double() == truth] = 0.0  # infinities that agree
    eager_error = (eager.to(actual.dtype).double() - truth).abs().nan_to_num(0.0, posinf=0.0)
    worst = eager_error.max().item() if eager_error.numel() else 0.0
    if actual.dtype == torch.float64:
        worst *= 1.5 * info.eps / torch.finfo(torch.float32).eps
    finite = truth.abs().nan_to_num(0.0, posinf=0.0)
    allowed = 2 * worst + info.eps * finite + band + info.tiny * info.eps
    excess = (error - allowed).max().item() if error.numel() else 0.0
    assert excess <= 0, f"largest error {error.max().item():.3g}, eager's {worst:.3g}, over by {excess:.3g}"


def inexact(case: Case) -> float:
    """What instructions add, beside roundings, to the relative error of an exp(z - peak).

    By the PTX manual ex2.approx.ftz.f32 errs by up to 2^-22, and so does div.full.f32, which a tanh ends with: that
    error is one of z and of the peak. Elsewhere exp and division are good to a rounding or so.
    """
    if case.x.device.type != "cuda" or torch.version.hip or case.acc == torch.float64:
        return 0.0
    z = case.oracle(torch.float64).logits.z if case.spec.softcap is not None else torch.zeros(1)
    return 2.0**-22 * (1 + 2 * z.abs().nan_to_num(0.0, posinf=0.0).max().item())


def slices(vocab: int, pieces: int) -> list[tuple[int, int]]:
    """Uneven consecutive column ranges that cover the vocabulary."""
    cuts = sorted({0, vocab, *(vocab * k * k // (pieces * pieces) for k in range(1, pieces))})
    return list(itertools.pairwise(cuts))


def new_state(case: Case) -> torch.Tensor:
    """A fresh state, as a column slice of a wider one."""
    rows = len(case.targets)
    wide = torch.zeros(len(Row), rows + 3, dtype=case.acc, device=case.x.device)
    state = wide[:, 2 : 2 + rows]
    state[[Row.PEAK, Row.BEFORE]] = -math.inf
    return state


def cut(bias: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
    return None if bias is None else bias[start:stop]


def run_stats(backend: Backend, case: Case, pieces: int = 1) -> torch.Tensor:
    state = new_state(case)
    for start, stop in slices(case.spec.vocab, pieces):
        tile = case.x[:, start:stop]
        bias = cut(case.bias, start, stop)
        backend.module.stats(tile, start, case.targets, case.temperature, bias, case.spec, state)
    return state


def exact_state(case: Case) -> torch.Tensor:
    """The final state in float64, rounded to the accumulation type."""
    logits, *_ = case.oracle(torch.float64)
    z = logits.z
    peak = z.max(-1).values
    shifted = z - peak[:, None]
    e = shifted.exp()
    index = case.targets.clamp(0, case.spec.vocab - 1)[:, None]
    state = torch.stack(
        [
            peak,
            e.sum(-1),
            z.gather(1, index)[:, 0].where(case.valid, torch.nan),
            torch.where(e == 0, 0.0, e * shifted).sum(-1),
            z.sum(-1),
            (e * e).sum(-1),
            z.where(torch.arange(z.shape[1], device=z.device) < index, -torch.inf).max(-1).values,
        ]
    )
    return state.to(case.acc)


def assert_statistics(case: Case, state: torch.Tensor) -> None:
    """Check every row of the state, by what callers derive from it."""
    kept = case.targets != IGNORE
    untouched = new_state(case)[:, ~kept]
    assert torch.equal(state[:, ~kept], untouched)
    assert (state[Row.TOTAL, kept] >= 1).all()

    def derived(dtype: torch.dtype) -> list[torch.Tensor]:
        truth = case.oracle(dtype)
        index = case.targets.clamp(0, case.spec.vocab - 1)[:, None]
        logp = truth.logp.gather(1, index)[:, 0].where(case.valid, torch.nan)
        lse = truth.logits.z.logsumexp(-1)
        squares = (2 * truth.logp).logsumexp(-1)
        return [x[kept] for x in (logp, lse, truth.entropy, truth.logits.z.mean(-1), squares)]

    peak, total, target, shifted, summed, squares, _ = state[:, kept]
    logp = (target - peak) - total.log()
    assert not (logp > 0).any()
    actual = [
        logp,
        peak + total.log(),
        total.log() - shifted / total,
        summed / case.spec.vocab,
        squares.log() - 2 * total.log(),
    ]
    z = case.oracle(torch.float64).logits.z[kept]
    size = z.abs().nan_to_num(0.0, posinf=0.0)
    band = torch.finfo(case.acc).eps * (size.max().item() if size.numel() else 0.0)
    # The entropy is the worst: an error of the weights in the mean of z - peak, which is at most log(vocab) below 0.
    band += inexact(case) * (1 + 2 * math.log(case.spec.vocab))
    for value, truth, eager in zip(actual, derived(torch.float64), derived(torch.float32), strict=True):
        assert_within_eager(value, truth, eager, band)


def expected_grad(case: Case, dtype: torch.dtype, coef: torch.Tensor | None) -> torch.Tensor:
    truth = case.oracle(dtype)
    p = truth.logp.exp()
    if coef is None:
        inner = truth.onehot - p
    else:
        a, b, c = coef.to(dtype)[:, :, None]
        entropic = torch.where(p == 0, 0.0, p * (truth.logp + truth.entropy[:, None]))
        inner = a * truth.onehot - b * p - c * entropic
    grad = truth.logits.factor * truth.logits.slope * inner
    grad[~case.valid] = math.nan
    grad[case.targets == IGNORE] = 0.0
    return grad


def inexact_grad(case: Case, coef: torch.Tensor | None) -> float:
    """What that makes of a gradient: an error of p, of the sum p is a part of, and of 1 - tanh², the factor of all."""
    if coef is None:
        coef = torch.tensor([[1.0], [1.0], [0.0]])
    a, b, c = coef.abs().amax(1).tolist()
    steepest = case.oracle(torch.float64).logits.factor.abs().max().item()
    return 4 * inexact(case) * steepest * (a + b + c * (1 + math.log(case.spec.vocab)))


def assert_gradient(case: Case, out: torch.Tensor, coef: torch.Tensor | None = None) -> None:
    truth, eager = (expected_grad(case, dtype, coef) for dtype in (torch.float64, torch.float32))
    assert_within_eager(out, truth, eager, inexact_grad(case, coef))


def output_for(case: Case, dtype: torch.dtype, in_place: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The tile to read and the output to write; rows of both are strided."""
    rows, vocab = case.x.shape
    tile = torch.empty(rows, vocab + 5, dtype=case.x.dtype, device=case.x.device)[:, 2 : 2 + vocab]
    tile.copy_(case.x)
    if in_place:
        return tile, tile
    return tile, torch.full((rows, vocab + 3), 7.0, dtype=dtype, device=case.x.device)[:, :vocab]


PLACES = [(*pair, False) for pair in PAIRS] + [(dtype, dtype, True) for dtype in DTYPES]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_of_slices_agree_with_float64(backend: Backend, dtype: torch.dtype, options: str) -> None:
    case = make(backend, dtype, options=options)
    for pieces in (1, 3):
        assert_statistics(case, run_stats(backend, case, pieces))


@pytest.mark.parametrize("vocab", [1, 17, 1023, 1025, 32001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stats_hold_for_any_vocabulary(backend: Backend, dtype: torch.dtype, vocab: int) -> None:
    case = make(backend, dtype, rows=3, vocab=vocab)
    for pieces in (1, 4):
        assert_statistics(case, run_stats(backend, case, pieces))


@pytest.mark.parametrize("shape", ["alternating", "negative", "one_hot", "ties", "rising", "falling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_total_is_at_least_one_for_extreme_logits(backend: Backend, dtype: torch.dtype, shape: str) -> None:
    case = make(backend, dtype, rows=4, vocab=2500, options="bias")
    column = torch.arange(2500, device=backend.device)
    values = {
        "alternating": torch.where(column % 2 == 0, 1e4, -1e4),
        "negative": -1e4 - column / 500,
        "one_hot": torch.where(column == 2100, 1e4, 0.0),
        "ties": torch.full_like(column, -123.25, dtype=torch.float64),
        "rising": column * 4.0,
        "falling": column * -4.0,
    }[shape]
    case.x = values.to(dtype).expand(4, -1).contiguous()
    case.bias = None if shape == "ties" else case.bias
    for pieces in (1, 3):
        assert_statistics(case, run_stats(backend, case, pieces))


def test_a_slice_that_is_wholly_masked_adds_nothing(backend: Backend) -> None:
    case = make(backend, options="masked")
    case.x[:, :400] = -math.inf
    state = new_state(case)
    backend.module.stats(case.x[:, :400], 0, case.targets, None, None, case.spec, state)
    assert (state[Row.PEAK] == -math.inf).all()
    assert (state[[Row.TOTAL, Row.SHIFTED, Row.SQUARES]] == 0).all()
    backend.module.stats(case.x[:, 400:], 400, case.targets, None, None, case.spec, state)
    assert_statistics(case, state)


@pytest.mark.parametrize("bad", [-1, 1000, 2**40, -(2**40)])
def test_a_target_outside_the_vocabulary_gives_nan(backend: Backend, bad: int) -> None:
    case = make(backend)
    case.targets[2] = bad
    state = run_stats(backend, case, 2)
    assert_statistics(case, state)
    tile, out = output_for(case, torch.float32, in_place=False)
    backend.module.grad(tile, out, 0, case.targets, None, None, case.spec, state, None, None)
    assert torch.equal(out.isnan().any(-1), ~case.valid)
    assert out[2].isnan().all()
    fresh = new_state(case)
    backend.module.stats_grad(tile, out, case.targets, None, None, case.spec, fresh)
    assert fresh[Row.TARGET, 2].isnan()
    assert out[2].isnan().all()
    assert not out[~case.targets.eq(bad)].isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_no_number_reaches_the_result(backend: Backend, value: float) -> None:
    case = make(backend)
    case.x[3, 700] = value
    state = run_stats(backend, case, 2)
    logp = (state[Row.TARGET] - state[Row.PEAK]) - state[Row.TOTAL].log()
    assert logp.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("dtype", "out_dtype", "in_place"), PLACES)
def test_weights_are_relative_to_the_running_peak(
    backend: Backend, dtype: torch.dtype, out_dtype: torch.dtype, in_place: bool, options: str
) -> None:
    case = make(backend, dtype, options=options)
    tile, out = output_for(case, out_dtype, in_place)
    state, acc, product = new_state(case), None, None
    for start, stop in slices(case.spec.vocab, 3):
        bias = cut(case.bias, start, stop)
        before = state[Row.PEAK].clone()
        backend.module.weigh(
            tile[:, start:stop],
            out[:, start:stop],
            start,
            case.targets,
            case.temperature,
            bias,
            case.spec,
            state,
            acc,
        )
        if acc is None:
            acc = torch.ones(5, 9, dtype=case.acc, device=case.x.device)[:, 1:8]
            product = torch.ones(5, dtype=torch.float64, device=case.x.device)
        else:
            moved = (before != state[Row.PEAK]) & (case.targets != IGNORE)
            product = torch.where(moved, product * (before - state[Row.PEAK]).double().exp(), product)
        weights, eager = (
            torch.where(
                (case.targets == IGNORE)[:, None],
                0.0,
                (logits.z - state[Row.PEAK].to(logits.z.dtype)[:, None]).exp() * logits.slope,
            )[:, start:stop]
            for logits in (case.oracle(torch.float64).logits, case.oracle(torch.float32).logits)
        )
        assert_within_eager(out[:, start:stop], weights, eager, 4 * inexact(case))
        rtol = 4 * torch.finfo(case.acc).eps + 2 * inexact(case)  # two factors
        assert torch.allclose(acc.double(), product[:, None].expand_as(acc), rtol=rtol, atol=0)
    assert_statistics(case, state)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_coef", [False, True])
@pytest.mark.parametrize(("dtype", "out_dtype", "in_place"), PLACES)
def test_grad_of_slices_agrees_with_float64(
    backend: Backend,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    in_place: bool,
    with_coef: bool,
    options: str,
) -> None:
    case = make(backend, dtype, options=options)
    tile, out = output_for(case, out_dtype, in_place)
    coef = entropy = None
    if with_coef:
        generator = torch.Generator().manual_seed(5)
        coef = torch.randn(3, 7, generator=generator, dtype=torch.float64).to(case.x.device, case.acc)[:, 1:6]
        entropy = case.oracle(torch.float64).entropy.to(case.acc)
    state = exact_state(case)
    for start, stop in slices(case.spec.vocab, 3):
        bias = cut(case.bias, start, stop)
        backend.module.grad(
            tile[:, start:stop],
            out[:, start:stop],
            start,
            case.targets,
            case.temperature,
            bias,
            case.spec,
            state,
            entropy,
            coef,
        )
    assert_gradient(case, out, coef)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("dtype", "out_dtype", "in_place"), PLACES)
def test_stats_grad_is_both_at_once(
    backend: Backend, dtype: torch.dtype, out_dtype: torch.dtype, in_place: bool, options: str
) -> None:
    case = make(backend, dtype, options=options)
    tile, out = output_for(case, out_dtype, in_place)
    state = new_state(case)
    backend.module.stats_grad(tile, out, case.targets, case.temperature, case.bias, case.spec, state)
    assert_statistics(case, state)
    assert_gradient(case, out)


@pytest.mark.parametrize("vocab", [1, 17, 1025, 32001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_hold_for_any_vocabulary(backend: Backend, dtype: torch.dtype, vocab: int) -> None:
    case = make(backend, dtype, rows=3, vocab=vocab, options="softcap")
    tile, out = output_for(case, dtype, in_place=False)
    backend.module.stats_grad(tile, out, case.targets, None, None, case.spec, new_state(case))
    assert_gradient(case, out)
    state = new_state(case)
    backend.module.weigh(tile, out, 0, case.targets, None, None, case.spec, state, None)
    assert_statistics(case, state)
    beyond = out.as_strided((3, 3), (out.stride(0), 1), vocab)
    assert (beyond == 7).all()


@pytest.mark.parametrize(
    ("dtype", "round_to"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
    ],
)
def test_logits_are_rounded_before_the_bias(backend: Backend, dtype: torch.dtype, round_to: torch.dtype) -> None:
    case = make(backend, dtype, options="bias", round_to=round_to)
    state = run_stats(backend, case, 2)
    assert_statistics(case, state)
    tile, out = output_for(case, dtype, in_place=True)
    backend.module.grad(tile, out, 0, case.targets, None, case.bias, case.spec, exact_state(case), None, None)
    assert_gradient(case, out)


@pytest.mark.parametrize("round_to", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even_over_the_whole_range(backend: Backend, round_to: torch.dtype) -> None:
    # One column of all exponents, ties included: TARGET is then the rounded value itself.
    base = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1.7, 2 - 2**-20])
    x = torch.cat([sign * base * 2.0**k for k in range(-40, 16) for sign in (1, -1)] + [torch.zeros(1)])
    x = x.to(backend.device)[:, None].float()
    spec = LogitSpec(1, round_to=round_to)
    state = torch.zeros(len(Row), len(x), device=backend.device)
    state[Row.PEAK] = -math.inf
    targets = torch.zeros(len(x), dtype=torch.long, device=x.device)
    backend.module.stats(x, 0, targets, None, None, spec, state)
    assert torch.equal(state[Row.TARGET], x[:, 0].to(round_to).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_read_and_written_exactly(backend: Backend, dtype: torch.dtype) -> None:
    # Every finite value as a row of one column: TARGET is the value read.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).to(backend.device)
    x = x[x.isfinite()][:, None]
    if interpreted(backend):  # at 10 ms a row: every 127th value, with all exponents among them
        x = x[::127]
    targets = torch.zeros(len(x), dtype=torch.long, device=x.device)
    state = torch.zeros(len(Row), len(x), device=backend.device)
    state[Row.PEAK] = -math.inf
    backend.module.stats(x, 0, targets, None, None, LogitSpec(1), state)
    assert torch.equal(state[Row.TARGET], x[:, 0].float())
    # With b = c = 0 what is written at the target is a, a float32 to be rounded.
    state[:] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], device=x.device)[:, None]
    scale = torch.linspace(0.97, 1.03, len(x), device=x.device)
    coef = torch.zeros(3, len(x), device=x.device)
    coef[0] = x[:, 0].float() * scale
    out = torch.empty_like(x)
    entropy = torch.zeros(len(x), device=x.device)
    backend.module.grad(torch.zeros_like(x), out, 0, targets, None, None, LogitSpec(1), state, entropy, coef)
    assert torch.equal(out[:, 0], coef[0].to(dtype))


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_before_tells_a_first_maximum_from_a_tie(
    backend: Backend, dtype: torch.dtype, softcap: float | None, pieces: int
) -> None:
    vocab = 600 if interpreted(backend) else 2500
    # Few distinct values, so that maxima tie; targets at the first maximum, at the last, beside one.
    x = torch.randint(-3, 4, (6, vocab), generator=torch.Generator().manual_seed(1)).to(backend.device, dtype)
    x[4, 0], x[5, -1] = 9, 9
    first = x.argmax(-1)
    last = vocab - 1 - x.flip(1).argmax(-1)
    case = make(backend, dtype, rows=6, vocab=vocab, softcap=softcap)
    case.x = x
    for targets in (first, last, first + 1, (first - 1).clamp(min=0)):
        case.targets = targets.clamp(max=vocab - 1)
        state = run_stats(backend, case, pieces)
        is_top1 = (state[Row.TARGET] == state[Row.PEAK]) & (state[Row.BEFORE] < state[Row.PEAK])
        assert torch.equal(is_top1, case.targets == first)
        columns = torch.arange(vocab, device=backend.device)
        before = x.where(columns < case.targets[:, None], -torch.inf).max(-1).values
        if softcap is None:
            assert torch.equal(state[Row.BEFORE], before.to(case.acc))
        out, weighed = torch.empty_like(x), new_state(case)
        for start, stop in slices(vocab, pieces):
            tile, piece = x[:, start:stop], out[:, start:stop]
            backend.module.weigh(tile, piece, start, case.targets, None, None, case.spec, weighed, None)
        assert torch.equal(weighed[Row.BEFORE], state[Row.BEFORE])


def test_sums_over_equal_logits_do_not_drift(backend: Backend) -> None:
    # Every rounding of one chain of additions would go the same way.
    case = make(backend, rows=9, vocab=1100)
    case.x = torch.linspace(0.1, 3, 9, device=backend.device)[:, None].expand(-1, 1100).contiguous()
    state = run_stats(backend, case)
    error = (state[Row.SUM].double() / 1100 - case.x[:, 0].double()).abs() / case.x[:, 0].double()
    assert error.max().item() <= 4 * torch.finfo(torch.float32).eps
    assert torch.equal(state[Row.TOTAL], torch.full_like(state[Row.TOTAL], 1100.0))


def test_only_the_statistics_asked_for_are_kept(backend: Backend) -> None:
    case = make(backend)
    full = run_stats(backend, case)
    case.spec = LogitSpec(1000)
    bare = run_stats(backend, case)
    assert torch.equal(bare[: Row.SHIFTED], full[: Row.SHIFTED])
    assert torch.equal(bare[Row.SHIFTED :], new_state(case)[Row.SHIFTED :])


@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
def test_empty_tiles_do_nothing(backend: Backend, shape: tuple[int, int]) -> None:
    rows, columns = shape
    tile = torch.zeros(rows, columns, device=backend.device)
    targets = torch.full((rows,), 99, device=backend.device)
    spec = LogitSpec(10)
    state = torch.zeros(len(Row), rows, device=backend.device)
    before = state.clone()
    backend.module.stats(tile, 0, targets, None, None, spec, state)
    backend.module.weigh(tile, tile, 0, targets, None, None, spec, state, None)
    backend.module.grad(tile, tile, 0, targets, None, None, spec, state, None, None)
    backend.module.stats_grad(tile, tile, targets, None, None, spec, state)
    assert torch.equal(state, before)


def test_offsets_of_rows_pass_2_to_the_31(backend: Backend) -> None:
    case = make(backend, torch.bfloat16, rows=2)
    # Memory that is not touched is not taken.
    far = torch.empty(2**31 + 3000, dtype=torch.bfloat16, device=backend.device).as_strided((2, 1000), (2**31 + 8, 1))
    far.copy_(case.x)
    state = new_state(case)
    backend.module.stats_grad(far, far, case.targets, None, None, case.spec, state)
    assert_statistics(case, state)
    assert_gradient(case, far)


def test_layouts_and_types_that_kernels_cannot_read_are_refused(backend: Backend) -> None:
    case = make(backend)
    state = new_state(case)
    with pytest.raises(ValueError, match="tile"):
        backend.module.stats(case.x.t(), 0, case.targets, None, None, case.spec, state)
    with pytest.raises(ValueError, match="tile"):
        backend.module.stats(case.x.long(), 0, case.targets, None, None, case.spec, state)
    with pytest.raises(ValueError, match="state"):
        backend.module.stats(case.x, 0, case.targets, None, None, case.spec, state.double())
    with pytest.raises(ValueError, match="targets"):
        backend.module.stats(case.x, 0, case.targets.int(), None, None, case.spec, state)
    with pytest.raises(ValueError, match="out"):
        backend.module.grad(
            case.x, case.x.t().contiguous().t(), 0, case.targets, None, None, case.spec, state, None, None
        )
    temperature = torch.ones(5, dtype=torch.float64, device=backend.device)
    with pytest.raises(ValueError, match="temperature"):
        backend.module.stats(case.x, 0, case.targets, temperature, None, case.spec, state)


def test_results_on_the_cpu_do_not_depend_on_the_number_of_threads() -> None:
    case = make(cpu(), rows=64, vocab=5000, options="ignored softcap")
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            stats, weighed = run_stats(cpu(), case, 2), new_state(case)
            weights, gradient = torch.empty_like(case.x), torch.empty_like(case.x)
            cpu().module.weigh(case.x, weights, 0, case.targets, None, None, case.spec, weighed, None)
            cpu().module.grad(case.x, gradient, 0, case.targets, None, None, case.spec, stats, None, None)
            runs.append((stats, weighed, weights, gradient))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


def test_an_instruction_set_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module, names = cpu().module, _native.require().cpu_isa_names()
    assert names[0] == "baseline"
    monkeypatch.delenv("PREFCORE_CPU_ISA", raising=False)
    assert module._level.__wrapped__() == len(names) - 1
    for level, name in enumerate(names):
        monkeypatch.setenv("PREFCORE_CPU_ISA", name)
        assert module._level.__wrapped__() == level
    monkeypatch.setenv("PREFCORE_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"PREFCORE_CPU_ISA.*'mmx'"):
        module._level.__wrapped__()


@pytest.mark.parametrize("size", [0, 10, 3 << 20])
def test_advice_on_pages_leaves_the_values(size: int) -> None:
    buffer = torch.arange(size)
    assert advise_huge(buffer) is buffer
    assert torch.equal(buffer, torch.arange(size))
