import pytest
import torch

import prefcore
from prefcore import _native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="prefcore._C was built without CUDA"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GENERATOR = torch.Generator().manual_seed(0)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


INDICES = {  # number of rows, index
    "each kind of place": (9, int32([3, -1, 3, 8, 0, -1, 0, 0, 7, 3])),
    "65 places of one row": (3, int32([1] * 65)),
    "one": (1, int32([0])),
    "no place": (4, int32([])),
    "no row": (0, int32([-1, -1])),
    "neither": (0, int32([])),
    "backwards": (300, torch.arange(299, -1, -1, dtype=torch.int32)),
    "random": (500, torch.randint(-1, 500, (2000,), generator=GENERATOR, dtype=torch.int32)),
}
# One number; rows of 2, 4, 8 and 16 bytes' multiples; parts of a warp, a warp, several stretches; many blocks a row.
SHAPES = [(), (1,), (2,), (3,), (4,), (8,), (17,), (63,), (64,), (256,), (1000,), (1024,), (0,), (2, 3, 5), (70_001,)]


def random(*shape, dtype):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


def run(device, x, index, grad, **kwargs):
    """The result and the gradient, back on the CPU."""
    leaf = x.to(device).detach().requires_grad_()
    out = prefcore.gather_rows(leaf, index.to(device), **kwargs)
    (grad_x,) = torch.autograd.grad(out, leaf, grad.to(device))
    return out.detach().cpu(), grad_x.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INDICES)
def test_cuda_has_the_cpus_bits_forward_and_backward(name, dtype):
    rows, index = INDICES[name]
    for shape in SHAPES:
        if shape == (70_001,) and name == "random":
            continue  # the same paths in a second a dtype
        x, grad = random(rows, *shape, dtype=dtype), random(len(index), *shape, dtype=dtype)
        cuda = run("cuda", x, index, grad)
        assert all(map(torch.equal, cuda, run("cpu", x, index, grad))), shape
        assert all(map(torch.equal, cuda, run("cuda", x, index, grad))), shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_as_torch_rounds_them(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    other = every[torch.randperm(2**16, generator=GENERATOR)]
    _, (actual,) = run("cuda", torch.zeros(1, 2**16, dtype=dtype), int32([0, 0]), torch.stack([every, other]))
    expected = (every.float() + other.float()).to(dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~actual.isnan()], expected[~expected.isnan()])


def test_an_inverse_is_that_of_the_cpu():
    for rows, index in INDICES.values():
        expected = prefcore.invert_rows(index, rows)
        for ours, cpus in zip(prefcore.invert_rows(index.cuda(), rows), expected, strict=True):
            assert torch.equal(ours.cpu(), cpus)


def test_gradcheck():
    x = torch.randn(4, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    index = int32([2, -1, 2, 0, 2]).cuda()
    assert torch.autograd.gradcheck(lambda x: prefcore.gather_rows(x, index), (x,))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_apart_misaligned_or_repeated(dtype):
    rows, index = INDICES["each kind of place"]
    qkv = random(rows + 1, 3 * 24, dtype=dtype).cuda()
    views = {
        "columns": qkv[1:, 24:48],
        "misaligned by one": qkv[1:, 1:17],
        "misaligned by two": qkv[1:, 2:18],
        "misaligned by four": qkv[1:, 4:20],
        "every other row": random(2 * rows, 8, dtype=dtype).cuda()[::2],
        "columns as rows": random(8, rows, dtype=dtype).cuda().t(),
        "one row, repeated": random(1, 8, dtype=dtype).cuda().expand(rows, -1),
        "heads, transposed": random(rows, 4, 6, dtype=dtype).cuda().transpose(1, 2),
    }
    back = torch.arange(rows, dtype=torch.int32, device="cuda") % 4 - 1
    for name, x in views.items():
        plain = x.cpu().contiguous()
        assert torch.equal(prefcore.gather_rows(x, index.cuda()).cpu(), prefcore.gather_rows(plain, index)), name
        leaves = [torch.zeros(3, *x.shape[1:], dtype=dtype, device=d, requires_grad=True) for d in ("cuda", "cpu")]
        (ours,) = torch.autograd.grad(prefcore.gather_rows(leaves[0], back), leaves[0], x)
        (cpus,) = torch.autograd.grad(prefcore.gather_rows(leaves[1], back.cpu()), leaves[1], plain)
        assert torch.equal(ours.cpu(), cpus), name


def test_offsets_beyond_32_bits(room):
    rows, columns = 2**21 + 3, 1024  # 4 GiB, and as much for the gradient
    room(12)
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3
    x.requires_grad_()
    index = int32([rows - 1, 0, -1, rows - 1]).cuda()
    out = prefcore.gather_rows(x, index)
    assert out[:, 0].tolist() == [3, 0, 0, 3]
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert grad[-1].tolist() == [2] * columns
    assert int(torch.count_nonzero(grad)) == 2 * columns
    del out, grad

    # As many places, of few rows.
    few = torch.ones(2, columns, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    places = torch.zeros(rows, dtype=torch.int32, device="cuda")
    places[-1] = 1
    out = prefcore.gather_rows(few, places)
    assert bool((out[-1] == 1).all())
    (grad,) = torch.autograd.grad(out, few, x.detach())
    assert grad[1].tolist() == [3] * columns
    assert not grad[0].any()


def test_nothing_synchronises(no_waits):
    x = torch.randn(9, 64, device="cuda", requires_grad=True)
    index = INDICES["each kind of place"][1].cuda()
    with no_waits():
        prefcore.gather_rows(x, index).sum().backward()
        inverse = prefcore.invert_rows(index, 9)
        prefcore.gather_rows(x, index, inverse=inverse).sum().backward()


def test_launches_go_to_the_current_stream():
    x, index = torch.zeros(1 << 10, 1 << 10, device="cuda"), torch.arange(1 << 10, dtype=torch.int32, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.fill_(1)
        out = prefcore.gather_rows(x, index)
    side.synchronize()
    assert bool((out == 1).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_replays_with_other_inputs(dtype, capture):
    x = torch.randn(9, 64, device="cuda").to(dtype).requires_grad_()
    index = INDICES["each kind of place"][1].cuda()
    upstream = torch.randn(len(index), 64, device="cuda").to(dtype)

    def step():
        out = prefcore.gather_rows(x, index)
        return out.detach(), *torch.autograd.grad(out, x, upstream)

    replay, results = capture(step)
    for _ in range(2):
        with torch.no_grad():
            x.mul_(-2)
        index.copy_(index.roll(1))
        upstream.neg_()
        replay()
        assert all(map(torch.equal, results, step()))


def test_opcheck():
    rows, index = INDICES["each kind of place"]
    inverse = [t.cuda() for t in prefcore.invert_rows(index, rows)]
    x, grad = torch.randn(rows, 2, 3, device="cuda"), torch.randn(len(index), 2, 3, device="cuda")
    forward, backward = (getattr(torch.ops.prefcore, f"gather_rows_{d}_cuda").default for d in ("forward", "backward"))
    torch.library.opcheck(forward, (x, index.cuda(), None, None))
    torch.library.opcheck(forward, (x, index.cuda(), *inverse))
    torch.library.opcheck(backward, (grad, *inverse))


def test_compiles_and_agrees_with_eager():
    def function(x, index):
        return prefcore.gather_rows(2 * x, index).tanh()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for rows, index in (INDICES[name] for name in ("each kind of place", "random")):
        a = torch.randn(rows, 24, device="cuda", requires_grad=True)
        b = a.detach().clone().requires_grad_()
        eager, traced = function(a, index.cuda()), compiled(b, index.cuda())
        torch.testing.assert_close(traced, eager)
        eager.sum().backward()
        traced.sum().backward()
        torch.testing.assert_close(b.grad, a.grad)


def test_an_unchecked_index_out_of_range_gives_nan_and_its_gradient_goes_nowhere(monkeypatch):
    monkeypatch.delenv("PREFCORE_CHECK", raising=False)
    for dtype in DTYPES:
        x = torch.ones(4, 7, dtype=dtype, device="cuda", requires_grad=True)
        out = prefcore.gather_rows(x, int32([4, 0, -2, 2**31 - 1, -(2**31)]).cuda())
        assert out.isnan().all(dim=1).tolist() == [True, False, True, True, True]
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert grad[:, 0].tolist() == [1, 0, 0, 0]


def test_values_are_checked_on_request(monkeypatch):
    monkeypatch.setenv("PREFCORE_CHECK", "1")
    x, index = torch.zeros(4, 2, device="cuda"), int32([0, 3, 1]).cuda()
    with pytest.raises(ValueError, match=r"index must be in \[-1, 4\), got 4 at 1"):
        prefcore.gather_rows(x, index + (index == 3))
    with pytest.raises(ValueError, match="inverse must be invert_rows"):
        prefcore.gather_rows(x, index, inverse=prefcore.invert_rows(index.flip(0), 4))
    prefcore.gather_rows(x, index, inverse=prefcore.invert_rows(index, 4))


def test_devices_are_not_mixed():
    with pytest.raises(ValueError, match="index must be on x's device cuda:0, got cpu"):
        prefcore.gather_rows(torch.zeros(4, 2, device="cuda"), int32([0]))
    with pytest.raises(ValueError, match=r"impl='cpu' of gather_rows runs on \['cpu'\] tensors, got cuda"):
        prefcore.gather_rows(torch.zeros(4, 2, device="cuda"), int32([0]).cuda(), impl="cpu")


def test_a_tensor_on_another_device_than_the_current_one(other_device):
    x = torch.ones(4, 2, device=other_device, requires_grad=True)
    out = prefcore.gather_rows(x, int32([3, -1]).to(other_device))
    out.sum().backward()
    assert torch.cuda.current_device() == 0
    assert out[:, 0].tolist() == [1, 0]
