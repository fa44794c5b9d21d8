"""Measure:   python bench.py eval --task lm --method dash --speedup 2.0

    eval    one method on one task: perplexity in windows of the full model's text, the speedup in bits over all tokens
            of the run, and the measured speedup of batch-1 decoding against the full model

Perplexity uses fp32 and dequantised weights in parallel passes; decoding uses the real kernels (bf16 on the CPU). Both run
the same routed forward.
"""

import json
import statistics

import torch

import baselines
from data import load_text, read_text, windows
from infer import generate
from model import load
from policy import Parser, Policy, bit_costs, command_line, pick_device
from train import SAMPLE_TOKENS, SAMPLES, compare, profile

METHODS = ("full", "int8", "int4", "static_skip", "random_skip", "dash")
WINDOW = 1024  # tokens of an evaluation window


def make_policy(method, model, tokenizer, args, calibration):
    """A policy, or a function of the tokens that gives one (baselines.py), for a method's name."""
    if method == "dash":
        policy = Policy.load(args.policy).to(model.embed.weight.device)
        policy.check(model)
        return policy.at(args.speedup)
    similarity = None
    if method == "static_skip":
        baselines.skips(model.config.n_layer, args.speedup, bit_costs(model.config))  # out of reach: say so before measuring
        similarity = profile(model, windows(tokenizer, calibration, SAMPLES, SAMPLE_TOKENS, spread=True))["similarity"]
    return getattr(baselines, method)(model.config.n_layer, args.speedup, bit_costs(model.config), similarity, args.seed)


def measured_speedup(args, policy, prompt, tokens=24, pairs=3):
    """Decoding speed under the policy over that of the full model, batch 1, real kernels: median of alternating pairs."""
    model, tokenizer = load(args.model, args.device, torch.bfloat16)
    model.quantize(real=True)
    ids = torch.zeros(1, tokens + 64)
    routed = policy(ids) if callable(policy) else policy
    text = tokenizer.decode(tokenizer.encode(prompt)[:32])
    ratios = []
    for _ in range(pairs):
        speeds = [generate(model, tokenizer, text, p, tokens)["tokens_per_second"] for p in (routed, None)]
        ratios.append(speeds[0] / speeds[1])
    return statistics.median(ratios)


def evaluate(args):
    args.device = pick_device(args.device)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: at least 1")
    if args.task == "wikitext2":
        text, calibration = (load_text("wikitext2", split, args.data_dir) for split in ("test", "train"))
    elif args.file:
        text, calibration = read_text(args.file), load_text("pydocs", "train")
    else:
        text, calibration = load_text("pydocs", "test"), load_text("pydocs", "train")
    model, tokenizer = load(args.model, args.device, torch.float32)
    policy = make_policy(args.method, model, tokenizer, args, calibration)
    rows = windows(tokenizer, text, args.limit or 8, min(WINDOW, model.config.block_size), args.file or args.task).to(args.device)
    model.quantize()
    costs = bit_costs(model.config)
    full, row = compare(model, rows, [None, policy], costs)
    del model
    value, value_full = (torch.tensor(r["nats"]).exp().item() for r in (row, full))
    measured = 1.0 if args.method == "full" else measured_speedup(args, policy, text)
    print(f"{args.task}, {args.method}: perplexity {value:.3f} (full model {value_full:.3f}), KL {row['kl']:.4f} nats, "
          f"{row['speedup']:.3f}x in bits, {measured:.2f}x measured; {len(rows)} windows of {rows.shape[1]} tokens")
    if args.json:
        print(json.dumps({
            "task": args.task, "method": args.method, "speedup_target": args.speedup, "speedup_bits": row["speedup"],
            "speedup_measured": measured, "metric": "perplexity", "value": value, "value_full": value_full, "kl": row["kl"],
            "top1": row["top1"], "n": len(rows), "tokens": rows.numel(), "states": row["states"], "device": str(args.device),
            "model": args.model}))


def main():
    p = Parser(__doc__)
    p.add_argument("command", nargs="?", default="eval", choices=["eval"])
    p.add_argument("--task", default="lm", choices=["lm", "wikitext2"], help="lm reads --file, or held-out pydocs without it")
    p.add_argument("--file", help="a UTF-8 text file for --task lm")
    p.add_argument("--data-dir", help="folder with wikitext2/test.txt and so on")
    p.add_argument("--method", default="dash", choices=METHODS)
    p.add_argument("--speedup", type=float, default=2.0, help="speedup in bits to aim at")
    p.add_argument("--policy", default="out/policy.safetensors", help="for --method dash")
    p.add_argument("--model", default="smollm2")
    p.add_argument("--limit", type=int, help="windows of 1,024 tokens to evaluate, from the start (default 8)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    evaluate(p.parse_args())


if __name__ == "__main__":
    command_line(main)
