"""Makes the evidence: tables of runs that differ in one thing, in tutorials/results/ and README.md.

    python tests/results.py                   all tables: what is missing is run, the rest is kept
    python tests/results.py spo resets        these tables
    python tests/results.py --write           run nothing, only write from tutorials/results/runs.csv

How a table comes about. Each row has a command. Its learning rate is the one of RATES with the best
mean accuracy over RATE_SEEDS, which the table then does not use; the row is run with it for each of
SEEDS. (`resets_long` is of default commands, whose rate is not chosen.) A seed is a table of wrong
facts, a warm start and problems of its own, the same in all rows, so rows are compared seed by seed:
the mean of the differences, with a 95 % interval (Student's t). Two runs at a time, on a core each;
seconds are the processor's. Accuracy is on 150 held-out problems, 4 sampled answers each.
"""

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import mpo  # noqa: E402
import reset_po  # noqa: E402
import spo  # noqa: E402
from pictures import between, half_interval  # noqa: E402

SCRIPTS = dict(spo=spo, mpo=mpo, reset_po=reset_po)
RESULTS = ROOT / "tutorials" / "results"
RATES = (2.5e-4, 5e-4, 1e-3)
RATE_SEEDS, SEEDS = (100, 101), tuple(range(10))
ALL = "--eval_problems 150 --eval_every 25 --show_every 0"
SHORT = "--steps 50"  # for who learns faster; longer runs meet near 1
BEGIN, END = "<!-- results: made by tests/results.py -->", "<!-- end of results -->"
FRONT = ("spo", "tree_long", "resets", "mpo")  # the tables whose rows the front page shows
MEANS = ("before", "after", "in_form", "tokens", "seconds")
LEGEND = (
    "After: mean over ten seeds ± half a 95 % interval. Effect: of the paired differences, with "
    "their 95 % interval."
)


class Row(NamedTuple):
    name: str
    flags: str
    answers: str  # problems x answers, or leaves, of a round
    beside: dict[str, str] = {}  # rows above that it is compared with -> the one thing that differs


class Table(NamedTuple):
    title: str
    script: str
    flags: str  # of all rows
    rows: list[Row]
    columns: tuple[str, ...] = ()  # of metrics.csv, whose means over the run are shown too
    rates: tuple[float, ...] = RATES  # one: nothing to choose


MPO_COLUMNS = ("token_ratio_var", "block_ratio_var", "token_clip", "block_clip")


def mpo_rows(more: str) -> list[Row]:
    """K = 1, whose one ratio is a token's, and K = 5 with each kind of weights."""
    rows = [Row("MPO, K = 1: GRPO", "--block_size 1", "32 x 8")]
    for weights in ("joint", "uniform", "0.2"):
        name = f"K = 5, {weights.replace('0.2', 'share 0.2')}"
        flags = f"--block_size 5 --weights {weights} {more}".strip()
        if more:  # the same without it came before
            rows.append(Row(f"{name}, scaled eps", flags, "32 x 8", {name: "eps scaled"}))
        else:
            rows.append(Row(name, flags, "32 x 8", {rows[0].name: "K and its weights"}))
    return rows


GRPO = "--partition trajectory"
MASKED = Row("GRPO + mask", GRPO, "64 x 2")
UNMASKED = Row("GRPO", f"{GRPO} --mask False", "64 x 2", {"GRPO + mask": "no mask"})
SCALED = Row(
    "GRPO, norm 0.025",
    f"{GRPO} --mask False --max_grad_norm 0.025",
    "64 x 2",
    {"GRPO": "--max_grad_norm", "GRPO + mask": "no mask, but gradients scaled down as well"},
)
CHAIN = Row("SPO-chain", "", "64 x 2", {"GRPO + mask": "a value for each segment"})
LONGER = Row(  # about as many tokens as the chain samples
    "GRPO + mask, 160 rounds", f"{GRPO} --steps 160", "64 x 2", {"GRPO + mask": "60 rounds more"}
)
FOR_TOKENS = {LONGER.name: "as many tokens: values, not rounds"}
TABLES = dict(
    spo=Table(
        "SPO-chain beside GRPO",
        "spo",
        "",
        [
            MASKED,
            UNMASKED,
            SCALED,
            LONGER,
            CHAIN._replace(beside=CHAIN.beside | FOR_TOKENS),
        ],
        ("trained",),
    ),
    norm=Table(
        "What the mask does: the norm of the gradient",
        "spo",
        "",
        [MASKED, UNMASKED, SCALED],
        ("grad_norm",),
    ),
    values=Table(
        "Other problems and other cuts",
        "spo",
        "",
        [
            CHAIN._replace(beside={}),
            Row(
                "SPO-chain, 128 x 1",
                "--prompts 128 --group_size 1",
                "128 x 1",
                {"SPO-chain": "each answer to another problem"},
            ),
            Row(
                "line breaks",
                "--partition newline",
                "64 x 2",
                {"SPO-chain": "VinePPO's partition"},
            ),
        ],
        ("trained",),
    ),
    tree=Table(
        "SPO-tree beside GRPO",
        "spo",
        f"--prompts 32 {SHORT}",
        [
            Row("GRPO + mask, 32 x 8", f"{GRPO} --group_size 8 --batch_size 128", "32 x 8"),
            Row(
                "SPO-tree, 2-2-2",
                "--variant tree",
                "32 x 8 leaves",
                {"GRPO + mask, 32 x 8": "a tree for a group"},
            ),
            Row(
                "SPO-tree, levels alike",
                "--variant tree --level_weights True",
                "32 x 8 leaves",
                {"SPO-tree, 2-2-2": "--level_weights"},
            ),
        ],
        ("trained",),
    ),
    tree_long=Table(
        "SPO-tree's default command beside GRPO of as many answers",
        "spo",
        "",
        [
            Row("GRPO + mask, 64 x 8", f"{GRPO} --group_size 8 --batch_size 256", "64 x 8"),
            Row(
                "SPO-tree, 100 rounds",
                "--variant tree",
                "64 x 8 leaves",
                {"GRPO + mask, 64 x 8": "a tree for a group"},
            ),
        ],
        ("trained",),
    ),
    resets=Table(
        "Resets beside GRPO of as many answers",
        "reset_po",
        SHORT,
        [
            Row("GRPO, groups of 8", "--method grpo", "32 x 8"),
            Row(
                "RRPO",
                "--method rrpo",
                "32 x 8",
                {"GRPO, groups of 8": "half from a random step"},
            ),
            Row(
                "SRPO, uncertain",
                "",
                "32 x 8",
                {
                    "GRPO, groups of 8": "half from the step it is unsure of",
                    "RRPO": "that step, not a random one",
                },
            ),
            Row(
                "SRPO, oracle",
                "--localiser oracle",
                "32 x 8",
                {
                    "GRPO, groups of 8": "half from the first wrong step",
                    "SRPO, uncertain": "the true step, not the named one",
                },
            ),
        ],
        ("no_signal_base", "no_signal_reset"),
    ),
    resets_long=Table(
        "Resets: the default commands",
        "reset_po",
        "",
        [
            Row("RRPO, 80 rounds", "--method rrpo", "32 x 8"),
            Row(
                "SRPO, 80 rounds",
                "",
                "32 x 8",
                {"RRPO, 80 rounds": "from the step it is unsure of, not a random one"},
            ),
        ],
        ("no_signal_base", "no_signal_reset"),
        (5e-4,),
    ),
    mpo=Table("MPO: K and the weights", "mpo", SHORT, mpo_rows(""), MPO_COLUMNS),
    mpo_far=Table(
        "MPO far off-policy: 16 updates a round, in all as many as above",
        "mpo",
        "--epochs 4 --steps 13",
        mpo_rows(""),
        MPO_COLUMNS,
    ),
    mpo_scaled=Table(
        "MPO far off-policy: a clip as wide as the ratio's spread",
        "mpo",
        "--epochs 4 --steps 13",
        [row._replace(beside={}) for row in mpo_rows("")[2:]] + mpo_rows("--scale_eps True")[2:],
        MPO_COLUMNS,
    ),
)


class Run(NamedTuple):
    """A line of runs.csv: what one run came to."""

    lr: float
    seed: int
    command: str
    before: float
    after: float
    in_form: float
    tokens: int
    seconds: float
    curve: list[list[float]]  # round, tokens, seconds and held-out accuracy where it was evaluated
    means: dict[str, float]  # of the columns of metrics.csv that the table shows, where they say


# ------------------------------------------------------------------------------------- the runs


def command(table: Table, row: Row, lr: float, seed: int) -> str:
    flags = f"{table.flags} {row.flags} {ALL} --lr {lr:g} --seed {seed}"
    return " ".join(f"python {table.script}.py {flags}".split())


def start(script: str, flags: list[str]) -> None:
    """Run a script's main in a fork of this process, which has imported everything already, in place
    of what an interrupted run has left. Seconds are the processor's, whatever else the machine does.
    Raises RuntimeError if the run fails."""
    shutil.rmtree(Path("runs", flags[-1]), ignore_errors=True)
    pid = os.fork()
    if not pid:
        # It prints into a file beside its folder.
        log = open(Path("runs", f"{flags[-1]}.log"), "w")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        time.time = time.process_time
        sys.argv = [f"{script}.py", *flags]
        try:
            SCRIPTS[script].main()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"failed: {script}.py {' '.join(flags)}")


def make(job: tuple[str, Row, float, int]) -> Run:
    """Run a row's command, in a folder that says which it is."""
    name, row, lr, seed = job
    table = TABLES[name]
    told = command(table, row, lr, seed)
    folder = Path("runs", f"{name}-{table.rows.index(row)}-{lr:g}-{seed}")
    start(table.script, [*told.split()[2:], "--name", folder.name])
    facts = json.loads((folder / "summary.json").read_text())
    with open(folder / "metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    curve = [[0, 0, 0, facts["accuracy_before"]]]
    lines[-1]["held_out"] = facts["accuracy_after"]
    for line in lines:
        if line["held_out"] != "":
            at = [float(line[key]) for key in ("step", "sampled_tokens", "seconds", "held_out")]
            curve.append(at)
    means = {}
    for key in table.columns:
        if known := [float(line[key]) for line in lines if line[key] != ""]:
            means[key] = statistics.mean(known)
    return Run(
        lr, seed, told, facts["accuracy_before"], facts["accuracy_after"],
        facts["in_form_after"], facts["sampled_tokens"], round(facts["seconds"], 1), curve, means,
    )  # fmt: skip


def read_kept(path: Path) -> dict[str, Run]:
    """The runs kept in the file, by their commands: a row may change its name or table."""
    kept = {}
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                for key in ("curve", "means", "lr", "seed", "before", "after", "in_form", "tokens"):
                    line[key] = json.loads(line[key])
                kept[line["command"]] = Run(**line | dict(seconds=float(line["seconds"])))
    return kept


def keep(path: Path, run: Run) -> None:
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, Run._fields)
        if new:
            writer.writeheader()
        facts = run._asdict()
        writer.writerow(facts | {key: json.dumps(facts[key]) for key in ("curve", "means")})


def make_missing(what: str, jobs: list[tuple], kept: dict[str, Run], path: Path) -> None:
    """Two runs at a time; each is written down when it ends. The warm starts come first: two runs
    of a seed would each make their own."""
    jobs = [job for job in jobs if command(TABLES[job[0]], *job[1:]) not in kept]
    if not jobs:
        return
    Path("runs").mkdir(exist_ok=True)
    first = {seed: (name, row, lr) for name, row, lr, seed in reversed(jobs)}
    warm = []
    for seed, (name, row, lr) in first.items():
        told = command(TABLES[name], row, lr, seed).split()[2:]
        flags = [*told, "--steps", "1", "--eval_problems", "1", "--name", f"warm-{name}-{seed}"]
        if not Path("runs", flags[-1], "summary.json").exists():
            warm.append((TABLES[name].script, flags))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(start, warm, chunksize=1)
        for run in tqdm(pool.imap_unordered(make, jobs), what, len(jobs), unit="run"):
            kept[run.command] = run
            keep(path, run)


def make_table(name: str, kept: dict[str, Run], path: Path) -> None:
    rows, rates = TABLES[name].rows, TABLES[name].rates
    if len(rates) > 1:
        jobs = [(name, row, lr, seed) for seed in RATE_SEEDS for row in rows for lr in rates]
        make_missing(f"{name}: rates", jobs, kept, path)
    chosen = {row.name: chosen_rate(name, row, kept) for row in rows}
    jobs = [(name, row, chosen[row.name], seed) for seed in SEEDS for row in rows]
    make_missing(f"{name}: seeds", jobs, kept, path)


# ---------------------------------------------------------------------------- what they come to


def runs_of(name: str, row: Row, lr: float, seeds, kept: dict[str, Run]) -> list[Run]:
    return [kept[command(TABLES[name], row, lr, seed)] for seed in seeds]


def chosen_rate(name: str, row: Row, kept: dict[str, Run]) -> float:
    """The rate with the best mean accuracy over RATE_SEEDS; of equals the lower."""

    def mean(lr: float) -> float:
        return statistics.mean(run.after for run in runs_of(name, row, lr, RATE_SEEDS, kept))

    rates = TABLES[name].rates
    return max(rates, key=mean) if len(rates) > 1 else rates[0]  # the first of equals


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t."""
    return statistics.mean(values), half_interval(values)


def pairs(mine: list[Run], theirs: list[Run]) -> list[tuple[Run, Run]]:
    """Of each seed one row's run, and the other's."""
    beside = {run.seed: run for run in theirs}
    return [(run, beside[run.seed]) for run in mine]


def differences(mine: list[Run], theirs: list[Run]) -> list[float]:
    """Accuracy of one row less that of the other, seed by seed."""
    return [run.after - other.after for run, other in pairs(mine, theirs)]


def held_out_at(run: Run, column: int, point: float) -> float:
    """Accuracy after so many rounds (column 0 of a curve) or tokens (1), on straight lines between
    evaluations."""
    return between([(line[column], line[-1]) for line in run.curve], point)


def half_way(mine: list[Run], theirs: list[Run]) -> list[float]:
    """The differences at half of each row's rounds."""

    def middle(run: Run) -> float:
        return held_out_at(run, 0, run.curve[-1][0] / 2)

    return [middle(run) - middle(other) for run, other in pairs(mine, theirs)]


def mean_tokens(runs: list[Run]) -> float:
    return statistics.mean(run.tokens for run in runs)


def for_tokens(mine: list[Run], theirs: list[Run]) -> list[float]:
    """The differences where both have sampled as many tokens as the one that took fewer. Of the
    other the rate has then not yet fallen to 0."""
    found = []
    for run, other in pairs(mine, theirs):
        fewer = min(run.tokens, other.tokens)
        found.append(held_out_at(run, 1, fewer) - held_out_at(other, 1, fewer))
    return found


def verdict(values: list[float]) -> str:
    """What the 95 % interval of differences allows to say."""
    mean, half = interval(values)
    if abs(mean) <= half:
        return "is not told apart from"
    return "is ahead of" if mean > 0 else "is behind"


def signed(values: list[float]) -> str:
    mean, half = interval(values)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def higher(values: list[float]) -> str:
    return f"higher in {sum(value > 0 for value in values)} of {len(values)} seeds"


def all_runs(name: str, kept: dict[str, Run]) -> dict[str, Run]:
    """All that a table took, by command: also the runs that chose its rates."""
    rows, rates = TABLES[name].rows, TABLES[name].rates
    runs = [run for own in results_of(name, kept)[1].values() for run in own]
    if len(rates) > 1:
        for row in rows:
            for lr in rates:
                runs += runs_of(name, row, lr, RATE_SEEDS, kept)
    return {run.command: run for run in runs}


def time_of(runs: dict[str, Run]) -> str:
    """In words. Two runs at a time on two cores take half of it."""
    hours = sum(run.seconds for run in runs.values()) / 3600
    return f"{len(runs)} runs, {hours:.1f} hours of processor time in sampling and training"


def results_of(name: str, kept: dict[str, Run]) -> tuple[dict[str, float], dict[str, list[Run]]]:
    """The rate of each row, and its runs with that rate, one a seed. Raises KeyError if one is
    missing."""
    rows = TABLES[name].rows
    rates = {row.name: chosen_rate(name, row, kept) for row in rows}
    return rates, {row.name: runs_of(name, row, rates[row.name], SEEDS, kept) for row in rows}


def short_table(names: list[str], kept: dict[str, Run]) -> list[str]:
    """The front page's: what was trained on, what it took, what came, and beside what."""
    lines = [
        "| | script, rounds | answers | tokens | held-out accuracy | lowest seed | minus that of |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        table, (_, results) = TABLES[name], results_of(name, kept)
        for row in table.rows:
            runs = results[row.name]
            rounds, tokens = runs[0].curve[-1][0], mean_tokens(runs)
            mean, half = interval([run.after for run in runs])
            effects = [
                f"{other}: {signed(differences(runs, results[other]))}" for other in row.beside
            ]
            cells = [row.name, f"`{table.script}`, {rounds:.0f}", row.answers]
            cells += [f"{tokens / 1e6:.2f} M", f"{mean:.3f} ± {half:.3f}"]
            cells += [f"{min(run.after for run in runs):.3f}", "; ".join(effects)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def long_table(name: str, kept: dict[str, Run]) -> list[str]:
    """All there is to say of a table: rates, ranges over seeds, a sentence a row, and commands."""
    table = TABLES[name]
    rates, results = results_of(name, kept)
    heads = ["", "rate", "answers a round", "before", "after", "lowest", "in form", "tokens"]
    heads += ["seconds", *table.columns]
    lines = [f"## {table.title}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in table.rows:
        runs = results[row.name]
        mean = {key: statistics.mean(getattr(run, key) for run in runs) for key in MEANS}
        half = interval([run.after for run in runs])[1]
        cells = [row.name, f"{rates[row.name]:g}", row.answers, f"{mean['before']:.3f}"]
        cells += [f"{mean['after']:.3f} ± {half:.3f}", f"{min(run.after for run in runs):.3f}"]
        cells += [f"{mean['in_form']:.1%}", f"{mean['tokens'] / 1e6:.2f} M"]
        cells += [f"{mean['seconds']:.0f}"]
        for key in table.columns:
            known = [run.means[key] for run in runs if key in run.means]
            cells.append(f"{statistics.mean(known):.3g}" if known else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for row in table.rows:
        for other, difference in row.beside.items():
            values = differences(results[row.name], results[other])
            said = f"**{row.name}** {verdict(values)} {other} ({difference})"
            said = f"* {said}: {signed(values)}, {higher(values)}."
            if len(results[row.name][0].curve) > 2:  # evaluated between start and end
                early = half_way(results[row.name], results[other])
                said += f" Half-way it {verdict(early)} {other}, {signed(early)}."
                own, others = mean_tokens(results[row.name]), mean_tokens(results[other])
                if abs(own - others) > 0.05 * others:
                    alike = for_tokens(results[row.name], results[other])
                    said += f" For as many tokens it {verdict(alike)} {other}, {signed(alike)}."
            lines.append(said)
    if len(table.rates) > 1:
        lines += rates_table(name, kept)
    lines += ["", f"All that it took: {time_of(all_runs(name, kept))}."]
    lines += ["", "The commands, of seed 0:", ""]
    for row in table.rows:
        lines.append(f"    {command(table, row, rates[row.name], SEEDS[0])}")
    return lines


def rates_table(name: str, kept: dict[str, Run]) -> list[str]:
    """Accuracy at each rate, of both seeds."""
    rates = TABLES[name].rates
    lines = ["", "Accuracy at each rate on the seeds that choose it:", ""]
    lines += [f"| | {' | '.join(f'{lr:g}' for lr in rates)} |", "|---" * (1 + len(rates)) + "|"]
    for row in TABLES[name].rows:
        cells = [row.name]
        for lr in rates:
            runs = runs_of(name, row, lr, RATE_SEEDS, kept)
            cells.append(", ".join(f"{run.after:.3f}" for run in runs))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def complete_tables(kept: dict[str, Run]) -> list[str]:
    """The tables that have all their runs."""
    found = []
    for name in TABLES:
        try:
            results_of(name, kept)
        except KeyError:
            continue
        found.append(name)
    return found


def front_page(readme: str, kept: dict[str, Run]) -> str:
    """The README with its block of results, or as it was if no table is complete."""
    names = [name for name in complete_tables(kept) if name in FRONT]
    if not names:
        return readme
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    block = [BEGIN, *short_table(names, kept), END]
    return before + "\n".join(block) + after


def tables_page(kept: dict[str, Run]) -> str:
    names, runs = complete_tables(kept), {}
    for name in names:
        runs |= all_runs(name, kept)
    lines = ["# Tables", "", f"Made by `python tests/results.py`, which says how. {LEGEND}"]
    lines += [f"All tables together: {time_of(runs)}, two runs at a time.", ""]
    for name in names:
        lines += [*long_table(name, kept), ""]
    return "\n".join(lines)


def curves_file(kept: dict[str, Run]) -> str:
    """The runs of complete tables where they were evaluated, for tutorials/pictures.py."""
    lines = ["table,row,seed,rounds,tokens,seconds,held_out"]
    for name in complete_tables(kept):
        for row, runs in results_of(name, kept)[1].items():
            for run in runs:
                for rounds, tokens, seconds, held_out in run.curve:
                    point = f"{rounds:.0f},{tokens:.0f},{seconds:.1f},{held_out:.4f}"
                    lines.append(f'{name},"{row}",{run.seed},{point}')
    return "\n".join(lines) + "\n"


def write_all(kept: dict[str, Run]) -> None:
    readme = ROOT / "README.md"
    readme.write_text(front_page(readme.read_text("utf-8"), kept), "utf-8")
    (RESULTS / "tables.md").write_text(tables_page(kept), "utf-8")
    (RESULTS / "curves.csv").write_text(curves_file(kept), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all if none is named")
    parser.add_argument("--write", action="store_true", help="run nothing, only write")
    args = parser.parse_args()
    if unknown := [name for name in args.tables if name not in TABLES]:
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    torch.set_num_threads(1)  # as in a fork: the threads of a pool do not survive one
    path = RESULTS / "runs.csv"
    kept = read_kept(path)
    for name in [] if args.write else args.tables or list(TABLES):
        make_table(name, kept, path)
    write_all(kept)


if __name__ == "__main__":
    main()
