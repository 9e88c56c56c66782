"""SPO: Segment Policy Optimization (Guo et al., arXiv 2505.23564 v2), chain and tree, in one file.

GRPO gives all tokens of an answer one advantage; PPO trains a critic to give each its own. SPO
stands between: cut the answer into segments, estimate the value V of the state at each cut by Monte
Carlo, and credit a segment with the value it added (Eq. 2):

    A_k = V(state at the end of segment k) - V(state at its start),    V(end of answer) = reward

Read `main` at the end first, then from the top; the part "what is shown and logged" can wait. Of
common.py open the data classes (Problem, Rollout, Sample, Batch, Compute), `complete` (`sample`),
`score` (`token_logprobs`), `minibatches`, `clipped_surrogate`, `k3` and `optimizer_step`.
--steps counts rounds; a round (`step`) samples, then makes updates (optimiser steps).

A value changes only where the policy could have gone on otherwise, so an answer is cut before
unlikely tokens (cutpoints: their probability is below --threshold). A segment's first token is its
boundary, or start. All its tokens get its A, but in both variants the loss trains cutpoints only
(the mask M_t). In a chain with --interval 1 each cutpoint begins a segment, so cutpoints and first
tokens are the same. In the drawings " / " is a line break.

    chain: V of each cut (marked |) is the mean reward of N fresh continuations from there

        12+6-8:  12+6=1|8 / 18-8=1|1 / #### 1|1   reward 0      A of "8 / 18-8=1"   3/4 - 2/4
                       |          |          |                  A of "1 / #### 1"     0 - 3/4
                   V  2/4        3/4         0                  A of the last "1"     0 - 0

        "12+6=1" before the first cut has A = 0: the policy was sure of it, so no value changed

    tree: each node gets b children (--branching) of segment_tokens tokens; those of the last level
    run to the end. V(node) = mean V of its children; A(node) = V(node) - V(parent)

        12+6-8 -+- 12+6=18 / 18-8 -+- =10 / #### 10     V = reward = 1
                |  V = 1/2         +- =11 / #### 11     V = reward = 0
        V = 1/4 |
                +- 12+6=19 / 19-8 -+- =11 / #### 11     V = 0
                   V = 0           +- =11 / #### 11     V = 0

        each node with A != 0 is a sample, and all tokens of its segment have its A

    L = -1/Z sum_t M_t min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) + kl_coef KL(pi || pi_initial)

with r_t = pi(y_t) / pi_old(y_t). The mask M_t is 1 where pi_old(y_t) is below a threshold and 0
elsewhere; Z is the sum of M_t. The KL is k3(log pi_initial - log pi), summed over a sample's tokens
with M_t = 1, mean over samples, as in the paper. With one segment an answer, V = the mean reward of
its group, M_t = 1 and no KL, L is GRPO's without std, as a mean over all tokens of an update.

The built-in task is running sums, an operation a line, for a small policy that has learned some
single-digit facts wrong (its warm start) and has to find out which (README).

Departures from the paper, and choices where paper and released code disagree:
 1. Advantages are used as they are. The authors' code whitens them per micro-batch, which can flip
    signs.
 2. Z is the sum over the whole update, so micro-batches do not change the gradient (in the authors'
    code it is per micro-batch). Chain: answers whose advantages are all 0 count in Z. Tree: nodes
    with A = 0 do not, for they are no samples, as in paper and authors' code.
 3. The end token is trained, for a policy from scratch must learn to stop; the authors' code masks
    it. An answer that its budget has truncated has no end token.
 4. Prefixes are cut on token ids, never decoded and tokenised again.
 5. No top-p: the policy that is scored is exactly the one that sampled. On the built-in task the KL
    is off.
 6. Two answers per problem by default, so that GRPO (--partition trajectory --mask False) has a
    group. SPO itself needs none: V replaces the group's mean as baseline.
 7. Sizes and learning rate suit the small policy of the built-in task; for other models some are
    the paper's (LARGE).
 8. Replay is off by default (authors': age 8): a round trains all nodes with A != 0. With it, at
    most replay_nodes of a problem and replay_total in all; the others wait, off-policy, and are
    dropped when replay_age rounds old. The authors' code cuts, or repeats, to a fixed number.

    python spo.py                   two minutes on two cores, held-out accuracy 0.21 -> 0.90
    python spo.py --variant tree    trees
    python spo.py --partition trajectory --mask False     GRPO of the same problems, no std
"""

import copy
import math
import operator
import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import accumulate
from typing import Literal, NamedTuple

import common  # first: Ctrl-C during the imports ends without a traceback
import torch
from common import BadInput, Batch, Compute, Problem, Rollout, Sample, arg
from torch import Tensor
from transformers import get_linear_schedule_with_warmup


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
    continuations: int = arg(2, "chain: fresh ones per boundary, to estimate its value (N)", low=1)
    segment_tokens: int = arg(
        12, "fixed, tree: tokens of a segment; a tree's last ones run to the end", low=1
    )
    branching: list[int] = arg(
        [2, 2, 2], "tree: children of a node, level by level, as in --branching 6 6 6", low=2
    )
    scale_advantages: bool = arg(False, "tree: divide by the std of the siblings' values")
    level_weights: bool = arg(
        False, "tree: every level gets the same weight in all (node_weights); off, every node does"
    )
    replay_age: int = arg(
        0,
        "tree: rounds in which a node may wait for its one update, its own included; 1: none wait, "
        "but caps hold; 0: no replay, no caps",
        low=0,
    )
    replay_nodes: int = arg(
        32, "replay: most nodes of a problem in a round; a 2-2-2 tree has 14", low=1
    )
    replay_total: int = arg(512, "replay: most nodes in a round; the others wait", low=1)
    mask: bool = arg(True, "train only tokens below the threshold: the probability mask")
    prompts: int = arg(64, "problems per round", low=1)
    group_size: int = arg(2, "chain: answers per problem (G)", low=1)
    batch_size: int = arg(
        64, "answers, or nodes, per update, at most; 0: all of the round's", low=0
    )
    epochs: int = arg(1, "passes over each round's answers or nodes", low=1)
    steps: int = arg(100, "rounds of sampling and training", low=1)
    lr: float = arg(
        5e-4, "AdamW's highest learning rate; from there it falls linearly to 0", above=0
    )
    warmup_updates: int = arg(10, "updates over which the learning rate rises from 0", low=0)
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
        tree, answer_count = self.variant == "tree", self.prompts * self.group_size
        # Chain: updates are all of one size. Tree: it is not known how many nodes will train.
        if not tree and self.batch_size and answer_count % min(self.batch_size, answer_count):
            wrong = f"--batch_size {self.batch_size}"
            raise BadInput(f"{wrong}: must divide {answer_count} answers a round")
        if tree and self.partition != "cutpoint":
            raise BadInput("--variant tree: takes no --partition, but --branching")
        if not tree and (self.replay_age or self.scale_advantages or self.level_weights):
            only = "--replay_age, --scale_advantages, --level_weights"
            raise BadInput(f"{only}: are for --variant tree only")


# --tiny sets these defaults of Config and of common.RunConfig.
TINY = dict(
    terms=3, warm_start_steps=250, prompts=32, steps=40, max_new_tokens=32, segment_tokens=8,
    eval_problems=200, eval_samples=2, show_every=20, save_every=20,
)  # fmt: skip
# A --model given with --data (not the built-in task) sets these. They are the paper's for SPO-chain
# on a model of 1B parameters, but for group_size (paper: 8) and branching: the paper trains a chain
# or a tree, and its trees are 6-6-6, for one epoch. common.LARGE has the rest.
LARGE = dict(
    interval=5, continuations=9, segment_tokens=30, branching=[4, 4, 4], group_size=1,
    batch_size=0, epochs=2, lr=1e-6, kl_coef=1e-4, temperature=0.6,
)  # fmt: skip


# ------------------------------------------------------------------------------- pure functions


def segment_starts(probs, interval: int, threshold: float) -> list[int]:
    """Boundaries of the cutpoint partition: the index of each segment's first token (Section 4).

    probs (T,): pi_old's probability of each token it sampled, at the sampling temperature. A
    cutpoint is a token strictly below `threshold`; a boundary is the first cutpoint and every
    interval-th after it; none without a cutpoint. Raises ValueError for an interval below 1.

    >>> segment_starts([1.0, 0.5, 1.0, 0.8, 0.3, 1.0], interval=2, threshold=0.9)
    [1, 4]
    """
    if interval < 1:
        raise ValueError(f"interval must be at least 1, not {interval}")
    cutpoints = (torch.as_tensor(probs) < threshold).nonzero()[:, 0].tolist()
    return cutpoints[::interval]


def chain_advantages(starts: list[int], values: list[float], reward: float, length: int) -> Tensor:
    """(length,) one advantage per response token: a segment's value at its end minus at its start.

    values: V-hat at each of starts. The last segment ends in the answer's own reward, no estimate.
    Tokens before the first start get 0: the policy was sure of them, so no value changed; without a
    start all do. Raises ValueError unless starts ascend in [0, length) and have a value each.

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

    parents[n]: the index of n's parent, -1 for a root; a parent stands before its children.
    rewards[n]: used only where n is a leaf. V(n) is the mean over its DIRECT children, and
    A(n) = V(n) - V(parent), a root's is 0. scale: A is also divided by the population std of the
    siblings' values. In exact fractions: a rounding error must not tell equal siblings apart.
    Raises ValueError for a parent out of order.

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


def node_weights(parents: list[int]) -> list[float]:
    """Weights that sum to the same on each level of a round's trees (--level_weights; ours):
    n / (m k) for n nodes (A = 0 too) on m levels, k on this one; mean 1. In the paper all are 1, so
    the last level, which has most nodes, outweighs the rest. Nodes are balanced, not tokens.

    parents: as for `tree_advantages`. A root, which is on no level, weighs 0.

    >>> node_weights([-1, 0, 0, 1, 1, 2, 2])
    [0.0, 1.5, 1.5, 0.75, 0.75, 0.75, 0.75]
    """
    depths = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    size = Counter(depth for depth in depths if depth)
    return [size.total() / (len(size) * size[depth]) if depth else 0.0 for depth in depths]


def trained_tokens(batch: Batch, cfg: Config) -> Tensor:
    """(B, T) bool: M_t, the tokens pi_old gave less than `threshold`; all of them with mask off."""
    if not cfg.mask:
        return batch.mask
    return batch.mask & (batch.old_logprobs.exp() < cfg.threshold)


def spo_loss(logprobs: Tensor, batch: Batch, mask: Tensor, normaliser: int, clip_eps: float):
    """One micro-batch's part of L without its KL (`update` adds that), and (B, T) bool: where the
    clip has stopped the gradient.

    mask: M (B, T). normaliser: Z, the sum of M over the WHOLE update; where that is 0, so is the
    loss.
    """
    log_ratio = logprobs - batch.old_logprobs  # (B, T)
    objective, clipped = common.clipped_surrogate(log_ratio, batch.advantages, clip_eps)  # (B, T)
    return -(objective * mask).sum() / max(normaliser, 1), clipped & mask


# ---------------------------------------------------------------------------- credit assignment


class Answer(NamedTuple):
    """An answer with its credit; of a tree, the path down to a leaf. For metrics and display."""

    owner: int  # which of the round's problems it answers
    rollout: Rollout
    starts: list[int]  # its boundaries: its segments' first tokens
    advantages: list[float]  # one per token


class Credit(NamedTuple):
    samples: list[Sample]  # to train on: whole answers (chain), nodes with A != 0 (tree)
    owners: list[int]  # the problem of each sample
    answers: list[Answer]  # chain: answers[i] is that of samples[i]
    accuracy: float  # mean reward of the sampled answers (tree: mean V of the roots)
    entropy: float  # the policy's, mean over the tokens of `samples`, nats
    tokens: int  # all that were sampled


def estimate_values(
    model, tokenizer, states, cfg: Config, generator, compute=Compute()
) -> tuple[list[float], int]:
    """V-hat of each state (prompt ids, answer ids so far, true answer); how many tokens that took.

    The mean reward of N fresh continuations by the sampling policy, each within what is left of
    the answer's budget. Equal states share one estimate.
    """
    states = [(tuple(prompt), tuple(done), answer) for prompt, done, answer in states]
    distinct = list(dict.fromkeys(states))
    rollouts = common.complete(
        model, tokenizer, distinct, n=cfg.continuations, max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature, generator=generator, compute=compute, bar="estimating values",
    )  # fmt: skip
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, cfg.continuations)
    value_of = dict(zip(distinct, rewards.mean(1).tolist()))
    return [value_of[state] for state in states], sum(len(r.ids) for r in rollouts)


def cutpoints(s: Sample, cfg: Config, interval: int = 1) -> list[int]:
    return segment_starts(torch.tensor(s.old_logprobs).exp(), interval, cfg.threshold)


def boundaries(s: Sample, model, tokenizer, cfg: Config) -> list[int]:
    """First tokens of the segments of an answer with old log-probs, by cfg.partition."""
    if cfg.partition == "cutpoint":
        return cutpoints(s, cfg, cfg.interval)  # only every interval-th
    if cfg.partition == "fixed":
        return list(range(0, len(s.ids), cfg.segment_tokens))
    if cfg.partition == "newline":
        stops = common.eos_ids(model, tokenizer)  # an end token begins no segment
        return common.step_starts(s.ids, tokenizer, "\n", max_steps=len(s.ids), stops=stops)
    return [0]


def assign_credit(
    model, tokenizer, rollouts, true_answers, cfg: Config, generator, compute=Compute()
) -> Credit:
    """SPO-chain: rewarded rollouts, group_size to a prompt, and their true answers -> credit."""
    samples = [Sample(r.prompt, r.ids) for r in rollouts]
    # This also fills in each sample's old log-probs.
    entropy = common.score(model, samples, cfg.temperature, compute)
    all_starts = [boundaries(s, model, tokenizer, cfg) for s in samples]
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, cfg.group_size)  # (P, G)
    if cfg.partition == "trajectory":  # GRPO: the value of the prompt is the mean of its group
        values = rewards.mean(1).repeat_interleave(cfg.group_size).tolist()
        tokens = 0
    else:
        states = []
        for s, true_answer, starts in zip(samples, true_answers, all_starts, strict=True):
            states += [(s.context, s.ids[:t], true_answer) for t in starts]
        values, tokens = estimate_values(model, tokenizer, states, cfg, generator, compute)
    credited, used = [], 0  # used: how many of `values`, which has one per boundary, in order
    for i, (s, r, starts) in enumerate(zip(samples, rollouts, all_starts)):
        own = values[used : used + len(starts)]
        used += len(starts)
        s.advantages = chain_advantages(starts, own, r.reward, len(r.ids)).tolist()
        credited.append(Answer(i // cfg.group_size, r, starts, s.advantages))
    return Credit(
        samples=samples, owners=[a.owner for a in credited], answers=credited,
        accuracy=rewards.mean().item(), entropy=entropy,
        tokens=tokens + sum(len(r.ids) for r in rollouts),
    )  # fmt: skip


class Tree(NamedTuple):
    """A round's trees, one per problem, as one list of nodes: the roots, then level by level."""

    nodes: list[Rollout]  # prompt: all that stands above; ids: the node's own segment
    parents: list[int]  # -1 for a root, whose segment is empty

    def path(self, node: int) -> list[int]:
        """From the root, whose index is the problem's, down to `node`."""
        return [node] if self.parents[node] < 0 else [*self.path(self.parents[node]), node]


def grow_trees(model, tokenizer, states, cfg: Config, generator, compute=Compute()) -> Tree:
    """A tree from each state. A node that was cut after segment_tokens gets children, one that
    ended is a leaf; on the last level answers run to their end."""
    states = list(states)  # one per node
    tree = Tree([Rollout(prompt, [], False) for prompt, _, _ in states], [-1] * len(states))
    level = list(range(len(states)))  # the nodes to expand
    for depth, children in enumerate(cfg.branching, 1):
        rollouts = common.complete(
            model, tokenizer, [states[node] for node in level], n=children,
            max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, generator=generator,
            limit=cfg.segment_tokens if depth < len(cfg.branching) else None, compute=compute,
        )  # fmt: skip
        expanded, level = level, []
        for i, r in enumerate(rollouts):
            parent = expanded[i // children]
            tree.nodes.append(r)
            tree.parents.append(parent)
            prompt, done, answer = states[parent]
            states.append((prompt, [*done, *r.ids], answer))
            budget = common.answer_budget(model, prompt, cfg.max_new_tokens)
            # A node that has used up the whole answer's budget is a leaf too.
            if not r.finished and len(done) + len(r.ids) < budget:
                level.append(len(tree.nodes) - 1)
    return tree


def credit_trees(model, tree: Tree, cfg: Config, compute=Compute()) -> Credit:
    """SPO-tree: each node with A != 0 is a sample. What stands above it is the context, and all
    tokens of its own segment have its advantage."""
    rewards = [node.reward for node in tree.nodes]
    values, advantages = tree_advantages(tree.parents, rewards, cfg.scale_advantages)
    samples, owners, answers = [], [], []
    inner = {*tree.parents}
    weights = node_weights(tree.parents) if cfg.level_weights else [1.0] * len(tree.nodes)
    for i, (node, advantage) in enumerate(zip(tree.nodes, advantages)):
        root, *path = tree.path(i)
        if advantage:  # `score` below fills in the old log-probs
            # Weighting the advantage weights the loss: min() scales with a factor above 0.
            samples.append(Sample(node.prompt, node.ids, [advantage * weights[i]] * len(node.ids)))
            owners.append(root)
        if i not in inner:  # a leaf: an answer
            prompt = tree.nodes[root].prompt
            ids = [*node.prompt, *node.ids][len(prompt) :]
            starts = [len(tree.nodes[j].prompt) - len(prompt) for j in path]
            credits = [advantages[j] for j in path for _ in tree.nodes[j].ids]
            rollout = Rollout(prompt, ids, node.finished, node.reward)
            answers.append(Answer(root, rollout, starts, credits))
    entropy = common.score(model, samples, cfg.temperature, compute) if samples else 0.0
    roots = tree.parents.count(-1)
    return Credit(
        samples=samples, owners=owners, answers=answers, accuracy=sum(values[:roots]) / roots,
        entropy=entropy, tokens=sum(len(node.ids) for node in tree.nodes),
    )  # fmt: skip


def draw_replay(
    candidates: list, step: int, cfg: Config, shuffle: str
) -> tuple[list[Sample], list]:
    """The samples to train on in this round, and the candidates that wait for later ones.

    candidates: (step it was sampled in, question, a Sample's fields) of all that have waited and of
    this round's own. Those replay_age rounds old are dropped here: at an age of 1, all that waited.
    At most replay_nodes of a question and replay_total in all are drawn, each in one round only,
    with the advantages and log-probs that it was sampled with.
    """
    drawn, later, count = [], [], Counter()
    recent = [entry for entry in candidates if step - entry[0] < cfg.replay_age]
    for entry in random.Random(shuffle).sample(recent, len(recent)):
        question = entry[1]
        if len(drawn) < cfg.replay_total and count[question] < cfg.replay_nodes:
            count[question] += 1
            drawn.append(entry)
        else:
            later.append(entry)
    return [Sample(**fields) for _, _, fields in drawn], later


# ----------------------------------------------------------------------------------- the update


def reference_policy(setup: common.Setup):
    """The policy that the run began with, frozen. With --resume setup.model has been trained since,
    so it is loaded anew; its warm start is kept in runs/, and would come out the same again."""
    run, device = setup.run, setup.model.device
    if not run.resume:
        return copy.deepcopy(setup.model).requires_grad_(False)
    model, _ = common.starting_policy(run, setup.train, device, setup.compute)
    return model.requires_grad_(False)


def update(
    model, optimizer, schedule, samples: list[Sample], cfg: Config, shuffle: str, reference=None,
    scaler=common.IDLE, compute=Compute(),
) -> dict:  # fmt: skip
    """A round's updates: `epochs` passes over the samples, `batch_size` to an update. Returns means
    per update (loss, gradient norm) and per trained token (the rest).

    shuffle: the seed of their order. reference: the initial policy, for the KL; None where there
    is none.
    """
    totals = Counter()  # whose update() adds
    for minibatch in common.minibatches(samples, cfg.batch_size, cfg.epochs, shuffle):
        z = trained_tokens(common.collate(minibatch), cfg).sum().item()
        # Without signal a sample has gradient 0: it counts in Z, and needs no forward pass, unless
        # there is a KL. If none has signal, only the schedule moves. (Without any sample, as after
        # a round of trees without credit, there is no minibatch: see `main`.)
        with_signal = [s for s in minibatch if reference or any(s.advantages)]
        loss_sum = 0.0
        for micro in common.micro_batches(with_signal, compute.training_tokens):
            batch = common.collate(micro, model.device)
            mask = trained_tokens(batch, cfg)  # (B, T)
            logprobs = common.token_logprobs(
                model, batch, cfg.temperature, compute=compute
            )  # (B, T)
            loss, clipped = spo_loss(logprobs, batch, mask, z, cfg.clip_eps)
            if reference:
                with torch.no_grad():
                    initial = common.token_logprobs(
                        reference, batch, cfg.temperature, compute=compute
                    )  # (B, T)
                divergence = (common.k3(initial - logprobs) * mask).sum()
                loss = loss + cfg.kl_coef * divergence / len(minibatch)
                totals["kl_ref"] += divergence.item()
            scaler.scale(loss).backward()
            loss_sum += loss.item()
            totals.update(diagnose(logprobs.detach(), batch, mask, clipped))
        norm = common.optimizer_step(
            model, optimizer, schedule, loss_sum, cfg.max_grad_norm, scaler
        )
        totals.update(updates=1, loss=loss_sum, grad_norm=norm)
    per_token = ("kl", "clip_fraction", "kl_ref") if reference else ("kl", "clip_fraction")
    return common.averages(totals, per_token)


def diagnose(logprobs: Tensor, batch: Batch, mask: Tensor, clipped: Tensor) -> dict:
    """Sums over the tokens with M_t = 1 in this batch: of samples with a signal, or of all if there
    is a KL. kl: of KL(pi_old || pi), how far the updates have come."""
    moved = common.k3(logprobs - batch.old_logprobs)  # (B, T)
    return dict(
        kl=(moved * mask).sum().item(),
        clip_fraction=clipped.sum().item(),
        tokens=mask.sum().item(),
    )


# ---------------------------------------------------------------------- what is shown and logged


def describe_step(credit: Credit, samples: list[Sample], cfg: Config) -> dict:
    """A round's metrics that are not the update's (tutorials/curves.py, COLUMNS)."""
    count = len(credit.answers)
    segments = [a.advantages[t] for a in credit.answers for t in a.starts]
    credited = sum(advantage != 0 for advantage in segments)
    return dict(
        entropy=credit.entropy,
        no_signal=sum(not any(a.advantages) for a in credit.answers) / count,
        boundaries=len(segments) / count,
        trained=len(samples) if cfg.variant == "tree" else credited,  # nodes, or segments
        length=sum(len(a.rollout.ids) for a in credit.answers) / count,
    )


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


def count_hits(counts: dict, problems: list[Problem], answers: list[Answer], tokenizer) -> None:
    """Count the failures whose first wrong token is known, and those that `credit_hit` finds."""
    for a in answers:
        wrong = common.first_wrong_token(a.rollout.ids, problems[a.owner], tokenizer)
        if not a.rollout.reward and wrong is not None:
            hit, chance = credit_hit(a.starts, a.advantages, wrong)
            counts["failures"] += 1
            counts["hits"] += int(hit)
            counts["chance"] += chance


def hit_rates(counts: dict) -> tuple[dict, str]:
    """What `count_hits` has counted, for summary.json and in words."""
    if not (failures := counts["failures"]):
        return {}, ""
    hit, chance = counts["hits"] / failures, counts["chance"] / failures
    remark = (
        f"credit: the most negative segment held the first wrong token in {hit:.0%} of "
        f"{failures:,} failures (by chance {chance:.0%})\n"
    )
    return dict(failures=failures, credit_hit=hit, credit_chance=chance), remark


def fact_results(ids: list[int], facts, tokenizer) -> set[int]:
    """Tokens of an answer to the built-in task in which the result of one of `facts` is stated. A
    fact is (last digit of the running total, signed term)."""
    pieces = [tokenizer.decode([id]) for id in ids]
    lines = re.finditer(r"^(\d+)([+-]\d)=(\d+)", "".join(pieces), re.MULTILINE | re.ASCII)
    spans = [m.span(3) for m in lines if (int(m[1][-1]), int(m[2])) in facts]
    begins = [0, *accumulate(map(len, pieces))]
    return {t for t in range(len(ids)) if any(a <= begins[t] < b for a, b in spans)}


def places_of(rows: list[tuple[list[int], list[int]]], wrong_facts, tokenizer) -> str:
    """What the marked tokens of answers fall on, beside what all tokens do, in words: "1% begin a
    step (of all tokens 13%), ...".

    rows: (an answer's ids, the indices marked). wrong_facts: None on other tasks.
    """
    steps = [common.step_starts(ids, tokenizer, "\n", max_steps=len(ids)) for ids, _ in rows]
    kinds = {"begin a step": steps}
    if wrong_facts is not None:
        results = [fact_results(ids, wrong_facts, tokenizer) for ids, _ in rows]
        kinds["state what the warm start has learned wrong"] = results
    shares = []
    for kind, places in kinds.items():
        hits = sum(len({*found} & {*marked}) for found, (_, marked) in zip(places, rows))
        share = hits / max(sum(len(marked) for _, marked in rows), 1)
        of_all = sum(map(len, places)) / sum(len(ids) for ids, _ in rows)
        shares.append(f"{share:.0%} {kind} (of all tokens {of_all:.0%})")
    return ", ".join(shares)


def pick_answer(credit: Credit) -> int:
    """Index of the answer to show: the first failure that got any credit, else the first."""
    for i, a in enumerate(credit.answers):
        if any(a.advantages) and not a.rollout.reward:
            return i
    return 0


def cutpoint_places(credit: Credit, wrong_facts, tokenizer, cfg: Config) -> str:
    """What the cutpoints of a round's answers fall on, of 64 answers at most."""
    rows = [(s.ids, cutpoints(s, cfg)) for s in credit.samples[:64]]
    return places_of(rows, wrong_facts, tokenizer)


def show_answer(
    problems, credit: Credit, places: str, tokenizer, cfg: Config, colour: bool, width: int
) -> str:
    """SPO-chain: an answer of the round with its credit. places: what `cutpoint_places` says.
    colour, width: given by common.show."""
    i = pick_answer(credit)
    owner, r, starts, advantages = credit.answers[i]
    title, notes = common.answer_notes(problems[owner], r, tokenizer)
    pieces = [tokenizer.decode([id]) for id in r.ids]
    marked = {*cutpoints(credit.samples[i], cfg)}
    if cfg.partition == "cutpoint":
        marked -= {*starts}  # these have a bar
    for t in marked:
        pieces[t] = "'" + pieces[t]
    labels = {t: f"{advantages[t]:+.2f}" for t in starts}
    lines = common.credit_lines(pieces, advantages, labels, notes, colour)
    legend = f"  | a segment, ' a cutpoint within; cutpoints of this round:\n  {places}"
    return "\n".join([title, *lines, legend])


def show_tree(
    problems, tree: Tree, credit: Credit, tokenizer, cfg: Config, colour: bool, width: int
) -> str:
    """SPO-tree: the tree of a problem, a node a line. Below a node with V 0 or 1 nothing has
    credit, and nothing is shown. colour, width: given by common.show."""
    owner = credit.answers[pick_answer(credit)].owner
    problem, prompt = problems[owner], tree.nodes[owner].prompt
    rewards = [node.reward for node in tree.nodes]
    values, advantages = tree_advantages(tree.parents, rewards, cfg.scale_advantages)
    tail = f", V {values[owner]:.2f}"
    lines = [fit(common.problem_title(problem), width - len(tail)) + tail]
    paths = {i: tree.path(i) for i in range(len(tree.nodes))}
    below = [i for i, path in paths.items() if path[0] == owner and i != owner]
    for i in sorted(below, key=paths.get):  # depth first
        if values[tree.parents[i]] in (0, 1):  # all below it are wrong, or all right
            continue
        node = tree.nodes[i]
        ids = [*node.prompt, *node.ids][len(prompt) :]
        wrong = common.first_wrong_token(ids, problem, tokenizer)
        mark = "!" if wrong is not None and wrong >= len(ids) - len(node.ids) else " "
        indent = "    " * (len(paths[i]) - 1)
        head = f"{indent}V {values[i]:.2f} A {advantages[i]:+.2f} {mark} "
        text = fit(tokenizer.decode(node.ids).replace("\n", " / "), width - len(head))
        lines.append(head + (common.paint(text, advantages[i]) if colour else text))
    if problem.checkable:
        lines.append("  ! the first wrong token is in this node")
    return "\n".join(lines)


def fit(text: str, room: int) -> str:
    """`text` without control characters, cut to `room` characters."""
    text, room = common.printable(text), max(1, room)
    return text if len(text) <= room else text[: room - 1] + "…"


# -------------------------------------------------------------------------------------- the run


def updates_of(cfg: Config) -> int:
    """Updates per round; of trees the most there can be, for only nodes with A != 0 train."""
    answers = cfg.prompts * cfg.group_size
    if cfg.variant == "tree":
        answers = cfg.prompts * sum(accumulate(cfg.branching, operator.mul))
        answers = min(answers, cfg.replay_total) if cfg.replay_age else answers
    return cfg.epochs * math.ceil(answers / (cfg.batch_size or answers))


def headline(cfg: Config, train: list[Problem]) -> str:
    how = f"partition {cfg.partition}"
    if cfg.variant == "tree":
        branching = "-".join(map(str, cfg.branching))
        how = f"segments of {cfg.segment_tokens} tokens, branching {branching}"
    sizes = f"{cfg.steps} rounds of {cfg.prompts} problems"
    sizes += f" x {cfg.group_size} answers" if cfg.variant == "chain" else ""
    return f"SPO-{cfg.variant}: {sizes}, {how}, mask {'on' if cfg.mask else 'off'}"


def main() -> None:
    setup = common.set_up(Config, "spo", __doc__, TINY, LARGE, headline)
    cfg, run, compute = setup.cfg, setup.run, setup.compute
    model, tokenizer, generator = setup.model, setup.tokenizer, setup.generator
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0)
    updates = updates_of(cfg)  # a round
    schedule = get_linear_schedule_with_warmup(optimizer, cfg.warmup_updates, cfg.steps * updates)
    setup = setup._replace(optimizer=optimizer, schedule=schedule)
    reference = reference_policy(setup) if cfg.kl_coef else None
    wrong_facts = common.wrong_facts(run.seed) if setup.train[0].checkable else None
    # Kept in checkpoints: the counts of `count_hits`, and the nodes that wait for replay.
    progress = common.begin(setup, failures=0, hits=0, chance=0.0, waiting=[])
    for step, bar in common.training_steps(setup, progress):
        # 1. Sample answers, or trees, from problems.
        began = time.time()
        problems = common.batch_at(setup.train, step, cfg.prompts, run.seed)
        states = [common.initial_state(tokenizer, p, setup.instruction) for p in problems]
        if cfg.variant == "tree":
            tree = grow_trees(model, tokenizer, states, cfg, generator, compute)
        else:
            rollouts = common.complete(
                model, tokenizer, states, n=cfg.group_size, max_new_tokens=cfg.max_new_tokens,
                temperature=cfg.temperature, generator=generator, compute=compute,
            )  # fmt: skip

        # 2. Credit each segment with the value it added.
        if cfg.variant == "tree":
            credit = credit_trees(model, tree, cfg, compute)
        else:
            true_answers = [p.answer for p in problems for _ in range(cfg.group_size)]
            credit = assign_credit(
                model, tokenizer, rollouts, true_answers, cfg, generator, compute
            )

        # 3. Train on the credited samples.
        samples, shuffle = credit.samples, f"{run.seed}-{step}"
        if cfg.replay_age:
            questions = [problems[owner].question for owner in credit.owners]
            # As dicts: a checkpoint, which keeps those that wait, holds plain data.
            new = [(step, q, vars(s)) for q, s in zip(questions, samples)]
            samples, later = draw_replay(progress["waiting"] + new, step, cfg, shuffle)
        # At a loss or gradient that is not finite the run stops, with its state saved.
        with common.saved_if_not_finite(setup, step, progress):
            metrics = update(
                model, optimizer, schedule, samples, cfg, shuffle, reference=reference,
                scaler=setup.scaler, compute=compute,
            )  # fmt: skip
        # Trees may make fewer updates. After the warm-up the rate falls as if all had been made.
        while cfg.warmup_updates <= schedule.last_epoch < (step + 1) * updates:
            schedule.step()

        # 4. Log.
        if cfg.replay_age:  # only now: what a failed update saves is the state before it
            progress["waiting"] = later
        progress["sampled_tokens"] += credit.tokens
        progress["seconds"] += time.time() - began
        count_hits(progress, problems, credit.answers, tokenizer)
        metrics = dict(accuracy=credit.accuracy) | metrics | describe_step(credit, samples, cfg)
        whole = [answer.rollout for answer in credit.answers]
        common.log_step(setup, step, bar, progress, metrics, answers=whole)
        if common.is_shown(run, step):
            if cfg.variant == "tree":
                view = partial(show_tree, problems, tree, credit, tokenizer, cfg)
            else:
                places = cutpoint_places(credit, wrong_facts, tokenizer, cfg)
                view = partial(show_answer, problems, credit, places, tokenizer, cfg)
            common.show(setup.folder, step, view)
    results, remark = hit_rates(progress)
    common.finish_run(setup, progress, results, remark)


if __name__ == "__main__":
    common.cli(main)
