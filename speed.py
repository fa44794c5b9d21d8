"""How fast it decodes: python bench.py speed, and --suite gpu; what they measure is said in bench.py.

Contenders run in turn, round after round, in one process; a figure is the median over rounds, a comparison the median of the ratios.
"""

import importlib.util
import inspect
import statistics
import sys
import tempfile
import time
from pathlib import Path
from timeit import repeat
from types import SimpleNamespace

import numpy as np
import torch

from common import format_table, pick_device, read_json, refusing
from data import load_text, text_examples
from evaluate import ASKED, FASTER, in_rounds, name_of, policy_path, publish, ratio, read_policy, settings_of
from infer import Engine, generate
from model import LLM, check_gpu, load, with_blocks
from policy import INDEX, STATE_OF, Fixed, Policy, Scorer, bit_costs, goal_cost, speedup_bits
from quant import CHOSEN
from train import calibrate_prices
from weights import Config, fetch_smollm2, read_gguf


def blocks_ms(states, table):
    """What a latency table promises for the blocks of the median token, in milliseconds: states (L, n). The median, since what is timed
    is the median step, and tokens differ in what they cost."""
    ms = torch.tensor([table[str(s)] for s in STATE_OF])
    return ms[INDEX[states.long()]].sum(0).median().item()


def beside_blocks(full, half, L):
    """What a step takes besides its L blocks, from its time with all of them and with L // 2: graphs leave no other way to tell."""
    return max(0.0, (L * half - L // 2 * full) / (L - L // 2))


def block_times(bf16, int8, int4, skipped, overhead, L):
    """The latency table, {state: milliseconds a block}, from a step's on the uniform paths; `skipped` runs its first block in bf16 and
    its last in INT4."""
    table = {"4": (bf16 - overhead) / L, "2": (int8 - overhead) / L, "1": (int4 - overhead) / L}
    return table | {"0": max(1e-6, (skipped - overhead - table["4"] - table["1"]) / (L - 2))}  # noise can take it below nothing


def own_frontier(folder, policy):
    """The policy's frontier in `folder` (bench.py frontier), or None where there is none of this policy: a dict, "text" and "method" by name,
    "static" and "own" [(share of each of the four states, KL)], the best static plans with all INT8 and all INT4, and the policy's."""
    name = name_of(policy)
    for file in sorted(Path(folder).glob("frontier-*.json")):
        r = read_json(file)
        with refusing(file, "is no frontier", "make it again with bench.py frontier, or move it away"):
            of = lambda *methods: [([float(row["states"][str(s)]) for s in STATE_OF], float(row["kl"])) for row in r["rows"] if row["method"] in methods]
            found = {"text": r["caption"].split(",")[0], "method": name, "static": of("best static plan", "all INT8", "all INT4"), "own": of(name)}
            if r["policy"] == settings_of(policy) and found["own"] and found["static"]:
                return found


def by_the_clock(frontier, clock, decision):
    """A frontier with speedups in time in the place of shares; "ratio": the policy's KL over that of static plans which take as long, None
    where none does. Between two plans it is a straight line: tokens that take turns. clock(shares, ms that deciding takes) -> promised
    speedup; decision: ms a token."""
    static = sorted((clock(shares, 0.0), kl) for shares, kl in frontier["static"])
    own = [(clock(shares, decision), kl) for shares, kl in frontier["own"]]
    alike = np.interp([speedup for speedup, _ in own], *zip(*static), left=0.0, right=0.0)
    return frontier | {"static": static, "own": own, "ratio": [kl / same if same else None for (_, kl), same in zip(own, alike)]}


def uniform_paths(L):
    """The policies whose times give the latency table: {name: policy, None for the full model, which for it runs on a GPU as Fixed([4] * L)}."""
    return {"bf16": None, "INT8": Fixed([2] * L), "INT4": Fixed([1] * L), "skipped": Fixed([4] + [0] * (L - 2) + [1])}


def transformers_model(c, device):
    """The same network in transformers, bf16, random weights. ImportError without transformers."""
    import transformers

    kind = "Qwen2" if c.qkv_bias else "Llama"
    config = getattr(transformers, kind + "Config")(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def transformers_step(theirs, ids, tokens):
    """Median seconds of a decoding step of transformers' own `generate`."""
    prompt = torch.tensor([ids], device=theirs.device)
    times = []
    clock = SimpleNamespace(put=lambda value: times.append(time.perf_counter()), end=lambda: None)  # called with every token as it comes
    theirs.generate(prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
                    streamer=clock)
    return statistics.median(b - a for a, b in zip(times[1:], times[2:]))


def gpt_fast(folder, c, device, context, tokens):
    """The same shape in gpt-fast, of which `folder` is a checkout, bf16, random weights, compiled as its generate.py does: a function that
    gives the mean seconds of a decoding step after `context` tokens. Qwen's biases, which it does not have, are left out.

    ValueError when the folder has no model.py of gpt-fast.
    """
    file = Path(folder) / "model.py"
    with refusing(file, "is not gpt-fast's", "give --gpt-fast a checkout of github.com/pytorch-labs/gpt-fast"):
        spec = importlib.util.spec_from_file_location("gpt_fast_model", file)
        module = sys.modules["gpt_fast_model"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
        if "mask" in inspect.signature(module.Transformer.forward).parameters:
            raise ValueError("its forward wants a mask: check out 32971d3, the last before flex attention")
        args = module.ModelArgs(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, dim=c.n_embd,
                                norm_eps=c.norm_eps, intermediate_size=c.n_hidden, n_local_heads=c.n_kv_head, rope_base=c.rope_theta)
    with torch.device("meta"):
        theirs = module.Transformer(args).bfloat16()
    theirs.to_empty(device=device).requires_grad_(False)
    for p in theirs.parameters():
        p.normal_(std=0.02)
    with torch.device(device):
        theirs.setup_caches(1, context + tokens)
    one = torch.compile(lambda token, position: theirs(token, position)[:, -1].argmax(-1, keepdim=True), fullgraph=True,
                        options={"triton.cudagraphs": True, "coordinate_descent_tuning": True})

    def step():
        token, position = torch.zeros(1, 1, dtype=torch.int, device=device), torch.tensor([context], device=device)
        for n in range(tokens):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # its choice: the compiler makes the attention
                token = one(token, position).int()
            position += 1
            if n == 0:
                int(token)
                began = time.perf_counter()
        int(token)  # as in its generate.py the host runs ahead
        return (time.perf_counter() - began) / (tokens - 1)

    return step


def peers(model, ids, tokens, threads, device):
    """Decoding with transformers in bf16 and, on a CPU, with llama.cpp on its own file, same weights -> {name: f -> median seconds a
    token}; says which of them is not installed."""
    out = {}
    path = fetch_smollm2()
    try:
        theirs = transformers_model(model.config, device)
        theirs.load_state_dict({k: v.bfloat16() for k, v in read_gguf(path)[1].items()}, strict=False)
        out["transformers bf16"] = lambda: transformers_step(theirs, ids, tokens)
    except ImportError:
        print("not installed, so not compared: transformers")
    if device.type != "cpu":  # what llama-cpp-python installs runs on the CPU
        return out
    try:
        from llama_cpp import Llama

        llama = Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

        def run_llama():
            llama.reset()
            llama.eval(ids)
            return statistics.median(repeat(lambda: llama.eval([llama.sample(temp=0.0)]), number=1, repeat=tokens))

        out["llama.cpp Q4_1"] = run_llama
    except ImportError:
        print("not installed, so not compared: llama-cpp-python")
    return out


def read_bandwidth(device):
    """GB/s of reading memory, the best of 5: 1 GiB once on the CPU, 4 GiB eight times on a GPU."""
    size, times = (2**30, 8) if device.type == "cuda" else (2**28, 1)
    big = torch.ones(size, device=device)
    best = min(repeat(lambda: [big.sum() for _ in range(times)][-1].item(), number=1, repeat=5))
    return times * size * 4 / best / 1e9


def speed(args):
    if args.suite == "gpu":
        return speed_gpu(args)
    device = pick_device(args.device)
    model, tokenizer = load(args.model, device, torch.bfloat16, routed=True)
    policy = read_policy(policy_path(args, "lm"), model, True)
    policy.at(2.0)  # out of reach, or below a damaged file: say so before minutes of timing
    frontier = own_frontier(args.results, policy)
    model.quantize(real=True, int4=policy.int4)
    L = model.config.n_layer
    tokens = 128
    threads = torch.get_num_threads()
    if L < 3:
        raise ValueError(f"{args.model} has {L} blocks; to time a skipped one, give a model of at least 3")
    text = load_text("pydocs", "test")
    ids = tokenizer.encode(text)
    prompt, long_prompt = tokenizer.decode(ids[:64]), tokenizer.decode(ids[: min(512, model.config.block_size - 8)])
    run = lambda policy=None, m=model, prompt=prompt, tokens=tokens: generate(m, tokenizer, prompt, policy, tokens, ignore_eos=True)
    step = lambda policy=None: run(policy)["step_s"]

    # Tokens/s of each path and of the peers
    uniform = {f"all {name}": path for name, path in uniform_paths(L).items()}
    contenders = {name: lambda p=p: step(p) for name, p in uniform.items()}
    bf16 = "all bf16"  # what INT8 and INT4 are compared with
    if device.type == "cuda":  # there the full model is one graph, and routed blocks are one each
        bf16 = "all bf16, a graph a block"
        half = with_blocks(model, model.blocks[: L // 2])
        contenders |= {bf16: lambda: step(Fixed([4] * L)), "half the blocks": lambda: run(Fixed([4] * (L // 2)), m=half)["step_s"]}
    theirs = peers(model, tokenizer.encode(prompt), tokens, threads, device) if args.model == "smollm2" else {}
    seconds = in_rounds(args.rounds, contenders | theirs)
    per_second = {name: 1 / statistics.median(v) for name, v in seconds.items() if name != "half the blocks"}

    # The latency table: T = overhead + sum over blocks of ms(state), from the uniform paths and a token without blocks
    @torch.inference_mode()
    def no_blocks():
        x = model.embed(torch.tensor([[1]], device=device)).view(1, -1)
        model.rope(5, 1)
        int(model.logits(model.norm(x))[0].argmax())

    total = {name: statistics.median(v) * 1000 for name, v in seconds.items()}
    if device.type == "cuda":
        overhead = beside_blocks(total[bf16], total["half the blocks"], L)
    else:
        overhead = 1000 * statistics.median(statistics.median(repeat(no_blocks, number=1, repeat=50)) for _ in range(args.rounds))
    table = block_times(*(total[name] for name in (bf16, "all INT8", "all INT4", "all skipped")), overhead, L)

    # Routed decoding against the same states known ahead, and what the latency table promises for them
    routed = []
    decisions = []
    own = policy.horizon
    one_ahead = [(1, 2.0)] if own != 1 else []
    for horizon, target in [*((own, s) for s in (*ASKED, *FASTER) if s <= policy.prices[-1][0]), *one_ahead]:
        policy.horizon = horizon
        policy.at(target, track=True)  # as infer.py decodes
        out = run(policy)
        known = Fixed(out["states"][:, None], policy.scale)
        values = in_rounds(args.rounds, {"routed": lambda: step(policy), "known": lambda: step(known), "full": step})
        of_steps = out["states"][:, out["prompt_tokens"] :]
        if horizon == own:
            decisions += [1000 * (a - b) for a, b in zip(values["routed"], values["known"])]
        routed.append({"horizon": horizon, "speedup_target": target, "cost": policy.settings.get("cost", "bits"),
                       "speedup_bits": speedup_bits(out["states"], bit_costs(model.config)), "blocks_ms": blocks_ms(of_steps, table),
                       "measured": ratio(values, "full", "routed"), "routed_over_known": ratio(values, "routed", "known")})
    decision = max(0.0, statistics.median(decisions))
    promised = lambda blocks, decision: total["all bf16"] / (overhead + decision + blocks)
    for row in routed:
        row["promised"] = promised(row.pop("blocks_ms"), decision)
        row["promised_over_measured"] = row["promised"] / row["measured"]
    policy.horizon = own
    clock = lambda shares, decision: promised(L * sum(share * table[str(s)] for share, s in zip(shares, STATE_OF)), decision)

    # First token of a long prompt
    first = lambda p: run(p, prompt=long_prompt, tokens=1)["first_token_s"]
    policy.at(1.67)
    values = in_rounds(args.rounds, {"routed": lambda: first(policy), "INT4": lambda: first(uniform["all INT4"]), "full": lambda: first(None)})
    sizes = model.bytes()
    bandwidth = read_bandwidth(device)
    weights = {"all bf16": sizes["4"], "all INT8": sizes["2"], "all INT4": sizes["1"]}
    result = {
        "tokens": tokens, "prompt_tokens": 64, "rounds": args.rounds, "tokens_per_second": per_second,
        "policy": settings_of(policy),
        "ratios": {"bf16 / transformers bf16": ratio(seconds, "transformers bf16", "all bf16") if "transformers bf16" in seconds else None,
                   "INT4 / llama.cpp Q4_1": ratio(seconds, "llama.cpp Q4_1", "all INT4") if "llama.cpp Q4_1" in seconds else None,
                   "INT8 / bf16": ratio(seconds, bf16, "all INT8"), "INT4 / bf16": ratio(seconds, bf16, "all INT4")},
        "latency_ms": table | {"overhead": overhead, "full_overhead": total["all bf16"] - L * table["4"], "decision": decision}, "routed": routed,
        "frontier": frontier and by_the_clock(frontier, clock, decision),
        "first_token": {"prompt_tokens": len(tokenizer.encode(long_prompt)), "speedup_target": 1.67, "routed / full": ratio(values, "routed", "full"),
                        "INT4 / full": ratio(values, "INT4", "full"), "full_s": statistics.median(values["full"])},
        "memory": {"bytes": sizes, "all precisions / bf16": sizes["all"] / sizes["bf16 model"]},
        "bandwidth_gb_s": bandwidth,
        "share_of_bandwidth": {name: weights[name] / 1e9 / bandwidth * per_second[name] for name in weights}}
    caption = (f"Batch 1, prompt of 64 tokens, {tokens} new ones, median step, {args.rounds} alternating rounds, {threads} threads; the policy "
               f"was trained for --cost {policy.settings.get('cost', 'bits')}.")
    publish(args, f"speed-{device.type}", model, caption=caption, markdown=speed_tables(result), **result)


def speed_tables(r):
    ms = r["latency_ms"]
    ratio_of = lambda name: "not compared" if r["ratios"][name] is None else f"{r['ratios'][name]:.2f}"
    rows = [[name, goal, ratio_of(name)] for name, goal in
            (("bf16 / transformers bf16", ">= 2.0"), ("INT4 / llama.cpp Q4_1", ">= 1.0"), ("INT8 / bf16", ">= 1.6"), ("INT4 / bf16", ">= 2.4"))]
    for row in r["routed"]:
        rows.append([f"routed / same states known ahead, horizon {row['horizon']}, {row['speedup_target']:g}x asked",
                     "<= 1.03" if row["horizon"] > 1 and row["speedup_target"] in ASKED else "reported", f"{row['routed_over_known']:.3f}"])
    for row in r["routed"]:
        if row["horizon"] == r["policy"].get("horizon"):  # whose decisions are in the latency table
            rows.append([f"promised / measured at {row['speedup_target']:g}x asked (measured {row['measured']:.2f}x)",
                         "0.95 to 1.05" if row["speedup_target"] in ASKED else "reported", f"{row['promised_over_measured']:.3f}"])
    first = r["first_token"]
    rows += [["weights in all three precisions / bf16 alone", "<= 1.9", f"{r['memory']['all precisions / bf16']:.2f}"],
             [f"first token of {first['prompt_tokens']}, routed at 1.67x / full", "<= 1.1", f"{first['routed / full']:.2f}"],
             [f"first token of {first['prompt_tokens']}, all INT4 / full", "reported", f"{first['INT4 / full']:.2f}"]]
    share = r["share_of_bandwidth"]
    tables = [
        format_table(["path", "tokens/s", "share of the memory bandwidth"],
                     [[name, f"{v:.1f}", f"{100 * share[name]:.0f}%" if name in share else ""] for name, v in r["tokens_per_second"].items()]),
        format_table(["figure", "goal", "measured"], rows),
        f"A block takes {ms['4']:.2f} ms in bf16, {ms['2']:.2f} in INT8, {ms['1']:.2f} in INT4, {ms['0']:.2f} skipped; everything else of a "
        f"token {ms['overhead']:.2f} ms, the decisions {ms['decision']:.2f} ms. Memory was read at {r['bandwidth_gb_s']:.0f} GB/s in the same run."]
    if r["frontier"]:
        f = r["frontier"]
        tables.append(format_table(
            [f"{f['method']}, on {f['text']}, by these times", *(f"{speedup:.2f}x" for speedup, _ in f["own"])],
            [["KL to the full model, nats", *(f"{kl:.4f}" for _, kl in f["own"])],
             ["over that of static plans which take as long", *("-" if v is None else f"{v:.2f}" for v in f["ratio"])]]))
    return "\n\n".join(tables)


# ----------------------------------------------------------------------------------------------------------
# speed --suite gpu

SHAPES = {
    "LLaMA-2-7B": Config(n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128, n_hidden=11008, vocab_size=32000,
                         block_size=4096, rope_theta=1e4, norm_eps=1e-5, tied=False),
    "Qwen2.5-7B": Config(n_layer=28, n_head=28, n_kv_head=4, n_embd=3584, head_dim=128, n_hidden=18944, vocab_size=152064,
                         block_size=32768, rope_theta=1e6, norm_eps=1e-6, tied=False, qkv_bias=True)}
# a tokenizer of nothing but ids
IDS = SimpleNamespace(encode_prompt=list, decode_bytes=lambda ids: b"", eos=())


@torch.no_grad()
def random_model(name, config, device):
    """A bf16 model with random weights, made on the device itself."""
    try:
        check_gpu(config, device)
    except ValueError as e:
        raise ValueError(f"--suite gpu: {str(e).split(';')[0]}; use a larger or newer GPU") from None
    with torch.device("meta"):
        model = LLM(config).bfloat16()
    model.to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for key, p in model.named_parameters():
        p.fill_(1.0) if "norm" in key else p.normal_(std=0.02)
    model.name = name
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


def speed_of_shape(name, config, device, rounds, bandwidth, checkout, keep, context=512, tokens=64):
    """Everything that is measured for one shape, a dict for results/ that `keep` is called with as it grows, and a function that gives
    one token's events (`one_token`); checkout: folder of gpt-fast, or None."""
    peer = gpt_fast(checkout, config, device, context, tokens) if checkout else None  # a wrong folder: say so first
    model = random_model(name, config, device)
    L = config.n_layer
    ids = torch.randint(config.vocab_size, (context,), generator=torch.Generator().manual_seed(1))
    half = with_blocks(model, model.blocks[: L // 2])  # to tell what a token takes besides its blocks
    plain = with_blocks(model, model.blocks)  # its head in bf16, as that of others is
    plain.head_int8 = None
    for m in (model, half, plain):  # also on the CPU, where its graphs are direct calls
        m.engine = Engine(m, context + tokens)
    run = lambda policy=None, m=model, **options: generate(m, IDS, ids.tolist(), policy, tokens, **options)

    step = lambda *args, **options: run(*args, **options)["step_s"]  # seconds from one token's coming to the next one's

    def alternate(contenders):
        for f in contenders.values():
            f()  # captures its graphs
        return in_rounds(rounds, contenders)

    contenders = {name: lambda path=path: step(path) for name, path in uniform_paths(L).items()}
    contenders |= {"bf16 head": lambda: step(None, plain), "a graph a block": lambda: step(Fixed([4] * L)),  # as a routed token has it
                   "half the blocks": lambda: step(Fixed([4] * (L // 2)), half)}
    try:
        theirs = transformers_model(config, device)
        contenders["transformers"] = lambda: transformers_step(theirs, ids.tolist(), tokens)
    except (ImportError, torch.OutOfMemoryError) as e:
        print(f"not compared: transformers ({type(e).__name__})")
    if peer:
        contenders["gpt-fast"] = peer
    seconds = alternate(contenders)
    theirs = contenders = peer = None  # frees their weights
    ms = {k: 1000 * statistics.median(v) for k, v in seconds.items()}
    overhead = beside_blocks(ms["a graph a block"], ms["half the blocks"], L)
    table = block_times(ms["a graph a block"], ms["INT8"], ms["INT4"], ms["skipped"], overhead, L)
    unit = table["4"] / 4
    besides = ms["bf16"] / unit - 4 * L, overhead / unit  # of the full model and of a routed one
    costs = torch.tensor([table[s] / unit for s in ("0", "1", "2", "4")])

    sizes = model.bytes()
    keys = 4 * L * config.n_kv_head * config.head_dim * (context + tokens // 2)  # bytes of the keys and values that a token reads
    read = {"bf16": sizes["4"] + keys, "INT8": sizes["2"] + keys, "INT4": sizes["1"] + keys}
    found = {"name": name, "ms": ms, "latency_ms": table | {"overhead": overhead}, "routed": [],
             "share_of_bandwidth": {k: n / 1e6 / bandwidth / ms[k] for k, n in read.items()}, "bytes": sizes,
             **{f"bf16 / {other}": ratio(seconds, other, "bf16 head") if other in seconds else None for other in ("gpt-fast", "transformers")},
             **{f"{low} / bf16": ratio(seconds, "a graph a block", low) for low in ("INT8", "INT4")}}
    keep(found)

    decisions = []
    for horizon in (L, 1):
        policy = random_priced_policy(model, ids.to(device), horizon, ASKED, costs, besides)
        for target in ASKED if horizon == L else ASKED[-1:]:
            policy.at(target)
            states = run(policy)["states"]
            same = torch.equal(states, run(policy, sync=True)["states"])
            known = Fixed(states[:, None], policy.scale)
            values = alternate({"async": lambda: step(policy), "sync": lambda: step(policy, sync=True), "known": lambda: step(known),
                                "full": step})
            if horizon == L:
                decisions += [1000 * (a - b) for a, b in zip(values["async"], values["known"])]
            decision = found["latency_ms"]["decision"] = max(0.0, statistics.median(decisions))
            found["routed"].append({
                "horizon": horizon, "speedup_target": target, "measured": ratio(values, "full", "async"), "blocks_ms": blocks_ms(states[:, context:], table),
                "async / known": ratio(values, "async", "known"), "async / sync": ratio(values, "async", "sync"), "same states": same,
                "speedup_bits": speedup_bits(states, bit_costs(config))})
            for row in found["routed"]:
                row["promised / measured"] = ms["bf16"] / (overhead + decision + row["blocks_ms"]) / row["measured"]
            keep(found)
    return found, lambda: one_token(lambda f: run(policy, on_token=f))


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


def speed_gpu(args):
    device = pick_device(args.device)
    if device.type != "cuda":
        raise ValueError(f"--suite gpu: PyTorch {torch.__version__} finds no CUDA device here, or --device is cpu; run it where there is one")
    shapes = {}
    events = []
    bandwidth = read_bandwidth(device)
    caption = (f"Batch 1, 512 tokens of context, 64 new ones, median step (gpt-fast: mean), {args.rounds} alternating rounds; a random policy with "
               f"latency prices; memory read at {bandwidth:.0f} GB/s in the same run; our head is in INT8, and in bf16 where gpt-fast and "
               "transformers are compared. Of bf16 all blocks are one graph, but where INT8 and INT4, a graph a block, are compared with it.")

    def keep(found, quiet=True):  # minutes of work, whatever comes next
        shapes[found["name"]] = found
        about = SimpleNamespace(name=" and ".join(shapes), weights="shapes with random weights", fingerprint=lambda: None, device=device)
        publish(args, "speed-gpu", about, quiet=quiet, caption=caption, markdown=gpu_table([*shapes.values()]), bandwidth_gb_s=bandwidth,
                shapes=[*shapes.values()], kernels={" x ".join(map(str, k)): v for k, v in CHOSEN.items()}, timeline=events)

    names = list(SHAPES)[: args.limit]
    for name in names:
        found, trace = speed_of_shape(name, SHAPES[name], device, args.rounds, bandwidth, args.gpt_fast, keep)
        if name == names[-1]:
            events += trace()  # at the very end: a process that was profiled stays slower
            keep(found, quiet=False)
        trace = None  # frees the model


def gpu_table(shapes):
    line = lambda what, goal, f: [what, goal, *map(f, shapes)]
    rows = [line(f"{p}, tokens/s (share of the memory bandwidth)", ">= 85%" if p == "bf16" else "",
                 lambda r, p=p: f"{1000 / r['ms'][p]:.1f} ({100 * r['share_of_bandwidth'][p]:.0f}%)") for p in ("bf16", "INT8", "INT4")]
    rows += [line(key, goal, lambda r, key=key: f"{r[key]:.2f}" if r[key] else "not here") for key, goal in
             (("bf16 / gpt-fast", ">= 1.0"), ("bf16 / transformers", ">= 3"), ("INT8 / bf16", ">= 1.8"), ("INT4 / bf16", ">= 3.0"))]
    for n, first in enumerate(shapes[0]["routed"]):
        how = f"horizon {'1' if first['horizon'] == 1 else 'L'}, {first['speedup_target']:g}x asked"
        of = lambda key, digits=3, n=n: lambda r: f"{r['routed'][n][key]:.{digits}f}" if n < len(r["routed"]) else "not yet"
        rows += [line(f"routed, async / same states known ahead, {how}", "<= 1.02", of("async / known")),
                 line(f"async / sync, {how}", "< 1", of("async / sync")),
                 line(f"measured speedup, {how}", "", of("measured", 2))]
        if first["horizon"] > 1:  # whose decisions are in the latency table
            rows.append(line(f"promised / measured, {how}", "0.95 to 1.05", of("promised / measured")))
    same = lambda r: ("yes" if all(x["same states"] for x in r["routed"]) else "no") if r["routed"] else "not yet"
    rows += [line("the same states, async and sync", "all", same),
             line("weights in all three precisions", "<= 40 GB", lambda r: f"{r['bytes']['all'] / 1e9:.1f} GB")]
    return format_table(["", "goal", *(r["name"] for r in shapes)], rows)
