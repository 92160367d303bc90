"""What the examples share: a task whose answers can be checked, a tiny model, rollouts, a plot.

The task: a prompt holds lines of digits, and the answer repeats each line in ascending order, every line closed by a
comma. Before reinforcement learning a model learns the form of answers alone: the right digits, in random order.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import prefcore
from prefcore.data import PackedBatch, pack
from prefcore.hf import find_head, token_logps
from prefcore.hf.scoring import head_logps, run_backbone

Ids = list[int]
COMMA, ASK, END, PAD = 10, 11, 12, 13  # 0 to 9 are digits
VOCABULARY = 14


@dataclass
class Sorting:
    """Prompts of ``lines`` lines with ``width`` different digits each."""

    lines: int
    width: int

    def prompt(self) -> Ids:
        digits = [torch.randperm(10)[: self.width].tolist() for _ in range(self.lines)]
        return [token for line in digits for token in (*line, COMMA)] + [ASK]

    def shuffled(self, prompt: Ids) -> Ids:
        """An answer of the right form, each line in random order."""
        lines = [[line[i] for i in torch.randperm(self.width).tolist()] for line in self._lines(prompt)]
        return [token for line in lines for token in (*line, COMMA)] + [END]

    def sorted(self, prompt: Ids) -> Ids:
        return [token for line in self._lines(prompt) for token in (*sorted(line), COMMA)] + [END]

    def reward(self, prompt: Ids, response: Ids) -> float:
        """1 for the right answer, 0 for any other."""
        return float(response == self.sorted(prompt))

    def line_rewards(self, prompt: Ids, response: Ids) -> list[float]:
        """One number for each token: at the comma that closes a line 1/lines if the line is right, 0 elsewhere."""
        rewards, start = [0.0] * len(response), 0
        for line in self._lines(prompt):
            if COMMA not in response[start:]:
                break
            end = response.index(COMMA, start)
            rewards[end] = float(response[start:end] == sorted(line)) / self.lines
            start = end + 1
        return rewards

    def score(self, prompt: Ids, response: Ids) -> float:
        """The share of right lines."""
        return sum(self.line_rewards(prompt, response))

    def scores(self, prompts: list[Ids], responses: list[list[Ids]]) -> torch.Tensor:
        """``[S]`` scores of all responses to all prompts."""
        pairs = zip(prompts, responses, strict=True)
        return torch.tensor([self.score(prompt, response) for prompt, group in pairs for response in group])

    def _lines(self, prompt: Ids) -> list[Ids]:
        step = self.width + 1
        return [prompt[i * step : i * step + self.width] for i in range(self.lines)]


def arguments(name: str, description: str | None) -> argparse.Namespace:
    """The options of every example; seeds torch."""
    parser = argparse.ArgumentParser(prog=name, description=(description or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs; nothing is learned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("examples-output"), help="folder of the plot")
    args = parser.parse_args()
    args.picture = args.output / f"{name}.png"
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    transformers.set_seed(args.seed)
    return args


def new_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return transformers.LlamaForCausalLM(config)


class ActorCritic(torch.nn.Module):
    """A model with a small value head on its hidden states, at first 0."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        size = model.config.hidden_size
        self.model = model
        self.value = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.Tanh(), torch.nn.Linear(size, 1))
        torch.nn.init.zeros_(self.value[-1].weight)
        torch.nn.init.zeros_(self.value[-1].bias)

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """``[T]`` log-probs of the tokens, and ``[T]`` values of the states before them, of one pass of the model."""
        head = find_head(self.model)
        states = run_backbone(head, batch).states
        values = self.value(prefcore.gather_rows(states, batch.rows.int())).squeeze(-1)
        return head_logps(head, states, batch), values


def warm_up(model: Any, task: Sorting, steps: int) -> None:
    """Maximum likelihood of answers whose lines are in random order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        prompts = [task.prompt() for _ in range(64)]
        batch = pack(prompts, [[task.shuffled(prompt)] for prompt in prompts])
        loss = -token_logps(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def rollout(model: Any, task: Sorting, prompts: list[Ids], samples: int) -> list[list[Ids]]:
    """``samples`` responses to each prompt, up to and with their end token; the prompts are of one length."""
    inputs = torch.tensor(prompts)
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=True,
        top_k=0,  # from the whole distribution, whose log-probs the loss sees
        num_return_sequences=samples,
        max_new_tokens=len(task.sorted(prompts[0])),
    )
    rows = [row[: row.index(END) + 1] if END in row else row for row in out[:, inputs.shape[1] :].tolist()]
    return [rows[i : i + samples] for i in range(0, len(rows), samples)]


class Run:
    """Prints how a run goes on, ends it with a verdict, and draws it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.curves: dict[str, dict[str, list[float]]] = {}
        self._started = time.perf_counter()

    def log(self, step: int, *, run: str = "", **numbers: float) -> None:
        for name, value in numbers.items():
            self.curves.setdefault(name, {}).setdefault(run, []).append(float(value))
        if step % 10 == 0:
            shown = "  ".join(f"{name} {float(value):.3f}" for name, value in numbers.items())
            print(f"{run:8} step {step:3d}  {shown}".strip(), flush=True)

    def verdict(self, run: str = "", *, least: float) -> None:
        """The mean reward at the beginning and at the end; in full the gain must be ``least`` or more."""
        rewards = self.curves["reward"][run]
        part = max(len(rewards) // 20, 1)
        before, after = sum(rewards[:part]) / part, sum(rewards[-part:]) / part
        print(f"{run or 'reward'}: mean of the first {part} steps {before:.3f}, of the last {part} {after:.3f}")
        if not self.args.smoke and after - before < least:
            raise SystemExit(f"the reward rose by {after - before:.3f}, expected at least {least}")

    def draw(self) -> None:
        """One panel for each number, one line for each run."""
        os.environ.setdefault("MPLBACKEND", "Agg")
        from matplotlib import pyplot as plt

        figure, panels = plt.subplots(1, len(self.curves), figsize=(4.5 * len(self.curves), 3.5), squeeze=False)
        for panel, (name, runs) in zip(panels[0], self.curves.items(), strict=True):
            for run, values in runs.items():
                panel.plot(values, label=run or None)
            panel.set(title=name, xlabel="step")
            if len(runs) > 1:
                panel.legend()
        figure.tight_layout()
        self.args.picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.args.picture, dpi=120)
        print(f"{time.perf_counter() - self._started:.0f} s; {self.args.picture}")
