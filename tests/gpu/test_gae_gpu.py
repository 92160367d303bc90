import itertools

import pytest
import torch

import prefcore
from prefcore import _native, advantages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="prefcore._C was built without CUDA"),
]

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = {
    "each kind of length": (0, 1, 31, 0, 32, 33, 255, 256, 257, 2047, 2048, 2049, 65537, 0),  # a block a sequence
    "one": (1,),
    "one long": (1_000_003,),
    "thousands": tuple(torch.randint(0, 600, (3000,), generator=GENERATOR).tolist()),  # a warp a sequence
    "more than a grid's y could hold": (1,) * 600_000,
    "all empty": (0, 0, 0),
    "no sequences": (),
}


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(lengths, dtype, options):
    total = sum(lengths)
    made = {
        "rewards": torch.randn(total, dtype=dtype, generator=GENERATOR),
        "values": torch.randn(total, dtype=dtype, generator=GENERATOR),
        "mask": torch.rand(total, generator=GENERATOR) < 0.7,
        "bootstrap": torch.randn(len(lengths), dtype=dtype, generator=GENERATOR),
    }
    return {name: x if name == "rewards" or name in options else None for name, x in made.items()}


def on_cuda(given):
    return {name: None if x is None else x.cuda() for name, x in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [(), ("values",), ("values", "mask", "bootstrap")])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_cuda_has_the_cpus_bits(lengths, options, dtype):
    given = inputs(lengths, dtype, options)
    expected = prefcore.gae(cu_seqlens=offsets(lengths), **given, gamma=0.99, lam=0.95)
    for _ in range(2):
        out = prefcore.gae(cu_seqlens=offsets(lengths).cuda(), **on_cuda(given), gamma=0.99, lam=0.95)
        for ours, cpus in zip(out, expected, strict=True):
            assert torch.equal(ours.cpu(), cpus)


def test_strided_inputs():
    given = inputs((8, 0, 600, 14), torch.float32, ("values", "mask", "bootstrap"))
    given["bootstrap"] = given["bootstrap"].repeat_interleave(2)
    strided = {name: x[::2] for name, x in on_cuda(given).items()}
    dense = {name: x.contiguous() for name, x in strided.items()}
    cu_seqlens = offsets((4, 0, 300, 7)).cuda()
    for ours, expected in zip(
        prefcore.gae(cu_seqlens=cu_seqlens, **strided, gamma=1, lam=0.9),
        prefcore.gae(cu_seqlens=cu_seqlens, **dense, gamma=1, lam=0.9),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def everything(cu_seqlens, cu_groups, rewards, values, mask, scores, strengths):
    """All of prefcore.advantages whose sizes the host knows."""
    total, sequences = rewards.shape[0], scores.shape[0]
    for starts in (
        advantages.ngram_starts(cu_seqlens, total, 3),
        advantages.perplexity_starts(rewards, cu_seqlens),
        advantages.segment_starts(mask.long(), cu_seqlens),
    ):
        yield from advantages.macro_gae(
            rewards, values, cu_seqlens, starts, gamma=0.9, lam=0.9, mask=mask, value_reduce="position"
        )
    yield advantages.lambda_returns(rewards, values, cu_seqlens, gamma=0.9, lam=0.9)
    yield advantages.reinforce_pp(rewards, cu_seqlens, mask=mask)
    yield advantages.reinforce_pp_baseline(scores, cu_groups, cu_seqlens, total)
    yield advantages.grpo(scores, cu_groups)
    yield advantages.rloo(scores, cu_groups)
    yield from advantages.loop_ppo(scores, cu_groups)
    yield advantages.think_rm(strengths, cu_groups, sequences)
    yield advantages.groups_with_signal(scores, cu_groups)
    yield advantages.lagrangian(rewards, values, 0.5)
    yield advantages.num_items(cu_seqlens, "token_mean", mask=mask)


def test_advantages_are_the_cpus_and_nothing_synchronises():
    lengths, groups = (30, 0, 303, 7, 1), (2, 0, 3)
    given = inputs(lengths, torch.float64, ("values", "mask"))
    arguments = (
        offsets(lengths),
        offsets(groups),
        *(given[name] for name in ("rewards", "values", "mask")),
        torch.randn(5, dtype=torch.float64, generator=GENERATOR),
        torch.randn(13, dtype=torch.float64, generator=GENERATOR),
    )
    expected = list(everything(*arguments))
    moved = [x.cuda() for x in arguments]
    advantages.random_ngram_starts(moved[0], sum(lengths))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = list(everything(*moved))
        advantages.random_ngram_starts(moved[0], sum(lengths))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, cpus in zip(out, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), cpus, rtol=1e-11, atol=1e-11)


def test_groups_are_selected():
    cu_groups, cu_seqlens = offsets((2, 2)).cuda(), offsets((3, 2, 4, 1)).cuda()
    keep = advantages.groups_with_signal(torch.tensor([1.0, 1.0, 0.0, 1.0], device="cuda"), cu_groups)
    assert advantages.select_groups(keep, cu_groups, cu_seqlens).tokens.tolist() == [5, 6, 7, 8, 9]


def test_a_cuda_graph_captures_gae():
    rewards, values = torch.randn(2, 500, device="cuda")
    cu_seqlens = offsets((200, 300)).cuda()
    prefcore.gae(rewards, values, cu_seqlens, gamma=1, lam=0.95)  # warm up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prefcore.gae(rewards, values, cu_seqlens, gamma=1, lam=0.95)
    rewards.fill_(1)
    graph.replay()
    torch.cuda.synchronize()
    again = prefcore.gae(rewards, values, cu_seqlens, gamma=1, lam=0.95)
    assert torch.equal(out.advantages, again.advantages)


def test_opcheck():
    x = on_cuda(inputs((3, 0, 5), torch.float32, ("values", "mask", "bootstrap")))
    arguments = (x["rewards"], x["values"], offsets((3, 0, 5)).cuda(), x["mask"], x["bootstrap"], 0.9, 0.8)
    torch.library.opcheck(torch.ops.prefcore.gae_cuda.default, arguments)


def test_devices_are_not_mixed():
    rewards = torch.zeros(4, device="cuda")
    with pytest.raises(ValueError, match="values must be on the rewards' device cuda:0, got cpu"):
        prefcore.gae(rewards, torch.zeros(4), offsets((4,)).cuda(), gamma=1, lam=1)
