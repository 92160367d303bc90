"""Log-probabilities of responses under a Hugging Face causal LM: only response rows meet the head."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import prefcore
from prefcore._types import TokenStats
from prefcore.data.packed import Layout, PackedBatch, PackedCollator, Sharing, token_ids
from prefcore.hf._routers import router_loss
from prefcore.hf.head import Head, base_model, evaluating, find_head

logger = logging.getLogger(__name__)


class Hidden(NamedTuple):
    """What a backbone makes of a batch."""

    states: Tensor  # [N, D], final hidden states
    router_loss: Tensor | None  # of a mixture of experts whose config asks for its router's logits
    aux_loss: Tensor | None  # that loss times its coefficient


class Scores(NamedTuple):
    """Log-probabilities of the responses to each prompt, on the CPU.

    Attributes:
        token_logps: ``token_logps[i][j]`` float32 ``[length]``, of each token of response j to prompt i.
        logps: ``logps[i]`` float32 ``[responses]``, their sums.
    """

    token_logps: list[list[Tensor]]
    logps: list[Tensor]


def score(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    *,
    max_tokens: int = 8192,
    sharing: Sharing = "share",
    temperature: float = 1.0,
    attention: str = "auto",
) -> Scores:
    """Score any number of responses to each of many prompts, without gradients and without dropout.

    A prompt is run once for all its responses that fit ``max_tokens`` together, several prompts make one forward
    pass, and only response tokens meet the head. Equal to ``model(prompt + response).logits.log_softmax(-1)`` at the
    tokens of each response.

    Args:
        model: a causal LM, bare or wrapped by PEFT; see :func:`prefcore.hf.find_head` for what is refused.
        prompts: G token-id sequences, none of them empty.
        responses: for each prompt its responses, perhaps none; none of them empty.
        max_tokens: the most tokens of one forward pass, padding included.
        sharing: as :func:`prefcore.data.pack` has it.
        temperature: divides the logits.
        attention: as :func:`prefcore.hf.attention.run_packed` has it.

    Raises:
        ValueError: an empty prompt or response, ids that are no flat sequences of integers from 0 on or that the model
            does not have, or a prompt that with one response has more than ``max_tokens`` tokens; before any is scored.
        NotImplementedError: a model that cannot be packed (``sharing="off"`` pads instead), or what ``find_head``
            refuses.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"expected the responses of each prompt, got {len(prompts)} prompts and {len(responses)}")
    collate = PackedCollator(sharing, max_tokens)
    base = base_model(model)
    embeddings = base.get_input_embeddings()
    limit = _rope_limit(base.config.get_text_config())
    # On each side of the length from which a model's positions are computed in another way, items to collate and
    # their places: a prompt's number and its first response.
    sides: tuple[list[tuple[dict[str, Any], int, int]], ...] = ([], [])
    for i, (prompt, answers) in enumerate(zip(prompts, responses, strict=True)):
        ids = [token_ids(f"response {j} of prompt {i}", answer) for j, answer in enumerate(answers)]
        context = token_ids(f"prompt {i}", prompt)
        _check_vocabulary(i, [context, *ids], embeddings.weight.shape[0])
        for first, last in _fitting(i, len(context), list(map(len, ids)), max_tokens, sharing, limit):
            item = {"prompt_ids": context, "response_ids": ids[first:last]}
            sides[limit is not None and len(context) + len(ids[first]) > limit].append((item, i, first))
    found: list[list[Tensor]] = [[torch.zeros(0)] * len(answers) for answers in responses]
    with torch.no_grad(), evaluating(model):
        for side in filter(None, sides):
            for batch in collate.batches([item for item, _, _ in side]):
                logps = token_logps(
                    model, batch.to(embeddings.weight.device), temperature=temperature, attention=attention
                )
                parts = logps.float().cpu().split(batch.cu_seqlens.diff().tolist())
                ends = batch.cu_groups.tolist()
                for group, item in enumerate(batch.index.tolist()):
                    _, i, first = side[item]
                    mine = parts[ends[group] : ends[group + 1]]
                    found[i][first : first + len(mine)] = mine
    sums = [torch.stack([part.sum() for part in group]) if group else torch.zeros(0) for group in found]
    return Scores(found, sums)


def _check_vocabulary(number: int, sequences: list[np.ndarray], size: int) -> None:
    largest = max(int(ids.max()) for ids in sequences)
    if largest >= size:
        raise ValueError(f"prompt {number} or a response to it holds the token id {largest}; the model has {size}")


def _fitting(
    number: int, prompt: int, answers: list[int], max_tokens: int, sharing: str, limit: int | None
) -> list[tuple[int, int]]:
    """Runs of a prompt's responses, by their lengths, that fit the budget together and are on one side of ``limit``."""
    runs: list[tuple[int, int]] = []
    tokens, side = 0, False
    width = prompt + max(answers, default=0)
    for j, answer in enumerate(answers):
        each = {"share": answer, "pack": prompt + answer, "off": width}[sharing]
        if prompt + answer > max_tokens:
            raise ValueError(
                f"prompt {number} with response {j} has {prompt + answer} tokens, more than max_tokens={max_tokens}"
            )
        beyond = limit is not None and prompt + answer > limit
        if runs and tokens + each <= max_tokens and side == beyond:
            runs[-1] = (runs[-1][0], j + 1)
            tokens += each
        else:
            runs.append((j, j + 1))
            tokens, side = each + (prompt if sharing == "share" else 0), beyond
    return runs


def _rope_limit(config: Any) -> int | None:
    """The length from which a model's rotary frequencies depend on the longest position in the batch, if any."""
    given = getattr(config, "rope_parameters", None) or {}
    limits = []
    for each in [given, *given.values()]:  # of all layers, or by the kind of layer
        kind = each.get("rope_type") if isinstance(each, Mapping) else None
        if kind == "longrope":
            limits.append(each["original_max_position_embeddings"])
        elif kind == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def response_logps(
    model: nn.Module,
    batch: PackedBatch,
    *,
    mode: Literal["sum", "mean"] = "sum",
    temperature: float = 1.0,
    attention: str = "auto",
) -> Tensor:
    """Log-probability of each response of a batch, differentiable in the model's parameters.

    Equal to summing (``mode="sum"``) or averaging (``"mean"``) ``model(...).logits.log_softmax(-1)`` at the
    scored tokens of each response, without the logits of the whole batch. Rotary embeddings of the kinds ``dynamic``
    and ``longrope`` go by the longest sequence in a batch: where a batch has some on both sides of the model's
    original length, a warning says so (:func:`score` keeps them apart).

    Args:
        model: a causal LM, bare or wrapped by PEFT; see :func:`prefcore.hf.find_head` for what is refused.
        batch: of :func:`prefcore.data.pack` or :class:`prefcore.data.PackedCollator`, on the model's device.
        mode: ``"sum"`` or ``"mean"`` over the scored tokens of a response.
        temperature: divides the logits.
        attention: as :func:`prefcore.hf.attention.run_packed` has it.

    Returns:
        ``[S]``, float32 (float64 for a float64 model), group by group.
    """
    logps = token_logps(model, batch, temperature=temperature, attention=attention)
    return prefcore.sequence_reduce(logps, batch.cu_seqlens.to(logps.device), mode)


def token_logps(model: nn.Module, batch: PackedBatch, *, temperature: float = 1.0, attention: str = "auto") -> Tensor:
    """Log-probability of each scored token ``[T]``; arguments as :func:`response_logps`."""
    head = find_head(model)
    return head_logps(head, run_backbone(head, batch, attention).states, batch, temperature)


def head_logps(head: Head, states: Tensor, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability of each scored token ``[T]``, of the backbone's hidden states ``[N, D]``."""
    return head_stats(head, states, batch, temperature).logps


def head_stats(
    head: Head, states: Tensor, batch: PackedBatch, temperature: float = 1.0, outputs: Sequence[str] = ()
) -> TokenStats:
    """:func:`prefcore.linear_logprobs` of the scored tokens, ``[T]`` each."""
    return head.stats(_scored_rows(states, batch), batch.targets, temperature=temperature, outputs=outputs)


def head_divergence(
    head: Head, states: Tensor, other: Head, other_states: Tensor, batch: PackedBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the scored tokens ``[T]`` the log-probs, those of the other, which is constant, and KL(other || this)."""
    device = head.weight.device
    hidden = _scored_rows(states, batch).to(device)
    bias, low_rank = head.operands(hidden)
    with torch.no_grad():
        other_hidden = _scored_rows(other_states, batch).detach()
        other_bias, other_low_rank = other.operands(other_hidden.to(other.weight.device))
    if other_low_rank is not None:
        other_low_rank = other_low_rank[0].to(device), other_low_rank[1].to(device)
    stats = prefcore.linear_divergence(
        hidden,
        head.weight,
        other_hidden.to(device),
        other.weight.detach().to(device),
        batch.targets.to(device),
        kind="kl_qp",
        bias=bias,
        low_rank=low_rank,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        other_bias=None if other_bias is None else other_bias.detach().to(device),
        other_low_rank=other_low_rank,
        other_softcap=other.softcap,
        other_logit_scale=other.logit_scale,
    )
    logps, other_logps = stats.logps, stats.other_logps
    if logps is None or other_logps is None:
        raise RuntimeError("linear_divergence gave no log-probs")
    return logps, other_logps.detach(), stats.divergence


def _scored_rows(states: Tensor, batch: PackedBatch) -> Tensor:
    # The last row of a shared prompt has a gradient from each response; index_select would add them in any order.
    return prefcore.gather_rows(states, batch.rows.to(states.device, torch.int32))


def run_backbone(head: Head, batch: PackedBatch, attention: str = "auto") -> Hidden:
    """The final hidden states of a batch, and the loss of its experts' routers.

    That loss counts each token once: padding and further copies of a prompt are left out.
    """
    backbone: Any = head.backbone
    layout = batch.layout
    _warn_of_rope(backbone.config.get_text_config(), layout)
    if batch.sharing == "off":
        if attention not in ("auto", "model"):
            raise NotImplementedError(f"a padded batch runs the model's own attention, not {attention!r}")
        ids = batch.input_ids.view(-1, layout.width)
        out = backbone(input_ids=ids, attention_mask=layout.padding_mask(ids.device), use_cache=False, return_dict=True)
    else:
        from prefcore.hf.attention import run_packed

        out = run_packed(backbone, batch, attention)
    return Hidden(out.last_hidden_state.flatten(0, 1), *_router_losses(backbone, out, batch))


@functools.cache
def _warn_once(kind: str) -> None:
    logger.warning("%s", kind)


def _warn_of_rope(config: Any, layout: Layout) -> None:
    limit = _rope_limit(config)
    if limit is None:
        return
    lengths = layout.context_lengths + layout.lengths
    whole = lengths[layout.context_lengths > 0] if layout.context_lengths.any() else lengths
    if whole.min() <= limit < whole.max():
        _warn_once(
            f"a batch holds sequences of up to and of more than {limit} tokens; dynamic and longrope rotary embeddings "
            "go by the longest one for all, so that the shorter ones differ from what they are alone (as they do in "
            "padded batches)"
        )


def _router_losses(backbone: Any, out: Any, batch: PackedBatch) -> tuple[Tensor | None, Tensor | None]:
    """The load-balancing loss as the model's own causal LM takes it, and that times its coefficient."""
    config = backbone.config.get_text_config()
    logits = getattr(out, "router_logits", None)
    if not getattr(config, "output_router_logits", False) or not logits:
        return None, None
    counted = None
    if batch.layout.repeats is not None:
        counted = torch.from_numpy(~batch.layout.repeats).to(batch.input_ids.device)
        counted = counted.view(-1, batch.layout.width or batch.layout.tokens)
    loss, coefficient = router_loss(backbone, logits, counted)
    return loss, coefficient * loss
