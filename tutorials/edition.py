"""The edition for students, without solutions, keys and bugs:

    python tutorials/edition.py FOLDER

FOLDER/1_assignment: sheet, stubs, a checker with cases instead of solutions, and the notebooks to
be read, with what they printed.
FOLDER/2_bug_lab: the scripts, which are the solutions, to be handed out when the assignment is in:
to train with one's own functions, to run the notebooks, and the bug lab with the runs that lie in
runs/ (figures.py makes them) and without the bugs.

In the notebooks the exercises' solutions are left out, and the sources of functions that the
assignment asks for. The scripts compute what is shown, so they run where these are.
"""

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tutorials" / "assignment"), str(ROOT)]

FIRST = ("README.md", "student.py", "sandbox.py", "answers.py", "check.py")
SECOND = (
    "common.py", "spo.py", "mpo.py", "reset_po.py", "requirements.txt", "LICENSE",
    "tests/tiny_policy.py", "tutorials/curves.py", "tutorials/assignment/student.py",
    "tutorials/assignment/sandbox.py", "tutorials/assignment/train.py",
    "tutorials/bug_lab/README.md", "tutorials/bug_lab/bugs.py", "tutorials/bug_lab/catches.py",
    "tutorials/bug_lab/lab.py", "tutorials/bug_lab/properties.py", "tutorials/helpers.py",
    "tutorials/mtp_heads.py", "tutorials/resets_theory.py", "tutorials/requirements.txt",
    "tutorials/README.md", "README.md", "tutorials/results/README.md", "tutorials/results/tables.md",
    "tutorials/results/credit.png", "tutorials/results/curves.png", "tutorials/results/flow.png",
    "tutorials/results/microscope.md", "tutorials/results/signs.png",
)  # fmt: skip
SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?</details>", re.DOTALL)
RUN = ("metrics.csv", "summary.json", "samples.txt")


def cases() -> dict:
    """By task its cases: arguments, the answer, whether it has a gradient, and what each known
    mistake would give."""
    import grader
    import reference
    from sandbox import own, packed
    from tasks import TASKS, Case

    found = {}
    for task in TASKS:
        right = getattr(reference, task.name)
        known = [check for check in task.checks if isinstance(check, Case)]
        found[task.name] = []
        for case in [*known, *grader.drawn(task, 0)]:
            others = []
            for question, wrong in task.mistakes:
                answer = grader.call(wrong, own(case.args))
                if not isinstance(answer, Exception) and not grader.same(
                    answer, case.wanted, case.wanted
                ):
                    others.append((question, packed(answer, [])))
            assert grader.same(right(*own(case.args)), case.wanted, case.wanted)
            args = own(case.args)
            trains = task.name == "token_logprobs"  # whose gradient is the policy's, args[0]
            if task.gradient is not None:
                slope = grader.gradient(right, args, task.gradient)
                args[task.gradient].requires_grad_()  # so packed, for check.py
                trains = slope is not None and bool(slope.any())
            row = dict(says=case.says, args=packed(args, []), wanted=packed(case.wanted, []))
            found[task.name].append(row | dict(trains=trains, mistakes=others))
    return found


def sheet(text: str) -> str:
    """The students' README.md, for a folder of its own."""
    start, end = text.index("```\npython -m pytest"), text.index("## Order, and what to read")
    train, look = text.index("## Your functions train"), text.index("## What the grader looks at")
    return (
        text[:start].replace("From the repository's root, with its requirements installed",
                             "In this folder, with torch installed")
        + "```\npython check.py\n```\n\nchecks `student.py`, where every function still raises "
        "`NotImplementedError`; another file with\n`python check.py PATH`. It says which cases are "
        "right, what was given and wanted in the others, and,\nas a question, the mistake that "
        "gives just your answers. Points are given by your instructor's grader.\nThe scripts come "
        "when the assignment is in, with the bug lab.\n\n"
        + text[end:train] + text[look:]
    ).replace("](../README.md#one-order)", "](notebooks/README.md#one-order)")  # fmt: skip


def notebook(text: str) -> str:
    """A notebook without solutions and without the sources that the assignment asks for."""
    book = json.loads(text)
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown":
            prose = SOLUTION.sub("*Your instructor has the solution.*", "".join(cell["source"]))
            cell["source"] = prose.splitlines(keepends=True)
            continue
        for output in cell["outputs"]:  # helpers.source_text folds what the assignment asks for
            if "".join(output.get("data", {}).get("text/markdown", "")).startswith("<details>"):
                output["data"] = {"text/markdown": "*The assignment asks for this function.*"}
    return json.dumps(book, ensure_ascii=False, indent=1) + "\n"


def reading(text: str) -> str:
    """README.md of the notebooks that are read beside the assignment: order and glossary."""
    order, words = (text[text.index(f"## {name}") :].split("\n## ")[0].rstrip()
                    for name in ("One order", "Words"))  # fmt: skip
    order = order[: order.index("\n\nSo each notebook")].replace("](assignment)", "](../README.md)")
    return (
        "# Notebooks, to be read\n\nWith what they printed. To run them takes the scripts, which "
        "come with the bug lab when the\nassignment is in. Sources that it asks for are left out "
        f"till then.\n\n{order}\n\n{words}\n"
    ).replace("](bug_lab)", "](../README.md)")


def build(folder: Path, runs: Path) -> None:
    first, second = folder / "1_assignment", folder / "2_bug_lab"
    first.mkdir(parents=True)
    for name in FIRST:
        shutil.copy(ROOT / "tutorials" / "assignment" / name, first / name)
    readme = first / "README.md"
    readme.write_text(sheet(readme.read_text()))
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        for to in (first / "notebooks", second / "tutorials"):
            to.mkdir(parents=True, exist_ok=True)
            (to / path.name).write_text(notebook(path.read_text("utf-8")), "utf-8")
    text = (ROOT / "tutorials" / "README.md").read_text("utf-8")
    (first / "notebooks" / "README.md").write_text(reading(text), "utf-8")
    (first / "cases.json").write_text(json.dumps(cases()) + "\n")
    for name in SECOND:
        (second / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, second / name)
    for run in sorted(runs.glob("lab-*")):
        to = second / "runs" / run.name
        to.mkdir(parents=True)
        for name in RUN:
            if (run / name).exists():
                shutil.copy(run / name, to / name)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python tutorials/edition.py FOLDER")
    folder = Path(sys.argv[1])
    if folder.exists():
        sys.exit(f"{folder} is there already")
    build(folder, Path("runs"))
    count = len([*folder.glob("2_bug_lab/runs/lab-*")])
    print(f"{folder}: 1_assignment with notebooks to read, 2_bug_lab with {count} runs of the lab")
    if not count:
        print(
            "without runs the lab cannot be done: first make them, python tutorials/bug_lab/figures.py"
        )


if __name__ == "__main__":
    main()
