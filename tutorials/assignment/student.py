"""The assignment: seventeen formulas of three papers on credit assignment, one to a function.

Replace each `raise NotImplementedError` by the formula that its docstring describes, then run

    python -m pytest tutorials/assignment

README.md has the order, what to read for each, and the rules. Names used throughout:

    B rows (answers) of a batch, T trained tokens in the longest of them, V words of the vocabulary,
    P problems, G answers to each, K tokens in a block
    mask (B, T) bool    True where a row has a trained token, False where it is padding
    batch               has .input_ids (B, L): context and trained tokens of each row, right-padded;
                        .context_lens (B,); .targets (B, T): the trained tokens; .mask (B, T);
                        .advantages (B, T); .old_logprobs (B, T): of the policy that sampled
    log-probabilities and log-ratios are natural, so in nats; rewards, values, advantages have the
    unit of the reward unless they are divided by a standard deviation

No function may change what it is given. Where padding stands, anything may stand: mask it.
"""

import torch
from torch import Tensor

# ------------------------------------------------------------ 1. What all methods share: GRPO, PPO


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """GRPO (arXiv 2402.03300): how much better was an answer than the others to its problem?

    rewards (P, G), a group to a row. A = r minus the mean of its group and, if `scale`, divided by
    the group's standard deviation: that of the G rewards as they are, not an estimate from a
    sample. A group whose rewards are all equal has nothing to teach: exactly 0.
    Returns (P, G). Two right of four, scaled: 1, 1, -1, -1.
    """
    raise NotImplementedError


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x (B, T) over the places where mask is True: over all of them, or along `dim`.

    Where mask is True nowhere, 0. Returns (), or (B,) for dim = 1.
    """
    raise NotImplementedError


def token_logprobs(model, batch, temperature: float = 1.0) -> Tensor:
    """log pi(y_t | what stands before it) of each trained token, at the sampling temperature.

    model(batch.input_ids).logits is (B, L, V). The logits at position i are the model's opinion on
    the token at position i + 1. In row b the trained tokens follow right after context_lens[b]
    tokens of context. Temperature T samples from softmax(logits / T).
    Returns (B, T), 0 outside batch.mask.
    """
    raise NotImplementedError


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_eps):
    """PPO (arXiv 1707.06347, Eq. 7), to be maximised, for each action on its own:

        min(r A, clip(r, 1 - eps, 1 + eps) A),    r = pi(action) / pi_old(action)

    log_ratio: log r; it is cut to [-10, 10] first, so that no r is infinite. advantages: A.
    clip_eps: eps, a number or a tensor. Returns a pair, both of log_ratio's shape: the objective,
    and (bool) where the clip has taken the gradient away, for the minimum is flat in r there.
    """
    raise NotImplementedError


def k3(log_ratio: Tensor) -> Tensor:
    """An estimate of KL(p || q) from each token drawn from p (J. Schulman, "Approximating KL
    Divergence", 2020). With r = q / p, the mean of -log r over p is the KL, but single values can
    be negative; the mean of r - 1 is 0, and added to it they cannot.

    log_ratio: log r of the token, cut to [-10, 10] first. Returns its shape, in nats.
    """
    raise NotImplementedError


# ------------------------------------------------------ 2. SPO: segments and values (2505.23564)


def segment_starts(probs, interval: int, threshold: float) -> list[int]:
    """The cutpoint partition (Section 4): index of the first token of each segment.

    probs (T,): a list or tensor, pi_old's probability of each token that it sampled. A cutpoint is
    a token whose probability is strictly below `threshold`. Segments begin right at cutpoints
    number 1, 1 + interval, 1 + 2 interval, ... Without a cutpoint: [].
    """
    raise NotImplementedError


def chain_advantages(
    starts: list[int], values: list[float], reward: float, length: int
) -> Tensor:
    """SPO-chain (Eq. 2): a segment earns the value it added,

        A_k = V(state at the end of segment k) - V(state at its start)

    starts: first token of each segment; a segment ends where the next one starts, the last one at
    `length`. values: estimates of V at the starts. The answer's end needs no estimate: its value is
    the reward it got. Returns (length,), a tensor of floats: each token has its segment's A; tokens
    before the first start have 0.
    """
    raise NotImplementedError


def tree_advantages(parents: list[int], rewards: list[float], scale: bool = False):
    """SPO-tree (Section 4). V(n) of a node with children is the mean of V over its direct children,
    of a leaf its reward; A(n) = V(n) - V(parent), and 0 for a root.

    parents: index of each node's parent, -1 for a root; a parent stands before its children.
    rewards: one a node, but they count for leaves only. scale: A(n) is divided by the standard
    deviation of V over n and its siblings (of these numbers as they are); siblings that are all
    equal have A = 0. Returns two lists of floats: V and A of each node.
    """
    raise NotImplementedError


def trained_tokens(batch, cfg) -> Tensor:
    """SPO's probability mask M_t: only tokens that pi_old gave strictly less than cfg.threshold are
    trained. With cfg.mask False all tokens of batch.mask are. Returns (B, T) bool."""
    raise NotImplementedError


def spo_loss(logprobs: Tensor, batch, mask: Tensor, normaliser: int, clip_eps: float):
    """One micro-batch's part of SPO's loss, to be minimised,

        L = -1/Z sum_t M_t min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)

    logprobs (B, T): log pi(y_t) now. mask: M (B, T). normaliser: Z, the sum of M over ALL
    micro-batches of the optimiser step; if it is 0, so is the loss. Returns L (a scalar) and (B, T)
    bool: the tokens of M where the clip took the gradient away.
    """
    raise NotImplementedError


# ------------------------------------------------- 3. MPO: K tokens are one action (2602.14386)


def block_weights(block_size: int, weights: str | float) -> Tensor:
    """(K,) beta_1 ... beta_K in float64: the weight of each token of a block of K = block_size.

    weights: "joint": 1 each (Eq. 8); "uniform": equal, with sum 1; or a number p in [0, 1): the
    K - 1 future tokens share p in equal parts, the first token has the rest: 1 - p for any K, also
    for K = 1, where nobody is left to have the share.
    """
    raise NotImplementedError


def block_log_ratio(log_ratio: Tensor, mask: Tensor, block_size: int, layout: str, weights):
    """(B, T) log R: the log-ratio of the action that each token belongs to (Eq. 8, 9, 11),

        log R = beta_1 l_t + beta_2 l_{t+1} + ... + beta_K l_{t+K-1}

    log_ratio (B, T): l, of single tokens; outside the mask it means nothing. beta: block_weights.
    layout "window": each token t has its own sum, of the K tokens from t on.
    layout "block": the row is cut into blocks of K, counted from its first token of the mask; all
    tokens of a block have its one sum.
    Near the row's end fewer than K tokens are left: beta is cut to those and, unless "joint",
    scaled up to sum 1 again. 0 outside the mask. mask is one run of True in each row.
    """
    raise NotImplementedError


def scaled_eps(mask: Tensor, cfg) -> Tensor:
    """(B, T) clip range for each token's ratio R: cfg.clip_eps times the Euclidean norm of the
    weights that R is made with (those that are left, rescaled, near the end).

    For independent l_t of one size, log R has that norm times their spread, so the clip acts as
    often as on single tokens. cfg has .clip_eps, .block_size, .layout and .weights. Outside the
    mask any value will do.
    """
    raise NotImplementedError


def mpo_loss(log_ratio: Tensor, batch, normaliser: int, cfg):
    """One micro-batch's part of MPO's loss, to be minimised: PPO's, with R in the place of r,

        L = -1/N sum_t min(R_t A_t, clip(R_t, 1 - eps, 1 + eps) A_t)

    log_ratio (B, T): l, of single tokens. normaliser: N, the tokens of ALL micro-batches of the
    optimiser step, never 0. eps: cfg.clip_eps, or scaled_eps if cfg.scale_eps. Returns three: L (a
    scalar), log R (B, T), and (B, T) bool: where the clip took the gradient away.
    """
    raise NotImplementedError


# ------------------------------------------------------- 4. Resets: RRPO and SRPO (2605.25507)


def step_starts(ids, tokenizer, delimiter="\n", max_steps=20, stops=frozenset()) -> list[int]:
    """Index of the first token of each step of an answer; [0, ...]. Steps are what a reset keeps.

    ids: the answer's tokens; tokenizer.decode([id]) is a token's text. Here a token is a character
    or less, and `delimiter` is one token. A step ends after a delimiter. A line with nothing but
    white space is no step and stays with the one before: "1\\n2\\n\\n3" gives [0, 2, 5]. Blank
    lines before the first text have none before them and belong to its step: "\\n\\n1\\n2" gives
    [0, 4]. A last id that is one of tokenizer.all_special_ids or of the ids in `stops` ended the
    answer and is no step. At most max_steps: the last of them holds the rest.
    """
    raise NotImplementedError


def localise_uncertain(probs: list[float], starts: list[int], threshold: float) -> int:
    """The step to go back to, numbered from 1: the first one that holds a token which was sampled
    at a probability strictly below `threshold`; without such a token, the step that holds the least
    likely one. (A localiser of this repository's, not of the paper's.)

    probs (T,): pi(y_t). starts: first token of each step, beginning with 0.
    """
    raise NotImplementedError


def reset_loss(logprobs: Tensor, batch, normaliser: int, clip_eps: float):
    """One micro-batch's part of the loss of RRPO and SRPO, to be minimised: with 2G rollouts

        L = -1/2G sum_i A_i mean_t log pi(y_i,t)        over the trained tokens t of rollout i

    logprobs (B, T): log pi(y_t) now. normaliser: 2G, the rollouts of ALL micro-batches of the
    optimiser step, never 0. clip_eps: 0 for this loss; above 0, PPO's clipped objective of ratio
    and A (see clipped_surrogate) stands in the place of A log pi. Returns L (a scalar), and (B, T)
    bool: where the clip took the gradient away.
    """
    raise NotImplementedError
