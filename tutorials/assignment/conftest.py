"""Options of the grader, and its table at the end: see README.md."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # this folder, and the project

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network

import pytest  # noqa: E402


def pytest_addoption(parser):
    group = parser.getgroup("the assignment")
    default = os.environ.get("STUDENT_FILE", str(HERE / "student.py"))
    group.addoption("--file", default=default, help="the file to grade (or $STUDENT_FILE)")
    group.addoption("--limit", type=int, default=10, help="seconds for each task")
    group.addoption("--seed", type=int, default=0, help="of the drawn cases")
    group.addoption("--csv", help="append the points to this file, one row a graded file")


def pytest_configure(config):
    config.option.reportchars = "N"  # no list of failures below the table, which says as much


@pytest.fixture(scope="session")
def results(request):
    """By name, the results of all tasks."""
    import grader

    option = request.config.option
    found, note = grader.grade(option.file, option.limit, option.seed)
    request.config.graded = found, note
    if option.csv:
        grader.append_csv(Path(option.csv), Path(option.file), found, note)
    return {r.name: r for r in found}


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "graded"):
        import grader

        found, note = config.graded
        terminalreporter.section(f"points of {config.option.file}")
        terminalreporter.write_line(grader.table(found))
        if note:
            terminalreporter.write_line(f"note: {note}")
