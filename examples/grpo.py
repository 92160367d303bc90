"""GRPO: a rule says whether an answer is right, and a group of samples is its own baseline.

Rollouts come from transformers' ``generate``. A prompt goes through the model once for all its samples, and head and
loss run together, so that no logits of the batch ever exist.
"""

import copy

import _common as common
import torch

import prefcore
from prefcore import advantages
from prefcore.data import pack
from prefcore.hf import find_head, token_logps
from prefcore.hf.scoring import run_backbone
from prefcore.losses import policy

PROMPTS, SAMPLES, EPOCHS = 16, 8, 2


def main() -> None:
    args = common.arguments("grpo", __doc__)
    run, task, model = common.Run(args), common.Sorting(lines=1, width=4), common.new_model()
    common.warm_up(model, task, steps=5 if args.smoke else 300)
    reference = copy.deepcopy(model)
    head = find_head(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)

    for step in range(3 if args.smoke else 100):
        prompts = [task.prompt() for _ in range(PROMPTS)]
        responses = common.rollout(model, task, prompts, SAMPLES)
        rewards = torch.tensor([task.reward(p, r) for p, group in zip(prompts, responses, strict=True) for r in group])

        batch = pack(prompts, responses)  # T tokens of S responses in G groups
        advantage = advantages.grpo(rewards, batch.cu_groups)  # [S]
        with torch.no_grad():
            old_logps, ref_logps = token_logps(model, batch), token_logps(reference, batch)  # [T]

        def loss_fn(stats, tile, old_logps=old_logps, ref_logps=ref_logps, advantage=advantage):
            terms = policy.grpo(
                stats.logps,
                old_logps[tile.tokens],
                advantage[tile.sequences],
                cu_seqlens=tile.cu_seqlens,
                ref_logps=ref_logps[tile.tokens],
                beta=0.01,
            )
            return prefcore.sequence_reduce(terms.losses, tile.cu_seqlens, "mean")  # the mean of S losses is GRPO's

        for _ in range(EPOCHS):
            hidden = prefcore.gather_rows(run_backbone(head, batch).states, batch.rows.int())  # [T, D]
            out = prefcore.linear_loss(
                hidden, head.weight, batch.targets, batch.cu_seqlens, loss_fn, cu_groups=batch.cu_groups
            )
            optimizer.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        kl = prefcore.aggregate(policy.kl_loss(out.stats.logps, ref_logps), batch.cu_seqlens, "token_mean")
        run.log(step, reward=rewards.mean(), kl=kl)

    run.verdict(least=0.3)
    run.draw()


if __name__ == "__main__":
    main()
