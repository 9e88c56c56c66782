"""Models and tokenizers as others save them: small Qwen2, Llama and GPT-2 checkpoints that bring
what the hub's do - chat templates, several ends, generation settings, shards, bf16.
"""

import json
import math
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM
from transformers import FalconH1Config, GPT2Config
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig
from transformers import MambaForCausalLM, PreTrainedTokenizerFast
from transformers import Qwen2Config, Qwen2ForCausalLM, T5Config, T5ForConditionalGeneration

import common
import spo
from common import BadInput, Problem
from runs import metrics
from test_common import assert_drawn_from, next_logits, random_samples, reference

FAMILIES = ("qwen2", "llama", "gpt2")
every_family = pytest.mark.parametrize("family", FAMILIES)
CHATS = {  # family -> its chat template, in the style of the models of that name
    "qwen2": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama": "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
}
SPECIALS = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|begin|>", "<|end|>", "<|head|>", "<|/head|>", "<|eot|>"],
    "gpt2": ["<|endoftext|>"],
}
HOSTILE = dict(top_k=1, top_p=0.1, repetition_penalty=5.0, temperature=0.01, max_new_tokens=3)


def word_problems() -> list[dict]:
    """60 rows of GSM8K's training file if it is at hand, else made up ones."""
    file = os.environ.get("GSM8K_TRAIN")
    file = Path(file or Path(__file__).parents[2] / "shared/data/gsm8k/train-1000.jsonl")
    if file.is_file():
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()[:60]]
    rng, rows = random.Random(0), []
    for i in range(60):
        name = rng.choice(("Ann", "Zoë", "Weng", "Łukasz"))
        thing = rng.choice(("eggs", "pens", "coins"))
        a, b = rng.randint(2, 2000), rng.randint(2, 90)
        question = f"{name} has {a:,} {thing} and buys {b} a day. How many has {name} on day {i}?"
        steps = f"{name} buys {b}*{i}=<<{b}*{i}={b * i}>>{b * i}.\nThat is {a + b * i} {thing}."
        rows.append(dict(question=question, answer=f"{steps}\n#### {a + b * i:,}"))
    return rows


def byte_level_bpe(family: str) -> PreTrainedTokenizerFast:
    """Trained here, with the family's special tokens; Llama's puts a bos before any text."""
    bpe, specials = tokenizers.Tokenizer(tokenizers.models.BPE()), SPECIALS[family]
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text for row in word_problems() for text in row.values()], trainer)
    names = dict(eos_token=specials[2] if family == "qwen2" else specials[0])
    if family == "llama":
        names = dict(bos_token="<|begin|>", eos_token="<|eot|>")
        start = ("<|begin|>", bpe.token_to_id("<|begin|>"))
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[start]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)  # none has a pad token
    tokenizer.chat_template = CHATS.get(family)
    return tokenizer


def build(family: str, vocab: int):
    torch.manual_seed(0)
    wide = dict(vocab_size=vocab, initializer_range=0.15, pad_token_id=None)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, **wide,
    )  # fmt: skip
    if family == "qwen2":  # a base's eos in the config; the chat's stands in the tokenizer
        config = Qwen2Config(**sizes, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0)
        return Qwen2ForCausalLM(config)
    if family == "llama":
        config = LlamaConfig(**sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=[1])
        return LlamaForCausalLM(config)
    ids = dict(bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**wide, **ids, n_embd=32, n_layer=2, n_head=4))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """family -> its checkpoint: sharded, Llama's in bf16, with more embeddings than tokens."""
    folders = {}
    for family in FAMILIES:
        folder = folders[family] = tmp_path_factory.mktemp("models") / family
        tokenizer = byte_level_bpe(family)
        model = build(family, len(tokenizer) + 9)
        model.to(torch.bfloat16 if family == "llama" else torch.float32)
        model.save_pretrained(folder, max_shard_size="30KB")
        tokenizer.save_pretrained(folder)
        ends = [0] if family == "qwen2" else tokenizer.eos_token_id
        settings = json.dumps({**HOSTILE, "eos_token_id": ends})
        (folder / "generation_config.json").write_text(settings)
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folders


@pytest.fixture(scope="session")
def policies(folders) -> dict:
    return {family: common.load_policy(folder, "cpu") for family, folder in folders.items()}


# -------------------------------------------------------------------------------------- loading


@every_family
def test_a_checkpoint_of_others_loads_with_fp32_weights_and_all_its_ends(folders, policies, family):
    model, tokenizer = policies[family]
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    stored = AutoModelForCausalLM.from_pretrained(folders[family], dtype="auto")
    assert stored.dtype == (torch.bfloat16 if family == "llama" else torch.float32)
    for mine, theirs in zip(model.parameters(), stored.parameters(), strict=True):
        assert torch.equal(mine, theirs.float())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family != "llama")
    ends = {"qwen2": ["<|endoftext|>", "<|im_end|>"], "llama": ["<|end|>", "<|eot|>"]}
    names = tokenizer.convert_ids_to_tokens(sorted(common.eos_ids(model, tokenizer)))
    assert names == ends.get(family, ["<|endoftext|>"])
    assert common.window(model) == 1024
    assert (tokenizer.pad_token_id is None) == (family != "qwen2")  # whose class brings one


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def break_pickled(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def break_custom_code(folder):
    (folder / "own.py").write_text("raise SystemExit('ran')\nOwn = None\n")
    classes = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    change_config(folder, model_type="own", auto_map=classes)


def break_encoder_decoder(folder):
    T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(folder)


def break_state(folder):
    sizes = dict(vocab_size=300, hidden_size=8, num_hidden_layers=1, state_size=2)
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(folder)


def break_template(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")


def break_infinite(folder, value=math.inf):
    weights = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    weights["model.norm.weight"][3] = value
    for path in folder.glob("model*"):
        path.unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def break_bert(folder):
    sizes = dict(vocab_size=500, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    config = BertConfig(**sizes, num_attention_heads=1, initializer_range=0.3)
    for path in folder.glob("model*"):
        path.unlink()
    BertForMaskedLM(config).save_pretrained(folder)


BREAK = {
    "infinite": (break_infinite, "model.norm.weight is not finite"),
    "nan": (lambda f: break_infinite(f, math.nan), "model.norm.weight is not finite"),
    "bert": (break_bert, "bert lets tokens see later ones; not a causal language model"),
    "shapes": (lambda f: change_config(f, hidden_size=16), "by config.json [409, 16]"),
    "pickled": (break_pickled, "weights"),
    "custom code": (break_custom_code, "config.json"),
    "encoder-decoder": (break_encoder_decoder, "text-only decoder"),
    "vision": (lambda f: change_config(f, model_type="qwen2_vl"), "text-only decoder"),
    "state": (break_state, "mamba keeps a state"),
    "hybrid": (lambda f: FalconH1Config().save_pretrained(f), "falcon_h1 keeps a state"),
    "template": (break_template, "chat template"),
    "syntax": (lambda f: (f / "chat_template.jinja").write_text("{% for"), "chat template"),
}


@pytest.mark.parametrize("how", BREAK)
def test_what_cannot_be_trained_here_is_refused_in_one_line(folders, tmp_path, how):
    folder = tmp_path / "policy"
    folder.mkdir()
    for path in folders["qwen2"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil, words = BREAK[how]
    spoil(folder)
    with pytest.raises(BadInput) as caught:
        common.load_policy(folder, "cpu")
    message = str(caught.value)
    assert words in message and str(folder) in message and "\n" not in message


@pytest.mark.parametrize("name", ["nobody/nothing", "gpt2", "no such folder", "../nowhere"])
def test_a_model_that_is_nowhere_is_refused_in_one_line(run, name):
    done = run("--model", name)
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert f"--model {name}: no such folder" in done.err


def test_a_hub_id_may_be_downloaded_a_folder_not_and_neither_brings_code(folders, monkeypatch):
    asked = []

    def stop(source, **options):
        asked.append((options["local_files_only"], options["trust_remote_code"]))
        raise OSError("stop")

    monkeypatch.setattr(common.AutoConfig, "from_pretrained", stop)
    for source in (folders["gpt2"], "nobody/nothing"):
        with pytest.raises(BadInput):
            common.load_policy(source, "cpu")
    assert asked == [(True, False), (False, False)]


# -------------------------------------------------------------------------------------- prompts

TEXT = "Zoë has 3 eggs.\n\nHow many are 2,000 more?"


@pytest.mark.parametrize("family", CHATS)
def test_a_chat_prompt_is_what_the_models_own_template_gives(policies, family):
    _, tokenizer = policies[family]
    chat = [dict(role="user", content=TEXT)]
    options = dict(add_generation_prompt=True, return_dict=False)
    given = tokenizer.apply_chat_template(chat, **options)
    assert common.user_turn(tokenizer, TEXT) == common.user_turn(tokenizer, f" {TEXT}\n") == given


@every_family
def test_no_word_of_a_question_is_a_control_token(policies, family):
    _, tokenizer = policies[family]
    names = "".join(SPECIALS[family])
    plain, ids = (common.user_turn(tokenizer, f"a {x} b?") for x in ("", names))
    special = [[id for id in row if id in tokenizer.all_special_ids] for row in (plain, ids)]
    assert special[0] == special[1] and f"a {names} b?" in tokenizer.decode(ids)


def test_a_bos_stands_in_front_exactly_once_where_the_tokenizer_puts_one(policies):
    for family, own in (("qwen2", 0), ("gpt2", 0), ("llama", 1)):
        tokenizer = policies[family][1]
        kept = tokenizer.chat_template
        for template in (kept, None, (kept or "x").replace("{{ bos_token }}", "")):
            tokenizer.chat_template = template
            ids = common.user_turn(tokenizer, TEXT)
            tokenizer.chat_template = kept
            assert ids.count(tokenizer.bos_token_id) == own
            assert own == 0 or ids[0] == tokenizer.bos_token_id
    assert common.user_turn(policies["gpt2"][1], TEXT) == policies["gpt2"][1](TEXT + "\n").input_ids


@pytest.mark.parametrize(
    "content, expected",
    [
        ("{{ m.content | trim | upper }}", f"<{TEXT}>"),
        ("{{ m.content[0].text }}", f"{TEXT}\n"),  # one for images: there is no place for text
    ],
)
def test_a_template_that_changes_the_text_stops_no_run(policies, content, expected):
    tokenizer = policies["qwen2"][1]
    kept = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}<" + content + ">{% endfor %}"
    ids = common.user_turn(tokenizer, TEXT)
    tokenizer.chat_template = kept
    assert tokenizer.decode(ids) == expected


def open_policy(tmp_path, folder, **flags):
    options = common.RunConfig(**{"name": "x", "model": str(folder or ""), **flags})
    problems = [Problem("Zoë has 3 eggs?", "She has 3.\n#### 3", "3")]
    model, tokenizer = common.first_policy(options, torch.device("cpu"))
    if not folder:
        compute = common.Compute()
        tokenizer = common.warm_started(options, problems, model, tokenizer, compute)[1]
    instruction = common.pick_instruction(options, tokenizer)
    return tokenizer.decode(common.prompt_ids(tokenizer, problems[0], instruction))


@every_family
def test_the_instruction_stands_below_the_question_by_data_set_or_as_given(
    folders, tmp_path, family
):
    around = {"qwen2": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "gpt2": "{}\n"}
    around["llama"] = "<|begin|><|head|>user<|/head|>\n\n{}<|eot|><|head|>assistant<|/head|>\n\n"
    for flags, below in [
        (dict(data="rows.jsonl"), f"\n\n{common.INSTRUCTIONS['gsm8k']}"),
        (dict(data="gsm8k"), f"\n\n{common.INSTRUCTIONS['gsm8k']}"),
        (dict(data="math", prompt="auto"), f"\n\n{common.INSTRUCTIONS['math']}"),
        (dict(data="sums"), f"\n\n{common.INSTRUCTIONS['sums']}"),
        (dict(data="math", prompt="none"), ""),
        (dict(data="math", prompt="Be {brief}."), "\n\nBe {brief}."),
    ]:
        given = open_policy(tmp_path, folders[family], **flags)
        assert given == around[family].format("Zoë has 3 eggs?" + below)


def test_the_built_in_policy_gets_the_bare_question_wherever_it_is_loaded_from(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = dict(data="rows.jsonl", warm_start_steps=0)
    assert open_policy(tmp_path, None, **flags) == "Zoë has 3 eggs?\n"
    (folder,) = (tmp_path / "runs" / "warm_start").iterdir()
    assert open_policy(tmp_path, folder, **flags) == "Zoë has 3 eggs?\n"
    asked = open_policy(tmp_path, None, **flags, prompt="Be brief.")
    assert asked == "Zoë has 3 eggs?\n\nBe brief.\n"
    assert len(list(folder.parent.iterdir())) == 2  # it is another warm start


# --------------------------------------------------------------------------- sampling and scoring


@every_family
def test_sampling_is_at_plain_temperature_whatever_generation_config_says(policies, family):
    model, tokenizer = policies[family]
    prompt, temperature = common.user_turn(tokenizer, TEXT), 0.9
    generator = torch.Generator().manual_seed(0)
    options = dict(max_new_tokens=1, eos=common.eos_ids(model, tokenizer), generator=generator)
    rollouts = common.sample(model, [prompt], 20_000, temperature=temperature, **options)
    probabilities = (next_logits(model, prompt) / temperature).softmax(-1)
    assert 1 / len(probabilities) < probabilities.max() < 0.5
    common_ids = [i for i, p in enumerate(probabilities.tolist()) if p > 5e-4]
    shares = {i: probabilities[i].item() for i in common_ids}
    shares["rare"] = 1 - sum(shares.values())
    assert_drawn_from(shares, [r.ids[0] if r.ids[0] in shares else "rare" for r in rollouts])


@every_family
def test_batched_scores_are_those_of_each_sample_alone(policies, family):
    model, _ = policies[family]
    samples = random_samples(9)
    given = common.token_logprobs(model, common.collate(samples), 0.8)
    for s, row in zip(samples, given):
        expected, _ = reference(model, s, 0.8)
        torch.testing.assert_close(row[: len(s.ids)].double(), expected, atol=1e-4, rtol=0)


@every_family
def test_a_padded_batch_continues_each_prompt_as_it_would_alone(policies, family):
    model, tokenizer = policies[family]
    questions = [row["question"][: 9 * i + 5] for i, row in enumerate(word_problems()[:12])]
    prompts = [common.user_turn(tokenizer, question) for question in questions]
    assert len({len(prompt) for prompt in prompts}) > 6
    rollouts = common.sample(model, prompts, max_new_tokens=6, eos=set(), greedy=True)
    for prompt, rollout in zip(prompts, rollouts):
        expected = []
        for _ in range(6):
            expected.append(next_logits(model, [*prompt, *expected]).argmax().item())
        assert rollout.ids == expected


# ------------------------------------------------------------------- a warm start for any model


def solutions(tokenizer, seed: int, step: int, instruction: str) -> list[tuple]:
    """(prompt, solution) ids of what step number `step` of a warm start imitates, 8 a step."""
    rows = [row for row in word_problems() if common.split_of(row["question"]) == "train"]
    chosen = common.batch_at(rows, step, 8, f"{seed}-warm")
    asked = [f"{row['question']}\n\n{instruction}" for row in chosen]
    prompts = [common.user_turn(tokenizer, text) for text in asked]
    texts = [common.encode(tokenizer, row["answer"]) for row in chosen]
    return [(p, [*text, tokenizer.eos_token_id]) for p, text in zip(prompts, texts)]


@every_family
def test_a_warm_start_of_a_given_model_is_adamw_on_the_solutions_alone(
    folders, tmp_path, monkeypatch, family
):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(row) for row in word_problems()]
    Path("rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    run = common.RunConfig(
        name="x", data="rows.jsonl", model=str(folders[family]), warm_start_steps=20,
        warm_start_lr=3e-3, seed=3, prompt="Be brief.",
    )  # fmt: skip
    train = common.load_problems("rows.jsonl", "train")
    model, tokenizer = common.first_policy(run, torch.device("cpu"))
    small = common.Compute(training_tokens=99)  # several passes a step, and of them one mean
    folder = common.warm_start(run, train, model, tokenizer, small)
    made = common.load_policy(folder, "cpu")[0]

    mine, _ = common.load_policy(folders[family], "cpu")
    optimizer = torch.optim.AdamW(mine.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(20):  # rises over a tenth of the steps, falls to 0
        rate = min(step / 2, (20 - step) / 18)
        optimizer.param_groups[0]["lr"] = 3e-3 * rate
        losses, count = 0.0, 0
        for prompt, solution in solutions(tokenizer, 3, step, "Be brief."):
            logits = mine(torch.tensor([[*prompt, *solution]])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.log_softmax(-1)[range(len(solution)), solution]
            losses, count = losses - chosen.sum(), count + len(solution)
        (losses / count).backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ids = torch.tensor([[*prompt, *solution]])  # not weights: some have no effect, and drift
    before = common.load_policy(folders[family], "cpu")[0]
    with torch.no_grad():
        begun, expected, given = (policy(ids).logits for policy in (before, mine, made))
    assert (given - expected).abs().max() < 0.01 * (expected - begun).abs().max()


def test_the_built_in_warm_start_has_muon_on_the_matrices_and_rates_that_rise(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    made, passes, dtypes = [], [], []
    for kind in (torch.optim.Muon, torch.optim.AdamW):

        def make(params, kind=kind, **options):
            made.append(kind(params, **options))
            return made[-1]

        monkeypatch.setattr(torch.optim, kind.__name__, make)
    true_micro_batches = common.micro_batches

    def micro_batches(samples, most):
        passes.append(most)
        return true_micro_batches(samples, most)

    monkeypatch.setattr(common, "micro_batches", micro_batches)
    true_logprobs = common.token_logprobs

    def token_logprobs(model, batch, compute):
        dtypes.append(compute.dtype)
        return true_logprobs(model, batch, compute=compute)

    monkeypatch.setattr(common, "token_logprobs", token_logprobs)
    run = common.RunConfig(terms=2, warm_start_steps=3)
    model, tokenizer = common.first_policy(run, torch.device("cpu"))
    train = common.load_problems("sums", "train", 9, 0, 2)
    small = common.Compute(dtype=torch.bfloat16, training_tokens=64)
    common.warm_start(run, train, model, tokenizer, small)
    # What runs share does not depend on --training_tokens, nor on a CPU on --dtype.
    assert passes == [2048] * 3 and {*dtypes} == {torch.float32}
    muon, adam = ([p for g in o.param_groups for p in g["params"]] for o in made)
    layers = [p for p in model.base_model.layers.parameters() if p.ndim == 2]
    assert {*map(id, muon)} == {*map(id, layers)}
    assert sorted(map(id, muon + adam)) == sorted(map(id, model.parameters()))
    rates = [g["lr"] for o in made for g in o.param_groups]
    assert rates == pytest.approx([0.03 * 3 / 20, 5e-3 * 3 / 20])  # both rise, over 20 steps


def test_a_given_model_imitates_the_mistaken_student_on_the_built_in_task(policies):
    _, tokenizer = policies["qwen2"]
    run = common.RunConfig(model="x", seed=1, terms=4)
    train = common.load_problems("sums", "train", 9, 1, 4)
    samples = common.imitation_batch(run, tokenizer, train, step=2)
    built_in = common.RunConfig(seed=1, terms=4)
    own = common.imitation_batch(built_in, common.build_tokenizer(), train, step=0)
    assert (len(samples), len(own)) == (8, 64)
    facts = common.wrong_facts(1)
    for i, s in enumerate(samples, 16):
        question = common.make_sum(1, "train", i, 4).question
        text = common.solve_sum(question, facts, random.Random(f"1-student-{i}"))
        asked = f"{question}\n\n{common.INSTRUCTIONS['sums']}"
        assert s.context == common.user_turn(tokenizer, asked)
        assert s.ids == [*common.encode(tokenizer, text), tokenizer.eos_token_id]


FLAGS = {
    "spo": "--batch_size 2 --continuations 2",
    "mpo": "--group_size 4 --batch_size 4",
    "reset_po": "--fresh 2 --resets 2 --localiser_tokens 8",
}
WARM_SIZES = "--data rows.jsonl --steps 1 --prompts 2 --eval_problems 2 --max_new_tokens 8".split()


def write_word_problems(folder) -> None:
    lines = [json.dumps(row) for row in word_problems()]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_a_warm_start_of_a_given_model_is_made_once_and_shared_by_recipe(folders, run, tmp_path):
    write_word_problems(tmp_path)
    starts = tmp_path / "runs" / "warm_start"
    flags = [*WARM_SIZES, "--model", str(folders["qwen2"])]
    assert run(*flags, "--name", "without").code == 0
    assert not [*starts.glob("*")]  # 0 is the default
    moved = tmp_path / "moved"
    shutil.copytree(folders["qwen2"], moved)
    (moved / "README.md").write_text("as a hub has it")
    model, tokenizer = common.load_policy(folders["qwen2"], "cpu")
    other = tmp_path / "other"  # of the same shape
    with torch.no_grad():
        model.base_model.norm.weight[0] += 1
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    for i, (more, count) in enumerate([
        ([], 1), (["--lr", "1e-3"], 1), (["--model", str(moved)], 1),
        (["--training_tokens", "99"], 1), (["--warm_start_lr", "1e-4"], 2),
        (["--seed", "1"], 3), (["--prompt", "none"], 4),
        (["--model", str(folders["gpt2"])], 5), (["--warm_start_steps", "3"], 6),
        (["--model", str(other)], 7),
    ]):  # fmt: skip
        done = run(*flags, "--warm_start_steps", "2", *more, "--name", f"run{i}")
        assert done.code == 0, done.err
        assert len([*starts.iterdir()]) == count, more
        assert ("made earlier" in done.out) == (i in (1, 2, 3))
        assert "warm start: 100%" in done.err or i in (1, 2, 3)
    config = json.loads((tmp_path / "runs" / "run4" / "config.json").read_text())
    assert (config["warm_start_steps"], config["warm_start_lr"]) == (2, 1e-4)
    for start in starts.iterdir():
        assert AutoModelForCausalLM.from_pretrained(start).num_parameters()


@pytest.mark.parametrize("script", FLAGS)
def test_a_run_begins_with_what_its_warm_start_has_made(folders, run, tmp_path, script):
    write_word_problems(tmp_path)
    flags = [*WARM_SIZES, *FLAGS[script].split(), "--model", str(folders["llama"])]
    flags += "--warm_start_steps 3 --warm_start_lr 1e-2 --lr 1e-9".split()
    flags += "--gradient_checkpointing True".split()
    assert run(*flags, script=script).code == 0
    (start,) = (tmp_path / "runs" / "warm_start").iterdir()
    made, given = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)
        for f in (start, folders["llama"])
    )
    ended = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / script / "checkpoint")
    for a, b, c in zip(made.parameters(), ended.parameters(), given.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert (a - c).abs().max() > 1e-3


def test_layers_are_recomputed_in_the_warm_start_too(folders, monkeypatch):
    seen = []

    def warm_start(run, problems, model, *rest):
        seen.append(any(getattr(x, "gradient_checkpointing", False) for x in model.modules()))
        return folders["qwen2"]

    monkeypatch.setattr(common, "warm_start", warm_start)
    for on in (True, False):
        settings = common.RunConfig(
            model=str(folders["qwen2"]), warm_start_steps=1, gradient_checkpointing=on
        )
        common.starting_policy(settings, [], torch.device("cpu"), common.Compute())
    assert seen == [True, False]


def test_the_reference_of_a_resumed_run_is_its_warm_started_model(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_word_problems(tmp_path)
    options = dict(data="rows.jsonl", model=str(folders["qwen2"]), warm_start_steps=2)
    settings = common.RunConfig(name="x", resume=True, **options)
    train = common.load_problems("rows.jsonl", "train")
    started, _ = common.starting_policy(settings, train, torch.device("cpu"), common.Compute())
    trained = common.load_policy(folders["qwen2"], "cpu")[0]
    setup = SimpleNamespace(run=settings, model=trained, train=train, compute=common.Compute())
    reference = spo.reference_policy(setup)
    for a, b in zip(reference.parameters(), started.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--warm_start_steps 3 --warm_start_lr 1e6", "the warm start's loss is"),
        ("--warm_start_lr 0", "--warm_start_lr 0.0: must be above 0"),
        ("--warm_start_steps 3 --eval_only", "--warm_start_steps: not with --eval_only"),
    ],
)
def test_a_warm_start_that_cannot_be_is_said_in_one_line(folders, run, tmp_path, flags, words):
    write_word_problems(tmp_path)
    done = run(*WARM_SIZES, "--model", str(folders["gpt2"]), *flags.split())
    assert done.code == 2
    assert done.err.split("\n")[-2].startswith("error: ") and words in done.err
    assert not [*tmp_path.glob("runs/warm_start/*")] and not (tmp_path / "runs" / "spo").exists()


# ------------------------------------------------------------------------------------ whole runs

SMALL = (
    "--data rows.jsonl --steps 2 --prompts 2 --eval_problems 2 --eval_samples 1 --temperature 0.9 "
    "--max_new_tokens 12 --lr 1e-2 --warmup_updates 0 --show_every 1 --save_every 1"
).split()


@pytest.mark.parametrize("script", FLAGS)
@every_family
def test_every_script_trains_every_family(folders, run, tmp_path, family, script):
    rows = word_problems()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    # What these models write is never right: some is called so, that there is something to learn.
    patch = "common.response_reward = lambda ids, *rest: float(sum(ids) % 2)"
    args = [*SMALL, *FLAGS[script].split(), "--model", str(folders[family])]
    done = run(*args, patch=patch, script=script)
    assert done.code == 0, done.err
    assert "localiser" not in done.out or ("prompt" in done.out) == (family in CHATS)
    checkpoint = tmp_path / "runs" / script / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    before, theirs = common.load_policy(folders[family], "cpu")
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters())]
    assert any(changed) and all(p.isfinite().all() for p in model.parameters())
    assert tokenizer.chat_template == theirs.chat_template == CHATS.get(family)
    assert tokenizer(TEXT).input_ids == theirs(TEXT).input_ids
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    assert not settings.keys() & HOSTILE.keys()
    assert set(settings["eos_token_id"]) == common.eos_ids(before, theirs)
    if script == "spo":
        done = run(*args, "--eval_only", patch=patch, script=script)
        assert done.code == 0 and re.match(r"2 held-out problems: ", done.out), done.err


@pytest.mark.parametrize("script", [*FLAGS, "spo --variant tree"])
def test_a_model_that_never_gets_a_reward_is_told_why_once(folders, run, tmp_path, script):
    write_word_problems(tmp_path)
    script, *more = script.split()
    flags = [*WARM_SIZES, *FLAGS[script].split(), "--model", str(folders["gpt2"]), *more]
    flags += ["--batch_size", "0", "--branching", "2", "2"] if more else []
    done = run(*flags, "--steps", "4", "--save_every", "1", script=script)
    assert done.code == 0, done.err
    said = [line for line in done.out.splitlines() if "got a reward" in line]
    each = dict(spo=6, mpo=24, reset_po=12)[script] if not more else None  # of three rounds
    count = re.match(r"none of the first (\d+) answers got a reward: ", said[0])
    assert len(said) == 1 and (each is None or int(count[1]) == each)
    assert "were cut by their budget (--max_new_tokens)" in said[0]
    rows = metrics(tmp_path / "runs" / script)
    assert all(float(row["accuracy"]) == float(row["in_form"]) == 0 for row in rows)


def test_the_readme_names_every_set_of_problems():
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    assert all(f"--data {name}" in text for name in common.HUB)
    assert common.INSTRUCTIONS.keys() == {"sums", *common.HUB}
