"""Reruns the tables of results in README.md. By hand, about an hour on two cores:

    python tests/results.py             everything: runs what is missing under runs/, then prints
    python tests/results.py default     the tables of the default runs of SPO, on all cores
    python tests/results.py compare     SPO beside GRPO, two runs at a time on a core each
    python tests/results.py mpo         MPO: the default run, and K and weights, two at a time
    python tests/results.py reset       resets: default runs, methods beside each other, localisers
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import reset_po  # noqa: E402

SEEDS = (0, 1, 2)
GRPO = "--partition trajectory --prompts 8 --group_size 8 --steps 200 --eval_every 20"
CHAIN = "--steps 100 --eval_every 10"
# All but those of 64 problems x 8 and the trees train on 64 answers an update.
COMPARED = {
    "GRPO": f"{GRPO} --mask False",
    "GRPO + mask": GRPO,
    "GRPO + mask, 64 x 8": "--partition trajectory --group_size 8 --steps 80 --eval_every 10",
    "VinePPO's partition": "--partition newline --mask False --steps 80 --eval_every 10",
    "SPO-chain": CHAIN,
    "SPO-chain, mask off": f"{CHAIN} --mask False",
    "SPO-chain, interval 3": f"{CHAIN} --interval 3",
    "SPO-tree, 2-2-2": f"{CHAIN} --variant tree",
    "SPO-tree, 4-4": f"{CHAIN} --variant tree --branching 4 4 --segment_tokens 16 --prompts 32",
}
MPO_ROWS = {
    "K = 1: GRPO": "--block_size 1",
    **{
        f"K = {k}, {name}": f"--block_size {k} --weights {weights}"
        for k in (2, 5)
        for name, weights in (("joint", "joint"), ("uniform", "uniform"), ("share 0.2", "0.2"))
    },
}
RESET_ROWS = {
    "GRPO, groups of 8": "--method grpo",
    "RRPO: random step": "--method rrpo",
    "SRPO, `uncertain`": "--localiser uncertain",
    "SRPO, `surprise`": "--localiser surprise",
    "SRPO, `oracle`": "--localiser oracle",
}
POINTS = {
    "step": (20, 40, 80),
    "sampled_tokens": (250_000, 500_000, 750_000),
    "seconds": (15, 30, 45),
}


# On one core a run's seconds are those of the processor, whatever else the machine does meanwhile.
CPU_CLOCK = """
import os, runpy, sys, time
time.time = time.process_time
sys.argv, sys.path[0] = sys.argv[1:], os.path.dirname(sys.argv[1])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(name: str, flags: str, threads: int | None = None, script="spo") -> Path:
    """Run the script unless it is done already; returns the run's folder."""
    folder = Path("runs", name)
    if not (folder / "summary.json").exists():
        env = dict(os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
        flags = f"{flags} --name {name}" + (" --resume" if folder.exists() else "")
        clock = ["-c", CPU_CLOCK] if threads == 1 else []
        command = [sys.executable, *clock, str(ROOT / f"{script}.py"), *flags.split()]
        subprocess.run(command, check=True, env=env, capture_output=True)
    return folder


def pm(values: list[float], digits: int) -> str:
    """Mean over seeds and its standard error."""
    stderr = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {stderr:.{digits}f}"


def accuracy_at(folder: Path, column: str, point: float) -> float | None:
    """Held-out accuracy when `column` stood at `point`, between the two nearest evaluations."""
    before = json.loads((folder / "summary.json").read_text())["accuracy_before"]
    with open(folder / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["held_out"]]
    curve = [(0.0, before)] + [(float(row[column]), float(row["held_out"])) for row in rows]
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= point <= x1:
            return y0 + (y1 - y0) * (point - x0) / (x1 - x0)
    return None  # beyond the run's end


def summary(name: str) -> dict:
    return json.loads(Path("runs", name, "summary.json").read_text())


def over_run(name: str, column: str) -> float:
    """Mean of a column of metrics.csv."""
    with open(Path("runs", name, "metrics.csv")) as file:
        return statistics.mean(float(row[column]) for row in csv.DictReader(file))


def run_all(jobs: list[tuple[str, str]], script: str) -> None:
    """(name, flags) each, two at a time on a core each; the warm starts first: two runs at once
    would each make their own."""
    for seed in SEEDS:
        run(f"warm-{seed}", f"--seed {seed} --steps 1", threads=1)
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: run(*job, threads=1, script=script), jobs)
        list(tqdm(results, script, len(jobs), unit="run"))


def default_table(name: str, flags: str) -> None:
    for seed in SEEDS:
        run(f"{name}-{seed}", f"--seed {seed} {flags}")
    summaries = [summary(f"{name}-{seed}") for seed in SEEDS]
    print("| seed | before | after | greedy | pass@4 | tokens | training |")
    print("|---|---|---|---|---|---|---|")
    for seed, s in zip(SEEDS, summaries):
        print(
            f"| {seed} | {s['accuracy_before']:.3f} | {s['accuracy_after']:.3f} "
            f"± {s['accuracy_stderr']:.3f} | {s['greedy_after']:.3f} "
            f"| {s['pass_at_k_after']:.3f} | {s['sampled_tokens'] / 1e6:.2f} M "
            f"| {s['seconds']:.0f} s |"
        )
    print(f"\nmean over seeds: {pm([s['accuracy_after'] for s in summaries], 3)}")
    hits = ", ".join(f"{s['credit_hit']:.2f} (chance {s['credit_chance']:.2f})" for s in summaries)
    print(f"credit hits, by seed: {hits}\n")


def other_default(label: str, script: str, name: str, flags: str = "") -> None:
    """A script's default run on all cores, one seed a column, and the time of the whole process."""
    cells, summaries = [], []
    for seed in SEEDS:
        began = time.time()
        run(f"{name}-{seed}", f"--seed {seed} {flags}", script=script)
        s = summary(f"{name}-{seed}")
        took = f", {time.time() - began:.0f} s" if time.time() - began > s["seconds"] else ""
        cells.append(f"{s['accuracy_after']:.3f} ± {s['accuracy_stderr']:.3f}{took}")
        summaries.append(s)
    cells.append(pm([s["accuracy_after"] for s in summaries], 3))
    for column, scale, unit in (("sampled_tokens", 1e6, "M"), ("seconds", 1, "s")):
        values = [s[column] / scale for s in summaries]
        digits = 2 if unit == "M" else 0
        cells.append(f"{min(values):.{digits}f} to {max(values):.{digits}f} {unit}")
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


def mpo_table() -> None:
    """K = 1 has one ratio, so its rescaled clip range is its clip range."""
    rows = list(enumerate(MPO_ROWS.values()))
    jobs = [(f"mpo-{i}-{s}", f"--seed {s} {flags}") for i, flags in rows for s in SEEDS]
    scaled = [(f"mpo-{i}-{s}-scaled", f"--seed {s} {flags}") for i, flags in rows for s in SEEDS]
    jobs += [(name, f"{flags} --scale_eps True") for name, flags in scaled[len(SEEDS) :]]
    run_all(jobs, "mpo")
    heads = "accuracy | ratio var | block's | cut % | block's"
    heads += " | scaled eps: accuracy | block's cut %"
    print(f"| | {heads} |\n|---{'|---' * 7}|")
    for i, name in enumerate(MPO_ROWS):
        cells = []
        for tail in ("", "-scaled") if i else ("",):
            names = [f"mpo-{i}-{seed}{tail}" for seed in SEEDS]
            cells.append(pm([summary(name)["accuracy_after"] for name in names], 3))
            columns = ["token_ratio_var", "block_ratio_var", "token_clip", "block_clip"]
            for column in columns[3:] if tail else columns:
                mean = statistics.mean(over_run(name, column) for name in names)
                cells.append(f"{mean:.4f}" if "var" in column else f"{100 * mean:.2f}")
        print(f"| {name} | {' | '.join(cells + [''] * (7 - len(cells)))} |")


def mpo_stress_table() -> None:
    """Far off-policy: 16 updates on each step's answers."""
    rows = {name: flags for name, flags in MPO_ROWS.items() if "K = 2" not in name}
    scaled = {name: flags for name, flags in rows.items() if "K = 1" not in name}
    run_all(curve_jobs(rows, "mpo-stress", "--epochs 4 --steps 25"), "mpo")
    more = "--epochs 4 --steps 25 --scale_eps True"
    run_all(curve_jobs(scaled, "mpo-stress-scaled", more), "mpo")
    heads = "accuracy | ratio var | block's | cut % | block's | scaled eps: accuracy"
    print(f"| | {heads} |\n|---{'|---' * 6}|")
    for i, name in enumerate(rows):
        names = [f"mpo-stress-{i}-{seed}" for seed in SEEDS]
        cells = [pm([summary(name)["accuracy_after"] for name in names], 2)]
        for column in ("token_ratio_var", "block_ratio_var", "token_clip", "block_clip"):
            mean = statistics.mean(over_run(name, column) for name in names)
            cells.append(f"{mean:.2f}" if "var" in column else f"{100 * mean:.1f}")
        names = [f"mpo-stress-scaled-{i - 1}-{seed}" for seed in SEEDS]
        cells.append(pm([summary(name)["accuracy_after"] for name in names], 2) if i else "")
        print(f"| {name} | {' | '.join(cells)} |")


def curve_table(rows: dict[str, str], prefix: str, columns: list[str]) -> None:
    """Held-out accuracy of each row's runs where a column of metrics.csv stood at its POINTS."""
    units = dict(step="updates", sampled_tokens="tokens", seconds="s")
    heads = [f"{point:,} {units[c]}" for c in columns for point in POINTS[c]]
    print(f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for i, name in enumerate(rows):
        cells = []
        for column in columns:
            for point in POINTS[column]:
                folders = [Path("runs", f"{prefix}-{i}-{seed}") for seed in SEEDS]
                values = [accuracy_at(folder, column, point) for folder in folders]
                cells.append("" if None in values else pm(values, 2))
        print(f"| {name} | {' | '.join(cells)} |")


def curve_jobs(rows: dict[str, str], prefix: str, more: str = "") -> list[tuple[str, str]]:
    numbered = enumerate(rows.values())
    pairs = [(i, flags, seed) for i, flags in numbered for seed in SEEDS]
    return [(f"{prefix}-{i}-{seed}", f"--seed {seed} {flags} {more}") for i, flags, seed in pairs]


def compare_table() -> None:
    run_all(curve_jobs(COMPARED, "compare", "--eval_problems 300"), "spo")
    curve_table(COMPARED, "compare", ["step", "sampled_tokens", "seconds"])
    print("\n| | tokens a step | trained segments a step | tokens for each |\n|---|---|---|---|")
    for i, name in enumerate(COMPARED):
        names = [f"compare-{i}-{seed}" for seed in SEEDS]
        steps = [len((Path("runs", n, "metrics.csv")).read_text().split()) - 1 for n in names]
        tokens = [summary(n)["sampled_tokens"] / count for n, count in zip(names, steps)]
        trained = [over_run(n, "trained") for n in names]
        ratios = [t / k for t, k in zip(tokens, trained)]
        print(f"| {name} | {pm(tokens, 0)} | {pm(trained, 0)} | {pm(ratios, 0)} |")


def localiser_row(folder: Path, seed: int, problems: int) -> list[reset_po.Reset]:
    """The failures of a policy on problems that it was not trained on, not reset yet."""
    model, tokenizer = common.load_policy(folder, "cpu")
    test = common.load_problems("sums", "validation", problems, seed)
    states = [common.initial_state(tokenizer, problem) for problem in test]
    options = dict(generator=torch.Generator().manual_seed(seed))
    failed = []
    for problem, r in zip(test, common.complete(model, tokenizer, states, 1, 80, **options)):
        if not r.reward and common.first_wrong_token(r.ids, problem, tokenizer) is not None:
            failed.append((problem, common.Sample(r.prompt, r.ids)))
    common.score(model, [s for _, s in failed], 1.0)
    resets = []
    for problem, s in failed:
        starts = reset_po.step_starts(s.ids, tokenizer)
        truth = reset_po.localise_oracle(s.ids, starts, problem, tokenizer)
        resets.append(reset_po.Reset(problem, s, starts, 0, truth, []))
    return resets


def localiser_table(problems: int) -> None:
    """How often the localisers name the first wrong step, and it or an earlier one, before and
    after the default SRPO runs: figures pooled over seeds."""
    print("| failures of | | by chance | `uncertain` | `surprise` |\n|---|---|---|---|---|")
    cpu, threshold = torch.device("cpu"), reset_po.Config().threshold
    for label in ("warm start", "after the run"):
        resets = []
        for seed in SEEDS:
            folder = Path("runs", f"reset-srpo-{seed}", "checkpoint")
            if label == "warm start":
                train = common.load_problems("sums", "train", None, seed)
                settings = common.RunConfig(seed=seed)
                model, tokenizer = common.first_policy(settings, cpu)
                folder = common.warm_start(settings, train, model, tokenizer)
            resets += localiser_row(folder, seed, problems)
        cells = []
        for localise in (
            lambda probs, starts: reset_po.localise_uncertain(probs, starts, threshold),
            reset_po.localise_surprise,
        ):
            named = [localise(reset_po.probs_of(r.seed), r.starts) for r in resets]
            named = [r._replace(named=h) for r, h in zip(resets, named)]
            cells.append(reset_po.locate_counts(named))
        count = cells[0]["failures"]
        shares = [(c["hit"] / count, c["at_or_before"] / count) for c in cells]
        chance = cells[0]["hit_chance"] / count, cells[0]["at_or_before_chance"] / count
        texts = [f"{100 * x:.0f} / {100 * y:.0f} %" for x, y in (chance, *shares)]
        print(f"| {label} | {count:,} | {' | '.join(texts)} |")


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["default", "compare", "mpo", "reset"]
    if "default" in chosen:
        default_table("default", "")
        default_table("default-tree", "--variant tree")
    if "compare" in chosen:
        compare_table()
    if "mpo" in chosen:
        other_default("`mpo.py`", "mpo", "mpo-default")
        mpo_table()
        mpo_stress_table()
    if "reset" in chosen:
        other_default("`reset_po.py`", "reset_po", "reset-srpo")
        other_default("`reset_po.py --method rrpo`", "reset_po", "reset-rrpo", "--method rrpo")
        run_all(curve_jobs(RESET_ROWS, "resets", "--eval_every 10"), "reset_po")
        curve_table(RESET_ROWS, "resets", ["step", "sampled_tokens"])
        localiser_table(problems=2000)
