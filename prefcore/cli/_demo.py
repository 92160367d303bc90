"""``prefcore train`` without arguments: a small model that does not listen, and preferences that teach it to.

The model is asked to line up four animals, lightest or heaviest first. Fine-tuning shows it both orders
equally often, whatever was asked, so it lines up either way at random. The human prefers the order that was
asked for. Whether an answer follows the request is decided by the animals' weights, so that the outcome can
be checked on the model's own answers to requests about groups of animals that it has never seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prefcore.cli import train
from prefcore.data import PackedCollator, PairDataset, Preference, tokenize_pairs

# From light to heavy: the typical weight of an adult in kilograms.
ANIMALS = {
    "ant": 3e-6,
    "bee": 1e-4,
    "mouse": 0.02,
    "rat": 0.3,
    "hedgehog": 0.8,
    "rabbit": 2,
    "cat": 4,
    "fox": 7,
    "beaver": 20,
    "wolf": 40,
    "lion": 190,
    "horse": 500,
    "giraffe": 1000,
    "rhino": 2300,
    "elephant": 5000,
    "whale": 100000,
}
REQUESTS = ("lightest first:", "heaviest first:")
GROUP = 4
HELD_OUT_GROUPS = 100
TRAIN_PAIRS = 3000
TUNING_STEPS = 900
_TUNING_BATCH = 32


def answer(prompt: str) -> str:
    """The line-up that ``prompt`` asks for."""
    animals, request = prompt.split(", ")
    return " ".join(sorted(animals.split(), key=ANIMALS.__getitem__, reverse=request == REQUESTS[1]))


def opposite(prompt: str) -> str:
    return " ".join(reversed(answer(prompt).split()))


def requests(seed: int) -> tuple[list[str], list[str]]:
    """Prompts to train on, in random order, and held-out prompts; no group of animals is in both."""
    rng = random.Random(seed)
    groups = list(itertools.combinations(ANIMALS, GROUP))
    rng.shuffle(groups)

    def ask(group: Sequence[str], request: str) -> str:
        return f"{' '.join(rng.sample(group, GROUP))}, {request}"

    held_out = [ask(group, request) for group in groups[:HELD_OUT_GROUPS] for request in REQUESTS]
    training = [ask(group, request) for group in groups[HELD_OUT_GROUPS:] for request in REQUESTS]
    rng.shuffle(training)
    return training, held_out


def run(
    output: Path, seed: int = 0, *, tuning_steps: int = TUNING_STEPS, train_pairs: int = TRAIN_PAIRS
) -> dict[str, Any]:
    """Make the data and the model, train, show and save; returns what ``metrics.json`` holds."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    started = time.time()
    training, held_out = requests(seed)
    output = train.prepare_output(output, resume=False)
    data, eval_data, start = output / "pairs.jsonl", output / "held-out.jsonl", output / "start"
    _write_pairs(data, training[:train_pairs])
    _write_pairs(eval_data, held_out)

    print(f"1. A new model learns to line up {GROUP} animals by weight, in either order, whatever was asked for.")
    transformers.set_seed(seed)
    tokenizer = _make_tokenizer()
    model = _make_model(tokenizer)
    _fine_tune(model, tokenizer, training, tuning_steps)
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    before, answers_before = _examine(model, tokenizer, held_out)

    print("\n2. People prefer the order that was asked for:")
    for line in data.read_text().splitlines()[:2]:
        print(f"   {line}")

    options = ["train", "--data", data, "--model", start, "--output", output, "--eval-data", eval_data]
    options += ["--lr", "2e-4", "--beta", "1", "--batch-size", "32", "--epochs", "2", "--seed", seed]
    command = [str(option) for option in options]
    print(f"\n3. prefcore {' '.join(command)}")
    parser = argparse.ArgumentParser()
    train.add_parser(parser.add_subparsers())
    results = train.train(parser.parse_args(command))

    trained = transformers.AutoModelForCausalLM.from_pretrained(output)
    after, answers_after = _examine(trained, tokenizer, held_out)
    print("\n4. The model's answers, before and after, on groups of animals it was never trained on:")
    for prompt, old, new in list(zip(held_out, answers_before, answers_after, strict=True))[:6]:
        print(f"   {prompt:48} {_mark(prompt, old)} {old:30} {_mark(prompt, new)} {new}")
    print(f"\n   {len(held_out)} held-out requests{'':28}{'before':>8}{'after':>8}")
    for name in before:
        print(f"   {name:50}{before[name]:8.2f}{after[name]:8.2f}")
    results["demo"] = {"before": before, "after": after, "seconds": round(time.time() - started, 1)}
    train.write_json(output / "metrics.json", results)
    print(f"\n{results['demo']['seconds']:.0f} s in all. {output}: the model, metrics.png, metrics.json, pairs.jsonl")
    return results


def _mark(prompt: str, given: str) -> str:
    return "yes" if given == answer(prompt) else " no"


def _write_pairs(path: Path, prompts: list[str]) -> None:
    records = ({"prompt": p, "chosen": answer(p), "rejected": opposite(p)} for p in prompts)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _make_tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<end>", "<unknown>"]
    words = [*special, *ANIMALS, "lightest", "heaviest", "first", ",", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )


def _make_model(tokenizer: Any) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.LlamaForCausalLM(config)


def _pairs(prompts: list[str], tokenizer: Any) -> PairDataset:
    return tokenize_pairs([Preference(p, answer(p), opposite(p)) for p in prompts], tokenizer)


def _fine_tune(model: Any, tokenizer: Any, prompts: list[str], steps: int) -> None:
    """Maximum likelihood of both answers alike."""
    from tqdm.auto import trange

    from prefcore.hf import response_logps

    pairs, collate = _pairs(prompts, tokenizer), PackedCollator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in trange(steps, desc="   fine-tuning", disable=not sys.stderr.isatty()):
        chosen = torch.randint(len(pairs), (_TUNING_BATCH,), generator=generator).tolist()
        (batch,) = collate([pairs[i] for i in chosen])
        loss = -response_logps(model, batch).sum() / batch.targets.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _examine(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[dict[str, float], list[str]]:
    """How well the model follows held-out requests, and its likeliest answers to them."""
    from prefcore.hf import response_logps

    model.eval()
    pairs = _pairs(prompts, tokenizer)
    (batch,) = PackedCollator()([pairs[i] for i in range(len(pairs))])
    chosen, rejected = response_logps(model, batch).view(-1, 2).unbind(1)
    greedy, sampled = (_generate(model, tokenizer, prompts, sample) for sample in (False, True))
    follows = lambda answers: sum(map(str.__eq__, answers, map(answer, prompts))) / len(prompts)
    orderly = [a in (answer(p), opposite(p)) for p, a in zip(prompts, sampled, strict=True)]
    return {
        "preferred answer is the likelier of the two": (chosen > rejected).double().mean().item(),
        "likeliest answer is in the order asked for": follows(greedy),
        "sampled answer is in the order asked for": follows(sampled),
        "sampled answer is in either order": sum(orderly) / len(prompts),
    }, greedy


def _generate(model: Any, tokenizer: Any, prompts: list[str], sample: bool) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False)  # all of one length
    out = model.generate(**inputs, max_new_tokens=GROUP + 1, do_sample=sample)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
