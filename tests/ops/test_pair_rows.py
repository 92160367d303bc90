"""The row kernels of a pair of distributions against float64: one contract for every back end."""

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
from prefcore.ops._spec import CROSS_ROWS, Coef, LogitSpec, PairSpec, Row, Side
from prefcore.ops._stats import accumulator_dtype, new_state
from prefcore.testing import assert_no_worse_than


class Backend(NamedTuple):
    module: ModuleType
    device: torch.device

    @property
    def interpreted(self) -> bool:
        """Triton on the CPU, at 10 ms a row: its cases are small."""
        return self.module.__name__.startswith("prefcore.kernels") and self.device.type == "cpu"


def cpu() -> Backend:
    return Backend(importlib.import_module("prefcore.ops._pair_rows_cpu"), torch.device("cpu"))


def triton_interpreted() -> Backend:
    if not _impl.interpreting():
        pytest.skip("Triton's interpreter is off: TRITON_INTERPRET=1 turns it on")
    return triton_on("cpu")


def triton_cuda() -> Backend:
    return triton_on("cuda")


def triton_on(kind: str) -> Backend:
    device = torch.device(kind)
    return Backend(importlib.import_module("prefcore.kernels.divergence"), device)


BACKENDS: dict[str, Callable[[], Backend]] = {
    "cpu-baseline": cpu,
    "cpu-avx2": cpu,
    "cpu-avx512": cpu,
    "triton-interpreted": triton_interpreted,
    "triton-cuda": triton_cuda,
}

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PAIRS = [PairSpec("kl"), PairSpec("alpha", 0.3), PairSpec("js", 0.5), PairSpec("js", 0.1), PairSpec("tv")]
KINDS = [PairSpec("kl"), PairSpec("alpha", 0.3), PairSpec("js", 0.1), PairSpec("tv")]
IGNORE = -100


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


def name_of(pair: object) -> str | None:
    return f"{pair.kind}-{pair.weight}" if isinstance(pair, PairSpec) else None


@dataclasses.dataclass
class Logits:
    """One side of a case."""

    x: torch.Tensor  # [R, V]
    spec: LogitSpec
    temperature: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def leaf(self, dtype: torch.dtype) -> torch.Tensor:
        """What the raw logits are taken to be, to differentiate by."""
        x = self.x if self.spec.round_to is None else self.x.to(self.spec.round_to)
        return x.to(dtype).detach().clone().requires_grad_()

    def z(self, x: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        u = spec.logit_scale * (x if self.bias is None else x + self.bias.to(x.dtype))
        if spec.softcap is not None:
            u = spec.softcap * torch.tanh(u / spec.softcap)
        return u / (spec.temperature if self.temperature is None else self.temperature.to(x.dtype)[:, None])


class Sums(NamedTuple):
    """Per row: the divergence and what goes into its gradient."""

    divergence: torch.Tensor
    of_p: torch.Tensor  # Coef.OFFSET of each side
    of_q: torch.Tensor


def over_support(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum of weights * values where weights are not 0, differentiable where values are infinite elsewhere."""
    return (weights * values.where(weights != 0, 0.0)).sum(-1)


def diverge(pair: PairSpec, logp: torch.Tensor, logq: torch.Tensor) -> Sums:
    """By the definitions, in the dtype of the arguments."""
    p, q, w = logp.exp(), logq.exp(), pair.weight
    if pair.kind == "kl":
        kl = over_support(p, logp.where(p != 0, 0.0) - logq.where(p != 0, 0.0))
        return Sums(kl, kl, torch.zeros_like(kl))
    if pair.kind == "alpha":
        total = (w * logp + (1 - w) * logq).exp().sum(-1)
        return Sums((1 - total) / (w * (1 - w)), total, total)
    if pair.kind == "tv":
        sign = (p - q).detach().sign()
        return Sums((p - q).abs().sum(-1) / 2, (p * sign).sum(-1), (q * sign).sum(-1))
    mixture = w * p + (1 - w) * q
    log_m = mixture.where(mixture != 0, 1.0).log()
    of_p = over_support(p, logp.where(p != 0, 0.0) - log_m)
    of_q = over_support(q, logq.where(q != 0, 0.0) - log_m)
    return Sums(w * of_p + (1 - w) * of_q, of_p, of_q)


@dataclasses.dataclass
class Case:
    p: Logits
    q: Logits
    targets: torch.Tensor

    @property
    def sides(self) -> tuple[Logits, Logits]:
        return self.p, self.q

    @property
    def eps(self) -> float:
        """Of one operation, relative: a rounding, and what instructions add that only approximate.

        By the PTX manual ex2.approx, lg2.approx and div.full err by up to 2^-22, and a term passes through two of them.
        """
        eps = torch.finfo(self.acc).eps
        approximate = self.p.x.device.type == "cuda" and not torch.version.hip and self.acc == torch.float32
        return eps + 2 * 2.0**-22 if approximate else eps

    @property
    def acc(self) -> torch.dtype:
        return accumulator_dtype(self.p.x.dtype)

    @property
    def vocab(self) -> int:
        return self.p.spec.vocab

    @property
    def kept(self) -> torch.Tensor:
        return self.targets != IGNORE

    @property
    def magnitude(self) -> float:
        """Of the largest finite z on each side, together: to its rounding logits are known at all."""
        sizes = [side.z(side.leaf(torch.float64)).detach()[self.kept] for side in self.sides]
        return sum(z.abs()[z.isfinite()].max().item() for z in sizes)

    def log_probs(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        logp, logq = (side.z(side.leaf(dtype)).detach().log_softmax(-1) for side in self.sides)
        return logp, logq

    def sums(self, pair: PairSpec, dtype: torch.dtype) -> Sums:
        return diverge(pair, *self.log_probs(dtype))


def make(
    backend: Backend,
    dtype: torch.dtype = torch.float32,
    p_options: str = "",
    q_options: str = "",
    rows: int | None = None,
    vocab: int | None = None,
) -> Case:
    """A seeded case. Options of a side: bias, half_bias, temperature, softcap, scale, rounded, entropy, masked.

    Masked columns are those of p in q too. ``ignored`` makes every other row one to pass over.
    """
    rows = rows or (2 if backend.interpreted else 5)
    vocab = vocab or (150 if backend.interpreted else 1100)
    generator = torch.Generator().manual_seed(rows * 100003 + vocab)
    where, acc = backend.device, accumulator_dtype(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[0], targets[-1] = vocab - 1, 0
    hidden = torch.rand(rows, vocab, generator=generator) < 0.3
    hidden[torch.arange(rows), targets] = False
    sides = []
    for options in (set(p_options.split()), set(q_options.split())):
        x = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 3
        if "masked" in options:
            x[hidden] = -math.inf
        if "ignored" in p_options:
            x[1::2] = math.nan
            x[1, ::3] = math.inf
        temperature = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5
        bias = torch.randn(vocab, generator=generator, dtype=torch.float64)
        spec = LogitSpec(
            vocab,
            logit_scale=0.7 if "scale" in options else 1.0,
            softcap=2.5 if "softcap" in options else None,
            temperature=1.3 if "scale" in options else 1.0,
            ignore_index=IGNORE,
            round_to=torch.bfloat16 if "rounded" in options else None,
            entropy="entropy" in options,
        )
        bias = bias.to(torch.bfloat16 if "half_bias" in options else dtype).to(where)
        sides.append(
            Logits(
                x.to(where, dtype),
                spec,
                temperature.to(where, acc) if "temperature" in options else None,
                bias if options & {"bias", "half_bias"} else None,
            )
        )
    if "ignored" in p_options:
        targets[1::2] = IGNORE
    return Case(*sides, targets.to(where))


OPTIONS = [
    ("entropy", ""),
    ("bias temperature", "softcap scale entropy"),
    ("softcap half_bias temperature scale entropy", "temperature bias entropy"),
    ("masked entropy", "masked scale"),
    ("ignored rounded", "softcap bias temperature"),
]


def slices(vocab: int, pieces: int) -> list[tuple[int, int]]:
    """Uneven consecutive column ranges that cover the vocabulary."""
    cuts = sorted({0, vocab, *(vocab * k * k // (pieces * pieces) for k in range(1, pieces))})
    return list(itertools.pairwise(cuts))


def in_wider(x: torch.Tensor, before: int, after: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy as columns of a wider tensor that is 7 elsewhere."""
    rows, columns = x.shape
    wide = torch.full((rows, before + columns + after), 7.0, dtype=dtype or x.dtype, device=x.device)
    wide[:, before : before + columns] = x
    return wide[:, before : before + columns]


class Run:
    """A case as callers walk it: slice after slice, the sides with strides and alignments of their own."""

    def __init__(self, backend: Backend, case: Case, pair: PairSpec, pieces: int = 1) -> None:
        self.backend, self.case, self.pair, self.pieces = backend, case, pair, pieces
        self.tiles = in_wider(case.p.x, 2, 3), in_wider(case.q.x, 1, 6)
        rows = len(case.targets)
        self.states = tuple(in_wider(new_state(rows, case.p.x), 2 + k, 1) for k in range(2))
        self.cross = in_wider(torch.zeros(CROSS_ROWS, rows, dtype=case.acc, device=case.p.x.device), 1, 1)
        running = PairSpec("kl") if pair.needs_totals else pair
        unused = torch.zeros_like(self.cross)
        for start, stop in slices(case.vocab, pieces):
            into = unused if pair.needs_totals else self.cross
            backend.module.stats(*self.cut(start, stop), start, case.targets, running, into)
        for start, stop in slices(case.vocab, pieces) if pair.needs_totals else []:
            backend.module.sums(*self.cut(start, stop), start, case.targets, pair, self.cross)

    def cut(self, start: int, stop: int, known: int = len(Row)) -> tuple[Side, Side]:
        p, q = (
            Side(
                tile[:, start:stop],
                side.temperature,
                None if side.bias is None else side.bias[start:stop],
                side.spec,
                state[:known],
            )
            for tile, side, state in zip(self.tiles, self.case.sides, self.states, strict=True)
        )
        return p, q

    def sums(self) -> Sums:
        """What callers derive from the states and the cross sums."""
        cross, w = self.cross.double(), self.pair.weight
        total_p, total_q = (state[Row.TOTAL].double() for state in self.states)
        if self.pair.kind == "kl":
            kl = cross[0] / total_p - total_p.log() + total_q.log()
            return Sums(kl, kl, torch.zeros_like(kl))
        if self.pair.kind == "alpha":
            total = cross[0] / (total_p**w * total_q ** (1 - w))
            return Sums((1 - total) / (w * (1 - w)), total, total)
        return Sums(cross[2] / 2 if self.pair.kind == "tv" else cross[2], cross[0], cross[1])

    def grad(
        self,
        coefs: tuple[torch.Tensor, torch.Tensor],
        out_dtype: torch.dtype | None = None,
        in_place: bool = False,
        wanted: str = "pq",
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        outs = [
            None if name not in wanted else tile if in_place else in_wider(torch.full_like(tile, 7), 3, 2, out_dtype)
            for name, tile in zip("pq", self.tiles, strict=True)
        ]
        for start, stop in slices(self.case.vocab, self.pieces):
            self.backend.module.grad(
                *self.cut(start, stop, known=Row.SHIFTED),
                *(None if out is None else out[:, start:stop] for out in outs),
                start,
                self.case.targets,
                self.pair,
                *(None if out is None else coef for out, coef in zip(outs, coefs, strict=True)),
            )
        return outs[0], outs[1]


def assert_agrees(
    actual: torch.Tensor, expected: Callable[[torch.dtype], torch.Tensor], name: str, band: float
) -> None:
    """Against ``expected`` in float64 and, as eager PyTorch, in float32.

    For a float64 result eager's error is the one it makes in float32, to scale: the truth has as much.
    """
    truth, eager = expected(torch.float64), expected(torch.float32)
    if actual.dtype == torch.float64:
        error = (eager.double() - truth).abs().max().item()
        band = max(band, error * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps)
        eager = truth
    assert_no_worse_than(actual, eager.to(actual.dtype), truth, name, band=band)


def assert_sums(run: Run) -> None:
    """Check the states and the cross sums, by what callers derive from them."""
    case, kept = run.case, run.case.kept
    rounding = case.eps * case.magnitude
    assert (run.cross[:, ~kept] == 0).all()
    index = case.targets.clamp(0, case.vocab - 1)[:, None]
    for k, (side, state) in enumerate(zip(case.sides, run.states, strict=True)):
        assert torch.equal(state[:, ~kept], new_state(len(case.targets), case.p.x)[:, ~kept])
        peak, total, target, shifted, *_ = state[:, kept]
        assert (total >= 1).all()

        def logp(dtype: torch.dtype, k: int = k) -> torch.Tensor:
            return case.log_probs(dtype)[k].gather(1, index)[kept, 0]

        def entropy(dtype: torch.dtype, k: int = k) -> torch.Tensor:
            logp = case.log_probs(dtype)[k][kept]
            return -over_support(logp.exp(), logp)

        inside = (case.targets >= 0) & (case.targets < case.vocab)
        assert torch.equal(target.isnan(), ~inside[kept])
        if inside[kept].all():
            assert_agrees((target - peak) - total.log(), logp, "logp", rounding)
        if side.spec.entropy:
            assert_agrees(total.log() - shifted / total, entropy, "entropy", rounding)
        else:
            assert (shifted == 0).all()
    actual = run.sums()
    for name in Sums._fields:
        # A rounding of the logits passes into every sum; those of alpha are divided by what divides its divergence.
        weight = run.pair.weight
        scale = 1 / (weight * (1 - weight)) if (run.pair.kind, name) == ("alpha", "divergence") else 1.0
        assert_agrees(
            getattr(actual, name)[kept].to(case.acc),
            lambda dtype, name=name: getattr(case.sums(run.pair, dtype), name)[kept],
            name,
            scale * rounding,
        )


class Upstream(NamedTuple):
    """dL of each row: of the divergence, and of both sides' logps and entropies."""

    divergence: torch.Tensor
    logps: tuple[torch.Tensor, torch.Tensor]
    entropies: tuple[torch.Tensor, torch.Tensor]


def upstream(case: Case) -> Upstream:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(5, len(case.targets), generator=generator, dtype=torch.float64).to(case.p.x.device)
    zero = torch.zeros_like(values[0])
    entropies = [g if side.spec.entropy else zero for g, side in zip(values[3:], case.sides, strict=True)]
    return Upstream(values[0], (values[1], values[2]), (entropies[0], entropies[1]))


def coefficients(case: Case, pair: PairSpec, g: Upstream) -> tuple[torch.Tensor, torch.Tensor]:
    """``[len(Coef), R]`` of each side, as slices of wider tensors; NaN at ignored rows, which are not to be read."""
    sums = case.sums(pair, torch.float64)
    coefs = []
    for k, logp in enumerate(case.log_probs(torch.float64)):
        rows = torch.zeros(len(Coef), len(case.targets), dtype=torch.float64, device=logp.device)
        rows[Coef.ONEHOT] = rows[Coef.P] = g.logps[k]
        rows[Coef.ENTROPY] = g.entropies[k]
        rows[Coef.DIVERGENCE] = g.divergence
        rows[Coef.H] = -over_support(logp.exp(), logp)
        rows[Coef.OFFSET] = sums[1 + k]
        rows[:, ~case.kept] = math.nan
        coefs.append(in_wider(rows, 1 + k, 1, case.acc))
    return coefs[0], coefs[1]


def gradients(case: Case, pair: PairSpec, g: Upstream, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """By autograd; zeros at ignored rows."""
    leaves = tuple(side.leaf(dtype) for side in case.sides)
    logs = [side.z(x)[case.kept].log_softmax(-1) for side, x in zip(case.sides, leaves, strict=True)]
    index = case.targets[case.kept].clamp(0, case.vocab - 1)[:, None]
    loss = (g.divergence.to(dtype)[case.kept] * diverge(pair, logs[0], logs[1]).divergence).sum()
    for logp, g_logps, g_entropy in zip(logs, g.logps, g.entropies, strict=True):
        loss = loss + (g_logps.to(dtype)[case.kept] * logp.gather(1, index)[:, 0]).sum()
        if g_entropy.any():
            loss = loss - (g_entropy.to(dtype)[case.kept] * over_support(logp.exp(), logp)).sum()
    p, q = torch.autograd.grad(loss, leaves)
    return p, q


def assert_gradients(run: Run, outs: tuple[torch.Tensor | None, ...], g: Upstream) -> None:
    case = run.case
    for k, out in enumerate(outs):
        if out is None:
            continue
        assert (out[~case.kept] == 0).all()

        def expected(dtype: torch.dtype, k: int = k) -> torch.Tensor:
            return gradients(case, run.pair, g, dtype)[k][case.kept]

        # Probabilities know no more than the logits do.
        size = expected(torch.float64).abs().max().item()
        band = case.eps * case.magnitude * size
        assert_agrees(out[case.kept], expected, "pq"[k], band)


@pytest.mark.parametrize("options", OPTIONS, ids="|".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_sums_of_slices_agree_with_float64(
    backend: Backend, pair: PairSpec, dtype: torch.dtype, options: tuple[str, str]
) -> None:
    case = make(backend, dtype, *options)
    for pieces in (2,) if backend.interpreted else (1, 3):
        assert_sums(Run(backend, case, pair, pieces))


@pytest.mark.parametrize("options", OPTIONS, ids="|".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_gradients_of_slices_agree_with_autograd(
    backend: Backend, pair: PairSpec, dtype: torch.dtype, options: tuple[str, str]
) -> None:
    case = make(backend, dtype, *options)
    run, g = Run(backend, case, pair, 2), upstream(case)
    before = [tile.nan_to_num() for tile in run.tiles]
    outs = run.grad(coefficients(case, pair, g))
    assert_gradients(run, outs, g)
    assert all(map(torch.equal, before, (tile.nan_to_num() for tile in run.tiles)))


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "in_place"),
    [(torch.float32, half, False) for half in (torch.bfloat16, torch.float16)]
    + [(dtype, dtype, True) for dtype in DTYPES],
)
@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_gradients_can_be_narrower_or_take_the_place_of_the_logits(
    backend: Backend, pair: PairSpec, dtype: torch.dtype, out_dtype: torch.dtype, in_place: bool
) -> None:
    case = make(backend, dtype, "softcap entropy", "bias temperature")
    run, g = Run(backend, case, pair, 2), upstream(case)
    outs = run.grad(coefficients(case, pair, g), out_dtype, in_place)
    assert_gradients(run, outs, g)
    for out in outs:
        assert out is not None
        beside = out.as_strided((len(out), 1), out.stride(), out.storage_offset() + out.shape[1])
        assert (beside == 7).all()


@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_either_gradient_can_be_had_alone(backend: Backend, pair: PairSpec) -> None:
    case = make(backend, torch.bfloat16, "ignored softcap entropy", "softcap")
    run, coefs = Run(backend, case, pair), coefficients(case, pair, upstream(case))
    both = run.grad(coefs)
    for k, name in enumerate("pq"):
        alone = run.grad(coefs, wanted=name)
        assert alone[1 - k] is None
        assert torch.equal(alone[k], both[k])


@pytest.mark.parametrize("vocab", [1, 17, 130, 1023, 1025])
@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_results_hold_for_any_vocabulary(backend: Backend, pair: PairSpec, vocab: int) -> None:
    if backend.interpreted and vocab > 1000:
        pytest.skip("at 10 ms a row")
    case = make(backend, torch.float32, "entropy", "scale", rows=2, vocab=vocab)
    run, g = Run(backend, case, pair, 1 if vocab == 1 else 3), upstream(case)
    assert_sums(run)
    assert_gradients(run, run.grad(coefficients(case, pair, g)), g)


@pytest.mark.parametrize("bad", [-1, 2**40])
@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_a_target_outside_the_vocabulary_gives_nan(backend: Backend, pair: PairSpec, bad: int) -> None:
    case = make(backend)
    coefs = coefficients(case, pair, upstream(case))
    case.targets[1] = bad
    run = Run(backend, case, pair)
    assert_sums(run)
    for out in run.grad(coefs):
        assert out is not None
        assert out.isnan().all(-1).tolist() == [row == 1 for row in range(len(out))]
        assert out.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_a_logit_that_is_no_number_reaches_the_result(backend: Backend, pair: PairSpec) -> None:
    for k, value in ((0, math.nan), (1, math.nan), (0, math.inf), (1, math.inf)):
        case = make(backend)
        case.sides[k].x[0, 50] = value
        isnan = Run(backend, case, pair, 2).sums().divergence.isnan()
        assert isnan.tolist() == [row == 0 for row in range(len(isnan))]


@pytest.mark.parametrize("masked", ["p", "q"])
@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_entries_masked_on_one_side_count_as_probability_0(backend: Backend, pair: PairSpec, masked: str) -> None:
    case = make(backend, torch.float32, "masked" if masked == "p" else "", "masked" if masked == "q" else "")
    run, g = Run(backend, case, pair, 2), upstream(case)
    if pair.kind == "kl" and masked == "q":
        assert (run.sums().divergence == math.inf).all()
        out, _ = run.grad(coefficients(case, pair, g))
        assert out is not None
        assert not out.isfinite().all(-1).any()
        return
    assert_sums(run)
    assert_gradients(run, run.grad(coefficients(case, pair, g)), g)


@pytest.mark.parametrize("masked", ["p", "q", "pq"])
@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_a_first_slice_may_be_wholly_masked(backend: Backend, pair: PairSpec, masked: str) -> None:
    case = make(backend)
    quarter = case.vocab // 4  # the first of two slices
    for name, side in zip("pq", case.sides, strict=True):
        if name in masked:
            side.x[:, :quarter] = -math.inf
    case.targets.clamp_(min=quarter)
    run = Run(backend, case, pair, 2)
    if pair.kind == "kl" and masked == "q":
        assert (run.sums().divergence == math.inf).all()
    else:
        assert_sums(run)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_terms_end_where_a_later_peak_leaves_no_probability(backend: Backend, pair: PairSpec, pieces: int) -> None:
    case = make(backend)
    quarter = case.vocab // 4
    case.p.x[:, :quarter] -= 1000
    case.q.x[:, :quarter] = -math.inf
    case.targets.clamp_(min=quarter)
    assert_sums(Run(backend, case, pair, pieces))


@pytest.mark.parametrize("shapes", ["alternating rising", "falling rising", "rising rising", "negative one_hot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_extreme_logits_give_finite_results(backend: Backend, pair: PairSpec, dtype: torch.dtype, shapes: str) -> None:
    case = make(backend, dtype)
    column = torch.arange(case.vocab, device=backend.device, dtype=torch.float64)
    values = {
        "alternating": torch.where(column % 2 == 0, 1e4, -1e4) + column / 64,
        "negative": -1e4 - column / 64,
        "one_hot": torch.where(column == case.vocab // 2, 1e4, 0.0),
        "rising": -1e4 + column / case.vocab * 2e4,
        "falling": 1e4 - column / case.vocab * 2e4,
    }
    for side, shape in zip(case.sides, shapes.split(), strict=True):
        side.x[:] = values[shape]
    g = upstream(case)
    for pieces in (2,) if backend.interpreted else (1, 3):
        run = Run(backend, case, pair, pieces)
        assert_sums(run)
    assert_gradients(run, run.grad(coefficients(case, pair, g)), g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_equal_sides_diverge_by_nothing(backend: Backend, pair: PairSpec, dtype: torch.dtype) -> None:
    case = make(backend, dtype, "softcap bias temperature", "softcap bias temperature")
    case.q = case.p
    run = Run(backend, case, pair, 2)
    eps, w = case.eps, pair.weight
    # 1 - 1 with a rounding for each of alpha's sum, its two totals and every level of additions; others have none.
    bound = 16 * eps / (w * (1 - w)) if pair.kind == "alpha" else 0.0
    assert (run.sums().divergence.abs() <= bound).all()
    coefs = tuple(torch.zeros(len(Coef), len(case.targets), dtype=case.acc, device=backend.device) for _ in "pq")
    for coef, offset in zip(coefs, run.sums()[1:], strict=True):
        coef[Coef.DIVERGENCE], coef[Coef.OFFSET] = 1, offset
    for out in run.grad((coefs[0], coefs[1])):
        assert out is not None
        assert (out.abs() <= (2 if pair.kind == "alpha" else 0) * bound).all()


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_close_sides_keep_their_relative_accuracy(
    backend: Backend, pair: PairSpec, dtype: torch.dtype, pieces: int
) -> None:
    case = make(backend, dtype)
    noise = torch.randn(case.p.x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    case.q.x = (case.p.x.double() + 1e-3 * noise.to(backend.device)).to(dtype)
    run = Run(backend, case, pair, pieces)
    actual, truth = run.sums().divergence, case.sums(pair, torch.float64).divergence
    logp, logq = case.log_probs(torch.float64)
    p, d, eps, w = logp.exp(), (logp - logq).abs(), case.eps, pair.weight
    if pair.kind == "js" and dtype == torch.float64:  # where the definition has not the digits
        over_p, over_q = (1 - w) * torch.expm1(logq - logp), w * torch.expm1(logp - logq)
        truth = -(w * p * over_p.log1p() + (1 - w) * logq.exp() * over_q.log1p()).sum(-1)
    # d is the difference of two logits, each rounded when its peak is taken from it, and of the totals' logarithms.
    shifted = sum((side.x.double() - side.x.double().max(-1, keepdim=True).values).abs() for side in case.sides)
    error = eps * (shifted / 2 + 4)
    if pair.kind == "js":
        # A term is w (1 - w) p d² / 2 to first order, of two that are of order d: eight roundings of those.
        bound = w * (1 - w) * (p * d * (error + 8 * eps * d)).sum(-1) + 8 * eps * (w * (1 - w) * p * d).sum(-1)
    elif pair.kind == "tv":
        bound = (p * (error + 8 * eps * d)).sum(-1) / 2
    else:
        # The logarithm of the totals' ratio, or their product, is rounded on its own.
        bound = (p * (error + 8 * eps * d)).sum(-1)
        bound = (bound + 4 * eps) / (w * (1 - w)) if pair.kind == "alpha" else bound + 4 * eps
    if dtype == torch.float64:
        bound = 2 * bound  # the truth has as much
    assert ((actual - truth).abs() <= bound).all()
    if pair.kind == "js" and dtype == torch.float32:
        most = 0.02 * eps / torch.finfo(dtype).eps  # where an error of eps alone would be most of it
        assert (bound < most * truth).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_disjoint_sides_reach_the_bounds(backend: Backend, pair: PairSpec, dtype: torch.dtype) -> None:
    case = make(backend, dtype)
    case.p.x[:], case.q.x[:] = 0.0, 0.0
    case.p.x[:, 3], case.q.x[:, case.vocab - 2] = 1500.0, 2000.0
    w = pair.weight
    most = {
        "kl": 2000.0,  # log p - log q at p's column
        "alpha": 1 / (w * (1 - w)),
        "js": -w * math.log(w) - (1 - w) * math.log(1 - w),
        "tv": 1.0,
    }[pair.kind]
    divergence = Run(backend, case, pair, 2).sums().divergence
    assert torch.allclose(divergence, torch.full_like(divergence, most), rtol=4 * case.eps, atol=0)


@pytest.mark.parametrize("pair", KINDS, ids=name_of)
@pytest.mark.parametrize("shape", [(0, 10), (3, 0)])
def test_empty_tiles_do_nothing(backend: Backend, pair: PairSpec, shape: tuple[int, int]) -> None:
    tile = torch.zeros(shape, device=backend.device)
    targets = torch.full(shape[:1], 9, device=backend.device)
    p, q = (Side(tile, None, None, LogitSpec(10), new_state(shape[0], tile)) for _ in "pq")
    cross = torch.zeros(CROSS_ROWS, shape[0], device=backend.device)
    add = backend.module.sums if pair.needs_totals else backend.module.stats
    add(p, q, 0, targets, pair, cross)
    coef = torch.zeros(len(Coef), shape[0], device=backend.device)
    backend.module.grad(p, q, tile, torch.empty_like(tile), 0, targets, pair, coef, coef)
    assert torch.equal(p.state, new_state(shape[0], tile))
    assert (cross == 0).all()


@pytest.mark.parametrize("pair", KINDS, ids=name_of)
def test_results_on_the_cpu_do_not_depend_on_the_number_of_threads(pair: PairSpec) -> None:
    case = make(cpu(), torch.float32, "ignored softcap entropy", "temperature", rows=64, vocab=3000)
    before, runs = torch.get_num_threads(), []
    coefs = coefficients(case, pair, upstream(case))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run = Run(cpu(), case, pair, 2)
            runs.append((*run.states, run.cross, *run.grad(coefs)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *runs))


def test_what_the_kernels_of_the_cpu_cannot_read_is_refused() -> None:
    case, module = make(cpu()), cpu().module
    run = Run(cpu(), case, PairSpec("kl"))
    p, q = run.cut(0, case.vocab)
    coef = torch.zeros(len(Coef), len(case.targets))
    with pytest.raises(ValueError, match="tiles must be alike"):
        module.stats(p, q._replace(tile=q.tile.double()), 0, case.targets, run.pair, run.cross)
    with pytest.raises(ValueError, match="cross"):
        module.stats(p, q, 0, case.targets, run.pair, run.cross[:1])
    with pytest.raises(ValueError, match="js has no running sums"):
        module.stats(p, q, 0, case.targets, PairSpec("js"), run.cross)
    with pytest.raises(ValueError, match="sums of kl"):
        module.sums(p, q, 0, case.targets, run.pair, run.cross)
    with pytest.raises(ValueError, match="p_coef is missing"):
        module.grad(p, q, p.tile, None, 0, case.targets, run.pair, None, None)
    with pytest.raises(ValueError, match="q_coef"):
        module.grad(p, q, None, q.tile, 0, case.targets, run.pair, None, coef[:3])
