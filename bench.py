"""Measure:   python bench.py eval --task lm --method dash --speedup 2.0

    eval    one method on one task: perplexity in windows of the text, the speedup in bits over all tokens of the run, and
            the measured speedup of batch-1 decoding against the full model
    frontier  what is lost at six speedups: random states, the best static plan, the policy; results/frontier.json and .png
    speed   milliseconds per block and state, tokens/s of every path and of the peers installed here, first token, memory,
            bandwidth; writes results/speed-cpu.json, whose latency table `train.py --cost latency` uses, and a bar chart
    ablation  what the form of a_i and the INT8 head are worth; writes results/ablation.json
    report  renders the README's tables from results/

Perplexity uses fp32 and dequantised weights in parallel passes; decoding uses the real kernels (bf16 on the CPU). Both run
the same routed forward.
"""

import json
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import baselines
from data import load_text, read_text, windows
from infer import generate
from model import fetch_smollm2, load, read_gguf, read_json
from policy import (Fixed, Parser, Policy, bit_costs, command_line, device_name, pick_device, save_result, speedup_bits,
                    write_whole)
from quant import fake_quantize
from train import SAMPLE_TOKENS, SAMPLES, compare, profile, save_figure, sensitivities

METHODS = ("full", "int8", "int4", "static_skip", "random_skip", "static_mix", "random_mix", "dash")
WINDOW = 1024  # tokens of an evaluation window


def make_policy(method, model, tokenizer, args, calibration):
    """A policy, or a function of the tokens that gives one (baselines.py), for a method's name."""
    if method == "dash":
        policy = Policy.load(args.policy).to(model.embed.weight.device)
        policy.check(model)
        return policy.at(args.speedup)
    similarity = None
    if method == "static_skip":
        baselines.skips(model.config.n_layer, args.speedup, bit_costs(model.config))  # out of reach: say so before measuring
        similarity = profile(model, windows(tokenizer, calibration, SAMPLES, SAMPLE_TOKENS, spread=True))["similarity"]
    if method == "static_mix":
        policy = Policy.load(args.policy)
        policy.check(model)
        similarity = damage_of(policy, args)
    return getattr(baselines, method)(model.config.n_layer, args.speedup, bit_costs(model.config), similarity, args.seed)


def damage_of(policy, args):
    """The static damage (L, 4) that train.py left in a policy file."""
    if "damage" not in policy.settings:
        raise ValueError(f"{args.policy} has no static damage, which static_mix goes by; train it again with train.py")
    return torch.tensor(policy.settings["damage"])


def codes_of(args, model):
    """The INT4 codes that every method uses: those of the policy at --policy, if it is there and this model's, else nearest."""
    if Path(args.policy).is_file():
        policy = Policy.load(args.policy)
        if policy.fingerprint == model.fingerprint():
            return policy.int4
    return None


def measured_speedup(args, policy, prompt, tokens=24, pairs=3):
    """Decoding speed under the policy over that of the full model, batch 1, real kernels: median of alternating pairs."""
    model, tokenizer = load(args.model, args.device, torch.bfloat16)
    model.quantize(real=True, int4=codes_of(args, model))
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
    if args.task == "wikitext2":
        text, calibration = (load_text("wikitext2", split, args.data_dir) for split in ("test", "train"))
    elif args.file:
        text, calibration = read_text(args.file), load_text("pydocs", "train")
    else:
        text, calibration = load_text("pydocs", "test"), load_text("pydocs", "train")
    model, tokenizer = load(args.model, args.device, torch.float32)
    policy = make_policy(args.method, model, tokenizer, args, calibration)
    rows = windows(tokenizer, text, args.limit or 8, min(WINDOW, model.config.block_size), args.file or args.task).to(args.device)
    model.quantize(int4=codes_of(args, model))
    costs, codes = bit_costs(model.config), model.int4 or "nearest"
    full, row = compare(model, rows, [None, policy], costs)
    del model
    value, value_full = (torch.tensor(r["nats"]).exp().item() for r in (row, full))
    measured = 1.0 if args.method == "full" else measured_speedup(args, policy, text)
    print(f"{args.task}, {args.method}: perplexity {value:.3f} (full model {value_full:.3f}), KL {row['kl']:.4f} nats, "
          f"{row['speedup']:.3f}x in bits, {measured:.2f}x measured; {len(rows)} windows of {rows.shape[1]} tokens, "
          f"INT4 codes: {codes}")
    if args.json:
        print(json.dumps({
            "task": args.task, "method": args.method, "speedup_target": args.speedup, "speedup_bits": row["speedup"],
            "speedup_measured": measured, "metric": "perplexity", "value": value, "value_full": value_full, "kl": row["kl"],
            "top1": row["top1"], "int4": codes, "n": len(rows), "tokens": rows.numel(), "states": row["states"], "device": str(args.device),
            "model": args.model}))


# ----------------------------------------------------------------------------------------------------------
# frontier

SPEEDUPS = (1.67, 2.0, 2.29, 2.67, 3.2, 3.5)


def frontier(args):
    """Nats lost and KL against speedup: random states, the best static plan, the policy; same codes, same states, same K/V."""
    device = pick_device(args.device)
    model, tokenizer = load(args.model, device, torch.float32)
    policy = Policy.load(args.policy).to(device)
    policy.check(model)
    model.quantize(int4=policy.int4)
    task = "wikitext2" if args.data_dir else "pydocs"
    rows = windows(tokenizer, load_text(task, "test", args.data_dir), args.limit or 8, min(WINDOW, model.config.block_size)).to(device)
    L, costs, damage = model.config.n_layer, bit_costs(model.config), damage_of(policy, args)
    contenders, names = [None, baselines.int8(L, 0, costs, None, 0), baselines.int4(L, 0, costs, None, 0)], ["full", "int8", "int4"]
    for speedup in SPEEDUPS:
        names += ["random_mix", "static_mix", "dash"]
        # one price a call: a policy is asked for its own price just before each window
        contenders += [baselines.random_mix(L, speedup, costs, None, args.seed), baselines.static_mix(L, speedup, costs, damage, 0),
                       lambda window, s=speedup: policy.at(s)]
    results = compare(model, rows, contenders, costs)
    targets = [None] * 3 + [s for s in SPEEDUPS for _ in range(3)]
    table = [{"method": n, "target": t} | {k: v for k, v in r.items() if k != "raw"} for n, t, r in zip(names, targets, results)]
    path = Path(args.results) / "frontier.json"
    save_result(path, device, model, args.seed, text=f"{task}, test", tokens=rows.numel(), policy=policy.settings, rows=table)
    frontier_chart(path.with_suffix(".png"), table, task)
    for row in table:
        print(f"{row['method']:12} {row['speedup']:5.2f}x {row['nats'] - table[0]['nats']:+.4f} nats, KL {row['kl']:.4f}")
    print(f"wrote {path} and {path.with_suffix('.png')}")


def frontier_chart(path, table, task):
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for method, color, label in (("random_mix", "tab:gray", "random states"), ("static_mix", "tab:orange", "best static plan"),
                                 ("dash", "tab:blue", "DASH, per token")):
        rows = [r for r in table if r["method"] == method]
        axes.plot([r["speedup"] for r in rows], [r["kl"] for r in rows], marker="o", color=color, label=label)
    for r in table[1:3]:
        axes.plot(r["speedup"], r["kl"], marker="s", color="black", linestyle="none")
        axes.annotate(f"all {r['method'].upper()}", (r["speedup"], r["kl"]), xytext=(-6, 8), textcoords="offset points", ha="right")
    axes.set(xlabel="speedup in bits", ylabel="KL to the full model, nats a token", title=f"What is lost, {task} test text", ylim=(0, None))
    axes.legend()
    save_figure(figure, path)


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


def peers(model, tokenizer, ids, tokens, threads):
    """Decoding with transformers in bf16 and with llama.cpp on its own file, same weights: {name: f -> median seconds a token}."""
    out, missing = {}, []
    path = fetch_smollm2()
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        c = model.config
        config = LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer,
                             num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
                             rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, rms_norm_eps=c.norm_eps,
                             tie_word_embeddings=c.tied)
        theirs = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        theirs.load_state_dict({k: v.bfloat16() for k, v in read_gguf(path)[1].items()}, strict=False)
        prompt = torch.tensor([ids])

        class Clock:  # transformers calls it with every token as it comes
            def put(self, value):
                self.times.append(time.perf_counter())

            def end(self):
                pass

        def run_transformers():
            clock = Clock()
            clock.times = []
            theirs.generate(prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=tokens, max_new_tokens=tokens,
                            do_sample=False, streamer=clock)
            return statistics.median(b - a for a, b in zip(clock.times[1:], clock.times[2:]))

        out["transformers bf16"] = run_transformers
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


def read_bandwidth():
    """GB/s of reading 1 GiB once, the best of 5."""
    big, best = torch.ones(2**28), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        big.sum()
        best = min(best, time.perf_counter() - began)
    return big.numel() * 4 / best / 1e9


def speed(args):
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
            policy.at(target)
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
    bandwidth = read_bandwidth()
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
    save_result(path, device, model, args.seed, **result)
    speed_chart(path.with_suffix(".png"), result, device_name(device))
    print(json.dumps({k: v for k, v in result.items() if k != "policy"}, indent=1))
    print(f"wrote {path} and {path.with_suffix('.png')}")


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
        damage = sensitivities(model, few, scale, states=[0])[1:-1, 0]
        skip[name] = {"mean": damage.mean().item(), "median": damage.median().item(), "worst": damage.max().item()}
    rows = windows(tokenizer, test_text, args.limit or 8, size).to(device)
    [plain] = compare(model, rows, [None], bit_costs(model.config))
    model.head.weight = torch.nn.Parameter(fake_quantize(model.head.weight.detach(), 2))
    [int8] = compare(model, rows, [None], bit_costs(model.config))
    path = Path(args.results) / "ablation.json"
    save_result(path, device, model, args.seed, text="held-out pydocs", skip_tokens=few.numel(), skip_kl=skip,
                head_tokens=rows.numel(), head_nats={"16 bits": plain["nats"], "INT8": int8["nats"]})
    print(json.dumps({"skip_kl": skip, "head_nats": [plain["nats"], int8["nats"]]}, indent=1))
    print(f"wrote {path}")


# ----------------------------------------------------------------------------------------------------------
# report: the README's tables, from results/


def report_train(r):
    yield f"Held-out {r['settings']['data']}, {r['tokens']} tokens, fp32, INT4 by GPTQ, objective {r['settings']['objective']}; {about(r)}; {r['seconds']} s in all."
    yield ""
    yield "| | speedup in bits | nats | lost | KL to full | top-1 agreement | skip / INT4 / INT8 / full |"
    yield "|---|---|---|---|---|---|---|"
    for row in r["rows"]:
        shares = " / ".join(f"{100 * row['states'][s]:.0f}%" for s in ("0", "1", "2", "4"))
        yield (f"| {row['name']} | {row['speedup']:.2f}x | {row['nats']:.4f} | {row['nats'] - r['rows'][0]['nats']:+.4f} | {row['kl']:.4f} | "
               f"{100 * row['top1']:.1f}% | {shares} |")


def report_frontier(r):
    yield f"{r['text']}, {r['tokens']} tokens in windows of 1,024, trained on {r['policy']['data']}, horizon {r['policy']['horizon']}; {about(r)}. Full model {r['rows'][0]['nats']:.4f} nats."
    yield ""
    yield "| speedup in bits | random: nats lost, KL | best static plan | DASH | DASH / static, nats and KL |"
    yield "|---|---|---|---|---|"
    full = r["rows"][0]["nats"]
    cell = lambda row: f"{row['nats'] - full:+.4f}, {row['kl']:.4f} ({row['speedup']:.2f}x)"
    for n in range(3, len(r["rows"]), 3):
        random, static, dash = r["rows"][n : n + 3]
        yield (f"| {random['target']:g}x | {cell(random)} | {cell(static)} | {cell(dash)} | {(dash['nats'] - full) / (static['nats'] - full):.2f}, "
               f"{dash['kl'] / static['kl']:.2f} |")
    for row in r["rows"][1:3]:
        yield f"| all {row['method'].upper()} | | {cell(row)} | | |"


def report_speed(r):
    yield f"Batch 1, prompt of {r['prompt_tokens']} tokens, {r['tokens']} new ones, median step, {r['rounds']} alternating rounds, {r['threads']} threads; {about(r)}."
    yield ""
    yield "| path | tokens/s |"
    yield "|---|---|"
    for name, value in r["tokens_per_second"].items():
        yield f"| {name} | {value:.1f} |"
    yield ""
    yield "| figure | goal | measured |"
    yield "|---|---|---|"
    goals = {"bf16 / transformers bf16": ">= 2.0", "INT4 / llama.cpp Q4_1": ">= 1.0", "INT8 / bf16": ">= 1.6", "INT4 / bf16": ">= 2.4"}
    for name, goal in goals.items():
        value = r["ratios"][name]
        yield f"| {name} | {goal} | {'not installed' if value is None else f'{value:.2f}'} |"
    for row in r["routed"]:
        yield f"| routed / same states known ahead, horizon {row['horizon']}, {row['speedup_target']:g}x asked | {'<= 1.03' if row['horizon'] > 1 else 'reported'} | {row['routed_over_known']:.3f} |"
    for row in r["routed"]:
        if row["horizon"] > 1:
            yield f"| promised / measured at {row['speedup_target']:g}x asked (measured {row['measured']:.2f}x) | 0.95 to 1.05 | {row['promised_over_measured']:.3f} |"
    yield f"| weights in all three precisions / bf16 alone | <= 1.9 | {r['memory']['all precisions / bf16']:.2f} |"
    yield f"| first token of {r['first_token']['prompt_tokens']}, routed at 1.67x / full | <= 1.1 | {r['first_token']['routed / full']:.2f} |"
    ms = r["latency_ms"]
    yield ""
    yield (f"A block takes {ms['4']:.2f} ms in bf16, {ms['2']:.2f} in INT8, {ms['1']:.2f} in INT4, {ms['0']:.2f} skipped; everything else of a "
           f"token {ms['overhead']:.2f} ms, the decisions {ms['decision']:.2f} ms. Reading the weights at the {r['bandwidth_gb_s']:.0f} GB/s "
           f"measured in the same run would allow {1 / r['share_of_bandwidth']['all bf16']:.1f}, {1 / r['share_of_bandwidth']['all INT8']:.1f} and "
           f"{1 / r['share_of_bandwidth']['all INT4']:.1f} times the tokens/s of bf16, INT8 and INT4.")


def report_ablation(r):
    yield f"{r['text']}; {about(r)}."
    yield ""
    yield f"| scale a_i of a skipped block (Eq 6-7), {r['skip_tokens']} tokens | KL when one block is skipped: mean over blocks | median | worst |"
    yield "|---|---|---|---|"
    for name, v in r["skip_kl"].items():
        yield f"| {name} | {v['mean']:.3f} | {v['median']:.3f} | {v['worst']:.2f} |"
    yield ""
    yield (f"Head of generation, {r['head_tokens']} tokens: {r['head_nats']['16 bits']:.4f} nats with the weights as loaded, "
           f"{r['head_nats']['INT8']:.4f} in INT8.")


def about(r):
    return f"{r['model']} ({r['weights']}), {r['device']}, torch {r['torch']}"


REPORTS = {"train": report_train, "frontier": report_frontier, "speed-cpu": report_speed, "ablation": report_ablation}


def render(readme, results):
    """The README's text with every part between <!-- NAME --> and <!-- /NAME --> made anew from results/NAME.json."""
    for name, rows in REPORTS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in readme or end not in readme:
            raise ValueError(f"README.md has no part between {begin.strip()} and {end}")
        text = "\n".join(rows(read_json(Path(results) / f"{name}.json")))
        readme = readme[: readme.index(begin) + len(begin)] + text + "\n" + readme[readme.index(end) :]
    return readme


def report(args):
    text = render(Path("README.md").read_text(encoding="utf-8"), args.results)
    write_whole("README.md", text.encode())
    print("wrote README.md")


def main():
    p = Parser(__doc__)
    p.add_argument("command", nargs="?", default="eval", choices=["eval", "frontier", "speed", "ablation", "report"])
    p.add_argument("--task", default="lm", choices=["lm", "wikitext2"], help="lm reads --file, or held-out pydocs without it")
    p.add_argument("--file", help="a UTF-8 text file for --task lm")
    p.add_argument("--data-dir", help="folder with wikitext2/test.txt and so on")
    p.add_argument("--method", default="dash", choices=METHODS)
    p.add_argument("--speedup", type=float, default=2.0, help="speedup to aim at")
    p.add_argument("--policy", default="out/policy.safetensors", help="for --method dash and for speed")
    p.add_argument("--model", default="smollm2")
    p.add_argument("--limit", type=int, help="windows of 1,024 tokens to evaluate, from the start (default 8)")
    p.add_argument("--rounds", type=int, default=5, help="speed: times that each contender runs, in turn")
    p.add_argument("--results", default="results", help="speed: folder to write into")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--json", action="store_true", help="eval: print one JSON object on the last line")
    args = p.parse_args()
    {"eval": evaluate, "frontier": frontier, "speed": speed, "ablation": ablation, "report": report}[args.command](args)


if __name__ == "__main__":
    command_line(main)
