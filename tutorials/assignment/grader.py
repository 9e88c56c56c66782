"""Grades a student's file, task by task: points, and the name of the mistake where it is a known
one. Used through pytest, see README.md; `grade` is all there is to it.

The file runs in processes that hold nothing of the project (sandbox.py), one a task, so that
neither an endless loop nor a crash takes the grader along. This process has the reference, the
cases and what they want; the cases are the hand-worked ones of tasks.py and some drawn from a seed.
"""

import ast
import csv
import difflib
import functools
import inspect
import random
import textwrap
from pathlib import Path
from typing import NamedTuple

import reference
import sandbox
import torch
from answers import DETACHED, calls, kind, same, short
from sandbox import Broken, Cheat, complaint, contents, own
from tasks import ANY, PARTS, TASKS, Case, Property, Task

import common
import mpo
import reset_po
import spo

torch.set_num_threads(1)  # on a server that others use too
DRAWN = 4  # cases drawn for each task
COPIED = 0.9  # as like to a function of the project as this, a student's is named
LONG = 60  # nodes of a function's code that nobody writes twice by chance


class Result(NamedTuple):
    name: str
    part: str
    points: float
    out_of: int
    message: str  # "" if all is well


# ------------------------------------------------------------------------------------ one task


def call(function, args: tuple):
    """The answer, or the exception."""
    try:
        return function(*args)
    except Cheat:
        raise
    except (Exception, SystemExit) as error:
        return error


def why(error: BaseException, function) -> str:
    if "does not require grad" in str(error):  # torch's words for it, from a check's backward
        return "has no gradient"
    return str(error) if isinstance(error, Broken) else complaint(error, function)


def check_case(function, case: Case) -> tuple[object, str]:
    """The student's answer to a case, and what is wrong with it."""
    args = own(case.args)
    answer = call(function, args)
    if isinstance(answer, BaseException):
        wrong = why(answer, function)
        return answer, f"{wrong}, not {kind(case.wanted)}" if wrong[:8] == "returns " else wrong
    if contents(args) != contents(case.args):
        return answer, "changes what it is given"
    if same(answer, case.wanted, case.wanted):
        return answer, ""
    try:
        return answer, f"is {short(answer)}, should be {short(case.wanted, True)}"
    except (TypeError, ValueError, RuntimeError):
        return answer, f"returns {type(answer).__name__}, not {kind(case.wanted)}"


def check_property(function, holds) -> str:
    try:
        return "" if holds(function) else "does not hold"
    except Cheat:
        raise
    except (Exception, SystemExit) as error:
        return why(error, function)


def known_mistake(task: Task, failed: list[Case], answers: dict[str, object]) -> str:
    """The question to ask: of the mistakes that give the student's answers to all cases that
    failed, the one that gives most of the others too."""
    found = []
    for question, wrong in task.mistakes:
        agrees = {
            case.says: same(answers[case.says], call(wrong, own(case.args)), case.wanted)
            for case in task.checks
            if isinstance(case, Case) and not isinstance(answers[case.says], BaseException)
        }
        if all(agrees.get(case.says) for case in failed):
            found.append((sum(agrees.values()), question))
    return max(found, key=lambda pair: pair[0])[1] if found else ""


def drawn(task: Task, seed: int) -> list[Case]:
    """Ordinary cases from a seed, with the reference's answers."""
    rng, cases = random.Random(f"{seed} {task.name}"), []
    for number in range(DRAWN):
        args = task.draw(rng)
        wanted = getattr(reference, task.name)(*own(args))
        if task.name == "scaled_eps":  # the one answer that is free outside the mask
            wanted = wanted.double().masked_fill(~args[0], ANY)
        cases.append(Case(f"drawn case {number + 1}", args, wanted))
    return cases


def gradient(function, args: tuple, at: int) -> torch.Tensor | None:
    """Of the (first) answer's sum, for argument number `at`."""
    x = args[at].clone().requires_grad_()
    answer = function(*args[:at], x, *args[at + 1 :])
    answer = answer[0] if isinstance(answer, tuple) else answer
    if not getattr(answer, "requires_grad", False):
        return None
    return torch.autograd.grad(answer.sum(), x, allow_unused=True)[0]


def check_gradient(task: Task, function, cases: list[Case]) -> str:
    """On the drawn cases that are right otherwise: what is wrong with the gradient."""
    for case in cases:
        try:
            given = gradient(function, own(case.args), task.gradient)
            wanted = gradient(getattr(reference, task.name), own(case.args), task.gradient)
        except (Broken, RuntimeError, TypeError, AttributeError) as error:
            return why(error, function)
        if given is None or not given.any() and wanted.any():
            return "has no gradient"
        if not same(given, wanted, wanted):
            return f"has the gradient {short(given)}, should have {short(wanted)}"
    return ""


def grade_task(task: Task, function, seed: int = 0) -> Result:
    """Half of the points for the first check, and then the other half in equal parts; of that, the
    share of the drawn cases that are right. No more than a third without the gradient."""
    wrongs, answers = {}, {}
    for check in task.checks:
        if isinstance(check, Case):
            answers[check.says], wrongs[check.says] = check_case(function, check)
        else:
            wrongs[check.says] = check_property(function, check.holds)
    if all(wrong == "not written yet" for wrong in wrongs.values()):
        return Result(task.name, task.part, 0.0, task.points, "not written yet")
    first, *others = [not wrong for wrong in wrongs.values()]
    cases = drawn(task, seed)
    on_drawn = [check_case(function, case)[1] for case in cases]
    right = [case for case, wrong in zip(cases, on_drawn) if not wrong]
    points = first * task.points * (0.5 + 0.5 * sum(others) / len(others))
    points *= len(right) / len(cases)
    if task.gradient is not None and right:
        wrongs["gradient on drawn cases"] = check_gradient(task, function, right)
    questions, lines = [], [f"{says}: {wrong}" for says, wrong in wrongs.items() if wrong]
    failed = [check for check in task.checks if wrongs[check.says]]
    if hand_worked := [check for check in failed if isinstance(check, Case)]:
        questions.append(known_mistake(task, hand_worked, answers))
    if first and "has no gradient" in wrongs.values():
        questions.append(DETACHED)
    if first and not right:
        questions.append("Are known answers written into the file? No drawn case is right.")
    if first:  # a question at the edge helps nobody whose ordinary case is wrong
        questions += [check.question for check in failed]
    if (first or not failed) and len(right) < len(cases):
        lines.append(next(f"{c.says}: {w}" for c, w in zip(cases, on_drawn) if w))
    flat = any(isinstance(check, Property) and check.gradient for check in failed)
    flat = flat or wrongs.get("gradient on drawn cases")
    if flat:
        points = min(points, task.points / 3)
    if lines:
        lines[:0] = filter(None, [next(filter(None, questions), "")])
    return Result(task.name, task.part, round(points, 2), task.points, "\n".join(lines))


# --------------------------------------------------------------------------------- the whole file


def grade(path, limit: int = 10, seed: int = 0) -> tuple[list[Result], str]:
    """A Result for each task of a file, and what there is to say of the whole file. limit: seconds
    for each task, see `sandbox.Process`. seed: of the drawn cases."""
    path = Path(path).resolve()
    try:
        source = path.read_bytes()
    except OSError:
        return nothing(f"the file does not import: there is no file {path}")
    tried, results = [], []
    try:
        with sandbox.Process(source, {}, limit) as student:
            trouble, has = student.started()
        tried += student.did
        if not trouble:
            for task in TASKS:
                lacking = [r.name for r in results if r.points < r.out_of]
                results.append(grade_apart(task, source, has, limit, seed, tried, lacking))
    except Cheat as error:
        tried.append((str(error), ""))
        trouble = "it was stopped"
    except Broken as error:
        trouble = str(error)
    if cheats := list(dict.fromkeys(filter(None, (cheat(*what) for what in tried)))):
        return nothing(f"0 points: the file {', '.join(cheats)}")
    if trouble:
        return nothing(f"the file does not import: {trouble}")
    notes = [f"{what} {of}" for what, of in dict.fromkeys(tried)]
    results, copied = without_copies(counted_once(results, source), copies(source))
    return results, "; ".join([*copied, *notes, *looks(source)])


def nothing(note: str) -> tuple[list[Result], str]:
    return [Result(t.name, t.part, 0.0, t.points, note) for t in TASKS], note


def cheat(what: str, of: str) -> str:
    """Why that is one, in words; empty for what may be an accident."""
    if what in ("reads", "writes"):  # elsewhere than in the project, it is refused and noted
        inside = Path(of).resolve().is_relative_to(Path(reference.__file__).parents[2])
        named = Path(of).name in [f"{name}.py" for name in sandbox.PROJECT]
        return f"{what} the project's {Path(of).name}" if inside or named else ""
    if what == "imports":
        return f"imports the project's own {of}"
    return f"{what} {of}".strip() if what != "opens a descriptor" else "writes to the grader's line"


def named(task: Task, result: Result) -> bool:
    """Is the mistake a known one?"""
    return result.message.split("\n")[0] in [question for question, _ in task.mistakes]


def grade_apart(task: Task, source: bytes, has, limit, seed, tried: list, lacking=()) -> Result:
    """In a process of its own; without all points once more, with the reference's version of the
    tasks before this one, for a mistake counts once. lacking: those that lack points themselves."""
    if task.name not in has:
        return Result(task.name, task.part, 0.0, task.points, "the file has no such function")
    best = graded_with([], task, source, limit, seed, tried)
    if best.points == task.points or best.message == "not written yet":
        return best
    before = [t.name for t in TASKS[: TASKS.index(task)]]
    again = graded_with(before, task, source, limit, seed, tried)
    if again.points < best.points:
        return best
    wrong = " and ".join(name for name in lacking if name in calls(source, task.name, before))
    if not wrong or not again.message:
        return again
    hint = f"A right {wrong} stood in the place of yours here: this is a mistake of its own."
    return again._replace(message=f"{again.message}\n{hint}")


def graded_with(earlier: list[str], task: Task, source: bytes, limit, seed, tried: list) -> Result:
    """With the reference's version of the `earlier` tasks."""
    versions = {name: functools.partial(getattr(reference, name)) for name in earlier}
    with sandbox.Process(source, versions, limit) as student:
        try:
            student.started()
            result = grade_task(task, student.function(task.name), seed)
        finally:
            tried += student.did
    if broken := student.broken:
        return Result(task.name, task.part, 0.0, task.points, broken)
    return result


def counted_once(results: list[Result], source: bytes) -> list[Result]:
    """The same named mistake in two tasks that call one helper of the student's costs points in the
    first of them only, and is said in the second."""
    names = {task.name for task in TASKS}
    charged, found = {}, []  # charged: by (question, helper), the task that it was counted in
    for task, result in zip(TASKS, results):
        question = result.message.split("\n")[0]
        helpers = calls(source, task.name, names) - names if named(task, result) else set()
        known = [helper for helper in sorted(helpers) if (question, helper) in charged]
        if known:
            first = charged[question, known[0]]
            told = f"{question}\nCounted in {first} already, for both call your {known[0]}."
            result = result._replace(points=float(result.out_of), message=told)
        for helper in helpers:
            charged.setdefault((question, helper), task.name)
        found.append(result)
    return found


# ------------------------------------------------------------------------------------------ copies


class Plain(ast.NodeTransformer):
    """A function without its docstring and annotations, and names in order of appearance."""

    def __init__(self):
        self.names = {}

    def short(self, name: str) -> str:
        return self.names.setdefault(name, f"n{len(self.names)}")

    def visit_Name(self, node):
        return ast.Name(self.short(node.id))

    def visit_Attribute(self, node):
        if isinstance(node.value, ast.Name) and node.value.id in sandbox.PROJECT:
            return ast.Name(self.short(node.attr))  # common.k3 is k3
        return self.generic_visit(node)

    def visit_arg(self, node):
        return ast.arg(self.short(node.arg))

    def visit_FunctionDef(self, node):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        args = self.visit(node.args)
        return ast.FunctionDef("f", args, [self.visit(x) for x in body], [])


def plain(node) -> list[str]:
    """The nodes of a function's code, in order, as words."""
    words = []
    for x in ast.walk(Plain().visit(node)):
        values = [getattr(x, field, None) for field in x._fields]
        values = [str(v) for v in values if isinstance(v, (str, int, float))]
        if not isinstance(x, (ast.Load, ast.Store)):
            words.append(" ".join([type(x).__name__, *values]))
    return words


@functools.cache
def projects() -> dict[str, list[str]]:
    """By name, the code of the functions that the tasks ask for, and of those that they call."""
    found = {}
    for module in (common, spo, mpo, reset_po):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
                found[name] = plain(tree.body[0])
    helpers = ("window_weights", "anchors", "step_of", "localise_surprise")
    return {name: found[name] for name in (*(t.name for t in TASKS), *helpers)}


def copies(source: bytes) -> list[tuple[str, str, float]]:
    """(the project's function, the file's, how like they are), where they are very like."""
    found = []
    try:
        nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
        codes = [(n.name, plain(n)) for n in nodes]
    except (SyntaxError, ValueError, RecursionError):
        return []
    for theirs, code in codes:
        for name, ours in projects().items():
            match = difflib.SequenceMatcher(None, ours, code, autojunk=False)
            if match.real_quick_ratio() >= COPIED and match.quick_ratio() >= COPIED:
                if (ratio := match.ratio()) >= COPIED:
                    found.append((name, theirs, 1.0 if ours == code else min(ratio, 0.99)))
    return found


def without_copies(results: list[Result], found) -> tuple[list[Result], list[str]]:
    """Exact copies of long functions get nothing; nor do those of short ones, which may be chance
    and are not named, once three long ones are there. Long ones that are very like are named."""
    exact = {name: theirs for name, theirs, ratio in found if ratio == 1}
    long = {name for name in exact if len(projects()[name]) >= LONG}
    guilty = {*exact} if len(long) >= 3 else long
    notes = [f"{t} is {r:.0%} like the project's {name}" for name, t, r in found if r < 1]
    if guilty:
        notes[:0] = [
            f"copies of the project's {', '.join(name for name in exact if name in guilty)}"
        ]
    blank = "a copy of the project's own function"
    kept = [r._replace(points=0.0, message=blank) if r.name in guilty else r for r in results]
    return kept, notes


def looks(source: bytes) -> list[str]:
    """What no formula needs and a person should look at, as it stands in the text."""
    words = "sys.modules __main__ _getframe settrace os._exit atexit __import__ importlib inspect"
    text = source.decode(errors="replace")
    found = [word for word in words.split() if word in text]
    return [f"speaks of {', '.join(found)}"] if found else []


def total(results: list[Result]) -> float:
    return round(sum(r.points for r in results), 1)


def table(results: list[Result]) -> str:
    lines = []
    for part in PARTS:
        rows = [r for r in results if r.part == part]
        lines.append(f"{part:<24}{total(rows):>6g} of {sum(r.out_of for r in rows):>3}")
        lines += [f"    {r.name:<20}{round(r.points, 1):>6g} of {r.out_of:>3}" for r in rows]
    return "\n".join([*lines, f"{'total':<24}{total(results):>6g} of {sum_of(results):>3}"])


def sum_of(results: list[Result]) -> int:
    return sum(r.out_of for r in results)


def append_csv(path: Path, file: Path, results: list[Result], note: str, seconds=None) -> None:
    """One row a file: its total, the points of each part and task, the note, and the time."""
    row = dict(file=str(file), total=total(results))
    row |= {part: total([r for r in results if r.part == part]) for part in PARTS}
    row |= {r.name: r.points for r in results} | dict(note=note)
    row |= {} if seconds is None else dict(seconds=round(seconds, 1))
    new = not path.exists() or not path.stat().st_size
    with open(path, "a", newline="") as out:
        writer = csv.DictWriter(out, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


assert ANY != ANY  # the sign for "anything" is nan, which `same` looks for
