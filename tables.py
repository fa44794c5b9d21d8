"""The paper's Tables 1-3 and Figures 1, 2, 4 and 5, and ours: python bench.py table | frontier | ablation | figures | transfer

What each command shows is said in bench.py. Each measures, then publishes a JSON with its Markdown table; charts.py draws it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import baselines
from baselines import compare, interval, public, quotient, sensitivities, spread
from common import by, format_table, read_json
from data import load_examples, load_text, n_tokens, text_examples, windows
from evaluate import (ASKED, FASTER, METRICS, PAPERS, SKIPS, TASKS, TEXTS, at_hand, folders, one_text, policy_path, publish, rank, read_policy,
                      rouge, settings_of, source, variant)
from model import KVCache, load
from policy import mean_cost, most_speedup, speedup_bits, state_shares
from quant import fake_quantize
from train import LONG


# ----------------------------------------------------------------------------------------------------------
# table


def table(args):
    tasks = [args.task] if args.task else folders(args, TASKS) if args.data_dir else TASKS
    if "cnn_dm" in tasks:
        rouge()  # not installed: say so before an hour's work
    for task in tasks:
        model = None  # of the last task: a GPU may not have room for two
        asked = [(m, s) for m in SKIPS for s in ASKED] + [("int8", 1.0), ("int4", 1.0)]
        asked += [(m, s) for m in ("static_mix", "dash") for s in (*ASKED, *FASTER)]
        metric, rows, model, facts = rank(args, task, asked, TASKS.get(task, 4), timed=task in TEXTS, priced=True)
        markdown = "\n\n".join([table_cells(rows, metric), *paper_tables(PAPERS.get(task))])
        trained = facts["policy"] or f"none, make {policy_path(args, task)} with python train.py --data {task} --data-dir DIR"
        how = f"in bits and measured in batch-1 decoding, median of {args.rounds} rounds" if "measured" in rows[0] else "in bits"
        how += "" if task == "cnn_dm" else "; dash is priced to cost on this text what is asked"
        how += f"; keys and values of skipped tokens: {args.kv}" if args.kv else ""
        how += f"; static_mix goes by {'the damage in that policy' if facts['policy'] else 'measured damage'}"
        if "measured" in rows[0] and model.device.type == "cuda":
            how += "; what no captured graphs serve is timed without them, against the full model without them"
        caption = (f"{task}, test, n = {facts['n']} ({facts['tokens']} tokens): {metric}{'' if metric == 'perplexity' else ', %'}"
                   f"{', KL to the full model, nats' if metric == 'accuracy' else ''} [95% interval] "
                   f"(speedup {how}). INT4 codes: {facts['int4']}; dash: {trained}.")
        publish(args, f"table-{task}", model, caption=caption, markdown=markdown, metric=metric, rows=rows, **facts)


def table_cells(rows, metric):
    """A row a method, a column a speedup; a method with one speedup of its own stands in the last column that it reaches."""
    speedups = sorted({r["target"] for r in rows} - {1.0})
    unit = 1 if metric == "perplexity" else 100

    def cell(r):
        if "missing" in r:
            return "can't reach" if "out of reach" in r["missing"] else "no policy"
        value, low, high = (f"{unit * v:.4g}" for v in (r["value"], *r["interval"]))
        kl = f", {spread(r['each']['kl'], form='.2g')}" if metric == "accuracy" and not r["method"].startswith("full") else ""
        span = f" [{low}, {high}]" if len(r["each"][METRICS[metric][0]]) > 1 else ""  # one example has none
        return f"{value}{span}{kl} ({r['speedup']:.2f}x{', %.2fx' % r['measured'] if 'measured' in r else ''})"

    cells = []
    for method, those in by(rows, "method").items():
        line = {r["target"]: cell(r) for r in those}
        if 1.0 in line:  # asked for no speedup
            own = those[0]["speedup"]
            place = max((s for s in speedups if s <= own), default=speedups[0])
            line = {s: "can't reach" if s > own > 1 else "" for s in speedups} | {place: line[1.0]}
        cells.append([method, *(line.get(s, "") for s in speedups)])
    return format_table(["", *(f"{s:g}x" for s in speedups)], cells)


def only_bits(command, policies):
    """ValueError where a policy's speedups are of the clock."""
    if any(p.settings.get("cost") == "latency" for p in policies):
        raise ValueError(f"{command} compares at equal cost in bits; train its policies without --cost latency")


def paper_tables(key):
    """The paper's numbers for a task, one table a model, or none."""
    paper = read_json(Path(__file__).with_name("paper.json"))
    out = []
    for model, tasks in paper["tables"].items():
        if key in tasks:
            full, *rest = tasks[key].items()
            header = [f"the paper's numbers, {model}", *paper["speedups"]]
            first = ["full model", full[1], "", ""]
            out.append(format_table(header, [first, *([method, *values] for method, values in rest)]))
    return out


# ----------------------------------------------------------------------------------------------------------
# frontier

SPEEDUPS = (2.0, 2.29, 2.67, 3.2, 4.0, 4.5)
READ = 32  # tokens of a text before those that `budget` decodes


@torch.no_grad()
def frontier(args):
    """Nats lost and KL against speedup; same INT4 codes, same states, same a_i. Skips write keys and values, but for the static plan's."""
    task = one_text(args)
    if task not in TEXTS:
        raise ValueError(f"frontier --task {task}: it measures text; give {', '.join(TEXTS)}")
    model, tokenizer, policies, known, examples = at_hand(args, task, 3)
    policy = policies[0]
    device = known.samples.device
    size = min(LONG, model.config.block_size)
    if known.position_damage is None:
        raise ValueError(f"{policy_path(args, task)} has no position_damage, which the plan by position goes by; train it again with "
                         "train.py --objective fisher")
    only_bits("frontier", policies)
    if examples[0].rows.shape[1] <= READ:
        raise ValueError(f"{args.file or task} has {examples[0].rows.shape[1]} tokens; give a text of more than {READ}, which decoding starts from")
    costs = known.costs
    speedups = [s for s in SPEEDUPS if s <= min(most_speedup(known.L, costs), *(p.prices[-1][0] for p in policies))]

    # The static side, on training text: KL of each block alone, and of whole plans
    train_rows = windows(tokenizer, load_text(*source(args, task, "train")), 4, min(512, size), task, spread=True).to(device)
    search, choose = text_examples(train_rows[:1]), text_examples(train_rows[1:] if len(train_rows) > 1 else train_rows)

    measure_on = lambda examples: baselines.measured_kl(model, examples, known.scale)
    alone = sensitivities(model, search, known.scale)
    candidates = baselines.static_candidates(known, alone, measure_on(search), speedups)
    judge = measure_on(choose)

    ways = [("full model", None, None), ("all INT8", None, baselines.int8(known, 0)), ("all INT4", None, baselines.int4(known, 0))]
    plans = [baselines.best_static(known, candidates, judge, speedup) for speedup in tqdm(speedups, desc="static plans")]
    # A static plan cannot cost exactly what is asked, and a price set on other text does not either: all others cost on this text what the
    # static plan costs, so that what is compared is the choice alone. `budget` measures the other error.
    top = most_speedup(known.L, costs)  # of what fills keys and values: a static plan of a small model may go beyond
    same = [mean_cost(plan.given, baselines.free_skips(costs)) for plan in plans]
    speedups, plans, same = zip(*((s, p, cost) for s, p, cost in zip(speedups, plans, same) if cost >= 4 / top - 1e-6))
    priced = [variant(p, model, examples, speedups, same) for p in policies]
    for speedup, cost, plan, *those in zip(speedups, same, plans, *priced):
        ways += [("random states", speedup, baselines.random_mix(known, 4 / cost)), ("best static plan", speedup, plan),
                 ("by position", speedup, baselines.position_mix(known, 4 / cost))]
        ways += [(p.name, speedup, p) for p in those]
    rows = [{"method": name, "target": s} | public(r) for (name, s, _), r in zip(ways, compare(model, examples, [p for *_, p in ways]))]
    kept = budget(args, policy, task, [s for s in (2.0, 2.67, 3.2) if s in speedups])
    tokens = n_tokens(examples)
    markdown, whole = frontier_tables(rows)
    met = lambda k, way: f"{k[way]:.3f}x, {100 * (k[way] / k['asked'] - 1):+.1f}%"
    decoding = format_table(["decoding up to 512 tokens", "asked", "price fixed: realised, and error", "price tracks the budget"],
                            [[k["text"], f"{k['asked']:g}x", met(k, "fixed"), met(k, "tracked")] for k in kept])
    caption = (f"{task}, test, {tokens} tokens in windows of {examples[0].rows.shape[1]}, trained on {policy.settings.get('data')}"
               f" (labels of up to {policy.settings.get('samples')} x 1,024 tokens). Full model {rows[0]['nats']:.4f} nats. "
               "A column is the speedup in bits that the static plan realised, whose skipped blocks write no keys and values; all others are priced "
               "to cost on this text what it costs. 95% intervals over windows.")
    markdown = f"KL to the full model over that of the best static plan:\n\n{markdown}"
    details = f"Nats lost, KL to the full model (speedup realised):\n\n{whole}\n\n{decoding}"
    publish(args, f"frontier-{task}", model, caption=caption, markdown=markdown, details=details, tokens=tokens, budget=kept,
            rows=rows, policy=settings_of(policy))


def frontier_tables(rows):
    """Two Markdown tables, a row a method, a column a static plan: KL over that plan's; and what each loses, in nats and in KL."""
    full, int8, int4, *rest = rows
    of = by(rest, "method")
    static = of["best static plan"]
    header = ["", *(f"{plan['speedup']:.2f}x" for plan in static)]
    lost = lambda r: [v - f for v, f in zip(r["each"]["nats"], full["each"]["nats"])]
    form = lambda v, span: "{:.2f} [{:.2f}, {:.2f}]".format(v, *span)
    kls = [[m, *(form(*quotient(r["each"]["kl"], plan["each"]["kl"])) for r, plan in zip(those, static, strict=True))]
           for m, those in of.items() if those is not static]
    kls.insert(0, ["best static plan: KL in nats", *(f"{plan['kl']:.4f}" for plan in static)])
    alone = "; ".join(f"{r['method']}: KL {r['kl']:.4f} at {r['speedup']:.2f}x" for r in (int8, int4))
    cell = lambda r: f"{spread(lost(r), form='+.4f')}, {spread(r['each']['kl'])} ({r['speedup']:.2f}x)"
    whole = [[m, *map(cell, those)] for m, those in of.items()]
    whole += [[f"{m}: nats lost over the best static plan's", *(form(*quotient(lost(r), lost(plan))) for r, plan in zip(those, static))]
              for m, those in list(of.items())[3:]]
    whole += [[r["method"], cell(r), *[""] * (len(static) - 1)] for r in (int8, int4)]
    return f"{format_table(header, kls)}\n\n{alone[0].upper()}{alone[1:]}.", format_table(header, whole)


@torch.inference_mode()
def budget(args, policy, task, speedups):
    """Speedup in bits of 512 tokens of test text, or as many as the context has room for, decoded one by one, with the price fixed and
    with the price tracking."""
    model, tokenizer = load(args.model, policy.costs.device, torch.bfloat16, routed=True)
    model.quantize(real=True, int4=policy.int4)
    size = min(512 + READ, model.config.block_size)
    out = []
    name, split, folder = source(args, task, "test")
    for n, example in enumerate(load_examples(name, split, tokenizer, 3, size, folder, policy.costs.device, spread=True, choice=False)):
        for speedup in speedups:
            row = {"text": f"{task}, {n + 1}", "asked": speedup}
            for way in ("fixed", "tracked"):
                policy.at(speedup, track=way == "tracked")
                cache = KVCache(model, 1, size)
                states = []
                model.hidden(example.rows[:, :READ], policy, cache)
                for t in tqdm(range(READ, example.rows.shape[1]), desc=f"{row['text']}, {speedup:g}x, {way}", leave=False):
                    model.hidden(example.rows[:, t : t + 1], policy, cache)
                    states.append(policy.states)
                row[way] = speedup_bits(torch.cat(states, 2), policy.costs)
            out.append(row)
    return out


# ----------------------------------------------------------------------------------------------------------
# ablation, figures, transfer


@torch.no_grad()
def ablation(args):
    """What single choices are worth: the paper's Table 3, K/V modes, horizons and rewards, the form of a_i (Eq 7), the INT8 head."""
    task = one_text(args)
    model, tokenizer, policies, known, examples = at_hand(args, task, 2 if task in TEXTS else TASKS.get(task, 16))
    policy = policies[0]
    forms = baselines.observe(known, model)
    choice = examples[0].choices is not None
    scales = {"none, a_i = 1": [1.0] * known.L, "least squares": forms["least_squares"].tolist(), "norm ratio": forms["norm_ratio"].tolist()}
    of = lambda policy=policy, **change: variant(policy, model, examples, ASKED, **change)
    table = {"naive static skipping": [baselines.static_skip(known, s) for s in ASKED],
             "dynamic, states 0 and 4, a_i = 1": of(allowed=(0, 4), scale=scales["none, a_i = 1"]),
             "+ scale a_i (norm ratio), K/V filled": of(allowed=(0, 4)), "+ INT8": of(allowed=(0, 2, 4)), f"+ INT4, {policy.name}": of(),
             "states 0 and 4, least-squares a_i": of(allowed=(0, 4), scale=scales["least squares"]),
             "states 0 and 4, K/V copied": of(allowed=(0, 4), kv="copy"), "states 0 and 4, no K/V": of(allowed=(0, 4), kv="none"),
             **{p.name: of(p) for p in policies[1:]}}
    ways = [(name, s, p) for name, those in table.items() for s, p in zip(ASKED, those)]
    full, *found = compare(model, examples, [None, *(p for *_, p in ways)])
    key, unit = ("accuracy", 100) if choice else ("nats", 1)
    rows = [{"name": name, "target": s} | public(r) for (name, s, _), r in zip(ways, found)]

    cell = lambda r: f"{spread(r['each'][key], full['each'][key], unit, '+.3g')} ({r['speedup']:.2f}x)"
    few = windows(tokenizer, load_text("pydocs", "test"), 1, min(256, model.config.block_size), spread=True).to(known.samples.device)
    skip = {}
    for name, scale in scales.items():
        damage = sensitivities(model, text_examples(few), scale, states=[0])[1:-1, 0]
        skip[name] = {"mean": damage.mean().item(), "median": damage.median().item(), "worst": damage.max().item()}
    head = model.head.weight
    model.head.weight = torch.nn.Parameter(fake_quantize(head.detach(), 2))
    [int8] = compare(model, examples, [None])
    model.head.weight = head
    markdown = "\n\n".join([
        format_table(["", *(f"{s:g}x" for s in ASKED)], [[name, *map(cell, those)] for name, those in by(rows, "name").items()]),
        *paper_tables("ablation"),
        format_table([f"scale a_i of a skipped block (Eq 6-7), {few.numel()} tokens of pydocs", "KL when one block is skipped: mean over blocks",
                      "median", "worst"], [[name, f"{v['mean']:.3f}", f"{v['median']:.3f}", f"{v['worst']:.2f}"] for name, v in skip.items()]),
        f"Head of generation: {full['nats']:.4f} nats with the weights as loaded, {int8['nats']:.4f} in INT8."])
    caption = (f"{task}, test, n = {len(examples)}: change of {'accuracy, points' if choice else 'nats'} against the full model "
               f"({unit * full[key]:.4g}) [95% interval] (speedup in bits). One scorer, restricted to the states named and priced to cost on "
               "this text what the column asks.")
    publish(args, "ablation", model, caption=caption, markdown=markdown, rows=rows, n=len(examples), skip_tokens=few.numel(),
            skip_kl=skip, head_nats={"16 bits": full["nats"], "INT8": int8["nats"]})


@torch.no_grad()
def figures(args):
    """The paper's Figures 1, 2 and 4 on test text; the accuracy of Figure 1 on items of --task."""
    task = args.task or "arc_easy"
    if task in TEXTS:
        raise ValueError(f"figures --task {task}: Figure 1 counts right answers; give a multiple-choice task")
    model, tokenizer, policies, known, items = at_hand(args, task, 60)
    only_bits("figures", policies)
    baselines.observe(known, model)
    text = ("wikitext2", "test", args.data_dir) if args.data_dir and (Path(args.data_dir) / "wikitext2").exists() else ("pydocs", "test")
    size = min(256, model.config.block_size)
    rows = windows(tokenizer, load_text(*text), 32 if args.full else 8, size, spread=True).to(known.samples.device)
    layers = list(model.block_by_block(rows))
    h = [*(x for x, _, _ in layers), layers[-1][2]]  # h_0 to h_L
    h = torch.stack([t.view(*rows.shape, -1)[:, 1:].flatten(0, 1) for t in h])  # (L + 1, N, C), without first tokens
    similarity = F.cosine_similarity(h[:-1], h[1:], dim=-1).cpu()  # (L, N)
    what = f"{text[0]}, test, {similarity.shape[1]} tokens"
    figure1(args, model, known, h, similarity, items, f"{what}; accuracy on {task}, n = {len(items)}, 95% intervals")
    figure2(args, model, known, rows, similarity, what)
    figure4(args, model, policies, rows, similarity, what)


def figure1(args, model, known, h, similarity, items, what):
    """Blocks that change little, and what skipping them costs."""
    L = known.L
    order = baselines.by_similarity(known)
    unit = F.normalize(h, dim=-1)
    pairs = torch.stack([(unit * one).sum(-1).mean(1) for one in unit]).cpu()
    counts = range(min(9, L - 1))
    each = [r["each"]["accuracy"] for r in compare(model, items, [baselines.without(known, order[:n]) for n in counts])]
    right = [sum(e) / len(e) for e in each]
    spans = [interval(e) for e in each]
    beyond = next((i for i in range(1, L + 1) if (similarity.mean(1)[i - 1 :] > 0.9).all()), None)
    cells = [[n, order[n - 1] + 1 if n else "", f"{100 * v:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
             for n, v, (low, high) in zip(counts, right, spans)]
    markdown = format_table(["blocks skipped", "the last of them", "accuracy, %"], cells) + (
        f"\n\nInput and output are more similar than 0.9 {f'from block {beyond} on' if beyond else 'in no stretch of blocks that reaches the last'}.")
    publish(args, "figure1", model, caption=f"The paper's Figure 1. {what}.", markdown=markdown, n=len(items), tokens=similarity.shape[1],
            similarity=similarity.mean(1).tolist(), deciles=[[one.quantile(q).item() for one in similarity] for q in (0.1, 0.9)],
            pairs=pairs.tolist(), accuracy=right, intervals=spans)


def figure2(args, model, known, rows, similarity, what):
    """Is a token safe to skip where its similarity is high? Next tokens with the most similar tenth of the blocks skipped."""
    skipped = baselines.by_similarity(known)[: max(1, known.L // 10)]
    kind = []
    for row in rows[:, None]:
        ours, theirs = (model(row, p)[0, 1:-1].argmax(-1) for p in (baselines.without(known, skipped), None))
        kind.append(torch.where(ours == theirs, 0, torch.where(ours == row[0, 2:], 2, 1)))
    kind = torch.cat(kind).cpu()
    of_tokens = similarity.view(known.L, len(rows), -1)[:, :, :-1].flatten(1)
    cells, means = [], {}
    for k, name in enumerate(("agrees", "disagrees", "differs, and is right")):
        here = of_tokens[:, kind == k]
        if here.shape[1]:
            means[name] = here.mean(1).tolist()
            cells.append([name, here.shape[1], f"{here.mean():.4f}", spread(here[skipped].mean(0))])
    header = ["next token, against the full model's", "tokens", "similarity, all blocks", "of the skipped blocks [95% interval]"]
    caption = f"The paper's Figure 2. {what}; without blocks {', '.join(str(i + 1) for i in sorted(skipped))}."
    publish(args, "figure2", model, caption=caption, markdown=format_table(header, cells), tokens=len(kind), similarity=means)


def figure4(args, model, policies, rows, similarity, what):
    """States against similarity at three speeds, and how early in the model a policy dares to skip."""
    policy = policies[0]
    decided = similarity[1:].flatten()
    speedups = [s for s in (2.0, 2.67, 4.0) if policy.prices[0][0] <= s <= policy.prices[-1][0]]
    cells, shares, skip_rate = [], {}, {}
    tenth = decided.argsort().argsort() * 10 // len(decided)
    for speedup in speedups:
        model.hidden(rows, policy.at(speedup))
        states = policy.states[1:, :, 1:].flatten().cpu()
        shares[f"{speedup:g}x"] = [state_shares(states[tenth == k]) for k in range(10)]
        mean_of = lambda here: f"{decided[here].mean():.3f} ({100 * here.float().mean():.0f}%)" if here.any() else ""
        cells.append([f"{speedup:g}x", *(mean_of(states == s) for s in (4, 2, 1, 0))])
    for p in policies:
        [p] = variant(p, model, text_examples(rows), [1.33], allowed=(0, 4))
        model.hidden(rows, p)
        skip_rate[p.name] = (p.states == 0).float().mean((1, 2)).tolist()
    early = [[name, *(f"{100 * v:.0f}%" for v in rate[1:9])] for name, rate in skip_rate.items()]
    markdown = "\n\n".join([
        format_table(["mean similarity of what runs in (share)", "full", "INT8", "INT4", "skip"], cells),
        format_table(["skip rate, states 0 and 4 only, 1.33x; block", *range(2, len(early[0]) + 1)], early)])
    caption = (f"The paper's Figure 4. {what}; similarities are the full model's. Horizon 0 decides a block from its own input, 1 from the "
               "input of the block before (the paper).")
    publish(args, "figure4", model, caption=caption, markdown=markdown, tokens=similarity.shape[1], shares=shares, skip_rate=skip_rate)


@torch.no_grad()
def transfer(args):
    """The paper's Figure 5: a policy trained on each task, tested on each, by KL to the full model."""
    tasks = [t for t in TASKS if t != "mmlu_5shot"]
    if args.data_dir:
        tasks = folders(args, tasks)
    files = {t: policy_path(args, t) for t in tasks}
    there = {t: f for t, f in files.items() if Path(f).is_file()}
    if len(set(files.values())) < len(files) or not there:
        raise ValueError(f"transfer needs a policy a task: python train.py --data TASK --data-dir DIR --out out-TASK, then --policy "
                         f"'out-{{task}}/policy.safetensors' (given: {args.policy})")
    found, sizes, codes = {trained: {} for trained in there}, {}, {}
    for tested in tasks:
        model = None  # of the last task: a GPU may not have room for two
        model, _, _, _, examples = at_hand(args, tested, TASKS[tested], path=next(iter(there.values())))
        sizes[tested] = len(examples)
        for trained, file in tqdm(there.items(), desc=tested):
            policy = read_policy(file, model, True)
            if policy.int4 != model.int4:  # each goes with its own codes
                model.quantize(int4=policy.int4)
            codes[trained] = policy.int4
            full, row = compare(model, examples, [None, *variant(policy, model, examples, [args.speedup])])
            key, unit = ("nats", 1) if tested in TEXTS else ("accuracy", 100)
            found[trained][tested] = {"kl": row["kl"], "speedup": row["speedup"], "each": row["each"], "change": spread(
                row["each"][key], full["each"][key], unit, "+.3g")}
    cells = [[trained, *(f"{spread(r['each']['kl'])}, {r['change']} ({r['speedup']:.2f}x)" for r in of.values())] for trained, of in found.items()]
    missing = [t for t in tasks if t not in there]
    n = ", ".join(map(str, sizes.values()))
    caption = (f"The paper's Figure 5, {args.speedup:g}x. Rows: trained on; columns: tested on, n = {n}. KL to the full model [95% interval], "
               "change of accuracy in points or of nats (speedup in bits); priced on the test text."
               + (f" No policy yet for {', '.join(missing)}." if missing else ""))
    publish(args, "transfer", model, caption=caption, markdown=format_table(["trained on", *tasks], cells), found=found, n=sizes, int4=codes)
