"""Preference files: JSON lines, checked as a whole before anything is trained."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

Messages = tuple[dict[str, Any], ...]
Text = str | Messages

_MAX_PROBLEMS = 10


class DataError(ValueError):
    """Preference data that cannot be used; the text names the file, the lines and the reasons."""


@dataclass(frozen=True)
class Preference:
    """One human comparison: ``chosen`` was preferred to ``rejected`` as an answer to ``prompt``.

    All three are strings, or all three are tuples of chat messages ``{"role": ..., "content": ...}``.
    ``source`` says where it comes from, such as ``pairs.jsonl:7``.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    source: str = ""

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


def read_preferences(path: str | PathLike[str]) -> list[Preference]:
    """Read a JSONL file of preferences; blank lines are skipped, fields not named here are ignored.

    A line is one of

    - ``{"prompt": str, "chosen": str, "rejected": str}``;
    - the same with lists of messages ``{"role": str, "content": ...}``, as TRL takes them: the content is a
      string or a list of parts, not empty. Without ``prompt``, the messages with which both conversations begin
      are the prompt;
    - ``{"prompt": str, "responses": [str, ...], "preferences": [[i, j, label], ...]}``: label 1 prefers
      response i, 2 prefers j, and 0, no preference, gives no pair.

    Raises:
        DataError: the file cannot be read, holds no pair, or has malformed lines: up to ten of them are named
            at once, with line number and reason.
    """
    path = Path(path)
    preferences: list[Preference] = []
    problems: list[str] = []
    malformed = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    preferences.extend(_parse(line, f"{path}:{number}"))
                except DataError as error:
                    malformed += 1
                    if len(problems) < _MAX_PROBLEMS:
                        problems.append(f"{path}:{number}: {error}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if problems:
        if malformed > len(problems):
            problems.append(f"... and {malformed - len(problems)} more malformed lines")
        raise DataError("\n".join(problems))
    if not preferences:
        raise DataError(f"{path}: holds no preference")
    return preferences


def split_by_prompt(
    preferences: list[Preference], fraction: float, seed: int = 0
) -> tuple[list[Preference], list[Preference]]:
    """Split into (training, held out): about ``fraction`` of the prompts, at least one, with all their pairs
    are held out.

    Raises:
        ValueError: ``fraction`` is not between 0 and 1, or there is only one prompt.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    keys = [json.dumps(preference.prompt) for preference in preferences]
    prompts = list(dict.fromkeys(keys))
    if len(prompts) < 2:
        raise ValueError("holding out some prompts takes at least two different prompts, got one")
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: min(max(1, round(fraction * len(prompts))), len(prompts) - 1)])
    train = [preference for preference, key in zip(preferences, keys, strict=True) if key not in held_out]
    test = [preference for preference, key in zip(preferences, keys, strict=True) if key in held_out]
    return train, test


def _parse(line: bytes, source: str) -> list[Preference]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # a number with more digits than Python converts
        raise DataError(f"cannot be read as JSON: {error}") from error
    except RecursionError as error:
        raise DataError("cannot be read as JSON: nested too deeply") from error
    if not isinstance(record, dict):
        raise DataError(f"expected an object, got {_kind(record)}")
    if "tools" in record:
        raise DataError('the field "tools" is not supported')
    compared = [name for name in ("responses", "preferences") if name in record]
    paired = [name for name in ("chosen", "rejected") if name in record]
    if compared and paired:
        raise DataError(f'"{compared[0]}" and "{paired[0]}" belong to two forms of a record; expected one form')
    if compared:
        return _comparisons(record, source)
    for name in ("chosen", "rejected"):
        if name not in record:
            raise DataError(f'the field "{name}" is missing')
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    if "prompt" in record:
        prompt = _text(record, "prompt", empty=True)
    elif isinstance(chosen, str) or isinstance(rejected, str):
        raise DataError('the field "prompt" is missing')
    else:
        shared = 0
        # The last message of each is an answer, even where both are the same.
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if not shared:
            raise DataError('the field "prompt" is missing and "chosen" and "rejected" begin differently')
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    kinds = {
        name: type(value) is str for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))
    }
    if len(set(kinds.values())) > 1:
        strings = " and ".join(f'"{name}"' for name, is_string in kinds.items() if is_string)
        raise DataError(f"all fields must be strings or all lists of messages; only {strings} is a string")
    return [Preference(prompt, chosen, rejected, source)]


def _comparisons(record: dict[str, Any], source: str) -> list[Preference]:
    for name in ("prompt", "responses", "preferences"):
        if name not in record:
            raise DataError(f'the field "{name}" is missing')
    prompt, responses, preferences = record["prompt"], record["responses"], record["preferences"]
    if not isinstance(prompt, str):
        raise DataError(f'"prompt" must be a string, got {_kind(prompt)}')
    if not isinstance(responses, list) or not all(isinstance(response, str) for response in responses):
        raise DataError('"responses" must be a list of strings')
    _check_characters("prompt", prompt)
    for index, response in enumerate(responses):
        _check_characters(f"responses[{index}]", response)
    if not isinstance(preferences, list):
        raise DataError(f'"preferences" must be a list, got {_kind(preferences)}')
    pairs = []
    for entry in preferences:
        if not isinstance(entry, list) or len(entry) != 3 or not all(type(value) is int for value in entry):
            raise DataError(
                f'an entry of "preferences" must be [i, j, label] in whole numbers, got {json.dumps(entry)}'
            )
        i, j, label = entry
        if not (0 <= i < len(responses) and 0 <= j < len(responses)) or i == j:
            raise DataError(f"preference {entry} does not name two of the {len(responses)} responses (0 is the first)")
        if label not in (0, 1, 2):
            raise DataError(f"the label of preference {entry} must be 0, 1 or 2")
        if label == 0:
            continue
        winner, loser = (i, j) if label == 1 else (j, i)
        for index in (winner, loser):
            if not responses[index].strip():
                raise DataError(f"response {index} is empty")
        pairs.append(Preference(prompt, responses[winner], responses[loser], source))
    return pairs


def _text(record: dict[str, Any], name: str, empty: bool = False) -> Text:
    value = record[name]
    if isinstance(value, str):
        if not empty and not value.strip():
            raise DataError(f'"{name}" is empty')
        _check_characters(name, value)
        return value
    if not isinstance(value, list):
        raise DataError(f'"{name}" must be a string or a list of messages, got {_kind(value)}')
    if not value:
        raise DataError(f'"{name}" is empty')
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f'message {position} of "{name}" must have a "role" and a "content"')
        role, content = message["role"], message["content"]
        if not role.strip():
            raise DataError(f'message {position} of "{name}" has an empty "role"')
        if not isinstance(content, str | list):
            raise DataError(f'the "content" of message {position} of "{name}" must be a string, got {_kind(content)}')
        if not (content.strip() if isinstance(content, str) else content):
            raise DataError(f'message {position} of "{name}" has an empty "content"')
    try:
        _check_characters(name, json.dumps(value, ensure_ascii=False))
    except RecursionError as error:
        raise DataError(f'"{name}" is nested too deeply') from error
    return tuple(value)


def _check_characters(name: str, text: str) -> None:
    """Refuse half of a surrogate pair: JSON can escape it, tokenizers fail on it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f'"{name}" has a lone surrogate, \\u{code:04x}, which is no character') from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
