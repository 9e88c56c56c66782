"""Trains with your functions: a script's --tiny run with them in the place of the project's, and
the project's own run beside it.

    python tutorials/assignment/train.py                     spo.py, with student.py
    python tutorials/assignment/train.py --script mpo --file PATH

What you have not written yet stays the project's. Both runs draw the same problems with the same
seed, so right functions give the reference's curves, but for rounding. A picture too, where
matplotlib is installed. Other flags are handed to the script, for both runs (--variant tree).
"""

import argparse
import ast
import hashlib
import importlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

import curves  # noqa: E402

SCRIPTS = ("spo", "mpo", "reset_po")
ALIKE = 1e-3  # metrics are the same up to that, relative to their column's largest (or 0.001)


def task_names() -> list[str]:
    """The functions of the assignment, in its order; a student's helpers beside them are none."""

    def functions(path: Path) -> list[str]:
        body = ast.parse(path.read_text("utf-8")).body
        return [node.name for node in body if isinstance(node, ast.FunctionDef)]

    project = {name for s in ("common", *SCRIPTS) for name in functions(ROOT / f"{s}.py")}
    return [name for name in functions(HERE / "student.py") if name in project]


def written(path: Path) -> list[str]:
    """Those of a file that do more than raise NotImplementedError."""
    try:
        body = ast.parse(path.read_text()).body
    except (OSError, SyntaxError, ValueError) as error:
        sys.exit(f"{path} cannot be read: {error}")
    names = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            names[node.name] = "NotImplementedError" not in ast.unparse(node.body[-1])
        elif isinstance(node, ast.Assign):
            names |= {t.id: True for t in node.targets if isinstance(t, ast.Name)}
    return [name for name in task_names() if names.get(name)]


def plug(path: Path, names: list[str]) -> None:
    """The file's functions into the project's modules, under their names."""
    from sandbox import complaint, load

    modules = [importlib.import_module(name) for name in ("common", *SCRIPTS)]
    try:
        student = load(str(path))
    except Exception as error:
        sys.exit(f"{path} does not import: {type(error).__name__}: {error}")
    for name in names:
        theirs = getattr(student, name)
        projects = next(vars(m)[name] for m in modules if name in vars(m))

        def function(*args, _name=name, _theirs=theirs, _projects=projects, **kwargs):
            more = ("compute", "with_entropy", "length")  # what only the project's functions take
            extra = {key: kwargs.pop(key) for key in more if key in kwargs}
            if _name == "block_weights" and len(args) > 2:
                *args, extra["length"] = args
            try:
                answer = _theirs(*args, **kwargs)
            except Exception as error:
                sys.exit(f"your {_name} {complaint(error, _theirs)}")
            if extra.get("with_entropy"):  # the project's token_logprobs measures that too
                return answer, _projects(*args, **kwargs, **extra)[1].detach()
            return answer[: extra["length"]] if extra.get("length") else answer

        for module in modules:
            if name in vars(module):
                setattr(module, name, function)


def inside(script: str, path: Path, flags: list[str]) -> None:
    """The script itself, with the file's functions in it."""
    import common

    if names := written(path):
        plug(path, names)
    sys.argv = [f"{script}.py", *flags]
    common.cli(importlib.import_module(script).main)


def first_difference(yours: dict, reference: dict) -> str:
    """Where the runs part, in words; empty if they do not."""
    found = []
    for key, wanted in reference.items():
        if key in ("step", "seconds"):
            continue
        given, size = yours.get(key, []), max([0.001, *map(abs, wanted)])
        steps = range(max(len(given), len(wanted)))
        here = lambda t: t < min(len(given), len(wanted))  # noqa: E731
        parts = [t for t in steps if not here(t) or not abs(given[t] - wanted[t]) <= ALIKE * size]
        if parts:
            t = parts[0]
            values = f"{given[t]:.4g}, reference {wanted[t]:.4g}" if here(t) else "not there"
            found.append((t, f"step {t + 1}: {key} {values}"))
    return min(found)[1] if found else ""


def picture(yours: dict, reference: dict, accuracies: dict, path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels = dict(accuracy="share of right sampled answers", loss="loss (its size says little)")
    lines = dict(reference=dict(color="silver", lw=4), yours=dict(color="black", ls="--"))
    for axis, (key, label) in zip(axes, labels.items()):
        for run, name in ((reference, "reference"), (yours, "yours")):
            before, after = accuracies[name]
            title = f"{name}: held-out accuracy {before:.3f} to {after:.3f}"
            axis.plot(range(1, len(run[key]) + 1), run[key], label=title, **lines[name])
        axis.set(xlabel="step of the run", ylabel=label)
        axis.xaxis.set_major_locator(pyplot.MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_ylim(-0.03, 1.03)
    if not curves.seen([*yours["loss"], *reference["loss"]]):
        axes[1].set_ylim(-0.001, 0.001)  # rounding errors alone are drawn as a flat line
    handles, titles = axes[0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=HERE / "student.py", help="your functions")
    parser.add_argument("--script", choices=SCRIPTS, default="spo")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    path = args.file.resolve()
    if args.inside:
        return inside(args.script, path, flags)
    names = written(path)
    if not names:
        sys.exit(f"{path.name} has no function that is written yet")
    missing = [name for name in task_names() if name not in names]
    print(f"yours: {', '.join(names)}")
    if missing:
        print(f"the project's: {', '.join(missing)}")
    flags = ["--tiny", *flags]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    common = [str(HERE / "train.py"), "--inside", "--script", args.script, "--file"]
    runs, slug = {}, f"{args.script}-{curves.slug(flags)}"
    for title, name, file in (("reference", f"reference-{slug}", os.devnull),
                              ("yours", f"yours-{slug}-{digest}", str(path))):  # fmt: skip
        what = f"{title}: {args.script}.py {' '.join(flags)}"
        runs[title] = curves.make(name, what, [*common, file], flags)
    reference, yours = (curves.columns(folder) for folder in runs.values())
    print("", *curves.table(reference, yours, tuple(runs)), sep="\n")
    ends = {title: curves.accuracies(folder) for title, folder in runs.items()}
    for title, (before, after) in ends.items():
        print(f"{title}: held-out accuracy {before:.3f} -> {after:.3f}")
    parts = first_difference(yours, reference)
    print(f"the runs part at {parts}" if parts else "the runs are the same in every step")
    drawn = runs["yours"] / "curves.png"
    if picture(yours, reference, ends, drawn):
        print(f"picture: {drawn}")


if __name__ == "__main__":
    main()
