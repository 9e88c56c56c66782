"""Reruns the tables of results in README.md. By hand, about half an hour on two cores:

    python tests/results.py             everything: runs what is missing under runs/, then prints
    python tests/results.py default     the table of the default run, on all cores
    python tests/results.py compare     SPO-chain beside GRPO, two runs at a time on a core each
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

SPO = Path(__file__).resolve().parent.parent / "spo.py"
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
POINTS = {
    "step": (20, 40, 80),
    "sampled_tokens": (250_000, 500_000, 750_000),
    "seconds": (15, 30, 45),
}


def run(name: str, flags: str, threads: int | None = None) -> Path:
    """Run spo.py unless it is done already; returns the run's folder."""
    folder = Path("runs", name)
    if not (folder / "summary.json").exists():
        env = dict(os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
        flags = f"{flags} --name {name}" + (" --resume" if folder.exists() else "")
        command = [sys.executable, str(SPO), *flags.split()]
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


def default_table() -> None:
    folders = [run(f"default-{seed}", f"--seed {seed}") for seed in SEEDS]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
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


def compare_table() -> None:
    for seed in SEEDS:  # the warm starts first: two runs at once would each make their own
        run(f"warm-{seed}", f"--seed {seed} --steps 1", threads=1)
    jobs = [
        (f"compare-{i}-{seed}", f"--seed {seed} {flags}")
        for seed in SEEDS
        for i, flags in enumerate(COMPARED.values())
    ]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: run(*job, threads=1), jobs)
        list(tqdm(results, "comparison", len(jobs), unit="run"))
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
    chosen = sys.argv[1:] or ["default", "compare"]
    if "default" in chosen:
        default_table()
    if "compare" in chosen:
        compare_table()
