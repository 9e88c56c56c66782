"""Whole runs whose every logged value is counted again (audit.py), with sizes above one, two seeds,
replay, minibatches, epochs, precisions, file data and a given model.
"""

import json

import pytest

from conftest import ROOT
from runs import BASE, given, summary

SMALL = "--steps 3 --show_every 1 --eval_every 2 --save_every 9 --max_grad_norm 0.7".split()
SMALL += (
    "--eval_problems 7 --eval_samples 3 --lr 2e-3 --warmup_updates 4 --max_new_tokens 20".split()
)
AUDITED = [
    "spo --group_size 3 --prompts 4 --batch_size 4 --seed 1",
    "spo --group_size 2 --prompts 4 --batch_size 0 --interval 2 --epochs 2 --kl_coef 0.01 "
    "--mask False",
    "spo --partition trajectory --group_size 4 --prompts 4 --batch_size 8 --dtype bf16 --seed 1 "
    "--model START --warm_start_steps 0",
    "spo --variant tree --segment_tokens 4 --branching 2 3 2 --prompts 3 --batch_size 5 --epochs 2",
    "spo --variant tree --segment_tokens 4 --branching 3 2 --level_weights True --prompts 5",
    "spo --variant tree --segment_tokens 4 --scale_advantages True --prompts 4 --batch_size 0 "
    "--seed 1",
    "spo --variant tree --segment_tokens 4 --batch_size 8 --replay_age 3 --replay_nodes 3 "
    "--replay_total 20 --steps 5",
    "mpo --group_size 4 --prompts 4 --batch_size 4 --epochs 2 --block_size 3 --seed 1 "
    "--temperature 1.5",
    "mpo --group_size 4 --prompts 4 --batch_size 8 --epochs 2 --layout block --weights joint "
    "--scale_eps True --scale_advantages False --lr 2e-2",
    "mpo --group_size 4 --prompts 2 --batch_size 4 --weights uniform --dtype bf16",
    "reset_po --fresh 3 --resets 2 --prompts 4 --batch_size 10 --epochs 2 --clip_eps 0.1 --seed 1",
    "reset_po --fresh 2 --resets 3 --seeds 2 --prompts 4 --batch_size 0 --localiser surprise",
    "reset_po --seed_rule paper --method rrpo --prompts 4 --batch_size 0 --dtype bf16",
    "reset_po --method grpo --prompts 4 --batch_size 8 --gradient_checkpointing True",
]


@pytest.mark.parametrize("number", range(len(AUDITED)))
def test_every_logged_value_is_that_of_what_was_sampled_and_trained(warm, run, number):
    script, *flags = AUDITED[number].split()
    patch = f"import sys; sys.path.append({str(ROOT / 'tests')!r})\n"
    patch += f"import audit; audit.install({script})"
    (start,) = (warm / "runs" / "warm_start").iterdir()
    flags = [str(start) if flag == "START" else flag for flag in flags]
    if own_data := number % 3 == 0:
        rows = [
            (f"{a}+{b}", f"{a}+{b}={a + b}\n#### {a + b}") for a in range(10, 50) for b in (3, 8)
        ]
        lines = [json.dumps(dict(question=q, answer=s)) for q, s in rows]
        (warm / "rows.jsonl").write_text("\n".join(lines))
        flags += ["--data", "rows.jsonl", *given(start)]
        flags += ["--prompt", "Add."] if number != 3 else []
    done = run(*BASE, *SMALL, *flags, patch=patch, script=script)
    assert done.code == 0, done.err[-3000:]
    assert done.out.endswith("audited\n")
    facts = summary(warm / "runs" / script)
    assert own_data or script == "mpo" or "grpo" in flags or facts["failures"] > 0
