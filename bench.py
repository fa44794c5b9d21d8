"""Measure:   python bench.py eval --task lm --method dash --speedup 2.0

    eval      one method on one task: perplexity in windows of a text or accuracy on multiple-choice items, the speedup in bits
              over all tokens of the run, and the measured speedup of batch-1 decoding against the full model
    frontier  what is lost at six speedups: random states, the best static plan, a plan by position, the policy and those given
              by --compare; and whether decoding keeps to its budget; on wikitext2 with --data-dir, else on pydocs; results/frontier-TASK.json, .png
    speed     milliseconds per block and state, tokens/s of every path and of the peers installed here, first token, memory,
              bandwidth; writes results/speed-cpu.json, whose latency table `train.py --cost latency` uses, and a bar chart.
              --suite gpu: the CUDA engine on 7B shapes with random weights, against the bandwidth, the same states known ahead
              and transformers; writes results/speed-gpu.json and a picture of one token's timeline
    ablation  what the form of a_i and the INT8 head are worth; writes results/ablation.json
    report    puts the tables of results/ into the README

Perplexity and accuracy use fp32 and dequantised weights in parallel passes; decoding uses the real kernels (bf16 on the CPU).
Both run the same routed forward.
"""

import copy
import gc
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import baselines
from baselines import bootstrap, compare
from data import CHOICE_TASKS, kl, load_examples, load_text, outcomes, text_examples, windows
from infer import Engine, generate
from model import LLM, Config, KVCache, check_gpu, fetch_smollm2, load, read_gguf, read_json
from policy import (Fixed, Parser, Policy, Scorer, bit_costs, command_line, device_name, format_table, goal_cost, make_folder, mean_cost,
                    most_speedup, pick_device, save_result, speedup_bits, write_whole)
from quant import CHOSEN, fake_quantize
from train import SAMPLE_TOKENS, SAMPLES, calibrate_prices, profile, save_figure, sensitivities

METHODS = ("full", "int8", "int4", "static_skip", "random_skip", "static_mix", "position_mix", "random_mix", "dash")
WINDOW = 1024  # tokens of an evaluation window


def read_policy(path, model, needed):
    """The policy file for this model, or None where it is not needed and there is none for this model."""
    if not needed and not Path(path).is_file():
        return None
    policy = Policy.load(path).to(model.embed.weight.device)
    if needed:
        policy.check(model)
    return policy if policy.fingerprint == model.fingerprint() else None


def known_of(model, policy, seed):
    """What baselines may go by: the damage that train.py left in a policy file."""
    known = baselines.Known(model.config.n_layer, bit_costs(model.config), seed)
    if policy:
        known.scale = policy.scale
        for name in ("damage", "position_damage"):
            if name in policy.settings:
                setattr(known, name, torch.tensor(policy.settings[name]))
    return known


def make_policy(method, model, tokenizer, args, policy, calibration):
    """What `LLM.forward` takes, or a function of the tokens that gives it, for a method's name."""
    if method == "dash":
        return policy.at(args.speedup)
    known = known_of(model, policy, args.seed)
    needs = {"static_mix": "damage", "position_mix": "position_damage"}.get(method)
    if needs and getattr(known, needs) is None:
        raise ValueError(f"{args.policy} has no {needs}, which {method} goes by; train it again with train.py --objective fisher")
    if method == "static_skip":
        baselines.skips(known, args.speedup)  # out of reach: say so before measuring
        samples = windows(tokenizer, load_text(*calibration), SAMPLES, SAMPLE_TOKENS, spread=True)
        known.similarity = profile(model, samples.to(args.device))["similarity"]
    return getattr(baselines, method)(known, args.speedup)


def measured_speedup(args, policy, int4, prompt, tokens=24, pairs=3):
    """Decoding speed under the policy over that of the full model, batch 1, real kernels: median of alternating pairs."""
    model, tokenizer = load(args.model, args.device, torch.bfloat16)
    model.quantize(real=True, int4=int4)
    ids = torch.zeros(1, tokens + 64)
    routed = policy(ids) if callable(policy) else policy
    text = tokenizer.decode(tokenizer.encode(prompt)[:32])
    ratios = []
    for _ in range(pairs):
        speeds = [generate(model, tokenizer, text, p, tokens)["tokens_per_second"] for p in (routed, None)]
        ratios.append(speeds[0] / speeds[1])
    return statistics.median(ratios)


def evaluate(args):
    args.device = pick_device(args.device)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: at least 1")
    if args.task == "mc" and not args.file:
        raise ValueError('--task mc needs --file with lines of {"question", "choices": [text, ...], "answer": index}')
    where = (args.file, None) if args.file else ("pydocs" if args.task == "lm" else args.task, "test")
    choice = args.task not in ("lm", "wikitext2")
    text = load_text(*where, args.data_dir, choice)  # not there, or no text: say so before anything is loaded
    model, tokenizer = load(args.model, args.device, torch.float32)
    top = most_speedup(model.config.n_layer, bit_costs(model.config))
    if args.method not in ("full", "int8", "int4") and not 1 <= args.speedup <= top:
        raise ValueError(f"--speedup {args.speedup:g} is out of reach: give 1 to {top:.2f}")
    policy = read_policy(args.policy, model, args.method in ("dash", "static_mix", "position_mix"))
    calibration = ("pydocs", "train") if args.file or args.task == "lm" else (args.task, "train", args.data_dir)
    routed = make_policy(args.method, model, tokenizer, args, policy, calibration)
    size = model.config.block_size if choice else min(WINDOW, model.config.block_size)
    examples = load_examples(*where, tokenizer, args.limit or (100 if choice else 8), size, args.data_dir, args.device, choice=choice)
    int4 = policy.int4 if policy else None
    model.quantize(int4=int4)
    full, row = compare(model, examples, [None, routed], bit_costs(model.config))
    del model
    metric = "accuracy" if choice else "perplexity"
    value, value_full = (r["accuracy"] if choice else torch.tensor(r["nats"]).exp().item() for r in (row, full))
    measured = 1.0 if args.method == "full" else measured_speedup(args, routed, int4, text)
    tokens, codes = sum(sum(e.lengths) for e in examples), int4 or "nearest"
    print(f"{args.task}, {args.method}: {metric} {value:.3f} (full model {value_full:.3f}), KL {row['kl']:.4f} nats, "
          f"{row['speedup']:.3f}x in bits, {measured:.2f}x measured; {len(examples)} {'items' if choice else 'windows'}, {tokens} tokens, "
          f"INT4 codes: {codes}")
    if args.json:
        print(json.dumps({
            "task": args.task, "method": args.method, "speedup_target": args.speedup, "speedup_bits": row["speedup"],
            "speedup_measured": measured, "metric": metric, "value": value, "value_full": value_full, "kl": row["kl"],
            "top1": row["top1"], "int4": codes, "n": len(examples), "tokens": tokens, "states": row["states"], "device": str(args.device),
            "model": args.model}))


# ----------------------------------------------------------------------------------------------------------
# frontier

SPEEDUPS = (2.0, 2.29, 2.67, 3.2, 4.0, 4.5)


def name_of(policy):
    s = policy.settings
    return (f"{'dash' if s['objective'] == 'fisher' else 'rl'}{' from fisher' if s.get('start') else ''}, horizon {policy.horizon}, seed {s['seed']}")


@torch.no_grad()
def frontier(args):
    """Nats lost and KL against speedup; same INT4 codes, same states, same keys and values, same a_i."""
    device = pick_device(args.device)
    model, tokenizer = load(args.model, device, torch.float32)
    policies = [read_policy(path, model, True) for path in [args.policy, *args.compare]]
    policy = policies[0]
    for path, other in zip(args.compare, policies[1:]):
        if other.int4 != policy.int4:
            raise ValueError(f"{path} has other INT4 codes than {args.policy}; train both on the same data")
    model.quantize(int4=policy.int4)
    task = "wikitext2" if args.data_dir else "pydocs"
    size = min(WINDOW, model.config.block_size)
    examples = load_examples(task, "test", tokenizer, args.limit or 8, size, args.data_dir, device)
    known = known_of(model, policy, args.seed)
    if known.position_damage is None:
        raise ValueError(f"{args.policy} has no label means; train it with train.py --objective fisher")
    costs = known.costs
    speedups = [s for s in SPEEDUPS if s <= min(most_speedup(known.L, costs), *(p.prices[-1][0] for p in policies))]

    # The static side, on training text: KL of each block alone, and of whole plans
    train_rows = windows(tokenizer, load_text(task, "train", args.data_dir), 4, min(512, size), task, spread=True).to(device)
    search, choose = text_examples(train_rows[:1]), text_examples(train_rows[1:])

    def measure_on(examples):
        full = [outcomes(model, model.hidden(e.rows), e)[0] for e in examples]
        kl_of = lambda f, e, policy: kl(f, outcomes(model, model.hidden(e.rows, policy), e)[0]).mean().item()
        return lambda states: sum(kl_of(f, e, Fixed(states, known.scale)) for f, e in zip(full, examples)) / len(examples)

    alone = sensitivities(model, search, known.scale)
    known.candidates, known.measure = baselines.static_candidates(known, alone, measure_on(search), speedups), measure_on(choose)

    contenders, about = [None, baselines.int8(known, 0), baselines.int4(known, 0)], [("full model", None), ("all INT8", None), ("all INT4", None)]
    plans = [baselines.best_static(known, speedup) for speedup in tqdm(speedups, desc="static plans")]
    # A static plan cannot cost exactly what is asked, and a price set on other text does not either: the policies get prices at which
    # they cost on this text what the static plan costs, so that what is compared is the choice alone. `budget` measures the other error.
    same, trained = [mean_cost(plan.given, costs) for plan in plans], policy.prices
    for p in policies:
        calibrate_prices(p, model, examples, speedups, same)

    def priced(p, mu):
        p.mu = mu
        return p

    for n, (speedup, plan) in enumerate(zip(speedups, plans)):
        contenders += [baselines.random_mix(known, speedup), plan, baselines.position_mix(known, speedup)]
        about += [(name, speedup) for name in ("random states", "best static plan", "by position")]
        for p in policies:  # the price is set just before each window
            contenders.append(lambda rows, p=p, mu=p.prices[n][1]: priced(p, mu))
            about.append((name_of(p), speedup))
    rows = [{"method": name, "target": s} | {k: v for k, v in r.items() if k != "raw"}
            for (name, s), r in zip(about, compare(model, examples, contenders, costs))]
    policy.prices = trained
    kept = budget(args, policy, task, [s for s in (2.0, 2.67, 3.2) if s in speedups])
    tokens = sum(sum(e.lengths) for e in examples)
    header, cells = frontier_cells(rows, speedups)
    met = lambda k, way: f"{k[way]:.3f}x, {100 * (k[way] / k['asked'] - 1):+.1f}%"
    markdown = "\n\n".join([format_table(header, cells), format_table(
        ["decoding 512 tokens", "asked", "price fixed: realised, and error", "price tracks the budget"],
        [[k["text"], f"{k['asked']:g}x", met(k, "fixed"), met(k, "tracked")] for k in kept])])
    caption = (f"{task}, test, {tokens} tokens in windows of {size}, trained on {policy.settings['data']}. Full model {rows[0]['nats']:.4f} nats. "
               "Each cell: nats lost, KL to the full model (speedup realised); policies are priced to cost on this text what the static "
               "plan of the column costs. Ratios with 95% intervals over windows.")
    path = Path(args.results) / f"frontier-{task}.json"
    save_result(path, device, model, args.seed, caption=caption, markdown=markdown, tokens=tokens, budget=kept, rows=rows,
                policy={k: v for k, v in policy.settings.items() if "damage" not in k})
    frontier_chart(path.with_suffix(".png"), rows, task)
    print(f"{caption}\n\n{markdown}\n\nwrote {path} and {path.with_suffix('.png')}")


def frontier_cells(rows, speedups):
    """A row a method, a column a speedup; under them what each policy keeps of what the best static plan loses at the same cost."""
    full = rows[0]
    cell = lambda r: f"{r['nats'] - full['nats']:+.4f}, {r['kl']:.4f} ({r['speedup']:.2f}x)"
    of = {m: [r for r in rows if r["method"] == m] for m in dict.fromkeys(r["method"] for r in rows[3:])}
    cells = [[m, *map(cell, those)] for m, those in of.items()]
    lost = lambda r, key: [v - (f if key == "nats" else 0) for v, f in zip(r["each"][key], full["each"]["nats"])]
    for m in list(of)[3:]:
        for key, what in (("nats", "nats lost"), ("kl", "KL")):
            ratios = []
            for ours, static in zip(of[m], of["best static plan"]):
                a, b = lost(ours, key), lost(static, key)
                low, high = bootstrap(lambda a, b: a.sum(1) / b.sum(1), a, b)
                ratios.append(f"{sum(a) / sum(b):.2f} [{low:.2f}, {high:.2f}]")
            cells.append([f"{m} / best static plan, {what}", *ratios])
    for r in rows[1:3]:
        cells.append([r["method"], cell(r), *[""] * (len(speedups) - 1)])
    return ["", *(f"{s:g}x" for s in speedups)], cells


def frontier_chart(path, rows, task):
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = {"random states": "tab:gray", "best static plan": "tab:orange", "by position": "tab:olive"}
    others = iter(["tab:blue", "tab:red", "tab:purple", "tab:cyan", "tab:green", "tab:pink"])
    for method in dict.fromkeys(r["method"] for r in rows[3:]):
        those = [r for r in rows if r["method"] == method]
        color = colors.get(method) or next(others, None)
        axes.plot([r["speedup"] for r in those], [r["kl"] for r in those], marker="o", markersize=4, color=color, label=method)
    for r in rows[1:3]:
        axes.plot(r["speedup"], r["kl"], marker="s", color="black", linestyle="none")
        axes.annotate(r["method"], (r["speedup"], r["kl"]), xytext=(6, -12), textcoords="offset points")
    axes.set(xlabel="speedup in bits", ylabel="KL to the full model, nats a token", title=f"What is lost, {task} test text", yscale="log")
    axes.legend()
    save_figure(figure, path)


@torch.inference_mode()
def budget(args, policy, task, speedups, tokens=512, prompt=32):
    """Speedup in bits of `tokens` decoded tokens of test text, one by one, with the price fixed and with the price tracking."""
    model, tokenizer = load(args.model, policy.costs.device, torch.bfloat16)
    model.quantize(real=True, int4=policy.int4)
    size = min(tokens + prompt, model.config.block_size)
    out = []
    for n, example in enumerate(load_examples(task, "test", tokenizer, 3, size, args.data_dir, policy.costs.device, spread=True)):
        for speedup in speedups:
            row = {"text": f"{task}, {n + 1}", "asked": speedup}
            for way in ("fixed", "tracked"):
                policy.at(speedup, track=way == "tracked")
                cache, states = KVCache(model, 1, size), []
                model.hidden(example.rows[:, :prompt], policy, cache)
                for t in tqdm(range(prompt, example.rows.shape[1]), desc=f"{row['text']}, {speedup:g}x, {way}", leave=False):
                    model.hidden(example.rows[:, t : t + 1], policy, cache)
                    states.append(policy.states)
                row[way] = speedup_bits(torch.cat(states, 2), policy.costs)
            out.append(row)
    return out


# ----------------------------------------------------------------------------------------------------------
# speed


def median_of(rounds, contenders):
    """Run every contender once a round, in turn: {name: [value of each round]}."""
    values = {name: [] for name in contenders}
    for _ in tqdm(range(rounds), desc=", ".join(contenders)[:40], leave=False):
        for name, f in contenders.items():
            values[name].append(f())
    return values


def ratio(values, a, b):
    """Median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(values[a], values[b]))


def transformers_model(c, device):
    """The same network in transformers, bf16, random weights. ImportError without transformers."""
    import transformers

    kind = "Qwen2" if c.qkv_bias else "Llama"
    config = getattr(transformers, kind + "Config")(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return getattr(transformers, kind + "ForCausalLM")(config).to(torch.bfloat16).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def transformers_step(theirs, ids, tokens, **options):
    """Median seconds of a decoding step of transformers' own `generate`."""
    prompt, times = torch.tensor([ids], device=theirs.device), []
    clock = SimpleNamespace(put=lambda value: times.append(time.perf_counter()), end=lambda: None)  # called with every token as it comes
    theirs.generate(prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
                    streamer=clock, **options)
    return statistics.median(b - a for a, b in zip(times[1:], times[2:]))


def peers(model, tokenizer, ids, tokens, threads):
    """Decoding with transformers in bf16 and with llama.cpp on its own file, same weights: {name: f -> median seconds a token}."""
    out, missing = {}, []
    path = fetch_smollm2()
    try:
        theirs = transformers_model(model.config, "cpu")
        theirs.load_state_dict({k: v.bfloat16() for k, v in read_gguf(path)[1].items()}, strict=False)
        out["transformers bf16"] = lambda: transformers_step(theirs, ids, tokens)
    except ImportError:
        missing.append("transformers")
    try:
        from llama_cpp import Llama

        llama = Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

        def run_llama():
            llama.reset()
            llama.eval(ids)
            seconds = []
            for _ in range(tokens):
                began = time.perf_counter()
                llama.eval([llama.sample(temp=0.0)])
                seconds.append(time.perf_counter() - began)
            return statistics.median(seconds)

        out["llama.cpp Q4_1"] = run_llama
    except ImportError:
        missing.append("llama-cpp-python")
    return out, missing


def read_bandwidth(device="cpu"):
    """GB/s of reading memory, the best of 5: 1 GiB once on the CPU, 4 GiB eight times on a GPU."""
    size, times = (2**30, 8) if torch.device(device).type == "cuda" else (2**28, 1)
    big, best = torch.ones(size, device=device), float("inf")
    for _ in range(5):
        float(big[0])  # on a GPU: waits for what was launched
        began = time.perf_counter()
        for _ in range(times):
            total = big.sum()
        float(total)
        best = min(best, time.perf_counter() - began)
    return times * big.numel() * 4 / best / 1e9


def speed(args):
    if args.suite == "gpu":
        return speed_gpu(args)
    device = pick_device(args.device)
    model, tokenizer = load(args.model, device, torch.bfloat16)
    policy = Policy.load(args.policy).to(device)
    policy.check(model)
    model.quantize(real=True, int4=policy.int4)
    tokenizer.eos = ()  # every run makes all its tokens
    L, tokens, threads = model.config.n_layer, 128, torch.get_num_threads()
    text = load_text("pydocs", "test")
    ids = tokenizer.encode(text)
    prompt, long_prompt = tokenizer.decode(ids[:64]), tokenizer.decode(ids[: min(512, model.config.block_size - 8)])
    step = lambda policy=None: generate(model, tokenizer, prompt, policy, tokens)["step_s"]

    # Tokens/s of each path and of the peers
    uniform = {"all bf16": None, "all INT8": Fixed([2] * L), "all INT4": Fixed([1] * L), "all skipped": Fixed([4] + [0] * (L - 2) + [1])}
    theirs, missing = peers(model, tokenizer, tokenizer.encode(prompt), tokens, threads) if args.model == "smollm2" else ({}, [])
    for name in missing:
        print(f"not installed, so not compared: {name}")
    seconds = median_of(args.rounds, {name: lambda p=p: step(p) for name, p in uniform.items()} | theirs)
    per_second = {name: 1 / statistics.median(v) for name, v in seconds.items()}

    # The latency table: T = overhead + sum over blocks of ms(state), from the uniform paths and a token without blocks
    def no_blocks():
        times = []
        for _ in range(50):
            began = time.perf_counter()
            with torch.inference_mode():
                x = model.embed(torch.tensor([[1]], device=device)).view(1, -1)
                model.rope(5, 1)
                int(model.logits(model.norm(x))[0].argmax())
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    overhead = statistics.median(no_blocks() for _ in range(args.rounds)) * 1000
    total = {name: statistics.median(v) * 1000 for name, v in seconds.items()}
    table = {"4": (total["all bf16"] - overhead) / L, "2": (total["all INT8"] - overhead) / L, "1": (total["all INT4"] - overhead) / L}
    table["0"] = (total["all skipped"] - overhead - table["4"] - table["1"]) / (L - 2)

    # Routed decoding against the same states known ahead, and what the latency table promises for them
    routed, decisions = [], []
    for horizon in dict.fromkeys((policy.horizon, 1)):
        for target in (1.33, 1.67, 2.0) if horizon == policy.horizon else (2.0,):
            policy.horizon = horizon
            policy.at(target, track=True)  # as infer.py decodes
            out = generate(model, tokenizer, prompt, policy, tokens)
            known = Fixed(out["states"][:, None], policy.scale)
            values = median_of(args.rounds, {"routed": lambda: step(policy), "known": lambda: step(known), "full": step})
            of_steps = out["states"][:, out["prompt_tokens"] :]
            blocks = sum(float((of_steps == int(s)).float().mean()) * L * ms for s, ms in table.items())
            if horizon == policy.settings.get("horizon"):
                decisions += [1000 * (a - b) for a, b in zip(values["routed"], values["known"])]
            routed.append({"horizon": horizon, "speedup_target": target, "cost": policy.settings.get("cost", "bits"),
                           "speedup_bits": speedup_bits(of_steps, bit_costs(model.config)), "blocks_ms": blocks,
                           "measured": ratio(values, "full", "routed"), "routed_over_known": ratio(values, "routed", "known")})
    decision = max(0.0, statistics.median(decisions))
    for row in routed:
        row["promised"] = total["all bf16"] / (overhead + decision + row.pop("blocks_ms"))
        row["promised_over_measured"] = row["promised"] / row["measured"]
    policy.horizon = policy.settings.get("horizon", 1)

    # First token of a long prompt
    first = lambda p: generate(model, tokenizer, long_prompt, p, 1)["first_token_s"]
    policy.at(1.67)
    values = median_of(args.rounds, {"routed": lambda: first(policy), "full": lambda: first(None)})
    sizes = model.bytes()
    bandwidth = read_bandwidth(device)
    weights = {"all bf16": sizes["4"], "all INT8": sizes["2"], "all INT4": sizes["1"]}
    result = {
        "tokens": tokens, "prompt_tokens": 64, "rounds": args.rounds, "policy": policy.settings, "tokens_per_second": per_second,
        "ratios": {"bf16 / transformers bf16": ratio(seconds, "transformers bf16", "all bf16") if "transformers bf16" in seconds else None,
                   "INT4 / llama.cpp Q4_1": ratio(seconds, "llama.cpp Q4_1", "all INT4") if "llama.cpp Q4_1" in seconds else None,
                   "INT8 / bf16": ratio(seconds, "all bf16", "all INT8"), "INT4 / bf16": ratio(seconds, "all bf16", "all INT4")},
        "latency_ms": table | {"overhead": overhead, "decision": decision}, "routed": routed,
        "first_token": {"prompt_tokens": len(tokenizer.encode(long_prompt)), "speedup_target": 1.67, "routed / full": ratio(values, "routed", "full"),
                        "full_s": statistics.median(values["full"])},
        "memory": {"bytes": sizes, "all precisions / bf16": sizes["all"] / sizes["bf16 model"]},
        "bandwidth_gb_s": bandwidth,
        "share_of_bandwidth": {name: weights[name] / 1e9 / bandwidth * per_second[name] for name in weights}}
    path = Path(args.results) / f"speed-{device.type}.json"
    caption = (f"Batch 1, prompt of 64 tokens, {tokens} new ones, median step, {args.rounds} alternating rounds, {threads} threads; the policy "
               f"was trained for --cost {policy.settings.get('cost', 'bits')}.")
    markdown = speed_tables(result)
    save_result(path, device, model, args.seed, caption=caption, markdown=markdown, **result)
    speed_chart(path.with_suffix(".png"), result, device_name(device))
    print(f"{caption}\n\n{markdown}\n\nwrote {path} and {path.with_suffix('.png')}")


def speed_tables(r):
    ms, ratio_of = r["latency_ms"], lambda name: "not installed" if r["ratios"][name] is None else f"{r['ratios'][name]:.2f}"
    rows = [[name, goal, ratio_of(name)] for name, goal in
            (("bf16 / transformers bf16", ">= 2.0"), ("INT4 / llama.cpp Q4_1", ">= 1.0"), ("INT8 / bf16", ">= 1.6"), ("INT4 / bf16", ">= 2.4"))]
    for row in r["routed"]:
        rows.append([f"routed / same states known ahead, horizon {row['horizon']}, {row['speedup_target']:g}x asked",
                     "<= 1.03" if row["horizon"] > 1 else "reported", f"{row['routed_over_known']:.3f}"])
    for row in r["routed"]:
        if row["horizon"] > 1:
            rows.append([f"promised / measured at {row['speedup_target']:g}x asked (measured {row['measured']:.2f}x)", "0.95 to 1.05",
                         f"{row['promised_over_measured']:.3f}"])
    rows += [["weights in all three precisions / bf16 alone", "<= 1.9", f"{r['memory']['all precisions / bf16']:.2f}"],
             [f"first token of {r['first_token']['prompt_tokens']}, routed at 1.67x / full", "<= 1.1", f"{r['first_token']['routed / full']:.2f}"]]
    share = r["share_of_bandwidth"]
    return "\n\n".join([
        format_table(["path", "tokens/s", "share of the memory bandwidth"],
                     [[name, f"{v:.1f}", f"{100 * share[name]:.0f}%" if name in share else ""] for name, v in r["tokens_per_second"].items()]),
        format_table(["figure", "goal", "measured"], rows),
        f"A block takes {ms['4']:.2f} ms in bf16, {ms['2']:.2f} in INT8, {ms['1']:.2f} in INT4, {ms['0']:.2f} skipped; everything else of a "
        f"token {ms['overhead']:.2f} ms, the decisions {ms['decision']:.2f} ms. Memory was read at {r['bandwidth_gb_s']:.0f} GB/s in the same run."])


def speed_chart(path, result, device):
    rows = sorted(result["tokens_per_second"].items(), key=lambda row: row[1])
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    ours = ["tab:blue" if name.startswith("all ") else "tab:gray" for name, _ in rows]
    bars = axes.barh([name for name, _ in rows], [v for _, v in rows], color=ours)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set(xlabel="tokens/s, batch 1", title=f"Decoding SmolLM2-135M on {device}")
    axes.margins(x=0.1)
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------
# speed --suite gpu

SHAPES = {
    "LLaMA-2-7B": Config(n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128, n_hidden=11008, vocab_size=32000,
                         block_size=4096, rope_theta=1e4, norm_eps=1e-5, tied=False),
    "Qwen2.5-7B": Config(n_layer=28, n_head=28, n_kv_head=4, n_embd=3584, head_dim=128, n_hidden=18944, vocab_size=152064,
                         block_size=32768, rope_theta=1e6, norm_eps=1e-6, tied=False, qkv_bias=True)}
IDS = SimpleNamespace(encode=list, decode=lambda ids: "", decode_bytes=lambda ids: b"", eos=())  # a tokenizer of nothing but ids


@torch.no_grad()
def random_model(name, config, device):
    """A bf16 model with random weights, made on the device itself."""
    check_gpu(config, device)
    with torch.device("meta"):
        model = LLM(config).bfloat16()
    model.to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for key, p in model.named_parameters():
        p.fill_(1.0) if "norm" in key else p.normal_(std=0.02)
    model.name, model.weights = name, "random weights"
    model.quantize(real=True)
    return model


@torch.no_grad()
def random_priced_policy(model, ids, horizon, targets, costs, overhead):
    """A random scorer around plausible damages, with latency prices for the targets on the tokens `ids`."""
    scorer = Scorer(model.config.n_layer, model.config.n_embd)
    for p in (scorer.gain, scorer.shift, scorer.third.weight, scorer.bias):
        torch.nn.init.normal_(p, std=0.1)
    scorer.bias[..., :3] += torch.tensor([0.3, 0.03, 0.003]).log()  # nats: skip, INT4, INT8
    settings = {"cost": "latency", "overhead": overhead}
    policy = Policy(scorer, [1.0] * model.config.n_layer, costs, model.fingerprint(), horizon=horizon, settings=settings)
    policy.to(ids.device)
    calibrate_prices(policy, model, text_examples(ids[None]), targets, [goal_cost(s, model.config.n_layer, overhead) for s in targets])
    return policy


def speed_of_shape(name, config, device, rounds, bandwidth, context=512, tokens=64, targets=(1.33, 1.67, 2.0)):
    """Everything that is measured for one shape: a dict for results/."""
    model, L = random_model(name, config, device), config.n_layer
    ids = torch.randint(config.vocab_size, (context,), generator=torch.Generator().manual_seed(1))
    half = copy.copy(model)  # the first half of the blocks, to tell what a token takes besides them
    half.config, half._modules, half.engine = replace(config, n_layer=L // 2), dict(model._modules), None
    half.blocks = model.blocks[: L // 2]
    for m in (model, half):  # also on the CPU, where its graphs are direct calls
        m.engine = Engine(m, context + tokens)
    run = lambda policy=None, m=model, **options: generate(m, IDS, ids.tolist(), policy, tokens, **options)

    def step(*args, **options):
        """Median seconds from one token's coming to the next one's."""
        times = []
        run(*args, on_token=lambda *_: times.append(time.perf_counter()), **options)
        return statistics.median(b - a for a, b in zip(times[1:], times[2:]))

    def alternate(contenders):
        for f in contenders.values():
            f()  # captures its graphs
        return median_of(rounds, contenders)

    contenders = {"bf16": step, "half the blocks": lambda: step(None, half), "INT8": lambda: step(Fixed([2] * L)),
                  "INT4": lambda: step(Fixed([1] * L)), "skipped": lambda: step(Fixed([4] + [0] * (L - 2) + [1]))}
    notes = {"gpt-fast": "not installed, so not compared"}
    try:
        theirs = transformers_model(config, device)
        contenders["transformers"] = lambda: transformers_step(theirs, ids.tolist(), tokens)
    except ImportError:
        notes["transformers"] = "not installed, so not compared"
    seconds = alternate(contenders)
    theirs = contenders = None
    ms = {k: 1000 * statistics.median(v) for k, v in seconds.items()}
    overhead = max(0.0, 2 * ms["half the blocks"] - ms["bf16"])
    table = {"4": (ms["bf16"] - overhead) / L, "2": (ms["INT8"] - overhead) / L, "1": (ms["INT4"] - overhead) / L}
    table["0"] = max(1e-6, (ms["skipped"] - overhead - table["4"] - table["1"]) / (L - 2))
    unit = table["4"] / 4
    costs = torch.tensor([table[s] / unit for s in ("0", "1", "2", "4")])

    routed, decisions = [], []
    for horizon in (L, 1):
        policy = random_priced_policy(model, ids.to(device), horizon, targets, costs, (overhead / unit, overhead / unit))
        for target in targets if horizon == L else targets[-1:]:
            policy.at(target)
            states = run(policy)["states"]
            same = torch.equal(states, run(policy, sync=True)["states"])
            known = Fixed(states[:, None], policy.scale)
            values = alternate({"async": lambda: step(policy), "sync": lambda: step(policy, sync=True), "known": lambda: step(known),
                                "full": step})
            if horizon == L:
                decisions += [1000 * (a - b) for a, b in zip(values["async"], values["known"])]
            blocks = sum(float((states[:, context:] == int(s)).float().mean()) * L * t for s, t in table.items())
            routed.append({"horizon": horizon, "speedup_target": target, "measured": ratio(values, "full", "async"), "blocks_ms": blocks,
                           "async / known": ratio(values, "async", "known"), "async / sync": ratio(values, "async", "sync"),
                           "same states": same, "speedup_bits": speedup_bits(states, bit_costs(config))})
    decision = max(0.0, statistics.median(decisions))
    for row in routed:
        row["measured / promised"] = row["measured"] * (overhead + decision + row.pop("blocks_ms")) / ms["bf16"]
    sizes = model.bytes()
    keys = 4 * L * config.n_kv_head * config.head_dim * (context + tokens // 2)  # bytes of the keys and values that a token reads
    read = {"bf16": sizes["4"] + keys, "INT8": sizes["2"] + keys, "INT4": sizes["1"] + keys}
    return {"name": name, "ms": ms, "latency_ms": table | {"overhead": overhead, "decision": decision}, "routed": routed, "notes": notes,
            "share_of_bandwidth": {k: n / 1e6 / bandwidth / ms[k] for k, n in read.items()}, "bytes": sizes,
            "bf16 / transformers": ratio(seconds, "transformers", "bf16") if "transformers" in seconds else None,
            "INT8 / bf16": ratio(seconds, "bf16", "INT8"), "INT4 / bf16": ratio(seconds, "bf16", "INT4"),
            "one token": one_token(lambda f: run(policy, on_token=f))}


def one_token(run):
    """One token's events from PyTorch's profiler: (row, name, start, milliseconds), rows by CUDA stream and "host"."""
    from torch.profiler import ProfilerActivity, profile, record_function

    def mark(*_):
        with record_function("token"):
            pass

    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]) as p:
        run(mark)
    with tempfile.TemporaryDirectory() as folder:
        p.export_chrome_trace(f"{folder}/trace.json")
        events = [e for e in read_json(f"{folder}/trace.json")["traceEvents"] if e.get("ph") == "X"]
    marks = sorted(e["ts"] for e in events if e["name"] == "token" and e.get("cat") == "user_annotation")
    begin, end = marks[-3:-1]
    row = lambda e: "host" if e["cat"] == "cuda_runtime" else f"stream {e['args']['stream']}"
    return [(row(e), e["name"], (e["ts"] - begin) / 1000, e["dur"] / 1000) for e in events
            if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime") and begin <= e["ts"] < end]


def timeline(path, events, title):
    """Streams and host as rows, one token from left to right; the busiest stream is the main one."""
    busy = lambda row: sum(e[3] for e in events if e[0] == row)
    streams = sorted({e[0] for e in events} - {"host"}, key=busy, reverse=True)
    rows = dict(zip(streams, ["main stream", "decision stream", *streams[2:]])) | {"host": "host"}
    figure = Figure(figsize=(12, 3), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        for wait, color in ((False, "tab:blue"), (True, "lightgray")):
            bars = [e[2:] for e in events if e[0] == row and ("Synchronize" in e[1]) == wait]
            axes.broken_barh(bars, (y - 0.4, 0.8), color=color)
    axes.set(xlabel="milliseconds", title=title, yticks=range(len(rows)), yticklabels=rows.values())
    axes.invert_yaxis()
    save_figure(figure, path)


def speed_gpu(args):
    if not torch.cuda.is_available():
        raise ValueError("--suite gpu: PyTorch finds no CUDA device here; run it where there is one")
    device, shapes = pick_device("cuda"), []
    bandwidth = read_bandwidth(device)
    for name, config in SHAPES.items():
        shapes.append(speed_of_shape(name, config, device, args.rounds, bandwidth))
        gc.collect()  # a model and its engine hold each other
        torch.cuda.empty_cache()
    events = [r.pop("one token") for r in shapes][0]
    path = Path(args.results) / "speed-gpu.json"
    caption = (f"Batch 1, 512 tokens of context, 64 new ones, median step, {args.rounds} alternating rounds; a random policy with latency "
               f"prices; memory read at {bandwidth:.0f} GB/s in the same run; every path uses an INT8 head.")
    about = SimpleNamespace(name=" and ".join(SHAPES), weights="shapes with random weights", fingerprint=lambda: None)
    markdown = gpu_table(shapes)
    save_result(path, device, about, args.seed, caption=caption, markdown=markdown, bandwidth_gb_s=bandwidth, shapes=shapes,
                kernels={k if k == "block" else " x ".join(map(str, k)): v for k, v in CHOSEN.items()})
    picture = path.with_name("timeline-gpu.png")
    timeline(picture, events, f"One token, {shapes[0]['name']}, decided one block ahead, {device_name(device)}")
    print(f"{caption}\n\n{markdown}\n\nwrote {path} and {picture}")


def gpu_table(shapes):
    line = lambda what, goal, f: [what, goal, *map(f, shapes)]
    rows = [line(f"{p}, tokens/s (share of the memory bandwidth)", ">= 85%" if p == "bf16" else "",
                 lambda r, p=p: f"{1000 / r['ms'][p]:.1f} ({100 * r['share_of_bandwidth'][p]:.0f}%)") for p in ("bf16", "INT8", "INT4")]
    rows += [line("bf16 / gpt-fast bf16 compiled", ">= 1.0", lambda r: r["notes"]["gpt-fast"]),
             *(line(key, goal, lambda r, key=key: f"{r[key]:.2f}" if r[key] else "not installed") for key, goal in
               (("bf16 / transformers", ">= 3"), ("INT8 / bf16", ">= 1.8"), ("INT4 / bf16", ">= 3.0")))]
    for n, first in enumerate(shapes[0]["routed"]):
        how = f"horizon {'1' if first['horizon'] == 1 else 'L'}, {first['speedup_target']:g}x asked"
        of = lambda key, digits=3, n=n: lambda r: f"{r['routed'][n][key]:.{digits}f}"
        rows += [line(f"routed, async / same states known ahead, {how}", "<= 1.02", of("async / known")),
                 line(f"async / sync, {how}", "< 1", of("async / sync")),
                 line(f"measured speedup, {how}", "", of("measured", 2)),
                 line(f"measured / promised, {how}", "0.95 to 1.05", of("measured / promised"))]
    rows += [line("the same states, async and sync", "all", lambda r: "yes" if all(x["same states"] for x in r["routed"]) else "no"),
             line("weights in all three precisions", "<= 40 GB", lambda r: f"{r['bytes']['all'] / 1e9:.1f} GB")]
    return format_table(["", "goal", *(r["name"] for r in shapes)], rows)


# ----------------------------------------------------------------------------------------------------------
# ablation


@torch.no_grad()
def ablation(args):
    """What single choices are worth: the form of a_i (Eq 7), and the INT8 head of generation."""
    device = pick_device(args.device)
    model, tokenizer = load(args.model, device, torch.float32)
    model.quantize()
    size = min(WINDOW, model.config.block_size)
    train_text, test_text = load_text("pydocs", "train"), load_text("pydocs", "test")
    found = profile(model, windows(tokenizer, train_text, SAMPLES, SAMPLE_TOKENS, spread=True).to(device))
    few = windows(tokenizer, test_text, 1, min(256, size), spread=True).to(device)
    skip = {}
    for name, scale in (("none, a_i = 1", [1.0] * model.config.n_layer), ("least squares", found["least_squares"].tolist()),
                        ("norm ratio", found["norm_ratio"].tolist())):
        damage = sensitivities(model, text_examples(few), scale, states=[0])[1:-1, 0]
        skip[name] = {"mean": damage.mean().item(), "median": damage.median().item(), "worst": damage.max().item()}
    rows = load_examples("pydocs", "test", tokenizer, args.limit or 8, size, device=device)
    [plain] = compare(model, rows, [None], bit_costs(model.config))
    model.head.weight = torch.nn.Parameter(fake_quantize(model.head.weight.detach(), 2))
    [int8] = compare(model, rows, [None], bit_costs(model.config))
    path = Path(args.results) / "ablation.json"
    header = [f"scale a_i of a skipped block (Eq 6-7), {few.numel()} tokens", "KL when one block is skipped: mean over blocks", "median", "worst"]
    markdown = format_table(header,
                            [[name, f"{v['mean']:.3f}", f"{v['median']:.3f}", f"{v['worst']:.2f}"] for name, v in skip.items()])
    markdown += f"\n\nHead of generation, {args.limit or 8} windows: {plain['nats']:.4f} nats with the weights as loaded, {int8['nats']:.4f} in INT8."
    save_result(path, device, model, args.seed, caption="Held-out pydocs.", markdown=markdown, skip_tokens=few.numel(), skip_kl=skip,
                head_nats={"16 bits": plain["nats"], "INT8": int8["nats"]})
    print(f"{markdown}\n\nwrote {path}")


# ----------------------------------------------------------------------------------------------------------
# report


def render(readme, results):
    """The README's text with every part between <!-- NAME --> and <!-- /NAME --> made anew from results/NAME.json."""
    for file in sorted(Path(results).glob("*.json")):
        begin, end, r = f"<!-- {file.stem} -->\n", f"<!-- /{file.stem} -->", read_json(file)
        if begin not in readme or end not in readme:
            raise ValueError(f"README.md has no part between {begin.strip()} and {end}")
        text = f"{r['caption']} {r['model']} ({r['weights']}), {r['device']}, torch {r['torch']}.\n\n{r['markdown']}\n"
        readme = readme[: readme.index(begin) + len(begin)] + text + readme[readme.index(end) :]
    return readme


def report(args):
    text = render(Path("README.md").read_text(encoding="utf-8"), args.results)
    write_whole("README.md", text.encode())
    print("wrote README.md")


def main():
    p = Parser(__doc__)
    p.add_argument("command", nargs="?", default="eval", choices=["eval", "frontier", "speed", "ablation", "report"])
    p.add_argument("--task", default="lm", choices=["lm", "wikitext2", *CHOICE_TASKS, "mc"], help="lm reads --file, or held-out pydocs without it")
    p.add_argument("--file", help="a UTF-8 text file for --task lm, a JSONL of items for --task mc")
    p.add_argument("--data-dir", help="folder with wikitext2/test.txt, arc_easy/test.jsonl and so on")
    p.add_argument("--method", default="dash", choices=METHODS)
    p.add_argument("--speedup", type=float, default=2.0, help="speedup to aim at")
    p.add_argument("--policy", default="out/policy.safetensors", help="for --method dash, frontier and speed")
    p.add_argument("--compare", nargs="*", default=[], help="frontier: more policies, of other objectives, horizons or seeds")
    p.add_argument("--model", default="smollm2")
    p.add_argument("--limit", type=int, help="windows of 1,024 tokens (default 8) or items (default 100) to evaluate, from the start")
    p.add_argument("--rounds", type=int, default=5, help="speed: times that each contender runs, in turn")
    p.add_argument("--suite", default="model", choices=["model", "gpu"], help="speed: of --model here, or of 7B shapes on a GPU")
    p.add_argument("--results", default="results", help="folder to write into")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--json", action="store_true", help="eval: print one JSON object on the last line")
    args = p.parse_args()
    if args.command in ("frontier", "speed", "ablation"):
        make_folder(args.results)  # cannot be written: say so before an hour's work
    {"eval": evaluate, "frontier": frontier, "speed": speed, "ablation": ablation, "report": report}[args.command](args)


if __name__ == "__main__":
    command_line(main)
