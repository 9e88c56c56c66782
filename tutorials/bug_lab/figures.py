"""The figures of KEY.md: makes the lab's runs that are not there, and writes the key's tables.

    python tutorials/bug_lab/figures.py          from the project's folder; 15 minutes on one core

figures.json keeps what the tables are made of; a test compares the two.
"""

import json
import re
import sys

from bugs import HERE, SHOWS

sys.path.insert(0, str(HERE.parent))

import curves  # noqa: E402
import lab  # noqa: E402

KEPT = HERE / "figures.json"
KEY = HERE / "KEY.md"
SHOWN = {  # by bug, the metrics of its table
    1: ("loss", "grad_norm"),
    2: ("kl", "clip_fraction", "entropy", "boundaries"),
    3: ("loss", "entropy", "length"),
    4: ("accuracy", "no_signal_reset"),
    5: ("loss", "no_signal", "trained", "sampled_tokens"),
    6: ("no_signal", "accuracy"),
    7: ("kl", "grad_norm", "accuracy"),
    8: ("kl", "kl_ref"),
    9: ("no_signal", "trained", "grad_norm"),
    10: ("hit", "accuracy", "entropy"),
}


def statistics(columns: dict, accuracies: list[float]) -> dict:
    """Of every metric: mean of the first three steps, of all, of the last three, and the lowest."""
    found = {}
    for key, x in columns.items():
        if x and key not in ("step", "lr", "seconds"):
            means = [sum(part) / len(part) for part in (x[:3], x, x[-3:])]
            found[key] = [float(f"{value:.3g}") for value in (*means, min(x))]
    return {"held-out accuracy": accuracies, **found}


def measure(bug: int) -> dict:
    script, flags = SHOWS[bug]
    flags = [*flags.split(), "--tiny"]
    found = {}
    for name, planted in (("healthy", 0), ("bug", bug)):
        folder = lab.run(script, planted, flags)
        found[name] = statistics(curves.columns(folder), curves.accuracies(folder))
    return found


def table(bug: int, kept: dict) -> str:
    """The key's table of a bug."""
    lines = ["| | healthy | with the bug |", "|---|---|---|"]
    healthy, broken = kept["healthy"], kept["bug"]
    ends = [" -> ".join(f"{x:.3f}" for x in run["held-out accuracy"]) for run in (healthy, broken)]
    lines.append(f"| held-out accuracy | {ends[0]} | {ends[1]} |")
    for key in SHOWN[bug]:
        cells = [
            f"{first:g}, {mean:g}, {last:g}; lowest {low:g}"
            for first, mean, last, low in (healthy[key], broken[key])
        ]
        lines.append(f"| `{key}`: first three steps, all, last three | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def with_tables(key: str, kept: dict) -> str:
    """KEY.md with the tables of these figures in it."""
    for bug in SHOWS:
        start, end = f"<!-- figures {bug} -->\n", "\n<!-- end -->"
        before, rest = key.split(start)
        key = before + start + table(bug, kept[str(bug)]) + rest[rest.index(end) :]
    return key


def main() -> None:
    kept = {str(bug): measure(bug) for bug in SHOWS}
    text = json.dumps(kept)
    text = re.sub(r'("(?:healthy|bug|\d+)": \{)', r"\1\n", text).replace("], ", "],\n")
    KEPT.write_text(text + "\n")
    KEY.write_text(with_tables(KEY.read_text(), kept))
    print(f"written: {KEPT.name}, {KEY.name}")


if __name__ == "__main__":
    main()
