"""Token losses of a policy gradient: time beside eager PyTorch and torch.compile, 2^20 packed tokens."""

import pytest
import torch

from prefcore.losses import grpo

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS, BETA = 0.2, 0.04


def fused(logps, old, ref, advantages, cu_seqlens):
    out = grpo(logps, old, advantages, eps=EPS, beta=BETA, ref_logps=ref, cu_seqlens=cu_seqlens)
    return out.losses, torch.stack(tuple(out.stats.means().values()))


def eager(logps, old, ref, advantages, cu_seqlens):
    advantages = torch.repeat_interleave(advantages, cu_seqlens.diff(), output_size=logps.shape[0])
    q = (logps - old).clamp(-20, 20)
    rho = q.exp()
    surrogate = torch.max(-rho * advantages, -rho.clamp(1 - EPS, 1 + EPS) * advantages)
    u = (ref - logps).clamp(-20, 20)
    kl = u.exp() - u - 1
    with torch.no_grad():
        low = (rho < 1 - EPS) & (advantages < 0)
        high = (rho > 1 + EPS) & (advantages > 0)
        stats = [surrogate, rho, rho - 1 - q, low.float(), high.float(), kl]
        stats = torch.stack([x.mean() for x in stats])
    return surrogate + BETA * kl, stats


compiled = torch.compile(eager, dynamic=True)


@pytest.mark.parametrize("sequences", [256, 16384], ids=["256 of 4096", "16384 ragged"])
@pytest.mark.parametrize("provider", [fused, eager, compiled], ids=["prefcore", "PyTorch", "torch.compile"])
def test_grpo(provider, sequences, benchmark):
    generator = torch.Generator().manual_seed(0)
    total = 1 << 20
    if sequences == 256:
        cu_seqlens = torch.arange(0, total + 1, 4096)
    else:
        inner = torch.randint(0, total + 1, (sequences - 1,), generator=generator).sort().values
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), inner, torch.tensor([total])])
    cu_seqlens = cu_seqlens.to(DEVICE, torch.int32)
    logps, old, ref = (0.3 * torch.randn(total, generator=generator) - 2 for _ in range(3))
    logps, old, ref = logps.to(DEVICE).requires_grad_(), old.to(DEVICE), ref.to(DEVICE)
    advantages = torch.randn(sequences, generator=generator).to(DEVICE)
    wait = torch.cuda.synchronize if CUDA else lambda: None

    def step():
        logps.grad = None
        losses, _ = provider(logps, old, ref, advantages, cu_seqlens)
        losses.sum().backward()
        wait()

    benchmark.pedantic(step, warmup_rounds=3, rounds=15)
    benchmark.extra_info.update(T=total, S=sequences)
