"""SPO-chain: Segment Policy Optimization (Guo et al., arXiv 2505.23564 v2), in one file.

GRPO gives all tokens of an answer one advantage; PPO trains a critic to give each its own. SPO
stands between: cut the answer into segments, estimate the value V of each cut by Monte Carlo, and
credit a segment with the value it added (Eq. 2):

    A_k = V(state at the end of segment k) - V(state at its start),    V(end of answer) = reward

    L = -1/Z sum_t M_t min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t),   r_t = pi(y_t) / pi_old(y_t)

The mask M_t is 1 where pi_old(y_t) is below a threshold and 0 elsewhere; Z is the sum of M_t.

Departures from the paper, and choices where paper and released code disagree:
 1. Advantages are used as they are. The code whitens them per micro-batch, which can flip signs.
 2. Z is the sum over the whole optimiser step, so micro-batches do not change the gradient.
 3. The end token is trained, for a policy from scratch must learn to stop. A cut answer has none.
 4. Prefixes are cut on token ids, never decoded and tokenised again.
 5. No KL term and no top-p: the policy that is scored is exactly the one that sampled.
 6. One answer per problem by default. V replaces the group's mean as baseline, so SPO needs no
    groups, and other problems teach more than other answers to the same one.
 7. Learning rate, batch and interval suit the small policy of the built-in task, not a 1B model.

    python spo.py               75 s on two cores, held-out accuracy 0.21 -> 0.89
    python spo.py --partition trajectory --prompts 8 --group_size 8 --mask False     GRPO, no std
"""

import random
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import get_constant_schedule_with_warmup

import common
from common import BadInput, Batch, Sample, arg


@dataclass
class Config:
    partition: Literal["cutpoint", "trajectory"] = arg("cutpoint", "trajectory: one segment, GRPO")
    interval: int = arg(1, "cutpoints per segment (the paper's m)")
    threshold: float = arg(0.9, "a token sampled at a lower probability is a cutpoint (rho)")
    continuations: int = arg(4, "fresh continuations per boundary, to estimate its value (N)")
    mask: bool = arg(True, "train only tokens below the threshold: the probability mask")
    prompts: int = arg(64, "problems per step")
    group_size: int = arg(1, "answers per problem (G)")
    batch_size: int = arg(64, "answers per optimiser step; divides prompts x group_size")
    epochs: int = arg(1, "passes over each step's answers")
    steps: int = arg(100, "rounds of sampling and training")
    lr: float = arg(5e-4, "AdamW's learning rate")
    warmup_updates: int = arg(10, "optimiser steps over which the learning rate rises from 0")
    clip_eps: float = arg(0.2, "clip range of the ratio (eps)")
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm")
    temperature: float = arg(1.0, "of sampling and of scoring")
    max_new_tokens: int = arg(80, "longest answer, in tokens")

    def __post_init__(self):
        sizes = ("prompts", "group_size", "batch_size", "epochs", "steps", "max_new_tokens")
        common.require_range(self, 1, "interval", "continuations", *sizes)
        common.require_range(self, 0, "warmup_updates")
        positive = ("threshold", "lr", "clip_eps", "max_grad_norm", "temperature")
        common.require_range(self, 0, *positive, open=True)
        if self.threshold > 1:
            raise BadInput(f"--threshold {self.threshold}: is a probability, so at most 1")
        rollouts = self.prompts * self.group_size
        if rollouts % self.batch_size:
            raise BadInput(f"--batch_size {self.batch_size}: must divide {rollouts} answers a step")
        if self.partition == "trajectory" and self.group_size == 1:
            raise BadInput("--partition trajectory: needs a group, so --group_size 2 or more")


TINY = dict(
    terms=3, warm_start_steps=250, prompts=32, batch_size=32, steps=40, max_new_tokens=32,
    eval_problems=200, eval_samples=2, show_every=20, save_every=20,
)  # fmt: skip


# ----------------------------------------------------------------------------------- pure maths


def segment_starts(probs, interval: int, threshold: float) -> list[int]:
    """Boundaries of the cutpoint partition: the index of each segment's first token (Section 4).

    probs (T,): pi_old's probability of each token it sampled, at the sampling temperature. A
    cutpoint is a token strictly below `threshold`; boundaries are cutpoints 1, 1 + interval,
    1 + 2 interval, ... Raises ValueError for an interval below 1.

    >>> segment_starts([1.0, 0.5, 1.0, 0.8, 0.3, 1.0], interval=2, threshold=0.9)
    [1, 4]
    """
    if interval < 1:
        raise ValueError(f"interval must be at least 1, not {interval}")
    cutpoints = (torch.as_tensor(probs) < threshold).nonzero()[:, 0].tolist()
    return cutpoints[::interval]


def chain_advantages(starts: list[int], values: list[float], reward: float, length: int) -> Tensor:
    """(length,) one advantage per response token: a segment's value at its end minus at its start.

    values: V-hat at each of starts. The last segment ends in the answer's own reward, no estimate;
    tokens before the first start get 0 (Eq. 2). Raises ValueError unless starts ascend in
    [0, length) and have a value each.

    >>> chain_advantages([1, 4], [0.25, 0.75], reward=0.0, length=6).tolist()
    [0.0, 0.5, 0.5, 0.5, -0.75, -0.75]
    """
    ends = [*starts[1:], length]
    if len(values) != len(starts) or any(not 0 <= start < end for start, end in zip(starts, ends)):
        raise ValueError(f"starts {starts} must ascend in [0, {length}) and have a value each")
    advantages = torch.zeros(length)
    for start, end, value, next_value in zip(starts, ends, values, [*values[1:], reward]):
        advantages[start:end] = next_value - value
    return advantages


def trained_tokens(batch: Batch, cfg: Config) -> Tensor:
    """(B, T) bool: M_t, the tokens pi_old gave less than `threshold`; all of them with mask off."""
    return batch.mask & (batch.old_logprobs.exp() < cfg.threshold) if cfg.mask else batch.mask


def spo_loss(logprobs: Tensor, batch: Batch, mask: Tensor, normaliser: int, clip_eps: float):
    """One micro-batch's part of the loss L in the header, and (B, T) where the clip cut it.

    mask: M (B, T). normaliser: Z, the sum of M over the WHOLE optimiser step; where that is 0, so
    is the loss.
    """
    log_ratio = logprobs - batch.old_logprobs  # (B, T)
    objective, clipped = common.clipped_surrogate(log_ratio, batch.advantages, clip_eps)  # (B, T)
    return -(objective * mask).sum() / max(normaliser, 1), clipped & mask


def credit_hit(starts: list[int], advantages: list[float], wrong: int) -> tuple[bool, float]:
    """Does the most negative segment hold token `wrong`? And by chance: its share of the tokens.

    No negative segment is a miss with chance 0. Of equally negative ones the first counts.
    """
    negative = [start for start in starts if advantages[start] < 0]
    if not negative:
        return False, 0.0
    start = min(negative, key=lambda start: advantages[start])
    end = min([later for later in starts if later > start], default=len(advantages))
    return start <= wrong < end, (end - start) / len(advantages)


# ---------------------------------------------------------------------------- credit assignment


class Credit(NamedTuple):
    samples: list[Sample]  # one per rollout: its whole answer, with advantages and old log-probs
    starts: list[list[int]]  # each answer's boundaries
    entropy: float  # the policy's mean entropy over all answer tokens, nats
    tokens: int  # sampled to estimate values


def estimate_values(model, tokenizer, states, cfg: Config, generator) -> tuple[list[float], int]:
    """V-hat of each state (prompt ids, answer ids so far, true answer), and the tokens it took.

    The mean reward of N fresh continuations by the sampling policy, each within what is left of
    the answer's budget. Equal states share one estimate.
    """
    states = [(tuple(prompt), tuple(done), answer) for prompt, done, answer in states]
    distinct = list(dict.fromkeys(states))
    size, options = cfg.continuations, dict(temperature=cfg.temperature, generator=generator)
    rollouts = common.complete(model, tokenizer, distinct, size, cfg.max_new_tokens, **options)
    values = torch.tensor([r.reward for r in rollouts]).view(-1, size).mean(1)  # (distinct,)
    value_of = dict(zip(distinct, values.tolist()))
    return [value_of[state] for state in states], sum(len(r.ids) for r in rollouts)


def assign_credit(model, tokenizer, rollouts, answers, cfg: Config, generator) -> Credit:
    """Rewarded rollouts, group_size to a prompt, and their true answers -> samples with credit."""
    samples = [Sample(r.prompt, r.ids) for r in rollouts]
    entropy = common.score(model, samples, cfg.temperature)
    if cfg.partition == "trajectory":  # GRPO: the value of the prompt is the mean of its group
        rewards = torch.tensor([r.reward for r in rollouts]).view(-1, cfg.group_size)  # (P, G)
        starts, tokens = [[0]] * len(samples), 0
        flat = rewards.mean(1).repeat_interleave(cfg.group_size).tolist()
    else:
        probs = [torch.tensor(s.old_logprobs).exp() for s in samples]
        starts = [segment_starts(p, cfg.interval, cfg.threshold) for p in probs]
        triples = zip(samples, answers, starts)
        states = [(s.context, s.ids[:t], answer) for s, answer, cuts in triples for t in cuts]
        flat, tokens = estimate_values(model, tokenizer, states, cfg, generator)
    values = iter(flat)  # one per boundary, in order
    for s, r, cuts in zip(samples, rollouts, starts):
        advantages = chain_advantages(cuts, [next(values) for _ in cuts], r.reward, len(r.ids))
        s.advantages = advantages.tolist()
    return Credit(samples, starts, entropy, tokens)


# -------------------------------------------------------------------------------------- the run


def update(model, optimizer, schedule, samples: list[Sample], cfg: Config, seed: str) -> dict:
    """`epochs` passes over the samples, `batch_size` to an optimiser step; returns its metrics."""
    sums = dict(loss=0.0, kl=0.0, clip_fraction=0.0, grad_norm=0.0)
    steps, tokens = 0, 0
    for epoch in range(cfg.epochs):
        order = random.Random(f"{seed}-{epoch}").sample(samples, len(samples))
        for i in range(0, len(order), cfg.batch_size):
            minibatch = order[i : i + cfg.batch_size]
            z = trained_tokens(common.collate(minibatch), cfg).sum().item()
            loss_sum = 0.0
            # A sample without signal has gradient 0: it counts in Z, and needs no forward pass.
            for micro in common.micro_batches([s for s in minibatch if any(s.advantages)]):
                batch = common.collate(micro, model.device)
                mask = trained_tokens(batch, cfg)  # (B, T)
                logprobs = common.token_logprobs(model, batch, cfg.temperature)  # (B, T)
                loss, clipped = spo_loss(logprobs, batch, mask, z, cfg.clip_eps)
                loss.backward()
                loss_sum += loss.item()
                log_ratio = (logprobs.detach() - batch.old_logprobs)[mask]  # (N,)
                sums["kl"] += (log_ratio.exp() - 1 - log_ratio).sum().item()
                sums["clip_fraction"] += clipped.sum().item()
                tokens += len(log_ratio)
            norm = common.optimizer_step(model, optimizer, schedule, loss_sum, cfg.max_grad_norm)
            sums["loss"], sums["grad_norm"] = sums["loss"] + loss_sum, sums["grad_norm"] + norm
            steps += 1
    over = dict(loss=steps, grad_norm=steps, kl=max(tokens, 1), clip_fraction=max(tokens, 1))
    return {key: sums[key] / over[key] for key in sums}


def show_answer(problems, rollouts, credit: Credit, tokenizer, colour: bool) -> str:
    """One answer of the step with its credit: the first failure that got any, else the first."""
    credited = [any(s.advantages) for s in credit.samples]
    i = next((i for i, r in enumerate(rollouts) if credited[i] and not r.reward), 0)
    title, notes = common.answer_notes(problems[i], rollouts[i], tokenizer)
    pieces = [tokenizer.decode([id]) for id in rollouts[i].ids]
    advantages = credit.samples[i].advantages
    labels = {t: f"{advantages[t]:+.2f}" for t in credit.starts[i]}
    lines = common.credit_lines(pieces, advantages, labels, notes, colour)
    return "\n".join([title, *lines])


def main() -> None:
    cfg, run = common.parse_args(Config, "spo", __doc__, TINY)
    device, dtype = common.pick_device(run)
    folder = common.run_folder(cfg, run)
    train = common.load_problems(run.data, "train", None, run.seed, run.terms)
    test = common.load_problems(run.data, "test", run.eval_problems, run.seed, run.terms)
    if not run.eval_only:
        print(
            f"SPO-chain on {run.data} ({len(train):,} problems, {len(test):,} held out): "
            f"{cfg.steps} steps of {cfg.prompts} problems x {cfg.group_size} answers,\n"
            f"partition {cfg.partition}, mask {'on' if cfg.mask else 'off'}, on {device} in "
            f"{str(dtype)[6:]}, to {folder}/"
        )
    model, tokenizer = common.open_policy(run, folder, train, test, device, dtype)

    def evaluate() -> dict:
        size, temperature = (run.eval_samples, cfg.max_new_tokens), cfg.temperature
        return common.evaluate(model, tokenizer, test, *size, temperature, run.seed)

    if run.eval_only:
        print(f"{len(test)} held-out problems: {common.describe(evaluate())}")
        return

    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, cfg.warmup_updates)
    generator = torch.Generator(device).manual_seed(run.seed)
    trainer = (model, tokenizer, optimizer, schedule, generator)
    if run.resume:
        progress = common.resume(folder, optimizer, schedule, generator)
    else:
        progress = dict(step=0, sampled_tokens=0, seconds=0.0, failures=0, hits=0, chance=0.0)
        progress["before"] = evaluate()
        common.start_run(folder, cfg, run, *trainer, progress)
    print(f"before: {common.describe(progress['before'])}")
    ctrl_c, done = common.CtrlC(), progress["step"]
    for step in (bar := tqdm(range(done, cfg.steps), "training", cfg.steps, initial=done)):
        # 1. Sample G answers to each problem, and reward them.
        began = time.time()
        problems = common.batch_at(train, step, cfg.prompts, run.seed)
        states = [common.initial_state(tokenizer, problem) for problem in problems]
        options = dict(temperature=cfg.temperature, generator=generator)
        rollouts = common.complete(
            model, tokenizer, states, cfg.group_size, cfg.max_new_tokens, **options
        )
        problems = [problem for problem in problems for _ in range(cfg.group_size)]  # one a rollout
        answers = [problem.answer for problem in problems]

        # 2. Cut each answer into segments, and credit each with the value it added.
        credit = assign_credit(model, tokenizer, rollouts, answers, cfg, generator)

        # 3. Train on them.
        try:
            metrics = update(model, optimizer, schedule, credit.samples, cfg, f"{run.seed}-{step}")
        except FloatingPointError as error:
            common.save_checkpoint(folder, *trainer, progress, "failed")
            stopped = f"step {step + 1}: {error}; stopped, with its state in {folder}/failed"
            raise SystemExit(f"\n{stopped}") from None

        for r, s, starts, problem in zip(rollouts, credit.samples, credit.starts, problems):
            wrong = common.first_wrong_token(r.ids, problem, tokenizer)
            if not r.reward and wrong is not None:  # the task knows where it went wrong: compare
                hit, chance = credit_hit(starts, s.advantages, wrong)
                for key, value in dict(failures=1, hits=int(hit), chance=chance).items():
                    progress[key] += value
        progress["step"] = step + 1
        progress["sampled_tokens"] += sum(len(r.ids) for r in rollouts) + credit.tokens
        progress["seconds"] += time.time() - began
        count = len(rollouts)
        accuracy = sum(r.reward for r in rollouts) / count
        evaluated = run.eval_every and (step + 1) % run.eval_every == 0
        common.append_metrics(folder, dict(
            step=step + 1,
            accuracy=accuracy,
            **metrics,
            entropy=credit.entropy,
            no_signal=sum(not any(s.advantages) for s in credit.samples) / count,
            boundaries=sum(map(len, credit.starts)) / count,
            length=sum(len(r.ids) for r in rollouts) / count,
            lr=schedule.get_last_lr()[0],
            sampled_tokens=progress["sampled_tokens"],
            seconds=round(progress["seconds"], 2),
            held_out=evaluate()["accuracy"] if evaluated else "",
        ))  # fmt: skip
        bar.set_postfix(accuracy=f"{accuracy:.2f}", refresh=False)
        if run.show_every and (step + 1) % run.show_every == 0:
            shown = (problems, rollouts, credit, tokenizer)
            common.show(folder, lambda colour: f"step {step + 1}: {show_answer(*shown, colour)}")
        if (step + 1) % run.save_every == 0 or step + 1 == cfg.steps or ctrl_c.pressed:
            common.save_checkpoint(folder, *trainer, progress)
        if ctrl_c.pressed and step + 1 < cfg.steps:
            bar.close()
            print(f"saved after step {step + 1} in {folder}/; --resume continues")
            return
    facts, remark = {}, ""
    if failures := progress["failures"]:
        hit, chance = progress["hits"] / failures, progress["chance"] / failures
        facts = dict(failures=failures, credit_hit=hit, credit_chance=chance)
        remark = (
            f"credit: the most negative segment held the first wrong token in {hit:.0%} of "
            f"{failures:,} failures (by chance {chance:.0%})\n"
        )
    common.finish_run(folder, progress, evaluate(), facts, remark)


if __name__ == "__main__":
    common.cli(main)
