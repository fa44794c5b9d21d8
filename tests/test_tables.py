"""The commands that make the paper's tables and figures, on a tiny model, and the tasks that only they use."""

import json
import shutil
import sys

import pytest
import torch

import evaluate
import tables
from baselines import compare
from conftest import ROOT, script, tiny_folder
from data import item_examples, load_articles, load_items, load_text, question
from model import load
from policy import Fixed, Policy, Scorer
from test_routing import random_policy

LAYERS = 6


def lines(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


@pytest.fixture(scope="module")
def data(some_text, tmp_path_factory):
    """A data folder with a little of every task."""
    folder = tmp_path_factory.mktemp("data")
    easy = [{"question": f"What sat on mat {n}?", "choices": ["the cat", f"the dog {n}", "2024"], "answer": n % 3} for n in range(8)]
    mmlu = [{"subject": "hats", "question": f"Who ate {n}?", "choices": ["dog", "cat"], "answer": n % 2} for n in range(8)]
    articles = [{"id": str(n), "article": f"the cat {n} sat on the mat. " * 8, "highlights": f"the cat {n} sat"} for n in range(4)]
    for task, rows in (("arc_easy", easy), ("arc_challenge", easy), ("mmlu", mmlu), ("cnn_dm", articles)):
        (folder / task).mkdir()
        for split in ("train", "test", "dev"):
            (folder / task / f"{split}.jsonl").write_text(lines(rows))
    (folder / "wikitext2").mkdir()
    for split in ("train", "test"):
        shutil.copy(some_text, folder / "wikitext2" / f"{split}.txt")
    return folder


def write_policy(model, path, seed=0, horizon=LAYERS, **settings):
    policy = random_policy(model, seed, horizon)
    policy.prices = [(1.2, 0.1), (4.0, 3.0)]
    policy.settings = {"objective": "fisher", "seed": seed, "horizon": horizon, "data": "text", "damage": [[9.0, 1.0, 0.1, 0.0]] * len(model.blocks)} | settings
    policy.save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model and a folder with a policy for each task but arc_challenge."""
    folder = tmp_path_factory.mktemp("made")
    tiny_folder(folder / "model", "qwen2", layers=LAYERS)
    model = load(str(folder / "model"))[0]
    for task in ("wikitext2", "cnn_dm", "mmlu", "arc_easy"):
        write_policy(model, folder / f"out-{task}" / "policy.safetensors")
    write_policy(model, folder / "other.safetensors", 1, 0)
    write_policy(model, folder / "rl.safetensors", 2, 1, objective="rl", lam=0.0, weights=False)
    return folder


def bench_run(made, data, *args):
    return script("bench.py", *args, "--model", "model", "--data-dir", data, cwd=made)


def result(made, name):
    assert (made / "results" / f"{name}.json").exists()
    return json.loads((made / "results" / f"{name}.json").read_text())


def test_table(made, data):
    """A task of each kind, one of them without a policy; all methods, each once."""
    pytest.importorskip("rouge_score")
    for task in ("wikitext2", "cnn_dm", "mmlu_5shot", "arc_challenge"):
        n = 1 if task in evaluate.TEXTS else 2
        done = bench_run(made, data, "table", "--task", task, "--limit", n, "--rounds", 1, "--policy", "out-{task}/policy.safetensors")
        assert done.returncode == 0, done.stderr
        r = result(made, f"table-{task}")
        assert r["markdown"] in done.stdout and (made / "results" / f"table-{task}.png").exists() and r["n"] == n
        rows = {(row["method"], row["target"]): row for row in r["rows"]}
        assert {m for m, _ in rows} == {"full model", "int8", "int4", *evaluate.SKIPS, "static_mix", "dash"}
        there = [row for row in r["rows"] if "missing" not in row]
        assert all(row["interval"][0] <= row["value"] * 1.0001 and row["value"] <= row["interval"][1] * 1.0001 for row in there)
        assert ("measured" in rows["full model", 1.0]) == (task in evaluate.TEXTS)
        assert rows["full model", 1.0]["speedup"] == 1 and rows["unified_skip", 1.33]["speedup"] == pytest.approx(LAYERS / (LAYERS - 2))
        assert "can't reach" in r["markdown"]  # INT8 and 2.67x
        assert ("the paper's numbers, LLaMA-2-7B" in r["markdown"]) == (task != "arc_easy")
        if task == "arc_challenge":
            assert "missing" in rows["dash", 2.0] and "no policy" in r["markdown"] and "train.py --data arc_challenge" in r["caption"]
        else:
            assert rows["dash", 2.0]["speedup"] == pytest.approx(2.0, rel=0.5 if task == "cnn_dm" else 0.1) and rows["dash", 3.2]["target"] == 3.2


def test_the_papers_numbers_are_not_ours():
    [qwen, llama] = tables.paper_tables("wikitext2_ppl")
    assert "the paper's numbers" in qwen and "53.2" in qwen and "38.8" in llama and tables.paper_tables(None) == []


def test_ablation(made, data):
    done = bench_run(made, data, "ablation", "--limit", 2, "--policy", "out-wikitext2/policy.safetensors", "--compare", "other.safetensors",
                     "rl.safetensors", "out-mmlu/policy.safetensors")
    assert done.returncode == 0, done.stderr
    r = result(made, "ablation")
    assert "| dash, horizon 6, seed 0, out-mmlu/policy.safetensors " in r["markdown"]  # two of one name: the file tells them apart
    for row in ("naive static", "a_i = 1", "norm ratio", "+ INT8", "+ INT4", "least-squares", "copied", "no K/V", "dash, horizon 0, seed 1",
                "rl, horizon 1, seed 2, without lam, without w_i", "naive static skipping"):
        assert row in r["markdown"]
    by_name = {row["name"]: row for row in r["rows"] if row["target"] == 1.33}
    only = by_name["dynamic, states 0 and 4, a_i = 1"]["states"]
    assert only["1"] == only["2"] == 0 < only["0"] and by_name["+ INT8"]["states"]["2"] > 0 == by_name["+ INT8"]["states"]["1"]


def test_figures(made, data):
    done = bench_run(made, data, "figures", "--limit", 3, "--policy", "out-wikitext2/policy.safetensors", "--compare", "other.safetensors")
    assert done.returncode == 0, done.stderr
    for name in ("figure1", "figure2", "figure4"):
        assert result(made, name)["markdown"] in done.stdout and (made / "results" / f"{name}.png").exists()
    r = result(made, "figure1")
    assert len(r["similarity"]) == LAYERS and len(r["pairs"]) == LAYERS + 1 and len(r["accuracy"]) == LAYERS - 1
    assert r["pairs"][2][2] == pytest.approx(1, abs=1e-4) and r["pairs"][1][2] == pytest.approx(r["similarity"][1], abs=1e-3)
    assert "horizon 0, seed 1" in result(made, "figure4")["markdown"]


def test_transfer(made, data):
    done = bench_run(made, data, "transfer", "--limit", 2, "--policy", "out-{task}/policy.safetensors")
    assert done.returncode == 0, done.stderr
    r = result(made, "transfer")
    assert "No policy yet for arc_challenge" in r["caption"] and (made / "results" / "transfer.png").exists()
    assert set(r["found"]) == {"wikitext2", "cnn_dm", "mmlu", "arc_easy"} and set(r["found"]["mmlu"]) == {*r["found"], "arc_challenge"}


@pytest.mark.parametrize("method", ["early_exit", "confident_exit", "skipdecode", "unified_skip", "adaskip", "static_mix"])
def test_eval_of_the_new_methods(made, data, method):
    """Without a policy too: what a method goes by is measured on training text."""
    done = bench_run(made, data, "eval", "--task", "wikitext2", "--method", method, "--speedup", 1.33, "--limit", 2, "--json")
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["speedup_bits"] == pytest.approx(1.33, rel=0.2) and out["value"] > 1 and out["interval"][0] <= out["value"] <= out["interval"][1]


def test_eval_of_summaries_and_kv(made, data):
    pytest.importorskip("rouge_score")
    out = {}
    for kv in ("fill", "none"):
        done = bench_run(made, data, "eval", "--task", "cnn_dm", "--method", "random_skip", "--speedup", 1.33, "--limit", 2, "--json", "--kv", kv)
        assert done.returncode == 0, done.stderr
        out[kv] = json.loads(done.stdout.splitlines()[-1])
    assert out["fill"]["metric"] == "Rouge-L" and 0 <= out["fill"]["value"] <= 1 and out["fill"]["n"] == 2
    assert out["none"]["speedup_bits"] > out["fill"]["speedup_bits"]


# Tasks


def test_five_shots_are_those_of_the_harness(data):
    item = load_items("mmlu_5shot", "test", data)[3]
    head = "The following are multiple choice questions (with answers) about hats.\n\n"
    shots = "".join(f"Who ate {n}?\nA. dog\nB. cat\nAnswer: {'AB'[n % 2]}\n\n" for n in range(5))
    assert question(item) == (f"{head}{shots}Who ate 3?\nA. dog\nB. cat\nAnswer:", [" A", " B"])
    assert question(load_items("mmlu", "test", data)[3])[0] == f"{head}Who ate 3?\nA. dog\nB. cat\nAnswer:"


def test_too_few_shots_are_named(data, tmp_path):
    shutil.copytree(data / "mmlu", tmp_path / "mmlu")
    (tmp_path / "mmlu" / "dev.jsonl").write_text(lines(load_items("mmlu", "test", data)[:4]))
    with pytest.raises(ValueError, match="dev split has 4"):
        load_items("mmlu_5shot", "test", tmp_path)


def test_accuracy_is_the_harness_acc(made, data):
    """The likeliest choice by the sum of its tokens' log-probabilities, not divided by its length."""
    model, tokenizer = load(str(made / "model"))
    items = load_items("arc_easy", "test", data)
    right = []
    for item in items:
        context, choices = question(item)
        start, scores = len(tokenizer.encode(context)), []
        for choice in choices:
            ids = torch.tensor([tokenizer.encode(context + choice)])
            logp = model(ids[:, :-1])[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            scores.append(logp[start - 1 :].sum().item())
        right.append(scores.index(max(scores)) == item["answer"])
    [row] = compare(model, item_examples(tokenizer, items, 512, "cpu"), [Fixed([4] * LAYERS)])
    assert row["each"]["accuracy"] == right


def test_a_choice_without_tokens_is_refused():
    drops_x = type("T", (), {"encode_prompt": staticmethod(lambda text: list(text.replace("x", "").rstrip(" ").encode()))})()
    with pytest.raises(ValueError, match="x.jsonl, line 1: .* adds no token"):
        item_examples(drops_x, [{"question": "a", "choices": ["b", "x"], "answer": 0, "place": "x.jsonl, line 1"}], 100, "cpu")


def test_articles(data, tmp_path):
    articles = load_articles("test", data)
    assert len(articles) == 4 and set(articles[0]) == {"id", "article", "highlights"}
    assert articles[0]["highlights"] in load_text("cnn_dm", "train", data)
    (tmp_path / "cnn_dm").mkdir()
    file = tmp_path / "cnn_dm" / "test.jsonl"
    for bad, word in (("{", "line 2"), ('{"article": "a"}', "highlights"), ('{"article": 3, "highlights": "b"}', "all text"), ("[]", "line 2")):
        file.write_text(json.dumps(articles[0]) + "\n" + bad)
        with pytest.raises(ValueError, match="test.jsonl, line 2") as e:
            load_articles("test", tmp_path)
        assert word in str(e.value)
    file.write_bytes(b'{"article": "\xff", "highlights": "a"}')
    with pytest.raises(ValueError, match="UTF-8"):
        load_articles("test", tmp_path)


def test_two_blocks_are_too_few(tmp_path):
    tiny_folder(tmp_path, layers=2)
    for command in ("bench.py", "hidden", "--results", tmp_path / "r"), ("train.py", "--objective", "gate-mlp", "--skip", 1, "--out", tmp_path / "o"):
        done = script(*command, "--model", tmp_path)
        assert done.returncode == 2 and "2 blocks" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_rouge_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match="pip install rouge-score"):
        evaluate.rouge()


@pytest.mark.parametrize("args, word", [
    (["table"], "--data-dir"), (["figures", "--task", "lm"], "multiple-choice"), (["figures"], "--data-dir"), (["transfer"], "out-{task}"),
    (["ablation", "--policy", "none.safetensors"], "train.py"), (["table", "--task", "lm", "--limit", "0"], "--limit"),
    (["table", "--task", "mc"], "--file"), (["eval", "--kv", "half"], "--kv")])
def test_faults(tiny, tmp_path, args, word):
    done = script("bench.py", *args, "--model", tiny, cwd=tmp_path)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("args, word", [(["--lam", 0], "--objective rl"), (["--no-weights"], "--objective rl"),
                                        (["--objective", "rl", "--beta", "nan"], "--beta"), (["--horizon", -1], "--horizon")])
def test_faults_of_training_switches(some_text, args, word):
    done = script("train.py", "--data", some_text, *args)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_training_switches_reach_the_policy(tiny, some_text, tmp_path):
    done = script("train.py", "--model", tiny, "--data", some_text, "--objective", "rl", "--steps", 2, "--speedup", 1.5, "--lam", 0,
                  "--beta", 0, "--no-weights", "--horizon", 0, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    policy = Policy.load(tmp_path / "o" / "policy.safetensors")
    assert policy.scorer.lam == 0 and policy.horizon == 0 and evaluate.name_of(policy) == "rl, horizon 0, seed 0, without lam, without beta, without w_i"

    policy.scorer = Scorer(4, policy.scorer.first.in_features - 2, width=48)  # another scorer: its file brings the width along
    policy.save(tmp_path / "wide.safetensors")
    done = script("train.py", "--model", tiny, "--data", some_text, "--objective", "rl", "--steps", 1, "--speedup", 1.5, "--horizon", 0,
                  "--start", tmp_path / "wide.safetensors", "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    policy = Policy.load(tmp_path / "o" / "policy.safetensors")
    assert len(policy.scorer.first.bias) == 48 and evaluate.name_of(policy) == f"rl from {tmp_path / 'wide.safetensors'}, horizon 0, seed 0"


def test_the_clock_is_no_cost_in_bits(made, data, tmp_path):
    policy = Policy.load(made / "out-wikitext2/policy.safetensors")
    policy.settings["cost"] = "latency"
    policy.save(tmp_path / "late.safetensors")
    done = bench_run(made, data, "figures", "--limit", 1, "--policy", tmp_path / "late.safetensors")
    assert done.returncode == 2 and "without --cost latency" in done.stderr, done.stderr


def test_paper_numbers_ship_with_the_code():
    assert (ROOT / "paper.json").exists()
