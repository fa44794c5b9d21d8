"""Shared models: the real one, fetched once, and tiny random ones in Hugging Face layout for everything that need not be real."""

import atexit
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny models: two threads on a busy machine wait for each other, a hundred times as long as they work

from model import load  # noqa: E402


@pytest.fixture(scope="session")
def data_dir():
    """The folder of evaluation data, where there is one: set DASH_DATA_DIR to it."""
    folder = os.environ.get("DASH_DATA_DIR")
    if not folder:
        pytest.skip("DASH_DATA_DIR is not set: give a folder with wikitext2/test.txt to run this")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def smollm2():
    model, tokenizer = load("smollm2")
    model.quantize()
    return model, tokenizer


def tiny_tokenizer(folder, vocab_size=300):
    """A byte-level BPE trained on a little text, as tokenizer.json with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False,
                                  special_tokens=[AddedToken("<|end|>", special=True)])
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ate the hat in 2024"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": template}))


def tiny_folder(folder, kind="llama", layers=4, shards=False, stored=torch.float32, **change):
    """A tiny random model made by transformers, stored in a dtype: the reference for parity, and fast enough for command-line tests."""
    import transformers

    config = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.15)
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    config = getattr(transformers, name + "Config")(**(config | change))
    torch.manual_seed(0)
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():  # biases and norms are born 0 and 1: make them matter
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    model.to(stored).save_pretrained(folder, max_shard_size="100kB" if shards else "5GB")
    tiny_tokenizer(Path(folder))
    return model if stored == torch.float32 else type(model).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_folder(folder)
    return folder


@pytest.fixture(scope="session")
def some_text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(f"the cat number {n} sat on the mat and the dog ate hat {n * n}." for n in range(400)))
    return file


CACHE = tempfile.mkdtemp(prefix="dash-test-cache-")  # for what tiny models cache; the real model stays in the user's
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


# Scripts in forks of one process that has imported everything: milliseconds, not seconds, for tables of faults and for kill -9
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "train", "infer", "bench", "matplotlib.figure", "torch._dynamo"])  # the last: what an optimizer imports
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # where there is a GPU, too: a run is the same bit for bit on a CPU alone
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])


def _forked(name, args, env, cwd, output):
    from common import command_line

    for fd, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts into the background with Ctrl-C ignored
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / f"{name}.py"), *args]
    command_line(importlib.import_module(name).main if name in ("train", "infer", "bench") else lambda: exec(name, {}))


def start(name, *args, env=None, cwd="."):
    """Run a script, or some code, in a fork -> (its process, the path that its output begins with: .out and .err)."""
    output = tempfile.mktemp(dir=CACHE)
    env = ON_CPU | {"XDG_CACHE_HOME": CACHE, "HF_HUB_OFFLINE": "1"} | (env or {})
    process = FORKS.Process(target=_forked, args=(name.removesuffix(".py"), [str(a) for a in args], env, str(cwd), output), daemon=True)
    process.start()
    return process, Path(output)


def ended(process, output, timeout=120):
    """Wait for what `start` began -> the finished process as `script` gives it."""
    process.join(timeout)
    assert process.exitcode is not None, "it does not end"
    text = [Path(f"{output}.{kind}").read_text(errors="replace") for kind in ("out", "err")]
    return subprocess.CompletedProcess([], process.exitcode, *text)


def script(name, *args, process=False, timeout=300, **more):
    """Run train.py, infer.py or bench.py with arguments: returncode, stdout, stderr. In a fork, or as a process of its own."""
    if not process:
        return ended(*start(name, *args, **more), timeout)
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, args)], text=True, capture_output=True, timeout=timeout,
                          env=os.environ | ON_CPU | ({"XDG_CACHE_HOME": CACHE} if "--model" in args else {}) | (more.get("env") or {}), cwd=more.get("cwd"))
