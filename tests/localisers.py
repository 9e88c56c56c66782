"""Do the localisers of reset_po.py find the mistake? By hand, ten minutes on two cores:

    python tests/localisers.py

Failures on problems that were not trained on, pooled over three seeds, before and after a default
run of reset_po.py (made if it is not under runs/): how often the step named is the first wrong one,
and how often it is that or an earlier one.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import common  # noqa: E402
import reset_po  # noqa: E402

PROBLEMS = 2000


def failures(folder: Path, seed: int) -> list[reset_po.Reset]:
    """The policy's failed answers whose first wrong step is known, not reset yet."""
    model, tokenizer = common.load_policy(folder, "cpu")
    test = common.load_problems("sums", "validation", PROBLEMS, seed)
    states = [common.initial_state(tokenizer, problem) for problem in test]
    generator = torch.Generator().manual_seed(seed)
    rollouts = common.complete(model, tokenizer, states, 1, 80, generator=generator)
    failed = []
    for problem, r in zip(test, rollouts):
        if not r.reward and common.first_wrong_token(r.ids, problem, tokenizer) is not None:
            failed.append((problem, common.Sample(r.prompt, r.ids)))
    common.score(model, [s for _, s in failed], 1.0)
    resets = []
    for problem, s in failed:
        starts = reset_po.step_starts(s.ids, tokenizer)
        truth = reset_po.localise_oracle(s.ids, starts, problem, tokenizer)
        resets.append(reset_po.Reset(problem, s, starts, 0, truth, []))
    return resets


def line(label: str, resets: list[reset_po.Reset]) -> str:
    threshold = reset_po.Config().threshold
    counts = []
    for localise in (
        lambda probs, starts: reset_po.localise_uncertain(probs, starts, threshold),
        reset_po.localise_surprise,
    ):
        named = [r._replace(named=localise(reset_po.probs_of(r.seed), r.starts)) for r in resets]
        counts.append(reset_po.locate_counts(named))
    total = counts[0]["failures"]
    shares = [(counts[0]["hit_chance"] / total, counts[0]["at_or_before_chance"] / total)]
    shares += [(c["hit"] / total, c["at_or_before"] / total) for c in counts]
    cells = [f"{100 * hit:.0f} / {100 * before:.0f} %" for hit, before in shares]
    return f"| {label} | {total:,} | {' | '.join(cells)} |"


def main() -> None:
    before, after = [], []
    for seed in (0, 1, 2):
        folder = Path("runs", f"localisers-{seed}")
        if not (folder / "summary.json").exists():
            flags = ["--seed", str(seed), "--name", folder.name]
            subprocess.run([sys.executable, str(ROOT / "reset_po.py"), *flags], check=True)
        train = common.load_problems("sums", "train", None, seed)
        settings = common.RunConfig(seed=seed)
        model, tokenizer = common.first_policy(settings, torch.device("cpu"))
        before += failures(common.warm_start(settings, train, model, tokenizer), seed)
        after += failures(folder / "checkpoint", seed)
    print("| failures of | | by chance | `uncertain` | `surprise` |\n|---|---|---|---|---|")
    print(line("warm start", before))
    print(line("after the run", after))


if __name__ == "__main__":
    main()
