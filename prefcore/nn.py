"""Modules called as those of Liger's ``chunked_loss`` are, over ``linear_loss`` and ``linear_divergence``.

A script that constructs and calls ``LigerFusedLinearDPOLoss`` and the like does the same with these: constructors, the
order and names of arguments, and what is returned are those of Liger 0.8.5, as are the values. Targets are aligned with
the hidden states, never shifted here; the chosen half of a batch comes before the rejected half. What differs:

- Rows whose target is ``ignore_index`` never meet the head; whatever they hold, they get zero gradients.
- float64 inputs give float64 results (Liger's log-probs and losses are of float32).
- The mean of no tokens is 0, in log-probs as in the NLL, where Liger's is NaN.
- A head may be of another type than the hidden states, as :func:`prefcore.linear_logprobs` takes it.
- ``chunk_size`` and ``compiled`` are taken and have no effect: ``linear_loss`` picks its tiles by memory, nothing is
  compiled.

All modules raise ValueError for shapes, dtypes, devices and values that do not fit. They have no parameters: the head
is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from prefcore import losses
from prefcore._types import LinearLoss, Tile, TokenStats
from prefcore.losses.pairwise import _log_odds
from prefcore.ops._checks import check_tensor
from prefcore.ops._pair_arguments import Kind
from prefcore.ops.gather_rows import gather_rows
from prefcore.ops.linear_divergence import linear_divergence
from prefcore.ops.linear_logprobs import linear_logprobs
from prefcore.ops.linear_loss import linear_loss
from prefcore.ops.sequence_reduce import sequence_reduce

__all__ = [
    "LinearCPOLoss",
    "LinearDPOLoss",
    "LinearGRPOLoss",
    "LinearJSDLoss",
    "LinearKTOLoss",
    "LinearORPOLoss",
    "LinearSimPOLoss",
]

Metrics = tuple[Tensor, ...]


class _Responses(NamedTuple):
    """The T rows of a padded batch that predict something, one sequence after another."""

    rows: Tensor  # [T] int32, into the N·L rows of the batch
    targets: Tensor  # [T] int64
    counted: Tensor  # [T] bool: of the response itself, not of the NLL alone
    in_nll: Tensor  # [T] bool
    cu_seqlens: Tensor  # [N + 1] int32
    host_seqlens: Tensor  # the same on the CPU
    lengths: Tensor  # [N] responses' tokens, at least 1
    average: bool

    @classmethod
    def find(
        cls, target: Tensor, order: Tensor, ignore_index: int, average: bool, nll_target: Tensor | None = None
    ) -> _Responses:
        """Of ``target [N, L]`` in the order of sequences ``order [N]``; the NLL is of the first half of the batch.

        Where ``nll_target`` names another token than ``target``, the row is taken once for each.
        """
        chosen = (torch.arange(len(target), device=target.device) < len(target) // 2)[:, None].expand_as(target)
        if nll_target is None:
            labels, in_nll = target[:, None], chosen[:, None]
        else:
            same = nll_target == target
            labels = torch.stack([target, nll_target.where(chosen & ~same, ignore_index)], 1)
            in_nll = torch.stack([chosen & same, chosen], 1)
        labels, in_nll = labels[order], in_nll[order]  # [N, 1 or 2, L]
        taken = labels != ignore_index
        sequence, slot, position = taken.nonzero(as_tuple=True)
        cu_seqlens = torch.cat([order.new_zeros(1), taken.sum((1, 2))]).cumsum(0).to(torch.int32)
        return cls(
            rows=(order[sequence] * target.shape[1] + position).to(torch.int32),
            targets=labels[taken],
            counted=slot == 0,
            in_nll=in_nll[taken],
            cu_seqlens=cu_seqlens,
            host_seqlens=cu_seqlens.cpu(),
            lengths=taken[:, 0].sum(1).clamp(min=1),
            average=average,
        )

    def hidden(self, hidden: Tensor) -> Tensor:
        return gather_rows(hidden.flatten(0, 1), self.rows)

    def logps(self, token_logps: Tensor, tile: Tile | None = None) -> Tensor:
        """``[n]`` sums or means over the responses of a tile, or of the batch."""
        tokens, sequences = (slice(None), slice(None)) if tile is None else (tile.tokens, tile.sequences)
        cu_seqlens = self.cu_seqlens if tile is None else tile.cu_seqlens
        sums = sequence_reduce(token_logps, cu_seqlens, "weighted", self.counted[tokens].to(token_logps.dtype))
        return sums / self.lengths[sequences] if self.average else sums

    @torch.no_grad()
    def reference(
        self,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Tensor,
        temperature: float = 1.0,
    ) -> Tensor:
        """``[T]`` log-probs of the targets under the reference, whose hidden states are of ``target``'s shape."""
        if hidden is None or weight is None:
            raise ValueError("use_ref_model=True needs ref_input and ref_weight")
        _check_hidden("ref_input", hidden, target)
        return linear_logprobs(self.hidden(hidden), weight, self.targets, bias=bias, temperature=temperature).logps


def _check_hidden(name: str, hidden: Tensor, target: Tensor) -> None:
    check_tensor(name, hidden)
    if hidden.ndim != 3 or hidden.shape[:2] != target.shape[:2]:
        raise ValueError(f"expected {name} [{', '.join(map(str, target.shape[:2]))}, D], got {tuple(hidden.shape)}")


def _check_batch(hidden: Tensor, target: Tensor) -> None:
    check_tensor("target", target)
    if target.ndim != 2:
        raise ValueError(f"expected target [N, L], got {tuple(target.shape)}")
    _check_hidden("_input", hidden, target)


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[N]`` means of each sequence's logits over all its rows and the vocabulary: of a mean row and a mean column."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    means = (hidden.mean(1, dtype=dtype) * weight.mean(0, dtype=dtype)).sum(1)
    return means if bias is None else means + bias.mean(dtype=dtype)


def _beside(hidden: Any, *head: Any) -> list[Any]:
    """A head as the op takes it beside the hidden states: it converts slice by slice all but float64.

    What is no tensor is left for the op to refuse.
    """

    def foreign(x: Any) -> bool:
        tensors = isinstance(x, Tensor) and isinstance(hidden, Tensor)
        return tensors and (x.dtype == torch.float64) != (hidden.dtype == torch.float64)

    return [x.to(hidden.dtype) if foreign(x) else x for x in head]


class _Loss(nn.Module):
    """A module that prints its settings."""

    def extra_repr(self) -> str:
        settings = ((name, value) for name, value in vars(self).items() if not name.startswith("_"))
        return ", ".join(f"{name}={value!r}" for name, value in settings if name != "training")


class _PairLoss(_Loss):
    """What the losses of pairs share: a loss of the log-probs of pairs, and an NLL of the chosen responses."""

    def __init__(self, ignore_index: int, beta: float, alpha: float, compute_nll_loss: bool, average: bool) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.average_log_prob = average

    def _losses(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        """``[P]`` losses of log-probs, means where the method averages; zeros stand in for an absent reference."""
        raise NotImplementedError

    def _run(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None,
        *,
        nll_target: Tensor | None = None,
        reference: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
    ) -> tuple[Tensor, Metrics]:
        _check_batch(_input, target)
        if len(target) % 2:
            raise ValueError(f"expected chosen and rejected sequences, as many of each, got {len(target)} in all")
        if nll_target is not None:
            check_tensor("nll_target", nll_target)
            if nll_target.shape != target.shape:
                raise ValueError(f"expected nll_target {list(target.shape)}, got {list(nll_target.shape)}")
        pairs = len(target) // 2
        order = torch.arange(2 * pairs, device=target.device).view(2, pairs).T.flatten()
        batch = _Responses.find(
            target, order, self.ignore_index, self.average_log_prob, nll_target if self.compute_nll_loss else None
        )
        count = batch.in_nll.sum().clamp(min=1)
        if reference is None:
            ref_logps = None
        else:
            ref_logps = batch.logps(batch.reference(*reference, target))

        def split(logps: Tensor, tile: Tile | None = None) -> list[Tensor]:
            """``[P]`` each of chosen, rejected, and both under the reference."""
            if ref_logps is None:
                ref = torch.zeros_like(logps).detach()
            else:
                ref = ref_logps if tile is None else ref_logps[tile.sequences]
            return [x.contiguous() for both in (logps, ref) for x in both.view(-1, 2).unbind(1)]

        def loss_fn(stats: TokenStats, tile: Tile) -> Tensor:
            values = self._losses(*split(batch.logps(stats.logps, tile), tile))
            if not self.compute_nll_loss:
                return values
            sums = sequence_reduce(
                stats.logps, tile.cu_seqlens, "weighted", batch.in_nll[tile.tokens].to(stats.logps.dtype)
            )
            return values - self.alpha * pairs * sums.view(-1, 2).sum(1) / count

        out = linear_loss(
            batch.hidden(_input), lin_weight, batch.targets, batch.host_seqlens, loss_fn,
            cu_groups=torch.arange(0, 2 * pairs + 1, 2, dtype=torch.int32), bias=bias,
        )  # fmt: skip
        return out.loss, self._metrics(out, batch, split(batch.logps(out.stats.logps)), _input, lin_weight, bias, count)

    @torch.no_grad()
    def _metrics(
        self,
        out: LinearLoss,
        batch: _Responses,
        logps: list[Tensor],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        count: Tensor,
    ) -> Metrics:
        chosen, rejected, ref_chosen, ref_rejected = logps
        chosen_logits, rejected_logits = _mean_logits(hidden, weight, bias).view(2, -1).mean(1)
        if self.compute_nll_loss:
            nll = -(out.stats.logps * batch.in_nll).sum() / count
        else:
            nll = torch.zeros_like(out.loss)
        rewards = (self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected))
        return (chosen, rejected, chosen_logits, rejected_logits, nll, *rewards, *self._more(chosen, rejected))

    def _more(self, chosen: Tensor, rejected: Tensor) -> Metrics:
        return ()


# By Liger's loss_type.
_DPO: dict[str, Callable[..., Tensor]] = {
    "sigmoid": losses.dpo,
    "hinge": losses.hinge,
    "exo_pair": losses.exo_pair,
    "nca_pair": losses.nca_pair,
    "robust": losses.robust_dpo,
    "bco_pair": losses.bco_pair,
    "sppo_hard": losses.sppo_hard,
    "apo_zero": losses.apo_zero,
    "apo_down": losses.apo_down,
    "discopop": losses.discopop,
}


class LinearDPOLoss(_PairLoss):
    """DPO and its kin of hidden states and heads, called as ``LigerFusedLinearDPOLoss``.

    Equal to the mean of :func:`prefcore.losses.dpo` (or of the function that ``loss_type`` names) of the responses'
    log-probs, plus ``alpha`` times the chosen tokens' mean NLL with ``compute_nll_loss=True``.

    Args:
        ignore_index: of the targets that do not count.
        beta: of the loss; chosen and rejected rewards are ``beta * (logps - ref_logps)``.
        alpha: of the NLL.
        compute_nll_loss: whether there is one.
        compiled, chunk_size: without effect.
        use_ref_model: False puts 0 in place of the reference's log-probs, whatever is given.
        average_log_prob: means over a response's tokens instead of sums, under both models.
        loss_type: ``sigmoid``, ``hinge``, ``exo_pair``, ``nca_pair``, ``robust``, ``bco_pair``, ``sppo_hard``,
            ``apo_zero``, ``apo_down`` or ``discopop``.
        label_smoothing: of ``exo_pair`` and ``robust`` alone.
        discopop_tau: of ``discopop`` alone.

    Raises:
        ValueError: another ``loss_type``; a ``label_smoothing`` outside (0, 1) for ``exo_pair``, outside [0, 1/2) for
            ``robust``.

    Example:
        >>> import torch
        >>> from prefcore.nn import LinearDPOLoss
        >>> hidden, weight = torch.randn(4, 6, 8, requires_grad=True), torch.randn(50, 8)  # two pairs
        >>> target = torch.randint(50, (4, 6))
        >>> loss, metrics = LinearDPOLoss()(weight, hidden, target, ref_input=hidden.detach(), ref_weight=weight)
        >>> loss.backward()
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__(ignore_index, beta, alpha, compute_nll_loss, average_log_prob)
        if loss_type not in _DPO:
            raise ValueError(f"loss_type must be one of {tuple(_DPO)}, got {loss_type!r}")
        if loss_type == "exo_pair" and not 0 < label_smoothing < 1:
            raise ValueError(f"loss_type='exo_pair' needs a label_smoothing in (0, 1), got {label_smoothing}")
        if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
            raise ValueError(f"loss_type='robust' needs a label_smoothing in [0, 0.5), got {label_smoothing}")
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The loss, and detached metrics.

        Args:
            lin_weight: ``[V, D]``, float32, float64, bfloat16 or float16.
            _input: ``[2P, L, D]``, as that: P chosen sequences, then the rejected ones of the same pairs.
            target: ``[2P, L]`` int64, what each row predicts.
            bias: ``[V]``.
            ref_input, ref_weight, ref_bias: ``[2P, L, E]``, ``[V, E]`` and ``[V]``, which get no gradient.

        Returns:
            The loss, 0-dim; and log-probs of chosen and rejected responses ``[P]``, mean logits of chosen and rejected
            rows over all L and V (0-dim), the NLL (0-dim, 0 without one), chosen and rejected rewards ``[P]``.
        """
        reference = (ref_input, ref_weight, ref_bias) if self.use_ref_model else None
        return self._run(lin_weight, _input, target, bias, reference=reference)

    def _losses(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        if self.loss_type == "sppo_hard":
            return losses.sppo_hard(
                chosen, rejected, prev_chosen_logps=ref_chosen, prev_rejected_logps=ref_rejected, beta=self.beta,
                factor=1.0,
            )  # fmt: skip
        options: dict[str, Any] = {}
        if self.loss_type in ("exo_pair", "robust"):
            options["label_smoothing"] = self.label_smoothing
        elif self.loss_type == "discopop":
            options["tau"] = self.discopop_tau
        return _DPO[self.loss_type](chosen, rejected, ref_chosen, ref_rejected, beta=self.beta, **options)


class LinearORPOLoss(_PairLoss):
    """ORPO of hidden states and a head, called as ``LigerFusedLinearORPOLoss``.

    Equal to the mean NLL of the chosen tokens (none with ``compute_nll_loss=False``) plus the mean of ``beta`` times
    :func:`prefcore.losses.orpo`'s odds-ratio term. ``compiled`` and ``chunk_size`` are without effect.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, 1.0, compute_nll_loss, average=True)
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The loss and metrics of :class:`LinearDPOLoss`, log-probs being means, then two more.

        Args:
            lin_weight, _input, target, bias: as there.
            nll_target: ``[2P, L]`` int64, of whose chosen half the NLL is (prompts and responses, say), instead of
                ``target``'s.

        Returns:
            The loss, and metrics as there: rewards are ``beta * logps``; then log σ of the log odds ratio, and that
            ratio, means over pairs, 0-dim.
        """
        return self._run(lin_weight, _input, target, bias, nll_target=nll_target)

    def _losses(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        one = torch.ones_like(chosen, dtype=torch.int64)  # these are means already
        return losses.orpo(
            chosen, rejected, chosen_lengths=one, rejected_lengths=one, lam=self.beta,
            nll_logps=torch.zeros_like(chosen), nll_lengths=one,
        )  # fmt: skip

    def _more(self, chosen: Tensor, rejected: Tensor) -> Metrics:
        ratio = _log_odds(chosen) - _log_odds(rejected)
        return logsigmoid(ratio).mean(), ratio.mean()


class LinearCPOLoss(_PairLoss):
    """CPO of hidden states and a head, called as ``LigerFusedLinearCPOLoss``.

    Equal to the mean of :func:`prefcore.losses.cpo` at ``alpha=0`` plus ``alpha`` times the chosen tokens' mean NLL
    (none with ``compute_nll_loss=False``). ``compiled`` and ``chunk_size`` are without effect.
    """

    gamma: float = 0.0

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, alpha, compute_nll_loss, average_log_prob)
        self.label_smoothing = label_smoothing
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """The loss and metrics of :class:`LinearDPOLoss`; rewards are ``beta * logps``."""
        return self._run(lin_weight, _input, target, bias)

    def _losses(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        return losses.cpo(
            chosen, rejected, beta=self.beta, alpha=0.0, label_smoothing=self.label_smoothing, gamma=self.gamma
        )


class LinearSimPOLoss(LinearCPOLoss):
    """SimPO of hidden states and a head, called as ``LigerFusedLinearSimPOLoss``.

    Equal to the mean of :func:`prefcore.losses.simpo` plus ``alpha`` times the chosen tokens' mean NLL, which is on by
    default as in Liger. ``compiled`` and ``chunk_size`` are without effect.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index, beta, alpha, label_smoothing, compute_nll_loss, compiled, average_log_prob=True,
            chunk_size=chunk_size,
        )  # fmt: skip
        self.gamma = gamma


class LinearKTOLoss(_Loss):
    """KTO of hidden states and heads, called as ``LigerFusedLinearKTOLoss``: ``_input`` before ``lin_weight``.

    Equal to the mean of :func:`prefcore.losses.kto` with ``kl`` as its z0, of any sign; without ``kl``, of
    :func:`prefcore.losses.apo_zero_unpaired`. ``compiled`` and ``chunk_size`` are without effect.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The loss, and detached metrics.

        Args:
            _input: ``[N, L, D]``, float32, float64, bfloat16 or float16.
            lin_weight: ``[V, D]``.
            target: ``[N, L]`` int64, what each row predicts.
            bias: ``[V]``.
            preference_labels: ``[N]`` bool, which responses are desirable.
            ref_input, ref_weight, ref_bias: of the reference, without gradient, for ``use_ref_model=True`` alone.
            kl: a number, alone or as a tensor, or ``[N]``, one of each sequence; without gradient. (Liger takes ``[N]``
                so only where ``chunk_size`` is N; with smaller chunks it pairs each sequence with all numbers.)

        Returns:
            The loss, 0-dim; and sums over desirable, then undesirable sequences, 0-dim each: of log-probs, of all
            logits (L·V each sequence), of rewards ``beta * (logps - ref_logps)``.
        """
        _check_batch(_input, target)
        if preference_labels is None:
            raise ValueError("KTO needs preference_labels")
        check_tensor("preference_labels", preference_labels)
        if preference_labels.dtype != torch.bool or preference_labels.shape != target.shape[:1]:
            raise ValueError(
                f"expected preference_labels [{len(target)}] bool, got {list(preference_labels.shape)} "
                f"{preference_labels.dtype}"
            )
        if isinstance(kl, Tensor):
            check_tensor("kl", kl)
            if kl.numel() != 1 and kl.shape != target.shape[:1]:
                raise ValueError(f"expected kl of one number or [{len(target)}], got {list(kl.shape)}")
            kl = kl.detach().flatten().to(torch.promote_types(_input.dtype, torch.float32))
        order = torch.arange(len(target), device=target.device)
        batch = _Responses.find(target, order, self.ignore_index, self.average_log_prob)
        if self.use_ref_model:
            ref_logps = batch.logps(batch.reference(ref_input, ref_weight, ref_bias, target))
        else:
            dtype = torch.promote_types(_input.dtype, torch.float32)
            ref_logps = torch.zeros(len(target), dtype=dtype, device=target.device)
        # σ(∓beta·(logps - ref_logps - kl)) is apo_zero_unpaired's of a reference so much higher.
        anchor = ref_logps if kl is None else ref_logps + kl

        def loss_fn(stats: TokenStats, tile: Tile) -> Tensor:
            logps = batch.logps(stats.logps, tile)
            desirable = preference_labels[tile.sequences]
            return losses.apo_zero_unpaired(logps, anchor[tile.sequences], desirable, beta=self.beta)

        out = linear_loss(
            batch.hidden(_input), lin_weight, batch.targets, batch.host_seqlens, loss_fn, bias=bias
        )  # fmt: skip
        with torch.no_grad():
            logps = batch.logps(out.stats.logps)
            logits = _mean_logits(_input, lin_weight, bias) * (target.shape[1] * lin_weight.shape[0])
            sums = [
                x.where(side, 0).sum()
                for x in (logps, logits, self.beta * (logps - ref_logps))
                for side in (preference_labels, ~preference_labels)
            ]
        return out.loss, tuple(sums)


class LinearJSDLoss(_Loss):
    """Distillation from a teacher by a generalised Jensen–Shannon divergence, called as ``LigerFusedLinearJSDLoss``.

    Equal to ``weight_hard_loss`` times the mean cross-entropy of the labels plus ``weight_soft_loss`` times the mean
    divergence of :func:`prefcore.linear_divergence`, over the rows with labels.

    Args:
        weight_hard_loss, weight_soft_loss: of the two terms.
        beta: share of the teacher in the mixture m: beta·KL(teacher‖m) + (1 - beta)·KL(student‖m). 0 is
            KL(teacher‖student), 1 is KL(student‖teacher).
        ignore_index: of the labels that do not count.
        temperature: of the divergence; the cross-entropy's is 1. Where they differ, the student's head is computed once
            more for it.
        compiled, chunk_size: without effect.
        return_soft_hard_loss: whether to return the two terms as well.

    Raises:
        ValueError: a ``beta`` outside [0, 1]; a ``temperature`` that is not positive.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {beta}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.beta = beta
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss; with ``return_soft_hard_loss`` also its two terms before the weights, detached.

        Args:
            student_input: ``[T, D]`` or ``[N, L, D]``, float32, float64, bfloat16 or float16.
            student_weight: ``[V, D]``.
            teacher_input, teacher_weight: ``[T, E]`` (or ``[N, L, E]``) and ``[V, E]``, without gradient. E may differ
                from D, and the type of ``teacher_input`` from that of ``student_input``, where both sides are computed
                in the wider. With more tokens than the student's, padding, the divergence is that of Liger: there the
                student's logits are 0, which costs a copy of its head.
            true_labels: ``[T]`` or ``[N, L]`` int64.
            student_bias, teacher_bias: ``[V]``.
        """
        for name, value in (
            ("student_weight", student_weight),
            ("teacher_weight", teacher_weight),
            ("true_labels", true_labels),
        ):
            check_tensor(name, value)
        for name, value in (("student_input", student_input), ("teacher_input", teacher_input)):
            check_tensor(name, value)
            if value.ndim not in (2, 3) or value.shape[:-1] != true_labels.shape:
                raise ValueError(f"expected {name} {[*true_labels.shape, 'D']} as the labels, got {list(value.shape)}")
        padding = teacher_weight.shape[0] - student_weight.shape[0]
        if padding < 0:
            raise ValueError(
                f"expected a teacher of at least the student's {student_weight.shape[0]} tokens, got "
                f"{teacher_weight.shape[0]}"
            )
        student_input, teacher_input = student_input.flatten(0, -2), teacher_input.flatten(0, -2)
        true_labels = true_labels.flatten()
        valid = true_labels != self.ignore_index
        rows, labels = valid.nonzero().squeeze(1).to(torch.int32), true_labels[valid]
        student, teacher = gather_rows(student_input, rows), gather_rows(teacher_input.detach(), rows)
        hard = self.weight_hard_loss != 0 or self.return_soft_hard_loss
        shared = hard and self.temperature == 1 and not padding
        kind: Kind = "kl_qp" if self.beta == 0 else "kl_pq" if self.beta == 1 else "js"
        share = 1 - self.beta if kind == "js" else None  # of p, the student
        p: list[Any] = [student, student_weight, student_bias]
        q: list[Any] = [x if x is None else x.detach() for x in (teacher, teacher_weight, teacher_bias)]
        if student.dtype != teacher.dtype:
            dtype = torch.promote_types(student.dtype, teacher.dtype)
            p, q = ([side[0].to(dtype), *side[1:]] for side in (p, q))
            p[1:], q[1:] = _beside(p[0], *p[1:]), _beside(q[0], *q[1:])
        if padding:
            p[1:] = [x if x is None else pad(x, (0, 0) * (x.ndim - 1) + (0, padding)) for x in p[1:]]
        pair = linear_divergence(
            p[0], p[1], q[0], q[1], labels if shared else None, kind=kind, beta=share, bias=p[2], other_bias=q[2],
            temperature=self.temperature,
        )  # fmt: skip
        count = max(len(labels), 1)
        soft_loss = pair.divergence.sum() / count
        loss = self.weight_soft_loss * soft_loss
        hard_loss = torch.zeros_like(soft_loss)
        if hard:
            logps = pair.logps
            if logps is None:
                logps = linear_logprobs(student, student_weight, labels, bias=student_bias).logps
            hard_loss = -logps.sum() / count
            loss = loss + self.weight_hard_loss * hard_loss
        return (loss, soft_loss.detach(), hard_loss.detach()) if self.return_soft_hard_loss else loss


_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_GRPO = (*_CLIPPED, "cispo", "sapo", "vespo")
_CLAMP = 80.0


class LinearGRPOLoss(_Loss):
    """GRPO and its kin of hidden states and a head, called as ``LigerFusedLinearGRPOLoss``: ``_input`` first.

    Equal to the losses of :mod:`prefcore.losses` of that name (:func:`~prefcore.losses.gspo`'s ratios with
    ``importance_sampling_level="sequence"``) of the tokens that the mask keeps, aggregated as ``loss_type`` has it.
    Log-ratios are held at ±80, beyond which they have no gradient; Liger's exponentials overflow at 89.

    | loss_type | |
    | --- | --- |
    | ``grpo``, ``sapo`` | mean over sequences of the mean over tokens |
    | ``bnpo`` | mean over the batch's tokens |
    | ``dapo``, ``cispo``, ``vespo`` | sum over tokens / the ranks' mean number of tokens |
    | ``dr_grpo`` | sum over tokens / (sequences · ``max_completion_length``) |
    | ``luspo`` | mean over sequences of the sum over tokens |

    Args:
        beta: of the KL term, k3 of the reference's log-probs.
        compiled, chunk_size: without effect.
        use_ref_model: False leaves the KL term out, whatever is given.
        epsilon_low, epsilon_high: ratios are clipped to [1 - epsilon_low, 1 + epsilon_high], of ``cispo`` to at most
            epsilon_high; ``sapo`` and ``vespo`` have no clip.
        loss_type: one of the table's.
        max_completion_length: for ``dr_grpo`` alone.
        importance_sampling_level: ``token``, or ``sequence`` for the types that clip, but ``cispo``.
        sapo_temperature_pos, sapo_temperature_neg: of ``sapo`` alone, positive.
        temperature: of the logits, the reference's too.
        delta: bound of the ratio before the clip, at least 1, for the types that clip, but ``cispo``.
        use_bias_correction_kl: the KL term times the ratio, the sequence's where ratios are theirs.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of ``vespo`` alone.

    Raises:
        ValueError: another ``loss_type`` or level, the two not going together, or a number out of range.
        NotImplementedError: ``delta`` below 1; ``luspo`` with ratios of tokens (in Liger a mean over padding too).
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        if loss_type not in _GRPO:
            raise ValueError(f"loss_type must be one of {_GRPO}, got {loss_type!r}")
        if importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level must be 'token' or 'sequence', got {importance_sampling_level!r}"
            )
        positive = {"sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg}
        for name, value in {**positive, "delta": 1.0 if delta is None else delta}.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        clipped = loss_type in _CLIPPED
        if importance_sampling_level == "sequence":
            if not clipped:
                raise ValueError(f"importance_sampling_level='sequence' does not go with loss_type={loss_type!r}")
        elif loss_type == "luspo":
            raise NotImplementedError("loss_type='luspo' with importance_sampling_level='token'")
        if delta is not None and clipped and delta < 1:
            raise NotImplementedError(f"delta below 1, got {delta}")
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The loss, and detached metrics.

        Args:
            _input: ``[N, L, D]``, float32, float64, bfloat16 or float16.
            lin_weight: ``[V, D]``.
            selected_token_ids: ``[N, L]`` int64, the token that each row predicts.
            attention_mask: ``[N, L]``, zero where a token does not count; another value counts as 1.
            advantages: ``[N]``.
            bias: ``[V]``.
            ref_per_token_logps: ``[N, L]`` under the reference; without them they are made of ``ref_input``
                ``[N, L, E]``, ``ref_weight`` ``[V, E]`` and ``ref_bias`` ``[V]``, types as of the policy's.
            old_per_token_logps: ``[N, L]`` under the policy that sampled; None for the policy itself.
            vllm_is_ratio: ``[N]``, ``[N, 1]`` or ``[N, L]``, factors of the loss before the KL term; of ``vespo``
                factors of the sequence's ratio, those of masked tokens left out.
            num_items_in_batch: number of tokens of the whole step on all ranks, for ``dapo``, ``cispo`` and ``vespo``;
                without it these reduce this batch's number over the ranks of ``torch.distributed``.

        Returns:
            The loss, 0-dim; and, 0-dim each, the mean KL term over tokens if ``beta`` is not 0, and the share of tokens
            whose ratio was clipped.

        Raises:
            NotImplementedError: ``luspo`` with a KL term, which in Liger is a mean over padding too.
        """
        _check_batch(_input, selected_token_ids)
        lin_weight, bias = _beside(_input, lin_weight, bias)
        n, width = selected_token_ids.shape
        for name, given in (
            ("attention_mask", attention_mask),
            ("ref_per_token_logps", ref_per_token_logps),
            ("old_per_token_logps", old_per_token_logps),
        ):
            if given is not None and given.shape != (n, width):
                raise ValueError(f"expected {name} [{n}, {width}], got {list(given.shape)}")
        if advantages.shape != (n,):
            raise ValueError(f"expected advantages [{n}], got {list(advantages.shape)}")
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length")
        mask = attention_mask != 0
        order = torch.arange(n, device=mask.device)
        batch = _Responses.find(selected_token_ids.where(mask, -100), order, -100, average=False)
        tokens = batch.cu_seqlens[-1]
        ref = self._reference(batch, mask, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        wide = torch.promote_types(_input.dtype, torch.float32)
        old = None if old_per_token_logps is None else old_per_token_logps.detach()[mask].to(wide)
        ref = None if ref is None else ref.to(wide)
        is_ratio = None if vllm_is_ratio is None else self._is_ratio(vllm_is_ratio.detach(), mask)
        advantages = advantages.detach()
        means = self.loss_type in ("grpo", "sapo")

        def loss_fn(stats: TokenStats, tile: Tile) -> Tensor:
            at = tile.tokens
            old_logps, ref_logps = (None if x is None else x[at] for x in (old, ref))
            if self.importance_sampling_level == "sequence":
                before = stats.logps.detach() if old_logps is None else old_logps
                log_ratios = sequence_reduce(stats.logps - before, tile.cu_seqlens, "mean")
                terms = {} if is_ratio is None else {"weights": is_ratio[tile.sequences]}
                values = self._clipped(log_ratios, torch.zeros_like(log_ratios), advantages[tile.sequences], **terms)
                lengths = tile.cu_seqlens.diff()
                values = values * (lengths.clamp(max=1) if means else lengths)
                if ref_logps is None:
                    return values
                kl = self.beta * losses.kl_loss(stats.logps, ref_logps, clamp=_CLAMP)
                kl = sequence_reduce(kl, tile.cu_seqlens, "mean" if means else "sum")
                if self.use_bias_correction_kl:
                    kl = kl * log_ratios.clamp(-_CLAMP, _CLAMP).exp()
                return values + kl
            per_token = self._token_losses(
                stats.logps, old_logps, advantages[tile.sequences], tile.cu_seqlens, ref_logps,
                None if is_ratio is None else is_ratio[at],
            )  # fmt: skip
            return sequence_reduce(per_token, tile.cu_seqlens, "mean" if means else "sum")

        out = linear_loss(
            batch.hidden(_input), lin_weight, batch.targets, batch.host_seqlens, loss_fn, bias=bias,
            temperature=self.temperature, normalizer=self._normalizer(n, tokens, num_items_in_batch),
        )  # fmt: skip
        return out.loss, self._metrics(out.stats.logps, old, ref, advantages, batch.cu_seqlens)

    def _reference(
        self,
        batch: _Responses,
        mask: Tensor,
        logps: Tensor | None,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor | None:
        """``[T]``, or None where there is no KL term."""
        if not self.use_ref_model:
            return None
        if logps is None and (hidden is None or weight is None):
            raise ValueError("use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight")
        if self.beta == 0:
            return None
        if self.loss_type == "luspo":
            raise NotImplementedError("loss_type='luspo' with a KL term; beta=0 leaves it out")
        if logps is not None:
            return logps.detach()[mask]
        weight, bias = _beside(hidden, weight, bias)
        return batch.reference(hidden, weight, bias, mask, self.temperature)

    def _is_ratio(self, ratio: Tensor, mask: Tensor) -> Tensor:
        """Of tokens ``[T]``, or of sequences ``[N]`` where their ratios are."""
        n, width = mask.shape
        if ratio.shape not in ((n,), (n, 1), (n, width)):
            raise ValueError(f"expected vllm_is_ratio [{n}], [{n}, 1] or [{n}, {width}], got {list(ratio.shape)}")
        ratio = ratio.view(n, -1)
        if self.importance_sampling_level == "token":
            if self.loss_type == "vespo" and ratio.shape[1] == 1 and width != 1:
                # A sequence's ratio counts once, as that of its first token.
                first = mask & (mask.cumsum(1) == 1)
                return ratio.expand(n, width).where(first, 1)[mask]
            return ratio.expand(n, width)[mask]
        if self.loss_type == "luspo":  # its mean is over padding too
            return ratio.mean(1)
        return (ratio * mask).sum(1) / mask.sum(1).clamp(min=1)

    def _token_losses(
        self,
        logps: Tensor,
        old_logps: Tensor | None,
        advantages: Tensor,
        cu_seqlens: Tensor,
        ref_logps: Tensor | None,
        is_ratio: Tensor | None,
    ) -> Tensor:
        terms: dict[str, Any] = {"cu_seqlens": cu_seqlens}
        if ref_logps is not None:
            kl = "k3_corrected" if self.use_bias_correction_kl else "k3"
            terms |= {"ref_logps": ref_logps, "beta": self.beta, "kl": kl}
        if is_ratio is not None:
            terms["rollout_weights" if self.loss_type == "vespo" else "weights"] = is_ratio
        if self.loss_type in _CLIPPED:
            return self._clipped(logps, old_logps, advantages, **terms)
        terms["clamp"] = _CLAMP
        if self.loss_type == "cispo":
            return losses.cispo(logps, old_logps, advantages, high=self.epsilon_high, **terms).losses
        if self.loss_type == "sapo":
            terms |= {"tau_pos": self.sapo_temperature_pos, "tau_neg": self.sapo_temperature_neg}
            return losses.sapo(logps, old_logps, advantages, **terms).losses
        terms |= {"k_pos": self.vespo_k_pos, "lam_pos": self.vespo_lambda_pos}
        terms |= {"k_neg": self.vespo_k_neg, "lam_neg": self.vespo_lambda_neg}
        return losses.vespo(logps, old_logps, advantages, **terms).losses

    def _clipped(self, logps: Tensor, old_logps: Tensor | None, advantages: Tensor, **terms: Any) -> Tensor:
        high, delta = self.epsilon_high, self.delta
        if delta is not None and delta < 1 + high:
            # Then delta is what holds a positive advantage's ratio, the clip a negative one's.
            high, delta = delta - 1, 1 + high
        return losses.grpo(
            logps, old_logps, advantages, eps=self.epsilon_low, eps_high=high, dual_clip=delta, clamp=_CLAMP, **terms
        ).losses

    def _normalizer(self, n: int, tokens: Tensor, num_items: float | Tensor | None) -> float | Tensor:
        if self.loss_type == "dr_grpo":
            return float(n * (self.max_completion_length or 0))
        if self.loss_type in ("grpo", "sapo", "luspo"):
            return float(n)
        count = tokens.to(torch.float32)
        if self.loss_type != "bnpo":
            ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
            if num_items is not None:
                count = torch.as_tensor(num_items, dtype=torch.float32, device=tokens.device)
            elif ranks > 1:
                dist.all_reduce(count)
            count = count / ranks
        return count.clamp(min=1)

    @torch.no_grad()
    def _metrics(
        self, logps: Tensor, old: Tensor | None, ref: Tensor | None, advantages: Tensor, cu_seqlens: Tensor
    ) -> Metrics:
        lengths = cu_seqlens.diff()
        count = cu_seqlens[-1].clamp(min=1)
        ratios = torch.zeros_like(logps) if old is None else logps - old
        if self.importance_sampling_level == "sequence":
            ratios = sequence_reduce(ratios, cu_seqlens, "mean").repeat_interleave(lengths, output_size=len(logps))
        ratios = ratios.clamp(-_CLAMP, _CLAMP).exp()
        metrics = []
        if self.beta != 0:
            kl = torch.zeros_like(logps)
            if ref is not None:
                gap = (ref - logps).clamp(-_CLAMP, _CLAMP)
                kl = (gap.expm1() - gap) * (ratios if self.use_bias_correction_kl else 1)
            metrics.append(kl.sum() / count)
        sign = advantages.repeat_interleave(lengths, output_size=len(logps))
        if self.loss_type in ("sapo", "vespo"):
            clipped = torch.zeros_like(sign, dtype=torch.bool)
        elif self.loss_type == "cispo":
            clipped = (ratios > self.epsilon_high) & (sign > 0)
        else:
            clipped = ((ratios < 1 - self.epsilon_low) & (sign < 0)) | ((ratios > 1 + self.epsilon_high) & (sign > 0))
        return (*metrics, clipped.sum() / count)
