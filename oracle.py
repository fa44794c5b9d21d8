"""Which blocks could be spared? Ways to skip that nobody learned, and an oracle: python bench.py hidden | oracle

Two questions of "Dynamic layer selection in decoder-only transformers" (arXiv 2410.20022), on our model:

    hidden   blocks skipped uniformly, at random, or all after an early exit: how far is the last hidden state from the full model's,
             and what is a summary worth? Theirs: skipping beats exiting
    oracle   for each sequence the cheapest path, of a nested family, that scores at least as well as the full model. Theirs: 23.3% of
             the blocks

An oracle sees the score before it chooses, so a part of what it saves is luck: of many paths one is ahead on this sequence by chance.

    luck alone    the same oracle over the full model drawn anew. Summaries: every path's is another one of the full model's. Likelihoods:
                  what is right is drawn from the full model's distribution, which no other path predicts better in the mean
    cross-check   a path chosen by one half of the evidence (one of two summaries; the even or the odd tokens of a text), scored on the
                  other. One answer to a question has no halves

A policy doesn't see the score. At no loss: the most cost in bits that it saves at one of its speedups with a mean score no lower than
the full model's. As a share of what the oracle saves, this is what it closes of the gap; a policy that quantises can close more than all,
since the paths only skip, so it is also held to their two states. All blocks in INT8 are asked the same.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import baselines
from baselines import for_tokens, interval, spread
from common import format_table
from data import n_tokens, outcomes, pieces, text_examples
from evaluate import (ASKED, SUMMARY, TEXTS, at_hand, folders, make_policy, one_text, policy_path, publish, rouge, some_articles, summaries,
                      summary_prompt, variant)
from infer import generate
from policy import Fixed, bit_costs, mean_cost

# ----------------------------------------------------------------------------------------------------------
# hidden

WAYS = ("skip uniformly", "exit early", "skip at random")


def skipping(known, n):
    """The three ways to run n blocks less; at random: in the mean over tokens, and a skip fills keys and values."""
    speedup = known.L / (known.L - n)
    filling = 4 / (4 - n * (4 - float(known.costs[0])) / known.L)
    return [baselines.unified_skip(known, speedup), baselines.early_exit(known, speedup), baselines.random_skip(known, filling)]


def distances(model, examples, policies):
    """Cosine distance of the normed last hidden state to the full model's, the mean over all tokens but the first: (policies, examples)."""
    out = torch.empty(len(policies), len(examples))
    for n, example in enumerate(tqdm(examples, desc="distances", leave=False)):
        keep = example.keep()[:, 1:]
        full = model.hidden(example.rows)
        for k, policy in enumerate(policies):
            routed = model.hidden(example.rows, for_tokens(policy, example.rows))
            out[k, n] = (1 - F.cosine_similarity(full, routed, dim=-1)[:, 1:][keep]).mean()
    return out.clamp(min=0)  # rounding


@torch.no_grad()
def hidden(args):
    """Distance against the share of blocks kept; Rouge-L against cost, where --data-dir has cnn_dm and --task names no other."""
    task = one_text(args)
    articles = []
    if args.task in (None, "cnn_dm") and args.data_dir and (Path(args.data_dir) / "cnn_dm").is_dir():
        articles = some_articles(args, 3)
        rouge()  # not installed: say so before an hour's work
    model, tokenizer, _, known, examples = at_hand(args, task, 2, needed=False)
    L = known.L
    examples = pieces(examples)
    counts = sorted({(L - 2) * k // 8 for k in range(8)})
    found = distances(model, examples, [p for n in counts for p in skipping(known, n)]).view(len(counts), len(WAYS), -1)
    kept = [100 * (L - n) / L for n in counts]
    gaps = [exit - uniform for uniform, exit, _ in found[1:]]
    closer = sum(g.mean().item() > 0 for g in gaps)
    surely = sum(interval(g)[0] > 0 for g in gaps if len(examples) > 1)
    holds = "holds" if gaps and surely == len(gaps) else "holds in part" if closer else "does not hold"
    said = (f"Skipping uniformly is closer to the full model than exiting early at {closer} of {len(gaps)} shares of blocks, at {surely} "
            f"of them by more than the 95% interval: that skipping beats exiting {holds} here.")
    tables = [format_table(["blocks kept", *WAYS], [[f"{k:.0f}%", *map(spread, three)] for k, three in zip(kept, found)])]
    rows = []
    below = "No summaries: they need cnn_dm in --data-dir and no other --task."
    if articles:
        below = f"Below: Rouge-L, %, of greedy summaries, cnn_dm, test, n = {len(articles)} [95% interval] (cost in bits)."
        few = sorted({max(1, L * k // 30) for k in (1, 2, 4)})
        rows = summaries(model, tokenizer, articles, [None, *(p for n in few for p in skipping(known, n))])
        lines = {"full model": rows[:1]} | {way: rows[1 + k :: len(WAYS)] for k, way in enumerate(WAYS)}
        uniform, exit = (torch.tensor([r["each"]["rougeL"] for r in lines[way]]).mean(0) for way in WAYS[:2])
        said += f" Rouge-L of its summaries less that of exiting, mean of the columns below: {spread(uniform, exit, 100, '+.1f')} points."
        cell = lambda r: f"{spread(r['each']['rougeL'], unit=100, form='.1f')} ({100 / r['speedup']:.0f}%)"
        cells = [[way, *map(cell, line), *[""] * (len(few) - len(line))] for way, line in lines.items()]
        tables.append(format_table(["blocks skipped", *few], cells))
    caption = (f"{task}, test, n = {len(examples)} ({n_tokens(examples)} tokens): cosine distance of the last hidden "
               f"state to the full model's [95% interval over sequences]. {below}")
    publish(args, "hidden", model, caption=caption, markdown="\n\n".join([said, *tables]), n=len(examples), kept=kept, closer=closer, surely=surely,
            distance=dict(zip(WAYS, found.transpose(0, 1).tolist())), summaries=rows)


# ----------------------------------------------------------------------------------------------------------
# oracle

TEMPERATURE, DRAWS = 0.7, 100  # of sampled summaries; times that luck is drawn
SKIPPING = (1.1, 1.33, 1.67)  # speedups asked of a policy that may only skip


def family(known, model, step):
    """Nested paths, from the full model down to its first and last block, `step` blocks apart: [states (L,)].

    The next block to go is the one whose loss adds least KL on training text.
    """
    measure = baselines.measured_kl(model, text_examples(known.samples[:2]), kv="none")
    path = baselines.greedy_path(known, measure, math.inf, {4: 0})
    return path[:-1:step] + path[-1:]


def cheapest(score):
    """score (P, ...) of paths, the full model first, then ever cheaper ones -> index (...) of the last that is at least as good."""
    index = torch.arange(len(score)).view(-1, *[1] * (score.dim() - 1))
    return torch.where(score >= score[0], index, 0).amax(0)


def likelihoods(model, example, policies, P, generator):
    """Log-likelihoods of one sequence, nats, under K policies, of which the first P are paths, the first of all the full model.

    Of what is right, mean over tokens (K,); of its even and its odd tokens (K, 2); of what the full model draws, DRAWS times, under the
    paths (P, DRAWS); and what the policies cost in bits (K,), 1 for the full model.
    """
    right, lucky, cost = [], [], []
    for policy in policies:
        logp, index = (t.cpu() for t in outcomes(model, model.hidden(example.rows, policy), example))
        if not right:
            drawn = torch.multinomial(logp.exp(), DRAWS, replacement=True, generator=generator)
        right.append(logp.gather(1, index[:, None])[:, 0])
        lucky.append(logp.gather(1, drawn).mean(0))
        cost.append(mean_cost(policy.states[:, example.keep()], bit_costs(model.config, policy)) / 4)
    right = torch.stack(right)
    return right.mean(1), torch.stack([right[:, ::2].mean(1), right[:, 1::2].mean(1)], 1), torch.stack(lucky[:P]), torch.tensor(cost)


def rouges(model, tokenizer, article, policies, P, generator):
    """The same of Rouge-L, 0 to 1: of one sampled summary; of two; of P of the full model's, dealt out to the paths DRAWS times; cost."""
    prompt, chat = summary_prompt(model, tokenizer, article)
    score = rouge()
    found = []
    cost = []
    for policy in policies:
        seeds = torch.randint(2**31, (2 if found else P,), generator=generator).tolist()
        out = [generate(model, tokenizer, prompt, policy, SUMMARY, TEMPERATURE, seed, chat) for seed in seeds]
        found.append(torch.tensor([score(article["highlights"], o["text"]) for o in out]))
        cost.append(mean_cost(torch.cat([o["states"] for o in out], 1), bit_costs(model.config, policy)) / 4)
    halves = torch.stack([f[:2] for f in found])
    dealt = [found[0][torch.randperm(P, generator=generator)] for _ in range(DRAWS)]
    return halves[:, 0], halves, torch.stack(dealt, 1), torch.tensor(cost)


def saved(cost, change):
    """The most that one of some policies saves at no loss, 0 to 1: their cost and change of score against the full model's, (K, n) each."""
    return max([1 - c for c, d in zip(cost.mean(1).tolist(), change.mean(1).tolist()) if d >= 0], default=0.0)


@torch.no_grad()
def oracle(args):
    """On --task, or with --data-dir on three tasks, or on held-out pydocs; each is published as it ends."""
    tasks = [args.task] if args.task else folders(args, ["wikitext2", "arc_easy", "cnn_dm"])
    if "cnn_dm" in tasks:
        rouge()  # not installed: say so before an hour's work
    for task in tasks:
        oracle_on(args, task)


def oracle_on(args, task):
    path = policy_path(args, task)
    text = task in TEXTS
    generator = torch.Generator().manual_seed(args.seed)
    model, tokenizer, [policy, *_], known, examples = at_hand(args, task, 2 if text else 16, needed=False)
    plans = family(known, model, 1 if args.full else max(1, (known.L - 2) // 7))
    examples = examples if task == "cnn_dm" else pieces(examples)
    P = len(plans)
    shares = torch.tensor([(p > 0).float().mean() for p in plans])
    asked = [s for s in ASKED if policy and policy.prices[0][0] <= s <= policy.prices[-1][0]]
    # the paths know two states, so also: what the policy does with these alone
    two = variant(policy, model, examples, SKIPPING, allowed=(0, 4)) if policy else []
    groups = {"all INT8": {"all INT8": baselines.int8(known, 0)},
              "policy": {f"policy, {s:g}x asked": make_policy("dash", s, known, model, policy, path) for s in asked},
              "policy, states 0 and 4": {f"policy, states 0 and 4, {s:g}x": p for s, p in zip(SKIPPING, two)}}
    others = {name: p for group in groups.values() for name, p in group.items()}
    policies = [*(Fixed(p, kv="none") for p in plans), *others.values()]
    if task == "cnn_dm":
        sequences = some_articles(args, 2)
        what = "Rouge-L of a sampled summary, %"
        unit = 100
        form = "+.1f"
        evidence = lambda article: rouges(model, tokenizer, article, policies, P, generator)
    else:
        what = f"log-likelihood of {examples[0].rows.shape[1]} tokens, nats a token" if text else "log-likelihood of the right answer, nats"
        sequences, unit, form = examples, 1, "+.4f"
        evidence = lambda example: likelihoods(model, example, policies, P, generator)
    # K policies, the first P of them paths, on n sequences. score, cost (K, n); halves (K, n, 2): the score by either half of the evidence;
    # lucky (P, n, DRAWS): the paths' scores where only chance tells them apart. pick, by_luck, by_half: the path that the oracle takes
    score, halves, lucky, cost = (torch.stack(t, 1) for t in zip(*map(evidence, tqdm(sequences, desc=task, leave=False))))
    score, halves, lucky = unit * score, unit * halves, unit * lucky
    pick = cheapest(score[:P])
    by_luck = cheapest(lucky)
    by_half = cheapest(halves[:P])
    change = score - score[0]
    gain = lambda score, pick: score[:P].gather(0, pick[None])[0] - score[0]
    oracles, luck = shares[pick], shares[by_luck].mean(1)  # of every sequence
    gap = 1 - oracles.mean().item()
    near = (shares - oracles.mean()).abs().argmin()
    rows = [("oracle", oracles, gain(score, pick)), ("luck alone", luck, gain(lucky, by_luck).mean(1))]
    if text:
        rows += [(f"chosen by one half, scored on {where}", shares[by_half].mean(1), gain(those, by_half).mean(1))
                 for where, those in (("it", halves), ("the other", halves.flip(-1)))]
    rows += [("the nearest path for all", cost[near], change[near]), *zip(others, cost[P:], change[P:])]
    cells = [[name, spread(c, unit=100, form=".1f"), spread(d, form=form)] for name, c, d in rows]
    at = {name: P + n for n, name in enumerate(others)}  # where they are in cost and change
    best = {}
    for name, group in groups.items():
        those = [at[member] for member in group]
        most = best[name] = saved(cost[those], change[those]) if those else None
        closed = f", {most / gap:.2f} of the oracle's saving" if most is not None and gap else ""
        cells.append([f"{name}, at no loss", "no policy" if most is None else f"saves {100 * most:.1f}{closed}", ""])
    said = (f"The oracle needs {100 * oracles.mean():.1f}% of the blocks (theirs: 23.3%, by Rouge-L of summaries); by luck alone it would "
            f"take {100 * luck.mean():.1f}%.")
    caption = (f"Oracle over {P} nested paths, {task}, test, n = {len(sequences)}: {what} (full model {score[0].mean():.4g}). Cost in "
               "bits, % of the full model's (of a path: its share of the blocks); change of score against the full model [95% intervals "
               "over sequences]. At no loss: the most cost saved with a mean score no lower than the full model's.")
    publish(args, f"oracle-{task}", model, caption=caption, markdown=f"{said}\n\n{format_table(['', 'cost, %', 'change'], cells)}",
            n=len(sequences), skipping=len(two), blocks=1 - gap, luck=luck.mean().item(), saved=best,
            policy=path if policy else None, paths=[p.tolist() for p in plans],
            picked=pick.tolist(), cost=cost.tolist(), score=score.tolist())
