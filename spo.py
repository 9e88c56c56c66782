"""SPO: Segment Policy Optimization (Guo et al., arXiv 2505.23564 v2), chain and tree, in one file.

GRPO gives all tokens of an answer one advantage; PPO trains a critic to give each its own. SPO
stands between: cut the answer into segments, estimate the value V of each cut by Monte Carlo, and
credit a segment with the value it added (Eq. 2):

    A_k = V(state at the end of segment k) - V(state at its start),    V(end of answer) = reward

    chain: answers are cut before unlikely tokens; V(cut) = mean reward of N fresh continuations
    tree:  M tokens, b times; M more after each, b times; ...; the last to the end. V(node) = mean
           of V over its children, A(node) = V(node) - V(parent), and each node is trained

    L = -1/Z sum_t M_t min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) + kl_coef KL(pi || pi_initial)

with r_t = pi(y_t) / pi_old(y_t). The mask M_t is 1 where pi_old(y_t) is below a threshold and 0
elsewhere; Z is the sum of M_t. The KL is k3, summed over a sample's tokens with M_t = 1, mean over
samples.

Departures from the paper, and choices where paper and released code disagree:
 1. Advantages are used as they are. The code whitens them per micro-batch, which can flip signs.
 2. Z is the sum over the whole optimiser step, so micro-batches do not change the gradient. Answers
    without advantage count in it; a tree's nodes without are no samples, and do not.
 3. The end token is trained, for a policy from scratch must learn to stop. A cut answer has none.
 4. Prefixes are cut on token ids, never decoded and tokenised again.
 5. No top-p: the policy that is scored is exactly the one that sampled. The KL is off by default.
 6. One answer per problem by default. V replaces the group's mean as baseline, so SPO needs no
    groups, and other problems teach more than other answers to the same one.
 7. Sizes and learning rate, which stays as it is after its warm-up, suit the small policy of the
    built-in task; for other models some are the paper's (LARGE).
 8. Replay trains at most replay_total nodes a step, and the others wait. The code shuffles and cuts,
    or repeats, to a fixed number.

    python spo.py                   65 s on two cores, held-out accuracy 0.22 -> 0.86
    python spo.py --variant tree    75 s, 0.22 -> 0.93
    python spo.py --partition trajectory --prompts 8 --group_size 8 --mask False     GRPO, no std
"""

import math
import random
import time
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal, NamedTuple

import common  # first: Ctrl-C during the imports ends without a traceback
import torch
from common import BadInput, Batch, Problem, Rollout, Sample, arg
from torch import Tensor
from transformers import get_constant_schedule_with_warmup


@dataclass
class Config:
    variant: Literal["chain", "tree"] = arg("chain", "values from continuations, or from children")
    partition: Literal["cutpoint", "fixed", "newline", "trajectory"] = arg(
        "cutpoint", "chain: where to cut; newline is VinePPO's, trajectory (one segment) GRPO's"
    )
    interval: int = arg(1, "cutpoints in a segment, by partition cutpoint (the paper's m)", low=1)
    threshold: float = arg(
        0.9, "a token sampled at a lower probability is a cutpoint (rho)", above=0, high=1
    )
    continuations: int = arg(4, "chain: fresh ones per boundary, to estimate its value (N)", low=1)
    segment_tokens: int = arg(
        12, "fixed, tree: tokens of a segment (M); the tree's last may go on", low=1
    )
    branching: list[int] = arg([2, 2, 2], "tree: children of a node, level by level: 6 6 6", low=2)
    scale_advantages: bool = arg(False, "tree: divide by the std of the siblings' values")
    replay_age: int = arg(
        0, "tree: nodes wait up to so many steps to be used; 0: used at once", low=0
    )
    replay_nodes: int = arg(
        32, "replay: most nodes of a problem in a step; a 2-2-2 tree has 14", low=1
    )
    replay_total: int = arg(512, "replay: most nodes in a step; the others wait", low=1)
    mask: bool = arg(True, "train only tokens below the threshold: the probability mask")
    prompts: int = arg(64, "problems per step", low=1)
    group_size: int = arg(1, "chain: answers per problem (G)", low=1)
    batch_size: int = arg(0, "answers, or nodes, in an optimiser step; 0: all of the step's", low=0)
    epochs: int = arg(1, "passes over each step's answers or nodes", low=1)
    steps: int = arg(100, "rounds of sampling and training", low=1)
    lr: float = arg(5e-4, "AdamW's learning rate", above=0)
    warmup_updates: int = arg(
        10, "optimiser steps over which the learning rate rises from 0", low=0
    )
    clip_eps: float = arg(0.2, "clip range of the ratio (eps)", above=0)
    kl_coef: float = arg(
        0.0, "weight of the KL to the initial policy, which is loaded if above 0", low=0
    )
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm", above=0, high=1e12)
    temperature: float = arg(1.0, "of sampling and of scoring", low=0.01)
    max_new_tokens: int = arg(80, "longest answer, in tokens", low=1)

    def __post_init__(self):
        common.check_bounds(self)
        if self.partition == "trajectory" and self.group_size == 1:
            raise BadInput("--partition trajectory: needs a group, so --group_size 2 or more")
        tree, answers = self.variant == "tree", self.prompts * self.group_size
        if not tree and self.batch_size and answers % self.batch_size:
            raise BadInput(f"--batch_size {self.batch_size}: must divide {answers} answers a step")
        if tree and (self.partition != "cutpoint" or self.group_size > 1):
            raise BadInput("--variant tree: takes no --partition or --group_size, but --branching")
        if not tree and (self.replay_age or self.scale_advantages):
            raise BadInput("--replay_age, --scale_advantages: are for --variant tree only")


TINY = dict(
    terms=3, warm_start_steps=250, prompts=32, steps=40, max_new_tokens=32, segment_tokens=8,
    eval_problems=200, eval_samples=2, show_every=20, save_every=20,
)  # fmt: skip
LARGE = dict(  # of the paper, for the models of about 1B it trains
    interval=5, continuations=9, segment_tokens=30, branching=[4, 4, 4], epochs=2,
    lr=1e-6, kl_coef=1e-4, temperature=0.6,
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


def tree_advantages(parents: list[int], rewards: list[float], scale: bool = False):
    """Values and advantages of a tree's nodes, two lists of floats (Section 4).

    parents: each node's index, -1 for a root, listed parents first; rewards: count where a node has
    no children. V(n) is the mean over its DIRECT children, A(n) = V(n) - V(parent), a root's is 0.
    scale: A is also divided by the population std of the siblings' values. In exact fractions: a
    rounding error must not tell equal siblings apart. Raises ValueError for a parent out of order.

    >>> tree_advantages([-1, 0, 0, 1, 1], [0, 0, 0, 1, 0])
    ([0.25, 0.5, 0.0, 1.0, 0.0], [0.0, 0.25, -0.25, 0.5, -0.5])
    """
    children = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(f"node {node} must stand after its parent, which is {parent}")
        if parent >= 0:
            children[parent].append(node)
    values, advantages = [Fraction(reward) for reward in rewards], [0.0] * len(parents)
    for node in reversed(range(len(parents))):
        if below := children[node]:
            values[node] = sum(values[child] for child in below) / len(below)
            differences = [values[child] - values[node] for child in below]
            std = (sum(d * d for d in differences) / len(below)) ** 0.5 if scale else 1
            for child, difference in zip(below, differences):
                advantages[child] = float(difference / std) if difference else 0.0
    return [float(value) for value in values], advantages


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


# ---------------------------------------------------------------------------- credit assignment


class Answer(NamedTuple):
    owner: int  # which of the step's problems it answers
    rollout: Rollout
    starts: list[int]  # its segments' first tokens
    advantages: list[float]  # one per token


class Credit(NamedTuple):
    samples: list[Sample]  # to train on: whole answers (chain), nodes with A != 0 (tree)
    owners: list[int]  # the problem of each sample
    answers: list[Answer]  # tree: one for each leaf
    accuracy: float  # mean value of the problems, as sampled
    entropy: float  # the policy's, mean over the tokens of `samples`, nats
    tokens: int  # all that were sampled


def estimate_values(model, tokenizer, states, cfg: Config, generator) -> tuple[list[float], int]:
    """V-hat of each state (prompt ids, answer ids so far, true answer), and the tokens it took.

    The mean reward of N fresh continuations by the sampling policy, each within what is left of
    the answer's budget. Equal states share one estimate.
    """
    states = [(tuple(prompt), tuple(done), answer) for prompt, done, answer in states]
    distinct = list(dict.fromkeys(states))
    size, options = cfg.continuations, dict(temperature=cfg.temperature, generator=generator)
    rollouts = common.complete(
        model, tokenizer, distinct, size, cfg.max_new_tokens, **options, bar="estimating values"
    )
    values = torch.tensor([r.reward for r in rollouts]).view(-1, size).mean(1)  # (distinct,)
    value_of = dict(zip(distinct, values.tolist()))
    return [value_of[state] for state in states], sum(len(r.ids) for r in rollouts)


def cutpoints(s: Sample, cfg: Config, interval: int = 1) -> list[int]:
    return segment_starts(torch.tensor(s.old_logprobs).exp(), interval, cfg.threshold)


def boundaries(s: Sample, model, tokenizer, cfg: Config) -> list[int]:
    """First tokens of the segments of an answer with old log-probs, by cfg.partition."""
    if cfg.partition == "cutpoint":
        return cutpoints(s, cfg, cfg.interval)
    if cfg.partition == "fixed":
        return list(range(0, len(s.ids), cfg.segment_tokens))
    if cfg.partition == "newline":
        stops = common.eos_ids(model, tokenizer)
        return common.step_starts(s.ids, tokenizer, "\n", len(s.ids), stops)
    return [0]


def assign_credit(model, tokenizer, rollouts, answers, cfg: Config, generator) -> Credit:
    """SPO-chain: rewarded rollouts, group_size to a prompt, and their true answers -> credit."""
    samples = [Sample(r.prompt, r.ids) for r in rollouts]
    entropy = common.score(model, samples, cfg.temperature)
    starts = [boundaries(s, model, tokenizer, cfg) for s in samples]
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, cfg.group_size)  # (P, G)
    if cfg.partition == "trajectory":  # GRPO: the value of the prompt is the mean of its group
        flat, tokens = rewards.mean(1).repeat_interleave(cfg.group_size).tolist(), 0
    else:
        triples = zip(samples, answers, starts)
        states = [(s.context, s.ids[:t], answer) for s, answer, cuts in triples for t in cuts]
        flat, tokens = estimate_values(model, tokenizer, states, cfg, generator)
    values = iter(flat)  # one per boundary, in order
    for s, r, cuts in zip(samples, rollouts, starts):
        advantages = chain_advantages(cuts, [next(values) for _ in cuts], r.reward, len(r.ids))
        s.advantages = advantages.tolist()
    owners = [i // cfg.group_size for i in range(len(rollouts))]
    credited = list(map(Answer, owners, rollouts, starts, [s.advantages for s in samples]))
    tokens += sum(len(r.ids) for r in rollouts)
    return Credit(samples, owners, credited, rewards.mean().item(), entropy, tokens)


class Tree(NamedTuple):
    """The trees of a step's problems as one list of nodes: first the roots, then level by level."""

    nodes: list[Rollout]  # prompt: all that stands above; ids: the node's own segment
    parents: list[int]  # -1 for a root, whose segment is empty

    def path(self, node: int) -> list[int]:
        """From the root, whose index is the problem's, down to `node`."""
        return [node] if self.parents[node] < 0 else [*self.path(self.parents[node]), node]


def grow_trees(model, tokenizer, states, cfg: Config, generator) -> Tree:
    """A tree from each state. A node that was cut after segment_tokens gets children, one that
    ended is a leaf; on the last level answers run to their end."""
    states, level = list(states), list(range(len(states)))  # one per node; the nodes to expand
    tree = Tree([Rollout(prompt, [], False) for prompt, _, _ in states], [-1] * len(states))
    longest, options = cfg.max_new_tokens, dict(temperature=cfg.temperature, generator=generator)
    for depth, width in enumerate(cfg.branching, 1):
        expanded, limit = level, cfg.segment_tokens if depth < len(cfg.branching) else None
        at, size = [states[node] for node in expanded], (width, longest, limit)
        rollouts, level = common.complete(model, tokenizer, at, *size, **options), []
        for i, r in enumerate(rollouts):
            tree.nodes.append(r)
            tree.parents.append(expanded[i // width])
            prompt, done, answer = states[expanded[i // width]]
            states.append((prompt, [*done, *r.ids], answer))
            room = common.answer_budget(model, prompt, longest) - len(done) - len(r.ids)
            if room and not r.finished:
                level.append(len(tree.nodes) - 1)
    return tree


def credit_trees(model, tree: Tree, cfg: Config) -> Credit:
    """SPO-tree: each node with A != 0 is a sample. What stands above it is the context, and all
    tokens of its own segment have its advantage."""
    rewards, inner = [node.reward for node in tree.nodes], {*tree.parents}
    values, advantages = tree_advantages(tree.parents, rewards, cfg.scale_advantages)
    samples, owners, answers = [], [], []
    for i, (node, advantage) in enumerate(zip(tree.nodes, advantages)):
        root, *path = tree.path(i)
        if advantage:
            samples.append(Sample(node.prompt, node.ids, [advantage] * len(node.ids)))
            owners.append(root)
        if i not in inner:  # a leaf: an answer
            prompt = tree.nodes[root].prompt
            ids = [*node.prompt, *node.ids][len(prompt) :]
            starts = [len(tree.nodes[j].prompt) - len(prompt) for j in path]
            credits = [advantages[j] for j in path for _ in tree.nodes[j].ids]
            rollout = Rollout(prompt, ids, node.finished, node.reward)
            answers.append(Answer(root, rollout, starts, credits))
    entropy = common.score(model, samples, cfg.temperature) if samples else 0.0
    roots, tokens = tree.parents.count(-1), sum(len(node.ids) for node in tree.nodes)
    return Credit(samples, owners, answers, sum(values[:roots]) / roots, entropy, tokens)


def draw_replay(waiting: list, step: int, cfg: Config, seed: str) -> tuple[list[Sample], list]:
    """The samples to train on in this step, and what waits for later ones.

    waiting: (step it was sampled in, question, a Sample's fields). What is replay_age steps old is
    dropped. At most replay_nodes of a question and replay_total of all are drawn, each to be used
    once, with the advantages and log-probs that it was sampled with.
    """
    drawn, later, count = [], [], Counter()
    recent = [entry for entry in waiting if step - entry[0] < cfg.replay_age]
    for entry in random.Random(seed).sample(recent, len(recent)):
        question = entry[1]
        if len(drawn) < cfg.replay_total and count[question] < cfg.replay_nodes:
            count[question] += 1
            drawn.append(entry)
        else:
            later.append(entry)
    return [Sample(**fields) for _, _, fields in drawn], later


# -------------------------------------------------------------------------------------- the run


def update(model, optimizer, schedule, samples, cfg: Config, seed: str, reference=None) -> dict:
    """`epochs` passes over the samples, `batch_size` to an optimiser step; returns its metrics."""
    sums = dict(loss=0.0, kl=0.0, clip_fraction=0.0, grad_norm=0.0)
    sums |= dict(kl_ref=0.0) if reference else {}
    steps, tokens = 0, 0
    for epoch in range(cfg.epochs):
        order = random.Random(f"{seed}-{epoch}").sample(samples, len(samples))
        parts = math.ceil(len(order) / (cfg.batch_size or len(order) or 1))
        for minibatch in (order[i::parts] for i in range(parts)):  # of one size, give or take one
            z = trained_tokens(common.collate(minibatch), cfg).sum().item()
            loss_sum = 0.0
            # A sample without signal has gradient 0: it counts in Z, and needs no forward pass.
            trained = [s for s in minibatch if reference or any(s.advantages)]
            for micro in common.micro_batches(trained):
                batch = common.collate(micro, model.device)
                mask = trained_tokens(batch, cfg)  # (B, T)
                logprobs = common.token_logprobs(model, batch, cfg.temperature)  # (B, T)
                loss, clipped = spo_loss(logprobs, batch, mask, z, cfg.clip_eps)
                if reference:
                    with torch.no_grad():
                        ref_logprobs = common.token_logprobs(reference, batch, cfg.temperature)
                    divergence = (common.k3(ref_logprobs - logprobs) * mask).sum()
                    loss = loss + cfg.kl_coef * divergence / len(minibatch)
                    sums["kl_ref"] += divergence.item()
                common.backward(model, loss)
                loss_sum += loss.item()
                moved = common.k3(logprobs.detach() - batch.old_logprobs)  # (B, T)
                sums["kl"] += (moved * mask).sum().item()
                sums["clip_fraction"] += clipped.sum().item()
                tokens += mask.sum().item()
            norm = common.optimizer_step(model, optimizer, schedule, loss_sum, cfg.max_grad_norm)
            sums["loss"], sums["grad_norm"] = sums["loss"] + loss_sum, sums["grad_norm"] + norm
            steps += 1
    per_step = ("loss", "grad_norm")  # the others are means over tokens
    return {key: sums[key] / max(steps if key in per_step else tokens, 1) for key in sums}


def pick_answer(credit: Credit) -> int:
    """Index of the answer to show: the first failure that got any credit, else the first."""
    failed = (i for i, a in enumerate(credit.answers) if any(a.advantages) and not a.rollout.reward)
    return next(failed, 0)


def show_answer(
    problems, credit: Credit, places: str, tokenizer, cfg: Config, colour: bool, width: int
) -> str:
    """SPO-chain: an answer of the step with its credit. places: what the cutpoints of all are."""
    i = pick_answer(credit)
    owner, r, starts, advantages = credit.answers[i]
    title, notes = common.answer_notes(problems[owner], r, tokenizer)
    pieces, marked = [tokenizer.decode([id]) for id in r.ids], {*cutpoints(credit.samples[i], cfg)}
    for t in marked - {*starts} if cfg.partition == "cutpoint" else marked:
        pieces[t] = "'" + pieces[t]
    labels = {t: f"{advantages[t]:+.2f}" for t in starts}
    lines = common.credit_lines(pieces, advantages, labels, notes, colour)
    legend = f"  | a segment, ' a cutpoint within; cutpoints of this step:\n  {places}"
    return "\n".join([title, *lines, legend])


def show_tree(
    problems, tree: Tree, credit: Credit, tokenizer, cfg: Config, colour: bool, width: int
) -> str:
    """SPO-tree: the tree of a problem, a node a line. Where all answers are right or all wrong
    nothing has credit, and only the node above them is shown."""
    owner = credit.answers[pick_answer(credit)].owner
    rewards, problem = [node.reward for node in tree.nodes], problems[owner]
    values, advantages = tree_advantages(tree.parents, rewards, cfg.scale_advantages)
    tail = f", V {values[owner]:.2f}"
    lines = [common.fit(common.problem_title(problem), width - len(tail)) + tail]
    paths = {i: tree.path(i) for i in range(len(tree.nodes))}
    for i in sorted(paths, key=paths.get):  # depth first
        root, node = paths[i][0], tree.nodes[i]
        if root == owner != i and 0 < values[tree.parents[i]] < 1:
            ids = [*node.prompt, *node.ids][len(tree.nodes[root].prompt) :]
            wrong = common.first_wrong_token(ids, problem, tokenizer)
            mark = "!" if wrong is not None and wrong >= len(ids) - len(node.ids) else " "
            head = f"{'    ' * (len(paths[i]) - 1)}V {values[i]:.2f} A {advantages[i]:+.2f} {mark} "
            text = common.fit(tokenizer.decode(node.ids).replace("\n", " / "), width - len(head))
            lines.append(head + (common.paint(text, advantages[i]) if colour else text))
    return "\n".join(lines + ["  ! the first wrong token is in this node"] * problem.checkable)


def headline(cfg: Config, train: list[Problem]) -> str:
    tree = f"segments of {cfg.segment_tokens} tokens, branching {'-'.join(map(str, cfg.branching))}"
    how = tree if cfg.variant == "tree" else f"partition {cfg.partition}"
    sizes = f"{cfg.steps} steps of {cfg.prompts} problems"
    sizes += f" x {cfg.group_size} answers" if cfg.group_size > 1 else ""
    return f"SPO-{cfg.variant}: {sizes}, {how}, mask {'on' if cfg.mask else 'off'}"


def main() -> None:
    setup = common.set_up(Config, "spo", __doc__, TINY, LARGE, headline)
    cfg, run, folder, train = setup.cfg, setup.run, setup.folder, setup.train
    model, tokenizer, evaluate = setup.model, setup.tokenizer, setup.evaluate
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, cfg.warmup_updates)
    generator = torch.Generator(model.device).manual_seed(run.seed)
    trainer = (model, tokenizer, optimizer, schedule, generator)
    reference = common.reference_policy(run, train, model) if cfg.kl_coef else None
    facts = common.wrong_facts(run.seed) if train[0].checkable else None
    counts = dict(failures=0, hits=0, chance=0.0, waiting=[])
    progress = common.begin(setup, trainer, **counts)
    for step, bar in common.training_steps(folder, run, cfg.steps, trainer, progress):
        # 1. Sample answers or trees, and credit each segment with the value it added.
        began = time.time()
        problems = common.batch_at(train, step, cfg.prompts, run.seed)
        states = [common.initial_state(tokenizer, problem) for problem in problems]
        if cfg.variant == "tree":
            tree = grow_trees(model, tokenizer, states, cfg, generator)
            credit = credit_trees(model, tree, cfg)
        else:
            size, options = (cfg.group_size, cfg.max_new_tokens), dict(temperature=cfg.temperature)
            options |= dict(generator=generator)
            rollouts = common.complete(model, tokenizer, states, *size, **options)
            answers = [problem.answer for problem in problems for _ in range(cfg.group_size)]
            credit = assign_credit(model, tokenizer, rollouts, answers, cfg, generator)

        # 2. Train on them.
        seed, samples, waiting = f"{run.seed}-{step}", credit.samples, []
        if cfg.replay_age:
            owned = zip(credit.owners, samples)
            new = [(step, problems[owner].question, vars(s)) for owner, s in owned]
            samples, waiting = draw_replay(progress["waiting"] + new, step, cfg, seed)
        with common.saved_if_not_finite(folder, step, trainer, progress):
            metrics = update(model, optimizer, schedule, samples, cfg, seed, reference)

        for owner, *credited in credit.answers:
            common.count_hit(progress, problems[owner], *credited, tokenizer)
        progress["waiting"] = waiting
        progress["sampled_tokens"] += credit.tokens
        progress["seconds"] += time.time() - began
        count = len(credit.answers)
        segments = [a.advantages[t] for a in credit.answers for t in a.starts]
        common.log_step(
            folder, run, step, bar, schedule, progress, evaluate,
            accuracy=credit.accuracy,
            **metrics,
            entropy=credit.entropy,
            no_signal=sum(not any(a.advantages) for a in credit.answers) / count,
            boundaries=len(segments) / count,
            trained=len(samples) if cfg.variant == "tree" else sum(map(bool, segments)),
            length=sum(len(a.rollout.ids) for a in credit.answers) / count,
        )  # fmt: skip
        if run.show_every and (step + 1) % run.show_every == 0:
            if cfg.variant == "tree":
                view = partial(show_tree, problems, tree, credit, tokenizer, cfg)
            else:
                rows = [(s.ids, cutpoints(s, cfg)) for s in credit.samples[:64]]
                places = common.places_of(rows, facts, tokenizer)
                view = partial(show_answer, problems, credit, places, tokenizer, cfg)
            common.show(folder, lambda **how: f"step {step + 1}: {view(**how)}")
    common.finish_run(folder, progress, evaluate(), *common.hit_rates(progress))


if __name__ == "__main__":
    common.cli(main)
