"""The oracle of each op: the shortest readable PyTorch, in the dtype it is given, differentiable."""

from prefcore.reference.linear_logprobs import linear_logprobs
from prefcore.reference.logprobs import logprobs

__all__ = ["linear_logprobs", "logprobs"]
