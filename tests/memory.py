"""Computes README.md's table of time and tests/README.md's of memory: python tests/memory.py

Weights and AdamW's moments are 12 bytes a parameter, counted on the model's shape, gradients 4,
and AdamW's step takes 4 more for a moment. What a layer keeps for the backward pass is measured: one
forward pass of one and of two layers, in autocast, by the bytes autograd holds. Sampling is sized by
what is left (common.sampling_tokens), so it takes no part.

Time is a bound, not a measurement: see `step_seconds`. tests/gpu.py measures both.
"""

import functools
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402

# hidden size, layers, heads, key-value heads, MLP's size, vocabulary, tied: from each config.json
SHAPES = {
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "rho-math-1b": (2048, 22, 32, 4, 5632, 32000, False),
    "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, True),
}
GB, TOKENS = 1e9, 252


def config(name: str, layers: int | None = None) -> Qwen2Config:
    hidden, depth, heads, kv_heads, mlp, vocab, tied = SHAPES[name]
    return Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers or depth, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp, vocab_size=vocab if not layers else 64,
        tie_word_embeddings=tied,
    )  # fmt: skip


@functools.cache
def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen2ForCausalLM(config(name)).parameters())


@functools.cache
def held(name: str, layers: int, recompute: bool) -> int:
    """Bytes that autograd holds after a forward pass over TOKENS, weights not counted."""
    model = Qwen2ForCausalLM(config(name, layers)).eval()
    if recompute:
        model.activation_checkpointing_enable(dict(use_reentrant=False))
    sizes = {p.numel() for p in model.parameters()}  # their bf16 copies are no activations
    kept = {}

    def pack(tensor):
        if tensor.numel() not in sizes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = common.collate([common.Sample([1], list(range(1, 64)) * (TOKENS // 63))])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        common.token_logprobs(model, batch, compute=common.Compute(dtype=torch.bfloat16))
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def peak(name: str, training: int, recompute: bool, reference: bool) -> float:
    """GB while gradients are computed or while the optimiser steps, whichever is more."""
    _, depth, _, _, _, vocab, _ = SHAPES[name]
    n = parameters(name)
    copies = (4 if reference else 2) * n  # in bf16, for as long as an autocast lasts
    fixed = (16 if reference else 12) * n
    layer = (held(name, 2, recompute) - held(name, 1, recompute)) / TOKENS
    inside = (held(name, 2, False) - held(name, 1, False)) / TOKENS if recompute else 0
    logits = 12 * min(training * vocab, common.MAX_LOGITS)  # fp32: logits, log-softmax, gradient
    update = copies + 4 * n + training * (depth * layer + inside) + logits
    return (fixed + max(update, 8 * n)) / GB


# bytes of memory, bytes a second from it, operations a second in dense bf16 (T4: fp16) and in fp32,
# from the data sheets
CARDS = {
    "T4, 16 GB": (16e9, 320e9, 65e12, 8e12),
    "RTX 3090, 24 GB": (24e9, 936e9, 71e12, 36e12),
    "RTX 4090, 24 GB": (24e9, 1008e9, 165e12, 83e12),
    "A100, 80 GB": (80e9, 2039e9, 312e12, 19.5e12),
    "H100, 80 GB": (80e9, 3350e9, 989e12, 67e12),
}
LAUNCH = 2.5e-4  # seconds a layer and pass: what Python and the driver take, however small the work
USED = 0.4  # of the operations a second, by matrix products of a transformer as they come
DRAW = 68  # bytes that drawing a token moves for each id of the vocabulary (common.draw)
PROBLEMS, PROMPT, ANSWER = 64, 150, 200  # GSM8K: tokens of a question with instruction, an answer
BOUNDARIES, CONTINUATIONS, EPOCHS = 5, 9, 2  # of an answer: an eighth of its tokens, each fifth one


def step_seconds(name: str, card: str) -> float:
    """Seconds of a step of spo.py's chain on GSM8K with the defaults for a given model, if nothing
    but arithmetic, memory's bandwidth and launches took time. A pass of the sampler through the
    layers takes the longest of the three; then come the fp32 head and the draw."""
    memory, bandwidth, operations, fp32 = CARDS[card]
    hidden, depth, heads, kv_heads, _, vocab, _ = SHAPES[name]
    n, kept = parameters(name), 2 * 2 * depth * kv_heads * hidden // heads  # bf16 bytes a token
    at_once = common.sampling_tokens(int(memory - 4 * n), n, kept)
    head = 2 * hidden * vocab / fp32 / USED  # seconds a token

    def sampling(rows: int, kept_before: int, new: int) -> float:
        batches = max(1, -(-rows * (kept_before + new) // at_once))
        each = rows / batches  # rows in a pass
        read = (2 * n + each * (kept_before + new / 2) * kept) / bandwidth
        layers = max(LAUNCH * depth, read, 2 * n * each / operations / USED)
        return batches * new * (layers + each * (head + vocab * DRAW / bandwidth))

    values = PROBLEMS * BOUNDARIES * CONTINUATIONS
    seconds = sampling(PROBLEMS, PROMPT, ANSWER)
    seconds += sampling(values, PROMPT + ANSWER // 2, ANSWER // 2)
    # All texts: prefilled twice, scored; and in each epoch forward, forward for the reference,
    # again for what was forgotten, and backward, which is two.
    passes = 2 + 1 + EPOCHS * 5
    layers = 2 * n * PROBLEMS * (PROMPT + ANSWER) / operations / USED
    return seconds + passes * (layers + PROBLEMS * ANSWER * head)


if __name__ == "__main__":
    print("| | parameters | flags | any script | with `--kl_coef` |\n|---|---|---|---|---|")
    for name in SHAPES:
        for training, recompute in ((1 << 14, False), (1 << 14, True), (1 << 12, True)):
            sizes = [peak(name, training, recompute, ref) for ref in (False, True)]
            flags = f"`--training_tokens {training}`" if training != 1 << 14 else ""
            flags += " `--gradient_checkpointing True`" if recompute else ""
            cells = " | ".join(f"{size:.0f} GB" for size in sizes)
            print(f"| {name} | {parameters(name) / 1e9:.2f} B | {flags.strip()} | {cells} |")
    peaks = {name: peak(name, 1 << 12, True, True) for name in SHAPES}
    heads = " | ".join(f"{name}, {size:.0f} GB" for name, size in peaks.items())
    print(f"\n| card | {heads} |\n|{'---|' * (len(SHAPES) + 1)}")
    for card, (size, *_) in CARDS.items():
        cells = [
            f"{step_seconds(name, card):.0f}" if peaks[name] * GB < size else "does not fit"
            for name in SHAPES
        ]
        print(f"| {card} | {' | '.join(cells)} |")
