import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import prefcore

HOWS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "token_sum")
COUNTED = HOWS[:4]
BATCHES = {
    "ragged": (3, 0, 1, 700, 0, 33, 256, 2),
    "thousands": tuple(torch.randint(0, 9, (2000,), generator=torch.Generator().manual_seed(0)).tolist()),
    "all empty": (0, 0, 0),
    "no sequences": (),
}


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def options(how):
    return {"horizon": 512} if how == "seq_mean_token_sum_norm" else {}


def aggregate_on(device, values, cu_seqlens, how, num_items=None, **kwargs):
    """``aggregate`` on a device, from the CPU and back."""
    num_items = num_items.to(device) if isinstance(num_items, torch.Tensor) else num_items
    return prefcore.aggregate(values.to(device), cu_seqlens.to(device), how, num_items, **kwargs).cpu()


def truth(values, lengths, how, num_items=None, horizon=None):
    """The result and d result / d values, by plain Python in float64."""
    ends = [0, *itertools.accumulate(lengths)]
    numbers = values.double().tolist()
    rows = [numbers[a:b] for a, b in itertools.pairwise(ends)]
    if how.startswith("token"):
        divisors = [1.0] * len(rows)
        count = sum(lengths)
    else:
        divisors = [{"seq_mean_token_mean": len(row) or 1, "seq_mean_token_sum": 1}.get(how, horizon) for row in rows]
        count = sum(n > 0 for n in lengths)
    if how == "token_sum":
        count = 1
    count = num_items or count or 1
    total = math.fsum(math.fsum(row) / d for row, d in zip(rows, divisors, strict=True))
    gradient = [1 / d / count for row, d in zip(rows, divisors, strict=True) for _ in row]
    return total / count, torch.tensor(gradient, dtype=torch.float64)


def assert_close_to_truth(out, expected, values, dtype):
    # Roundings of [S] sums in the values' dtype, relative to the magnitude of what is summed.
    assert out.shape == ()
    assert out.dtype == dtype
    scale = max(1.0, values.double().abs().sum().item())
    assert abs(out.item() - expected) <= 8 * torch.finfo(dtype).eps * scale


@pytest.mark.quick
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_items", [None, 37, 12.5, torch.tensor(41), torch.tensor(7.5)], ids=str)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_values_and_gradients(lengths, how, num_items, dtype, impl, device):
    if how == "token_sum":
        num_items = None
    values = torch.randn(sum(lengths), dtype=dtype, generator=torch.Generator().manual_seed(1))
    leaf = values.clone().requires_grad_()
    out = aggregate_on(device, leaf, offsets(lengths), how, num_items, impl=impl, **options(how))
    expected, gradient = truth(values, lengths, how, float(num_items or 0), **options(how))
    assert_close_to_truth(out, expected, values, dtype)
    out.backward()
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("lengths", [(0, 0), ()])
def test_a_batch_without_tokens_gives_zero_with_a_gradient(lengths, how, device):
    values = torch.zeros(0, requires_grad=True)
    out = aggregate_on(device, values, offsets(lengths), how, **options(how))
    assert out.item() == 0
    (2 * out).backward()
    assert values.grad.shape == (0,)


@pytest.mark.parametrize("how", ["seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"])
def test_empty_sequences_do_not_count(how, device):
    values = torch.randn(6)
    with_empty = aggregate_on(device, values, offsets((0, 2, 0, 0, 4)), how, **options(how))
    without = aggregate_on(device, values, offsets((2, 4)), how, **options(how))
    assert with_empty.item() == without.item()


@pytest.mark.quick
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("how", COUNTED)
def test_parts_of_a_batch_add_up_to_the_whole(how, as_tensor, device):
    lengths = (5, 0, 120, 3, 64, 0, 9, 1)
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(2))
    count = sum(lengths) if how == "token_mean" else sum(n > 0 for n in lengths)
    num_items = torch.tensor(count) if as_tensor else count

    def run(part, lengths, num_items):
        leaf = part.clone().requires_grad_()
        out = aggregate_on(device, leaf, offsets(lengths), how, num_items, **options(how))
        out.backward()
        return out.item(), leaf.grad

    whole, gradient = run(values, lengths, None)
    assert run(values, lengths, num_items)[0] == whole
    for cut in range(len(lengths) + 1):
        rows = sum(lengths[:cut])
        first, first_gradient = run(values[:rows], lengths[:cut], num_items)
        second, second_gradient = run(values[rows:], lengths[cut:], num_items)
        # The gradient of each token has the same bits; the losses differ by the order of a few additions.
        assert torch.equal(torch.cat([first_gradient, second_gradient]), gradient)
        assert abs(first + second - whole) <= 4 * torch.finfo(torch.float32).eps * values.abs().sum() / count


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=12),
    how=st.sampled_from(HOWS),
    counted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_raggedness(lengths, how, counted, seed):
    values = torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    num_items = 11 if counted and how != "token_sum" else None
    out = prefcore.aggregate(values, offsets(lengths), how, num_items, **options(how))
    assert_close_to_truth(out, truth(values, lengths, how, num_items, **options(how))[0], values, values.dtype)


@pytest.mark.parametrize("how", HOWS)
def test_gradcheck(how):
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda values: prefcore.aggregate(values, offsets((2, 0, 5)), how, **options(how)), (values,)
    )


def test_num_items_carries_no_gradient(device):
    num_items = torch.tensor(3.0, requires_grad=True)
    values = torch.randn(4, requires_grad=True)
    aggregate_on(device, values, offsets((4,)), "token_mean", num_items).backward()
    assert num_items.grad is None


@pytest.mark.parametrize("how", HOWS)
def test_compiles_once_for_all_sizes(how):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(values, cu_seqlens):
        return prefcore.aggregate(2 * values, cu_seqlens, how, **options(how))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((5, 0, 9), (2, 3), (40, 1, 0, 7, 300)):
        values = torch.randn(sum(lengths))
        a, b = values.clone().requires_grad_(), values.clone().requires_grad_()
        eager, traced = function(a, offsets(lengths)), compiled(b, offsets(lengths))
        torch.testing.assert_close(traced, eager)
        eager.backward()
        traced.backward()
        torch.testing.assert_close(b.grad, a.grad)
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_num_items_in_a_tensor_is_traced_and_checked_when_it_is_there(impl):
    def function(values, cu_seqlens, num_items):
        return prefcore.aggregate(values, cu_seqlens, "token_mean", num_items, impl=impl)

    torch._dynamo.reset()
    arguments = torch.randn(14), offsets((5, 0, 9)), torch.tensor(37)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    traced = [compiled]
    if impl == "auto":  # the reference checks the offsets' values where nothing is compiled
        traced += [make_fx(function, tracing_mode=mode)(*arguments) for mode in ("real", "fake", "symbolic")]
    for run in traced:
        torch.testing.assert_close(run(*arguments), function(*arguments))
        with pytest.raises(ValueError, match="num_items must be positive and finite, got -3"):
            run(*arguments[:2], torch.tensor(-3))


def test_opcheck_of_the_check():
    torch.library.opcheck(torch.ops.prefcore.aggregate_num_items.default, (torch.tensor(3.0),))


VALUES = torch.zeros(4)
NORM = "seq_mean_token_sum_norm"
REFUSALS = [
    (TypeError, "values must be a Tensor, got float", {"values": 1.0}),
    (ValueError, r"values must have shape \[T\], got \[2, 2\]", {"values": torch.zeros(2, 2)}),
    (ValueError, "cu_seqlens must end at the number of rows, 4, got 3", {"cu_seqlens": offsets((1, 2))}),
    (ValueError, "how must be one of .*'token_sum'.* got 'mean'", {"how": "mean"}),
    (ValueError, "how='token_sum' does not use num_items", {"how": "token_sum", "num_items": 3}),
    (ValueError, "num_items must be positive and finite, got 0", {"num_items": 0}),
    (ValueError, "num_items must be positive and finite, got nan", {"num_items": float("nan")}),
    (TypeError, "num_items must be a number, got str", {"num_items": "4"}),
    (TypeError, "num_items must be a number, got bool", {"num_items": True}),
    (ValueError, r"num_items must be a 0-d tensor, got shape \[1\]", {"num_items": torch.ones(1)}),
    (ValueError, "num_items must be on the values' device cpu", {"num_items": torch.ones((), device="meta")}),
    (ValueError, "num_items must have a real dtype, got torch.bool", {"num_items": torch.tensor(True)}),
    (ValueError, "num_items must have a real dtype, got torch.complex64", {"num_items": torch.tensor(4 + 0j)}),
    (ValueError, "num_items must be positive and finite, got -2.5", {"num_items": torch.tensor(-2.5)}),
    (ValueError, "num_items must be positive and finite, got nan", {"num_items": torch.tensor(float("nan"))}),
    (ValueError, f"how='{NORM}' needs horizon", {"how": NORM}),
    (ValueError, "how='token_mean' does not use horizon", {"horizon": 8}),
    (ValueError, "horizon must be positive and finite, got -1", {"how": NORM, "horizon": -1}),
    (TypeError, "horizon must be a number, got Tensor", {"how": NORM, "horizon": torch.ones(())}),
    (ValueError, "impl of aggregate must be one of", {"impl": "triton"}),
]


@pytest.mark.parametrize(("error", "text", "change"), REFUSALS, ids=[text for _, text, _ in REFUSALS])
def test_refusals(error, text, change):
    arguments = {"values": VALUES, "cu_seqlens": offsets((1, 3)), "how": "token_mean", **change}
    with pytest.raises(error, match=text):
        prefcore.aggregate(**arguments)
    if "impl" not in change:
        with pytest.raises(error, match=text):
            prefcore.aggregate(**arguments, impl="reference")
