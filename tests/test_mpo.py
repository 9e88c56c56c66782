"""MPO's block ratio against plain loops, hand-worked cases, limiting cases and closed forms."""

import math
import random
from functools import partial

import pytest
import torch

import common
import mpo
from common import BadInput, Sample
from tiny_policy import END, HORIZON, PROMPT, all_answers, all_log_probs
from tiny_policy import assert_epochs_use_each_sample_once, assert_means_over_the_steps
from tiny_policy import constant_rate, exact_values, fake_rewards, flat_grad, log_prob
from tiny_policy import off_policy_samples, reward_of, rollouts_of, token_count, true_gradient

torch.set_num_threads(1)

WEIGHTS = ("joint", "uniform", 0.0, 0.2, 0.75)


def slow_weights(block_size: int, weights, size: int) -> list[float]:
    """beta over the first `size` tokens of a window of block_size."""
    if weights == "joint":
        return [1.0] * size
    if weights == "uniform":
        return [1 / size] * size
    beta = [1 - weights] + [weights / (block_size - 1) for _ in range(block_size - 1)]
    return [b / sum(beta[:size]) for b in beta[:size]]


def slow_members(mask: list[bool], t: int, block_size: int, layout: str) -> list[int]:
    """The tokens behind token t's ratio, from the words of the definition."""
    first = t
    while first > 0 and mask[first - 1]:
        first -= 1  # where t's run of trained tokens begins
    start = t if layout == "window" else first + (t - first) // block_size * block_size
    members = []
    for u in range(start, min(start + block_size, len(mask))):
        if not mask[u]:
            break
        members.append(u)
    return members


def slow_block_log_ratio(log_ratio, mask, block_size, layout, weights):
    rows = []
    for row, kept in zip(log_ratio, mask.tolist()):
        values = []
        for t in range(len(kept)):
            members = slow_members(kept, t, block_size, layout) if kept[t] else []
            beta = slow_weights(block_size, weights, len(members)) if members else []
            values.append(sum((b * row[u] for b, u in zip(beta, members)), row[t] * 0))
        rows.append(torch.stack(values))
    return torch.stack(rows)


def ragged_mask(lengths, width, offsets=None) -> torch.Tensor:
    offsets = offsets or [0] * len(lengths)
    return torch.tensor([[o <= t < o + n for t in range(width)] for n, o in zip(lengths, offsets)])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------- weights


def test_weights_by_hand():
    assert mpo.block_weights(4, "joint").tolist() == [1, 1, 1, 1]
    assert mpo.block_weights(4, "uniform").tolist() == [0.25] * 4
    assert mpo.block_weights(5, 0.2).tolist() == pytest.approx([0.8, 0.05, 0.05, 0.05, 0.05])
    assert mpo.block_weights(3, 0).tolist() == [1, 0, 0]
    assert mpo.block_weights(1, "uniform").tolist() == [1]
    assert mpo.block_weights(10**12, 0.5, 2).tolist() == pytest.approx([0.5, 0.5 / (10**12 - 1)])


@pytest.mark.parametrize("layout", ["window", "block"])
@pytest.mark.parametrize(
    "arguments",
    [(0, "uniform"), (-1, "joint"), (2, 1.0), (2, -0.1), (2, math.nan), (1, 1.5), (2, "future")],
)
def test_what_is_no_weighting_is_an_error(layout, arguments):
    size, weights = arguments
    with pytest.raises(ValueError):
        mpo.block_weights(size, weights)
    with pytest.raises(ValueError):
        mpo.block_log_ratio(torch.ones(1, 3), torch.ones(1, 3).bool(), size, layout, weights)


def test_an_unknown_layout_is_an_error():
    with pytest.raises(ValueError):
        mpo.block_log_ratio(torch.ones(1, 3), torch.ones(1, 3).bool(), 2, "blocks", "uniform")


# ---------------------------------------------------------------------------- the block log-ratio


def test_block_log_ratio_by_hand():
    l = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)

    def of(*arguments):
        return mpo.block_log_ratio(l, mask, *arguments)[0].tolist()

    assert of(2, "window", "joint") == [3, 6, 12, 24, 16]
    assert of(2, "window", "uniform") == [1.5, 3, 6, 12, 16]
    assert of(2, "block", "joint") == [3, 3, 12, 12, 16]
    assert of(2, "block", "uniform") == [1.5, 1.5, 6, 6, 16]
    assert of(3, "block", "joint") == [7, 7, 7, 24, 24]
    assert of(3, "window", 0.5) == pytest.approx([2, 4, 8, 8 / 0.75, 16])  # .5, .25, .25
    # The two tokens of a tail keep the proportions .5 : .25 of beta.
    assert of(3, "block", 0.5) == pytest.approx([2, 2, 2, 8 / 0.75, 8 / 0.75])
    mask = torch.tensor([[False, True, True, True, False]])
    assert of(2, "window", "joint") == [0, 6, 12, 8, 0]
    assert of(2, "block", "joint") == [0, 6, 6, 8, 0]  # blocks count from the first masked token


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("layout", ["window", "block"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7, 8, 9, 40])
def test_block_log_ratio_is_the_double_loop_in_value_and_gradient(block_size, layout, weights):
    if block_size == 1 and weights == 0.75:
        weights = "uniform"  # a lone token is all of its block: the same as any share
    lengths, offsets = [8, 1, 5, 7, 3, 0, 2], [0, 0, 0, 1, 2, 0, 6]
    mask = ragged_mask(lengths, 8, offsets)
    mask = torch.cat([mask, torch.tensor([[True, True, False, True, True, True, False, True]])])
    l = normal(8, 8).requires_grad_()
    fast = mpo.block_log_ratio(l, mask, block_size, layout, weights)
    slow = slow_block_log_ratio(l, mask, block_size, layout, weights)
    assert torch.allclose(fast, slow, atol=1e-12, rtol=0)
    probe = normal(8, 8, seed=1)
    (given,) = torch.autograd.grad((fast * probe).sum(), l)
    (wanted,) = torch.autograd.grad((slow * probe).sum(), l)
    assert torch.allclose(given, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("layout", ["window", "block"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_padding_and_context_are_never_mixed_in_whatever_stands_there(layout, weights):
    mask = ragged_mask([4, 6, 2], 8, [0, 1, 5])
    l = normal(3, 8)
    clean = mpo.block_log_ratio(l, mask, 3, layout, weights)
    for junk in (1e30, math.inf, math.nan):
        dirty = l.masked_fill(~mask, junk).requires_grad_()
        given = mpo.block_log_ratio(dirty, mask, 3, layout, weights)
        assert torch.equal(given, clean) and (given[~mask] == 0).all()
        (gradient,) = torch.autograd.grad(given.sum(), dirty)
        assert gradient.isfinite().all() and (gradient[~mask] == 0).all()
    assert (clean[mask] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_inputs_are_left_alone(dtype):
    mask = ragged_mask([4, 6], 6)
    l = normal(2, 6).to(dtype)
    before = l.clone(), mask.clone()
    for layout in ("window", "block"):
        given = mpo.block_log_ratio(l, mask, 3, layout, 0.2)
        assert given.dtype == dtype and given.shape == l.shape
        exact = mpo.block_log_ratio(l.double(), mask, 3, layout, 0.2)
        assert torch.allclose(given.double(), exact, atol=3 * torch.finfo(dtype).eps)
    assert torch.equal(l, before[0]) and torch.equal(mask, before[1])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("layout", ["window", "block"])
def test_k_of_one_and_a_future_share_of_none_are_the_token_ratio(layout, weights):
    mask, l = ragged_mask([3, 6, 1], 6), normal(3, 6)
    given = mpo.block_log_ratio(l, mask, 1, layout, weights)
    assert torch.allclose(given, l * mask, atol=1e-12)
    if layout == "window":
        given = mpo.block_log_ratio(l, mask, 4, layout, 0)
        assert torch.allclose(given, l * mask, atol=1e-12)


@pytest.mark.parametrize("block_size", [6, 7, 1000, 10**15])
def test_a_block_longer_than_the_answer_is_the_sequence_ratio(block_size):
    lengths = [3, 6, 1]
    mask, l = ragged_mask(lengths, 6), normal(3, 6)
    mean = mpo.block_log_ratio(l, mask, block_size, "block", "uniform")
    whole = mpo.block_log_ratio(l, mask, block_size, "block", "joint")
    for i, n in enumerate(lengths):
        assert torch.allclose(mean[i, :n], l[i, :n].mean().expand(n), atol=1e-12)  # GSPO's
        assert torch.allclose(whole[i, :n], l[i, :n].sum().expand(n), atol=1e-12)


def test_uniform_weights_are_the_share_of_k_minus_one_over_k():
    mask, l = ragged_mask([3, 9], 9), normal(2, 9)
    for layout in ("window", "block"):
        share = mpo.block_log_ratio(l, mask, 4, layout, 3 / 4)
        assert torch.allclose(share, mpo.block_log_ratio(l, mask, 4, layout, "uniform"))


def test_rows_do_not_see_each_other():
    mask, l = ragged_mask([3, 9, 5], 9), normal(3, 9)
    for layout in ("window", "block"):
        whole = mpo.block_log_ratio(l, mask, 4, layout, 0.3)
        one = [(l[i : i + 1], mask[i : i + 1]) for i in range(3)]
        rows = [mpo.block_log_ratio(*row, 4, layout, 0.3) for row in one]
        assert torch.allclose(whole, torch.cat(rows), atol=1e-12)


@pytest.mark.parametrize("layout", ["window", "block"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_k_of_one_is_grpos_loss_and_gradient(layout, weights):
    """PPO's clipped objective a token at a time, its mean over tokens, group advantages."""
    mask = ragged_mask([3, 6, 1, 5], 6)
    a = torch.tensor([1.5, -0.5, 0.0, -1.0], dtype=torch.float64)[:, None] * mask
    l = (0.3 * normal(4, 6)).requires_grad_()
    batch = common.Batch(None, None, None, mask, a, None)
    cfg = mpo.Config(block_size=1, layout=layout, weights=weights, scale_eps=True)
    loss, _, clipped = mpo.mpo_loss(l, batch, 15, cfg)
    total, cuts = 0.0, 0
    for i, t in mask.nonzero().tolist():
        ratio, advantage = l[i, t].exp(), a[i, t]
        terms = ratio * advantage, ratio.clamp(0.8, 1.2) * advantage
        total, cuts = total + min(terms), cuts + bool(terms[1] < terms[0])
    assert loss.item() == pytest.approx(-total.item() / 15, abs=1e-9)
    (given,) = torch.autograd.grad(loss, l)
    (wanted,) = torch.autograd.grad(-total / 15, l)
    assert torch.allclose(given, wanted, atol=1e-9) and clipped.sum().item() == cuts > 0


# ----------------------------------------------- on-policy: what the layouts do to the gradient


def token_gradient(block_size, layout, weights, lengths, advantages):
    """(B, T) gradient of the objective in each token's log-prob at ratio 1, for advantage 1."""
    mask = ragged_mask(lengths, max(lengths))
    a = torch.tensor(advantages, dtype=torch.float64)[:, None] * mask
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    batch = common.Batch(None, None, None, mask, a, zeros)
    cfg = mpo.Config(block_size=block_size, layout=layout, weights=weights)
    l = zeros.clone().requires_grad_()
    loss, _, _ = mpo.mpo_loss(l, batch, 1, cfg)
    (gradient,) = torch.autograd.grad(-loss, l)
    return gradient / torch.tensor(advantages, dtype=torch.float64)[:, None]  # per advantage


LENGTHS, ADVANTAGES = [9, 6, 2, 11], [1.0, -0.5, 2.0, -1.5]


def test_on_policy_blocks_of_uniform_weight_give_grpos_gradient():
    mask = ragged_mask(LENGTHS, 11)
    for k in (1, 2, 3, 4, 50):
        given = token_gradient(k, "block", "uniform", LENGTHS, ADVANTAGES)
        assert torch.allclose(given, mask.double(), atol=1e-12)


def test_on_policy_joint_blocks_give_each_tokens_gradient_once_for_every_token_of_its_block():
    k = 3
    given = token_gradient(k, "block", "joint", LENGTHS, ADVANTAGES)
    for n, row in zip(LENGTHS, given):
        for t in range(n):
            assert row[t].item() == pytest.approx(min(k, n - t // k * k))


def test_on_policy_blocks_with_a_future_share_weigh_position_n_by_k_beta_n():
    k, p = 3, 0.2
    given = token_gradient(k, "block", p, LENGTHS, ADVANTAGES)
    for n, row in zip(LENGTHS, given):
        for t in range(n):
            size = min(k, n - t // k * k)
            beta = slow_weights(k, p, size)
            assert row[t].item() == pytest.approx(size * beta[t % k])
    assert not torch.allclose(given, ragged_mask(LENGTHS, 11).double())


@pytest.mark.parametrize("weights", ["uniform", 0.2, 0.4])
def test_on_policy_windows_give_grpos_gradient_inside_less_at_the_start_more_at_the_end(weights):
    k = 4
    given = token_gradient(k, "window", weights, LENGTHS, ADVANTAGES)
    beta = slow_weights(k, weights, k)
    for n, row in zip(LENGTHS, given):
        if n >= 2 * k:
            inside = row[k - 1 : n - k + 1]
            assert len(inside) and torch.allclose(inside, torch.ones_like(inside))
            for t in range(k - 1):  # windows that would begin before the answer are missing
                assert row[t].item() == pytest.approx(sum(beta[: t + 1])) and row[t] < 1
        assert row[n - 1] > 1 or n == 1
        assert row.sum().item() == pytest.approx(n)  # every anchor's weights sum to 1


def test_on_policy_joint_windows_are_k_times_that():
    k = 4
    given = token_gradient(k, "window", "joint", LENGTHS, ADVANTAGES)
    for n, row in zip(LENGTHS, given):
        for t in range(n):
            assert row[t].item() == min(k, t + 1)  # as many windows hold token t


@pytest.mark.parametrize("block_size", [1, 2, 3, 9])
def test_blocks_of_uniform_weight_give_the_true_policy_gradient(model, block_size):
    """Over all answers of an enumerated policy, each weighted by its probability."""
    samples = []
    for answer, row in zip(all_answers(), all_log_probs(model).detach()):
        logprobs = row[: len(answer)]
        advantage = reward_of(answer) * logprobs.sum().exp().item()
        samples.append(Sample(PROMPT, list(answer), [advantage] * len(answer), logprobs.tolist()))
    model.zero_grad()
    batch = common.collate(samples)
    log_ratio = common.token_logprobs(model, batch) - batch.old_logprobs
    cfg = mpo.Config(block_size=block_size, layout="block", weights="uniform")
    mpo.mpo_loss(log_ratio, batch, 1, cfg)[0].backward()
    given = -flat_grad(model)
    assert torch.allclose(given, true_gradient(model), atol=2e-6)
    model.zero_grad()
    log_ratio = common.token_logprobs(model, batch) - batch.old_logprobs
    cfg = mpo.Config(block_size=max(2, block_size), layout="block", weights="joint")
    mpo.mpo_loss(log_ratio, batch, 1, cfg)[0].backward()
    assert not torch.allclose(-flat_grad(model), given, atol=1e-3)  # and joint does not


# ------------------------------------------------------------------------------------- the clip


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def share_outside(std: float, eps: float) -> float:
    """Share of exp(N(0, std^2)) outside 1 +- eps."""
    return 1 - normal_cdf(math.log(1 + eps) / std) + normal_cdf(math.log(1 - eps) / std)


SHARES = {  # token log-ratios of std 0.1, eps 0.2: percent outside the clip range
    ("joint", 1): 4.7, ("joint", 2): 15.6, ("joint", 4): 31.3, ("joint", 5): 36.7,
    ("joint", 8): 47.5, ("uniform", 2): 0.6, ("uniform", 4): 0.0, ("uniform", 5): 0.0,
    ("uniform", 8): 0.0,
}  # fmt: skip


@pytest.mark.parametrize("layout", ["window", "block"])
@pytest.mark.parametrize("weights, block_size", SHARES)
def test_the_clip_acts_on_the_share_that_the_closed_form_says(layout, weights, block_size):
    std = 0.1 * math.sqrt(block_size) ** (1 if weights == "joint" else -1)
    exact = share_outside(std, 0.2)
    assert 100 * exact == pytest.approx(SHARES[weights, block_size], abs=0.05)
    rows, width = 2000, 40  # 80,000 anchors, of which at least 10,000 are independent
    l, mask = 0.1 * normal(rows, width), torch.ones(rows, width, dtype=torch.bool)
    # Advantages of both signs: min() cuts half of what is outside.
    a = torch.where(normal(rows, 1, seed=1) > 0, 1.0, -1.0).expand(rows, width)
    batch = common.Batch(None, None, None, mask, a, None)
    cfg = mpo.Config(block_size=block_size, layout=layout, weights=weights)
    _, log_blocks, clipped = mpo.mpo_loss(l, batch, mask.sum().item(), cfg)
    inner = log_blocks[:, : width - block_size + 1] if layout == "window" else log_blocks
    outside = ((inner.exp() - 1).abs() > 0.2).double().mean().item()
    assert outside == pytest.approx(exact, abs=0.015)
    cut = clipped[:, : inner.shape[1]].double().mean().item()
    assert cut == pytest.approx(exact / 2, abs=0.015)


def test_the_rescaled_eps_is_eps_times_the_norm_of_the_weights():
    mask = ragged_mask([6, 2], 6)
    for weights in WEIGHTS:
        for layout in ("window", "block"):
            cfg = mpo.Config(block_size=4, layout=layout, weights=weights, clip_eps=0.3)
            given = mpo.scaled_eps(mask, cfg)
            for i, n in enumerate((6, 2)):
                for t in range(n):
                    size = len(slow_members(mask[i].tolist(), t, 4, layout))
                    norm = math.hypot(*slow_weights(4, weights, size))
                    assert given[i, t].item() == pytest.approx(0.3 * norm)
    cfg = mpo.Config(block_size=4, weights="joint")
    assert mpo.scaled_eps(mask, cfg)[0, 0].item() == pytest.approx(0.4)  # sqrt(4) eps
    cfg = mpo.Config(block_size=4, weights="uniform")
    assert mpo.scaled_eps(mask, cfg)[0, 0].item() == pytest.approx(0.1)  # eps / sqrt(4)


@pytest.mark.parametrize("scale_eps", [False, True])
def test_the_clip_range_is_the_one_asked_for(scale_eps):
    """A block of two tokens with log-ratio 0.05 each, uniform: R = 1.051."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    batch = common.Batch(None, None, None, mask, torch.ones(1, 2), None)
    l = torch.full((1, 2), 0.05, requires_grad=True)
    cfg = mpo.Config(
        block_size=2, layout="block", weights="uniform", clip_eps=0.06, scale_eps=scale_eps
    )
    loss, log_blocks, clipped = mpo.mpo_loss(l, batch, 2, cfg)
    assert log_blocks[0].tolist() == pytest.approx([0.05, 0.05])
    assert clipped.tolist() == [[scale_eps] * 2]  # 1 + 0.06 / sqrt(2) = 1.042 < 1.051 < 1.06
    ratio = 1 + 0.06 / math.sqrt(2) if scale_eps else math.exp(0.05)
    assert loss.item() == pytest.approx(-ratio)
    (gradient,) = torch.autograd.grad(loss, l)
    assert gradient.sum().item() == pytest.approx(0 if scale_eps else -math.exp(0.05))


@pytest.mark.parametrize("weights", ["uniform", 0.2, "joint"])
@pytest.mark.parametrize("layout", ["window", "block"])
def test_rounding_is_no_cut(layout, weights):
    """Ratios far inside the range, in float32, with advantages whose products round."""
    mask, l = ragged_mask([30] * 40, 30), 0.001 * normal(40, 30, dtype=torch.float32)
    a = torch.where(normal(40, 1, seed=1) > 0, 3**0.5, -(3**-0.5)).float().expand(40, 30)
    batch = common.Batch(None, None, None, mask, a, None)
    cfg = mpo.Config(block_size=5, layout=layout, weights=weights, scale_eps=True)
    loss, _, clipped = mpo.mpo_loss(l, batch, 1200, cfg)
    assert loss.dtype == torch.float32 and not clipped.any()


# --------------------------------------------------------------------------------------- credit


def test_credit_is_grpos_advantage_on_every_token(model):
    rollouts = rollouts_of(random.Random(2).sample(all_answers(), 8))
    for r, reward in zip(rollouts, (1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)):
        r.reward = reward
    for scale, std in ((True, math.sqrt(3 / 16)), (False, 1.0)):
        cfg = mpo.Config(
            prompts=2, group_size=4, batch_size=8, scale_advantages=scale, temperature=0.7
        )
        credit = mpo.assign_credit(model, rollouts, cfg)
        wanted = [0.75 / std, *[-0.25 / std] * 3, *[0.0] * 4]
        entropies = []
        for r, s, advantage in zip(rollouts, credit.samples, wanted):
            assert s.advantages == pytest.approx([advantage] * len(r.ids), abs=1e-6)
            assert (s.context, s.ids) == (PROMPT, r.ids)
            assert s.old_logprobs == pytest.approx(log_prob(model, r.ids, 0.7).tolist(), abs=1e-5)
            logits = model(torch.tensor([[*PROMPT, *r.ids]])).logits[0, 1:-1] / 0.7
            entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
        assert credit.entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
        assert not any(any(s.advantages) for s in credit.samples[4:])  # exactly: all right


# ------------------------------------------------------------------------------- loss and update


random_samples = partial(
    off_policy_samples, lambda rng, answer: [rng.choice((-1.0, -0.25, 0.5))] * len(answer)
)


def slow_terms(model, s, cfg):
    """Of every token of a sample: its term of the objective, its block's ratio, and whether cut."""
    log_ratio = log_prob(model, s.ids, cfg.temperature) - torch.tensor(s.old_logprobs)
    for t, advantage in enumerate(s.advantages):
        members = slow_members([True] * len(s.ids), t, cfg.block_size, cfg.layout)
        beta = slow_weights(cfg.block_size, cfg.weights, len(members))
        ratio = sum(b * log_ratio[u] for b, u in zip(beta, members)).exp()
        eps = cfg.clip_eps * (math.hypot(*beta) if cfg.scale_eps else 1)
        clipped = min(max(ratio.item(), 1 - eps), 1 + eps)
        cut = (ratio * advantage).item() > clipped * advantage
        yield (clipped if cut else ratio) * advantage, ratio.item(), cut


def slow_loss(model, samples, cfg):
    total = sum(term for s in samples for term, _, _ in slow_terms(model, s, cfg))
    return -total / sum(len(s.ids) for s in samples)


CASES = [
    dict(block_size=1),
    dict(block_size=2, layout="window", weights="uniform", clip_eps=0.05),
    dict(block_size=3, layout="block", weights="joint", scale_eps=True),
    dict(block_size=3, layout="window", weights=0.2, temperature=0.7),
    dict(block_size=9, layout="block", weights="uniform", scale_eps=True),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [6, 20, 10_000])
def test_an_update_follows_the_slow_loss_at_any_micro_batch(model, monkeypatch, case, width):
    cfg = mpo.Config(prompts=5, group_size=2, batch_size=10, **case)
    cfg.max_grad_norm = 1e9
    samples = random_samples(model, temperature=cfg.temperature)
    model.zero_grad()
    loss = slow_loss(model, samples, cfg)
    loss.backward()
    expected = [p - p.grad for p in model.parameters()]
    terms = {id(s): list(slow_terms(model, s, cfg)) for s in samples if any(s.advantages)}
    model.zero_grad()
    true_micro_batches = common.micro_batches
    monkeypatch.setattr(common, "micro_batches", lambda rows, _: true_micro_batches(rows, width))
    optimizer, schedule = constant_rate(model, 1.0)
    last = {}
    metrics = mpo.update(model, optimizer, schedule, samples, cfg, "seed", last)
    for p, q in zip(model.parameters(), expected):
        assert torch.allclose(p, q, atol=1e-5)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert set(last) == set(terms)
    for key, rows in terms.items():
        ratios, cuts = last[key]
        assert ratios == pytest.approx([ratio for _, ratio, _ in rows], abs=1e-4)
        assert cuts == [cut for _, _, cut in rows]


@pytest.mark.parametrize("case", CASES)
def test_metrics_set_the_token_ratio_beside_the_block_ratio(model, case):
    cfg = mpo.Config(prompts=5, group_size=2, batch_size=10, **case)
    samples = random_samples(model, temperature=cfg.temperature)
    kl, token_cut, block_cut, token_ratios, block_ratios = [], [], [], [], []
    for s in samples:
        if any(s.advantages):
            news = log_prob(model, s.ids, cfg.temperature).tolist()
            for new, old, a in zip(news, s.old_logprobs, s.advantages):
                ratio = math.exp(new - old)
                kl.append(ratio - 1 - (new - old))
                over = ratio - 1 if a > 0 else 1 - ratio
                token_cut.append(a != 0 and over > cfg.clip_eps)
                token_ratios.append(ratio)
            terms = list(slow_terms(model, s, cfg))
            block_ratios += [ratio for _, ratio, _ in terms]
            block_cut += [cut for _, _, cut in terms]

    def variance(x):
        return torch.tensor(x, dtype=torch.float64).var(correction=0).item()

    optimizer, schedule = constant_rate(model, 1e-9)
    metrics = mpo.update(model, optimizer, schedule, samples, cfg, "seed")
    assert 0 < sum(token_cut) < len(token_cut) and 0 < sum(block_cut) < len(block_cut)
    assert metrics["kl"] == pytest.approx(sum(kl) / len(kl), abs=1e-5)
    assert metrics["token_clip"] == pytest.approx(sum(token_cut) / len(token_cut), abs=1e-9)
    assert metrics["block_clip"] == pytest.approx(sum(block_cut) / len(block_cut), abs=1e-9)
    assert metrics["token_ratio_var"] == pytest.approx(variance(token_ratios), rel=1e-4)
    assert metrics["block_ratio_var"] == pytest.approx(variance(block_ratios), rel=1e-4)
    if cfg.block_size == 1:
        assert metrics["block_ratio_var"] == metrics["token_ratio_var"]
        assert metrics["block_clip"] == metrics["token_clip"]


def test_each_epoch_uses_each_sample_once_in_minibatches_of_its_own_order(model):
    samples = random_samples(model, 8)[:8]
    cfg = mpo.Config(prompts=4, group_size=2, batch_size=4, epochs=2)
    assert_epochs_use_each_sample_once(mpo, "mpo_loss", token_count, model, samples, cfg)


def test_loss_and_norm_are_means_over_the_optimiser_steps(model):
    samples = random_samples(model)[:8]
    optimizer, schedule = constant_rate(model, 1e-9)
    cfg = mpo.Config(prompts=4, group_size=2, batch_size=4)
    metrics = mpo.update(model, optimizer, schedule, samples, cfg, "seed")
    assert_means_over_the_steps(metrics, partial(slow_loss, cfg=cfg), model, samples)


def test_the_variance_of_far_ratios_is_that_of_the_ratios_in_the_loss(model):
    samples = random_samples(model)
    for s in samples:
        s.old_logprobs = [p - 3.0 for p in s.old_logprobs]
    samples[0].old_logprobs[0] -= 100.0  # e^100 is cut to e^10
    optimizer, schedule = constant_rate(model, 1e-9)
    cfg = mpo.Config(prompts=5, group_size=2, batch_size=10, block_size=1)
    metrics = mpo.update(model, optimizer, schedule, samples, cfg, "seed")
    ratios = []
    for s in samples:
        if any(s.advantages):
            log_ratios = log_prob(model, s.ids) - torch.tensor(s.old_logprobs)
            ratios += [math.exp(min(x, 10)) for x in log_ratios.tolist()]
    variance = torch.tensor(ratios, dtype=torch.float64).var(correction=0).item()
    assert metrics["token_ratio_var"] == pytest.approx(variance, rel=1e-3)


def test_only_from_the_second_update_on_do_ratios_leave_one(model):
    samples = random_samples(model)
    for epochs, moved in ((1, False), (2, True)):
        common.score(model, samples, 1.0)
        optimizer, schedule = constant_rate(model, 0.1)
        cfg = mpo.Config(prompts=5, group_size=2, batch_size=10, epochs=epochs)
        last = {}
        metrics = mpo.update(model, optimizer, schedule, samples, cfg, "seed", last)
        assert (metrics["token_ratio_var"] > 1e-6) == moved
        assert (metrics["block_ratio_var"] > 1e-7) == moved
        assert any(abs(r - 1) > 1e-3 for ratios, _ in last.values() for r in ratios) == moved


def test_a_batch_without_signal_changes_nothing(model):
    samples = [Sample(PROMPT, [0, 1], [0.0, 0.0], [-1.0, -1.0])] * 2
    before = [p.clone() for p in model.parameters()]
    optimizer, schedule = constant_rate(model, 0.1, torch.optim.AdamW)
    cfg = mpo.Config(prompts=1, group_size=2, batch_size=2)
    last = {}
    metrics = mpo.update(model, optimizer, schedule, samples, cfg, "seed", last)
    assert not any(metrics.values()) and not last
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("case", CASES)
def test_credit_and_update_together_raise_the_exact_expected_reward(model, monkeypatch, case):
    fake_rewards(monkeypatch)
    case = {**case, "temperature": 1.0}
    cfg = mpo.Config(prompts=8, group_size=8, batch_size=32, lr=3e-3, **case)
    optimizer, schedule = constant_rate(model, cfg.lr, torch.optim.AdamW)
    generator = torch.Generator().manual_seed(0)
    before = exact_values(model)[()]
    for step in range(15):
        states = [(PROMPT, [], "")] * 8
        rollouts = common.complete(model, None, states, 8, HORIZON, generator=generator)
        credit = mpo.assign_credit(model, rollouts, cfg)
        mpo.update(model, optimizer, schedule, credit.samples, cfg, str(step))
    assert before < 0.6 and exact_values(model)[()] > 0.85


# -------------------------------------------------------------------------------------- display


def shown(cfg, ratios, clipped, reward=0.0):
    tokenizer = common.build_tokenizer()
    problem = common.Problem("31+4", "31+4=35\n#### 35", "35", checkable=True)
    ids = [*common.encode(tokenizer, "31+4=36"), tokenizer.eos_token_id]
    right = [*common.encode(tokenizer, "#### 35"), tokenizer.eos_token_id]
    rollouts = [common.Rollout([1], right, True, 1.0), common.Rollout([1], ids, True, reward)]
    samples = [Sample([1], right, [1.0] * 8), Sample([1], ids, [-0.5] * 8)]
    last = {id(samples[0]): ([2.0] * 8, [True] * 8), id(samples[1]): (ratios, clipped)}
    credit = mpo.Credit(samples, 0.0)
    shown = mpo.show_answer([problem] * 2, rollouts, credit, last, cfg, tokenizer, False, 100)
    return shown.split("\n")


def test_the_display_marks_blocks_their_ratios_and_what_was_clipped():
    cfg = mpo.Config(block_size=3, layout="block")
    lines = shown(cfg, [0.9] * 3 + [0.754] * 3 + [1.0] * 2, [False] * 3 + [True] * 3 + [False] * 2)
    assert lines[0] == "31+4   answer 35, reward 0, advantage -0.50"
    text, note = lines[1].split("<-")
    assert text.split() == ["|31+|4=3|6<end>", "0.90", "0.75*", "1.00"]
    assert note == " first wrong step; right: 31+4=35"
    assert "| opens a block" in lines[2] and "*" in lines[2]


def test_the_display_of_windows_marks_the_clipped_ones():
    cfg = mpo.Config(block_size=3, layout="window")
    lines = shown(cfg, [0.9, 0.7, 0.6, *[1.0] * 5], [False, True, True, *[False] * 5])
    text, _ = lines[1].split("<-")
    assert text.split() == ["3|1|+4=36<end>", "0.70*", "0.60*"]
    assert "of 3 tokens" in lines[2]


@pytest.mark.parametrize(
    "cut, failed, i", [("0010", "0101", 2), ("0111", "0010", 2), ("0000", "0101", 1)]
)
def test_the_display_prefers_a_cut_answer_and_then_a_failure(tokenizer, cut, failed, i):
    problems = [common.Problem(f"{k}+1", "", str(k)) for k in range(4)]
    samples = [Sample([1], [2, 3], [1.0, 1.0]) for _ in range(4)]
    rollouts = [common.Rollout([1], [2, 3], True, float(x == "0")) for x in failed]
    last = {id(s): ([1.0, 1.0], [False, x == "1"]) for s, x in zip(samples, cut)}
    credit = mpo.Credit(samples, 0.0)
    shown_of = (problems, rollouts, credit, last, mpo.Config(), tokenizer, False, 100)
    assert mpo.show_answer(*shown_of).startswith(f"{i}+1   answer {i}")


def test_what_was_clipped_has_no_colour():
    cfg = mpo.Config(block_size=3, layout="block")
    clipped = [False] * 3 + [True] * 3 + [False] * 2
    tokenizer = common.build_tokenizer()
    problem = common.Problem("31+4", "31+4=35\n#### 35", "35", checkable=True)
    ids = common.encode(tokenizer, "31+4=361")
    rollouts, samples = [common.Rollout([1], ids, True, 0.0)], [Sample([1], ids, [-0.5] * 8)]
    last = {id(samples[0]): ([1.0] * 8, clipped)}
    credit = mpo.Credit(samples, 0.0)
    text = mpo.show_answer([problem], rollouts, credit, last, cfg, tokenizer, True, 100)
    assert text.count("\033[48") == 5 and common.paint("1", -0.5) in text
    assert "|4=3" in text


def test_a_step_without_signal_says_so(tokenizer):
    credit = mpo.Credit([Sample([1], [2, 3], [0.0, 0.0])], 0.0)
    rollouts = [common.Rollout([1], [2, 3], False, 0.0)]
    text = mpo.show_answer([None], rollouts, credit, {}, mpo.Config(), tokenizer, False, 100)
    assert text == "no answer carried a signal"


def test_without_a_failure_a_trained_success_is_shown(tokenizer):
    problem = common.Problem("31+4", "31+4=35\n#### 35", "35")
    ids = common.encode(tokenizer, "31")
    samples = [Sample([1], ids, [0.0, 0.0]), Sample([1], ids, [0.5, 0.5])]
    rollouts = [common.Rollout([1], ids, True, 0.0), common.Rollout([1], ids, True, 1.0)]
    last = {id(samples[1]): ([1.25, 1.25], [True, True])}
    cfg, credit = mpo.Config(layout="block", block_size=2), mpo.Credit(samples, 0.0)
    text = mpo.show_answer([problem] * 2, rollouts, credit, last, cfg, tokenizer, False, 100)
    assert "|31  1.25*" in text and "reward 1, advantage +0.50" in text


# --------------------------------------------------------------------------------------- config


def test_weights_from_the_command_line_become_numbers():
    assert mpo.Config(weights="0.2").weights == 0.2
    assert mpo.Config(weights="joint").weights == "joint"
    assert mpo.Config(block_size=10**12).block_size == 10**12  # longer than memory, and no harm


def test_the_headline_names_the_settings_of_the_run():
    cfg = mpo.Config(steps=3, prompts=8, group_size=4, batch_size=32, layout="block", block_size=2)
    first, second = mpo.headline(cfg, []).split("\n")
    assert first == "MPO: 3 rounds of 8 problems x 4 answers, K = 2, layout block, weights 0.2"
    assert second.startswith("updates per round: 1; all ratios are 1")


def test_a_config_that_cannot_work_is_refused():
    for bad in (
        dict(block_size=0), dict(weights="1"), dict(weights="-0.1"), dict(weights="nan"),
        dict(weights="half"), dict(group_size=1, batch_size=32), dict(batch_size=48),
        dict(clip_eps=0.0),
        dict(temperature=math.nan), dict(lr=math.inf), dict(warmup_updates=-1), dict(epochs=0),
    ):  # fmt: skip
        with pytest.raises(BadInput):
            mpo.Config(**bad)
    assert END == 3
