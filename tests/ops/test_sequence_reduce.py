import functools
import itertools
import math
import pathlib
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import prefcore
from prefcore import reference

MODES = ("sum", "mean", "discounted", "weighted")
DTYPES = (torch.float32, torch.float64)
GENERATOR = torch.Generator().manual_seed(0)
BATCHES = {
    "each kind of length": (0, 1, 31, 0, 32, 33, 255, 256, 257, 1000, 65537, 0),
    "one": (1,),
    "one long": (1_000_003,),
    "thousands": tuple(torch.randint(0, 60, (3000,), generator=GENERATOR).tolist()),
    "all empty": (0, 0, 0, 0, 0),
    "no sequences": (),
}


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """torch.empty returns NaN, so an output that is left unwritten fails."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def options(mode, total, dtype, seed=1):
    if mode == "discounted":
        return {"gamma": 0.97}
    if mode == "weighted":
        generator = torch.Generator().manual_seed(seed)
        return {"weights": torch.randn(total, dtype=dtype, generator=generator)}
    return {}


def reduce_on(device, x, cu_seqlens, mode="sum", weights=None, **kwargs):
    """``sequence_reduce`` on a device, from the CPU and back."""
    weights = None if weights is None else weights.to(device)
    return prefcore.sequence_reduce(x.to(device), cu_seqlens.to(device), mode, weights, **kwargs).cpu()


def factors(lengths, mode, weights=None, gamma=None):
    """d result / d x in float64, by plain Python."""
    if mode == "weighted":
        return weights.double().tolist()
    if mode == "discounted":
        return [gamma**t for n in lengths for t in range(n)]
    return [1 / n if mode == "mean" else 1.0 for n in lengths for _ in range(n)]


def truth(x, lengths, mode, **kwargs):
    """Exactly rounded sums of float64 terms, and for each the sum of their magnitudes."""
    terms = [f * v for f, v in zip(factors(lengths, mode, **kwargs), x.double().tolist(), strict=True)]
    ends = [0, *itertools.accumulate(lengths)]
    parts = [terms[a:b] for a, b in itertools.pairwise(ends)]
    values = torch.tensor([math.fsum(part) for part in parts], dtype=torch.float64)
    magnitudes = torch.tensor([math.fsum(map(abs, part)) for part in parts], dtype=torch.float64)
    return values, magnitudes


def assert_within_docstring_bound(out, x, lengths, mode, **kwargs):
    values, magnitudes = truth(x, lengths, mode, **kwargs)
    rounding = torch.finfo(out.dtype).eps / 2
    slack = (torch.tensor(lengths, dtype=torch.float64) + 16) * 2.0**-53 * magnitudes
    assert out.shape == values.shape
    assert out.dtype == x.dtype
    error = (out.detach().double() - values).abs()
    assert bool((error <= rounding * values.abs() + slack).all()), error.max()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_values_are_exact_to_the_bound_of_the_docstring(lengths, mode, dtype, device):
    x = torch.randn(sum(lengths), dtype=dtype, generator=GENERATOR)
    kwargs = options(mode, len(x), dtype)
    out = reduce_on(device, x, offsets(lengths), mode, **kwargs)
    assert_within_docstring_bound(out, x, lengths, mode, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_reference_agrees_with_plain_python(lengths, mode):
    x = torch.randn(sum(lengths), dtype=torch.float64, generator=GENERATOR)
    kwargs = options(mode, len(x), x.dtype)
    values, magnitudes = truth(x, lengths, mode, **kwargs)
    out = prefcore.sequence_reduce(x, offsets(lengths), mode, impl="reference", **kwargs)
    slack = (torch.tensor(lengths, dtype=torch.float64) + 16) * 2.0**-53 * magnitudes
    assert bool(((out - values).abs() <= slack).all())


@pytest.mark.quick
@pytest.mark.parametrize("upstream", ["random", "zero"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_gradients_equal_the_references(lengths, mode, dtype, upstream, device):
    x = torch.randn(sum(lengths), dtype=dtype, generator=GENERATOR)
    kwargs = options(mode, len(x), dtype)
    grad = torch.randn(len(lengths), dtype=dtype, generator=GENERATOR) * (upstream == "random")

    def gradients(function, as_type):
        leaves = {"x": x.to(as_type, copy=True).requires_grad_()}
        rest = dict(kwargs)
        if mode == "weighted":
            leaves["weights"] = rest["weights"] = kwargs["weights"].to(as_type, copy=True).requires_grad_()
        function(leaves["x"], offsets(lengths), mode, **rest).backward(grad.to(as_type))
        return {name: leaf.grad for name, leaf in leaves.items()}

    expected = gradients(reference.sequence_reduce, torch.float64)
    for name, actual in gradients(functools.partial(reduce_on, device), dtype).items():
        assert actual.dtype == dtype
        # One rounding of the product; the oracle and the factor gamma**t err by (t + 16) float64 roundings.
        rtol = torch.finfo(dtype).eps / 2 + (max(lengths, default=0) + 16) * 2.0**-53
        torch.testing.assert_close(actual.double(), expected[name], rtol=rtol, atol=torch.finfo(dtype).smallest_normal)
        if upstream == "zero":
            assert not actual.any()


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    lengths = (3, 0, 5, 1)
    x = torch.randn(9, dtype=torch.float64, generator=GENERATOR, requires_grad=True)
    kwargs = options(mode, 9, torch.float64)
    weights = kwargs.pop("weights", None)
    if weights is None:
        assert torch.autograd.gradcheck(lambda x: prefcore.sequence_reduce(x, offsets(lengths), mode, **kwargs), (x,))
    else:
        assert torch.autograd.gradcheck(
            lambda x, w: prefcore.sequence_reduce(x, offsets(lengths), mode, w), (x, weights.requires_grad_())
        )


@pytest.mark.parametrize("needy", ["x", "weights"])
def test_only_wanted_gradients_are_computed(needy):
    tensors = {"x": torch.randn(4), "weights": torch.randn(4)}
    tensors[needy].requires_grad_()
    prefcore.sequence_reduce(tensors["x"], offsets((1, 3)), "weighted", tensors["weights"]).sum().backward()
    other = "weights" if needy == "x" else "x"
    torch.testing.assert_close(tensors[needy].grad, tensors[other], rtol=0, atol=0)
    assert tensors[other].grad is None


@pytest.mark.parametrize("mode", MODES)
def test_strided_and_sliced_inputs(mode):
    lengths = (4, 0, 300, 7)
    base = torch.randn(2 * 311 + 5, generator=GENERATOR)
    x = base[5:][::2]
    kwargs = options(mode, 2 * 311, torch.float32)
    if mode == "weighted":
        kwargs["weights"] = kwargs["weights"][::2]
    cu_seqlens = torch.stack([offsets(lengths), offsets(lengths)], dim=1)[:, 0]
    assert not x.is_contiguous()
    assert not cu_seqlens.is_contiguous()
    out = prefcore.sequence_reduce(x.requires_grad_(), cu_seqlens, mode, **kwargs)
    assert_within_docstring_bound(out, x.detach(), lengths, mode, **kwargs)
    # The gradient of sum() reaches backward as an expanded, unstrided tensor.
    (grad,) = torch.autograd.grad(out.sum(), x)
    expected = torch.tensor(factors(lengths, mode, **kwargs), dtype=torch.float64)
    torch.testing.assert_close(grad.double(), expected, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_one_at_a_time_bit_for_bit(mode, device):
    lengths = (5, 256, 0, 1023, 77)
    x = torch.randn(sum(lengths), generator=GENERATOR)
    kwargs = options(mode, len(x), x.dtype)
    packed = reduce_on(device, x, offsets(lengths), mode, **kwargs)
    for s, (a, b) in enumerate(itertools.pairwise(offsets(lengths).tolist())):
        own = {k: v[a:b] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        alone = reduce_on(device, x[a:b], offsets((b - a,)), mode, **own)
        assert alone.item() == packed[s].item()


@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_depend_on_the_number_of_threads(mode):
    lengths = (400_000, 0, 3, 700_000, *range(200))  # enough work for two threads
    x = torch.randn(sum(lengths), generator=GENERATOR)
    kwargs = options(mode, len(x), x.dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            out = prefcore.sequence_reduce(leaf, offsets(lengths), mode, **kwargs)
            out.square().sum().backward()
            results.append((out.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_cancellation_costs_float32_sums_nothing(device):
    x = torch.tensor([1e8, 1.0, -1e8] * 1000)
    assert reduce_on(device, x, offsets((3000,))).item() == 1000.0


@pytest.mark.parametrize("gamma", [0, 0.0, 1e-30, 1.0, 1])
def test_discounts_at_the_ends_of_their_range(gamma, device):
    lengths = (1, 0, 600, 2)
    x = torch.randn(603, generator=GENERATOR)
    out = reduce_on(device, x, offsets(lengths), "discounted", gamma=gamma)
    assert_within_docstring_bound(out, x, lengths, "discounted", gamma=gamma)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_sequence(bad, device):
    x = torch.ones(9)
    x[4] = bad
    out = reduce_on(device, x, offsets((3, 3, 3)))
    assert out[0] == out[2] == 3
    assert not math.isfinite(out[1].item())


def test_inputs_are_left_unchanged_and_checked_by_autograd():
    x, weights = torch.randn(6), torch.randn(6, requires_grad=True)
    kept = x.clone(), weights.detach().clone()
    out = prefcore.sequence_reduce(x, offsets((2, 4)), "weighted", weights)
    out.sum().backward(retain_graph=True)
    assert torch.equal(x, kept[0])
    assert torch.equal(weights, kept[1])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 5), st.integers(250, 260), st.integers(0, 600)), max_size=12),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_random_raggedness(lengths, mode, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), dtype=dtype, generator=generator)
    kwargs = options(mode, len(x), dtype, seed)
    out = prefcore.sequence_reduce(x, offsets(lengths), mode, **kwargs)
    assert_within_docstring_bound(out, x, lengths, mode, **kwargs)

    # The sequences in another order give the same numbers in that order.
    order = torch.randperm(len(lengths), generator=generator).tolist()
    moved = [lengths[s] for s in order]
    rows = [torch.arange(a, b) for a, b in itertools.pairwise(offsets(lengths).tolist())]
    index = torch.cat([torch.arange(0), *(rows[s] for s in order)])
    kwargs = {k: v[index] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    again = prefcore.sequence_reduce(x[index], offsets(moved), mode, **kwargs)
    assert again.tolist() == out[order].tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [(3, 0, 5), (0, 0), ()])
def test_opcheck(lengths, mode):
    total = sum(lengths)
    weights = options(mode, total, torch.float32).get("weights")
    cu_seqlens = offsets(lengths)
    torch.library.opcheck(
        torch.ops.prefcore.sequence_reduce_forward_cpu.default,
        (torch.randn(total), cu_seqlens, weights, mode, 0.9),
    )
    torch.library.opcheck(
        torch.ops.prefcore.sequence_reduce_backward_cpu.default,
        (torch.randn(len(lengths)), cu_seqlens, weights, total, mode, 0.9),
    )


@pytest.mark.parametrize(("mode", "backend"), [*((mode, "aot_eager") for mode in MODES), ("weighted", "inductor")])
def test_compiles_once_for_all_sizes(mode, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    gamma = 0.97 if mode == "discounted" else None

    def function(x, cu_seqlens, weights):
        return prefcore.sequence_reduce(2 * x, cu_seqlens, mode, weights, gamma=gamma).tanh()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    frames = 0
    for lengths in ((5, 0, 9), (2, 3), (40, 1, 0, 7, 300), (2, 2, 2, 2, 2, 2, 2)):
        x = torch.randn(sum(lengths), generator=GENERATOR)
        weights = options(mode, len(x), x.dtype).get("weights")
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        eager, traced = function(a, offsets(lengths), weights), compiled(b, offsets(lengths), weights)
        torch.testing.assert_close(traced, eager)
        eager.sum().backward()
        traced.sum().backward()
        torch.testing.assert_close(b.grad, a.grad)
        # A float constant makes the first trace start over, which counts as a second frame.
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


# The GPU splits a sequence's lanes over a warp or a block, the CPU keeps them in one worker.
# In float64, where no final rounding hides the order of the additions.
TEAMS = r"""
#include <cstdio>
#include <random>
#include <vector>

#include "core/sequence_reduce.h"

using namespace prefcore;

template <int Threads, Reduce Mode>
double reduce(const std::vector<double>& x, const std::vector<double>& w, std::vector<double>& grad) {
  using Members = Team<Threads>;
  double lanes[Threads];
  for (int worker = 0; worker < Threads; ++worker) {
    const auto powers = Members::template discount<Mode>(0.97, worker);
    double sum[Members::kHeld];
    Members::template accumulate<Mode>(x.data(), w.data(), x.size(), powers, worker, sum);
    lanes[worker] = Members::join(sum);
    Members::template spread<Mode>(0.3, w.data(), x.size(), powers, worker, grad.data());
  }
  for (int half = Threads / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return finish<Mode, double>(lanes[0], x.size());
}

template <Reduce Mode>
bool agree(const std::vector<double>& x, const std::vector<double>& w) {
  std::vector<double> solo(x.size(), NAN), warp(x.size(), NAN), block(x.size(), NAN);
  const double value = reduce<1, Mode>(x, w, solo);
  return value == reduce<32, Mode>(x, w, warp) && value == reduce<256, Mode>(x, w, block) && solo == warp &&
         solo == block;
}

int main() {
  std::mt19937 random(0);
  std::normal_distribution<double> normal;
  for (const int length : {0, 1, 31, 32, 33, 255, 256, 257, 1000, 65537}) {
    std::vector<double> x(length), w(length);
    for (double& value : x) value = normal(random);
    for (double& value : w) value = normal(random);
    if (!(agree<Reduce::Sum>(x, w) && agree<Reduce::Mean>(x, w) && agree<Reduce::Discounted>(x, w) &&
          agree<Reduce::Weighted>(x, w))) {
      std::printf("teams differ at length %d\n", length);
      return 1;
    }
  }
}
"""


def test_a_warp_and_a_block_have_the_bits_of_one_worker(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    sources = pathlib.Path(__file__).parents[2] / "csrc"
    if compiler is None or not sources.is_dir():
        pytest.skip("needs a C++ compiler and the sources in csrc")
    (tmp_path / "teams.cpp").write_text("#include <cmath>\n" + TEAMS)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", f"-I{sources}"]
    subprocess.run([compiler, *flags, tmp_path / "teams.cpp", "-o", tmp_path / "teams"], check=True)
    run = subprocess.run([tmp_path / "teams"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


X = torch.zeros(4)
CU = offsets((1, 3))
REFUSALS = [
    (TypeError, "x must be a Tensor, got list", {"x": [1.0]}),
    (TypeError, "cu_seqlens must be a Tensor, got tuple", {"cu_seqlens": (0, 4)}),
    (ValueError, r"x must have shape \[T\], got \[2, 2\]", {"x": torch.zeros(2, 2)}),
    (ValueError, "x must be float32 or float64, got torch.bfloat16", {"x": X.bfloat16()}),
    (ValueError, "x must be float32 or float64, got torch.int64", {"x": X.long()}),
    (ValueError, r"cu_seqlens must have shape \[S \+ 1\], got \[1, 3\]", {"cu_seqlens": CU[None]}),
    (ValueError, r"cu_seqlens must have shape \[S \+ 1\], got \[0\]", {"cu_seqlens": CU[:0]}),
    (ValueError, "cu_seqlens must be int32, got torch.int64", {"cu_seqlens": CU.long()}),
    (ValueError, "cu_seqlens must be on x's device cpu, got meta", {"cu_seqlens": CU.to("meta")}),
    (ValueError, "cu_seqlens must start at 0, got 1", {"cu_seqlens": CU + 1}),
    (ValueError, "cu_seqlens must end at the number of rows, 4, got 1", {"cu_seqlens": CU[:2]}),
    (ValueError, "cu_seqlens must not decrease, got 3 before 2", {"cu_seqlens": CU.new_tensor([0, 3, 2, 4])}),
    (ValueError, "mode must be one of .*'sum'.* got 'max'", {"mode": "max"}),
    (ValueError, "mode 'weighted' needs weights", {"mode": "weighted"}),
    (ValueError, "mode 'sum' does not use weights", {"weights": X}),
    (ValueError, "mode 'discounted' needs gamma", {"mode": "discounted"}),
    (ValueError, "mode 'mean' does not use gamma", {"mode": "mean", "gamma": 0.5}),
    (ValueError, r"gamma must be in \[0, 1\], got 1.5", {"mode": "discounted", "gamma": 1.5}),
    (ValueError, r"gamma must be in \[0, 1\], got nan", {"mode": "discounted", "gamma": float("nan")}),
    (TypeError, "gamma must be a number, got Tensor", {"mode": "discounted", "gamma": X[0]}),
    (TypeError, "weights must be a Tensor, got list", {"mode": "weighted", "weights": [1.0]}),
    (ValueError, r"weights must have x's shape \[4\], got \[3\]", {"mode": "weighted", "weights": X[:3]}),
    (ValueError, "weights must have x's dtype torch.float32", {"mode": "weighted", "weights": X.double()}),
    (ValueError, "weights must be on x's device cpu", {"mode": "weighted", "weights": X.to("meta")}),
    (ValueError, "impl of sequence_reduce must be one of", {"impl": "triton"}),
    (ValueError, r"impl='cuda' of sequence_reduce runs on \['cuda'\] tensors, got cpu", {"impl": "cuda"}),
]


@pytest.mark.parametrize(("error", "text", "change"), REFUSALS, ids=[text for _, text, _ in REFUSALS])
def test_refusals(error, text, change):
    arguments = {"x": X, "cu_seqlens": CU, **change}
    with pytest.raises(error, match=text):
        prefcore.sequence_reduce(**arguments)
    if "impl" not in change:
        with pytest.raises(error, match=text):
            prefcore.sequence_reduce(**arguments, impl="reference")
