"""A fused model gives labels the model's own loss and log-probs, without its logits, and is otherwise the model."""

import copy
import functools
import inspect
import pickle
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")
import transformers

from prefcore.hf import TokenStatsOutput, fuse_head, unfuse_head

V, B, L = 61, 2, 9
SMALL = {
    "vocab_size": V,
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
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3, "output_router_logits": True}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
CONFIGS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "gemma2 (softcap)": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 8}),
    "cohere (scale)": ("CohereConfig", {"logit_scale": 0.25}),
    "granite (scale)": ("GraniteConfig", {"logits_scaling": 4.0}),
    "gpt2 (tied)": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "phi (bias)": ("PhiConfig", {}),
    "mixtral (routers)": ("MixtralConfig", EXPERTS),
    "mamba (no attention)": ("MambaConfig", {"state_size": 4}),
    "llava (images)": ("LlavaConfig", {}),
    "gemma3 (images)": ("Gemma3Config", {}),
}
# In the oldest transformers their losses ignored num_items_in_batch, or labels of padding: there they are refused.
RECENT = ("mamba (no attention)", "gemma3 (images)")


def make(name="llama", **changes):
    kind, special = CONFIGS[name]
    if name == "llava (images)":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.LlamaConfig(**SMALL),
            image_token_index=V - 1,
            vision_feature_layer=-1,
        )
    elif name == "gemma3 (images)":
        config = transformers.Gemma3Config(
            vision_config=VISION,
            text_config={**SMALL, "head_dim": 8, "sliding_window": 8},
            mm_tokens_per_image=4,
            image_token_index=V - 1,
            boi_token_index=V - 2,
            eoi_token_index=V - 3,
        )
    else:
        settings = {"vocab_size": V} if kind == "GPT2Config" else dict(SMALL)
        config = getattr(transformers, kind)(**{**settings, **special, **changes})
    auto = transformers.AutoModelForImageTextToText if "images" in name else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    options = {} if "mamba" in name else {"attn_implementation": "eager"}
    if "routers" in name:
        options["experts_implementation"] = "eager"  # the grouped product knows no float64
    model = auto.from_config(config, **options).eval()
    for parameter in model.parameters():  # far from the initial values, so that nothing is negligible
        nn.init.normal_(parameter, std=0.2)
    return model


def batch(name="llama", length=L):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, V - 4, (B, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels = ids.clone()
    labels[:, :3] = labels[0, -2:-1] = -100
    labels[mask == 0] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if "images" in name:
        ids[:, 1:5] = V - 1
        labels[:, :5] = -100
        inputs["pixel_values"] = torch.randn(B, 3, 8, 8, generator=generator)
    if "gemma3" in name:
        inputs["token_type_ids"] = (ids == V - 1).long()
    return inputs


def doubled(model, inputs):
    """Both in float64, where the order of sums does not show."""
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def close_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, theirs in expected.items():
        if theirs is None:
            assert got[name] is None, name
            continue
        # The models' own norms and routers run in float32, in float64 models too.
        size = theirs.abs().max().clamp_min(1e-6)
        assert (got[name] - theirs).abs().max() / size < 8 * torch.finfo(torch.float32).eps, name


def same_loss(got, own):
    """The models take the loss of float32 logits: V + 1 roundings a row, and one for each row of the mean."""
    torch.testing.assert_close(got.float(), own.float(), rtol=(V + B * L) * torch.finfo(torch.float32).eps, atol=0)


def own_logps(logits, labels, temperature=1.0):
    rows = (logits[:, :-1] / temperature).log_softmax(-1)
    targets = labels[:, 1:]
    return rows, torch.where(targets == -100, 0.0, rows.gather(-1, targets.clamp(min=0)[..., None])[..., 0])


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in RECENT else pytest.mark.quick) for n in CONFIGS])
def test_loss_statistics_and_gradients_equal_those_of_the_models_own_logits(name):
    model, inputs = doubled(make(name), batch(name))
    labels = inputs["labels"]
    own = model(**inputs)
    logits = own.logits.double()  # Mamba rounds its own to float32
    rows, logps = own_logps(logits, labels)
    mask = labels[:, 1:] != -100
    expected = -logps.sum() / mask.sum()
    if "routers" in name:
        expected = expected + 0.3 * own.aux_loss
    theirs = gradients(model, expected)

    fuse_head(model, outputs=["entropy", "is_top1", "logsumexp"])
    got = model(**inputs)
    assert isinstance(got, TokenStatsOutput)
    assert "logits" not in got
    assert got.past_key_values is None
    same_loss(got.loss, own.loss)
    # Sums of D = 32 products and of V exponentials.
    bound = (32 + V) * torch.finfo(own.logits.dtype).eps * logits.abs().max().clamp_min(1).item()
    tight = {"rtol": bound, "atol": bound}
    torch.testing.assert_close(got.loss, expected, rtol=bound, atol=torch.finfo(torch.float32).eps)
    torch.testing.assert_close(got.logps, logps, **tight)
    torch.testing.assert_close(got.entropy, -(rows.exp() * rows).sum(-1) * mask, **tight)
    torch.testing.assert_close(got.logsumexp, logits[:, :-1].logsumexp(-1) * mask, **tight)
    assert torch.equal(got.is_top1, (logits[:, :-1].argmax(-1) == labels[:, 1:]) & mask)
    assert torch.equal(got.label_mask, mask)
    assert torch.equal(got.targets, labels[:, 1:])
    if "routers" in name:
        torch.testing.assert_close(got.aux_loss, own.aux_loss)
        assert len(got.router_logits) == 2
    close_gradients(gradients(model, got.loss), theirs)


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_num_items_in_batch_and_shift_labels_go_into_the_loss_as_in_the_models_own(items):
    model, inputs = make(), batch()
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    shifted[0, -1] = 5  # a label of the last row, which plain labels cannot have
    own = [model(**inputs, num_items_in_batch=items), model(**inputs, shift_labels=shifted)]
    fuse_head(model)
    got = [model(**inputs, num_items_in_batch=items), model(**inputs, shift_labels=shifted)]
    for mine, theirs in zip(got, own, strict=True):
        same_loss(mine.loss, theirs.loss)
    assert got[0].logps.shape == (B, L - 1)
    assert got[1].logps.shape == (B, L)
    assert got[1].logps[0, -1] != 0
    assert got[1].label_mask[0, -1]


def test_the_callers_arguments_reach_the_backbone():
    model, inputs = make("mixtral (routers)", output_router_logits=False), batch()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach() * 1.5
    kinds = [
        {"position_ids": torch.arange(L)[None] * 3},
        {"input_ids": None, "inputs_embeds": embeds},
        {"output_hidden_states": True, "output_attentions": True},
        {"output_router_logits": True},
    ]
    own = [model(**{**inputs, **more}) for more in kinds]
    fuse_head(model)
    got = [model(**{**inputs, **more}) for more in kinds]
    for mine, theirs in zip(got, own, strict=True):
        same_loss(mine.loss, theirs.loss)
    assert len({mine.loss.item() for mine in got}) == len(kinds)
    assert all(map(torch.equal, got[2].hidden_states, own[2].hidden_states))
    assert all(map(torch.equal, got[2].attentions, own[2].attentions))
    assert got[0].aux_loss is None
    assert got[3].aux_loss is not None


def test_arguments_by_position_are_those_by_name():
    model, inputs = make("gpt2 (tied)"), batch()
    fuse_head(model)
    names = list(inspect.signature(model.forward).parameters)
    values = [inputs.get(name) for name in names[: names.index("labels") + 1]]
    assert torch.equal(model(*values).logps, model(**inputs).logps)
    with pytest.raises(TypeError, match="input_ids"):
        model(inputs["input_ids"], **inputs)


class Widest(TorchDispatchMode):
    """The most rows of a tensor with a column per token of the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor) and each.dim() and each.shape[-1] == V:
                self.rows = max(self.rows, each.numel() // V)
        return result


def test_only_scored_rows_meet_the_head():
    model, inputs = make(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["labels"][0, 4] = inputs["labels"][1, 5] = 7
    with Widest() as own:
        model(**inputs).loss.backward()
    fuse_head(model)
    with Widest() as mine:
        model(**inputs).loss.backward()
    assert own.rows >= B * L
    assert mine.rows == 2


def test_without_labels_the_models_own_forward_runs():
    model, inputs = make(), batch()
    ids = inputs.pop("input_ids")
    del inputs["labels"]
    signature = inspect.signature(model.forward)
    own, last = model(ids, **inputs), model(ids, **inputs, logits_to_keep=1).logits
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    fuse_head(model)
    got = model(ids, **inputs)
    assert type(got) is type(own)
    assert torch.equal(got.logits, own.logits)
    assert got.past_key_values is not None
    assert torch.equal(model(ids, **inputs, logits_to_keep=1).logits, last)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    assert inspect.signature(model.forward) == signature
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(ids, nonsense=1)


def test_return_dict_and_the_cache_are_the_callers_choice():
    model, inputs = fuse_head(make()), batch()
    loss, logps, targets = model(**inputs, return_dict=False)
    out = model(**inputs, use_cache=True)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logps, out.logps)
    assert torch.equal(targets, out.targets)
    assert out.past_key_values is not None


@pytest.mark.parametrize("length", [1, L])
def test_nothing_to_score_is_a_zero_with_zero_gradients(length):
    model, inputs = fuse_head(make("phi (bias)")), batch(length=length)
    out = model(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)})
    assert out.loss == 0
    assert out.logps.shape == (B, length - 1)
    found = gradients(model, out.loss)
    assert all(grad is not None and not grad.any() for grad in found.values())


def test_the_temperature_divides_the_logits():
    model, inputs = doubled(make("gemma2 (softcap)"), batch())
    _, logps = own_logps(model(**inputs).logits, inputs["labels"], 0.7)
    got = fuse_head(model, temperature=0.7)(**inputs)
    bound = (32 + V) * torch.finfo(torch.float64).eps
    torch.testing.assert_close(got.logps, logps, rtol=bound, atol=bound)
    torch.testing.assert_close(got.loss, -logps.sum() / got.label_mask.sum(), rtol=bound, atol=bound)


def test_fusing_again_changes_the_options_and_unfusing_restores_the_model():
    model, inputs = make(), batch()
    before = dict(vars(model))
    assert unfuse_head(model) is model
    assert vars(model) == before
    assert fuse_head(model) is model
    forward = model.forward
    fuse_head(model, outputs=["entropy"], temperature=0.5)
    assert model.forward is forward
    assert model(**inputs).entropy is not None
    unfuse_head(model)
    assert vars(model) == before
    assert list(vars(model)) == list(before)
    assert model(**inputs).logits.shape == (B, L, V)


def wrapped(model):
    """A forward around the model's, as TRL's trainers bind it."""
    theirs = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, scored_by_trl=False, **kwargs):
        return "theirs" if scored_by_trl else theirs(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return model


def test_beneath_the_forward_of_another_it_is_undone_and_above_it_refused():
    inputs = batch()
    model = wrapped(fuse_head(make()))
    assert model(**inputs, scored_by_trl=True) == "theirs"
    assert isinstance(model(**inputs), TokenStatsOutput)
    other = copy.deepcopy(model)
    assert unfuse_head(model) is model
    assert hasattr(model(**inputs), "logits")
    for each in (model, other):
        with pytest.raises(NotImplementedError, match=rf"was replaced \(by {__name__}\)"):
            fuse_head(each)


def test_a_loss_function_set_later_is_refused_not_passed_by():
    model, inputs = fuse_head(make()), batch()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    with pytest.raises(NotImplementedError, match="loss_function of this LlamaForCausalLM was set after"):
        model(**inputs)
    assert unfuse_head(model)(**inputs).loss.abs() > 0
    with pytest.raises(NotImplementedError, match="is not the mean"):
        fuse_head(model)


def test_sequences_told_apart_by_their_positions_are():
    model, lengths = make(), (4, 5)
    model.set_attn_implementation("sdpa")
    ids = batch()["input_ids"][:1]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    starts = positions == 0
    inputs = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(starts, -100)}
    own = model(**inputs, use_cache=False)
    packed = fuse_head(model)(**inputs)
    same_loss(packed.loss, own.loss)
    alone = [model(input_ids=part, labels=part).logps for part in ids.split(lengths, 1)]
    apart = torch.cat([packed.logps[:, :3], packed.logps[:, 4:]], 1)
    bound = (32 + V) * torch.finfo(torch.float32).eps * 8  # logits below 8
    torch.testing.assert_close(apart, torch.cat(alone, 1), rtol=bound, atol=bound)


def test_a_config_that_asks_for_tuples_gets_them():
    config = transformers.OpenAIGPTConfig(vocab_size=V, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    inputs = batch()
    own = model(**inputs).loss
    model.config.return_dict = False
    got = fuse_head(model)(**inputs)
    assert type(got) is tuple
    same_loss(got[0], own)
    same_loss(model(**inputs, return_dict=True).loss, own)


def test_what_is_saved_is_the_plain_model(tmp_path):
    model = make()
    kind, config, keys = type(model), model.config.to_dict(), list(model.state_dict())
    fuse_head(model)
    assert (type(model), model.config.to_dict(), list(model.state_dict())) == (kind, config, keys)
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, attn_implementation="eager")
    assert "forward" not in vars(loaded)
    inputs = batch()
    assert torch.equal(fuse_head(loaded)(**inputs).logps, model(**inputs).logps)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_fused_and_uses_its_own_weights(copied):
    model, inputs = fuse_head(make(), outputs=["entropy"]), batch()
    mine = model(**inputs).loss
    other = copied(model)
    assert torch.equal(other(**inputs).loss, mine)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    theirs = other(**inputs)
    assert torch.equal(model(**inputs).loss, mine)
    assert not torch.equal(theirs.loss, mine)
    fuse_head(other)
    assert other(**inputs).entropy is None
    assert model(**inputs).entropy is not None
    assert torch.equal(theirs.loss, other(**inputs).loss)
    unfuse_head(other)
    assert "forward" not in vars(other)
    assert model(**inputs).entropy is not None


def lora(peft, model, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("order", ["before", "after", "inside"])
def test_peft_may_wrap_before_or_after(order):
    peft = pytest.importorskip("peft")
    base, inputs = make(), batch()
    own = lora(peft, copy.deepcopy(base))
    expected = own(**inputs).loss
    theirs = gradients(own, expected)
    with own.disable_adapter():
        without = own(**inputs).loss
    if order == "before":
        model = fuse_head(lora(peft, base))
    elif order == "after":
        model = lora(peft, fuse_head(base))
    else:
        model = lora(peft, base)
        fuse_head(model.get_base_model())
    got = model(**inputs)
    assert isinstance(got, TokenStatsOutput)
    same_loss(got.loss, expected)
    close_gradients(gradients(model, got.loss), theirs)
    with model.disable_adapter():
        same_loss(model(**inputs).loss, without)
    assert model.generate(inputs["input_ids"], max_new_tokens=1).shape == (B, L + 1)
    merged = model.merge_and_unload()
    bound = 64 * torch.finfo(torch.float32).eps  # the merged weights are rounded once: 2 layers of 32 products
    torch.testing.assert_close(merged(**inputs).loss, expected, rtol=bound, atol=bound)
    unfuse_head(merged)
    assert "forward" not in vars(merged)


HEADS = {
    "LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "rsLoRA with a bias": {"target_modules": ["q_proj", "lm_head"], "use_rslora": True, "lora_bias": True},
    "trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_peft_trains_has_its_own_loss_and_gradients(kind, order):
    peft = pytest.importorskip("peft")
    base, inputs = make(), batch()
    if order == "after":
        fuse_head(base)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **HEADS[kind])
    model = peft.get_peft_model(base, config)
    if order == "before":
        fuse_head(model)
    model, inputs = doubled(model, inputs)
    with torch.no_grad():  # away from the copy that it starts as
        for name, parameter in model.named_parameters():
            if "lm_head" in name and parameter.requires_grad:
                parameter.mul_(1.5)
    got = model(**inputs)
    found = gradients(model, got.loss)
    with model.disable_adapter():
        without = model(**inputs)
    unfuse_head(model)
    logits, labels = model(**inputs).logits, inputs["labels"]
    _, logps = own_logps(logits, labels)
    bound = (32 + V) * torch.finfo(torch.float64).eps * 8 * logits.detach().abs().max().item()
    torch.testing.assert_close(got.logps, logps, rtol=bound, atol=bound)
    close_gradients(found, gradients(model, -logps.sum() / got.label_mask.sum()))
    trained = [name for name, gradient in found.items() if gradient is not None and "lm_head" in name]
    assert trained
    assert not any("base_layer" in name or "original" in name for name in trained)
    with model.disable_adapter():
        own = model(**inputs).loss
    same_loss(without.loss, own)
    assert (without.logps - got.logps).abs().max() > 1e-2


def test_a_mixed_model_of_peft_is_fused_beneath_its_wrapper():
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model, inputs = peft.PeftMixedModel(make(), config), batch()
    own = model(**inputs).loss
    same_loss(fuse_head(model)(**inputs).loss, own)
    unfuse_head(model)
    assert torch.equal(model(**inputs).loss, own)


def test_virtual_tokens_of_prompt_tuning_are_not_scored():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, inputs = peft.get_peft_model(make(), config), batch()
    own = model(**inputs).loss
    got = fuse_head(model)(**inputs)
    same_loss(got.loss, own)
    assert got.logps.shape == (B, 3 + L - 1)
    assert not got.label_mask[:, :3].any()


def test_gradient_checkpointing_may_be_switched_after():
    model, inputs = fuse_head(make()).train(), batch()
    expected = gradients(model, model(**inputs).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    close_gradients(gradients(model, model(**inputs).loss), expected)
    model.gradient_checkpointing_disable()
    close_gradients(gradients(model, model(**inputs).loss), expected)


def test_compiled_as_one_graph_it_gives_the_same_and_may_be_fused_after():
    model = fuse_head(make(num_hidden_layers=1), outputs=["entropy"])
    eager = [model(**batch(length=length)) for length in (L, L + 2)]
    theirs = gradients(model, eager[1].loss)
    torch._dynamo.reset()
    # The op's own tests trace it further; that of a whole model costs four times as much.
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    got = [compiled(**batch(length=length)) for length in (L, L + 2)]
    bound = (32 + V) * torch.finfo(torch.float32).eps * 8  # logits below 8
    for mine, own in zip(got, eager, strict=True):
        for key in ("loss", "logps", "entropy"):
            torch.testing.assert_close(mine[key], own[key], rtol=bound, atol=bound)
    close_gradients(gradients(model, got[1].loss), theirs)
    unfuse_head(compiled)
    assert "forward" not in vars(model)
    fuse_head(compiled)
    model.compile(backend="eager")
    torch.testing.assert_close(model(**batch()).loss, eager[0].loss, rtol=bound, atol=bound)
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_dispatched_model_keeps_its_hooks(order):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = make(), batch()
    own = model(**inputs).loss
    parts = {"model": "cpu", "lm_head": "cpu"}
    if order == "before":
        fuse_head(model)
    accelerate.dispatch_model(model, parts, force_hooks=True)
    before = dict(vars(model))
    fuse_head(model, outputs=["entropy"])
    assert hasattr(model.forward, "__wrapped__")  # accelerate's
    seen = []
    model._hf_hook.post_forward = lambda module, out: seen.append(out) or out
    got = model(**inputs)
    same_loss(got.loss, own)
    assert seen == [got]
    assert got.entropy is not None
    assert torch.equal(copy.deepcopy(model)(**inputs).loss, got.loss)
    unfuse_head(model)
    assert hasattr(model(**inputs), "logits")
    if order == "after":
        assert vars(model) == before
    accelerate.hooks.remove_hook_from_module(model)
    assert model.forward == transformers.LlamaForCausalLM.forward.__get__(model)


def test_an_offloaded_head_is_refused_when_fused_or_called():
    accelerate = pytest.importorskip("accelerate")
    first, second = make(), fuse_head(make())
    for model in (first, second):
        accelerate.cpu_offload(model, "cpu")
    with pytest.raises(NotImplementedError, match="offloaded"):
        fuse_head(first)
    with pytest.raises(NotImplementedError, match="offloaded"):
        second(**batch())


def test_bfloat16_autocast_and_a_wider_head():
    inputs = batch()
    eps = torch.finfo(torch.bfloat16).eps
    for name in ("llama", "gemma2 (softcap)"):
        model = make(name).bfloat16()
        own = model(**inputs)
        # The model rounds its logits, and the op the products it sums: each an eps of the largest logit.
        bound = 2 * eps * own.logits.float().abs().max().item()
        got = fuse_head(model)(**inputs)
        assert got.loss.dtype == got.logps.dtype == torch.float32
        torch.testing.assert_close(got.loss, own.loss, rtol=0, atol=bound)
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        own = model(**inputs)
        got = fuse_head(model)(**inputs)
        torch.testing.assert_close(got.loss, own.loss.float(), rtol=0, atol=2 * eps * own.logits.abs().max().item())
    got.loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32

    model = make().bfloat16()
    model.lm_head.float()
    hidden = model.model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).last_hidden_state
    _, logps = own_logps(model.lm_head(hidden.float()), inputs["labels"])
    got = fuse_head(model)(**inputs)
    torch.testing.assert_close(got.logps, logps, rtol=0, atol=(32 + V) * torch.finfo(torch.float32).eps * 8)


def test_accelerates_mixed_precision_wraps_and_unwraps_it():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = make(), batch()
    fuse_head(model, outputs=["entropy"])
    expected = model(**inputs).loss
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    try:
        prepared = accelerator.prepare_model(model)
        got = prepared(**inputs)
        assert isinstance(got, TokenStatsOutput)
        assert got.label_mask.any()
        assert got.loss != expected
        fuse_head(model)
        assert prepared(**inputs).entropy is None
        unfuse_head(model)
        assert "logits" in prepared(**inputs)
        fuse_head(model, outputs=["entropy"])
        assert torch.equal(prepared(**inputs).loss, got.loss)
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert torch.equal(model(**inputs).loss, expected)
        unfuse_head(model)
        assert "forward" not in vars(model)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


def test_ddp_reduces_its_gradients(tmp_path):
    distributed = torch.distributed
    model, inputs = fuse_head(make()), batch()
    expected = gradients(model, model(**inputs).loss)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        model.zero_grad()
        wrapped(**inputs).loss.backward()
        close_gradients({name: p.grad for name, p in model.named_parameters()}, expected)
    finally:
        distributed.destroy_process_group()


def trained(tmp_path, fused, name, **options):
    """Losses of training, those of evaluation with and without predictions, and the predictions' shapes."""
    model = make(name).train()
    if fused:
        fuse_head(model, outputs=["entropy"])
    rows = [{k: v[i % B].tolist() for k, v in batch(length=L).items()} for i in range(8)]
    for i, row in enumerate(rows):  # micro-batches with different numbers of labels
        row["labels"] = [-100] * (3 + i % 4) + row["input_ids"][3 + i % 4 :]
    seen = []
    args = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=3,
        gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip

    def collate(items):
        width = max(len(item["input_ids"]) for item in items)
        return {key: torch.tensor([item[key][:width] for item in items]) for key in items[0]}

    def metrics(predicted):
        seen.append(predicted)
        return {}

    trainer = transformers.Trainer(
        model, args, train_dataset=rows, eval_dataset=rows, data_collator=collate, compute_metrics=metrics
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses.append(trainer.evaluate()["eval_loss"])
    trainer.compute_metrics = None
    losses.append(trainer.evaluate()["eval_loss"])
    return torch.tensor(losses), seen[0]


@pytest.mark.parametrize("name", ["llama", "mixtral (routers)"])
def test_the_trainer_of_transformers_trains_and_evaluates_as_without(tmp_path, name):
    own, _ = trained(tmp_path, False, name)
    got, predicted = trained(tmp_path, True, name)
    # A step by the sign of a gradient near zero may differ: Adam's first steps move it by the learning rate.
    torch.testing.assert_close(got, own, rtol=1e-4, atol=0)
    logps, entropy, targets = predicted.predictions[:3]
    assert logps.shape == entropy.shape == targets.shape == (8, L - 1)
    assert (targets == predicted.label_ids[:, 1:]).all()
    assert (logps[targets == -100] == 0).all()
    torch.testing.assert_close(own[-1], own[-2])


class OtherLoss(transformers.LlamaForCausalLM):
    def loss_function(self, logits, labels, vocab_size, **kwargs):
        return super().loss_function(logits, labels, vocab_size, **kwargs) + 0.1


class NoLabels(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        return super().forward(input_ids, attention_mask, use_cache=use_cache)


def test_what_cannot_be_fused_is_refused_in_words():
    config = transformers.LlamaConfig(**SMALL)
    with pytest.raises(NotImplementedError, match="loss of OtherLoss is not the mean"):
        fuse_head(OtherLoss(config))
    with pytest.raises(NotImplementedError, match="no parameter 'labels'"):
        fuse_head(NoLabels(config))
    model = make()
    with pytest.raises(ValueError, match="nonsense"):
        fuse_head(model, outputs=["nonsense"])
    with pytest.raises(ValueError, match="temperature"):
        fuse_head(model, temperature=0.0)
    with pytest.raises(TypeError, match="causal LM"):
        fuse_head(nn.Linear(2, 2))
    assert "forward" not in vars(model)
    model.forward = lambda **inputs: None
    with pytest.raises(NotImplementedError, match="was replaced"):
        fuse_head(model)
    del model.forward
    fuse_head(model)
    inputs = batch()
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**inputs, logits_to_keep=1)
    with pytest.raises(NotImplementedError, match="ignore_index"):
        model(**inputs, ignore_index=0)
    with pytest.raises(ValueError, match="labels must be"):
        model(**{**inputs, "labels": inputs["labels"][:, 1:]})
