"""Trained gates and merged blocks beside DASH: LaCo by plain arithmetic, requests, and every command end to end on tiny models."""

import copy
import json

import pytest
import torch

import field
import routers
from conftest import script, tiny_folder
from model import load


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model of 8 blocks, random gates for it, and items and articles in the layout of --data-dir."""
    folder = tmp_path_factory.mktemp("field")
    tiny_folder(folder / "model", layers=8)
    model, _ = load(str(folder / "model"))
    c, files = model.config, []
    for kind in routers.KINDS:
        for skip in (2, 4):
            torch.manual_seed(skip)
            settings = {"skip": skip, "steps": 1, "data": "wikitext2", "objective": kind, "seed": 0}
            router = routers.Router(kind, c.n_layer, c.n_embd, c.n_hidden, model.fingerprint(), settings)
            for p in router.gates.parameters():
                torch.nn.init.normal_(p, std=0.3)
            router.save(folder / f"{kind}-{skip}.safetensors")
            files.append(folder / f"{kind}-{skip}.safetensors")
    text = "\n".join(f"the cat number {n} sat on the mat and the dog ate hat {n * n}. " * 12 for n in range(60))
    for task in ("wikitext2", "arc_easy", "cnn_dm"):
        (folder / task).mkdir()
    items = [{"question": f"What is {n}?", "choices": ["the cat", "a dog"], "answer": n % 2} for n in range(8)]
    articles = [{"id": str(n), "article": text[:600], "highlights": "the cat sat on the mat"} for n in range(3)]
    for split in ("train", "test"):
        (folder / "wikitext2" / f"{split}.txt").write_text(text)
        (folder / "arc_easy" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, items)))
        (folder / "cnn_dm" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, articles)))
    return folder, model, files


@torch.no_grad()
def test_merging_adds_differences(made):
    """theta + (theta_1 - theta) + (theta_2 - theta): three equal blocks merge into themselves; the model keeps its own weights."""
    _, model, _ = made
    before = [p.clone() for p in model.parameters()]
    fewer = field.merge(list(model.blocks), 2, 2)
    assert len(fewer) == 6 and fewer[1] is model.blocks[1] and fewer[3] is model.blocks[5]
    w = [b.o.weight for b in model.blocks]
    assert torch.allclose(fewer[2].o.weight, w[3] + w[4] - w[2], atol=1e-6)
    assert all(map(torch.equal, before, model.parameters()))
    same = field.merge([copy.deepcopy(model.blocks[2]) for _ in range(3)], 0, 2)
    assert len(same) == 1 and torch.allclose(same[0].qkv.weight, model.blocks[2].qkv.weight, atol=1e-6)


@torch.no_grad()
def test_laco_merges_what_does_nothing_first(made):
    """Blocks whose outputs are zero can be merged into one another without a change, so these go."""
    _, model, _ = made
    idle = [copy.deepcopy(b) for b in model.blocks]
    for block in idle[2:6]:
        for name, p in block.named_parameters():
            p.zero_()
    other, tokens = field.with_blocks(model, idle), torch.randint(0, 300, (1, 16))
    short = field.merged(other, field.laco(other, tokens, 3))
    assert len(short.blocks) == short.config.n_layer == 5 and len(other.blocks) == 8
    assert torch.allclose(short(tokens), other(tokens), atol=1e-5)


def test_requests_are_as_theirs():
    asked = field.requests(["a text"] * 5, 0)
    assert list(asked) == ["copy", "summarise", "continue", "repeat", "add", "multiply"] and all(len(v) == 5 for v in asked.values())
    for kind in ("repeat", "add", "multiply"):
        for text in asked[kind]:
            numbers = [int(w) for w in text.split(": ")[1].split()]
            assert 5 <= len(numbers) <= 10 and all(10 <= n <= 99 for n in numbers)
    assert asked == field.requests(["a text"] * 5, 0) != field.requests(["a text"] * 5, 1)


@pytest.fixture(scope="module")
def policy(made):
    folder, _, _ = made
    done = script("train.py", "--model", folder / "model", "--data", "wikitext2", "--data-dir", folder, "--samples", 1, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return folder / "out" / "policy.safetensors"


@pytest.mark.parametrize("command, with_policy", [("controllers", True), ("kv", False), ("depth", True), ("retain", True)])
def test_commands(made, policy, tmp_path, command, with_policy):
    folder, _, files = made
    more = ["--limit", 1 if command != "retain" else 2]
    if command != "depth":  # that one on pydocs
        more += ["--data-dir", folder]
    done = script("bench.py", command, "--model", folder / "model", "--routers", *files, "--results", tmp_path, *more,
                  "--policy", policy if with_policy else folder / "none")
    assert done.returncode == 0, done.stderr
    assert {f.name for f in tmp_path.iterdir()} == {f"{command}.json", f"{command}.png"}
    r = json.loads((tmp_path / f"{command}.json").read_text())
    assert r["markdown"] in done.stdout and ("dash" in r["markdown"].lower()) == with_policy
    if command == "controllers":
        fixed = [x for x in r["rows"] if x["method"] == "gate-fixed"]
        assert {x["asked"] for x in r["rows"]} == {2, 4} and len(fixed) == 2
        assert all(abs(x["skipped"] - x["asked"]) < 0.6 for x in r["rows"] if x["method"] in ("gate-hidden", "gate-mlp"))
        assert all(abs(x["skipped"] - x["asked"]) < 1e-6 for x in r["rows"] if x["method"] == "most similar blocks")
    if command == "kv":
        assert [x["kv"] for x in r["rows"]] == ["fill", "none"] * (len(r["rows"]) // 2)
    if command == "depth":
        assert all(4 <= x["blocks"][0] <= 8 and x["blocks"][1] >= 0 and 0 < x["cost"][0] <= 4.2 for x in r["rows"])
    if command == "retain":
        got = {(x["method"], x["skipped"], x["task"]) for x in r["rows"]}
        tasks = {"wikitext2", "arc_easy", "cnn_dm"}
        methods = {"LayerSkip, early exit", "ShortGPT", "LaCo", *(["DASH"] if with_policy else [])}
        assert {(m, n, t) for m in methods for n in (2, 4) for t in tasks} <= got
        assert {("FlexiDepth", 4, "arc_easy"), ("MindSkip", 4, "cnn_dm")} <= got
        whole = {x["task"]: x for x in r["rows"] if x["method"] == "full model"}
        for x in (x for x in r["rows"] if "retained" in x or whole[x["task"]]["value"]):
            a, b = x["value"], whole[x["task"]]["value"]
            assert x["retained"] == pytest.approx(b / a if x["task"] == "wikitext2" else a / b)


@pytest.mark.parametrize("options, said", [([], "--routers"), (["--routers", "nothing.safetensors"], "nothing.safetensors")])
@pytest.mark.parametrize("command", ["controllers", "kv", "depth", "retain"])
def test_no_routers_is_one_line(made, tmp_path, command, options, said):
    folder, _, _ = made
    done = script("bench.py", command, "--model", folder / "model", "--data-dir", folder, "--results", tmp_path, *options, "--limit", 1)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()[-1:]) == 1, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
