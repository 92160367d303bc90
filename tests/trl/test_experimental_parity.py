"""TRL's experimental trainers with prefcore against the same without: losses, all metrics, gradients.

Those that call a function that prefcore replaces; a test holds the list to TRL's sources. What needs a server here gets
a stub of it: vLLM's generation and scores, and the rollouts of async GRPO, whose attention over a tree of samples, a
kernel from the Hub, is computed by torch.
"""

import importlib
import queue
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# The modules of TRL that call the functions, and the tests that drive them.
CALLERS = {
    "trainer/dpo_trainer.py": "test_preferences_parity.py",
    "trainer/kto_trainer.py": "test_preferences_parity.py",
    "trainer/grpo_trainer.py": "test_policy_parity.py",
    "trainer/rloo_trainer.py": "test_policy_parity.py",
    "trainer/sft_trainer.py": "test_distillation_parity.py",
    "trainer/distillation_trainer.py": "test_distillation_parity.py",
    "experimental/a2po/a2po_trainer.py": "test_experimental_parity.py",
    "experimental/async_grpo/async_grpo_trainer.py": "test_experimental_parity.py",
    "experimental/cpo/cpo_trainer.py": "test_preferences_parity.py",
    "experimental/gkd/gkd_trainer.py": "test_experimental_parity.py",
    "experimental/gold/gold_trainer.py": "test_experimental_parity.py",
    "experimental/iw_opd/iw_opd_trainer.py": "test_experimental_parity.py",
    "experimental/orpo/orpo_trainer.py": "test_preferences_parity.py",
    "experimental/sdft/loss_utils.py": "test_experimental_parity.py",
    "experimental/sdft/sdft_trainer.py": "test_experimental_parity.py",
    "experimental/sdpo/loss_utils.py": "test_experimental_parity.py",
    "experimental/sdpo/sdpo_trainer.py": "test_experimental_parity.py",
    "experimental/tpo/tpo_trainer.py": "test_preferences_parity.py",
}


def test_every_caller_in_trl_is_driven_by_a_test(harness):
    import trl

    root = Path(trl.__file__).parent
    call = re.compile(
        r"(ChunkedLogProbFunction|ChunkedDivergenceFunction|selective_log_softmax(_and_entropy)?|entropy_from_logits"
        r"|add_fused_lm_head|generalized_jsd_loss|compute_full_logit_self_distillation_loss)(\.apply)?\("
    )
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if call.search(path.read_text())}
    assert {name for name in found if "_trainer" in name or name.startswith("experimental")} == set(CALLERS)


def reward(completions, **_):
    return [float(sum(map(ord, str(completion))) % 11) for completion in completions]


def success(completions, **_):
    return [float(sum(map(ord, str(completion))) % 3 == 0) for completion in completions]


@pytest.fixture
def maker(harness, tmp_path):
    def trainer(module, name, kind="llama", *, data, adapter=None, more=None, referred=False, **options):
        home = importlib.import_module(f"trl.experimental.{module}")
        folder = harness.save_reference(tmp_path / "reference", kind) if referred and adapter is None else None

        def make():
            model = harness.make_model(kind)
            if folder is not None:
                harness.with_reference(model, folder)
            harness.stub_generation(model)
            return getattr(home, f"{name}Trainer")(
                model,
                args=harness.arguments(getattr(home, f"{name}Config"), tmp_path, **options),
                train_dataset=data,
                processing_class=harness.make_tokenizer(),
                **({"peft_config": harness.lora()} if adapter == "config" else {}),
                **(more() if more else {}),
            )

        return make

    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"beta1": 0.5, "beta2": 0.1},
        {"beta2": 0.01, "filter_all_incorrect": False, "kind": "softcap", "gradient_accumulation_steps": 2},
    ],
    ids=["plain", "accumulated"],
)
def test_a2po_trains_alike(harness, maker, options):
    data = harness.prompts()
    more = lambda: {"reward_funcs": success}
    make = maker("a2po", "A2PO", data=data, more=more, num_value_samples=3, max_completion_length=8, **options)
    ours, theirs = harness.both(make, "logprobs")
    harness.assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo", "num_iterations": 2},
        {"num_iterations": 2, "top_entropy_quantile": 0.2, "temperature": 0.8, "kind": "softcap"},
        {"mask_truncated_completions": True, "gradient_accumulation_steps": 2, "adapter": "config", "beta": 0.1},
    ],
    ids=["plain", "entropy-quantile", "lora"],
)
def test_gmpo_trains_alike(harness, maker, options):
    more = lambda: {"reward_funcs": reward}
    settings = {"num_generations": 4, "max_completion_length": 8, "max_steps": 3, **options}
    make = maker("gmpo", "GMPO", data=harness.prompts(), more=more, **settings)
    ours, theirs = harness.both(make, "linear_logprobs")
    harness.assert_same(ours, theirs)


class Scores:
    """Stands for the client of a vLLM server that scores tokens: log-probabilities at random, the same in every run."""

    def __init__(self, **_):
        self.generator = torch.Generator().manual_seed(5)

    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs, **_):
        lengths = [len(ids) - start for ids, start in zip(sequences, prompt_lengths, strict=True)]
        draw = lambda n, k: (-2 - 2 * torch.rand(n, k, generator=self.generator)).tolist()
        return {
            "actual_logprobs": [draw(n, 1) for n in lengths],
            "logprobs": [[sorted(row, reverse=True) for row in draw(n, top_logprobs)] for n in lengths],
            "logprob_token_ids": [
                [torch.randperm(40, generator=self.generator)[:top_logprobs].tolist() for _ in range(n)]
                for n in lengths
            ],
        }


@pytest.fixture
def servers(harness, monkeypatch):
    import trl.generation.vllm_client
    import trl.generation.vllm_generation

    monkeypatch.setattr(trl.generation.vllm_generation, "VLLMGeneration", harness.StubbedVLLM)
    monkeypatch.setattr(trl.generation.vllm_client, "VLLMClient", Scores)


SERVED = {"use_vllm": True, "use_teacher_server": True, "vllm_mode": "server", "teacher_model_kind": "live"}
# Every mode of the two self-distillation trainers that calls a replaced function.
SELF_DISTILLATION = {
    "sampled": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    "sampled-live": {
        "distillation_mode": "sampled_token",
        "distillation_alpha": 1.0,
        "teacher_model_kind": "live",
        "gradient_accumulation_steps": 2,
        "kind": "softcap",
    },
    "topk-off-policy": {"distillation_mode": "topk_logits", "distillation_topk": 5, "num_iterations": 2},
    "topk-tail": {
        "distillation_mode": "topk_logits",
        "distillation_topk": 7,
        "distillation_add_tail": True,
        "distillation_is_clip": 1.1,
        "num_iterations": 2,
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.5,
        "kind": "scale",
    },
    "full-off-policy": {"distillation_mode": "full_logits", "distillation_alpha": 0.3, "steps_per_generation": 2},
    "lora": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0, "adapter": "config"},
    "served-sampled": {**SERVED, "distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    "served-topk": {**SERVED, "distillation_mode": "topk_logits", "distillation_topk": 3, "num_iterations": 2},
}


def _reached(options):
    # The divergence of whole logits; log-probabilities of the tokens for the ratio to the policy that sampled them.
    return ("logprobs", "divergence") if options.get("distillation_mode") == "full_logits" else ("logprobs",)


@pytest.mark.parametrize("cell", SELF_DISTILLATION)
def test_sdft_trains_alike(harness, maker, servers, cell):
    options = {"num_generations": 2, "max_completion_length": 8, "max_steps": 3, **SELF_DISTILLATION[cell]}
    data = harness.completions(chat=True)
    data = harness.prompts(chat=True).add_column("privileged_context", [m[0]["content"] for m in data["completion"]])
    make = maker("sdft", "SDFT", data=data, referred=True, num_loss_tokens_to_skip=1, **options)
    ours, theirs = harness.both(make, *_reached(options))
    harness.assert_same(ours, theirs)


# Its losses are SDFT's, in a copy of its own.
SDPO = {
    **{cell: SELF_DISTILLATION[cell] for cell in ("sampled", "topk-off-policy", "full-off-policy", "served-topk")},
    "policy-grpo": {"distillation_weight": 0.0, "loss_type": "grpo", "num_iterations": 2},
    "policy-bnpo": {"distillation_weight": 0.0, "loss_type": "bnpo", "importance_sampling_level": "sequence"},
    "policy-dr_grpo": {
        "distillation_weight": 0.0,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "epsilon_high": 0.4,
    },
    "mixed-dapo": {"distillation_weight": 0.4, "loss_type": "dapo", "scale_rewards": "batch", "num_iterations": 2},
}


@pytest.mark.parametrize("cell", SDPO)
def test_sdpo_trains_alike(harness, maker, servers, cell):
    options = {"num_generations": 4, "max_completion_length": 8, "max_steps": 3, **SDPO[cell]}
    options = {"success_reward_threshold": 5.0, "dont_reprompt_on_self_success": False, **options}
    more = lambda: {"reward_funcs": reward}
    make = maker("sdpo", "SDPO", data=harness.prompts(chat=True), referred=True, more=more, **options)
    ours, theirs = harness.both(make, *_reached(options))
    harness.assert_same(ours, theirs)


JSD = {
    "gkd-forward": ("gkd", "GKD", {"beta": 0.0, "lmbda": 1.0}),
    "gkd": ("gkd", "GKD", {"beta": 0.5, "lmbda": 0.0, "kind": "softcap", "gradient_accumulation_steps": 2}),
    "gkd-teacher-samples": ("gkd", "GKD", {"beta": 1.0, "lmbda": 0.0, "seq_kd": True, "kind": "tied"}),
    "gkd-lora": ("gkd", "GKD", {"beta": 0.2, "adapter": "config"}),
    "gold-forward": ("gold", "GOLD", {"beta": 0.0, "lmbda": 0.0, "kind": "scale"}),
    "gold": ("gold", "GOLD", {"beta": 0.3, "lmbda": 1.0, "temperature": 1.5, "gradient_accumulation_steps": 2}),
    "gold-reverse": ("gold", "GOLD", {"beta": 1.0, "lmbda": 0.0, "temperature": 0.7}),
    "iw_opd-forward": ("iw_opd", "IWOPD", {"beta": 0.0, "lmbda": 1.0}),
    "iw_opd": ("iw_opd", "IWOPD", {"beta": 0.6, "lmbda": 0.0, "temperature": 1.3, "gradient_accumulation_steps": 2}),
    "iw_opd-reverse": ("iw_opd", "IWOPD", {"beta": 1.0, "lmbda": 1.0, "kind": "softcap"}),
}


@pytest.mark.parametrize("cell", JSD)
def test_a_divergence_of_whole_logits_trains_alike(harness, maker, tmp_path, cell):
    module, name, options = JSD[cell]
    own = {
        "gkd": {"max_new_tokens": 8},
        "gold": {"max_completion_length": 8, "use_extended_uld": False},  # that one wants a tokenizer of bytes
        "iw_opd": {"max_completion_length": 8, "distillation_objective": "jsd", "loss_top_k": 0},
    }[module]
    folder = harness.save_reference(tmp_path / "teacher", "bias")

    def more():
        teacher = harness.with_reference(harness.make_model("bias", seed=1), folder)
        harness.stub_generation(teacher)
        return {"teacher_model": teacher}

    data = harness.conversations(turns=1)
    make = maker(module, name, data=data, more=more, referred=True, max_length=40, **own, **options)
    ours, theirs = harness.both(make, "divergence")
    harness.assert_same(ours, theirs)


def test_a_divergence_of_whole_logits_in_bf16_is_as_near_to_float32_as_trl(harness, maker, tmp_path):
    def make(**options):
        more = lambda: {"teacher_model": harness.make_model("bias", seed=1)}
        data = harness.conversations(turns=1)
        return maker("gkd", "GKD", data=data, more=more, max_length=40, lmbda=0.0, beta=0.3, **options)

    ours, theirs = harness.both(make(bf16=True), "divergence")
    harness.assert_no_worse(ours, theirs, harness.run(make()))


def test_self_distillation_in_bf16_is_as_near_to_float32_as_trl(harness, maker):
    def make(**options):
        data = harness.prompts(chat=True)
        data = data.add_column("privileged_context", ["w1 w2"] * len(data))
        settings = {"num_generations": 2, "max_completion_length": 8, "distillation_alpha": 1.0, "kind": "softcap"}
        mode = {"distillation_mode": "sampled_token", **settings, **options}
        return maker("sdft", "SDFT", data=data, referred=True, **mode)

    ours, theirs = harness.both(make(bf16=True), "logprobs")
    harness.assert_no_worse(ours, theirs, harness.run(make()))


def _varlen_attention(query, key, value, starts_q, starts_k, *_, softmax_scale, window_size, softcap=None, **__):
    """What the kernel computes, segment by segment: queries are the last positions of their keys."""
    out = torch.zeros_like(query)
    groups = query.shape[1] // key.shape[1]
    for i in range(len(starts_q) - 1):
        q = query[starts_q[i] : starts_q[i + 1]]
        k, v = (x[starts_k[i] : starts_k[i + 1]].repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        behind = len(k) - len(q) + torch.arange(len(q))[:, None] - torch.arange(len(k))
        hidden = (behind < 0) | ((behind > window_size[0]) & (window_size[0] >= 0))
        out[starts_q[i] : starts_q[i + 1]] = torch.einsum(
            "hqk,khd->qhd", scores.masked_fill(hidden, -1e30).softmax(-1), v
        )
    return out


class Rollouts:
    """A worker whose rollouts are all there from the start: groups of four that share a prompt."""

    def __init__(self, harness, count=120):
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        generator = torch.Generator().manual_seed(3)
        draw = lambda n: torch.randint(6, harness.VOCABULARY, (n,), generator=generator)
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        for group in range(count // 4):
            prompt = draw(3)
            for i in range(4):
                answer = draw(2 + (group + i) % 4)
                mask = torch.cat([torch.zeros(3), torch.ones(len(answer))])
                self.rollout_buffer.put(
                    RolloutSample(
                        prompt=[],
                        completion=[],
                        input_ids=torch.cat([prompt, answer]).numpy(),
                        completion_mask=mask.long().numpy(),
                        old_log_probs=(mask * (-3.6 - torch.rand(len(mask), generator=generator))).numpy(),
                        advantage=float(i) - 1.5,
                        model_version=0,
                        group_id=group,
                        metrics={"reward": float(i)},
                    )
                )

    def start(self):
        pass

    stop = start

    def update_model_version(self, model_version):
        pass

    def check_health(self, stale_after_s):
        raise RuntimeError("all rollouts are consumed")


class NoTransfer:
    def init_weight_transfer(self):
        pass

    pause = resume = destroy = init_weight_transfer

    def send_weights(self, iterator):
        for _ in iterator:
            pass


@pytest.mark.parametrize(
    "options",
    [
        {"token_budget": 0},
        {"token_budget": 40, "temperature": 0.7, "epsilon_high": 0.5, "gradient_accumulation_steps": 2},
        {"token_budget": 0, "kind": "scale", "epsilon": 0.6},
        {"token_budget": 0, "kind": "softcap", "adapter": "config"},
        {"token_budget": 30, "kind": "moe"},
    ],
    ids=["plain", "accumulated", "scale", "lora-softcap", "moe"],
)
def test_async_grpo_trains_alike(harness, tmp_path, monkeypatch, options):
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing

    # To report how much of the device's peak is used, they ask CUDA for its name, and Mixtral for what it has not.
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    monkeypatch.setattr(async_grpo_trainer, "compute_flops_per_token", lambda *_: None)
    monkeypatch.setattr(async_grpo_trainer, "VLLMClient", lambda *_: None)
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=_varlen_attention))
    options = {"kind": "llama", "adapter": None, **options}
    kind, adapter = options.pop("kind"), options.pop("adapter")
    folder = harness.save_reference(tmp_path / "policy", kind, seed=0)

    def make():
        return AsyncGRPOTrainer(
            folder,
            reward_funcs=reward,
            args=harness.arguments(AsyncGRPOConfig, tmp_path, max_staleness=100, **options),
            train_dataset=harness.prompts(),
            processing_class=harness.make_tokenizer(),
            peft_config=harness.lora() if adapter else None,
            rollout_worker=Rollouts(harness),
            weight_transfer=NoTransfer(),
        )

    ours, theirs = harness.both(make, "linear_logprobs")
    harness.assert_same(ours, theirs)
