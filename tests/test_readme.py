"""The figure and badges of the README, and numbers that pages repeat, are those recorded."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import torch_feather as feather
from torch_feather.engine.sharding import ONE_PROCESS
from torch_feather.methods import build_method, method_options
from torch_feather.methods.choice import RULES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def script(name):
    """Imports a script of docs/, which is no package."""
    found = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_figure_shows_the_recorded_numbers():
    plots = script("plot_overview")
    drawn = (ROOT / "docs" / "_static" / "overview.svg").read_text()
    again = plots.overview()
    texts = [re.findall(r"<text[^>]*>(.*?)</text>", svg) for svg in (drawn, again)]
    assert texts[0] == texts[1]
    for s, (mean, _) in plots.accuracies()["feather"].items():
        assert s == 0.995 or f"{mean:.1f}%" in texts[0]
    for bars in plots.costs().values():
        assert {text for _, _, text in bars} <= set(texts[0])


def test_badges_say_what_pyproject_says():
    for name, svg in script("badges").badges().items():
        assert (ROOT / "docs" / "_static" / name).read_text() == svg
        title = re.search("<title>(.*)</title>", svg)[1]
        assert f"![{title}](docs/_static/{name})" in README


def test_the_tables_of_the_deployment_page_are_those_recorded():
    page = (ROOT / "docs" / "deploy.md").read_text()
    for row in json.loads((ROOT / "results" / "deploy.json").read_text())["rows"]:
        kind = f"{100 * row['sparsity']:g}% zeros" if row["sparsity"] else "dense"
        smaller = r"(?: \(1/[\d.]+\))?"
        line = re.search(
            rf"^\| {kind} \| {row['bytes']:,}{smaller} \| {row['pytorch_ms']:g} \| "
            rf"{row['compiled_ms']:g} \| ([\d.]+)% of {row['images']:,} \|$",
            page,
            re.MULTILINE,
        )
        assert line, row
        assert float(line[1]) == pytest.approx(100 * row["test_accuracy"])


def test_the_tables_of_native_libraries_are_those_recorded():
    page = (ROOT / "docs" / "native.md").read_text()
    record = json.loads((ROOT / "results" / "native.json").read_text())
    assert len(record["rows"]) >= 8
    for row in record["rows"]:
        targets, cells = row["targets"], []
        if "onnx" in row and row["network"] != "resnet20, not trained, 8":
            packaged, onnx = targets["x86-64-v4"], row["onnx"]
            bytes_ = packaged["object_bytes"], packaged["library_bytes"], *onnx.values()
            cells.append([f"{n:,}" for n in bytes_ if isinstance(n, int)])
        if "riscv64" in targets:
            error = max(t["error"] for t in targets.values() if t["error"] is not None)
            each = [targets[t]["instructions_per_mac"] for t in ("x86-64-v3", "aarch64", "riscv64")]
            cells.append([row["network"], f"{error:.1e}", *(f"{n:.2f}" for n in each)])
        if small := targets.get("cortex-m4"):
            sizes = ("workspace", "program_ram", "constant", "program_flash")
            bytes_ = [f"{small[f'{name}_bytes']:,}" for name in sizes]
            each = f"{small['instructions_per_mac']:.1f}"
            cells.append([*bytes_, f"{small['error']:.1e}", each])
        assert cells
        for line in cells:
            assert f"| {' | '.join(line)} |" in page, line
    assert f"{record['runtime']['wheel_bytes']:,} bytes" in page
    assert f"{record['runtime']['import_ms']:.1f} ms" in page


def test_the_page_of_known_networks_is_that_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    known_networks = importlib.import_module("known_networks")
    results = ROOT / "results"
    stored = json.loads((results / "known_networks.json").read_text())
    assert (results / "known_networks.md").read_text() == known_networks.page(stored)
    assert stored.keys() == {known.name for known in known_networks.NETWORKS}
    accuracies = known_networks.accuracies(known_networks.NETWORKS[0])
    assert {key: len(values) for key, values in accuracies.items()} == {
        **{"0": 3, "0.9": 3, "0.95": 3},
        **{"0.98": 3, "0.99": 3, "0.995": 3},
    }


def test_a_known_network_is_as_sparse_as_its_row(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    known_networks = importlib.import_module("known_networks")
    first = known_networks.NETWORKS[0]
    assert feather.sparsity(known_networks.create(first, 0.95)) == pytest.approx(0.95, abs=1e-5)
    sizes = known_networks.sizes(first)
    stored = json.loads((ROOT / "results" / "known_networks.json").read_text())[first.name]
    for key, size in sizes.items():
        assert size == pytest.approx(stored["bytes"][key], rel=0.02)


@pytest.mark.parametrize("page", ["README.md", "docs/choose_sparsity.md", "docs/choose_method.md"])
def test_accuracies_of_pages_are_those_of_the_results(page):
    """Means at the reduced scale, with one decimal."""
    rows = json.loads((ROOT / "results" / "compare-small" / "runs.json").read_text())
    rows += json.loads((ROOT / "results" / "cifar100-small" / "runs.json").read_text())
    runs = {}
    for row in rows:
        key = row["method"], row["sparsity"]
        runs.setdefault(key, {})[row["seed"]] = 100 * row["test_accuracy"]
    means = {f"{sum(seeds.values()) / len(seeds):.1f}" for seeds in runs.values()}
    named = re.findall(r"\b(\d\d\.\d)(?: ± [\d.]+)?%(?! zeros)", (ROOT / page).read_text())
    assert set(named) - {"94.1", "99.5"} - means == set()  # these are sparsities
    assert len(named) >= 4


CHOICE = (ROOT / "docs" / "choose_method.md").read_text()
NUMBER = r"([+−]\d+\.\d\d)"


def rows_of(heading):
    """The cells of the table in a section of the page on methods."""
    part = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", CHOICE, re.DOTALL | re.MULTILINE)[1]
    table = re.search(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", part, re.MULTILINE)[1]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in table.splitlines()]


def comparisons(file):
    """Difference, interval and n of each comparison in a table of a study, with its methods."""
    cells = rf"^\| (.+?) \| [\d.]+% \| {NUMBER} \| {NUMBER} to {NUMBER} \|.*? \| (\d+) \|$"
    found = re.findall(cells, file.read_text(), re.MULTILINE)
    return {(row[1:4], row[4], word) for row in found for word in row[0].split()}


@pytest.mark.parametrize("heading", ["By sparsity and network", "By need"])
def test_numbers_of_the_page_on_methods_are_those_of_the_tables_it_links(heading):
    seen = 0
    for row in rows_of(heading):
        text, n = " ".join(row[:-1]), row[-1]
        links = re.findall(r"\((\.\./results/\S+?\.md)\)", text)
        files = [ROOT / "docs" / link for link in links]
        known = set().union(*map(comparisons, files))
        named = set(re.findall(r"`([\w+-]+)`", text)) - {"feather"}
        given = re.findall(rf"{NUMBER} \({NUMBER} to {NUMBER}\)", text)
        for numbers in given:
            assert any((numbers, n, name) in known for name in named), (row, numbers)
        texts = "".join(file.read_text() for file in files)
        means = re.findall(r"(\d\d\.\d\d)%", text)
        assert [mean for mean in means if f"| {mean} ±" not in texts] == []
        short = re.findall(r"[+−]\d\.\d \([+−]\d\.\d to [+−]\d\.\d\)", text)
        texts = re.sub(r"(?<=[ (])-(?=\d)", "−", texts)
        assert [one for one in short if f"| {one} |" not in texts] == []
        measured = bool(given or means or short or "%" in row[2])
        assert n == ("3" if measured else "–"), row
        # Intervals that contain 0 are said to show no difference, and others are not.
        none = [(low[0], high[0]) == ("−", "+") for _, low, high in given]
        assert any(none) == ("no difference found" in text) or not given, row
        seen += len(given)
    assert seen >= 9


def test_costs_of_the_page_on_methods_are_those_recorded():
    cost = (ROOT / "results" / "method_cost.txt").read_text()
    number = r"([\d.]+)"
    line = rf"^  (\S.*?) +{number} +{number} +{number} +{number}   \(plain, compiled\)$"
    times = {}
    for name, _, plain, _, compiled in re.findall(line, cost, re.MULTILINE):
        times.setdefault(name, []).append((plain, compiled))
    output = (ROOT / "results" / "method_overhead.txt").read_text()
    line = rf"^  (\S+?)(?:, θ 1)? +{number} +\S+ +{number} +{number}-{number} "
    steps = {row[0]: row[2:] for row in re.findall(line, output, re.MULTILINE)}
    assert "has {} ({} to {})".format(*steps["control"]) in CHOICE
    line = r"engine of (\S+?)(?:, θ 1)?, third.*?(\d\.\d\d) persistent"
    kept = dict(re.findall(line, output, re.DOTALL))
    shards = set(re.split(r"[ ,.]+", ONE_PROCESS))
    rows = rows_of("Cost and support")
    assert {row[0].strip("`") for row in rows} == {*method_names()}
    for cell, *cells in rows:
        name = cell.strip("`")
        pairs = list(zip(*times[name], strict=True)) if name in times else [("–",)] * 2
        step = "{} ({} to {})".format(*steps[name]) if name in steps else "–"
        example = {"example_input": torch.zeros(1)} if name == "feather-flops" else {}
        method = build_method(name, sparsity=0.9, **example)
        facts = ["pattern" in method_options(name), hasattr(method, "allocation"), name in shards]
        supported = ["yes" if one else "no" for one in facts]
        assert cells == [*map(", ".join, pairs), step, kept.get(name, "–"), *supported]
    text = " ".join(CHOICE.split())
    plain, compiled = (" and ".join(one) for one in zip(*times["feather, theta 0.5"], strict=True))
    assert f"{plain} times as much (NumPy), {compiled} times as much (llvmlite)" in text
    hard = sorted(float(one) for pair in times["hard-ste"] for one in pair)
    assert f"{hard[0]} to {hard[-1]} times that of `feather`" in text


def method_names():
    """Methods of the package; tests of other files register some."""
    pages = (ROOT / "docs" / "methods").glob("*.md")
    return {page.stem for page in pages} - {"README"}


def test_the_rules_of_the_page_on_methods_are_those_of_the_package():
    rows = rows_of("Let `auto` choose")
    for row, rule in zip(rows, RULES, strict=True):
        low, high = rule.sparsity
        sparsity = "any" if rule.sparsity == (0, 1) else f"{100 * low:g}% to {100 * high:g}%"
        options = ", ".join(f"{name}={value}" for name, value in rule.options.items())
        assert row[:5] == [
            "none yet" if low >= 1 else sparsity,
            rule.network or "any",
            rule.optimizer or "any",
            f"{rule.steps:,}",
            f"`{rule.method}`" + (f" ({options})" if options else ""),
        ]
        assert f"](../{rule.evidence})" in row[5]
    chosen = {rule.method for rule in RULES if rule.sparsity[0] < 1}
    assert ("always chooses `feather`" in CHOICE) == (chosen == {"feather"})
