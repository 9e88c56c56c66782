"""What grader.py and check.py share: comparing answers (numbers, lists and tensors alike), and which
functions of a file a function of it calls."""

import ast

import torch

DETACHED = (
    "Is the answer detached from what it is computed of? Without a gradient nothing is trained: "
    "look for detach, no_grad, item, tolist and tensors made anew."
)


def tensors(answer) -> list[torch.Tensor]:
    """An answer as double tensors: numbers, lists and tensors alike; a tuple has several."""
    parts = answer if isinstance(answer, tuple) else (answer,)
    return [torch.as_tensor(x).detach().to(torch.double) for x in parts]


def same(a, b, wanted) -> bool:
    """Is a the answer b? What is ANY in `wanted` does not matter."""
    try:
        a, b, wanted = tensors(a), tensors(b), tensors(wanted)
    except (TypeError, ValueError, RuntimeError):
        return False
    if [x.shape for x in a] != [x.shape for x in b]:
        return False
    for x, y, w in zip(a, b, wanted):
        kept = ~w.isnan() if w.shape == x.shape else ...
        if not torch.allclose(x[kept], y[kept], rtol=1e-5, atol=1e-5, equal_nan=True):
            return False
    return True


def short(x, wanted: bool = False) -> str:
    """An answer in a line; in one that is wanted, nan stands for anything."""
    values = [[round(v, 4) for v in t.flatten().tolist()] for t in tensors(x)]
    shapes = " and ".join(f"{tuple(t.shape)} {v}" for t, v in zip(tensors(x), values))
    shapes = shapes.replace("nan", "any") if wanted else shapes
    return shapes if len(shapes) < 200 else shapes[:200] + " ..."


def kind(wanted) -> str:
    if isinstance(wanted, tuple):
        return " and ".join(kind(x) for x in wanted)
    many = isinstance(wanted, list) or getattr(wanted, "ndim", 0)
    return "a list or tensor" if many else "a number"


def calls(source: bytes, name: str, stop) -> set[str]:
    """The functions of a file that its function `name` calls, by itself or through others of the
    file; what those in `stop` call in turn is left out."""
    functions = {x.name: x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)}
    found, left = set(), [name] if name in functions else []
    while left:
        used = {x.id for x in ast.walk(functions[left.pop()]) if isinstance(x, ast.Name)}
        used &= functions.keys()
        left += used - found - {*stop}
        found |= used
    return found - {name}
