"""What only a GPU shows of the row kernels. Their values there: tests/ops/test_rows.py, which runs on CUDA too."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prefcore.kernels import logprobs
from prefcore.ops._spec import LogitSpec, Row

pytestmark = pytest.mark.gpu


def fresh_state(tile: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if tile.dtype == torch.float64 else torch.float32
    state = torch.zeros(len(Row), len(tile), dtype=wide, device=tile.device)
    state[Row.PEAK] = state[Row.BEFORE] = -torch.inf  # a list as index would be copied to the device, and waited for
    return state


def run_all(tile: torch.Tensor, targets: torch.Tensor, spec: LogitSpec) -> list[torch.Tensor]:
    state, weighed, out = fresh_state(tile), torch.empty_like(tile), torch.empty_like(tile)
    logprobs.weigh(tile, weighed, 0, targets, None, None, spec, state, None)
    logprobs.grad(tile, out, 0, targets, None, None, spec, state, None, None)
    both_state, both = fresh_state(tile), torch.empty_like(tile)
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
    allowed += 2.0**-21 * logp.exp()  # by the PTX manual ex2.approx errs by 2^-22: in the sum, and in its part
    for gradient in (out, both):
        assert ((gradient.double() - truth).abs() <= allowed).all()


def test_offsets_pass_two_to_the_31st(room) -> None:
    vocab = 131072
    rows = 2**31 // vocab + 3
    room(6)
    tile = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    last, targets = make(3, vocab)
    tile[-3:] = last
    targets = torch.cat([targets.new_zeros(rows - 3), targets])
    spec = LogitSpec(vocab)
    expected = run_all(last.clone(), targets[-3:], spec)[4]
    logprobs.stats_grad(tile, tile, targets, None, None, spec, fresh_state(tile))
    assert torch.equal(tile[-3:], expected)


# One variant for each alignment of rows, and a large one.
SHAPES = pytest.mark.parametrize(("rows", "vocab"), [(3, 1000), (5, 1003), (64, 128256)])
SPECS = [
    LogitSpec(1),
    LogitSpec(1, softcap=30.0, entropy=True, mean=True, squares=True, top1=True),
    LogitSpec(1, logit_scale=0.5, temperature=0.7, round_to=torch.bfloat16),
]


@SHAPES
@pytest.mark.sanitize
@pytest.mark.parametrize("spec", SPECS, ids=["plain", "all", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_runs_repeat_bitwise(dtype: torch.dtype, spec: LogitSpec, rows: int, vocab: int) -> None:
    tile, targets = make(rows, vocab, dtype)
    spec = dataclasses.replace(spec, vocab=vocab)
    first, second = (run_all(tile, targets, spec) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_waits_for_the_device(no_waits) -> None:
    tile, targets = make(64, 32000)
    run_all(tile, targets, LogitSpec(32000))
    with no_waits():
        run_all(tile, targets, LogitSpec(32000))


def test_lengths_do_not_recompile(compiled) -> None:
    tile, targets = make(64, 32000)
    run_all(tile, targets, LogitSpec(32000))
    before = compiled()
    assert before > 0
    for rows in range(1, 21):
        run_all(tile[:rows], targets[:rows], LogitSpec(32000))
    assert compiled() == before


def test_a_graph_replays_with_other_inputs(capture) -> None:
    tile, targets = make(64, 32000)
    spec = LogitSpec(32000)
    replay, replayed = capture(lambda: run_all(tile, targets, spec))
    for shift in (0, 1):
        tile.copy_(tile.roll(shift, 0) / (1 + shift))
        targets.copy_((targets + shift) % 32000)
        replay()
        assert all(torch.equal(a, b) for a, b in zip(run_all(tile, targets, spec), replayed, strict=True))


def test_the_tensors_device_is_launched_on(other_device) -> None:
    tile, targets = make(8, 1000)
    expected = run_all(tile, targets, LogitSpec(1000))
    with torch.cuda.device(0):
        elsewhere = run_all(tile.to(other_device), targets.to(other_device), LogitSpec(1000))
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(expected, elsewhere, strict=True))
