"""Comparing answers: numbers, lists and tensors alike."""

import torch


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
