"""The plan of a head call: pure arithmetic, and what the call then does."""

from __future__ import annotations

import pytest
import torch

import prefcore
from prefcore.ops import _walk
from prefcore.ops.linear_logprobs import OPERATORS

T, D, V = 4096, 4096, 128256
U = 2 * T * D * V
GIB = 2**30


def plan(**options):
    return prefcore.plan(T, D, V, **({"memory_budget": 8 * GIB} | options))


@pytest.mark.parametrize(
    ("options", "schedule", "units"),
    [
        ({"hidden_requires_grad": False, "weight_requires_grad": False}, "forward", 1),
        ({"hidden_requires_grad": False, "weight_requires_grad": False, "schedule": "retain"}, "forward", 1),
        ({"weight_requires_grad": False}, "frozen", 2),
        ({}, "retain", 3),
        ({"hidden_requires_grad": False}, "retain", 2),
        ({"memory_budget": 0}, "recompute", 4),
        ({"schedule": "recompute"}, "recompute", 4),
        ({"schedule": "recompute", "weight_requires_grad": False}, "recompute", 3),
        ({"schedule": "retain", "memory_budget": None, "device": "cpu"}, "retain", 3),
        ({"schedule": "loop"}, "loop", 3),
        ({"schedule": "loop", "memory_budget": GIB // 4}, "loop", 3),
        ({"schedule": "loop", "memory_budget": 0}, "loop", 4),
        ({"schedule": "loop", "weight_requires_grad": False}, "loop", 2),
        ({"schedule": "loop", "weight_requires_grad": False, "memory_budget": 0}, "loop", 2),
        ({"schedule": "loop", "hidden_requires_grad": False, "weight_requires_grad": False}, "forward", 1),
    ],
)
def test_schedule_and_flops(options, schedule, units):
    made = plan(**options)
    assert made.schedule == schedule
    assert made.flops == units * U
    assert made.reason
    assert made == plan(**options)


def test_a_budget_between_the_extremes_retains_what_fits():
    row = V * 2
    made = plan(memory_budget=2048 * row * 8 // 7 + row)
    assert made.schedule == "mixed"
    assert made.tiles.retained == 2048
    assert made.flops == U * 3 + U // 2
    assert "2048 of 4096" in made.reason


@pytest.mark.parametrize("budget", [0, 10**6, 10**8, 10**9, 3 * 10**9])
def test_logits_held_stay_within_the_budget(budget):
    made = plan(memory_budget=budget)
    least = 128 * 1024 * 2  # no tile is smaller
    assert made.tiles.retained * V * 2 + made.tiles.rows * made.tiles.cols * 2 <= max(budget, least)


def test_peak_memory_of_each_schedule():
    assert plan(weight_requires_grad=False).peak_bytes < 0.5 * GIB
    assert plan().peak_bytes > T * V * 2
    assert plan(schedule="recompute").peak_bytes < GIB
    wide = {"memory_budget": 64 * GIB, "outputs": ("entropy",)}
    assert plan(**wide, logits_dtype=torch.float32).peak_bytes > plan(**wide).peak_bytes + T * V * 2 - GIB


def test_a_loop_holds_one_tile_and_recomputes_what_exceeds_it():
    budget = GIB // 4
    groups = [100] * 20 + [1500] + [100] * 5 + [96]
    made = plan(schedule="loop", memory_budget=budget, groups=groups)
    held = made.tiles.retained
    assert 128 <= held < 1500
    assert held * V * 2 <= budget
    assert made.tiles.rows == 1500
    assert made.flops == 3 * U + (1500 - held) * 2 * D * V
    assert "1 of them exceed" in made.reason
    # Beside the tile: what is kept until the backward, dW in float32 among it.
    assert made.peak_bytes < budget + 4 * V * D + 4 * T * D + 3 * 4 * 1500 * D
    many = plan(schedule="loop", memory_budget=budget, groups=[1000] * 4 + [96])
    assert many.flops == 3 * U + 4 * (1000 - held) * 2 * D * V


@pytest.mark.parametrize(("budget", "outputs"), [(None, ()), (2_000_000, ()), (2_000_000, ("entropy",)), (0, ())])
def test_the_call_does_what_the_plan_says(budget, outputs):
    rows, width, vocab = 300, 8, 2500
    schedule = "auto"
    made = prefcore.plan(rows, width, vocab, dtype=torch.float32, device="cpu", outputs=outputs, memory_budget=budget)
    settings = _walk.HeadSettings(
        1.0, None, 1.0, -100, "entropy" in outputs, False, False, False, False, None, schedule, budget, True
    )
    inputs = torch.randn(rows, width), torch.randn(vocab, width), torch.randint(vocab, (rows,)), None, None, None
    retained = OPERATORS["cpu"].forward(*inputs, *settings.flat())[7]
    assert retained.shape[0] == made.tiles.retained
    bounds = _walk.limits(inputs[0], inputs[1], settings)
    assert (min(rows, bounds.tile_rows), bounds.tile_cols) == made.tiles[:2]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"T": 2.5}, TypeError, "T must be an int"),
        ({"T": True}, TypeError, "T must be an int"),
        ({"T": -1}, ValueError, "T >= 0"),
        ({"V": 0}, ValueError, "V >= 1"),
        ({"dtype": "float32"}, TypeError, "dtype"),
        ({"dtype": torch.int64}, ValueError, "dtype must be float32"),
        ({"logits_dtype": torch.int8}, ValueError, "logits_dtype"),
        ({"outputs": "entropy"}, TypeError, "sequence of names"),
        ({"outputs": ("loss",)}, ValueError, "outputs may name"),
        ({"memory_budget": 1.5}, TypeError, "memory_budget"),
        ({"memory_budget": -1}, ValueError, "memory_budget"),
        ({"schedule": "loops"}, ValueError, "schedule must be one of"),
        ({"groups": [10]}, ValueError, "groups is for schedule='loop'"),
        ({"schedule": "loop", "groups": 10}, TypeError, "groups must be a sequence of ints"),
        ({"schedule": "loop", "groups": [4.0, 6.0]}, TypeError, "groups must be a sequence of ints"),
        ({"schedule": "loop", "groups": [4, 5]}, ValueError, "add up to T, 10, got the sum 9"),
        ({"schedule": "loop", "groups": [14, -4]}, ValueError, "must not be negative"),
        ({"schedule": ["auto"]}, TypeError, "schedule"),
        ({"divergence": "kl"}, ValueError, "kind must be one of"),
        ({"divergence": "js", "other_D": 2.5}, TypeError, "other_D must be an int"),
        ({"divergence": "js", "other_D": 0}, ValueError, "other_D >= 1"),
        ({"divergence": "js", "schedule": "frozen"}, ValueError, "schedule must be one of"),
        ({"divergence": "js", "groups": [10]}, ValueError, "which linear_divergence does not have"),
        ({"other_D": 8}, ValueError, "belong to a divergence"),
        ({"schedule": "frozen"}, ValueError, "frozen"),
        ({"schedule": "forward"}, ValueError, "forward"),
        ({"device": "foo"}, ValueError, "device"),
        ({"device": "meta"}, ValueError, "CPU or a CUDA device"),
    ],
)
def test_refusals(change, error, match):
    arguments = {"T": 10, "D": 8, "V": 100, "memory_budget": 10**6} | change
    with pytest.raises(error, match=match):
        prefcore.plan(**arguments)
