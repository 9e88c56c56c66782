"""The silent-bug lab: runs a script with one bug planted in it beside the healthy one.

    python tutorials/bug_lab/lab.py --bug 3 --tiny       curves of both runs, half a minute each
    python tutorials/bug_lab/lab.py --bug 3 --check      properties that a healthy project has
    python tutorials/bug_lab/lab.py --bug 3 --test my_test.py    does your own test catch it?
    python tutorials/bug_lab/lab.py --test my_test.py            which of all ten does it catch?

Nothing crashes; something is wrong. README.md says how to go about it. Other flags are handed to
the script, for both runs (--steps 20). Runs are kept, as runs/lab-*, and not repeated.
"""

import argparse
import sys
from pathlib import Path

from bugs import HERE, SHOWS, TEXTS, planted

sys.path.insert(0, str(HERE.parent))

import curves  # noqa: E402


def run(script: str, bug: int, flags: list[str]) -> Path:
    """The folder of this run, which is made if it is not there."""
    name = f"lab-{script}-bug{bug}-{curves.slug(flags)}".rstrip("-")
    title = f"{f'with bug {bug}' if bug else 'healthy'}: {script}.py {' '.join(flags)}"
    command = [__file__, "--inside", "--bug", str(bug), "--script", script]
    return curves.make(name, title, command, flags)


def inside(script: str, bug: int, flags: list[str]) -> None:
    """The script itself, with the bug in it."""
    import common

    sys.argv = [f"{script}.py", *flags]
    with planted(bug):
        common.cli(__import__(script).main)


def compare(healthy: Path, broken: Path, bug: int) -> None:
    """Both runs' metrics, beside each other."""
    titles = "healthy", f"with bug {bug}"
    print("", *curves.table(curves.columns(healthy), curves.columns(broken), titles), sep="\n")
    for name, folder in (("healthy", healthy), ("bug", broken)):
        before, after = curves.accuracies(folder)
        print(f"{name}: held-out accuracy {before:.3f} -> {after:.3f}; "
              f"answers in {folder}/samples.txt")  # fmt: skip


def check(bug: int) -> bool:
    """Prints which properties hold; True if all do."""
    from properties import PROPERTIES

    failed = 0
    for number, holds in enumerate(PROPERTIES, 1):
        with planted(bug):
            wrong = holds()
        failed += wrong is not None
        fact = " ".join(holds.__doc__.split())
        print(f"{'FAILS' if wrong else 'holds'}  {number:>2}. {fact}")
        if wrong:
            print(f"           {wrong}")
    print(f"{len(PROPERTIES) - failed} of {len(PROPERTIES)} properties hold")
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bug", type=int, choices=[0, *SHOWS], help="0: none")
    parser.add_argument("--script", choices=["spo", "mpo", "reset_po"], help="default: its own")
    parser.add_argument("--check", action="store_true", help="test properties instead of running")
    parser.add_argument("--test", type=Path, help="a file of your own tests, for pytest")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.test:
        from catches import report

        numbers = [*SHOWS] if args.bug is None else [args.bug] if args.bug else []
        if not TEXTS.exists():
            print("the bugs are not in this copy: whether your tests hold on the healthy code")
            numbers = []
        sys.exit(not report(args.test.resolve(), numbers))
    if args.bug is None:
        parser.error("--bug: which one? (1 to 10; 0 for none)")
    script, needed = SHOWS.get(args.bug, ("spo", ""))
    if args.inside:
        return inside(args.script, args.bug, flags)
    if args.check:
        sys.exit(not check(args.bug))
    if args.script in (None, script):  # where a bug shows only under some flags, with them
        flags = [*needed.split(), *flags]
    broken = run(args.script or script, args.bug, flags)  # first: a copy without bugs says so now
    compare(run(args.script or script, 0, flags), broken, args.bug)


if __name__ == "__main__":
    main()
