"""What every comparison stands on: one or many methods on one task, with intervals, in bits and by the clock.

    at_hand      model, tokenizer, policies, what is known from training text, test examples
    make_policy  a method's name and a speedup -> what `LLM.forward` takes
    rank         methods on a task: value, 95% interval, speedup in bits, measured speedup
    variant      a policy with something changed, priced anew
    publish      results/NAME.json and its picture (charts.py)
"""

import copy
import json
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import baselines
from baselines import bootstrap, compare, floor, for_tokens, profile, public, sensitivities
from charts import draw
from common import pick_device, read_json, save_result
from data import load_articles, load_examples, load_text, n_tokens, text_examples, windows
from infer import generate, has_graphs, prompt_ids
from model import load
from policy import Fixed, Policy, bit_costs, most_speedup, speedup_bits, state_shares
from train import LONG, SAMPLES, SAMPLE_TOKENS, calibrate_prices, up_to


SKIPS = ("static_skip", "unified_skip", "early_exit", "confident_exit", "skipdecode", "adaskip", "random_skip")
ALONE, MIXES = ("full", "int8", "int4"), ("static_mix", "position_mix", "random_mix", "dash")
METHODS = (*ALONE, *SKIPS, *MIXES)
TEXTS = ("lm", "wikitext2", "cnn_dm")  # tasks that are text; the others are multiple choice
TASKS = {"wikitext2": 4, "cnn_dm": 4, "mmlu": 24, "mmlu_5shot": 5, "arc_challenge": 20, "arc_easy": 20}  # examples without --full
PAPERS = {"wikitext2": "wikitext2_ppl", "cnn_dm": "cnn_dm_rougeL", "mmlu": "mmlu_acc", "mmlu_5shot": "mmlu_acc",
          "arc_challenge": "arc_c_acc"}  # what paper.json calls a task
ASKED = (1.33, 1.67, 2.0)  # the paper's
FASTER = (2.67, 3.2)  # for what may quantise


def policy_path(args, task):
    return args.policy.replace("{task}", task.removesuffix("_5shot"))


def read_policy(path, model, needed):
    """The policy file for this model, or None where it is not needed and there is none for this model."""
    if not needed and not Path(path).is_file():
        return None
    policy = Policy.load(path).to(model.device)
    if not policy.prices:
        raise ValueError(f"{path} has no prices; train it with train.py")
    if needed:
        try:
            policy.check(model)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
    return policy if policy.fingerprint == model.fingerprint() else None


def folders(args, tasks):
    """Those of `tasks` that --data-dir has, or held-out pydocs where there is no such folder. ValueError when it has none."""
    if not args.data_dir:
        return ["lm"]
    found = [t for t in tasks if (Path(args.data_dir) / ("mmlu/dev.jsonl" if t == "mmlu_5shot" else t)).exists()]
    if not found:
        raise ValueError(f"--data-dir {args.data_dir} has none of {', '.join(tasks)}; give a folder that has, or leave --data-dir out")
    return found


def one_text(args):
    """The task of a command that measures one: --task, or wikitext2 with --data-dir, or held-out pydocs."""
    return args.task or ("wikitext2" if args.data_dir else "lm")


def some_articles(args, default):
    """Articles of cnn_dm, test: --limit, all with --full, or the default number."""
    return load_articles("test", args.data_dir)[: args.limit or (None if args.full else default)]


def check_reach(model, speedup, called="speedup"):
    """ValueError unless blocks that all fill keys and values can reach this speedup in bits; `called` so."""
    top = most_speedup(model.config.n_layer, bit_costs(model.config))
    if not 1 <= speedup <= top:
        raise ValueError(f"{called} {speedup:g} is out of reach: give 1 to {floor(top)}")


def make_policy(method, speedup, known, model, policy, path):
    """What `LLM.forward` takes, or a function of the tokens that gives it, for a method's name (baselines.py); measures what it goes by."""
    if method not in ALONE:
        check_reach(model, speedup, "--speedup")
    if method in ("dash", "position_mix") and policy is None:
        read_policy(path, model, True)  # says why there is none
    if method == "dash":
        return copy.copy(policy).at(speedup, track=True)
    if method == "position_mix" and known.position_damage is None:
        raise ValueError(f"{path} has no position_damage, which {method} goes by; train it again with train.py --objective fisher")
    if method not in (*ALONE, *MIXES) and known.similarity is None:
        baselines.observe(known, model)
    if method == "static_mix" and known.damage is None:
        known.scale = profile(model, known.samples)["norm_ratio"].tolist()
        known.damage = sensitivities(model, text_examples(known.samples[:4]), known.scale)
    return baselines.by_name(method, known, speedup)


def with_kv(policy, kv):
    """A policy, or a function that gives one, with another way to keep the keys and values of skipped tokens."""
    if not hasattr(policy, "decide"):
        return lambda tokens: with_kv(policy(tokens), kv)
    policy.kv = kv
    return policy


def in_rounds(rounds, contenders):
    """Run every contender once a round, in turn: {name: [value of each round]}."""
    values = {name: [] for name in contenders}
    for _ in tqdm(range(rounds), desc=", ".join(contenders)[:40], leave=False):
        for name, f in contenders.items():
            values[name].append(f())
    return values


def ratio(values, a, b):
    """Median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(values[a], values[b]))


def prompt_of(tokenizer, row):
    """A row of ids as a prompt: its text, without the ids that `encode` puts in front of one (BOS)."""
    ids = row.tolist()
    front = [*tokenizer.template[0]]
    return tokenizer.decode(ids[len(front) :] if ids[: len(front)] == front else ids)


def measured_speedup(model, tokenizer, policy, prompt, rounds):
    """Decoding speed under the policy over that of the full model, batch 1, real kernels: the ratios of alternating pairs of runs of 32
    tokens, or of as many as AdaSkip needs to spend most of them after its warm-up."""
    tokens = 5 * baselines.AdaSkip.WARMUP if isinstance(policy, baselines.AdaSkip) else 32
    routed = for_tokens(policy, torch.zeros(1, tokens, dtype=torch.int64))
    if routed is not policy and isinstance(routed, Fixed) and routed.given.dim() == 3:  # what it does along a text, all of it on the tokens that are timed
        read = len(tokenizer.encode_prompt(prompt))
        routed.given = torch.cat([routed.given[..., :1].expand(-1, -1, read), routed.given], -1)
    eager = not has_graphs(model, routed)  # then the full model goes without its CUDA graphs too
    speed = lambda p: generate(model, tokenizer, prompt, p, tokens, eager=eager, ignore_eos=True)["tokens_per_second"]
    if model.device.type == "cuda":
        speed(routed), speed(None)  # graphs are captured at their first use
    values = in_rounds(rounds, {"routed": lambda: speed(routed), "full": lambda: speed(None)})
    return [a / b for a, b in zip(values["routed"], values["full"])]


ARTICLE, SUMMARY = 768, 64  # tokens of an article that are read, and of its summary


def rouge():
    """f(reference, text) -> F measure of Rouge-L (Lin 2004), by the rouge-score package, 0 to 1."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("cnn_dm is scored with the rouge-score package, which is not installed: pip install rouge-score") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda reference, text: scorer.score(reference, text)["rougeL"].fmeasure


def summary_prompt(model, tokenizer, article):
    """What asks for a summary -> (prompt, whether it is the turn of a chat). A chat model is asked, any other sees TL;DR:."""
    room = model.config.block_size - SUMMARY - 100
    if room < 1:
        raise ValueError(f"{model.name} has a context of {model.config.block_size} tokens, too short for cnn_dm; give a model of at least 512")
    text = tokenizer.decode(tokenizer.encode(article["article"])[: min(ARTICLE, room)])
    chat = bool(tokenizer.chat_template)
    return f"Summarize this article in three sentences.\n\n{text}" if chat else f"{text}\n\nTL;DR:", chat


def summaries(model, tokenizer, articles, policies):
    """Rouge-L of greedy summaries under every policy: rows as `compare` makes them."""
    score = rouge()
    rows = []
    for policy in tqdm(policies, desc="summaries", leave=False):
        each, states = [], []
        for article in articles:
            prompt, chat = summary_prompt(model, tokenizer, article)
            read = len(prompt_ids(model, tokenizer, prompt, chat))
            routed = for_tokens(policy, torch.zeros(1, read + SUMMARY, dtype=torch.int64))
            out = generate(model, tokenizer, prompt, routed, SUMMARY, chat=chat)
            each.append(round(score(article["highlights"], out["text"]), 6))
            states.append(out["states"])
        states = torch.cat(states, 1)
        rows.append({"each": {"rougeL": each}, "rougeL": sum(each) / len(each), "states": state_shares(states), "tokens": states.shape[1],
                     "speedup": speedup_bits(states, bit_costs(model.config, routed))})
    return rows


METRICS = {"perplexity": ("nats", lambda v: v.mean(-1).exp()), "accuracy": ("accuracy", lambda v: v.mean(-1)),
           "Rouge-L": ("rougeL", lambda v: v.mean(-1))}  # name: what of an example, and how it is summed up


def metric_of(task):
    return "Rouge-L" if task == "cnn_dm" else "perplexity" if task in TEXTS else "accuracy"


def source(args, task, split):
    """Where a task's text or items of a split are: name, split and folder for `load_text`. --file is test; its train is pydocs."""
    if args.file and split == "test":
        return args.file, None, None
    return ("pydocs", split, None) if args.file or task == "lm" else (task, split, args.data_dir)


def at_hand(args, task, default, needed=True, path=None):
    """What a comparison starts from: (fp32 model with the policy's INT4 codes, tokenizer, [policy in `path`, or the task's of --policy, and those
    of --compare], `Known`, test examples: --limit, all with --full, or the default number). The policy is None if it is not needed and not there."""
    path = path or policy_path(args, task)
    if task == "mc" and not args.file:
        raise ValueError('--task mc needs --file with lines of {"question", "choices": [text, ...], "answer": index}')
    choice = task not in TEXTS
    device = pick_device(args.device)
    name, split, folder = source(args, task, "test")
    load_text(name, split, folder, choice)  # not there, or no text: say so before anything is loaded
    text = load_text(*source(args, task, "train"))
    model, tokenizer = load(args.model, device, torch.float32)
    if model.config.n_layer < 4:
        raise ValueError(f"{args.model} has {model.config.n_layer} blocks; to compare what is skipped, give a model of at least 4")
    files = list(dict.fromkeys([path, *args.compare]))  # a file that is named twice is one policy
    policies = [read_policy(file, model, needed or file != path) for file in files]
    int4 = policies[0].int4 if policies[0] else None
    for file, policy in zip(files[1:], policies[1:]):
        if policy.int4 != int4:
            raise ValueError(f"{file} has other INT4 codes than {path}; train both on the same data")
    called = [name_of(p) if p else None for p in policies]
    for policy, own, file in zip(policies, called, files):
        if policy:
            policy.name = f"{own}, {file}" if called.count(own) > 1 else own
    if args.file and policies[0] and Path(args.file).resolve() == Path(str(policies[0].settings.get("data"))).resolve():
        print(f"note: {path} was trained on the first four fifths of {args.file}", file=sys.stderr)
    model.quantize(int4=int4)
    context = model.config.block_size
    left = policies[0].settings if policies[0] else {}  # where train.py left the damage that baselines go by
    known = baselines.Known(model.config.n_layer, bit_costs(model.config), args.seed, policies[0] and policies[0].scale, model.config,
                            windows(tokenizer, text, SAMPLES, min(SAMPLE_TOKENS, context), spread=True).to(device),
                            **{name: torch.tensor(left[name]) for name in ("damage", "position_damage") if name in left})
    limit = args.limit or (10**6 if args.full else default)
    size = context if choice else min(LONG, context)
    return model, tokenizer, policies, known, load_examples(name, split, tokenizer, limit, size, folder, device, choice=choice)


@torch.no_grad()
def rank(args, task, asked, default, timed=True, priced=False):
    """Methods on a task: [(method, speedup)] -> (metric, one row for the full model and one for each asked, model, facts to report).

    A row has "value", "interval" (95%, bootstrap over examples), "speedup" in bits, "measured" if timed, the median of "rounds"; or
    "missing", why not. priced: dash costs on these examples what is asked, instead of what its price makes it cost there.
    """
    if task == "cnn_dm":
        rouge()
    path = policy_path(args, task)
    metric = metric_of(task)
    model, tokenizer, [policy, *_], known, examples = at_hand(args, task, default, needed=False)
    rows = [{"method": "full model", "target": 1.0}]
    at_cost = {}
    ran = [(rows[0], None)]  # those that there are, with their policies
    if priced and policy and task != "cnn_dm":  # there the price tracks
        reach = [s for method, s in asked if method == "dash" and s <= most_speedup(known.L, bit_costs(model.config))]
        kv = {"kv": args.kv} if args.kv else {}  # what a skip costs depends on it
        at_cost = dict(zip(reach, variant(policy, model, up_to(64 * LONG, examples), reach, **kv))) if reach else {}
    for method, speedup in asked:
        rows.append({"method": method, "target": speedup})
        try:
            routed = at_cost[speedup] if method == "dash" and speedup in at_cost else make_policy(method, speedup, known, model, policy, path)
            ran.append((rows[-1], with_kv(routed, args.kv) if args.kv else routed))
        except (ValueError, FileNotFoundError) as e:
            if len(asked) == 1:
                raise
            rows[-1]["missing"] = str(e)
    prompt = prompt_of(tokenizer, examples[0].rows[0, : min(32, model.config.block_size // 2)])
    int4 = model.int4
    path = path if policy else None
    policies = [policy for _, policy in ran]
    found = compare(model, examples, policies) if task != "cnn_dm" else None
    if timed:
        del model  # what the next one has to fit beside
        model, tokenizer = load(args.model, pick_device(args.device), torch.bfloat16, routed=True)
        model.quantize(real=True, int4=int4)
    if task == "cnn_dm":
        examples = some_articles(args, default)
        found = summaries(model, tokenizer, examples, policies)
    key, statistic = METRICS[metric]
    for (row, routed), new in zip(ran, found):
        row |= public(new)
        each = row["each"][key]
        row |= {"value": statistic(torch.tensor(each, dtype=torch.float64)).item(), "interval": bootstrap(statistic, each)}
        if timed:
            row["rounds"] = [1.0] if row["method"].startswith("full") else measured_speedup(model, tokenizer, routed, prompt, args.rounds)
            row["measured"] = statistics.median(row["rounds"])
    tokens = found[0]["tokens"] if task == "cnn_dm" else n_tokens(examples)
    return metric, rows, model, {"n": len(examples), "tokens": tokens, "int4": int4 or "nearest", "policy": path}


def publish(args, name, model, quiet=False, **content):
    """Write results/NAME.json and, where charts.py has one, its picture; print the table, unless `quiet`."""
    path = Path(args.results) / f"{name}.json"
    save_result(path, model, args.seed, **content)
    picture = draw(path)
    if quiet:
        return
    print(f"{content['caption']}\n\n{content['markdown']}\n\nwrote {path}{f' and {picture.name}' if picture else ''}\n", flush=True)
    if args.json:
        print(json.dumps(read_json(path)), flush=True)


def settings_of(policy):
    """What a result says of its policy, and by what `bench.py speed` knows its frontier again: the settings, without the tables of damage."""
    return {k: v for k, v in policy.settings.items() if "damage" not in k}


def name_of(policy):
    s = policy.settings
    kind = str(s.get("objective", "fisher")).replace("fisher", "dash")
    kind += f" from {str(s['start']).split(',')[0]}" if s.get("start") else ""
    off = [f", without {name}" for name, key in (("lam", "lam"), ("beta", "beta"), ("w_i", "weights")) if s.get(key, 1) == 0]
    return f"{kind}, horizon {policy.horizon}, seed {s.get('seed', 0)}{''.join(off)}"


def variant(policy, model, examples, speedups, goals=None, **change):
    """Copies of a policy with other attributes, one a speedup, each priced to cost on these examples what is asked, or `goals`, or as
    near to it as the states allowed can come. ValueError when a speedup is out of every policy's reach."""
    for s in speedups:
        check_reach(model, s)
    policy = copy.copy(policy)
    for name, value in change.items():
        setattr(policy, name, value)
    policy.costs = bit_costs(model.config, policy).to(policy.costs.device)
    calibrate_prices(policy, model, examples, speedups, goals or [4 / s for s in speedups])
    return [copy.copy(policy).at(s) for s in speedups]
