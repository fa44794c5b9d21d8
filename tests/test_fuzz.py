"""The two readers of our own against damaged files: whatever the bytes, a usable object or one line, and never much memory."""

import resource

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weights import read_gguf
from policy import Policy, Scorer

FUZZ = settings(max_examples=1500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
LIMIT = 2**31  # bytes that a reader may take beyond what this process has


def mutations():
    """A few edits of a file, most of them in its first part, where lengths and names are."""
    place = st.one_of(st.integers(0, 10**6), st.integers(0, 2000), st.integers(0, 64))
    odd = st.sampled_from([b"\x00" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\xff" * 7 + b"\x7f", b"\x00" * 6 + b"\x01\x00", b"9" * 12, b"1e999", b"NaN", b"[[[[", b"{}"])
    return st.lists(st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), place, st.one_of(st.binary(min_size=1, max_size=9), odd)),
                    min_size=1, max_size=4)


def damaged(data, edits):
    for kind, at, piece in edits:
        at %= len(data) or 1
        if kind == "cut":
            data = data[:at]
        else:
            data = data[:at] + (b"" if kind == "delete" else piece) + data[at + (0 if kind == "insert" else len(piece)):]
    return data


@pytest.fixture(scope="module")
def little_memory():
    """A reader that follows a damaged length fails here instead of taking the machine with it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def one_line(read, path, data):
    """Read a damaged file: the object, or None after a ValueError or OSError of one line that names the file."""
    path.write_bytes(data)
    try:
        return read(path)
    except (ValueError, OSError) as e:
        assert path.name in str(e) and "\n" not in str(e), e
        assert not isinstance(e.__cause__ or e.__context__, MemoryError), "asked for huge memory"


def write_gguf(path):
    """A LLaMA of one block with a handful of tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in ((writer.add_block_count, 1), (writer.add_embedding_length, 32), (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
                       (writer.add_feed_forward_length, 32), (writer.add_vocab_size, 12), (writer.add_context_length, 64), (writer.add_rope_freq_base, 1e4),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_tokenizer_model, "gpt2"), (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 0),
                       (writer.add_chat_template, "{{ messages[0].content }}"), (writer.add_token_merges, ["a b", "ab c"])):
        add(value)
    writer.add_token_list(["<|endoftext|>", *"abcdefgh", "ab", "abc", "z"])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 11)
    random = np.random.default_rng(0)
    shapes = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
              "ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}
    for name, shape in {"token_embd": (12, 32), "output_norm": (32,), **{f"blk.0.{k}": v for k, v in shapes.items()}}.items():
        weight = random.standard_normal(shape, dtype=np.float32)
        if name.endswith("ffn_up"):
            writer.add_tensor(f"{name}.weight", gguf.quantize(weight, gguf.GGMLQuantizationType.Q4_1), raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    config, tensors, tokenizer = read_gguf(path)
    assert config.n_layer == 1 and tensors["model.layers.0.mlp.up_proj.weight"].shape == (32, 32) and len(tokenizer.encode("abcab")) == 2
    return path.read_bytes()


@FUZZ
@given(edits=mutations())
def test_gguf(tiny_gguf, little_memory, tmp_path_factory, edits):
    found = one_line(read_gguf, tmp_path_factory.getbasetemp() / "fuzz.gguf", damaged(tiny_gguf, edits))
    if found is not None:
        config, tensors, tokenizer = found
        assert config.n_embd >= 1 and all(isinstance(t, torch.Tensor) for t in tensors.values())
        tokenizer.decode(tokenizer.encode("abc \u00e9"))


@pytest.fixture(scope="module")
def tiny_policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "p.safetensors"
    Policy(Scorer(3, 4, width=8), [1.0, 0.9, 1.1], torch.tensor([0.1, 1.0, 2.0, 4.0]), "f" * 16, [(1.2, 0.1), (3.0, 0.5)], 3,
           {"model": "tiny", "int4": "gptq-0", "damage": [[1.0] * 4] * 3}).save(path)
    return path.read_bytes()


@FUZZ
@given(edits=mutations())
def test_policy(tiny_policy, little_memory, tmp_path_factory, edits):
    policy = one_line(Policy.load, tmp_path_factory.getbasetemp() / "fuzz.safetensors", damaged(tiny_policy, edits))
    if policy is not None:  # usable: it decides
        L, width = len(policy.scale), len(policy.scorer.mean)
        policy.mu, policy.states = 0.1, torch.full((L, 1, 2), 4, dtype=torch.uint8)
        for i in range(L):
            policy.decide(i, torch.randn(1, 2, width), 0)
        assert set(policy.states.flatten().tolist()) <= {0, 1, 2, 4}
