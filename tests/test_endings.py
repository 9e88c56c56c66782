"""Runs that share a name, that are stopped, that cannot write or that nobody reads; and text from
outside. What a cluster, a pipe and a careless student do to a run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import filelock
import pytest

from conftest import ENV, ROOT
from runs import BASE, SHORT, SLOW, after_rows, given, on_a_terminal, other_args, result
from runs import rows_written, saved_step

# ------------------------------------------------------------------------------------ one owner


def in_the_background(cwd, *args, script="spo", **options):
    """A real `python spo.py` that goes on beside the test."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *args]
    return subprocess.Popen(command, cwd=cwd, env=ENV, stdout=subprocess.DEVNULL, **options)


def is_free(lock) -> bool:
    try:
        filelock.FileLock(lock).acquire(blocking=False).lock.release()
    except filelock.Timeout:
        return False
    return True


def test_a_run_has_one_owner_from_before_its_warm_start_until_its_process_ends(run, tmp_path):
    folder, lock = tmp_path / "runs" / "spo", tmp_path / "runs" / ".spo.lock"
    seen = []

    def look_and_kill(pid):
        deadline = time.time() + 300
        while not lock.exists() and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(0.2)
        seen.append((is_free(lock), folder.exists()))
        os.kill(pid, signal.SIGKILL)

    assert run(*BASE, "--warm_start_steps", "9999", meanwhile=look_and_kill).code == -9
    assert seen == [(False, False)]  # owned before it began; and a killed one has let go:
    assert is_free(lock) and not folder.exists()
    look = after_rows(folder, 2, lambda pid: (seen.append(is_free(lock)), os.kill(pid, 9)))
    assert run(*BASE, patch=SLOW, meanwhile=look).code == -9
    assert seen[1:] == [False]

    before = result_so_far(folder)
    with filelock.FileLock(lock):  # as a live run has it
        for again in (["--resume"], [*BASE, "--name", "spo", "--resume"]):
            done = run(*again)
            assert (done.code, done.err.count("\n")) == (2, 1), done.err
            words = "error: runs/spo: a run of this name is under way; pick another --name\n"
            assert done.err == words and result_so_far(folder) == before
        assert run("--eval_only").code == 0  # reads, and writes nothing
        assert result_so_far(folder) == before
        other = run(*SHORT, "--name", "other")
        assert other.code == 0, other.err
    with filelock.FileLock(tmp_path / "runs" / ".new.lock"):  # one that has not begun yet
        done = run(*SHORT, "--name", "new")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "runs/new: a run of this name is under way" in done.err
    assert run("--resume").code == 0


def test_a_run_that_another_began_meanwhile_is_not_overwritten(warm, run):
    """Both find no folder; by the time that the second gets the lock, the first has ended."""
    patch = """
claim = common.claim
def late(folder):
    lock = claim(folder)
    folder.mkdir()
    (folder / "summary.json").write_text("theirs")
    return lock
common.claim = late
"""
    (start,) = (warm / "runs" / "warm_start").iterdir()
    for i, more in enumerate(([], given(start))):
        done = run(*SHORT, *more, "--name", f"late{i}", patch=patch)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert f"runs/late{i} exists" in done.err
        assert (warm / "runs" / f"late{i}" / "summary.json").read_text() == "theirs"


def result_so_far(folder) -> tuple:
    return (folder / "metrics.csv").read_text(), saved_step(folder), sorted(os.listdir(folder))


def test_two_runs_may_make_one_warm_start_and_what_a_killed_one_left_is_swept(run, tmp_path):
    left = tmp_path / "runs" / "warm_start" / ".0123.new"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    args = [*SHORT, "--warm_start_steps", "3", "--steps", "1"]
    both = [in_the_background(tmp_path, *args, "--name", name) for name in "ab"]
    try:
        assert [process.wait(120) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    (made,) = (tmp_path / "runs" / "warm_start").iterdir()
    assert result(tmp_path / "runs" / "a") == result(tmp_path / "runs" / "b")


# -------------------------------------------------------------------------------------- endings

ENDINGS = {  # how stdout is, and the file descriptors of that
    "pipe": "",
    "closed by its reader": "r, w = os.pipe(); os.close(r); os.dup2(w, 1)",
    "both closed by their reader": "r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.dup2(w, 2)",
    "closed": "os.close(1); sys.stdout = None",
    "ascii": "sys.stdout.reconfigure(encoding='ascii'); sys.stderr.reconfigure(encoding='ascii')",
    "cp1252": "sys.stdout.reconfigure(encoding='cp1252')",
    "full": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
}


@pytest.mark.parametrize(
    "ending, number", [*zip(ENDINGS, [signal.SIGINT, signal.SIGTERM] * len(ENDINGS))]
)
def test_a_stopped_run_saves_whatever_becomes_of_its_output(base, warm, run, ending, number):
    folder, patch = warm / "runs" / "spo", SLOW + ENDINGS[ending]
    interrupt = after_rows(folder, 2, lambda pid: os.kill(pid, number))
    once = ["--save_every", "99"]  # only because it was stopped
    done = run(*BASE, *once, patch=patch, meanwhile=interrupt)
    step = rows_written(folder)
    assert done.code == 128 + number and 2 <= step < 5, done.err
    assert saved_step(folder) == step and "Traceback" not in done.err + done.out
    if ending in ("pipe", "ascii", "cp1252"):
        assert done.out.endswith(f"saved after step {step} in runs/spo/; --resume continues\n")
    if "both" not in ending:
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        assert f"\n{name}: finishing this step, then saving" in done.err
    again = run(*BASE, *once, "--resume", patch=ENDINGS[ending])
    assert again.code == 0, again.err
    assert result(folder) == result(base[0] / "runs" / "spo")


def test_a_run_whose_reader_has_gone_goes_on_to_its_end(base, warm):
    """python spo.py | head -n 1"""
    command = f"{sys.executable} {ROOT / 'spo.py'} {' '.join(BASE)} | head -n 1"
    options = dict(shell=True, cwd=warm, env=ENV, capture_output=True, text=True, timeout=600)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], **{**options, "shell": False})
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert done.stdout.startswith("SPO-chain") and done.stdout.count("\n") == 1
    assert result(warm / "runs" / "spo") == result(base[0] / "runs" / "spo")


def test_a_stop_in_the_last_step_or_evaluation_says_what_is_true(base, warm, run):
    folder = warm / "runs" / "spo"
    for where, words in (
        ("append_metrics", "saved after step 5 in runs/spo/; --resume continues\n"),
        ("evaluate", "stopped at once; a run that had begun continues with --resume\n"),
    ):
        patch = f"""
real, calls = common.{where}, 0
def interrupted(*args, **options):
    global calls
    calls += 1
    if calls == dict(append_metrics=5, evaluate=3)[{where!r}]:  # the last of the run
        os.kill(os.getpid(), signal.SIGINT)
    return real(*args, **options)
common.{where} = interrupted
"""
        done = run(*BASE, patch=patch)
        assert done.code == 130 and (done.out + done.err).count("finishing") == (words[:2] == "sa")
        assert (done.out if words[:2] == "sa" else done.err).endswith(words)
        assert saved_step(folder) == 5 and not (folder / "summary.json").exists()
        assert run("--resume").code == 0
        assert result(folder) == result(base[0] / "runs" / "spo")
        shutil.rmtree(folder)


INTERRUPTED = """
import builtins, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may come ignored
real = builtins.__import__
def importing(name, *rest, **options):
    if name == {library!r}:
        builtins.__import__ = real
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest, **options)
builtins.__import__ = importing
sys.path.insert(0, {folder!r})
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    "script, library", [("spo", "torch"), ("mpo", "transformers"), ("reset_po", "datasets")]
)
def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path, script, library):
    path = ROOT / f"{script}.py"
    code = INTERRUPTED.format(library=library, folder=str(ROOT), path=str(path))
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=600
    )
    assert done.returncode in (-signal.SIGINT, 130)
    assert done.stderr.strip() == "stopped before anything had begun", done.stderr
    assert not list(tmp_path.iterdir())


# A disk that is full: no file may grow beyond so many bytes.
FULL = """
import resource
def full(bytes, of=common.append_metrics):
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, resource.RLIM_INFINITY))
append = common.append_metrics
def fill(folder, row):
    append(folder, row)
    if row["step"] == {step}:
        full({bytes})
common.append_metrics = fill
"""


@pytest.mark.parametrize("step, bytes", [(1, 400_000), (1, 2_000_000), (3, 100), (3, 700)])
def test_on_a_full_disk_the_last_checkpoint_stays_whole_and_resumes(base, warm, run, step, bytes):
    """400,000 bytes hold no weights, 2,000,000 those but not the optimiser, 100 not even a row."""
    folder = warm / "runs" / "spo"
    done = run(*BASE, patch=FULL.format(step=step, bytes=bytes))
    assert done.code == 1 and "Traceback" not in done.err
    last = done.err.strip().split("\n")[-1]
    words = r"error: .*; a run that had begun continues with --resume"
    assert step == 3 or re.fullmatch(words, last)  # stderr is a file here, and as full
    assert saved_step(folder) == (0 if step == 1 else 2)
    assert not (folder / ".checkpoint.new").exists()
    assert run("--resume").code == 0
    assert result(folder) == result(base[0] / "runs" / "spo")


UNWRITABLE = {  # what is in the way, and the words that name it
    "a link to nowhere": (
        "os.symlink('nowhere/at/all', 'runs')",
        "runs cannot be written: File exists",
    ),
    "a file as warm_start": ("os.mkdir('runs'); open('runs/warm_start', 'w')", "runs/warm_start"),
    "a folder as lock": ("os.makedirs('runs/.spo.lock')", "runs/.spo.lock cannot be written"),
    "no room": (
        "import shutil; shutil.disk_usage = lambda p: type('usage', (), dict(free=8_000_000))",
        "runs/spo needs 9 MB for two checkpoints, its disk has 8 left",
    ),
    "no permission": (
        "import pathlib\ndef mkdir(self, *a, **k):\n    "
        "raise PermissionError(13, 'Permission denied', str(self))\npathlib.Path.mkdir = mkdir",
        "runs/warm_start cannot be written: Permission denied",
    ),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_where_nothing_can_be_written_is_said_before_the_warm_start(run, kind):
    patch, words = UNWRITABLE[kind]
    done = run(*BASE, patch="import os\n" + patch)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith("error: ") and words in done.err


# ----------------------------------------------------------------------------- text from outside


def test_no_text_from_outside_steers_the_terminal(warm, run):
    evil = "\x1b[2J\x1b]0;title\x07\u202e"
    rows = [dict(question=f"{i}{evil}?", answer=f"{evil}\n#### {evil}{i}") for i in range(60)]
    (warm / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copy(warm / "rows.jsonl", warm / f"{evil[:4]}.jsonl")
    (start,) = (warm / "runs" / "warm_start").iterdir()
    sizes = ["--data", "rows.jsonl", *given(start), "--steps", "1", "--show_every", "1"]
    for script in ("spo", "spo --variant tree", "mpo", "reset_po"):
        name, *more = script.split()
        flags = [*(SHORT if name == "spo" else other_args(name)), *sizes, *more]
        flags += ["--batch_size", "0"] if more else []
        done = run(*flags, "--name", script.replace(" ", ""), script=name)
        assert done.code == 0, done.err
        shown = (warm / "runs" / script.replace(" ", "") / "samples.txt").read_text("utf-8")
        assert "step 1: " in shown
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.out + shown)
    for args in (
        ["--data", f"{evil}.jsonl"], ["--model", evil], ["--name", evil], [evil], ["--lr", evil],
        ["--data", f"{evil[:4]}.jsonl", "--model", evil + "\n"], ["--prompt", "\udcff"],
    ):  # fmt: skip
        done = run(*BASE, *args)
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.out + done.err)


def test_what_is_kept_does_not_depend_on_the_terminals_width(warm, run):
    flags = [*SHORT, "--variant", "tree", "--batch_size", "0", "--segment_tokens", "4"]
    texts, outs = [], []
    for columns in ("30", "200"):
        done = run(*flags, "--name", columns, env=dict(COLUMNS=columns))
        texts.append((warm / "runs" / columns / "samples.txt").read_text("utf-8"))
        outs.append(done.out)
    assert texts[0] == texts[1] and "step 2: " in texts[0]
    lines = [line for line in outs[0].splitlines() if line.strip().startswith("V ")]
    assert lines and max(map(len, lines)) <= 30


def test_an_empty_no_color_leaves_colour_on(warm, run):
    shown = on_a_terminal(run, *SHORT, "--name", "empty", env={"NO_COLOR": ""})
    assert "\033[48;5;" in shown
