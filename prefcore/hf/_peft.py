"""PEFT's wrappers, of a model and of its head, and its adapters as the reference of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class HeadAdapter:
    """LoRA on the head: raw logits gain scaling * (outer @ down(dropout(hidden)) + bias).

    Attributes:
        dropout: of the rows that are scored, not of all positions; where it is on, it draws other masks than PEFT.
        down: ``A``, from ``D`` to ``R``.
        outer: ``B``'s weight, ``[V, R]``.
        bias: ``B``'s, ``[V]`` or None.
        scaling: lora_alpha / R, or over its root with rsLoRA.
    """

    dropout: nn.Module
    down: nn.Linear
    outer: Tensor
    bias: Tensor | None
    scaling: float

    def inner(self, hidden: Tensor) -> Tensor:
        """``[..., R]``, in the adapter's type, of hidden states ``[..., D]``."""
        return self.scaling * self.down(self.dropout(hidden.to(self.down.weight.dtype)))


def without_wrapper(model: Any) -> Any:
    """The model inside a ``PeftModel`` or ``PeftMixedModel``; any other as it is.

    Raises:
        NotImplementedError: a method of PEFT that works in the wrapper's forward, which is not run.
    """
    if not type(model).__module__.startswith("peft."):
        return model
    for name in model.active_adapters:
        config = model.peft_config[name]
        if getattr(config, "is_prompt_learning", False):
            raise NotImplementedError(
                f"PEFT's {config.peft_type} adds virtual tokens to the input; adapters "
                "inside the layers (LoRA and the like) are supported"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise NotImplementedError("activated LoRA looks for its invocation in PEFT's own forward, which is not run")
        if config.peft_type == "XLORA":
            raise NotImplementedError("X-LoRA weighs its adapters in PEFT's own forward, which is not run")
    return unwrapped(model)


def unwrapped(model: Any) -> Any:
    """As :func:`without_wrapper`, for what goes through the wrapper's forward: nothing is refused."""
    if not type(model).__module__.startswith("peft."):
        return model
    return model.get_base_model() if hasattr(model, "get_base_model") else model.base_model.model


def without_adapters(head: Any, name: str) -> tuple[Any, tuple[HeadAdapter, ...]]:
    """The layer that is the head of the model ``name`` now, and what LoRA adds to it.

    As in PEFT's own forward, disabled adapters that were merged are unmerged.

    Raises:
        NotImplementedError: another wrapper of PEFT, or adapters that are no sum.
    """
    adapters: tuple[HeadAdapter, ...] = ()
    while type(head).__module__.startswith("peft."):
        from peft.tuners.lora.layer import Linear
        from peft.utils import ModulesToSaveWrapper

        refuse_bypassed(head, name)
        if isinstance(head, ModulesToSaveWrapper):
            head = _in_use(head)
        elif type(head).forward is Linear.forward:
            adapters += _of_lora(head, name)
            head = head.base_layer
        else:
            raise NotImplementedError(
                f"the head of {name} is a {type(head).__module__}.{type(head).__qualname__}; prefcore knows "
                f"LoRA on a head and modules_to_save; leave it out of PEFT's {_option(head)}"
            )
    return head, adapters


def _option(wrapper: Any) -> str:
    return "trainable_token_indices" if type(wrapper).__name__ == "TrainableTokensWrapper" else "target_modules"


def _in_use(wrapper: Any) -> Any:
    """Of a module that is trained whole the copy in use, or the original."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(each not in wrapper.modules_to_save for each in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _of_lora(layer: Any, name: str) -> tuple[HeadAdapter, ...]:
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
        return ()
    if layer.merged:
        return ()
    found = []
    for each in layer.active_adapters:
        if each not in layer.lora_A:
            continue
        variant = layer.lora_variant.get(each)
        if variant is not None:
            kind = type(variant).__name__.removesuffix("LinearVariant")
            raise NotImplementedError(
                f"the adapter {each!r} of the head of {name} is {kind}; "
                "prefcore knows plain and rank-stabilised LoRA there; leave the head out of PEFT's target_modules"
            )
        up = layer.lora_B[each]
        for part in (layer.lora_A[each], up):
            if type(part).forward is not nn.Linear.forward:
                raise NotImplementedError(f"the adapter {each!r} of the head of {name} has a {type(part).__name__}")
            refuse_bypassed(part, name)
        found.append(HeadAdapter(layer.lora_dropout[each], layer.lora_A[each], up.weight, up.bias, layer.scaling[each]))
    return tuple(found)


def refuse_bypassed(module: Any, name: str) -> None:
    """Raise where a module's weight alone does not say what it computes."""
    # accelerate's dispatch replaces the instance's forward; all it does here is move tensors between devices.
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        raise NotImplementedError(f"the forward of {name}'s head was replaced; prefcore would bypass it")
    if module._forward_hooks or module._forward_pre_hooks:
        raise NotImplementedError(f"the head of {name} has forward hooks, which prefcore would bypass")


@contextlib.contextmanager
def switched(model: Any, adapter: str | None) -> Iterator[None]:
    """Have the adapter of that name instead of the active ones or of disabled ones, or none at all; then all as it was.

    PEFT makes the adapters that it activates trainable, and the others not: which parameters are is kept.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if adapter is None:
            with model.disable_adapter():
                yield
            return
        tuner = model.base_model  # PeftModel's own method would take one adapter only to go back to
        active = tuner.active_adapter
        disabled = any(getattr(module, "disable_adapters", None) is True for module in model.modules())
        try:
            if disabled:
                tuner.enable_adapter_layers()
            tuner.set_adapter(adapter)
            yield
        finally:
            tuner.set_adapter(active)
            if disabled:
                tuner.disable_adapter_layers()
    finally:
        for parameter, required in trained:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


def reference_adapter(model: Any, name: str | None) -> str | None:
    """The adapter that is the model's reference: the one named, or TRL's ``"ref"`` where there is one that is not
    active; else None, for none at all.

    Raises:
        ValueError: a model without that adapter, or an active one.
    """
    adapters = getattr(model, "peft_config", {}) if hasattr(model, "disable_adapter") else {}
    if name is None:
        return "ref" if "ref" in adapters and "ref" not in model.active_adapters else None
    if name not in adapters:
        known = f"has {', '.join(map(repr, adapters))}" if adapters else "is no PeftModel"
        raise ValueError(f"ref_adapter={name!r}: the model {known}")
    if name in model.active_adapters:
        raise ValueError(f"ref_adapter={name!r} is active, so that it would be trained; set_adapter another one")
    return name
