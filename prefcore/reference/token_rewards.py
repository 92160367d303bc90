"""The oracle of :func:`prefcore.token_rewards`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefcore._types import DenseReward, SegmentReward


def token_rewards(
    terminal: Tensor | None,
    cu_seqlens: Tensor,
    *,
    total: int,
    dtype: torch.dtype,
    streams: Sequence[DenseReward] = (),
    segments: Sequence[SegmentReward] = (),
    past_end: str = "drop",
    logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    divergence: Tensor | None = None,
    kl: str = "k1",
    kl_coef: float | Tensor = 0.0,
    turns: Tensor | None = None,
    max_log_ratio: float | None = None,
    terminal_clamp: float | None = None,
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Equal to the sum of all terms in ``dtype``: segment scores at their ends, the terminal reward at the last token
    that counts, the streams, less ``kl_coef`` times the KL estimate; clipped, and 0 where ``mask`` is False.
    """
    device, sequences = cu_seqlens.device, cu_seqlens.shape[0] - 1
    first, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    tokens = torch.arange(total, device=device)
    kept = torch.ones(total, dtype=torch.bool, device=device) if mask is None else mask
    # The last token that counts at or before each one, -1 where the batch has none; those of earlier sequences too.
    before = torch.cat([tokens.new_full((1,), -1), torch.where(kept, tokens, -1)]).cummax(0).values[1:]
    out = torch.zeros(total + 1, dtype=dtype, device=device)  # what goes nowhere goes to the last place

    def scatter(scores: Tensor, owner: Tensor, ends: Tensor, moves: bool) -> Tensor:
        last = length[owner] - 1
        there = (last >= 0) & (ends >= 0) & ((ends <= last) | moves)
        at = torch.where(there, first[owner] + torch.minimum(ends, last), total)
        if total:
            moved = before[at.clamp(max=total - 1)]
            moved = torch.where(there & (moved >= first[owner]), moved, total)
            at = moved if moves else torch.where(moved == at, at, total)
        return out.index_add(0, at, scores)

    for ends, scores, cu_segments, weight in segments:
        count = cu_segments.diff().long()
        owner = torch.arange(sequences, device=device).repeat_interleave(count, output_size=ends.shape[0])
        out = scatter(weight * scores.detach(), owner, ends.long(), past_end == "move")
    if terminal is not None:
        bound = float("inf") if terminal_clamp is None else terminal_clamp
        out = scatter(terminal.detach().clamp(-bound, bound), torch.arange(sequences, device=device), length, True)
    out = out[:total]
    for values, weight, baseline, most in streams:
        bound = float("inf") if most is None else most
        gap = values.detach() if baseline is None else values.detach() - baseline.detach()
        out = out + (weight * gap).clamp(-bound, bound)
    if logps is not None and ref_logps is not None:
        bound = float("inf") if max_log_ratio is None else max_log_ratio
        ratio = (logps.detach() - ref_logps.detach()).clamp(-bound, bound)
        divergence = {"k1": ratio, "k2": ratio.square() / 2, "k3": torch.expm1(-ratio) + ratio}[kl]
    if divergence is not None:
        if isinstance(kl_coef, Tensor):
            kl_coef = kl_coef.detach()
            if turns is not None:  # NaN for a turn without coefficient
                known = torch.nn.functional.pad(kl_coef, (1, 1), value=float("nan"))
                kl_coef = known[turns.long().clamp(-1, kl_coef.shape[0]) + 1]
        out = out - kl_coef * divergence.detach()
    if clamp is not None:
        out = out.clamp(*clamp)
    return torch.where(kept, out, 0)
