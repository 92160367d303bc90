"""Prompts and their responses as token ids: one way for pairs, for lists and for what is only looked at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

from prefcore.data.lists import ListDataset
from prefcore.data.pairs import PairDataset
from prefcore.data.preferences import DataError, Messages, Preference, Ranking, Text

logger = logging.getLogger(__name__)

_ASSISTANT = "assistant"
_INCONSISTENT = "the chat template renders a message otherwise when more messages follow, so no turn can be told apart"

# A text and whether its tokens are scored.
Part = tuple[str, bool]
# The characters [start, end) of a token; None for one that stands for no text, such as the end of the sequence.
Characters = tuple[int, int] | None


@dataclass(frozen=True)
class Tokens:
    """A prompt and its responses in tokens, truncated.

    Attributes:
        prompt: ids, at least one.
        responses: the ids of each response, at least one each.
        masks: of each response which tokens are scored, at least one; None for all of them.
        texts: the responses as they were tokenised, whole; messages as the chat template renders them.
        characters: of each response the characters of ``texts`` that each token stands for; empty if not asked for.
    """

    prompt: list[int]
    responses: list[list[int]]
    masks: list[list[bool] | None]
    texts: list[str]
    characters: list[list[Characters]] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """What is to be tokenised: a prompt and its responses, by the names that the data have for them."""

    prompt: Text
    responses: dict[str, Text]
    source: str

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def tokenize_pairs(
    preferences: Sequence[Preference],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
) -> PairDataset:
    """Tokenise preferences with a transformers tokenizer, as :func:`tokenize` has it.

    Their scores become the items' ``rewards`` where all preferences have some.

    Raises:
        TypeError: what is no preference; :func:`read_preferences` makes them of a file.
        DataError, ValueError: as :func:`tokenize`.
    """
    _refuse_others(preferences, Preference, "read_preferences(file)")
    tokens = tokenize(
        [pair_example(preference) for preference in preferences],
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        max_response_length=max_response_length,
    )
    equal = sum(each.responses[0] == each.responses[1] for each in tokens)
    if equal:
        logger.warning("%d of %d pairs have the same tokens on both sides and teach nothing", equal, len(tokens))
    pairs = PairDataset(
        [(each.prompt, each.responses[0], each.responses[1]) for each in tokens],
        [(each.masks[0], each.masks[1]) for each in tokens],
    )
    rewards = _all_or_none([preference.scores for preference in preferences], "pairs")
    return pairs if rewards is None else pairs.with_extras(rewards=rewards)


def _refuse_others(given: Sequence[Any], wanted: type, maker: str) -> None:
    for each in given:
        if not isinstance(each, wanted):
            raise TypeError(
                f"expected prefcore.data.{wanted.__name__}s, got {type(each).__name__}; see prefcore.data.{maker}"
            )


def tokenize_lists(
    rankings: Sequence[Ranking],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
) -> ListDataset:
    """Tokenise rankings with a transformers tokenizer, as :func:`tokenize` has it.

    Their scores become the items' ``rewards`` where all rankings have some.

    Raises:
        TypeError: what is no ranking; :func:`read_lists` makes them of a file.
        DataError, ValueError: as :func:`tokenize`, and ``ValueError`` of a ranking without responses.
    """
    _refuse_others(rankings, Ranking, "read_lists(file)")
    examples = [
        Example(
            ranking.prompt,
            {f"responses[{index}]": response for index, response in enumerate(ranking.responses)},
            ranking.source,
        )
        for ranking in rankings
    ]
    tokens = tokenize(
        examples,
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        max_response_length=max_response_length,
    )
    return ListDataset(
        [each.prompt for each in tokens],
        [each.responses for each in tokens],
        [ranking.labels for ranking in rankings],
        [each.masks for each in tokens],
        _all_or_none([ranking.scores for ranking in rankings], "lists"),
    )


def pair_example(preference: Preference) -> Example:
    """What :func:`tokenize` takes, of a preference: the responses are ``chosen`` and ``rejected``."""
    responses = {"chosen": preference.chosen, "rejected": preference.rejected}
    return Example(preference.prompt, responses, preference.source)


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
    characters: bool = False,
) -> list[Tokens]:
    """Tokenise prompts and their responses with a transformers tokenizer.

    Prompt and response are tokenised apart, so that the boundary between them is one between tokens: the
    prompt with the tokenizer's special tokens at its start, the response without any and with the
    end-of-sequence token. Messages are rendered with the tokenizer's chat template, which has its own special
    tokens.

    An answer of several messages is a conversation that goes on: its tokens are all there, and those of the
    assistant's messages are scored. A message of the assistant begins where the template's generation prompt ends,
    and is tokenised apart from what is around it.

    A prompt that is too long keeps its first token, if that is the beginning-of-sequence token, and its end;
    a response keeps its beginning. If prompt and longest response pass ``max_length`` tokens together, the
    prompt gives way first, down to half of it. What was truncated is counted in the log.

    With ``characters`` the tokens of responses are mapped to characters, which takes a fast tokenizer.

    Raises:
        DataError: a response without tokens, an empty prompt where the tokenizer has no token to begin with,
            messages without a chat template, an answer without a message of the assistant (or none is left of it
            by truncation), or a template that renders a message otherwise when more follow it. Up to ten at once.
        ValueError: a length that is not positive, or ``characters`` of a tokenizer that is not fast.
    """
    for name, least, value in (
        ("max_length", 2, max_length),
        ("max_prompt_length", 1, max_prompt_length),
        ("max_response_length", 1, max_response_length),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if characters and not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not say which characters a token stands for; use a fast one")
    problems: list[str] = []
    texts: list[tuple[str, list[list[Part]]] | None] = []
    for number, example in enumerate(examples):
        if not example.responses:
            raise ValueError(f"prompt {number} has no response")
        try:
            texts.append(_render(example, tokenizer))
        except DataError as error:
            texts.append(None)
            problems.append(f"{example.source}: {error}")

    plain = {t[0] for t, e in zip(texts, examples, strict=True) if t and not e.conversational}
    chat = {t[0] for t, e in zip(texts, examples, strict=True) if t and e.conversational}
    prompts = {(text, False): ids for text, (ids, _) in _encode(tokenizer, plain, special=True).items()}
    prompts |= {(text, True): ids for text, (ids, _) in _encode(tokenizer, chat, special=False).items()}
    parts = {part for t in texts if t for answer in t[1] for part, _ in answer}
    encoded = _encode(tokenizer, parts, special=False, characters=characters)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    done: list[Tokens] = []
    cut_prompts = cut_responses = 0
    for example, text in zip(examples, texts, strict=True):
        if text is None:
            continue
        prompt = prompts[text[0], example.conversational]
        if not example.conversational and prompt and prompt[-1] == eos and len(prompt) > 1:
            prompt = prompt[:-1]  # some tokenizers close every text
        if not prompt:
            if bos is None and eos is None:
                problems.append(f"{example.source}: the prompt is empty and the tokenizer has no token to begin with")
                continue
            prompt = [eos if bos is None else bos]
        answers = [[token for part, _ in answer for token in encoded[part][0]] for answer in text[1]]
        scored = [[own for part, own in answer for _ in encoded[part][0]] for answer in text[1]]
        if not all(map(any, scored)):
            problems.append(f"{example.source}: a response has no token")
            continue
        where = [_joined([(part, encoded[part][1]) for part, _ in answer]) for answer in text[1]]
        if not example.conversational and eos is not None:
            where = [each if answer[-1] == eos else [*each, None] for each, answer in zip(where, answers, strict=True)]
            answers = [answer if answer[-1] == eos else [*answer, eos] for answer in answers]
            scored = [[True] * len(answer) for answer in answers]
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
        scored = [mask[:longest] for mask in scored]
        if not all(map(any, scored)):
            problems.append(f"{example.source}: truncation leaves nothing of the assistant's in a response")
            continue
        done.append(
            Tokens(
                prompt,
                [answer[:longest] for answer in answers],
                [None if all(mask) else mask for mask in scored],
                ["".join(part for part, _ in answer) for answer in text[1]],
                [each[:longest] for each in where] if characters else [],
            )
        )
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise DataError("\n".join(problems[:10] + more))
    if cut_prompts or cut_responses:
        logger.warning(
            "truncated %d of %d prompts and %d of %d responses",
            cut_prompts,
            len(done),
            cut_responses,
            sum(len(each.responses) for each in done),
        )
    return done


def _all_or_none(scores: list[Any], what: str) -> list[Any] | None:
    """The scores, if all examples have some: a batch has the same numbers of every item."""
    given = sum(score is not None for score in scores)
    if 0 < given < len(scores):
        logger.warning("%d of %d %s have scores, so none is kept", given, len(scores), what)
    return scores if 0 < given == len(scores) else None


def _encode(
    tokenizer: Any, texts: set[str], special: bool, characters: bool = False
) -> dict[str, tuple[list[int], list[tuple[int, int]]]]:
    """Of each text its ids, and the characters of each if they are asked for."""
    if not texts:
        return {}
    ordered = list(texts)
    # verbose=False: texts longer than the model's context are truncated after this, if at all.
    out = tokenizer(
        ordered,
        add_special_tokens=special,
        return_attention_mask=False,
        verbose=False,
        **({"return_offsets_mapping": True} if characters else {}),
    )
    offsets = out["offset_mapping"] if characters else [[]] * len(ordered)
    return dict(zip(ordered, zip(out["input_ids"], offsets, strict=True), strict=True))


def _joined(parts: list[tuple[str, list[tuple[int, int]]]]) -> list[Characters]:
    """The characters of tokens in the text that ``parts`` make one after another."""
    found: list[Characters] = []
    begin = 0
    for text, offsets in parts:
        found += [(begin + start, begin + end) for start, end in offsets]
        begin += len(text)
    return found


def _render(example: Example, tokenizer: Any) -> tuple[str, list[list[Part]]]:
    """The text of the prompt, and those of the responses in their parts."""
    prompt = example.prompt
    strings = [text for text in example.responses.values() if isinstance(text, str)]
    if len(strings) != (len(example.responses) if isinstance(prompt, str) else 0):
        raise DataError("prompt and responses must be all strings or all messages")
    if isinstance(prompt, str):
        return prompt, [[(text, True)] for text in strings]
    answers = {name: messages for name, messages in example.responses.items() if not isinstance(messages, str)}
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("messages need a tokenizer with a chat template")
    for name, answer in answers.items():
        if all(message["role"] != _ASSISTANT for message in answer):
            raise DataError(f'"{name}" has no message of the role "{_ASSISTANT}"')

    def render(messages: Sequence[dict[str, Any]], generation: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(list(messages), add_generation_prompt=generation, tokenize=False)
        except Exception as error:  # jinja2's errors have no base that is importable without it
            raise DataError(f"the chat template fails: {error}") from error

    opens = all(answer[0]["role"] == _ASSISTANT for answer in answers.values())
    full = [render([*prompt, *answer]) for answer in answers.values()]
    # The generation prompt may end in what finished answers lack, such as the opening of a thought.
    start = commonprefix([render(prompt, generation=opens), *full])  # noqa: RUF071 - by characters is what is meant
    if len(start) < len(render(prompt)):
        raise DataError("the chat template does not begin the conversation with its prompt")
    return start, [
        _parts(render, prompt, answer, text, len(start)) for answer, text in zip(answers.values(), full, strict=True)
    ]


def _parts(render: Callable[..., str], prompt: Messages, answer: Messages, text: str, start: int) -> list[Part]:
    """``text`` from ``start`` on, divided into what the assistant says and what comes between."""
    parts: list[Part] = []
    done = start
    for place, message in enumerate(answer):
        if message["role"] != _ASSISTANT:
            continue
        before, after = [*prompt, *answer[:place]], [*prompt, *answer[: place + 1]]
        begin, end = start, len(text)
        if place:
            begin = len(commonprefix([render(before, generation=True), text]))  # noqa: RUF071
            if begin < max(done, len(render(before))):
                raise DataError(_INCONSISTENT)
        if place + 1 < len(answer):
            through = render(after)
            if not text.startswith(through):
                raise DataError(_INCONSISTENT)
            end = len(through)
        parts += [(text[done:begin], False), (text[begin:end], True)]
        done = end
    parts.append((text[done:], False))
    return [part for part in parts if part[0]]
