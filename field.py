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

import torch
import torch.nn.functional as F
from tqdm import tqdm

import baselines
import routers
from baselines import bootstrap, compare, public, spread
from common import format_table
from data import load_text, n_tokens, pieces, text_examples, windows
from evaluate import (METRICS, TASKS, TEXTS, at_hand, folders, metric_of, one_text, prompt_of, publish, rouge, some_articles,
                      source, summaries, variant, with_kv)
from infer import generate
from model import with_blocks
from policy import bit_costs, mean_cost, most_speedup


def gates(args, model, *kinds):
    """The routers of --routers that are of these kinds, by number of skipped blocks; one of each. ValueError when there is none, or two."""
    found = [r for r in map(routers.load, args.routers) if r.kind in kinds]
    each = [(r.kind, r.settings["skip"]) for r in found]
    if len(set(each)) < len(each):
        raise ValueError(f"--routers has two of one kind and number of skipped blocks ({max(each, key=each.count)}); give one of each")
    for router in found:
        router.check(model)
        router.to(model.device)
    if not found:
        raise ValueError(f"{args.command} needs --routers FILE..., made by python train.py --objective {kinds[0]} --skip 4 --out "
                         f"r-{kinds[0]}-4")
    return sorted(found, key=lambda r: (r.settings["skip"], kinds.index(r.kind)))


def lost(row, full):
    """The nats that a row of `compare` lost against the full model's, with their 95% interval over examples, as text."""
    return spread(row["each"]["nats"], full["each"]["nats"], form="+.3f")


def made(there, *policies):
    """How the gates and DASH were trained, for a caption."""
    how = dict.fromkeys(f"{r.kind} {r.settings['steps']} steps on {r.settings['data']}" for r in there)
    on = dict.fromkeys(str(policy.settings.get("data")) for policy in policies if policy)
    return f"Gates trained: {', '.join(how)}" + (f", DASH on {', '.join(on)}." if on else ".")


# ----------------------------------------------------------------------------------------------------------
# controllers, kv


@torch.no_grad()
def controllers(args):
    """Thresholds are set, as prices are in `frontier`, for the asked number on the text itself: what is compared is the choice alone."""
    task = one_text(args)
    model, _, [policy, *_], known, examples = at_hand(args, task, 2, needed=False)
    there = gates(args, model, "gate-hidden", "gate-fixed", "gate-mlp")
    L = known.L
    examples = pieces(examples)
    baselines.observe(known, model)
    budgets = sorted({r.settings["skip"] for r in there})
    fill = float(known.costs[0])
    ways = []  # method, blocks, policy
    for n in budgets:
        speedup = 4 / (4 - n * (4 - fill) / L)  # of filled skips
        ways += [("most similar blocks", n, with_kv(baselines.without(known, baselines.by_similarity(known)[:n]), "fill")),
                 ("at random", n, baselines.random_skip(known, speedup))]
        for router in (r for r in there if r.settings["skip"] == n):
            routers.calibrate(router, model, examples, n)
            ways.append((router.kind, n, router))
        if policy:
            ways.append(("dash, states 0 and 4", n, *variant(policy, model, examples, [speedup], allowed=(0, 4))))
    full, *rows = compare(model, examples, [None, *(p for *_, p in ways)])
    rows = [r | {"method": m, "asked": n, "skipped": L * r["states"]["0"]} for (m, n, _), r in zip(ways, rows)]
    of = {(r["method"], r["asked"]): r for r in rows}
    cell = lambda r: f"{lost(r, full)}, {spread(r['each']['kl'], form='.3f')} ({r['skipped']:.1f} skipped)" if r else ""
    markdown = format_table(["nats lost, KL [95% intervals]", *(f"{n} blocks" for n in budgets)],
                            [[m, *(cell(of.get((m, n))) for n in budgets)] for m in dict.fromkeys(m for m, *_ in ways)])
    said = [f"{a} loses {lost(of[a, n], of[b, n])} nats more than {b} at {n} blocks" for a, b in
            (("gate-hidden", "gate-fixed"), ("gate-mlp", "gate-hidden")) for n in budgets if (a, n) in of and (b, n) in of]
    caption = (f"{task}, test, n = {len(examples)} ({n_tokens(examples)} tokens). {made(there, policy)} Thresholds and "
               "prices are set on this text.") + (f" {'; '.join(said)}." if said else "")
    publish(args, "controllers", model, caption=caption, markdown=markdown, full=full["nats"], n=len(examples), rows=[public(r) for r in rows])


@torch.no_grad()
def kv(args):
    task = one_text(args)
    model, _, [policy, *_], known, examples = at_hand(args, task, 2, needed=False)
    there = gates(args, model, "flexidepth")
    examples = pieces(examples)
    contenders = {f"FlexiDepth, {r.settings['skip']} skipped": r for r in there}
    if policy:
        contenders |= {f"dash, states 0 and 4, {s:g}x": p for s, p in
                       zip((1.15, 1.33), variant(policy, model, examples, (1.15, 1.33), allowed=(0, 4)))}
    ways = [(name, mode, with_kv(copy.copy(p), mode)) for name, p in contenders.items() for mode in ("fill", "none")]
    full, *rows = compare(model, examples, [None, *(p for _, _, p in ways)])
    rows = [r | {"method": name, "kv": mode} for (name, mode, _), r in zip(ways, rows)]
    markdown = format_table(["nats lost, KL [95% intervals] (speedup in bits)", "filled, in INT4", "none"], [
        [name, *(f"{lost(r, full)}, {spread(r['each']['kl'], form='.3f')} ({r['speedup']:.2f}x)" for r in rows if r["method"] == name)]
        for name in contenders])
    caption = (f"{task}, test, n = {len(examples)} ({n_tokens(examples)} tokens). All tokens run: {full['nats']:.4f} "
               f"nats. {made(there, policy)} DASH's prices are set on this text, with keys and values filled.")
    publish(args, "kv", model, caption=caption, markdown=markdown, full=full["nats"], n=len(examples), rows=[public(r) for r in rows])


# ----------------------------------------------------------------------------------------------------------
# depth


def requests(passages, seed):
    """As many prompts of each kind as there are passages: {kind: [text]}. Lists have 5 to 10 integers between 10 and 99, as theirs."""
    draw = random.Random(seed)
    lists = [" ".join(str(draw.randint(10, 99)) for _ in range(draw.randint(5, 10))) for _ in passages]
    asks = {"copy": "Copy this text word for word.\n\n", "summarise": "Summarize this text in one sentence.\n\n",
            "continue": "Continue this text.\n\n"}
    sums = {"repeat": "Repeat this list of numbers: ", "add": "Add up this list of numbers: ",
            "multiply": "Multiply the numbers in this list: "}
    return {k: [ask + p for p in passages] for k, ask in asks.items()} | {k: [ask + one for one in lists] for k, ask in sums.items()}


@torch.no_grad()
def depth(args):
    task = one_text(args)
    if task not in TEXTS:
        raise ValueError(f"depth --task {task}: its passages are text; give {', '.join(TEXTS)}")
    model, tokenizer, [policy, *_], known, _ = at_hand(args, task, 1, needed=False)
    text = load_text(*source(args, task, "test"), False)
    passages = windows(tokenizer, text, args.limit or (50 if args.full else 4), 96, task, spread=True)
    asked = requests([prompt_of(tokenizer, row) for row in passages], args.seed)
    there = gates(args, model, "flexidepth")
    contenders = {f"FlexiDepth, {r.settings['skip']} skipped": r for r in there}
    if policy:
        speedups = [s for s in (2.67, 4.0) if s <= most_speedup(known.L, known.costs)]
        contenders |= zip((f"dash, {s:g}x" for s in speedups), variant(policy, model, text_examples(known.samples[:8]), speedups))
    rows = []
    for name, routed in contenders.items():
        costs = bit_costs(model.config, routed)
        half = len(routed.scale) // known.L
        for kind, prompts in asked.items():
            states = torch.cat([generate(model, tokenizer, prompt, routed, 32, chat=bool(tokenizer.chat_template))["token_states"]
                                for prompt in tqdm(prompts, desc=f"{name}, {kind}", leave=False)], 1)
            if not states.shape[1]:  # every answer is empty
                continue
            blocks = (states[::half] > 0).sum(0).float()  # of whole blocks; a half counts as its attention
            cost = torch.tensor([mean_cost(one[:, None], costs) for one in states.T])
            both = lambda t: (t.mean().item(), t.var(correction=0).item())
            rows.append({"method": name, "kind": kind, "tokens": len(blocks), "blocks": both(blocks), "cost": both(cost)})
    cell = lambda r: "{:.2f}, {:.2f}; {:.2f}, {:.3f}".format(*r["blocks"], *r["cost"])
    of = {(r["kind"], r["method"]): r for r in rows}
    cells = [[kind, *(cell(of[kind, name]) if (kind, name) in of else "no answer" for name in contenders)] for kind in asked]
    caption = (f"{len(asked['copy'])} requests a kind, up to 32 new tokens each, greedy, passages of 96 tokens of {task}. Each cell: "
               f"blocks run a new token, their variance; cost a block in units of 4 bits a weight, its variance. {made(there, policy)}")
    publish(args, "depth", model, caption=caption, markdown=format_table(["", *contenders], cells), n=len(passages), rows=rows)


# ----------------------------------------------------------------------------------------------------------
# retain

MERGED, STRIDE = 3, 2  # LaCo: blocks that become one, and blocks between two merges (C and I of its paper)


def merge(blocks, i, n):
    """Block i takes on the differences of the n blocks after it: theta_i + sum_k (theta_{i+k} - theta_i) (LaCo, Eq 1), and these go."""
    block = copy.deepcopy(blocks[i])
    later = [dict(b.named_parameters()) for b in blocks[i + 1 : i + 1 + n]]
    for name, p in block.named_parameters():
        p.copy_(p + sum(other[name] - p for other in later))
    return [*blocks[:i], block, *blocks[i + 1 + n :]]


def merged(model, merges):
    """The model after `merge` with every (i, n) in turn."""
    blocks = list(model.blocks)
    for i, n in merges:
        blocks = merge(blocks, i, n)
    return with_blocks(model, blocks)


def laco(model, samples, n):
    """LaCo (arXiv 2402.11187): from the top down, merge blocks while the last hidden state of `samples` stays similar -> the merges, [(i, n)].

    Its threshold is lowered, 0.05 at a time, until n blocks are gone (ours; theirs is set by hand).
    """
    blocks, merges = list(model.blocks), []
    wanted = model.hidden(samples)
    threshold = 0.95
    bar = tqdm(total=n, desc="LaCo, blocks merged")
    L = len(model.blocks)
    while len(blocks) > L - n:
        i = len(blocks) - MERGED
        while i >= 1 and len(blocks) > L - n:  # the first block stays, as everywhere here
            fewer = min(MERGED - 1, n - (L - len(blocks)))
            trial = merge(blocks, i, fewer)
            if F.cosine_similarity(with_blocks(model, trial).hidden(samples), wanted, dim=-1).mean() > threshold:
                blocks = trial
                merges.append((i, fewer))
                bar.update(fewer)
                i = min(i - STRIDE, len(blocks) - MERGED)
            else:
                i -= 1
        threshold -= 0.05
        if threshold < -1:
            raise ValueError(f"{model.name}: LaCo finds no blocks to merge; a model of this depth can't lose {n}")
    bar.close()
    return merges


@torch.no_grad()
def retain(args):
    tasks = [args.task] if args.task else folders(args, [t for t in TASKS if t != "mmlu_5shot"])
    if "cnn_dm" in tasks:
        rouge()  # not installed, or below a file that is missing: say so before an hour's work
    for task in tasks:
        load_text(*source(args, task, "train")), load_text(*source(args, task, "test"), task not in TEXTS)
    rows, n_of, used, merges = [], {}, [], {}
    for task in tasks:
        model = None  # of the last task: a GPU may not have room for two
        default = 2 if task in TEXTS else 12
        model, tokenizer, [policy, *_], known, examples = at_hand(args, task, default, needed=False)
        L = known.L
        there = gates(args, model, "flexidepth", "mindskip")
        used = [*used, policy]
        asked = sorted({r.settings["skip"] for r in there})
        baselines.observe(known, model)
        texts = examples if task == "cnn_dm" else pieces(examples)
        metric = metric_of(task)
        # as in `frontier`, at the price that meets the cost on this text; summaries are generated at the same
        priced = variant(policy, model, texts, [L / (L - n) for n in asked]) if policy else [None] * len(asked)
        examples = some_articles(args, 2) if task == "cnn_dm" else texts
        measure = lambda m, policies: (summaries(m, tokenizer, examples, policies) if task == "cnn_dm" else compare(m, examples, policies))
        ways = [("full model", 0, None)]  # method, blocks, policy
        for n, dash in zip(asked, priced):
            ways += [("LayerSkip, early exit", n, baselines.early_exit(known, L / (L - n))),
                     ("ShortGPT", n, baselines.static_skip(known, L / (L - n)))]
            ways += [({"flexidepth": "FlexiDepth", "mindskip": "MindSkip"}[r.kind], n, r) for r in there if r.settings["skip"] == n]
            ways += [("DASH", n, dash)] if dash else []
        found = [(method, n, r) for (method, n, _), r in zip(ways, measure(model, [p for *_, p in ways]))]
        for n in asked:
            if n not in merges:  # the same for all tasks
                merges[n] = laco(model, windows(tokenizer, load_text("pydocs", "train"), 2, 128, spread=True).to(model.device), n)
            found += [("LaCo", n, r | {"speedup": L / (L - n)}) for r in measure(merged(model, merges[n]), [None])]
        key, statistic = METRICS[metric]
        full = torch.tensor(found[0][2]["each"][key], dtype=torch.float64)
        whole = statistic(full).item()
        n_of[task] = len(examples)

        def share_left(each, full):
            """Of the full model's score, from paired examples (..., n)."""
            if metric == "perplexity":
                return (full - each).mean(-1).exp()  # the full model's perplexity over the method's
            return (1 + (each - full).mean(-1) / whole).clamp(min=0)

        for method, n, r in found:
            each = torch.tensor(r["each"][key], dtype=torch.float64)
            rows.append({"method": method, "skipped": n, "task": task, "value": statistic(each).item(), "speedup": r["speedup"],
                         "each": r["each"][key]})
            if whole > 0:  # of nothing, nothing can be retained
                rows[-1] |= {"retained": share_left(each, full).item(), "interval": bootstrap(share_left, each, full)}
    of = {(r["method"], r["skipped"], r["task"]): r for r in rows}
    cells = []
    for method, n in dict.fromkeys((r["method"], r["skipped"]) for r in rows):
        line = [of.get((method, n, t)) for t in tasks]
        cell = lambda r: f"{r['value']:.4g}"
        if n:
            percent = lambda r: "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * v for v in (r["retained"], *r["interval"])))
            cell = lambda r: f"{percent(r) if 'retained' in r else '-'} ({r['speedup']:.2f}x)"
        cells.append([f"{method}, {n}" if n else "full model, value", *(cell(r) if r else "" for r in line)])
    counts = ", ".join(f"{t} {n_of[t]}" for t in tasks)
    numbers = " and ".join(map(str, asked))
    caption = (f"Retained % of the full model's score (perplexity: full over the method's) at {numbers} of {L} blocks skipped [95% "
               f"interval, paired] (speedup in bits); n: {counts}, text in pieces. MindSkip skips attention only. DASH is priced for "
               f"ShortGPT's cost on this text. {made(there, *used)}")
    markdown = format_table(["method, blocks skipped", *tasks], cells)
    publish(args, "retain", model, caption=caption, markdown=markdown, n=n_of, rows=rows)
