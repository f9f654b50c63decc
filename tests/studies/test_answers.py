"""What each study makes of its runs: sentences, tables, pictures."""

import json
import random
import re
import statistics

import pytest
from matplotlib.figure import Figure

from torch_feather.analysis.plots import look
from torch_feather.studies import STUDIES, flops, published, spread, stability
from torch_feather.studies.command import base
from torch_feather.studies.figures import every_seed, looks, over_epochs, over_sparsity
from torch_feather.studies.files import Made, write
from torch_feather.studies.study import Choices


@pytest.fixture
def rows(row):
    return [
        row("dense", accuracy=0.5),
        row("weak", 0.9, 0, 0.2),
        row("weak", 0.9, 1, 0.3),
        row("strong", 0.9, 0, 0.4),
        row("strong", 0.98, 0, 0.3),
    ]


def test_the_table_has_means_spreads_and_counts_best_first(rows):
    table = spread.accuracy_table(rows)
    deviation = statistics.stdev([20.0, 30.0])
    assert [line[:5] for line in table.rows] == [
        ["dense", "", "50.00", "1", "900 / 1,000"],
        ["strong", "90 %", "40.00", "1", "900 / 1,000"],
        ["weak", "90 %", f"25.00 ± {deviation:.2f}", "2", "900 / 1,000"],
        ["strong", "98 %", "30.00", "1", "980 / 1,000"],
    ]
    assert "before the exact end" not in table.head
    assert {len(line) for line in table.rows} == {len(table.head)}


def test_the_table_says_what_a_method_reached_before_it_was_made_exact(row):
    table = spread.accuracy_table([row("asl", own_sparsity=0.87), row("st3", own_sparsity=0.9)])
    column = table.head.index("before the exact end")
    assert [line[column] for line in table.rows] == ["87.00 %", ""]


def test_a_difference_is_taken_seed_by_seed(row):
    ours = [row("a", seed=s, accuracy=a) for s, a in [(2, 0.3), (0, 0.5), (7, 0.9)]]
    others = [row("b", seed=s, accuracy=a) for s, a in [(0, 0.4), (1, 0.1), (2, 0.25)]]
    assert spread.paired(ours, others) == pytest.approx([5.0, 10.0])


def test_the_interval_is_students():
    low, high = spread.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)


@pytest.mark.parametrize(
    ("ahead", "verdict"),
    [
        ([0.02, 0.021, 0.022], "a is ahead of b at 90 % sparsity (n = 3)."),
        ([-0.02, -0.021, -0.022], "a is behind b at 90 % sparsity (n = 3)."),
        ([0.02, -0.02, 0.01], "a is not told apart from b at 90 % sparsity (n = 3)."),
        ([0.02, 0.021], None),
    ],
    ids=["ahead", "behind", "neither", "too-few"],
)
def test_a_conclusion_takes_three_seeds_and_an_interval_beside_zero(row, ahead, verdict):
    rows = [row("a", seed=i, accuracy=0.5 + by) for i, by in enumerate(ahead)]
    rows += [row("b", seed=i, accuracy=0.5) for i in range(len(ahead))]
    sentences, tables = spread.against(rows, [("a", "b")])
    assert sentences == ([verdict] if verdict else [])
    assert len(tables) == bool(verdict)


def test_sparsities_with_one_verdict_are_told_together(row):
    rows = [
        row(name, s, seed, accuracy)
        for s in (0.9, 0.95, 0.99)
        for seed in range(3)
        for name, accuracy in (("a", 0.5 + seed / 100), ("b", (0.4 if s < 0.98 else 0.6)))
    ]
    sentences, _ = spread.against(rows, [("a", "b")])
    assert sentences[0] == "a is ahead of b at 90 and 95 %; behind b at 99 % sparsity (n = 3)."
    assert "Of the 3 differences told apart, 3 remain when" in sentences[1]


def test_what_is_left_of_many_comparisons_is_said(row):
    accuracies = {
        "a": [0.50, 0.50, 0.50],
        "near": [0.480, 0.479, 0.486],
        "far": [0.40, 0.401, 0.402],
    }
    rows = [row(name, 0.9, i, a) for name, mine in accuracies.items() for i, a in enumerate(mine)]
    sentences, (table,) = spread.against(rows, [("a", "near"), ("a", "far")])
    assert sentences[0] == "a is ahead of near and far at 90 % sparsity (n = 3)."
    assert "Of the 2 differences told apart, 2 remain when" in sentences[1]
    alone = [line for line in rows if line["label"] != "near"]
    third = [row("third", 0.9, seed, a) for seed, a in enumerate((0.4, 0.5, 0.6))]
    sentences, _ = spread.against([*alone, *third], [("a", "far"), ("a", "third")])
    assert "The one difference told apart remains when" in sentences[-1]
    more = [
        row(f"other {i}", 0.9, seed, a) for i in range(4) for seed, a in enumerate((0.4, 0.5, 0.6))
    ]
    pairs = [("a", "near"), ("a", "far"), *((("a", f"other {i}")) for i in range(4))]
    sentences, (table,) = spread.against([*rows, *more], pairs)
    assert sentences[0].startswith("a is ahead of near")
    assert "Of the 2 differences told apart, 1 remains when" in sentences[-1]
    assert sentences[-1].endswith("(Holm): a against far at 90 %.")
    by_itself = spread.chance([2.0, 2.1, 1.4])
    assert [line[4] for line in table.rows][:2] == [f"{5 * by_itself:.3f}", "< 0.001"]


def test_holms_correction():
    assert spread.holm([0.01, 0.04, 0.03, 0.9]) == pytest.approx([0.04, 0.09, 0.09, 0.9])


def test_differences_that_are_all_equal_give_no_conclusion(row):
    rows = [row(m, seed=i, accuracy=a) for m, a in (("a", 0.503), ("b", 0.5)) for i in range(3)]
    sentences, (table,) = spread.against(rows, [("a", "b")])
    assert sentences == []
    assert table.rows[0][2:5] == ["+0.30", "–", "–"]


def test_the_curves_are_means_with_bars(rows):
    axes = over_sparsity(rows).axes[0]
    heights = {tuple(bar.lines[0].get_ydata()) for bar in axes.containers}
    assert heights == {(40.0, 30.0), (25.0,)}
    legend = {text.get_text() for text in axes.figure.legends[0].get_texts()}
    assert legend == {"dense (n=1)", "weak (n=2)", "strong (n=1)"}


def test_bands_leave_out_what_is_not_there():
    axes = over_epochs({"a": [[None, 1.0, 3.0], [None, 2.0, 5.0]]}, "height").axes[0]
    assert [list(axes.lines[0].get_xdata()), list(axes.lines[0].get_ydata())] == [[2, 3], [1.5, 4]]


def test_every_seed_is_a_dot(rows):
    axes = every_seed(rows, 0.9).axes[0]
    dots = [x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert dots == [20.0, 30.0, 40.0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["weak  (n=2)", "strong  (n=1)"]


def test_the_frontier_is_what_nothing_beats_at_its_cost_or_below():
    points = [(1, 5), (2, 4), (2, 9), (2, 8), (3, 9), (4, 10)]
    assert flops.frontier(points) == [(1, 5), (2, 9), (4, 10)]


@pytest.mark.parametrize(
    ("step", "word"), [(-1, "the earlier the smaller θ is"), (1, "does not settle")]
)
def test_stability_says_whether_masks_settle_in_the_order_of_theta(row, step, word):
    rows = [
        row(seed=seed, label=stability.name(theta))
        | {"curve": {"mask_correlation": [None, 0.5 + step * 0.1 * theta, 1.0]}}
        for theta in stability.THETAS
        for seed in range(3)
    ]
    (sentence,) = stability.order_of_settling(rows)
    assert word in sentence
    assert stability.order_of_settling(rows[1:]) == []


def answered(name, row, seeds, drop=0):
    """A study's answer on made-up rows of its own plan."""
    study = STUDIES[name]
    config = base(study, None, None, None, [])
    sparsities = [float(s) for s in study.small_sparsities.split(",")]
    plan = study.plan(config, Choices(sparsities, range(seeds), (study.methods or "").split(",")))
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
def test_a_page_says_all_there_is_and_needs_nothing_else(name, row, tmp_path):
    study, answer, rows, planned = answered(name, row, 3)
    made = Made(f"feather study {name} --seeds 0,1,2", planned)
    text = write(study, answer, rows, tmp_path, made)
    page = (tmp_path / "index.html").read_text()
    assert study.question in page
    assert made.command in page
    assert answer.sentences
    assert page.count("<svg") == len([*answer.ours.pictures, *answer.published.pictures])
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    for picture in [*answer.ours.pictures, *answer.published.pictures]:
        assert (tmp_path / f"{picture.name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{picture.name}.svg").stat().st_size > 1000
    for table in [*answer.ours.tables, *answer.published.tables]:
        assert {len(line) for line in table.rows} == {len(table.head)}
    assert text == (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "runs.json").read_text()) == rows
    if rows:
        for fact in ("a cpu, 1 thread(s)", "torch 2", "0123456789+", "seeds 0, 1, 2"):
            assert fact in page
    # What others published is below a heading of its own.
    ours, _, theirs = page.partition("Published, not measured here")
    assert bool(theirs) == bool(answer.published.tables)
    assert not any(table.caption in ours for table in answer.published.tables)


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "recipe"])
def test_with_part_of_the_runs_a_study_draws_them_and_concludes_nothing(name, row):
    _, answer, rows, _ = answered(name, row, 2, drop=3)
    assert answer.sentences == []
    assert all(isinstance(picture.figure, Figure) for picture in answer.ours.pictures)
    assert answer.ours.tables
    assert sum(len(table.rows) for table in answer.ours.tables) == len(
        {(r["label"], r["sparsity"], r["network"]) for r in rows}
    )


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in ("recipe", "stability")])
def test_with_the_dense_network_alone_there_is_a_table(name, row):
    answer = STUDIES[name].answer([row("dense")], None)
    assert [len(table.rows) for table in answer.ours.tables] == [1]


def test_the_same_runs_give_the_same_files(row, tmp_path):
    for out in ("a", "b"):
        study, answer, rows, planned = answered("stability", row, 2)
        write(study, answer, rows, tmp_path / out, Made("command", planned))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_every_published_series_names_its_source():
    series = [*published.MOBILENET, *published.RESNET50]
    assert all(s.source and s.points for s in series)
    assert all(0.5 < p.sparsity < 1 and 40 < p.accuracy < 80 for s in series for p in s.points)


def test_a_published_series_looks_like_ours_of_the_same_method(row):
    options = [row("st3"), row("gmp (allocation = uniform)"), row("str (rate = 0.1)")]
    rows = [*options, row("str (rate = 0.01)"), row("feather")]
    names = spread.labels(rows)
    found = looks(published.MOBILENET, rows)
    by_method = {s.ours: style for s, style in zip(published.MOBILENET, found, strict=True)}
    assert by_method["st3"] == look(names.index("st3"))
    assert by_method["feather"] == look(names.index("feather"))
    assert by_method["gmp"] == look(1)
    # Two of ours are STR, none is ProbMask: those look like nothing else.
    assert by_method["str"] != by_method["probmask"]
    assert not any(by_method[name] in map(look, range(5)) for name in ("str", "probmask"))


def test_the_recipes_are_the_published_ones():
    config = base(STUDIES["recipe"], None, None, None, [])
    answer = STUDIES["recipe"].answer([], config)
    assert [s.partition(": ")[2] for s in answer.sentences] == [
        "every value is the published one."
    ] * 2
