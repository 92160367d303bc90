"""The benchmark of a whole step runs, and refuses to time what does not agree."""

import argparse
import dataclasses
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench import step_cases

    return step_cases


def test_the_command_measures_prefcore_and_trl_where_it_is_there(tmp_path):
    output = tmp_path / "step.json"
    sizes = ("--model=tiny", "--pairs=2", "--k=4", "--max-length=200", "--rounds=1", "--threads=1")
    command = [sys.executable, "-m", "bench.step", *sizes, "--provider", "share", "trl", "--output", output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    share, trl = json.loads(output.read_text())["rows"]
    assert trl.get("skipped") in (None, "trl is not installed")
    assert share["pairs_per_second"] > 0
    assert share["peak_mib"] > 0
    assert done.stdout.count("\n| 4 | ") == 2


def test_all_ways_to_pack_agree(cases):
    from bench import step

    names = ["share", "pack", "off", *(["trl-packed", "trl-enabled", "trl"] if find_spec("trl") else [])]
    options = argparse.Namespace(
        model="tiny",
        pairs=2,
        dtype="float32",
        device="cpu",
        rounds=1,
        max_length=200,
        checkpointing=False,
        provider=names,
    )
    rows = step.in_turn(options, 4)  # ends the process if they do not
    assert [row["provider"] for row in rows] == names
    share, pack, off = (row["tokens"] for row in rows[:3])
    assert share < pack < off
    assert [row["tokens"] for row in rows[3:]] in ([], [share, off, off])
    scored, *others = (row["head_rows"] for row in rows[:5])
    assert set(others) == {scored}
    assert all(row["head_rows"] > scored for row in rows[5:])


def test_pairs_have_the_lengths_they_were_asked_for(cases):
    groups = cases.draw_groups(8, 8, 512, max_length=300)
    assert len(groups.prompts) == 2
    assert [len(answers) for answers in groups.responses] == [8, 8]
    assert len(groups.pairs) == 8
    assert max(len(prompt) + len(answer) for prompt, *answers in groups.pairs for answer in answers) <= 300
    assert len(groups.reference) == 16
    with pytest.raises(SystemExit, match="3 responses"):
        cases.draw_groups(3, 3, 512)


def test_a_provider_that_is_wrong_is_refused(cases):
    model = cases.make_model("tiny", torch.float32, "cpu")
    groups = cases.draw_groups(1, 2, 512, max_length=140)
    truth = cases.one_by_one(model, groups, torch.float64)
    right = cases.one_by_one(model, groups, torch.float32)
    eager = cases.differences(right, truth)
    cases.refuse_errors("right", eager, eager, truth, groups, torch.float32)
    for wrong in (
        dataclasses.replace(right, logps=right.logps.flip(0)),
        dataclasses.replace(right, loss=right.loss + 1e-3),
        dataclasses.replace(right, gradients=[g.mul(1.001) for g in right.gradients]),
        dataclasses.replace(right, logps=right.logps * torch.nan),
    ):
        with pytest.raises(SystemExit, match="does not agree"):
            cases.refuse_errors("wrong", cases.differences(wrong, truth), eager, truth, groups, torch.float32)
