"""TRL's ``GRPOTrainer`` on packed rows: a prompt runs once for its group."""

from __future__ import annotations

from typing import Any

import torch
import trl
from torch import Tensor

from prefcore.trl._packed import PackedTrainer, refuse_images


class GRPOTrainer(PackedTrainer, trl.GRPOTrainer):
    """``trl.GRPOTrainer`` whose forward passes run packed: those of the policy, of the policy that sampled and of the
    reference. Each prompt runs once for the responses of its group, nothing is padded, and only completion tokens
    meet the head.

    Losses, advantages, sampling and metrics are TRL's own code. TRL shuffles what was generated before it divides it
    into micro-batches, which scatters the groups. Here the rows of one step of the optimizer are put in order again:
    those of one prompt lie together, in micro-batches of the same size, so that they share what
    ``per_device_train_batch_size`` lets them. No row changes its step, and where a row's weight does not depend on the
    others of its micro-batch the step's gradient is the same: with the ``loss_type`` ``"grpo"``, ``"dapo"``,
    ``"dr_grpo"``, ``"luspo"``, ``"sapo"``, ``"cispo"`` and ``"vespo"``. What is normalised in each of several
    micro-batches follows their composition, as it does under TRL's shuffling: the loss of ``"bnpo"``, a mean over a
    micro-batch's tokens, the entropy bonus, the threshold of ``top_entropy_quantile``, the routers' loss, and the
    logged means. Where neither of ``steps_per_generation`` and ``gradient_accumulation_steps`` divides the other, TRL's
    order is kept.

    What differs from TRL's forward: positions count the tokens that are attended to, which matters to learned
    positions beside padding on the left; dropout, where it is on, draws once for a shared prompt; and the loss of
    a mixture of experts' routers counts each distinct prompt of a micro-batch once and leaves out rows without a
    completion token, where TRL's counts every copy.

    Args:
        *args, **kwargs: as ``trl.GRPOTrainer`` has them.

    Raises:
        NotImplementedError: images, FSDP, ZeRO-3, torch_compile, prompt learning, and heads and attention that prefcore
            does not run.
    """

    _buffered_inputs: Any  # TRL's own

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_images(self.train_dataset)
        self.pack_models(("entropy",), temperature=self.temperature, float32_head=self.args.cast_lm_head_to_fp32)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        buffered = self._buffered_inputs
        if not self.model.training or buffered is None or buffered is before:
            return inputs
        self._buffered_inputs = together(buffered, self.args.gradient_accumulation_steps)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]


def together(batches: list[dict[str, Any]], accumulation: int) -> list[dict[str, Any]]:
    """Micro-batches of the same rows and sizes, where rows of one prompt lie together.

    Args:
        batches: of one generation, with ``prompt_ids`` and ``prompt_mask`` ``[B, P]``, and tensors and lists of B rows.
        accumulation: micro-batches to a step of the optimizer; rows stay within them.
    """
    steps = len(batches)
    if accumulation % steps == 0:
        accumulation = steps  # a step holds whole generations
    if steps % accumulation:
        return batches
    made: list[dict[str, Any]] = []
    for start in range(0, steps, accumulation):
        made += _sorted(batches[start : start + accumulation])
    return made


def _sorted(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    prompts: dict[tuple[bytes, bytes], int] = {}  # numbered as they first appear
    keys: list[int] = []
    for batch in batches:
        columns = (batch[name].cpu().numpy() for name in ("prompt_ids", "prompt_mask"))
        for ids, mask in zip(*columns, strict=True):
            keys.append(prompts.setdefault((ids.tobytes(), mask.tobytes()), len(prompts)))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    size = len(batches[0]["prompt_ids"])
    columns_of = {name: _rows([batch[name] for batch in batches], order) for name in batches[0]}
    return [
        {
            name: value[start : start + size] if name_has_rows else value
            for name, (value, name_has_rows) in columns_of.items()
        }
        for start in range(0, len(order), size)
    ]


def _rows(parts: list[Any], order: list[int]) -> tuple[Any, bool]:
    """All rows of a column in their new order; and whether it has rows, or one value for all."""
    first = parts[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(parts)[torch.tensor(order, device=first.device)], True
    if isinstance(first, list):
        joined = [value for part in parts for value in part]
        return [joined[i] for i in order], True
    return first, False
