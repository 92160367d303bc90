"""``prefcore.trl.DPOTrainer`` and ``GRPOTrainer`` compute what TRL's own do, and run each prompt once."""

import inspect

import pytest
import torch

from prefcore import losses

trl = pytest.importorskip("trl", reason="TRL's trainers are tested where it is installed: the extra parity")

# Roundings of a hidden state that two ways through the backbone need not share, in units of eps: in each of 2 layers
# sums of 16 (two norms; queries, keys, values; the output's) and 24 (the MLP's) products and of up to 32 attended
# tokens, and a sum of 16 for the last norm. The harness counts those of the head and of the losses.
BACKBONE = 2 * (2 * 16 + 16 + 16 + 8 + 32 + 16 + 24) + 16


@pytest.fixture(scope="module")
def packed():
    import prefcore.trl

    return prefcore.trl


@pytest.fixture(scope="module")
def reference(harness, tmp_path_factory):
    """Folders of references by the kind of their model."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = harness.save_reference(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


@pytest.fixture
def dpo(harness, reference, tmp_path):
    """A function that makes a trainer of a class."""

    def make(cls, kind="llama", *, model=None, data=None, extras=None, **options):
        model = harness.make_model(kind) if model is None else model
        return cls(
            harness.with_reference(model, reference(kind)),
            args=harness.arguments(trl.DPOConfig, tmp_path, **options),
            train_dataset=harness.preferences() if data is None else data,
            processing_class=harness.make_tokenizer(),
            **(extras or {}),
        )

    return make


def reward(completions, **_):
    return [float(len(text) % 5) for text in completions]


@pytest.fixture
def grpo(harness, reference, tmp_path):
    def make(cls, kind="llama", *, model=None, extras=None, **options):
        settings = {
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": 8,
            "beta": 0.1,
            **options,
        }
        trainer = cls(
            harness.with_reference(harness.make_model(kind) if model is None else model, reference(kind)),
            reward,
            args=harness.arguments(trl.GRPOConfig, tmp_path, **settings),
            train_dataset=harness.prompts(),
            processing_class=harness.make_tokenizer(),
            **(extras or {}),
        )
        harness.stub_generation(trainer.accelerator.unwrap_model(trainer.model))
        return trainer

    return make


def assert_equal_runs(harness, make, ours, theirs):
    mine, other = (harness.run(lambda cls=cls: make(cls)) for cls in (ours, theirs))
    harness.assert_same(mine, other, tokens=64 + BACKBONE)


class Count:
    """What a model's backbone and head are given: tokens of each forward pass."""

    def __init__(self, model):
        self.inputs = []
        model.get_input_embeddings().register_forward_pre_hook(self.seen)

    def seen(self, module, args):
        self.inputs.append(args[0].flatten().tolist())


def padded(rows, width=12):
    """``[B, L]`` ids, mask and labels of (padding before, prompt, response, which of it is scored)."""
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (before, prompt, response, scored) in enumerate(rows):
        whole = torch.tensor([*prompt, *response])
        ids[i, before : before + len(whole)] = whole
        mask[i, before : before + len(whole)] = 1
        start = before + len(prompt)
        marks = torch.tensor(scored, dtype=torch.bool)
        labels[i, start : start + len(response)] = torch.tensor(response).masked_fill(~marks, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


ROWS = [
    (2, [7, 8, 9], [10, 11, 12, 13], [1, 1, 1, 1]),
    (0, [7, 8, 9], [10, 14], [1, 1]),  # the same prompt, padded on the right
    (4, [20, 21], [22, 23, 24, 25, 26], [1, 0, 0, 1, 1]),  # tokens of a tool within
    (1, [7, 8, 9], [30, 31], [0, 0]),  # nothing is scored
    (3, [20, 21], [], []),  # an empty response
    (6, [7, 8, 9], [40, 41, 1], [1, 1, 0]),  # the last is not scored
]


@pytest.mark.parametrize("kind", ["llama", "softcap", "bias"])
def test_a_padded_batch_has_the_fields_of_trls_own_forward(harness, packed, dpo, kind):
    batch = padded(ROWS)
    outputs = []
    for cls in (packed.DPOTrainer, trl.DPOTrainer):
        model = dpo(cls, kind, use_weighting=True).model
        out = model(**batch, fused_lm_head=True)
        (out.log_probs * torch.linspace(-1, 2, 11)).sum().backward()
        outputs.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (mine, grads), (theirs, other_grads) = outputs
    bound = torch.finfo(torch.float32).eps * harness.roundings(len(ROWS) * 11 + BACKBONE)
    for name in ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        scale = max(1.0, theirs[name].abs().max().item())
        assert mine[name].dtype == theirs[name].dtype
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=bound * scale, msg=name)
    for name in ("is_top1", "label_mask"):
        assert torch.equal(mine[name], theirs[name]), name
    largest = max(grad.abs().max().item() for grad in other_grads.values())
    for name, grad in other_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=bound * largest, msg=name)


def test_each_prompt_runs_once_and_only_scored_tokens_meet_the_head(packed, dpo):
    trainer = dpo(packed.DPOTrainer)
    count = Count(trainer.model)
    trainer.model(**padded(ROWS), fused_lm_head=True)
    assert count.inputs == [[7, 8, 9, 10, 11, 12, 13, 10, 14, 40, 41, 1, 20, 21, 22, 23, 24, 25, 26]]
    counts = trainer.packed
    assert (counts.batches, counts.unpacked_batches) == (1, 0)
    assert (counts.padded_tokens, counts.tokens, counts.scored_tokens) == (6 * 12, 19, 4 + 2 + 3 + 2)


def test_a_batch_without_a_scored_token_has_zeros_with_a_gradient(packed, dpo):
    trainer = dpo(packed.DPOTrainer)
    count = Count(trainer.model)
    out = trainer.model(**padded([ROWS[3], ROWS[4]]), fused_lm_head=True)
    for field in (out.loss, out.log_probs, out.label_mask):
        assert not field.any()
    assert len(count.inputs[0]) == 2  # the shortest row stands for all
    out.loss.backward()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_mask_with_holes_is_left_to_trl(packed, dpo):
    batch = padded(ROWS)
    batch["attention_mask"][0, 5] = 0
    mine, theirs = (dpo(cls) for cls in (packed.DPOTrainer, trl.DPOTrainer))
    expected = theirs.model(**batch, fused_lm_head=True).log_probs
    assert torch.equal(mine.model(**batch, fused_lm_head=True).log_probs, expected)
    assert (mine.packed.batches, mine.packed.unpacked_batches) == (0, 1)


def test_an_input_that_cannot_be_packed_is_refused(packed, dpo):
    with pytest.raises(NotImplementedError, match="got pixel_values"):
        dpo(packed.DPOTrainer).model(**padded(ROWS), pixel_values=torch.zeros(1), fused_lm_head=True)


def test_a_changed_batch_is_packed_anew(packed, dpo):
    model = dpo(packed.DPOTrainer).model
    batch = padded(ROWS)
    first = model(**batch, fused_lm_head=True).log_probs
    batch["input_ids"][0, 5] = 50
    assert not torch.equal(model(**batch, fused_lm_head=True).log_probs, first)


def test_generation_and_logits_are_the_models_own(harness, packed, dpo):
    model, plain = dpo(packed.DPOTrainer).model, harness.make_model()
    batch = padded(ROWS[:1])
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    settings = {"max_new_tokens": 3, "do_sample": False}
    inputs = {"input_ids": batch["input_ids"][:, 2:9]}
    assert torch.equal(model.generate(**inputs, **settings), plain.generate(**inputs, **settings))


DPO_RUNS = {
    "sigmoid": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "loss_type": "robust"},
    "several losses": {"loss_type": ["ipo", "sft", "aot"], "loss_weights": [1.0, 0.3, 0.5], "label_smoothing": 0.1},
    "ld_alpha and weighting": {"ld_alpha": 0.3, "use_weighting": True, "f_divergence_type": "js_divergence"},
    "precomputed": {"precompute_ref_log_probs": True, "loss_type": "apo_zero"},
    "checkpointing": {"gradient_checkpointing": True},
    "keep_end": {"max_length": 6, "truncation_mode": "keep_end"},
    "softcap": {"kind": "softcap", "loss_type": "sppo_hard"},
}


@pytest.mark.parametrize("name", DPO_RUNS)
def test_dpo_trains_as_trls(harness, packed, dpo, name, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    options = DPO_RUNS[name]

    def make(cls):
        # A policy that is its own reference has margins of rounding errors.
        own = {"extras": {"ref_model": harness.make_model(seed=1)}} if name == "precomputed" else {}
        return dpo(cls, **options, **own)

    assert_equal_runs(harness, make, packed.DPOTrainer, trl.DPOTrainer)


@pytest.mark.parametrize(("own", "checkpointing"), [(False, True), (True, False)])
def test_dpo_trains_an_adapter_as_trls(harness, packed, dpo, own, checkpointing):
    def make(cls):
        options = {"gradient_checkpointing": checkpointing, "learning_rate": 1.0}
        if own:  # the adapter as it comes is the reference, TRL copies it
            return dpo(cls, model=harness.with_adapter(harness.make_model()), **options)
        return dpo(cls, extras={"peft_config": harness.lora()}, **options)

    assert_equal_runs(harness, make, packed.DPOTrainer, trl.DPOTrainer)


def test_dpo_packs_the_references_and_the_precomputed_ones_too(packed, dpo, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    trainer = dpo(packed.DPOTrainer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.compute_loss(trainer.model, batch)
    once = trainer.packed.tokens
    assert trainer.packed.batches == 2
    prompts = [len(trainer.train_dataset[i]["prompt_ids"]) for i in range(4)]
    assert once == 2 * (batch["attention_mask"].sum().item() - sum(prompts))
    assert dpo(packed.DPOTrainer, precompute_ref_log_probs=True).packed.batches == 2


def test_dpo_trains_evaluates_and_saves(harness, packed, dpo, tmp_path):
    import transformers

    seen = []

    def make():
        trainer = dpo(
            packed.DPOTrainer,
            loss_type=["sigmoid", "simpo"],
            loss_weights=[1.0, 0.1],
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=3,
            max_steps=3,
            extras={
                "eval_dataset": harness.preferences(4),
                "compute_metrics": lambda made: {"width": made.predictions.shape[-1]},
                "loss_args": {"gamma": 0.3},
            },
        )
        seen.append(trainer)
        return trainer

    trace = harness.run(make)
    logged = {name for step in trace.metrics for name in step}
    assert {"rewards/margins", "eval_rewards/margins", "eval_loss", "logps/chosen"} <= logged
    widths = {step["eval_width"] for step in trace.metrics if "eval_width" in step}
    assert widths == {harness.VOCABULARY}  # logits, of the model's own forward
    assert seen[0].evaluate(harness.preferences(2))["eval_loss"] > 0
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    for one, other in zip(saved.parameters(), seen[0].model.parameters(), strict=True):
        assert torch.equal(one, other)


def dense(model, batch):
    """Per pair, of float64: log-probs ``[2P, L - 1]``, and which are scored."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    logp = logits[:, :-1].log_softmax(-1)
    mask = batch["completion_mask"][:, 1:]
    taken = logp.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * mask
    return taken, mask, (2 * logp).logsumexp(-1).detach() * mask


class Dense:
    """What losses are fed, by the dense log-probs of policy and reference."""

    def __init__(self, model, batch, reference):
        tokens, mask, self.squares = dense(model, batch)
        with torch.no_grad():
            ref_tokens = tokens * 0 if reference is None else dense(reference, batch)[0]
        self.tokens, self.ref_tokens, self.mask = tokens, ref_tokens, mask.bool()
        self.pairs = len(tokens) // 2
        self.order = torch.arange(2 * self.pairs).view(2, -1).T.flatten()
        self.chosen, self.rejected = tokens.sum(1).chunk(2)
        self.ref_chosen, self.ref_rejected = ref_tokens.sum(1).chunk(2)
        lengths = mask.sum(1)
        self.lengths = dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True))
        self.cu_seqlens = torch.tensor([0, *lengths[self.order]]).cumsum(0).to(torch.int32)
        self.groups = torch.arange(0, 2 * self.pairs + 1, 2, dtype=torch.int32)
        self.labels = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(self.pairs)

    def scores(self, beta):
        return beta * (self.tokens.sum(1) - self.ref_tokens.sum(1))[self.order]

    def flat(self, padded):
        return padded[self.order][self.mask[self.order]]


CATALOGUE = {
    "dpop": (
        {"lam": 3.0},
        lambda d: losses.dpop(d.chosen, d.rejected, d.ref_chosen, d.ref_rejected, beta=0.2, lam=3.0),
    ),
    "simpo": (
        {"gamma": 0.4},
        lambda d: losses.simpo(d.chosen, d.rejected, **d.lengths, beta=0.2, gamma=0.4),
    ),
    "lipo_lambda": ({}, lambda d: losses.lipo_lambda(d.scores(0.2), d.labels, d.groups)),
    "list_mle": ({}, lambda d: losses.list_mle(d.scores(0.2), d.labels, d.groups)),
    "ld_dpo": (
        {"alpha": 0.4},
        lambda d: losses.ld_dpo(d.flat(d.tokens), d.flat(d.ref_tokens), d.cu_seqlens, beta=0.2, alpha=0.4),
    ),
    "wpo": (
        {},
        lambda d: losses.wpo(
            d.flat(d.tokens), d.flat(d.ref_tokens), d.cu_seqlens, log_sum_sq_probs=d.flat(d.squares), beta=0.2
        ),
    ),
    "sft_nll": ({}, lambda d: losses.sft_nll(d.chosen)),
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_loss_of_the_catalogue_is_that_of_the_dense_log_probs(harness, packed, dpo, name):
    arguments, expected = CATALOGUE[name]
    trainer = dpo(packed.DPOTrainer, loss_type=name, beta=0.2, loss_weights=[0.7], extras={"loss_args": arguments})
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    parameters = dict(trainer.model.named_parameters())
    mine = trainer.compute_loss(trainer.model, batch)
    gradients = torch.autograd.grad(mine, list(parameters.values()))
    truth = 0.7 * expected(Dense(trainer.model, batch, trainer.ref_model)).mean()
    others = torch.autograd.grad(truth, list(parameters.values()))
    bound = torch.finfo(torch.float32).eps * harness.roundings(batch["completion_mask"].sum().item() + BACKBONE)
    torch.testing.assert_close(mine.double(), truth, rtol=bound, atol=bound)
    largest = max(grad.abs().max().item() for grad in others)
    assert largest > 0
    for key, one, other in zip(parameters, gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=bound * largest, msg=key)


def test_losses_of_both_add_up_by_their_weights(harness, packed, dpo):
    kinds = {"loss_type": ["ipo", "dpop", "sft"], "loss_weights": [0.5, 2.0, 0.3]}
    mixed = dpo(packed.DPOTrainer, **kinds, extras={"loss_args": {"lam": 1.0}})
    own = dpo(trl.DPOTrainer, loss_type=["ipo", "sft"], loss_weights=[0.5, 0.3])
    alone = dpo(packed.DPOTrainer, loss_type="dpop", extras={"loss_args": {"lam": 1.0}})
    batch = own.data_collator([own.train_dataset[i] for i in range(4)])
    values = [trainer.compute_loss(trainer.model, batch).item() for trainer in (mixed, own, alone)]
    bound = torch.finfo(torch.float32).eps * harness.roundings(64 + BACKBONE) * max(map(abs, values))
    assert abs(values[0] - (values[1] + 2.0 * values[2])) <= 3 * bound
    assert mixed._metrics["train"].keys() == own._metrics["train"].keys()
    for name, value in own._metrics["train"].items():
        assert mixed._metrics["train"][name] == pytest.approx(value, rel=bound, abs=bound), name


def test_a_catalogue_loss_takes_precomputed_references(harness, packed, dpo, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    options = {"loss_type": "lipo_lambda"}
    # The reference is another model, else the scores would be rounding errors.
    make = lambda **more: dpo(packed.DPOTrainer, **options, **more, extras={"ref_model": harness.make_model(seed=1)})
    losses_ = []
    for trainer in (make(), make(precompute_ref_log_probs=True)):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        losses_.append(trainer.compute_loss(trainer.model, batch).item())
    bound = torch.finfo(torch.float32).eps * harness.roundings(64 + BACKBONE)
    assert losses_[1] == pytest.approx(losses_[0], rel=bound)


def test_losses_without_a_reference_load_and_run_none(harness, packed, dpo, monkeypatch):
    made = []

    def make():
        trainer = dpo(
            packed.DPOTrainer,
            loss_type=["simpo", "sft"],
            loss_weights=[1.0, 0.2],
            eval_strategy="steps",
            eval_steps=2,
            extras={"eval_dataset": harness.preferences(4), "loss_args": {"gamma": 0.5}},
        )
        made.append(trainer)
        return trainer

    hashed = []
    monkeypatch.setattr("trl.trainer.dpo_trainer.hash_module", hashed.append)
    trace = harness.run(make)
    trainer = made[0]
    assert trainer.ref_model is None
    assert not hashed
    assert trainer.args.precompute_ref_log_probs is False
    assert trainer.packed.batches == 2 + 1  # two steps and an evaluation: one forward pass each
    first = trace.metrics[0]
    assert first["rewards/chosen"] == pytest.approx(trainer.beta * first["logps/chosen"], rel=1e-6)
    assert trainer.evaluate(harness.preferences(2))["eval_loss"] > 0


def test_sft_alone_is_trls_and_has_a_reference(packed, dpo):
    assert dpo(packed.DPOTrainer, loss_type="sft").ref_model is not None


REFUSED = {
    "unknown": ({"loss_type": "nonsense"}, None, ValueError, "'nonsense' is neither TRL's"),
    "misspelt": ({"loss_type": "SimPO"}, None, ValueError, "did you mean 'simpo'"),
    "misspelt of TRL's": ({"loss_type": "sigmoi"}, None, ValueError, "did you mean 'sigmoid'"),
    "third response": ({"loss_type": "xpo"}, None, NotImplementedError, "further response"),
    "rewards": (
        {"loss_type": "odpo"},
        None,
        ValueError,
        r"prefcore.trl.DPOTrainer has none; prefcore.hf.PreferenceTrainer takes them by dataset.with_extras\(rewards",
    ),
    "previous": ({"loss_type": "inpo"}, {"eta": 0.1, "tau": 0.1}, NotImplementedError, "previous iterate"),
    "divergence": ({"loss_type": "tdpo1"}, None, NotImplementedError, "kl_values"),
    "mismatched": ({"loss_type": ["sigmoid", "kto"]}, None, NotImplementedError, "responses to other prompts"),
    "running mean": ({"loss_type": "bco"}, None, NotImplementedError, "mean of all rewards"),
    "policy": ({"loss_type": "ppo"}, None, NotImplementedError, "^prefcore.trl.DPOTrainer trains .* family 'policy'"),
    "tokens precomputed": (
        {"loss_type": "token_dpo", "precompute_ref_log_probs": True},
        None,
        NotImplementedError,
        "log-probs of tokens",
    ),
    "arguments": ({"loss_type": "simpo"}, {"nonsense": 1}, TypeError, "nonsense"),
    "arguments missing": ({"loss_type": "simpo"}, None, TypeError, "^loss_args of .* needs gamma"),
    "arguments in a list": ({"loss_type": "simpo"}, ["gamma"], TypeError, "must be a mapping .* got list"),
    "arguments of none": ({}, {"gamma": 1}, TypeError, r"loss_type names none \(sigmoid\)"),
    "arguments of TRL's": (
        {"loss_type": ["sigmoid", "cpo"]},
        {"sigmoid": {"beta": 1}},
        TypeError,
        "'sigmoid', which is TRL's own",
    ),
    "ld_alpha": ({"loss_type": ["sigmoid", "dpop"], "ld_alpha": 0.5}, {"lam": 1.0}, ValueError, "ld_alpha"),
    "weighting": ({"loss_type": "cpo", "use_weighting": True}, None, ValueError, "use_weighting"),
    "smoothing": ({"loss_type": "dpo", "label_smoothing": 0.1}, None, ValueError, "label_smoothing"),
    "f": ({"loss_type": ["dpo"], "f_divergence_type": "forward_kl"}, None, ValueError, "f_divergence_type"),
    "sync": ({"loss_type": ["cpo"], "sync_ref_model": True}, None, ValueError, "sync_ref_model"),
    "compile": ({"torch_compile": True}, None, NotImplementedError, "torch_compile"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_at_construction(packed, dpo, case):
    options, loss_args, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        dpo(packed.DPOTrainer, extras={"loss_args": loss_args} if loss_args else None, **options)


def test_a_reference_for_losses_without_one_is_refused(harness, packed, dpo):
    with pytest.raises(ValueError, match="ref_model"):
        dpo(packed.DPOTrainer, loss_type="cpo", extras={"ref_model": harness.make_model(seed=1)})


def test_images_and_prompt_learning_are_refused(harness, packed, dpo):
    import datasets

    data = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], "image": ["d"]})
    with pytest.raises(NotImplementedError, match="images"):
        dpo(packed.DPOTrainer, data=data)
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        dpo(packed.DPOTrainer, extras={"peft_config": config})


def test_a_model_that_cannot_be_packed_is_refused(harness, packed, tmp_path):
    import transformers

    sizes = {"vocab_size": harness.VOCABULARY, "hidden_size": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0}
    models = [transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)) for _ in range(2)]
    with pytest.raises(NotImplementedError, match="BloomForCausalLM, use trl's own trainer: BloomModel"):
        packed.DPOTrainer(
            *models,
            args=harness.arguments(trl.DPOConfig, tmp_path),
            train_dataset=harness.preferences(),
            processing_class=harness.make_tokenizer(),
        )


def test_the_losses_that_trl_knows_are_trls(harness):
    from prefcore.trl._dpo import TRL_LOSSES

    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    known = source.partition("Should be one of [")[2].partition("]")[0].replace('f"', "").replace('"', "")
    assert {name.strip().strip("'") for name in known.split(",")} == TRL_LOSSES


@pytest.mark.parametrize("own", [True, False])
def test_the_routers_loss_counts_each_distinct_prompt_once(harness, packed, dpo, own):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = dpo(packed.DPOTrainer, "moe").model
    batch = padded(ROWS[:3] + ROWS[5:])
    kept = {name: getattr(model.config, name) for name in ("output_router_logits", "router_aux_loss_coef")}
    out = model(**batch, fused_lm_head=True, output_router_logits=own)
    assert {name: getattr(model.config, name) for name in kept} == kept
    if not own:
        assert out.aux_loss is None
        return
    once = batch["attention_mask"].clone()
    for row, (before, prompt, *_) in enumerate(ROWS[:3] + ROWS[5:]):
        if row in (1, 3):
            once[row, before : before + len(prompt)] = 0
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    routed = model.model(**inputs, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(routed, model.config.num_local_experts, 2, once)
    bound = torch.finfo(torch.float32).eps * harness.roundings(64 + BACKBONE)
    torch.testing.assert_close(out.aux_loss, expected, rtol=bound, atol=0)
    nll = -out.log_probs.sum() / out.label_mask.sum()
    torch.testing.assert_close(out.loss, nll + 0.05 * expected, rtol=bound, atol=0)


GRPO_RUNS = {
    "dapo": {},
    "grpo, truncated": {"loss_type": "grpo", "mask_truncated_completions": True},
    "bnpo, entropy": {"loss_type": "bnpo", "entropy_coef": 0.1, "beta": 0.0},
    "iterations": {"num_iterations": 2, "temperature": 0.7, "max_steps": 4},
    "float32 head": {"cast_lm_head_to_fp32": True, "temperature": 1.3, "kind": "softcap"},
    "sequence, high entropy": {"importance_sampling_level": "sequence", "top_entropy_quantile": 0.5},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", GRPO_RUNS)
def test_grpo_trains_as_trls(harness, packed, grpo, name):
    assert_equal_runs(harness, lambda cls: grpo(cls, **GRPO_RUNS[name]), packed.GRPOTrainer, trl.GRPOTrainer)


def test_grpo_trains_an_adapter_as_trls(harness, packed, grpo):
    make = lambda cls: grpo(cls, extras={"peft_config": harness.lora()}, learning_rate=1.0)
    assert_equal_runs(harness, make, packed.GRPOTrainer, trl.GRPOTrainer)


@pytest.mark.parametrize(("loss_type", "generations"), [("grpo", 1), ("dapo", 2), ("dr_grpo", 2)])
def test_grpo_puts_groups_together_without_changing_a_steps_gradient(harness, packed, grpo, loss_type, generations):
    """Four micro-batches of four rows: a step of all, or two steps of two."""
    options = {
        "loss_type": loss_type,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4 // generations,
        "steps_per_generation": 4,
        "max_steps": generations,
    }
    made = []
    runs = []
    for cls in (packed.GRPOTrainer, trl.GRPOTrainer):

        def make(cls=cls):
            made.append(grpo(cls, **options))
            return made[-1]

        runs.append(harness.run(make))
    mine, theirs = runs
    if generations == 1:
        prompts = [{tuple(row.tolist()) for row in batch["prompt_ids"]} for batch in made[0]._buffered_inputs]
        assert [len(group) for group in prompts] == [1] * 4  # a group to each micro-batch
    # Means over micro-batches (kl, entropy, ...) follow their composition; what they add up to does not.
    for run in runs:
        steps = len(run.losses) // generations
        run.losses = [sum(run.losses[i : i + steps]) for i in range(0, len(run.losses), steps)]
        names = ("loss", "grad_norm", "reward", "completions/mean_length")
        run.metrics = [{name: step[name] for name in names if name in step} for step in run.metrics]
    harness.assert_same(mine, theirs, tokens=64 + BACKBONE)


def test_grpo_runs_a_prompt_once_for_its_group(harness, packed, grpo):
    trainer = grpo(packed.GRPOTrainer, beta=0.0)
    count = Count(trainer.model)
    batch = trainer._prepare_inputs([{"prompt": text} for text in trainer.train_dataset["prompt"][1:3] for _ in "four"])
    assert batch["prompt_mask"][:, 0].min() == 0  # one of them is padded
    count.inputs.clear()
    trainer.current_gradient_accumulation_steps = 1  # as training sets it
    trainer.compute_loss(trainer.model, batch)
    lengths = {
        tuple(row.tolist()): sum(mask.tolist())
        for row, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    scored = batch["completion_mask"].sum().item()
    assert len(lengths) == 2
    assert [len(ids) for ids in count.inputs] == [sum(lengths.values()) + scored]
    assert trainer.packed.scored_tokens == scored


def test_rows_are_put_together_within_a_step(harness):
    from prefcore.trl._grpo import together

    prompts = torch.tensor([3, 1, 2, 1, 3, 3, 2, 1, 1, 2, 3, 2])[:, None]
    whole = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "rows": torch.arange(12)}
    batches = [
        {**{name: value[i : i + 3] for name, value in whole.items()}, "names": [str(j) for j in range(i, i + 3)]}
        | {"none": None, "count": torch.tensor(5)}
        for i in range(0, 12, 3)
    ]
    made = together(batches, 2)
    assert [batch["rows"].tolist() for batch in made] == [[0, 4, 5], [1, 3, 2], [6, 9, 11], [7, 8, 10]]
    for batch in made:
        assert batch["names"] == [str(row) for row in batch["rows"].tolist()]
        assert torch.equal(batch["prompt_ids"], prompts[batch["rows"]])
        assert (batch["none"], batch["count"]) == (None, 5)
    assert [len(set(b["prompt_ids"].flatten().tolist())) for b in together(batches, 8)] == [1, 2, 2, 1]
    assert together(batches, 3) is batches  # a step's rows are not known here


def test_trainers_work_while_trl_is_patched(harness, packed, dpo, grpo):
    make = lambda: dpo(packed.DPOTrainer, loss_type=["sigmoid", "simpo"], extras={"loss_args": {"gamma": 0.1}})
    plain = harness.run(make)
    plain_grpo = harness.run(lambda: grpo(packed.GRPOTrainer))
    with packed.enable():
        patched = harness.run(make)
        patched_grpo = harness.run(lambda: grpo(packed.GRPOTrainer))
    harness.assert_same(patched, plain)
    harness.assert_same(patched_grpo, plain_grpo)


@pytest.mark.parametrize("case", ["dpo, autocast", "grpo, autocast", "grpo, float32 head of 16-bit weights"])
def test_in_16_bits_it_is_as_close_to_float32_as_trls(harness, packed, dpo, grpo, case):
    make = dpo if case.startswith("dpo") else grpo
    weights = torch.bfloat16 if "weights" in case else torch.float32
    # Without a reference, which would have other weights in 16 bits.
    more = {"cast_lm_head_to_fp32": True, "beta": 0.0} if "weights" in case else {}

    def found(cls, exact):
        model = harness.make_model(dtype=weights)
        mixed = weights == torch.float32 and not exact
        options = {"max_steps": 1, "bf16": mixed, **more}
        trace = harness.run(lambda: make(cls, model=model.float() if exact else model, **options))
        gradients = torch.cat([gradient.flatten().double() for gradient in trace.gradients[0].values()])
        names = ("loss", "entropy", "logps/chosen", "logps/rejected", "kl")
        return gradients, torch.tensor([trace.metrics[0][name] for name in names if name in trace.metrics[0]])

    ours, theirs = (packed.DPOTrainer, trl.DPOTrainer) if make is dpo else (packed.GRPOTrainer, trl.GRPOTrainer)
    for mine, other, truth in zip(found(ours, False), found(theirs, False), found(theirs, True), strict=True):
        error = (mine - truth).norm()
        assert error > 0  # it did run in 16 bits
        assert error <= 2 * (other - truth).norm() + torch.finfo(torch.bfloat16).eps * truth.norm()


@pytest.mark.parametrize("sharding", ["fsdp", "zero3"])
def test_a_sharded_head_is_refused(packed, dpo, sharding, monkeypatch):
    trainer = dpo(packed.DPOTrainer)
    trainer.packer = None
    if sharding == "fsdp":
        trainer.is_fsdp_enabled = True
    else:
        trainer.is_deepspeed_enabled = True
        monkeypatch.setattr("prefcore.trl._packed._zero_stage", lambda accelerator: 3)
    with pytest.raises(NotImplementedError, match="shard the head"):
        trainer.pack_models(())
