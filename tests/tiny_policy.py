"""A policy small enough to enumerate, shared by the tests of the three scripts."""

import itertools
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import common
from common import Rollout, Sample

# A policy over 4 tokens, of which 3 ends an answer, and answers of at most 4 tokens: 81 + 40 of
# them, so that every value, advantage and gradient is known exactly.
END, HORIZON, PROMPT = 3, 4, [1, 0]


def make_policy() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, initializer_range=0.7,
        eos_token_id=END, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def all_answers() -> list[tuple[int, ...]]:
    rows = [p for n in range(HORIZON + 1) for p in itertools.product(range(4), repeat=n)]
    ends = [p for p in rows if p and END not in p[:-1]]
    return [p for p in ends if p[-1] == END or len(p) == HORIZON]


def reward_of(ids) -> float:
    """Half of the answers are right, without a pattern that the policy could exploit."""
    return float(random.Random(str(tuple(ids))).random() < 0.5)


def log_prob(model, ids, temperature=1.0):
    """(T,) of one answer, straight from the model's logits."""
    logits = model(torch.tensor([[*PROMPT, *ids]])).logits[0] / temperature
    steps = logits[len(PROMPT) - 1 : -1].log_softmax(-1)
    return steps[torch.arange(len(ids)), torch.tensor(ids)]


def all_log_probs(model):
    """(121, HORIZON) of every answer in one plain forward pass, 0 after an answer's end."""
    answers = all_answers()
    rows = torch.tensor([[*PROMPT, *a, *[0] * (HORIZON - len(a))] for a in answers])
    steps = model(rows).logits[:, len(PROMPT) - 1 : -1].log_softmax(-1)
    chosen = steps.gather(-1, rows[:, len(PROMPT) :, None])[..., 0]
    return chosen * torch.tensor([[t < len(a) for t in range(HORIZON)] for a in answers])


def exact_values(model) -> dict[tuple[int, ...], float]:
    """Expected reward of going on from each unfinished beginning of an answer."""
    with torch.no_grad():
        table, answers = all_log_probs(model), all_answers()
    values = {}
    for done in {a[:t] for a in answers for t in range(len(a))}:
        rows = [i for i, a in enumerate(answers) if a[: len(done)] == done]
        weights = table[rows][:, len(done) :].sum(1).exp().tolist()
        values[done] = sum(w * reward_of(answers[i]) for w, i in zip(weights, rows))
    return values


def flat_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def true_gradient(model):
    model.zero_grad()
    rewards = torch.tensor([reward_of(a) for a in all_answers()])
    (all_log_probs(model).sum(1).exp() * rewards).sum().backward()
    return flat_grad(model)


def fake_rewards(monkeypatch):
    """Reward by the table above; an answer counts whether its end token or its budget ended it."""
    monkeypatch.setattr(common, "response_reward", lambda ids, *_: reward_of(ids))
    monkeypatch.setattr(common, "eos_ids", lambda *_: {END})


def rollouts_of(answers):
    return [Rollout(PROMPT, list(a), a[-1] == END, reward_of(a)) for a in answers]


def off_policy_samples(credit, model, count=9, temperature=1.0, seed=0) -> list[Sample]:
    """Random answers, each with credit(rng, answer), sampled by a policy that is a little other."""
    rng = random.Random(seed)
    samples = []
    for answer in rng.sample(all_answers(), count):
        logprobs = log_prob(model, answer, temperature).detach()
        moved = [p + rng.uniform(-0.5, 0.5) for p in logprobs.tolist()]
        samples.append(Sample(PROMPT, list(answer), credit(rng, answer), moved))
    samples.append(Sample(PROMPT, [2, 2, 2, 2], [0.0] * 4, [-1.0] * 4))  # no signal, but counts
    return samples


def token_count(rows) -> int:
    return sum(map(len, rows))


def constant_rate(model, lr, kind=torch.optim.SGD):
    """(optimizer, schedule)"""
    optimizer = kind(model.parameters(), lr=lr, weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def assert_epochs_use_each_sample_once(script, loss, normaliser, model, samples, cfg) -> None:
    """Two epochs over 8 samples, in minibatches of 4 and an order of their own. loss: the name of
    the script's; normaliser(ids of a minibatch): what it has to be given."""
    seen, true_loss = [], getattr(script, loss)

    def spy(logs, batch, *rest):
        seen.append([tuple(row[m].tolist()) for row, m in zip(batch.targets, batch.mask)])
        assert rest[-2] == normaliser(seen[-1])  # one micro-batch a minibatch
        return true_loss(logs, batch, *rest)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, loss, spy)
        script.update(model, optimizer, schedule, samples, cfg, "seed")
    whole = sorted(tuple(s.ids) for s in samples)
    assert sorted(seen[0] + seen[1]) == whole and sorted(seen[2] + seen[3]) == whole
    assert set(seen[0]) != set(seen[2])
    assert schedule.get_last_lr() == [1e-3 / 16]  # four optimiser steps


def assert_means_over_the_steps(metrics, slow_loss, model, samples) -> None:
    """Of two steps, on the halves of 8 samples in the order of the shuffle "seed"."""
    order = random.Random("seed-0").sample(samples, 8)
    losses, norms = [], []
    for half in (order[:4], order[4:]):
        model.zero_grad()
        losses.append(slow_loss(model, half))
        losses[-1].backward()
        norms.append(flat_grad(model).norm().item())
    assert metrics["loss"] == pytest.approx(sum(losses).item() / 2, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)
