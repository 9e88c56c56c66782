"""SPO, MPO, RRPO and SRPO on verl (Ray, FSDP or Megatron, vLLM or SGLang): which function of the
scripts goes where. What is registered here, and the rows that agent loops make, are compared with
the scripts' functions on tensors (tests/test_verl.py, verl 0.9.1 on a CPU). A training run of verl
was NOT made: that takes GPUs.

    export PYTHONPATH=.:tutorials VERL_USE_EXTERNAL_MODULES=verl_adapter
    python -m verl.trainer.main_ppo ...     with, beside verl's own settings,

    algorithm.adv_estimator=                    "given": advantages made with the rollouts (SPO,
                                                resets); "grpo_population": MPO's
    actor_rollout_ref.actor.policy_loss.loss_mode=blocks       K tokens share a ratio; K = 1: PPO's
    actor_rollout_ref.actor.loss_agg_mode=      "token-mean", a sum over Z (SPO, MPO);
                                                "seq-mean-token-mean", a mean per rollout (resets)
    actor_rollout_ref.rollout.agent.default_agent_loop=        spo_chain or resets
    actor_rollout_ref.rollout.calculate_log_probs=True         cutpoints and mask come from these

    an advantage for each token    Row.credit -> rm_scores -> token_level_rewards -> "given"
    SPO's mask M                   response_mask, whose sum over an optimiser step is verl's Z
    suffixes after a reset         further rows of a problem: prompt_ids end in the kept steps
                                   (nodes of a tree go the same way: spo.tree_advantages)

Two traps, and the way round them that stands here:
 1. A reward is one number, which AgentLoopOutput.as_dict writes to the last token. `Row` has an
    as_dict of its own.
 2. An agent loop may return several rows, but the rewards of all become the last one's, and a
    reward manager would replace them. `Row` has a reward_score, so that none is asked for, and
    its as_dict does not read it.

And what to know: verl's "vanilla" loss bounds the ratio of negative advantages at clip_ratio_c = 3,
ours does not. The engine's log-probs decide cutpoints and mask, where the scripts' scorer does.
Scores that verl logs are sums of advantages: for an accuracy give validation rows the agent loop
"single_turn_agent" (column agent_name of the data). With an engine that takes nothing but (B, T)
advantages, mask and 1 / Z can be folded into them: min() commutes with factors of at least 0.
"""

import asyncio
import math
import sys
from collections import defaultdict
from pathlib import Path
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import mpo
import reset_po
import spo
import torch
from common import Rollout, Sample
from torch import Tensor
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss

CHAIN, BLOCKS = spo.Config(), mpo.Config()  # verl's configuration has no place for these
RESETS = reset_po.Config(localiser="uncertain")


# ------------------------------------------------------------------------- advantages and loss


@register_adv_est("given")
def given(token_level_rewards: Tensor, response_mask: Tensor, **_) -> tuple[Tensor, Tensor]:
    """(B, T) twice: advantages and returns are what the agent loop gave along, token by token."""
    advantages = token_level_rewards * response_mask
    return advantages, advantages


@register_adv_est("grpo_population")
def grpo_population(
    token_level_rewards: Tensor, response_mask: Tensor, index, **_
) -> tuple[Tensor, Tensor]:
    """(B, T) twice: GRPO's advantages with the population std and no epsilon, unlike verl's "grpo".

    index (B,): the problem of each row.
    """
    groups, rewards = defaultdict(list), token_level_rewards.sum(1)  # (B,)
    for row, problem in enumerate(index):
        groups[problem].append(row)
    advantages = torch.zeros_like(rewards)
    for rows in groups.values():
        advantages[rows] = common.group_advantages(rewards[None, rows])[0]
    advantages = advantages[:, None] * response_mask  # (B, T)
    return advantages, advantages


@register_policy_loss("blocks")
def blocks(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode="token-mean", config=None, rollout_is_weights=None,
) -> tuple[Tensor, dict]:  # fmt: skip
    """mpo.py's loss, of which verl sums up: one ratio for K tokens, clipped. All are (B, T)."""
    mask = response_mask.bool()
    shape = BLOCKS.block_size, BLOCKS.layout, BLOCKS.weights
    log_ratio = mpo.block_log_ratio(log_prob - old_log_prob, mask, *shape)
    objective, clipped = common.clipped_surrogate(log_ratio, advantages, config.clip_ratio)
    if rollout_is_weights is not None:
        objective = objective * rollout_is_weights
    loss = agg_loss(-objective, mask, loss_agg_mode, **config.global_batch_info)
    return loss, {"actor/pg_clipfrac": (clipped & mask).sum().item() / max(mask.sum().item(), 1)}


# ---------------------------------------------------------------------------------- agent loops


class Row(AgentLoopOutput):
    """A row with an advantage for each response token; it goes where verl has a token's reward."""

    credit: list[float]

    def as_dict(self) -> dict:
        fields = super().as_dict()
        fields["rm_scores"] = torch.tensor(fields.pop("credit"), dtype=torch.float32)
        return fields


def row_of(s: Sample, mask: list[int], reward: float) -> Row:
    return Row(
        prompt_ids=s.context, response_ids=s.ids, response_mask=mask, credit=s.advantages,
        response_logprobs=s.old_logprobs, reward_score=reward, metrics={},
        extra_fields=dict(reward_extra_info={}),
    )  # fmt: skip


# `draw(prefix, max_new_tokens)` below is the engine: it returns (ids, their log-probs, finished).


async def answers(draw, prompt, done, n: int, cfg, answer: str, tokenizer) -> list[tuple]:
    """n rewarded continuations of prompt + done, drawn at once: [(Rollout, log-probs)]."""
    room = cfg.max_new_tokens - len(done)
    drawn = await asyncio.gather(*[draw([*prompt, *done], room) for _ in range(n)])
    found = []
    for ids, logprobs, finished in drawn:
        reward = common.response_reward([*done, *ids], finished, answer, tokenizer)
        found.append((Rollout([*prompt, *done], ids, finished, reward), logprobs))
    return found


async def chain_rows(draw, prompt, answer: str, tokenizer, cfg=CHAIN) -> list[Row]:
    """SPO-chain: an answer, cut at its cutpoints, each valued by fresh continuations."""
    [(r, logprobs)] = await answers(draw, prompt, [], 1, cfg, answer, tokenizer)
    probs = torch.tensor(logprobs).exp()
    starts = spo.segment_starts(probs, cfg.interval, cfg.threshold)
    states = [(prompt, r.ids[:t], cfg.continuations) for t in starts]
    tries = await asyncio.gather(*[answers(draw, *s, cfg, answer, tokenizer) for s in states])
    values = [sum(again.reward for again, _ in group) / len(group) for group in tries]
    advantages = spo.chain_advantages(starts, values, r.reward, len(r.ids)).tolist()
    mask = (probs < cfg.threshold).int().tolist() if cfg.mask else [1] * len(r.ids)
    return [row_of(Sample(prompt, r.ids, advantages, logprobs), mask, r.reward)]


async def reset_rows(draw, prompt, answer: str, tokenizer, stops, cfg=RESETS) -> list[Row]:
    """RRPO or SRPO: the base group, then a group of continuations of each failed seed."""
    drawn, generator = [], torch.Generator()
    while (plan := reset_po.plan_groups([r.reward for r, _ in drawn], cfg)).more:
        drawn += await answers(draw, prompt, [], plan.more, cfg, answer, tokenizer)
    groups = [[drawn[i] for i in plan.base]]
    for i in plan.seeds:
        r, logprobs = drawn[i]
        starts = common.step_starts(r.ids, tokenizer, cfg.delimiter, cfg.max_steps, stops)
        if cfg.method == "rrpo":
            generator.seed()
            step = reset_po.localise_random(starts, generator)
        else:
            probs = [math.exp(l) for l in logprobs]
            step = reset_po.localise_uncertain(probs, starts, cfg.threshold)
        kept = r.ids[: starts[step - 1]]
        groups.append(await answers(draw, prompt, kept, cfg.resets, cfg, answer, tokenizer))
    rows = []
    for group in filter(None, groups):
        samples = [Sample(r.prompt, r.ids, None, logprobs) for r, logprobs in group]
        reset_po.credit_group(samples, [r for r, _ in group])
        pairs = zip(samples, group)
        rows += [row_of(s, [1] * len(s.ids), r.reward) for s, (r, _) in pairs]
    return rows


class Loop(AgentLoopBase):
    """Not run: needs verl's servers."""

    async def begin(self, sampling_params: dict, raw_prompt, reward_model, **_):
        """(draw, prompt ids, true answer) of a problem, as verl hands it to `run`."""
        prompt = await self.ct_build_initial_tokens(list(raw_prompt))

        async def draw(prefix, max_new_tokens):
            options = sampling_params | dict(max_tokens=max_new_tokens, logprobs=True)
            call = dict(request_id=uuid4().hex, prompt_ids=prefix, sampling_params=options)
            out = await self.server_manager.generate(**call)
            finished = out.token_ids[-1:] == [self.tokenizer.eos_token_id]
            return out.token_ids, out.log_probs, finished

        return draw, prompt, reward_model["ground_truth"]


@register("spo_chain")
class ChainLoop(Loop):
    async def run(self, sampling_params, **kwargs) -> list[Row]:
        return await chain_rows(*await self.begin(sampling_params, **kwargs), self.tokenizer)


@register("resets")
class ResetLoop(Loop):
    async def run(self, sampling_params, **kwargs) -> list[Row]:
        stops = {self.tokenizer.eos_token_id}
        problem = await self.begin(sampling_params, **kwargs)
        return await reset_rows(*problem, self.tokenizer, stops)
