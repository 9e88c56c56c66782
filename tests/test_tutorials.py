"""The notebooks: what is kept in them, and that they run from a clean kernel in a clean copy.

`python -m pytest -m "not notebooks"` leaves the latter out, which take minutes.
"""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import mpo
import reset_po
import spo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tutorials"))

import mtp_heads  # noqa: E402
import resets_theory  # noqa: E402
import tiny_policy  # noqa: E402

NAMES = ["1_policy_gradient", "2_spo", "3_resets", "4_mpo", "5_side_by_side"]
PATHS = [ROOT / "tutorials" / f"{name}.ipynb" for name in NAMES]
SOLUTION = re.compile(r"<details><summary>Solution</summary>\n\n(.*?)\n</details>", re.DOTALL)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(book: dict) -> list[dict]:
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def prose(book: dict) -> str:
    return "\n".join(text_of(c) for c in book["cells"] if c["cell_type"] == "markdown")


def solutions(book: dict) -> list[str]:
    """The code of each folded solution."""
    folded = SOLUTION.findall(prose(book))
    return ["\n".join(re.findall(r"```python\n(.*?)\n```", s, re.DOTALL)) for s in folded]


def images(cell: dict) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def texts(output: dict) -> str:
    """An output's text, without pictures."""
    data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
    return "".join(map("".join, [output.get("text", ""), *data.values()]))


def test_there_is_no_other_notebook():
    assert sorted((ROOT / "tutorials").glob("*.ipynb")) == PATHS


def shown_sources(path):
    """(functions, text that is kept) of each cell that shows sources."""
    modules = {m.__name__: m for m in (common, spo, mpo, reset_po, resets_theory, tiny_policy)}
    for cell in code_cells(read(path)):
        if text_of(cell).lstrip().startswith("source("):
            call = ast.parse(text_of(cell)).body[0].value
            functions = [eval(ast.unparse(arg), modules) for arg in call.args]
            yield functions, "".join(cell["outputs"][0]["data"]["text/markdown"])


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
class TestKept:
    def test_outputs_of_one_run_from_top_to_bottom(self, path):
        cells = code_cells(read(path))
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert sum(map(images, cells)) >= 2

    def test_no_error_warning_or_progress_bar(self, path):
        for cell in code_cells(read(path)):
            for output in cell["outputs"]:
                assert output["output_type"] != "error"
                assert output.get("name") != "stderr", output["text"]

    def test_no_absolute_path(self, path):
        for cell in code_cells(read(path)):
            for output in cell["outputs"]:
                assert not re.search(r"(?<![\w.:/)\]])/\w+/\w+|[A-Z]:\\\\", texts(output))

    def test_size_and_metadata(self, path):
        book = read(path)
        assert path.stat().st_size < 600_000
        kernel = dict(display_name="Python 3", language="python", name="python3")
        assert book["metadata"] == dict(kernelspec=kernel, language_info=dict(name="python"))
        assert all(cell["metadata"].keys() <= {"tags"} for cell in book["cells"])

    def test_three_exercises_with_folded_solutions(self, path):
        text = prose(read(path))
        kinds = re.findall(r"^### (\d)\. (\w+):", text, re.MULTILINE)
        assert kinds == [("1", "Implement"), ("2", "Predict"), ("3", "Break")]
        assert len(SOLUTION.findall(text)) == 3
        assert text.count("<details>") == text.count("</details>") == 3
        assert all("assert" in code or "def " in code for code in solutions(read(path)))

    def test_each_formula_has_its_function_and_a_case_that_is_checked(self, path):
        code = [text_of(cell) for cell in code_cells(read(path))]
        assert "$$" in prose(read(path))
        assert sum(text.lstrip().startswith("source(") for text in code) >= 1
        assert sum("assert" in text for text in code) >= 2

    def test_nothing_of_the_scripts_is_copied(self, path):
        defined = set()
        for name in ("common", "spo", "mpo", "reset_po"):
            tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
            kinds = (ast.FunctionDef, ast.ClassDef)
            defined |= {node.name for node in tree.body if isinstance(node, kinds)}
        code = [text_of(cell) for cell in code_cells(read(path))] + solutions(read(path))
        here = {node.name for text in code for node in ast.walk(ast.parse(text))
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))}  # fmt: skip
        assert not here & defined

    def test_the_source_that_is_shown_is_that_of_the_scripts_as_they_are(self, path):
        for functions, shown in shown_sources(path):
            for function in functions:
                assert inspect.getsource(function).rstrip() in shown, function.__name__

    def test_sources_that_the_assignment_asks_for_are_folded(self, path, helpers):
        for functions, shown in shown_sources(path):
            assert shown == helpers.source_text(*functions)
            asked_for = any(function.__name__ in helpers.ASSIGNED for function in functions)
            assert shown.startswith("<details>") == asked_for

    def test_words_are_explained_in_one_place(self, path):
        assert "[glossary](README.md#words)" in prose(read(path))

    def test_lines_of_code_fit(self, path):
        code = [text_of(cell) for cell in code_cells(read(path))] + solutions(read(path))
        assert max(len(line) for text in code for line in text.splitlines()) <= 100


@pytest.fixture(scope="module")
def clean_copy(tmp_path_factory) -> Path:
    """The repository without what was run in it: warm start and small runs are made here once."""
    for name in ("nbclient", "nbformat", "ipykernel", "matplotlib"):
        pytest.importorskip(name, reason=f"{name} is not installed: tutorials/requirements.txt")
    folder, left_out = tmp_path_factory.mktemp("copy") / "repository", (".*", "runs", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
    return folder


@pytest.mark.notebooks
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_a_clean_kernel(name, clean_copy):
    """All cells, then the solutions, each of which holds its own asserts; the first one is put to
    the exercise's check."""
    import nbclient
    import nbformat

    kept = read(ROOT / "tutorials" / f"{name}.ipynb")
    book = nbformat.read(clean_copy / "tutorials" / f"{name}.ipynb", as_version=4)
    count = len(book.cells)
    [check] = [c.source for c in book.cells if "check" in c.metadata.get("tags", [])]
    first, *others = solutions(kept)
    for code in (first, check, *others):
        book.cells.append(nbformat.v4.new_code_cell(code))
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = dict(metadata=dict(path=str(clean_copy / "tutorials")))
    nbclient.NotebookClient(book, timeout=900, kernel_name="python3", resources=where).execute()

    for old, new in zip(kept["cells"], book.cells[:count]):
        if old["cell_type"] == "code":
            assert images(new) == images(old), f"a picture is missing:\n{new.source}"
            errors = [o for o in new.outputs if o.get("name") == "stderr"]
            assert not errors, errors
    assert "right in all" in "".join(o.text for o in book.cells[count + 1].outputs)


# ---------------------------------------------------------------- the heads of 4_mpo's exercise 1


def test_future_targets_by_hand():
    ids, mask = torch.tensor([[7, 8, 9], [5, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    before = ids.clone()
    assert mtp_heads.future_targets(ids, mask, 0).tolist() == [[7, 8, 9], [5, -1, -1]]
    assert mtp_heads.future_targets(ids, mask, 1).tolist() == [[8, 9, -1], [-1, -1, -1]]
    assert mtp_heads.future_targets(ids, mask, 5).tolist() == [[-1] * 3] * 2
    assert torch.equal(ids, before)


def test_heads_begin_as_the_policy_and_learn(model):
    """At first every head says what the policy says of the NEXT token; training lowers the loss and
    leaves the policy alone."""
    samples = [common.Sample([1, 0], [2, 1, 0, 2]), common.Sample([1], [0, 2])]
    batch = common.collate(samples)
    torch.manual_seed(0)
    heads = mtp_heads.Heads(model, block_size=3)
    found = mtp_heads.block_logprobs(model, heads, batch)  # (B, T, K)
    own = common.token_logprobs(model, batch).detach()
    torch.testing.assert_close(found[..., 0], own)
    hidden = model.base_model(torch.tensor([[1, 0, 2]])).last_hidden_state[0, -2]
    logprobs = model.get_output_embeddings()(hidden).log_softmax(-1)
    torch.testing.assert_close(found[0, 0], logprobs[[2, 1, 0]])
    assert found[1, 1].tolist()[1:] == [0.0, 0.0]  # nothing stands behind the last token
    weights = [p.clone() for p in model.parameters()]
    losses = mtp_heads.train_heads(model, heads, batch, steps=20)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, q) for p, q in zip(weights, model.parameters()))


# ------------------------------------------------------------------- what the notebooks share


@pytest.fixture(scope="module")
def helpers():
    for name in ("matplotlib", "IPython"):
        pytest.importorskip(name, reason=f"{name} is not installed: tutorials/requirements.txt")
    import helpers

    return helpers


def test_what_the_assignment_asks_for(helpers):
    """Its stubs, as long as it is there."""
    stubs = ROOT / "tutorials" / "assignment" / "student.py"
    if not stubs.exists():
        pytest.skip("no assignment in this copy")
    tree = ast.parse(stubs.read_text(encoding="utf-8"))
    assert helpers.ASSIGNED == {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


def test_the_glossary_has_the_words():
    text = (ROOT / "tutorials" / "README.md").read_text(encoding="utf-8")
    words = text[text.index("## Words") :].split("\n## ")[0]
    for word in ("rollout", "advantage", "value", "temperature", "warm start", "cutpoint", "localiser",
                 "seed", "step, round, update", "baseline", "critic"):  # fmt: skip
        assert re.search(rf"^\| {word}", words, re.MULTILINE), word


def test_the_cells_for_colab_and_kaggle(tmp_path, monkeypatch):
    """pip gets all that the scripts need but torch, which is held where it is; the flags exist."""
    text = (ROOT / "tutorials" / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## On Colab and Kaggle") :].split("\n## ")[0]
    cells = re.findall(r"```\n(.*?)\n```", section, re.DOTALL)
    [install] = [cell for cell in cells if cell.startswith("%%bash\n")]
    install = install.removeprefix("%%bash\n").replace("python -m pip", "echo pip")
    assert "echo pip install" in install
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    options = dict(cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    done = subprocess.run(["bash", "-c", install], **options)
    assert done.returncode == 0, done.stderr
    assert "-c torch-there.txt -r requirements-without-torch.txt" in done.stdout
    assert (tmp_path / "torch-there.txt").read_text() == f"torch=={torch.__version__}\n"
    asked = (ROOT / "requirements.txt").read_text().splitlines()
    [pinned] = [line for line in asked if re.match(r"torch\b", line)]
    left = (tmp_path / "requirements-without-torch.txt").read_text().splitlines()
    assert left == [line for line in asked if line != pinned] and len(left) == len(asked) - 1 > 1

    commands = re.findall(r"^!python (spo)\.py ?(.*)$", "\n".join(cells), re.MULTILINE)
    assert len(commands) == 3
    for script, flags in commands:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
        cfg, run = common.parse_args(spo.Config, script, spo.__doc__, spo.TINY, spo.LARGE)
    assert run.data in common.HUB and "0.5B" in run.model and run.show_every == 1
    assert cfg.prompts == 16 and run.name == "gsm8k"


def test_lines_can_be_told_apart_in_grey(helpers):
    styles = [helpers.style(i) for i in range(6)]
    assert len({style["marker"] for style in styles}) == 6
    assert len({str(style["linestyle"]) for style in styles}) == 6


def test_check_tells_right_from_wrong_from_unwritten(helpers, capsys):
    def double(x):
        return 2 * x

    cases = [(1.0,), (2.0,)]
    for mine in (double, lambda x: x + 1, lambda x: None, lambda x: [2 * x, 0]):
        helpers.check(mine, double, cases)
    helpers.check(double, [2.0, 4.0], cases)
    right, wrong, unwritten, shape, listed = capsys.readouterr().out.splitlines()
    assert right == listed == "double: right in all 2 cases"
    assert wrong == "<lambda>(2.0,): wanted 4.0, got 3.0"
    assert unwritten == "<lambda>: not written yet"
    assert "wanted 2.0, got [2.0, 0]" in shape


def test_a_curve_begins_before_the_run_and_skips_steps_without_evaluation(helpers):
    rows = [dict(step=1.0), dict(step=2.0, held_out=0.5), dict(step=3.0)]
    run = helpers.Run("", 0, rows, dict(accuracy_before=0.25))
    assert run.curve("step") == [(0.0, 0.25), (2.0, 0.5)]


def test_small_runs_are_kept_until_their_script_or_command_changes(helpers, monkeypatch, tmp_path):
    monkeypatch.setattr(helpers, "ROOT", tmp_path)
    for name in ("spo", "mpo", "common"):
        (tmp_path / f"{name}.py").write_text(name)
    done, seeds, warmed = [], [], []

    def run_jobs(jobs):
        for script, args in jobs:
            if script == "warm":
                warmed.append(args)
            else:
                seeds.append(args[args.index("--seed") + 1])
                done.append(script)
                folder = tmp_path / "runs" / args[-1]
                folder.mkdir(parents=True)
                (folder / "metrics.csv").write_text("step,held_out\n1,0.5\n2,\n")
                (folder / "summary.json").write_text('{"accuracy_before": 0.25}')

    monkeypatch.setattr(helpers, "run_jobs", run_jobs)
    commands = {"a": "spo.py --steps 2", "b": "mpo.py --steps 2"}
    first = helpers.small_runs(commands)
    assert [run.label for run in first] == ["a", "b"] and len(done) == 2
    assert first[0].rows == [dict(step=1, held_out=0.5), dict(step=2)]
    assert helpers.small_runs(commands) == first and len(done) == 2  # kept
    (tmp_path / "mpo.py").write_text("changed")
    helpers.small_runs(commands)
    assert done[2:] == ["mpo"]
    (tmp_path / "common.py").write_text("changed")
    helpers.small_runs(commands)
    assert done[3:] == ["spo", "mpo"]
    helpers.small_runs({"a": "spo.py --steps 3"}, seeds=(0, 1))
    assert done[5:] == ["spo", "spo"]
    assert seeds[5:] == ["0", "1"] and warmed[-2:] == [[0], [1]]
    for path in (tmp_path / "runs").glob("*/summary.json"):
        path.unlink()  # of a run that was stopped nothing is left
    helpers.small_runs({"a": "spo.py --steps 3"}, seeds=(0, 1))
    assert len(done) == 9


def test_a_line_is_the_mean_of_its_seeds_with_its_error(helpers):
    def run(seed, tokens, held_out):
        rows = [dict(step=1.0, sampled_tokens=tokens, held_out=held_out)]
        return helpers.Run("a", seed, rows, dict(accuracy_before=0.25, accuracy_stderr=0.03))

    def drawn(runs):
        figure, axis = helpers.plt.subplots()
        helpers.draw_curves(axis, runs, "sampled_tokens", "tokens")
        [(line, _, [bars])] = [bars.lines for bars in axis.containers]
        helpers.plt.close(figure)
        halves = [(high - low) / 2 for (_, low), (_, high) in bars.get_segments()]
        return line.get_xydata().tolist(), halves, axis.get_title()

    points, halves, title = drawn([run(0, 100.0, 0.5), run(1, 300.0, 0.7)])
    assert points == [[0, 0.25], [200, pytest.approx(0.6)]]
    assert halves == pytest.approx([0, 0.1]) and title.startswith("mean of 2 seeds")
    points, halves, title = drawn([run(3, 100.0, 0.5)])
    assert points[1] == [100, 0.5] and halves == pytest.approx([0.03, 0.03]) and title == "one seed"
