import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import prefcore
from prefcore import RowInverse, _native, reference
from prefcore.testing import assert_no_worse_than

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """torch.empty returns NaN, so an output that is left unwritten fails."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def shared_prompt(prompt, responses, length):
    """The index of keys packed as prompt, then responses, for attention that wants them one sequence after another."""
    own = torch.arange(responses * length).view(responses, length) + prompt
    return torch.cat([torch.arange(prompt).expand(responses, -1), own], dim=1).flatten().to(torch.int32)


INDICES = {  # number of rows, index
    "each kind of place": (9, int32([3, -1, 3, 8, 0, -1, 0, 0, 7, 3])),
    "65 places of one row": (3, int32([1] * 65)),
    "a prompt of 65 responses": (7 + 65 * 2, shared_prompt(7, 65, 2)),
    "one": (1, int32([0])),
    "no place": (4, int32([])),
    "no row": (0, int32([-1, -1])),
    "neither": (0, int32([])),
    "no gathered row": (4, int32([-1, -1, -1])),
    "backwards": (300, torch.arange(299, -1, -1, dtype=torch.int32)),
    "random": (500, torch.randint(-1, 500, (2000,), generator=GENERATOR, dtype=torch.int32)),
}
# One number, sizes around the blocks of the CPU and the 16 bytes of the GPU, and several dimensions.
SHAPES = [(), (1,), (3,), (16,), (17,), (255,), (256,), (273,), (0,), (2, 3, 5), (4, 64)]


def random(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR).to(dtype)


def gather_on(device, x, index, inverse=None):
    """``gather_rows`` on a device, from the CPU and back."""
    inverse = None if inverse is None else RowInverse(*(part.to(device) for part in inverse))
    return prefcore.gather_rows(x.to(device), index.to(device), inverse=inverse).cpu()


def gathered(x, index):
    """By plain Python, in x's dtype."""
    rows = [x[n] if n >= 0 else torch.zeros_like(x[0]) if len(x) else x.new_zeros(x.shape[1:]) for n in index.tolist()]
    return torch.stack(rows) if rows else x.new_zeros(0, *x.shape[1:])


def summed(grad, index, rows, dtype):
    """By plain Python, one addition after another in ``dtype``."""
    out = torch.zeros(rows, *grad.shape[1:], dtype=dtype)
    for m, n in enumerate(index.tolist()):
        if n >= 0:
            out[n] += grad[m].to(dtype)
    return out


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INDICES)
def test_rows_and_sums_are_those_of_plain_loops_bit_for_bit(name, dtype, device):
    rows, index = INDICES[name]
    for shape in SHAPES:
        x = random(rows, *shape, dtype=dtype).requires_grad_()
        grad = random(len(index), *shape, dtype=dtype)
        out = gather_on(device, x, index)
        assert out.is_contiguous()
        assert out.dtype == dtype
        assert torch.equal(out, gathered(x.detach(), index))
        (grad_x,) = torch.autograd.grad(out, x, grad)
        assert grad_x.dtype == dtype
        assert torch.equal(grad_x, summed(grad, index, rows, accumulator(dtype)).to(dtype))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INDICES)
def test_implementations_agree_with_float64(name, dtype, impl):
    rows, index = INDICES[name]
    x = random(rows, 33, dtype=dtype)
    grad = random(len(index), 33, dtype=dtype)

    def run(x, impl):
        leaf = x.clone().requires_grad_()
        out = prefcore.gather_rows(leaf, index, impl=impl)
        return out.detach(), *torch.autograd.grad(out, leaf, grad.to(x.dtype))

    out, grad_x = run(x, impl)
    assert torch.equal(out.double(), gathered(x.double(), index))
    eager = run(x, "reference")[1]
    assert_no_worse_than(grad_x, eager, summed(grad, index, rows, torch.float64), "gradient")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl):
    x = torch.randn(4, 3, dtype=torch.float64, generator=GENERATOR, requires_grad=True)
    index = int32([2, -1, 2, 0, 2])
    assert torch.autograd.gradcheck(lambda x: prefcore.gather_rows(x, index, impl=impl), (x,))


@pytest.mark.quick
@pytest.mark.parametrize("name", INDICES)
def test_an_inverse_names_each_place_once_in_rising_order(name):
    rows, index = INDICES[name]
    offsets, places = prefcore.invert_rows(index, rows)
    assert offsets.dtype == places.dtype == torch.int32
    assert offsets.shape == (rows + 1,)
    listed = index.tolist()
    assert offsets[0] == listed.count(-1)
    parts = [places[: offsets[0]], *(places[offsets[n] : offsets[n + 1]] for n in range(rows))]
    for n, part in enumerate(parts, start=-1):
        assert part.tolist() == [m for m, value in enumerate(listed) if value == n]


@pytest.mark.parametrize("name", INDICES)
def test_a_given_inverse_changes_nothing(name, device):
    rows, index = INDICES[name]
    x = random(rows, 5, dtype=torch.float32).requires_grad_()
    grad = random(len(index), 5, dtype=torch.float32)
    inverse = prefcore.invert_rows(index, rows)
    outs = [gather_on(device, x, index), gather_on(device, x, index, inverse=inverse)]
    grads = [torch.autograd.grad(out, x, grad)[0] for out in outs]
    assert torch.equal(*outs)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    rows, index = 600, torch.randint(-1, 600, (2000,), generator=GENERATOR, dtype=torch.int32)
    before = torch.get_num_threads()
    for columns in (1000, 40_001):  # enough work for two threads; rows of one piece and of several
        x, grad = random(rows, columns, dtype=dtype), random(1, columns, dtype=dtype).expand(len(index), -1)
        grad = grad * random(len(index), 1, dtype=dtype)
        results = []
        try:
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                leaf = x.clone().requires_grad_()
                out = prefcore.gather_rows(leaf, index)
                results.append((out.detach(), *torch.autograd.grad(out, leaf, grad)))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_as_torch_rounds_them(dtype, device):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    other = every[torch.randperm(2**16, generator=GENERATOR)]
    for addend in (torch.zeros_like(every), other):
        x = torch.zeros(1, 2**16, dtype=dtype, requires_grad=True)
        out = gather_on(device, x, int32([0, 0]))
        actual = torch.autograd.grad(out, x, torch.stack([every, addend]))[0][0]
        expected = (every.float() + addend.float()).to(dtype)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual[~actual.isnan()], expected[~expected.isnan()])


def test_a_row_of_one_place_has_its_gradient_to_the_bit(device):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = torch.zeros(1, 2**16, dtype=torch.float16, requires_grad=True)
    (actual,) = torch.autograd.grad(gather_on(device, x, int32([0])), x, every.view(torch.float16)[None])
    assert torch.equal(actual.view(torch.int16)[0], every)  # NaN and the sign of zero included


def test_sums_of_half_types_are_rounded_once(device):
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    out = gather_on(device, x, torch.zeros(65, dtype=torch.int32))
    (grad,) = torch.autograd.grad(out, x, torch.tensor([[256.0]] + [[1.0]] * 64, dtype=torch.bfloat16))
    assert grad.item() == 320  # 256 + 1 is 256 in bfloat16


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_apart_misaligned_or_repeated(dtype):
    rows, index = INDICES["each kind of place"]
    qkv = random(rows + 1, 3 * 24, dtype=dtype)
    views = {
        "columns": qkv[1:, 24:48],
        "misaligned columns": qkv[1:, 1:18],
        "heads": qkv[1:, 24:48].unflatten(1, (4, 6)),
        "every other row": random(2 * rows, 8, dtype=dtype)[::2],
        "columns as rows": random(8, rows, dtype=dtype).t(),
        "one row, repeated": random(1, 8, dtype=dtype).expand(rows, -1),
        "one number, repeated": random(1, 1, dtype=dtype).expand(rows, 8),
        "heads, transposed": random(rows, 4, 6, dtype=dtype).transpose(1, 2),
        "a dimension of one": qkv[1:, 24:48].unflatten(1, (1, 24)).transpose(1, 2),
    }
    for name, x in views.items():
        expected = gathered(x.contiguous(), index)
        assert torch.equal(prefcore.gather_rows(x, index), expected), name
        # The same views as gradients.
        leaf = torch.zeros(3, *x.shape[1:], dtype=dtype, requires_grad=True)
        back = torch.arange(rows, dtype=torch.int32) % 4 - 1
        (grad,) = torch.autograd.grad(prefcore.gather_rows(leaf, back), leaf, x)
        assert torch.equal(grad, summed(x, back, 3, accumulator(dtype)).to(dtype)), name


def test_a_strided_index_and_inverse():
    rows, index = INDICES["each kind of place"]
    inverse = prefcore.invert_rows(index, rows)
    apart = [torch.stack([t, t + 7], dim=1)[:, 0] for t in (index, *inverse)]
    assert not any(t.is_contiguous() for t in apart)
    x = random(rows, 5, dtype=torch.float32).requires_grad_()
    out = prefcore.gather_rows(x, apart[0], inverse=RowInverse(*apart[1:]))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, gathered(x.detach(), index))
    assert grad[:, 0].tolist() == [index.tolist().count(n) for n in range(rows)]


def test_columns_of_a_wider_matrix_are_not_copied(monkeypatch):
    copied = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: copied.append(t.shape) or contiguous(t))
    qkv = torch.randn(9, 72)
    prefcore.gather_rows(qkv[:, 24:48].unflatten(1, (4, 6)), INDICES["each kind of place"][1])
    assert [shape for shape in copied if len(shape) > 1] == []


def test_offsets_beyond_32_bits():
    np = pytest.importorskip("numpy")
    # Memory that is zero and never touched takes no room: 8 GiB of addresses, of which some pages are read.
    apart = 2**20
    big = torch.from_numpy(np.zeros((2**12 + 3, apart), dtype=np.float16))
    far = big[:, :100]
    far[-1] = torch.arange(100)
    index = int32([2**12 + 2, 0, -1, 2**12 + 2])
    out = prefcore.gather_rows(far, index)
    assert torch.equal(out, gathered(far, index))
    x = torch.zeros(3, 100, dtype=torch.float16, requires_grad=True)
    places = torch.full((2**12 + 3,), -1, dtype=torch.int32)
    places[-1], places[5] = 1, 1
    (grad,) = torch.autograd.grad(prefcore.gather_rows(x, places), x, far)
    assert grad[1].tolist() == list(range(100))
    assert not grad[::2].any()


def test_an_index_needs_no_inverse_where_nothing_needs_a_gradient(monkeypatch):
    monkeypatch.setattr("prefcore.ops.gather_rows._invert", lambda *_: pytest.fail("inverted"))
    with torch.no_grad():
        prefcore.gather_rows(torch.randn(3, 2, requires_grad=True), int32([0, 2]))
    prefcore.gather_rows(torch.randn(3, 2), int32([0, 2]))


def test_a_bad_value_stays_in_its_row(device):
    x = torch.ones(3, 4)
    x[1] = float("nan")
    x.requires_grad_()
    index = int32([0, 1, -1, 2])
    out = gather_on(device, x, index)
    assert bool(out[[0, 2, 3]].isfinite().all())
    grad = torch.ones(4, 4)
    grad[1:3] = float("inf")  # that of -1 goes nowhere
    (grad_x,) = torch.autograd.grad(out, x, grad)
    assert grad_x[:, 0].tolist() == [1, float("inf"), 1]


def test_an_index_changed_after_the_call_is_noticed():
    x, index = torch.randn(3, 2, requires_grad=True), int32([0, 2])
    out = prefcore.gather_rows(x, index)
    index.add_(-1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 2, requires_grad=True)
    out = prefcore.gather_rows(x, int32([0, 2]))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 12),
    data=st.data(),
    columns=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_random_indices(rows, data, columns, dtype, seed):
    index = int32(data.draw(st.lists(st.integers(-1, rows - 1), max_size=70)))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(len(index), columns, generator=generator).to(dtype)
    out = prefcore.gather_rows(x, index)
    assert torch.equal(out, gathered(x.detach(), index))
    (grad_x,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(grad_x, summed(grad, index, rows, accumulator(dtype)).to(dtype))

    # Rows in another order, and the index with them, give the same copies and the gradient in that order.
    order = torch.randperm(rows, generator=generator)
    moved = torch.cat([order.argsort(), torch.tensor([-1])])[index.long()].to(torch.int32)
    leaf = x.detach()[order].requires_grad_()
    again = prefcore.gather_rows(leaf, moved)
    assert torch.equal(again, out)
    assert torch.equal(torch.autograd.grad(again, leaf, grad)[0], grad_x[order])


@pytest.mark.parametrize("with_inverse", [False, True])
def test_opcheck(with_inverse):
    rows, index = INDICES["each kind of place"]
    inverse = prefcore.invert_rows(index, rows)
    torch.library.opcheck(
        torch.ops.prefcore.gather_rows_forward_cpu.default,
        (torch.randn(rows, 2, 3), index, *(inverse if with_inverse else (None, None))),
    )
    torch.library.opcheck(
        torch.ops.prefcore.gather_rows_backward_cpu.default, (torch.randn(len(index), 2, 3), *inverse)
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("inverse", ["in the op", "given", "traced"])
def test_compiles_once_for_all_sizes(inverse, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def function(x, index, given):
        if inverse == "traced":
            given = prefcore.invert_rows(index, x.shape[0])
        return prefcore.gather_rows(2 * x, index, inverse=given).tanh()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows, places in ((5, 9), (50, 7), (33, 400), (12, 12)):
        index = torch.randint(-1, rows, (places,), generator=GENERATOR, dtype=torch.int32)
        given = prefcore.invert_rows(index, rows) if inverse == "given" else None
        a = torch.randn(rows, 12, generator=GENERATOR, requires_grad=True)
        b = a.detach().clone().requires_grad_()
        eager, traced = function(a, index, given), compiled(b, index, given)
        torch.testing.assert_close(traced, eager)
        eager.sum().backward()
        traced.sum().backward()
        torch.testing.assert_close(b.grad, a.grad)
    assert counter.frame_count == 1


X = torch.zeros(4, 2)
INDEX = int32([0, 3, -1])
INVERSE = prefcore.invert_rows(INDEX, 4)
REFUSALS = [
    (TypeError, "x must be a Tensor, got list", {"x": [1.0]}),
    (TypeError, "index must be a Tensor, got list", {"index": [0]}),
    (ValueError, r"x must have shape \[N, \.\.\.\], got \[\]", {"x": torch.tensor(1.0)}),
    (ValueError, "x must be float32, float64, bfloat16 or float16, got torch.int64", {"x": X.long()}),
    (ValueError, r"index must have shape \[M\], got \[1, 3\]", {"index": INDEX[None]}),
    (ValueError, "index must be int32, got torch.int64", {"index": INDEX.long()}),
    (ValueError, "index must be on x's device cpu, got meta", {"index": INDEX.to("meta")}),
    (ValueError, r"index must be in \[-1, 4\), got 4 at 2", {"index": int32([0, -1, 4])}),
    (ValueError, r"index must be in \[-1, 4\), got -2 at 0", {"index": int32([-2, 9])}),
    (ValueError, r"index must be in \[-1, 0\), got 0 at 0", {"x": X[:0]}),
    (TypeError, "inverse must be a RowInverse or None, got tuple", {"inverse": tuple(INVERSE)}),
    (TypeError, r"inverse\.offsets must be a Tensor, got list", {"inverse": INVERSE._replace(offsets=[0])}),
    (
        ValueError,
        r"inverse\.offsets must be int32 of shape \[5\], got torch.int64 of \[5\]",
        {"inverse": INVERSE._replace(offsets=INVERSE.offsets.long())},
    ),
    (
        ValueError,
        r"inverse\.offsets must be int32 of shape \[5\], got torch.int32 of \[3\]",
        {"inverse": prefcore.invert_rows(INDEX, 2)},
    ),
    (
        ValueError,
        r"inverse\.places must be int32 of shape \[3\], got torch.int32 of \[2\]",
        {"inverse": INVERSE._replace(places=INVERSE.places[:2])},
    ),
    (
        ValueError,
        r"inverse\.places must be on x's device cpu, got meta",
        {"inverse": INVERSE._replace(places=INVERSE.places.to("meta"))},
    ),
    (
        ValueError,
        r"inverse\.places must be in \[0, 3\), got 3 at 0",
        {"inverse": INVERSE._replace(places=INVERSE.places + 1)},
    ),
    (ValueError, "inverse must be invert_rows", {"inverse": prefcore.invert_rows(int32([1, 3, -1]), 4)}),
    (ValueError, "inverse must be invert_rows", {"inverse": INVERSE._replace(places=INVERSE.places.flip(0))}),
    (ValueError, "inverse must be invert_rows", {"inverse": INVERSE._replace(places=int32([2, 2, 1]))}),
    (ValueError, "impl of gather_rows must be one of", {"impl": "triton"}),
    (ValueError, r"impl='cuda' of gather_rows runs on \['cuda'\] tensors, got cpu", {"impl": "cuda"}),
]


@pytest.mark.parametrize(("error", "text", "change"), REFUSALS)
def test_refusals(error, text, change):
    arguments = {"x": X, "index": INDEX, **change}
    with pytest.raises(error, match=text):
        prefcore.gather_rows(**arguments)
    if "impl" not in change:
        with pytest.raises(error, match=text):
            prefcore.gather_rows(**arguments, impl="reference")


@pytest.mark.parametrize(
    ("error", "text", "index", "rows"),
    [
        (TypeError, "index must be a Tensor, got list", [0], 4),
        (ValueError, "index must be int32, got torch.float32", torch.zeros(3), 4),
        (TypeError, "rows must be an int, got a bool", INDEX, True),
        (TypeError, "rows must be a int, got float", INDEX, 4.0),
        (ValueError, "rows must not be negative, got -1", INDEX, -1),
    ],
)
def test_refusals_of_invert_rows(error, text, index, rows):
    with pytest.raises(error, match=text):
        prefcore.invert_rows(index, rows)


def test_an_unchecked_index_out_of_range_gives_nan_and_its_gradient_goes_nowhere():
    """What a GPU does unless PREFCORE_CHECK=1, by the CPU's copy of the same arithmetic."""
    x, index = torch.ones(4, 2), int32([4, 0, -2, 2**31 - 1, -(2**31)])
    for dtype in DTYPES:
        x, out = torch.ones(4, 2, dtype=dtype), torch.zeros(5, 2, dtype=dtype)
        size = 2 * x.element_size()
        extension = _native.require()
        gather = extension.Gather(x.data_ptr(), size, 4, index.data_ptr(), 5, size, out.data_ptr())
        extension.gather_rows_forward_cpu(gather, 1)
        assert out.isnan().all(dim=1).tolist() == [True, False, True, True, True]
    inverse = prefcore.invert_rows(index, 4)
    grad = torch.ops.prefcore.gather_rows_backward_cpu(torch.ones(5, 2), *inverse)
    assert grad.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]


def test_the_reference_alone_is_the_specification():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert reference.gather_rows(x, int32([1, -1, 0])).tolist() == [[3, 4], [0, 0], [1, 2]]
