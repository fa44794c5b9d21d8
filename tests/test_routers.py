"""Trained gates: whole pass = decoding, each gate against plain arithmetic, the budget, costs, files, resume after kill -9."""

import io
import json
import time

import pytest
import torch
import torch.nn.functional as F

import routers
from common import Checkpoint, read_safetensors
from conftest import script, start, tiny_folder
from baselines import Known, observe
from data import text_examples
from infer import generate
from model import KVCache, load
from policy import Policy, bit_costs, mean_cost


def router_for(model, kind, seed=0, std=0.3):
    """Gates of random weights, so that all of them sometimes run and sometimes skip."""
    torch.manual_seed(seed)
    c = model.config
    policy = routers.Router(kind, c.n_layer, c.n_embd, c.n_hidden, model.fingerprint(), {"skip": 1, "steps": 1, "data": "a text"})
    for p in policy.gates.parameters():
        torch.nn.init.normal_(p, std=std)
    return policy


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    folder = tmp_path_factory.mktemp("six")
    tiny_folder(folder, layers=6)
    return load(str(folder))


@pytest.mark.parametrize("kind", routers.KINDS)
@torch.no_grad()
def test_parallel_pass_equals_decoding(six, kind):
    model, _ = six
    for seed in range(3):
        policy, tokens = router_for(model, kind, seed), torch.randint(0, 300, (2, 24))
        whole, states, cache = model(tokens, policy), policy.states, KVCache(model, 2, 24)
        routed = states.view(6, policy.rows, 2, 24)[:, 0]
        outside = [i for i in range(6) if i not in policy.routed]
        assert (routed[outside] == 4).all() and (routed == 0).any() and (routed[policy.routed[0] :] == 4).any()
        cached, cached_states = [], []
        for part in tokens.split([5, *[1] * 12, 7], dim=1):
            cached.append(model(part, policy, cache))
            cached_states.append(policy.states)
        assert torch.equal(states, torch.cat(cached_states, 2))
        assert (whole - torch.cat(cached, 1)).abs().max() < 1e-4 * whole.abs().max()


@torch.no_grad()
def test_flexidepth_is_its_formula(six):
    """One block by plain arithmetic: attention and g MLP where g > 1/2; (1 - g) adapter where not."""
    model, _ = six
    policy, tokens, seen = router_for(model, "flexidepth"), torch.randint(0, 300, (1, 16)), {}
    policy.gates[0].router[-1].bias.zero_()
    decide = policy.decide
    policy.decide = lambda i, x, start: (seen.__setitem__(i, x[0].clone()), decide(i, x, start))
    model(tokens, policy)
    block, gate, x = model.blocks[3], policy.gates[0], seen[6]
    norm = lambda t: t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    down, _, inner, up, last = gate.router
    z = torch.tanh(norm(x) @ down.weight.T)
    z = z / (z.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * inner.weight
    g = torch.sigmoid(z @ up.weight.T @ last.weight.T + last.bias)
    run = g[:, 0] > 0.5
    assert run.any() and not run.all() and torch.equal(policy.states[6, 0] == 4, run) and torch.equal(policy.states[7], policy.states[6])
    assert torch.equal(seen[7][~run], x[~run])
    mlp, (gated, wide) = block.mlp(4, seen[7]) - seen[7], (norm(x) @ gate.adapter[0].weight.T).chunk(2, -1)
    adapter = (F.silu(gated) * wide) @ gate.adapter[1].weight.T
    expected = torch.where(run[:, None], seen[7] + g * mlp, x + (1 - g) * adapter)
    assert torch.allclose(seen[8], expected, atol=1e-5 * expected.abs().max())


def test_a_gate_in_training_has_the_value_drawn_and_the_slope_of_its_block(six):
    """d loss / d m = <d loss / d y, block(x) - x>, and the pass with both paths has the value of the chosen one."""
    model, _ = six
    policy, tokens = router_for(model, "gate-hidden"), torch.randint(0, 300, (1, 12))
    policy.generator = torch.Generator().manual_seed(0)
    policy.gates.requires_grad_()
    hidden = model.hidden(tokens, policy)
    on = torch.stack(policy.on)[:, 0].detach()
    assert set(on.unique().tolist()) == {0.0, 1.0} and (policy.states == 4).all()
    slope = torch.autograd.grad(hidden.sum(), policy.on[-1], retain_graph=True)[0]  # of the last gate, block 5
    x, rope = model.embed(tokens)[0], model.rope(0, 12)
    with torch.no_grad():
        for i, block in enumerate(model.blocks[:5]):
            y = block(x, 1, [(4, None)], 1.0, rope)
            before, x = x, y if i not in policy.routed else x + on[i - 1, :, None] * (y - x)
    x = x.requires_grad_()
    out = model.norm(model.blocks[5](x, 1, [(4, None)], 1.0, rope))
    assert torch.allclose(out, hidden[0], atol=1e-4)
    expected = (torch.autograd.grad(out.sum(), x)[0] * (y - before)).sum(-1)
    assert torch.allclose(slope[0], expected, rtol=1e-3, atol=1e-4)


def test_slopes_of_gates():
    """ReinMax finds what opening a gate is worth where the loss is a square, straight through does not."""
    torch.manual_seed(0)
    harm, logits = torch.tensor([[1.0], [3.0]]), torch.tensor([[-0.5], [0.5]]).expand(2, 200000)  # L = harm (1 - m)^2
    p = (logits / routers.NOISE).sigmoid()
    m = (torch.rand(p.shape) < p).float()
    found, straight = routers.reinmax(-2 * harm * (1 - m), logits, m).mean(1), routers.straight_through(-2 * harm * (1 - m), logits).mean(1)
    worth = -harm * (p * (1 - p))  # dL/dp times dp / d(logit / NOISE)
    worth = worth - p * (1 - p) * worth.sum() / (p * (1 - p)).sum()
    assert torch.allclose(found, worth.mean(1), rtol=0.03) and found[1] < 0 < found[0]
    assert straight[0] < straight[1]  # would rather open the one that does less harm


@pytest.mark.parametrize("kind", routers.KINDS)
def test_training_closes_gates_and_the_threshold_meets_the_budget(six, kind, tmp_path):
    """From the static choice on about as many are closed as asked; then the count on training text, by the hard decision, is that."""
    model, tokenizer = six
    c = model.config
    torch.manual_seed(0)
    policy, log = routers.Router(kind, c.n_layer, c.n_embd, c.n_hidden, model.fingerprint()), io.StringIO()
    examples = text_examples(torch.randint(0, 300, (8, 24)))
    known = Known(6, bit_costs(c), config=c, samples=torch.cat([e.rows for e in examples]))
    observe(known, model)
    routers.begin(policy, known, 1)
    closed = [block for block, gate in zip(policy.routed, policy.gates) if gate.router[-1].bias < 0]
    alike = known.sublayers[::2] if kind == "mindskip" else known.similarity
    assert closed == [max(policy.routed, key=lambda i: alike.mean(1)[i])]
    routers.train_gates(policy, model, examples, 1, 30, Checkpoint(tmp_path / "c", {}, 0, False), log)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert 0.5 < sum(x["skipped"] for x in lines[-20:]) / 20 < 1.6, lines
    assert not any(p.requires_grad for p in policy.gates.parameters())
    routers.calibrate(policy, model, examples, 1)
    skipped = []
    for example in examples:
        model.hidden(example.rows, policy)
        skipped.append((policy.states[policy.rows - 1 if kind == "flexidepth" else 0 :: policy.rows] == 0).sum(0)[policy.free(example)].float().mean())
    assert sum(skipped) / len(skipped) == pytest.approx(1.0, abs=0.1)
    if kind == "gate-fixed":  # blind to the token, but for the first
        assert (policy.states[:, :, 1:] == policy.states[:, :, 1:2]).all()
    assert kind in ("flexidepth", "mindskip") or (policy.states[:, :, 0] == 4).all()


def test_costs_count_routers_and_adapters(tiny):
    model, _ = load(str(tiny))
    c = model.config
    block = sum(linear.weight.numel() for linear in model.blocks[0].linears().values())
    policy = router_for(model, "flexidepth")
    router, adapter = (sum(p.numel() for p in m.parameters()) for m in (policy.gates[0].router, policy.gates[0].adapter))
    states = torch.full((8, 10), 4)
    states[4:6, :3] = 0  # block 3 skipped by 3 of 10 tokens
    kv = 2 * c.n_kv_head * c.head_dim * c.n_embd  # in INT4: one unit a weight
    spent = 40 * 4 * block - 3 * 4 * block + 3 * (kv + 4 * adapter) + 10 * 2 * 4 * router
    assert mean_cost(states, bit_costs(c, policy)) == pytest.approx(spent / (40 * block), rel=1e-5)
    assert torch.equal(bit_costs(c, router_for(model, "gate-fixed")), bit_costs(c))
    gates = bit_costs(c, router_for(model, "gate-hidden")) - bit_costs(c)
    assert torch.allclose(gates, torch.full((4,), 2 * 65 * 4 / block / 4), atol=1e-6)


@torch.no_grad()
def test_files(tiny, tmp_path):
    model, tokenizer = load(str(tiny))
    tokens = torch.randint(0, 300, (1, 20))
    for kind in routers.KINDS:
        policy = router_for(model, kind)
        policy.threshold = 0.123
        policy.save(tmp_path / "r.safetensors")
        again = routers.load(tmp_path / "r.safetensors")
        again.check(model)
        assert torch.equal(model(tokens, policy), model(tokens, again)) and torch.equal(policy.states, again.states)
        assert generate(model, tokenizer, "the cat", again, 4)["states"].shape[0] == 4 * policy.rows
    again.fingerprint = "another"
    with pytest.raises(ValueError, match="trained for"):
        again.check(model)
    data = (tmp_path / "r.safetensors").read_bytes()
    changed = [data.replace(*change) for change in ((b"gate-mlp", b"gate-xyz"), (b"0.123", b"1e999"), (b"[4, 64", b"[5, 64"))]
    for damage in (*changed, data[:-100], b"x"):
        (tmp_path / "bad.safetensors").write_bytes(damage)
        with pytest.raises(ValueError, match="bad.safetensors"):
            routers.load(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="not a policy"):
        Policy.load(tmp_path / "r.safetensors")
    policy.gates[0].router[-1].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="r.safetensors is left as it was: .* not finite"):
        policy.save(tmp_path / "r.safetensors")
    assert (tmp_path / "r.safetensors").read_bytes() == data


@pytest.mark.parametrize("kind", ["flexidepth", "gate-hidden"])
def test_command_and_resume_after_kill(tiny, some_text, tmp_path, kind):
    """The command writes what it says; killed after a checkpoint and resumed, gates and log are the same, bit for bit."""
    text = tmp_path / "text.txt"
    text.write_bytes(some_text.read_bytes())
    command = ["train.py", "--model", tiny, "--data", text, "--objective", kind, "--skip", 1, "--steps", 16]
    done = script(*command, "--out", tmp_path / "a")
    assert done.returncode == 0 and kind in done.stdout and "most similar" in done.stdout, done.stderr
    wrote = {"router.safetensors", "train.json", "train.jsonl", "train.png", "checkpoint.safetensors"}
    assert {f.name for f in (tmp_path / "a").iterdir()} == wrote
    routers.load(tmp_path / "a" / "router.safetensors").check(load(str(tiny))[0])
    process, _ = start(*command, "--out", tmp_path / "b")
    while process.is_alive() and not (tmp_path / "b" / "checkpoint.safetensors").exists():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert read_safetensors(tmp_path / "b" / "checkpoint.safetensors")[1]["step"] == 10
    assert not (tmp_path / "b" / "router.safetensors").exists()
    done = script(*command, "--out", tmp_path / "b", "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("router.safetensors", "train.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    text.write_text("the cat sat on the mat and ate the hat.\n" * 400)  # under the same name
    done = script(*command, "--out", tmp_path / "b", "--resume")
    assert done.returncode == 2 and "'text'" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("options, said", [
    (["--objective", "flexidepth"], "--skip"), (["--objective", "gate-mlp", "--skip", 2], "1 to 1"),
    (["--skip", 2], "--skip is for"),
    (["--objective", "mindskip", "--skip", 1, "--train-model"], "--train-model")])
def test_bad_options_are_one_line(tiny, some_text, tmp_path, options, said):
    done = script("train.py", "--model", tiny, "--data", some_text, "--out", tmp_path, *options)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
