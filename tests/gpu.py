"""One GPU in one command: tables to paste. By hand: pytest runs `--tiny` alone.

    python tests/gpu.py           on a CUDA machine; downloads nothing: weights are random, in the
                                  shapes of two models (see memory.py)
    python tests/gpu.py --tiny    the same with toy shapes, on a CPU too, in a minute

What a table shows was measured in a process of its own, so no memory is left from one to the next.
Random weights never end an answer, so every answer is as long as its budget, and the policy is sure
of nothing: chains are cut every so many tokens here, which gives about the boundaries of a trained
policy. Rewards are made up, and most groups carry a signal.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import memory  # noqa: E402
import mpo  # noqa: E402
import reset_po  # noqa: E402
import spo  # noqa: E402
from bench_sample import BUDGET, DEVICE, DTYPE, HERE, bandwidth, generate  # noqa: E402
from bench_sample import policy, timed  # noqa: E402

TINY = "--tiny" in sys.argv
memory.SHAPES["toy"] = (64, 2, 4, 2, 128, 512, True)
SHAPES = ["toy"] if TINY else ["Qwen2.5-0.5B", "Qwen2.5-1.5B"]
ANSWER = 24 if TINY else 512  # tokens
SEGMENT = 8 if TINY else 40
SCRIPTS = dict(spo=spo, mpo=mpo, reset_po=reset_po)
METHODS = {  # the scripts' defaults for a given model, but for where a chain is cut
    "SPO-chain": f"spo --partition fixed --segment_tokens {SEGMENT}",
    "SPO-tree, 4-4-4": f"spo --variant tree --segment_tokens {SEGMENT}",
    "GRPO, 32 x 8": "spo --partition trajectory --prompts 32 --group_size 8 --mask False",
    "MPO": "mpo",
    "RRPO": "reset_po --method rrpo",
}
SMALL = {  # with --tiny
    "spo": "--prompts 2 --batch_size 0 --continuations 2 --branching 2 2 --threshold 1".split(),
    "mpo": "--prompts 2 --batch_size 4 --group_size 4".split(),
    "reset_po": "--prompts 2 --fresh 2 --resets 2 --batch_size 0".split(),
}


def alone(function, *arguments):
    """function(*arguments) in a new process."""
    kind = "spawn" if DEVICE.type == "cuda" else "fork"  # CUDA does not survive a fork
    with ProcessPoolExecutor(1, multiprocessing.get_context(kind)) as pool:
        return pool.submit(function, *arguments).result()


# ----------------------------------------------------------------------------- sample and generate


def sampling_rows(shape: str) -> list[str]:
    """tokens/s of `common.sample` and of transformers' generate, and what share of the memory's
    bandwidth reading the weights once a pass takes, which bounds decoding few rows."""
    model, tokenizer, _ = policy(shape)  # one token a byte; other ids are no text
    prompts = torch.randint(256, (4 if TINY else 16, 64)).tolist()
    weights = model.num_parameters() * DTYPE.itemsize  # bytes
    limit, rows = bandwidth(DEVICE, 1 << 24 if TINY else 1 << 28), []
    for n in (1, 8, 64):
        options = dict(max_new_tokens=BUDGET, eos=set(), compute=HERE)
        ours, theirs = [], []
        for _ in range(1 if TINY else 4):
            seconds, rollouts = timed(DEVICE, lambda: common.sample(model, prompts, n, **options))
            ours.append(sum(len(r.ids) for r in rollouts) / seconds)
            seconds, texts = timed(DEVICE, lambda: generate(model, tokenizer, prompts, n))
            theirs.append(sum(map(len, texts)) / seconds)
        mine, other = (statistics.median(rates[-3:]) for rates in (ours, theirs))  # first: warm-up
        share = mine / len(prompts) / n * weights / limit
        cells = f"{n} | {mine:,.0f} | {other:,.0f} | {mine / other:.2f} | {share:.0%}"
        rows.append(f"| {shape} | {cells} |")
    return rows


# ------------------------------------------------------------------------------------ steps, memory


def run_script(name: str, flags: list[str]) -> None:
    """The script's main(), with nothing printed."""
    sys.argv, quiet = [f"{name}.py", *flags], open(os.devnull, "w")
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        SCRIPTS[name].main()


def measured_step(shape: str, command: str) -> dict:
    """Seconds of the second step of a script's main(), and of its parts; the most memory that its
    update took; how far new log-probs are from the old ones before anything was learned."""
    name, *flags = command.split()
    script, parts, after_step, apart, peaks = SCRIPTS[name], {}, [], [], [0]

    def take_time(owner, attribute: str, part: str) -> None:
        real = getattr(owner, attribute)

        def around(*args, **options):
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds, result = timed(DEVICE, lambda: real(*args, **options))
            parts[part] = parts.get(part, 0.0) + seconds
            if DEVICE.type == "cuda" and part == "update":
                peaks.append(torch.cuda.max_memory_allocated())
            return result

        setattr(owner, attribute, around)

    real_logprobs, real_log = common.token_logprobs, common.log_step

    def token_logprobs(model, batch, *args, **options):
        result = real_logprobs(model, batch, *args, **options)
        if torch.is_grad_enabled() and not apart:  # the first batch of the first update
            apart.extend((result.detach() - batch.old_logprobs)[batch.mask].abs().tolist())
        return result

    def log_step(setup, step, bar, progress, *rest, **options):
        after_step.append(dict(parts, all=progress["seconds"], tokens=progress["sampled_tokens"]))
        real_log(setup, step, bar, progress, *rest, **options)

    common.token_logprobs, common.log_step = token_logprobs, log_step
    take_time(common, "sample", "sampling")
    take_time(common, "score", "scoring")
    take_time(script, "update", "update")
    common.response_reward = lambda ids, *_: float(sum(ids) % 2)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for part in policy(shape)[:2]:  # model and tokenizer
            part.save_pretrained("policy")
        rows = [dict(question=f"{i}+{i} " * 16, answer=f"#### {2 * i}") for i in range(400)]
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags += f"--model policy --data rows.jsonl --max_new_tokens {ANSWER} --steps 2".split()
        flags += "--eval_problems 1 --show_every 0 --prompt none".split()
        run_script(name, flags + (SMALL[name] if TINY else []))
    first, second = after_step
    cost = {key: second[key] - first.get(key, 0.0) for key in second}
    return cost | dict(apart=apart, peak=max(peaks))


def step_rows(shape: str) -> tuple[list[str], list[str]]:
    """A row for each method: seconds and memory; and how far log-probs are apart."""
    costs, ratios = [], []
    for method, command in METHODS.items():
        cost = alone(measured_step, shape, command)
        shares = [f"{cost[part]:.1f}" for part in ("all", "sampling", "scoring", "update")]
        with_kl = command.startswith("spo")  # the reference that it loads
        computed = memory.peak(shape, 1 << 14, True, with_kl)
        peak = f"{cost['peak'] / memory.GB:.1f}" if cost["peak"] else "no GPU"
        cells = f"{cost['tokens']:,} | {' | '.join(shares)} | {peak} | {computed:.1f}"
        costs.append(f"| {shape} | {method} | {cells} |")
        largest, mean = max(cost["apart"]), statistics.mean(cost["apart"])
        ratios.append(f"| {shape} | {method} | {largest:.1e} | {mean:.1e} |")
    return costs, ratios


# ----------------------------------------------------------------------------- does it still learn


def learned(folder: str, name: str, command: str, dtype: str) -> dict:
    """summary.json of a run on the built-in task."""
    script, *flags = command.split()
    flags += f"--tiny --name {name} --show_every 0 --dtype {dtype}".split()
    flags += "--warm_start_steps 80 --steps 2 --eval_problems 10".split() if TINY else []
    with contextlib.chdir(folder):
        run_script(script, flags)
        return json.loads(Path("runs", name, "summary.json").read_text())


def learning_rows() -> list[str]:
    """The runs share a folder, and so their warm start."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("bf16", "fp16"):
            for command in ("spo", "spo --variant tree", "mpo", "reset_po"):
                done = alone(learned, folder, f"run{len(rows)}", command, dtype)
                cells = [f"{done[f'accuracy_{when}']:.3f}" for when in ("before", "after")]
                cells.append(f"{done['accuracy_stderr']:.3f} | {done['seconds']:.0f}")
                rows.append(f"| `{command} --tiny` | {dtype} | {' | '.join(cells)} |")
    return rows


def table(title: str, heads: str, rows: list[str]) -> None:
    line = "|---" * (heads.count("|") + 1) + "|"
    print(f"\n{title}\n\n| {heads} |\n{line}", *rows, sep="\n", flush=True)


def main() -> None:
    cuda = DEVICE.type == "cuda"
    if not (cuda or TINY):
        raise SystemExit("torch finds no CUDA here; --tiny shows the tables on a CPU")
    card = torch.cuda.get_device_name() if cuda else f"no GPU, {platform.processor()}"
    dtype = str(DTYPE).removeprefix("torch.")
    print(f"{card}; {dtype}; torch {torch.__version__}, transformers {transformers.__version__}")
    heads = "| n | `sample`, tokens/s | `generate`, tokens/s | ratio | of the bandwidth"
    rows = [row for shape in SHAPES for row in alone(sampling_rows, shape)]
    table(f"Sampling {BUDGET} tokens to each prompt", heads, rows)
    costs, ratios = zip(*map(step_rows, SHAPES))
    heads = "| | tokens | s a step | sampling | scoring | update | GB in the update | computed"
    table(f"A step with answers of {ANSWER} tokens", heads, [row for rows in costs for row in rows])
    heads = "| | largest | mean"
    title = "New against old log-probs before the first update, of the tokens of a batch"
    table(title, heads, [row for rows in ratios for row in rows])
    heads = "command | dtype | before | after | ± | s"
    table("Accuracy on the built-in task", heads, learning_rows())


if __name__ == "__main__":
    main()
