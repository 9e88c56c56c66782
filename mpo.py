"""MPO: Multi-token Policy Gradient Optimization (arXiv 2602.14386), in one file: a reconstruction,
for no code was released and not every detail is public.

PPO and GRPO take a token for an action. MPO takes K consecutive tokens for one, so that what is
compared with the sampling policy, and clipped, is larger than a token: the importance ratio belongs
to K tokens, and the rest of GRPO stays.

Read `main` at the end first, then from the top; the part "what is shown and logged" can wait. Of
common.py open the data classes (Problem, Rollout, Sample, Batch, Compute), `complete` (with
`sample`), `score` (with `token_logprobs`), `minibatches`, `clipped_surrogate`, `group_advantages`.
--steps counts rounds; a round (`step`) samples, then makes updates (optimiser steps). In names,
"block" stands for K tokens in either layout (below); `window_weights` serves both.

With l_t = log pi(y_t) - log pi_old(y_t), the token log-ratios, the ratio of the K from t on is

    R_t = exp(l_t + ... + l_{t+K-1})                   joint: the product of K ratios (Eq. 8)
    R_t = exp(beta_1 l_t + ... + beta_K l_{t+K-1})     weighted, sum beta = 1 (Eq. 9 and 11)

The K - 1 tokens after the first of the K are the future ones. By default K = 5, in windows, and
the future tokens share a weight of 0.2, so the first one has 0.8. The layouts, for K = 3:

    window: every token t has the ratio of the K tokens from it on

          1     2     +     4     =     1     6
        [      R_1      ] [      R_4      ] [R_7]
              [      R_2      ] [      R_5      ]
                    [      R_3      ] [   R_6   ]

    block: every K tokens share the ratio R_a of the first of them, a

          1     2     +     4     =     1     6
        [      R_1      ] [      R_4      ] [R_7]

    L = -1/N sum_t min(R_a A_t, clip(R_a, 1 - eps, 1 + eps) A_t),    A = GRPO's group advantage

with a = t in windows; in blocks a is the first token of t's block, so a block's term counts as
often as it has tokens. N is the number of tokens of all answers of an update. K = 1 is GRPO, here
without a KL and with the mean over all tokens of an update.

The built-in task is running sums, an operation a line, for a small policy that has learned some
single-digit facts wrong (its warm start) and has to find out which (README).

Confirmed by the abstract and public notes on the paper: K tokens are one action, only the ratio
changes, Eq. 8, 9 and 11, K in {2, 3, 5}, and weights named by the share that the future tokens have
together. Ours, for the paper's details are not public:
 1. The objective: A is GRPO's group advantage; clipped once per window or block; N counts the
    tokens of the whole update.
 2. The future tokens' probabilities are the policy's own, teacher-forced on what was sampled. (An
    earlier version of the paper trains extra heads that predict them from the state at t. What the
    present one does is not public.)
 3. Both layouts: which one the paper has is not public.
 4. Weights: `joint`, `uniform` (1/K), or a share p of the weight for all future tokens together, in
    equal parts. Where fewer than K tokens are left, beta is renormalised over those there are
    (joint is not).
Additions and choices of ours:
 5. --scale_eps multiplies the clip range by the L2 norm of beta, for a fair comparison of weights:
    log R has that many times the spread of l, if token log-ratios are independent and alike.
 6. No KL term; sizes suit the small policy of the built-in task. The learning rate falls to 0: a
    constant one, with several updates a round, left the last accuracies swinging.

While the policy is the one that sampled, all ratios are 1 and no clip acts. Then the gradient of
-N L is a weighted sum of grad log pi(y_t) A_t. In GRPO each weight is 1; here it is the sum of this
token's beta over all terms of L whose ratio contains it. Away from the ends of an answer:

    joint, either      K
    window             beta_1 + ... + beta_K = 1
    block, uniform     its ratio counts K times, each at weight 1/K: 1
    block, share p     K (1 - p) for the block's first token, K p / (K - 1) for the others

At the ends: in windows the first K - 1 tokens weigh less, for fewer windows hold them, and the last
ones more where beta is renormalised (p = 0: all weigh 1). In a last block of n tokens each weighs n
times its beta, which is renormalised unless joint.

With one update a round K shows in these weights alone. By default a round makes four updates: from
the second on ratios leave 1, and K acts through them and the clip as well.

    python mpo.py                   a minute on two cores, if the warm start is there; held-out
                                    accuracy 0.21 -> 0.83 (ten seeds: 0.22 -> 0.89)
    python mpo.py --block_size 1    GRPO
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import common  # first: Ctrl-C during the imports ends without a traceback
import torch
import torch.nn.functional as F
from common import BadInput, Batch, Compute, Problem, Sample, arg
from torch import Tensor
from transformers import get_linear_schedule_with_warmup


@dataclass
class Config:
    block_size: int = arg(5, "tokens that make one action (K); 1: GRPO", low=1, high=math.inf)
    layout: Literal["window", "block"] = arg("window", "a window at every token, or blocks")
    weights: str = arg("0.2", "joint, uniform, or the share p of all future tokens together")
    scale_eps: bool = arg(False, "multiply clip_eps by the L2 norm of the weights")
    scale_advantages: bool = arg(True, "divide advantages by their group's std")
    prompts: int = arg(32, "problems per round", low=1)
    group_size: int = arg(8, "answers per problem (G)", low=2)
    batch_size: int = arg(64, "answers per update; divides prompts x group_size", low=1)
    epochs: int = arg(1, "passes over each round's answers", low=1)
    steps: int = arg(50, "rounds of sampling and training", low=1)
    lr: float = arg(
        5e-4, "AdamW's highest learning rate; from there it falls linearly to 0", above=0
    )
    warmup_updates: int = arg(10, "updates over which the learning rate rises from 0", low=0)
    clip_eps: float = arg(0.2, "clip range of the ratio (eps)", above=0)
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm", above=0, high=1e12)
    temperature: float = arg(1.0, "of sampling and of scoring", low=0.01)
    max_new_tokens: int = arg(80, "longest answer, in tokens", low=1)

    def __post_init__(self):
        common.check_bounds(self)
        try:  # a share comes as text, and is a number from here on
            if self.weights not in ("joint", "uniform"):
                self.weights = float(self.weights)
            block_weights(self.block_size, self.weights, length=1)  # raises for wrong weights
        except ValueError:
            wanted = "must be joint, uniform, or a share in [0, 1)"
            raise BadInput(f"--weights {self.weights}: {wanted}") from None
        answer_count = self.prompts * self.group_size
        if answer_count % self.batch_size:  # all updates are of one size
            wrong = f"--batch_size {self.batch_size}"
            raise BadInput(f"{wrong}: must divide {answer_count} answers a round")


# --tiny sets these defaults of Config and of common.RunConfig.
TINY = dict(
    terms=3, warm_start_steps=250, steps=40, max_new_tokens=32, eval_problems=200, eval_samples=2,
    show_every=20, save_every=20,
)  # fmt: skip
# A --model given with --data (not the built-in task) sets these.
LARGE = dict(lr=1e-6)


# ------------------------------------------------------------------------------- pure functions


def block_weights(block_size: int, weights: str | float, length: int | None = None) -> Tensor:
    """(min(K, length),) float64: beta_1, beta_2, ... before any tail is renormalised.

    weights: "joint" (all 1), "uniform" (1/K), or the share p in [0, 1) of the K - 1 future tokens
    (1 - p, then p / (K - 1) each). length: only the first so many are needed. If K exceeds the
    length, layout block makes one block of the answer; its log-ratio with uniform weights is then
    the mean over its tokens, as in GSPO (once `window_weights` has renormalised them). For K = 1
    and a share, beta is [1 - p], which is renormalised to 1. Raises ValueError for anything else
    and for K < 1.

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
    """(B, T, min(K, T)) the weights of the K tokens of each token's window: 0 from the first one
    outside the mask on; the others are renormalised, except for joint.

    >>> window_weights(torch.tensor([[True, True, False]]), 2, 0.2).tolist()
    [[[0.8, 0.2], [1.0, 0.0], [0.0, 0.0]]]
    """
    # In float64, if the device has it: rounded once, when cast to l's dtype. K is min(K, T) here.
    dtype = common.exact_dtype(mask.device)
    beta = block_weights(block_size, weights, mask.shape[1]).to(dtype).to(mask.device)  # (K,)
    inside = F.pad(mask, (0, len(beta) - 1)).unfold(1, len(beta), 1)  # (B, T, K)
    beta = beta * inside.cumprod(-1)  # (B, T, K)
    if weights == "joint":
        return beta
    smallest = torch.finfo(dtype).tiny  # not 0 / 0 outside the mask
    return beta / beta.sum(-1, keepdim=True).clamp(min=smallest)


def anchors(mask: Tensor, block_size: int, layout: str) -> Tensor:
    """(B, T) index a(t) of the token whose window gives each token its ratio: the token itself, or
    the first one of its block, for a block's ratio is that of the window at its first token. Blocks
    count from each row's first token in the mask, and anew after a gap (no mask here has one).

    >>> anchors(torch.ones(1, 7, dtype=torch.bool), 3, "block").tolist()
    [[0, 0, 0, 3, 3, 3, 6]]
    """
    if layout not in ("window", "block"):
        raise ValueError(f"layout must be window or block, not {layout}")
    t = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)  # (B, T)
    if layout == "window":
        return t
    outside = t.masked_fill(mask, -1).cummax(1).values  # (B, T) the last one outside the mask
    place = (t - outside - 1).clamp(min=0)  # t's place in its run of mask tokens, from 0
    return t - place % block_size


def block_log_ratio(
    log_ratio: Tensor, mask: Tensor, block_size: int, layout: str, weights: str | float
) -> Tensor:
    """(B, T) log R: the weighted sum of token log-ratios over each token's window, or over its
    block (Eq. 8, 9 and 11). 0 outside the mask; differentiable; dtype kept.

    log_ratio (B, T): l. mask (B, T) bool: the trained tokens; a window or block ends before one
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
    """(B, T) clip_eps times the L2 norm of the weights behind each token's ratio.

    If token log-ratios are independent and alike, log R has ||beta|| times their spread.
    """
    norms = window_weights(mask, cfg.block_size, cfg.weights).norm(dim=-1)  # (B, T)
    return cfg.clip_eps * norms.gather(1, anchors(mask, cfg.block_size, cfg.layout))


def mpo_loss(log_ratio: Tensor, batch: Batch, normaliser: int, cfg: Config):
    """One micro-batch's part of L, log R (B, T), and (B, T) bool: where the clip has stopped the
    gradient.

    log_ratio: l (B, T). normaliser: N, the tokens of the WHOLE update.
    """
    log_blocks = block_log_ratio(log_ratio, batch.mask, cfg.block_size, cfg.layout, cfg.weights)
    # In l's dtype: `clipped_surrogate` tells where it clips by comparing two products, and if one
    # were of another dtype, rounding alone could make them differ.
    eps = scaled_eps(batch.mask, cfg).to(log_ratio.dtype) if cfg.scale_eps else cfg.clip_eps
    objective, clipped = common.clipped_surrogate(log_blocks, batch.advantages, eps)  # (B, T)
    return -(objective * batch.mask).sum() / normaliser, log_blocks, clipped


# ---------------------------------------------------------------------------- credit assignment


class Credit(NamedTuple):
    samples: list[Sample]  # one per rollout: its whole answer, with advantages and old log-probs
    entropy: float  # the policy's mean entropy over all answer tokens, nats


def assign_credit(model, rollouts, cfg: Config, compute=Compute()) -> Credit:
    """Rewarded rollouts, group_size to a prompt -> samples with GRPO's advantages."""
    samples = [Sample(r.prompt, r.ids) for r in rollouts]
    # This also fills in each sample's old log-probs.
    entropy = common.score(model, samples, cfg.temperature, compute)
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, cfg.group_size)  # (P, G)
    advantages = common.group_advantages(rewards, cfg.scale_advantages)  # (P, G)
    for s, advantage in zip(samples, advantages.flatten().tolist()):
        s.advantages = [advantage] * len(s.ids)
    return Credit(samples, entropy)


# ----------------------------------------------------------------------------------- the update


def update(
    model, optimizer, schedule, samples: list[Sample], cfg: Config, shuffle: str,
    ratios: dict | None = None, scaler=common.IDLE, compute=Compute(),
) -> dict:  # fmt: skip
    """A round's updates: `epochs` passes over the samples, `batch_size` to an update. Returns means
    per update (loss, gradient norm), variances of ratios, and per trained token the rest.

    shuffle: the seed of their order. ratios: filled in here, for the display: id(sample) -> its
    ratios at its last pass, and where they were clipped. None where nothing is shown.
    """
    totals = Counter()  # whose update() adds
    for minibatch in common.minibatches(samples, cfg.batch_size, cfg.epochs, shuffle):
        n = sum(len(s.ids) for s in minibatch)
        # Without signal a sample has gradient 0: it counts in N, and needs no forward pass. If none
        # has signal, there is no gradient, and only the schedule moves.
        with_signal = [s for s in minibatch if any(s.advantages)]
        loss_sum = 0.0
        for micro in common.micro_batches(with_signal, compute.training_tokens):
            batch = common.collate(micro, model.device)
            logprobs = common.token_logprobs(model, batch, cfg.temperature, compute=compute)
            log_ratio = logprobs - batch.old_logprobs  # (B, T)
            loss, log_blocks, clipped = mpo_loss(log_ratio, batch, n, cfg)
            scaler.scale(loss).backward()
            loss_sum += loss.item()
            totals.update(diagnose(log_ratio.detach(), log_blocks.detach(), batch, clipped, cfg))
            if ratios is not None:
                for s, row, flags in zip(micro, log_blocks.exp().tolist(), clipped.tolist()):
                    ratios[id(s)] = row[: len(s.ids)], flags[: len(s.ids)]
        norm = common.optimizer_step(
            model, optimizer, schedule, loss_sum, cfg.max_grad_norm, scaler
        )
        totals.update(updates=1, loss=loss_sum, grad_norm=norm)
    metrics = common.averages(totals, ("kl", "token_clip", "block_clip"))
    for kind in ("token", "block"):  # var R = E[R^2] - E[R]^2
        mean = totals[f"{kind}_ratio"] / max(totals["tokens"], 1)
        square = totals[f"{kind}_ratio_squared"] / max(totals["tokens"], 1)
        metrics[f"{kind}_ratio_var"] = max(square - mean**2, 0.0)
    return metrics


def diagnose(log_ratio, log_blocks, batch: Batch, clipped: Tensor, cfg: Config) -> dict:
    """Sums over the tokens of samples with a signal. kl: estimates KL(pi_old || pi). block_clip:
    where the clip stops the gradient, token_clip: where it would if a token were an action. For
    both, the ratio and its square: *_ratio, *_ratio_squared."""
    _, token_clipped = common.clipped_surrogate(log_ratio, batch.advantages, cfg.clip_eps)
    rows = torch.stack([log_ratio, log_blocks])[:, batch.mask].cpu().double()  # (2, tokens)
    ratios = rows.clamp(-10, 10).exp()  # as in clipped_surrogate
    token_sum, block_sum = ratios.sum(1).tolist()
    token_squares, block_squares = (ratios**2).sum(1).tolist()
    return dict(
        kl=common.k3(rows[0]).sum().item(),
        token_clip=token_clipped.sum().item(), block_clip=clipped.sum().item(),
        token_ratio=token_sum, token_ratio_squared=token_squares,
        block_ratio=block_sum, block_ratio_squared=block_squares, tokens=rows.shape[1],
    )  # fmt: skip


# ---------------------------------------------------------------------- what is shown and logged


def describe_step(rollouts, credit: Credit) -> dict:
    """A round's metrics that are not the update's (tutorials/curves.py, COLUMNS)."""
    return dict(
        entropy=credit.entropy,
        no_signal=sum(not any(s.advantages) for s in credit.samples) / len(rollouts),
        length=sum(len(r.ids) for r in rollouts) / len(rollouts),
    )


def show_answer(
    problems, rollouts, credit: Credit, ratios: dict, cfg: Config, tokenizer, colour, width
) -> str:
    """One answer of the round with the ratios it was last trained at: one with a clipped ratio, if
    there is any, and a failure if there is a choice.

    Its tokens have the colour of its advantage, and none where their own window or block was
    clipped; earlier windows may still train them. colour, width: given by common.show.
    """
    trained = [i for i, s in enumerate(credit.samples) if id(s) in ratios]
    if not trained:
        return "no answer carried a signal"

    def interest(i: int) -> tuple[bool, bool]:
        _, clipped = ratios[id(credit.samples[i])]
        return any(clipped), not rollouts[i].reward

    i = max(trained, key=interest)  # the first of equals
    title, notes = common.answer_notes(problems[i], rollouts[i], tokenizer)
    pieces = [tokenizer.decode([token]) for token in rollouts[i].ids]
    s = credit.samples[i]
    shown, clipped = ratios[id(s)]
    labels = {}  # beside the tokens they stand for: each block's ratio, or the clipped windows'
    for t in range(0, len(s.ids), cfg.block_size if cfg.layout == "block" else 1):
        if cfg.layout == "block" or clipped[t]:
            labels[t] = f"{shown[t]:.2f}" + ("*" if clipped[t] else "")
    credits = [0.0 if cut else advantage for cut, advantage in zip(clipped, s.advantages)]
    lines = common.credit_lines(pieces, credits, labels, notes, colour)
    what = "| opens a block, which has one ratio; *: clipped"
    if cfg.layout == "window":
        what = f"each token has a ratio, of {cfg.block_size} tokens from it on; | and *: clipped"
    return "\n".join([f"{title}, advantage {s.advantages[0]:+.2f}", *lines, f"  {what}"])


# -------------------------------------------------------------------------------------- the run


def updates_of(cfg: Config) -> int:
    """Updates per round."""
    return cfg.epochs * cfg.prompts * cfg.group_size // cfg.batch_size


def headline(cfg: Config, train: list[Problem]) -> str:
    later = "from the second on ratios leave 1, and K acts through them and the clip"
    one = "all ratios are 1, no clip acts, and K shows in the weights of tokens alone"
    return (
        f"MPO: {cfg.steps} rounds of {cfg.prompts} problems x {cfg.group_size} answers, "
        f"K = {cfg.block_size}, layout {cfg.layout}, weights {cfg.weights}\n"
        f"updates per round: {updates_of(cfg)}; {later if updates_of(cfg) > 1 else one}"
    )


def main() -> None:
    setup = common.set_up(Config, "mpo", __doc__, TINY, LARGE, headline)
    cfg, run, compute = setup.cfg, setup.run, setup.compute
    model, tokenizer, generator = setup.model, setup.tokenizer, setup.generator
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0)
    updates = updates_of(cfg)  # a round
    schedule = get_linear_schedule_with_warmup(optimizer, cfg.warmup_updates, cfg.steps * updates)
    setup = setup._replace(optimizer=optimizer, schedule=schedule)
    progress = common.begin(setup)
    for step, bar in common.training_steps(setup, progress):
        # 1. Sample G answers to each problem, and reward them.
        began = time.time()
        problems = common.batch_at(setup.train, step, cfg.prompts, run.seed)
        states = [common.initial_state(tokenizer, p, setup.instruction) for p in problems]
        rollouts = common.complete(
            model, tokenizer, states, n=cfg.group_size, max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature, generator=generator, compute=compute,
        )  # fmt: skip

        # 2. Old log-probs, and each answer's advantage in its group, the same for all its tokens.
        credit = assign_credit(model, rollouts, cfg, compute)

        # 3. Train on the credited samples, K tokens being one action.
        shuffle = f"{run.seed}-{step}"
        ratios = {} if common.is_shown(run, step) else None
        # At a loss or gradient that is not finite the run stops, with its state saved.
        with common.saved_if_not_finite(setup, step, progress):
            metrics = update(
                model, optimizer, schedule, credit.samples, cfg, shuffle, ratios=ratios,
                scaler=setup.scaler, compute=compute,
            )  # fmt: skip

        # 4. Log.
        progress["sampled_tokens"] += sum(len(r.ids) for r in rollouts)
        progress["seconds"] += time.time() - began
        accuracy = sum(r.reward for r in rollouts) / len(rollouts)
        metrics = dict(accuracy=accuracy) | metrics | describe_step(rollouts, credit)
        common.log_step(setup, step, bar, progress, metrics, answers=rollouts)
        if common.is_shown(run, step):
            owners = [problem for problem in problems for _ in range(cfg.group_size)]
            view = partial(show_answer, owners, rollouts, credit, ratios, cfg, tokenizer)
            common.show(setup.folder, step, view)
    common.finish_run(setup, progress)


if __name__ == "__main__":
    common.cli(main)
