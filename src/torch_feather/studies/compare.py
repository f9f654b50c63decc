"""Methods x sparsities x seeds on one budget: test accuracy with its spread."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from ..analysis.plots import BLUE, GREY
from ..errors import ConfigurationError
from ..methods import method_options
from ..training.checkpoint import write_atomically, write_json
from ..training.config import DENSE, Config
from .grid import Row, Run

Groups = dict[tuple[str, float], list[Row]]


def plan(
    config: Config,
    methods: Iterable[str],
    sparsities: Iterable[float],
    seeds: Iterable[int],
) -> list[Run]:
    """The runs, seeds outermost, so that every method has its first seed early.

    The dense network is trained once per seed, whatever the sparsities. Options in `config` go to
    the methods that have them.

    Raises:
        ConfigurationError: an option that none of the methods has.
    """
    methods = list(methods)
    known = {method: [] if method == DENSE else list(method_options(method)) for method in methods}
    for option in config.options:
        if not any(option in names for names in known.values()):
            raise ConfigurationError(f"None of {', '.join(methods)} has an option {option!r}.")
    runs: dict[str, Run] = {}
    for seed, sparsity, method in itertools.product(seeds, sparsities, methods):
        options = {key: v for key, v in config.options.items() if key in known[method]}
        one = replace(
            config,
            seed=seed,
            compare_dense=False,
            method=method,
            sparsity=sparsity,
            options=options,
        )
        name = f"{method}-{seed}" if method == DENSE else f"{method}-{sparsity:g}-{seed}"
        runs[name] = Run(name, one)
    return list(runs.values())


def group(rows: Iterable[Row]) -> Groups:
    """Rows by method and sparsity, by falling accuracy at each sparsity, the dense ones first."""
    groups: Groups = defaultdict(list)
    for row in rows:
        groups[row["method"], row["sparsity"]].append(row)
    return dict(sorted(groups.items(), key=lambda item: (item[0][1], -mean(item[1]))))


def mean(rows: Sequence[Row]) -> float:
    """Test accuracy in %, over seeds."""
    return statistics.mean(100 * row["test_accuracy"] for row in rows)


def table(rows: Sequence[Row], command: str) -> str:
    """Mean and standard deviation of test accuracy, as Markdown."""
    lines = [
        "| method | sparsity | test accuracy, % | n | zeros / weights | by itself | "
        "multiply-adds, M |",
        "|---|---|---|---|---|---|---|",
    ]
    for (method, sparsity), found in group(rows).items():
        accuracies = [100 * row["test_accuracy"] for row in found]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(found) > 1 else ""
        zeros = " or ".join(f"{z:,}" for z in sorted({row["zeros"] for row in found}))
        own = [row["own_sparsity"] for row in found]
        exact = [round(100 * row["zeros"] / row["weights"], 2) for row in found]
        differs = None not in own and [round(100 * share, 2) for share in own] != exact
        itself = f"{100 * statistics.mean(own):.2f} %" if differs else ""
        macs = statistics.mean(row["macs"] for row in found) / 1e6
        lines.append(
            f"| {method} | {'' if method == DENSE else f'{100 * sparsity:g} %'} "
            f"| {mean(found):.2f}{spread} | {len(found)} "
            f"| {zeros} / {found[0]['weights']:,} | {itself} | {macs:.2f} |"
        )
    return "\n".join([*lines, "", sources(rows), "", f"    {command}", ""])


def sources(rows: Sequence[Row]) -> str:
    """What the numbers are of, in one sentence each."""
    machines = {
        f"{h.get('gpu') or h['cpu']}, {h['threads']} thread(s)"
        for h in (row["hardware"] for row in rows)
    }
    versions = {f"PyTorch {row['versions']['torch']}" for row in rows}
    commits = {str(row["commit"])[:10] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    return (
        f"Mean ± standard deviation over seeds {seeds}; last of {rows[0]['epochs']} epochs, "
        f"nothing chosen by test images. {rows[0]['network']} on {rows[0]['data']}. "
        f"{'; '.join(sorted(machines))}; {', '.join(sorted(versions))}; "
        f"commit {', '.join(sorted(commits))}."
    )


def plot(rows: Sequence[Row]) -> Figure:
    """A panel for each sparsity: every seed a dot, the mean a bar, methods by their mean."""
    groups = group(rows)
    sparsities = sorted({s for method, s in groups if method != DENSE})
    dense = [row for row in rows if row["method"] == DENSE]
    most = max([sum(s == x for _, s in groups) for x in sparsities], default=1)
    figure = Figure(figsize=(0.6 + 3.4 * len(sparsities), 1.3 + 0.32 * most), layout="constrained")
    for i, sparsity in enumerate(sparsities):
        axes = figure.add_subplot(1, len(sparsities), i + 1)
        found = [(m, r) for (m, s), r in groups.items() if s == sparsity and m != DENSE]
        for y, (_, mine) in enumerate(reversed(found)):
            accuracies = [100 * row["test_accuracy"] for row in mine]
            axes.plot(accuracies, [y] * len(mine), "o", color=BLUE, alpha=0.6, mew=0, ms=6)
            axes.plot(mean(mine), y, "|", color="black", ms=15, mew=1.8)
        if dense:
            axes.axvline(mean(dense), color=GREY, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(found)), [f"{m}  (n={len(r)})" for m, r in reversed(found)])
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.set_xlabel("test accuracy, %" + " (dashed: dense)" * bool(dense))
        axes.set_title(f"{100 * sparsity:g} % sparse")
        axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    return figure


# Of Okabe and Ito, for all kinds of colour vision; line styles tell the second round apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")


def curves(rows: Sequence[Row]) -> Figure:
    """Accuracy over sparsity, with the deviation over seeds; training loss at the highest one."""
    groups = group(row for row in rows if row["method"] != DENSE)
    methods = list(dict.fromkeys(method for method, _ in reversed(groups)))[::-1]
    sparsities = sorted({sparsity for _, sparsity in groups})
    dense = [row for row in rows if row["method"] == DENSE]
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, method in enumerate(methods):
        look = {"color": COLOURS[i % 7], "linestyle": STYLES[i // 7 % 3]}
        places = [x for x, s in enumerate(sparsities) if (method, s) in groups]
        found = [groups[method, sparsities[x]] for x in places]
        spreads = [
            statistics.stdev([100 * r["test_accuracy"] for r in mine]) if len(mine) > 1 else 0.0
            for mine in found
        ]
        left.errorbar(places, [mean(f) for f in found], spreads, capsize=3, label=method, **look)
        if highest := groups.get((method, sparsities[-1])):
            losses = [row["curve"]["train_loss"] for row in highest]
            means = [statistics.mean(values) for values in zip(*losses, strict=True)]
            right.plot(range(1, len(means) + 1), means, label=method, **look)
    if dense:
        left.axhline(mean(dense), color=GREY, linestyle="--", linewidth=1)
        left.annotate("dense", (0, mean(dense)), va="bottom", color=GREY, fontsize=9)
    left.set_xticks(range(len(sparsities)), [f"{100 * s:g} %" for s in sparsities])
    left.set(xlabel="sparsity", ylabel="test accuracy, % (bars: deviation over seeds)")
    right.set(xlabel="epoch", ylabel=f"training loss at {100 * sparsities[-1]:g} % (mean)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8)
    return figure


def write(rows: Sequence[Row], out: Path, command: str) -> None:
    """runs.json, table.md; compare and curves, as PNG and SVG."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "runs.json", list(rows))
    text = table(rows, command)
    write_atomically(out / "table.md", lambda file: file.write(text.encode()))
    if any(row["method"] != DENSE for row in rows):
        for name, figure in (("compare", plot(rows)), ("curves", curves(rows))):
            for kind in ("png", "svg"):
                figure.savefig(out / f"{name}.{kind}", dpi=150)
