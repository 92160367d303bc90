"""TRL's padded batches through packed rows: what ``DPOTrainer`` and ``GRPOTrainer`` share.

TRL's trainers call ``model(..., labels=labels, fused_lm_head=True)``, a forward that TRL bound to the model. It is
wrapped once more here, on the model itself, so that PEFT, DDP and accelerate, which wrap it further, still go through.
"""

from __future__ import annotations

import functools
import logging
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import get_mixed_precision_context_manager
from torch import Tensor, nn

from prefcore.data import PackedBatch, pack
from prefcore.hf.attention import check
from prefcore.hf.head import Head, base_model, evaluating, find_head
from prefcore.hf.scoring import head_stats, run_backbone

try:
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError(
        "prefcore.trl packs batches for TRL 1.16 and later; trl.trainer.utils.FusedCausalLMOutput was looked for: "
        f"{error}"
    ) from error

logger = logging.getLogger(__name__)

_IGNORED = -100


class Packing(NamedTuple):
    """A padded batch, packed."""

    batch: PackedBatch
    places: Tensor  # int64 [T], of each scored token its place among the B * (L - 1) of the padded fields


@dataclass
class PackedCounts:
    """What the forward passes of a trainer's models were given and what they ran, added up; of all its models.

    Attributes:
        batches: forward passes on packed rows.
        padded_tokens: tokens of the padded batches that TRL made.
        tokens: tokens that the backbone ran in their place.
        scored_tokens: rows that met the head.
        unpacked_batches: forward passes left to TRL: rows whose attention mask has holes, or a scored token without
            one before it.
    """

    batches: int = 0
    padded_tokens: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    unpacked_batches: int = 0


def pack_padded(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Packing | None:
    """Pack the rows of a padded batch, each distinct prompt once.

    Of a row the prompt is what it attends to before its first scored token, the response the rest; tokens inside it
    with the label -100 are run and not scored. Rows without a scored token are left out; where no row has one, the
    shortest stands for all, so that the batch still has its zeros with a gradient.

    Args:
        input_ids: int64 ``[B, L]``, padded on the left, on the right or on both sides.
        attention_mask: 0 at padding; None where there is none.
        labels: ``[B, L]``; that of a row's first token is not looked at, since nothing predicts it.

    Returns:
        On the device of ``input_ids``; None where some row does not attend to one run of tokens, or scores a token
        that it does not attend to or that has none before it.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    # One wait for a GPU, not three.
    ids, attended, targets = torch.stack([input_ids, mask.to(input_ids), labels.to(input_ids)]).cpu().numpy()
    attended, scored = attended != 0, targets != _IGNORED
    scored[:, :1] = False
    before = np.zeros_like(attended)
    before[:, 1:] = attended[:, :-1]
    lengths = attended.sum(1)
    runs = (attended & ~before).sum(1)
    if (runs > 1).any() or (scored & ~(attended & before)).any():
        return None

    rows = np.flatnonzero(scored.any(1))
    if not len(rows):
        rows = np.flatnonzero(lengths > 1)
        if not len(rows):
            return None
        rows = rows[lengths[rows].argmin()][None]
    starts = attended.argmax(1)
    groups: dict[bytes, list[tuple[int, int]]] = {}  # by prompt, the rows and where their responses begin
    for row in rows.tolist():
        # A row that stands for all has no scored token: its last one is its response.
        first = int(scored[row].argmax()) if scored[row].any() else int(starts[row] + lengths[row] - 1)
        groups.setdefault(ids[row, starts[row] : first].tobytes(), []).append((row, first))

    members = list(groups.values())
    end = starts + lengths
    batch = pack(
        [ids[row, starts[row] : first] for (row, first), *_ in members],
        [[ids[row, first : end[row]] for row, first in group] for group in members],
        masks=[[scored[row, first : end[row]] for row, first in group] for group in members],
    )
    order = [row for group in members for row, _ in group]
    number, position = np.nonzero(scored[order])
    places = np.array(order)[number] * (ids.shape[1] - 1) + position - 1
    return Packing(batch.to(input_ids.device), torch.from_numpy(places).to(input_ids.device))


class Packer:
    """What the forwards of a trainer's models share; it does not hold the trainer, which a model may outlive.

    Args:
        accelerator: whose autocast the forwards run in.

    Attributes:
        counts: of all of them.
        made: while it is a list, what each of them returned.
    """

    def __init__(self, accelerator: Any) -> None:
        self.counts = PackedCounts()
        self.made: list[Any] | None = None
        self._autocast = accelerator.autocast_handler if accelerator.native_amp else None
        self._mixed = accelerator.native_amp
        self._last: tuple[list[Any], list[int], Packing | None] = ([], [], None)

    def autocast(self) -> AbstractContextManager:
        return get_mixed_precision_context_manager(True, self._autocast) if self._mixed else nullcontext()

    def packing(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Packing | None:
        """:func:`pack_padded`, once for tensors that policy and reference are given one after the other."""
        given = [x for x in (input_ids, attention_mask, labels) if x is not None]
        if any(x.is_inference() for x in given):  # they have no version: a change would not be seen
            return pack_padded(input_ids, attention_mask, labels)
        versions = [x._version for x in given]
        references, known, packing = self._last
        if versions != known or any(r() is not x for r, x in zip(references, given, strict=True)):
            packing = pack_padded(input_ids, attention_mask, labels)
            self._last = [weakref.ref(x) for x in given], versions, packing
        return packing


class PackedForward:
    """Runs the batches that TRL hands to a model with ``fused_lm_head=True`` packed; one for each model.

    Args:
        packer: of the trainer.
        outputs: what TRL asks for beside log-probs: those of ``FusedCausalLMOutput``.
        temperature: divides the logits.
        float32_head: whether the head runs in float32, outside autocast.
    """

    def __init__(
        self, packer: Packer, outputs: tuple[str, ...], temperature: float = 1.0, float32_head: bool = False
    ) -> None:
        self._packer = packer
        self._outputs = outputs
        self._temperature = temperature
        self._float32_head = float32_head

    def install(self, model: nn.Module, train: bool) -> None:
        """Wrap the forward that TRL bound to ``model``.

        Raises:
            NotImplementedError: a head or an attention that prefcore does not run.
        """
        # As accelerate has it around a reference's own forward already.
        with self._packer.autocast():
            head = self._head(model)
            if self._float32_head:
                _compare(model, head)
            try:
                check(head.backbone, "share", train=train)
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"prefcore.trl cannot pack the batches of {type(model).__name__}, use trl's own trainer: {error}"
                ) from None
        theirs = model.forward

        # The signature of the model's own forward: `generate` looks at it.
        @functools.wraps(type(model).forward)
        def forward(module: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if args or not fused_lm_head:
                return theirs(*args, fused_lm_head=fused_lm_head, **kwargs)
            out = self(module, theirs, **kwargs)
            if self._packer.made is not None:
                self._packer.made.append(out)
            return out

        model.forward = types.MethodType(forward, model)

    def __call__(
        self,
        model: Any,
        theirs: Callable[..., Any],
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_router_logits: bool | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> FusedCausalLMOutput:
        unknown = sorted(name for name, value in others.items() if value is not None)
        if input_ids is None or labels is None or unknown:
            raise NotImplementedError(
                "prefcore.trl packs batches of input_ids, attention_mask and labels, got "
                f"{', '.join(unknown) or 'no input_ids or no labels'}; use trl's own trainer"
            )
        counts = self._packer.counts
        packing = self._packer.packing(input_ids, attention_mask, labels)
        if packing is None:
            counts.unpacked_batches += 1
            given = {"attention_mask": attention_mask, "output_router_logits": output_router_logits}
            given = {name: value for name, value in given.items() if value is not None}
            return theirs(
                input_ids=input_ids,
                labels=labels,
                fused_lm_head=True,
                num_items_in_batch=num_items_in_batch,
                **given,
            )
        batch, places = packing
        counts.batches += 1
        counts.padded_tokens += input_ids.numel()
        counts.tokens += batch.input_ids.numel()
        counts.scored_tokens += batch.targets.numel()

        config = model.config.get_text_config()
        routed = output_router_logits
        if routed is None:
            routed = bool(getattr(config, "output_router_logits", False))
        # accelerate wraps the policy's forward in autocast from train() on, and the reference's inside this one.
        with self._packer.autocast():
            head = self._head(model)
            with _router_logits(config, routed):
                hidden = run_backbone(head, batch)
            if self._float32_head:
                with torch.autocast(batch.input_ids.device.type, enabled=False):
                    stats = head_stats(head, hidden.states.float(), batch, self._temperature, self._outputs)
            else:
                stats = head_stats(head, hidden.states, batch, self._temperature, self._outputs)

        mask = labels[:, 1:].to(stats.logps.device) != _IGNORED
        places = places.to(stats.logps.device)
        padded = lambda values: values.new_zeros(mask.numel()).index_copy(0, places, values).view(mask.shape)
        log_probs = padded(stats.logps)
        loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if hidden.aux_loss is not None:
            loss = loss + hidden.aux_loss
        return FusedCausalLMOutput(
            loss=loss,
            log_probs=log_probs,
            label_mask=mask,
            aux_loss=hidden.router_loss,
            **{name: padded(getattr(stats, name)) for name in self._outputs},
        )

    def _head(self, model: Any) -> Head:
        if not self._float32_head:
            return find_head(model)
        # TRL made the weight float32 and gave the module a forward that casts its input, as is done here.
        module = model.get_output_embeddings()
        cast = vars(module).pop("forward")
        try:
            return find_head(model, probe=False)
        finally:
            module.forward = cast


class PackedTrainer:
    """A trainer of TRL's whose batches are packed: mixed into TRL's class, before it."""

    accelerator: Any
    args: Any
    model: Any
    ref_model: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    packer: Packer | None = None

    @property
    def packed(self) -> PackedCounts:
        """What TRL's batches held, and what ran in their place."""
        return PackedCounts() if self.packer is None else self.packer.counts

    def pack_models(
        self,
        outputs: tuple[str, ...],
        *,
        temperature: float = 1.0,
        float32_head: bool = False,
    ) -> None:
        """Wrap the forwards of policy and reference, once; ``outputs`` are the policy's beside log-probs.

        Raises:
            NotImplementedError: FSDP, ZeRO-3, parallelism within a sequence or a layer, torch_compile, prompt learning,
                and heads and attention that prefcore does not run.
        """
        if self.packer is not None:
            return
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and _zero_stage(self.accelerator) == 3):
            raise NotImplementedError(
                "FSDP and ZeRO-3 shard the head, which prefcore does not yet; use DDP or ZeRO-1/2, or trl's own trainer"
            )
        sizes = self.accelerator.parallelism_config
        divided = [name for name in ("tp_size", "cp_size", "sp_size") if getattr(sizes, name, 1) > 1]
        if divided:
            raise NotImplementedError(f"{', '.join(divided)} above 1: packed rows are not divided among ranks")
        if self.args.torch_compile:
            raise NotImplementedError("torch_compile=True; compile the layers instead, before: model.model.compile()")
        packer = Packer(self.accelerator)
        make = functools.partial(PackedForward, packer, temperature=temperature, float32_head=float32_head)
        make(outputs).install(base_model(self.model), train=True)
        if self.ref_model is not None:
            make(()).install(base_model(self.accelerator.unwrap_model(self.ref_model)), train=False)
        self.packer = packer


def refuse_images(dataset: Any) -> None:
    """Raise where a dataset's rows hold images."""
    columns = set(getattr(dataset, "column_names", None) or ())
    if columns & {"image", "images"}:
        raise NotImplementedError("prefcore.trl packs text; for images use trl's own trainer")


@contextmanager
def _router_logits(config: Any, wanted: bool) -> Iterator[None]:
    """Have :func:`run_backbone` return the routers' loss, or none."""
    kept = getattr(config, "output_router_logits", None)
    if kept is None:
        yield
        return
    config.output_router_logits = wanted
    try:
        yield
    finally:
        config.output_router_logits = kept


@torch.no_grad()
def _compare(model: Any, head: Head) -> None:
    """Raise unless the head gives the model's own logits; for a head that TRL made float32."""
    weight = head.weight
    ids = torch.arange(8, device=model.get_input_embeddings().weight.device).remainder(weight.shape[0])[None]
    with evaluating(model):
        hidden = head.backbone(input_ids=ids, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            mine = head.logits(hidden.float())
        theirs = model(input_ids=ids, use_cache=False).logits.to(mine)
    # The same products in the same dtype; what an unknown scale or softcap does is larger by far.
    if not (mine - theirs).abs().max() <= 1e-3 * theirs.abs().max():
        raise NotImplementedError(f"the logits of {type(model).__name__} are not those of the head that was found")


def _zero_stage(accelerator: Any) -> int:
    return accelerator.state.deepspeed_plugin.zero_stage
