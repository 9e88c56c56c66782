"""Facts about any healthy version of this project, each checked on a case of a second or less.

A property returns None if it holds, else what it saw. They use the tests' policy, which is small
enough to enumerate all its answers.
"""

import sys

import torch
from bugs import HERE

sys.path.append(str(HERE.parents[1] / "tests"))

import tiny_policy  # noqa: E402

import common  # noqa: E402
import mpo  # noqa: E402
import spo  # noqa: E402
from common import Rollout, Sample  # noqa: E402


def probabilities_sum_to_one():
    """The probabilities of all answers that a policy can give sum to 1."""
    model = tiny_policy.make_policy()
    samples = [Sample(tiny_policy.PROMPT, list(a)) for a in tiny_policy.all_answers()]
    with torch.no_grad():
        logprobs = common.token_logprobs(model, common.collate(samples))
    total = logprobs.sum(1).exp().sum().item()
    return None if abs(total - 1) < 1e-4 else f"they sum to {total:.4f}"


def ratios_start_at_one():
    """Right after sampling, the policy is the one that sampled: all ratios are 1 at any
    temperature."""
    model = tiny_policy.make_policy()
    for temperature in (1.0, 0.7, 1.5):
        samples = [Sample(tiny_policy.PROMPT, list(a)) for a in tiny_policy.all_answers()]
        common.score(model, samples, temperature)
        batch = common.collate(samples)
        with torch.no_grad():
            now = common.token_logprobs(model, batch, temperature)
        far = (now - batch.old_logprobs).abs().max().exp().item()
        if far > 1.0001:
            return f"at temperature {temperature} one is {far:.3f}"


def credited_samples(model, count=24):
    answers = tiny_policy.all_answers()[::5][:count]
    samples = [Sample(tiny_policy.PROMPT, list(a)) for a in answers]
    common.score(model, samples, 1.0)
    for i, s in enumerate(samples):
        s.advantages = [(i % 4 + 0.5) / 4 - t / 8 for t in range(len(s.ids))]
    return samples


def updated(training_tokens: int) -> torch.Tensor:
    """All weights after one update of a fixed batch, cut into micro-batches of that many tokens."""
    model = tiny_policy.make_policy()
    samples = credited_samples(model)
    cfg = spo.Config(prompts=len(samples), mask=False, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    compute = common.Compute(training_tokens=training_tokens)
    spo.update(model, optimizer, schedule, samples, cfg, "seed", compute=compute)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def micro_batches_do_not_matter():
    """An update is the same, in whatever micro-batches it is computed."""
    whole, parts = updated(10_000), updated(20)
    distance = (whole - parts).norm().item()
    return None if distance < 1e-4 else f"the weights end {distance:.4f} apart"


def updates_follow_the_advantage():
    """The loss pushes a token up if its advantage is above 0, down if below, and not at all just
    where the clip is reported to have cut it."""
    advantages = torch.tensor([[3.0, 2.0, 1.0, -0.5, -1.0, 2.0]])
    ratio = torch.tensor([[0.5, 1.5, 1.0, 0.5, 1.5, 1.0]])
    mask = torch.ones_like(ratio, dtype=torch.bool)
    batch = common.collate([Sample([1], [1] * 6, advantages[0].tolist(), [-1.0] * 6)])
    batch = batch._replace(mask=mask)
    logprobs = (batch.old_logprobs + ratio.log()).requires_grad_()
    loss, clipped = spo.spo_loss(logprobs, batch, mask, 6, 0.2)
    loss.backward()
    pushed, wanted = -logprobs.grad.sign(), advantages.sign() * ~clipped
    for t in range(6):
        if pushed[0, t] != wanted[0, t]:
            way = {-1: "down", 0: "nowhere", 1: "up"}[int(pushed[0, t])]
            return f"advantage {advantages[0, t]:+}, ratio {ratio[0, t]:.1f}: pushed {way}"


def chains_telescope():
    """What the segments of an answer earn adds up to its reward minus the value it began with."""
    for reward in (0.0, 1.0):
        earned = spo.chain_advantages([1, 3, 4], [0.25, 0.75, 0.5], reward, 6)[[1, 3, 4]].sum()
        if abs(earned - (reward - 0.25)) > 1e-6:
            return f"reward {reward}, first value 0.25: they earn {earned:.2f}"


def siblings_earn_nothing_in_sum():
    """What the children of a node earn adds up to 0, in trees of any shape."""
    parents, rewards = [-1, 0, 0, 1, 1, 1], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    _, advantages = spo.tree_advantages(parents, rewards)
    for node in (0, 1):
        earned = sum(a for a, parent in zip(advantages, parents) if parent == node)
        if abs(earned) > 1e-6:
            return f"in {parents}, the children of node {node} earn {earned:+.3f}"


def answers_keep_within_their_budget():
    """No answer is longer than max_new_tokens, wherever in it sampling began."""
    model, tokenizer = tiny_policy.make_policy(), common.build_tokenizer()
    states = [(tiny_policy.PROMPT, [2] * done, "7") for done in range(4)]
    generator = torch.Generator().manual_seed(0)
    rollouts = common.complete(model, tokenizer, states, 16, 4, generator=generator)
    longest = max(len(states[i // 16][1]) + len(r.ids) for i, r in enumerate(rollouts))
    return None if longest <= 4 else f"with max_new_tokens 4, one has {longest}"


def cut_answers_earn_nothing():
    """An answer that was cut by its budget earns nothing, whatever it says so far."""
    tokenizer = common.build_tokenizer()
    ids = common.encode(tokenizer, "3+4=7\n#### 7")
    earned = [common.response_reward(ids, finished, "7", tokenizer) for finished in (True, False)]
    return None if earned == [1.0, 0.0] else f"finished it earns {earned[0]}, cut {earned[1]}"


def problems_do_not_mix():
    """What an answer earns does not depend on how answers to other problems fared."""

    def first(others: list[float]) -> list[float]:
        rewards = [1.0, 0.0, 0.0, 0.0, *others]
        rollouts = [Rollout(tiny_policy.PROMPT, [0, 3], True, r) for r in rewards]
        credit = mpo.assign_credit(tiny_policy.make_policy(), rollouts, cfg)
        return [round(s.advantages[0], 4) for s in credit.samples[:4]]

    cfg = mpo.Config(prompts=2, group_size=4, batch_size=8)
    bad, good = first([0.0, 0.0, 0.0, 1.0]), first([1.0, 1.0, 0.0, 1.0])
    return None if bad == good else f"rewards 1, 0, 0, 0 earn {bad}, or beside others {good}"


def divergences_are_not_negative():
    """No estimate of a KL is negative, and it is 0 just where the policies agree."""
    x = torch.linspace(-3, 3, 13)
    least = common.k3(x).min().item()
    return None if least >= 0 else f"one is {least:.2f}"


def equal_rewards_teach_nothing():
    """A group whose answers all got the same reward earns exactly nothing."""
    groups = torch.full((1, 7), 0.1), torch.full((1, 8), 1.0)
    worst = max(common.group_advantages(g).abs().max().item() for g in groups)
    return None if worst == 0 else f"one earns {worst:.3g}"


PROPERTIES = [
    probabilities_sum_to_one,
    ratios_start_at_one,
    micro_batches_do_not_matter,
    updates_follow_the_advantage,
    chains_telescope,
    siblings_earn_nothing_in_sum,
    answers_keep_within_their_budget,
    cut_answers_earn_nothing,
    problems_do_not_mix,
    divergences_are_not_negative,
    equal_rewards_teach_nothing,
]
