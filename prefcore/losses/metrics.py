"""What trainers log beside a loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefcore.losses import _checks


class PreferenceMetrics(NamedTuple):
    """Per pair ``[P]``, detached, so that means over steps, micro-batches and ranks are the caller's."""

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracies: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor

    def named(self) -> dict[str, Tensor]:
        """The same tensors under the names that TRL logs their means by."""
        return {
            "rewards/chosen": self.chosen_rewards,
            "rewards/rejected": self.rejected_rewards,
            "rewards/margins": self.margins,
            "rewards/accuracies": self.accuracies,
            "logps/chosen": self.chosen_logps,
            "logps/rejected": self.rejected_logps,
        }


@torch.no_grad()
def preference_metrics(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float | Tensor,
) -> PreferenceMetrics:
    """Implicit rewards beta·(logps − ref_logps) of each pair, and what follows from them.

    Args:
        chosen_logps, rejected_logps: ``[P]`` log-probs of the responses under the policy.
        ref_chosen_logps, ref_rejected_logps: ``[P]`` the same under the reference.
        beta: as the loss has it, positive: a number, or a tensor ``[P]`` or 0-d.

    Returns:
        :class:`PreferenceMetrics` in float32 (float64 stays float64). An accuracy is 1 where the chosen
        reward is strictly the higher and 0 elsewhere, ties included.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: shapes or devices that differ, a beta that is not positive.
    """
    chosen, rejected = _checks.log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    scale = _checks.coefficient("beta", beta, chosen, low=0.0, high=float("inf"))
    chosen_rewards, rejected_rewards = scale * chosen, scale * rejected
    return PreferenceMetrics(
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        margins=chosen_rewards - rejected_rewards,
        accuracies=(chosen_rewards > rejected_rewards).to(chosen.dtype),
        chosen_logps=_checks.wide(chosen_logps).detach(),
        rejected_logps=_checks.wide(rejected_logps).detach(),
    )
