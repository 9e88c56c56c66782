"""The edition for students, without solutions, keys and bugs:

    python tutorials/edition.py FOLDER

FOLDER/1_assignment: sheet, stubs, a checker with cases instead of solutions, the scripts' headers
(which hold objectives), and the notebooks to be read, with what they printed and the results.
FOLDER/2_bug_lab: the scripts, which are the solutions, to be handed out when the assignment is in:
to train with one's own functions, to run the notebooks, and the bug lab with the runs that lie in
runs/ (figures.py makes them) and without the bugs.

In the notebooks the exercises' solutions are left out, and the sources of functions that the
assignment asks for. The scripts compute what is shown, so they run where these are.
"""

import ast
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
    "tests/tiny_policy.py", "tutorials/curves.py", "tutorials/assignment/README.md",
    "tutorials/assignment/student.py",
    "tutorials/assignment/sandbox.py", "tutorials/assignment/train.py",
    "tutorials/bug_lab/README.md", "tutorials/bug_lab/bugs.py", "tutorials/bug_lab/catches.py",
    "tutorials/bug_lab/lab.py", "tutorials/bug_lab/properties.py", "tutorials/helpers.py",
    "tutorials/mtp_heads.py", "tutorials/resets_theory.py", "tutorials/requirements.txt",
    "tutorials/README.md", "README.md",
)  # fmt: skip
RESULTS = (  # which the notebooks speak of, so beside them in both folders
    "README.md", "tables.md", "microscope.md", "microscope_cosines.csv",
    "credit.png", "curves.png", "flow.png", "microscope.png", "signs.png",
)  # fmt: skip
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
PARTLY = (
    "> From the whole repository. In this copy are the scripts, the notebooks, `train.py` of the "
    "assignment and the bug\n> lab; tests, adapters and what needs them are not.\n\n"
)
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


def instead(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"not there, or more than once: {old}"
    return text.replace(old, new)


def between(text: str, start: str, end: str, new: str) -> str:
    """The text with `new` in the place of what begins with `start`, up to `end`."""
    first = text.index(start)
    return text[:first] + new + text[text.index(end, first) :]


def sheet(text: str) -> str:
    """The students' README.md, for a folder of its own."""
    text = instead(text, "From the repository's root, with its requirements installed",
                   "In this folder, with torch installed")  # fmt: skip
    text = between(text, "```\npython -m pytest", "## Order, and what to read",
        "```\npython check.py\n```\n\nchecks `student.py`, where every function still raises "
        "`NotImplementedError`; another file with\n`python check.py PATH`. It says which cases are "
        "right, what was given and wanted in the others, and,\nas a question, the mistake that "
        "gives just your answers. Points are given by your instructor's grader,\nwhich has more "
        "cases. The scripts come when the assignment is in, with the bug lab.\n\n")  # fmt: skip
    text = instead(text, "Only when a task is done, read the project's version, and see where it "
                   "differs from yours.", "The project's version comes with the scripts: see then "
                   "where it differs from yours.")  # fmt: skip
    text = between(text, "The header of a script holds", "Which notebook comes before",
                   "The scripts' headers are in [headers.md](headers.md).\n")  # fmt: skip
    text = between(text, "## Your functions train", "## What the grader looks at", "")
    text = instead(text, "drawn from a seed (`--seed 1` draws others). You will be graded with\n  "
                   "one that you do not know.", "drawn from a seed, and is graded with other ones "
                   "than those here.")  # fmt: skip
    text = instead(text, "python -i tutorials/assignment/student.py", "python -i student.py")
    return instead(text, "](../README.md#one-order)", "](notebooks/README.md#one-order)")


def training(text: str) -> str:
    """What the sheet says of train.py, which is in the second folder."""
    start, end = text.index("## Your functions train"), text.index("## What the grader looks at")
    return text[start + 1 : end].rstrip() + "\n"


def headers() -> str:
    """What stands on top of the scripts, of which the sheet asks to read some."""
    parts = ["# The scripts' headers", "What stands on top of each script: its paper's objective, "
             "and how it departs from it."]  # fmt: skip
    for name in ("spo", "mpo", "reset_po"):
        tree = ast.parse((ROOT / f"{name}.py").read_text("utf-8"))
        parts += [f"## {name}.py", f"```\n{ast.get_docstring(tree)}\n```"]
    return "\n\n".join(parts) + "\n"


def lab_sheet(text: str) -> str:
    """The bug lab's README.md, where bugs are not there and their runs are."""
    text = between(text, "```\npython tutorials/bug_lab/lab.py --bug 3 --tiny", "A bug lies in",
        "```\npython tutorials/bug_lab/lab.py --bug 3 --tiny       both runs, healthy and with the "
        "bug\npython tutorials/bug_lab/lab.py --bug 0 --check      the properties of healthy code\n"
        "python tutorials/bug_lab/lab.py --test my_test.py    do your own tests hold on it?\n```\n\n"
        "The bugs are not in this copy: what they did is. The first command, `--tiny` always with "
        "it, sets the\nmetrics of the two runs that lie in `runs/lab-*` side by side: value in the "
        "first steps, a curve, value in\nthe last steps, and the lowest value of a single step, for "
        "a mean hides a sign. The two curves of a line\nshare one scale, and lines that are 0 in "
        "both runs are left out. `samples.txt` lies beside `metrics.csv`.\n\n")  # fmt: skip
    text = instead(text, "A bug lies in one function and is planted at run time: your files stay as "
                   "they are, so reading\n`git diff` will not help. Each has the script where it "
                   "shows and the flags it needs:", "A bug lies in one function. Each has the script "
                   "that was run, and the flags that it took to show it:")  # fmt: skip
    text = between(text, "`--script` runs another one", "## How to go about it", "")
    text = between(text, "4. **Check.**", "5. **Write**",
        "4. **Properties.** `properties.py` has facts about healthy code. Which of them would the "
        "bug break? Read\n   the healthy function and say which line would break it.\n")  # fmt: skip
    text = instead(text, "fails with the bug, and `--test` says so.", "fails with the bug: `--test` "
                   "tries the first here, your instructor the second.")  # fmt: skip
    return instead(text, "\n`KEY.md` is the instructor's: bug, symptom, and the test of the project "
                   "that catches it.\n", "")  # fmt: skip


def linked(text: str, folder: Path) -> str:
    """Links to what is not in the edition are left as words."""

    def kept(link: re.Match) -> str:
        path = link[2].partition("#")[0]
        return link[0] if ":" in path or (folder / path).exists() else link[1]

    return LINK.sub(kept, text)


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
    )


def build(folder: Path, runs: Path) -> None:
    first, second = folder / "1_assignment", folder / "2_bug_lab"
    first.mkdir(parents=True)
    for name in FIRST:
        shutil.copy(ROOT / "tutorials" / "assignment" / name, first / name)
    changes = {
        first / "README.md": sheet,
        first / "student.py": lambda text: instead(
            text, "python -m pytest tutorials/assignment", "python check.py"
        ),
        second / "tutorials" / "assignment" / "student.py": lambda text: instead(
            text, "python -m pytest tutorials/assignment", "python tutorials/assignment/train.py"
        ),
        second / "tutorials" / "assignment" / "README.md": training,
        second / "tutorials" / "bug_lab" / "README.md": lab_sheet,
        second / "README.md": lambda text: PARTLY + text,
        second / "tutorials" / "README.md": lambda text: PARTLY + text,
    }
    (first / "headers.md").write_text(headers(), "utf-8")
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        for to in (first / "notebooks", second / "tutorials"):
            to.mkdir(parents=True, exist_ok=True)
            (to / path.name).write_text(notebook(path.read_text("utf-8")), "utf-8")
    for name in RESULTS:
        for to in (first / "notebooks" / "results", second / "tutorials" / "results"):
            to.mkdir(exist_ok=True)
            shutil.copy(ROOT / "tutorials" / "results" / name, to / name)
    text = (ROOT / "tutorials" / "README.md").read_text("utf-8")
    (first / "notebooks" / "README.md").write_text(reading(text), "utf-8")
    (first / "cases.json").write_text(json.dumps(cases()) + "\n")
    for name in SECOND:
        (second / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, second / name)
    for path, change in changes.items():
        path.write_text(change(path.read_text("utf-8")), "utf-8")
    for path in folder.rglob("*.md"):
        path.write_text(linked(path.read_text("utf-8"), path.parent), "utf-8")
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
