"""The invariant of the house: whole sequences at once and token by token give the same logits and the same decisions."""

import pytest
import torch

from conftest import tiny_folder
from model import KVCache, load
from policy import INDEX, Fixed, Policy, Scorer, bit_costs, mean_cost


def random_policy(model, seed, horizon=1, spread=1.0):
    """A scorer with weights large enough that all four states occur, at random scales and a random price."""
    torch.manual_seed(seed)
    L, d = model.config.n_layer, model.config.n_embd
    scorer = Scorer(L, d, lam=0.3)
    scorer.mean.normal_().mul_(0.1)
    for p in (scorer.gain, scorer.shift, scorer.third.weight, scorer.bias):
        torch.nn.init.normal_(p, std=spread)
    policy = Policy(scorer, (0.8 + 0.4 * torch.rand(L)).tolist(), bit_costs(model.config), model.fingerprint(), horizon=horizon)
    policy.mu = 0.3
    return policy


def decode(model, tokens, policy, pieces):
    cache, logits, states = KVCache(model, len(tokens), tokens.shape[1]), [], []
    for part in tokens.split(pieces, dim=1):
        logits.append(model(part, policy, cache))
        states.append(policy.states)
    return torch.cat(logits, 1), torch.cat(states, 2)


def agree(model, tokens, policy, pieces):
    whole = model(tokens, policy)
    states = policy.states
    assert (states[0] == 4).all() and (states[-1] > 0).all()
    cached, cached_states = decode(model, tokens, policy, pieces)
    if not torch.equal(states, cached_states):  # only where two scores are closer than 1e-4 may either win
        where = (states != cached_states).nonzero()
        assert len(where) < 3, f"{len(where)} decisions differ"
        cached, _ = decode(model, tokens, Fixed(states, policy.scale), pieces)
    assert (whole - cached).abs().max() < 2e-3 * whole.abs().max()
    return states


@pytest.mark.parametrize("kind, change", [
    ("llama", {}), ("qwen2", {"num_key_value_heads": 1}), ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    ("llama", {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 70})])
@pytest.mark.parametrize("horizon", [1, 2, 6])
@torch.no_grad()
def test_parallel_pass_equals_decoding(tmp_path, kind, change, horizon):
    tiny_folder(tmp_path, kind, layers=6, **change)
    model, _ = load(str(tmp_path))
    seen = torch.zeros(5)
    for seed in range(4):
        policy = random_policy(model, seed, horizon)
        tokens = torch.randint(0, 300, (2, 24))
        states = agree(model, tokens, policy, [1] * 24)
        agree(model, tokens, policy, [5, 1, 1, 9, 8])
        seen += torch.bincount(states.flatten().long(), minlength=5)
    assert (seen[[0, 1, 2, 4]] > 0).all()  # the test has met every state


@torch.no_grad()
def test_parallel_pass_equals_decoding_smollm2(smollm2):
    model, tokenizer = smollm2
    for seed, text in enumerate(["def f(x):\n    return 2 ** x\n", "The moon, seen through a small telescope, is"]):
        tokens = torch.tensor([tokenizer.encode(text)])
        agree(model, tokens, random_policy(model, seed, horizon=(1, 30)[seed]), [1] * tokens.shape[1])


@torch.no_grad()
def test_every_state_does_what_it_says(tiny):
    """Block by block against plain arithmetic: dequantised weights for 1 and 2, a_i x for 0, K/V of a skip in INT4."""
    model, _ = load(str(tiny))
    model.quantize()
    tokens = torch.randint(0, 300, (1, 9))
    x, rope = torch.randn(9, 64), model.rope(0, 9)
    block = model.blocks[1]
    outputs = {s: block(x, 1, [(s, None)], 0.7, rope) for s in (0, 1, 2, 4)}
    assert torch.equal(outputs[0], 0.7 * x)
    assert 0 < (outputs[2] - outputs[4]).abs().max() < (outputs[1] - outputs[4]).abs().max()
    mixed = torch.tensor([[4, 0, 1, 2, 0, 4, 1, 2, 4]])
    cache = KVCache(model, 1, 9)
    model(tokens, Fixed(torch.stack([torch.full((1, 9), 4), mixed, mixed.clamp(min=1), mixed.clamp(min=1)])), cache)
    embedded = model.blocks[0](model.embed(tokens)[0], 1, [(4, None)], 1.0, rope)
    h = block.norm1(embedded)
    for t, s in enumerate(mixed[0].tolist()):
        assert torch.allclose(cache.kv[1, 0, t].flatten()[-block.kv_size :], block.qkv(h, s or 1)[t, -block.kv_size :], atol=1e-5)


@torch.no_grad()
def test_all_fours_is_the_model_itself(tiny):
    model, _ = load(str(tiny))
    tokens = torch.randint(0, 300, (2, 16))
    assert torch.equal(model(tokens, Fixed([4] * 4)), model(tokens))


@torch.no_grad()
def test_what_has_no_room_or_does_not_fit_is_refused(tiny):
    """Both ran before without a word: a token beyond its cache, which attended to all but itself, and a policy of another depth."""
    model, _ = load(str(tiny))
    tokens = torch.randint(0, 300, (1, 7))
    full = KVCache(model, 1, 5)
    model(tokens[:, :5], cache=full)
    for n in (1, 2):
        with pytest.raises(ValueError, match="this cache"):
            model(tokens[:, 5 : 5 + n], cache=full)
    with pytest.raises(ValueError, match="this model's context"):
        model(torch.zeros(1, model.config.block_size + 1, dtype=torch.int64))
    for depth in (3, 5, 7):
        with pytest.raises(ValueError, match=f"{depth} blocks or halves"):
            model(tokens, Fixed([4] * depth))
    replaced = Fixed([4] * 4)
    replaced.decide = lambda i, x, start: setattr(replaced, "states", torch.full((4, 1, 7), 2, dtype=torch.uint8))  # of one sequence
    with pytest.raises(ValueError, match=r"states are \(4, 1, 7\), expected \(4, 2, 7\)"):
        model(tokens.expand(2, -1), replaced)
    with pytest.raises(ValueError, match="states are"):
        Fixed([4, 3, 4, 4])


@torch.no_grad()
def test_decision_reads_only_the_block_before(tiny):
    """Eq 19-20: the state of block i + 1 is a function of the input of block i; what block i does cannot change it."""
    model, _ = load(str(tiny))
    policy = random_policy(model, 1)
    tokens = torch.randint(0, 300, (1, 12))
    model(tokens, policy)
    before = policy.states.clone()
    model.blocks[2].down.weight.data.normal_(std=5)  # changes h_3, the input of block 4
    model(tokens, policy)
    assert torch.equal(policy.states[:3], before[:3]) and torch.equal(policy.states[3], before[3])


@torch.no_grad()
def test_a_price_per_sequence_is_that_price_alone(tiny):
    model, _ = load(str(tiny))
    policy = random_policy(model, 2, spread=0.3)
    tokens = torch.randint(0, 300, (1, 20))
    policy.mu = torch.tensor([0.0, 0.3, 9.0])
    model(tokens.repeat(3, 1), policy)
    together = policy.states.clone()
    for n, mu in enumerate((0.0, 0.3, 9.0)):
        policy.mu = mu
        model(tokens, policy)
        assert torch.equal(policy.states[:, 0], together[:, n])
    costs = policy.costs[INDEX[together.long()]].sum(dim=(0, 2))
    assert costs[0] > costs[1] > costs[2]


@torch.no_grad()
def test_a_tracking_price_keeps_to_the_budget_and_can_be_replayed(tiny):
    """Prices calibrated too low by a constant: fixed, the cost is off; tracked, it is within 1% over 512 decoded tokens. The prices
    that were used, given to one parallel pass, make the same decisions."""
    model, _ = load(str(tiny))
    policy = random_policy(model, 5, horizon=4, spread=0.5)
    tokens = torch.randint(0, 300, (1, 512))
    policy.prices = []
    for mu in (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2):
        policy.mu = mu
        model(tokens, policy)
        policy.prices.append((4 / mean_cost(policy.states, policy.costs), mu - 0.04))
    ran, target = {}, policy.prices[3][0]
    for track in (False, True):
        policy.at(target, track=track)
        cache, mus, states = KVCache(model, 1, 512), [], []
        for part in tokens.split([32] + [1] * 480, dim=1):
            mus += [policy.mu] * part.shape[1]
            model(part, policy, cache)
            states.append(policy.states)
        ran[track] = torch.cat(states, 2)
        policy.at(target)
        policy.mu = torch.tensor([mus])
        model(tokens, policy)
        assert (policy.states != ran[track]).sum() < 3  # two scores closer than 1e-4
    cost = lambda states: mean_cost(states[:, :, 32:], policy.costs) / (4 / target) - 1
    assert abs(cost(ran[True])) < 0.01 < abs(cost(ran[False]))
    policy.at(target, track=True)  # a new text starts with the calibrated price
    model(tokens[:, :1], policy, KVCache(model, 1, 4))
    assert policy.mu == policy.price(target)
    _, states = decode(model, torch.cat([tokens, tokens.flip(1)]), policy, [32] + [1] * 480)  # one price serves a batch
    assert abs(cost(states)) < 0.01
