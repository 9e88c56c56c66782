"""The front page's pictures, drawn into tutorials/results/:

    credit.png    one failed answer, and what each method makes of it
    flow.png      what becomes of a prompt, and where the three scripts differ
    curves.png    accuracy against rounds and tokens, from tutorials/results/curves.csv

    python tutorials/pictures.py

What has no input is named and left out. Colours have a sign or a hatch beside them, for grey.
"""

import contextlib
import csv
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network

import torch  # noqa: E402

import common  # noqa: E402
import mpo  # noqa: E402
import reset_po  # noqa: E402
import spo  # noqa: E402

RESULTS = ROOT / "tutorials" / "results"
SIGNS = {"\n": "\u21b5", "<end>": "\u25a0"}
TERMS, LONGEST = 5, 48  # sums of 3 to 5 terms, answers of at most 48 tokens
CONTINUATIONS = 512  # behind each token of the last row: a standard error of 0.02 at most


# ------------------------------------------------------------------ the credit of one failed answer


class Row(NamedTuple):
    name: str
    how: str  # in a few words
    pieces: list[str]  # the tokens, as they are drawn
    advantages: list[float | None]  # one a token; None: kept, not sampled, so without credit
    starts: list[int]  # first tokens of segments, which have a number
    kind: str = ""  # "ratio": segments without numbers; "token": large ones have one


class Failure(NamedTuple):
    """A failed answer as one method has drawn it; the others are asked what they make of it."""

    problem: common.Problem
    tree: spo.Answer
    wrong: int  # its first wrong token

    @property
    def rollout(self) -> common.Rollout:
        return self.tree.rollout


def pieces_of(ids: list[int], tokenizer) -> list[str]:
    """Tokens as one visible character each."""
    return [SIGNS.get(piece, piece) for piece in (tokenizer.decode([i]) for i in ids)]


def failures(model, tokenizer, problems, cfg: spo.Config, generator) -> list[Failure]:
    """Failed leaves of a tree from each problem, in the order of the problems."""
    states = [common.initial_state(tokenizer, problem) for problem in problems]
    tree = spo.grow_trees(model, tokenizer, states, cfg, generator)
    found = []
    for answer in spo.credit_trees(model, tree, cfg).answers:
        problem, r = problems[answer.owner], answer.rollout
        wrong = common.first_wrong_token(r.ids, problem, tokenizer)
        if r.finished and not r.reward and wrong is not None:
            found.append(Failure(problem, answer, wrong))
    return found


def in_the_middle(failure: Failure, facts, tokenizer) -> bool:
    """Is the mistake a fact learned wrong, in neither the first step nor the last two lines? The
    last one but the total has too little behind it to see whom the rest is blamed on."""
    ids, wrong = failure.rollout.ids, failure.wrong
    line, lines = tokenizer.decode(ids[:wrong]).count("\n"), tokenizer.decode(ids).count("\n")
    return 0 < line < lines - 1 and wrong in spo.fact_results(ids, facts, tokenizer)


def siblings(failure: Failure, model, tokenizer, generator) -> list[common.Rollout]:
    """Seven other answers to its problem, which make a group of eight with it."""
    state = common.initial_state(tokenizer, failure.problem)
    return common.complete(model, tokenizer, [state], 7, LONGEST, generator=generator)


def group_rows(failure: Failure, others, model, tokenizer) -> list[Row]:
    """GRPO and MPO: the answer in its group."""
    cfg = mpo.Config(layout="block", group_size=1 + len(others), max_new_tokens=LONGEST)
    [sample, *_] = mpo.assign_credit(model, [failure.rollout, *others], cfg).samples
    pieces, mask = pieces_of(sample.ids, tokenizer), torch.ones(1, len(sample.ids)).bool()
    blocks = sorted({*mpo.anchors(mask, cfg.block_size, cfg.layout)[0].tolist()})
    shared = f"the same; {cfg.block_size} share a ratio"
    return [
        Row("GRPO", "one number for all", pieces, sample.advantages, [0]),
        Row("MPO", shared, pieces, sample.advantages, blocks, "ratio"),
    ]


def chain_row(failure: Failure, model, tokenizer, generator) -> Row:
    cfg = spo.Config(max_new_tokens=LONGEST, group_size=1, continuations=4)
    credit = spo.assign_credit(
        model, tokenizer, [failure.rollout], [failure.problem.answer], cfg, generator
    )
    [answer] = credit.answers
    pieces = pieces_of(answer.rollout.ids, tokenizer)
    return Row("SPO-chain", "cut where it was unsure", pieces, answer.advantages, answer.starts)


def tree_row(failure: Failure, tokenizer) -> Row:
    pieces = pieces_of(failure.rollout.ids, tokenizer)
    how = "two branches every 12"
    return Row("SPO-tree", how, pieces, failure.tree.advantages, failure.tree.starts)


def reset_rows(failure: Failure, model, tokenizer, generator) -> list[Row]:
    """A right and a wrong continuation after the reset; none unless there are both."""
    seed = common.Sample(failure.rollout.prompt, failure.rollout.ids)
    common.score(model, [seed], temperature=1.0)  # the localiser looks at the old log-probs
    cfg = reset_po.Config(max_new_tokens=LONGEST)
    [reset], _ = reset_po.reset_seeds(model, tokenizer, [failure.problem], [seed], cfg, generator)
    group = [common.Sample(r.prompt, r.ids) for r in reset.group]
    reset_po.credit_group(group, reset.group)
    back, rows = reset.starts[reset.named - 1], []
    for reward, how in ((1, "went back, came right"), (0, "went back, failed again")):
        for sample in [s for s, r in zip(group, reset.group) if r.reward == reward][:1]:
            pieces = pieces_of(seed.ids[:back] + sample.ids, tokenizer)
            rows.append(Row("Reset", how, pieces, [None] * back + sample.advantages, [back]))
    return rows if len(rows) == 2 else []


def exact_row(failure: Failure, model, tokenizer, generator, continuations: int) -> Row:
    """Every token a segment, each value from many continuations."""
    r, answer = failure.rollout, failure.problem.answer
    every = list(range(len(r.ids)))
    cfg = spo.Config(continuations=continuations, max_new_tokens=LONGEST)
    states = [(r.prompt, r.ids[:t], answer) for t in every]
    values, _ = spo.estimate_values(model, tokenizer, states, cfg, generator)
    advantages = spo.chain_advantages(every, values, r.reward, len(r.ids)).tolist()
    how = f"{continuations} tries at each token"
    return Row("Near-exact", how, pieces_of(r.ids, tokenizer), advantages, every, "token")


def credit_rows(failure: Failure, others, model, tokenizer, generator) -> list[Row]:
    """What the methods make of a failure; the last row is added once it is chosen."""
    return [
        *group_rows(failure, others, model, tokenizer),
        chain_row(failure, model, tokenizer, generator),
        tree_row(failure, tokenizer),
        *reset_rows(failure, model, tokenizer, generator),
    ]


def all_speak(rows: list[Row]) -> bool:
    """Has every method a row, and every row some credit?"""
    names = {row.name for row in rows}
    return len(names) == 5 and all(any(row.advantages) for row in rows)


def chosen_failure(model, tokenizer, problems, facts, generator) -> tuple[Failure, list[Row]]:
    """The rule, with trees from the first 512 problems of seed 0, in their order: the first failure
    at a fact in the middle where there was something to lose (most other answers to the problem are
    right), and about which every method says something. Whether they say the right thing is not
    asked. Raises ValueError if there is none."""
    cfg = spo.Config(variant="tree", max_new_tokens=LONGEST)
    for failure in failures(model, tokenizer, problems, cfg, generator):
        if not in_the_middle(failure, facts, tokenizer):
            continue
        others = siblings(failure, model, tokenizer, generator)
        if sum(r.reward for r in others) <= len(others) / 2:
            continue
        rows = credit_rows(failure, others, model, tokenizer, generator)
        if all_speak(rows):
            return failure, rows
    raise ValueError("no failure in the middle about which every method says something")


def desk(seed: int = 0):
    """The notebooks' warm start (made if it is not there, half a minute), and its problems."""
    run = common.RunConfig(seed=seed, terms=TERMS, warm_start_steps=250)
    train = common.load_problems("sums", "train", None, seed, TERMS)
    with contextlib.chdir(ROOT):
        device, compute = torch.device("cpu"), common.Compute()
        model, tokenizer = common.starting_policy(run, train, device, compute)
    return model, tokenizer, train[:512], common.wrong_facts(seed)


# ----------------------------------------------------------------------------------------- drawing


def plotting(font_size: int = 11):
    """pyplot, drawing to files on white."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    look = {"font.size": font_size, "hatch.linewidth": 0.7, "savefig.facecolor": "white"}
    pyplot.rcParams.update(look)
    return pyplot


def number(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\u2212") if value else "0"


def segments(row: Row) -> list[tuple[int, int, float]]:
    """(first token, end, advantage) of those whose number is shown."""
    ends = [*row.starts[1:], len(row.pieces)]
    spans = [(a, b, row.advantages[a]) for a, b in zip(row.starts, ends)]
    if row.kind == "ratio":
        return [(0, len(row.pieces), row.advantages[0])]
    return [span for span in spans if row.kind != "token" or abs(span[2]) >= 0.15]


def draw_cells(axis, pyplot, row: Row, y: float, wrong: int) -> None:
    """A box a token, coloured by its advantage; blame is hatched."""
    shades, norm = pyplot.get_cmap("RdBu"), pyplot.Normalize(-1.3, 1.3)
    for t, (piece, value) in enumerate(zip(row.pieces, row.advantages)):
        kept = value is None
        colour = "white" if kept else shades(norm(value))
        box = dict(facecolor=colour, edgecolor="#bbbbbb", linewidth=0.6)
        axis.add_patch(pyplot.Rectangle((t, y), 1, 0.5, **box))
        if not kept and value < -0.02:
            hatch = dict(fill=False, hatch="////", linewidth=0, edgecolor="#9a9a9a", alpha=0.5)
            axis.add_patch(pyplot.Rectangle((t, y), 1, 0.5, **hatch))
        dark = not kept and sum(colour[:3]) < 1.4
        tone = "#999999" if kept else "white" if dark else "black"
        axis.text(t + 0.5, y + 0.265, piece, ha="center", va="center", color=tone, fontsize=11.5,
                  family="DejaVu Sans Mono")  # fmt: skip
    for t in [] if row.kind == "token" else row.starts:
        axis.plot([t, t], [y - 0.04, y + 0.54], color="black", linewidth=2)
    if row.advantages[wrong] is not None and row.name != "Reset":
        frame = dict(fill=False, edgecolor="black", linewidth=2.2, zorder=5)
        axis.add_patch(pyplot.Rectangle((wrong, y), 1, 0.5, **frame))


def draw_numbers(axis, row: Row, y: float) -> None:
    """Above its segment, each; where two would meet the right one moves on."""
    free, wide = -1.0, 2.35
    for start, end, value in segments(row):
        if value == 0 and end - start < wide:
            continue
        left = max(free, (start + end - wide) / 2)
        axis.text(left + wide / 2, y - 0.05, number(value), ha="center", va="bottom",
                  fontsize=10.8, weight="bold" if abs(value) >= 0.15 else "normal")  # fmt: skip
        free = left + wide + 0.1


def right_step(failure: Failure, tokenizer) -> tuple[str, str]:
    """The first wrong line, and what it should have been."""
    ids, wrong = failure.rollout.ids, failure.wrong
    line = tokenizer.decode(ids[:wrong]).count("\n")
    given = tokenizer.decode(ids, skip_special_tokens=True).split("\n")[line]
    return given, failure.problem.solution.split("\n")[line]


def draw_credit(failure: Failure, rows: list[Row], tokenizer, path: Path) -> None:
    pyplot = plotting()
    width, gap = max(len(row.pieces) for row in rows), 1.0
    figure = pyplot.figure(figsize=(12, 6.6))
    axis = figure.add_axes((0.205, 0.105, 0.785, 0.745))
    for n, row in enumerate(rows):
        y = n * gap + (0.25 if row.name == "Near-exact" else 0)
        draw_cells(axis, pyplot, row, y, failure.wrong)
        draw_numbers(axis, row, y)
        axis.text(-0.6, y + 0.06, row.name, ha="right", va="center", weight="bold", fontsize=12.5)
        axis.text(-0.6, y + 0.46, row.how, ha="right", va="center", fontsize=10.8, color="#333333")
    bottom = (len(rows) - 1) * gap + 0.25
    axis.axhline(bottom - 0.4, color="#888888", linewidth=0.8, xmin=0, xmax=1)
    given, right = right_step(failure, tokenizer)
    band = dict(facecolor="#ffe9a8", edgecolor="none", zorder=-1)
    axis.add_patch(pyplot.Rectangle((failure.wrong, -0.5), 1, bottom + 1.1, **band))
    mistake = f"first mistake: {given}, right is {right}"
    axis.text(failure.wrong + 0.5, -0.52, mistake, fontsize=11.5, ha="center", va="bottom",
              weight="bold", color="#7a4b00")  # fmt: skip
    axis.set(xlim=(-0.1, width + 0.1), ylim=(bottom + 0.62, -0.55))
    axis.axis("off")
    question = failure.problem.question
    said = tokenizer.decode(failure.rollout.ids, skip_special_tokens=True)
    title = "One failed answer: which tokens does each method blame?"
    figure.text(0.012, 0.985, title, fontsize=16, weight="bold", va="top")
    asked = (
        f"{question} = {failure.problem.answer}; the policy ends at {said.split()[-1]}: reward 0"
    )
    figure.text(0.012, 0.925, asked, fontsize=12, va="top", color="#333333")
    signs = "number: advantage    red, hatched: blame    blue: credit    white: none    "
    signs += "grey: kept by the reset"
    figure.text(0.012, 0.062, signs, fontsize=11, va="center", color="#333333")
    more = "bar: a segment begins    frame: first wrong token    \u21b5 line break    \u25a0 end"
    figure.text(0.012, 0.024, more, fontsize=11, va="center", color="#333333")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def credit_picture(path: Path) -> None:
    model, tokenizer, problems, facts = desk()
    generator = torch.Generator().manual_seed(0)
    failure, rows = chosen_failure(model, tokenizer, problems, facts, generator)
    rows.append(exact_row(failure, model, tokenizer, generator, CONTINUATIONS))
    draw_credit(failure, rows, tokenizer, path)


# ------------------------------------------------------------------------------------- data flow

STATIONS = [  # a thing, what is in it, and what leads on to the next one
    ("prompt", "token ids", "sample()"),
    ("Rollout", "ids, reward", "CREDIT"),
    ("Sample", "ids, an advan-\ntage for each", "collate()"),
    ("Batch", "(B, T) tensors,\nmask", "token_\nlogprobs()"),
    ("log-probs", "(B, T), new\nbeside old", "LOSS"),
    ("update", "optimizer_step()", ""),
]
DIFFERENCES = [  # script, credit, loss
    ("spo.py", "value after a segment minus before: by continuations\n"
     "(chain) or by siblings (tree)",
     "a ratio a token, clipped; only\ntokens the policy was unsure of"),
    ("mpo.py", "reward against the answer's group,\nthe same for all its tokens",
     "a ratio for K tokens together,\nclipped"),
    ("reset_po.py", "go back to a step of a failure, sample again:\nreward against the siblings",
     "log-prob times advantage,\nno ratio; a mean for each answer"),
]  # fmt: skip


def flow_picture(path: Path) -> None:
    pyplot = plotting()
    figure = pyplot.figure(figsize=(12, 5.2))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 12), ylim=(5.2, 0))
    axis.axis("off")
    axis.text(0.2, 0.42, "What becomes of a prompt", fontsize=16, weight="bold", va="center")
    said = "common.py, the same for all three scripts, but for CREDIT and LOSS"
    axis.text(11.8, 0.42, said, fontsize=12, va="center", ha="right", color="#333333")
    wide, step = 1.42, 2.036
    for n, (name, what, onward) in enumerate(STATIONS):
        x = 0.2 + n * step
        box = dict(boxstyle="round,pad=0,rounding_size=0.1", facecolor="#eef2f7", edgecolor="#456")
        axis.add_patch(pyplot.matplotlib.patches.FancyBboxPatch((x, 0.95), wide, 1.15, **box))
        axis.text(x + wide / 2, 1.24, name, ha="center", va="center", weight="bold", fontsize=13)
        axis.text(x + wide / 2, 1.72, what, ha="center", va="center", fontsize=10.8)
        if onward:
            own = onward.isupper()
            middle, tone = x + (wide + step) / 2, "#a33a00" if own else "#333333"
            arrow = dict(arrowstyle="-|>", color=tone, linewidth=2.6 if own else 1.6)
            axis.annotate("", (x + step - 0.03, 1.52), (x + wide + 0.03, 1.52), arrowprops=arrow)
            axis.text(middle, 2.22, onward, ha="center", va="top", fontsize=11, color=tone,
                      weight="bold" if own else "normal")  # fmt: skip
    draw_differences(axis)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_differences(axis) -> None:
    """Below: a line a script, with the two places where it has its own code."""
    columns = (0.25, 2.1, 8.0)
    for x, head in zip(columns[1:], ("CREDIT", "LOSS")):
        axis.text(x, 2.92, head, fontsize=12.5, weight="bold", color="#a33a00", va="center")
    for n, cells in enumerate(DIFFERENCES):
        y = 3.45 + 0.66 * n
        axis.plot([0.2, 11.8], [y - 0.33, y - 0.33], color="#bbbbbb", linewidth=0.8)
        for x, text in zip(columns, cells):
            bold = "bold" if x == columns[0] else "normal"
            axis.text(x, y, text, fontsize=11.3, va="center", weight=bold)


# ----------------------------------------------------------------------------------------- curves

CHOSEN = ("GRPO + mask", "SPO-chain", "GRPO + mask, 160 rounds")
# Student's t of 95 %, by degrees of freedom from 1 on; beyond ten seeds the last one is too wide.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.262)


class Curve(NamedTuple):
    label: str
    xs: list[float]
    means: list[float]
    errors: list[float]  # half of a 95 % interval; 0 for a single seed


def half_interval(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    t = T95[min(len(values) - 1, len(T95)) - 1]
    return t * statistics.stdev(values) / len(values) ** 0.5


def between(curve: list[tuple[float, float]], point: float) -> float:
    """y where x stands at `point`, of (x, y) in the order of x.

    >>> between([(0, 0.0), (10, 1.0), (20, 3.0)], 15)
    2.0
    """
    for (x, y), (next_x, next_y) in zip(curve, curve[1:]):
        if x <= point <= next_x:
            return y + (next_y - y) * (point - x) / (next_x - x)
    raise ValueError(f"{point} is not on the curve")


def read_curves(path: Path, x: str) -> list[Curve]:
    """The chosen rows of table "spo": means over seeds at each number of rounds; x is `rounds`
    or `tokens`, there a mean too."""
    at = defaultdict(lambda: defaultdict(list))  # row -> rounds -> (x, accuracy) of each seed
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["table"] == "spo" and line["row"] in CHOSEN and line["held_out"]:
                point = float(line[x]), float(line["held_out"])
                at[line["row"]][float(line["rounds"])].append(point)
    found = []
    for label in [label for label in CHOSEN if label in at]:
        points = [list(zip(*at[label][rounds])) for rounds in sorted(at[label])]
        xs = [statistics.mean(place) for place, _ in points]
        means = [statistics.mean(held_out) for _, held_out in points]
        found.append(Curve(label, xs, means, [half_interval(held_out) for _, held_out in points]))
    if not found:
        raise ValueError(f"{path.name} has none of the rows {', '.join(CHOSEN)} of table spo")
    return found


def draw_panel(axis, found: list[Curve], label_of_x: str) -> None:
    from curves import style

    for i, curve in enumerate(found):
        how = style(i)
        low = [max(0, mean - error) for mean, error in zip(curve.means, curve.errors)]
        high = [min(1, mean + error) for mean, error in zip(curve.means, curve.errors)]
        axis.fill_between(curve.xs, low, high, color=how["color"], alpha=0.15, linewidth=0)
        axis.plot(curve.xs, curve.means, linewidth=2, label=curve.label, **how)
    axis.set(xlabel=label_of_x, xlim=(0, None), ylim=(0, 1.02))
    axis.xaxis.set_major_formatter(lambda n, _: f"{n / 1000:g}k" if n >= 1000 else f"{n:g}")
    axis.legend(loc="lower right", fontsize=12)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def curves_picture(path: Path) -> None:
    pyplot = plotting()
    source = RESULTS / "curves.csv"
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharey=True)
    for axis, x, label in zip(axes, ("rounds", "tokens"), ("rounds", "sampled tokens")):
        draw_panel(axis, read_curves(source, x), label)
    axes[0].set_ylabel("held-out accuracy")
    title = "Held-out accuracy, mean over seeds with a 95 % band: per round, and per sampled token"
    figure.suptitle(title, fontsize=13, weight="bold")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    torch.set_num_threads(1)  # the policy is too small to share out
    os.chdir(ROOT)
    RESULTS.mkdir(exist_ok=True)
    for draw, needs in ((credit_picture, None), (flow_picture, None),
                        (curves_picture, RESULTS / "curves.csv")):  # fmt: skip
        path = RESULTS / f"{draw.__name__.removesuffix('_picture')}.png"
        if needs and not needs.exists():
            print(f"{path.name} is left out: there is no {needs.relative_to(ROOT)}")
            continue
        draw(path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
