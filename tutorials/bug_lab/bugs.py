"""Plants a bug into the project's functions at run time; no file is changed.

A bug is one function of one module, and text in its source to replace: (module, function, [[old,
new], ...]). They lie packed in bugs.txt, so that nobody reads them by chance: KEY.md has them in
plain text. To add one, append what `pack` returns, and a blank line before it.
"""

import base64
import importlib
import inspect
import json
import sys
import textwrap
import zlib
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXTS = HERE / "bugs.txt"  # not in the edition for students
sys.path.insert(0, str(HERE.parents[1]))

# Where each bug shows: the script to run, and its flags. 0 plants nothing.
SHOWS = {
    1: ("spo", "--training_tokens 256"),
    2: ("spo", "--temperature 0.7 --batch_size 0"),
    3: ("reset_po", ""),
    4: ("reset_po", "--max_new_tokens 23"),
    5: ("spo", "--max_new_tokens 20"),
    6: ("mpo", ""),
    7: ("mpo", "--epochs 4 --steps 20"),
    8: ("spo", "--kl_coef 0.5 --epochs 2 --lr 1e-3"),
    9: ("spo", ""),
    10: ("reset_po", ""),
}


def pack(module: str, function: str, edits: list[list[str]]) -> str:
    packed = zlib.compress(json.dumps([module, function, edits]).encode(), 9)
    return "\n".join(textwrap.wrap(base64.b64encode(packed).decode(), 76))


def unpack(number: int) -> tuple[str, str, list[list[str]]]:
    packed = TEXTS.read_text().strip().split("\n\n")[number - 1]
    return tuple(json.loads(zlib.decompress(base64.b64decode(packed))))


@contextmanager
def planted(number: int, healthy: bool = False):
    """Within this context the bug is in its module; for 0, nothing is. healthy: its function is
    made anew from its text all the same, but without the bug."""
    if not number or healthy and not TEXTS.exists():
        yield
        return
    if not TEXTS.exists():
        sys.exit(f"bug {number} is not in this copy: your instructor's has it")
    module_name, name, edits = unpack(number)
    module = importlib.import_module(module_name)
    before = getattr(module, name)
    source = inspect.getsource(before)
    for old, new in () if healthy else edits:
        if source.count(old) != 1:
            raise ValueError(f"bug {number} no longer fits {module_name}.{name}: mend bugs.txt")
        source = source.replace(old, new)
    exec(compile(source, module.__file__, "exec"), vars(module))
    try:
        yield
    finally:
        setattr(module, name, before)
