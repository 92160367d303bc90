import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import prefcore

DTYPES = (torch.float32, torch.float64)
GENERATOR = torch.Generator().manual_seed(0)
BATCHES = {
    "each kind of length": (0, 1, 31, 0, 32, 33, 255, 256, 257, 1000, 65537, 0),
    "one": (1,),
    "thousands": tuple(torch.randint(0, 20, (3000,), generator=GENERATOR).tolist()),
    "all empty": (0, 0, 0),
    "no sequences": (),
}
DECAYS = ((0.99, 0.95), (1, 1.0), (1.0, 0.0), (0.0, 0.9))


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(lengths, dtype, options=("values", "mask", "bootstrap"), generator=GENERATOR):
    """Rewards, and of values, mask and bootstrap those named, by the names of gae's arguments."""
    total = sum(lengths)
    made = {
        "rewards": torch.randn(total, dtype=dtype, generator=generator),
        "values": torch.randn(total, dtype=dtype, generator=generator),
        "mask": torch.rand(total, generator=generator) < 0.7,
        "bootstrap": torch.randn(len(lengths), dtype=dtype, generator=generator),
    }
    return {name: x if name == "rewards" or name in options else None for name, x in made.items()}


def run(lengths, given, **kwargs):
    kwargs = {"gamma": 0.99, "lam": 0.95, **kwargs}
    return prefcore.gae(cu_seqlens=offsets(lengths), **given, **kwargs)


def literal(lengths, gamma, lam, *, rewards, values, mask, bootstrap):
    """The definition in Python's floats: advantages, returns, and the same recurrence of magnitudes."""
    total = sum(lengths)
    r = rewards.tolist()
    v = [0.0] * total if values is None else values.tolist()
    m = [True] * total if mask is None else mask.tolist()
    ends = offsets(lengths).tolist()
    last = [0.0] * len(lengths) if bootstrap is None else bootstrap.tolist()
    advantages, returns, magnitudes = [0.0] * total, [0.0] * total, [0.0] * total
    for (first, behind), value in zip(itertools.pairwise(ends), last, strict=True):
        advantage = magnitude = 0.0
        for t in range(behind - 1, first - 1, -1):
            if not m[t]:
                continue
            advantage = r[t] + gamma * value - v[t] + gamma * lam * advantage
            magnitude = abs(r[t]) + gamma * abs(value) + abs(v[t]) + gamma * lam * magnitude
            value = v[t]
            advantages[t], returns[t], magnitudes[t] = advantage, advantage + value, magnitude
    return tuple(torch.tensor(x, dtype=torch.float64) for x in (advantages, returns, magnitudes))


def assert_within_docstring_bound(out, lengths, given, gamma=0.99, lam=0.95):
    advantages, returns, magnitudes = literal(lengths, gamma, lam, **given)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    n = sizes.repeat_interleave(sizes).double()
    # The docstring's slack, and that of the literal loop: of its 4 roundings a step each is as large as a term.
    slack = ((3 * n + 64) + (4 * n + 4)) * 2.0**-53 * (magnitudes + returns.abs())
    for ours, expected in ((out.advantages, advantages), (out.returns, returns)):
        assert ours.shape == expected.shape
        assert ours.dtype == given["rewards"].dtype
        assert not ours.requires_grad
        error = (ours.double() - expected).abs()
        assert bool((error <= torch.finfo(ours.dtype).eps / 2 * expected.abs() + slack).all()), error.max()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [(), ("values",), ("values", "bootstrap"), ("values", "mask", "bootstrap")])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_values_are_exact_to_the_bound_of_the_docstring(lengths, options, dtype):
    given = inputs(lengths, dtype, options)
    assert_within_docstring_bound(run(lengths, given), lengths, given)


@pytest.mark.parametrize(("gamma", "lam"), DECAYS)
def test_decays_at_the_ends_of_their_range(gamma, lam):
    lengths = (1, 0, 600, 2, 5000)
    for options in (("values",), ("mask", "bootstrap"), ("values", "mask", "bootstrap")):
        given = inputs(lengths, torch.float32, options)
        assert_within_docstring_bound(run(lengths, given, gamma=gamma, lam=lam), lengths, given, gamma, lam)


@pytest.mark.parametrize(("gamma", "lam"), DECAYS)
@pytest.mark.parametrize("lengths", [(3, 0, 40, 1, 7), (0, 0), ()])
def test_reference_agrees_with_plain_python(lengths, gamma, lam):
    for options in ((), ("values", "mask", "bootstrap")):
        given = inputs(lengths, torch.float64, options)
        out = run(lengths, given, gamma=gamma, lam=lam, impl="reference")
        assert_within_docstring_bound(out, lengths, given, gamma, lam)


def test_a_whole_long_sequence_without_decay_costs_float32_one_rounding():
    lengths = (65537,)
    rewards = torch.full(lengths, 0.1)
    out = run(lengths, {"rewards": rewards, "values": None}, gamma=1, lam=1)
    exact = torch.arange(65537, 0, -1, dtype=torch.float64) * rewards[0].double()
    torch.testing.assert_close(out.returns.double(), exact, rtol=2.0**-24 + 2.0**-35, atol=0)


def test_without_decay_an_advantage_is_the_rewards_to_come_less_the_value():
    given = inputs((4, 3), torch.float64, ("values",))
    r, v = given["rewards"], given["values"]
    out = run((4, 3), given, gamma=1, lam=1)
    to_come = torch.cat([part.flip(0).cumsum(0).flip(0) for part in r.split([4, 3])])
    torch.testing.assert_close(out.advantages, to_come - v)
    torch.testing.assert_close(out.returns, to_come)


def test_with_lambda_zero_an_advantage_is_one_temporal_difference():
    given = inputs((4, 3), torch.float64)
    given["mask"] = None
    r, v, boot = given["rewards"], given["values"], given["bootstrap"]
    out = run((4, 3), given, gamma=0.9, lam=0)
    following = torch.cat([v[1:4], boot[:1], v[5:], boot[1:]])
    torch.testing.assert_close(out.advantages, r + 0.9 * following - v)


def test_masked_tokens_are_as_if_they_were_not_packed():
    lengths = (50, 0, 700, 3, 300)
    given = inputs(lengths, torch.float64)
    given["mask"][-300:] = False  # a sequence of which nothing counts
    mask = given["mask"]
    kept = [int(part.sum()) for part in mask.split(lengths)]
    dense = {**given, "rewards": given["rewards"][mask], "values": given["values"][mask], "mask": None}
    out, packed = run(lengths, given), run(kept, dense)
    assert not out.advantages[~mask].any()
    assert not out.returns[~mask].any()
    torch.testing.assert_close(out.advantages[mask], packed.advantages, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.returns[mask], packed.returns, rtol=1e-12, atol=1e-12)


def test_what_masked_tokens_hold_is_not_read():
    given = inputs((300, 40), torch.float32)
    clean = run((300, 40), given)
    for name in ("rewards", "values"):
        given[name] = given[name].masked_fill(~given["mask"], float("nan"))
    for ours, expected in zip(run((300, 40), given), clean, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_ones_has_the_bits_of_none(dtype):
    lengths = (5, 0, 257, 3000)
    given = inputs(lengths, dtype)
    given["mask"] = torch.ones_like(given["mask"])
    for ours, expected in zip(run(lengths, given), run(lengths, {**given, "mask": None}), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("options", [("values",), ("values", "mask", "bootstrap")])
def test_packed_equals_one_at_a_time_bit_for_bit(options):
    lengths = (5, 256, 0, 1023, 77)
    given = inputs(lengths, torch.float64, options)
    packed = run(lengths, given)
    for s, (a, b) in enumerate(itertools.pairwise(offsets(lengths).tolist())):
        own = {k: None if x is None else x[s : s + 1] if k == "bootstrap" else x[a:b] for k, x in given.items()}
        for ours, alone in zip(packed, run((b - a,), own), strict=True):
            assert torch.equal(ours[a:b], alone)


def test_bits_do_not_depend_on_the_number_of_threads():
    lengths = (400_000, 0, 3, 300_000, *range(200))  # enough work for two threads
    given = inputs(lengths, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(lengths, given))
    finally:
        torch.set_num_threads(before)
    for out in results[1:]:
        assert torch.equal(out.advantages, results[0].advantages)
        assert torch.equal(out.returns, results[0].returns)


def test_a_bad_value_stays_in_its_sequence_and_does_not_reach_later_tokens():
    given = inputs((3, 40, 3), torch.float32, ("values",))
    given["rewards"][20] = float("nan")
    out = run((3, 40, 3), given)
    bad = out.advantages.isnan()
    assert bad[3:21].all()
    assert not bad[:3].any()
    assert not bad[21:].any()


def test_strided_inputs_that_require_gradients():
    lengths = (4, 0, 300, 7)
    given = inputs([2 * n for n in lengths], torch.float32)
    given["bootstrap"] = given["bootstrap"].repeat_interleave(2)
    strided = {name: x[::2] for name, x in given.items()}
    expected = run(lengths, {name: x.contiguous() for name, x in strided.items()})
    for name in ("rewards", "values", "bootstrap"):
        strided[name] = strided[name].requires_grad_()
    cu_seqlens = torch.stack([offsets(lengths), offsets(lengths)], dim=1)[:, 0]
    for impl in ("auto", "reference"):
        out = prefcore.gae(cu_seqlens=cu_seqlens, **strided, gamma=0.99, lam=0.95, impl=impl)
        for ours, other in zip(out, expected, strict=True):
            assert not ours.requires_grad
            torch.testing.assert_close(ours, other)


def test_inputs_are_left_unchanged():
    given = inputs((2, 4), torch.float32)
    kept = {name: x.clone() for name, x in given.items()}
    for impl in ("auto", "reference"):
        run((2, 4), given, impl=impl)
        assert all(torch.equal(x, kept[name]) for name, x in given.items())


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 5), st.integers(30, 34), st.integers(250, 520)), max_size=8),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    options=st.sets(st.sampled_from(["values", "mask", "bootstrap"])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_random_raggedness(lengths, gamma, lam, options, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    given = inputs(lengths, dtype, tuple(options), generator)
    assert_within_docstring_bound(run(lengths, given, gamma=gamma, lam=lam), lengths, given, gamma, lam)


@pytest.mark.parametrize("lengths", [(3, 0, 5), (0, 0), ()])
def test_opcheck(lengths):
    for options in ((), ("values", "mask", "bootstrap")):
        x = inputs(lengths, torch.float32, options)
        arguments = (x["rewards"], x["values"], offsets(lengths), x["mask"], x["bootstrap"], 0.9, 0.8)
        torch.library.opcheck(torch.ops.prefcore.gae_cpu.default, arguments)


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(cu_seqlens, rewards, values, mask, bootstrap):
        out = prefcore.gae(2 * rewards, values, cu_seqlens, gamma=1.0, lam=0.95, mask=mask, bootstrap=bootstrap)
        return out.advantages.tanh(), out.returns

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    frames = 0
    for lengths in ((5, 0, 9), (2, 3), (40, 2, 0, 7, 300), (2, 2, 2, 2, 2, 2, 2)):
        given = inputs(lengths, torch.float32)
        torch.testing.assert_close(compiled(offsets(lengths), **given), function(offsets(lengths), **given))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


R = torch.zeros(4)
CU = offsets((1, 3))
REFUSALS = [
    (TypeError, "rewards must be a Tensor, got list", {"rewards": [1.0]}),
    (TypeError, "values must be a Tensor, got list", {"values": [1.0]}),
    (TypeError, "gamma must be a number, got Tensor", {"gamma": R[0]}),
    (TypeError, "lam must be a number, got NoneType", {"lam": None}),
    (ValueError, r"rewards must have shape \[T\], got \[2, 2\]", {"rewards": torch.zeros(2, 2)}),
    (ValueError, "rewards must be float32 or float64, got torch.bfloat16", {"rewards": R.bfloat16()}),
    (ValueError, "cu_seqlens must be int32, got torch.int64", {"cu_seqlens": CU.long()}),
    (ValueError, "cu_seqlens must start at 0, got 1", {"cu_seqlens": CU + 1}),
    (ValueError, "cu_seqlens must not decrease, got 3 before 2", {"cu_seqlens": CU.new_tensor([0, 3, 2, 4])}),
    (ValueError, r"values must have shape \[4\], got \[3\]", {"values": R[:3]}),
    (ValueError, "values must be torch.float32, got torch.float64", {"values": R.double()}),
    (ValueError, "values must be on the rewards' device cpu, got meta", {"values": R.to("meta")}),
    (ValueError, "mask must be torch.bool, got torch.float32", {"mask": R}),
    (ValueError, r"mask must have shape \[4\], got \[2\]", {"mask": R[:2].bool()}),
    (ValueError, r"bootstrap must have shape \[2\], got \[4\]", {"bootstrap": R}),
    (ValueError, r"gamma must be in \[0, 1\], got 1.5", {"gamma": 1.5}),
    (ValueError, r"lam must be in \[0, 1\], got nan", {"lam": float("nan")}),
    (ValueError, "impl of gae must be one of", {"impl": "triton"}),
]


@pytest.mark.parametrize(("error", "text", "change"), REFUSALS, ids=[text for _, text, _ in REFUSALS])
def test_refusals(error, text, change):
    arguments = {"rewards": R, "values": None, "cu_seqlens": CU, "gamma": 1.0, "lam": 0.95, **change}
    with pytest.raises(error, match=text):
        prefcore.gae(**arguments)
    if "impl" not in change:
        with pytest.raises(error, match=text):
            prefcore.gae(**arguments, impl="reference")
