"""Recorded masks, their correlation with the final mask, and the figures of a run."""

import math

import numpy as np
import pytest
import torch

import torch_feather as feather
from torch_feather.analysis import plots
from torch_feather.analysis.plots import line_style, plot_run, stability
from torch_feather.analysis.stability import correlations, mask_file, read_masks
from torch_feather.training import train
from torch_feather.training.config import apply, resolve_config
from torch_feather.training.masks import record_masks
from torch_feather.training.watch import Watch


@pytest.mark.parametrize("weights", [1, 7, 8, 9, 1000, 4099])
def test_correlations_are_those_of_numpy(weights):
    rng = np.random.default_rng(weights)
    masks = [rng.random(weights) < density for density in (0.9, 0.5, 0.1, 0.05)]
    masks[-1][0] = ~masks[-1].any() or masks[-1][0]
    found = correlations([np.packbits(mask) for mask in masks], weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = [np.corrcoef(mask, masks[-1])[0, 1] for mask in masks]
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_mask_that_keeps_all_or_nothing_has_no_correlation():
    masks = [np.ones(10, bool), np.zeros(10, bool), np.arange(10) < 3, np.arange(10) < 3]
    found = correlations([np.packbits(mask) for mask in masks], 10)
    assert [math.isnan(value) for value in found] == [True, True, False, False]
    assert found[2:] == [1.0, 1.0]
    assert np.isnan(stability(found).axes[0].lines[0].get_ydata()[:2]).all()


def test_opposite_masks_of_many_weights_do_not_overflow():
    weights = 1_000_000
    mask = np.arange(weights) % 2 == 0
    assert correlations([np.packbits(~mask), np.packbits(mask)], weights) == [-1.0, 1.0]


@pytest.mark.parametrize("method", feather.available_methods())
def test_masks_are_recorded_exactly_for_every_method(method, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 7, 3), torch.nn.Flatten(), torch.nn.Linear(252, 11)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"example_input": torch.randn(1, 1, 8, 8)} if method == "feather-flops" else {}
    sparsifier = feather.sparsify(model, optimizer, method, sparsity=0.9, total_steps=4, **options)
    for _ in range(3):
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = sparsifier.masks().values()
    record_masks(masks, tmp_path, 1)
    (packed,) = read_masks(tmp_path, 1)
    kept = torch.cat([mask.flatten() for mask in masks]).numpy()
    assert (np.unpackbits(packed, count=kept.size).astype(bool) == kept).all()
    assert (
        mask_file(tmp_path, 1).stat().st_size <= kept.size / 8 + 129
    )  # one bit per weight, and a header


SMALL = {
    "epochs": 3,
    "batch_size": 512,
    "compare_dense": False,
    "track_masks": True,
    "system.threads": 1,
    "system.checkpoint_steps": 2,
}


class KilledError(Exception):
    pass


class KilledAt(Watch):
    def __init__(self, step):
        self.left = step

    def step(self, images):
        self.left -= 1
        if self.left == 0:
            raise KilledError


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_records_the_same_masks(tmp_path):
    config = apply(resolve_config("digits"), SMALL, "test")
    train(config, tmp_path / "whole")
    for step in (5, 3):  # in the second epoch; after resuming at step 4, in the third
        with pytest.raises(KilledError):
            train(config, tmp_path / "killed", resume=True, watch=KilledAt(step))
    train(config, tmp_path / "killed", resume=True)
    files = [sorted((tmp_path / run / "masks").iterdir()) for run in ("whole", "killed")]
    assert [file.name for file in files[0]] == [f"000{epoch}.npy" for epoch in (1, 2, 3)]
    assert [file.name for file in files[1]] == [file.name for file in files[0]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
    assert (tmp_path / "whole" / "masks.png").exists()
    final = np.unpackbits(read_masks(tmp_path / "whole", 3)[-1])
    assert final.sum() == 306720 - round(0.95 * 306720)


def test_incomplete_masks_are_none(tmp_path):
    record_masks([torch.ones(3, dtype=torch.bool)], tmp_path, 2)
    assert read_masks(tmp_path, 2) is None


def test_the_figure_of_masks_requires_masks(tmp_path):
    layer = {"name": "a", "weights": 3, "zeros": 2, "sparsity": 2 / 3}
    results = {
        "network": "net",
        "data": "images",
        "method": "feather",
        "test_accuracy": 0.5,
        "report": {"weights": 3, "layers": [layer]},
    }
    line = {"epoch": 1, "val_acc": 0.5, "train_loss": 1.0, "sparsity": 2 / 3}
    assert "masks.png" not in [file.name for file in plot_run(tmp_path, [line], results)]
    record_masks([torch.tensor([True, False, False])], tmp_path, 1)
    assert "masks.png" in [file.name for file in plot_run(tmp_path, [line], results)]


@pytest.mark.parametrize(("old", "new"), [("look", line_style), ("draw_run", plot_run)])
def test_names_of_version_0_1_are_deprecated(old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated. Use .*{new.__name__}"):
        assert getattr(plots, old) is new
