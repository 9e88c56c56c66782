"""Checks your functions against cases.json: python check.py, or python check.py PATH.

In the edition for students, which has no solutions. Your instructor's grader knows more:
properties, values of gradients, other drawn cases, and a right version of your earlier functions.
"""

import json
import sys
from pathlib import Path

import sandbox
from answers import DETACHED, calls, kind, same, short

HERE = Path(__file__).resolve().parent
NO_GRADIENT = "is right, but has no gradient"


def wrong_with(student, name: str, args: tuple, wanted, trains: bool) -> tuple[object, str]:
    """The answer to a case, and what is wrong with it. trains: it should have a gradient."""
    try:
        answer = student.function(name)(*args)
    except sandbox.Broken as error:
        text = str(error)
        return None, f"{text}, not {kind(wanted)}" if text.startswith("returns ") else text
    if same(answer, wanted, wanted):
        value = answer[0] if isinstance(answer, tuple) else answer
        flat = trains and not getattr(value, "requires_grad", False)
        return answer, NO_GRADIENT if flat else ""
    try:
        return answer, f"is {short(answer)}, should be {short(wanted, True)}"
    except (TypeError, ValueError, RuntimeError):
        return answer, f"returns {type(answer).__name__}, not {kind(wanted)}"


def check(student, name: str, cases: list[dict]) -> tuple[int, list[str]]:
    """How many cases are right, and what is to be said of the others."""
    lines, possible = [], None
    for case in cases:
        args = sandbox.unpacked(case["args"], [])
        wanted = sandbox.unpacked(case["wanted"], [])
        answer, wrong = wrong_with(student, name, args, wanted, case["trains"])
        if wrong:
            lines.append(f"{case['says']}: {wrong}")
        if wrong and wrong != NO_GRADIENT:
            gives = {
                question
                for question, other in case["mistakes"]
                if answer is not None and same(answer, sandbox.unpacked(other, []), wanted)
            }
            possible = gives if possible is None else possible & gives
    if lines and all(line.endswith(": not written yet") for line in lines):
        return 0, ["not written yet"]
    questions = sorted(possible or [])[:1]
    if any(line.endswith(NO_GRADIENT) for line in lines):
        questions.append(DETACHED)
    return len(cases) - len(lines), [*questions, *lines]


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "student.py")
    if not path.is_file():
        sys.exit(f"there is no file {path}")
    tasks = json.loads((HERE / "cases.json").read_text())
    source, wrong = path.read_bytes(), []
    for name, cases in tasks.items():
        with sandbox.Process(source, {}, 10) as student:
            try:
                trouble, has = student.started()
                if trouble:
                    sys.exit(f"the file does not import: {trouble}")
                count, lines = 0, ["the file has no such function"]
                if name in has:
                    count, lines = check(student, name, cases)
            except (sandbox.Broken, sandbox.Cheat) as error:
                sys.exit(f"the file {error}")
        if count < len(cases):
            called = [other for other in wrong if other in calls(source, name, tasks)]
            lines += [
                f"it calls your {other}, which is not right: first mend that" for other in called
            ]
            wrong.append(name)
        print(f"{name}: {count} of {len(cases)} cases", *lines, sep="\n    ")
    print(f"{len(tasks) - len(wrong)} of {len(tasks)} functions are right in all cases")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
