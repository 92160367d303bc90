"""Scripts as TRL's documentation has them train to the same metrics with two more lines, and with another import."""

import json
import runpy

import pytest
import torch

# The quick starts of TRL's pages on DPO and GRPO; model and data are made on the spot instead of downloaded, and the
# configurations keep the runs short.
DPO = """
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

trainer = DPOTrainer(
    model="model",
    args=DPOConfig("output", num_train_epochs=2, logging_steps=1, per_device_train_batch_size=4, bf16=False),
    train_dataset=load_dataset("json", data_files="preferences.jsonl", split="train"),
)
trainer.train()
"""
GRPO = """
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer


def reward(completions, **kwargs):
    return [float(completion.count("w1")) for completion in completions]


trainer = GRPOTrainer(
    model="model",
    reward_funcs=reward,
    args=GRPOConfig(
        "output", max_steps=3, logging_steps=1, num_generations=4, max_completion_length=6, beta=0.1, bf16=False,
    ),
    train_dataset=load_dataset("json", data_files="prompts.jsonl", split="train"),
)
trainer.train()
"""
TWO_LINES = "import prefcore.trl\nprefcore.trl.enable()\n"
SAME = ("loss", "rewards/", "reward", "logps/", "logits/", "entropy", "mean_token_accuracy", "kl", "grad_norm")


@pytest.fixture
def folder(harness, tmp_path, monkeypatch):
    """A working directory with a model and data, as `from_pretrained` and `load_dataset` find them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    harness.save_reference(tmp_path / "model", seed=0)
    for name, data in (("preferences", harness.preferences()), ("prompts", harness.prompts())):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return tmp_path


def log_of(harness, folder, script):
    """What the script's trainer logged, and how often each op of prefcore was called."""
    import prefcore.trl

    path = folder / "script.py"
    path.write_text(script)
    with harness.counted() as calls:
        try:
            names = runpy.run_path(str(path))
        finally:
            prefcore.trl.disable()
    log = [
        {key: value for key, value in entry.items() if key.startswith(SAME)}
        for entry in names["trainer"].state.log_history
    ]
    return log, calls


@pytest.mark.parametrize("script", [DPO, GRPO], ids=["DPO", "GRPO"])
def test_two_lines_change_no_metric(harness, folder, script):
    expected, calls = log_of(harness, folder, script)
    assert not calls
    found, calls = log_of(harness, folder, TWO_LINES + script)
    assert calls["linear_logprobs"]
    compare(harness, found, expected)


@pytest.mark.parametrize("script", [DPO, GRPO], ids=["DPO", "GRPO"])
def test_another_import_changes_no_metric(harness, folder, script):
    expected, _ = log_of(harness, folder, script)
    trainer = "DPOTrainer" if script is DPO else "GRPOTrainer"
    swapped = script.replace(f", {trainer}\n", f"\nfrom prefcore.trl import {trainer}\n")
    assert swapped != script
    found, calls = log_of(harness, folder, swapped)
    assert calls["linear_logprobs"]
    compare(harness, found, expected)


def compare(harness, found, expected):
    assert len(found) == len(expected) > 2
    bound = torch.finfo(torch.float32).eps * harness.roundings(64, steps=len(expected))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=bound, abs=bound), key
