"""Training end to end on a tiny model: the files it writes, resume after kill -9 bit for bit, and what calibration promises."""

import json
import os
import random
import signal
import time

import pytest
import torch

import baselines
import fisher
import quant
import reinforce
import train
from baselines import compare
from charts import draw
from conftest import ended, script, start
from common import Checkpoint, read_safetensors, write_safetensors
from data import item_examples, kl, text_examples
from infer import generate
from model import load
from policy import Fixed, Policy, Scorer, bit_costs, mean_cost
from test_routing import random_policy


def arguments(tiny, text, out, objective, *more):
    return ["--model", tiny, "--data", text, "--steps", 12, "--samples", 12, "--speedup", 2.5, "--objective", objective, "--out", out, *more]


@pytest.fixture(scope="module", params=["fisher", "rl"])
def finished(request, tiny, some_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    done = script("train.py", *arguments(tiny, some_text, out, request.param))
    assert done.returncode == 0, done.stderr
    return out, done.stdout, request.param


def test_train_writes_what_it_says(finished, tiny):
    out, said, objective = finished
    assert {f.name for f in out.iterdir()} == {"policy.safetensors", "train.json", "train.jsonl", "train.png", "checkpoint.safetensors"}
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert [line.get("step", line.get("epoch")) for line in lines] == list(range({"rl": 12, "fisher": 8}[objective]))
    for row in ("full model", "DASH at 2.5x", "static", "random states", "all INT8"):
        assert row in said
    policy = Policy.load(out / "policy.safetensors")
    policy.check(load(str(tiny))[0])
    prices = [mu for _, mu in policy.prices]
    assert policy.prices[0][0] == 1.2 and prices == sorted(prices)


@pytest.mark.parametrize("moment", ["begun", "half-way"])
def test_resume_after_kill_is_bit_for_bit(finished, tiny, some_text, tmp_path, moment):
    """Killed when the folder appears, and as work proceeds. Policy and log equal those of the whole run."""
    out, _, objective = finished
    process, _ = start("train.py", *arguments(tiny, some_text, tmp_path / "out", objective))
    checkpoint = tmp_path / "out" / "checkpoint.safetensors"
    reached = lambda: checkpoint.exists() if moment == "half-way" else checkpoint.parent.exists()
    while process.is_alive() and not reached():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (tmp_path / "out" / "policy.safetensors").exists()
    done = script("train.py", *arguments(tiny, some_text, tmp_path / "out", objective, "--resume"))
    assert done.returncode == 0, done.stderr
    for name in ("policy.safetensors", "train.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.parametrize("objective", ["fisher", "rl"])
def test_kill_9_at_random_moments_of_training(tiny, some_text, tmp_path, objective):
    """Killed five times at any moment, calibration and rounding included, and resumed each time: the same policy, bit for bit."""
    text = tmp_path / "text.txt"
    text.write_text(some_text.read_text()[:7000])
    command = ["train.py", *arguments(tiny, text, tmp_path / "out", objective), "--steps", 6, "--samples", 2, "--resume"]
    began = time.time()
    undisturbed = script(*command, "--out", tmp_path / "undisturbed", env={"XDG_CACHE_HOME": str(tmp_path / "other")})
    assert undisturbed.returncode == 0, undisturbed.stderr
    seconds, env, rng = time.time() - began, {"XDG_CACHE_HOME": str(tmp_path / "cache")}, random.Random(objective)
    for _ in range(5):
        process, _ = start(*command, env=env)
        process.join(rng.uniform(0, 0.5 * seconds))
        process.kill()
        process.join()
        for file in (tmp_path / "out").glob("*.safetensors"):  # whole, whenever it is there
            read_safetensors(file)
    done = script(*command, env=env)
    assert done.returncode == 0, done.stderr
    for name in ("policy.safetensors", "train.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
    assert not list((tmp_path / "out").glob("*.part"))


def test_kill_9_at_random_moments_of_bench(tiny, tmp_path):
    """Results are the old ones or the new ones, whole."""
    policy = random_policy(load(str(tiny))[0], 0)
    policy.prices, policy.settings = [(1.2, 0.3), (4.0, 3.0)], {"objective": "fisher", "seed": 0}
    policy.save(tmp_path / "p.safetensors")
    command = ["bench.py", "ablation", "--model", tiny, "--policy", tmp_path / "p.safetensors", "--limit", 1, "--results", tmp_path]
    rng = random.Random(0)
    began = time.time()
    assert script(*command).returncode == 0
    seconds, file = time.time() - began, tmp_path / "ablation.json"
    for _ in range(4):
        process, _ = start(*command)
        process.join(rng.uniform(0, 1.1 * seconds))
        process.kill()
        process.join()
        assert json.loads(file.read_text())["markdown"]


def test_two_runs_into_one_folder_and_ctrl_c(tiny, some_text, tmp_path):
    """The second is told so; a lock does not outlive its run, killed or interrupted; Ctrl-C is one line, and --resume goes on from there."""
    command = ["train.py", *arguments(tiny, some_text, tmp_path / "o", "rl"), "--steps", 5000]
    first, output = start(*command)
    while first.is_alive() and not (tmp_path / "o" / "checkpoint.safetensors").exists():
        time.sleep(0.01)
    second = script(*command)
    assert second.returncode == 2 and "another run" in second.stderr and len(second.stderr.strip().splitlines()) == 1, second.stderr
    os.kill(first.pid, signal.SIGINT)
    done = ended(first, output)
    assert done.returncode == 2 and "--resume" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr
    step = read_safetensors(tmp_path / "o" / "checkpoint.safetensors")[1]["step"]
    third, output = start(*command, "--resume")
    while third.is_alive() and read_safetensors(tmp_path / "o" / "checkpoint.safetensors")[1]["step"] == step:
        time.sleep(0.01)
    assert third.is_alive(), ended(third, output).stderr
    third.kill()


def test_resume_refuses_another_run(finished, tiny, some_text):
    done = script("train.py", *arguments(tiny, some_text, finished[0], finished[2], "--seed", 5, "--resume"))
    assert done.returncode == 2 and "seed" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_resume_says_when_there_is_nothing_to_go_on_with(tiny, some_text, tmp_path):
    done = script("train.py", *arguments(tiny, some_text, tmp_path / "new", "fisher"), "--resume")
    assert done.returncode == 0 and "starts anew" in done.stderr, done.stderr


def test_a_run_begun_anew_does_not_go_on_from_an_older_one(tmp_path):
    Checkpoint(tmp_path / "c", {}, 0, False).write(3, {})
    assert Checkpoint(tmp_path / "c", {}, 0, True).meta["step"] == 3
    for settings, older in (({}, 0), ({"seed": 1}, 3)):  # killed before it wrote its first; the older one can be gone on with if it has other settings
        new = Checkpoint(tmp_path / "c", settings, 0, False)
        assert Checkpoint(tmp_path / "c", settings, 0, True).meta["step"] == 0
        assert Checkpoint(tmp_path / "c", {}, 0, True).meta["step"] == older
    new.write(1, {"a": torch.ones(1)})
    again = Checkpoint(tmp_path / "c", {"seed": 1}, 0, True)
    assert again.meta["step"] == 1 and again.tensors["a"] == 1 and [f.name for f in tmp_path.iterdir()] == ["c"]
    with pytest.raises(ValueError, match="c belongs to a run with other settings"):
        Checkpoint(tmp_path / "c", {}, 0, True)


def test_what_is_no_checkpoint_or_lacks_its_log_is_refused(tmp_path):
    for meta in ({"settings": {}}, {"settings": None, "step": 1}, {"settings": [], "step": 1}):
        write_safetensors(tmp_path / "c", {}, **meta)
        with pytest.raises(ValueError, match="c is no checkpoint; move it away"):
            Checkpoint(tmp_path / "c", {}, 0, True)
    Checkpoint(tmp_path / "c", {}, 0, False).write(2, {})
    log = tmp_path / "train.jsonl"
    for bad in ('{"step": 0}\n', '{"step": 0}\n{"st', '{"step": 1}\n{"step": 2}\n'):
        log.write_text(bad)
        with pytest.raises(ValueError, match="train.jsonl does not go with its checkpoint .* start anew"):
            Checkpoint(tmp_path / "c", {}, 0, True).log(log)
        assert log.read_text() == bad
    log.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    Checkpoint(tmp_path / "c", {}, 0, True).log(log).close()
    assert log.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_log_of_ones_own_is_drawn(finished, tmp_path):
    """Another way to learn logs a loss a step; epochs, CE and rewards are those of ours."""
    result = json.loads((finished[0] / "train.json").read_text())
    for key in ("loss", "reward"):
        result["log"] = [{"step": n, key: 1 / (n + 1)} for n in range(5)]
        (tmp_path / "train.json").write_text(json.dumps(result))
        assert draw(tmp_path / "train.json").stat().st_size > 5000


def test_resume_notices_another_scorer_s_inputs(tiny, some_text, tmp_path):
    args = [*arguments(tiny, some_text, tmp_path / "o", "fisher")]
    assert script("train.py", *args).returncode == 0
    done = script("__import__('policy').Scorer.CLAMP = 1.0; __import__('train').main()", *args, "--resume")
    assert done.returncode == 2 and "'features'" in done.stderr, done.stderr


def test_scales_by_hand(tiny):
    """Eq 7 against sums over recorded inputs and outputs; the first token of every sample is left out."""
    model, _ = load(str(tiny))
    tokens = torch.randint(0, 300, (3, 10))
    found, seen = baselines.profile(model, tokens), {}
    hooks = [b.register_forward_hook(lambda m, a, y, i=i: seen.__setitem__(i, [t.view(3, 10, -1)[:, 1:] for t in (a[0], y)])) for i, b in enumerate(model.blocks)]
    model(tokens)
    [h.remove() for h in hooks]
    for i, (x, y) in seen.items():
        x, y = x.reshape(-1, 64), y.reshape(-1, 64)
        assert found["least_squares"][i].item() == pytest.approx(((x * y).sum() / (x * x).sum()).item(), rel=1e-4)
        assert found["norm_ratio"][i].item() == pytest.approx((y.norm(dim=1) / x.norm(dim=1)).mean().item(), rel=1e-4)
        normed = x / x.square().mean(1, keepdim=True).sqrt()  # what a scorer's features are standardised by
        assert torch.allclose(found["mean"][i].float(), normed.mean(0), atol=1e-4)
        assert torch.allclose(found["std"][i].float(), normed.std(0, correction=0), atol=1e-4)


def test_sensitivity_is_the_damage_of_one_block(tiny):
    model, _ = load(str(tiny))
    model.quantize()
    tokens, scale = torch.randint(0, 300, (2, 12)), [1.0, 0.9, 1.1, 1.0]
    damage = baselines.sensitivities(model, text_examples(tokens), scale)
    states = torch.tensor([4, 4, 0, 4])
    full, routed = model(tokens).log_softmax(-1), model(tokens, Fixed(states, scale)).log_softmax(-1)
    assert damage[2, 0].item() == pytest.approx(kl(full, routed)[:, :-1].sum().item() / 24, rel=1e-4)
    assert (damage[0] == 0).all() and damage[3, 0] == 0 and (damage[:, 3] == 0).all() and (damage[1:, 1] > damage[1:, 2]).all()


@pytest.mark.parametrize("horizon", [4, 1])
def test_prices_meet_their_targets(tiny, some_text, horizon):
    """Of a policy that tracked another price before, too."""
    model, tokenizer = load(str(tiny))
    policy = random_policy(model, 3, spread=0.5)
    policy.horizon, policy.prices = horizon, [(1.2, -1.0), (4.0, 3.0)]
    policy.at(2.0, track=True)
    tokens = torch.tensor(tokenizer.encode(some_text.read_text()))[:1024].view(4, 256)
    train.calibrate_prices(policy, model, text_examples(tokens), [1.3, 2.0, 3.0], [4 / 1.3, 2.0, 4 / 3])
    for speedup in (1.3, 2.0, 3.0):
        model(tokens, policy.at(speedup))
        assert mean_cost(policy.states, bit_costs(model.config)) == pytest.approx(4 / speedup, rel=0.05)


@pytest.mark.parametrize("kls, share", [([[3.0, 4.0], [2.0, 3.0], [2.5, 3.0]], 0.6), ([[3.0, 4.0], [2.9, 4.1], [1.0, 4.1]], 1.0),
                                         ([[0.0, 0.0]] * 3, 1.0), ([[3.0, 4.0], [4.0, 5.0], [5.0, 6.0]], 1.0)])
def test_trust_in_skips_is_what_is_surely_better(tiny, some_text, monkeypatch, kls, share):
    """Every trial costs what INT4 with every tenth block skipped does, and differs in the predicted spread of skips alone."""
    model, tokenizer = load(str(tiny))
    policy = random_policy(model, 3, spread=0.5)
    policy.horizon = 4
    weight = policy.scorer.third.weight.detach().clone()
    examples = text_examples(torch.tensor(tokenizer.encode(some_text.read_text()))[:512].view(2, 256))
    scales = []

    def measured(model, examples, policies):
        for trial in policies[1:]:
            costs = [(model.hidden(e.rows, trial), mean_cost(trial.states, bit_costs(model.config)))[1] for e in examples]
            assert sum(costs) / 2 == pytest.approx((4 + 3 * (0.1 * 0.0625 + 0.9)) / 4, rel=0.05)
            ratio = trial.scorer.third.weight / weight
            assert torch.allclose(ratio[1:3], torch.ones(2, 1))
            scales.append(round(ratio[0].mean().item(), 4))
        return [None] + [{"each": {"kl": kl}} for kl in kls]

    monkeypatch.setattr(train, "compare", measured)
    chosen, found = train.trust_skips(policy, model, examples)
    assert scales == train.TRUST and found == share
    assert torch.allclose(chosen.scorer.third.weight[0], share * weight[0]) and torch.equal(policy.scorer.third.weight, weight)


def test_comparison_numbers(tiny, some_text):
    model, tokenizer = load(str(tiny))
    tokens = torch.tensor(tokenizer.encode(some_text.read_text()))[:96].view(2, 48)
    full, same, int4 = compare(model, text_examples(tokens), [None, Fixed([4] * 4), Fixed([4, 1, 1, 1])])
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


def test_fisher_label_is_the_kl_of_one_choice(tiny):
    """INT8 at one block of one token: the label, over many draws, against the measured KL summed over the whole sequence."""
    model, tokenizer = load(str(tiny))
    generate(model, tokenizer, "the cat", random_policy(model, 0), 2)  # what it caches must not stand in the way of gradients
    window = torch.randint(0, 300, (10,))
    [example] = text_examples(window[None])
    generator = torch.Generator().manual_seed(0)
    labels = sum(fisher.fisher_labels(model, example, [1.0] * 4, generator)[0] for _ in range(400)) / 400
    assert labels.shape == (10, 3, 3) and (labels >= 0).all()
    full = model(window[None]).log_softmax(-1).detach()
    predicted, measured = [], []
    for i in (1, 2):
        for t in (0, 2, 5, 9):
            states = torch.full((4, 1, 10), 4)
            states[i, 0, t] = 2
            measured.append(kl(full, model(window[None], Fixed(states)).log_softmax(-1)).sum().item())
            predicted.append(labels[t, i - 1, 2].item())
    ratios = torch.tensor(predicted) / torch.tensor(measured)
    assert ((ratios > 0.6) & (ratios < 1.6)).all(), ratios
    assert (labels[..., 1].mean() > 10 * labels[..., 2].mean())  # INT4 does far more damage than INT8


def test_labels_have_a_share_of_their_mean_which_for_skips_is_measured(tiny, tmp_path, monkeypatch):
    model, _ = load(str(tiny))
    model.quantize()
    examples, seen = text_examples(torch.randint(0, 300, (2, 40))), []
    monkeypatch.setattr(fisher, "fit", lambda scorer, labels, *rest: (seen.append(labels), (labels.mean(0), []))[1])
    checkpoint = Checkpoint(tmp_path / "c.safetensors", {}, 0, False)
    fisher.learn(Scorer(4, 64), model, examples, examples[:1], [1.0] * 4, 4, checkpoint, tmp_path / "log")
    skip, labels = baselines.sensitivities(model, examples[:1], [1.0] * 4, states=[0])[1:3, 0], seen[0][:, :2]
    mean = labels.mean(0)
    assert torch.allclose(mean[:, 0], skip, rtol=1e-3) and (labels >= 0.099 * mean).all() and (labels.min(0).values < 0.5 * mean).all()


def test_fit_finds_what_the_hidden_state_says():
    """Labels that depend on one channel of the hidden state: predictions follow it, and the mean of each block is kept."""
    from policy import Scorer

    torch.manual_seed(0)
    hidden = torch.randn(8 * 256, 32)
    wanted = torch.exp(1.5 * torch.tanh(hidden[:, :1, None])) * torch.tensor([1.0, 0.1, 0.001]) * torch.tensor([1.0, 3.0, 2.0])[:, None]
    labels = wanted * -torch.rand_like(wanted).log()  # exponential noise around the mean
    scorer = Scorer(4, 32)
    features = scorer.features(hidden.view(8, 256, 32), 0)
    fisher.fit(scorer, labels, {1: features.flatten(0, 1)}, 4, seed=0, epochs=12)
    predicted = scorer.log_damage(features, *scorer.of_blocks(range(1, 4))[:3])[..., 0, :3].flatten(0, 1).exp().detach()
    for k in range(3):
        for b in range(3 - (k == 0)):
            a = torch.stack([predicted[:, b, k].log(), wanted[:, b, k].log()])
            assert torch.corrcoef(a)[0, 1] > 0.8
            assert predicted[:, b, k].mean() == pytest.approx(wanted[:, b, k].mean().item(), rel=0.25)


def test_what_is_learned_of_int4_does_not_depend_on_how_harmful_skips_are():
    from policy import Scorer

    features = torch.randn(512, 18, generator=torch.Generator().manual_seed(0))
    labels = features[:, :3, None].exp() * features[:, 3:6].exp()[:, None]
    found = []
    for harm in (1.0, 1000.0):
        torch.manual_seed(1)
        scorer = Scorer(4, 16)
        fisher.fit(scorer, labels * torch.tensor([harm, 1.0, 1.0]), {1: features}, 4, seed=0)
        found.append(scorer.log_damage(features[None], *scorer.of_blocks(range(1, 4))[:3])[..., 0, 1:3].detach())
    assert torch.allclose(*found, atol=1e-3)


def test_codes_are_cached_and_used_again(tiny, some_text, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = load(str(tiny))
    tokens = torch.tensor(tokenizer.encode(some_text.read_text()))[:512].view(4, 128)
    name = quant.codes_name(tokens)
    quant.cache_codes(model, tokens)
    file = model.codes_file(name)
    stamp = file.stat().st_mtime_ns
    quant.cache_codes(model, tokens)
    assert file.stat().st_mtime_ns == stamp
    some, kept = {}, []
    quant.choose_codes(model, tokens, some, kept.append)
    half = {key: value for key, value in some.items() if key[0] in "01"}  # a run that was killed after two blocks
    quant.choose_codes(model, tokens, half, kept.append)
    assert all(torch.equal(a, b) for key in some for a, b in zip(some[key], half[key]))
    model.quantize(int4=name)
    gptq = compare(model, text_examples(tokens), [None, Fixed([4, 1, 1, 1])])[1]["kl"]
    model.quantize()
    nearest = compare(model, text_examples(tokens), [None, Fixed([4, 1, 1, 1])])[1]["kl"]
    assert gptq < nearest
    tensors, meta = read_safetensors(file)
    for change, word in (({"1.o.scale": tensors["1.o.scale"][:-1]}, "1.o has another shape"), ({"2.down.zero": tensors["2.down.zero"] * float("nan")}, "2.down"),
                         ({"3.qkv.codes": None}, "3.qkv")):
        write_safetensors(file, {k: t for k, t in (tensors | change).items() if t is not None})
        with pytest.raises(ValueError, match=word):
            model.quantize(int4=name)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        model.quantize(int4=name)
    with pytest.raises(FileNotFoundError, match="train.py"):
        model.quantize(int4="gptq-none")


def test_training_of_the_base_resumes_bit_for_bit(tiny, some_text, tmp_path):
    def trained(name, *steps):
        for n, until in enumerate(steps):
            model, tokenizer = load(str(tiny))
            model.quantize()
            examples = text_examples(torch.tensor(tokenizer.encode(some_text.read_text()))[:96].view(3, 32))
            reinforce.train_base(model, random_policy(model, 0), examples, until, Checkpoint(tmp_path / name, {}, 0, resume=n > 0), lr=1e-3)
        return model.state_dict()

    before, whole, resumed = load(str(tiny))[0].state_dict(), trained("whole", 12), trained("parts", 10, 12)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert not torch.equal(before["blocks.1.qkv.weight"], whole["blocks.1.qkv.weight"])


def test_a_gates_slope_of_keys_and_values():
    y, g, c, slope = torch.randn(5, 8), torch.zeros(3, 5, requires_grad=True), torch.randn(5, 3), torch.randn(5, 8)
    found = torch.autograd.grad(fisher.Gates.apply(y, g, c, torch.ones(5, 8), None), g, slope)[0]
    assert torch.allclose(found[0], (slope[:, 5:] * c).sum(1)) and torch.allclose(found[1], slope.sum(1), atol=1e-5) and (found[2] == 0).all()


def test_a_skip_label_knows_its_a_i(tiny):
    model, _ = load(str(tiny))
    model.quantize()
    [example] = text_examples(torch.randint(0, 300, (1, 10)))
    a, b = (fisher.fisher_labels(model, example, scale, torch.Generator().manual_seed(0))[0] for scale in ([1.0] * 4, [1.0, 1.0, 0.5, 1.0]))
    changed = (a != b).any(0)  # a_3 is block 3's alone
    assert changed.tolist() == [[False] * 3, [True, False, False], [False] * 3]


def learned(model, tmp_path, monkeypatch, examples):
    model.quantize()
    seen = []
    monkeypatch.setattr(fisher, "fit", lambda scorer, labels, *rest: (seen.append(labels.clone()), (labels.mean(0), []))[1])
    found = fisher.learn(Scorer(4, 64), model, examples, examples, [1.0] * 4, 4, Checkpoint(tmp_path / "c.safetensors", {}, 0, False), tmp_path / "log")
    return seen[0], *found


def test_mean_labels_by_block_and_position(tiny, tmp_path, monkeypatch):
    labels, mean, table = learned(load(str(tiny))[0], tmp_path, monkeypatch, text_examples(torch.randint(0, 300, (3, 20))))
    assert torch.allclose(mean[1:, :3], labels.mean(0)) and (mean[0] == 0).all() and (mean[:, 3] == 0).all()
    by_token = labels.view(3, 20, 3, 3)
    for bucket, t in ((0, slice(0, 1)), (1, slice(1, 2)), (2, slice(2, 4)), (5, slice(16, 20)), (9, slice(0, 20))):  # a bucket without tokens: all
        assert torch.allclose(table[bucket, 1:, :3], by_token[:, t].mean((0, 1)), rtol=1e-4)


def test_items_count_alike_and_text_does_not(tiny, tmp_path, monkeypatch):
    """Where two answers are close every slope is large, where one is all but certain small: neither outweighs the other."""
    model, tokenizer = load(str(tiny))
    items = [{"question": "What sat on the mat?", "choices": choices, "answer": 0} for choices in (["the cat ate", "the dog sat"], ["cat", "2024 hats"])]
    examples = item_examples(tokenizer, items, 512, "cpu")
    labels = learned(model, tmp_path, monkeypatch, examples)[0]
    skip, shared = labels[:, :2, 0], labels[..., 1:]
    share = lambda drawn: fisher.SHARE * drawn.mean(0) + (1 - fisher.SHARE) * drawn  # a token's own and its part of the mean
    labels = (shared - fisher.SHARE * shared.mean(0)) / (1 - fisher.SHARE)  # without that
    measured = baselines.sensitivities(model, examples, [1.0] * 4, states=[0])[1:3, 0]
    assert torch.allclose(skip.mean(0), measured, rtol=1e-3) and (skip.amax(0) > 2 * skip.amin(0)).all()  # each token's own
    close, far = labels.split([sum(e.lengths) for e in examples])
    raw = [fisher.fisher_labels(model, e, [1.0] * 4, torch.Generator().manual_seed(n))[0][..., 1:] for n, e in enumerate(examples)]
    assert close.mean() == pytest.approx(far.mean().item(), rel=1e-4) and not raw[0].mean() == pytest.approx(raw[1].mean().item(), rel=0.5)
    alike = torch.cat([each / each.mean() for each in raw]) * torch.cat(raw).mean()
    assert labels.mean() == pytest.approx(torch.cat(raw).mean().item(), rel=1e-4) and torch.allclose(shared, share(alike), rtol=1e-5, atol=0)
    texts = text_examples(torch.randint(0, 300, (2, 20)))
    drawn = torch.cat([fisher.fisher_labels(model, e, [1.0] * 4, torch.Generator().manual_seed(n))[0][..., 1:] for n, e in enumerate(texts)])
    assert torch.allclose(learned(model, tmp_path, monkeypatch, texts)[0][..., 1:], share(drawn), rtol=1e-5, atol=0)


def test_each_block_learns_its_own_labels():
    torch.manual_seed(0)
    means = torch.tensor([[1.0, 0.1, 0.01], [0.3, 3.0, 0.03], [0.2, 0.5, 5.0]])
    features, labels = Scorer(4, 32).features(torch.randn(1, 1024, 32), 0), means * -torch.rand(1024, 3, 3).log()
    scorer = Scorer(4, 32)
    fisher.fit(scorer, labels, {i: features[0] for i in range(3)}, 1, seed=0)
    found = scorer.log_damage(features, *scorer.of_blocks(range(1, 4))[:3])[0, :, :, 0, :3].exp().mean(0).detach()
    assert torch.allclose((found / means).flatten()[:-3], torch.ones(6), atol=0.25) and torch.allclose(found[2, 1:] / means[2, 1:], torch.ones(2), atol=0.25)
