"""SPO, MPO, RRPO and SRPO on TRL's GRPOTrainer, for who outgrows one GPU: sampling, credit, mask and
block ratio are the scripts' functions; DDP, DeepSpeed's ZeRO and vLLM come with TRL.

    python tutorials/trl_adapter.py mpo --steps 20     or spo-chain, spo-tree, rrpo, srpo; then the
                                                       script's flags, and TRL's behind --
    accelerate launch --config_file tutorials/two_gpus.yaml tutorials/trl_adapter.py mpo
    torchrun --nproc_per_node 2 tutorials/trl_adapter.py mpo -- --deepspeed tutorials/zero2.json
    python mpo.py --eval_only --model runs/trl-mpo     held-out accuracy of what came out

Each process samples and scores its share of a step's problems with a whole copy of the policy, which
must fit a card. What differs from the scripts, also with vLLM, and what was run: README.md here, "When
one GPU is not enough".
"""

import math
import os
import sys
from functools import partial
from itertools import accumulate
from operator import mul
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # first: Ctrl-C during the imports ends without a traceback
import mpo
import reset_po
import spo
import torch
import torch.nn.functional as F
import trl
from common import BadInput, Compute, Rollout, RunConfig, Sample
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


TESTED = "1.16.0"  # TRL's hooks move monthly, and what no longer calls them would train wrongly
METHODS = {  # name -> script, what its command line would say, most samples of a problem
    "spo-chain": (spo, "--variant chain --kl_coef 0", lambda cfg: cfg.group_size),
    "spo-tree": (
        spo,
        "--variant tree --kl_coef 0 --batch_size 0",
        lambda cfg: sum(accumulate(cfg.branching, mul)),
    ),
    "mpo": (mpo, "", lambda cfg: cfg.group_size),
    "rrpo": (reset_po, "--method rrpo", lambda cfg: cfg.rollouts),
    "srpo": (reset_po, "--method srpo", lambda cfg: cfg.rollouts),
}


def draw(trainer, problems) -> tuple[list[Sample], float]:
    """The script's samples from these problems, with their credit, and the answers' accuracy."""
    cfg, generator, compute = trainer.cfg, trainer.generator, trainer.compute
    model, tokenizer = trainer.model, trainer.processing_class
    states = [common.initial_state(tokenizer, p, trainer.instruction) for p in problems]
    if trainer.method in ("rrpo", "srpo"):
        drawn, plans = reset_po.draw_answers(model, tokenizer, states, cfg, generator, compute)
        credit = reset_po.assign_credit(
            model, tokenizer, problems, drawn, plans, cfg, generator, compute
        )
        return credit.samples, credit.accuracy
    if trainer.method == "spo-tree":
        tree = spo.grow_trees(model, tokenizer, states, cfg, generator, compute)
        credit = spo.credit_trees(model, tree, cfg, compute)
        return credit.samples, credit.accuracy
    answers = common.complete(
        model, tokenizer, states, n=cfg.group_size, max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature, generator=generator, compute=compute,
    )  # fmt: skip
    if trainer.method == "mpo":
        credit = mpo.assign_credit(model, answers, cfg, compute)
    else:
        true_answers = [p.answer for p in problems for _ in range(cfg.group_size)]
        credit = spo.assign_credit(model, tokenizer, answers, true_answers, cfg, generator, compute)
    return credit.samples, sum(answer.reward for answer in answers) / len(answers)


def rollouts(prompts: list, trainer) -> dict:
    """TRL's rollout_func: one row for each of `prompts`, which are only counted, from this process's
    share of the problems of the script's step."""
    cfg, args = trainer.cfg, trainer.args
    step = trainer.state.global_step // (args.max_steps // cfg.steps)
    share = cfg.prompts // args.world_size
    problems = common.batch_at(trainer.problems, step, cfg.prompts, args.seed)
    samples, accuracy = draw(trainer, problems[args.process_index * share :][:share])
    end = [trainer.processing_class.eos_token_id]
    rows = samples + [Sample(end, end)] * (len(prompts) - len(samples))
    batch = common.collate(rows)
    mask = spo.trained_tokens(batch, cfg) if "spo-" in trainer.method else batch.mask  # (B, T)
    mask[len(samples) :] = False
    return dict(
        prompt_ids=[s.context for s in rows],
        completion_ids=[s.ids for s in rows],
        logprobs=None,
        env_mask=mask.int().tolist(),
        credit=batch.advantages.tolist(),
        accuracy=accuracy,
    )


def accuracy(accuracy: list[float], **_) -> list[float]:
    """The reward that TRL asks for and logs; what trains is `credit`."""
    return accuracy


def vllm_sample(engine, model, prefixes, n=1, *, max_new_tokens, eos, temperature, **_):
    """common.sample by TRL's vLLM engine: as many tokens to all, each cut to its own budget."""
    engine.temperature = temperature
    engine.max_completion_length = max(1, *max_new_tokens)
    asked = [prefix for prefix in prefixes for _ in range(n)]
    budgets = [budget for budget in max_new_tokens for _ in range(n)]
    drawn = engine.generate(prompts=asked, images=None, num_generations=1)[1]
    kept = [list(ids)[:budget] for ids, budget in zip(drawn, budgets)]
    return [Rollout(list(p), ids, not eos.isdisjoint(ids[-1:])) for p, ids in zip(asked, kept)]


class Trainer(GRPOTrainer):
    """GRPOTrainer with an advantage a token, an update's normaliser, and block ratios."""

    def __init__(self, method: str, cfg, run: RunConfig, args: GRPOConfig):
        self.method = method
        self.cfg = cfg
        self.compute = Compute(torch.bfloat16 if args.bf16 else torch.float32)
        self.compute.training_tokens = run.training_tokens or common.training_tokens(args.device)
        self.problems = common.load_problems(run.data, "train", None, run.seed, run.terms)
        model, tokenizer = common.starting_policy(run, self.problems, args.device, self.compute)
        common.no_dropout(model)
        self.compute.sampling_tokens = common.room_for_sampling(run, model, self.compute)
        self.instruction = common.pick_instruction(run, tokenizer)
        common.check_prompts(self.problems, tokenizer, self.instruction, common.window(model))
        # Process 0 draws what the script draws from the same seed.
        self.generator = torch.Generator(args.device).manual_seed(run.seed + args.process_index)
        super().__init__(
            model, reward_funcs=accuracy, args=args, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [""] * args.generation_batch_size}),
            rollout_func=rollouts,
        )  # fmt: skip
        if args.use_vllm:
            common.sample = partial(vllm_sample, self.vllm_generation)

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        credit = torch.tensor([x["credit"] for x in inputs], device=self.args.device)  # (B, T)
        out["advantages"] = F.pad(credit, (0, out["completion_ids"].shape[1] - credit.shape[1]))
        if not self.cfg.clip_eps:  # the resets' loss has no ratio: TRL's is then 1
            out.pop("old_per_token_logps", None)
        return out

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        size = self.args.gradient_accumulation_steps
        slices = self.args.steps_per_generation
        first = self._step % slices // size * size
        update = self._buffered_inputs[first : first + size]
        own = sum((x["completion_mask"] * x["tool_mask"]).sum() for x in update)
        # Z, or MPO's N, of an update: TRL's is a whole step's, and its loss takes size / slices of it.
        inputs["num_items_in_batch"] = self.accelerator.gather(own).sum() * slices / size
        return inputs

    def _get_per_token_logps_and_entropies(self, model, ids, mask, kept, *rest, **options):
        def from_first_token(attention_mask, **inputs):  # TRL's positions count the padding too
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (B, L)
            return model(attention_mask=attention_mask, position_ids=positions, **inputs)

        logps, *others = super()._get_per_token_logps_and_entropies(
            from_first_token, ids, mask, kept, *rest, **options
        )
        if self.method == "mpo":  # linear: the difference of two is the log-ratio of K tokens
            cfg = self.cfg
            answer = mask[:, -kept:].bool()  # (B, T)
            logps = mpo.block_log_ratio(logps, answer, cfg.block_size, cfg.layout, cfg.weights)
        return logps, *others


def script_settings(argv: list[str]):
    """(method, Config, RunConfig) as the script reads its flags, and TRL's flags."""
    if not argv or argv[0] not in METHODS:
        raise BadInput(f"the first argument must be one of {', '.join(METHODS)}; then --help")
    method = argv[0]
    end = argv.index("--") if "--" in argv else len(argv)
    script, chosen, _ = METHODS[method]
    sys.argv[1:] = [*chosen.split(), *argv[1:end]]
    cfg, run = common.parse_args(
        script.Config, f"trl-{method}", f"{method} on TRL", script.TINY, script.LARGE
    )
    settings = vars(cfg) | vars(run)
    refused = ["kl_coef", "replay_age", "scale_eps", "resume", "eval_only"]
    for flag in refused + ["batch_size"] * (method == "spo-tree"):
        if settings.get(flag):
            raise BadInput(f"--{flag}: is not for TRL here (see tutorials/README.md)")
    return method, cfg, run, argv[end + 1 :]


def trl_arguments(method: str, cfg, run: RunConfig, flags: list[str], processes: int) -> GRPOConfig:
    """TRL's own flags, and what makes loss and schedule the script's, which they may not change."""
    gpu = torch.cuda.is_available()
    parser = common.Parser(GRPOConfig, allow_abbrev=False)
    parser.set_defaults(
        output_dir=f"runs/{run.name}", use_cpu=not gpu, bf16=gpu, save_strategy="no",
        per_device_train_batch_size=32, activation_checkpointing=run.gradient_checkpointing,
    )  # fmt: skip
    given = vars(parser.parse_args(flags))
    step = cfg.prompts * METHODS[method][2](cfg)  # rows
    updates = math.ceil(step / (cfg.batch_size or step))
    if cfg.prompts % processes or step % (processes * updates):
        parts = f"{processes} processes and {updates} updates"
        raise BadInput(f"--prompts {cfg.prompts}: their {step} rows must divide among {parts}")
    rows = step // processes // updates
    micro = math.gcd(rows, given.pop("per_device_train_batch_size"))
    settings = dict(
        max_steps=cfg.steps * updates * cfg.epochs, num_iterations=cfg.epochs,
        steps_per_generation=rows // micro * updates, gradient_accumulation_steps=rows // micro,
        num_generations=max(2, step // cfg.prompts), temperature=cfg.temperature, seed=run.seed,
        max_completion_length=cfg.max_new_tokens, learning_rate=cfg.lr, weight_decay=0.0,
        lr_scheduler_type="linear", warmup_steps=cfg.warmup_updates,
        max_grad_norm=cfg.max_grad_norm, epsilon=cfg.clip_eps or 0.2, beta=0.0,
        loss_type="grpo" if method in ("rrpo", "srpo") else "dapo", disable_dropout=True, fsdp=None,
        # Processes ask for unequal numbers of continuations, so each has a vLLM of its own.
        vllm_importance_sampling_correction=False, vllm_mode="colocate",
        vllm_tensor_parallel_size=1,
    )  # fmt: skip
    typed = {word.split("=")[0].removeprefix("--") for word in flags}
    if taken := sorted(typed & settings.keys()):
        raise BadInput(f"--{taken[0]} behind --: is set here, or by the script's flags")
    try:
        return GRPOConfig(**given | settings, per_device_train_batch_size=micro)
    except ValueError as error:
        raise BadInput(f"behind --: {common.one_line(error)}") from None


def main() -> None:
    if trl.__version__ != TESTED:
        raise BadInput(f"TRL {trl.__version__}: this was tested with {TESTED} (requirements.txt)")
    method, cfg, run, flags = script_settings(sys.argv[1:])
    args = trl_arguments(method, cfg, run, flags, int(os.environ.get("WORLD_SIZE", 1)))
    if Path(args.output_dir, "config.json").exists():
        raise BadInput(f"{args.output_dir} exists: pick another --name, or delete it")
    trainer = Trainer(method, cfg, run, args)
    trainer.train(args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    common.cli(main)
