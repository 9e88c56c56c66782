"""SPO, MPO, RRPO and SRPO on TRL's GRPOTrainer, for who outgrows one GPU: credit and mask come from
the scripts' functions, and TRL brings what they lack (accelerate, DeepSpeed, FSDP, vLLM).

    python tutorials/trl_adapter.py spo-chain          or spo-tree, mpo, rrpo, srpo
    python tutorials/trl_adapter.py mpo --tiny         the script's flags and defaults
    python tutorials/trl_adapter.py rrpo --model FOLDER --data gsm8k -- --logging_steps 1
                                                       behind -- stand TRL's (GRPOConfig)
    torchrun --nproc_per_node 2 tutorials/trl_adapter.py spo-chain -- --deepspeed ZERO2.json
    accelerate launch --config_file tutorials/two_gpus.yaml tutorials/trl_adapter.py spo-chain

    answers or trees, their credit     rollout_func: a row for each of the script's samples,
                                       context -> prompt_ids, ids -> completion_ids, M -> env_mask
    an advantage for each token        (B, T) in the place of (B,): _generate_and_score_completions
    Z or N of an optimiser step        num_items_in_batch: _prepare_inputs (TRL's is a mean over the
                                       updates of a step), with loss_type "dapo", a sum over Z
    the resets' mean per rollout       loss_type "grpo"
    MPO's ratio of K tokens            log-probs go through block_log_ratio, which is linear: the
                                       difference of two is the log-ratio of windows or blocks

Each process samples and scores its share of a step's problems with a whole copy of the policy,
which therefore has to fit a card; gradients and optimiser states may be sharded. With
`-- --use_vllm True` vLLM draws, on every process for itself. The policy still scores what was
drawn, so cutpoints, mask and old log-probs are its own; that vLLM's differ is not corrected.

What differs from the scripts:
 1. --kl_coef, --replay_age, --scale_eps, --resume, --eval_only and, for trees, --batch_size are
    refused; --device, --dtype, --training_tokens, --eval_every, --show_every and --save_every do
    nothing: see TRL's --use_cpu, --bf16, --per_device_train_batch_size, --save_strategy. A step of
    trees is one update, as with the script's --batch_size 0.
 2. A tree has fewer nodes with credit than nodes, and TRL wants as many rows in every step: empty
    ones fill it up. They change nothing, and take the time of a row. So do answers without signal.
 3. Rows are parted anew into optimiser steps by each process for itself, and --epochs repeats them
    in the same order. One without any signal still moves the weights, by AdamW's momentum.
 4. The scripts bound log-ratios at -10 and 10, TRL does not; and in bf16 its last layer is in bf16
    too, unless --cast_lm_head_to_fp32 True stands behind --.

Run: one process and two (DDP), on CPUs. Not run: GPUs, DeepSpeed, FSDP (but for putting a sharded
policy together), vLLM.
"""

import json
import os
import sys
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from operator import mul
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # first: Ctrl-C during the imports ends without a traceback
import mpo
import reset_po
import spo
import torch
import torch.nn.functional as F
from common import BadInput, Compute, Rollout, RunConfig, Sample
from datasets import Dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

try:
    import trl
    from trl import GRPOConfig, GRPOTrainer
    from trl.models import unwrap_model_for_generation
except ImportError as error:
    raise SystemExit(f"needs TRL, of tutorials/requirements.txt ({error})") from None

TESTED = "1.16.0"  # TRL's hooks move monthly, and what no longer calls them would train wrongly
METHODS = {  # name -> script, what its command line would say, most samples that a problem gives
    "spo-chain": (spo, "--variant chain --kl_coef 0", lambda c: c.group_size),
    "spo-tree": (
        spo,
        "--variant tree --batch_size 0 --kl_coef 0",
        lambda c: sum(accumulate(c.branching, mul)),
    ),
    "mpo": (mpo, "", lambda c: c.group_size),
    "rrpo": (reset_po, "--method rrpo", lambda c: c.rollouts),
    "srpo": (reset_po, "--method srpo", lambda c: c.rollouts),
}


# -------------------------------------------------------------------------- what a step trains on


def draw(trainer, model, problems) -> tuple[list[Sample], float]:
    """The script's samples from these problems, with their credit, and the answers' accuracy."""
    cfg, tokenizer = trainer.cfg, trainer.processing_class
    how = cfg, trainer.generator, trainer.compute
    states = [common.initial_state(tokenizer, p, trainer.instruction) for p in problems]
    if trainer.method in ("rrpo", "srpo"):
        drawn, plans = reset_po.draw_answers(model, tokenizer, states, *how)
        credit = reset_po.assign_credit(model, tokenizer, problems, drawn, plans, *how)
    elif trainer.method == "spo-tree":
        tree = spo.grow_trees(model, tokenizer, states, *how)
        credit = spo.credit_trees(model, tree, cfg, trainer.compute)
    else:
        answers = common.complete(
            model, tokenizer, states, n=cfg.group_size, max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature, generator=trainer.generator, compute=trainer.compute,
        )  # fmt: skip
        if trainer.method == "mpo":
            credit = mpo.assign_credit(model, answers, cfg, trainer.compute)
            return credit.samples, sum(r.reward for r in answers) / len(answers)
        true_answers = [p.answer for p in problems for _ in range(cfg.group_size)]
        credit = spo.assign_credit(model, tokenizer, answers, true_answers, *how)
    return credit.samples, credit.accuracy


def rollouts(prompts: list, trainer) -> dict:
    """TRL's rollout_func: a row for each of `prompts`, which only count (TRL wants two rows or more
    for each, SPO-chain has one), from this process's share of the problems of the script's step."""
    cfg, args = trainer.cfg, trainer.args
    step = trainer.state.global_step // (args.max_steps // cfg.steps)
    share = cfg.prompts // args.world_size
    problems = common.batch_at(trainer.problems, step, cfg.prompts, args.seed)
    problems = problems[args.process_index * share :][:share]
    sample = partial(vllm_sample, trainer.vllm_generation) if trainer.use_vllm else common.sample
    with whole_policy(trainer) as model, patch.object(common, "sample", sample):
        samples, accuracy = draw(trainer, model, problems)
    end = [trainer.processing_class.eos_token_id]
    empty = [Sample(end, end)] * (len(prompts) - len(samples))  # beside a tree's nodes with credit
    rows = samples + empty
    batch = common.collate(rows)
    masked = trainer.method.startswith("spo")
    mask = spo.trained_tokens(batch, cfg) if masked else batch.mask  # (B, T) M
    mask[len(samples) :] = False
    return dict(
        prompt_ids=[s.context for s in rows], completion_ids=[s.ids for s in rows],
        logprobs=None, env_mask=mask.int().tolist(), credit=batch.advantages.tolist(),
        accuracy=accuracy,
    )  # fmt: skip


def accuracy(accuracy: list[float], **_) -> list[float]:
    """TRL wants a reward function; it makes metrics alone, for the advantages are ours."""
    return accuracy


def vllm_sample(
    engine, model, prefixes, n=1, *, max_new_tokens, eos, temperature=1.0, **_
) -> list[Rollout]:
    """common.sample by TRL's vLLM engine: as many tokens to all, each cut to its own budget."""
    rows = [row for row in zip(prefixes, max_new_tokens, strict=True) for _ in range(n)]
    engine.temperature = temperature
    engine.max_completion_length = max(1, *max_new_tokens)
    asked = [prefix for prefix, _ in rows]
    answers = engine.generate(prompts=asked, images=None, num_generations=1)[1]
    drawn = []
    for (prefix, budget), ids in zip(rows, answers):
        kept = list(ids)[:budget]
        drawn.append(Rollout(list(prefix), kept, not eos.isdisjoint(kept[-1:])))
    return drawn


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


def with_positions(model):
    """The model, with positions that count from a row's first token. TRL's count its padding too:
    the same up to rounding where positions are rotary, another policy where they are learned."""

    def forward(attention_mask, **inputs):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (B, L)
        return model(attention_mask=attention_mask, position_ids=positions, **inputs)

    return forward


class Trainer(GRPOTrainer):
    """GRPOTrainer with an advantage a token, an optimiser step's normaliser, and block ratios; of
    --model, or of the built-in warm start, on the script's problems."""

    def __init__(self, method: str, cfg, run: RunConfig, args: GRPOConfig):
        device = args.device
        self.method = method
        self.cfg = cfg
        self.problems = common.load_problems(run.data, "train", None, run.seed, run.terms)
        self.compute = Compute(torch.bfloat16 if args.bf16 else torch.float32)
        self.compute.training_tokens = common.training_tokens(device)
        model, tokenizer = common.starting_policy(run, self.problems, device, self.compute)
        common.no_dropout(model)
        sizes = model.num_parameters(), common.token_bytes(model, self.compute)
        fitting = common.sampling_tokens(common.free_memory(device), *sizes)
        self.compute.sampling_tokens = run.sampling_tokens or fitting
        self.instruction = common.pick_instruction(run, tokenizer)
        common.check_prompts(self.problems, tokenizer, self.instruction, common.window(model))
        # Process 0 draws what the script draws from the same seed.
        self.generator = torch.Generator(device).manual_seed(run.seed + args.process_index)
        super().__init__(
            model, reward_funcs=accuracy, args=args, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [""] * args.generation_batch_size}),
            rollout_func=rollouts,
        )  # fmt: skip

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        credit = torch.tensor([x["credit"] for x in inputs], device=self.args.device)  # (B, T)
        out["advantages"] = F.pad(credit, (0, out["completion_ids"].shape[1] - credit.shape[1]))
        if not self.cfg.clip_eps:  # the resets' loss has no ratio: TRL's is then 1
            out.pop("old_per_token_logps", None)
        return out

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        size, slices = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        first = self._step % slices // size * size
        window = self._buffered_inputs[first : first + size]  # this optimiser step's
        own = sum((x["completion_mask"] * x["tool_mask"]).sum() for x in window)
        trained = self.accelerator.gather(own).sum()  # () Z, or MPO's N, over all processes
        # The loss divides by this times size / slices, the share of a step in a generation.
        return inputs | dict(num_items_in_batch=trained * slices / size)

    def _get_per_token_logps_and_entropies(self, model, ids, mask, kept, *rest, **options):
        logps, *others = super()._get_per_token_logps_and_entropies(
            with_positions(model), ids, mask, kept, *rest, **options
        )
        if self.method == "mpo":
            how = self.cfg.block_size, self.cfg.layout, self.cfg.weights
            logps = mpo.block_log_ratio(logps, mask[:, -kept:].bool(), *how)  # (B, T)
        return logps, *others


# ------------------------------------------------------------------------------------- the run


def script_settings(argv: list[str]):
    """(method, Config, RunConfig) as the script reads its flags, and TRL's flags; raises BadInput
    for what is not here."""
    if not argv or argv[0] not in METHODS:
        raise BadInput(f"the first argument must be one of {', '.join(METHODS)}; then --help")
    method = argv[0]
    end = argv.index("--") if "--" in argv else len(argv)
    script, chosen, _ = METHODS[method]
    sys.argv[1:] = [*chosen.split(), *argv[1:end]]
    cfg, run = common.parse_args(
        script.Config, f"trl-{method}", f"{method} on TRL", script.TINY, script.LARGE
    )
    refused = ["kl_coef", "replay_age", "scale_eps", "resume", "eval_only"]
    refused += ["batch_size"] if method == "spo-tree" else []
    for flag in refused:
        if (vars(cfg) | vars(run)).get(flag):
            raise BadInput(f"--{flag}: is not for TRL here (see the header)")
    return method, cfg, run, argv[end + 1 :]


def trl_arguments(method: str, cfg, run: RunConfig, flags: list[str], processes: int) -> GRPOConfig:
    """GRPOConfig: what makes loss and schedule the script's, our defaults, and TRL's own flags."""
    if cfg.prompts % processes:
        raise BadInput(f"--prompts {cfg.prompts}: must divide among {processes} processes")
    gpu = torch.cuda.is_available()
    each = METHODS[method][2](cfg)
    updates = max(1, cfg.prompts * each // (cfg.batch_size or cfg.prompts * each))
    rows = cfg.prompts // processes * each  # of a step, on a process
    fitting = [size for size in range(1, 33) if rows % (size * updates) == 0]
    parser = common.Parser(GRPOConfig, allow_abbrev=False)
    parser.set_defaults(
        output_dir=f"runs/{run.name}", use_cpu=not gpu, bf16=gpu, save_strategy="no",
        per_device_train_batch_size=max(fitting, default=1), disable_tqdm=True,
        activation_checkpointing=run.gradient_checkpointing, ddp_find_unused_parameters=False,
    )  # fmt: skip
    micro = parser.parse_known_args(flags)[0].per_device_train_batch_size
    if rows % (micro * updates):
        parts = f"the {rows} rows of a step and process, in {updates} updates"
        raise BadInput(f"--per_device_train_batch_size {micro}: must divide {parts}")
    settings = dict(
        max_steps=cfg.steps * updates * cfg.epochs, num_iterations=cfg.epochs,
        steps_per_generation=rows // micro, gradient_accumulation_steps=rows // micro // updates,
        num_generations=max(2, each), temperature=cfg.temperature, seed=run.seed,
        max_completion_length=cfg.max_new_tokens, learning_rate=cfg.lr, weight_decay=0.0,
        lr_scheduler_type="linear", warmup_steps=cfg.warmup_updates,
        max_grad_norm=cfg.max_grad_norm, epsilon=cfg.clip_eps or 0.2, beta=0.0,
        loss_type="grpo" if method in ("rrpo", "srpo") else "dapo", disable_dropout=True,
        vllm_importance_sampling_correction=False,
        # Of vLLM, for processes ask for unequal numbers of continuations: each has its own.
        vllm_mode="colocate", vllm_tensor_parallel_size=1,
    )  # fmt: skip
    typed = {word.split("=")[0].removeprefix("--") for word in flags}
    if taken := sorted(typed & settings.keys()):
        raise BadInput(f"--{taken[0]} behind --: is set here, or by the script's flags")
    parser.set_defaults(**settings)
    try:
        return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)[0]
    except ValueError as error:
        raise BadInput(f"behind --: {common.one_line(error)}") from None


def held_out(trainer: Trainer, run: RunConfig) -> dict:
    """The script's evaluation; on every process, for what is sharded is put together for it."""
    problems = common.load_problems(run.data, "test", run.eval_problems, run.seed, run.terms)
    with whole_policy(trainer) as model:
        return common.evaluate(
            model, trainer.processing_class, problems, run.eval_samples,
            trainer.cfg.max_new_tokens, trainer.cfg.temperature, run.seed, trainer.instruction,
            trainer.compute,
        )  # fmt: skip


def main() -> None:
    if trl.__version__ != TESTED:
        raise BadInput(f"TRL {trl.__version__}: this was tested with {TESTED} (requirements.txt)")
    method, cfg, run, flags = script_settings(sys.argv[1:])
    args = trl_arguments(method, cfg, run, flags, int(os.environ.get("WORLD_SIZE", 1)))
    summary = Path(args.output_dir, "summary.json")
    if summary.exists():
        raise BadInput(f"{summary.parent} exists: pick another --name, or delete it")
    trainer = Trainer(method, cfg, run, args)
    before = held_out(trainer, run)
    seconds = trainer.train(args.resume_from_checkpoint).metrics["train_runtime"]
    after = held_out(trainer, run)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        facts = dict(before=before, after=after, seconds=seconds, processes=args.world_size)
        summary.write_text(json.dumps(facts, indent=2) + "\n")
        common.say(f"before: {common.describe(before)}\nafter:  {common.describe(after)}")
        common.say(f"{seconds:.0f} s of training; files in {summary.parent}/")


if __name__ == "__main__":
    common.cli(main)
