"""Text and tasks: Python's own documentation, a folder of benchmark files, or any text file.

    pydocs      the language reference inside CPython (`pydoc_data.topics`), no download: repeated paragraphs are
                dropped first, then about every fifth character is held out, topic by topic
    wikitext2   DIR/wikitext2/train.txt and test.txt, from --data-dir DIR
    lm          any UTF-8 text file, given by --file or --data: its last fifth is held out when one trains on it

Training and calibration read "train", reports read "test". Nothing is trained on a test split.
"""

from pathlib import Path

import torch


def read_text(path):
    """A UTF-8 text file -> str. FileNotFoundError or ValueError names the path and, for bad bytes, the place."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start}); convert it first") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; give a file with text")
    return text


def pydocs(split):
    """CPython's language reference, "train" or "test" -> str; no paragraph twice, in neither or both."""
    from pydoc_data.topics import topics

    seen, parts = set(), {"train": [], "test": []}
    size = {"train": 0, "test": 0}
    for name in sorted(topics):
        side = "test" if 4 * size["test"] < size["train"] else "train"
        for paragraph in topics[name].split("\n\n"):
            if paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                parts[side].append(paragraph)
                size[side] += len(paragraph)
    return "\n\n".join(parts[split])


def load_text(name, split, data_dir=None):
    """Text of "pydocs", "wikitext2" (needs data_dir) or a file, split "train" or "test" -> str."""
    if name == "pydocs":
        return pydocs(split)
    if name == "wikitext2":
        if data_dir is None:
            raise ValueError("wikitext2 needs --data-dir DIR with DIR/wikitext2/train.txt and test.txt")
        return read_text(Path(data_dir) / "wikitext2" / f"{split}.txt")
    if not Path(name).is_file():
        raise FileNotFoundError(f"unknown data {name!r}: give pydocs, wikitext2, or a text file")
    text = read_text(name)
    cut = len(text) * 4 // 5
    return text[:cut] if split == "train" else text[cut:]


def windows(tokenizer, text, n, size, where="the text", spread=False):
    """Non-overlapping windows of `size` tokens: (up to n, size) int64; from the start, or spread over the whole text.

    A text shorter than one window gives one shorter window; ValueError when it has fewer than two tokens.
    """
    ids = torch.tensor(tokenizer.encode(text))
    if len(ids) < 2:
        raise ValueError(f"{where} has {len(ids)} tokens, at least 2 are needed")
    if len(ids) < size:
        return ids[None]
    rows = ids[: len(ids) // size * size].view(-1, size)
    if spread:
        return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows))).round().long()]
    return rows[:n]
