"""How the tables of tests/results.py come about: rates, pairs by seed, intervals, what is kept. And
that the pages say what the kept runs say."""

import json
import math
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

import common
import results
from conftest import ENV, ROOT
from pictures import T95  # beside results, which has put tutorials/ on the path
from results import Row, Run, Table


def a_run(lr=5e-4, seed=0, after=0.5, command="", **other) -> Run:
    facts = dict(before=0.2, in_form=1.0, tokens=1_234_567, seconds=60.0, means=dict(trained=3.0))
    curve = [[0, 0, 0, 0.2], [30, 617_283, 30.0, after - 0.1], [60, 1_234_567, 60.0, after]]
    return Run(lr, seed, command, after=after, curve=curve, **facts | other)


@pytest.fixture
def table(monkeypatch):
    """Two rows, and every run of theirs: accuracy by row, rate and seed is what `after` says."""
    rows = [Row("a", "--mask False", "2 x 2"), Row("b, c", "", "2 x 2", {"a": "the mask"})]
    monkeypatch.setattr(results, "TABLES", {"t": Table("Title", "spo", "", rows, ("trained",))})
    monkeypatch.setattr(results, "FRONT", ("t",))
    kept = {}
    for row, lr, seed in product(rows, results.RATES, results.RATE_SEEDS + results.SEEDS):
        told = results.command(results.TABLES["t"], row, lr, seed)
        tokens = 1_234_567 * (1 if row.name == "a" else 2)
        kept[told] = a_run(lr, seed, after(row.name, lr, seed), told, tokens=tokens)
    return kept


def after(row: str, lr: float, seed: int) -> float:
    """On the seeds that choose a rate `a` is best at 2.5e-4 and the other at 1e-3 by a hair, where
    its first seed is the worse one; on the table's seeds other rates would be better."""
    if seed in results.RATE_SEEDS:
        first = seed == results.RATE_SEEDS[0]
        if row == "a":
            return 0.6 if lr == 2.5e-4 else 0.5
        return {2.5e-4: 0.7, 5e-4: 0.7, 1e-3: 0.61 if first else 0.81}[lr]
    return 0.3 + 0.02 * seed + (0.1 + 0.01 * (seed % 2)) * (row != "a") + 0.2 * (lr == 5e-4)


def test_the_rate_is_the_best_on_average_on_seeds_that_the_table_does_not_use(table):
    assert not {*results.SEEDS} & {*results.RATE_SEEDS}
    rates, found = results.results_of("t", table)
    assert rates == {"a": 2.5e-4, "b, c": 1e-3}
    assert [run.seed for run in found["a"]] == list(results.SEEDS)
    assert {run.lr for run in found["a"]} == {2.5e-4}
    for told, run in table.items():  # equal means: the lower rate
        table[told] = run._replace(after=0.5)
    assert results.chosen_rate("t", results.TABLES["t"].rows[1], table) == min(results.RATES)


def test_differences_are_paired_by_seed_with_students_interval(table):
    _, found = results.results_of("t", table)
    found["a"].reverse()  # whatever their order
    values = results.differences(found["b, c"], found["a"])
    assert values == pytest.approx([0.1, 0.11] * 5)
    mean, half = results.interval(values)
    s = (10 * 0.005**2 / 9) ** 0.5
    assert (mean, half) == (pytest.approx(0.105), pytest.approx(2.262 * s / 10**0.5))
    # Nine degrees of freedom: 97.5 % of the mass of Student's t lie below it.
    density = [(1 + (x / 1000) ** 2 / 9) ** -5 for x in range(-60_000, 60_000)]
    below = sum(density[: 60_000 + round(1000 * T95[8])]) / sum(density)
    assert below == pytest.approx(0.975, abs=5e-5) and len(results.SEEDS) == 10


def test_rows_are_compared_half_way_by_hand():
    """Each at half of its own rounds: 50 of 100, 80 of 160; 70 of 140 is between evaluations."""
    curve = [[0, 0, 0, 0.2], [50, 500, 1, 0.6], [100, 1000, 2, 0.8]]
    fast = a_run(after=0.8)._replace(curve=curve)
    curve = [[0, 0, 0, 0.2], [40, 200, 1, 0.4], [80, 400, 2, 0.5], [160, 800, 4, 0.6]]
    slow = a_run(after=0.6)._replace(curve=curve)
    assert results.half_way([fast], [slow]) == pytest.approx([0.6 - 0.5])
    slow.curve[-1][0] = 140
    assert results.half_way([fast], [slow]) == pytest.approx([0.6 - 0.475])


def test_rows_are_compared_at_the_tokens_of_the_cheaper_one_by_hand(table, monkeypatch):
    """Seed 0: at 1,000, where one ends and the other is half-way from 0.4 to 0.6. Seed 1: at 400."""
    dear = a_run(tokens=2000, after=0.6)._replace(
        curve=[[0, 0, 0, 0.2], [5, 500, 1, 0.4], [15, 1500, 2, 0.6], [20, 2000, 3, 0.6]]
    )
    cheap = a_run(tokens=1000, after=0.9)._replace(curve=[[0, 0, 0, 0.2], [10, 1000, 2, 0.9]])
    second = cheap._replace(seed=1, tokens=400, curve=[[0, 0, 0, 0.2], [10, 400, 2, 0.3]])
    mine, theirs = [cheap, dear._replace(seed=1)], [second, dear]
    assert results.for_tokens(mine, theirs) == pytest.approx([0.9 - 0.5, 0.36 - 0.3])
    assert results.mean_tokens(theirs) == 1200
    text = "\n".join(results.long_table("t", table))  # whose second row takes twice the tokens
    assert "For as many tokens it is ahead of a, +0.105 [+0.101, +0.109]." in text
    monkeypatch.setattr(results, "mean_tokens", lambda runs: 1e6 + ("--mask" in runs[0].command))
    assert "as many tokens" not in "\n".join(results.long_table("t", table))


def test_only_an_interval_without_0_makes_a_claim():
    assert results.verdict([0.1, 0.11] * 5) == "is ahead of"
    assert results.verdict([-0.1, -0.11] * 5) == "is behind"
    assert results.verdict([0.3, -0.2] * 5) == "is not told apart from"
    half = results.interval([0.0, 1.0] * 5)[1]
    just, barely_not = half + 1e-9 - 0.5, half - 1e-9 - 0.5
    assert results.verdict([just, 1 + just] * 5) == "is ahead of"
    assert results.verdict([barely_not, 1 + barely_not] * 5) == "is not told apart from"


def test_a_table_says_what_its_runs_came_to(table):
    lines = results.long_table("t", table)
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    a, b = cells[1], cells[2]
    assert a[:6] == [
        "a",
        "0.00025",
        "2 x 2",
        "0.200",
        f"0.390 ± {half_of('a', table):.3f}",
        "0.300",
    ]
    assert b[:2] + b[4:6] == ["b, c", "0.001", f"0.495 ± {half_of('b, c', table):.3f}", "0.400"]
    assert a[6:] == ["100.0%", "1.23 M", "60", "3"]
    text = "\n".join(lines)
    assert "* **b, c** is ahead of a (the mask): +0.105 [+0.101, +0.109], higher in 10 of" in text
    assert results.higher([0.1, 0.0, -0.1, 0.2]) == "higher in 2 of 4 seeds"
    assert "higher in 10 of 10 seeds. Half-way it is ahead of a, +0." in text
    assert "| b, c | 0.700, 0.700 | 0.700, 0.700 | 0.610, 0.810 |" in text
    shown = [line.strip() for line in lines if line.startswith("    ")]
    assert shown == [
        f"python spo.py --mask False {results.ALL} --lr 0.00025 --seed 0",
        f"python spo.py {results.ALL} --lr 0.001 --seed 0",
    ]
    short = results.short_table(["t"], table)
    assert short[2].startswith("| a | `spo`, 60 | 2 x 2 | 1.23 M | 0.390 ± ")
    assert short[2].endswith(" | 0.300 |  |")
    assert short[3].startswith("| b, c | `spo`, 60 | 2 x 2 | 2.47 M | 0.495 ± ")
    assert short[3].endswith("| a: +0.105 [+0.101, +0.109] |") and len(short) == 4
    assert results.short_table(["t", "t"], table) == [*short, *short[2:]]


def test_half_way_is_said_only_of_runs_that_were_evaluated_on_the_way(table):
    for told, run in table.items():
        table[told] = run._replace(curve=[run.curve[0], run.curve[-1]])
    text = "\n".join(results.long_table("t", table))
    assert "higher in 10 of 10 seeds.\n" in text and "alf-way" not in text


def test_a_column_that_a_row_does_not_have_is_empty(table):
    for told, run in table.items():
        if "--mask False" in told:
            table[told] = run._replace(means={})
    rows = [line for line in results.long_table("t", table) if line.startswith("| ")]
    assert rows[1].startswith("| a |") and rows[1].endswith("| 60 |  |")
    assert rows[2].startswith("| b, c |") and rows[2].endswith("| 60 | 3 |")


def test_a_table_of_one_rate_needs_no_runs_that_choose(table, monkeypatch):
    alone = results.TABLES["t"]._replace(rates=(5e-4,))
    monkeypatch.setattr(results, "TABLES", {"t": alone})
    kept = {told: run for told, run in table.items() if run.seed not in results.RATE_SEEDS}
    rates, found = results.results_of("t", kept)
    assert rates == {"a": 5e-4, "b, c": 5e-4}
    assert {run.lr for runs in found.values() for run in runs} == {5e-4}
    text = "\n".join(results.long_table("t", kept))
    assert "| a | 0.0005 |" in text and "on the seeds that choose" not in text
    made = []
    monkeypatch.setattr(results, "make_missing", lambda what, jobs, *_: made.append((what, jobs)))
    results.make_table("t", kept, None)
    assert [what for what, _ in made] == ["t: seeds"] and len(made[0][1]) == 2 * 10
    assert {lr for _, _, lr, _ in made[0][1]} == {5e-4}


def test_the_time_is_of_all_runs_each_counted_once(table, monkeypatch):
    """2 rows: 3 rates x 2 seeds, and ten seeds. A second table shares the first row's runs, and
    has no rates to choose."""
    first = results.TABLES["t"]
    alone = first._replace(title="Alone", rows=first.rows[:1], rates=(2.5e-4,))
    monkeypatch.setattr(results, "TABLES", {"t": first, "u": alone})
    kept = {told: run._replace(seconds=900.0) for told, run in table.items()}
    page = results.tables_page(kept)
    said = "runs, {} hours of processor time in sampling and training"
    assert f"All tables together: 32 {said.format('8.0')}, two runs at a time." in page
    first, second = page.split("## Alone")
    assert f"All that it took: 32 {said.format('8.0')}." in first
    assert f"All that it took: 10 {said.format('2.5')}." in second


def half_of(row, table) -> float:
    return results.interval([run.after for run in results.results_of("t", table)[1][row]])[1]


def test_a_table_that_lacks_a_run_is_left_out(table):
    page = f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n"
    made = results.front_page(page, table)
    assert made.startswith(f"before\n{results.BEGIN}\n| | script") and "old" not in made
    assert made.endswith(f" |\n{results.END}\nafter\n")
    assert results.front_page(made, table) == made
    lines = results.curves_file(table).splitlines()
    assert lines[0] == "table,row,seed,rounds,tokens,seconds,held_out" and len(lines) == 1 + 60
    assert lines[3] == 't,"a",0,60,1234567,60.0,0.3000' and lines[-1].startswith('t,"b, c",9,60')
    table.popitem()  # a run of the last row, at its chosen rate
    assert results.complete_tables(table) == [] and results.front_page(page, table) == page


def test_runs_are_kept_to_the_last_digit(tmp_path):
    path = tmp_path / "runs.csv"
    runs = [a_run(command="python spo.py --x 'a, b'", seed=s, after=1 / 3) for s in (0, 1)]
    runs[1] = runs[1]._replace(command="python spo.py", means={})
    assert results.read_kept(path) == {}
    for run in runs:
        results.keep(path, run)
    assert results.read_kept(path) == {run.command: run for run in runs}


def test_a_run_is_read_from_its_summary_and_metrics(table, tmp_path, monkeypatch):
    """The last round may have no evaluation of its own, and a column no value somewhere."""
    facts = dict(accuracy_before=0.1, accuracy_after=0.4, in_form_before=0.8, in_form_after=0.9)
    rows = (
        "step,sampled_tokens,seconds,held_out,trained",
        "1,30,0.5,0.2,3",
        "2,50,0.9,,",
        "3,77,1.26,,5",
    )

    def start(script, flags):
        folder = Path("runs", flags[-1])
        folder.mkdir(parents=True)
        text = json.dumps(facts | dict(sampled_tokens=77, seconds=1.26))
        (folder / "summary.json").write_text(text)
        (folder / "metrics.csv").write_text("\n".join(rows))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "start", start)
    told, row = "python spo.py", results.TABLES["t"].rows[1]
    curve = [[0, 0, 0, 0.1], [1, 30, 0.5, 0.2], [3, 77, 1.26, 0.4]]
    assert results.make(("t", row, 5e-4, 3)) == Run(
        5e-4, 3, f"{told} {results.ALL} --lr 0.0005 --seed 3", before=0.1, after=0.4, in_form=0.9,
        tokens=77, seconds=1.3, curve=curve, means=dict(trained=4.0),
    )  # fmt: skip


def test_a_run_begins_anew_in_a_process_of_its_own(tmp_path, monkeypatch):
    """Whose clock is the processor's, and which says where it was told what went wrong."""

    def main():
        folder, began = Path("runs", sys.argv[-1]), time.time()
        folder.mkdir()  # nothing is there
        time.sleep(0.3)
        (folder / "seconds").write_text(str(time.time() - began))
        print(sys.argv, file=sys.stderr)
        assert "--wrong" not in sys.argv

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(results.SCRIPTS, "mpo", SimpleNamespace(main=main))
    argv, clock = sys.argv, time.time
    (tmp_path / "runs" / "x").mkdir(parents=True)  # left by one that was interrupted
    results.start("mpo", ["--name", "x"])
    assert float((tmp_path / "runs" / "x" / "seconds").read_text()) < 0.2
    assert sys.argv is argv and time.time is clock
    with pytest.raises(RuntimeError, match="failed: mpo.py --wrong --name y"):
        results.start("mpo", ["--wrong", "--name", "y"])


@pytest.mark.parametrize(
    "words, tables",
    [("", [*results.TABLES]), ("mpo spo", ["mpo", "spo"]), ("--write", []), ("mpo --write", [])],
)
def test_the_tables_that_are_named_are_made(monkeypatch, words, tables):
    made, written = [], []
    monkeypatch.setattr(results, "make_table", lambda name, *_: made.append(name))
    monkeypatch.setattr(results, "write_all", written.append)
    monkeypatch.setattr(sys, "argv", ["results.py", *words.split()])
    results.main()
    assert made == tables and written == [results.read_kept(results.RESULTS / "runs.csv")]


def test_a_table_that_there_is_not_is_named(monkeypatch, capsys):
    monkeypatch.setattr(results, "make_table", lambda *_: pytest.fail("something was run"))
    monkeypatch.setattr(sys, "argv", ["results.py", "spo", "nothing"])
    with pytest.raises(SystemExit) as stopped:
        results.main()
    assert stopped.value.code == 2 and "no table nothing; there are spo" in capsys.readouterr().err


LEAST = "--terms 2 --warm_start_steps 20 --prompts 2 --batch_size 2 --steps 3 --max_new_tokens 8"
CHILD = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import results
from pathlib import Path
from results import Row, Table
rows = [Row("one", "--group_size 4", "2 x 4"), Row("two", "--group_size 2", "2 x 2", {{"one": "half"}})]
results.TABLES = dict(t=Table("Title", "spo", {LEAST!r}, rows, ("trained", "held_out"), (1e-3, 2e-3)))
results.ALL = "--eval_problems 5 --eval_every 2 --show_every 0"
results.RATE_SEEDS, results.SEEDS = (7,), (0, 1)
results.FRONT, results.RESULTS, results.ROOT = ("t",), Path("."), Path(".")
results.main()
"""


def test_what_is_missing_is_run_once_and_all_pages_are_written(tmp_path):
    page = f"{results.BEGIN}\n{results.END}\n"
    (tmp_path / "README.md").write_text(page)

    def go(*args) -> str:
        command = [sys.executable, "-c", CHILD, *args]
        options = dict(cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=900)
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "run" in go("t")
    kept = results.read_kept(tmp_path / "runs.csv")
    assert len(kept) == 2 * (2 + 2)  # rows times two rates and one seed, one rate and two seeds
    for told, run in kept.items():
        assert f"--lr {run.lr:g} --seed {run.seed}" in told
        folder = next(
            f for f in (tmp_path / "runs").glob("t-*")
            if f.name == f"t-{int('group_size 2' in told)}-{run.lr:g}-{run.seed}"
        )  # fmt: skip
        metrics = (folder / "metrics.csv").read_text().splitlines()
        names, ends = metrics[0].split(","), metrics[-1].split(",")
        assert run.tokens == int(ends[names.index("sampled_tokens")])
        assert [point[0] for point in run.curve] == [0, 2, 3] and run.curve[-1][3] == run.after
        trained = [float(line.split(",")[names.index("trained")]) for line in metrics[1:]]
        assert run.means["trained"] == pytest.approx(sum(trained) / 3)
        evaluated = [point[3] for point in run.curve[1:]]  # one round of three has no value
        assert run.means["held_out"] == pytest.approx(sum(evaluated) / 2)
    # A seed's warm start is made once, before two runs at a time need it.
    warm = {folder.name for folder in (tmp_path / "runs").glob("warm-*") if folder.is_dir()}
    assert warm == {"warm-t-7", "warm-t-0", "warm-t-1"}
    front = (tmp_path / "README.md").read_text()
    assert "| two | `spo`, 3 | 2 x 2 | 0.00 M |" in front and "| one: " in front
    assert "## Title" in (tmp_path / "tables.md").read_text()
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    before = (tmp_path / "runs.csv").read_bytes()
    assert "run/s" not in go() and (tmp_path / "runs.csv").read_bytes() == before
    (tmp_path / "tables.md").unlink()
    go("--write")
    assert (tmp_path / "tables.md").exists()


def test_the_pages_say_what_the_kept_runs_say():
    kept = results.read_kept(results.RESULTS / "runs.csv")
    readme = (ROOT / "README.md").read_text("utf-8")
    assert results.front_page(readme, kept) == readme
    for name, made in (("tables.md", results.tables_page), ("curves.csv", results.curves_file)):
        assert (results.RESULTS / name).read_text("utf-8") == made(kept)


@pytest.mark.parametrize("name", results.TABLES)
def test_every_row_has_a_command_and_one_that_it_stands_beside(name, monkeypatch):
    table = results.TABLES[name]
    names = [row.name for row in table.rows]
    assert len({*names}) == len(names)
    module = results.SCRIPTS[table.script]
    for row in table.rows:
        assert {*row.beside} <= {*names[: names.index(row.name)]} and all(row.beside.values())
        told = results.command(table, row, 5e-4, 3).split()
        monkeypatch.setattr(sys, "argv", told[1:])
        cfg, run = common.parse_args(module.Config, table.script, "", module.TINY, module.LARGE)
        assert (cfg.lr, run.seed, run.eval_problems) == (5e-4, 3, 150)
        if sizes := re.fullmatch(r"(\d+) x (\d+)", row.answers):
            per = cfg.fresh + cfg.resets if table.script == "reset_po" else cfg.group_size
            assert (cfg.prompts, per) == tuple(map(int, sizes.groups()))
        elif sizes := re.fullmatch(r"(\d+) x (\d+) leaves", row.answers):
            assert (cfg.prompts, math.prod(cfg.branching)) == tuple(map(int, sizes.groups()))
