"""The silent-bug lab: runs a script with one bug planted in it beside the healthy one.

    python tutorials/bug_lab/lab.py --bug 3 --tiny       curves of both runs, half a minute each
    python tutorials/bug_lab/lab.py --bug 3 --check      properties that a healthy project has

Nothing crashes; something is wrong. README.md says how to go about it. Other flags are handed to
the script, for both runs (--steps 20). Runs are kept, as runs/lab-*, and not repeated.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

from bugs import SHOWS, planted

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 20  # bars in a curve


def run(script: str, bug: int, flags: list[str]) -> Path:
    """The folder of this run, which is made if it is not there."""
    words = "-".join(re.sub(r"[^\w.]", "", flag) for flag in flags)
    name = f"lab-{script}-bug{bug}-{words}"[:99].rstrip("-")
    folder = Path("runs") / name
    if not (folder / "summary.json").exists():
        what = f"with bug {bug}" if bug else "healthy"
        print(f"\n=== {what}: {script}.py {' '.join(flags)}", flush=True)
        inner = [sys.executable, __file__, "--inside", "--bug", str(bug), "--script", script]
        again = ["--resume"] if (folder / "checkpoint").exists() else []
        done = subprocess.run([*inner, "--name", name, *flags, *again])
        if done.returncode:  # it has said why
            sys.exit(done.returncode)
    return folder


def inside(script: str, bug: int, flags: list[str]) -> None:
    """The script itself, with the bug in it."""
    import common

    sys.argv = [f"{script}.py", *flags]
    with planted(bug):
        common.cli(__import__(script).main)


def columns(folder: Path) -> dict[str, list[float]]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


def binned(values: list[float]) -> list[float]:
    """At most WIDTH means of neighbours."""
    size = max(1, -(-len(values) // WIDTH))
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts]


def curve(values: list[float], low: float, high: float) -> str:
    scale = (len(BARS) - 1) / ((high - low) or 1)
    return "".join(BARS[round((value - low) * scale)] for value in values)


def compare(healthy: Path, broken: Path, bug: int) -> None:
    """Both runs' metrics: first value, curve, last value; the curves of a line share one scale."""
    left, right = columns(healthy), columns(broken)
    print(f"\n{'':20}{'healthy':^42}{f'with bug {bug}':^42}")
    for key in left:
        pair = [binned(left[key]), binned(right.get(key, []))]
        if key in ("step", "lr", "seconds") or not all(pair) or not any(map(any, pair)):
            continue  # nothing to compare, or 0 in both
        low, high = min(map(min, pair)), max(map(max, pair))
        cells = [f"{x[0]:9.3g} {curve(x, low, high):<{WIDTH}} {x[-1]:<9.3g}" for x in pair]
        print(f"{key:<20}{'  '.join(cells)}")
    for name, folder in (("healthy", healthy), ("bug", broken)):
        facts = json.loads((folder / "summary.json").read_text())
        ends = [f"{facts[f'accuracy_{when}']:.3f}" for when in ("before", "after")]
        print(f"{name}: held-out accuracy {' -> '.join(ends)}; answers in {folder}/samples.txt")


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
    parser.add_argument("--bug", type=int, required=True, choices=[0, *SHOWS], help="0: none")
    parser.add_argument("--script", choices=["spo", "mpo", "reset_po"], help="default: its own")
    parser.add_argument("--check", action="store_true", help="test properties instead of running")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    script, needed = SHOWS.get(args.bug, ("spo", ""))
    if args.inside:
        return inside(args.script, args.bug, flags)
    if args.check:
        sys.exit(not check(args.bug))
    if args.script in (None, script):  # where a bug shows only under some flags, with them
        flags = [*needed.split(), *flags]
    both = [run(args.script or script, bug, flags) for bug in (0, args.bug)]
    compare(*both, args.bug)


if __name__ == "__main__":
    main()
