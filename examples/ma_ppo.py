"""MA-PPO beside PPO: credit for macro actions of a few tokens, where one reward comes at the very end.

Both see the same task, the same start and the same number of answers; they differ in the steps of GAE alone.
A macro action of n tokens brings the end n times closer, so that with lam < 1 more of the reward reaches the early
tokens.
"""

import copy

import _common as common
import torch
import transformers

import prefcore
from prefcore import advantages
from prefcore.data import pack
from prefcore.losses import policy

PROMPTS, EPOCHS, VALUE_COEF, GAMMA, LAM, NGRAM = 64, 2, 0.1, 1.0, 0.8, 4


def train(run: common.Run, name: str, task: common.Sorting, model, steps: int) -> None:
    transformers.set_seed(run.args.seed)  # the same prompts for both
    actor = common.ActorCritic(model)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=5e-4, weight_decay=0.0)

    for step in range(steps):
        prompts = [task.prompt() for _ in range(PROMPTS)]
        responses = common.rollout(actor.model, task, prompts, samples=1)
        batch = pack(prompts, responses)
        total = batch.targets.shape[0]
        scores = task.scores(prompts, responses)  # [S]
        rewards = torch.zeros(total).index_add(0, batch.cu_seqlens[1:] - 1, scores)  # [T], all at the last token

        with torch.no_grad():
            old_logps, old_values = actor(batch)
        if name == "MA-PPO":
            starts = advantages.ngram_starts(batch.cu_seqlens, total, NGRAM)
            out = advantages.macro_gae(rewards, old_values, batch.cu_seqlens, starts, gamma=GAMMA, lam=LAM)
        else:
            out = prefcore.gae(rewards, old_values, batch.cu_seqlens, gamma=GAMMA, lam=LAM)
        advantage = advantages.whiten(out.advantages)

        for _ in range(EPOCHS):
            logps, values = actor(batch)
            terms = policy.ppo(logps, old_logps, advantage, eps=0.2)
            value_terms = policy.ppo_value(values, old_values, out.returns, eps_v=0.2)
            losses = terms.losses + VALUE_COEF * value_terms.losses
            optimizer.zero_grad()
            prefcore.aggregate(losses, batch.cu_seqlens, "token_mean").backward()
            torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            optimizer.step()
        run.log(step, run=name, reward=scores.mean())


def main() -> None:
    args = common.arguments("ma_ppo", __doc__)
    run, task, start = common.Run(args), common.Sorting(lines=3, width=3), common.new_model()
    common.warm_up(start, task, steps=5 if args.smoke else 300)
    for name in ("PPO", "MA-PPO"):
        train(run, name, task, copy.deepcopy(start), steps=3 if args.smoke else 100)
        run.verdict(name, least=0.2)
    run.draw()


if __name__ == "__main__":
    main()
