"""Grades a folder of students' files, for the instructor.

    python tutorials/assignment/bulk.py submissions --csv points.csv --seed 4711

Each file's report goes beside it, as NAME.txt; points.csv gets a row a file, with the seconds that
its grading took. --results FILE: one file's report in Gradescope's form too (autograder/).
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a server that others use too
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
os.environ["HF_HUB_OFFLINE"] = "1"

import grader  # noqa: E402


def report(results: list, note: str) -> str:
    """What a student reads."""
    short = [r for r in results if r.message]
    texts = [f"{r.name}: {r.points:g} of {r.out_of} points\n{r.message}" for r in short]
    return "\n\n".join([*texts, grader.table(results), *([f"note: {note}"] if note else [])])


def gradescope(results: list, note: str) -> dict:
    """results.json, as Gradescope's autograders write it."""
    tests = [
        dict(name=r.name, score=r.points, max_score=r.out_of, output=r.message) for r in results
    ]
    return dict(score=grader.total(results), output=note, tests=tests)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="a folder of .py files, or one file")
    parser.add_argument("--csv", type=Path, help="a new file, one row a graded file")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn cases")
    parser.add_argument("--limit", type=int, default=10, help="seconds for each task")
    parser.add_argument("--results", type=Path, help="results.json of one file")
    args = parser.parse_args()
    files = sorted(args.path.glob("*.py")) if args.path.is_dir() else [args.path]
    if not files or not files[0].is_file():
        sys.exit(f"{args.path}: there is no file to grade")
    if args.csv and args.csv.exists():
        sys.exit(f"{args.csv} is there already: begin with a new one")
    if args.results and len(files) > 1:
        sys.exit("--results is for one file")
    for file in files:
        begun = time.monotonic()
        results, note = grader.grade(file, args.limit, args.seed)
        seconds = time.monotonic() - begun
        file.with_suffix(".txt").write_text(report(results, note) + "\n")
        print(f"{file.name:<30}{grader.total(results):>6g}{seconds:>7.1f} s  {note}", flush=True)
        if args.csv:
            grader.append_csv(args.csv, file, results, note, seconds)
        if args.results:
            args.results.write_text(json.dumps(gradescope(results, note), indent=1) + "\n")


if __name__ == "__main__":
    main()
