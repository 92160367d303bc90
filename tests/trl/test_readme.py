"""Each snippet of README's "Use it in your trainer" runs alone, and is short."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
SECTION = re.search(r"^## Use it in your trainer$.*?(?=^## )", README.read_text(), re.M | re.S).group()
SNIPPETS = {
    re.search(r"from (prefcore[\w.]* import \w+)|import (prefcore[\w.]*)", snippet).group(): snippet
    for snippet in re.findall(r"^```python\n(.*?)^```$", SECTION, re.M | re.S)
}
# tests/adapters runs those.
HERE = {name: snippet for name, snippet in SNIPPETS.items() if "adapters" not in name}


@pytest.fixture
def yours(harness, tmp_path, monkeypatch):
    """What the section takes for granted."""
    from transformers import TrainingArguments

    from prefcore.data import PairDataset

    monkeypatch.chdir(tmp_path)
    # README says that a machine without a GPU wants use_cpu=True: bfloat16, TRL's default, is then not refused.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    tokens = lambda *shape: torch.randint(6, harness.VOCABULARY, shape, generator=generator)
    input_ids = tokens(2, 9)
    return {
        # TRL loads the reference from where the model came from.
        "model": harness.with_reference(harness.make_model(), harness.save_reference(tmp_path / "model")),
        "tokenizer": harness.make_tokenizer(),
        "preferences": harness.preferences(),
        "prompts": harness.prompts(),
        "reward": lambda completions, **_: [float(len(text)) for text in completions],
        "weight": draw(40, 16).requires_grad_(),
        "ref_weight": draw(40, 16),
        "hidden": draw(4, 7, 16).requires_grad_(),
        "ref_hidden": draw(4, 7, 16),
        "targets": torch.randint(40, (4, 7), generator=generator),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(torch.arange(9) < 4, -100),
        "token_pairs": PairDataset([([9, 8, 7], [10, 11, 1], [12, 1]), ([8, 7], [13, 1], [14, 15, 1])]),
        "arguments": TrainingArguments("output", max_steps=2, report_to=[], use_cpu=True, save_strategy="no"),
    }


@pytest.mark.parametrize("name", HERE)
def test_a_snippet_for_trainers_runs_and_has_under_ten_lines(yours, name):
    import prefcore.trl

    snippet = SNIPPETS[name]
    assert len(snippet.strip().splitlines()) < 10
    before = [p.detach().clone() for p in yours["model"].parameters()]
    try:
        exec(compile(snippet, f"README.md, {name}", "exec"), yours)
    finally:
        prefcore.trl.disable()
    if "trainer" in yours:
        assert yours["trainer"].state.global_step > 0
        # PEFT trains its own parameters beside the model's.
        trained = [p for p in yours["trainer"].model.parameters() if p.requires_grad]
        moved = any(not torch.equal(old, new) for old, new in zip(before, yours["model"].parameters(), strict=False))
        assert moved or len(trained) < len(before)
    else:
        leaves = [yours["weight"], *yours["model"].parameters()]
        assert any(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)
