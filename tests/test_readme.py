"""The README and the page of all results say what results/ says, and their commands exist."""

import json
import math
import re
import shlex

from bench import PAGES, render
from charts import source_of
from conftest import ROOT, script

TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}


def test_tables_are_those_of_results():
    assert render(TEXTS, ROOT / "results") == TEXTS, "run python bench.py report"
    shown = re.findall(r"<!-- ([\w-]+) -->\n(?!<!-- /)", "\n".join(TEXTS.values()))
    assert len(shown) > 20 and all((ROOT / "results" / f"{name}.json").exists() for name in shown), shown


def rows_of(name):
    return {r["name"].split(" at ")[0]: r for r in json.loads((ROOT / f"results/{name}.json").read_text())["rows"]}


def kl_share(name):
    """DASH's KL over the static plan's, as the prose has it."""
    rows = rows_of(name)
    return f"{rows['DASH']['kl'] / rows['static, same cost']['kl']:.2f}"


def test_numbers_between_the_tables_are_those_of_results():
    text = " ".join(TEXTS["README.md"].split())
    whole, horizon1, horizon15, fisher = (f"train-wikitext2{more}" for more in ("", "-horizon1", "-horizon15", "-rl-fisher"))
    reached = lambda name: f"{rows_of(name)['DASH']['speedup']:.2f}x"
    frontier = json.loads((ROOT / "results/frontier-wikitext2.json").read_text())["rows"]
    lost = {r["target"]: math.expm1(r["nats"] - frontier[0]["nats"]) for r in frontier if r["method"].startswith("dash, horizon 30")}
    base, docs = rows_of("train-wikitext2-base"), json.loads((ROOT / "results/frontier-lm.json").read_text())["rows"]
    of = lambda method, rows: [r["kl"] for r in rows if r["method"] == method]
    left, on_docs = ([a / b for a, b in zip(of("dash, horizon 30, seed 0", rows), of("best static plan", rows))] for rows in (frontier, docs))
    for said in (f"loses {min(left):.2f} to {max(left):.2f} of the KL that the best static plan loses",
                 f"loses {', '.join(f'{v:.2f}' for v in on_docs)} of the static plan's KL at these speedups",
                 f"three seeds: {', '.join(kl_share(f'{whole}{seed}') for seed in ('', '-seed1', '-seed2'))} of its KL",
                 f"{kl_share(fisher)} of the static plan's KL at {reached(fisher)}, before it {kl_share(whole)}",
                 "it keeps {}, {} and {} of the static plan's KL at 2.67x, with all three {}:".format(
                     *(kl_share(f"{whole}-rl{off}") for off in ("-lam0", "-beta0", "-weights0", ""))),
                 "{:.2f} nats less. What routing at 2.67x costs does not shrink: KL {:.4f} before, {:.4f} after".format(
                     base["before training the base: full"]["nats"] - base["full model"]["nats"], base["before: DASH"]["kl"], base["DASH"]["kl"]),
                 f"{kl_share(horizon1)} of the static plan's KL at {reached(horizon1)}, where one plan is left with {kl_share(whole)} at {reached(whole)}, "
                 f"two plans a token with {kl_share(horizon15)} at {reached(horizon15)}",
                 f"rises by {100 * lost[2.0]:.1f}% at 2x (the goal was 0.5%), by {100 * lost[2.67]:.1f}% at 2.67x (1%) and by {100 * lost[3.2]:.1f}% at 3.2x"):
        assert said in text, said


def test_a_result_without_a_place_is_named(tmp_path):
    (tmp_path / "results").mkdir()
    for page, text in TEXTS.items():
        (tmp_path / page).write_text(text, encoding="utf-8")
    (tmp_path / "results" / "owl.json").write_text('{"caption": "An owl."}')
    done = script("bench.py", "report", cwd=tmp_path)
    assert done.returncode == 0 and "owl.json" in done.stdout, done.stderr
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == TEXTS["README.md"]


def test_commands_take_the_options_that_the_readme_shows():
    lines = re.findall(r"python (?:train|infer|bench)\.py[^`\n|)&]*", "\n".join(TEXTS.values()))
    assert len(lines) > 5
    helps = {name: script(name, "--help").stdout for name in ("train.py", "infer.py", "bench.py")}
    for line in lines:
        words = shlex.split(line)
        for word in words[2:]:
            assert not word.startswith("--") or word in helps[words[1]], line


def test_pictures_are_drawn_from_results():
    """A picture names the hash of the file that it shows."""
    from PIL import Image

    shown = {name for text in TEXTS.values() for name in re.findall(r"\(([^)]+\.png)\)", text)}
    assert len(shown) > 15
    for name in shown:
        picture = ROOT / "results" / name.removeprefix("results/")
        assert Image.open(picture).text["Source"] == source_of(picture.with_suffix(".json")), f"{name}: run python bench.py report"


def test_pictures_and_pages_exist():
    for page, text in TEXTS.items():
        for there in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / there).exists(), there
