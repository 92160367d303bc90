import itertools

import pytest
import torch

import prefcore
from prefcore import _native, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="prefcore._C was built without CUDA"),
]

MODES = ("sum", "mean", "discounted", "weighted")
HOWS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "token_sum")
GENERATOR = torch.Generator().manual_seed(0)
BATCHES = {
    "each kind of length": (0, 1, 31, 0, 32, 33, 255, 256, 257, 1000, 65537, 0),  # a block per sequence
    "one": (1,),
    "one long": (1_000_003,),
    "thousands": tuple(torch.randint(0, 60, (3000,), generator=GENERATOR).tolist()),  # a warp per sequence
    "more than a grid's y could hold": (1,) * 70_000,
    "all empty": (0, 0, 0, 0, 0),
    "no sequences": (),
}


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """torch.empty returns NaN, so an output that is left unwritten fails."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def options(mode, total, dtype):
    if mode == "discounted":
        return {"gamma": 0.97}
    if mode == "weighted":
        return {"weights": torch.randn(total, dtype=dtype, generator=GENERATOR)}
    return {}


def run(device, x, lengths, mode, grad, weights=None, **kwargs):
    """The result and all gradients, back on the CPU."""
    leaves = [x.to(device, copy=True).requires_grad_()]
    if weights is not None:
        leaves.append(weights.to(device, copy=True).requires_grad_())
    out = prefcore.sequence_reduce(leaves[0], offsets(lengths).to(device), mode, *leaves[1:], **kwargs)
    out.backward(grad.to(device))
    return [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_cuda_has_the_cpus_bits_forward_and_backward(lengths, mode, dtype):
    x = torch.randn(sum(lengths), dtype=dtype, generator=GENERATOR)
    grad = torch.randn(len(lengths), dtype=dtype, generator=GENERATOR)
    kwargs = options(mode, len(x), dtype)
    cuda = run("cuda", x, lengths, mode, grad, **kwargs)
    for ours, cpus in zip(cuda, run("cpu", x, lengths, mode, grad, **kwargs), strict=True):
        assert torch.equal(ours, cpus)
    for ours, again in zip(cuda, run("cuda", x, lengths, mode, grad, **kwargs), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", MODES)
def test_cuda_agrees_with_the_float64_reference(mode):
    lengths = BATCHES["each kind of length"]
    x = torch.randn(sum(lengths), generator=GENERATOR)
    kwargs = options(mode, len(x), x.dtype)
    on_cuda = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    in_double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    out = prefcore.sequence_reduce(x.cuda(), offsets(lengths).cuda(), mode, **on_cuda).cpu()
    expected = reference.sequence_reduce(x.double(), offsets(lengths), mode, **in_double)
    torch.testing.assert_close(out.double(), expected, rtol=2.0**-23, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    x = torch.randn(9, dtype=torch.float64, device="cuda", requires_grad=True)
    kwargs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options(mode, 9, x.dtype).items()}
    cu_seqlens = offsets((3, 0, 5, 1)).cuda()
    assert torch.autograd.gradcheck(lambda x: prefcore.sequence_reduce(x, cu_seqlens, mode, **kwargs), (x,))


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", MODES)
def test_strided_and_sliced_inputs(mode):
    base = torch.randn(2 * 311 + 5, generator=GENERATOR).cuda()
    x, cu_seqlens = base[5:][::2], offsets((4, 0, 300, 7)).cuda()
    weights = torch.randn(2 * 311, device="cuda")[::2] if mode == "weighted" else None
    gamma = 0.9 if mode == "discounted" else None
    packed = None if weights is None else weights.contiguous()
    torch.testing.assert_close(
        prefcore.sequence_reduce(x, cu_seqlens, mode, weights, gamma=gamma),
        prefcore.sequence_reduce(x.contiguous(), cu_seqlens, mode, packed, gamma=gamma),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("how", HOWS)
def test_nothing_synchronises(how, no_waits):
    values = torch.randn(333, device="cuda", requires_grad=True)
    cu_seqlens = offsets((30, 0, 303)).cuda()
    num_items = None if how == "token_sum" else torch.tensor(17, device="cuda")
    horizon = 512 if how == "seq_mean_token_sum_norm" else None
    with no_waits():
        prefcore.aggregate(values, cu_seqlens, how, num_items, horizon=horizon).backward()
        prefcore.aggregate(values, cu_seqlens, how, horizon=horizon).backward()
        for mode in MODES:
            weights = values if mode == "weighted" else None
            gamma = 0.9 if mode == "discounted" else None
            prefcore.sequence_reduce(values, cu_seqlens, mode, weights, gamma=gamma).sum().backward()


@pytest.mark.parametrize("how", HOWS)
def test_aggregate_agrees_with_the_cpu(how):
    lengths = (3, 0, 1, 700, 0, 33, 256, 2)
    values = torch.randn(sum(lengths), generator=GENERATOR)
    horizon = 512 if how == "seq_mean_token_sum_norm" else None
    results = []
    for device in ("cpu", "cuda"):
        leaf = values.to(device, copy=True).requires_grad_()
        out = prefcore.aggregate(leaf, offsets(lengths).to(device), how, horizon=horizon)
        out.backward()
        results.append((out.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def test_offsets_up_to_the_last_of_32_bits(room):
    total = 2**31 - 1
    room(4 * total * 4 / 2**30)
    x = torch.zeros(total, device="cuda")
    x[-1000:] = 1
    x.requires_grad_()
    out = prefcore.sequence_reduce(x, offsets((total - 999, 999)).cuda())
    assert out.tolist() == [1, 999]
    (grad,) = torch.autograd.grad(out, x, torch.tensor([2.0, 3.0], device="cuda"))
    assert grad[-1000:].tolist() == [2] + [3] * 999
    assert bool((grad[: total - 999] == 2).all())


def test_launches_go_to_the_current_stream():
    x = torch.zeros(1 << 20, device="cuda")
    cu_seqlens = offsets((1 << 20,)).cuda()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.fill_(1)
        out = prefcore.sequence_reduce(x, cu_seqlens)
    side.synchronize()
    assert out.item() == 1 << 20


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_replays_with_other_inputs(mode, capture):
    x = torch.randn(500, device="cuda", requires_grad=True)
    cu_seqlens = offsets((200, 300)).cuda()
    kwargs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options(mode, 500, x.dtype).items()}

    def step():
        out = prefcore.sequence_reduce(x, cu_seqlens, mode, **kwargs)
        return out.detach(), *torch.autograd.grad(out.square().sum(), x)

    replay, results = capture(step)
    for lengths in ((200, 300), (499, 1)):
        with torch.no_grad():
            x.mul_(-2)
        cu_seqlens.copy_(offsets(lengths))
        replay()
        assert all(map(torch.equal, results, step()))


@pytest.mark.parametrize("how", HOWS)
def test_a_graph_replays_aggregate_with_other_inputs(how, capture):
    values = torch.randn(500, device="cuda", requires_grad=True)
    cu_seqlens = offsets((200, 300, 0)).cuda()
    horizon = 512 if how == "seq_mean_token_sum_norm" else None

    def step():
        out = prefcore.aggregate(values, cu_seqlens, how, horizon=horizon)
        return out.detach(), *torch.autograd.grad(out, values)

    replay, results = capture(step)
    for lengths in ((200, 300, 0), (450, 25, 25)):
        with torch.no_grad():
            values.mul_(-2)
        cu_seqlens.copy_(offsets(lengths))
        replay()
        assert all(map(torch.equal, results, step()))


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    lengths, total = (3, 0, 5), 8
    weights = torch.randn(total, device="cuda") if mode == "weighted" else None
    cu_seqlens = offsets(lengths).cuda()
    torch.library.opcheck(
        torch.ops.prefcore.sequence_reduce_forward_cuda.default,
        (torch.randn(total, device="cuda"), cu_seqlens, weights, mode, 0.9),
    )
    torch.library.opcheck(
        torch.ops.prefcore.sequence_reduce_backward_cuda.default,
        (torch.randn(len(lengths), device="cuda"), cu_seqlens, weights, total, mode, 0.9),
    )


def test_offset_values_are_checked_on_request(monkeypatch):
    monkeypatch.setenv("PREFCORE_CHECK", "1")
    x = torch.zeros(4, device="cuda")
    with pytest.raises(ValueError, match="cu_seqlens must end at the number of rows, 4, got 3"):
        prefcore.sequence_reduce(x, offsets((1, 2)).cuda())


def test_devices_are_not_mixed():
    with pytest.raises(ValueError, match="cu_seqlens must be on x's device cuda:0, got cpu"):
        prefcore.sequence_reduce(torch.zeros(4, device="cuda"), offsets((4,)))
    with pytest.raises(ValueError, match=r"impl='cpu' of sequence_reduce runs on \['cpu'\] tensors, got cuda"):
        prefcore.sequence_reduce(torch.zeros(4, device="cuda"), offsets((4,)).cuda(), impl="cpu")


def test_a_tensor_on_another_device_than_the_current_one(other_device):
    x = torch.ones(4, device=other_device)
    out = prefcore.sequence_reduce(x, offsets((1, 3)).to(other_device))
    assert torch.cuda.current_device() == 0
    assert out.tolist() == [1.0, 3.0]
