"""Measure:   python bench.py eval --task lm --method dash --speedup 2.0

    eval      one method on one task: perplexity in windows of a text, accuracy on multiple-choice items or Rouge-L of summaries,
              the speedup in bits over all tokens of the run, and the measured speedup of batch-1 decoding against the full model
    table     the paper's Tables 1-2: every method at every speedup on every task, or on --task; results/table-TASK.json and .png.
              A policy a task, as in the paper: --policy 'out-{task}/policy.safetensors'
    frontier  what is lost at six speedups: random states, the best static plan, a plan by position, the policy and those given
              by --compare; and whether decoding keeps to its budget; on wikitext2 with --data-dir, else on pydocs;
              results/frontier-TASK.json and .png
    speed     milliseconds per block and state, tokens/s of every path and of the peers installed here, first token, memory,
              bandwidth; writes results/speed-cpu.json or speed-cuda.json, whose latency table `train.py --cost latency` uses, and a bar chart.
              --suite gpu: the CUDA engine on 7B shapes with random weights, against the bandwidth, the same states known ahead,
              transformers, and gpt-fast where --gpt-fast names a checkout; writes results/speed-gpu.json and a picture of one token's timeline
    ablation  the paper's Table 3 and ours: states, K/V modes, forms of a_i, the INT8 head, and the policies given by --compare
              (other horizons; lam, beta, w_i off); results/ablation.json
    figures   the paper's Figures 1, 2 and 4: results/figure1.json, figure2.json, figure4.json, and a .png of each
    transfer  its Figure 5: policies trained on each task (--policy as for table), tested on each; results/transfer.json and .png

    Other systems of the field, each into results/NAME.json and .png (oracle.py, field.py, multitoken.py):
    hidden      blocks skipped uniformly, at random, or after an early exit: distance of the last hidden state, and what summaries are worth
    oracle      for each sequence the cheapest path that scores as well as the full model, how much of it is luck, and what the policy gets
                of it; results/oracle-TASK.json and .png
    controllers, kv, depth, retain   trained gates and merged blocks; gates by --routers, made by train.py --objective flexidepth and so on
    multitoken  direct multi-token decoding, with its fine-tuning: --steps, --out, --resume

    report    puts the tables of results/ into README.md and results/README.md, and draws the pictures that they show anew

Perplexity and accuracy use fp32 and dequantised weights in parallel passes; decoding uses the real kernels (bf16 on the CPU).
Both run the same routed forward. The paper's own numbers, shown beside ours, are in paper.json.
"""

import json
from pathlib import Path

from charts import draw
from common import Parser, command_line, count, folder, make_folder, pick_device, read_json, write_whole
from data import CHOICE_TASKS, read_text
from evaluate import METHODS, TEXTS, one_text, policy_path, rank
from field import controllers, depth, kv, retain
from multitoken import multitoken
from oracle import hidden, oracle
from speed import speed
from tables import ablation, figures, frontier, table, transfer


def evaluate(args):
    task = one_text(args)
    metric, (full, row), _, facts = rank(args, task, [(args.method, args.speedup)], 8 if task in TEXTS else 100)
    unit = {"perplexity": "windows", "accuracy": "items", "Rouge-L": "articles"}[metric]
    n = facts["n"]
    spread = "[{:.3f}, {:.3f}]".format(*row["interval"]) if n > 1 else "(one example has no interval)"
    codes = facts["int4"] if facts["policy"] else f"{facts['int4']}, since {policy_path(args, task)} is not there or of another model"
    distance = f"KL {row['kl']:.4f} nats, " if "kl" in row else ""
    print(f"{task}, {args.method}: {metric} {row['value']:.3f} {spread} (full model {full['value']:.3f}), {distance}"
          f"{row['speedup']:.3f}x in bits, {row['measured']:.2f}x measured; {n} {unit}, {facts['tokens']} tokens, "
          f"INT4 codes: {codes}")
    if args.json:
        print(json.dumps({
            "task": task, "method": args.method, "speedup_target": args.speedup, "speedup_bits": row["speedup"],
            "speedup_measured": row["measured"], "metric": metric, "value": row["value"], "value_full": full["value"],
            "interval": row["interval"], "int4": facts["int4"], "n": facts["n"], "tokens": facts["tokens"],
            "device": str(pick_device(args.device)), "model": args.model} | {k: row[k] for k in ("kl", "top1", "states") if k in row}))


# ----------------------------------------------------------------------------------------------------------
# report


def render(pages, results):
    """{name: text} with every part between <!-- NAME --> and <!-- /NAME -->, in any of the texts, made anew from results/NAME.json; the
    parts called NAME-details from what some results have besides their table."""
    pages = dict(pages)
    for file in sorted(Path(results).glob("*.json")):
        for name, key in ((file.stem, "markdown"), (f"{file.stem}-details", "details")):
            begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            for page, text in pages.items():
                if begin in text or end in text:
                    if not text.count(begin) == text.count(end) == 1 or text.index(begin) > text.index(end):
                        raise ValueError(f"{page} needs {begin} once, and {end} once after it; mend it by hand")
                    r = read_json(file)
                    if not {"caption", "model", "weights", "device", "threads", "torch", "command", key} <= r.keys():
                        raise ValueError(f"{file} is no result of bench.py or train.py; make it again, or move it away")
                    where = f"{r['model']} ({r['weights']}), {r['device']}, CPU threads {r['threads']}, torch {r['torch']}"
                    made = f"\n{r['caption']} {where}. Made by `{r['command']}`.\n\n{r[key]}\n"
                    pages[page] = text[: text.index(begin) + len(begin)] + made + text[text.index(end) :]
    return pages


PAGES = ("README.md", "results/README.md")


def report(args):
    files = sorted(Path(args.results).glob("*.json"))
    if not files:
        raise ValueError(f"--results {args.results} holds no results; make some with bench.py or train.py")
    pages = render({page: read_text(page).replace("\r\n", "\n") for page in PAGES}, args.results)
    for page, text in pages.items():
        write_whole(page, text.encode())
    drawn = [draw(file) for file in files if any(f"{file.stem}.png)" in text for text in pages.values())]
    names = ", ".join(picture.name for picture in drawn if picture)
    print(f"wrote {' and '.join(PAGES)}{f', and drew {names}' if names else ''}")
    for file in files:
        if not any(f"<!-- {file.stem} -->" in text for text in pages.values()):
            print(f"{file} is shown by neither: it has no part between <!-- {file.stem} --> and <!-- /{file.stem} -->")


def main():
    p = Parser(__doc__)
    commands = {"eval": evaluate} | {f.__name__: f for f in (table, frontier, speed, ablation, figures, transfer, hidden, oracle,
                                                            controllers, kv, depth, retain, multitoken, report)}
    p.add_argument("command", nargs="?", default="eval", choices=commands)
    p.add_argument("--task", choices=["lm", "wikitext2", "cnn_dm", *CHOICE_TASKS, "mc"],
                   help="lm reads --file, or held-out pydocs without it; default: for a .jsonl mc, of table, oracle and retain all "
                   "there are, of figures arc_easy, else wikitext2 with --data-dir, or lm")
    p.add_argument("--file", help="a UTF-8 text file for --task lm, a JSONL of items for --task mc")
    p.add_argument("--data-dir", type=folder, help="folder with wikitext2/test.txt, arc_easy/test.jsonl and so on")
    p.add_argument("--method", default="dash", choices=METHODS, help="eval: what to measure (%(default)s; baselines.py)")
    p.add_argument("--speedup", type=float, default=2.0, help="speedup to aim at (%(default)s)")
    p.add_argument("--kv", choices=["fill", "copy", "none"], help="eval, table: keys and values of skipped tokens; default the method's own")
    p.add_argument("--policy", default="out/policy.safetensors", help="made by train.py (%(default)s); {task} in it stands for the task's name")
    p.add_argument("--compare", nargs="*", default=[], help="frontier, ablation, figures: policies of other objectives, horizons or seeds")
    p.add_argument("--routers", nargs="*", default=[], help="controllers, kv, depth, retain: router.safetensors files of train.py")
    p.add_argument("--limit", type=count, help="how many windows, items, articles, requests a kind or shapes of --suite gpu; eval: default 8 windows, "
                   "100 items, 8 articles")
    p.add_argument("--full", action="store_true", help="evaluate all there are")
    p.add_argument("--rounds", type=count, default=5, help="where time is measured: how often each contender runs, in turn (%(default)s)")
    p.add_argument("--steps", type=count, default=25, help="multitoken: training steps for each length of a cycle (%(default)s)")
    p.add_argument("--out", default="out", help="multitoken: folder of its checkpoints (%(default)s)")
    p.add_argument("--resume", action="store_true", help="multitoken: go on after an interruption")
    p.add_argument("--suite", default="model", choices=["model", "gpu"], help="speed: of --model here, or of 7B shapes on a GPU")
    p.add_argument("--gpt-fast", metavar="DIR", help="speed --suite gpu: a checkout of gpt-fast (32971d3) to compare with; its model.py is run")
    p.add_argument("--results", default="results", help="folder to write into (%(default)s)")
    p.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    args = p.parse_args()
    if not 1 <= args.speedup < float("inf"):
        raise ValueError(f"--speedup {args.speedup:g}: give 1 or more")
    if args.task and args.command in ("speed", "transfer", "report"):
        raise ValueError(f"--task {args.task}: {args.command} takes none")
    if args.file:
        args.task = args.task or ("mc" if args.file.lower().endswith(".jsonl") else "lm")
        if args.task not in ("lm", "mc") or args.command in ("speed", "transfer", "multitoken", "report"):
            raise ValueError(f"--file {args.file}: {args.command} reads a file for --task lm or mc only")
    if args.data_dir and (args.task == "lm" or args.file and args.command != "figures"):
        raise ValueError(f"--data-dir {args.data_dir}: --file and --task lm do not come from there; name a task that does, or leave it out")
    if args.command not in ("eval", "report"):
        make_folder(args.results)  # cannot be written: say so before an hour's work
    commands[args.command](args)


if __name__ == "__main__":
    command_line(main)
