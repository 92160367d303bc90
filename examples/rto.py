"""RTO: DPO learns from comparisons, then PPO takes its log-ratios as a reward for every token.

First DPO compares answers of the starting model: the one with more right lines is preferred. What it has learned about
single tokens, b1·(dpo − ref), then guides PPO, beside a KL penalty, b2·(policy − ref), and the score at the end, b3·R.
"""

import copy

import _common as common
import torch
import transformers

import prefcore
from prefcore import advantages
from prefcore.data import pack
from prefcore.hf import response_logps, token_logps
from prefcore.losses import dpo, policy
from prefcore.rewards import rto_reward

PROMPTS, EPOCHS, VALUE_COEF = 64, 2, 0.1
# With b1 = b2 the best policy is proportional to dpo·exp(b3·R/b2). A greater b1 is a higher power of dpo/ref, and that
# ratio means little at tokens that the reference hardly ever writes: with 0.1 and 0.01 the score of seed 0 ends at 0.64
# instead of 0.87.
BETA, B1, B2, B3 = 0.5, 0.05, 0.05, 1.0


def prefer(task: common.Sorting, prompt: common.Ids, pair: list[common.Ids]) -> list[common.Ids]:
    """The better answer first; which one is, of equally good ones, is chance."""
    return sorted(pair, key=lambda answer: task.score(prompt, answer), reverse=True)


def train_dpo(run: common.Run, task: common.Sorting, reference, steps: int):
    model = copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    for step in range(steps):
        prompts = [task.prompt() for _ in range(PROMPTS)]
        answers = common.rollout(reference, task, prompts, samples=2)
        batch = pack(prompts, [prefer(task, prompt, pair) for prompt, pair in zip(prompts, answers, strict=True)])
        with torch.no_grad():
            ref_chosen, ref_rejected = response_logps(reference, batch).view(-1, 2).unbind(1)
        chosen, rejected = response_logps(model, batch).view(-1, 2).unbind(1)
        optimizer.zero_grad()
        dpo(chosen, rejected, ref_chosen, ref_rejected, beta=BETA).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        own = common.rollout(model, task, prompts, samples=1)
        run.log(step, run="DPO", reward=task.scores(prompts, own).mean())
    return model


def train_ppo(run: common.Run, name: str, task: common.Sorting, reference, dpo_model, b1: float, steps: int) -> None:
    transformers.set_seed(run.args.seed)  # the same prompts for both
    actor = common.ActorCritic(copy.deepcopy(reference))
    optimizer = torch.optim.AdamW(actor.parameters(), lr=5e-4, weight_decay=0.0)

    for step in range(steps):
        prompts = [task.prompt() for _ in range(PROMPTS)]
        responses = common.rollout(actor.model, task, prompts, samples=1)
        batch = pack(prompts, responses)
        scores = task.scores(prompts, responses)  # [S]

        with torch.no_grad():
            old_logps, old_values = actor(batch)
            ref_logps, dpo_logps = token_logps(reference, batch), token_logps(dpo_model, batch)
        rewards = rto_reward(scores, dpo_logps, old_logps, ref_logps, batch.cu_seqlens, b1=b1, b2=B2, b3=B3)  # [T]
        advantage, returns = prefcore.gae(rewards, old_values, batch.cu_seqlens, gamma=1.0, lam=0.95)
        advantage = advantages.whiten(advantage)

        for _ in range(EPOCHS):
            logps, values = actor(batch)
            terms = policy.rto(logps, old_logps, advantage, eps=0.2)
            value_terms = policy.ppo_value(values, old_values, returns, eps_v=0.2)
            losses = terms.losses + VALUE_COEF * value_terms.losses
            optimizer.zero_grad()
            prefcore.aggregate(losses, batch.cu_seqlens, "token_mean").backward()
            torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            optimizer.step()
        run.log(step, run=name, reward=scores.mean())


def main() -> None:
    args = common.arguments("rto", __doc__)
    run, task, start = common.Run(args), common.Sorting(lines=3, width=3), common.new_model()
    common.warm_up(start, task, steps=5 if args.smoke else 300)
    dpo_model = train_dpo(run, task, start, steps=3 if args.smoke else 60)
    run.verdict("DPO", least=0.1)
    for name, b1 in (("PPO", 0.0), ("RTO", B1)):
        train_ppo(run, name, task, start, dpo_model, b1, steps=3 if args.smoke else 60)
        run.verdict(name, least=0.3)
    run.draw()


if __name__ == "__main__":
    main()
