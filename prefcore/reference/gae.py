"""The oracle of :func:`prefcore.gae`."""

from __future__ import annotations

import torch
from torch import Tensor

from prefcore._types import GAE


def gae(
    rewards: Tensor,
    values: Tensor | None,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> GAE:
    """Equal, for each sequence from its last token to its first, to ``delta = r + gamma * V_next - V``,
    ``A = delta + gamma * lam * A_next`` and ``G = A + V``, without masked tokens. All sequences take a step at once.
    """
    values = torch.zeros_like(rewards) if values is None else values.detach()
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    first, behind = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    value = rewards.new_zeros(len(first)) if bootstrap is None else bootstrap.detach().clone()
    advantage = torch.zeros_like(value)
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for step in range(1, int((behind - first).max()) + 1 if len(first) else 1):
        t = behind - step
        live = (t >= first).nonzero()[:, 0]
        live = live[mask[t[live]]]
        t = t[live]
        delta = rewards.detach()[t] + gamma * value[live] - values[t]
        advantage[live] = delta + gamma * lam * advantage[live]
        value[live] = values[t]
        advantages[t] = advantage[live]
        returns[t] = advantage[live] + values[t]
    return GAE(advantages, returns)
