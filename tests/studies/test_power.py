"""The number of seeds that a comparison requires."""

import statistics

import numpy as np
import pytest
from typer.testing import CliRunner

from torch_feather import cli
from torch_feather.errors import ConfigurationError
from torch_feather.studies.comparison import is_significant
from torch_feather.studies.power import (
    MOST_SEEDS,
    deviation_interval,
    pairs_of,
    power_of,
    power_table,
    seeds_for,
)
from torch_feather.training.checkpoint import write_json


def rows_of(row, differences, **more):
    """Rows of two methods whose paired differences, in points, are given."""
    return [
        row(method, seed=seed, accuracy=0.5 + (method == "feather") * d / 100, **more)
        for seed, d in enumerate(differences)
        for method in ("feather", "gmp")
    ]


def test_the_power_is_the_rate_of_significant_results():
    numbers = np.random.default_rng(0)
    for n, effect in ((3, 2.0), (8, 1.0), (20, 0.0)):
        samples = numbers.normal(effect, 1.0, (1000, n))
        rate = statistics.mean(is_significant(sample.tolist()) for sample in samples)
        assert power_of(n, effect, 1.0) == pytest.approx(rate, abs=0.04)


def test_the_number_of_seeds_is_the_smallest_with_enough_power():
    for effect, deviation in ((0.5, 0.71), (-1.96, 1.51), (0.5, 0.05)):
        n = seeds_for(effect, deviation)
        assert power_of(n, effect, deviation) >= 0.8
        assert n == 2 or power_of(n - 1, effect, deviation) < 0.8
    assert seeds_for(1e-4, 1.0) is None


def test_the_interval_of_a_standard_deviation_covers_it_in_95_percent():
    numbers = np.random.default_rng(0).normal(0.0, 2.0, (2000, 4))
    limits = [deviation_interval(statistics.stdev(sample), 4) for sample in numbers.tolist()]
    assert np.mean([low <= 2.0 <= high for low, high in limits]) == pytest.approx(0.95, abs=0.02)


def test_setups_are_not_mixed_and_equal_runs_count_once(row):
    short = rows_of(row, [1.0, 2.0, 4.0], epochs=3)
    long = [r | {"name": "long " + r["name"]} for r in rows_of(row, [5.0, 5.5, 6.0], epochs=6)]
    table = power_table([*short, *short, *long], [("feather", "gmp")])
    assert [line[1] for line in table.rows] == [
        "resnet20, images, 3 epochs",
        "resnet20, images, 6 epochs",
    ]
    assert [line[5] for line in table.rows] == ["3", "3"]
    assert [line[6].startswith("settled") for line in table.rows] == [False, True]


def test_comparisons_without_an_answer_are_left_out_or_say_so(row):
    assert power_table(rows_of(row, [1.0, 1.0, 1.0]), [("feather", "gmp")]).rows == []
    assert power_table(rows_of(row, [1.0]), [("feather", "gmp")]).rows == []
    (line,) = power_table(rows_of(row, [1.0, -1.0, 0.0]), [("feather", "gmp")]).rows
    assert line[6] == f"above {MOST_SEEDS:,}"


def test_an_unknown_comparison_is_an_error_with_the_labels(row):
    rows = rows_of(row, [1.0, 2.0])
    with pytest.raises(ConfigurationError, match=r"write 'FIRST vs\. SECOND'.*feather, gmp"):
        pairs_of(rows, ["feather vs. st3"])
    with pytest.raises(ConfigurationError, match="two sparse methods"):
        pairs_of(rows[::2], [])


def test_the_command_prints_the_table_of_recorded_rows(row, tmp_path):
    path = tmp_path / "runs.json"
    rows = rows_of(row, [1.0, 2.0, 4.0])
    more = {"config": {}, "test_loss": 1.0, "train_loss": 1.0}
    write_json(path, [r | more for r in rows])
    found = CliRunner().invoke(cli.make_app(), ["study", "power", str(path)])
    assert found.exit_code == 0, found.output
    assert "| feather vs. gmp | resnet20, images, 3 epochs | 90% | +2.33 |" in found.output
