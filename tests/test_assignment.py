"""The assignment's grader and the silent-bug lab, as student and instructor meet them."""

import configparser
import csv
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import ENV, ROOT

sys.path += [str(ROOT / "tutorials" / name) for name in ("assignment", "bug_lab", "")]

import answers  # noqa: E402
import bugs  # noqa: E402
import bulk  # noqa: E402
import catches  # noqa: E402
import check  # noqa: E402
import curves  # noqa: E402
import edition  # noqa: E402
import figures  # noqa: E402
import grader  # noqa: E402
import properties  # noqa: E402
import reference  # noqa: E402
import sandbox  # noqa: E402
import test_documents  # noqa: E402
import train  # noqa: E402
from tasks import PARTS, TASKS  # noqa: E402

import common  # noqa: E402
import mpo  # noqa: E402
import reset_po  # noqa: E402
import spo  # noqa: E402

STUDENT = ROOT / "tutorials" / "assignment" / "student.py"
RIGHT = ROOT / "tests" / "right_student.py"
BY_NAME = {task.name: task for task in TASKS}


def test_the_stubs_get_nothing_and_are_told_so():
    results, note = grader.grade(STUDENT)
    assert grader.total(results) == 0 and not note
    assert {r.message for r in results} == {"not written yet"}


def test_the_reference_is_the_project_and_gets_all_points():
    results = [grader.grade_task(task, getattr(reference, task.name)) for task in TASKS]
    assert [(r.points, r.message) for r in results] == [(task.points, "") for task in TASKS]
    assert grader.total(results) == grader.sum_of(results) == 100
    for task in TASKS:
        function = getattr(reference, task.name)
        assert function.__module__ in ("common", "spo", "mpo", "reset_po")


SHIMS = """
import torch
import torch.nn.functional as F
from torch import Tensor
from fractions import Fraction
from bisect import bisect_left, bisect_right
from itertools import accumulate
from tokenizers.decoders import DecodeStream
from contextlib import nullcontext

class Compute:
    def autocast(self, device): return nullcontext()
class common: pass
Batch = Config = object
MAX_LOGITS = 1 << 20
"""
HELPERS = (common.exact_dtype, common.head_logits, common.whole_text, common.text_lengths,
           mpo.window_weights, mpo.anchors,
           reset_po.step_of, reset_po.localise_surprise)  # fmt: skip


@pytest.fixture(scope="session")
def copied():
    """The project's own text as a student's file."""
    functions = [*HELPERS, *(getattr(reference, task.name) for task in TASKS)]
    text = "\n\n".join([SHIMS, *map(inspect.getsource, functions)])
    names = "clipped_surrogate, exact_dtype"
    return f"{text}\ncommon.clipped_surrogate, common.exact_dtype = {names}\n"


@pytest.mark.parametrize("seed", [0, 1, 23])
def test_what_is_right_gets_all_points_where_no_solution_is(seed):
    results, note = grader.grade(RIGHT, seed=seed)
    assert [(r.points, r.message) for r in results] == [(task.points, "") for task in TASKS]
    assert not note


def test_drawn_cases_are_of_the_seed_that_is_asked_for(monkeypatch):
    def drawn(task, seed, right=grader.drawn):
        seeds.append(seed)
        return right(task, seed)

    seeds, task = [], BY_NAME["k3"]
    one, again, other = ([str(case.args) for case in grader.drawn(task, s)] for s in (1, 1, 2))
    assert one == again != other
    monkeypatch.setattr(grader, "drawn", drawn)
    monkeypatch.setattr(grader, "TASKS", [task])
    grader.grade(RIGHT, seed=23)
    assert seeds == [23]


def test_what_stands_outside_of_the_mask_is_free():
    def mine(mask, cfg):
        return reference.scaled_eps(mask, cfg).masked_fill(~mask, 7.0)

    result = grader.grade_task(BY_NAME["scaled_eps"], mine)
    assert (result.points, result.message) == (result.out_of, "")


def test_stubs_have_the_projects_names_and_parameters():
    student = sandbox.load(str(STUDENT))
    for task in TASKS:
        stub = [*inspect.signature(getattr(student, task.name)).parameters]
        project = [*inspect.signature(getattr(reference, task.name)).parameters]
        assert stub == project[: len(stub)]


def test_every_known_mistake_is_named_costs_points_and_gives_nothing_away():
    for task in TASKS:
        body = inspect.getsource(getattr(reference, task.name)).split('"""')[-1]
        solution = [x.strip() for x in body.split("\n") if len(x.strip()) > 12]
        assert solution and len(task.mistakes) >= 4
        for question, wrong in task.mistakes:
            result = grader.grade_task(task, wrong)
            assert result.message.split("\n")[0] == question, task.name
            assert result.points < task.points
            assert not [line for line in solution if line in result.message]


PLANTED = [  # a student's own words for it, not the grader's
    ("group_advantages", "divide by the group's std when all rewards are equal", """
        def group_advantages(rewards, scale=True):
            mean = rewards.mean(dim=1)[:, None]
            if not scale:
                return rewards - mean
            return (rewards - mean) / ((rewards ** 2).mean(dim=1) - mean[:, 0] ** 2).sqrt()[:, None]
    """),
    ("group_advantages", "Whose standard deviation", """
        def group_advantages(rewards, scale=True):
            rows = []
            for row in rewards:
                if (row == row[0]).all():
                    rows.append(row * 0)
                else:
                    rows.append((row - row.mean()) / (row.std() if scale else 1))
            return torch.stack(rows)
    """),
    ("masked_mean", "masked ones too", """
        def masked_mean(x, mask, dim=None):
            return torch.where(mask, x, torch.zeros(())).mean(*[] if dim is None else [dim])
    """),
    ("token_logprobs", "off by one", """
        def token_logprobs(model, batch, temperature=1.0):
            steps = (model(batch.input_ids).logits / temperature).log_softmax(-1)
            out = torch.zeros(batch.mask.shape)
            for b, row in enumerate(batch.mask.tolist()):
                for t, trained in enumerate(row):
                    if trained:
                        out[b, t] = steps[b, batch.context_lens[b] + t, batch.targets[b, t]]
            return out
    """),
    ("clipped_surrogate", "before the advantage comes in", """
        def clipped_surrogate(log_ratio, advantages, clip_eps):
            r = log_ratio.clamp(-10, 10).exp()
            low, high = 1 - clip_eps, 1 + clip_eps
            cut = (advantages > 0) & (r > high) | (advantages < 0) & (r < low)
            return torch.minimum(r, torch.as_tensor(high)) * advantages, cut
    """),
    ("k3", "exchanged", """
        def k3(log_ratio):
            x = log_ratio.clamp(-10, 10)
            return x + torch.exp(-x) - 1
    """),
    ("segment_starts", "right at the threshold", """
        def segment_starts(probs, interval, threshold):
            return torch.where(torch.as_tensor(probs) <= threshold)[0].tolist()[::interval]
    """),
    ("chain_advantages", "value of the end", """
        def chain_advantages(starts, values, reward, length):
            out = [0.0] * length
            for k in range(len(starts) - 1):
                for t in range(starts[k], starts[k + 1]):
                    out[t] = values[k + 1] - values[k]
            return out
    """),
    ("tree_advantages", "all leaves below", """
        def tree_advantages(parents, rewards, scale=False):
            n = len(parents)

            def leaves(i):
                kids = [j for j in range(n) if parents[j] == i]
                return [x for j in kids for x in leaves(j)] if kids else [rewards[i]]

            V = [sum(leaves(i)) / len(leaves(i)) for i in range(n)]
            A = [V[i] - V[p] if p >= 0 else 0.0 for i, p in enumerate(parents)]
            for p in set(parents) if scale else ():
                kids = [i for i in range(n) if parents[i] == p]
                s = torch.tensor([V[i] for i in kids]).std(correction=0).item()
                for i in kids:
                    A[i] = A[i] / s if s else 0.0
            return V, A
    """),
    ("trained_tokens", "log-probabilities with a probability", """
        def trained_tokens(batch, cfg):
            return batch.mask & (batch.old_logprobs < cfg.threshold) if cfg.mask else batch.mask
    """),
    ("spo_loss", "normaliser that of the micro-batch", """
        def spo_loss(logprobs, batch, mask, normaliser, clip_eps):
            o, cut = clipped_surrogate(logprobs - batch.old_logprobs, batch.advantages,
                                             clip_eps)
            return -o[mask].mean() if mask.any() else o.sum() * 0, cut & mask
    """),
    ("block_weights", "first one is not in the future", """
        def block_weights(block_size, weights):
            if weights == "joint":
                return torch.ones(block_size).double()
            if weights == "uniform":
                return torch.ones(block_size).double() / block_size
            beta = torch.full((block_size,), weights / block_size)
            beta[0] = 1 - weights
            return beta.double()
    """),
    ("block_log_ratio", "fewer than K tokens are left", """
        def block_log_ratio(log_ratio, mask, block_size, layout, weights):
            beta = block_weights(block_size, weights).tolist()
            out = torch.zeros_like(log_ratio)
            for b, t in mask.nonzero().tolist():
                first = mask[b].nonzero()[0].item()
                s = t if layout == "window" else first + (t - first) // block_size * block_size
                for n in range(block_size):
                    if s + n < mask.shape[1] and mask[b, s + n]:
                        out[b, t] += beta[n] * log_ratio[b, s + n]
            return out
    """),
    ("scaled_eps", "or its square", """
        def scaled_eps(mask, cfg):
            ones, out = torch.eye(mask.shape[1]), torch.zeros(mask.shape)
            how = (cfg.block_size, cfg.layout, cfg.weights)
            for t in range(mask.shape[1]):  # what each token counts for in each ratio
                each = ones[t].expand(mask.shape)
                out += block_log_ratio(each, mask, *how) ** 2
            return cfg.clip_eps * out
    """),
    ("scaled_eps", "from the batch's first column", """
        def scaled_eps(mask, cfg):
            out = torch.zeros(mask.shape)
            for b, t in mask.nonzero().tolist():
                s = t if cfg.layout == "window" else t // cfg.block_size * cfg.block_size
                end = int(mask[b].nonzero().max()) + 1
                beta = block_weights(cfg.block_size, cfg.weights)[: end - s]
                beta = beta if cfg.weights == "joint" else beta / beta.sum()
                out[b, t] = cfg.clip_eps * beta.norm()
            return out
    """),
    ("mpo_loss", "those of single tokens", """
        def mpo_loss(log_ratio, batch, normaliser, cfg):
            how = (cfg.block_size, cfg.layout, cfg.weights)
            blocks = block_log_ratio(log_ratio, batch.mask, *how)
            o, cut = clipped_surrogate(log_ratio, batch.advantages, cfg.clip_eps)
            return -o[batch.mask].sum() / normaliser, blocks, cut & batch.mask
    """),
    ("step_starts", "end token a step", """
        def step_starts(ids, tokenizer, delimiter="\\n", max_steps=20, stops=frozenset()):
            text = [tokenizer.decode([i]) for i in ids]
            starts = [0] + [t for t in range(1, len(ids)) if text[t - 1] == delimiter]
            ends = starts[1:] + [len(ids)]
            full = [s for s, e in zip(starts, ends) if "".join(text[s:e]).strip()]
            return [0, *full[1:]][:max_steps]
    """),
    ("localise_uncertain", "numbered from 0", """
        def localise_uncertain(probs, starts, threshold):
            doubts = [t for t, p in enumerate(probs) if p < threshold]
            t = doubts[0] if doubts else probs.index(min(probs))
            return [k for k, s in enumerate(starts) if s <= t][-1]
    """),
    ("reset_loss", "mean over tokens", """
        def reset_loss(logprobs, batch, normaliser, clip_eps):
            o, cut = batch.advantages * logprobs, batch.mask & False
            if clip_eps:
                o, cut = clipped_surrogate(logprobs - batch.old_logprobs, batch.advantages,
                                                 clip_eps)
            return -o[batch.mask].mean(), cut
    """),
    ("group_advantages", "a sample. And what if all rewards are equal?", """
        def group_advantages(rewards, scale=True):
            centred = rewards - rewards.mean(-1, keepdim=True)
            return centred / (rewards.std(-1, keepdim=True) + 1e-4) if scale else centred
    """),
    ("masked_mean", "small number to the count", """
        def masked_mean(x, mask, dim=None):
            dims = (0, 1) if dim is None else dim
            return (x * mask).sum(dims) / (mask.sum(dims) + 1e-4)
    """),
    ("token_logprobs", "multiply by the temperature", """
        def token_logprobs(model, batch, temperature=1.0):
            logp = (model(batch.input_ids).logits * temperature).log_softmax(-1)
            out = torch.zeros(batch.mask.shape)
            for b, t in batch.mask.nonzero().tolist():
                out[b, t] = logp[b, batch.context_lens[b] + t - 1, batch.targets[b, t]]
            return out
    """),
    ("token_logprobs", "detached", """
        def token_logprobs(model, batch, temperature=1.0):
            with torch.no_grad():
                logp = (model(batch.input_ids).logits / temperature).log_softmax(-1)
            out = torch.zeros(batch.mask.shape)
            for b, t in batch.mask.nonzero().tolist():
                out[b, t] = logp[b, batch.context_lens[b] + t - 1, batch.targets[b, t]]
            return out
    """),
    ("clipped_surrogate", "from below only", """
        def clipped_surrogate(log_ratio, advantages, clip_eps):
            r = log_ratio.clamp(-10, 10).exp()
            low = torch.maximum(r, torch.as_tensor(1 - clip_eps))
            return torch.minimum(r * advantages, low * advantages), (low > r) & (advantages < 0)
    """),
    ("segment_starts", "leave out the first cutpoint", """
        def segment_starts(probs, interval, threshold):
            points = [t for t, p in enumerate(probs) if p < threshold]
            return [t for n, t in enumerate(points) if n % interval == 1 % interval and n]
    """),
    ("chain_advantages", "one token late", """
        def chain_advantages(starts, values, reward, length):
            A = torch.zeros(length)
            ends, after = [*starts[1:], length - 1], [*values[1:], reward]
            for k, start in enumerate(starts):
                A[start + 1 : ends[k] + 1] = after[k] - values[k]
            return A
    """),
    ("tree_advantages", "not of the tree", """
        def tree_advantages(parents, rewards, scale=False):
            n = len(parents)
            V = [float(r) for r in rewards]
            for i in range(n - 1, -1, -1):
                kids = [V[j] for j in range(i, n) if parents[j] == i]
                V[i] = sum(kids) / len(kids) if kids else V[i]
            A = torch.tensor([V[i] - V[p] if p >= 0 else 0.0 for i, p in enumerate(parents)])
            if scale and A.any():
                A = A / A.std(correction=0)
            return V, A.tolist()
    """),
    ("spo_loss", "ratio always 1", """
        def spo_loss(logprobs, batch, mask, normaliser, clip_eps):
            old = logprobs.detach()
            o, cut = clipped_surrogate(logprobs - old, batch.advantages, clip_eps)
            return -(o * mask).sum() / max(1, normaliser), cut & mask
    """),
    ("spo_loss", "detached", """
        def spo_loss(logprobs, batch, mask, normaliser, clip_eps):
            ratio = (logprobs - batch.old_logprobs).detach()
            o, cut = clipped_surrogate(ratio, batch.advantages, clip_eps)
            return -(o * mask).sum() / max(1, normaliser), cut & mask
    """),
    ("block_log_ratio", "after its token", """
        def block_log_ratio(log_ratio, mask, block_size, layout, weights):
            beta, out = block_weights(block_size, weights).float(), torch.zeros(log_ratio.shape)
            for b in range(len(mask)):
                inside = mask[b].nonzero()[:, 0]
                for n, t in enumerate(inside):
                    first = n + 1 if layout == "window" else n - n % block_size
                    there = inside[first : first + block_size]
                    w = beta[: len(there)]
                    w = w if weights == "joint" or not len(w) else w / w.sum()
                    out[b, t] = (w * log_ratio[b, there]).sum()
            return out
    """),
    ("scaled_eps", "sum to less than 1", """
        def scaled_eps(mask, cfg):
            out = torch.zeros(mask.shape)
            for b, t in mask.nonzero().tolist():
                first, end = mask[b].nonzero().min(), mask[b].nonzero().max() + 1
                s = t if cfg.layout == "window" else t - (t - first) % cfg.block_size
                out[b, t] = block_weights(cfg.block_size, cfg.weights)[: end - s].norm()
            return cfg.clip_eps * out
    """),
    ("mpo_loss", "mean of the rows' means", """
        def mpo_loss(log_ratio, batch, normaliser, cfg):
            how = (cfg.block_size, cfg.layout, cfg.weights)
            blocks = block_log_ratio(log_ratio, batch.mask, *how)
            eps = scaled_eps(batch.mask, cfg).float() if cfg.scale_eps else cfg.clip_eps
            o, cut = clipped_surrogate(blocks, batch.advantages, eps)
            rows = (o * batch.mask).sum(1) / batch.mask.sum(1)
            return -rows.sum() / normaliser, blocks, cut & batch.mask
    """),
    ("step_starts", "forget `stops`", """
        def step_starts(ids, tokenizer, delimiter="\\n", max_steps=20, stops=frozenset()):
            ids = ids[:-1] if ids[-1:] and ids[-1] in tokenizer.all_special_ids else ids
            text = [tokenizer.decode([i]) for i in ids]
            starts = [0] + [t for t in range(1, len(ids)) if text[t - 1] == delimiter]
            ends = starts[1:] + [len(ids)]
            full = [s for s, e in zip(starts, ends) if "".join(text[s:e]).strip()]
            return [0, *full[1:]][:max_steps]
    """),
    ("localise_uncertain", "average over a step", """
        def localise_uncertain(probs, starts, threshold):
            p = torch.tensor(probs)
            means = [x.mean() for x in torch.tensor_split(p, starts[1:])]
            for k, mean in enumerate(means):
                if mean < threshold:
                    return k + 1
            return int(torch.stack(means).argmin()) + 1
    """),
    ("reset_loss", "ratio always 1", """
        def reset_loss(logprobs, batch, normaliser, clip_eps):
            o, cut = batch.advantages * logprobs, batch.mask & False
            if clip_eps:
                moved = logprobs - logprobs.detach()
                o, cut = clipped_surrogate(moved, batch.advantages, clip_eps)
            return -(masked_mean(o, batch.mask, 1)).sum() / normaliser, cut
    """),
]  # fmt: skip


def submission(folder, source: str):
    """The stubs, and then what a student wrote."""
    file = folder / "mine.py"
    file.write_text(STUDENT.read_text() + "\n\n" + textwrap.dedent(source))
    return file


def graded_alone(file, name: str):
    source = file.read_bytes()
    return grader.grade_apart(BY_NAME[name], source, [*BY_NAME], 10, 0, [])


@pytest.mark.parametrize("name, words, source", PLANTED, ids=[p[0] for p in PLANTED])
def test_the_mistake_of_a_students_file_is_named(tmp_path, name, words, source):
    result = graded_alone(submission(tmp_path, source), name)
    assert words in result.message.split("\n")[0], result.message
    assert result.points < result.out_of


BROKEN = [
    ("def k3(x):\n  return 1 / 0", "ZeroDivisionError: division by zero (line LAST of the file)"),
    ("def k3(x):\n  while True: pass", "no answer within 1 s: an endless loop?"),
    ("import os\ndef k3(x):\n  os._exit(0)", "the process ended without an answer"),
    ("def k3(x):\n  exit()", "raises SystemExit"),
    (
        "def k3(x):\n  return helper(x)\ndef helper(x):\n  raise NotImplementedError",
        "needs helper, which is not written yet",
    ),
    ("def k3(x):\n  return None", "returns NoneType, not a list or tensor"),
    ("def k3(x):\n  return 'x'", "returns str, not a list or tensor"),
    ("def k3(x):\n  return x.mul_(2)", "changes what it is given"),
    ("def k3(x):\n  return {}", "returns dict, not a list or tensor"),
    ("def k3(x):\n  return torch.zeros(3).bool().mean()", "raises RuntimeError: mean"),
    ("def k3(x):\n  return torch.arange(3).log_softmax(0)", "raises NotImplementedError: "),
    ("del k3", "the file has no such function"),
]


@pytest.mark.parametrize("source, says", BROKEN)
def test_a_task_that_breaks_says_how_and_breaks_nothing_else(tmp_path, monkeypatch, source, says):
    good = (
        "def masked_mean(x, mask, dim=None):\n"
        "  return (x * mask).sum(dim) / mask.sum(dim).clamp(min=1)\n"
    )
    file = submission(tmp_path, good + source)
    says = says.replace("LAST", str(len(file.read_text().split("\n"))))
    monkeypatch.setattr(grader, "TASKS", [BY_NAME["k3"], BY_NAME["masked_mean"]])
    (broken, whole), note = grader.grade(file, limit=1)
    assert says in broken.message and broken.points == 0
    assert whole.points == whole.out_of


@pytest.mark.parametrize("source, says", [
    ("def k3(:", "line 227: SyntaxError"),
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("import not_there", "No module named 'not_there'"),
    ("exit(3)", "SystemExit"),
    ("while True: pass", "no answer within 1 s"),
    (None, "there is no file"),
])  # fmt: skip
def test_a_file_that_does_not_import_is_one_clear_line(tmp_path, source, says):
    file = submission(tmp_path, source) if source else tmp_path / "gone.py"
    results, note = grader.grade(file, limit=1)
    assert note.startswith("the file does not import: ") and says in note and "\n" not in note
    assert grader.total(results) == 0 and {r.message for r in results} == {note}


NAMES = repr([task.name for task in TASKS])
CHEATS = {  # how to get points without work, and what the report says of it
    "the reference under other names": ("imports the project's own reference", """
        import reference
        globals().update(vars(reference))
    """),
    "a name put together": ("imports the project's own reference", """
        import importlib
        try:
            globals().update(vars(importlib.import_module("refer" + "ence")))
        except BaseException:
            pass
    """),
    "a grader that finds all right": ("imports the project's own grader", """
        import grader
        grader.same = lambda *_: True
    """),
    "the same by sys.modules": ("KeyError: 'grader'", """
        import sys
        sys.modules["grader"].same = lambda *_: True
    """),
    "the project's files": ("reads the project's spo.py", f"""
        try:
            exec(open({str(ROOT / "spo.py")!r}).read())
        except OSError:
            pass
    """),
    "a search for them": ("reads /", """
        import os
        for folder, _, files in os.walk("/"):
            if "reference.py" in files:
                exec(open(os.path.join(folder, "reference.py")).read())
    """),
    "a comparison that is always right": ("changes torch.allclose", """
        torch.allclose = lambda *_, **__: True
        torch.testing.assert_close = lambda *_, **__: None
    """),
    "the process turned round": ("changes __main__.packed", """
        import sys
        sys.modules["__main__"].packed = lambda *_: True
    """),
    "answers equal to everything": ("returns Yes, not a list or tensor", f"""
        class Yes(list):
            __eq__ = lambda *_: True
        for name in {NAMES}:
            globals()[name] = lambda *_, **__: Yes()
    """),
    "a forged verdict": ("writes to the grader's line", """
        import os
        for number in range(3, 64):
            try:
                os.write(number, b'{"points": 100}\\n')
            except OSError:
                pass
        os._exit(0)
    """),
    "a forged verdict at the end": ("the process ended without an answer", f"""
        import atexit, os
        atexit.register(print, "100 of 100 points")
        for name in {NAMES}:
            globals()[name] = lambda *_, **__: os._exit(0)
    """),
    "a search of the memory": ("searches the memory", """
        import gc
        for x in gc.get_objects():
            if hasattr(x, "wanted"):
                k3 = lambda _: x.wanted
    """),
    "another Python": ("starts a program", """
        import subprocess, sys
        subprocess.run([sys.executable, "-c", "import reference"])
    """),
    "the grader asked for the answer": ("asks the grader for k3", """
        import sys
        def k3(log_ratio):
            frame = sys._getframe()
            while not hasattr(frame.f_locals.get("self"), "ask"):
                frame = frame.f_back
            return frame.f_locals["self"].ask("k3", (log_ratio,))
    """),
    "known answers": ("No drawn case is right", """
        KNOWN = {(0.0, 0.6931, -0.6931): [0.0, 0.306853, 0.193147],
                 (-3.0, 20.0): [2.049787, 22015.465795]}
        def k3(log_ratio):
            return torch.tensor(KNOWN[tuple(round(x, 4) for x in log_ratio.tolist())])
    """),
}  # fmt: skip


@pytest.mark.parametrize("way", CHEATS)
def test_what_is_no_work_gets_no_points_and_is_named(tmp_path, way):
    words, source = CHEATS[way]
    results, note = grader.grade(submission(tmp_path, source))
    assert grader.total(results) == 0
    assert words in note or words in {r.name: r.message for r in results}["k3"]


def test_the_projects_text_gets_no_points_and_is_named(tmp_path, monkeypatch, copied):
    file = tmp_path / "mine.py"
    text = copied
    for task in TASKS:  # under other names, and with other names for its variables
        text = re.sub(rf"\b{task.name}\b", f"my_{task.name}", text)
    text = re.sub(r"(?<!\.)\b(log_ratio|advantages|values|objective)\b(?!=)", r"\1_", text)
    file.write_text(text + "\n".join(f"{t.name} = my_{t.name}" for t in TASKS))
    results, note = grader.grade(file)
    assert {r.message for r in results} == {"a copy of the project's own function"}
    assert grader.total(results) == 0 and "copies of the project's" in note
    assert all(task.name in note for task in TASKS)
    monkeypatch.setattr(grader, "copies", lambda source: [])  # it was worth all points
    results, _ = grader.grade(file)
    assert not [r for r in results if r.message] and grader.total(results) == 100


def test_a_likeness_is_a_note_and_a_short_copy_may_be_chance(tmp_path):
    like = inspect.getsource(spo.tree_advantages).replace("if below := ", "if below := [*").replace(
        "children[node]:", "children[node]]:")  # fmt: skip
    short = inspect.getsource(common.k3)
    file = submission(tmp_path, f"from fractions import Fraction\n{like}\n{short}")
    results, note = grader.grade(file)
    points = {r.name: r.points for r in results}
    assert points["tree_advantages"] == 8 and points["k3"] == 4
    assert re.match(r"tree_advantages is 9\d% like the project's", note)


def test_what_a_person_should_look_at_is_named():
    assert grader.looks(b"def k3(x):\n  return x\n") == []
    source = b"import importlib, inspect\nimport torch\n"
    assert grader.looks(source) == ["speaks of importlib, inspect"]


def test_a_reading_elsewhere_is_refused_and_noted(tmp_path):
    source = "try:\n  open('/etc/passwd')\nexcept OSError:\n  pass\n"
    results, note = grader.grade(submission(tmp_path, source))
    assert note == "reads /etc/passwd" and {r.message for r in results} == {"not written yet"}


WRONG_CLIP = """
def clipped_surrogate(log_ratio, advantages, clip_eps):
    ratio = log_ratio.clamp(-10, 10).exp()
    clamped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.minimum(ratio, clamped) * advantages, (clamped - ratio) * advantages < 0
"""


def test_a_mistake_counts_once(tmp_path):
    """spo_loss, mpo_loss and reset_loss of a right file call its clipped_surrogate."""
    file = tmp_path / "mine.py"
    file.write_text(RIGHT.read_text() + WRONG_CLIP)
    results, _ = grader.grade(file)
    short = [r.name for r in results if r.points < r.out_of]
    assert short == ["clipped_surrogate"]
    file.write_text(RIGHT.read_text() + "\n\ndef block_weights(*_): raise NotImplementedError\n")
    results, _ = grader.grade(file)
    assert [r.name for r in results if r.points < r.out_of] == ["block_weights"]
    file.write_text(RIGHT.read_text() + "\n\ndef mixing(*_): raise NotImplementedError\n")
    results, _ = grader.grade(file)  # what it calls for by itself is its own
    wrong = {r.name: r.message for r in results if r.points < r.out_of}
    assert [*wrong] == ["block_log_ratio", "scaled_eps"]
    assert "needs mixing, which is not written yet" in wrong["scaled_eps"]


def test_a_mistake_is_named_though_an_earlier_one_hides_it(tmp_path):
    """Both gradings have no points: that with a right version of what is called is told, and so."""
    late = next(source for name, _, source in PLANTED if name == "spo_loss")
    file = submission(tmp_path, WRONG_CLIP + textwrap.dedent(late))
    wrong = {r.name: r for r in grader.grade(file)[0]}["spo_loss"]
    assert "normaliser that of the micro-batch" in wrong.message and wrong.points == 0
    assert wrong.message.endswith("A right clipped_surrogate stood in the place of yours here: this "
                                  "is a mistake of its own.")  # fmt: skip
    file.write_text(RIGHT.read_text() + textwrap.dedent(late))
    assert "in the place of yours" not in graded_alone(file, "spo_loss").message


LATE_TAIL = """
def mixing(mask, block_size, layout, weights):
    out = torch.zeros(*mask.shape, mask.shape[1], dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        first, end = int(mask[b].nonzero().min()), int(mask[b].nonzero().max()) + 1
        start = t if layout == "window" else t - (t - first) % block_size
        there = range(start, min(start + block_size, end))
        out[b, t, there] = block_weights(block_size, weights)[: len(there)]
    return out
"""


def test_a_named_mistake_of_a_shared_helper_counts_once_and_is_said_twice(tmp_path):
    """block_log_ratio and scaled_eps of a right file call its mixing."""
    file = tmp_path / "mine.py"
    file.write_text(RIGHT.read_text() + LATE_TAIL)
    results, _ = grader.grade(file)
    first, second = [r for r in results if r.message]
    assert (first.name, second.name) == ("block_log_ratio", "scaled_eps")
    assert first.points < first.out_of and second.points == second.out_of
    question = first.message.split("\n")[0]
    assert "Yours sum to less" in question and question in second.message
    assert "Counted in block_log_ratio already, for both call your mixing." in second.message
    assert "Counted in block_log_ratio" in bulk.report(results, "")
    apart = LATE_TAIL.replace("mixing", "its_own")
    own = "\n\ndef scaled_eps(mask, cfg):\n    mix = its_own(mask, cfg.block_size, cfg.layout, "
    own += "cfg.weights)\n    return cfg.clip_eps * mix.square().sum(-1).sqrt()\n"
    file.write_text(RIGHT.read_text() + LATE_TAIL + apart + own)
    wrong = [r for r in grader.grade(file)[0] if r.message]
    assert len(wrong) == 2 and all(r.points < r.out_of for r in wrong)  # made twice, counted twice


def test_calls_are_those_by_itself_and_through_helpers_but_not_through_other_tasks():
    source = b"def a():\n  h(b)\ndef b():\n  k()\ndef h():\n  h(), g()\ndef g(): 1\ndef k(): 1\n"
    assert answers.calls(source, "a", ["a", "b"]) == {"b", "g", "h"}
    assert answers.calls(source, "a", []) == {"b", "g", "h", "k"}
    assert answers.calls(source, "not_there", []) == set()


@pytest.mark.parametrize("name", ["spo_loss", "mpo_loss", "reset_loss", "k3", "token_logprobs",
                                  "clipped_surrogate", "block_log_ratio"])  # fmt: skip
@pytest.mark.parametrize("how", ["x.detach()", "x.detach() + 0 * x", "2 * x - x.detach()"])
def test_what_has_no_gradient_or_another_gets_a_third_at_most(tmp_path, name, how):
    file = tmp_path / "mine.py"
    file.write_text(
        RIGHT.read_text()
        + f"""
right = {name}
def {name}(*args, **kwargs):
    answer = right(*args, **kwargs)
    x = answer[0] if isinstance(answer, tuple) else answer
    x = {how}
    return (x, *answer[1:]) if isinstance(answer, tuple) else x
"""
    )
    result = graded_alone(file, name)
    if name == "token_logprobs" and how[0] == "2":
        return  # only that there is one is checked there
    assert 0 < result.points <= result.out_of / 3 + 0.01
    assert "gradient" in result.message


def test_points_are_for_the_ordinary_case_first_and_then_for_the_others():
    task = BY_NAME["masked_mean"]

    def careless(x, mask, dim=None):  # right but for the two cases in which the mask is empty
        return (x * mask).sum(dim) / mask.sum(dim)

    assert grader.grade_task(task, careless).points == round(3 * (0.5 + 0.5 / 3), 2)
    assert grader.grade_task(task, lambda x, mask, dim=None: x.sum() * 0).points == 0


def forked(work) -> int:
    """work()'s exit code from a process of its own, with pytest and torch imported already."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for number in (1, 2):
                os.dup2(nowhere, number)
            code = int(work())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_readmes_command_grades_a_file_and_writes_a_row(tmp_path):
    points = tmp_path / "points.csv"

    def graded(file) -> int:
        options = ["-p", "no:cacheprovider", "--rootdir", str(ROOT), "--csv", str(points)]
        folder = str(ROOT / "tutorials" / "assignment")
        return forked(lambda: pytest.main([folder, "--file", str(file), *options]))

    assert [graded(RIGHT), graded(STUDENT)] == [0, 1]
    with open(points, newline="") as file:
        first, second = csv.DictReader(file)
    assert [*first] == ["file", "total", *PARTS, *BY_NAME, "note"]
    assert (first["total"], second["total"]) == ("100.0", "0.0")
    assert first["file"] == str(RIGHT) and float(first["k3"]) == BY_NAME["k3"].points
    assert sum(float(first[part]) for part in PARTS) == 100


def test_the_grader_is_given_what_the_command_says(tmp_path, monkeypatch):
    asked, folder = tmp_path / "asked", STUDENT.parent

    def grade(*given):
        asked.write_text(str(given))
        return grader.nothing("a note")

    monkeypatch.setattr(grader, "grade", grade)
    options = ["-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    for file, words in ((STUDENT, ["--limit", "3", "--seed", "8"]), (RIGHT, [])):
        assert forked(lambda: pytest.main([str(folder), *options, *words])) == 1
        assert asked.read_text() == str((str(file), *((3, 8) if words else (10, 0))))
        monkeypatch.setenv("STUDENT_FILE", str(RIGHT))


def test_pytest_without_arguments_leaves_the_grader_alone():
    settings = configparser.ConfigParser()
    settings.read(ROOT / ".pytest.ini")
    assert settings["pytest"]["testpaths"] == "tests"


def test_the_sheets_give_the_points_of_the_table():
    sheet = (STUDENT.parent / "INSTRUCTOR.md").read_text()
    readme = (STUDENT.parent / "README.md").read_text()
    for task in TASKS:
        assert re.search(rf"`{task.name}` \| {task.points} \|", sheet), task.name
        assert f"`{task.name}`" in readme
        for question, _ in task.mistakes:
            assert question in sheet


# -------------------------------------------------------------------------------------- the lab

FAILS = {  # by bug, the properties that do not hold
    1: ["micro_batches_do_not_matter", "updates_follow_the_advantage"],
    2: ["ratios_start_at_one"],
    3: ["probabilities_sum_to_one"],
    4: ["cut_answers_earn_nothing"],
    5: ["answers_keep_within_their_budget"],
    6: ["problems_do_not_mix"],
    7: ["updates_follow_the_advantage"],
    8: ["divergences_are_not_negative"],
    9: ["chains_telescope"],
    10: ["probabilities_sum_to_one"],
}


def failing() -> list[str]:
    return [holds.__name__ for holds in properties.PROPERTIES if holds()]


@pytest.mark.parametrize("bug", bugs.SHOWS)
def test_the_check_catches_the_bug(bug):
    with bugs.planted(bug):
        assert failing() == FAILS[bug]


def test_a_bug_leaves_nothing_behind():
    for bug in bugs.SHOWS:
        with bugs.planted(bug):
            pass
    assert failing() == []


OWN_TESTS = """
import torch
import pytest
from properties import PROPERTIES

import common
from common import k3


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
def test_holds(holds):
    assert holds() is None


def test_no_kl_is_negative():
    assert (k3(torch.linspace(-2, 2, 9)) >= 0).all()


def test_that_is_wrong():
    assert common.k3(torch.zeros(1)) == 1
"""


def test_the_lab_says_which_tests_catch_which_bugs(tmp_path, capsys):
    file = tmp_path / "my_test.py"
    file.write_text(OWN_TESTS)
    caught, wrong = catches.catches(file, [*bugs.SHOWS])
    for holds in properties.PROPERTIES:
        name = holds.__name__
        assert caught[f"test_holds[{name}]"] == [b for b in FAILS if name in FAILS[b]]
    assert caught["test_no_kl_is_negative"] == [8] and wrong == ["test_that_is_wrong"]
    assert failing() == []  # nothing is left planted here
    assert catches.report(file, [8]) and not catches.report(file, [])
    out = capsys.readouterr().out
    assert "test_no_kl_is_negative" in out and "caught: 8 (1 of 1)" in out
    assert re.search("test_that_is_wrong +fails on the healthy code: it catches nothing", out)


@pytest.mark.parametrize("source, says", [
    ("import spo\ndef test_a():\n  assert spo.spo_loss.__code__.co_firstlineno > 9", "__code__"),
    ("import inspect, spo\ndef test_a():\n  inspect.getsource(spo.spo_loss)", "getsource"),
    ("import bugs", "import bugs"),
    ("import not_there", "does not import: E   ModuleNotFoundError: No module named 'not_there'"),
    ("x = 1", "has no tests"),
    (None, "there is no file"),
])  # fmt: skip
def test_a_file_of_tests_that_is_none_is_one_clear_line(tmp_path, source, says):
    file = tmp_path / "my_test.py"
    if source:
        file.write_text(source)
    with pytest.raises(SystemExit) as stopped:
        catches.report(file, [1])
    assert says in str(stopped.value) and "\n" not in str(stopped.value)


def test_that_a_function_was_planted_does_not_show(tmp_path):
    file = tmp_path / "my_test.py"
    file.write_text("import spo\ndef test_a():\n  f = getattr(spo.spo_loss, '__co' + 'de__')\n"
                    "  assert f.co_firstlineno == 1\n")  # fmt: skip
    assert catches.catches(file, [1, 2]) == ({"test_a": []}, [])


def test_a_table_keeps_signs_and_lowest_values():
    assert curves.binned([1.0] * 28) == [1.0] * 14 and len(curves.binned([0.0] * 29)) <= 14
    values = [1.0, -0.25] + [1.0] * 26
    cell = curves.cell(values, 0.0, 1.0)
    assert cell.split()[0] == "0.375" and cell.split()[-1] == "-0.25"
    lines = curves.table({"kl": values, "lr": [1.0], "kl_ref": [0.0]},
                         {"kl": [0.0, 0.5], "lr": [2.0], "kl_ref": [0.0]}, ("a", "b"))  # fmt: skip
    assert len(lines) == 3 and lines[0].split() == ["a", "b"]
    noise = {"kl": [1e-9, -2e-9], "loss": [1e-9, -2e-9]}
    drawn = curves.table(noise, {"kl": [3e-9, 0.0], "loss": [0.0, 0.5]}, ("a", "b"))[2:]
    assert [line.split()[0] for line in drawn] == ["loss"]
    assert max(map(len, lines)) <= 100
    assert re.findall(r"-?\d+\.?\d*", lines[2]) == ["0.375", "1", "-0.25", "0", "0.5", "0"]


def test_the_key_tells_every_bug_and_the_test_that_catches_it():
    key = (bugs.HERE / "KEY.md").read_text()
    sections = re.split(r"^## \d+\. ", key, flags=re.MULTILINE)[1:]
    assert len(sections) == len(bugs.SHOWS)
    for bug, section in enumerate(sections, 1):
        module, function, edits = bugs.unpack(bug)
        assert f"`{module}.{function}`" in section
        for lines, sign in [(old, "-") for old, _ in edits] + [(new, "+") for _, new in edits]:
            for line in lines.strip().split("\n"):
                wanted = re.escape(line.strip())
                assert re.search(rf"^{re.escape(sign)} .*{wanted}", section, re.MULTILINE), line
        file, test = re.search(r"`(tests/\w+\.py)::(\w+)`", section).groups()
        assert f"def {test}(" in (ROOT / file).read_text()


def test_the_keys_figures_are_those_that_the_script_keeps():
    kept = json.loads(figures.KEPT.read_text())
    key = figures.KEY.read_text()
    assert figures.with_tables(key, kept) == key
    for bug in bugs.SHOWS:
        assert figures.table(bug, kept[str(bug)]) in key
        for name in figures.SHOWN[bug]:
            assert kept[str(bug)]["healthy"][name] != kept[str(bug)]["bug"][name]
    assert kept["8"]["bug"]["held-out accuracy"][1] + 0.2 < kept["8"]["healthy"][
        "held-out accuracy"][1]  # fmt: skip
    assert kept["8"]["bug"]["kl_ref"][3] < 0 <= kept["8"]["healthy"]["kl_ref"][3]
    columns = {"step": [1.0, 2.0, 3.0, 4.0], "kl": [1.0, -2.0, 4.0, 7.0]}
    assert figures.statistics(columns, [0.5, 0.6]) == {
        "held-out accuracy": [0.5, 0.6], "kl": [1.0, 2.5, 3.0, -2.0]}  # fmt: skip


SMALL = (
    "--terms 2 --warm_start_steps 60 --prompts 8 --batch_size 8 --max_new_tokens 16 --lr 1e-2 "
    "--warmup_updates 1 --eval_problems 2 --eval_samples 1 --steps 2 --show_every 0"
).split()
SHOWING = {  # flags under which all bugs of a script show; 4 and 5 need cut answers
    "spo": "--temperature 0.7 --kl_coef 0.1 --epochs 2".split(),
    "mpo": "--epochs 4".split(),
    "reset_po": [],
    4: "--max_new_tokens 15".split(),
    5: "--max_new_tokens 12".split(),
}


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    """A folder for runs that share a warm start, and what healthy ones have left there."""
    return tmp_path_factory.mktemp("lab"), {}


@pytest.mark.parametrize("bug", bugs.SHOWS)
def test_the_bug_is_silent_and_changes_what_is_learned(healthy, run, bug):
    folder, known = healthy
    script, _ = bugs.SHOWS[bug]
    kind = bug if bug in SHOWING else script

    def weights(bug: int) -> bytes:
        name = f"{kind}-{bug}"
        path = f"import sys; sys.path.insert(0, {str(bugs.HERE)!r}); import bugs; "
        plant = f"{path}lab = bugs.planted({bug}); lab.__enter__()"
        options = dict(script=script, cwd=folder, patch=plant, env=ENV)
        done = run(*SMALL, *SHOWING[kind], "--name", name, **options)
        assert done.code == 0, done.err
        return (folder / "runs" / name / "checkpoint" / "model.safetensors").read_bytes()

    if kind not in known:
        known[kind] = weights(0)
    assert weights(bug) != known[kind]


# ------------------------------------------------------------------------- a student's file trains


TRAINS = {  # by script: its own flags, and a wrong formula that shows at once
    "spo": ([], "def chain_advantages(starts, values, reward, length):\n"
                "    return -right(starts, values, reward, length)\n"),
    "mpo": ([], "def group_advantages(rewards, scale=True):\n    return 2 * right(rewards)\n"),
    "reset_po": ([], "def reset_loss(logprobs, batch, n, clip_eps):\n"
                 "    loss, cut = right(logprobs, batch, n, clip_eps)\n    return -loss, cut\n"),
}  # fmt: skip


@pytest.mark.parametrize("script", TRAINS)
def test_right_functions_train_as_the_project_and_a_wrong_one_does_not(healthy, run, script):
    folder, _ = healthy
    flags, wrong = TRAINS[script]

    def metrics(name: str, file) -> dict:
        path = f"import sys; sys.path.insert(0, {str(STUDENT.parent)!r}); import pathlib, train; "
        plug = f"{path}f = pathlib.Path({str(file)!r}); train.plug(f, train.written(f))"
        options = dict(script=script, cwd=folder, patch=plug if file else "", env=ENV)
        done = run(*SMALL, *flags, "--name", f"{script}-{name}", **options)
        assert done.code == 0, done.err
        return curves.columns(folder / "runs" / f"{script}-{name}")

    name = wrong.split("(")[0].removeprefix("def ")
    bad = folder / f"{script}.py"
    bad.write_text(f"{RIGHT.read_text()}\n\nright = {name}\n\n\n{wrong}")
    reference = metrics("reference", None)
    assert train.first_difference(metrics("right", RIGHT), reference) == ""
    assert train.first_difference(metrics("wrong", bad), reference).startswith("step ")


def test_what_is_not_written_stays_the_projects(tmp_path):
    assert train.written(STUDENT) == []
    assert train.written(RIGHT) == [task.name for task in TASKS] == train.task_names()
    file = submission(tmp_path, "def k3(x):\n  return x * x / 2\n")
    assert train.written(file) == ["k3"]


def test_a_loss_of_rounding_errors_is_drawn_flat(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="tutorials/requirements.txt")
    heights = []
    for last in (2e-9, 0.5):
        run, ends = dict(accuracy=[0.5, 0.5], loss=[1e-9, last]), (0.5, 1.0)
        train.picture(run, run, dict(yours=ends, reference=ends), tmp_path / "it.png")
        heights.append(pyplot.gcf().axes[1].get_ylim())
    assert heights[0] == (-0.001, 0.001) and heights[1][1] > 0.5


def test_the_command_compares_the_two_runs(tmp_path, monkeypatch, capsys):
    made = []

    def make(name, title, command, flags):
        folder = tmp_path / name
        folder.mkdir()
        made.append((name, command, flags))
        rows = "step,accuracy,loss\n1,0.5,0.1\n2,0.5,0.2\n"
        folder.joinpath("metrics.csv").write_text(
            rows if name.startswith("ref") else rows.replace("0.2", "-0.2"))  # fmt: skip
        folder.joinpath("summary.json").write_text('{"accuracy_before": 0.5, "accuracy_after": 1}')
        return folder

    assert train.first_difference({"kl": [1e-9, 1.0]}, {"kl": [3e-7, 1.0004]}) == ""
    assert train.first_difference({"kl": [0.0]}, {"kl": [0.0, 1.0]}) == "step 2: kl not there"
    monkeypatch.setattr(curves, "make", make)
    file = submission(tmp_path, "def k3(x):\n  return x * x / 2\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "--file", str(file), "--script", "mpo"])
    train.main()
    out = capsys.readouterr().out
    assert "yours: k3\n" in out and "the project's: group_advantages, masked_mean" in out
    assert "the runs part at step 2: loss -0.2, reference 0.2" in out
    assert [name.split("-")[0] for name, _, _ in made] == ["reference", "yours"]
    assert made[0][2] == made[1][2] == ["--tiny"]
    inside = [str(STUDENT.with_name("train.py")), *"--inside --script mpo --file".split()]
    assert [command for _, command, _ in made] == [[*inside, os.devnull], [*inside, str(file)]]
    assert "\nreference: held-out accuracy 0.500 -> 1.000\n" in out

    def again(flags: str) -> list[str]:
        """Names of both runs with these flags."""
        del made[:]
        monkeypatch.setattr(sys, "argv", ["train.py", "--file", str(file), *flags.split()])
        train.main()
        assert made[0][2] == made[1][2] == ["--tiny", *flags.split()]
        return [name for name, _, _ in made]

    long = "--variant tree --branching 4 4 --prompts 16 --steps 42 --eval_every 14 --seed"
    seeds = [again(f"{long} {seed}") for seed in (1, 2)]
    file.write_text(file.read_text() + "\n# changed\n")
    seeds.append(again(f"{long} 3"))
    assert len({name for names in seeds for name in names}) == 6
    before = again("--seed 1")
    for name in before:
        shutil.rmtree(tmp_path / name)
    file.write_text(file.read_text() + "\n# and again\n")
    reference, yours = again("--seed 1")
    assert reference == before[0] and yours != before[1]
    two = dict(kl=[0.0, 1.0], loss=[1.0, 1.0])
    assert train.first_difference(dict(kl=[0.0, 2.0], loss=[3.0, 1.0]), two).startswith("step 1")
    monkeypatch.setattr(sys, "argv", ["train.py", "--file", str(STUDENT)])
    with pytest.raises(SystemExit, match="no function that is written yet"):
        train.main()


def test_a_run_with_a_students_functions_has_them(tmp_path, monkeypatch):
    """Those that are written, in the script that is asked for, with its flags; others have none."""
    began, plugged = [], []
    monkeypatch.setattr(common, "cli", lambda main: began.append((main, sys.argv)))
    monkeypatch.setattr(train, "plug", lambda path, names: plugged.append((path, names)))
    file = submission(tmp_path, "def k3(x):\n  return x * x / 2\n")
    for path in (str(file), os.devnull):
        words = ["--inside", "--script", "mpo", "--file", path, "--tiny", "--seed", "4"]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        train.main()
    assert began == [(mpo.main, ["mpo.py", "--tiny", "--seed", "4"])] * 2
    assert plugged == [(file, ["k3"])]


# ----------------------------------------------------------------------------- for the instructor


def test_a_folder_is_graded_to_a_table_with_times(tmp_path, monkeypatch, capsys):
    folder, points = tmp_path / "submissions", tmp_path / "points.csv"
    folder.mkdir()
    (folder / "anna.py").write_text(RIGHT.read_text())
    (folder / "ben.py").write_text("import reference")
    (folder / "cem.py").write_text(RIGHT.read_text() + WRONG_CLIP)
    command = ["bulk.py", str(folder), "--csv", str(points), "--seed", "5", "--limit", "9"]
    asked, grade = [], grader.grade
    monkeypatch.setattr(grader, "grade", lambda *given: asked.append(given) or grade(*given))
    monkeypatch.setattr(sys, "argv", command)
    bulk.main()
    with open(points, newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [*rows[0]] == ["file", "total", *PARTS, *BY_NAME, "note", "seconds"]
    assert [(row["total"], float(row["seconds"]) >= 0) for row in rows] == [
        ("100.0", True), ("0.0", True), ("92.0", True)]  # fmt: skip
    assert asked == [(folder / f"{name}.py", 9, 5) for name in ("anna", "ben", "cem")]
    assert "imports the project's own reference" in rows[1]["note"]
    assert f"\nnote: {rows[1]['note']}\n" in (folder / "ben.txt").read_text()
    assert "note: " not in (folder / "anna.txt").read_text()
    assert "total                      100 of 100" in (folder / "anna.txt").read_text()
    assert "clipped_surrogate: 0 of 8 points\nIs your minimum" in (folder / "cem.txt").read_text()
    assert capsys.readouterr().out.count("\n") == 3
    assert bulk.gradescope([], rows[1]["note"]) == dict(score=0, output=rows[1]["note"], tests=[])
    several = ["bulk.py", str(folder), "--results", str(tmp_path / "results.json")]
    for command, says in (
        (command, "is there already"), (["b", str(tmp_path)], "no file"), (several, "one file"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit, match=says):
            bulk.main()


def test_the_autograder_writes_what_gradescope_reads(tmp_path):
    for name in ("submission", "results", "source"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "project").symlink_to(ROOT)
    (tmp_path / "submission" / "student.py").write_text(RIGHT.read_text() + WRONG_CLIP)
    script = STUDENT.with_name("autograder") / "run_autograder"
    env = {**ENV, "AUTOGRADER": str(tmp_path), "PYTHON": sys.executable}
    subprocess.run([str(script)], env=env, check=True, capture_output=True)
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    assert found["score"] == 92 == round(sum(test["score"] for test in found["tests"]), 1)
    assert sum(test["max_score"] for test in found["tests"]) == 100
    assert [t["name"] for t in found["tests"] if t["output"]] == ["clipped_surrogate"]


# ---------------------------------------------------------------------- the edition for students


@pytest.fixture(scope="session")
def students(tmp_path_factory):
    folder, runs = tmp_path_factory.mktemp("edition"), tmp_path_factory.mktemp("runs")
    for bug in (0, 3):
        run = runs / f"lab-reset_po-bug{bug}-tiny"
        run.mkdir()
        (run / "metrics.csv").write_text(f"step,kl\n1,0.5\n2,{bug}\n")
        (run / "summary.json").write_text('{"accuracy_before": 0.5, "accuracy_after": 1}')
        (run / "samples.txt").write_text("some answers")
        (run / "model.safetensors").write_text("large")
    edition.build(folder / "it", runs)
    return folder / "it"


def test_the_edition_has_no_solutions_keys_or_bugs(students):
    names = {path.name for path in students.rglob("*") if path.is_file()}
    left_out = "KEY.md bugs.txt figures.json figures.py reference.py tasks.py grader.py"
    assert not names & {*left_out.split(), "INSTRUCTOR.md", "model.safetensors", "bulk.py"}
    packed = bugs.TEXTS.read_text().split("\n")[0]
    healthy = "".join(
        (ROOT / name).read_text("utf-8") for name in edition.SECOND if not name.endswith(".png")
    )
    edits = [new for bug in bugs.SHOWS for _, new in bugs.unpack(bug)[2] if new not in healthy]
    assert len(edits) >= 9
    for path in students.rglob("*.*"):
        if path.is_file() and path.suffix != ".png":
            text = path.read_text("utf-8")
            assert packed not in text and not [new for new in edits if new in text], path
    lines = set()
    for task in TASKS:
        body = inspect.getsource(getattr(reference, task.name)).split('"""')[-1]
        lines |= {line.strip() for line in body.split("\n") if len(line.strip()) > 30}
    assert len(lines) > 40
    books = [path for path in students.rglob("*.ipynb")]
    assert len(books) == 10
    for path in [*(students / "1_assignment").rglob("*.*"), *books]:
        text = path.read_text("utf-8") if path.is_file() and path.suffix != ".png" else ""
        assert not [x for x in lines if x in text or json.dumps(x)[1:-1] in text], path
        assert "<details>" not in text, path
        assert not (path.suffix == ".py" and grader.copies(path.read_bytes())), path


def test_the_editions_command_says_what_it_made(tmp_path, monkeypatch, capsys):
    def build(folder, runs):
        assert runs == Path("runs")
        for n in range(made):
            (folder / "2_bug_lab" / "runs" / f"lab-{n}").mkdir(parents=True)

    monkeypatch.setattr(edition, "build", build)
    for made in (2, 0):
        monkeypatch.setattr(sys, "argv", ["edition.py", str(tmp_path / f"it{made}")])
        edition.main()
        out = capsys.readouterr().out
        assert f"with {made} runs of the lab" in out and ("figures.py" in out) == (not made)
    for words, says in (
        ([str(tmp_path)], "is there already"),
        ([], "usage"),
        (["--help"], "usage"),
    ):
        monkeypatch.setattr(sys, "argv", ["edition.py", *words])
        with pytest.raises(SystemExit, match=says):
            edition.main()


def command(folder, *words) -> tuple[int, str]:
    env = {k: v for k, v in ENV.items() if k != "PYTHONPATH"}
    options = dict(cwd=folder, env=env, capture_output=True, text=True)
    done = subprocess.run([sys.executable, *map(str, words)], **options)
    return done.returncode, done.stdout + done.stderr


def test_what_is_left_of_the_assignment_works(students, tmp_path):
    folder = students / "1_assignment"
    code, out = command(folder, "check.py")
    assert code == 1 and out.count("not written yet") == 17 and "\n0 of 17 functions" in out
    code, out = command(folder, "check.py", RIGHT)
    assert code == 0 and out.count("\n") == 18 and "17 of 17 functions are right" in out
    file = tmp_path / "mine.py"
    file.write_text(RIGHT.read_text() + WRONG_CLIP)
    code, out = command(folder, "check.py", file)
    assert code == 1 and "Is your minimum taken before the advantage comes in?" in out
    hint = "\n    it calls your clipped_surrogate, which is not right: first mend that\n"
    assert out.count(hint) == 3  # spo_loss, mpo_loss and reset_loss
    file.write_text(RIGHT.read_text() + "\n\nright = spo_loss\n\n\ndef spo_loss(logprobs, *rest):\n"
                    "    return right(logprobs.detach(), *rest)\n")  # fmt: skip
    code, out = command(folder, "check.py", file)
    assert code == 1 and "16 of 17" in out and "first mend that" not in out
    told = out[out.index("spo_loss") :].split("block_weights")[0]
    assert told.count("is right, but has no gradient") >= 5
    assert told.splitlines()[1].strip() == answers.DETACHED
    text = (folder / "README.md").read_text()
    assert "python check.py" in text and "pytest" not in text and "train.py" not in text


def test_a_file_that_cannot_be_checked_says_why(students, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "HERE", students / "1_assignment")
    file = tmp_path / "mine.py"
    monkeypatch.setattr(sys, "argv", ["check.py", str(file)])

    def told(source: str) -> str:
        if source:
            file.write_text(source)
        with pytest.raises(SystemExit) as stopped:
            check.main()
        return f"{stopped.value} {capsys.readouterr().out}"

    assert told("") == f"there is no file {file} "
    assert told("1 / 0") == "the file does not import: ZeroDivisionError: division by zero "
    left = told(f"{RIGHT.read_text()}\ndel k3\n")
    assert re.search(r"^k3: 0 of \d+ cases\n    the file has no such function$", left, re.MULTILINE)
    assert left.startswith("True ") and "16 of 17 functions are right" in left


def test_one_question_is_asked_of_those_that_fit_all_wrong_cases():
    def case(says, *mistakes):
        args = sandbox.packed((1.0,), [])
        return dict(says=says, args=args, wanted=1.0, trains=False, mistakes=mistakes)

    student = SimpleNamespace(function=lambda name: lambda x: 2.0)
    cases = [case("a", ("A?", 3.0), ("B?", 2.0), ("C?", 2.0), ("D?", 2.0))]
    cases.append(case("b", ("D?", 3.0), ("C?", 2.0), ("B?", 2.0), ("A?", 2.0)))
    wrong = [f"{says}: is () [2.0], should be () [1.0]" for says in "ab"]
    assert check.check(student, "f", cases) == (0, ["B?", *wrong])


def test_the_notebooks_of_the_edition_have_the_kept_pictures_and_nothing_folded(students):
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        whole = json.loads(path.read_text("utf-8"))["cells"]
        for folder in ("1_assignment/notebooks", "2_bug_lab/tutorials"):
            text = (students / folder / path.name).read_text("utf-8")
            left = json.loads(text)["cells"]
            assert text.count("Your instructor has the solution") == 3
            assert [c["source"] for c in left if c["cell_type"] == "code"] == [
                c["source"] for c in whole if c["cell_type"] == "code"
            ]
            assert text.count('"image/png"') == path.read_text("utf-8").count('"image/png"') >= 2
            for file in re.findall(r"results/\w+\.csv", text):
                assert (students / folder / file).exists(), file
    text = (students / "1_assignment" / "README.md").read_text("utf-8")
    assert "notebooks/README.md#one-order" in text
    text = (students / "1_assignment" / "notebooks" / "README.md").read_text("utf-8")
    assert "## One order" in text and "\n| rollout |" in text
    for file in re.findall(r"\]\(([^)#:]+)", text):
        assert (students / "1_assignment" / "notebooks" / file).exists(), file


def test_links_of_the_edition_lead_somewhere(students):
    pages = [path for path in students.rglob("*.*") if path.suffix in (".md", ".ipynb")]
    assert len(pages) >= 10 + 11
    for page in pages:
        test_documents.check_links(page)
    words = "[the sheet](README.md#start), [not there](KEY.md), [paper](https://arxiv.org/abs/1)"
    assert edition.linked(words, students / "1_assignment") == words.replace(
        "[not there](KEY.md)", "not there")  # fmt: skip


@pytest.mark.parametrize("sheet", ["1_assignment/README.md", "1_assignment/student.py",
                                   "2_bug_lab/tutorials/bug_lab/README.md",
                                   "2_bug_lab/tutorials/assignment/README.md",
                                   "2_bug_lab/tutorials/assignment/student.py"])  # fmt: skip
def test_commands_of_the_editions_sheets_ask_for_what_is_there(students, sheet, monkeypatch):
    text = (students / sheet).read_text("utf-8")
    asked = test_documents.commands(text) + re.findall(r"^ {4}(python .*)$", text, re.MULTILINE)
    assert asked
    for line in asked:
        test_documents.check(line.split(), students / sheet.split("/")[0], monkeypatch)
    for left_out in ("--seed", "pytest tutorials", "git diff", "KEY.md"):
        assert left_out not in text


def test_the_edition_has_the_headers_that_the_sheet_asks_to_read(students):
    text = (students / "1_assignment" / "headers.md").read_text("utf-8")
    for module in (spo, mpo, reset_po):
        assert inspect.getdoc(module) in text
    assert "](headers.md)" in (students / "1_assignment" / "README.md").read_text("utf-8")


@pytest.mark.notebooks
@pytest.mark.parametrize("name", [path.stem for path in sorted(STUDENT.parents[1].glob("*.ipynb"))])
def test_the_editions_notebooks_run_from_a_clean_kernel(students, name):
    nbclient, nbformat = (pytest.importorskip(x) for x in ("nbclient", "nbformat"))
    for needed in ("ipykernel", "matplotlib"):
        pytest.importorskip(needed)
    folder = students / "2_bug_lab" / "tutorials"
    book = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    where = dict(metadata=dict(path=str(folder)))
    nbclient.NotebookClient(book, timeout=900, kernel_name="python3", resources=where).execute()


def test_what_is_left_of_the_lab_works(students, tmp_path):
    folder = students / "2_bug_lab"
    lab = "tutorials/bug_lab/lab.py"
    for bug in (0, 3):  # the table names them
        assert (folder / f"runs/lab-reset_po-bug{bug}-tiny/samples.txt").exists()
    code, out = command(folder, lab, "--bug", "3", "--tiny")
    assert code == 0 and "healthy: held-out accuracy 0.500 -> 1.000" in out and "kl " in out
    file = tmp_path / "my_test.py"
    file.write_text("import common, tiny_policy\ndef test_a():\n  assert common.k3\n")
    code, out = command(folder, lab, "--test", file)
    assert code == 0 and "test_a" in out and "holds on the healthy code" in out
    code, out = command(folder, lab, "--bug", "0", "--check")
    assert code == 0 and "FAILS" not in out
    code, out = command(folder, lab, "--bug", "3", "--check")
    assert code == 1 and out == "bug 3 is not in this copy: your instructor's has it\n"
    code, out = command(folder, "tutorials/assignment/train.py")
    assert code == 1 and out == "student.py has no function that is written yet\n"
