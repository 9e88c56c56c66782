"""SPO, MPO, RRPO and SRPO on TRL's GRPOTrainer, for who outgrows one GPU: credit and mask come from
the scripts' functions, and TRL brings what they lack (accelerate, DeepSpeed, FSDP, vLLM).

    python tutorials/trl_adapter.py spo-chain          or spo-tree, mpo, rrpo, srpo
    python tutorials/trl_adapter.py mpo --tiny         the script's flags and defaults
    python tutorials/trl_adapter.py rrpo --model FOLDER --data gsm8k -- --logging_steps 1
                                                       behind -- stand TRL's (GRPOConfig)

and on several processes, where there is no GPU over gloo:

    torchrun --nproc_per_node 2 tutorials/trl_adapter.py spo-chain --tiny
    accelerate launch --config_file tutorials/two_gpus.yaml tutorials/trl_adapter.py spo-chain
    torchrun --nproc_per_node 2 tutorials/trl_adapter.py spo-chain -- --deepspeed ZERO2.json

What goes where:

    answers or trees, their credit     rollout_func: a row for each of the script's samples,
                                       context -> prompt_ids, ids -> completion_ids, M -> env_mask
    an advantage for each token        (B, T) in the place of (B,): _generate_and_score_completions
    Z or N of an optimiser step        num_items_in_batch: _prepare_inputs (TRL's is a mean over the
                                       updates of a step), with loss_type "dapo", a sum over Z
    the resets' mean per rollout       loss_type "grpo"
    MPO's ratio of K tokens            log-probs go through block_log_ratio, which is linear: the
                                       difference of two is the log-ratio of windows or blocks

Each process samples and scores its share of a step's problems with a whole copy of the policy,
which therefore has to fit a card; gradients and optimiser states may be sharded.

vLLM: `-- --use_vllm True` lets it draw what common.sample would, on every process for itself
(colocated), because processes ask for unequal numbers of continuations. The policy still scores
what was drawn, so cutpoints, mask and old log-probs are its own. vLLM's differ a little; what it
drew counts as drawn by the policy, without a correction.

What differs from the scripts:
 1. --kl_coef, --replay_age, --scale_eps, --resume and, for trees, --batch_size are refused;
    --device, --dtype, --training_tokens, --eval_every, --show_every and --save_every do nothing:
    see TRL's --use_cpu, --bf16, --per_device_train_batch_size, --logging_steps, --save_strategy.
 2. A tree has fewer nodes with credit than nodes, and TRL wants as many rows in every step: empty
    ones fill it up. They change nothing, and take the time of a row. So do answers without signal.
 3. Rows are parted anew into optimiser steps by each process for itself, and --epochs repeats them
    in the same order.
 4. The scripts bound log-ratios at -10 and 10, TRL does not; and in bf16 its last layer is in bf16
    too, unless --cast_lm_head_to_fp32 True stands behind --.

Run: one process and two (DDP), on CPUs. Not run: GPUs, DeepSpeed, FSDP (but for putting a sharded
policy together), vLLM.
"""

import inspect
import json
import os
import sys
import time
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # first: Ctrl-C during the imports ends without a traceback
import mpo
import reset_po
import spo
import torch
import torch.nn.functional as F
from common import BadInput, Compute, Rollout, RunConfig, Sample
from datasets import Dataset
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.utils.rnn import pad_sequence

TESTED = "1.16.0"  # TRL's API moves monthly
try:
    import trl
    from trl import GRPOConfig, GRPOTrainer
    from trl.models import unwrap_model_for_generation
except ImportError as error:
    text = f"needs TRL {TESTED}, of tutorials/requirements.txt ({error})"
    raise (SystemExit if __name__ == "__main__" else ImportError)(text) from None

METHODS = {  # name -> the script, and what its command line would say
    "spo-chain": (spo, ["--variant", "chain"]),
    "spo-tree": (spo, ["--variant", "tree"]),
    "mpo": (mpo, []),
    "rrpo": (reset_po, ["--method", "rrpo"]),
    "srpo": (reset_po, ["--method", "srpo"]),
}
HOOKS = {  # of GRPOTrainer -> the parameters that are used here
    "__init__": ["rollout_func"],
    "_generate_and_score_completions": ["inputs"],
    "_prepare_inputs": ["generation_batch"],
    "_get_per_token_logps_and_entropies": ["model", "input_ids", "attention_mask"],
}


class Job(NamedTuple):
    """What the hooks need to know, beside what TRL does."""

    method: str
    cfg: object  # the script's Config
    seed: int
    train: list[common.Problem]
    tokenizer: object
    instruction: str
    compute: Compute
    generator: torch.Generator


# -------------------------------------------------------------------------- what a step trains on


def rows_per_problem(method: str, cfg) -> int:
    """The most samples that a problem gives: a tree's nodes, 2G rollouts, or its answers."""
    if method == "spo-tree":
        return sum(accumulate(cfg.branching, mul))
    return cfg.rollouts if method in ("rrpo", "srpo") else cfg.group_size


def updates_per_step(method: str, cfg) -> int:
    """Optimiser updates between two rounds of sampling."""
    rows = cfg.prompts * rows_per_problem(method, cfg)
    return cfg.epochs * (rows // (cfg.batch_size or rows))


def draw(model, problems, job: Job) -> tuple[list[Sample], float]:
    """The script's samples from these problems, with their credit, and the answers' accuracy."""
    cfg, generator, compute = job.cfg, job.generator, job.compute
    policy = model, job.tokenizer
    states = [common.initial_state(job.tokenizer, p, job.instruction) for p in problems]
    if job.method in ("rrpo", "srpo"):
        drawn, plans = reset_po.draw_answers(*policy, states, cfg, generator, compute)
        credit = reset_po.assign_credit(*policy, problems, drawn, plans, cfg, generator, compute)
        return credit.samples, credit.accuracy
    if job.method == "spo-tree":
        tree = spo.grow_trees(*policy, states, cfg, generator, compute)
        credit = spo.credit_trees(model, tree, cfg, compute)
        return credit.samples, credit.accuracy
    rollouts = common.complete(
        *policy, states, n=cfg.group_size, max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature, generator=generator, compute=compute,
    )  # fmt: skip
    if job.method == "mpo":
        credit = mpo.assign_credit(model, rollouts, cfg, compute)
    else:
        answers = [p.answer for p in problems for _ in range(cfg.group_size)]
        credit = spo.assign_credit(*policy, rollouts, answers, cfg, generator, compute)
    return credit.samples, sum(r.reward for r in rollouts) / len(rollouts)


def loss_masks(samples: list[Sample], method: str, cfg) -> list[list[int]]:
    """M_t of each sample, 1 or 0 for each of its ids: SPO's probability mask, else all ones."""
    if not samples:
        return []
    batch = common.collate(samples)
    mask = spo.trained_tokens(batch, cfg) if method.startswith("spo") else batch.mask  # (B, T)
    return [row[: len(s.ids)] for s, row in zip(samples, mask.int().tolist())]


def rollouts(job: Job, prompts: list, trainer) -> dict[str, list]:
    """TRL's rollout_func: one row for each of `prompts`, on each process of its own problems.

    TRL's prompts only count: it wants two rows or more for each, where SPO-chain has one answer to
    a problem. The problems are those that the script would take in this step.
    """
    method, cfg, args = job.method, job.cfg, trainer.args
    step = trainer.state.global_step // updates_per_step(method, cfg)
    share = cfg.prompts // args.world_size
    problems = common.batch_at(job.train, step, cfg.prompts, job.seed)
    problems = problems[args.process_index * share :][:share]
    with whole_policy(trainer) as model, sampler(trainer):
        samples, accuracy = draw(model, problems, job)
    masks = loss_masks(samples, method, cfg)
    end = [job.tokenizer.eos_token_id]
    samples += [Sample(end, end, [0.0])] * (len(prompts) - len(samples))  # a tree's empty rows
    masks += [[0]] * (len(prompts) - len(masks))
    return dict(
        prompt_ids=[s.context for s in samples], completion_ids=[s.ids for s in samples],
        logprobs=None, env_mask=masks, credit=[s.advantages for s in samples],
        accuracy=[accuracy] * len(samples),
    )  # fmt: skip


def accuracy(completions, accuracy, **_) -> list[float]:
    """TRL wants a reward function; it makes metrics alone, for the advantages are ours."""
    return accuracy


# --------------------------------------------------------------------------------- TRL's hooks


def check_hooks() -> None:
    """Raises BadInput that names the first hook which GRPOTrainer no longer has."""
    for name, wanted in HOOKS.items():
        there = inspect.signature(getattr(GRPOTrainer, name, lambda: None)).parameters
        if missing := [parameter for parameter in wanted if parameter not in there]:
            raise moved(f"GRPOTrainer.{name}", f"takes no {missing[0]}")


def moved(hook: str, what: str) -> BadInput:
    return BadInput(f"TRL {trl.__version__}: {hook} {what}; this was tested with TRL {TESTED}")


def credit_rows(inputs: list[dict], width: int) -> Tensor:
    """(B, T) the advantages of each row's ids, which the rollout function gave along; 0 behind."""
    rows = pad_sequence([torch.tensor(x["credit"], dtype=torch.float) for x in inputs], True)
    return F.pad(rows, (0, width - rows.shape[1]))


def count_trained(trainer, window: list[dict]) -> Tensor:
    """() the trained tokens of an optimiser step, over all processes: Z, or MPO's N."""
    own = sum((x["completion_mask"] * x["tool_mask"]).sum() for x in window)
    return trainer.accelerator.gather(own).sum()


def with_positions(model):
    """The model, with positions that count from a row's first token. TRL's count its padding too:
    the same up to rounding where positions are rotary, another policy where they are learned."""

    def forward(attention_mask, **inputs):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (B, L)
        return model(attention_mask=attention_mask, position_ids=positions, **inputs)

    return forward


class Trainer(GRPOTrainer):
    """GRPOTrainer with an advantage a token, an optimiser step's normaliser, and block ratios."""

    job: Job  # set by `make_trainer`

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        if "credit" not in inputs[0]:
            raise moved("rollout_func", "has keys that no longer reach the inputs")
        for key in ("completion_ids", "completion_mask", "tool_mask", "advantages"):
            if key not in out:
                raise moved("GRPOTrainer._generate_and_score_completions", f"gives no {key}")
        out["advantages"] = credit_rows(inputs, out["completion_ids"].shape[1]).to(self.args.device)
        if not self.job.cfg.clip_eps:  # the resets' loss has no ratio: TRL's is then 1
            out.pop("old_per_token_logps", None)
        return out

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if "num_items_in_batch" not in inputs or not getattr(self, "_buffered_inputs", None):
            raise moved("GRPOTrainer._prepare_inputs", "keeps no num_items_in_batch of its slices")
        size, slices = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        first = self._step % slices // size * size
        window = self._buffered_inputs[first : first + size]  # this optimiser step's
        # The loss divides by this times size / slices, the share of a step in a generation.
        return inputs | dict(num_items_in_batch=count_trained(self, window) * slices / size)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *args, **options
    ):
        model = with_positions(model)
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **options
        )
        if not isinstance(found, tuple) or len(found) != 3:
            raise moved("GRPOTrainer._get_per_token_logps_and_entropies", "returns no 3 values")
        if self.job.method != "mpo":
            return found
        cfg, mask = self.job.cfg, attention_mask[:, -logits_to_keep:].bool()  # (B, T)
        blocks = mpo.block_log_ratio(found[0], mask, cfg.block_size, cfg.layout, cfg.weights)
        return blocks, *found[1:]


@contextmanager
def whole_policy(trainer):
    """The policy with all its weights, in eval mode, to sample and score with."""
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        if trainer.is_fsdp_enabled:
            # Processes sample unequal numbers of tokens, and a sharded forward pass waits for all.
            options = StateDictOptions(full_state_dict=True)
            weights = get_model_state_dict(trainer.model_wrapped, options=options)
            model = type(model)._from_config(model.config)
            model.load_state_dict(weights)
            model.to(trainer.args.device)
        model.eval()
        yield model
    trainer.model_wrapped.train()


@contextmanager
def sampler(trainer):
    """vLLM in the place of common.sample, where TRL's flag asks for it."""
    own = common.sample
    common.sample = partial(vllm_sample, trainer.vllm_generation) if trainer.use_vllm else own
    try:
        yield
    finally:
        common.sample = own


def vllm_sample(
    engine, model, prefixes, n=1, *, max_new_tokens, eos, temperature=1.0, **_
) -> list[Rollout]:
    """common.sample by TRL's vLLM engine: as many tokens to all, each cut to its own budget."""
    one = isinstance(max_new_tokens, int)
    budgets = [max_new_tokens] * len(prefixes) if one else max_new_tokens
    rows = [(prefix, budget) for prefix, budget in zip(prefixes, budgets) for _ in range(n)]
    asked = [prefix for prefix, budget in rows if budget]
    engine.temperature, engine.max_completion_length = temperature, max(budgets)
    if asked:
        answers = iter(engine.generate(prompts=asked, images=None, num_generations=1)[1])
    drawn = []
    for prefix, budget in rows:
        ids = list(next(answers))[:budget] if budget else []
        drawn.append(Rollout(list(prefix), ids, bool(ids) and ids[-1] in eos))
    return drawn


# ------------------------------------------------------------------------------------- the run


def split_command(argv: list[str]) -> tuple[str, list[str], list[str]]:
    """(method, the script's flags, TRL's flags); raises BadInput for no or an unknown method."""
    own, theirs = argv, []
    if "--" in argv:
        own, theirs = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    if own[:1] in (["-h"], ["--help"]):
        print(__doc__)
        raise SystemExit
    if not own or own[0] not in METHODS:
        raise BadInput(f"the first argument must be one of {', '.join(METHODS)}")
    return own[0], own[1:], theirs


def script_settings(method: str, flags: list[str]):
    """(Config, RunConfig) as the script reads its flags; raises BadInput for what is not here."""
    script, chosen = METHODS[method]
    sys.argv[1:] = [*chosen, *flags]
    large = script.LARGE | (dict(kl_coef=0.0) if script is spo else {})
    settings = script.Config, f"trl-{method}", f"{method} on TRL", script.TINY, large
    cfg, run = common.parse_args(*settings)
    refused = {**vars(cfg), **vars(run)}
    for flag in ("kl_coef", "replay_age", "scale_eps", "resume", "eval_only"):
        if refused.get(flag):
            raise BadInput(f"--{flag}: is not for TRL here (see the header)")
    if method == "spo-tree" and cfg.batch_size:
        raise BadInput("--batch_size: is not for trees on TRL (see the header)")
    return cfg, run


def trl_arguments(method: str, cfg, run: RunConfig, flags: list[str], processes: int) -> GRPOConfig:
    """GRPOConfig: what makes loss and schedule the script's, our defaults, and TRL's own flags."""
    if cfg.prompts % processes:
        raise BadInput(f"--prompts {cfg.prompts}: must divide among {processes} processes")
    gpu, updates = torch.cuda.is_available(), updates_per_step(method, cfg) // cfg.epochs
    rows = cfg.prompts // processes * rows_per_problem(method, cfg)  # of a step, on a process
    fitting = [size for size in range(1, 33) if rows % (size * updates) == 0]
    parser = common.Parser(GRPOConfig, allow_abbrev=False)
    parser.set_defaults(
        output_dir=f"runs/{run.name}", use_cpu=not gpu, bf16=gpu, logging_steps=10,
        ddp_backend="gloo" if processes > 1 and not gpu else None, save_strategy="no",
        per_device_train_batch_size=max(fitting, default=1), report_to="none", disable_tqdm=True,
        activation_checkpointing=run.gradient_checkpointing, ddp_find_unused_parameters=False,
    )  # fmt: skip
    micro = parser.parse_known_args(flags)[0].per_device_train_batch_size
    if rows % (micro * updates):
        parts = f"the {rows} rows of a step and process, in {updates} updates"
        raise BadInput(f"--per_device_train_batch_size {micro}: must divide {parts}")
    settings = dict(
        max_steps=cfg.steps * updates * cfg.epochs, num_iterations=cfg.epochs,
        steps_per_generation=rows // micro, gradient_accumulation_steps=rows // micro // updates,
        num_generations=max(2, rows_per_problem(method, cfg)), temperature=cfg.temperature,
        max_completion_length=cfg.max_new_tokens, learning_rate=cfg.lr, weight_decay=0.0,
        lr_scheduler_type="constant_with_warmup" if method.startswith("spo") else "linear",
        warmup_steps=cfg.warmup_updates, max_grad_norm=cfg.max_grad_norm, seed=run.seed,
        loss_type="grpo" if method in ("rrpo", "srpo") else "dapo", beta=0.0,
        epsilon=cfg.clip_eps or 0.2, disable_dropout=True,
        vllm_importance_sampling_correction=False,
    )  # fmt: skip
    typed = {word.split("=")[0].removeprefix("--") for word in flags}
    if taken := sorted(typed & settings.keys()):
        raise BadInput(f"--{taken[0]} behind --: follows from the script's flags")
    parser.set_defaults(**settings)
    try:
        (args,) = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except ValueError as error:
        raise BadInput(f"behind --: {common.one_line(error)}") from None
    if args.use_vllm and (args.vllm_mode != "colocate" or args.vllm_tensor_parallel_size > 1):
        raise BadInput("--use_vllm: needs --vllm_mode colocate, on one card each (see the header)")
    return args


def make_trainer(method: str, cfg, run: RunConfig, args: GRPOConfig) -> Trainer:
    """The trainer of --model, or of the built-in warm start, on the script's problems."""
    check_hooks()
    device = args.device
    train = common.load_problems(run.data, "train", None, run.seed, run.terms)
    compute = Compute(torch.bfloat16 if args.bf16 else torch.float32)
    compute.training_tokens = common.training_tokens(device)
    model, tokenizer = common.first_policy(run, device)
    model, tokenizer = common.warm_started(run, train, model, tokenizer, compute)
    common.no_dropout(model)
    sizes = common.count_parameters(model), common.token_bytes(model, compute)
    fitting = common.sampling_tokens(common.free_memory(device), *sizes)
    compute.sampling_tokens = run.sampling_tokens or fitting
    instruction = common.pick_instruction(run, tokenizer)
    common.check_prompts(train, tokenizer, instruction, common.window(model))
    # Process 0 draws what the script draws from the same seed.
    generator = torch.Generator(device).manual_seed(run.seed + args.process_index)
    job = Job(method, cfg, run.seed, train, tokenizer, instruction, compute, generator)
    dataset = Dataset.from_dict({"prompt": [""] * args.generation_batch_size})
    trainer = Trainer(
        model=model, args=args, reward_funcs=accuracy, processing_class=tokenizer,
        train_dataset=dataset, rollout_func=partial(rollouts, job),
    )  # fmt: skip
    trainer.job = job
    return trainer


def held_out(trainer: Trainer, run: RunConfig) -> dict:
    """The script's evaluation; on every process, for what is sharded is put together for it."""
    job = trainer.job
    problems = common.load_problems(run.data, "test", run.eval_problems, run.seed, run.terms)
    with whole_policy(trainer) as model:
        return common.evaluate(
            model, job.tokenizer, problems, samples=run.eval_samples,
            max_new_tokens=job.cfg.max_new_tokens, temperature=job.cfg.temperature,
            seed=run.seed, instruction=job.instruction, compute=job.compute,
        )  # fmt: skip


def main() -> None:
    method, own, theirs = split_command(sys.argv[1:])
    cfg, run = script_settings(method, own)
    args = trl_arguments(method, cfg, run, theirs, int(os.environ.get("WORLD_SIZE", 1)))
    folder = Path(args.output_dir)
    if (folder / "summary.json").exists():
        raise BadInput(f"{folder} exists: pick another --name, or delete it")
    trainer = make_trainer(method, cfg, run, args)
    before, began = held_out(trainer, run), time.time()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds, after = time.time() - began, held_out(trainer, run)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        summary = dict(before=before, after=after, seconds=seconds, processes=args.world_size)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        common.say(f"before: {common.describe(before)}\nafter:  {common.describe(after)}")
        common.say(f"{seconds:.0f} s of training; files in {folder}/")


if __name__ == "__main__":
    common.cli(main)
