"""A policy small enough to enumerate, shared by the tests of the three scripts."""

import itertools
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import common
from common import Rollout

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
