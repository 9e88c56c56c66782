"""The resets experiment against enumerated episodes, closed forms and rollouts that are played."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tutorials"))
import resets_theory as theory  # noqa: E402

torch.set_num_threads(1)
P_SWEEP = [(1 / 2**k, 0.12) for k in range(1, 6)]
TAU_SWEEP = [(1 / 8, 0.12 / k) for k in (1, 1.5, 2, 3, 4)]


def tensor(values):
    return torch.tensor(values, dtype=torch.double)


def random_policy(seed, steps, states, actions):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, states, actions, generator=generator).double().softmax(-1)


@pytest.mark.parametrize("reward", [1.0, 2.5])
def test_values_visits_tau_and_p_are_those_of_all_episodes_enumerated(monkeypatch, reward):
    for name, value in dict(H=3, Y=2, R=reward).items():
        monkeypatch.setattr(theory, name, value)
    p, effect = 0.3, 0.1
    mdp = theory.forks(p, effect)
    policy = random_policy(0, 3, len(mdp.start), 2)
    solved = theory.solve(mdp, policy)
    seen, paid, at_forks = {}, {}, 0.0  # by what was visited: (), (step, state) or with an action
    for episode in itertools.product(itertools.product((0, 1), (0, 1), (0, 1)), repeat=3):
        chance, level, visited = 1.0, 0, [()]
        for step, (fork, symbol, action) in enumerate(episode):
            state = level * 4 + fork * 2 + symbol
            chance *= (p if fork else 1 - p) / 2 * policy[step, state, action].item()
            visited += [(step, state), (step, state, action)]
            level += fork and action == symbol
        at_forks += chance * sum(fork for fork, *_ in episode) / 3
        for key in visited:
            seen[key] = seen.get(key, 0) + chance
            paid[key] = paid.get(key, 0) + chance * reward * (0.5 + effect * (level - 3 * p / 2))
    assert solved.objective.item() == pytest.approx(paid[()], abs=1e-12)
    assert solved.visits.sum().item() == pytest.approx(3)
    best = {key: 0.0 for key in seen if len(key) == 2}
    for key in seen:
        if len(key) == 2:
            assert solved.visits[key].item() == pytest.approx(seen[key], abs=1e-12)
        elif len(key) == 3:
            q, v = paid[key] / seen[key], paid[key[:2]] / seen[key[:2]]
            assert solved.q[key].item() == pytest.approx(q, abs=1e-12)
            assert solved.advantage[key].item() == pytest.approx(q - v, abs=1e-12)
            best[key[:2]] = max(best[key[:2]], q - v)
    improvable, tau, found = theory.improvable_states(solved)
    assert tau == pytest.approx(min(a for a in best.values() if a > 1e-9), abs=1e-12)
    assert all(improvable[key] == (a >= tau - 1e-9) for key, a in best.items())
    assert found == pytest.approx(at_forks) == pytest.approx(p)


def test_of_p_and_tau_a_sweep_changes_only_the_one_it_names():
    actions = theory.policy_class()
    for p, effect in P_SWEEP + TAU_SWEEP:
        mdp, policy, improvable, tau, found = theory.setting(p, effect)
        solved = theory.solve(mdp, policy)
        assert (tau, found) == (pytest.approx(effect * 3 / 4), pytest.approx(p))
        assert solved.objective.item() == pytest.approx(0.5)
        assert 0 <= mdp.success.min() and mdp.success.max() <= 1
        at_forks = theory.policy_advantages(solved, improvable, actions)
        assert at_forks.max().item() == at_forks[-1].item() == pytest.approx(tau)
        assert at_forks[0] < tau / 4 and at_forks[16:].mean() > at_forks[:16].mean() + tau / 3
        anywhere = theory.policy_advantages(solved, torch.ones_like(improvable), actions)
        assert torch.allclose(anywhere, p * at_forks, atol=1e-12)
        succeed = solved._replace(advantage=solved.q)  # in proportion to a weighted return's noise,
        noise = theory.policy_advantages(succeed, improvable, actions)[-1].item()
        assert noise == pytest.approx(0.5 + effect * (1 - p) / 4 + tau)  # which so falls with tau


@pytest.mark.parametrize("seed", range(5))
def test_performance_difference_and_the_guarantee_in_any_mdp(monkeypatch, seed):
    monkeypatch.setattr(theory, "R", 3.0)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(16, 5, generator=generator).double() ** 4
    rows = rows / rows.sum(-1, keepdim=True)
    success = (torch.rand(5, generator=generator) < tensor([0, 1, 0.5, 0.5, 0.5])).double()
    mdp = theory.MDP(rows[0], rows[1:].view(5, 3, 5), success)
    old, new = random_policy(seed, 4, 5, 3), random_policy(seed + 10, 4, 5, 3)
    before, after = theory.solve(mdp, old), theory.solve(mdp, new)
    difference = (after.visits[..., None] * new * before.advantage).sum().item()
    assert (after.objective - before.objective).item() == pytest.approx(difference, abs=1e-12)
    actions = torch.randint(3, (200, 4, 5), generator=generator)
    for named in (torch.ones(4, 5).double(), torch.rand(4, 5, generator=generator).double()):
        gains = theory.gains(mdp, old, named, actions)
        found = theory.policy_advantages(before, named, actions).clamp(min=0)
        share = (before.visits * named).sum() / 4
        assert (found > 0).sum() > 20 and (gains >= 3 / 16 * share * found**2 / 3 - 1e-12).all()
        assert gains[found == 0].abs().max() < 1e-12


@pytest.mark.parametrize("named, reward", [(1.0, 1.0), (0.5, 1.0), (0.5, 3.0)])
def test_the_step_is_short_enough_where_the_whole_one_ruins_all(monkeypatch, named, reward):
    """pi stays; to leave it once adds 0.1 to the chance of success, to leave it twice ends it."""
    monkeypatch.setattr(theory, "R", reward)
    steps, onward = 8, torch.zeros(3, 2, 3).double()
    for state in range(3):
        onward[state, 0, state] = onward[state, 1, min(state + 1, 2)] = 1
    mdp = theory.MDP(tensor([1, 0, 0]), onward, tensor([0.5, 0.6, 0]))
    stay = tensor([1, 0]).expand(steps, 3, 2)
    leave = torch.ones(1, steps, 3, dtype=torch.long)
    gain = theory.gains(mdp, stay, torch.full((steps, 3), named).double(), leave).item()
    chance = named * 0.1 / (4 * steps)  # of leaving at a step: alpha if that step is named
    none, once = (1 - chance) ** steps, steps * chance * (1 - chance) ** (steps - 1)
    assert gain == pytest.approx(reward * (0.5 * none + 0.6 * once - 0.5), abs=1e-12)
    assert gain >= 3 / 16 * named * 0.1**2 * reward
    whole = theory.solve(mdp, stay.flip(-1)).objective - theory.solve(mdp, stay).objective
    assert whole.item() == pytest.approx(-0.5 * reward)


@pytest.mark.parametrize("g, false_rate", [(1.0, 1.0), (1.0, 0.0), (0.5, 0.25)])
def test_learners_pick_from_counts_as_they_would_from_rollouts_played(monkeypatch, g, false_rate):
    for name, value in dict(LEARNERS=4000, CLASS=6, R=2.0, H=3, Y=3).items():
        monkeypatch.setattr(theory, name, value)
    mdp, n, tries = theory.forks(0.4, 0.2), 20, 300_000
    probs = tensor([0.5, 0.25, 0.25])  # weights 2, 4, 4: sums are exact, so that ties are ties
    policy = probs.expand(3, len(mdp.start), 3)
    solved, actions = theory.solve(mdp, policy), theory.policy_class()
    named = torch.where(theory.improvable_states(solved)[0], g, false_rate).double()
    picked = theory.pick(n, solved, policy, named, actions).bincount(minlength=6) / 4000

    generator = torch.Generator().manual_seed(1)
    reset_at = torch.randint(3, (tries,), generator=generator)
    level, kept = torch.zeros(tries, dtype=torch.long), torch.zeros(tries, dtype=torch.bool)
    weighted = torch.zeros(tries, 6)
    for step in range(3):
        fork = torch.rand(tries, generator=generator) < 0.4
        symbol = torch.randint(3, (tries,), generator=generator)
        action = torch.multinomial(probs, tries, replacement=True, generator=generator)
        state, here = level * 6 + fork * 3 + symbol, reset_at == step
        rate = torch.where(fork, g, false_rate)
        kept |= here & (torch.rand(tries, generator=generator) < rate)
        agrees = (actions[:, step, state] == action).T  # (tries, 6)
        weighted = torch.where(here[:, None], agrees / probs[action, None].float(), weighted)
        level = level + (fork & (symbol == action))
    success = 0.5 + 0.2 * (level - 3 * 0.4 / 3)
    won = torch.rand(tries, generator=generator) < success
    returns = (weighted * won[:, None])[kept][: 4000 * n].view(4000, n, 6)
    played = returns.mean(1).argmax(-1).bincount(minlength=6) / 4000
    noise = (2 * played * (1 - played) / 4000).sqrt()
    assert (abs(picked - played) <= 4 * noise).all() and 0.05 < played.max() < 0.6


def test_a_localiser_has_the_rates_it_is_given_and_its_limits_are_the_oracle_and_random():
    mdp, policy, improvable, _, p = theory.setting(1 / 8, 0.12)
    visits = theory.solve(mdp, policy).visits
    for b, g in [(0.0, 0.3), (0.25, 1.0), (0.5, 0.5)]:
        named = visits * theory.naming_rates(improvable, p, b, g)
        assert (named[~improvable].sum() / named.sum()).item() == pytest.approx(b)
        assert (named[improvable].sum() / visits[improvable].sum()).item() == pytest.approx(g)
    assert theory.naming_rates(improvable, p, 0, 1).equal(improvable.double())
    random = theory.naming_rates(improvable, p, 1 - p, 1)
    assert torch.allclose(random, torch.ones_like(random))
    with pytest.raises(ValueError):
        theory.naming_rates(improvable, p, 0.9, 1)


def test_a_localiser_gains_at_least_its_bound_and_only_false_discoveries_cost_rollouts():
    mdp, policy, improvable, tau, p = theory.setting(1 / 8, 0.12)
    (*_, n_random, n_oracle, random, oracle), _ = theory.compare(1 / 8, 0.12)
    for b, g in [(0, 1), (0, 0.5), (0.5, 1), (0.75, 0.5), (1 - p, 1)]:
        rates = theory.naming_rates(improvable, p, b, g)
        n, gain = theory.learn(mdp, policy, rates, theory.policy_class())
        assert gain >= theory.caro_bound(tau, p, b, g) == pytest.approx(
            (1 - b) * g * tau**2 * p / (16 * 4)
        )
        assert n * (1 - b) ** 2 == pytest.approx(n_oracle, rel=0.3)
        if b == 0:
            assert (n, gain) == (n_oracle, pytest.approx(g * oracle, rel=1e-6))
    assert (n, gain) == (pytest.approx(n_random, rel=0.06), pytest.approx(random, rel=1e-6))


def test_rollouts_needed_are_just_enough_and_nine_learners_in_ten_reach_the_gain(monkeypatch):
    mdp, policy, improvable, *_ = theory.setting(1 / 4, 0.12)
    solved, actions = theory.solve(mdp, policy), theory.policy_class()
    for named in (torch.ones_like(solved.visits), improvable.double()):
        n, gain = theory.learn(mdp, policy, named, actions)
        found = theory.policy_advantages(solved, named, actions)
        good, gains = found >= 0.4999 * found.max(), theory.gains(mdp, policy, named, actions)
        with monkeypatch.context() as patch:
            patch.setattr(theory, "LEARNERS", 4000)  # so with other rollouts
            at, below = (theory.pick(m, solved, policy, named, actions) for m in (n, n * 2 // 3))
        assert good[at].double().mean() > 0.88 and good[below].double().mean() < 0.88
        assert (gains[at] >= gain - 1e-12).double().mean() > 0.88
        assert (gains[at] > gain + 1e-12).double().mean() < 0.92
        picked = theory.pick(n, solved, policy, named, actions)
        with monkeypatch.context() as patch:
            patch.setattr(theory, "SEED", 7)
            assert not theory.pick(n, solved, policy, named, actions).equal(picked)


@pytest.mark.parametrize("seed", range(5))
def test_slopes_and_bounds_hold_for_other_seeds(monkeypatch, seed):
    monkeypatch.setattr(theory, "SEED", seed)
    monkeypatch.setattr(theory, "LEARNERS", 400)
    for of, sweep, expected in [(0, P_SWEEP, (-2, 0, 2, 1)), (1, TAU_SWEEP, (-2, -2, 2, 2))]:
        measured, bounds = zip(*(theory.compare(*each) for each in sweep))
        assert theory.slopes(bounds, of) == pytest.approx(expected, abs=1e-5)
        assert theory.slopes(measured, of)[:2] == pytest.approx(expected[:2], abs=0.25)
        assert theory.slopes(measured, of)[2:] == pytest.approx(expected[2:], abs=0.5)
        for row, (p, tau, *_, random, oracle) in zip(measured, bounds):
            assert row[:2] == [p, tau] and row[2] > row[3]
            assert row[4] >= random == pytest.approx(tau**2 * p**2 / (8 * 4))
            assert row[5] >= oracle == pytest.approx(tau**2 * p / (16 * 4))


def test_slopes_of_power_laws():
    rows = [[p, 7.0, 3 * p**-2, 5.0, p, p**1.5] for p in (0.5, 0.2, 0.1)]
    assert theory.slopes(rows, 0) == pytest.approx([-2, 0, 1, 1.5])
    bent = [[1.0, 1.0, 1.0], [1.0, 10.0, 10.0], [1.0, 100.0, 1000.0]]  # 0, 1, 3 in logs
    assert theory.slopes(bent, 1) == pytest.approx([1.5])


def test_the_script_prints_what_it_measured(monkeypatch, capsys):
    monkeypatch.setattr(theory, "LEARNERS", 60)
    theory.main()
    text = capsys.readouterr().out
    assert all(len(line) <= 100 for line in text.splitlines())
    lines = [line.split() for line in text.splitlines()]
    printed = [[float(x) for x in line[-4:]] for line in lines if line[:1] == ["slope"]]
    for of, sweep in enumerate((P_SWEEP, TAU_SWEEP)):
        rows, bounds = zip(*(theory.compare(*each) for each in sweep))
        for (p, tau, n, n_oracle, gain, oracle), (*_, least, oracle_least) in zip(rows, bounds):
            gains = [f"{gain:.1e}", f"({least:.1e})", f"{oracle:.1e}", f"({oracle_least:.1e})"]
            assert [f"1/{1 / p:.0f}", f"{tau:.4f}", f"{n:,}", f"{n_oracle:,}", *gains] in lines
        fits = theory.slopes(rows, of), theory.slopes(bounds, of)
        assert printed[2 * of : 2 * of + 2] == [pytest.approx(fit, abs=0.0051) for fit in fits]
        apart = max(abs(x - y) for x, y in zip(*fits))
        assert f"No slope is further than {apart:.2f} from its bound's." in text
    rates = [line for line in lines if line and line[0][:2] == "0."]
    numbers = [[float(x.strip("()").replace(",", "")) for x in line] for line in rates]
    assert len(numbers) == 7 and numbers[0][:2] == [0, 1]
    for b, g, n, times, square, gain, least, ratio in numbers:
        assert times == pytest.approx(n / numbers[0][2], abs=0.051)
        assert square == pytest.approx(1 / (1 - b) ** 2, abs=0.051)
        assert least == pytest.approx(theory.caro_bound(0.09, 1 / 8, b, g), rel=0.04)
        assert 1 < ratio == pytest.approx(gain / least, rel=0.06)
