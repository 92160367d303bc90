import itertools

import pytest
import torch

import prefcore
from prefcore import _native, rewards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _native.has_cuda(), reason="prefcore._C was built without CUDA"),
]

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = {
    "each kind of length": (0, 1, 31, 0, 255, 256, 257, 1023, 1024, 1025, 65537, 0),
    "one": (1,),
    "one long": (1_000_003,),
    "thousands": tuple(torch.randint(0, 600, (3000,), generator=GENERATOR).tolist()),
    "more than a grid's y could hold": (1,) * 600_000,
    "all empty": (0, 0, 0),
    "no sequences": (),
}


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(lengths, dtype, *, mask=True, kl="k1", past_end="drop"):
    total, sequences = sum(lengths), len(lengths)
    logps, ref_logps, values = torch.randn(3, total, dtype=dtype, generator=GENERATOR)
    spans = torch.tensor(lengths, dtype=torch.int64)
    ends = (torch.arange(3).repeat(sequences) * spans.repeat_interleave(3) / 2).to(torch.int32)  # the third is behind
    cu_segments = torch.arange(0, 3 * sequences + 1, 3, dtype=torch.int32)
    return {
        "terminal": torch.randn(sequences, dtype=dtype, generator=GENERATOR),
        "cu_seqlens": offsets(lengths),
        "streams": [prefcore.DenseReward(values, 0.5, logps, 2.0)],
        "segments": [
            prefcore.SegmentReward(ends, torch.randn(len(ends), dtype=dtype, generator=GENERATOR), cu_segments, 0.3)
        ],
        "past_end": past_end,
        "logps": logps,
        "ref_logps": ref_logps,
        "kl": kl,
        "kl_coef": torch.randn(3, dtype=dtype, generator=GENERATOR),
        "turns": torch.randint(0, 3, (total,), dtype=torch.int32, generator=GENERATOR),
        "mask": torch.rand(total, generator=GENERATOR) < 0.7 if mask else None,
        "clamp": (-2.0, 3.0),
    }


def on_cuda(x):
    if isinstance(x, torch.Tensor):
        return x.cuda()
    if isinstance(x, dict):
        return {name: on_cuda(item) for name, item in x.items()}
    if isinstance(x, list):
        return [type(item)(*map(on_cuda, item)) for item in x]
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kl", "mask", "past_end"), [("k1", True, "drop"), ("k3", True, "move"), ("k3", False, "move")]
)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_cuda_has_the_cpus_bits(lengths, kl, mask, past_end, dtype):
    given = inputs(lengths, dtype, mask=mask, kl=kl, past_end=past_end)
    expected = prefcore.token_rewards(**given)
    moved = on_cuda(given)
    for _ in range(2):
        assert torch.equal(prefcore.token_rewards(**moved).cpu(), expected)


@pytest.mark.sanitize
def test_strided_inputs_and_long_masked_stretches():
    lengths = (4, 0, 3000, 7)
    given = inputs(lengths, torch.float32, past_end="move")
    given["mask"][1000:2900] = False
    expected = prefcore.token_rewards(**given)
    moved = on_cuda(given)
    for name in ("terminal", "logps", "mask", "turns", "cu_seqlens"):
        moved[name] = torch.stack([moved[name], moved[name]], dim=1)[:, 0]
    assert torch.equal(prefcore.token_rewards(**moved).cpu(), expected)


def test_nothing_synchronises(no_waits):
    given = on_cuda(inputs((30, 0, 303), torch.float32))
    with no_waits():
        prefcore.token_rewards(**given)


def everything(terminal, old, ref, cu_seqlens, scores, preferences, cu_groups, tokens, betas, turns, normalize):
    """All of prefcore.rewards but mixtures of two or three tensors."""
    for estimate in (rewards.kl_k1, rewards.kl_k2, rewards.kl_k3):
        yield estimate(old, ref)
    ends = torch.zeros_like(cu_seqlens[1:])
    yield rewards.self_debug_reward(terminal, terminal, ends, ends + 2, old, ref, cu_seqlens, beta=0.1)
    yield rewards.rto_reward(terminal, -old, old, ref, cu_seqlens, b1=0.2, b2=0.1)
    yield from rewards.safe_rlhf_v_rewards(terminal, -terminal, old, ref, cu_seqlens, beta=0.1)
    yield rewards.seq2seq_rm(tokens, tokens.flip(0), old, ref, cu_seqlens, beta=0.1)
    yield rewards.turn_coefficients(betas, turns)
    yield rewards.dapo_overlong(cu_seqlens.diff(), max_length=40, cache=20)
    yield rewards.selfplay_winrate(preferences, cu_groups, terminal.shape[0])
    yield rewards.reward_ensemble(scores, "uwo")
    yield rewards.reward_robust(scores, scores.abs(), lam=0.5)
    for temperature in (None, 0.5):
        yield from rewards.maxmin_rlhf(scores, temperature=temperature)
    yield rewards.flr_reward(scores, -scores)
    yield rewards.pairwise_rl(scores, scores.flip(0), logit=True)
    yield normalize(terminal)


def test_rewards_are_the_cpus_and_nothing_synchronises(no_waits):
    lengths, groups = (30, 0, 303, 7, 1), (2, 0, 3)
    total = sum(lengths)
    arguments = (
        *(torch.randn(n, dtype=torch.float64, generator=GENERATOR) for n in (5, total, total)),
        offsets(lengths),
        torch.randn(5, 2, dtype=torch.float64, generator=GENERATOR),
        torch.rand(13, dtype=torch.float64, generator=GENERATOR),
        offsets(groups),
        torch.randint(0, 3, (total,), generator=GENERATOR),
        torch.randn(3, dtype=torch.float64, generator=GENERATOR),
        torch.randint(-1, 3, (total,), generator=GENERATOR),
    )
    expected = list(everything(*arguments, rewards.RewardNormalizer()))
    moved, normalize = [x.cuda() for x in arguments], rewards.RewardNormalizer()
    normalize(moved[0], update=False)  # its first call takes the moments to the GPU
    with no_waits():
        out = list(everything(*moved, normalize))
    for ours, cpus in zip(out, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), cpus, rtol=1e-11, atol=1e-11)


def test_a_graph_replays_with_other_inputs(capture):
    given = on_cuda(inputs((200, 300), torch.float32))
    replay, result = capture(lambda: prefcore.token_rewards(**given))
    for lengths in ((200, 300), (499, 1)):
        given["logps"].mul_(-2)
        given["cu_seqlens"].copy_(offsets(lengths))
        replay()
        assert torch.equal(result, prefcore.token_rewards(**given))


def test_launches_go_to_the_current_stream():
    given = on_cuda(inputs((1 << 20,), torch.float32))
    expected = prefcore.token_rewards(**given)
    logps = given["logps"].clone()
    given["logps"].zero_()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        given["logps"].copy_(logps)
        out = prefcore.token_rewards(**given)
    side.synchronize()
    assert torch.equal(out, expected)


def test_a_turn_without_a_coefficient_gives_nan():
    given = on_cuda(inputs((3, 4), torch.float32, mask=False))
    given["turns"].fill_(1)
    given["turns"][2] = 3
    given["turns"][5] = -1
    given["clamp"] = None
    assert prefcore.token_rewards(**given).isnan().nonzero()[:, 0].tolist() == [2, 5]


def test_values_are_checked_on_request(monkeypatch):
    monkeypatch.setenv("PREFCORE_CHECK", "1")
    given = on_cuda(inputs((3, 4), torch.float32, mask=False))
    given["turns"][2] = 3
    with pytest.raises(ValueError, match=r"turns must be in \[0, 3\) where tokens count, got 3"):
        prefcore.token_rewards(**given)


def test_a_tensor_on_another_device_than_the_current_one(other_device):
    cu_seqlens = offsets((1, 3)).to(other_device)
    out = prefcore.token_rewards(torch.ones(2, device=other_device), cu_seqlens, total=4)
    assert torch.cuda.current_device() == 0
    assert out.tolist() == [1, 0, 0, 1]


def test_offsets_up_to_the_last_of_32_bits(room):
    total = 2**31 - 1
    room(3 * total * 4 / 2**30)
    values = torch.zeros(total, device="cuda")
    values[-1] = 2
    out = prefcore.token_rewards(
        torch.tensor([1.0, 3.0]).cuda(), offsets((total - 999, 999)).cuda(), streams=[(values,)]
    )
    assert out[-1].item() == 5
    assert out[total - 1000].item() == 1
    assert int(out.count_nonzero()) == 2


def test_devices_are_not_mixed():
    with pytest.raises(ValueError, match="terminal must be on cu_seqlens's device cuda:0, got cpu"):
        prefcore.token_rewards(torch.zeros(1), offsets((4,)).cuda(), total=4)
