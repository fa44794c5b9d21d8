"""The GPU engine on the CPU, direct calls for its graphs: the same tokens, states and logits as the eager path, in any legal order."""

import random
from contextlib import contextmanager

import pytest
import torch

from conftest import tiny_folder
from infer import Engine, bucket_of, generate
from model import load
from policy import ByPosition, Fixed, bit_costs, random_states
from test_routing import random_policy

PROMPT = "the cat sat on the mat and the dog ate the hat in 2024. "


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


def compare(model, tokenizer, policy, engine, tokens=40, prompt=PROMPT, **options):
    """The eager path and the engine: the same text, ids and states; returns what the engine made."""
    model.engine = None
    want = generate(model, tokenizer, prompt, policy, tokens, **options)
    model.engine = engine
    got = generate(model, tokenizer, prompt, policy, tokens, **options)
    model.engine = None
    assert got["tokens"] == want["tokens"] and torch.equal(got["states"], want["states"]) and got["text"] == want["text"]
    assert torch.equal(got["token_states"], want["token_states"])
    return got


@pytest.mark.parametrize("kind, change", [("llama", {}), ("qwen2", {"num_key_value_heads": 1}), ("qwen3", {"tie_word_embeddings": False})])
@pytest.mark.parametrize("horizon", [1, 2, 6])
@torch.no_grad()
def test_engine_equals_eager_decoding(tmp_path, kind, change, horizon):
    """Greedy and sampled, over a bucket's end, async and sync, under a policy, random states, a plan by position, and none."""
    tiny_folder(tmp_path, kind, layers=6, **change)
    model, tokenizer = load(str(tmp_path))
    model.quantize()
    tokenizer.eos, engine, seen = (), Engine(model, 300), set()
    for seed in range(3):
        policy = random_policy(model, seed, horizon)
        for sync in (False, True):
            out = compare(model, tokenizer, policy, engine, 120, PROMPT * (1 + seed), sync=sync)
            seen |= set(out["states"].flatten().tolist())
        compare(model, tokenizer, policy, engine, 30, temperature=1.0, seed=seed)
    assert seen == {0, 1, 2, 4} and {k[-1] for k in engine.graphs if k[1] in (1, 2, 4)} >= {128, 256}
    states = random_states((6, 1, 300), 1.2, bit_costs(model.config), torch.Generator().manual_seed(1))
    for fixed in (None, Fixed([4, 0, 1, 2, 4, 1], policy.scale), Fixed(states, policy.scale),
                  ByPosition(torch.rand(11, 6, 4), bit_costs(model.config), 0.2)):
        compare(model, tokenizer, fixed, engine)


@pytest.mark.parametrize("horizon", [1, 2, 6])
@torch.no_grad()
def test_any_order_that_streams_allow_gives_the_same(tmp_path, horizon):
    tiny_folder(tmp_path, layers=6)
    model, tokenizer = load(str(tmp_path))
    model.quantize()
    tokenizer.eos = ()
    for seed in range(6):
        engine = Shuffled(model, 200, seed)
        for sync in (False, True):
            compare(model, tokenizer, random_policy(model, seed, horizon), engine, 25, sync=sync)
        tokenizer.eos = generate(model, tokenizer, PROMPT, None, 4)["tokens"][-1:]  # stops with the next token begun
        compare(model, tokenizer, None, engine)
        tokenizer.eos = ()
        compare(model, tokenizer, random_policy(model, seed + 1, horizon), engine, 10)


@torch.no_grad()
def test_the_shuffle_finds_a_race(tmp_path):
    """The test above can fail: without the scorer waiting for its input, or with one row for a block's input and output."""
    tiny_folder(tmp_path, layers=6)
    model, tokenizer = load(str(tmp_path))
    model.quantize()
    tokenizer.eos = ()

    class NoWait(Shuffled):
        def ask(self, i):
            self.side.wait_event = lambda event: None
            super().ask(i)

    class OneRow(Shuffled):
        def run_block(self, i, *rest):
            super().run_block(i, *rest)
            self.x[i % 2].copy_(self.x[1 - i % 2])

    for Wrong in (NoWait, OneRow):
        with pytest.raises(AssertionError):
            for seed in range(6):
                compare(model, tokenizer, random_policy(model, seed, 1), Wrong(model, 200, seed), 25)


@torch.no_grad()
def test_logits_of_the_engine(tiny):
    """Step by step over the end of a bucket: every logit, next to a parallel pass over the same tokens and states."""
    model, tokenizer = load(str(tiny))
    model.quantize()
    policy, engine, rows = random_policy(model, 3, 2), Engine(model, 300), []
    tokens = torch.randint(0, 300, (1, 140))
    with torch.inference_mode():
        model.hidden(tokens[:, :100], policy, engine.cache)
        states = [policy.states[:, 0]]
        engine.start(policy, 100)
        for t in range(100, 140):
            nxt, path = engine.step(int(tokens[0, t]), lambda logits: rows.append(logits.clone()) or 0)
            states.append(path)
    want = model(tokens, Fixed(torch.cat(states, 1)[:, None], policy.scale))[0, 100:]
    assert (torch.stack(rows) - want).abs().max() < 2e-3 * want.abs().max()


@torch.no_grad()
def test_a_tracking_price_follows_in_the_engine(tiny):
    model, tokenizer = load(str(tiny))
    model.quantize()
    tokenizer.eos = ()
    for horizon in (1, 4):
        policy = random_policy(model, 5, horizon, spread=0.5)
        policy.prices = [(1.2, 0.0), (1.5, 0.1), (2.0, 0.3), (3.0, 0.8), (4.0, 2.0)]
        compare(model, tokenizer, policy.at(2.0, track=True), Shuffled(model, 200, 0), 60)
        assert policy.mu != policy.price(2.0)


def test_buckets():
    assert [bucket_of(n) for n in (1, 128, 129, 512, 513, 1024, 1025, 4096)] == [128, 128, 256, 512, 640, 1024, 1280, 4096]
    for n in range(1, 5000):
        assert n <= bucket_of(n) <= max(256, 1.25 * n + 1) and bucket_of(bucket_of(n)) == bucket_of(n)
