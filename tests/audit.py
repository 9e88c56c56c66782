"""Counts again, from what a run samples, scores and steps, every value that it logs.

`install(script)` runs in the child of a test, before the script's main(): it hooks what common.py
offers to the scripts, and wherever a value differs from the one counted here, in plain loops, the
run fails. It also holds to what no value shows: precision, modes, optimiser, evaluation.
"""

import csv
import math
import re
import statistics
import time
from collections import Counter, defaultdict

import torch

import common

seen = defaultdict(list)  # of the current step
state = {"evaluating": False, "tokens": 0, "updates": 0, "truth": Counter(), "seconds": 0.0}
shuffles = set()


def close(given, wanted, what: str, tolerance=1e-5) -> None:
    assert math.isclose(given, wanted, rel_tol=tolerance, abs_tol=tolerance), (what, given, wanted)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


# ------------------------------------------------------------------------ what the hooks take down


def hook(name: str):
    """Replaces common.<name> by `around(real, ...)`."""

    def replace(around):
        real = getattr(common, name)
        setattr(common, name, lambda *args, **options: around(real, *args, **options))

    return replace


def modes_are_right(model) -> None:
    assert not torch.is_autocast_enabled("cpu"), "an autocast was left open"
    assert not any(m.training for m in model.modules()), "a module is in training mode"


def install(script) -> None:
    @hook("set_up")
    def set_up(real, *args):
        setup = state["setup"] = real(*args)
        layer = setup.model.base_model.layers[-1].mlp.up_proj
        layer.register_forward_hook(lambda module, ins, out: seen["dtypes"].append(out.dtype))
        return setup

    @hook("sample")
    def sample(real, model, prefixes, n=1, **options):
        modes_are_right(model)
        assert options["compute"] is state["setup"].compute, "not the run's precision"
        rollouts = real(model, prefixes, n, **options)
        assert len(rollouts) == len(prefixes) * n
        if not state["evaluating"]:
            state["tokens"] += sum(len(r.ids) for r in rollouts)
        return rollouts

    @hook("complete")
    def complete(real, model, tokenizer, states, n, *rest, **options):
        if not state["evaluating"]:
            seen["began"].append(time.time())
        rollouts = real(model, tokenizer, states, n, *rest, **options)
        longest = state["setup"].cfg.max_new_tokens
        for i, r in enumerate(rollouts):
            prompt, done, answer = states[i // n]
            assert state["evaluating"] or answer == problem_of(prompt).answer
            assert r.finished or options.get("limit") or len(done) + len(r.ids) == longest
            r.whole, r.prompt_ids = [*done, *r.ids], list(prompt)
            ended = r.whole[-1:] == [tokenizer.eos_token_id]
            found = re.findall(r"####\s*(\S+)", tokenizer.decode(r.whole[:-1]))
            assert r.reward == float(ended and found[-1:] == [answer]), (r, answer)
        seen["evaluation" if state["evaluating"] else "complete"].append((states, n, rollouts))
        return rollouts

    @hook("token_logprobs")
    def token_logprobs(real, model, batch, temperature=1.0, with_entropy=False, compute=None):
        if "setup" not in state:  # of the warm start
            return real(model, batch, temperature, with_entropy, compute)
        assert compute is state["setup"].compute, "not the run's precision"
        modes_are_right(model)
        assert temperature == state["setup"].cfg.temperature
        result = real(model, batch, temperature, with_entropy, compute)
        if with_entropy:
            assert not torch.is_grad_enabled()
            seen["scores" if len(seen["scored"]) == 1 else "scores of resets"].append(
                (batch, *result)
            )
        elif torch.is_grad_enabled():
            seen["passes"].append((batch, result.detach()))
        return result

    @hook("score")
    def score(real, model, samples, temperature, compute):
        seen["scored"].append(len(samples))
        return real(model, samples, temperature, compute)

    @hook("optimizer_step")
    def optimizer_step(real, model, optimizer, schedule, loss, max_grad_norm, scaler):
        modes_are_right(model)
        assert type(optimizer) is torch.optim.AdamW and max_grad_norm == 0.7
        assert scaler is state["setup"].scaler
        (group,) = optimizer.param_groups
        options = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False)
        assert options.items() <= group.items() and not group["maximize"]
        assert {*map(id, group["params"])} == {*map(id, model.parameters())}
        grads = [p.grad.double().norm() ** 2 for p in model.parameters() if p.grad is not None]
        norm = real(model, optimizer, schedule, loss, max_grad_norm, scaler)
        close(norm, math.sqrt(sum(grads)), "norm")
        state["updates"] += 1
        seen["steps"].append((loss, norm))
        return norm

    @hook("evaluate")
    def evaluate(real, model, tokenizer, problems, **options):
        cfg, run = state["setup"].cfg, state["setup"].run
        samples, longest = options["samples"], options["max_new_tokens"]
        temperature = options["temperature"]
        assert (samples, options["seed"]) == (run.eval_samples, run.seed) and len(
            problems
        ) == run.eval_problems
        assert (longest, temperature) == (cfg.max_new_tokens, cfg.temperature)
        state["evaluating"], seen["evaluation"] = True, []
        result = real(model, tokenizer, problems, **options)
        (sampled, n, drawn), (greedy, one, best) = seen.pop("evaluation")
        again = dict(temperature=temperature, compute=options["compute"])
        again["generator"] = torch.Generator().manual_seed(run.seed)
        for states, count, rollouts in ((sampled, n, drawn), (greedy, one, best)):
            same = common.complete(
                model, tokenizer, states, count, longest, greedy=rollouts is best, **again
            )
            assert [r.ids for r in same] == [r.ids for r in rollouts], "other draws than its seed's"
        state["evaluating"] = False
        seen.pop("evaluation")
        assert (n, one) == (samples, 1) and len(sampled) == len(greedy) == len(problems)
        below = {"Add.": "Add."}.get(run.prompt, "")  # the built-in policy's own prompt has none
        for problem, (prompt, done, answer) in zip(problems, sampled):
            assert prompt == common.prompt_ids(tokenizer, problem, below) and not done
            assert answer == problem.answer
        assert max(len(r.ids) for r in drawn) <= longest
        rewards = [[r.reward for r in drawn[i * n : i * n + n]] for i in range(len(problems))]
        columns = dict(
            accuracy=[mean(row) for row in rewards], pass_at_k=[max(row) for row in rewards],
            greedy=[r.reward for r in best], in_form_greedy=[formed(r) for r in best],
            in_form=[mean(formed(r) for r in drawn[i * n : i * n + n]) for i in range(len(problems))],
        )  # fmt: skip
        for name, column in columns.items():
            close(result[name], mean(column), name)
            error = statistics.stdev(column) / math.sqrt(len(column))
            close(result[f"{name}_stderr"], error, f"{name}_stderr")
        assert set(result) == {"k", *columns, *(f"{name}_stderr" for name in columns)}
        assert result["k"] == n
        state["held_out"], state["held_out_in_form"] = result["accuracy"], result["in_form"]
        return result

    real_update = script.update

    def update(model, optimizer, schedule, samples, cfg, shuffle, *rest, **options):
        seen["samples"] = list(samples)
        seed = str(state["setup"].run.seed)
        assert seed in shuffle.split("-") and shuffle not in shuffles, "an order comes twice"
        shuffles.add(shuffle)
        result = real_update(model, optimizer, schedule, samples, cfg, shuffle, *rest, **options)
        seen["ended"] = time.time()
        return result

    script.update = update

    if script.__name__ == "spo":
        real_places = script.cutpoint_places

        def cutpoint_places(credit, wrong_facts, *rest):
            run, checkable = state["setup"].run, state["setup"].train[0].checkable
            assert wrong_facts == (common.wrong_facts(run.seed) if checkable else None)
            return real_places(credit, wrong_facts, *rest)

        script.cutpoint_places = cutpoint_places

    if script.__name__ == "mpo":
        real_show = script.show_answer

        def show_answer(problems, rollouts, *rest, **options):
            assert [problem_of(r.prompt) for r in rollouts] == list(problems)
            return real_show(problems, rollouts, *rest, **options)

        script.show_answer = show_answer

    @hook("log_step")
    def log_step(real, setup, step, bar, progress, row, answers):
        whole = whole_answers(script)
        assert Counter((*r.prompt, *r.ids) for r in answers) == Counter(
            (*r.prompt_ids, *r.whole) for r in whole
        )
        expected = count(script, progress, row)
        for key, value in expected.items():
            if value == "":
                assert row[key] == "", (key, row[key])
            else:
                close(row[key], value, f"step {step + 1}: {key}", 1e-4)
        assert set(row) == set(expected), set(row) ^ set(expected)
        assert progress["sampled_tokens"] == state["tokens"] and progress["step"] == step
        asked = dict.fromkeys(tuple(prompt) for prompt, _, _ in seen["complete"][0][0])
        batch = common.batch_at(setup.train, step, setup.cfg.prompts, setup.run.seed)
        assert [problem_of(prompt) for prompt in asked] == [*dict.fromkeys(batch)]
        # All of the step's sampling and updates, and neither an evaluation nor a display.
        took = progress["seconds"] - state["seconds"]
        assert seen["ended"] - seen["began"][0] <= took <= time.time() - state.get("logged", 0)
        state["seconds"] = progress["seconds"]
        close(setup.schedule.get_last_lr()[0], learning_rate(script, step), "lr")
        dtype = common.DTYPES[setup.run.dtype]
        assert {*seen["dtypes"]} == {dtype}, "sampling, scoring and updates differ in dtype"
        seen.clear()
        real(setup, step, bar, progress, row, answers)
        with open(setup.folder / "metrics.csv", newline="") as file:
            written = list(csv.DictReader(file))[-1]
        assert (written["held_out"] != "") == ((step + 1) % setup.run.eval_every == 0)
        close(float(written["in_form"]), mean(map(formed, whole)), "in_form")
        for name in ("held_out", "held_out_in_form"):
            assert written[name] == (str(state[name]) if written["held_out"] else "")
        state["logged"] = time.time()

    @hook("finish_run")
    def finish_run(real, setup, progress, facts={}, remark=""):
        if script.__name__ == "spo" and (failures := state["truth"]["failures"]):
            assert facts["failures"] == failures
            close(facts["credit_hit"], state["truth"]["hits"] / failures, "credit_hit")
            close(facts["credit_chance"], state["truth"]["chance"] / failures, "credit_chance")
        if script.__name__ == "reset_po":
            shares = reset_shares(state["truth"])
            for key, value in (dict(state["truth"]) | shares).items():
                assert value == "" or math.isclose(facts[key], value), (key, facts[key], value)
            assert set(facts) == {key for key in state["truth"] if shares.get(key) != ""}
        real(setup, progress, facts, remark)
        print("audited")


def formed(r) -> bool:
    """Did the answer end by itself, with a final answer?"""
    tokenizer = state["setup"].tokenizer
    text = tokenizer.decode(r.whole[:-1])
    stated = re.search(r"####[^\S\n]*(?!####)\S", text)
    return r.whole[-1] == tokenizer.eos_token_id and bool(stated)


def whole_answers(script) -> list:
    """The step's answers to prompts; not what values, resets and inner nodes were sampled for."""
    cfg = state["setup"].cfg
    if script.__name__ == "reset_po":  # one by one; resets come in groups
        return [r for _, n, rollouts in seen["complete"] if n == 1 for r in rollouts]
    if script.__name__ == "spo" and cfg.variant == "tree":
        every = [r for _, _, rollouts in seen["complete"] for r in rollouts]
        return [r for r in every if r.finished or len(r.whole) == cfg.max_new_tokens]
    return seen["complete"][0][2]


def learning_rate(script, step: int) -> float:
    """After a round. A round of trees counts as if all nodes of full trees had been trained, but
    during the warm-up, which counts updates."""
    cfg = state["setup"].cfg
    answers = cfg.prompts * (cfg.rollouts if script.__name__ == "reset_po" else cfg.group_size)
    if getattr(cfg, "variant", "") == "tree":
        answers, width = 0, cfg.prompts
        for children in cfg.branching:
            width *= children
            answers += width
        if cfg.replay_age and answers > cfg.replay_total:
            answers = cfg.replay_total
    updates = cfg.epochs * math.ceil(answers / cfg.batch_size) if cfg.batch_size else cfg.epochs
    total = cfg.steps * updates
    done = state["scheduled"] = state.get("scheduled", 0) + len(seen["steps"])
    if done >= cfg.warmup_updates:
        done = state["scheduled"] = (step + 1) * updates
        return cfg.lr * (total - done) / (total - cfg.warmup_updates)
    return cfg.lr * done / cfg.warmup_updates


# ------------------------------------------------------------------------------ the values again


def count(script, progress: dict, row: dict) -> dict:
    cfg = state["setup"].cfg
    losses, norms = zip(*(seen["steps"] or [(0.0, 0.0)]))
    values = dict(loss=mean(losses), grad_norm=mean(norms))
    entropy = sum(entropy.sum().item() for _, _, entropy in seen["scores"])
    tokens = sum(batch.mask.sum().item() for batch, _, _ in seen["scores"])
    values["entropy"] = entropy / tokens if tokens else 0.0
    if script.__name__ == "mpo":
        return values | count_mpo(cfg)
    if script.__name__ == "reset_po":
        return values | count_resets(cfg)
    values |= count_tree(cfg, progress) if cfg.variant == "tree" else count_chain(cfg)
    kl = clipped = trained = 0.0
    for batch, logprobs in seen["passes"]:
        for logprob, old, a, on in rows_of(
            logprobs, batch.old_logprobs, batch.advantages, batch.mask
        ):
            if on and (not cfg.mask or math.exp(old) < cfg.threshold):
                moved, trained = logprob - old, trained + 1
                kl += k3(moved)
                clipped += (
                    math.exp(moved) > 1 + cfg.clip_eps
                    if a > 0
                    else (a < 0 and math.exp(moved) < 1 - cfg.clip_eps)
                )
    values |= dict(kl=kl / max(trained, 1), clip_fraction=clipped / max(trained, 1))
    if cfg.kl_coef:
        values["kl_ref"] = row["kl_ref"]  # counted in test_spo.py
    return values


def k3(log_ratio: float) -> float:
    bounded = max(-10.0, min(10.0, log_ratio))
    return math.exp(bounded) - 1 - bounded


def rows_of(*tensors):
    return zip(*(tensor.flatten().tolist() for tensor in tensors))


def old_probs() -> dict[tuple, list[float]]:
    """Whole text -> the probability of each scored token."""
    found = {}
    for batch, logprobs, _ in seen["scores"]:
        for ids, start, row, mask in zip(batch.input_ids, batch.context_lens, logprobs, batch.mask):
            length = int(mask.sum())
            found[tuple(ids[: start + length].tolist())] = row[:length].exp().tolist()
    return found


def count_truth(problem, r, starts, advantages) -> None:
    """Failures, and whether the most negative segment holds the first wrong token."""
    tokenizer = state["setup"].tokenizer
    right = [*common.encode(tokenizer, problem.solution), tokenizer.eos_token_id]
    wrong = next((t for t, id in enumerate(r.whole) if right[t : t + 1] != [id]), None)
    if r.reward or wrong is None or not problem.checkable:
        return
    state["truth"]["failures"] += 1
    ends = [*starts[1:], len(r.whole)]
    segments = [s for s in zip(starts, ends) if advantages[s[0]] < 0]
    if segments:
        begin, end = min(segments, key=lambda s: advantages[s[0]])
        state["truth"]["hits"] += begin <= wrong < end
        state["truth"]["chance"] += (end - begin) / len(r.whole)


def problem_of(prompt_ids: list[int]):
    """The training problem that was asked."""
    setup = state["setup"]
    if "by_prompt" not in state:
        pairs = (
            (tuple(common.prompt_ids(setup.tokenizer, p, setup.instruction)), p)
            for p in setup.train
        )
        state["by_prompt"] = dict(pairs)
    return state["by_prompt"][tuple(prompt_ids)]


def count_chain(cfg) -> dict:
    (_, n, answers), *rest = seen["complete"]
    assert n == cfg.group_size and len(answers) == cfg.prompts * n
    values = {}
    for states, m, rollouts in rest:
        assert m == cfg.continuations
        for j, (prompt, done, _) in enumerate(states):
            key = (*prompt, *done)
            assert key not in values, "a state was estimated twice"
            values[key] = mean(r.reward for r in rollouts[j * m : j * m + m])
    probs, signals, opened, trained = old_probs(), 0, 0, 0
    for i, r in enumerate(answers):
        whole = (*r.prompt_ids, *r.whole)
        cuts = [t for t, p in enumerate(probs[whole]) if p < cfg.threshold][:: cfg.interval]
        if cfg.partition == "trajectory":
            group = answers[i // n * n : i // n * n + n]
            cuts, worth = [0], [mean(s.reward for s in group)]
        else:
            worth = [values[whole[: len(r.prompt_ids) + t]] for t in cuts]
        credits, after = [0.0] * len(r.whole), [*worth[1:], r.reward]
        for begin, end, a, b in zip(cuts, [*cuts[1:], len(r.whole)], worth, after):
            credits[begin:end] = [b - a] * (end - begin)
        opened += len(cuts)
        trained += sum(a != b for a, b in zip(worth, after))
        signals += any(credits)
        count_truth(problem_of(r.prompt_ids), r, cuts, credits)
        (sample,) = [s for s in seen["samples"] if s.ids is r.ids]
        for a, b in zip(sample.advantages, credits, strict=True):
            close(a, b, "advantage", 1e-6)
    return dict(
        accuracy=mean(r.reward for r in answers), length=mean(len(r.whole) for r in answers),
        no_signal=1 - signals / len(answers), boundaries=opened / len(answers), trained=trained,
    )  # fmt: skip


class Node:
    def __init__(self, rollout=None, above=None):
        self.rollout, self.above, self.below, self.credit = rollout, above, [], 0.0

    def value(self) -> float:
        return mean(b.value() for b in self.below) if self.below else self.rollout.reward

    def path(self) -> list:
        return [*(self.above.path() if self.above else []), *([self] if self.rollout else [])]


def count_tree(cfg, progress: dict) -> dict:
    roots = [Node() for _ in seen["complete"][0][0]]
    level, nodes = roots, []
    for depth, (states, n, rollouts) in enumerate(seen["complete"], 1):
        assert n == cfg.branching[depth - 1] and len(states) == len(level)
        children = [Node(r, level[i // n]) for i, r in enumerate(rollouts)]
        for child in children:
            child.above.below.append(child)
            last = depth == len(cfg.branching)
            assert last or len(child.rollout.ids) <= cfg.segment_tokens
        nodes += children
        level = [c for c in children if not c.rollout.finished
                 and len(c.rollout.whole) < cfg.max_new_tokens]  # fmt: skip
    for node in nodes:
        siblings = [s.value() for s in node.above.below]
        node.credit = node.value() - node.above.value()
        if cfg.scale_advantages and statistics.pstdev(siblings):
            node.credit /= statistics.pstdev(siblings)
        node.credit = node.credit if abs(node.credit) > 1e-12 else 0.0
    leaves = [node for node in nodes if not node.below]
    for leaf in leaves:
        credits = [a.credit for a in leaf.path() for _ in a.rollout.ids]
        starts = [len(a.rollout.whole) - len(a.rollout.ids) for a in leaf.path()]
        count_truth(problem_of(leaf.rollout.prompt_ids), leaf.rollout, starts, credits)
    kept = [node for node in nodes if node.credit]
    if cfg.level_weights:  # those of answers, counted above, are without
        size = Counter(len(node.path()) for node in nodes)
        for node in kept:
            node.credit *= len(nodes) / len(size) / size[len(node.path())]
    given = Counter(
        (tuple(s.context), tuple(s.ids), round(s.advantages[0], 6)) for s in seen["samples"]
    )
    wanted = Counter(
        ((*a.rollout.prompt_ids, *a.rollout.whole[: len(a.rollout.whole) - len(a.rollout.ids)]),
         tuple(a.rollout.ids), round(a.credit, 6)) for a in kept
    )  # fmt: skip
    if cfg.replay_age:
        state["waits"] = [
            w for w in state.get("waits", []) if progress["step"] - w[0] < cfg.replay_age
        ]
        state["waits"] += [(progress["step"], key) for key in wanted.elements()]
        left = Counter(key for _, key in state["waits"])
        assert not given - left, "a node was trained twice, or never sampled, or is too old"
        kept = Counter(
            (tuple(f["context"]), tuple(f["ids"]), round(f["advantages"][0], 6))
            for _, _, f in progress["waiting"]
        )
        assert kept == left - given, "a node was lost, or waits twice"
        for key in given.elements():
            state["waits"].remove(next(w for w in state["waits"] if w[1] == key))
        asked = Counter(tuple(problem_of(head(key[0])).question) for key in given.elements())
        assert max(asked.values(), default=0) <= cfg.replay_nodes
        assert sum(given.values()) <= cfg.replay_total
    else:
        assert given == wanted
    return dict(
        accuracy=mean(root.value() for root in roots),
        length=mean(len(leaf.rollout.whole) for leaf in leaves),
        no_signal=mean(not any(a.credit for a in leaf.path()) for leaf in leaves),
        boundaries=mean(len(leaf.path()) for leaf in leaves),
        trained=len(seen["samples"]),
    )  # fmt: skip


def head(context) -> list[int]:
    """The prompt that a context begins with."""
    problem_of_any = state["by_prompt"]
    return next(list(p) for p in problem_of_any if context[: len(p)] == p)


def count_mpo(cfg) -> dict:
    ((_, n, answers),) = seen["complete"]
    assert n == cfg.group_size and len(answers) == cfg.prompts * n
    silent = 0
    for i, r in enumerate(answers):
        rewards = [s.reward for s in answers[i // n * n : i // n * n + n]]
        spread = statistics.pstdev(rewards) if cfg.scale_advantages else 1.0
        silent += len({*rewards}) == 1
        credit = (r.reward - mean(rewards)) / spread if len({*rewards}) > 1 else 0.0
        (sample,) = [s for s in seen["samples"] if s.ids is r.ids]
        for a in sample.advantages:
            close(a, credit, "advantage")
    k, share = cfg.block_size, cfg.weights
    future = (share / (k - 1) if k > 1 else 0.0) if isinstance(share, float) else None
    beta = [1.0] * k if share == "joint" else [1 / k] * k
    beta = beta if future is None else [1 - share, *[future] * (k - 1)]
    kl, cuts, block_cuts, ratios, block_ratios = 0.0, 0, 0, [], []
    for batch, logprobs in seen["passes"]:
        for new, old, mask, credits in zip(
            logprobs, batch.old_logprobs, batch.mask, batch.advantages
        ):
            length, a = int(mask.sum()), credits[0].item()
            token = (new - old)[:length].double().tolist()
            for t in range(length):
                at = t - t % k if cfg.layout == "block" else t
                window, weights = token[at : at + k], beta[: length - at]
                total = 1.0 if share == "joint" else sum(weights)
                log_r = sum(w * x for w, x in zip(weights, window)) / total
                wide = math.sqrt(sum((w / total) ** 2 for w in weights)) if cfg.scale_eps else 1.0
                kl += k3(token[t])
                ratios.append(math.exp(token[t]))
                block_ratios.append(math.exp(log_r))
                cuts += is_cut(ratios[-1], a, cfg.clip_eps)
                block_cuts += is_cut(block_ratios[-1], a, cfg.clip_eps * wide)
    tokens = max(len(ratios), 1)
    return dict(
        accuracy=mean(r.reward for r in answers), length=mean(len(r.ids) for r in answers),
        no_signal=silent / len(answers), kl=kl / tokens, token_clip=cuts / tokens,
        block_clip=block_cuts / tokens, token_ratio_var=statistics.pvariance(ratios or [1.0]),
        block_ratio_var=statistics.pvariance(block_ratios or [1.0]),
    )  # fmt: skip


def is_cut(ratio: float, advantage: float, eps: float) -> bool:
    return ratio > 1 + eps if advantage > 0 else advantage < 0 and ratio < 1 - eps


def count_resets(cfg) -> dict:
    tokenizer, calls = state["setup"].tokenizer, seen["complete"]
    draws = [call for call in calls if not any(done for _, done, _ in call[0]) and call[1] == 1]
    later = calls[len(draws) :]
    assert len(later) <= 1 and bool(seen["scores of resets"]) == bool(later and cfg.clip_eps)
    drawn = defaultdict(list)
    for _, _, rollouts in draws:
        for r in rollouts:
            drawn[tuple(r.prompt_ids)].append(r)
    assert len(drawn) == cfg.prompts
    keep = cfg.seed_rule == "keep"
    first = cfg.fresh if keep else cfg.fresh + cfg.seeds
    base, seeds = {}, []
    for prompt, rollouts in drawn.items():
        tries = rollouts[: cfg.fresh] if keep else rollouts[:12]
        failed = [r for r in tries if not r.reward][: cfg.seeds]
        seeds += failed
        others = [r for r in rollouts if keep or not any(r is s for s in failed)]
        missing = (cfg.seeds - len(failed)) * cfg.resets
        joined = others[cfg.fresh :] if keep else [r for r in rollouts[12:] if missing]
        base[prompt] = [*others[: cfg.fresh], *joined[:missing]]
    groups = []
    if later:
        states, n, rollouts = later[0]
        assert n == cfg.resets and len(states) == len(seeds)
        groups = [rollouts[i * n : i * n + n] for i in range(len(states))]
    trained = [*(r for group in base.values() for r in group), *(r for g in groups for r in g)]
    assert [id(s.ids) for s in seen["samples"]] == [id(r.ids) for r in trained]
    for group in [*base.values(), *groups]:
        rewards = [r.reward for r in group]
        for r in group:
            flat = len({*rewards}) == 1
            credit = 0.0 if flat else (r.reward - mean(rewards)) / statistics.pstdev(rewards)
            (sample,) = [s for s in seen["samples"] if s.ids is r.ids]
            assert sample.context == r.prompt
            for a in sample.advantages:
                close(a, credit, "advantage")
    # Where each seed was resampled from, and where it went wrong.
    found = Counter()
    for seed, group in zip(seeds, groups):
        text = tokenizer.decode(seed.whole)
        lines = [m.start() for m in re.finditer(r"[^\n]+", text.removesuffix("<end>"))] or [0]
        back = len(group[0].whole) - len(group[0].ids)
        named = lines.index(back) + 1
        problem = problem_of(seed.prompt_ids)
        right = [*common.encode(tokenizer, problem.solution), tokenizer.eos_token_id]
        wrong = next((t for t, id in enumerate(seed.whole) if right[t : t + 1] != [id]), None)
        if wrong is None or not problem.checkable:
            continue
        truth = sum(start <= wrong for start in lines)
        found.update(failures=1, hit=named == truth, at_or_before=named <= truth)
        found.update({"hit_chance": 1 / len(lines), "at_or_before_chance": truth / len(lines)})

    def silent(groups) -> int:
        return sum(len({r.reward for r in group}) == 1 for group in groups)

    found.update(
        base_groups=len(base), no_signal_base=silent(base.values()),
        reset_groups=len(groups), no_signal_reset=silent(groups),
        failures=0, hit=0, at_or_before=0, hit_chance=0, at_or_before_chance=0,
    )  # fmt: skip
    spent = dict(
        base_tokens=sum(len(r.ids) for group in base.values() for r in group),
        localiser_tokens=0, reset_tokens=sum(len(r.ids) for group in groups for r in group),
    )  # fmt: skip
    every = sum(len(r.ids) for rollouts in drawn.values() for r in rollouts)
    spent["seed_tokens"] = every - spent["base_tokens"]
    state["truth"].update(found)
    state["truth"].update(spent)
    continued = [r.reward for group in groups for r in group]
    cut = tokens = 0
    for batch, logprobs in seen["passes"]:
        for new, old, a, on in rows_of(logprobs, batch.old_logprobs, batch.advantages, batch.mask):
            tokens += on
            cut += bool(on and cfg.clip_eps and is_cut(math.exp(new - old), a, cfg.clip_eps))
    values = dict(
        accuracy=mean(r.reward for rollouts in drawn.values() for r in rollouts[:first]),
        reset_accuracy=mean(continued) if continued else "",
        clip_fraction=cut / max(tokens, 1), resets=len(groups) / cfg.prompts,
        length=mean(len(r.ids) for r in trained),
    )  # fmt: skip
    return values | reset_shares(found) | spent


def reset_shares(counts: dict) -> dict:
    of = dict.fromkeys(("hit", "at_or_before", "hit_chance", "at_or_before_chance"), "failures")
    of |= dict(no_signal_base="base_groups", no_signal_reset="reset_groups")
    return {key: counts[key] / counts[n] if counts[n] else "" for key, n in of.items()}
