"""One DPO step of prefcore and of TRL on the same pairs: ``python -m bench.step``.

A step is forward, loss, backward and fused AdamW, from a batch that is collated already to updated parameters. All
providers take it on models of the same weights, with the same pairs, dtype and optimizer, with the reference's
log-probs known beforehand, without dropout, autocast or clipping, and with or without gradient checkpointing alike.
What else TRL does by default it does here; on a CPU its head scores every position, on a GPU those of responses.

First they are compared: log-probs, loss and gradients must agree with the model's own logits in a wider type, or
nothing is reported. Then they step in turn, round by round, and what is quoted beside pairs a second is the median of
the ratios to TRL, which on a shared machine holds where seconds do not.

The memory is what a step adds to parameters and optimizer state: the growth of the peak resident size in a fresh
process, or on a GPU of the peak allocation. The head is timed alone, forward and backward, on as many rows as it has
in the step.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.measure import dated, environment, resident, seconds, write
from bench.step_cases import (
    MODELS,
    PROVIDERS,
    Answer,
    Groups,
    differences,
    draw_groups,
    make_model,
    one_by_one,
    refuse_errors,
)

SKIPS = (LookupError, NotImplementedError, torch.OutOfMemoryError)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--model", default="small", choices=MODELS)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--k", type=int, nargs="+", default=[2], help="responses to a prompt; one after another")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--max-length", type=int, help="of prompt and response; by default nothing is cut")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for all providers")
    parser.add_argument("--provider", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--output", type=Path, help="JSON file; a dated one in bench/results by default")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(options.threads)
        what, *which = options.worker.split(":")
        print(json.dumps(memory(options, *which) if what == "memory" else timing(options)))
        return
    rows = worker("time")
    for row in rows:
        if "skipped" not in row and options.device == "cpu":
            row |= worker(f"memory:{row['provider']}:{row['k']}")
        print(json.dumps(row), file=sys.stderr)
    extra = "" if options.max_length is None else f" --max-length {options.max_length}"
    extra += " --checkpointing" if options.checkpointing else ""
    extra += "" if options.provider == list(PROVIDERS) else f" --provider {' '.join(options.provider)}"
    command = (
        f"python -m bench.step --model {options.model} --pairs {options.pairs} --k {' '.join(map(str, options.k))} "
        f"--dtype {options.dtype} --device {options.device} --threads {options.threads} --rounds {options.rounds}"
        f"{extra}"
    )
    report = {**environment(command, options.device), "rows": rows}
    print(markdown(report))
    path = options.output or dated(options.device, f"step-{options.model}-", f"-{options.dtype}")
    write(report, path)
    print(f"\nwritten to {path}", file=sys.stderr)


def worker(what: str) -> Any:
    command = [sys.executable, "-m", "bench.step", *sys.argv[1:], "--worker", what]
    quiet = {**os.environ, "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=quiet)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


class Step:
    """A provider with a model and an optimizer of its own."""

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        self.provider = PROVIDERS[name][1](model)
        self.parameters = list(model.parameters())
        # What Trainer takes by default; the learning rate is TRL's.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, weight_decay=0.0, fused=True)

    def __call__(self, batch: Any) -> None:
        self.provider.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def answer(self, batch: Any) -> Answer:
        logps = self.provider.logps(batch)
        loss = self.provider.loss(batch)
        loss.backward()
        gradients = [p.grad for p in self.parameters]
        self.optimizer.zero_grad()
        return Answer(logps, loss.detach(), gradients)


def timing(options: argparse.Namespace) -> list[dict]:
    rows = []
    for k in options.k:
        rows += in_turn(options, k)
        gc.collect()  # trainers hold their models in cycles
    return rows


def in_turn(options: argparse.Namespace, k: int) -> list[dict]:
    dtype = getattr(torch, options.dtype)
    model = prepared(options)
    groups = draw_groups(options.pairs, k, model.config.vocab_size, options.max_length)
    truth = one_by_one(model, groups, torch.float64 if dtype == torch.float32 else torch.float32)
    eager = differences(one_by_one(model, groups, dtype), truth)
    rows, steps = [], {}
    for name in options.provider:
        row: dict[str, Any] = {"provider": name, "k": k, "pairs": options.pairs, "response_tokens": groups.tokens}
        rows.append(row)
        try:
            step = Step(name, copy.deepcopy(model))
            begin = time.perf_counter()
            batch = step.provider.collate(groups)
            row["collate_milliseconds"] = 1e3 * (time.perf_counter() - begin)
            errors = differences(step.answer(batch), truth)
            step(batch)
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                batch = step.provider.collate(groups)
                before = torch.cuda.memory_allocated()
                step(batch)
                row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            count, head = step.provider.head(batch)
            head()
        except SKIPS as reason:
            row["skipped"] = str(reason).splitlines()[0]
            continue
        refuse_errors(PROVIDERS[name][0], errors, eager, truth, groups, dtype)
        row |= {"tokens": step.provider.tokens(batch), "head_rows": count}
        row |= {f"error_{what}": value for what, value in errors.items()}
        row |= {f"eager_error_{what}": value for what, value in eager.items()}
        steps[name] = (step, head)
    del truth, model

    times: dict[str, list[float]] = {name: [] for name in steps}
    heads: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, (step, head) in steps.items():
            like = step.parameters[0]
            batch = step.provider.collate(groups)  # a new one: what a step makes of its batch is made each time
            times[name].append(seconds(lambda step=step, batch=batch: step(batch), like))
            heads[name].append(seconds(head, like))
    for row in rows:
        if row["provider"] in steps:
            row |= summary(times, heads, row["provider"], options.pairs)
    return rows


def summary(times: dict[str, list[float]], heads: dict[str, list[float]], name: str, pairs: int) -> dict:
    own = times[name]
    median = statistics.median(own)
    row = {
        "pairs_per_second": pairs / median,
        "milliseconds": 1e3 * median,
        "milliseconds_min": 1e3 * min(own),
        "milliseconds_max": 1e3 * max(own),
        "head_milliseconds": 1e3 * statistics.median(heads[name]),
        "head_share": statistics.median(head / step for head, step in zip(heads[name], own, strict=True)),
    }
    if "trl" in times:
        ratios = [theirs / mine for theirs, mine in zip(times["trl"], own, strict=True)]
        row |= {"over_trl": statistics.median(ratios), "over_trl_min": min(ratios), "over_trl_max": max(ratios)}
    return row


def memory(options: argparse.Namespace, name: str, k: str) -> dict:
    """Growth of the peak of one step over what the process held before; the gradients are part of it."""
    model = prepared(options)
    step = Step(name, model)
    groups = draw_groups(options.pairs, int(k), model.config.vocab_size, options.max_length)
    # Libraries load what they need, and the optimizer makes its state, on a few tokens first.
    answers = [[answer[:2] for answer in each] for each in groups.responses]
    step(step.provider.collate(Groups([prompt[:8] for prompt in groups.prompts], answers, groups.reference)))
    batch = step.provider.collate(groups)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step(batch)
    return {"peak_mib": (resident("VmHWM") - before) / 2**10}


def prepared(options: argparse.Namespace) -> torch.nn.Module:
    model = make_model(options.model, getattr(torch, options.dtype), options.device)
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def markdown(report: dict) -> str:
    lines = [
        "| K | | pairs/s | times TRL | peak memory | the head's share | tokens | rows of the head "
        "| max error of logps | of the gradients |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        title = PROVIDERS[row["provider"]][0]
        if "skipped" in row:
            lines.append(f"| {row['k']} | {title} | skipped: {row['skipped']} | | | | | | | |")
            continue
        ratio = f"{row['over_trl']:.2f}" if "over_trl" in row else ""
        lines.append(
            f"| {row['k']} | {title} | {row['pairs_per_second']:.3g} | {ratio} | {row['peak_mib']:.0f} MiB "
            f"| {100 * row['head_share']:.0f} % | {row['tokens']} | {row['head_rows']} "
            f"| {row['error_max_logps']:.1e} | {row['error_gradients']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
