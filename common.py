"""What spo.py, mpo.py and reset_po.py share; nothing in here belongs to one algorithm.

In reading order: problems and answers -> policy and warm start -> sampling -> scoring -> shared maths -> optimisation
and checkpoints -> evaluation -> run log and display.

Data flow:  prompt ids -> sample() -> Rollout -> credit assignment (in the scripts) -> Sample -> collate() ->
token_logprobs() -> loss (in the scripts).  Everything is cut on token ids, and every mask comes from lengths.
"""

import csv
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Iterator, Literal, NamedTuple

import datasets
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_linear_schedule_with_warmup

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()


class BadInput(Exception):
    """Something the user gave cannot be used. `cli` prints it as one line and exits with code 2."""


def arg(default, help: str):
    """A dataclass field that the command line documents."""
    return field(default=default, metadata={"help": help})


def require_range(config, low: float, *names: str, open: bool = False) -> None:
    """Raises BadInput unless the named numbers are finite and at least `low` (above it if `open`)."""
    for name in names:
        value = getattr(config, name)
        if not math.isfinite(value) or value < low or (open and value == low):
            raise BadInput(f"--{name} {value}: must be {'above' if open else 'at least'} {low}")


@dataclass
class RunConfig:
    """What a run is about, whatever the algorithm. Each script adds its own Config."""

    name: str = arg("", "the run's folder is runs/<name>; empty: the script's name")
    data: str = arg("sums", "'sums' (the built-in task) or a local .jsonl/.parquet file with question and answer")
    model: str = arg("", "folder of a causal LM in Hugging Face format; empty: the built-in policy, warm-started")
    seed: int = arg(0, "fixes problems, warm start, sampling and order; on CPU also every digit of the result")
    device: Literal["auto", "cpu", "cuda"] = arg("auto", "auto: cuda where there is one")
    dtype: Literal["auto", "fp32", "bf16"] = arg("auto", "autocast over fp32 weights; auto: bf16 on cuda, else fp32")
    terms: int = arg(7, "built-in task: the longest sum has this many terms, the shortest two fewer")
    warm_start_steps: int = arg(300, "supervised steps that make the built-in policy; 0: an untrained policy")
    eval_problems: int = arg(500, "held-out problems per evaluation")
    eval_samples: int = arg(4, "answers sampled per held-out problem: their mean is accuracy, their best pass@k")
    show_every: int = arg(10, "show one answer with its credit every so many steps; 0: never")
    save_every: int = arg(10, "checkpoint every so many steps; the last step is always saved")
    tiny: bool = arg(False, "a whole experiment in 30 s: smaller defaults for everything not given")
    resume: bool = arg(False, "continue runs/<name> from its checkpoint, to the last digit on CPU")
    eval_only: bool = arg(False, "evaluate --model, or else the checkpoint of runs/<name>, and write nothing")

    def __post_init__(self):
        require_range(self, 0, "seed", "warm_start_steps", "show_every")
        require_range(self, 1, "eval_problems", "eval_samples", "save_every")
        require_range(self, 2, "terms")
        if not re.fullmatch(r"[\w.-]*", self.name) or self.name in (".", "..", "warm_start"):
            raise BadInput(f"--name {self.name!r}: letters, digits, '.', '_' and '-' only, and not warm_start")


# ---------------------------------------------------------------------------------------------- problems and answers


class Problem(NamedTuple):
    question: str
    solution: str  # worked steps, one a line, then "#### answer": GSM8K's form
    answer: str
    checkable: bool = False  # True: `solution` is the only right text, so every step of an attempt can be judged


WRONG_FACTS = 0.35  # share of the 180 single-digit facts that the imitated student has learnt wrong ...
ERROR_RATE = 0.75  # ... and how often such a fact comes out wrong, always one too high so that errors never cancel


def wrong_facts(seed: int) -> frozenset[tuple[int, int]]:
    """The facts (last digit of the running total, signed term) that the imitated student gets wrong."""
    facts = [(digit, term) for digit in range(10) for term in range(-9, 10) if term]
    return frozenset(random.Random(f"{seed}-facts").sample(facts, round(WRONG_FACTS * len(facts))))


def solve_sum(question: str, facts: frozenset = frozenset(), rng: random.Random | None = None) -> str:
    """Work out a running sum, one step a line; a step that uses one of `facts` is off by one ERROR_RATE of the time.

    >>> solve_sum("31+4-7")
    '31+4=35\\n35-7=28\\n#### 28'
    """
    total, *terms = map(int, re.findall(r"[+-]?\d+", question))
    lines = []
    for term in terms:
        slip = (total % 10, term) in facts and rng.random() < ERROR_RATE
        lines.append(f"{total}{term:+d}={total + term + slip}")
        total += term + slip
    return "\n".join([*lines, f"#### {total}"])


def split_of(question: str) -> str:
    """A question belongs to one split for good, whatever the file or seed: 80 % train, 10 % each of the others."""
    return ("validation", "test", *["train"] * 8)[zlib.crc32(question.encode()) % 10]


def make_sum(seed: int, split: str, i: int, terms: int) -> Problem:
    """Problem i of a split: 10-49, then single digits, `+` twice as likely as `-`, totals kept within 10-99."""
    rng = random.Random(f"{seed}-{split}-{i}")
    while True:
        total = rng.randint(10, 49)
        question = str(total)
        for _ in range(rng.randint(max(2, terms - 2), terms) - 1):
            term = rng.choice((1, 1, -1)) * rng.randint(1, 9)
            term = term if 10 <= total + term <= 99 else -term
            total += term
            question += f"{term:+d}"
        if split_of(question) == split:
            return Problem(question, solve_sum(question), str(total), checkable=True)


def load_problems(data: str, split: str, n: int | None = None, seed: int = 0, terms: int = 7) -> list[Problem]:
    """`n` problems (None: all; 4,096 of the built-in task) of split "train", "validation" or "test", in a fixed order.

    data: "sums", or a local .jsonl/.json/.parquet file with the string columns `question` and `answer`, where the
    answer ends in "#### 18" (or holds a \\boxed{18}). Raises BadInput, naming file and line, for what cannot be read.
    """
    if data == "sums":
        return [make_sum(seed, split, i, terms) for i in range(4096 if n is None else n)]
    path = Path(data)
    if not path.is_file():
        raise BadInput(f"--data {data}: no such file (and not the built-in task 'sums')")
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise BadInput(f"--data {data}: the name must end in .jsonl, .json or .parquet")
    if path.stat().st_size == 0:
        raise BadInput(f"--data {data}: the file is empty")
    if path.suffix != ".parquet":  # the JSON reader below names no line, so find a broken one first
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else {"question": "", "answer": ""}
            except ValueError as error:
                raise BadInput(f"{data}, line {number}: not valid JSON ({error})") from None
            for column in ("question", "answer"):
                if not isinstance(row, dict) or not isinstance(row.get(column), str):
                    raise BadInput(f"{data}, line {number}: needs a text in '{column}'")
    try:
        kind = "parquet" if path.suffix == ".parquet" else "json"
        with tempfile.TemporaryDirectory() as cache:
            rows = list(datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=cache))
    except Exception as error:
        raise BadInput(f"--data {data}: cannot be read as {kind} ({str(error).splitlines()[0]})") from None
    problems = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
            raise BadInput(f"{data}, row {number}: needs a text in 'question' and in 'answer'")
        answer = extract_answer(row["answer"])
        if answer is None:
            raise BadInput(f"{data}, row {number}: no final answer ('#### 18' or '\\boxed{{18}}') can be read")
        problems.append(Problem(row["question"], row["answer"], answer))
    problems = [p for p in problems if split_of(p.question) == split]
    if not problems:
        raise BadInput(f"--data {data}: {len(rows)} rows, none of which falls into the {split} split; give more rows")
    return problems[:n]


def extract_answer(text: str) -> str | None:
    """The final answer as written: what follows the last "####", or stands in the last \\boxed{}; the later one counts.

    >>> extract_answer("so 3+4=7\\n#### 7"), extract_answer("\\\\boxed{\\\\frac{1}{2}}"), extract_answer("7")
    ('7', '\\\\frac{1}{2}', None)
    """
    answer = None
    for match in re.finditer(r"####([^\n]*)|\\boxed\s*\{", text):
        found = match[1]
        if found is None:  # walk to the brace that closes \boxed{
            depth, end = 1, match.end()
            while end < len(text) and depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            found = "" if depth else text[match.end() : end - 1]
        answer = found.strip() or answer
    return answer


def parse_number(text: str) -> Fraction | None:
    """The exact value of "1,234", "-0.5", "$18.00", "50%" (as 50), "1/2", "\\frac{1}{2}" or "3 apples", else None."""
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\text\s*\{[^{}]*\}|\\[,!;% ]|[\s$%\\]|,(?=\d{3}(?!\d))", "", text)
    match = re.fullmatch(r"([+-]?)(\d{1,100}\.?\d{0,100}|\.\d{1,100})(?:/(\d{1,100}))?[a-zA-Z]*\.?", text)
    if not match or (match[3] and int(match[3]) == 0):
        return None
    value = Fraction(match[2]) / int(match[3] or 1)
    return -value if match[1] == "-" else value


def reward(text: str, answer: str) -> float:
    """1.0 if the final answer in `text` equals `answer` (by value where both are numbers), else 0.0.

    >>> reward("#### 1,234", "1234"), reward("#### 1/2", "0.5"), reward("#### 12", "1234"), reward("1234", "1234")
    (1.0, 1.0, 0.0, 0.0)
    """
    given = extract_answer(text)
    if given is None:
        return 0.0
    left, right = parse_number(given), parse_number(answer)
    return float(left == right if left is not None and right is not None else given.strip() == answer.strip())


def first_difference(given, reference) -> int | None:
    """Index of the first element of `given` that departs from `reference`; None if none does."""
    return next((t for t, item in enumerate(given) if t >= len(reference) or item != reference[t]), None)


def first_wrong_token(ids: list[int], problem: Problem, tokenizer) -> int | None:
    """Index of the first answer token that departs from the only right one; None if none does, or none can be judged."""
    return first_difference(ids, solution_ids(tokenizer, problem)) if problem.checkable else None


def first_wrong_step(text: str, problem: Problem) -> int | None:
    """Index of the line of an answer in which it first departs from the only right one; None as above."""
    wrong = first_difference(text, problem.solution) if problem.checkable else None
    return None if wrong is None else text.count("\n", 0, wrong)


# ---------------------------------------------------------------------------------------------- policy and warm start


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that any text can be read, and one token that ends an answer."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def encode(tokenizer, text: str) -> list[int]:
    """Ids of `text` alone; a special token's name inside it is read as plain text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def prompt_ids(tokenizer, problem: Problem) -> list[int]:
    return encode(tokenizer, problem.question + "\n")


def solution_ids(tokenizer, problem: Problem) -> list[int]:
    return encode(tokenizer, problem.solution) + [tokenizer.eos_token_id]


def build_policy(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of 0.4 M parameters: wide enough for the table of facts, small enough for two CPU cores."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=128, intermediate_size=336, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=vocab_size - 1, pad_token_id=vocab_size - 1,
        )
    )  # fmt: skip


def warm_start_batches(run: "RunConfig", tokenizer, problems: list[Problem], size: int = 64) -> Iterator[list["Sample"]]:
    """What the policy imitates: the mistaken student on the built-in task, the file's own solutions otherwise."""
    facts = wrong_facts(run.seed)
    for step in range(run.warm_start_steps):
        batch = []
        for j, problem in enumerate(batch_at(problems, step, size, f"{run.seed}-warm")):
            if problem.checkable:
                problem = make_sum(run.seed, "train", step * size + j, run.terms)  # fresh ones: no need to repeat any
                rng = random.Random(f"{run.seed}-student-{step * size + j}")
                problem = problem._replace(solution=solve_sum(problem.question, facts, rng))
            batch.append(Sample(prompt_ids(tokenizer, problem), solution_ids(tokenizer, problem)))
        yield batch


def warm_start(run: "RunConfig", problems: list[Problem], device: torch.device, dtype: torch.dtype) -> Path:
    """Folder of the built-in policy after supervised training on what it is to imitate; made once, then reused.

    Muon on the matrices and AdamW on the rest learn the task several times faster than AdamW alone. The folder's name
    hashes everything that shapes the result, and it appears by one rename, so a killed warm start leaves none.
    """
    tokenizer = build_tokenizer()
    torch.manual_seed(run.seed)
    model = build_policy(len(tokenizer)).to(device)
    model.compute_dtype = dtype
    recipe = [model.config.to_json_string(), run.seed, run.warm_start_steps, run.terms, WRONG_FACTS, ERROR_RATE]
    recipe += [device.type, str(dtype), [problem.question + problem.solution for problem in problems]]
    folder = Path("runs/warm_start") / hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    if folder.is_dir():
        print(f"warm start: reusing {folder}")
        return folder

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.03, weight_decay=0.0),
        torch.optim.AdamW(others, lr=5e-3, weight_decay=0.0),
    ]
    schedules = [get_linear_schedule_with_warmup(o, 20, run.warm_start_steps) for o in optimizers]
    bar = tqdm(warm_start_batches(run, tokenizer, problems), "warm start", total=run.warm_start_steps, unit="step")
    for samples in bar:
        total = sum(len(s.ids) for s in samples)
        for micro in micro_batches(samples):
            batch = collate(micro, device)
            loss = -token_logprobs(model, batch).sum() / total
            loss.backward()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with new_folder(folder) as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
    return folder


def load_policy(folder: str | Path, device: torch.device, dtype: torch.dtype = torch.float32):
    """(model, tokenizer) from a Hugging Face folder: fp32 weights, forward passes under autocast to `dtype`.

    The model stays in eval mode: with dropout on, old and new log-probs would come from two different networks.
    Raises BadInput for a folder without config, weights or tokenizer, and for a model whose logits are more than
    lm_head(hidden state) (soft caps and scales, which `token_logprobs` would not see).
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise BadInput(f"--model {folder}: no config.json there, so it is not a Hugging Face model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token_id is not None, "it has no end-of-text token"
    except Exception as error:
        raise BadInput(f"--model {folder}: cannot load its tokenizer ({str(error).splitlines()[0]})") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    except Exception as error:
        raise BadInput(f"--model {folder}: cannot load its weights ({str(error).splitlines()[0]})") from None
    with torch.no_grad():
        ids = torch.arange(8, device=device)[None]
        logits = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        if not torch.allclose(model(ids).logits, logits, atol=1e-3):
            raise BadInput(f"--model {folder}: rescales or caps its logits, which the scorer here does not do")
    model.compute_dtype = dtype
    return model, tokenizer


def eos_ids(model, tokenizer) -> set[int]:
    """Every id that ends an answer: the tokenizer's, and those the checkpoint lists for generation."""
    listed = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}


def window(model) -> int:
    """Positions the model can see (prompt and answer together)."""
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30


def autocast(model) -> torch.autocast:
    """One precision for sampling, old and new log-probs. A context per call: autocast caches the weights it casts."""
    dtype = getattr(model, "compute_dtype", torch.float32)
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


# ---------------------------------------------------------------------------------------------------------- sampling


@dataclass
class Rollout:
    prompt: list[int]
    ids: list[int]  # sampled ids, the end token included if there is one
    finished: bool  # False: the budget cut it, so there is no end token
    reward: float = 0.0


@torch.no_grad()
def sample(
    model,
    prefixes: list[list[int]],
    n: int = 1,
    *,
    max_new_tokens: int | list[int],
    eos: set[int],
    temperature: float = 1.0,
    greedy: bool = False,
    generator: torch.Generator | None = None,
    max_tokens: int = 1 << 16,
) -> list[Rollout]:
    """`n` continuations of each prefix, prefix-major; equal prefixes share a prefill and are drawn independently.

    max_new_tokens: one budget, or one per prefix. max_tokens bounds the memory: rows x (prefix + budget) of a batch.
    Draws from softmax(logits / temperature) over the whole vocabulary, whatever the checkpoint's generation_config
    says: the sampled policy is the scored one. Raises ValueError for an empty prefix, n < 1, a temperature that is
    not positive, or more positions than the model has.
    """
    budgets = [max_new_tokens] * len(prefixes) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if n < 1 or (temperature <= 0 and not greedy) or len(budgets) != len(prefixes) or min(budgets, default=0) < 0:
        raise ValueError("need n >= 1, temperature > 0 unless greedy, and one budget >= 0 per prefix")
    if any(not prefix or len(prefix) + budget > window(model) for prefix, budget in zip(prefixes, budgets)):
        raise ValueError(f"a prefix is empty, or with its budget exceeds the model's {window(model)} positions")
    rollouts = [Rollout(list(prefix), [], False) for prefix in prefixes for _ in range(n)]
    # Rows of like length share a batch, so that little is padded.
    queue = sorted((r for r in range(len(rollouts)) if budgets[r // n]), key=lambda r: len(rollouts[r].prompt))
    was_training = model.training
    model.eval()
    while queue:
        size, longest = 0, 0
        for r in queue:  # the longest row counts for all of them, since shorter ones are padded to it
            longest = max(longest, len(rollouts[r].prompt) + budgets[r // n])
            if size and (size + 1) * longest > max_tokens:
                break
            size += 1
        rows, queue = queue[:size], queue[size:]
        with autocast(model):
            decode([rollouts[r] for r in rows], [budgets[r // n] for r in rows], model, eos, temperature, greedy, generator)
    model.train(was_training)
    return rollouts


def decode(rollouts, budgets, model, eos, temperature, greedy, generator) -> None:
    """Extend `rollouts` in place, as one batch: prefill each distinct prefix, copy its KV cache to its rows, decode."""
    device, head = model.device, model.get_output_embeddings()
    distinct = {tuple(rollout.prompt): i for i, rollout in enumerate({tuple(r.prompt): r for r in rollouts}.values())}
    width = max(map(len, distinct))
    # Left padding puts every row's next token in the same column; positions count from each row's first real token.
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in distinct], device=device)  # (D, L) distinct prefixes
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=device)  # (D, L)
    position = (mask.cumsum(1) - 1).clamp(min=0)  # (D, L)
    cache = DynamicCache(config=model.config)
    hidden = model.base_model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).last_hidden_state

    index = torch.tensor([distinct[tuple(r.prompt)] for r in rollouts], device=device)  # (R,) each row's prefix
    cache.batch_select_indices(index)
    hidden, mask, position = hidden[index, -1], mask[index], position[index, -1:]  # (R, H), (R, L), (R, 1)
    budget = torch.tensor(budgets, device=device)
    stop = torch.tensor(sorted(eos), device=device)
    live, drawn, t = list(range(len(rollouts))), [], 0
    while True:
        logits = head(hidden).float()  # (R, V)
        if greedy:
            token = logits.argmax(-1)  # (R,)
        else:
            # Inverse CDF: one random number a row, where torch.multinomial would draw one for every vocabulary entry.
            cdf = (logits / temperature).softmax(-1).double().cumsum(-1)  # (R, V)
            u = torch.rand(len(cdf), 1, dtype=torch.double, device=device, generator=generator) * cdf[:, -1:]
            token = torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=cdf.shape[1] - 1)  # (R,)
        t += 1
        ended = torch.isin(token, stop)
        for row, id, end in zip(live, token.tolist(), ended.tolist()):
            rollouts[row].ids.append(id)
            rollouts[row].finished = end
        going = ~ended & (budget > t)  # (R,)
        if not going.all():  # finished rows leave the batch, and their cache with them
            keep = going.nonzero()[:, 0]
            if not len(keep):
                return
            live = [live[i] for i in keep.tolist()]
            cache.batch_select_indices(keep)
            token, mask, position, budget = token[keep], mask[keep], position[keep], budget[keep]
        mask = F.pad(mask, (0, 1), value=1)
        position = position + 1
        hidden = model.base_model(
            token[:, None], attention_mask=mask, position_ids=position, past_key_values=cache
        ).last_hidden_state[:, -1]


# ----------------------------------------------------------------------------------------------------------- scoring


@dataclass
class Sample:
    """What is trained on: `ids` given `context`. The context carries no gradient and no advantage."""

    context: list[int]
    ids: list[int]
    advantages: list[float] | None = None  # one per trained id
    old_logprobs: list[float] | None = None  # log-probs under the policy that sampled, one per trained id


class Batch(NamedTuple):
    input_ids: Tensor  # (B, L) context and trained ids, right-padded
    context_lens: Tensor  # (B,)
    targets: Tensor  # (B, T) the trained ids
    mask: Tensor  # (B, T) bool, True where a trained id stands
    advantages: Tensor  # (B, T) 0 where the mask is False
    old_logprobs: Tensor  # (B, T) 0 where the mask is False


def collate(samples: list[Sample], device: torch.device | str = "cpu") -> Batch:
    """Right-pad samples to one batch. Masks come from lengths, never from token values."""

    def pad(rows, dtype):
        return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row, dtype=dtype) for row in rows], True).to(device)

    if any(not s.context or not s.ids for s in samples):
        raise ValueError("every sample needs a context to predict its first id from, and an id to train")
    zeros = [[0.0] * len(s.ids) for s in samples]
    return Batch(
        input_ids=pad([s.context + s.ids for s in samples], torch.long),
        context_lens=torch.tensor([len(s.context) for s in samples], device=device),
        targets=pad([s.ids for s in samples], torch.long),
        mask=pad([[True] * len(s.ids) for s in samples], torch.bool),
        advantages=pad([z if s.advantages is None else s.advantages for s, z in zip(samples, zeros)], torch.float),
        old_logprobs=pad([z if s.old_logprobs is None else s.old_logprobs for s, z in zip(samples, zeros)], torch.float),
    )


MAX_LOGITS = 1 << 25  # elements of a chunk's logits: 128 MiB in fp32, whatever vocabulary and length


def token_logprobs(model, batch: Batch, temperature: float = 1.0, with_entropy: bool = False):
    """log pi(id | all before it) of every trained id at the sampling temperature: (B, T) fp32, 0 outside the mask.

    The one path for old and new log-probs. Logits exist for trained positions only, a chunk at a time, and their
    log-softmax is in fp32 whatever the autocast dtype. with_entropy: also the policy's entropy there, in nats, (B, T).
    """
    head = model.get_output_embeddings()

    def chunk_logprobs(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (N, H), (N,) -> (N,), (N,)
        logprobs = (head(hidden).float() / temperature).log_softmax(-1)  # (N, V)
        entropy = -(logprobs.exp() * logprobs).sum(-1) if with_entropy else logprobs.new_zeros(len(targets))
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    with autocast(model):
        # Attention is causal and padding stands on the right, so no real token sees it and no mask is needed.
        hidden = model.base_model(batch.input_ids, use_cache=False).last_hidden_state  # (B, L, H)
        row, t = batch.mask.nonzero(as_tuple=True)  # (N,), (N,)
        hidden = hidden[row, batch.context_lens[row] - 1 + t]  # (N, H): the state BEFORE each trained id predicts it
        chunks = list(zip(*(x.split(max(1, MAX_LOGITS // head.weight.shape[0])) for x in (hidden, batch.targets[row, t]))))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            parts = [chunk_logprobs(*chunk) for chunk in chunks]
        else:  # forget each chunk's logits and compute them again in the backward pass
            parts = [recompute_in_backward(chunk_logprobs, *chunk, use_reentrant=False) for chunk in chunks]
    logprobs, entropy = (
        torch.zeros(batch.mask.shape, device=hidden.device).index_put((row, t), torch.cat(part)) for part in zip(*parts)
    )
    return (logprobs, entropy) if with_entropy else logprobs


# ------------------------------------------------------------------------------------------------------ shared maths


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """GRPO's advantages (arXiv 2402.03300): rewards (P, G) minus their group's mean, over its population std if `scale`.

    An all-equal group gives exact zeros: dividing its rounding error by its tiny std would invent a signal.
    """
    centred = rewards - rewards.mean(1, keepdim=True)  # (P, G)
    if scale:
        centred = centred / rewards.std(1, correction=0, keepdim=True)
    return torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, centred)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True; 0 if it is True nowhere."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_eps: float) -> tuple[Tensor, Tensor]:
    """PPO's objective (arXiv 1707.06347, Eq. 7) token by token, to be maximised, and where the clip has cut its gradient.

    min() makes the clip one-sided: a positive advantage stops pushing above 1 + eps, a negative one below 1 - eps.
    """
    ratio = (logprobs - old_logprobs).clamp(-10, 10).exp()  # same shape as all arguments
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    return objective, clipped * advantages < ratio * advantages


# -------------------------------------------------------------------------------------- optimisation and checkpoints


def batch_at(items: list, step: int, size: int, seed) -> list:
    """Batch number `step` of an endless pass over `items`, reshuffled every epoch; a pure function, so resume is exact."""
    batch = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, len(items))
        if not batch or place == 0:
            order = random.Random(f"{seed}-{epoch}").sample(range(len(items)), len(items))
        batch.append(items[order[place]])
    return batch


def micro_batches(samples: list[Sample], max_tokens: int = 1 << 14) -> Iterator[list[Sample]]:
    """Samples of like length together, each micro-batch at most `max_tokens` wide x high (but at least one sample)."""
    micro = []
    for s in sorted(samples, key=lambda s: len(s.context) + len(s.ids)):
        if micro and (len(micro) + 1) * (len(s.context) + len(s.ids)) > max_tokens:
            yield micro
            micro = []
        micro.append(s)
    if micro:
        yield micro


def score(model, samples: list[Sample], temperature: float) -> list[list[float]]:
    """Fill in every sample's `old_logprobs`; returns the policy's entropy at each trained id."""
    entropies = {}
    with torch.no_grad():
        for micro in micro_batches(samples):
            logprobs, entropy = token_logprobs(model, collate(micro, model.device), temperature, with_entropy=True)
            for s, row, h in zip(micro, logprobs.tolist(), entropy.tolist()):
                s.old_logprobs, entropies[id(s)] = row[: len(s.ids)], h[: len(s.ids)]
    return [entropies[id(s)] for s in samples]


def optimizer_step(model, optimizer, schedule, loss: float, max_grad_norm: float) -> float:
    """Clip, step and clear the gradients; returns their norm before clipping. Raises FloatingPointError, leaving the
    weights as they are, where the loss or the norm is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    return norm


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder under another name and put it in place by renaming: whoever looks finds the old one or the new."""
    tmp, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in (f"new-{os.getpid()}", "old"))
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        tmp.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


LOGS = ("metrics.csv", "samples.txt")  # files that grow during a run


def save_checkpoint(folder: Path, model, tokenizer, optimizer, schedule, generator, progress, name="checkpoint"):
    """checkpoint/ in Hugging Face format, and beside the weights everything that an exact resume needs."""
    with new_folder(folder / name) as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        state = {
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "generator": generator.get_state(),
            "progress": progress,
            "log_bytes": {log: (folder / log).stat().st_size for log in LOGS if (folder / log).exists()},
        }
        torch.save(state, tmp / "state.pt")


def find_checkpoint(folder: Path) -> Path:
    """The run's last whole checkpoint. A kill between the two renames of `new_folder` leaves it under its old name."""
    old = folder / ".checkpoint.old"
    if old.exists() and not (folder / "checkpoint").exists():
        old.rename(folder / "checkpoint")
    if not (folder / "checkpoint" / "config.json").is_file():
        raise BadInput(f"{folder} holds no checkpoint")
    return folder / "checkpoint"


def resume(folder: Path, optimizer, schedule, generator) -> dict:
    """Put back what `save_checkpoint` saved, cut off log rows written after it, and return the run's progress."""
    state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    generator.set_state(state["generator"])
    for log in LOGS:
        if (folder / log).exists():
            os.truncate(folder / log, state["log_bytes"].get(log, 0))
    return state["progress"]


# -------------------------------------------------------------------------------------------------------- evaluation


def mean_stderr(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (nan from a single value)."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan


def answer_budget(model, prompt: list[int], max_new_tokens: int) -> int:
    """How long an answer to `prompt` may be: `max_new_tokens`, or what is left of the model's window."""
    return min(max_new_tokens, window(model) - len(prompt))


def response_reward(ids: list[int], finished: bool, answer: str, tokenizer) -> float:
    """Reward of a whole answer. One that was cut off counts as wrong: "#### 6" may have been going to be 61."""
    return reward(tokenizer.decode(ids, skip_special_tokens=True), answer) if finished else 0.0


def evaluate(model, tokenizer, problems: list[Problem], samples: int, max_new_tokens: int, temperature: float, seed: int):
    """Accuracy over `problems` with standard errors: sampled (mean of `samples` answers), pass@k (any of them), greedy."""
    prompts = [prompt_ids(tokenizer, problem) for problem in problems]
    generator = torch.Generator(model.device).manual_seed(seed)
    rooms = [answer_budget(model, prompt, max_new_tokens) for prompt in prompts]
    options = dict(max_new_tokens=rooms, eos=eos_ids(model, tokenizer), temperature=temperature, generator=generator)

    def rewards(n: int, greedy: bool) -> Tensor:  # (problems, n)
        rollouts = sample(model, prompts, n, greedy=greedy, **options)
        answers = [problem.answer for problem in problems for _ in range(n)]
        return torch.tensor(
            [response_reward(r.ids, r.finished, answer, tokenizer) for r, answer in zip(rollouts, answers)]
        ).view(-1, n)

    sampled, greedy = rewards(samples, greedy=False), rewards(1, greedy=True)
    result = {"k": samples}
    for name, values in (("accuracy", sampled.mean(1)), ("pass_at_k", sampled.amax(1)), ("greedy", greedy[:, 0])):
        result[name], result[f"{name}_stderr"] = mean_stderr(values.tolist())
    return result


def describe(result: dict) -> str:
    return (
        f"sampled {result['accuracy']:.3f} ± {result['accuracy_stderr']:.3f}, "
        f"pass@{result['k']} {result['pass_at_k']:.3f} ± {result['pass_at_k_stderr']:.3f}, "
        f"greedy {result['greedy']:.3f} ± {result['greedy_stderr']:.3f}"
    )


# ----------------------------------------------------------------------------------------------- run log and display


def parse_args(config_class, script: str, description: str, tiny: dict):
    """(Config, RunConfig) from the command line; `tiny` replaces the defaults under --tiny. Raises BadInput."""
    parser = HfArgumentParser((config_class, RunConfig), description=description, allow_abbrev=False)

    def refuse(message):
        raise BadInput(message)

    parser.error = refuse
    parser.set_defaults(name=script, **(tiny if "--tiny" in sys.argv else {}))
    cfg, run, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        raise BadInput(f"unknown argument {unknown[0]} (see --help)")
    return cfg, run


def pick_device(run: RunConfig) -> tuple[torch.device, torch.dtype]:
    """The device to run on and the dtype to autocast to. Raises BadInput where the device asked for is missing."""
    cuda = torch.cuda.is_available()
    if run.device == "cuda" and not cuda:
        raise BadInput("--device cuda: torch sees no CUDA device here; use --device cpu")
    device = torch.device("cuda" if cuda and run.device != "cpu" else "cpu")
    bf16 = run.dtype == "bf16" or (run.dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    return device, torch.bfloat16 if bf16 else torch.float32


def run_folder(cfg, run: RunConfig) -> Path:
    """runs/<name>, if this run may use it: new, or holding the same configuration that is to be resumed."""
    folder = Path("runs") / run.name
    if run.eval_only:
        return folder
    if run.resume:
        if not (folder / "config.json").is_file():
            raise BadInput(f"--resume: {folder} holds no run")
        if (folder / "summary.json").exists():
            raise BadInput(f"--resume: {folder} is already finished; see its summary.json")
        old = json.loads((folder / "config.json").read_text())
        for key, value in configuration(cfg, run).items():
            if old.get(key) != value:
                raise BadInput(f"--resume: {folder} was started with {key}={old.get(key)}, not {value}")
    elif folder.exists():
        raise BadInput(f"{folder} already holds a run: give another --name, continue it with --resume, or delete it")
    return folder


def configuration(cfg, run: RunConfig) -> dict:
    """What config.json holds: every setting that shapes the run."""
    return {k: v for k, v in {**vars(cfg), **vars(run)}.items() if k not in ("resume", "eval_only")}


def open_policy(run: RunConfig, folder: Path, problems: list[Problem], device: torch.device, dtype: torch.dtype):
    """(model, tokenizer) to begin from: the run's checkpoint, --model, or the warm-started built-in policy."""
    if run.resume or (run.eval_only and not run.model):
        return load_policy(find_checkpoint(folder), device, dtype)
    return load_policy(run.model or warm_start(run, problems, device, dtype), device, dtype)


def check_prompts(model, tokenizer, problems: list[Problem]) -> None:
    """Raises BadInput for a prompt that leaves no room in the model's window for an answer."""
    for problem in problems:
        if (length := len(prompt_ids(tokenizer, problem))) >= window(model):
            start = problem.question[:40].replace("\n", " ")
            raise BadInput(f"a prompt has {length} tokens, the model's window {window(model)}: '{start}...'")


def start_run(folder: Path, cfg, run: RunConfig, *trainer_and_progress) -> None:
    """Make the run's folder with its first checkpoint; it appears whole, so that whatever is there can be resumed."""
    with new_folder(folder) as tmp:
        (tmp / "config.json").write_text(json.dumps(configuration(cfg, run), indent=2) + "\n")
        save_checkpoint(tmp, *trainer_and_progress)


def finish_run(folder: Path, run: RunConfig, progress: dict, after: dict) -> None:
    """Write summary.json and print what came of the run."""
    before = progress["before"]
    summary = {f"{key}_before": value for key, value in before.items() if key != "k"}
    summary |= {f"{key}_after": value for key, value in after.items() if key != "k"}
    summary |= dict(k=after["k"], accuracy_stderr=after["accuracy_stderr"])
    summary |= {key: progress[key] for key in ("sampled_tokens", "seconds")}
    print(f"after:  {describe(after)}")
    if failures := progress["failures"]:
        summary |= dict(credit_hit=progress["hits"] / failures, credit_chance=progress["chance"] / failures)
        print(
            f"credit: in {summary['credit_hit']:.0%} of {failures:,} failures the most negative segment held the first "
            f"wrong token (chance {summary['credit_chance']:.0%})"
        )
    print(f"{progress['sampled_tokens'] / 1e6:.2f} M tokens sampled in {progress['seconds']:.0f} s; files in {folder}/")
    (folder / "summary.tmp").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "summary.tmp").rename(folder / "summary.json")


def show(folder: Path, title: str, render) -> None:
    """Print render(colour) above the progress bar, and keep it without colour in samples.txt."""
    with open(folder / "samples.txt", "a") as file:
        file.write(f"{title}: {render(False)}\n\n")
    tqdm.write(f"\n{title}: {render(sys.stdout.isatty() and 'NO_COLOR' not in os.environ)}\n")


def append_metrics(folder: Path, row: dict) -> None:
    """Add one row to metrics.csv; the first one brings the header."""
    with open(folder / "metrics.csv", "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


class CtrlC:
    """Ctrl-C asks the run to stop after the step it is in, where everything can be saved; a second one stops at once."""

    def __init__(self):
        self.pressed = False
        signal.signal(signal.SIGINT, self.press)

    def press(self, *_):
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("Ctrl-C: finishing this step, then saving (once more: stop at once)")


def cli(main) -> None:
    """Run a script's main(): what the user can mend is one line and exit code 2."""
    try:
        main()
    except BadInput as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\nstopped at once; --resume continues from the last checkpoint", file=sys.stderr) or 130)


def paint(text: str, credit: float) -> str:
    """Terminal colour: green for positive credit, red for negative, stronger the larger."""
    shade = (("52", "88", "124") if credit < 0 else ("22", "28", "34"))[min(2, int(3 * abs(credit)))]
    return f"\033[48;5;{shade};38;5;231m{text}\033[0m" if credit else text


def credit_lines(pieces: list[str], credits: list[float], starts: list[int], notes: dict[int, str], colour: bool) -> list[str]:
    """An answer line by line: "|" opens a segment, whose credit stands at the right of the line it begins on.

    pieces: the answer's tokens as text; credits: one per token; notes: token index -> remark for that token's line.
    """
    lines = [("", 0, [], [])]  # (text, its width on screen, credits of the segments it opens, remarks)
    for t, (piece, credit) in enumerate(zip(pieces, credits)):
        text, width, opened, remarks = lines.pop()
        if t in starts:
            text, width, opened = text + "|", width + 1, [*opened, f"{credit:+.2f}"]
        remarks = [*remarks, notes[t]] if t in notes else remarks
        for i, part in enumerate(piece.split("\n")):
            if i:
                lines.append((text, width, opened, remarks))
                text, width, opened, remarks = "", 0, [], []
            text, width = text + (paint(part, credit) if colour and part else part), width + len(part)
        lines.append((text, width, opened, remarks))
    column = min(60, max(width for _, width, _, _ in lines))
    return [
        f"  {text}{' ' * (column - width)}  {' '.join(opened):12} {' '.join(remarks)}".rstrip()
        for text, width, opened, remarks in lines
    ]
