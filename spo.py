"""SPO-chain: Segment Policy Optimization (Guo et al., arXiv 2505.23564 v2).  One file, top to bottom, beside the paper.

The idea. GRPO gives every token of an answer one advantage; PPO needs a critic for one per token. SPO stands between:
cut the answer into segments, estimate the value of each cut by Monte Carlo, and credit a segment with what it changed:

    A_k = V(s at the end of segment k) - V(s at its start)                    (Eq. 2; after the last one, V = the reward)

    L = -1/Z  sum_t  M_t min( r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t ),     r_t = pi(y_t) / pi_old(y_t),

where M_t = 1 for the tokens pi_old was unsure of (probability below `threshold`) and Z = sum_t M_t.

Departures from the paper, and choices where paper and released code disagree:
 1. Advantages are used as they are. The released code whitens them per micro-batch, which can flip their signs.
 2. Z counts the masked tokens of the whole optimiser step, so micro-batches do not change the gradient.
 3. The end token is trained: a policy from scratch has to learn to stop. An answer that was cut has none to train.
 4. Prefixes are cut on token ids and never decoded and tokenised again.
 5. No KL term, and no top-p: the policy that is scored is exactly the one that sampled.
 6. Learning rate, batch and interval fit the small policy of the built-in task, not a 1B model.

    python spo.py                          the main job
    python spo.py --partition trajectory   one segment per answer and V(s_0) = the group's mean: GRPO without its std
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
from common import BadInput, Batch, Problem, Rollout, RunConfig, Sample, arg


@dataclass
class Config:
    partition: Literal["cutpoint", "trajectory"] = arg("cutpoint", "where segments begin; trajectory: GRPO's limit")
    interval: int = arg(1, "cutpoints per segment (m in the paper)")
    threshold: float = arg(0.9, "a token sampled with a lower probability is a cutpoint (rho)")
    continuations: int = arg(4, "fresh continuations per boundary that estimate its value (N)")
    mask: bool = arg(True, "train only the tokens below the threshold: the probability mask")
    prompts: int = arg(32, "problems per step")
    group_size: int = arg(8, "answers per problem (G)")
    batch_size: int = arg(128, "answers per optimiser update; divides prompts x group_size")
    epochs: int = arg(1, "passes over a step's answers")
    steps: int = arg(60, "rounds of sampling and training")
    lr: float = arg(1e-3, "AdamW's learning rate")
    warmup_updates: int = arg(10, "optimiser updates over which the learning rate rises from 0")
    clip_eps: float = arg(0.2, "the ratio's clip range (eps)")
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm")
    temperature: float = arg(1.0, "of sampling and of scoring")
    max_new_tokens: int = arg(80, "longest answer, in tokens")

    def __post_init__(self):
        common.require_range(self, 1, "interval", "continuations", "prompts", "group_size", "batch_size", "epochs", "steps")
        common.require_range(self, 1, "max_new_tokens")
        common.require_range(self, 0, "warmup_updates")
        common.require_range(self, 0, "threshold", "lr", "clip_eps", "max_grad_norm", "temperature", open=True)
        if self.threshold > 1:
            raise BadInput(f"--threshold {self.threshold}: is a probability, so at most 1")
        if self.prompts * self.group_size % self.batch_size:
            rollouts = self.prompts * self.group_size
            raise BadInput(f"--batch_size {self.batch_size}: must divide prompts x group_size = {rollouts}")


TINY = dict(terms=3, warm_start_steps=120, prompts=16, group_size=4, batch_size=64, steps=12, eval_problems=100)
TINY |= dict(eval_samples=2, show_every=4, save_every=4)


# -------------------------------------------------------------------------------------------------------- pure maths


def segment_starts(probs, interval: int, threshold: float) -> list[int]:
    """Boundaries of the cutpoint partition: the index of each segment's first token (Section 4.1).

    probs (T,): pi_old's probability of each token it sampled. A cutpoint is a token strictly below `threshold`; the
    boundaries are cutpoints number 1, 1 + interval, 1 + 2 interval, ... Raises ValueError for an interval below 1.

    >>> segment_starts([1.0, 0.5, 1.0, 0.8, 0.3, 1.0], interval=2, threshold=0.9)
    [1, 4]
    """
    if interval < 1:
        raise ValueError(f"interval must be at least 1, not {interval}")
    cutpoints = (torch.as_tensor(probs) < threshold).nonzero()[:, 0].tolist()
    return cutpoints[::interval]


def chain_advantages(starts: list[int], values: list[float], reward: float, length: int) -> Tensor:
    """(length,) one advantage per response token: each segment gets the next boundary's value minus its own (Eq. 2).

    values: V-hat at each start. The last segment ends in the answer's own reward, not in an estimate. Tokens before
    the first boundary get 0. Raises ValueError for starts that do not ascend within the response.

    >>> chain_advantages([1, 4], [0.25, 0.75], reward=0.0, length=6).tolist()
    [0.0, 0.5, 0.5, 0.5, -0.75, -0.75]
    """
    ends = [*starts[1:], length]
    if len(values) != len(starts) or any(not 0 <= start < end for start, end in zip(starts, ends)):
        raise ValueError(f"starts {starts} must ascend within 0..{length - 1}, with one value each")
    advantages = torch.zeros(length)
    for start, end, value, next_value in zip(starts, ends, values, [*values[1:], reward]):
        advantages[start:end] = next_value - value
    return advantages


def probability_mask(batch: Batch, threshold: float) -> Tensor:
    """(B, T) bool: M_t of Section 4.3, the trained tokens that pi_old gave less than `threshold`."""
    return batch.mask & (batch.old_logprobs.exp() < threshold)


def spo_loss(logprobs: Tensor, batch: Batch, mask: Tensor, normaliser: int, clip_eps: float) -> tuple[Tensor, Tensor]:
    """The loss L of the header for one micro-batch of an optimiser step, and where the clip cut the gradient, (B, T).

    normaliser: Z, the masked tokens of the WHOLE step. A step where nothing is masked has loss 0, not 0/0.
    """
    objective, clipped = common.clipped_surrogate(logprobs, batch.old_logprobs, batch.advantages, clip_eps)  # (B, T)
    return -(objective * mask).sum() / max(normaliser, 1), clipped & mask


def credit_hit(starts: list[int], advantages: list[float], wrong: int) -> tuple[bool, float]:
    """Does the most negative segment hold token `wrong`, and by chance: that segment's share of the tokens.

    No negative segment is a miss with chance 0. Of equally negative ones, the first counts.
    """
    negative = [start for start in starts if advantages[start] < 0]
    if not negative:
        return False, 0.0
    start = min(negative, key=lambda start: advantages[start])
    end = min([later for later in starts if later > start], default=len(advantages))
    return start <= wrong < end, (end - start) / len(advantages)


# -------------------------------------------------------------------------------------------------- credit assignment


class Credit(NamedTuple):
    samples: list[Sample]  # one per rollout: the whole answer with its advantages and old log-probs
    starts: list[list[int]]  # each answer's boundaries
    entropy: float  # mean over all answer tokens of the policy's entropy, nats
    tokens: int  # sampled to estimate values


def estimate_values(model, tokenizer, states, cfg: Config, generator) -> tuple[list[float], int]:
    """V-hat of each state (prompt ids, answer ids so far, true answer) and the tokens it took.

    The mean reward of N fresh continuations by the sampling policy; equal states share one estimate. A continuation
    may use what is left of the answer's budget.
    """
    states = [(tuple(prompt), tuple(done), answer) for prompt, done, answer in states]
    distinct = list(dict.fromkeys(states))
    room = [common.answer_budget(model, prompt, cfg.max_new_tokens) - len(done) for prompt, done, _ in distinct]
    rollouts = common.sample(
        model, [[*prompt, *done] for prompt, done, _ in distinct], cfg.continuations, max_new_tokens=room,
        eos=common.eos_ids(model, tokenizer), temperature=cfg.temperature, generator=generator,
    )  # fmt: skip
    values = {}
    for i, (prompt, done, answer) in enumerate(distinct):
        group = rollouts[i * cfg.continuations : (i + 1) * cfg.continuations]
        rewards = [common.response_reward([*done, *r.ids], r.finished, answer, tokenizer) for r in group]
        values[prompt, done, answer] = sum(rewards) / len(rewards)
    return [values[state] for state in states], sum(len(r.ids) for r in rollouts)


def assign_credit(model, tokenizer, rollouts: list[Rollout], answers: list[str], cfg: Config, generator) -> Credit:
    """Rollouts (prompt-major, group_size each) with their rewards -> training samples with an advantage per token."""
    samples = [Sample(r.prompt, r.ids) for r in rollouts]
    entropies = common.score(model, samples, cfg.temperature)
    entropy = sum(map(sum, entropies)) / sum(map(len, entropies))
    if cfg.partition == "trajectory":
        starts, tokens = [[0]] * len(samples), 0
        rewards = torch.tensor([r.reward for r in rollouts]).view(-1, cfg.group_size)  # (P, G)
        values = [[v] for v in rewards.mean(1).repeat_interleave(cfg.group_size).tolist()]
    else:
        starts = [segment_starts(torch.tensor(s.old_logprobs).exp(), cfg.interval, cfg.threshold) for s in samples]
        states = [(s.context, s.ids[:t], answer) for s, answer, cuts in zip(samples, answers, starts) for t in cuts]
        flat, tokens = estimate_values(model, tokenizer, states, cfg, generator)
        flat = iter(flat)
        values = [[next(flat) for _ in cuts] for cuts in starts]
    for s, r, cuts, v in zip(samples, rollouts, starts, values):
        s.advantages = chain_advantages(cuts, v, r.reward, len(r.ids)).tolist()
    return Credit(samples, starts, entropy, tokens)


def update(model, optimizer, schedule, samples: list[Sample], cfg: Config, seed: str) -> dict:
    """`epochs` passes over the samples in minibatches of `batch_size`; returns metrics over the trained tokens."""
    device, tokens = model.device, 0
    total = dict.fromkeys(("loss", "kl", "clip_fraction", "grad_norm"), 0.0)
    updates = 0
    for epoch in range(cfg.epochs):
        order = random.Random(f"{seed}-{epoch}").sample(samples, len(samples))
        for i in range(0, len(order), cfg.batch_size):
            minibatch, loss_sum = order[i : i + cfg.batch_size], 0.0
            whole = common.collate(minibatch)
            z = int((probability_mask(whole, cfg.threshold) if cfg.mask else whole.mask).sum())
            # Samples without signal have gradient 0: they count in Z, and need no forward pass.
            for micro in common.micro_batches([s for s in minibatch if any(s.advantages)]):
                batch = common.collate(micro, device)
                mask = probability_mask(batch, cfg.threshold) if cfg.mask else batch.mask  # (B, T)
                logprobs = common.token_logprobs(model, batch, cfg.temperature)  # (B, T)
                loss, clipped = spo_loss(logprobs, batch, mask, z, cfg.clip_eps)
                loss.backward()
                loss_sum += loss.item()
                log_ratio = (logprobs.detach() - batch.old_logprobs)[mask]
                total["kl"] += (log_ratio.exp() - 1 - log_ratio).sum().item()  # k3 of KL(pi_old || pi)
                total["clip_fraction"] += clipped.sum().item()
                tokens += len(log_ratio)
            total["grad_norm"] += common.optimizer_step(model, optimizer, schedule, loss_sum, cfg.max_grad_norm)
            total["loss"] += loss_sum
            updates += 1
    return {key: value / max(tokens if key in ("kl", "clip_fraction") else updates, 1) for key, value in total.items()}


# ----------------------------------------------------------------------------------------------------------- the run


def show_answer(problems: list[Problem], rollouts: list[Rollout], credit: Credit, tokenizer, colour: bool) -> str:
    """One answer of the step with its credit: the first failure that got any, else the first answer."""
    failed = (i for i, r in enumerate(rollouts) if r.reward == 0 and any(credit.samples[i].advantages))
    i = next(failed, 0)
    problem, ids, notes = problems[i], rollouts[i].ids, {}
    wrong = common.first_wrong_token(ids, problem, tokenizer)
    if wrong is not None:
        steps = problem.solution.split("\n")
        step = common.first_wrong_step(tokenizer.decode(ids, skip_special_tokens=True), problem)
        notes[wrong] = f"<- first wrong step; right: {steps[min(step, len(steps) - 1)]}"
    question = problem.question.replace("\n", " ")
    lines = [f"{question[:80]}  (answer {problem.answer}, reward {rollouts[i].reward:.0f})"]
    pieces = [tokenizer.decode([id]) for id in ids]
    return "\n".join(lines + common.credit_lines(pieces, credit.samples[i].advantages, credit.starts[i], notes, colour))


def main() -> None:
    cfg, run = common.parse_args(Config, "spo", __doc__, TINY)
    device, dtype = common.pick_device(run)
    folder = common.run_folder(cfg, run)
    train = common.load_problems(run.data, "train", None, run.seed, run.terms)
    held_out = common.load_problems(run.data, "test", run.eval_problems, run.seed, run.terms)
    model, tokenizer = common.open_policy(run, folder, train, device, dtype)
    common.check_prompts(model, tokenizer, train + held_out)

    def evaluate() -> dict:
        return common.evaluate(
            model, tokenizer, held_out, run.eval_samples, cfg.max_new_tokens, cfg.temperature, run.seed
        )

    if run.eval_only:
        print(f"{len(held_out)} held-out problems: {common.describe(evaluate())}")
        return

    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, cfg.warmup_updates)
    generator = torch.Generator(device).manual_seed(run.seed)
    trainer = (model, tokenizer, optimizer, schedule, generator)
    print(
        f"SPO-chain on {run.data}: {cfg.steps} steps of {cfg.prompts} problems x {cfg.group_size} answers, "
        f"{cfg.partition} partition; {model.num_parameters() / 1e6:.1f} M parameters, {device}, {str(dtype)[6:]}"
    )
    if run.resume:
        progress = common.resume(folder, optimizer, schedule, generator)
        print(f"resuming {folder} after step {progress['step']}")
    else:
        progress = dict(step=0, sampled_tokens=0, seconds=0.0, failures=0, hits=0, chance=0.0, before=evaluate())
        common.start_run(folder, cfg, run, *trainer, progress)
    print(f"before: {common.describe(progress['before'])}")

    ctrl_c, began = common.CtrlC(), time.time() - progress["seconds"]
    bar = tqdm(range(progress["step"], cfg.steps), "training", cfg.steps, initial=progress["step"], unit="step")
    for step in bar:
        # 1. Sample G answers to each problem of the batch and reward them.
        problems = common.batch_at(train, step, cfg.prompts, run.seed)
        prompts = [common.prompt_ids(tokenizer, problem) for problem in problems]
        rollouts = common.sample(
            model, prompts, cfg.group_size,
            max_new_tokens=[common.answer_budget(model, prompt, cfg.max_new_tokens) for prompt in prompts],
            eos=common.eos_ids(model, tokenizer), temperature=cfg.temperature, generator=generator,
        )  # fmt: skip
        problems = [problem for problem in problems for _ in range(cfg.group_size)]  # one per rollout from here on
        for r, problem in zip(rollouts, problems):
            r.reward = common.response_reward(r.ids, r.finished, problem.answer, tokenizer)

        # 2. Partition each answer, estimate the value of its boundaries, and credit each segment with the difference.
        credit = assign_credit(model, tokenizer, rollouts, [p.answer for p in problems], cfg, generator)

        # 3. Train on them.
        try:
            metrics = update(model, optimizer, schedule, credit.samples, cfg, f"{run.seed}-{step}")
        except FloatingPointError as error:
            common.save_checkpoint(folder, *trainer, progress, name="failed")
            raise SystemExit(f"step {step + 1}: {error}; stopped, with this state in {folder}/failed") from None

        # The task knows the truth about credit: compare.
        for r, s, starts, problem in zip(rollouts, credit.samples, credit.starts, problems):
            wrong = common.first_wrong_token(r.ids, problem, tokenizer)
            if r.reward == 0 and wrong is not None:
                hit, chance = credit_hit(starts, s.advantages, wrong)
                for key, value in (("failures", 1), ("hits", hit), ("chance", chance)):
                    progress[key] += value
        progress["step"] = step + 1
        progress["sampled_tokens"] += sum(len(r.ids) for r in rollouts) + credit.tokens
        progress["seconds"] = time.time() - began
        reward = sum(r.reward for r in rollouts) / len(rollouts)
        row = dict(
            step=step + 1,
            reward=reward,
            entropy=credit.entropy,
            **metrics,
            no_signal=sum(not any(s.advantages) for s in credit.samples) / len(rollouts),
            boundaries=sum(map(len, credit.starts)) / len(rollouts),
            length=sum(len(r.ids) for r in rollouts) / len(rollouts),
            lr=schedule.get_last_lr()[0],
            sampled_tokens=progress["sampled_tokens"],
            seconds=round(progress["seconds"], 2),
        )
        common.append_metrics(folder, row)
        bar.set_postfix(accuracy=f"{reward:.2f}", refresh=False)
        if run.show_every and (step + 1) % run.show_every == 0:
            common.show(folder, f"step {step + 1}", lambda colour: show_answer(problems, rollouts, credit, tokenizer, colour))
        if (step + 1) % run.save_every == 0 or step + 1 == cfg.steps or ctrl_c.pressed:
            common.save_checkpoint(folder, *trainer, progress)
        if ctrl_c.pressed:
            bar.close()
            print(f"saved after step {step + 1} in {folder}; --resume continues")
            return
    common.finish_run(folder, run, progress, evaluate())


if __name__ == "__main__":
    common.cli(main)
