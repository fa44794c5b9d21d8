"""The field's trained gates and shortened models beside DASH:   python bench.py controllers | kv | depth | retain

    controllers  do skip controllers profit from seeing the token? gates on the hidden state, on a fixed input, with two layers, at equal
                 numbers of skipped blocks, beside skips that nobody learned (arXiv 2410.20022; their finding: no difference)
    kv           keys and values of skipped tokens: filled, or none (FlexiDepth, arXiv 2503.23798, which fills them)
    depth        blocks run, and cost, for each token of an answer, by kind of request (FlexiDepth)
    retain       what is left of the full model's scores at as many skipped blocks as the gates skip: LayerSkip's early exit (arXiv
                 2404.16710), ShortGPT (2403.03853), LaCo (2402.11187), MindSkip (2410.13184), FlexiDepth, and DASH at ShortGPT's cost

Gates are those of routers.py, made by `train.py --objective KIND --skip N` and given by --routers; DASH is --policy, where it is there.
LayerSkip's own training with an exit loss is not repeated: its exit is on the model as it is.
"""

import copy
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import baselines
import routers
from baselines import bootstrap, compare
from common import format_table
from data import load_articles, load_text, text_examples, windows
from evaluate import METRICS, TASKS, TEXTS, at_hand, policy_path, publish, summaries, variant, with_kv
from infer import generate
from policy import bit_costs, speedup_bits
from train import calibrate_prices


def gates(args, model, *kinds):
    """The routers of --routers that are of these kinds, by number of skipped blocks. ValueError when there is none."""
    found = [r for r in map(routers.load, args.routers) if r.kind in kinds]
    for router in found:
        router.check(model)
        router.to(model.embed.weight.device)
    if not found:
        raise ValueError(f"{args.command} needs --routers FILE..., made by python train.py --objective {kinds[0]} --skip 4 --out "
                         f"r-{kinds[0]}-4")
    return sorted(found, key=lambda r: (r.settings["skip"], kinds.index(r.kind)))


def lost(row, full, key="nats"):
    """What a row of `compare` lost against the full model's, with its 95% interval over examples, as text."""
    low, high = bootstrap(lambda a, b: (a - b).mean(1), row["each"][key], full["each"][key])
    return f"{row[key] - full[key]:+.3f} [{low:+.3f}, {high:+.3f}]"


def public(rows):
    return [{k: v for k, v in r.items() if k != "raw"} for r in rows]


# ----------------------------------------------------------------------------------------------------------
# controllers, kv


@torch.no_grad()
def controllers(args):
    """Thresholds are set, as prices are in `frontier`, for the asked number on the text itself: what is compared is the choice alone."""
    task = args.task or ("wikitext2" if args.data_dir else "lm")
    model, _, [policy, *_], known, examples = at_hand(args, task, 4, policy_path(args, task), needed=False)
    there, L = gates(args, model, "gate-hidden", "gate-fixed", "gate-mlp"), known.L
    baselines.observe(known, model)
    budgets, fill = sorted({r.settings["skip"] for r in there}), float(known.costs[0])
    about, contenders = [], []
    for n in budgets:
        speedup = 4 / (4 - n * (4 - fill) / L)  # of filled skips
        about += [("most similar blocks", n), ("at random", n)]
        contenders += [with_kv(baselines.without(known, baselines.by_similarity(known)[:n]), "fill"), baselines.random_skip(known, speedup)]
        for router in (r for r in there if r.settings["skip"] == n):
            routers.calibrate(router, model, examples, n)
            about.append((router.kind, n))
            contenders.append(router)
        if policy:
            about.append(("dash, states 0 and 4", n))
            contenders += variant(policy, model, examples, [speedup], allowed=(0, 4))
    full, *rows = compare(model, examples, [None, *contenders])
    rows = [r | {"method": m, "asked": n, "skipped": L * r["states"]["0"]} for (m, n), r in zip(about, rows)]
    of = {(r["method"], r["asked"]): r for r in rows}
    cell = lambda r: f"{lost(r, full)}, {r['kl']:.3f} ({r['skipped']:.1f} skipped)" if r else ""
    markdown = format_table(["nats lost [95% interval], KL", *(f"{n} blocks" for n in budgets)],
                            [[m, *(cell(of.get((m, n))) for n in budgets)] for m in dict.fromkeys(m for m, _ in about)])
    said = [f"{a} loses {lost(of[a, n], of[b, n])} nats more than {b} at {n} blocks" for a, b in
            (("gate-hidden", "gate-fixed"), ("gate-mlp", "gate-hidden")) for n in budgets if (a, n) in of and (b, n) in of]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(m for m, _ in about):
        points = [(r["skipped"], r["nats"] - full["nats"]) for r in rows if r["method"] == method]
        axes.plot(*zip(*points), marker="o", label=method)
    axes.set(xlabel="blocks skipped a token", ylabel="nats lost", title=f"Skip controllers, {task}")
    axes.legend()
    trained = "; ".join(sorted({f"{r.settings['steps']} steps on {r.settings['data']}" for r in there}))
    caption = f"{task}, test, n = {len(examples)}; controllers trained for {trained}. {'; '.join(said)}."
    publish(args, "controllers", model, figure, caption=caption, markdown=markdown, full=full["nats"], rows=public(rows))


@torch.no_grad()
def kv(args):
    task = args.task or ("wikitext2" if args.data_dir else "lm")
    model, _, [policy, *_], known, examples = at_hand(args, task, 4, policy_path(args, task), needed=False)
    contenders = {f"FlexiDepth, {r.settings['skip']} skipped": r for r in gates(args, model, "flexidepth")}
    if policy:
        contenders |= {f"dash, states 0 and 4, {s:g}x": p for s, p in
                       zip((1.15, 1.33), variant(policy, model, examples, (1.15, 1.33), allowed=(0, 4)))}
    ways = [(name, mode, with_kv(copy.copy(p), mode)) for name, p in contenders.items() for mode in ("fill", "none")]
    full, *rows = compare(model, examples, [None, *(p for _, _, p in ways)])
    rows = [r | {"method": name, "kv": mode} for (name, mode, _), r in zip(ways, rows)]
    markdown = format_table(["nats lost [95% interval], KL (speedup in bits)", "filled, in INT4", "none"], [
        [name, *(f"{lost(r, full)}, {r['kl']:.3f} ({r['speedup']:.2f}x)" for r in rows if r["method"] == name)] for name in contenders])
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for n, mode in enumerate(("fill", "none")):
        height = [r["nats"] - full["nats"] for r in rows if r["kv"] == mode]
        axes.bar([i + 0.4 * n for i in range(len(height))], height, 0.4, label=mode)
    axes.set_xticks([i + 0.2 for i in range(len(contenders))], contenders)
    axes.set(ylabel="nats lost", title=f"Keys and values of skipped tokens, {task}")
    axes.legend()
    caption = f"{task}, test, n = {len(examples)}. All tokens run: {full['nats']:.4f} nats."
    publish(args, "kv", model, figure, caption=caption, markdown=markdown, full=full["nats"], rows=public(rows))


# ----------------------------------------------------------------------------------------------------------
# depth


def requests(passages, n, seed):
    """n prompts of each kind from so many passages: {kind: [text]}. Lists have 5 to 10 integers between 10 and 99, as theirs."""
    draw = random.Random(seed)
    lists = [" ".join(str(draw.randint(10, 99)) for _ in range(draw.randint(5, 10))) for _ in range(n)]
    asks = {"copy": "Copy this text word for word.\n\n", "summarise": "Summarize this text in one sentence.\n\n",
            "continue": "Continue this text.\n\n"}
    sums = {"repeat": "Repeat this list of numbers: ", "add": "Add up this list of numbers: ",
            "multiply": "Multiply the numbers in this list: "}
    return {k: [ask + p for p in passages[:n]] for k, ask in asks.items()} | {k: [ask + one for one in lists] for k, ask in sums.items()}


@torch.no_grad()
def depth(args):
    task = args.task or ("wikitext2" if args.data_dir else "lm")
    model, tokenizer, [policy, *_], known, _ = at_hand(args, task, 1, policy_path(args, task), needed=False)
    text, n = load_text("pydocs" if task == "lm" else task, "test", args.data_dir), args.limit or (50 if args.full else 4)
    asked = requests([tokenizer.decode(row) for row in windows(tokenizer, text, n, 96, task, spread=True)], n, args.seed)
    contenders = {f"FlexiDepth, {r.settings['skip']} skipped": r for r in gates(args, model, "flexidepth")}
    if policy:
        contenders |= {f"dash, {s:g}x": copy.copy(policy).at(s) for s in (2.67, 4.0) if policy.prices[0][0] <= s <= policy.prices[-1][0]}
    rows = []
    for name, routed in contenders.items():
        costs, half = bit_costs(model.config, routed), len(routed.scale) // known.L
        for kind, prompts in asked.items():
            states = torch.cat([generate(model, tokenizer, prompt, routed, 32, chat=bool(tokenizer.chat_template))["token_states"]
                                for prompt in tqdm(prompts, desc=f"{name}, {kind}", leave=False)], 1)
            if not states.shape[1]:
                raise ValueError(f"{name} answers every request to {kind} with nothing; give more requests by --limit")
            blocks = (states[::half] > 0).sum(0).float()  # of whole blocks; a half counts as its attention
            cost = torch.tensor([4 / speedup_bits(one[:, None], costs) for one in states.T])
            mean_and_variance = lambda t: (t.mean().item(), t.var(correction=0).item())
            rows.append({"method": name, "kind": kind, "tokens": len(blocks), "blocks": mean_and_variance(blocks), "cost": mean_and_variance(cost)})
    cell = lambda r: "{:.2f}, {:.2f}; {:.2f}, {:.3f}".format(*r["blocks"], *r["cost"])
    cells = [[kind, *(cell(r) for r in rows if r["kind"] == kind)] for kind in asked]
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, key, what in zip(figure.subplots(1, 2), ("blocks", "cost"), (f"blocks run, of {known.L}", "cost a block, bits / 4")):
        for n, name in enumerate(contenders):
            means, variances = zip(*[r[key] for r in rows if r["method"] == name])
            axes.errorbar([i + 0.15 * n for i in range(len(means))], means, [v**0.5 for v in variances], fmt="o", capsize=3, label=name)
        axes.set_xticks(range(len(asked)), asked)
        axes.set(ylabel=f"{what}: mean, deviation of tokens")
    axes.legend(fontsize="small")
    caption = (f"{len(asked['copy'])} requests a kind, up to 32 new tokens each, greedy, passages of 96 tokens of {task}. Each cell: blocks run a new token, "
               "their variance; cost a block in units of 4 bits a weight, its variance.")
    publish(args, "depth", model, figure, caption=caption, markdown=format_table(["", *contenders], cells), rows=rows)


# ----------------------------------------------------------------------------------------------------------
# retain

MERGED, STRIDE = 3, 2  # LaCo: blocks that become one, and blocks between two merges (C and I of its paper)


def merge(blocks, i, n):
    """Block i takes on the differences of the n blocks after it: theta_i + sum_k (theta_{i+k} - theta_i) (LaCo, Eq 1), and these go."""
    block, later = copy.deepcopy(blocks[i]), [dict(b.named_parameters()) for b in blocks[i + 1 : i + 1 + n]]
    for name, p in block.named_parameters():
        p.copy_(p + sum(other[name] - p for other in later))
    return [*blocks[:i], block, *blocks[i + 1 + n :]]


def with_blocks(model, blocks):
    """The model with other blocks; all else is shared."""
    other = copy.copy(model)
    other._modules = dict(model._modules) | {"blocks": torch.nn.ModuleList(blocks)}
    other.config, other.engine = replace(model.config, n_layer=len(blocks)), None
    return other


def laco(model, samples, n):
    """LaCo (arXiv 2402.11187): from the top down, merge blocks while the last hidden state of `samples` stays similar -> the shorter model.

    Its threshold is lowered, 0.05 at a time, until n blocks are gone (ours; theirs is set by hand).
    """
    blocks, wanted = list(model.blocks), model.hidden(samples)
    threshold, bar, L = 0.95, tqdm(total=n, desc="LaCo, blocks merged"), len(model.blocks)
    while len(blocks) > L - n:
        i = len(blocks) - MERGED
        while i >= 1 and len(blocks) > L - n:  # the first block stays, as everywhere here
            fewer = min(MERGED - 1, n - (L - len(blocks)))
            trial = merge(blocks, i, fewer)
            if F.cosine_similarity(with_blocks(model, trial).hidden(samples), wanted, dim=-1).mean() > threshold:
                blocks = trial
                bar.update(fewer)
                i = min(i - STRIDE, len(blocks) - MERGED)
            else:
                i -= 1
        threshold -= 0.05
    bar.close()
    return with_blocks(model, blocks)


@torch.no_grad()
def retain(args):
    tasks = [args.task] if args.task else [t for t in TASKS if t != "mmlu_5shot" and args.data_dir and (Path(args.data_dir) / t).is_dir()] or ["lm"]
    rows, short, n_of = [], {}, {}
    for task in tasks:
        model, tokenizer, [policy, *_], known, examples = at_hand(args, task, 2 if task in TEXTS else 16, policy_path(args, task), needed=False)
        L, there = known.L, gates(args, model, "flexidepth", "mindskip")
        asked = sorted({r.settings["skip"] for r in there})
        baselines.observe(known, model)
        if policy:  # the same price for every task
            calibrate_prices(policy, model, text_examples(known.samples[:8]), [L / (L - n) for n in asked], [4 * (L - n) / L for n in asked])
        metric = "Rouge-L" if task == "cnn_dm" else "perplexity" if task in TEXTS else "accuracy"
        if task == "cnn_dm":
            examples = load_articles(task, "test", args.data_dir)[: args.limit or (None if args.full else 2)]
        measure = lambda m, policies: (summaries(m, tokenizer, examples, policies) if task == "cnn_dm" else compare(m, examples, policies))
        about, contenders = [("full model", 0)], [None]
        for n in asked:
            about += [("LayerSkip, early exit", n), ("ShortGPT", n)]
            contenders += [baselines.early_exit(known, L / (L - n)), baselines.static_skip(known, L / (L - n))]
            for r in (r for r in there if r.settings["skip"] == n):
                about.append(({"flexidepth": "FlexiDepth", "mindskip": "MindSkip"}[r.kind], n))
                contenders.append(r)
            if policy:
                about.append(("DASH", n))
                contenders.append(copy.copy(policy).at(L / (L - n)))
        found = measure(model, contenders)
        for n in asked:
            short[n] = short.get(n) or laco(model, known.samples[:2, :128], n)
            about.append(("LaCo", n))
            found += [r | {"speedup": L / (L - n)} for r in measure(short[n], [None])]
        key, statistic = METRICS[metric]
        worth = lambda each: 1 / statistic(each) if metric == "perplexity" else statistic(each)
        whole, n_of[task] = worth(torch.tensor(found[0]["each"][key], dtype=torch.float64)), len(examples)
        for (method, n), r in zip(about, public(found)):
            each = torch.tensor(r["each"][key], dtype=torch.float64)
            rows.append({"method": method, "skipped": n, "task": task, "value": statistic(each).item(), "speedup": r["speedup"],
                         "each": r["each"][key]})
            if whole > 0:  # of nothing, nothing can be retained
                rows[-1] |= {"retained": (worth(each) / whole).item(), "interval": bootstrap(lambda v: worth(v) / whole, r["each"][key])}
    figure = Figure(figsize=(4 * len(tasks), 3.8), layout="constrained")
    methods = dict.fromkeys(r["method"] for r in rows if r["skipped"])
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0]):
        for method in methods:
            points = [(r["speedup"], 100 * r["retained"]) for r in rows if (r["task"], r["method"]) == (task, method) and "retained" in r]
            axes.plot(*zip(*sorted(points)) if points else ([], []), marker="o", markersize=4, label=method)
        axes.axhline(100, color="black", linestyle=":", linewidth=1)
        axes.set(title=f"{task}, n = {n_of[task]}", xlabel="speedup in bits", ylabel="% of the full model")
    axes.legend(fontsize="x-small")
    cells = []
    for method, n in dict.fromkeys((r["method"], r["skipped"]) for r in rows):
        of = [r for r in rows if (r["method"], r["skipped"]) == (method, n)]
        share = lambda r: "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * v for v in (r["retained"], *r["interval"]))) if "retained" in r else "-"
        kept = [r["retained"] for r in of if "retained" in r]
        cells.append([f"{method}, {n}", *(f"{share(r)} ({r['speedup']:.2f}x)" for r in of), f"{100 * sum(kept) / max(1, len(kept)):.0f}"] if n else
                     ["full model, value", *(f"{r['value']:.4g}" for r in of), ""])
    counts = ", ".join(f"{t} {n_of[t]}" for t in tasks)
    caption = (f"Retained % of the full model's score (perplexity: full over the method's) at {' and '.join(map(str, asked))} of {L} blocks skipped [95% interval of the "
               f"method's score] (speedup in bits); n: {counts}. MindSkip skips attention only. DASH is priced for ShortGPT's cost.")
    publish(args, "retain", model, figure, caption=caption, markdown=format_table(["method, blocks skipped", *tasks, "mean"], cells), rows=rows)
