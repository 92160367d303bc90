"""SFT and distillation of TRL with prefcore against the same without: losses, all metrics, gradients."""

import pytest
import torch


@pytest.fixture
def sft(harness, tmp_path):
    def trainer(kind="llama", *, data="language", adapter=None, dtype=torch.float32, loss=None, chat=False, **options):
        import trl

        def make():
            model = harness.make_model(kind, dtype=dtype)
            if adapter == "given":
                model = harness.with_adapter(model)
            elif adapter == "prompt":
                from peft import PromptTuningConfig, get_peft_model

                virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
                model = get_peft_model(model, virtual)
            return trl.SFTTrainer(
                model,
                args=harness.arguments(trl.SFTConfig, tmp_path, **options),
                train_dataset=getattr(harness, data)(**({"chat": True} if chat else {})),
                eval_dataset=harness.language(4) if "eval_strategy" in options else None,
                processing_class=harness.make_tokenizer(),
                peft_config=harness.lora() if adapter == "config" else None,
                compute_loss_func=loss,
            )

        return make

    return trainer


def _own_loss(outputs, labels, num_items_in_batch=None):
    logp = outputs.logits[:, :-1].log_softmax(-1)
    taken = logp.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return -(taken * (labels[:, 1:] != -100)).sum() / num_items_in_batch


SFT = {
    "nll": {"loss_type": "nll", "weight_decay": 0.1},
    "nll-accumulated": {"loss_type": "nll", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "chunked_nll": {"loss_type": "chunked_nll", "kind": "scale"},
    "dft": {"loss_type": "dft", "kind": "tied"},
    "dft-accumulated": {"loss_type": "dft", "gradient_accumulation_steps": 2, "kind": "softcap", "data": "completions"},
    "smoothed": {"label_smoothing_factor": 0.1},
    "smoothed-dft": {"label_smoothing_factor": 0.1, "loss_type": "dft", "kind": "bias"},
    "packed": {"packing": True, "packing_strategy": "bfd", "max_length": 24, "per_device_train_batch_size": 2},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16, "per_device_train_batch_size": 1},
    "padding-free": {"padding_free": True, "max_length": None, "loss_type": "dft", "kind": "divided"},
    "completions": {"data": "completions", "completion_only_loss": True, "chat": True, "kind": "softcap"},
    "prompts-too": {"data": "completions", "completion_only_loss": False, "pad_to_multiple_of": 8},
    "assistant": {"data": "conversations", "assistant_only_loss": True, "kind": "divided"},
    "assistant-packed": {"data": "conversations", "assistant_only_loss": True, "packing": True, "max_length": 40},
    "moe": {"kind": "moe", "loss_type": "nll", "gradient_accumulation_steps": 2},
    "moe-dft": {"kind": "moe", "loss_type": "dft", "router_aux_loss_coef": 0.3, "packing": True, "max_length": 20},
    "moe-without": {"kind": "moe", "router_aux_loss_coef": 0.0},
    "lora": {"adapter": "config", "data": "completions"},
    "lora-given": {"adapter": "given", "loss_type": "dft", "gradient_checkpointing": True},
    "prompt-tuning": {"adapter": "prompt", "data": "completions"},
    "checkpointed": {"gradient_checkpointing": True, "kind": "bias"},
    "own-loss": {"loss": _own_loss, "kind": "scale"},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2, "kind": "tied"},
    "clipped": {"max_grad_norm": 0.5, "loss_type": "dft"},
}


@pytest.mark.parametrize("cell", SFT)
def test_sft_trains_alike(harness, sft, cell):
    ours, theirs = harness.both(sft(**SFT[cell]), "linear_logprobs")
    harness.assert_same(ours, theirs, tokens=128)


def test_the_cells_hold_every_loss_type():
    from trl import SFTConfig

    known = SFTConfig.__dataclass_fields__["loss_type"].metadata["choices"]
    assert set(known) == {cell["loss_type"] for cell in SFT.values() if "loss_type" in cell}


def test_a_batch_without_labels_trains_alike(harness, sft):
    def unlabelled():
        trainer = sft(data="completions")()
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: {
            **(batch := collate(rows)),
            "labels": torch.full_like(batch["labels"], -100),
        }
        return trainer

    ours, theirs = harness.both(unlabelled, "linear_logprobs")
    harness.assert_same(ours, theirs, trivial=True)
    assert set(ours.losses) == {0.0}


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"bf16": True, "kind": "softcap", "loss_type": "dft", "gradient_accumulation_steps": 2},
        {"bf16": True, "adapter": "config", "kind": "scale"},
        {"dtype": torch.bfloat16, "kind": "bias"},
    ],
    ids=["autocast", "autocast-dft-softcap", "autocast-lora", "weights"],
)
def test_sft_in_bf16_is_as_near_to_float32_as_trl(harness, sft, options):
    ours, theirs = harness.both(sft(**options), "linear_logprobs")
    harness.assert_no_worse(ours, theirs, harness.run(sft(**{**options, "bf16": False, "dtype": torch.float32})))


@pytest.fixture
def distillation(harness, tmp_path, monkeypatch):
    def trainer(
        kind="llama", teacher="llama", *, width=16, adapter=None, dtype=torch.float32, teacher_dtype=None, **options
    ):
        import trl

        def make():
            monkeypatch.setattr(trl.trainer.distillation_trainer, "VLLMGeneration", harness.StubbedVLLM)
            monkeypatch.setattr(trl.trainer.distillation_trainer, "is_vllm_available", lambda: True)
            student = harness.make_model(kind, dtype=dtype)
            harness.stub_generation(student)
            return trl.DistillationTrainer(
                student,
                harness.make_model(teacher, seed=1, hidden_size=width, dtype=teacher_dtype or dtype),
                args=harness.arguments(trl.DistillationConfig, tmp_path, max_completion_length=8, **options),
                train_dataset=harness.prompts(chat=True),
                eval_dataset=harness.prompts(4, chat=True) if "eval_strategy" in options else None,
                processing_class=harness.make_tokenizer(),
                peft_config=harness.lora() if adapter == "config" else None,
            )

        return make

    return trainer


DISTILLATION = {
    "forward": {"beta": 0.0},
    "forward-wide-teacher": {"beta": 0.0, "width": 32, "temperature": 1.7},
    "jsd": {"beta": 0.5, "kind": "softcap", "teacher": "scale"},
    "jsd-skewed": {"beta": 0.1, "temperature": 0.6, "kind": "bias", "teacher": "softcap", "width": 24},
    "jsd-skewed-back": {"beta": 0.9, "kind": "tied", "teacher": "bias", "gradient_accumulation_steps": 2},
    "reverse": {"beta": 1.0, "kind": "divided", "teacher": "scale"},
    "reverse-accumulated": {"beta": 1.0, "gradient_accumulation_steps": 2, "temperature": 0.8, "kind": "scale"},
    "lora": {"adapter": "config", "beta": 0.5, "gradient_checkpointing": True},
    "moe": {"kind": "moe", "beta": 0.0},
    "vllm": {"use_vllm": True, "beta": 0.3},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2, "beta": 0.5},
}


@pytest.mark.parametrize("cell", DISTILLATION)
def test_distillation_trains_alike(harness, distillation, cell):
    ours, theirs = harness.both(distillation(**DISTILLATION[cell]), "linear_divergence")
    harness.assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True, "beta": 0.0},
        {"bf16": True, "beta": 0.5, "kind": "softcap"},
        {"dtype": torch.bfloat16, "beta": 1.0},
        {"teacher_dtype": torch.bfloat16, "beta": 0.5},
    ],
    ids=["autocast-forward", "autocast-jsd", "weights-reverse", "teacher-alone"],
)
def test_distillation_in_bf16_is_as_near_to_float32_as_trl(harness, distillation, options):
    exact = {**options, "bf16": False, "dtype": torch.float32, "teacher_dtype": torch.float32}
    ours, theirs = harness.both(distillation(**options), "linear_divergence")
    harness.assert_no_worse(ours, theirs, harness.run(distillation(**exact)))
