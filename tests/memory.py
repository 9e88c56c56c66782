"""Computes the table of GPU memory in README.md, without a GPU: python tests/memory.py

Weights and AdamW's moments are 12 bytes a parameter, counted on the model's shape, gradients 4,
and AdamW's step takes 4 more for a moment. What a layer keeps for the backward pass is measured: one
forward pass of one and of two layers, in autocast, by the bytes autograd holds. Sampling is sized by
what is left (common.sampling_tokens), so it takes no part.
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


if __name__ == "__main__":
    print("| | parameters | flags | any script | with `--kl_coef` |\n|---|---|---|---|---|")
    for name in SHAPES:
        for training, recompute in ((1 << 14, False), (1 << 14, True), (1 << 12, True)):
            sizes = [peak(name, training, recompute, ref) for ref in (False, True)]
            flags = f"`--training_tokens {training}`" if training != 1 << 14 else ""
            flags += " `--gradient_checkpointing True`" if recompute else ""
            cells = " | ".join(f"{size:.0f} GB" for size in sizes)
            print(f"| {name} | {parameters(name) / 1e9:.2f} B | {flags.strip()} | {cells} |")
