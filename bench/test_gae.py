"""Generalised advantage estimation of a million packed tokens, beside the loops and scans that PyTorch offers."""

import itertools

import pytest
import torch

import prefcore

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GAMMA, LAM = 0.99, 0.95
LENGTHS = {
    "256 x 4096": torch.full((256,), 4096),
    "16k ragged": torch.randint(0, 129, (16384,), generator=torch.Generator().manual_seed(0)),
}


def fused(rewards: torch.Tensor, values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return prefcore.gae(rewards, values, cu_seqlens, gamma=GAMMA, lam=LAM).advantages


def loop(rewards: torch.Tensor, values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Token by token, in Python's floats."""
    r, v, ends = rewards.tolist(), values.tolist(), cu_seqlens.tolist()
    out = [0.0] * len(r)
    for first, behind in itertools.pairwise(ends):
        advantage = following = 0.0
        for t in range(behind - 1, first - 1, -1):
            advantage = r[t] + GAMMA * following - v[t] + GAMMA * LAM * advantage
            following = v[t]
            out[t] = advantage
    return torch.tensor(out, device=rewards.device)


def padded(rewards: torch.Tensor, values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """All sequences at once, padded at their beginning, step by step: the loop of most trainers."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max())
    place = torch.arange(longest, device=rewards.device) - longest + cu_seqlens[1:, None]
    there = place >= cu_seqlens[:-1, None]
    r, v = (torch.where(there, x[place.clamp(min=0)], 0).T.contiguous() for x in (rewards, values))
    out = torch.empty_like(r)
    advantage = following = torch.zeros_like(r[0])
    for t in range(longest - 1, -1, -1):
        advantage = r[t] + GAMMA * following - v[t] + GAMMA * LAM * advantage
        following = v[t]
        out[t] = advantage
    return out.T[there]


def doubling(rewards: torch.Tensor, values: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    """The scan as log2(longest) passes over packed tokens."""
    total = rewards.shape[0]
    behind = cu_seqlens[1:].repeat_interleave(cu_seqlens.diff(), output_size=total)
    left = behind - torch.arange(1, total + 1, device=rewards.device)  # tokens to come
    following = torch.where(left > 0, values.roll(-1), 0)
    out = rewards + GAMMA * following - values
    distance, factor = 1, GAMMA * LAM
    while distance < longest:
        out = out + torch.where(left >= distance, factor * out.roll(-distance), 0)
        distance, factor = 2 * distance, factor * factor
    return out


compiled = torch.compile(doubling)


PROVIDERS = {"prefcore": fused, "loop": loop, "padded": padded, "doubling": doubling, "torch.compile": compiled}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS.keys())
def test_gae(provider, lengths, benchmark):
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE, torch.int32)
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, int(cu_seqlens[-1]), generator=generator).to(DEVICE)
    arguments = (rewards, values, cu_seqlens)
    if provider in (doubling, compiled):
        arguments = (*arguments, int(lengths.max()))
    torch.testing.assert_close(provider(*arguments), fused(rewards, values, cu_seqlens), rtol=1e-4, atol=1e-4)
    wait = torch.cuda.synchronize if CUDA else lambda: None

    def step():
        provider(*arguments)
        wait()

    slow = provider in (loop, padded)
    benchmark.pedantic(step, warmup_rounds=0 if slow else 2, rounds=3 if slow else 20)
    benchmark.extra_info.update(T=rewards.shape[0], S=lengths.shape[0])
