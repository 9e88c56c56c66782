"""Any runs side by side: what is listed, what cannot be read, and that a picture is drawn."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tutorials"))

import curves  # noqa: E402
import runs  # noqa: E402

SUMMARY = dict(
    accuracy_before=0.25, accuracy_after=0.75, accuracy_stderr=0.02, accuracy_stderr_before=0.03,
    accuracy_stderr_after=0.02, greedy_after=0.875, in_form_after=0.995, sampled_tokens=123456,
    seconds=31.6,
)  # fmt: skip
HEAD = "step,accuracy,kl,clip_fraction,in_form,sampled_tokens,seconds,held_out,held_out_in_form\n"


def made(folder: Path, rows: int = 4, settings=None, summary=None) -> Path:
    """A run's folder, as the scripts leave it."""
    folder.mkdir(parents=True)
    lines = [f"{n},{n / 10},0.01,0.0,1.0,{100 * n},{n / 2},," for n in range(1, rows + 1)]
    folder.joinpath("metrics.csv").write_text(HEAD + "\n".join(lines) + "\n")
    for name, content in (("config", settings), ("summary", summary)):
        if content is not None:
            folder.joinpath(f"{name}.json").write_text(json.dumps(content))
    return folder


def command(cwd: Path, *args) -> subprocess.CompletedProcess:
    options = dict(cwd=cwd, capture_output=True, text=True, env=runs.ENV)
    program = str(ROOT / "tutorials" / "curves.py")
    return subprocess.run([sys.executable, program, *map(str, args)], **options)


def cells(line: str) -> list[str]:
    return re.split(r"  +", line)


def test_a_real_run_is_listed_with_the_values_of_its_summary(base):
    folder = base[0] / "runs" / "spo"
    facts = json.loads((folder / "summary.json").read_text())
    head, line = map(cells, curves.listing([curves.read(folder)]))
    shown = dict(zip(head, line))
    assert [shown[key] for key in ("run", "script", "method")] == ["spo", "spo", "chain cutpoint"]
    assert shown["rounds"] == "5/5" and len(line) == len(head)
    ends = [float(x) for x in re.findall(r"[\d.]+", shown["held-out accuracy"])]
    keys = ("accuracy_before", "accuracy_after", "accuracy_stderr")
    assert ends == [round(facts[key], 3) for key in keys]
    assert float(shown["greedy"]) == round(facts["greedy_after"], 3)
    assert shown["in form"] == f"{facts['in_form_after']:.1%}"
    assert shown["tokens"] == f"{facts['sampled_tokens']:,}"
    assert shown["seconds"] == f"{facts['seconds']:.0f}"
    assert 1 <= len(line[-1]) <= curves.WIDTH and set(line[-1]) <= set(curves.BARS)


@pytest.mark.parametrize(
    "settings, script, method",
    [
        (dict(variant="tree", branching=[6, 6, 6], partition="cutpoint"), "spo", "tree 6-6-6"),
        (dict(variant="chain", partition="newline"), "spo", "chain newline"),
        (dict(block_size=5, layout="window", weights=0.2), "mpo", "K=5 window 0.2"),
        (dict(method="srpo", localiser="oracle"), "reset_po", "srpo oracle"),
        (dict(method="rrpo", localiser="random"), "reset_po", "rrpo"),
        ({}, "", ""),
    ],
)
def test_script_and_method(settings, script, method):
    assert (curves.script_of(settings), curves.method_of(settings)) == (script, method)


def test_a_run_that_goes_on_is_shown_as_far_as_it_has_come(tmp_path):
    folder = made(tmp_path / "half", settings=dict(variant="chain", partition="fixed", steps=9))
    with open(folder / "metrics.csv", "a") as file:
        file.write("5,0.5,0.0")  # being written
    run = curves.read(folder)
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4]
    assert curves.accuracy_of(run) == "0.250 in training"
    run.rows[-1]["held_out"] = 0.5
    assert curves.accuracy_of(run) == "0.500 so far"
    assert "4/9" in curves.listing([run])[1]


def test_of_a_run_that_goes_on_the_last_row_is_shown(tmp_path):
    """And one scale is that of all runs, whose curves are of evaluations where there are three."""
    long = curves.read(made(tmp_path / "long", rows=12))
    long.rows[-1]["in_form"] = 0.5
    assert curves.accuracy_of(long) == "0.750 in training"  # mean of the last ten rounds
    short = curves.read(made(tmp_path / "short", rows=2))
    short.rows[1]["accuracy"] = 0.0
    head, first, second = map(cells, curves.listing([long, short]))
    assert first[-4:-1] == ["50.0%", "1,200", "6"] and head[-1] == "0.00 to 1.20"
    assert second[-1] == "▂▁"
    for n, value in enumerate((0.25, 0.5, 0.75)):
        assert curves.drawn_accuracy(long) == long.values("accuracy")
        long.rows[n]["held_out"] = value
    assert curves.drawn_accuracy(long) == [0.25, 0.5, 0.75]


def test_bars_are_the_nearest_and_two_curves_of_a_line_share_a_scale():
    assert curves.curve([0, 0.6, 0.95, 1], 0, 1) == "▁▅██"
    line = curves.table({"kl": [0, 1.0]}, {"kl": [0, 10.0]}, ("a", "b"))[2]
    assert line.split()[2] == "▁▂" and line.split()[6] == "▁█"


def test_a_run_is_made_once_and_one_that_was_stopped_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    folder, asked = Path("runs", "x"), []
    code = "import sys; sys.exit(int(sys.argv[1]))"

    def go(code_of_exit: int) -> list[str]:
        def run(command, right=subprocess.run):
            asked.append(command[3:])
            return right([*command[:3], str(code_of_exit)])

        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", run)
            assert curves.make("x", "title", ["-c", code], ["--lr", "1"]) == folder

    with pytest.raises(SystemExit) as stopped:
        go(3)
    assert stopped.value.code == 3
    (folder / "checkpoint").mkdir(parents=True)
    go(0)
    (folder / "summary.json").write_text("{}")
    go(0)
    flags = ["--name", "x", "--lr", "1"]
    assert asked == [flags, [*flags, "--resume"]]


def test_what_is_not_finite_is_left_out_of_curves():
    rows = [dict(step=1.0, accuracy=0.5), dict(step=2.0, accuracy=math.nan), dict(step=3.0)]
    run = curves.Run("", rows, {}, {})
    assert run.points("step", "accuracy") == [(1.0, 0.5)]
    assert curves.listing([run])


def test_evaluations_begin_before_the_run_and_end_after_it(tmp_path):
    run = curves.read(made(tmp_path / "a", summary=SUMMARY))
    run.rows[1]["held_out"] = run.rows[3]["held_out"] = 0.5  # that of the last round comes once
    assert curves.evaluations(run, "step") == ([0, 2, 4], [0.25, 0.5, 0.75], [0.03, 0.0, 0.02])
    assert curves.own_columns([run]) == ["kl", "in_form"]  # nothing was clipped
    for row in run.rows:
        row["kl"] = 1e-9  # of rounding errors alone
    assert curves.own_columns([run]) == ["in_form"]
    run.rows[0]["kl"] = -1e-4
    assert curves.own_columns([run]) == ["kl", "in_form"]


@pytest.mark.parametrize(
    "break_it, says",
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "has no metrics.csv"),
        (lambda folder: made(folder, rows=0), "metrics.csv is damaged"),
        (lambda folder: (made(folder) / "metrics.csv").write_bytes(b"\xff\0"), "csv is damaged"),
        (lambda folder: (made(folder) / "metrics.csv").write_text("a\nb\n"), "csv is damaged"),
        (lambda folder: (made(folder) / "summary.json").write_text("{"), "summary.json is damaged"),
        (lambda folder: (made(folder) / "config.json").write_text("[]"), "config.json is damaged"),
    ],
)
def test_wrong_folders_are_named_in_one_line(tmp_path, monkeypatch, capsys, break_it, says):
    break_it(tmp_path / "a")
    monkeypatch.setattr(sys, "argv", ["curves.py", str(tmp_path / "a")])
    with pytest.raises(SystemExit) as stopped:
        curves.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert says in err and str(tmp_path / "a") in err and err.count("\n") == 1


def test_without_arguments_all_runs_are_listed(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "runs/" in done.stderr
    made(tmp_path / "runs" / "b", summary=SUMMARY)
    made(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "warm_start").mkdir()
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    assert [cells(line)[0] for line in done.stdout.splitlines()[1:3]] == ["a", "b"]
    assert "0.250 -> 0.750 ± 0.020" in done.stdout
    drawn = (tmp_path / "runs" / "curves.png").exists()
    assert drawn != (curves.NO_MATPLOTLIB in done.stdout)


@pytest.mark.parametrize("script", ["spo", *runs.OTHERS])
def test_every_column_that_a_script_writes_has_a_meaning_and_no_other(warm, run, script):
    flags = runs.other_args(script) if script in runs.OTHERS else ["--kl_coef", "0.1"]
    done = run(*runs.BASE, *flags, "--steps", "1", script=script)
    assert done.code == 0, done.err
    folder = warm / "runs" / script
    [row] = runs.metrics(folder)
    meant = set()
    for name, meaning in curves.COLUMNS.items():
        named = {"spo", "mpo", "reset_po"} & {*re.split("[,: ]+", meaning.split(":")[0])}
        meant |= {name} if script in (named or {script}) else set()
    assert {*row, "seconds"} == meant
    left = {f"{path.name}{'/' * path.is_dir()}" for path in folder.iterdir()}
    assert left == curves.FILES.keys()
    assert {*curves.FILES, *curves.COLUMNS} <= set("\n".join(curves.meanings()).split())


def test_the_picture_goes_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "draw", lambda runs, path: f"{[r.name for r in runs]} to {path}")
    argv = ["curves.py", str(made(tmp_path / "a")), str(made(tmp_path / "b")), "--out", "it.png"]
    monkeypatch.setattr(sys, "argv", argv)
    curves.main()
    assert capsys.readouterr().out.endswith("['a', 'b'] to it.png\n")


def test_a_picture_is_drawn_against_rounds_tokens_and_seconds(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="tutorials/requirements.txt")
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", lambda figure: None)  # to be looked at
        run = curves.read(made(tmp_path / "a", rows=30, summary=SUMMARY))
        curves.draw([run], tmp_path / "a.png")
    top = pyplot.gcf().axes[:3]
    pyplot.close()
    ends = [axis.containers[0].lines[0].get_xdata().tolist() for axis in top]
    assert ends == [[0, 30], [0, 3000], [0, 15]]


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="tutorials/requirements.txt is not installed")
    some = [made(tmp_path / "a", rows=30, summary=SUMMARY), made(tmp_path / "b", rows=1)]
    path = tmp_path / "two.png"
    assert curves.draw([curves.read(folder) for folder in some], path) == f"picture: {path}"
    assert path.read_bytes().startswith(b"\x89PNG")
    for wrong in (tmp_path / "nowhere" / "a.png", tmp_path / "a.txt"):
        with pytest.raises(curves.Unreadable, match="--out"):
            curves.draw([curves.read(some[0])], wrong)


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = curves.draw([curves.read(made(tmp_path / "a"))], tmp_path / "a.png")
    assert said == curves.NO_MATPLOTLIB and "tutorials/requirements.txt" in said
