"""The phases of the study `beyond`."""

import statistics
from pathlib import Path

import pytest
import torch

import torch_feather as feather
from torch_feather.errors import ConfigurationError
from torch_feather.studies import STUDIES, beyond
from torch_feather.studies.comparison import compare_pairs
from torch_feather.studies.execute import base_config
from torch_feather.studies.runs import read_rows, row_matches
from torch_feather.studies.study import GridAxes
from torch_feather.training.config import DENSE

ROOT = Path(__file__).parents[2]
STUDY = STUDIES["beyond"]
FINAL_SEEDS = (3, 12)


def plan(seeds=FINAL_SEEDS, settings=()):
    config = base_config(STUDY, "cifar100-small", None, None, list(settings))
    return STUDY.plan(config, GridAxes([0.99], seeds))


def curve(accuracy):
    return {"train_loss": [1.0], "val_acc": [0.0, accuracy]}


def test_phases_share_neither_seeds_nor_runs_and_come_in_order():
    runs = plan()
    assert len({run.name for run in runs}) == len(runs)
    phases = (beyond.EXPLORATION, beyond.TUNING)
    by_label = {p.name: [r for r in runs if r.label.startswith(p.name)] for p in phases}
    explored, tuned = by_label.values()
    final = [run for run in runs if run not in explored + tuned]
    assert runs == explored + tuned + final
    seeds = [{run.config.seed for run in part} for part in (explored, tuned, final)]
    assert seeds == [{1000, 1001}, {2000, 2001}, set(FINAL_SEEDS)]


def test_only_the_final_comparison_trains_on_all_images():
    for run in plan():
        final = run.config.seed in FINAL_SEEDS
        assert (run.config.data.validation == 0) == final
        short = run.config.seed in beyond.EXPLORATION.seeds
        assert run.config.epochs == (5 if short else 10)


def test_a_variant_differs_from_feather_in_what_its_label_says():
    runs = {run.label: run.config for run in plan([3])}
    plain, tuned = runs["tuning: feather"], runs["tuning: feather, weight decay 1e-3"]
    assert (tuned.optimizer.weight_decay, plain.optimizer.weight_decay) == (1e-3, 5e-4)
    assert runs["tuning, dropped: feather, θ = 1"].options == {"theta": 1.0}
    assert runs["exploration, dropped: feather (clip = none)"].optimizer.clip is None
    assert runs["exploration: HAM (α = 2)"].options["alpha"] == 2.0


def test_every_method_of_the_plan_can_be_attached():
    for config in (run.config for run in plan([3]) if run.config.method != DENSE):
        model = torch.nn.Linear(100, 100)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        feather.sparsify(
            model, optimizer, config.method, sparsity=0.99, total_steps=9, **config.options
        )


def test_every_recorded_run_is_planned_with_its_settings():
    """Otherwise the command would train it again, such as if an option of a candidate changed."""
    config = base_config(STUDY, "cifar100-small", None, None, ["system.amp=false"])
    runs = STUDY.plan(config, GridAxes([0.98, 0.99, 0.995, 0.999], range(3, 23)))
    planned = {run.name: run for run in runs}
    rows = read_rows(ROOT / "results" / "beyond" / "runs.json")
    assert any(row["method"] == "torch_feather.methods.candidates:feather_ham" for row in rows)
    for row in rows:
        assert row_matches(row, planned[row["name"]]), row["name"]
        assert row["label"] == planned[row["name"]].label


def test_seeds_of_other_phases_are_errors():
    with pytest.raises(ConfigurationError, match="--seeds 1001"):
        plan([3, 1001])


def test_held_out_images_are_not_a_setting():
    with pytest.raises(ConfigurationError, match="determines"):
        plan(settings=["data.validation=0"])


def test_exploration_shows_validation_accuracy_and_no_test_accuracy(row):
    rows = [
        row(label=f"exploration: {name}", seed=seed, accuracy=0.987, curve=curve(accuracy))
        for name, accuracies in (("feather", (0.25, 0.3)), ("HAM (α = 2)", (0.26, 0.32)))
        for seed, accuracy in zip((1000, 1001), accuracies, strict=True)
    ]
    answer = STUDY.answer(rows, None)
    assert answer.sentences == []
    (table,) = answer.measured.tables
    assert [line[0] for line in table.rows] == ["feather", "HAM (α = 2)"]
    assert [line[2] for line in table.rows] == ["27.50 ± 3.54", "29.00 ± 4.24"]
    assert [line[3] for line in table.rows] == ["–", "+1.50"]
    assert table.rows[1][4] == "−4.85 to +7.85"
    assert not any("98.7" in cell for line in table.rows for cell in line)


def test_the_final_comparison_corrects_over_the_primary_sparsities(row, monkeypatch):
    tuned, ours = beyond.TUNED_FEATHER, "ours"
    variants = {tuned: {"method": "feather"}, ours: {"method": "gmp"}}
    final = beyond.Phase("final comparison", variants, validation=0.0)
    monkeypatch.setattr(beyond, "FINAL", final)
    monkeypatch.setattr(beyond, "PHASES", (*beyond.PHASES[:-2], final, beyond.REFERENCE))
    monkeypatch.setattr(beyond, "PRIMARY", (ours, tuned))
    rows = [
        row(label, s, seed, 0.5 + (label == ours) * (0.01 + 0.001 * (seed % 3)), label=label)
        for s in (0.98, 0.99, 0.995, 0.999)
        for label in ("feather", tuned, ours)
        for seed in range(3, 13)
    ]
    one_less = [
        row for row in rows if (row["label"], row["sparsity"], row["seed"]) != (ours, 0.98, 7)
    ]
    interim = STUDY.answer(one_less, None)
    assert interim.sentences == ["No conclusion yet: 1 of 60 primary runs are missing."]
    assert interim.measured.tables[1].caption.startswith("Primary, interim, no claim")
    answer = STUDY.answer(rows, None)
    above = "ours is significantly above feather (tuned) at 98%, 99% and 99.5% sparsity (n = 10)."
    assert answer.sentences[0] == above
    assert "Holm correction over all comparisons, all 3" in answer.sentences[-1]
    primary, *secondary = answer.measured.tables[1:]
    assert primary.caption.startswith("Primary")
    assert [line[1] for line in primary.rows] == ["98%", "99%", "99.5%"]
    assert all(table.caption.startswith("Secondary, no claim") for table in secondary)
    compared = {(line[0], line[1]) for table in secondary for line in table.rows}
    assert ("ours vs. feather (tuned)", "99.9%") in compared
    assert ("ours vs. feather", "98%") in compared


def test_holm_correction_over_all_sparsities_is_stricter(row):
    rows = [
        row(name, s, seed, 0.5 + (name == "gmp") * (0.01 + 0.005 * (seed % 3)))
        for s in (0.9, 0.95, 0.98)
        for name in ("feather", "gmp")
        for seed in range(4)
    ]

    def p_values(**how):
        _, (table,) = compare_pairs(rows, [("gmp", "feather")], **how)
        return [float(line[4]) for line in table.rows]

    one, three = p_values(), p_values(together=True)
    assert statistics.mean(three) == pytest.approx(3 * statistics.mean(one), abs=0.002)
