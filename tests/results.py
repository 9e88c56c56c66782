"""Reruns the tables of results in README.md. By hand, about half an hour on two cores:

    python tests/results.py             everything: runs what is missing under runs/, then prints
    python tests/results.py default     the table of the default run, on all cores
    python tests/results.py compare     SPO-chain beside GRPO, two runs at a time on a core each
    python tests/results.py mpo         MPO: the default run, and K and weights, two at a time
"""

import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
GRPO = "--partition trajectory --prompts 8 --group_size 8"
# All train on 64 answers an update. GRPO's updates are cheaper, so it gets more of them.
COMPARED = {
    "SPO-chain": "--steps 100 --eval_every 10",
    "SPO-chain, mask off": "--steps 100 --eval_every 10 --mask False",
    "SPO-chain, 8 x 8": "--steps 100 --eval_every 10 --prompts 8 --group_size 8",
    "GRPO": f"--steps 200 --eval_every 20 {GRPO} --mask False",
    "GRPO + mask": f"--steps 200 --eval_every 20 {GRPO}",
    "GRPO, lr 2e-4": f"--steps 200 --eval_every 20 {GRPO} --mask False --lr 2e-4",
    "GRPO + mask, lr 2e-4": f"--steps 200 --eval_every 20 {GRPO} --lr 2e-4",
}
MPO_ROWS = {
    "K = 1: GRPO": "--block_size 1",
    **{
        f"K = {k}, {name}": f"--block_size {k} --weights {weights}"
        for k in (2, 5)
        for name, weights in (("joint", "joint"), ("uniform", "uniform"), ("share 0.2", "0.2"))
    },
}
POINTS = {
    "step": (20, 40, 80),
    "sampled_tokens": (250_000, 500_000, 750_000),
    "seconds": (15, 30, 45),
}


def run(name: str, flags: str, threads: int | None = None, script="spo") -> Path:
    """Run the script unless it is done already; returns the run's folder."""
    folder = Path("runs", name)
    if not (folder / "summary.json").exists():
        env = dict(os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
        flags = f"{flags} --name {name}" + (" --resume" if folder.exists() else "")
        command = [sys.executable, str(ROOT / f"{script}.py"), *flags.split()]
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


def default_table(script: str = "spo", prefix: str = "default", flags: str = "") -> None:
    for seed in SEEDS:
        run(f"{prefix}-{seed}", f"--seed {seed} {flags}", script=script)
    summaries = [summary(f"{prefix}-{seed}") for seed in SEEDS]
    print("| seed | before | after | greedy | pass@4 | tokens | training |")
    print("|---|---|---|---|---|---|---|")
    for seed, s in zip(SEEDS, summaries):
        print(
            f"| {seed} | {s['accuracy_before']:.3f} | {s['accuracy_after']:.3f} "
            f"± {s['accuracy_stderr']:.3f} | {s['greedy_after']:.3f} "
            f"| {s['pass_at_k_after']:.3f} | {s['sampled_tokens'] / 1e6:.2f} M "
            f"| {s['seconds']:.0f} s |"
        )
    print(f"\nmean over seeds: {pm([s['accuracy_after'] for s in summaries], 3)}\n")
    if "credit_hit" in summaries[0]:
        pairs = [(s["credit_hit"], s["credit_chance"]) for s in summaries]
        hits = ", ".join(f"{hit:.2f} (chance {chance:.2f})" for hit, chance in pairs)
        print(f"credit hits, by seed: {hits}\n")


def mpo_table() -> None:
    """K = 1 has one ratio, so its rescaled clip range is its clip range."""
    scaled, more = "--scale_eps True", "--epochs 2"  # more: eight updates a step instead of four
    variants = {"": "", "s": scaled, "e": more, "es": f"{more} {scaled}"}
    jobs = [
        (f"mpo-{i}{variant}-{seed}", f"--seed {seed} {flags} {extra}")
        for variant, extra in variants.items()
        for i, flags in enumerate(MPO_ROWS.values())
        for seed in SEEDS
        if i or "s" not in variant
    ]
    run_all(jobs, "mpo")
    heads = "accuracy | scaled eps | ratio var | of block | clipped | of block | scaled eps"
    print(f"| | {heads} | 8 updates | scaled eps |\n|---{'|---' * 9}|")

    def cell(i, variant, column, digits) -> str:
        names = [f"mpo-{i}{variant}-{seed}" for seed in SEEDS]
        if not i and "s" in variant:
            return ""
        if column == "accuracy_after":
            return pm([summary(name)[column] for name in names], digits)
        return f"{statistics.mean(over_run(name, column) for name in names):.{digits}f}"

    for i, name in enumerate(MPO_ROWS):
        cells = [cell(i, v, "accuracy_after", 2) for v in ("", "s")]
        cells += [cell(i, "", c, 4) for c in ("token_ratio_var", "block_ratio_var")]
        cells += [cell(i, "", c, 4) for c in ("token_clip", "block_clip")]
        cells += [cell(i, "s", "block_clip", 4)]
        cells += [cell(i, v, "accuracy_after", 2) for v in ("e", "es")]
        print(f"| {name} | {' | '.join(cells)} |")


def compare_table() -> None:
    jobs = [
        (f"compare-{i}-{seed}", f"--seed {seed} {flags}")
        for seed in SEEDS
        for i, flags in enumerate(COMPARED.values())
    ]
    run_all(jobs, "spo")
    units = dict(step="updates", sampled_tokens="tokens", seconds="s")
    heads = [f"{point:,} {units[c]}" for c, points in POINTS.items() for point in points]
    print(f"| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for i, name in enumerate(COMPARED):
        cells = []
        for column, points in POINTS.items():
            for point in points:
                folders = [Path("runs", f"compare-{i}-{seed}") for seed in SEEDS]
                values = [accuracy_at(folder, column, point) for folder in folders]
                cells.append("" if None in values else pm(values, 2))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["default", "compare", "mpo"]
    if "default" in chosen:
        default_table()
    if "compare" in chosen:
        compare_table()
    if "mpo" in chosen:
        default_table("mpo", "mpo-default")
        mpo_table()
