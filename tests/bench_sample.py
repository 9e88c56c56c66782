"""Sampling and Monte-Carlo credit, beside transformers' generate. By hand: pytest skips it.

    python tests/bench_sample.py              the built-in policy after its warm start
    python tests/bench_sample.py Qwen2.5-0.5B         random weights in that shape (see memory.py)

Same policy, prompts, temperature and number of answers; the two take turns, and a ratio is the
median over the rounds. The warm start is made first where it is missing.
"""

import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import memory  # noqa: E402
import spo  # noqa: E402

PROMPTS, BUDGET, ROUNDS = 64, 80, 5


def clock(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(device, work) -> tuple[float, object]:
    """Seconds of work(), and what it returned."""
    began = clock(device)
    result = work()
    return clock(device) - began, result


device, dtype = common.pick_device(common.RunConfig())
DEVICE, DTYPE = torch.device(device), common.DTYPES[dtype]
HERE = common.Compute(dtype=DTYPE, training_tokens=common.training_tokens(DEVICE))


def policy(shape: str = ""):
    """(model, tokenizer, problems): the warm start, or random weights in a shape of memory.py."""
    run = common.RunConfig()
    problems = common.load_problems(run.data, "train", None, run.seed, run.terms)
    if not shape:
        return *common.starting_policy(run, problems, DEVICE, HERE), problems
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(memory.config(shape)).to(DEVICE).eval()
    return model, common.build_tokenizer(), problems


def matrix_rate(device, dtype, size: int = 2048) -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    a @ b
    return 2 * size**3 / min(timed(device, lambda: a @ b)[0] for _ in range(10))


def bandwidth(device, size: int = 1 << 28) -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * size / min(timed(device, lambda: b.copy_(a))[0] for _ in range(10))


@contextmanager
def watched(model):
    """Counts the tokens that the policy computes while sampling, padding left out, and takes the
    time of prefilling."""
    counts = dict(prefilled=0, decoded=0, passes=0, prefilling=0.0)

    def before(module, args, options):
        if options.get("use_cache"):
            module.began = clock(model.device)

    def after(module, args, options, output):
        if not options.get("use_cache"):
            return
        (rows, columns), mask = args[0].shape, options["attention_mask"]
        if columns > 1:
            counts["prefilled"] += mask.sum().item()
            counts["prefilling"] += clock(model.device) - module.began
        else:
            counts["decoded"] += rows
            counts["passes"] += 1

    hooks = [
        model.base_model.register_forward_pre_hook(before, with_kwargs=True),
        model.base_model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def generate(model, tokenizer, prompts: list[list[int]], n: int) -> list[list[int]]:
    """transformers' own sampling, its settings those of `common.sample`."""
    end, tokenizer.padding_side = tokenizer.eos_token_id, "left"
    padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    with HERE.autocast(model.device):
        out = model.generate(
            **padded, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=n,
            max_new_tokens=BUDGET, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
    rows = out[:, padded["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def sampling_table(model, tokenizer, prompts: list[list[int]], large: bool) -> None:
    device, dtype = model.device, DTYPE
    eos, rate = common.eos_ids(model, tokenizer), matrix_rate(device, dtype)
    work = 2 * sum(p.numel() for p in model.parameters())
    print(f"matrix products: {rate / 1e9:,.0f} GFLOP/s; a token: {work / 1e6:,.2f} MFLOP")
    heads = "sample, tokens/s | generate, tokens/s | ratio | computed / sampled | arithmetic limit"
    print(f"|  n | {heads} |\n|---|---|---|---|---|---|")
    passes = []
    for n in (1, 8, 32):

        def ours() -> int:
            rollouts = common.sample(
                model, prompts, n, max_new_tokens=BUDGET, eos=eos, compute=HERE
            )
            return sum(len(r.ids) for r in rollouts)

        def theirs() -> int:
            return sum(map(len, generate(model, tokenizer, prompts, n)))

        with watched(model) as counts:
            sampled = ours()
        theirs()
        pairs = []
        for _ in range(ROUNDS):
            (s, tokens), (s_theirs, tokens_theirs) = timed(device, ours), timed(device, theirs)
            pairs.append((tokens / s, tokens_theirs / s_theirs))
        mine, other = (statistics.median(column) for column in zip(*pairs))
        ratio, share = statistics.median(a / b for a, b in pairs), counts["decoded"] / sampled
        limit = f"{mine * work / rate:.0%}, computed {mine * share * work / rate:.0%}"
        print(f"| {n} | {mine:,.0f} | {other:,.0f} | {ratio:.1f} | {share:.2f} | {limit} |")
        rows, each = counts["decoded"] / counts["passes"], sampled / mine / counts["passes"]
        passes.append(f"{counts['passes']} of {rows:.0f} rows in {1e3 * each:.1f} ms each")
    print(f"\npasses after the prefill: {', '.join(passes)}")
    if large:  # at n = 1 a pass reads all weights once, for a token a prompt
        options = dict(max_new_tokens=BUDGET, eos=set())
        seconds, _ = timed(device, lambda: common.sample(model, prompts, 1, **options))
        read = BUDGET * work / 2 * dtype.itemsize / seconds
        share = read / bandwidth(device)
        print(f"decoding at n = 1 reads weights at {read / 1e9:,.0f} GB/s, {share:.0%} of a copy's")


def value_table(model, tokenizer, problems) -> None:
    """All boundaries of one answer to each problem; equal ones are estimated once by both."""
    device = model.device
    generator = torch.Generator(device).manual_seed(0)
    states = [common.initial_state(tokenizer, problem) for problem in problems]
    rollouts = common.complete(
        model, tokenizer, states, 1, BUDGET, generator=generator, compute=HERE
    )
    samples = [common.Sample(r.prompt, r.ids) for r in rollouts]
    common.score(model, samples, 1.0, HERE)
    print("| N | boundaries | estimate_values | generate on the decoded prefixes | ratio |")
    print("|---|---|---|---|---|")
    for n in (4, 9):
        cfg, cut = spo.Config(continuations=n), []
        for s, problem in zip(samples, problems):
            starts = spo.boundaries(s, model, tokenizer, cfg)
            cut += [(s.context, s.ids[:t], problem.answer) for t in starts]
        texts = dict.fromkeys((tokenizer.decode([*p, *done]), answer) for p, done, answer in cut)

        def ours():
            return spo.estimate_values(model, tokenizer, cut, cfg, generator, HERE)

        def theirs():
            prefixes = [common.encode(tokenizer, text) for text, _ in texts]
            ids = iter(generate(model, tokenizer, prefixes, n))
            tails = [[next(ids) for _ in range(n)] for _ in texts]
            rewards = [
                common.reward(text + tokenizer.decode(tail, skip_special_tokens=True), answer)
                for (text, answer), some in zip(texts, tails)
                for tail in some
            ]
            return torch.tensor(rewards).view(-1, n).mean(1).tolist()

        values, beside = torch.tensor(ours()[0]), torch.tensor(theirs())
        apart = abs(values.mean() - beside.mean()) / (values.var() / len(values)) ** 0.5
        assert apart < 4 and values.mean() > 0, "the two estimate different values"
        pairs = [(timed(device, ours)[0], timed(device, theirs)[0]) for _ in range(ROUNDS)]
        mine, other = (statistics.median(column) for column in zip(*pairs))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"| {n} | {len(cut)} | {mine:.2f} s | {other:.2f} s | {ratio:.1f} |")


def step(model, tokenizer, problems, cfg: spo.Config, generator) -> spo.Credit:
    """One step of spo.py, in one update, which leaves the weights as they are."""
    cfg = replace(cfg, batch_size=0)
    states = [common.initial_state(tokenizer, problem) for problem in problems]
    if cfg.variant == "tree":
        tree = spo.grow_trees(model, tokenizer, states, cfg, generator, HERE)
        credit = spo.credit_trees(model, tree, cfg, HERE)
    else:
        rollouts = common.complete(
            model, tokenizer, states, n=cfg.group_size, max_new_tokens=cfg.max_new_tokens,
            generator=generator, compute=HERE,
        )  # fmt: skip
        answers = [problem.answer for problem in problems for _ in range(cfg.group_size)]
        credit = spo.assign_credit(model, tokenizer, rollouts, answers, cfg, generator, HERE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    spo.update(model, optimizer, schedule, credit.samples, cfg, "0", compute=HERE)
    return credit


def reuse_table(model, tokenizer, problems) -> None:
    rows = {
        "chain, N = 4": spo.Config(continuations=4, group_size=1),
        "chain, N = 9": spo.Config(continuations=9, group_size=1),
        "tree, 2-2-2": spo.Config(variant="tree"),
        "tree, 6-6-6": spo.Config(variant="tree", branching=[6, 6, 6]),
        "GRPO, groups of 8": spo.Config(partition="trajectory", group_size=8, mask=False),
    }
    heads = "sampled | prefilled | computed after it | both / sampled | prefilling, of the step"
    print(f"| | {heads} |\n|---|---|---|---|---|---|")
    for name, cfg in rows.items():
        work = lambda: step(model, tokenizer, problems, cfg, generator)  # noqa: E731
        generator = torch.Generator(model.device).manual_seed(0)
        work()
        with watched(model) as counts:
            steps = [timed(model.device, work) for _ in range(ROUNDS)]
        seconds, sampled = sum(s for s, _ in steps), sum(credit.tokens for _, credit in steps)
        shares = counts["prefilled"] / ROUNDS, counts["decoded"] / ROUNDS
        ratio = (counts["prefilled"] + counts["decoded"]) / sampled
        cells = [f"{x:,.0f}" for x in (sampled / ROUNDS, *shares)]
        cells += [f"{ratio:.2f}", f"{counts['prefilling'] / seconds:.0%}"]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    shape = (sys.argv[1:] or [""])[0]
    model, tokenizer, problems = policy(shape)
    problems = problems[:PROMPTS]
    prompts = [common.prompt_ids(tokenizer, problem) for problem in problems]
    threads = f"{torch.get_num_threads()} threads"
    print(f"{PROMPTS} prompts, {model.device}, {DTYPE}, {threads}\n")
    sampling_table(model, tokenizer, prompts, bool(shape))
    if shape:
        return
    print()
    value_table(model, tokenizer, problems)
    print()
    reuse_table(model, tokenizer, problems)
    print("\nrandom weights of the same shape, so that texts part at once")
    model.load_state_dict(common.build_policy(len(tokenizer)).state_dict())
    sampling_table(model, tokenizer, prompts, False)


if __name__ == "__main__":
    main()
