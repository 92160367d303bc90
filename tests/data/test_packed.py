"""Packed batches against loops in plain Python: what a row holds, who attends to whom, how groups are divided."""

import itertools
import json
import math
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefcore.data import PackedCollator, bin_pack, pack

QA_FEEDBACK = Path(__file__).parents[3] / "shared" / "data" / "qa_feedback.jsonl"
SHARINGS = ("share", "pack", "off")
PAD = 9

token_lists = st.lists(st.integers(0, 8), min_size=1, max_size=6)
groups = st.lists(st.tuples(token_lists, st.lists(token_lists, min_size=1, max_size=4)), min_size=1, max_size=5)


@st.composite
def masked_groups(draw):
    drawn = draw(groups)
    masks = [
        [draw(st.none() | st.lists(st.booleans(), min_size=len(r), max_size=len(r))) for r in responses]
        for _, responses in drawn
    ]
    return [p for p, _ in drawn], [r for _, r in drawn], masks


def oracle(prompts, responses, masks, sharing):
    """Token by token: ids, positions, who attends to whom, and what is scored where."""
    ids, positions, attended, repeats = [], [], [], []
    rows, targets, cu_seqlens, cu_groups = [], [], [0], [0]
    width = max(len(p) + len(r) for p, group in zip(prompts, responses, strict=True) for r in group)

    def add(tokens, seen, first=True):
        """Append tokens that see the places ``seen`` and one another; their places."""
        places = []
        for token in tokens:
            places.append(len(ids))
            ids.append(token)
            positions.append(len(seen) + len(places) - 1)
            attended.append([*seen, *places])
            repeats.append(not first)
        return places

    for prompt, group, marks in zip(prompts, responses, masks, strict=True):
        context = add(prompt, []) if sharing == "share" else None
        for number, (response, mask) in enumerate(zip(group, marks, strict=True)):
            begins = len(ids)
            before = add(prompt, [], first=number == 0) if context is None else context
            places = add(response, before)
            for place, previous, token, scored in zip(
                places, [before[-1], *places], response, mask or [True] * len(response), strict=False
            ):
                assert place in attended[place]
                if scored:
                    rows.append(previous)
                    targets.append(token)
            cu_seqlens.append(len(rows))
            while sharing == "off" and len(ids) < begins + width:
                ids.append(PAD)
                positions.append(0)
                attended.append([])
                repeats.append(True)
        cu_groups.append(cu_groups[-1] + len(group))
    attends = np.zeros((len(ids), len(ids)), dtype=bool)
    for place, seen in enumerate(attended):
        attends[place, seen] = True
    tensors = {
        "input_ids": ids,
        "position_ids": positions,
        "rows": rows,
        "targets": targets,
        "cu_seqlens": cu_seqlens,
        "cu_groups": cu_groups,
        "index": list(range(len(prompts))),
    }
    return tensors, attends, repeats, width


@pytest.mark.quick
@pytest.mark.parametrize("sharing", SHARINGS)
@settings(max_examples=100, deadline=None)
@given(case=masked_groups())
def test_a_batch_is_what_a_loop_over_its_tokens_makes(sharing, case):
    prompts, responses, masks = case
    batch = pack(prompts, responses, masks=masks, sharing=sharing, pad_token_id=PAD)
    tensors, attends, repeats, width = oracle(prompts, responses, masks, sharing)
    for name, expected in tensors.items():
        value = getattr(batch, name)
        assert value.tolist() == expected, name
        assert value.dtype == (torch.int32 if name.startswith("cu_") else torch.int64), name
    layout = batch.layout
    assert np.array_equal(layout.attends(), attends)
    assert layout.tokens == len(repeats)
    assert layout.width == (width if sharing == "off" else 0)
    if sharing == "share":
        assert layout.repeats is None
        assert not any(repeats)
    else:
        assert layout.repeats.tolist() == repeats
    if sharing == "off":
        lengths = [len(p) + len(r) for p, group in zip(prompts, responses, strict=True) for r in group]
        expected = [[int(place < length) for place in range(width)] for length in lengths]
        assert layout.padding_mask(torch.device("cpu")).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(case=masked_groups())
def test_the_three_sharings_score_the_same_tokens_after_the_same_histories(case):
    seen = []
    for sharing in SHARINGS:
        batch = pack(*case[:2], masks=case[2], sharing=sharing)
        attends, ids = batch.layout.attends(), batch.input_ids.numpy()
        histories = [tuple(ids[attends[row]]) for row in batch.rows.tolist()]
        seen.append((histories, batch.targets.tolist(), batch.cu_seqlens.tolist(), batch.cu_groups.tolist()))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.quick
def test_an_example_by_hand():
    batch = pack([[1, 2], [3]], [[[4, 5], [6]], [[7, 8]]])
    assert batch.input_ids.tolist() == [1, 2, 4, 5, 6, 3, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1, 2]
    assert batch.rows.tolist() == [1, 2, 1, 5, 6]  # the last token of the first prompt predicts for two
    assert batch.targets.tolist() == [4, 5, 6, 7, 8]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 5]
    assert batch.cu_groups.tolist() == [0, 2, 3]
    assert (batch.sharing, dict(batch.extras)) == ("share", {})


def test_arrays_and_tensors_serve_as_ids_and_masks():
    plain = pack([[1, 2]], [[[3, 4], [5]]], masks=[[[True, False], None]])
    for make in (np.array, torch.tensor, lambda x: np.array(x, dtype=np.uint16), tuple):
        other = pack([make([1, 2])], [[make([3, 4]), make([5])]], masks=[[np.array([1, 0]), None]])
        assert torch.equal(other.input_ids, plain.input_ids)
        assert torch.equal(other.targets, plain.targets)
        assert other.input_ids.dtype == torch.int64


@pytest.mark.quick
@pytest.mark.parametrize(
    ("prompts", "responses", "more", "text"),
    [
        ([[1]], [[[1]]], {"sharing": "some"}, r"sharing must be one of \('share', 'pack', 'off'\), got 'some'"),
        ([], [], {}, "at least one prompt, got 0 prompts"),
        ([[1], [2]], [[[1]]], {}, "got 2 prompts and responses of 1"),
        ([[1], []], [[[1]], [[1]]], {}, "prompt 1 has no token"),
        ([[1]], [[]], {}, "prompt 0 has no response"),
        ([[1], [2]], [[[1]], []], {}, "prompt 1 has no response"),
        ([[1]], [[[1], []]], {}, "response 1 of prompt 0 has no token"),
        ([[1.0]], [[[1]]], {}, "prompt 0 must hold integers, got float64"),
        ([[True]], [[[1]]], {}, "prompt 0 must hold integers, got bool"),
        ([[[1]]], [[[1]]], {}, r"prompt 0 must be a flat sequence of token ids, got shape \(1, 1\)"),
        ([[1]], [[[2, -1]]], {}, "response 0 of prompt 0 holds the token id -1"),
        ([[1]], [[1, 2]], {}, r"response 0 of prompt 0 must be a flat sequence of token ids, got shape \(\)"),
        ([[1]], [[[1]]], {"masks": [[]]}, "one mask, or None, for each response"),
        ([[1]], [[[1]]], {"masks": [[[True, False]]]}, r"mask of response 0 has shape \(2,\), the response \(1,\)"),
        ([[1]], [[[1]]], {"masks": [[[2]]]}, "mask of response 0 must hold True and False"),
    ],
)
def test_what_is_no_batch_is_refused(prompts, responses, more, text):
    with pytest.raises(ValueError, match=text):
        pack(prompts, responses, **more)


def test_a_batch_moves_as_a_whole():
    batch = PackedCollator()([{"prompt_ids": [1], "response_ids": [[2], [3]], "reward": [0.5, 1.5], "weight": 2}])[0]
    moved = batch.to("meta")
    for name in ("input_ids", "position_ids", "rows", "targets", "cu_seqlens", "cu_groups", "index"):
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(batch, name).device.type == "cpu", name
    assert {value.device.type for value in moved.extras.values()} == {"meta"}
    assert moved.layout is batch.layout


@pytest.mark.gpu
def test_a_pinned_batch_is_pinned_whole():
    batch = PackedCollator()([{"prompt_ids": [1], "response_ids": [[2]], "weight": 2}])[0].pin_memory()
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.is_pinned() for tensor in (*tensors, *batch.extras.values()))
    assert batch.to("cuda", non_blocking=True).input_ids.tolist() == [1, 2]


def test_a_layouts_plans_are_made_once_and_stay_behind_when_it_travels():
    layout = pack([[1, 2]], [[[3], [4]]]).layout
    made = []
    for key in ("a", "b", "a"):
        assert layout.plan(key, lambda key=key: made.append(key) or key) == key
    assert made == ["a", "b"]
    copy = pickle.loads(pickle.dumps(layout))
    assert copy.plan("a", lambda: "again") == "again"
    assert np.array_equal(copy.attends(), layout.attends())


def first_fit_decreasing(lengths, capacity):
    room = []
    for length in sorted(lengths, reverse=True):
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            room.append(capacity - length)
        else:
            room[place] -= length
    return len(room)


def fewest_bins(lengths, capacity):
    """By trying everything; each item goes to an open bin or to one new bin."""
    best = len(lengths)

    def place(item, loads):
        nonlocal best
        if len(loads) >= best:
            return
        if item == len(lengths):
            best = len(loads)
            return
        for i, load in enumerate(loads):
            if load + lengths[item] <= capacity:
                place(item + 1, [*loads[:i], load + lengths[item], *loads[i + 1 :]])
        place(item + 1, [*loads, lengths[item]])

    place(0, [])
    return best


def assert_divides(bins, lengths, capacity):
    assert sorted(itertools.chain.from_iterable(items.tolist() for items in bins)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in items) <= capacity for items in bins)
    assert all(items.dtype == np.int64 and (np.diff(items) > 0).all() for items in bins)
    firsts = [items[0] for items in bins]
    assert firsts == sorted(firsts)


@pytest.mark.quick
@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8), more=st.integers(0, 30))
def test_bins_hold_everything_within_capacity_and_are_few(lengths, more):
    capacity = max(lengths) + more
    bins = bin_pack(lengths, capacity)
    assert_divides(bins, lengths, capacity)
    # Best-fit decreasing has the bound of first-fit decreasing (Johnson 1974, Dósa 2007).
    assert len(bins) <= 11 / 9 * fewest_bins(lengths, capacity) + 6 / 9


@pytest.mark.parametrize("seed", range(5))
def test_bins_of_real_lengths_are_no_more_than_first_fit_decreasings_and_alike(seed):
    generator = np.random.default_rng(seed)
    lengths = np.minimum(generator.lognormal(5.5, 0.6, 500).astype(int) + 1, 2000)
    bins = bin_pack(lengths, 4096)
    assert_divides(bins, lengths, 4096)
    assert len(bins) <= first_fit_decreasing(lengths, 4096)
    loads = [lengths[items].sum() for items in bins]
    # The longest items go first to the emptiest bins, so no two loads differ by more than an item.
    assert max(loads) - min(loads) <= lengths.max()


def test_bins_that_levelling_would_overfill_are_those_of_best_fit():
    lengths = [7, 6, 3, 2, 2]  # levelled: 7 + 2 and 6 + 3, and no room for the last; best fit: 7 + 3 and 6 + 2 + 2
    assert [items.tolist() for items in bin_pack(lengths, 10)] == [[0, 2], [1, 3, 4]]
    assert [items.tolist() for items in bin_pack(lengths, 11)] == [[0, 3, 4], [1, 2]]


@pytest.mark.quick
def test_what_no_bin_can_hold_is_refused():
    with pytest.raises(ValueError, match="item 1 takes 7 tokens, which is more than 6"):
        bin_pack([3, 7, 2], 6)
    assert bin_pack([], 6) == []


items_of_groups = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=12
)


@pytest.mark.quick
@pytest.mark.parametrize("sharing", SHARINGS)
@settings(max_examples=50, deadline=None)
@given(sizes=items_of_groups, more=st.integers(0, 60))
def test_a_collated_batch_stays_within_max_tokens_and_no_group_is_lost_or_split(sharing, sizes, more):
    items = []
    for number, (prompt, responses) in enumerate(sizes):
        ids = [[1000 * number + 100 * j + t for t in range(r)] for j, r in enumerate(responses, start=1)]
        items.append(
            {
                "prompt_ids": [1000 * number] * prompt,
                "response_ids": ids,
                "number": number,
                "reward": [number + j / 8 for j in range(len(ids))],
            }
        )
    whole = PackedCollator(sharing).sizes([p for p, _ in sizes], [r for _, r in sizes])
    assert whole.tolist() == [PackedCollator(sharing)([item])[0].layout.tokens for item in items]
    limit = int(whole.max()) + more
    batches = PackedCollator(sharing, limit)(items)
    assert sorted(i for batch in batches for i in batch.index.tolist()) == list(range(len(items)))
    for batch in batches:
        assert batch.layout.tokens == len(batch.input_ids) <= limit
        index = batch.index.tolist()
        assert index == sorted(index)
        alone = pack(
            [items[i]["prompt_ids"] for i in index], [items[i]["response_ids"] for i in index], sharing=sharing
        )
        for name in ("input_ids", "rows", "targets", "cu_seqlens", "cu_groups"):
            assert torch.equal(getattr(batch, name), getattr(alone, name)), name
        assert batch.extras["number"].tolist() == index
        assert batch.extras["number"].dtype == torch.int64
        assert batch.extras["reward"].tolist() == [r for i in index for r in items[i]["reward"]]
        assert batch.extras["reward"].dtype == torch.float32
    (one,) = PackedCollator(sharing)(items)
    assert one.index.tolist() == list(range(len(items)))


@pytest.mark.quick
def test_pairs_and_lists_of_responses_collate_alike():
    pair = {
        "prompt_ids": [1, 2],
        "chosen_ids": [3, 4],
        "rejected_ids": [5],
        "chosen_mask": [True, False],
        "rejected_mask": None,
        "ref_chosen_logps": -1.5,
    }
    group = {"prompt_ids": [1, 2], "response_ids": [[3, 4], [5]], "response_masks": [[True, False], None]}
    (a,), (b,) = PackedCollator()([pair]), PackedCollator()([group])
    for name in ("input_ids", "rows", "targets", "cu_seqlens", "cu_groups"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.targets.tolist() == [3, 5]
    assert a.extras["ref_chosen_logps"].tolist() == [-1.5]
    assert "chosen_mask" not in a.extras


@pytest.mark.quick
@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([], "there are no items to collate"),
        ([{"reward": 1.0}, {}], "all items of a batch must have the same keys"),
        ([{"name": "x"}], "'name' must be a number"),
        ([{"reward": [[1.0]]}], "'reward' must be a number"),
        ([{"reward": [1.0, 2.0]}], r"'reward' must hold one number for each of the responses, \[1\]"),
        ([{"reward": [1.0]}, {"reward": 1.0}], "'reward' must hold one number for each"),
    ],
)
def test_items_that_do_not_belong_together_are_refused(items, text):
    with pytest.raises(ValueError, match=text):
        PackedCollator()([{"prompt_ids": [1], "response_ids": [[2]], **item} for item in items])


@pytest.mark.quick
def test_a_group_beyond_max_tokens_is_refused_and_named():
    text = r"item 1, a prompt of 3 tokens with 2 responses, takes 8 tokens with sharing='share', .* max_tokens=7"
    with pytest.raises(ValueError, match=text):
        PackedCollator(max_tokens=7).sizes([1, 3], [[1, 1], [4, 1]])
    with pytest.raises(ValueError, match="takes 14 tokens with sharing='off'"):
        PackedCollator("off", max_tokens=13).sizes([1, 3], [[1, 1], [4, 1]])
    with pytest.raises(ValueError, match="takes 11 tokens with sharing='pack'"):
        PackedCollator("pack", max_tokens=10).sizes([1, 3], [[1, 1], [4, 1]])
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        PackedCollator(max_tokens=1)
    with pytest.raises(ValueError, match="sharing must be one of"):
        PackedCollator("none")


def test_batches_come_whole_through_a_loader_with_workers():
    items = [{"prompt_ids": [i] * (i + 1), "response_ids": [[i, 1], [2]], "reward": [0.25 * i, 1.0]} for i in range(6)]
    make = lambda workers: torch.utils.data.DataLoader(
        items, batch_size=3, collate_fn=PackedCollator("share", 14), num_workers=workers
    )
    here, there = [list(make(workers)) for workers in (0, 2)]
    assert [len(batches) for batches in here] == [len(batches) for batches in there] == [2, 3]
    for mine, theirs in zip(itertools.chain(*here), itertools.chain(*there), strict=True):
        assert torch.equal(mine.input_ids, theirs.input_ids)
        assert torch.equal(mine.extras["reward"], theirs.extras["reward"])
        assert np.array_equal(mine.layout.attends(), theirs.layout.attends())


@pytest.mark.parametrize("sharing", SHARINGS)
def test_collating_costs_no_loop_over_tokens(sharing):
    # As in the sample of QA feedback: a prompt of some 800 tokens, answers of 80. A loop of Python over the tokens
    # takes about 50 ns for the emptiest step; the collator has a dozen of arrays of that length to fill.
    generator = np.random.default_rng(0)
    items = [
        {name: generator.integers(0, 32000, size).tolist() for name, size in sizes.items()}
        for sizes in [{"prompt_ids": 800, "chosen_ids": 80, "rejected_ids": 80}] * 64
    ]
    collate = PackedCollator(sharing)
    (batch,) = collate(items)
    loop, mine = math.inf, math.inf
    for _ in range(5):
        start = time.perf_counter()
        for token in batch.input_ids.tolist():  # noqa: B007
            pass
        middle = time.perf_counter()
        collate(items)
        loop, mine = min(loop, middle - start), min(mine, time.perf_counter() - middle)
    assert mine < 10 * loop, (mine, loop)


@pytest.mark.skipif(not QA_FEEDBACK.exists(), reason=f"{QA_FEEDBACK} is not there")
def test_the_qa_feedback_sample_shares_its_prompts_and_fills_its_batches():
    records = [json.loads(line) for line in QA_FEEDBACK.read_text().splitlines()][:200]
    number = lambda text: [len(word) for word in text.split()] or [0]
    items = [
        {"prompt_ids": number(str(r["prompt"])), "response_ids": [number(text) for text in r["responses"]]}
        for r in records
    ]
    tokens = {}
    for sharing in SHARINGS:
        batches = PackedCollator(sharing, 4096)(items)
        tokens[sharing] = sum(batch.layout.tokens for batch in batches)
        assert all(batch.layout.tokens <= 4096 for batch in batches)
        assert sorted(i for b in batches for i in b.index.tolist()) == list(range(len(items)))
        if sharing != "off":
            sizes = PackedCollator(sharing).sizes(
                [len(item["prompt_ids"]) for item in items], [[*map(len, item["response_ids"])] for item in items]
            )
            assert len(batches) <= first_fit_decreasing(sizes.tolist(), 4096)
    assert tokens["share"] < tokens["pack"] < tokens["off"]
