"""The language-model head of a Hugging Face causal LM: its weight, and how raw logits become the model's
logits."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prefcore
from prefcore._types import TokenStats
from prefcore.hf._peft import HeadAdapter, refuse_bypassed, without_adapters, without_wrapper

# Attributes of a text config that multiply (+1) or divide (-1) the head's output, with the models that
# brought them.
_SCALES = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "logits_scaling": -1,  # Granite
}
_MULTIPLIES = {("hyperclovax", "logits_scaling")}  # unlike the model that brought the name
_PROBE_TOKENS = 8
_PROBE_PEAK = 60.0  # reaches well into a softcap of 30 or 50

# What was found in models that were already compared with their own logits.
_probed: weakref.WeakKeyDictionary[nn.Module, set[tuple]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Head:
    """The head of a causal LM: logits = softcap(logit_scale * (hidden @ weight.T + bias + LoRA's terms)).

    It is what the model has at the moment: after adapters were switched, disabled or merged, find it anew.

    Attributes:
        backbone: the module whose ``last_hidden_state`` is the input of the head.
        weight: ``[V, D]``, the model's own parameter, tied or not.
        bias: ``[V]`` or None.
        softcap: softcap(u) = softcap * tanh(u / softcap); None where the model has none.
        logit_scale: 1.0 where the model has none.
        adapters: the active LoRA adapters of the head.
    """

    backbone: nn.Module
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    adapters: tuple[HeadAdapter, ...] = ()

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits ``[..., V]`` of final hidden states ``[..., D]``, in full memory: to compare."""
        return self._transform(self._raw(hidden.to(self.weight.device)))

    def operands(self, hidden: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Bias ``[V]`` and low rank (``[..., R]``, ``[V, R]``) for hidden states ``[..., D]`` on the head's device.

        Both are None where there is none. The ranks of several adapters stand side by side. PEFT runs adapters of
        float32 beside a head of 16 bits in float32; here what they make of the hidden states, dropout and scaling
        included, is rounded to the type of these, and so is ``outer``, as autocast would: the sum over the ranks then
        joins the sum over the hidden size before that is rounded.
        """
        bias = self.bias
        for adapter in self.adapters:
            if adapter.bias is not None:
                own = (adapter.scaling * adapter.bias).to(self.weight.dtype)
                bias = own if bias is None else bias + own
        if not self.adapters:
            return bias, None
        inner = torch.cat([adapter.inner(hidden).to(hidden.dtype) for adapter in self.adapters], -1)
        return bias, (inner, torch.cat([adapter.outer.to(hidden.dtype) for adapter in self.adapters], 1))

    def stats(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        outputs: Sequence[str] = (),
    ) -> TokenStats:
        """:func:`prefcore.linear_logprobs` of hidden states ``[..., D]`` and targets ``[...]`` on the head's device."""
        device = self.weight.device
        hidden = hidden.to(device)
        bias, low_rank = self.operands(hidden)
        return prefcore.linear_logprobs(
            hidden,
            self.weight,
            targets.to(device),
            bias=bias,
            temperature=temperature,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            outputs=outputs,
            low_rank=low_rank,
        )

    def _raw(self, hidden: Tensor) -> Tensor:
        bias, low_rank = self.operands(hidden)
        raw = F.linear(hidden, self.weight, bias)
        return raw if low_rank is None else raw + F.linear(*low_rank)

    def _transform(self, raw: Tensor) -> Tensor:
        raw = raw * self.logit_scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


def find_head(model: nn.Module, *, probe: bool = True) -> Head:
    """Find the head of a causal LM, bare or wrapped by PEFT.

    Before its first use a model is compared with the head found, on a few tokens: so a model that does
    something else to its logits raises, instead of training silently wrong. The outcome is remembered per
    model.

    Args:
        model: a ``PreTrainedModel`` with a linear head, or a ``PeftModel`` around one.
        probe: compare with the model's own logits (two forward passes of 8 tokens, once per model).

    Raises:
        TypeError: ``model`` is no causal LM of transformers.
        NotImplementedError: a head that is neither a plain linear layer nor one with PEFT's LoRA or in its
            ``modules_to_save`` (quantisation, DoRA on the head), a weight that trains beside LoRA, a method of PEFT
            that adds tokens, a head whose weight is sharded or offloaded, or a model that the probe found to compute
            its logits in another way.
    """
    base = base_model(model)
    module = base.get_output_embeddings()
    if module is None:
        raise TypeError(f"{type(base).__name__} has no language-model head (get_output_embeddings() is None)")
    linear, adapters = without_adapters(module, type(base).__name__)
    _refuse_unknown_module(linear, type(base).__name__)
    if adapters and torch.is_grad_enabled() and linear.weight.requires_grad:
        raise NotImplementedError(
            f"the head of {type(base).__name__} has LoRA, and its own weight (or that of the embeddings, to which it "
            "is tied) trains beside it; freeze that, or train the head whole (modules_to_save)"
        )
    backbone = base.base_model
    if backbone is base:
        raise NotImplementedError(
            f"{type(base).__name__} has no backbone apart from its head (base_model_prefix={base.base_model_prefix!r})"
        )
    config = base.config.get_text_config()
    scale = 1.0
    for name, sign in _SCALES.items():
        value = getattr(config, name, None)
        if value is not None:
            scale *= float(value) ** (1 if (config.model_type, name) in _MULTIPLIES else sign)
    softcap = getattr(config, "final_logit_softcapping", None)
    head = Head(backbone, linear.weight, linear.bias, None if softcap is None else float(softcap), scale, adapters)
    if probe:
        facts: tuple = (type(model), type(module), head.softcap, head.logit_scale, head.bias is None)
        facts += tuple(adapter.bias is None for adapter in adapters)
        if facts not in _probed.setdefault(base, set()):
            with evaluating(base):
                _compare(model, base, module, head)
            _probed[base].add(facts)
    return head


def base_model(model: Any) -> Any:
    """The transformers model inside ``model``, which may be wrapped by PEFT.

    Raises:
        TypeError: no transformers model.
        NotImplementedError: an encoder-decoder, or a PEFT method that changes the inputs (prompt learning).
    """
    model = without_wrapper(model)
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "base_model_prefix"):
        raise TypeError(f"expected a transformers causal LM or a PeftModel around one, got {type(model).__name__}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{type(model).__name__} is an encoder-decoder; only causal LMs are supported")
    return model


def _refuse_unknown_module(module: Any, name: str) -> None:
    if type(module).forward is not nn.Linear.forward:
        raise NotImplementedError(
            f"the head of {name} is a {type(module).__module__}.{type(module).__qualname__}; prefcore reads "
            "the weight of a plain torch.nn.Linear"
        )
    refuse_bypassed(module, name)
    weight = module.weight
    kind = type(weight.data).__name__
    if "DTensor" in (kind, type(weight).__name__) or weight.numel() == 0:
        raise NotImplementedError(
            f"the head of {name} is sharded (FSDP, tensor parallel or ZeRO-3); use DDP or ZeRO-1/2 instead"
        )
    if weight.is_meta:
        raise NotImplementedError(f"the head of {name} is offloaded (its weight is on the meta device)")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _compare(model: Any, base: Any, module: nn.Module, head: Head) -> None:
    """Raise unless the head sees the backbone's last hidden state and ``head.logits`` gives the model's
    logits.

    What the head sees is amplified on its way in, so that a softcap shows in the logits of any model, trained
    or not; so are adapters of the head, which add nothing as they are initialised.
    """
    name = type(base).__name__
    seen: list[Tensor] = []

    def amplify(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        raw = F.linear(args[0].to(head.weight.device), head.weight) * abs(head.logit_scale)
        amplified = args[0] * (_PROBE_PEAK / raw.abs().amax().clamp_min(1e-6))
        seen.extend((args[0], amplified))
        return (amplified, *args[1:])

    device = base.get_input_embeddings().weight.device
    ids = (torch.arange(_PROBE_TOKENS, device=device) + 1).remainder(head.weight.shape[0])[None]
    mask = torch.ones_like(ids)
    hook = module.register_forward_pre_hook(amplify)
    try:
        theirs = model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True).logits
    except Exception as error:
        raise NotImplementedError(f"a trial of {name} on input_ids and attention_mask alone failed: {error}") from error
    finally:
        hook.remove()
    if not seen:
        raise NotImplementedError(f"{name} computes its logits without calling its output embeddings")
    hidden = head.backbone(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True).last_hidden_state
    if hidden.shape != seen[0].shape:
        raise NotImplementedError(
            f"the head of {name} sees {tuple(seen[0].shape)}, its backbone returns {tuple(hidden.shape)}"
        )
    gap, ratio = _difference(hidden, seen[0])
    if not gap <= tolerance(hidden.dtype):  # a NaN does not pass
        raise NotImplementedError(
            f"{name} changes the hidden states between its backbone and its head: "
            f"relative difference {gap:.2g}, best single factor {ratio:.6g}"
        )
    if head.adapters:
        _compare_adapters(name, module, head, seen[0])
    mine = head.logits(seen[1])
    if mine.shape != theirs.shape:
        raise NotImplementedError(f"{name} returns logits {tuple(theirs.shape)}, its head {tuple(mine.shape)}")
    gap, ratio = _difference(mine, theirs)
    if not gap <= tolerance(head.weight.dtype):
        raise NotImplementedError(
            f"the logits of {name} are not softcap(scale * (hidden @ weight.T + bias)) with "
            f"softcap={head.softcap}, scale={head.logit_scale:.6g}, "
            f"{'no bias' if head.bias is None else 'its bias'}: relative difference {gap:.2g}, "
            f"best single factor {ratio:.6g}"
        )


def _compare_adapters(name: str, module: nn.Module, head: Head, hidden: Tensor) -> None:
    """Raise unless the head's module gives its raw logits with adapters that add as much as the weight does."""
    generator = torch.Generator().manual_seed(0)
    hidden = hidden.to(head.weight.device)
    size = F.linear(hidden, head.weight).double().norm()
    names = {id(parameter): each for each, parameter in module.named_parameters()}
    replaced, adapters = {}, []
    for adapter in head.adapters:
        scale = size / adapter.inner(hidden).double().norm().clamp_min(1e-6) / adapter.outer.shape[0] ** 0.5
        scale.clamp_max_(torch.finfo(adapter.outer.dtype).max / 64)  # finite in 16 bits, too, for lora_alpha=0
        outer = torch.randn(adapter.outer.shape, generator=generator).to(adapter.outer) * scale.to(adapter.outer)
        replaced[names[id(adapter.outer)]] = outer
        bias = adapter.bias
        if bias is not None:
            bias = torch.randn(bias.shape, generator=generator).to(bias)
            replaced[names[id(adapter.bias)]] = bias
        adapters.append(dataclasses.replace(adapter, outer=outer, bias=bias))
    theirs = torch.func.functional_call(module, replaced, (hidden,))
    gap, ratio = _difference(dataclasses.replace(head, adapters=tuple(adapters))._raw(hidden), theirs)
    if not gap <= tolerance(head.weight.dtype):
        raise NotImplementedError(
            f"the adapters of the head of {name} are not scaling * (hidden @ A.T @ B.T + bias): relative difference "
            f"{gap:.2g}, best single factor {ratio:.6g}"
        )


def _difference(mine: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Relative root-mean-square difference, and the factor that brings ``mine`` closest to ``theirs``."""
    mine, theirs = mine.double().flatten(), theirs.to(mine.device).double().flatten()
    error = (mine - theirs).norm() / theirs.norm().clamp_min(1e-300)
    return float(error), float(mine @ theirs / (mine @ mine).clamp_min(1e-300))


def tolerance(dtype: torch.dtype) -> float:
    # A few roundings of each logit; wider types may multiply in TF32, or sum in another order.
    return max(4 * torch.finfo(dtype).eps, 2e-3)
