"""Generalised advantage estimation over packed sequences: one reverse scan."""

from __future__ import annotations

import torch
from torch import Tensor

from prefcore import _native, reference
from prefcore._impl import Impl, resolve
from prefcore._types import GAE
from prefcore.ops import _checks
from prefcore.ops._register import register_ragged


def gae(
    rewards: Tensor,
    values: Tensor | None,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    impl: Impl = "auto",
) -> GAE:
    r"""Advantages and λ-returns of every token, from the end of each sequence to its beginning, in one launch.

    Equal to ``delta = r + gamma * V_next - V``, ``A = delta + gamma * lam * A_next`` and ``G = A + V`` (Schulman et
    al., High-Dimensional Continuous Control Using Generalized Advantage Estimation, 2015). With ``lam=1`` the
    returns are the discounted sums of the rewards to come; without values so are the advantages.

    The scan runs in float64 for either dtype by a fixed tree. A result is exact to within one rounding and
    :math:`(3n + 64)\,2^{-53}` times the same scan of magnitudes, where n is the sequence's number of tokens: for
    float32 about one rounding, whatever the length. It has the same bits on the CPU, on a GPU, and in any batch.

    Args:
        rewards: ``[T]`` float32 or float64, the sequences one after another.
        values: ``[T]`` in the rewards' dtype, V of the state before each token; None: all zero.
        cu_seqlens: ``[S + 1]`` int32 offsets into ``rewards``, from 0 to T, on their device. Sequences may be empty.
        gamma, lam: discount and λ, numbers in [0, 1].
        mask: ``[T]`` bool, the tokens that count. The others (of a tool, of the environment) are stepped over, as if
            the sequence had been packed without them: they take no discount, nobody reads their reward and value,
            and they get exact zeros. None: all count.
        bootstrap: ``[S]`` in the rewards' dtype, V behind the last token, of rows that were cut off; None: 0.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"cuda"``.

    Returns:
        ``GAE(advantages, returns)``, ``[T]`` each in the rewards' dtype. They are constants of a loss: no gradient
        comes back through them.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: shapes, dtypes, devices or values other than these. The values of ``cu_seqlens`` on a GPU are
            checked where ``PREFCORE_CHECK=1`` is in the environment.

    Example:
        >>> import torch, prefcore
        >>> rewards, values = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 0.5, 0.25])
        >>> cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32)
        >>> prefcore.gae(rewards, values, cu_seqlens, gamma=1, lam=0.5).advantages.tolist()
        [0.125, 0.25, 0.5, 0.75]
    """
    _checks.check_ragged("rewards", rewards, cu_seqlens)
    _check_like("values", values, rewards, rewards.shape[0], rewards.dtype)
    _check_like("mask", mask, rewards, rewards.shape[0], torch.bool)
    _check_like("bootstrap", bootstrap, rewards, cu_seqlens.shape[0] - 1, rewards.dtype)
    for name, value in (("gamma", gamma), ("lam", lam)):
        _checks.check_number(name, value)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    chosen = resolve(impl, "gae", rewards.device)
    if chosen == "reference":
        _checks.check_reference_offsets("cu_seqlens", cu_seqlens, rewards.shape[0])
        return reference.gae(rewards, values, cu_seqlens, gamma=gamma, lam=lam, mask=mask, bootstrap=bootstrap)
    given = (None if x is None else x.detach() for x in (rewards, values, cu_seqlens, mask, bootstrap))
    return GAE(*_GAE[chosen](*given, float(gamma), float(lam)))


def _check_like(name: str, value: Tensor | None, rewards: Tensor, size: int, dtype: torch.dtype) -> None:
    if value is None:
        return
    _checks.check_tensor(name, value)
    if value.shape != (size,):
        raise ValueError(f"{name} must have shape {[size]}, got {list(value.shape)}")
    if value.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {value.dtype}")
    if value.device != rewards.device:
        raise ValueError(f"{name} must be on the rewards' device {rewards.device}, got {value.device}")


def _fake(
    rewards: Tensor,
    values: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape[0]), rewards.new_empty(rewards.shape[0])


def _launch(
    rewards: Tensor,
    values: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    device, total = rewards.device, rewards.shape[0]
    if _checks.check_values(device):
        _checks.check_offset_values("cu_seqlens", cu_seqlens, total)
    # The list keeps copies alive until the kernel is launched.
    inputs = [None if x is None else x.contiguous() for x in (rewards, values, mask, bootstrap, cu_seqlens)]
    advantages, returns = rewards.new_empty(total), rewards.new_empty(total)
    where: tuple[int, ...]
    if device.type == "cuda":
        where = (total, rewards.get_device(), torch.cuda.current_stream(device).cuda_stream)
    else:
        where = (torch.get_num_threads(),)
    getattr(_native.require(), f"gae_{device.type}")(
        rewards.element_size(),
        *(0 if x is None else x.data_ptr() for x in inputs),
        cu_seqlens.shape[0] - 1,
        gamma,
        lam,
        advantages.data_ptr(),
        returns.data_ptr(),
        *where,
    )
    return advantages, returns


_GAE = register_ragged(
    "gae",
    "(Tensor rewards, Tensor? values, Tensor cu_seqlens, Tensor? mask, Tensor? bootstrap, float gamma, float lam)"
    " -> (Tensor, Tensor)",
    _launch,
    _fake,
)
