"""Tokenised preference pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from prefcore.data.packed import Ids, token_ids
from prefcore.data.preferences import DataError, Preference

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Pair:
    prompt: Ids
    chosen: Ids
    rejected: Ids


class PairDataset(Dataset):
    """Tokenised pairs; an item is a dict of token ids, with the reference's log-probs once they are known.

    Items have ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (int64 arrays, none of them empty) and, after
    :meth:`with_reference`, ``ref_chosen_logps`` and ``ref_rejected_logps`` (floats).

    Raises:
        ValueError: an empty prompt or response, or ids that are no flat sequence of integers from 0 on.
    """

    def __init__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]]) -> None:
        names = ("prompt", "chosen", "rejected")
        self._pairs = [
            _Pair(*(token_ids(f"pair {index}: the {name}", ids) for name, ids in zip(names, pair, strict=True)))
            for index, pair in enumerate(pairs)
        ]
        self._reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self._pairs[index]
        item: dict[str, Any] = {
            "prompt_ids": pair.prompt,
            "chosen_ids": pair.chosen,
            "rejected_ids": pair.rejected,
        }
        if self._reference is not None:
            item["ref_chosen_logps"], item["ref_rejected_logps"] = self._reference[index].tolist()
        return item

    def lengths(self) -> tuple[list[int], list[list[int]]]:
        """Tokens of each pair's prompt, and of its two responses."""
        pairs = self._pairs
        return [len(p.prompt) for p in pairs], [[len(p.chosen), len(p.rejected)] for p in pairs]

    @property
    def has_reference(self) -> bool:
        return self._reference is not None

    def with_reference(self, chosen_logps: Tensor, rejected_logps: Tensor) -> PairDataset:
        """The same pairs with the reference's log-probs ``[P]`` of their responses.

        Raises:
            ValueError: another number of log-probs than pairs, or one that is not finite.
        """
        for logps in (chosen_logps, rejected_logps):
            if logps.shape != (len(self),):
                raise ValueError(f"expected {len(self)} log-probs of each kind, got shape {tuple(logps.shape)}")
        reference = torch.stack([chosen_logps, rejected_logps], dim=-1).detach().double().cpu().numpy()
        finite = np.isfinite(reference).all(axis=1)
        if not finite.all():
            index = int(finite.argmin())
            raise ValueError(
                f"the reference's log-probs must be finite, got {reference[index].tolist()} for pair {index}"
            )
        other = PairDataset(())
        other._pairs, other._reference = self._pairs, reference
        return other


def tokenize_pairs(
    preferences: Sequence[Preference],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
) -> PairDataset:
    """Tokenise preferences with a transformers tokenizer.

    Prompt and response are tokenised apart, so that the boundary between them is one between tokens: the
    prompt with the tokenizer's special tokens at its start, the response without any and with the
    end-of-sequence token. Messages are rendered with the tokenizer's chat template, which has its own special
    tokens.

    A prompt that is too long keeps its first token, if that is the beginning-of-sequence token, and its end;
    a response keeps its beginning. If prompt and longer response pass ``max_length`` tokens together, the
    prompt gives way first, down to half of it. What was truncated is counted in the log.

    Raises:
        DataError: a response without tokens, an empty prompt where the tokenizer has no token to begin with,
            messages without a chat template, or a template that does not begin an answer with its prompt. Up
            to ten at once.
        ValueError: a length that is not positive.
    """
    for name, least, value in (
        ("max_length", 2, max_length),
        ("max_prompt_length", 1, max_prompt_length),
        ("max_response_length", 1, max_response_length),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    problems: list[str] = []
    texts: list[tuple[str, str, str] | None] = []
    for preference in preferences:
        try:
            texts.append(_render(preference, tokenizer))
        except DataError as error:
            texts.append(None)
            problems.append(f"{preference.source}: {error}")

    plain = {t[0] for t, p in zip(texts, preferences, strict=True) if t and not p.conversational}
    chat = {t[0] for t, p in zip(texts, preferences, strict=True) if t and p.conversational}
    prompts = {(text, False): ids for text, ids in _encode(tokenizer, plain, special=True).items()}
    prompts |= {(text, True): ids for text, ids in _encode(tokenizer, chat, special=False).items()}
    responses = _encode(tokenizer, {text for t in texts if t for text in t[1:]}, special=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    pairs = []
    cut_prompts = cut_responses = equal = 0
    for preference, text in zip(preferences, texts, strict=True):
        if text is None:
            continue
        prompt = prompts[text[0], preference.conversational]
        if not preference.conversational and prompt and prompt[-1] == eos and len(prompt) > 1:
            prompt = prompt[:-1]  # some tokenizers close every text
        if not prompt:
            if bos is None and eos is None:
                problems.append(
                    f"{preference.source}: the prompt is empty and the tokenizer has no token to begin with"
                )
                continue
            prompt = [eos if bos is None else bos]
        answers = [responses[answer] for answer in text[1:]]
        if not all(answers):
            problems.append(f"{preference.source}: a response has no token")
            continue
        if not preference.conversational and eos is not None:
            answers = [answer if answer[-1] == eos else [*answer, eos] for answer in answers]
        longest = max(map(len, answers))
        if max_response_length is not None:
            longest = min(longest, max_response_length)
        room = len(prompt) if max_prompt_length is None else min(len(prompt), max_prompt_length)
        if max_length is not None and room + longest > max_length:
            room = max(max_length - longest, min(room, max_length // 2))
            longest = max_length - room
        if room < len(prompt):
            cut_prompts += 1
            keeps_bos = room > 1 and prompt[0] == bos
            prompt = [bos, *prompt[len(prompt) - room + 1 :]] if keeps_bos else prompt[-room:]
        cut_responses += sum(len(answer) > longest for answer in answers)
        chosen, rejected = (answer[:longest] for answer in answers)
        equal += chosen == rejected
        pairs.append((prompt, chosen, rejected))
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise DataError("\n".join(problems[:10] + more))
    if cut_prompts or cut_responses:
        logger.warning(
            "truncated %d of %d prompts and %d of %d responses",
            cut_prompts,
            len(pairs),
            cut_responses,
            2 * len(pairs),
        )
    if equal:
        logger.warning("%d of %d pairs have the same tokens on both sides and teach nothing", equal, len(pairs))
    return PairDataset(pairs)


def _encode(tokenizer: Any, texts: set[str], special: bool) -> dict[str, list[int]]:
    if not texts:
        return {}
    ordered = list(texts)
    # verbose=False: texts longer than the model's context are truncated after this, if at all.
    ids = tokenizer(ordered, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    return dict(zip(ordered, ids, strict=True))


def _render(preference: Preference, tokenizer: Any) -> tuple[str, str, str]:
    """The texts of prompt, chosen and rejected."""
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    if isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
        return prompt, chosen, rejected  # type: ignore[return-value]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("messages need a tokenizer with a chat template")
    try:
        opening = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        bare = tokenizer.apply_chat_template(list(prompt), tokenize=False)
        full = [tokenizer.apply_chat_template([*prompt, *answer], tokenize=False) for answer in (chosen, rejected)]
    except Exception as error:  # jinja2's errors have no base that is importable without it
        raise DataError(f"the chat template fails: {error}") from error
    # The generation prompt may end in what finished answers lack, such as the opening of a thought.
    start = commonprefix([opening, *full])  # noqa: RUF071 - by characters is what is meant
    if len(start) < len(bare):
        raise DataError("the chat template does not begin the conversation with its prompt")
    return start, full[0][len(start) :], full[1][len(start) :]
