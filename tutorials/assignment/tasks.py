"""The tasks: for each function its points, its checks, and the mistakes that the grader knows.

A Case has arguments and the answer worked by hand; a Property is a fact about any right answer. The
first check of a task is the ordinary case: it brings half of the points, and without it there are
none; the others share the other half. A mistake is a function that returns what a student with
that mistake would, and the question to ask who made it. The question names the mistake, never the
formula.
"""

import math
from random import Random
from types import SimpleNamespace
from typing import Callable, NamedTuple

import reference
import torch
from sandbox import Bigram
from torch import Tensor

import common
from common import Sample
from reset_po import localise_surprise

PARTS = ("GRPO and PPO", "SPO", "MPO", "Resets")
ANY = math.nan  # in a wanted answer: here anything may stand


class Case(NamedTuple):
    says: str
    args: tuple
    wanted: object
    question: str = ""  # where no known mistake fits


class Property(NamedTuple):
    says: str
    holds: Callable  # the student's function -> bool
    question: str = ""
    gradient: bool = False  # what has none trains nothing: a third of the points, at most


class Task(NamedTuple):
    name: str
    part: str
    points: int
    checks: list
    mistakes: list  # (question, wrong function)
    draw: Callable  # Random -> the arguments of an ordinary case
    gradient: int | None = None  # the argument whose gradient is compared on drawn cases


def tensor(*rows) -> Tensor:
    return torch.tensor(rows if len(rows) > 1 else rows[0])


def logs(*rows) -> Tensor:
    """(B, T) of the logarithms."""
    return torch.tensor(rows, dtype=torch.float).log()


def near(a, b, tolerance=1e-5) -> bool:
    return bool(torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=0,
                               atol=tolerance))  # fmt: skip


def batch_of(advantages, old_probs=None):
    """A batch of rows of like numbers: one advantage a token, and pi_old's probability of it."""
    old_probs = old_probs or [[1.0] * len(row) for row in advantages]
    rows = zip(advantages, old_probs)
    return common.collate(
        [Sample([1], [1] * len(a), a, [math.log(p) for p in old]) for a, old in rows]
    )


def descend(loss_of: Callable, start: Tensor) -> Tensor:
    """Minus the gradient of loss_of at `start`: where a step of descent goes."""
    x = start.clone().requires_grad_()
    (-loss_of(x)).backward()
    return x.grad


# What the drawn cases are made of: ordinary ones, for right and wrong at the edges has a case.


def uniform(rng: Random, *shape, low=0.0, high=1.0) -> Tensor:
    values = [rng.uniform(low, high) for _ in range(math.prod(shape))]
    return torch.tensor(values).reshape(shape)


def lengths(rng: Random, count: int, most: int) -> list[int]:
    """Of rows; the first is the longest."""
    return [most, *(rng.randint(1, most) for _ in range(count - 1))]


def row_mask(rng: Random, count: int, most: int) -> Tensor:
    return torch.arange(most) < torch.tensor(lengths(rng, count, most))[:, None]


def drawn_batch(rng: Random, count=3, most=5):
    """Advantages in [-2, 2], old probabilities in [0.2, 1]."""
    sizes = lengths(rng, count, most)
    return batch_of([[rng.uniform(-2, 2) for _ in range(n)] for n in sizes],
                    [[rng.uniform(0.2, 1) for _ in range(n)] for n in sizes])  # fmt: skip


def drawn_doubts(rng: Random):
    starts = [0, *sorted(rng.sample(range(1, 12), 3))]
    return [rng.uniform(0.3, 1) for _ in range(12)], starts, 0.6


def drawn_tree(rng: Random):
    parents = [-1, 0, 0, *(rng.randint(0, n) for n in range(2, 8))]
    return parents, [0.0 if n in parents else rng.uniform(0, 1) for n in range(len(parents))]


def drawn_chain(rng: Random):
    starts = sorted(rng.sample(range(12), rng.randint(2, 4)))
    return starts, [rng.random() for _ in starts], float(rng.randint(0, 1)), 12


def drawn_text(rng: Random):
    rows = ["".join(rng.choices("0123456789+-=", k=rng.randint(1, 6))) for _ in range(4)]
    return ids_of("\n".join(rows)), TOKENIZER


def drawn_policy(rng: Random):
    table = uniform(rng, 4, 4, low=0.1)
    samples = [Sample(rng.choices(range(4), k=2), rng.choices(range(4), k=n)) for n in (4, 2, 3)]
    return policy(table / table.sum(1, keepdim=True)), common.collate(samples)


def drawn_spo(rng: Random):
    batch = drawn_batch(rng)
    mask = batch.mask & (uniform(rng, *batch.mask.shape) < 0.8)
    logprobs = batch.old_logprobs + uniform(rng, *mask.shape, low=-0.4, high=0.4)
    return logprobs, batch, mask, rng.randint(20, 30), 0.2


def drawn_mpo(rng: Random):
    batch = drawn_batch(rng)
    moved = uniform(rng, *batch.mask.shape, low=-0.6, high=0.6)
    return moved, batch, rng.randint(20, 30), mpo_cfg(rng.randint(2, 3))


def drawn_reset(rng: Random):
    batch = drawn_batch(rng)
    return uniform(rng, *batch.mask.shape, low=-3, high=0), batch, rng.randint(6, 12), 0.0


# -------------------------------------------------------------------------------- 1. GRPO and PPO


def centred(rewards, std=lambda r: r.std(1, correction=0, keepdim=True)):
    return (rewards - rewards.mean(1, keepdim=True)) / std(rewards)


GROUPS = tensor([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0])
R3 = 3**0.5


def own_mean(rewards, scale=True, mean=0.0):
    """Another number in the place of the group's mean; the rest is right."""
    std = rewards.std(1, correction=0, keepdim=True)
    flat = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(flat, torch.zeros(()), (rewards - mean) / (std if scale else 1))


def of_the_others(rewards, scale=True):
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return own_mean(rewards, scale, others)


def sample_std(small):
    """torch's default std plus a small number, and no thought of groups that are all equal."""
    return lambda rewards, scale=True: (
        centred(rewards, lambda r: r.std(1, keepdim=True) + small)
        if scale
        else reference.group_advantages(rewards, False)
    )


GROUP_ADVANTAGES = Task(
    "group_advantages",
    PARTS[0],
    7,
    [
        Case("one right of four, and two", (GROUPS, True),
             [[R3, -1 / R3, -1 / R3, -1 / R3], [1.0, 1.0, -1.0, -1.0]]),
        Case("the same, not scaled", (GROUPS, False),
             [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]),
        Case("groups of equal rewards", (tensor([0.1] * 8, [1.0] * 8), True), [[0.0] * 8] * 2,
             "Did you divide by the group's std when all rewards are equal?"),
        Property("equal rewards give exactly 0, whatever their size",
                 lambda f: all(not f(torch.full((1, g), x)).any() for g in (3, 7, 11)
                               for x in (0.1, 0.3, 1 / 3)),
                 "Did you divide by the group's std when all rewards are equal?"),
        Property("twice the reward and one more changes no scaled advantage",
                 lambda f: near(f(2 * GROUPS + 1), f(GROUPS))),
    ],
    [
        ("Whose standard deviation is it? torch's default takes the G rewards for a sample.",
         lambda rewards, scale=True: reference.group_advantages(rewards, scale)
         * (((rewards.shape[1] - 1) / rewards.shape[1]) ** 0.5 if scale else 1)),
        ("Did you divide by the group's std when all rewards are equal? (0/0)",
         lambda rewards, scale=True: centred(rewards) if scale
         else reference.group_advantages(rewards, False)),
        ("Did you divide by the group's std when all rewards are equal? A small number added to "
         "it turns rounding errors into advantages.",
         lambda rewards, scale=True: centred(
             rewards, lambda r: r.std(1, correction=0, keepdim=True) + 1e-8) if scale
         else reference.group_advantages(rewards, False)),
        ("A small number added to the std changes every advantage, and does not make those of "
         "an all-equal group exact.",
         lambda rewards, scale=True: centred(
             rewards, lambda r: r.std(1, correction=0, keepdim=True) + 1e-4) if scale
         else reference.group_advantages(rewards, False)),
        *[("Whose standard deviation is it? torch's default takes the G rewards for a sample. And "
           "what if all rewards are equal?", sample_std(small)) for small in (0, 1e-8, 1e-6, 1e-4)],
        ("Did you compare answers of different problems? The mean is over the whole batch.",
         lambda rewards, scale=True: (rewards - rewards.mean())
         / (rewards.std(correction=0) if scale else 1)),
        ("Is the mean over the whole batch, and only the std the group's?",
         lambda rewards, scale=True: (rewards - rewards.mean())
         / (rewards.std(1, correction=0, keepdim=True) if scale else 1)),
        ("Is the standard deviation over the whole batch, and only the mean the group's?",
         lambda rewards, scale=True: (rewards - rewards.mean(1, keepdim=True))
         / (rewards.std(correction=0) if scale else 1)),
        ("Is an answer left out of the mean it is compared with? That is over all G.",
         of_the_others),
        ("Do you subtract nothing?", own_mean),
        ("Have you turned round the difference? Above the mean is a plus.",
         lambda rewards, scale=True: -reference.group_advantages(rewards, scale)),
        ("Do you divide by the variance? The standard deviation is its root.",
         lambda rewards, scale=True: reference.group_advantages(rewards, scale)
         / (rewards.std(1, correction=0, keepdim=True).clamp(min=1e-9) if scale else 1)),
        ("Did you average over problems instead of over the answers to one? Check the dimension.",
         lambda rewards, scale=True: reference.group_advantages(rewards.T, scale).T),
        ("Do you divide by the std although scale is False?",
         lambda rewards, scale=True: reference.group_advantages(rewards, True)),
        ("Do you forget `scale`? Nothing is divided.",
         lambda rewards, scale=True: reference.group_advantages(rewards, False)),
    ],
    lambda rng: (uniform(rng, 2, rng.randint(4, 6)), True),
)  # fmt: skip

X, HOLES = tensor([1.0, 3.0, 9.0], [5.0, 9.0, 9.0]), tensor([True, True, False],
                                                            [True, False, False])  # fmt: skip
NOWHERE = torch.zeros_like(HOLES)

MASKED_MEAN = Task(
    "masked_mean",
    PARTS[0],
    3,
    [
        Case("over all", (X, HOLES), 3.0),
        Case("along rows", (X, HOLES, 1), [2.0, 5.0]),
        Case("a row without any", (X, tensor([True] * 3, [False] * 3), 1), [13 / 3, 0.0]),
        Case("nothing at all", (X, NOWHERE), 0.0),
    ],
    [
        ("Do you divide by all places, masked ones too?",
         lambda x, mask, dim=None: (x * mask).mean() if dim is None else (x * mask).mean(dim)),
        ("What is the mean where the mask is True nowhere? You divide 0 by 0.",
         lambda x, mask, dim=None: (x * mask).sum(dim) / mask.sum(dim)),
        ("Without `dim` the mean is over tokens: did you average the means of the rows?",
         lambda x, mask, dim=None: reference.masked_mean(x, mask, 1).mean() if dim is None
         else reference.masked_mean(x, mask, dim)),
        ("Do you forget `dim`? Each row has its own mean.",
         lambda x, mask, dim=None: reference.masked_mean(x, mask)),
        ("Along which dimension is `dim`? You always take the other one.",
         lambda x, mask, dim=None: reference.masked_mean(x, mask, dim if dim is None else 1 - dim)),
        ("Is it the sum?",
         lambda x, mask, dim=None: (x * mask).sum() if dim is None else (x * mask).sum(dim)),
        ("Do you add a small number to the count? It changes every mean.",
         lambda x, mask, dim=None: (x * mask).sum(dim) / (mask.sum(dim) + 1e-4)),
        ("Do you keep the dimension? The shape that is asked for has it no more.",
         lambda x, mask, dim=None: reference.masked_mean(x, mask, dim)
         if dim is None else reference.masked_mean(x, mask, dim)[:, None]),
        ("Do you forget the mask?",
         lambda x, mask, dim=None: x.mean() if dim is None else x.mean(dim)),
    ],
    lambda rng: (uniform(rng, 3, 5, low=-2), row_mask(rng, 3, 5)),
)  # fmt: skip


def policy(table) -> Bigram:
    """From rows of probabilities: those of each word after the row's. Logits, so up to a constant."""
    return Bigram(torch.as_tensor(table).log().T + 1)


POLICY = policy([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.1, 0.1, 0.8]])
TEXTS = common.collate([Sample([1, 0], [2, 2, 0]), Sample([0], [1])])
LN = math.log
RARE, RARE_TEXT = policy([[1.0, 1e-30], [0.5, 0.5]]), common.collate([Sample([0], [1])])


def places(batch, shift=1) -> Tensor:
    """(B, T) `shift` places before each trained token."""
    at = batch.context_lens[:, None] + torch.arange(batch.mask.shape[1]) - shift
    return at.clamp(0, batch.input_ids.shape[1] - 1)


def picked(model, batch, shift=1, before=1.0, after=1.0) -> Tensor:
    """(B, T) log-probs from logits `shift` places before the token; divided before or after."""
    logprobs = (model(batch.input_ids).logits / before).log_softmax(-1) / after  # (B, L, V)
    rows = torch.arange(len(batch.mask))[:, None]
    return logprobs[rows, places(batch, shift), batch.targets]


TOKEN_LOGPROBS = Task(
    "token_logprobs",
    PARTS[0],
    8,
    [
        Case("a table of probabilities for a policy", (POLICY, TEXTS),
             [[LN(0.25), LN(0.8), LN(0.1)], [LN(0.25), 0.0, 0.0]]),
        Case("at temperature 1/2", (POLICY, TEXTS, 0.5),
             [[LN(1 / 6), LN(64 / 66), LN(1 / 66)], [LN(1 / 6), 0.0, 0.0]]),
        Case("a word of probability 1e-30, at temperature 1/2", (RARE, RARE_TEXT, 0.5),
             [[60 * LN(0.1)]]),
        Property("probabilities of all words sum to 1 at any temperature",
                 lambda f: near(sum(f(POLICY, common.collate([Sample([2, 1], [v])]), 0.7).exp()
                                    for v in range(3)), [[1.0]])),
        Property("a row's gradient reaches the policy",
                 lambda f: torch.autograd.grad(f(POLICY, TEXTS).sum(), POLICY.head.weight)[0]
                 .abs().sum() > 0.1, gradient=True),
    ],
    [
        ("Are you off by one? You read the logits that stand AT the token, which already saw it.",
         lambda model, batch, temperature=1.0: picked(model, batch, 0, temperature) * batch.mask),
        ("Are you off by one, to the other side? You read the logits two places before.",
         lambda model, batch, temperature=1.0: picked(model, batch, 2, temperature) * batch.mask),
        ("Do you score without the temperature that was used to sample?",
         lambda model, batch, temperature=1.0: picked(model, batch) * batch.mask),
        ("Do you divide log-probabilities by the temperature? They no longer sum to 1.",
         lambda model, batch, temperature=1.0: picked(model, batch, 1, 1.0, temperature)
         * batch.mask),
        ("What stands outside the mask? Padding has no log-probability.",
         lambda model, batch, temperature=1.0: picked(model, batch, 1, temperature)),
        ("Do you take the logarithm of a softmax? Small probabilities have become 0 by then.",
         lambda model, batch, temperature=1.0: (model(batch.input_ids).logits / temperature)
         .softmax(-1).log()[torch.arange(len(batch.mask))[:, None], places(batch), batch.targets]
         * batch.mask),
        ("Do you take the same places in all rows? Contexts differ in length, and padding follows.",
         lambda model, batch, temperature=1.0: (model(batch.input_ids).logits / temperature)
         .log_softmax(-1)[:, -batch.mask.shape[1] - 1 : -1]
         .gather(-1, batch.targets[..., None])[..., 0] * batch.mask),
        ("Do you multiply by the temperature?",
         lambda model, batch, temperature=1.0: picked(model, batch, 1, 1 / temperature)
         * batch.mask),
        ("Are these the logits? Their probabilities do not sum to 1.",
         lambda model, batch, temperature=1.0: (model(batch.input_ids).logits / temperature)[
             torch.arange(len(batch.mask))[:, None], places(batch), batch.targets] * batch.mask),
        ("Over what is your softmax? Over words, not over places.",
         lambda model, batch, temperature=1.0: (model(batch.input_ids).logits / temperature)
         .log_softmax(1)[torch.arange(len(batch.mask))[:, None], places(batch), batch.targets]
         * batch.mask),
        ("Is the sign that of a loss? A log-probability is not above 0.",
         lambda model, batch, temperature=1.0: -picked(model, batch, 1, temperature)
         * batch.mask),
        ("Do you return probabilities?",
         lambda model, batch, temperature=1.0: picked(model, batch, 1, temperature).exp()
         * batch.mask),
    ],
    drawn_policy,
)  # fmt: skip


def surrogate(objective_of, cut_of=None):
    """A wrong clipped_surrogate: objective_of(ratio, clipped ratio, A), cut_of likewise."""

    def wrong(log_ratio, advantages, clip_eps):
        ratio = log_ratio.clamp(-10, 10).exp()
        clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
        right = reference.clipped_surrogate(log_ratio, advantages, clip_eps)
        objective = objective_of(ratio, clipped, advantages) if objective_of else right[0]
        return objective, cut_of(ratio, clipped, advantages) if cut_of else right[1]

    return wrong


RATIOS = logs([0.5, 1.1, 1.5, 0.5, 0.9, 1.5])
SIGNS = tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]])

CLIPPED_SURROGATE = Task(
    "clipped_surrogate",
    PARTS[0],
    8,
    [
        Case("low, middle and high ratios, of either sign", (RATIOS, SIGNS, 0.2),
             ([[0.5, 1.1, 1.2, -0.8, -0.9, -1.5]], [[0, 0, 1, 1, 0, 0]])),
        Case("advantages of 0 and 2", (logs([1.5, 1.5]), tensor([[0.0, 2.0]]), 0.1),
             ([[0.0, 2.2]], [[0, 1]])),
        Case("a log-ratio of 50", (tensor([[50.0]]), tensor([[-1.0]]), 0.2),
             ([[-math.exp(10)]], [[0]])),
        Case("a clip range for each", (RATIOS, SIGNS, tensor([[0.6, 0.05] * 3])),
             ([[0.5, 1.05, 1.5, -0.95, -0.9, -1.5]], [[0, 1, 0, 1, 0, 0]])),
        Property("while the policy is the one that sampled, the gradient is A",
                 lambda f: near(-descend(lambda x: f(x, SIGNS, 0.2)[0].sum(), SIGNS * 0), SIGNS)),
        Property("it has no gradient just where it says so",
                 lambda f: torch.equal(
                     descend(lambda x: f(x, SIGNS, 0.2)[0].sum(), RATIOS) == 0,
                     f(RATIOS, SIGNS, 0.2)[1].bool())),
    ],
    [
        ("Do you clip without the minimum? A ratio on the wrong side of 1 must stay free.",
         surrogate(lambda r, c, a: c * a)),
        ("Is your minimum taken before the advantage comes in? Try a negative one.",
         surrogate(lambda r, c, a: torch.minimum(r, c) * a)),
        ("Is it the maximum? You are looking at an objective, not at a loss.",
         surrogate(lambda r, c, a: torch.maximum(r * a, c * a))),
        ("Is the sign that of a loss? What is asked for is to be maximised.",
         surrogate(lambda r, c, a: -torch.minimum(r * a, c * a))),
        ("Does the clip act on every ratio outside its range? Look at the advantage's sign.",
         surrogate(None, lambda r, c, a: r != c)),
        ("Have you turned round where the clip acts?",
         surrogate(None, lambda r, c, a: c * a > r * a)),
        ("Is the log-ratio cut to [-10, 10]? And only then clipped?",
         lambda log_ratio, advantages, clip_eps: surrogate(
             lambda r, c, a: torch.minimum(
                 log_ratio.exp() * a, log_ratio.exp().clamp(1 - clip_eps, 1 + clip_eps) * a)
         )(log_ratio, advantages, clip_eps)),
        ("Do you clip from above only? The range has a lower end too.",
         lambda log_ratio, advantages, clip_eps: surrogate(
             lambda r, c, a: torch.minimum(r * a, r.clamp(max=1 + clip_eps) * a),
             lambda r, c, a: r * a > r.clamp(max=1 + clip_eps) * a,
         )(log_ratio, advantages, clip_eps)),
        ("Where does the range begin? Yours is symmetric in the log-ratio.",
         lambda log_ratio, advantages, clip_eps: surrogate(
             lambda r, c, a: torch.minimum(
                 r * a, r.clamp(1 / (1 + clip_eps), 1 + clip_eps) * a),
             lambda r, c, a: r * a > r.clamp(1 / (1 + clip_eps), 1 + clip_eps) * a,
         )(log_ratio, advantages, clip_eps)),
        ("Do you clip from below only? The range has an upper end too.",
         lambda log_ratio, advantages, clip_eps: surrogate(
             lambda r, c, a: torch.minimum(r * a, r.clamp(min=1 - clip_eps) * a),
             lambda r, c, a: r * a > r.clamp(min=1 - clip_eps) * a,
         )(log_ratio, advantages, clip_eps)),
        ("Do you clip the log-ratio? The range is the ratio's.",
         lambda log_ratio, advantages, clip_eps: surrogate(
             lambda r, c, a: torch.minimum(
                 r * a, torch.clamp(log_ratio, 0 * log_ratio - clip_eps, 0 * log_ratio + clip_eps)
                 .exp() * a))(log_ratio, advantages, clip_eps)),
        ("Is there no clip in the objective?", surrogate(lambda r, c, a: r * a)),
        ("Where the two terms are equal, has the clip taken anything away?",
         surrogate(None, lambda r, c, a: c * a <= r * a)),
        ("Do you average? Each action has its own objective.",
         surrogate(lambda r, c, a: torch.minimum(r * a, c * a).mean())),
        ("Do you take the log-ratio for the ratio?",
         lambda log_ratio, advantages, clip_eps: (
             torch.minimum(log_ratio * advantages,
                           log_ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages),
             reference.clipped_surrogate(log_ratio, advantages, clip_eps)[1])),
    ],
    lambda rng: (uniform(rng, 2, 4, low=-0.6, high=0.6), uniform(rng, 2, 4, low=-2, high=2),
                 0.2),
    gradient=0,
)  # fmt: skip

P, Q = tensor([0.5, 0.3, 0.2]), tensor([0.1, 0.6, 0.3])

K3 = Task(
    "k3",
    PARTS[0],
    4,
    [
        Case("ratios 1, 2 and 1/2", (logs(1.0, 2.0, 0.5),), [0.0, 1 - LN(2), LN(2) - 0.5]),
        Case("far apart", (tensor([-3.0, 20.0]),), [math.exp(-3) + 2, math.exp(10) - 11]),
        Property("its mean over p is KL(p || q)",
                 lambda f: near((P * f(Q.log() - P.log())).sum(), (P * (P / Q).log()).sum())),
        Property("it is never negative", lambda f: (f(torch.linspace(-9, 9, 99)) >= 0).all()),
    ],
    [
        ("Is that the plain log-ratio (k1)? Its mean is right, but it can be negative.",
         lambda log_ratio: -log_ratio.clamp(-10, 10)),
        ("Is that half the square (k2)? It is near, but its mean is not the KL.",
         lambda log_ratio: log_ratio.clamp(-10, 10) ** 2 / 2),
        ("Which of p and q is above in the ratio? You estimate with the two exchanged.",
         lambda log_ratio: reference.k3(-log_ratio)),
        ("Is the log-ratio cut to [-10, 10]?",
         lambda log_ratio: log_ratio.exp() - 1 - log_ratio),
        ("Is the log-ratio cut to [-10, 10] wherever it stands?",
         lambda log_ratio: log_ratio.clamp(-10, 10).exp() - 1 - log_ratio),
        ("Is yours 1 where p and q agree? The KL is 0 there.",
         lambda log_ratio: reference.k3(log_ratio) + 1),
        ("Is the log-ratio added that should be subtracted?",
         lambda log_ratio: reference.k3(log_ratio) + 2 * log_ratio.clamp(-10, 10)),
        ("Is the log-ratio weighted with the ratio? Tokens are drawn from p already.",
         lambda log_ratio: reference.k3(-log_ratio) * log_ratio.clamp(-10, 10).exp()),
        ("Have the signs changed? Yours is never positive.",
         lambda log_ratio: -reference.k3(log_ratio)),
    ],
    lambda rng: (uniform(rng, 6, low=-2, high=2),),
    gradient=0,
)  # fmt: skip


# ----------------------------------------------------------------------------------------- 2. SPO


def cutpoints(probs, threshold) -> list[int]:
    return [t for t, p in enumerate(probs) if p < threshold]


PROBS = [1.0, 0.5, 1.0, 0.8, 0.3, 1.0]
WAVES = [0.95, 0.2, 0.99, 0.6, 0.4, 0.99, 0.1, 0.3]

SEGMENT_STARTS = Task(
    "segment_starts",
    PARTS[1],
    6,
    [
        Case("three cutpoints, two to a segment", (PROBS, 2, 0.9), [1, 4]),
        Case("one to a segment", (torch.tensor(PROBS), 1, 0.9), [1, 3, 4]),
        Case("five cutpoints, three to a segment", (WAVES, 3, 0.9), [1, 6]),
        Case("a token right at the threshold", ([0.5, 0.25, 0.5], 1, 0.5), [1]),
        Case("no cutpoint", ([1.0, 0.95], 1, 0.9), []),
        Property("segments begin at cutpoints, every one of them for interval 1",
                 lambda f: list(f(WAVES, 1, 0.9)) == cutpoints(WAVES, 0.9)),
    ],
    [
        ("Is a token right at the threshold a cutpoint?",
         lambda probs, interval, threshold: [t for t, p in enumerate(probs) if p <= threshold]
         [::interval]),
        ("Must the first token begin a segment? Only if it is a cutpoint.",
         lambda probs, interval, threshold: sorted(
             {0, *reference.segment_starts(probs, interval, threshold)})),
        ("Does your segment begin after its cutpoint? The unsure token is a segment's first.",
         lambda probs, interval, threshold: [
             t + 1 for t in reference.segment_starts(probs, interval, threshold)]),
        ("Which cutpoint is the first to begin a segment? You wait for a full interval.",
         lambda probs, interval, threshold: cutpoints(probs, threshold)[interval - 1::interval]),
        ("Do you leave out the first cutpoint?",
         lambda probs, interval, threshold: cutpoints(probs, threshold)[1::interval]),
        ("Is your interval one too many? Count again which cutpoints begin a segment.",
         lambda probs, interval, threshold: cutpoints(probs, threshold)[:: interval + 1]),
        ("Do you return numbers of cutpoints? A start is a place in the answer.",
         lambda probs, interval, threshold: [
             *range(0, len(cutpoints(probs, threshold)), interval)]),
        ("With interval 1, which cutpoints begin a segment? A remainder by 1 is never 1.",
         lambda probs, interval, threshold: [
             t for n, t in enumerate(cutpoints(probs, threshold), 1) if n % interval == 1]),
        ("Does your interval count tokens? It counts cutpoints.",
         lambda probs, interval, threshold: [
             t for t in range(0, len(probs), interval) if probs[t] < threshold]),
        ("Do you forget the interval?",
         lambda probs, interval, threshold: cutpoints(probs, threshold)),
        ("Are your cutpoints the sure tokens?",
         lambda probs, interval, threshold: [t for t, p in enumerate(probs) if p >= threshold]
         [::interval]),
    ],
    lambda rng: ([rng.random() for _ in range(20)], rng.randint(2, 3), 0.5),
)  # fmt: skip


def spread(starts, gains, length, first=0.0) -> Tensor:
    """(length,) gains[k] from starts[k] on, `first` before them."""
    a = torch.full((length,), float(first))
    for start, gain in zip(starts, gains):
        a[start:] = gain
    return a


CHAIN_ADVANTAGES = Task(
    "chain_advantages",
    PARTS[1],
    7,
    [
        Case("two segments of a failure", ([1, 4], [0.25, 0.75], 0.0, 6),
             [0.0, 0.5, 0.5, 0.5, -0.75, -0.75]),
        Case("three segments of a success", ([0, 2, 3], [0.5, 0.25, 1.0], 1.0, 5),
             [-0.25, -0.25, 0.75, 0.0, 0.0]),
        Case("no segment", ([], [], 1.0, 3), [0.0, 0.0, 0.0]),
        Property("what the segments earn adds up to reward minus first value",
                 lambda f: near(f([2, 5, 6], [0.3, 0.9, 0.1], 1.0, 9)[[2, 5, 6]].sum(), 0.7)),
    ],
    [
        ("What is the value of the end? The answer's own reward is known; you left it out.",
         lambda starts, values, reward, length: spread(
             starts, [b - a for a, b in zip(values, [*values[1:], *values[-1:]])], length)),
        ("Is the value of the end 0? The answer's own reward is known.",
         lambda starts, values, reward, length: reference.chain_advantages(
             starts, values, 0.0, length)),
        ("Does your segment answer for the one before it?",
         lambda starts, values, reward, length: spread(
             starts, [b - a for a, b in zip([0.0, *values], values)], length)),
        ("Does your segment begin one token late?",
         lambda starts, values, reward, length: torch.cat([torch.zeros(min(length, 1)),
             reference.chain_advantages(starts, values, reward, length)[:-1]])),
        ("Do tokens before the first start have the first segment's?",
         lambda starts, values, reward, length: reference.chain_advantages(
             [0, *starts[1:]] if starts else [], values, reward, length)),
        ("Have you turned round the difference? A segment that raised the value gets a minus.",
         lambda *args: -reference.chain_advantages(*args)),
        ("Is every segment compared with the final reward? Then later segments answer for earlier "
         "ones.",
         lambda starts, values, reward, length: spread(
             starts, [reward - v for v in values], length)),
        ("Is every segment compared with the first value?",
         lambda starts, values, reward, length: spread(
             starts, [v - [*values, 0.0][0] for v in [*values[1:], reward]], length)),
        ("What about tokens before the first start? Nobody estimated what they added.",
         lambda starts, values, reward, length: spread(
             starts, [b - a for a, b in zip(values, [*values[1:], reward])], length,
             values[0] if values else reward)),
        ("Does the last segment reach the answer's last token?",
         lambda starts, values, reward, length: torch.cat([reference.chain_advantages(
             starts, values, reward, length)[:-1], torch.zeros(min(length, 1))])),
        ("Do all tokens of a segment have its advantage? Only its first one does.",
         lambda starts, values, reward, length: torch.zeros(length).index_put(
             (torch.tensor(starts, dtype=torch.long),),
             reference.chain_advantages(starts, values, reward, length)[starts])
         if starts else torch.zeros(length)),
        ("Is the credit shared out among a segment's tokens? Each has it in full.",
         lambda starts, values, reward, length: reference.chain_advantages(
             starts, values, reward, length) / spread(
             starts, [b - a for a, b in zip(starts, [*starts[1:], length])], length, 1)),
    ],
    drawn_chain,
)  # fmt: skip


def tree(parents, rewards, scale=False, *, value=None, advantage=None):
    """A wrong tree: value(children's values, their leaves, the node's reward) of an inner node;
    advantage(value, siblings' values, parent's value, root's value)."""
    values, leaves = [float(r) for r in rewards], [1] * len(parents)
    children = [[c for c, p in enumerate(parents) if p == n] for n in range(len(parents))]
    for n in reversed(range(len(parents))):
        if kids := children[n]:
            leaves[n] = sum(leaves[c] for c in kids)
            below = [values[c] for c in kids]
            mean = sum(below) / len(below)
            values[n] = value(below, [leaves[c] for c in kids], rewards[n]) if value else mean
    advantages, roots = [], list(range(len(parents)))
    for n, parent in enumerate(parents):
        roots[n] = n if parent < 0 else roots[parent]
        siblings = [values[c] for c in children[parent]] if parent >= 0 else [values[n]]
        if advantage:
            above = values[parent] if parent >= 0 else values[n]
            a = advantage(values[n], siblings, above, values[roots[n]])
        else:
            a = values[n] - values[parent] if parent >= 0 else 0.0
        if scale and a:
            a /= torch.tensor(siblings).std(correction=0).item() or 1.0
        advantages.append(a)
    return values, advantages


def tree_with(**changes):
    return lambda parents, rewards, scale=False: tree(parents, rewards, scale, **changes)


def sample_scaled(parents, rewards, scale=False):
    values, advantages = reference.tree_advantages(parents, rewards, scale)
    count = [sum(p == parent for p in parents) for parent in parents]
    shrink = [((n - 1) / n) ** 0.5 if scale and n > 1 else 1.0 for n in count]
    return values, [a * s for a, s in zip(advantages, shrink)]


def level_scaled(parents, rewards, scale=False):
    values, advantages = reference.tree_advantages(parents, rewards)
    depth = []
    for p in parents:
        depth.append(depth[p] + 1 if p >= 0 else 0)
    levels = [[v for v, d in zip(values, depth) if d == level] for level in depth]
    stds = [torch.tensor(level).std(correction=0).item() or 1.0 for level in levels]
    return values, [a / s if scale else a for a, s in zip(advantages, stds)]


def root_has_value(parents, rewards, scale=False):
    values, advantages = reference.tree_advantages(parents, rewards, scale)
    return values, [v if p < 0 else a for v, a, p in zip(values, advantages, parents)]


def zero_over_zero(parents, rewards, scale=False):
    values, advantages = reference.tree_advantages(parents, rewards, scale)
    groups = {p: {v for v, q in zip(values, parents) if q == p} for p in parents}
    flat = [scale and p >= 0 and len(groups[p]) == 1 for p in parents]
    return values, [math.nan if f else a for f, a in zip(flat, advantages)]


def tree_scaled(parents, rewards, scale=False):
    values, advantages = reference.tree_advantages(parents, rewards)
    std = torch.tensor(advantages).std(correction=0).item() or 1.0
    return values, [a / std if scale else a for a in advantages]


def small_added(parents, rewards, scale=False):
    values, advantages = reference.tree_advantages(parents, rewards)
    scaled = reference.tree_advantages(parents, rewards, True)[1]  # A / std
    return values, [a / (a / s + 1e-4) if scale and s else a for a, s in zip(advantages, scaled)]


def too_early(parents, rewards, scale=False):
    """From the first node to the last, a parent before its children."""
    values = [float(r) for r in rewards]
    for n in range(len(parents)):
        below = [values[c] for c, p in enumerate(parents) if p == n]
        values[n] = sum(below) / len(below) if below else values[n]
    advantages = [v - values[p] if p >= 0 else 0.0 for v, p in zip(values, parents)]
    for n, p in enumerate(parents):
        std = torch.tensor([v for v, q in zip(values, parents) if q == p]).std(correction=0).item()
        advantages[n] /= std if scale and std else 1.0
    return values, advantages


SMALL = ([-1, 0, 0, 1, 1], [0, 0, 0, 1, 0])
EARLY = ([-1, 0, 0, 0, 1, 1, 1], [0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
COUSINS = ([-1, 0, 0, 1, 1, 2, 2], [0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.5])

TREE_ADVANTAGES = Task(
    "tree_advantages",
    PARTS[1],
    8,
    [
        Case("two children, the first with two of its own", SMALL,
             ([0.25, 0.5, 0.0, 1.0, 0.0], [0.0, 0.25, -0.25, 0.5, -0.5])),
        Case("some leaves end early", EARLY,
             ([5 / 9, 2 / 3, 1.0, 0.0, 1.0, 1.0, 0.0],
              [0.0, 1 / 9, 4 / 9, -5 / 9, 1 / 3, 1 / 3, -2 / 3])),
        Case("scaled", (*SMALL, True), ([0.25, 0.5, 0.0, 1.0, 0.0], [0.0, 1.0, -1.0, 1.0, -1.0])),
        Case("scaled, and all siblings equal", ([-1, 0, 0], [0, 1, 1], True),
             ([1.0] * 3, [0.0] * 3)),
        Case("scaled, and cousins are no siblings", (*COUSINS, True),
             ([0.625, 0.5, 0.75, 1.0, 0.0, 1.0, 0.5], [0.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0])),
        Case("what an inner node got does not count", ([-1, 0, 0], [9.0, 1.0, 0.0]),
             ([0.5, 1.0, 0.0], [0.0, 0.5, -0.5])),
        Property("what siblings earn adds up to 0",
                 lambda f: near(sum(f(*EARLY)[1][1:4]), 0) and near(sum(f(*EARLY)[1][4:]), 0)),
    ],
    [
        ("Is a parent's value the mean over all leaves below? Branches then weigh by their leaves.",
         tree_with(value=lambda below, leaves, _: sum(v * n for v, n in zip(below, leaves))
                   / sum(leaves))),
        ("Does the reward of an inner node count? Only leaves have an outcome.",
         tree_with(value=lambda below, leaves, reward: reward + sum(below) / len(below))),
        ("Is the value the best child's?", tree_with(value=lambda below, *_: max(below))),
        ("Is the value the sum over the children?", tree_with(value=lambda below, *_: sum(below))),
        ("Do you take a child's value before it is computed? Children stand behind their parent.",
         too_early),
        ("Is every node compared with the root?",
         tree_with(advantage=lambda v, siblings, above, root: v - root)),
        ("Do you leave the node itself out of the mean it is compared with?",
         tree_with(advantage=lambda v, siblings, above, root: (v - above) * len(siblings)
                   / max(1, len(siblings) - 1))),
        ("Have you turned round the difference?",
         tree_with(advantage=lambda v, siblings, above, root: above - v)),
        ("Whose standard deviation is it? The siblings are all there are, not a sample.",
         sample_scaled),
        ("Whose standard deviation is it? That of a node and its siblings, not of their level.",
         level_scaled),
        ("Whose standard deviation is it? That of a node and its siblings, not of the tree.",
         tree_scaled),
        ("Do you add a small number to the standard deviation? It changes every advantage.",
         small_added),
        ("What if all siblings are equal? You divide 0 by 0.", zero_over_zero),
        ("Do you forget `scale`?",
         lambda parents, rewards, scale=False: reference.tree_advantages(parents, rewards)),
        ("What is a root's advantage? It has no parent to be compared with.", root_has_value),
    ],
    drawn_tree,
)  # fmt: skip

UNSURE = batch_of([[1.0, -1.0, 1.0, 1.0], [1.0, 1.0]], [[0.5, 0.9, 1.0, 0.2], [0.95, 0.9 - 1e-3]])
UNSURE.old_logprobs[1, 2:] = math.log(0.01)  # padding, where anything may stand
MASK_ON = SimpleNamespace(mask=True, threshold=0.9)
MASK_OFF = SimpleNamespace(mask=False, threshold=0.9)

TRAINED_TOKENS = Task(
    "trained_tokens",
    PARTS[1],
    4,
    [
        Case("mask on", (UNSURE, MASK_ON), [[1, 0, 0, 1], [0, 1, 0, 0]]),
        Case("mask off", (UNSURE, MASK_OFF), [[1, 1, 1, 1], [1, 1, 0, 0]]),
        Case("right at the threshold", (batch_of([[1.0]], [[1.0]]),
             SimpleNamespace(mask=True, threshold=1.0)), [[0]]),
    ],
    [
        ("Do you compare log-probabilities with a probability?",
         lambda batch, cfg: batch.mask & (batch.old_logprobs < cfg.threshold) if cfg.mask
         else batch.mask),
        ("Do you train the sure tokens?",
         lambda batch, cfg: batch.mask & (batch.old_logprobs.exp() >= cfg.threshold) if cfg.mask
         else batch.mask),
        ("Do you train the sure tokens?",
         lambda batch, cfg: batch.mask & (batch.old_logprobs.exp() > cfg.threshold) if cfg.mask
         else batch.mask),
        ("Is a token right at the threshold trained?",
         lambda batch, cfg: batch.mask & (batch.old_logprobs.exp() <= cfg.threshold) if cfg.mask
         else batch.mask),
        ("With the mask off, do you train padding?",
         lambda batch, cfg: reference.trained_tokens(batch, cfg) if cfg.mask
         else torch.ones_like(batch.mask)),
        ("Do you train padding that looks unsure? Only batch.mask knows where tokens stand.",
         lambda batch, cfg: batch.old_logprobs.exp() < cfg.threshold if cfg.mask
         else batch.mask),
        ("Where is batch.mask? You train padding, with the mask on and off.",
         lambda batch, cfg: batch.old_logprobs.exp() < cfg.threshold if cfg.mask
         else torch.ones_like(batch.mask)),
        ("Do you forget cfg.mask?",
         lambda batch, cfg: batch.mask & (batch.old_logprobs.exp() < cfg.threshold)),
    ],
    lambda rng: (drawn_batch(rng), SimpleNamespace(mask=True, threshold=0.6)),
)  # fmt: skip

# Ratios 1.5, 1, 0.5 | 0.5, 1 and A 1, 2, -1 | -2, 1: objectives 1.2, 2, -0.8 | -1.6, 1.
MOVED = batch_of([[1.0, 2.0, -1.0], [-2.0, 1.0]], [[0.5, 0.5, 0.8], [0.8, 0.5]])
NOW = logs([0.75, 0.5, 0.4], [0.4, 0.5, 0.9])
M = tensor([True, False, True], [True, True, False])


def spo_wrong(change):
    """A wrong spo_loss: change(objective (B, T), batch, mask, normaliser) -> loss."""

    def wrong(logprobs, batch, mask, normaliser, clip_eps):
        log_ratio = logprobs - batch.old_logprobs
        objective, clipped = reference.clipped_surrogate(log_ratio, batch.advantages, clip_eps)
        return change(objective, batch, mask, normaliser), clipped & mask

    return wrong


def whitened(logprobs, batch, mask, normaliser, clip_eps):
    x = batch.advantages[mask]
    white = (batch.advantages - x.mean()) / (x.std(correction=0) + 1e-8) if len(x) else 0 * logprobs
    batch = batch._replace(advantages=white)
    return reference.spo_loss(logprobs, batch, mask, normaliser, clip_eps)


SPO_LOSS = Task(
    "spo_loss",
    PARTS[1],
    7,
    [
        Case("four of five tokens, Z = 8", (NOW, MOVED, M, 8, 0.2),
             (0.025, [[1, 0, 1], [1, 0, 0]])),
        Case("no mask, Z = 5", (NOW, MOVED, MOVED.mask, 5, 0.2), (-0.36, [[1, 0, 1], [1, 0, 0]])),
        Case("nothing to train", (NOW, MOVED, torch.zeros_like(M), 0, 0.2),
             (0.0, [[0] * 3] * 2)),
        Property("a step of descent makes tokens with A > 0 likelier, and those with A < 0 less",
                 lambda f: torch.equal(
                     descend(lambda x: f(x, MOVED, MOVED.mask, 5, 0.2)[0], MOVED.old_logprobs)
                     .sign(), MOVED.advantages.sign())),
    ],
    [
        ("Is the normaliser that of the micro-batch? Then the result depends on how it is cut.",
         spo_wrong(lambda o, batch, mask, z: -(o * mask).sum() / mask.sum().clamp(min=1))),
        ("Is the normaliser that of the micro-batch? Then the result depends on how it is cut.",
         spo_wrong(lambda o, batch, mask, z: -(o * mask).sum() / batch.mask.sum())),
        ("Do you divide by all places, padding too? Z counts tokens.",
         spo_wrong(lambda o, batch, mask, z: -(o * mask).mean())),
        ("Do you divide by rows? Z counts tokens.",
         spo_wrong(lambda o, batch, mask, z: -(o * mask).sum(1).mean())),
        ("Is your ratio always 1? pi_old is the policy that sampled, not the one of now.",
         lambda logprobs, batch, *rest: reference.spo_loss(
             logprobs, batch._replace(old_logprobs=logprobs.detach()), *rest)),
        ("Is there no clip in the loss?",
         lambda logprobs, batch, mask, z, clip_eps: (
             -((logprobs - batch.old_logprobs).exp() * batch.advantages * mask).sum() / max(z, 1),
             reference.spo_loss(logprobs, batch, mask, z, clip_eps)[1])),
        ("Do you use the log-probability? SPO's objective has a ratio.",
         lambda logprobs, batch, mask, z, clip_eps: (
             -(logprobs * batch.advantages * mask).sum() / max(z, 1),
             reference.spo_loss(logprobs, batch, mask, z, clip_eps)[1])),
        ("Is the sign that of an objective? A loss is minimised.",
         spo_wrong(lambda o, batch, mask, z: (o * mask).sum() / max(z, 1))),
        ("Do you train tokens outside M?",
         spo_wrong(lambda o, batch, mask, z: -(o * batch.mask).sum() / max(z, 1))),
        ("What if nothing is trained? You divide 0 by 0.",
         spo_wrong(lambda o, batch, mask, z: -(o * mask).sum() / torch.tensor(float(z)))),
        ("Is it a mean of the rows' means? Z counts tokens.",
         spo_wrong(lambda o, batch, mask, z: -reference.masked_mean(o, mask, 1).mean())),
        ("Is it a mean of the rows' means? Z counts tokens.",
         spo_wrong(lambda o, batch, mask, z: -reference.masked_mean(o, mask, 1).sum() / max(z, 1))),
        ("Do you take the log-probability for the log-ratio? Something is to be subtracted.",
         lambda logprobs, batch, *rest: reference.spo_loss(
             logprobs, batch._replace(old_logprobs=0 * logprobs), *rest)),
        ("Where the mask is False nothing is trained: did the clip take a gradient away there?",
         lambda logprobs, batch, mask, normaliser, clip_eps: (
             reference.spo_loss(logprobs, batch, mask, normaliser, clip_eps)[0],
             reference.spo_loss(logprobs, batch, batch.mask, 1, clip_eps)[1])),
        ("Is the log-ratio turned round?",
         lambda logprobs, batch, *rest: reference.spo_loss(
             batch.old_logprobs, batch._replace(old_logprobs=logprobs), *rest)),
        ("Do you whiten the advantages? That can turn a plus into a minus.", whitened),
    ],
    drawn_spo,
    gradient=0,
)  # fmt: skip


# ----------------------------------------------------------------------------------------- 3. MPO

BLOCK_WEIGHTS = Task(
    "block_weights",
    PARTS[2],
    4,
    [
        Case("a future share of one half, K = 3", (3, 0.5), [0.5, 0.25, 0.25]),
        Case("uniform, K = 4", (4, "uniform"), [0.25] * 4),
        Case("joint, K = 3", (3, "joint"), [1.0] * 3),
        Case("no future share", (3, 0.0), [1.0, 0.0, 0.0]),
        Case("a share, but K = 1", (1, 0.5), [0.5],
             "What becomes of the share if K = 1? There are no K - 1 tokens to divide it among."),
        Property("all but joint sum to 1, also for K = 1",
                 lambda f: all(near(f(k, w).sum(), 1) for k, w in
                               [(1, "uniform"), (2, 0.4), (5, 0.2), (5, "uniform")])),
    ],
    [
        ("What becomes of the share if K = 1? The first token's weight does not change.",
         lambda k, w: torch.ones(1) if k == 1 else reference.block_weights(k, w)),
        ("Does every future token have the whole share?",
         lambda k, w: torch.tensor([1 - w] + [w] * (k - 1)) if isinstance(w, float)
         else reference.block_weights(k, w)),
        ("Among how many tokens is the share divided? The first one is not in the future.",
         lambda k, w: torch.tensor([1 - w] + [w / k] * (k - 1)) if isinstance(w, float)
         else reference.block_weights(k, w)),
        ("Have you turned round the share? It is the future's, not the first token's.",
         lambda k, w: torch.tensor([w] + [(1 - w) / max(1, k - 1)] * (k - 1))
         if isinstance(w, float) else reference.block_weights(k, w)),
        ("Do the future tokens share in equal parts? Yours have less the later they come.",
         lambda k, w: torch.tensor([w**n for n in range(k)]) / sum(w**n for n in range(k))
         if isinstance(w, float) else reference.block_weights(k, w)),
        ("Do the future tokens share in equal parts? Yours have less the later they come.",
         lambda k, w: torch.tensor([w**n for n in range(k)]) if isinstance(w, float)
         else reference.block_weights(k, w)),
        ("Do joint weights sum to 1? Eq. 8 is a plain product of ratios.",
         lambda k, w: reference.block_weights(k, "uniform" if w == "joint" else w)),
        ("Do uniform weights sum to 1?",
         lambda k, w: reference.block_weights(k, "joint" if w == "uniform" else w)),
    ],
    lambda rng: (rng.randint(2, 7), rng.random()),
)  # fmt: skip


def block_wrong(*, tail="scaled", start="mask", layout=None, first_only=False, backward=False,
                weights=None, pad=False, late=0, turned=False, last=False):  # fmt: skip
    """A wrong block_log_ratio, as a double loop. tail: "scaled", or "cut" without rescaling; start:
    blocks count from the "mask" or the "row"; pad: what is outside the mask counts as tokens; late:
    windows begin so many tokens later; beta "turned" round, or its "last" weights at the end."""

    def wrong(log_ratio, mask, block_size, layout_, weights_):
        how, weigh = layout or layout_, weights or weights_
        beta, out = reference.block_weights(block_size, weigh), torch.zeros_like(log_ratio)
        beta = beta.flip(0) if turned else beta
        for i, row in enumerate(mask.tolist()):
            inside = [t for t, m in enumerate(row) if m]
            for t in inside:
                origin = inside[0] if start == "mask" else 0
                at = t - (t - origin) % block_size if how == "block" else t + late
                span = range(at, at + block_size) if not backward else range(t, t - block_size, -1)
                kept = [
                    (n, u) for n, u in enumerate(span) if 0 <= u < len(row) and (pad or u in inside)
                ]
                skipped = block_size - len(kept) if last else 0
                kept = [(n + skipped, u) for n, u in kept]
                total = sum(float(beta[n]) for n, _ in kept)
                scaled = tail == "scaled" and weigh != "joint"
                x = sum(float(beta[n]) * log_ratio[i, u] for n, u in kept)
                if not first_only or at == t:
                    out[i, t] = x / total if scaled and total else x
        return out

    return wrong


def joint_scaled(log_ratio, mask, block_size, layout, weights):
    how = (mask, block_size, layout, "uniform" if weights == "joint" else weights)
    return block_wrong()(log_ratio, *how) * (block_size if weights == "joint" else 1)


def log_of_mean(log_ratio, mask, block_size, layout, weights):
    """The weighted mean of ratios in the place of that of log-ratios."""
    ratios = block_wrong()(log_ratio.exp(), mask, block_size, layout, weights)
    return ratios.clamp(min=1e-30).log() * mask


L = tensor([1.0, 2.0, 4.0, 8.0, 77.0], [3.0, 5.0, 77.0, 77.0, 77.0])
ROWS = tensor([True] * 4 + [False], [True] * 2 + [False] * 3)
LATE = tensor([[False, True, True, True, False]])

BLOCK_LOG_RATIO = Task(
    "block_log_ratio",
    PARTS[2],
    8,
    [
        Case("windows of two, uniform", (L, ROWS, 2, "window", "uniform"),
             [[1.5, 3.0, 6.0, 8.0, 0.0], [4.0, 5.0, 0.0, 0.0, 0.0]]),
        Case("blocks of three, uniform", (L, ROWS, 3, "block", "uniform"),
             [[7 / 3] * 3 + [8.0, 0.0], [4.0, 4.0, 0.0, 0.0, 0.0]]),
        Case("windows of three, joint", (L, ROWS, 3, "window", "joint"),
             [[7.0, 14.0, 12.0, 8.0, 0.0], [8.0, 5.0, 0.0, 0.0, 0.0]]),
        Case("windows of three, share one half", (L, ROWS, 3, "window", 0.5),
             [[2.0, 4.0, 16 / 3, 8.0, 0.0], [11 / 3, 5.0, 0.0, 0.0, 0.0]]),
        Case("blocks in a row that starts late", (L[:1], LATE, 2, "block", "uniform"),
             [[0.0, 3.0, 3.0, 8.0, 0.0]]),
        Property("K = 1 leaves the log-ratios of single tokens, with a share too",
                 lambda f: all(near(f(L, ROWS, 1, layout, weights), L * ROWS)
                               for layout in ("window", "block") for weights in ("uniform", 0.5))),
        Property("joint blocks longer than the row have its sum",
                 lambda f: near(f(L, ROWS, 9, "block", "joint")[0, :4], [15.0] * 4)),
        Property("a gradient passes through to the tokens it is made of",
                 lambda f: near(descend(lambda x: -f(x, ROWS, 9, "block", "joint")[0, 0], L)[0, :4],
                                [1.0] * 4)),
    ],
    [
        ("What happens to the weights where fewer than K tokens are left? Yours sum to less "
         "than 1.", block_wrong(tail="cut")),
        ("Does your window reach past the row's last token? There is no log-ratio.",
         block_wrong(pad=True)),
        ("Do your blocks count from the batch's first column? Count from the row's own token.",
         block_wrong(start="row")),
        ("Do you return windows where blocks are asked for?", block_wrong(layout="window")),
        ("Do you return blocks where windows are asked for?", block_wrong(layout="block")),
        ("Do all tokens of a block have its ratio? Only the first one does.",
         block_wrong(first_only=True)),
        ("Does your window look back? An action is a token and those after it.",
         block_wrong(backward=True)),
        ("Does your window begin after its token? It begins with it.", block_wrong(late=1)),
        ("Which weight has the first token? You count beta from the other end.",
         block_wrong(turned=True)),
        ("Which weights are left where fewer than K tokens are? The first ones, not the last.",
         block_wrong(last=True)),
        ("Is joint a mean? Its weights are not scaled.", lambda l, mask, k, layout, weights:
         block_wrong()(l, mask, k, layout, "uniform" if weights == "joint" else weights)),
        ("Are joint weights scaled up where fewer than K tokens are left? Only the others are.",
         joint_scaled),
        ("Are only windows rescaled where fewer than K tokens are left, and blocks not?",
         lambda l, mask, k, layout, weights: block_wrong(
             tail="cut" if layout == "block" else "scaled")(l, mask, k, layout, weights)),
        ("Is uniform a sum? Its weights sum to 1.", lambda l, mask, k, layout, weights:
         block_wrong()(l, mask, k, layout, "joint" if weights == "uniform" else weights)),
        ("Is it a mean of ratios? The weights belong to logarithms.", log_of_mean),
        ("What stands outside the mask?", lambda l, mask, *rest:
         reference.block_log_ratio(l, mask, *rest) + l * ~mask),
    ],
    lambda rng: (uniform(rng, 3, 5, low=-2, high=2), row_mask(rng, 3, 5), rng.randint(2, 3),
                 "window", "uniform"),
    gradient=0,
)  # fmt: skip


def mpo_cfg(block_size=2, layout="window", weights="uniform", scale_eps=False):
    return SimpleNamespace(
        block_size=block_size, layout=layout, weights=weights, scale_eps=scale_eps, clip_eps=0.2
    )


def eps_wrong(norm, tail=True, start="mask", pad=True, rescaled=True):
    """A wrong scaled_eps: norm(weights) in the place of the norm; tail: the end is as it should;
    start: blocks count from the "mask" or the "row"; pad: places before the mask count as tokens;
    rescaled: so are the weights that are left at the end."""

    def wrong(mask, cfg):
        out = torch.zeros(mask.shape)
        k = cfg.block_size
        for i, row in enumerate(mask.tolist()):
            inside = [t for t, m in enumerate(row) if m]
            for t in inside:
                origin = inside[0] if start == "mask" else 0
                at = t - (t - origin) % k if cfg.layout == "block" else t
                left = min(k, inside[-1] + 1 - at) if tail else k
                skipped = 0 if pad else max(0, inside[0] - at)
                beta = reference.block_weights(k, cfg.weights)[skipped:left]
                beta = beta / beta.sum() if rescaled and cfg.weights != "joint" else beta
                out[i, t] = cfg.clip_eps * norm(beta)
        return out

    return wrong


R2 = 0.5**0.5
SCALED_EPS = Task(
    "scaled_eps",
    PARTS[2],
    5,
    [
        Case("windows of two, uniform", (ROWS, mpo_cfg()),
             [[0.2 * R2, 0.2 * R2, 0.2 * R2, 0.2, ANY], [0.2 * R2, 0.2, ANY, ANY, ANY]]),
        Case("blocks of four, joint", (ROWS, mpo_cfg(4, "block", "joint")),
             [[0.4] * 4 + [ANY], [0.2 * 2**0.5] * 2 + [ANY] * 3]),
        Case("blocks of three, uniform", (ROWS, mpo_cfg(3, "block")),
             [[0.2 / R3] * 3 + [0.2, ANY], [0.2 * R2] * 2 + [ANY] * 3]),
        Case("windows of three, share one half", (ROWS, mpo_cfg(3, weights=0.5)),
             [[0.2 * 0.375**0.5] * 2 + [0.2 * 5**0.5 / 3, 0.2, ANY],
              [0.2 * 5**0.5 / 3, 0.2, ANY, ANY, ANY]]),
        Case("blocks in a row that starts late", (LATE[:, :4], mpo_cfg(layout="block")),
             [[ANY, 0.2 * R2, 0.2 * R2, 0.2]]),
        Property("K = 1 leaves the range as it is",
                 lambda f: near(f(ROWS, mpo_cfg(1))[ROWS], [0.2] * 6)),
    ],
    [
        ("Is that the norm, or its square?", eps_wrong(lambda b: (b * b).sum())),
        ("Which norm is it? You add up the weights.", eps_wrong(lambda b: b.sum())),
        ("Does the range grow with K whatever the weights?", eps_wrong(lambda b: len(b) ** 0.5)),
        ("Does a share change the range? You count tokens, whatever weights they have.",
         eps_wrong(lambda b: len(b) ** (0.5 if b.sum() > 1.5 else -0.5))),
        ("Does the range shrink with K whatever the weights?",
         eps_wrong(lambda b: len(b) ** -0.5)),
        ("Do you divide by K? That is no norm.", eps_wrong(lambda b: 1 / len(b))),
        ("Is that the norm alone? The range is cfg.clip_eps times it.",
         lambda mask, cfg: eps_wrong(lambda b: b.norm())(mask, cfg) / cfg.clip_eps),
        ("What happens to the weights where fewer than K tokens are left? Yours sum to less "
         "than 1.", eps_wrong(lambda b: b.norm(), rescaled=False)),
        ("Do you divide by the norm?", eps_wrong(lambda b: 1 / b.norm())),
        ("Is the range the same at the row's end? There R has other weights.",
         eps_wrong(lambda b: b.norm(), tail=False)),
        ("Do your blocks count from the batch's first column? Count from the row's own token.",
         eps_wrong(lambda b: b.norm(), start="row")),
        ("Do your blocks count from the batch's first column? Count from the row's own token.",
         eps_wrong(lambda b: b.norm(), start="row", pad=False)),
        ("Does every token of a block have its block's range?", lambda mask, cfg:
         eps_wrong(lambda b: b.norm())(mask, SimpleNamespace(**{**vars(cfg), "layout": "window"}))),
    ],
    lambda rng: (row_mask(rng, 3, 6), mpo_cfg(rng.randint(2, 4))),
)  # fmt: skip

# Windows of two, uniform: log R = log of 1.5, 1.5, 1 | 0.5, 0.5.
STEPS = logs([1.5, 1.5, 1.0], [0.5, 0.5, 9.0])
PLUS_MINUS = batch_of([[1.0, -1.0, 1.0], [-1.0, 1.0]])
HALF = logs([1.44, 1.0, 1.0], [0.64, 1.0, 1.0])  # windows: 1.2, 1, 1 | 0.8, 1


def mpo_wrong(change):
    """A wrong mpo_loss: change(objective, batch, normaliser) -> loss."""

    def wrong(log_ratio, batch, normaliser, cfg):
        how = (cfg.block_size, cfg.layout, cfg.weights)
        blocks = reference.block_log_ratio(log_ratio, batch.mask, *how)
        eps = reference.scaled_eps(batch.mask, cfg).float() if cfg.scale_eps else cfg.clip_eps
        objective, clipped = reference.clipped_surrogate(blocks, batch.advantages, eps)
        return change(objective, batch, normaliser), blocks, clipped

    return wrong


def eps_ignored(log_ratio, batch, normaliser, cfg):
    plain = SimpleNamespace(**{**vars(cfg), "scale_eps": False})
    return reference.mpo_loss(log_ratio, batch, normaliser, plain)


def token_loss(log_ratio, batch, normaliser, cfg):
    _, blocks, _ = reference.mpo_loss(log_ratio, batch, normaliser, cfg)
    objective, clipped = reference.clipped_surrogate(log_ratio, batch.advantages, cfg.clip_eps)
    return -(objective * batch.mask).sum() / normaliser, blocks, clipped & batch.mask


MPO_LOSS = Task(
    "mpo_loss",
    PARTS[2],
    5,
    [
        Case("windows of two", (logs([1.5, 0.6, 1.0], [0.5, 0.5, 9.0]), PLUS_MINUS, 10, mpo_cfg()),
             # R = 0.9487, 0.7746, 1 | 0.5, 0.5: objectives .9487, -.8, 1 | -.8, .5
             ((-(0.9**0.5) + 0.8 - 1.0 + 0.8 - 0.5) / 10,
              [[0.5 * LN(0.9), 0.5 * LN(0.6), 0.0], [LN(0.5), LN(0.5), 0.0]],
              [[0, 1, 0], [1, 0, 0]])),
        Case("blocks, N = 5", (STEPS, PLUS_MINUS, 5, mpo_cfg(2, "block")),
             # 1.2, -1.5, 1 | -.8, .5
             (-0.08, [[LN(1.5), LN(1.5), 0.0], [LN(0.5), LN(0.5), 0.0]], [[1, 0, 0], [1, 0, 0]])),
        Case("with --scale_eps", (HALF, PLUS_MINUS, 5, mpo_cfg(scale_eps=True)),
             ((-(1 + 0.2 * R2) + 1 - 1 + (1 - 0.2 * R2) - 1) / 5,
              [[LN(1.2), 0.0, 0.0], [LN(0.8), 0.0, 0.0]], [[1, 0, 0], [1, 0, 0]])),
        Property("a step of descent makes blocks with A > 0 likelier, and those with A < 0 less",
                 lambda f: torch.equal(
                     descend(lambda x: f(x, PLUS_MINUS, 5, mpo_cfg(2, "block"))[0],
                             0 * PLUS_MINUS.advantages)[:, 2:].sign(), tensor([[1.0], [0.0]]))),
    ],
    [
        ("Are ratio and clip those of single tokens?", token_loss),
        ("Is the normaliser that of the micro-batch? Then the result depends on how it is cut.",
         mpo_wrong(lambda o, batch, n: -(o * batch.mask).sum() / batch.mask.sum())),
        ("Is the sign that of an objective? A loss is minimised.",
         mpo_wrong(lambda o, batch, n: (o * batch.mask).sum() / n)),
        ("Is it a mean of the rows' means? N counts tokens.",
         mpo_wrong(lambda o, batch, n: -reference.masked_mean(o, batch.mask, 1).mean())),
        ("Is it a mean of the rows' means? N counts tokens.",
         mpo_wrong(lambda o, batch, n: -reference.masked_mean(o, batch.mask, 1).sum() / n)),
        ("Do you divide by rows? N counts tokens.",
         mpo_wrong(lambda o, batch, n: -(o * batch.mask).sum(1).mean())),
        ("Do you divide by all places, padding too? N counts tokens.",
         mpo_wrong(lambda o, batch, n: -(o * batch.mask).mean())),
        ("Has each token its own advantage? Yours have their row's first one.",
         lambda log_ratio, batch, *rest: reference.mpo_loss(
             log_ratio, batch._replace(
                 advantages=batch.advantages[:, :1].expand_as(log_ratio)), *rest)),
        ("Do you forget cfg.scale_eps?", eps_ignored),
    ],
    drawn_mpo,
    gradient=0,
)  # fmt: skip


# -------------------------------------------------------------------------------------- 4. Resets

TOKENIZER = common.build_tokenizer()
EOS = TOKENIZER.eos_token_id


def ids_of(text: str, end=True) -> list[int]:
    return common.encode(TOKENIZER, text) + [EOS] * end


def lines_wrong(*, end_counts=False, blank_counts=False, delimiter_starts=False, most=True,
                blank_first=False, shorter=False, always=False, fewer=0):  # fmt: skip
    """A wrong step_starts: what it takes for a step, or for its first token."""

    def wrong(ids, tokenizer, delimiter="\n", max_steps=20, stops=frozenset()):
        ends = {*tokenizer.all_special_ids, *(() if shorter else stops)}
        ended = ids and (always or ids[-1] in ends)
        ids = ids[:-1] if ended and not end_counts else ids
        text = [tokenizer.decode([id]) for id in ids]
        begins = [0, *(t + 1 for t, piece in enumerate(text) if piece == delimiter)]
        if not blank_counts:
            spans = zip(begins, [*begins[1:], len(ids)])
            full = [a for a, b in spans if "".join(text[a:b]).strip()]
            begins = sorted({0, *(full if blank_first else full[1:])})
        begins = [t - 1 if delimiter_starts and t else t for t in begins if t < len(ids) or not t]
        return begins[: max_steps - fewer] if most else begins

    return wrong


STEP_STARTS = Task(
    "step_starts",
    PARTS[3],
    5,
    [
        Case("three lines", (ids_of("3+4=7\n7-2=5\n#### 5"), TOKENIZER), [0, 6, 12]),
        Case("an answer that ends in a line break", (ids_of("12\n34\n"), TOKENIZER), [0, 3]),
        Case("an answer that was cut", (ids_of("12\n3", end=False), TOKENIZER), [0, 3]),
        Case("a line with nothing in it", (ids_of("1\n \n2"), TOKENIZER), [0, 4]),
        Case("blank lines at the beginning", (ids_of("\n \n1\n2"), TOKENIZER), [0, 5]),
        Case("at most two steps", (ids_of("1\n2\n3\n4"), TOKENIZER, "\n", 2), [0, 2]),
        Case("another delimiter, another stop", (ids_of("1;2;X", end=False), TOKENIZER, ";", 20,
             {*ids_of("X", end=False)}), [0, 2]),
        Property("steps put together are the answer",
                 lambda f: sorted({*f(ids_of("1\n2\n\n3"), TOKENIZER)}) ==
                 list(f(ids_of("1\n2\n\n3"), TOKENIZER)) == [0, 2, 5]),
    ],
    [
        ("Is the end token a step of its own?", lines_wrong(end_counts=True)),
        ("Does a line with nothing in it count?", lines_wrong(blank_counts=True)),
        ("Do blank lines at the beginning make a step? They belong to the first one with text.",
         lines_wrong(blank_first=True)),
        ("To which step does the delimiter belong? It ends one, it does not begin one.",
         lines_wrong(delimiter_starts=True)),
        ("Do you keep to max_steps?", lines_wrong(most=False)),
        ("Do you stop one step too early? max_steps are allowed.", lines_wrong(fewer=1)),
        ("Do you take off the last token whatever it is? An answer may be cut.",
         lines_wrong(always=True)),
        ("Do you forget `stops`? They end an answer too.", lines_wrong(shorter=True)),
        ("Do you always look for a line break?", lambda ids, tokenizer, delimiter="\n", *rest:
         reference.step_starts(ids, tokenizer, "\n", *rest)),
    ],
    drawn_text,
)  # fmt: skip


def step_of(t: int, starts: list[int]) -> int:
    return sum(start <= t for start in starts)


def uncertain(below, otherwise=None):
    """A wrong localise_uncertain: below(p, threshold), and the step if no token is."""

    def wrong(probs, starts, threshold):
        for t, p in enumerate(probs):
            if below(p, threshold):
                return step_of(t, starts)
        return (otherwise or localise_surprise)(probs, starts)

    return wrong


def uncertain_means(probs, starts, threshold):
    spans = zip(starts, [*starts[1:], len(probs)])
    means = [sum(probs[a:b]) / (b - a) for a, b in spans]
    return next((k for k, p in enumerate(means, 1) if p < threshold), means.index(min(means)) + 1)


DOUBTS = [0.99, 0.97, 0.95, 0.6, 0.99, 0.2, 0.99]
LOCALIZE_UNCERTAIN = Task(
    "localise_uncertain",
    PARTS[3],
    4,
    [
        Case("two doubts", (DOUBTS, [0, 2, 4], 0.9), 2),
        Case("the doubt is a step's first token", (DOUBTS, [0, 3, 5], 0.5), 3),
        Case("right at the threshold", (DOUBTS, [0, 3, 5], 0.6), 3),
        Case("no doubt, so the least likely token", (DOUBTS, [0, 2, 6], 0.1), 2),
        Case("in the first step", ([0.4, 0.9, 0.3], [0, 2], 0.5), 1),
        Case("three doubts", ([0.4, 0.9, 0.3, 0.9, 0.45], [0, 2, 4], 0.5), 1),
    ],
    [
        ("Are your steps numbered from 0?",
         lambda *args: reference.localise_uncertain(*args) - 1),
        ("Do you count one step too many?",
         lambda *args: reference.localise_uncertain(*args) + 1),
        ("Do you average over a step? One token in doubt is enough.",
         uncertain_means),
        ("Do you look for the least likely token of all? The first doubt counts.",
         lambda probs, starts, threshold: localise_surprise(probs, starts)),
        ("Do you take the last doubt? The first one counts.",
         lambda probs, starts, threshold: step_of(
             max((t for t, p in enumerate(probs) if p < threshold), default=probs.index(
                 min(probs))), starts)),
        ("Is a token right at the threshold a doubt?", uncertain(lambda p, rho: p <= rho)),
        ("What if there is no doubt? The first step is not the answer.",
         uncertain(lambda p, rho: p < rho, lambda probs, starts: 1)),
        ("What if there is no doubt? The last step is not the answer.",
         uncertain(lambda p, rho: p < rho, lambda probs, starts: len(starts))),
        ("Do you return a token instead of a step?", lambda probs, starts, threshold: next(
            (t for t, p in enumerate(probs) if p < threshold), probs.index(min(probs)))),
        ("Do you look for the step that STARTS with a doubt? Any of its tokens will do.",
         lambda probs, starts, threshold: next(
             (k for k, t in enumerate(starts, 1) if probs[t] < threshold),
             localise_surprise(probs, starts))),
        ("Is a doubt in a step's first token put into the step before?",
         lambda probs, starts, threshold: max(1, step_of(
             next((t for t, p in enumerate(probs) if p < threshold), probs.index(min(probs))) - 1,
             starts))),
        ("Is a doubt in a step's first token put into the step before?",
         lambda probs, starts, threshold: step_of(
             next((t for t, p in enumerate(probs) if p < threshold), probs.index(min(probs))) - 1,
             starts)),
    ],
    drawn_doubts,
)  # fmt: skip

GROUP = batch_of([[1.0] * 3, [-0.5]], [[0.5, 0.5, 0.25], [0.5]])
SCORES = tensor([-1.0, -2.0, -6.0], [-4.0, 8.0, 8.0])


def reset_wrong(change):
    """A wrong reset_loss: change(objective (B, T), mask, normaliser) -> loss."""

    def wrong(logprobs, batch, normaliser, clip_eps):
        objective, clipped = batch.advantages * logprobs, torch.zeros_like(batch.mask)
        if clip_eps:
            log_ratio = logprobs - batch.old_logprobs
            objective, clipped = reference.clipped_surrogate(log_ratio, batch.advantages, clip_eps)
        return change(objective, batch.mask, normaliser), clipped

    return wrong


RESET_LOSS = Task(
    "reset_loss",
    PARTS[3],
    7,
    [
        Case("two of eight rollouts", (SCORES, GROUP, 8, 0.0), (0.125, [[0] * 3] * 2)),
        Case("the same with a clip", (logs([0.75, 0.5, 0.25], [0.25, 1.0, 1.0]), GROUP, 4, 0.2),
             # 1.2, 1, 1 | -.4
             ((-3.2 / 3 + 0.4) / 4, [[1, 0, 0], [1, 0, 0]])),
        Property("a rollout weighs the same whatever its length",
                 lambda f: near(f(torch.full((1, 2), -1.0), batch_of([[1.0] * 2]), 1, 0.0)[0],
                                f(torch.full((1, 9), -1.0), batch_of([[1.0] * 9]), 1, 0.0)[0])),
        Property("micro-batches add up to the whole",
                 lambda f: near(f(SCORES, GROUP, 2, 0.0)[0],
                                f(SCORES[:1], batch_of([[1.0] * 3]), 2, 0.0)[0]
                                + f(SCORES[1:, :1], batch_of([[-0.5]]), 2, 0.0)[0])),
        Property("a step of descent makes a rollout with A > 0 likelier",
                 lambda f: (descend(lambda x: f(x, GROUP, 2, 0.0)[0], SCORES)
                            * GROUP.advantages)[GROUP.mask].min() > 0),
    ],
    [
        ("Is it a mean over tokens? Long rollouts then weigh more.",
         reset_wrong(lambda o, mask, n: -reference.masked_mean(o, mask))),
        ("Is it a sum over a rollout's tokens? Long rollouts then weigh more.",
         reset_wrong(lambda o, mask, n: -(o * mask).sum() / n)),
        ("Is the normaliser the rows of the micro-batch? Then the result depends on how it is cut.",
         reset_wrong(lambda o, mask, n: -reference.masked_mean(o, mask, 1).mean())),
        ("Is the sign that of an objective? A loss is minimised.",
         reset_wrong(lambda o, mask, n: reference.masked_mean(o, mask, 1).sum() / n)),
        ("Does padding count in a rollout's mean?",
         reset_wrong(lambda o, mask, n: -(o * mask).mean(1).sum() / n)),
        ("Do you always use a ratio? Without a clip this loss has none.",
         lambda logprobs, batch, n, clip_eps: (
             -reference.masked_mean((logprobs - batch.old_logprobs).exp() * batch.advantages,
                                    batch.mask, 1).sum() / n,
             torch.zeros_like(batch.mask)) if not clip_eps
         else reference.reset_loss(logprobs, batch, n, clip_eps)),
        ("With a clip, do you take the log-probability for the log-ratio?",
         lambda logprobs, batch, *rest: reference.reset_loss(
             logprobs, batch._replace(old_logprobs=0 * logprobs), *rest)),
        ("Is your ratio always 1? pi_old is the policy that sampled, not the one of now.",
         lambda logprobs, batch, *rest: reference.reset_loss(
             logprobs, batch._replace(old_logprobs=logprobs.detach()), *rest)),
        ("Without a clip, what has it taken away? Nothing, so False everywhere.",
         lambda logprobs, batch, n, clip_eps: (
             reference.reset_loss(logprobs, batch, n, clip_eps)[0], batch.mask) if not clip_eps
         else reference.reset_loss(logprobs, batch, n, clip_eps)),
        ("Do you forget clip_eps?",
         lambda logprobs, batch, n, clip_eps: reference.reset_loss(logprobs, batch, n, 0.0)),
    ],
    drawn_reset,
    gradient=0,
)  # fmt: skip

TASKS = [
    GROUP_ADVANTAGES, MASKED_MEAN, TOKEN_LOGPROBS, CLIPPED_SURROGATE, K3,
    SEGMENT_STARTS, CHAIN_ADVANTAGES, TREE_ADVANTAGES, TRAINED_TOKENS, SPO_LOSS,
    BLOCK_WEIGHTS, BLOCK_LOG_RATIO, SCALED_EPS, MPO_LOSS,
    STEP_STARTS, LOCALIZE_UNCERTAIN, RESET_LOSS,
]  # fmt: skip
