"""The policy gradient (Eq 11-17): its parts by hand, and that it comes to do what is rewarded."""

import json

import pytest
import torch

import reinforce
from common import Checkpoint
from data import text_examples
from model import load
from policy import INDEX_OF, Fixed, Scorer, rewards
from test_routing import random_policy


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    model, _ = load(str(tiny))
    model.quantize()
    return model


def rollout(model, costs=None, **settings):
    """A `Rollout` with what a step of training sets."""
    policy = random_policy(model, 0)
    policy.costs = policy.costs if costs is None else torch.tensor(costs)
    policy.__class__, policy.tau, policy.generator = reinforce.Rollout, 1.0, torch.Generator().manual_seed(0)
    policy.settings = {"cost": "bits", "weights": True} | settings
    return policy


@torch.no_grad()
def test_log_pi_is_of_the_states_that_were_sampled(model):
    """s to s' of every decision (Eq 11), from the block before to the block decided."""
    policy = rollout(model)
    policy.tau, policy.scorer.lam = 0.5, 1.0
    torch.nn.init.normal_(policy.scorer.bias)
    model(torch.randint(0, 300, (2, 6)), policy)
    found = policy.log_pi()
    for i, x in policy.seen.items():
        q = policy.scorer(x, [i + 1])[:, :, 0] - policy.mu * policy.costs  # (B, T, s, s')
        for b in range(2):
            for t in range(6):
                s, to = (INDEX_OF[int(policy.states[block, b, t])] for block in (i, i + 1))
                assert found[i, b, t].item() == pytest.approx((q[b, t, s] / 0.5).log_softmax(-1)[to].item(), abs=1e-4)


@torch.no_grad()
def test_reward_of_text_is_log_p_routed_less_full(model):
    policy = rollout(model)
    [example] = text_examples(torch.randint(0, 300, (1, 10)))
    r_acc, states, of_tokens = reinforce.reward_of(model, example, policy)
    assert torch.equal(states, policy.states[..., :-1]) and torch.equal(of_tokens(policy.states), states)  # the last token has no target
    log_p = lambda rows, policy: model(rows, policy)[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    again = log_p(example.rows.repeat(reinforce.ROLLOUTS, 1), Fixed(policy.states.clone(), policy.scale))
    assert torch.allclose(r_acc, again - log_p(example.rows, None), atol=1e-4)


def test_the_baseline_is_the_mean_of_the_others():
    assert reinforce.leave_one_out(torch.tensor([[[1.0], [2.0], [6.0]]])).flatten().tolist() == [4.0, 3.5, 1.5]


nothing = lambda states: torch.zeros(states.shape[1:])  # a reward


def stepped(model, tmp_path, monkeypatch, r_acc, steps, goal=2.0, **settings):
    """Steps of the policy gradient with a reward of our own, r_acc(states (L, rollouts, tokens)) -> (rollouts, tokens); their log."""
    policy = rollout(model, **settings)
    policy.scorer, policy.mu = Scorer(4, 64), 0.0

    def reward_of(*given, real=reinforce.reward_of):
        _, states, of_tokens = real(*given)
        return r_acc(states), states, of_tokens

    monkeypatch.setattr(reinforce, "reward_of", reward_of)
    monkeypatch.setattr(reinforce, "LR", 0.02)
    monkeypatch.setattr(reinforce, "temperature", lambda step, steps: 1.0)
    checkpoint = Checkpoint(tmp_path / "checkpoint", {}, 0, False)
    with checkpoint.log(tmp_path / "log") as log:
        reinforce.policy_gradient_steps(policy, model, text_examples(torch.randint(0, 300, (2, 24))), 0.0, 1.0, steps, goal, checkpoint, log)
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_it_comes_to_do_what_is_rewarded(model, tmp_path, monkeypatch):
    """+1 where block 3 runs in INT8, else -1: by chance -0.5."""
    log = stepped(model, tmp_path, monkeypatch, lambda states: (states[2] == 2).float() * 2 - 1, 12)
    assert log[0]["r_acc"] == pytest.approx(-0.5, abs=0.3) and log[-1]["r_acc"] > log[0]["r_acc"] + 0.3


def test_the_price_rises_where_too_much_is_spent(model, tmp_path, monkeypatch):
    [dear] = stepped(model, tmp_path, monkeypatch, nothing, 1, goal=1.0)
    [cheap] = stepped(model, tmp_path, monkeypatch, nothing, 1, goal=3.9)
    assert 1.0 < dear["cost"] < 3.9 and dear["mu"] > 0 > cheap["mu"]


@pytest.mark.parametrize("cost, counted", [("bits", [0.0, 1.0, 2.0, 4.0]), ("latency", [0.5, 1.5, 2.5, 4.0])])
def test_the_clock_is_rewarded_where_it_is_the_cost(model, tmp_path, monkeypatch, cost, counted):
    """Eq 15 counts states in bits, measured milliseconds in latency; w_i can be left out."""
    seen = []
    monkeypatch.setattr(reinforce, "rewards", lambda *given: (seen.append(given), rewards(*given))[1])
    stepped(model, tmp_path, monkeypatch, nothing, 1, costs=[0.5, 1.5, 2.5, 4.0], cost=cost, weights=False)
    assert all(given[3].tolist() == counted and given[4] is False for given in seen)


def test_start_goes_on_from_another_policy(model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(reinforce, "policy_gradient_steps", lambda policy, *rest: seen.append(policy))
    few, start = text_examples(torch.randint(0, 300, (1, 12))), random_policy(model, 1)
    settings = {"speedup": 2.0, "overhead": (0, 0), "fingerprint": "", "horizon": 1, "beta": None, "steps": 1}
    for given in (start, None):
        reinforce.learn(Scorer(4, 64), model, few, few, [1.0] * 4, start.costs, given, Checkpoint(tmp_path / "c", {}, 0, False), tmp_path / "log", settings)
    same = lambda policy: all(torch.equal(a, b) for a, b in zip(policy.scorer.state_dict().values(), start.scorer.state_dict().values()))
    assert same(seen[0]) and seen[0].mu == start.mu and not same(seen[1])


@torch.no_grad()
def test_a_straight_weight_is_the_rounded_one(model):
    linear, x = model.blocks[1].qkv, torch.randn(3, 64)
    for s in (1, 2, "fill"):
        assert torch.allclose(reinforce.straight(linear, linear.low[s])(x), linear.low[s](x), atol=1e-4)
