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
    whole, fisher = "train-wikitext2", "train-wikitext2-rl-fisher"
    reached = lambda name: f"{rows_of(name)['DASH']['speedup']:.2f}x"
    frontier, docs = (json.loads((ROOT / f"results/frontier-{task}.json").read_text())["rows"] for task in ("wikitext2", "lm"))
    base, dash = rows_of("train-wikitext2-base"), "dash, horizon 30, seed {}"
    lost = {r["target"]: math.expm1(r["nats"] - frontier[0]["nats"]) for r in frontier if r["method"] == dash.format(0)}
    kls = lambda method, rows: [r["kl"] for r in rows if r["method"] == method]
    left = lambda method, rows=frontier: [a / b for a, b in zip(kls(method, rows), kls("best static plan", rows))]
    listed = lambda values: ", ".join(f"{v:.2f}" for v in values)
    plan, ahead, position = left(dash.format(0)), left("dash, horizon 1, seed 0"), left("by position")
    assert max(abs(a - b) for seed in (1, 2) for a, b in zip(plan, left(dash.format(seed)))) < 0.06  # "at most 0.06 away"
    for said in (f"loses {min(plan):.2f} to {max(plan):.2f} of the KL that the best static plan loses",
                 f"8 windows; one block ahead {min(ahead):.2f} to {max(ahead):.2f})",
                 f"the table has {plan[2]:.2f} and {plan[3]:.2f} with one plan a token, {ahead[2]:.2f} and {ahead[3]:.2f} one block ahead",
                 f"keeps {min(position):.2f} to {max(position):.2f}:",
                 f"loses less: {listed(ahead)} of the static plan's KL, where one plan loses {listed(plan)} and its other seeds",
                 f"loses {listed(left(dash.format(0), docs))} of the static plan's KL at these speedups",
                 f"three seeds: {', '.join(kl_share(f'{whole}{seed}') for seed in ('', '-seed1', '-seed2'))} of its KL",
                 f"{kl_share(fisher)} of the static plan's KL at {reached(fisher)}, before it {kl_share(whole)}",
                 "it keeps {}, {} and {} of the static plan's KL at 2.67x, with all three {}:".format(
                     *(kl_share(f"{whole}-rl{off}") for off in ("-lam0", "-beta0", "-weights0", ""))),
                 "{:.2f} nats less. What routing at 2.67x costs does not shrink: KL {:.4f} before, {:.4f} after".format(
                     base["before training the base: full"]["nats"] - base["full model"]["nats"], base["before: DASH"]["kl"], base["DASH"]["kl"]),
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
