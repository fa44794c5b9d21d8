"""Measure:   python bench.py eval --task lm --method dash --speedup 2.0

    eval      one method on one task: perplexity in windows of a text, accuracy on multiple-choice items or Rouge-L of summaries,
              the speedup in bits over all tokens of the run, and the measured speedup of batch-1 decoding against the full model
    table     the paper's Tables 1-2: every method at every speedup on every task, or on --task; results/table-TASK.json and .png.
              A policy a task, as in the paper: --policy 'out-{task}/policy.safetensors'
    frontier  what is lost at six speedups: random states, the best static plan, a plan by position, the policy and those given
              by --compare; and whether decoding keeps to its budget; on wikitext2 with --data-dir, else on pydocs;
              results/frontier-TASK.json and .png
    speed     milliseconds per block and state, tokens/s of every path and of the peers installed here, first token, memory,
              bandwidth; writes results/speed-cpu.json, whose latency table `train.py --cost latency` uses, and a bar chart.
              --suite gpu: the CUDA engine on 7B shapes with random weights, against the bandwidth, the same states known ahead
              and transformers; writes results/speed-gpu.json and a picture of one token's timeline
    ablation  the paper's Table 3 and ours: states, K/V modes, forms of a_i, the INT8 head, and the policies given by --compare
              (other horizons; lam, beta, w_i off); results/ablation.json
    figures   the paper's Figures 1, 2 and 4: results/figure1.json, figure2.json, figure4.json, and a .png of each
    transfer  its Figure 5: policies trained on each task (--policy as for table), tested on each; results/transfer.json and .png
    report    puts the tables of results/ into the README

Perplexity and accuracy use fp32 and dequantised weights in parallel passes; decoding uses the real kernels (bf16 on the CPU).
Both run the same routed forward. The paper's own numbers, shown beside ours, are in paper.json.
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
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import baselines
from baselines import bootstrap, compare
from data import CHOICE_TASKS, kl, load_articles, load_examples, load_text, outcomes, text_examples, windows
from infer import Engine, generate
from model import LLM, Config, KVCache, check_gpu, fetch_smollm2, load, read_gguf, read_json
from policy import (Fixed, Parser, Policy, Scorer, bit_costs, command_line, device_name, format_table, goal_cost, make_folder, mean_cost,
                    most_speedup, pick_device, save_result, speedup_bits, state_shares, write_whole)
from quant import CHOSEN, fake_quantize
from train import SAMPLE_TOKENS, SAMPLES, SHADES, calibrate_prices, profile, save_figure, sensitivities

SKIPS = ("static_skip", "unified_skip", "early_exit", "confident_exit", "skipdecode", "adaskip", "random_skip")
METHODS = ("full", "int8", "int4", *SKIPS, "static_mix", "position_mix", "random_mix", "dash")
TEXTS = ("lm", "wikitext2", "cnn_dm")  # tasks that are text; the others are multiple choice
WINDOW = 1024  # tokens of an evaluation window


def policy_path(args, task):
    return args.policy.replace("{task}", task.removesuffix("_5shot"))


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
    known = baselines.Known(model.config.n_layer, bit_costs(model.config), seed, config=model.config)
    if policy:
        known.scale = policy.scale
        for name in ("damage", "position_damage"):
            if name in policy.settings:
                setattr(known, name, torch.tensor(policy.settings[name]))
    return known


def make_policy(method, speedup, known, model, policy, path):
    """What `LLM.forward` takes, or a function of the tokens that gives it, for a method's name; measures what it has to go by."""
    top = most_speedup(known.L, bit_costs(model.config))
    if method not in ("full", "int8", "int4") and not 1 <= speedup <= top:
        raise ValueError(f"--speedup {speedup:g} is out of reach: give 1 to {top:.2f}")
    if method in ("dash", "position_mix") and policy is None:
        read_policy(path, model, True)  # says why there is none
    if method == "dash":
        return copy.copy(policy).at(speedup, track=True)
    if method == "position_mix" and known.position_damage is None:
        raise ValueError(f"{path} has no position_damage, which {method} goes by; train it again with train.py --objective fisher")
    if method in SKIPS and known.similarity is None:
        baselines.observe(known, model)
    if method == "static_mix" and known.damage is None:
        known.scale = profile(model, known.samples)["norm_ratio"].tolist()
        known.damage = sensitivities(model, text_examples(known.samples[:4]), known.scale)
    return getattr(baselines, method)(known, speedup)


def with_kv(policy, kv):
    """A policy, or a function that gives one, with another way to keep the keys and values of skipped tokens."""
    if callable(policy):
        return lambda tokens: with_kv(policy(tokens), kv)
    policy.kv = kv
    return policy


def measured_speedup(model, tokenizer, policy, prompt, tokens=48, pairs=3):
    """Decoding speed under the policy over that of the full model, batch 1, real kernels: median of alternating pairs."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.eos = ()  # every run makes all its tokens: one that ended at once would time the prompt
    ratios = []
    routed = policy(torch.zeros(1, len(tokenizer.encode(prompt, add_special_tokens=True)) + tokens)) if callable(policy) else policy
    for _ in range(pairs):
        speeds = [generate(model, tokenizer, prompt, p, tokens)["tokens_per_second"] for p in (routed, None)]
        ratios.append(speeds[0] / speeds[1])
    return statistics.median(ratios)


ARTICLE, SUMMARY = 768, 64  # tokens of an article that are read, and of its summary


def rouge():
    """f(reference, text) -> F measure of Rouge-L (Lin 2004), by the rouge-score package, 0 to 1."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("cnn_dm is scored with the rouge-score package, which is not installed: pip install rouge-score") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda reference, text: scorer.score(reference, text)["rougeL"].fmeasure


def summaries(model, tokenizer, articles, policies):
    """Rouge-L of greedy summaries under every policy: rows as `compare` makes them. A chat model is asked, any other sees TL;DR:."""
    score, chat, rows = rouge(), bool(tokenizer.chat_template), []
    room = min(ARTICLE, model.config.block_size - SUMMARY - 100)
    for policy in tqdm(policies, desc="summaries", leave=False):
        each, states = [], []
        for article in articles:
            text = tokenizer.decode(tokenizer.encode(article["article"])[:room])
            prompt = f"Summarize this article in three sentences.\n\n{text}" if chat else f"{text}\n\nTL;DR:"
            ids = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt, add_special_tokens=True)
            routed = policy(torch.zeros(1, len(ids) + SUMMARY)) if callable(policy) else policy
            out = generate(model, tokenizer, prompt, routed, SUMMARY, chat=chat)
            each.append(round(score(article["highlights"], out["text"]), 6))
            states.append(out["states"])
        states = torch.cat(states, 1)
        rows.append({"each": {"rougeL": each}, "rougeL": sum(each) / len(each), "states": state_shares(states), "tokens": states.shape[1],
                     "speedup": speedup_bits(states, bit_costs(model.config, None if policy is None else routed))})
    return rows


METRICS = {"perplexity": ("nats", lambda v: v.mean(-1).exp()), "accuracy": ("accuracy", lambda v: v.mean(-1)),
           "Rouge-L": ("rougeL", lambda v: v.mean(-1))}  # name: what of an example, and how it is summed up


def at_hand(args, task, default, path, needed=True):
    """What a comparison starts from: (fp32 model with the policy's INT4 codes, tokenizer, [policy in `path`, those of --compare], `Known`,
    test examples: --limit, all with --full, or the default number). The policy is None if it is not needed and not there."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: at least 1")
    if task == "mc" and not args.file:
        raise ValueError('--task mc needs --file with lines of {"question", "choices": [text, ...], "answer": index}')
    choice, device = task not in TEXTS, pick_device(args.device)
    name, split, folder = (args.file, None, None) if args.file else ("pydocs" if task == "lm" else task, "test", args.data_dir)
    load_text(name, split, folder, choice)  # not there, or no text: say so before anything is loaded
    text = load_text("pydocs", "train") if args.file or task == "lm" else load_text(task, "train", args.data_dir)
    model, tokenizer = load(args.model, device, torch.float32)
    policies = [read_policy(path, model, needed), *(read_policy(other, model, True) for other in args.compare)]
    int4 = policies[0].int4 if policies[0] else None
    for other, policy in zip(args.compare, policies[1:]):
        if policy.int4 != int4:
            raise ValueError(f"{other} has other INT4 codes than {path}; train both on the same data")
    model.quantize(int4=int4)
    known, context = known_of(model, policies[0], args.seed), model.config.block_size
    known.samples = windows(tokenizer, text, SAMPLES, min(SAMPLE_TOKENS, context), spread=True).to(device)
    limit, size = args.limit or (10**6 if args.full else default), context if choice else min(WINDOW, context)
    return model, tokenizer, policies, known, load_examples(name, split, tokenizer, limit, size, folder, device, choice=choice)


@torch.no_grad()
def rank(args, task, asked, default, timed=True):
    """Methods on a task: [(method, speedup)] -> (metric, one row for the full model and one for each asked, model, facts to report).

    A row has "value", "interval" (95%, bootstrap over examples), "speedup" in bits, "measured" if timed; or "missing", why not.
    """
    if task == "cnn_dm":
        rouge()
    path, metric = policy_path(args, task), "Rouge-L" if task == "cnn_dm" else "perplexity" if task in TEXTS else "accuracy"
    model, tokenizer, [policy, *_], known, examples = at_hand(args, task, default, path, needed=False)
    rows, policies = [{"method": "full model", "target": 1.0}], [None]
    for method, speedup in asked:
        rows.append({"method": method, "target": speedup})
        try:
            routed = make_policy(method, speedup, known, model, policy, path)
            policies.append(with_kv(routed, args.kv) if args.kv else routed)
        except (ValueError, FileNotFoundError) as e:
            if len(asked) == 1:
                raise
            rows[-1]["missing"] = str(e)
    prompt, int4 = tokenizer.decode(examples[0].rows[0, :32]), policy.int4 if policy else None
    found = compare(model, examples, policies) if task != "cnn_dm" else None
    if timed:
        del model
        model, tokenizer = load(args.model, pick_device(args.device), torch.bfloat16)
        model.quantize(real=True, int4=int4)
    if task == "cnn_dm":
        examples = load_articles(task, "test", args.data_dir)[: args.limit or (None if args.full else default)]
        found = summaries(model, tokenizer, examples, policies)
    key, statistic = METRICS[metric]
    for row, new, routed in zip((r for r in rows if "missing" not in r), found, policies):
        row |= {k: v for k, v in new.items() if k != "raw"}
        each = row["each"][key]
        row |= {"value": statistic(torch.tensor(each, dtype=torch.float64)).item(), "interval": bootstrap(statistic, each)}
        if timed:
            row["measured"] = 1.0 if row["method"].startswith("full") else measured_speedup(model, tokenizer, routed, prompt)
    tokens = found[0]["tokens"] if task == "cnn_dm" else sum(sum(e.lengths) for e in examples)
    return metric, rows, model, {"n": len(examples), "tokens": tokens, "int4": int4 or "nearest", "policy": path if policy else None}


def publish(args, name, model, figure, **content):
    """Write results/NAME.json and, if there is a figure, NAME.png; print the table."""
    path = Path(args.results) / f"{name}.json"
    save_result(path, model.embed.weight.device, model, args.seed, **content)
    if figure:
        save_figure(figure, path.with_suffix(".png"))
    print(f"{content['caption']}\n\n{content['markdown']}\n\nwrote {path}{f' and {path.stem}.png' if figure else ''}\n", flush=True)


def evaluate(args):
    task = args.task or "lm"
    metric, (full, row), _, facts = rank(args, task, [(args.method, args.speedup)], 8 if task in TEXTS else 100)
    unit, (low, high) = {"perplexity": "windows", "accuracy": "items", "Rouge-L": "articles"}[metric], row["interval"]
    distance = f"KL {row['kl']:.4f} nats, " if "kl" in row else ""
    print(f"{task}, {args.method}: {metric} {row['value']:.3f} [{low:.3f}, {high:.3f}] (full model {full['value']:.3f}), {distance}"
          f"{row['speedup']:.3f}x in bits, {row['measured']:.2f}x measured; {facts['n']} {unit}, {facts['tokens']} tokens, "
          f"INT4 codes: {facts['int4']}")
    if args.json:
        print(json.dumps({
            "task": task, "method": args.method, "speedup_target": args.speedup, "speedup_bits": row["speedup"],
            "speedup_measured": row["measured"], "metric": metric, "value": row["value"], "value_full": full["value"],
            "interval": row["interval"], "int4": facts["int4"], "n": facts["n"], "tokens": facts["tokens"],
            "device": str(pick_device(args.device)), "model": args.model} | {k: row[k] for k in ("kl", "top1", "states") if k in row}))


# ----------------------------------------------------------------------------------------------------------
# table

TASKS = {"wikitext2": 4, "cnn_dm": 4, "mmlu": 24, "mmlu_5shot": 5, "arc_challenge": 20, "arc_easy": 20}  # examples without --full
PAPERS = {"wikitext2": "wikitext2_ppl", "cnn_dm": "cnn_dm_rougeL", "mmlu": "mmlu_acc", "mmlu_5shot": "mmlu_acc",
          "arc_challenge": "arc_c_acc"}  # what paper.json calls a task
ASKED = (1.33, 1.67, 2.0)


def table(args):
    for task in [args.task] if args.task else TASKS:
        asked = [(m, s) for m in SKIPS for s in ASKED] + [("int8", 1.0), ("int4", 1.0)]
        asked += [(m, s) for m in ("static_mix", "dash") for s in (*ASKED, 2.67, 3.2)]
        metric, rows, model, facts = rank(args, task, asked, TASKS.get(task, 4), timed=task in TEXTS)
        header, cells = table_cells(rows, metric)
        markdown = "\n\n".join([format_table(header, cells), *paper_tables(PAPERS.get(task))])
        trained = facts["policy"] or f"none, make {policy_path(args, task)} with python train.py --data {task} --data-dir DIR"
        how = "in bits and measured in batch-1 decoding" if "measured" in rows[0] else "in bits"
        caption = (f"{task}, test, n = {facts['n']} ({facts['tokens']} tokens): {metric}{'' if metric == 'perplexity' else ', %'} [95% interval] "
                   f"(speedup {how}). INT4 codes: {facts['int4']}; dash: {trained}.")
        publish(args, f"table-{task}", model, table_chart(rows, task, metric), caption=caption, markdown=markdown, metric=metric, rows=rows,
                **facts)


def table_cells(rows, metric):
    """A row a method, a column a speedup; a method with one speedup of its own stands in the last column that it reaches."""
    speedups, unit = sorted({r["target"] for r in rows} - {1.0}), 1 if metric == "perplexity" else 100

    def cell(r):
        if "missing" in r:
            return "can't reach" if "out of reach" in r["missing"] else "no policy"
        value, low, high = (f"{unit * v:.4g}" for v in (r["value"], *r["interval"]))
        return f"{value} [{low}, {high}] ({r['speedup']:.2f}x{', %.2fx' % r['measured'] if 'measured' in r else ''})"

    cells = []
    for method in dict.fromkeys(r["method"] for r in rows):
        line = {r["target"]: cell(r) for r in rows if r["method"] == method}
        if 1.0 in line:  # asked for no speedup
            own = next(r["speedup"] for r in rows if r["method"] == method)
            place = max((s for s in speedups if s <= own), default=speedups[0])
            line = {s: "can't reach" if s > own else "" for s in speedups} | {place: line[1.0]} if own > 1 else {place: line[1.0]}
        cells.append([method, *(line.get(s, "") for s in speedups)])
    return ["", *(f"{s:g}x" for s in speedups)], cells


def paper_tables(key):
    """The paper's numbers for a task, one table a model, or none."""
    paper, out = read_json(Path(__file__).with_name("paper.json")), []
    for model, tasks in paper["tables"].items():
        if key in tasks:
            full, *rest = tasks[key].items()
            header, first = [f"the paper's numbers, {model}", *paper["speedups"]], ["full model", full[1], "", ""]
            out.append(format_table(header, [first, *([method, *values] for method, values in rest)]))
    return out


def table_chart(rows, task, metric):
    """The frontier: quality against measured time (against bits where nothing is decoded), a line a method."""
    x = "measured" if "measured" in rows[0] else "speedup"
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, colors = figure.subplots(), iter("tab:" + c for c in "gray olive cyan pink purple brown green red blue".split())
    axes.axhline(rows[0]["value"], color="black", linestyle=":", linewidth=1)
    axes.annotate("full model", (1, rows[0]["value"]), xytext=(4, 4), textcoords="offset points")
    there = [r for r in rows[1:] if "missing" not in r]
    for method in dict.fromkeys(r["method"] for r in there):
        points = sorted((r[x], r["value"]) for r in there if r["method"] == method)
        if method in ("int8", "int4"):
            axes.plot(*points[0], marker="s", color="black")
            axes.annotate(method.upper(), points[0], xytext=(6, -12), textcoords="offset points")
        else:
            axes.plot(*zip(*points), marker="o", markersize=5, color=next(colors), linewidth=2.5 if method == "dash" else 1.2, label=method)
    axes.set(xlabel="measured speedup of batch-1 decoding" if x == "measured" else "speedup in bits", ylabel=metric,
             title=f"{task}, test", yscale="log" if metric == "perplexity" else "linear")
    axes.legend()
    return figure


# ----------------------------------------------------------------------------------------------------------
# frontier

SPEEDUPS = (2.0, 2.29, 2.67, 3.2, 4.0, 4.5)


def name_of(policy):
    s = policy.settings
    kind = "dash" if s["objective"] == "fisher" else "rl from fisher" if s.get("start") else "rl"
    off = [f", without {name}" for name, key in (("lam", "lam"), ("beta", "beta"), ("w_i", "weights")) if s.get(key, 1) == 0]
    return f"{kind}, horizon {policy.horizon}, seed {s['seed']}{''.join(off)}"


@torch.no_grad()
def frontier(args):
    """Nats lost and KL against speedup; same INT4 codes, same states, same keys and values, same a_i."""
    task = "wikitext2" if args.data_dir else "pydocs"
    model, tokenizer, policies, known, examples = at_hand(args, task.replace("pydocs", "lm"), 8, args.policy)
    policy, device, size = policies[0], known.samples.device, min(WINDOW, model.config.block_size)
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
            for (name, s), r in zip(about, compare(model, examples, contenders))]
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
    publish(args, f"frontier-{task}", model, frontier_chart(rows, task), caption=caption, markdown=markdown, tokens=tokens, budget=kept,
            rows=rows, policy={k: v for k, v in policy.settings.items() if "damage" not in k})


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


def frontier_chart(rows, task):
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
    return figure


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
    caption = (f"Batch 1, prompt of 64 tokens, {tokens} new ones, median step, {args.rounds} alternating rounds, {threads} threads; the policy "
               f"was trained for --cost {policy.settings.get('cost', 'bits')}.")
    publish(args, f"speed-{device.type}", model, speed_chart(result, device_name(device)), caption=caption, markdown=speed_tables(result),
            **result)


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


def speed_chart(result, device):
    rows = sorted(result["tokens_per_second"].items(), key=lambda row: row[1])
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    ours = ["tab:blue" if name.startswith("all ") else "tab:gray" for name, _ in rows]
    bars = axes.barh([name for name, _ in rows], [v for _, v in rows], color=ours)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set(xlabel="tokens/s, batch 1", title=f"Decoding SmolLM2-135M on {device}")
    axes.margins(x=0.1)
    return figure


# ----------------------------------------------------------------------------------------------------------
# speed --suite gpu

SHAPES = {
    "LLaMA-2-7B": Config(n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128, n_hidden=11008, vocab_size=32000,
                         block_size=4096, rope_theta=1e4, norm_eps=1e-5, tied=False),
    "Qwen2.5-7B": Config(n_layer=28, n_head=28, n_kv_head=4, n_embd=3584, head_dim=128, n_hidden=18944, vocab_size=152064,
                         block_size=32768, rope_theta=1e6, norm_eps=1e-6, tied=False, qkv_bias=True)}
# a tokenizer of nothing but ids
IDS = SimpleNamespace(encode=lambda ids, **_: list(ids), decode=lambda ids: "", decode_bytes=lambda ids: b"", eos=())


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
# ablation, figures, transfer


def variant(policy, model, examples, speedups, **change):
    """Copies of a policy with other attributes, one a speedup, each priced to cost on these examples what is asked."""
    policy = copy.copy(policy)
    for name, value in change.items():
        setattr(policy, name, value)
    policy.costs = bit_costs(model.config, policy).to(policy.costs.device)
    calibrate_prices(policy, model, examples, speedups, [4 / s for s in speedups])
    return [copy.copy(policy).at(s) for s in speedups]


@torch.no_grad()
def ablation(args):
    """What single choices are worth: the paper's Table 3, K/V modes, horizons and rewards, the form of a_i (Eq 7), the INT8 head."""
    task = args.task or "lm"
    model, tokenizer, policies, known, examples = at_hand(args, task, TASKS.get(task, 4), args.policy)
    policy, ones, forms = policies[0], [1.0] * known.L, profile(model, known.samples)
    baselines.observe(known, model)
    choice = examples[0].choices is not None
    of = lambda policy=policy, **change: variant(policy, model, examples, ASKED, **change)
    table = {"naive static skipping": [baselines.static_skip(known, s) for s in ASKED],
             "dynamic, states 0 and 4, a_i = 1": of(allowed=(0, 4), scale=ones),
             "+ scale a_i (norm ratio), K/V filled": of(allowed=(0, 4)), "+ INT8": of(allowed=(0, 2, 4)), f"+ INT4, {name_of(policy)}": of()}
    table |= {"states 0 and 4, least-squares a_i": of(allowed=(0, 4), scale=forms["least_squares"].tolist()),
              "states 0 and 4, K/V copied": of(allowed=(0, 4), kv="copy"), "states 0 and 4, no K/V": of(allowed=(0, 4), kv="none")}
    table |= {name_of(p): of(p) for p in policies[1:]}
    full, *found = compare(model, examples, [None, *(p for row in table.values() for p in row)])
    key, unit = ("accuracy", 100) if choice else ("nats", 1)
    rows = [{"name": name, "target": s} | {k: v for k, v in r.items() if k != "raw"}
            for (name, s), r in zip([(name, s) for name in table for s in ASKED], found)]

    def cell(r):
        low, high = bootstrap(lambda a, b: (a - b).mean(1), r["each"][key], full["each"][key])
        return f"{unit * (r[key] - full[key]):+.3g} [{unit * low:+.3g}, {unit * high:+.3g}] ({r['speedup']:.2f}x)"

    few = windows(tokenizer, load_text("pydocs", "test"), 1, min(256, model.config.block_size), spread=True).to(known.samples.device)
    skip, least = {}, forms["least_squares"].tolist()
    for name, scale in (("none, a_i = 1", ones), ("least squares", least), ("norm ratio", forms["norm_ratio"].tolist())):
        damage = sensitivities(model, text_examples(few), scale, states=[0])[1:-1, 0]
        skip[name] = {"mean": damage.mean().item(), "median": damage.median().item(), "worst": damage.max().item()}
    model.head.weight = torch.nn.Parameter(fake_quantize(model.head.weight.detach(), 2))
    [int8] = compare(model, examples, [None])
    markdown = "\n\n".join([
        format_table(["", *(f"{s:g}x" for s in ASKED)], [[name, *(cell(r) for r in rows if r["name"] == name)] for name in table]),
        *paper_tables("ablation"),
        format_table([f"scale a_i of a skipped block (Eq 6-7), {few.numel()} tokens of pydocs", "KL when one block is skipped: mean over blocks",
                      "median", "worst"], [[name, f"{v['mean']:.3f}", f"{v['median']:.3f}", f"{v['worst']:.2f}"] for name, v in skip.items()]),
        f"Head of generation: {full['nats']:.4f} nats with the weights as loaded, {int8['nats']:.4f} in INT8."])
    caption = (f"{task}, test, n = {len(examples)}: change of {'accuracy, points' if choice else 'nats'} against the full model "
               f"({unit * full[key]:.4g}) [95% interval] (speedup in bits). One scorer, restricted to the states named and priced to cost on "
               "this text what the column asks.")
    publish(args, "ablation", model, None, caption=caption, markdown=markdown, rows=rows, n=len(examples), skip_tokens=few.numel(),
            skip_kl=skip, head_nats={"16 bits": full["nats"], "INT8": int8["nats"]})


@torch.no_grad()
def figures(args):
    """The paper's Figures 1, 2 and 4 on test text; the accuracy of Figure 1 on items of --task."""
    task = args.task or "arc_easy"
    if task in TEXTS:
        raise ValueError(f"figures --task {task}: Figure 1 counts right answers; give a multiple-choice task")
    model, tokenizer, policies, known, items = at_hand(args, task, 60, args.policy)
    baselines.observe(known, model)
    source = ("wikitext2", "test", args.data_dir) if args.data_dir and (Path(args.data_dir) / "wikitext2").exists() else ("pydocs", "test")
    size = min(256, model.config.block_size)
    rows = windows(tokenizer, load_text(*source), 32 if args.full else 8, size, spread=True).to(known.samples.device)
    x, rope, h = model.embed(rows).flatten(0, 1), model.rope(0, rows.shape[1]), []
    for block in model.blocks:
        h.append(x)
        x = block(x, len(rows), [(4, None)], 1.0, rope)
    h = torch.stack([t.view(*rows.shape, -1)[:, 1:].flatten(0, 1) for t in [*h, x]])  # (L + 1, N, C), without first tokens
    similarity = F.cosine_similarity(h[:-1], h[1:], dim=-1).cpu()  # (L, N)
    what = f"{source[0]}, test, {similarity.shape[1]} tokens"
    figure1(args, model, known, h, similarity, items, f"{what}; accuracy on {task}, n = {len(items)}, 95% intervals")
    figure2(args, model, known, rows, similarity, what)
    figure4(args, model, policies, rows, similarity, what)


def figure1(args, model, known, h, similarity, items, what):
    """Blocks that change little, and what skipping them costs."""
    L, order, unit = known.L, baselines.by_similarity(known), F.normalize(h, dim=-1)
    pairs = torch.stack([(unit * one).sum(-1).mean(1) for one in unit]).cpu()
    counts = range(min(9, L - 1))
    each = [r["each"]["accuracy"] for r in compare(model, items, [baselines.without(known, order[:n]) for n in counts])]
    right, spans = [sum(e) / len(e) for e in each], [bootstrap(lambda v: v.mean(1), e) for e in each]
    figure, blocks = Figure(figsize=(15, 4), layout="constrained"), range(1, L + 1)
    a, b, c = figure.subplots(1, 3)
    a.plot(blocks, similarity.mean(1), marker="o", markersize=3)
    a.fill_between(blocks, *(torch.stack([one.quantile(q) for one in similarity]) for q in (0.1, 0.9)), alpha=0.2)
    a.set(xlabel="block i", ylabel="cosine of $h_{i-1}$ and $h_i$", title="Input and output of a block: mean, 10% to 90%")
    figure.colorbar(b.imshow(pairs, origin="lower", vmin=0), ax=b)
    b.set(xlabel="j", ylabel="i", title="Cosine of $h_i$ and $h_j$; adjacent blocks beside the diagonal")
    c.errorbar(counts, right, [[v - s[0] for v, s in zip(right, spans)], [s[1] - v for v, s in zip(right, spans)]], marker="o", capsize=3)
    c.set(xlabel="most similar blocks skipped", ylabel="accuracy", title=f"{len(items)} items")
    beyond = next((i for i in blocks if (similarity.mean(1)[i - 1 :] > 0.9).all()), None)
    cells = [[n, order[n - 1] + 1 if n else "", f"{100 * v:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
             for n, v, (low, high) in zip(counts, right, spans)]
    markdown = format_table(["blocks skipped", "the last of them", "accuracy, %"], cells) + (
        f"\n\nInput and output are more similar than 0.9 {f'from block {beyond} on' if beyond else 'not even in the last block'}.")
    publish(args, "figure1", model, figure, caption=f"The paper's Figure 1. {what}.", markdown=markdown,
            similarity=similarity.mean(1).tolist(), pairs=pairs.tolist(), accuracy=right)


def figure2(args, model, known, rows, similarity, what):
    """Is a token safe to skip where its similarity is high? Next tokens with the most similar tenth of the blocks skipped."""
    skipped, kind = baselines.by_similarity(known)[: max(1, known.L // 10)], []
    for row in rows[:, None]:
        ours, theirs = (model(row, p)[0, 1:-1].argmax(-1) for p in (baselines.without(known, skipped), None))
        kind.append(torch.where(ours == theirs, 0, torch.where(ours == row[0, 2:], 2, 1)))
    kind, of_tokens = torch.cat(kind).cpu(), similarity.view(known.L, len(rows), -1)[:, :, :-1].flatten(1)
    figure, cells = Figure(figsize=(8, 4), layout="constrained"), []
    axes = figure.subplots()
    for k, name in enumerate(("agrees", "disagrees", "differs, and is right")):
        here = of_tokens[:, kind == k]
        if here.shape[1]:
            axes.plot(range(1, known.L + 1), here.mean(1), marker="o", markersize=3, label=name)
            low, high = bootstrap(lambda v: v.mean(1), here[skipped].mean(0).tolist(), draws=500)
            cells.append([name, here.shape[1], f"{here.mean():.4f}", f"{here[skipped].mean():.4f} [{low:.4f}, {high:.4f}]"])
    axes.set(xlabel="block", ylabel="cosine of input and output", title=f"Tokens by what is predicted without {len(skipped)} blocks")
    axes.legend()
    header = ["next token, against the full model's", "tokens", "similarity, all blocks", "of the skipped blocks [95% interval]"]
    caption = f"The paper's Figure 2. {what}; without blocks {', '.join(str(i + 1) for i in sorted(skipped))}."
    publish(args, "figure2", model, figure, caption=caption, markdown=format_table(header, cells))


def figure4(args, model, policies, rows, similarity, what):
    """States against similarity at three speeds, and how early in the model a policy dares to skip."""
    policy, decided = policies[0], similarity[1:].flatten()
    speedups = [s for s in (2.0, 2.67, 4.0) if policy.prices[0][0] <= s <= policy.prices[-1][0]]
    figure, cells, early = Figure(figsize=(5 * len(speedups) + 5, 4), layout="constrained"), [], []
    *panels, last = figure.subplots(1, len(speedups) + 1, squeeze=False)[0]
    tenth = torch.empty(len(decided), dtype=torch.int64)
    tenth[decided.argsort()] = torch.arange(len(decided)) * 10 // len(decided)
    for speedup, axes in zip(speedups, panels):
        model.hidden(rows, policy.at(speedup))
        states, bottom, cell = policy.states[1:, :, 1:].flatten().cpu(), torch.zeros(10), {}
        for s, label, color in SHADES:
            share = torch.stack([(states[tenth == k] == s).float().mean() for k in range(10)])
            axes.bar(range(1, 11), share, bottom=bottom, width=1.0, label=label, color=color, edgecolor="white")
            bottom += share
            here = states == s
            cell[label] = f"{decided[here].mean():.3f} ({100 * here.float().mean():.0f}%)" if here.any() else ""
        axes.set(xlabel="tenth of (block, token) by similarity", ylabel="share of states", title=f"{speedup:g}x")
        axes.legend(loc="lower left")
        cells.append([f"{speedup:g}x", *cell.values()])
    for p in policies:
        [p] = variant(p, model, text_examples(rows), [1.33], allowed=(0, 4))
        model.hidden(rows, p)
        rate = (p.states == 0).float().mean((1, 2)).tolist()
        last.plot(range(1, len(rate) + 1), rate, marker="o", markersize=3, label=name_of(p))
        early.append([name_of(p), *(f"{100 * v:.0f}%" for v in rate[1:9])])
    last.set(xlabel="block", ylabel="share of tokens that skip it", title="States 0 and 4 only, 1.33x")
    last.legend()
    markdown = "\n\n".join([
        format_table(["mean similarity of what runs in (share)", *(label for _, label, _ in SHADES)], cells),
        format_table(["skip rate, states 0 and 4 only, 1.33x; block", *range(2, len(early[0]) + 1)], early)])
    caption = (f"The paper's Figure 4. {what}; similarities are the full model's. Horizon 0 decides a block from its own input, 1 from the "
               "input of the block before (the paper).")
    publish(args, "figure4", model, figure, caption=caption, markdown=markdown)


@torch.no_grad()
def transfer(args):
    """The paper's Figure 5: a policy trained on each task, tested on each, by KL to the full model."""
    tasks = [t for t in TASKS if t != "mmlu_5shot"]
    files = {t: policy_path(args, t) for t in tasks}
    there = {t: f for t, f in files.items() if Path(f).is_file()}
    if len(set(files.values())) < len(files) or not there:
        raise ValueError(f"transfer needs a policy a task: python train.py --data TASK --data-dir DIR --out out-TASK, then --policy "
                         f"'out-{{task}}/policy.safetensors' (given: {args.policy})")
    found, cells, sizes = {}, [], {}
    for trained, file in there.items():
        found[trained] = {}
        for tested in tqdm(tasks, desc=trained):
            model, _, [policy, *_], _, examples = at_hand(args, tested, TASKS[tested], file)
            full, row = compare(model, examples, [None, *variant(policy, model, examples, [args.speedup])])
            key, unit = ("nats", 1) if tested in TEXTS else ("accuracy", 100)
            found[trained][tested] = {"kl": row["kl"], "interval": bootstrap(lambda v: v.mean(1), row["each"]["kl"]),
                                      "speedup": row["speedup"], "change": unit * (row[key] - full[key])}
            sizes[tested] = len(examples)
        cells.append([trained, *(f"{r['kl']:.4f} [{r['interval'][0]:.4f}, {r['interval'][1]:.4f}], {r['change']:+.3g} ({r['speedup']:.2f}x)"
                                 for r in found[trained].values())])
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    best = {b: max(1e-9, min(found[a][b]["kl"] for a in there)) for b in tasks}
    figure.colorbar(axes.imshow([[found[a][b]["kl"] / best[b] for b in tasks] for a in there], cmap="viridis_r"), ax=axes)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30)
    axes.set_yticks(range(len(there)), there)
    axes.set(xlabel="tested on", ylabel="trained on", title=f"KL to the full model over the column's least, {args.speedup:g}x")
    missing = [t for t in tasks if t not in there]
    n = ", ".join(map(str, sizes.values()))
    caption = (f"The paper's Figure 5, {args.speedup:g}x. Rows: trained on; columns: tested on, n = {n}. KL to the full model [95% interval], "
               "change of accuracy in points or of nats (speedup in bits); priced on the test text."
               + (f" No policy yet for {', '.join(missing)}." if missing else ""))
    publish(args, "transfer", model, figure, caption=caption, markdown=format_table(["trained on", *tasks], cells), found=found)


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
    commands = {"eval": evaluate, "table": table, "frontier": frontier, "speed": speed, "ablation": ablation, "figures": figures,
                "transfer": transfer, "report": report}
    p.add_argument("command", nargs="?", default="eval", choices=commands)
    p.add_argument("--task", choices=["lm", "wikitext2", "cnn_dm", *CHOICE_TASKS, "mc"],
                   help="lm (default) reads --file, or held-out pydocs without it; table: default all of the paper; figures: arc_easy")
    p.add_argument("--file", help="a UTF-8 text file for --task lm, a JSONL of items for --task mc")
    p.add_argument("--data-dir", help="folder with wikitext2/test.txt, arc_easy/test.jsonl and so on")
    p.add_argument("--method", default="dash", choices=METHODS)
    p.add_argument("--speedup", type=float, default=2.0, help="speedup to aim at")
    p.add_argument("--kv", choices=["fill", "copy", "none"], help="eval: keys and values of skipped tokens; default the method's own")
    p.add_argument("--policy", default="out/policy.safetensors", help="made by train.py; {task} in it stands for the task's name")
    p.add_argument("--compare", nargs="*", default=[], help="frontier, ablation, figures: policies of other objectives, horizons or seeds")
    p.add_argument("--model", default="smollm2")
    p.add_argument("--limit", type=int, help="windows of 1,024 tokens, items or articles, from the start; eval: default 8, 100 and 8")
    p.add_argument("--full", action="store_true", help="evaluate all there are")
    p.add_argument("--rounds", type=int, default=5, help="speed: times that each contender runs, in turn")
    p.add_argument("--suite", default="model", choices=["model", "gpu"], help="speed: of --model here, or of 7B shapes on a GPU")
    p.add_argument("--results", default="results", help="folder to write into")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--json", action="store_true", help="eval: print one JSON object on the last line")
    args = p.parse_args()
    if args.command not in ("eval", "report"):
        make_folder(args.results)  # cannot be written: say so before an hour's work
    commands[args.command](args)


if __name__ == "__main__":
    command_line(main)
