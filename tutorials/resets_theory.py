"""Random resets against a credit-assignment oracle: the bounds of arXiv 2605.25507 v2, Section 3,
measured on a Markov decision process small enough to solve exactly.

A state is tau-improvable if its best action has advantage tau or more; p is the on-policy
probability of being in such a state. A learner resets to a state, takes an action there and rolls
the policy pi out to the end, n times over. It picks the best pi' of a finite class F and takes one
conservative step, (1 - alpha) pi + alpha pi' (Kakade & Langford 2002). Two ways to reset:

    CPI-RR     random: to any on-policy state      n >= N0 / (tau^2 p^2)   gain >= tau^2 p^2 / 8HR
    CPI-CARO   an oracle's: to improvable states   n >= N0 / tau^2         gain >= tau^2 p / 16HR

Measured here: the least n with which 9 learners in 10 pick a pi' of at least half the advantage of
the best in F, and the gain in J, the expected return, that 9 in 10 then reach with one step. N0
holds an unknown constant, so the slopes in p and tau are compared, not the levels. Last comes a
localiser that errs, with false-discovery rate b and recall g; for it the authors' project site (not
the paper) gives the bound gain >= (1 - b) g tau^2 p / 16HR.

Departures from the paper, and choices where it leaves one:
 1. Values, advantages, p, tau and gains are exact, by dynamic programming. Only the n rollouts are
    random, and they are all that the learner has when it picks pi'.
 2. alpha is the exact advantage of the pi' picked, over 4HR; a real learner would estimate it.
 3. A return is 0 or R, so how many of n rollouts succeed is binomial: it is drawn, not played.
 4. p is taken at a uniformly random step. tau is the least advantage above 0 that a best action
    has in any state that pi reaches.
 5. The MDP suits the bounds. Improvable states alone carry credit, every return is noisy, and what
    is done at one state leaves the others' advantages alone, so that a given pi' gains p^2 or p
    times a constant. If other actions mattered too, random resets could beat their bound's slope.
 6. The localiser that errs names each visit to a state at random, at the rates that b and g imply.

    python tutorials/resets_theory.py      6 s on one core

Expect random resets to need 1/p^2 times the rollouts, and the oracle the same for every p. Slopes
of n over ten seeds, mean and standard deviation: -1.99 +- 0.01 and -0.02 +- 0.03 in p, -1.99 +-
0.03 and -1.92 +- 0.05 in tau: the last is short of -2, as the output explains. Gains are at least 2
and 4 times their bounds.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

H, Y, R = 4, 4, 1.0  # steps, actions, reward of a success
CLASS, LEARNERS, DELTA = 32, 1000, 0.1  # policies in F, repetitions, share of them that may fail
SEED = 0  # the same in every row, so that rows differ by what the table varies alone


class MDP(NamedTuple):
    start: Tensor  # (S,) distribution of the first state
    transition: Tensor  # (S, Y, S) probability of the next state
    success: Tensor  # (S,) probability that an episode that ends here pays R


class Solved(NamedTuple):
    objective: Tensor  # (...) J: expected return
    q: Tensor  # (..., H, S, Y) expected return after an action
    advantage: Tensor  # (..., H, S, Y) q minus the state's value
    visits: Tensor  # (..., H, S) probability of being in a state at a step


def forks(p: float, effect: float) -> MDP:
    """Reasoning with forks: with probability p a step is one, and then 1 of Y actions is right.

    A state is (forks taken right so far, is this step a fork, a symbol): the symbol names the right
    action at a fork and means nothing elsewhere. Every fork taken right adds `effect` to the chance
    of success, which under the uniform policy is 1/2 for every p, so that noise is alike.
    """
    seen = torch.tensor([(1 - p) / Y] * Y + [p / Y] * Y, dtype=torch.double)  # plain steps, forks
    states = (H + 1) * 2 * Y
    transition = torch.zeros(states, Y, states, dtype=torch.double)
    for state in range(states):
        level, symbol = divmod(state, 2 * Y)
        for action in range(Y):
            next_level = min(level + (symbol == Y + action), H)
            transition[state, action, next_level * 2 * Y :][: 2 * Y] = seen
    level = (torch.arange(states) // (2 * Y)).double()
    start = torch.where(level == 0, seen.repeat(H + 1), 0.0)
    return MDP(start, transition, 0.5 + effect * (level - H * p / Y))


def solve(mdp: MDP, policy: Tensor) -> Solved:
    """Exact values of policy (..., H, S, Y), backward in time, and its visits, forward."""
    steps = policy.unbind(-3)
    value, q = R * mdp.success, []
    for step in reversed(steps):
        q.insert(0, torch.einsum("say,...y->...sa", mdp.transition, value).expand(step.shape))
        value = (step * q[0]).sum(-1)
    state, visits = mdp.start, []
    for step in steps:
        visits.append(state.expand(step.shape[:-1]))
        state = torch.einsum("...s,...sa,say->...y", state, step, mdp.transition)
    q = torch.stack(q, -3)
    advantage = q - (policy * q).sum(-1, keepdim=True)
    return Solved((mdp.start * value).sum(-1), q, advantage, torch.stack(visits, -2))


def improvable_states(solved: Solved) -> tuple[Tensor, float, float]:
    """(H, S) bool, the tau-improvable states; tau; p."""
    best = solved.advantage.amax(-1)
    tau = best[(solved.visits > 0) & (best > 1e-9)].min().item()  # 1e-9: rounding is no advantage
    improvable = best >= tau - 1e-9
    return improvable, tau, (solved.visits * improvable).sum().item() / len(best)


def naming_rates(improvable: Tensor, p: float, b: float, g: float) -> Tensor:
    """(H, S) how often a localiser of false-discovery rate b and recall g names a state.

    It names g p of all visits rightly, and these are 1 - b of what it names. b = 0, g = 1 is the
    oracle; b = 1 - p, g = 1 names every visit: random resets.
    """
    false_rate = b / (1 - b) * g * p / (1 - p)
    if false_rate > 1 + 1e-9:
        raise ValueError(f"b {b}, g {g}: with p {p} too few visits are left to name in error")
    return false_rate + (g - false_rate) * improvable.double()


def policy_class() -> Tensor:
    """(CLASS, H, S) an action for every state. The last policy takes the right one at every fork.

    Policy k of 0 .. CLASS - 1 takes the symbol's action for a share k / (CLASS - 1) of the symbols
    at each step, and a random one for the others. It does so off the forks too, where nothing
    depends on it, so that the noise in comparing two policies is the same wherever resets go.
    """
    generator = torch.Generator().manual_seed(SEED)
    actions = torch.randint(Y, (CLASS, H, Y), generator=generator)
    share = torch.linspace(0, 1, CLASS)[:, None, None]
    right = torch.rand(actions.shape, generator=generator) < share
    return torch.where(right, torch.arange(Y), actions).repeat(1, 1, 2 * (H + 1))


def policy_advantages(solved: Solved, named: Tensor, actions: Tensor) -> Tensor:
    """(F,) mean advantage of each policy's action, over the states that resets go to."""
    chosen = solved.advantage.expand(*actions.shape, -1).gather(-1, actions[..., None])[..., 0]
    weights = solved.visits * named
    return (weights * chosen).sum((-2, -1)) / weights.sum()


def gains(mdp: MDP, policy: Tensor, named: Tensor, actions: Tensor) -> Tensor:
    """(F,) exact J(pi_new) - J(pi) of one conservative step towards each policy.

    pi_new leaves pi at named states alone, with probability alpha. With A the policy advantage and
    M the share of visits named, gain >= alpha H M (A - alpha (H - 1) R), in any MDP: the last term
    is what the change in visits can cost. alpha = A / 4HR makes that at least 3 M A^2 / 16R, which
    for A >= tau / 2 (random resets: p tau / 2) is above the paper's bound if H >= 3.
    """
    solved = solve(mdp, policy)
    alpha = policy_advantages(solved, named, actions).clamp(min=0) / (4 * len(policy) * R)
    mixed = alpha[:, None, None, None] * named[..., None]  # (F, H, S, 1)
    target = one_hot(actions, policy.shape[-1])
    return solve(mdp, (1 - mixed) * policy + mixed * target).objective - solved.objective


def multinomial(total: Tensor, probs: Tensor, generator: torch.Generator) -> Tensor:
    """(..., K) how often each outcome of probs (..., K) comes in total (...) draws."""
    left, counts = total, []
    tails = probs.flip(-1).cumsum(-1).flip(-1).clamp(min=1e-300)  # of this outcome and later ones
    for share in (probs / tails).clamp(max=1).unbind(-1):
        counts.append(torch.binomial(left, share.expand_as(left), generator=generator))
        left = left - counts[-1]
    return torch.stack(counts, -1)


def pick(n: int, solved: Solved, policy: Tensor, named: Tensor, actions: Tensor) -> Tensor:
    """(LEARNERS,) the policy that each learner picks after n resets and rollouts of its own.

    It picks the highest mean return, weighted by importance: 1 / pi(a|s) where a policy's action
    was the one taken, 0 where it was not.
    """
    generator = torch.Generator().manual_seed(SEED)
    weights = (solved.visits * named).flatten()
    at = weights > 0
    total = torch.full((LEARNERS,), n, dtype=torch.double)
    resets = multinomial(total, weights[at] / weights.sum(), generator)  # (LEARNERS, K)
    wins = (policy * solved.q / R).flatten(0, 1)[at]  # (K, Y) take this action, then succeed
    outcomes = torch.cat([wins, 1 - wins.sum(-1, keepdim=True)], -1)  # (K, Y + 1): or fail
    won = multinomial(resets, outcomes, generator)[..., :-1]  # (LEARNERS, K, Y)
    taken = one_hot(actions.flatten(1)[:, at], policy.shape[-1])  # (F, K, Y)
    return torch.einsum("lky,fky->lf", won, taken / policy.flatten(0, 1)[at]).argmax(-1)


def learn(mdp: MDP, policy: Tensor, named: Tensor, actions: Tensor) -> tuple[int, float]:
    """Rollouts needed, to 5 %, and the gain that all but DELTA of the learners then reach."""
    solved = solve(mdp, policy)
    advantages = policy_advantages(solved, named, actions)
    good = advantages >= advantages.max() / 2 - 1e-9  # 1e-9: exactly half counts, and may round

    def enough(n):
        failed = ~good[pick(round(n), solved, policy, named, actions)]
        return failed.sum() <= DELTA * LEARNERS

    high = 16.0
    while not enough(high):
        high *= 4
    low = high / 4
    while high > 1.05 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    picked = pick(round(high), solved, policy, named, actions)
    reached = gains(mdp, policy, named, actions)[picked].sort().values
    return round(high), reached[int(DELTA * LEARNERS)].item()


def caro_bound(tau: float, p: float, b: float = 0, g: float = 1) -> float:
    """Least gain of CPI-CARO, and with b and g of resets to what a localiser that errs names."""
    return (1 - b) * g * tau**2 * p / (16 * H * R)


def setting(p: float, effect: float) -> tuple[MDP, Tensor, Tensor, float, float]:
    """The MDP, the uniform policy (H, S, Y), the improvable states (H, S), tau and p."""
    mdp = forks(p, effect)
    policy = torch.full((H, len(mdp.start), Y), 1 / Y, dtype=torch.double)
    return mdp, policy, *improvable_states(solve(mdp, policy))


def compare(p: float, effect: float) -> tuple[list[float], list[float]]:
    """[p, tau, n RR, n CARO, gain RR, gain CARO] as measured, and as bound with N0 = 1."""
    mdp, policy, improvable, tau, p = setting(p, effect)
    everywhere = torch.ones_like(improvable).double()
    n, gain = learn(mdp, policy, everywhere, policy_class())
    n_oracle, gain_oracle = learn(mdp, policy, improvable.double(), policy_class())
    least = (tau * p) ** 2 / (8 * H * R)
    bounds = [p, tau, (tau * p) ** -2, tau**-2, least, caro_bound(tau, p)]
    return [p, tau, n, n_oracle, gain, gain_oracle], bounds


def slopes(rows: list[list[float]], of: int) -> list[float]:
    """Slope of each column after the first two, log on log, by least squares on column `of`."""
    columns = torch.tensor(rows, dtype=torch.double).log().T
    x = columns[of] - columns[of].mean()
    slope = (columns[2:] * x).sum(-1) / x.square().sum()
    return (slope.round(decimals=6) + 0.0).tolist()  # a slope of 0 prints as +0


def print_sweep(of: int, settings: list[tuple[float, float]]):
    """Rows of `compare` for pairs (p, effect), and their slopes in p (of = 0) or tau (of = 1)."""
    name = ("p", "tau")[of]
    print(f"\nAs {name} shrinks".ljust(26) + "rollouts needed       gain of one step (its bound)")
    print("     p   tau           random    oracle      random resets           oracle")
    measured, bounds = zip(*(compare(*each) for each in settings))
    for (p, tau, n, n_oracle, gain, gain_oracle), bound in zip(measured, bounds):
        print(f"  1/{1 / p:<3.0f} {tau:.4f}     {n:10,}{n_oracle:10,}", end="")
        print(f"     {gain:.1e} ({bound[4]:.1e})   {gain_oracle:.1e} ({bound[5]:.1e})")
    fits = slopes(measured, of), slopes(bounds, of)
    for label, fit in zip(("measured", "of bounds"), fits):
        print("  slope {:10}{:+10.2f}{:+10.2f}{:+13.2f}{:+20.2f}".format(label, *fit))
    apart = max(abs(x - y) for x, y in zip(*fits))
    print(f"  No slope is further than {apart:.2f} from its bound's.")


def print_localisers(p: float, effect: float, pairs: list[tuple[float, float]]):
    """A row for the oracle, then one for each (b, g)."""
    mdp, policy, improvable, tau, p = setting(p, effect)
    print(f"\nA localiser of false-discovery rate b and recall g: p 1/{1 / p:.0f}, tau {tau:.4f}")
    print("    b      g   rollouts needed   / oracle's   1/(1-b)^2     gain (its bound)      ratio")
    for b, g in [(0, 1), *pairs]:
        n, gain = learn(mdp, policy, naming_rates(improvable, p, b, g), policy_class())
        oracle = n if (b, g) == (0, 1) else oracle
        least = caro_bound(tau, p, b, g)
        print(f"  {b:5.3f}  {g:5.3f} {n:17,} {n / oracle:12.1f} {(1 - b) ** -2:11.1f}", end="")
        print(f"     {gain:.1e} ({least:.1e}) {gain / least:6.1f}")


def main():
    print(f"""\
{H} steps, each a fork with probability p; there 1 of {Y} actions makes success at the end likelier,
which pays R = {R:g}. pi is uniform. {LEARNERS} learners choose among {CLASS} policies; rollouts are
enough if {1 - DELTA:.0%} pick one of at least half the best one's advantage. Slopes: log-log.""")
    print_sweep(0, [(1 / 2**k, 0.12) for k in range(1, 6)])
    print_sweep(1, [(1 / 8, 0.12 / k) for k in (1, 1.5, 2, 3, 4)])
    print("""\
  Where the oracle's n falls short of tau^-2: a larger tau makes good policies succeed more often at
  forks, so their weighted returns are noisier. The bound, a worst case, has the noise constant.""")
    pairs = [(0, 0.5), (0, 0.25), (0.5, 1), (0.5, 0.5), (0.75, 0.5), (7 / 8, 1)]
    print_localisers(1 / 8, 0.12, pairs)
    print("  The last one names every state: random resets.")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the sums are too small to share out
    main()
