"""The load-balancing loss of a mixture of experts, as the model's own causal LM takes it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


def router_loss(model: Any, logits: Any, mask: Tensor | None) -> tuple[Tensor, float]:
    """The load-balancing loss of a mixture's routers, and the coefficient with which its causal LM adds it.

    Args:
        model: the causal LM or its backbone.
        logits: of each layer's routers.
        mask: 0 at tokens that are left out; None where all count.

    Raises:
        NotImplementedError: a model whose routers' loss is another.
    """
    function: Any = None
    for cls in type(model).__mro__:
        function = function or getattr(inspect.getmodule(cls), "load_balancing_loss_func", None)
    experts = _attribute(model, "num_experts", "num_local_experts", "n_routed_experts")
    chosen = _attribute(model, "num_experts_per_tok")
    coefficient = _attribute(model, "router_aux_loss_coef", "aux_loss_coef")
    if None in (function, experts, chosen, coefficient) or not logits:
        raise NotImplementedError(f"the routers' loss of {type(model).__name__} is not known here")
    return function(logits, experts, chosen, mask), coefficient


def read_config(model: Any, name: str) -> Any:
    """What the config of a model's text part has by that name, or the config itself; else None."""
    return getattr(model.config.get_text_config(), name, getattr(model.config, name, None))


def _attribute(model: Any, *names: str) -> Any:
    """The first of these that the model, or else its config, has."""
    values = [getattr(model, name, None) for name in names] + [read_config(model, name) for name in names]
    return next((value for value in values if value is not None), None)
