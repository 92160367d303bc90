"""PPO on tokens with rewards for segments: each line of an answer is judged where it ends.

A reward model of segments, as in Fine-Grained RLHF, tells which line was right, which one number for the whole answer
cannot. A small value head on the model's own hidden states is the baseline; GAE carries rewards back to the tokens.
"""

import copy

import _common as common
import torch

import prefcore
from prefcore import advantages
from prefcore.data import pack
from prefcore.hf import token_logps
from prefcore.losses import policy

PROMPTS, EPOCHS, KL_COEF, VALUE_COEF = 64, 2, 0.01, 0.1


def main() -> None:
    args = common.arguments("ppo_segments", __doc__)
    run, task, model = common.Run(args), common.Sorting(lines=3, width=3), common.new_model()
    common.warm_up(model, task, steps=5 if args.smoke else 300)
    reference, actor = copy.deepcopy(model), common.ActorCritic(model)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=5e-4, weight_decay=0.0)

    for step in range(3 if args.smoke else 100):
        prompts = [task.prompt() for _ in range(PROMPTS)]
        responses = common.rollout(actor.model, task, prompts, samples=1)
        batch = pack(prompts, responses)  # T tokens of S responses
        segments = [r for p, group in zip(prompts, responses, strict=True) for r in task.line_rewards(p, group[0])]
        segments = torch.tensor(segments)  # [T], not 0 where a right line ends

        with torch.no_grad():
            old_logps, old_values = actor(batch)
            rewards = segments - KL_COEF * (old_logps - token_logps(reference, batch))
        advantage, returns = prefcore.gae(rewards, old_values, batch.cu_seqlens, gamma=1.0, lam=0.95)
        advantage = advantages.whiten(advantage)

        for _ in range(EPOCHS):
            logps, values = actor(batch)
            terms = policy.ppo(logps, old_logps, advantage, eps=0.2)
            value_terms = policy.ppo_value(values, old_values, returns, eps_v=0.2)
            losses = terms.losses + VALUE_COEF * value_terms.losses
            optimizer.zero_grad()
            prefcore.aggregate(losses, batch.cu_seqlens, "token_mean").backward()
            torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            optimizer.step()

        value_error = (old_values - returns).square().mean()
        clipped = terms.stats.means()["clipped_low"] + terms.stats.means()["clipped_high"]
        run.log(step, reward=segments.sum() / PROMPTS, value_error=value_error, clipped=clipped)

    run.verdict(least=0.3)
    run.draw()


if __name__ == "__main__":
    main()
