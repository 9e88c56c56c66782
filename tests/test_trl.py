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
import torch.distributed.fsdp

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import common  # noqa: E402

pytest.importorskip("trl", reason="TRL is not installed: tutorials/requirements.txt")

import trl_adapter as adapter  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.commands.config.config_args import load_config_from_file  # noqa: E402
from common import BadInput  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

TOLERANCE = 1e-5
SMALL = "--terms 3 --max_new_tokens 22 --temperature 1.3 --steps 1".split()
SMALL += "--max_grad_norm 1e12 --warmup_updates 0".split()
CASES = {  # name -> the adapter's command line, without the flags above
    "spo-chain": "spo-chain --prompts 12 --continuations 2",
    "spo-chain, two updates": "spo-chain --prompts 16 --continuations 2 --batch_size 8 --lr 0.001",
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
PLANTED = {  # error -> where it shows: processes, case; and the name in the adapter it replaces
    "mask dropped": ((1, 2), "spo-chain", "loss_masks"),
    "Z of each process": ((2,), "spo-chain", "count_trained"),
    "N of the whole step, not of the update": ((1, 2), "mpo", "_prepare_inputs"),
    "advantages a row": ((1, 2), "spo-chain", "credit_rows"),
    "token ratios": ((1, 2), "mpo", "_get_per_token_logps_and_entropies"),
    "mean over tokens, not over rollouts": ((1, 2), "srpo", "make_trainer"),
    "positions that count padding": ((1, 2), "mpo, learned positions", "with_positions"),
}


# ------------------------------------------------- in processes of their own: what is compared


def half_are_right(ids, finished, answer, tokenizer) -> float:
    """By no pattern, so that small batches have a signal; of every third problem all are wrong."""
    return float(int(answer) % 3 and zlib.crc32(str(ids).encode()) % 2)


def ones(samples, *_):
    return [[1] * len(s.ids) for s in samples]


def count_here(trainer, window):
    own = sum((x["completion_mask"] * x["tool_mask"]).sum() for x in window)
    return own * trainer.accelerator.num_processes


def mean_credit(inputs, width, right=adapter.credit_rows):
    lengths = torch.tensor([len(x["credit"]) for x in inputs])
    return (right(inputs, width).sum(1) / lengths)[:, None].expand(-1, width)


def token_mean(*args, right=adapter.make_trainer):
    trainer = right(*args)
    trainer.loss_type = "dapo"
    return trainer


def plant(patch: pytest.MonkeyPatch, name: str) -> None:
    wrong = dict(
        loss_masks=ones, count_trained=count_here, credit_rows=mean_credit,
        make_trainer=token_mean, with_positions=lambda model: model,
    )  # fmt: skip
    if name in wrong:
        patch.setattr(adapter, name, wrong[name])
    else:
        patch.setattr(adapter.Trainer, name, getattr(GRPOTrainer, name))


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


def measure(command: str, policy: str, folder: str, error: str = "") -> dict:
    """One step through TRL, beside the script."""
    method, *flags = command.split()
    processes = int(os.environ.get("WORLD_SIZE", 1))
    drawn = []

    def draw(model, problems, job, right=adapter.draw):
        samples, accuracy = right(model, problems, job)
        drawn.extend(samples)
        return list(samples), accuracy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "draw", draw)
        patch.setattr(common, "response_reward", half_are_right)
        if error:
            plant(patch, error)
        cfg, run = adapter.script_settings(method, [*SMALL, *flags, "--model", policy])
        micro = "2" if processes == 2 else "4"
        extra = ["--output_dir", folder, "--per_device_train_batch_size", micro]
        args = adapter.trl_arguments(method, cfg, run, extra, processes)
        trainer = adapter.make_trainer(method, cfg, run, args)
        kept = Kept(trainer)
        trainer.train()
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
    end = trainer.job.tokenizer.eos_token_id
    return dict(
        differences=differences, clipped=clipped, samples=len(samples), seen=seen / cfg.epochs,
        lengths=len(set(lengths)), contexts=len({len(s.context) for s in samples}),
        truncated=sum(s.ids[-1] != end for s in samples),
        silent=sum(not any(s.advantages) for s in samples),
        signal=sum(any(s.advantages) for s in samples),
    )  # fmt: skip


def together(policy: str) -> bool:
    """Is a policy that FSDP has sharded as it was, once `whole_policy` has put it together?

    Under FSDP accelerate takes no CPU; what shards the policy here is torch's own function.
    """
    model, _ = common.load_policy(policy, torch.device("cpu"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = adapter.GRPOConfig(output_dir=".", use_cpu=True, bf16=False, ddp_backend="gloo")
    torch.distributed.fsdp.fully_shard(model)
    share = sum(weight.to_local().numel() for weight in model.parameters())
    trainer = SimpleNamespace(model_wrapped=model, is_fsdp_enabled=True, args=args)
    trainer.accelerator = Accelerator(cpu=True)
    with adapter.whole_policy(trainer) as whole:
        after = whole.state_dict()
        assert not whole.training and share < 0.6 * common.count_parameters(whole)
    return model.training and all(torch.equal(after[name], before[name]) for name in before)


def main(policy: str, folder: str) -> None:
    torch.set_num_threads(1)

    def run(case: str, error: str = "") -> dict:
        learned = Path(policy).parent / "learned" if "learned" in case else policy
        return measure(CASES[case], str(learned), folder, error)

    found = {case: run(case) for case in CASES}
    found |= {error: run(case, name) for error, (_, case, name) in PLANTED.items()}
    found["together"] = os.environ.get("WORLD_SIZE") == "2" and together(policy)
    if os.environ.get("RANK", "0") == "0":
        Path(folder, "found.json").write_text(json.dumps(found))


# ---------------------------------------------------------------------------------- the tests

QUIET = dict(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


def python(folder, *words, processes=1) -> subprocess.CompletedProcess:
    """`python *words` in `folder`, or the same under torchrun."""
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    command = [sys.executable, *(launcher if processes == 2 else ()), *map(str, words)]
    options = dict(env={**os.environ, **QUIET}, cwd=folder, timeout=300)
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
    processes, _, _ = PLANTED[error]
    if found["processes"] not in processes:
        pytest.skip("shows on two processes")
    assert max(found[error]["differences"]) > 100 * TOLERANCE


def test_a_sharded_policy_is_put_together_to_sample(found):
    assert found["together"] == (found["processes"] == 2)


# ------------------------------------------------------------------------- hooks that have moved


def trainer_of(command: str, policy, folder):
    method, *flags = command.split()
    cfg, run = adapter.script_settings(method, [*SMALL, *flags, "--model", str(policy)])
    args = adapter.trl_arguments(method, cfg, run, ["--output_dir", str(folder)], 1)
    return adapter.make_trainer(method, cfg, run, args)


@pytest.mark.parametrize("hook", adapter.HOOKS)
def test_a_hook_that_is_gone_is_named(monkeypatch, hook):
    monkeypatch.setattr(GRPOTrainer, hook, lambda self: None)
    with pytest.raises(BadInput, match=rf"TRL \S+: GRPOTrainer.{hook} .*tested with TRL 1.16.0"):
        adapter.check_hooks()


def test_the_hooks_are_where_they_were():
    adapter.check_hooks()


def drop(key):
    """A hook of TRL's that gives what it gives, without `key`."""

    def wrap(hook):
        def hooked(self, *args):
            return {k: v for k, v in hook(self, *args).items() if k != key}

        return hooked

    return wrap


def pair(hook):
    return lambda self, *args, **options: hook(self, *args, **options)[:2]


def copied(hook):
    return lambda self, inputs: hook(self, [dict(x) for x in inputs])


@pytest.mark.parametrize(
    "hook, changed, named",
    [
        ("_generate_and_score_completions", drop("tool_mask"), "gives no tool_mask"),
        ("_generate_and_score_completions", copied, "rollout_func"),
        ("_prepare_inputs", drop("num_items_in_batch"), "_prepare_inputs"),
        ("_get_per_token_logps_and_entropies", pair, "_get_per_token_logps_and_entropies"),
    ],
)
def test_a_hook_that_does_something_else_is_named(
    monkeypatch, policy, tmp_path, hook, changed, named
):
    trainer = trainer_of(CASES["mpo"], policy, tmp_path)
    monkeypatch.setattr(GRPOTrainer, hook, changed(getattr(GRPOTrainer, hook)))
    with pytest.raises(BadInput, match=named):
        trainer.train()


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
        ("mpo -- --beta 0.1", "--beta behind --"),
        ("mpo -- --learning_rate=0.1", "--learning_rate behind --"),
        ("mpo -- --nothing 1", "--nothing"),
        ("mpo -- --per_device_train_batch_size 7", "--per_device_train_batch_size 7"),
        ("mpo -- --use_vllm True --vllm_mode server", "--use_vllm"),
    ],
)
def test_bad_input_is_one_line(words, wrong):
    with pytest.raises(BadInput, match=re.escape(wrong)) as error:
        method, own, theirs = adapter.split_command(words.split())
        cfg, run = adapter.script_settings(method, own)
        adapter.trl_arguments(method, cfg, run, theirs, 1)
    assert "\n" not in str(error.value)


def test_problems_that_do_not_divide_among_processes_are_refused():
    cfg, run = adapter.script_settings("spo-chain", ["--prompts", "63"])
    with pytest.raises(BadInput, match="--prompts 63: must divide among 2 processes"):
        adapter.trl_arguments("spo-chain", cfg, run, [], 2)


@pytest.mark.parametrize("method", adapter.METHODS)
def test_defaults_are_the_scripts(method):
    cfg, run = adapter.script_settings(method, [])
    args = adapter.trl_arguments(method, cfg, run, [], 1)
    rows = args.per_device_train_batch_size * args.steps_per_generation
    assert rows == cfg.prompts * adapter.rows_per_problem(method, cfg)
    updates = args.steps_per_generation // args.gradient_accumulation_steps
    assert updates == (4 if method == "mpo" else 1) and args.max_steps == cfg.steps * updates
    assert args.learning_rate == cfg.lr and args.temperature == cfg.temperature


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_from_the_command_line(policy, tmp_path, processes):
    flags = "rrpo --tiny --steps 2 --prompts 4 --eval_problems 4 --name x --model".split()
    script = ROOT / "tutorials" / "trl_adapter.py"
    done = python(tmp_path, script, *flags, policy, processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("after:  sampled") == 1
    summary = json.loads((tmp_path / "runs" / "x" / "summary.json").read_text())
    assert summary["processes"] == processes
    common.load_policy(tmp_path / "runs" / "x", torch.device("cpu"))
    again = python(tmp_path, script, *flags, policy)
    assert again.returncode == 2 and again.stderr.count("\n") == 1, again.stderr


def test_accelerate_reads_its_configuration():
    config = load_config_from_file(str(ROOT / "tutorials" / "two_gpus.yaml"))
    assert (config.num_processes, config.distributed_type) == (2, "MULTI_GPU")


# ---------------------------------------------------------------------------------------- vLLM


def test_vllm_draws_by_the_engine_within_each_budget():
    """An engine that draws as many tokens for all, as TRL's does: each answer is cut to its own."""

    class Engine:
        def generate(self, prompts, images, num_generations):
            assert (self.temperature, self.max_completion_length) == (0.5, 5)
            return None, [[7, 8, 9, 3, 1][: 5 - p[0]] for p in prompts], None, None

    drawn = adapter.vllm_sample(
        Engine(), None, [[0], [1], [2]], 2, max_new_tokens=[5, 2, 0], eos={3, 8}, temperature=0.5
    )
    assert [r.ids for r in drawn] == [[7, 8, 9, 3, 1]] * 2 + [[7, 8]] * 2 + [[]] * 2
    assert [r.finished for r in drawn] == [False, False, True, True, False, False]
    assert [r.prompt for r in drawn] == [[0], [0], [1], [1], [2], [2]]


def test_the_sampler_is_put_back(monkeypatch):
    own = common.sample
    trainer = SimpleNamespace(use_vllm=True, vllm_generation=None)
    with pytest.raises(KeyboardInterrupt), adapter.sampler(trainer):
        assert common.sample is not own
        raise KeyboardInterrupt
    assert common.sample is own


if __name__ == "__main__":
    main(*sys.argv[1:])
