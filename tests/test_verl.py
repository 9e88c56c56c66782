"""tutorials/verl_adapter.py: what is registered with verl, and the rows of its agent loops, beside
the scripts' own functions. No trainer of verl's is run: that takes GPUs."""

import asyncio
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tutorials"))

import common  # noqa: E402
import mpo  # noqa: E402
import reset_po  # noqa: E402
import spo  # noqa: E402

pytest.importorskip("verl", reason="verl is not installed: tutorials/README.md")

import verl_adapter as adapter  # noqa: E402
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.trainer.ppo.v1 import agent_loop_tq  # noqa: E402

LENGTHS = [9, 6, 2, 11]
MASK = torch.tensor([[t < n for t in range(11)] for n in LENGTHS])  # (B, T)


def tensors(seed=0):
    """Random log-probs, old log-probs and advantages, (B, T) each; ratios that leave the clip."""
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(*MASK.shape, generator=generator) for _ in range(3)]
    return (0.3 * x[0] - 1).requires_grad_(), 0.3 * x[1] - 1, x[2] * MASK


def batch_of(old, advantages, mask=MASK) -> common.Batch:
    return common.Batch(None, None, None, mask, advantages * mask, old * mask)


def actor(clip_eps=0.2, **info) -> SimpleNamespace:
    return SimpleNamespace(clip_ratio=clip_eps, global_batch_info=info)


def gradient(loss, logprobs):
    return torch.autograd.grad(loss, logprobs)[0]


def verl_gradient(mode: str, mask, processes: int, **info):
    """Of the registered loss, the rows on one process or two, whose gradients verl averages."""
    logprobs, old, advantages = tensors()
    loss_of = core_algos.get_policy_loss_fn("blocks")
    total = 0.0
    for rows in torch.arange(len(mask)).chunk(processes):
        config = actor(dp_size=processes, **info)
        own = old[rows], logprobs[rows], advantages[rows], mask[rows].int()
        loss, metrics = loss_of(*own, loss_agg_mode=mode, config=config)
        assert 0 < metrics["actor/pg_clipfrac"] < 1
        total = total + loss / processes
    return gradient(total, logprobs)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("layout, weights", [("window", 0.2), ("block", "joint")])
def test_the_loss_is_mpos(monkeypatch, processes, layout, weights):
    cfg = mpo.Config(block_size=3, layout=layout, weights=weights)
    monkeypatch.setattr(adapter, "BLOCKS", cfg)
    logprobs, old, advantages = tensors()
    n = MASK.sum().item()
    loss, _, _ = mpo.mpo_loss(logprobs - old, batch_of(old, advantages), n, cfg)
    given = verl_gradient("token-mean", MASK, processes, batch_num_tokens=n)
    torch.testing.assert_close(given, gradient(loss, logprobs), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("processes", [1, 2])
def test_with_k_of_one_and_its_mask_the_loss_is_spos(monkeypatch, processes):
    monkeypatch.setattr(adapter, "BLOCKS", mpo.Config(block_size=1))
    logprobs, old, advantages = tensors()
    trained = MASK & (old < old.median())
    z = trained.sum().item()
    loss, _ = spo.spo_loss(logprobs, batch_of(old, advantages), trained, z, 0.2)
    wanted = gradient(loss, logprobs)
    given = verl_gradient("token-mean", trained, processes, batch_num_tokens=z)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-9)
    no_mask = verl_gradient("token-mean", MASK, processes, batch_num_tokens=z)
    assert (no_mask - wanted).norm() > 0.1 * wanted.norm()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mean_per_rollout_is_the_resets(monkeypatch, processes):
    monkeypatch.setattr(adapter, "BLOCKS", mpo.Config(block_size=1))
    logprobs, old, advantages = tensors()
    loss, _ = reset_po.reset_loss(logprobs, batch_of(old, advantages), len(MASK), 0.2)
    given = verl_gradient("seq-mean-token-mean", MASK, processes, global_batch_size=len(MASK))
    torch.testing.assert_close(given, gradient(loss, logprobs), rtol=1e-5, atol=1e-9)


def test_advantages_are_those_given_or_grpos():
    _, _, advantages = tensors()
    given, _ = core_algos.get_adv_estimator_fn("given")(advantages, MASK.int(), config=None)
    assert torch.equal(given, advantages)
    rewards = torch.zeros(MASK.shape)
    for row, reward in enumerate((1.0, 0.0, 0.0, 0.0)):
        rewards[row, LENGTHS[row] - 1] = reward
    index = ["b", "a", "b", "a"]
    estimator = core_algos.get_adv_estimator_fn("grpo_population")
    found, _ = estimator(rewards, MASK.int(), index=index, config=None)
    own = common.group_advantages(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    wanted = torch.tensor([own[0, 0], own[1, 0], own[0, 1], own[1, 1]])
    assert torch.equal(found, wanted[:, None] * MASK)


def test_verl_loads_the_module_by_its_name():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tutorials")])
    env = {**os.environ, "PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "verl_adapter"}
    code = "from verl.trainer.ppo import core_algos as verl; verl.get_policy_loss_fn('blocks')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ---------------------------------------------------------------------------------- the two traps


def written(monkeypatch, outputs) -> list[dict]:
    """The fields that verl writes for the rows of an agent loop."""
    fields = []

    async def put(keys, fields, tags, partition_id):
        pass

    async def nothing(*args, **kwargs):
        pass

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_batch_put", put)
    monkeypatch.setattr(agent_loop_tq, "list_of_dict_to_tensordict", fields.extend)
    worker = SimpleNamespace(
        _compute_score=nothing, _compute_teacher_logprobs=nothing,
        _compute_multi_modal_inputs=lambda *_: {},
        _compute_position_ids=lambda ids, *_: torch.arange(ids.shape[1])[None],
    )  # fmt: skip
    process = agent_loop_tq.AgentLoopWorkerTQ.__ray_actor_class__._agent_loop_postprocess
    asyncio.run(process(worker, outputs, False, uid="u", session_id=0, global_steps=1))
    return fields


def test_rows_keep_credit_of_their_own(monkeypatch):
    samples = [common.Sample([1], [2, 3], [0.5, -0.25]), common.Sample([1, 2], [3], [0.75])]
    rows = [adapter.row_of(s, [1] * len(s.ids), float(i)) for i, s in enumerate(samples)]
    fields = written(monkeypatch, rows)
    assert [f["rm_scores"].tolist() for f in fields] == [[0.5, -0.25], [0.75]]
    assert [f["prompts"].tolist() for f in fields] == [[1], [1, 2]]


def test_the_traps_are_still_there(monkeypatch):
    """Where this fails, verl has mended them, and the way round can go."""
    extra = dict(extra_fields=dict(reward_extra_info={}), metrics={})
    rows = [
        AgentLoopOutput(
            prompt_ids=[1], response_ids=[2, 3], response_mask=[1, 1], reward_score=r, **extra
        )
        for r in (0.0, 1.0)
    ]
    found = [f["rm_scores"].tolist() for f in written(monkeypatch, rows)]
    assert found == [[0.0, 1.0], [0.0, 1.0]]


# -------------------------------------------------------------- rows, beside the scripts' samples


class Engine:
    """Answers that depend on the prefix and on how often it was asked: alike for verl's loop, which
    awaits `draw`, and for the scripts, whose common.sample and common.score are replaced."""

    end, choices = 9, (3, 4, 5, 9)

    def __init__(self):
        self.asked = {}

    def answer(self, prefix, room):
        count = self.asked[tuple(prefix)] = self.asked.get(tuple(prefix), -1) + 1
        rng, ids = random.Random(f"{prefix}-{count}"), []
        while len(ids) < room and ids[-1:] != [self.end]:
            ids.append(rng.choice(self.choices))
        return ids, ids[-1] == self.end

    def logprobs(self, ids):
        return [-random.Random(f"{t}-{id}").choice((0.01, 0.5, 1.0)) for t, id in enumerate(ids)]

    async def draw(self, prefix, room):
        ids, finished = self.answer(prefix, room)
        return ids, self.logprobs(ids), finished

    def sample(self, model, prefixes, n=1, *, max_new_tokens, **_):
        asked = [(p, room) for p, room in zip(prefixes, max_new_tokens) for _ in range(n)]
        return [common.Rollout(list(p), *self.answer(p, room)) for p, room in asked]

    def score(self, model, samples, *_):
        for s in samples:
            s.old_logprobs = self.logprobs(s.ids)
        return 0.0


def half_are_right(ids, finished, *_) -> float:
    return float(finished and zlib.crc32(str(ids).encode()) % 2)


@pytest.fixture
def engines(monkeypatch):
    """Two alike: one for the scripts, one for the agent loop."""
    engine, model = Engine(), SimpleNamespace(config=None)
    for name in ("sample", "score"):
        monkeypatch.setattr(common, name, getattr(engine, name))
    monkeypatch.setattr(common, "window", lambda _: 100)
    monkeypatch.setattr(common, "eos_ids", lambda *_: {Engine.end})
    monkeypatch.setattr(common, "response_reward", half_are_right)
    return model, Engine()


@pytest.mark.parametrize("problem", range(6))
def test_rows_of_a_chain_are_the_scripts_samples(engines, tokenizer, problem):
    model, engine = engines
    sizes = dict(prompts=1, group_size=1, max_new_tokens=12)
    cfg = spo.Config(**sizes, continuations=3, interval=2)
    prompt = [problem, 7]
    rollouts = common.complete(model, tokenizer, [(prompt, [], "")], n=1, max_new_tokens=12)
    credit = spo.assign_credit(model, tokenizer, rollouts, [""], cfg, None)
    trained = spo.trained_tokens(common.collate(credit.samples), cfg)
    [row] = asyncio.run(adapter.chain_rows(engine.draw, prompt, "", tokenizer, cfg))
    assert row.response_ids == credit.samples[0].ids
    assert row.credit == pytest.approx(credit.samples[0].advantages)
    assert row.response_mask == trained[0].int().tolist() and engine.asked
    assert row.response_logprobs == credit.samples[0].old_logprobs
    assert row.reward_score == rollouts[0].reward  # or verl asks for one


@pytest.mark.parametrize(
    "method, seed_rule", [("rrpo", "keep"), ("srpo", "keep"), ("srpo", "paper")]
)
@pytest.mark.parametrize("problem", range(6))
def test_rows_of_resets_are_the_scripts_samples(
    engines, tokenizer, monkeypatch, problem, method, seed_rule
):
    model, engine = engines
    localiser = "uncertain" if method == "srpo" else "auto"
    cfg = reset_po.Config(
        method=method, localiser=localiser, seed_rule=seed_rule, prompts=1, fresh=3, resets=3,
        max_new_tokens=12, delimiter=tokenizer.decode([4]),
    )  # fmt: skip
    monkeypatch.setattr(reset_po, "localise_random", lambda starts, _: len(starts))
    prompt = [problem, 7]
    own = model, tokenizer
    drawn, plans = reset_po.draw_answers(*own, [(prompt, [], "")], cfg, None)
    problems = [common.Problem("", "", "")]
    credit = reset_po.assign_credit(*own, problems, drawn, plans, cfg, None)
    rows = asyncio.run(adapter.reset_rows(engine.draw, prompt, "", tokenizer, {Engine.end}, cfg))
    assert [(r.prompt_ids, r.response_ids) for r in rows] == [
        (s.context, s.ids) for s in credit.samples
    ]
    for row, s in zip(rows, credit.samples):
        assert row.credit == pytest.approx(s.advantages)
        assert row.response_mask == [1] * len(s.ids)
        assert row.response_logprobs == engine.logprobs(s.ids)
        whole = [*s.context[len(prompt) :], *s.ids]
        assert row.reward_score == half_are_right(whole, whole[-1] == Engine.end)
