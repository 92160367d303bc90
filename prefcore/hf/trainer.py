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

import prefcore
from prefcore import losses
from prefcore.data import PackedBatch, PackedCollator, PairDataset
from prefcore.data.packed import Sharing
from prefcore.hf.head import find_head
from prefcore.hf.scoring import head_logps, run_backbone

_ITEM = ["prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask"]
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

    Batches are packed and their prompts shared (``sharing="share"``), so that ``per_device_train_batch_size`` counts
    pairs and ``max_tokens`` bounds a forward pass: a batch that is larger runs as several, of about the same size,
    with the same gradients. The loss of a mixture of experts' routers is added where the model's config has
    ``output_router_logits``; it is logged as ``aux_loss``, counts each token once, and is left out of ``eval_loss``. It
    is each forward pass's own, and so the one part of the gradient that ``max_tokens`` changes.

    Args:
        model: a causal LM of transformers, bare or wrapped by PEFT; see :func:`prefcore.hf.find_head`.
        args: as Trainer's.
        train_dataset: of :func:`prefcore.data.tokenize_pairs`.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer, saved beside the model; its padding token fills padded batches.
        loss: a name in the registry of :mod:`prefcore.losses`.
        beta: strength of the tie to the reference; the scale of the logged rewards.
        loss_args: further arguments of the loss; a ``beta`` among them replaces ``beta``, in the rewards too.
        ref_model: the reference; it is frozen and moved to the device.
        precompute_reference: see above.
        sharing: ``"share"``, ``"pack"`` or ``"off"``, see :func:`prefcore.data.pack`.
        max_tokens: the most tokens of model input in a forward pass; None: all pairs of a batch at once.
        attention: the backend of packed batches, see :func:`prefcore.hf.attention.run_packed`.
        data_collator: one of your own instead, which returns a list of :class:`prefcore.data.PackedBatch`.
        disable_dropout: set every dropout of the model to zero, so that policy and reference are comparable.
        **kwargs: Trainer's other arguments (``callbacks``, ``optimizers``, ...).

    Raises:
        TypeError: a dataset that is no ``PairDataset``, a switch that is no bool, or arguments the loss does not
            know.
        ValueError: a loss that is not registered, a reference for a loss without one, a dataset without pairs, a
            pair of more than ``max_tokens``, or ``sharing`` or ``max_tokens`` beside a ``data_collator``.
        NotImplementedError: arguments of Trainer that want batches as dictionaries, FSDP, ZeRO-3 and torch_compile,
            ``max_tokens`` with DeepSpeed, a model that cannot be packed (``sharing="off"`` pads instead), and what
            ``find_head`` refuses.
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
        sharing: Sharing = "share",
        max_tokens: int | None = None,
        attention: str = "auto",
        data_collator: Callable[[list], list[PackedBatch]] | None = None,
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
        if args is not None:
            _refuse_arguments(args)
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
        if data_collator is not None and (sharing != "share" or max_tokens is not None):
            raise ValueError("sharing and max_tokens are the data_collator's own; give them to it")
        collator: Any = data_collator
        if collator is None:
            collator = PackedCollator(sharing, max_tokens, 0 if pad is None else pad)
            for dataset in (train_dataset, *_each(eval_dataset)):
                if dataset is not None:
                    collator.sizes(*dataset.lengths())
        super().__init__(model, args, collator, train_dataset, eval_dataset, processing_class, **kwargs)
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and _zero_stage(self.accelerator) == 3):
            raise NotImplementedError(
                "FSDP and ZeRO-3 shard the head, which prefcore does not yet; use DDP or ZeRO-1/2"
            )
        if max_tokens is not None and self.is_deepspeed_enabled:
            raise NotImplementedError(
                "max_tokens runs several backward passes a batch, which DeepSpeed counts as steps"
            )
        self._attention = attention
        # One process with several GPUs would be nn.DataParallel, which cannot split these batches.
        self.args._n_gpu = min(self.args.n_gpu, 1)
        self._train_batch_size = self.args.train_batch_size
        # The loss is divided by the step's pairs here: Trainer must not divide it by its micro-batches.
        self.model_accepts_loss_kwargs = True
        self._totals: dict[str, tuple[list[str], Tensor]] = {}
        self._parameters = sum(p.numel() for p in model.parameters())
        if self._ref_model is not None and not hasattr(self._ref_model, "hf_device_map"):
            self._ref_model.to(self.args.device)
        sharing = getattr(collator, "sharing", "off")  # of an unknown collator the first batch will tell
        if sharing != "off":
            from prefcore.hf.attention import check

            for each in (self.model, self._ref_model):
                if each is not None:
                    with self.accelerator.autocast():
                        check(find_head(each).backbone, sharing, attention, train=each is self.model)
        if self._needs_reference and precompute_reference:
            self.train_dataset = self._with_reference(self.train_dataset, "train")
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {k: self._with_reference(d, k) for k, d in self.eval_dataset.items()}
            else:
                self.eval_dataset = self._with_reference(self.eval_dataset, "eval")
            self._ref_model = None

    def training_step(
        self,
        model: nn.Module,
        inputs: list[PackedBatch],  # type: ignore[override]
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if num_items_in_batch is None:
            num_items_in_batch = _pairs(inputs) * self.accelerator.num_processes
        parts = []
        for number, batch in enumerate(inputs, start=1):
            # Ranks may have different numbers of batches: they meet in the last one's backward pass only.
            with nullcontext() if number == len(inputs) else self.accelerator.no_sync(model):
                parts.append(super().training_step(model, [batch], num_items_in_batch))  # type: ignore[arg-type]
        return torch.stack(parts).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: list[PackedBatch],  # type: ignore[override]
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if num_items_in_batch is None:
            num_items_in_batch = _pairs(inputs) * self.accelerator.num_processes
        loss: Any = 0.0
        outputs = []
        for batch in inputs:
            run = functools.partial(self._score_with_routers, self.model)
            logps, aux_loss = _inside_forward(model, self.model, run, batch)
            per_pair, metrics = self._terms(logps, batch)
            total = per_pair.sum()
            if aux_loss is not None:
                total = total + aux_loss * len(per_pair)
                metrics["aux_loss"] = aux_loss.detach().expand(len(per_pair))
            # The ranks' gradients are averaged, the pairs are all ranks' own.
            loss = loss + total * (self.accelerator.num_processes / num_items_in_batch)
            self._add("train", metrics)
            outputs.append(logps.detach())
        return (loss, {"logps": outputs}) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs: Any = sum(map(_pairs, batches))
        if self.accelerator.num_processes > 1:
            pairs = self.accelerator.reduce(torch.tensor(pairs, device=device), "sum")
        return batches, pairs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: list[PackedBatch],  # type: ignore[override]
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        rows = []
        with torch.no_grad():
            for batch in self._prepare_inputs(inputs):
                per_pair, metrics = self._terms(self._score(self.model, batch), batch)
                rows.append(torch.stack([per_pair, *metrics.values()], dim=1))
        # The last batch of a distributed evaluation repeats pairs, which the gathering leaves out; it takes them to be
        # the last ones, hence the dataset's order.
        table = torch.cat(rows)[torch.cat([batch.index for batch in inputs]).argsort().to(rows[0].device)]
        table = self.accelerator.gather_for_metrics(table)
        self._add("eval", dict(zip(["loss", *metrics], table.unbind(1), strict=True)))
        return torch.cat(rows)[:, 0].mean(), None, None

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
        self._signature_columns: Any = [*_ITEM, *_REFERENCE]

    def floating_point_ops(self, inputs: Any) -> int:
        # 6 flops per parameter and token, as transformers counts.
        return 6 * sum(batch.input_ids.numel() for batch in inputs) * self._parameters

    def _prepare_inputs(self, inputs: Any) -> Any:
        return [batch.to(self.args.device) for batch in inputs]

    def _score(self, model: Any, batch: PackedBatch) -> Tensor:
        return self._score_with_routers(model, batch)[0]

    def _score_with_routers(self, model: Any, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        with self.accelerator.autocast():
            head = find_head(model)
            hidden = run_backbone(head, batch, self._attention)
            logps = head_logps(head, hidden.states, batch)
        return prefcore.sequence_reduce(logps, batch.cu_seqlens.to(logps.device), "sum"), hidden.aux_loss

    def _reference_logps(self, batch: PackedBatch) -> Tensor:
        """``[S]`` of the reference, where the batch has none of its own."""
        model: Any = self.model
        with torch.no_grad():
            if self._ref_model is not None:
                return self._score(self._ref_model, batch)
            training = model.training
            model.eval()
            try:
                with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
                    return self._score(model, batch)
            finally:
                model.train(training)

    def _terms(self, logps: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair ``[P]`` and its metrics, each ``[P]`` and detached."""
        policy = _sides(logps)
        # Without a reference, rewards are beta times the log-probs, as in TRL.
        reference = [torch.zeros_like(part) for part in policy]
        if self._needs_reference:
            reference = self._reference_of(batch)
        arguments = (*policy, *reference) if self._needs_reference else policy
        lengths = _lengths(self._method, self._loss_args, batch.cu_seqlens)
        per_pair = self._method.function(*arguments, **self._loss_args, **lengths)
        return per_pair, losses.preference_metrics(*policy, *reference, beta=self._beta).named()

    def _reference_of(self, batch: PackedBatch) -> list[Tensor]:
        if _REFERENCE[0] in batch.extras:
            return [batch.extras[name] for name in _REFERENCE]
        if self._ref_model is None and not hasattr(self.model, "disable_adapter"):
            raise RuntimeError("this dataset has no reference log-probs, and the reference is gone; see with_reference")
        return _sides(self._reference_logps(batch))

    def _with_reference(self, dataset: Any, name: str) -> Any:
        if dataset is None or dataset.has_reference:
            return dataset
        logps = torch.zeros(len(dataset), 2, device=self.args.device)
        mine = range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        size = self.args.per_device_eval_batch_size
        loader = DataLoader(Subset(dataset, mine), batch_size=size, collate_fn=self.data_collator)
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        done = 0
        for batches in tqdm(loader, desc=f"reference ({name})", disable=hidden, leave=False):
            for batch in self._prepare_inputs(batches):
                index = torch.tensor(mine, device=logps.device)[done + batch.index]
                logps[index] = self._reference_logps(batch).view(-1, 2).to(logps)
            done += _pairs(batches)
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
    function: Callable[[PackedBatch], Any],
    inputs: PackedBatch,
) -> Any:
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

    def once(batch: PackedBatch) -> Any:
        restore()
        return function(batch)

    inner.forward = once
    try:
        return wrapped(inputs)
    finally:
        restore()


def _pairs(batches: list[PackedBatch]) -> int:
    return sum(batch.cu_groups.numel() - 1 for batch in batches)


def _sides(values: Tensor) -> list[Tensor]:
    """The chosen and the rejected of ``[2P]`` values of pairs, each ``[P]``."""
    return list(values.view(-1, 2).unbind(1))


def _each(dataset: Any) -> tuple[Any, ...]:
    return tuple(dataset.values()) if isinstance(dataset, dict) else (dataset,)


def _zero_stage(accelerator: Any) -> int:
    return accelerator.state.deepspeed_plugin.zero_stage


def _refuse_arguments(args: Any) -> None:
    """Raise for what Trainer could only do with batches that are dictionaries of padded tensors."""
    refused = {
        "include_num_input_tokens_seen": args.include_num_input_tokens_seen not in (False, "no"),
        'train_sampling_strategy="group_by_length"': getattr(args, "train_sampling_strategy", "") == "group_by_length",
        "group_by_length": getattr(args, "group_by_length", False),
        "include_for_metrics": bool(args.include_for_metrics),
        "accelerator_config.dispatch_batches": bool(args.accelerator_config.dispatch_batches),
    }
    for name, given in refused.items():
        if given:
            raise NotImplementedError(f"{name} looks into batches as dictionaries, which packed batches are not")


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
    return dict(zip(("chosen_lengths", "rejected_lengths"), _sides(cu_seqlens.diff()), strict=True))
