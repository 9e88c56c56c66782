"""See any runs: side by side in the terminal, and as a picture.

    python tutorials/curves.py                       all folders under runs/
    python tutorials/curves.py runs/spo runs/mpo
    python tutorials/curves.py runs/spo --out spo.png
    python tutorials/curves.py --columns             what a run's files and metrics are

The list needs nothing but Python, the picture matplotlib (tutorials/requirements.txt). A run that
has not ended is shown as far as it has come. The bug lab and assignment/train.py use the tables.
"""

import argparse
import csv
import hashlib
import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 14  # bars in a curve
ROUNDING = 1e-7  # metrics are means of float32: what is smaller is no value but an error
MARKERS, DASHES = "os^Dvx", ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))]
XS = dict(step="rounds", sampled_tokens="sampled tokens", seconds="seconds of training")
ACCURACIES = ("accuracy", "held_out", "held_out_in_form")
FILES = {
    "config.json": "all settings",
    "metrics.csv": "the columns below, a row a round",
    "samples.txt": "the answers that were shown",
    "checkpoint/": "Hugging Face format, for AutoModelForCausalLM, with the state to resume",
    "summary.json": "at the end: accuracies before and after, standard error, tokens, seconds",
}
COLUMNS = {  # of metrics.csv, for one round; which script's, if not all have it
    "step": "rounds done, counting this one",
    "accuracy": "mean reward of the answers sampled for training (tree: of its leaves; "
    "reset_po: of those from the prompts, as many from each)",
    "loss": "mean over the updates; no measure of progress",
    "kl": "spo, mpo: KL(pi_old || pi) on the trained tokens, by r - 1 - log r (k3), before each "
    "update; over samples that carry a signal, for the others take no pass",
    "kl_ref": "spo, with --kl_coef: KL(pi || initial policy) on the trained tokens, by k3",
    "clip_fraction": "spo, reset_po: share of the trained tokens where the clip cuts the gradient; "
    "over samples that carry a signal",
    "grad_norm": "before clipping, mean over the updates; not finite where fp16 left one out",
    "entropy": "of the sampling policy, mean over all answer tokens (tree: of its trained nodes), "
    "in nats",
    "no_signal": "spo, mpo: share of the answers whose advantages are all 0",
    "boundaries": "spo: segments per answer",
    "trained": "spo: segments with an advantage (tree: nodes trained, with replay those drawn)",
    "length": "tokens per answer, end token included (reset_po: trained ones per rollout)",
    "lr": "learning rate after the round",
    "sampled_tokens": "so far, value estimates included, evaluation not",
    "seconds": "so far: sampling, credit and update; evaluation and saving not",
    "in_form": "share of the answers that ended by themselves with a final answer to read; others "
    "get no reward",
    "held_out": "sampled held-out accuracy, every --eval_every rounds",
    "held_out_in_form": "in_form of that evaluation",
    "token_ratio_var": "mpo: variance of the ratio if every token were an action",
    "block_ratio_var": "mpo: variance of the block's ratio",
    "token_clip": "mpo: share of tokens the clip would cut if every token were an action",
    "block_clip": "mpo: share of tokens that the clip does cut",
    "reset_accuracy": "reset_po: mean reward of the continuations",
    "resets": "reset_po: resets per problem",
    "no_signal_base": "reset_po: share of the base groups whose advantages are all 0",
    "no_signal_reset": "reset_po: the same of the reset groups",
    "hit": "reset_po: share of resets to the first wrong step",
    "at_or_before": "reset_po: share of resets to it or an earlier one",
    "hit_chance": "reset_po: what a random step would expect of hit",
    "at_or_before_chance": "reset_po: and of at_or_before",
    "base_tokens": "reset_po: sampled in the round for base groups",
    "seed_tokens": "reset_po: for answers outside of them",
    "localiser_tokens": "reset_po: for localisation",
    "reset_tokens": "reset_po: after resets",
}
NO_MATPLOTLIB = "pictures need matplotlib: pip install -r tutorials/requirements.txt"


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


def slug(flags: list[str], most: int = 60) -> str:
    """The flags as part of a folder's name: of long ones the beginning, and a digest of all."""
    text = "-".join(re.sub(r"[^\w.]", "", flag) for flag in flags)
    digest = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]
    return text if len(text) <= most else f"{text[:most]}-{digest}"


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


def seen(values: list[float]) -> bool:
    """Is any of them more than a rounding error? A scale of its own would make a curve of those."""
    return any(abs(value) > ROUNDING for value in values)


def curve(values: list[float], low: float, high: float) -> str:
    scale = (len(BARS) - 1) / ((high - low) or 1)
    return "".join(BARS[round((value - low) * scale)] for value in values)


def cell(values: list[float], low: float, high: float) -> str:
    """First bin, curve, last bin; and the lowest single value with its sign, which a mean hides."""
    means = binned(values)
    drawn = curve(means, low, high)
    return f"{means[0]:8.3g} {drawn:<{WIDTH}} {means[-1]:<8.3g} {min(values):<8.2g}"


def table(left: dict, right: dict, titles: tuple[str, str]) -> list[str]:
    """A line a metric; the two curves of a line share one scale, and what is 0 in both, but for
    rounding, is left out."""
    wide = WIDTH + 27
    heads = [f"{title:^{wide}}" for title in titles]
    under = f"{'first':>8} {'':{WIDTH}} {'last':<8} {'lowest':<8}"
    lines = [f"{'':15}{heads[0]}{heads[1]}".rstrip(), f"{'':15}{under}  {under}".rstrip()]
    for key in left:
        pair = [left[key], right.get(key, [])]
        if key in ("step", "lr", "seconds") or not all(pair) or not any(map(seen, pair)):
            continue
        means = [mean for values in pair for mean in binned(values)]
        cells = [cell(values, min(means), max(means)) for values in pair]
        lines.append(f"{key:<15}{'  '.join(cells)}".rstrip())
    return lines


# ------------------------------------------------------------------------------- any runs' folders


class Unreadable(Exception):
    """A folder that cannot be shown: its text is the one line that says why."""


class Run(NamedTuple):
    name: str
    rows: list[dict[str, float]]  # of metrics.csv, without its empty cells
    settings: dict  # of config.json
    summary: dict  # of summary.json; empty as long as the run goes on

    def points(self, x: str, key: str) -> list[tuple[float, float]]:
        """(x, value) of the rounds that have both; what is not finite cannot be drawn."""
        pairs = [(row[x], row[key]) for row in self.rows if x in row and key in row]
        return [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]

    def values(self, key: str) -> list[float]:
        return [value for _, value in self.points("step", key)]


def read_json(path: Path) -> dict:
    """What is in the file; nothing if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise Unreadable(f"{path} is damaged")
    return found


def read_rows(path: Path) -> list[dict[str, float]]:
    """Rows of metrics.csv. A last one of too few cells is left out: it is being written."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows and None in rows[-1].values():
            rows.pop()
        return [{key: float(text) for key, text in row.items() if text} for row in rows]
    except (OSError, ValueError, TypeError, csv.Error):
        raise Unreadable(f"{path} is damaged") from None


def read(folder: Path) -> Run:
    if not folder.is_dir():
        raise Unreadable(f"{folder}: there is no such folder")
    if not (folder / "metrics.csv").is_file():
        raise Unreadable(f"{folder} has no metrics.csv: no run, or none that has ended a round")
    rows = read_rows(folder / "metrics.csv")
    if not rows or not all({"step", "accuracy"} <= row.keys() for row in rows):
        raise Unreadable(f"{folder / 'metrics.csv'} is damaged")
    settings, summary = (read_json(folder / name) for name in ("config.json", "summary.json"))
    return Run(folder.name, rows, settings, summary)


def script_of(settings: dict) -> str:
    """config.json does not name its script, whose settings do."""
    marks = dict(block_size="mpo", method="reset_po", variant="spo")
    return next((script for mark, script in marks.items() if mark in settings), "")


def method_of(settings: dict) -> str:
    """In two or three words, what is asked of the script."""
    get = settings.get
    if script_of(settings) == "mpo":
        return f"K={get('block_size')} {get('layout')} {get('weights')}"
    if script_of(settings) == "reset_po":
        asked = get("localiser") if get("method") == "srpo" else ""
        return f"{get('method')} {asked}".strip()
    chain = get("variant") == "chain"
    how = get("partition") if chain else "-".join(map(str, get("branching") or []))
    return f"{get('variant', '')} {how or ''}".strip()


def known(text: str, *values) -> str:
    """The text with the values in it, or nothing where one of them is not there."""
    return "" if None in values else text.format(*values)


def accuracy_of(run: Run) -> str:
    """Held out, before -> after; of a run that goes on, where it stands."""
    get, held_out = run.summary.get, run.values("held_out")
    if run.summary:
        ends = [get("accuracy_before"), get("accuracy_after"), get("accuracy_stderr")]
        return known("{:.3f} -> {:.3f} ± {:.3f}", *ends)
    if held_out:
        return f"{held_out[-1]:.3f} so far"
    recent = run.values("accuracy")[-10:]
    return f"{sum(recent) / len(recent):.3f} in training" if recent else ""


def facts(run: Run, low: float, high: float) -> dict[str, str]:
    """A line of the list; its curve has the given scale."""
    get, last = run.summary.get, run.rows[-1]
    rounds, shown = f"{last['step']:.0f}", drawn_accuracy(run)
    planned = run.settings.get("steps")
    return {
        "run": run.name,
        "script": script_of(run.settings),
        "method": method_of(run.settings),
        "rounds": f"{rounds}/{planned}" if planned else rounds,
        "held-out accuracy": accuracy_of(run),
        "greedy": known("{:.3f}", get("greedy_after")),
        "in form": known("{:.1%}", get("in_form_after", last.get("in_form"))),
        "tokens": known("{:,.0f}", get("sampled_tokens", last.get("sampled_tokens"))),
        "seconds": known("{:.0f}", get("seconds", last.get("seconds"))),
        f"{low:.2f} to {high:.2f}": curve(binned(shown), low, high),
    }


def drawn_accuracy(run: Run) -> list[float]:
    """Of the held-out evaluations if there are some, else of the answers trained on."""
    held_out = run.values("held_out")
    return held_out if len(held_out) > 2 else run.values("accuracy")


def listing(runs: list[Run]) -> list[str]:
    """A line a run below the columns' names; all curves have one scale."""
    means = [mean for run in runs for mean in binned(drawn_accuracy(run))] or [0.0]
    shown = [facts(run, min(means), max(means)) for run in runs]
    lines = [list(shown[0]), *(list(line.values()) for line in shown)]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


# ----------------------------------------------------------------------------------- their picture


def style(i: int) -> dict:
    """Line i's colour, marker and dashes, so that lines can be told apart in grey."""
    return dict(color=f"C{i}", marker=MARKERS[i % 6], linestyle=DASHES[i % 6], markersize=5)


def evaluations(run: Run, x: str) -> tuple[list[float], list[float], list[float]]:
    """x, held-out accuracy and its standard error (0 where it is not kept), before the run first
    and after it last."""
    points = [(at, value, 0.0) for at, value in run.points(x, "held_out")]
    if {"accuracy_before", "accuracy_after"} <= run.summary.keys():
        ends = [(run.summary[f"accuracy_{when}"], run.summary.get(f"accuracy_stderr_{when}", 0.0))
                for when in ("before", "after")]  # fmt: skip
        last = run.rows[-1].get(x, 0.0)
        inner = [point for point in points if point[0] < last]
        points = [(0.0, *ends[0]), *inner, (last, *ends[1])]
    return tuple(map(list, zip(*points))) if points else ([], [], [])


def draw_accuracy(axis, runs: list[Run], x: str) -> None:
    """Pale: the answers trained on, means of neighbours. Marked: held out."""
    for i, run in enumerate(runs):
        at, trained = zip(*run.points(x, "accuracy")) if run.points(x, "accuracy") else ([], [])
        how = style(i)
        pale = dict(color=how["color"], linestyle=how["linestyle"], alpha=0.5, linewidth=1.2)
        axis.plot(binned(list(at)), binned(list(trained)), **pale)
        xs, ys, errors = evaluations(run, x)
        if len(xs) < 3:  # a line from before to after would be no curve
            how["linestyle"] = ""
        axis.errorbar(xs, ys, errors, label=run.name, capsize=3, elinewidth=0.8, **how)
    axis.set(xlabel=XS[x], ylabel="accuracy")
    axis.xaxis.set_major_formatter(lambda n, _: f"{n / 1000:g}k" if abs(n) >= 1000 else f"{n:g}")
    axis.grid(alpha=0.3)


def own_columns(runs: list[Run]) -> list[str]:
    """What the scripts have logged beside accuracy; what is 0 in all runs, but for
    rounding, shows nothing."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    rest = [key for key in keys if key not in (*XS, *ACCURACIES, "lr")]
    return [key for key in rest if any(seen(run.values(key)) for run in runs)]


def draw_column(axis, runs: list[Run], key: str) -> None:
    for i, run in enumerate(runs):
        steps, values = zip(*run.points("step", key)) if run.values(key) else ([], [])
        how = style(i)
        axis.plot(binned(list(steps)), binned(list(values)), color=how["color"],
                  linestyle=how["linestyle"], linewidth=1.2)  # fmt: skip
    axis.set_title(key, fontsize=10)
    axis.grid(alpha=0.3)


def picture(runs: list[Run], path: Path) -> None:
    """Accuracy against rounds, tokens and seconds, and a small panel for each other column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys, across = own_columns(runs), 6
    down = -(-len(keys) // across)
    figure = pyplot.figure(figsize=(13, 4.4 + 1.7 * down), layout="constrained")
    grid = figure.add_gridspec(1 + down, across, height_ratios=[2.2] + [1] * down)
    top = [figure.add_subplot(grid[0, 2 * i : 2 * i + 2]) for i in range(3)]
    for axis, x in zip(top, XS):
        draw_accuracy(axis, runs, x)
    for n, key in enumerate(keys):
        draw_column(figure.add_subplot(grid[1 + n // across, n % across]), runs, key)
    figure.legend(*top[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    said = "marked: held out, with its standard error; pale: the answers trained on, "
    figure.supxlabel(f"{said}means of neighbours; small panels: against rounds", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw(runs: list[Run], path: Path) -> str:
    """Draw the picture, if that can be done; what is to be said of it."""
    try:
        picture(runs, path)
    except ImportError:
        return NO_MATPLOTLIB
    except (OSError, ValueError) as error:  # no such folder, no such kind of picture
        raise Unreadable(f"--out {path}: {error}") from None
    return f"picture: {path}"


def meanings() -> list[str]:
    """What lies in a run's folder, and what each column of its metrics.csv means."""
    lines = ["in runs/<name>/"]
    for found in (FILES, COLUMNS):
        for name, meaning in found.items():
            indent = " " * 22
            about = textwrap.fill(meaning, 78)
            lines.append(f"  {name:<20}{about}".replace("\n", f"\n{indent}"))
        lines.append("")
    return lines[:-1]


def all_folders() -> list[Path]:
    folders = sorted(path.parent for path in Path("runs").glob("*/metrics.csv"))
    if not folders:
        raise Unreadable("no folder under runs/ holds a metrics.csv: nothing has been run here yet")
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="by default all under runs/")
    parser.add_argument("--out", type=Path, help="by default curves.png beside the first folder")
    about = "say what lies in a run's folder, and what the columns of metrics.csv are"
    parser.add_argument("--columns", action="store_true", help=about)
    args = parser.parse_args()
    if args.columns:
        print(*meanings(), sep="\n")
        return
    try:
        folders = args.folders or all_folders()
        runs = [read(folder) for folder in folders]
        print(*listing(runs), sep="\n")
        print(draw(runs, args.out or folders[0].parent / "curves.png"))
    except Unreadable as problem:
        print(problem, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
