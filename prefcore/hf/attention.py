"""Packed attention inside the models of transformers, unmodified.

An attention function named ``"prefcore"`` is registered with transformers and switched on for the length of one
forward pass; the layout of the batch reaches it as the keyword argument ``prefcore_layout`` of the model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from prefcore.data.packed import PackedBatch, pack
from prefcore.hf import _backends
from prefcore.hf._backends import Call, Needs, Plan

_NAME = "prefcore"
_PROBE = "prefcore_probe"
# Tensors that models hand to their attention and that packed attention knows from the layout.
_KNOWN = ("position_ids", "cache_position")


class Prepared(NamedTuple):
    """What travels through the model as ``prefcore_layout``."""

    backend: str
    plan: Plan


class _Seen(NamedTuple):
    """One attention layer's request, recorded by the probe."""

    head_size: int
    value_size: int
    call: Call


class _Record:
    def __init__(self) -> None:
        self.calls: list[_Seen] = []
        self.masks: set[int | None] = set()


_recording: _Record | None = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    prefcore_layout: Prepared | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: ``query [1, H, N, E]``, ``key`` and ``value``
    ``[1, Hkv, N, E]`` to ``[1, N, H, E]``.

    Raises:
        NotImplementedError: the layout did not arrive here, the layer is not causal, or it asks for what no
            backend, or not this one, has.
    """
    name = type(module).__name__
    if prefcore_layout is None:
        raise NotImplementedError(
            f"{name} does not hand the keyword arguments of the model on to its attention, or it was called while a "
            "packed forward pass of its model was under way"
        )
    # During the probe's recording pass there is none to hand on, and some models make one then.
    if _recording is None and attention_mask is not None and attention_mask.numel():
        raise NotImplementedError(f"{name} has a mask of its own, {tuple(attention_mask.shape)}")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise NotImplementedError(f"{name} is not causal")
    unknown = [key for key, value in kwargs.items() if isinstance(value, Tensor) and key not in _KNOWN]
    if unknown:
        raise NotImplementedError(f"{name} gives its attention {', '.join(unknown)}, which packed attention lacks")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise NotImplementedError(f"{name} asks for attention of {tuple(query.shape)} to {tuple(key.shape)}")
    call = Call(scaling, dropout, sliding_window, softcap, s_aux)
    if _recording is not None:
        _recording.calls.append(_Seen(query.shape[-1], value.shape[-1], call))
    if torch.is_autocast_enabled(query.device.type):
        # Norms of queries and keys leave float32 behind.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    backend, plan = prefcore_layout
    if dropout and backend in ("varlen", "flex"):
        raise NotImplementedError(f"{name} has attention dropout, which the attention backend {backend!r} lacks")
    flat = (x[0].transpose(0, 1) for x in (query, key, value))
    return _backends.BACKENDS[backend].call(plan, *flat, call)[None], None


def _record_mask(*args: Any, **kwargs: Any) -> None:
    """Stands in for a mask of transformers during the probe: which window did the model want?"""
    if _recording is not None:
        _recording.masks.add(kwargs.get("local_size"))


AttentionInterface.register(_NAME, attend)
AttentionInterface.register(_PROBE, attend)
AttentionMaskInterface.register(_PROBE, _record_mask)


class _Switch:
    """Turns a model's attention to ours and back."""

    def __init__(self, backbone: nn.Module) -> None:
        modules: list[Any] = list(backbone.modules())
        found: dict[int, Any] = {
            id(c): c for c in (getattr(m, "config", None) for m in modules) if hasattr(c, "_attn_implementation")
        }
        self.configs = list(found.values())
        # Not the modules themselves: the backbone is among them, and would keep itself alive in _switches.
        self.checkpointing = [weakref.ref(module) for module in modules if hasattr(module, "gradient_checkpointing")]
        self.layers = [weakref.ref(module) for module in modules if "attention" in type(module).__name__.lower()]
        self.found: dict[tuple, Needs | str] = {}  # by use, what check() found of this model
        self._wrapped: dict[int, tuple[Callable, Callable]] = {}

    def dropout(self) -> bool:
        """Whether attention would drop something now."""
        layers: list[Any] = [layer for layer in (ref() for ref in self.layers) if layer is not None]
        return any(layer.training and _dropout_of(layer) > 0 for layer in layers)

    @contextlib.contextmanager
    def on(self, name: str = _NAME) -> Iterator[None]:
        kept = [config._attn_implementation_internal for config in self.configs]
        for config in self.configs:
            config._attn_implementation_internal = name
        try:
            with self._recomputing():
                yield
        finally:
            for config, value in zip(self.configs, kept, strict=True):
                config._attn_implementation_internal = value

    @contextlib.contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Checkpointed layers run again during the backward pass, when the switch is off."""
        modules = [module for module in (ref() for ref in self.checkpointing) if module is not None]
        changed = [(m, m._gradient_checkpointing_func) for m in modules if m.gradient_checkpointing]
        for module, function in changed:
            module._gradient_checkpointing_func = self._with_switch(function)
        try:
            yield
        finally:
            for module, function in changed:
                module._gradient_checkpointing_func = function

    def _with_switch(self, function: Callable) -> Callable:
        # The same wrapper for the same function: a compiled layer guards on it.
        if id(function) not in self._wrapped:
            self._wrapped[id(function)] = (function, functools.partial(self._checkpoint, function))
        return self._wrapped[id(function)][1]

    def _checkpoint(self, function: Callable, layer: Callable, *args: Any, **kwargs: Any) -> Any:
        def run(*inputs: Any, **named: Any) -> Any:
            if all(config._attn_implementation_internal in (_NAME, _PROBE) for config in self.configs):
                return layer(*inputs, **named)
            with self.on():
                return layer(*inputs, **named)

        return function(run, *args, **kwargs)


_switches: weakref.WeakKeyDictionary[nn.Module, _Switch] = weakref.WeakKeyDictionary()
# What the probe found of a class with a configuration: what it asks for, or why it cannot be packed.
_probed: dict[tuple, Needs | str] = {}


def run_packed(backbone: Any, batch: PackedBatch, attention: str = "auto") -> Any:
    """Run a backbone of transformers on a packed batch.

    Args:
        backbone: the model without its head.
        batch: with ``sharing`` ``"share"`` or ``"pack"``, on the backbone's device.
        attention: ``"auto"``, ``"flash"`` (the package flash-attn), ``"varlen"`` (torch's own), ``"flex"``
            (FlexAttention) or ``"sdpa"`` (dense masks). Auto takes the first that can do what the model asks for.

    Returns:
        The backbone's output; its ``last_hidden_state`` is ``[1, N, D]``.

    Raises:
        ValueError: no such backend.
        NotImplementedError: a model that does not follow the layout, found by a probe before its first use, or a
            backend that cannot do what the model asks for.
    """
    needs = check(backbone, batch.sharing, attention)
    prepared = _prepare(backbone, batch, attention, needs)
    with _switch(backbone).on():
        return _forward(backbone, batch, prepared)


def _forward(backbone: Any, batch: PackedBatch, prepared: Prepared) -> Any:
    # transformers makes no mask where one of four dimensions is given. This one fits nothing: a layer that is
    # recomputed, by somebody's own checkpointing, with the model's own attention fails instead of seeing everything.
    mask = None if _recording is not None else batch.input_ids.new_empty((1, 1, 0, 0), dtype=torch.bool)
    return backbone(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=mask,
        use_cache=False,
        return_dict=True,
        prefcore_layout=prepared,
    )


def _prepare(backbone: nn.Module, batch: PackedBatch, attention: str, needs: Needs) -> Prepared:
    device = batch.input_ids.device
    name = _backends.choose(attention, needs, device, _dtype(backbone), torch.is_grad_enabled())
    build = _backends.BACKENDS[name].plan
    key = (build, device, needs.windows)
    return Prepared(name, batch.layout.plan(key, lambda: build(batch.layout, device, needs.windows)))


def _dtype(backbone: nn.Module) -> torch.dtype:
    device = next(backbone.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return backbone.dtype  # type: ignore[return-value]


def _dropout_of(module: Any) -> float:
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        value = getattr(module, name, None)
        value = getattr(value, "p", value)
        if isinstance(value, float):
            return value
    return 0.0


def _refuse_wrappers(backbone: nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    if any(isinstance(module, CheckpointWrapper) for module in backbone.modules()):
        raise NotImplementedError(
            "torch's CheckpointWrapper recomputes layers with the model's own attention; use the model's "
            'gradient_checkpointing_enable(), or sharing="off"'
        )


def _switch(backbone: nn.Module) -> _Switch:
    if backbone not in _switches:
        _refuse_wrappers(backbone)
        _switches[backbone] = _Switch(backbone)
    return _switches[backbone]


def check(backbone: Any, sharing: str, attention: str = "auto", train: bool = False) -> Needs:
    """What a backbone asks of its attention, after a probe of whether it follows a layout.

    The outcome is kept for each class, configuration and set of layers, so the probe (four forward passes of a few
    tokens) runs once for models that are alike. With ``train`` the backend must also have what training needs.

    Raises:
        ValueError, NotImplementedError: as :func:`run_packed`.
    """
    switch = _switch(backbone)
    use = (sharing, attention, next(backbone.parameters()).device.type, _dtype(backbone))
    if use not in switch.found:
        config = json.dumps(backbone.config.to_diff_dict(), sort_keys=True, default=str)
        # A model whose owner replaced layers, or their forwards, is another model.
        parts = tuple((type(module), "forward" in vars(module)) for module in backbone.modules())
        key = (type(backbone), config, parts, *use)
        if key not in _probed:
            _probed[key] = _probe(backbone, switch, sharing, attention)
        switch.found[use] = _probed[key]
    found = switch.found[use]
    if isinstance(found, str):
        kind = "shares its prompts" if sharing == "share" else "packs several sequences into one row"
        raise NotImplementedError(
            f'{type(backbone).__name__} cannot run a batch that {kind}: {found}; sharing="off" pads instead'
        )
    # The model's own settings, not its configuration's: a trainer may have turned dropout off.
    found = found._replace(dropout=switch.dropout())
    if train:
        _backends.choose(attention, found, next(backbone.parameters()).device, _dtype(backbone), grad=True)
    return found


@torch.no_grad()
def _probe(backbone: Any, switch: _Switch, sharing: Any, attention: str) -> Needs | str:
    """Compare a tiny packed batch with its sequences alone, and look for sequences that change one another.

    The second test has no rounding to hide behind: the kernels, shapes and positions are the same, so what a
    sequence gives must not move at all when another one's tokens change.
    """
    global _recording
    try:
        device = backbone.get_input_embeddings().weight.device
    except (NotImplementedError, AttributeError):
        return "it does not say which are its input embeddings"
    sizes = ((5, 3), (1, 7))  # of the prompt and of each response: sequences of one length, so one batch of them
    ids = (torch.arange(64) * 7 + 3).remainder(min(backbone.config.get_text_config().vocab_size, 1009)).tolist()
    draw = iter(ids)
    prompts = [[next(draw) for _ in range(p)] for p, _ in sizes]
    responses = [[[next(draw) for _ in range(r)] for _ in range(2)] for _, r in sizes]
    changed = [[[next(draw) for _ in range(sizes[0][1])], responses[0][1]], responses[1]]
    make = lambda answers: pack(prompts, answers, sharing=sharing).to(device)
    batch, other = make(responses), make(changed)
    alone = torch.tensor([p + r for p, group in zip(prompts, responses, strict=True) for r in group], device=device)

    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    record = _Record()
    try:
        mask = torch.ones_like(alone)
        expected = backbone(input_ids=alone, attention_mask=mask, use_cache=False, return_dict=True).last_hidden_state
        # The dense backend does everything, so the first pass finds out what is asked for.
        _recording = record
        everything = Needs(0, 0, frozenset({None}), True, True, True)
        with switch.on(_PROBE):
            _forward(backbone, batch, _prepare(backbone, batch, "sdpa", everything))
        _recording = None
        needs = _summary(record, backbone.config)
        if isinstance(needs, str):
            return needs
        with switch.on():
            first = _forward(backbone, batch, _prepare(backbone, batch, attention, needs)).last_hidden_state[0]
            second = _forward(backbone, other, _prepare(backbone, other, attention, needs)).last_hidden_state[0]
    except NotImplementedError as error:
        return str(error)
    except (TypeError, AttributeError) as error:
        return f"it does not take position_ids and further keyword arguments without a mask ({error})"
    finally:
        _recording = None
        for module in training:
            module.training = True

    # No token may move that attends to no changed one, prompts' tokens included.
    changes = (batch.input_ids != other.input_ids).cpu().numpy()
    reached = torch.from_numpy(batch.layout.attends() @ changes).to(first.device)
    leak = _relative(second, first)[~reached]
    # Where each token is among the sequences alone.
    segment, position = batch.layout.of_tokens()
    sequence = np.array([0, 0, 1, 2, 2, 3] if sharing == "share" else [0, 1, 2, 3])[segment]
    wanted = expected[torch.from_numpy(sequence), torch.from_numpy(position)]
    # Under autocast a last norm may hand on float32 that was computed in 16 bits.
    eps = max(torch.finfo(dtype).eps for dtype in (first.dtype, _dtype(backbone)))
    # Zero, but for experts whose products are rounded differently with the number of their tokens.
    if not leak.max() <= max(1e-5, eps / 4):
        return f"a sequence changes others in the row (by {float(leak.max()):.1e})"
    gap = _relative(first, wanted)
    # Two kernels' roundings through all layers; in 16 bits a token may also meet another expert. A layout that is
    # ignored is wrong by tens of percent.
    if not (gap.max() <= 1e-2 if eps < 1e-6 else gap.median() <= 5e-2):
        return f"its hidden states differ from those of the sequences alone (by {float(gap.max()):.1e})"
    return needs


def _summary(record: _Record, config: Any) -> Needs | str:
    if not record.calls:
        return "it does not call the attention function registered with transformers"
    windows = {seen.call.window for seen in record.calls}
    masks = record.masks
    # Some models make every kind of mask, those that no layer uses included.
    if all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [""]):
        masks = masks & {None}
    full = None in windows and None not in masks
    if masks and (full or windows | {None} != masks | {None}):
        return (
            f"its masks ask for windows of {_words(masks)} tokens, its attention for {_words(windows)} "
            "(chunked attention, or a window that only the mask knows)"
        )
    return Needs(
        head_size=max(seen.head_size for seen in record.calls),
        value_size=max(seen.value_size for seen in record.calls),
        windows=frozenset(windows),
        softcap=any(seen.call.softcap is not None for seen in record.calls),
        sinks=any(seen.call.sinks is not None for seen in record.calls),
        dropout=False,
    )


def _words(windows: set[int | None]) -> str:
    return " and ".join(sorted("all" if window is None else str(window) for window in windows))


def _relative(mine: Tensor, theirs: Tensor) -> Tensor:
    """Of each row the size of its difference, relative to it."""
    mine, theirs = mine.double(), theirs.to(mine.device).double()
    return (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-300)
