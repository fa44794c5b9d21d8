"""The network against transformers on the same weights: logits, greedy tokens, cached against uncached."""

import json

import pytest
import torch
import transformers

from conftest import tiny_folder
from infer import generate
from model import KVCache, fetch_smollm2, load

PROMPT = "Licences of free software differ in what they ask of those who"


@pytest.fixture(scope="module")
def reference():
    path = fetch_smollm2()
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@torch.no_grad()
def test_smollm2_logits(smollm2, reference):
    model, tokenizer = smollm2
    from data import pydocs
    ids = torch.tensor([tokenizer.encode(pydocs("test")[:4000])[:512]])
    assert ids.shape[1] == 512
    assert (model(ids) - reference(ids).logits).abs().max() < 1e-3


@torch.no_grad()
def test_smollm2_greedy(smollm2, reference):
    model, tokenizer = smollm2
    out = generate(model, tokenizer, PROMPT, max_new_tokens=64)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
    assert out["tokens"] == theirs[0, ids.shape[1]:].tolist()


@torch.no_grad()
def test_smollm2_perplexity(smollm2, data_dir):
    model, tokenizer = smollm2
    ids = torch.tensor(tokenizer.encode((data_dir / "wikitext2" / "test.txt").read_text(encoding="utf-8")))
    nats = [torch.nn.functional.cross_entropy(model(w[None])[0, :-1], w[1:]) for w in ids[:4096].view(4, 1024)]
    assert abs(torch.stack(nats).mean().exp() - 23.09) < 0.05


@pytest.mark.parametrize("kind, change", [
    ("llama", {}), ("llama", {"tie_word_embeddings": False}), ("llama", {"num_key_value_heads": 4}),
    ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}),
    ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 331, "intermediate_size": 101}),
    ("qwen2", {}), ("qwen3", {"head_dim": 32}), ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
])
@pytest.mark.parametrize("shards", [False, True])
@torch.no_grad()
def test_tiny_parity(tmp_path, kind, change, shards):
    theirs = tiny_folder(tmp_path, kind, shards=shards, **change)
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    model, tokenizer = load(str(tmp_path))
    ids = torch.randint(0, 300, (2, 40))
    ours = model(ids)
    assert (ours - theirs(ids).logits).abs().max() < 1e-4
    cache = KVCache(model, 2, 40)
    pieces = [model(part, cache=cache) for part in ids.split([7, 1, 1, 20, 11], dim=1)]
    assert (torch.cat(pieces, 1) - ours).abs().max() < 1e-4
    text = generate(model, tokenizer, "the cat", max_new_tokens=12)
    assert len(text["tokens"]) == 12 or tokenizer.eos


def test_fingerprint_is_that_of_the_weights(tmp_path):
    tiny_folder(tmp_path)
    first = load(str(tmp_path))[0].fingerprint()
    assert load(str(tmp_path), dtype=torch.bfloat16)[0].fingerprint() == first
    tiny_folder(tmp_path, initializer_range=0.1)
    assert load(str(tmp_path))[0].fingerprint() != first


@pytest.mark.parametrize("change, word", [
    ({"model_type": "gpt2"}, "gpt2"), ({"num_hidden_layers": None}, "num_hidden_layers"), ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_hidden_layers": 10**12}, "n_layer"), ({"hidden_size": "64"}, "hidden_size"), ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"), ({"vocab_size": 100}, "tokens"),
    ({"intermediate_size": 97}, "mlp"),
])
def test_bad_config_is_named(tiny, tmp_path, change, word):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=word):
        load(str(tmp_path))
