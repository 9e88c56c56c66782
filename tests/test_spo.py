"""SPO's maths against hand-worked cases, plain loops, and a policy small enough to enumerate."""

import dataclasses
import math
import random

import pytest
import torch

import common
import spo
from common import BadInput, Rollout, Sample
from tiny_policy import END, HORIZON, PROMPT, all_answers, all_log_probs, exact_values, fake_rewards
from tiny_policy import flat_grad, log_prob, reward_of, rollouts_of, true_gradient

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

    def values_by_length(model, tokenizer, states, cfg, generator):
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


def random_samples(model, count=9, temperature=1.0, seed=0):
    rng = random.Random(seed)
    samples = []
    for answer in rng.sample(all_answers(), count):
        logprobs = log_prob(model, answer, temperature).detach()
        moved = [p + rng.uniform(-0.5, 0.5) for p in logprobs.tolist()]
        advantages = [rng.choice((-1.0, -0.25, 0.0, 0.5)) for _ in answer]
        samples.append(Sample(PROMPT, list(answer), advantages, moved))
    samples.append(Sample(PROMPT, [2, 2, 2, 2], [0.0] * 4, [-1.0] * 4))  # no signal, counts in Z
    return samples


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
        prompts=10, batch_size=10, mask=mask, threshold=threshold, temperature=temperature
    )
    cfg.max_grad_norm = 1e9
    samples = random_samples(model, temperature=temperature)
    model.zero_grad()
    loss = slow_loss(model, samples, cfg)
    loss.backward()
    expected = [p - p.grad for p in model.parameters()]
    model.zero_grad()
    true_micro_batches = common.micro_batches
    monkeypatch.setattr(common, "micro_batches", lambda rows: true_micro_batches(rows, width))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
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
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    metrics = spo.update(model, optimizer, schedule, samples, cfg, "seed")
    assert 0 < sum(clipped) < len(clipped)
    assert metrics["kl"] == pytest.approx(sum(kl) / len(kl), abs=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(sum(clipped) / len(clipped), abs=1e-9)


def test_each_epoch_uses_each_sample_once_in_minibatches_of_its_own_order(model, monkeypatch):
    seen = []
    true_loss = spo.spo_loss

    def spy(logprobs, batch, mask, normaliser, clip_eps):
        seen.append([tuple(row[m].tolist()) for row, m in zip(batch.targets, batch.mask)])
        assert normaliser == sum(map(len, seen[-1]))  # one micro-batch a minibatch, mask off
        return true_loss(logprobs, batch, mask, normaliser, clip_eps)

    monkeypatch.setattr(spo, "spo_loss", spy)
    samples = [s for s in random_samples(model, 12) if any(s.advantages)][:8]
    cfg = spo.Config(prompts=8, batch_size=4, epochs=2, mask=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    spo.update(model, optimizer, schedule, samples, cfg, "seed")
    whole = sorted(tuple(s.ids) for s in samples)
    assert sorted(seen[0] + seen[1]) == whole and sorted(seen[2] + seen[3]) == whole
    assert set(seen[0]) != set(seen[2])
    assert schedule.get_last_lr() == [1e-3 / 16]  # four optimiser steps


def test_a_batch_with_nothing_to_train_changes_nothing(model):
    sure = [Sample(PROMPT, [0, 1], [1.0, -1.0], [-0.01, -0.01])]  # all masked: Z = 0
    idle = [Sample(PROMPT, [0, 1], [0.0, 0.0], [-1.0, -1.0])]  # no advantage
    for samples in (sure, idle, sure + idle):
        before = [p.clone() for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
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


# ------------------------------------------------------------------------------ credit and truth


def test_credit_hit_of_hand_worked_segments():
    advantages = [0.0, 0.5, 0.5, -0.25, -0.25, -0.75]
    starts = [1, 3, 5]
    assert common.credit_hit(starts, advantages, 5) == (True, 1 / 6)
    assert common.credit_hit(starts, advantages, 4) == (False, 1 / 6)
    tie = [-0.5, -0.5, 0.0, -0.5]
    assert common.credit_hit([0, 2, 3], tie, 1) == (True, 2 / 4)
    assert common.credit_hit([0, 2, 3], tie, 3) == (False, 2 / 4)
    inner = [0.0, -0.75, -0.75, -0.25]  # the worst segment ends before token 3
    assert [common.credit_hit([1, 3], inner, t)[0] for t in range(4)] == [False, True, True, False]
    assert common.credit_hit([0, 1], [0.0, 0.5], 0) == (False, 0.0)
    assert common.credit_hit([], [0.0, 0.0], 0) == (False, 0.0)
    assert common.credit_hit([0], [-0.5] * 3, 2) == (True, 1.0)  # one segment: trivially


def test_a_config_that_cannot_work_is_refused():
    for bad in (
        dict(interval=0), dict(threshold=0.0), dict(threshold=1.01), dict(temperature=0.0),
        dict(temperature=math.nan), dict(lr=math.inf), dict(group_size=0), dict(batch_size=48),
        dict(warmup_updates=-1), dict(partition="trajectory"),
    ):  # fmt: skip
        with pytest.raises(BadInput):
            spo.Config(**bad)
