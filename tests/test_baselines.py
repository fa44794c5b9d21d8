"""The compared methods, states of sublayers, and the three ways to keep the keys and values of skipped tokens."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import baselines
import charts
import evaluate
from conftest import tiny_folder
from data import outcomes, text_examples
from evaluate import METHODS, SKIPS, make_policy, measured_speedup
from model import KVCache, load
from policy import Fixed, bit_costs, mean_cost, plan, rewards, speedup_bits
from test_routing import agree, decode, random_policy

L = 8


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_folder(folder, request.param, layers=L)
    model = load(str(folder))[0]
    model.quantize()
    return model


@pytest.fixture(scope="module")
def known(model):
    known = baselines.Known(L, bit_costs(model.config), config=model.config, scale=[1.0] * L, damage=torch.rand(L, 4).sort(descending=True)[0])
    known.samples = torch.randint(0, 300, (8, 32))
    baselines.observe(known, model)
    known.position_damage = known.damage.expand(11, -1, -1)
    return known


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dash"])
@torch.no_grad()
def test_decoding_equals_the_parallel_pass(model, known, method):
    """Every method but adaskip's online part, which is replayed; cached in uneven pieces."""
    tokens = torch.randint(0, 300, (2, 40))
    policy = baselines.for_tokens(baselines.by_name(method, known, 1.33), tokens)
    cached, states = decode(model, tokens, policy, [9, 1, 1, 5] + [1] * 24)
    whole = model(tokens, Fixed(states, policy.scale, policy.kv) if method == "adaskip" else policy)
    assert (whole - cached).abs().max() < 2e-3 * whole.abs().max()
    assert torch.equal(states, policy.states) or method == "adaskip"


@pytest.mark.parametrize("method", [m for m in SKIPS if m not in ("random_skip", "confident_exit")])
@torch.no_grad()
def test_what_is_not_written_is_never_read(model, known, method):
    """Fixed and growing skip sets: the same logits whether skipped tokens fill their keys and values or leave holes, at no cost."""
    tokens = torch.randint(0, 300, (2, 30))
    policy = baselines.for_tokens(baselines.by_name(method, known, 1.5), tokens)
    assert policy.kv == "none" and float(bit_costs(model.config, policy).flatten()[0]) == 0
    holes, _ = decode(model, tokens, policy, [10] + [1] * 20)
    filled, _ = decode(model, tokens, Fixed(policy.given, policy.scale), [10] + [1] * 20) if method != "adaskip" else (holes, None)
    assert torch.allclose(holes, filled, atol=1e-4)


@pytest.mark.parametrize("speedup", [1.2, 1.33, 1.67, 2.0, 3.0])
@torch.no_grad()
def test_speedups_are_those_asked_for(model, known, speedup):
    tokens = torch.randint(0, 300, (4, 120))
    for method in SKIPS:
        try:
            policy = baselines.for_tokens(baselines.by_name(method, known, speedup), tokens)
        except ValueError as e:
            assert "out of reach" in str(e)
            continue
        model(tokens, policy)
        found = speedup_bits(policy.states, bit_costs(model.config, policy))
        if method in ("static_skip", "unified_skip", "early_exit"):
            skipped = int((policy.states[:, 0, 0] == 0).sum())
            assert skipped == -(-L * (1 - 1 / speedup) // 1) and found == pytest.approx(L / (L - skipped))
        elif method == "adaskip":
            assert speedup - 0.005 <= found < speedup * 1.25
        else:
            assert found == pytest.approx(speedup, rel=0.1 if method == "confident_exit" else 0.04), method


def test_unified_skip_is_spread_and_exact():
    known = baselines.Known(32, torch.tensor([0.166, 1, 2, 4]))
    for n in range(1, 31):
        skipped = (baselines.unified_skip(known, 32 / (32 - n)).given == 0).nonzero()[:, 0].tolist()
        gaps = [b - a for a, b in zip(skipped, skipped[1:])]
        assert len(skipped) == n == baselines.whole_skips(known, round(32 / (32 - n), 2)) and 0 < min(skipped) and max(skipped) < 31 and (not gaps or max(gaps) - min(gaps) <= 1)


def test_static_skip_takes_the_most_similar(known):
    mean = known.similarity.mean(1)
    states = baselines.static_skip(known, L / (L - 2)).given
    assert mean[1:-1][states[1:-1] == 0].min() >= mean[1:-1][states[1:-1] > 0].max() and states[0] == states[-1] == 4


def test_skipdecode_exits_never_rise_and_keep_the_top(known):
    for speedup in (1.2, 1.6, 2.2):
        states = baselines.skipdecode(known, speedup)(torch.zeros(1, 500)).given[:, 0]
        assert (states[0] == 4).all() and (states[-1] == 4).all()
        number = (states == 0).sum(0)
        assert (number.diff() >= 0).all() and number[0] < number[-1]
        for t in (0, 250, 499):  # the lower and middle blocks, without a gap
            assert (states[1 : 1 + number[t], t] == 0).all()


@torch.no_grad()
def test_exits_leave_for_good(model, known):
    tokens = torch.randint(0, 300, (2, 30))
    policy = baselines.confident_exit(known, 1.5)
    model(tokens, policy)
    assert ((policy.states[1:].int() - policy.states[:-1].int()) <= 0).all() and len(policy.states.unique()) == 2
    assert (policy.states[0] == 4).all() and not torch.equal(policy.states[:, 0, 1:], policy.states[:, 0, :-1])  # by token
    assert baselines.early_exit(known, 2.0).given.tolist() == [4] * 4 + [0] * 4


@torch.no_grad()
def test_observe_by_hand(model):
    """Similarities and norm ratios of blocks, attention and MLP against a plain pass, first tokens left out."""
    tokens = torch.randint(0, 300, (2, 12))
    known = baselines.Known(L, None, samples=tokens)
    baselines.observe(known, model)
    x = model.embed(tokens).flatten(0, 1)
    for i, block in enumerate(model.blocks):
        y = block(x, 2, [(4, None)], 1.0, model.rope(0, 12))
        without_mlp = block.attention_half(x, 2, [(4, None)], 1.0, model.rope(0, 12))
        assert torch.allclose(block.mlp(4, without_mlp), y, atol=1e-5)
        later = lambda t: t.view(2, 12, -1)[:, 1:].flatten(0, 1)
        assert torch.allclose(known.similarity[i], F.cosine_similarity(later(x), later(y)), atol=1e-5)
        assert torch.allclose(known.sublayers[2 * i], F.cosine_similarity(later(x), later(without_mlp)), atol=1e-5)
        assert known.ratio[2 * i + 1].item() == pytest.approx((later(y).norm(dim=1) / later(without_mlp).norm(dim=1)).mean().item(), rel=1e-4)
        x = y


@torch.no_grad()
def test_adaskip_pools_sublayers_and_learns_online(model, known):
    """The most similar of attention and MLP alike are skipped and replaced by their ratio; after 20 decoded tokens, and not
    before, so are the MLPs that proved similar; a new text starts afresh."""
    policy = baselines.adaskip(known, 1.4)
    mean, skipped = known.sublayers.mean(1), policy.given == 0
    assert mean[skipped].min() >= mean[~skipped].max() and policy.threshold == pytest.approx(mean[skipped].min().item())
    assert policy.scale == known.ratio.tolist() and len(policy.given) == 2 * L
    policy.threshold = -1.0  # every MLP but the last, whose output the policy never sees, is similar enough
    for _ in range(2):
        _, states = decode(model, torch.randint(0, 300, (1, 34)), policy, [8] + [1] * 26)
        assert (states[:, 0, :28] == policy.given[:, None]).all()
        assert (states[1:-1:2, 0, 28:] == 0).all() and (states[::2, 0, 28:] == policy.given[::2, None]).all()
    policy.threshold = 2.0
    _, states = decode(model, torch.randint(0, 300, (1, 34)), policy, [8] + [1] * 26)
    assert (states[:, 0] == policy.given[:, None]).all()


# States of sublayers


@torch.no_grad()
def test_sublayers_in_one_state_are_the_block(model):
    """Attention and MLP of every token in the same executed state, and the unscaled skip: what the whole block does."""
    tokens = torch.randint(0, 300, (2, 20))
    states = torch.tensor([4, 1, 2, 0, 4, 2, 1, 4])
    pairs = states.repeat_interleave(2)
    assert torch.allclose(model(tokens, Fixed(pairs, [1.0] * 2 * L)), model(tokens, Fixed(states)), atol=1e-5)


@torch.no_grad()
def test_a_sublayer_skipped_alone(model):
    x, rope, block = torch.randn(6, 64), model.rope(0, 6), model.blocks[2]
    run, skip = [(4, None)], [(0, None)]
    assert torch.equal(block.attention_half(x, 1, skip, 0.9, rope), 0.9 * x) and torch.equal(block.mlp_half(x, skip, 1.1), 1.1 * x)
    some = [(0, torch.tensor([1, 4])), (4, torch.tensor([0, 2, 3, 5]))]
    out = block.mlp_half(x, some, 1.1)
    assert torch.allclose(out[[1, 4]], 1.1 * x[[1, 4]]) and torch.allclose(out[[0, 2, 3, 5]], block.mlp_half(x, run)[[0, 2, 3, 5]], atol=1e-6)


def test_costs_of_sublayers_and_of_holes(model):
    c = model.config
    attention = c.n_embd * (2 * c.n_head + 2 * c.n_kv_head) * c.head_dim
    block = attention + 3 * c.n_embd * c.n_hidden
    costs = bit_costs(c, Fixed([4] * 2 * L, [1.0] * 2 * L))
    states = torch.tensor([4, 4] * (L - 2) + [4, 0] + [0, 2])[:, None]  # one MLP skipped; one attention filled, its MLP in INT8
    expected = (4 * (L - 2) + 4 * attention / block + 2 * c.n_embd * c.n_kv_head * c.head_dim / block + 2 * (1 - attention / block)) / L
    assert mean_cost(states, costs) == pytest.approx(expected, rel=1e-5)
    assert bit_costs(c, Fixed([4] * L, kv="none"))[0] == 0 < bit_costs(c, Fixed([4] * L))[0] == bit_costs(c)[0]


# Keys and values of skipped tokens


@pytest.mark.parametrize("kv", ["fill", "copy", "none"])
@pytest.mark.parametrize("horizon", [0, 1, L])
@torch.no_grad()
def test_kv_modes_and_horizon_0_keep_the_invariant(model, kv, horizon):
    for seed in range(2):
        policy = random_policy(model, seed, horizon)
        policy.kv = kv
        tokens = torch.randint(0, 300, (2, 24))
        whole, states = model(tokens, policy), policy.states
        assert (states == 0).any()
        for pieces in ([1] * 24, [5, 1, 1, 9, 8]):
            cached, cached_states = decode(model, tokens, policy, pieces)
            if not torch.equal(states, cached_states):  # two scores closer than 1e-4
                cached, _ = decode(model, tokens, Fixed(states, policy.scale, kv), pieces)
            assert (whole - cached).abs().max() < 2e-3 * whole.abs().max()
    agree(model, tokens, random_policy(model, 3, horizon), [1] * 24)


@torch.no_grad()
def test_kv_modes_by_hand(model):
    """What the cache holds of a token that skips blocks 3 and 4: its input, the input of block 2, nothing."""
    tokens, states = torch.randint(0, 300, (1, 5)), torch.full((L, 1, 5), 4)
    states[2:4, 0, 2] = 0
    inputs = {}
    hooks = [b.register_forward_hook(lambda m, a, y, i=i: inputs.__setitem__(i, a[0])) for i, b in enumerate(model.blocks)]
    model(tokens, Fixed(states))
    [h.remove() for h in hooks]
    block = model.blocks[3]
    value = lambda x: block.qkv(x[2:3], "fill", norm=block.norm1)[0, -block.kv_size :]
    caches = {}
    for kv in ("fill", "copy", "none"):
        caches[kv] = KVCache(model, 1, 8)
        model(tokens, Fixed(states, kv=kv), caches[kv])
    assert torch.allclose(caches["fill"].kv[3, 0, 2].flatten()[-block.kv_size :], value(inputs[3]), atol=1e-5)
    assert torch.allclose(caches["copy"].kv[3, 0, 2].flatten()[-block.kv_size :], value(inputs[1]), atol=1e-5)
    assert (caches["none"].kv[3, 0, 2] == 0).all() and caches["none"].written[2:4, 0, 2].tolist() == [False, False]
    assert caches["none"].written.sum() == caches["none"].written.numel() - 2 and caches["fill"].written is None


@torch.no_grad()
def test_holes_do_not_break_the_next_request(model):
    """Whoever continues or reuses a cache with holes attends to none: the full model, a policy that fills, a new text."""
    first, then, states = torch.randint(0, 300, (1, 6)), torch.randint(0, 300, (1, 4)), torch.full((L, 1, 6), 4)
    states[3:6, 0, [1, 4]] = 0
    continued = torch.cat([states, torch.full((L, 1, 4), 4)], 2)
    want = model(torch.cat([first, then], 1), Fixed(continued, kv="none"))[:, 6:]
    for after in (None, Fixed([4] * L), Fixed([4] * L, kv="none")):
        cache = KVCache(model, 1, 12)
        model(first, Fixed(states, kv="none"), cache)
        assert torch.allclose(model(then, after, cache), want, atol=1e-4)
    cache.length = 0
    assert torch.allclose(model(then, None, cache), model(then), atol=1e-4)
    cache.length = 0
    assert torch.allclose(model(first, Fixed(states), cache), model(first, Fixed(states)), atol=1e-4)  # its skipped tokens fill


# Ablations


@torch.no_grad()
def test_allowed_states_only(model):
    policy, tokens = random_policy(model, 1, L), torch.randint(0, 300, (2, 30))
    for allowed in ((0, 4), (0, 2, 4), (1, 2)):
        policy.allowed = allowed
        model(tokens, policy)
        assert set(policy.states[1:].unique().tolist()) == set(allowed) and (policy.states[-1] > 0).all()


@torch.no_grad()
def test_horizon_0_reads_the_blocks_own_input(model):
    assert [list(plan(i, 4, 0)) for i in range(4)] == [[], [1], [2], [3]]
    tokens, changed = torch.randint(0, 300, (2, 60)), copy.deepcopy(model)
    changed.blocks[0].down.weight.data.normal_(std=5)  # changes h_1, the input of block 2
    moved = {0: 0, 1: 0}
    for horizon in moved:
        for seed in range(4):
            policy = random_policy(model, seed, horizon)
            model(tokens, policy)
            before = policy.states[1].clone()
            changed(tokens, policy)
            moved[horizon] += (policy.states[1] != before).sum().item()
    assert moved[0] > 0 == moved[1]


def test_rewards_without_weights():
    R = rewards(torch.tensor([4, 0, 2]), torch.tensor(-0.5), beta=0.2, weights=False)
    assert R.tolist() == pytest.approx([-0.5, -0.3, -0.4])


@torch.no_grad()
def test_a_static_plan_pays_for_no_keys_that_nobody_reads(model, known):
    damage = torch.tensor([[0.0] * 4] + [[0.1, 3, 2, 0]] * (L - 2) + [[9, 3, 2, 0]])  # skipping is the least harm
    plan = baselines.static_mix(replace(known, damage=damage), 32 / 12)
    assert plan.kv == "none" and (plan.given == 0).any()
    assert mean_cost(plan.given, bit_costs(model.config, plan)) == pytest.approx(12 / 8)  # with keys and values one block more would have to go
    tokens = torch.randint(0, 300, (2, 30))
    assert torch.allclose(model(tokens, plan), model(tokens, Fixed(plan.given, plan.scale)), atol=1e-4)


def test_a_new_method_is_a_function_that_returns_states(model, known, monkeypatch):
    """With its name in SKIPS it is in the tables, and in their pictures however many there are."""
    monkeypatch.setattr(baselines, "odd", lambda known, speedup: torch.where(known.similarity.mean(1) > 2, 0, 4), raising=False)
    policy = make_policy("odd", 1.33, baselines.Known(L, known.costs, samples=known.samples), model, None, "no policy")
    assert isinstance(policy, Fixed) and policy.given.tolist() == [4] * L
    for wrong in (None, [4] * (L - 1), [4, *[3] * (L - 1)], 7):
        monkeypatch.setattr(baselines, "odd", lambda known, speedup: wrong)
        with pytest.raises(ValueError, match="odd gives"):
            make_policy("odd", 1.33, known, model, None, "no policy")
    rows = [{"method": f"method {n}", "target": 1.33, "speedup": 1.3, "value": 0.5, "kl": 0.1} for n in range(12)]
    charts.table({"rows": rows, "metric": "accuracy", "caption": "arc_easy, test"})


def test_every_example_is_billed_by_its_own_policy(model):
    """Plans that skip write no keys and values, those beside them do not skip: in any order the same cost."""
    examples = text_examples(torch.randint(0, 300, (2, 20)))
    plans = [baselines.one_plan(torch.tensor([4, 0, 0, *[4] * (L - 3)])), baselines.one_plan(torch.tensor([4] + [2] * (L - 1)))]
    for order in (plans, plans[::-1]):
        those = iter(order)
        [row] = baselines.compare(model, examples, [lambda rows: next(those)])
        assert row["speedup"] == pytest.approx(4 * 2 * L / sum(plan.given.sum().item() for plan in plans))


class Own(torch.nn.Module):
    """A policy of somebody's own, with the five members of policy.py and no more."""

    scale, kv, int4, states = [1.0] * 4, "fill", None, None

    def decide(self, i, x, start):
        if i:
            self.states[i] = torch.where(x.mean(-1) > 0, 1, 2)


PLANS = torch.tensor([[4, 1, 2, 2], [4, 2, 1, 1]])


@pytest.mark.parametrize("policy", [Own(), lambda tokens: Own(), lambda tokens: Fixed([4, 1, 2, 2]), lambda tokens: Fixed(PLANS[tokens % 2].permute(2, 0, 1))])
def test_a_policy_of_ones_own_is_compared_and_timed(tiny, policy):
    model, tokenizer = load(str(tiny))
    [row] = baselines.compare(model, text_examples(torch.randint(0, 300, (2, 20))), [policy])
    assert 1.5 < row["speedup"] < 3 and row["kl"] > 0
    assert all(r > 0 for r in measured_speedup(model, tokenizer, policy, "some words", 1))


def test_a_policy_of_ones_own_may_not_make_up_states(tiny):
    model, policy = load(str(tiny))[0], Own()
    for decide in (lambda i, x, start: policy.states[i].fill_(3), lambda i, x, start: policy.states[i, 0, 0].fill_(8)):
        policy.decide = decide
        for tokens in (torch.tensor([[5]]), torch.tensor([[5, 6, 7]])):
            with pytest.raises(ValueError, match="states are 0 skip, 1 INT4, 2 INT8 and 4"):
                model(tokens, policy)


def test_nothing_is_skipped_where_nothing_is_asked_and_limits_can_be_asked_for(model, known):
    assert (baselines.adaskip(known, 1.0).given == 4).all()
    for method in (baselines.static_skip, baselines.random_skip):
        with pytest.raises(ValueError, match="give 1 to") as e:
            method(known, 100.0)
        method(known, float(str(e.value).split()[-1]))


@torch.no_grad()
def test_kl_is_from_the_full_model(tiny):
    model, _ = load(str(tiny))
    examples, states = text_examples(torch.randint(0, 300, (2, 16))), torch.tensor([4, 1, 1, 1])
    [row] = baselines.compare(model, examples, [Fixed(states)])
    full, routed = (torch.cat([outcomes(model, model.hidden(e.rows, p), e)[0] for e in examples]) for p in (None, Fixed(states)))
    want = F.kl_div(routed, full, log_target=True, reduction="batchmean").item()
    assert row["kl"] == pytest.approx(want, rel=1e-4) == baselines.measured_kl(model, examples)(states)


def test_intervals_are_of_95_percent():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = baselines.interval(values.tolist())
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 1000**0.5, rel=0.08)


@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.6])
def test_mixes_spend_what_they_may(speedup):
    """In the costs that they are given, over a window as long as those that are tested."""
    torch.manual_seed(0)
    known = baselines.Known(8, torch.tensor([0.5, 1.0, 2.0, 4.0]), scale=[1.0] * 8)
    known.position_damage = torch.rand(11, 8, 4).sort(descending=True)[0] * torch.logspace(-2, 2, 11)[:, None, None]
    spent = lambda states: mean_cost(states, known.costs)
    assert spent(baselines.random_mix(known, speedup)(torch.zeros(4, 1024)).given) == pytest.approx(4 / speedup, rel=0.02)
    for T in (64, 1024):
        assert 0.9 * 4 / speedup < spent(baselines.position_mix(known, speedup)(torch.zeros(4, T)).given) <= 4 / speedup + 1e-6


def test_a_measured_speedup_is_above_1_where_routing_is_faster(tiny, monkeypatch):
    model, tokenizer = load(str(tiny))
    monkeypatch.setattr(evaluate, "generate", lambda model, tokenizer, prompt, p, *rest, **options: {"tokens_per_second": 3.0 if p else 1.0})
    assert measured_speedup(model, tokenizer, Fixed([4, 0, 0, 4]), "the cat", 2) == [3.0, 3.0]


def test_baselines_know_the_training_text_alone(tiny, tmp_path):
    for split, word in (("train", "cat "), ("test", "dog ")):
        (tmp_path / "wikitext2").mkdir(exist_ok=True)
        (tmp_path / "wikitext2" / f"{split}.txt").write_text(word * 3000)
    args = SimpleNamespace(policy="none", file=None, data_dir=tmp_path, model=str(tiny), device="cpu", compare=[], seed=0, limit=1, full=False)
    _, tokenizer, _, known, [example] = evaluate.at_hand(args, "wikitext2", 1, needed=False)
    known, tested = (tokenizer.decode(rows.flatten().tolist()) for rows in (known.samples, example.rows))
    assert "cat" in known and "dog" not in known and "dog" in tested and "cat" not in tested


@torch.no_grad()
def test_without_keys_and_values_a_skip_is_free_and_the_price_knows_it(tiny):
    model, _ = load(str(tiny))
    examples = text_examples(torch.randint(0, 300, (4, 128)))
    [policy] = evaluate.variant(random_policy(model, 3, 4, spread=0.5), model, examples, [2.0], kv="none")
    assert policy.costs[0] == 0 and baselines.compare(model, examples, [policy])[0]["speedup"] == pytest.approx(2.0, rel=0.05)


def test_mixes_scale_what_they_skip():
    known = baselines.Known(4, torch.tensor([0.0625, 1.0, 2.0, 4.0]), scale=[1.0, 1.1, 0.9, 1.0], damage=torch.rand(4, 4).sort(descending=True)[0])
    assert baselines.static_mix(known, 2.0).scale == baselines.random_mix(known, 2.0)(torch.zeros(1, 4)).scale == known.scale
