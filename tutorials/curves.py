"""Two runs side by side, as a table of text: used by the bug lab and by assignment/train.py."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 14  # bars in a curve


def make(name: str, title: str, command: list[str], flags: list[str]) -> Path:
    """The folder of the run of that name, which is made by `command` if it is not there."""
    folder = Path("runs") / name
    if not (folder / "summary.json").exists():
        print(f"\n=== {title}", flush=True)
        again = ["--resume"] if (folder / "checkpoint").exists() else []
        done = subprocess.run([sys.executable, *command, "--name", name, *flags, *again])
        if done.returncode:  # it has said why
            sys.exit(done.returncode)
    return folder


def slug(flags: list[str]) -> str:
    return "-".join(re.sub(r"[^\w.]", "", flag) for flag in flags)


def columns(folder: Path) -> dict[str, list[float]]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


def accuracies(folder: Path) -> list[float]:
    """Held out, before and after training."""
    facts = json.loads((folder / "summary.json").read_text())
    return [facts["accuracy_before"], facts["accuracy_after"]]


def binned(values: list[float]) -> list[float]:
    """At most WIDTH means of neighbours."""
    size = max(1, -(-len(values) // WIDTH))
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts]


def curve(values: list[float], low: float, high: float) -> str:
    scale = (len(BARS) - 1) / ((high - low) or 1)
    return "".join(BARS[round((value - low) * scale)] for value in values)


def cell(values: list[float], low: float, high: float) -> str:
    """First bin, curve, last bin; and the lowest single value with its sign, which a mean hides."""
    means = binned(values)
    drawn = curve(means, low, high)
    return f"{means[0]:8.3g} {drawn:<{WIDTH}} {means[-1]:<8.3g} {min(values):<8.2g}"


def table(left: dict, right: dict, titles: tuple[str, str]) -> list[str]:
    """A line a metric; the two curves of a line share one scale, and what is 0 in both is left
    out."""
    wide = WIDTH + 27
    heads = [f"{title:^{wide}}" for title in titles]
    under = f"{'first':>8} {'':{WIDTH}} {'last':<8} {'lowest':<8}"
    lines = [f"{'':15}{heads[0]}{heads[1]}".rstrip(), f"{'':15}{under}  {under}".rstrip()]
    for key in left:
        pair = [left[key], right.get(key, [])]
        if key in ("step", "lr", "seconds") or not all(pair) or not any(map(any, pair)):
            continue
        means = [mean for values in pair for mean in binned(values)]
        cells = [cell(values, min(means), max(means)) for values in pair]
        lines.append(f"{key:<15}{'  '.join(cells)}".rstrip())
    return lines
