"""Text and tasks: Python's own documentation, a folder of benchmark files, or any text file.

    pydocs      the language reference inside CPython (`pydoc_data.topics`), no download: repeated paragraphs are
                dropped first, then about every fifth character is held out, topic by topic
    wikitext2   DIR/wikitext2/train.txt and test.txt, from --data-dir DIR, or from the hub
    lm          any UTF-8 text file, given by --file or --data: its last fifth is held out when one trains on it
    arc_easy, arc_challenge, mmlu    multiple choice: DIR/TASK/train.jsonl and test.jsonl, from --data-dir DIR, or from the hub
    mmlu_5shot  mmlu after five examples of the subject, from DIR/mmlu/dev.jsonl, or from the hub
    cnn_dm      articles to summarise: DIR/cnn_dm/train.jsonl and test.jsonl, {"id", "article", "highlights"}, or from the hub
    mc          any JSONL of items, {"question", "choices", "answer": index} and for mmlu's prompt "subject"

From the hub means parquet files (`HUB`), read with the package pyarrow: the rows are those of --data-dir. mmlu has no training split
of its own kind, so its validation split is "train".

Multiple choice is scored by the likelihood of each choice after the question, with the prompts of lm-evaluation-harness
(Gao et al., EleutherAI). Training and calibration read "train", reports read "test". Nothing is trained on what it is tested on.
"""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from common import reason
from weights import hub_snapshot


HUB = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "cnn_dm": ("abisee/cnn_dailymail", "3.0.0"), "mmlu": ("cais/mmlu", "all"),
       "arc_easy": ("allenai/ai2_arc", "ARC-Easy"), "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge")}


def hub_rows(name, split):
    """A data set of `HUB` -> yields its rows, dicts. ValueError or OSError names pyarrow or --data-dir as the remedy."""
    repo, part = HUB[name]
    remedy = f"or give --data-dir DIR with DIR/{name}/{split}.{'txt' if name == 'wikitext2' else 'jsonl'}"
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{name} comes from the hub as parquet: pip install pyarrow, {remedy}") from None
    files = f"{part}/{'validation' if (name, split) == ('mmlu', 'train') else split}-*.parquet"
    try:
        found = sorted(hub_snapshot(repo, [files], "dataset").glob(files))
        if not found:
            raise FileNotFoundError(f"{repo} has no {files}")
        for file in found:
            for batch in parquet.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
    except (ValueError, OSError, ArrowException) as e:
        raise OSError(f"{name}: {str(e).splitlines()[0]}; {remedy}") from None


def rows_of(name, split=None, data_dir=None):
    """Rows of a data set of `HUB`, from data_dir or the hub, or of a JSONL file: yields (its place, for errors, the row)."""
    if name in HUB and data_dir is None:
        yield from ((f"{name} from the hub, {split}, row {n}", row) for n, row in enumerate(hub_rows(name, split), 1))
        return
    path = Path(data_dir) / name / f"{split}.jsonl" if name in HUB else Path(name)
    for n, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: a text may hold other separators
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=once)
                if not isinstance(row, dict):
                    raise ValueError("no JSON object")
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{path}, line {n}: {e!r}; expected JSON") from None
            yield f"{path}, line {n}", row


def once(pairs):
    """What of JSON's (key, value) pairs makes a dict; ValueError where it would lose one."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key stands twice")
    return row


def read_text(path):
    """A UTF-8 text file -> str. FileNotFoundError or ValueError names the path and, for bad bytes, the place."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a file; give one that is there")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}, line {e.object[: e.start].count(10) + 1}, is not UTF-8 text (byte {e.start}); convert it first") from None
    if "\0" in text:  # every second byte of English in UTF-16
        raise ValueError(f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1}, has a zero byte: this is UTF-16, or no text; convert it first")
    if not text.strip():
        raise ValueError(f"{path} is empty; give a file with text")
    return text


def pydocs(split):
    """CPython's language reference, "train" or "test" -> str; no paragraph twice, in neither or both."""
    from pydoc_data.topics import topics

    seen = set()
    parts = {"train": [], "test": []}
    size = {"train": 0, "test": 0}
    for name in sorted(topics):
        side = "test" if 4 * size["test"] < size["train"] else "train"
        for paragraph in topics[name].split("\n\n"):
            if paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                parts[side].append(paragraph)
                size[side] += len(paragraph)
    return "\n\n".join(parts[split])


CHOICE_TASKS = ("arc_easy", "arc_challenge", "mmlu", "mmlu_5shot")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def is_choice(name, choice=None):
    """Whether a task or a file holds items; `choice` decides it if it is given."""
    return name in CHOICE_TASKS or str(name).lower().endswith(".jsonl") if choice is None else choice


def load_text(name, split, data_dir=None, choice=None):
    """Text of "pydocs", "wikitext2", "cnn_dm", a file, or multiple-choice items with their right answers -> str.

    split: "train", "test", or None for a whole file; choice: whether a file holds items, by default if its name ends in .jsonl.
    """
    if name == "pydocs":
        return pydocs(split)
    if is_choice(name, choice):
        parts = [(question(item), item["answer"]) for item in load_items(name, split, data_dir)]
        return "\n\n".join(context + choices[answer] for (context, choices), answer in parts)
    if name == "cnn_dm":
        most = 2000  # the hub has 287,000 to train on, gigabytes for a few windows; a folder's are all looked at
        articles = load_articles(split, data_dir, most if data_dir is None else None)[:most]
        return "\n\n".join(f"{a['article']}\n\nTL;DR: {a['highlights']}" for a in articles)
    if name == "wikitext2":
        if data_dir is None:
            return "".join(row["text"] for row in hub_rows(name, split))
        return read_text(Path(data_dir) / "wikitext2" / f"{split}.txt")
    if not Path(name).is_file():
        what = f"{name} is a folder" if Path(name).is_dir() else f"unknown data {name!r}"
        raise FileNotFoundError(f"{what}: give pydocs, wikitext2, cnn_dm, {', '.join(CHOICE_TASKS)}, or a file that is there")
    text = read_text(name)
    cut = len(text) * 4 // 5
    return text if split is None else text[:cut] if split == "train" else text[cut:]


def load_items(name, split, data_dir=None):
    """Multiple-choice items of a task, from data_dir or the hub, or of a JSONL file: [{"question", "choices", "answer",
    "place"}], of mmlu with "subject", of mmlu_5shot with "shots"; place says which file and line it is from.

    A file's last fifth is "test", the rest "train"; split None gives all. Errors name the path and the line.
    """
    items = []
    for place, item in rows_of("mmlu" if name == "mmlu_5shot" else name, split, data_dir):
        try:
            if "answerKey" in item:  # ARC as the hub has it
                labels, texts = item["choices"]["label"], item["choices"]["text"]
                if type(labels) is not list or not len(set(labels)) == len(labels) == len(texts):
                    raise ValueError("the labels do not fit the choices")
                item = {"question": item["question"], "choices": texts, "answer": labels.index(item["answerKey"])}
            choices, answer = item["choices"], item["answer"]
            texts = [item["question"], item.get("subject", ""), *choices]
            if type(choices) is not list or not all(isinstance(t, str) for t in texts) or not 2 <= len(choices) <= len(LETTERS):
                raise ValueError(f"question, subject or choices are no text, or not 2 to {len(LETTERS)} choices")
            if not all(choice.strip() for choice in choices):
                raise ValueError("a choice is empty")
            if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
                raise ValueError("half a character: a surrogate stands alone")
            if type(answer) is not int or not 0 <= answer < len(choices):
                raise ValueError(f"answer {answer!r:.60} is no index of the choices")
            if name in ("mmlu", "mmlu_5shot"):
                item["subject"]  # which its prompt names
            kept = ("question", "choices", "answer") if name in ("arc_easy", "arc_challenge") else ("subject", "question", "choices", "answer")
            items.append({key: item[key] for key in kept if key in item} | {"place": place})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{place}: {reason(e)}; expected {{question, choices: [text, ...], answer: index}}") from None
    if name == "mmlu_5shot":
        dev = load_items("mmlu", "dev", data_dir)
        for item in items:
            item["shots"] = [shot for shot in dev if shot.get("subject", "") == item.get("subject")][:5]
            if len(item["shots"]) < 5:
                raise ValueError(f"mmlu's dev split has {len(item['shots'])} examples of {item.get('subject')!r}, mmlu_5shot needs 5")
    if name in CHOICE_TASKS or split is None:
        return items
    if len(items) < 2:
        raise ValueError(f"{name} has {len(items)} item; one learns from four fifths of a file and reports the rest, so give at least 2")
    cut = len(items) * 4 // 5
    return items[:cut] if split == "train" else items[cut:]


def load_articles(split, data_dir=None, most=None):
    """The first `most` articles of cnn_dm, or all, from data_dir or the hub: [{"id", "article", "highlights"}]. Errors name path and line."""
    rows = []
    for place, row in itertools.islice(rows_of("cnn_dm", split, data_dir), most):
        if not all(isinstance(row.get(k), str) and row[k].strip() for k in ("id", "article", "highlights")):
            raise ValueError(f"{place}: expected {{id, article, highlights}}, all text and none empty")
        rows.append(row)
    return rows


def question(item):
    """An item -> (context, [continuation of each choice]): for mmlu the letters, else the choices themselves."""
    if "subject" in item:
        listed = lambda item: "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, item["choices"]))
        asked = lambda item: f"{item['question'].strip()}\n{listed(item)}Answer:"
        head = f"The following are multiple choice questions (with answers) about {item['subject'].replace('_', ' ')}.\n\n"
        shots = "".join(f"{asked(shot)} {LETTERS[shot['answer']]}\n\n" for shot in item.get("shots", []))
        return head + shots + asked(item), [f" {letter}" for letter in LETTERS[: len(item["choices"])]]
    return f"Question: {item['question']}\nAnswer:", [f" {choice}" for choice in item["choices"]]


@dataclass
class Example:
    """What a model is run on and what it is to predict: a window of text, or the rows of one multiple-choice item."""

    rows: torch.Tensor  # (R, T) int64, padded with 0 at the end
    lengths: list  # of the R rows
    choices: list = None  # items: of each choice (row, start, its ids (n,) int64); None for text
    answer: int = 0  # items: index of the right choice

    def keep(self):
        """(R, T) bool: the tokens that are no padding."""
        return torch.arange(self.rows.shape[1], device=self.rows.device) < torch.tensor(self.lengths, device=self.rows.device)[:, None]


def n_tokens(examples):
    """How many tokens examples have in all, padding left out."""
    return sum(sum(e.lengths) for e in examples)


def outcomes(model, hidden, example):
    """What an example predicts, from its last hidden states (R, T, C): log-probabilities (n, k) and the right ones (n,).

    Text: every next token, k the vocabulary. Multiple choice: n = 1, k choices, each by its likelihood after the question.
    """
    if example.choices is None:
        return model.head(hidden[0, :-1]).float().log_softmax(-1), example.rows[0, 1:]
    total = []
    for row, start, ids in example.choices:
        logp = model.head(hidden[row, start - 1 : start - 1 + len(ids)]).float().log_softmax(-1)
        total.append(logp.gather(1, ids[:, None]).sum())
    return torch.stack(total)[None].log_softmax(-1), torch.tensor([example.answer], device=hidden.device)


def kl(full, routed):
    """KL(full || routed) in nats from log-probabilities (..., vocab) -> (...)."""
    return (full.exp() * (full - routed)).sum(-1)


def text_examples(rows):
    """Windows (n, T) -> one Example each."""
    return [Example(row[None], [len(row)]) for row in rows]


PIECE = 128  # tokens of a sequence, where a window is too long to be one


def pieces(examples):
    """Windows of text -> sequences of PIECE tokens; items are sequences as they are."""
    if examples[0].choices is not None:
        return examples
    size = min(PIECE, examples[0].rows.shape[1])
    return text_examples(torch.cat([row for e in examples for row in e.rows.split(size, 1) if row.shape[1] == size]))


def item_examples(tokenizer, items, longest, device):
    """Items -> Examples; choices that differ in their last token only share one row. ValueError names the place of an item whose choice
    is too long or has no token."""
    out = []
    for item in items:
        context, choices = question(item)
        start = len(tokenizer.encode_prompt(context))
        rows, spans = [], []
        for choice in choices:
            ids = tokenizer.encode_prompt(context + choice)
            if len(ids) <= start:  # a sum over nothing would be the likeliest of all
                raise ValueError(f"{item['place']}: the choice {choice[1:]!r} adds no token, so it has no likelihood")
            cut = max(0, len(ids) - 1 - longest)  # as the harness does, a question that is too long loses its beginning
            if cut >= start:
                raise ValueError(f"{item['place']}: a choice of {len(ids) - start} tokens does not fit into the context of {longest}")
            row = ids[cut:-1]
            if row not in rows:
                rows.append(row)
            spans.append((rows.index(row), start - cut, torch.tensor(ids[start:], device=device)))
        padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, ids in zip(padded, rows):
            row[: len(ids)] = torch.tensor(ids)
        out.append(Example(padded.to(device), [len(ids) for ids in rows], spans, item["answer"]))
    return out


def load_examples(name, split, tokenizer, n, size, data_dir=None, device="cpu", spread=False, choice=None):
    """Up to n Examples, on the device, of a task or file (see `load_text`, also for `choice`): windows of `size` tokens, or items of at
    most `size` tokens. spread: windows over the whole text, not from its start."""
    if is_choice(name, choice):
        items = load_items(name, split, data_dir)
        if name in CHOICE_TASKS and data_dir is None:
            random.Random(0).shuffle(items)  # the hub has mmlu subject by subject, and the first few are to stand for all
        return item_examples(tokenizer, items[:n], size, device)
    return text_examples(windows(tokenizer, load_text(name, split, data_dir, choice), n, size, name, spread).to(device))


def windows(tokenizer, text, n, size, where="the text", spread=False):
    """Non-overlapping windows of `size` tokens: (up to n, size) int64; from the start, or spread over the whole text.

    A text shorter than one window gives one shorter window; ValueError when it has fewer than two tokens.
    """
    ids = torch.tensor(tokenizer.encode_prompt(text))
    if len(ids) < 2:
        raise ValueError(f"{where} has {len(ids)} tokens, at least 2 are needed")
    if len(ids) < size:
        return ids[None]
    rows = ids[: len(ids) // size * size].view(-1, size)
    if spread:
        return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows))).round().long()]
    return rows[:n]
