"""Decoding with the real kernels: the same numbers as the fake weights, no drift, flat memory, odd shapes, one thread."""

import copy
import json

import pytest
import torch

import baselines
import speed
from conftest import script, tiny_folder
from infer import generate, has_graphs
from model import load
from policy import Fixed, Policy, bit_costs, random_states
from test_routing import decode, random_policy


@pytest.fixture(scope="module")
def bf16():
    model, tokenizer = load("smollm2", dtype=torch.bfloat16)
    model.quantize(real=True)
    return model, tokenizer


@torch.no_grad()
def test_every_end_token_ends_as_in_transformers(tmp_path):
    """generation_config.json may name several, and none of them the tokenizer's."""
    import transformers

    tiny_folder(tmp_path)
    model, tokenizer = load(str(tmp_path))
    made = generate(model, tokenizer, "the cat", None, 12, ignore_eos=True)["tokens"]
    ends = [0, made[4]]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    model, tokenizer = load(str(tmp_path))
    prompt = torch.tensor([tokenizer.encode("the cat")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generate(prompt, do_sample=False, max_new_tokens=12)[0, prompt.shape[1] :].tolist()
    ours = generate(model, tokenizer, "the cat", None, 12)["tokens"]
    assert ours == theirs[: len(ours)] and theirs[len(ours)] in ends and len(ours) <= 4


def test_what_is_streamed_is_the_text(tmp_path, monkeypatch):
    """Also where an end token comes within a character."""
    tiny_folder(tmp_path)
    model, tokenizer = load(str(tmp_path))
    made = generate(model, tokenizer, "the cat", None, 12, ignore_eos=True)["tokens"]
    tokenizer.eos = (next(token for token in made if token != made[0]),)
    monkeypatch.setattr(tokenizer, "decode_bytes", lambda ids: b"\xe2\x82" * len(ids))
    streamed = []
    out = generate(model, tokenizer, "the cat", None, 12, on_token=lambda token, text, states: streamed.append(text))
    assert out["text"] == "".join(streamed) == "\ufffd" * len(out["tokens"])


@torch.no_grad()
def test_routed_model_with_fake_and_with_packed_weights(smollm2, bf16):
    """The same codes: random states per token, fake weights in bf16 against kernels in bf16, in parallel and one by one."""
    fake, tokenizer = load("smollm2", dtype=torch.bfloat16)
    fake.quantize(real=False)
    tokens = torch.tensor([tokenizer.encode("A packed weight and a dequantised one are two ways to write down the same numbers, so")])
    states = random_states((30, *tokens.shape), 1.7, bit_costs(fake.config), torch.Generator().manual_seed(0))
    policy, exact = Fixed(states), smollm2[0](tokens, Fixed(states)).log_softmax(-1)
    want = fake(tokens, policy).float().log_softmax(-1)
    for got in (bf16[0](tokens, policy), decode(bf16[0], tokens, policy, [1] * tokens.shape[1])[0]):
        got = got.float().log_softmax(-1)
        # both are as far from fp32 as bf16 is, and no further from each other
        rounding = (exact.exp() * (exact - want)).sum(-1).mean()
        apart = (want.exp() * (want - got)).sum(-1).mean()
        lost = want.amax(-1) - want.gather(-1, got.argmax(-1, keepdim=True))[..., 0]  # where they choose another token, it is as likely
        assert apart < 2 * rounding + 1e-3 and lost.max() < 0.25


@torch.no_grad()
def test_int8_head_changes_little(bf16):
    model, tokenizer = bf16
    hidden = model.hidden(torch.tensor([tokenizer.encode("The head turns a hidden state into a distribution over the words of a")]))[0]
    plain, int8 = (f(hidden).float().log_softmax(-1) for f in (model.head, model.logits))
    assert (plain.exp() * (plain - int8)).sum(-1).mean() < 2e-3


@torch.no_grad()
def test_a_long_decode_does_not_drift(tiny):
    """400 cached steps under random states end where a fresh pass over the same tokens and states ends."""
    model, _ = load(str(tiny))
    for seed in range(2):
        policy = random_policy(model, seed, horizon=(1, 4)[seed])
        tokens = torch.randint(0, 300, (1, 500))
        cached, states = decode(model, tokens, policy, [100] + [1] * 400)
        fresh = model(tokens, Fixed(states, policy.scale))
        assert (cached - fresh).abs().max() < 2e-3 * fresh.abs().max()


def test_a_prompt_begins_as_the_tokenizer_says(tiny):
    """With BOS where it has one."""
    model, tokenizer = load(str(tiny))
    plain = tokenizer.encode("the cat")
    tokenizer = copy.copy(tokenizer)
    tokenizer.template = ([7], [])
    out = generate(model, tokenizer, "the cat", None, 3)
    assert out["prompt_tokens"] == len(plain) + 1
    tokens = [7, *plain]
    for token in out["tokens"]:
        assert token == model(torch.tensor([tokens]))[0, -1].argmax()
        tokens.append(token)


@torch.no_grad()
def test_the_coldest_sampling_is_greedy(tmp_path):
    tiny_folder(tmp_path, layers=2)
    model, tokenizer = load(str(tmp_path))
    cold, greedy = (generate(model, tokenizer, "the cat", None, 12, temperature=t)["tokens"] for t in (1e-46, 0))
    assert cold == greedy


@torch.no_grad()
def test_soak_of_ten_thousand_tokens(tmp_path, monkeypatch):
    """24 prompts, 420 tokens each, routed at random and sampled: no tensor stays alive, memory does not grow, and the logits of every
    token are those of a fresh pass over the whole text."""
    import gc
    import resource

    tiny_folder(tmp_path, layers=2)
    model, tokenizer = load(str(tmp_path))
    tokenizer.eos, made = (), 0
    count = lambda: (gc.collect(), sum(type(o) is torch.Tensor for o in gc.get_objects()))[1]
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    head, seen = model.logits, []
    monkeypatch.setattr(model, "logits", lambda hidden: seen.append(head(hidden)) or seen[-1])
    for n in range(24):
        policy = random_policy(model, n, horizon=(1, 2, 4)[n % 3])
        out = generate(model, tokenizer, "the cat sat on the mat " * (1 + n % 3), policy, 420, temperature=1.0, seed=n)
        made += len(out["tokens"])
        ids = tokenizer.encode("the cat sat on the mat " * (1 + n % 3), add_special_tokens=True) + out["tokens"][:-1]
        fresh = model(torch.tensor([ids]), Fixed(out["states"][:, None], policy.scale))[0, -420:]
        assert (torch.cat(seen) - fresh).abs().max() < 2e-3 * fresh.abs().max()
        seen.clear()
        del policy, out, fresh
        if n == 3:
            tensors, memory = count(), peak()
    assert made == 24 * 420 and count() <= tensors and peak() < memory + 20_000


@pytest.mark.parametrize("change", [
    {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 52, "vocab_size": 307},
    {"hidden_size": 24, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 33, "vocab_size": 313, "head_dim": 24},
    {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 192, "vocab_size": 311},
])
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_odd_shapes_and_batches(tmp_path, change, threads):
    """Widths that no kernel takes, one head, a prime vocabulary, a batch of 3: real weights against fake ones, bf16."""
    torch.set_num_threads(threads)
    try:
        tiny_folder(tmp_path, tie_word_embeddings=False, **change)
        real, tokenizer = load(str(tmp_path), dtype=torch.bfloat16)
        real.quantize(real=True)
        fake, _ = load(str(tmp_path), dtype=torch.bfloat16)
        fake.quantize(real=False)
        tokens = torch.randint(0, 300, (3, 10))
        states = random_states((4, 3, 10), 1.5, bit_costs(real.config), torch.Generator().manual_seed(1))
        a, _ = decode(real, tokens, Fixed(states), [6, 1, 1, 1, 1])
        b = fake(tokens, Fixed(states))
        assert a.isfinite().all() and (a - b).abs().max() < 0.06 * b.abs().max()
        assert real.logits(real.hidden(tokens)[:, -1]).shape == (3, change["vocab_size"])
        assert generate(real, tokenizer, "the cat", random_policy(real, 0), 5)["tokens"]
    finally:
        torch.set_num_threads(1)


@torch.no_grad()
def test_weights_in_three_precisions_are_small(bf16):
    sizes = bf16[0].bytes()
    assert sizes["bf16 model"] == 2 * sum(p.numel() for p in bf16[0].parameters())
    assert sizes["all"] / sizes["bf16 model"] <= 1.9


def test_latency_cost_without_a_measurement_says_what_to_run(tiny, some_text, tmp_path):
    done = script("train.py", "--model", tiny, "--data", some_text, "--out", tmp_path / "o", "--cost", "latency", cwd=tmp_path)
    assert done.returncode == 2 and "bench.py speed" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_speed_measures_and_latency_training_uses_it(tiny, some_text, tmp_path):
    """The whole chain on a tiny model: policy, measured times, a policy trained for them."""
    policy = random_policy(load(str(tiny))[0], 0)
    policy.prices, policy.settings = [(1.2, 0.0), (4.0, 1.0)], {"horizon": 1}
    policy.save(tmp_path / "p.safetensors")
    frontier = tmp_path / "results" / "frontier-lm.json"
    frontier.parent.mkdir()
    rows = [{"method": name, "kl": kl, "states": dict(zip("0124", shares))} for name, kl, *shares in (
        ("all INT8", 0.1, 0, 0, 1, 0), ("best static plan", 0.2, 0, 0.5, 0.5, 0), ("dash, horizon 1, seed 0", 0.1, 0, 0.5, 0.5, 0), ("random states", 9, 0, 1, 0, 0))]
    frontier.write_text(json.dumps({"policy": policy.settings, "caption": "lm, test", "rows": rows}))
    done = script("bench.py", "speed", "--model", tiny, "--policy", tmp_path / "p.safetensors", "--rounds", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "speed-cpu.json").exists() and (tmp_path / "results" / "speed-cpu.png").exists()
    found = json.loads((tmp_path / "results" / "speed-cpu.json").read_text())["frontier"]
    assert found["text"] == "lm" and sorted(kl for _, kl in found["static"]) == [0.1, 0.2] and [kl for _, kl in found["own"]] == [0.1]
    assert "on lm, by these times" in done.stdout
    frontier.write_text('{"rows": []}')
    done = script("bench.py", "speed", "--model", tiny, "--policy", tmp_path / "p.safetensors", "--rounds", 1, cwd=tmp_path)
    assert done.returncode == 2 and "frontier-lm.json is no frontier" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    frontier.unlink()
    done = script("train.py", "--model", tiny, "--data", some_text, "--out", "o", "--cost", "latency", "--horizon", 1, "--speedup", 1.2, cwd=tmp_path)
    if done.returncode:  # a tiny model spends its time outside its blocks
        assert done.returncode == 2 and "at most with --cost latency" in done.stderr, done.stderr
    else:
        assert Policy.load(tmp_path / "o" / "policy.safetensors").settings["cost"] == "latency" and "by the measured times" in done.stdout


def test_a_policy_against_static_plans_that_take_as_long():
    """Static plans at 1x and 2x with KL 1 and 3, the policy's at 1.5x and, its decision counted, before the first."""
    frontier = {"text": "x", "static": [(2.25, 3.0), (1.25, 1.0)], "own": [(2.0, 1.0), (0.75, 5.0)]}
    found = speed.by_the_clock(frontier, lambda shares, other: shares - 0.25 - other, 0.25)
    assert found == {"text": "x", "static": [(1.0, 1.0), (2.0, 3.0)], "own": [(1.5, 1.0), (0.25, 5.0)], "ratio": [0.5, None]}


def test_nothing_of_old_weights_is_left(tiny):
    model, _ = load(str(tiny), dtype=torch.bfloat16)
    model.quantize(real=True)
    model.engine, hidden = object(), torch.randn(3, 64).bfloat16()
    model.quantize()
    assert model.engine is None and torch.equal(model.logits(hidden), model.head(hidden).float())


def test_which_policies_have_graphs(tiny):
    model, _ = load(str(tiny))
    policy = random_policy(model, 0)
    assert has_graphs(model, None) and has_graphs(model, policy) and has_graphs(model, Fixed([4] * 4))
    for change in ({"kv": "none"}, {"kv": "copy"}, {"tau": 1.0}, {"mu": torch.tensor([0.3])}, {"allowed": (0, 4)}):
        other = copy.copy(policy)
        vars(other).update(change)
        assert not has_graphs(model, other), change
    assert not has_graphs(model, Fixed([4] * 4, kv="none")) and not has_graphs(model, Fixed([4] * 8))
    assert not has_graphs(model, baselines.ConfidentExit(4, 0.5))
    assert not has_graphs(model, type("Careful", (Policy,), {})(policy.scorer, policy.scale, policy.costs, policy.fingerprint))
