"""``transformers.Trainer`` for preference losses: the head op instead of logits, the rest as it is known."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from prefcore import losses
from prefcore.data import PairCollator, PairDataset
from prefcore.hf.head import find_head
from prefcore.hf.score import response_logps

_ITEM = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


class PreferenceTrainer(Trainer):
    """Trains a causal LM on preference pairs with a loss of :mod:`prefcore.losses`.

    Checkpoints, schedulers, gradient accumulation, mixed precision, DDP and loggers are Trainer's own. A
    step's loss is the mean over all pairs of the step, over micro-batches and ranks. Logged, as means over
    all pairs since the last log (or over the evaluation set, after ``eval_``): ``rewards/chosen``,
    ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``, ``logps/chosen``, ``logps/rejected``.

    Where the loss needs a reference, it is the first of these that is there: log-probs in the datasets
    (:meth:`prefcore.data.PairDataset.with_reference`), ``ref_model``, the model with its PEFT adapters
    disabled, a frozen copy of the model as it comes. With ``precompute_reference`` its log-probs are computed
    once, here, and no second model stays in memory.

    Args:
        model: a causal LM of transformers, bare or wrapped by PEFT; see :func:`prefcore.hf.find_head`.
        args: as Trainer's.
        train_dataset: of :func:`prefcore.data.tokenize_pairs`.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer, saved beside the model; its padding token fills batches.
        loss: a name in the registry of :mod:`prefcore.losses`.
        beta: strength of the tie to the reference; the scale of the logged rewards.
        loss_args: further arguments of the loss; a ``beta`` among them replaces ``beta``, in the rewards too.
        ref_model: the reference; it is frozen and moved to the device.
        precompute_reference: see above.
        disable_dropout: set every dropout of the model to zero, so that policy and reference are comparable.
        **kwargs: Trainer's other arguments (``callbacks``, ``optimizers``, ...).

    Raises:
        TypeError: a dataset that is no ``PairDataset``, a switch that is no bool, or arguments the loss does not
            know.
        ValueError: a loss that is not registered, a reference for a loss without one, or a dataset without pairs.
        NotImplementedError: FSDP, ZeRO-3 and torch_compile, and what ``find_head`` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        train_dataset: PairDataset | None = None,
        eval_dataset: PairDataset | dict[str, PairDataset] | None = None,
        processing_class: Any = None,
        *,
        loss: str = "dpo",
        beta: float = 0.1,
        loss_args: Mapping[str, Any] | None = None,
        ref_model: nn.Module | None = None,
        precompute_reference: bool = False,
        disable_dropout: bool = True,
        **kwargs: Any,
    ) -> None:
        for name, value in (("precompute_reference", precompute_reference), ("disable_dropout", disable_dropout)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
        self._method, self._loss_args = loss_settings(loss, beta, loss_args)
        self._beta = self._loss_args.get("beta", beta)
        self._needs_reference = "reference" in self._method.needs
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{name} wants the model's outputs, which PreferenceTrainer does not make")
        if ref_model is not None and not self._needs_reference:
            raise ValueError(f"the loss {loss!r} needs no reference; leave ref_model out")
        if ref_model is model:
            raise ValueError("ref_model is the model itself; leave it out to train against a frozen copy of it")
        for dataset in (train_dataset, *_each(eval_dataset)):
            if dataset is not None and not isinstance(dataset, PairDataset):
                raise TypeError(
                    f"expected a prefcore.data.PairDataset, got {type(dataset).__name__}; "
                    "see prefcore.data.tokenize_pairs"
                )
            if dataset is not None and not len(dataset):
                raise ValueError("a dataset holds no pair")
        if args is not None and args.torch_compile:
            raise NotImplementedError("torch_compile=True; compile the layers instead, before: model.model.compile()")
        if args is not None and args.label_smoothing_factor:
            raise ValueError('label_smoothing_factor is not used; take loss="cdpo"')
        find_head(model)
        if disable_dropout:
            _disable_dropout(model)
        known = all(d.has_reference for d in (train_dataset, *_each(eval_dataset)) if d is not None)
        adapters = hasattr(model, "disable_adapter")
        self._ref_model = ref_model
        if self._needs_reference and ref_model is None and not (known or adapters or precompute_reference):
            self._ref_model = copy.deepcopy(model)
        if self._ref_model is not None:
            find_head(self._ref_model)
            self._ref_model.requires_grad_(False).eval()
        pad = getattr(processing_class, "pad_token_id", None)
        collator = kwargs.pop("data_collator", None) or PairCollator(0 if pad is None else pad)
        super().__init__(model, args, collator, train_dataset, eval_dataset, processing_class, **kwargs)
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and _zero_stage(self.accelerator) == 3):
            raise NotImplementedError(
                "FSDP and ZeRO-3 shard the head, which prefcore does not yet; use DDP or ZeRO-1/2"
            )
        # One process with several GPUs would be nn.DataParallel, which cannot split these batches.
        self.args._n_gpu = min(self.args.n_gpu, 1)
        self._train_batch_size = self.args.train_batch_size
        # The loss is divided by the step's pairs here: Trainer must not divide it by its micro-batches.
        self.model_accepts_loss_kwargs = True
        self._totals: dict[str, tuple[list[str], Tensor]] = {}
        if self._ref_model is not None and not hasattr(self._ref_model, "hf_device_map"):
            self._ref_model.to(self.args.device)
        if self._needs_reference and precompute_reference:
            self.train_dataset = self._with_reference(self.train_dataset, "train")
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {k: self._with_reference(d, k) for k, d in self.eval_dataset.items()}
            else:
                self.eval_dataset = self._with_reference(self.eval_dataset, "eval")
            self._ref_model = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        logps = _inside_forward(model, self.model, functools.partial(self._score, self.model), inputs)
        per_pair, metrics = self._terms(logps, inputs)
        if num_items_in_batch is None:
            loss = per_pair.mean()
        else:
            # The ranks' gradients are averaged, the pairs are all ranks' own.
            loss = per_pair.sum() * (self.accelerator.num_processes / num_items_in_batch)
        self._add("train", metrics)
        return (loss, {"logps": logps.detach()}) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs: Any = sum(_pairs(batch) for batch in batches)
        if self.accelerator.num_processes > 1:
            pairs = self.accelerator.reduce(torch.tensor(pairs, device=device), "sum")
        return batches, pairs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            per_pair, metrics = self._terms(self._score(self.model, inputs), inputs)
        # The last batch of a distributed evaluation repeats pairs, which the gathering leaves out.
        table = torch.stack([per_pair, *metrics.values()], dim=1)
        table = self.accelerator.gather_for_metrics(table)
        self._add("eval", dict(zip(["loss", *metrics], table.unbind(1), strict=True)))
        return per_pair.mean(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._totals.pop("eval", None)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = {f"{metric_key_prefix}_{name}": value for name, value in self._means("eval").items()}
        return output._replace(metrics={**(output.metrics or {}), **means})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # of a training step; every rank comes here
            logs.update(self._means("train", reduce=True))
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = list(_ITEM)

    def _score(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        with self.accelerator.autocast():
            return response_logps(model, inputs)

    def _reference_logps(self, inputs: dict[str, Tensor]) -> Tensor:
        """``[S]`` of the reference, where the batch has none of its own."""
        model: Any = self.model
        with torch.no_grad():
            if self._ref_model is not None:
                return self._score(self._ref_model, inputs)
            training = model.training
            model.eval()
            try:
                with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
                    return self._score(model, inputs)
            finally:
                model.train(training)

    def _terms(self, logps: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair ``[P]`` and its metrics, each ``[P]`` and detached."""
        policy = logps.chunk(2)
        # Without a reference, rewards are beta times the log-probs, as in TRL.
        reference = [torch.zeros_like(part) for part in policy]
        if self._needs_reference:
            reference = self._reference_of(inputs)
        arguments = (*policy, *reference) if self._needs_reference else policy
        lengths = _lengths(self._method, self._loss_args, inputs["cu_seqlens"])
        per_pair = self._method.function(*arguments, **self._loss_args, **lengths)
        return per_pair, losses.preference_metrics(*policy, *reference, beta=self._beta).named()

    def _reference_of(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        if _REFERENCE[0] in inputs:
            return [inputs[name] for name in _REFERENCE]
        if self._ref_model is None and not hasattr(self.model, "disable_adapter"):
            raise RuntimeError("this dataset has no reference log-probs, and the reference is gone; see with_reference")
        return list(self._reference_logps(inputs).chunk(2))

    def _with_reference(self, dataset: Any, name: str) -> Any:
        if dataset is None or dataset.has_reference:
            return dataset
        logps = torch.zeros(len(dataset), 2, device=self.args.device)
        mine = range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        size = self.args.per_device_eval_batch_size
        loader = DataLoader(Subset(dataset, mine), batch_size=size, collate_fn=self.data_collator)
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        done = 0
        for batch in tqdm(loader, desc=f"reference ({name})", disable=hidden, leave=False):
            chosen_rejected = self._reference_logps(self._prepare_inputs(batch)).view(2, -1).T
            index = torch.tensor(mine[done : done + len(chosen_rejected)], device=logps.device)
            logps[index] = chosen_rejected.to(logps)
            done += len(chosen_rejected)
        if self.accelerator.num_processes > 1:
            logps = self.accelerator.reduce(logps, "sum")
        return dataset.with_reference(*logps.unbind(1))

    def _add(self, split: str, metrics: dict[str, Tensor]) -> None:
        # Sums stay on the device until they are logged: no step waits for them.
        total = torch.stack([value.detach().double().sum() for value in metrics.values()])
        count = total.new_full((1,), len(next(iter(metrics.values()))))
        total = torch.cat([total, count])
        if split in self._totals:
            total += self._totals[split][1]
        self._totals[split] = (list(metrics), total)

    def _means(self, split: str, reduce: bool = False) -> dict[str, float]:
        if split not in self._totals:
            return {}
        names, total = self._totals.pop(split)
        if reduce and self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, "sum")
        *sums, count = total.tolist()
        return {name: value / count for name, value in zip(names, sums, strict=True)}


def _inside_forward(
    wrapped: nn.Module,
    inner: Any,
    function: Callable[[dict[str, Tensor]], Tensor],
    inputs: dict[str, Tensor],
) -> Tensor:
    """``function(inputs)``, called where ``wrapped`` calls ``inner.forward``.

    DDP prepares its gradient buckets in its own forward, and looks at what comes out of it for the parameters
    in use; the head's weight, used outside the model's forward, would else be reduced before its gradient is
    there.
    """
    replaced = vars(inner).get("forward")  # accelerate's mixed precision may have put one there

    def restore() -> None:
        if replaced is None:
            vars(inner).pop("forward", None)
        else:
            inner.forward = replaced

    def once(batch: dict[str, Tensor]) -> Tensor:
        restore()
        return function(batch)

    inner.forward = once
    try:
        return wrapped(inputs)
    finally:
        restore()


def _pairs(batch: Mapping[str, Tensor]) -> int:
    return (batch["cu_seqlens"].numel() - 1) // 2


def _each(dataset: Any) -> tuple[Any, ...]:
    return tuple(dataset.values()) if isinstance(dataset, dict) else (dataset,)


def _zero_stage(accelerator: Any) -> int:
    return accelerator.state.deepspeed_plugin.zero_stage


def _disable_dropout(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Many models pass a probability of their own to functional.dropout, or to the attention function.
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def loss_settings(
    loss: str, beta: float = 0.1, loss_args: Mapping[str, Any] | None = None
) -> tuple[losses.Method, dict[str, Any]]:
    """The registered method and its arguments, ``beta`` among them where it takes one; tried out on one pair.

    Raises:
        TypeError: an argument that is unknown, missing or of a wrong type.
        ValueError: a loss that is not registered, a coefficient outside its domain.
        NotImplementedError: a method that needs more than log-probs of pairs.
    """
    method = losses.get(loss)
    lacking = sorted(method.needs - {"reference", "lengths"})
    if method.family != "pairwise" or lacking:
        lack = ", ".join(lacking) or f"{method.family} batches"
        raise NotImplementedError(f"PreferenceTrainer has no {lack}, which the loss {loss!r} needs")
    known = {
        parameter.name: parameter.default is parameter.empty
        for parameter in inspect.signature(method.function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and not parameter.name.endswith("_lengths")
    }
    settings = {**({"beta": beta} if "beta" in known else {}), **(loss_args or {})}
    unknown = sorted(settings.keys() - known.keys())
    missing = [name for name, required in known.items() if required and name not in settings]
    if unknown or missing:
        problem = f"does not take {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise TypeError(f"the loss {loss!r} {problem}; its arguments are {', '.join(known)}")
    one = [torch.zeros(1)] * (4 if "reference" in method.needs else 2)
    method.function(*one, **settings, **_lengths(method, settings, torch.tensor([0, 1, 2])))
    return method, settings


def _lengths(method: losses.Method, settings: Mapping[str, Any], cu_seqlens: Tensor) -> dict[str, Tensor]:
    """The numbers of response tokens ``[P]``, for a loss that wants them."""
    if "lengths" not in method.needs and not settings.get("length_normalize"):
        return {}
    return dict(zip(("chosen_lengths", "rejected_lengths"), cu_seqlens.diff().chunk(2), strict=True))
