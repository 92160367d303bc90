"""What only a GPU can show of linear_loss: no waits, its memory, float16 products."""

import functools
import itertools

import pytest
import torch

import prefcore
from prefcore import _native, reference
from prefcore.losses import dpo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="prefcore._C was built without CUDA"),
]

PAIRS = 64
LENGTHS = [17 + 13 * i % 50 for i in range(2 * PAIRS)]
CU_SEQLENS = [0, *itertools.accumulate(LENGTHS)]
CU_GROUPS = list(range(0, 2 * PAIRS + 1, 2))
T, D, V = CU_SEQLENS[-1], 256, 8000
TILE = V * 2 * 1000  # bytes: about 850 of the T rows


def inputs(dtype, device="cuda"):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) / D**0.5).to(dtype)
    targets = torch.randint(V, (T,), generator=g)
    ref = torch.randn(2 * PAIRS, generator=g) - 300
    return [x.to(device) for x in (hidden, weight, targets, ref)]


def pairwise(ref, stats, tile):
    logps = prefcore.sequence_reduce(stats.logps, tile.cu_seqlens).view(-1, 2)
    there = ref[tile.sequences].to(logps.dtype).view(-1, 2)
    return dpo(logps[:, 0], logps[:, 1], there[:, 0], there[:, 1], beta=0.1)


TILINGS = pytest.mark.parametrize("budget", [None, TILE, 0], ids=["one tile", "tiles", "recomputed"])


def run(hidden, weight, targets, ref, factor=1.0, upstream=1.0, op=prefcore.linear_loss, offsets=CU_SEQLENS, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss_fn = functools.partial(pairwise, ref)
    out = op(hidden, weight, targets, offsets, lambda *a: loss_fn(*a) * factor, **{"cu_groups": CU_GROUPS, **options})
    (out.loss * upstream).backward()
    return out.loss.detach(), out.losses, hidden.grad, weight.grad


def oracle(hidden, weight, targets, ref, scale=1.0):
    tensors = [torch.tensor(x, dtype=torch.int32, device=hidden.device) for x in (CU_SEQLENS, CU_GROUPS)]
    double = hidden.double(), weight.double(), targets, ref
    return run(*double, 1.0, scale, reference.linear_loss, tensors[0], cu_groups=tensors[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@TILINGS
def test_values_and_gradients(dtype, budget):
    given = inputs(dtype)
    for actual, truth in zip(run(*given, memory_budget=budget), oracle(*given), strict=True):
        # A rounded logit of magnitude |z| < 8 moves a gradient by eps·|z|, the sum of a sequence's by less.
        error = (actual.double() - truth).norm() / truth.norm()
        assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("upstream", [65536.0, 1.0])
def test_float16_loses_nothing_to_small_gradients(upstream):
    """Their products with the hidden states are subnormal in float16, or zero, until the loss scale arrives."""
    given, small = inputs(torch.float16), 1e-5
    for budget in (None, TILE):
        buffer = torch.zeros(V, D, device="cuda")
        run(*given, small, upstream, memory_budget=budget, weight_grad_out=buffer)
        truth = oracle(*given, small * upstream)[3]
        assert (buffer.double() - truth).norm() / truth.norm() < 16 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("frozen", [False, True])
def test_no_host_synchronisation_with_offsets_of_the_host(frozen, no_waits):
    hidden, weight, targets, ref = inputs(torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)

    def step():
        prefcore.linear_loss(
            hidden, weight, targets, CU_SEQLENS, functools.partial(pairwise, ref), cu_groups=CU_GROUPS,
            memory_budget=TILE, outputs=("entropy",),
        ).loss.backward()  # fmt: skip

    step()
    with no_waits():
        step()


@TILINGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_runs_repeat_bitwise(dtype, budget):
    given = inputs(dtype)
    first = run(*given, memory_budget=budget)
    for _ in range(3):
        assert all(map(torch.equal, run(*given, memory_budget=budget), first))


@TILINGS
def test_lengths_do_not_recompile(budget, compiled):
    hidden, weight, targets, ref = inputs(torch.bfloat16)

    def step(pairs):
        tokens = CU_SEQLENS[2 * pairs]
        offsets, groups = CU_SEQLENS[: 2 * pairs + 1], CU_GROUPS[: pairs + 1]
        run(hidden[:tokens], weight, targets[:tokens], ref, offsets=offsets, cu_groups=groups, memory_budget=budget)

    for pairs in (1, PAIRS // 2, PAIRS):
        step(pairs)
    before = compiled()
    assert before > 0
    for pairs in range(2, PAIRS, 3):
        step(pairs)
    assert compiled() == before


@TILINGS
def test_a_graph_replays_with_other_inputs(budget, capture):
    given = inputs(torch.bfloat16)
    pinned = [torch.tensor(x, dtype=torch.int32).pin_memory() for x in (CU_SEQLENS, CU_GROUPS)]
    step = lambda: run(*given, memory_budget=budget, offsets=pinned[0], cu_groups=pinned[1])
    replay, results = capture(step)
    for _ in range(2):
        hidden, weight, targets, ref = given
        hidden.copy_(hidden.roll(1, 0))
        weight.mul_(-0.5)
        targets.copy_(targets.roll(1, 0))
        ref.neg_()
        replay()
        assert all(map(torch.equal, results, step()))


def test_a_tensor_on_a_device_that_is_not_current(other_device):
    expected = run(*inputs(torch.bfloat16), memory_budget=TILE)
    elsewhere = run(*inputs(torch.bfloat16, other_device), memory_budget=TILE)
    assert torch.cuda.current_device() == 0
    for a, b in zip(expected, elsewhere, strict=True):
        assert b.device == torch.device(other_device)
        torch.testing.assert_close(a, b.to(a.device))


def test_more_than_two_to_the_31st_logits_in_a_tile(room):
    tokens, vocab, width = 17_000, 130_000, 16
    room(4 * tokens * vocab * 2 / 2**30)
    g = torch.Generator("cuda").manual_seed(0)
    # Multiples of 1/8 up to 2: bfloat16 holds the logits exactly, whatever order a product is summed in.
    draw = lambda n: torch.randint(-1, 2, (n, width), generator=g, device="cuda").bfloat16()
    given = draw(tokens), draw(vocab) / 8, torch.randint(vocab, (tokens,), generator=g, device="cuda")
    ref = torch.full((tokens // 100,), -1100.0, device="cuda")
    layout = {"offsets": list(range(0, tokens + 1, 100)), "cu_groups": list(range(0, tokens // 100 + 1, 2))}
    whole = run(*given, ref, memory_budget=3 * tokens * vocab, **layout)
    tiles = run(*given, ref, memory_budget=tokens * vocab // 2, **layout)
    assert torch.equal(whole[1], tiles[1])
    for a, b in zip(whole[2:], tiles[2:], strict=True):
        assert (a.float() - b.float()).norm() <= 4 * torch.finfo(torch.bfloat16).eps * b.float().norm()


def test_offsets_on_the_gpu_give_the_same_bits():
    given = inputs(torch.bfloat16)
    there = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in (CU_SEQLENS, CU_GROUPS)]
    first = run(*given, memory_budget=TILE)
    second = run(*given, memory_budget=TILE, offsets=there[0], cu_groups=there[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_gradient_than_the_known_one_gives_nan_without_a_wait(monkeypatch):
    monkeypatch.delenv("PREFCORE_CHECK", raising=False)
    given = inputs(torch.bfloat16)
    *_, d_hidden, d_weight = run(*given, 1.0, 2.0, grad_scale=1.0, normalizer=PAIRS)
    assert d_hidden.isnan().all()
    assert d_weight.isnan().all()


def test_memory_is_what_the_plan_says():
    hidden, weight, targets, ref = inputs(torch.bfloat16)
    rows = [CU_SEQLENS[i + 2] - CU_SEQLENS[i] for i in range(0, 2 * PAIRS, 2)]
    made = prefcore.plan(T, D, V, schedule="loop", memory_budget=TILE, groups=rows)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step():
        hidden.grad = weight.grad = None
        prefcore.linear_loss(
            hidden, weight, targets, CU_SEQLENS, functools.partial(pairwise, ref), cu_groups=CU_GROUPS,
            memory_budget=TILE,
        ).loss.backward()  # fmt: skip

    step()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    returned = 2 * (T * D + V * D)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown <= made.peak_bytes + returned + 2**20  # and vectors of the number of rows
