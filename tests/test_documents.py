"""The documents: a front page of one screen, and commands, links, pictures and names that exist.

Every command is parsed, by its script's own parser or by what its file knows of. Those of the three
scripts are run as well, for a round, if they need no download. The cells for Colab and Kaggle that
install are run by test_tutorials.py, those of TRL by test_trl.py.
"""

import ast
import json
import re
import shlex
import sys
from itertools import groupby
from pathlib import Path

import pytest

import common
import mpo
import reset_po
import spo
from conftest import ROOT

NAMES = ("README.md", "tutorials/README.md", "tutorials/results/README.md", "tests/README.md")
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in NAMES}
FRONT = TEXTS["README.md"]
SCRIPTS = dict(spo=spo, mpo=mpo, reset_po=reset_po)
ON_TRL = {"spo-chain": "spo", "spo-tree": "spo", "mpo": "mpo", "rrpo": "reset_po", "srpo": "reset_po"}  # fmt: skip
PLACEHOLDERS = {"FOLDER", "FILE", "ADDRESS"}
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:python|torchrun|accelerate|pip|spo\.py|mpo\.py|reset_po\.py)\s[^`]+)`")


def commands(text: str) -> list[str]:
    """All lines of code blocks, but for blocks of what a script prints, and what stands in
    backticks and begins as commands do. Three spaces end one; what is behind says what it does."""
    lines = []
    for block in FENCE.findall(text):
        body = re.sub(r"\\\n\s*", " ", block.strip("`\n"))
        if not body.startswith(("step ", "%%bash\n")):
            lines += [re.split("   +", line)[0] for line in body.split("\n")]
    prose = FENCE.sub("", text)
    return lines + [" ".join(found.split()) for found in INLINE.findall(prose)]


COMMANDS = sorted({command for text in TEXTS.values() for command in commands(text)})


def parsed(script: str, flags: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    module = SCRIPTS[script]
    common.parse_args(module.Config, script, module.__doc__, module.TINY, module.LARGE)


def check(words: list[str], folder, monkeypatch) -> None:
    """One command, from its words; raises, or fails, where it asks for what is not there."""
    if words[0].lstrip("!") in ("git", "%cd"):
        return
    files = [b for a, b in zip(words, words[1:]) if a in ("-r", "--config_file", "notebook")]
    if words[0] == "python" and words[1:3] == ["-m", "pytest"]:
        files += [word for word in words[3:] if "/" in word]
    elif words[0] not in ("pip", "jupyter"):
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert at == 0 or words[0].lstrip("!") in ("python", "torchrun", "accelerate")
        file, flags = words[at], words[at + 1 :]
        if "--" in flags:  # TRL's own stand behind it
            flags = flags[: flags.index("--")]
        files.append(file)
        if (script := file.removesuffix(".py")) in SCRIPTS:
            parsed(script, flags, monkeypatch)
        elif file.endswith("trl_adapter.py"):
            parsed(ON_TRL[flags[0]], flags[1:], monkeypatch)
        else:
            source = (folder / file).read_text("utf-8")
            assert all(flag in source for flag in flags if flag not in PLACEHOLDERS), flags
    assert all((folder / file).exists() for file in files if file not in PLACEHOLDERS), files


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_asks_for_what_is_there(command, monkeypatch):
    folder = ROOT
    for both, words in groupby(shlex.split(command), lambda word: word == "&&"):
        words = list(words)
        if words[0] == "cd":
            folder = folder / words[1]
        elif not both:
            check(words, folder, monkeypatch)


ROUND = "--device cpu --steps 1 --warm_start_steps 2 --eval_problems 2 --eval_samples 1"
ROUND += " --max_new_tokens 8 --show_every 1 --name round"  # the last of a repeated flag counts
FROM_A_HUB = re.compile(r"--model \w\S*/|--data (gsm8k|math)\b")


def scripts_commands() -> list[str]:
    found = {re.sub(r"^!?python ", "", command) for command in COMMANDS}
    own = [command for command in sorted(found) if command.split(".py")[0] in SCRIPTS]
    return [command for command in own if not FROM_A_HUB.search(command)]


@pytest.mark.parametrize("command", scripts_commands())
def test_a_scripts_command_runs(command, run, tmp_path):
    """All of it but its length. FOLDER has a small random model, FILE sixty problems."""
    file, *flags = shlex.split(command)
    common.build_policy(257).save_pretrained(tmp_path / "FOLDER")
    common.build_tokenizer().save_pretrained(tmp_path / "FOLDER")
    problems = [dict(question=f"1+{n}", answer=f"1+{n}={1 + n}\n#### {1 + n}") for n in range(60)]
    lines = "\n".join(json.dumps(problem) for problem in problems)
    (tmp_path / "FILE.jsonl").write_text(lines)
    flags = ["FILE.jsonl" if flag == "FILE" else flag for flag in flags]
    done = run(*flags, *ROUND.split(), script=file.removesuffix(".py"))
    assert done.code == 0, done.err
    assert (tmp_path / "runs" / "round" / "summary.json").exists()


def test_commands_that_need_no_download_are_among_those_that_run():
    assert {"spo.py", "mpo.py", "reset_po.py --model FOLDER --data FILE"} <= {*scripts_commands()}
    assert len(scripts_commands()) > 15


@pytest.mark.parametrize(
    "wrong",
    ["python spo.py --no_such_flag 1", "python spo.py --lr -1", "python tests/no_such.py",
     "python tutorials/curves.py --no_such_flag", "pip install -r no_such.txt",
     "python -m pytest tests/no_such.py", "cd tutorials && jupyter notebook no_such.ipynb",
     "torchrun --nproc_per_node 2 tutorials/trl_adapter.py mpo --no_such_flag", "make"],
)  # fmt: skip
def test_a_wrong_command_is_found(wrong, monkeypatch):
    with pytest.raises((AssertionError, StopIteration, common.BadInput, FileNotFoundError)):
        test_a_command_asks_for_what_is_there(wrong, monkeypatch)


def test_commands_are_found():
    assert {"python spo.py", "python -m pytest", "python tutorials/curves.py"} <= {*COMMANDS}
    assert all(commands(text) for text in TEXTS.values()) and len(COMMANDS) > 50


def test_the_front_page_is_one_screen_of_these_parts():
    words = re.findall(r"\S*\w\S*", FRONT)  # the bars of tables are none
    assert len(words) <= 1500 and FRONT.count("\n") <= 180
    assert re.findall(r"^## (.*)$", FRONT, re.MULTILINE) == [
        "Run it", "Results", "Why trust it", "Your model, your data", "How to read it",
        "Questions", "Beyond one GPU", "Names that clash, and how to cite",
    ]  # fmt: skip


def test_the_front_pages_results_stand_in_the_results():
    block = FRONT.split("<!-- results: made by tests/results.py -->")[1]
    block = block.split("<!-- end of results -->")[0]
    figures = re.findall(r"0\.\d+ ± 0\.\d+", block)
    pages = [page.read_text("utf-8") for page in (ROOT / "tutorials" / "results").glob("*.md")]
    assert figures and all(any(figure in page for page in pages) for figure in figures)


CODE = sorted([*(ROOT / "tutorials").rglob("*.py"), *(ROOT / "tests").glob("*.py")])


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_code_uses_of_the_scripts_is_there(path):
    """Some of it, as what is for verl, runs nowhere but where that is installed."""
    modules = SCRIPTS | dict(common=common)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            assert module is None or hasattr(module, node.attr), ast.unparse(node)


def headings(text: str) -> set[str]:
    """As links name them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def markdown(page: Path) -> str:
    """The text of a Markdown file, or of a notebook's Markdown cells."""
    text = page.read_text("utf-8")
    if page.suffix == ".md":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def check_links(page: Path) -> None:
    """Those to other addresses are not looked at."""
    for link in re.findall(r"\]\(([^)\s]+)\)", markdown(page)):
        path, _, heading = link.partition("#")
        file = page.parent / path if path else page
        assert ":" in path or file.exists(), f"{page}: {link}"
        assert not heading or heading in headings(markdown(file)), f"{page}: {link}"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere_and_pictures_say_what_they_show(name):
    check_links(ROOT / name)
    for text in re.findall(r"!\[([^\]]*)\]", TEXTS[name]):
        assert len(text.split()) > 10, text
    assert "<img" not in TEXTS[name] and (name != "README.md" or TEXTS[name].count("![") >= 2)


@pytest.mark.parametrize("name", ["README.md", "tutorials/README.md"])
def test_symbols_have_the_names_of_the_code(name):
    tables = re.findall(r"^\| in the paper.*\| in `(\w+)\.py` \|\n\|---\|---\|\n((?:\|.*\n)+)",
                        TEXTS[name], re.MULTILINE)  # fmt: skip
    assert len(tables) == {"README.md": 3}.get(name, 1)
    for script, rows in tables:
        source = (ROOT / f"{script}.py").read_text("utf-8")
        for row in rows.splitlines():
            names = re.findall(r"`([^`]+)`", row.split("|")[2])
            words = [word for text in names for word in re.findall(r"[a-z]\w+", text)]
            assert words and all(re.search(rf"\b{word}\b", source) for word in words), row
