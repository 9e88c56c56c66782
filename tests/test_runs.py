"""The scripts in child processes: runs, resume, kills, bad input, colour. Most with spo.py.

Most runs are forked from one child (conftest.py); what is particular to a fresh interpreter runs in
a real `python spo.py`.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import spo
from conftest import ENV, ROOT
from runs import BASE, OTHERS, SHORT, SLOW, after_rows, given, listing, metrics
from runs import on_a_terminal, other_args, python, result, rows_written, saved_step, summary
from runs import weights

# ------------------------------------------------------------------------------------ whole runs


def test_a_run_leaves_its_settings_metrics_samples_checkpoint_and_summary(base):
    folder = base[0] / "runs" / "spo"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.csv", "samples.txt", "checkpoint", "summary.json"
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    names = {field.name for kind in (spo.Config, common.RunConfig) for field in fields(kind)}
    assert set(config) == (names - {"resume", "eval_only"}) | {"problems"}
    assert (config["terms"], config["lr"], config["name"]) == (2, 1e-3, "spo")

    rows = metrics(folder)
    wanted = "accuracy loss kl clip_fraction grad_norm entropy boundaries length lr".split()
    assert set(wanted) < set(rows[0])
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    tokens = [0, *(int(row["sampled_tokens"]) for row in rows)]
    assert all(a < b for a, b in zip(tokens, tokens[1:]))
    assert [row["held_out"] != "" for row in rows] == [False, False, False, True, False]
    for row in rows:  # of 16 answers: one that has a signal has a segment with an advantage
        signals, segments = 16 * (1 - float(row["no_signal"])), 16 * float(row["boundaries"])
        assert signals <= int(row["trained"]) <= segments and segments == int(segments)
    assert any(float(row["no_signal"]) not in (0, 0.5, 1) for row in rows)
    right = [16 * float(row["accuracy"]) for row in rows]
    assert right == [int(x) for x in right] and any(right)
    assert summary(folder)["failures"] <= 16 * 5 - sum(right)
    shown = re.findall(r"^step (\d+): ", (folder / "samples.txt").read_text("utf-8"), re.M)
    assert shown == ["1", "2", "3", "4", "5"]

    facts = summary(folder)
    assert 0 < facts["accuracy_before"] <= 1 and 0 <= facts["accuracy_after"] <= 1
    assert 0 <= facts["accuracy_stderr"] < 1 and facts["seconds"] > 0
    assert facts["sampled_tokens"] == tokens[-1]
    assert 0 < facts["credit_hit"] <= 1 and facts["failures"] > 1


def test_the_checkpoint_is_a_trained_hugging_face_model(base):
    folder = base[0] / "runs" / "spo"
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert tokenizer.decode(common.encode(tokenizer, "31+4=35")) == "31+4=35"
    assert model.config.vocab_size == len(tokenizer)
    (start,) = (base[0] / "runs" / "warm_start").iterdir()
    assert weights(folder) != weights(start)
    assert any(float(row["loss"]) for row in metrics(folder))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(base, warm, run):
    (start,) = (warm / "runs" / "warm_start").iterdir()
    assert run(*BASE, "--name", "again").code == 0
    for seed in ("0", "1"):
        model = (*given(start), "--seed", seed, "--name", f"seed{seed}")
        assert run(*BASE, *model).code == 0
    runs = warm / "runs"
    expected = result(base[0] / "runs" / "spo")
    assert result(runs / "again") == expected
    assert result(runs / "seed0") == expected  # --model, given the same weights
    assert metrics(runs / "seed1") != expected[0] and weights(runs / "seed1") != expected[3]
    assert len(list((runs / "warm_start").iterdir())) == 1


def test_the_seed_decides_what_is_sampled_to_the_same_problem(warm, run):
    questions = {common.split_of(f"{n}+5"): f"{n}+5" for n in range(10, 40)}
    pairs = [(questions[split], "#### 1") for split in ("train", "test")]
    rows = [json.dumps(dict(question=question, answer=answer)) for question, answer in pairs]
    (warm / "rows.jsonl").write_text("\n".join(rows))
    (start,) = (warm / "runs" / "warm_start").iterdir()
    args = [*SHORT, "--data", "rows.jsonl", *given(start), "--steps", "1"]
    for seed in "01":
        assert run(*args, "--seed", seed, "--name", seed).code == 0
    rows = [metrics(warm / "runs" / seed)[0] for seed in "01"]
    sampled = [(row["sampled_tokens"], row["entropy"]) for row in rows]
    assert sampled[0] != sampled[1]


@pytest.mark.parametrize("policy", [[], [*given("runs/spo/checkpoint"), "--name", "none"]])
def test_eval_only_repeats_the_final_evaluation_and_writes_nothing(base, run, policy):
    before = listing(base[0])
    done = run(*BASE, "--eval_only", *policy, cwd=base[0])
    assert listing(base[0]) == before
    after = re.search(r"^after:  (sampled ([\d.]+).*)$", base[1].out, re.M)
    assert (done.code, done.out) == (0, f"6 held-out problems: {after[1]}\n")
    accuracy = summary(base[0] / "runs" / "spo")["accuracy_after"]
    assert float(after[2]) == pytest.approx(accuracy, abs=6e-4)


def test_a_run_says_what_is_to_come_what_was_gained_and_what_to_type_next(base, warm, run):
    facts, text = summary(base[0] / "runs" / "spo"), base[1].out
    gained = f"{facts['accuracy_before']:.2f} -> {facts['accuracy_after']:.2f}"
    last = f"held-out accuracy {gained}; its curves: python tutorials/curves.py runs/spo\n"
    assert text.endswith(last) and facts["accuracy_before"] != facts["accuracy_after"]
    story = "First it imitates a student who has 35% of the single-digit facts wrong"
    assert text.index(story) < text.index("before:")
    assert "\nsums: 4,096 problems, 6 held out; on cpu in float32; files in runs/spo/\n" in text
    for when, lines in (("before", 2), ("after", 1)):  # before: said at once, and at the end
        said = re.findall(rf"^{when}: +sampled ([\d.]+) ± ([\d.]+),", text, re.M)
        mean, error = (facts[f"accuracy{x}_{when}"] for x in ("", "_stderr"))
        assert said == [(f"{mean:.3f}", f"{error:.3f}")] * lines
    assert facts["accuracy_stderr"] == facts["accuracy_stderr_after"]
    assert facts["accuracy_stderr_before"] != facts["accuracy_stderr_after"]
    assert f"\n{facts['sampled_tokens'] / 1e6:.2f} M tokens sampled, " in text
    shares = (f"{facts['credit_hit']:.0%}", f"{facts['credit_chance']:.0%}")
    said = re.findall(r"^credit: .* in (\d+%) of .* failures \(by chance (\d+%)\)$", text, re.M)
    assert said == [shares]
    accuracy = float(metrics(base[0] / "runs" / "spo")[-1]["accuracy"])
    assert f"accuracy={accuracy:.2f}]" in base[1].err.split("\r")[-1]
    (start,) = (warm / "runs" / "warm_start").iterdir()
    assert story not in run(*SHORT, *given(start)).out  # it does not


def test_evaluating_along_the_way_does_not_change_the_training(base, warm, run):
    assert run(*BASE, "--eval_every", "0", "--show_every", "0").code == 0
    assert weights(warm / "runs" / "spo") == weights(base[0] / "runs" / "spo")
    assert not (warm / "runs" / "spo" / "samples.txt").exists()


def test_trajectory_without_mask_runs(warm, run):
    args = "--partition trajectory --group_size 2 --mask False --steps 2".split()
    assert run(*BASE, *args).code == 0
    rows = metrics(warm / "runs" / "spo")
    assert [float(row["boundaries"]) for row in rows] == [1, 1]
    # Without continuations, the answers are all that is sampled.
    total = sum(float(row["length"]) * 16 for row in rows)
    assert int(rows[-1]["sampled_tokens"]) == total


def test_several_epochs_and_minibatches_all_take_their_optimiser_steps(warm, run):
    assert run(*BASE, "--epochs", "2", "--warmup_updates", "1000", "--steps", "2").code == 0
    rows = metrics(warm / "runs" / "spo")
    rates = [float(row["lr"]) for row in rows]  # 1e-3 x updates / 1000, eight updates a step
    assert rates == pytest.approx([8e-6, 16e-6])
    assert float(rows[1]["kl"]) > 0  # the second epoch is off-policy


KINDS = {  # flags of spo.py -> what samples.txt then shows
    "--partition fixed --segment_tokens 5": "  | a segment, ' a cutpoint within",
    "--partition newline --interval 3": "  | a segment, ' a cutpoint within",
    "--partition trajectory --group_size 2": "  | a segment, ' a cutpoint within",
    "--interval 2 --kl_coef 1e-2": "state what the warm start has learned wrong",
    "--variant tree --segment_tokens 4": "  ! the first wrong token is in this node",
    "--variant tree --branching 2 3 --scale_advantages True --mask False": "    V 0.00 A -",
    "--variant tree --segment_tokens 4 --batch_size 3 --replay_age 3 --replay_nodes 2 "
    "--kl_coef 1e-2 --epochs 2": "    V 0.00 A -",
}


@pytest.mark.parametrize("args", KINDS)
def test_every_variant_and_partition_runs_and_resumes_to_the_same_end(warm, run, args):
    folder, flags = warm / "runs" / "spo", [*BASE, "--batch_size", "0", *args.split()]
    assert run(*flags, "--name", "whole").code == 0
    kill = after_rows(folder, 3, lambda pid: os.kill(pid, signal.SIGKILL))
    assert run(*flags, patch=SLOW, meanwhile=kill).code == -9
    assert saved_step(folder) < 5
    assert run(*flags, "--resume").code == 0
    assert result(folder) == result(warm / "runs" / "whole")
    rows = metrics(folder)
    assert KINDS[args] in (folder / "samples.txt").read_text("utf-8")
    assert ("kl_ref" in rows[0]) == ("kl_coef" in args)
    if "kl_coef" in args:
        moved = [float(row["kl_ref"]) for row in rows]
        # Up to the first update the policy is still the reference.
        assert max(moved) > 1e-9 and ("epochs" in args or moved[0] < 1e-9)
    assert any(float(row["trained"]) for row in rows) and summary(folder)["failures"] > 0


@pytest.mark.parametrize("args", ["--group_size 2", "--variant tree --batch_size 0"])
def test_each_answer_is_compared_with_its_own_problem(warm, run, args):
    patch = """
count_hits, seen = spo.count_hits, set()
def check(counts, problems, answers, tokenizer):
    for a in answers:
        assert tokenizer.decode(a.rollout.prompt) == problems[a.owner].question + "\\n"
        seen.add(problems[a.owner].question)
    return count_hits(counts, problems, answers, tokenizer)
spo.count_hits = check
finish = common.finish_run
common.finish_run = lambda *args: (finish(*args), print("seen", len(seen)))
"""
    done = run(*SHORT, *args.split(), patch=patch)
    assert done.code == 0, done.err
    assert int(re.search(r"^seen (\d+)$", done.out, re.M)[1]) > 8


def test_a_replay_holds_back_nodes_and_trains_them_later(warm, run):
    tree = "--variant tree --segment_tokens 4 --batch_size 0 --replay_nodes 1".split()
    rows = []
    for age in "012":
        assert run(*BASE, *tree, "--replay_age", age, "--name", age).code == 0
        rows.append([int(row["trained"]) for row in metrics(warm / "runs" / age)])
    every, fresh, waited = rows
    assert len({weights(warm / "runs" / age) for age in "012"}) == 3
    assert every[0] > fresh[0] == waited[0] > 0  # of each problem one node at most
    assert fresh[1] < waited[1]  # and one of each problem of the step before, which age 1 drops
    state = torch.load(warm / "runs" / "2" / "checkpoint" / "state.pt", weights_only=True)
    assert {born for born, _, _ in state["progress"]["waiting"]} == {3, 4}


# --------------------------------------------------------------------------------------- resume


def test_after_ctrl_c_a_run_saves_says_where_and_resumes_to_the_same_end(base, warm, run):
    folder = warm / "runs" / "spo"
    interrupt = after_rows(folder, 1, lambda pid: os.kill(pid, signal.SIGINT))
    done = run(*BASE, patch=SLOW, meanwhile=interrupt)
    step = rows_written(folder)
    assert done.code == 130 and 1 <= step < 5
    assert done.out.endswith(f"saved after step {step} in runs/spo/; --resume continues\n")
    assert saved_step(folder) == step and not (folder / "summary.json").exists()
    again = run(*BASE, "--resume")
    assert again.code == 0 and "First it imitates" not in again.out  # that has been done
    assert again.out.count("before: ") == 2  # as in a run that was never stopped
    assert "training: 100%" in again.err and " 5/5 [" in again.err
    assert result(folder) == result(base[0] / "runs" / "spo")


def test_a_second_ctrl_c_stops_at_once_and_loses_no_checkpoint(base, warm, run):
    patch = """
append = common.append_metrics
def stop(folder, row):
    append(folder, row)
    if row["step"] == 4:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
common.append_metrics = stop
"""
    done = run(*BASE, patch=patch)
    folder = warm / "runs" / "spo"
    assert done.code == 130 and "Traceback" not in done.err
    assert done.err.endswith("stopped at once; a run that had begun continues with --resume\n")
    assert rows_written(folder) == 4 and saved_step(folder) == 2
    assert run(*BASE, "--resume").code == 0
    assert result(folder) == result(base[0] / "runs" / "spo")


def test_killed_at_any_moment_a_run_resumes_to_the_same_end(base, warm, run):
    folder, codes = warm / "runs" / "spo", []
    for count in range(5):
        delay = random.uniform(0, 0.1)
        kill = after_rows(folder, count, lambda pid: (time.sleep(delay), os.kill(pid, 9)))
        codes.append(run(*BASE, patch=SLOW, meanwhile=kill).code)
        if folder.exists() and not (folder / "summary.json").exists():
            assert saved_step(folder) <= rows_written(folder)
            for log in common.LOGS:  # a row torn in the middle
                with open(folder / log, "a") as file:
                    file.write("9,0.")
            assert run(*BASE, "--resume").code == 0
        elif not folder.exists():
            assert run(*BASE).code == 0
        assert result(folder) == result(base[0] / "runs" / "spo"), f"{count} rows + {delay:.3f} s"
        shutil.rmtree(folder)
    assert codes.count(-9) >= 4


DEADLY = """
import shutil
from pathlib import Path
calls = 0
def deadly(owner, name):
    real = getattr(owner, name)
    def hook(*args, **kwargs):
        global calls
        calls += 1
        if calls == {k}:
            os._exit(9)
        return real(*args, **kwargs)
    setattr(owner, name, hook)
for owner in (spo.common.LlamaForCausalLM, common.PreTrainedTokenizerFast):
    deadly(owner, "save_pretrained")
for name in ("mkdir", "rename", "write_text"):
    deadly(Path, name)
for owner, name in ((shutil, "rmtree"), (torch, "save"), (os, "truncate"), (common, "show")):
    deadly(owner, name)
"""  # what touches the disk, one call after the other


def test_killed_before_any_write_a_run_resumes_or_starts_anew_to_the_same_end(warm, run):
    assert run(*SHORT).code == 0
    folder = warm / "runs" / "spo"
    expected, begun = result(folder), []
    for k in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        code = run(*SHORT, patch=DEADLY.format(k=k)).code
        if code == 0:
            break
        assert code == 9
        begun.append(folder.exists())
        if begun[-1]:
            if not (folder / "checkpoint").exists():  # between two renames: killed there once more
                assert run(*SHORT, "--resume", patch=DEADLY.format(k=1)).code == 9
            assert run(*SHORT, "--resume").code == 0, k
            assert result(folder) == expected, k
    # It appears at one moment. What a kill before it left under another name blocked no start.
    assert begun == sorted(begun) and begun.count(False) > 5 and begun.count(True) > 15
    assert result(folder) == expected


def test_a_warm_start_killed_while_it_is_saved_is_not_trusted_later(run, tmp_path):
    args = [*SHORT, "--warm_start_steps", "2", "--steps", "1"]
    assert run(*args, cwd=tmp_path).code == 0
    runs = tmp_path / "runs"
    (made,) = (runs / "warm_start").iterdir()
    expected, start, torn = result(runs / "spo"), weights(made), 0
    for k in range(1, 20):
        shutil.rmtree(runs, ignore_errors=True)
        assert run(*args, patch=DEADLY.format(k=k)).code == 9
        torn += bool([*runs.glob("warm_start/.*/config.json")])
        if any(path.name[0] != "." for path in runs.glob("warm_start/*")):
            break  # it has appeared
        if torn:
            assert run(*args).code == 0, k
            assert weights(made) == start and result(runs / "spo") == expected, k
    assert torn == 2  # before its tokenizer, and before its rename
    assert run(*args).code == 0
    assert weights(made) == start and result(runs / "spo") == expected


def test_the_seed_decides_the_weights_that_a_policy_begins_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problems, cpu = common.load_problems("sums", "train", 9), torch.device("cpu")
    for seed in (0, 5):
        settings = common.RunConfig(seed=seed, warm_start_steps=0)
        model, tokenizer = common.first_policy(settings, cpu)
        folder = common.warm_start(settings, problems, model, tokenizer)
        torch.manual_seed(seed)
        wanted = common.build_policy(len(common.build_tokenizer())).state_dict()
        given = common.load_policy(folder, cpu)[0].state_dict()
        assert all(torch.equal(given[name], wanted[name]) for name in wanted)


def test_a_warm_start_is_shared_only_by_runs_with_the_same_recipe(run, tmp_path):
    args = [*SHORT, "--warm_start_steps", "2", "--steps", "1"]
    changes = ("--lr 2e-3", 1), ("--warm_start_steps 1", 2), ("--terms 3", 3), ("--seed 1", 4)
    assert run(*args).code == 0
    for i, (change, count) in enumerate(changes):
        assert run(*args, *change.split(), "--name", str(i)).code == 0
        assert len([*tmp_path.glob("runs/warm_start/*")]) == count, change


REPLAY = "--variant tree --segment_tokens 4 --batch_size 0 --replay_age 2 --replay_nodes 1"


@pytest.mark.parametrize("more", ["--save_every 1", "--save_every 2", f"--save_every 2 {REPLAY}"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(warm, run, more):
    patch = """
steps, update = 0, spo.update
def broken(*args, **options):
    global steps
    steps += 1
    if steps == 3:
        spo.common.clipped_surrogate = lambda ratio, a, eps: (ratio * float("nan"), ratio > 9)
    return update(*args, **options)
spo.update = broken
"""
    flags = [*BASE, *more.split()]
    assert run(*flags, "--name", "whole").code == 0
    done = run(*flags, patch=patch)
    folder = warm / "runs" / "spo"
    assert done.code == 1 and "Traceback" not in done.err
    assert "step 3: loss nan" in done.err and "runs/spo/failed" in done.err
    assert saved_step(folder) == saved_step(folder, "failed") == rows_written(folder) == 2
    failed = AutoModelForCausalLM.from_pretrained(folder / "failed")
    assert all(weight.isfinite().all() for weight in failed.parameters())
    files = [folder / name / "state.pt" for name in ("checkpoint", "failed")]
    saved, stopped = (torch.load(file, weights_only=True)["progress"] for file in files)
    assert saved == stopped  # of the step that failed nothing is counted, and no node is lost
    assert run(*flags, "--resume").code == 0
    assert result(folder) == result(warm / "runs" / "whole")


# ------------------------------------------------------------------------------------ bad input


GOOD = {"question": "Tom has 3 apples and buys 4. How many?", "answer": "3+4=7\n#### 7"}
FILES = {
    "empty.jsonl": "",
    "blank.jsonl": "\n \n",
    "truncated.jsonl": json.dumps(GOOD) + "\n\n" + json.dumps(GOOD)[:-9],
    "number.jsonl": json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "answer": 7}),
    "list.jsonl": json.dumps([GOOD]),
    "unanswered.jsonl": json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "answer": "seven"}),
    "single.jsonl": json.dumps(GOOD),
    "rows.txt": json.dumps(GOOD),
    "broken.parquet": "PAR1",
}
MODELS = "no_weights no_tokenizer cut_weights wrong_weights lacking small cut_config narrow".split()


@pytest.fixture(scope="module")
def messy(base, tmp_path_factory):
    """A directory with a finished run, one that can be resumed, and much that cannot be used."""
    cwd = tmp_path_factory.mktemp("messy")
    shutil.copytree(base[0] / "runs", cwd / "runs")
    half, checkpoint = cwd / "runs" / "half", cwd / "runs" / "spo" / "checkpoint"
    shutil.copytree(cwd / "runs" / "spo", half)
    (half / "summary.json").unlink()
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "name": "half"}))
    for name in ("mangled", "stateless"):
        shutil.copytree(half, cwd / "runs" / name)
        (cwd / "runs" / name / "config.json").write_text(json.dumps({**config, "name": name}))
    (cwd / "runs" / "mangled" / "config.json").write_text("{")
    (cwd / "runs" / "stateless" / "checkpoint" / "state.pt").write_text("{")
    (cwd / "runs" / "taken").mkdir()
    for name, text in FILES.items():
        (cwd / name).write_text(text)
    rows = [{**GOOD, "question": f"{i}: {GOOD['question']}"} for i in range(60)]
    (cwd / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in MODELS:
        shutil.copytree(checkpoint, cwd / name)
    (cwd / "no_weights" / "model.safetensors").unlink()
    for file in (cwd / "no_tokenizer").glob("*token*"):
        file.unlink()
    data = (checkpoint / "model.safetensors").read_bytes()
    (cwd / "cut_weights" / "model.safetensors").write_bytes(data[: len(data) // 2])
    (cwd / "wrong_weights" / "model.safetensors").write_bytes(b"no tensors here" * 99)
    tensors = safetensors.torch.load(data)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    safetensors.torch.save_file(tensors, cwd / "lacking" / "model.safetensors", {"format": "pt"})
    common.build_policy(100).save_pretrained(cwd / "small")  # its tokenizer has 257 tokens
    (cwd / "cut_config" / "config.json").write_text("{")
    config = json.loads((checkpoint / "config.json").read_text())
    config["max_position_embeddings"] = 16
    (cwd / "narrow" / "config.json").write_text(json.dumps(config))
    return cwd


NEW = "--name new "
BAD = [  # arguments, and what the message must name
    ("--nonsense 3", "--nonsense"),
    ("positional", "positional"),
    ("--step 3", "--step"),
    ("--temp 0.5", "--temp"),
    ("--partition tree", "tree"),
    ("--device tpu", "tpu"),
    ("--dtype fp8", "fp8"),
    ("--mask perhaps", "perhaps"),
    ("--steps many", "many"),
    ("--steps 1.5", "1.5"),
    ("--lr", "--lr"),
    ("--interval 0", "--interval 0"),
    ("--continuations 0", "--continuations 0"),
    ("--temperature 0", "--temperature 0"),
    ("--temperature nan", "--temperature nan"),
    ("--threshold 1.5", "--threshold 1.5"),
    ("--threshold 0", "--threshold 0"),
    ("--group_size 0", "--group_size 0"),
    ("--steps 0", "--steps 0"),
    ("--max_new_tokens 0", "--max_new_tokens 0"),
    ("--prompts 8 --batch_size 3", "--batch_size 3"),
    ("--prompts 8 --batch_size 12", "--batch_size 12"),
    ("--partition trajectory --group_size 1", "--group_size"),
    ("--variant forest", "forest"),
    ("--variant tree --partition newline", "--variant tree"),
    ("--variant tree --branching 4 1", "--branching 1"),
    ("--variant tree --branching 4 x", "x"),
    ("--variant tree --branching", "--branching"),
    ("--variant tree --segment_tokens 0", "--segment_tokens 0"),
    ("--variant tree --replay_age -1", "--replay_age -1"),
    ("--variant tree --replay_nodes 0", "--replay_nodes 0"),
    ("--replay_age 2", "--replay_age"),
    ("--scale_advantages True", "--scale_advantages"),
    ("--level_weights True", "--level_weights"),
    ("--partition line", "line"),
    ("--kl_coef -1", "--kl_coef -1"),
    ("--kl_coef nan", "--kl_coef nan"),
    ("--lr 0", "--lr 0"),
    ("--lr inf", "--lr inf"),
    ("--lr -1", "--lr -1"),
    ("--clip_eps 0", "--clip_eps 0"),
    ("--max_grad_norm 0", "--max_grad_norm 0"),
    ("--warmup_updates -1", "--warmup_updates -1"),
    ("--seed -1", "--seed -1"),
    ("--terms 1", "--terms 1"),
    ("--terms 1000000", "--terms 1000000: must be at most 1,000"),
    ("--warm_start_steps -1", "--warm_start_steps -1"),
    ("--eval_problems 0", "--eval_problems 0"),
    ("--eval_samples 0", "--eval_samples 0"),
    ("--eval_every -1", "--eval_every -1"),
    ("--save_every 0", "--save_every 0"),
    ("--show_every -1", "--show_every -1"),
    ("--name a/b", "a/b"),
    ("--name ..", ".."),
    ("--name warm_start", "warm_start"),
    ("--name=", "--name ''"),
    ("--name " + "x" * 300, "--name"),
    ("--seed " + "9" * 20, "--seed"),
    ("--name taken", "runs/taken"),
    ("--name spo", "runs/spo"),
    ("--name absent --resume", "runs/absent"),
    ("--name taken --resume", "runs/taken"),
    ("--name spo --resume", "runs/spo is finished"),
    ("--name half --resume --lr 2e-3", "lr = 0.001, not 0.002"),
    ("--name half --resume --steps 9", "steps = 5, not 9"),
    ("--name half --resume --eval_problems 9", "eval_problems = 6, not 9"),
    ("--name absent --eval_only", "runs/absent"),
    ("--name taken --eval_only", "runs/taken"),
    (NEW + "--data absent.jsonl", "absent.jsonl"),
    (NEW + "--data runs", "runs"),
    (NEW + "--data rows.txt", "rows.txt"),
    (NEW + "--data empty.jsonl", "empty.jsonl"),
    (NEW + "--data blank.jsonl", "blank.jsonl"),
    (NEW + "--data truncated.jsonl", "truncated.jsonl, line 3:"),
    (NEW + "--data number.jsonl", "number.jsonl, line 2:"),
    (NEW + "--data list.jsonl", "list.jsonl, line 1:"),
    (NEW + "--data unanswered.jsonl", "unanswered.jsonl, line 3:"),
    (NEW + "--data single.jsonl", "single.jsonl"),
    (NEW + "--data broken.parquet", "broken.parquet"),
    ("--name mangled --resume", "runs/mangled/config.json is damaged"),
    ("--name stateless --resume", "runs/stateless/checkpoint/state.pt"),
    (NEW + "--model absent", "--model absent"),
    (NEW + "--model rows.jsonl", "--model rows.jsonl: is no folder with a config.json"),
    (NEW + "--model runs", "--model runs: is no folder with a config.json in it"),
    (NEW + "--model no_weights", "--model no_weights: cannot load its weights"),
    (NEW + "--model no_tokenizer", "--model no_tokenizer: cannot load its tokenizer"),
    (NEW + "--model cut_weights", "--model cut_weights: cannot load its weights"),
    (NEW + "--model wrong_weights", "--model wrong_weights: cannot load its weights"),
    (NEW + "--model lacking", "--model lacking"),
    (NEW + "--model small", "--model small"),
    (NEW + "--model cut_config", "--model cut_config"),
    (NEW + "--model narrow --data rows.jsonl", "window of 16"),
]


@pytest.mark.parametrize("args, says", BAD)
def test_bad_input_gives_one_line_that_names_it_exit_code_2_and_no_file(messy, run, args, says):
    shutil.rmtree(messy / "runs" / "new", ignore_errors=True)  # of a case that failed
    before = listing(messy)
    done = run(*BASE, *args.split(), cwd=messy)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith("error: ") and done.err.endswith("\n")
    assert says in done.err
    assert listing(messy) == before


HELPFUL = [  # arguments, and all that the message says
    ("--lr -1e-3", "--lr -0.001: must be above 0"),
    ("--clip_eps 1e308", "--clip_eps 1e+308: must be at most 1,000,000"),
    ("--temperature 1e-300", "--temperature 1e-300: must be at least 0.01"),
    ("--eval_problems 1000000000", "--eval_problems 1000000000: must be at most 1,000,000"),
    (
        "--model runs/spo --name new",
        "--model runs/spo: a run, not a model; --model runs/spo/checkpoint is what it trained",
    ),
    (
        "--name new --data array.json",
        "array.json, line 1: a JSON array; what is read is one object a line",
    ),
]  # fmt: skip


@pytest.mark.parametrize("args, says", HELPFUL)
def test_an_error_says_what_would_work(messy, run, args, says):
    (messy / "array.json").write_text(json.dumps([GOOD], indent=1))
    assert run(*BASE, *args.split(), cwd=messy).err == f"error: {says}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_bad_input(run, tmp_path):
    done = run("--device", "cuda")
    assert (done.code, done.err.count("\n")) == (2, 1) and done.err.startswith("error: --device")
    assert not list(tmp_path.iterdir())


def test_bad_input_to_a_fresh_interpreter_is_one_line_too(tmp_path):
    done = python(tmp_path, "--threshold", "1.5")
    assert done == (2, "", "error: --threshold 1.5: must be at most 1\n")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_runs_folder_is_one_line(run, tmp_path):
    (tmp_path / "runs").write_text("")
    done = run(*BASE)
    assert (done.code, done.err.count("\n")) == (2, 1) and done.err.startswith("error: runs/")


def test_help_lists_every_setting(run, tmp_path):
    done = run("--help")
    assert done.code == 0 and done.err == ""
    settings = [field for kind in (spo.Config, common.RunConfig) for field in fields(kind)]
    for field in settings:
        assert f"--{field.name} " in done.out, field.name
        first_words = " ".join(field.metadata["help"].split()[:2])
        assert first_words in " ".join(done.out.split()), field.name
    assert not list(tmp_path.iterdir())


def test_what_the_messy_directory_can_resume_is_not_bad_input(messy, run):
    """So that the refusals above are about the one thing wrong."""
    assert run(*BASE, "--name", "half", "--resume", cwd=messy).code == 0
    wide = "--name wide --data rows.jsonl --warm_start_steps 0 --steps 1".split()
    assert run(*SHORT, *wide, cwd=messy).code == 0


# ---------------------------------------------------------------------- settings are not invented


@pytest.mark.parametrize("flag", ["--resume", "--eval_only"])
@pytest.mark.parametrize(
    "text, words",
    [
        (None, "there is no runs/half/config.json"),
        ("{", "runs/half/config.json is damaged"),
        ("", "runs/half/config.json is damaged"),
        ("[1]", "runs/half/config.json is damaged"),
        ("null", "runs/half/config.json is damaged"),
        ("\xff", "runs/half/config.json is damaged"),
        (dict(lr="fast"), "runs/half/config.json is damaged: argument --lr: invalid float"),
        (dict(lr=None), "runs/half/config.json is damaged: argument --lr: invalid float"),
        (dict(steps=2.5), "runs/half/config.json is damaged: argument --steps: invalid int"),
        (dict(steps=0), "runs/half/config.json is damaged: --steps 0: must be at least 1"),
        (dict(variant="forest"), "runs/half/config.json is damaged: argument --variant"),
        (dict(momentum=0.9), "runs/half/config.json is not of spo.py: it has momentum"),
        (dict(lr=...), "runs/half/config.json is not of spo.py: it lacks lr"),
        (dict(problems=...), "runs/half/config.json is not of spo.py: it lacks problems"),
    ],
)
def test_settings_of_a_run_are_never_invented(messy, run, flag, text, words):
    path = messy / "runs" / "half" / "config.json"
    whole = path.read_text()
    if text is None:
        path.unlink()
    elif isinstance(text, dict):
        settings = {k: v for k, v in (json.loads(whole) | text).items() if v is not ...}
        path.write_text(json.dumps(settings))
    else:
        path.write_bytes(text.encode("latin-1"))
    before = listing(messy)
    done = run("--name", "half", flag, cwd=messy)
    assert listing(messy) == before
    path.write_text(whole)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert done.err.startswith(f"error: {words}")


@pytest.mark.parametrize("flag", ["--resume", "--eval_only"])
def test_a_run_of_another_script_is_neither_resumed_nor_evaluated(messy, run, flag):
    for script, key in (("mpo", "it lacks block_size"), ("reset_po", "it has branching")):
        done = run("--name", "half", flag, cwd=messy, script=script)
        assert done.code == 2
        words = f"error: runs/half/config.json is not of {script}.py: {key}\n"
        assert done.err == words


def test_a_state_of_other_content_is_one_line(messy, run):
    path = messy / "runs" / "stateless" / "checkpoint" / "state.pt"
    whole = torch.load(messy / "runs" / "spo" / "checkpoint" / "state.pt", weights_only=True)
    for other in (dict(progress={}), [1], dict(whole, optimizer={}), dict(whole, log_bytes=None)):
        torch.save(other, path)
        done = run("--name", "stateless", "--resume", cwd=messy)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert "runs/stateless/checkpoint/state.pt is missing or damaged" in done.err
    path.write_text("{")


def test_a_data_file_that_changed_since_is_noticed_on_resume(run, tmp_path):
    rows = [dict(question=f"{i}+2", answer=f"{i}+2={i + 2}\n#### {i + 2}") for i in range(60)]

    def write(rows):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    write(rows)
    folder, flags = tmp_path / "runs" / "spo", [*BASE, "--data", "rows.jsonl"]
    kill = after_rows(folder, 3, lambda pid: os.kill(pid, signal.SIGKILL))
    assert run(*flags, "--warm_start_steps", "2", patch=SLOW, meanwhile=kill).code == -9
    for split in ("train", "test"):
        i = next(i for i in range(60) if common.split_of(f"{i}+2") == split)
        write([*rows[:i], dict(rows[i], answer="#### 1"), *rows[i + 1 :]])
        done = run("--resume")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "problems of --data rows.jsonl have changed since it began" in done.err
    write(rows)
    assert run("--resume").code == 0


def test_a_prompt_without_room_is_said_before_the_warm_start(run, tmp_path):
    long = {common.split_of(text): text for text in (f"{i}+2" * 2048 for i in range(60))}
    for split in ("train", "test"):  # one that is held out is asked too
        rows = [dict(question=f"{i}+2", answer=f"#### {i + 2}") for i in range(60)]
        rows[7]["question"] = long[split]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        done = run(*BASE, "--data", "rows.jsonl")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "window of 2048" in done.err and not (tmp_path / "runs").exists()


def test_a_prompt_may_leave_room_for_a_single_token(tokenizer):
    problem = common.Problem("31+4", "#### 35", "35")
    length = len(common.prompt_ids(tokenizer, problem, "Add."))
    common.check_prompts([problem], tokenizer, "Add.", length + 1)
    with pytest.raises(common.BadInput, match=f"{length} tokens exceeds .* window of {length}:"):
        common.check_prompts([problem], tokenizer, "Add.", length)


# ---------------------------------------------------------------------------- the other scripts

OTHER_BAD = {
    "mpo": [
        ("--block_size 0", "--block_size 0"),
        ("--block_size 1.5", "1.5"),
        ("--weights 1", "--weights 1"),
        ("--weights -0.1", "--weights -0.1"),
        ("--weights nan", "--weights nan"),
        ("--weights half", "--weights half"),
        ("--layout tree", "tree"),
        ("--scale_eps perhaps", "perhaps"),
        ("--group_size 1", "--group_size 1"),
        ("--batch_size 3", "--batch_size 3"),
        ("--clip_eps 0", "--clip_eps 0"),
        ("--epochs 0", "--epochs 0"),
        ("--steps 0", "--steps 0"),
        ("--lr 0", "--lr 0"),
        ("--warmup_updates -1", "--warmup_updates -1"),
        ("--temperature 0", "--temperature 0"),
        ("--max_new_tokens 0", "--max_new_tokens 0"),
        ("--max_grad_norm 0", "--max_grad_norm 0"),
        ("--prompts 0", "--prompts 0"),
        ("--partition cutpoint", "--partition"),
    ],
    "reset_po": [
        ("--method trpo", "trpo"),
        ("--localiser teacher", "teacher"),
        ("--method rrpo --localiser oracle", "--localiser oracle"),
        ("--method grpo --localiser prompt", "--localiser prompt"),
        ("--localiser oracle --data rows.jsonl", "--localiser oracle"),
        ("--fresh 1", "--fresh 1"),
        ("--resets 1", "--resets 1"),
        ("--fresh -1", "--fresh -1"),
        ("--seeds -1", "--seeds -1"),
        ("--fresh 0 --resets 0", "--fresh 0"),
        ("--threshold 1.5", "--threshold 1.5"),
        ("--threshold 0", "--threshold 0"),
        ("--max_steps 0", "--max_steps 0"),
        ("--delimiter=", "--delimiter ''"),
        ("--localiser_tokens 0", "--localiser_tokens 0"),
        ("--seed_rule both", "both"),
        ("--batch_size 7", "--batch_size 7"),
        ("--clip_eps -1", "--clip_eps -1"),
        ("--clip_eps nan", "--clip_eps nan"),
        ("--lr 0", "--lr 0"),
        ("--epochs 0", "--epochs 0"),
        ("--temperature 0", "--temperature 0"),
        ("--group_size 8", "--group_size"),
    ],
}


@pytest.fixture(scope="session", params=OTHERS)
def other(base, server, tmp_path_factory, request):
    """A script, and a directory with one whole run of it, never stopped, and what it printed."""
    cwd = tmp_path_factory.mktemp(request.param)
    shutil.copytree(base[0] / "runs" / "warm_start", cwd / "runs" / "warm_start")
    command = [sys.executable, str(ROOT / f"{request.param}.py"), *other_args(request.param)]
    done = subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, timeout=600, text=True)
    assert done.returncode == 0, done.stderr
    return request.param, cwd, done.stdout, done.stderr


def assert_only_bars(err: str) -> None:
    parts = [part.strip() for part in re.split("[\n\r]", err)]
    assert not [part for part in parts if part and "%|" not in part]


def test_a_clean_run_prints_no_warning_of_a_library(base, other):
    for out, err in (base[1][1:], other[2:]):
        assert_only_bars(err)
        assert "arning" not in out


def test_the_other_scripts_leave_the_same_files(other):
    script, cwd, out, _ = other
    folder, module = cwd / "runs" / script, OTHERS[script][0]
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.csv", "samples.txt", "checkpoint", "summary.json"
    }  # fmt: skip
    names = {field.name for kind in (module.Config, common.RunConfig) for field in fields(kind)}
    settings = json.loads((folder / "config.json").read_text())
    assert set(settings) == (names - {"resume", "eval_only"}) | {"problems"}
    rows = metrics(folder)
    wanted = "step accuracy loss grad_norm entropy length lr sampled_tokens held_out"
    assert set(wanted.split() + OTHERS[script][2].split()) <= set(rows[0])
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert any(float(row["loss"]) for row in rows)
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    assert [row["held_out"] != "" for row in rows] == [False, False, False, True, False]
    shown = re.findall(r"^step (\d+): ", (folder / "samples.txt").read_text("utf-8"), re.M)
    assert shown == ["1", "2", "3", "4", "5"] and "step 1: " in out
    facts = summary(folder)
    assert 0 < facts["accuracy_before"] <= 1 and 0 <= facts["accuracy_after"] <= 1
    assert facts["sampled_tokens"] == int(rows[-1]["sampled_tokens"]) > 0
    (start,) = (cwd / "runs" / "warm_start").iterdir()
    assert weights(folder) != weights(start)


def test_the_other_scripts_learning_rate_falls_to_zero_at_the_very_end(other):
    script, cwd, *_ = other
    rates = [float(row["lr"]) for row in metrics(cwd / "runs" / script)]
    # 20 updates, four a step: up to 1e-3 over the first ten, then down.
    assert rates == pytest.approx([4e-4, 8e-4, 8e-4, 4e-4, 0])


def test_the_counts_of_resets_are_those_of_all_steps(other):
    script, cwd, out, _ = other
    if script == "reset_po":
        rows, facts = metrics(cwd / "runs" / script), summary(cwd / "runs" / script)
        for kind in ("base", "seed", "localiser", "reset"):
            assert facts[f"{kind}_tokens"] == sum(int(row[f"{kind}_tokens"]) for row in rows)
        assert facts["reset_groups"] == sum(8 * float(row["resets"]) for row in rows)
        assert facts["base_groups"] == 8 * 5
        assert f"\ntokens: {facts['base_tokens']:,} in base groups, " in out
        for row in rows:  # of two answers to each of eight problems
            assert float(row["accuracy"]) * 16 == int(float(row["accuracy"]) * 16)


def test_another_scripts_eval_only_repeats_the_final_evaluation(other, run):
    script, cwd, out, _ = other
    before = listing(cwd)
    done = run(*other_args(script), "--eval_only", cwd=cwd, script=script)
    assert listing(cwd) == before
    after = re.search(r"^after:  (sampled .*)$", out, re.M)
    assert (done.code, done.out) == (0, f"6 held-out problems: {after[1]}\n")


def test_another_script_killed_or_interrupted_resumes_to_the_same_end(other, warm, run):
    script, cwd, *_ = other
    folder, expected = warm / "runs" / script, result(cwd / "runs" / script)
    for count, number in ((1, signal.SIGKILL), (3, signal.SIGKILL), (2, signal.SIGINT)):
        act = after_rows(folder, count, lambda pid: os.kill(pid, number))
        done = run(*other_args(script), patch=SLOW, meanwhile=act, script=script)
        assert done.code == (130 if number == signal.SIGINT else -9)
        assert not (folder / "summary.json").exists()
        assert run(*other_args(script), "--resume", script=script).code == 0
        assert result(folder) == expected
        shutil.rmtree(folder)


def test_another_scripts_loss_that_is_not_finite_keeps_the_checkpoint(other, warm, run):
    script = other[0]
    patch = f"""
steps, update, optimizer_step = 0, {script}.update, common.optimizer_step
def broken(*args, **options):
    global steps
    steps += 1
    if steps == 3:
        common.optimizer_step = lambda *a: optimizer_step(*a[:3], float("nan"), *a[4:])
    return update(*args, **options)
{script}.update = broken
"""
    done = run(*other_args(script), "--save_every", "1", patch=patch, script=script)
    folder = warm / "runs" / script
    assert done.code == 1 and "Traceback" not in done.err and "step 3: loss nan" in done.err
    assert saved_step(folder) == saved_step(folder, "failed") == rows_written(folder) == 2
    files = [folder / name / "state.pt" for name in ("checkpoint", "failed")]
    saved, stopped = (torch.load(file, weights_only=True)["progress"] for file in files)
    assert saved == stopped  # of the step that failed nothing is counted


@pytest.mark.parametrize("script, args, says", [(s, *row) for s in OTHERS for row in OTHER_BAD[s]])
def test_bad_input_to_another_script_is_one_line_too(run, tmp_path, script, args, says):
    rows = [dict(question=f"{i} and 2?", answer=f"#### {i + 2}") for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = listing(tmp_path)
    done = run(*other_args(script), *args.split(), script=script)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith("error: ") and says in done.err
    assert listing(tmp_path) == before


@pytest.mark.parametrize("script", OTHERS)
def test_help_of_another_script_lists_every_setting(run, script):
    done = run("--help", script=script)
    assert done.code == 0 and done.err == ""
    for kind in (OTHERS[script][0].Config, common.RunConfig):
        for field in fields(kind):
            assert f"--{field.name} " in done.out, field.name
            first_words = " ".join(field.metadata["help"].split()[:2])
            assert first_words in " ".join(done.out.split()), field.name


@pytest.mark.parametrize("script", OTHERS)
def test_another_script_reads_a_file_of_problems(run, tmp_path, script):
    rows = [dict(question=f"{i} and 2?", answer=f"{i}+2={i + 2}\n#### {i + 2}") for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = ["--data", "rows.jsonl", "--warm_start_steps", "2", "--steps", "1"]
    done = run(*other_args(script), *small, script=script)
    assert done.code == 0, done.err
    assert "step 1: " in (tmp_path / "runs" / script / "samples.txt").read_text("utf-8")


@pytest.mark.parametrize("script", ["spo", "spo --variant tree --kl_coef 1e-3", *OTHERS])
def test_everything_is_sampled_and_scored_at_the_temperature_asked_for(warm, run, script):
    patch = """
sample, token_logprobs = common.sample, common.token_logprobs
def cool(*args, **options):
    assert options["temperature"] == 0.7
    return sample(*args, **options)
def cool_score(model, batch, temperature, *args, **options):
    assert temperature == 0.7
    return token_logprobs(model, batch, temperature, *args, **options)
common.sample, common.token_logprobs = cool, cool_score
"""
    script, *more = script.split()
    flags = [*(SHORT if script == "spo" else other_args(script)), "--steps", "2", *more]
    flags += ["--batch_size", "0"] if more else []
    done = run(*flags, "--temperature", "0.7", patch=patch, script=script)
    assert done.code == 0, done.err
    for row in metrics(warm / "runs" / script):
        silent = [float(value) for key, value in row.items() if "no_signal" in key and value]
        assert (float(row["grad_norm"]) == 0) == all(share == 1 for share in silent)


def test_mpo_says_whether_k_can_matter(warm, run):
    sizes = "--prompts 4 --group_size 4 --batch_size 8 --steps 3 --warmup_updates 0".split()
    two = run(*BASE, *sizes, script="mpo").out
    assert "updates per round: 2; from the second on ratios leave 1, and K acts" in two
    four = run(*BASE, *sizes, "--epochs", "2", "--name", "four", script="mpo").out
    assert "updates per round: 4; from" in four
    one = run(*BASE, *sizes, "--batch_size", "16", "--name", "one", script="mpo").out
    assert "updates per round: 1; all ratios are 1, no clip acts, and K shows" in one

    def moved(name) -> bool:
        rows = metrics(warm / "runs" / name)
        return any(float(row["block_ratio_var"]) > 1e-9 for row in rows)

    assert moved("mpo") and moved("four") and not moved("one")


@pytest.mark.parametrize(
    "args",
    [
        "--method rrpo", "--method grpo", "--localiser surprise", "--localiser oracle",
        "--localiser prompt --localiser_tokens 8", "--seed_rule paper --clip_eps 0.2",
        "--fresh 0 --resets 2 --seeds 2", "--delimiter = --max_steps 2",
    ],
)  # fmt: skip
def test_every_kind_of_reset_runs(warm, run, args):
    flags = [*other_args("reset_po"), "--steps", "2", *args.split()]
    done = run(*flags, script="reset_po")
    assert done.code == 0, done.err
    rows, facts = metrics(warm / "runs" / "reset_po"), summary(warm / "runs" / "reset_po")
    kinds = ("base_tokens", "seed_tokens", "localiser_tokens", "reset_tokens")
    assert int(rows[-1]["sampled_tokens"]) == sum(int(row[k]) for row in rows for k in kinds)
    grpo = "grpo" in args
    assert [float(row["resets"]) > 0 for row in rows] == [not grpo] * 2
    assert [int(row["localiser_tokens"]) > 0 for row in rows] == ["prompt" in args] * 2
    assert [int(row["seed_tokens"]) > 0 for row in rows] == ["paper" in args or "0 -" in args] * 2
    assert ("hit" in facts) != grpo == ("localiser:" not in done.out)
    if "oracle" in args:
        assert facts["hit"] == facts["at_or_before"] == 1
    if "rrpo" in args:
        assert "localiser random" in done.out
    assert "auto" not in done.out


@pytest.mark.parametrize("script", ["spo", *OTHERS])
def test_a_given_model_on_given_problems_has_other_defaults(warm, run, script):
    (start,) = (warm / "runs" / "warm_start").iterdir()
    rows = [dict(question=f"{i} and 2?", answer=f"#### {i + 2}") for i in range(60)]
    (warm / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, data = ["--model", str(start)], ["--data", "rows.jsonl"]
    sizes = "--steps 1 --prompts 8 --max_new_tokens 8 --eval_problems 2".split()
    settings = {}
    for name, more in dict(both=model + data, sums=model, tiny=[*model, *data, "--tiny"]).items():
        done = run(*sizes, *more, "--name", name, script=script)
        assert done.code == 0, done.err
        settings[name] = json.loads((warm / "runs" / name / "config.json").read_text())
    assert settings["both"]["lr"] == settings["tiny"]["lr"] == 1e-6 < settings["sums"]["lr"]
    assert settings["tiny"]["eval_samples"] == 2
    assert {settings[name]["warm_start_steps"] for name in settings} == {0}
    assert settings["both"]["gradient_checkpointing"] is True
    assert settings["both"]["max_new_tokens"] == 8  # what is given counts
    assert settings["sums"]["gradient_checkpointing"] is False
    help = run("--help", "--model", "x", "--data", "gsm8k", script=script)
    assert "1e-06" in help.out and "512" in help.out


# -------------------------------------------------------------------------- precision and memory


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_run_in_low_precision_resumes_to_the_same_end(warm, run, dtype):
    flags = [*BASE, "--dtype", dtype, "--steps", "4"]
    done = run(*flags, "--name", "whole")
    assert done.code == 0 and f"on cpu in {dict(bf16='bfloat', fp16='float')[dtype]}16" in done.out
    folder = warm / "runs" / "spo"
    kill = after_rows(folder, 3, lambda pid: os.kill(pid, signal.SIGKILL))
    assert run(*flags, patch=SLOW, meanwhile=kill).code == -9
    scaler = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["scaler"]
    assert (scaler.get("scale", 0) > 1000) == (dtype == "fp16")
    assert run(*flags, "--resume").code == 0
    assert result(folder) == result(warm / "runs" / "whole")
    saved = safetensors.torch.load_file(folder / "checkpoint" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_the_loss_scale_is_saved_and_taken_up_again(warm, run):
    """An overflow in the second step halves the scale, and a resumed run goes on with the half."""
    patch = """
import torch
step, calls = common.optimizer_step, 0
def overflow(model, *args):
    global calls
    calls += 1
    if calls == 2:
        for p in model.parameters():
            p.grad = torch.full_like(p, float("inf"))
    return step(model, *args)
common.optimizer_step = overflow
"""
    flags = [*BASE, "--dtype", "fp16", "--batch_size", "0", "--steps", "4"]
    folder = warm / "runs" / "spo"
    kill = after_rows(folder, 3, lambda pid: os.kill(pid, signal.SIGKILL))
    assert run(*flags, patch=patch + SLOW, meanwhile=kill).code == -9
    assert float(metrics(folder)[1]["grad_norm"]) == math.inf
    state = folder / "checkpoint" / "state.pt"
    assert torch.load(state, weights_only=True)["scaler"]["scale"] == 2**15
    assert run(*flags, "--resume").code == 0
    assert torch.load(state, weights_only=True)["scaler"]["scale"] == 2**15


def test_a_run_is_resumed_and_evaluated_with_the_settings_it_began_with(base, warm, run):
    folder = warm / "runs" / "spo"
    kill = after_rows(folder, 3, lambda pid: os.kill(pid, signal.SIGKILL))
    assert run(*BASE, patch=SLOW, meanwhile=kill).code == -9
    config = json.loads((folder / "config.json").read_text())
    assert (config["device"], config["dtype"]) == ("cpu", "fp32")  # what auto came to
    assert run("--resume").code == 0
    assert result(folder) == result(base[0] / "runs" / "spo")
    done = run("--eval_only")
    after = re.search(r"^after:  (sampled .*)$", base[1].out, re.M)
    assert (done.code, done.out) == (0, f"6 held-out problems: {after[1]}\n")
    (start,) = (warm / "runs" / "warm_start").iterdir()
    again = [*given(start), "--name", "model"]
    trained = run(*BASE, *again)
    done = run("--eval_only", "--name", "model")  # the trained policy, not what it began from
    after = re.search(r"^after:  (sampled .*)$", trained.out, re.M)
    assert (done.code, done.out) == (0, f"6 held-out problems: {after[1]}\n")


def test_a_run_may_be_resumed_under_another_name(base, warm, run):
    folder = warm / "runs" / "spo"
    kill = after_rows(folder, 3, lambda pid: os.kill(pid, signal.SIGKILL))
    assert run(*BASE, "--tiny", patch=SLOW, meanwhile=kill).code == -9
    folder.rename(warm / "runs" / "moved")
    assert run("--resume", "--name", "moved").code == 0
    assert result(warm / "runs" / "moved") == result(base[0] / "runs" / "spo")


def test_memory_flags_change_no_result_and_may_change_on_resume(base, warm, run):
    folder = warm / "runs" / "spo"
    small = ["--training_tokens", "64", "--gradient_checkpointing", "True"]
    kill = after_rows(folder, 3, lambda pid: os.kill(pid, signal.SIGKILL))
    assert run(*BASE, patch=SLOW, meanwhile=kill).code == -9
    assert run(*BASE, *small, "--resume").code == 0
    rows, expected = metrics(folder), metrics(base[0] / "runs" / "spo")
    for row, other in zip(rows, expected, strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), abs=1e-4)
    spied = """
decode = common.decode
def small(model, rollouts, budgets, *args):
    assert len(rollouts) * max(len(r.prompt) + b for r, b in zip(rollouts, budgets)) <= 200
    return decode(model, rollouts, budgets, *args)
common.decode = small
"""
    assert run(*SHORT, "--sampling_tokens", "200", "--name", "small", patch=spied).code == 0


def test_the_policy_is_evaluated_on_held_out_problems_and_trained_on_the_others(warm, run):
    patch = """
def split_at(function, index, split):
    def checked(*args, **options):
        assert {common.split_of(problem.question) for problem in args[index]} == {split}
        return function(*args, **options)
    return checked
common.evaluate = split_at(common.evaluate, 2, "test")
common.batch_at = split_at(common.batch_at, 0, "train")
"""
    assert run(*SHORT, "--name", "splits", patch=patch).code == 0


def test_gradient_checkpointing_is_on_if_asked_for_and_without_dropout(warm, run):
    patch = """
evaluate = common.evaluate
def checked(model, *args, **options):
    assert model.is_gradient_checkpointing
    assert not any(layer.self_attn.attention_dropout for layer in model.base_model.layers)
    return evaluate(model, *args, **options)
load, common.evaluate = common.load_policy, checked
def with_dropout(*args):
    model, tokenizer = load(*args)
    for layer in model.base_model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model, tokenizer
common.load_policy = with_dropout
"""
    flags = ["--gradient_checkpointing", "True", "--name", "again"]
    assert run(*SHORT, *flags, patch=patch).code == 0


@pytest.mark.parametrize(
    "device, flags, limit",
    [("cpu", [], 2048), ("cuda", [], 16384), ("cuda", ["--training_tokens", "99"], 99)],
)
def test_micro_batches_are_as_large_as_suits_the_device_or_as_is_said(
    warm, run, device, flags, limit
):
    patch = f"""
def stop(setup, **counts):
    raise common.BadInput(f"{{setup.run.training_tokens}} {{setup.compute}}")
import torch
common.begin = stop
device, common.training_tokens = {device!r}, lambda device, of=common.training_tokens: of(there)
there = torch.device(device)
"""
    limits = common.Compute(sampling_tokens=1 << 16, training_tokens=limit)
    done = run(*SHORT, *flags, patch=patch)
    assert done.err.endswith(f"error: {limit} {limits}\n")


@pytest.mark.parametrize(
    "error", ['torch.OutOfMemoryError("CUDA out of memory")',
              'RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate")',
              'RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")',
              'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried")',
              'MemoryError()']
)  # fmt: skip
def test_without_memory_one_line_names_the_flags_that_help(warm, run, error):
    patch = f"""
update, steps = spo.update, 0
def broken(*args, **options):
    global steps
    steps += 1
    if steps == 2:
        raise {error}
    return update(*args, **options)
spo.update = broken
"""
    done = run(*BASE, "--save_every", "1", patch=patch)
    line = done.err.strip().split("\n")[-1]
    assert done.code == 1 and "Traceback" not in done.err
    assert line.startswith("error: out of memory")
    for flag in ("--sampling_tokens", "--training_tokens", "--gradient_checkpointing", "--resume"):
        assert flag in line
    assert saved_step(warm / "runs" / "spo") == 1
    assert run(*BASE, "--save_every", "1", "--training_tokens", "99", "--resume").code == 0


def test_another_error_is_not_taken_for_a_lack_of_memory(warm, run):
    patch = "def broken(*args, **options):\n    raise RuntimeError('odd')\nspo.update = broken"
    done = run(*BASE, patch=patch)
    assert done.code != 0 and "out of memory" not in done.err


def test_long_steps_have_bars_of_their_own(warm, run):
    """They appear after some seconds; here at once."""
    patch = """
from tqdm import tqdm
common.slow_bar = lambda label, total, unit: tqdm(desc=label, total=total, unit=unit, mininterval=0)
"""
    done = run(*SHORT, patch=patch)
    assert done.code == 0
    bar = r"(sampling|estimating values|scoring|updating): *\d+%[^|]*\|[^|]*\| (\d+)/(\d+)"
    ends = re.findall(bar, done.err)
    for label in ("sampling", "estimating values", "scoring", "updating"):
        reached = [(int(n), int(total)) for name, n, total in ends if name == label]
        assert any(n == total > 0 for n, total in reached), label
        # Of 16 answers all are scored, and four make an update.
        assert label != "scoring" or {total for _, total in reached} == {16}
        assert label != "updating" or max(total for _, total in reached) <= 4
    quick = run(*SHORT, "--name", "quick")
    assert "sampling" not in quick.err and "scoring" not in quick.err


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS device")
def test_mps_where_there_is_none_is_bad_input(run):
    done = run("--device", "mps")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("error: --device mps")


# ----------------------------------------------------------------------------------- other data


def test_a_jsonl_and_a_parquet_file_with_the_same_rows_give_the_same_run(run, tmp_path):
    names = ("Zoë", "Łukasz", "美咲", "Ωmega", "Ana 🍎")
    rows = []
    for i in range(60):
        a, b = 3 + i, 2 + i % 7
        question = f"{names[i % 5]} has {a} apples – and buys {b} more.\nHow many in all?"
        solution = f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"
        rows.append(dict(question=question, answer=solution))
    text = "\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows))
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    args = [*SHORT, "--warm_start_steps", "2", "--steps", "1", "--continuations", "2"]
    for kind in ("jsonl", "parquet"):
        done = run(*args, "--data", f"rows.{kind}", "--name", kind)
        assert done.code == 0, done.err
    runs = tmp_path / "runs"
    assert result(runs / "jsonl") == result(runs / "parquet")
    shown = (runs / "jsonl" / "samples.txt").read_text("utf-8")
    assert any(f"step 1: {name} has " in shown for name in names)
    assert "failures" not in summary(runs / "jsonl")  # where a step went wrong is not known


# --------------------------------------------------------------------------------------- colour


def test_only_a_terminal_gets_colour_and_not_with_no_color(base, warm, run):
    green_or_red = "\033[48;5;"
    assert green_or_red in on_a_terminal(run, *SHORT, "--name", "colour")
    plain = on_a_terminal(run, *SHORT, "--name", "plain", env={"NO_COLOR": "1"})
    assert "step 1: " in plain and "\033" not in plain
    for cwd, name in ((warm, "colour"), (warm, "plain"), (base[0], "spo")):
        assert "\033" not in (cwd / "runs" / name / "samples.txt").read_text("utf-8")
    assert "step 1: " in base[1].out and "\033" not in base[1].out + base[1].err


def test_what_the_policy_samples_cannot_steer_the_terminal():
    pieces = ["\033[2J", "1\r", "\x07+", "\x9b2J", "é"]
    shown = "".join(common.credit_lines(pieces, [0.5] * 5, {}, {}, colour=False))
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", shown) and "é" in shown
