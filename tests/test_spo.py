"""SPO's maths against hand-worked cases, plain loops, and a policy small enough to enumerate."""

import copy
import math
import random
from collections import Counter
from functools import partial

import pytest
import torch

import common
import spo
from common import BadInput, Rollout, Sample
from tiny_policy import END, HORIZON, PROMPT, all_answers, all_log_probs
from tiny_policy import assert_epochs_use_each_sample_once, constant_rate, exact_values
from tiny_policy import fake_rewards, flat_grad, log_prob, off_policy_samples, reward_of
from tiny_policy import rollouts_of, token_count, true_gradient

torch.set_num_threads(1)


def expected_gradient(model, partition, mask_below: float | None = None):
    """The expectation of SPO's gradient over all answers, with exact values at the boundaries.

    The loss is linear in the advantages, so each answer's are weighted by its probability.
    """
    samples, values, table = [], exact_values(model), all_log_probs(model).detach()
    cfg = spo.Config(mask=mask_below is not None, threshold=mask_below or 0.9)
    for answer, row in zip(all_answers(), table):
        logprobs = row[: len(answer)]
        starts = partition(logprobs.exp())
        at_starts = [values[answer[:t]] for t in starts]
        advantages = spo.chain_advantages(starts, at_starts, reward_of(answer), len(answer))
        weighted = (advantages * logprobs.sum().exp()).tolist()
        samples.append(Sample(PROMPT, list(answer), weighted, logprobs.tolist()))
    model.zero_grad()
    batch = common.collate(samples)
    logprobs = common.token_logprobs(model, batch)
    spo.spo_loss(logprobs, batch, spo.trained_tokens(batch, cfg), 1, 0.2)[0].backward()
    return -flat_grad(model)


# ------------------------------------------------------------------------------------ partition


def test_starts_of_a_hand_worked_answer():
    probs = torch.tensor([0.95, 0.5, 1.0, 0.89, 0.2, 0.99, 0.1])  # cutpoints 1, 3, 4, 6
    assert spo.segment_starts(probs, 1, 0.9) == [1, 3, 4, 6]
    assert spo.segment_starts(probs, 2, 0.9) == [1, 4]
    assert spo.segment_starts(probs, 3, 0.9) == [1, 6]
    assert spo.segment_starts(probs, 5, 0.9) == [1]
    assert spo.segment_starts(probs, 1, 0.15) == [6]
    assert spo.segment_starts(probs.tolist(), 2, 0.9) == [1, 4]


def test_a_token_exactly_at_the_threshold_is_no_cutpoint():
    for threshold in (0.9, 0.3, 0.7, 0.5):
        assert spo.segment_starts(torch.tensor([threshold, 0.01]), 1, threshold) == [1]
        assert spo.segment_starts([threshold, 0.01], 1, threshold) == [1]


def test_every_full_segment_holds_interval_cutpoints_and_begins_with_one():
    rng = random.Random(0)
    for _ in range(200):
        probs = [rng.choice((0.2, 0.95, 1.0)) for _ in range(rng.randint(1, 30))]
        interval = rng.randint(1, 6)
        starts = spo.segment_starts(probs, interval, 0.9)
        cutpoints = [t for t, p in enumerate(probs) if p < 0.9]
        assert starts[:1] == cutpoints[:1]
        for start, end in zip(starts, [*starts[1:], len(probs)]):
            inside = [t for t in cutpoints if start <= t < end]
            assert inside[0] == start
            assert len(inside) == interval or (end == len(probs) and 1 <= len(inside) <= interval)


def test_no_cutpoint_means_no_segment_and_no_advantage():
    assert spo.segment_starts(torch.ones(5), 1, 0.9) == []
    assert spo.chain_advantages([], [], 1.0, 5).tolist() == [0.0] * 5


@pytest.mark.parametrize("interval", [0, -1])
def test_an_interval_below_one_is_an_error(interval):
    with pytest.raises(ValueError):
        spo.segment_starts([0.5], interval, 0.9)


# ----------------------------------------------------------------------------------- advantages


def test_advantages_of_a_hand_worked_answer():
    advantages = spo.chain_advantages([1, 3, 4], [0.25, 0.75, 0.5], 1.0, 6)
    assert advantages.tolist() == [0.0, 0.5, 0.5, -0.25, 0.5, 0.5]
    assert spo.chain_advantages([0], [0.375], 0.0, 3).tolist() == [-0.375] * 3


def test_advantages_telescope_from_the_first_value_to_the_reward():
    rng = random.Random(1)
    for _ in range(200):
        length = rng.randint(1, 20)
        starts = sorted(rng.sample(range(length), rng.randint(1, length)))
        values = [rng.randint(0, 8) / 8 for _ in starts]
        reward = float(rng.random() < 0.5)
        advantages = spo.chain_advantages(starts, values, reward, length)
        assert advantages.shape == (length,)
        assert sum(advantages[start].item() for start in starts) == reward - values[0]
        for t in range(length):  # the slow definition, a token at a time
            past = [k for k, start in enumerate(starts) if start <= t]
            k = past[-1] if past else None
            after = reward if k == len(starts) - 1 else values[k + 1] if past else 0.0
            assert advantages[t].item() == (after - values[k] if past else 0.0)


@pytest.mark.parametrize(
    "starts, values", [([2, 1], [0, 0]), ([1, 1], [0, 0]), ([0, 6], [0, 0]), ([-1], [0]), ([0], [])]
)
def test_starts_out_of_order_or_range_or_without_values_are_an_error(starts, values):
    with pytest.raises(ValueError):
        spo.chain_advantages(starts, values, 1.0, 6)


# ---------------------------------------------------------------------- against the exact policy


def test_the_enumerated_policy_is_a_distribution(model):
    table = all_log_probs(model)
    assert len(table) == 121 and table.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)
    for answer, row in list(zip(all_answers(), table))[::20]:
        assert torch.allclose(row[: len(answer)], log_prob(model, answer), atol=1e-5)


@pytest.mark.parametrize("starts", [[0], [0, 1], [0, 2], [0, 1, 2, 3]])
def test_partitions_blind_to_the_sampled_tokens_give_the_policy_gradient(model, starts):
    def partition(probs):
        return [t for t in starts if t < len(probs)]

    expected = expected_gradient(model, partition)
    true = true_gradient(model)
    assert true.norm() > 0.01
    assert torch.allclose(expected, true, atol=2e-6), (expected - true).abs().max()


def test_the_bias_of_cutpoints_and_of_the_mask_is_measured(model):
    """Both are biased on this policy even with exact values, and both still point uphill."""
    true = true_gradient(model)

    def cosine(partition, mask_below=None):
        gradient = expected_gradient(model, partition, mask_below)
        return torch.cosine_similarity(gradient, true, dim=0).item()

    def cutpoints(probs):
        return spo.segment_starts(probs, 1, 0.6)

    assert cosine(lambda probs: [0]) > 0.99999
    assert cosine(cutpoints) == pytest.approx(0.967, abs=0.005)
    assert cosine(lambda probs: [0], mask_below=0.6) == pytest.approx(0.953, abs=0.005)
    assert cosine(cutpoints, mask_below=0.6) == pytest.approx(0.984, abs=0.005)


def test_estimated_values_are_unbiased_at_every_prefix(model, monkeypatch):
    fake_rewards(monkeypatch)
    cfg = spo.Config(continuations=3000, max_new_tokens=HORIZON)
    prefixes = [(), (0,), (2, 1), (1, 0, 2)]
    states = [(PROMPT, list(done), "") for done in prefixes]
    generator = torch.Generator().manual_seed(0)
    values, tokens = spo.estimate_values(model, None, states, cfg, generator)
    for done, value in zip(prefixes, values):
        exact = exact_values(model)[done]
        error = 4 * math.sqrt(max(0.0, exact * (1 - exact)) / 3000) + 1e-6
        assert abs(value - exact) <= error, (done, value, exact)
    # From (1, 0, 2) one token is left of the budget; from () it is at most four.
    assert 3000 * 4 <= tokens <= 3000 * (4 + 3 + 2 + 1)


def test_equal_states_share_one_estimate_and_different_answers_do_not(model, monkeypatch):
    calls = []
    true_sample = common.sample

    def spy(model, prefixes, n, **options):
        calls.append((prefixes, n, options["max_new_tokens"]))
        assert (options["temperature"], options["generator"]) == (0.7, generator)
        return true_sample(model, prefixes, n, **options)

    monkeypatch.setattr(common, "sample", spy)
    monkeypatch.setattr(common, "eos_ids", lambda *_: {END})
    monkeypatch.setattr(common, "response_reward", lambda ids, end, answer, _: float(answer == "a"))
    states = [(PROMPT, [0], "a"), (PROMPT, [0], "b"), (PROMPT, [0], "a"), (PROMPT, [0, 1], "a")]
    cfg = spo.Config(continuations=5, max_new_tokens=HORIZON, temperature=0.7)
    generator = torch.Generator()
    values, _ = spo.estimate_values(model, None, states, cfg, generator)
    assert values == [1.0, 0.0, 1.0, 1.0]
    assert calls == [([[1, 0, 0], [1, 0, 0], [1, 0, 0, 1]], 5, [3, 3, 2])]


def test_states_that_differ_in_the_prompt_alone_have_values_of_their_own(monkeypatch):
    def complete(model, tokenizer, states, n, *args, **options):
        return [Rollout(prompt, [0], True, float(prompt[1])) for prompt, *_ in states for _ in "xy"]

    monkeypatch.setattr(common, "complete", complete)
    states = [([5, 1], [0], "a"), ([5, 0], [0], "a"), ([5, 1], [0], "a")]
    values, tokens = spo.estimate_values(None, None, states, spo.Config(continuations=2), None)
    assert (values, tokens) == ([1.0, 0.0, 1.0], 4)


def test_continuations_are_rewarded_as_whole_answers(model, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "eos_ids", lambda *_: {END})

    def record(ids, finished, answer, _):
        seen.append((tuple(ids), finished))
        return 0.0

    monkeypatch.setattr(common, "response_reward", record)
    cfg = spo.Config(continuations=20, max_new_tokens=HORIZON)
    spo.estimate_values(model, None, [(PROMPT, [2, 1], "")], cfg, torch.Generator().manual_seed(1))
    assert len(seen) == 20
    for ids, finished in seen:
        assert ids[:2] == (2, 1) and ids in all_answers() and finished == (ids[-1] == END)


# ------------------------------------------------------------------------------ assigning credit


def test_credit_cuts_right_before_the_unsure_tokens(model, monkeypatch):
    asked = []

    def values_by_length(model, tokenizer, states, cfg, generator, compute):
        asked.extend(states)
        return [len(done) / 8 for _, done, _ in states], 17

    monkeypatch.setattr(spo, "estimate_values", values_by_length)
    temperature, threshold = 0.8, 0.5
    cfg = spo.Config(threshold=threshold, temperature=temperature)
    rollouts = rollouts_of(random.Random(0).sample(all_answers(), 12))
    credit = spo.assign_credit(model, None, rollouts, ["x"] * 12, cfg, None)
    states, entropies = [], []
    for r, s, starts in zip(rollouts, credit.samples, [a.starts for a in credit.answers]):
        logprobs = log_prob(model, r.ids, temperature)
        assert s.old_logprobs == pytest.approx(logprobs.tolist(), abs=1e-5)
        assert starts == [t for t, p in enumerate(logprobs.exp().tolist()) if p < threshold]
        assert s.context == PROMPT and s.ids == r.ids  # the end token is trained with the rest
        states += [(PROMPT, r.ids[:t], "x") for t in starts]
        for t in range(len(r.ids)):
            past = [start for start in starts if start <= t]
            later = [start for start in starts if start > t]
            after = later[0] / 8 if later else r.reward
            assert s.advantages[t] == (after - past[-1] / 8 if past else 0.0)
        logits = model(torch.tensor([[*PROMPT, *r.ids]])).logits[0, 1:-1] / temperature
        entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    total = sum(len(r.ids) for r in rollouts)
    assert any(a.starts for a in credit.answers) and asked == states
    assert credit.tokens == total + 17
    assert credit.entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
    for wrong in (6, 24):  # a true answer for each prompt, say, not for each rollout
        with pytest.raises(ValueError, match="zip"):
            spo.assign_credit(model, None, rollouts, ["x"] * wrong, cfg, None)


def test_interval_thins_the_boundaries(model, monkeypatch):
    monkeypatch.setattr(spo, "estimate_values", lambda *a: ([0.0] * len(a[2]), 0))
    answers = [a for a in all_answers() if len(a) == HORIZON][:20]
    for interval in (1, 2, 3):
        cfg = spo.Config(threshold=1.0, interval=interval)
        credit = spo.assign_credit(model, None, rollouts_of(answers), [""] * 20, cfg, None)
        assert all(a.starts == list(range(0, HORIZON, interval)) for a in credit.answers)


def test_trajectory_partition_is_grpo_without_std(model):
    rollouts = rollouts_of(random.Random(2).sample(all_answers(), 6))
    for r, reward in zip(rollouts, (1.0, 0.0, 0.0, 1.0, 1.0, 1.0)):
        r.reward = reward
    cfg = spo.Config(partition="trajectory", prompts=2, group_size=3, batch_size=6)
    credit = spo.assign_credit(model, None, rollouts, [""] * 6, cfg, None)
    expected = [2 / 3, -1 / 3, -1 / 3, 0.0, 0.0, 0.0]
    for s, advantage in zip(credit.samples, expected):
        assert s.advantages == pytest.approx([advantage] * len(s.ids), abs=1e-6)
    assert [s.advantages[0] for s in credit.samples[3:]] == [0.0] * 3  # exactly: all-equal group
    assert credit.tokens == sum(len(r.ids) for r in rollouts)
    assert [a.starts for a in credit.answers] == [[0]] * 6


# ------------------------------------------------------------------------------- loss and update


random_samples = partial(
    off_policy_samples, lambda rng, answer: [rng.choice((-1.0, -0.25, 0.0, 0.5)) for _ in answer]
)


def slow_loss(model, samples, cfg):
    """The loss of the header, a token at a time."""
    total, z = 0.0, 0
    for s in samples:
        new = log_prob(model, s.ids, cfg.temperature)
        for t, (old, advantage) in enumerate(zip(s.old_logprobs, s.advantages)):
            if not cfg.mask or math.exp(old) < cfg.threshold:
                ratio = (new[t] - old).exp()
                clipped = min(max(ratio.item(), 1 - cfg.clip_eps), 1 + cfg.clip_eps)
                unclipped = (ratio * advantage).item() <= clipped * advantage
                total = total + (ratio * advantage if unclipped else clipped * advantage)
                z += 1
    return -total / z


@pytest.mark.parametrize("mask, threshold, temperature", [(True, 0.4, 1.0), (False, 0.9, 0.7)])
@pytest.mark.parametrize("width", [6, 20, 10_000])
def test_an_update_follows_the_slow_loss_whatever_the_micro_batches(
    model, monkeypatch, mask, threshold, temperature, width
):
    cfg = spo.Config(
        prompts=10, batch_size=10, mask=mask, threshold=threshold, temperature=temperature,
        clip_eps=0.1,
    )  # fmt: skip
    cfg.max_grad_norm = 1e9
    samples = random_samples(model, temperature=temperature)
    model.zero_grad()
    loss = slow_loss(model, samples, cfg)
    loss.backward()
    expected = [p - p.grad for p in model.parameters()]
    model.zero_grad()
    true_micro_batches = common.micro_batches
    monkeypatch.setattr(common, "micro_batches", lambda rows, _: true_micro_batches(rows, width))
    optimizer, schedule = constant_rate(model, 1.0)
    metrics = spo.update(model, optimizer, schedule, samples, cfg, "seed")
    for p, q in zip(model.parameters(), expected):
        assert torch.allclose(p, q, atol=1e-5)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_metrics_of_an_update_are_means_over_trained_tokens(model):
    cfg = spo.Config(prompts=10, batch_size=10, threshold=0.4, lr=1e-9)
    samples = random_samples(model)
    kl, clipped = [], []
    for s in samples:
        if any(s.advantages):
            for new, old, a in zip(log_prob(model, s.ids).tolist(), s.old_logprobs, s.advantages):
                if math.exp(old) < 0.4:
                    ratio = math.exp(new - old)
                    kl.append(ratio - 1 - (new - old))
                    clipped.append((a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8))
    optimizer, schedule = constant_rate(model, 1e-9)
    metrics = spo.update(model, optimizer, schedule, samples, cfg, "seed")
    assert 0 < sum(clipped) < len(clipped)
    assert metrics["kl"] == pytest.approx(sum(kl) / len(kl), abs=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(sum(clipped) / len(clipped), abs=1e-9)


def test_each_epoch_uses_each_sample_once_in_minibatches_of_its_own_order(model):
    samples = [s for s in random_samples(model, 12) if any(s.advantages)][:8]
    cfg = spo.Config(prompts=8, batch_size=4, epochs=2, mask=False)
    assert_epochs_use_each_sample_once(spo, "spo_loss", token_count, model, samples, cfg)


def test_a_batch_with_nothing_to_train_changes_nothing(model):
    sure = [Sample(PROMPT, [0, 1], [1.0, -1.0], [-0.01, -0.01])]  # all masked: Z = 0
    idle = [Sample(PROMPT, [0, 1], [0.0, 0.0], [-1.0, -1.0])]  # no advantage
    for samples in (sure, idle, sure + idle):
        before = [p.clone() for p in model.parameters()]
        optimizer, schedule = constant_rate(model, 0.1, torch.optim.AdamW)
        cfg = spo.Config(prompts=len(samples), batch_size=len(samples))
        metrics = spo.update(model, optimizer, schedule, samples, cfg, "seed")
        assert metrics["loss"] == 0 and all(math.isfinite(x) for x in metrics.values())
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_ratio_is_one_right_after_sampling_at_any_temperature(model):
    generator = torch.Generator().manual_seed(0)
    options = dict(max_new_tokens=HORIZON, eos={END}, temperature=0.6, generator=generator)
    rollouts = common.sample(model, [PROMPT], 30, **options)
    samples = [Sample(r.prompt, r.ids) for r in rollouts]
    common.score(model, samples, 0.6)
    for s in samples:
        assert s.old_logprobs == pytest.approx(log_prob(model, s.ids, 0.6).tolist(), abs=1e-5)
    batch = common.collate(samples)
    log_ratio = common.token_logprobs(model, batch, 0.6) - batch.old_logprobs
    assert log_ratio.abs().max() < 1e-5


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("partition", ["cutpoint", "trajectory"])
def test_credit_and_update_together_raise_the_exact_expected_reward(
    model, monkeypatch, partition, mask
):
    fake_rewards(monkeypatch)
    cfg = spo.Config(
        partition=partition, mask=mask, prompts=8, group_size=8, batch_size=32, lr=3e-3,
        continuations=2, max_new_tokens=HORIZON,
    )  # fmt: skip
    optimizer, schedule = constant_rate(model, cfg.lr, torch.optim.AdamW)
    generator = torch.Generator().manual_seed(0)
    before = exact_values(model)[()]
    options = dict(max_new_tokens=HORIZON, eos={END}, generator=generator)
    for step in range(15):
        rollouts = common.sample(model, [PROMPT] * 8, 8, **options)
        for r in rollouts:
            r.reward = reward_of(r.ids)
        credit = spo.assign_credit(model, None, rollouts, [""] * 64, cfg, generator)
        spo.update(model, optimizer, schedule, credit.samples, cfg, str(step))
    assert before < 0.6 and exact_values(model)[()] > 0.85


# ----------------------------------------------------------------------------------------- trees


def test_the_worked_tree_of_three_levels():
    """Three children; under the first leaves 1, 0, 1, under the second all 1, the third all 0."""
    parents = [-1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    rewards = [9.0] * 4 + [1, 0, 1, 1, 1, 1, 0, 0, 0]  # those of inner nodes must not matter
    values, advantages = spo.tree_advantages(parents, rewards)
    third = 1 / 3
    assert values == pytest.approx([5 / 9, 2 / 3, 1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0])
    assert advantages[:4] == pytest.approx([0, 1 / 9, 4 / 9, -5 / 9])
    assert advantages[4:] == pytest.approx([third, -2 * third, third] + [0] * 6)
    assert sum(map(bool, advantages)) == 6  # 6 of 12 nodes are kept
    scaled = spo.tree_advantages(parents, rewards, scale=True)[1]
    std = math.sqrt(((1 / 9) ** 2 + (4 / 9) ** 2 + (5 / 9) ** 2) / 3)  # population
    assert scaled[1:4] == pytest.approx([1 / 9 / std, 4 / 9 / std, -5 / 9 / std])
    assert scaled[4:] == pytest.approx([2**-0.5, -(2**0.5), 2**-0.5] + [0] * 6)
    assert [type(a) for a in advantages + scaled] == [float] * 26


def test_a_parent_is_the_mean_of_its_children_not_of_the_leaves():
    # One child ended early and is right; under the other, one leaf of four is.
    parents, rewards = [-1, 0, 0, 2, 2, 2, 2], [0, 1, 0, 1, 0, 0, 0]
    values, advantages = spo.tree_advantages(parents, rewards)
    assert values[0] == (1 + 0.25) / 2  # over leaves it would be 2 / 5
    assert advantages == [0, 0.375, -0.375, 0.75, -0.25, -0.25, -0.25]


def test_trees_of_several_problems_do_not_touch():
    one, two = ([-1, 0, 0], [0, 1, 0]), ([-1, 0, 0, 0], [0, 0, 1, 1])
    parents = [-1, -1, 0, 0, 1, 1, 1]
    values, advantages = spo.tree_advantages(parents, [0, 0, 1, 0, 0, 1, 1])
    (v1, a1), (v2, a2) = spo.tree_advantages(*one), spo.tree_advantages(*two)
    assert values == [v1[0], v2[0], *v1[1:], *v2[1:]]
    assert advantages == [a1[0], a2[0], *a1[1:], *a2[1:]]


@pytest.mark.parametrize("scale", [False, True])
def test_equal_siblings_get_exactly_nothing_in_whatever_order_their_values_were_summed(scale):
    one, two = [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]
    assert sum(one) != sum(two)  # in floating point
    parents, rewards = [-1, 0, 0] + [1] * 3 + [2] * 3, [0.0] * 3 + one + two
    values, advantages = spo.tree_advantages(parents, rewards, scale)
    assert values[1] == values[2] and advantages[:3] == [0.0] * 3
    assert advantages[3] == -advantages[5] == advantages[8] < 0


@pytest.mark.parametrize("parents", [[0], [-1, 2, 0], [-1, -2], [-1, 1]])
def test_a_node_before_its_parent_is_an_error(parents):
    with pytest.raises(ValueError):
        spo.tree_advantages(parents, [0.0] * len(parents))


def random_tree(rng, depth=0):
    """Nested lists, a leaf being its reward."""
    if depth == 3 or (depth and rng.random() < 0.3):
        return float(rng.random() < 0.5)
    return [random_tree(rng, depth + 1) for _ in range(rng.randint(2, 3))]


def test_values_and_advantages_follow_the_recursive_definition():
    rng = random.Random(0)
    for _ in range(50):
        parents, rewards, expected = [], [], []

        def add(tree, parent):
            parents.append(parent)
            rewards.append(0.0 if isinstance(tree, list) else tree)
            i = len(parents) - 1
            expected.append(None)
            below = [add(child, i) for child in tree] if isinstance(tree, list) else []
            expected[i] = sum(below) / len(below) if below else tree
            return expected[i]

        add(random_tree(rng), -1)
        values, advantages = spo.tree_advantages(parents, rewards)
        assert values == pytest.approx(expected)
        for i, parent in enumerate(parents):
            above = expected[parent] if parent >= 0 else expected[i]
            assert advantages[i] == pytest.approx(expected[i] - above, abs=1e-12)


def tree_config(**options) -> spo.Config:
    return spo.Config(variant="tree", max_new_tokens=HORIZON, **options)


@pytest.mark.parametrize(
    "branching, segment",
    [([2, 3], 1), ([3, 2, 2], 1), ([2, 2], 3), ([4], 2), ([2, 2, 2], 2), ([2, 2, 2], 3)],
)
def test_a_tree_grows_by_segments_and_its_last_level_runs_to_the_end(
    model, monkeypatch, branching, segment
):
    fake_rewards(monkeypatch)
    cfg = tree_config(branching=branching, segment_tokens=segment, temperature=0.9)
    states, generator = [(PROMPT, [], "")] * 30, torch.Generator().manual_seed(0)
    tree = spo.grow_trees(model, None, states, cfg, generator)
    children = {i: [] for i in range(len(tree.nodes))}
    for i, parent in enumerate(tree.parents):
        assert (parent == -1) == (i < 30)
        if parent >= 0:
            children[parent].append(i)
    early = cut = 0
    for i, node in enumerate(tree.nodes):
        root, *path = tree.path(i)
        assert root < 30 and [tree.parents[j] for j in [*path, i]][-1] == tree.parents[i]
        done = [id for j in path for id in tree.nodes[j].ids]
        assert node.prompt == (PROMPT + done)[: len(PROMPT + done) - len(node.ids)]
        if i < 30:
            assert node.prompt == PROMPT and node.ids == [] and len(children[i]) == branching[0]
            continue
        last = len(path) == len(branching)
        assert len(node.ids) <= (HORIZON if last else segment) and node.ids
        assert len(done) <= HORIZON
        assert node.finished == (node.ids[-1] == END)
        whole = node.finished or len(done) == HORIZON  # ended, or without room
        if whole or last:
            assert tuple(done) in all_answers() and node.reward == reward_of(done)
            assert children[i] == []
            early += not last and node.finished
            cut += not last and not node.finished
        else:
            assert len(node.ids) == segment and len(children[i]) == branching[len(path)]
    assert early or len(branching) == 1
    assert cut or (len(branching) - 1) * segment < HORIZON


def test_a_node_without_room_in_the_models_window_is_a_leaf(model, monkeypatch):
    """A prompt of 13 tokens leaves 3 of the 16, so less than the longest answer."""
    fake_rewards(monkeypatch)
    cfg = tree_config(branching=[2, 2, 2], segment_tokens=2)
    states, generator = [([1, 0] * 6 + [1], [], "")] * 30, torch.Generator().manual_seed(0)
    tree = spo.grow_trees(model, None, states, cfg, generator)
    assert all(node.ids for node in tree.nodes[30:])
    ends = {len(node.prompt) + len(node.ids) for node in tree.nodes if not node.finished}
    assert ends == {13, 15, 16}


def test_siblings_are_drawn_independently_at_the_temperature(model, monkeypatch):
    fake_rewards(monkeypatch)
    cfg = tree_config(branching=[2, 2], segment_tokens=1, temperature=0.6)
    generator = torch.Generator().manual_seed(0)
    tree = spo.grow_trees(model, None, [(PROMPT, [], "")] * 3000, cfg, generator)
    first = [node.ids[0] for node, parent in zip(tree.nodes, tree.parents) if 0 <= parent < 3000]
    pairs = list(zip(first[::2], first[1::2]))
    logits = model(torch.tensor([PROMPT])).logits[0, -1] / 0.6
    probs = logits.softmax(-1).tolist()
    for a in range(4):
        for b in range(4):
            p = probs[a] * probs[b]
            share = pairs.count((a, b)) / len(pairs)
            assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / len(pairs)) + 1e-9


def test_a_trees_advantage_is_expected_to_be_a_share_of_the_true_one(model, monkeypatch):
    """E[A(n) | n] = (1 - 1/b) (V(n) - V(parent)), for the mean over siblings includes the node."""
    fake_rewards(monkeypatch)
    branching = [3, 2]
    cfg = tree_config(branching=branching, segment_tokens=1)
    generator, truth = torch.Generator().manual_seed(0), exact_values(model)
    tree = spo.grow_trees(model, None, [(PROMPT, [], "")] * 6000, cfg, generator)
    values, advantages = spo.tree_advantages(tree.parents, [node.reward for node in tree.nodes])
    seen = {}
    for i in range(6000, len(tree.nodes)):
        done = tuple([*tree.nodes[i].prompt, *tree.nodes[i].ids][len(PROMPT) :])
        depth = len(tree.path(i)) - 1
        seen.setdefault((depth, len(tree.nodes[i].prompt) - len(PROMPT), done), []).append(i)
    checked = 0
    for (depth, start, done), nodes in seen.items():
        if len(nodes) < 300:
            continue
        value = truth.get(done, reward_of(done) if done in all_answers() else None)
        for got, exact in (
            ([values[i] for i in nodes], value),
            ([advantages[i] for i in nodes],
             (1 - 1 / branching[depth - 1]) * (value - truth[done[:start]])),
        ):  # fmt: skip
            mean, stderr = common.mean_stderr(got)
            assert abs(mean - exact) < 4.5 * stderr + 1e-9, (depth, done, mean, exact, stderr)
            checked += 1
    assert checked > 20


def test_the_nodes_with_credit_are_trained_behind_what_stands_above_them(model, monkeypatch):
    fake_rewards(monkeypatch)
    cfg = tree_config(branching=[2, 3], segment_tokens=2, temperature=0.8)
    generator = torch.Generator().manual_seed(3)
    tree = spo.grow_trees(model, None, [(PROMPT, [], "")] * 8, cfg, generator)
    credit = spo.credit_trees(model, tree, cfg)
    rewards = [node.reward for node in tree.nodes]
    values, advantages = spo.tree_advantages(tree.parents, rewards)
    kept = [i for i, advantage in enumerate(advantages) if advantage]
    assert 0 < len(kept) < len(tree.nodes) - 8
    assert {len(tree.path(i)) - 1 for i in kept} == {1, 2}  # all levels are trained
    assert len(credit.samples) == len(credit.owners) == len(kept)
    for s, owner, i in zip(credit.samples, credit.owners, kept):
        node = tree.nodes[i]
        assert (s.context, s.ids, owner) == (node.prompt, node.ids, tree.path(i)[0])
        assert s.advantages == [advantages[i]] * len(node.ids)
        above = node.prompt[len(PROMPT) :]
        expected = log_prob(model, above + node.ids, 0.8)[len(above) :].tolist()
        assert s.old_logprobs == pytest.approx(expected, abs=1e-5)
    assert credit.accuracy == pytest.approx(sum(values[:8]) / 8)
    assert credit.tokens == sum(len(node.ids) for node in tree.nodes)
    leaves = [i for i in range(len(tree.nodes)) if i not in tree.parents]
    assert len(credit.answers) == len(leaves)
    for (owner, r, starts, credits), i in zip(credit.answers, leaves):
        root, *path = tree.path(i)
        assert owner == root and r.prompt == PROMPT and tuple(r.ids) in all_answers()
        assert (r.reward, r.finished) == (reward_of(r.ids), r.ids[-1] == END)
        lengths = [len(tree.nodes[j].ids) for j in path]
        assert starts == [sum(lengths[:k]) for k in range(len(path))]
        assert credits == [advantages[j] for j, n in zip(path, lengths) for _ in range(n)]


def test_a_tree_without_any_credit_trains_nothing(model, monkeypatch):
    monkeypatch.setattr(common, "response_reward", lambda *_: 1.0)
    monkeypatch.setattr(common, "eos_ids", lambda *_: {END})
    cfg = tree_config(segment_tokens=1)
    generator = torch.Generator().manual_seed(0)
    tree = spo.grow_trees(model, None, [(PROMPT, [], "")] * 4, cfg, generator)
    credit = spo.credit_trees(model, tree, cfg)
    assert (credit.samples, credit.entropy, credit.accuracy) == ([], 0.0, 1.0)
    before = [p.clone() for p in model.parameters()]
    optimizer, schedule = constant_rate(model, 0.1, torch.optim.AdamW)
    metrics = spo.update(model, optimizer, schedule, [], cfg, "seed")
    assert all(value == 0 for value in metrics.values())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize(
    "options", [{}, dict(scale_advantages=True), dict(mask=False), dict(level_weights=True)]
)
def test_trees_and_update_together_raise_the_exact_expected_reward(model, monkeypatch, options):
    fake_rewards(monkeypatch)
    cfg = tree_config(prompts=8, branching=[3, 3], segment_tokens=2, lr=3e-3, **options)
    optimizer, schedule = constant_rate(model, cfg.lr, torch.optim.AdamW)
    generator = torch.Generator().manual_seed(0)
    before = exact_values(model)[()]
    for step in range(25):
        tree = spo.grow_trees(model, None, [(PROMPT, [], "")] * 8, cfg, generator)
        credit = spo.credit_trees(model, tree, cfg)
        spo.update(model, optimizer, schedule, credit.samples, cfg, str(step))
    assert before < 0.6 and exact_values(model)[()] > 0.85


def test_the_siblings_std_is_used_if_asked_for(model, monkeypatch):
    fake_rewards(monkeypatch)
    cfg = tree_config(branching=[3, 3], segment_tokens=2)
    tree = spo.grow_trees(model, None, [(PROMPT, [], "")], cfg, torch.Generator().manual_seed(3))
    plain = spo.credit_trees(model, tree, cfg).samples
    cfg.scale_advantages = True
    scaled = spo.credit_trees(model, tree, cfg).samples
    assert [s.ids for s in plain] == [s.ids for s in scaled]
    pairs = [(abs(s.advantages[0]), abs(t.advantages[0])) for s, t in zip(scaled, plain)]
    assert all(a > b for a, b in pairs)


def test_levels_weigh_alike_if_asked_for(model, monkeypatch):
    """Node by node from the definition: over the number of nodes of its level, scaled so that the
    mean weight of all nodes is 1. Some nodes of the first level ended there, and have no child."""
    parents = [-1, -1, 0, 0, 1, 1, 2, 2, 4, 4, 5, 5, 6, 6]
    wanted = [0, 0] + [12 / 3 / 4] * 4 + [12 / 3 / 6] * 6 + [12 / 3 / 2] * 2
    assert spo.node_weights(parents) == wanted and sum(wanted) == pytest.approx(12)
    assert spo.node_weights([-1]) == [0.0]

    fake_rewards(monkeypatch)
    cfg = tree_config(branching=[3, 3], segment_tokens=2)
    tree = spo.grow_trees(
        model, None, [(PROMPT, [], "")] * 4, cfg, torch.Generator().manual_seed(3)
    )
    plain = spo.credit_trees(model, tree, cfg)
    cfg.level_weights = True
    weighted = spo.credit_trees(model, tree, cfg)
    assert len({len(s.context) > len(PROMPT) for s in plain.samples}) == 2  # both levels train
    first = sum(parent in range(4) for parent in tree.parents)  # 4 is the number of roots
    counts = [first, len(tree.nodes) - 4 - first]
    for s, t in zip(plain.samples, weighted.samples, strict=True):
        level = int(len(s.context) > len(PROMPT))
        weight = sum(counts) / 2 / counts[level]
        assert t.advantages == pytest.approx([weight * a for a in s.advantages])
    assert weighted.answers == plain.answers  # what is shown is the credit itself


@pytest.mark.parametrize(
    "options, updates",
    [
        (dict(prompts=8, group_size=4), 1),
        (dict(prompts=8, group_size=4, batch_size=8, epochs=3), 12),
        (dict(variant="tree", prompts=5, branching=[2, 3]), 1),
        (dict(variant="tree"), 14),  # 64 trees of 14 nodes: --replay_total is no limit
        (dict(variant="tree", prompts=5, branching=[2, 3], batch_size=12, epochs=2), 8),  # of 40
        (dict(variant="tree", prompts=5, branching=[2, 3], batch_size=12, replay_age=1,
              replay_total=30), 3),
        (dict(variant="tree", prompts=5, branching=[2, 3], batch_size=12, replay_age=2), 4),
    ],
)  # fmt: skip
def test_the_schedule_ends_with_the_most_updates_a_run_can_have(options, updates):
    assert spo.updates_of(spo.Config(**options)) == updates


def reward_by_answer(monkeypatch):
    """Each problem's answer is a token; an answer that begins with it is right."""
    monkeypatch.setattr(common, "eos_ids", lambda *_: {END})
    right = lambda ids, finished, answer, _: float(ids[0] == int(answer))  # noqa: E731
    monkeypatch.setattr(common, "response_reward", right)


def test_each_tree_is_judged_by_its_own_problems_answer(model, monkeypatch):
    reward_by_answer(monkeypatch)
    states = [([1, i], [], str(i)) for i in range(3)]
    cfg = tree_config(branching=[3, 2], segment_tokens=1)
    tree = spo.grow_trees(model, None, states, cfg, torch.Generator().manual_seed(0))
    credit = spo.credit_trees(model, tree, cfg)
    assert {a.owner for a in credit.answers} == {0, 1, 2}
    for owner, r, *_ in credit.answers:
        assert r.prompt == [1, owner] and r.reward == (r.ids[0] == owner)
        assert r.finished == (r.ids[-1] == END)
    assert {a.rollout.finished for a in credit.answers} == {True, False}
    for s, owner in zip(credit.samples, credit.owners):
        assert s.context[:2] == [1, owner]


def test_each_chain_is_judged_by_its_own_problems_answer(model, monkeypatch):
    reward_by_answer(monkeypatch)
    prompts = [[1, i] for i in range(3)]
    cfg = spo.Config(
        prompts=3, group_size=2, threshold=1.0, continuations=400, max_new_tokens=HORIZON
    )
    generator = torch.Generator().manual_seed(0)
    states = [(prompt, [], str(i)) for i, prompt in enumerate(prompts)]
    rollouts = common.complete(model, None, states, 2, HORIZON, generator=generator)
    answers = [str(i) for i in range(3) for _ in range(2)]
    credit = spo.assign_credit(model, None, rollouts, answers, cfg, generator)
    assert [a.owner for a in credit.answers] == credit.owners == [0, 0, 1, 1, 2, 2]
    for owner, r, starts, advantages in credit.answers:
        assert r.prompt == prompts[owner] and starts == list(range(len(r.ids)))
        first = model(torch.tensor([r.prompt])).logits[0, -1].softmax(-1)[owner].item()
        # Once the first token is there, the value is known: right or wrong for good.
        assert advantages[0] == pytest.approx(r.reward - first, abs=0.11)
        assert advantages[1:] == [0.0] * (len(r.ids) - 1)


# ---------------------------------------------------------------------------------------- replay


def node(i: int) -> dict:
    return dict(context=[1], ids=[i], advantages=[0.5], old_logprobs=[-1.0])


def test_replay_uses_each_node_once_so_many_of_a_problem_and_none_that_is_too_old():
    cfg = tree_config(replay_age=3, replay_nodes=2)
    waiting, used = [], []
    for step in range(6):
        new = [(step, f"q{step}", node(10 * step + i)) for i in range(5)]
        samples, waiting = spo.draw_replay(waiting + new, step, cfg, str(step))
        asked = [s.ids[0] // 10 for s in samples]  # the step in which each was sampled
        # Five nodes of a problem, two a step: two, two and one, and then nothing is left.
        recent = {s: n for s, n in zip((step, step - 1, step - 2), (2, 2, 1)) if s >= 0}
        assert {s: asked.count(s) for s in set(asked)} == recent
        used += [s.ids[0] for s in samples]
        assert all(s.advantages == [0.5] and s.old_logprobs == [-1.0] for s in samples)
    assert len(used) == len(set(used)) == 2 + 4 + 5 * 4
    assert used[:5] != sorted(used[:5])  # drawn at random
    again, _ = spo.draw_replay([(0, "q", node(i)) for i in range(9)], 0, cfg, "seed")
    other, _ = spo.draw_replay([(0, "q", node(i)) for i in range(9)], 0, cfg, "other")
    assert [s.ids for s in again] != [s.ids for s in other]


def test_replay_drops_what_has_waited_too_long():
    cfg = tree_config(replay_age=2, replay_nodes=1)
    waiting = [(0, "q", node(i)) for i in range(5)]
    samples, waiting = spo.draw_replay(waiting, 0, cfg, "0")
    assert (len(samples), len(waiting)) == (1, 4)
    samples, waiting = spo.draw_replay(waiting, 1, cfg, "1")
    assert (len(samples), len(waiting)) == (1, 3)
    assert spo.draw_replay(waiting, 2, cfg, "2") == ([], [])  # two steps old: dropped
    alike = [(1, "p", node(1)), (1, "q", node(2)), (1, "q", node(3))]
    samples, waiting = spo.draw_replay(alike, 1, cfg, "1")  # one of each problem
    assert sorted(s.ids[0] // 2 for s in samples) == [0, 1] and len(waiting) == 1


# ------------------------------------------------------------------------------------ partitions


def test_partitions_of_a_hand_worked_answer(tokenizer, monkeypatch):
    ends = {tokenizer.eos_token_id}
    monkeypatch.setattr(common, "eos_ids", lambda *_: ends)
    ids = [*common.encode(tokenizer, "12+6=18\n18-8=10\n#### 10"), tokenizer.eos_token_id]
    probs = [1.0] * len(ids)
    probs[6], probs[14], probs[20] = 0.5, 0.3, 0.8
    s = Sample([1], ids, None, [math.log(p) for p in probs])

    def starts(**options):
        return spo.boundaries(s, None, tokenizer, spo.Config(**options))

    assert starts() == [6, 14, 20] and starts(interval=2) == [6, 20]
    assert starts(partition="fixed", segment_tokens=10) == [0, 10, 20]
    assert starts(partition="fixed", segment_tokens=99) == [0]
    assert starts(partition="fixed", segment_tokens=23) == [0, 23]
    assert starts(partition="newline") == [0, 8, 16]
    assert starts(partition="trajectory", group_size=2) == [0]
    s.ids = [*common.encode(tokenizer, "1\n" * 30), tokenizer.eos_token_id]
    assert starts(partition="newline") == list(range(0, 60, 2))  # not only the first twenty
    s.ids = common.encode(tokenizer, "1\n2\n;")
    ends.update(s.ids[-1:])
    assert starts(partition="newline") == [0, 2]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("partition", ["fixed", "newline"])
def test_other_partitions_estimate_the_value_of_the_prompt_too(model, monkeypatch, partition, mask):
    monkeypatch.setattr(common, "step_starts", lambda ids, *_, **__: list(range(0, len(ids), 2)))
    monkeypatch.setattr(common, "eos_ids", lambda *_: {END})
    monkeypatch.setattr(
        spo, "estimate_values", lambda *a: ([len(done) / 8 + 0.1 for _, done, _ in a[2]], 0)
    )
    cfg = spo.Config(partition=partition, segment_tokens=2, mask=mask)
    answers = [a for a in all_answers() if len(a) == HORIZON][:20]
    credit = spo.assign_credit(model, None, rollouts_of(answers), [""] * 20, cfg, None)
    for owner, r, starts, advantages in credit.answers:
        assert starts == [0, 2]
        assert advantages == pytest.approx([0.25] * 2 + [r.reward - 0.35] * 2)
    trained = spo.trained_tokens(common.collate(credit.samples), cfg)
    probs = common.collate(credit.samples).old_logprobs.exp()
    assert torch.equal(trained, probs < 0.9 if mask else torch.ones_like(trained))


# ---------------------------------------------------------------------------------------- the KL


def test_k3_has_the_value_of_one_kl_and_the_gradient_of_the_other():
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    logp = logits.log_softmax(-1)
    p = logp.exp().detach()
    estimates = common.k3(q.log() - logp)
    assert (estimates >= 0).all()
    assert (p * estimates).sum().item() == pytest.approx((p * (p / q).log()).sum().item())
    (p * estimates).sum().backward()  # the samples stay where they are
    got, logits.grad = logits.grad.clone(), None
    (q * (q.log() - logits.log_softmax(-1))).sum().backward()  # KL(q || p)
    assert torch.allclose(got, logits.grad, atol=1e-12)
    assert common.k3(torch.tensor([0.0, 500.0, -500.0])).isfinite().all()


@pytest.mark.parametrize("width", [6, 20, 10_000])
@pytest.mark.parametrize("mask", [True, False])
def test_the_kl_pulls_towards_the_reference_over_all_samples(model, monkeypatch, mask, width):
    """Summed over a sequence's trained tokens, mean over the optimiser step's samples: those
    without an advantage among them."""
    cfg = spo.Config(prompts=10, mask=mask, threshold=0.4, kl_coef=0.3, temperature=0.7)
    cfg.max_grad_norm = 1e9
    torch.manual_seed(5)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn_like(p))
    before = [p.clone() for p in reference.parameters()]
    samples = random_samples(model, temperature=0.7)
    model.zero_grad()
    loss, penalty, count = slow_loss(model, samples, cfg), 0.0, 0
    for s in samples:
        new, ref = log_prob(model, s.ids, 0.7), log_prob(reference, s.ids, 0.7).detach()
        for t, old in enumerate(s.old_logprobs):
            if not mask or math.exp(old) < 0.4:
                penalty = penalty + (ref[t] - new[t]).exp() - 1 - (ref[t] - new[t])
                count += 1
    (loss + 0.3 * penalty / len(samples)).backward()
    expected = [p - p.grad for p in model.parameters()]
    total = (loss + 0.3 * penalty / len(samples)).item()
    model.zero_grad()
    true_micro_batches = common.micro_batches
    monkeypatch.setattr(common, "micro_batches", lambda rows, _: true_micro_batches(rows, width))
    optimizer, schedule = constant_rate(model, 1.0)
    metrics = spo.update(model, optimizer, schedule, samples, cfg, "seed", reference)
    for p, q in zip(model.parameters(), expected):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)
    assert metrics["loss"] == pytest.approx(total, abs=1e-5)
    assert metrics["kl_ref"] == pytest.approx(penalty.item() / count, abs=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(reference.parameters(), before))


def test_minibatches_share_the_samples_evenly(model, monkeypatch):
    sizes = []
    true_step = common.optimizer_step
    monkeypatch.setattr(common, "optimizer_step", lambda *a: sizes.append(1) or true_step(*a))
    seen = []
    true_loss = spo.spo_loss

    def spy(logprobs, batch, *args):
        seen.append(len(batch.mask))
        return true_loss(logprobs, batch, *args)

    monkeypatch.setattr(spo, "spo_loss", spy)
    samples = [s for s in random_samples(model, 14) if any(s.advantages)][:11]
    for batch_size, expected in ((4, [4, 4, 3]), (0, [11]), (11, [11]), (20, [11]), (5, [4, 4, 3])):
        cfg = tree_config(batch_size=batch_size)
        optimizer, schedule = constant_rate(model, 1e-9)
        spo.update(model, optimizer, schedule, samples, cfg, "seed")
        assert sorted(seen, reverse=True) == expected and len(sizes) == len(expected)
        seen.clear(), sizes.clear()


# --------------------------------------------------------------------------------------- display


def shown_chain(tokenizer, text, probs, starts, advantages, **options):
    problem = common.Problem("12+6-8", "12+6=18\n18-8=10\n#### 10", "10", True)
    ids = [*common.encode(tokenizer, text), tokenizer.eos_token_id]
    r = Rollout([1], ids, True, 0.0)
    logprobs = [math.log(probs.get(t, 1.0)) for t in range(len(ids))]
    s = Sample([1], ids, advantages, logprobs)
    answer = spo.Answer(0, r, starts, advantages)
    credit = spo.Credit([s], [0], [answer], 0.0, 0.0, 0)
    cfg = spo.Config(**options)
    places = spo.cutpoint_places(credit, {(8, -8)}, tokenizer, cfg)
    return spo.show_answer([problem], credit, places, tokenizer, cfg, False, 100)


def test_an_answer_is_shown_with_its_cutpoints_and_what_they_fall_on(tokenizer):
    text, length = "12+6=18\n18-8=11\n#### 11", 24
    advantages = [0.0] * 14 + [-0.5] * (length - 14)
    probs = {6: 0.5, 14: 0.4, 16: 0.2, 22: 0.7}
    shown = shown_chain(tokenizer, text, probs, [14], advantages, interval=4)
    assert "12+6=1'8\n" in shown and "18-8=1|1" in shown and "'#### 1'1<end>\n" in shown
    cut = shown_chain(tokenizer, text, probs, [6, 14, 16, 22], advantages)
    assert "'" not in cut.split("  | a segment")[0]
    # Of four cutpoints one begins a step (16), and one states 18-8 (tokens 13, 14); of all 24
    # tokens three begin a step.
    assert "25% begin a step (of all tokens 12%)" in cut
    assert "25% state what the warm start has learned wrong (of all tokens 8%)" in cut
    newline = shown_chain(tokenizer, text, probs, [0, 8, 16], advantages, partition="newline")
    assert "|12+6=1'8" in newline and "|'#### 1" in newline


def test_the_display_picks_a_failure_with_credit_and_counts_cutpoints_of_all_answers(tokenizer):
    text = "12+6=18\n18-8=10\n#### 10"
    ids = [*common.encode(tokenizer, text), tokenizer.eos_token_id]
    problem = common.Problem("12+6-8", text, "10", True)

    def answer(reward, advantage):
        r = Rollout([1], ids, True, reward)
        return spo.Answer(0, r, [0], [advantage] * len(ids))

    answers = [answer(1.0, 0.5), answer(0.0, 0.0), answer(0.0, -0.5), answer(0.0, -0.25)]
    unsure = [math.log(0.5 if t in (8, 9) else 1.0) for t in range(len(ids))]
    samples = [Sample([1], ids, a.advantages, unsure) for a in answers]
    samples[0].old_logprobs = [0.0] * len(ids)
    credit = spo.Credit(samples, [0] * 4, answers, 0.0, 0.0, 0)
    assert spo.pick_answer(credit) == 2
    assert spo.pick_answer(credit._replace(answers=answers[:2])) == 0
    cfg = spo.Config()
    places = spo.cutpoint_places(credit, set(), tokenizer, cfg)
    shown = spo.show_answer([problem], credit, places, tokenizer, cfg, False, 100)
    assert "-0.50" in shown and "reward 0" in shown
    # Six cutpoints in all answers, three of which begin a line; none in the first.
    assert "50% begin a step" in shown
    one = credit._replace(samples=samples[:1], answers=answers[:1])
    places = spo.cutpoint_places(one, None, tokenizer, cfg)
    alone = spo.show_answer([problem], one, places, tokenizer, cfg, False, 100)
    assert "0% begin a step" in alone and "wrong" not in alone.split("cutpoints of this round")[1]


def test_every_step_of_a_long_answer_counts_where_cutpoints_are_placed(tokenizer):
    ids = common.encode(tokenizer, "1\n" * 30)
    words = "50% begin a step (of all tokens 50%)"
    assert spo.places_of([(ids, [58, 59])], None, tokenizer) == words


def test_the_headline_names_the_settings_of_the_run():
    cfg = spo.Config(steps=3, prompts=8, group_size=5, batch_size=0, partition="fixed", mask=False)
    words = "3 rounds of 8 problems x 5 answers, partition fixed, mask off"
    assert spo.headline(cfg, []) == f"SPO-chain: {words}"
    cfg = tree_config(steps=3, prompts=8, segment_tokens=7, branching=[2, 3])
    words = "3 rounds of 8 problems, segments of 7 tokens, branching 2-3, mask on"
    assert spo.headline(cfg, []) == f"SPO-tree: {words}"


def test_the_tree_is_shown_a_node_a_line_and_cut_to_a_width(tokenizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "9")  # of the terminal, which has no say in it
    problem = common.Problem("12+6-8", "12+6=18\n18-8=10\n#### 10", "10", True)
    texts = ["12+6=18\n", "12+6=19\n", "18-8=10\n#### 10", "18-8=11\n#### 11"]
    texts += ["19-8=11\n#### 11", "19-8=11\n#### 11"]
    prompts = ["", "", texts[0], texts[0], texts[1], texts[1]]
    root = common.encode(tokenizer, "12+6-8\n")
    ids = [common.encode(tokenizer, text) for text in texts]
    above = [[*root, *common.encode(tokenizer, text)] for text in prompts]
    nodes = [Rollout(root, [], False), Rollout(root, [], False)]
    nodes += [Rollout(a, i, True, 0.0) for a, i in zip(above, ids)]
    nodes[4].reward = 1.0
    other = [Rollout(root, ids[0], True, reward) for reward in (0.0, 1.0)]  # of the second problem
    tree = spo.Tree(nodes + other, [-1, -1, 0, 0, 2, 2, 3, 3, 1, 1])
    answers = [spo.Answer(0, nodes[4], [0], [0.5]), spo.Answer(0, nodes[5], [0], [-0.5])]
    credit = spo.Credit([], [], answers, 0.0, 0.0, 0)
    cfg = spo.Config(variant="tree")
    given = ([problem, problem], tree, credit, tokenizer, cfg)
    shown = spo.show_tree(*given, colour=False, width=48)
    assert shown.split("\n") == [
        "12+6-8   answer 10, V 0.25",
        "    V 0.50 A +0.25   12+6=18 / ",
        "        V 1.00 A +0.50   18-8=10 / #### 10",
        "        V 0.00 A -0.50 ! 18-8=11 / #### 11",
        "    V 0.00 A -0.25 ! 12+6=19 / ",  # all wrong below: not shown
        "  ! the first wrong token is in this node",
    ]
    given[-1].scale_advantages = True  # the siblings' V are 1/2 and 0: a std of 1/4
    scaled = spo.show_tree(*given, colour=False, width=48).split("\n")
    assert scaled[1].startswith("    V 0.50 A +1.00 ")
    given[-1].scale_advantages = False
    nodes[6].reward = 1.0  # right in spite of its text, whose first wrong token is further up
    lines = spo.show_tree(*given, colour=False, width=48).split("\n")
    assert lines[4:] == [
        "    V 0.50 A +0.00 ! 12+6=19 / ",
        "        V 1.00 A +0.50   19-8=11 / #### 11",
        "        V 0.00 A -0.50   19-8=11 / #### 11",
        "  ! the first wrong token is in this node",
    ]
    narrow = spo.show_tree(*given, colour=False, width=36)
    assert max(map(len, narrow.split("\n")[:-1])) == 36 and "…" in narrow
    narrow = spo.show_tree(*given, colour=False, width=20)
    assert narrow.split("\n")[0] == "12+6-8   an…, V 0.50"
    coloured = spo.show_tree(*given, colour=True, width=48)
    assert "\033[48;5;" in coloured


def test_replay_draws_so_many_nodes_of_a_question_and_of_all_and_loses_none():
    cfg = spo.Config(variant="tree", replay_age=2, replay_nodes=3, replay_total=7)

    def entries(step):
        return [(step, f"q{i % 4}", dict(context=[step], ids=[i])) for i in range(20)]

    waiting, used = [], []
    for step in range(4):
        fresh = [entry for entry in waiting if step - entry[0] < 2] + entries(step)
        samples, later = spo.draw_replay(waiting + entries(step), step, cfg, f"seed-{step}")
        drawn = [(s.context[0], s.ids[0]) for s in samples]
        assert len(drawn) == 7 == len({*drawn}) and not {*drawn} & {*used}
        assert max(Counter(i % 4 for _, i in drawn).values()) <= 3
        assert all(step - born < 2 for born, _ in drawn)
        kept = [(born, fields["ids"][0]) for born, _, fields in later]
        assert sorted(drawn + kept) == sorted((b, f["ids"][0]) for b, _, f in fresh)
        used, waiting = used + drawn, later
    alone = spo.draw_replay(entries(0), 0, spo.Config(variant="tree", replay_age=1), "s")[0]
    assert len(alone) == 20  # by default 32 of a question and 512 of all


# ------------------------------------------------------------------------------ credit and truth


def test_credit_hit_of_hand_worked_segments():
    advantages = [0.0, 0.5, 0.5, -0.25, -0.25, -0.75]
    starts = [1, 3, 5]
    assert spo.credit_hit(starts, advantages, 5) == (True, 1 / 6)
    assert spo.credit_hit(starts, advantages, 4) == (False, 1 / 6)
    tie = [-0.5, -0.5, 0.0, -0.5]
    assert spo.credit_hit([0, 2, 3], tie, 1) == (True, 2 / 4)
    assert spo.credit_hit([0, 2, 3], tie, 3) == (False, 2 / 4)
    inner = [0.0, -0.75, -0.75, -0.25]  # the worst segment ends before token 3
    assert [spo.credit_hit([1, 3], inner, t)[0] for t in range(4)] == [False, True, True, False]
    assert spo.credit_hit([0, 1], [0.0, 0.5], 0) == (False, 0.0)
    assert spo.credit_hit([], [0.0, 0.0], 0) == (False, 0.0)
    assert spo.credit_hit([0], [-0.5] * 3, 2) == (True, 1.0)  # one segment: trivially


def test_failures_are_counted_with_their_hits(tokenizer):
    problem = common.Problem("12+6", "12+6=18\n#### 18", "18", True)

    def rollout(text, reward):
        return Rollout([1], common.encode(tokenizer, text), True, reward)

    counts = dict(failures=0, hits=0, chance=0.0)
    assert spo.hit_rates(counts) == ({}, "")
    advantages = [0.0] * 6 + [-0.5] * 2 + [-0.25] * 8  # the worst segment is 6, 7 of 15 tokens
    for text, reward in (
        ("12+6=18\n#### 18", 1.0),
        ("12+6=18\n####  18", 1.0),  # right, if in other words
        ("12+6=18\n#### 1", 0.0),  # cut, and right so far
        ("12+6=19\n#### 19", 0.0),  # wrong in token 6
        ("12+6=18\n#### 19", 0.0),  # wrong in token 14
        ("12+6=17\n#### 17", 0.0),
    ):
        answer = spo.Answer(1, rollout(text, reward), [6, 8], advantages[: len(text)])
        spo.count_hits(counts, [None, problem], [answer], tokenizer)
    assert (counts["failures"], counts["hits"]) == (3, 2)
    assert counts["chance"] == pytest.approx(3 * 2 / 15)
    facts, remark = spo.hit_rates(counts)
    assert facts == dict(failures=3, credit_hit=2 / 3, credit_chance=pytest.approx(2 / 15))
    assert "67% of 3 failures (by chance 13%)" in remark


def test_a_config_that_cannot_work_is_refused():
    for bad in (
        dict(interval=0), dict(threshold=0.0), dict(threshold=1.01), dict(temperature=0.0),
        dict(temperature=math.nan), dict(lr=math.inf), dict(group_size=0), dict(batch_size=48),
        dict(warmup_updates=-1), dict(partition="trajectory", group_size=1), dict(branching=[2, 1]),
        dict(segment_tokens=0), dict(kl_coef=-1.0), dict(kl_coef=math.inf), dict(replay_age=-1),
        dict(replay_age=2), dict(scale_advantages=True),
        dict(level_weights=True),
        dict(variant="tree", partition="fixed"), dict(variant="tree", replay_nodes=0),
    ):  # fmt: skip
        with pytest.raises(BadInput):
            spo.Config(**bad)
