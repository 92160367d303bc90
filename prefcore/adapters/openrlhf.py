"""OpenRLHF 0.11.2: log-probs, entropies and losses, as its trainers call them.

Functions and modules have the names, the parameters and the defaults of OpenRLHF's own, in ``openrlhf.models.utils``
and ``openrlhf.models.loss``, and return results of the same shapes. What differs, throughout:

- Masked positions are not read, so that NaNs there reach neither values nor gradients. Masks are of zeros and ones;
  whatever is not 0 counts as 1.
- The mean of nothing is 0, where OpenRLHF's is NaN.
- Arithmetic is in float32, or float64 if inputs have it; a mask's dtype changes no result's. Gradient goes to the
  policy's own numbers alone.
- ValueError stands where OpenRLHF asserts.

``Actor`` makes float32 logits ``[B, L, V]`` before it calls any of these, and still does.

How OpenRLHF comes to use them: in the place of ``-m openrlhf.cli.train_dpo`` a script of your own, that says ::

    from prefcore.adapters import openrlhf
    openrlhf.enable()
    runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__")

Ray's workers do so as well where the job's runtime environment has ``prefcore.adapters.openrlhf.enable`` as its
``worker_process_setup_hook``.

Not here, since prefcore has nothing for it: ``masked_mean``, ``masked_normalize`` and ``compute_reward``. Advantages
are methods of its experience maker, not functions.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from prefcore import losses
from prefcore._patching import Patch, Target, installed
from prefcore._types import PolicyTerms
from prefcore.adapters._tensors import Responses, common_dtype, entropies, kl_estimates, mean
from prefcore.advantages import to_tokens
from prefcore.losses import policy
from prefcore.ops.aggregate import How, aggregate
from prefcore.ops.logprobs import logprobs
from prefcore.ops.policy_terms import Kl, policy_terms
from prefcore.ops.sequence_reduce import sequence_reduce

VERSIONS = ("0.11.2",)

_INF = float("inf")
_KLS: dict[str, Kl] = {"k1": "k1", "k2": "k2", "k3": "k3"}


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of labels; OpenRLHF's of this name in ``openrlhf.models.utils``.

    Equal to ``log_softmax(logits / temperature, -1).gather(-1, labels[..., None])[..., 0]``, with zeros where a
    label is -100. OpenRLHF divides the logits in place; these stay as they are, so divide them where their entropies
    are wanted too. Of 16-bit logits the arithmetic is float32 and the result rounded once.

    Args:
        logits: ``[..., V]``.
        labels: ``[...]`` int64.
        temperature: positive.

    Returns:
        ``[...]`` in the logits' dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on a CPU, a label outside the vocabulary.
    """
    return logprobs(logits, labels, temperature=temperature).logps.to(logits.dtype)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropies ``[...]`` of softmax(logits) ``[..., V]``, in the logits' dtype; ``openrlhf.models.utils``'s.

    Equal to ``logsumexp(logits, -1) - (softmax(logits, -1) * logits).sum(-1)``.
    """
    return entropies(logits).to(logits.dtype)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """Sampled estimates of KL(policy, reference), clamped to ±10; OpenRLHF's in ``openrlhf.models.utils``.

    Args:
        log_probs, log_probs_base: of one shape, the policy's and the reference's.
        log_probs_old: the behaviour policy's, for ``unbiased_gradient``; None: the policy itself.
        kl_estimator: ``k1``, ``k2`` or ``k3``.
        unbiased_gradient: give every estimate the gradient of ``k2``, times the ratio of policy to behaviour policy, a
            constant of at most 10; it is not clamped.

    Returns:
        Of the same shape, float32. Small values of ``k3`` keep the digits that OpenRLHF's loses.

    Raises:
        ValueError: another ``kl_estimator``, shapes that differ.
    """
    if kl_estimator not in _KLS:
        raise ValueError(f"kl_estimator must be one of {tuple(_KLS)}, got {kl_estimator!r}")
    logps, base = log_probs.float(), log_probs_base.float()
    value = kl_estimates(logps, base, _KLS[kl_estimator]).clamp(-10, 10)
    if not unbiased_gradient:
        return value
    slope = kl_estimates(logps, base, "k2")
    if log_probs_old is not None:
        slope = slope * (logps.detach() - log_probs_old.detach().float()).exp().clamp(max=10.0)
    return value.detach() + slope - slope.detach()


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor | None,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> Tensor:
    """From losses of tokens to a scalar; OpenRLHF's of this name in ``openrlhf.models.loss``.

    Args:
        loss: ``[B, L]``.
        loss_mask: ``[B, L]``; None: all count.
        token_level_loss: the mean over tokens; else over the sequences that have any, of each one's mean.
        dp_size: factor of the result, where the count is given; else unused, as in OpenRLHF.
        batch_num_tokens: the divisor of the former in place of the mask's count.
        global_batch_size: the divisor of the latter in place of the number of sequences that have tokens.

    Returns:
        0-dim, in the dtype of ``loss``.
    """
    responses = _responses(loss_mask, loss)
    count = batch_num_tokens if token_level_loss else global_batch_size
    return _aggregate(responses.pack("loss", loss), responses, token_level_loss, dp_size, count).to(loss.dtype)


def _responses(mask: Tensor | None, like: Tensor) -> Responses:
    return Responses(torch.ones_like(like, dtype=torch.bool) if mask is None else mask)


def _aggregate(
    values: Tensor, responses: Responses, token_level_loss: bool, dp_size: int, count: float | Tensor | None
) -> Tensor:
    how: How = "token_mean" if token_level_loss else "seq_mean_token_mean"
    if count is None:
        return aggregate(values, responses.cu_seqlens, how)
    return aggregate(values, responses.cu_seqlens, how, 1) / count * dp_size


class SFTLoss(nn.Module):
    """The mean of -log p; OpenRLHF's of this name in ``openrlhf.models.loss``."""

    def __init__(self, token_level_loss: bool = True) -> None:
        super().__init__()
        self.token_level_loss = token_level_loss

    def forward(
        self,
        per_token_logps: Tensor,
        loss_mask: Tensor,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> Tensor:
        """0-dim, of ``[B, L]``; arguments as :func:`aggregate_loss` has them."""
        return aggregate_loss(
            -per_token_logps, loss_mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
        )


class GPTLMLoss(nn.Module):
    """The mean of -log p of the next tokens; OpenRLHF's of this name in ``openrlhf.models.loss``.

    Raises:
        NotImplementedError: ``ring_attn_group``, a sequence divided among ranks.
    """

    def __init__(self, ring_attn_group: Any = None) -> None:
        super().__init__()
        if ring_attn_group is not None:
            raise NotImplementedError("ring_attn_group: enable(skip=('GPTLMLoss',))")
        self.IGNORE_INDEX = -100

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """0-dim in the logits' dtype, of logits ``[..., L, V]`` and labels ``[..., L]``, shifted here; -100 is skipped.

        Equal to ``cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten())``.
        """
        targets = labels[..., 1:]
        logps = logprobs(logits[..., :-1, :], targets, ignore_index=self.IGNORE_INDEX).logps
        return (-logps.sum() / (targets != self.IGNORE_INDEX).sum().clamp(min=1)).to(logits.dtype)


class PolicyLoss(nn.Module):
    """Clipped surrogates with corrections of the rollout; OpenRLHF's of this name in ``openrlhf.models.loss``.

    Args:
        clip_eps_low, clip_eps_high: the ratio is clipped to [1 - low, 1 + high].
        dual_clip: for A < 0 the loss is at most -dual_clip A; at least 1 + clip_eps_high, None for none.
        token_level_loss: as in :func:`aggregate_loss`; False for ``gspo`` whatever is given.
        policy_loss_type: ``ppo``, :func:`prefcore.losses.ppo`, or ``gspo``, where the ratio is exp of a response's mean
            log-ratio, and so is its gradient; that mean is clamped to ±80, not at all in OpenRLHF.
        is_correction_level: ``off``, ``token`` or ``seq``: whose ratio of policy before the step to rollout, or
            divergence, is looked at. A correction is of ``ppo`` alone; for ``gspo`` the ratio is then to the rollout.
        is_correction_mode: ``mask`` drops what is outside the threshold and leaves the others' ratios as weights;
            ``clip`` clamps these, of tokens.
        is_correction_gating: ``ratio``, ``binary_kl`` or ``tv``.
        is_correction_threshold: low and high.

    Raises:
        ValueError: values other than these.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Any = (0.5, 5.0),
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("policy_loss_type", policy_loss_type, ("ppo", "gspo")),
            ("is_correction_level", is_correction_level, ("off", "token", "seq")),
            ("is_correction_mode", is_correction_mode, ("mask", "clip")),
            ("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if dual_clip is not None and not dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError("is_correction_mode 'clip' is for is_correction_gating 'ratio' of tokens")
        if is_correction_gating != "ratio" and is_correction_level != "off" and is_correction_threshold[0] > 0:
            raise ValueError(f"is_correction_gating {is_correction_gating!r} has an upper bound alone")
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Of ``[B, L]`` log-probs, advantages and a mask; the counts are those of :func:`aggregate_loss`.

        Returns:
            The loss; the share of tokens that a bound of the ratio acts on; the mean of old_log_probs - log_probs; with
            a correction the mean of rollout_log_probs - old_log_probs and the share of tokens, or of sequences that
            have any, outside the threshold, else None. All 0-dim, the loss in the common dtype of ``log_probs``,
            ``old_log_probs`` and ``advantages``, the rest in float32 or float64.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, ``rollout_log_probs`` missing for a correction.
        """
        responses = _responses(action_mask, log_probs)
        logps = responses.pack("log_probs", log_probs)
        old = responses.pack("old_log_probs", old_log_probs.detach()).to(logps.dtype)
        given = responses.pack("advantages", advantages.detach()).to(logps.dtype)
        rollout = None
        if self.is_correction_level != "off":
            if rollout_log_probs is None:
                raise ValueError("is_correction_level needs rollout_log_probs")
            rollout = responses.pack("rollout_log_probs", rollout_log_probs.detach()).to(logps.dtype)
        vllm_kl = filtered = None
        if self.policy_loss_type == "gspo":
            out = self._gspo(logps, old if rollout is None else rollout, given, responses)
        else:
            terms: policy.TokenTerms = {}
            if rollout is not None:
                terms["weights"], filtered = self._correction(old, rollout, responses)
                vllm_kl = mean(rollout - old)
            low, high = self.clip_eps_low, self.clip_eps_high
            out = policy.ppo(logps, old, given, eps=low, eps_high=high, dual_clip=self.dual_clip, **terms)
        count = batch_num_tokens if self.token_level_loss else global_batch_size
        loss = _aggregate(out.losses, responses, self.token_level_loss, dp_size, count)
        clipped = (out.stats.clipped_low + out.stats.clipped_high) / max(logps.numel(), 1)
        dtype = common_dtype(log_probs, old_log_probs, advantages)
        return loss.to(dtype), clipped.float(), mean(old - logps.detach()), vllm_kl, filtered

    def _gspo(self, logps: Tensor, old: Tensor, advantages: Tensor, responses: Responses) -> PolicyTerms:
        means = sequence_reduce(logps - old, responses.cu_seqlens, "mean")
        return policy_terms(
            to_tokens(means, responses.cu_seqlens, logps.shape[0]),
            torch.zeros_like(logps),
            advantages,
            form="clip",
            low=1 - self.clip_eps_low,
            high=1 + self.clip_eps_high,
            dual=_INF if self.dual_clip is None else self.dual_clip,
            clamp=80.0,  # prefcore's largest
        )

    def _correction(self, old: Tensor, rollout: Tensor, responses: Responses) -> tuple[Tensor, Tensor]:
        """Weights of tokens, ``[T]``, and the share of tokens or sequences outside the threshold."""
        low, high = self.is_correction_threshold
        of_sequences = self.is_correction_level == "seq"
        ratios = (old - rollout).exp()
        if self.is_correction_gating == "ratio":
            gate = old - rollout
        else:
            p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
            if self.is_correction_gating == "tv":
                gate = (p - q).abs()
            else:
                gate = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        if of_sequences:
            gate = sequence_reduce(gate, responses.cu_seqlens, "mean")
        if self.is_correction_gating == "ratio":
            gate = gate.exp()
        outside = (gate < low) | (gate > high)
        share = mean((outside[responses.lengths > 0] if of_sequences else outside).float())
        if self.is_correction_mode == "clip":
            return gate.clamp(low, high), share
        if of_sequences:
            outside = to_tokens(outside, responses.cu_seqlens, old.shape[0])
        return torch.where(outside, 0.0, ratios), share


class ValueLoss(nn.Module):
    """The clipped loss of a critic, :func:`prefcore.losses.ppo_value`; OpenRLHF's in ``openrlhf.models.loss``.

    Args:
        clip_eps: how far a value may move; None for no clip.
        token_level_loss: as in :func:`aggregate_loss`.
    """

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps = clip_eps
        self.token_level_loss = token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> Tensor:
        """0-dim in the inputs' common dtype, of ``[B, L]``; the counts are those of :func:`aggregate_loss`."""
        responses = _responses(action_mask, values)
        dtype = common_dtype(values, returns)
        own, targets = responses.pack("values", values), responses.pack("returns", returns)
        if self.clip_eps is None:
            out = policy.ppo_value(own, None, targets)
        else:
            dtype = common_dtype(values, old_values, returns)
            out = policy.ppo_value(own, responses.pack("old_values", old_values), targets, eps_v=self.clip_eps)
        count = batch_num_tokens if self.token_level_loss else global_batch_size
        return _aggregate(out.losses, responses, self.token_level_loss, dp_size, count).to(dtype)


class DPOLoss(nn.Module):
    """:func:`prefcore.losses.cdpo`, or ``ipo`` of sums; OpenRLHF's of this name in ``openrlhf.models.loss``.

    Args:
        beta: positive.
        label_smoothing: in [0, 0.5); unused by ``ipo``.
        ipo: whether the loss is (D - 1/(2 beta))^2 of the difference of log-ratios, not divided by lengths.
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.ipo = ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of sums of log-probs ``[P]``: the mean loss, 0-dim, and detached rewards ``[P]`` of chosen and rejected.

        Raises:
            ValueError: shapes or devices that differ, a coefficient outside its domain.
        """
        given = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
        if self.ipo:
            found = losses.ipo(*given, beta=self.beta)
        else:
            found = losses.cdpo(*given, beta=self.beta, label_smoothing=self.label_smoothing)
        chosen, rejected = (
            self.beta * (own - reference).detach() for own, reference in zip(given[:2], given[2:], strict=True)
        )
        return mean(found).to(policy_chosen_logps.dtype), chosen, rejected


class PairWiseLoss(nn.Module):
    """:func:`prefcore.losses.dpo` of rewards themselves; OpenRLHF's of this name in ``openrlhf.models.loss``."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """The mean of -log sigmoid(chosen - reject - margin), 0-dim in the rewards' dtype, of ``[P]`` each.

        Raises:
            ValueError: shapes or devices that differ.
        """
        none = torch.zeros_like(chosen_reward)
        found = losses.dpo(chosen_reward, reject_reward, none, none if margin is None else -margin, beta=1.0)
        return mean(found).to(common_dtype(chosen_reward, reject_reward))


class LogExpLoss(PairWiseLoss):
    """The mean of log(1 + exp(reject - chosen)); OpenRLHF's of this name in ``openrlhf.models.loss``.

    The same as :class:`PairWiseLoss` without a margin, finite where OpenRLHF's exponential overflows.
    """

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """0-dim, of ``[P]`` each; ``margin`` is unused, as in OpenRLHF."""
        return super().forward(chosen_reward, reject_reward)


#: What is replaced, by OpenRLHF's modules.
ADAPTERS: dict[str, dict[str, Any]] = {
    "openrlhf.models.utils": {
        "compute_approx_kl": compute_approx_kl,
        "compute_entropy": compute_entropy,
        "log_probs_from_logits": log_probs_from_logits,
    },
    "openrlhf.models.loss": {
        "aggregate_loss": aggregate_loss,
        "DPOLoss": DPOLoss,
        "GPTLMLoss": GPTLMLoss,
        "LogExpLoss": LogExpLoss,
        "PairWiseLoss": PairWiseLoss,
        "PolicyLoss": PolicyLoss,
        "SFTLoss": SFTLoss,
        "ValueLoss": ValueLoss,
    },
}
_TARGETS = [Target(place, name, ours) for place, names in ADAPTERS.items() for name, ours in names.items()]
_PATCH = Patch("prefcore.adapters.openrlhf", installed("openrlhf", *VERSIONS), lambda: _TARGETS)


def enable(*, skip: Collection[str] = ()) -> AbstractContextManager:
    """Put what is in this module in the place of OpenRLHF's, in its modules, loaded now or later.

    In every process that trains, Ray's actors among them, before trainers are built: what already holds one of
    OpenRLHF's functions keeps it. Arguments, result and errors are those of :func:`prefcore.adapters.verl.enable`.
    """
    return _PATCH.enable(skip)


def disable() -> None:
    """Put OpenRLHF's own functions back, in modules loaded since too; nothing where not enabled."""
    _PATCH.disable()


def enabled() -> bool:
    """Whether OpenRLHF's functions are replaced by ours."""
    return _PATCH.enabled()
