"""MPO: Multi-token Policy Gradient Optimization (arXiv 2602.14386), in one file.

PPO and GRPO take a token for an action. MPO takes K consecutive tokens for one: the importance
ratio, and with it the clip, belongs to a block of tokens, and the rest of GRPO stays. With the
token log-ratios l_t = log pi(y_t) - log pi_old(y_t) and weights beta that sum to 1,

    R_t = exp(beta_1 l_t + ... + beta_K l_{t+K-1})    (Eq. 9 and 11; all beta = 1: joint, Eq. 8)

    L = -1/N sum_t min(R_t A_t, clip(R_t, 1 - eps, 1 + eps) A_t),    A = GRPO's group advantage

Confirmed by the abstract and public notes on the paper: K tokens are one action, only the ratio
changes, Eq. 8, 9 and 11, K in {2, 3, 5}, and weights named by the share of the K - 1 future tokens.
No code was released. Reconstructed here (1 to 5), or departing from the paper:
 1. The objective: A is GRPO's group advantage; clipped once per window or block; N counts the
    tokens of the whole optimiser step, each of which carries its window's or its block's value.
 2. The future tokens' probabilities are the policy's own, teacher-forced on what was sampled. The
    paper's earlier version trains extra heads that predict them from the state at t.
 3. Layouts: `window` (one anchored at every token, stride 1) and `block` (stride K).
 4. Weights: `joint`, `uniform` (1/K), or a share p of the weight for the future tokens in equal
    parts. Where fewer than K tokens are left, beta is renormalised over those there are.
 5. --scale_eps multiplies the clip range by the norm of beta, for a fair comparison.
 6. No KL term; sizes suit the small policy of the built-in task. The learning rate falls to 0:
    at a constant one, as in spo.py, several updates a step left the last accuracies swinging.

While the policy is the one that sampled, all ratios are 1, no clip acts, and MPO's gradient is
GRPO's: exactly so for blocks of uniform weight, inside an answer for windows; joint weights make it
K times as large; in a block, a share p weighs the first token most. So a step makes four updates by
default, and from the second on K matters more.

    python mpo.py                   a minute on two cores, held-out accuracy 0.22 -> 0.87
    python mpo.py --block_size 1    GRPO
"""

import math
import random
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import common  # first: Ctrl-C during the imports ends without a traceback
import torch
import torch.nn.functional as F
from common import BadInput, Batch, Sample, arg
from torch import Tensor
from transformers import get_linear_schedule_with_warmup


@dataclass
class Config:
    block_size: int = arg(5, "tokens that make one action (K); 1: GRPO", low=1, high=math.inf)
    layout: Literal["window", "block"] = arg("window", "a window at every token, or blocks")
    weights: str = arg("0.2", "of a block's tokens: joint, uniform, or the future's share p")
    scale_eps: bool = arg(False, "multiply clip_eps by the norm of the weights")
    scale_advantages: bool = arg(True, "divide advantages by their group's std")
    prompts: int = arg(32, "problems per step", low=1)
    group_size: int = arg(8, "answers per problem (G)", low=2)
    batch_size: int = arg(64, "answers per optimiser step; divides prompts x group_size", low=1)
    epochs: int = arg(1, "passes over each step's answers", low=1)
    steps: int = arg(50, "rounds of sampling and training", low=1)
    lr: float = arg(
        5e-4, "AdamW's highest learning rate; from there it falls linearly to 0", above=0
    )
    warmup_updates: int = arg(
        10, "optimiser steps over which the learning rate rises from 0", low=0
    )
    clip_eps: float = arg(0.2, "clip range of the ratio (eps)", above=0)
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm", above=0, high=1e12)
    temperature: float = arg(1.0, "of sampling and of scoring", low=0.01)
    max_new_tokens: int = arg(80, "longest answer, in tokens", low=1)

    def __post_init__(self):
        common.check_bounds(self)
        try:  # a share comes as text, and is a number from here on
            if self.weights not in ("joint", "uniform"):
                self.weights = float(self.weights)
            block_weights(self.block_size, self.weights, 1)
        except ValueError:
            wanted = "must be joint, uniform, or a share in [0, 1)"
            raise BadInput(f"--weights {self.weights}: {wanted}") from None
        rollouts = self.prompts * self.group_size
        if rollouts % self.batch_size:
            raise BadInput(f"--batch_size {self.batch_size}: must divide {rollouts} answers a step")


TINY = dict(
    terms=3, warm_start_steps=250, steps=40, max_new_tokens=32, eval_problems=200, eval_samples=2,
    show_every=20, save_every=20,
)  # fmt: skip
LARGE = dict(lr=1e-6)


# ----------------------------------------------------------------------------------- pure maths


def block_weights(block_size: int, weights: str | float, length: int | None = None) -> Tensor:
    """(K,) float64: beta_1 ... beta_K before any tail is renormalised; only the first `length`.

    weights: "joint" (all 1), "uniform" (1/K), or the share p in [0, 1) of the K - 1 future tokens
    (1 - p, then p / (K - 1) each). Raises ValueError for anything else and for K < 1.

    >>> block_weights(3, 0.5).tolist()
    [0.5, 0.25, 0.25]
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    beta = torch.ones(min(block_size, length or block_size), dtype=torch.float64)
    if weights in ("joint", "uniform"):
        return beta if weights == "joint" else beta / block_size
    if isinstance(weights, str) or not 0 <= weights < 1:
        raise ValueError(f"weights must be joint, uniform or a share in [0, 1), not {weights}")
    beta[0], beta[1:] = 1 - weights, weights / max(1, block_size - 1)
    return beta


def window_weights(mask: Tensor, block_size: int, weights: str | float) -> Tensor:
    """(B, T, K) weights of the K tokens from each token on: 0 from the first one outside the mask
    on, and except for joint renormalised over the rest. No more than T of the K are kept."""
    dtype = common.exact_dtype(mask.device)
    beta = block_weights(block_size, weights, mask.shape[1]).to(dtype).to(mask.device)  # (K,)
    inside = F.pad(mask, (0, len(beta) - 1)).unfold(1, len(beta), 1)  # (B, T, K)
    beta = beta * inside.cumprod(-1)  # (B, T, K)
    some = torch.finfo(dtype).tiny  # outside the mask 0 is divided
    return beta if weights == "joint" else beta / beta.sum(-1, keepdim=True).clamp(min=some)


def anchors(mask: Tensor, block_size: int, layout: str) -> Tensor:
    """(B, T) index of the token whose window gives each token its ratio: the token itself, or the
    first one of its block. Blocks count from the first token of the mask, and anew after a gap."""
    if layout not in ("window", "block"):
        raise ValueError(f"layout must be window or block, not {layout}")
    t = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)  # (B, T)
    if layout == "window":
        return t
    outside = t.masked_fill(mask, -1).cummax(1).values  # (B, T) the last one outside the mask
    return t - (t - outside - 1).clamp(min=0) % block_size


def block_log_ratio(
    log_ratio: Tensor, mask: Tensor, block_size: int, layout: str, weights: str | float
) -> Tensor:
    """(B, T) log R: the weighted sum of token log-ratios over each token's window, or over its
    block (Eq. 8, 9 and 11). 0 outside the mask; differentiable; dtype kept.

    log_ratio (B, T): l. mask (B, T) bool: the trained tokens; no window or block reaches past one
    that is not. Raises ValueError for a block_size below 1, an unknown layout or wrong weights.

    >>> l, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    >>> [block_log_ratio(l, mask, 2, layout, "uniform").tolist() for layout in ("window", "block")]
    [[[1.5, 3.0, 4.0]], [[1.5, 1.5, 4.0]]]
    """
    beta = window_weights(mask, block_size, weights)  # (B, T, K)
    padded = F.pad(log_ratio.masked_fill(~mask, 0), (0, beta.shape[-1] - 1))
    sums = (padded.unfold(1, beta.shape[-1], 1) * beta.to(log_ratio.dtype)).sum(-1)  # (B, T)
    return sums.gather(1, anchors(mask, block_size, layout))


def scaled_eps(mask: Tensor, cfg: Config) -> Tensor:
    """(B, T) clip_eps times the norm of the weights behind each token's ratio.

    If token log-ratios are independent and alike, log R has ||beta||_2 times their spread.
    """
    norms = window_weights(mask, cfg.block_size, cfg.weights).norm(dim=-1)  # (B, T)
    return cfg.clip_eps * norms.gather(1, anchors(mask, cfg.block_size, cfg.layout))


def mpo_loss(log_ratio: Tensor, batch: Batch, normaliser: int, cfg: Config):
    """One micro-batch's part of the loss L in the header, log R, and where the clip cut it.

    log_ratio: l (B, T). normaliser: N, the tokens of the WHOLE optimiser step.
    """
    log_blocks = block_log_ratio(log_ratio, batch.mask, cfg.block_size, cfg.layout, cfg.weights)
    # In one dtype with the ratio: a rounding between two would look like a cut.
    eps = scaled_eps(batch.mask, cfg).to(log_ratio.dtype) if cfg.scale_eps else cfg.clip_eps
    objective, clipped = common.clipped_surrogate(log_blocks, batch.advantages, eps)  # (B, T)
    return -(objective * batch.mask).sum() / normaliser, log_blocks, clipped


# ---------------------------------------------------------------------------- credit assignment


class Credit(NamedTuple):
    samples: list[Sample]  # one per rollout: its whole answer, with advantages and old log-probs
    entropy: float  # the policy's mean entropy over all answer tokens, nats


def assign_credit(model, rollouts, cfg: Config) -> Credit:
    """Rewarded rollouts, group_size to a prompt -> samples with GRPO's advantages."""
    samples = [Sample(r.prompt, r.ids) for r in rollouts]
    entropy = common.score(model, samples, cfg.temperature)
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, cfg.group_size)  # (P, G)
    advantages = common.group_advantages(rewards, cfg.scale_advantages)  # (P, G)
    for s, advantage in zip(samples, advantages.flatten().tolist()):
        s.advantages = [advantage] * len(s.ids)
    return Credit(samples, entropy)


# -------------------------------------------------------------------------------------- the run


def update(
    model, optimizer, schedule, samples: list[Sample], cfg: Config, seed: str, ratios: dict | None = None
) -> dict:
    """`epochs` passes over the samples, `batch_size` to an optimiser step; returns its metrics.

    ratios: takes, for each sample that is trained (by id), its ratios at the last pass and where
    they were cut; None where they are not to be shown.
    """
    sums = dict(loss=0.0, kl=0.0, grad_norm=0.0, token_clip=0.0, block_clip=0.0)
    moments = torch.zeros(2, 2, dtype=torch.float64)  # token and block: sums of ratio and square
    steps, tokens = 0, 0
    for epoch in range(cfg.epochs):
        order = random.Random(f"{seed}-{epoch}").sample(samples, len(samples))
        for i in range(0, len(order), cfg.batch_size):
            minibatch = order[i : i + cfg.batch_size]
            n = sum(len(s.ids) for s in minibatch)
            loss_sum = 0.0
            # A sample without signal has gradient 0: it counts in N, and needs no forward pass.
            for micro in common.micro_batches([s for s in minibatch if any(s.advantages)]):
                batch = common.collate(micro, model.device)
                logprobs = common.token_logprobs(model, batch, cfg.temperature)  # (B, T)
                log_ratio = logprobs - batch.old_logprobs  # (B, T)
                loss, log_blocks, clipped = mpo_loss(log_ratio, batch, n, cfg)
                common.backward(model, loss)
                loss_sum += loss.item()
                log_ratio, log_blocks = log_ratio.detach(), log_blocks.detach()
                _, cut = common.clipped_surrogate(log_ratio, batch.advantages, cfg.clip_eps)
                sums["token_clip"] += cut.sum().item()
                sums["block_clip"] += clipped.sum().item()
                pair = torch.stack([log_ratio, log_blocks])[:, batch.mask].cpu().double()  # (2, N)
                sums["kl"] += common.k3(pair[0]).sum().item()
                ratio = pair.clamp(-10, 10).exp()  # as in the loss
                moments += torch.stack([ratio.sum(1), (ratio**2).sum(1)])
                tokens += pair.shape[1]
                if ratios is not None:
                    for s, row, cuts in zip(micro, log_blocks.exp().tolist(), clipped.tolist()):
                        ratios[id(s)] = row[: len(s.ids)], cuts[: len(s.ids)]
            norm = common.optimizer_step(model, optimizer, schedule, loss_sum, cfg.max_grad_norm)
            sums["loss"], sums["grad_norm"] = sums["loss"] + loss_sum, sums["grad_norm"] + norm
            steps += 1
    metrics = {k: sums[k] / (steps if k in ("loss", "grad_norm") else max(tokens, 1)) for k in sums}
    mean, square = moments / max(tokens, 1)  # (2,), (2,)
    variance = (square - mean**2).clamp(min=0).tolist()
    metrics["token_ratio_var"], metrics["block_ratio_var"] = variance
    return metrics


def show_answer(
    problems, rollouts, credit: Credit, ratios: dict, cfg: Config, tokenizer, colour: bool, width
) -> str:
    """One answer of the step with the ratios it was last trained at: one with a cut, if there is
    any, and a failure if there is a choice.

    Its tokens have the colour of its advantage, and none where the clip cut the gradient.
    """
    trained = [i for i, s in enumerate(credit.samples) if id(s) in ratios]
    if not trained:
        return "no answer carried a signal"
    cut = {i: any(ratios[id(credit.samples[i])][1]) for i in trained}
    i = max(trained, key=lambda i: (cut[i], not rollouts[i].reward))  # the first of equals
    title, notes = common.answer_notes(problems[i], rollouts[i], tokenizer)
    pieces = [tokenizer.decode([id]) for id in rollouts[i].ids]
    s = credit.samples[i]
    shown, clipped = ratios[id(s)]
    blocks = cfg.layout == "block"
    starts = range(0, len(s.ids), cfg.block_size) if blocks else range(len(s.ids))
    labels = {t: f"{shown[t]:.2f}{'*' * clipped[t]}" for t in starts if blocks or clipped[t]}
    credits = [0.0 if cut else advantage for cut, advantage in zip(clipped, s.advantages)]
    lines = common.credit_lines(pieces, credits, labels, notes, colour)
    window = f"each token has a ratio, of {cfg.block_size} tokens from it on; | and *: clipped"
    what = "| opens a block, which has one ratio; *: clipped" if blocks else window
    return "\n".join([f"{title}, advantage {s.advantages[0]:+.2f}", *lines, f"  {what}"])


def updates_of(cfg: Config) -> int:
    """Optimiser updates per step."""
    return cfg.epochs * cfg.prompts * cfg.group_size // cfg.batch_size


def headline(cfg: Config, train: list) -> str:
    matters = "from the second on, ratios leave 1 and K matters"
    return (
        f"MPO: {cfg.steps} steps of {cfg.prompts} problems x {cfg.group_size} answers, "
        f"K = {cfg.block_size}, layout {cfg.layout}, weights {cfg.weights}\n"
        f"updates per step: {updates_of(cfg)}; "
        f"{matters if updates_of(cfg) > 1 else 'all ratios are 1, and no clip acts'}"
    )


def main() -> None:
    setup = common.set_up(Config, "mpo", __doc__, TINY, LARGE, headline)
    cfg, run, folder, train = setup.cfg, setup.run, setup.folder, setup.train
    model, tokenizer, evaluate = setup.model, setup.tokenizer, setup.evaluate
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0)
    warmup, total = cfg.warmup_updates, cfg.steps * updates_of(cfg)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, total)
    generator = torch.Generator(model.device).manual_seed(run.seed)
    trainer = (model, tokenizer, optimizer, schedule, generator)
    progress = common.begin(setup, trainer)
    for step, bar in common.training_steps(folder, run, cfg.steps, trainer, progress):
        # 1. Sample G answers to each problem, and reward them.
        began = time.time()
        problems = common.batch_at(train, step, cfg.prompts, run.seed)
        states = [common.initial_state(tokenizer, problem) for problem in problems]
        options = dict(temperature=cfg.temperature, generator=generator)
        rollouts = common.complete(
            model, tokenizer, states, cfg.group_size, cfg.max_new_tokens, **options
        )
        problems = [problem for problem in problems for _ in range(cfg.group_size)]  # one a rollout

        # 2. Credit each answer, all its tokens alike, with its advantage in its group.
        credit = assign_credit(model, rollouts, cfg)

        # 3. Train on them, a block of tokens being one action.
        seed = f"{run.seed}-{step}"
        ratios = {} if run.show_every and (step + 1) % run.show_every == 0 else None
        with common.saved_if_not_finite(folder, step, trainer, progress):
            metrics = update(model, optimizer, schedule, credit.samples, cfg, seed, ratios)

        progress["sampled_tokens"] += sum(len(r.ids) for r in rollouts)
        progress["seconds"] += time.time() - began
        count = len(rollouts)
        common.log_step(
            folder, run, step, bar, schedule, progress, evaluate,
            accuracy=sum(r.reward for r in rollouts) / count,
            **metrics,
            entropy=credit.entropy,
            no_signal=sum(not any(s.advantages) for s in credit.samples) / count,
            length=sum(len(r.ids) for r in rollouts) / count,
        )  # fmt: skip
        if ratios is not None:
            view = partial(show_answer, problems, rollouts, credit, ratios, cfg, tokenizer)
            common.show(folder, lambda **how: f"step {step + 1}: {view(**how)}")
    common.finish_run(folder, progress, evaluate())


if __name__ == "__main__":
    common.cli(main)
