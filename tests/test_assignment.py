"""The assignment's grader and the silent-bug lab, as student and instructor meet them."""

import configparser
import csv
import inspect
import re
import sys
import textwrap

import pytest

from conftest import ENV, ROOT

sys.path += [str(ROOT / "tutorials" / name) for name in ("assignment", "bug_lab")]

import bugs  # noqa: E402
import grader  # noqa: E402
import properties  # noqa: E402
import reference  # noqa: E402
from tasks import PARTS, TASKS, Case  # noqa: E402

STUDENT = ROOT / "tutorials" / "assignment" / "student.py"
REFERENCE = STUDENT.with_name("reference.py")
BY_NAME = {task.name: task for task in TASKS}


def test_the_stubs_get_nothing_and_are_told_so():
    results, note = grader.grade(STUDENT)
    assert grader.total(results) == 0 and not note
    assert {r.message for r in results} == {"not written yet"}


def test_the_reference_is_the_project_and_gets_all_points():
    results, note = grader.grade(REFERENCE)
    assert [(r.points, r.message) for r in results] == [(task.points, "") for task in TASKS]
    assert grader.total(results) == grader.sum_of(results) == 100
    assert note == "imports the project's own common, mpo, reset_po, spo"
    for task in TASKS:
        function = getattr(reference, task.name)
        assert function.__module__ in ("common", "spo", "mpo", "reset_po")


def test_stubs_have_the_projects_names_and_parameters():
    student = grader.load(STUDENT)
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
            o, cut = right.clipped_surrogate(logprobs - batch.old_logprobs, batch.advantages,
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
            beta = right.block_weights(block_size, weights).tolist()
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
            return right.scaled_eps(mask, cfg) ** 2 / cfg.clip_eps
    """),
    ("mpo_loss", "those of single tokens", """
        def mpo_loss(log_ratio, batch, normaliser, cfg):
            how = (cfg.block_size, cfg.layout, cfg.weights)
            blocks = right.block_log_ratio(log_ratio, batch.mask, *how)
            o, cut = right.clipped_surrogate(log_ratio, batch.advantages, cfg.clip_eps)
            return -o[batch.mask].sum() / normaliser, blocks, cut & batch.mask
    """),
    ("step_starts", "end token a step", """
        def step_starts(ids, tokenizer, delimiter="\\n", max_steps=20, stops=frozenset()):
            text = [tokenizer.decode([i]) for i in ids]
            starts = [0] + [t for t in range(1, len(ids)) if text[t - 1] == delimiter]
            ends = starts[1:] + [len(ids)]
            full = [s for s, e in zip(starts, ends) if "".join(text[s:e]).strip() or s == 0]
            return full[:max_steps]
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
                o, cut = right.clipped_surrogate(logprobs - batch.old_logprobs, batch.advantages,
                                                 clip_eps)
            return -o[batch.mask].mean(), cut
    """),
]  # fmt: skip


def submission(folder, source: str):
    file = folder / "mine.py"
    file.write_text("import torch\nimport reference as right\n\n" + textwrap.dedent(source))
    return file


@pytest.mark.parametrize("name, words, source", PLANTED, ids=[p[0] for p in PLANTED])
def test_the_mistake_of_a_students_file_is_named(tmp_path, name, words, source):
    file, task = submission(tmp_path, source), BY_NAME[name]
    result = grader.forked(lambda: grader.run_task(file, task), 10)
    assert words in result.message.split("\n")[0], result.message
    assert result.points < task.points


BROKEN = [
    ("def k3(x):\n  return 1 / 0", "ZeroDivisionError: division by zero (line 7 of the file)"),
    ("def k3(x):\n  while True: pass", "no answer within 1 s: an endless loop?"),
    ("import os\ndef k3(x):\n  os._exit(0)", "the process ended without an answer"),
    ("def k3(x):\n  exit()", "raises SystemExit"),
    ("def k3(x):\n  return helper(x)\ndef helper(x):\n  raise NotImplementedError",
     "needs helper, which is not written yet"),
    ("def k3(x):\n  return None", "returns NoneType, not a list or tensor"),
    ("def k3(x):\n  return 'x'", "returns str, not a list or tensor"),
    ("def k3(x):\n  return x.mul_(2)", "changes what it is given"),
    ("k4 = 0", "the file has no such function"),
]


@pytest.mark.parametrize("source, says", BROKEN)
def test_a_task_that_breaks_says_how_and_breaks_nothing_else(tmp_path, monkeypatch, source, says):
    good = "def masked_mean(x, mask, dim=None):\n  return right.masked_mean(x, mask, dim)\n"
    file = submission(tmp_path, good + source)
    monkeypatch.setattr(grader, "TASKS", [BY_NAME["k3"], BY_NAME["masked_mean"]])
    (broken, whole), note = grader.grade(file, limit=1)
    assert says in broken.message and broken.points == 0
    assert whole.points == whole.out_of


@pytest.mark.parametrize("source, says", [
    ("def k3(:", "line 4: SyntaxError"),
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


def test_points_are_for_the_ordinary_case_first_and_then_for_the_others():
    task = BY_NAME["masked_mean"]

    def careless(x, mask, dim=None):  # right but for the two cases in which the mask is empty
        return (x * mask).sum(dim) / mask.sum(dim)

    assert grader.grade_task(task, careless).points == round(3 * (0.5 + 0.5 / 3), 2)
    assert grader.grade_task(task, lambda x, mask, dim=None: x.sum() * 0).points == 0


def test_the_readmes_command_grades_a_file_and_writes_a_row(tmp_path):
    points = tmp_path / "points.csv"

    def graded(file) -> int:  # in a process of its own, with pytest imported already
        options = ["-p", "no:cacheprovider", "--rootdir", str(ROOT), "--csv", str(points)]
        folder = str(ROOT / "tutorials" / "assignment")
        return grader.forked(lambda: int(pytest.main([folder, "--file", str(file), *options])), 60)

    assert [graded(REFERENCE), graded(STUDENT)] == [0, 1]
    with open(points, newline="") as file:
        first, second = csv.DictReader(file)
    assert [*first] == ["file", "total", *PARTS, *BY_NAME, "note"]
    assert (first["total"], second["total"]) == ("100.0", "0.0")
    assert first["file"] == str(REFERENCE) and float(first["k3"]) == BY_NAME["k3"].points
    assert sum(float(first[part]) for part in PARTS) == 100


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
