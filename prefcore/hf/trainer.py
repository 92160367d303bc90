"""``transformers.Trainer`` for preference losses: the head op instead of logits, the rest as it is known."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput

import prefcore
from prefcore import losses
from prefcore.data import ListDataset, PackedBatch, PackedCollator, PairDataset
from prefcore.data.extras import WithExtras
from prefcore.data.lists import WithMismatched
from prefcore.data.packed import PARTS, Sharing, offsets, ranges
from prefcore.hf._peft import reference_adapter, switched
from prefcore.hf.feeding import (
    Feed,
    Gathered,
    Policy,
    Source,
    Wants,
    check_data,
    check_division,
    columns_of,
    read_losses,
)
from prefcore.hf.head import evaluating, find_head
from prefcore.hf.scoring import head_divergence, head_logps, head_stats, run_backbone

logger = logging.getLogger(__name__)

_PAIR = ("ref_chosen_logps", "ref_rejected_logps")  # of PairDataset.with_reference


class PreferenceTrainer(Trainer):
    """Trains a causal LM on preferences with losses of :mod:`prefcore.losses`.

    Checkpoints, schedulers, gradient accumulation, mixed precision, DDP and loggers are Trainer's own. Logged, as
    means since the last log (or over the evaluation set, after ``eval_``): ``rewards/chosen``, ``rewards/rejected``,
    ``rewards/margins``, ``rewards/accuracies``, ``logps/chosen``, ``logps/rejected``; of a list they are those of the
    responses with the highest and the lowest label, of single responses those of the desirable and the undesirable.

    **What a loss is fed** its parameters' names say, and no more is gathered: log-probs of the policy, ``ref_`` of the
    reference, ``prev_`` of the model as it comes (the previous iterate, frozen; one set of log-probs serves both where
    that is the reference), ``chosen_`` and ``rejected_`` of pairs; lengths; ``kl_values``, KL(reference||policy) of
    each token, which keeps the reference in memory; ``log_sum_sq_probs``; ``kl_logps``, of one response to another
    prompt for each item, always the same, run as a further response and left out of all else; ``scores``, beta times
    the log-ratios, with ``labels`` (which are a list's ``rewards``, too, where the data have none) and ``cu_groups``;
    ``delta``, the running mean of all rewards, moved once a step and saved in checkpoints. Everything else comes from
    the datasets' ``extras``, ``rewards`` for one. An optional tensor is fed where ``loss_args`` asks for it:
    ``{"chosen_lengths": True}``.

    **From which data.** Pairwise and token losses take pairs. Listwise losses take lists; a pair is a list with labels
    1 and 0. Losses of single responses take both members of each pair, or a list dataset whose labels are 1
    (desirable) and 0. Of the family "sft" are losses of the chosen responses, or of those with the highest labels;
    ``unlikelihood`` without a ``mask`` is of the rejected ones, or of those with the lowest.

    A step's loss is the mean over all pairs or lists of the step (over its responses, where the loss is of single
    ones), over micro-batches and ranks; several losses are added up by their weights, each its own mean, and logged
    apart as ``losses/NAME``. A loss that couples the examples of a batch (``separable=False`` in the registry) couples
    those of a micro-batch, so that accumulation changes it, ``max_tokens`` is refused, and so are several ranks unless
    the loss itself counts over them, as ``kto`` does.

    Where the loss needs a reference, it is the first of these that is there: log-probs in the datasets
    (:meth:`prefcore.data.PairDataset.with_reference`; ``ref_logps`` of responses or ``ref_token_logps`` of tokens
    among the ``extras``), ``ref_model``, the model with its PEFT adapter ``ref_adapter`` instead of the active ones,
    the model with its PEFT adapters disabled, a frozen copy of the model as it comes. With ``precompute_reference`` its
    log-probs (of tokens, where a loss is of tokens) are computed once, here, and no second model stays in memory.

    Batches are packed and their prompts shared (``sharing="share"``), so that ``per_device_train_batch_size`` counts
    pairs or lists and ``max_tokens`` bounds a forward pass: a batch that is larger runs as several, of about the same
    size, with the same gradients. The loss of a mixture of experts' routers is added where the model's config has
    ``output_router_logits``; it is logged as ``aux_loss``, counts each token once, and is left out of ``eval_loss``. It
    is each forward pass's own, and so the one part of the gradient that ``max_tokens`` changes.

    Args:
        model: a causal LM of transformers, bare or wrapped by PEFT; see :func:`prefcore.hf.find_head`.
        args: as Trainer's.
        train_dataset: of :func:`prefcore.data.tokenize_pairs`, or a :class:`prefcore.data.ListDataset`.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer, saved beside the model; its padding token fills padded batches.
        loss: a name in the registry of :mod:`prefcore.losses`, or several.
        beta: strength of the tie to the reference; the scale of the logged rewards. None: each loss's own, or 0.1.
        loss_args: further arguments of the loss; a ``beta`` among them replaces ``beta``, in the rewards too. Of
            several losses each takes those that it knows; or ``{"dpo": {...}, ...}``, the arguments of each.
        loss_weights: of several losses, positive; 1 each by default.
        ref_model: the reference; it is frozen and moved to the device.
        ref_adapter: the name of the adapter of a ``PeftModel`` that is the reference. By default that is ``"ref"``,
            TRL's name for it, where the model has one that is not active. It is active in the reference's forward
            passes alone; which adapters are active and which parameters are trained stays as it was.
        precompute_reference: see above.
        sharing: ``"share"``, ``"pack"`` or ``"off"``, see :func:`prefcore.data.pack`.
        max_tokens: the most tokens of model input in a forward pass; None: all pairs of a batch at once.
        attention: the backend of packed batches, see :func:`prefcore.hf.attention.run_packed`.
        data_collator: one of your own instead, which returns a list of :class:`prefcore.data.PackedBatch`.
        disable_dropout: set every dropout of the model to zero, so that policy and reference are comparable.
        **kwargs: Trainer's other arguments (``callbacks``, ``optimizers``, ...).

    Raises:
        TypeError: a dataset that is none of these, a switch that is no bool, or arguments the loss does not know.
        ValueError: a loss that is not registered, a reference for a loss without one, a dataset without items or
            without what the loss needs of it, or whose log-probs of a reference or previous iterate are not those
            that it needs, an item of more than ``max_tokens``, ``max_tokens`` beside a loss that
            couples a batch, ``precompute_reference`` beside ``kl_values``, or ``sharing`` or ``max_tokens`` beside a
            ``data_collator``.
        NotImplementedError: a loss that needs what neither models nor data have, arguments of Trainer that want batches
            as dictionaries, FSDP, ZeRO-3 and torch_compile, ``max_tokens`` with DeepSpeed, a model that cannot be
            packed (``sharing="off"`` pads instead), and what ``find_head`` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        train_dataset: PairDataset | ListDataset | None = None,
        eval_dataset: PairDataset | ListDataset | dict[str, PairDataset | ListDataset] | None = None,
        processing_class: Any = None,
        *,
        loss: str | Sequence[str] = "dpo",
        beta: float | None = None,
        loss_args: Mapping[str, Any] | None = None,
        loss_weights: Sequence[float] | None = None,
        ref_model: nn.Module | None = None,
        ref_adapter: str | None = None,
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
        datasets: list[Any] = [d for d in (train_dataset, *_each(eval_dataset)) if d is not None]
        for dataset in datasets:
            if not isinstance(dataset, PairDataset | ListDataset | WithMismatched):
                raise TypeError(
                    f"expected a prefcore.data.PairDataset or ListDataset, got {type(dataset).__name__}; "
                    "see prefcore.data.tokenize_pairs"
                )
            if not len(dataset):
                raise ValueError(f"a dataset holds no {'list' if isinstance(dataset, ListDataset) else 'pair'}")
        self._feeds = read_losses(loss, beta, loss_args, loss_weights, columns_of(datasets))
        self._wants = wants = Wants.of(self._feeds)
        for dataset in datasets:
            check_data(self._feeds, dataset)
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{name} wants the model's outputs, which PreferenceTrainer does not make")
        if ref_model is not None and not wants.reference:
            raise ValueError(f"the loss {loss!r} needs no reference; leave ref_model out")
        if ref_adapter is not None and not wants.reference:
            raise ValueError(f"the loss {loss!r} needs no reference; leave ref_adapter out")
        if ref_adapter is not None and ref_model is not None:
            raise ValueError("ref_model and ref_adapter are two references; give one of them")
        if precompute_reference and wants.divergence:
            raise ValueError(
                "precompute_reference: kl_values are of the reference's whole distributions, so that it must stay in "
                "memory; leave precompute_reference out"
            )
        check_division(self._feeds, max_tokens)
        if ref_model is model:
            raise ValueError("ref_model is the model itself; leave it out to train against a frozen copy of it")
        if args is not None and args.torch_compile:
            raise NotImplementedError("torch_compile=True; compile the layers instead, before: model.model.compile()")
        if args is not None and args.label_smoothing_factor:
            raise ValueError('label_smoothing_factor is not used; take loss="cdpo"')
        if args is not None:
            _refuse_arguments(args)
        find_head(model)
        self._ref_adapter = reference_adapter(model, ref_adapter)
        if disable_dropout:
            _disable_dropout(model)
        if wants.mismatched:
            train_dataset, eval_dataset = _mapped(_with_mismatched, train_dataset, eval_dataset)
        datasets = [d for d in (train_dataset, *_each(eval_dataset)) if d is not None]
        adapters = hasattr(model, "disable_adapter")
        # Without any of these the reference is the model as it comes, and so is the previous iterate.
        given = any(name.startswith("ref_") for dataset in datasets for name in dataset.extras)
        self._one_source = not (adapters or given or ref_model is not None)
        self._gathers_reference = wants.reference or (wants.previous and self._one_source)
        self._check_given(datasets, ref_model is not None)
        self._ref_model, self._prev_model = ref_model, None
        if not precompute_reference:
            known = all(self._known("ref", dataset) for dataset in datasets) and not wants.divergence
            if self._gathers_reference and ref_model is None and not (known or adapters):
                self._ref_model = copy.deepcopy(model)
            known = self._one_source or all(self._known("prev", dataset) for dataset in datasets)
            if wants.previous and not known:
                self._prev_model = copy.deepcopy(model)
        for each in (self._ref_model, self._prev_model):
            if each is not None:
                find_head(each)
                each.requires_grad_(False).eval()
        pad = getattr(processing_class, "pad_token_id", None)
        if data_collator is not None and (sharing != "share" or max_tokens is not None):
            raise ValueError("sharing and max_tokens are the data_collator's own; give them to it")
        collator: Any = data_collator
        if collator is None:
            collator = PackedCollator(sharing, max_tokens, 0 if pad is None else pad)
            for dataset in datasets:
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
        self._ranks = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        self._check_coupling()
        # Metrics have the first of the losses' betas.
        self._beta = next((feed.beta for feed in self._feeds if feed.takes_beta), self._feeds[0].beta)
        if any(feed.running_mean for feed in self._feeds):
            self.add_callback(_RunningMeans())
        for each in (self._ref_model, self._prev_model):
            if each is not None and not hasattr(each, "hf_device_map"):
                each.to(self.args.device)
        sharing = getattr(collator, "sharing", "off")  # of an unknown collator the first batch will tell
        if sharing != "off":
            from prefcore.hf.attention import check

            for each in (self.model, self._ref_model, self._prev_model):
                if each is not None:
                    with self.accelerator.autocast():
                        check(find_head(each).backbone, sharing, attention, train=each is self.model)
        if precompute_reference:
            self.train_dataset, self.eval_dataset = _mapped(self._with_logps, self.train_dataset, self.eval_dataset)
            self._ref_model = None

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names under which several losses are logged apart, after ``losses/``."""
        return tuple(feed.name for feed in self._feeds)

    @property
    def beta(self) -> float | Tensor:
        """The scale of the logged rewards: the beta of the first loss that has one."""
        return self._beta

    def training_step(
        self,
        model: nn.Module,
        inputs: list[PackedBatch],  # type: ignore[override]
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if num_items_in_batch is None:
            num_items_in_batch = self._counts(inputs) * self.accelerator.num_processes
        if len(inputs) > 1 and any(feed.couples for feed in self._feeds):
            raise ValueError("the data_collator divides a batch, whose examples the loss couples")
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
            num_items_in_batch = self._counts(inputs) * self.accelerator.num_processes
        counts: Any = num_items_in_batch
        loss: Any = 0.0
        outputs = []
        for batch in inputs:
            run = functools.partial(self._run_policy, self.model)
            gathered = self._gather(batch, *_inside_forward(model, self.model, run, batch))
            values, metrics = self._terms(gathered)
            # The ranks' gradients are averaged, the pairs are all ranks' own.
            shares = (self.accelerator.num_processes / counts).to(gathered.policy.logps.dtype)
            for feed, value in zip(self._feeds, values, strict=True):
                loss = loss + feed.weight * value.sum() * shares[_unit(feed)]
            aux_loss = gathered.policy.aux_loss
            if aux_loss is not None:
                loss = loss + aux_loss * gathered.groups * shares[0]
                metrics["aux_loss"] = _column(aux_loss.detach().expand(gathered.groups))
            for feed in self._feeds:
                if feed.running_mean:
                    logps, reference = (gathered.real(gathered.sums(source)) for source in ("", "ref_"))
                    self._delta(feed).observe(logps, reference, beta=feed.beta)
            self._add("train", metrics)
            outputs.append(gathered.real(gathered.sums()).detach())
        return (loss, {"logps": outputs}) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts: Any = sum((self._counts(batch) for batch in batches), torch.zeros(2, dtype=torch.float64))
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts.to(device, torch.float32), "sum")
        return batches, counts

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        if isinstance(eval_dataset, WithExtras):
            check_data(self._feeds, eval_dataset)
            if self._wants.mismatched:
                eval_dataset = _with_mismatched(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

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
                _, metrics = self._terms(self._gather(batch, *self._run_policy(self.model, batch)))
                rows.append(torch.stack(list(metrics.values()), dim=1))
        # The last batch of a distributed evaluation repeats items, which the gathering leaves out; it takes them to be
        # the last ones, hence the dataset's order.
        table = torch.cat(rows)[torch.cat([batch.index for batch in inputs]).argsort().to(rows[0].device)]
        own = table[:, : len(self._feeds)].sum(0)
        weights = own.new_tensor([feed.weight for feed in self._feeds])
        table = self.accelerator.gather_for_metrics(table)
        self._add("eval", dict(zip(metrics, table.unbind(1), strict=True)))
        return (weights * own[:, 0] / own[:, 1]).sum(), None, None

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
        columns = {name for dataset in (self.train_dataset, *_each(self.eval_dataset)) for name in _extras(dataset)}
        self._signature_columns: Any = sorted(PARTS | columns)

    def floating_point_ops(self, inputs: Any) -> int:
        # 6 flops per parameter and token, as transformers counts.
        return 6 * sum(batch.input_ids.numel() for batch in inputs) * self._parameters

    def _prepare_inputs(self, inputs: Any) -> Any:
        return [batch.to(self.args.device) for batch in inputs]

    def _run_policy(self, model: Any, batch: PackedBatch) -> tuple[Policy, Tensor | None]:
        """What the losses want of the policy, and the reference's ``[T]`` where these come with it."""
        reference = None
        outputs = ("log_sum_sq_probs",) if self._wants.log_sum_sq_probs else ()
        with self.accelerator.autocast():
            head = find_head(model)
            hidden = run_backbone(head, batch, self._attention)
            if not self._wants.divergence:
                stats = head_stats(head, hidden.states, batch, outputs=outputs)
                return Policy(stats.logps, hidden.aux_loss, None, stats.log_sum_sq_probs), None
            with self._frozen("ref") as other_model:
                other = find_head(other_model)
                states = run_backbone(other, batch, self._attention).states
            logps, reference, divergences = head_divergence(head, hidden.states, other, states, batch)
            squares = None
            if outputs:
                with torch.no_grad():
                    squares = head_stats(head, hidden.states, batch, outputs=outputs).log_sum_sq_probs
        return Policy(logps, hidden.aux_loss, divergences, squares), reference

    def _gather(self, batch: PackedBatch, policy: Policy, reference_tokens: Tensor | None) -> Gathered:
        reference = previous = None
        if self._gathers_reference:
            reference = self._source("ref", batch, self._reference_tokens, reference_tokens)
        if self._wants.previous:
            own = self._given("prev", batch, self._wants.previous_tokens)
            if own is None and self._one_source:
                previous = reference
            else:
                previous = own or self._source("prev", batch, self._wants.previous_tokens)
        device = policy.logps.device  # that of the head, of a model on several
        if batch.cu_seqlens.device != device:
            batch = batch.to(device)
            reference, previous = (source and source.to(device) for source in (reference, previous))
        return Gathered(batch, policy, reference, previous, self._wants.mismatched)

    def _source(self, source: str, batch: PackedBatch, tokens: bool, gathered: Tensor | None = None) -> Source:
        if gathered is not None:
            return Source(None, gathered)
        given = self._given(source, batch, tokens)
        if given is not None:
            return given
        if source == "ref":
            gone = self._ref_model is None and not hasattr(self.model, "disable_adapter")
        else:
            gone = self._prev_model is None
        if gone:
            kind = "reference" if source == "ref" else "previous iterate"
            raise RuntimeError(
                f"this dataset has no log-probs of the {kind}, and the {kind} is gone; see with_reference"
            )
        with self._frozen(source) as model:
            return Source(None, self._score(model, batch))

    def _given(self, source: str, batch: PackedBatch, tokens: bool) -> Source | None:
        """The log-probs that came with the batch."""
        extras = batch.extras
        if f"{source}_token_logps" in extras:
            return Source(None, extras[f"{source}_token_logps"])
        if tokens:
            return None
        if f"{source}_logps" in extras:
            return Source(extras[f"{source}_logps"], None)
        if source == "ref" and _PAIR[0] in extras:
            return Source(torch.stack([extras[name] for name in _PAIR], dim=1).flatten(), None)
        return None

    def _known(self, source: str, dataset: WithExtras) -> bool:
        """Whether :meth:`_given` finds them in a dataset's batches."""
        tokens = {"ref": self._reference_tokens, "prev": self._wants.previous_tokens}[source]
        names = {f"{source}_token_logps"} | ({f"{source}_logps"} if not tokens else set())
        if source == "ref" and not tokens:
            names.add(_PAIR[0])
        return not names.isdisjoint(dataset.extras)

    def _check_given(self, datasets: list[Any], has_model: bool) -> None:
        """Raise where the model would stand in for a reference or previous iterate that the data have log-probs of."""
        wanted = {"ref": self._wants.reference and not has_model, "prev": self._wants.previous}
        for source in (source for source, wants in wanted.items() if wants):
            for dataset in datasets:
                self._refuse_unused(source, dataset)
            if len({self._known(source, dataset) for dataset in datasets}) > 1:
                kind = "reference" if source == "ref" else "previous iterate"
                raise ValueError(
                    f"some datasets have log-probs of the {kind} and others have none; give all of them some"
                )

    def _refuse_unused(self, source: str, dataset: Any) -> None:
        bare = dataset.dataset if isinstance(dataset, WithMismatched) else dataset
        unused = sorted({name for name in (*bare.extras, *dataset.extras) if name.startswith(f"{source}_")})
        whole = source == "ref" and self._wants.divergence
        if unused and (whole or not self._known(source, dataset)):
            if whole:
                reason = "it compares whole distributions"
            elif self._wants.mismatched:
                reason = "it also takes log-probs of responses to other prompts, see prefcore.data.lists.WithMismatched"
            else:
                reason = f"it takes log-probs of tokens, {source}_token_logps"
            other = "give ref_model, or leave them out" if source == "ref" else "leave them out"
            raise ValueError(f"the loss cannot be fed the {', '.join(unused)} of a dataset: {reason}; {other}")

    @contextmanager
    def _frozen(self, source: str) -> Iterator[Any]:
        """The model of that source, in evaluation mode and without gradients."""
        given = self._ref_model if source == "ref" else self._prev_model
        with torch.no_grad():
            if given is not None:
                yield given
                return
            model: Any = self.model
            bare = source == "ref" and hasattr(model, "disable_adapter")
            if bare and self._ref_adapter is not None:
                reference_adapter(model, self._ref_adapter)  # adapters may have been switched or deleted since
            with evaluating(model), switched(model, self._ref_adapter) if bare else nullcontext():
                yield model

    def _score(self, model: Any, batch: PackedBatch) -> Tensor:
        with self.accelerator.autocast():
            head = find_head(model)
            return head_logps(head, run_backbone(head, batch, self._attention).states, batch)

    def _terms(self, gathered: Gathered) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The unreduced values of each loss; and by name, ``[G, 2]``, detached, a metric's sum and its count."""
        values, metrics = [], {}
        for feed in self._feeds:
            delta = self._delta(feed).value if feed.running_mean else None
            value = gathered.loss(feed, delta, self._ranks)
            own = value.detach()
            sizes = torch.ones_like(own)
            if _unit(feed):
                own, sizes = gathered.by_group(own), gathered.by_group(sizes)
            metrics[f"losses/{feed.name}"] = torch.stack([own, sizes], dim=1)
            values.append(value)
        return values, metrics | self._metrics(gathered)

    def _metrics(self, gathered: Gathered) -> dict[str, Tensor]:
        logps = gathered.real(gathered.sums()).detach()
        # Without a reference, rewards are beta times the log-probs, as in TRL.
        base = torch.zeros_like(logps)
        if self._gathers_reference or self._wants.previous:
            base = gathered.real(gathered.sums("ref_" if self._gathers_reference else "prev_"))
        best, worst = gathered.extremes()
        named = losses.preference_metrics(logps[best], logps[worst], base[best], base[worst], beta=self._beta).named()
        if gathered.paired:
            return {name: _column(value) for name, value in named.items()}
        labels = gathered.labels()
        ranked, single = labels[best] > labels[worst], gathered.cu_groups.diff() == 1
        counted = {
            "chosen": ranked | (single & (labels[best] > 0.5)),
            "rejected": ranked | (single & (labels[best] <= 0.5)),
        }
        return {name: _column(value, counted.get(name.split("/")[1], ranked)) for name, value in named.items()}

    def _delta(self, feed: Feed) -> Any:
        means = next(c for c in self.callback_handler.callbacks if isinstance(c, _RunningMeans))
        return means.of(feed.name, self.args.device, self._ranks)

    def _counts(self, batches: list[PackedBatch]) -> Tensor:
        """Numbers of pairs or lists, and of their responses."""
        groups = _groups(batches)
        sequences = sum(batch.cu_seqlens.numel() - 1 for batch in batches)
        return torch.tensor([groups, sequences - groups * self._wants.mismatched], dtype=torch.float64)

    def _check_coupling(self) -> None:
        """Say, or refuse, what becomes of a loss of all examples of a batch together."""
        coupled = [feed for feed in self._feeds if feed.couples]
        for feed in coupled:
            if self._ranks is not None and not feed.counts_over_ranks:
                raise NotImplementedError(
                    f"the loss {feed.name!r} couples the examples of a batch, and on {self.accelerator.num_processes} "
                    "ranks each has a batch of its own; run it on one"
                )
        if coupled and self.args.gradient_accumulation_steps > 1:
            logger.warning(
                "the loss %r couples the examples of a batch: of the %d batches of a step each is coupled on its own",
                coupled[0].name,
                self.args.gradient_accumulation_steps,
            )

    def _with_logps(self, dataset: Any, name: str) -> Any:
        """The dataset with the log-probs that the losses want of reference and previous iterate."""
        sources = [("ref", self._gathers_reference, self._reference_tokens)]
        if not self._one_source:
            sources.append(("prev", self._wants.previous, self._wants.previous_tokens))
        for source, wanted, tokens in sources:
            if wanted and not self._known(source, dataset):
                values = self._precompute(source, dataset, tokens, name)
                dataset = dataset.with_extras(**{f"{source}_token_logps" if tokens else f"{source}_logps": values})
        return dataset

    @property
    def _reference_tokens(self) -> bool:
        return self._wants.reference_tokens or (self._one_source and self._wants.previous_tokens)

    def _precompute(self, source: str, dataset: WithExtras, tokens: bool, name: str) -> list[Any]:
        """For each item the log-probs of its responses, or for each of these those of its tokens."""
        lengths = [dataset.scored_lengths(index) for index in range(len(dataset))]
        sizes = np.array([sum(own) if tokens else len(own) for own in lengths])
        starts = offsets(sizes)
        flat = torch.zeros(int(starts[-1]), device=self.args.device)
        mine = np.arange(self.accelerator.process_index, len(dataset), self.accelerator.num_processes)
        size = self.args.per_device_eval_batch_size
        loader = DataLoader(Subset(dataset, mine.tolist()), batch_size=size, collate_fn=self.data_collator)
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        kind = {"ref": "reference", "prev": "previous iterate"}[source]
        done = 0
        for batches in tqdm(loader, desc=f"{kind} ({name})", disable=hidden, leave=False):
            for host, batch in zip(batches, self._prepare_inputs(batches), strict=True):
                with self._frozen(source) as model:
                    values = self._score(model, batch)
                if not tokens:
                    values = prefcore.sequence_reduce(values, batch.cu_seqlens.to(values.device), "sum")
                items = mine[done + host.index.numpy()]
                flat[torch.from_numpy(ranges(starts[items], sizes[items])).to(flat.device)] = values.to(flat)
            done += _groups(batches)
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(flat, "sum")
        parts = np.split(flat.cpu().numpy(), starts[1:-1])
        if not tokens:
            return parts
        return [np.split(part, np.cumsum(own)[:-1]) for part, own in zip(parts, lengths, strict=True)]

    def _add(self, split: str, metrics: dict[str, Tensor]) -> None:
        # Sums stay on the device until they are logged: no step waits for them.
        total = torch.stack([value.double().sum(0) for value in metrics.values()])
        if split in self._totals:
            total += self._totals[split][1]
        self._totals[split] = (list(metrics), total)

    def _means(self, split: str, reduce: bool = False) -> dict[str, float]:
        if split not in self._totals:
            return {}
        names, total = self._totals.pop(split)
        if reduce and self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, "sum")
        means = {name: sums / count for name, (sums, count) in zip(names, total.tolist(), strict=True) if count}
        if split == "eval":
            means["loss"] = sum(feed.weight * means[f"losses/{feed.name}"] for feed in self._feeds)
        if len(self._feeds) == 1:
            del means[f"losses/{self._feeds[0].name}"]
        if "rewards/margins" not in means and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means


class _RunningMeans(TrainerCallback, ExportableState):
    """The means of all rewards so far that losses are held against; they move once a step."""

    def __init__(self) -> None:
        self.saved: dict[str, list[float]] = {}
        self._means: dict[str, Any] = {}

    def of(self, name: str, device: torch.device, process_group: Any) -> Any:
        if name not in self._means:
            self._means[name] = losses.BCODelta(device=device, process_group=process_group)
            if name in self.saved:
                self._means[name].load_state_dict({"mean": torch.tensor(self.saved[name], dtype=torch.float64)})
        return self._means[name]

    def state(self) -> dict[str, Any]:
        now = {name: mean.state_dict()["mean"].tolist() for name, mean in self._means.items()}
        return {"args": {}, "attributes": {"saved": {**self.saved, **now}}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(kept, dict):
            self.saved = kept["attributes"]["saved"]
            self._means.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for mean in self._means.values():
            mean.step()


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


def _groups(batches: list[PackedBatch]) -> int:
    return sum(batch.cu_groups.numel() - 1 for batch in batches)


def _unit(feed: Feed) -> int:
    """What a loss is a mean over, as :meth:`PreferenceTrainer._counts` counts: pairs or lists, or responses."""
    return int(feed.method.family == "unpaired")


def _column(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """``[G, 2]``: values and how often each counts, 1, or 0 where not ``counted``."""
    if counted is None:
        return torch.stack([values, torch.ones_like(values)], dim=1)
    return torch.stack([torch.where(counted, values, 0), counted.to(values.dtype)], dim=1)


def _mapped(function: Callable[[Any, str], Any], train: Any, held_out: Any) -> tuple[Any, Any]:
    """``function(dataset, name)`` of each dataset there is."""
    if train is not None:
        train = function(train, "train")
    if isinstance(held_out, dict):
        return train, {name: function(dataset, name) for name, dataset in held_out.items()}
    return train, None if held_out is None else function(held_out, "eval")


def _with_mismatched(dataset: Any, name: str = "") -> WithMismatched:
    return dataset if isinstance(dataset, WithMismatched) else WithMismatched(dataset)


def _extras(dataset: Any) -> tuple[str, ...]:
    return dataset.extras if isinstance(dataset, WithExtras) else ()


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
