"""What the front page's pictures are drawn from."""

import random
import sys
from pathlib import Path

import pytest
import torch

import common
import reset_po
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

    def reset_seeds(model, tokenizer, problems, seeds, *_, right=reset_po.reset_seeds):
        [reset], more = right(model, tokenizer, problems, seeds, *_)
        return [reset._replace(starts=[0, 2, 5], named=2, group=group)], more

    group = [common.Rollout([], [1, 2, 3], True, reward) for reward in (1.0, 0.0)]
    monkeypatch.setattr(reset_po, "reset_seeds", reset_seeds)
    for row in pictures.reset_rows(found, model, tokenizer, torch.Generator()):
        assert row.starts == [2] and row.advantages.count(None) == 2 and len(row.pieces) == 5


def test_the_rule(tokenizer):
    """The mistake at a fact learned wrong, not in the first step or the last."""
    facts = frozenset({(4, 2), (3, 1), (7, 4)})
    problem = common.Problem("43+1+2+4", common.solve_sum("43+1+2+4"), "50", checkable=True)

    shown = []

    def holds(question_facts, text):
        ids = [*common.encode(tokenizer, text), tokenizer.eos_token_id]
        answer = spo.Answer(0, common.Rollout([], ids, True), [], [])
        wrong = common.first_wrong_token(ids, problem, tokenizer)
        failed = pictures.Failure(problem, answer, wrong)
        shown.append(pictures.right_step(failed, tokenizer))
        return pictures.in_the_middle(failed, question_facts, tokenizer)

    middle = "43+1=44\n44+2=47\n47+4=51\n#### 51"
    assert holds(facts, middle) and not holds(frozenset({(9, 9)}), middle)
    assert shown == [("44+2=47", "44+2=46")] * 2
    assert not holds(facts, "43+1=45\n45+2=47\n47+4=51\n#### 51")
    assert not holds(facts, "43+1=44\n44+2=46\n46+4=50\n#### 51")


def test_every_method_has_to_say_something():
    def row(name, advantages):
        return pictures.Row(name, "", ["a"], advantages, [0])

    names = ["GRPO", "MPO", "SPO-chain", "SPO-tree", "Reset", "Reset"]
    assert pictures.all_speak([row(name, [0.5]) for name in names])
    assert not pictures.all_speak([row(name, [0.5]) for name in names[:4]])
    assert not pictures.all_speak([row(name, [float(name != "SPO-tree")]) for name in names])


def test_the_failure_is_the_first_where_most_others_are_right(monkeypatch):
    """And in the middle, and with rows of all methods."""
    rewards = {"none": [0.0] * 7, "few": [1.0] * 3 + [0.0] * 4, "most": [1.0] * 4 + [0.0] * 3}

    def siblings(failure, *_):
        return [common.Rollout([], [], True, r) for r in rewards[failure.split(",")[0]]]

    monkeypatch.setattr(pictures, "failures", lambda *_: found)
    monkeypatch.setattr(pictures, "in_the_middle", lambda failure, *_: "at the end" not in failure)
    monkeypatch.setattr(pictures, "siblings", siblings)
    monkeypatch.setattr(pictures, "credit_rows", lambda failure, *_: failure)
    monkeypatch.setattr(pictures, "all_speak", lambda rows: "silent" not in rows)
    found = ["none", "few", "most, at the end", "most, silent", "most", "most, but later"]
    assert pictures.chosen_failure(None, None, [], None, None) == ("most", "most")
    found = found[:4]
    with pytest.raises(ValueError, match="no failure in the middle"):
        pictures.chosen_failure(None, None, [], None, None)


def test_segments_that_have_a_number():
    row = pictures.Row("", "", ["a"] * 4, [0.1, 0.1, -0.5, -0.5], [0, 2])
    assert pictures.segments(row) == [(0, 2, 0.1), (2, 4, -0.5)]
    assert pictures.segments(row._replace(kind="ratio")) == [(0, 4, 0.1)]
    each = row._replace(kind="token", starts=[0, 1, 2, 3])
    assert pictures.segments(each) == [(2, 3, -0.5), (3, 4, -0.5)]  # the large ones
    assert [pictures.number(x) for x in (0.5, -0.25, 0.0)] == ["+0.50", "\u22120.25", "0"]


def test_the_picture_of_credit_says_what_was_wrong(failure, monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="tutorials/requirements.txt")
    found, others, model, tokenizer = failure
    generator = torch.Generator().manual_seed(0)
    rows = pictures.group_rows(found, others, model, tokenizer)
    rows += [pictures.tree_row(found, tokenizer)]
    rows += [pictures.exact_row(found, model, tokenizer, generator, continuations=4)]
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", lambda figure: None)  # to be looked at
        pictures.draw_credit(found, rows, tokenizer, tmp_path / "it.png")
    figure = pyplot.gcf()
    pyplot.close()
    told = [text.get_text() for text in (*figure.texts, *figure.axes[0].texts)]
    given = tokenizer.decode(found.rollout.ids, skip_special_tokens=True).split("\n")
    right = found.problem.solution.split("\n")
    line = next(n for n, (a, b) in enumerate(zip(given, right)) if a != b)
    assert f"first mistake: {given[line]}, right is {right[line]}" in told
    asked = f"{found.problem.question} = {found.problem.answer}; the policy ends at "
    assert f"{asked}{given[-1].split()[-1]}: reward 0" in told
    assert [text for text in told if text in ("GRPO", "MPO", "SPO-tree", "Near-exact")]


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
    pyplot = pytest.importorskip("matplotlib.pyplot")
    with monkeypatch.context() as patch:
        patch.setattr(pyplot, "close", lambda figure: None)  # to be looked at
        pictures.curves_picture(tmp_path / "a.png")
    ends = [axis.lines[0].get_xdata()[-1] for axis in pyplot.gcf().axes]
    pyplot.close()
    assert ends == [80, 80 * 3000 + 1]  # rounds, and tokens on average
    for name in ("flow", "curves"):
        drawn = (tmp_path / "results" / f"{name}.png").read_bytes()
        assert drawn.startswith(b"\x89PNG") and len(drawn) < 150_000
