"""Types that the ops and their references both return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

OUTPUTS = ("entropy", "logsumexp", "is_top1", "mean_logits", "log_sum_sq_probs")


class TokenStats(NamedTuple):
    """Statistics of the distribution each row predicts, shaped like ``targets``; None where not requested.

    Float tensors are float32 (float64 for float64 inputs). Rows whose target is ``ignore_index`` hold zeros.
    """

    logps: Tensor  #: log-probability of the target; differentiable
    entropy: Tensor | None = None  #: in nats; differentiable
    logsumexp: Tensor | None = None  #: log of the sum of exp(z); differentiable
    is_top1: Tensor | None = None  #: bool: the target is the first maximum of z
    mean_logits: Tensor | None = None  #: mean of z over the vocabulary; not differentiable
    log_sum_sq_probs: Tensor | None = None  #: log of the sum of squared probabilities; not differentiable
