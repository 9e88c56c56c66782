"""A student's file with every task right, in other words than the project's."""

import torch


def group_advantages(rewards, scale=True):
    rows = []
    for row in rewards:
        centred = row - row.sum() / len(row)
        if bool(row.eq(row[0]).all()):
            centred = 0 * row
        elif scale:
            centred = centred / (centred.square().sum() / len(row)).sqrt()
        rows.append(centred)
    return torch.stack(rows)


def masked_mean(x, mask, dim=None):
    kept = torch.where(mask, x, torch.zeros_like(x))
    axes = tuple(range(x.ndim)) if dim is None else (dim,)
    return kept.sum(axes) / torch.maximum(mask.sum(axes), torch.tensor(1))


def token_logprobs(model, batch, temperature=1.0):
    table = torch.log_softmax(model(batch.input_ids).logits.float() / temperature, dim=2)
    place = batch.context_lens.unsqueeze(1) - 1 + torch.arange(batch.mask.size(1))
    place = place.clamp(max=table.size(1) - 1)
    steps = table[torch.arange(table.size(0)).unsqueeze(1), place]
    picked = steps.gather(2, batch.targets.unsqueeze(2)).squeeze(2)
    return torch.where(batch.mask, picked, torch.zeros_like(picked))


def clipped_surrogate(log_ratio, advantages, clip_eps):
    r = torch.exp(torch.clip(log_ratio, min=-10, max=10))
    free, cut = r * advantages, torch.clip(r, 1 - clip_eps, 1 + clip_eps) * advantages
    return torch.where(cut < free, cut, free), free > cut


def k3(log_ratio):
    x = torch.clip(log_ratio, -10, 10)
    return torch.expm1(x) - x


def segment_starts(probs, interval, threshold):
    found = []
    for t, p in enumerate(probs):
        if float(p) < threshold:
            found.append(t)
    return [t for n, t in enumerate(found) if n % interval == 0]


def chain_advantages(starts, values, reward, length):
    credit, owner = torch.zeros(length), None
    after = list(values[1:]) + [reward]
    for t in range(length):
        if t in starts:
            owner = starts.index(t)
        if owner is not None:
            credit[t] = after[owner] - values[owner]
    return credit


def tree_advantages(parents, rewards, scale=False):
    count = len(parents)

    def value(n):
        below = [value(c) for c in range(count) if parents[c] == n]
        return sum(below) / len(below) if below else float(rewards[n])

    values = [value(n) for n in range(count)]
    credit = []
    for n, parent in enumerate(parents):
        gap = 0.0 if parent == -1 else values[n] - values[parent]
        if scale and gap:
            family = torch.tensor([values[c] for c in range(count) if parents[c] == parent])
            gap /= float((family - family.mean()).square().mean().sqrt())
        credit.append(gap)
    return values, credit


def trained_tokens(batch, cfg):
    unsure = torch.exp(batch.old_logprobs) < cfg.threshold
    return torch.logical_and(batch.mask, unsure) if cfg.mask else batch.mask.clone()


def spo_loss(logprobs, batch, mask, normaliser, clip_eps):
    gain, cut = clipped_surrogate(logprobs - batch.old_logprobs, batch.advantages, clip_eps)
    summed = torch.where(mask, gain, torch.zeros_like(gain)).sum()
    return summed / -normaliser if normaliser else 0 * summed, torch.logical_and(cut, mask)


def block_weights(block_size, weights):
    if weights == "joint":
        share = [1.0] * block_size
    elif weights == "uniform":
        share = [1 / block_size] * block_size
    else:
        share = [1 - weights] + [weights / (block_size - 1) for _ in range(block_size - 1)]
    return torch.tensor(share, dtype=torch.float64)


def mixing(mask, block_size, layout, weights):
    """(B, T, T): what each token counts for in each one's ratio."""
    out = torch.zeros(*mask.shape, mask.shape[1], dtype=torch.float64)
    beta = block_weights(min(block_size, mask.shape[1]) if weights == "joint" else block_size,
                         weights)  # fmt: skip
    for b in range(len(mask)):
        where = mask[b].nonzero().flatten().tolist()
        for n, t in enumerate(where):
            first = n if layout == "window" else n // block_size * block_size
            there = where[first : first + block_size]
            share = beta[: len(there)]
            out[b, t, there] = share if weights == "joint" else share / share.sum()
    return out


def block_log_ratio(log_ratio, mask, block_size, layout, weights):
    mix = mixing(mask, block_size, layout, weights).to(log_ratio.dtype)
    known = torch.where(mask, log_ratio, torch.zeros_like(log_ratio))
    return torch.einsum("btu,bu->bt", mix, known)


def scaled_eps(mask, cfg):
    mix = mixing(mask, cfg.block_size, cfg.layout, cfg.weights)
    return cfg.clip_eps * mix.square().sum(-1).sqrt()


def mpo_loss(log_ratio, batch, normaliser, cfg):
    logs = block_log_ratio(log_ratio, batch.mask, cfg.block_size, cfg.layout, cfg.weights)
    eps = cfg.clip_eps
    if cfg.scale_eps:
        eps = scaled_eps(batch.mask, cfg).to(logs.dtype)
    gain, cut = clipped_surrogate(logs, batch.advantages, eps)
    return gain[batch.mask].sum() / -normaliser, logs, cut & batch.mask


def step_starts(ids, tokenizer, delimiter="\n", max_steps=20, stops=frozenset()):
    ids = list(ids)
    if ids and (ids[-1] in tokenizer.all_special_ids or ids[-1] in stops):
        ids.pop()
    starts, line = [], 0
    for t in range(len(ids)):
        piece = tokenizer.decode([ids[t]])
        if piece == delimiter:
            line = t + 1
        elif piece.strip() and line not in starts:
            starts.append(line)
    return [0, *starts[1:]][:max_steps]


def localise_uncertain(probs, starts, threshold):
    doubts = [t for t in range(len(probs)) if probs[t] < threshold]
    t = doubts[0] if doubts else min(range(len(probs)), key=lambda i: probs[i])
    return max(k for k in range(1, len(starts) + 1) if starts[k - 1] <= t)


def reset_loss(logprobs, batch, normaliser, clip_eps):
    gain, cut = logprobs * batch.advantages, torch.zeros(batch.mask.shape, dtype=torch.bool)
    if clip_eps:
        gain, cut = clipped_surrogate(logprobs - batch.old_logprobs, batch.advantages, clip_eps)
    return masked_mean(gain, batch.mask, dim=1).sum() / -normaliser, cut
