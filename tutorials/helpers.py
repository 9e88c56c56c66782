"""What the notebooks share: the repository on Python's path, one warm start, small runs that are
kept until a script changes, and pictures. No algorithm stands in here: those are in the scripts.
"""

import contextlib
import hashlib
import inspect
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tutorials")]
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network
os.environ["TQDM_DISABLE"] = "1"  # no bars in kept outputs
warnings.filterwarnings("ignore", message="IProgress not found")  # nor what tqdm misses for them

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from IPython.display import Markdown, display  # noqa: E402

import common  # noqa: E402
import curves  # noqa: E402
from curves import style  # noqa: E402

plt.rcParams.update({"figure.dpi": 80, "savefig.dpi": 80, "font.size": 10, "hatch.linewidth": 0.6})
SHADES = plt.get_cmap("RdBu")  # red: negative credit, blue: positive
HATCHES = ["", "///", "...", "xx", "\\\\\\", "++"]
TERMS, LONGEST = 5, 48  # sums of 3 to 5 terms, answers of at most 48 tokens


ASSIGNED = set(  # what tutorials/assignment asks for: its source is folded
    "group_advantages masked_mean token_logprobs clipped_surrogate k3 segment_starts "
    "chain_advantages tree_advantages trained_tokens spo_loss block_weights block_log_ratio "
    "scaled_eps mpo_loss step_starts localise_uncertain reset_loss".split()
)


def source_text(*functions) -> str:
    """Functions as they stand in the scripts, in Markdown; folded if the assignment asks for one."""
    text = "\n\n".join(inspect.getsource(function).rstrip() for function in functions)
    text = f"```python\n{text}\n```"
    tasks = [f"<code>{f.__name__}</code>" for f in functions if f.__name__ in ASSIGNED]
    if tasks:
        fold = (
            f"Source (the assignment asks for {', '.join(tasks)}: write yours before you open it)"
        )
        text = f"<details><summary>{fold}</summary>\n\n{text}\n\n</details>"
    return text


def source(*functions) -> None:
    """Show `source_text`."""
    display(Markdown(source_text(*functions)))


def check(mine, right, cases: list[tuple]) -> None:
    """Compare an exercise's function with the right one, or with a list of right results."""
    wanted = right if isinstance(right, list) else [right(*case) for case in cases]
    for case, want in zip(cases, wanted):
        given = mine(*case)
        if given is None:
            print(f"{mine.__name__}: not written yet")
            return
        a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (given, want))
        if a.shape != b.shape or not torch.allclose(a, b, atol=1e-6):
            print(f"{mine.__name__}{case}: wanted {want}, got {given}")
            return
    print(f"{mine.__name__}: right in all {len(cases)} cases")


# ------------------------------------------------------------------------- policy and small runs

TINY = f"--tiny --device cpu --terms {TERMS} --max_new_tokens {LONGEST} --show_every 0 "
TINY += "--save_every 1000 --eval_problems 300 --eval_samples 1"
COMMANDS = {  # the small runs of notebooks 2 to 5
    "GRPO": "spo.py --partition trajectory --mask False --prompts 32 --steps 42 --eval_every 14",
    "SPO-chain": "spo.py --prompts 32 --steps 42 --eval_every 14",
    "SPO-tree": "spo.py --variant tree --prompts 16 --batch_size 0 --steps 42 --eval_every 14",
    "MPO": "mpo.py --prompts 16 --batch_size 32 --steps 20 --eval_every 10",
    "RRPO": "reset_po.py --method rrpo --prompts 16 --lr 5e-4 --steps 21 --eval_every 7",
    "SRPO": "reset_po.py --prompts 16 --lr 5e-4 --steps 21 --eval_every 7",
}


class Desk(NamedTuple):
    """What a notebook works with."""

    model: object
    tokenizer: object
    train: list  # problems
    test: list
    facts: frozenset  # what the warm start has learned wrong


def desk(seed: int = 0) -> Desk:
    """The warm start of the small runs (made the first time, half a minute) and its problems."""
    torch.set_num_threads(1)  # the policy is too small to share out
    run = common.RunConfig(seed=seed, terms=TERMS, warm_start_steps=250)
    train = common.load_problems("sums", "train", None, seed, TERMS)
    device, quiet = torch.device("cpu"), io.StringIO()
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        model, tokenizer = common.starting_policy(run, train, device, common.Compute())
    test = common.load_problems("sums", "test", 100, seed, TERMS)
    return Desk(model, tokenizer, train, test, common.wrong_facts(seed))


class Run(NamedTuple):
    label: str
    seed: int
    rows: list[dict]  # of metrics.csv, as numbers
    summary: dict

    def curve(self, x: str) -> list[tuple[float, float]]:
        """(x, held-out accuracy) from before the run to its end."""
        points = [(row[x], row["held_out"]) for row in self.rows if "held_out" in row]
        return [(0.0, self.summary["accuracy_before"]), *points]


# A child imports torch once and then does one run after the other: a line of JSON is a job.
WORKER = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import torch, common, spo, mpo, reset_po, helpers
torch.set_num_threads(1)
for line in sys.stdin:
    script, args = json.loads(line)
    if script == "warm":
        helpers.desk(*args)
    else:
        sys.argv = [script + ".py", *args]
        common.cli(sys.modules[script].main)
    print("done", file=answers, flush=True)
"""


def work(jobs: list) -> None:
    """Take jobs from the list's end, in a child of one thread, until none is left."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tutorials")])
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen([sys.executable, "-c", WORKER], stderr=log, **options) as child,
    ):
        while jobs:
            job = jobs.pop()
            print(json.dumps(job), file=child.stdin, flush=True)
            if child.stdout.readline() != "done\n":
                log.seek(0)
                raise RuntimeError(f"{job} failed:\n{log.read()[-2000:]}")
        child.stdin.close()


def run_jobs(jobs: list) -> None:
    """Two at a time, on a core each."""
    jobs = jobs[::-1]
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(work, jobs) for _ in range(min(2, len(jobs)))]:
            job.result()


def small_runs(commands: dict[str, str], seeds=(0,)) -> list[Run]:
    """label -> "spo.py --steps 20 ..." becomes a Run for each seed, with --tiny sizes.

    A finished run is kept in runs/, under a name that hashes its command, its script and common.py:
    change one of them, and it is run again.
    """
    folders, jobs = {}, []
    for label, command in commands.items():
        for seed in seeds:
            script, flags = command.split(".py", 1)
            text = "".join((ROOT / f"{name}.py").read_text() for name in (script, "common"))
            flags = f"{TINY} {flags} --seed {seed}"
            name = f"tutorial-{hashlib.sha256((text + flags).encode()).hexdigest()[:10]}"
            folder = folders[label, seed] = ROOT / "runs" / name
            if not (folder / "summary.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                jobs.append((script, [*flags.split(), "--name", name]))
    if jobs:
        run_jobs([("warm", [seed]) for seed in seeds])
        run_jobs(jobs)
    runs = []
    for (label, seed), folder in folders.items():
        rows = curves.read_rows(folder / "metrics.csv")
        runs.append(Run(label, seed, rows, curves.read_json(folder / "summary.json")))
    return runs


# -------------------------------------------------------------------------------------- pictures


def stderr(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def whole_numbers(*axes) -> None:
    """Ticks at whole numbers only: tokens, updates and steps have no halves."""
    for axis in axes:
        axis.set_major_locator(plt.MaxNLocator(nbins=7, integer=True))


def in_thousands(axis) -> None:
    axis.set_major_locator(plt.MaxNLocator(nbins=5))
    axis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")


def draw_curves(ax, runs: list[Run], x: str, label_of_x: str) -> None:
    """Held-out accuracy: a line a label; over several seeds their mean, with its standard error. Of
    one seed the bars are the error of the test problems alone."""
    for i, label in enumerate(dict.fromkeys(run.label for run in runs)):
        curves = [run.curve(x) for run in runs if run.label == label]
        points = list(zip(*curves))  # evaluation by evaluation
        xs = [statistics.mean(x for x, _ in point) for point in points]
        ys = [[y for _, y in point] for point in points]
        means, errors = list(map(statistics.mean, ys)), list(map(stderr, ys))
        if len(curves) == 1:
            run = next(run for run in runs if run.label == label)
            errors = [run.summary["accuracy_stderr"]] * len(xs)
        ax.errorbar(xs, means, errors, label=label, capsize=3, elinewidth=0.8, **style(i))
    seeds = len({run.seed for run in runs})
    title = f"mean of {seeds} seeds, its standard error" if seeds > 1 else "one seed"
    ax.set(xlabel=label_of_x, ylabel="held-out accuracy", title=title)
    in_thousands(ax.xaxis) if x == "sampled_tokens" else whole_numbers(ax.xaxis)
    ax.grid(alpha=0.3)


class Row(NamedTuple):
    """An answer to draw: its tokens, a number for each, and what to mark."""

    title: str
    pieces: list[str]
    numbers: list[float]
    starts: list[int] = []  # a bar in front of these tokens
    wrong: int | None = None  # framed


def pieces_of(ids: list[int], tokenizer) -> list[str]:
    """Tokens as one or two visible characters each."""
    return [SIGNS.get(piece, piece) for piece in (tokenizer.decode([id]) for id in ids)]


SIGNS = {"\n": "\u21b5", "<end>": "\u25a0", " ": "\u2423"}
SAID = "\u21b5 line break   \u2423 space   \u25a0 end of the answer"


def draw_answers(rows: list[Row], legend: str, top: float = 1.0, shades=SHADES, low=None) -> None:
    """Answers as rows of boxes, a box a token, coloured by its number between `low` (-top) and
    `top`; a negative one is hatched. A bar opens a segment; a black frame is the first wrong
    token."""
    width, low = max(len(row.pieces) for row in rows), -top if low is None else low
    figure, ax = plt.subplots(figsize=(max(8, 0.21 * width), 0.72 * len(rows) + 1.0))
    norm, said = plt.Normalize(low, top), [SAID]
    said += ["| opens a segment"] * any(row.starts for row in rows)
    said += ["frame: first wrong token"] * any(row.wrong is not None for row in rows)
    said += ["hatched: negative"] * any(
        number < -0.02 * top for row in rows for number in row.numbers
    )
    for y, row in enumerate(rows):
        for t, (piece, number) in enumerate(zip(row.pieces, row.numbers)):
            colour = shades(norm(number))
            edge = "black" if t == row.wrong else "lightgrey"
            box = plt.Rectangle((t, y), 1, 0.55, facecolor=colour, edgecolor=edge,
                                linewidth=2 if t == row.wrong else 0.4,
                                zorder=3 if t == row.wrong else 1)  # fmt: skip
            ax.add_patch(box)
            if number < -0.02 * top:
                ax.add_patch(plt.Rectangle((t, y), 1, 0.55, fill=False, hatch="////", linewidth=0,
                                           edgecolor="darkgrey", zorder=2))  # fmt: skip
            dark = sum(colour[:3]) < 1.4
            ax.text(t + 0.5, y + 0.29, piece, ha="center", va="center", family="DejaVu Sans Mono",
                    color="white" if dark else "black", zorder=4)  # fmt: skip
        for t in row.starts:
            ax.plot([t, t], [y - 0.03, y + 0.6], color="black", linewidth=1.6, zorder=5)
        ax.text(0, y - 0.12, row.title, fontsize=9)
    ax.text(0, len(rows) - 0.05, "   ".join(said), fontsize=9, color="dimgrey")
    ax.set(xlim=(-0.2, width + 0.2), ylim=(len(rows) + 0.05, -0.4))
    ax.axis("off")
    bar = figure.colorbar(plt.cm.ScalarMappable(norm, shades), ax=ax, shrink=0.8, pad=0.01)
    bar.set_label(legend)
    plt.show()


def draw_tree(tree, root: int, values: list[float], advantages: list[float], tokenizer) -> None:
    """One problem's tree: a box a node, with its text and value, coloured by its advantage, and
    hatched if that is negative."""
    children = {}
    for node, parent in enumerate(tree.parents):
        children.setdefault(parent, []).append(node)
    place, depth = {}, {}

    def put(node: int, level: int, free: float) -> float:
        depth[node] = level
        below = children.get(node, [])
        for child in below:
            free = put(child, level + 1, free)
        place[node] = statistics.mean(place[child] for child in below) if below else free
        return free if below else free + 1

    leaves = put(root, 0, 0.0)
    figure, ax = plt.subplots(figsize=(11, 0.52 * leaves + 0.8))
    norm, levels = plt.Normalize(-1, 1), max(depth.values())
    for node, y in place.items():
        x = depth[node] * 1.35
        text = "".join(pieces_of(tree.nodes[node].ids, tokenizer)) or "(prompt)"
        text = f"{text}\nV {values[node]:.2f}" + (f"  A {advantages[node]:+.2f}" if x else "")
        for child in children.get(node, []):
            ax.plot([x + 1, x + 1.35], [y, place[child]], color="grey", linewidth=1, zorder=1)
        colour = SHADES(norm(advantages[node]))
        hatch = "////" if advantages[node] < 0 else None
        ax.add_patch(plt.Rectangle((x, y - 0.4), 1, 0.8, facecolor=colour, edgecolor="darkgrey",
                                   hatch=hatch))  # fmt: skip
        ax.text(x + 0.5, y, text, ha="center", va="center", fontsize=8, family="DejaVu Sans Mono",
                color="white" if sum(colour[:3]) < 1.4 else "black")  # fmt: skip
    said = f"V value   A advantage   {SAID}   hatched: negative advantage"
    ax.text(0, leaves - 0.15, said, fontsize=9, color="dimgrey")
    ax.set(xlim=(-0.05, levels * 1.35 + 1.05), ylim=(leaves - 0.1, -0.6))
    ax.axis("off")
    plt.show()
