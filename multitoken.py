"""Direct multi-token decoding: the late blocks alone make the second and later tokens of each cycle (Luo et al., arXiv 2510.11958).

A cycle has tau tokens. Its first position, the head, runs all blocks; the tau - 1 others run only the last `late` blocks:

    input of the late blocks at position t  =  h_{L - late}(t) at a head,  h_0(t), the token's embedding, elsewhere

so what the early and middle blocks thought at the head reaches the others through attention alone. The next head brings the keys
and values of the early and middle blocks up to date: it runs them on the tau - 1 positions that passed them by and on itself, in one
pass (*cyclical refilling*). Then all that a token attends to is what it was in training, where the early blocks see every position
and a mask says what goes on to the late ones (*cyclical masking*); tests/test_multitoken.py holds the two to each other.

Blocks are *passed* (their weights read) (L + (tau - 1) late) / (tau L) times as often, which is what a batch of one waits for, and
the paper's measure. Arithmetic is not saved: refilled positions run every block, only later and together.

From the paper and its training code (github.com/luoxuan-cs/Direct-Multitoken-Decoding): 8 late blocks of Qwen3-4B's 36, loss on the
next token at every position, rate 1e-4 with a tenth of warm-up and a cosine, clipping at 1, embedding and head frozen. Ours:
    late blocks   as many in proportion: 7 of SmolLM2's 30
    trained       the late blocks alone: no backward pass through the others and a quarter of the optimizer's memory; but the early
                  and middle blocks can't learn to think ahead, as they can when the paper trains them too
    heads         theirs get h_0 on top of h_{L - late}; ours don't, so that tau = 1 is the model as it was before any training
    places        a cycle begins anywhere: each training step draws where, decoding begins one at the prompt's last token, every test
                  token is measured at every place. The first token of a text is always a head: attention leans on it
    control       tau = 1, trained alike: what the text itself teaches the late blocks is no merit of the method
"""

import math
import time

import torch
import torch.nn.functional as F

from baselines import spread
from common import Checkpoint, descend, format_table, lock_folder, pick_device
from data import load_text, windows
from evaluate import in_rounds, publish, ratio
from model import KVCache, load
from train import digest

BATCH, WINDOW, LR = 2, 256, 1e-4  # windows a training step, tokens of a window
TAUS, NEW = (1, 2, 3, 4), 61  # cycles; tokens to decode, one more than a multiple of every tau, for whole cycles


def in_proportion(n_layer):
    """Late blocks: 8 of 36, as in the paper."""
    return max(1, round(n_layer * 8 / 36))


def heads(start, end, tau, phase):
    """Which positions start..end-1 run all blocks, (end - start, 1) bool: the first of the text, and every tau-th from `phase`."""
    t = torch.arange(start, end)[:, None]
    return (t == 0) | ((t - phase) % tau == 0)


def run(blocks, x, B, rope, cache=None, i=0):
    """Blocks in a row, the first of them number i of the cache: (B * T, C) -> (B * T, C)."""
    for n, block in enumerate(blocks, i):
        x = block(x, B, [(4, None)], 1.0, rope, cache, n)
    return x


@torch.no_grad()
def think(model, tokens, late):
    """All but the late blocks on tokens (B, T): h_0 and h_{L - late}, (B * T, C) each. They are never trained."""
    x = model.embed(tokens).flatten(0, 1)
    return x, run(model.blocks[:-late], x, len(tokens), model.rope(0, tokens.shape[1]))


def hidden(model, tokens, tau, late, phase=0, thought=None):
    """The parallel form, cyclical masking: tokens (B, T) -> the normed last hidden state (B, T, C). thought: of `think`, if at hand."""
    B, T = tokens.shape
    embedded, thought = thought or think(model, tokens, late)
    x = torch.where(heads(0, T, tau, phase).to(tokens.device).repeat(B, 1), thought, embedded)
    return model.norm(run(model.blocks[-late:], x, B, model.rope(0, T))).view(B, T, -1)


@torch.no_grad()
def decode(model, ids, tau, n, late):
    """Greedy cyclical decoding with a cache: n tokens after ids, a list; no token ends it.

    Returns a dict: "tokens"; "logits" (n, vocab) fp32; "tokens_per_second", "passes" (times that a block was passed, a token) and
    "token_blocks" (blocks that a token ran in, refilling included), the three after the first token. ValueError for no ids or too many,
    and for tau or late out of range.
    """
    P, L = len(ids), len(model.blocks)
    if tau < 1 or not 1 <= late < L:
        raise ValueError(f"a cycle of {tau} tokens, {late} late blocks: give at least 1 token, and 1 to {L - 1} of the model's {L} blocks")
    if not ids or n < 2 or P + n > model.config.block_size:
        raise ValueError(f"{P} tokens and {n} new ones: give at least 1 and 2, together at most the context of {model.config.block_size}")
    tokens = torch.tensor([*ids, *[0] * n], device=model.device)
    cache = KVCache(model, 1, P + n)
    wait = torch.cuda.synchronize if tokens.is_cuda else lambda: None
    filled, passes, rows, logits = 0, 0, 0, []
    for t in range(P - 1, P + n - 1):
        if t == P:
            wait()
            began, passes, rows = time.perf_counter(), 0, 0
        start = 0 if t < P else t
        x = model.embed(tokens[start : t + 1])
        if (t - P + 1) % tau == 0:
            cache.length = filled  # the early blocks are behind: refill
            new = model.embed(tokens[filled : t + 1])
            thought = run(model.blocks[:-late], new, 1, model.rope(filled, len(new)), cache)
            passes, rows, filled = passes + L - late, rows + (L - late) * len(new), t + 1
            x = torch.where(heads(start, t + 1, tau, P - 1).to(x.device), thought[-len(x) :], x)
        cache.length = start
        passes, rows = passes + late, rows + late * len(x)
        x = run(model.blocks[-late:], x, 1, model.rope(start, len(x)), cache, L - late)
        logits.append(model.logits(model.norm(x[-1:]))[0])
        tokens[t + 1] = logits[-1].argmax()
    wait()
    seconds = time.perf_counter() - began
    return {"tokens": tokens[P:].tolist(), "logits": torch.stack(logits), "tokens_per_second": (n - 1) / seconds,
            "passes": passes / (n - 1), "token_blocks": rows / (n - 1)}


@torch.no_grad()
def nats_by_place(model, rows, tau, late, first):
    """-log p of every next token of rows (N, T) with its position at every place of the cycle: (tau, N), means over positions first..T-2.

    first: at least tau, so that every position has its head before it. ValueError for windows that are too short.
    """
    T = rows.shape[1]
    out = []
    if not tau <= first < T - 1:
        raise ValueError(f"windows of {T} tokens are too short, as the first {first + 1} have no place in a cycle of {tau}; give a longer text")
    for some in rows.split(4):
        thought = think(model, some, late)
        total = torch.zeros(tau, len(some), device=rows.device)
        for phase in range(tau):
            logits = model.head(hidden(model, some, tau, late, phase, thought)[:, first:-1]).float()
            nats = F.cross_entropy(logits.flatten(0, 1), some[:, first + 1 :].flatten(), reduction="none").view(len(some), -1)
            total.index_add_(0, (torch.arange(first, T - 1, device=rows.device) - phase) % tau, nats.T)
        out.append(total / (T - 1 - first))
    return torch.cat(out, 1).cpu()


def finetune(model, rows, tau, late, steps, checkpoint, lr=LR):
    """Train the late blocks on windows (N, T) with cycles of tau, in place. Goes on from the checkpoint's step, to the same weights."""
    parameters = {name: p.requires_grad_() for name, p in model.blocks[-late:].named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(checkpoint.seed)
    for step, bar in checkpoint.steps(f"train, cycles of {tau}", steps, 25, parameters, optimizer, generator):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator).to(rows.device)]
        phase = int(torch.randint(tau, (), generator=generator))
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / (0.1 * steps), (1 + math.cos(math.pi * step / steps)) / 2)
        logits = model.head(hidden(model, batch, tau, late, phase)[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        descend(loss, optimizer, parameters.values())
        bar.set_postfix(ce=f"{loss.item():.3f}")
    for p in parameters.values():
        p.requires_grad_(False)


def multitoken(args):
    """Measure, train, measure again for each tau, from the same weights.

    Rows of the result, one a tau: before, after: nats by place; each: after, by place and window; faster: tokens/s over the full model's,
    median of alternating rounds; passes, token_blocks: shares of L; text: greedy.
    """
    task = "wikitext2" if args.data_dir else "pydocs"
    device = pick_device(args.device)
    if args.task not in (None, task):
        raise ValueError(f"multitoken --task {args.task}: it trains on wikitext2 with --data-dir, else on pydocs; leave --task out")
    text, held_out = (load_text(task, split, args.data_dir) for split in ("train", "test"))
    model, tokenizer = load(args.model, device, torch.float32)
    size = min(WINDOW, model.config.block_size)
    folder = lock_folder(args.out)
    L = len(model.blocks)
    train = windows(tokenizer, text, 10**6, size, task).to(device)
    test = windows(tokenizer, held_out, args.limit or (10**6 if args.full else 16), size, task, spread=True).to(device)
    settings = {"data": task, "steps": args.steps, "seed": args.seed, "fingerprint": model.fingerprint(), "text": digest(text)}
    late = in_proportion(L)
    prompt = test[0, :32].tolist()
    rows = []
    start = {k: p.clone() for k, p in model.blocks[-late:].state_dict().items()}
    made = lambda tau: decode(model, prompt, tau, NEW, late)
    made(1)  # too short a context or text, or too few blocks: say so before any training
    nats_by_place(model, test[:1], 1, late, max(TAUS))
    checkpoints = {tau: Checkpoint(folder / f"multitoken-{tau}.safetensors", settings | {"tau": tau}, args.seed, args.resume) for tau in TAUS}
    for tau in TAUS:
        before = nats_by_place(model, test, tau, late, max(TAUS))
        finetune(model, train, tau, late, args.steps, checkpoints[tau])
        after = nats_by_place(model, test, tau, late, max(TAUS))
        values = in_rounds(args.rounds, {"cycles": lambda: made(tau)["tokens_per_second"], "full": lambda: made(1)["tokens_per_second"]})
        out = made(tau)
        rows.append({"tau": tau, "late": late, "before": before.mean(1).tolist(), "after": after.mean(1).tolist(), "each": after.tolist(),
                     "faster": ratio(values, "cycles", "full"), "tokens_per_second": values, "passes": out["passes"] / L,
                     "token_blocks": out["token_blocks"] / L, "text": tokenizer.decode(out["tokens"])})
        model.blocks[-late:].load_state_dict(start)
    cells, places = [], lambda nats: " ".join(f"{v:.3f}" for v in nats)
    for r in rows:
        change = spread(*(torch.tensor(x["each"]).mean(0) for x in (r, rows[0])), form="+.3f")
        times = [a / b for a, b in zip(*r["tokens_per_second"].values())]
        cells.append([r["tau"], places(r["before"]), places(r["after"]), change,
                      f"{r['faster']:.2f}x [{min(times):.2f}, {max(times):.2f}]", f"{100 * r['passes']:.1f}%", f"{100 * r['token_blocks']:.1f}%"])
    header = ["tau", "nats by place in the cycle, before", "after", "mean, against tau = 1", "tokens/s [of rounds]", "passes", "blocks run a token"]
    caption = (f"Direct multi-token decoding: {late} late blocks of {L}, {args.steps} steps of {BATCH} x {size} tokens, {task}; "
               f"{test.numel()} held-out tokens; 95% intervals over windows. Greedy decoding, fp32, {args.rounds} alternating rounds.")
    publish(args, "multitoken", model, caption=caption, markdown=format_table(header, cells), steps=args.steps, tokens=test.numel(), rows=rows)
