"""Mixed precision and memory: the loss scaler, recomputed layers; and what only a GPU can show."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

import common
import gpu
import mpo
import reset_po
import spo
from common import Compute, Sample
from conftest import ENV, ROOT
from test_common import random_samples
from test_models import byte_level_bpe, word_problems
from tiny_policy import constant_rate, make_policy, off_policy_samples

# ------------------------------------------------------------------------------- the loss scaler


def fp16_trainer(enabled=True):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    model.idle = torch.nn.Parameter(torch.ones(1))  # a weight that the loss does not depend on
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5**i)
    return model, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=enabled)


def test_fp16_scales_the_loss_and_steps_with_the_true_gradient():
    model, optimizer, schedule, scaler = fp16_trainer()
    scale = scaler.get_scale()
    assert scale > 1000
    scaler.scale((model.weight * torch.tensor([[3.0, 4.0]])).sum()).backward()
    assert model.weight.grad[0].tolist() == [3 * scale, 4 * scale]
    norm = common.optimizer_step(model, optimizer, schedule, 0.1, 2.5, scaler)
    assert norm == pytest.approx(5.0)
    assert model.weight[0].tolist() == pytest.approx([1 - 1.5, 2 - 2.0], abs=1e-5)
    assert schedule.get_last_lr() == [0.5] and model.weight.grad is None


def test_fp16_leaves_out_a_step_that_overflowed_and_lowers_its_scale():
    model, optimizer, schedule, scaler = fp16_trainer()
    before = scaler.get_scale()
    scaler.scale((model.weight * torch.tensor([[math.inf, 1.0]])).sum()).backward()
    assert not math.isfinite(common.optimizer_step(model, optimizer, schedule, 0.1, 1.0, scaler))
    assert model.weight[0].tolist() == [1.0, 2.0] and model.weight.grad is None
    assert scaler.get_scale() == before / 2
    scaler.scale(model.weight.sum()).backward()
    common.optimizer_step(model, optimizer, schedule, 0.1, 9.0, scaler)
    assert model.weight[0].tolist() == pytest.approx([1 - 1.0, 2 - 1.0])  # nor does it count


def test_fp16_does_not_hide_a_loss_that_is_not_finite_nor_overflow_without_end():
    model, optimizer, schedule, scaler = fp16_trainer()
    scaler.scale(model.weight.sum()).backward()
    with pytest.raises(FloatingPointError):
        common.optimizer_step(model, optimizer, schedule, math.nan, 1.0, scaler)
    model, optimizer, schedule, scaler = fp16_trainer()
    with pytest.raises(FloatingPointError):
        for _ in range(100):
            scaler.scale((model.weight * math.nan).sum()).backward()
            common.optimizer_step(model, optimizer, schedule, 0.1, 1.0, scaler)
    assert model.weight[0].tolist() == [1.0, 2.0]


def test_in_other_dtypes_the_scaler_is_idle():
    model, optimizer, schedule, scaler = fp16_trainer(enabled=False)
    scaler.scale(model.weight.sum()).backward()
    assert model.weight.grad[0].tolist() == [1.0, 1.0]
    norm = common.optimizer_step(model, optimizer, schedule, 0.1, 9.0, scaler)
    assert norm == pytest.approx(2**0.5)


@pytest.mark.parametrize("bf16", [True, False])
def test_auto_is_a_gpu_in_what_it_has_and_what_is_said_counts(monkeypatch, bf16):
    def picked(**options):
        return common.pick_device(common.RunConfig(**options))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert picked() == ("cuda", "bf16" if bf16 else "fp16")
    assert picked(dtype="fp32") == ("cuda", "fp32")
    assert picked(device="cpu", dtype="fp16") == ("cpu", "fp16")
    assert picked(device="cpu") == ("cpu", "fp32")


@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_without_any_signal_moves_nothing(enabled):
    model, optimizer, schedule, scaler = fp16_trainer(enabled)
    assert common.optimizer_step(model, optimizer, schedule, 0.0, 1.0, scaler) == 0.0
    assert model.weight[0].tolist() == [1.0, 2.0] and schedule.get_last_lr() == [0.5]


@pytest.mark.parametrize("script", [spo, mpo, reset_po])
def test_every_script_scales_its_loss_and_steps_with_the_true_gradient(script):
    policy, steps = make_policy(), []
    samples = off_policy_samples(lambda rng, a: [rng.choice((-1.0, 1.0))] * len(a), policy)
    cfg = script.Config(prompts=5, batch_size=5 * (8 if script is reset_po else 2))
    for scaler in (common.IDLE, torch.amp.GradScaler("cpu")):
        model = copy.deepcopy(policy)
        optimizer, schedule = constant_rate(model, 0.1)
        metrics = script.update(model, optimizer, schedule, samples, cfg, "seed", scaler=scaler)
        moved = [p - q for p, q in zip(model.parameters(), policy.parameters())]
        steps.append([torch.tensor(metrics["grad_norm"]), *moved])
    assert steps[0][0] > 0.1
    for plain, scaled in zip(*steps):
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------- memory


def models_with_dropout():
    torch.manual_seed(0)
    drop = dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    yield GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=16, n_layer=2, n_head=2, **drop))
    yield Qwen2ForCausalLM(Qwen2Config(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, attention_dropout=0.5,
    ))  # fmt: skip
    # OPT's layers call dropout themselves, by their own training mode.
    yield OPTForCausalLM(OPTConfig(
        vocab_size=13, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.5, attention_dropout=0.5,
    ))  # fmt: skip


def test_recomputed_layers_give_the_same_gradient_without_dropout(monkeypatch):
    for model in models_with_dropout():
        model.eval()
        other, batch = copy.deepcopy(model), common.collate(random_samples(5))
        other.activation_checkpointing_enable(dict(use_reentrant=False))
        common.no_dropout(other)
        calls = []
        layer = [x for x in other.modules() if getattr(x, "gradient_checkpointing", False)][-1]
        hook = next(iter(layer.children()))
        hook.register_forward_hook(lambda *_: calls.append(1))
        for m in (model, other):
            common.token_logprobs(m, batch).sum().backward()
        assert len(calls) == 2  # forward, and again going backward
        for p, q in zip(model.parameters(), other.parameters()):
            assert p.grad is None if q.grad is None else torch.allclose(p.grad, q.grad, atol=1e-6)
        with torch.no_grad():
            common.token_logprobs(other, batch)
        assert len(calls) == 3 and not any(m.training for m in other.modules())
        prefixes = [s.context for s in random_samples(3)]
        one, two = (
            common.sample(m, prefixes, 2, max_new_tokens=5, eos={0}, greedy=True)
            for m in (model, other)
        )
        assert [r.ids for r in one] == [r.ids for r in two]


def test_what_a_batch_may_hold_is_that_of_the_run(monkeypatch):
    samples, sizes = random_samples(12), []
    compute = Compute(sampling_tokens=40, training_tokens=30)
    for micro in common.micro_batches(samples, compute.training_tokens):
        sizes.append(len(micro) * max(len(s.context) + len(s.ids) for s in micro))
    assert len(sizes) > 2 and max(sizes) <= 30
    model = next(models_with_dropout()).eval()
    rows, true_decode = [], common.decode

    def spy(model, rollouts, *args):
        rows.append(len(rollouts))
        true_decode(model, rollouts, *args)

    monkeypatch.setattr(common, "decode", spy)
    common.sample(model, [[1, 2, 3]] * 9, 1, max_new_tokens=5, eos={0}, compute=compute)
    assert rows == [5, 4]  # 8 tokens a row


# -------------------------------------------------------------------- a device without float64


class NoFloat64(TorchFunctionMode):
    """Refuses what `--device mps` refuses: float64 on the device. What comes of `.cpu()`, or from
    nothing without a device, is on the host, where float64 is fine."""

    def __torch_function__(self, function, types, args=(), options=None):
        options = options or {}
        result = function(*args, **options)
        given = [x for x in tree_leaves((args, options)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        host = function is torch.Tensor.cpu or any(getattr(x, "host", False) for x in given)
        host = host or not given and "device" not in options
        host = host and not (function is torch.Tensor.to and torch.device("cpu") in args)
        for x in made:
            if not host and x.dtype == torch.float64:
                raise TypeError(f"float64 on the device, by {function}")
            x.host = host
        return result


@pytest.mark.parametrize("script", ["spo", "spo --variant tree", "mpo", "reset_po"])
def test_no_float64_on_a_device_that_has_none(script, monkeypatch):
    monkeypatch.setattr(common, "exact_dtype", lambda device: torch.float32)
    module = __import__(script.split()[0])
    torch.manual_seed(0)
    model, tokenizer = common.build_policy(257).eval(), common.build_tokenizer()
    monkeypatch.setattr(common, "response_reward", lambda ids, *_: float(sum(ids) % 2))
    problems = common.load_problems("sums", "train", 4)
    states = [common.initial_state(tokenizer, problem) for problem in problems]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    with NoFloat64():
        with pytest.raises(TypeError, match="on the device"):
            torch.ones(1, device="cpu").double()
        if script == "mpo":
            for layout, weights in (("window", 0.2), ("block", "uniform"), ("block", "joint")):
                cfg = module.Config(
                    prompts=4, group_size=4, batch_size=8, epochs=2, layout=layout,
                    weights=weights, scale_eps=True, max_new_tokens=8,
                )  # fmt: skip
                rollouts = common.complete(model, tokenizer, states, 4, 8, generator=generator)
                samples = module.assign_credit(model, rollouts, cfg).samples
                metrics = module.update(model, optimizer, schedule, samples, cfg, "0")
                assert all(map(math.isfinite, metrics.values())) and metrics["block_ratio_var"] > 0
        elif script == "reset_po":
            cfg = module.Config(prompts=4, clip_eps=0.2, max_new_tokens=8)
            drawn, plans = module.draw_answers(model, tokenizer, states, cfg, generator)
            credit = module.assign_credit(model, tokenizer, problems, drawn, plans, cfg, generator)
            samples = [s for group in credit.base + credit.suffixes for s in group]
            module.update(model, optimizer, schedule, samples, cfg, "0")
        else:
            tree = "tree" in script
            cfg = module.Config(
                variant="tree" if tree else "chain", prompts=4, segment_tokens=3, kl_coef=0.1,
                max_new_tokens=8,
            )  # fmt: skip
            if tree:
                grown = module.grow_trees(model, tokenizer, states, cfg, generator)
                samples = module.credit_trees(model, grown, cfg).samples
            else:
                answers = [problem.answer for problem in problems]
                rollouts = common.complete(model, tokenizer, states, 1, 8, generator=generator)
                samples = module.assign_credit(
                    model, tokenizer, rollouts, answers, cfg, generator
                ).samples
            reference = copy.deepcopy(model)
            module.update(model, optimizer, schedule, samples, cfg, "0", reference)
        common.evaluate(model, tokenizer, problems, 2, 8, 1.0, 0)


# ----------------------------------------------------------------------------------------- a GPU

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("script", ["spo", "spo --variant tree", "mpo", "reset_po"])
def test_on_a_gpu_each_script_learns_the_built_in_task(tmp_path, script, dtype):
    name, *flags = script.split()
    command = [sys.executable, str(ROOT / f"{name}.py"), "--tiny", "--dtype", dtype, *flags]
    done = subprocess.run([*command, "--device", "cuda"], cwd=tmp_path, env=ENV, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
    assert facts["accuracy_after"] > facts["accuracy_before"] + 0.05


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_the_ratio_is_one_before_the_first_update(dtype):
    torch.manual_seed(0)
    model, tokenizer = common.build_policy(257).to("cuda").eval(), common.build_tokenizer()
    compute = Compute(dtype=dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    options = dict(max_new_tokens=40, eos={256}, generator=generator, compute=compute)
    prefixes = [common.encode(tokenizer, f"{n}+4\n") for n in range(10, 40)]
    samples = [Sample(r.prompt, r.ids) for r in common.sample(model, prefixes, 2, **options)]
    common.score(model, samples, 1.0, compute)
    for micro in common.micro_batches(samples):
        batch = common.collate(micro, "cuda")
        log_ratio = common.token_logprobs(model, batch, compute=compute) - batch.old_logprobs
        assert (log_ratio.exp() - 1).abs().max() < 1e-3


@cuda
def test_on_a_gpu_sampling_and_scoring_agree_with_the_cpu():
    torch.manual_seed(0)
    model, samples = common.build_policy(257).eval(), random_samples(9)
    prefixes, options = [s.context for s in samples], dict(max_new_tokens=9, eos={256}, greedy=True)
    one = common.token_logprobs(model, common.collate(samples))
    drawn = common.sample(model, prefixes, 2, **options)
    two = common.token_logprobs(model.to("cuda"), common.collate(samples, "cuda"))
    assert torch.allclose(one, two.cpu(), atol=1e-3)
    same = [r.ids == s.ids for r, s in zip(drawn, common.sample(model, prefixes, 2, **options))]
    assert sum(same) > len(same) / 2  # a tie may be broken otherwise


@cuda
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_on_a_gpu_a_killed_run_resumes(tmp_path, dtype):
    flags = f"--terms 2 --warm_start_steps 60 --prompts 8 --steps 4 --save_every 2 --dtype {dtype}"
    command = [sys.executable, str(ROOT / "spo.py"), *flags.split(), "--eval_problems", "9"]
    stop = "import common; f = common.log_step; common.log_step = lambda *a, **k: (f(*a, **k), "
    stop += "__import__('os')._exit(9) if a[1] == 2 else 0); import spo; common.cli(spo.main)"
    options = dict(cwd=tmp_path, env=ENV, capture_output=True, text=True)
    killed = subprocess.run([sys.executable, "-c", stop, *command[2:]], **options)
    assert killed.returncode == 9, killed.stderr
    done = subprocess.run([*command, "--resume"], **options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "spo" / "summary.json").exists()


@cuda
@pytest.mark.parametrize("script", ["spo", "spo --variant tree", "mpo", "reset_po"])
def test_on_a_gpu_a_model_of_half_a_billion_takes_a_whole_step(tmp_path, script):
    """Random weights in Qwen2.5-0.5B's shape: what counts is that memory and dtypes hold."""
    tokenizer = byte_level_bpe("qwen2")
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, word_problems())))
    name, *flags = script.split()
    flags += "--model model --data rows.jsonl --steps 1 --prompts 8 --eval_problems 2".split()
    flags += ["--max_new_tokens", "128"]
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_gpu_script_fills_all_its_tables_on_a_cpu():
    """gpu.py is run by hand where there is a GPU; here with --tiny, so that it runs when it is."""
    command = [sys.executable, str(ROOT / "tests" / "gpu.py"), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in done.stdout.splitlines()]
    rows = [row for row in rows if row and not row[0].startswith("---")]
    sampling = [row for row in rows if row[0] == "toy" and len(row) == 6]
    assert [row[1] for row in sampling] == ["1", "8", "64"]
    for _, _, ours, theirs, ratio, share in sampling:
        ours, theirs = (float(x.replace(",", "")) for x in (ours, theirs))
        assert float(ratio) == pytest.approx(ours / theirs, abs=0.02) and share.endswith("%")
    steps = [row for row in rows if row[0] == "toy" and len(row) == 9]
    assert [row[1] for row in steps] == [*gpu.METHODS]
    for _, _, tokens, *seconds, peak, computed in steps:
        whole, *parts = map(float, seconds)
        assert int(tokens) >= 24 * 2 and sum(parts) <= whole + 0.2 and peak == "no GPU"
        assert float(computed) > 0
    apart = [row for row in rows if row[0] == "toy" and len(row) == 4]
    assert [row[1] for row in apart] == [*gpu.METHODS]
    assert all(0 <= float(mean) <= float(largest) < 1e-3 for _, _, largest, mean in apart)
    learned = [row for row in rows if "--tiny" in row[0]]
    assert [row[1] for row in learned] == ["bf16"] * 4 + ["fp16"] * 4
    assert all(0 <= float(x) <= 1 for row in learned for x in row[2:4])
