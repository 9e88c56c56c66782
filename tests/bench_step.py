"""What a step costs: beside TRL's, beside a plain update, and as its sizes grow. By hand: pytest
skips it.

    python tests/bench_step.py              all tables; TRL's needs `pip install trl`
    python tests/bench_step.py growth       one of them: trl, update, memory, growth

What is compared takes turns, and a ratio is the median over the rounds. Memory is the most that the
work adds to its process (on a GPU, to what is allocated), each measurement in a process of its own.
"""

import contextlib
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import spo  # noqa: E402
from bench_sample import DEVICE, HERE, ROUNDS, clock, policy, step, timed  # noqa: E402

GRPO = dict(partition="trajectory", mask=False)


def trl_table() -> None:
    """A step of GRPO, 32 prompts x 8 answers: TRL's trainer, and after each of its steps ours, from
    the same weights, which nothing changes: the learning rate is 0."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        print("trl is not installed here: pip install trl")
        return
    cfg, seconds, lengths = spo.Config(prompts=32, group_size=8, **GRPO), [], []
    model, tokenizer, problems = policy()
    device, problems = model.device, problems[: cfg.prompts]
    theirs, generator = policy()[0], torch.Generator(device).manual_seed(0)

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = clock(device)

        def on_step_end(self, *args, **kwargs):
            taken = clock(device) - self.began
            ours, credit = timed(device, lambda: step(model, tokenizer, problems, cfg, generator))
            seconds.append((ours, taken))
            lengths.extend(len(a.rollout.ids) for a in credit.answers)

    def reward(completions, answer, **kwargs):  # without end tokens
        return [common.reward(text, true) for text, true in zip(completions, answer)]

    texts = [tokenizer.decode(common.prompt_ids(tokenizer, problem)) for problem in problems]
    rows = [dict(prompt=text, answer=problem.answer) for text, problem in zip(texts, problems)]
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder, per_device_train_batch_size=256, num_generations=8, steps_per_generation=1,
            max_completion_length=cfg.max_new_tokens, max_steps=2 * ROUNDS + 2, learning_rate=0.0,
            beta=0.0, use_cpu=device.type == "cpu", bf16=HERE.dtype == torch.bfloat16,
            gradient_checkpointing=False, report_to="none", save_strategy="no",
            logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            theirs, reward, settings, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Turns()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = seconds[2:]
    ours, taken = (statistics.median(column) for column in zip(*seconds))
    ratio = statistics.median(b / a for a, b in seconds)
    logs = [log for log in trainer.state.log_history if "reward" in log]
    length = statistics.mean(log["completions/mean_length"] for log in logs)
    idle = statistics.mean(log["frac_reward_zero_std"] for log in logs)
    print("| GRPO, 32 x 8 | seconds a step | tokens an answer |\n|---|---|---|")
    print(f"| spo.py | {ours:.2f} | {statistics.mean(lengths):.1f} |")
    print(f"| TRL | {taken:.2f} | {length:.1f} |")
    print(f"\nTRL takes {ratio:.1f} times as long; {idle:.0%} of the groups carry no signal")


def plain_update(model, samples: list[common.Sample], clip_eps: float) -> None:
    """GRPO's loss and its gradient as first written down: one batch in the order given, padded to
    its longest, logits of every position."""
    batch = common.collate(samples, model.device)
    lengths = batch.context_lens + batch.mask.sum(1)  # (B,)
    place = torch.arange(batch.input_ids.shape[1], device=model.device)[None]  # (1, L)
    with HERE.autocast(model.device):
        logits = model(batch.input_ids, attention_mask=(place < lengths[:, None]).long()).logits
    logprobs = logits[:, :-1].float().log_softmax(-1)  # (B, L - 1, V)
    logprobs = logprobs.gather(-1, batch.input_ids[:, 1:, None])[..., 0]  # (B, L - 1)
    place = place[:, 1:]
    trained = (batch.context_lens[:, None] <= place) & (place < lengths[:, None])  # (B, L - 1)
    log_ratio = logprobs[trained] - batch.old_logprobs[batch.mask]
    objective, _ = common.clipped_surrogate(log_ratio, batch.advantages[batch.mask], clip_eps)
    (-objective.mean()).backward()


def gradient(model, work) -> torch.Tensor:
    model.zero_grad()
    work()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def update_table() -> None:
    """One batch, all of whose samples carry a signal, forward and backward."""
    model, tokenizer, _ = policy()
    rng, cfg = random.Random(0), spo.Config(**GRPO, group_size=2)
    batches = {}
    for name, terms in (("7 terms", [7]), ("2 to 16 terms", range(2, 17))):
        problems = [common.make_sum(0, "train", i, rng.choice(terms)) for i in range(256)]
        batches[name] = [
            common.Sample(
                common.prompt_ids(tokenizer, problem),
                ids := common.solution_ids(tokenizer, problem),
                [rng.choice((-1.0, 1.0))] * len(ids),
            )
            for problem in problems
        ]
    tree = spo.Config(variant="tree")
    problems = common.load_problems("sums", "train", 64)
    generator = torch.Generator(model.device).manual_seed(0)
    batches["tree"] = step(model, tokenizer, problems, tree, generator).samples
    heads = "samples | trained ids each | update | 16,384 tokens at once | plain | ratio"
    print(f"| {heads} |\n|---|---|---|---|---|---|")
    for name, samples in batches.items():
        common.score(model, samples, 1.0, HERE)

        def ours(most=HERE.training_tokens):
            z = sum(len(s.ids) for s in samples)
            for micro in common.micro_batches(samples, most):
                batch = common.collate(micro, model.device)
                logprobs = common.token_logprobs(model, batch, compute=HERE)
                spo.spo_loss(logprobs, batch, batch.mask, z, cfg.clip_eps)[0].backward()

        def plain():
            plain_update(model, samples, cfg.clip_eps)

        torch.testing.assert_close(gradient(model, ours), gradient(model, plain))
        ways, times = (ours, lambda: ours(1 << 14), plain), []
        for _ in range(ROUNDS):
            times.append([timed(model.device, way)[0] for way in ways])
        cells = " | ".join(f"{statistics.median(column):.2f} s" for column in zip(*times))
        ratio = statistics.median(row[2] / row[0] for row in times)
        lengths = [len(s.ids) for s in samples]
        lengths = f"{min(lengths)} to {max(lengths)}"
        print(f"| {len(samples)}, {name} | {lengths} | {cells} | {ratio:.1f} |")


def peak_of(device, work) -> float:
    """Bytes that work() adds at most to what the process holds, in a process of its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now (Linux)
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """Bytes of this process in memory: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", status)[1])


def alone(function, *arguments):
    """function(*arguments) in a new process, where what is freed (Linux) is given back at once."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def scoring_peak(vocabulary: int, tokens: int, plain: bool) -> float:
    """MB to score and go backward, with a policy whose layers need next to nothing."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    device = DEVICE
    model = LlamaForCausalLM(config).to(device).eval()
    samples = [common.Sample([0], [0] * (tokens // 8), [1.0] * (tokens // 8)) for _ in range(8)]

    def work(samples=samples):
        if plain:
            plain_update(model, samples, 0.2)
        else:
            batch = common.collate(samples, device)
            common.token_logprobs(model, batch, compute=HERE).sum().backward()

    work([common.Sample([0], [0], [1.0])])  # gradients exist, libraries are loaded
    return peak_of(device, work) / 1e6


def memory_table() -> None:
    heads = [f"{tokens:,} ids" for tokens in (2048, 4096, 8192)]
    print(f"| vocabulary | | {' | '.join(heads)} |\n|---|---|---|---|---|")
    for vocabulary in (32_000, 64_000, 128_000):
        for plain in (False, True):
            peaks = [alone(scoring_peak, vocabulary, n, plain) for n in (2048, 4096, 8192)]
            cells = " | ".join(f"{peak:,.0f} MB" for peak in peaks)
            print(f"| {vocabulary:,} | {'plain' if plain else 'token_logprobs'} | {cells} |")


def step_cost(trained: bool, flags: dict, memory: bool) -> tuple[float, float]:
    """A step of spo.py: the tokens it samples, and its seconds (median) or MB at most."""
    with contextlib.redirect_stdout(None):
        model, tokenizer, problems = policy()
    if not trained:  # random text that only its budget ends, and random rewards
        torch.manual_seed(0)
        model.load_state_dict(common.build_policy(len(tokenizer)).state_dict())
        common.eos_ids = lambda model, tokenizer: {-1}
        common.response_reward = lambda ids, *_: float(sum(ids) % 2)
    cfg, steps = spo.Config(**flags), []
    generator = torch.Generator(model.device).manual_seed(0)

    def work():
        credit = step(model, tokenizer, problems[: cfg.prompts], cfg, generator)
        steps.append(credit.tokens)

    step(model, tokenizer, problems[:2], cfg, generator)
    if memory:
        return 0, peak_of(model.device, work) / 1e6
    cost = statistics.median(timed(model.device, work)[0] for _ in range(ROUNDS))
    return statistics.mean(steps), cost


def growth_table() -> None:
    """Each size doubled twice; beside it what that multiplies, from the smallest."""
    grpo, chain = dict(GRPO, group_size=8), dict(continuations=4, group_size=1)
    fixed = dict(chain, partition="fixed", segment_tokens=16)
    few, lengths = dict(prompts=16), (64, 128, 256)
    rows = {
        "prompts, GRPO x 8": (True, grpo, "prompts", (32, 64, 128)),
        "prompts, chain": (True, chain, "prompts", (32, 64, 128)),
        "group size, GRPO": (True, dict(GRPO, prompts=32), "group_size", (8, 16, 32)),
        "N, chain": (True, chain, "continuations", (4, 8, 16)),
        "group size, GRPO, random": (False, dict(GRPO, **few), "group_size", (8, 16, 32)),
        "N, fixed chain, random": (False, dict(fixed, **few), "continuations", (4, 8, 16)),
        "length, GRPO x 8, random": (False, dict(grpo, **few), "max_new_tokens", lengths),
        "length, fixed chain, random": (False, dict(fixed, **few), "max_new_tokens", lengths),
    }
    print("| | sizes | tokens sampled | seconds | MB |\n|---|---|---|---|---|")
    for name, (trained, flags, key, sizes) in rows.items():
        tokens, seconds, peaks = [], [], []
        for size in sizes:
            sampled, taken = step_cost(trained, flags | {key: size}, memory=False)
            tokens.append(sampled)
            seconds.append(taken)
            peaks.append(alone(step_cost, trained, flags | {key: size}, True)[1])

        def cell(values: list, form: str) -> str:
            grown = ", ".join(f"x {value / values[0]:.1f}" for value in values[1:])
            return f"{values[0]:{form}}, {grown}"

        cells = ", ".join(map(str, sizes)), cell(tokens, ",.0f"), cell(seconds, ".2f")
        print(f"| {name} | {' | '.join(cells)} | {cell(peaks, ',.0f')} |", flush=True)


TABLES = dict(trl=trl_table, update=update_table, memory=memory_table, growth=growth_table)

if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        TABLES[name]()
        print()
