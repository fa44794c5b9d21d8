"""Direct multi-token decoding: cycles of one are the model itself, decoding is the parallel form, its cost, and what training does."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

import multitoken
from common import Checkpoint
from data import load_text, windows
from infer import generate
from model import KVCache, load

IDS = [7, 100, 23, 5, 280, 61, 9]


@pytest.fixture
def model(tiny):
    return load(str(tiny))[0]


def text_windows(tiny, text):
    tokenizer = load(str(tiny))[1]
    return [windows(tokenizer, load_text(text, split), 100, 48) for split in ("train", "test")]


def test_cycles_of_one_are_plain_greedy_generation(tiny):
    model, tokenizer = load(str(tiny))
    tokenizer = copy.copy(tokenizer)
    tokenizer.eos = ()
    prompt = "the cat sat on the mat"
    out = multitoken.decode(model, tokenizer.encode(prompt, add_special_tokens=True), 1, 30, late=2)
    assert out["tokens"] == generate(model, tokenizer, prompt, max_new_tokens=30)["tokens"]
    assert out["passes"] == out["token_blocks"] == 4
    tokens = torch.tensor([IDS])
    assert torch.equal(multitoken.hidden(model, tokens, 1, 2), model.hidden(tokens))


@torch.no_grad()
@pytest.mark.parametrize("tau", [2, 3, 4])
@pytest.mark.parametrize("late", [1, 3])
def test_decoding_with_a_cache_is_the_parallel_form(model, tau, late):
    """The logits of every decoded token, any length of prompt; and they are not those of the full model."""
    for P in range(1, len(IDS) + 1):
        out = multitoken.decode(model, IDS[:P], tau, 14, late)
        tokens = torch.tensor([IDS[:P] + out["tokens"][:-1]])
        want = model.head(multitoken.hidden(model, tokens, tau, late, phase=P - 1))[0, P - 1 :]
        torch.testing.assert_close(out["logits"], want, atol=1e-4, rtol=1e-4)
        assert out["tokens"] == want.argmax(-1).tolist()
    assert not torch.allclose(out["logits"], model(tokens)[0, P - 1 :], atol=1e-2)


@torch.no_grad()
def test_what_a_later_token_sees(model):
    """By hand, tau 2: late blocks on the embedding of the second token; its early blocks do not matter until the next head."""
    tokens, early, late, rope = torch.tensor([IDS[:2]]), model.blocks[:2], model.blocks[2:], model.rope(0, 2)
    state, cache = [(4, None)], KVCache(model, 1, 2)
    x = model.embed(tokens[0, :1])
    for i, block in enumerate(model.blocks):
        x = block(x, 1, state, 1.0, [t[:1] for t in rope], cache, i)
    cache.length, x = 1, model.embed(tokens[0, 1:])
    for i, block in enumerate(late, len(early)):
        x = block(x, 1, state, 1.0, [t[1:] for t in rope], cache, i)
    torch.testing.assert_close(multitoken.hidden(model, tokens, 2, 2)[0, 1:], model.norm(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(multitoken.hidden(model, tokens, 2, 2, phase=1), model.hidden(tokens))  # the first is always a head


@pytest.mark.parametrize("tau, late", [(2, 1), (3, 2), (4, 1)])
def test_cost(model, tau, late):
    """Whole cycles after the prompt. Passes are counted as the blocks are called; refilled, every token runs every block but those of
    its own cycle's end."""
    calls, counted = [], multitoken.run
    def count(blocks, x, *more):
        calls.append((len(blocks), len(x)))
        return counted(blocks, x, *more)
    multitoken.run = count
    try:
        out = multitoken.decode(model, IDS, tau, 1 + 5 * tau, late)
    finally:
        multitoken.run = counted
    L, tokens, calls = 4, 5 * tau, calls[2:]  # two calls for the prompt
    assert out["passes"] == pytest.approx((L + (tau - 1) * late) / tau) == sum(n for n, _ in calls) / tokens
    assert out["token_blocks"] == pytest.approx(L) == sum(n * rows for n, rows in calls) / tokens


@torch.no_grad()
def test_nats_by_place(model):
    rows, first = torch.randint(320, (5, 20), generator=torch.Generator().manual_seed(0)), 5
    found, full = multitoken.nats_by_place(model, rows, 3, 2, first), multitoken.nats_by_place(model, rows, 1, 2, first)
    want = -model(rows)[:, first:-1].log_softmax(-1).gather(2, rows[:, first + 1 :, None])[..., 0].mean(1)
    torch.testing.assert_close(full[0], want)
    by_hand = torch.zeros(3, 5)
    for t in range(first, 19):
        for place in range(3):
            logits = model.head(multitoken.hidden(model, rows, 3, 2, phase=t - place))[:, t]
            by_hand[place] -= logits.log_softmax(-1).gather(1, rows[:, t + 1, None])[:, 0] / (19 - first)
    torch.testing.assert_close(found, by_hand)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_training_lowers_the_loss_of_later_places(model, tiny, some_text, tmp_path):
    train, test = text_windows(tiny, str(some_text))
    before = {k: p.clone() for k, p in model.named_parameters()}
    was = multitoken.nats_by_place(model, test, 3, 2, 3).mean(1)
    multitoken.finetune(model, train, 3, 2, 40, Checkpoint(tmp_path / "c", {}, 0, False), lr=3e-3)
    now = multitoken.nats_by_place(model, test, 3, 2, 3).mean(1)
    assert (now < was - 0.5).all(), (was, now)
    changed = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert changed == {k for k in before if k.startswith(("blocks.2.", "blocks.3."))}
    assert not any(p.requires_grad for p in model.parameters())


def test_killed_training_resumes_to_the_same_weights(tiny, some_text, tmp_path, monkeypatch):
    """Killed between two saves, where the random numbers and the optimizer are further than the checkpoint."""
    train, _ = text_windows(tiny, str(some_text))

    class Killed(Exception):
        pass

    def trained(path, resume, at=None):
        model, calls = load(str(tiny))[0], []
        def hidden(*args):
            calls.append(0)
            if len(calls) == at:
                raise Killed
            return original(*args)
        original = multitoken.hidden
        monkeypatch.setattr(multitoken, "hidden", hidden)
        try:
            multitoken.finetune(model, train, 2, 2, 60, Checkpoint(tmp_path / path, {"tau": 2}, 3, resume))
        finally:
            monkeypatch.setattr(multitoken, "hidden", original)
        return model.state_dict(), len(calls)

    whole, _ = trained("whole", False)
    with pytest.raises(Killed):
        trained("parts", False, at=32)
    resumed, steps = trained("parts", True)
    assert steps == 35 and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_the_command(tiny, some_text, tmp_path, monkeypatch, capsys):
    """The whole of it writes a table and a picture; again with --resume nothing is trained and the quality is the same."""
    monkeypatch.setattr(multitoken, "load_text", lambda name, split, folder: load_text(str(some_text), split))
    monkeypatch.setattr(multitoken, "WINDOW", 48)
    args = SimpleNamespace(model=str(tiny), data_dir=None, steps=8, limit=3, rounds=1, out=tmp_path / "out", resume=False, task=None, full=False,
                           results=tmp_path, seed=0, device="cpu", json=False)
    multitoken.multitoken(args)
    result = json.loads((tmp_path / "multitoken.json").read_text())
    rows = result["rows"]
    assert [r["tau"] for r in rows] == [1, 2, 3, 4] and (tmp_path / "multitoken.png").stat().st_size > 10000
    assert result["markdown"] in capsys.readouterr().out and result["markdown"].count("\n") == 5
    assert [r["passes"] for r in rows] == pytest.approx([1, 5 / 8, 6 / 12, 7 / 16]) and all(r["token_blocks"] == 1 for r in rows)
    assert all(len(r["after"]) == r["tau"] and r["after"] != r["before"] and r["faster"] > 0 for r in rows)
    monkeypatch.setattr(torch.optim.AdamW, "step", None)  # to call it would be an error
    args.resume = True
    monkeypatch.setattr(multitoken, "lock_folder", lambda path: path)  # this process holds it
    multitoken.multitoken(args)
    again = json.loads((tmp_path / "multitoken.json").read_text())["rows"]
    assert all(a["after"] == b["after"] and a["before"] == b["before"] and a["text"] == b["text"] for a, b in zip(rows, again))
    for change in ((args, "steps", 9), (multitoken, "load_text", lambda *of: load_text(str(some_text), "test"))):
        with monkeypatch.context() as changed, pytest.raises(ValueError, match="other settings"):
            changed.setattr(*change)
            multitoken.multitoken(args)
    args.resume, files = False, sorted((tmp_path / "out").iterdir())
    with monkeypatch.context() as changed, pytest.raises(ValueError, match="give at least 1"):
        changed.setattr(multitoken, "NEW", 1000)  # more than the context holds: refused, and what is there is kept
        multitoken.multitoken(args)
    assert sorted((tmp_path / "out").iterdir()) == files and len(files) == 4


@pytest.mark.parametrize(
    "ids, tau, n, late", [([], 2, 4, 1), (IDS, 0, 4, 1), (IDS, 2, 4, 4), (IDS, 2, 4, 0), (IDS, 2, 1, 1), (IDS, 2, 600, 1)])
def test_what_cannot_be_decoded(model, ids, tau, n, late):
    with pytest.raises(ValueError, match="give at least 1"):
        multitoken.decode(model, ids, tau, n, late)


def test_what_cannot_be_measured(model):
    with pytest.raises(ValueError, match="too short"):
        multitoken.nats_by_place(model, torch.zeros(2, 5, dtype=torch.int64), 4, 1, 4)
    assert [multitoken.in_proportion(L) for L in (4, 30, 36)] == [1, 7, 8]
