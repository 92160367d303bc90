"""Tiny models, data and runs of TRL's trainers, the same with prefcore and without: ``harness`` in the tests beside it.

What a run depends on is fixed: weights and data by seeds, the order of the data by TRL's own seed, and the sampled
completions by :func:`stub_generation`, which replaces ``model.generate``: its tokens come from a generator that is
seeded by the number of the call, not from the model. So a difference in the last bit of a weight changes no token.
"""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers

import prefcore
import prefcore.trl

WIDTH, LAYERS = 16, 2
SPECIAL = ("<pad>", "<end>", "<unknown>", "<user>", "<assistant>", "<system>")
WORDS = tuple(f"w{i}" for i in range(54))
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<assistant> ' }}"
    "{% generation %}{{ message['content'] + ' <end>' }}{% endgeneration %}{{ ' ' }}"
    "{% else %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
# The ops that stand for TRL's functions.
ROUTED = ("linear_logprobs", "logprobs", "linear_divergence", "divergence")
# Of what TRL logs, only this differs between two equal runs.
TIMES = ("runtime", "per_second", "time", "mfu", "flops", "memory", "perf/")


def make_tokenizer(words=WORDS):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unknown>",
        chat_template=TEMPLATE,
        padding_side="left",
    )


VOCABULARY = len(SPECIAL) + len(WORDS)

# Weights so large that the logits are far from uniform, and softcaps that bend them.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_KINDS = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "bias": ("Phi", {"num_key_value_heads": 2}),
    "softcap": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0}),
    "scale": ("Cohere", {"logit_scale": 0.4}),
    "divided": ("Granite", {"logits_scaling": 2.5}),
    "moe": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05}),
}


def make_model(kind="llama", *, seed=0, dtype=torch.float32, **options):
    """A causal LM of 2 layers by its ``kind``: one of llama, tied, bias, softcap, scale, divided, moe."""
    family, settings = _KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **settings, **options})
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        head = model.get_output_embeddings()
        if head.bias is not None:
            torch.nn.init.normal_(head.bias)
    return model.to(dtype)


def save_reference(folder, kind="llama", *, seed=1, **options):
    """Writes a model of other weights to ``folder``: what a trainer that loads its reference by name will load."""
    make_model(kind, seed=seed, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def with_reference(model, folder):
    """``model``, whose reference TRL loads from ``folder``."""
    model.name_or_path = model.config._name_or_path = str(folder)
    return model


def lora(**options):
    from peft import LoraConfig

    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **options})


def with_adapter(model, *, seed=2, **options):
    """``model`` with an adapter that already changes it: PEFT's own start leaves it as it is."""
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(model, lora(init_lora_weights=False, **options))
    return model


def _sentences(seed, count, low, high):
    """Random words; one in three is the word before it, which a model with a tied head likes to predict."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *bounds: torch.randint(*bounds, (1,), generator=generator).item()
    sentences = []
    for _ in range(count):
        words = []
        for _ in range(draw(low, high)):
            words.append(words[-1] if words and draw(3) == 0 else WORDS[draw(len(WORDS))])
        sentences.append(" ".join(words))
    return sentences


def _dataset(**columns):
    from datasets import Dataset

    return Dataset.from_dict(columns)


def _chat(role, texts):
    return [[{"role": role, "content": text}] for text in texts]


def _after(texts):
    """Completions of plain prompts: TRL concatenates the two strings."""
    return [f" {text}" for text in texts]


def prompts(count=8, *, chat=False, **columns):
    """TRL's prompt-only format."""
    texts = _sentences(10, count, 2, 6)
    return _dataset(prompt=_chat("user", texts) if chat else texts, **columns)


def preferences(count=8, *, chat=False):
    """TRL's preference format with an explicit prompt; responses of 1 to 8 words."""
    texts, chosen, rejected = (_sentences(*of) for of in ((11, count, 2, 6), (12, count, 1, 9), (13, count, 1, 9)))
    if chat:
        texts, chosen, rejected = _chat("user", texts), _chat("assistant", chosen), _chat("assistant", rejected)
    else:
        chosen, rejected = _after(chosen), _after(rejected)
    return _dataset(prompt=texts, chosen=chosen, rejected=rejected)


def unpaired(count=8, *, chat=False):
    """TRL's unpaired preference format; two of three are desirable."""
    texts, answers = _sentences(11, count, 2, 6), _sentences(14, count, 1, 9)
    if chat:
        texts, answers = _chat("user", texts), _chat("assistant", answers)
    else:
        answers = _after(answers)
    return _dataset(prompt=texts, completion=answers, label=[i % 3 != 1 for i in range(count)])


def language(count=8):
    """TRL's language modelling format: a column ``text``."""
    return _dataset(text=_sentences(15, count, 3, 14))


def completions(count=8, *, chat=False):
    """TRL's prompt-completion format."""
    texts, answers = _sentences(11, count, 2, 6), _sentences(14, count, 1, 9)
    if chat:
        texts, answers = _chat("user", texts), _chat("assistant", answers)
    else:
        answers = _after(answers)
    return _dataset(prompt=texts, completion=answers)


def conversations(count=8, turns=2):
    """TRL's conversational language modelling format: a column ``messages``, user and assistant in turn."""
    said = iter(_sentences(16, 2 * turns * count, 1, 6))
    roles = ("user", "assistant") * turns
    return _dataset(messages=[[{"role": role, "content": next(said)} for role in roles] for _ in range(count)])


def _responses(call, rows, room, shortest=1):
    """``[rows, room]`` right-padded tokens that end, and their lengths; more than ``room`` means cut before the end."""
    generator = torch.Generator().manual_seed(1000 + call)
    words = torch.randint(len(SPECIAL), VOCABULARY, (rows, room), generator=generator)
    lengths = torch.randint(shortest, room + 2, (rows,), generator=generator)
    places = torch.arange(room)
    words = words.masked_fill(places == (lengths - 1)[:, None], 1).masked_fill(places >= lengths[:, None], 0)
    return words, lengths


class StubbedVLLM:
    """Stands for TRL's ``VLLMGeneration``: the tokens of :func:`stub_generation`, with log-probabilities at random.

    One of them is NaN, as vLLM's are where it could not score a token.
    """

    def __init__(self, max_completion_length=8, **_):
        self.room, self.calls = max_completion_length, itertools.count()

    def sync_weights(self):
        pass

    def generate(self, prompts, num_generations=1, **_):
        call = next(self.calls)
        words, lengths = _responses(call, len(prompts), self.room)
        kept = [row[:length].tolist() for row, length in zip(words, lengths.tolist(), strict=True)]
        generator = torch.Generator().manual_seed(call)
        noise = torch.rand(words.shape, generator=generator)
        noise[0, 0] = float("nan")
        scores = [[[-3.5 - x] for x in row[: len(ids)].tolist()] for row, ids in zip(noise, kept, strict=True)]
        return prompts, kept, scores, None


def stub_generation(*models, longest=8, shortest=1):
    """Replaces ``generate`` of each model: responses of ``shortest`` to ``longest`` tokens, some without their end.

    Right-padded, and all as wide as the longest, as ``generate`` returns them. The n-th call returns the same tokens
    in every run.
    """
    calls = itertools.count()

    def generate(input_ids=None, attention_mask=None, generation_config=None, return_dict_in_generate=False, **_):
        rows = input_ids.shape[0] * (getattr(generation_config, "num_return_sequences", None) or 1)
        input_ids = input_ids.repeat_interleave(rows // input_ids.shape[0], 0)
        room = min(longest, getattr(generation_config, "max_new_tokens", None) or longest)
        words, lengths = _responses(next(calls), rows, room, shortest)
        sequences = torch.cat([input_ids, words[:, : max(1, min(room, lengths.max().item()))]], 1)
        if return_dict_in_generate or getattr(generation_config, "return_dict_in_generate", False):
            return transformers.generation.GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    for model in models:
        model.generate = generate


def arguments(config, folder, **options):
    """A configuration of TRL's for a short run on the CPU: plain SGD, whose step is linear in the gradient."""
    settings = {
        "output_dir": str(folder),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return config(**{**settings, **options})


@dataclass
class Trace:
    """Of a run: the loss of each forward, what was logged at each step, the gradients before each optimizer step."""

    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)


class _Recorder(transformers.TrainerCallback):
    def __init__(self, trace):
        self.trace = trace

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
        self.trace.gradients.append(gradients)

    def on_log(self, args, state, control, logs=None, **_):
        kept = {k: v for k, v in logs.items() if isinstance(v, int | float) and not any(t in k for t in TIMES)}
        self.trace.metrics.append(kept)


def run(make_trainer, steps=None):
    """Trains the trainer that ``make_trainer()`` returns for ``steps`` (default: its ``max_steps``); a :class:`Trace`.

    The generators are seeded before it is made, so whatever it draws is the same in every run.
    """
    from datasets.utils import logging as datasets_logging

    datasets_logging.disable_progress_bar()
    transformers.set_seed(0)
    trainer = make_trainer()
    # accelerate collects garbage at the end of each run: most of its time, over what imports left.
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
    trainer.remove_callback(transformers.PrinterCallback)
    if steps is not None:
        trainer.args.max_steps = steps
    trace = Trace()
    step = trainer.training_step

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        trace.losses.append(loss.item())
        return loss

    trainer.training_step = training_step
    trainer.add_callback(_Recorder(trace))
    trainer.train()
    return trace


@contextmanager
def counted():
    """Counts the calls of the ops to which ``prefcore.trl`` routes TRL's functions, by name."""
    calls, own = Counter(), {name: getattr(prefcore, name) for name in ROUTED}

    def count(name):
        def call(*args, **kwargs):
            calls[name] += 1
            return own[name](*args, **kwargs)

        return call

    for name in ROUTED:
        setattr(prefcore, name, count(name))
    try:
        yield calls
    finally:
        for name in ROUTED:
            setattr(prefcore, name, own[name])


def both(make_trainer, *ops, steps=None):
    """Runs of the trainer with prefcore and without; all ``ops`` were called in the first, and none in the second."""
    with counted() as calls:
        theirs = run(make_trainer, steps)
    assert not calls, f"prefcore computes in TRL's own run: {dict(calls)}"
    with counted() as calls, prefcore.trl.enable():
        ours = run(make_trainer, steps)
    assert set(calls) == set(ops), f"TRL reached {dict(calls)} of prefcore, expected {ops}"
    return ours, theirs


def roundings(tokens, *, width=WIDTH, vocabulary=VOCABULARY, steps=1):
    """Roundings on the way from hidden states to a mean over ``tokens``, in units of ``finfo(dtype).eps``.

    A logit is a sum of ``width`` products, then scaled, capped, divided and exponentiated; a log-probability is a sum
    over the ``vocabulary``; a mean is a sum over ``tokens``. Two computations may differ by twice that, and each step
    of the optimizer starts from weights that already do.
    """
    return 2 * steps * (width + 8 + vocabulary + tokens)


def assert_same(ours, theirs, *, tokens=64, dtype=torch.float32, trivial=False):
    """Losses, every metric and every gradient of the runs agree within the roundings of ``dtype``.

    Unless ``trivial``, no gradients of a step are all 0. They are held to the largest of their step: a small one is a
    difference of large ones.
    """
    eps = torch.finfo(dtype).eps
    assert len(ours.losses) == len(theirs.losses) > 0
    assert len(ours.gradients) == len(theirs.gradients) > 0
    assert len(ours.metrics) == len(theirs.metrics)
    bound = eps * roundings(tokens, steps=len(theirs.gradients))
    for i, (a, b) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        assert _close(a, b, bound), f"loss of forward {i}: {a} with prefcore, {b} without"
    for i, (a, b) in enumerate(zip(ours.metrics, theirs.metrics, strict=True)):
        assert a.keys() == b.keys(), f"step {i}: {a.keys() ^ b.keys()} logged in one run only"
        for name in b:
            assert _close(a[name], b[name], bound), f"{name} at step {i}: {a[name]} with prefcore, {b[name]} without"
    for i, (a, b) in enumerate(zip(ours.gradients, theirs.gradients, strict=True)):
        assert a.keys() == b.keys(), f"step {i}: gradients of {a.keys() ^ b.keys()} in one run only"
        largest = max(g.abs().max().item() for g in b.values())
        assert largest > 0 or trivial, f"step {i}: every gradient is 0, which shows nothing"
        for name in b:
            off = (a[name].double() - b[name].double()).abs().max().item()
            assert off <= bound * largest, f"gradient of {name} at step {i}: off by {off / largest:.1e} of the largest"


def assert_no_worse(ours, theirs, truth, *, dtype=torch.bfloat16, logit=8.0):
    """In a 16-bit type: losses, metrics and gradients are as near to those of float32 as TRL's own are.

    A step's gradients, together one vector, may be off by twice TRL's error and one rounding. A loss or a metric is a
    single number, of which TRL's error may be 0 by chance; it may also be off by the rounding of the largest ``logit``.
    """
    eps = torch.finfo(dtype).eps

    def hold(name, values, band):
        a, b, exact = values
        off, own = (a - exact).norm().item(), (b - exact).norm().item()
        allowed = 2 * own + eps * max(band, exact.norm().item())
        assert off <= allowed, f"{name}: off by {off:.2e}, where TRL's own is off by {own:.2e}"

    runs = (ours, theirs, truth)
    assert len({len(run.losses) for run in runs}) == len({len(run.gradients) for run in runs}) == 1
    for i in range(len(truth.losses)):
        hold(f"loss of forward {i}", [torch.tensor(run.losses[i]) for run in runs], logit)
    for i, metrics in enumerate(truth.metrics):
        for name in metrics:
            hold(f"{name} at step {i}", [torch.tensor(float(run.metrics[i][name])) for run in runs], logit)
    for i, gradients in enumerate(truth.gradients):
        vectors = [torch.cat([run.gradients[i][name].float().flatten() for name in gradients]) for run in runs]
        assert vectors[-1].norm() > 0
        hold(f"gradients at step {i}", vectors, 0.0)


def _close(a, b, bound):
    # Losses and metrics are means of log-probabilities, margins and the like, which are of the order of 1 or more
    # and may cancel.
    return a == b or (a != a and b != b) or abs(a - b) <= bound * max(1.0, abs(b))
