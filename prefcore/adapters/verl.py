"""verl 0.9.1: log-probs, entropies, policy losses and advantages, as its trainers call them.

Every function has the name, the parameters and the defaults of verl's own, which its docstring names, and returns
results of the same shapes. What differs, throughout:

- Masked positions are not read, so that NaNs there reach neither values nor gradients. Masks are of zeros and ones;
  whatever is not 0 counts as 1. Results of tokens are 0 where masked; verl leaves numbers there that nobody reads.
- A batch without tokens gives 0, where verl's is NaN or an exception. The 1e-8 that verl adds to counts, which is lost
  in float32, is not added.
- Arithmetic is in float32, or float64 if inputs have it. Losses come in the inputs' common dtype, to which masks and
  weights add nothing.
- Configurations are read by ``get`` or as attributes: verl's dataclasses, OmegaConf's and others.
- ValueError and NotImplementedError stand where verl asserts.

How verl comes to use them: a module of your own, say ``fast.py``, that says ::

    from prefcore.adapters import verl
    verl.enable()

and ``VERL_USE_EXTERNAL_MODULES=fast`` in the environment, by which every worker imports it. One at a time they go into
verl's registries, by ``register_policy_loss("name")(compute_policy_loss_gspo)`` and ``register_adv_est``.

Not here, since prefcore has nothing for it: ``compute_optimal_token_baseline_advantage`` and its variant for several
turns, ``compute_grpo_passk_outcome_advantage``, ``masked_mean`` and its kin, ``compute_rewards``, the distillation
losses of a teacher's top k, and the vocabulary-parallel functions of Megatron. ``compute_policy_loss_bypass_mode`` and
``compute_gdpo_outcome_advantage`` call others by name, and so call ours once enabled. ``compute_policy_loss`` is
deprecated there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefcore import advantages as estimates
from prefcore._patching import Patch, Target, installed
from prefcore._types import PolicyTerms
from prefcore.adapters._tensors import Responses, common_dtype, entropies, kl_estimates, mean
from prefcore.losses import policy
from prefcore.losses._checks import wide
from prefcore.ops.aggregate import How, aggregate
from prefcore.ops.gae import gae
from prefcore.ops.linear_logprobs import linear_logprobs
from prefcore.ops.logprobs import logprobs
from prefcore.ops.policy_terms import Kl, policy_terms
from prefcore.ops.sequence_reduce import sequence_reduce

VERSIONS = ("0.9.1",)

Metrics = dict[str, Any]

# verl does not clamp the log-ratios of some losses; this is the most that prefcore exponentiates.
_UNCLAMPED = 80.0


# verl.utils.torch_functional


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs of labels; verl's of this name in ``verl.utils.torch_functional``.

    Equal to ``log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]``, with zeros where a label is -100. As
    with FlashAttention's kernel in verl the result is float32 for 16-bit logits too; without it, verl rounds to their
    dtype.

    Args:
        logits: ``[..., V]``.
        labels: ``[...]`` int64.
        inplace_backward: the backward may write the gradient over the logits, which it does where autograd allows: not
            over a leaf, nor over strided logits. What else has saved them then raises in its backward, rather than
            reading the gradient as verl's does.

    Returns:
        ``[...]`` float32, float64 for float64 logits.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on a CPU, a label outside the vocabulary.
    """
    inplace = inplace_backward and logits.requires_grad and not logits.is_leaf and logits.is_contiguous()
    return logprobs(logits, labels, inplace=inplace).logps


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropies ``[...]`` of softmax(logits) ``[..., V]``, in the logits' dtype; ``verl.utils.torch_functional``'s.

    Equal to ``logsumexp(logits, -1) - (softmax(logits, -1) * logits).sum(-1)`` of float32 logits: verl computes that in
    16 bits where the logits have 16, with errors to match, and this rounds once.
    """
    return entropies(logits).to(logits.dtype)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """:func:`entropy_from_logits` in float32 whatever the logits' dtype; without chunks, so their size is unused."""
    return entropies(logits).float()


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """Sums of squared probabilities, ``[...]`` of ``[..., V]``, in the logits' dtype and without gradient.

    verl's of this name in ``verl.utils.torch_functional``, which it calls without gradients.
    """
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    found = logprobs(logits.detach(), targets, outputs=("log_sum_sq_probs",)).log_sum_sq_probs
    return cast(Tensor, found).exp().to(logits.dtype)


# verl.utils.experimental.torch_functional and verl.utils.kernel.linear_cross_entropy


class FusedLinearForPPO(nn.Module):
    """Log-probs and entropies from hidden states; verl's of this name in ``verl.utils.experimental.torch_functional``.

    Equal to its backend ``torch``, without its loop over chunks of ``[chunk_size, V]`` float32 logits: ``chunk_size``
    and ``impl_backend`` are taken and have no effect.

    Raises:
        ValueError: an ``impl_backend`` that verl has not.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend must be 'torch' or 'liger', got {impl_backend!r}")
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Of hidden states ``[..., D]``, a head ``[V, D]`` and labels ``[...]``, where -100 marks a row to skip.

        Returns:
            Log-probs ``[...]`` in float32 (float64 for float64 hidden states, where verl's refuses) and entropies
            ``[...]`` in the hidden states' dtype; both differentiable.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, a temperature that is not positive.
            NotImplementedError: a sharded head (DTensor).
        """
        logps, entropy = _linear(hidden_states, vocab_weights, input_ids, temperature)
        return logps, entropy.to(hidden_states.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies from hidden states; verl's of this name in ``verl.utils.kernel.linear_cross_entropy``.

    For every D, where verl's kernels need a multiple of 128, and on the CPU too.

    Args:
        hidden: ``[..., D]``.
        weight: ``[V, D]``.
        labels: ``[...]`` int64; -100 marks a row to skip.
        temperature: a positive number.
        reduction: of the log-probs: ``none``, ``sum`` or ``mean``, over all rows.
        dist_process_group: None, or a group of one rank.

    Returns:
        Log-probs ``[N]``, of all rows flattened, or reduced to 0-dim, and entropies ``[N]``: float32, or float64 for
        float64 inputs.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit.
        NotImplementedError: a group of several ranks, or a sharded weight: leave verl's own in place, by
            ``enable(skip=("linear_cross_entropy",))``.
    """
    if dist_process_group is not None and dist_process_group.size() > 1:
        raise NotImplementedError("a head sharded over several ranks: enable(skip=('linear_cross_entropy',))")
    chosen = str(reduction).lower()
    if chosen not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    if temperature is None:
        raise ValueError("temperature must be a number")
    logps, entropy = _linear(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature)
    if chosen != "none":
        logps = logps.sum() if chosen == "sum" else mean(logps)
    return logps, entropy


def _linear(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    stats = linear_logprobs(hidden, weight, labels.long(), temperature=temperature, outputs=("entropy",))
    return stats.logps, cast(Tensor, stats.entropy)


# verl.trainer.ppo.core_algos: aggregation, KL, values, entropy

_HOWS: dict[str, How] = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "seq_mean_token_sum_norm",
    "seq-mean-token-mean": "seq_mean_token_mean",
}


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """From losses of tokens to a scalar; verl's of this name in ``verl.trainer.ppo.core_algos``.

    Args:
        loss_mat, loss_mask: ``[B, L]``.
        loss_agg_mode: ``token-mean``, ``token-sum``, ``seq-mean-token-sum``, ``seq-mean-token-sum-norm`` or
            ``seq-mean-token-mean``, as :func:`prefcore.aggregate` has them; sequences without tokens do not count.
        dp_size: factor of the result; above 1 the counts below are needed.
        batch_num_tokens: the divisor of ``token-mean`` in place of the mask's count.
        global_batch_size: the divisor of ``seq-mean-…`` in place of the number of sequences that have tokens.
        loss_scale_factor: the divisor of ``…-norm``; L unless given.

    Returns:
        0-dim, in ``loss_mat``'s dtype.

    Raises:
        ValueError: an unknown mode, shapes that differ, a count that is missing.
    """
    responses = Responses(loss_mask)
    info = {
        "dp_size": dp_size,
        "batch_num_tokens": batch_num_tokens,
        "global_batch_size": global_batch_size,
        "loss_scale_factor": loss_scale_factor,
    }
    return _aggregate(responses.pack("loss_mat", loss_mat), responses, loss_agg_mode, info).to(loss_mat.dtype)


def _aggregate(losses: Tensor, responses: Responses, mode: str, info: Mapping[str, Any]) -> Tensor:
    if mode not in _HOWS:
        raise ValueError(f"loss_agg_mode must be one of {tuple(_HOWS)}, got {mode!r}")
    how, dp_size = _HOWS[mode], info.get("dp_size", 1)
    if how == "token_sum":
        return aggregate(losses, responses.cu_seqlens, how) * dp_size
    needed = "batch_num_tokens" if how == "token_mean" else "global_batch_size"
    count, horizon = info.get(needed), None
    if count is None and dp_size > 1:
        raise ValueError(f"loss_agg_mode {mode!r} with dp_size {dp_size} needs {needed}")
    if how == "seq_mean_token_sum_norm":
        horizon = info.get("loss_scale_factor")
        horizon = max(responses.kept.shape[-1], 1) if horizon is None else horizon
    if count is None:
        return aggregate(losses, responses.cu_seqlens, how, horizon=horizon)
    return aggregate(losses, responses.cu_seqlens, how, 1, horizon=horizon) / count * dp_size


_KLS: dict[str, Kl] = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Sampled estimates of KL(policy, reference); verl's of this name in ``verl.trainer.ppo.core_algos``.

    Args:
        logprob, ref_logprob: of one shape; the reference gets no gradient.
        kl_penalty: ``kl`` or ``k1``, ``abs``, ``mse`` or ``k2``, ``low_var_kl`` or ``k3`` (clamped to at most 10);
            with a ``+`` behind, the same value with the gradient of ``k2``.

    Returns:
        Shaped like ``logprob``, in its dtype. Small values of ``k3`` keep the digits that verl's loses.

    Raises:
        NotImplementedError: another ``kl_penalty``.
    """
    name = kl_penalty.removesuffix("+")
    if name == "abs":
        value = (wide(logprob) - wide(ref_logprob.detach())).abs()
    elif name in _KLS:
        value = kl_estimates(logprob, ref_logprob, _KLS[name])
        value = value.clamp(-10, 10) if _KLS[name] == "k3" else value
    else:
        raise NotImplementedError(
            f"kl_penalty must be 'abs' or one of {tuple(_KLS)}, '+' behind or not: {kl_penalty!r}"
        )
    if name != kl_penalty:
        slope = kl_estimates(logprob, ref_logprob, "k2")
        value = slope - slope.detach() + value.detach()
    return value.to(logprob.dtype)


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped loss of a critic, :func:`prefcore.losses.ppo_value`; verl's in ``verl.trainer.ppo.core_algos``.

    Args:
        vpreds: ``[B, L]`` values, which get gradient.
        returns, values: ``[B, L]`` targets and old values.
        response_mask: ``[B, L]``.
        cliprange_value: positive.
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: as in :func:`agg_loss`.

    Returns:
        The loss and the share of tokens whose clipped error is the larger, 0-dim.
    """
    responses = Responses(response_mask)
    packed = (responses.pack(name, x) for name, x in (("vpreds", vpreds), ("values", values), ("returns", returns)))
    out = policy.ppo_value(*packed, eps_v=cliprange_value)
    info = {
        "dp_size": dp_size,
        "batch_num_tokens": batch_num_tokens,
        "global_batch_size": global_batch_size,
        "loss_scale_factor": loss_scale_factor,
    }
    clipped = (out.stats.clipped_low + out.stats.clipped_high) / out.stats.tokens.clamp(min=1)
    return _aggregate(out.losses, responses, loss_agg_mode, info).to(
        common_dtype(vpreds, returns, values)
    ), clipped.float()


def compute_entropy_loss(logits: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean") -> Tensor:
    """The entropies of ``logits`` ``[B, L, V]``, aggregated; verl's of this name in ``verl.trainer.ppo.core_algos``.

    Masked rows are skipped, in the forward and in the backward.
    """
    responses = Responses(response_mask)
    found = entropies(logits, torch.where(responses.kept, 0, -100))
    return _aggregate(responses.pack("logits", found), responses, loss_agg_mode, {}).to(logits.dtype)


# verl.trainer.ppo.core_algos: policy losses


def _option(config: Any, name: str, default: Any = None) -> Any:
    value = config.get(name, None) if hasattr(config, "get") else getattr(config, name, None)
    return default if value is None else value


def _bounds(config: Any) -> tuple[float, float]:
    both = _option(config, "clip_ratio", 0.2)
    return _option(config, "clip_ratio_low", both), _option(config, "clip_ratio_high", both)


class _Batch:
    """What every policy loss is given, packed."""

    def __init__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        config: Any,
        weights: Tensor | None,
    ) -> None:
        if config is None:
            raise ValueError("config must be the actor's configuration")
        self.responses, self.config = Responses(response_mask), config
        self.dtype = common_dtype(log_prob, old_log_prob, advantages)
        self.logps = self.responses.pack("log_prob", log_prob)
        self.old_logps = self.responses.pack("old_log_prob", old_log_prob.detach()).to(self.logps.dtype)
        self.advantages = self.responses.pack("advantages", advantages.detach()).to(self.logps.dtype)
        self.weights = None
        if weights is not None:
            self.weights = self.responses.pack("rollout_is_weights", weights.detach()).to(self.logps.dtype)
        self.drift = self.logps.detach() - self.old_logps

    def terms(self, weights: Tensor | None = None) -> policy.TokenTerms:
        """The factors of the surrogate: importance weights, and further ones."""
        given = [x for x in (self.weights, weights) if x is not None]
        terms: policy.TokenTerms = {}
        if given:
            terms["weights"] = given[0] if len(given) == 1 else given[0] * given[1]
        return terms

    def weighted(self, losses: Tensor) -> Tensor:
        return losses if self.weights is None else losses * self.weights

    def loss(self, losses: Tensor, mode: str) -> Tensor:
        info = _option(self.config, "global_batch_info", {})
        return _aggregate(losses, self.responses, mode, info).to(self.dtype)


def _metrics(ppo_kl: Tensor, clipped: Tensor | None = None, lower: Tensor | None = None) -> Metrics:
    """verl's, of values of tokens; of those not given, zeros."""
    zero = torch.zeros_like(ppo_kl)
    means = torch.stack([mean((zero if x is None else x).double()) for x in (clipped, ppo_kl, lower)]).tolist()
    return dict(zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), means, strict=True))


def _clip_metrics(batch: _Batch, out: PolicyTerms, clamp: float = 20.0) -> Metrics:
    kl = mean(-batch.drift.clamp(-clamp, clamp).double())
    sums = torch.stack([out.stats.clipped_low + out.stats.clipped_high, out.stats.clipped_dual])
    clipped, dual = sums / max(batch.logps.numel(), 1)
    values = torch.stack([clipped, kl, dual]).tolist()
    return dict(zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), values, strict=True))


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate with dual clip, :func:`prefcore.losses.ppo`; verl's policy loss ``vanilla``.

    The other ``compute_policy_loss_…`` are called alike, and are verl's of their names in
    ``verl.trainer.ppo.core_algos``.

    Args:
        old_log_prob, log_prob, advantages: ``[B, L]``; ``log_prob`` alone gets gradient.
        response_mask: ``[B, L]``.
        loss_agg_mode: as in :func:`agg_loss`.
        config: the actor's. Read are ``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``, here ``clip_ratio_c`` (at
            least 1 + clip_ratio_high; 3 unless given), and ``global_batch_info``, further arguments of
            :func:`agg_loss`.
        rollout_is_weights: ``[B, L]``, at least 0, factors of a token's loss.

    Returns:
        The loss, 0-dim, and verl's metrics as numbers: ``actor/pg_clipfrac``, ``actor/ppo_kl`` and
        ``actor/pg_clipfrac_lower``.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, a configuration that is missing.
    """
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    low, high = _bounds(config)
    dual = _option(config, "clip_ratio_c", 3.0)
    out = policy.ppo(
        batch.logps, batch.old_logps, batch.advantages, eps=low, eps_high=high, dual_clip=dual, **batch.terms()
    )
    return batch.loss(out.losses, loss_agg_mode), _clip_metrics(batch, out)


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The ratio of a response with the gradient of its tokens, :func:`prefcore.losses.gspo_token`; ``gspo``.

    As :func:`compute_policy_loss_vanilla`, without dual clip. The mean log-ratio is clamped to ±10, verl's to at most
    10: below -10 a token of A > 0 has a loss of less than 4.6e-5 A either way.
    """
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    low, high = _bounds(config)
    cu_seqlens = batch.responses.cu_seqlens
    terms = batch.terms()
    # Advantages are of tokens: the offsets are for the ratios alone.
    out = policy.gspo_token(batch.logps, batch.old_logps, batch.advantages, cu_seqlens, eps=low, eps_high=high, **terms)
    return batch.loss(out.losses, loss_agg_mode), _clip_metrics(batch, out, float("inf"))


def compute_policy_loss_sapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The smooth gate of SAPO, :func:`prefcore.losses.sapo`; ``sapo``.

    As :func:`compute_policy_loss_vanilla`; ``config`` has ``tau_pos`` and ``tau_neg``. As in verl the aggregation is
    ``seq-mean-token-mean`` whatever ``loss_agg_mode`` says.
    """
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    tau_pos, tau_neg = _option(config, "tau_pos", 1.0), _option(config, "tau_neg", 1.05)
    terms = batch.terms()
    out = policy.sapo(batch.logps, batch.old_logps, batch.advantages, tau_pos=tau_pos, tau_neg=tau_neg, **terms)
    return batch.loss(out.losses, "seq-mean-token-mean"), _metrics(-batch.drift.clamp(-20, 20))


def compute_policy_loss_gpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """-A log p, :func:`prefcore.losses.reinforce`; ``gpg``. As :func:`compute_policy_loss_vanilla`, without metrics."""
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    out = policy.reinforce(batch.logps, batch.advantages, **batch.terms())
    return batch.loss(out.losses, loss_agg_mode), {}


def compute_policy_loss_reinforce(
    rollout_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """-w A log p, :func:`prefcore.losses.reinforce`; what verl's ``bypass_mode`` calls for the loss ``reinforce``.

    As :func:`compute_policy_loss_vanilla`; the one metric is ``actor/ppo_kl``, from the rollout's log-probs.
    """
    batch = _Batch(rollout_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    out = policy.reinforce(batch.logps, batch.advantages, **batch.terms())
    return batch.loss(out.losses, loss_agg_mode), {"actor/ppo_kl": mean(-batch.drift.double()).item()}


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """A clipped ratio as a constant weight of -A log p, :func:`prefcore.losses.cispo`; ``cispo``.

    As :func:`compute_policy_loss_vanilla`; ``actor/pg_clipfrac`` counts tokens whose weight is clipped.
    """
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    low, high = _bounds(config)
    out = policy.cispo(batch.logps, batch.old_logps, batch.advantages, low=1 - low, high=1 + high, **batch.terms())
    return batch.loss(out.losses, loss_agg_mode), _clip_metrics(batch, out)


def compute_policy_loss_dppo_tv(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """A truncated ratio as the weight of -A log p, of tokens whose probability has not moved too far; ``dppo_tv``.

    As :func:`compute_policy_loss_vanilla`, and as :func:`prefcore.losses.dppo_tv`: the clip ratios are bounds of
    p - p_old; ``clip_ratio_c``, 20 unless given, is that of the ratio. ``actor/pg_clipfrac`` is the share of tokens
    left out, ``…_lower`` that of those kept whose ratio is truncated.
    """
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    low, high = _bounds(config)
    moved = batch.logps.detach().exp() - batch.old_logps.exp()
    return _truncated(batch, torch.where(batch.advantages > 0, moved <= high, moved >= -low), loss_agg_mode)


def compute_policy_loss_dppo_kl(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """:func:`compute_policy_loss_dppo_tv` with bounds of the KL divergence of taking the token or not; ``dppo_kl``."""
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    low, high = _bounds(config)
    p, old = batch.logps.detach().exp(), batch.old_logps.exp()
    kl = -old * batch.drift + (1 - old) * ((1 - old + 1e-8) / (1 - p + 1e-8)).log()
    kept = torch.where(batch.advantages > 0, (kl <= high) | (p <= old), (kl <= low) | (p >= old))
    return _truncated(batch, kept, loss_agg_mode)


def _truncated(batch: _Batch, kept: Tensor, mode: str) -> tuple[Tensor, Metrics]:
    most = _option(batch.config, "clip_ratio_c", 20.0)
    weights = batch.terms(kept.to(batch.logps.dtype))
    out = policy.cispo(batch.logps, batch.old_logps, batch.advantages, low=0.0, high=most, **weights)
    drift = batch.drift.clamp(-20, 20)
    return batch.loss(out.losses, mode), _metrics(-drift, ~kept, kept & (drift.exp() > most))


def compute_policy_loss_clip_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's surrogate without some tokens of high covariance, drawn by the CPU's generator as in verl; ``clip_cov``.

    As :func:`compute_policy_loss_vanilla`, without dual clip and with log-ratios clamped to ±80, not at all in verl.
    ``config.policy_loss`` has ``clip_cov_ratio`` (2e-4), the share of all tokens to draw, one at the least, among those
    not clipped whose (A - mean A)(log p - mean log p) is between ``clip_cov_lb`` (1) and ``clip_cov_ub`` (5).
    """
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    low, high = _bounds(config)
    further = _option(config, "policy_loss", {})
    share = _option(further, "clip_cov_ratio", 2e-4)
    lower, upper = _option(further, "clip_cov_lb", 1.0), _option(further, "clip_cov_ub", 5.0)
    if not share > 0:
        raise ValueError(f"clip_cov_ratio must be positive, got {share}")
    logps, signs = batch.logps.detach(), batch.advantages
    ratio = batch.drift.exp()
    clipped = -signs * ratio.clamp(1 - low, 1 + high) > -signs * ratio
    covariance = (signs - mean(signs)) * (logps - mean(logps))
    drawn = ((covariance > lower) & (covariance < upper) & ~clipped).nonzero()[:, 0]
    if drawn.numel():
        drawn = drawn[torch.randperm(drawn.numel()).to(drawn.device)[: max(int(share * logps.numel()), 1)]]
    kept = torch.ones_like(logps).index_fill(0, drawn, 0)
    terms = batch.terms(kept)
    terms["clamp"] = _UNCLAMPED
    out = policy.ppo(batch.logps, batch.old_logps, signs, eps=low, eps_high=high, **terms)
    metrics = _metrics(-batch.drift, kept == 0)
    return batch.loss(out.losses, loss_agg_mode), {name: metrics[name] for name in list(metrics)[:2]}


def compute_policy_loss_kl_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """-rho A, with a penalty on the tokens of highest covariance, :func:`prefcore.losses.kl_cov`; ``kl_cov``.

    As :func:`compute_policy_loss_vanilla`, unclipped and with log-ratios clamped to ±80, not at all in verl.
    ``config.policy_loss`` has ``kl_cov_ratio`` (2e-4, at most 1) and ``ppo_kl_coef`` (1). The one metric,
    ``actor/ppo_kl``, is the mean absolute log-ratio.
    """
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    further = _option(config, "policy_loss", {})
    share, coef = _option(further, "kl_cov_ratio", 2e-4), float(_option(further, "ppo_kl_coef", 1.0))
    if not share > 0:
        raise ValueError(f"kl_cov_ratio must be positive, got {share}")
    out = policy.kl_cov(batch.logps, batch.old_logps, batch.advantages, share=share, coef=coef, clamp=_UNCLAMPED)
    metrics = {"actor/ppo_kl": mean(batch.drift.abs().double()).item()}
    return batch.loss(batch.weighted(out.losses), loss_agg_mode), metrics


def compute_policy_loss_geo_mean(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """-A times the geometric mean of a response's clipped ratios, as :func:`prefcore.losses.gmpo`; ``geo_mean``.

    As :func:`compute_policy_loss_vanilla`; A is the mean of a response's advantages, weights enter by their geometric
    mean, and the loss is the mean over all B rows, those without tokens too, whatever ``loss_agg_mode`` says. As in
    verl tokens of A = 0 have no part in the mean, and the metrics count every token outside the bounds, by the sign of
    A.
    """
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    low, high = _bounds(config)
    cu_seqlens = batch.responses.cu_seqlens
    signs = batch.advantages
    clipped = policy_terms(batch.logps, batch.old_logps, signs, form="log_clip", low=-low, high=high).losses
    ratios = sequence_reduce(clipped * (signs != 0), cu_seqlens, "mean").exp()
    losses = -sequence_reduce(signs, cu_seqlens, "mean") * ratios
    if batch.weights is not None:
        losses = losses * sequence_reduce((batch.weights + 1e-10).log(), cu_seqlens, "mean").exp()
    outside = (batch.drift < -low) | (batch.drift > high)
    metrics = _metrics(-batch.drift, outside & (signs > 0), outside & (signs < 0))
    return mean(losses).to(batch.dtype), metrics


def compute_policy_loss_dro(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """-(A log p - beta/2 (log p - log p_old)^2), :func:`prefcore.losses.dro_token`; ``dro``.

    As :func:`compute_policy_loss_vanilla`; ``config.policy_loss.dro_beta`` must be positive. The one metric is
    ``actor/ppo_kl``.
    """
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)
    beta = _option(_option(config, "policy_loss", {}), "dro_beta")
    if beta is None or not beta > 0:
        raise ValueError(f"policy_loss.dro_beta must be positive, got {beta}")
    out = policy.dro_token(batch.logps, batch.old_logps, batch.advantages, beta=beta)
    metrics = {"actor/ppo_kl": mean(-batch.drift.double()).item()}
    return batch.loss(batch.weighted(out.losses), loss_agg_mode), metrics


# verl.trainer.ppo.core_algos: advantages


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantages, whitened over the batch, and returns; verl's estimator ``gae``.

    Masked tokens, as of a tool, are stepped over. The other ``compute_…_advantage`` are verl's of their names in
    ``verl.trainer.ppo.core_algos`` too.

    Args:
        token_level_rewards, values, response_mask: ``[B, L]``.
        gamma, lam: in [0, 1].

    Returns:
        Advantages and returns ``[B, L]``, in the rewards' dtype, zero where masked; no gradient comes back. A batch of
        one token has the advantage 0, where verl raises.
    """
    responses = Responses(response_mask)
    rewards = responses.pack("token_level_rewards", token_level_rewards)
    old = responses.pack("values", values).to(rewards.dtype)
    out = gae(rewards, old, responses.cu_seqlens, gamma=float(gamma), lam=float(lam))
    whole = estimates.whiten(out.advantages)
    return responses.pad(whole, token_level_rewards), responses.pad(out.returns, token_level_rewards)


class _Groups:
    """Rewards of responses in the order of their groups, as prefcore has them."""

    def __init__(self, token_level_rewards: Tensor, response_mask: Tensor, index: Any) -> None:
        self.responses = Responses(response_mask)
        self.rewards = wide(token_level_rewards.detach().sum(-1))  # masked ones too, as in verl
        self.like = token_level_rewards
        labels = index.tolist() if hasattr(index, "tolist") else list(index)
        if len(labels) != len(self.rewards):
            raise ValueError(f"index must have {len(self.rewards)} labels, got {len(labels)}")
        codes: dict[Any, int] = {}
        groups = torch.tensor([codes.setdefault(label, len(codes)) for label in labels], dtype=torch.int64)
        sizes = groups.bincount(minlength=len(codes))
        device = self.rewards.device
        self.order = groups.argsort(stable=True).to(device)
        self.cu_groups = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(device, torch.int32)
        self.alone = (sizes == 1)[groups].to(device)

    def advantages(self, estimate: Callable[..., Tensor], *further: Tensor, **options: Any) -> Tensor:
        """``[B]``, in the batch's order."""
        out = torch.empty_like(self.rewards)
        out[self.order] = estimate(self.rewards[self.order], self.cu_groups, *further, **options)
        return out

    def spread(self, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, L]``, twice: advantages are returns where a response has one reward."""
        out = advantages.to(self.like.dtype).unsqueeze(-1) * self.responses.kept
        return out, out


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any | None = None,
) -> tuple[Tensor, Tensor]:
    """Rewards less their group's mean, over its deviation, :func:`prefcore.advantages.grpo`; ``grpo``.

    A response's reward is the sum of its ``token_level_rewards``, masked ones too. A group of one keeps its reward,
    over 1 + epsilon. A group of equal rewards has exact zeros, where the rounding of verl's mean is divided by epsilon.

    Args:
        token_level_rewards, response_mask: ``[B, L]``.
        index: ``[B]`` labels of groups: an array, a tensor or a list.
        epsilon: added to the deviation.
        norm_adv_by_std_in_grpo: whether to divide by it.
        config: unused.

    Returns:
        The advantages of responses at each of their tokens, ``[B, L]`` in the rewards' dtype, twice.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    groups = _Groups(token_level_rewards, response_mask, index)
    if not norm_adv_by_std_in_grpo:
        return groups.spread(groups.advantages(estimates.dr_grpo, single="reward"))
    scaled = groups.advantages(estimates.grpo, eps=epsilon)
    return groups.spread(torch.where(groups.alone, groups.rewards / (1 + epsilon), scaled))


def compute_grpo_vectorized_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`compute_grpo_outcome_advantage`; ``grpo_vectorized``."""
    return compute_grpo_outcome_advantage(
        token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo, config
    )


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Rewards less the mean of the others, :func:`prefcore.advantages.rloo`; ``rloo``. A group of one keeps its reward.

    Called as :func:`compute_grpo_outcome_advantage`; ``epsilon``, ``config`` and others are unused.
    """
    groups = _Groups(token_level_rewards, response_mask, index)
    return groups.spread(groups.advantages(estimates.rloo, single="reward"))


def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`compute_rloo_outcome_advantage`, but 0 for a group of one; ``rloo_vectorized``."""
    groups = _Groups(token_level_rewards, response_mask, index)
    return groups.spread(groups.advantages(estimates.rloo, single="zero"))


def compute_opo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Rewards less the group's mean weighted by length, :func:`prefcore.advantages.opo`; ``opo``.

    Called as :func:`compute_rloo_outcome_advantage`. A group of one keeps its reward; one without tokens has zeros,
    where verl's are NaN.
    """
    groups = _Groups(token_level_rewards, response_mask, index)
    lengths = groups.responses.lengths[groups.order]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return groups.spread(groups.advantages(estimates.opo, cu_seqlens, single="reward"))


def compute_gpg_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    f_norm: float = 1.0,
    alpha: float = 1.0,
    config: Any | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Rewards less their group's mean, times B over the number of rewards that are not 0, over ``f_norm``; ``gpg``.

    Called as :func:`compute_rloo_outcome_advantage`; as in verl ``alpha`` is unused. A group of one keeps its reward.
    """
    groups = _Groups(token_level_rewards, response_mask, index)
    factor = len(groups.rewards) / groups.rewards.count_nonzero().clamp(min=1).to(groups.rewards.dtype)
    return groups.spread(groups.advantages(estimates.dr_grpo, single="reward") * factor / f_norm)


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Discounted rewards to come, whitened over the batch's tokens, and unwhitened; ``reinforce_plus_plus``.

    :func:`prefcore.advantages.reinforce_pp`. Masked tokens are stepped over; ``config.gamma`` is the discount.

    Returns:
        Advantages and returns ``[B, L]``, zero where masked.
    """
    if config is None:
        raise ValueError("config must be the algorithm's configuration")
    responses = Responses(response_mask)
    rewards = responses.pack("token_level_rewards", token_level_rewards.detach())
    returns = estimates.discounted_returns(rewards, responses.cu_seqlens, gamma=float(_option(config, "gamma", 1.0)))
    whole = estimates.whiten(returns)
    return responses.pad(whole, token_level_rewards), responses.pad(returns, token_level_rewards)


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Rewards less their group's mean, whitened over the batch's tokens; ``reinforce_plus_plus_baseline``.

    :func:`prefcore.advantages.reinforce_pp_baseline`, but a group of one keeps its reward. Called as
    :func:`compute_rloo_outcome_advantage`.
    """
    groups = _Groups(token_level_rewards, response_mask, index)
    responses = groups.responses
    centred = groups.advantages(estimates.dr_grpo, single="reward")
    tokens = estimates.to_tokens(centred, responses.cu_seqlens, int(responses.cu_seqlens[-1]))
    out = responses.pad(estimates.whiten(tokens), token_level_rewards)
    return out, out


def compute_remax_outcome_advantage(
    token_level_rewards: Tensor,
    reward_baselines: Tensor,
    response_mask: Tensor,
    config: Any | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Rewards to come less the reward of the greedy response, ``reward_baselines`` ``[B]``, and unlessened; ``remax``.

    Returns:
        Advantages and returns ``[B, L]``, zero where masked.
    """
    responses = Responses(response_mask)
    rewards = responses.pack("token_level_rewards", token_level_rewards.detach())
    returns = estimates.discounted_returns(rewards, responses.cu_seqlens, gamma=1.0)
    baselines = estimates.to_tokens(wide(reward_baselines.detach()), responses.cu_seqlens, rewards.shape[0])
    out = responses.pad(returns - baselines, token_level_rewards)
    return out, responses.pad(returns, token_level_rewards)


# In verl's place

_POLICY_LOSSES = (
    compute_policy_loss_vanilla,
    compute_policy_loss_gspo,
    compute_policy_loss_sapo,
    compute_policy_loss_gpg,
    compute_policy_loss_reinforce,
    compute_policy_loss_cispo,
    compute_policy_loss_dppo_tv,
    compute_policy_loss_dppo_kl,
    compute_policy_loss_clip_cov,
    compute_policy_loss_kl_cov,
    compute_policy_loss_geo_mean,
    compute_policy_loss_dro,
)
_ADVANTAGES = (
    compute_gae_advantage_return,
    compute_grpo_outcome_advantage,
    compute_grpo_vectorized_outcome_advantage,
    compute_rloo_outcome_advantage,
    compute_rloo_vectorized_outcome_advantage,
    compute_opo_outcome_advantage,
    compute_gpg_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_remax_outcome_advantage,
)
_LOGITS = (
    logprobs_from_logits,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    calculate_sum_pi_squared_from_logits,
)
_OTHERS = (agg_loss, kl_penalty, compute_value_loss, compute_entropy_loss)


def _named(*functions: Any) -> dict[str, Any]:
    return {function.__name__: function for function in functions}


#: What is replaced, by verl's modules.
ADAPTERS: dict[str, dict[str, Any]] = {
    "verl.utils.torch_functional": _named(*_LOGITS),
    "verl.utils.experimental.torch_functional": _named(FusedLinearForPPO),
    "verl.utils.kernel.linear_cross_entropy": _named(linear_cross_entropy),
    "verl.trainer.ppo.core_algos": _named(*_OTHERS, *_POLICY_LOSSES, *_ADVANTAGES),
}
_TARGETS = [Target(place, name, ours) for place, names in ADAPTERS.items() for name, ours in names.items()]
_PATCH = Patch("prefcore.adapters.verl", installed("verl", *VERSIONS), lambda: _TARGETS)


def enable(*, skip: Collection[str] = ()) -> AbstractContextManager:
    """Put the functions of this module in the place of verl's, in its modules and registries, loaded now or later.

    In every process that trains, before trainers are built: what already holds one of verl's functions keeps it.

    Args:
        skip: names of functions to leave alone.

    Returns:
        What is used in ``with`` to :func:`disable` at the end.

    Raises:
        ImportError: verl, or something that it needs, is not installed.
        RuntimeError: another version than :data:`VERSIONS`, a function that is missing or has another signature;
            nothing is replaced then.
        ValueError: ``skip`` names something else.
    """
    return _PATCH.enable(skip)


def disable() -> None:
    """Put verl's own functions back, in modules loaded since too; nothing where not enabled."""
    _PATCH.disable()


def enabled() -> bool:
    """Whether verl's functions are replaced by ours."""
    return _PATCH.enabled()
