"""Tokens per second of common.sample against transformers' generate. By hand: pytest skips it.

    python tests/bench_sample.py

Same policy, prompts, temperature and number of answers; the two take turns, and the ratio is the
median over the rounds. The policy is the default warm start, made first where it is missing.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

PROMPTS, BUDGET, ROUNDS = 64, 80, 5


def rate(draw) -> float:
    """Answer tokens, end token included, per second; draw() returns their number."""
    began = time.perf_counter()
    tokens = draw()
    return tokens / (time.perf_counter() - began)


def main() -> None:
    run = common.RunConfig()
    device, dtype = common.pick_device(run)
    problems = common.load_problems(run.data, "train", None, run.seed, run.terms)
    folder = common.warm_start(run, problems, device, dtype)
    model, tokenizer = common.load_policy(folder, device, dtype)
    prompts = [common.prompt_ids(tokenizer, problem) for problem in problems[:PROMPTS]]
    eos, end = common.eos_ids(model, tokenizer), tokenizer.eos_token_id
    tokenizer.padding_side = "left"
    padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)

    def ours(n: int) -> int:
        rollouts = common.sample(model, prompts, n, max_new_tokens=BUDGET, eos=eos)
        return sum(len(r.ids) for r in rollouts)

    def generate(n: int) -> int:
        out = model.generate(
            **padded, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=n,
            max_new_tokens=BUDGET, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        rows = out[:, padded["input_ids"].shape[1] :].tolist()
        return sum(row.index(end) + 1 if end in row else len(row) for row in rows)

    print(f"{PROMPTS} prompts, {device}, {dtype}, {torch.get_num_threads()} threads")
    print("|  n | sample, tokens/s | generate, tokens/s | ratio |\n|---|---|---|---|")
    for n in (1, 8, 32):
        ours(n), generate(n)
        pairs = [(rate(lambda: ours(n)), rate(lambda: generate(n))) for _ in range(ROUNDS)]
        mine, theirs = (statistics.median(column) for column in zip(*pairs))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"| {n} | {mine:,.0f} | {theirs:,.0f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
