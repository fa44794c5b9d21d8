"""Generate text under a routing policy:   python infer.py --prompt "The three laws of" --show-states

Decoding is greedy or sampled, one token at a time through the KV cache. Every token of the prompt and of the answer runs
each block in the state that the policy chooses (Eq 18-20); on the CPU the weights are bf16 with real INT8 and INT4
kernels. While decoding, the price follows what was spent, so that the asked speedup is met on any text. What is timed is the
median decoding step after the prompt, for the policy and for the full model in the same run.
"""

import codecs
import json
import shutil
import statistics
import sys
import time

import torch

from model import KVCache, load
from policy import Parser, Policy, bit_costs, command_line, mean_cost, pick_device, speedup_bits, state_shares

COLORS = {0: "\033[90m", 1: "\033[36m", 2: "\033[33m", 4: "\033[31m"}  # skip grey, INT4 cyan, INT8 yellow, full red
RESET = "\033[0m"


@torch.inference_mode()
def generate(model, tokenizer, prompt, policy=None, max_new_tokens=128, temperature=0.0, seed=0, chat=False, on_token=None):
    """Continue a prompt (text, or the user's turn of a chat); greedy at temperature 0, else sampled from `seed`.

    Returns a dict: "text", "tokens" (ids), "prompt_tokens" (their number), "states" (L, N) uint8 of all N tokens that were
    run, the prompt first, "token_states" (L, n): those that produced each new token, "first_token_s" and "step_s" (seconds of
    the prompt, and median of a step after it), "tokens_per_second". `on_token(id, text, states)` is called as tokens come;
    its text never ends in half a character. ValueError for an empty prompt or one that leaves no room in the context.
    """
    ids = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt, add_special_tokens=True)
    room = model.config.block_size - len(ids)
    if not prompt or not ids:
        raise ValueError("the prompt is empty; give at least one character that the tokenizer knows")
    if room < 1:
        raise ValueError(f"the prompt has {len(ids)} tokens, this model's context is {model.config.block_size}; shorten the prompt")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: at least 1")
    device, L = model.embed.weight.device, model.config.n_layer
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(model, 1, len(ids) + min(max_new_tokens, room))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ran, new, seconds = [], [], []
    step = torch.tensor([ids], device=device)
    while True:
        began = time.perf_counter()
        logits = model.logits(model.hidden(step, policy, cache)[:, -1])[0]
        if temperature > 0:
            token = int(torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator))
        else:
            token = int(logits.argmax())
        seconds.append(time.perf_counter() - began)
        states = torch.full((L, step.shape[1]), 4, dtype=torch.uint8) if policy is None else policy.states[:, 0].cpu()
        ran.append(states)
        if token in tokenizer.eos:
            break
        new.append(token)
        last = len(new) == min(max_new_tokens, room)
        if on_token:
            on_token(token, decoder.decode(tokenizer.decode_bytes([token]), final=last), states[:, -1])
        if last:
            break
        step = torch.tensor([[token]], device=device)
    step_s = statistics.median(seconds[1:] or seconds)
    return {"text": tokenizer.decode_bytes(new).decode("utf-8", "replace"), "tokens": new, "prompt_tokens": len(ids), "states": torch.cat(ran, 1),
            "token_states": torch.stack([s[:, -1] for s in ran[: len(new)]], 1) if new else torch.empty(L, 0, dtype=torch.uint8),
            "first_token_s": seconds[0], "step_s": step_s, "tokens_per_second": 1 / step_s}


# ----------------------------------------------------------------------------------------------------------
# What a person sees


def paint(text, state, color):
    return f"{COLORS[state]}{text}{RESET}" if color and text else text


def nearest_state(cost):
    return min(COLORS, key=lambda s: abs(s - cost))


def strip(states, color):
    """One token's path, a character a block: '.' skip, 1 INT4, 2 INT8, 4 full."""
    return "".join(paint("." if s == 0 else str(s), s, color) for s in states)


def show_states(tokenizer, out, costs, color):
    width = shutil.get_terminal_size().columns
    legend = "  ".join(paint(word, s, color) for word, s in ((". skip", 0), ("1 INT4", 1), ("2 INT8", 2), ("4 full", 4)))
    print(f"\nhow each token was made, block 1 to {len(out['states'])}, and its mean cost     {legend}")
    for token, states in zip(out["tokens"], out["token_states"].T.tolist()):
        cost = mean_cost(torch.tensor(states), costs)
        line = f" {cost:4.2f}  {json.dumps(tokenizer.decode([token]), ensure_ascii=False)}"
        print(f"{strip(states, color)}{line[: max(20, width - len(states))]}")


# ----------------------------------------------------------------------------------------------------------


def arguments():
    p = Parser(__doc__)
    p.add_argument("--model", default="smollm2", help="smollm2, a folder in Hugging Face layout, or a hub id")
    p.add_argument("--prompt", default="The Python programming language is", help="text to continue")
    p.add_argument("--chat", action="store_true", help="the prompt is a user's message; use the model's chat template")
    p.add_argument("--policy", default="out/policy.safetensors", help="a policy made by train.py")
    p.add_argument("--speedup", type=float, default=2.0, help="speedup in bits; any for which the policy has a price")
    p.add_argument("--full", action="store_true", help="no policy: every block as loaded")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--show-states", action="store_true", help="colour tokens by cost and draw the path of each")
    p.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return p.parse_args()


def main():
    args = arguments()
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature}: give 0 (greedy) or more")
    if not args.prompt:
        raise ValueError("the prompt is empty; give some text with --prompt")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"--prompt is no UTF-8 text (character {e.start}); convert it first") from None
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    device = pick_device(args.device)
    policy = None if args.full else Policy.load(args.policy).at(args.speedup, track=True).to(device)
    model, tokenizer = load(args.model, device, torch.bfloat16)
    if policy:
        policy.check(model)
        model.quantize(real=True, int4=policy.int4)
    costs, color = bit_costs(model.config), sys.stdout.isatty()

    def stream(token, text, states):
        print(paint(text, nearest_state(mean_cost(states, costs)), color and args.show_states), end="", flush=True)

    print(paint(args.prompt, 0, color), end="\n" if args.chat else "", flush=True)
    options = dict(temperature=args.temperature, seed=args.seed, chat=args.chat)
    out = generate(model, tokenizer, args.prompt, policy, args.max_new_tokens, on_token=stream, **options)
    print()
    if args.show_states:
        show_states(tokenizer, out, costs, color)
    full = out if args.full else generate(model, tokenizer, args.prompt, None, min(32, args.max_new_tokens), **options)
    speed, speed_full, bits = out["tokens_per_second"], full["tokens_per_second"], speedup_bits(out["states"], costs)
    print(f"\n{len(out['tokens'])} tokens at {speed:.1f} tokens/s; mean cost {4 / bits:.2f} of 4 a block, {bits:.2f}x in bits; "
          f"measured {speed / speed_full:.2f}x over --full ({speed_full:.1f} tokens/s)")
    if args.json:
        print(json.dumps({
            "task": "generate", "method": "full" if args.full else "dash", "speedup_target": 1.0 if args.full else args.speedup,
            "speedup_bits": bits, "speedup_measured": speed / speed_full, "metric": "tokens_per_second", "value": speed,
            "value_full": speed_full, "n": len(out["tokens"]), "device": str(device), "model": args.model, "text": out["text"],
            "tokens_per_second": speed, "tokens_per_second_full": speed_full, "states": state_shares(out["states"])}))


if __name__ == "__main__":
    command_line(main)
