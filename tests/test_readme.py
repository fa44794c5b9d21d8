"""The README says what results/ says, and its commands exist."""

import re
import shlex

from bench import render
from conftest import ROOT, script

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_results():
    assert render(README, ROOT / "results") == README, "run python bench.py report"


def test_commands_take_the_options_that_the_readme_shows():
    lines = re.findall(r"python (?:train|infer|bench)\.py[^`\n|)&]*", README)
    assert len(lines) > 5
    helps = {name: script(name, "--help").stdout for name in ("train.py", "infer.py", "bench.py")}
    for line in lines:
        words = shlex.split(line)
        for word in words[2:]:
            assert not word.startswith("--") or word in helps[words[1]], line


def test_pictures_exist():
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).exists(), picture
