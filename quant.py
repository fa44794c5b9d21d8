"""INT8 and INT4 weights: rounding, fake quantisation for training, real kernels for inference.

A block of the model can run in one of three precisions (the MDP's states, see policy.py):

    state 4   the weight as it is (fp32, bf16 or fp16)
    state 2   INT8, one scale per output channel, symmetric:     W ~ codes * scale,             codes in -127..127
    state 1   INT4, groups of 64 inputs, asymmetric:             W ~ (codes - 8) * scale + zero, codes in 0..15

Three things are kept apart on purpose:

    rounding   `quantize_int8`, `quantize_int4` (to nearest), `gptq_int4` (so that the layer's *output* changes least): a weight
               becomes codes, scales and zeros; `cache_codes` does it for a whole model. Scales and zeros are rounded to
               bf16 *before* the codes are chosen, so that the same codes mean the same weights to the fake path (any
               dtype) and to the kernels (which want scales in the activations' type, bf16).
    fake       `FakeWeight`: the dequantised weight and a plain matrix product, for whole sequences; `fake_quantize`: the same
               with a straight-through gradient.
    real       `Int8Weight`, `Int4Weight`: packed codes and the product computed from them. On the CPU in bf16 that
               is aten's `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu`, and for INT8 on a CPU with AVX2 alone
               `bag_row`; on a GPU in bf16, for one row (INT4: fewer than MANY_INT4), the fastest of `ROW_KERNELS` for the
               shape, by measurement; those that torch.compile makes do what comes before and after the product too
               (`layer_of_one_row`). For many rows, a prompt, INT8 multiplies by the codes and scales the output, INT4
               dequantises; so does every case without a kernel ("reference"). `kernel` says which one a weight uses.

Sources: GPTQ, Frantar et al. 2022 (arXiv 2210.17323); straight-through estimator, Bengio et al. 2013 (arXiv 1308.3432);
the (codes - 8) * scale + zero form is that of gpt-fast and of aten's int4 kernels. Group size 64 is ours (README, "Choices
that are ours").
"""

import functools
import hashlib
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import lacks_memory, read_safetensors, refusing, write_safetensors

GROUP = 64  # inputs that share one INT4 scale and zero
DAMPING = 0.01  # GPTQ adds this share of the mean of the Hessian's diagonal to the diagonal
CLIPS = [0.7 + 0.05 * k for k in range(7)]  # GPTQ tries a group's minimum and maximum at each of these shares


# ----------------------------------------------------------------------------------------------------------
# Rounding: weights to codes


def _bf16(t):
    return t.bfloat16().float()


def quantize_int8(weight):
    """Round to nearest, per output channel, symmetric.

    weight (N, K) float -> codes (N, K) int8 in -127..127, scale (N,) fp32 holding bf16 values.
    """
    w = weight.detach().float()
    scale = _bf16(w.abs().amax(dim=1) / 127).clamp(min=1e-20)
    codes = (w / scale[:, None]).round_().clamp_(-127, 127)  # in place: the head of a large model is gigabytes
    return codes.to(torch.int8), scale


def dequantize_int8(codes, scale):
    """codes (N, K) int8, scale (N,) -> (N, K) fp32."""
    return codes.float() * scale[:, None].float()


def quantize_int4(weight):
    """Round to nearest, min-max, asymmetric, per group of GROUP inputs. A last group may be narrower.

    weight (N, K) float -> codes (N, K) uint8 in 0..15, scale and zero (N, ceil(K / GROUP)) fp32 holding bf16 values.
    """
    N, K = weight.shape
    # repeating a column leaves the minimum and maximum of its group alone
    w = F.pad(weight.detach().float(), (0, -K % GROUP), mode="replicate").view(N, -1, GROUP)
    low, high = w.amin(-1), w.amax(-1)
    scale = _bf16((high - low) / 15).clamp(min=1e-20)
    zero = _bf16(low + 8 * scale)
    codes = ((w - zero[..., None]) / scale[..., None] + 8).round().clamp(0, 15)
    return codes.view(N, -1)[:, :K].to(torch.uint8), scale, zero


def dequantize_int4(codes, scale, zero):
    """codes (N, K) uint8, scale and zero (N, ceil(K / GROUP)) -> (N, K) in the dtype of the scale; what is between is computed in fp32."""
    N, K = codes.shape
    if K % GROUP:
        codes = F.pad(codes, (0, -K % GROUP))
    codes = codes.view(N, -1, GROUP).to(scale.dtype) - 8
    return torch.addcmul(zero[..., None], codes, scale[..., None]).view(N, -1)[:, :K]


def clipped_range(w, importance):
    """Scale and zero of one group of inputs: the best of 7 x 7 ways to clip its minimum and maximum (0.7 to 1).

    w (N, group), importance (group,) the Hessian's diagonal -> scale, zero (N,) fp32 holding bf16 values (ours).
    """
    low, high = w.amin(1), w.amax(1)
    best = [torch.full_like(low, float("inf")), low, low]  # error, scale, zero
    for a in CLIPS:
        for b in CLIPS:
            scale = _bf16((b * high - a * low) / 15).clamp(min=1e-20)
            zero = _bf16(a * low + 8 * scale)
            rounded = ((w - zero[:, None]) / scale[:, None]).round_().clamp_(-8, 7).mul_(scale[:, None]).add_(zero[:, None])
            error = rounded.sub_(w).square_() @ importance
            better = error < best[0]
            best = [torch.where(better, new, old) for new, old in zip((error, scale, zero), best)]
    return best[1:]


def gptq_int4(weight, hessian):
    """GPTQ: round one input after the other and let the inputs still to come make up for the error.

    weight (N, K), hessian (K, K) fp32, the sum of x x^T over calibration inputs -> codes, scale, zero as `quantize_int4`.
    Scale and zero are chosen by `clipped_range` when their group is reached; inputs keep their order.
    """
    w = weight.detach().float().clone()
    K = weight.shape[1]
    diagonal = hessian.diagonal().clone()
    h = hessian.double()
    h.diagonal().add_(DAMPING * diagonal.double().mean().clamp(min=1e-12))
    # fp64: factorised in less, the matrix is not positive definite
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    codes, scales, zeros = torch.empty_like(w), [], []
    for start in range(0, K, GROUP):
        end = min(start + GROUP, K)
        scale, zero = clipped_range(w[:, start:end], diagonal[start:end])
        errors = torch.empty(len(w), end - start, device=w.device)
        for j in range(start, end):
            code = ((w[:, j] - zero) / scale + 8).round().clamp(0, 15)
            error = (w[:, j] - ((code - 8) * scale + zero)) / inverse[j, j]
            w[:, j:end] -= torch.outer(error, inverse[j, j:end])
            codes[:, j], errors[:, j - start] = code, error
        w[:, end:] -= errors @ inverse[start:end, end:]
        scales.append(scale)
        zeros.append(zero)
    return codes.to(torch.uint8), torch.stack(scales, 1), torch.stack(zeros, 1)


# ----------------------------------------------------------------------------------------------------------
# INT4 codes of a whole model: chosen block after block, kept in the cache


class Rounding:
    """Stands in for a layer's INT4 weight while its codes are chosen: the one call sees every calibration input at once,
    and what comes after it in the block sees outputs that are quantised already."""

    def __init__(self, linear, codes):
        self.linear, self.codes = linear, codes

    def __call__(self, x):
        self.codes = self.codes or gptq_int4(self.linear.weight, x.T @ x)
        return F.linear(x, dequantize_int4(*self.codes))


@torch.no_grad()
def choose_codes(model, tokens, codes, keep):
    """Fill codes {"BLOCK.LAYER": (codes, scale, zero)}, which may hold the first blocks already, from calibration tokens (n, T).

    Sequential: each block's inputs come from the quantised blocks before it; the first block, which always runs in state 4,
    passes on the output of state 4. `keep(codes)` is called every few blocks.
    """
    x = model.embed(tokens).flatten(0, 1)
    rope = model.rope(0, tokens.shape[1])
    for i, block in enumerate(tqdm(model.blocks, desc="round to INT4")):
        for name, linear in block.linears().items():
            linear.low["round"] = Rounding(linear, codes.get(f"{i}.{name}"))
        y = block(x, len(tokens), [("round", None)], 1.0, rope)
        for name, linear in block.linears().items():
            codes[f"{i}.{name}"] = linear.low.pop("round").codes
        x = y if i else block(x, len(tokens), [(4, None)], 1.0, rope)
        if i % 6 == 5:
            keep(codes)


def codes_name(tokens):
    """What INT4 codes chosen on these calibration tokens, by these settings, are called."""
    return "gptq-" + hashlib.sha256(tokens.cpu().numpy().tobytes() + repr((GROUP, DAMPING, CLIPS)).encode()).hexdigest()[:12]


def cache_codes(model, tokens):
    """Choose INT4 codes on calibration tokens (n, T) and keep them in the cache (`LLM.codes_file`), unless they are there. A run that was killed
    goes on from the blocks that it had."""
    path = model.codes_file(codes_name(tokens))
    if path.exists():
        return

    def write(path, codes):
        tensors = {}
        for key, (code, scale, zero) in codes.items():
            tensors |= {key + ".codes": pack_nibbles(code), key + ".scale": scale.bfloat16(), key + ".zero": zero.bfloat16()}
        write_safetensors(path, tensors)

    some = path.with_suffix(".some")
    codes = read_codes(some, model, whole=False) if some.exists() else {}
    choose_codes(model, tokens, codes, keep=lambda codes: write(some, codes))
    write(path, codes)
    some.unlink(missing_ok=True)


def read_codes(path, model, whole=True):
    """Cached INT4 codes of a model, the `whole` of it or some layers -> {"BLOCK.LAYER": (codes (N, K) uint8, scale, zero)}. Errors name the
    path and the remedy."""
    tensors = {k: t.to(model.device) for k, t in read_safetensors(path, "the train.py run that made the policy")[0].items()}
    codes = {}
    with refusing(path, "does not hold this model's INT4 codes", "delete it and run train.py again"):
        for key, linear in model.linears().items():
            N, K = linear.weight.shape
            if key + ".codes" not in tensors and not whole:
                continue
            code = unpack_nibbles(tensors[key + ".codes"], K)
            scale, zero = tensors[key + ".scale"].float(), tensors[key + ".zero"].float()
            if code.shape != (N, K) or not all(t.shape == (N, -(-K // GROUP)) and t.isfinite().all() for t in (scale, zero)):
                raise ValueError(f"{key} has another shape, or values that are not finite")
            codes[key] = code, scale, zero
    return codes


# ----------------------------------------------------------------------------------------------------------
# Fake quantisation


def fake_quantize(weight, state):
    """The weight as state 1 (INT4) or 2 (INT8) would have it, in its own dtype; 4 gives it back unchanged.

    weight (N, K) float -> (N, K). The gradient passes straight through the rounding.
    """
    if state == 4:
        return weight
    rounded = dequantize_int8(*quantize_int8(weight)) if state == 2 else dequantize_int4(*quantize_int4(weight))
    return weight + (rounded.to(weight.dtype) - weight).detach()


class FakeWeight:
    """A dequantised weight (N, K), which `make()` gives: x (n, K) -> x W^T (n, N). Fastest for many tokens at once; kept, the largest in
    memory, or made anew at every call."""

    def __init__(self, make, keep=True):
        self.kept, self.make = (make(), None) if keep else (None, make)

    @property
    def weight(self):
        return self.make() if self.kept is None else self.kept

    def __call__(self, x):
        return F.linear(x, self.weight)


# ----------------------------------------------------------------------------------------------------------
# Real kernels


MANY = 24  # rows from which a product with the codes in bf16 beats int8pack, and `product` takes fp32 (measured, results/NOTES.md)
MANY_INT4 = 144  # rows from which dequantising beats aten's INT4 kernels (measured on a GPU and on CPUs, results/NOTES.md)
AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # an x86 CPU whose bf16 products are emulated


def product(x, weight, bias=None):
    """F.linear, on a CPU in bf16 by the faster way (measured, results/NOTES.md): one row without oneDNN, which reads weights for it at 0.6 times the
    speed of PyTorch's own kernel; many rows, a prompt, in fp32 where bf16 is emulated, 6 times faster."""
    bf16 = x.dtype == torch.bfloat16 and not x.is_cuda and not torch.compiler.is_compiling()  # which may not switch oneDNN off
    if bf16 and AVX2 and x.shape[0] >= MANY:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    if not bf16 or x.shape[0] > 1 or not torch.backends.mkldnn.enabled:  # off: by the user, or by another thread that is in here
        return F.linear(x, weight, bias)
    torch.backends.mkldnn.enabled = False
    try:
        return F.linear(x, weight, bias)
    finally:
        torch.backends.mkldnn.enabled = True


LANES = 96  # outputs side by side in a table of `bag_row`: their sums fill 12 of AVX2's 16 registers
LARGE = 2**20  # weights from which `bag_row` beats int8pack there (measured, results/NOTES.md); for fewer its three more operators cost more


def bag_table(codes):
    """codes (N, K) int8 -> (ceil(N / LANES) * K, LANES + 8) uint8, a row for every input of LANES outputs: what each of them multiplies
    that input by, plus 128, and the row's scale 1 and bias -128 in fp32, as PyTorch's embedding_bag_byte wants it (ours)."""
    N, K = codes.shape
    table = (F.pad(codes.T, (0, -N % LANES)).short() + 128).to(torch.uint8).reshape(K, -1, LANES).transpose(0, 1).reshape(-1, LANES)
    return torch.cat([table, torch.tensor([1.0, -128.0]).view(torch.uint8).expand(len(table), 8)], 1)


def bag_codes(table, N, K):
    """The inverse of `bag_table`, in bf16: (N, K), stored by inputs."""
    return (table.view(-1, K, LANES + 8)[..., :LANES].bfloat16() - 128).transpose(0, 1).reshape(K, -1)[:, :N].T


@functools.cache
def bag_places(rows, K):
    """Which rows of a table each sum takes: all, K at a time."""
    return torch.arange(rows, dtype=torch.int32), torch.arange(0, rows + 1, K, dtype=torch.int32)


def bag_row(x, table, N):
    """x (1, K), the table of codes (N, K) -> x codes^T (1, N) fp32.

    A product with one row is a weighted sum of the weight's columns, which is what an embedding bag is for, and PyTorch's for bytes
    (from FBGEMM) reads them at up to three times the speed of `_weight_int8pack_mm` on a CPU with AVX2 alone (results/NOTES.md).
    """
    rows, ends = bag_places(len(table), x.shape[1])
    inputs = x.expand(len(ends) - 1, -1).to(torch.float32, memory_format=torch.contiguous_format).reshape(-1)
    y = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(table, rows, ends, False, 0, False, inputs, None, True).view(1, -1)
    return y if y.shape[1] == N else y[:, :N]


class Int8Weight:
    """INT8 codes and their product: x (n, K) -> x W^T (n, N) in x's dtype.

    kernel "int8pack": aten's CPU kernel, bf16. It returns garbage or crashes when K is no multiple of 16, so such a width
    takes "reference", as does any other dtype. "int8 bag": `bag_row`, for large weights on a CPU with AVX2 alone. For many rows (a
    prompt) these and the GPU's kernels multiply by the codes in bf16 and scale the output: a matrix product is worth the detour.
    """

    def __init__(self, codes, scale, dtype):
        self.N, self.K = codes.shape
        self.kernel = "reference"
        self.codes = codes
        self.scale = scale.to(dtype)
        on_cpu = codes.device.type == "cpu" and dtype == torch.bfloat16
        if on_cpu and AVX2 and codes.numel() >= LARGE:
            self.kernel = "int8 bag"
            self.codes = bag_table(codes)
            self.scale = scale.float()
        elif on_cpu and self.K % 16 == 0:
            self.kernel = "int8pack"
        if codes.is_cuda and dtype == torch.bfloat16:
            layouts = dict.fromkeys(("int8 compiled", "int8 aten"), self.tensors)
            self.kernel = choose_kernel((8, self.N, self.K), layouts, lambda x: F.linear(x, dequantize_int8(codes, scale)), codes.device)

    def tensors(self):
        return [self.codes, self.scale]

    def __call__(self, x):
        if self.kernel == "reference":
            return product(x, dequantize_int8(self.codes, self.scale).to(x.dtype))
        if self.kernel == "int8pack" and x.shape[0] < MANY:
            return torch._weight_int8pack_mm(x, self.codes, self.scale)
        if self.kernel == "int8 bag" and len(x) < MANY:
            y = bag_row(x, self.codes, self.N) if len(x) == 1 else torch.cat([bag_row(row, self.codes, self.N) for row in x.split(1)])
            return (y * self.scale).to(x.dtype)
        if len(x) == 1:
            return row_product(self.kernel, x, self.tensors(), self.N)  # a GPU's
        codes = bag_codes(self.codes, self.N, self.K) if self.kernel == "int8 bag" else self.codes.to(x.dtype)
        return (product(x, codes) * self.scale).to(x.dtype)  # codes are exact in bf16; scaling the output is cheaper


def pack_nibbles(codes):
    """(N, K) uint8 in 0..15 -> (N, ceil(K / 2)) uint8, two to a byte."""
    even = F.pad(codes, (0, codes.shape[1] % 2))
    return even[:, ::2] | even[:, 1::2] << 4


def unpack_nibbles(packed, K):
    """The inverse of `pack_nibbles`: (N, ceil(K / 2)) -> (N, K)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :K]


def int4pack(codes):
    """codes (N, K) uint8 -> (N, K / 2) uint8, the layout of aten's CPU kernel."""
    return torch._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)


def int4pack_codes(packed, lanes):
    """The inverse of `int4pack`, transposed: (K, N). So many outputs, which must divide N, lie together input after input, the first half of
    them in the low nibbles, the other in the high ones."""
    N, half = packed.shape
    pairs = packed.view(-1, 2 * half, lanes // 2)
    return torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(2).transpose(0, 1).reshape(2 * half, N)


@functools.cache
def int4pack_lanes():
    """How many outputs lie together on this CPU: 64 with AVX-512, 32 with AVX2; None where aten has another layout than those."""
    codes = torch.randint(16, (128, GROUP), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return next((lanes for lanes in (64, 32) if torch.equal(int4pack_codes(int4pack(codes), lanes), codes.T)), None)


def int4pack_weight(packed, scale_zero, lanes):
    """What `dequantize_int4` gives, (N, K), from the layout of aten's CPU kernel: packed (N, K / 2), scale_zero (K / GROUP, N, 2)."""
    codes = (int4pack_codes(packed, lanes) - 8).view(torch.int8).view(-1, GROUP, len(packed))  # less 8 while it is a byte: faster
    scale, zero = scale_zero.permute(2, 0, 1)[:, :, None].contiguous()  # strided, the next line would take three times as long
    return torch.addcmul(zero, codes.to(zero.dtype), scale).view(-1, len(packed)).T


class Int4Weight:
    """INT4 codes and their product: x (n, K) -> x W^T (n, N) in x's dtype.

    kernel "int4pack": aten's CPU kernel, bf16; it wants N a multiple of 16 and K a multiple of the group. "int4 compiled" and "int4 aten 2",
    4 or 8 (so many tiles of 16 inputs lie together): the GPU's, bf16, K a multiple of the group. Any other shape, dtype or device takes
    "reference", whose layout is that of "int4 compiled". Many rows do so too: of aten's layouts we unpack the CPU's where `lanes` divides N;
    those of a GPU keep the nibbles besides.
    """

    def __init__(self, codes, scale, zero, dtype):
        N, K = codes.shape
        on_cpu = codes.device.type == "cpu" and dtype == torch.bfloat16
        self.N, self.K = N, K
        self.kernel = "int4pack" if on_cpu and N % 16 == 0 and K % GROUP == 0 else "reference"
        interleaved = lambda: torch.stack([scale.T, zero.T], dim=-1).to(dtype).contiguous()
        nibbles = lambda: [pack_nibbles(codes), torch.stack([scale, zero]).to(dtype)]
        layouts = {"int4pack": lambda: [int4pack(codes), interleaved()], "reference": nibbles}
        if codes.is_cuda and dtype == torch.bfloat16 and K % GROUP == 0:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
            candidates = {"int4 compiled": nibbles} | {
                f"int4 aten {t}": lambda t=t: [torch._convert_weight_to_int4pack(pairs, t), interleaved()] for t in TILES}
            self.kernel = choose_kernel((4, N, K), candidates, lambda x: F.linear(x, dequantize_int4(codes, scale, zero)), codes.device)
            layouts |= candidates
        self.codes, self.scale_zero = layouts[self.kernel]()
        self.nibbles = pack_nibbles(codes) if self.kernel.startswith("int4 aten") else None
        lanes = int4pack_lanes() if self.kernel == "int4pack" else None
        self.lanes = lanes if lanes and N % lanes == 0 else None

    def tensors(self):
        """What one row reads."""
        return [self.codes, self.scale_zero]

    def weight(self):
        """(N, K), dequantised; of "int4pack" only with `lanes`."""
        packed, scale_zero = self.codes, self.scale_zero
        if self.kernel == "int4pack":
            return int4pack_weight(packed, scale_zero, self.lanes)
        if self.nibbles is not None:
            packed, scale_zero = self.nibbles, scale_zero.permute(2, 1, 0).contiguous()  # (2, N, K / GROUP)
        return dequantize_int4(unpack_nibbles(packed, self.K), *scale_zero)

    def __call__(self, x):
        if self.kernel == "int4pack" and (x.shape[0] < MANY_INT4 or not self.lanes):  # len(x), which is Python, would take three times as long
            return torch._weight_int4pack_mm_for_cpu(x, self.codes, GROUP, self.scale_zero)
        if self.kernel == "int4 compiled" and len(x) == 1 or self.kernel.startswith("int4 aten") and len(x) < MANY_INT4:
            return row_product(self.kernel, x, self.tensors(), self.N)
        return product(x, self.weight())


# ----------------------------------------------------------------------------------------------------------
# One row on a GPU: every byte of the weights is read once, so the kernel that reads fastest wins


def bf16_row(x, weight):
    """x (K,) fp32, weight (N, K) -> W x (N,) fp32. Written as one reduction, which torch.compile turns into one kernel."""
    return (weight.float() * x).sum(-1)


def int8_row(x, codes, scale):
    """As `bf16_row` with codes (N, K) int8 and scale (N,)."""
    return (codes.float() * x).sum(-1) * scale.float()


def int4_row(x, packed, scale_zero):
    """As `bf16_row` with codes of `pack_nibbles` and scale_zero (2, N, K / GROUP)."""
    return bf16_row(x, dequantize_int4(unpack_nibbles(packed, len(x)), *scale_zero))


def layer_of_one_row(row, x, tensors, bias, norm, eps, residual, glu):
    """`RoutedLinear.forward` for one row, x (1, K) -> (1, N), which torch.compile turns into one kernel: each that it would take besides costs 2 us.

    row: a function such as `bf16_row`, tensors: what it takes; norm (K,): RMSNorm's weight, or None. The mean square is summed anew for every
    output, in the loop that makes the product, where reading the weight leaves time for it.
    """
    dtype, x = x.dtype, x[0].float()
    # outputs are dimension 0 of a weight (N, K) and of a vector (N,), 1 of scale_zero (2, N, K / GROUP)
    halves = lambda t: t.chunk(2, max(0, t.dim() - 2)) if glu else [t]
    scale = 1.0
    if norm is not None:
        scale = torch.rsqrt(x.expand(len(halves(tensors[0])[0]), -1).square().mean(-1) + eps)
        x = x * norm.float()
    ys = [row(x, *half) * scale for half in zip(*map(halves, tensors))]
    if bias is not None:
        ys = [y + b.float() for y, b in zip(ys, halves(bias))]
    y = F.silu(ys[0]) * ys[1] if glu else ys[0]
    return (y if residual is None else residual[0] + y).to(dtype)[None]


TILES = (2, 4, 8)  # of aten's INT4 layout
ROW_KERNELS = {
    "bf16 compiled": bf16_row, "int8 compiled": int8_row, "int4 compiled": int4_row, "int8 aten": torch._weight_int8pack_mm,
    **{f"int4 aten {t}": lambda x, codes, scale_zero: torch._weight_int4pack_mm(x, codes, GROUP, scale_zero) for t in TILES}}
# (bits, N, K) -> {"kernel": the fastest, name: microseconds, or why it was left out}; also what failed in a block (model.py) or a graph (infer.py)
CHOSEN = {}


@functools.cache
def compiled(f, thorough=False):
    """f by torch.compile, compiled once for every shape and kept on disk by PyTorch. Kernels are searched for at length, and products of one row
    become sums, which all multiprocessors share. thorough: also by changing two settings of a kernel at once, where one alone does not help."""
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(f, dynamic=False, fullgraph=True, options={"coordinate_descent_tuning": True, "coordinate_descent_check_all_directions": thorough})


@functools.cache
def row_kernel(name):
    """A function with the arguments of `layer_of_one_row` after the first, or of aten's operator: x (n, K) and the tensors."""
    row = ROW_KERNELS[name]
    if not name.endswith("compiled"):
        return row
    # a thorough search for int4_row takes minutes, and what it finds still loses to aten's kernels
    return compiled(lambda *args: layer_of_one_row(row, *args), thorough=row is not int4_row)


@torch.library.custom_op("dash::row_product", mutates_args=())
def row_product(name: str, x: torch.Tensor, tensors: list[torch.Tensor], N: int, bias: torch.Tensor | None = None,
                norm: torch.Tensor | None = None, eps: float = 0.0, residual: torch.Tensor | None = None, glu: bool = False) -> torch.Tensor:
    """x (n, K) bf16 -> (n, N) by a kernel of ROW_KERNELS; aten's take none of what follows N, and those that are compiled n = 1. An operator of
    its own, so that torch.compile of a whole block leaves it alone: inlined, what comes before it would be computed again for every row of
    the weight."""
    # What is passed on must look the same whoever calls, or it is compiled again: torch.compile guards on every stride, that of a dimension of
    # 1 too, on Parameter or Tensor, on inference mode, and on being in the first call of a compiled block
    same = lambda t: None if t is None else t.detach().reshape(-1).view(t.shape)
    with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)):
        tensors = [t.detach() for t in tensors]  # these as they are: a weight's strides are always the same
        if name.endswith("compiled"):
            return row_kernel(name)(same(x), tensors, same(bias), same(norm), eps, same(residual), glu)
        return row_kernel(name)(same(x), *tensors)


@row_product.register_fake
def _(name, x, tensors, N, bias=None, norm=None, eps=0.0, residual=None, glu=False):
    return x.new_empty(len(x), N)


def gpu_microseconds(name, x, tensors, N):
    """Microseconds of one product, the weights not in the GPU's cache: a captured run over copies of them, 256 MB or 512 copies."""
    copies = [tensors] + [[t.clone() for t in tensors] for _ in range(min(511, 2**28 // sum(t.nbytes for t in tensors) + 1))]
    row_product(name, x, copies[-1], N)  # should a copy compile anew: that is not allowed in a capture
    graph = torch.cuda.CUDAGraph()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # a capture that fails leaves its stream the current one; `stream` puts ours back
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for copy in copies:
            row_product(name, x, copy, N)
    times = []
    for _ in range(6):  # the first finds the GPU idle: the best of them is not that one
        began.record()
        for _ in range(5):
            graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return 1000 * min(times) / (5 * len(copies))


def choose_kernel(key, layouts, reference, device, clock=gpu_microseconds):
    """The fastest kernel for a weight, measured once per key (bits, N, K) and kept in CHOSEN: its name.

    layouts: {name of ROW_KERNELS: function giving the weight's tensors in its layout}; reference: x (1, K) -> (1, N), in fp32.
    A kernel that raises (but for lack of memory), or is further off than bf16 rounding, is left out; without any the choice is "reference".
    """
    if key not in CHOSEN:
        x = torch.randn(1, key[2], device=device).bfloat16()
        want = reference(x.float())
        found, times = {}, {}
        for name, layout in layouts.items():
            try:
                tensors = layout()
                off = float((row_product(name, x, tensors, key[1]) - want).abs().max() / want.abs().max())
                if off < 0.02:
                    times[name] = clock(name, x, tensors, key[1])
                found[name] = times.get(name, f"wrong by {off:.2g}")
            except Exception as e:  # whatever compilers and operators raise for shapes or machines that they do not serve
                if lacks_memory(e):
                    raise
                found[name] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
        CHOSEN[key] = found | {"kernel": min(times, key=times.get, default="reference")}
        if not times or any(name.endswith("compiled") and name not in times for name in found):
            print(f"slower than it could be: products of {key[0]} bits, {key[1]} x {key[2]}, by {CHOSEN[key]['kernel']}; {found}", file=sys.stderr)
    return CHOSEN[key]["kernel"]


# ----------------------------------------------------------------------------------------------------------
# The layer: one weight, three precisions


class RoutedLinear(nn.Module):
    """A linear layer that holds its weight in up to three precisions, with what a block does before and after it.

    weight (N, K), bias (N,) or None; fill_from: the first row that a skipped block still runs (state "fill"), or None. Before any state but 4
    can be used, call `quantize`.
    """

    def __init__(self, K, N, bias=False, fill_from=None):
        super().__init__()
        self.fill_from = fill_from
        self.weight = nn.Parameter(torch.empty(N, K))
        self.bias = nn.Parameter(torch.empty(N)) if bias else None
        self.low = {}  # 1: INT4, 2: INT8, "fill": the INT4 rows that a skipped block still runs
        self.kernel = "reference"  # of state 4; on a GPU what computes one row

    def forward(self, x, state=4, norm=None, residual=None, glu=False):
        """residual + f(norm(x) W^T + bias) with the weight in the precision of a state: x (n, K) -> (n, N), or (n, N / 2) if glu: f is then
        silu(first half) * second half. State "fill": only the rows from `fill_from` on, in INT4, keys and values for tokens that skip the block."""
        low = None if state == 4 else self.low[state]
        kernel = self.kernel if low is None else getattr(low, "kernel", "reference")
        if kernel.endswith("compiled") and len(x) == 1:
            if low is not None and norm is not None:  # codes are read so fast that there is no time to sum the squares again (results/NOTES.md)
                x, norm = norm(x), None
            tensors, N = ([self.weight], len(self.weight)) if low is None else (low.tensors(), low.N)
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            return row_product(kernel, x, tensors, N // (1 + glu), None if self.bias is None else self.bias[-N:], weight, eps, residual, glu)
        if norm is not None:
            x = norm(x)
        if low is None:
            y = product(x, self.weight, self.bias)
        else:
            y = low(x)
            if self.bias is not None:
                y = y + self.bias[-y.shape[-1]:]
        if glu:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y if residual is None else residual + y

    __call__ = forward  # without nn.Module's look for hooks, 120 times a token

    @torch.no_grad()
    def choose_row(self):
        """On a GPU in bf16, the kernel for one row in state 4."""
        if self.weight.is_cuda and self.weight.dtype == torch.bfloat16:
            layouts = {"bf16 compiled": lambda: [self.weight]}
            self.kernel = choose_kernel((16, *self.weight.shape), layouts, lambda x: F.linear(x, self.weight.float()), self.weight.device)

    @torch.no_grad()
    def quantize(self, real, int4=None):
        """Make states 1 and 2 from the weight: packed codes and kernels if `real`, else dequantised weights.

        int4: (codes, scale, zero) chosen elsewhere, such as by `gptq_int4`, or None to round to nearest.
        """
        dtype = self.weight.dtype
        keep = not self.weight.is_cuda  # 7B parameters in fp32 twice more are 54 GB; a GPU makes them anew in no time

        def make(Weight, dequantize, codes):
            return Weight(*codes, dtype) if real else FakeWeight(lambda: dequantize(*codes).to(dtype), keep)

        int4 = int4 or quantize_int4(self.weight)
        self.low = {1: make(Int4Weight, dequantize_int4, int4), 2: make(Int8Weight, dequantize_int8, quantize_int8(self.weight))}
        if self.fill_from is not None:
            self.low["fill"] = make(Int4Weight, dequantize_int4, [t[self.fill_from :] for t in int4])
