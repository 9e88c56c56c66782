"""Resets: groups against a one-by-one process, steps on odd tokenizers, the loss in plain loops."""

import itertools
import math
import random
import re
from functools import lru_cache, wraps

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

import common
import reset_po
from common import BadInput, Problem, Rollout, Sample
from test_models import byte_level_bpe
from tiny_policy import END, HORIZON, PROMPT, all_answers, assert_epochs_use_each_sample_once
from tiny_policy import assert_means_over_the_steps, constant_rate, exact_values, fake_rewards
from tiny_policy import flat_grad, log_prob, reward_of

torch.set_num_threads(1)


# --------------------------------------------------------------------------------------- groups

SPLITS = [(4, 4, 1), (2, 3, 2), (0, 4, 2), (0, 8, 1), (8, 0, 0), (3, 2, 4)]


def config(split, rule="keep", **more) -> reset_po.Config:
    fresh, resets, seeds = split
    size = (fresh + resets * seeds) * 32
    return reset_po.Config(
        fresh=fresh, resets=resets, seeds=seeds, seed_rule=rule, batch_size=size, **more
    )


def one_by_one(outcomes, split, rule):
    """The same groups from a process that draws one answer after the other, as few as it can."""
    fresh, resets, wanted = split
    drawn, seeds, base = 0, [], []

    def draw() -> int:
        nonlocal drawn
        drawn += 1
        return drawn - 1

    if rule == "keep" and fresh:
        while len(base) < fresh:
            base.append(draw())
        seeds = [i for i in base if not outcomes[i]][:wanted]
    else:
        while len(seeds) < wanted and drawn < 12:
            i = draw()
            (seeds if not outcomes[i] else base).append(i)
    while len(base) < fresh:
        base.append(draw())
    joining = [draw() for _ in range(resets * (wanted - len(seeds)))]  # new ones, never the tries
    return drawn, seeds, base[:fresh] + joining


@pytest.mark.parametrize("rule", ["keep", "paper"])
@pytest.mark.parametrize("split", SPLITS)
def test_groups_are_those_of_drawing_one_by_one_without_a_draw_too_many(split, rule):
    cfg, rng = config(split, rule), random.Random(str(split))
    for _ in range(300):
        p = rng.choice((0.05, 0.5, 0.9, 1.0))
        outcomes = [float(rng.random() < p) for _ in range(60)]
        rewards, rounds = [], 0
        while (plan := reset_po.plan_groups(rewards, cfg)).more:
            rewards += outcomes[len(rewards) : len(rewards) + plan.more]
            rounds += 1
        assert (len(rewards), plan.seeds, plan.base) == one_by_one(outcomes, split, rule)
        assert rounds <= 13
        total = len(plan.base) + split[1] * len(plan.seeds)
        assert total == cfg.rollouts == split[0] + split[1] * split[2]


def test_groups_by_hand():
    cfg = config((4, 4, 1))
    assert reset_po.plan_groups([], cfg).more == 4
    assert reset_po.plan_groups([1, 0, 0, 1], cfg) == (0, [1], [0, 1, 2, 3])
    assert reset_po.plan_groups([1, 1, 1, 1], cfg).more == 4
    assert reset_po.plan_groups([1, 1, 1, 1, 0, 1, 1, 0], cfg) == (0, [], list(range(8)))
    cfg = config((4, 4, 1), "paper")
    assert reset_po.plan_groups([], cfg).more == 5
    assert reset_po.plan_groups([1, 0, 0, 1, 1], cfg) == (0, [1], [0, 2, 3, 4])
    assert reset_po.plan_groups([1] * 5, cfg).more == 1
    assert reset_po.plan_groups([1] * 11 + [0], cfg) == (0, [11], [0, 1, 2, 3])
    assert reset_po.plan_groups([1] * 12, cfg) == (4, [], [0, 1, 2, 3])
    late = [1] * 12 + [0, 1, 0, 1]  # the failures of these are no seeds, but give a signal
    assert reset_po.plan_groups(late, cfg) == (0, [], [0, 1, 2, 3, 12, 13, 14, 15])


def test_the_papers_rule_skews_the_base_group_towards_success():
    """.50 -> .617 expected correct, the figure that the rule's arithmetic gives for G = 4."""

    def share_correct(rule):
        cfg = config((4, 4, 1), rule)

        @lru_cache(None)
        def expected(rewards) -> float:  # correct answers in the base group's first four
            plan = reset_po.plan_groups(list(rewards), cfg)
            if not plan.more:
                return sum(rewards[i] for i in plan.base[:4]) / 4
            ends = list(itertools.product((0.0, 1.0), repeat=plan.more))
            return sum(expected(rewards + end) for end in ends) / len(ends)

        return expected(())

    assert share_correct("paper") == pytest.approx(0.617, abs=5e-4)
    assert share_correct("keep") == 0.5


def test_answers_are_drawn_until_every_problem_is_settled(monkeypatch):
    rewards = {"a": [1, 0, 1, 1], "b": [1] * 8, "c": [0] * 4}
    asked = []

    def fake(model, tokenizer, states, n, **options):
        assert options.pop("compute") == common.Compute()
        assert n == 1 and options == dict(max_new_tokens=80, temperature=0.7, generator="g")
        asked.append([state[0][0] for state in states])
        taken = [float(rewards[state[0][0]].pop(0)) for state in states]
        return [Rollout(state[0], [1], True, reward) for state, reward in zip(states, taken)]

    monkeypatch.setattr(common, "complete", fake)
    cfg = config((4, 4, 1), temperature=0.7)
    states = [([name], [], "") for name in "abc"]
    drawn, plans = reset_po.draw_answers(None, None, states, cfg, "g")
    assert asked == [["a"] * 4 + ["b"] * 4 + ["c"] * 4, ["b"] * 4]
    assert [len(rollouts) for rollouts in drawn] == [4, 8, 4]
    assert all(r.prompt == [name] for name, rollouts in zip("abc", drawn) for r in rollouts)
    assert [plan.seeds for plan in plans] == [[1], [], [0]]


# ---------------------------------------------------------------------------------------- steps


def fused_tokenizer(special=()) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges fuse line breaks with what stands on either side of them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), (".", "Ċ"), ("Ċ", "4"), ("5", "Ċ"), ("5Ċ", "3"), ("=", "3")]
    merges += [("Ġ", "S"), ("ĠS", "o")]
    vocab = {char: i for i, char in enumerate(alphabet)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def test_steps_of_the_built_in_task_are_its_lines(tokenizer):
    text = "31+4=35\n35-7=28\n#### 28"
    ids = [*common.encode(tokenizer, text), tokenizer.eos_token_id]
    assert reset_po.step_starts(ids, tokenizer) == [0, 8, 16]
    assert reset_po.step_starts(ids[:-1], tokenizer) == [0, 8, 16]
    assert reset_po.step_starts([*ids[:16], ids[-1]], tokenizer) == [0, 8]  # no step but the end
    assert reset_po.step_starts(ids, tokenizer, max_steps=2) == [0, 8]
    assert reset_po.step_starts(ids, tokenizer, delimiter="=") == [0, 5, 13]
    assert reset_po.step_starts(ids, tokenizer, delimiter="no such") == [0]
    assert reset_po.step_starts(ids[-1:], tokenizer) == [0]


def test_a_fused_line_break_belongs_to_the_step_whose_characters_it_holds():
    fused = fused_tokenizer()
    ids = common.encode(fused, "1.\n2\n45\n3")
    assert [fused.decode([id]) for id in ids] == ["1", ".\n", "2", "\n4", "5\n3"]
    assert reset_po.step_starts(ids, fused) == [0, 2, 3, 4]
    ids = common.encode(fused, "1\n\n2\n \n3")
    assert [fused.decode([id]) for id in ids][1] == "\n\n"
    assert reset_po.step_starts(ids, fused) == [0, 2, 6]  # blank lines are no steps


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over characters that spells unknown ones in bytes, each a token: as Llama 2 does."""
    known = [f"<0x{i:02X}>" for i in range(256)] + list("453.= So\n")
    vocab = {token: i for i, token in enumerate(dict.fromkeys(known))}
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<0x00>")
    )
    decoders = [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    inner.decoder = tokenizers.decoders.Sequence(decoders)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


@pytest.mark.parametrize("delimiter", ["\n", "\n\n", ". ", "。"])
@pytest.mark.parametrize("kind", ["bytes", "fused", "fallback"])
def test_a_reset_keeps_no_character_of_its_step_and_all_it_can_before(kind, delimiter):
    kinds = dict(bytes=common.build_tokenizer, fused=fused_tokenizer, fallback=fallback_tokenizer)
    tokenizer = kinds[kind]()
    rng = random.Random(0)
    for _ in range(60):
        parts = ["4", "5", "3", ".", "=3", " So", "\n", "\n\n", "。", "é", ". ", "🍎"]
        text = "".join(rng.choices(parts, k=25))
        ids = common.encode(tokenizer, text)
        starts = reset_po.step_starts(ids, tokenizer, delimiter, max_steps=99)
        pieces, at, begins = text.split(delimiter), 0, []
        for piece in pieces:
            if piece.strip():
                begins.append(at)
            at += len(piece) + len(delimiter)
        holders = []  # for each step, the last token before which nothing of the step stands
        for c in begins[1:]:
            assert text[:c].endswith(delimiter)
            beginnings = [tokenizer.decode(ids[:t]) for t in range(len(ids))]
            whole = [t for t, done in enumerate(beginnings) if text[:c].startswith(done)]
            holders.append(max(whole))
        assert starts == sorted({0, *holders})


def test_an_end_token_that_only_the_checkpoint_knows_is_no_step(tokenizer):
    ids = common.encode(tokenizer, "1\n2\n3")  # as if "3" ended answers
    assert reset_po.step_starts(ids, tokenizer) == [0, 2, 4]
    assert reset_po.step_starts(ids, tokenizer, stops={ids[-1]}) == [0, 2]


def test_a_special_token_can_end_a_step():
    tokenizer = fused_tokenizer(["</step>"])
    mark = tokenizer.convert_tokens_to_ids("</step>")
    one, two = common.encode(tokenizer, "one 1"), common.encode(tokenizer, "two")
    ids = [*one, mark, *two, mark, *one, tokenizer.eos_token_id]
    assert reset_po.step_starts(ids, tokenizer, "</step>") == [0, 6, 10]
    assert reset_po.step_starts([*one, mark], tokenizer, "</step>") == [0]


def by_prefixes(ids, tokenizer, delimiter="\n", max_steps=20, stops=frozenset()) -> list[int]:
    """What step_starts comes to, from the text of every prefix: slow, and nothing to get wrong."""
    if ids and ids[-1] in {*tokenizer.all_special_ids, *stops}:
        ids = ids[:-1]

    def text(count: int) -> str:
        return tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False).rstrip("\ufffd")

    begins, at = [], 0
    for piece in text(len(ids)).split(delimiter):
        if piece.strip():
            begins.append(at)
        at += len(piece) + len(delimiter)
    lengths = [len(text(t)) for t in range(len(ids) + 1)]
    starts = {0}
    for c in begins[1:]:
        t = next(t for t, length in enumerate(lengths) if length >= c)
        starts.add(t if lengths[t] == c else t - 1)
    return sorted(starts)[:max_steps]


def byte_fallback():
    """As Llama 2's: characters and a few words, all else in bytes, a line break among them."""
    letters = {char for char in "Tom has 3 apples and 4 more?+-=#0123456789" if char != " "}
    names = [
        "<e>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *sorted(letters),
    ]
    names += ["\u2581T", "om"]
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={name: i for i, name in enumerate(names)}, byte_fallback=True, fuse_unk=True,
            merges=[("\u2581", "T"), ("o", "m")], unk_token="<unk>",
        )
    )  # fmt: skip
    normal, decode = tokenizers.normalizers, tokenizers.decoders
    spaces = [normal.Prepend("\u2581"), normal.Replace(" ", "\u2581")]
    bpe.normalizer = normal.Sequence(spaces)
    steps = [decode.Replace("\u2581", " "), decode.ByteFallback(), decode.Fuse()]
    bpe.decoder = decode.Sequence([*steps, decode.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>", unk_token="<unk>")


READERS = dict(
    bytes=common.build_tokenizer, bpe=lambda: byte_level_bpe("qwen2"), fallback=byte_fallback
)
PIECES = [
    "\n",
    "\n\n",
    " ",
    "\u20ac",
    "\U0001f34e",
    "\u00e9",
    "\u7f8e",
    "a",
    "bc",
    "Tom",
    "1",
    "+",
    "\u3000",
]
PIECES += ["\ufffd", "\r\n", "#### 7", "31+4=35\n"]


@pytest.mark.parametrize("kind", READERS)
def test_steps_are_those_that_the_text_of_every_prefix_gives(kind):
    tokenizer, rng = READERS[kind](), random.Random(0)
    rows = []
    if kind == "fallback":  # bytes of four whole characters, which one that is torn undoes
        names = ["<0xE2>", "<0x82>", "<0xAC>"] * 4 + ["<0xE2>", "=", "a", "=", "d"]
        rows.append(tokenizer.convert_tokens_to_ids(names))
        assert tokenizer.decode(rows[0]) == "\ufffd" * 13 + "=a=d"
    for i in range(400):
        ids = common.encode(tokenizer, "".join(rng.choices(PIECES, k=rng.randint(0, 40))))
        rows.append(ids[: rng.randint(0, len(ids))] if i % 2 else ids)  # a character may be torn
        rows.append([rng.randrange(len(tokenizer)) for _ in range(rng.randint(0, 30))])
    assert max(map(len, rows)) > 64
    for ids in rows:
        for delimiter, most in (("\n", 99), ("\n", 20), ("=", 99), ("\n\n", 3)):
            given = reset_po.step_starts(ids, tokenizer, delimiter, most)
            assert given == by_prefixes(ids, tokenizer, delimiter, most), (ids, delimiter)
    text = "Tom has 3.\n" * 40
    assert len(reset_po.step_starts(common.encode(tokenizer, text), tokenizer, "\n", 99)) == 40
    assert len(reset_po.step_starts(common.encode(tokenizer, text), tokenizer)) == 20


@pytest.mark.parametrize("kind", READERS)
def test_steps_are_found_in_time_linear_in_the_answers_length(kind, monkeypatch):
    """Counted, not timed: how many ids are decoded, over and over. Every prefix would be T / 2."""
    tokenizer = READERS[kind]()
    decode, read = type(tokenizer).decode, []

    def spy(self, ids, **options):
        read.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", spy)
    text = "Tom has 3 apples and 4 more.\n31+4=35\n\u7f8e\U0001f34e\n" * 400
    for count in (512, 2048):
        read.clear()
        ids = common.encode(tokenizer, text)[:count]
        assert len(reset_po.step_starts(ids, tokenizer, "\n", count)) > count / 40
        assert sum(read) < 16 * count


# ----------------------------------------------------------------------------------- localisers

STARTS = [0, 3, 5]
PROBS = [1.0, 0.95, 0.9, 0.85, 0.99, 0.2, 0.7]


def test_localisers_by_hand():
    assert reset_po.localise_surprise(PROBS, STARTS) == 3
    assert reset_po.localise_surprise([0.5, 0.4, 0.9, 0.4, 1, 1, 1], STARTS) == 1  # the first
    assert reset_po.localise_uncertain(PROBS, STARTS, 0.9) == 2  # strictly below
    assert reset_po.localise_uncertain(PROBS, STARTS, 0.96) == 1
    assert reset_po.localise_uncertain(PROBS, STARTS, 0.5) == 3
    assert reset_po.localise_uncertain(PROBS, STARTS, 0.1) == 3  # none: the least likely
    assert reset_po.localise_uncertain([1.0, 0.9, 1, 1, 0.95, 1, 1], STARTS, 0.8) == 1


def test_random_steps_are_uniform_and_follow_the_generator():
    generator = torch.Generator().manual_seed(0)
    named = [reset_po.localise_random(STARTS, generator) for _ in range(3000)]
    assert {k: named.count(k) > 900 for k in named} == {1: True, 2: True, 3: True}
    again = torch.Generator().manual_seed(0)
    assert [reset_po.localise_random(STARTS, again) for _ in range(3000)] == named
    assert reset_po.localise_random([0], generator) == 1


def test_the_oracle_names_the_step_of_the_first_wrong_token(tokenizer):
    problem = Problem("31+4-7", "31+4=35\n35-7=28\n#### 28", "28", checkable=True)

    def of(text, end=True):
        ids = common.encode(tokenizer, text) + [tokenizer.eos_token_id] * end
        starts = reset_po.step_starts(ids, tokenizer)
        return reset_po.localise_oracle(ids, starts, problem, tokenizer)

    assert of("31+4=36\n36-7=29\n#### 29") == 1
    assert of("31+4=35\n35-7=29\n#### 29") == 2
    assert of("31+4=35\n35-7=28\n#### 29") == 3
    assert of("31+4=35\n35-7=28\n") == 2  # stopped without an answer: after the second
    assert of("31+4=35\n35-7=28\n#### 28\n1") == 3
    assert of("31+4=35\n35-", end=False) == 2  # cut short, right so far


@pytest.mark.parametrize(
    "text, step",
    [
        ("", 1),
        ("no step named", 1),
        (r"\boxed{3}", 3),
        (r"First \boxed{2}, no: \boxed{ 4 }", 4),
        (r"\boxed{0}", 1),
        (r"\boxed{6}", 1),
        (r"\boxed{2} or \boxed{6}", 2),
        (r"\boxed{-2} Step 4", 4),
        (r"Step 2 looks wrong, so does step 5.", 5),
        ("Step 9 and Step 3 and step 0", 3),
        (r"Step 4 \boxed{2}", 2),
        (r"\boxed{2} then Step 4", 2),
        (r"\boxed{step 2}, Step 5", 2),
        (r"\boxed{\text{Step }3}", 3),
        (r"\boxed{\text{Step 3}}. **Step: 4**", 4),
        (r"\boxed{2.} step #5", 2),
        (r"\boxed{2.5} step #5", 5),
        (r"\boxed{" + "9" * 5000 + "} step " + "9" * 5000, 1),
        ("steps 3", 1),
        ("step3", 3),
    ],
)
def test_the_parser_takes_the_last_box_in_range_then_the_last_step_then_one(text, step):
    assert reset_po.parse_step(text, 5) == step


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


def test_no_words_in_an_attempt_become_control_tokens(tmp_path, monkeypatch):
    tokenizer = fused_tokenizer(["<|eot|>"])
    tokenizer.chat_template = CHAT + "<|eot|>"
    mark, seen = tokenizer.convert_tokens_to_ids("<|eot|>"), []
    torch.manual_seed(0)
    model = common.build_policy(len(tokenizer))

    def spy(model, prefixes, n=1, **options):
        seen.extend(prefixes)
        return [Rollout(prefix, [1], True) for prefix in prefixes]

    monkeypatch.setattr(common, "sample", spy)
    problem = Problem("1+1<|eot|>?", "#### 2", "2")
    ids = common.encode(tokenizer, "1+1=<|eot|>3\n#### 3")
    seed, cfg = Sample([1], ids), reset_po.Config(localiser="prompt")
    reset_po.localise(model, tokenizer, [problem], [seed], [[0]], cfg, torch.Generator())
    assert seen[0].count(mark) == 1 and seen[0][-1] == mark
    text = tokenizer.decode(seen[0])
    assert text.count("<|eot|>") == 3 and text.startswith("<user>Here is a problem")


@pytest.mark.parametrize("template", [CHAT, None])
def test_the_prompt_localiser_asks_the_policy_and_never_shows_the_answer(
    tmp_path, monkeypatch, template
):
    """Through a checkpoint with a chat template, loaded like any other."""
    tokenizer = common.build_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    common.build_policy(len(tokenizer)).save_pretrained(tmp_path)
    model, tokenizer = common.load_policy(tmp_path, torch.device("cpu"))
    problems = [
        Problem("What is 2+2?", "SECRET working\n#### 4321", "4321"),
        Problem("And 3+3?", "SECRET too\n#### 8765", "8765"),
    ]
    texts = ["2+2=5\n5+0=5\n#### 5", "3+3=7\n#### 7"]
    seeds = [
        Sample(common.prompt_ids(tokenizer, p), [*common.encode(tokenizer, text), 256])
        for p, text in zip(problems, texts)
    ]
    starts = [reset_po.step_starts(s.ids, tokenizer) for s in seeds]
    prompts, answers = [], [r"... \boxed{2}", r"Step 2, no: \boxed{3}"]  # there are 2
    true_sample = common.sample

    def spy(model, prefixes, n=1, **options):
        prompts.extend(tokenizer.decode(prefix) for prefix in prefixes)
        assert n == 1 and options["temperature"] == 0.3 and options["generator"] is generator
        assert options["max_new_tokens"] == [8, 8] and options["eos"] == {256}
        rollouts = true_sample(model, prefixes, n, **options)
        assert all(r.prompt == prefix for r, prefix in zip(rollouts, prefixes))
        for r, text in zip(rollouts, answers):
            r.ids = common.encode(tokenizer, text)
        return rollouts

    monkeypatch.setattr(common, "sample", spy)
    generator = torch.Generator().manual_seed(0)
    cfg = reset_po.Config(localiser="prompt", localiser_tokens=8)
    named, tokens = reset_po.localise(model, tokenizer, problems, seeds, starts, cfg, generator)
    assert named == [2, 2] and tokens == sum(map(len, answers))
    for prompt, problem, text in zip(prompts, problems, texts):
        assert problem.question in prompt and "SECRET" not in prompt
        assert problem.answer not in prompt and "\\boxed{" in prompt
        for k, line in enumerate(text.split("\n"), 1):
            assert f"Step {k}: {line}\n" in prompt
        assert f"from 1 to {text.count(chr(10)) + 1}" in prompt and "wrong" in prompt
        asked = re.fullmatch(r"<user>(.*)</user><assistant>", prompt, re.DOTALL)
        assert bool(asked) == bool(template)


def test_a_question_that_leaves_no_room_to_localise_goes_back_to_the_first_step(monkeypatch):
    tokenizer = common.build_tokenizer()
    torch.manual_seed(0)
    model = common.build_policy(len(tokenizer))
    model.config.max_position_embeddings = 64  # less than the localisation prompt takes
    problem = Problem("1+1?", "#### 2", "2")
    ids = common.encode(tokenizer, "1+1=3\n#### 3")
    seed = Sample(common.prompt_ids(tokenizer, problem), ids)
    cfg = reset_po.Config(localiser="prompt")
    generator = torch.Generator()
    given = reset_po.localise(model, tokenizer, [problem], [seed], [[0, 6]], cfg, generator)
    assert given == ([1], 0)


def test_nothing_the_policy_is_shown_in_a_step_holds_the_reference_answer(monkeypatch):
    """All prefixes that reach the sampler, by any localiser: prompts, kept steps, critiques."""
    tokenizer, seen, compute = common.build_tokenizer(), [], common.Compute()
    torch.manual_seed(0)
    model = common.build_policy(len(tokenizer))
    true_sample = common.sample

    def spy(model, prefixes, *args, **options):
        assert options["compute"] is compute  # the run's precision
        seen.extend(tokenizer.decode(prefix) for prefix in prefixes)
        return true_sample(model, prefixes, *args, **options)

    monkeypatch.setattr(common, "sample", spy)
    problem = Problem("1+1?", "REFERENCE\n#### 987654", "987654", checkable=True)
    for localiser in ("prompt", "uncertain", "surprise", "random", "oracle"):
        cfg = config((2, 2, 1), localiser=localiser, max_new_tokens=12, localiser_tokens=12)
        generator = torch.Generator().manual_seed(0)
        drawn, plans = reset_po.draw_answers(
            model, tokenizer, [common.initial_state(tokenizer, problem)] * 3, cfg, generator,
            compute,
        )  # fmt: skip
        assert all(plan.seeds for plan in plans)
        before = len(seen)
        credit = reset_po.assign_credit(
            model, tokenizer, [problem] * 3, drawn, plans, cfg, generator, compute
        )
        assert len(seen) == before + (6 if localiser == "prompt" else 3)
        critique = [text for text in seen[before:] if "Step 1:" in text]
        assert len(critique) == (3 if localiser == "prompt" else 0)
        assert (credit.tokens["localiser"] > 0) == (localiser == "prompt")
        for group in credit.base + credit.suffixes:  # and no critique is trained on
            for s in group:
                assert "Step 1:" not in tokenizer.decode([*s.context, *s.ids])
    assert not any("REFERENCE" in text or "987654" in text for text in seen)


@pytest.mark.parametrize("name", ["uncertain", "surprise", "oracle"])
def test_the_localiser_of_the_config_is_the_one_that_is_asked(monkeypatch, name):
    asked = []
    for other in ("uncertain", "surprise", "oracle", "random"):

        def fake(*args, other=other):
            asked.append((other, args))
            return 2

        monkeypatch.setattr(reset_po, f"localise_{other}", fake)
    s = Sample([1], [5, 6], old_logprobs=[math.log(0.25), math.log(0.5)])
    cfg = reset_po.Config(localiser=name, threshold=0.4)
    assert reset_po.localise(None, "tok", ["p"], [s], [[0, 1]], cfg, "g") == ([2], 0)
    ((used, args),) = asked
    assert used == name
    if name == "oracle":
        assert args == ([5, 6], [0, 1], "p", "tok")
    else:
        assert args[0] == pytest.approx([0.25, 0.5]) and args[1] == [0, 1]
        assert args[2:] == ((0.4,) if name == "uncertain" else ())
    cfg = reset_po.Config(method="rrpo")
    assert reset_po.localise(None, "tok", ["p"], [s], [[0, 1]], cfg, "g") == ([2], 0)
    assert asked[1] == ("random", ([0, 1], "g"))


def test_auto_asks_models_with_a_chat_template_and_watches_the_others(tokenizer):
    cfg = reset_po.Config()
    assert reset_po.pick_localiser(cfg, tokenizer) == "uncertain"
    tokenizer.chat_template = CHAT
    assert reset_po.pick_localiser(cfg, tokenizer) == "prompt"
    assert reset_po.pick_localiser(reset_po.Config(localiser="oracle"), tokenizer) == "oracle"
    assert reset_po.pick_localiser(reset_po.Config(method="rrpo"), tokenizer) == "random"


# --------------------------------------------------------------------------------------- resets


def two_failures(tokenizer):
    problems = [
        Problem("31+4-7", "31+4=35\n35-7=28\n#### 28", "28", checkable=True),
        Problem("50+1", "50+1=51\n#### 51", "51", checkable=True),
    ]
    texts = ["31+4=35\n35-7=29\n#### 29", "50+1=52\n#### 52"]
    seeds = [
        Sample(common.prompt_ids(tokenizer, p), [*common.encode(tokenizer, text), 256])
        for p, text in zip(problems, texts)
    ]
    return problems, seeds


def test_a_reset_keeps_the_steps_before_the_named_one_and_prefills_them_once(
    tokenizer, monkeypatch
):
    torch.manual_seed(0)
    model = common.build_policy(len(tokenizer))
    problems, seeds = two_failures(tokenizer)
    prefills, true_forward = [], model.base_model.forward

    @wraps(true_forward)
    def spy(ids, **options):
        if ids.shape[1] > 1:
            prefills.append(ids.tolist())
        return true_forward(ids, **options)

    monkeypatch.setattr(model.base_model, "forward", spy)
    budgets, true_sample = [], common.sample

    def sample(model, prefixes, n, *, max_new_tokens, **options):
        budgets.append((n, max_new_tokens))
        assert options["temperature"] == 0.7 and options["generator"] is generator
        return true_sample(model, prefixes, n, max_new_tokens=max_new_tokens, **options)

    monkeypatch.setattr(common, "sample", sample)
    rewarded = []

    def response_reward(ids, finished, answer, _):
        rewarded.append((ids, answer))
        return 1.0

    monkeypatch.setattr(common, "response_reward", response_reward)
    cfg = reset_po.Config(
        localiser="oracle", resets=3, max_new_tokens=30, batch_size=224, temperature=0.7
    )
    generator = torch.Generator().manual_seed(0)
    resets, tokens = reset_po.reset_seeds(model, tokenizer, problems, seeds, cfg, generator)
    assert [(r.named, r.truth, r.starts) for r in resets] == [(2, 2, [0, 8, 16]), (1, 1, [0, 8])]
    assert tokens == 0 and budgets == [(3, [22, 30])]
    wanted = [[*seeds[0].context, *seeds[0].ids[:8]], seeds[1].context]
    for reset, prefix in zip(resets, wanted):
        assert [r.prompt for r in reset.group] == [prefix] * 3
    assert resets[1].group[0].prompt == seeds[1].context  # a reset to step 1: the bare prompt
    ((a, b),) = prefills  # one batch of one row per reset, however many continuations
    width = max(map(len, wanted))  # padded on the left
    assert sorted([a, b]) == sorted([0] * (width - len(prefix)) + prefix for prefix in wanted)
    for (ids, answer), reset in zip(rewarded, [r for r in resets for _ in range(3)]):
        kept = reset.seed.ids[: reset.starts[reset.named - 1]]
        assert ids[: len(kept)] == kept and answer == reset.problem.answer
    assert [ids for ids, _ in rewarded][0][8:] == resets[0].group[0].ids


def test_steps_are_those_of_the_config(tokenizer):
    torch.manual_seed(0)
    model = common.build_policy(len(tokenizer))
    problems, seeds = two_failures(tokenizer)
    generator = torch.Generator().manual_seed(0)
    for more, starts in ((dict(delimiter="="), [0, 5, 13]), (dict(max_steps=2), [0, 8])):
        cfg = reset_po.Config(localiser="oracle", max_new_tokens=30, **more)
        arguments = (problems[:1], seeds[:1], cfg, generator)
        (reset,), _ = reset_po.reset_seeds(model, tokenizer, *arguments)
        assert reset.starts == starts
    assert reset_po.Config(delimiter=r"\n\n").delimiter == "\n\n"
    model.generation_config.eos_token_id = [256, common.encode(tokenizer, "9")[0]]
    seeds[0].ids = common.encode(tokenizer, "31+4=35\n9")  # one more id ends its answers
    cfg = reset_po.Config(localiser="oracle", max_new_tokens=30)
    (reset,), _ = reset_po.reset_seeds(model, tokenizer, problems[:1], seeds[:1], cfg, generator)
    assert reset.starts == [0]


def test_a_reset_to_the_first_step_is_a_fresh_group(tokenizer):
    torch.manual_seed(0)
    model = common.build_policy(len(tokenizer))
    problems, seeds = two_failures(tokenizer)
    cfg = reset_po.Config(localiser="oracle", max_new_tokens=20)
    generator = torch.Generator().manual_seed(3)
    (reset,), _ = reset_po.reset_seeds(model, tokenizer, problems[1:], seeds[1:], cfg, generator)
    state = common.initial_state(tokenizer, problems[1])
    fresh = common.complete(
        model, tokenizer, [state], 4, 20, generator=torch.Generator().manual_seed(3)
    )
    assert reset.named == 1 and reset.group == fresh


def test_without_seeds_nothing_is_sampled():
    assert reset_po.reset_seeds(None, None, [], [], reset_po.Config(), None) == ([], 0)


# --------------------------------------------------------------------------------------- credit


def settled(model, monkeypatch, rewards, cfg):
    """assign_credit on given answers of the enumerated policy, whose every token is a step."""
    monkeypatch.setattr(reset_po, "step_starts", lambda ids, *_: list(range(len(ids))))
    monkeypatch.setattr(common, "first_wrong_token", lambda *_: None)
    fake_rewards(monkeypatch)
    rng, drawn = random.Random(0), []
    for row in rewards:
        pairs = zip(rng.sample(all_answers(), len(row)), row)
        drawn.append([Rollout(PROMPT, list(answer), True, r) for answer, r in pairs])
    plans = [reset_po.plan_groups([r.reward for r in rollouts], cfg) for rollouts in drawn]
    problems = [Problem("", "", "")] * len(rewards)
    generator = torch.Generator().manual_seed(0)
    given = reset_po.assign_credit(model, None, problems, drawn, plans, cfg, generator)
    with pytest.raises(ValueError, match="zip"):  # as many of each
        reset_po.assign_credit(model, None, problems[1:], drawn, plans, cfg, generator)
    return drawn, plans, given


def test_advantages_stay_in_their_group(model, monkeypatch):
    cfg = config((4, 4, 1), localiser="surprise", max_new_tokens=HORIZON, temperature=0.8)
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0] * 8, [0.0] * 4]
    drawn, plans, credit = settled(model, monkeypatch, rewards, cfg)
    assert [len(group) for group in credit.base] == [4, 8, 4]
    assert [len(group) for group in credit.suffixes] == [4, 4]
    std = math.sqrt(3) / 4
    wanted = [[0.75 / std, *[-0.25 / std] * 3], [0.0] * 8, [0.0] * 4]
    entropies = []
    for rollouts, group, advantages in zip(drawn, credit.base, wanted):
        for r, s, a in zip(rollouts, group, advantages):
            assert (s.context, s.ids) == (PROMPT, r.ids)
            assert s.advantages == pytest.approx([a] * len(r.ids), abs=1e-6)
            assert s.old_logprobs == pytest.approx(log_prob(model, r.ids, 0.8).tolist(), abs=1e-5)
            logits = model(torch.tensor([[*PROMPT, *r.ids]])).logits[0, 1:-1] / 0.8
            entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    assert credit.entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
    for reset, group, (i, seed) in zip(credit.resets, credit.suffixes, [(0, 1), (2, 0)]):
        failed = drawn[i][seed].ids
        assert reset.seed.ids == failed and drawn[i][seed].reward == 0
        probs = log_prob(model, failed, 0.8)
        assert reset.named == 1 + probs.argmin().item()
        rewards = [reward_of(failed[: reset.named - 1] + s.ids) for s in group]
        assert [r.reward for r in reset.group] == rewards
        mean = sum(rewards) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 4)
        for s, r in zip(group, rewards):
            a = (r - mean) / std if std else 0.0
            assert s.context == [*PROMPT, *failed[: reset.named - 1]]
            assert s.advantages == pytest.approx([a] * len(s.ids), abs=1e-6)
            assert s.old_logprobs is None  # no ratio, so nothing to score
    total = sum(len(r.ids) for rollouts in drawn for r in rollouts)
    suffixes = sum(len(s.ids) for group in credit.suffixes for s in group)
    assert credit.tokens == dict(base=total, seed=0, localiser=0, reset=suffixes)


def test_the_papers_seed_is_not_trained_on_and_its_cost_is_counted(model, monkeypatch):
    cfg = config((2, 2, 1), "paper", localiser="surprise", max_new_tokens=HORIZON)
    drawn, plans, credit = settled(model, monkeypatch, [[1.0, 0.0, 1.0]], cfg)
    assert [s.ids for s in credit.base[0]] == [drawn[0][0].ids, drawn[0][2].ids]
    assert not any(a for s in credit.base[0] for a in s.advantages)  # both right: the seed is out
    assert credit.resets[0].seed.ids == drawn[0][1].ids
    assert credit.tokens["seed"] == len(drawn[0][1].ids)
    assert credit.tokens["base"] == len(drawn[0][0].ids) + len(drawn[0][2].ids)


def test_without_a_fresh_group_only_resets_are_trained_on(model, monkeypatch):
    cfg = config((0, 2, 2), localiser="surprise", max_new_tokens=HORIZON)
    drawn, plans, credit = settled(model, monkeypatch, [[0.0, 1.0, 0.0]], cfg)
    assert credit.base == [] and [len(group) for group in credit.suffixes] == [2, 2]
    assert [r.seed.ids for r in credit.resets] == [drawn[0][0].ids, drawn[0][2].ids]
    assert credit.tokens["seed"] == sum(len(r.ids) for r in drawn[0])


def test_with_the_clip_the_suffixes_are_scored(model, monkeypatch):
    sizes = dict(max_new_tokens=HORIZON, clip_eps=0.2, temperature=0.8)
    cfg = config((2, 2, 1), localiser="surprise", **sizes)
    _, _, credit = settled(model, monkeypatch, [[1.0, 0.0]], cfg)
    (group,), (reset,) = credit.suffixes, credit.resets
    for s in group:
        kept = reset.seed.ids[: reset.named - 1]
        whole = log_prob(model, [*kept, *s.ids], 0.8).tolist()
        assert s.old_logprobs == pytest.approx(whole[len(kept) :], abs=1e-5)


# ------------------------------------------------------------------------------- loss and update


def samples_with_prefixes(model, seed=0) -> list[Sample]:
    """Answers, of which some begin in the context: base and reset samples of several lengths."""
    rng, samples = random.Random(seed), []
    for answer in rng.sample(all_answers(), 9):
        kept = rng.randrange(len(answer))
        ids, advantage = list(answer[kept:]), rng.choice((-2.0, -0.5, 1.0))
        old = log_prob(model, answer).tolist()[kept:]
        moved = [p + rng.uniform(-0.5, 0.5) for p in old]
        samples.append(Sample([*PROMPT, *answer[:kept]], ids, [advantage] * len(ids), moved))
    samples.append(Sample(PROMPT, [2, 2, 2, 2], [0.0] * 4, [-1.0] * 4))  # no signal, counts as one
    return samples


def slow_loss(model, samples, clip_eps=0.0, temperature=1.0, count=None):
    """The loss of the header, a token at a time, and which tokens a clip cut."""
    total, cuts = 0.0, []
    for s in samples:
        kept = s.context[len(PROMPT) :]
        logprobs = log_prob(model, [*kept, *s.ids], temperature)[len(kept) :]
        terms = []
        for p, a, old in zip(logprobs, s.advantages, s.old_logprobs):
            if not clip_eps:
                terms.append(a * p)
                continue
            ratio = (p - old).exp()
            clipped = min(max(ratio.item(), 1 - clip_eps), 1 + clip_eps)
            cuts.append((ratio * a).item() > clipped * a)
            terms.append(clipped * a if cuts[-1] else ratio * a)
        total = total + sum(terms) / len(terms)
    return -total / (count or len(samples)), cuts


def trainer(model, lr=1.0):
    return model, *constant_rate(model, lr)


@pytest.mark.parametrize("clip_eps", [0.0, 0.2])
@pytest.mark.parametrize("width, temperature", [(6, 1.0), (20, 0.7), (10_000, 1.0)])
def test_an_update_follows_the_slow_loss_at_any_micro_batch(
    model, monkeypatch, clip_eps, width, temperature
):
    cfg = reset_po.Config(
        prompts=1, fresh=6, batch_size=10, clip_eps=clip_eps, temperature=temperature
    )
    cfg.max_grad_norm = 1e9
    samples = samples_with_prefixes(model)
    model.zero_grad()
    loss, cuts = slow_loss(model, samples, clip_eps, temperature)
    loss.backward()
    expected = [p - p.grad for p in model.parameters()]
    model.zero_grad()
    true_micro_batches = common.micro_batches
    monkeypatch.setattr(common, "micro_batches", lambda rows, _: true_micro_batches(rows, width))
    metrics = reset_po.update(*trainer(model), samples, cfg, "seed")
    for p, q in zip(model.parameters(), expected):
        assert torch.allclose(p, q, atol=1e-5)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    trained = sum(len(s.ids) for s in samples if any(s.advantages))
    assert metrics["clip_fraction"] == pytest.approx(sum(cuts) / trained)
    assert bool(sum(cuts)) == bool(clip_eps)


def test_loss_and_norm_are_means_over_the_optimiser_steps(model):
    samples = samples_with_prefixes(model)[:8]
    cfg = reset_po.Config(prompts=1, batch_size=4)
    metrics = reset_po.update(*trainer(model, lr=1e-9), samples, cfg, "seed")
    assert_means_over_the_steps(metrics, lambda *x: slow_loss(*x)[0], model, samples)


def gradient(model, samples, normaliser, clip_eps=0.0):
    model.zero_grad()
    batch = common.collate(samples)
    logprobs = common.token_logprobs(model, batch)
    reset_po.reset_loss(logprobs, batch, normaliser, clip_eps)[0].backward()
    return flat_grad(model)


def test_base_and_reset_gradients_add(model):
    samples = samples_with_prefixes(model)
    base = [s for s in samples if s.context == PROMPT]
    reset = [s for s in samples if s.context != PROMPT]
    assert len(base) > 1 and len(reset) > 1
    both = gradient(model, samples, 10)
    assert torch.allclose(both, gradient(model, base, 10) + gradient(model, reset, 10), atol=1e-6)


def test_each_rollout_has_the_same_weight_whatever_its_length():
    mask = torch.tensor([[True] * 5, [True, False, False, False, False]])
    a = torch.tensor([[2.0] * 5, [2.0, 0, 0, 0, 0]])
    logprobs = torch.randn(2, 5).requires_grad_()
    batch = common.Batch(None, None, None, mask, a, logprobs.detach() * mask)
    for clip_eps in (0.0, 0.2):
        loss, _ = reset_po.reset_loss(logprobs, batch, 8, clip_eps)
        (given,) = torch.autograd.grad(loss, logprobs)
        wanted = torch.tensor([[-2 / 40] * 5, [-2 / 8, 0, 0, 0, 0]])
        assert torch.allclose(given, wanted, atol=1e-7)


def test_tokens_of_the_prefix_get_exactly_no_gradient(model):
    """The gradient in the logits, at every position of prompt, kept steps and suffix."""
    kept, suffix = [0, 2], [1, 3]
    s = Sample([*PROMPT, *kept], suffix, [1.5, 1.5], [0.0, 0.0])
    seen, head = [], model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    batch = common.collate([s])
    logprobs = common.token_logprobs(model, batch)
    handle.remove()
    ((states, logits),) = seen
    assert len(states) == len(suffix)  # nothing else even has logits
    whole = model.base_model(batch.input_ids).last_hidden_state[0]
    assert torch.allclose(states, whole[3:5], atol=1e-6)  # those before either suffix token
    loss, _ = reset_po.reset_loss(logprobs, batch, 1, 0.0)
    (given,) = torch.autograd.grad(loss, logits)
    probs = logits.softmax(-1)
    wanted = 1.5 * (probs - torch.eye(4)[suffix]) / 2
    assert torch.allclose(given, wanted, atol=1e-6)


def test_an_all_equal_group_changes_nothing(model):
    rollouts = [Rollout(PROMPT, list(a), True, 1.0) for a in all_answers()[:4]]
    samples = [Sample(r.prompt, r.ids) for r in rollouts]
    reset_po.credit_group(samples, rollouts)
    assert not any(a for s in samples for a in s.advantages)
    before = [p.clone() for p in model.parameters()]
    optimizer, schedule = constant_rate(model, 0.1, torch.optim.AdamW)
    cfg = reset_po.Config(prompts=1, fresh=4, method="grpo", resets=0, batch_size=4)
    metrics = reset_po.update(model, optimizer, schedule, samples, cfg, "seed")
    assert not any(metrics.values())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_each_epoch_uses_each_sample_once_in_minibatches_of_its_own_order(model):
    samples = samples_with_prefixes(model)[:8]
    cfg = reset_po.Config(prompts=1, batch_size=4, epochs=2)
    assert_epochs_use_each_sample_once(reset_po, "reset_loss", len, model, samples, cfg)


@pytest.mark.parametrize(
    "case",
    [
        dict(method="rrpo"), dict(localiser="surprise"), dict(localiser="uncertain", clip_eps=0.2),
        dict(method="grpo"), dict(method="rrpo", seed_rule="paper"),
        dict(method="rrpo", fresh=0, resets=4, seeds=2, epochs=2, clip_eps=0.2),
    ],
)  # fmt: skip
def test_credit_and_update_together_raise_the_exact_expected_reward(model, monkeypatch, case):
    fake_rewards(monkeypatch)
    monkeypatch.setattr(reset_po, "step_starts", lambda ids, *_: list(range(len(ids))))
    monkeypatch.setattr(common, "first_wrong_token", lambda *_: None)
    cfg = reset_po.Config(prompts=8, batch_size=32, lr=3e-3, max_new_tokens=HORIZON, **case)
    optimizer, schedule = constant_rate(model, cfg.lr, torch.optim.AdamW)
    generator = torch.Generator().manual_seed(0)
    problems, before = [Problem("", "", "")] * 8, exact_values(model)[()]
    for step in range(20):
        states = [(PROMPT, [], "")] * len(problems)
        drawn, plans = reset_po.draw_answers(model, None, states, cfg, generator)
        credit = reset_po.assign_credit(model, None, problems, drawn, plans, cfg, generator)
        samples = [s for group in credit.base + credit.suffixes for s in group]
        assert len(samples) == 64
        assert sum(credit.tokens.values()) >= sum(len(s.ids) for s in samples)
        reset_po.update(model, optimizer, schedule, samples, cfg, str(step))
    assert before < 0.6 and exact_values(model)[()] > 0.85
    assert END == 3


# -------------------------------------------------------------------------- figures and display


def reset_of(named, truth, count, group=()):
    return reset_po.Reset(None, None, list(range(count)), named, truth, list(group))


def test_counts_of_the_localiser_by_hand():
    resets = [reset_of(2, 2, 4), reset_of(1, 3, 5), reset_of(3, 2, 4), reset_of(1, None, 4)]
    assert reset_po.locate_counts(resets) == pytest.approx(dict(
        failures=3, hit=1, at_or_before=2,
        hit_chance=1 / 4 + 1 / 5 + 1 / 4, at_or_before_chance=2 / 4 + 3 / 5 + 2 / 4,
    ))  # fmt: skip
    assert set(reset_po.locate_counts([]).values()) == {0}


def test_counts_of_a_step_and_their_shares_by_hand():
    def group(*advantages):
        return [Sample([1], [2, 3], [a, a]) for a in advantages]

    base = [group(0.0, 0.0), group(1.0, -1.0), group(0.0, 0.0, 0.0), group(0.0, 0.5)]
    resets = [reset_of(2, 2, 4), reset_of(1, 2, 4)]
    tokens = dict(base=1234, seed=5, localiser=6, reset=7)
    credit = reset_po.Credit(base, [group(0.0, 0.0), group(0.0)], resets, 0.0, 0.0, tokens)
    counts = reset_po.step_counts(credit)
    located = reset_po.locate_counts(resets)
    assert counts == located | dict(
        base_groups=4, no_signal_base=2, reset_groups=2, no_signal_reset=2,
        base_tokens=1234, seed_tokens=5, localiser_tokens=6, reset_tokens=7,
    )  # fmt: skip
    assert reset_po.rates(counts) == dict(
        hit=0.5, at_or_before=1.0, hit_chance=0.25, at_or_before_chance=0.5,
        no_signal_base=0.5, no_signal_reset=1.0,
    )  # fmt: skip
    assert reset_po.describe_counts(counts, "surprise") == (
        "localiser surprise: of 2 failures, the step it named was the first wrong one in 50%,\n"
        "that or an earlier one in 100% (by chance 25% and 50%)\n"
        "without signal: 50% of base groups, 100% of reset groups\n"
        "tokens: 1,234 in base groups, 5 in answers outside of them, 6 to localise, 7 after resets\n"
    )
    idle = reset_po.step_counts(credit._replace(base=base[:1], suffixes=[], resets=[]))
    assert reset_po.rates(idle) == dict(
        hit="", at_or_before="", hit_chance="", at_or_before_chance="",
        no_signal_base=1.0, no_signal_reset="",
    )  # fmt: skip
    assert reset_po.describe_counts(idle, "random").startswith("without signal: 100% of base g")


@pytest.mark.parametrize("colour", [False, True])
def test_the_display_shows_attempt_truth_and_continuations(tokenizer, colour):
    problems, seeds = two_failures(tokenizer)

    def group(problem, *texts):
        rollouts = [Rollout([1], [*common.encode(tokenizer, t), 256], True, r) for t, r in texts]
        samples = [Sample(r.prompt, r.ids) for r in rollouts]
        reset_po.credit_group(samples, rollouts)
        return rollouts, samples

    equal = group(problems[1], ("50+1=52\n#### 52", 0.0), ("50+1=53\n#### 53", 0.0))
    mixed = group(problems[0], ("35-7=28\n#### 28", 1.0), ("35-7=29\n\033[2J", 0.0))
    resets = [
        reset_po.Reset(problems[1], seeds[1], [0, 8], 1, 1, equal[0]),
        reset_po.Reset(problems[0], seeds[0], [0, 8, 16], 1, 2, mixed[0]),
    ]
    credit = reset_po.Credit([], [equal[1], mixed[1]], resets, 0.0, 0.0, {})
    text = reset_po.show_answer(credit, tokenizer, colour, 100)
    assert ("\033[48;5;" in text) == colour and "\033[2J" not in text
    lines = re.sub(r"\033\[[\d;]*m", "", text).split("\n")
    assert lines[0] == "31+4-7   answer 28, reward 0"  # the first with signal
    assert lines[1].split("<-") == [lines[1].split("<-")[0], " resampled from here"]
    assert lines[1].startswith("  |31+4=35 ")
    assert lines[2].startswith("  35-7=29 ")
    assert lines[2].endswith("<- first wrong step; right: 35-7=28")
    assert lines[3] == "  #### 29<end>"
    assert lines[4] == "    reward 1, advantage +1.00: 35-7=28 / #### 28<end>"
    assert lines[5] == "    reward 0, advantage -1.00: 35-7=29 / \ufffd[2J<end>"
    hit = reset_po.Credit([], [mixed[1]], [resets[1]._replace(named=2)], 0.0, 0.0, {})
    lines = reset_po.show_answer(hit, tokenizer, False, 100).split("\n")
    assert "|35-7=29" in lines[2]
    assert lines[2].endswith("<- resampled from here <- first wrong step; right: 35-7=28")


def test_a_step_without_resets_says_so(tokenizer):
    credit = reset_po.Credit([], [], [], 0.0, 0.0, {})
    assert reset_po.show_answer(credit, tokenizer, False, 100) == "no failure was reset"


# --------------------------------------------------------------------------------------- config


def test_methods_are_settings_of_the_split_and_the_localiser():
    cfg = reset_po.Config()
    assert (cfg.fresh, cfg.resets, cfg.seeds, cfg.rollouts) == (4, 4, 1, 8)
    assert reset_po.Config(method="rrpo").localiser == "random"
    for grpo in (
        reset_po.Config(method="grpo"), reset_po.Config(fresh=8, resets=0, seeds=0),
        reset_po.Config(fresh=8, resets=0),
    ):  # fmt: skip
        assert (grpo.fresh, grpo.resets, grpo.seeds, grpo.rollouts) == (8, 0, 0, 8)
    assert reset_po.Config(fresh=0, resets=4, seeds=2).rollouts == 8
    assert reset_po.Config(prompts=3, fresh=3).batch_size == 3 * (3 + 4)  # one update a step
    assert reset_po.Config(batch_size=64).batch_size == 64


def test_the_headline_names_the_settings_of_the_run():
    problems = [Problem("", "", "")]
    for options, words in (
        (dict(seeds=2, resets=3), "SRPO: 9 rounds of 5 problems, each with 4 answers and 2 x 3"),
        (dict(method="rrpo"), "RRPO: 9 rounds of 5 problems, each with 4 answers and 1 x 4"),
        (dict(method="grpo"), "GRPO: 9 rounds of 5 problems, each with 8 answers"),
        (dict(seeds=0), "GRPO: 9 rounds of 5 problems, each with 4 answers"),
    ):
        more = " continuations of a failed one" if " x " in words else ""
        cfg = reset_po.Config(steps=9, prompts=5, **options)
        assert reset_po.headline(cfg, problems) == words + more


def test_a_config_that_cannot_work_is_refused():
    for bad in (
        dict(fresh=1), dict(resets=1), dict(fresh=0, resets=0), dict(fresh=-1), dict(seeds=-1),
        dict(resets=-1), dict(method="rrpo", localiser="oracle"), dict(threshold=1.5),
        dict(method="grpo", localiser="surprise"), dict(threshold=0.0), dict(max_steps=0),
        dict(batch_size=7), dict(batch_size=-1), dict(clip_eps=-0.1), dict(clip_eps=math.nan),
        dict(lr=0.0),
        dict(localiser_tokens=0), dict(delimiter=""), dict(temperature=0.0), dict(epochs=0),
        dict(warmup_updates=-1),
    ):  # fmt: skip
        with pytest.raises(BadInput):
            reset_po.Config(**bad)
