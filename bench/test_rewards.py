"""Rewards of a million packed tokens, with a KL penalty, segments and a mask, beside a loop and PyTorch."""

import itertools

import pytest
import torch

import prefcore

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BETA, BOUND, WEIGHT = 0.05, 20.0, 0.3
SEGMENTS = 8  # a sequence
LENGTHS = {
    "256 x 4096": torch.full((256,), 4096),
    "16k ragged": torch.randint(SEGMENTS, 129, (16384,), generator=torch.Generator().manual_seed(0)),
}


def fused(terminal, logps, ref_logps, mask, ends, scores, cu_segments, cu_seqlens, kl):
    return prefcore.token_rewards(
        terminal,
        cu_seqlens,
        segments=[(ends, scores, cu_segments, WEIGHT)],
        logps=logps,
        ref_logps=ref_logps,
        kl=kl,
        kl_coef=BETA,
        mask=mask,
    )


def loop(terminal, logps, ref_logps, mask, ends, scores, cu_segments, cu_seqlens, kl):
    """Token by token, in Python's floats."""
    lp, ref, counts, r, e, w = (x.tolist() for x in (logps, ref_logps, mask, terminal, ends, scores))
    out = [0.0] * len(lp)
    for t, (a, b) in enumerate(zip(lp, ref, strict=True)):
        u = min(max(a - b, -BOUND), BOUND)
        out[t] = -BETA * (u if kl == "k1" else 2.718281828459045**-u - 1 + u)
    bounds, sets = cu_seqlens.tolist(), cu_segments.tolist()
    for s, (first, behind) in enumerate(itertools.pairwise(bounds)):
        for j in range(sets[s], sets[s + 1]):
            out[first + e[j]] += WEIGHT * w[j]
        last = next((t for t in range(behind - 1, first - 1, -1) if counts[t]), None)
        if last is not None:
            out[last] += r[s]
    return torch.tensor([x if m else 0.0 for x, m in zip(out, counts, strict=True)], device=logps.device)


def eager(terminal, logps, ref_logps, mask, ends, scores, cu_segments, cu_seqlens, kl):
    u = (logps - ref_logps).clamp(-BOUND, BOUND)
    out = -BETA * (u if kl == "k1" else torch.exp(-u) - 1 + u)
    first = cu_seqlens[:-1].long()
    owner = first.repeat_interleave(cu_segments.diff(), output_size=ends.shape[0])
    out = out.index_add(0, owner + ends, scores, alpha=WEIGHT)
    places = torch.where(mask, torch.arange(mask.shape[0], device=mask.device), -1)
    last = places.cummax(0).values[cu_seqlens[1:].long() - 1]
    there = last >= first
    out = out.index_add(0, torch.where(there, last, 0), torch.where(there, terminal, 0))
    return torch.where(mask, out, 0)


PROVIDERS = {"prefcore": fused, "loop": loop, "eager": eager, "torch.compile": torch.compile(eager)}


@pytest.mark.parametrize("kl", ["k1", "k3"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS.keys())
def test_token_rewards(provider, lengths, kl, benchmark):
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    sequences, total = lengths.shape[0], int(cu_seqlens[-1])
    logps, ref_logps = torch.randn(2, total, generator=generator)
    mask = torch.rand(total, generator=generator) < 0.9
    ends = torch.arange(1, SEGMENTS + 1) * lengths[:, None] // SEGMENTS - 1
    given = (
        torch.randn(sequences, generator=generator),
        logps,
        ref_logps,
        mask,
        ends.flatten().to(torch.int32),
        torch.randn(ends.numel(), generator=generator),
        torch.arange(0, ends.numel() + 1, SEGMENTS, dtype=torch.int32),
        cu_seqlens,
    )
    arguments = (*(x.to(DEVICE) for x in given), kl)
    torch.testing.assert_close(provider(*arguments), fused(*arguments), rtol=1e-5, atol=1e-5)
    wait = torch.cuda.synchronize if CUDA else lambda: None

    def step():
        provider(*arguments)
        wait()

    slow = provider is loop
    benchmark.pedantic(step, warmup_rounds=0 if slow else 2, rounds=3 if slow else 20)
    benchmark.extra_info.update(T=total, S=sequences)
