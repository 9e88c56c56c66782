"""What the front page's pictures are drawn from."""

import random
import sys
from pathlib import Path

import pytest
import torch

import common
import spo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tutorials"))

import pictures  # noqa: E402


@pytest.fixture(scope="module")
def failure(base):
    """(a failure of the base run's warm start with its group, model, tokenizer)"""
    [folder] = (base[0] / "runs" / "warm_start").glob("*/config.json")
    model, tokenizer = common.load_policy(folder.parent, torch.device("cpu"))
    problems = common.load_problems("sums", "train", 40, 0, 2)
    cfg = spo.Config(variant="tree", max_new_tokens=16)
    generator = torch.Generator().manual_seed(0)
    found = pictures.failures(model, tokenizer, problems, cfg, generator)
    # One whose group has a success, so that all its answers have credit.
    for failure in found:
        others = pictures.siblings(failure, model, tokenizer, generator)
        if any(r.reward for r in others):
            return failure, others, model, tokenizer
    raise AssertionError("this policy has no such failure")


def test_failures_have_failed_where_it_is_said(failure):
    found, _, _, tokenizer = failure
    right = common.solution_ids(tokenizer, found.problem)
    assert found.rollout.finished and found.rollout.reward == 0
    assert found.rollout.ids[: found.wrong] == right[: found.wrong]
    assert found.rollout.ids[found.wrong] != right[found.wrong]


def test_grpo_and_mpo_have_the_groups_advantage_on_every_token(failure):
    found, others, model, tokenizer = failure
    grpo, blocks = pictures.group_rows(found, others, model, tokenizer)
    rewards = torch.tensor([[0.0, *[r.reward for r in others]]])
    wanted = common.group_advantages(rewards)[0, 0].item()
    assert grpo.advantages == blocks.advantages == [wanted] * len(found.rollout.ids)
    assert wanted < 0 and len(grpo.pieces) == len(found.rollout.ids)
    assert blocks.starts == list(range(0, len(found.rollout.ids), 5))


def test_a_chain_and_the_last_row_add_up_to_reward_minus_value(failure):
    found, _, model, tokenizer = failure
    chain = pictures.chain_row(found, model, tokenizer, torch.Generator().manual_seed(1))
    ends = [*chain.starts[1:], len(chain.advantages)]
    for start, end in zip(chain.starts, ends):
        assert len({*chain.advantages[start:end]}) == 1
    generator = torch.Generator().manual_seed(2)
    exact = pictures.exact_row(found, model, tokenizer, generator, continuations=64)
    assert len(exact.advantages) == len(exact.pieces) == len(found.rollout.ids)
    assert -1 <= sum(exact.advantages) <= 0  # 0 minus the value of the prompt
    # After the mistake nearly all tries fail, so nothing is left to be lost.
    assert all(abs(advantage) < 0.1 for advantage in exact.advantages[found.wrong + 1 :])


def test_a_reset_keeps_the_steps_before_and_credits_the_rest(failure, monkeypatch):
    found, _, model, tokenizer = failure
    for seed in range(20):  # until one continuation is right and one is wrong
        rows = pictures.reset_rows(found, model, tokenizer, torch.Generator().manual_seed(seed))
        if rows:
            break
    right, wrong = rows
    for row in rows:
        [back] = row.starts
        assert row.advantages[:back] == [None] * back and len(row.pieces) == len(row.advantages)
        assert row.pieces[:back] == pictures.pieces_of(found.rollout.ids, tokenizer)[:back]
    assert right.advantages[-1] > 0 > wrong.advantages[-1]


def test_the_rule(tokenizer):
    """The mistake at a fact learned wrong, not in the first step or the last."""
    facts = frozenset({(4, 2), (3, 1), (7, 4)})
    problem = common.Problem("43+1+2+4", common.solve_sum("43+1+2+4"), "50", checkable=True)

    def holds(question_facts, text):
        ids = [*common.encode(tokenizer, text), tokenizer.eos_token_id]
        answer = spo.Answer(0, common.Rollout([], ids, True), [], [])
        wrong = common.first_wrong_token(ids, problem, tokenizer)
        failed = pictures.Failure(problem, answer, wrong)
        return pictures.in_the_middle(failed, question_facts, tokenizer)

    middle = "43+1=44\n44+2=47\n47+4=51\n#### 51"
    assert holds(facts, middle) and not holds(frozenset({(9, 9)}), middle)
    assert not holds(facts, "43+1=45\n45+2=47\n47+4=51\n#### 51")
    assert not holds(facts, "43+1=44\n44+2=46\n46+4=50\n#### 51")


def test_every_method_has_to_say_something():
    def row(name, advantages):
        return pictures.Row(name, "", ["a"], advantages, [0])

    names = ["GRPO", "MPO", "SPO-chain", "SPO-tree", "Reset", "Reset"]
    assert pictures.all_speak([row(name, [0.5]) for name in names])
    assert not pictures.all_speak([row(name, [0.5]) for name in names[:4]])
    assert not pictures.all_speak([row(name, [float(name != "SPO-tree")]) for name in names])


# ----------------------------------------------------------------------------------------- curves


def written(path: Path, rows=pictures.CHOSEN) -> Path:
    lines = ["table,row,seed,rounds,tokens,seconds,held_out", "mpo,GRPO + mask,0,0,0,0,0.9"]
    for n, row in enumerate(rows):
        name = f'"{row}"' if "," in row else row
        for seed in range(3):
            for rounds in (0, 20, 40, 80):
                rise = 0.2 + (0.3 + 0.1 * n) * (rounds / 80) ** 0.5
                rise += 0.02 * random.Random(f"{row}{seed}{rounds}").random()
                tokens = rounds * (3000 + 4000 * n) + seed
                lines.append(f"spo,{name},{seed},{rounds},{tokens},{rounds / 2},{rise:.4f}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_curves_are_means_with_an_interval_of_95_percent(tmp_path):
    path = tmp_path / "curves.csv"
    path.write_text("table,row,seed,rounds,tokens,seconds,held_out\n"
                    "spo,GRPO + mask,0,20,100,1,0.5\nspo,GRPO + mask,1,20,300,1,0.7\nspo,GRPO + mask,0,0,0,0,0.25\n"
                    "spo,GRPO + mask,0,40,200,2,\nmpo,GRPO + mask,0,20,100,1,0.9\n")  # fmt: skip
    [curve] = pictures.read_curves(path, "tokens")
    assert (curve.label, curve.xs, curve.means) == ("GRPO + mask", [0, 200], [0.25, 0.6])
    assert curve.errors[0] == 0  # of one seed nothing is known
    assert curve.errors[1] == pytest.approx(12.71 * 0.1, rel=1e-6)  # t of one degree of freedom
    assert pictures.read_curves(path, "rounds")[0].xs == [0, 20]
    path.write_text("table,row,seed,rounds,tokens,seconds,held_out\n")
    with pytest.raises(ValueError, match="has none of the rows"):
        pictures.read_curves(path, "rounds")


def test_pictures_without_input_are_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="tutorials/requirements.txt is not installed")
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    monkeypatch.setattr(pictures, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(pictures, "credit_picture", lambda path: path.write_bytes(b""))
    pictures.credit_picture.__name__ = "credit_picture"
    pictures.main()
    assert "curves.png is left out: there is no results/curves.csv" in capsys.readouterr().out
    written(tmp_path / "results" / "curves.csv")
    pictures.main()
    for name in ("flow", "curves"):
        drawn = (tmp_path / "results" / f"{name}.png").read_bytes()
        assert drawn.startswith(b"\x89PNG") and len(drawn) < 150_000
