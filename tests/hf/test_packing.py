"""Packed batches give every model what it gives one sequence at a time, or are refused."""

import copy
import gc
import itertools
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("transformers")
import transformers
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama

from prefcore.data import pack
from prefcore.hf import attention, find_head, response_logps, score
from prefcore.hf.attention import check, run_packed
from prefcore.hf.scoring import run_backbone, token_logps
from prefcore.testing import assert_no_worse_than

QA_FEEDBACK = Path(__file__).parents[3] / "shared" / "data" / "qa_feedback.jsonl"
VOCABULARY = 61
WINDOW = 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
MIXED = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "granite": (
        "GraniteConfig",
        {"attention_multiplier": 0.2, "logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "output_router_logits": True,
        },
    ),
    "mixtral": ("MixtralConfig", {**EXPERTS, "intermediate_size": 16, "sliding_window": None}),
    "gpt oss": (
        "GptOssConfig",
        {**EXPERTS, "head_dim": 8, "intermediate_size": 16, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "deepseek v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
        },
    ),
}
MOE = ("qwen3 moe", "mixtral", "gpt oss", "deepseek v3")
# The experts' products have no float64; and transformers' eager attention, which softcaps and sinks want, takes its
# softmax in float32 in any case.
IN_DOUBLE = CONFIGS.keys() - {*MOE, "gemma2"}


def make(name, **changes):
    kind, special = CONFIGS[name]
    given = {"vocab_size": VOCABULARY} if name == "gpt2" else SIZES
    config = getattr(transformers, kind)(**{**given, **special, **changes})
    torch.manual_seed(0)
    own = "sdpa" if name in IN_DOUBLE else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=own).eval()
    for parameter in model.parameters():  # far from the initial values, so that nothing is negligible
        nn.init.normal_(parameter, std=0.2)
    return model.to(torch.float64 if name in IN_DOUBLE else torch.float32)


def draw_ids(generator, length):
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def examples(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda length: draw_ids(generator, length)
    return [draw(p) for p, _ in sizes], [[draw(r) for r in group] for _, group in sizes]


def ragged():
    """Groups of 1 to 16, prompts of length 1 and longer than any window, alike beginnings, turns of the other party."""
    prompts, responses = examples(
        [(17, [3, 9, 1, 7, 2, 12, 5, 1, 6, 8, 3, 4, 10, 2, 11, 1]), (1, [6]), (9, [4, 14, 2]), (1, [1, 8]), (6, [5])]
    )
    responses[2][1][:4] = responses[2][0]
    responses[3][1][:1] = responses[3][0]
    masks = [[None] * len(group) for group in responses]
    masks[2][1] = [True] * 3 + [False] * 6 + [True] * 5
    masks[4][0] = [False, True, False, True, False]
    return prompts, responses, masks


def alone(model, prompts, responses, masks=None):
    """Log-probability of each response from the model's own logits, one sequence at a time."""
    for i, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        for j, response in enumerate(group):
            ids = torch.tensor([prompt + response])
            logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logps = logps.gather(1, torch.tensor(response)[:, None])[:, 0]
            if masks is not None and masks[i][j] is not None:
                logps = logps[torch.tensor(masks[i][j])]
            yield logps.sum()


class Truth:
    """Log-probs and parameter gradients of ``alone``, and how large the summands of those gradients are."""

    def __init__(self, model, *case):
        model.zero_grad()
        self.gradients = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
        self.sizes = dict.fromkeys(self.gradients, 0.0)
        logps = []
        for number, logp in enumerate(alone(model, *case)):
            parts = torch.autograd.grad(logp * upstream(number), self._leaves(model), allow_unused=True)
            for name, part in zip(self.gradients, parts, strict=True):
                if part is not None:
                    self.gradients[name] += part
                    self.sizes[name] += float(part.abs().max())
            logps.append(logp.detach())
        self.logps = torch.stack(logps)

    @staticmethod
    def _leaves(model):
        return [p for p in model.parameters() if p.requires_grad]


def upstream(number):
    return (-1) ** number * (1 + number % 3)


def backward(logps):
    (logps * torch.tensor([upstream(i) for i in range(len(logps))], dtype=logps.dtype)).sum().backward()


def assert_equals(model, logps, truth, layers=2):
    # A float64 model computes rotary angles and norms in float32: from the same numbers, with the same roundings,
    # unless float64's own roundings tip one of them.
    single = torch.finfo(torch.float32).eps
    close = (64 if logps.dtype == torch.float32 else 1) * single * float(truth.logps.abs().max())
    torch.testing.assert_close(logps.detach(), truth.logps.to(logps.dtype), rtol=0, atol=close)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # In the backward of those norms the summands come in another order, and each was rounded.
        bound = 16 * layers * single * truth.sizes[name] + 1e-12
        error = float((grad - truth.gradients[name]).abs().max())
        assert error <= bound, (name, error, bound)


@pytest.mark.quick
@pytest.mark.parametrize("name", CONFIGS)
def test_logps_and_gradients_equal_one_sequence_at_a_time(name):
    model = make(name)
    prompts, responses, masks = ragged()
    truth = Truth(model, prompts, responses, masks)
    for sharing in ("share", "pack"):
        model.zero_grad()
        logps = response_logps(model, pack(prompts, responses, masks=masks, sharing=sharing))
        backward(logps)
        assert_equals(model, logps, truth)


@pytest.mark.parametrize("name", ["mistral", "gpt2", "gemma2"])
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 14), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=3
    ),
    seed=st.integers(0, 99),
)
def test_any_layout_equals_one_sequence_at_a_time(name, sizes, seed):
    model = _made_once(name)
    prompts, responses = examples(sizes, seed)
    truth = Truth(model, prompts, responses)
    model.zero_grad()
    logps = response_logps(model, pack(prompts, responses))
    backward(logps)
    assert_equals(model, logps, truth)


_models = {}


def _made_once(name):
    if name not in _models:
        _models[name] = make(name)
    return _models[name]


@pytest.mark.skipif(not QA_FEEDBACK.exists(), reason=f"{QA_FEEDBACK} is not there")
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_the_qa_feedback_sample_equals_one_sequence_at_a_time(name):
    model = make(name, max_position_embeddings=4096, **({"sliding_window": 64} if name == "gemma3" else {}))
    records = [json.loads(line) for line in itertools.islice(QA_FEEDBACK.open(), 40)]
    number = lambda text: [3 + sum(map(ord, word)) % (VOCABULARY - 3) for word in text.split()] or [3]
    records = sorted(records, key=lambda record: len(str(record["prompt"])))[:3]
    prompts = [number(str(record["prompt"])) for record in records]
    responses = [[number(text) for text in record["responses"]] for record in records]
    assert max(map(len, prompts)) > 64
    truth = Truth(model, prompts, responses)
    model.zero_grad()
    logps = response_logps(model, pack(prompts, responses))
    backward(logps)
    assert_equals(model, logps, truth)


def test_a_window_counts_positions_across_the_end_of_the_prompt():
    model = make("mistral")
    prompts, responses = examples([(12, [6, 6])])
    batch = pack(prompts, responses)
    before = token_logps(model, batch)
    # Two layers see 2 * (WINDOW - 1) tokens back. The first response token is predicted at position 11.
    prompts[0][11 - 2 * (WINDOW - 1) - 1] += 1
    assert torch.equal(token_logps(model, pack(prompts, responses)), before)
    prompts[0][11 - 2 * (WINDOW - 1)] += 1
    changed = token_logps(model, pack(prompts, responses)) != before
    assert changed.tolist() == ([True] + [False] * 5) * 2


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_attention_dropout_is_random_in_training_and_absent_in_evaluation(name):
    model = make(name, attention_dropout=0.3).train()
    prompts, responses, masks = ragged()
    batch = pack(prompts, responses, masks=masks)
    run = lambda: response_logps(model, batch).detach()
    torch.manual_seed(1)
    first, second = run(), run()
    assert not torch.isclose(first, second).any()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    model.eval()
    assert torch.equal(run(), run())
    torch.testing.assert_close(run(), torch.stack(list(alone(model, prompts, responses, masks))).detach())


@pytest.mark.quick
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_whether_attention_drops_is_read_from_the_layers_as_they_are(name):
    rate = "attn_pdrop" if name == "gpt2" else "attention_dropout"
    model = make(name, **{rate: 0.3})
    backbone = find_head(model).backbone
    assert not check(backbone, "share").dropout
    model.train()
    assert check(backbone, "share").dropout
    for module in model.modules():  # as a trainer turns it off
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    assert not check(backbone, "share").dropout
    assert check(find_head(make(name, **{rate: 0.3}).train()).backbone, "share").dropout


@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_attention_dropout_is_refused_by_backends_that_lack_it(backend):
    module = nn.Module()
    x = torch.ones(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match=f"Module has attention dropout, which .* '{backend}' lacks"):
        attention.attend(module, x, x, x, dropout=0.1, prefcore_layout=attention.Prepared(backend, None))


def test_flex_scores_on_the_cpu_and_is_refused_for_what_it_lacks_there():
    model = make("mistral", attention_dropout=0.3).float()
    prompts, responses, _ = ragged()
    got = score(model, prompts, responses, attention="flex")
    expected = torch.stack(list(alone(model, prompts, responses))).detach()
    torch.testing.assert_close(torch.cat(got.logps), expected, rtol=1e-5, atol=1e-5)
    batch = pack(prompts, responses)
    with pytest.raises(NotImplementedError, match="'flex' cannot be used here: it has no backward on a CPU"):
        response_logps(model, batch, attention="flex")
    with pytest.raises(NotImplementedError, match="'flex' cannot be used here: it has no dropout"):
        response_logps(model.train(), batch, attention="flex")


def gradients_of(model, batch):
    model.zero_grad()
    backward(response_logps(model, batch))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def layers_run(monkeypatch):
    """How many times an attention layer ran."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(args[0])
        return attention.attend(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "prefcore", counting)
    return calls


@pytest.mark.quick
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_gradient_checkpointing_changes_no_bit(name, reentrant, layers_run):
    model = make(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    prompts, responses, masks = ragged()
    batch = pack(prompts, responses, masks=masks)
    expected = gradients_of(model, batch)
    before = len(layers_run)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    functions = [m._gradient_checkpointing_func for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert functions
    got = gradients_of(model, batch)
    assert len(layers_run) == before + 2 * 2  # each of two layers once more, and in our attention
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        assert torch.equal(gradient, expected[key]), key
    after = [m._gradient_checkpointing_func for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert after == functions


def test_checkpointed_dropout_is_drawn_alike_again():
    model = make("llama", attention_dropout=0.3).train()
    batch = pack(*examples([(9, [4, 3]), (1, [5])]))
    torch.manual_seed(3)
    expected = gradients_of(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    for key, gradient in gradients_of(model, batch).items():
        assert torch.equal(gradient, expected[key]), key


def test_torchs_checkpoint_wrapper_is_refused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make("llama")
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    for _ in range(2):  # a second try is refused as well
        with pytest.raises(NotImplementedError, match="CheckpointWrapper recomputes layers with the model's own"):
            response_logps(model, pack(*examples([(2, [2])])))


@pytest.mark.parametrize("own", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_recomputed_by_anyone_else_fail_instead_of_seeing_everything(own, reentrant):
    from torch.utils.checkpoint import checkpoint

    model = make("llama").float().train()
    model.set_attn_implementation(own)
    model.enable_input_require_grads()
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda h, forward=forward, **kwargs: checkpoint(
            lambda x: forward(x, **kwargs), h, use_reentrant=reentrant
        )
    logps = response_logps(model, pack(*examples([(2, [2, 3])])))
    with pytest.raises(RuntimeError):
        logps.sum().backward()


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0, 4.0, 5.0, 6.0],
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", ROPES)
def test_scores_do_not_depend_on_longer_neighbours_whatever_the_rotary_embedding(kind, caplog):
    from prefcore.hf import scoring

    # dynamic goes by max_position_embeddings, longrope by its own original length
    positions = {"max_position_embeddings": 16 if kind == "dynamic" else 64}
    model = make("llama", rope_parameters=ROPES[kind], **positions).float()
    prompts, responses = examples([(10, [3, 12, 4, 15]), (5, [4]), (30, [3, 2])])
    expected = [s for p, g in zip(prompts, responses, strict=True) for r in g for s in score(model, [p], [[r]]).logps]
    got = torch.cat(score(model, prompts, responses).logps)
    lengths = torch.tensor([len(p) + len(r) for p, g in zip(prompts, responses, strict=True) for r in g])
    # Past the original length dynamic ones go by the longest that the model has seen so far, alone or not.
    kept = lengths <= 16 if kind == "dynamic" else lengths > 0
    torch.testing.assert_close(got[kept], torch.cat(expected)[kept], rtol=1e-5, atol=1e-5)
    assert 0 < int((lengths <= 16).sum()) < len(lengths)
    assert not caplog.records
    scoring._warn_once.cache_clear()
    for _ in range(2):
        response_logps(model, pack(prompts, responses))
    assert [record.getMessage()[:36] for record in caplog.records] == (
        [] if kind == "yarn" else ["a batch holds sequences of up to and"]
    )


def layouts():
    return [
        pack(*examples(sizes, seed))
        for seed, sizes in enumerate(
            [
                [(9, [4, 3]), (1, [5])],
                [(3, [2]), (12, [40, 3, 3])],
                [(30, [1, 2, 30, 5]), (2, [9]), (5, [50])],
                [(4, [7])],
                [(11, [3] * 5), (1, [2, 9])],
            ]
        )
    ]


def test_compiled_layers_give_the_same_and_are_not_compiled_for_each_layout():
    model = make("llama").train()
    batches = layouts()
    expected = [gradients_of(model, batch) for batch in batches]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=count)
    counts = []
    try:
        for batch, gradients in zip(batches, expected, strict=True):
            got = gradients_of(model, batch)
            for key, gradient in got.items():
                torch.testing.assert_close(gradient, gradients[key], rtol=1e-12, atol=1e-12)
            counts.append(len(graphs))
    finally:
        torch._dynamo.reset()
    assert counts[0] > 0
    # Once for the first shapes, once for shapes that vary.
    assert counts[1:] == [counts[1]] * (len(counts) - 1), counts


@pytest.mark.quick
def test_lora_is_trained_as_one_sequence_at_a_time():
    peft = pytest.importorskip("peft")
    base = make("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    prompts, responses, masks = ragged()
    truth = Truth(model, prompts, responses, masks)
    model.zero_grad()
    batch = pack(prompts, responses, masks=masks)
    logps = response_logps(model, batch)
    backward(logps)
    assert_equals(model, logps, truth)
    with model.disable_adapter():
        torch.testing.assert_close(response_logps(model, batch), response_logps(base, batch))
    assert not torch.isclose(logps, response_logps(base, batch)).any()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2"])
def test_autocast_is_no_worse_than_the_models_own(name):
    model = make(name).float()
    prompts, responses, masks = ragged()
    exact = torch.stack(list(alone(copy.deepcopy(model).double(), prompts, responses, masks))).detach()
    with torch.autocast("cpu", torch.bfloat16):
        eager = torch.stack(list(alone(model, prompts, responses, masks))).detach()
        logps = response_logps(model, pack(prompts, responses, masks=masks))
    # A rounding of the hidden states that the head sees moves a log-prob by one of a logit.
    band = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    assert_no_worse_than(logps.detach().float(), eager.float(), exact, name, band=band)
    backward(logps)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def implementations(model):
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


@pytest.mark.quick
@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_a_model_is_left_as_it_was(own):
    model = make("gemma3").float()
    model.set_attn_implementation(own)
    ids = torch.tensor([[5, 6, 7]])
    before, kept = model.generate(ids, max_new_tokens=5, do_sample=False), implementations(model)
    response_logps(model, pack(*examples([(9, [4, 3])])))
    assert implementations(model) == kept
    assert set(kept) == {own}
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)


class Broken(Exception):
    pass


@pytest.mark.quick
@pytest.mark.parametrize("probed", [False, True])
def test_an_exception_inside_the_model_leaves_it_as_it_was(probed):
    model = make("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.layers[0].eval()
    batch = pack(*examples([(9, [4, 3])]))
    find_head(model)
    if probed:
        expected = response_logps(model, batch).detach()
    kept, functions = implementations(model), [layer._gradient_checkpointing_func for layer in model.model.layers]
    training = [module.training for module in model.modules()]

    def break_down(*_):
        raise Broken

    hook = model.model.layers[1].register_forward_pre_hook(break_down)
    with pytest.raises(Broken):
        response_logps(model, batch)
    hook.remove()
    assert implementations(model) == kept
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == functions
    assert [module.training for module in model.modules()] == training
    assert attention._recording is None
    if probed:
        assert torch.equal(response_logps(model, batch), expected)
    model(input_ids=batch.input_ids[None]).logits.sum().backward()


@pytest.mark.quick
def test_a_model_that_was_run_can_be_freed():
    model = make("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gradients_of(model, pack(*examples([(9, [4, 3])])))
    backbone = weakref.ref(model.model)
    del model
    gc.collect()
    assert backbone() is None


def test_a_copy_of_a_model_that_was_run_runs_on_its_own():
    model = make("llama")
    batch = pack(*examples([(9, [4, 3])]))
    expected = response_logps(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert torch.equal(response_logps(twin, batch), expected)


@pytest.fixture
def unprobed(monkeypatch):
    """Nothing is known of any model: those below have the classes and configurations of others that are fine."""
    monkeypatch.setattr(attention, "_probed", {})


class SwallowingAttention(modeling_llama.LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values)


class OwnPositions(transformers.GPT2Model):
    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


class Recurrent(nn.Module):
    """A layer that sums up what is before, whosever it is, as a recurrence does."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x) + 1e-3 * x.cumsum(1)


def swallowing():
    model = make("llama").model
    for layer in model.layers:
        layer.self_attn.__class__ = SwallowingAttention
    return model


def own_positions():
    model = make("gpt2").transformer  # with rotary angles, packing sequences behind one another would not matter
    model.__class__ = OwnPositions
    return model


def leaking():
    model = make("llama").model
    model.norm = Recurrent(model.norm)
    return model


def backbone_of(kind, **changes):
    config = getattr(transformers, kind)(**{**SIZES, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).base_model.eval()


def llama4():
    config = transformers.Llama4TextConfig(
        **SIZES,
        intermediate_size_mlp=48,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=6,
        attn_implementation="eager",
    )
    return transformers.models.llama4.modeling_llama4.Llama4TextModel(config).eval()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: backbone_of("MambaConfig"), "does not call the attention function registered with transformers"),
        (lambda: backbone_of("BloomConfig"), "does not call the attention function registered with transformers"),
        (
            lambda: backbone_of("FalconH1Config", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
            "a sequence changes others in the row|does not hand the keyword arguments",  # by version
        ),
        (lambda: backbone_of("Lfm2Config", layer_types=["conv", "full_attention"]), "a sequence changes others"),
        (llama4, r"its masks ask for windows of 6 .*chunked attention"),
        (swallowing, "does not hand the keyword arguments of the model on to its attention"),
        (own_positions, "its hidden states differ from those of the sequences alone"),
        (leaking, "a sequence changes others in the row"),
    ],
)
def test_a_model_that_ignores_the_layout_is_refused(unprobed, build, text):
    model = build()
    for sharing in ("share", "pack"):
        with pytest.raises(NotImplementedError, match=text) as caught:
            run_packed(model, pack(*examples([(2, [2, 1])]), sharing=sharing))
        kind = "shares its prompts" if sharing == "share" else "packs several sequences into one row"
        assert str(caught.value).startswith(f"{type(model).__name__} cannot run a batch that {kind}: ")
        assert str(caught.value).endswith('; sharing="off" pads instead')


def test_masks_that_no_layer_uses_are_no_reason_to_refuse(unprobed):
    # Qwen2-MoE makes a mask for a window of 0 as well.
    config = transformers.Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    prompts, responses = examples([(7, [2, 3]), (1, [4])])
    expected = torch.stack(list(alone(model, prompts, responses)))
    torch.testing.assert_close(response_logps(model, pack(prompts, responses)), expected, rtol=1e-5, atol=1e-5)


def test_a_model_whose_layers_were_replaced_is_probed_again(unprobed):
    batch = pack(*examples([(2, [2])]))
    response_logps(make("llama"), batch)
    changed = make("llama")
    changed.model.layers[1].mlp = Recurrent(changed.model.layers[1].mlp)
    with pytest.raises(NotImplementedError, match="a sequence changes others"):
        response_logps(changed, batch)
    changed = make("llama")
    forward = changed.model.layers[1].mlp.forward
    changed.model.layers[1].mlp.forward = lambda x: forward(x) + x.roll(1, dims=1)
    with pytest.raises(NotImplementedError, match="a sequence changes others"):
        response_logps(changed, batch)


def test_attention_that_is_not_causal_is_refused(unprobed):
    model = make("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(NotImplementedError, match="LlamaAttention is not causal"):
        response_logps(model, pack(*examples([(2, [2])])))


def test_the_probe_runs_once_for_a_class_with_a_configuration(unprobed, monkeypatch):
    probe, probed = attention._probe, []
    monkeypatch.setattr(attention, "_probe", lambda *args: probed.append(args[2:]) or probe(*args))
    batch = lambda sharing: pack(*examples([(2, [2])]), sharing=sharing)
    model = make("llama")
    for _ in range(3):
        response_logps(model, batch("share"))
    response_logps(make("llama"), batch("share"))
    assert probed == [("share", "auto")]
    response_logps(model, batch("pack"))
    response_logps(model, batch("share"), attention="sdpa")
    assert probed[1:] == [("pack", "auto"), ("share", "sdpa")]
    response_logps(make("llama", rope_theta=99.0), batch("share"))  # another configuration
    response_logps(make("qwen3"), batch("share"))
    assert len(probed) == 5
    for _ in range(2):
        refused = own_positions()
        with pytest.raises(NotImplementedError, match="its hidden states differ"):
            check(refused, "share")
    assert len(probed) == 6


def aux_loss_alone(model, prompts, responses):
    """The load-balancing loss of router logits that were computed one sequence at a time, each token once."""
    logits = None
    for prompt, group in zip(prompts, responses, strict=True):
        for number, response in enumerate(group):
            out = model.base_model(
                input_ids=torch.tensor([prompt + response]), use_cache=False, output_router_logits=True
            )
            rows = [layer.view(-1, layer.shape[-1])[len(prompt) if number else 0 :] for layer in out.router_logits]
            logits = rows if logits is None else [torch.cat(both) for both in zip(logits, rows, strict=True)]
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    experts = logits[0].shape[-1]
    return model.config.router_aux_loss_coef * function(tuple(logits), experts, model.config.num_experts_per_tok)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["qwen3 moe", "mixtral", "gpt oss"])
def test_the_routers_loss_counts_each_token_once(name):
    model = make(name)
    prompts, responses, _ = ragged()
    expected = aux_loss_alone(model, prompts, responses)
    gradient = torch.autograd.grad(expected, [p for n, p in model.named_parameters() if "embed" in n])[0]
    for sharing in ("share", "pack", "off"):
        hidden = run_backbone(find_head(model), pack(prompts, responses, sharing=sharing))
        torch.testing.assert_close(hidden.aux_loss, expected, rtol=1e-5, atol=0)
        model.zero_grad()
        hidden.aux_loss.backward()
        got = model.get_input_embeddings().weight.grad
        assert (got - gradient).abs().max() <= 1e-4 * gradient.abs().max()


def test_without_router_logits_in_the_config_there_is_no_routers_loss():
    batch = pack(*examples([(2, [2])]))
    for model in (make("mixtral", output_router_logits=False), make("llama"), make("deepseek v3")):
        assert run_backbone(find_head(model), batch).aux_loss is None


@pytest.mark.quick
@pytest.mark.parametrize("sharing", ["share", "pack", "off"])
@pytest.mark.parametrize("max_tokens", [29, 40, 8192])
def test_scores_equal_one_sequence_at_a_time_in_any_budget(sharing, max_tokens):
    model = make("llama").float()
    prompts, responses, _ = ragged()
    prompts.insert(1, [7, 8])
    responses.insert(1, [])
    model.train()
    scores = score(model, prompts, responses, max_tokens=max_tokens, sharing=sharing)
    assert model.training
    assert [len(group) for group in scores.logps] == [len(group) for group in responses]
    assert [[len(r) for r in group] for group in responses] == [[len(t) for t in g] for g in scores.token_logps]
    model.eval()
    expected = torch.stack(list(alone(model, prompts, responses))).detach()
    torch.testing.assert_close(torch.cat(scores.logps), expected, rtol=1e-5, atol=1e-5)
    for group, sums in zip(scores.token_logps, scores.logps, strict=True):
        assert all(part.dtype == torch.float32 and not part.requires_grad for part in group)
        for part, total in zip(group, sums, strict=True):
            assert torch.equal(part.sum(), total)


def test_each_forward_pass_of_scoring_is_within_max_tokens_and_few_are_made(monkeypatch):
    from prefcore.hf import scoring

    seen = []
    run = scoring.token_logps
    monkeypatch.setattr(scoring, "token_logps", lambda m, batch, **k: seen.append(batch) or run(m, batch, **k))
    model = make("llama").float()
    prompts, responses = examples([(20, [5] * 6), (3, [4, 4]), (10, [30])])
    for sharing in ("share", "pack", "off"):
        for limit in (40, 64, 120, 1000):
            seen.clear()
            score(model, prompts, responses, max_tokens=limit, sharing=sharing)
            assert all(batch.layout.tokens <= limit for batch in seen)
            tokens = sum(batch.layout.tokens for batch in seen)
            assert len(seen) <= 2 * -(-tokens // limit)
    assert len(seen) == 1


def test_temperature_divides_the_logits_of_scores():
    model = make("llama").float()
    prompts, responses = examples([(4, [3, 2])])
    got = score(model, prompts, responses, temperature=2.0)
    with torch.no_grad():
        model.lm_head.weight.div_(2.0)
    torch.testing.assert_close(got.logps, score(model, prompts, responses).logps)


@pytest.mark.quick
def test_what_cannot_be_scored_is_refused():
    model = make("llama")
    with pytest.raises(ValueError, match="got 1 prompts and 2"):
        score(model, [[1]], [[[1]], [[1]]])
    with pytest.raises(ValueError, match="prompt 1 with response 0 has 9 tokens, more than max_tokens=8"):
        score(model, [[1], [1] * 4], [[[1]], [[1] * 5]], max_tokens=8)
    # Before anything is run, and by the caller's numbers.
    fine = [[1]] * 2, [[[1]]] * 2
    for prompt, group, text in (
        ([1], [[1], []], "response 1 of prompt 2 has no token"),
        ([], [[1]], "prompt 2 has no token"),
        ([1.5], [[1]], "prompt 2 must hold integers"),
        ([1], [[1], [99]], "prompt 2 or a response to it holds the token id 99; the model has 61"),
    ):
        with pytest.raises(ValueError, match=text):
            score(model, [*fine[0], prompt], [*fine[1], group], max_tokens=6)
    with pytest.raises(ValueError, match="attention must be one of"):
        score(model, [[1]], [[[1]]], attention="fast")
    with pytest.raises(NotImplementedError, match="a padded batch runs the model's own attention, not 'sdpa'"):
        score(model, [[1]], [[[1]]], attention="sdpa", sharing="off")
    assert score(model, [], []) == ([], [])
    assert [group.tolist() for group in score(model, [[1], [2]], [[], []]).logps] == [[], []]


def test_responses_average_over_scored_tokens():
    model = make("llama")
    prompts, responses, masks = ragged()
    batch = pack(prompts, responses, masks=masks)
    counts = batch.cu_seqlens.diff()
    assert int(counts[18]) == sum(masks[2][1]) == 8
    torch.testing.assert_close(response_logps(model, batch, mode="mean") * counts, response_logps(model, batch))


def test_a_layouts_plan_is_made_once_for_all_layers_and_runs(monkeypatch):
    built = []
    backend = attention._backends.BACKENDS["sdpa"]
    count = lambda *args: built.append(args[0]) or backend.plan(*args)
    monkeypatch.setitem(attention._backends.BACKENDS, "sdpa", backend._replace(plan=count))
    model = make("gemma3")
    batch = pack(*examples([(9, [4, 3])]))
    for _ in range(3):
        response_logps(model, batch)
    assert sum(layout is batch.layout for layout in built) == 1
