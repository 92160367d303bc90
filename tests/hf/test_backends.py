"""Each attention backend gives what softmax over ``Layout.attends()`` gives, for any layout."""

import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
from torch.nn.attention.flex_attention import flex_attention

from prefcore.data import pack
from prefcore.hf import _backends
from prefcore.hf._backends import BACKENDS, Call, Needs

CPU = torch.device("cpu")
PLAIN = Call(scale=None, dropout=0.0, window=None, softcap=None, sinks=None)
NEEDS = Needs(16, 16, frozenset({None}), softcap=False, sinks=False, dropout=False)
HEADS, KV_HEADS, SIZE = 4, 2, 8

lengths = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=4
)
windows = st.none() | st.integers(1, 14)


def layout_of(sizes, sharing="share"):
    return pack([[1] * p for p, _ in sizes], [[[1] * r for r in group] for _, group in sizes], sharing=sharing).layout


def ragged(seed, longest=300):
    generator = np.random.default_rng(seed)
    draw = lambda high: int(generator.integers(1, high + 1))
    return [(draw(longest), [draw(longest // 2) for _ in range(draw(5))]) for _ in range(4)]


def allowed(layout, window):
    """Layout.attends, and of those the last ``window`` positions."""
    position = layout.of_tokens()[1]
    attends = layout.attends()
    return attends if window is None else attends & (position[:, None] - position[None] < window)


def oracle(layout, query, key, value, call):
    """Softmax over all pairs, with the forbidden ones at -inf."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhe,khe->hqk", query, key) * (query.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~torch.from_numpy(allowed(layout, call.window)), -math.inf)
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    return torch.einsum("hqk,khe->qhe", scores.softmax(-1)[..., : key.shape[0]], value)


def tensors(layout, value_size=SIZE, dtype=torch.float64, heads=(HEADS, KV_HEADS), sinks=False):
    generator = torch.Generator().manual_seed(layout.tokens)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    n = layout.tokens
    leaves = [make(n, heads[0], SIZE), make(n, heads[1], SIZE), make(n, heads[1], value_size)]
    return [*leaves, make(heads[0])] if sinks else leaves


def with_gradients(function, leaves):
    out = function(*leaves)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_backend_equals_oracle(name, layout, call, leaves, tolerance):
    plan = BACKENDS[name].plan(layout, CPU, frozenset({call.window}))
    ask = lambda given: call._replace(sinks=given[0] if given else None)
    mine = with_gradients(lambda q, k, v, *s: BACKENDS[name].call(plan, q, k, v, ask(s)), leaves)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    theirs = with_gradients(lambda q, k, v, *s: oracle(layout, q, k, v, ask(s)), doubles)
    for part, (a, b) in zip(("out", "query", "key", "value", "sinks"), zip(mine, theirs, strict=True), strict=False):
        error = float((a.double() - b).abs().max())
        assert error <= tolerance * max(1.0, float(b.abs().max())), (part, error)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@settings(max_examples=25, deadline=None)
@given(sizes=lengths, window=windows, value=st.integers(1, 9))
@example(sizes=[(1, [2]), (2, [1])], window=1, value=1)  # padding behind the last key, whose window is empty
def test_dense_equals_softmax_over_the_layout(sizes, window, softcap, sinks, value):
    layout = layout_of(sizes)
    leaves = tensors(layout, value, sinks=sinks)
    assert_backend_equals_oracle("sdpa", layout, PLAIN._replace(window=window, softcap=softcap), leaves, 1e-13)


@pytest.mark.quick
@pytest.mark.parametrize("sharing", ["share", "pack"])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_dense_equals_softmax_on_long_ragged_layouts(sharing, window, scale):
    layout = layout_of(ragged(3, longest=60), sharing)
    assert_backend_equals_oracle("sdpa", layout, PLAIN._replace(window=window, scale=scale), tensors(layout), 1e-12)


@pytest.mark.quick
@settings(max_examples=100, deadline=None)
@given(sizes=lengths, sharing=st.sampled_from(["share", "pack"]))
def test_dense_buckets_hold_every_token_once_and_little_padding(sizes, sharing):
    layout = layout_of(sizes, sharing)
    plan = _backends.dense_plan(layout, CPU, frozenset({None}))
    query, back = plan.query.tolist(), plan.back.tolist()
    assert [query[place] for place in back] == list(range(layout.tokens))
    assert sum(token >= 0 for token in query) == layout.tokens
    assert len(query) == sum(bucket.size * bucket.q for bucket in plan.buckets)
    assert len(plan.key) == sum(bucket.size * bucket.k for bucket in plan.buckets)
    work = int((layout.lengths * (layout.context_lengths + layout.lengths)).sum())
    padded = sum(bucket.size * bucket.q * bucket.k for bucket in plan.buckets)
    assert padded <= 1.15**2 * work + len(layout.starts) * 64 * 64
    keys = layout.context_lengths + layout.lengths
    assert sum(token >= 0 for token in plan.key.tolist()) == keys.sum()


def test_a_dense_plan_moves_whole():
    plan = _backends.dense_plan(layout_of([(9, [5, 3, 1]), (1, [7])]), CPU, frozenset({None, 4}))
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    tensors = [moved.query, moved.key, moved.back, *(t for inverse in moved.inverses for t in inverse)]
    tensors += [bucket.context for bucket in moved.buckets if bucket.context is not None]
    tensors += [mask for masks in moved.masks.values() for mask in masks if mask is not None]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.masks.keys() == plan.masks.keys()


def test_alike_segments_make_one_bucket_and_unlike_ones_several():
    few = _backends.dense_plan(layout_of([(40, [20, 21, 20, 19])]), CPU, frozenset({None}))
    assert len(few.buckets) == 2  # the prompt, and its responses
    many = _backends.dense_plan(layout_of([(10, [5, 400, 2000])]), CPU, frozenset({None}))
    assert len(many.buckets) >= 3


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_dense_dropout_is_random_and_right_on_average(softcap):
    layout = layout_of([(6, [3, 5])])
    leaves = [leaf.detach() for leaf in tensors(layout, heads=(4096, 1))]
    leaves[0][:] = leaves[0][:, :1]  # all heads alike, so that heads are draws
    plan = _backends.dense_plan(layout, CPU, frozenset({None}))
    call = PLAIN._replace(softcap=softcap)
    still = _backends.dense(plan, *leaves, call)[:, 0]
    torch.manual_seed(0)
    dropped = _backends.dense(plan, *leaves, call._replace(dropout=0.4))
    assert not torch.equal(dropped[:, 0], dropped[:, 1])
    error = dropped.std(1) / math.sqrt(dropped.shape[1])
    assert ((dropped.mean(1) - still).abs() <= 6 * error).all()
    torch.manual_seed(0)
    assert torch.equal(dropped, _backends.dense(plan, *leaves, call._replace(dropout=0.4)))


def blocks_of(layout, window):
    return _backends.flex_plan(layout, CPU, frozenset({window})).blocks[window]


def tiles(grid):
    """``grid [N, N]`` as tiles of 128, ``[rows, columns, 128, 128]``; and which entries are there."""
    n = -(-len(grid) // 128) * 128
    wide, there = np.zeros((n, n), dtype=bool), np.zeros((n, n), dtype=bool)
    wide[: len(grid), : len(grid)], there[: len(grid), : len(grid)] = grid, True
    cut = lambda x: x.reshape(n // 128, 128, n // 128, 128).swapaxes(1, 2)
    return cut(wide), cut(there)


def listed(counts, columns):
    grid = np.zeros(columns.shape[-2:], dtype=bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        grid[row, columns[0, 0, row, :count].tolist()] = True
    return grid


@pytest.mark.parametrize("sharing", ["share", "pack"])
@pytest.mark.parametrize("window", [None, 1, 100, 200, 400])
@pytest.mark.parametrize("seed", range(4))
def test_flex_blocks_cover_what_counts_and_its_full_blocks_are_full(seed, window, sharing):
    layout = layout_of(ragged(seed, longest=500), sharing)
    mask, attends = blocks_of(layout, window), allowed(layout, window)
    place = torch.arange(layout.tokens)
    zero = torch.zeros((), dtype=torch.int32)
    assert np.array_equal(mask.mask_mod(zero, zero, place[:, None], place[None]).numpy(), attends)

    wide, there = tiles(attends)
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any()
    assert ((partial | full) >= wide.any((-1, -2))).all()
    assert (full <= (wide & there).all((-1, -2))).all()
    if window is None:  # nor is much looked at in vain
        assert (partial & ~wide.any((-1, -2))).sum() <= 0.25 * wide.any((-1, -2)).sum()
    # The backward's lists are the transposed ones.
    assert np.array_equal(listed(mask.q_num_blocks, mask.q_indices), partial.T)
    assert np.array_equal(listed(mask.full_q_num_blocks, mask.full_q_indices), full.T)


def test_flex_finds_full_blocks_in_long_segments_and_their_contexts():
    mask = blocks_of(layout_of([(512, [256, 256])]), None)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    # Prompt: below the diagonal, 6 of 4 x 4. Each response of two rows: 4 of the prompt for both, 1 of its own.
    assert full.sum() == 6 + 2 * (4 + 4 + 1)


@pytest.fixture
def plain_flex(monkeypatch):
    """FlexAttention computes all scores where it is not compiled: quick to start, and right for sinks on a CPU."""
    monkeypatch.setattr(_backends, "_flex_attention", lambda device: flex_attention)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_flex_equals_softmax_over_the_layout(plain_flex, window, sinks, softcap, heads):
    layout = layout_of([(9, [5, 3, 1]), (1, [7]), (4, [2, 2])])
    q, k, v, *s = (leaf.detach() for leaf in tensors(layout, dtype=torch.float32, heads=heads, sinks=sinks))
    call = PLAIN._replace(window=window, softcap=softcap, scale=0.4, sinks=s[0] if s else None)
    got = _backends.flex(_backends.flex_plan(layout, CPU, frozenset({window})), q, k, v, call)
    expected = oracle(layout, *(x.double() for x in (q, k, v)), call)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_flex_compiled_on_the_cpu_equals_softmax_over_the_layout():
    call = PLAIN._replace(window=70)
    run = torch.no_grad()(lambda plan, q, k, v: _backends.flex(plan, q, k, v, call))
    # Of the second and later layouts Inductor's C++ did not compile where it was to serve sizes that vary.
    for sizes in ([(130, [60, 9])], [(70, [33]), (5, [150, 2])]):
        layout = layout_of(sizes)
        q, k, v = (leaf.detach() for leaf in tensors(layout, dtype=torch.float32))
        plan = _backends.flex_plan(layout, CPU, frozenset({70}))
        expected = oracle(layout, q.double(), k.double(), v.double(), call)
        torch.testing.assert_close(run(plan, q, k, v).double(), expected, rtol=0, atol=1e-5)


def loop_of_segments(q, k, v, cu_q, cu_k, max_q, max_k, window, scale, softcap=0.0):
    """What a varlen kernel promises: each sequence alone, causal from the bottom right, ``window`` (left, right)."""
    assert int(cu_q[-1]) == len(q)
    assert int(cu_k[-1]) == len(k)
    assert (int(cu_q.diff().max()), int(cu_k.diff().max())) == (max_q, max_k)
    assert all(x.is_contiguous() for x in (q, k, v))
    assert {cu_q.dtype, cu_k.dtype} == {torch.int32}
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    parts = []
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        scores = torch.einsum("qhe,khe->hqk", q[a:b], k[c:d]) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        keep = (behind >= 0) & ((behind <= window[0]) | (window[0] < 0))
        parts.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(~keep, -math.inf).softmax(-1), v[c:d]))
    return torch.cat(parts)


@pytest.fixture
def kernels_as_loops(monkeypatch):
    """varlen_attn and flash-attn with their signatures, in plain PyTorch: what is left to a GPU is their arithmetic."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not _backends._varlen_takes("window_size"):
        pytest.skip("this torch's varlen_attn has no windows")

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa or q.shape[1] == k.shape[1]
        assert window_size[1] == 0
        return loop_of_segments(q, k, v, cu_q, cu_k, max_q, max_k, window_size, scale)

    def flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal, window_size, softcap, deterministic
    ):
        assert causal
        assert dropout_p == 0
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        return loop_of_segments(q, k, v, cu_q, cu_k, max_q, max_k, window_size, softmax_scale, softcap)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    flash = types.ModuleType("flash_attn")
    flash.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", flash)


@pytest.mark.parametrize("sharing", ["share", "pack"])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("value", [SIZE, 5])
@pytest.mark.parametrize("name", ["varlen", "flash"])
def test_varlen_kernels_are_asked_for_softmax_over_the_layout(kernels_as_loops, name, sharing, window, heads, value):
    layout = layout_of([(9, [5, 3, 1]), (1, [7]), (4, [2, 2])], sharing)
    softcap = 2.0 if name == "flash" else None
    call = PLAIN._replace(window=window, scale=0.4, softcap=softcap)
    assert_backend_equals_oracle(name, layout, call, tensors(layout, value, heads=heads), 1e-13)


@pytest.fixture(scope="module")
def varlen_operator():
    """A kernel to torch.compile, as the real one is; forward only."""

    @torch.library.custom_op("prefcore_tests::varlen", mutates_args=())
    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        left: int,
    ) -> torch.Tensor:
        return loop_of_segments(q, k, v, cu_q, cu_k, max_q, max_k, (left, 0), None)

    @varlen.register_fake
    def _(q, k, v, *others):
        return q.new_empty(*q.shape[:2], v.shape[2])

    return varlen


@pytest.fixture
def graphs():
    """The graphs that torch.compile makes of what is compiled with ``graphs.compile``."""

    class Graphs(list):
        def compile(self, function):
            return torch.compile(function, backend=lambda graph, _: self.append(graph) or graph, fullgraph=True)

    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


LAYOUTS = (
    [(9, [4, 3]), (1, [5])],
    [(3, [2]), (12, [40, 3])],
    [(30, [1, 2, 30, 5]), (2, [9])],
    [(5, [7])],
    [(6, [3, 1])],
)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("sharing", ["share", "pack"])
def test_varlen_compiles_whole_and_for_all_layouts(varlen_operator, kernels_as_loops, graphs, monkeypatch, sharing):
    call = PLAIN._replace(window=5)
    layouts = [layout_of(sizes, sharing) for sizes in LAYOUTS]
    plans = [_backends.varlen_plan(layout, CPU, frozenset({5})) for layout in layouts]
    given = [[leaf.detach() for leaf in tensors(layout)] for layout in layouts]
    wanted = [_backends.varlen(plan, *leaves, call) for plan, leaves in zip(plans, given, strict=True)]

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return varlen_operator(q, k, v, cu_q, cu_k, max_q, max_k, window_size[0])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    compiled = graphs.compile(_backends.varlen)
    counts = []
    for plan, leaves, expected in 2 * list(zip(plans, given, wanted, strict=True)):
        assert torch.equal(compiled(plan, *leaves, call), expected)
        counts.append(len(graphs))
    # One for the first shapes, one for shapes that vary, one where a length did so later than the others.
    assert counts[-1] == counts[len(LAYOUTS) - 1] <= 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_compiles_whole_and_not_for_each_layout(graphs):
    call = PLAIN._replace(window=5)
    compiled = graphs.compile(_backends.flex)
    counts = []
    for sizes in (*LAYOUTS, *LAYOUTS):
        layout = layout_of(sizes)
        q, k, v = (leaf.detach() for leaf in tensors(layout, dtype=torch.float32))
        plan = _backends.flex_plan(layout, CPU, frozenset({5}))
        expected = oracle(layout, q.double(), k.double(), v.double(), call)
        torch.testing.assert_close(compiled(plan, q, k, v, call).double(), expected, rtol=0, atol=1e-5)
        counts.append(len(graphs))
    assert counts[-1] == counts[len(LAYOUTS) - 1] <= 3


def test_shared_keys_are_copied_once_and_unshared_ones_not_at_all():
    layout = layout_of([(9, [5, 3]), (1, [7])])
    plan = _backends.varlen_plan(layout, CPU, frozenset({None}))
    assert len(plan.keys) == int(plan.cu_k[-1]) == 9 + (9 + 5) + (9 + 3) + 1 + (1 + 7)
    packed = _backends.varlen_plan(layout_of([(9, [5, 3]), (1, [7])], "pack"), CPU, frozenset({None}))
    assert packed.keys is None
    assert torch.equal(packed.cu_q, packed.cu_k)
    key = torch.randn(25, 2, 4)
    assert _backends._gather_keys(packed, key, key)[0] is key


def test_the_gradient_of_shared_keys_is_the_same_in_every_run():
    layout = layout_of([(7, [3] * 16)])
    plan = _backends.varlen_plan(layout, CPU, frozenset({None}))
    key = torch.randn(layout.tokens, 2, 8, requires_grad=True)
    upstream = torch.randn(len(plan.keys), 2, 8)
    first, second = (torch.autograd.grad(_backends._gather_keys(plan, key, key)[0], key, upstream)[0] for _ in range(2))
    assert torch.equal(first, second)
    expected = torch.zeros(layout.tokens, 2, 8, dtype=torch.float64).index_add_(0, plan.keys.long(), upstream.double())
    torch.testing.assert_close(first.double(), expected, rtol=0, atol=17 * 2**-24 * float(expected.abs().max()))


CUDA = torch.device("cuda")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "needs", "device", "dtype", "text"),
    [
        ("varlen", {}, CPU, torch.bfloat16, "it runs on GPUs only, not on cpu"),
        ("varlen", {}, CUDA, torch.float32, "float16 and bfloat16 only, not torch.float32"),
        ("varlen", {"softcap": True}, CUDA, torch.bfloat16, "it has no softcap"),
        ("varlen", {"sinks": True, "dropout": True}, CUDA, torch.bfloat16, "it has no sinks, dropout"),
        ("varlen", {"head_size": 20}, CUDA, torch.bfloat16, "a multiple of 8, not 20 and 16"),
        ("varlen", {"head_size": 512}, CUDA, torch.bfloat16, "heads of up to 256 values"),
        ("varlen", {"value_size": 24}, CUDA, torch.bfloat16, "not 16 and 24"),
        ("flash", {"sinks": True}, CUDA, torch.float16, "it has no sinks"),
        ("flash", {}, CUDA, torch.float64, "float16 and bfloat16 only, not torch.float64"),
        ("flex", {"dropout": True}, CUDA, torch.bfloat16, "it has no dropout"),
        ("flex", {}, CUDA, torch.float64, "it takes no float64"),
        ("flex", {}, CPU, torch.float32, "it has no backward on a CPU"),
    ],
)
def test_what_a_backend_lacks_is_refused_by_name(name, needs, device, dtype, text, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(_backends, "_varlen_takes", lambda name: True)
    find = _backends.importlib.util.find_spec
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda n: True if n == "flash_attn" else find(n))
    with pytest.raises(NotImplementedError, match=f"the attention backend '{name}' cannot be used here: .*{text}"):
        _backends.choose(name, NEEDS._replace(**needs), device, dtype, True)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("needs", "dtype", "flash", "chosen"),
    [
        ({}, torch.bfloat16, True, "flash"),
        ({"dropout": True}, torch.bfloat16, True, "flash"),
        ({}, torch.bfloat16, False, "varlen"),
        ({"softcap": True}, torch.bfloat16, False, "flex"),
        ({"sinks": True}, torch.bfloat16, True, "flex"),
        ({}, torch.float32, True, "flex"),
        ({"sinks": True, "dropout": True}, torch.bfloat16, True, "sdpa"),
        ({}, torch.float64, True, "sdpa"),
    ],
)
def test_auto_takes_the_best_backend_that_has_all(needs, dtype, flash, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(_backends, "_varlen_takes", lambda name: True)
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda n: True if flash else None)
    assert _backends.choose("auto", NEEDS._replace(**needs), CUDA, dtype, True) == chosen
    assert _backends.choose("auto", NEEDS._replace(**needs), CPU, dtype, True) == "sdpa"


@pytest.mark.quick
def test_a_backend_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"attention must be one of .*'sdpa'.*, got 'eager'"):
        _backends.choose("eager", NEEDS, CPU, torch.float32, True)
    if _backends.importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(NotImplementedError, match="the package flash-attn is not installed"):
            _backends.choose("flash", NEEDS, CPU, torch.float32, True)
