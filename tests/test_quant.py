"""Rounding against bounds, fake against real, every kernel against the plain reference, odd shapes."""

import pytest
import torch
import torch.nn.functional as F

import quant
from model import load
from quant import (AVX2, GROUP, FakeWeight, Int4Weight, Int8Weight, RoutedLinear, bag_codes, bag_row, bag_table, choose_codes, clipped_range,
                   codes_name, dequantize_int4, dequantize_int8, fake_quantize, gptq_int4, pack_nibbles, product, quantize_int4, quantize_int8,
                   unpack_nibbles)

SHAPES = [(64, 64), (48, 128), (192, 576), (960, 576), (33, 64), (64, 80), (16, 100), (7, 13), (1, 1), (16, 24), (131, 192), (2000, 600)]


@pytest.mark.parametrize("N, K", SHAPES)
def test_rounding_error_is_below_half_a_step(N, K):
    torch.manual_seed(0)
    w = torch.randn(N, K) * torch.rand(N, 1)
    codes, scale = quantize_int8(w)
    assert codes.abs().max() <= 127
    assert ((dequantize_int8(codes, scale) - w).abs() <= 0.51 * scale[:, None] + 0.005 * w.abs()).all()
    codes, scale, zero = quantize_int4(w)
    step = scale.repeat_interleave(GROUP, 1)[:, :K]
    assert codes.max() <= 15 and ((dequantize_int4(codes, scale, zero) - w).abs() <= 0.58 * step + 0.005 * w.abs()).all()


def test_by_hand():
    codes, scale = quantize_int8(torch.tensor([[0.5, -127.0, 63.4, 0.0]]))
    assert codes.tolist() == [[0, -127, 63, 0]] and scale.tolist() == [1.0]
    w = torch.arange(16.0)[None].repeat(1, 4)  # 0..15 in one group: scale 1, zero 8, exact
    codes, scale, zero = quantize_int4(w)
    assert codes.tolist() == w.long().tolist() and scale.tolist() == [[1.0]] and zero.tolist() == [[8.0]]
    assert torch.equal(dequantize_int4(codes, scale, zero), w)


def test_constant_and_zero_rows():
    for value in (0.0, 3.0, -1e-6):
        w = torch.full((2, 70), value)
        assert torch.allclose(dequantize_int8(*quantize_int8(w)), w, rtol=0.01)
        assert torch.allclose(dequantize_int4(*quantize_int4(w)), w, rtol=0.01)


@pytest.mark.parametrize("state", [1, 2])
def test_fake_has_a_straight_through_gradient(state):
    w = torch.randn(8, 64, requires_grad=True)
    x = torch.randn(5, 64)
    (x @ fake_quantize(w, state).T).sum().backward()
    assert torch.allclose(w.grad, x.sum(0).expand(8, -1))
    assert not torch.equal(fake_quantize(w, state), w) and fake_quantize(w, 4) is w


@pytest.mark.parametrize("N, K", SHAPES)
@pytest.mark.parametrize("rows", [1, 5, 40, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_against_the_reference(N, K, rows, dtype):
    torch.manual_seed(1)
    w, x = torch.randn(N, K), torch.randn(rows, K).to(dtype)
    for Weight, quantize, dequantize in ((Int8Weight, quantize_int8, dequantize_int8), (Int4Weight, quantize_int4, dequantize_int4)):
        layer = Weight(*quantize(w), dtype)
        expected = x.float() @ dequantize(*quantize(w)).T
        got = layer(x)
        assert got.dtype == dtype and got.shape == expected.shape
        assert (got.float() - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 0.02) * expected.abs().max() + 1e-5


def test_shapes_that_a_kernel_cannot_take_have_a_named_other_path():
    w8 = lambda N, K, t: Int8Weight(*quantize_int8(torch.randn(N, K)), t).kernel
    w4 = lambda N, K, t: Int4Weight(*quantize_int4(torch.randn(N, K)), t).kernel
    assert w8(33, 64, torch.bfloat16) == "int8pack" and w8(33, 72, torch.bfloat16) == "reference"
    assert w8(2000, 600, torch.bfloat16) == ("int8 bag" if AVX2 else "reference") and w8(2000, 600, torch.float32) == "reference"
    assert w4(32, 128, torch.bfloat16) == "int4pack" and w4(33, 128, torch.bfloat16) == "reference"
    assert w4(32, 96, torch.bfloat16) == "reference" and w4(32, 128, torch.float32) == "reference"


@pytest.mark.parametrize("N, K", [(192, 576), (64, 64)])
def test_a_prompt_has_the_weights_that_fake_layers_have(N, K, monkeypatch):
    """Where aten's layout is one that we unpack, many rows are multiplied by just those numbers; where it is not, by aten's kernel."""
    codes, scale, zero = quantize_int4(torch.randn(N, K))
    layer, x = Int4Weight(codes, scale, zero, torch.bfloat16), torch.randn(quant.MANY_INT4, K).bfloat16()
    if AVX2 or torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert layer.lanes == (32 if AVX2 else 64)
        assert torch.equal(layer.weight(), dequantize_int4(codes, scale, zero).bfloat16())
        assert torch.equal(layer(x), product(x, layer.weight()))
    monkeypatch.setattr(quant, "int4pack_lanes", lambda: None)
    other = Int4Weight(codes, scale, zero, torch.bfloat16)
    assert torch.equal(other(x), torch._weight_int4pack_mm_for_cpu(x, other.codes, GROUP, other.scale_zero))
    assert not torch.equal(quant.int4pack_codes(quant.int4pack(codes), 16), codes.T)  # a layout that is not ours is noticed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("N, K", [(96, 128), (30, 50)])
def test_fake_and_real_layers_agree(N, K, bias):
    torch.manual_seed(2)
    layer = RoutedLinear(K, N, bias, fill_from=N // 3)
    torch.nn.init.normal_(layer.weight)
    if bias:
        torch.nn.init.normal_(layer.bias)
    layer = layer.bfloat16()
    x, out = torch.randn(3, K, dtype=torch.bfloat16), {}
    for real in (False, True):
        layer.quantize(real)
        out[real] = [layer(x, 1), layer(x, 2), layer(x, 4), layer(x, "fill")]
    for fake, real in zip(out[False], out[True]):
        assert (fake.float() - real.float()).abs().max() <= 0.03 * fake.float().abs().max()
    assert torch.allclose(layer(x, "fill").float(), layer(x, 1).float()[:, N // 3:], atol=0.05 * out[True][0].abs().max().item())


@pytest.mark.parametrize("N, K", [(48, 128), (33, 100), (16, 64)])
def test_gptq_changes_the_output_less(N, K):
    """On correlated inputs the error of the layer's output is well below that of rounding to nearest."""
    torch.manual_seed(3)
    w, x = torch.randn(N, K), torch.randn(2000, K) @ (torch.randn(K, K) * torch.rand(K))
    x[:, 5] = 0  # an input that never occurs must not break the factorisation
    codes, scale, zero = gptq_int4(w, x.T @ x)
    assert codes.dtype == torch.uint8 and codes.max() <= 15 and scale.shape == zero.shape == (N, -(-K // GROUP))
    error = lambda q: (x @ (dequantize_int4(*q) - w).T).square().mean()
    assert error((codes, scale, zero)) < 0.6 * error(quantize_int4(w))
    assert torch.equal(scale, scale.bfloat16().float()) and torch.equal(zero, zero.bfloat16().float())


def test_gptq_where_inputs_are_nearly_dependent():
    """64 inputs that 8 explain, to a few per cent: too much damping would lose what there is to gain."""
    torch.manual_seed(0)
    w, x = torch.randn(48, 64), torch.randn(2000, 8) @ torch.randn(8, 64) + 0.05 * torch.randn(2000, 64)
    error = lambda q: (x @ (dequantize_int4(*q) - w).T).square().mean()
    assert error(gptq_int4(w, x.T @ x)) < 0.1 * error(quantize_int4(w))


def test_gptq_with_white_inputs_is_rounding_with_clipping():
    w = torch.randn(8, 64)
    error = lambda q: (dequantize_int4(*q) - w).square().mean()
    assert error(gptq_int4(w, torch.eye(64))) <= error(quantize_int4(w))


@pytest.mark.parametrize("N, K", SHAPES)
def test_a_bag_is_a_product(N, K):
    """On any CPU: the table gives the codes back, and its weighted sum is the product with integers, to fp32 accuracy."""
    codes, x = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.randn(1, K)
    table = bag_table(codes)
    assert torch.equal(bag_codes(table, N, K).float(), codes.float())
    exact = x.double() @ codes.double().T
    assert (bag_row(x, table, N) - exact).abs().max() <= 1e-5 * (x.abs().double() @ codes.abs().double().T).max()


def test_nibbles():
    codes = torch.randint(0, 16, (5, 7), dtype=torch.uint8)
    assert pack_nibbles(codes).shape == (5, 4) and torch.equal(unpack_nibbles(pack_nibbles(codes), 7), codes)


def test_a_fake_weight_made_anew_is_the_kept_one():
    codes = quantize_int4(torch.randn(5, 128))
    made = []
    make = lambda: made.append(1) or dequantize_int4(*codes)
    kept, anew, x = FakeWeight(make), FakeWeight(make, keep=False), torch.randn(3, 128)
    for _ in range(2):
        assert torch.equal(kept(x), anew(x))
    assert len(made) == 3


def test_a_prompt_keeps_its_bias_where_bf16_is_emulated(monkeypatch):
    monkeypatch.setattr(quant, "AVX2", True)
    w, x, b = torch.randn(8, 64).bfloat16(), torch.randn(40, 64).bfloat16(), 30 + torch.randn(8).bfloat16()
    assert torch.allclose(product(x, w, b).float(), F.linear(x.float(), w.float(), b.float()), rtol=0.01, atol=0.1)


@pytest.mark.parametrize("N, K", [(1, 1), (5, 13), (192, 64), (100, 577), (3072, 576)])
def test_one_row_goes_without_onednn(monkeypatch, N, K):
    linear, seen = F.linear, []
    monkeypatch.setattr(F, "linear", lambda *args: seen.append(torch.backends.mkldnn.enabled) or linear(*args))
    w, b = torch.randn(N, K).bfloat16(), torch.randn(N).bfloat16()
    for rows in (1, 3):
        x = torch.randn(rows, K).bfloat16()
        for bias in (None, b):
            want = linear(x.float(), w.float(), None if bias is None else bias.float())
            assert torch.allclose(product(x, w, bias).float(), want, rtol=0.01, atol=0.01 * K**0.5)
    assert seen == [False, False, True, True] and torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError):
        product(torch.randn(1, K + 1).bfloat16(), w)
    assert torch.backends.mkldnn.enabled
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # by the user
    product(torch.randn(1, K).bfloat16(), w)
    assert not torch.backends.mkldnn.enabled


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_scales_and_zeros_are_bf16_numbers(quantize):
    assert all(torch.equal(t, t.bfloat16().float()) for t in quantize(torch.randn(8, 100))[1:])


def test_clipping_goes_by_importance():
    torch.manual_seed(0)
    w, importance = torch.randn(32, 64), torch.logspace(-3, 3, 64)

    def error(scale, zero):
        rounded = ((w - zero[:, None]) / scale[:, None]).round().clamp(-8, 7) * scale[:, None] + zero[:, None]
        return ((rounded - w).square() @ importance).sum()

    assert error(*clipped_range(w, importance)) < 0.9 * error(*clipped_range(w, torch.ones(64)))


@torch.no_grad()
def test_codes_are_chosen_from_what_reaches_a_layer(tiny):
    """Every layer's codes come from what reaches it: block 1 passes on state 4, later blocks INT4, and so do layers inside a block."""
    model, _ = load(str(tiny))
    tokens, codes, seen = torch.randint(0, 300, (4, 64)), {}, {}
    choose_codes(model, tokens, codes, lambda codes: None)
    x, rope = model.embed(tokens).flatten(0, 1), model.rope(0, 64)
    for i, block in enumerate(model.blocks):
        for name, linear in block.linears().items():
            linear.quantize(False, codes[f"{i}.{name}"])
            low = linear.low[1]
            linear.low[1] = lambda x, key=f"{i}.{name}", low=low: (seen.__setitem__(key, x), low(x))[1]
        y = block(x, 4, [(1, None)], 1.0, rope)
        x = y if i else block(x, 4, [(4, None)], 1.0, rope)
    for key in ("1.qkv", "2.qkv", "2.down"):
        i, name = key.split(".")
        want = gptq_int4(model.blocks[int(i)].linears()[name].weight, seen[key].T @ seen[key])
        assert (want[0] == codes[key][0]).float().mean() > 0.99


def test_codes_are_named_by_their_text():
    assert codes_name(torch.arange(8)) != codes_name(torch.arange(1, 9)) and codes_name(torch.arange(8)) == codes_name(torch.arange(8))


def test_real_kernels_take_the_codes_that_are_given():
    torch.manual_seed(0)
    layer, x = RoutedLinear(128, 96).bfloat16(), torch.randn(5, 128).bfloat16()
    torch.nn.init.normal_(layer.weight)
    codes, scale, zero = quantize_int4(layer.weight)
    given = codes, 2 * scale, zero  # codes chosen elsewhere
    layer.quantize(False, int4=given)
    fake = layer(x, 1).float()
    layer.quantize(True, int4=given)
    assert (layer(x, 1).float() - fake).abs().max() < 0.03 * fake.abs().max()
