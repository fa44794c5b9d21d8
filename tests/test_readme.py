"""The README and the page of all results say what results/ says, and their commands exist."""

import re
import shlex

from bench import PAGES, render
from conftest import ROOT, script

TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}


def test_tables_are_those_of_results():
    assert render(TEXTS, ROOT / "results") == TEXTS, "run python bench.py report"


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
