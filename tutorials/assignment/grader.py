"""Grades a student's file, task by task: points, and the name of the mistake where it is a known
one. Used through pytest, see README.md; `grade` is all there is to it.

Each task runs in a forked process of its own, so that neither an endless loop nor a crash takes the
grader along.
"""

import ast
import csv
import importlib.util
import os
import pickle
import resource
import select
import signal
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from tasks import ANY, PARTS, TASKS, Case, Task

torch.set_num_threads(1)  # a forked process cannot use its parent's threads
PROJECT = ("common", "spo", "mpo", "reset_po", "reference", "tasks")  # not for a student to import


class Result(NamedTuple):
    name: str
    part: str
    points: float
    out_of: int
    message: str  # "" if all is well


# ------------------------------------------------------------------------------- comparing answers


def tensors(answer) -> list[torch.Tensor]:
    """An answer as double tensors: numbers, lists and tensors alike; a tuple has several."""
    parts = answer if isinstance(answer, tuple) else (answer,)
    return [torch.as_tensor(x).detach().to(torch.double) for x in parts]


def same(a, b, wanted) -> bool:
    """Is a the answer b? What is ANY in `wanted` does not matter."""
    try:
        a, b, wanted = tensors(a), tensors(b), tensors(wanted)
    except (TypeError, ValueError, RuntimeError):
        return False
    if [x.shape for x in a] != [x.shape for x in b]:
        return False
    for x, y, w in zip(a, b, wanted):
        kept = ~w.isnan() if w.shape == x.shape else ...
        if not torch.allclose(x[kept], y[kept], rtol=1e-5, atol=1e-5, equal_nan=True):
            return False
    return True


def short(x, wanted: bool = False) -> str:
    """An answer in a line; in one that is wanted, nan stands for anything."""
    values = [[round(v, 4) for v in t.flatten().tolist()] for t in tensors(x)]
    shapes = " and ".join(f"{tuple(t.shape)} {v}" for t, v in zip(tensors(x), values))
    shapes = shapes.replace("nan", "any") if wanted else shapes
    return shapes if len(shapes) < 200 else shapes[:200] + " ..."


def own(x):
    """A copy of what a student's function could change of an argument."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    if isinstance(x, tuple):
        return type(x)(*map(own, x)) if hasattr(x, "_fields") else tuple(map(own, x))
    return [own(y) for y in x] if isinstance(x, list) else x


def contents(x):
    """What that holds, to compare."""
    if isinstance(x, torch.Tensor):
        return x.tolist()
    return [contents(y) for y in x] if isinstance(x, (list, tuple)) else None


# ------------------------------------------------------------------------------------ one task


def call(function, args: tuple):
    """The answer, or the exception."""
    try:
        return function(*args)
    except (Exception, SystemExit) as error:
        return error


def complaint(error: BaseException, function) -> str:
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if isinstance(error, NotImplementedError):
        called = [f.name for f in frames if f.name != function.__name__]
        return f"needs {called[-1]}, which is not written yet" if called else "not written yet"
    where = f" (line {frames[-1].lineno} of the file)" if frames else ""
    return f"raises {type(error).__name__}: {error}{where}"


def check_case(function, case: Case) -> tuple[object, str]:
    """The student's answer to a case, and what is wrong with it."""
    args = own(case.args)
    answer = call(function, args)
    if isinstance(answer, BaseException):
        return answer, complaint(answer, function)
    if contents(args) != contents(case.args):
        return answer, "changes what it is given"
    if same(answer, case.wanted, case.wanted):
        return answer, ""
    try:
        return answer, f"is {short(answer)}, should be {short(case.wanted, True)}"
    except (TypeError, ValueError, RuntimeError):
        return answer, f"returns {type(answer).__name__}, not {kind(case.wanted)}"


def kind(wanted) -> str:
    if isinstance(wanted, tuple):
        return " and ".join(kind(x) for x in wanted)
    return "a list or tensor" if isinstance(wanted, list) else "a number"


def check_property(function, holds) -> str:
    try:
        return "" if holds(function) else "does not hold"
    except (Exception, SystemExit) as error:
        return complaint(error, function)


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


def grade_task(task: Task, function) -> Result:
    """Half of the points for the first check, and then the other half in equal parts."""
    wrongs, answers = {}, {}
    for check in task.checks:
        if isinstance(check, Case):
            answers[check.says], wrongs[check.says] = check_case(function, check)
        else:
            wrongs[check.says] = check_property(function, check.holds)
    first, *others = [not wrong for wrong in wrongs.values()]
    points = first * task.points * (0.5 + 0.5 * sum(others) / len(others))
    failed = [check for check in task.checks if wrongs[check.says]]
    cases = [check for check in failed if isinstance(check, Case)]
    message = "\n".join(f"{says}: {wrong}" for says, wrong in wrongs.items() if wrong)
    if all(wrong == "not written yet" for wrong in wrongs.values()):
        message = "not written yet"
    elif failed:
        known = known_mistake(task, cases, answers) if cases else ""
        questions = [known, *(check.question for check in failed)]
        message = f"{next(filter(None, questions), '')}\n{message}".strip()
    return Result(task.name, task.part, round(points, 2), task.points, message)


# --------------------------------------------------------------------------------- the whole file


def forked(work, limit: int):
    """work()'s result from a process of its own; a text if it ends otherwise or takes too long:
    `limit` seconds of computing, or six times as many by the clock, for it may be asleep."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setsid()  # what it starts in turn can be ended with it
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
            nowhere = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(nowhere, number)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(pickle.dumps(work()))
        finally:
            os._exit(0)
    os.close(writer)
    data, late, until = b"", False, time.monotonic() + 6 * limit
    while select.select([reader], [], [], max(0, until - time.monotonic()))[0]:
        if not (piece := os.read(reader, 1 << 16)):
            break
        data += piece
    else:
        late = True
    os.close(reader)
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it has ended
    _, status = os.waitpid(pid, 0)
    if late or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return f"no answer within {limit} s: an endless loop?"
    return pickle.loads(data) if data else "the process ended without an answer"


def load(path: Path):
    spec = importlib.util.spec_from_file_location("submission", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def try_import(path: Path) -> str:
    """Why the file does not import; empty if it does."""
    if not path.is_file():
        return f"there is no file {path}"
    try:
        load(path)
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError):
            return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
        return f"{type(error).__name__}: {error}"
    return ""


def borrowed(path: Path) -> list[str]:
    """The project's modules that the file imports."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (OSError, SyntaxError, ValueError):
        return []
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    return sorted(names & {*PROJECT})


def run_task(path: Path, task: Task) -> Result:
    function = getattr(load(path), task.name, None)
    if not callable(function):
        return Result(task.name, task.part, 0.0, task.points, "the file has no such function")
    return grade_task(task, function)


def grade(path, limit: int = 10) -> tuple[list[Result], str]:
    """A Result for each task of a file, and what there is to say of the whole file. limit: see
    `forked`, for each task."""
    path = Path(path).resolve()
    trouble = forked(lambda: try_import(path), limit)
    if trouble:
        trouble = f"the file does not import: {trouble}"
        return [Result(t.name, t.part, 0.0, t.points, trouble) for t in TASKS], trouble
    results = []
    for task in TASKS:
        result = forked(lambda: run_task(path, task), limit)
        if isinstance(result, str):
            result = Result(task.name, task.part, 0.0, task.points, result)
        results.append(result)
    names = borrowed(path)
    return results, f"imports the project's own {', '.join(names)}" if names else ""


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


def append_csv(path: Path, file: Path, results: list[Result], note: str) -> None:
    """One row a file: its total, the points of each part and task, and the note."""
    row = dict(file=str(file), total=total(results))
    row |= {part: total([r for r in results if r.part == part]) for part in PARTS}
    row |= {r.name: r.points for r in results} | dict(note=note)
    new = not path.exists() or not path.stat().st_size
    with open(path, "a", newline="") as out:
        writer = csv.DictWriter(out, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


assert ANY != ANY  # the sign for "anything" is nan, which `same` looks for
