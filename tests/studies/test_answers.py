"""Answers of studies: sentences, tables, figures and pages."""

import itertools
import json
import random
import re
import statistics

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from torch_feather.analysis.plots import line_style, scheme_style
from torch_feather.studies import STUDIES, pareto, published, stability
from torch_feather.studies.comparison import compare_pairs, holm, interval, p_value, paired
from torch_feather.studies.execute import base_config
from torch_feather.studies.figures import (
    plot_over_epochs,
    plot_over_sparsity,
    plot_seeds,
    published_styles,
)
from torch_feather.studies.output import PUBLISHED, RunFacts, describe_methods, write_study
from torch_feather.studies.study import GridAxes
from torch_feather.studies.summary import accuracy_table, labels


@pytest.fixture
def rows(row):
    return [
        row("dense", accuracy=0.5),
        row("weak", 0.9, 0, 0.2),
        row("weak", 0.9, 1, 0.3),
        row("strong", 0.9, 0, 0.4),
        row("strong", 0.98, 0, 0.3),
    ]


def test_the_table_has_means_deviations_and_counts_best_first(rows):
    table = accuracy_table(rows)
    deviation = statistics.stdev([20.0, 30.0])
    assert [line[:5] for line in table.rows] == [
        ["dense", "", "50.00", "1", "900 / 1,000"],
        ["strong", "90%", "40.00", "1", "900 / 1,000"],
        ["weak", "90%", f"25.00 ± {deviation:.2f}", "2", "900 / 1,000"],
        ["strong", "98%", "30.00", "1", "980 / 1,000"],
    ]
    assert "learned sparsity" not in table.head
    assert {len(line) for line in table.rows} == {len(table.head)}


def test_the_table_shows_the_learned_sparsity_if_it_differs_from_the_final_one(row):
    table = accuracy_table([row("asl", learned_sparsity=0.87), row("st3", learned_sparsity=0.9)])
    column = table.head.index("learned sparsity")
    assert [line[column] for line in table.rows] == ["87.00%", ""]


def test_differences_are_paired_by_seed(row):
    first = [row("a", seed=s, accuracy=a) for s, a in [(2, 0.3), (0, 0.5), (7, 0.9)]]
    second = [row("b", seed=s, accuracy=a) for s, a in [(0, 0.4), (1, 0.1), (2, 0.25)]]
    assert paired(first, second) == pytest.approx([5.0, 10.0])


def test_the_interval_is_a_t_interval():
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)


@pytest.mark.parametrize(
    ("differences", "sentence"),
    [
        ([0.02, 0.021, 0.022], "a is significantly above b at 90% sparsity (n = 3)."),
        ([-0.02, -0.021, -0.022], "a is significantly below b at 90% sparsity (n = 3)."),
        (
            [0.02, -0.02, 0.01],
            "a and b: no significant difference at 90% sparsity "
            "(+0.33 points; 95% CI −4.84 to +5.50; n = 3).",
        ),
        ([0.02, 0.021], None),
    ],
    ids=["above", "below", "neither", "too-few"],
)
def test_a_conclusion_requires_three_seeds_and_an_interval_without_zero(row, differences, sentence):
    rows = [row("a", seed=i, accuracy=0.5 + by) for i, by in enumerate(differences)]
    rows += [row("b", seed=i, accuracy=0.5) for i in range(len(differences))]
    sentences, tables = compare_pairs(rows, [("a", "b")])
    assert sentences == ([sentence] if sentence else [])
    assert len(tables) == bool(sentence)


def test_sparsities_with_the_same_result_share_a_sentence(row):
    rows = [
        row(name, s, seed, accuracy)
        for s in (0.9, 0.95, 0.99)
        for seed in range(3)
        for name, accuracy in (("a", 0.5 + seed / 100), ("b", (0.4 if s < 0.98 else 0.6)))
    ]
    sentences, _ = compare_pairs(rows, [("a", "b")])
    assert sentences[:2] == [
        "a is significantly above b at 90% and 95% sparsity (n = 3).",
        "a is significantly below b at 99% sparsity (n = 3).",
    ]
    assert "all 3 significant differences remain (p < 0.05)" in sentences[2]


def test_the_last_sentence_has_the_result_after_holm_correction(row):
    accuracies = {
        "a": [0.50, 0.50, 0.50],
        "near": [0.480, 0.479, 0.486],
        "far": [0.40, 0.401, 0.402],
    }
    rows = [row(name, 0.9, i, a) for name, mine in accuracies.items() for i, a in enumerate(mine)]
    sentences, (table,) = compare_pairs(rows, [("a", "near"), ("a", "far")])
    assert sentences[0] == "a is significantly above near and far at 90% sparsity (n = 3)."
    assert "both significant differences remain (p < 0.05)" in sentences[1]
    alone = [line for line in rows if line["label"] != "near"]
    third = [row("third", 0.9, seed, a) for seed, a in enumerate((0.4, 0.5, 0.6))]
    sentences, _ = compare_pairs([*alone, *third], [("a", "far"), ("a", "third")])
    assert "the only significant difference remains (p < 0.05)" in sentences[-1]
    more = [
        row(f"other {i}", 0.9, seed, a) for i in range(4) for seed, a in enumerate((0.4, 0.5, 0.6))
    ]
    pairs = [("a", "near"), ("a", "far"), *((("a", f"other {i}")) for i in range(4))]
    sentences, (table,) = compare_pairs([*rows, *more], pairs)
    assert sentences[0].startswith("a is significantly above near")
    assert "1 of the 2 significant differences remains" in sentences[-1]
    assert sentences[-1].endswith("(p < 0.05): a vs. far at 90%.")
    uncorrected = p_value([2.0, 2.1, 1.4])
    assert [line[4] for line in table.rows][:2] == [f"{5 * uncorrected:.3f}", "< 0.001"]


def test_differences_that_holm_correction_removes_are_named_in_the_order_of_the_pairs(row):
    exact, near, far = [0.5, 0.5, 0.5], [0.480, 0.479, 0.486], [0.40, 0.401, 0.402]
    accuracies = {
        "a": {0.9: exact, 0.95: exact},
        "b": {0.9: near, 0.95: far},
        "c": {0.9: far, 0.95: near},
        "d": {0.9: far, 0.95: far},
    }
    rows = [
        row(name, sparsity, seed, value)
        for name, by_sparsity in accuracies.items()
        for sparsity, values in by_sparsity.items()
        for seed, value in enumerate(values)
    ]
    more = [
        row(f"other {i}", sparsity, seed, value)
        for i in range(4)
        for sparsity in (0.9, 0.95)
        for seed, value in enumerate((0.4, 0.5, 0.6))
    ]
    names = ["b", "c", "d", *(f"other {i}" for i in range(4))]
    sentences, _ = compare_pairs([*rows, *more], [("a", name) for name in names])
    assert "4 of the 6 significant differences remain (p < 0.05)" in sentences[-1]
    assert sentences[-1].endswith(", all except a vs. b at 90%; a vs. c at 95%.")


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.9]) == pytest.approx([0.04, 0.09, 0.09, 0.9])


def test_differences_that_are_all_equal_give_no_conclusion(row):
    rows = [row(m, seed=i, accuracy=a) for m, a in (("a", 0.503), ("b", 0.5)) for i in range(3)]
    sentences, (table,) = compare_pairs(rows, [("a", "b")])
    assert sentences == []
    assert table.rows[0][2:5] == ["+0.30", "–", "–"]


def test_the_curves_are_means_with_bars(rows):
    axes = plot_over_sparsity(rows).axes[0]
    heights = {tuple(bar.lines[0].get_ydata()) for bar in axes.containers}
    assert heights == {(40.0, 30.0), (25.0,)}
    assert not axes.figure.legends
    names = [text.get_text() for text in axes.texts]
    assert names == ["dense (n=1)", "strong (n=1)", "weak (n=2)"]  # downwards, as their lines end
    assert axes.get_ylabel() == "test accuracy (%)"


def test_the_number_of_runs_is_on_the_axis_if_it_is_the_same_everywhere(row):
    axes = plot_over_sparsity([row(m, 0.9, seed) for m in ("a", "b") for seed in (0, 1)]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["a", "b"]
    assert axes.get_ylabel() == "test accuracy (%), n = 2"


def test_labels_of_lines_do_not_overlap_and_stay_near_their_lines(row):
    numbers = random.Random(1)
    rows = [row(f"m{i}", 0.9, 0, numbers.choice((0.2, 0.4, 0.41))) for i in range(14)]
    figure = plot_over_sparsity(rows)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without lines
    assert all(above.y0 >= below.y1 - 2 for above, below in itertools.pairwise(boxes))
    inside = figure.bbox
    assert all(inside.y0 <= box.y0 and box.x1 <= inside.x1 for box in boxes)


def test_at_most_eight_series_have_colours_which_are_distinct():
    colours = [line_style(i)["color"] for i in range(20)]
    assert len(set(colours[:8])) == 8
    assert len(set(colours[8:])) == 1
    others = [(str(s["linestyle"]), s["marker"]) for s in map(line_style, range(8, 20))]
    assert len(set(others)) == len(others)


def test_every_colour_of_a_figure_follows_the_scheme_of_the_reader(row, tmp_path):
    study, answer, rows, planned = answered("compare", row, 3)
    write_study(study, answer, rows, tmp_path, RunFacts("command", planned))
    for file in tmp_path.glob("*.svg"):
        body = file.read_text().replace(scheme_style(), "")
        fixed = re.sub(r"var\([^)]*\)", "", body)
        assert set(re.findall(r"#[0-9a-f]{6}\b", fixed)) == set()


def test_missing_values_are_left_out_of_bands():
    axes = plot_over_epochs({"a": [[None, 1.0, 3.0], [None, 2.0, 5.0]]}, "height").axes[0]
    assert [list(axes.lines[0].get_xdata()), list(axes.lines[0].get_ydata())] == [[2, 3], [1.5, 4]]


def test_every_seed_is_a_dot(rows):
    axes = plot_seeds(rows, 0.9).axes[0]
    dots = [x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert dots == [20.0, 30.0, 40.0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["weak  (n=2)", "strong  (n=1)"]


def test_no_point_matches_the_pareto_front_at_the_same_or_lower_cost():
    points = [(1, 5), (2, 4), (2, 9), (2, 8), (3, 9), (4, 10)]
    assert pareto.pareto_front(points) == [(1, 5), (2, 9), (4, 10)]


@pytest.mark.parametrize(
    ("step", "word"), [(-1, "stabilizes earlier for smaller θ"), (1, "is not monotonic in θ")]
)
def test_stability_sentences_depend_on_whether_smaller_theta_is_earlier(row, step, word):
    rows = [
        row(seed=seed, label=stability.label_of(theta))
        | {"curve": {"mask_correlation": [None, 0.5 + step * 0.1 * theta, 1.0]}}
        for theta in stability.THETAS
        for seed in range(3)
    ]
    (sentence,) = stability.stability_sentences(rows)
    assert word in sentence
    assert stability.stability_sentences(rows[1:]) == []


def answered(name, row, seeds, drop=0):
    """Returns a study, its answer on synthetic rows of its plan, the rows and their number."""
    study = STUDIES[name]
    config = base_config(study, None, None, None, [])
    sparsities = [float(s) for s in study.digits_sparsities.split(",")]
    plan = study.plan(config, GridAxes(sparsities, range(seeds), (study.methods or "").split(",")))
    numbers = random.Random(0)
    rows = [
        row(
            run.config.method,
            run.config.sparsity,
            run.config.seed,
            numbers.uniform(0.3, 0.7),
            name=run.name,
            label=run.label,
            network=run.config.network,
            macs=1e6 * (1 + i % 5),
        )
        for i, run in enumerate(plan)
    ]
    return study, study.answer(rows[drop:], config), rows[drop:], len(plan)


@pytest.mark.parametrize("name", STUDIES)
def test_a_page_is_complete_and_self_contained(name, row, tmp_path):
    study, answer, rows, planned = answered(name, row, 3)
    facts = RunFacts(f"feather study {name} --seeds 0,1,2", planned)
    text = write_study(study, answer, rows, tmp_path, facts)
    page = (tmp_path / "index.html").read_text()
    assert study.question in page
    assert facts.command in page
    assert answer.sentences
    assert page.count("<svg") == len([*answer.measured.figures, *answer.published.figures])
    assert not re.search(r"<(script \w|link|img|iframe)|@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    for figure in [*answer.measured.figures, *answer.published.figures]:
        assert (tmp_path / f"{figure.name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{figure.name}.svg").stat().st_size > 1000
    for table in [*answer.measured.tables, *answer.published.tables]:
        assert {len(line) for line in table.rows} == {len(table.head)}
    assert text == (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "runs.json").read_text()) == rows
    if rows:
        for fact in ("a cpu, 1 thread", "torch 2", "0123456789+", "seeds 0, 1, 2"):
            assert fact in page
    # Published results are in a section of their own.
    measured, _, published = page.partition(PUBLISHED)
    assert bool(published) == bool(answer.published.tables)
    assert not any(table.caption in measured for table in answer.published.tables)


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "recipe"])
def test_with_part_of_the_runs_a_study_plots_them_without_conclusions(name, row):
    _, answer, rows, _ = answered(name, row, 2, drop=3)
    assert all(sentence.startswith("No conclusion yet: ") for sentence in answer.sentences)
    assert all(isinstance(figure.figure, Figure) for figure in answer.measured.figures)
    assert answer.measured.tables
    assert sum(len(table.rows) for table in answer.measured.tables) == len(
        {(r["label"], r["sparsity"], r["network"]) for r in rows}
    )


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in ("recipe", "stability")])
def test_with_the_dense_network_alone_there_is_a_table(name, row):
    answer = STUDIES[name].answer([row("dense")], None)
    assert [len(table.rows) for table in answer.measured.tables] == [1]


def test_methods_are_described_by_the_first_line_of_their_factory(row):
    rows = [row("dense"), row("gmp"), row("torch_feather.methods:gmp"), row("not.installed:method")]
    found = describe_methods(rows)
    assert found["dense"].startswith("The unpruned network")
    assert found["gmp"].startswith("Gradual magnitude pruning")
    assert found["torch_feather.methods:gmp"] == found["gmp"]
    assert found["not.installed:method"] == ""


def test_the_same_runs_give_the_same_files(row, tmp_path):
    for out in ("a", "b"):
        study, answer, rows, planned = answered("stability", row, 2)
        write_study(study, answer, rows, tmp_path / out, RunFacts("command", planned))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_every_published_series_names_its_source():
    series = [*published.MOBILENET, *published.RESNET50]
    assert all(s.source and s.points for s in series)
    assert all(0.5 < p.sparsity < 1 and 40 < p.accuracy < 80 for s in series for p in s.points)


def test_a_published_series_has_the_style_of_the_runs_of_its_method(row):
    options = [row("st3"), row("gmp (allocation = uniform)"), row("str (rate = 0.1)")]
    rows = [*options, row("str (rate = 0.01)"), row("feather")]
    names = labels(rows)
    found = published_styles(published.MOBILENET, rows)
    by_method = {s.method: style for s, style in zip(published.MOBILENET, found, strict=True)}
    assert by_method["st3"] == line_style(names.index("st3"))
    assert by_method["feather"] == line_style(names.index("feather"))
    assert by_method["gmp"] == line_style(1)
    # Two labels are STR, none is ProbMask: their styles are not used otherwise.
    assert by_method["str"] != by_method["probmask"]
    assert not any(by_method[name] in map(line_style, range(5)) for name in ("str", "probmask"))


def test_the_recipes_are_the_published_ones():
    config = base_config(STUDIES["recipe"], None, None, None, [])
    answer = STUDIES["recipe"].answer([], config)
    assert [s.partition(": ")[2] for s in answer.sentences] == [
        "all values equal the published ones."
    ] * 2


@pytest.mark.parametrize("name", ["compare", "recipe"])
def test_names_of_data_methods_and_networks_are_escaped(name, row, tmp_path):
    """HTML, Markdown and formulas of matplotlib in a name are shown, not interpreted."""
    hostile = "<img src=x onerror=alert(1)> | $\\frac{$ `x` [a](b)"
    study = STUDIES[name]
    config = base_config(study, None, None, None, [])
    rows = [
        row(method, 0.95, seed, 0.5 + seed / 10 + (method == "gmp") / 20, macs=5e6 + seed)
        | {"label": f"{method} {hostile}", "data": hostile, "network": hostile}
        | {"hardware": {"cpu": hostile, "threads": 1}}
        for method in ("feather", "gmp")
        for seed in range(3)
    ]
    answer = study.answer(rows, config)
    text = write_study(study, answer, rows, tmp_path, RunFacts("command", len(rows)))
    page = (tmp_path / "index.html").read_text()
    for shown in (text, page):
        assert "<img" not in shown
        assert "&lt;img" in shown
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert tables
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "[a](b)" not in text


def test_a_page_names_failed_runs_and_their_reasons(row, tmp_path):
    study, answer, rows, planned = answered("compare", row, 3)
    facts = RunFacts("command", planned + 1, failed={"digits-gmp-0.9-3": "the loss is NaN"})
    text = write_study(study, answer, rows, tmp_path, facts)
    for page in (text, (tmp_path / "index.html").read_text()):
        assert "digits-gmp-0.9-3: the loss is NaN" in page
