"""The README and the page of all results say what results/ says, and their commands exist."""

import json
import math
import re
import shlex
import textwrap

import pytest

from bench import PAGES, render
from common import sha256
from conftest import ROOT, script

TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}


def test_tables_are_those_of_results():
    assert render(TEXTS, ROOT / "results") == TEXTS, "run python bench.py report"
    shown = re.findall(r"<!-- ([\w-]+) -->\n(?!<!-- /)", "\n".join(TEXTS.values()))
    assert len(shown) > 20 and all((ROOT / "results" / f"{name.removesuffix('-details')}.json").exists() for name in shown), shown


def test_a_damaged_page_is_refused_and_not_doubled():
    page = TEXTS["README.md"]
    begin, end = "<!-- speed-cpu-avx512 -->", "<!-- /speed-cpu-avx512 -->"
    for bad in (page.replace(end, ""), page.replace(begin, ""), page + begin, page.replace(begin, "|").replace(end, begin).replace("|" + "\n", end + "\n")):
        with pytest.raises(ValueError, match="README.md needs <!-- speed-cpu-avx512 --> once"):
            render({"README.md": bad}, ROOT / "results")


def rows_of(name):
    return {r["name"].split(" at ")[0]: r for r in json.loads((ROOT / f"results/{name}.json").read_text())["rows"]}


def between(values, form=".2f"):
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def result(name):
    return json.loads((ROOT / f"results/{name}.json").read_text())


def test_numbers_between_the_tables_are_those_of_results():
    text = " ".join("\n".join(TEXTS.values()).split())
    frontier, docs, base = result("frontier-wikitext2")["rows"], result("frontier-lm")["rows"], rows_of("train-wikitext2-base")
    kls = lambda method, rows: [r["kl"] for r in rows if r["method"] == method]
    left = lambda method, rows=frontier: [a / b for a, b in zip(kls(method, rows), kls("best static plan", rows))]
    seeds = [left(f"dash, horizon 30, seed {seed}") for seed in range(3)]
    lost = [[100 * math.expm1(r["nats"] - frontier[0]["nats"]) for r in frontier if r["method"] == f"dash, horizon 30, seed {seed}"] for seed in range(3)]
    goal = lambda n: between([each[n] for each in lost], ".1f")
    fast, slow = (result(f"speed-cpu{name}") for name in ("-avx512", ""))
    routed = lambda machine, ahead=False, target=2: next(
        r["measured"] for r in machine["routed"] if (r["horizon"] == 1) == ahead and r["speedup_target"] == target)
    shape = result("speed-gpu")["shapes"][0]
    gpu, gained = shape["latency_ms"], [f"{row['measured']:.2f}x" for row in shape["routed"] if row["horizon"] > 1]
    chosen = result("speed-gpu")["kernels"]
    products = lambda bits: sum(min(v for v in row.values() if isinstance(v, float)) for key, row in chosen.items()
                                if key in [f"{bits} x {size}" for size in ("12288 x 4096", "4096 x 4096", "22016 x 4096", "4096 x 11008")])
    beside = lambda bits, state: 100 - products(bits) / gpu[state] / 10
    *planned, ahead = ({k: 100 * (row[k] - 1) for k in ("async / known", "async / sync")} for row in shape["routed"])
    behind = lambda row: (100 + row["async / known"]) / (1 + row["async / sync"] / 100) - 100
    skips, short = result("ablation"), result("table-wikitext2")["rows"]
    added = lambda name: "{:.2f}, {:.2f} and {:.2f}".format(*(r["nats"] - skips["head_nats"]["16 bits"] for r in skips["rows"] if r["name"] == name))
    over = lambda name: rows_of(f"train-{name}")["DASH"]["kl"] / rows_of(f"train-{name}")["static, same cost"]["kl"]
    easy, challenge, mmlu = (between([over(task), over(f"{task}-seed1")]) for task in ("arc_easy", "arc_challenge", "mmlu"))
    for task in ("arc_easy", "arc_challenge", "mmlu", "mmlu_5shot"):  # "nearer to the full model at every speedup"
        kl_of = {(r["method"], r["target"]): r["kl"] for r in result(f"table-{task}")["rows"] if "kl" in r}
        assert all(kl_of["dash", s] < kl_of["static_mix", s] for s in (1.33, 1.67, 2.0, 2.67, 3.2)), task
    at = lambda method, target: next(r for r in short if (r["method"], r["target"]) == (method, target))
    more = lambda target: 100 * (at("dash", target)["value"] / short[0]["value"] - 1)
    oracle = result("oracle-arc_easy")
    assert result("oracle-wikitext2")["blocks"] == 1  # "On WikiText-2 the oracle skips nothing"
    qwen, larger = result("frontier-wikitext2-qwen")["rows"], result("speed-cpu-qwen")
    quick = result("speed-cpu-avx512-qwen")
    second = left("dash, horizon 24, seed 0", qwen)
    int8, int4 = (next(r for r in frontier if r["method"] == f"all {name}") for name in ("INT8", "INT4"))
    assert abs(int8["kl"] / kls("dash, horizon 30, seed 0", frontier)[0] - 1) < 0.1  # "the same KL"
    for said in (f"KL to the full model is {between(sum(seeds, []))} of the best static plan's (2x",
                 f"three seeds; decided one block ahead {between(left('dash, horizon 1, seed 0'))}, one seed).",
                 f"DASH's KL is {between(second[:4])} of the best static plan's up to 3.2x, and {second[4]:.2f} and {second[5]:.2f} times it at 4.0x and 4.6x (one seed).",
                 f"it is {second[4]:.2f} and {second[5]:.2f} times the static plan's, and on SmolLM2 {seeds[0][4]:.2f} and {seeds[0][5]:.2f}.",
                 f"is at {', '.join(f'{v:.2f}' for v in second[:4])} of the best static plan's, a plan by position at {between(left('by position', qwen)[:4])}.",
                 f"With AVX2 alone, asked for 2x, it decodes {routed(larger):.2f}x as fast as bf16, plain INT8 {larger['ratios']['INT8 / bf16']:.2f}x, "
                 f"INT4 {larger['ratios']['INT4 / bf16']:.2f}x.",
                 "asked for 2.67x and 3.2x, {:.2f}x and {:.2f}x, INT8 {:.2f}x, INT4 {:.2f}x.".format(
                     *(routed(quick, target=target) for target in (2.67, 3.2)), *(quick["ratios"][f"{name} / bf16"] for name in ("INT8", "INT4"))),
                 "at 2.3x, 2.7x and 3.2x in bits DASH's KL is {:.2f}, {:.2f} and {:.2f} of that of static plans".format(*fast["frontier"]["ratio"][1:4]),
                 "On Qwen2.5-Coder-0.5B it is {:.2f}, {:.2f} and {:.2f};".format(*quick["frontier"]["ratio"][1:4]),
                 f"asked for 2.67x, DASH decodes SmolLM2 {routed(fast, target=2.67):.2f}x as fast as bf16; INT8 {fast['ratios']['INT8 / bf16']:.2f}x; INT4, "
                 f"farther from the full model, {fast['ratios']['INT4 / bf16']:.2f}x, and level with llama.cpp. Our bf16 is a fast one, "
                 f"{fast['ratios']['bf16 / transformers bf16']:.1f} times as fast as transformers'",
                 *(f"| {path} | {one:.2f}x | {other:.2f}x |" for path, one, other in (
                     ("all INT8", *(machine["ratios"]["INT8 / bf16"] for machine in (fast, slow))),
                     ("DASH, asked for 2x", routed(fast), routed(slow)),
                     ("the same, one block ahead", routed(fast, True), routed(slow, True)),
                     ("all INT4", *(machine["ratios"]["INT4 / bf16"] for machine in (fast, slow))))),
                 "1.67x as in full, all in INT4 {:.2f} times.".format(fast["first_token"]["INT4 / full"]),
                 "one of 512 tokens takes {:.2f} times as long routed".format(fast["first_token"]["routed / full"]),
                 f"needs {100 * oracle['blocks']:.0f}% of the blocks, and luck alone would need {100 * oracle['luck']:.0f}%",
                 f"all INT4 ({int4['speedup']:.2f}x in bits)",
                 "INT8 decodes {:.2f}x and INT4 {:.2f}x as fast as our bf16, which is {:.2f} times as fast as gpt-fast and {:.1f} times".format(
                     shape["INT8 / bf16"], shape["INT4 / bf16"], shape["bf16 / gpt-fast"], shape["bf16 / transformers"]),
                 "come out as {}, {} and {}, the last by skipping".format(*gained),
                 f"skipping alone, with a_i, adds {added('+ scale a_i (norm ratio), K/V filled')} nats at 1.33x, 1.67x and 2x, "
                 f"naive static skipping {added('naive static skipping')}.",
                 f"without it the three are {added('dynamic, states 0 and 4, a_i = 1')}",
                 f"it is {easy} (arc_easy), {challenge} (arc_challenge) and {mmlu} (mmlu) of the KL of a simpler static plan that costs 1% less (two seeds)",
                 f"At 2.67x asked its KL is {easy}, {challenge}, {mmlu} (two seeds each) and {over('cnn_dm'):.2f} of a static plan's",
                 f"on the first four of these windows, by {more(2.67):.1f}% and {more(3.2):.1f}%.",
                 f"products is {beside(16, '4'):.0f}% of a block's time in bf16 and {beside(4, '1'):.0f}% in INT4",
                 f"([{re.search(r'([0-9]+) s in all', result('train-gpu')['caption'])[1]} s](results/README.md#on-a-gpu))",
                 f"decisions cost {between([row['async / known'] for row in planned], '.0f')}% of a token, ",
                 f"and on the same stream {between([behind(row) for row in planned], '.0f')}%",
                 f"one block ahead they cost {ahead['async / known']:.0f}%, on the same stream {behind(ahead):.0f}%",
                 f"three seeds are at {between([s[2] for s in seeds])} and {between([s[3] for s in seeds])}.",
                 "*By position* is at {} up to 3.24x and at {:.2f} and {:.2f} beyond:".format(between(left('by position')[:4]), *left('by position')[4:]),
                 f"rises by {goal(0)}% at 2x (the goal was 0.5%), by {goal(2)}% at 2.67x (1%) and by {goal(3)}% at 3.2x (2.5%)",
                 f"is at {', '.join(f'{v:.2f}' for v in left('dash, horizon 30, seed 0', docs)[:4])} of the static plan's KL",
                 "{:.2f} nats less. What routing costs does not shrink ({:.2f}x: KL {:.4f} before, {:.4f} after)".format(
                     base["before training the base: full"]["nats"] - base["full model"]["nats"], base["before: DASH"]["speedup"],
                     base["before: DASH"]["kl"], base["DASH"]["kl"]),
                 f"INT8 decodes {slow['ratios']['INT8 / bf16']:.1f} and INT4 {slow['ratios']['INT4 / bf16']:.1f} times as fast as bf16",
                 f"a decision takes {slow['latency_ms']['decision']:.0f} ms"):
        assert said in text, said


def test_the_sample_is_what_infer_printed():
    shown = re.search(r"--show-states\n\n((?: {4}.*\n|\n)+)", TEXTS["README.md"])[1].splitlines()
    printed = (ROOT / "results/infer.txt").read_text(encoding="utf-8").splitlines()
    assert len(shown) > 10 and all(any(line.startswith(said.strip().removesuffix(" ...")) for line in printed) for said in shown)
    paths = [line.split()[0] for line in printed if re.match(r"[.124]{30} ", line)]
    cost = sum({".": 0.0625, "1": 1, "2": 2, "4": 4}[s] for path in paths for s in path) / sum(map(len, paths))
    assert f"all {len(paths)} rows come to {4 / cost:.1f}x" in TEXTS["README.md"]


def test_the_rule_of_ones_own_decodes(tiny, capsys):
    code = re.search(r"needs no training:\n\n((?: {4}.*\n|\n)+)", TEXTS["README.md"])[1]
    assert code.count('load("smollm2"') == 1
    found = {}
    exec(textwrap.dedent(code).replace('load("smollm2"', f'load("{tiny}"'), found)
    states = found["out"]["states"]
    assert (states[0] == 4).all() and set(states[1:].unique().tolist()) <= {1, 2} and capsys.readouterr().out


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
        assert Image.open(picture).text["Source"] == sha256(picture.with_suffix(".json")), f"{name}: run python bench.py report"


def test_pictures_and_pages_exist():
    for page, text in TEXTS.items():
        for there in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / there).exists(), there
