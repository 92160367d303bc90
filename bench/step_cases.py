"""What bench.step measures: models made from their configurations, pairs of real lengths, and who takes the step."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import prefcore
from prefcore.data import pack
from prefcore.losses import dpo, preference_metrics

BETA = 0.1
TRL_OUTPUTS = ("entropy", "mean_logits", "is_top1")  # that DPOTrainer logs


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model with tied embeddings."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


MODELS = {
    "tiny": Sizes("llama", 512, 64, 128, 2, 4, 2),
    # For a CPU; its head is as large beside its layers as that of Qwen2.5-0.5B.
    "small": Sizes("llama", 4096, 192, 768, 4, 6, 3),
    "qwen2.5-0.5b": Sizes("qwen2", 151936, 896, 4864, 24, 14, 2),
    "llama-3.2-1b": Sizes("llama", 128256, 2048, 8192, 16, 32, 8),
}


def make_model(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A model of random weights, the same ones in every process; no weight is downloaded."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise SystemExit("bench.step needs transformers: the extra hf") from None
    config = AutoConfig.for_model(**dataclasses.asdict(MODELS[name]), tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()  # none of these models has a dropout by default


@dataclasses.dataclass
class Groups:
    """G prompts with K responses each: chosen, rejected, chosen, rejected, ..."""

    prompts: list[list[int]]
    responses: list[list[list[int]]]
    reference: Tensor  # float32 [G * K], log-probs of the reference

    @property
    def pairs(self) -> list[tuple[list[int], list[int], list[int]]]:
        """Prompt, chosen and rejected of every pair, in the order of the groups."""
        return [
            (prompt, *answers[i : i + 2])
            for prompt, answers in zip(self.prompts, self.responses, strict=True)
            for i in range(0, len(answers), 2)
        ]

    @property
    def tokens(self) -> int:
        """Response tokens: what the head must see."""
        return sum(len(answer) for answers in self.responses for answer in answers)


def draw_groups(pairs: int, k: int, vocabulary: int, max_length: int | None = None) -> Groups:
    """Random token ids of real lengths, bench/lengths.json: ``pairs`` pairs, ``k`` responses to a prompt.

    The prompts are spread evenly over the lengths there are. Beyond four responses the lengths come round again.
    As TRL does, ``max_length`` cuts the ends of responses, and prompts that leave them no room are not taken.
    """
    if k < 2 or k % 2 or pairs < 1 or (2 * pairs) % k:
        raise SystemExit(f"{k} responses to a prompt do not make {pairs} pairs")
    lengths = json.loads((Path(__file__).parent / "lengths.json").read_text())["lengths"]
    lengths = [each for each in lengths if max_length is None or each[0] < max_length]
    count = 2 * pairs // k
    if count > len(lengths):
        raise SystemExit(f"{count} prompts asked for, bench/lengths.json holds {len(lengths)} that fit")
    random = torch.Generator().manual_seed(pairs * k)

    def ids(length: int) -> list[int]:
        return torch.randint(1, vocabulary, (length,), generator=random).tolist()

    prompts, responses = [], []
    for i in range(count):
        prompt, *answers = lengths[(2 * i + 1) * len(lengths) // (2 * count)]
        room = prompt + max(answers) if max_length is None else max_length
        prompts.append(ids(prompt))
        responses.append([ids(min(answers[j % len(answers)], room - prompt)) for j in range(k)])
    # About what an untrained model gives, and some spread for the loss to depend on.
    sizes = torch.tensor([len(answer) for answers in responses for answer in answers])
    spread = 3 * torch.randn(2 * pairs, generator=random)
    return Groups(prompts, responses, spread - sizes * torch.log(torch.tensor(float(vocabulary))))


class Prefcore:
    def __init__(self, model: nn.Module, sharing: str) -> None:
        from prefcore.hf import response_logps  # needs transformers

        self._model, self._sharing, self._score = model, sharing, response_logps
        self._weight = model.get_output_embeddings().weight

    def collate(self, groups: Groups) -> Any:
        device = self._weight.device
        batch = pack(groups.prompts, groups.responses, sharing=self._sharing).to(device)
        return batch, groups.reference.to(device)

    def logps(self, batch: Any) -> Tensor:
        """``[G * K]`` in the order of the groups."""
        with torch.no_grad():
            return self._score(self._model, batch[0])

    def loss(self, batch: Any) -> Tensor:
        packed, reference = batch
        pairs = [*self._score(self._model, packed).view(-1, 2).unbind(1), *reference.view(-1, 2).unbind(1)]
        preference_metrics(*pairs, beta=BETA)  # which a trainer logs, as TRL's does
        return dpo(*pairs, beta=BETA).mean()

    def tokens(self, batch: Any) -> int:
        """That go through the backbone, padding included."""
        return batch[0].input_ids.numel()

    def head(self, batch: Any) -> tuple[int, Callable[[], None]]:
        """The rows that meet the head, and its forward and backward alone."""
        targets = batch[0].targets
        logps = lambda hidden, weight: prefcore.linear_logprobs(hidden, weight, targets).logps
        return targets.numel(), _head_step(logps, self._weight, targets.numel())


class TRL:
    """DPOTrainer's collator and loss, its settings as they come but for what all providers share: see bench.step.

    Args:
        enabled: within prefcore.trl.enable().
        packed: prefcore.trl.DPOTrainer instead of TRL's own.
    """

    def __init__(self, model: nn.Module, enabled: bool = False, packed: bool = False) -> None:
        for name in ("trl", "datasets"):
            if importlib.util.find_spec(name) is None:
                raise LookupError(f"{name} is not installed")
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer

        import prefcore.trl

        self._computed_by = prefcore.trl.enable if enabled else contextlib.nullcontext
        self._with_prefcore = enabled or packed
        self._tokens = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)
        words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self._weight = model.get_output_embeddings().weight
        settings = DPOConfig(
            tempfile.mkdtemp(prefix="bench-step-"), beta=BETA, precompute_ref_log_probs=True, max_length=None,
            bf16=False, gradient_checkpointing=False, use_cpu=not self._weight.is_cuda, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        self._trainer = (prefcore.trl.DPOTrainer if packed else DPOTrainer)(
            model,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " a"}]),  # none is trained on
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
        )

    def collate(self, groups: Groups) -> Any:
        names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
        reference = groups.reference.view(-1, 2).tolist()
        items = [
            dict(zip(names, (*pair, *ref), strict=True)) for pair, ref in zip(groups.pairs, reference, strict=True)
        ]
        return {name: x.to(self._weight.device) for name, x in self._trainer.data_collator(items).items()}

    def logps(self, batch: Any) -> Tensor:
        with self._computed_by():
            return torch.stack(self._trainer.compute_ref_log_probs(self._trainer.model, batch), dim=1).flatten()

    def loss(self, batch: Any) -> Tensor:
        with self._computed_by():
            return self._trainer.compute_loss(self._trainer.model, batch)

    def _count(self, _: nn.Module, arguments: tuple[Tensor]) -> None:
        self._tokens = arguments[0].numel()

    def tokens(self, batch: Any) -> int:
        return self._tokens  # of the last forward pass

    def head(self, batch: Any) -> tuple[int, Callable[[], None]]:
        used = batch["completion_mask"][:, 1:].bool()
        # Without Triton TRL's own scores every position, and masks what is no response.
        if not (self._weight.is_cuda or self._with_prefcore):
            used = torch.ones_like(used)
        targets = batch["input_ids"][:, 1:][used]
        return targets.numel(), _head_step(functools.partial(self._logps, targets), self._weight, targets.numel())

    def _logps(self, targets: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        if self._with_prefcore:
            return prefcore.linear_logprobs(hidden, weight, targets, outputs=TRL_OUTPUTS).logps
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, TRL_OUTPUTS)[0]


def _head_step(logps: Callable[[Tensor, Tensor], Tensor], weight: Tensor, rows: int) -> Callable[[], None]:
    hidden = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device).requires_grad_()
    weight = weight.detach().requires_grad_()

    def step() -> None:
        logps(hidden, weight).sum().backward()
        hidden.grad = weight.grad = None

    return step


PROVIDERS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "share": ("prefcore, packed, prompts shared", lambda model: Prefcore(model, "share")),
    "pack": ("prefcore, packed", lambda model: Prefcore(model, "pack")),
    "off": ("prefcore, padded", lambda model: Prefcore(model, "off")),
    "trl-packed": ("prefcore.trl.DPOTrainer", lambda model: TRL(model, packed=True)),
    "trl-enabled": ("TRL, prefcore.trl.enable()", lambda model: TRL(model, enabled=True)),
    "trl": ("TRL", TRL),
}


@dataclasses.dataclass
class Answer:
    logps: Tensor  # [G * K]
    loss: Tensor
    gradients: list[Tensor]  # of the parameters, in their order


def one_by_one(model: nn.Module, groups: Groups, dtype: torch.dtype) -> Answer:
    """Log-probs, loss and gradients from ``model(...).logits``, a sequence at a time, in ``dtype``."""
    model = copy.deepcopy(model).to(dtype)
    device = next(model.parameters()).device

    def logp(prompt: list[int], answer: list[int]) -> Tensor:
        ids = torch.tensor([prompt + answer], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logits = logits if dtype == torch.float64 else logits.float()
        return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()

    all_logps, total = [], torch.zeros((), device=device)
    for (prompt, *answers), reference in zip(groups.pairs, groups.reference.to(device).view(-1, 2), strict=True):
        logps = torch.stack([logp(prompt, answer) for answer in answers])
        chosen, rejected, ref_chosen, ref_rejected = (x[None] for x in (*logps, *reference.to(logps.dtype)))
        loss = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=BETA).sum() / len(groups.pairs)
        loss.backward()
        all_logps.append(logps.detach())
        total = total + loss.detach()
    return Answer(torch.cat(all_logps), total, [p.grad for p in model.parameters()])


def differences(mine: Answer, truth: Answer) -> dict[str, float]:
    gap = mine.logps.double() - truth.logps.double()
    squares = [
        ((a.double() - b.double()).square().sum(), b.double().square().sum())
        for a, b in zip(mine.gradients, truth.gradients, strict=True)
    ]
    error, size = (torch.stack(each).sum() for each in zip(*squares, strict=True))
    return {
        "max_logps": gap.abs().max().item(),
        "rms_logps": gap.square().mean().sqrt().item(),
        "loss": (mine.loss.double() - truth.loss.double()).abs().item(),
        "gradients": (error / size).sqrt().item(),
    }


def refuse_errors(
    name: str, got: dict[str, float], eager: dict[str, float], truth: Answer, groups: Groups, dtype: torch.dtype
) -> None:
    """End the run if a provider is further from the truth than roundings can bring it.

    Allowed is twice the error of eager PyTorch in the same dtype and, for log-probs, one rounding of their sum; for
    gradients, one rounding of each value and one of random sign for each of the tokens they are summed over, which
    every provider sums in an order of its own. A pair's DPO loss moves by at most beta times what its two log-probs
    move by.
    """
    fine = torch.finfo(torch.float32).eps
    tokens = sum(len(prompt) + len(answer) for prompt, *answers in groups.pairs for answer in answers)
    bounds = {
        "rms_logps": 2 * eager["rms_logps"] + fine * truth.logps.abs().max().item(),
        "loss": 2 * BETA * got["max_logps"] + 4 * fine * max(1.0, truth.loss.item()),
        "gradients": 2 * eager["gradients"] + torch.finfo(dtype).eps + fine * tokens**0.5,
    }
    wrong = [what for what, bound in bounds.items() if not got[what] <= bound]  # a NaN is wrong too
    if wrong:
        found = "; ".join(f"{what} off by {got[what]:.2g}, allowed {bounds[what]:.2g}" for what in wrong)
        raise SystemExit(f"{name} does not agree with the model's own logits: {found}")
