"""Losses of a preferred and a rejected response, from the log-probs of whole sequences.

Notation: ℓ = logps − ref_logps of a sequence, D = ℓ(chosen) − ℓ(rejected), z = beta·D, σ the logistic function. All
functions take ``[P]`` sums of log-probs over response tokens, compute in float32 (float64 stays float64), detach the
reference, and return ``[P]`` losses without reduction. ``beta`` and other coefficients are numbers or per-pair
tensors ``[P]`` (or 0-d), which are not differentiated.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefcore.losses import _checks
from prefcore.losses._registry import register


@register(
    family="pairwise",
    paper="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    needs=("reference",),
    aliases=("sigmoid",),
)
def dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float | Tensor = 0.1,
) -> Tensor:
    """Direct preference optimization: −log σ(z).

    Gradient: ∂L/∂D = −beta·σ(−z), so that of ``chosen_logps`` is −beta·σ(−z) and that of ``rejected_logps``
        its opposite.

    Args:
        chosen_logps, rejected_logps: ``[P]`` log-probs of the responses under the policy.
        ref_chosen_logps, ref_rejected_logps: ``[P]`` the same under the reference.
        beta: strength of the tie to the reference, positive.

    Returns:
        ``[P]`` losses.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: shapes or devices that differ, a beta that is not positive.

    Source: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (2023); TRL's
        ``sigmoid``.
    """
    return -logsigmoid(_scaled_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta))


@register(
    family="pairwise",
    paper="A note on DPO with noisy preferences",
    needs=("reference",),
)
def cdpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float | Tensor,
    label_smoothing: float | Tensor,
) -> Tensor:
    """Conservative DPO, for labels that are wrong with probability ε: −(1 − ε)·log σ(z) − ε·log σ(−z).

    Gradient: ∂L/∂D = beta·(σ(z) − (1 − ε)), zero where σ(z) = 1 − ε. Not the unbiased ``robust`` form of TRL.

    Args:
        chosen_logps, rejected_logps: ``[P]`` log-probs of the responses under the policy.
        ref_chosen_logps, ref_rejected_logps: ``[P]`` the same under the reference.
        beta: strength of the tie to the reference, positive.
        label_smoothing: ε in [0, 0.5); 0 gives :func:`dpo`.

    Returns:
        ``[P]`` losses.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: shapes or devices that differ, a coefficient outside its domain.

    Source: "A note on DPO with noisy preferences" (2023).
    """
    z = _scaled_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    eps = _checks.coefficient("label_smoothing", label_smoothing, z, low=0.0, high=0.5, low_allowed=True)
    return -(1 - eps) * logsigmoid(z) - eps * logsigmoid(-z)


@register(
    family="pairwise",
    paper="A General Theoretical Paradigm to Understand Learning from Human Preferences",
    needs=("reference",),
)
def ipo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float | Tensor,
    length_normalize: bool = False,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """Identity preference optimization: (h − 1/(2·beta))², where h is D, or the difference of ℓ per token.

    Gradient: ∂L/∂h = 2·(h − 1/(2·beta)), zero at h = 1/(2·beta). The two forms of h differ in scale by the
        length of a response, and so do their useful betas.

    Args:
        chosen_logps, rejected_logps: ``[P]`` log-probs of the responses under the policy.
        ref_chosen_logps, ref_rejected_logps: ``[P]`` the same under the reference.
        beta: the paper's τ, positive.
        length_normalize: False for the paper's formula, h = D; True for TRL's ``ipo``, where each ℓ is
            divided by its response's number of tokens.
        chosen_lengths, rejected_lengths: ``[P]`` these numbers, integers of at least 0, where
            ``length_normalize`` is set; 0 divides by 1.

    Returns:
        ``[P]`` losses.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: shapes or devices that differ, a beta that is not positive, lengths that are no such
            integers, lengths without ``length_normalize`` or the other way round.

    Source: "A General Theoretical Paradigm to Understand Learning from Human Preferences" (2023).
    """
    chosen, rejected = _checks.log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    beta = _checks.coefficient("beta", beta, chosen, low=0.0, high=float("inf"))
    if not isinstance(length_normalize, bool):
        raise TypeError(f"length_normalize must be True or False, got {type(length_normalize).__name__}")
    for name, lengths in (("chosen_lengths", chosen_lengths), ("rejected_lengths", rejected_lengths)):
        if (lengths is None) == length_normalize:
            verb = "needs" if length_normalize else "does not use"
            raise ValueError(f"length_normalize={length_normalize} {verb} {name}")
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen = chosen / _checks.token_counts("chosen_lengths", chosen_lengths, chosen)
        rejected = rejected / _checks.token_counts("rejected_lengths", rejected_lengths, rejected)
    return (chosen - rejected - 1 / (2 * beta)).square()


def _scaled_margin(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float | Tensor,
) -> Tensor:
    chosen, rejected = _checks.log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return _checks.coefficient("beta", beta, chosen, low=0.0, high=float("inf")) * (chosen - rejected)
