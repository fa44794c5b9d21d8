"""Token ids against the `tokenizers` package on the same vocabulary: Digits, then ByteLevel, as SmolLM2 was trained."""

import random

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data import pydocs
from model import fetch_smollm2, read_gguf


@pytest.fixture(scope="module")
def pair():
    path = fetch_smollm2()
    fields = gguf.GGUFReader(path).fields
    texts = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    reference = Tokenizer(models.BPE({t: i for i, t in enumerate(texts)}, merges))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    reference.decoder = decoders.ByteLevel()
    return read_gguf(path)[2], reference


def same(pair, text):
    ours, reference = pair
    ids = ours.encode(text)
    assert ids == reference.encode(text).ids, repr(text[:80])
    assert ours.decode(ids) == reference.decode(ids)


def test_real_text(pair):
    same(pair, pydocs("train"))


def test_wikitext(pair, data_dir):
    same(pair, (data_dir / "wikitext2" / "test.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", [
    "", " ", "a  1", "   5", "1 2  3   4\n\n5", "x = 10**25  # 3.14", "\t\tif x:\r\n    return 0x1F\n", "don't you'll I'VE",
    "½ ² Ⅷ ٣٤ 〇", "日本語のテスト 2024年", "👨‍👩‍👧 🇩🇪 😀3", "e\u0301 \u200d \ufe0f", "  \u3000\u00a0 \u2003", "ä" * 50, " " * 100,
])
def test_hard_text(pair, text):
    same(pair, text)


def test_missing_bytes_are_dropped_like_the_reference(pair):
    assert len(pair[0].missing) == 21
    for text in ("\x04", "a\x06b", "the\x13re is\x14 no", "\x1d\x1d 1", "\U000e0001 \U00040000x", "ok"):
        same(pair, text)


def test_random_strings(pair):
    rng = random.Random(0)
    pools = [" \t\n\r\x0b\u00a0", "0123456789٣²", "abcXYZéß", "'sdtrevml", ".,!-_=(){}<|>", "你好한국어", "😀👩‍👧🏽", "".join(map(chr, range(32))),
             "".join(chr(rng.randrange(0x100, 0xD7FF)) for _ in range(300)), "".join(chr(rng.randrange(0x10000, 0x10FFFF)) for _ in range(99))]
    for _ in range(5000):
        same(pair, "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(30))))


def test_special_tokens(pair):
    ours, reference = pair
    assert len(ours.special) == 17
    for text, i in ours.special.items():
        assert ours.encode(text, allowed_special="all") == [i] and ours.decode([i]) == text
        same(pair, text)  # as text, unless asked
        same(pair, f"a{text} 1")


def test_chat_template(pair):
    text = pair[0].decode(pair[0].chat([{"role": "user", "content": "Hi <|im_end|>"}]))
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
