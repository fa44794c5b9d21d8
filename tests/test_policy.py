"""Every equation against numbers worked out by hand."""

import itertools
import json
import math

import pytest
import torch

import baselines
import policy as P
from common import device_name
from policy import STATES, Fixed, Policy, Scorer
from weights import Config

COSTS = torch.tensor([0.0625, 1.0, 2.0, 4.0])
SMOLLM2 = Config(30, 9, 3, 576, 64, 1536, 49152, 8192, 1e5, 1e-5, True)
LLAMA2 = Config(32, 32, 32, 4096, 128, 11008, 32000, 4096, 1e4, 1e-5, False)


def test_a_filled_skip_costs_the_share_of_keys_and_values():
    assert P.bit_costs(SMOLLM2).tolist() == [0.0625, 1, 2, 4]
    assert P.bit_costs(LLAMA2)[0].item() == pytest.approx(2 * 4096**2 / (4 * 4096**2 + 3 * 4096 * 11008)) == pytest.approx(0.166, abs=1e-3)


def test_speedup_in_bits_counts_every_token():
    states = torch.tensor([[4, 4], [0, 2], [1, 1]])  # 3 blocks, 2 tokens
    assert P.mean_cost(states, COSTS) == pytest.approx((4 + 4 + 0.0625 + 2 + 1 + 1) / 6)
    assert P.speedup_bits(states, COSTS) == pytest.approx(4 * 3 * 2 / 12.0625)
    assert P.state_shares(states) == {"0": 1 / 6, "1": 1 / 3, "2": 1 / 6, "4": 1 / 3}
    assert P.speedup_bits(torch.tensor([4] + [1] * 29), COSTS) == pytest.approx(120 / 33)  # the paper's INT4, 3.64x
    assert P.most_speedup(30, COSTS) == pytest.approx(120 / (4 + 28 * 0.0625 + 1))
    assert P.goal_cost(2.0, 30) == 2.0


def test_latency_cost_by_hand(tmp_path):
    table = {"0": 0.1, "1": 0.2, "2": 0.3, "4": 0.8, "overhead": 2.0, "decision": 0.2}
    file = tmp_path / "speed.json"
    file.write_text(json.dumps({"device": device_name("cpu"), "fingerprint": "f", "model": "an owl", "latency_ms": table, "policy": {"horizon": 30}}))
    costs, overhead = P.latency_costs(file, "cpu", "f", 30)
    assert costs.tolist() == pytest.approx([0.5, 1.0, 1.5, 4.0]) and overhead == pytest.approx((10.0, 11.0))
    goal = P.goal_cost(2.0, 10, overhead)  # full: 8 + 2 ms, so routed may take 5 ms, of which 2.2 are no block's
    assert goal == pytest.approx((5 - 2.2) / 10 / 0.2)
    (tmp_path / "gpu.json").write_text(json.dumps(json.loads(file.read_text()) | {"latency_ms": table | {"full_overhead": 1.0}}))
    assert P.latency_costs(tmp_path / "gpu.json", "cpu", "f", 30)[1] == pytest.approx((5.0, 11.0))  # a GPU runs the full model as one graph
    with pytest.raises(FileNotFoundError, match="bench.py speed"):
        P.latency_costs(tmp_path / "none.json", "cpu", "f", 30)
    with pytest.raises(ValueError, match="another model .an owl."):
        P.latency_costs(file, "cpu", "g", 30)
    with pytest.raises(ValueError, match="with a policy of horizon 1$"):
        P.latency_costs(file, "cpu", "f", 1)
    file.write_text(json.dumps({"device": "an abacus", "latency_ms": table}))
    with pytest.raises(ValueError, match="abacus"):
        P.latency_costs(file, "cpu", "f", 30)
    file.write_text("{}")
    with pytest.raises(ValueError, match="bench.py speed"):
        P.latency_costs(file, "cpu", "f", 30)


def test_scorer_eq_8_by_hand():
    scorer = Scorer(3, 2, lam=0.4)
    h = torch.tensor([[[3.0, 4.0], [3.0, 4.0]]])  # root mean square 3.5355
    x = scorer.features(h, 0)
    assert torch.allclose(x, torch.tensor([[[0.848528, 1.131371, 1.0, 1.0], [0.848528, 1.131371, 0.0, 0.5]]]), atol=1e-5)
    assert torch.allclose(scorer.features(h * 1000, 0), x)  # a_i of Eq 19 cancels
    with torch.no_grad():  # one live unit in each layer
        for p in scorer.parameters():
            p.zero_()
        scorer.first.weight[0] = torch.tensor([1.0, 1.0, 0.0, 0.0])
        scorer.second.weight[0, 0], scorer.second.bias[0] = 0.5, 0.25
        scorer.gain[1, 0], scorer.shift[1, 0] = 2.0, -1.0
        scorer.third.weight[:, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        scorer.bias[1, 3] = torch.tensor([0.0, 0.1, 0.2, 0.3])
    silu = lambda v: v / (1 + math.exp(-v))
    v = silu(2 * (0.5 * silu(1.979899) + 0.25) - 1)
    q = scorer(x, range(1, 2))[0, 0, 0, 3]  # block 2 (1-based), s = 4
    expected = [-math.exp(k * v + b) - 0.4 * abs(s - 4) / 4 for k, b, s in zip((1, 2, 3), (0, 0.1, 0.2), (0, 1, 2))] + [0.0]
    assert q.tolist() == pytest.approx(expected, abs=1e-4)


def test_smoothness_is_the_distance_of_states():
    scorer = Scorer(3, 4, lam=1.0)
    torch.nn.init.constant_(scorer.bias, -math.inf)  # no damage
    table = scorer(scorer.features(torch.randn(1, 1, 4), 0), range(1, 2))[0, 0, 0]
    assert torch.allclose(table, -torch.tensor([[0, .25, .5, 1], [.25, 0, .25, .75], [.5, .25, 0, .5], [1, .75, .5, 0]]))


def test_plan():
    assert [list(P.plan(i, 4, 1)) for i in range(4)] == [[1], [2], [3], []]  # the paper: block i + 1 from the input of block i
    assert [list(P.plan(i, 6, 2)) for i in range(6)] == [[], [1, 2], [3, 4], [], [5], []]
    assert [list(P.plan(i, 7, 3)) for i in range(7)] == [[], [1, 2, 3], [], [4, 5, 6], [], [], []]
    assert [list(P.plan(i, 4, 4)) for i in range(4)] == [[], [1, 2, 3], [], []]  # once, from h_1, block 2 included
    for L in (2, 3, 7, 30):
        for g in range(1, L + 2):
            assert [j for i in range(L) for j in P.plan(i, L, g)] == list(range(1, L))


def test_sampling_eq_11():
    q = torch.tensor([0.0, 1.0, 2.0, -math.inf]).expand(40000, 4)
    share = torch.bincount(P.sample(q, 2.0, torch.Generator().manual_seed(0)), minlength=4) / 40000
    assert torch.allclose(share, torch.tensor([0.1863, 0.3072, 0.5065, 0.0]), atol=0.01)
    assert P.temperature(0, 11) == 1.0 and P.temperature(10, 11) == pytest.approx(0.1) and P.temperature(5, 11) == pytest.approx(0.1**0.5)


def test_rewards_eq_12_to_15():
    assert P.accuracy_reward(torch.tensor(-2.0), torch.tensor(-1.5)).item() == -0.5
    assert P.answer_reward(torch.tensor([True, False])).tolist() == [1.0, -1.0]
    assert P.efficiency_reward(STATES).tolist() == [1.0, 0.75, 0.5, 0.0]
    states = torch.tensor([4, 0, 2])  # S_total 6, spent 4, 4, 6, S_max 12
    sigmoid = lambda v: 1 / (1 + math.exp(-v))
    w = [sigmoid(2 / 12), sigmoid(2 / 12), 0.5]
    assert P.block_weights(states).tolist() == pytest.approx(w)
    R = P.rewards(states, torch.tensor(-0.5), beta=0.2)
    assert R.tolist() == pytest.approx([-0.5 * w[0], -0.5 * w[1] + 0.2, -0.25 + 0.1])


def test_policy_gradient_eq_16_17():
    assert P.returns(torch.tensor([1.0, 2.0, 4.0])).tolist() == [7.0, 6.0, 4.0]
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    G = torch.tensor([3.0, 5.0], requires_grad=True)
    pg = P.policy_gradient(logp, G, 1.0)
    assert pg.item() == 5.0  # -(2 * -1 + 4 * -2) / 2
    loss = P.total_loss(0.5, pg, alpha=2.0)
    loss.backward()
    assert loss.item() == 10.5 and logp.grad.tolist() == [-2.0, -4.0] and G.grad is None


def test_a_policy_file_brings_its_scorers_width(tmp_path):
    P.Policy(P.Scorer(3, 8, width=24), [1.0] * 3, COSTS, "x", [(2.0, 0.1)]).save(tmp_path / "p.safetensors")
    scorer = P.Policy.load(tmp_path / "p.safetensors").scorer
    assert scorer(scorer.features(torch.randn(1, 2, 8), 0), range(1, 3)).shape == (1, 2, 2, 4, 4) and scorer.gain.shape == (3, 24)


def make_policy(L=4, width=8, **more):
    torch.manual_seed(0)
    scorer = Scorer(L, width, lam=0.1)
    torch.nn.init.normal_(scorer.third.weight)
    torch.nn.init.normal_(scorer.bias)
    return Policy(scorer, [1.0, 1.1, 0.9, 1.0][:L], COSTS, "abc", [(1.2, -1.0), (2.0, 0.5), (4.0, 3.0)], **more)


def test_greedy_choice_with_a_price_eq_18():
    policy = make_policy()
    table = torch.zeros(1, 1, 3, 4, 4)
    table[..., 0, 3, :] = torch.tensor([0.0, 1.0, 1.9, 2.0])  # first block's s is 4
    table[..., 1, :, :] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    table[..., 2, :, :] = torch.tensor([-math.inf, 1.0, 1.5, 0.0])
    before = torch.full((1, 1), 4, dtype=torch.uint8)
    policy.mu = 0.0
    assert policy.choose(table, before).flatten().tolist() == [4, 0, 2]  # the last block is never skipped
    policy.mu = 0.3
    assert policy.choose(table, before).flatten().tolist() == [2, 0, 2]
    policy.mu = torch.tensor([0.95])
    assert policy.choose(table, before).flatten().tolist() == [1, 0, 1]


def test_price_of_a_speedup():
    policy = make_policy()
    assert policy.at(2.0).mu == pytest.approx(0.5) and policy.at(3.0).mu == 1.75 and policy.at(1.2).mu == -1.0
    for speedup in (1.0, 4.1, float("nan"), -1, 0):
        with pytest.raises(ValueError, match="out of reach"):
            policy.at(speedup)


def test_first_block_is_full_and_last_is_never_skipped(smollm2):
    model, tokenizer = smollm2
    policy = make_policy(4, model.config.n_embd)
    policy = Policy(Scorer(30, 576), [1.0] * 30, COSTS, "x")
    policy.mu = 100.0
    model(torch.tensor([tokenizer.encode("What is skipped here?")]), policy)
    assert (policy.states[0] == 4).all() and (policy.states[1:-1] == 0).all() and (policy.states[-1] == 1).all()


def test_save_and_load(tmp_path):
    policy = make_policy(horizon=2, settings={"model": "m", "data": "d"})
    file = tmp_path / "new" / "policy.safetensors"
    policy.save(file)
    again = Policy.load(file)
    assert (again.scale, again.prices, again.horizon, again.fingerprint, again.settings) == (
        policy.scale, policy.prices, 2, "abc", {"model": "m", "data": "d"})
    for a, b in zip(policy.scorer.state_dict().values(), again.scorer.state_dict().values()):
        assert torch.equal(a, b)
    assert again.scorer.lam == 0.1 and [f.name for f in file.parent.iterdir()] == ["policy.safetensors"]
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == file.read_bytes()


def test_a_damaged_policy_is_refused(tmp_path, monkeypatch):
    policy = make_policy()
    file = tmp_path / "p.safetensors"
    policy.save(file)
    data = file.read_bytes()
    for bad in (b"", b"junk" * 100, data[:50], data[:-10], data[:8] + b"x" + data[9:]):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="p.safetensors"):
            Policy.load(file)
    monkeypatch.setattr(Policy, "validate", lambda self: None)  # as if a damaged file had been saved
    changes = {"prices": [(1.5, 0.1), (2.0, 1e308)], "scale": [1e308] * 4, "costs": torch.zeros(4), "settings": {"position_damage": [[[0.0] * 4] * 4]}}
    bad = [make_policy() for _ in changes]
    for one, change in zip(bad, changes.items()):
        setattr(one, *change)
    policy.scorer.bias.data[0, 0, 0] = float("nan")
    for n, one in enumerate([*bad, policy]):
        one.save(tmp_path / f"{n}.safetensors")
    monkeypatch.undo()
    for n in range(len(bad) + 1):
        with pytest.raises(ValueError, match=f"{n}.safetensors is not a policy"):
            Policy.load(tmp_path / f"{n}.safetensors")
    before = file.read_bytes()
    with pytest.raises(ValueError, match="p.safetensors is left as it was: .* not finite"):
        policy.save(file)
    assert file.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="train.py"):
        Policy.load(tmp_path / "none.safetensors")


def test_random_states_meet_a_cost():
    g = torch.Generator().manual_seed(0)
    for cost in (0.5, 1.5, 2.0, 3.0):
        states = P.random_states((30, 4, 500), cost, COSTS, g)
        assert P.mean_cost(states, COSTS) == pytest.approx(cost, abs=0.05)
        assert (states[0] == 4).all() and (states[-1] > 0).all() and len(states.unique()) <= 4
    equal = torch.tensor([1.0, 1.0, 2.0, 4.0])  # by the clock a skip can cost what INT4 does
    assert P.mean_cost(P.random_states((10, 1, 5), P.mean_cost(torch.tensor([4] + [1] * 9), equal), equal, g), equal) == pytest.approx(1.3)
    assert P.random_states((2, 1, 9), 2.5 - 1e-7, COSTS, g)[1].tolist() == [[1] * 9]  # two blocks have none to skip


def test_fixed_states_follow_positions():
    given = torch.tensor([[[4, 4, 4]], [[0, 1, 2]]])
    fixed = Fixed(given)
    fixed.states = torch.full((2, 1, 1), 4, dtype=torch.uint8)
    fixed.decide(0, torch.zeros(1, 1, 8), start=2)
    assert fixed.states.flatten().tolist() == [4, 2]


def test_static_plan_by_hand():
    damage = torch.tensor([[0, 0, 0, 0], [9, 3, 1, 0], [9, 1, 0.5, 0], [5, 2, 1, 0], [0, 4, 0.1, 0]], dtype=torch.float32)
    states = lambda cost: P.static_plan(damage, COSTS, cost)[1].tolist()
    assert states(4.0) == [4, 4, 4, 4, 4]
    assert states(12 / 5) == [4, 2, 2, 2, 2]
    assert states(10 / 5) == [4, 2, 1, 1, 2]
    assert states(8 / 5) == [4, 1, 1, 1, 1]  # INT4 everywhere; the last block is never skipped
    for cost in (1.2, 1.5, 1.9, 2.5, 3.1):
        assert P.mean_cost(P.static_plan(damage, COSTS, cost)[1], COSTS) <= cost + 1e-6


def test_buckets_and_a_plan_by_position():
    assert P.position_bucket(torch.tensor([0, 1, 2, 3, 4, 7, 8, 511, 512, 9999])).tolist() == [0, 1, 2, 2, 3, 3, 4, 9, 10, 10]
    damage = torch.zeros(P.POSITIONS, 3, 4)
    damage[..., :3] = torch.tensor([9.0, 2.0, 0.5])
    damage[0, 1, 1] = 0.1  # at t = 0 the second block bears INT4
    known = baselines.Known(3, COSTS, scale=[1.0] * 3, position_damage=damage)
    for T in (2, 701):
        [block1, block2, block3] = baselines.position_mix(known, 1.5)(torch.zeros(1, T)).window(0, T)[:, 0].tolist()
        assert (block1[0], block2[0], block3[0]) == (4, 1, 2) and {*block2[1:], *block3[1:]} == {2} and {*block1} == {4}


def test_greedy_path_and_static_candidates():
    """Additive damage: the lazy greedy path lowers blocks in the order of harm per cost, and all candidates meet their budget."""
    alone = torch.tensor([[0, 0, 0, 0], [9, 3, 0.4, 0], [9, 1, 0.3, 0], [9, 2, 0.1, 0], [9, 5, 0.2, 0]], dtype=torch.float32)
    measured = []

    def measure(states):
        measured.append(states)
        return sum(float(alone[i, P.INDEX_OF[int(s)]]) for i, s in enumerate(states))

    known = baselines.Known(5, COSTS, damage=alone)
    path = baselines.greedy_path(known, measure, 2.5)
    order = [[i for i in range(5) if a[i] != b[i]][0] for a, b in zip(path, path[1:])]
    assert order == [3, 4, 2, 1, 2, 3, 1, 4] and path[-1].tolist() == [4, 1, 1, 1, 1]
    assert len(measured) < 24  # lazily: pricing every move before every step would take 32
    for candidate in baselines.static_candidates(known, alone, measure, (1.5, 2.0, 2.5)):
        for speedup in (1.5, 2.0, 2.5):
            states = candidate(speedup)
            assert states[0] == 4 and states[-1] > 0 and P.mean_cost(states, COSTS) <= 4 / speedup + 1e-6
    candidates = [lambda s: torch.tensor([4, 1, 1, 1, 1]), lambda s: torch.tensor([4, 2, 2, 2, 1])]
    assert baselines.best_static(known, candidates, measure, 2.0).given.tolist() == [4, 2, 2, 2, 1]


def test_states_given_beforehand_are_states_and_reach_as_far_as_they_do():
    for states in ([4, 3], [4, 260], [4, 1.5], [4, -1]):
        with pytest.raises(ValueError, match="0, 1, 2 and 4"):
            P.Fixed(states)
    policy = P.Fixed(torch.full((2, 1, 5), 4))
    assert policy.window(1, 4).shape == (2, 1, 4)
    with pytest.raises(ValueError, match="5 positions, and 6"):
        policy.window(2, 4)
    with pytest.raises(ValueError, match="3 blocks have states and 2 a scale"):
        P.Fixed([4, 4, 4], [1.0, 1.0])


@pytest.mark.parametrize("lam, allowed", [(0.0, (0, 1, 2, 4)), (0.3, (0, 1, 2, 4)), (0.3, (0, 4)), (0.0, (1, 2))])
@torch.no_grad()
def test_single_tokens_are_decided_as_all_are(lam, allowed):
    """`OneToken` against the scorer, after any state, from the first position on, and for a price that changes."""
    torch.manual_seed(0)
    L, d, met = 6, 24, set()
    scorer = P.Scorer(L, d, lam, width=16)
    for t in (scorer.mean, scorer.gain, scorer.shift, scorer.third.weight, scorer.bias):
        t.normal_()
    scorer.std.uniform_(0.5, 2)
    for horizon in (0, 1, 2, 6):
        policy = P.Policy(P.Scorer(L, d, lam), [1.0] * L, COSTS, "", horizon=horizon, mu=0.1, states=torch.full((L, 1, 1), 4), allowed=allowed)
        policy.decide(1, torch.ones(1, 1, d), 1)
        policy.scorer = scorer  # what was prepared for the other one is not used
        for start, i, mu in itertools.product((0, 1, 300), range(L), (0.1, 1.0)):
            policy.mu = mu
            x, blocks = 10 * torch.randn(1, 1, d), P.plan(i, L, horizon)
            if blocks:
                policy.states = P.STATES[torch.randint(4, (L, 1, 1))].to(torch.uint8)
                want = policy.choose(scorer(scorer.features(x, start), blocks), policy.states[blocks[0] - 1])
                policy.decide(i, x, start)
                assert torch.equal(policy.states[blocks[0] : blocks[-1] + 1], want)
                met |= set(want.flatten().tolist())
    assert met == set(allowed)


def test_a_price_beyond_the_calibrated_ones():
    policy = make_policy()
    assert policy.price(1.0) == -1.0 and policy.price(5.0) == 4.25 and policy.price(3.0) == 1.75
    policy.prices = [(1.2, 0.7)]
    assert policy.at(1.2).mu == 0.7


def test_the_price_follows_time_with_its_overhead():
    policy = make_policy(settings={"overhead": (10.0, 11.0)})
    policy.prices = [(1.0, 0.0), (4.0, 3.0)]  # mu = speedup - 1
    policy.at(1.5, track=True)
    goal = ((16 + 10) / 1.5 - 11) / 4
    policy.follow([4, 4, 2, 2])  # mean cost 3
    assert policy.owed == pytest.approx(3 - goal)
    assert policy.mu == pytest.approx(26 / (4 * (goal - (3 - goal) / 32) + 11) - 1)


def test_most_speedup_with_overhead():
    assert P.most_speedup(10, COSTS, (10.0, 11.0)) == pytest.approx(50 / (4 + 8 * 0.0625 + 1 + 11))


def test_rewards_by_measured_costs():
    R = P.rewards(torch.tensor([4, 0, 1]), torch.tensor(0.0), beta=1.0, costs=torch.tensor([0.5, 1.5, 2.5, 4.0]))
    assert R.tolist() == [0.0, 0.875, 0.625]


def test_features_are_standardised_and_clamped():
    scorer = Scorer(3, 2)
    scorer.mean.copy_(torch.tensor([0.5, -0.5])), scorer.std.copy_(torch.tensor([0.5, 0.1]))
    x = scorer.features(torch.tensor([[[3.0, 4.0]]]), 0)[0, 0, :2]  # 0.8485 and 1.1314 of a root mean square of 1
    assert x.tolist() == pytest.approx([(0.848528 - 0.5) / 0.5, 5.0], abs=1e-4)  # (1.1314 + 0.5) / 0.1 is clamped
