"""Train a routing policy for a real LLM and show what it does:   python train.py

    1  calibrate   a_i of every block from 128 samples (Eq 6-7); mean and deviation of the blocks' inputs, averaged over blocks, by which the
                   scorer standardises (baselines.profile)
    2  round       INT4 codes by GPTQ, block after block; kept in the cache for the next run (quant.py)
    3  learn       what damage each (token, block, state) does, and a scorer that predicts it from the hidden state:
                   --objective fisher   labels from gradients of the full model (ours; the default; fisher.py)
                   --objective rl       the paper's policy gradient (Eq 11-17), started from static sensitivities (reinforce.py)
    4  price       the mu of `argmax q - mu cost` for every speedup between 1.2 and 4.5; before that, of fisher, how far a token's own
                   prediction of what a skip does is to be trusted (`trust_skips`)
    5  compare     on held-out text or items: full model, DASH, static, all INT8, random states

    --objective flexidepth | mindskip | gate-hidden | gate-fixed | gate-mlp   trains the gates of routers.py instead, with --skip blocks
    skipped a token; only steps 3 and 5, into router.safetensors.

`--data arc_easy` and the like learn on multiple-choice items: what is predicted is then the answer (data.Example), in labels,
rewards and comparison alike. `--train-model` goes on to train the base model through its rounded weights (Eq 17, reinforce.py).

Writes into --out: policy.safetensors (what infer.py and bench.py use), train.json (the table), train.jsonl (a line an epoch
or step), train.png, and checkpoint.safetensors, from which --resume goes on after a crash and gets to the same policy, on a
CPU bit for bit (checkpoint.begun: until its first is written); with --train-model also model.safetensors and its checkpoint, base.safetensors.
"""

import copy
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import fisher
import reinforce
import routers
from baselines import Known, by_similarity, compare, comparison_table, free_skips, observe, one_plan, profile, public, quotient, without
from charts import draw
from common import BEGAN, Checkpoint, Parser, command_line, count, device_name, folder, lock_folder, pick_device, save_result, sha256
from data import CHOICE_TASKS, Example, is_choice, load_examples, load_text, n_tokens, text_examples, windows
from model import load
from policy import (Fixed, Policy, Scorer, bit_costs, goal_cost, latency_costs, lowest_price, mean_cost, most_speedup, plan, random_states,
                    state_shares, static_plan)
from quant import cache_codes, codes_name

SAMPLES, SAMPLE_TOKENS = 128, 64  # calibration of a_i
TARGETS = [1.2, 1.33, 1.5, 1.67, 1.8, 1.9, 2.0, 2.2, 2.4, 2.67, 2.9, 3.2, 3.5, 3.75, 4.0, 4.25, 4.5]  # speedups with a price
TRUST = [1.0, 0.6, 0.3]  # shares of what the scorer adds to a block's mean log damage of skips
WINDOW, POOL = 256, 64  # tokens of a window, and windows at most, that INT4 rounding and the policy gradient see
LONG = 1024  # tokens of a window for Fisher labels, prices, tests and the training of the base


# ----------------------------------------------------------------------------------------------------------
# 4 Prices


@torch.no_grad()
def calibrate_prices(policy, model, examples, targets, goals):
    """Find the price of every target speedup: sets policy.prices to [(speedup, mu)]. goals: the mean cost of a block that each asks for.

    1. Open loop: q, computed once from the full model's hidden states (`look_at`), gives the states and so the mean cost at any mu without
       running the model (`cost_at`); mu is found by bisection. Exact where the whole path is planned after the first block, which runs in full.
    2. Closed loop, for shorter horizons, where the scorer sees what earlier choices have changed: all targets run once on a few short
       examples at the prices of step 1. What they cost more than step 1 foresaw is taken off their goals, and the bisection is repeated.
    """
    L = len(policy.scale)
    device = examples[0].rows.device
    plans = {i: blocks for i in range(L) if (blocks := plan(i, L, policy.horizon))}
    policy.tracked = None  # or every text would start at the old price

    def look_at(examples):
        """q of every decision by the full model's hidden states: {blocks: (1, N, g, 4, 4)}."""
        looks = {blocks: [] for blocks in plans.values()}
        for example in tqdm(examples, desc="prices", leave=False):
            for i, (x, _, _) in zip(range(max(plans) + 1), model.block_by_block(example.rows)):
                if i in plans:
                    q = policy.scorer(policy.scorer.features(x.view(*example.rows.shape, -1), 0), plans[i])
                    looks[plans[i]].append(q[example.keep()][None])
        return {blocks: torch.cat(each, 1) for blocks, each in looks.items()}

    def cost_at(mu, looks):
        policy.mu = mu
        states = torch.full((L, 1, next(iter(looks.values())).shape[1]), 4, dtype=torch.uint8, device=device)
        for blocks, q in looks.items():
            states[blocks[0] : blocks[-1] + 1] = policy.choose(q, states[blocks[0] - 1])
        return mean_cost(states, policy.costs)

    looks = look_at(examples)
    steps = policy.costs.sort().values.diff()
    gap = float(steps[steps > 1e-6].min())  # on a clock a skip can cost what INT4 does
    # beyond this price no choice changes: the widest range of q over the smallest step of cost
    span = max(float(q.max() - q.masked_fill(q.isinf(), 0).min()) for q in looks.values()) / gap
    price = lambda goal: lowest_price(lambda mu: cost_at(mu, looks), goal, -span, span)
    mus = [price(goal) for goal in goals]
    if policy.horizon < L:
        few = [Example(e.rows[:, :WINDOW], [min(n, WINDOW) for n in e.lengths]) for e in examples[:4]]
        few_looks = look_at(few)
        ran = [[] for _ in targets]
        for example in tqdm(few, desc="prices, closed loop", leave=False):
            R = len(example.rows)
            policy.mu = torch.tensor(mus).repeat_interleave(R).to(device)
            model.hidden(example.rows.repeat(len(targets), 1), policy)
            for n, states in enumerate(policy.states.split(R, dim=1)):
                ran[n].append(states[:, example.keep()])
        added = [mean_cost(torch.cat(states, 1), policy.costs) - cost_at(mu, few_looks) for states, mu in zip(ran, mus)]
        mus = [price(goal - more) for goal, more in zip(goals, added)]
    policy.prices = list(zip(targets, sorted(mus)))  # a higher speedup never has a lower price
    policy.mu = None


def trust_skips(policy, model, examples):
    """Hold what the scorer predicts of skips to what they are measured to do (ours): (the policy to use, the share of TRUST it got).

    A skip is too large a change for second-order labels, and how far they mislead differs by model. So the spread of the predictions around
    the block's mean, in logarithms, is tried at every share of TRUST, priced to cost what INT4 everywhere does with every tenth block
    skipped. The share of least KL on `examples` is taken, if the 95% interval over them says that it is better than 1.
    """
    L = len(policy.scale)
    skip, int4 = policy.costs[:2].tolist()
    goal = (4 + (L - 1) * (0.1 * skip + 0.9 * int4)) / L
    trials = []
    for share in TRUST:
        trial = copy.deepcopy(policy)
        trial.scorer.third.weight.data[0] *= share
        calibrate_prices(trial, model, examples, [4 / goal], [goal])
        trials.append(trial.at(4 / goal))
    kls = [row["each"]["kl"] for row in compare(model, examples, [None, *trials])[1:]]
    best = min(range(len(TRUST)), key=lambda n: sum(kls[n]))
    if best:
        _, (_, high) = quotient(kls[best], kls[0])
        best = best if high < 1 else 0
    return trials[best], TRUST[best]


# ----------------------------------------------------------------------------------------------------------
# 5 Compare


def at_its_cost(policy, damage, test, seed):
    """What DASH is compared with: a static plan by `damage` (L, 4) and random states, both at what it has just spent on the same example, and
    all INT8."""
    L = len(policy.scale)
    generator = torch.Generator().manual_seed(seed)
    free = free_skips(policy.costs) if policy.settings["cost"] == "bits" else policy.costs  # the clock has only timed skips that fill keys and values

    def spent(rows):
        """The mean cost of DASH, which `compare` runs just before the others, padding left out."""
        example = next(e for e in test if e.rows is rows)
        return mean_cost(policy.states[:, example.keep()], policy.costs)

    static = lambda rows: one_plan(static_plan(damage, free, spent(rows))[1], policy.scale)
    equal = lambda rows: Fixed(random_states((L, *rows.shape), spent(rows), policy.costs, generator), policy.scale)
    return static, equal, Fixed([4] + [2] * (L - 1))


def report(out, names, rows, test, args, model, settings, how, wrote):
    """5: the comparison to the terminal, train.png and train.json. rows: of `compare`, the second that of what was trained."""
    choice = is_choice(args.data)
    markdown = comparison_table(names, rows, choice)
    log = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    tokens = n_tokens(test)
    seconds = round(time.time() - BEGAN)
    caption = f"Held-out {args.data}, {len(test)} {'items' if choice else 'windows'}, {tokens} tokens, fp32, {how}; {seconds} s in all."
    states = rows[1]["raw"]
    L = model.config.n_layer
    save_result(out / "train.json", model, args.seed, caption=caption, markdown=markdown, tokens=tokens, settings=settings,
                rows=[{"name": name} | public(row) for name, row in zip(names, rows)], log=log,
                shares=[state_shares(block) for block in states[:: len(states) // L]])  # of sublayers the first
    print(f"\n{markdown}\n\n{caption} On {device_name(model.device)}.")
    draw(out / "train.json")
    print(f"wrote {wrote}, train.json, train.jsonl and train.png into {out}")


# ----------------------------------------------------------------------------------------------------------
# The command line


def arguments():
    p = Parser(__doc__)
    p.add_argument("--data", default="pydocs",
                   help="pydocs (the default), wikitext2, cnn_dm, arc_easy, arc_challenge, mmlu, a text file, or a .jsonl of items")
    p.add_argument("--data-dir", type=folder, help="folder with wikitext2/train.txt, arc_easy/train.jsonl and so on; without it they come from the hub")
    p.add_argument("--speedup", type=float, default=2.0,
                   help="speedup to show, and to train for with rl or --train-model (%(default)s); any is served later")
    p.add_argument("--cost", default="bits", choices=["bits", "latency"],
                   help="what a speedup counts: bits (the default) or latency, which needs bench.py speed")
    p.add_argument("--horizon", type=int, help="blocks decided from one hidden state: 1 is the paper, 0 each from its own input; default all at once")
    p.add_argument("--objective", default="fisher", choices=["fisher", "rl", *routers.KINDS],
                   help="fisher labels (the default), the paper's policy gradient, or the gates of routers.py")
    p.add_argument("--skip", type=int, help="gates: how many of its blocks (mindskip: attentions) a token skips in the mean")
    p.add_argument("--samples", type=count, default=12, help="fisher: windows of 1,024 tokens to label (%(default)s)")
    p.add_argument("--steps", type=count, help="steps of the policy gradient (40) or of the gates (150)")
    p.add_argument("--train-model", action="store_true", help="then train the base model too, for --steps steps; writes model.safetensors")
    p.add_argument("--start", help="rl: a policy whose scorer to start from, instead of static sensitivities")
    p.add_argument("--lam", type=float, default=reinforce.LAM, help="rl: weight of smoothness between the states of neighbouring blocks (Eq 8)")
    p.add_argument("--beta", type=float, help="rl: weight of the efficiency reward (Eq 12); default four times the price it starts from")
    p.add_argument("--no-weights", action="store_true", help="rl: w_i = 1 for every block (Eq 14 left out)")
    p.add_argument("--out", default="out", help="folder to write into (%(default)s)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    args = p.parse_args()
    gates = args.objective in routers.KINDS
    if args.steps is None and (args.objective != "fisher" or args.train_model):  # labels have no steps
        args.steps = 150 if gates else 40
    if gates and (args.train_model or args.cost != "bits" or args.horizon is not None):
        raise ValueError("--train-model, --cost and --horizon are for the scorer of --objective fisher or rl")
    if args.skip is not None and not gates:
        raise ValueError(f"--skip is for --objective {', '.join(routers.KINDS)}; give --speedup")
    if args.horizon is not None and args.horizon < 0:
        raise ValueError(f"--horizon {args.horizon}: give 0 or more")
    if args.objective != "rl" and (args.start or args.lam != reinforce.LAM or args.beta is not None or args.no_weights):
        raise ValueError("--start, --lam, --beta and --no-weights are for --objective rl")
    if not all(0 <= v < 1e30 for v in (args.lam, args.beta or 0.0)):
        raise ValueError("--lam and --beta must be 0 or more, and below 1e30")
    if args.data_dir and args.data not in (*CHOICE_TASKS, "wikitext2", "cnn_dm"):
        raise ValueError(f"--data {args.data} does not come from --data-dir: name a data set that does, or leave --data-dir out")
    return args


def refuse_own_input(args, base):
    """ValueError where a run would write over what it reads, or beside it what would be read in its place. base: the untrained model's name."""
    reads = [args.data, f"{args.data_dir}/{args.data.removesuffix('_5shot')}/train.jsonl", args.model, *([args.start] if args.start else [])]
    reads += [f"{base}/model.safetensors"] if base != "smollm2" else []
    writes = ["policy.safetensors", "router.safetensors", "checkpoint.safetensors", "train.json", "train.jsonl", "train.png"]
    writes += ["model.safetensors", "base.safetensors"] if args.train_model else []
    both = {os.path.realpath(file) for file in reads} & {os.path.realpath(Path(args.out) / name) for name in writes}
    if both:
        raise ValueError(f"--out {args.out}: this run would write {both.pop()}, which is, or replaces, what it reads; give another --out")


def digest(text):
    """12 digits that tell --resume whether it reads the same text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def up_to(tokens, examples):
    """The first examples that fill so many tokens."""
    sizes = torch.tensor([sum(e.lengths) for e in examples]).cumsum(0)
    return examples[: int((sizes < tokens).sum()) + 1]


def train_routers(args, text, model, tokenizer, read, some):
    """--objective flexidepth and the like: the gates of routers.py, at --skip skipped blocks a token."""
    c = model.config
    if c.n_layer < 4:
        raise ValueError(f"{args.model} has {c.n_layer} blocks; gates need a model of at least 4")
    policy = routers.Router(args.objective, c.n_layer, c.n_embd, c.n_hidden, model.fingerprint())
    if args.skip is None or not 0 < args.skip < len(policy.routed):
        raise ValueError(f"--objective {args.objective} needs --skip, 1 to {len(policy.routed) - 1} of this model's {c.n_layer} blocks")
    examples = read("train", 10**6, routers.WINDOW)
    test = read("test", 200 if is_choice(args.data) else 4, LONG)
    out = lock_folder(args.out)
    settings = policy.settings = {
        "model": args.model, "data": args.data, "objective": args.objective, "skip": args.skip, "steps": args.steps, "seed": args.seed,
        "fingerprint": policy.fingerprint, "text": digest(text)}
    checkpoint = Checkpoint(out / "checkpoint.safetensors", settings, args.seed, args.resume)
    samples = windows(tokenizer, text, 8, min(WINDOW, c.block_size), args.data, spread=True).to(model.device)
    known = Known(c.n_layer, bit_costs(c), config=c, samples=samples)
    observe(known, model)
    routers.begin(policy.to(model.device), known, args.skip)
    with checkpoint.log(out / "train.jsonl") as log:
        routers.train_gates(policy, model, examples, args.skip, args.steps, checkpoint, log)
    routers.calibrate(policy, model, some(2), args.skip)  # late tokens skip more
    policy.save(out / "router.safetensors")

    names = ["full model", args.objective, f"{args.skip} most similar blocks skipped"]
    rows = compare(model, test, [None, policy, without(known, by_similarity(known)[: args.skip])])
    report(out, names, rows, test, args, model, settings,
           f"objective {args.objective}, {args.skip} skips asked for", "router.safetensors")


def reachable(args, model, horizon):
    """What the states cost (4,), what a token costs besides its blocks (`latency_costs`), and the speedups to find prices for. ValueError where
    --speedup is not among them."""
    L = model.config.n_layer
    costs, overhead = (bit_costs(model.config), (0.0, 0.0)) if args.cost == "bits" else latency_costs(
        f"results/speed-{model.device.type}.json", model.device, model.fingerprint(), horizon)
    most = most_speedup(L, costs, overhead)
    targets = [s for s in TARGETS if s <= most]
    if not targets:
        raise ValueError(f"{args.model} reaches {max(1.0, most):.2f}x at most with --cost {args.cost}, and policies are made for {TARGETS[0]}x and "
                         "more; give a model of more blocks")
    if not targets[0] <= args.speedup <= targets[-1]:
        raise ValueError(f"--speedup {args.speedup:g} is out of reach: give {targets[0]} to {targets[-1]:.3g}")
    return costs, overhead, targets


def train_scorer(args, text, model, tokenizer, read, some):
    """--objective fisher or rl: the five steps above."""
    L = model.config.n_layer
    context = model.config.block_size
    choice = is_choice(args.data)
    horizon = L if args.horizon is None else min(args.horizon, L)
    start = Policy.load(args.start) if args.start else None
    if start:
        start.check(model)
        start.at(args.speedup)  # which the gradient starts from
        if start.horizon != horizon or start.settings.get("cost") != args.cost:
            raise ValueError(f"--start {args.start}: its --horizon or --cost differs ({start.horizon}, {start.settings.get('cost')})")
    costs, overhead, targets = reachable(args, model, horizon)
    goals = [goal_cost(s, L, overhead) for s in targets]

    # What each step reads: samples for a_i, pool for INT4, examples to learn from, few for sensitivities, priced for prices; test is held out
    samples = windows(tokenizer, text, SAMPLES, min(SAMPLE_TOKENS, context), args.data, spread=True).to(model.device)
    pool = windows(tokenizer, text, POOL, min(WINDOW, context), args.data, spread=True).to(model.device)
    if args.objective == "fisher":
        examples = some(args.samples)
    else:
        examples = read("train", 10**6, WINDOW)
        examples = examples[:: 1 if choice else max(1, min(8, len(examples) // POOL))][:POOL]  # not all of one chapter
    priced = some(8)
    few = priced[:8] if choice else text_examples(pool[len(pool) // 8 :: -(-len(pool) // 4)])  # up to 4, spread
    test = read("test", 200 if choice else 4, LONG)

    out = lock_folder(args.out)
    wide = {"width": len(start.scorer.first.bias)} if start else {}
    scorer = Scorer(L, model.config.n_embd, args.lam if args.objective == "rl" else 0.0, **wide)
    seen = scorer.features(9 * torch.eye(2, model.config.n_embd)[None], 3)  # --resume does not compute features again: they must be the same
    settings = {"model": args.model, "data": args.data, "speedup": args.speedup, "objective": args.objective, "horizon": horizon,
                # labels have no steps, so --resume need not repeat them
                "steps": args.steps if args.objective != "fisher" or args.train_model else None, "samples": args.samples, "seed": args.seed,
                "cost": args.cost, "costs": costs.tolist(), "overhead": list(overhead),
                "start": args.start and f"{args.start}, {sha256(args.start)[:12]}", "lam": args.lam, "beta": args.beta,
                "weights": not args.no_weights, "int4": codes_name(pool), "fingerprint": model.fingerprint(), "text": digest(text),
                "features": digest(str(seen))}
    checkpoint = Checkpoint(out / "checkpoint.safetensors", settings, args.seed, args.resume)
    base = Checkpoint(out / "base.safetensors", settings, args.seed, args.resume) if args.train_model else None
    if args.steps and settings["steps"] is None:
        print("note: --steps changes nothing here: labels have none, and --samples says how many there are", file=sys.stderr)
    if min(n_tokens(examples), n_tokens(test)) < WINDOW:
        print(f"note: {args.data} has {n_tokens(examples)} tokens to learn from and {n_tokens(test)} to test on; some {12 * LONG} and {4 * LONG} "
              "make a policy", file=sys.stderr)

    # 1 Calibrate
    found = profile(model, samples)
    scale = found["norm_ratio"].tolist()  # measured better than least squares (bench.py ablation)
    scorer.to(model.device)
    scorer.mean.copy_(found["mean"].mean(0))
    scorer.std.copy_(found["std"].square().mean(0).sqrt())

    # 2 Round
    def round_weights():
        cache_codes(model, pool)
        model.quantize(int4=settings["int4"])

    round_weights()

    # 3 Learn
    log_path = out / "train.jsonl"
    tables = {}
    if args.objective == "fisher":
        damage, table = fisher.learn(scorer, model, examples, few, scale, horizon, checkpoint, log_path)
        tables = {"position_damage": table.tolist()}  # what a plan by block and position goes by
    else:
        damage = reinforce.learn(scorer, model, examples, few, scale, costs, start, checkpoint, log_path, settings)
    tables["damage"] = damage.tolist()  # what a static plan goes by
    policy = Policy(scorer, scale, costs, settings["fingerprint"], horizon=horizon, settings=settings | tables).to(model.device)

    # 4 Price
    if args.objective == "fisher":
        policy, policy.settings["trust"] = trust_skips(policy, model, up_to(2 * LONG, priced[len(priced) // 2 :]))
    calibrate_prices(policy, model, priced, targets, goals)
    before = []
    if args.train_model:
        before = compare(model, test, [None, policy.at(args.speedup)])
        reinforce.train_base(model, policy.at(args.speedup), read("train", 10**6, LONG), args.steps, base)
        reinforce.save_base(model, out / "model.safetensors")
        policy.fingerprint = settings["fingerprint"] = model.fingerprint()
        policy.settings |= {"model": str(out / "model.safetensors"), "fingerprint": policy.fingerprint}
        round_weights()
        calibrate_prices(policy, model, priced, targets, goals)
    policy.save(out / "policy.safetensors")

    # 5 Compare
    names = ["full model", f"DASH at {args.speedup:g}x", "static, same cost", "random states, same cost", "all INT8"]
    names += ["before training the base: full", f"before: DASH at {args.speedup:g}x"] if before else []
    rows = compare(model, test, [None, policy.at(args.speedup), *at_its_cost(policy, damage, test, args.seed)]) + before
    how = f"INT4 by GPTQ, objective {args.objective} on {n_tokens(examples)} tokens, horizon {horizon}"
    if policy.settings.get("trust", 1.0) < 1:
        how += f"; of what skips do, {policy.settings['trust']:g} of the predicted spread is trusted"
    if args.cost == "latency":
        promised = (4 * L + overhead[0]) / (L * mean_cost(rows[1]["raw"], costs) + overhead[1])
        how += f"; by the measured times DASH decodes {promised:.2f}x as fast as the full model"
    wrote = "policy.safetensors" + (", model.safetensors (give it as --model)" if args.train_model else "")
    report(out, names, rows, test, args, model, settings, how, wrote)


def main():
    args = arguments()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    text = load_text(args.data, "train", args.data_dir)
    load_text(args.data, "test", args.data_dir)  # not there: say so before an hour's work
    model, tokenizer = load(args.model, device, torch.float32)
    refuse_own_input(args, model.base)
    context = model.config.block_size
    choice = is_choice(args.data)
    read = lambda split, n, size: load_examples(args.data, split, tokenizer, n, context if choice else min(size, context), args.data_dir,
                                                device, spread=True)
    some = lambda n: up_to(n * LONG, read("train", 10**6 if choice else n, LONG))  # n windows, or items of as many tokens
    train = train_routers if args.objective in routers.KINDS else train_scorer
    train(args, text, model, tokenizer, read, some)


if __name__ == "__main__":
    command_line(main)
