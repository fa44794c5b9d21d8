"""Multiple-choice items: prompts, rows, likelihoods, labels, rewards and faults."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fisher
import reinforce
from baselines import compare
from data import item_examples, kl, load_articles, load_examples, load_items, load_text, outcomes, question, windows
from model import load
from policy import Fixed
from test_routing import random_policy

ITEMS = [{"question": "What sat on the mat?", "choices": ["the cat", "the dog ate the hat", "2024"], "answer": 0},
         {"subject": "high_school_mats", "question": "Who ate?", "choices": ["the dog", "cat"], "answer": 1}]
CLOSE = ITEMS[0] | {"choices": ["the cat ate", "the dog sat", "hat cat ate"]}  # whose answers are of much the same probability


def test_prompts_are_those_of_the_harness():
    assert question(ITEMS[0]) == ("Question: What sat on the mat?\nAnswer:", [" the cat", " the dog ate the hat", " 2024"])
    assert question(ITEMS[1]) == (
        "The following are multiple choice questions (with answers) about high school mats.\n\nWho ate?\nA. the dog\nB. cat\nAnswer:", [" A", " B"])


def test_a_file_may_have_blank_lines_and_odd_separators(tmp_path):
    odd = ITEMS[0] | {"question": "a\u2028b\x85c"}
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(odd, ensure_ascii=False) + "\n\n" + json.dumps(ITEMS[1]) + "\n", encoding="utf-8")
    assert load_items(file, None) == [odd | {"place": f"{file}, line 1"}, ITEMS[1] | {"place": f"{file}, line 3"}]


@torch.no_grad()
def test_likelihood_of_a_choice_is_the_sum_over_its_tokens(tiny):
    """Padded rows against every choice alone, and letters share one row."""
    model, tokenizer = load(str(tiny))
    for item, example in zip(ITEMS, item_examples(tokenizer, ITEMS, 512, "cpu")):
        logp, right = outcomes(model, model.hidden(example.rows), example)
        context, choices = question(item)
        alone = []
        for choice in choices:
            ids = torch.tensor(tokenizer.encode(context + choice))
            start = len(tokenizer.encode(context))
            scores = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            alone.append(scores[start - 1 :].sum())
        assert torch.allclose(logp[0], torch.stack(alone).log_softmax(-1), atol=1e-4)
        assert right.item() == item["answer"]
        assert len(example.rows) == (1 if "subject" in item else 3)


@torch.no_grad()
def test_accuracy_and_cost_count_no_padding(tiny):
    model, tokenizer = load(str(tiny))
    examples = item_examples(tokenizer, ITEMS, 512, "cpu")
    full, int4 = compare(model, examples, [None, Fixed([4, 1, 1, 1])])
    right = [outcomes(model, model.hidden(e.rows), e)[0].argmax().item() == e.answer for e in examples]
    assert full["accuracy"] == sum(right) / 2 and full["kl"] == 0 < int4["kl"]
    assert int4["raw"].shape == (4, sum(sum(e.lengths) for e in examples))


def labels_are_kl(model, example, labels, places):
    """Labels for INT8 in block 3 against the KL of running just this place (rows, token) so."""
    full, ratios = outcomes(model, model.hidden(example.rows), example)[0].detach().double(), []
    for label, (rows, t) in zip(labels, places):
        states = torch.full((4, *example.rows.shape), 4)
        states[2, rows, t] = 2
        routed = outcomes(model, model.hidden(example.rows, Fixed(states)), example)[0].double()
        ratios.append((label / kl(full, routed)).item())
    assert 0.5 < sorted(ratios)[len(ratios) // 2] < 2, ratios  # the second order of a whole step: right on the whole, not for every one


def test_fisher_label_of_an_item_is_the_kl_of_its_answer(tiny):
    model, tokenizer = load(str(tiny))
    model.quantize()
    [example] = item_examples(tokenizer, ITEMS[1:], 512, "cpu")
    generator = torch.Generator().manual_seed(0)
    labels = sum(fisher.fisher_labels(model, example, [1.0] * 4, generator)[0] for _ in range(200)) / 200
    assert labels.shape == (sum(example.lengths), 3, 3)
    top = labels[:, 1, 2].topk(5)
    labels_are_kl(model, example, top.values, example.keep().nonzero()[top.indices])


def test_a_question_opens_every_row_and_is_one_choice(tiny):
    """Its tokens run in the same states in all rows, which shifts the answers alike: the label is the KL of that, shared among the rows."""
    model, tokenizer = load(str(tiny))
    model.quantize()
    [example] = item_examples(tokenizer, [CLOSE], 512, "cpu")
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(*example.rows.shape, 3, 3)
    labels[example.keep()] = sum(fisher.fisher_labels(model, example, [1.0] * 4, generator)[0] for _ in range(200)) / 200
    asked = len(tokenizer.encode(question(CLOSE)[0]))
    assert torch.allclose(labels[:, :asked], labels[:1, :asked].expand(3, -1, -1, -1))
    assert torch.allclose(labels[0, asked], labels[1, asked]) and not torch.allclose(labels[0, asked], labels[2, asked])  # the "the" of two
    assert not torch.allclose(labels[0, asked + 1], labels[2, asked + 1])  # two cats, of which one is behind a hat
    top = labels[0, :asked, 1, 2].topk(5).indices
    labels_are_kl(model, example, labels[:, top, 1, 2].sum(0), [(slice(None), t) for t in top])


def test_one_slope_of_an_item_says_what_all_answers_would(tiny):
    """Squares of signed sums over the answers: their mean is the mean over drawn answers, with far less noise where one answer is likely."""
    model, tokenizer = load(str(tiny))
    [example] = item_examples(tokenizer, [CLOSE], 512, "cpu")
    hidden = model.hidden(example.rows).detach().requires_grad_()
    logp = outcomes(model, hidden, example)[0][0]
    slopes = torch.stack([torch.autograd.grad(v, hidden, retain_graph=True)[0] for v in logp])
    wanted = (logp.exp()[:, None, None, None] * slopes.square()).sum(0).detach()
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([fisher.drawn_slope(model, hidden.detach(), example, generator).square() for _ in range(400)])
    some = wanted > wanted.max() / 1000
    assert torch.allclose(found.mean(0)[some], wanted[some], rtol=0.1)


def test_reward_of_an_item_is_plus_or_minus_one(tiny):
    model, tokenizer = load(str(tiny))
    policy = random_policy(model, 0)
    policy.__class__, policy.tau, policy.generator = reinforce.Rollout, 1.0, torch.Generator().manual_seed(0)
    for example in item_examples(tokenizer, ITEMS, 512, "cpu"):
        r_acc, states, of_tokens = reinforce.reward_of(model, example, policy)
        N = sum(example.lengths)
        assert r_acc.shape == (reinforce.ROLLOUTS, N) and set(r_acc.unique().tolist()) <= {-1.0, 1.0} and (r_acc == r_acc[:, :1]).all()
        assert states.shape == (4, reinforce.ROLLOUTS, N) and of_tokens(policy.log_pi()).shape == (3, reinforce.ROLLOUTS, N)


@pytest.mark.parametrize("line, word", [("{", "line 2"), ('{"question": "a", "choices": ["b"], "answer": 0}', "choices"),
                                        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "answer"), ("[]", "line 2"),
                                        ('{"question": "a", "subject": 3, "choices": ["b", "c"], "answer": 1}', "subject"),
                                        ('{"question": "a", "choices": {"text": "b", "label": "c"}, "answer": 1}', "choices"),
                                        ('{"question": "a", "choices": {"text": ["b", "c"], "label": null}, "answerKey": "A"}', "line 2"),
                                        ('{"question": "a", "choices": {"text": ["b", "c"], "label": "AB"}, "answerKey": "A"}', "labels"),
                                        ('{"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "A"]}, "answerKey": "A"}', "labels"),
                                        ('{"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "A", "B"]}, "answerKey": "A"}', "labels"),
                                        ('{"question": "a", "choices": {"text": ["b", "c"], "label": ["A"]}, "answerKey": "A"}', "labels"),
                                        ('{"question": "a", "choices": ["b", "c"], "answer": 0, "answer": 1}', "twice"),
                                        ('{"question": "a", "choices": ["b", " "], "answer": 1}', "a choice is empty"),
                                        ('{"question": "a", "choices": ["b", "\\ud800"], "answer": 1}', "surrogate"),
                                        ("null", "no JSON object"), ("3", "no JSON object")])
def test_bad_items_are_named(tmp_path, line, word):
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(ITEMS[0]) + "\n" + line)
    with pytest.raises(ValueError, match="items.jsonl") as e:
        load_items(file, None)
    assert word in str(e.value)


def test_a_long_question_loses_its_beginning():
    """As in lm-evaluation-harness: the choice and as much before it as fits. A choice that does not fit itself is an error."""
    by_byte = type("T", (), {"encode_prompt": staticmethod(lambda text: list(text.encode()))})()
    item = {"question": "Where did the cat sit?", "choices": ["mat", "lap of the dog"], "answer": 0, "place": "some.jsonl, line 3"}
    context = len("Question: Where did the cat sit?\nAnswer:")
    [example] = item_examples(by_byte, [item], 20, "cpu")
    for (row, start, ids), choice in zip(example.choices, (" mat", " lap of the dog")):
        assert bytes(ids.tolist()).decode() == choice and start == 20 - len(choice) + 1
        text = bytes(example.rows[row, : example.lengths[row]].tolist()).decode()
        assert text == f"Question: {item['question']}\nAnswer:{choice}"[-21:-1]
    [whole] = item_examples(by_byte, [item], 100, "cpu")
    assert all(start == context for _, start, _ in whole.choices)
    with pytest.raises(ValueError, match="some.jsonl, line 3: .* context of 10"):
        item_examples(by_byte, [item], 10, "cpu")


def test_one_item_is_too_few_to_learn_from(tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps(ITEMS[0]))
    assert len(load_items(tmp_path / "one.jsonl", None)) == 1
    with pytest.raises(ValueError, match="at least 2"):
        load_items(tmp_path / "one.jsonl", "test")


def test_a_jsonl_file_may_be_read_as_text(tmp_path, tiny):
    (tmp_path / "notes.jsonl").write_text('{"text": "the cat sat on the mat"}\n')
    _, tokenizer = load(str(tiny))
    [example] = load_examples(tmp_path / "notes.jsonl", None, tokenizer, 1, 512, choice=False)
    assert tokenizer.decode(example.rows[0].tolist()) == (tmp_path / "notes.jsonl").read_text()


def test_encodings(tmp_path):
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ITEMS[0]).encode())
    assert len(load_items(tmp_path / "mark.jsonl", None)) == 1
    (tmp_path / "latin.txt").write_bytes("one\ntwo\nna\u00efve".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt, line 3"):
        load_text(tmp_path / "latin.txt", None)
    (tmp_path / "wide.txt").write_bytes("one\ntwo".encode("utf-16-le"))
    with pytest.raises(ValueError, match="wide.txt, line 1, has a zero byte"):
        load_text(tmp_path / "wide.txt", None)


def test_only_the_prompts_of_mmlu_name_a_subject(tmp_path):
    for task in ("mmlu", "arc_easy"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "test.jsonl").write_text(json.dumps(ITEMS[1]))
    assert "subject" in load_items("mmlu", "test", tmp_path)[0] and "subject" not in load_items("arc_easy", "test", tmp_path)[0]
    (tmp_path / "mmlu" / "test.jsonl").write_text(json.dumps(ITEMS[0]))
    with pytest.raises(ValueError, match="test.jsonl, line 1: .*subject"):
        load_items("mmlu", "test", tmp_path)


def test_bad_articles_are_named(tmp_path):
    good = {"id": "1", "article": "The cat sat .", "highlights": "Cat ."}
    (tmp_path / "cnn_dm").mkdir()
    file = tmp_path / "cnn_dm" / "test.jsonl"
    file.write_text(json.dumps(good) + "\n\n" + json.dumps(good))
    assert load_articles("test", tmp_path) == [good, good]
    for line in ('{"id": "1", "article": 3, "highlights": "x"}', "[]", "{", '{"article": "a", "highlights": "b"}'):
        file.write_text(json.dumps(good) + "\n" + line)
        with pytest.raises(ValueError, match="test.jsonl, line 2"):
            load_articles("test", tmp_path)


@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "mmlu", "mmlu_5shot"])
def test_answers_are_those_of_lm_evaluation_harness(task, tiny, data_dir, tmp_path):
    """The same 100 items (25 after five examples) by the harness, with its own prompts, on transformers: the same answers, but for two."""
    harness = pytest.importorskip("lm_eval", reason="pip install lm_eval to compare with lm-evaluation-harness")
    import yaml
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    shots, folder = 5 if task == "mmlu_5shot" else 0, Path(harness.__file__).parent / "tasks"
    items = load_items(task, "test", data_dir)
    items = [item for item in items if item.get("subject") in (None, items[0].get("subject"))] if shots else items
    items = items[: 25 if shots else 100]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({k: v for k, v in i.items() if k != "shots"}) for i in items))
    files = {"test": str(tmp_path / "test.jsonl")}
    if "mmlu" in task:
        config = yaml.safe_load((folder / "mmlu" / "default" / "_default_template_yaml").read_text())
        config |= {"description": "The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\n\n"}
        if shots:
            (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, items[0]["shots"])))
            files["dev"] = str(tmp_path / "dev.jsonl")
    else:
        config = yaml.safe_load((folder / "arc" / "arc_easy.yaml").read_text()) | {"doc_to_target": "{{answer}}", "doc_to_choice": "{{choices}}"}
    config |= {"task": task, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "num_fewshot": shots}
    config = {k: v for k, v in config.items() if k not in ("training_split", "validation_split", "tag") and (shots or "fewshot" not in k)}
    theirs = evaluate(HFLM(pretrained=str(tiny), device="cpu", max_length=512), {task: ConfigurableTask(config=config)}, log_samples=True)
    model, tokenizer = load(str(tiny))
    agree, off = 0, 0.0
    for sample, example in zip(theirs["samples"][task], item_examples(tokenizer, items, 512, "cpu")):
        scores = torch.tensor([r[0][0] for r in sample["resps"]]).log_softmax(-1)
        ours = outcomes(model, model.hidden(example.rows), example)[0][0]
        agree, off = agree + int(ours.argmax() == scores.argmax()), max(off, (ours - scores).abs().max().item())
    assert len(theirs["samples"][task]) == len(items) and agree >= len(items) - 2 and off < 1e-3, (agree, off)


def test_what_is_trained_on_and_what_is_tested(tmp_path):
    text = "".join(chr(97 + n % 26) for n in range(1000))
    (tmp_path / "a.txt").write_text(text)
    train, test = (load_text(tmp_path / "a.txt", split) for split in ("train", "test"))
    assert train + test == text and len(test) == 200
    items = [{"question": str(n), "choices": ["a", "b"], "answer": 0} for n in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, items)))
    train, test = ([i["question"] for i in load_items(tmp_path / "a.jsonl", split)] for split in ("train", "test"))
    assert train == list("01234567") and test == list("89")


def test_windows_from_the_start_or_spread():
    bytewise = SimpleNamespace(encode_prompt=lambda text: list(text.encode()))
    text = "".join(chr(97 + n) * 4 for n in range(20))
    first = lambda **how: [chr(row[0]) for row in windows(bytewise, text, 3, 4, **how)]
    assert first() == ["a", "b", "c"] and first(spread=True) == ["a", "k", "t"]
