"""A causal LM that answers labels with token statistics and its loss, not with logits."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import prefcore
from prefcore._types import OUTPUTS
from prefcore.hf._peft import unwrapped
from prefcore.hf._routers import read_config, router_loss
from prefcore.hf.head import Head, evaluating, find_head, tolerance

_IGNORED = -100
_PROBE_TOKENS = 8
_RECORD = "_prefcore_forward"  # the attribute of a model that tells its fused forward, whatever has wrapped it since


@dataclass
class TokenStatsOutput(ModelOutput):
    """What a fused model returns where labels are given; ``K`` is ``L - 1``, or ``L`` with ``shift_labels``.

    Statistics are float32 (float64 for a float64 model) and zero where nothing is scored.

    Attributes:
        loss: 0-dim; equal to the loss of the model itself.
        logps: ``[B, K]``, log-probability of each next token; differentiable.
        entropy: ``[B, K]`` in nats, where asked for; differentiable.
        logsumexp: ``[B, K]``, where asked for; differentiable.
        is_top1: ``[B, K]`` bool, where asked for: the label is the first maximum.
        mean_logits: ``[B, K]``, where asked for; without gradient.
        log_sum_sq_probs: ``[B, K]``, where asked for; without gradient.
        targets: ``[B, K]`` int64, the labels that were scored: the next token's, or -100.
        aux_loss: 0-dim, of a mixture's routers, where the model computes it; ``loss`` has it times its coefficient.
        past_key_values: None, unless the caller passed a cache or ``use_cache=True``.
        hidden_states: of each layer, where asked for.
        attentions: of each layer, where asked for.
        router_logits: of each layer, where asked for.
    """

    loss: Tensor | None = None
    logps: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logits: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    targets: Tensor | None = None
    aux_loss: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None

    # No field: Trainer.evaluate pads what it gathers with -100, which is right for targets and True as a bool.
    @property
    def label_mask(self) -> Tensor:
        """``[B, K]`` bool: whether the position is scored. Equal to ``targets != -100``."""
        if self.targets is None:
            raise RuntimeError("this output has no targets, so nothing says which positions are scored")
        return self.targets != _IGNORED


def fuse_head(model: nn.Module, *, outputs: Sequence[str] = (), temperature: float = 1.0) -> nn.Module:
    """Let a causal LM return token statistics instead of logits where it is given labels.

    ``model(input_ids, …, labels=labels)`` then runs the backbone with the caller's arguments, scores only the rows
    whose next token has a label other than -100, and returns a :class:`TokenStatsOutput`: the ``[B, L, V]`` logits
    never exist. Its loss is the model's own (the mean over labels, or their sum over ``num_items_in_batch``, and the
    routers' loss where the model adds it), so ``transformers.Trainer`` trains with it as it is; with nothing to score
    it is a zero with zero gradients, where the model's own mean is NaN. ``shift_labels`` are scored where they stand.
    Without labels the model's own forward runs: generation, caches and ``logits_to_keep`` are as before.

    Only the instance's ``forward`` changes, not its class, config, parameters, or what ``save_pretrained`` writes.
    Copies and pickles of the model are fused as well, each with its own weights. PEFT, ``torch.compile``,
    ``dispatch_model`` and gradient checkpointing may come before or after, DDP and the Trainer after. Traced by
    ``torch.compile``, a GPU's head takes all rows, since a number of labels would break the graph.
    ``nn.DataParallel`` is not supported. With labels there is no cache unless ``use_cache=True``, so that packed
    sequences told apart by their ``position_ids`` are, as in the Trainer. A trainer of TRL scores with a forward of
    its own, around this one; Liger's ``fused_linear_cross_entropy`` replaces it.

    ``Trainer.evaluate`` with ``prediction_loss_only`` gathers nothing more; else the predictions are the tuple
    ``(logps, *outputs, targets)`` in place of logits, and ``compute_metrics`` finds what was scored by
    ``targets != -100``. With ``label_smoothing_factor`` or ``compute_loss_func`` the Trainer keeps the labels to
    itself and reads logits, so that the model's own forward runs.

    Args:
        model: a causal LM, bare or wrapped by PEFT or ``torch.compile``; see :func:`prefcore.hf.find_head` for what
            is refused. Fused already, it takes the new options.
        outputs: further statistics, as :func:`prefcore.linear_logprobs` has them.
        temperature: positive; divides the logits, also those of the loss.

    Returns:
        ``model`` itself, changed in place; :func:`unfuse_head` undoes it.

    Raises:
        TypeError: ``model`` is no causal LM of transformers.
        ValueError: an unknown output, or a temperature that is not positive.
        NotImplementedError: a head that ``find_head`` refuses, a ``forward`` that something else has replaced, or a
            model whose own loss on a few tokens is another.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import torch, prefcore.hf
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16,
        ...                                      num_hidden_layers=1, num_attention_heads=2))
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> out = prefcore.hf.fuse_head(model, outputs=["entropy"])(ids, labels=torch.tensor([[-100, -100, 7]]))
        >>> out.label_mask.tolist(), out.entropy.shape
        ([[False, True]], torch.Size([1, 2]))
    """
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"outputs must be among {', '.join(OUTPUTS)}, got {unknown[0]!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    base = _unwrapped(model)
    found = _installed(base)
    if found is not None:
        forward = found[1]
        forward.outputs, forward.temperature, forward.active = names, float(temperature), True
        setattr(base, _RECORD, forward)
        return model
    slot = _slot(base)
    head = find_head(base, probe=False)
    forward = _FusedForward(base)
    with _own_precision(base, head):
        find_head(base)
        _compare_loss(forward, head)
    forward.outputs, forward.temperature = names, float(temperature)
    setattr(base, slot, forward)
    setattr(base, _RECORD, forward)
    return model


def unfuse_head(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse_head`: the model computes logits for labels again. A model that is not fused stays as it is.

    Args:
        model: as :func:`fuse_head` takes it; PEFT or ``torch.compile`` may have wrapped it since.

    Returns:
        ``model`` itself. Where accelerate's mixed precision or a trainer of TRL has wrapped the fused forward since,
        that one stays beneath and hands every call on to the model's own.
    """
    base = _unwrapped(model)
    slot, forward = _installed(base) or (None, getattr(base, "__dict__", {}).get(_RECORD))
    if forward is not None:
        forward.active = False
        vars(base).pop(_RECORD, None)
    if slot == "forward":
        del base.forward
    elif slot == "_old_forward":
        base._old_forward = types.MethodType(type(base).forward, base)
    return model


class _FusedForward:
    """The ``forward`` of one fused model.

    It holds the model itself, since a bound method would be pickled as its name, which is the class's forward.
    """

    __slots__ = ("active", "loss_function", "model", "names", "outputs", "takes_more", "temperature")

    def __init__(self, model: Any) -> None:
        parameters = inspect.signature(type(model).forward).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        if inspect.Parameter.VAR_POSITIONAL in kinds or "labels" not in [parameter.name for parameter in parameters]:
            raise NotImplementedError(f"the forward of {type(model).__name__} has no parameter 'labels'")
        self.active, self.model = True, model
        self.loss_function = getattr(model, "_loss_function", None)  # what its user has set
        self.outputs: tuple[str, ...] = ()
        self.temperature = 1.0
        self.takes_more = inspect.Parameter.VAR_KEYWORD in kinds
        self.names = tuple(p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD)[1:]

    @property
    def __signature__(self) -> inspect.Signature:  # generate() and Trainer look up what the model takes
        return inspect.signature(types.MethodType(type(self.model).forward, self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:  # accelerate's unwrap_model binds whatever forward it finds
            args = args[1:]
        given = dict(zip(self.names, args, strict=False))
        given.update(kwargs)
        unscored = not self.active or given.get("labels") is None
        doubled = len(given) < len(args) + len(kwargs)
        unknown = not self.takes_more and any(n not in self.names and n != "return_dict" for n in kwargs)
        if unscored or doubled or unknown:  # of the last two, the model's own forward tells the caller
            return type(self.model).forward(self.model, *args, **kwargs)
        return self.score(given)

    def score(self, given: dict[str, Any]) -> Any:
        """The model's output for arguments by name, with labels among them."""
        model = self.model
        if getattr(model, "_loss_function", None) is not self.loss_function:
            raise NotImplementedError(
                f"the loss_function of this {type(model).__name__} was set after fuse_head, which it does not go "
                "through; unfuse_head, or set it before, so that the two are compared"
            )
        labels, shifted = given.pop("labels"), given.pop("shift_labels", None)
        items, return_dict = given.pop("num_items_in_batch", None), given.pop("return_dict", None)
        keep = given.pop("logits_to_keep", None)
        if keep is not None and (isinstance(keep, Tensor) or keep):
            raise ValueError("logits_to_keep does not go with labels: there are no logits; leave one of them out")
        if given.pop("ignore_index", _IGNORED) != _IGNORED:
            raise NotImplementedError(f"a fused model ignores the label {_IGNORED} and no other (ignore_index)")
        arguments = {name: value for name, value in given.items() if value is not None}
        arguments.setdefault("use_cache", False)
        # A forward that does not name it goes by the caller alone.
        if "output_router_logits" in self.names and read_config(model, "output_router_logits"):
            arguments.setdefault("output_router_logits", True)
        head = find_head(model, probe=False)
        out = head.backbone(**arguments, return_dict=True)

        hidden = out.last_hidden_state
        given_labels = labels if shifted is None else shifted
        if given_labels.shape != hidden.shape[:2]:
            name = "labels" if shifted is None else "shift_labels"
            raise ValueError(
                f"{name} must be {tuple(hidden.shape[:2])}, one for each hidden state, got {tuple(given_labels.shape)}"
            )
        targets = (labels[:, 1:] if shifted is None else shifted).to(head.weight.device)
        stats = _stats(head, hidden, targets, self.outputs, self.temperature)
        logps = stats["logps"]
        if items is None:
            items = (targets != _IGNORED).sum().clamp(min=1)
        loss = -logps.sum() / (items.to(logps.device) if isinstance(items, Tensor) else items)
        aux_loss = None
        if arguments.get("output_router_logits"):
            aux_loss, coefficient = router_loss(model, out.router_logits, arguments.get("attention_mask"))
            loss = loss + coefficient * aux_loss.to(loss.device)
        result = TokenStatsOutput(
            loss=loss,
            **stats,
            targets=targets,
            aux_loss=aux_loss,
            past_key_values=getattr(out, "past_key_values", None),
            hidden_states=getattr(out, "hidden_states", None),
            attentions=getattr(out, "attentions", None),
            router_logits=getattr(out, "router_logits", None),
        )
        if return_dict is None:
            return_dict = getattr(model.config, "return_dict", True)
        return result if return_dict else result.to_tuple()


def _stats(head: Head, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...], temperature: float) -> dict[str, Any]:
    """Statistics ``[B, K]`` by name: of the first K rows of each sequence in ``hidden`` ``[B, L, D]``."""
    B, K = targets.shape
    L, D = hidden.shape[1:]
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(head.weight.dtype)  # a head that is kept wider than its backbone
    if torch.compiler.is_compiling():  # a count that depends on the labels would break the graph
        return head.stats(hidden[:, :K], targets, temperature=temperature, outputs=outputs)._asdict()
    flat = targets.reshape(-1)
    places = (flat != _IGNORED).nonzero()[:, 0]
    index = (places // max(K, 1) * L + places % max(K, 1)).to(hidden.device, torch.int32)
    rows = prefcore.gather_rows(hidden.reshape(B * L, D), index)
    stats = head.stats(rows, flat.index_select(0, places), temperature=temperature, outputs=outputs)
    return {
        name: None if each is None else each.new_zeros(B * K).index_copy(0, places, each).view(B, K)
        for name, each in stats._asdict().items()
    }


def _unwrapped(model: Any) -> Any:
    """The transformers model inside ``model``, whose forward all wrappers call."""
    return unwrapped(getattr(model, "_orig_mod", model))


def _installed(model: Any) -> tuple[str, _FusedForward] | None:
    """Where the fused forward of a model is, and that forward."""
    # accelerate keeps what it wraps: dispatch_model in _old_forward, mixed precision in _original_forward.
    for slot in ("forward", "_old_forward", "_original_forward"):
        forward = getattr(model, "__dict__", {}).get(slot)
        forward = forward.__func__ if isinstance(forward, types.MethodType) else forward
        if isinstance(forward, _FusedForward):
            return slot, forward
    return None


def _slot(model: Any) -> str:
    """The attribute that takes the fused forward: inside the hook of accelerate's dispatch_model, where it has one."""
    slot = "_old_forward" if hasattr(model, "_hf_hook") and "_old_forward" in vars(model) else "forward"
    present = vars(model).get(slot)
    if present is not None and getattr(present, "__func__", None) is not type(model).forward:
        # Its __module__ may be copied from the forward that it replaces.
        origin = getattr(getattr(present, "__func__", present), "__globals__", {}).get("__name__", present)
        raise NotImplementedError(
            f"the forward of this {type(model).__name__} was replaced (by {origin}); "
            "call fuse_head before whatever did that, or undo it"
        )
    return slot


def _own_precision(model: Any, head: Head) -> contextlib.AbstractContextManager:
    """Autocast for a probe where the head is wider than its backbone: without it such a model does not run."""
    if model.dtype not in (torch.bfloat16, torch.float16) or head.weight.dtype == model.dtype:
        return contextlib.nullcontext()
    return torch.autocast(head.weight.device.type, model.dtype)


@torch.no_grad()
def _compare_loss(forward: _FusedForward, head: Head) -> None:
    """Raise unless the fused loss of a few tokens, some of them padding, is the model's own."""
    model = forward.model
    name = type(model).__name__
    names = inspect.signature(type(model).forward).parameters
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(2 * _PROBE_TOKENS, device=device) + 1).remainder(head.weight.shape[0]).view(2, -1)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, -2:], labels[0, 3], labels[1, -1] = 0, _IGNORED, _IGNORED
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False, "return_dict": True}
    calls = [inputs]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values()):
        calls.append({**inputs, "num_items_in_batch": torch.tensor(3, device=device)})
    if "output_router_logits" in names:
        calls.append({**inputs, "output_router_logits": True})
    with evaluating(model):
        for call in calls:
            try:
                theirs = model(**call).loss
            except Exception as error:
                if "output_router_logits" in call and not read_config(model, "output_router_logits"):
                    continue  # the model cannot do that itself, and need not
                raise NotImplementedError(f"{name} does not give a loss of {', '.join(call)}: {error}") from error
            try:
                mine = forward(**call).loss
            except NotImplementedError:
                raise
            except Exception as error:
                raise NotImplementedError(f"{name} gives its loss in a way not known here: {error}") from error
            theirs = theirs.to(mine.device)
            if not (mine - theirs).abs() <= tolerance(model.dtype) * theirs.abs().clamp_min(1):
                raise NotImplementedError(
                    f"the loss of {name} is not the mean of -log p(label): for {', '.join(call)} it is {theirs:.6g}, "
                    f"and that mean {mine:.6g}"
                )
