"""Training end to end on a tiny model: the files it writes, resume after kill -9 bit for bit, and what calibration promises."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from conftest import ROOT, script
from model import load
from policy import Fixed, Policy, bit_costs, mean_cost
from test_routing import random_policy


def arguments(tiny, text, out, *more):
    return ["--model", tiny, "--data", text, "--steps", 12, "--speedup", 2.5, "--out", out, *more]


@pytest.fixture(scope="module")
def finished(tiny, some_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    done = script("train.py", *arguments(tiny, some_text, out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_train_writes_what_it_says(finished, tiny):
    out, said = finished
    assert {f.name for f in out.iterdir()} == {"policy.safetensors", "train.json", "train.jsonl", "train.png", "checkpoint.safetensors"}
    assert [json.loads(line)["step"] for line in (out / "train.jsonl").read_text().splitlines()] == list(range(12))
    for row in ("full model", "DASH at 2.5x", "random states", "all INT8"):
        assert row in said
    policy = Policy.load(out / "policy.safetensors")
    policy.check(load(str(tiny))[0])
    prices = [mu for _, mu in policy.prices]
    assert policy.prices[0][0] == 1.2 and prices == sorted(prices)


@pytest.mark.parametrize("lines", [1, 4, 7])
def test_resume_after_kill_is_bit_for_bit(finished, tiny, some_text, tmp_path, lines):
    """Killed at three moments of training; the policy and the log's numbers equal those of the run that was not."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments(tiny, some_text, tmp_path))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "train.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= lines):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "policy.safetensors").exists()
    done = script("train.py", *arguments(tiny, some_text, tmp_path, "--resume"))
    assert done.returncode == 0, done.stderr
    for name in ("policy.safetensors", "train.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_resume_refuses_another_run(finished, tiny, some_text):
    done = script("train.py", *arguments(tiny, some_text, finished[0], "--seed", 5, "--resume"))
    assert done.returncode == 2 and "seed" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_scales_by_hand(tiny):
    """Eq 7 against sums over recorded inputs and outputs; the first token of every sample is left out."""
    model, _ = load(str(tiny))
    tokens = torch.randint(0, 300, (3, 10))
    found, seen = train.profile(model, tokens), {}
    hooks = [b.register_forward_hook(lambda m, a, y, i=i: seen.__setitem__(i, [t.view(3, 10, -1)[:, 1:] for t in (a[0], y)])) for i, b in enumerate(model.blocks)]
    model(tokens)
    [h.remove() for h in hooks]
    for i, (x, y) in seen.items():
        x, y = x.reshape(-1, 64), y.reshape(-1, 64)
        assert found["least_squares"][i].item() == pytest.approx(((x * y).sum() / (x * x).sum()).item(), rel=1e-4)
        assert found["norm_ratio"][i].item() == pytest.approx((y.norm(dim=1) / x.norm(dim=1)).mean().item(), rel=1e-4)
        assert found["similarity"][i].item() == pytest.approx(torch.cosine_similarity(x, y).mean().item(), rel=1e-4)


def test_sensitivity_is_the_damage_of_one_block(tiny):
    model, _ = load(str(tiny))
    model.quantize()
    tokens, scale = torch.randint(0, 300, (2, 12)), [1.0, 0.9, 1.1, 1.0]
    damage = train.sensitivities(model, tokens, scale)
    states = torch.tensor([4, 4, 0, 4])
    full, routed = train.log_probs(model, tokens), train.log_probs(model, tokens, Fixed(states, scale))
    assert damage[2, 0].item() == pytest.approx(train.kl(full, routed).mean().item(), rel=1e-4)
    assert (damage[0] == 0).all() and damage[3, 0] == 0 and (damage[:, 3] == 0).all() and (damage[1:, 1] > damage[1:, 2]).all()


def test_prices_meet_their_targets(tiny, some_text):
    model, tokenizer = load(str(tiny))
    policy = random_policy(model, 3, spread=0.5)
    tokens = torch.tensor(tokenizer.encode(some_text.read_text()))[:1024].view(4, 256)
    train.calibrate_prices(policy, model, tokens, [1.3, 2.0, 3.0], [4 / 1.3, 2.0, 4 / 3])
    for speedup in (1.3, 2.0, 3.0):
        model(tokens, policy.at(speedup))
        assert mean_cost(policy.states, bit_costs(model.config)) == pytest.approx(4 / speedup, rel=0.05)


def test_comparison_numbers(tiny, some_text):
    model, tokenizer = load(str(tiny))
    tokens = torch.tensor(tokenizer.encode(some_text.read_text()))[:96].view(2, 48)
    full, same, int4 = train.compare(model, tokens, [None, Fixed([4] * 4), Fixed([4, 1, 1, 1])], bit_costs(model.config))
    logits = torch.stack([model(t[None])[0] for t in tokens])[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert full["nats"] == pytest.approx(nats.item(), rel=1e-5) == pytest.approx(same["nats"], rel=1e-5)
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["top1"] == 1 and int4["kl"] > 0
    assert int4["speedup"] == pytest.approx(16 / 7)


def test_the_default_text_repeats_nothing():
    from data import pydocs
    parts = [p.strip() for split in ("train", "test") for p in pydocs(split).split("\n\n") if p.strip()]
    assert len(parts) == len(set(parts)) > 1000
    assert 0.15 < len(pydocs("test")) / len(pydocs("train")) < 0.4
