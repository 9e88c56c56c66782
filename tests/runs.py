"""Small runs of the scripts, for test_runs.py and test_endings.py: flags, and what runs leave."""

import csv
import hashlib
import json
import os
import pty
import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM

import mpo
import reset_po
from conftest import ENV, ROOT, Done

WARM = "--terms 2 --warm_start_steps 60".split()  # so little that some answers are right, some not
SIZES = "--prompts 8 --batch_size 4 --max_new_tokens 16 --eval_problems 6 --eval_samples 2".split()
TRAIN = "--lr 1e-3 --steps 5 --save_every 2 --show_every 1 --eval_every 4".split()
BASE = [*WARM, *SIZES, *TRAIN]
SHORT = [*BASE, "--steps", "2", "--save_every", "1"]  # the last of a repeated flag counts


def given(folder) -> list[str]:
    """Flags of a run that begins with the weights in `folder` as they are."""
    return ["--model", str(folder), "--warm_start_steps", "0"]


OTHERS = {  # script -> its module, flags of a small run, and what its metrics add
    "mpo": (
        mpo,
        "--prompts 4 --group_size 4 --batch_size 8 --epochs 2 --block_size 3",
        "token_ratio_var block_ratio_var token_clip block_clip kl no_signal",
    ),
    "reset_po": (
        reset_po,
        "--prompts 8 --fresh 2 --resets 2 --batch_size 16 --epochs 2",
        "reset_accuracy clip_fraction resets no_signal_base no_signal_reset hit at_or_before "
        "hit_chance at_or_before_chance base_tokens seed_tokens localiser_tokens reset_tokens",
    ),
}


def other_args(script) -> list[str]:
    return [*BASE, *OTHERS[script][1].split()]


def python(cwd, *args) -> Done:
    command = [sys.executable, str(ROOT / "spo.py"), *args]
    done = subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, timeout=600)
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def metrics(folder) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


def weights(folder) -> str:
    files = [folder, folder / "checkpoint"]
    data = next(f / "model.safetensors" for f in files if (f / "model.safetensors").exists())
    return hashlib.sha256(data.read_bytes()).hexdigest()


def result(folder) -> tuple:
    """All that a run leaves, apart from its clock."""
    facts = {k: v for k, v in summary(folder).items() if k != "seconds"}
    return metrics(folder), facts, (folder / "samples.txt").read_text("utf-8"), weights(folder)


def saved_step(folder, checkpoint="checkpoint") -> int:
    AutoModelForCausalLM.from_pretrained(folder / checkpoint)
    return torch.load(folder / checkpoint / "state.pt", weights_only=True)["progress"]["step"]


def listing(cwd) -> dict:
    """All files and folders but locks, and when files were written."""
    paths = [path for path in cwd.rglob("*") if path.suffix != ".lock"]
    return {str(path): path.is_dir() or path.lstat().st_mtime_ns for path in paths}


SLOW = """
append = common.append_metrics
common.append_metrics = lambda *args: (append(*args), time.sleep(0.1))
"""


def rows_written(folder) -> int:
    file = folder / "metrics.csv"
    return max(0, file.read_bytes().count(b"\n") - 1) if file.exists() else 0


def after_rows(folder, count: int, act):
    """A `meanwhile` that waits for so many rows, and then acts on the process."""

    def meanwhile(pid):
        deadline = time.time() + 300
        while rows_written(folder) < count and time.time() < deadline:
            time.sleep(0.005)
        act(pid)

    return meanwhile


def on_a_terminal(run, *args, env={}) -> str:
    """What the run prints where stdout is a terminal."""
    master, slave = pty.openpty()
    done = run(*args, out=os.ttyname(slave), env=env)
    os.set_blocking(master, False)
    text = os.read(master, 1 << 16).decode(errors="replace")
    os.close(master)
    os.close(slave)
    assert done.code == 0, done.err
    return text
