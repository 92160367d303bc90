import bisect
import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import prefcore

DTYPES = (torch.float32, torch.float64)
GENERATOR = torch.Generator().manual_seed(0)
BATCHES = {
    "each kind of length": (0, 1, 31, 0, 255, 256, 257, 1000, 5000, 0),
    "one": (1,),
    "one long": (65537,),
    "thousands": tuple(torch.randint(0, 12, (2000,), generator=GENERATOR).tolist()),
    "all empty": (0, 0, 0),
    "no sequences": (),
}
EVERYTHING = ("terminal", "streams", "segments", "kl", "mask", "clamp")
KINDS = (
    ("terminal",),
    ("terminal", "kl"),
    ("streams",),
    ("segments", "mask"),
    ("terminal", "segments", "k3"),
    ("streams", "k2", "tokens"),
    ("streams", "divergence", "turns", "mask"),
    EVERYTHING,
)


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def segments(lengths, dtype, most, weight, generator):
    """Up to ``most`` ends a sequence, some of them twice and some behind the sequence."""
    counts = torch.randint(0, most + 1, (len(lengths),), generator=generator).tolist()
    ends = [
        torch.randint(0, n + 3, (count,), generator=generator).sort().values
        for n, count in zip(lengths, counts, strict=True)
    ]
    return prefcore.SegmentReward(
        torch.cat([*ends, torch.zeros(0)]).to(torch.int32),
        torch.randn(sum(counts), dtype=dtype, generator=generator),
        offsets(counts),
        weight,
    )


def inputs(lengths, dtype, options, generator=GENERATOR):
    """Arguments of token_rewards."""
    total = sum(lengths)

    def normal(size=total):
        return torch.randn(size, dtype=dtype, generator=generator)

    made = {"total": total}
    if "terminal" in options:
        made |= {"terminal_clamp": 1.5}
    made["terminal"] = normal(len(lengths)) if "terminal" in options else None
    if "streams" in options:
        made["streams"] = [
            prefcore.DenseReward(normal(), 0.5),
            prefcore.DenseReward(normal(), -3.0, normal(), 2.0),
            prefcore.DenseReward(normal(), 1.0, normal()),
        ]
    if "segments" in options:
        made["segments"] = [
            segments(lengths, dtype, 9, 0.3, generator),
            segments(lengths, dtype, 2, -1.0, generator),
        ]
        made["past_end"] = "move" if total % 2 else "drop"
    kinds = {"kl", "k2", "k3"} & set(options)
    if kinds:
        made |= {"logps": 4 * normal(), "ref_logps": 4 * normal(), "kl_coef": 0.2}
        made["kl"] = "k1" if "kl" in options else kinds.pop()
        made["max_log_ratio"] = 5.0 if "mask" in options else 20.0
    if "divergence" in options:
        made |= {"divergence": normal().abs(), "kl_coef": 0.7}
    if "tokens" in options:
        made["kl_coef"] = normal()
    if "turns" in options:
        made |= {"kl_coef": normal(3), "turns": torch.randint(0, 3, (total,), generator=generator, dtype=torch.int32)}
    if "clamp" in options:
        made["clamp"] = (-0.5, 0.75)
    if "mask" in options:
        made["mask"] = torch.rand(total, generator=generator) < 0.6
    return made


def run(lengths, made, **kwargs):
    made = {**made, **kwargs}
    return prefcore.token_rewards(made.pop("terminal"), offsets(lengths), **made)


def k3(u):
    """exp(-u) - 1 + u without its cancellation near 0."""
    if abs(u) >= 1:
        return math.exp(-u) - 1 + u
    return math.fsum((-u) ** k / math.factorial(k) for k in range(2, 25))


def clip(x, low, high):
    return min(max(x, low), high)


def literal(lengths, made):
    """The definition in Python's floats: rewards, the magnitudes of their terms, and how many terms there are."""
    total = sum(lengths)
    made = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    bounds = list(itertools.pairwise(offsets(lengths).tolist()))
    mask = made.get("mask") or [True] * total
    terms = [[] for _ in range(total)]
    for s, (first, behind) in enumerate(bounds):
        counted = [t for t in range(first, behind) if mask[t]]
        for item in made.get("segments", ()):
            begin, end = item.cu_segments.tolist()[s : s + 2]
            for place, score in zip(item.ends.tolist()[begin:end], item.scores.tolist()[begin:end], strict=True):
                before = bisect.bisect_right(counted, first + place)
                t = counted[before - 1] if before else None
                if t is not None and (made["past_end"] == "move" or t == first + place):
                    terms[t].append(item.weight * score)
        if made["terminal"] is not None and counted:
            most = made.get("terminal_clamp") or math.inf
            terms[counted[-1]].append(clip(made["terminal"][s], -most, most))
    for item in made.get("streams", ()):
        most = math.inf if item.clamp is None else item.clamp
        values = item.values.tolist()
        baseline = [0.0] * total if item.baseline is None else item.baseline.tolist()
        for t in range(total):
            terms[t].append(clip(item.weight * (values[t] - baseline[t]), -most, most))
    if "kl_coef" in made:
        most = made.get("max_log_ratio") or math.inf
        for t in range(total):
            if "divergence" in made:
                value = made["divergence"][t]
            else:
                u = clip(made["logps"][t] - made["ref_logps"][t], -most, most)
                value = {"k1": u, "k2": u * u / 2, "k3": k3(u)}[made["kl"]]
            coefficient = made["kl_coef"]
            if "turns" in made:
                coefficient = coefficient[made["turns"][t]]
            elif isinstance(coefficient, list):
                coefficient = coefficient[t]
            terms[t].append(-coefficient * value)
    low, high = made.get("clamp", (-math.inf, math.inf))
    rewards = [clip(math.fsum(x), low, high) if m else 0.0 for x, m in zip(terms, mask, strict=True)]
    sizes = [(sum(map(abs, x)), len(x)) for x in terms]
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64).reshape(-1, 2)


def assert_within_docstring_bound(out, lengths, made, dtype):
    expected, sizes = literal(lengths, made)
    assert out.shape == expected.shape
    assert out.dtype == dtype
    assert not out.requires_grad
    # The docstring's slack; the literal's terms have as much.
    slack = 2 * (sizes[:, 1] + 80) * 2.0**-53 * sizes[:, 0]
    error = (out.double() - expected).abs()
    assert bool((error <= torch.finfo(dtype).eps / 2 * expected.abs() + slack).all()), error.max()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", KINDS, ids=lambda x: "-".join(x))
@pytest.mark.parametrize("lengths", [b for b in BATCHES.values() if sum(b) < 60000])
def test_rewards_are_exact_to_the_bound_of_the_docstring(lengths, options, dtype):
    made = inputs(lengths, dtype, options)
    assert_within_docstring_bound(run(lengths, made), lengths, made, dtype)


def test_a_long_sequence_is_exact_to_the_bound_of_the_docstring():
    lengths = (65537,)
    made = inputs(lengths, torch.float32, ("terminal", "k3", "streams"))
    assert_within_docstring_bound(run(lengths, made), lengths, made, torch.float32)


@pytest.mark.parametrize("past_end", ["drop", "move"])
@pytest.mark.parametrize("options", KINDS, ids=lambda x: "-".join(x))
@pytest.mark.parametrize("lengths", [(3, 0, 40, 1, 7), (0, 0), ()])
def test_reference_agrees_with_plain_python(lengths, options, past_end):
    made = inputs(lengths, torch.float64, options)
    if "segments" in made:
        made["past_end"] = past_end
    expected, sizes = literal(lengths, made)
    out = run(lengths, made, impl="reference")
    # Ten roundings of terms, and torch's expm1(-u) + u those of an exp(-u) beside u.
    bound = 10 * 2.0**-53 * (sizes[:, 0] + 100)
    assert bool(((out - expected).abs() <= bound).all())


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 5), st.integers(250, 260)), max_size=6),
    options=st.sets(st.sampled_from(["terminal", "streams", "segments", "k3", "mask", "clamp", "tokens", "turns"])),
    past_end=st.sampled_from(["drop", "move"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_random_raggedness(lengths, options, past_end, dtype, seed):
    options |= {"streams"} if not options & {"terminal", "streams", "segments", "k3"} else set()
    options -= set() if "k3" in options else {"tokens", "turns"}
    made = inputs(lengths, dtype, options, torch.Generator().manual_seed(seed))
    if "segments" in made:
        made["past_end"] = past_end
    assert_within_docstring_bound(run(lengths, made), lengths, made, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_k3_keeps_its_digits_from_tiny_to_huge_log_ratios(dtype):
    magnitudes = torch.cat([torch.logspace(-12, 1.3, 300, dtype=dtype), torch.tensor([0.0], dtype=dtype)])
    u = torch.cat([magnitudes, -magnitudes])
    lengths = (len(u),)
    made = {"terminal": None, "logps": u, "ref_logps": torch.zeros_like(u), "kl": "k3", "kl_coef": -1.0}
    out = run(lengths, made, max_log_ratio=None)
    assert_within_docstring_bound(out, lengths, made | {"max_log_ratio": None}, dtype)
    assert bool((out >= 0).all())


def test_infinite_log_ratios_are_clamped_or_stay_infinite():
    inf = math.inf
    logps = torch.tensor([-inf, inf, 1.0, 700.0, -700.0, math.nan])
    made = {"terminal": None, "logps": logps, "ref_logps": torch.zeros(6), "kl": "k3", "kl_coef": -1.0}
    free = run((6,), made, max_log_ratio=None).tolist()
    assert free[:2] == [inf, inf]
    assert free[3] == 699.0
    assert free[4] == inf  # of float32
    assert math.isnan(free[5])
    clamped = run((6,), made).tolist()
    assert clamped[0] == clamped[4] == pytest.approx(math.exp(20) - 21)
    assert clamped[1] == clamped[3] == pytest.approx(math.exp(-20) + 19)
    assert math.isnan(clamped[5])
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    assert run((6,), double, max_log_ratio=None)[4].item() == pytest.approx(math.exp(700), rel=1e-12)


def test_scores_that_end_at_one_token_are_added_and_those_past_the_end_dropped_or_moved():
    ends = torch.tensor([1, 1, 2, 5, 0, 9], dtype=torch.int32)
    scores = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    item = (ends, scores, offsets((4, 2)), 0.5)
    made = {"terminal": None, "segments": [item], "total": 5}
    assert run((3, 2), made, past_end="drop").tolist() == [0, 1.5, 2, 8, 0]
    assert run((3, 2), made, past_end="move").tolist() == [0, 1.5, 6, 8, 16]
    mask = torch.tensor([True, True, False, False, False])
    assert run((3, 2), made, past_end="drop", mask=mask).tolist() == [0, 1.5, 0, 0, 0]
    assert run((3, 2), made, past_end="move", mask=mask).tolist() == [0, 7.5, 0, 0, 0]


def test_the_terminal_reward_is_the_last_counted_tokens():
    mask = torch.tensor([True, False, False, False, True, True])
    out = run((3, 1, 0, 2), {"terminal": torch.tensor([1.0, 2.0, 3.0, 4.0])}, mask=mask)
    assert out.tolist() == [1, 0, 0, 0, 0, 4]


def test_what_masked_tokens_hold_is_not_read():
    lengths = (300, 40)
    made = inputs(lengths, torch.float32, (*EVERYTHING, "turns"))
    clean = run(lengths, made)
    bad = ~made["mask"]
    for name in ("logps", "ref_logps"):
        made[name] = made[name].masked_fill(bad, math.nan)
    made["turns"] = made["turns"].masked_fill(bad, 99)
    made["streams"] = [item._replace(values=item.values.masked_fill(bad, math.nan)) for item in made["streams"]]
    assert torch.equal(run(lengths, made), clean)
    assert bool((clean[bad] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_ones_has_the_bits_of_none(dtype):
    lengths = (5, 0, 257, 3000)
    made = inputs(lengths, dtype, EVERYTHING)
    made["mask"] = torch.ones_like(made["mask"])
    assert torch.equal(run(lengths, made), run(lengths, made, mask=None))


@pytest.mark.parametrize("past_end", ["drop", "move"])
def test_packed_equals_one_at_a_time_bit_for_bit(past_end):
    lengths = (5, 256, 0, 1023, 77)
    made = inputs(lengths, torch.float64, (*EVERYTHING, "k3")) | {"past_end": past_end}
    packed = run(lengths, made)
    for s, (a, b) in enumerate(itertools.pairwise(offsets(lengths).tolist())):
        own = {**made, "total": b - a, "terminal": made["terminal"][s : s + 1]}
        for name in ("logps", "ref_logps", "mask"):
            own[name] = made[name][a:b]
        own["streams"] = [
            item._replace(values=item.values[a:b], baseline=None if item.baseline is None else item.baseline[a:b])
            for item in made["streams"]
        ]
        own["segments"] = []
        for item in made["segments"]:
            i, j = item.cu_segments[s : s + 2].tolist()
            own["segments"].append((item.ends[i:j], item.scores[i:j], offsets((j - i,)), item.weight))
        assert torch.equal(packed[a:b], run((b - a,), own))


def test_bits_do_not_depend_on_the_number_of_threads():
    lengths = (400_000, 0, 3, 300_000, *range(200))  # enough work for two threads
    made = inputs(lengths, torch.float32, EVERYTHING)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(lengths, made))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_strided_inputs_that_require_gradients_are_left_unchanged():
    lengths = (4, 0, 300, 7)
    made = inputs([2 * n for n in lengths], torch.float32, ("streams", "kl", "mask"))
    made["terminal"] = torch.randn(8, generator=GENERATOR)
    made["total"] //= 2

    def halve(x):
        if isinstance(x, torch.Tensor):
            x = x[::2]
            return x.requires_grad_() if x.is_floating_point() else x
        if isinstance(x, list):
            return [item._replace(values=halve(item.values), baseline=halve(item.baseline)) for item in x]
        return x

    strided = {name: halve(x) for name, x in made.items()}
    dense = {name: x.detach().clone() if isinstance(x, torch.Tensor) else x for name, x in strided.items()}
    kept = {name: x.clone() for name, x in made.items() if isinstance(x, torch.Tensor)}
    for impl in ("auto", "reference"):
        out = run(lengths, strided, impl=impl)
        assert not out.requires_grad
        torch.testing.assert_close(out, run(lengths, dense))
    assert all(torch.equal(made[name], x) for name, x in kept.items())


def test_a_coefficient_may_be_a_0_dim_tensor():
    made = inputs((3, 4), torch.float32, ("terminal", "kl"))
    expected = run((3, 4), made, kl_coef=0.25)
    for impl in ("auto", "reference"):
        assert torch.equal(run((3, 4), made, kl_coef=torch.tensor(0.25), impl=impl), expected)


def test_the_references_turn_without_coefficient_makes_nan_of_its_tokens():
    turns = torch.tensor([0, 1, 2, -1], dtype=torch.int32)
    made = {"divergence": torch.ones(4), "kl_coef": torch.tensor([0.5, 0.25]), "turns": turns}
    out = prefcore.reference.token_rewards(None, offsets((4,)), total=4, dtype=torch.float32, **made)
    assert out[:2].tolist() == [-0.5, -0.25]
    assert bool(out[2:].isnan().all())


def test_32_streams_and_sets_of_segments_are_served():
    values = torch.arange(32.0)
    one = torch.ones(1)
    item = (torch.zeros(1, dtype=torch.int32), one, offsets((1,)))
    made = {"terminal": None, "streams": [(x[None],) for x in values], "segments": [item] * 32}
    assert run((1,), made).item() == values.sum() + 32


@pytest.mark.parametrize("lengths", [(3, 0, 5), (0, 0), ()])
def test_opcheck(lengths, monkeypatch):
    calls = []
    table = importlib.import_module("prefcore.ops.token_rewards")._TOKEN_REWARDS
    monkeypatch.setitem(table, "cpu", lambda *arguments: calls.append(arguments))
    for options in (("terminal",), EVERYTHING, ("divergence", "turns")):
        run(lengths, inputs(lengths, torch.float32, options))
    for arguments in calls:
        torch.library.opcheck(torch.ops.prefcore.token_rewards_cpu.default, arguments)


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(cu_seqlens, terminal, logps, ref_logps, mask, values, ends, scores, cu_segments):
        out = prefcore.token_rewards(
            2 * terminal,
            cu_seqlens,
            streams=[(values, 0.5, None, 2.0)],
            segments=[(ends, scores, cu_segments, 0.5)],
            logps=logps,
            ref_logps=ref_logps,
            kl_coef=0.1,
            mask=mask,
        )
        return out.tanh()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    frames = 0
    for lengths in ((5, 0, 9), (2, 3), (40, 2, 0, 7, 300), (2, 2, 2, 2, 2, 2, 2)):
        made = inputs(lengths, torch.float32, EVERYTHING)
        arguments = (
            offsets(lengths),
            *(made[name] for name in ("terminal", "logps", "ref_logps", "mask")),
            made["streams"][0].values,
            *made["segments"][0][:3],
        )
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


R = torch.zeros(4)
CU = offsets((1, 3))
ENDS = torch.tensor([0, 1, 0], dtype=torch.int32)
SEGMENT = (ENDS, R[:3], offsets((1, 2)))
FALLING = (ENDS, R[:3], offsets((0, 3)))
TURNS = torch.tensor([0, 1, 2, 1], dtype=torch.int32)
REFUSALS = [
    (TypeError, "terminal must be a Tensor, got list", {"terminal": [1.0]}),
    (TypeError, "cu_seqlens must be a Tensor, got list", {"cu_seqlens": [0, 1]}),
    (TypeError, "each of streams must be a DenseReward, got Tensor", {"streams": [R]}),
    (TypeError, r"each of segments must be a SegmentReward\(.*, got 1 items", {"segments": [(R,)]}),
    (TypeError, r"streams\[0\].weight must be a number, got Tensor", {"streams": [(R, R)]}),
    (TypeError, r"segments\[0\].weight must be a number, got str", {"segments": [(*SEGMENT, "a")]}),
    (TypeError, "terminal_clamp must be a number, got str", {"terminal_clamp": "1"}),
    (TypeError, "clamp must be a tuple", {"clamp": 1.0}),
    (TypeError, "kl_coef must be a number or a torch.Tensor, got str", {"divergence": R, "kl_coef": "1"}),
    (ValueError, "there must be a reward or a penalty", {"terminal": None, "total": 4}),
    (ValueError, "total must be given", {"total": None}),
    (ValueError, "terminal must be float32 or float64, got torch.bfloat16", {"terminal": R[:2].bfloat16()}),
    (ValueError, r"terminal must have shape \[2\], got \[4\]", {"terminal": R}),
    (ValueError, "terminal must be torch.float32, got torch.float64", {"terminal": R[:2].double(), "streams": [(R,)]}),
    (ValueError, r"streams\[0\].values must have shape \[4\], got \[3\]", {"streams": [(R[:3],)]}),
    (ValueError, r"streams\[0\].baseline must have shape \[4\], got \[3\]", {"streams": [(R, 1.0, R[:3])]}),
    (ValueError, r"streams\[0\].clamp must not be negative, got -1", {"streams": [(R, 1.0, None, -1)]}),
    (ValueError, "streams must be 32 at the most, got 33", {"streams": [(R,)] * 33}),
    (
        ValueError,
        r"segments\[0\].ends must be torch.int32, got torch.int64",
        {"segments": [(ENDS.long(), *SEGMENT[1:])]},
    ),
    (ValueError, r"segments\[0\].scores must have shape \[3\], got \[4\]", {"segments": [(ENDS, R, CU)]}),
    (ValueError, r"segments\[0\].cu_segments must have shape \[3\], got \[2\]", {"segments": [(ENDS, R[:3], CU[:2])]}),
    (
        ValueError,
        r"segments\[0\].cu_segments must end at the number of rows, 3, got 4",
        {"segments": [(ENDS, R[:3], CU)]},
    ),
    (ValueError, r"segments\[0\].ends must not be negative, got -1", {"segments": [(ENDS - 1, *SEGMENT[1:])]}),
    (
        ValueError,
        r"segments\[0\].ends must not decrease within a sequence, got 1 before 0 \(index 1\)",
        {"segments": [FALLING]},
    ),
    (ValueError, "past_end must be one of", {"past_end": "keep"}),
    (ValueError, "logps and ref_logps must be given together", {"logps": R}),
    (ValueError, "divergence is instead of", {"logps": R, "ref_logps": R, "divergence": R, "kl_coef": 1.0}),
    (ValueError, "kl must be one of", {"kl": "k4"}),
    (ValueError, "kl_coef must be given with .*, got None", {"divergence": R}),
    (ValueError, "kl_coef must be given with .*, got it without them", {"kl_coef": 1.0}),
    (ValueError, r"kl_coef must have shape \[4\], got \[2\]", {"divergence": R, "kl_coef": R[:2]}),
    (ValueError, "kl_coef must be torch.float32 on cpu", {"divergence": R, "kl_coef": torch.tensor(1.0).double()}),
    (ValueError, r"turns need a kl_coef of shape \[K\]", {"divergence": R, "kl_coef": 1.0, "turns": TURNS}),
    (
        ValueError,
        r"turns must be in \[0, 2\) where tokens count, got 2",
        {"divergence": R, "kl_coef": R[:2], "turns": TURNS},
    ),
    (ValueError, "turns must be torch.int32", {"divergence": R, "kl_coef": R[:2], "turns": TURNS.long()}),
    (ValueError, "max_log_ratio must not be negative, got nan", {"max_log_ratio": math.nan}),
    (ValueError, r"clamp must be \(least, greatest\), got \(1, 0\)", {"clamp": (1, 0)}),
    (ValueError, "mask must be torch.bool, got torch.float32", {"mask": R}),
    (ValueError, "mask must be on cu_seqlens's device cpu, got meta", {"mask": R.bool().to("meta")}),
    (ValueError, "cu_seqlens must be int32, got torch.int64", {"cu_seqlens": CU.long()}),
    (ValueError, "cu_seqlens must end at the number of rows, 5, got 4", {"total": 5}),
    (
        ValueError,
        "cu_seqlens must end at the number of rows, 4, got no sequence",
        {"terminal": R[:0], "cu_seqlens": CU[:1]},
    ),
    (ValueError, "impl of token_rewards must be one of", {"impl": "triton"}),
]


@pytest.mark.parametrize(("error", "text", "change"), REFUSALS, ids=[text for _, text, _ in REFUSALS])
def test_refusals(error, text, change):
    arguments = {"terminal": R[:2], "cu_seqlens": CU, "total": 4, **change}
    with pytest.raises(error, match=text):
        prefcore.token_rewards(**arguments)
    if "impl" not in change:
        with pytest.raises(error, match=text):
            prefcore.token_rewards(**arguments, impl="reference")
