"""The network against transformers on the same weights: logits, greedy tokens, cached against uncached."""

import json
import re

import pytest
import torch
import transformers

from conftest import ROOT, tiny_folder
from infer import generate
from model import KVCache, load
from weights import fetch_smollm2

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


LLAMA31 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # of 8 frequencies some are kept, some slowed down, one is in between
UNTIED, NARROW = {"tie_word_embeddings": False}, {"hidden_size": 72, "head_dim": 16}
HEADS = lambda heads, kv: {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 16}
FP16, BF16 = torch.float16, torch.bfloat16

# family, stored in shards, stored as, what else is special about it
FAMILIES = [
    ("llama", False, torch.float32, {}), ("llama", True, FP16, UNTIED), ("llama", False, BF16, HEADS(4, 4) | UNTIED),
    ("llama", True, torch.float32, HEADS(9, 3) | NARROW), ("llama", False, FP16, {"rope_parameters": LLAMA31}),
    ("llama", True, BF16, HEADS(16, 2) | UNTIED | {"rope_parameters": LLAMA31}),
    ("llama", False, torch.float32, HEADS(1, 1) | {"vocab_size": 331, "intermediate_size": 101}),
    ("mistral", True, BF16, HEADS(8, 2) | UNTIED | {"sliding_window": None}), ("mistral", False, FP16, HEADS(5, 1) | NARROW | {"sliding_window": 512}),
    ("qwen2", False, BF16, HEADS(6, 1)), ("qwen2", True, torch.float32, HEADS(7, 1) | UNTIED), ("qwen2", False, FP16, NARROW | HEADS(14, 2)),
    ("qwen3", True, FP16, {"head_dim": 32}), ("qwen3", False, BF16, HEADS(8, 1) | UNTIED), ("qwen3", False, torch.float32, HEADS(6, 2) | NARROW),
]


@pytest.mark.parametrize("kind, shards, stored, change", FAMILIES, ids=lambda v: v if isinstance(v, str) else None)
@torch.no_grad()
def test_parity(tmp_path, kind, shards, stored, change):
    """Against transformers: logits, greedy tokens; and the cache against the whole."""
    theirs = tiny_folder(tmp_path, kind, shards=shards, stored=stored, **change)
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    model, tokenizer = load(str(tmp_path))
    ids = torch.randint(0, 300, (2, 200), generator=torch.Generator().manual_seed(1))
    ours = model(ids)
    assert (ours - theirs(ids).logits).abs().max() < 1e-4
    cache = KVCache(model, 2, 200)
    pieces = [model(part, cache=cache) for part in ids.split([7, 1, 1, 180, 11], dim=1)]
    assert (torch.cat(pieces, 1) - ours).abs().max() < 1e-4
    tokenizer.eos = ()
    prompt = torch.tensor([tokenizer.encode("the cat")])
    greedy = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(model, tokenizer, "the cat", max_new_tokens=16)["tokens"] == greedy[0, prompt.shape[1] :].tolist()


def test_the_table_of_families_covers_what_it_promises():
    ratios = {c.get("num_attention_heads", 4) // c.get("num_key_value_heads", 2) for _, _, _, c in FAMILIES}
    assert ratios == set(range(1, 9))
    assert {(shards, stored) for _, shards, stored, _ in FAMILIES} == {(s, d) for s in (False, True) for d in (torch.float32, FP16, BF16)}


@torch.no_grad()
def test_rope_table_grows_with_the_text(tmp_path):
    """A context of a million positions is not paid for at once, and positions mean the same before and after the table grew."""
    tiny_folder(tmp_path, max_position_embeddings=10**6)
    model, _ = load(str(tmp_path))
    before = [t.clone() for t in model.rope(100, 50)]
    assert len(model.rope_table[0]) < 10**5
    late = model.rope(20000, 3)
    assert late[0].shape[0] == 3 and all(torch.equal(a, b) for a, b in zip(before, model.rope(100, 50)))


def test_fingerprint_is_that_of_the_weights(tmp_path):
    tiny_folder(tmp_path)
    first = load(str(tmp_path))[0].fingerprint()
    assert load(str(tmp_path), dtype=torch.bfloat16)[0].fingerprint() == first
    changed = load(str(tmp_path))[0]
    changed.blocks[2].down.weight.data[-1] += 0.5
    assert changed.fingerprint() != first
    tiny_folder(tmp_path, rms_norm_eps=0.1)
    assert load(str(tmp_path))[0].fingerprint() != first


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
REFUSED = [
    ({"model_type": "gpt2"}, "gpt2"), ({"model_type": "qwen2_moe"}, "qwen2_moe"), ({"model_type": ["llama"]}, "architecture"), ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_parameters": YARN}, "yarn"), ({"rope_scaling": YARN}, "yarn"), ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"), ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
    ({"rope_scaling": "yarn"}, "yarn"), ({"rope_parameters": {"full_attention": YARN}}, "yarn"), ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
    ({"rope_scaling": LLAMA31 | {"factor": 0}}, "rope_scaling"), ({"rope_scaling": LLAMA31 | {"low_freq_factor": 4.0}}, "RoPE"), ({"partial_rotary_factor": 0.5}, "partial_rotary"),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary"), ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"attn_logit_softcapping": 50.0}, "softcapping"), ({"quantization_config": {"quant_method": "gptq"}}, "gptq"), ({"num_experts": 8}, "num_experts"),
    ({"model_type": "mistral", "sliding_window": 100}, "sliding-window"), ({"model_type": "mistral", "max_position_embeddings": 9999}, "sliding-window"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 100}, "sliding-window"), ({"layer_types": ["linear_attention"] * 4}, "linear_attention"),
    ({"layer_types": 3}, "attention 3"), ({"model_type": "qwen2"}, "bias"), ({"model_type": "qwen3", "head_dim": None}, "head_dim"),
    ({"num_hidden_layers": None}, "num_hidden_layers"), ({"num_attention_heads": 0}, "num_attention_heads"), ({"num_attention_heads": 3}, "heads"),
    ({"num_hidden_layers": 10**12}, "n_layer"), ({"num_hidden_layers": -1}, "n_layer"), ({"num_hidden_layers": 2.0}, "n_layer"), ({"num_hidden_layers": True}, "n_layer"),
    ({"hidden_size": "64"}, "hidden_size"), ({"hidden_size": 10**30}, "head_dim|n_embd"), ({"head_dim": 10**9}, "head_dim"), ({"vocab_size": 10**12}, "vocab_size"),
    ({"max_position_embeddings": 10**15}, "block_size"), ({"intermediate_size": 97}, "mlp"), ({"num_hidden_layers": 5}, "layers.4"), ({"num_hidden_layers": 3}, "layers.3"),
    ({"rms_norm_eps": "1e-6"}, "norm_eps"), ({"rms_norm_eps": float("nan")}, "norm_eps"), ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
    ({"tie_word_embeddings": "yes"}, "tied"), ({"tie_word_embeddings": False}, "lm_head"), ({"vocab_size": 100}, "tokens"),
]


@pytest.mark.parametrize("change, word", REFUSED, ids=lambda v: None if isinstance(v, dict) else v)
def test_bad_config_is_named(tiny, tmp_path, change, word):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=word) as e:
        load(str(tmp_path))
    assert "\n" not in str(e.value)


def save(folder, tensors, name="model.safetensors"):
    from safetensors.torch import save_file

    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / name, {"format": "pt"})


@pytest.mark.parametrize("change, word", [
    (lambda t: t | {"model.norm.weight": torch.ones(63)}, "63"), (lambda t: t | {"model.norm.weight": torch.ones(64, dtype=torch.int32)}, "int32"),
    (lambda t: t | {"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}, "float8"), (lambda t: t | {"model.norm.weight": torch.full((64,), float("nan"))}, "finite"),
    (lambda t: {k: v for k, v in t.items() if "layers.2.mlp.up" not in k}, "layers.2.mlp.up"),
    (lambda t: t | {"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}, "no place"),
    (lambda t: t | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, "no place"),
])
def test_bad_tensors_are_named(tiny, tmp_path, change, word):
    from safetensors.torch import load_file

    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tiny / "model.safetensors")
    save(tmp_path, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})  # LLaMA-1's files hold it: not read, not refused
    load(str(tmp_path))
    save(tmp_path, change(tensors))
    with pytest.raises(ValueError, match=word):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["../model.safetensors", "..", ".", "/etc/passwd", "sub/model.safetensors", "model.bin", "", 3])
def test_an_index_cannot_leave_the_folder(tiny, tmp_path, name):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match="inside the model folder"):
        load(str(tmp_path))


def test_no_pickle_and_no_remote_code():
    """Weights, policies and checkpoints are safetensors, the rest JSON; templates are rendered in the sandbox only."""
    banned = (r"(?m)^\s*(?:import|from) (?:pickle|marshal|shelve|yaml|joblib|dill)|torch\.(?:load|save)\(|np\.load\(|(?<![.\w])(?:eval|exec)\("
              r"|trust_remote_code|jinja2 import Environment|jinja2\.Environment")
    for file in ROOT.glob("*.py"):
        assert not re.search(banned, file.read_text(encoding="utf-8")), file.name


@pytest.mark.parametrize("left_out, same", [(["rope_theta", "rope_parameters"], "rope_theta"), (["rms_norm_eps"], "norm_eps"), (["tie_word_embeddings"], "tied")])
def test_defaults_are_those_of_transformers(tmp_path, left_out, same):
    """What config.json leaves out is what transformers takes."""
    tiny_folder(tmp_path, tie_word_embeddings=False)
    config = {k: v for k, v in json.loads((tmp_path / "config.json").read_text()).items() if k not in left_out}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 300, (1, 100))
    assert same != "tied" or not theirs.config.tie_word_embeddings
    with torch.no_grad():
        assert (load(str(tmp_path))[0](ids) - theirs(ids).logits).abs().max() < 1e-4
