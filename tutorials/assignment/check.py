"""Checks your functions against cases.json: python check.py, or python check.py PATH.

In the edition for students, which has no solutions. Your instructor's grader knows more:
properties, gradients, other drawn cases, and a right version of your earlier functions.
"""

import json
import sys
from pathlib import Path

import sandbox
from answers import kind, same, short

HERE = Path(__file__).resolve().parent


def wrong_with(student, name: str, args: tuple, wanted) -> tuple[object, str]:
    """The answer to a case, and what is wrong with it."""
    try:
        answer = student.function(name)(*args)
    except sandbox.Broken as error:
        text = str(error)
        return None, f"{text}, not {kind(wanted)}" if text.startswith("returns ") else text
    if same(answer, wanted, wanted):
        return answer, ""
    try:
        return answer, f"is {short(answer)}, should be {short(wanted, True)}"
    except (TypeError, ValueError, RuntimeError):
        return answer, f"returns {type(answer).__name__}, not {kind(wanted)}"


def check(student, name: str, cases: list[dict]) -> tuple[int, list[str]]:
    """How many cases are right, and what is to be said of the others."""
    lines, possible = [], None
    for case in cases:
        args, wanted = (sandbox.unpacked(case[key], []) for key in ("args", "wanted"))
        answer, wrong = wrong_with(student, name, args, wanted)
        if wrong:
            lines.append(f"{case['says']}: {wrong}")
            gives = {
                question
                for question, other in case["mistakes"]
                if answer is not None and same(answer, sandbox.unpacked(other, []), wanted)
            }
            possible = gives if possible is None else possible & gives
    if lines and all(line.endswith(": not written yet") for line in lines):
        return 0, ["not written yet"]
    return len(cases) - len(lines), [*sorted(possible or [])[:1], *lines]


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "student.py")
    if not path.is_file():
        sys.exit(f"there is no file {path}")
    tasks = json.loads((HERE / "cases.json").read_text())
    right = 0
    for name, cases in tasks.items():
        with sandbox.Process(path.read_bytes(), {}, 10) as student:
            try:
                trouble, has = student.started()
                if trouble:
                    sys.exit(f"the file does not import: {trouble}")
                count, lines = 0, ["the file has no such function"]
                if name in has:
                    count, lines = check(student, name, cases)
            except (sandbox.Broken, sandbox.Cheat) as error:
                sys.exit(f"the file {error}")
        right += count == len(cases)
        print(f"{name}: {count} of {len(cases)} cases", *lines, sep="\n    ")
    print(f"{right} of {len(tasks)} functions are right in all cases")
    sys.exit(right < len(tasks))


if __name__ == "__main__":
    main()
