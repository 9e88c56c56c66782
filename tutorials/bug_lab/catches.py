"""Which bugs a student's own tests catch: a test that catches one passes on the healthy code and
fails with the bug planted. Used through lab.py --test.

Every run of the tests is a process of its own, and in every one, the healthy too, all ten functions
are made anew from their text: that a function was planted does not show, only what it does.
"""

import json
import os
import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

from bugs import HERE, SHOWS, planted

LIMIT = 120  # seconds for all tests of a file, with one bug
PEEKS = r"__code__|co_code|getsource|bugs\.txt|(?:import|from)\s+bugs|importlib"


class Watcher:
    """A plugin of pytest that keeps each test's outcome."""

    def __init__(self):
        self.failed = {}  # by test

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed["the file"] = str(report.longrepr).strip().split("\n")[-1]

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::", 1)[-1]
        self.failed[name] = self.failed.get(name, False) or report.failed


def run_tests(file: Path, bug: int) -> dict:
    """In this process: by test, whether it fails."""
    import pytest

    sys.path[:0] = [str(HERE.parents[1] / "tests"), str(HERE)]
    watcher = Watcher()
    with ExitStack() as stack:
        for number in SHOWS:
            stack.enter_context(planted(number, healthy=number != bug))
        options = ["-q", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull]
        pytest.main([str(file), *options, "--rootdir", str(file.parent)], [watcher])
    return watcher.failed


def outcomes(file: Path, bug: int) -> dict:
    """By test, whether it fails; from a process of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(LIMIT)
            nowhere = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(nowhere, number)
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(run_tests(file, bug)))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else {"the file": f"no answer within {LIMIT} s"}


def catches(file: Path, numbers: list[int]) -> tuple[dict[str, list[int]], list[str]]:
    """By test, the bugs that it catches; and the tests that fail on the healthy code."""
    if not file.is_file():
        sys.exit(f"there is no file {file}")
    if found := re.search(PEEKS, file.read_text(errors="replace")):
        sys.exit(f"{file.name} speaks of {found[0]}: test what the code does, not how it looks")
    healthy = outcomes(file, 0)
    if wrong := healthy.get("the file"):
        sys.exit(f"{file.name} does not import: {wrong}")
    if not healthy:
        sys.exit(f"{file.name} has no tests: functions whose names begin with test_")
    with_bug = {bug: outcomes(file, bug) for bug in numbers}
    caught = {
        test: [bug for bug, failed in with_bug.items() if failed.get(test, True)]
        for test, wrong in healthy.items()
        if not wrong
    }
    return caught, [test for test, wrong in healthy.items() if wrong]


def report(file: Path, numbers: list[int]) -> bool:
    """Prints which tests catch which of the bugs; True if there is one for each."""
    caught, wrong = catches(file, numbers)
    width = max(map(len, [*caught, *wrong, file.name]))
    if not numbers:
        for test in [*caught, *wrong]:
            print(f"{test:<{width}}  {'fails' if test in wrong else 'holds'} on the healthy code")
        return not wrong
    print(f"{file.name:<{width}}  {' '.join(f'{bug:>2}' for bug in numbers)}")
    for test, bugs in caught.items():
        print(f"{test:<{width}}  {' '.join(' x' if bug in bugs else ' .' for bug in numbers)}")
    for test in wrong:
        print(f"{test:<{width}}  fails on the healthy code: it catches nothing")
    found = sorted({bug for bugs in caught.values() for bug in bugs})
    print(f"caught: {', '.join(map(str, found)) or 'none'} ({len(found)} of {len(numbers)})")
    return len(found) == len(numbers)
