"""What spo.py, mpo.py and reset_po.py share; nothing in here belongs to one algorithm.

    what flows               Problem, Rollout, Sample, Batch, Compute
    sampling                 sample, complete
    scoring                  collate, token_logprobs, score
    shared maths             group_advantages, clipped_surrogate, k3
    optimisation             minibatches, optimizer_step
    policy and warm start    the tokenizer, prompts, the built-in policy, load_policy, memory
    problems, answers        the built-in task and files; reward, step_starts
    evaluation
    settings                 arg, RunConfig, the command line
    a run                    set_up, training_steps, log_step, checkpoints, endings, display

Data flow:  prompt ids -> sample() -> Rollout -> credit assignment (in the scripts) -> Sample ->
collate() -> token_logprobs() -> loss (in the scripts). Everything is cut on token ids, and every
mask comes from lengths. A reader of a script needs the first four parts.
"""

import sys


def no_traceback_for_ctrl_c(kind, error, trace) -> None:
    """The imports below take seconds; Ctrl-C meanwhile ends in one line, as it does in `cli`."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped before anything had begun", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = no_traceback_for_ctrl_c

import argparse
import csv
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import zlib
from bisect import bisect_left
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Iterator, Literal, NamedTuple

import datasets
import filelock
import pyarrow.parquet
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers import GenerationConfig, HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast, get_linear_schedule_with_warmup
from transformers.cache_utils import DynamicLayer
from transformers.cache_utils import LinearAttentionCacheLayerMixin as StateLayer

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is said in one line here
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


# --------------------------------------------------------------------------------------- what flows


class BadInput(Exception):
    """Something the user gave cannot be used: `cli` prints it as one line and exits with code 2."""


class Problem(NamedTuple):
    question: str
    solution: str  # worked steps, one a line, then "#### answer": GSM8K's form
    answer: str
    checkable: bool = False  # True: `solution` is the only right text, so each step can be judged


@dataclass
class Rollout:
    prompt: list[int]
    ids: list[int]  # sampled ids, the end token included if there is one
    finished: bool  # False: cut by its budget, so without an end token
    reward: float = 0.0


@dataclass
class Sample:
    """What is trained on: `ids` after `context`, which carries neither gradient nor advantage."""

    context: list[int]
    ids: list[int]
    advantages: list[float] | None = None  # one per trained id
    old_logprobs: list[float] | None = None  # under the policy that sampled, one per trained id


class Batch(NamedTuple):
    input_ids: Tensor  # (B, L) context and trained ids, right-padded
    context_lens: Tensor  # (B,)
    targets: Tensor  # (B, T) the trained ids
    mask: Tensor  # (B, T) bool, True where a trained id stands
    advantages: Tensor  # (B, T) 0 outside the mask
    old_logprobs: Tensor  # (B, T) 0 outside the mask


@dataclass
class Compute:
    """How to compute: in one precision for sampling, old and new log-probs, or ratios would not
    begin at 1; and how much at once."""

    dtype: torch.dtype = torch.float32  # of forward passes (autocast), over fp32 weights
    sampling_tokens: int = 1 << 16  # rollouts sampled at once x their longest text
    training_tokens: int = 1 << 11  # samples in a forward pass x their longest text

    def autocast(self, device) -> torch.autocast:
        """Entered anew for each call: inside one context autocast keeps its low-precision copies of
        weights that have since been updated."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)


# ----------------------------------------------------------------------------------------- sampling


def sample(
    model,
    prefixes: list[list[int]],
    n: int = 1,
    *,
    max_new_tokens: int | list[int],
    eos: set[int],
    temperature: float = 1.0,
    greedy: bool = False,
    generator: torch.Generator | None = None,
    bar: str = "sampling",
    compute: Compute = Compute(),
) -> list[Rollout]:
    """`n` continuations of each prefix, prefix-major. Equal prefixes are drawn independently.

    max_new_tokens: one budget, or one per prefix. bar: what to call it if it takes long. Draws from
    softmax(logits / temperature) over the whole vocabulary, whatever the checkpoint's
    generation_config says: the sampled policy is the scored one. Raises ValueError for an empty
    prefix, n < 1, a temperature that is not above 0 (unless greedy), a number of budgets that is
    not one per prefix, or more positions than the model has.
    """
    one = isinstance(max_new_tokens, int)
    budgets = [max_new_tokens] * len(prefixes) if one else list(max_new_tokens)
    if n < 1 or not (greedy or temperature > 0) or len(budgets) != len(prefixes):
        raise ValueError("need n >= 1, a temperature above 0, and one budget or one per prefix")
    if any(not p or b < 0 or len(p) + b > window(model) for p, b in zip(prefixes, budgets)):
        raise ValueError(f"a prefix is empty, or longer with its budget than {window(model)}")
    rollouts = [Rollout(list(prefix), [], False) for prefix in prefixes for _ in range(n)]
    budgets = [budget for budget in budgets for _ in range(n)]
    # Prefixes of like length go together, so that little is padded. One without budget is done.
    queue = [i for i, budget in enumerate(budgets) if budget]
    queue.sort(key=lambda i: len(rollouts[i].prompt))
    was_training = model.training
    model.eval()
    lengths = [len(rollouts[i].prompt) + budgets[i] for i in queue]
    # inference_mode is faster, but in it autocast casts every weight at every token.
    low = compute.dtype != torch.float32
    try:
        with slow_bar(bar, len(queue), "answer") as done:
            for chosen in packed(queue, lengths, compute.sampling_tokens):
                parts, rooms = [rollouts[i] for i in chosen], [budgets[i] for i in chosen]
                with compute.autocast(model.device):
                    with torch.no_grad() if low else torch.inference_mode():
                        decode(model, parts, rooms, eos, temperature, greedy, generator, done)
    finally:
        model.train(was_training)
    return rollouts


def packed(items: list, lengths: list[int], most: int) -> Iterator[list]:
    """`items` in groups of at most `most` tokens, padding included; one that is longer alone."""
    group, longest = [], 0
    for item, length in zip(items, lengths):
        longest = max(longest, length)
        if group and (len(group) + 1) * longest > most:
            yield group
            group, longest = [], length
        group.append(item)
    if group:
        yield group


def decode(model, rollouts, budgets, eos, temperature, greedy, generator, bar) -> None:
    """Extend the R `rollouts` in place, as one batch, a token at a time until all have ended.

    Rollouts of one prefix that have drawn the same tokens so far have the same distribution of the
    next, so they share a row of the forward pass, from which each draws its own: S rows for S
    distinct texts, whose continuations are computed apart only from where they part.
    """
    device = model.device
    distinct = list(dict.fromkeys(tuple(rollout.prompt) for rollout in rollouts))
    cache = KeyValues(config=model.config)
    past = {cache_keyword(model): cache}
    hidden, mask, position = prefill(model, distinct, past, cache)  # (S, H), (S, W), (S, 1)
    number = {prefix: i for i, prefix in enumerate(distinct)}
    row = torch.tensor([number[tuple(r.prompt)] for r in rollouts], device=device)  # (R,) in 0..S-1
    live = list(zip(rollouts, budgets))
    vocab = model.get_output_embeddings().weight.shape[0]
    while True:
        parts = row.split(max(1, MAX_LOGITS // vocab))
        drawn = [draw(model, hidden, part, temperature, greedy, generator) for part in parts]
        token = torch.cat(drawn)  # (R,)
        for (rollout, _), id in zip(live, token.tolist()):
            rollout.ids.append(id)
            rollout.finished = id in eos
        going = [not r.finished and len(r.ids) < budget for r, budget in live]
        if not all(going):
            live = [entry for entry, goes in zip(live, going) if goes]
            bar.update(len(going) - len(live))
            if not live:
                return
            row, token = row[going], token[going]
        # The new rows: every pair of an old one and a token that somebody drew from it.
        pair, row = torch.unique(row * vocab + token, return_inverse=True)  # (S,), (R,)
        parent, token = pair // vocab, pair % vocab  # (S,)
        if not torch.equal(parent, torch.arange(len(mask), device=device)):
            cache.batch_select_indices(parent)
            mask, position = mask[parent], position[parent]
        mask, position = F.pad(mask, (0, 1), value=1), position + 1
        hidden = forward(model, token[:, None], mask, position, past)[:, -1]  # (S, H)


def forward(model, ids: Tensor, mask: Tensor, position: Tensor, past: dict) -> Tensor:
    """(S, L, H) hidden states of ids (S, L), which stand behind what `past` holds: the cache, by
    the name that the model has for it. mask: (S, kept + L), 0 at padding. position: (S, L)."""
    return model.base_model(
        ids, attention_mask=mask, position_ids=position, use_cache=True, **past
    ).last_hidden_state


def prefill(model, prefixes: list[tuple[int, ...]], past: dict, cache: "KeyValues"):
    """Compute S distinct prefixes. Leaves their keys and values in the empty cache, a row each,
    padded on the left to W columns, so that all get their next token in the same column. Returns
    the state behind each prefix (S, H), the mask (S, W), and each one's last position (S, 1).

    What prefixes have in common is computed once. One that begins another, as each boundary of an
    answer does, is a part of that text. Where texts begin alike, with a problem's prompt or the
    first words of a chat template, come their heads first, and in a second pass the tails.
    """
    device = model.device
    shares = all(type(layer) is DynamicLayer for layer in cache.layers)  # others drop what is past
    itself = prefixes, list(range(len(prefixes)))
    texts, text_of = outermost(prefixes) if shares else itself  # M texts
    heads = shared_heads(texts) if shares else texts
    trunks, trunk_of = outermost(heads) if shares else itself  # K: heads that begin no other one
    tails = [text[len(head) :] for text, head in zip(texts, heads)]

    def lengths(rows) -> Tensor:
        return torch.tensor([len(row) for row in rows], device=device)

    def left(rows, width: int) -> tuple[Tensor, Tensor]:  # (rows,) where each begins; its mask
        begin = width - lengths(rows)
        return begin, (torch.arange(width, device=device) >= begin[:, None]).long()

    def tensors(rows) -> list[Tensor]:
        return [torch.tensor(row, dtype=torch.long, device=device) for row in rows]

    ids = pad_sequence(tensors(trunks), True, padding_side="left")  # (K, L)
    begin, mask = left(trunks, ids.shape[1])  # (K,), (K, L)
    position = (mask.cumsum(1) - 1).clamp(min=0)  # from each row's first real token
    states = forward(model, ids, mask, position, past)  # (K, L, H)
    if cache.get_seq_length() != ids.shape[1]:
        raise RuntimeError(f"{type(model).__name__} has kept no keys and values of its prompts")
    if any(tails):
        width, row = max(map(len, heads)), torch.tensor(trunk_of, device=device)  # (M,)
        end = begin[row] + lengths(heads) - 1  # (M,) the column in which each head ends
        cache.move(row, end, width)
        states = columns_before(states, row, end, width)  # (M, width, H)
        begin, mask = left(heads, width)  # (M,), (M, width)
        ids = pad_sequence(tensors(tails), True)  # (M, E)
        mask = F.pad(mask, (0, ids.shape[1]), value=1)  # no real token sees padding on the right
        position = lengths(heads)[:, None] + torch.arange(ids.shape[1], device=device)
        states = torch.cat([states, forward(model, ids, mask, position, past)], 1)
    width, row = max(map(len, prefixes)), torch.tensor(text_of, device=device)  # (S,)
    end = begin[row] + lengths(prefixes) - 1  # (S,)
    if shares:
        cache.move(row, end, width)
    return states[row, end], left(prefixes, width)[1], lengths(prefixes)[:, None] - 1


def outermost(texts: list[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Those of `texts` that begin no other one, each once and in descending order; and for each of
    `texts` the index of one that it is or begins."""
    kept, place = [], {}
    for text in sorted({*texts}, reverse=True):  # right after one that it begins, if any
        if not kept or kept[-1][: len(text)] != text:
            kept.append(text)
        place[text] = len(kept) - 1
    return kept, [place[text] for text in texts]


def shared_heads(texts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The head of each of `texts`, which ascend or descend: what it has in common with the likest
    other one, or more, so that no tail is longer than some E. E is chosen for the fewest tokens in
    both passes, padding included; 0, so no tails, unless a second pass saves a tenth of them."""
    common = [len(os.path.commonprefix(pair)) for pair in pairwise(texts)]
    shared = [max(1, a, b) for a, b in zip([0, *common], [*common, 0])]

    def heads(most: int) -> list[tuple[int, ...]]:
        return [text[: max(n, len(text) - most)] for text, n in zip(texts, shared)]

    def tokens(most: int) -> float:
        trunks = outermost(heads(most))[0]
        two = len(trunks) * max(map(len, trunks)) + len(texts) * most
        return two / 0.9 if most else two

    longest = max(len(text) - n for text, n in zip(texts, shared))  # tail
    return heads(min((0, *(1 << i for i in range(longest.bit_length())), longest), key=tokens))


def columns_before(x: Tensor, row: Tensor, end: Tensor, width: int) -> Tensor:
    """(S, width, ...) of x (rows, columns, ...): of each x[row] the columns up to and with `end`.
    In place of what would be before the first column stands that one."""
    columns = end[:, None] - torch.arange(width - 1, -1, -1, device=end.device)  # (S, width)
    return x[row[:, None], columns.clamp(min=0)]


def draw(model, hidden, row, temperature, greedy, generator) -> Tensor:
    """(R,) next token of each rollout. hidden: (S, H) states before it; row: (R,) each one's."""
    rows, row = torch.unique(row, return_inverse=True)  # without those of other parts
    logits = head_logits(model, hidden[rows])  # (S, V)
    if greedy:
        return logits.argmax(-1)[row]
    # Inverse CDF: one random number a rollout; torch.multinomial draws one for every id.
    exact = exact_dtype(logits.device)
    cdf = (logits / temperature).softmax(-1).to(exact).cumsum(-1).index_select(0, row)  # (R, V)
    u = torch.rand(len(cdf), 1, dtype=exact, device=cdf.device, generator=generator)
    token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0]  # (R,)
    return token.clamp(max=cdf.shape[1] - 1)


def head_logits(model, hidden: Tensor) -> Tensor:
    """(N, V) logits of hidden states (N, H), in fp32 whatever the autocast dtype: bf16 has three
    digits, and where logits are about 20 it would move log-probs by more than a small update."""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.get_output_embeddings()(hidden.float())


def exact_dtype(device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which mps does not have


class KeyValues(DynamicCache):
    """transformers' cache, in the dtype that attention computes in under autocast: rotated keys are
    fp32, take twice the memory, and would be rounded again, all of them, for every token."""

    def update(self, keys, values, *args, **options):
        if torch.is_autocast_enabled(keys.device.type):
            dtype = torch.get_autocast_dtype(keys.device.type)
            keys, values = keys.to(dtype), values.to(dtype)
        return super().update(keys, values, *args, **options)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`. Of plain layers each is copied whole: indexing, as transformers
        does it, copies number by number on a CPU and takes five times as long."""
        for layer in self.layers:
            if type(layer) is DynamicLayer and layer.is_initialized:
                layer.keys = layer.keys.index_select(0, indices)
                layer.values = layer.values.index_select(0, indices)
            else:
                layer.batch_select_indices(indices)

    def move(self, row: Tensor, end: Tensor, width: int) -> None:
        """Keep the S rows `row`, as `columns_before` cuts them; (S, width) columns remain."""
        for layer in self.layers:  # keys and values: (rows, heads, columns, head size)
            for name in ("keys", "values"):
                kept = columns_before(getattr(layer, name).transpose(1, 2), row, end, width)
                setattr(layer, name, kept.transpose(1, 2))


def cache_keyword(model) -> str:
    """The name that the installed transformers has for keys and values kept from earlier tokens: by
    the model's signature, for many swallow a keyword that they do not know, and lose context.
    Raises ValueError for a model that takes none."""
    known = inspect.signature(model.base_model.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in known:
            return name
    raise ValueError("keeps no keys and values")


def complete(
    model, tokenizer, states, n: int, max_new_tokens: int, limit: int | None = None, **options
) -> list[Rollout]:
    """`n` rewarded completions of each state, state-major.

    A state is (prompt ids, answer ids so far, true answer); its rollouts' `prompt` holds the first
    two. Budget and reward are those of the whole answer. options: `sample`'s. limit: the most
    tokens to add to a state; one that it stops gets no reward, like any truncated answer.
    """
    prefixes = [[*prompt, *done] for prompt, done, _ in states]
    rooms = [answer_budget(model, prompt, max_new_tokens) - len(done) for prompt, done, _ in states]
    rooms = [min(room, limit or room) for room in rooms]
    stops = eos_ids(model, tokenizer)
    rollouts = sample(model, prefixes, n, max_new_tokens=rooms, eos=stops, **options)
    for i, r in enumerate(rollouts):
        _, done, answer = states[i // n]
        r.reward = response_reward([*done, *r.ids], r.finished, answer, tokenizer)
    return rollouts


def initial_state(tokenizer, problem: Problem, instruction: str = "") -> tuple[list, list, str]:
    """(prompt ids, answer ids so far, true answer): what `complete` goes on from."""
    return prompt_ids(tokenizer, problem, instruction), [], problem.answer


def answer_budget(model, prompt: list[int], max_new_tokens: int) -> int:
    """How long an answer may be: `max_new_tokens`, or what the prompt leaves of the window."""
    return min(max_new_tokens, window(model) - len(prompt))


def response_reward(ids: list[int], finished: bool, answer: str, tokenizer) -> float:
    """Reward of a whole answer; one that was cut is wrong: "#### 6" could have become 61."""
    return reward(tokenizer.decode(ids, skip_special_tokens=True), answer) if finished else 0.0


# ------------------------------------------------------------------------------------------ scoring


def collate(samples: list[Sample], device="cpu") -> Batch:
    """Right-pad samples to one batch; masks come from lengths, never from token values."""
    if any(not s.context or not s.ids for s in samples):
        raise ValueError("every sample needs a context to predict from, and an id to train")

    def pad(rows, dtype) -> Tensor:
        return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], True).to(device)

    return Batch(
        input_ids=pad([[*s.context, *s.ids] for s in samples], torch.long),
        context_lens=torch.tensor([len(s.context) for s in samples], device=device),
        targets=pad([s.ids for s in samples], torch.long),
        mask=pad([[True] * len(s.ids) for s in samples], torch.bool),
        advantages=pad([s.advantages or [0.0] * len(s.ids) for s in samples], torch.float),
        old_logprobs=pad([s.old_logprobs or [0.0] * len(s.ids) for s in samples], torch.float),
    )


MAX_LOGITS = 1 << 25  # elements in one chunk's logits: 128 MiB in fp32, whatever the vocabulary


def token_logprobs(
    model, batch: Batch, temperature=1.0, with_entropy=False, compute: Compute = Compute()
):
    """(B, T) log-prob of every trained id at the sampling temperature, fp32, 0 outside the mask.

    The one path for old and new log-probs. Logits exist for trained ids only and a chunk at a
    time; they and their log-softmax are fp32 whatever the autocast dtype. with_entropy: returns a
    pair, the second being the policy's entropy at each trained id in nats, (B, T).
    """
    # Gradient checkpointing: transformers recomputes layers in training mode. Only the layer's own
    # flag is set; its submodules stay in eval mode, so there is no dropout.
    layers = [x for x in model.modules() if getattr(x, "gradient_checkpointing", False)]

    def recompute(on: bool) -> None:
        for layer in layers:
            layer.training = on

    def chunk_logprobs(hidden: Tensor, targets: Tensor):  # (N, H), (N,) -> (N,), (N,)
        logprobs = (head_logits(model, hidden) / temperature).log_softmax(-1)  # (N, V)
        chosen = logprobs.gather(-1, targets[:, None])[:, 0]
        if not with_entropy:
            return chosen, chosen.detach()  # a stand-in
        return chosen, -(logprobs.exp() * logprobs).sum(-1)

    with compute.autocast(model.device):
        # Attention is causal and padding stands on the right: no real token sees it, so no mask.
        recompute(True)
        hidden = model.base_model(batch.input_ids, use_cache=False).last_hidden_state  # (B, L, H)
        recompute(False)
        row, t = batch.mask.nonzero(as_tuple=True)  # (N,), (N,)
        hidden = hidden[row, batch.context_lens[row] + t - 1]  # (N, H): the state BEFORE each id
        size = max(1, MAX_LOGITS // model.get_output_embeddings().weight.shape[0])
        chunks = list(zip(hidden.split(size), batch.targets[row, t].split(size)))
        if len(chunks) > 1 and torch.is_grad_enabled():  # forget logits, recompute in the backward
            parts = [recompute_in_backward(chunk_logprobs, *c, use_reentrant=False) for c in chunks]
        else:
            parts = [chunk_logprobs(*chunk) for chunk in chunks]
    zeros = torch.zeros(batch.mask.shape, device=hidden.device)
    logprobs, entropy = (zeros.index_put((row, t), torch.cat(part)) for part in zip(*parts))
    return (logprobs, entropy) if with_entropy else logprobs


def micro_batches(samples: list[Sample], max_tokens: int = 1 << 11) -> Iterator[list[Sample]]:
    """Samples of like length together, at most `max_tokens` wide x high, but at least one."""
    samples = sorted(samples, key=lambda s: len(s.context) + len(s.ids))
    lengths = [len(s.context) + len(s.ids) for s in samples]
    label = "updating" if torch.is_grad_enabled() else "scoring"
    with slow_bar(label, len(samples), "row") as bar:
        for micro in packed(samples, lengths, max_tokens):
            yield micro
            bar.update(len(micro))


@torch.no_grad()
def score(model, samples: list[Sample], temperature: float, compute: Compute = Compute()) -> float:
    """Fill in every sample's `old_logprobs`; returns the policy's mean entropy per trained id."""
    total = 0.0
    for micro in micro_batches(samples, compute.training_tokens):
        batch = collate(micro, model.device)
        logprobs, entropy = token_logprobs(
            model, batch, temperature, with_entropy=True, compute=compute
        )
        total += entropy.sum().item()
        for s, row in zip(micro, logprobs.tolist()):
            s.old_logprobs = row[: len(s.ids)]
    return total / sum(len(s.ids) for s in samples)


# ------------------------------------------------------------------------------------- shared maths


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """GRPO's advantages (arXiv 2402.03300): rewards (P, G) minus their group's mean and, if
    `scale`, over its population std.

    An all-equal group gives exact zeros: its rounding error over its tiny std would be a signal
    out of nothing.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)  # (P, G)
    if scale:
        advantages = advantages / rewards.std(1, correction=0, keepdim=True)
    return advantages.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0)


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_eps: float | Tensor):
    """PPO's objective per action (arXiv 1707.06347, Eq. 7), to be maximised, and where the clip has
    stopped the gradient. log_ratio: log pi(action) - log pi_old(action). clip_eps: a number, or
    (B, T) like the others.

    min() makes the clip one-sided: a positive advantage stops pushing once the ratio is above
    1 + eps, a negative one once it is below 1 - eps.
    """
    ratio = log_ratio.clamp(-10, 10).exp()
    clamped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    objective = torch.minimum(ratio * advantages, clamped * advantages)
    return objective, clamped * advantages < ratio * advantages


def k3(log_ratio: Tensor) -> Tensor:
    """Estimate of KL(p || q) from each token sampled from p, with log_ratio = log q - log p; never
    negative (J. Schulman, "Approximating KL Divergence", 2020).

    As a penalty on p = pi its value is unbiased on fresh samples, but its gradient is, in
    expectation, that of KL(q || pi): the samples do not move with pi.
    """
    log_ratio = log_ratio.clamp(-10, 10)
    return log_ratio.exp() - 1 - log_ratio


# ------------------------------------------------------------------------------------- optimisation


def batch_at(items: list, step: int, size: int, seed) -> list:
    """Batch number `step` of an endless pass over `items`, reshuffled every epoch. A function of
    its arguments alone, so an exact resume has nothing to restore."""
    batch, order = [], None
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, len(items))
        if order is None or place == 0:
            order = random.Random(f"{seed}-{epoch}").sample(range(len(items)), len(items))
        batch.append(items[order[place]])
    return batch


def minibatches(
    samples: list[Sample], batch_size: int, epochs: int, seed: str
) -> Iterator[list[Sample]]:
    """What each optimiser step trains on: `epochs` passes over the samples, each in an order of its
    own, in parts of `batch_size`, or a little less where that does not divide them; 0: all."""
    for epoch in range(epochs):
        order = random.Random(f"{seed}-{epoch}").sample(samples, len(samples))
        parts = math.ceil(len(order) / (batch_size or max(len(order), 1)))
        for i in range(parts):
            yield order[i * len(order) // parts : (i + 1) * len(order) // parts]


IDLE = torch.amp.GradScaler(enabled=False)  # scales nothing: only fp16 needs it


def optimizer_step(
    model, optimizer, schedule, loss: float, max_grad_norm: float, scaler=IDLE
) -> float:
    """Clip the gradients, step, clear them; returns their norm before clipping.

    scaler: the one that has scaled the loss. In fp16 gradients overflow now and then: that step is
    left out, its norm is not finite. Raises FloatingPointError, with the weights as they were, if
    loss or norm are not finite otherwise.
    """
    if all(p.grad is None for p in model.parameters()):
        scaler = IDLE  # no sample had signal, and a scaler at work needs a gradient
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    overflow = scaler.is_enabled() and scaler.get_scale() > 1  # excused: the scale can fall
    if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if math.isfinite(norm):
        schedule.step()
    return norm


def averages(totals: Counter, per_token: tuple) -> dict:
    """What `update` has summed up, as means over its optimiser steps or its trained tokens."""
    metrics = {key: totals[key] / max(totals["updates"], 1) for key in ("loss", "grad_norm")}
    return metrics | {key: totals[key] / max(totals["tokens"], 1) for key in per_token}


# ---------------------------------------------------------------------------- policy and warm start


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that any text can be read, and one token that ends an answer."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    end = "<end>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def encode(tokenizer, text: str) -> list[int]:
    """Ids of `text` alone; the name of a special token inside it is read as plain text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def user_turn(tokenizer, text: str) -> list[int]:
    """Ids of `text` as the user's message, up to where the reply begins: in the chat template if
    there is one, else with a line break behind.

    The template may hold control tokens; their names inside `text` are read as plain text. In front
    stands one bos if the tokenizer puts one before any text, whatever the template does.
    """
    before, after = "", "\n"
    if tokenizer.chat_template:
        mark = "2718281828"  # stands for the text: templates trim or escape, but not this
        chat = [dict(role="user", content=mark)]
        shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if mark in shown:
            (before, _, after), text = shown.partition(mark), text.strip()

    def read(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False).input_ids

    if encode(tokenizer, text) == read(text):  # as a whole, for tokens may span the seams
        ids = read(before + text + after)
    else:
        ids = [*read(before), *encode(tokenizer, text), *read(after)]
    start = tokenizer("").input_ids[:1]
    return start + ids if start == [tokenizer.bos_token_id] != ids[:1] else ids


def prompt_ids(tokenizer, problem: Problem, instruction: str = "") -> list[int]:
    """Ids of a question, and of the instruction below it if there is one."""
    text = f"{problem.question}\n\n{instruction}" if instruction else problem.question
    return user_turn(tokenizer, text)


def solution_ids(tokenizer, problem: Problem) -> list[int]:
    return [*encode(tokenizer, problem.solution), tokenizer.eos_token_id]


INSTRUCTIONS = {  # --data -> what --prompt auto asks of a model; a file's is GSM8K's
    "sums": "Add up from left to right. Write one step a line and nothing else, in the form\n"
    "31+4=35\nand after the last step a line with the total, in the form\n#### 35",
    "gsm8k": "Work this out step by step, each step on a line of its own. Then write one last "
    "line: #### and the answer as a plain number.",
    "math": "Reason step by step, each step on a line of its own. Then put the final answer, and "
    "nothing else, in \\boxed{}.",
}


def pick_instruction(run: "RunConfig", tokenizer) -> str:
    """What stands below each question. The built-in policy learns its form from examples."""
    own = INSTRUCTIONS.get(run.data, INSTRUCTIONS["gsm8k"])
    built_in = tokenizer.get_vocab() == build_tokenizer().get_vocab()
    return {"auto": "" if built_in else own, "none": ""}.get(run.prompt, run.prompt)


def build_policy(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of 0.4 M parameters: room for the table of facts, and quick on two CPU cores. One
    key-value head for four query heads keeps small the cache that sampling reads at every token."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=336, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def imitation_batch(run: "RunConfig", tokenizer, problems: list[Problem], step: int):
    """What the policy is to imitate, list[Sample]: the solutions of 8 problems; on the built-in
    task the mistaken student's, and of 64 sums, about as many tokens, for the built-in policy."""
    size = 64 if problems[0].checkable and not run.model else 8
    if problems[0].checkable:
        facts, indices = wrong_facts(run.seed), range(step * size, (step + 1) * size)
        questions = [make_sum(run.seed, "train", i, run.terms).question for i in indices]
        students = [random.Random(f"{run.seed}-student-{i}") for i in indices]
        texts = [solve_sum(question, facts, rng) for question, rng in zip(questions, students)]
        batch = [Problem(question, text, "") for question, text in zip(questions, texts)]
    else:
        batch = batch_at(problems, step, size, f"{run.seed}-warm")
    below = pick_instruction(run, tokenizer)
    return [Sample(prompt_ids(tokenizer, p, below), solution_ids(tokenizer, p)) for p in batch]


def warm_start(
    run: "RunConfig", problems: list[Problem], model, tokenizer, compute: Compute = Compute()
) -> Path:
    """Folder of the policy after `warm_start_steps` of supervised training, which is done to
    `model` in place; made once, then reused. Of two made at once the first that is saved is kept.
    """
    device = model.device
    if compute.dtype == torch.float16 or device.type == "cpu":  # no scaler here; bf16 is slow there
        compute = replace(compute, dtype=torch.float32)
    if not run.model:  # it fits anywhere, and what is shared must not depend on --training_tokens
        compute = replace(compute, training_tokens=training_tokens(device))
    folder = Path("runs", "warm_start", recipe_hash(run, problems, model, tokenizer, compute))
    if folder.is_dir():
        say(f"warm start: {folder}, made earlier")
        return folder
    imitate(run, problems, model, tokenizer, compute)
    with filelock.FileLock(Path("runs", ".warm_start.lock")):  # held only while one is saved
        for left in folder.parent.glob(".*"):  # by one that was killed while it saved
            shutil.rmtree(left)
        if not folder.is_dir():
            with new_folder(folder) as tmp:
                model.save_pretrained(tmp)
                tokenizer.save_pretrained(tmp)
    return folder


def recipe_hash(run: "RunConfig", problems, model, tokenizer, compute: Compute) -> str:
    """Of all that shapes a warm start: settings, problems, weights, and the first batch."""
    device, dtype, steps = model.device.type, str(compute.dtype), run.warm_start_steps
    recipe = [run.seed, run.terms, steps, WRONG_FACTS, ERROR_RATE, device, dtype]
    recipe += [run.warm_start_lr if run.model else None, [p[:2] for p in problems]]
    recipe += [(s.context, s.ids) for s in imitation_batch(run, tokenizer, problems, 0)]
    recipe += [model.config.to_dict() | {"_name_or_path": ""}]  # wherever it lies
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode())
    for weight in model.parameters():
        digest.update(weight.detach().cpu().numpy())
    return digest.hexdigest()[:12]


def imitate(run: "RunConfig", problems, model, tokenizer, compute: Compute) -> None:
    """Supervised steps. A given model is trained by AdamW at `warm_start_lr`, which falls to 0. The
    built-in one learns its task several times faster with Muon on the matrices and AdamW on the
    rest, at higher rates. Raises BadInput if the loss is not finite."""
    steps = run.warm_start_steps
    if run.model:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=run.warm_start_lr, weight_decay=0.0)]
        rising = steps // 10
    else:
        matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
        others = [p for n, p in model.named_parameters() if n not in matrices]
        optimizers = [
            torch.optim.Muon(matrices.values(), lr=0.03, weight_decay=0.0),
            torch.optim.AdamW(others, lr=5e-3, weight_decay=0.0),
        ]
        rising = 20
    schedules = [get_linear_schedule_with_warmup(o, rising, steps) for o in optimizers]
    for step in (bar := tqdm(range(steps), "warm start", unit="step")):
        samples = imitation_batch(run, tokenizer, problems, step)
        total, loss_sum = sum(len(s.ids) for s in samples), 0.0
        for micro in micro_batches(samples, compute.training_tokens):
            batch = collate(micro, model.device)
            loss = -token_logprobs(model, batch, compute=compute).sum() / total
            loss.backward()
            loss_sum += loss.item()
        if not math.isfinite(loss_sum):
            bar.close()
            raise BadInput(f"the warm start's loss is {loss_sum}; a lower --warm_start_lr may help")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss_sum:.3f}", refresh=False)


def load_policy(source: str | Path, device):
    """(model, tokenizer) from a Hugging Face folder or hub id, with fp32 weights, whatever they are
    stored in. Weights are safetensors, and no code of the model's own is run.

    The model stays in eval mode: with dropout on, old and new log-probs would be those of two
    different networks. Of its generation_config only the ids that end an answer are kept: the rest
    shapes other people's sampling, and not all of it can be saved again. Raises BadInput for what
    is not whole, or not what `sample` and `token_logprobs` take a model to be.
    """
    local = Path(source).exists()
    if local and not Path(source, "config.json").is_file():
        raise BadInput(f"--model {source}: is no folder with a config.json in it")
    options, part = dict(trust_remote_code=False, local_files_only=local), "config.json"
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
            raise ValueError(f"{config.model_type} is not a text-only decoder")
        if any(isinstance(layer, StateLayer) for layer in DynamicCache(config=config).layers):
            raise ValueError(f"{config.model_type} keeps a state, which sampling cannot share")
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if tokenizer.eos_token_id is None:
            raise ValueError("it has no end-of-text token")
        part = "chat template"
        user_turn(tokenizer, "1+1")
        part = "weights"
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
        if info["mismatched_keys"]:  # transformers would make them up at random, as it would
            name, stored, wanted = min(info["mismatched_keys"])
            raise ValueError(f"{name} is {[*stored]}, by config.json {[*wanted]}")
        if info["missing_keys"]:  # these
            raise ValueError(f"there is no {min(info['missing_keys'])}")
        for name, weight in model.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f"{name} is not finite")
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise ValueError("the tokenizer has more tokens than the model has embeddings")
    except Exception as error:
        where = "" if local else "no such folder here; as a hub id: "
        reason = f"{where}cannot load its {part} ({one_line(error)})"
        if local and part == "config.json" and Path(source, "checkpoint").is_dir():
            reason = f"a run, not a model; --model {Path(source, 'checkpoint')} is what it trained"
        raise BadInput(f"--model {source}: {reason}") from None
    model.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids(model, tokenizer)))
    model = model.to(device).eval()
    try:
        check_forward(model)
    except ValueError as error:
        raise BadInput(f"--model {source}: {config.model_type} {error}") from None
    return model, tokenizer


@torch.no_grad()
def check_forward(model) -> None:
    """Raises ValueError unless the model computes what `sample` and `token_logprobs` take it to."""
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size  # (1, 8)
    hidden = model.base_model(ids, use_cache=False).last_hidden_state  # (1, 8, H)
    logits, head = model(ids).logits, model.get_output_embeddings()  # (1, 8, V)

    def same(x: Tensor, y: Tensor, tolerance=1e-4) -> bool:
        return bool((x - y).abs().max() <= tolerance * y.abs().max())

    if not same(model.base_model(ids[:, :4], use_cache=False).last_hidden_state, hidden[:, :4]):
        raise ValueError("lets tokens see later ones; not a causal language model")
    if not same(head(hidden), logits, 1e-5):
        raise ValueError("rescales or caps its logits; not supported here")
    cache = DynamicCache(config=model.config)
    for part in (ids[:, :4], ids[:, 4:]):
        cached = model.base_model(part, use_cache=True, **{cache_keyword(model): cache})
    if not same(cached.last_hidden_state, hidden[:, 4:]):
        raise ValueError("loses its context where keys and values are kept")


def no_dropout(model) -> None:
    """Some layers apply dropout themselves in training mode, and recomputing puts them in it."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def eos_ids(model, tokenizer) -> set[int]:
    """Every id that ends an answer: the tokenizer's, and those of the checkpoint's configs."""
    ids = {tokenizer.eos_token_id}
    for config in (model.generation_config, model.config):
        listed = getattr(config, "eos_token_id", None)
        ids |= set(listed if isinstance(listed, list) else [listed])
    return ids - {None}


def window(model) -> int:
    """Positions the model can see, prompt and answer together."""
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30


@torch.no_grad()
def token_bytes(model, compute: Compute = Compute()) -> int:
    """Bytes of keys and values that a model keeps for each token, measured."""
    cache = KeyValues(config=model.config)
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    with compute.autocast(model.device):
        model.base_model(ids, use_cache=True, **{cache_keyword(model): cache})
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // 4


def free_memory(device) -> int | None:
    """Bytes that tensors can still take on a GPU; None for a CPU."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def sampling_tokens(free: int | None, parameters: int, token_bytes: int) -> int:
    """How many tokens to sample from at once on a device with `free` bytes left beside the weights;
    65,536 on a CPU (None), where more would be no faster. 12 bytes a parameter are for gradients
    and AdamW's moments, half of the rest for keys and values, `token_bytes` a token: growing them
    takes copies, and there are activations and logits."""
    return 1 << 16 if free is None else max(1, (free - 12 * parameters) // 2 // token_bytes)


def room_for_sampling(run: "RunConfig", model, compute: Compute) -> int:
    """Compute.sampling_tokens for this run: as asked for, or as the model's device has room."""
    return run.sampling_tokens or sampling_tokens(
        free_memory(model.device), model.num_parameters(), token_bytes(model, compute)
    )


def training_tokens(device) -> int:
    """What to compute at once: more tokens than this fall out of a CPU's caches."""
    return 1 << 11 if device.type == "cpu" else 1 << 14


# ----------------------------------------------------------------------------------------- problems

WRONG_FACTS = 0.35  # share of the 180 single-digit facts that the imitated student has wrong
ERROR_RATE = 0.75  # how often such a fact comes out wrong: one too high, so errors never cancel


def wrong_facts(seed: int) -> frozenset[tuple[int, int]]:
    """The facts (last digit of the running total, signed term) that the student has wrong."""
    facts = [(digit, term) for digit in range(10) for term in range(-9, 10) if term]
    return frozenset(random.Random(f"{seed}-facts").sample(facts, round(WRONG_FACTS * len(facts))))


def solve_sum(question: str, facts=frozenset(), rng: random.Random | None = None) -> str:
    """A running sum worked out, one step a line. Where a step uses one of `facts`, it is one too
    high ERROR_RATE of the time, and the sum goes on from there.

    >>> solve_sum("31+4-7")
    '31+4=35\\n35-7=28\\n#### 28'
    """
    total, *terms = map(int, re.findall(r"[+-]?\d+", question))
    lines = []
    for term in terms:
        slip = (total % 10, term) in facts and rng.random() < ERROR_RATE
        lines.append(f"{total}{term:+d}={total + term + slip}")
        total += term + slip
    return "\n".join([*lines, f"#### {total}"])


def split_of(question: str) -> str:
    """The one split a question belongs to, whatever the file or seed: 80 % train, 10 % each."""
    return ("validation", "test", *["train"] * 8)[zlib.crc32(question.encode()) % 10]


def make_sum(seed: int, split: str, i: int, terms: int) -> Problem:
    """Problem i of a split: a total of 10-49, then single digits, `+` twice as likely as `-`, with
    every running total within 10-99."""
    rng = random.Random(f"{seed}-{split}-{i}")
    while True:
        total = rng.randint(10, 49)
        question = str(total)
        for _ in range(rng.randint(max(2, terms - 2), terms) - 1):
            term = rng.choice((1, 1, -1)) * rng.randint(1, 9)
            term = term if 10 <= total + term <= 99 else -term
            total += term
            question += f"{term:+d}"
        if split_of(question) == split:
            return Problem(question, solve_sum(question), str(total), checkable=True)


HUB = {  # --data -> (data set, configuration) on the Hugging Face hub
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default"),
}
COLUMNS = (("question", "answer"), ("problem", "solution"))


def load_problems(data="sums", split="train", n: int | None = None, seed=0, terms=7):
    """The first `n` problems (None: all; of the built-in task 4,096) of a split: list[Problem].

    data: "sums"; "gsm8k" or "math" from the hub; or a local file, .parquet or .jsonl (one object a
    line), with the texts `question` and `answer`, or `problem` and `solution`, the latter of each
    ending in "#### 18" or holding \\boxed{18}. split: "train", "validation" or "test"; of a hub set
    the test split is its own and "validation" a tenth of its train split; a file's questions are
    split by a hash of their text. Raises BadInput, naming file and line, for what cannot be read.
    """
    if data == "sums":
        return [make_sum(seed, split, i, terms) for i in range(4096 if n is None else n)]
    if data in HUB:
        chosen = list(hub_problems(data, "test" if split == "test" else "train"))
        if split != "test":
            held_out = split == "validation"
            chosen = [p for p in chosen if (split_of(p.question) == "validation") == held_out]
    else:
        chosen = [p for p in file_problems(data) if split_of(p.question) == split]
    if not chosen:
        raise BadInput(f"--data {data}: none of its rows is in the {split} split")
    return chosen[:n]


@functools.lru_cache(maxsize=2)
def hub_problems(data: str, part: str) -> tuple[Problem, ...]:
    """A hub set's "train" or "test" rows, without those whose final answer cannot be read."""
    try:
        rows = datasets.load_dataset(*HUB[data], split=part).to_list()
    except Exception as error:
        raise BadInput(
            f"--data {data}: {HUB[data][0]} could not be had from the hub ({one_line(error)}); "
            f"a local .jsonl or .parquet file works too"
        ) from None
    problems = []
    for row in rows:
        with suppress(BadInput):
            problems.append(problem_of(row, part))
    if left_out := len(rows) - len(problems):
        say(f"--data {data}: {left_out} of {len(rows):,} {part} rows left out, for no answer")
    return tuple(problems)


@functools.lru_cache(maxsize=2)  # a run reads its file once, whatever splits it needs
def file_problems(data: str) -> tuple[Problem, ...]:
    """The rows of a local file."""
    path = Path(data)
    if not path.is_file():
        known = ", ".join(["sums", *HUB])
        raise BadInput(f"--data {data}: no such file, nor one of the known sets ({known})")
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise BadInput(f"--data {data}: its name must end in .jsonl, .json or .parquet")
    rows = parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)
    problems = tuple(problem_of(row, f"{data}, {place}") for place, row in rows)
    if not problems:
        raise BadInput(f"--data {data}: the file is empty")
    return problems


def json_rows(path: Path) -> Iterator[tuple[str, object]]:
    data = path.read_bytes()
    if data.lstrip()[:1] == b"[":
        raise BadInput(f"{path}, line 1: a JSON array; what is read is one object a line")
    for i, line in enumerate(data.splitlines(), 1):
        try:
            if line.strip():
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
                yield f"line {i}", row
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}, line {i}: not a whole line of JSON ({error})") from None


def parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except Exception as error:
        raise BadInput(f"--data {path}: cannot be read as parquet ({one_line(error)})") from None
    return ((f"row {i}", row) for i, row in enumerate(rows, 1))


def problem_of(row, place: str) -> Problem:
    """A row of a file or hub set as a problem. Raises BadInput with `place` for what it lacks."""
    for names in COLUMNS if isinstance(row, dict) else ():
        question, solution = map(row.get, names)
        if isinstance(question, str) and isinstance(solution, str):
            answer = extract_answer(solution)
            if answer is None:
                raise BadInput(f"{place}: no final answer ('#### 18', '\\boxed{{18}}') to read")
            return Problem(question, solution, answer)
    raise BadInput(f"{place}: needs the texts 'question' and 'answer', or 'problem' and 'solution'")


# ------------------------------------------------------------------------------------------ answers


def extract_answer(text: str) -> str | None:
    """The final answer as it is written: after the last "####" or in the last \\boxed{}, whichever
    comes later; None if there is neither.

    >>> [extract_answer(text) for text in ("3+4=7\\n#### 7", "so \\\\boxed{\\\\frac{1}{2}}", "7")]
    ['7', '\\\\frac{1}{2}', None]
    """
    closing, open_braces = {}, []  # position of each "{" -> of the "}" that closes it
    for i, char in enumerate(text):
        if char == "{":
            open_braces.append(i)
        elif char == "}" and open_braces:
            closing[open_braces.pop()] = i
    answer = None
    for match in re.finditer(r"####((?:(?!####|\\boxed\s*\{)[^\n])*)|\\boxed\s*\{", text):
        end = match.end()
        found = text[end : closing.get(end - 1, end)] if match[1] is None else match[1]
        answer = found.strip() or answer
    return answer


LONGEST_ANSWER = 300  # characters; no final answer is longer, and no longer one is taken apart


def plain_answer(text: str) -> str:
    r"""A final answer without what LaTeX and style add to it: spacing, \left and \right, $, \text,
    braces around one character, "x = " in front, a period behind.

    >>> plain_answer(r"$x = \dfrac{1}{2}$."), plain_answer(r"\left( 3, \text{none} \right)")
    ('\\frac12', '( 3,  none )')
    """
    text = text.replace("\u2212", "-").replace("~", " ").replace("\\ ", " ")
    text = re.sub(r"\\(left|right|displaystyle)(?![a-zA-Z])|\\[!,;:()\[\]]|\\?[$%]", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text[a-z]*|math[a-z]+|mbox)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\{\s*([^\s{}\\])\s*\}", r"\1", text)
    text = re.sub(r"\^\s*(\\circ|\{\s*\\circ\s*\})|°", "", text)
    text = re.sub(r"^[\s*]*\\?[a-zA-Z]\w*\s*=(?!.*=)", "", text)
    return re.sub(r"^\{([^{}]*)\}$", r"\1", text.strip("* \n").rstrip(". "))


def parse_number(text: str) -> Fraction | None:
    """The exact value of "1,234", "-0.5", "$18.00", "50%" (as 50), "1/2", "\\frac{1}{2}" or
    "3 apples"; None for anything else. Parsed, never evaluated, and of bounded length."""
    if len(text) > LONGEST_ANSWER:
        return None
    part = r"\s*([^\s{}\\]|\{[^{}]*\})"
    text = re.sub(rf"\\frac{part}{part}", r" \1/\2", plain_answer(text))
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|[{}]", "", text)
    unit = r"(?:\s+[a-zA-Z]|[a-zA-Z]{2})[a-zA-Z\s/.]*(?:\^\d)?"  # "2x" is no number
    number = rf"([+-]?)\s*(\d+\.?\d*|\.\d+)\s*(?:/\s*(\d+))?(?:{unit})?"
    match = re.fullmatch(number, text.strip(), re.ASCII)
    if not match or (match[3] and int(match[3]) == 0):
        return None
    value = Fraction(match[2]) / int(match[3] or 1)
    return -value if match[1] == "-" else value


def reward(text: str, answer: str) -> float:
    """1.0 if the final answer in `text` is `answer`, by value where both are numbers, else as text
    without regard to how LaTeX spaces and decorates it, else 0.0. Nothing is evaluated: 2(x+1) is
    not 2x+2, a mixed number is no fraction, and the order of a list counts.

    >>> reward("#### 1,234", "1234"), reward("#### 1/2", "0.5"), reward("#### 12", "1234")
    (1.0, 1.0, 0.0)
    """
    given = extract_answer(text)
    if given is None or max(len(given), len(answer)) > LONGEST_ANSWER:
        return float(given == answer)
    left, right = parse_number(given), parse_number(answer)
    if left is None or right is None:
        space = r"\s+(?!\d)|(?<!\d)\s+"  # but for one between digits: "3 4" is not "34"
        left, right = (re.sub(space, "", plain_answer(x)) for x in (given, answer))
    return float(left == right)


def first_difference(given, reference) -> int | None:
    """Index of the first element of `given` that departs from `reference`; None if none does."""
    departs = (i for i, x in enumerate(given) if i >= len(reference) or x != reference[i])
    return next(departs, None)


def first_wrong_token(ids: list[int], problem: Problem, tokenizer) -> int | None:
    """Index of the first answer token that departs from the only right answer; None if none does,
    or if the problem does not let its steps be judged."""
    return first_difference(ids, solution_ids(tokenizer, problem)) if problem.checkable else None


def step_starts(ids, tokenizer, delimiter="\n", max_steps=20, stops=frozenset()) -> list[int]:
    """Index of each step's first token. A step ends after `delimiter`; blank ones do not count.

    A step begins with the token that holds its first character, even if the delimiter before it
    is in the same token, which byte-level BPE may do: a reset must not keep a part of the step.
    The first step begins at 0; the last one holds whatever is beyond max_steps. A last id that is
    special or one of `stops` ended the answer, and is no step.
    """
    if ids and ids[-1] in {*tokenizer.all_special_ids, *stops}:
        ids = ids[:-1]
    begins, at = [], 0  # characters
    for piece in whole_text(ids, tokenizer).split(delimiter):
        if piece.strip():
            begins.append(at)
        at += len(piece) + len(delimiter)
    lengths = text_lengths(ids, tokenizer)  # characters before each token, and in all
    starts = {0}
    for c in begins[1:]:
        t = bisect_left(lengths, c)
        starts.add(t if lengths[t] == c else t - 1)  # t - 1: that token holds both sides of c
    return sorted(starts)[:max_steps]


def whole_text(ids: list[int], tokenizer) -> str:
    """What `ids` say, without a last character of which only some bytes are there yet."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip("\ufffd")


def text_lengths(ids: list[int], tokenizer) -> list[int]:
    """Characters of text that have been there after 0, 1, ... tokens: T + 1 numbers, ascending.

    What a token adds shows behind the few before it: alone it may be part of a character, and the
    first one may lose its space. Decoding every prefix would take time with the square of T.
    """
    stream = DecodeStream(skip_special_tokens=False)
    try:
        pieces = [stream.step(tokenizer.backend_tokenizer, id) or "" for id in ids]
    except Exception:  # one in Python alone, or a byte that is no text changes those before it
        prefixes = (len(whole_text(ids[:t], tokenizer)) for t in range(len(ids) + 1))
        return list(accumulate(prefixes, max))
    return list(accumulate(map(len, pieces), initial=0))


# --------------------------------------------------------------------------------------- evaluation


def evaluate(
    model, tokenizer, problems, samples: int, max_new_tokens: int, temperature: float, seed: int,
    instruction: str = "", compute: Compute = Compute(),
) -> dict:  # fmt: skip
    """Accuracy over `problems` with standard errors: sampled (the mean of `samples` answers),
    pass@k (the best of them) and greedy; and beside accuracy the share of answers in form, sampled
    and greedy: what a policy gains may be no more than that. The errors treat a problem, not an
    answer, as one draw."""
    states = [initial_state(tokenizer, problem, instruction) for problem in problems]
    generator = torch.Generator(model.device).manual_seed(seed)

    def answers(n: int, greedy: bool) -> tuple[Tensor, Tensor]:  # (problems, n) right, in form
        rollouts = complete(
            model, tokenizer, states, n, max_new_tokens, temperature=temperature, greedy=greedy,
            generator=generator, compute=compute,
        )  # fmt: skip
        right = torch.tensor([r.reward for r in rollouts]).view(-1, n)
        return right, torch.tensor([in_form(r, tokenizer) for r in rollouts]).float().view(-1, n)

    sampled, formed = answers(samples, False)
    greedy, greedy_formed = answers(1, True)
    result = {"k": samples}
    for name, values in dict(
        accuracy=sampled.mean(1), pass_at_k=sampled.amax(1), greedy=greedy[:, 0],
        in_form=formed.mean(1), in_form_greedy=greedy_formed[:, 0],
    ).items():  # fmt: skip
        result[name], result[f"{name}_stderr"] = mean_stderr(values.tolist())
    return result


def in_form(answer: Rollout, tokenizer) -> bool:
    """Has a whole answer ended by itself, with a final answer that can be read? Others get no
    reward, whatever they say."""
    text = tokenizer.decode(answer.ids, skip_special_tokens=True)
    return answer.finished and extract_answer(text) is not None


def mean_stderr(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (nan for a single value)."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else math.nan


def describe(result: dict) -> str:
    labels = dict(accuracy="sampled", pass_at_k=f"pass@{result['k']}", greedy="greedy")
    items = [(label, result[key], result[f"{key}_stderr"]) for key, label in labels.items()]
    shown = ", ".join(f"{label} {mean:.3f} ± {stderr:.3f}" for label, mean, stderr in items)
    return f"{shown}; in form {result['in_form']:.1%}, greedy {result['in_form_greedy']:.1%}"


# ------------------------------------------------------------------------ settings and command line


def arg(default, help: str, low: float | None = None, above=None, high: float = 1e6):
    """A dataclass field that the command line documents. Numbers have to be at least `low`, or
    more than `above`, and at most `high`, which is there to catch a slip of the finger."""
    metadata = dict(help=help, low=low, above=above, high=high)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_bounds(config) -> None:
    """Raises BadInput for a number of a dataclass that is outside the bounds of its `arg`."""
    for setting in fields(config):
        low, above, high = (setting.metadata[key] for key in ("low", "above", "high"))
        value = getattr(config, setting.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (str, bool)):
                continue
            wrong = f"--{setting.name} {number}: must be"
            if low is not None and not number >= low:  # nor is nan
                raise BadInput(f"{wrong} at least {low}")
            if above is not None and not number > above:
                raise BadInput(f"{wrong} above {above}")
            if not number <= high:
                raise BadInput(f"{wrong} at most {high:,.0f}")


@dataclass
class RunConfig:
    """What a run is about, whatever the algorithm. Each script adds its own Config."""

    name: str = arg("", "the run's folder is runs/<name>; by default the script's name")
    data: str = arg("sums", "'sums', built in; 'gsm8k' or 'math'; or a .jsonl or .parquet file")
    model: str = arg("", "folder or hub id of a causal LM; by default the built-in policy")
    prompt: str = arg(
        "auto", "text below each question; auto: by --data, common.INSTRUCTIONS; none: nothing"
    )
    seed: int = arg(0, "fixes problems, warm start, sampling and order", low=0, high=2**63 - 1)
    device: Literal["auto", "cpu", "cuda", "mps"] = arg("auto", "auto: cuda where there is one")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = arg(
        "auto", "autocast over fp32 weights; auto: bf16 on cuda (fp16 where it has none), else fp32"
    )
    sampling_tokens: int = arg(
        0, "memory: most tokens that are sampled from at once; 0: by free memory, on a CPU 65,536",
        low=0, high=1e12,
    )  # fmt: skip
    training_tokens: int = arg(
        0, "memory: most tokens in one pass forward and backward; 0: 16,384, on a CPU 2,048",
        low=0, high=1e12,
    )  # fmt: skip
    gradient_checkpointing: bool = arg(False, "memory: layers are computed again going backward")
    terms: int = arg(
        7, "built-in task: most terms of a sum; the fewest are two less", low=2, high=1000
    )
    warm_start_steps: int = arg(
        300, "supervised steps before all else, on 8 solutions each; of a given --model 0", low=0
    )
    warm_start_lr: float = arg(
        3e-5, "AdamW's highest rate in the supervised steps of a given --model", above=0
    )
    eval_problems: int = arg(500, "held-out problems per evaluation", low=1)
    eval_samples: int = arg(
        4, "answers sampled to each: accuracy is their mean, pass@k their best", low=1
    )
    eval_every: int = arg(0, "evaluate every so many steps too; 0: only before and after", low=0)
    show_every: int = arg(10, "show an answer with its credit every so many steps; 0: never", low=0)
    save_every: int = arg(10, "checkpoint every so many steps, and after the last", low=1)
    tiny: bool = arg(False, "a whole small experiment in half a minute: other defaults")
    resume: bool = arg(False, "continue runs/<name> from its checkpoint")
    eval_only: bool = arg(False, "evaluate --model, or else runs/<name>, and write nothing")

    def __post_init__(self):
        check_bounds(self)
        if not re.fullmatch(r"[\w-][\w.-]{0,98}|", self.name) or self.name == "warm_start":
            raise BadInput(
                f"--name {self.name!r}: up to 99 letters, digits, '.', '_', '-', the first no dot"
            )


LARGE = dict(  # defaults of every script for a model that others have trained
    max_new_tokens=512, steps=100, eval_problems=200, eval_samples=1, show_every=1, save_every=5,
    gradient_checkpointing=True,
)  # fmt: skip


class Parser(HfArgumentParser):
    """transformers' parser of dataclasses; what it cannot read becomes BadInput."""

    def add_argument(self, *names, low=None, above=None, high=None, **options):
        return super().add_argument(*names, **options)  # the bounds are for check_bounds

    def error(self, message):
        raise BadInput(message)


def earlier_flags(parser: Parser, folder: Path, script: str) -> list[str]:
    """The settings that a run began with, from its config.json, as flags of the command line.
    Raises BadInput unless it holds what `configuration` wrote for this script: no more, no less."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder} holds no run" if not folder.exists() else f"there is no {path}")
    try:
        settings = {**json.loads(path.read_text("utf-8"))}
    except (OSError, ValueError, TypeError):
        raise BadInput(f"{path} is damaged") from None
    known = {action.dest for action in parser._actions} - {"help", "resume", "eval_only"}
    if unlike := sorted(settings.keys() ^ known ^ {"problems"}):  # beside them their fingerprint
        has = "has" if unlike[0] in settings else "lacks"
        raise BadInput(f"{path} is not of {script}.py: it {has} {printable(unlike[0])}")
    del settings["problems"]
    flags = []
    for key, value in settings.items():
        flags += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    try:
        parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except BadInput as error:
        raise BadInput(f"{path} is damaged: {error}") from None
    return flags


def parse_args(config_class, script: str, description: str, tiny: dict, large: dict):
    """(Config, RunConfig) from the command line. Other defaults are LARGE and `large` for --model
    with other --data than the built-in task, `tiny` for --tiny, and a run's own for --resume and
    --eval_only."""
    title = description.split("\n")[0]  # argparse would run the whole header together
    parser = Parser((config_class, RunConfig), description=title, allow_abbrev=False)
    parser.set_defaults(name=script)
    parser._negative_number_matcher = re.compile(r"-[\d.]")  # argparse takes -1e-3 for a flag
    for action in parser._actions:  # the help of --no_x would be that of --x
        if action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
    typed = sys.argv[1:]
    try:
        "".join(typed).encode()
    except UnicodeEncodeError:
        raise BadInput("an argument is not text in UTF-8") from None
    given = parser.parse_known_args([word for word in typed if word not in ("-h", "--help")])[0]
    trained = given.model and given.data != "sums"
    if trained:
        parser.set_defaults(**LARGE | large)
    if given.tiny:
        parser.set_defaults(**tiny)
        if trained:  # a small experiment, but at the model's rate
            parser.set_defaults(lr=large["lr"])
    if given.model:
        parser.set_defaults(warm_start_steps=0)
    if given.resume or (given.eval_only and not given.model):  # as the run began
        earlier = earlier_flags(parser, Path("runs", given.name), script)
        # What is to be evaluated is not the --model that the run began from.
        typed = [*earlier, *(["--model="] if given.eval_only else []), *typed]
    cfg, run, unknown = parser.parse_args_into_dataclasses(
        typed, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise BadInput(f"unknown argument {unknown[0]} (--help lists them all)")
    if not run.name:
        raise BadInput("--name '': a run needs a name")
    if run.eval_only and run.model and run.warm_start_steps:
        raise BadInput("--warm_start_steps: not with --eval_only, which trains nothing")
    return cfg, run


DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


def pick_device(run: RunConfig) -> tuple[str, str]:
    """Where to run, and the dtype to autocast to: what "auto" means here."""
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    device = run.device if run.device != "auto" else "cuda" if there["cuda"] else "cpu"
    if not there[device]:
        raise BadInput(f"--device {device}: torch finds none here; --device cpu would run")
    dtype = run.dtype if run.dtype != "auto" else "fp32"
    if run.dtype == "auto" and device == "cuda":
        dtype = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, dtype


# ------------------------------------------------------------------------- a run: set-up, loop, log


class Setup(NamedTuple):
    """What a run works with; the script adds optimizer and schedule."""

    cfg: object  # the script's Config
    run: RunConfig
    folder: Path  # runs/<name>
    lock: filelock.BaseFileLock | None  # held as long as this is kept
    train: list[Problem]
    problems: str  # a hash of these and of those held out
    model: object
    tokenizer: object
    instruction: str  # below each question
    compute: Compute
    evaluate: object  # evaluate(): held-out accuracy of the model as it then is
    scaler: torch.amp.GradScaler  # of the loss
    generator: torch.Generator  # of all that is sampled
    optimizer: torch.optim.Optimizer | None = None
    schedule: object = None  # of the learning rate


def set_up(config_class, script: str, description: str, tiny: dict, large: dict, headline) -> Setup:
    """What every script begins with; --eval_only ends here.

    headline(cfg, train): what the run will do, in words; it may raise BadInput for these problems.
    Raises BadInput for what cannot work, before the warm start and before anything is written.
    """
    cfg, run = parse_args(config_class, script, description, tiny, large)
    run.device, run.dtype = pick_device(run)
    device, dtype = torch.device(run.device), DTYPES[run.dtype]
    run.training_tokens = run.training_tokens or training_tokens(device)
    folder = run_folder(cfg, run)
    train = load_problems(run.data, "train", None, run.seed, run.terms)
    test = load_problems(run.data, "test", run.eval_problems, run.seed, run.terms)
    problems = hashlib.sha256(json.dumps(train + test).encode()).hexdigest()[:12]
    if run.resume and problems != json.loads((folder / "config.json").read_text())["problems"]:
        raise BadInput(f"--resume: the problems of --data {run.data} have changed since it began")
    title = headline(cfg, train)
    if not run.eval_only:
        say(
            f"{title}\n{run.data}: {len(train):,} problems, {len(test):,} held out; "
            f"on {device} in {str(dtype)[6:]}; files in {folder}/"
        )
    if train[0].checkable and not (run.model or run.resume or run.eval_only):
        say(
            f"First it imitates a student who has {WRONG_FACTS:.0%} of the single-digit facts "
            "wrong: the warm start.\nThen it learns from final answers alone. Does credit find the "
            "wrong step?"
        )
    # What is to go on here is opened by its owner; a given model that is no good leaves no trace.
    lock = claim(folder) if run.resume else None
    if run.resume or (run.eval_only and not run.model):
        model, tokenizer = load_policy(find_checkpoint(folder), device)
    else:
        model, tokenizer = first_policy(run, device)
    instruction = pick_instruction(run, tokenizer)
    check_prompts(train + test, tokenizer, instruction, window(model))
    if not run.eval_only:
        lock = lock or claim(folder)
        run_folder(cfg, run)  # another run of this name may have begun meanwhile, and ended
        check_disk(folder, model)
    compute = Compute(dtype=dtype, training_tokens=run.training_tokens)
    if not (run.resume or run.eval_only):
        model, tokenizer = warm_started(run, train, model, tokenizer, compute)
    compute.sampling_tokens = run.sampling_tokens = room_for_sampling(run, model, compute)
    recompute_layers(model, run)
    held_out = functools.partial(
        evaluate, model, tokenizer, test, samples=run.eval_samples,
        max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, seed=run.seed,
        instruction=instruction, compute=compute,
    )  # fmt: skip
    if run.eval_only:
        say(f"{len(test)} held-out problems: {describe(held_out())}")
        raise SystemExit
    return Setup(
        cfg, run, folder, lock, train, problems, model, tokenizer, instruction, compute, held_out,
        # fp16 has too few small numbers for gradients: there the loss is scaled up.
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        generator=torch.Generator(device).manual_seed(run.seed),
    )  # fmt: skip


def run_folder(cfg, run: RunConfig) -> Path:
    """runs/<name>, after checking that this run may use it. Raises BadInput if it may not."""
    folder = Path("runs", run.name)
    if run.resume and (folder / "summary.json").exists():
        raise BadInput(f"--resume: {folder} is finished; its summary.json has the results")
    if run.resume:
        old = json.loads((folder / "config.json").read_text("utf-8"))
        may_change = ("name", "sampling_tokens", "training_tokens", "gradient_checkpointing")
        for key, value in configuration(cfg, run).items():
            if old[key] != value and key not in may_change:
                raise BadInput(f"--resume: {folder} has {key} = {old[key]}, not {value}")
    elif not run.eval_only and (folder.exists() or folder.is_symlink()):
        raise BadInput(f"{folder} exists: pick another --name, --resume it, or delete it")
    return folder


def configuration(cfg, run: RunConfig) -> dict:
    """What config.json holds: every setting that shapes the run."""
    settings = {**vars(cfg), **vars(run)}
    return {key: settings[key] for key in settings if key not in ("resume", "eval_only")}


def check_prompts(problems: list[Problem], tokenizer, instruction: str, longest: int) -> None:
    """Raises BadInput for a prompt that leaves no room for an answer in a window of `longest`."""
    around = len(prompt_ids(tokenizer, Problem("", "", ""), instruction))
    for p in problems:  # no tokenizer makes more than four tokens of a byte
        if around + 4 * len(p.question.encode()) >= longest:
            if (length := len(prompt_ids(tokenizer, p, instruction))) >= longest:
                long = f"a prompt of {length} tokens exceeds the model's window of {longest}"
                raise BadInput(f"{long}: {p.question[:40]!r}...")


def first_policy(run: RunConfig, device):
    """(model, tokenizer) of --model, or else of the built-in policy before its warm start."""
    if not run.model:
        tokenizer = build_tokenizer()
        torch.manual_seed(run.seed)
        return build_policy(len(tokenizer)).to(device).eval(), tokenizer
    if not Path(run.model).exists():
        say(f"model: {run.model}, from the hub or its cache here")
    return load_policy(run.model, device)


def starting_policy(run: RunConfig, train: list[Problem], device, compute: Compute):
    """(model, tokenizer) that the run begins to learn with."""
    model, tokenizer = first_policy(run, device)
    return warm_started(run, train, model, tokenizer, compute)


def warm_started(run: RunConfig, train: list[Problem], model, tokenizer, compute: Compute):
    """(model, tokenizer) after the warm start, if the run has one; `model` is used up."""
    if run.model and not run.warm_start_steps:
        return model, tokenizer
    recompute_layers(model, run)
    return load_policy(warm_start(run, train, model, tokenizer, compute), model.device)


def recompute_layers(model, run: RunConfig) -> None:
    """Layers forget their activations, and compute them again going backward, if asked to."""
    if run.gradient_checkpointing:
        model.activation_checkpointing_enable(dict(use_reentrant=False))
        no_dropout(model)


def claim(folder: Path) -> filelock.BaseFileLock:
    """Makes runs/<name> this process's own, for as long as it lives and keeps what this returns.
    Raises BadInput if another one has it, or if nothing can be written there."""
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        (folder.parent / "warm_start").mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise BadInput(f"{folder}: a run of this name is under way; pick another --name") from None
    except OSError as error:
        path = os.path.relpath(error.filename or folder)
        raise BadInput(f"{path} cannot be written: {error.strerror}") from None
    return lock


def check_disk(folder: Path, model) -> None:
    """Raises BadInput where there is no room for two checkpoints, weights and AdamW's two moments
    in fp32 each: the new one is whole before the old one goes."""
    needed = 24 * model.num_parameters()
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        room = f"{needed / 1e6:,.0f} MB for two checkpoints, its disk has {free / 1e6:,.0f} left"
        raise BadInput(f"{folder} needs {room}")


def begin(setup: Setup, **counts) -> dict:
    """The run's progress: where it stopped, or at its start, with `counts` in it. Then its folder
    is made, with a first checkpoint, and appears whole or not at all."""
    if setup.run.resume:
        progress = resume(setup)
    else:
        before = setup.evaluate()
        progress = dict(step=0, sampled_tokens=0, seconds=0.0, before=before, **counts)
        settings = configuration(setup.cfg, setup.run) | dict(problems=setup.problems)
        with new_folder(setup.folder) as tmp:
            (tmp / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
            save_checkpoint(tmp, setup, progress)
    say(f"before: {describe(progress['before'])}")
    return progress


def training_steps(setup: Setup, progress: dict):
    """Iterates over (step, progress bar) of the steps still to do; after each, saves if it is time
    to. Ctrl-C or SIGTERM ends the run after the step it comes in, with exit code 130 or 143."""
    folder, run, steps = setup.folder, setup.run, setup.cfg.steps
    stop, done = StopRequest(), progress["step"]
    for step in (bar := tqdm(range(done, steps), "training", steps, initial=done)):
        yield step, bar
        progress["step"] = step + 1
        if (step + 1) % run.save_every == 0 or step + 1 == steps or stop.signal:
            save_checkpoint(folder, setup, progress)
        if stop.signal:
            bar.close()
            say(f"saved after step {step + 1} in {folder}/; --resume continues")
            raise SystemExit(128 + stop.signal)
    stop.end()


@contextmanager
def saved_if_not_finite(setup: Setup, step: int, progress: dict) -> Iterator[None]:
    """A loss or gradient that is not finite stops the run; its state goes beside the checkpoint."""
    try:
        yield
    except FloatingPointError as error:
        save_checkpoint(setup.folder, setup, progress, name="failed")
        stopped = f"step {step + 1}: {error}; stopped, with its state in {setup.folder}/failed"
        raise SystemExit(f"\n{stopped}") from None


def log_step(setup: Setup, step: int, bar, progress: dict, metrics: dict, answers: list) -> None:
    """Add a step's row to metrics.csv, evaluating if it is time. answers: the step's whole ones."""
    every = setup.run.eval_every
    row = dict(step=step + 1) | metrics | dict(lr=setup.schedule.get_last_lr()[0])
    row["in_form"] = sum(in_form(r, setup.tokenizer) for r in answers) / len(answers)
    row["sampled_tokens"] = progress["sampled_tokens"]
    row["seconds"] = round(progress["seconds"], 2)
    held_out = setup.evaluate() if every and (step + 1) % every == 0 else {}
    row["held_out"] = held_out.get("accuracy", "")
    row["held_out_in_form"] = held_out.get("in_form", "")
    append_metrics(setup.folder, row)
    bar.set_postfix(accuracy=f"{row['accuracy']:.2f}", refresh=False)
    warn_if_no_reward(setup, step, progress, answers)


FEW = 64  # answers: if they all fail, less than 1 in 20 is right
FAILURES = dict(
    no_form="ended without a final answer in the form that --prompt asks for (--warm_start_steps "
    "teaches it)",
    cut="were cut by their budget (--max_new_tokens)",
    wrong="were wrong (easier --data, as --terms 3 is, or a stronger --model)",
)


def warn_if_no_reward(setup: Setup, step: int, progress: dict, answers: list[Rollout]) -> None:
    """Say once, after FEW answers or three steps without a reward, what became of them and which
    settings would help. Keeps count in `progress` until then."""
    counts = progress.setdefault("failed", dict.fromkeys(FAILURES, 0))
    if counts is None:
        return
    for r in answers:
        wrong = "wrong" if in_form(r, setup.tokenizer) else "no_form"
        counts[wrong if r.finished else "cut"] += 1
    total = sum(counts.values())
    some = any(r.reward for r in answers)
    if some or total >= FEW or step + 1 == min(3, setup.cfg.steps):
        progress["failed"] = None
        listed = Counter(counts).most_common()
        shares = ", ".join(f"{n / total:.0%} {FAILURES[why]}" for why, n in listed if n)
        if not some:
            tqdm.write(f"none of the first {total} answers got a reward: {shares}")


def append_metrics(folder: Path, row: dict) -> None:
    """Add a row to metrics.csv; the first one brings the header."""
    with open(folder / "metrics.csv", "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def finish_run(setup: Setup, progress: dict, facts: dict = {}, remark: str = "") -> None:
    """Evaluate, print what came of the run, and write it to summary.json, with `facts`."""
    before, after = progress["before"], setup.evaluate()
    summary = {f"{key}_before": value for key, value in before.items() if key != "k"}
    summary |= {f"{key}_after": value for key, value in after.items() if key != "k"}
    summary |= dict(k=after["k"], accuracy_stderr=after["accuracy_stderr"])
    summary |= {key: progress[key] for key in ("sampled_tokens", "seconds")} | facts
    tokens, seconds = progress["sampled_tokens"] / 1e6, progress["seconds"]
    say(
        f"before: {describe(before)}\nafter:  {describe(after)}\n{remark}"
        f"{tokens:.2f} M tokens sampled, {seconds:.0f} s of training; files in {setup.folder}/\n"
        f"held-out accuracy {before['accuracy']:.2f} -> {after['accuracy']:.2f}; "
        f"its curves: python tutorials/curves.py {setup.folder}"
    )
    (setup.folder / "summary.tmp").write_text(json.dumps(summary, indent=2) + "\n")
    (setup.folder / "summary.tmp").rename(setup.folder / "summary.json")


# -------------------------------------------------------------------------------------- checkpoints


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder under another name, then rename it: readers find the old one or the new. What
    was written of one that could not be filled is removed."""
    tmp = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    tmp.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


LOGS = ("metrics.csv", "samples.txt")  # what grows during a run


def save_checkpoint(folder: Path, setup: Setup, progress: dict, name="checkpoint") -> None:
    """folder/name in Hugging Face format, and in it everything that an exact resume needs. Raises
    OSError, with the last checkpoint as it was, if it cannot be written."""
    state = dict(progress=progress, generator=setup.generator.get_state())
    for part in ("optimizer", "schedule", "scaler"):
        state[part] = getattr(setup, part).state_dict()
    logs = [folder / log for log in LOGS]
    state["log_bytes"] = [log.stat().st_size if log.exists() else 0 for log in logs]
    try:
        with new_folder(folder / name) as tmp:
            setup.model.save_pretrained(tmp)
            setup.tokenizer.save_pretrained(tmp)
            torch.save(state, tmp / "state.pt")
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own
        left = shutil.disk_usage(folder.parent).free / 1e6
        reason = f"could not be saved; its disk has {left:,.0f} MB left ({one_line(error)})"
        raise OSError(f"{folder / name} {reason}") from None


def find_checkpoint(folder: Path) -> Path:
    """The run's last whole checkpoint. A kill between the renames leaves it under its old name."""
    for checkpoint in (folder / "checkpoint", folder / ".checkpoint.old"):
        if checkpoint.exists():
            return checkpoint
    raise BadInput(f"{folder} holds no checkpoint")


def resume(setup: Setup) -> dict:
    """Restore what `save_checkpoint` saved beside the weights, cut off log rows written after it,
    and return the run's progress."""
    file = find_checkpoint(setup.folder) / "state.pt"
    try:
        state = torch.load(file, weights_only=True)
        for part in ("optimizer", "schedule", "scaler"):
            getattr(setup, part).load_state_dict(state[part])
        setup.generator.set_state(state["generator"])
        progress, sizes = state["progress"], [int(size) for size in state["log_bytes"]]
    except Exception:
        raise BadInput(f"--resume: {file} is missing or damaged") from None
    for log, size in zip(LOGS, sizes):
        if (setup.folder / log).exists():
            os.truncate(setup.folder / log, size)
    return progress


# ------------------------------------------------------------------------------------------ endings


class StopRequest:
    """The first Ctrl-C, or SIGTERM as clusters send it, asks to stop after the step, where all can
    be saved; the next one stops at once."""

    def __init__(self):
        self.signal = 0
        self.before = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number: int, _) -> None:
        self.signal = number
        self.end()
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        with suppress(OSError):  # not print: the signal may have come in the middle of one
            os.write(2, f"\n{name}: finishing this step, then saving (again: at once)\n".encode())

    def end(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Outlet:
    """stdout or stderr that never ends a run: characters that it cannot encode become "?", and once
    nobody reads it any more, or its disk is full, what is written goes nowhere."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed when Python began
        with suppress(OSError):  # of a stream that is broken already
            self.stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def flush(self) -> None:
        """`write` has done it."""

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def say(text: str) -> None:
    print(printable(text), flush=True)


def cli(main) -> None:
    """Run a script's main(); what the user can mend becomes one line and exit code 2."""
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    go_on = "a run that had begun continues with --resume"

    def stop(message: str, code: int) -> None:
        print(printable(message), file=sys.stderr)
        sys.exit(code)

    try:
        main()
    except BadInput as error:
        stop("error: " + " ".join(str(error).splitlines()), 2)
    except KeyboardInterrupt:
        stop(f"\nstopped at once; {go_on}", 130)
    except OSError as error:
        stop(f"\nerror: {error}; {go_on}", 1)
    except (RuntimeError, MemoryError) as error:  # each device has words of its own
        words = "out of memory|allocate memory|ALLOC_FAILED"
        if not isinstance(error, MemoryError) and not re.search(words, str(error)):
            raise
        less = "--sampling_tokens, --training_tokens, --gradient_checkpointing True, --dtype bf16"
        stop(f"\nerror: out of memory; what needs less: {less}, shorter answers; {go_on}", 1)


def one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# ------------------------------------------------------------------------------------------ display


def slow_bar(label: str, total: int, unit: str) -> tqdm:
    """A bar for part of a step, which shows up only where that part takes seconds."""
    return tqdm(desc=f"  {label}", total=total, unit=unit, leave=False, delay=3)


def is_shown(run: RunConfig, step: int) -> bool:
    return bool(run.show_every) and (step + 1) % run.show_every == 0


def show(folder: Path, step: int, view) -> None:
    """Print view(colour=..., width=...), a step's text, above the progress bar, and keep it without
    colour and 100 characters wide in samples.txt."""
    with open(folder / "samples.txt", "a", encoding="utf-8") as file:
        file.write(f"step {step + 1}: {view(colour=False, width=100)}\n\n")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width = shutil.get_terminal_size((100, 24)).columns
    tqdm.write(f"\nstep {step + 1}: {view(colour=colour, width=width)}\n")


def problem_title(problem: Problem) -> str:
    question = printable(problem.question.replace("\n", " "))[:80]
    return f"{question}   answer {printable(problem.answer)}"


def answer_notes(problem: Problem, rollout: Rollout, tokenizer) -> tuple[str, dict[int, str]]:
    """What to show with an answer: its title, and a remark on its first wrong token, if known."""
    notes, wrong = {}, first_wrong_token(rollout.ids, problem, tokenizer)
    if wrong is not None:
        line = tokenizer.decode(rollout.ids[:wrong]).count("\n")
        right = problem.solution.split("\n")[line:][:1] or ["nothing more"]
        notes[wrong] = f"<- first wrong step; right: {right[0]}"
    return f"{problem_title(problem)}, reward {rollout.reward:.0f}", notes


def credit_lines(pieces, credits, labels, notes, colour: bool) -> list[str]:
    """An answer line by line; "|" opens a segment, whose label stands to the right.

    pieces: the tokens as text; credits: one per token, its colour; labels: first token of a segment
    -> its label; notes: token index -> a remark on that token's line.
    """
    rows = [["", "", [], ""]]  # plain text, what is printed of it, opened labels, remark
    for t, (piece, credit) in enumerate(zip(pieces, credits)):
        piece = printable(piece)
        if t in labels:
            piece = "|" + piece
            rows[-1][2].append(labels[t])
        rows[-1][3] = f"{rows[-1][3]} {notes.get(t, '')}".strip()
        for i, part in enumerate(piece.split("\n")):
            if i:
                rows.append(["", "", [], ""])
            rows[-1][0] += part
            rows[-1][1] += paint(part, credit) if colour else part
    column = min(60, max(len(row[0]) for row in rows))

    def listed(opened: list[str]) -> str:  # a policy unsure of everything opens dozens a line
        return " ".join(opened[:6]) + (f" and {len(opened) - 6} more" if len(opened) > 6 else "")

    return [
        f"  {shown}{' ' * (column - len(plain))}  {listed(opened):12} {remark}".rstrip()
        for plain, shown, opened, remark in rows
    ]


def paint(text: str, credit: float) -> str:
    """`text` on green for positive credit, on red for negative, stronger the larger."""
    shades = ("52", "88", "124") if credit < 0 else ("22", "28", "34")
    shade = shades[min(2, int(3 * abs(credit)))]
    return f"\033[48;5;{shade};38;5;231m{text}\033[0m" if text and credit else text


def printable(text: str) -> str:
    """`text` without control characters but line breaks: a policy must not steer the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)
