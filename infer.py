"""Generate text under a routing policy:   python infer.py --prompt "The three laws of" --show-states

Decoding is greedy or sampled, one token at a time through the KV cache. Every token of the prompt and of the answer runs
each block in the state that the policy chooses (Eq 18-20); the weights are bf16 with real INT8 and INT4
kernels. While decoding, the price follows what was spent, so that any text comes near the asked speedup. What is timed is the
median decoding step after the prompt, for the policy and for the full model in the same run.

On a GPU one sequence is decoded by `Engine`: a captured CUDA graph for every (block, state, bucket of cache length), launched by the
host as the states become known, while the scorer runs on a second stream. Prompts, batches and the CPU take the eager path, `LLM.hidden`.
"""

import codecs
import gc
import json
import math
import os
import shutil
import statistics
import sys
import time

import torch

from common import Parser, command_line, count, lacks_memory, pick_device
from model import CHUNK, Block, KVCache, load
from policy import Fixed, Policy, Scorer, bit_costs, mean_cost, plan, speedup_bits, state_shares, walk
from quant import CHOSEN, compiled


COLORS = {0: "\033[90m", 1: "\033[36m", 2: "\033[33m", 4: "\033[31m"}  # skip grey, INT4 cyan, INT8 yellow, full red
RESET = "\033[0m"


# ----------------------------------------------------------------------------------------------------------
# One sequence on a GPU


def bucket_of(n):
    """How many slots of the cache a token reads that may attend to n: at least n, less than n + max(CHUNK, n / 4)."""
    step = max(CHUNK, 2 ** n.bit_length() // 8)
    return -(-n // step) * step


class Bucket:
    """One block's keys and values (1, slots, 2 n_kv_head, D) as a captured graph sees them: it writes to the slot that the tensor
    `position` names and reads the slots as far as the tensor `ends` says (`attend_in_parts`). They are those of a bucket, so one graph serves
    every token of it, and attention does not read the whole cache."""

    def __init__(self, kv, position, ends, starts):
        self.kv = kv
        self.position = position
        self.ends = ends
        self.starts = starts

    def store(self, k, v, i):
        """As KVCache.store, for one token; the third thing returned is `Block.attend`'s mask."""
        self.kv.index_copy_(1, self.position, torch.cat([k, v], 2))
        return *self.kv.chunk(2, dim=2), (self.ends, self.starts)


# What graphs run, as functions of all that differs from token to token and block to block, so that one compilation serves them all


def embed_into(x, here, token, position, weight, tables, ends, last):
    """Move on to the next position: the token's embedding into x (1, C), the position's row of each table into `here`, and into `ends` how far
    the slots that it may see reach into each part; last: where each part ends when it is full."""
    position.add_(1)
    x.copy_(weight[token])
    for to, table in zip(here, tables):
        to.copy_(table[position])
    ends.copy_(torch.minimum(last, position + 1))


def block_into(out, block, x, s, scale, rope, bucket):
    """Run a block in state s on one token x (1, C), into `out`. scale (4,) fp32: a_i, padded so that every block's is aligned to 16 bytes;
    torch.compile copies what is not."""
    out.copy_(Block.forward(block, x, 1, [(s, None)], lambda rows: (rows.float() * scale[0]).to(rows.dtype), rope, bucket))


def head_into(out, model, x):
    """The logits after the last block's output x (1, C), into `out` (vocab,) fp32."""
    out.copy_(model.logits(model.norm(x))[0])


def best_into(out, scorer, of_blocks, x, where, mu, costs):
    """For blocks whose `Scorer.of_blocks` is given the best s' for each s (Eq 18), into `out` (g, 4), from a hidden state x (1, C)."""
    q = scorer.q(scorer.features(x[None], where), *of_blocks)[0, 0]
    out.copy_(torch.addcmul(q, mu, costs, value=-1).argmax(-1))


class Engine:
    """Decodes one sequence: graphs on the device, decisions on a second stream, launches by the host (batch 1).

    Every (block, state, bucket) is a CUDA graph of the one `Block.forward`, captured at its first use; the full model's blocks are one graph a
    bucket. All that crosses from one graph to another, or to the host, is a tensor made here, outside the graphs' pools, at an address that
    never changes:

        token     the id to run, from the host or the graph "head"
        position, rope, where, ends   where it stands, set by the graph "embed"
        h         block i reads h[i] and writes h[i + 1], two rows by turns, so a scorer can still read block i's input while block i
                  runs. Block i + 1 overwrites it, and is not launched before the scorer's answer has come. No block overwrites h[0],
                  the embedding: all blocks can run again, as they do before the full model's capture.
        mu, best  the price, from the host; for each block and each s the best s' (Eq 18), copied to pinned memory behind an event
        logits    from the graph "head"

    The scorer's graph for block i + 1 starts on the decision stream when block i starts on the main one (Eq 19-20). The host
    waits for that answer's event alone, looks its path up as `Policy.decide` does, and launches the graphs it names; it never
    waits for the main stream but for the token at its end. With a horizon of L that is one answer a token; until it comes, block 2 runs in the
    state of the token before, and again where the plan says another. `sync` runs the scorer on the main stream, before block i.

    Graphs of the main stream run one after the other and leave nothing in their pool, so they share one, in any order of replay.
    The scorer's run beside them: another pool. A graph is captured on the stream that it is for (the scorer's on the side, with `sync`
    too), since cuBLAS keeps a workspace for each stream. On the CPU, streams and events do nothing, and functions are called where a GPU replays their graphs.
    """

    def __init__(self, model, size):
        c, weight = model.config, model.embed.weight
        device, cuda = weight.device, weight.is_cuda
        self.model = model
        self.L = c.n_layer
        self.backend = torch.cuda if cuda else torch.cpu
        self.main, self.side = self.backend.Stream(), self.backend.Stream(priority=-1)  # what blocks wait for goes first
        self.ready, self.answered, self.done = (self.backend.Event() for _ in range(3))
        self.pools = [torch.cuda.graph_pool_handle() for _ in range(2)] if cuda else None
        self.size = bucket_of(size)
        self.graphs = {}
        self.cache = KVCache(model, 1, self.size)
        new = lambda *shape, dtype=weight.dtype: torch.zeros(shape, dtype=dtype, device=device)
        pinned = lambda t: torch.zeros(t.shape, dtype=t.dtype, pin_memory=cuda)
        self.token, self.position = new(1, dtype=torch.int64), new(1, dtype=torch.int64)
        self.scale = new(self.L, 4, dtype=torch.float32)
        rows = [new(1, c.n_embd), new(1, c.n_embd)]
        self.h = [new(1, c.n_embd), *(rows[i % 2] for i in range(self.L))]
        self.rope = [new(1, 1, c.head_dim), new(1, 1, c.head_dim)]
        self.where = new(1, 2, dtype=torch.float32)
        reach = min(self.size, c.block_size)
        self.tables = [*model.rope(0, reach), Scorer.positions(0, reach, device)]
        self.last = torch.arange(0, self.size + 1, CHUNK, device=device)
        self.ends = new(len(self.last), dtype=torch.int32)
        self.starts = torch.arange(len(self.last), dtype=torch.int32, device=device) * (c.n_head // c.n_kv_head)
        self.mu = new(1, dtype=torch.float32)
        self.costs = new(4, dtype=torch.float32)
        self.best = new(self.L, 4, dtype=torch.int64)
        self.logits = new(c.vocab_size, dtype=torch.float32)
        self.host_token, self.host_mu, self.host_best = pinned(self.token), pinned(self.mu), pinned(self.best)
        self.compiled = compiled if cuda else None
        self.plain = set()  # what it could not compile
        self.embed, self.head = self.capture(self.run_embed, self.main), self.capture(self.run_head, self.main)

    # What the graphs do

    def run_embed(self):
        self.fused(embed_into, self.h[0], [*self.rope, self.where], self.token, self.position, self.model.embed.weight, self.tables,
                   self.ends, self.last)

    def run_block(self, i, s, size):
        parts = size // CHUNK
        slots = self.cache.kv[i][0, :size][None]  # no stride is of the whole cache: else a larger engine's blocks would be compiled again
        bucket = Bucket(slots, self.position, self.ends[: parts + 1], self.starts[: parts + 1])
        self.fused(block_into, self.h[i + 1], self.model.blocks[i], self.h[i], s, self.scale[i], self.rope, bucket)

    def run_full(self, size):
        for i in range(self.L):
            self.run_block(i, 4, size)

    def run_scorer(self, scorer, i, blocks):
        of_blocks = scorer.of_blocks(blocks)
        self.fused(best_into, self.best[blocks[0] : blocks[-1] + 1], scorer, of_blocks, self.h[i], self.where, self.mu, self.costs)

    def run_head(self):
        self.fused(head_into, self.logits, self.model, self.h[self.L])
        torch.argmax(self.logits, 0, keepdim=True, out=self.token)  # as it is: compiled, one multiprocessor would do it alone

    def fused(self, f, *args):
        """On a GPU by torch.compile, which merges the small operators, or as it is where that fails."""
        if self.compiled and f not in self.plain:
            try:
                return self.compiled(f)(*args)
            except Exception as e:  # whatever compilers raise; in a capture it is not they: that calls f before
                if lacks_memory(e) or self.backend is torch.cuda and torch.cuda.is_current_stream_capturing():
                    raise
                self.plain.add(f)
                why = f"not compiled, {type(e).__name__}: {e}".splitlines()[0][:200]
                CHOSEN[(f.__name__,)] = {"kernel": why}
                print(f"tokens take longer than they could: {f.__name__} is {why}", file=sys.stderr)
        f(*args)

    def capture(self, f, stream):
        """f as a graph for a stream: a function that launches it on the current one. f may run any number of times before."""
        if self.backend is torch.cpu:
            return f
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(2):  # what first calls do (compile, tune; AOTAutograd runs its first in a mode of its own) is not allowed in a capture
                f()
        # Kernels keep the address of cuBLAS's workspace: let it lie in the graphs' pool, where nobody who clears the others can free it
        torch._C._cuda_clearCublasWorkspaces()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pools[stream is self.side], stream, capture_error_mode="thread_local"):
            f()
        torch._C._cuda_clearCublasWorkspaces()
        return graph.replay

    def graph(self, key, stream, f, *args):
        if key not in self.graphs:
            self.graphs[key] = self.capture(lambda: f(*args), stream)
        return self.graphs[key]

    # What the host does

    def copy(self, to, source):
        """On the current stream, between the device and pinned memory; the host goes on."""
        to.copy_(source, non_blocking=True)

    def wait(self):
        """Let the current stream wait for all that was launched: before it writes the cache, or frees what the engine reads."""
        for stream in (self.main, self.side):
            self.backend.current_stream().wait_stream(stream)

    def start(self, policy, length, sync=False):
        """Go on after a prompt of `length` tokens, which the current stream put into `cache`."""
        self.policy = policy
        self.length = length
        self.sync = sync
        self.begun = False
        self.asked = self.price = self.second = None  # second: the last state of block 2
        self.wait()
        self.position.fill_(length - 1)
        self.scale[:, 0] = torch.tensor([1.0] * self.L if policy is None else policy.scale)
        self.routed = isinstance(policy, Policy)
        self.given = policy.given.shape[2] if isinstance(policy, Fixed) and policy.given.dim() == 3 else math.inf  # recorded states end
        if self.routed:
            self.costs.copy_(policy.costs)
        for stream in (self.main, self.side):
            stream.wait_stream(self.backend.current_stream())

    def begin(self):
        """Launch what needs no answer of the token in `token`, which may be known to the device alone: the first block and the scorer that
        reads its output, or all blocks."""
        self.begun = True
        self.early = None  # the state in which block 2 was launched before its plan came
        self.length += 1
        if self.routed and self.price != self.policy.mu:
            self.price = self.host_mu[0] = self.policy.mu  # the last copy was read before the last answer came
            with self.backend.stream(self.main if self.sync else self.side):
                self.copy(self.mu, self.host_mu)
        self.embed()
        if self.policy is None:
            self.path = [4] * self.L
            size = bucket_of(self.length)
            self.graph(("full model", size), self.main, self.run_full, size)()
        else:
            self.path = [4] if self.routed else self.policy.window(self.length - 1, 1)[:, 0, 0].tolist()
            for i in range(len(self.path)):
                self.block(i)
        if self.routed and self.policy.horizon > 1 and self.L > 1:
            self.ready.record(self.main)
            self.ask(1, plan(1, self.L, self.policy.horizon))
            if self.second is not None and not self.sync:  # the scorer reads the input of block 2, which does not write it
                self.early = self.second
                self.launch(1, self.early)

    def block(self, i):
        """Launch block i, and the scorer on its input where that decides blocks; wait for an answer only where block i needs it.

        The scorer is asked before the block's launch with `sync`, or where its answer is for this very block (horizon 0); else after it,
        behind an event that marks its input."""
        if self.asked and len(self.path) == i:
            self.take()
        blocks = plan(i, self.L, self.policy.horizon) if self.routed else ()
        asks = blocks and blocks[0] >= len(self.path)  # else `begin` has asked
        before = self.sync or len(self.path) == i  # on the stream of the blocks, or (horizon 0) for block i itself
        if asks:
            self.ready.record(self.main)  # the input of block i is there
        if asks and before:
            self.ask(i, blocks)
        if len(self.path) == i:
            self.take()
        s = self.path[i]
        if i != 1 or s != self.early:
            self.launch(i, s)
        if i == 1:
            self.second = s
        if asks and not before:  # the block first: its launch must not wait for the scorer's
            self.ask(i, blocks)

    def launch(self, i, s):
        size = bucket_of(self.length) if s else self.size  # a skip reads no keys
        self.graph((i, s, size), self.main, self.run_block, i, s, size)()

    def ask(self, i, blocks):
        """Start the scorer on the input of block i, to decide `blocks`."""
        scorer = self.policy.scorer
        self.asked = blocks
        score = self.graph((scorer, i, self.policy.horizon), self.side, self.run_scorer, scorer, i, blocks)
        stream = self.main if self.sync else self.side
        stream.wait_event(self.ready)
        with self.backend.stream(stream):
            score()
            self.copy(self.host_best, self.best)
            self.answered.record(stream)

    def take(self):
        """Wait for the scorer's answer and follow the path through it."""
        self.answered.synchronize()
        self.path += walk(self.host_best[self.asked[0] : self.asked[-1] + 1].tolist(), self.path[-1])
        self.asked = None
        if len(self.path) == self.L and self.policy.tracked:
            self.policy.follow(self.path)

    @torch.inference_mode()
    def step(self, token, sample=None, more=False):
        """Run one token -> the next one, and the states (L, 1) uint8 that made it.

        sample: a function of the logits (vocab,) fp32; None takes the likeliest and, with `more`, begins to run it before
        the host knows which it is; the next call must be for it.
        """
        with self.backend.stream(self.main):
            if not self.begun:
                self.host_token[0] = token
                self.copy(self.token, self.host_token)
                self.begin()
            for i in range(1 if self.routed else self.L, self.L):  # those that `begin` did not launch
                self.block(i)
            states = torch.tensor(self.path, dtype=torch.uint8)[:, None]
            self.begun = False
            self.head()
            if sample:
                return sample(self.logits), states
            self.copy(self.host_token, self.token)
            self.done.record(self.main)
            if more and self.length < self.given:
                self.begin()
            self.done.synchronize()
            return int(self.host_token), states


def has_graphs(model, policy):
    """Whether an engine can follow this policy; others, a subclass with a `decide` of its own too, are run eagerly."""
    if policy is None:
        return True
    routed = type(policy) is Policy and policy.tau is None and not torch.is_tensor(policy.mu) and len(policy.allowed) == 4
    known = type(policy) is Fixed
    return (routed or known) and policy.kv == "fill" and len(policy.scale) == model.config.n_layer


def engine_for(model, policy, size):
    """The model's engine, made on first use, if it has one (on a GPU) and can follow this policy; else None."""
    if not has_graphs(model, policy):
        return None
    if model.device.type == "cuda" and (model.engine is None or model.engine.size < size):
        model.engine = None
        gc.collect()  # an engine and its graphs hold each other: free them before there is another
        model.engine = Engine(model, size)
    return model.engine


def prompt_ids(model, tokenizer, prompt, chat=False):
    """The ids of a prompt, text or the user's turn of a chat. ValueError for an empty one, and one that leaves no room in the context."""
    ids = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else tokenizer.encode_prompt(prompt)
    if not prompt or not ids:
        raise ValueError("the prompt is empty; give at least one character that the tokenizer knows")
    if len(ids) >= model.config.block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens, this model's context is {model.config.block_size}; shorten the prompt")
    return ids


@torch.inference_mode()
def generate(model, tokenizer, prompt, policy=None, max_new_tokens=128, temperature=0.0, seed=0, chat=False, on_token=None, sync=False,
             eager=False, ignore_eos=False):
    """Continue a prompt (text, or the user's turn of a chat); greedy at temperature 0, else sampled from `seed`. policy: what
    `LLM.forward` takes, or None for the full model.

    Returns a dict: "text", "tokens" (ids), "prompt_tokens" (their number), "states" (L, N) uint8 of all N tokens that were
    run, the prompt first, or (2 L, N) (see `LLM.hidden`), "token_states" (L, n): those that produced each new token, "first_token_s" and
    "step_s" (seconds of the prompt, and median from one token's coming to the next one's), "tokens_per_second". Where no second token
    came, step_s is that of the prompt. `on_token(id, text, states)` is called as tokens come; its text never ends in half a character. sync: on
    a GPU, decide on the stream that runs the blocks; eager: without CUDA graphs; ignore_eos: go on after an end token.
    ValueError as `prompt_ids`, for max_new_tokens below 1, and for logits that are not finite.
    """
    ids = prompt_ids(model, tokenizer, prompt, chat)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    if policy is not None:
        model.quantize_for(policy)  # `LLM.hidden` would do it too late: an engine captures the weights that there are
    L = model.config.n_layer
    generator = torch.Generator().manual_seed(seed)
    most = min(max_new_tokens, model.config.block_size - len(ids))
    engine = None if eager else engine_for(model, policy, len(ids) + most)
    if engine:
        engine.wait()
        engine.cache.length = 0
    cache = engine.cache if engine else KVCache(model, 1, len(ids) + most)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ran, new, seconds = [], [], []
    came = time.perf_counter()

    def sample(logits):
        return int(torch.multinomial(((logits - logits.max()) / max(temperature, 1e-30)).softmax(-1).cpu(), 1, generator=generator))

    while True:
        if engine and new:
            token, states = engine.step(new[-1], sample if temperature > 0 else None, more=len(new) + 1 < most)
        else:
            now = new[-1:] or ids
            logits = model.logits(model.hidden(torch.tensor([now], device=model.device), policy, cache)[:, -1])[0]
            if not ran and not logits.isfinite().all():
                raise ValueError(f"{model.name}: its logits are not finite; the weights are corrupt, download them again")
            token = sample(logits) if temperature > 0 else int(logits.argmax())
            states = torch.full((L, len(now)), 4, dtype=torch.uint8) if policy is None else policy.states[:, 0].cpu()
            if engine:
                engine.start(policy, len(ids), sync)
        before, came = came, time.perf_counter()  # from token to token: a GPU is at the next one before this one is here
        seconds.append(came - before)
        ran.append(states)
        if token in tokenizer.eos and not ignore_eos:
            break
        new.append(token)
        last = len(new) == most
        if on_token:
            on_token(token, decoder.decode(tokenizer.decode_bytes([token]), final=last), states[:, -1])
            if not engine:  # nothing ran meanwhile; an engine is at the next token
                came = time.perf_counter()
        if last:
            break
    if on_token and (rest := decoder.decode(b"", final=True)):  # an end token came within a character
        on_token(token, rest, states[:, -1])
    if engine:
        engine.wait()
    states = torch.cat(ran, 1)
    step_s = statistics.median(seconds[1:] or seconds)
    return {"text": tokenizer.decode_bytes(new).decode("utf-8", "replace"), "tokens": new, "prompt_tokens": len(ids),
            "states": states,
            "token_states": states[:, len(ids) - 1 :][:, : len(new)],
            "first_token_s": seconds[0], "step_s": step_s, "tokens_per_second": 1 / step_s}


# ----------------------------------------------------------------------------------------------------------
# What a person sees


def paint(text, state, color):
    return f"{COLORS[state]}{text}{RESET}" if color and text else text


def show_states(tokenizer, out, costs, color):
    width = shutil.get_terminal_size().columns
    legend = "  ".join(paint(word, s, color) for word, s in ((". skip", 0), ("1 INT4", 1), ("2 INT8", 2), ("4 full", 4)))
    print(f"\nblocks 1 to {len(out['states'])}, their mean cost, token     {legend}")
    for token, states in zip(out["tokens"], out["token_states"].T.tolist()):
        cost = mean_cost(torch.tensor(states), costs)
        line = f" {cost:4.2f}  {json.dumps(tokenizer.decode([token]), ensure_ascii=False)}"
        path = "".join(paint(str(s or "."), s, color) for s in states)
        print(f"{path}{line[: max(20, width - len(states))]}")


# ----------------------------------------------------------------------------------------------------------


def arguments():
    p = Parser(__doc__)
    p.add_argument("--prompt", default="The Python programming language is", help="text to continue")
    p.add_argument("--chat", action="store_true", help="the prompt is a user's message; use the model's chat template")
    p.add_argument("--policy", default="out/policy.safetensors", help="a policy made by train.py (%(default)s)")
    p.add_argument("--speedup", type=float, default=2.0, help="speedup in what the policy counts, bits or time (%(default)s); any for which it has a price")
    p.add_argument("--full", action="store_true", help="no policy: every block as loaded")
    p.add_argument("--max-new-tokens", type=count, default=128, help="tokens to add to the prompt (%(default)s)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--sync", action="store_true", help="on a GPU: decide on the stream that runs the blocks, not beside it")
    p.add_argument("--show-states", action="store_true", help="colour tokens by cost and draw the path of each")
    p.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return p.parse_args()


def main():
    args = arguments()
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature}: give 0 (greedy) or more")
    device = pick_device(args.device)
    policy = None if args.full else Policy.load(args.policy).at(args.speedup, track=True).to(device)
    model, tokenizer = load(args.model, device, torch.bfloat16, routed=not args.full)
    prompt_ids(model, tokenizer, args.prompt, args.chat)  # to be refused before anything is made ready or printed
    if device.type == "cuda":
        print("compiling for this GPU takes minutes the first time", file=sys.stderr)
    if policy:
        policy.check(model)
        model.quantize(real=True, int4=policy.int4)
    else:
        model.ready_to_decode()
    costs = bit_costs(model.config)
    color = sys.stdout and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    options = dict(temperature=args.temperature, seed=args.seed, chat=args.chat, sync=args.sync)
    # a reference that ended at once would time the prompt
    timed = lambda p, tokens: generate(model, tokenizer, args.prompt, p, tokens, ignore_eos=True, **options)["tokens_per_second"]
    if device.type == "cuda":
        for p in dict.fromkeys((policy, None)):  # graphs are captured at their first use, which is not to be timed
            timed(p, args.max_new_tokens)

    def stream(token, text, states):
        cost = mean_cost(states, costs)
        print(paint(text, min(COLORS, key=lambda s: abs(s - cost)), color and args.show_states), end="", flush=True)

    print(paint(args.prompt, 0, color), end="\n" if args.chat else "", flush=True)
    out = generate(model, tokenizer, args.prompt, policy, args.max_new_tokens, on_token=stream, **options)
    print()
    if args.show_states:
        show_states(tokenizer, out, costs, color)
    # a GPU is kept waiting by what is printed, so it is timed in silence; on a CPU `generate` leaves that out
    speed = timed(policy, args.max_new_tokens) if device.type == "cuda" else out["tokens_per_second"]
    speed_full = speed if args.full else timed(None, min(32, args.max_new_tokens))
    bits = speedup_bits(out["states"], costs)
    times = speed / speed_full if out["states"].shape[1] > out["prompt_tokens"] else None  # of steps after the prompt
    print(f"\n{len(out['tokens'])} tokens at {speed:.1f} tokens/s; mean cost {4 / bits:.2f} of 4 a block, {bits:.2f}x in bits; "
          + (f"measured {times:.2f}x over --full ({speed_full:.1f} tokens/s)" if times else "too few to measure a speedup"))
    if args.json:
        print(json.dumps({
            "task": "generate", "method": "full" if args.full else "dash", "speedup_target": 1.0 if args.full else args.speedup,
            "speedup_bits": bits, "speedup_measured": times, "metric": "tokens_per_second", "value": speed,
            "value_full": speed_full, "n": len(out["tokens"]), "device": str(device), "model": args.model, "text": out["text"],
            "tokens_per_second": speed, "tokens_per_second_full": speed_full, "states": state_shares(out["states"])}))


if __name__ == "__main__":
    command_line(main)
