"""The GPU engine on the CPU, direct calls for its graphs: the same tokens, states and logits as the eager path, in any legal order."""

import copy
import functools
import itertools
import json
import random
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.utils.flop_counter  # PyTorch's compiler would, and not find the operator that a test has replaced by then

import quant
import speed
from charts import draw
from conftest import script, tiny_folder
from infer import Engine, bucket_of, engine_for, generate
from model import RMSNorm, attend_in_parts, check_gpu, load
from policy import Fixed, bit_costs, random_states
from test_routing import random_policy

PROMPT = torch.randint(300, (110,), generator=torch.Generator().manual_seed(0)).tolist()  # ends 18 tokens before a bucket does


class Streams:
    """A GPU as the CUDA rules allow it to be at its worst: work waits in its stream until somebody must wait for it, and then
    streams take turns at random, held back only by the events that they were told to wait for."""

    def __init__(self, seed):
        fake, self.random, self.all, self.now = self, random.Random(seed), [], None

        class Event:
            def record(self, stream):
                self.ticket = []  # filled once the stream has got here
                stream.work.append(lambda ticket=self.ticket: ticket.append(True))

            def synchronize(self):
                fake.run_until(self.ticket)

        class Stream:
            def __init__(self):
                self.work = []
                fake.all.append(self)

            def wait_event(self, event):
                self.work.append(event.ticket)

            def wait_stream(self, other):
                event = Event()
                event.record(other)
                self.wait_event(event)
                if self is fake.default:  # the host's own calls are not queued
                    fake.run_until(event.ticket)

        self.Event, self.Stream = Event, Stream
        self.default = self.now = Stream()

    def run_until(self, ticket):
        while not ticket:
            ready = [s for s in self.all if s.work and (callable(s.work[0]) or s.work[0])]
            work = self.random.choice(ready).work.pop(0)  # an IndexError here is a deadlock
            if callable(work):
                work()

    def current_stream(self):
        return self.now

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before


class Shuffled(Engine):
    """An engine whose launches and copies happen when `Streams` lets them."""

    def __init__(self, model, size, seed):
        super().__init__(model, size)
        self.backend = fake = Streams(seed)
        self.main, self.side = fake.Stream(), fake.Stream()
        self.ready, self.answered, self.done = fake.Event(), fake.Event(), fake.Event()
        self.embed, self.head = self.capture(self.run_embed, self.main), self.capture(self.run_head, self.main)

    def capture(self, f, stream):
        return f if isinstance(self.backend, type(torch)) else lambda: self.backend.now.work.append(f)

    def copy(self, to, source):
        self.backend.now.work.append(lambda: to.copy_(source))


def uncompiled(name):
    """In place of `quant.row_kernel`."""
    row = quant.ROW_KERNELS[name]
    return functools.partial(quant.layer_of_one_row, row) if name.endswith("compiled") else row


def flash_attention(q, k, v, starts, ends, most_q, most_k, *rest):
    """What FlashAttention does with sequences side by side, on the CPU: q (n q's, H, D), k and v (S, H, D); an empty one has a logsumexp of +inf."""
    n, (S, H, D) = len(ends) - 1, k.shape
    inside = (torch.arange(S) >= ends[:-1, None]) & (torch.arange(S) < ends[1:, None])
    scores = torch.einsum("nqhd,shd->nqhs", q.view(n, most_q, H, D), k) / D**0.5
    scores = scores.masked_fill(~inside[:, None, None], float("-inf"))
    y = torch.einsum("nqhs,shd->nqhd", scores.softmax(-1).nan_to_num(), v)
    logsumexp = torch.where(inside.any(-1)[:, None, None], scores.logsumexp(-1), float("inf"))
    return y.reshape(q.shape), logsumexp.permute(2, 0, 1).reshape(H, -1)


def compare(model, policy, engine, tokens=24, eos=(), **options):
    """The eager path and the engine: the same ids and states; returns what the engine made."""
    tokenizer = SimpleNamespace(**vars(speed.IDS) | {"eos": eos})
    model.engine = None
    want = generate(model, tokenizer, PROMPT, policy, tokens, **options)
    model.engine = engine
    got = generate(model, tokenizer, PROMPT, policy, tokens, **options)
    model.engine = None
    assert got["tokens"] == want["tokens"] and torch.equal(got["states"], want["states"])
    assert torch.equal(got["token_states"], want["token_states"])
    return got


@torch.no_grad()
def test_block_2_runs_ahead_of_its_plan_and_again_where_that_differs(tmp_path):
    tiny_folder(tmp_path, layers=6)
    model, _ = load(str(tmp_path))
    model.quantize()
    for sync in (False, True):
        engine, launched = Engine(model, 200), []
        launch = engine.launch
        engine.launch = lambda i, s: (launched.append(s) if i == 1 else None, launch(i, s))
        states = compare(model, random_policy(model, 0, 6), engine, sync=sync)["token_states"][1, 1:].tolist()  # the first came with the prompt
        want = [s for last, s in zip([states[0], *states], states) for s in ([s] if sync or s == last else [last, s])]
        assert launched == want and len(set(states)) > 1


@pytest.mark.parametrize("kind, change, horizon", [("llama", {}, 1), ("llama", {}, 2), ("qwen2", {"num_key_value_heads": 1}, 6),
                                                   ("qwen3", {"tie_word_embeddings": False}, 1)])
@torch.no_grad()
def test_engine_equals_eager_decoding(tmp_path, kind, change, horizon):
    """Greedy and sampled, over a bucket's end, async and sync, under a policy, random states, a plan by position, and none."""
    tiny_folder(tmp_path, kind, layers=6, **change)
    model, _ = load(str(tmp_path))
    model.quantize()
    engine, seen = Engine(model, 300), set()
    for seed in range(2):
        policy = random_policy(model, seed, horizon)
        for sync in (False, True):
            out = compare(model, policy, engine, sync=sync)
            seen |= set(out["states"].flatten().tolist())
        compare(model, policy, engine, temperature=1.0, seed=seed)
    assert seen == {0, 1, 2, 4} and {k[-1] for k in engine.graphs if k[1] in (1, 2, 4)} >= {128, 256}
    states = random_states((6, 1, 300), 1.2, bit_costs(model.config), torch.Generator().manual_seed(1))
    for fixed in (None, Fixed([4, 0, 1, 2, 4, 1], policy.scale), Fixed(states, policy.scale)):
        compare(model, fixed, engine)


@torch.no_grad()
def test_what_runs_before_a_capture_leaves_no_trace(tmp_path):
    """A GPU runs all that a graph will run twice before it captures it: in the middle of a token, for the first block of a bucket or all of them."""
    class Twice(Engine):
        def capture(self, f, stream):
            f()
            f()
            return f

    tiny_folder(tmp_path, layers=6)
    model, _ = load(str(tmp_path))
    model.quantize()
    engine = Twice(model, 200)
    for policy in (None, Fixed([4, 0, 2, 1, 4, 0]), random_policy(model, 0, 1), random_policy(model, 0, 6)):
        compare(model, policy, engine)  # over a bucket's end


@pytest.mark.parametrize("horizon", [1, 2, 6])
@torch.no_grad()
def test_any_order_that_streams_allow_gives_the_same(tmp_path, horizon):
    tiny_folder(tmp_path, layers=6)
    model, _ = load(str(tmp_path))
    model.quantize()
    for seed in range(4):
        engine = Shuffled(model, 200, seed)
        for sync in (False, True):
            out = compare(model, random_policy(model, seed, horizon), engine, sync=sync)
        policy, eos = random_policy(model, seed, horizon), out["tokens"][3:4]
        short = compare(model, policy, engine, eos=eos)  # ends with the next token begun
        compare(model, Fixed(short["states"][:, None], policy.scale), engine, eos=eos)  # there is none: its states were not recorded
        compare(model, random_policy(model, seed + 1, horizon), engine, 10)


@torch.no_grad()
def test_the_shuffle_finds_a_race(tmp_path):
    """The test above can fail: without the scorer waiting for its input, or with one row for a block's input and output."""
    tiny_folder(tmp_path, layers=6)
    model, _ = load(str(tmp_path))
    model.quantize()

    class NoWait(Shuffled):
        def ask(self, i, blocks):
            self.side.wait_event = lambda event: None
            super().ask(i, blocks)

    class OneRow(Shuffled):
        def run_block(self, i, *rest):
            super().run_block(i, *rest)
            self.h[i].copy_(self.h[i + 1])

    for Wrong in (NoWait, OneRow):
        with pytest.raises(AssertionError):
            for seed in range(6):
                compare(model, random_policy(model, seed, 1), Wrong(model, 200, seed))


@torch.inference_mode()
def step_by_step(model, engine, tokens, start, policy):
    """Tokens (1, start + n), those from `start` on by the engine -> their logits (n, vocab), and the states (L, n) that made them."""
    rows, states = [], []
    engine.wait()
    engine.cache.length = 0
    model.hidden(tokens[:, :start].to(model.device), policy, engine.cache)
    engine.start(policy, start)
    for token in tokens[0, start:].tolist():
        _, path = engine.step(token, lambda logits: rows.append(logits.cpu().clone()) or 0)
        states.append(path)
    assert not engine.plain
    return torch.stack(rows), torch.cat(states, 1)


@torch.no_grad()
def test_logits_of_the_engine(tiny):
    """Step by step over the end of a bucket: every logit, next to a parallel pass over the same tokens and states."""
    model, _ = load(str(tiny))
    model.quantize()
    policy = random_policy(model, 3, 2)
    tokens = torch.randint(0, 300, (1, 140))
    logits, states = step_by_step(model, Engine(model, 300), tokens, 100, policy)
    states = torch.cat([policy.states[:, 0], states], 1)  # the prompt's first
    want = model(tokens, Fixed(states[:, None], policy.scale))[0, 100:]
    assert (logits - want).abs().max() < 2e-3 * want.abs().max()


@torch.no_grad()
def test_a_tracking_price_follows_in_the_engine(tiny):
    model, _ = load(str(tiny))
    model.quantize()
    for horizon in (1, 4):
        policy = random_policy(model, 5, horizon, spread=0.5)
        policy.prices = [(1.2, 0.0), (1.5, 0.1), (2.0, 0.3), (3.0, 0.8), (4.0, 2.0)]
        compare(model, policy.at(2.0, track=True), Shuffled(model, 200, 0), 40)
        assert policy.mu != policy.price(2.0)


@torch.no_grad()
def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(tiny, capsys, monkeypatch):
    model, _ = load(str(tiny))
    model.quantize()
    monkeypatch.setattr(quant, "CHOSEN", found := {})
    monkeypatch.setattr("infer.CHOSEN", found)
    engine = Engine(model, 200)
    engine.compiled = lambda f: f.no_such_thing
    compare(model, random_policy(model, 0), engine)
    assert all("no_such_thing" in v["kernel"] for v in found.values()) and set(found) == {("embed_into",), ("block_into",), ("head_into",), ("best_into",)}
    assert len(capsys.readouterr().err.strip().splitlines()) == 4  # each once


def test_buckets():
    assert [bucket_of(n) for n in (1, 128, 129, 512, 513, 1024, 1025, 4096)] == [128, 128, 256, 512, 640, 1024, 1280, 4096]
    for n in range(1, 5000):
        assert 0 <= bucket_of(n) - n <= max(127, n / 4) and bucket_of(bucket_of(n)) == bucket_of(n)


# ----------------------------------------------------------------------------------------------------------
# Kernels for one row, and `bench.py speed --suite gpu`


def test_what_is_promised_is_the_median_token():
    states = torch.tensor([[4, 4, 4], [0, 2, 4], [1, 1, 1]], dtype=torch.uint8)  # three tokens
    assert speed.blocks_ms(states, {"4": 4.0, "2": 3.0, "1": 2.0, "0": 0.5}) == 9.0  # of 6.5, 9 and 10


@pytest.mark.parametrize("N, K, compiled", [(64, 128, False), (34, 64, False), (96, 320, False), (34, 320, True)])
@torch.no_grad()
def test_row_kernels_against_the_reference(N, K, compiled):
    """What torch.compile gets, as it is and compiled (here for the CPU): a layer with all that may come before and after the product."""
    torch.manual_seed(0)
    w, x = torch.randn(N, K).bfloat16().float(), torch.randn(1, K).bfloat16()
    root = RMSNorm(K, 1e-5)
    torch.nn.init.uniform_(root.weight, 0.5, 2)
    codes, scale, zero = quant.quantize_int4(w)
    cases = {"bf16 compiled": ([w.bfloat16()], w),
             "int8 compiled": ([t if t.dtype == torch.int8 else t.bfloat16() for t in quant.quantize_int8(w)],
                               quant.dequantize_int8(*quant.quantize_int8(w))),
             "int4 compiled": ([quant.pack_nibbles(codes), torch.stack([scale, zero]).bfloat16()], quant.dequantize_int4(codes, scale, zero))}
    for name, (tensors, dense) in cases.items():
        layer = quant.RoutedLinear(K, N, bias=True)
        layer.load_state_dict({"weight": dense, "bias": torch.randn(N).bfloat16().float()}, assign=True)
        for norm, glu, add in ((None, False, False), (root, True, True)) if compiled else itertools.product((None, root), (False, True), (False, True)):
            n = N // (1 + glu)
            residual = torch.randn(1, n).bfloat16() if add else None
            args = (layer.bias, norm and norm.weight, 1e-5, residual, glu)
            got = quant.row_product(name, x, tensors, n, *args) if compiled else uncompiled(name)(x, tensors, *args)
            want = layer(x.float(), norm=norm, residual=residual, glu=glu)
            assert got.dtype == torch.bfloat16 and got.shape == (1, n) and (got - want).abs().max() < 0.01 * want.abs().max()


@torch.inference_mode()
@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_compilation_serves_parameters_copies_and_the_last_row_of_any_prompt(monkeypatch):
    """torch.compile guards on types and on every stride: what `row_product` passes on must not differ in them."""
    torch._dynamo.reset()
    layer = uncompiled("bf16 compiled")
    compiled = torch.compile(lambda *args: layer(*args), backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(quant, "row_kernel", lambda name: compiled)
    weight, norm = torch.nn.Parameter(torch.randn(8, 64).bfloat16()), torch.nn.Parameter(torch.randn(64).bfloat16())
    for x in (torch.randn(1, 64).bfloat16(), *(torch.randn(1, T, 64).bfloat16()[:, -1] for T in (2, 5))):
        for t in (lambda p: p, lambda p: p.detach().clone()):
            rest = None, t(norm), 1e-5, x[:, :8], False
            assert torch.equal(quant.row_product("bf16 compiled", x, [t(weight)], 8, *rest), layer(x, [weight], *rest))


def test_a_product_inside_a_compiled_block_is_compiled_once(monkeypatch):
    """Whoever calls: `choose`, the first call of a compiled block, those after it. One that compiled in a capture would break it."""
    torch._dynamo.reset()
    made = []
    layer = uncompiled("bf16 compiled")
    kernel = torch.compile(lambda *args: layer(*args), backend=lambda gm, _: made.append(1) or gm.forward, fullgraph=True, dynamic=False)
    monkeypatch.setattr(quant, "row_kernel", lambda name: kernel)
    weight, x = torch.nn.Parameter(torch.randn(8, 64).bfloat16(), requires_grad=False), torch.randn(1, 64).bfloat16()
    block = torch.compile(lambda x: quant.row_product("bf16 compiled", x * 2, [weight], 8), backend="aot_eager", fullgraph=True)
    quant.row_product("bf16 compiled", x, [weight], 8)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(block(x), layer(x * 2, [weight], None, None, 0.0, None, False))
    assert len(made) == 1


@pytest.mark.parametrize("kind, change", [("llama", {}), ("qwen3", {"tie_word_embeddings": False})])
@torch.no_grad()
def test_one_compilation_serves_every_block_and_position(tmp_path, monkeypatch, kind, change):
    """What is compiled takes no part in what differs, and decodes as the eager path does, attention in parts included."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention)
    tiny_folder(tmp_path, kind, layers=6, **change)
    model, _ = load(str(tmp_path))
    model.quantize()
    made, engine = [], Engine(model, 200)
    engine.compiled = functools.cache(lambda f: torch.compile(f, backend=lambda gm, _: made.append(f.__name__) or gm.forward,
                                                              fullgraph=True, dynamic=False))
    compare(model, Fixed([4, 0, 0, 1, 1, 1], [1.0, 0.7, 0.9, 1.0, 1.0, 1.0]), engine, 10)
    for horizon in (1, 6):
        compare(model, random_policy(model, horizon, horizon), engine, 10)
    assert not engine.plain and {f: made.count(f) for f in made} == {"embed_into": 1, "block_into": 4, "head_into": 1, "best_into": 2}  # a state, a horizon
    larger = Engine(model, 400)
    larger.compiled = engine.compiled
    compare(model, Fixed([4, 0, 0, 1, 1, 2], [1.0, 0.7, 0.9, 1.0, 1.0, 1.0]), larger, 10)
    assert made.count("block_into") == 5  # a larger cache: a skip writes to any slot of it, the others see their bucket


@torch.no_grad()
def test_a_compiled_block_calls_the_row_kernels(tmp_path, monkeypatch):
    """What a GPU compiles, its weights in a GPU's layouts: the products stay calls, one graph for every block in a state."""
    torch._dynamo.reset()
    monkeypatch.setattr(quant, "row_kernel", uncompiled)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention)
    tiny_folder(tmp_path, layers=6, intermediate_size=128)
    model, _ = load(str(tmp_path), dtype=torch.bfloat16)
    model.quantize(real=True)
    for name, linear in [pair for block in model.blocks for pair in block.linears().items()]:
        int4 = quant.quantize_int4(linear.weight)
        linear.kernel = "bf16 compiled"
        linear.low = {1: quant.Int4Weight(*int4, torch.float32), 2: quant.Int8Weight(*quant.quantize_int8(linear.weight), torch.bfloat16)}
        linear.low["fill"] = quant.Int4Weight(*(t[-2 * model.blocks[0].kv_size :] for t in int4), torch.float32)
        linear.low[2].kernel = "int8 compiled"
        for weight in (linear.low[1], linear.low["fill"]):
            weight.kernel, weight.scale_zero = "int4 compiled", weight.scale_zero.bfloat16()
    calls, engine = [], Engine(model, 200)
    count = lambda gm: sum(node.target == torch.ops.dash.row_product.default for node in gm.graph.nodes)
    engine.compiled = functools.cache(lambda f: torch.compile(f, backend=lambda gm, _: calls.append((f.__name__, count(gm))) or gm.forward,
                                                              fullgraph=True, dynamic=False))
    compare(model, Fixed([4, 0, 2, 1, 1, 4], [1.0, 0.7, 0.9, 1.0, 1.0, 1.0]), engine, 10)
    assert not engine.plain and sorted(calls) == [("block_into", 1), *[("block_into", 4)] * 3, ("embed_into", 0), ("head_into", 0)]


def test_a_gpu_weight_takes_the_row_kernel_for_one_row_and_a_product_for_more(monkeypatch):
    monkeypatch.setattr(quant, "row_kernel", uncompiled)
    torch.manual_seed(0)
    w, x = torch.randn(48, 128), torch.randn(5, 128).bfloat16()
    int8, int4 = quant.Int8Weight(*quant.quantize_int8(w), torch.bfloat16), quant.Int4Weight(*quant.quantize_int4(w), torch.float32)
    int4.scale_zero = int4.scale_zero.bfloat16()
    int8.kernel, int4.kernel = "int8 compiled", "int4 compiled"
    for weight, dense in ((int8, quant.dequantize_int8(*quant.quantize_int8(w))), (int4, quant.dequantize_int4(*quant.quantize_int4(w)))):
        for rows in (1, 5):
            want = x[:rows].float() @ dense.T
            assert (weight(x[:rows]) - want).abs().max() < 0.02 * want.abs().max()
    # aten's layout, which only it can read, for few rows; nibbles for many
    int4.kernel, int4.nibbles, int4.codes, int4.scale_zero = "int4 aten 4", int4.codes, None, int4.scale_zero.permute(2, 1, 0).contiguous()
    monkeypatch.setattr(quant, "row_product", lambda name, x, tensors, N: (name, len(x), tensors[0]))
    assert int4(x) == ("int4 aten 4", 5, None)
    x = torch.randn(quant.MANY_INT4, 128).bfloat16()
    want = x.float() @ dense.T
    assert (int4(x) - want).abs().max() < 0.02 * want.abs().max()


@torch.no_grad()
def test_kernels_for_one_row_are_tried_in_a_block_and_wrong_ones_not_used(tiny, monkeypatch, capsys):
    monkeypatch.setattr(quant, "row_kernel", uncompiled)
    monkeypatch.setattr("model.CHOSEN", found := {})
    model, _ = load(str(tiny), dtype=torch.bfloat16)
    model.quantize(real=True)
    linears = [linear for block in model.blocks for linear in block.linears().values()]
    for linear in linears:
        linear.kernel = "bf16 compiled"
        linear.low[2] = quant.Int8Weight(*quant.quantize_int8(linear.weight), torch.bfloat16)
        linear.low[2].kernel = "int8 compiled"
    qkv = linears[0]
    fill = qkv.low["fill"] = quant.Int4Weight(*quant.quantize_int4(qkv.weight[qkv.fill_from :]), torch.float32)
    fill.scale_zero, fill.kernel = fill.scale_zero.bfloat16(), "int4 compiled"
    model.check_rows(4, 2, 1, 0)
    assert not capsys.readouterr().err and linears[0].kernel == "bf16 compiled"
    for int8, wrong in (("int8 compiled", lambda *args: 1.1 * quant.int8_row(*args)), ("int8 compiled", lambda x, codes, scale: x.no_such_thing),
                        ("int8 aten", lambda *args: 1.1 * torch._weight_int8pack_mm(*args))):
        for linear in linears:
            linear.kernel, linear.low[2].kernel = "bf16 compiled", int8
        monkeypatch.setitem(quant.ROW_KERNELS, int8, wrong)
        model.check_rows(4, 2, 1, 0)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and ("state 2 is off by" in said or "no_such_thing" in said)
        assert all(linear.kernel == linear.low[2].kernel == "reference" for linear in linears) and linears[0].low[1].kernel == "int4pack"
        assert "one row" in found["check_rows", 4, 2, 1, 0]["kernel"]
    # what a skip runs, its keys and values, is tried too
    fill.kernel = "int4 compiled"
    monkeypatch.setitem(quant.ROW_KERNELS, "int4 compiled", lambda x, packed, scale_zero: 1.1 * quant.int4_row(x, packed, scale_zero))
    model.check_rows(0)
    assert "state 0 is off by" in capsys.readouterr().err and fill.kernel == "reference"


def test_a_layer_takes_its_kernel_for_one_row_and_a_product_for_more(monkeypatch):
    monkeypatch.setattr(quant, "row_kernel", uncompiled)
    w, x = torch.randn(48, 128), torch.randn(5, 128).bfloat16()
    full, bias = quant.RoutedLinear(128, 48, bias=True).requires_grad_(False), torch.randn(48).bfloat16()
    full.load_state_dict({"weight": w.bfloat16(), "bias": bias}, assign=True)
    full.kernel = "bf16 compiled"
    for rows in (1, 5):
        got, want = full(x[:rows]), torch.nn.functional.linear(x[:rows], w.bfloat16(), bias)
        assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_the_fastest_right_kernel_is_chosen_and_recorded(monkeypatch):
    w = torch.randn(16, 64)
    kernels = {"slow": torch.nn.functional.linear, "fast": torch.nn.functional.linear, "wrong": lambda x, w: x @ w.T + 1,
               "broken": lambda x, w: x.no_such_thing, "nan": lambda x, w: x @ w.T * float("nan")}
    times = {"slow": 9.0, "fast": 3.0, "wrong": 1.0, "broken": 1.0, "nan": 1.0}
    monkeypatch.setattr(quant, "ROW_KERNELS", kernels)
    monkeypatch.setattr(quant, "CHOSEN", {})
    measured, layouts = [], dict.fromkeys(kernels, lambda: [w.bfloat16()])
    for _ in range(2):  # measured once
        assert quant.choose_kernel((16, 16, 64), layouts, lambda x: x @ w.T, "cpu", lambda name, *_: measured.append(name) or times[name]) == "fast"
    assert measured == ["slow", "fast"]
    found = quant.CHOSEN[16, 16, 64]
    assert found["fast"] == 3.0 and "wrong by" in found["wrong"] and "no_such_thing" in found["broken"] and "wrong by nan" in found["nan"]
    assert quant.choose_kernel((16, 16, 64, "other"), {"broken": layouts["broken"]}, lambda x: x @ w.T, "cpu") == "reference"


GPT_FAST = """
import torch
class ModelArgs:
    def __init__(self, **given):
        self.__dict__ |= given
class Transformer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        assert args.n_local_heads == 2 and args.dim == 64 and args.intermediate_size == 96 and args.rope_base == 1e6
        self.embed, self.output = torch.nn.Embedding(args.vocab_size, args.dim), torch.nn.Linear(args.dim, args.vocab_size, bias=False)
    def setup_caches(self, batch, length):
        assert (batch, length) == (1, 140)
    def forward(self, idx, input_pos):
        return self.output(self.embed(idx))
"""


def test_speed_of_a_shape_end_to_end(tmp_path, monkeypatch):
    """The function behind --suite gpu on a tiny shape: the engine on the CPU, direct calls for graphs; gpt-fast's interface as its
    generate.py uses it."""
    monkeypatch.setattr(torch, "compile", lambda f, **how: f)
    (tmp_path / "model.py").write_text(GPT_FAST)
    config = replace(speed.SHAPES["Qwen2.5-7B"], n_layer=4, n_head=4, n_kv_head=2, n_embd=64, head_dim=16, n_hidden=96, vocab_size=320, block_size=512)
    kept = []
    r, _ = speed.speed_of_shape("tiny", config, "cpu", 1, 10.0, tmp_path, lambda found: kept.append(copy.deepcopy(found)), context=100, tokens=40)
    assert [len(found["routed"]) for found in kept] == [0, 1, 2, 3, 4] and kept[-1] == r  # cut off at any time, it has what was measured
    assert [speed.gpu_table([r, found]).count("not yet") for found in kept] == [16, 11, 7, 3, 0]
    table = speed.gpu_table([r, r])
    assert all(x["same states"] for x in r["routed"]) and len(r["routed"]) == 4 and "horizon 1, 2x asked" in table
    assert all(0 < x[k] < 100 for x in r["routed"] for k in ("async / known", "async / sync", "measured"))
    assert all(r["ms"][peer] > 0 and r[f"bf16 / {peer}"] > 0 for peer in ("transformers", "gpt-fast"))
    with pytest.raises(ValueError, match="give --gpt-fast a checkout"):
        speed.gpt_fast(tmp_path / "none", config, "cpu", 100, 40)
    assert len({*map(len, table.splitlines())}) == 1
    json.dumps(r)


def test_timeline(tmp_path):
    events = [("stream 7", "gemv", 0.0, 1.0), ("stream 13", "scorer", 0.1, 0.2), ("host", "cudaEventSynchronize", 0.1, 0.3)]
    (tmp_path / "speed-gpu.json").write_text(json.dumps({"timeline": events, "shapes": [{"name": "tiny", "routed": [{"speedup_target": 2.0}]}], "device": "a GPU"}))
    assert draw(tmp_path / "speed-gpu.json") == tmp_path / "speed-gpu.png" and (tmp_path / "speed-gpu.png").stat().st_size > 5000
    (tmp_path / "speed-gpu.json").write_text(json.dumps({"timeline": [], "shapes": [{"name": "tiny", "routed": []}], "device": "a GPU"}))
    assert draw(tmp_path / "speed-gpu.json") is None  # cut off before its end


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_suite_says_so(tmp_path):
    done = script("bench.py", "speed", "--suite", "gpu", "--results", tmp_path)
    assert done.returncode == 2 and "no CUDA device" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def a_gpu(monkeypatch, free, capability=(9, 0)):
    """What check_gpu is told of a GPU: bytes that are free, and its capability."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (free, 80 * 10**9))


@pytest.mark.parametrize("capability, free, says", [((7, 5), 80, "no bf16"), ((9, 0), 20, "--full"), ((9, 0), 4, "billion parameters would fit")])
def test_a_gpu_that_cannot(monkeypatch, capability, free, says):
    a_gpu(monkeypatch, free * 10**9, capability)
    with pytest.raises(ValueError, match=says):
        check_gpu(speed.SHAPES["LLaMA-2-7B"], "cuda")
    with pytest.raises(ValueError, match="--suite gpu: .*; use a larger or newer GPU$"):
        speed.random_model("LLaMA-2-7B", speed.SHAPES["LLaMA-2-7B"], "cuda")
    a_gpu(monkeypatch, 30 * 10**9)
    for config in speed.SHAPES.values():
        check_gpu(config, "cuda")
        with pytest.raises(ValueError, match=r"4[0-9]\.[0-9] GB of weights"):
            check_gpu(config, "cuda", torch.float32)
    a_gpu(monkeypatch, 80 * 10**9)
    check_gpu(config, "cuda", torch.float32)


@pytest.mark.parametrize("plain", [True, False])
def test_the_room_that_decoding_needs(monkeypatch, plain):
    """To a megabyte: bf16 weights and an INT8 head; for routing INT8, INT4 in two layouts, and INT4 keys and values of skipped blocks in two."""
    c = speed.SHAPES["LLaMA-2-7B"]
    head, linears, keys = c.vocab_size * c.n_embd, 32 * c.n_embd * (4 * c.n_embd + 3 * c.n_hidden), 32 * 2 * c.n_embd**2
    need = 2 * (linears + 2 * head) + head
    if not plain:
        need += linears + (linears + keys) * (2 * 1 / 2 + 2 * 2 / quant.GROUP)  # nibbles twice, scale and zero in bf16
    a_gpu(monkeypatch, int(need) + 10**6)
    check_gpu(c, "cuda", plain=plain)
    a_gpu(monkeypatch, int(need) - 10**6)
    with pytest.raises(ValueError, match="GB of weights"):
        check_gpu(c, "cuda", plain=plain)


def test_an_engine_takes_the_costs_of_each_policy(tmp_path):
    tiny_folder(tmp_path, layers=6)
    model, _ = load(str(tmp_path))
    model.quantize()
    engine = Engine(model, 200)
    for costs in ([0.1, 1.0, 2.0, 4.0], [3.0, 0.5, 3.5, 4.0]):  # bits, then a clock's
        policy = random_policy(model, 0)
        policy.costs, policy.mu = torch.tensor(costs), 1.0
        compare(model, policy, engine)


def test_the_engine_is_for_policies_of_all_states(tmp_path):
    tiny_folder(tmp_path)
    model, _ = load(str(tmp_path))
    policy, model.engine = random_policy(model, 0), SimpleNamespace(size=512)
    assert engine_for(model, policy, 64) is model.engine
    policy.allowed = (0, 4)
    assert engine_for(model, policy, 64) is None


def test_parts_without_keys_add_nothing(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention)
    q, k, v = torch.randn(2, 3, 16), torch.randn(512, 2, 16), torch.randn(512, 2, 16)
    found = attend_in_parts(q, k, v, torch.tensor([0, 128, 140, 140, 140], dtype=torch.int32), torch.arange(5, dtype=torch.int32) * 3)
    want = torch.nn.functional.scaled_dot_product_attention(q, k[:140].transpose(0, 1), v[:140].transpose(0, 1))
    assert torch.allclose(found, want, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu(tmp_path):
    """Every kernel that was chosen is right, captured graphs give the eager CPU path's logits to bf16 accuracy (in fp32 to its own), async equals
    sync, and a larger engine of the same model is as good."""
    tiny_folder(tmp_path, layers=6, hidden_size=256, intermediate_size=512, num_attention_heads=4, initializer_range=0.05, stored=torch.bfloat16)
    cpu, _ = load(str(tmp_path))
    gpu, _ = load(str(tmp_path), "cuda", torch.bfloat16)
    whole, _ = load(str(tmp_path), "cuda", torch.float32)
    for model in (cpu, whole):
        model.quantize()
    gpu.quantize(real=True)
    assert quant.CHOSEN and all(isinstance(t, float) for found in quant.CHOSEN.values() for name, t in found.items() if name.endswith("compiled"))
    gpu.ready_to_decode()
    assert not [key for key in quant.CHOSEN if key[0] == "check_rows"] and {linear.kernel for linear in gpu.linears().values()} == {"bf16 compiled"}
    for horizon in (1, 6):
        for seed in range(3):
            policy = random_policy(cpu, seed, horizon).to("cuda")
            prompt = PROMPT * (3 if seed == 2 else 1)  # the third time too long for the engine that there is
            outs = [generate(gpu, speed.IDS, prompt, policy, 60, sync=sync) for sync in (False, True, False)]  # into the next bucket
            for out in outs[1:]:
                assert out["tokens"] == outs[0]["tokens"] and torch.equal(out["states"], outs[0]["states"])
            ids = torch.tensor([prompt + outs[0]["tokens"]])[:, : outs[0]["states"].shape[1]]
            start = outs[0]["prompt_tokens"]
            generate(whole, speed.IDS, prompt, policy, 60)  # makes its engine
            for fixed in (Fixed(outs[0]["states"][:, None], policy.scale), None):  # None: all blocks are one graph
                want = cpu(ids, fixed)[0, start:]
                for model, accuracy in ((gpu, 0.05), (whole, 0.001)):
                    assert (step_by_step(model, model.engine, ids, start, fixed)[0] - want).abs().max() < accuracy * want.abs().max()
