"""The figure and badges of the README, and numbers that pages repeat, are those recorded."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

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
    assert set(named) - {"99.5"} - means == set()
    assert len(named) >= 4
