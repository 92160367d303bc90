"""GRPO and RLOO of TRL with prefcore against the same without: losses, all metrics, gradients.

The completions are those of the harness's stub, so both runs train on the same tokens. Each loss type and each value
of each option is in at least one cell; the steps after the first are off-policy, with ratios that are clipped.
"""

import importlib
import re

import pytest
import torch


def reward(completions, **_):
    """Unequal within a group, and without meaning."""
    return [float(sum(map(ord, str(completion))) % 11) for completion in completions]


def shortness(completions, **_):
    return [-0.1 * len(str(completion)) for completion in completions]


@pytest.fixture(scope="module")
def reference(harness, tmp_path_factory):
    """Folders of reference models by kind: these trainers load the reference by the policy's name."""
    saved = {}

    def folder(kind):
        if kind not in saved:
            saved[kind] = harness.save_reference(tmp_path_factory.mktemp(kind), kind)
        return saved[kind]

    return folder


@pytest.fixture
def maker(harness, reference, tmp_path, monkeypatch):
    def trainer(name, kind="llama", *, adapter=None, rewards=reward, dtype=torch.float32, chat=False, **options):
        import trl

        if name == "GRPO":
            options = {"num_generations": 4, "num_iterations": 2, "epsilon": 0.05, **options}
        else:
            options = {"epsilon": 0.4, "learning_rate": 0.005, **options}
        options = {"max_completion_length": 8, "max_steps": 3, **options}

        def make():
            module = importlib.import_module(f"trl.trainer.{name.lower()}_trainer")
            monkeypatch.setattr(module, "VLLMGeneration", harness.StubbedVLLM)
            model = harness.make_model(kind, dtype=dtype)
            if options.get("beta", name == "RLOO") and adapter is None:
                harness.with_reference(model, reference(kind))
            harness.stub_generation(model)
            if adapter == "given":
                model = harness.with_adapter(model)
            return getattr(trl, f"{name}Trainer")(
                model,
                reward_funcs=rewards,
                args=harness.arguments(getattr(trl, f"{name}Config"), tmp_path, **options),
                train_dataset=harness.prompts(chat=chat),
                eval_dataset=harness.prompts(4) if "eval_strategy" in options else None,
                processing_class=harness.make_tokenizer(),
                peft_config=harness.lora() if adapter == "config" else None,
            )

        return make

    return trainer


# The quantiles of the entropies are chosen so that the threshold is not one of the entropies of a group's first tokens,
# which are equal but for their rounding.
GRPO = {
    "grpo": {"loss_type": "grpo", "beta": 0.1, "epsilon_high": 0.1, "scale_rewards": "group"},
    "grpo-sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1, "delta": 1.2},
    "grpo-bare": {"loss_type": "grpo", "num_iterations": 1, "use_bias_correction_kl": False, "beta": 0.1},
    "dapo": {"loss_type": "dapo", "gradient_accumulation_steps": 2, "temperature": 0.7, "epsilon_high": 0.28},
    "dapo-entropy-quantile": {"loss_type": "dapo", "top_entropy_quantile": 0.2, "kind": "scale"},
    "dapo-entropy-bonus": {"loss_type": "dapo", "entropy_coef": 0.3, "temperature": 1.3, "kind": "softcap"},
    "dapo-adaptive-entropy": {
        "loss_type": "dapo",
        "use_adaptive_entropy": True,
        "entropy_target": 100.0,
        "entropy_coef": 0.2,
        "top_entropy_quantile": 0.3,
    },
    "dr_grpo": {"loss_type": "dr_grpo", "delta": 1.1, "scale_rewards": "none", "steps_per_generation": 2},
    "bnpo": {"loss_type": "bnpo", "mask_truncated_completions": True, "scale_rewards": "batch", "kind": "softcap"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.05, "kind": "tied"},
    "sapo": {"loss_type": "sapo", "kind": "scale", "temperature": 0.9},
    "sapo-sequence": {"loss_type": "sapo", "importance_sampling_level": "sequence", "kind": "divided"},
    "vespo": {"loss_type": "vespo", "kind": "bias", "beta": 0.1},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "luspo-token": {"loss_type": "luspo", "beta": 0.2, "kind": "divided", "temperature": 1.5},
    "off-policy-mask": {"off_policy_mask_threshold": 0.01, "loss_type": "grpo"},
    "lora": {"adapter": "config", "loss_type": "grpo", "beta": 0.1},
    "lora-given": {"adapter": "given", "beta": 0.1, "gradient_checkpointing": True, "temperature": 0.8},
    "moe": {"kind": "moe", "router_aux_loss_coef": 0.1, "gradient_accumulation_steps": 2},
    "two-rewards": {
        "rewards": [reward, shortness],
        "reward_weights": [1.0, 0.5],
        "multi_objective_aggregation": "normalize_then_sum",
        "chat": True,
    },
    "synced-reference": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "loss_type": "grpo"},
    **{
        f"vllm-{mode}": {"use_vllm": True, "vllm_importance_sampling_mode": mode, "loss_type": loss, **options}
        for mode, loss, options in (
            ("token_truncate", "vespo", {}),
            ("token_mask", "dapo", {"vllm_importance_sampling_clip_min": 0.3, "epsilon": 0.5}),
            ("sequence_truncate", "grpo", {"off_policy_mask_threshold": 0.4}),
            ("sequence_mask", "cispo", {"num_iterations": 1}),
        )
    },
    "vllm-uncorrected": {"use_vllm": True, "vllm_importance_sampling_correction": False},
}

RLOO = {
    "plain": {"beta": 0.0},
    "reference": {"beta": 0.1, "num_iterations": 2, "epsilon_high": 0.5},
    "normalized": {"normalize_advantages": True, "temperature": 0.7, "kind": "scale", "beta": 0.0},
    "clipped-rewards": {"reward_clip_range": (-1.0, 3.0), "gradient_accumulation_steps": 2, "kind": "softcap"},
    "truncated": {"mask_truncated_completions": True, "steps_per_generation": 2, "kind": "bias", "beta": 0.1},
    "lora": {"adapter": "config", "beta": 0.2, "temperature": 1.4},
    "lora-given": {"adapter": "given", "beta": 0.2, "gradient_checkpointing": True},
    "moe": {"kind": "moe", "router_aux_loss_coef": 0.1, "beta": 0.0, "gradient_accumulation_steps": 2},
    "two-rewards": {"rewards": [reward, shortness], "reward_weights": [1.0, 0.5], "num_generations": 4, "chat": True},
    "synced-reference": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "vllm": {"use_vllm": True, "kind": "divided"},
}


@pytest.mark.parametrize("cell", GRPO)
def test_grpo_trains_alike(harness, maker, cell):
    ours, theirs = harness.both(maker("GRPO", **GRPO[cell]), "linear_logprobs")
    harness.assert_same(ours, theirs)


@pytest.mark.parametrize("cell", RLOO)
def test_rloo_trains_alike(harness, maker, cell):
    ours, theirs = harness.both(maker("RLOO", **RLOO[cell]), "linear_logprobs")
    harness.assert_same(ours, theirs)


def test_the_cells_hold_every_loss_type_and_reach_the_clipping(harness, maker):
    from trl import GRPOConfig

    documented = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"].partition(". ")[2].partition(". ")[0]
    mentioned = set(re.findall(r"'(\w+)'", documented))
    assert mentioned == {cell.get("loss_type", "dapo") for cell in GRPO.values()}
    ran = harness.run(maker("GRPO", **GRPO["grpo"]))
    assert 0 < max(m.get("clip_ratio/region_mean", 0) for m in ran.metrics) < 1


@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_completions_that_are_all_masked_train_alike(harness, maker, trainer):
    """Not one label in the batch: the loss is 0 and still has gradients."""
    make = maker(trainer, mask_truncated_completions=True, max_completion_length=1, beta=0.0)

    def cut():
        made = make()
        made.model.generate = lambda input_ids, **_: torch.cat([input_ids, torch.full_like(input_ids[:, :1], 9)], 1)
        return made

    ours, theirs = harness.both(cut, "linear_logprobs", steps=1)
    harness.assert_same(ours, theirs, trivial=True)
    assert set(ours.losses) == {0.0}


BF16 = {
    "autocast": ("GRPO", {"bf16": True, "loss_type": "grpo", "beta": 0.1, "adapter": "config"}),
    "autocast-softcap": ("GRPO", {"bf16": True, "kind": "softcap", "entropy_coef": 0.1, "temperature": 0.8}),
    "float32-head": ("GRPO", {"bf16": True, "cast_lm_head_to_fp32": True, "loss_type": "cispo", "epsilon_high": 5.0}),
    "weights": ("GRPO", {"dtype": torch.bfloat16, "loss_type": "dr_grpo", "kind": "scale"}),
    "weights-float32-head": ("GRPO", {"dtype": torch.bfloat16, "loss_type": "sapo", "cast_lm_head_to_fp32": True}),
    "rloo": ("RLOO", {"bf16": True, "beta": 0.0}),
}


@pytest.mark.parametrize("cell", BF16)
def test_in_bf16_it_is_as_near_to_float32_as_trl(harness, maker, cell):
    trainer, options = BF16[cell]
    # Clipping and its metrics jump where a ratio is at the bound: none is near these.
    options = {"epsilon": 10.0, "learning_rate": 0.01, "max_steps": 2, **options}
    exact = {**options, "bf16": False, "dtype": torch.float32}
    ours, theirs = harness.both(maker(trainer, **options), "linear_logprobs")
    harness.assert_no_worse(ours, theirs, harness.run(maker(trainer, **exact)))
