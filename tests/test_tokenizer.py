"""Token ids against the `tokenizers` package on the same vocabulary: SmolLM2's, and small ones of LLaMA-2, LLaMA-3 and Qwen's kinds."""

import json
import random

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import model
from data import pydocs
from tokenizer import tokenizer_from_json
from weights import fetch_smollm2, read_gguf


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


def random_strings(n):
    rng = random.Random(0)
    pools = [" \t\n\r\x0b\u00a0", "0123456789٣²", "abcXYZéß", "'sdtrevml", ".,!-_=(){}<|>", "你好한국어", "😀👩‍👧🏽", "".join(map(chr, range(32))),
             "".join(chr(rng.randrange(0x100, 0xD7FF)) for _ in range(300)), "".join(chr(rng.randrange(0x10000, 0x10FFFF)) for _ in range(99))]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(30))) for _ in range(n)]


def test_random_strings(pair):
    for text in random_strings(5000):
        same(pair, text)


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


# ----------------------------------------------------------------------------------------------------------
# Small vocabularies of every kind that we read

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
METASPACE = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
TRAINING = pydocs("test")[:60000] + "\n" + " " * 64 + "=" * 99 + "\nif x:\n    return d\u00e9j\u00e0 na\u00efve e\u0301 \u65e5\u672c\u8a9e \u4f60\u597d \U0001f600 'S 'll\r\n"


def trained(pre, size, special):
    """A vocabulary and merges that BPE learns on TRAINING, cut into lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.train_from_iterator(TRAINING.splitlines(True), trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()[:0]))
    learned = json.loads(tokenizer.to_str())["model"]
    return learned["vocab"], [tuple(pair) for pair in learned["merges"]]


def llama2(pre=None, crossing=False, strip=True):
    """SentencePiece's BPE as LLaMA-1, LLaMA-2, TinyLlama and Mistral have it; `crossing`: with tokens that span words."""
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(".{1,40}"), "isolated"), pre_tokenizers.Metaspace(split=False)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    vocab, merges = trained(cut if crossing else pre_tokenizers.Metaspace(), 900, special)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if pre is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.Sequence(METASPACE + [decoders.Strip(" ", 1, 0)] * strip)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special[:3]])
    return tokenizer


def every_split(vocab, merges):
    """Merges as they are made from a vocabulary without them (LLaMA-3): a token comes of every pair that joins to it."""
    found = []
    for token in dict.fromkeys(a + b for a, b in merges):
        pairs = [(token[:n], token[n:]) for n in range(1, len(token)) if token[:n] in vocab and token[n:] in vocab]
        found += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return found


def of_bytes(kind):
    split = [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    vocab, merges = trained(pre_tokenizers.Sequence(split), 900, [])
    for ch in sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(vocab))[: None if kind != "lacking" else 0]:
        vocab[ch] = len(vocab)
    if kind == "llama3":
        merges = every_split(vocab, merges)
        vocab |= {token: len(vocab) + n for n, token in enumerate(("zzz", "\u0120qqq"))}  # whole pieces only: no merge makes them
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)] if kind == "qwen" else [])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|begin|>", "<|end|>")])
    form = "$A <|end|>" if kind == "qwen" else "<|begin|> $A"
    template = processors.TemplateProcessing(form, f"{form} $B", [(t, tokenizer.token_to_id(t)) for t in ("<|begin|>", "<|end|>")])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False)] + [template] * (kind != "lacking"))
    return tokenizer


KINDS = {"llama2": lambda: llama2(), "llama2, tokens across words": lambda: llama2(crossing=True),
         "llama2, metaspace first": lambda: llama2(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
         "llama2, metaspace always": lambda: llama2(pre_tokenizers.Metaspace(prepend_scheme="always", split=True)),
         "llama2, metaspace never": lambda: llama2(pre_tokenizers.Metaspace(prepend_scheme="never", split=False), strip=False),
         "llama3": lambda: of_bytes("llama3"), "qwen": lambda: of_bytes("qwen"), "lacking": lambda: of_bytes("lacking")}


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: name.replace(" ", "_"))
def small(request, tmp_path_factory):
    """(ours, reference, reference with special tokens in the text as text, its kind) of one saved tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    KINDS[request.param]().save(str(folder / "tokenizer.json"))
    plain, asked = (Tokenizer.from_file(str(folder / "tokenizer.json")) for _ in range(2))
    plain.encode_special_tokens = True
    return tokenizer_from_json(folder), asked, plain, request.param


TEXTS = ["", " ", "   ", "a", " a", "a ", "  two  spaces ", "\n", "\n\n  \n", "\t x", "def f(x):\n    return x ** 2  # \u00e9\r\n", "caf\u00e9 cafe\u0301 \ufb01 \u212b \u1e9b\u0323",
         "\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8 \u4f60\u597d\uff0c\u4e16\u754c", "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f600\U0001f600", "".join(map(chr, range(32))), "\x7f\u0085\u00a0\u2028\ufeff\ufffd", "<s>a</s> <unk>",
         "<|begin|>x<|end|>", "a<think> b</think>", "<0x41> <0xE4>", "\u2581\u2581 a\u2581b", "zzz qqq zzzz qqqq", "=" * 50, " " * 77 + "x", "1234567 89", "'S 'LL don't I'\u017f",
         "x" * 3000, "\ud800 lone", "\U00010ffff\U000e0001"]


def test_small_ids_and_round_trip(small):
    ours, asked, plain, kind = small
    for text in TEXTS + random_strings(500):
        text = text.encode("utf-8", "replace").decode()
        ids = ours.encode(text)
        assert ids == plain.encode(text, add_special_tokens=False).ids, (kind, text)
        assert ours.decode(ids) == plain.decode(ids, skip_special_tokens=False), (kind, text)
        for add in (False, True):
            expected = asked.encode(text, add_special_tokens=add).ids
            assert ours.encode(text, allowed_special="all", add_special_tokens=add) == expected, (kind, text)
        front = int(kind not in ("qwen", "lacking"))
        assert ours.encode_prompt(text) == plain.encode(text).ids[:front] + ids, (kind, text)  # what ends a text does not end a prompt


def test_small_real_text(small):
    ours, _, plain, _ = small
    for text in (pydocs("test")[60000:160000], open(model.__file__, encoding="utf-8").read(), pydocs("test")[:9000].replace("\n", " ")):
        assert ours.encode(text) == plain.encode(text, add_special_tokens=False).ids


def test_small_streaming_never_ends_in_half_a_character(small):
    """Bytes as they come, through an incremental decoder: what was streamed is the text that follows the prompt, whole characters only."""
    import codecs

    ours, _, plain, kind = small
    text = "x d\u00e9j\u00e0 \u65e5\u672c\u8a9e \U0001f468\u200d\U0001f469 \u2603\ufe0f\U00010348 end"
    start, ids = ours.encode("x"), ours.encode(text)
    assert ids[: len(start)] == start
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    streamed = [decoder.decode(ours.decode_bytes([i])) for i in ids[len(start) :]]
    assert ("\ufffd" in "".join(streamed)) == (kind == "lacking") and ours.decode(start) + "".join(streamed) == plain.decode(ids)


def test_any_ids_decode_as_the_reference_does(small):
    ours, _, plain, _ = small
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(12))]
        assert ours.decode(ids) == plain.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("change, word", [
    ({"model": {"type": "Unigram"}}, "Unigram"), ({"normalizer": {"type": "Lowercase"}}, "Lowercase"), ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"), ({"decoder": {"type": "WordPiece"}}, "WordPiece"),
    ({"added_tokens": [{"id": 1, "content": "<m>", "lstrip": True}]}, "lstrip"), ({"added_tokens": [{"id": 1, "content": ""}]}, "empty"),
    ({"added_tokens": [{"id": -1, "content": "<m>"}]}, "no number"), ({"normalizer": {"type": "Prepend"}}, "prepend"), ({"pre_tokenizer": [[]]}, "tokenizer.json"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
                                                              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}}, "pre-tokenizer"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "vocabulary lacks"), ({"model": {"type": "BPE", "vocab": [], "merges": []}}, "tokenizer.json"),
])
def test_tokenizers_that_we_do_not_have_are_named(tmp_path, change, word):
    of_bytes("qwen").save(str(tmp_path / "tokenizer.json"))
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | change))
    with pytest.raises(ValueError, match=word):
        tokenizer_from_json(tmp_path)


@pytest.mark.parametrize("template, word", [
    ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{% for m in messages %}{{ raise_exception('only users') }}{% endfor %}", "only users"),
    ("{{ messages[0].content + 1 }}", "template"), ("{% if %}", "template"), ("{{ 1 / 0 }}", "template")])
def test_templates_are_sandboxed_and_their_failures_named(tmp_path, template, word):
    of_bytes("qwen").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=word):
        tokenizer_from_json(tmp_path).chat([{"role": "user", "content": "hi"}])


def test_a_template_from_the_config_file_and_several_by_name(tmp_path):
    of_bytes("qwen").save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
    for given in (template, [{"name": "default", "template": template}, {"name": "tool_use", "template": "{% if %}"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": given}))
        ours = tokenizer_from_json(tmp_path)
        ours.eos = ()  # no token ends what is generated; the template still has its own
        assert ours.decode(ours.chat([{"role": "user", "content": "hi"}] * 2)) == "hi<|end|>"
