"""The study `transformers`: phases, settings that exploration chose, bits, and timings."""

import math

import pytest
import typer

from torch_feather.errors import ConfigurationError
from torch_feather.studies import STUDIES, timings, transformers
from torch_feather.studies.command import app
from torch_feather.studies.comparison import compare_pairs
from torch_feather.studies.execute import base_config
from torch_feather.studies.metric import BITS
from torch_feather.studies.study import GridAxes
from torch_feather.studies.summary import accuracy_table

STUDY = STUDIES["transformers"]
SPARSITIES = (0.5, 0.8, 0.9, 0.95)


def plan(recipe="gpt-char", seeds=(0, 1, 2)):
    return STUDY.plan(base_config(STUDY, recipe, None, None, []), GridAxes(SPARSITIES, seeds))


@pytest.fixture
def text_row(row):
    """Makes the row of a run on a text, from its bits per character."""

    def make(method="feather", sparsity=0.9, seed=0, bits=2.0, **more):
        config = {"config": {"data.name": "text"}, "test_loss": bits * math.log(2)}
        return row(method, sparsity, seed, **config, **more)

    return make


@pytest.mark.parametrize("recipe", transformers.EXPLORED_RECIPES)
def test_a_recipe_is_explored_alone_until_its_settings_are_chosen(recipe, monkeypatch):
    explored = plan(recipe)
    assert {run.config.seed for run in explored} == {1000, 1001}
    assert {run.config.data.validation for run in explored} == {0.1}
    assert {run.config.sparsity for run in explored} == {0.0, 0.9}
    assert len(explored) == 2 * len(transformers.EXPLORED)
    half = {run.config.epochs for run in explored}
    chosen = {"feather": {"optimizer.weight_decay": 1.0}, "gmp": {"options": {"every": 2}}}
    monkeypatch.setattr(transformers, "CHOSEN", {recipe: chosen})
    final = plan(recipe)[len(explored) :]
    assert plan(recipe)[: len(explored)] == explored
    assert {2 * epochs for epochs in half} == {run.config.epochs for run in final}
    assert {run.config.data.validation for run in final} == {0.0}
    assert {run.config.seed for run in final} == {0, 1, 2}
    settings = {run.label: (run.config.optimizer.weight_decay, run.config.options) for run in final}
    assert settings == {
        "dense": (0.1, {}),
        "feather": (1.0, {}),
        "gmp": (0.1, {"every": 2}),
        "feather (2:4)": (1.0, {"pattern": "2:4"}),
        "gmp (2:4)": (0.1, {"every": 2, "pattern": "2:4"}),
    }


def test_the_final_comparison_has_these_cells(monkeypatch):
    monkeypatch.setattr(transformers, "CHOSEN", {"gpt-char": {}})
    cells = [(r.label, r.config.sparsity) for r in plan(seeds=[0]) if r.config.seed == 0]
    sparse = [(label, s) for s in SPARSITIES for label in ("feather", "gmp")]
    patterned = [("feather (2:4)", 0.5), ("gmp (2:4)", 0.5)]
    assert sorted(cells) == sorted([("dense", 0.0), *sparse, *patterned])


def test_images_get_the_vision_transformer_and_texts_the_language_model():
    assert {run.config.network for run in plan()} == {"gpt_small"}
    assert {run.config.network for run in plan("cifar100-vit-small")} == {"vit_small"}
    assert {run.config.network for run in plan("digits")} == {"vit_small"}


def test_seeds_of_exploration_are_errors():
    with pytest.raises(ConfigurationError, match="--seeds 1000: exploration"):
        plan(seeds=[0, 1000])


def test_fewer_bits_are_better(text_row):
    rows = [text_row("dense", bits=1.5)]
    rows += [text_row(m, 0.9, 0, b) for m, b in (("feather", 2.0), ("gmp", 1.75))]
    table = accuracy_table(rows, metric=BITS)
    assert table.head[2] == "bits per character"
    assert [line[0] for line in table.rows] == ["dense", "gmp", "feather"]
    assert [line[2] for line in table.rows] == ["1.500", "1.750", "2.000"]


def test_the_comparison_of_a_text_is_in_bits(text_row):
    rows = [
        text_row(name, 0.9, seed, bits + 0.001 * seed * (name == "gmp"))
        for seed in range(3)
        for name, bits in (("feather", 1.9), ("gmp", 2.0))
    ]
    answer = STUDY.answer(rows, None)
    assert answer.sentences[0] == (
        "feather needs significantly fewer bits per character than gmp at 90% sparsity (n = 3)."
    )
    table, primary = answer.measured.tables
    assert primary.caption.startswith("Primary: Paired differences in bits per character with")
    assert primary.rows[0][2:4] == ["−0.101", "−0.103 to −0.099"]
    column = table.head.index("accuracy of the next character (%)")
    assert [line[column] for line in table.rows] == ["50.00 ± 0.00"] * 2
    assert answer.measured.figures[0].figure.axes[0].get_ylabel() == "bits per character, n = 3"
    sentences, _ = compare_pairs(rows, [("gmp", "feather")], metric=BITS)
    assert "gmp needs significantly more bits per character than feather" in sentences[0]


def test_exploration_compares_each_method_with_its_own_recipe(text_row):
    values = {"gmp": 2.0, "gmp (weight decay = 1)": 1.9, "feather": 1.8, "feather (θ = 0)": 1.85}
    rows = [
        text_row(
            name.split(" ")[0],
            label=f"exploration: {name}",
            seed=seed,
            bits=9.0,
            curve={"val_loss": [9.0, nats * math.log(2)]},
        )
        for name, nats in values.items()
        for seed in (1000, 1001)
    ]
    answer = STUDY.answer(rows, None)
    assert answer.sentences == []
    (table,) = answer.measured.tables
    assert table.caption.startswith("Exploration (seeds 1000, 1001): bits per character")
    assert {line[0]: (line[2], line[3]) for line in table.rows} == {
        "gmp": ("2.000 ± 0.000", "–"),
        "gmp (weight decay = 1)": ("1.900 ± 0.000", "−0.100"),
        "feather": ("1.800 ± 0.000", "–"),
        "feather (θ = 0)": ("1.850 ± 0.000", "+0.050"),
    }


def test_two_of_four_is_a_section_of_its_own(row):
    rows = [
        row(method, 0.5, seed, accuracy + seed / 100, label=label)
        for seed in range(3)
        for method, label, accuracy in (
            ("feather", "feather", 0.5),
            ("gmp", "gmp", 0.45),
            ("feather", "feather (2:4)", 0.4),
            ("gmp", "gmp (2:4)", 0.3),
        )
    ]
    tables = STUDY.answer(rows, None).measured.tables
    (patterned,) = [table for table in tables if table.caption.startswith("2:4")]
    assert [line[0] for line in patterned.rows] == ["feather (2:4)", "gmp (2:4)"]
    secondary = [table for table in tables if table.caption.startswith("Secondary, no claim")]
    assert [line[0] for line in secondary[0].rows] == [
        "feather (2:4) vs. gmp (2:4)",
        "feather (2:4) vs. feather",
        "gmp (2:4) vs. gmp",
    ]


def test_networks_are_timed_only_on_request_and_those_of_exploration_never(row, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    final, explored = row(), row(label="exploration: feather")
    where = (tmp_path, tmp_path, None)
    assert STUDY.measure(final, *where, False) == {}
    assert STUDY.measure(explored, *where, True) == {}
    assert timings.measure(final, *where, time=False) == {}


def test_only_this_study_has_a_flag_for_timings():
    flags = {
        name: {flag for option in study.params for flag in option.opts}
        for name, study in typer.main.get_command(app).commands.items()
    }
    assert [name for name, known in flags.items() if "--time" in known] == ["transformers"]


def test_latency_is_shown_if_all_networks_are_timed(row):
    without = {"milliseconds", "timed_on"}
    rows = [row("dense", milliseconds=2.0), row("feather", milliseconds=0.5)]
    (table,) = STUDY.answer(rows, None).measured.tables
    assert [line[-1] for line in table.rows] == ["1.00×", "4.00×"]
    assert "one thread of a cpu" in table.caption
    rows[1] = {key: value for key, value in rows[1].items() if key not in without}
    (table,) = STUDY.answer(rows, None).measured.tables
    assert "ms" not in table.head
