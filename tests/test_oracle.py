"""Ways to skip and the oracle: choices on scores made by hand, nested paths, luck, and the commands on tiny models."""

import json

import pytest
import torch

import baselines
import oracle
from conftest import script
from data import load_articles, load_examples, text_examples
from model import load
from policy import Fixed, bit_costs
from test_tables import data, write_policy  # noqa: F401 - data is a fixture

LAYERS = 4


@pytest.fixture(scope="module")
def model(tiny):
    model = load(str(tiny))[0]
    model.quantize()
    return model


@pytest.fixture(scope="module")
def made(tiny, model, tmp_path_factory):
    """A folder to run in, with a policy for each task."""
    folder = tmp_path_factory.mktemp("made")
    for task in ("wikitext2", "arc_easy", "cnn_dm"):
        write_policy(model, folder / f"out-{task}" / "policy.safetensors")
    return folder


@pytest.fixture
def known(model):
    samples = torch.randint(10, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    return baselines.Known(len(model.blocks), bit_costs(model.config), config=model.config, samples=samples)


def test_the_cheapest_that_scores_as_well():
    """Columns: the last is better; only one in the middle is; none is; a tie with the last; better again after worse; not a number."""
    score = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 0.0, 2.0, 0.0], [2.0, 0.0, 0.0, 1.0, 2.0, float("nan")]])
    assert oracle.cheapest(score).tolist() == [2, 1, 0, 2, 2, 0]
    assert oracle.cheapest(score[:, :4].view(3, 2, 2)).tolist() == [[2, 1], [0, 2]]
    assert oracle.cheapest(score[:1]).tolist() == [0] * 6


def test_luck_takes_much():
    """Scores alike in distribution: one of k paths is ahead of all others with odds of 1 in k, so the last is taken half the time."""
    pick = oracle.cheapest(torch.rand(8, 20000, generator=torch.Generator().manual_seed(0)))
    assert [(pick == k).float().mean().item() for k in (7, 6, 0)] == pytest.approx([1 / 2, 1 / 6, 1 / 8], abs=0.01)


def test_what_is_saved_at_no_loss():
    cost, change = torch.tensor([[0.5, 0.5], [0.2, 0.3], [0.1, 0.1]]), torch.tensor([[0.1, 0.1], [0.5, -0.5], [0.1, -0.2]])
    assert oracle.saved(cost, change) == pytest.approx(0.75) and oracle.saved(cost[2:], change[2:]) == 0.0


@torch.no_grad()
def test_paths_are_nested(model, known):
    plans = oracle.family(known, model, 1)
    assert [int((p > 0).sum()) for p in plans] == list(range(known.L, 1, -1))
    for more, fewer in zip(plans, plans[1:]):
        assert not (fewer[more == 0]).any() and set(fewer.tolist()) == {0, 4}
    assert plans[-1][0] == plans[-1][-1] == 4
    first = [baselines.without(known, [i]).given for i in range(1, known.L - 1)]
    measure = baselines.measured_kl(model, text_examples(known.samples), kv="none")
    assert torch.equal(plans[1], min(first, key=measure)) and measure(plans[0]) == pytest.approx(0, abs=1e-5)
    for step in (2, 3):  # down to the first and the last block, whatever the step
        assert [p.tolist() for p in oracle.family(known, model, step)] == [p.tolist() for p in [*plans[:-1:step], plans[-1]]]


@torch.no_grad()
def test_distances(model, known):
    examples = text_examples(known.samples)
    none, one = (oracle.skipping(known, n) for n in (0, 1))
    found = oracle.distances(model, examples, [*none, *one])
    assert found.shape == (6, 2) and found[:3].abs().max() < 1e-5 < found[3:5].min()
    model.hidden(known.samples, one[1])
    assert (one[1].states[-1] == 0).all() and (one[1].states[:-1] == 4).all()
    model.hidden(known.samples, one[0])
    assert int((one[0].states == 0).sum()) == known.samples.numel()
    many = torch.zeros(50, 100)
    skipped = (one[2](many).given == 0).float().mean().item()
    assert skipped == pytest.approx(1 / known.L, rel=0.05)


def test_pieces(model):
    sizes = lambda T: [tuple(e.rows.shape) for e in oracle.pieces(text_examples(torch.arange(2 * T).view(2, T)))]
    assert sizes(300) == [(1, 128)] * 4 and sizes(40) == [(1, 40)] * 2
    assert oracle.pieces(text_examples(torch.arange(300)[None]))[1].rows[0, 0] == 128


@torch.no_grad()
@pytest.mark.parametrize("task", ["text", "items"])
def test_luck_of_full_models_and_of_others(tiny, data, task):  # noqa: F811
    """Paths that are all the full model tie, so the last is taken for nothing. In the mean no other path predicts what it draws better."""
    model, tokenizer = load(str(tiny))
    generator = lambda: torch.Generator().manual_seed(0)
    name, size = ("wikitext2", 64) if task == "text" else ("arc_easy", 512)
    [example] = load_examples(name, "test", tokenizer, 1, size, data)
    full, last = Fixed([4] * LAYERS, kv="none"), Fixed([4] + [0] * (LAYERS - 2) + [4], kv="none")
    score, halves, lucky, cost = oracle.likelihoods(model, example, [full, full, last], 3, generator())
    assert score[0] == score[1] != score[2] and torch.equal(lucky[0], lucky[1]) and (oracle.cheapest(lucky[:2]) == 1).all()
    assert lucky[2].mean() < lucky[0].mean() + (0 if task == "text" else 0.05)
    assert cost.tolist() == pytest.approx([1, 1, 2 / LAYERS])
    assert task == "items" or halves[0].mean().item() == pytest.approx(score[0].item(), rel=0.05)
    assert torch.equal(oracle.likelihoods(model, example, [full, last], 1, generator())[2], lucky[:1])


def test_luck_of_summaries(tiny, data):  # noqa: F811
    """The summaries of P paths by luck are those that the full model was drawn to make, each once."""
    pytest.importorskip("rouge_score")
    model, tokenizer = load(str(tiny))
    full, last = Fixed([4] * LAYERS, kv="none"), Fixed([4] + [0] * (LAYERS - 2) + [4], kv="none")
    [article] = load_articles("test", data)[:1]
    score, halves, lucky, cost = oracle.rouges(model, tokenizer, article, [full, last, last], 3, torch.Generator().manual_seed(0))
    assert torch.equal(score, halves[:, 0]) and cost.tolist() == pytest.approx([1, 2 / LAYERS, 2 / LAYERS])
    drawn = lucky.sort(0).values
    assert (drawn == drawn[:, :1]).all() and all(h in drawn[:, 0] for h in halves[0])


# Commands


def run(made, tiny, *args):
    done = script("bench.py", *args, "--model", tiny, cwd=made)
    assert done.returncode == 0, done.stderr
    return done.stdout


def result(made, name):
    assert (made / "results" / f"{name}.png").stat().st_size > 10000
    return json.loads((made / "results" / f"{name}.json").read_text())


def test_hidden(made, tiny, data):  # noqa: F811
    pytest.importorskip("rouge_score")
    out = run(made, tiny, "hidden", "--data-dir", data, "--limit", 1)
    r = result(made, "hidden")
    assert r["markdown"] in out and "that skipping beats exiting" in out and "Rouge-L of its summaries" in out
    assert r["kept"][0] == 100 and set(r["distance"]) == set(oracle.WAYS)
    first = torch.tensor([r["distance"][way][0] for way in oracle.WAYS])
    assert first.abs().max() < 1e-5 and min(r["distance"]["exit early"][-1]) > 1e-3
    assert [row["speedup"] for row in r["summaries"]] == pytest.approx([1, 4 / 3, 4 / 3, 1.25], abs=0.1)  # one of four blocks
    assert "No summaries" in run(made, tiny, "hidden", "--data-dir", data, "--task", "arc_easy", "--limit", 2)


def test_oracle(made, tiny, data):  # noqa: F811
    pytest.importorskip("rouge_score")
    out = run(made, tiny, "oracle", "--data-dir", data, "--limit", 1, "--policy", "out-{task}/policy.safetensors")
    for task in ("wikitext2", "arc_easy", "cnn_dm"):
        r = result(made, f"oracle-{task}")
        assert r["markdown"] in out and all(word in r["markdown"] for word in ("theirs: 23.3%", "luck alone", "policy, 1.33x asked"))
        assert ("scored on the other" in r["markdown"]) == (task != "arc_easy")
        share = [sum(s > 0 for s in path) / LAYERS for path in r["paths"]]
        assert share == sorted(share, reverse=True) and share[-1] == pytest.approx(2 / LAYERS)
        assert r["blocks"] == pytest.approx(sum(share[k] for k in r["picked"]) / len(r["picked"])) and 2 / LAYERS <= r["luck"] <= 1
        assert all(r["score"][k][n] >= r["score"][0][n] for n, k in enumerate(r["picked"]))
        assert set(r["saved"]) == {"all INT8", "policy", "policy, states 0 and 4"} and all(0 <= v < 1 for v in r["saved"].values())


def test_oracle_without_a_policy(made, tiny):
    """Nor data: on held-out pydocs."""
    assert "no policy" in run(made, tiny, "oracle", "--limit", 1) and result(made, "oracle-lm")["saved"]["policy"] is None


@pytest.mark.parametrize("args, word", [
    (["oracle", "--data-dir", "."], "wikitext2"), (["oracle", "--task", "arc_easy", "--data-dir", "nothing"], "nothing"),
    (["hidden", "--data-dir", "nothing"], "nothing"), (["oracle", "--limit", "0"], "--limit"), (["hidden", "--limit", "0"], "--limit"),
    (["oracle", "--task", "mc"], "--file")])
def test_faults(tiny, tmp_path, args, word):
    done = script("bench.py", *args, "--model", tiny, cwd=tmp_path)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
