"""What only a GPU shows of the row kernels. Their values there: tests/ops/test_rows.py, which runs on CUDA too."""

from __future__ import annotations

import pytest
import torch

from prefcore.kernels import logprobs
from prefcore.ops._spec import LogitSpec, Row

pytestmark = pytest.mark.gpu


def fresh_state(rows: int, device: str = "cuda") -> torch.Tensor:
    state = torch.zeros(len(Row), rows, device=device)
    state[[Row.PEAK, Row.BEFORE]] = -torch.inf
    return state


def run_all(tile: torch.Tensor, targets: torch.Tensor, spec: LogitSpec) -> list[torch.Tensor]:
    state, weighed, out = fresh_state(len(tile), tile.device), torch.empty_like(tile), torch.empty_like(tile)
    logprobs.weigh(tile, weighed, 0, targets, None, None, spec, state, None)
    logprobs.grad(tile, out, 0, targets, None, None, spec, state, None, None)
    both_state, both = fresh_state(len(tile), tile.device), torch.empty_like(tile)
    logprobs.stats_grad(tile, both, targets, None, None, spec, both_state)
    return [state, weighed, out, both_state, both]


def make(rows: int, vocab: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows + vocab)
    tile = torch.randn(rows, vocab, device="cuda", dtype=torch.float32, generator=generator).mul(3).to(dtype)
    return tile, torch.randint(vocab, (rows,), device="cuda", generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [50257, 128256, 151936])
def test_wide_rows_agree_with_float64(dtype: torch.dtype, vocab: int) -> None:
    tile, targets = make(300, vocab, dtype)
    state, _, out, _, both = run_all(tile, targets, LogitSpec(vocab))
    logp = tile.double().log_softmax(-1)
    truth = torch.nn.functional.one_hot(targets, vocab) - logp.exp()
    ours = (state[Row.TARGET] - state[Row.PEAK]) - state[Row.TOTAL].log()
    eager = tile.float().log_softmax(-1)
    at_target = logp.gather(1, targets[:, None])[:, 0]
    band = torch.finfo(torch.float32).eps * at_target.abs().max()
    assert (ours - at_target).abs().max() <= 2 * (eager - logp).abs().max() + band
    eager_truth = torch.nn.functional.one_hot(targets, vocab) - eager.exp()
    allowed = 2 * (eager_truth.to(dtype).double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs()
    for gradient in (out, both):
        assert ((gradient.double() - truth).abs() <= allowed).all()


def test_offsets_pass_two_to_the_31st() -> None:
    vocab = 131072
    rows = 2**31 // vocab + 3
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab:
        pytest.skip("needs 6.5 GB of free device memory")
    tile = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    last, targets = make(3, vocab)
    tile[-3:] = last
    targets = torch.cat([targets.new_zeros(rows - 3), targets])
    spec = LogitSpec(vocab)
    expected = run_all(last.clone(), targets[-3:], spec)[4]
    logprobs.stats_grad(tile, tile, targets, None, None, spec, fresh_state(rows))
    assert torch.equal(tile[-3:], expected)


def test_runs_repeat_bitwise() -> None:
    tile, targets = make(64, 128256)
    spec = LogitSpec(128256, softcap=30.0, entropy=True, mean=True, squares=True, top1=True)
    first, second = (run_all(tile, targets, spec) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_waits_for_the_device() -> None:
    tile, targets = make(64, 32000)
    run_all(tile, targets, LogitSpec(32000))
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(tile, targets, LogitSpec(32000))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_lengths_do_not_recompile() -> None:
    kernels = (logprobs._weigh_kernel, logprobs._grad_kernel, logprobs._stats_grad_kernel)

    def variants() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    tile, targets = make(64, 32000)
    run_all(tile, targets, LogitSpec(32000))
    before = variants()
    for rows in range(1, 21):
        run_all(tile[:rows], targets[:rows], LogitSpec(32000))
    assert variants() == before


def test_launches_can_be_captured_in_a_graph() -> None:
    tile, targets = make(64, 32000)
    spec = LogitSpec(32000)
    expected = run_all(tile, targets, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run_all(tile, targets, spec)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, replayed, strict=True))


def test_the_tensors_device_is_launched_on() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    tile, targets = make(8, 1000)
    expected = run_all(tile, targets, LogitSpec(1000))
    with torch.cuda.device(0):
        elsewhere = run_all(tile.to("cuda:1"), targets.to("cuda:1"), LogitSpec(1000))
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(expected, elsewhere, strict=True))
