"""Under PEFT's adapters, on the layers and on the head, log-probs and gradients are those of PEFT's own forward."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
import transformers

from prefcore.data import PackedCollator, PairDataset, pack
from prefcore.hf import PreferenceTrainer, _peft, find_head, head, response_logps, score

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": ("LlamaConfig", {}),
    "tied": ("Qwen3Config", {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "softcap": (
        "Gemma3TextConfig",
        {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 2.0, "sliding_window": 8},
    ),
    "bias": ("PhiConfig", {}),
    "scale": ("CohereConfig", {"logit_scale": 0.25}),
}


def make(kind="llama", seed=0):
    config, special = KINDS[kind]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**{**SMALL, **special}), attn_implementation="eager"
    )
    for parameter in model.parameters():  # far from the initial values, so that nothing is negligible
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def stir(model, seed=1):
    """Give every adapter something to say: as initialised, most say nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "lokr_", "hada_", "ia3_", "modules_to_save", "vera_", "trainable")):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.data.add_(0.3 * noise)
    return model


def adapted(config, kind="llama", dtype=torch.float64):
    return stir(peft.get_peft_model(make(kind), config).to(dtype)).eval()


def lora(*targets, r=2, **settings):
    return peft.LoraConfig(r=r, target_modules=list(targets), **settings)


def examples(pairs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(3, 61, (int(torch.randint(1, 7, (1,), generator=generator)),), generator=generator)
    return [draw().tolist() for _ in range(pairs)], [[draw().tolist(), draw().tolist()] for _ in range(pairs)]


def own_logps(model, batch):
    """Of each response of a padded batch, from the logits of the model's own forward."""
    layout = batch.layout
    ids = batch.input_ids.view(-1, layout.width)
    logits = model(input_ids=ids, attention_mask=layout.padding_mask(ids.device)).logits.flatten(0, 1)
    logps = logits[batch.rows].log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return torch.stack([part.sum() for part in logps.split(batch.cu_seqlens.diff().tolist())])


def gradients(model, logps):
    model.zero_grad()
    logps.backward(torch.linspace(-1, 2, len(logps)).to(logps))
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_as_peft(model):
    """Values, and gradients of exactly the parameters that PEFT trains."""
    expected = own_logps(model, pack(*examples(), sharing="off"))
    theirs = gradients(model, expected)
    got = response_logps(model, pack(*examples(), sharing="off"))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    mine = gradients(model, got)
    assert mine.keys() == theirs.keys()
    assert mine.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in theirs.items():
        # The models' own norms run in float32, in float64 models too: padding changes their roundings.
        error = (mine[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-6)
        assert error < 8 * torch.finfo(torch.float32).eps, (name, error)
    return got.detach()


LAYERS = ["q_proj", "v_proj", "down_proj"]
ON_LAYERS = {
    "lora": lora(*LAYERS, lora_dropout=0.5),
    "rank-stabilised lora": lora(*LAYERS, r=4, use_rslora=True, lora_alpha=3),
    "dora": lora(*LAYERS, use_dora=True),
    "lora with biases": lora("q_proj", lora_bias=True),
    "lora of the embeddings": lora("embed_tokens", "q_proj"),
    "all linear": peft.LoraConfig(r=2, target_modules="all-linear"),
    "one layer": lora("q_proj", "v_proj", layers_to_transform=[1]),
    "loha": peft.LoHaConfig(r=2, target_modules=LAYERS),
    "lokr": peft.LoKrConfig(r=2, target_modules=LAYERS),
    "ia3": peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "norms too": lora("q_proj", modules_to_save=["norm"]),
    "new tokens": lora("q_proj", trainable_token_indices=[5, 7]),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", ON_LAYERS)
def test_adapters_on_the_layers_give_pefts_own_values_and_gradients(name):
    model = adapted(ON_LAYERS[name])
    assert not find_head(model).adapters
    with_adapters = assert_as_peft(model)
    with model.disable_adapter():
        without = response_logps(model, pack(*examples(), sharing="off"))
        torch.testing.assert_close(without, own_logps(model, pack(*examples(), sharing="off")), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(without, with_adapters)
    prompts, responses = examples()
    scored = torch.cat(score(model, prompts, responses).logps)
    torch.testing.assert_close(scored, with_adapters.float(), rtol=1e-5, atol=1e-5)


ON_HEAD = {
    "lora": ("llama", lora("q_proj", "lm_head")),
    "the head alone": ("llama", lora("lm_head", r=5)),
    "dropout": ("llama", lora("q_proj", "lm_head", lora_dropout=0.5)),
    "rank-stabilised": ("softcap", lora("q_proj", "lm_head", r=4, use_rslora=True, lora_alpha=3)),
    "tied": ("tied", lora("q_proj", "lm_head")),
    "both tied": ("tied", lora("embed_tokens", "lm_head", "q_proj", ensure_weight_tying=True)),
    "its own bias": ("bias", lora("q_proj", "lm_head")),
    "adapters' bias": ("bias", lora("lm_head", lora_bias=True, lora_alpha=6)),
    "a bias where none was": ("llama", lora("lm_head", lora_bias=True)),
    "scale": ("scale", lora("v_proj", "lm_head")),
    "trained whole": ("llama", lora("q_proj", modules_to_save=["lm_head"])),
    "trained whole, with a bias": ("bias", lora("q_proj", modules_to_save=["lm_head"])),
    "trained whole beside loha": (
        "llama",
        peft.LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", ON_HEAD)
def test_adapters_of_the_head_give_pefts_own_values_and_gradients(name):
    kind, config = ON_HEAD[name]
    model = adapted(config, kind)
    with_adapters = assert_as_peft(model)
    with model.disable_adapter():
        without = response_logps(model, pack(*examples(), sharing="off"))
        torch.testing.assert_close(without, own_logps(model, pack(*examples(), sharing="off")), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(without, with_adapters)


def padded():
    return pack(*examples(), sharing="off")


def assert_same_values(model):
    with torch.no_grad():
        expected = own_logps(model, padded())
        torch.testing.assert_close(response_logps(model, padded()), expected, rtol=1e-9, atol=1e-9)
    return expected


def three_adapters():
    """The first two on the head, with ranks, scalings and dropouts of their own, the third on a layer alone."""
    model = peft.get_peft_model(make("bias"), lora("lm_head", "q_proj", lora_dropout=0.3), "first")
    model.add_adapter("second", lora("lm_head", r=5, lora_alpha=3, use_rslora=True, lora_bias=True))
    model.add_adapter("third", lora("q_proj"))
    return stir(model.double()).eval()


@pytest.mark.quick
def test_the_head_is_that_of_the_adapters_in_use_now():
    model = three_adapters()
    seen = []
    for active in ("first", "second", "third", ["first", "second"], ["second", "third", "first"]):
        model.base_model.set_adapter(active)
        seen.append(assert_same_values(model))
    assert_as_peft(model)
    with model.disable_adapter():
        seen.append(assert_same_values(model))
    for one in range(len(seen) - 1):
        different = [not torch.allclose(seen[one], other) for other in seen[one + 1 :]]
        assert all(different), (one, different)

    # Merged adapters are in the weight, alone or beside one that is not; unmerged again they are added.
    model.base_model.set_adapter(["first", "second"])
    model.merge_adapter(["first"])
    first = assert_same_values(model)
    torch.testing.assert_close(first, seen[0], rtol=1e-9, atol=1e-9)  # as PEFT has it, the other one is left out
    model.unmerge_adapter()
    model.merge_adapter()
    torch.testing.assert_close(assert_same_values(model), seen[3], rtol=1e-9, atol=1e-9)
    # PEFT unmerges in the forward of disabled adapters; the head is found before any forward here.
    with model.disable_adapter():
        torch.testing.assert_close(response_logps(model, padded()), seen[5], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(assert_same_values(model), seen[3], rtol=1e-9, atol=1e-9)
    model.delete_adapter("second")
    torch.testing.assert_close(assert_same_values(model), seen[0], rtol=1e-9, atol=1e-9)


def test_a_head_that_one_adapter_trains_whole_serves_the_others_as_it_was():
    model = peft.get_peft_model(make(), lora("q_proj", modules_to_save=["lm_head"]), "whole")
    model.add_adapter("layers", lora("q_proj"))
    model = stir(model.double()).eval()
    own = model.get_base_model().lm_head
    assert find_head(model).weight is own.modules_to_save["whole"].weight
    assert_as_peft(model)
    model.set_adapter("layers")
    assert find_head(model).weight is own.original_module.weight
    assert_as_peft(model)


def test_heads_are_probed_once_for_each_kind_of_adapter(monkeypatch):
    compared = []
    compare = head._compare
    monkeypatch.setattr(head, "_compare", lambda *args: compared.append(1) or compare(*args))
    model = three_adapters()
    for active in ("first", "second", "third", ["first", "second"]) * 2:
        model.base_model.set_adapter(active)
        find_head(model)
        with model.disable_adapter():
            find_head(model)
    # One without bias, one with, two; no adapter on the head, which is the third one's, is disabled too.
    assert len(compared) == 4


@pytest.mark.parametrize("wrong", ["product", "bias"])
def test_the_probe_sees_adapters_that_add_nothing_yet(wrong, monkeypatch):
    model = peft.get_peft_model(make("bias"), lora("lm_head", lora_bias=wrong == "bias")).eval()  # B and its bias are 0
    assert not model.get_base_model().lm_head.lora_B.default.weight.any()
    find_head(model, probe=False)
    if wrong == "product":
        found = _peft._of_lora
        scaled = lambda *args: tuple(dataclasses.replace(adapter, scaling=0.7) for adapter in found(*args))
        monkeypatch.setattr(_peft, "_of_lora", scaled)
    else:
        operands = head.Head.operands
        unscaled = lambda self, hidden: (self.bias + self.adapters[0].bias, operands(self, hidden)[1])
        monkeypatch.setattr(head.Head, "operands", unscaled)
    with pytest.raises(NotImplementedError, match="the adapters of the head of PhiForCausalLM are not scaling"):
        find_head(model)


def test_adapters_that_are_scaled_to_nothing_pass_the_probe_in_16_bits():
    for dtype in (torch.float16, torch.bfloat16):
        assert find_head(stir(plain(lora("lm_head", lora_alpha=0)).to(dtype))).adapters


def test_adapters_in_float32_beside_a_head_of_16_bits_are_rounded_to_its_type_once():
    model = stir(peft.get_peft_model(make().bfloat16(), lora("lm_head", r=8, lora_alpha=16))).eval()
    head = find_head(model)
    (adapter,) = head.adapters
    assert (adapter.outer.dtype, adapter.down.weight.dtype) == (torch.float32,) * 2
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator).bfloat16()
    targets = torch.randint(61, (64,), generator=generator)
    inner, outer = adapter.inner(hidden).double(), adapter.outer.double()
    truth = hidden.double() @ head.weight.double().T + inner @ outer.T
    half = torch.finfo(torch.bfloat16).eps / 2
    # Each factor and the logit are rounded once; a log-prob has at most the errors of two logits.
    bound = 2 * half * (truth.abs() + 2.01 * inner.abs() @ outer.abs().T).amax(1)
    logps = head.stats(hidden, targets).logps
    assert ((logps - truth.log_softmax(-1).gather(1, targets[:, None])[:, 0]).abs() < bound).all()
    grads = torch.autograd.grad(logps.sum(), [adapter.outer, adapter.down.weight])
    assert [g.dtype for g in grads] == [torch.float32] * 2
    expected = torch.autograd.grad(
        model.get_base_model().lm_head(hidden).float().log_softmax(-1).gather(1, targets[:, None]).sum(),
        [adapter.outer, adapter.down.weight],
    )
    for got, theirs in zip(grads, expected, strict=True):  # of 64 rows, so that roundings average out
        assert F.cosine_similarity(got.flatten(), theirs.flatten(), dim=0) > 0.999


def test_autocast_takes_the_heads_adapters_along():
    model = adapted(lora("q_proj", "lm_head"), dtype=torch.float32)
    exact = response_logps(model, padded())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = own_logps(model, padded()).float(), response_logps(model, padded())
    assert mine.dtype == torch.float32
    assert (mine - exact).norm() < 2 * (theirs - exact).norm()


def test_gradients_reach_the_heads_adapters_and_nothing_of_the_heads_size():
    model = adapted(lora("lm_head"))
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(x))
            return result

    head = find_head(model)
    hidden = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    with Watch():
        head.stats(hidden, torch.tensor([1, 2, 3])).logps.sum().backward()
    assert head.weight.grad is None
    assert max(largest) < head.weight.numel()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if "lora" in n
    }


def plain(config, kind="llama"):
    return peft.get_peft_model(make(kind), config)


REFUSED = {
    "dora": (
        lambda: plain(lora("lm_head", use_dora=True)),
        "adapter 'default' of the head of LlamaForCausalLM is Dora",
    ),
    "loha": (lambda: plain(peft.LoHaConfig(target_modules=["lm_head"])), "loha.*leave it out of PEFT's target_modules"),
    "tokens": (
        lambda: plain(lora("q_proj", trainable_token_indices=[3]), "tied"),
        "TrainableTokensWrapper.*leave it out of PEFT's trainable_token_indices",
    ),
    "activated": (lambda: plain(lora("q_proj", alora_invocation_tokens=[5])), "activated LoRA"),
    "prompt": (lambda: plain(peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")), "virtual tokens"),
    "prefix": (lambda: plain(peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")), "virtual tokens"),
    "p-tuning": (
        lambda: plain(peft.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
        "virtual tokens",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_head_or_the_input_become_otherwise_is_refused_everywhere(name, tmp_path):
    make_it, text = REFUSED[name]
    model = make_it()
    calls = [
        lambda: find_head(model),
        lambda: find_head(model, probe=False),
        lambda: response_logps(model, padded()),
        lambda: score(model, *examples()),
        lambda: PreferenceTrainer(model, arguments(tmp_path), make_pairs(2)),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=text):
            call()


def test_hooks_on_the_heads_adapters_are_refused():
    for part in ("lora_A", "lora_B"):
        model = plain(lora("lm_head"))
        getattr(model.get_base_model().lm_head, part).default.register_forward_hook(lambda *_: None)
        with pytest.raises(NotImplementedError, match="forward hooks"):
            find_head(model)


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_head_that_trains_beside_its_lora_is_refused_before_a_step_and_scored(kind):
    model = adapted(lora("lm_head", "q_proj"), kind)
    model.get_input_embeddings().weight.requires_grad_()
    if kind == "llama":
        assert_as_peft(model)
        model.get_base_model().lm_head.base_layer.weight.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"own weight .* trains beside it"):
        find_head(model)
    assert_same_values(model)


def test_mixed_adapters_and_those_of_transformers_itself_are_served():
    mixed = peft.get_peft_model(make(), lora("q_proj", "lm_head"), mixed=True)
    mixed.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["v_proj"]))
    mixed.set_adapter(["default", "other"])
    stir(mixed.double())
    assert find_head(mixed).adapters
    assert_as_peft(mixed)
    bare = make()
    bare.add_adapter(lora("q_proj", "lm_head"))
    stir(bare.double())
    assert find_head(bare).adapters
    assert_as_peft(bare)


def test_a_saved_adapter_gives_the_same_scores(tmp_path):
    for config in (lora("q_proj", "lm_head", use_rslora=True), lora("q_proj", modules_to_save=["lm_head"])):
        model = stir(plain(config)).eval()
        expected = response_logps(model, padded())
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
        assert torch.equal(response_logps(loaded, padded()), expected)
        if not config.modules_to_save:
            merged = response_logps(loaded.merge_and_unload(), padded())
            torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


# The trainer


def make_pairs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (count, 3), generator=generator).tolist()
    draw = lambda n: torch.randint(3, 61, (n,), generator=generator).tolist()
    return PairDataset([tuple(draw(n) for n in row) for row in sizes])


def arguments(path, **changes):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "save_strategy": "no",
    }
    return transformers.TrainingArguments(str(path), **{**settings, **changes})


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def train_by_hand(model, reference, pairs, steps=2, rate=0.1, beta=0.1):
    """DPO by plain gradient descent, from logits of the models' own forwards."""
    (batch,) = PackedCollator("off")([pairs[i] for i in range(len(pairs))])
    losses = []
    with torch.no_grad():
        ref_chosen, ref_rejected = own_logps(reference, batch).view(-1, 2).unbind(1)
    for _ in range(steps):
        chosen, rejected = own_logps(model, batch).view(-1, 2).unbind(1)
        loss = F.softplus(beta * (rejected - ref_rejected - chosen + ref_chosen)).mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
        losses.append(loss.item())
    return losses


def assert_trained_alike(trainer, model, expected, losses):
    assert [entry["loss"] for entry in trainer.state.log_history[:2]] == pytest.approx(losses, rel=1e-5)
    got = trained(model)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-5, atol=2e-6, msg=name)


TRAINED = {
    "layers": lambda: plain(lora("q_proj", lora_dropout=0.5)),
    "dora": lambda: plain(lora("q_proj", "down_proj", use_dora=True)),
    "lokr": lambda: plain(peft.LoKrConfig(r=2, target_modules=["q_proj"])),
    "head": lambda: plain(lora("q_proj", "lm_head", lora_dropout=0.5, use_rslora=True)),
    "head, bias": lambda: plain(lora("lm_head", lora_bias=True), "bias"),
    "head, softcap": lambda: plain(lora("lm_head"), "softcap"),
    "whole head": lambda: plain(lora("q_proj", modules_to_save=["lm_head"])),
}


@pytest.mark.parametrize("name", TRAINED)
def test_two_steps_are_those_of_a_plain_loop(name, tmp_path):
    pairs = make_pairs(4)
    torch.manual_seed(1)
    model = stir(TRAINED[name]())
    before = trained(model)
    hand = copy.deepcopy(model).eval()
    reference = copy.deepcopy(model).eval()
    with reference.disable_adapter():
        losses = train_by_hand(hand, reference, pairs)
    # Checkpointed layers run again in the backward pass, after the reference with its adapters off has run.
    settings = {"gradient_checkpointing": True} if name == "head" else {}
    trainer = PreferenceTrainer(model, arguments(tmp_path, **settings), pairs)
    trainer.train()
    assert_trained_alike(trainer, model, trained(hand), losses)
    assert any(not torch.equal(before[n], p) for n, p in trained(model).items())


def with_reference(name, config=None):
    model = peft.get_peft_model(make(), config or lora("q_proj", "lm_head"))
    model.add_adapter("second", lora("v_proj", *([] if config else ["lm_head"])))
    model.add_adapter(name, config or lora("q_proj", "lm_head", r=3))
    return stir(model)


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("name", ["ref", "anchor"])
def test_a_named_adapter_is_the_reference(name, precomputed, tmp_path):
    pairs = make_pairs(4)
    model = with_reference(name)
    hand, reference = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    reference.set_adapter(name)
    losses = train_by_hand(hand, reference, pairs)
    own = {} if name == "ref" else {"ref_adapter": name}  # TRL's name needs no mention
    trainer = PreferenceTrainer(
        model, arguments(tmp_path), pairs, sharing="off", precompute_reference=precomputed, **own
    )
    trainer.train()
    assert_trained_alike(trainer, model, trained(hand), losses)
    after, before = dict(model.named_parameters()), dict(reference.named_parameters())
    kept = [n for n in after if f".{name}." in n]
    assert kept
    assert all(torch.equal(after[n], before[n]) for n in kept)


def test_a_reference_that_is_active_is_no_reference_by_itself(tmp_path):
    pairs, model = make_pairs(4), with_reference("ref")
    model.set_adapter("ref")  # trained, and so the reference is the model without adapters
    hand, reference = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    with reference.disable_adapter():
        losses = train_by_hand(hand, reference, pairs)
    trainer = PreferenceTrainer(model, arguments(tmp_path), pairs, sharing="off")
    trainer.train()
    assert_trained_alike(trainer, model, trained(hand), losses)


def state_of(model):
    layers = {
        n: (m.active_adapters, m.disable_adapters, list(getattr(m, "merged_adapters", [])))
        for n, m in model.named_modules()
        if hasattr(m, "active_adapters") and hasattr(m, "disable_adapters") and not callable(m.disable_adapters)
    }
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    return layers, flags, modes, model.active_adapters, model.active_adapter


@pytest.mark.parametrize("adapter", [None, "ref"])
@pytest.mark.parametrize("active", ["default", ["default", "second"]])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_after_the_reference_the_adapters_are_as_they_were(adapter, active, saved, tmp_path):
    config = lora("q_proj", modules_to_save=saved) if saved else None
    model = with_reference("ref", config)
    model.base_model.set_adapter(active)
    for name, parameter in model.named_parameters():
        # As LoRA-FA has it; and something of the model itself that trains.
        parameter.requires_grad_((parameter.requires_grad and "lora_A" not in name) or name.endswith("norm.weight"))
    model.train()
    model.get_base_model().model.layers[0].eval()
    before = state_of(model)
    with _peft.switched(model, adapter), torch.no_grad():
        inside = response_logps(model, padded())
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="of the user"), _peft.switched(model, adapter):
        raise RuntimeError("of the user")
    assert state_of(model) == before

    trainer = PreferenceTrainer(model, arguments(tmp_path), make_pairs(4), disable_dropout=False)
    with trainer._frozen("ref"):
        assert not any(module.training for module in model.modules())
    assert state_of(model)[:3] == before[:3]
    with pytest.raises(ValueError, match="x"), trainer._frozen("ref"):
        raise ValueError("x")
    assert state_of(model)[:3] == before[:3]
    if adapter is None:
        with model.disable_adapter():
            expected = own_logps(model, padded())
    else:
        model.set_adapter(adapter)
        expected = own_logps(model, padded())
    torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-5)


def test_a_named_reference_is_itself_while_the_user_has_the_adapters_disabled(tmp_path):
    model = with_reference("ref")
    trainer = PreferenceTrainer(model, arguments(tmp_path), make_pairs(4), sharing="off")
    model.set_adapter("ref")
    expected = own_logps(model, padded())
    model.set_adapter("default")
    with model.disable_adapter():
        before, base = state_of(model), own_logps(model, padded())
        with trainer._frozen("ref") as reference:
            inside = response_logps(reference, padded())
        assert state_of(model) == before
        torch.testing.assert_close(response_logps(model, padded()), base, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-5)


def test_a_reference_that_is_activated_or_deleted_after_the_trainer_was_made_is_refused(tmp_path):
    model = with_reference("anchor")
    trainer = PreferenceTrainer(model, arguments(tmp_path), make_pairs(4), sharing="off", ref_adapter="anchor")
    model.set_adapter("anchor")
    with pytest.raises(ValueError, match="ref_adapter='anchor' is active, so that it would be trained"):
        trainer.train()
    model.set_adapter("default")
    model.delete_adapter("anchor")
    with pytest.raises(ValueError, match=r"ref_adapter='anchor': the model has 'default', 'second'$"):
        trainer.train()


def test_references_that_cannot_be_are_refused(tmp_path):
    pairs = make_pairs(2)

    def build(model, **settings):
        return PreferenceTrainer(model, arguments(tmp_path), pairs, **settings)

    with pytest.raises(ValueError, match="ref_adapter='gone': the model has 'default', 'second', 'ref'"):
        build(with_reference("ref"), ref_adapter="gone")
    with pytest.raises(ValueError, match="the model is no PeftModel"):
        build(make(), ref_adapter="ref")
    with pytest.raises(ValueError, match="ref_adapter='default' is active"):
        build(with_reference("ref"), ref_adapter="default")
    with pytest.raises(ValueError, match="two references"):
        build(with_reference("ref"), ref_adapter="ref", ref_model=make())
    with pytest.raises(ValueError, match="needs no reference; leave ref_adapter out"):
        build(with_reference("ref"), ref_adapter="ref", loss="simpo", loss_args={"gamma": 1.0})


def test_kl_of_whole_distributions_is_that_of_logits(tmp_path):
    pairs = make_pairs(4)
    (batch,) = PackedCollator("off")([pairs[i] for i in range(len(pairs))])
    for model, disabled in (
        (stir(plain(lora("q_proj", modules_to_save=["lm_head"]))), True),
        (stir(plain(lora("q_proj", "lm_head"))), True),
        (stir(plain(lora("lm_head", lora_bias=True), "bias")), True),
        (with_reference("ref"), False),
    ):
        trainer = PreferenceTrainer(model, arguments(tmp_path), pairs, loss="tdpo2", sharing="off")
        model.double()
        with _peft.switched(model, None if disabled else "ref"), torch.no_grad():
            ids, mask = batch.input_ids.view(-1, batch.layout.width), batch.layout.padding_mask(batch.input_ids.device)
            reference = model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1)[batch.rows].log_softmax(-1)
        own = model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1)[batch.rows].log_softmax(-1)
        expected = (reference.exp() * (reference - own)).sum(-1)
        theirs = gradients(model, expected)
        policy, ref_logps = trainer._run_policy(model, batch)
        torch.testing.assert_close(policy.kl_values, expected, rtol=1e-9, atol=1e-9)
        chosen = reference.gather(1, batch.targets[:, None])[:, 0]
        torch.testing.assert_close(ref_logps, chosen, rtol=1e-9, atol=1e-9)
        mine = gradients(model, policy.kl_values)
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def _worker(rank, path):
    pairs, model = make_pairs(4), with_reference("ref")
    trainer = PreferenceTrainer(
        model,
        arguments(path, per_device_train_batch_size=2, ddp_backend="gloo", gradient_checkpointing=True),
        pairs,
        sharing="off",
    )
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    torch.save(trained(model), path / f"trained{rank}.pt")


def test_two_processes_train_the_heads_adapters_as_one_does(two_ranks):
    folder = two_ranks(_worker, timeout=300)
    pairs, model = make_pairs(4), with_reference("ref")
    reference = copy.deepcopy(model).eval()
    reference.set_adapter("ref")
    train_by_hand(model.eval(), reference, pairs)
    expected = trained(model)
    for rank in (0, 1):
        got = torch.load(folder / f"trained{rank}.pt")
        assert got.keys() == expected.keys()
        for name in got:
            torch.testing.assert_close(got[name], expected[name], rtol=2e-5, atol=2e-6, msg=name)
