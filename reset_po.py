"""RRPO and SRPO: "Credit Assignment with Resets" (arXiv 2605.25507 v2), in one file.

Whatever was right in a failed attempt need not be sampled again: go back to a step of it, sample
other continuations from there, and learn from how they compare. An answer has reward r = 1 if its
final answer (behind ####) is right, else 0, and has then failed. A step is a line of an answer.

Read `main` at the end first, then from the top; the part "what is shown and logged" can wait. Of
common.py open the data classes (Problem, Rollout, Sample, Batch, Compute), `complete` (with
`sample`), `score` (with `token_logprobs`), `minibatches`, `step_starts` (`text_lengths`),
`group_advantages` and `optimizer_step`.
--steps counts rounds; a round (`step`) samples, then makes updates (optimiser steps). Only in
`main`, `describe_step` and `step_counts` is a step such a round; else it is a line.

With G = 4, for each prompt x0,

    base  = G answers to x0; the first failed one, the seed, is cut into steps 1 ... H
    RRPO: h ~ Uniform{1 ... H}
    SRPO: h = the first wrong step as the localiser names it (the paper asks the policy: point 2)
    reset = G continuations of x* = x0 + the seed's steps 1 ... h - 1
    A     = (r - mean) / std of the own group, exactly 0 if all are equal
    L     = -1/(2G) sum_i A_i mean_t log pi(y_i,t)    over all 2G; mean over x0

    x0  14+7+5:           +-- 14+7=21 / 21+5=26 / #### 26   r = 1, A > 0   base group,
                          +-- ...                                         trained from x0 on
        the seed:         +-- 14+7=21 / 21+5=27 / #### 27   r = 0, A < 0
                                        |
                                        | h = 2
    x*  14+7+5: 14+7=21 /               +-- 21+5=26 / #### 26   r = 1, A > 0   reset group,
                                        +-- 21+5=27 / #### 27   r = 0, A < 0   trained from x* on

" / " is a line break. GRPO here: no resets, but one group of 2G answers to x0, and the same L, so
no KL, ratio or clip, and a mean over the tokens of each answer.

The built-in task is running sums, an operation a line, for a small policy that has learned some
single-digit facts wrong (its warm start) and has to find out which (README).

Departures from the paper, or from the authors' code:
 1. The seed stays in the base group, whose G answers are then i.i.d. The paper drops it and draws
    until G others exist (--seed_rule paper); without its failure a base group has too many
    successes.
 2. A small policy cannot be asked for its mistake. Localisers of our own: `uncertain` returns to
    the first step that holds a token sampled below a probability (a cutpoint of SPO, arXiv
    2505.23564), `surprise` to that of the least likely token; `oracle` knows the step. Models with
    a chat template are asked, as in the paper (`prompt`), in words of our own.
 3. If none of the G has failed, G more answers join them: one group of 2G. The authors' code looks
    for a failure among 12 answers; if there is none, it keeps the first G, draws G new ones, and
    throws the other tries away.
 4. Steps are lines, cut on token ids; the paper's models mark their steps with a delimiter.
 5. Sizes and learning rate, which falls to 0, suit the small policy of the built-in task; the paper
    trains LoRA. By default sampling is at temperature 1 (paper and LARGE: 0.7), always without
    top-p (paper: 0.95).
 6. --clip_eps adds PPO's ratio and clip. The paper's loss does without: its gradient equals PPO's
    at ratio 1, as in the first update of a round (by default the only one); later updates are
    off-policy and uncorrected.
 7. All rollouts of a round make one update (the authors' code: those of 8 of the 32 prompts),
    without weight decay (theirs: 0.01); a localiser's reply has at most 512 tokens (theirs: 4,096).

    python reset_po.py                   1.5 minutes on two cores, if the warm start is there;
                                         held-out accuracy 0.21 -> 0.80 (ten seeds: 0.22 -> 0.85)
    python reset_po.py --method rrpo     random resets
    python reset_po.py --method grpo     no resets: groups of 2G
"""

import re
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import common  # first: Ctrl-C during the imports ends without a traceback
import torch
from common import BadInput, Batch, Compute, Problem, Rollout, Sample, arg, step_starts
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

TRIES = 12  # answers among which the paper looks for a failure
LOCALISER_TEMPERATURE = 0.3  # the paper's; the policy is asked once for each seed


@dataclass
class Config:
    method: Literal["srpo", "rrpo", "grpo"] = arg("srpo", "resets: localised, random, none")
    localiser: Literal["auto", "prompt", "uncertain", "surprise", "random", "oracle"] = arg(
        "auto", "names the step; auto: prompt where there is a chat template, else uncertain"
    )
    threshold: float = arg(
        0.9, "uncertain: probability below which a token marks its step (rho)", above=0, high=1
    )
    localiser_tokens: int = arg(512, "prompt: longest localisation text, in tokens", low=1)
    delimiter: str = arg(r"\n", r"what ends a step; \n is a line break")
    max_steps: int = arg(20, "most steps of an answer; the last one takes the rest", low=1)
    fresh: int = arg(
        4, "answers per problem: the base group (G); 0: it stays empty if a failure is found", low=0
    )
    resets: int = arg(4, "continuations per reset: the reset group (G)", low=0)
    seeds: int = arg(1, "failed answers per problem to reset", low=0)
    seed_rule: Literal["keep", "paper"] = arg("keep", "paper: the seed leaves the base group")
    prompts: int = arg(32, "problems per round", low=1)
    batch_size: int = arg(0, "rollouts per update; 0: all of a round, else divides them", low=0)
    epochs: int = arg(1, "passes over each round's rollouts", low=1)
    steps: int = arg(80, "rounds of sampling and training", low=1)
    lr: float = arg(
        5e-4, "AdamW's highest learning rate; from there it falls linearly to 0", above=0
    )
    warmup_updates: int = arg(10, "updates over which the learning rate rises from 0", low=0)
    clip_eps: float = arg(
        0.0, "clip range of the ratio (eps); 0: no ratio, the paper's loss", low=0
    )
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm", above=0, high=1e12)
    temperature: float = arg(1.0, "of sampling and of scoring", low=0.01)
    max_new_tokens: int = arg(80, "longest answer, in tokens", low=1)

    def __post_init__(self):
        common.check_bounds(self)
        self.delimiter = self.delimiter.replace(r"\n", "\n")  # as a shell passes it on
        if not self.delimiter:
            raise BadInput("--delimiter '': a step needs an end")
        if self.method != "srpo" and self.localiser not in ("auto", "random"):
            raise BadInput(f"--localiser {self.localiser}: --method {self.method} asks for none")
        if self.method != "srpo":
            self.localiser = "random"  # RRPO; grpo asks none
        if self.method == "grpo" or not self.resets * self.seeds:
            self.fresh = self.rollouts  # GRPO: all 2G are answers to the prompt
            self.resets = self.seeds = 0
        if self.fresh == 1 or self.resets == 1 or not self.rollouts:
            wrong = f"--fresh {self.fresh} --resets {self.resets} --seeds {self.seeds}"
            raise BadInput(f"{wrong}: a group needs 2 rollouts or more")
        rollout_count = self.prompts * self.rollouts
        self.batch_size = self.batch_size or rollout_count
        if rollout_count % self.batch_size:  # all updates are of one size
            wrong = f"--batch_size {self.batch_size}"
            raise BadInput(f"{wrong}: must divide {rollout_count} rollouts a round")

    @property
    def rollouts(self) -> int:
        """Trained rollouts per problem: 2G."""
        return self.fresh + self.resets * self.seeds


# --tiny sets these defaults of Config and of common.RunConfig.
TINY = dict(
    lr=1e-3, terms=3, warm_start_steps=250, steps=50, max_new_tokens=32, eval_problems=200,
    eval_samples=2, show_every=25, save_every=25,
)  # fmt: skip
# A --model given with --data (not the built-in task) sets these.
LARGE = dict(lr=1e-6, temperature=0.7)  # the paper's rate is for LoRA: 5e-5


# ------------------------------------------------------------------------------- pure functions


class Plan(NamedTuple):
    more: int  # answers still to be drawn from the prompt; 0: the groups are settled
    seeds: list[int]  # which of those drawn are failures to reset
    base: list[int]  # which make up the base group; while `more` > 0, which may


def plan_groups(rewards: list[float], cfg: Config) -> Plan:
    """What the rewards of the answers drawn so far decide, and how many more are certainly needed.

    keep:  the seeds are the first failures among the `fresh` answers, which are the base group.
    paper: the seeds are the first failures among up to TRIES answers, and leave the base group,
           which is made up of `fresh` others. Where `fresh` is 0, this holds by either rule.

    For each seed that is not found, `resets` answers drawn anew join the base group. (By paper the
    tries beyond the first `fresh` are not used: all successes, they add nothing to compare.)

    >>> plan_groups([1.0, 0.0, 1.0, 0.0], Config())
    Plan(more=0, seeds=[1], base=[0, 1, 2, 3])
    >>> plan_groups([1.0, 1.0, 1.0, 1.0], Config())
    Plan(more=4, seeds=[], base=[0, 1, 2, 3])
    >>> plan_groups([1.0, 0.0, 1.0, 0.0, 1.0], Config(seed_rule="paper"))
    Plan(more=0, seeds=[1], base=[0, 2, 3, 4])
    >>> plan_groups([1.0] * 12, Config(seed_rule="paper"))
    Plan(more=4, seeds=[], base=[0, 1, 2, 3])
    """
    keep = cfg.seed_rule == "keep" and cfg.fresh > 0
    drawn = len(rewards)  # 0 at first; a problem is planned again whenever answers have been drawn
    limit = cfg.fresh if keep else TRIES  # the seeds are looked for among so many
    seeds = [i for i in range(min(limit, drawn)) if not rewards[i]][: cfg.seeds]
    candidates = [i for i in range(drawn) if keep or i not in seeds]  # may stand in the base group
    missing = cfg.seeds - len(seeds)
    if missing and drawn < limit:  # look on
        # paper: what base group and seeds still lack, at least one for each missing seed; then it
        # is planned again. keep: min() makes it the rest of the `fresh`.
        needed = max(missing, cfg.fresh + cfg.seeds - drawn)
        return Plan(min(limit - drawn, needed), seeds, candidates)
    base = candidates[: cfg.fresh]
    joining = [i for i in candidates[cfg.fresh :] if i >= limit]  # drawn anew, after the search
    joining = joining[: cfg.resets * missing]
    # What the base group itself lacks, and what is to stand in for the seeds that are missing.
    more = (cfg.fresh - len(base)) + (cfg.resets * missing - len(joining))
    return Plan(more, seeds, base + joining)


# A localiser names the step h to go back to. `starts`: the index of each step's first token, H of
# them, the first 0. Steps count from 1, as in the paper.


def step_of(t: int, starts: list[int]) -> int:
    """The step that holds token t.

    >>> [step_of(t, [0, 8, 16]) for t in (0, 7, 8, 99)]
    [1, 1, 2, 3]
    """
    return bisect_right(starts, t)


def localise_random(starts: list[int], generator: torch.Generator) -> int:
    """h ~ Uniform{1 ... H}: RRPO."""
    return 1 + torch.randint(len(starts), (), generator=generator, device=generator.device).item()


def localise_surprise(probs: list[float], starts: list[int]) -> int:
    """The step with the token that the policy found least likely. probs (T,): pi(y_t)."""
    return step_of(min(range(len(probs)), key=lambda t: probs[t]), starts)


def localise_uncertain(probs: list[float], starts: list[int], threshold: float) -> int:
    """The first step with a token sampled at a probability below `threshold`; if no token is, the
    one with the least likely token. Where the policy could have written something else, it can be
    wrong; the first such step mostly lies at the mistake or before it, where it can be avoided.
    """
    for t, p in enumerate(probs):
        if p < threshold:
            return step_of(t, starts)
    return localise_surprise(probs, starts)


def localise_oracle(ids: list[int], starts: list[int], problem: Problem, tokenizer) -> int:
    """The first step that is truly wrong: the oracle of the paper's Section 3 (CPI-CARO,
    Conservative Policy Iteration with a Credit Assignment Reset Oracle). A failure with no wrong
    step was cut short: then the last step."""
    wrong = common.first_wrong_token(ids, problem, tokenizer)
    return len(starts) if wrong is None else step_of(wrong, starts)


def localisation_prompt(question: str, steps: list[str]) -> str:
    """Asks for the originating error of a failed attempt; the true answer is not in it."""
    numbered = "\n".join(f"Step {k}: {step}" for k, step in enumerate(steps, 1))
    return (
        f"Here is a problem and an attempt at it, whose final answer is wrong.\n\n"
        f"Problem:\n{question}\n\nAttempt:\n{numbered}\n\n"
        f"Which step holds the first mistake, the one that made the final answer wrong? Check the "
        f"steps one after the other, but do not solve the problem again. End with a last line that "
        f"is only the step's number, from 1 to {len(steps)}, in a box: \\boxed{{N}}"
    )


def parse_step(text: str, count: int) -> int:
    r"""The step that a localiser's reply names: the last boxed integer within 1 ... count, as in
    \boxed{3} or \boxed{\text{Step} 3.}, else the last "Step k" within it, else 1. The authors'
    code takes the last box alone.

    >>> parse_step(r"Step 2 is fine, step 3 is not. \boxed{3}", 5), parse_step("Step 9", 5)
    (3, 1)
    """
    boxed = r"\\boxed\s*\{(?:\s|step|\\text\s*\{[^{}]*\})*([0-9]{1,9})[\s.]*\}"
    for pattern in (boxed, r"\bstep[\s:#]{0,3}([0-9]{1,9})\b"):
        named = [int(k) for k in re.findall(pattern, text, re.IGNORECASE)]
        if named := [k for k in named if 1 <= k <= count]:
            return named[-1]
    return 1


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x where mask is True, over all of it or along `dim`; 0 if it is True nowhere."""
    return (x * mask).sum(dim) / mask.sum(dim).clamp(min=1)


def reset_loss(logprobs: Tensor, batch: Batch, normaliser: int, clip_eps: float):
    """One micro-batch's part of L, and (B, T) bool: where the clip has stopped the gradient.

    normaliser: the rollouts of the WHOLE update, each of the same weight whatever its length.
    clip_eps: 0 for the paper's loss, without a ratio.
    """
    if clip_eps:
        log_ratio = logprobs - batch.old_logprobs  # (B, T)
        objective, clipped = common.clipped_surrogate(log_ratio, batch.advantages, clip_eps)
    else:
        objective, clipped = batch.advantages * logprobs, torch.zeros_like(batch.mask)  # (B, T)
    means = masked_mean(objective, batch.mask, dim=1)  # (B,)
    return -means.sum() / normaliser, clipped


# ---------------------------------------------------------------------------- credit assignment


class Reset(NamedTuple):
    problem: Problem
    seed: Sample  # the failed answer, with its log-probs
    starts: list[int]  # its steps' first tokens
    named: int  # the step to go back to
    truth: int | None  # its first wrong step, where the task can tell
    group: list[Rollout]  # the continuations; their prompts end with the steps that were kept


def draw_answers(model, tokenizer, states, cfg: Config, generator, compute=Compute()):
    """Answers to each problem until its groups are settled: (list[list[Rollout]], list[Plan]).

    states: (prompt ids, nothing yet, true answer) of each problem.
    """
    drawn = [[] for _ in states]
    while True:
        plans = [plan_groups([r.reward for r in rollouts], cfg) for rollouts in drawn]
        wanted = [i for i, plan in enumerate(plans) for _ in range(plan.more)]  # one per answer
        if not wanted:
            return drawn, plans
        rollouts = common.complete(
            model, tokenizer, [states[i] for i in wanted], n=1, max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature, generator=generator, compute=compute,
        )  # fmt: skip
        for i, r in zip(wanted, rollouts):
            drawn[i].append(r)


def localise_prompt(
    model, tokenizer, questions, seeds, all_starts, cfg: Config, generator, compute=Compute()
):
    """The step that the policy names when asked, for each seed, and how many tokens it wrote.

    The question goes through the chat template if there is one; if it leaves no room for a reply,
    the step is 1.
    """
    prompts, rooms = [], []
    for question, s, starts in zip(questions, seeds, all_starts):
        spans = zip(starts, [*starts[1:], len(s.ids)])
        steps = [tokenizer.decode(s.ids[a:b], skip_special_tokens=True).strip() for a, b in spans]
        ids = common.user_turn(tokenizer, localisation_prompt(question, steps))
        room = common.answer_budget(model, ids, cfg.localiser_tokens)
        prompts.append(ids if room > 0 else ids[:1])  # a stand-in: with no room none is sampled
        rooms.append(max(0, room))
    rollouts = common.sample(
        model, prompts, n=1, max_new_tokens=rooms, eos=common.eos_ids(model, tokenizer),
        temperature=LOCALISER_TEMPERATURE, generator=generator, compute=compute,
    )  # fmt: skip
    texts = [tokenizer.decode(r.ids, skip_special_tokens=True) for r in rollouts]
    named = [parse_step(text, len(starts)) for text, starts in zip(texts, all_starts)]
    return named, sum(len(r.ids) for r in rollouts)


def probs_of(s: Sample) -> list[float]:
    return torch.tensor(s.old_logprobs).exp().tolist()


def pick_localiser(cfg: Config, tokenizer) -> str:
    """What --localiser auto means: the paper's prompt for a model that can be talked to."""
    if cfg.localiser != "auto":
        return cfg.localiser
    return "prompt" if tokenizer.chat_template else "uncertain"


def localise(
    model, tokenizer, problems, seeds, all_starts, cfg: Config, generator, compute=Compute()
):
    """The step to go back to for each seed, by the localiser of cfg; how many tokens that took."""
    localiser = pick_localiser(cfg, tokenizer)
    if localiser == "prompt":
        questions = [problem.question for problem in problems]
        return localise_prompt(
            model, tokenizer, questions, seeds, all_starts, cfg, generator, compute
        )
    named = []
    for problem, s, starts in zip(problems, seeds, all_starts):
        if localiser == "random":
            named.append(localise_random(starts, generator))
        elif localiser == "oracle":
            named.append(localise_oracle(s.ids, starts, problem, tokenizer))
        elif localiser == "surprise":
            named.append(localise_surprise(probs_of(s), starts))
        else:
            named.append(localise_uncertain(probs_of(s), starts, cfg.threshold))
    return named, 0


def reset_seeds(model, tokenizer, problems, seeds, cfg: Config, generator, compute=Compute()):
    """Go back to a step of each seed, and go on from there: (list[Reset], how many tokens the
    localiser took)."""
    if not seeds:
        return [], 0
    stops = common.eos_ids(model, tokenizer)
    all_starts = [step_starts(s.ids, tokenizer, cfg.delimiter, cfg.max_steps, stops) for s in seeds]
    named, tokens = localise(model, tokenizer, problems, seeds, all_starts, cfg, generator, compute)
    states = []
    for problem, s, starts, h in zip(problems, seeds, all_starts, named):
        kept = s.ids[: starts[h - 1]]  # steps 1 ... h - 1; none for h = 1
        states.append((s.context, kept, problem.answer))  # x*
    # The budget is that of the whole answer, kept steps included.
    rollouts = common.complete(
        model, tokenizer, states, n=cfg.resets, max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature, generator=generator, compute=compute,
    )  # fmt: skip
    resets = []
    for i, (problem, s, starts, h) in enumerate(zip(problems, seeds, all_starts, named)):
        wrong = common.first_wrong_token(s.ids, problem, tokenizer)
        truth = None if wrong is None else step_of(wrong, starts)
        group = rollouts[i * cfg.resets : (i + 1) * cfg.resets]
        resets.append(Reset(problem, s, starts, h, truth, group))
    return resets, tokens


class Credit(NamedTuple):
    base: list[list[Sample]]  # one group a problem: answers to its prompt
    suffixes: list[list[Sample]]  # one group for each of `resets`, in the context of x*
    resets: list[Reset]  # where they come from, for metrics and display
    accuracy: float  # mean reward of the answers that `draw_answers` samples in its first pass
    entropy: float  # the policy's mean entropy over the tokens of all drawn answers, nats
    # How many were sampled in base groups ("base"), in answers outside of them ("seed": seeds that
    # left, unused tries), in the localiser's replies ("localiser"), after resets ("reset").
    tokens: dict[str, int]

    @property
    def samples(self) -> list[Sample]:
        return [s for group in self.base + self.suffixes for s in group]


def credit_group(samples: list[Sample], rollouts: list[Rollout]) -> None:
    """Give each sample of a group GRPO's advantage inside this group, on all its tokens."""
    rewards = torch.tensor([[r.reward for r in rollouts]])  # (1, G)
    for s, advantage in zip(samples, common.group_advantages(rewards)[0].tolist()):
        s.advantages = [advantage] * len(s.ids)


def assign_credit(
    model, tokenizer, problems, drawn, plans, cfg: Config, generator, compute=Compute()
) -> Credit:
    """Drawn answers and what they decided -> base groups, resets of the seeds, reset groups."""
    answers = [[Sample(r.prompt, r.ids) for r in rollouts] for rollouts in drawn]
    every = [s for samples in answers for s in samples]
    # This also fills in the old log-probs, which localisers and a clip look at.
    entropy = common.score(model, every, cfg.temperature, compute)
    base, seed_problems, seeds = [], [], []
    for problem, rollouts, samples, plan in zip(problems, drawn, answers, plans, strict=True):
        for i in plan.seeds:
            seed_problems.append(problem)
            seeds.append(samples[i])
        if plan.base:
            base.append([samples[i] for i in plan.base])
            credit_group(base[-1], [rollouts[i] for i in plan.base])
    resets, asked = reset_seeds(model, tokenizer, seed_problems, seeds, cfg, generator, compute)
    groups = [[Sample(r.prompt, r.ids) for r in reset.group] for reset in resets]
    if cfg.clip_eps and groups:  # only a ratio needs the old log-probs of suffixes
        common.score(model, [s for group in groups for s in group], cfg.temperature, compute)
    for samples, reset in zip(groups, resets):
        credit_group(samples, reset.group)
    # Over `draw_answers`'s first pass, as many for each problem; later ones depend on failures.
    first = plan_groups([], cfg).more
    rewards = [r.reward for rollouts in drawn for r in rollouts[:first]]
    tokens = dict(base=sum(len(s.ids) for group in base for s in group))
    tokens["seed"] = sum(len(s.ids) for s in every) - tokens["base"]
    tokens["localiser"] = asked
    tokens["reset"] = sum(len(s.ids) for group in groups for s in group)
    return Credit(
        base=base, suffixes=groups, resets=resets, accuracy=sum(rewards) / len(rewards),
        entropy=entropy, tokens=tokens,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- the update


def update(
    model, optimizer, schedule, samples: list[Sample], cfg: Config, shuffle: str,
    scaler=common.IDLE, compute=Compute(),
) -> dict:  # fmt: skip
    """A round's updates: `epochs` passes over the samples, `batch_size` to an update. Returns means
    per update (loss, gradient norm) and per trained token (the rest).

    shuffle: the random seed of their order.
    """
    totals = Counter()  # whose update() adds
    for minibatch in common.minibatches(samples, cfg.batch_size, cfg.epochs, shuffle):
        # Without signal a sample has gradient 0: it counts in the mean, but needs no forward pass.
        # If none has signal, there is no gradient, and only the schedule moves.
        with_signal = [s for s in minibatch if any(s.advantages)]
        loss_sum = 0.0
        for micro in common.micro_batches(with_signal, compute.training_tokens):
            batch = common.collate(micro, model.device)
            logprobs = common.token_logprobs(
                model, batch, cfg.temperature, compute=compute
            )  # (B, T)
            loss, clipped = reset_loss(logprobs, batch, len(minibatch), cfg.clip_eps)
            scaler.scale(loss).backward()
            loss_sum += loss.item()
            totals.update(clip_fraction=clipped.sum().item(), tokens=batch.mask.sum().item())
        norm = common.optimizer_step(
            model, optimizer, schedule, loss_sum, cfg.max_grad_norm, scaler
        )
        totals.update(updates=1, loss=loss_sum, grad_norm=norm)
    return common.averages(totals, ("clip_fraction",))


# ---------------------------------------------------------------------- what is shown and logged


def has_signal(group: list[Sample]) -> bool:
    """Signal: some advantage is not 0."""
    return any(any(s.advantages) for s in group)


def show_answer(credit: Credit, tokenizer, colour: bool, width: int) -> str:
    """A reset of the round, the first with signal if any has: the failed attempt with the named
    step and the truth, and the continuations, coloured by their advantages. colour, width: given by
    common.show."""
    if not credit.resets:
        return "no failure was reset"
    signal = [has_signal(group) for group in credit.suffixes]
    i = signal.index(True) if any(signal) else 0
    reset, samples = credit.resets[i], credit.suffixes[i]
    seed, back_to = reset.seed, reset.starts[reset.named - 1]
    failed = Rollout([], seed.ids, True)  # only its ids and its reward, 0, are shown
    title, notes = common.answer_notes(reset.problem, failed, tokenizer)
    notes[back_to] = f"<- resampled from here {notes.get(back_to, '')}".strip()
    pieces = [tokenizer.decode([id]) for id in seed.ids]
    bars = {back_to: ""}  # a bar before that token, without a number
    lines = common.credit_lines(pieces, [0.0] * len(pieces), bars, notes, colour)
    for r, s in zip(reset.group, samples):
        text = common.printable(tokenizer.decode(r.ids).strip().replace("\n", " / "))
        text = common.paint(text, s.advantages[0]) if colour else text
        lines.append(f"    reward {r.reward:.0f}, advantage {s.advantages[0]:+.2f}: {text}")
    return "\n".join([title, *lines])


def locate_counts(resets: list[Reset]) -> dict:
    """Of the resets whose first wrong step is known: how many there are (failures), how many went
    to it, and to it or an earlier one; *_chance: the expected numbers for a random step."""
    known = [(r.named, r.truth, len(r.starts)) for r in resets if r.truth is not None]
    return dict(
        failures=len(known),
        hit=sum(named == truth for named, truth, _ in known),
        at_or_before=sum(named <= truth for named, truth, _ in known),
        hit_chance=sum(1 / count for _, _, count in known),
        at_or_before_chance=sum(truth / count for _, truth, count in known),
    )


def step_counts(credit: Credit) -> Counter:
    """What a round adds to the run's counts."""
    counts = Counter(locate_counts(credit.resets))
    for kind, groups in (("base", credit.base), ("reset", credit.suffixes)):
        counts[f"{kind}_groups"] = len(groups)
        counts[f"no_signal_{kind}"] = sum(not has_signal(group) for group in groups)
    for kind, count in credit.tokens.items():
        counts[f"{kind}_tokens"] = count
    return counts


def rates(counts: dict) -> dict:
    """Hits as shares of the failures, groups without signal as shares of all; "" where there is
    none to be a share of."""
    located = ("hit", "at_or_before", "hit_chance", "at_or_before_chance")
    whole = dict.fromkeys(located, "failures")
    whole |= dict(no_signal_base="base_groups", no_signal_reset="reset_groups")
    return {key: counts[key] / counts[n] if counts[n] else "" for key, n in whole.items()}


def describe_step(credit: Credit, counts: dict, cfg: Config) -> dict:
    """A round's metrics that are not the update's (tutorials/curves.py, COLUMNS)."""
    continued = [r.reward for reset in credit.resets for r in reset.group]
    return dict(
        reset_accuracy=sum(continued) / len(continued) if continued else "",
        entropy=credit.entropy,
        resets=len(credit.resets) / cfg.prompts,
        **rates(counts),
        **{key: count for key, count in counts.items() if key.endswith("_tokens")},
        length=sum(len(s.ids) for s in credit.samples) / len(credit.samples),
    )


def describe_counts(counts: dict, localiser: str) -> str:
    """What the run's counts say, in words."""
    shares = {key: f"{x:.0%}" for key, x in rates(counts).items() if x != ""}
    tokens = {k: f"{counts[f'{k}_tokens']:,}" for k in ("base", "seed", "localiser", "reset")}
    lines = []
    if counts["failures"]:
        lines.append(
            f"localiser {localiser}: of {counts['failures']:,} failures, the step it named was the "
            f"first wrong one in {shares['hit']},\nthat or an earlier one in "
            f"{shares['at_or_before']} (by chance {shares['hit_chance']} and "
            f"{shares['at_or_before_chance']})"
        )
    silent = [
        f"{share} of {key.removeprefix('no_signal_')} groups"
        for key, share in shares.items()
        if key.startswith("no_signal_")
    ]
    lines.append(
        f"without signal: {', '.join(silent)}\ntokens: {tokens['base']} in base groups, "
        f"{tokens['seed']} in answers outside of them, {tokens['localiser']} to localise, "
        f"{tokens['reset']} after resets\n"
    )
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- the run


def headline(cfg: Config, train: list[Problem]) -> str:
    if cfg.localiser == "oracle" and not train[0].checkable:
        raise BadInput("--localiser oracle: the steps of these problems cannot be judged")
    resets = f" and {cfg.seeds} x {cfg.resets} continuations of a failed one"
    return (
        f"{cfg.method.upper() if cfg.seeds else 'GRPO'}: {cfg.steps} rounds of {cfg.prompts} "
        f"problems, each with {cfg.fresh} answers{resets if cfg.seeds else ''}"
    )


def main() -> None:
    setup = common.set_up(Config, "reset_po", __doc__, TINY, LARGE, headline)
    cfg, run, compute = setup.cfg, setup.run, setup.compute
    model, tokenizer, generator = setup.model, setup.tokenizer, setup.generator
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0)
    updates = cfg.epochs * cfg.prompts * cfg.rollouts // cfg.batch_size  # a round (rollouts: 2G)
    schedule = get_linear_schedule_with_warmup(optimizer, cfg.warmup_updates, cfg.steps * updates)
    setup = setup._replace(optimizer=optimizer, schedule=schedule)
    if cfg.seeds:
        common.say(f"localiser: {pick_localiser(cfg, tokenizer)}")
    progress = common.begin(setup, counts={})
    for step, bar in common.training_steps(setup, progress):
        # 1. Sample answers until each problem has its base group, and its seeds if any has failed.
        began = time.time()
        problems = common.batch_at(setup.train, step, cfg.prompts, run.seed)
        states = [common.initial_state(tokenizer, p, setup.instruction) for p in problems]
        drawn, plans = draw_answers(model, tokenizer, states, cfg, generator, compute)

        # 2. Go back to a step of each seed, continue from there, and compare inside each group.
        credit = assign_credit(model, tokenizer, problems, drawn, plans, cfg, generator, compute)

        # 3. Train on the answers of the base groups and on the suffixes of the reset groups.
        shuffle = f"{run.seed}-{step}"
        # At a loss or gradient that is not finite the run stops, with its state saved.
        with common.saved_if_not_finite(setup, step, progress):
            metrics = update(
                model, optimizer, schedule, credit.samples, cfg, shuffle, scaler=setup.scaler,
                compute=compute,
            )  # fmt: skip

        # 4. Log.
        progress["sampled_tokens"] += sum(credit.tokens.values())
        progress["seconds"] += time.time() - began
        counts = step_counts(credit)
        for key, count in counts.items():
            progress["counts"][key] = progress["counts"].get(key, 0) + count
        metrics = dict(accuracy=credit.accuracy) | metrics | describe_step(credit, counts, cfg)
        whole = [rollout for rollouts in drawn for rollout in rollouts]
        common.log_step(setup, step, bar, progress, metrics, answers=whole)
        if common.is_shown(run, step):
            common.show(setup.folder, step, partial(show_answer, credit, tokenizer))
    totals = progress["counts"]
    shown = totals | rates(totals)  # a share stands in the place of its count
    results = {key: value for key, value in shown.items() if value != ""}
    remark = describe_counts(totals, pick_localiser(cfg, tokenizer))
    common.finish_run(setup, progress, results, remark)


if __name__ == "__main__":
    common.cli(main)
