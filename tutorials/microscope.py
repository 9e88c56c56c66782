"""The microscope: how good is one step's gradient, and is its credit's sign right?

A method draws a batch from a policy and makes one gradient g of it. The true gradient is that of
the expected reward, over all problems of the training set:

    t = mean over problems x of  grad E[r(y)],  y ~ pi(. | x)        (REINFORCE, leave-one-out)

It is estimated twice, as t1 and t2, from answers of their own to the same problems, so <t1, t2> is
|t|^2 without the estimates' own error (that of <t, t> would make every cosine too small):

    cosine of a batch   cos = <g, (t1 + t2) / 2> / (|g| sqrt(<t1, t2>))
    its signal to noise     cos^2 / (1 - cos^2), per 10,000 sampled tokens, per 100 trained samples
    bias: the limit of large batches, m = the mean of all g. |m|^2 without m's noise is the mean
    of <g_b, g_c> over pairs of batches b != c:
                        cos = <m, (t1 + t2) / 2> / sqrt(mean <g_b, g_c> <t1, t2>)

An update's size is the optimiser's business, so only directions count; Z, a std or a learning rate
drop out. Each g is the one of the script's own loss at the policy that has sampled, where all
ratios are 1 and nothing is clipped (tests/test_microscope.py compares it with `update`'s).

    cosines  23 ways to draw a batch, for the policy at the start, half-way and late; and whether
             they predict how fast the rows of tests/results.py learn
    noise    what of it comes from the draw of problems, of answers, of continuations
    lengths  answers of 4, 8, 16 and 24 lines, from 8 problems x 8 answers. The slips of the warm
             start get rarer with the length, so that accuracy stays within reach
    signs    is the sign of a chain's Monte-Carlo advantage that of the near-exact one (512
             continuations)? SKPO (arXiv 2604.08690) says that early in an answer it often is not

    python tutorials/microscope.py                        all of it
    python tutorials/microscope.py --only cosines         and beside it, in another terminal,
    python tutorials/microscope.py --only signs noise lengths
    python tutorials/microscope.py --tiny --out /tmp/x    seconds: does it run?

Of processor time on one core `cosines` takes half an hour, `signs` three minutes, `noise` nine, and
`lengths` half an hour, after eighteen minutes in which policies learn to write 16 and 24 lines.
Policies, truths and the run that trains half-way and late are kept in runs/. Each row goes to its
table in --out (tutorials/results/) as soon as it is known, and what is there is not computed again;
delete a table to have it anew. Last come microscope.md, microscope.png and signs.png, from all rows
that are there.
"""

import argparse
import csv
import functools
import itertools
import math
import os
import random
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import common  # noqa: E402
import curves  # noqa: E402
import reset_po  # noqa: E402
import spo  # noqa: E402
from pictures import between, half_interval, plotting  # noqa: E402


class Sizes(NamedTuple):
    batches: int = 50
    truth: int = 4  # answers a problem, in each half
    problems: int = 4096  # of the training set: whose gradient is the true one
    long_problems: int = 1024  # the same, for `lengths`
    nested: int = 64  # problems of `noise`
    signs: int = 100  # answers of `signs`
    exact: int = 512  # continuations of a near-exact value
    shrink: int = 1  # divides a method's problems
    terms: int = 7
    warm_start_steps: int = 300
    long_steps: int = 150  # the same, for `lengths`
    rounds: int = 100  # of the run that trains the late policy
    policies: tuple = ("start", "half-way", "late")
    lengths: tuple = ("4 lines", "8 lines", "16 lines", "24 lines")


TINY = Sizes(2, 8, 32, 32, 4, 8, 16, 8, 2, 60, 60, 2, ("start",), ("2 lines",))

GRPO = dict(partition="trajectory", mask=False)
MATCHED = dict(prompts=32, group_size=8)
FIRST = {  # the method's name -> its script, and its Config
    "GRPO 32x8": (spo, GRPO | MATCHED),
    "GRPO + mask 32x8": (spo, GRPO | MATCHED | dict(mask=True)),
    "chain 32x8, N = 4": (spo, MATCHED | dict(continuations=4)),
    "chain 32x8, N = 1": (spo, MATCHED | dict(continuations=1)),
    "chain 32x8, N = 9": (spo, MATCHED | dict(continuations=9)),
    "tree 2-2-2": (spo, dict(variant="tree", prompts=32)),
    "tree 2-2-2, levels alike": (spo, dict(variant="tree", prompts=32, level_weights=True)),
    "newline 32x8, N = 4": (spo, MATCHED | dict(partition="newline", continuations=4)),
    "RRPO 4 + 4": (reset_po, dict(method="rrpo")),
    "SRPO uncertain 4 + 4": (reset_po, dict(localiser="uncertain")),
    "SRPO oracle 4 + 4": (reset_po, dict(localiser="oracle")),
    "SRPO surprise 4 + 4": (reset_po, dict(localiser="surprise")),
}
# What results.py trains, beside those: the other rows of its tables (N = 8 is only measured).
TRAINED = {
    "chain 64x2, N = 2": (spo, dict()),
    "GRPO + mask 64x2": (spo, dict(partition="trajectory")),
    "GRPO 64x2": (spo, GRPO),
    "chain 64x2, N = 8": (spo, dict(continuations=8)),
    "newline 64x2, N = 2": (spo, dict(partition="newline")),
    "chain 128x1, N = 2": (spo, dict(prompts=128, group_size=1)),
    "GRPO 32x8, mean a rollout": (reset_po, dict(method="grpo")),
}
ROWS = {  # method -> its table in curves.csv, and its row there
    "chain 64x2, N = 2": ("spo", "SPO-chain"),
    "GRPO + mask 64x2": ("spo", "GRPO + mask"),
    "GRPO 64x2": ("spo", "GRPO"),
    "newline 64x2, N = 2": ("values", "line breaks"),
    "chain 128x1, N = 2": ("values", "SPO-chain, 128 x 1"),
    "GRPO + mask 32x8": ("tree", "GRPO + mask, 32 x 8"),
    "tree 2-2-2": ("tree", "SPO-tree, 2-2-2"),
    "tree 2-2-2, levels alike": ("tree", "SPO-tree, levels alike"),
    "GRPO 32x8, mean a rollout": ("resets", "GRPO, groups of 8"),
    "RRPO 4 + 4": ("resets", "RRPO"),
    "SRPO uncertain 4 + 4": ("resets", "SRPO, uncertain"),
    "SRPO oracle 4 + 4": ("resets", "SRPO, oracle"),
}
SHORT = ("tree", "resets")  # the tables of 50 rounds, where the others have 100
SECOND = {
    "GRPO 8x8": (spo, GRPO | dict(prompts=8, group_size=8)),
    "chain 8x8, N = 4": (spo, dict(prompts=8, group_size=8, continuations=4)),
    "chain 32x8, N = 16": (spo, MATCHED | dict(continuations=16)),
    "tree 4-4": (spo, dict(variant="tree", prompts=32, branching=[4, 4])),
}
LONG = {  # 8 problems, and 8 answers in the end to each
    "GRPO 8x8": SECOND["GRPO 8x8"],
    "GRPO + mask 8x8": (spo, GRPO | dict(prompts=8, group_size=8, mask=True)),
    "chain 8x8, N = 1": (spo, dict(prompts=8, group_size=8, continuations=1)),
    "tree 2-2-2": (spo, dict(variant="tree", prompts=8)),
    "RRPO 4 + 4": (reset_po, dict(method="rrpo", prompts=8)),
    "SRPO uncertain 4 + 4": (reset_po, dict(localiser="uncertain", prompts=8)),
}
# Mean lines of an answer -> most terms of a sum, how often a wrong fact comes out wrong, and how
# many times `long_steps` it takes to imitate: after 150 steps 2 % of 16 lines are right, after 450
# 21 %; of 24 lines 2 % after 450 and 14 % after 900.
LENGTHS = {
    "2 lines": (2, 0.75, 1),
    "4 lines": (5, 0.75, 1),
    "8 lines": (9, 0.5, 1),
    "16 lines": (17, 0.25, 3),
    "24 lines": (25, 0.17, 6),
}
LAST = {"chain 8x8, N = 4": SECOND["chain 8x8, N = 4"]}  # of long answers: dear
NS = (1, 4, 9, 16)


# ------------------------------------------------------------------------------------ the policies


class Desk(NamedTuple):
    """A policy, and the problems on which its gradient is looked at."""

    name: str
    model: object
    tokenizer: object
    problems: list[common.Problem]
    longest: int  # tokens of an answer
    kept: dict  # what has been drawn from the prompts, for methods that can share it


@functools.lru_cache(maxsize=4)
def desk_of(name: str, sizes: Sizes) -> Desk:
    """The policy of that name: of the default task, or the warm start of a longer one's.

    Late is the end of a default run of spo.py. Half-way is the end of a run of fewer rounds: as many
    as the default run takes until the mean accuracy of ten rounds has come half of the way. (Its
    rate falls to 0 sooner, so it is not the longer run's beginning.)
    """
    terms, rate, longer = LENGTHS.get(name, (sizes.terms, common.ERROR_RATE, 1))
    count = sizes.long_problems if name in LENGTHS else sizes.problems
    problems = common.load_problems("sums", "train", count, 0, terms)
    if name == "start" or name in LENGTHS:
        steps = longer * sizes.long_steps if name in LENGTHS else sizes.warm_start_steps
        with patch.object(common, "ERROR_RATE", rate):  # of the student that is imitated
            model, tokenizer = start_of(terms, steps)
    else:
        folder = trained(sizes.rounds, sizes)
        if name == "half-way":
            folder = trained(half_way(curves.columns(folder)["accuracy"]), sizes)
        model, tokenizer = common.load_policy(folder / "checkpoint", torch.device("cpu"))
    return Desk(name, model, tokenizer, problems, 10 * terms + 10, {})


def start_of(terms: int, steps: int):
    """(model, tokenizer) after the warm start, which is kept in runs/ and named by its recipe."""
    run = common.RunConfig(terms=terms, warm_start_steps=steps)
    train = common.load_problems("sums", "train", None, run.seed, terms)
    return common.starting_policy(run, train, torch.device("cpu"), common.Compute())


def trained(rounds: int, sizes: Sizes) -> Path:
    """The folder of spo.py's run of so many rounds, in all else by default."""
    flags = f"--device cpu --steps {rounds} --terms {sizes.terms} --show_every 0 "
    flags += f"--warm_start_steps {sizes.warm_start_steps} --max_new_tokens {10 * sizes.terms + 10}"
    name = f"microscope-{sizes.terms}-{rounds}"
    title = f"a chain's run of {rounds} rounds, for its policy"
    return curves.make(name, title, [str(ROOT / "spo.py")], flags.split())


def half_way(accuracy: list[float], window: int = 10) -> int:
    """The first round at which the mean of the last rounds is half-way between the first and the
    last such mean.

    >>> half_way([0.0, 0.0, 0.2, 0.6, 0.8, 0.8], window=2)
    4
    """
    window = min(window, len(accuracy))
    ends = range(window, len(accuracy) + 1)
    means = {end: sum(accuracy[end - window : end]) / window for end in ends}
    middle = (means[window] + means[len(accuracy)]) / 2
    return next((end for end in ends if means[end] >= middle), len(accuracy))


# ------------------------------------------------------------------------------------- one gradient


class Drawn(NamedTuple):
    samples: list[common.Sample]  # what the update would train on
    owners: list[int]  # the problem of each (none of a reset's, which nobody asks for)
    tokens: int  # all that were sampled for them


def config_of(method, desk: Desk, shrink: int = 1):
    script, options = method
    prompts = max(2, options.get("prompts", script.Config().prompts) // shrink)
    sizes = dict(prompts=prompts, batch_size=0, max_new_tokens=desk.longest)  # one update of all
    return script.Config(**options | sizes)


def from_prompts(desk: Desk, problems, cfg, seed: int):
    """What a method draws from its prompts: answers, trees, or a reset's answers with their plans.
    Methods that do this alike get the same, so they differ by their credit alone."""
    reset = isinstance(cfg, reset_po.Config)
    tree = not reset and cfg.variant == "tree"
    shape = ("reset", cfg.fresh) if reset else (*cfg.branching,) if tree else (cfg.group_size,)
    if (key := (seed, cfg.prompts, tree, *shape)) not in desk.kept:
        states = [common.initial_state(desk.tokenizer, problem) for problem in problems]
        where, generator = (desk.model, desk.tokenizer), torch.Generator().manual_seed(seed)
        if reset:
            desk.kept[key] = reset_po.draw_answers(*where, states, cfg, generator)
        elif tree:
            desk.kept[key] = spo.grow_trees(*where, states, cfg, generator)
        else:
            desk.kept[key] = answers_to(desk, problems, cfg.group_size, generator)
    return desk.kept[key]


def draw(desk: Desk, problems, cfg, seed: int) -> Drawn:
    """Steps 1 and 2 of the script's loop: sample, and give credit."""
    drawn = from_prompts(desk, problems, cfg, seed)
    generator = torch.Generator().manual_seed(10**6 + seed)
    if isinstance(cfg, reset_po.Config):
        where = desk.model, desk.tokenizer
        credit = reset_po.assign_credit(*where, problems, *drawn, cfg, generator)
        return Drawn(credit.samples, [], sum(credit.tokens.values()))
    if cfg.variant == "tree":
        credit = spo.credit_trees(desk.model, drawn, cfg)
    else:
        credit = chain_credit(desk, problems, drawn, cfg, generator)
    return Drawn(credit.samples, credit.owners, credit.tokens)


def answers_to(desk: Desk, problems, n: int, generator) -> list[common.Rollout]:
    states = [common.initial_state(desk.tokenizer, problem) for problem in problems]
    return common.complete(desk.model, desk.tokenizer, states, n, desk.longest, generator=generator)


def chain_credit(desk: Desk, problems, rollouts, cfg, generator) -> spo.Credit:
    right = [problem.answer for problem in problems for _ in range(cfg.group_size)]
    assert len(right) == len(rollouts)
    return spo.assign_credit(desk.model, desk.tokenizer, rollouts, right, cfg, generator)


def merged(samples: list[common.Sample]) -> list[common.Sample]:
    """Those with an advantage, equal texts made one with the sum of their advantages: at ratio 1
    every loss here is linear in them, so the gradient stays, and takes fewer passes."""
    rows = {}
    for s in samples:
        key = (*s.context, -1, *s.ids)
        before = rows[key].advantages if key in rows else [0.0] * len(s.ids)
        total = [a + b for a, b in zip(before, s.advantages)]
        rows[key] = common.Sample(s.context, s.ids, total, s.old_logprobs)
    return [s for s in rows.values() if any(s.advantages)]


def uphill(model, samples: list[common.Sample], loss_of) -> Tensor:
    """(D,) minus the gradient of the sum of loss_of(log-probs (B, T), batch), over all weights."""
    model.zero_grad()
    for micro in common.micro_batches(merged(samples)):
        batch = common.collate(micro)
        loss_of(common.token_logprobs(model, batch), batch).backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return -torch.cat([part.flatten() for part in parts])


def gradient(model, samples: list[common.Sample], cfg) -> tuple[Tensor, int]:
    """(D,) the direction of the script's update on these samples; its normaliser."""
    if isinstance(cfg, reset_po.Config):
        z = len(samples)  # 2G, of all problems
        return uphill(model, samples, lambda x, b: reset_po.reset_loss(x, b, z, 0.0)[0]), z
    z = spo.trained_tokens(common.collate(samples), cfg).sum().item() if samples else 0

    def loss(logprobs: Tensor, batch: common.Batch) -> Tensor:
        return spo.spo_loss(logprobs, batch, spo.trained_tokens(batch, cfg), z, cfg.clip_eps)[0]

    return uphill(model, samples, loss), z


# ----------------------------------------------------------------------- the truth, and the cosines


def true_half(desk: Desk, n: int, generator) -> tuple[Tensor, list[float]]:
    """(D,) gradient of the mean reward, from n answers to each problem; their rewards.

    Leave-one-out: r minus the mean of the others is n / (n - 1) times r minus the mean of all.
    """
    rollouts = answers_to(desk, desk.problems, n, generator)
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, n)  # (P, n)
    advantages = common.group_advantages(rewards, scale=False).flatten() * n / (n - 1)
    rows = [(r, a) for r, a in zip(rollouts, advantages.tolist())]
    samples = [common.Sample(r.prompt, r.ids, [a] * len(r.ids)) for r, a in rows]
    count = len(samples)
    t = uphill(desk.model, samples, lambda x, b: -(x * b.advantages).sum() / count)
    return t, rewards.flatten().tolist()


def truth_of(desk: Desk, sizes: Sizes) -> dict:
    """halves (2, D), independent given the problems; accuracy of their answers. Kept in runs/."""
    digest = zlib.crc32(b"".join(p.detach().numpy().tobytes() for p in desk.model.parameters()))
    name = f"{digest:08x}-{len(desk.problems)}-{sizes.truth}.pt"
    path = Path("runs", "microscope", name)
    if path.exists():
        return torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(10**9)
    halves, rewards = zip(*(true_half(desk, sizes.truth, generator) for _ in range(2)))
    accuracy = sum(map(sum, rewards)) / sum(map(len, rewards))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(halves=torch.stack(halves), accuracy=accuracy), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    return torch.load(path, weights_only=True)


def cosines(gradients: Tensor, halves: Tensor) -> Tensor:
    """(B,) of each row of gradients (B, D) with the truth, whose own error is corrected for. 0 for
    a gradient that is 0; nan where the halves disagree, so that |t| is not known."""
    along = gradients @ halves.mean(0) / (halves[0] @ halves[1]).sqrt()  # (B,) <g, t> / |t|
    norms = gradients.norm(dim=1)
    return torch.where(norms == 0, torch.zeros_like(along), along / norms)


def pair_mean(gram: Tensor, weights: Tensor) -> Tensor:
    """Mean of <x_b, x_c> over b != c, weighted by w_b w_c. gram (B, B), weights (B,)."""
    weighted = gram * weights[:, None] * weights
    both = weights.sum() ** 2 - (weights**2).sum()
    return (weighted.sum() - weighted.diagonal().sum()) / both


def bias_cosine(gradients: Tensor, z: Tensor, halves: Tensor) -> tuple[float, float]:
    """Cosine of the large-batch limit with the truth, and its standard error by the jackknife.

    A batch made of all B has the sum of their normalisers z (B,), so its gradient is their mean
    with weights z.
    """
    gram = gradients @ gradients.T  # (B, B)
    along = gradients @ halves.mean(0)  # (B,)
    squared = halves[0] @ halves[1]

    def cosine(weights: Tensor) -> float:
        size = pair_mean(gram, weights) * squared
        return ((weights * along).sum() / weights.sum() / size.sqrt()).item()  # nan below 0

    left_out = 1 - torch.eye(len(z))
    return cosine(z), jackknife([cosine(z * keep) for keep in left_out])


def jackknife(left_out: list[float]) -> float:
    """Standard error from the estimates that leave out one of n each."""
    n, mean = len(left_out), sum(left_out) / len(left_out)
    return math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in left_out))


def signal_to_noise(cosine: float) -> float:
    """Squared: of a vector whose part along the truth is `cosine` of its length."""
    return cosine**2 / (1 - cosine**2) if cosine < 1 else math.inf  # an estimate may be above


def interval(mean: float, error: float, digits: int = 4) -> tuple[float, float, float]:
    """mean, and the ends of its 95 % interval."""
    return tuple(round(x, digits) for x in (mean, mean - 1.96 * error, mean + 1.96 * error))


def measure(desk: Desk, name: str, method, sizes: Sizes) -> dict:
    """A row: one method's batches at one policy. Batch b has the same problems for all methods,
    and the same answers where they draw alike. seconds: of processor time."""
    began, cfg = time.process_time(), config_of(method, desk, sizes.shrink)
    truth, gradients, zs, tokens, samples = truth_of(desk, sizes), [], [], 0, 0
    for b in range(sizes.batches):
        problems = random.Random(f"batch-{b}").sample(desk.problems, cfg.prompts)
        drawn = draw(desk, problems, cfg, b)
        g, z = gradient(desk.model, drawn.samples, cfg)
        gradients.append(g)
        zs.append(float(z))
        tokens += drawn.tokens / sizes.batches
        samples += len(drawn.samples) / sizes.batches
    stacked = torch.stack(gradients)  # (B, D)
    mean, error = common.mean_stderr(cosines(stacked, truth["halves"]).tolist())
    bias, bias_error = bias_cosine(stacked, torch.tensor(zs), truth["halves"])
    row = dict(policy=desk.name, method=name, accuracy=round(truth["accuracy"], 4))
    row |= dict(problems=cfg.prompts, batches=sizes.batches, tokens=round(tokens))
    row |= dict(trained=round(samples, 1), **spread("cosine", mean, error))
    row["snr_per_10k"] = round(signal_to_noise(mean) / tokens * 1e4, 4)
    row["snr_per_100"] = round(signal_to_noise(mean) / max(samples, 1e-9) * 100, 4)
    return (
        row | spread("bias", bias, bias_error) | dict(seconds=round(time.process_time() - began, 1))
    )


def spread(name: str, mean: float, error: float) -> dict:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval(mean, error)))


# ----------------------------------------------------------------------- where the noise comes from


def components(h: Tensor) -> Tensor:
    """(4,) |mean|^2, and the variances between problems, answers and continuations.

    h (P, A, K, D): gradient of problem i from its set s of answers with values drawn for the k-th
    time. In h = mean + problem_i + answers_is + values_isk inner products of what has been drawn
    apart leave the parts they share, without bias:

        <h_isk, h_isk>    |mean|^2 + var problems + var answers + var continuations
        <h_isk, h_isk'>   |mean|^2 + var problems + var answers
        <h_isk, h_is'k'>  |mean|^2 + var problems
        <h_isk, h_i's'k'> |mean|^2

    K = 1 (no continuations): the last variance is 0.
    """

    def pairs(x: Tensor) -> Tensor:  # (..., n, D): mean of <x_a, x_b> over a != b
        n = x.shape[-2]
        return ((x.sum(-2) ** 2).sum(-1) - (x**2).sum((-2, -1))).mean() / (n * (n - 1))

    own = (h**2).sum(-1).mean()
    draws = pairs(h) if h.shape[2] > 1 else own
    levels = torch.stack([own, draws, pairs(h.mean(2)), pairs(h.mean((1, 2)))])
    return torch.cat([levels[3:], (levels[:-1] - levels[1:]).flip(0)])


def nested(desk: Desk, method, sizes: Sizes) -> Tensor:
    """(P, 2, K, D) as `components` takes it: K = 2 for a chain, 1 for GRPO, which draws no values.
    A set is the method's group; Z is left out, for it only scales."""
    cfg, model = config_of(method, desk), desk.model
    problems = random.Random("nested").sample(desk.problems, sizes.nested)
    generator, draws = torch.Generator().manual_seed(0), 1 if cfg.partition == "trajectory" else 2
    sets = []
    for _ in range(2):
        rollouts = answers_to(desk, problems, cfg.group_size, generator)
        values = []
        for _ in range(draws):
            credit, rows = chain_credit(desk, problems, rollouts, cfg, generator), []
            for i in range(len(problems)):
                own = [s for s, owner in zip(credit.samples, credit.owners) if owner == i]
                g, z = gradient(model, own, cfg)
                rows.append(g * z / cfg.group_size)  # (D,)
            values.append(torch.stack(rows))  # (P, D)
        sets.append(torch.stack(values, 1))  # (P, K, D)
    return torch.stack(sets, 1)


def noise_row(desk: Desk, name: str, method, sizes: Sizes) -> dict:
    """Shares of a batch's noise, with intervals by the jackknife over problems."""
    began, h = time.process_time(), nested(desk, method, sizes)

    def shares(x: Tensor) -> Tensor:
        parts = components(x)[1:]
        return parts / parts.sum()

    keep = [[j for j in range(len(h)) if j != i] for i in range(len(h))]
    whole, left_out = shares(h), torch.stack([shares(h[rows]) for rows in keep])  # (3,), (P, 3)
    row = dict(policy=desk.name, method=name, problems=len(h))
    for i, part in enumerate(("between_problems", "between_answers", "between_continuations")):
        row |= spread(part, whole[i].item(), jackknife(left_out[:, i].tolist()))
    return row | dict(seconds=round(time.process_time() - began, 1))


# ---------------------------------------------------------------------------- are the signs right?


class Segment(NamedTuple):
    answer: int
    position: float  # of its first token, 0 to 1
    exact: float  # near-exact advantage
    error: float  # its standard error
    estimate: float


GROUPS = {  # of segments, for a row each
    "all": lambda s: True,
    "first third": lambda s: s.position < 1 / 3,
    "middle third": lambda s: 1 / 3 <= s.position < 2 / 3,
    "last third": lambda s: s.position >= 2 / 3,
    "|A| below 0.1": lambda s: abs(s.exact) < 0.1,
    "|A| 0.1 to 0.3": lambda s: 0.1 <= abs(s.exact) < 0.3,
    "|A| 0.3 and more": lambda s: abs(s.exact) >= 0.3,
}


def segments_of(answers: list[spo.Answer], exact: list, estimates: list, count: int) -> list:
    """Segments of the answers, whose boundaries' values are listed in their order: near-exact from
    `count` continuations, and as they are estimated."""
    found, used = [], 0
    for i, a in enumerate(answers):
        n, length, r = len(a.starts), len(a.rollout.ids), a.rollout.reward
        v, v_hat = (values[used : used + n] for values in (exact, estimates))
        used += n
        true, estimated = (spo.chain_advantages(a.starts, x, r, length) for x in (v, v_hat))
        variances = [x * (1 - x) / count for x in v] + [0.0]  # the reward at the end is known
        for k, t in enumerate(a.starts):
            error = math.sqrt(variances[k] + variances[k + 1])
            place = t / length
            found.append(Segment(i, place, true[t].item(), error, estimated[t].item()))
    return found


def whole_answer(answers: list[spo.Answer], segments: list[Segment]) -> list[Segment]:
    """GRPO's sign for the same segments: that of the reward minus the prompt's value."""
    signs = [2 * a.rollout.reward - 1 for a in answers]
    return [s._replace(estimate=signs[s.answer]) for s in segments]


def sign_shares(segments: list[Segment]) -> dict:
    """Shares of right, zero and wrong signs among `known` segments: those whose exact advantage is
    more than two standard errors from 0; of the others nobody knows the sign. right_by_size: each
    weighs |A|. size: mean |A| of all. The interval of `right` is by the jackknife over answers, for
    an answer's segments share values."""
    known = [s for s in segments if abs(s.exact) > 2 * s.error]
    size = sum(abs(s.exact) for s in segments) / max(len(segments), 1)
    row = dict(segments=len(segments), known=len(known), size=round(size, 4))
    right = [s.exact * s.estimate > 0 for s in known]
    answers = {s.answer for s in known}
    if len(answers) < 2:
        return row | dict.fromkeys(SHARES, "")

    def share(without: int = -1) -> float:
        kept = [hit for s, hit in zip(known, right) if s.answer != without]
        return sum(kept) / len(kept)

    row |= spread("right", share(), jackknife([share(i) for i in answers]))
    row["zero"] = round(sum(s.estimate == 0 for s in known) / len(known), 4)
    row["wrong"] = round(sum(s.exact * s.estimate < 0 for s in known) / len(known), 4)
    weights = [abs(s.exact) for s in known]
    by_size = sum(w for w, hit in zip(weights, right) if hit) / sum(weights)
    return row | dict(right_by_size=round(by_size, 4))


SHARES = ("right", "right_low", "right_high", "zero", "wrong", "right_by_size")


def sign_rows(desk: Desk, sizes: Sizes) -> list[dict]:
    """All rows of a policy: one answer each to so many problems, cut at every cutpoint."""
    generator = torch.Generator().manual_seed(0)
    problems = random.Random("signs").sample(desk.problems, sizes.signs)
    rollouts = answers_to(desk, problems, 1, generator)

    # Only its boundaries are used; the values come below.
    once = spo.Config(continuations=1, group_size=1, max_new_tokens=desk.longest)
    answers = chain_credit(desk, problems, rollouts, once, generator).answers
    states = [(a.rollout.prompt, a.rollout.ids[:t], problems[a.owner].answer)
              for a in answers for t in a.starts]  # fmt: skip

    def values(n: int) -> list[float]:
        cfg = spo.Config(continuations=n, max_new_tokens=desk.longest)
        return spo.estimate_values(desk.model, desk.tokenizer, states, cfg, generator)[0]

    exact = values(sizes.exact)
    estimated = {n: segments_of(answers, exact, values(n), sizes.exact) for n in NS}
    estimated["whole answer"] = whole_answer(answers, estimated[1])
    return [
        dict(policy=desk.name, method="chain", n=n, group=group)
        | sign_shares([segment for segment in segments if belongs(segment)])
        for n, segments in estimated.items()
        for group, belongs in GROUPS.items()
    ]


# ---------------------------------------------------------------------- tables, sentences, pictures


PARTS = dict(  # their tables' methods, the most telling first; `signs` has one of its own
    cosines=(FIRST, TRAINED, SECOND),
    signs=({"chain": None},),
    noise=({name: FIRST[name] for name in ("chain 32x8, N = 4", "GRPO 32x8")},),
    lengths=(LONG, LAST),
)


def rows_of(part: str, policy: str, name: str, method, sizes: Sizes) -> list[dict]:
    desk = desk_of(policy, sizes)
    if part == "signs":
        return sign_rows(desk, sizes)
    return [(noise_row if part == "noise" else measure)(desk, name, method, sizes)]


def read(out: Path, part: str) -> list[dict]:
    """Rows of a table; none if it is not there."""
    path = out / f"microscope_{part}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def fill(out: Path, part: str, sizes: Sizes) -> None:
    """Compute what the table lacks. Rows go in at once, so that a kill loses no more than one."""
    policies = sizes.lengths if part == "lengths" else sizes.policies
    for methods, policy in itertools.product(PARTS[part], policies):
        for name, method in methods.items():
            if (policy, name) in {(row["policy"], row["method"]) for row in read(out, part)}:
                continue
            rows = rows_of(part, policy, name, method, sizes)
            if math.isnan(rows[0].get("cosine", 0)):  # the halves of the truth point apart
                print(f"{part}: {policy}, {name}: the true gradient is not known well enough")
                continue
            with open(out / f"microscope_{part}.csv", "a", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerows(rows)
            print(f"{part}: {', '.join(map(str, list(rows[0].values())[:10]))}", flush=True)


def grouped(rows: list[dict], key: str) -> dict[str, list[dict]]:
    found = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def table(head: list[str], lines: list[list]) -> str:
    both = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in both) + "\n"


def pm(row: dict, key: str) -> str:
    """A mean, with half of its interval; - where one of them is not known."""
    ends = [row.get(f"{key}{end}", "") for end in ("", "_low", "_high")]
    if "" in ends or "nan" in ends:
        return "-"
    mean, low, high = map(float, ends)
    return f"{mean:.2f} ± {(high - low) / 2:.2f}"


def per_token(row: dict, end: str = "") -> float:
    """Signal to noise per 10,000 tokens, at the cosine's mean or an end of its interval."""
    cosine = max(0.0, float(row[f"cosine{end}"]))
    return signal_to_noise(cosine) / float(row["tokens"]) * 1e4


def standing(rows: list[dict], other: dict) -> dict[str, list[str]]:
    """Methods better than, level with and worse than `other`, for a token: level where the
    intervals meet."""
    found = dict(better=[], level=[], worse=[])
    for row in rows:
        if row is not other:
            better = per_token(row, "_low") > per_token(other, "_high")
            worse = per_token(row, "_high") < per_token(other, "_low")
            found["better" if better else "worse" if worse else "level"].append(row["method"])
    return found


def cosine_text(rows: list[dict]) -> str:
    parts = []
    for policy, own in grouped(rows, "policy").items():
        best = max(own, key=per_token)
        trained = max(own, key=lambda row: float(row["snr_per_100"]))
        grpo = next((row for row in own if row["method"].startswith("GRPO ")), best)
        at, beside = standing(own, best), standing(own, grpo)
        said = {key: "; ".join(names) or "none" for key, names in beside.items()}
        lines = [
            [r["method"], r["problems"], f"{float(r['tokens']):,.0f}", r["trained"],
             pm(r, "cosine"), pm(r, "bias"), f"{per_token(r):.3f}", r["snr_per_100"]]
            for r in own
        ]  # fmt: skip
        head = ["method", "problems", "tokens", "trained", "cosine", "of large batches"]
        head += ["S/N a 10,000 tokens", "S/N a 100 trained"]
        parts.append(
            f"**{policy}**, accuracy {float(own[0]['accuracy']):.2f}, {own[0]['batches']} batches. "
            f"Best use of a token: {best['method']}"
            f" (level with it: {'; '.join(at['level']) or 'none'}). "
            f"Best use of a trained sample: {trained['method']}. For a token, better than "
            f"{grpo['method']}: {said['better']}. Level: {said['level']}. Worse: {said['worse']}."
            f"\n\n{table(head, lines)}"
        )
    return "\n".join(parts)


def trained_rows(out: Path, x: str, point: float) -> dict[str, dict[str, float]]:
    """Method -> seed -> held-out accuracy of its row of curves.csv where x, `rounds` or `tokens`,
    stood at `point`: on the straight line between the evaluations around it. Only methods that
    came as far with every seed."""
    lines, found = {}, {}
    path = out / "curves.csv"
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                own = lines.setdefault((line["table"], line["row"]), {})
                at = float(line[x]), float(line["held_out"])
                own.setdefault(line["seed"], []).append(at)
    for method, row in ROWS.items():
        seeds = lines.get(row, {})
        if seeds and all(curve[-1][0] >= point for curve in seeds.values()):
            found[method] = {seed: between(curve, point) for seed, curve in seeds.items()}
    return found


def agreement(measure: dict[str, tuple], trained: dict[str, dict[str, float]]) -> tuple[int, int]:
    """Pairs of methods that the measure orders as training does; pairs that both tell apart. Only
    pairs whose runs have as many rounds, over which the learning rate falls, are looked at.

    measure: (mean, low, high) of each method, apart where the intervals do not meet. trained:
    accuracy by seed, apart where the 95 % interval of the paired differences has no 0 in it.
    """
    agree = both = 0
    for one, other in itertools.combinations([name for name in measure if name in trained], 2):
        if (ROWS[one][0] in SHORT) != (ROWS[other][0] in SHORT):
            continue
        differences = [trained[one][seed] - trained[other][seed] for seed in trained[one]]
        gain = sum(differences) / len(differences)
        apart = measure[one][1] > measure[other][2] or measure[other][1] > measure[one][2]
        if apart and abs(gain) > half_interval(differences):
            both += 1
            agree += (measure[one][0] > measure[other][0]) == (gain > 0)
    return agree, both


# The measure -> its title, the axis of the curves, and where on it training is looked at.
PREDICTED = dict(
    cosine=("Cosine of a batch, and accuracy after as many rounds", "rounds", 50),
    per_token=("S/N a 10,000 tokens, and accuracy after as many tokens", "tokens", 250_000),
)


def measured(row: dict, key: str) -> tuple[float, float, float]:
    """(mean, low, high) of a row's cosine, or of its signal to noise a token."""
    if key == "cosine":
        return float(row["cosine"]), float(row["cosine_low"]), float(row["cosine_high"])
    return per_token(row), per_token(row, "_low"), per_token(row, "_high")


def predict_text(rows: list[dict], out: Path) -> str:
    """Whether the order by one step's gradient is the order in which the rows learn."""
    parts = []
    for key, (title, x, point) in PREDICTED.items():
        trained = trained_rows(out, x, point)
        names = [row["method"] for row in rows if row["policy"] == "start"]
        names = [name for name in names if name in trained]
        if len(names) < 3:
            continue
        means = {name: sum(trained[name].values()) / len(trained[name]) for name in names}
        by_policy, said = {}, []
        for policy, own in grouped(rows, "policy").items():
            found = {row["method"]: measured(row, key) for row in own if row["method"] in names}
            by_policy[policy] = found
            agree, told_apart = agreement(found, trained)
            said.append(
                f"* {policy}: of {told_apart} pairs that both tell apart {agree} come in the same "
                "order."
            )
        lines = []
        for name in sorted(names, key=means.get, reverse=True):
            cells = [f"{own[name][0]:.3f}" if name in own else "" for own in by_policy.values()]
            half = half_interval([*trained[name].values()])
            lines.append([name, *cells, f"{means[name]:.3f} ± {half:.3f}"])
        head = ["method", *by_policy, f"trained to {point:,} {x}"]
        parts += [f"**{title}**", "\n".join(said), table(head, lines)]
    return "\n\n".join(parts)


def noise_text(rows: list[dict]) -> str:
    keys = ("between_problems", "between_answers", "between_continuations")
    lines = [[r["policy"], r["method"], r["problems"], *(pm(r, key) for key in keys)] for r in rows]
    said = []
    for r in rows:
        largest = max(keys, key=lambda key: float(r[key])).replace("_", " ")
        said.append(f"{r['policy']}, {r['method']}: most noise {largest}.")
    head = ["policy", "method", "problems", *(key.replace("_", " ") for key in keys)]
    note = "Shares of a batch's squared noise. That of continuations goes with 1/N."
    return f"{note} {' '.join(said)}\n\n{table(head, lines)}"


def sign_text(rows: list[dict]) -> str:
    lines, said = [], []
    for (policy, group), own in by_group(rows).items():
        shares = [pm(r, "right") for r in own.values()]
        first = own[str(NS[0])]
        lines.append([policy, group, first["known"], f"{float(first['size']):.2f}", *shares])
        if group in ("all", "first third") and all(r["right"] for r in own.values()):
            cells = []
            for n in (NS[0], NS[1], "whole answer"):
                right, zero, wrong = (float(own[str(n)][k]) for k in ("right", "zero", "wrong"))
                name = f"N = {n}" if n in NS else n
                cells.append(f"{name} {right:.0%}, {zero:.0%}, {wrong:.0%}")
            said.append(f"* {policy}, {group}: {'; '.join(cells)}")
    head = ["policy", "segments", "known", "mean size of A", *(f"N = {n}" for n in NS)]
    note = (
        "Of the segments whose exact advantage is more than two standard errors from 0 (known), how "
        "many estimates have the right sign; 0 is not right. Whole answer: GRPO's sign, the reward's "
        "minus the prompt's value. Right, 0 and wrong:"
    )
    parts = [note, "\n".join(said), table([*head, "whole answer"], lines)]
    return "\n\n".join(part for part in parts if part)


def by_group(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """(policy, group) -> N -> its row."""
    found = {}
    for row in rows:
        found.setdefault((row["policy"], row["group"]), {})[row["n"]] = row
    return found


TEXTS = dict(
    cosines=("One step's gradient", cosine_text),
    lengths=("Longer answers", cosine_text),
    noise=("Where the noise comes from", noise_text),
    signs=("Is the sign right?", sign_text),
)


def dots_picture(rows: list[dict], path: Path) -> None:
    """A line a method; a mark a policy, told apart by shape and fill."""
    pyplot = plotting(13)
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = pyplot.subplots(
        1, 2, figsize=(10, 1.6 + 0.5 * len(names)), sharey=True, layout="constrained"
    )
    for i, (policy, own) in enumerate(grouped(rows, "policy").items()):
        ys = [names.index(row["method"]) + 0.22 * (i - 1) for row in own]
        means = [float(row["cosine"]) for row in own], [per_token(row) for row in own]
        lows = [float(row["cosine_low"]) for row in own], [per_token(row, "_low") for row in own]
        highs = [float(r["cosine_high"]) for r in own], [per_token(r, "_high") for r in own]
        label = f"{policy}, accuracy {float(own[0]['accuracy']):.2f}"
        for axis, mean, low, high in zip(axes, means, lows, highs):
            errors = [[m - x for m, x in zip(mean, low)], [x - m for m, x in zip(mean, high)]]
            how = dict(color=f"C{i}", marker=curves.MARKERS[i], linestyle="", label=label)
            fill = ["white", f"C{i}", "black"][i % 3]
            axis.errorbar(mean, ys, xerr=errors, markerfacecolor=fill, markersize=8, **how)
    for axis, title in zip(axes, ("cosine with the true gradient", "S/N per 10,000 tokens")):
        axis.set_title(title, fontsize=15)
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
    axes[0].set_yticks(range(len(names)), names, fontsize=13)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def signs_picture(rows: list[dict], path: Path) -> None:
    """Above: share of right signs by position, a line an N. Below: how large the exact A is."""
    pyplot, policies = plotting(13), grouped(rows, "policy")
    thirds = [group for group in GROUPS if group.endswith("third")]
    figure, axes = pyplot.subplots(
        2, len(policies), figsize=(4 * len(policies) + 1, 7), sharex=True, sharey="row",
        height_ratios=[2.4, 1], squeeze=False, layout="constrained",
    )  # fmt: skip
    for column, policy in zip(axes.T, policies):
        own = {group: by_group(rows)[policy, group] for group in thirds}
        for i, n in enumerate([*map(str, NS), "whole answer"]):
            at = [(x, own[group][n]) for x, group in enumerate(thirds) if own[group][n]["right"]]
            shares = [float(row["right"]) for _, row in at]
            errors = [(float(row["right_high"]) - float(row["right_low"])) / 2 for _, row in at]
            label = f"N = {n}" if n.isdigit() else "whole answer (GRPO)"
            xs = [x + 0.05 * (i - 2) for x, _ in at]
            how = curves.style(i) | dict(markersize=8, capsize=3, label=label)
            column[0].errorbar(xs, shares, errors, **how)
        sizes = [float(own[group]["1"]["size"]) for group in thirds]
        column[1].bar(range(3), sizes, color="#888888", edgecolor="black", hatch="//", width=0.5)
        column[0].set(title=policy, ylim=(0, 1.02))
        column[1].set_xticks(range(3), ["first\nthird", "middle", "last"])
        for axis in column:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("share of right signs")
    axes[1, 0].set_ylabel("mean |exact A|")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write(out: Path) -> None:
    """microscope.md and the pictures, from the rows that are there."""
    found = {part: rows for part in TEXTS if (rows := read(out, part))}
    parts = [f"## {TEXTS[part][0]}\n\n{TEXTS[part][1](rows)}" for part, rows in found.items()]
    if "cosines" in found and (text := predict_text(found["cosines"], out)):
        parts.append(f"## Does it predict training?\n\n{text}")
    (out / "microscope.md").write_text("\n".join(parts), "utf-8")
    pictures = dict(cosines=(dots_picture, "microscope.png"), signs=(signs_picture, "signs.png"))
    try:
        for part, (picture, name) in pictures.items():
            if part in found:
                picture(found[part], out / name)
    except ImportError:
        print(curves.NO_MATPLOTLIB)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--out", type=Path, help="folder of tables and pictures")
    parser.add_argument("--tiny", action="store_true", help="does it run? its numbers say nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the policy is too small to share out
    out = args.out or (
        Path("runs", "microscope-tiny") if args.tiny else ROOT / "tutorials" / "results"
    )
    out.mkdir(parents=True, exist_ok=True)
    for part in args.only:
        fill(out, part, TINY if args.tiny else Sizes())
    write(out)
    print(f"tables, microscope.md and pictures: {out}/")


if __name__ == "__main__":
    main()
