"""tutorials/trl_adapter.py: what TRL gives an optimiser step is the script's own gradient, on one
process and on two, and errors planted in the adapter are found.

`measure` runs in processes of its own, as `python tests/test_trl.py` or under torchrun: it trains a
step through TRL and lets the script's `update` make the gradient of the same samples, from the same
weights. What it prints is compared here.
"""

import json
import os
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import common  # noqa: E402

pytest.importorskip("trl", reason="TRL is not installed: tutorials/requirements.txt")

import trl_adapter as adapter  # noqa: E402
from accelerate.commands.config.config_args import load_config_from_file  # noqa: E402
from common import BadInput  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

TOLERANCE = 1e-5
SMALL = "--terms 3 --max_new_tokens 22 --temperature 1.3 --steps 1".split()
SMALL += "--max_grad_norm 1e12 --warmup_updates 0".split()
CASES = {  # name -> the adapter's command line, without the flags above
    "spo-chain": "spo-chain --prompts 12 --continuations 2",
    "spo-chain, two updates": "spo-chain --prompts 8 --continuations 2 --batch_size 8 --lr 0.001",
    "spo-tree": "spo-tree --prompts 4 --branching 2 2 2 --segment_tokens 4",
    "mpo": "mpo --prompts 6 --group_size 4 --batch_size 12 --epochs 2 --lr 0.001",
    "mpo, joint blocks": "mpo --prompts 6 --group_size 4 --batch_size 12 --lr 0.001 --block_size 3 "
    "--layout block --weights joint",
    "mpo, learned positions": "mpo --prompts 6 --group_size 4 --batch_size 12 --lr 0.01",
    "rrpo": "rrpo --prompts 4 --fresh 2 --resets 2",
    "srpo": "srpo --prompts 4 --fresh 2 --resets 2",
    "srpo, two updates": "srpo --prompts 4 --fresh 2 --resets 2 --batch_size 8 --lr 0.001",
    "srpo, clipped": "srpo --prompts 4 --fresh 2 --resets 2 --batch_size 8 --lr 0.001 "
    "--clip_eps 0.2",
}


# ------------------------------------------------- in processes of their own: what is compared


def half_are_right(ids, finished, answer, tokenizer) -> float:
    """By no pattern, so that small batches have a signal; of every third problem all are wrong."""
    return float(int(answer) % 3 and zlib.crc32(str(ids).encode()) % 2)


def own_count(trainer, batch, right=adapter.Trainer._prepare_inputs):
    inputs = right(trainer, batch)
    own = sum((x["completion_mask"] * x["tool_mask"]).sum() for x in trainer._buffered_inputs)
    return inputs | dict(num_items_in_batch=own * trainer.accelerator.num_processes)


def mean_credit(trainer, inputs, right=adapter.Trainer._generate_and_score_completions):
    out = right(trainer, inputs)
    means = out["advantages"].sum(1) / out["completion_mask"].sum(1)
    return out | dict(advantages=means[:, None].expand_as(out["advantages"]))


def counting_padding(trainer, model, ids, mask, kept, *rest, **options):
    logps, *others = getattr(GRPOTrainer, LOGPS)(trainer, model, ids, mask, kept, *rest, **options)
    how = trainer.cfg.block_size, trainer.cfg.layout, trainer.cfg.weights
    return adapter.mpo.block_log_ratio(logps, mask[:, -kept:].bool(), *how), *others


def token_mean(*args, right=adapter.trl_arguments):
    settings = right(*args)
    settings.loss_type = "dapo"
    return settings


COUNT, LOGPS = "_prepare_inputs", "_get_per_token_logps_and_entropies"
CREDIT = "_generate_and_score_completions"
PLANTED = {  # error -> the fewest processes that show it, the case; the place, and what takes it
    "mask dropped": (1, "spo-chain", adapter.spo, "trained_tokens", lambda batch, cfg: batch.mask),
    "Z of each process": (2, "spo-chain", adapter.Trainer, COUNT, own_count),
    "N of the whole step, not of the update": (
        1, "mpo", adapter.Trainer, COUNT, getattr(GRPOTrainer, COUNT)
    ),
    "advantages a row": (1, "spo-chain", adapter.Trainer, CREDIT, mean_credit),
    "token ratios": (1, "mpo", adapter.Trainer, LOGPS, getattr(GRPOTrainer, LOGPS)),
    "mean over tokens, not over rollouts": (1, "srpo", adapter, "trl_arguments", token_mean),
    "positions that count padding": (
        1, "mpo, learned positions", adapter.Trainer, LOGPS, counting_padding
    ),
}  # fmt: skip


class Kept(TrainerCallback):
    """Weights and gradients of each optimiser step, and its rows, as TRL hands them to the loss."""

    def __init__(self, trainer):
        self.rows, self.steps, self.model = [], [], trainer.model
        loss = trainer._compute_loss

        def compute_loss(model, inputs):
            for kind in ("prompt", "completion"):
                ids, mask = inputs[f"{kind}_ids"], inputs[f"{kind}_mask"].bool()
                self.rows.append([tuple(row[keep].tolist()) for row, keep in zip(ids, mask)])
            return loss(model, inputs)

        trainer._compute_loss = compute_loss
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, *_, **__):
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        gradient = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        rows = [pair for i in range(0, len(self.rows), 2) for pair in zip(*self.rows[i : i + 2])]
        self.steps.append((weights, gradient, rows))
        self.rows = []


class KeepGradients(torch.optim.SGD):
    def step(self):
        every = self.param_groups[0]["params"]
        self.gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in every]


def script_gradient(method, model, weights, samples, cfg):
    """The gradient of the script's own `update`, from `weights`, and what it says of the step."""
    model.load_state_dict(weights, strict=False)  # the head is the embedding, and not listed
    optimizer = KeepGradients(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    own = replace(cfg, epochs=1, batch_size=0 if method == "spo-tree" else len(samples))
    metrics = adapter.METHODS[method][0].update(model, optimizer, schedule, samples, own, "seed")
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, optimizer.gradients)), metrics


def difference(given: dict, wanted: dict) -> float:
    """Of two gradients, relative, by the Euclidean norm."""
    apart, whole = (
        torch.cat([f(n).flatten() for n in wanted])
        for f in (lambda n: given[n] - wanted[n], wanted.get)
    )
    return (apart.norm() / (whole.norm() or 1.0)).item()


def gathered(trainer, rows: list) -> list:
    """The rows of all processes, on each."""
    if trainer.args.world_size == 1:
        return rows
    parts = [None] * trainer.args.world_size
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def settings_of(words: list[str], processes: int = 1):
    """(method, Config, RunConfig, GRPOConfig) of the adapter's command line."""
    method, cfg, run, flags = adapter.script_settings(words)
    return method, cfg, run, adapter.trl_arguments(method, cfg, run, flags, processes)


def trainer_of(command: str, policy, folder, *flags: str):
    method, *own = command.split()
    words = [method, *SMALL, *own, "--model", str(policy), "--", "--output_dir", str(folder)]
    return adapter.Trainer(*settings_of([*words, *flags], int(os.environ.get("WORLD_SIZE", 1))))


def measure(command: str, policy: str, folder: str, error: str = "") -> dict:
    """One step through TRL, beside the script."""
    drawn = []

    def draw(*args, right=adapter.draw):
        samples, accuracy = right(*args)
        drawn.extend(samples)
        return samples, accuracy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "draw", draw)
        patch.setattr(common, "response_reward", half_are_right)
        if error:
            patch.setattr(*PLANTED[error][2:])
        micro = "2" if os.environ.get("WORLD_SIZE") == "2" else "4"
        trainer = trainer_of(command, policy, folder, "--per_device_train_batch_size", micro)
        kept = Kept(trainer)
        trainer.train()
    method, cfg = trainer.method, trainer.cfg
    samples = gathered(trainer, drawn)
    known = {(tuple(s.context), tuple(s.ids)): s for s in samples}
    model, _ = common.load_policy(policy, torch.device("cpu"))
    differences, clipped, seen = [], 0.0, 0
    for weights, gradient, rows in kept.steps:
        chosen = [known[row] for row in gathered(trainer, rows) if row in known]
        seen += len(chosen)
        if len(kept.steps) == 1:
            chosen = samples  # of a tree, equal nodes may have other children
        wanted, metrics = script_gradient(method, model, weights, chosen, cfg)
        differences.append(difference(gradient, wanted))
        clipped += metrics.get("block_clip", metrics.get("clip_fraction", 0))
    lengths = [len(s.ids) for s in samples]
    end = trainer.processing_class.eos_token_id
    return dict(
        differences=differences, clipped=clipped, samples=len(samples), seen=seen / cfg.epochs,
        lengths=len(set(lengths)), contexts=len({len(s.context) for s in samples}),
        truncated=sum(s.ids[-1] != end for s in samples),
        silent=sum(not any(s.advantages) for s in samples),
        signal=sum(any(s.advantages) for s in samples),
    )  # fmt: skip


def main(policy: str, folder: str) -> None:
    torch.set_num_threads(1)

    def run(case: str, error: str = "") -> dict:
        learned = Path(policy).parent / "learned" if "learned" in case else policy
        return measure(CASES[case], str(learned), folder, error)

    found = {case: run(case) for case in CASES}
    found |= {error: run(case, error) for error, (_, case, *_) in PLANTED.items()}
    if os.environ.get("RANK", "0") == "0":
        Path(folder, "found.json").write_text(json.dumps(found))


# ---------------------------------------------------------------------------------- the tests

QUIET = dict(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


def python(folder, *words, processes=1) -> subprocess.CompletedProcess:
    """`python *words` in `folder`, or the same under torchrun."""
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    command = [sys.executable, *(launcher if processes == 2 else ()), *map(str, words)]
    options = dict(env={**os.environ, **QUIET}, cwd=folder, timeout=900)
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """A warm start so short that its answers differ; beside it a policy of learned positions."""
    run = common.RunConfig(terms=3, warm_start_steps=90)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("policy"))
        problems = common.load_problems("sums", "train", None, 0, 3)
        model, tokenizer = common.first_policy(run, torch.device("cpu"))
        warm = common.warm_start(run, problems, model, tokenizer).resolve()
    tokenizer = common.build_tokenizer()
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2,
        bos_token_id=end, eos_token_id=end, initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(warm.parent / "learned")
    tokenizer.save_pretrained(warm.parent / "learned")
    return warm


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def found(request, policy, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("found")
    done = python(folder, __file__, policy, folder, processes=request.param)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text()) | dict(processes=request.param)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_scripts(found, case):
    assert max(found[case]["differences"]) < TOLERANCE, found[case]


@pytest.mark.parametrize("case", CASES)
def test_what_is_compared_is_no_easy_case(found, case):
    """Rows of many lengths, cut answers, some without signal, each trained once; and clipping."""
    step = found[case]
    assert step["seen"] == step["samples"] and step["contexts"] > 1 and step["truncated"]
    assert step["signal"] > 1 and (step["lengths"] > 2 or "learned" in case)
    assert step["silent"] or case == "spo-tree"  # whose nodes without signal are no samples
    assert len(step["differences"]) == {"mpo": 4}.get(case, 2 if "--batch" in CASES[case] else 1)
    assert (step["clipped"] > 0) == ("--lr" in CASES[case] and case != "srpo, two updates")


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found(found, error):
    if found["processes"] < PLANTED[error][0]:
        pytest.skip("shows on two processes")
    assert max(found[error]["differences"]) > 100 * TOLERANCE


# --------------------------------------------------------------------------- the rest of a run


class Rates(TrainerCallback):
    """Learning rates of the optimiser steps."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, *_, optimizer, **__):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("method", adapter.METHODS)
def test_learning_rates_are_the_scripts(monkeypatch, policy, tmp_path, method):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "response_reward", half_are_right)
    own = [*CASES[method].split()[1:], *"--epochs 2 --steps 3 --warmup_updates 1".split()]
    trainer = trainer_of(" ".join([method, *own]), policy, tmp_path)
    given, wanted = Rates(), []
    trainer.add_callback(given)
    trainer.train()

    def optimizer_step(model, optimizer, *rest, right=common.optimizer_step):
        wanted.append(optimizer.param_groups[0]["lr"])
        return right(model, optimizer, *rest)

    monkeypatch.setattr(common, "optimizer_step", optimizer_step)
    script, chosen, _ = adapter.METHODS[method]
    words = [*chosen.split(), *SMALL, *own, "--model", str(policy), "--eval_problems", "2"]
    monkeypatch.setattr(sys, "argv", ["script", *words])
    script.main()
    assert len({*wanted}) == len(wanted) == 6 * (2 if method == "mpo" else 1)
    assert given.rates == pytest.approx(wanted, rel=1e-6)


def test_a_step_has_the_scripts_problems_of_which_each_process_has_its_share(monkeypatch):
    """Twelve updates of three steps: the sixth is of the second step."""
    asked = []
    monkeypatch.setattr(adapter, "draw", lambda _, problems: asked.extend(problems) or ([], 0.25))
    for process in range(2):
        args = SimpleNamespace(max_steps=12, world_size=2, process_index=process, seed=3)
        trainer = SimpleNamespace(
            cfg=adapter.mpo.Config(prompts=4, batch_size=8, steps=3), args=args, problems=[*range(40)],
            state=SimpleNamespace(global_step=5), method="mpo",
            processing_class=SimpleNamespace(eos_token_id=0),
        )  # fmt: skip
        assert adapter.rollouts([""] * 8, trainer)["accuracy"] == 0.25
    assert asked == common.batch_at([*range(40)], 1, 4, 3)


@pytest.mark.parametrize("method", ["mpo", "spo-chain"])
def test_answers_are_drawn_as_the_settings_say(monkeypatch, policy, tmp_path, method):
    """From prompts with the instruction, at the temperature; their accuracy is the mean reward."""
    own = "--seed 3 --prompt Think. --training_tokens 777"
    trainer = trainer_of(f"{CASES[method]} {own}", policy, tmp_path)
    assert trainer.generator.initial_seed() == 3
    assert trainer.problems == common.load_problems("sums", "train", None, 3, 3)
    assert trainer.compute.training_tokens == 777 and trainer.instruction == "Think."
    monkeypatch.setattr(common, "response_reward", half_are_right)
    seen = []

    def complete(*args, right=common.complete, **options):
        seen.append((args[2], options, found := right(*args, **options)))
        return found

    monkeypatch.setattr(common, "complete", complete)
    problems = trainer.problems[:6]
    _, accuracy = adapter.draw(trainer, problems)
    states, options, answers = seen[0]
    tokenizer = trainer.processing_class
    assert states == [common.initial_state(tokenizer, p, "Think.") for p in problems]
    assert options["temperature"] == 1.3 and options["compute"] is trainer.compute
    assert accuracy == sum(answer.reward for answer in answers) / len(answers) > 0


def test_processes_draw_with_seeds_of_their_own(monkeypatch, policy, tmp_path):
    monkeypatch.setattr(adapter.GRPOConfig, "process_index", 1)
    trainer = trainer_of(f"{CASES['mpo']} --seed 3", policy, tmp_path)
    assert trainer.generator.initial_seed() == 4


def test_trees_without_any_signal_change_nothing(monkeypatch, policy, tmp_path):
    monkeypatch.setattr(common, "response_reward", lambda *_: 0.0)
    trainer = trainer_of(CASES["spo-tree"], policy, tmp_path)
    before = [weight.clone() for weight in trainer.model.parameters()]
    trainer.train()
    assert all(map(torch.equal, before, trainer.model.parameters()))


# ---------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "words, wrong",
    [
        ("", "the first argument"),
        ("grpo", "the first argument"),
        ("mpo --kl_coef 1", "unknown argument --kl_coef"),
        ("spo-chain --kl_coef 0.1", "--kl_coef"),
        ("spo-tree --batch_size 8", "--batch_size"),
        ("spo-tree --replay_age 2", "--replay_age"),
        ("mpo --scale_eps True", "--scale_eps"),
        ("mpo --eval_only --model x", "--eval_only: is not for TRL"),
        ("mpo -- --beta 0.1", "--beta behind --"),
        ("mpo -- --learning_rate=0.1", "--learning_rate behind --"),
        ("mpo -- --nothing 1", "--nothing"),
        ("mpo -- --fsdp", "--fsdp behind --"),
        ("mpo -- --save_strategy steps --load_best_model_at_end True", "behind --: "),
        ("mpo -- --use_vllm True --vllm_mode server", "--vllm_mode"),
    ],
)
def test_bad_input_is_one_line(words, wrong):
    with pytest.raises(BadInput, match=re.escape(wrong)) as error:
        settings_of(words.split())
    assert "\n" not in str(error.value)


def test_problems_that_do_not_divide_among_processes_are_refused():
    with pytest.raises(BadInput, match="--prompts 63: .* among 2 processes"):
        settings_of(["spo-chain", "--prompts", "63", "--batch_size", "0"], processes=2)


def test_room_is_looked_at_before_training(monkeypatch, policy, tmp_path):
    trainer = trainer_of(CASES["mpo"], policy, tmp_path)
    weights = trainer.model.num_parameters()
    free = 12 * weights + 2 * 1000 * common.token_bytes(trainer.model, trainer.compute)
    monkeypatch.setattr(common, "free_memory", lambda device: free)
    assert trainer_of(CASES["mpo"], policy, tmp_path).compute.sampling_tokens == 1000
    monkeypatch.setattr(common, "window", lambda model: 5)
    with pytest.raises(BadInput, match="exceeds the model's window of 5"):
        trainer_of(CASES["mpo"], policy, tmp_path)


def test_a_pass_has_as_many_rows_as_divide_an_update():
    *_, args = settings_of("mpo -- --per_device_train_batch_size 48".split(), processes=2)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (16, 2)
    assert args.steps_per_generation == 8


def test_another_trl_is_refused(monkeypatch):
    monkeypatch.setattr(adapter.trl, "__version__", "1.17.0")
    with pytest.raises(BadInput, match="TRL 1.17.0: this was tested with 1.16.0"):
        adapter.main()


@pytest.mark.parametrize("method", adapter.METHODS)
def test_defaults_are_the_scripts(method):
    _, cfg, _, args = settings_of([method])
    rows = args.per_device_train_batch_size * args.steps_per_generation
    assert rows == cfg.prompts * adapter.METHODS[method][2](cfg)
    updates = args.steps_per_generation // args.gradient_accumulation_steps
    assert updates == {"mpo": 4, "spo-chain": 2}.get(method, 1)
    assert args.max_steps == cfg.steps * updates
    assert args.learning_rate == cfg.lr and args.temperature == cfg.temperature


def test_settings_are_handed_on():
    flags = "--seed 7 --max_grad_norm 0.3 --gradient_checkpointing True --max_new_tokens 33"
    *_, args = settings_of(["mpo", *flags.split()])
    assert (args.seed, args.max_grad_norm, args.max_completion_length) == (7, 0.3, 33)
    assert args.activation_checkpointing and not settings_of(["mpo"])[-1].activation_checkpointing


def test_a_run_that_was_stopped_goes_on_where_trl_is_told_to(monkeypatch, tmp_path):
    done = []

    class Trainer:
        def __init__(self, *given):
            pass

        def __getattr__(self, name):
            return lambda *given: done.append((name, *given))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapter, "Trainer", Trainer)
    monkeypatch.setattr(sys, "argv", ["", "mpo", "--", "--resume_from_checkpoint", "there"])
    adapter.main()
    assert done == [("train", "there"), ("save_model",), ("save_state",)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_from_the_command_line(policy, tmp_path, processes):
    flags = "rrpo --tiny --steps 2 --prompts 4 --name x --model".split()
    script = ROOT / "tutorials" / "trl_adapter.py"
    done = python(tmp_path, script, *flags, policy, processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "runs/x/trainer_state.json").read_text())["global_step"] == 2
    flags_of_script = "--tiny --eval_only --eval_problems 4 --model runs/x".split()
    evaluated = python(tmp_path, ROOT / "reset_po.py", *flags_of_script)
    assert "4 held-out problems: sampled" in evaluated.stdout, evaluated.stderr[-4000:]
    again = python(tmp_path, script, *flags, policy)
    assert again.returncode == 2 and again.stderr.count("\n") == 1, again.stderr


def test_zero_2_makes_the_updates_of_plain_copies(policy, tmp_path):
    """After three updates, whose gradients are tested above, by DDP and with shards. Where
    DeepSpeed has not yet compiled what talks between CPUs, that takes minutes."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    words = "mpo --prompts 6 --group_size 4 --batch_size 24".split()
    words += [*SMALL, "--steps", "3", "--lr", "0.1", "--model", policy]
    zero = ["--deepspeed", ROOT / "tutorials" / "zero2.json"]
    for name, flags in (("copies", []), ("shards", zero)):
        flags = ["--", "--optim", "sgd", *flags]  # AdamW would hide a wrong normaliser
        script = ROOT / "tutorials" / "trl_adapter.py"
        done = python(tmp_path, script, *words, "--name", name, *flags, processes=2)
        assert done.returncode == 0, done.stderr[-4000:]
        assert ("deepspeed_shm_comm" in done.stdout) == (name == "shards")
    before = load_file(policy / "model.safetensors")
    copies = load_file(tmp_path / "runs/copies/model.safetensors")
    shards = load_file(tmp_path / "runs/shards/model.safetensors")
    moved = {name: weight - before[name] for name, weight in copies.items()}
    shards_moved = {name: shards[name] - before[name] for name in copies}
    assert difference(moved, before) > 1e-4
    assert difference(shards_moved, moved) < 1e-4


def test_accelerate_reads_its_configuration():
    config = load_config_from_file(str(ROOT / "tutorials" / "two_gpus.yaml"))
    assert (config.num_processes, config.distributed_type) == (2, "MULTI_GPU")


# ---------------------------------------------------------------------------------------- vLLM


class Engine:
    """Draws as many tokens for all, as TRL's vLLM does."""

    def generate(self, prompts, images, num_generations):
        return None, [[7, 8, 9, 3, 1][: self.max_completion_length] for _ in prompts], None, None


def test_vllm_draws_by_the_engine_within_each_budget():
    engine, prefixes = Engine(), [[0], [1], [2]]
    options = dict(max_new_tokens=[5, 2, 0], eos={1, 8}, temperature=0.5)
    drawn = adapter.vllm_sample(engine, None, prefixes, 2, **options)
    assert (engine.temperature, engine.max_completion_length) == (0.5, 5)
    assert [r.ids for r in drawn] == [[7, 8, 9, 3, 1]] * 2 + [[7, 8]] * 2 + [[]] * 2
    assert [r.finished for r in drawn] == [True] * 4 + [False] * 2
    assert [r.prompt for r in drawn] == [[0], [0], [1], [1], [2], [2]]


def test_vllm_draws_what_is_trained_on(monkeypatch, policy, tmp_path):
    def begin(trainer, *own, args, right=GRPOTrainer.__init__, **options):
        args.use_vllm = False  # for it is not installed
        right(trainer, *own, args=args, **options)
        args.use_vllm = True
        trainer.vllm_generation = Engine()

    monkeypatch.setattr(GRPOTrainer, "__init__", begin)
    monkeypatch.setattr(common, "sample", common.sample)  # to be put back
    trainer = trainer_of(CASES["mpo"], policy, tmp_path, "--use_vllm", "True")
    assert adapter.rollouts([""] * 24, trainer)["completion_ids"] == [[7, 8, 9, 3, 1]] * 24


if __name__ == "__main__":
    main(*sys.argv[1:])
