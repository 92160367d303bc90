"""The head found in a model gives the model's own log-probs and gradients, or is refused."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers

from prefcore.data import pack
from prefcore.hf import find_head, response_logps

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 8}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "granite": (
        "GraniteConfig",
        {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "phi (bias)": ("PhiConfig", {}),
}


def make(name, **changes):
    config, special = CONFIGS[name]
    settings = {"vocab_size": 61} if name == "gpt2" else dict(SMALL)
    config = getattr(transformers, config)(**{**settings, **special, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # far from the initial values, so that nothing is negligible
        nn.init.normal_(parameter, std=0.2)
    return model


def examples(pairs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(3, 61, (int(torch.randint(1, 7, (1,), generator=generator)),), generator=generator)
    return [draw().tolist() for _ in range(pairs)], [[draw().tolist(), draw().tolist()] for _ in range(pairs)]


def padded():
    return pack(*examples(), sharing="off")


def plain_logps(model, prompts, responses):
    """The same from the model's own logits, one sequence at a time, without padding."""
    sums = []
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            logps = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            sums.append(logps.gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


@pytest.mark.quick
@pytest.mark.parametrize("name", CONFIGS)
def test_logps_and_gradients_equal_those_of_the_models_own_logits(name):
    model = make(name).double()
    expected = plain_logps(model, *examples())
    upstream = torch.linspace(-1, 2, len(expected), dtype=torch.float64)
    expected.backward(upstream)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    got = response_logps(model, padded())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    got.backward(upstream)
    for key, parameter in model.named_parameters():
        # The models' own norms run in float32, in float64 models too: padding changes their roundings.
        size = gradients[key].abs().max().clamp_min(1e-6)
        error = ((parameter.grad - gradients[key]).abs().max() / size).item()
        assert error < 8 * torch.finfo(torch.float32).eps, (key, error)


@pytest.mark.quick
def test_the_head_has_what_the_config_says():
    assert find_head(make("gemma3")).softcap == 0.5
    assert find_head(make("granite")).logit_scale == 0.25
    assert find_head(make("cohere")).logit_scale == 0.25
    assert find_head(make("phi (bias)")).bias is not None
    tied = make("qwen3")
    assert find_head(tied).weight is tied.get_input_embeddings().weight
    assert (find_head(make("llama")).softcap, find_head(make("llama")).logit_scale) == (None, 1.0)


@pytest.mark.skipif(not hasattr(transformers, "HyperCLOVAXConfig"), reason="this transformers has no HyperCLOVA X")
def test_hyperclovax_multiplies_by_what_granite_divides_by():
    model = transformers.AutoModelForCausalLM.from_config(transformers.HyperCLOVAXConfig(**SMALL, logits_scaling=3.0))
    assert find_head(model).logit_scale == 3.0


def test_a_config_that_asks_for_tuples_changes_nothing():
    config = transformers.OpenAIGPTConfig(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    expected = response_logps(copy.deepcopy(model), padded())
    model.config.return_dict = False
    assert torch.equal(response_logps(model, padded()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_probe_passes_in_half_precision(name, dtype):
    head = find_head(make(name).to(dtype))
    assert head.logits(torch.ones(1, 6, head.weight.shape[1], dtype=dtype)).shape == (1, 6, 61)


def test_the_probe_leaves_the_model_as_it_was():
    model = make("gpt2").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    find_head(model)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.lm_head._forward_pre_hooks


class HiddenScale(transformers.LlamaForCausalLM):
    """As MiniCPM does it: the hidden states are scaled on their way to the head."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        out.logits = self.lm_head(out.last_hidden_state * 0.5)
        return out


class UnknownSoftcap(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 50 * torch.tanh(out.logits / 50)
        return out


class UnknownScale(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.25
        return out


class MaskedVocabulary(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., -1] = -torch.inf
        return out


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (HiddenScale, "between its backbone and its head.*0.5"),
        (UnknownSoftcap, "the logits of UnknownSoftcap are not"),
        (UnknownScale, "best single factor 1.25"),
        (MaskedVocabulary, "the logits of MaskedVocabulary are not"),
    ],
)
def test_a_model_whose_logits_are_something_else_is_refused(kind, text):
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**SMALL))  # as initialised: logits near 0, where a softcap does nothing
    with pytest.raises(NotImplementedError, match=text):
        find_head(model)


def test_a_changed_config_is_probed_again():
    model = make("gemma3")
    find_head(model)
    model.config.final_logit_softcapping = 0.6
    find_head(model)  # Gemma 3 reads its config at every forward, and so agrees
    cohere = make("cohere")
    find_head(cohere)
    cohere.config.logit_scale = 0.5  # Cohere read it once
    with pytest.raises(NotImplementedError, match=r"best single factor 0\.5"):
        find_head(cohere)


@pytest.mark.quick
def test_what_is_no_causal_lm_is_refused():
    with pytest.raises(TypeError, match="expected a transformers causal LM"):
        find_head(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="no language-model head"):
        find_head(make("llama").model)
    model = make("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="forward hooks"):
        find_head(model)
    model = make("llama")
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(NotImplementedError, match="sharded"):
        find_head(model)
