"""A policy step over ``linear_loss`` costs three products of the size of the head, and no logits."""

from __future__ import annotations

import pytest
import torch

import prefcore
import prefcore.losses as losses
from prefcore.ops import _walk

LENGTHS = [40, 30, 70, 0, 60, 55, 45, 20]
CU = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
T, D, V = sum(LENGTHS), 16, 1200


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, D, generator=generator) / 4 for n in (T, V))
    targets = torch.randint(V, (T,), generator=generator)
    with torch.no_grad():
        logps = prefcore.linear_logprobs(hidden, weight, targets).logps
    old, ref = (logps + 0.3 * torch.randn(T, generator=generator) for _ in range(2))
    return hidden, weight, targets, old, ref, torch.randn(T, generator=generator), torch.randn(len(LENGTHS))


def grpo_step(old, ref, _, advantages, logged):
    def closure(stats, tile):
        out = losses.grpo(
            stats.logps, old[tile.tokens], advantages[tile.sequences], cu_seqlens=tile.cu_seqlens,
            ref_logps=ref[tile.tokens], beta=0.04,
        )  # fmt: skip
        logged.append(torch.stack(tuple(out.stats)))
        return prefcore.sequence_reduce(out.losses, tile.cu_seqlens, "mean")

    return closure


def ppo_step(old, ref, advantages, _, logged):
    def closure(stats, tile):
        out = losses.ppo(
            stats.logps, old[tile.tokens], advantages[tile.tokens], entropy=stats.entropy, entropy_coef=0.0
        )
        logged.append(torch.stack(tuple(out.stats)))
        return prefcore.sequence_reduce(out.losses, tile.cu_seqlens, "sum")

    return closure


@pytest.mark.parametrize("budget", [10**9, 1_500_000], ids=["one tile", "tiles"])
@pytest.mark.parametrize("step", [grpo_step, ppo_step])
def test_a_step_is_three_products_of_the_heads_size_with_the_gradients_of_logits(step, budget, monkeypatch):
    hidden, weight, targets, *given = make()
    outputs = ("entropy",) if step is ppo_step else ()
    items = 7 if step is grpo_step else T
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    logged, expected = [], []
    counted = []
    for name in ("mm", "addmm"):
        whole = getattr(_walk, name)

        def counting(out, a, b, whole=whole):
            counted.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            whole(out, a, b)

        monkeypatch.setattr(_walk, name, counting)

    made = prefcore.plan(
        T,
        D,
        V,
        dtype=torch.float32,
        device="cpu",
        schedule="loop",
        memory_budget=budget,
        groups=LENGTHS,
        outputs=outputs,
    )
    out = prefcore.linear_loss(
        *leaves, targets, CU, step(*given, logged), outputs=outputs, memory_budget=budget, normalizer=items
    )
    out.loss.backward()
    assert made.flops == 3 * (2 * T * D * V)
    # Tokens whose clip decides have no gradient, and on a CPU no part in its two products.
    clipped = 0 if step is grpo_step else int(sum(logged)[3] + sum(logged)[4])
    assert sum(counted) == made.flops - 2 * (2 * clipped * D * V)
    assert (clipped > 0) == (step is ppo_step)
    assert (len(logged) > 1) == (budget < 10**9)

    plain = [x.clone().requires_grad_() for x in (hidden, weight)]
    stats = prefcore.logprobs(plain[0] @ plain[1].T, targets, outputs=outputs)
    whole = prefcore.Tile(slice(0, T), slice(0, len(LENGTHS)), slice(0, len(LENGTHS)), CU, CU)
    loss = step(*given, expected)(stats, whole).sum() / items
    loss.backward()
    torch.testing.assert_close(out.loss.detach(), loss.detach())
    for a, b in zip(leaves, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sum(logged), *expected, rtol=1e-4, atol=1e-4)
