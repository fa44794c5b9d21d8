"""The compared methods as policies: each says in which state every token runs every block, one routed forward runs them all.

A method is a function of what is known (`Known`) and of the speedup it is asked for (in bits). It returns states (L,) for all
tokens, or what `LLM.forward` takes as a policy, or, where the states depend on the number of tokens, a function of the tokens (B, T)
that returns one (while decoding, what they will be is not known: it gets zeros). ValueError where the speedup is out of reach by skipping.

    full, int8, int4   every block as loaded, in INT8, in INT4 (the speedup asked for is ignored; theirs is reported)
    static_skip        the blocks whose input and output are most similar, skipped for every token, unscaled (ShortGPT, arXiv
                       2403.03853; the paper's "naive static skipping")
    unified_skip       blocks at equal distances, exactly as many as are asked for (Unified Layer Skipping, arXiv 2404.06954)
    early_exit         every token leaves after the same block (the baseline of AdaSkip's release)
    confident_exit     a token leaves after the first block that turns it by less than a threshold (CALM, arXiv 2207.07061, by
                       saturation of the hidden state: its test by the head costs as much as several blocks)
    skipdecode         the later the position, the more of the lower and middle blocks are skipped; the first and the last ones
                       run, and a block once skipped stays so (SkipDecode, arXiv 2307.02628)
    adaskip            attention and MLP apart: of all sublayers the most similar are skipped and replaced by their norm ratio;
                       after 20 decoded tokens also MLPs that proved as similar on them (AdaSkip, arXiv 2501.02336)
    random_skip        each block skipped at random, token by token, unscaled (the paper's Random Skip)
    random_mix         each block in one of two states at random, token by token, at the cost asked for
    static_mix         one state a block for all tokens, the best by the mean damage of each (fisher.py's labels, or measured)
    best_static        the best of five such plans by the KL it is measured to cost on training text; it takes the plans
                       (`static_candidates`) and the measure too
    position_mix       a state for each block and position, blind to content, by the labels' means

The mixes and best_static are ours, to ask what choosing per token is worth at equal cost. `compare` measures all of them. Keys
and values: where what is skipped is the same for all tokens (static_mix and best_static too) or only grows along the text, no later
token asks for them, so they are not made and a skip costs nothing (kv "none"); elsewhere a skip fills them, as for DASH.
The first block runs in state 4 and, but for the exits, the last one runs too; adaskip alone is free to skip either.
"""

import heapq
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import format_table
from data import kl, n_tokens, outcomes
from policy import STATE_OF, STATES, Fixed, bit_costs, lowest_price, mean_cost, position_bucket, possible, random_states, state_shares, static_plan


@dataclass
class Known:
    """What a method may go by: blocks, costs of the states (4,), seed, and what was measured on training text, or None where it was not:
    of the two damages, without a policy."""

    L: int
    costs: torch.Tensor
    seed: int = 0
    scale: list = None  # a_i
    config: object = None  # of the model
    samples: torch.Tensor = None  # (n, T) tokens of training text
    similarity: torch.Tensor = None  # (L, N) cosine of input and output of every block and token
    sublayers: torch.Tensor = None  # (2 L, N) the same of attention and MLP in turn
    ratio: torch.Tensor = None  # (2 L,) their mean |output| / |input|
    damage: torch.Tensor = None  # (L, 4) mean label of each block and state, or what was measured, nats a token
    position_damage: torch.Tensor = None  # (POSITIONS, L, 4) the same by position


def uniform(state):
    """The method that runs all blocks but the first in one state."""
    return lambda known, speedup: Fixed([4] + [state] * (known.L - 1))


full, int8, int4 = uniform(4), uniform(2), uniform(1)


@torch.no_grad()
def profile(model, tokens):
    """What the full model does to tokens (N, T) in every block, a dict of fp64 tensors; n = N (T - 1) tokens.

    Of blocks: "similarity" (L, n) cosine of input x and output y; "norm_ratio" (L,) mean |y| / |x|, "least_squares" (L,) sum<x, y> / sum<x, x>
    (Eq 7); "mean", "std" (L, C) of the RMS-normed x. Of attention and MLP in turn: "sublayers" (2 L, n) the cosine, "ratio" (2 L,) mean |y| / |x|.
    ValueError where a block gives what is not finite.
    """
    ratio = lambda x, y: (y.norm(dim=1) / x.norm(dim=1)).mean()
    found = []
    for x, middle, y in tqdm(model.block_by_block(tokens), desc="calibrate", total=len(model.blocks), leave=False):
        # ours: without the first token, whose norm is a thousand times the others' and would decide a_i alone
        x, middle, y = (t.view(*tokens.shape, -1)[:, 1:].flatten(0, 1).double() for t in (x, middle, y))
        if not y.isfinite().all():
            raise ValueError(f"{model.name}: what its block {len(found) + 1} gives is not finite; the weights are corrupt, download them again")
        normed = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        found.append({"similarity": F.cosine_similarity(x, y), "norm_ratio": ratio(x, y), "least_squares": (x * y).sum() / (x * x).sum(),
                      "mean": normed.mean(0), "std": normed.std(0, correction=0).clamp(min=1e-6),
                      "sublayers": torch.stack([F.cosine_similarity(x, middle), F.cosine_similarity(middle, y)]),
                      "ratio": torch.stack([ratio(x, middle), ratio(middle, y)])})
    found = {key: torch.stack([f[key] for f in found]).cpu() for key in found[0]}
    return found | {key: found[key].flatten(0, 1) for key in ("sublayers", "ratio")}


def observe(known, model):
    """Fill in what `profile` finds on `samples`: `similarity`, `sublayers`, `ratio`. Returns all that it finds."""
    found = profile(model, known.samples)
    known.similarity, known.sublayers, known.ratio = (found[key].float() for key in ("similarity", "sublayers", "ratio"))
    return found


def floor(top):
    """A limit as text, rounded down: what is named can be asked for."""
    return f"{math.floor(100 * top) / 100:g}"


def skips(known, speedup, fill=0.0):
    """How many of the blocks between first and last must be skipped for a speedup in bits, a float; fill: what a skip costs."""
    L = known.L
    number = L * (4 - 4 / speedup) / (4 - fill)
    if not 0 <= number <= L - 2:
        raise ValueError(f"speedup {speedup:g} is out of reach by skipping: give 1 to {floor(L / (L - (L - 2) * (1 - fill / 4)))}")
    return number


def free_skips(costs):
    """Costs of the states (4,) where all tokens skip the same blocks: nobody asks for their keys and values, so none are made."""
    return torch.cat([torch.zeros_like(costs[:1]), costs[1:]])


def one_plan(states, scale=None):
    """The same states (L,) for all tokens."""
    return Fixed(states, scale, kv="none" if (states == 0).any() else "fill")


def without(known, blocks):
    """All tokens skip these blocks, an index."""
    states = torch.full((known.L,), 4)
    states[blocks] = 0
    return one_plan(states)


def to_two_digits(speedup):
    """The least speedup that rounds to this one: 1.67 stands for 5/3."""
    return max(1.0, speedup - 0.005)


def whole_skips(known, speedup):
    """The fewest blocks that give the speedup asked for."""
    skips(known, speedup)  # out of reach: say so
    return math.ceil(skips(known, to_two_digits(speedup)) - 1e-9)


def by_similarity(known):
    """The blocks between first and last, the most similar first."""
    return (known.similarity.mean(1)[1:-1].argsort(descending=True) + 1).tolist()


def static_skip(known, speedup):
    return without(known, by_similarity(known)[: whole_skips(known, speedup)])


def unified_skip(known, speedup):
    n = whole_skips(known, speedup)
    return without(known, [1 + (2 * k + 1) * (known.L - 2) // (2 * n) for k in range(n)])


def early_exit(known, speedup):
    return without(known, slice(known.L - whole_skips(known, speedup), known.L))


class ConfidentExit(Fixed):
    """A token skips all blocks after the first one whose output has cosine >= threshold with its input."""

    def __init__(self, L, threshold):
        super().__init__([4] * L)
        self.threshold = threshold

    def decide(self, i, x, start):
        if i:
            left = (self.states[i - 1] == 0) | (F.cosine_similarity(self.before.float(), x.float(), dim=-1) >= self.threshold)
            self.states[i] = torch.where(left, 0, 4)
        self.before = x


def confident_exit(known, speedup):
    skips(known, speedup, float(known.costs[0]))  # out of reach: say so
    highest = known.similarity.cummax(0).values[:-1]  # (L - 1, N): a token skips block i + 1 once this reaches the threshold at i

    def cost_at(leniency):  # of the threshold -leniency: the lower it is, the more tokens leave
        return (4 + (known.L - 1) * mean_cost(torch.where(highest >= -leniency, 0, 4), known.costs)) / known.L

    return ConfidentExit(known.L, -lowest_price(cost_at, 4 / speedup, -1.0, 1.0))


def skipdecode(known, speedup):
    mean = skips(known, speedup)
    most = known.L - 2
    first, last = max(0.0, 2 * mean - most), min(2 * mean, most)  # skipped at the first and the last position

    def draw(tokens):
        T = tokens.shape[1]
        number = (first + (last - first) * (torch.arange(T) + 0.5) / T).round()
        block = torch.arange(known.L)[:, None]
        return Fixed(torch.where((block > 0) & (block <= number), 0, 4)[:, None], kv="none")

    return draw


class AdaSkip(Fixed):
    """Sublayers skipped from the start, and after `WARMUP` decoded tokens of a text also the MLPs, but the last, whose mean similarity on those
    tokens reaches the threshold: that of the least similar sublayer skipped from the start."""

    WARMUP = 20
    threshold = 1.0  # `adaskip` lowers it

    def decide(self, i, x, start):
        super().decide(i, x, start)
        if start == 0 or x.shape[1] > 1:  # a prompt
            self.decoded = 0
            self.found = torch.zeros(len(self.scale))
            return
        self.decoded += i == 0
        if self.decoded <= self.WARMUP:
            if i % 2 == 0 and i:  # x is the output of the MLP before
                self.found[i - 1] += F.cosine_similarity(self.before.float(), x.float(), dim=-1).mean().item() / self.WARMUP
            self.before = x
        elif i % 2 and self.found[i] >= self.threshold:
            self.states[i] = 0


def adaskip(known, speedup):
    similarity = known.sublayers.mean(1)
    policy = AdaSkip([4] * (2 * known.L), known.ratio.tolist(), kv="none")
    costs = bit_costs(known.config, policy)
    for i in similarity.argsort(descending=True).tolist():
        if mean_cost(policy.given, costs) <= 4 / to_two_digits(speedup) + 1e-6:
            return policy
        policy.given[i] = 0
        policy.threshold = float(similarity[i])
    raise ValueError(f"speedup {speedup:g} is out of reach by skipping")


def random_skip(known, speedup):
    share = skips(known, speedup, float(known.costs[0])) / (known.L - 2)
    generator = torch.Generator().manual_seed(known.seed)

    def draw(tokens):
        states = torch.where(torch.rand(known.L, *tokens.shape, generator=generator) < share, 0, 4)
        states[0], states[-1] = 4, 4
        return Fixed(states)

    return draw


def random_mix(known, speedup):
    generator = torch.Generator().manual_seed(known.seed)
    return lambda tokens: Fixed(random_states((known.L, *tokens.shape), 4 / speedup, known.costs, generator), known.scale)


def static_mix(known, speedup):
    return one_plan(static_plan(known.damage, free_skips(known.costs), 4 / speedup)[1], known.scale)


def best_static(known, candidates, measure, speedup):
    """The best by `measure(states)` of what the candidates of `static_candidates` give for a speedup."""
    return one_plan(min((candidate(speedup) for candidate in candidates), key=measure), known.scale)


def position_mix(known, speedup):
    damage = possible(known.position_damage)
    costs = known.costs.cpu()

    def draw(tokens):  # within the cost asked for in a window as long as this one
        of_tokens = damage[position_bucket(torch.arange(tokens.shape[1]))].transpose(0, 1)  # (L, T, 4)
        at = lambda mu: STATES[(of_tokens + mu * costs).argmin(-1)]
        return Fixed(at(lowest_price(lambda mu: mean_cost(at(mu), costs), 4 / speedup))[:, None], known.scale)

    return draw


def static_candidates(known, alone, measure, targets):
    """Five ways to order blocks for a static plan: [function of a speedup -> states (L,)].

    By sensitivity in INT8, in INT4, their sum (alone (L, 4): measured KL of each block and state alone), by the labels' mean,
    and a greedy search over `measure(states)`, the measured KL of a plan.
    """
    typical = alone[1:].mean(0)
    tables = [known.damage]
    for score in (alone[:, 2], alone[:, 1], alone[:, 1] / typical[1] + alone[:, 2] / typical[2]):
        damage = score[:, None] / score[1:].mean() * typical
        damage[:, 0] = alone[:, 0]  # whether a block can be skipped does not follow from how it bears rounding
        tables.append(damage)
    path = greedy_path(known, measure, max(targets))
    costs = free_skips(known.costs)
    within = lambda speedup: next(states for states in path if mean_cost(states, costs) <= 4 / speedup + 1e-6)
    return [lambda speedup, d=damage: static_plan(d, costs, 4 / speedup)[1] for damage in tables] + [within]


@torch.no_grad()
def sensitivities(model, examples, scale, states=(0, 1, 2)):
    """KL to the full model when one block alone runs in one state, in nats for each token that was run: (L, 4) over STATES.

    The first block is not decided, the last is not skipped: their entries stay 0 where nothing is to be measured.
    Every run starts at its block, from the full model's hidden states.
    """
    L = len(model.blocks)
    damage = torch.zeros(L, 4)
    tokens = n_tokens(examples)
    for example in tqdm(examples, desc="sensitivity", leave=False):
        R, T = example.rows.shape
        inputs = [x for x, _, _ in model.block_by_block(example.rows)]
        rope = model.rope(0, T)

        def predict(i, state):  # block i alone in this state
            x = inputs[i]
            for j in range(i, L):
                x = model.blocks[j](x, R, [(state if j == i else 4, None)], scale[j], rope)
            return outcomes(model, model.norm(x).view(R, T, -1), example)[0]

        full = predict(L - 1, 4)
        for i in range(1, L):
            for s in [s for s in states if s or i < L - 1]:
                damage[i, s] += float(kl(full, predict(i, s)).sum()) / tokens
    return damage


def measured_kl(model, examples, scale=None, kv="fill"):
    """A function of states (L,): the KL that they are measured to cost on these examples, nats, a float."""
    full = [outcomes(model, model.hidden(e.rows), e)[0] for e in examples]
    kl_of = lambda f, e, policy: kl(f, outcomes(model, model.hidden(e.rows, policy), e)[0]).mean().item()
    return lambda states: sum(kl_of(f, e, Fixed(states, scale, kv)) for f, e in zip(full, examples)) / len(examples)


def greedy_path(known, measure, speedup, lower={4: 2, 2: 1, 1: 0}):
    """Lower one block by one move at a time, always where KL grows least per cost saved: [states (L,)], from all 4 down.

    lower: the moves, state -> next state. A move keeps its last measured price until it comes up; then it is measured anew (lazy greedy).
    """
    costs = free_skips(known.costs)
    cost = dict(zip(STATE_OF, costs.tolist()))
    path = [torch.full((known.L,), 4, dtype=torch.uint8)]  # all plans
    current = 0.0  # the KL of the last
    queue = [(-math.inf, i, 0, 0.0) for i in range(1, known.L)]  # KL per cost saved, block, plans there were when it was measured, KL
    bar = tqdm(desc="greedy static plan, plans measured", leave=False)
    while queue and mean_cost(path[-1], costs) > 4 / speedup + 1e-6:
        _, i, when, found = heapq.heappop(queue)
        state = int(path[-1][i])
        to = lower.get(state)
        if to is None or to == 0 and i == known.L - 1:  # as low as it goes: the last block is never skipped
            continue
        trial = path[-1].clone()
        trial[i] = to
        if when == len(path):  # no other move was made since it was measured
            path.append(trial)
            current = found
            heapq.heappush(queue, (-math.inf, i, 0, 0.0))
        else:
            found = measure(trial)
            bar.update()
            heapq.heappush(queue, ((found - current) / (cost[state] - cost[to]), i, len(path), found))
    bar.close()
    return path


# ----------------------------------------------------------------------------------------------------------
# Comparison


def by_name(method, known, speedup):
    """What a method of this file gives, bare states (L,) as the plan that they are. ValueError where it gives nothing of the kind."""
    found = globals()[method](known, speedup)
    if isinstance(found, (list, torch.Tensor)):
        states = torch.as_tensor(found)
        if len(states) != known.L or not torch.isin(states, STATES).all():
            raise ValueError(f"{method} gives {found}; give {known.L} states of 0, 1, 2 and 4")
        return one_plan(states)
    if not (hasattr(found, "decide") or callable(found)):
        raise ValueError(f"{method} gives {found!r}; give states, a policy, or a function of the tokens that returns one")
    return found


def for_tokens(policy, tokens):
    """What `LLM.forward` takes: a policy, which may be an nn.Module, as it is, or what a function of the tokens (B, T) int64 gives."""
    return policy if policy is None or hasattr(policy, "decide") else policy(tokens)


@torch.no_grad()
def compare(model, examples, policies):
    """Each policy against the full model on examples: a list of dicts with means over examples.

    nats: -log p of what is right; kl: KL(full || routed), nats; top1: share of equal most likely outcomes; accuracy: share of
    right ones; speedup: in bits; states: shares; raw: states (L, N), of the full model a placeholder; each: nats, kl and accuracy of every
    example, for intervals. A policy given as None is the full model; a function of the tokens (B, T) gives one for every example.
    """
    rows = [{"nats": [], "kl": [], "top1": [], "accuracy": [], "states": [], "spent": []} for _ in policies]
    for example in tqdm(examples, desc="compare", leave=False):
        full, right = outcomes(model, model.hidden(example.rows), example)
        for row, policy in zip(rows, policies):
            routed = full
            if policy is not None:
                policy = for_tokens(policy, example.rows)
                routed = outcomes(model, model.hidden(example.rows, policy), example)[0]
                states = policy.states[:, example.keep()].cpu()
                row["states"].append(states)
                row["spent"].append(states.shape[1] * mean_cost(states, bit_costs(model.config, policy)))  # which may differ by example
            row["nats"].append(-routed.gather(1, right[:, None]).mean().item())
            row["kl"].append(kl(full, routed).mean().item())
            row["top1"].append((routed.argmax(-1) == full.argmax(-1)).float().mean().item())
            row["accuracy"].append((routed.argmax(-1) == right).float().mean().item())
    out = []
    for row in rows:
        ran, spent = row.pop("states"), row.pop("spent")
        states = torch.cat(ran, 1) if ran else torch.full((1, 1), 4)
        means = {k: sum(v) / len(v) for k, v in row.items()}
        out.append(means | {"speedup": 4 * states.shape[1] / sum(spent) if spent else 1.0, "states": state_shares(states),
                            "each": {k: [round(x, 6) for x in row[k]] for k in ("nats", "kl", "accuracy")}, "raw": states})
    return out


def bootstrap(statistic, *values):
    """95% bootstrap interval over examples: paired lists (n,) -> (low, high) of statistic(tensors (2000, n)). Of few examples it covers
    less: of n normal numbers 50% for n = 2, 75% for 3, 81% for 4, 88% for 8, 92% for 20, by simulation."""
    pick = torch.randint(len(values[0]), (2000, len(values[0])), generator=torch.Generator().manual_seed(0))
    found = statistic(*(torch.as_tensor(v, dtype=torch.float64)[pick] for v in values))  # a list of whole numbers too
    return found.quantile(0.025).item(), found.quantile(0.975).item()


def interval(values):
    """95% interval of the mean of values (n,): (low, high)."""
    return bootstrap(lambda v: v.mean(1), values)


def quotient(a, b):
    """sum(a) / sum(b) of paired values (n,), and its 95% interval: (quotient, (low, high))."""
    return sum(a) / sum(b), bootstrap(lambda a, b: a.sum(1) / b.sum(1), a, b)


def spread(values, base=0, unit=1, form=".4f"):
    """The mean of values (n,), or of their paired difference to base (n,), with its 95% interval, as text."""
    values, base = (torch.as_tensor(v, dtype=torch.float64) for v in (values, base))
    low, high = interval(unit * (values - base))
    return f"{(unit * (values - base)).mean():{form}} [{low:{form}}, {high:{form}}]"


def public(row):
    """What of a row of `compare` goes into results/: all but the states of every token."""
    return {k: v for k, v in row.items() if k != "raw"}


def comparison_table(names, rows, choice):
    """The comparison as a Markdown table, for the terminal and the README; in brackets 95% intervals over examples."""
    key, unit, digits = ("accuracy", 100, 1) if choice else ("nats", 1, 4)
    cells = []
    for name, r in zip(names, rows):
        change = spread(r["each"][key], rows[0]["each"][key], unit, f"+.{digits}f") if r is not rows[0] else ""
        cells.append([name, f"{r['speedup']:.2f}x", f"{unit * r[key]:.{digits}f}", change, spread(r["each"]["kl"]) if r is not rows[0] else "",
                      f"{100 * r['top1']:.1f}%", ", ".join(f"{100 * r['states'][s]:.0f}%" for s in ("0", "1", "2", "4"))])
    return format_table(["", "speedup in bits", "accuracy, %" if choice else "nats", "change", "KL to full", "top-1 agreement",
                         "skip, INT4, INT8, full"], cells)
