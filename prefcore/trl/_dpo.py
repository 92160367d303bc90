"""TRL's ``DPOTrainer`` on packed rows, and with the losses of prefcore's catalogue."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import nn

from prefcore import losses
from prefcore.hf.feeding import Feed, Gathered, Policy, Source, Wants, read_losses
from prefcore.trl._packed import PackedTrainer, refuse_images

_NAME = "prefcore.trl.DPOTrainer"
# What trl.DPOTrainer computes itself.
TRL_LOSSES = frozenset(
    (
        "aot",
        "aot_unpaired",
        "apo_down",
        "apo_zero",
        "bco_pair",
        "discopop",
        "exo_pair",
        "hinge",
        "ipo",
        "nca_pair",
        "robust",
        "sft",
        "sigmoid",
        "sigmoid_norm",
        "sppo_hard",
    )
)


class DPOTrainer(PackedTrainer, trl.DPOTrainer):
    """``trl.DPOTrainer`` whose batches run packed: each prompt runs once for all its responses, nothing is padded, and
    only scored tokens meet the head.

    Losses, f-divergences, metrics, precomputed references, PEFT and the rest are TRL's own code and give TRL's
    numbers, up to rounding. ``loss_type`` of TRL's ``DPOConfig`` may also name losses of :mod:`prefcore.losses`, alone
    or in a list with ``loss_weights`` beside TRL's: losses of pairs, listwise ones, which see a pair as a list with the
    labels 1 and 0, of single responses, of tokens where log-probs do, and imitation of the chosen response. A name that
    TRL knows is always TRL's computation. A loss of the catalogue takes ``beta`` from the config, its other arguments
    from ``loss_args``, and counts with its mean, times its weight.

    Where no loss has a reference (TRL's ``"sft"`` beside one of the catalogue has none), no reference is loaded
    or run, and the logged rewards are beta times the log-probs.

    What differs from TRL's forward: positions count the tokens that are attended to, which matters to learned
    positions beside padding on the left; dropout, where it is on, draws once for a shared prompt; and the loss of
    a mixture of experts' routers counts each distinct prompt once and leaves out rows without a scored token,
    where TRL's counts every copy. The logits for ``compute_metrics`` are of TRL's own forward.

    Args:
        model, ref_model, args, *others, **kwargs: as ``trl.DPOTrainer`` has them.
        loss_args: arguments of the catalogue's losses; of several losses each takes those that it knows, or
            ``{"simpo": {...}, ...}``, the arguments of each. A ``beta`` among them replaces the config's in the loss;
            the logged rewards keep the config's.

    Raises:
        TypeError: arguments that no loss takes.
        ValueError: an unknown loss, one that needs data that preference datasets of TRL's do not have, a reference
            for losses without one, or options of TRL's losses that those of the catalogue do not take.
        NotImplementedError: a loss that needs more than log-probs of policy and reference, images, FSDP, ZeRO-3,
            torch_compile, prompt learning, and heads and attention that prefcore does not run.
    """

    # TRL's own, for where it is not installed and its classes are unknown.
    loss_types: list[str]
    loss_weights: list[float]
    _reference_free = False

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *others: Any,
        loss_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_images(others[1] if len(others) > 1 else kwargs.get("train_dataset"))
        names = ["sigmoid"] if args is None else list(args.loss_type)
        weights = (None if args is None else args.loss_weights) or [1.0] * len(names)
        mine = [(name, weight) for name, weight in zip(names, weights, strict=True) if name not in TRL_LOSSES]
        self._own = [(name, weight) for name, weight in zip(names, weights, strict=True) if name in TRL_LOSSES]
        self._feeds = _read(names, mine, args, loss_args)
        self._wants = Wants.of(self._feeds)
        free = bool(mine) and not self._wants.reference and {name for name, _ in self._own} <= {"sft"}
        if mine:
            _check_options(args, self._feeds, bool(self._own), free, ref_model)
        self._reference_free = free
        precompute = getattr(args, "precompute_ref_log_probs", False)
        try:
            if free:
                args.precompute_ref_log_probs = True  # so TRL makes no reference; see ref_model
            super().__init__(model, ref_model, args, *others, **kwargs)
        finally:
            if free:
                args.precompute_ref_log_probs = precompute
        if free:
            self.precompute_ref_logps = False
        coupled = [feed.name for feed in self._feeds if feed.couples]
        if coupled and self.accelerator.num_processes > 1:
            raise NotImplementedError(
                f"the loss {coupled[0]!r} couples the examples of a batch, and on {self.accelerator.num_processes} "
                "ranks each has a batch of its own; run it on one"
            )
        self._pack()

    @property
    def ref_model(self) -> Any:
        return self._ref_model

    @ref_model.setter
    def ref_model(self, value: Any) -> None:
        self._ref_model = value
        if self._reference_free:
            # TRL has just decided to keep no reference; what it would do next is hash and run the model for one.
            self.args.precompute_ref_log_probs = False

    def _pack(self) -> None:
        weighs = self.use_weighting or self._wants.log_sum_sq_probs
        self.pack_models(("entropy", "mean_logits", "is_top1", *(("log_sum_sq_probs",) if weighs else ())))

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._pack()  # in the constructor of TRL's, when the models are ready
        return super()._precompute_ref_logps(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        if not self._feeds or self.packer is None:
            return super()._compute_loss(model, inputs, return_outputs)
        policy: list[Any] = []
        made: list[Any] = []

        # DDP looks at what comes out of its forward: the policy's output must be taken from there.
        def recorded(**kwargs: Any) -> Any:
            policy.append(model(**kwargs))
            return policy[-1]

        kept = self.loss_types, self.loss_weights, self.precompute_ref_logps
        try:
            self.loss_types = [name for name, _ in self._own]
            self.loss_weights = [weight for _, weight in self._own]
            if self._reference_free:
                self.precompute_ref_logps = True
                zeros = torch.zeros(len(inputs["input_ids"]) // 2, device=inputs["input_ids"].device)
                inputs = {**inputs, "ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
            self.packer.made = made
            out = super()._compute_loss(recorded, inputs, return_outputs)
            reference = None if self.precompute_ref_logps else made[1]
        finally:
            self.loss_types, self.loss_weights, self.precompute_ref_logps = kept
            self.packer.made = None
        loss, outputs = out if return_outputs else (out, None)
        gathered = _gather(inputs, policy[0], reference)
        for feed in self._feeds:
            loss = loss + feed.weight * gathered.loss(feed, None, None).mean()
        return (loss, outputs) if return_outputs else loss


def _read(names: Sequence[str], mine: Sequence[tuple[str, float]], args: Any, loss_args: Any) -> list[Feed]:
    """The catalogue's losses ``mine`` among the ``names`` of a config."""
    for name, _ in mine:
        _check_name(name)
    if not mine:
        if loss_args:
            raise TypeError(
                f"loss_args are for losses of prefcore.losses, and loss_type names none ({', '.join(names)}); the "
                "options of TRL's losses are those of DPOConfig"
            )
        return []
    if isinstance(loss_args, Mapping):
        for name in names:
            if name in TRL_LOSSES and isinstance(loss_args.get(name), Mapping):
                raise TypeError(
                    f"loss_args holds arguments of {name!r}, which is TRL's own loss; its options are in DPOConfig"
                )
    catalogue, weights = zip(*mine, strict=True)
    try:
        return read_losses(catalogue, args.beta, loss_args, weights, (), _NAME)
    except TypeError as error:
        raise TypeError(f"loss_args of {_NAME}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{_NAME}: {error}") from None


def _check_name(name: Any) -> None:
    try:
        losses.get(name)
    except ValueError:
        known = {other.lower(): other for other in (*TRL_LOSSES, *losses.names())}
        close = [known[other] for other in difflib.get_close_matches(str(name).lower(), known)]
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"loss_type {name!r} is neither TRL's ({', '.join(sorted(TRL_LOSSES))}) nor one of "
            f"prefcore.losses.names(){hint}"
        ) from None


def _check_options(args: Any, feeds: Sequence[Feed], has_own: bool, free: bool, ref_model: Any) -> None:
    """Refuse what the trainer does not have for losses of the catalogue, and what these would not heed."""
    for feed in feeds:
        lacks = {
            "log-probs under the previous iterate": feed.gathers("prev_"),
            "divergences over the whole vocabulary (kl_values)": "kl_values" in feed.inputs,
            "log-probs of responses to other prompts": feed.mismatched,
            "the mean of all rewards so far": feed.running_mean,
        }
        for what, needed in lacks.items():
            if needed:
                raise NotImplementedError(
                    f"{_NAME} has no {what}, which the loss {feed.name!r} needs; prefcore.hf.PreferenceTrainer has"
                )
        if args.precompute_ref_log_probs and feed.of_tokens and feed.gathers("ref_"):
            raise NotImplementedError(
                f"precompute_ref_log_probs=True keeps sums, and the loss {feed.name!r} needs the reference's log-probs "
                "of tokens"
            )
    names = ", ".join(repr(feed.name) for feed in feeds)
    options = {"use_weighting": args.use_weighting, "ld_alpha": args.ld_alpha is not None}
    if not has_own:
        options["label_smoothing"] = bool(args.label_smoothing)
    given = [name for name, set_ in options.items() if set_]
    if given:
        raise ValueError(
            f"{', '.join(given)}: an option of TRL's own losses, which {names} would not heed; see loss_args, and the "
            "catalogue's wpo, ld_dpo and cdpo"
        )
    if free and (ref_model is not None or args.sync_ref_model):
        given = ["ref_model" if ref_model is not None else "sync_ref_model"]
        raise ValueError(f"the losses need no reference ({names}); leave {given[0]} out")


def _gather(inputs: Any, policy: Any, reference: Any) -> Gathered:
    """Log-probs of the pairs' tokens, chosen before rejected pair by pair, as losses are fed them."""
    mask = inputs["completion_mask"][:, 1:].bool().to(policy.log_probs.device)
    pairs = len(mask) // 2
    order = torch.arange(2 * pairs, device=mask.device).view(2, pairs).T.flatten()
    scored = mask[order]
    of_tokens = lambda padded: padded[order][scored]
    logps = of_tokens(policy.log_probs)
    # All that is read of a batch: its offsets, and how many tokens it has.
    batch: Any = SimpleNamespace(
        cu_seqlens=nn.functional.pad(scored.sum(1).cumsum(0), (1, 0)).to(torch.int32),
        cu_groups=torch.arange(0, 2 * pairs + 1, 2, device=mask.device, dtype=torch.int32),
        targets=logps,
        extras={},
    )
    if reference is not None:
        source = Source(None, of_tokens(reference.log_probs))
    else:
        known = [inputs[name].to(logps) for name in ("ref_chosen_logps", "ref_rejected_logps")]
        source = Source(torch.stack(known, dim=1).flatten(), None)
    sums = policy.log_sum_sq_probs
    given = Policy(logps, log_sum_sq_probs=None if sums is None else of_tokens(sums))
    return Gathered(batch, given, source, None, mismatched=False)
