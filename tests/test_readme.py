"""The README and the page of all results say what results/ says, and their commands exist."""

import re
import shlex

from bench import PAGES, render
from conftest import ROOT, script

TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}


def test_tables_are_those_of_results():
    assert render(TEXTS, ROOT / "results") == TEXTS, "run python bench.py report"
    shown = re.findall(r"<!-- ([\w-]+) -->\n(?!<!-- /)", "\n".join(TEXTS.values()))
    assert len(shown) > 20 and all((ROOT / "results" / f"{name}.json").exists() for name in shown), shown


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


def test_pictures_and_pages_exist():
    for page, text in TEXTS.items():
        for there in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / there).exists(), there
