"""Preference files are read as documented, checked as a whole, and batched without a token out of place."""

import json
import logging
from pathlib import Path

import pytest
import torch

from prefcore.data import (
    DataError,
    PackedCollator,
    PairDataset,
    Preference,
    read_preferences,
    split_by_prompt,
    tokenize_lists,
    tokenize_pairs,
)

QA_FEEDBACK = Path(__file__).parents[3] / "shared" / "data" / "qa_feedback.jsonl"
GOOD = {"prompt": "Which?", "chosen": "this", "rejected": "that"}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def say(role, content):
    return {"role": role, "content": content}


@pytest.mark.quick
def test_the_three_forms_are_read(tmp_path):
    user, good, bad = say("user", "Which?"), say("assistant", "this"), say("assistant", "that")
    path = write(
        tmp_path / "pairs.jsonl",
        {**GOOD, "id": 7},
        "",
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "Q", "responses": ["a", "b", "c"], "preferences": [[0, 1, 1], [0, 2, 2], [1, 2, 0]]},
    )
    assert read_preferences(path) == [
        Preference("Which?", "this", "that", f"{path}:1"),
        Preference((user,), (good,), (bad,), f"{path}:3"),
        Preference((user,), (good,), (bad,), f"{path}:4"),
        Preference("Q", "a", "b", f"{path}:5"),
        Preference("Q", "c", "a", f"{path}:5"),
    ]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", ', "not JSON: .* at column 17"),
        ("[1, 2]", "expected an object, got a list"),
        ('"text"', "expected an object, got a string"),
        ({"prompt": "a", "chosen": "b"}, 'the field "rejected" is missing'),
        ({"chosen": "a", "rejected": "b"}, 'the field "prompt" is missing'),
        ({"chosen": [say("user", "a")], "rejected": [say("user", "b")]}, "begin differently"),
        ({**GOOD, "chosen": None}, '"chosen" must be a string or a list of messages, got null'),
        ({**GOOD, "prompt": 3}, '"prompt" must be a string or a list of messages, got a number'),
        ({**GOOD, "rejected": " \n"}, '"rejected" is empty'),
        ({**GOOD, "chosen": []}, '"chosen" is empty'),
        (
            {**GOOD, "chosen": [{"role": "assistant"}]},
            'message 0 of "chosen" must have a "role" and a "content"',
        ),
        (
            {**GOOD, "chosen": [say("assistant", "a")]},
            "all strings or all lists|must be strings or all lists",
        ),
        ({**GOOD, "tools": []}, '"tools" is not supported'),
        ({"prompt": "a", "responses": ["b", "c"]}, 'the field "preferences" is missing'),
        ({"prompt": "a", "responses": ["b"], "scores": [1]}, '"scores" without "preferences" make a list'),
        ({"prompt": "a", "completion": "b", "label": True}, r'a single response \("completion"\) is no pair'),
        ({"prompt": "a", "responses": "bc", "preferences": []}, '"responses" must be a list of strings'),
        (
            {"prompt": "a", "responses": ["b", "c"], "preferences": [[0, 2, 1]]},
            "does not name two of the 2 responses",
        ),
        ({"prompt": "a", "responses": ["b", "c"], "preferences": [[1, 1, 1]]}, "does not name two"),
        ({"prompt": "a", "responses": ["b", "c"], "preferences": [[0, 1, 3]]}, "must be 0, 1 or 2"),
        ({"prompt": "a", "responses": ["b", "c"], "preferences": [[0, 1]]}, "must be \\[i, j, label\\]"),
        (
            {"prompt": "a", "responses": ["b", "c"], "preferences": [[0, 1, True]]},
            "must be \\[i, j, label\\]",
        ),
        ({"prompt": "a", "responses": ["b", ""], "preferences": [[0, 1, 1]]}, "response 1 is empty"),
        ('{"id": ' + "9" * 5000 + "}", "cannot be read as JSON: Exceeds the limit .* digits"),
        ("[" * 100_000 + "]" * 100_000, "cannot be read as JSON: nested too deeply"),
        ({**GOOD, "chosen": "a \ud83d b"}, r'"chosen" has a lone surrogate, \\ud83d'),
        (
            {**GOOD, "chosen": [say("assistant", "\udc00")]},
            r'"chosen" has a lone surrogate, \\udc00',
        ),
        (
            {"prompt": "a", "responses": ["b", "\ud83d"], "preferences": [[0, 1, 1]]},
            r'"responses\[1\]" has a lone surrogate',
        ),
        ({**GOOD, "chosen": [say("assistant", None)]}, 'content" of message 0 of "chosen" must be a string, got null'),
        ({**GOOD, "chosen": [say("assistant", 3)]}, "must be a string, got a number"),
        ({**GOOD, "chosen": [say("assistant", "")]}, 'message 0 of "chosen" has an empty "content"'),
        ({**GOOD, "chosen": [say("assistant", [])]}, 'message 0 of "chosen" has an empty "content"'),
        ({**GOOD, "chosen": [say("", "a")]}, 'message 0 of "chosen" has an empty "role"'),
        ({**GOOD, "responses": ["b", "c"], "preferences": []}, '"responses" and "chosen" belong to two forms'),
    ],
)
def test_a_malformed_line_gives_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "pairs.jsonl", GOOD, line)
    with pytest.raises(DataError, match=reason) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert isinstance(caught.value, ValueError)


@pytest.mark.quick
def test_all_problems_are_reported_at_once_up_to_ten(tmp_path):
    path = write(tmp_path / "pairs.jsonl", "{", GOOD, {}, "1")
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [f"{path}:{n}" for n in (1, 3, 4)]
    with pytest.raises(DataError) as caught:
        read_preferences(write(path, *["{"] * 25))
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "... and 15 more malformed lines"


def test_files_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot be read: No such file"):
        read_preferences(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_preferences(tmp_path)
    with pytest.raises(DataError, match="holds no preference"):
        read_preferences(write(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match=r"latin\.jsonl:1: not UTF-8 \(byte 12\)"):
        read_preferences(tmp_path / "latin.jsonl")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert len(read_preferences(tmp_path / "bom.jsonl")) == 1


def test_holding_out_keeps_the_pairs_of_a_prompt_together():
    preferences = [Preference(f"p{i % 10}", f"a{i}", f"b{i}") for i in range(40)]
    train, test = split_by_prompt(preferences, 0.2, seed=1)
    assert len(train) == 32
    assert len(test) == 8
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert split_by_prompt(preferences, 0.2, seed=1) == (train, test)
    assert split_by_prompt(preferences, 0.2, seed=2) != (train, test)
    assert len(split_by_prompt(preferences, 0.001)[1]) == 4
    with pytest.raises(ValueError, match="two different prompts"):
        split_by_prompt(preferences[:1], 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_prompt(preferences, 1.5)


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "U:",
        "A:",
        *"abcdefghij",
        "think",
        "<|im_start|>",
        "<|im_end|>",
        "user",
        "assistant",
    ]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.add_special_tokens(["<pad>", "<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tokens(dataset, tokenizer, index=0):
    item = dataset[index]
    return [
        " ".join(tokenizer.convert_ids_to_tokens(item[f"{name}_ids"].tolist()))
        for name in ("prompt", "chosen", "rejected")
    ]


@pytest.mark.quick
def test_the_prompt_opens_and_the_answers_close(tokenizer):
    pairs = tokenize_pairs([Preference("a b", "c", "d e"), Preference("", "c </s>", "d")], tokenizer)
    assert tokens(pairs, tokenizer) == ["<s> a b", "c </s>", "d e </s>"]
    assert tokens(pairs, tokenizer, 1) == ["<s>", "c </s>", "d </s>"]


@pytest.mark.quick
def test_truncation_keeps_the_end_of_prompts_and_the_start_of_answers_and_is_counted(tokenizer, caplog):
    long = [Preference("a b c d e f", "g h i", "j"), Preference("a", "b", "c")]

    def cut(**limits):
        return tokens(tokenize_pairs(long, tokenizer, **limits), tokenizer)

    assert cut() == ["<s> a b c d e f", "g h i </s>", "j </s>"]
    assert cut(max_prompt_length=3) == ["<s> e f", "g h i </s>", "j </s>"]
    assert cut(max_prompt_length=1) == ["f", "g h i </s>", "j </s>"]
    assert cut(max_response_length=2) == ["<s> a b c d e f", "g h", "j </s>"]
    assert cut(max_length=9) == ["<s> c d e f", "g h i </s>", "j </s>"]
    assert cut(max_length=4) == ["<s> f", "g h", "j </s>"]
    with caplog.at_level(logging.WARNING, "prefcore.data"):
        caplog.clear()
        cut(max_prompt_length=3, max_response_length=3)
    assert caplog.messages == ["truncated 1 of 2 prompts and 1 of 4 responses"]
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        cut(max_length=1)


def test_pairs_of_equal_answers_are_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "prefcore.data"):
        tokenize_pairs([Preference("a", "b", "b"), Preference("a", "b", "c")], tokenizer)
    assert caplog.messages == ["1 of 2 pairs have the same tokens on both sides and teach nothing"]


def test_what_is_no_preference_is_refused_by_name(tokenizer):
    with pytest.raises(TypeError, match=r"expected prefcore\.data\.Preferences, got dict; .*read_preferences"):
        tokenize_pairs([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer)
    with pytest.raises(TypeError, match=r"expected prefcore\.data\.Rankings, got Preference; .*read_lists"):
        tokenize_lists([Preference("a", "b", "c")], tokenizer)


def test_messages_are_rendered_with_the_chat_template(tokenizer):
    talk = Preference((say("user", "a"),), (say("assistant", "b"),), (say("assistant", "c d"),), "f.jsonl:3")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"f\.jsonl:3: messages need a tokenizer with a chat template"):
        tokenize_pairs([talk], tokenizer)
    turns = (
        "<s>{% for m in messages %} {{ 'U: ' if m.role == 'user' else 'A: ' }}{{ m.content }} "
        "{% if m.role != 'user' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %} A:"
    )
    try:
        tokenizer.chat_template = turns + "{% endif %}"
        assert tokens(tokenize_pairs([talk], tokenizer), tokenizer) == ["<s> U: a A:", "b </s>", "c d </s>"]
        tokenizer.chat_template = turns + " think{% endif %}"  # which finished answers lack
        assert tokens(tokenize_pairs([talk], tokenizer), tokenizer) == ["<s> U: a A:", "b </s>", "c d </s>"]
        tokenizer.chat_template = "{{ messages | length }} {{ messages[-1].content }}"
        with pytest.raises(DataError, match="does not begin the conversation with its prompt"):
            tokenize_pairs([talk], tokenizer)
        tokenizer.chat_template = "{{ raise_exception('no system role') }}"
        with pytest.raises(DataError, match="the chat template fails: no system role"):
            tokenize_pairs([talk], tokenizer)
    finally:
        tokenizer.chat_template = None


CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def talk(*turns):
    """Messages of the user and the assistant in turn; the user begins."""
    return tuple(say("assistant" if place % 2 else "user", text) for place, text in enumerate(turns))


@pytest.fixture
def chatml(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    return tokenizer


def scored(dataset, tokenizer, index=0):
    """The tokens of both answers that are scored."""
    item = dataset[index]
    masks = [(item[f"{name}_ids"], item[f"{name}_mask"]) for name in ("chosen", "rejected")]
    return [" ".join(tokenizer.convert_ids_to_tokens(ids[... if m is None else m].tolist())) for ids, m in masks]


@pytest.mark.quick
def test_of_an_answer_with_several_turns_only_the_assistants_are_scored(chatml):
    whole = Preference(talk("a"), talk("a", "b", "c d", "e f")[1:], talk("a", "g")[1:])
    single = Preference(talk("a"), talk("a", "b")[1:], talk("a", "c")[1:])
    pairs = tokenize_pairs([whole, single], chatml)
    assert tokens(pairs, chatml) == [
        "<|im_start|> user a <|im_end|> <|im_start|> assistant",
        "b <|im_end|> <|im_start|> user c d <|im_end|> <|im_start|> assistant e f <|im_end|>",
        "g <|im_end|>",
    ]
    assert scored(pairs, chatml) == ["b <|im_end|> e f <|im_end|>", "g <|im_end|>"]
    assert pairs[0]["chosen_mask"].dtype == bool
    assert pairs[0]["rejected_mask"] is None
    assert pairs[1]["chosen_mask"] is pairs[1]["rejected_mask"] is None
    (batch,) = PackedCollator()([pairs[0], pairs[1]])
    assert batch.cu_seqlens.diff().tolist() == [5, 2, 2, 2]
    assert chatml.convert_ids_to_tokens(batch.targets[:5].tolist()) == ["b", "<|im_end|>", "e", "f", "<|im_end|>"]


def test_an_answer_may_begin_with_the_user_and_hold_turns_of_others_and_end_with_them(chatml):
    chosen = (say("user", "b"), say("assistant", "c"), say("assistant", "d"), say("tool", "e"))
    pairs = tokenize_pairs([Preference(talk("a"), chosen, talk("f", "g"))], chatml)
    assert tokens(pairs, chatml)[0] == "<|im_start|> user a <|im_end|>"
    assert scored(pairs, chatml) == ["c <|im_end|> d <|im_end|>", "g <|im_end|>"]
    assert tokens(pairs, chatml)[1].endswith("d <|im_end|> <|im_start|> <unk> e <|im_end|>")


@pytest.mark.parametrize("length", range(1, 13))
def test_truncation_cuts_the_mask_with_its_answer(chatml, length):
    whole = Preference(talk("a"), talk("a", "b", "c d", "e f")[1:], talk("a", "g")[1:])
    wanted = [True] * 2 + [False] * 7 + [True] * 3
    item = tokenize_pairs([whole], chatml, max_response_length=length)[0]
    assert len(item["chosen_ids"]) == length
    mask = wanted[:length] if item["chosen_mask"] is None else item["chosen_mask"].tolist()
    assert mask == wanted[:length]
    assert (item["chosen_mask"] is None) == (length <= 2)


def test_answers_of_which_nothing_can_be_scored_are_refused(chatml, monkeypatch):
    late = Preference(talk("a"), talk("b", "c"), talk("d", "e"), "f.jsonl:3")
    with pytest.raises(DataError, match=r"f\.jsonl:3: truncation leaves nothing of the assistant's in a response"):
        tokenize_pairs([late], chatml, max_response_length=5)
    with pytest.raises(DataError, match='"rejected" has no message of the role "assistant"'):
        tokenize_pairs([Preference(talk("a"), talk("b", "c"), talk("d"))], chatml)


def test_a_template_that_changes_earlier_turns_is_refused(chatml, monkeypatch):
    several = Preference(talk("a"), talk("a", "b", "c", "d")[1:], talk("a", "g")[1:], "f.jsonl:3")
    last = "{% if loop.last and m.role == 'assistant' %}think {% endif %}{{ m.content }}"
    monkeypatch.setattr(chatml, "chat_template", CHATML.replace("{{ m.content }}", last))
    with pytest.raises(DataError, match=r"f\.jsonl:3: the chat template renders a message otherwise when more"):
        tokenize_pairs([several], chatml)
    one = Preference(talk("a"), talk("a", "b")[1:], talk("a", "g")[1:])
    assert scored(tokenize_pairs([one], chatml), chatml) == ["think b <|im_end|>", "think g <|im_end|>"]


@pytest.mark.quick
def test_pairs_may_come_with_masks():
    pairs = PairDataset([([1], [2, 3], [4]), ([5], [6], [7])], [([False, True], None), (None, [True])])
    assert pairs[0]["chosen_mask"].tolist() == [False, True]
    (batch,) = PackedCollator()([pairs[0], pairs[1]])
    assert batch.targets.tolist() == [3, 4, 6, 7]
    for masks, text in (
        ([(None, None)], "expected the masks of each of 2 pairs, got 1"),
        ([([True], None), (None, None)], "pair 0: the mask of the chosen must hold 2 of True and False"),
        ([([0, 1], None), (None, None)], "must hold 2 of True and False, got int64"),
        ([(None, None), (None, [False])], "pair 1: the mask of the rejected scores nothing"),
    ):
        with pytest.raises(ValueError, match=text):
            PairDataset([([1], [2, 3], [4]), ([5], [6], [7])], masks)
    known = pairs.with_reference(torch.zeros(2), torch.zeros(2))
    assert known[0]["chosen_mask"].tolist() == [False, True]


@pytest.mark.quick
def test_reference_log_probs_travel_with_the_pairs():
    pairs = PairDataset([([1], [2], [3]), ([4], [5], [6])])
    known = pairs.with_reference(torch.tensor([-1.5, -2.5]), torch.tensor([-3.0, -4.0]))
    assert known.has_reference
    assert not pairs.has_reference
    (batch,) = PackedCollator()([known[1], known[0]])
    assert batch.extras["ref_chosen_logps"].tolist() == [-2.5, -1.5]
    assert batch.extras["ref_rejected_logps"].tolist() == [-4.0, -3.0]
    with pytest.raises(ValueError, match="expected 2 log-probs"):
        pairs.with_reference(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="expected 2 log-probs"):
        pairs.with_reference(torch.zeros(2), torch.zeros(3))
    for wrong in (float("nan"), float("-inf")):
        with pytest.raises(ValueError, match=r"must be finite, got .* for pair 1"):
            pairs.with_reference(torch.zeros(2), torch.tensor([0.0, wrong]))
    with pytest.raises(ValueError, match="pair 0: the rejected has no token"):
        PairDataset([([1], [2], [])])


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([1, 1.7], "must hold integers, got float64"),
        ([True], "must hold integers, got bool"),
        (["1"], "must hold integers"),
        ([2**70], "must hold integers, got object"),
        ([3, -100], "holds the token id -100"),
        ([[1, 2], [3, 4]], r"must be a flat sequence of token ids, got shape \(2, 2\)"),
    ],
)
def test_token_ids_are_flat_sequences_of_integers(ids, text):
    with pytest.raises(ValueError, match=f"pair 1: the chosen {text}"):
        PairDataset([([1], [2], [3]), ([4], ids, [6])])


@pytest.mark.skipif(not QA_FEEDBACK.exists(), reason=f"{QA_FEEDBACK} is not there")
def test_the_qa_feedback_sample_is_read_whole():
    preferences = read_preferences(QA_FEEDBACK)
    records = [json.loads(line) for line in QA_FEEDBACK.read_text().splitlines()]
    assert len(preferences) == sum(label != 0 for record in records for _, _, label in record["preferences"])
    record = records[0]
    i, j, label = next(entry for entry in record["preferences"] if entry[2])
    winner, loser = (i, j) if label == 1 else (j, i)
    first = preferences[0]
    assert first.prompt == record["prompt"]
    assert (first.chosen, first.rejected) == (record["responses"][winner], record["responses"][loser])
