"""Which blocks could be spared? Ways to skip that nobody learned, and an oracle: python bench.py hidden | oracle

Two questions of "Dynamic layer selection in decoder-only transformers" (arXiv 2410.20022), on our model:

    hidden   blocks skipped uniformly, at random, or all after an early exit: how far is the last hidden state from the full model's, and
             what is a summary worth? Theirs: skipping beats exiting
    oracle   for each sequence the cheapest path, of a nested family, that scores at least as well as the full model. Theirs: 23.3% of
             the blocks are enough

An oracle sees the score before it chooses, so a part of what it saves is luck: of many paths one is ahead on this sequence by chance.
    luck alone     the same oracle where no path is better than the full model. Summaries: each path's is another one of the full model's.
                   Likelihoods: what is right is drawn anew from the full model's distribution, which no path predicts better in the mean
    cross-check    a path chosen by one half of the evidence (one of two summaries; the even tokens of a text), scored on the other. One
                   answer to a question has no halves

What a policy gets of it without seeing the score, where it has one mean score at each speedup: the most cost in bits that it saves with a mean
score no lower than the full model's, as a share of what the oracle saves. So do all blocks in INT8, beside it.
"""

import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import baselines
from baselines import bootstrap
from common import format_table
from data import load_articles, outcomes, text_examples
from evaluate import ASKED, SUMMARY, TEXTS, at_hand, make_policy, policy_path, publish, rouge, summaries, summary_prompt
from infer import generate
from policy import Fixed, bit_costs, mean_cost

PIECE = 128  # tokens of a sequence of text


def pieces(examples):
    """Windows of text -> sequences of PIECE tokens; items are sequences as they are."""
    if examples[0].choices is not None:
        return examples
    size = min(PIECE, examples[0].rows.shape[1])
    return text_examples(torch.cat([row for e in examples for row in e.rows.split(size, 1) if row.shape[1] == size]))


def some_articles(args, default):
    return load_articles("cnn_dm", "test", args.data_dir)[: args.limit or (None if args.full else default)]


def spread(values, unit=1, form=".1f"):
    """Values (n,) of examples -> their mean with its 95% interval, as text."""
    low, high = bootstrap(lambda v: v.mean(1), values.tolist())
    return f"{unit * values.mean():{form}} [{unit * low:{form}}, {unit * high:{form}}]"


# ----------------------------------------------------------------------------------------------------------
# hidden

WAYS = ("skip uniformly", "exit early", "skip at random")


def skipping(known, n):
    """The three ways to run n blocks less; at random, in the mean over tokens, and a skip fills keys and values."""
    speedup, filling = known.L / (known.L - n), 4 / (4 - n * (4 - float(known.costs[0])) / known.L)
    return [baselines.unified_skip(known, speedup), baselines.early_exit(known, speedup), baselines.random_skip(known, filling)]


def distances(model, examples, policies):
    """Cosine distance of the normed last hidden state to the full model's, the mean over all tokens but the first: (policies, examples)."""
    out = torch.empty(len(policies), len(examples))
    for n, example in enumerate(tqdm(examples, desc="distances", leave=False)):
        keep, full = example.keep()[:, 1:], model.hidden(example.rows)
        for k, policy in enumerate(policies):
            routed = model.hidden(example.rows, policy(example.rows) if callable(policy) else policy)
            out[k, n] = (1 - F.cosine_similarity(full, routed, dim=-1)[:, 1:][keep]).mean()
    return out


@torch.no_grad()
def hidden(args):
    """Distance of the last hidden state against the share of blocks kept; Rouge-L against cost where --data-dir has cnn_dm."""
    task = args.task or ("wikitext2" if args.data_dir else "lm")
    summarised = args.task in (None, "cnn_dm") and args.data_dir and (Path(args.data_dir) / "cnn_dm").is_dir()
    if summarised:
        rouge()  # not installed: say so before an hour's work
    model, tokenizer, _, known, examples = at_hand(args, task, 3, policy_path(args, task), needed=False)
    L, examples = known.L, pieces(examples)
    counts = sorted({(L - 2) * k // 8 for k in range(8)})
    found = distances(model, examples, [p for n in counts for p in skipping(known, n)]).view(len(counts), len(WAYS), -1)
    gaps = [bootstrap(lambda v: v.mean(1), (exit - uniform).tolist()) for uniform, exit, _ in found[1:]]
    closer, surely = int((found[1:, 0].mean(1) < found[1:, 1].mean(1)).sum()), sum(low > 0 for low, _ in gaps)
    holds = "holds" if surely == len(gaps) else "holds in part" if closer else "does not hold"
    said = (f"Skipping uniformly is closer to the full model than exiting early at {closer} of {len(gaps)} shares of blocks, at {surely} of them "
            f"by more than the 95% interval: that skipping beats exiting {holds} here.")
    tables = [format_table(["blocks kept", *WAYS], [[f"{100 * (L - n) / L:.0f}%", *(spread(v, form=".4f") for v in three)]
                                                    for n, three in zip(counts, found)])]
    figure, kept, rows = Figure(figsize=(11, 4.2), layout="constrained"), [100 * (L - n) / L for n in counts], []
    left, right = figure.subplots(1, 2)
    for way, those in zip(WAYS, found.transpose(0, 1)):
        ends = torch.tensor([bootstrap(lambda v: v.mean(1), v.tolist()) for v in those])
        left.plot(kept, those.mean(1), marker="o", markersize=4, label=way)
        left.fill_between(kept, ends[:, 0], ends[:, 1], alpha=0.2)
    left.set(xlabel="blocks kept, %", ylabel="cosine distance", title=f"Last hidden state, to the full model's; {task}, test")
    left.legend()
    if summarised:
        few, articles = sorted({max(1, L * k // 30) for k in (1, 2, 4)}), some_articles(args, 4)
        full, *rows = summaries(model, tokenizer, articles, [None, *(p for n in few for p in skipping(known, n))])
        for k, way in enumerate(WAYS):
            right.plot(*zip(*[(100 / r["speedup"], 100 * r["rougeL"]) for r in (full, *rows[k :: len(WAYS)])]), marker="o", label=way)
        right.legend()
        each = torch.tensor([r["each"]["rougeL"] for r in rows]).view(len(few), len(WAYS), -1).mean(0)
        said += f" Rouge-L of its summaries, less that of exiting: {spread(each[0] - each[1], 100, '+.1f')} points in the mean."
        cell = lambda r: f"{spread(torch.tensor(r['each']['rougeL']), 100)} ({100 / r['speedup']:.0f}%)"
        tables.append(format_table(["blocks skipped", *few], [
            ["full model", cell(full), *[""] * (len(few) - 1)], *([way, *map(cell, rows[k :: len(WAYS)])] for k, way in enumerate(WAYS))]))
    right.set(xlabel="cost in bits, % of the full model's", ylabel="Rouge-L, %", title="Summaries" if rows else "Summaries: no cnn_dm asked for")
    caption = (f"{task}, test, {len(examples)} sequences of {sum(sum(e.lengths) for e in examples)} tokens: cosine distance of the last hidden "
               "state to the full model's [95% interval over sequences]. "
               + (f"Below: Rouge-L, %, of greedy summaries of cnn_dm, n = {len(articles)} [95% interval] (cost in bits)." if rows else
                  "No summaries: they need cnn_dm in --data-dir, and no --task but cnn_dm."))
    publish(args, "hidden", model, figure, caption=caption, markdown="\n\n".join([said, *tables]), kept=kept, closer=closer, surely=surely,
            distance=dict(zip(WAYS, found.transpose(0, 1).tolist())), summaries=[{k: v for k, v in r.items() if k != "states"} for r in rows])


# ----------------------------------------------------------------------------------------------------------
# oracle

TEMPERATURE, DRAWS = 0.7, 100  # of sampled summaries; times that luck is drawn


def family(known, model, step):
    """Nested paths, from the full model down to its first and last block, `step` blocks apart: [states (L,)].

    The next block to go is the one whose loss adds least KL on training text.
    """
    measure = baselines.measured_kl(model, text_examples(known.samples[:2]), kv="none")
    return baselines.greedy_path(known, measure, math.inf, {4: 0})[::step]


def cheapest(score):
    """score (P, ...) of paths, the full model first, then ever cheaper ones -> index (...) of the last that scores at least as well as it."""
    index = torch.arange(len(score)).view(-1, *[1] * (score.dim() - 1))
    return torch.where(score >= score[0], index, 0).amax(0)


def likelihoods(model, examples, policies, P, seed):
    """Log-likelihood, nats, under K policies, the first P a family: of what is right, mean over tokens (K, n); of the even and of the odd
    tokens (K, n, 2), NaN for items; of what the full model would draw (P, n, DRAWS); and cost in bits, a share of the full model's (K, n)."""
    K, n, generator = len(policies), len(examples), torch.Generator().manual_seed(seed)
    score, halves, lucky, cost = torch.empty(K, n), torch.empty(K, n, 2), torch.empty(P, n, DRAWS), torch.empty(K, n)
    for n, example in enumerate(tqdm(examples, desc="likelihoods", leave=False)):
        for k, policy in enumerate(policies):
            logp, right = (t.cpu() for t in outcomes(model, model.hidden(example.rows, policy), example))
            if k == 0:
                drawn = torch.multinomial(logp.exp(), DRAWS, replacement=True, generator=generator)
            if k < P:
                lucky[k, n] = logp.gather(1, drawn).mean(0)
            of_right = logp.gather(1, right[:, None])[:, 0]
            score[k, n], halves[k, n, 0], halves[k, n, 1] = of_right.mean(), of_right[::2].mean(), of_right[1::2].mean()
            halves[k, n] *= math.nan if example.choices else 1
            cost[k, n] = mean_cost(policy.states[:, example.keep()], bit_costs(model.config, policy)) / 4
    return score, halves, lucky, cost


def rouges(model, tokenizer, articles, policies, P, seed):
    """The same of Rouge-L, 0 to 1: of one sampled summary (K, n), of two (K, n, 2), of P of the full model's in random order (P, n, DRAWS)."""
    K, n, generator, seeds, score = len(policies), len(articles), torch.Generator().manual_seed(seed), itertools.count(10**6 * seed), rouge()
    halves, lucky, cost = torch.empty(K, n, 2), torch.empty(P, n, DRAWS), torch.empty(K, n)
    for n, article in enumerate(tqdm(articles, desc="sampled summaries", leave=False)):
        prompt, chat = summary_prompt(model, tokenizer, article)
        for k, policy in enumerate(policies):
            out = [generate(model, tokenizer, prompt, policy, SUMMARY, TEMPERATURE, next(seeds), chat) for _ in range(2 if k else max(2, P))]
            found = torch.tensor([score(article["highlights"], o["text"]) for o in out])
            if k == 0:
                lucky[:, n] = torch.stack([found[torch.randperm(len(found), generator=generator)[:P]] for _ in range(DRAWS)], 1)
            halves[k, n] = found[:2]
            cost[k, n] = mean_cost(torch.cat([o["states"] for o in out], 1), bit_costs(model.config, policy)) / 4
    return halves[..., 0], halves, lucky, cost


def saved(cost, change):
    """The most cost that one of these policies saves, of those whose mean score is no lower than the full model's: lists -> 0 to 1."""
    return max([1 - c for c, d in zip(cost, change) if d >= 0], default=0.0)


@torch.no_grad()
def oracle(args):
    """--task, or those of three that --data-dir has, else held-out pydocs; each is published on its own."""
    tasks = [args.task] if args.task else ["lm"]
    if not args.task and args.data_dir:
        tasks = [t for t in ("wikitext2", "arc_easy", "cnn_dm") if (Path(args.data_dir) / t).is_dir()]
        if not tasks:
            raise ValueError(f"--data-dir {args.data_dir} has none of wikitext2, arc_easy and cnn_dm; give a folder with one, or --task")
    if "cnn_dm" in tasks:
        rouge()
    for task in tasks:
        path = policy_path(args, task)
        model, tokenizer, [policy, *_], known, examples = at_hand(args, task, 2 if task in TEXTS else 16, path, needed=False)
        plans = family(known, model, 1 if args.full else max(1, (known.L - 2) // 7))
        P, shares = len(plans), torch.tensor([(p > 0).float().mean() for p in plans])
        asked = [s for s in ASKED if policy and policy.prices[0][0] <= s <= policy.prices[-1][0]]
        names = [*(f"{round(100 * float(s))}% of the blocks" for s in shares), "all INT8", *(f"policy, {s:g}x asked" for s in asked)]
        policies = [*(Fixed(p, kv="none") for p in plans), baselines.int8(known, 0)]
        policies += [make_policy("dash", s, known, model, policy, path) for s in asked]
        if task == "cnn_dm":
            sequences, what, unit, form = some_articles(args, 3), "Rouge-L of a sampled summary, points", 100, "+.1f"
            score, halves, lucky, cost = rouges(model, tokenizer, sequences, policies, P, args.seed)
        else:
            sequences, unit, form = pieces(examples), 1, "+.4f"
            what = f"log-likelihood of {PIECE} tokens, nats a token" if task in TEXTS else "log-likelihood of the right answer, nats"
            score, halves, lucky, cost = likelihoods(model, sequences, policies, P, args.seed)
        of = lambda score, pick: score[:P].gather(0, pick[None])[0] - score[0]  # change against the full model's
        pick, by_luck, by_half = cheapest(score[:P]), cheapest(lucky), cheapest(halves[:P])
        change, mean = score - score[0], shares[pick].mean().item()
        same = (shares - mean).abs().argmin()
        line = lambda name, cost, change: [name, spread(cost, 100), spread(change, unit, form)]
        cells = [line("oracle", shares[pick], of(score, pick)), line("luck alone", shares[by_luck].mean(1), of(lucky, by_luck).mean(1))]
        if task in TEXTS:
            cells += [line("chosen by one half, scored on it", shares[by_half].mean(1), of(halves, by_half).mean(1)),
                      line("chosen by one half, scored on the other", shares[by_half].mean(1), of(halves.flip(-1), by_half).mean(1))]
        cells.append(line(f"for all {names[same]}", cost[same], change[same]))
        cells += [line(*those) for those in zip(names[P:], cost[P:], change[P:])] + ([] if asked else [["policy", "no policy", ""]])
        best = {name: saved(cost[a:b].mean(1).tolist(), change[a:b].mean(1).tolist())
                for name, a, b in (("all INT8", P, P + 1), ("policy", P + 1, None)) if name != "policy" or asked}
        closed = {name: s / (1 - mean) if mean < 1 else None for name, s in best.items()}
        part = " and ".join(f"{name} {100 * s:.1f}% of the cost" + ("" if closed[name] is None else f" ({closed[name]:.2f} of the oracle's saving)")
                            for name, s in best.items())
        said = (f"The oracle needs {100 * mean:.1f}% of the blocks (theirs: 23.3%, Rouge-L of their model's summaries); by luck alone it would take "
                f"{100 * shares[by_luck].mean():.1f}%. At no loss in the mean, {part} can be saved without seeing the score.")
        caption = (f"Oracle of {P} nested paths, {task}, test, n = {len(sequences)}: {what} (full model {unit * score[0].mean():.4g}). Cost: % of the "
                   "full model's, in bits (paths: share of blocks); change of score against the full model [95% intervals over sequences]. "
                   "Share closed: the most cost saved with a mean score no lower than the full model's, over what the oracle saves. "
                   f"Policy: {path if asked else 'no policy'}.")
        publish(args, f"oracle-{task}", model, oracle_chart(task, shares, change, cost, unit, what, pick, by_luck, of(score, pick)),
                caption=caption, markdown=f"{said}\n\n" + format_table(["", "cost, %", "change of score"], cells), blocks=mean,
                luck=shares[by_luck].mean().item(), saved=best, closed=closed, paths=[p.tolist() for p in plans], names=names,
                picked=pick.tolist(), cost=cost.tolist(), score=score.tolist())


def oracle_chart(task, shares, change, cost, unit, what, pick, by_luck, gain):
    """Score against cost of what chooses nothing, of the oracle and of policies; and which paths the oracle takes, beside luck."""
    figure, P, x, y = Figure(figsize=(11, 4.2), layout="constrained"), len(shares), 100 * cost.mean(1), unit * change.mean(1)
    left, right = figure.subplots(1, 2)
    left.plot(x[:P], y[:P], marker="o", markersize=4, color="tab:gray", label="one path for all")
    left.plot(100 * shares[pick].mean(), unit * gain.mean(), marker="*", markersize=12, linestyle="none", color="tab:orange", label="oracle")
    left.plot(x[P], y[P], marker="s", linestyle="none", color="black", label="all INT8")
    if len(x) > P + 1:
        left.plot(x[P + 1 :], y[P + 1 :], marker="o", color="tab:blue", label="policy")
    left.set(xlabel="cost in bits, % of the full model's", ylabel="change of score", title=f"{task}, test: {what}")
    left.legend()
    for n, (name, index) in enumerate((("oracle", pick), ("luck alone", by_luck.flatten()))):
        right.bar(torch.arange(P) + 0.4 * n - 0.2, 100 * torch.bincount(index, minlength=P) / len(index), 0.4, label=name)
    right.set_xticks(range(P), [f"{round(100 * float(s))}" for s in shares])
    right.set(xlabel="path taken, % of the blocks", ylabel="% of sequences", title="The cheapest that scores as well as the full model")
    right.legend()
    return figure
