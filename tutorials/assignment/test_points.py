"""python -m pytest tutorials/assignment: one test a task, which fails without its full points."""

import pytest
from tasks import TASKS


@pytest.mark.parametrize("name", [task.name for task in TASKS])
def test_task(name, results):
    result = results[name]
    if result.points < result.out_of:
        head = f"{name}: {result.points:g} of {result.out_of} points"
        pytest.fail(f"{head}\n{result.message}", pytrace=False)
