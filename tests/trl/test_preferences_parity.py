"""TRL's preference trainers with prefcore and without: the losses, every metric and every gradient of a short run.

The grids cover: every loss type, every value of each option once, and the pairs of options that meet in one tensor.
"""

import inspect
import re
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("trl", reason="TRL's own trainers are needed: the extra trl")
if not version("trl").startswith("1.16."):
    pytest.skip("the trainers compared here are those of TRL 1.16", allow_module_level=True)

from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.bema_for_ref_model import DPOTrainer as BEMADPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.fixture(autouse=True)
def no_reference_from_another_run(monkeypatch, tmp_path):
    """Precomputed log-probs are cached by model and data: the second run would read those of the first."""
    from datasets import Dataset

    files = iter(range(1000))
    monkeypatch.setattr(Dataset, "_get_cache_file_path", lambda self, _: str(tmp_path / f"{next(files)}.arrow"))


# What a cell says beside options of the trainer's configuration.
OWN = ("kind", "adapter", "data", "dtype", "steps", "trainer", "evaluate")


def compare(harness, tmp_path, config, trainer, data, cell, op, *, reference=False):
    """``cell``: options of the configuration, and ``kind`` (the model's), ``adapter``, ``dtype``, ``data`` …"""
    about = {name: cell[name] for name in OWN if name in cell}
    options = {name: value for name, value in cell.items() if name not in OWN}
    kind, adapter = about.get("kind", "llama"), about.get("adapter")

    def maker(dtype, **changed):
        def make():
            model, given = harness.make_model(kind, dtype=dtype), {}
            if adapter == "new":
                given["peft_config"] = harness.lora(init_lora_weights=False)
            elif adapter == "trained":
                model = harness.with_adapter(model)
            elif adapter == "prompt":
                given["peft_config"] = prompt_tuning()
            elif reference:
                given["ref_model"] = harness.make_model(kind, seed=1, dtype=dtype)
            dataset = about.get("data", data)()
            if about.get("evaluate"):
                given["eval_dataset"] = about.get("data", data)(4)
            arguments = harness.arguments(config, tmp_path, **{**options, **changed})
            return about.get("trainer", trainer)(
                model=model, args=arguments, train_dataset=dataset, processing_class=harness.make_tokenizer(), **given
            )

        return make

    ours, theirs = harness.both(maker(about.get("dtype", torch.float32)), op)
    if options.get("bf16") or "dtype" in about:
        truth = harness.run(maker(torch.float32, bf16=False))
        harness.assert_no_worse(ours, theirs, truth)
    else:
        harness.assert_same(ours, theirs)
    return ours


def prompt_tuning():
    from peft import PromptTuningConfig

    return PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")


ALPHA = {"f_divergence_type": "alpha_divergence"}
DPO = {
    "sigmoid": {},
    "sigmoid, an adapter": {"adapter": "new", "ld_alpha": 0.5},
    "sigmoid, a trained adapter": {"adapter": "trained"},
    "sigmoid, prompt tuning": {"adapter": "prompt", "use_weighting": True},
    "sigmoid, weighted, capped": {"use_weighting": True, "kind": "softcap"},
    "sigmoid, smoothed, checkpointing": {"label_smoothing": 0.2, "gradient_checkpointing": True},
    "sigmoid, smoothed, reentrant": {
        "label_smoothing": 0.1, "adapter": "new", "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "sigmoid, a synchronised reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3},
    "sigmoid, a moving average as reference": {"trainer": BEMADPOTrainer},
    "sigmoid, truncated, padded to a multiple": {"max_length": 7, "pad_to_multiple_of": 8},
    "sigmoid, truncated from the left": {"max_length": 6, "truncation_mode": "keep_end"},
    "sigmoid, padding-free": {"padding_free": True},
    "sigmoid, evaluated": {"evaluate": True, "eval_strategy": "steps", "eval_steps": 1},
    "hinge, forward KL, capped": {"loss_type": "hinge", "f_divergence_type": "forward_kl", "kind": "softcap"},
    "ipo, JS, tied, accumulated": {
        "loss_type": "ipo", "f_divergence_type": "js_divergence", "kind": "tied", "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "exo_pair, smoothed, scaled": {"loss_type": "exo_pair", "label_smoothing": 0.1, "kind": "scale"},
    "nca_pair, length-desensitised, divided": {"loss_type": "nca_pair", "ld_alpha": 0.5, "kind": "divided"},
    "robust, smoothed, alpha, weighted": {
        "loss_type": "robust", "label_smoothing": 0.3, **ALPHA, "f_alpha_divergence_coef": 0.5, "use_weighting": True
    },
    "bco_pair, precomputed": {"loss_type": "bco_pair", "precompute_ref_log_probs": True},
    "sppo_hard, bias, no tail": {"loss_type": "sppo_hard", "kind": "bias", "ld_alpha": 0.0},
    "aot, smoothed, accumulated": {"loss_type": "aot", "label_smoothing": 0.1, "gradient_accumulation_steps": 2},
    "aot_unpaired, whole tail": {"loss_type": "aot_unpaired", "label_smoothing": 0.2, "ld_alpha": 1.0},
    "apo_zero, weighted, capped adapter": {
        "loss_type": "apo_zero", "use_weighting": True, "kind": "softcap", "adapter": "new"
    },
    "apo_down, experts": {"loss_type": "apo_down", "kind": "moe"},
    "discopop, alpha of 1": {"loss_type": "discopop", **ALPHA, "f_alpha_divergence_coef": 1.0, "discopop_tau": 0.5},
    "discopop, alpha of 2, adapter": {
        "loss_type": "discopop", **ALPHA, "f_alpha_divergence_coef": 2.0, "adapter": "new", "discopop_tau": 0.5
    },
    "sft": {"loss_type": "sft"},
    "sigmoid_norm, forward KL, shared lengths": {
        "loss_type": "sigmoid_norm", "f_divergence_type": "forward_kl", "ld_alpha": 0.3, "beta": 0.01
    },
    "the mixture of MPO, adapter, precomputed, experts": {
        "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "adapter": "new",
        "precompute_ref_log_probs": True, "kind": "moe",
    },
    "sigmoid and sft, length-desensitised, scaled": {
        "loss_type": ["sigmoid", "sft"], "ld_alpha": 0.7, "kind": "scale"
    },
    "sigmoid and ipo, weighted, tied": {"loss_type": ["sigmoid", "ipo"], "use_weighting": True, "kind": "tied"},
    "bf16 autocast": {"bf16": True, "use_weighting": True},
    "bf16 autocast, adapter, capped": {"bf16": True, "adapter": "new", "kind": "softcap"},
    "bf16 weights, precomputed": {"dtype": torch.bfloat16, "precompute_ref_log_probs": True},
}  # fmt: skip


@pytest.mark.parametrize("name", DPO)
def test_dpo_trains_alike(name, harness, tmp_path):
    compare(harness, tmp_path, DPOConfig, DPOTrainer, harness.preferences, DPO[name], "linear_logprobs", reference=True)


def test_dpo_of_conversations_trains_alike_with_a_reference_loaded_by_name(harness, tmp_path):
    folder = harness.save_reference(tmp_path / "reference")

    def make():
        return DPOTrainer(
            model=harness.with_reference(harness.make_model(), folder),
            args=harness.arguments(DPOConfig, tmp_path),
            train_dataset=harness.preferences(chat=True),
            processing_class=harness.make_tokenizer(),
        )

    harness.assert_same(*harness.both(make, "linear_logprobs"))


KTO = {
    "kto": {},
    "kto, weighted, capped": {"desirable_weight": 1.5, "undesirable_weight": 0.7, "kind": "softcap"},
    "kto, adapter, accumulated": {
        "adapter": "new", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2
    },
    "kto, a trained adapter, scaled": {"adapter": "trained", "kind": "scale"},
    "kto, precomputed": {"precompute_ref_log_probs": True, "kind": "tied"},
    "kto, a synchronised reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3},
    "kto, experts, checkpointing": {"kind": "moe", "gradient_checkpointing": True},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"},
    "apo_zero_unpaired, adapter, divided, precomputed": {
        "loss_type": "apo_zero_unpaired", "adapter": "new", "kind": "divided", "precompute_ref_log_probs": True
    },
    "apo_zero_unpaired, truncated": {"loss_type": "apo_zero_unpaired", "max_length": 6, "beta": 0.5},
    "bf16 autocast": {"bf16": True},
}  # fmt: skip


@pytest.mark.parametrize("name", KTO)
def test_kto_trains_alike(name, harness, tmp_path):
    compare(harness, tmp_path, KTOConfig, KTOTrainer, harness.unpaired, KTO[name], "linear_logprobs", reference=True)


CPO = {
    "sigmoid, smoothed": {"label_smoothing": 0.1},
    "hinge, capped": {"loss_type": "hinge", "kind": "softcap"},
    "ipo, adapter": {"loss_type": "ipo", "adapter": "new"},
    "simpo, scaled": {"loss_type": "simpo", "simpo_gamma": 0.3, "cpo_alpha": 0.0, "kind": "scale"},
    "simpo and a likelihood, accumulated": {
        "loss_type": "simpo", "cpo_alpha": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2
    },
    "alphapo": {"loss_type": "alphapo", "alpha": 0.1},
    "sigmoid, experts": {"kind": "moe"},
    "bf16 weights": {"dtype": torch.bfloat16},
}  # fmt: skip


@pytest.mark.parametrize("name", CPO)
def test_cpo_trains_alike(name, harness, tmp_path):
    compare(harness, tmp_path, CPOConfig, CPOTrainer, harness.preferences, CPO[name], "logprobs")


ORPO = {
    "plain": {},
    "capped, adapter": {"kind": "softcap", "adapter": "new"},
    "experts, accumulated": {"kind": "moe", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "bf16 autocast": {"bf16": True},
}


@pytest.mark.parametrize("name", ORPO)
def test_orpo_trains_alike(name, harness, tmp_path):
    compare(harness, tmp_path, ORPOConfig, ORPOTrainer, harness.preferences, ORPO[name], "logprobs")


TPO = {
    "sigmoid, smoothed": {"label_smoothing": 0.1},
    "hinge, capped": {"loss_type": "hinge", "kind": "softcap", "beta": 0.1},
    "ipo, adapter": {"loss_type": "ipo", "adapter": "new", "beta": 0.1},
    "tpo-l, divided, accumulated": {
        "loss_type": "tpo-l", "tpo_l_gamma": 0.3, "kind": "divided", "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "no gold response, truncated, tied": {"tpo_alpha": 0.0, "max_length": 7, "kind": "tied"},
    "a trained adapter, scaled": {"adapter": "trained", "kind": "scale", "gradient_checkpointing": True},
    "bf16 autocast": {"bf16": True},
}  # fmt: skip


@pytest.mark.parametrize("name", TPO)
def test_tpo_trains_alike(name, harness, tmp_path):
    def triples(count=8):
        pairs = harness.preferences(count)
        return pairs.add_column("reference", list(reversed(pairs["chosen"])))

    compare(harness, tmp_path, TPOConfig, TPOTrainer, triples, TPO[name], "logprobs")


# The grids themselves


def used(cells, option, default):
    values = set()
    for cell in cells.values():
        value = cell.get(option, default)
        values.update(value if isinstance(value, list) else [value])
    return values


@pytest.mark.parametrize(("option", "default"), [("loss_type", "sigmoid"), ("f_divergence_type", "reverse_kl")])
def test_every_case_that_dpo_distinguishes_is_in_the_grid(option, default):
    known = set(re.findall(rf'\b{option} == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert len(known) > 3
    assert known == used(DPO, option, default)


@pytest.mark.parametrize(
    ("config", "cells", "option"),
    [
        (DPOConfig, DPO, "truncation_mode"),
        (KTOConfig, KTO, "loss_type"),
        (CPOConfig, CPO, "loss_type"),
        (TPOConfig, TPO, "loss_type"),
    ],
)
def test_every_choice_is_in_the_grid(config, cells, option):
    (about,) = [field for field in config.__dataclass_fields__.values() if field.name == option]
    assert set(about.metadata["choices"]) == used(cells, option, about.default)
