"""Log-probabilities of responses under a Hugging Face causal LM: only response rows meet the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

import prefcore
from prefcore.hf.head import final_hidden, find_head


def response_logps(
    model: nn.Module, batch: Mapping[str, Tensor], *, mode: Literal["sum", "mean"] = "sum", temperature: float = 1.0
) -> Tensor:
    """Log-probability of each response of a batch, differentiable in the model's parameters.

    Equal to summing (``mode="sum"``) or averaging (``"mean"``) ``model(...).logits.log_softmax(-1)`` at the
    response tokens, without the logits of the whole batch.

    Args:
        model: a causal LM, bare or wrapped by PEFT; see :func:`prefcore.hf.find_head` for what is refused.
        batch: ``input_ids`` and ``attention_mask`` ``[B, L]``, and, of the T response tokens, ``rows [T]``
            (the positions in the flattened ``[B * L]`` whose hidden states predict them), ``targets [T]`` and
            ``cu_seqlens`` int32 ``[S + 1]``: what :class:`prefcore.data.PairCollator` gives.
        mode: ``"sum"`` or ``"mean"`` over the tokens of a response.
        temperature: divides the logits.

    Returns:
        ``[S]``, float32 (float64 for a float64 model).
    """
    head = find_head(model)
    hidden = final_hidden(head, batch["input_ids"], batch["attention_mask"])
    rows = hidden.flatten(0, 1).index_select(0, batch["rows"].to(hidden.device))
    device = head.weight.device
    stats = prefcore.linear_logprobs(
        rows.to(device),
        head.weight,
        batch["targets"].to(device),
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )
    return prefcore.sequence_reduce(stats.logps, batch["cu_seqlens"].to(device), mode)
