"""The microscope against loops, synthetic vectors with a known truth, and the enumerated policy."""

import math
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tutorials"))

import common  # noqa: E402
import curves  # noqa: E402
import microscope  # noqa: E402
import reset_po  # noqa: E402
import spo  # noqa: E402
from tiny_policy import HORIZON, PROMPT, exact_values, fake_rewards, flat_grad  # noqa: E402
from tiny_policy import reward_of, rollouts_of, true_gradient  # noqa: E402

SIZES = microscope.Sizes(batches=3, truth=8, problems=4, nested=3, signs=40, exact=400)


@pytest.fixture
def desk(model, tokenizer, monkeypatch, tmp_path):
    """The policy over four tokens, whatever the problem, in a folder of its own."""
    fake_rewards(monkeypatch)
    monkeypatch.setattr(common, "initial_state", lambda *_: (PROMPT, [], "0"))
    monkeypatch.chdir(tmp_path)
    problems = [common.Problem(str(i), "", "0") for i in range(64)]
    return microscope.Desk("enumerated", model, tokenizer, problems, HORIZON, {})


def rng(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


# ------------------------------------------------------------------------------ maths, by synthesis


def known_vectors(count=200, size=2000):
    """gradients (B, D), the truth (D,), two noisy halves of it (2, D)."""
    t = noise(size, seed=1)
    halves = t + 2 * noise(2, size, seed=2)
    return 0.5 * t + 1.5 * noise(count, size, seed=3), t, halves


def test_cosine_is_corrected_for_the_error_of_the_truth():
    gradients, t, halves = known_vectors()
    right = torch.nn.functional.cosine_similarity(gradients, t[None]).mean().item()
    found = microscope.cosines(gradients, halves).mean().item()
    naive = torch.nn.functional.cosine_similarity(gradients, halves.mean(0)[None]).mean().item()
    assert abs(found - right) < 0.03 and naive < right - 0.1


def test_cosine_is_unbiased_over_many_truths():
    """Of one error the product of halves is off by chance, over many it is not."""
    gradients, t, _ = known_vectors(size=400)
    right = torch.nn.functional.cosine_similarity(gradients, t[None]).mean().item()
    halves = [t + noise(2, 400, seed=s) for s in range(10, 210)]
    found = [microscope.cosines(gradients, pair).mean().item() for pair in halves]
    assert sum(found) / len(found) == pytest.approx(right, abs=0.01)


def test_cosine_of_no_gradient_is_0_and_without_a_truth_unknown():
    halves = noise(2, 50) + 3
    assert microscope.cosines(torch.zeros(1, 50), halves).tolist() == [0.0]
    against = torch.stack([halves[0], -halves[0]])
    assert microscope.cosines(noise(1, 50), against).isnan().all()


def test_pair_mean_in_loops():
    x, w = noise(5, 7), torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    weights = sum((w[i] * w[j]).item() for i, j in pairs)
    slow = sum((w[i] * w[j] * (x[i] @ x[j])).item() for i, j in pairs) / weights
    assert microscope.pair_mean(x @ x.T, w).item() == pytest.approx(slow, rel=1e-5)


def test_bias_is_the_cosine_of_the_mean_without_its_noise():
    """Batches around m, which stands at a known angle to t."""
    t, across = noise(2000, seed=1), noise(2000, seed=4)
    m = t + across
    right = torch.nn.functional.cosine_similarity(m, t, dim=0).item()
    gradients = m + 12 * noise(60, 2000, seed=5)
    halves = t + noise(2, 2000, seed=6)
    found, error = microscope.bias_cosine(gradients, torch.ones(60), halves)
    naive = torch.nn.functional.cosine_similarity(gradients.mean(0), t, dim=0).item()
    assert abs(found - right) < 3 * error < 0.25 and naive < right - 0.2


def test_bias_weighs_batches_by_their_normalisers():
    """As one batch made of all: two batches of 1 and 3 tokens."""
    t, sums = torch.tensor([1.0, 0.0]), torch.tensor([[4.0, 1.0], [3.0, 9.0], [5.0, 2.0]])
    z = torch.tensor([1.0, 3.0, 2.0])
    found, _ = microscope.bias_cosine(sums / z[:, None], z, torch.stack([t, t]))
    squared = sum((sums[i] @ sums[j]).item() for i in range(3) for j in range(3) if i != j)
    squared /= 36 - 14  # (sum z)^2 - sum z^2
    assert found == pytest.approx(12 / 6 / squared**0.5, rel=1e-5)


def test_jackknife_of_a_mean_is_its_standard_error():
    x = noise(30).tolist()
    left_out = [(sum(x) - one) / 29 for one in x]
    assert microscope.jackknife(left_out) == pytest.approx(common.mean_stderr(x)[1], rel=1e-4)


def test_signal_to_noise_is_that_of_the_parts():
    assert microscope.signal_to_noise(0.6) == pytest.approx(0.36 / 0.64)  # 3 along, 4 across
    assert microscope.signal_to_noise(1.1) == math.inf  # an estimate can be above 1


def test_components_of_nested_data_are_recovered():
    """Per dimension: mean 0.5, and variances 1, 4 and 9."""
    d = 400
    h = 0.5 + noise(80, 1, 1, d, seed=1) + 2 * noise(80, 3, 1, d, seed=2)
    h = h + 3 * noise(80, 3, 2, d, seed=3)
    found = microscope.components(h) / d
    assert torch.allclose(found, torch.tensor([0.25, 1.0, 4.0, 9.0]), atol=0.15)


def test_components_in_loops():
    h = noise(3, 2, 2, 5)
    cells = [(i, s, k) for i in range(3) for s in range(2) for k in range(2)]

    def mean(related) -> float:
        pairs = [(a, b) for a in cells for b in cells if related(a, b)]
        return sum((h[a] @ h[b]).item() for a, b in pairs) / len(pairs)

    own = mean(lambda a, b: a == b)
    draws = mean(lambda a, b: a[:2] == b[:2] and a != b)
    sets = mean(lambda a, b: a[0] == b[0] and a[1] != b[1])
    problems = mean(lambda a, b: a[0] != b[0])
    slow = [problems, sets - problems, draws - sets, own - draws]
    assert microscope.components(h).tolist() == pytest.approx(slow, abs=1e-5)
    single = microscope.components(h[:, :, :1]).tolist()
    assert single[3] == 0 and sum(single) == pytest.approx((h[:, :, 0] ** 2).sum(-1).mean().item())


# ------------------------------------------------------------------- gradients are the scripts' own


def update_gradient(desk, samples, cfg):
    """What the script's update hands to its optimiser."""
    taken = []

    def spy(model, *_):
        taken.append(flat_grad(model))
        return 0.0

    script = reset_po if isinstance(cfg, reset_po.Config) else spo
    optimizer = torch.optim.SGD(desk.model.parameters(), lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "optimizer_step", spy)
        desk.model.zero_grad()
        script.update(desk.model, optimizer, None, samples, cfg, "shuffle")
    [one] = taken
    desk.model.zero_grad()
    return one


ALL = microscope.FIRST | microscope.TRAINED | microscope.SECOND


@pytest.mark.parametrize("name", [name for name in ALL if "oracle" not in name])
def test_a_gradient_is_that_of_the_scripts_update(desk, monkeypatch, name):
    """And its tokens are all that were sampled for it."""
    sampled = []

    def sample(*args, right=common.sample, **options):
        sampled.extend(found := right(*args, **options))
        return found

    monkeypatch.setattr(common, "sample", sample)
    cfg = microscope.config_of(ALL[name], desk)
    cfg.segment_tokens = 1  # a tree's nodes on the enumerated policy
    drawn = microscope.draw(desk, desk.problems[: cfg.prompts], cfg, 0)
    g, z = microscope.gradient(desk.model, drawn.samples, cfg)
    right = -update_gradient(desk, drawn.samples, cfg)
    assert right.norm() > 0 and (g - right).norm() < 1e-4 * right.norm()
    assert drawn.tokens == sum(len(r.ids) for r in sampled) > 0 and z > 0


def test_methods_that_draw_alike_share_answers_but_not_values(desk):
    """And batches share nothing."""

    def drawn(name, seed):
        cfg = microscope.config_of(ALL[name], desk)
        return microscope.draw(desk, desk.problems[: cfg.prompts], cfg, seed).samples

    def texts(samples):
        return [s.ids for s in samples]

    one, four = drawn("chain 32x8, N = 1", 0), drawn("chain 32x8, N = 4", 0)
    assert texts(one) == texts(four) == texts(drawn("GRPO 32x8", 0)) != texts(drawn("GRPO 32x8", 1))
    assert [s.advantages for s in one] != [s.advantages for s in four]
    assert len(drawn("GRPO 8x8", 0)) == 64 and len(drawn("chain 64x2, N = 2", 0)) == 128
    assert len(desk.kept) == 4


def test_batches_share_no_draws(desk, monkeypatch):
    """Neither answers with answers, nor values with values or answers: all have their own seed."""
    seeds = []
    for name in ("answers_to", "chain_credit"):

        def seen(*args, right=getattr(microscope, name)):
            seeds.append(args[-1].initial_seed())
            return right(*args)

        monkeypatch.setattr(microscope, name, seen)
    cfg = microscope.config_of(ALL["chain 8x8, N = 4"], desk)
    for batch in range(2):
        microscope.draw(desk, desk.problems[:8], cfg, batch)
    assert len({*seeds}) == len(seeds) == 4


def test_methods_are_what_their_names_say(desk):
    for name, method in (ALL | microscope.LONG | microscope.LAST).items():
        cfg = microscope.config_of(method, desk)
        if "x" in (shape := name.split(",")[0].split()[-1]) and shape[0].isdigit():
            each = cfg.rollouts if method[0] is reset_po else cfg.group_size
            assert f"{cfg.prompts}x{each}" == shape
        if "N = " in name:
            assert cfg.continuations == int(name.split()[-1])
        if method[0] is reset_po:
            groups = (8, 0) if "GRPO" in name else (4, 4)
            assert (cfg.fresh, cfg.resets) == groups and cfg.clip_eps == 0
        assert cfg.temperature == 1 and cfg.max_new_tokens == desk.longest


def test_equal_texts_are_merged_and_given_ones_left_as_they_are():
    def made(context, ids, a):
        return common.Sample(context, ids, [a] * len(ids), [-0.5] * len(ids))

    given = [made([1], [2, 3], 0.25), made([1, 2], [3], 1.0), made([1], [2, 3], 0.5)]
    given += [made([1], [0], 1.0), made([1], [0], -1.0)]  # nothing is left of these
    found = microscope.merged(given)
    shown = [(s.context, s.ids, s.advantages) for s in found]
    assert shown == [([1], [2, 3], [0.75, 0.75]), ([1, 2], [3], [1.0])]
    assert given[0].advantages == [0.25, 0.25]


def test_the_truth_is_the_gradient_of_the_mean_reward(desk):
    """From 2 answers to each problem, where leaving one out or none makes a factor of 2."""
    many = desk._replace(problems=desk.problems * 60)
    t, rewards = microscope.true_half(many, 2, rng())
    right = true_gradient(desk.model)
    assert len(rewards) == 2 * 64 * 60
    assert (t - right).norm() < 0.25 * right.norm()


def test_the_truth_is_kept_for_these_weights_alone(desk, monkeypatch):
    first = microscope.truth_of(desk, SIZES)
    assert not torch.equal(*first["halves"])
    assert first["accuracy"] == pytest.approx(exact_values(desk.model)[()], abs=0.06)
    again = microscope.truth_of(desk, SIZES)
    assert torch.equal(again["halves"], first["halves"])
    for other in (
        (desk, SIZES._replace(truth=4)),
        (desk._replace(problems=desk.problems[:9]), SIZES),
    ):
        assert not torch.equal(microscope.truth_of(*other)["halves"], first["halves"])
    with torch.no_grad():
        next(desk.model.parameters()).mul_(1.1)
    assert not torch.equal(microscope.truth_of(desk, SIZES)["halves"], first["halves"])


def test_grpo_has_no_bias_and_the_mask_has(desk):
    """Where answers are enumerated, for batches of 32 x 8."""
    truth = true_gradient(desk.model)
    halves, found = torch.stack([truth, truth]), {}
    for name in ("GRPO 32x8", "GRPO + mask 32x8"):
        cfg, rows, zs = microscope.config_of(ALL[name], desk), [], []
        cfg.threshold = 0.3
        for b in range(6):
            drawn = microscope.draw(desk, desk.problems[:32], cfg, b)
            g, z = microscope.gradient(desk.model, drawn.samples, cfg)
            rows.append(g)
            zs.append(float(z))
        found[name] = microscope.bias_cosine(torch.stack(rows), torch.tensor(zs), halves)[0]
    assert abs(found["GRPO 32x8"] - 1) < 0.05 < 1 - found["GRPO + mask 32x8"]


def test_a_row_of_cosines(desk, monkeypatch):
    asked = []

    def draw(desk, problems, *rest, right=microscope.draw):
        asked.append([problem.question for problem in problems])
        return right(desk, problems, *rest)

    with monkeypatch.context() as spy:
        spy.setattr(microscope, "draw", draw)
        row = microscope.measure(desk, "GRPO 8x8", ALL["GRPO 8x8"], SIZES)
        microscope.measure(desk, "", ALL["chain 8x8, N = 4"], SIZES)  # of the same problems
        smaller = microscope.measure(desk, "", ALL["GRPO 8x8"], SIZES._replace(shrink=4))
    assert asked[:3] == asked[3:6] and len({*map(str, asked[:3])}) == 3
    assert smaller["problems"] == len(asked[6]) == 2
    cfg, truth = microscope.config_of(ALL["GRPO 8x8"], desk), microscope.truth_of(desk, SIZES)
    found, tokens, gradients, zs = [], 0, [], []
    for b in range(3):
        drawn = microscope.draw(desk, desk.problems[:8], cfg, b)  # all problems are alike
        g, z = microscope.gradient(desk.model, drawn.samples, cfg)
        gradients.append(g)
        zs.append(float(z))
        t1, t2 = truth["halves"]
        found.append(((g @ (t1 + t2)) / 2 / g.norm() / (t1 @ t2) ** 0.5).item())
        tokens += drawn.tokens
    mean, error = common.mean_stderr(found)
    assert row["cosine"] == pytest.approx(mean, abs=1e-3)
    assert row["cosine_high"] - row["cosine"] == pytest.approx(1.96 * error, abs=2e-3)
    assert row["tokens"] == round(tokens / 3) and row["trained"] == 64 and row["problems"] == 8
    bias = microscope.bias_cosine(torch.stack(gradients), torch.tensor(zs), truth["halves"])
    assert row["bias"] == pytest.approx(bias[0], abs=1e-4)
    assert row["bias_high"] - row["bias"] == pytest.approx(1.96 * bias[1], abs=1e-3)
    assert row["accuracy"] == pytest.approx(truth["accuracy"], abs=1e-4)
    if mean < 1:
        snr = mean**2 / (1 - mean**2)
        assert row["snr_per_10k"] == pytest.approx(snr / tokens * 3e4, rel=0.02)
        assert row["snr_per_100"] == pytest.approx(snr / 0.64, rel=0.02)


def test_nested_draws_share_what_they_should(desk):
    """The same answers twice for GRPO's one draw; a chain's two draws differ in values alone."""
    chain = microscope.nested(desk, ALL["chain 8x8, N = 4"], SIZES)
    grpo = microscope.nested(desk, ALL["GRPO 8x8"], SIZES)
    assert chain.shape[:3] == (3, 2, 2) and grpo.shape[:3] == (3, 2, 1)
    assert chain.shape[3] == desk.model.num_parameters()
    assert not torch.equal(chain[:, :, 0], chain[:, :, 1])
    assert not torch.equal(grpo[:, 0], grpo[:, 1])  # another set of answers
    # A problem's part is not a mean over its own tokens: all together are the batch's gradient.
    problems = random.Random("nested").sample(desk.problems, 3)
    cfg, generator = microscope.config_of(ALL["GRPO 8x8"], desk), rng()
    rollouts = microscope.answers_to(desk, problems, 8, generator)
    credit = microscope.chain_credit(desk, problems, rollouts, cfg, generator)
    g, z = microscope.gradient(desk.model, credit.samples, cfg)
    torch.testing.assert_close(grpo[:, 0, 0].sum(0), g * z / 8, rtol=1e-4, atol=1e-5)
    parts = microscope.components(chain)
    assert parts[3] > 0
    row = microscope.noise_row(desk, "", ALL["chain 8x8, N = 4"], SIZES)
    left_out = [microscope.components(chain[rows])[1:] for rows in ([1, 2], [0, 2], [0, 1])]
    names = ("between_problems", "between_answers", "between_continuations")
    for i, name in enumerate(names):
        assert row[name] == pytest.approx((parts[1:] / parts[1:].sum())[i].item(), abs=1e-3)
        error = microscope.jackknife([(x / x.sum())[i].item() for x in left_out])
        assert row[f"{name}_high"] - row[name] == pytest.approx(1.96 * error, rel=0.01)
    row = microscope.noise_row(desk, "GRPO 8x8", ALL["GRPO 8x8"], SIZES)
    assert row["between_continuations"] == 0
    assert row["between_problems"] + row["between_answers"] == pytest.approx(1, abs=1e-3)


# -------------------------------------------------------------------------------------------- signs


def answer(ids, starts):
    return spo.Answer(0, rollouts_of([tuple(ids)])[0], starts, [])


def test_segments_worked_by_hand():
    a = answer([0, 1, 2, 3], [1, 3])
    r = reward_of([0, 1, 2, 3])
    found = microscope.segments_of([a], [0.5, 0.25], [0.0, 0.25], count=100)
    assert [(s.answer, s.position) for s in found] == [(0, 0.25), (0, 0.75)]
    assert [s.exact for s in found] == pytest.approx([-0.25, r - 0.25])
    assert [s.estimate for s in found] == pytest.approx([0.25, r - 0.25])
    errors = [(0.25 / 100 + 0.1875 / 100) ** 0.5, (0.1875 / 100) ** 0.5]
    assert [s.error for s in found] == pytest.approx(errors)
    whole = microscope.whole_answer([a], found)
    assert [s.estimate for s in whole] == [2 * r - 1] * 2


def test_sign_shares_worked_by_hand():
    def segment(i, exact, estimate, error=0.01):
        return microscope.Segment(i, 0.0, exact, error, estimate)

    some = [segment(0, 0.4, 0.1), segment(0, -0.2, -1.0), segment(1, 0.2, -0.1)]
    some += [segment(1, -0.2, 0.0), segment(2, 0.01, -1.0)]  # of the last nobody knows the sign
    row = microscope.sign_shares(some)
    assert (row["segments"], row["known"]) == (5, 4)
    assert (row["right"], row["zero"], row["wrong"]) == (0.5, 0.25, 0.25)
    assert row["right_by_size"] == 0.6 and row["size"] == pytest.approx(1.01 / 5, abs=1e-4)
    assert row["right_high"] - 0.5 == pytest.approx(1.96 * 0.5, abs=1e-3)  # 1 or 0 without one
    assert microscope.sign_shares(some[:1])["right"] == ""


def test_groups_divide_the_segments():
    some = [microscope.Segment(0, p / 7, a, 0, 0) for p in range(7) for a in (-0.5, 0.1, 0, 0.2)]
    counts = {name: sum(map(belongs, some)) for name, belongs in microscope.GROUPS.items()}
    thirds = [counts[name] for name in counts if "third" in name]
    sizes = [counts[name] for name in counts if "|A|" in name]
    assert thirds == [12, 8, 8] and sizes == [7, 14, 7] and counts["all"] == 28


def test_near_exact_advantages_are_the_enumerated_ones(desk, monkeypatch):
    taken = []
    monkeypatch.setattr(microscope, "sign_shares", lambda some: taken.append(some) or {})
    answers = []
    true_segments = microscope.segments_of

    def spy(found, *rest):
        answers[:] = found
        return true_segments(found, *rest)

    monkeypatch.setattr(microscope, "segments_of", spy)
    rows = microscope.sign_rows(desk, SIZES)
    assert len(rows) == 5 * len(microscope.GROUPS)
    values, right = exact_values(desk.model), []
    for a in answers:
        at = [values[tuple(a.rollout.ids[:t])] for t in a.starts] + [a.rollout.reward]
        right += [after - before for before, after in zip(at, at[1:])]
    every = taken[0]  # N = 1, all
    assert len(every) == len(right) > 40
    assert all(abs(s.exact - x) < 5 * s.error + 1e-6 for s, x in zip(every, right))
    assert {round(s.estimate, 4) for s in every} <= {-1.0, 0.0, 1.0}


def test_the_states_of_signs_have_the_answers_of_their_own_problems(desk, monkeypatch):
    problems = [common.Problem(str(i), "", str(i)) for i in range(64)]
    asked, cut = [], []

    def estimate_values(model, tokenizer, states, *rest, right=spo.estimate_values):
        asked.append([answer for *_, answer in states])
        return right(model, tokenizer, states, *rest)

    def segments_of(answers, *rest, right=microscope.segments_of):
        cut[:] = answers
        return right(answers, *rest)

    monkeypatch.setattr(spo, "estimate_values", estimate_values)
    monkeypatch.setattr(microscope, "segments_of", segments_of)
    microscope.sign_rows(desk._replace(problems=problems), SIZES._replace(signs=6, exact=3))
    drawn = random.Random("signs").sample(problems, 6)
    wanted = [drawn[a.owner].answer for a in cut for _ in a.starts]
    assert asked[1:] == [wanted] * (1 + len(microscope.NS)) and len({*wanted}) == 6


# -------------------------------------------------------------------- policies, tables and pictures


def test_half_way_is_the_first_round_that_has_come_so_far(monkeypatch):
    assert microscope.half_way([0.0, 0.0, 0.2, 0.6, 0.8, 0.8], window=2) == 4
    assert microscope.half_way([i / 100 for i in range(101)]) == 56  # its window's mean is .505
    assert microscope.half_way([0.2, 0.4]) == 2
    made = []
    monkeypatch.setattr(curves, "make", lambda name, _, command, flags: made.append(flags))
    microscope.trained(12, microscope.Sizes(terms=5, warm_start_steps=70))
    [flags] = made
    given = dict(zip(flags[::2], flags[1::2]))
    assert (given["--steps"], given["--terms"], given["--warm_start_steps"]) == ("12", "5", "70")
    assert given["--max_new_tokens"] == "60"


def test_a_policy_is_that_of_its_name(monkeypatch):
    """The default warm start or a long one's; the end of a run, or of one that is half-way."""
    accuracy = [0.1] * 12 + [0.9] * 18
    monkeypatch.setattr(microscope, "start_of", lambda terms, steps: (steps, None))
    monkeypatch.setattr(curves, "make", lambda name, *_: Path(name))
    monkeypatch.setattr(curves, "columns", lambda _: dict(accuracy=accuracy, held_out=[0.5]))
    monkeypatch.setattr(common, "load_policy", lambda folder, device: (str(folder), None))
    sizes = microscope.Sizes(problems=5, long_problems=3, warm_start_steps=11, long_steps=13)
    desks = {n: microscope.desk_of.__wrapped__(n, sizes) for n in (*sizes.policies, "4 lines")}
    assert [desk.model for desk in desks.values()] == [
        11, f"microscope-7-{microscope.half_way(accuracy)}/checkpoint",
        "microscope-7-100/checkpoint", 13,
    ]  # fmt: skip
    assert [len(desk.problems) for desk in desks.values()] == [5, 5, 5, 3]
    assert desks["start"].longest == desks["late"].longest == spo.Config().max_new_tokens
    assert desks["4 lines"].longest == 60


def test_longer_tasks_have_rarer_slips_for_their_warm_start_alone(monkeypatch):
    seen = []

    def start_of(terms, steps):
        seen.append((terms, common.ERROR_RATE, steps / sizes.long_steps))
        return None, None

    monkeypatch.setattr(microscope, "start_of", start_of)
    sizes = microscope.Sizes()
    for name in microscope.LENGTHS:
        microscope.desk_of.__wrapped__(name, sizes)
    assert seen == list(microscope.LENGTHS.values()) and common.ERROR_RATE == 0.75
    assert len({steps for *_, steps in seen}) > 1
    for name, (terms, *_) in microscope.LENGTHS.items():
        lines = int(name.split()[0])
        solutions = [common.make_sum(0, "train", i, terms).solution for i in range(300)]
        assert sum(s.count("\n") + 1 for s in solutions) / 300 == pytest.approx(lines, abs=0.15)


def test_rows_that_are_there_are_not_computed_again(tmp_path, monkeypatch):
    made = []

    def rows_of(part, policy, name, method, sizes):
        made.append((policy, name))
        if len(made) == 3:
            raise KeyboardInterrupt
        return [dict(policy=policy, method=name, value=len(made))]

    monkeypatch.setattr(microscope, "rows_of", rows_of)
    with pytest.raises(KeyboardInterrupt):
        microscope.fill(tmp_path, "noise", SIZES)
    assert len(microscope.read(tmp_path, "noise")) == 2
    for _ in range(2):
        microscope.fill(tmp_path, "noise", SIZES)
    wanted = [(p, m) for p in SIZES.policies for m in ("chain 32x8, N = 4", "GRPO 32x8")]
    rows = microscope.read(tmp_path, "noise")
    assert [(row["policy"], row["method"]) for row in rows] == wanted
    assert made == [*wanted[:3], *wanted[2:]] and rows[0]["value"] == "1"


def test_what_is_measured_against_no_truth_is_not_kept(tmp_path, monkeypatch, capsys):
    def rows_of(part, policy, name, method, sizes):
        cosine = math.nan if name == "tree 2-2-2" else 0.5
        return [dict(policy=policy, method=name, cosine=cosine)]

    monkeypatch.setattr(microscope, "rows_of", rows_of)
    microscope.fill(tmp_path, "lengths", SIZES)
    kept = {(row["policy"], row["method"]) for row in microscope.read(tmp_path, "lengths")}
    wanted = {*microscope.LONG, *microscope.LAST} - {"tree 2-2-2"}
    assert kept == {(policy, name) for policy in SIZES.lengths for name in wanted}
    assert capsys.readouterr().out.count("not known well enough") == len(SIZES.lengths)


def cosine_row(method, cosine, tokens, policy="start"):
    row = dict(policy=policy, method=method, accuracy=0.5, problems=8, batches=50, tokens=tokens)
    row |= dict(trained=64, cosine=cosine, cosine_low=cosine - 0.02, cosine_high=cosine + 0.02)
    row |= dict(snr_per_10k=1, snr_per_100=cosine, bias=0.9, bias_low=0.8, bias_high=1.0)
    return {key: str(value) for key, value in row.items()}


def test_sentences_follow_from_the_rows():
    rows = [cosine_row("GRPO 8x8", 0.4, 10000), cosine_row("good", 0.4, 5000)]
    rows += [cosine_row("alike", 0.41, 10000), cosine_row("dear", 0.5, 40000)]
    rows[2] |= dict(bias_low="nan", bias_high="nan")  # a truth that is known too badly
    assert microscope.per_token(rows[1]) == pytest.approx(2 * 0.16 / 0.84)
    stands = microscope.standing(rows, rows[0])
    assert stands == dict(better=["good"], level=["alike"], worse=["dear"])
    unclear = cosine_row("unclear", 0.01, 10000)  # its interval has 0 in it
    assert microscope.per_token(unclear, "_low") == 0 < microscope.per_token(unclear)
    assert microscope.pm(dict(bias="nan"), "bias") == microscope.pm({}, "bias") == "-"
    text = microscope.cosine_text(rows)
    assert "Best use of a token: good (level with it: none)." in text
    assert "Best use of a trained sample: dear." in text
    assert "better than GRPO 8x8: good. Level: alike. Worse: dear." in text
    assert "| good | 8 | 5,000 | 64 | 0.40 ± 0.02 | 0.90 ± 0.10 | 0.381 |" in text
    assert "| alike | 8 | 10,000 | 64 | 0.41 ± 0.02 | - | " in text


CURVES = """table,row,seed,rounds,tokens,seconds,held_out
spo,SPO-chain,0,0,0,0,0.1
spo,SPO-chain,0,40,400000,1,0.5
spo,SPO-chain,0,100,800000,2,0.8
spo,SPO-chain,1,0,0,0,0.3
spo,SPO-chain,1,100,1000000,2,0.9
spo,GRPO + mask,0,0,0,0,0.1
spo,GRPO + mask,0,50,200000,1,0.5
spo,GRPO + mask,1,0,0,0,0.3
spo,GRPO + mask,1,50,200000,1,0.7
spo,another,0,0,0,0,0.1
"""


def test_training_is_looked_at_where_all_seeds_have_been(tmp_path):
    assert microscope.trained_rows(tmp_path, "rounds", 50) == {}
    (tmp_path / "curves.csv").write_text(CURVES)
    chain, grpo = "chain 64x2, N = 2", "GRPO + mask 64x2"
    found = microscope.trained_rows(tmp_path, "rounds", 50)
    assert [*found] == [chain, grpo]
    assert found[chain] == pytest.approx({"0": 0.55, "1": 0.6})
    assert found[grpo] == {"0": 0.5, "1": 0.7}
    found = microscope.trained_rows(tmp_path, "tokens", 400_000)
    assert found == {chain: pytest.approx({"0": 0.5, "1": 0.54})}


def test_a_measure_agrees_with_training_where_both_tell_apart(monkeypatch):
    """By hand: b and c are not apart by the measure, c and d not by training, of the rest a and b
    come in the same order, a and d too, a and c, and b and d do not."""
    measure = dict(a=(0.9, 0.85, 0.95), b=(0.5, 0.45, 0.55), c=(0.45, 0.4, 0.5), d=(0.1, 0.0, 0.2))
    monkeypatch.setattr(microscope, "ROWS", dict.fromkeys("abcd", ("spo", "")))
    near = {str(seed): 0.5 + 0.1 * seed for seed in range(3)}
    trained = {
        "a": {seed: y + 0.2 for seed, y in near.items()},
        "b": near,
        "c": {seed: y + 0.3 + 0.01 * int(seed) for seed, y in near.items()},
        "d": {"0": 0.85, "1": 0.6, "2": 0.95},
        "not measured": near,
    }
    # a - b is 0.2 in each seed, c - a 0.1 and more, c - b too; d is within noise of all the others.
    assert microscope.agreement(measure, trained) == (1, 2)
    del measure["c"]
    assert microscope.agreement(measure, trained) == (1, 1)
    trained["d"] = {seed: y + 0.1 for seed, y in near.items()}
    assert microscope.agreement(measure, trained) == (2, 3)
    microscope.ROWS["a"] = ("tree", "")  # of fewer rounds
    assert microscope.agreement(measure, trained) == (0, 1)


def test_the_page_says_whether_cosines_predict_training(tmp_path):
    names = [name for name in microscope.ROWS][:3]
    lines = ["table,row,seed,rounds,tokens,seconds,held_out"]
    for gain, (table, row) in enumerate([microscope.ROWS[name] for name in names]):
        for seed in range(3):
            start, end = 0.2 + 0.1 * seed, 0.4 + 0.1 * seed + 0.1 * gain
            lines += [f'{table},"{row}",{seed},0,0,0,{start}']
            lines += [f'{table},"{row}",{seed},50,250000,0,{end}']
    (tmp_path / "curves.csv").write_text("\n".join(lines))
    cosines = dict(zip(names, (0.2, 0.4, 0.6)))
    rows = [cosine_row(name, cosines[name], 10_000 * 4**i) for i, name in enumerate(names)]
    rows += [cosine_row(name, 0.8 - cosines[name], 10_000, "late") for name in names]
    first, second = microscope.predict_text(rows, tmp_path).split("**S/N")
    said = "* {}: of 3 pairs that both tell apart {} come in the same order."
    assert said.format("start", 3) in first and said.format("late", 0) in first
    assert f"| {names[2]} | 0.600 | 0.200 | 0.700 ± 0.248 |" in first
    assert first.index(f"| {names[2]}") < first.index(f"| {names[0]}")
    assert f"| {names[0]} | 0.042 | 0.563 | 0.500 ± 0.248 |" in second
    assert "accuracy after as many tokens" in second


def test_every_row_that_is_looked_for_is_in_the_tables(monkeypatch):
    """In runs whose command is what the microscope looks at."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    import results

    for method, (name, row) in microscope.ROWS.items():
        script, options = ALL[method]
        table = results.TABLES[name]
        [found] = [found for found in table.rows if found.name == row]
        monkeypatch.setattr(sys, "argv", results.command(table, found, 5e-4, 0).split()[1:])
        trained = common.parse_args(script.Config, table.script, "", script.TINY, script.LARGE)[0]
        mine = script.Config(**options)
        for config in (trained, mine):  # what is said of it elsewhere, and means the same
            config.lr = config.batch_size = config.steps = 0
            if getattr(config, "localiser", "") == "auto":
                config.localiser = "uncertain"
        assert trained == mine, method


def test_a_tiny_run_leaves_tables_and_text(warm, monkeypatch, capsys):
    """On the warm start that is there: --tiny has the small runs' recipe."""
    monkeypatch.chdir(warm)
    parts = ["signs", "noise", "lengths"]
    monkeypatch.setattr(
        sys, "argv", ["microscope.py", "--tiny", "--out", "found", "--only", *parts]
    )
    microscope.main()
    out, policies, shown = warm / "found", len(microscope.TINY.policies), capsys.readouterr().out
    assert len([*(warm / "runs" / "warm_start").iterdir()]) == 1
    assert len(microscope.read(out, "noise")) == 2 * policies
    assert len(microscope.read(out, "signs")) == 5 * len(microscope.GROUPS) * policies
    assert len(microscope.read(out, "lengths")) == len(microscope.LONG | microscope.LAST)
    text = (out / "microscope.md").read_text()
    assert all(title in text for part, (title, _) in microscope.TEXTS.items() if part in parts)
    assert (out / "signs.png").exists() != (curves.NO_MATPLOTLIB in shown)


@pytest.mark.parametrize(
    "flags, folder, sizes, parts",
    [
        ([], ROOT / "tutorials" / "results", microscope.Sizes(), [*microscope.PARTS]),
        (["--tiny"], Path("runs", "microscope-tiny"), microscope.TINY, [*microscope.PARTS]),
        (["--only", "noise", "--out", "a"], Path("a"), microscope.Sizes(), ["noise"]),
    ],
)
def test_a_tiny_run_leaves_the_kept_tables_alone(
    tmp_path, monkeypatch, flags, folder, sizes, parts
):
    filled, written = [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(microscope, "fill", lambda *given: filled.append(given))
    monkeypatch.setattr(microscope, "write", written.append)
    monkeypatch.setattr(sys, "argv", ["microscope.py", *flags])
    microscope.main()
    assert filled == [(folder, part, sizes) for part in parts] and written == [folder]


def test_pictures_are_drawn(tmp_path, monkeypatch, capsys):
    names = ["GRPO 8x8", "chain"]
    rows = [cosine_row(m, 0.3, 5000, p) for p in ("start", "half-way", "late") for m in names]
    monkeypatch.setattr(microscope, "read", lambda out, part: rows if part == "cosines" else [])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    microscope.write(tmp_path)
    assert curves.NO_MATPLOTLIB in capsys.readouterr().out
    assert "0.30 ± 0.02" in (tmp_path / "microscope.md").read_text()
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="tutorials/requirements.txt is not installed")
    microscope.dots_picture(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_show_the_rows(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="tutorials/requirements.txt")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)  # to be looked at
    rows = [cosine_row("GRPO 8x8", 0.3, 5000), cosine_row("chain", 0.4, 8000)]
    microscope.dots_picture(rows, tmp_path / "a.png")
    shown = [axis.containers[0].lines[0].get_xdata().tolist() for axis in pyplot.gcf().axes]
    assert shown == [[0.3, 0.4], [microscope.per_token(row) for row in rows]]
    names = [label.get_text() for label in pyplot.gcf().axes[0].get_yticklabels()]
    assert names == ["GRPO 8x8", "chain"]
    rows = [
        dict(policy="late", group=group, n=str(n), known="9", size=f"0.{place + 1}")
        | dict(right=f"0.{i + place}", right_low="0", right_high="1")
        for i, n in enumerate([*microscope.NS, "whole answer"])
        for place, group in enumerate(group for group in microscope.GROUPS if "third" in group)
    ]
    microscope.signs_picture(rows, tmp_path / "b.png")
    above, below = pyplot.gcf().axes
    assert [bar.get_height() for bar in below.patches] == [0.1, 0.2, 0.3]
    shares = [line.lines[0].get_ydata().tolist() for line in above.containers]
    assert shares == [pytest.approx([(i + place) / 10 for place in range(3)]) for i in range(5)]
    monkeypatch.undo()
    pyplot.close("all")


def test_the_kept_page_says_what_the_kept_tables_say(tmp_path, monkeypatch):
    results = ROOT / "tutorials" / "results"
    for name in ("dots_picture", "signs_picture"):
        monkeypatch.setattr(microscope, name, lambda *_: None)
    for path in [*results.glob("microscope_*.csv"), results / "curves.csv"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    microscope.write(tmp_path)
    made = (tmp_path / "microscope.md").read_text("utf-8")
    assert made == (results / "microscope.md").read_text("utf-8") and len(made) > 500


def test_a_sentence_about_signs_is_its_rows(tmp_path):
    def row(n, right, zero, wrong) -> dict:
        shares = dict(right=right, zero=zero, wrong=wrong, right_low=right, right_high=right)
        return dict(policy="late", group="all", n=n, known="9", size="0.25", **shares)

    rows = [row("1", "0.26", "0.73", "0.01"), row("4", "0.5", "0.4", "0.1")]
    rows += [row("9", "0.6", "0.4", "0"), row("16", "0.7", "0.3", "0")]
    rows += [row("whole answer", "0.85", "0", "0.15")]
    text = microscope.sign_text(rows)
    said = "* late, all: N = 1 26%, 73%, 1%; N = 4 50%, 40%, 10%; whole answer 85%, 0%, 15%"
    assert said in text and "| late | all | 9 | 0.25 | 0.26 " in text
