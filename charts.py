"""Every picture, drawn from a file in results/ and nothing else: `draw(file)`.

A command measures and writes results/NAME.json; then the function here that is called as NAME begins (figure1, table-wikitext2 by
`table`) draws NAME.png from it. `bench.py report` draws them all anew. Each takes the file as a dict and returns a matplotlib Figure.
A picture carries the hash of the file that it shows, so that a test can tell when the two part.
"""

import io
import itertools
import os
import re
from pathlib import Path

import numpy as np

from baselines import interval, quotient
from common import by, read_json, refusing, sha256, write_whole

SHADES = (("4", "full", "#1b4965"), ("2", "INT8", "#5fa8d3"), ("1", "INT4", "#bee9e8"), ("0", "skip", "#e8e8e8"))  # of the states
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # a legend at the right of its panel


def canvas(width, height, columns=1, rows=1):
    """An empty figure, so many inches wide and high, and its panels from left to right and down: (Figure, array of Axes)."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own, inherited, may not be there, and matplotlib would stop at it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def draw(file):
    """results/NAME.json -> NAME.png beside it, whole or not at all; the path, or None where there is nothing to draw."""
    chart = CHARTS.get(Path(file).stem.split("-")[0])
    path, buffer = Path(file).with_suffix(".png"), io.BytesIO()
    with refusing(file, "lacks what its picture shows", "make it again with the command that it names"):
        figure = chart and chart(read_json(file))
    if figure is None:
        return None
    figure.savefig(buffer, format="png", dpi=110, metadata={"Source": sha256(file)})
    write_whole(path, buffer.getvalue())
    return path


def task_of(r):
    task = r["caption"].split(",")[0]
    return "pydocs" if task == "lm" and "--file" not in r["command"] else task


def shares(axes, places, each, **labels):
    """Stacked bars: each {state: share} at its place."""
    bottom = [0.0] * len(each)
    for s, name, color in SHADES:
        share = [one[s] for one in each]
        axes.bar(places, share, bottom=bottom, width=1.0, label=name, color=color, edgecolor="white")
        bottom = [a + b for a, b in zip(bottom, share)]
    axes.set(ylim=(0, 1), **labels)


def error(values, spans):
    """What matplotlib wants for intervals (low, high) around values."""
    lows, highs = zip(*spans)
    return [[max(0, v - low) for v, low in zip(values, lows)], [max(0, high - v) for v, high in zip(values, highs)]]


def kl_error(rows):
    return error([row["kl"] for row in rows], [interval(row["each"]["kl"]) for row in rows])


# ----------------------------------------------------------------------------------------------------------
# train, speed


def train(r):
    """Training, KL by method, states by block."""
    figure, (a, b, c) = canvas(15, 4, 3)
    log = r["log"]
    rows = r["rows"]
    if "epoch" in log[0]:
        x, y, label, title = "epoch", "loss", "loss of the fit", "fit to Fisher labels"
    elif "ce" in log[0]:
        x, y, label, title = "step", "ce", "CE, nats a token", "cross-entropy of the gated model"
    elif "r_acc" in log[0]:
        x, y, label, title = "step", "r_acc", "R_acc, nats a token", "reward of the sampled states"
    else:
        x = "step"
        y = label = title = next(key for key in log[0] if key != x)
    a.plot([line[x] for line in log], [line[y] for line in log], marker="o" if x == "epoch" else None)
    a.set(xlabel=x, ylabel=label, title=f"Training: {title}")
    bars = b.barh([row["name"] for row in rows[1:]], [row["kl"] for row in rows[1:]], xerr=kl_error(rows[1:]), capsize=3, color="tab:blue")
    b.bar_label(bars, [f"{row['speedup']:.2f}x" for row in rows[1:]], padding=3)
    b.margins(x=0.2)
    b.invert_yaxis()
    b.set(xlabel="KL to the full model, nats", title="Held-out")
    b.locator_params(axis="x", nbins=5)
    shares(c, range(1, len(r["shares"]) + 1), r["shares"], xlabel="block", ylabel="share of tokens", xlim=(0.5, len(r["shares"]) + 0.5),
           title=f"{rows[1]['name'].split(' at ')[0]}, {rows[1]['speedup']:.2f}x")
    c.legend(**BESIDE)
    return figure


def speed(r):
    """Tokens/s of every path, of DASH and of the peers; of the GPU suite one token's timeline."""
    if "timeline" in r:
        return timeline(r) if r["timeline"] else None  # a run that was cut off has none
    paths = {name: v for name, v in r["tokens_per_second"].items() if name != "all skipped"}  # no model
    for row in r["routed"]:
        how = f"{row['speedup_target']:g}x asked{', decided one block ahead' if row['horizon'] == 1 else ''}"
        paths[f"dash, {how}"] = paths["all bf16"] * row["measured"]
    names = sorted(paths, key=paths.get)
    timed = r.get("frontier")  # older results have none
    figure, [axes, *more] = canvas(13 if timed else 8, 0.4 * len(names) + 1.2, 2 if timed else 1)
    kinds = {"dash": ("DASH", "tab:blue"), "all ": ("one state for all", "tab:orange")}
    bars = [{"kind": kinds.get(name[:4], ("other programs", "tab:gray")), "at": n, "value": paths[name]} for n, name in enumerate(names)]
    for (label, color), those in by(bars, "kind").items():
        drawn = axes.barh([bar["at"] for bar in those], [bar["value"] for bar in those], color=color, label=label)
        axes.bar_label(drawn, fmt="%.0f", padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="tokens/s, batch 1", title=f"Decoding {r['model']} on {r['device']}")
    axes.margins(x=0.1)
    axes.legend(loc="lower right")
    if timed:
        [panel] = more
        speedups, kls = zip(*timed["static"])
        panel.plot(speedups, kls, marker="o", linestyle="", color="tab:orange", label="the same plan for all tokens")
        between = np.linspace(speedups[0], speedups[-1], 500)
        panel.plot(between, np.interp(between, speedups, kls), color="tab:orange", label="between two of them tokens take turns")
        panel.plot(*zip(*timed["own"]), marker="o", linestyle="", color="tab:blue", label=timed["method"])
        panel.set(yscale="log", xlabel="speedup of decoding, promised by these times", ylabel=f"KL to the full model on {timed['text']}, nats")
        panel.legend()
    return figure


def timeline(r):
    """Streams and host as rows, one token from left to right; the busiest stream is the main one."""
    events = r["timeline"]
    busy = lambda row: sum(e[3] for e in events if e[0] == row)
    streams = sorted({e[0] for e in events} - {"host"}, key=busy, reverse=True)
    rows = dict(zip(streams, ["main stream", "decision stream", *streams[2:]])) | {"host": "host"}
    kinds = {"product of a layer": "tab:blue", "attention": "tab:orange", "the rest of a block": "tab:green", "scorer": "tab:red",
             "call of the host": "dimgray", "host waits": "lightgray"}

    def kind(row, name):
        if row == "host":
            return "host waits" if "Synchronize" in name else "call of the host"
        if row != streams[0]:
            return "scorer"
        product = "tinygemm" in name or name.startswith("triton_red") and "sum" in name  # of INT4; of INT8 and bf16 (quant.layer_of_one_row)
        return "attention" if "flash_fwd" in name else "product of a layer" if product else "the rest of a block"

    drawn = by([{"kind": kind(row, name), "row": row, "span": span} for row, name, *span in events], "kind")
    figure, panels = canvas(12, 5.4, rows=2)
    for axes in panels:
        for label, color in kinds.items():
            for y, row in enumerate(rows):
                spans = [bar["span"] for bar in drawn.get(label, ()) if bar["row"] == row]
                axes.broken_barh(spans, (y - 0.4, 0.8), color=color, label=None if y else label)
        axes.set(xlabel="milliseconds", yticks=range(len(rows)), yticklabels=rows.values())
        axes.invert_yaxis()
    asked = r["shapes"][-1]["routed"][-1]["speedup_target"]
    panels[0].set(title=f"One token, decided one block ahead, {asked:g}x asked, {r['shapes'][-1]['name']}, {r['device']}")
    panels[0].legend(fontsize="small", **BESIDE)
    panels[1].set(xlim=(0, 0.6), title="its first 0.6 ms")
    return figure


# ----------------------------------------------------------------------------------------------------------
# The paper's tables and figures


def table(r):
    """Quality against measured time (against bits where nothing is decoded), a line a method; of perplexity also the part near the full
    model's; in the place of accuracy, of which few items say little, KL."""
    full, *rows = r["rows"]
    x = "measured" if "measured" in full else "speedup"
    full = full["value"]
    perplexity = r["metric"] == "perplexity"
    choice = r["metric"] == "accuracy"
    worth = lambda row: max(row["kl"], 1e-7) if choice else row["value"]
    methods = by([row for row in rows if "missing" not in row], "method")
    figure, panels = canvas(15 if perplexity else 9, 5, 1 + perplexity)
    own = {"int8": "black", "int4": "black", "static_mix": "tab:red", "dash": "tab:blue"}
    for near, axes in enumerate(panels):
        colors = itertools.cycle("tab:" + c for c in "gray olive cyan pink purple brown green orange".split())
        if not choice:
            axes.axhline(full, color="black", linestyle=":", linewidth=1, label="full model")
        for method, rows in methods.items():
            alone = method in ("int8", "int4")
            color = own.get(method) or next(colors)
            if near and min(row["value"] for row in rows) > 1.1 * full:
                continue
            line = "none" if alone or near else "-" if method == "dash" else "--"  # near, a line would join what clocks scattered
            axes.plot([row[x] for row in rows], [worth(row) for row in rows], marker="s" if alone else "o", markersize=5, color=color,
                      linestyle=line, linewidth=2.2 if method == "dash" else 1.2, label=None if alone else method)
            if near:
                rounds, middle = [row.get("rounds", [row[x]]) for row in rows], [row[x] for row in rows]
                axes.errorbar(middle, [row["value"] for row in rows], xerr=error(middle, [(min(r), max(r)) for r in rounds]), fmt="none",
                              ecolor=color, elinewidth=0.7, alpha=0.5)
            for row in rows if alone or near else ():
                if not alone and row["value"] < 1.01 * full:
                    continue  # too near to one another for labels
                axes.annotate(method.upper() if alone else f"{row['target']:g}x", (row[x], worth(row)),
                              xytext=(5, -12) if method == "static_mix" or near and alone else (5, 5), textcoords="offset points",
                              fontsize="medium" if alone else "small", color=color)
        axes.set(xlabel="measured speedup of batch-1 decoding" if x == "measured" else "speedup in bits", ylabel="KL to the full model, nats" if choice else r["metric"],
                 title=f"{task_of(r)}, test{', near the full model (labels: speedup asked)' if near else ''}",
                 yscale="log" if choice or perplexity and not near else "linear")
        axes.margins(0.08)
        if perplexity and not near and max(row["value"] for those in methods.values() for row in those) > 1e5:
            axes.set(ylim=(full / 2, 1e5), title=f"{axes.get_title()}; what is not seen lies above")
        axes.legend(**BESIDE)
    return figure


def frontier(r):
    """KL against speedup, and over the best static plan's; the seeds of one policy in one colour."""
    figure, panels = canvas(14, 5, 2)
    colors = {"random states": "tab:gray", "best static plan": "tab:orange", "by position": "tab:olive"}
    others = iter("tab:" + c for c in "blue red green purple cyan pink".split())
    methods = by(r["rows"][3:], "method")
    static = methods["best static plan"]
    drawn = {}
    int4 = r["rows"][2]
    for method, rows in methods.items():
        family = re.sub(r", seed \d+", "", method)
        label = None if family in drawn else family
        if label:
            drawn[family] = colors.get(family) or next(others, "black")
        look = {"color": drawn[family], "marker": "o", "markersize": 4, "linestyle": "-" if ", " in family else "--"}
        x = [row["speedup"] for row in rows]
        over = [quotient(row["each"]["kl"], plan["each"]["kl"]) for row, plan in zip(rows, static)]
        for beyond in (False, True):  # a line across all INT4 would pass above it, and every method could be there
            part = [row for row in rows if (row["speedup"] > int4["speedup"]) == beyond]
            panels[0].plot([row["speedup"] for row in part], [row["kl"] for row in part], label=None if beyond else label, **look)
        if method != "random states":
            panels[1].errorbar(x, [v for v, _ in over], error(*zip(*over)), elinewidth=0.7, capsize=2, **look)
    for row in r["rows"][1:3]:
        panels[0].plot(row["speedup"], row["kl"], marker="s", color="black", linestyle="none")
        panels[0].annotate(row["method"], (row["speedup"], row["kl"]), xytext=(8, -14), textcoords="offset points")
    panels[0].set(ylabel="KL to the full model, nats a token, lower is better", title=f"What is lost, {r['model']} on {task_of(r)} test text", yscale="log")
    panels[0].margins(y=0.1)  # room for the words below the lowest square
    panels[1].set(ylabel="ratio of KLs, lower is better", title="The same, divided by the best static plan's at equal cost")
    for axes in panels:
        axes.set(xlabel="speedup in bits")
    panels[0].legend()
    panels[1].text(0.98, 0.02, "random states lie above", ha="right", transform=panels[1].transAxes)
    return figure


def figure1(r):
    """Similarity of input and output by block, of all hidden states, and accuracy without the most similar blocks."""
    figure, (a, b, c) = canvas(15, 4, 3)
    blocks = range(1, len(r["similarity"]) + 1)
    a.plot(blocks, r["similarity"], marker="o", markersize=3)
    a.fill_between(blocks, *r["deciles"], alpha=0.2)
    a.set(xlabel="block i", ylabel="cosine of $h_{i-1}$ and $h_i$", title="Input and output of a block: mean, 10% to 90%")
    figure.colorbar(b.imshow(r["pairs"], origin="lower", vmin=0), ax=b)
    b.set(xlabel="j", ylabel="i", title="Cosine of $h_i$ and $h_j$")
    c.errorbar(range(len(r["accuracy"])), r["accuracy"], error(r["accuracy"], r["intervals"]), marker="o", capsize=3)
    c.set(xlabel="most similar blocks skipped", ylabel="accuracy", title=f"{r['n']} items")
    return figure


def figure2(r):
    figure, [axes] = canvas(8, 4)
    for name, means in r["similarity"].items():
        axes.plot(range(1, len(means) + 1), means, marker="o", markersize=3, label=name)
    axes.set(xlabel="block", ylabel="cosine of input and output", title="Tokens by what is predicted without the most similar blocks")
    axes.legend()
    return figure


def figure4(r):
    """States by tenth of similarity at each speed, and the skip rate by block of every policy."""
    figure, [*panels, last] = canvas(5 * len(r["shares"]) + 6, 4, len(r["shares"]) + 1)
    for (speedup, each), axes in zip(r["shares"].items(), panels):
        shares(axes, range(1, 11), each, xlabel="tenth of (block, token) by similarity, 1 the least", ylabel="share of states", title=speedup)
    panels[-1].legend(**BESIDE)
    for name, rate in r["skip_rate"].items():
        last.plot(range(1, len(rate) + 1), rate, marker="o", markersize=3, label=name)
    last.set(xlabel="block", ylabel="share of tokens that skip it", title="States 0 and 4 only, 1.33x", ylim=(0, 1))
    last.legend()
    return figure


def transfer(r):
    figure, [axes] = canvas(7, 5)
    found = r["found"]
    tasks = list(next(iter(found.values())))
    best = {b: max(1e-9, min(found[a][b]["kl"] for a in found)) for b in tasks}
    ratio = [[found[a][b]["kl"] / best[b] for b in tasks] for a in found]
    figure.colorbar(axes.imshow(ratio, cmap="viridis_r", norm="log"), ax=axes, label="KL over the least")
    for y, line in enumerate(ratio):
        for x, v in enumerate(line):
            axes.text(x, y, f"{v:.2g}", ha="center", va="center", color="white" if v > 3 else "black")
    axes.set_xticks(range(len(tasks)), tasks, rotation=30)
    axes.set_yticks(range(len(found)), list(found))
    axes.set(xlabel="tested on", ylabel="trained on", title="KL to the full model over the column's least")
    return figure


# ----------------------------------------------------------------------------------------------------------
# The other systems of the field


def hidden(r):
    """Distance against blocks kept, with 95% intervals; Rouge-L against cost, where summaries were made."""
    rows = r["summaries"]
    figure, panels = canvas(11 if rows else 6, 4.2, 2 if rows else 1)
    for k, (way, those) in enumerate(r["distance"].items()):
        panels[0].plot(r["kept"], [sum(d) / len(d) for d in those], marker="o", markersize=4, label=way)
        panels[0].fill_between(r["kept"], *zip(*map(interval, those)), alpha=0.2)
        if rows:
            line = rows[:1] + rows[1 + k :: len(r["distance"])]
            each = [[100 * v for v in row["each"]["rougeL"]] for row in line]
            means = [sum(e) / len(e) for e in each]
            panels[1].errorbar([100 / row["speedup"] + 0.15 * (k - 1) for row in line], means, error(means, map(interval, each)), marker="o",
                               capsize=3, label=way)
    panels[0].set(xlabel="blocks kept, %", ylabel="cosine distance", title=f"Last hidden state, to the full model's; {task_of(r)}, test")
    if rows:
        panels[1].set(xlabel="cost in bits, % of the full model's", ylabel="Rouge-L, %", title=f"cnn_dm, test, n = {len(each[0])}", ylim=(0, None))
    for axes in panels:
        axes.legend()
    return figure


def oracle(r):
    """What each nested path would do to all sequences, and which of them the oracle takes."""
    figure, (left, right) = canvas(11, 4.2, 2)
    P = len(r["paths"])
    mean = lambda values: sum(values) / len(values)
    cost = [100 * mean(c) for c in r["cost"]]
    change = [mean(s) - mean(r["score"][0]) for s in r["score"]]
    left.plot(cost[:P], change[:P], ".-", color="tab:gray", label="one path for all")
    left.plot(cost[P], change[P], "s", color="black", label="all INT8")
    for first, last, label in ((P + 1, len(cost) - r["skipping"], "policy"), (len(cost) - r["skipping"], len(cost), "policy, states 0 and 4")):
        if last > first:
            left.plot(cost[first:last], change[first:last], "o", label=label)
    taken = [r["score"][n][k] for k, n in enumerate(r["picked"])]
    left.plot(100 * r["blocks"], mean(taken) - mean(r["score"][0]), "*", markersize=12, color="tab:red", label="oracle")
    left.set_yscale("symlog", linthresh=0.1)  # the last paths lose a hundred times what the others do
    left.set(xlabel="cost in bits, % of the full model's", ylabel="change of score", title=f"{r['caption'].split(', ')[1]}, test")
    left.legend(fontsize="small")
    kept = [100 * sum(s > 0 for s in path) / len(path) for path in r["paths"]]
    right.bar(range(P), [100 * r["picked"].count(n) / len(r["picked"]) for n in range(P)])
    right.set_xticks(range(P), [f"{k:.0f}" for k in kept])
    right.set(xlabel="path taken, % of the blocks", ylabel="% of sequences",
              title=f"Mean of the oracle's paths {100 * r['blocks']:.0f}%, of luck's {100 * r['luck']:.0f}%")
    return figure


def bars(r, size, title, place, name_of_place, series, name_of_series=str, **legend):
    """KL as bars: a group for each value of `place` in the rows, a colour for each of `series`."""
    figure, [axes] = canvas(*size)
    places, groups = list(by(r["rows"], place)), by(r["rows"], series)
    width = 0.8 / len(groups)
    for n, (one, rows) in enumerate(groups.items()):
        axes.bar([places.index(row[place]) + n * width for row in rows], [row["kl"] for row in rows], width, yerr=kl_error(rows),
                 capsize=3, label=name_of_series(one))
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(places))], map(name_of_place, places))
    axes.set(ylabel="KL to the full model, nats a token", title=f"{title}, {task_of(r)}")
    axes.legend(**legend)
    return figure


def controllers(r):
    return bars(r, (8, 4), "Skip controllers", "asked", "{} blocks skipped".format, "method", **BESIDE)


def kv(r):
    return bars(r, (8, 3.8), "Keys and values of skipped tokens", "method", lambda name: name.replace(", ", "\n"),
                "kv", lambda mode: {"fill": "filled, in INT4"}.get(mode, mode))


def depth(r):
    """Blocks and cost a new token by kind of request: mean, and deviation over tokens."""
    figure, panels = canvas(13, 4, 2)
    kinds = list(by(r["rows"], "kind"))
    methods = by(r["rows"], "method")
    for axes, key, what in zip(panels, ("blocks", "cost"), ("blocks run", "cost a block (4 = full)")):
        for n, (method, rows) in enumerate(methods.items()):
            means, variances = zip(*(row[key] for row in rows))
            axes.errorbar([kinds.index(row["kind"]) + 0.15 * (n - (len(methods) - 1) / 2) for row in rows], means, [v**0.5 for v in variances],
                          fmt="o", capsize=3, label=method)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set(ylabel=f"{what}: mean, standard deviation")
    axes.legend(fontsize="small", **BESIDE)
    return figure


def retain(r):
    """Retained % by task, a line a method; a task of which the full model gets nothing has none."""
    tasks = by([row for row in r["rows"] if row["skipped"] and "retained" in row], "task")
    figure, panels = canvas(12, 7, 3, 2)  # the last is for the legend
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    for axes, (task, rows) in zip(panels, tasks.items()):
        for n, (method, those) in enumerate(by(rows, "method").items()):
            those = sorted(those, key=lambda row: row["speedup"])
            values = [100 * row["retained"] for row in those]
            spans = [[100 * v for v in row["interval"]] for row in those]
            axes.errorbar([row["speedup"] + 0.004 * n for row in those], values, error(values, spans), marker="o", markersize=4,
                          capsize=3, elinewidth=0.7, label=method)
        axes.axhline(100, color="black", linestyle=":", linewidth=1)
        axes.set(title=task, xlabel="speedup in bits", ylabel="% of the full model", ylim=(0, None))
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center")
    return figure


def multitoken(r):
    """Nats by place in the cycle, and what the cycles save."""
    figure, (left, right) = canvas(11, 4, 2)
    rows = r["rows"]
    for n, row in enumerate(rows):
        for key, style, fill in (("before", ":", "none"), ("after", "-", "full")):
            left.plot(range(1, row["tau"] + 1), row[key], style, marker="o", fillstyle=fill, color=f"C{n}", label=f"tau = {row['tau']}, {key}")
        right.bar(n - 0.2, row["faster"], 0.4, color="C0", label=None if n else "measured")
        right.bar(n + 0.2, 1 / row["passes"], 0.4, color="C1", label=None if n else "1 / passes")
    right.axhline(1, color="black", linestyle=":", linewidth=1)
    left.set(xlabel="place in the cycle", ylabel="nats a token, held-out", xticks=range(1, max(row["tau"] for row in rows) + 1))
    right.set_xticks(range(len(rows)), [f"tau = {row['tau']}" for row in rows])
    right.set(ylabel="tokens/s over the full model's")
    left.legend(fontsize="small", **BESIDE), right.legend()
    return figure


CHARTS = {f.__name__: f for f in (train, speed, table, frontier, figure1, figure2, figure4, transfer, hidden, oracle, controllers, kv, depth, retain,
                                  multitoken)}
