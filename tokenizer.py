"""The tokenizer: text to ids and back, the same ids as the `tokenizers` package gives.

Byte-pair encoding splits a text into pieces by a regular expression, and then, piece by piece, joins the adjacent pair that
was learned first until no learned pair is left (Sennrich et al. 2016, arXiv 1508.07909). Two kinds are in use:

    over bytes         GPT-2, LLaMA-3, Qwen, SmolLM2: every byte has a printable stand-in; joined by tiktoken, which is fast
    over characters    LLaMA-1 and 2, Mistral: "▁" stands for a space, and a character that the vocabulary lacks becomes its bytes

A model's own tokenizer.json says which, and what else is done to a text; a step that we do not have is refused by name.
"""

import datetime
import functools
import heapq
import itertools
import json
import unicodedata
from dataclasses import InitVar, dataclass, field

import numpy as np
import regex
import tiktoken

from common import read_json, refusing


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
    n = len(symbols)
    parts = list(symbols)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    queue = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
    heapq.heapify(queue)
    while queue:
        rank, i = heapq.heappop(queue)
        j = after[i]
        if j == n or ranks.get((parts[i], parts[j])) != rank:
            continue  # one of the two was joined to something else meanwhile
        parts[i], parts[j], after[i] = parts[i] + parts[j], None, after[j]
        if after[i] < n:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < n and (parts[left], parts[right]) in ranks:
                heapq.heappush(queue, (ranks[parts[left], parts[right]], left))
    return [part for part in parts if part is not None]


@dataclass(eq=False)
class Tokenizer:
    """BPE over bytes (GPT-2, LLaMA-3, Qwen, on tiktoken), or over characters with bytes to fall back on (LLaMA-1 and 2, Mistral)."""

    vocab: dict  # token text -> id
    merges: InitVar[list]  # pairs in order of rank
    special: dict  # text -> id
    pattern: str  # the pre-tokenisation, a regular expression of pieces that are never joined
    eos: tuple = ()  # ids that end generation
    chat_template: str = None  # jinja
    bos: str = ""  # its text, for the template
    added: dict = field(default_factory=dict)  # further tokens, text -> id, that are found in any text
    template: tuple = ((), ())  # ids that `encode` adds if asked, those before and those after
    normalize: object = lambda text, first: text  # what is done to a text, or to a part between special tokens
    whole: bool = False  # a piece that is a token is taken as it is (LLaMA-3's ignore_merges)
    unk: str = None  # text of the token for what the vocabulary lacks
    fuse_unk: bool = False
    of_bytes: bool = True  # the first kind, else the second
    strip: bool = False  # whether `decode` takes one leading space away

    def __post_init__(self, merges):
        vocab, special, template, of_bytes = self.vocab, self.special, self.template, self.of_bytes
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        learned = dict.fromkeys(a + b for a, b in self.ranks)
        if not vocab.keys() >= learned.keys():
            raise ValueError("a merge makes a token that the vocabulary lacks")
        self.pieces, self.ids_of = regex.compile(self.pattern), functools.lru_cache(2**16)(self.encode_piece)
        either = lambda texts: regex.compile(f"({'|'.join(map(regex.escape, sorted(texts, key=len, reverse=True)))})") if texts else None
        self.known = self.added | special
        self.added_in, self.special_in = either(self.added), either(self.known)
        self.table = byte_characters()
        self.characters = {b: ch for ch, b in self.table.items()}
        self.texts = {i: self.bytes_of(text) for text, i in vocab.items()} | {i: t.encode() for t, i in self.known.items()}
        self.byte_ids = {i for text, i in vocab.items() if not of_bytes and BYTE.fullmatch(text)}
        if not all(type(i) is int and i >= 0 for i in self.texts) or not {*template[0], *template[1]} <= self.texts.keys():
            raise ValueError("a token's id is no number from 0 on, or the template adds an id that no token has")
        self.vocab_size = max(self.texts) + 1
        self.eos_text = self.texts.get(self.eos[0], b"").decode() if self.eos else ""  # for templates
        others = [text for text in vocab if text not in learned and text not in self.table] if self.whole else []
        joins = lambda text: any(text[:n] in vocab and text[n:] in vocab for n in range(1, len(text)))
        self.bpe = None
        if of_bytes and not any(map(joins, others)):  # tiktoken joins any pair that makes a token: these must not be made
            learned = [*sorted((ch for ch in self.table if ch in vocab), key=vocab.get), *learned, *others]
            self.missing = [b for ch, b in self.table.items() if ch not in vocab]  # tiktoken wants all bytes; these never reach it
            ranks = {key: rank for rank, key in enumerate([*map(self.bytes_of, learned), *(bytes([b]) for b in self.missing)])}
            self.bpe = tiktoken.Encoding("bpe", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})
            self.ids = np.array([vocab[text] for text in learned])

    def bytes_of(self, token):
        """The bytes that a token of the vocabulary stands for."""
        if not self.of_bytes:
            return bytes([int(token[3:5], 16)]) if BYTE.fullmatch(token) else token.replace("▁", " ").encode()
        return bytes(self.table[ch] for ch in token) if all(ch in self.table for ch in token) else token.encode()

    def encode_piece(self, piece):
        """A piece of text -> ids. What the vocabulary lacks becomes the bytes of LLaMA-2's kind, or unk, or is dropped."""
        piece = "".join(self.characters[b] for b in piece.encode()) if self.of_bytes else piece
        if self.whole and piece in self.vocab:
            return [self.vocab[piece]]
        symbols = []
        for ch in piece:
            bytes_ = [] if self.of_bytes else [f"<0x{b:02X}>" for b in ch.encode()]
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
        ids = []
        for n, part in enumerate(tokens.split(text) if tokens else [text]):
            if n % 2:
                ids.append(self.known[part])
                continue
            part = self.normalize(part, n == 0)
            # tiktoken overflows its stack over a million spaces, which the other way does not
            spaces = max(map(len, regex.findall(r"\s+", part)), default=0) if len(part) > 500_000 else 0
            if self.bpe and part and spaces < 500_000 and set(part.encode()).isdisjoint(self.missing):
                ids += self.ids[self.bpe.encode_ordinary(part)].tolist()
            else:
                ids += [i for piece in self.pieces.finditer(part) for i in self.ids_of(piece[0])]
        return [*self.template[0], *ids, *self.template[1]] if add_special_tokens else ids

    def encode_prompt(self, text):
        """Ids of a text that goes on: with the special tokens that the model wants in front of it, without those behind."""
        return [*self.template[0], *self.encode(text)]

    def decode_bytes(self, ids):
        """list of ids -> bytes, as they go on after other text; an id outside the vocabulary gives none."""
        return b"".join(self.texts.get(int(i), b"") for i in ids)

    def decode(self, ids):
        """list of ids -> text, that of the `tokenizers` package with special tokens kept; bytes that are no UTF-8 become U+FFFD."""
        if self.of_bytes:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        text = ""
        for _, run in itertools.groupby(map(int, ids), self.byte_ids.__contains__):
            run = self.decode_bytes(run)
            try:
                text += run.decode()
            except UnicodeDecodeError:  # bytes to fall back on: all of a run or none
                text += "\ufffd" * len(run)
        return text[1:] if self.strip and text[:1] == " " else text

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
        try:
            text = env.from_string(self.chat_template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, bos_token=self.bos, eos_token=self.eos_text)
        except Exception as e:  # a template may fail in any way
            raise ValueError(f"the chat template of this model failed: {e}") from None
        return self.encode(text, allowed_special="all")


def steps_of(part):
    """A part of a tokenizer.json -> its steps, a list of dicts with "type"; it is one step, a sequence of them, or null."""
    if not part:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [part[name] for name in ("normalizers", "pretokenizers", "processors", "decoders") if name in part][0]


def pattern_of(steps, merges, whole):
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
            if steps[0]["behavior"] == "Isolated" and not steps[0].get("invert") and not regex.match(given, ""):
                return rf"{given}|(?:(?!{given})[\s\S])+", True  # what no match covers is a piece too
    if not kinds or (kinds == ["Metaspace"] and steps[0].get("replacement") == "▁"):
        if kinds and steps[0].get("split", True):
            return "▁[^▁]*|[^▁]+", False
        # One piece, the whole text. Where no token has a space after something else, no merge crosses there: the same, in small pieces
        crossing = whole or any("▁" in (a + b).lstrip("▁") for a, b in merges)
        return r"[\s\S]+" if crossing else "▁+[^▁]*|[^▁]+", False
    raise ValueError(f"pre-tokenizer {json.dumps(steps)[:200]} is not supported; those of LLaMA, Mistral and Qwen are")


def normalizer_of(steps):
    """The normalizer steps of a tokenizer.json, and Metaspace -> a function (text, first part of it or not) -> text."""
    for step in steps:
        if step["type"] not in ("NFC", "NFD", "NFKC", "NFKD", "Prepend", "Metaspace") and (step["type"] != "Replace" or "String" not in step["pattern"]):
            raise ValueError(f"normalizer {step['type']} is not supported; NFC, Prepend and Replace are")

    def normalize(text, first):
        for step in steps:
            if step["type"] == "Prepend":
                text = text and step["prepend"] + text
            elif step["type"] == "Replace":
                text = text.replace(step["pattern"]["String"], step["content"])
            elif step["type"] == "Metaspace":
                text = text.replace(" ", "▁")
                scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
                if text[:1] != "▁" and text and (scheme == "always" or (scheme == "first" and first)):
                    text = "▁" + text
            else:
                text = unicodedata.normalize(step["type"], text)
        return text

    return normalize


def template_of(steps):
    """The post_processor steps of a tokenizer.json -> ids that it puts before a text, and after."""
    before, after = [], []
    for step in steps:
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise ValueError(f"post-processor {step['type']} is not supported; TemplateProcessing is")
        single = step.get("single", [])
        ids = lambda part: step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
        at = next((n for n, part in enumerate(single) if "Sequence" in part), 0)
        before = [i for p in single[:at] for i in ids(p)] + before
        after = after + [i for p in single[at + 1 :] for i in ids(p)]
    return before, after


def more_ends(folder):
    """Ids that end generation besides the tokenizer's own: of generation_config.json or, without it, config.json, as transformers has it."""
    for file in (folder / "generation_config.json", folder / "config.json"):
        if file.exists():
            ids = read_json(file).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if not all(type(i) is int for i in ids):
                raise ValueError(f"{file}: eos_token_id is {ids!r}, expected an id, a list of ids or null")
            return ids
    return []


def tokenizer_from_json(folder):
    """A Hugging Face folder's tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json -> Tokenizer."""
    file, config, jinja = (folder / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    data = read_json(file)
    ends = more_ends(folder)
    extra = read_json(config) if config.exists() else {}
    with refusing(jinja if jinja.exists() else config, "holds no chat template that we can read", "mend it, or get it anew"):
        template = jinja.read_text(encoding="utf-8") if jinja.exists() else extra.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        if not isinstance(template, str | None):
            raise ValueError("it is no text")
    with refusing(file, "is no tokenizer that we can read", "give a LLaMA, Mistral or Qwen"):
        bpe = data["model"]
        if bpe["type"] != "BPE" or any(bpe.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
            raise ValueError(f"a BPE without dropout, prefix or suffix is supported, this is {bpe['type']}")
        merges = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
        special, added, whole = {}, {}, bool(bpe.get("ignore_merges"))
        for t in data.get("added_tokens", []):
            if t.get("lstrip") or t.get("rstrip") or t.get("single_word") or not t["content"]:
                raise ValueError(f"added token {t['content']!r}, empty or with lstrip, rstrip or single_word, is not supported")
            (special if t.get("special") else added)[t["content"]] = t["id"]
        steps = {name: steps_of(data.get(name)) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
        pattern, of_bytes = pattern_of(steps["pre_tokenizer"], merges, whole)
        kinds = {step["type"] for step in steps["decoder"]}
        if kinds - ({"ByteLevel"} if of_bytes else {"Replace", "ByteFallback", "Fuse", "Strip"}) or not (of_bytes or bpe.get("byte_fallback")):
            raise ValueError(f"decoder {'+'.join(sorted(kinds))} with this pre-tokenizer, or no byte_fallback, is not supported")
        normal = steps["normalizer"] + [step for step in steps["pre_tokenizer"] if step["type"] == "Metaspace"]
        normalize = normalizer_of(normal)
        normalize("a b", True)  # a step that lacks something: say so now
        text = lambda t: t["content"] if isinstance(t, dict) else t or ""
        eos = [i for t, i in (added | special).items() if t == text(extra.get("eos_token"))]
        eos += [i for i in ends if i not in eos]
        return Tokenizer(bpe["vocab"], merges, special, pattern, eos, template, text(extra.get("bos_token")), added,
                         template_of(steps["post_processor"]), normalize, whole, bpe.get("unk_token"),
                         bool(bpe.get("fuse_unk")), of_bytes, "Strip" in kinds)
