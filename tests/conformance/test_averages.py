"""Averages of effective weights are noticed; the recipes deliver exact zeros."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_feather as feather

from .harness import start


def warned(work) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in caught if "averages effective weights" in str(w.message)]


def finish(run) -> None:
    run.train(run.sparsifier.step_count, 10)
    run.sparsifier.finalize()


@pytest.mark.parametrize("when", ["before sparsify", "after sparsify", "late"])
def test_an_average_is_noticed_once(when):
    run = start()
    averages = []

    def work():
        if when == "late":
            run.train(0, 3)
        averages.append(AveragedModel(run.model))
        finish(run)

    if when == "before sparsify":
        averages.append(AveragedModel(run.model))
        [text] = warned(lambda: finish(run))
    else:
        [text] = warned(work)
    assert text.startswith("AveragedModel averages")
    assert "LatentAverage" in text


def test_timm_is_noticed():
    utils = pytest.importorskip("timm.utils")
    run = start()
    average = utils.ModelEmaV3(run.model)
    assert average is not None
    [text] = warned(lambda: finish(run))
    assert text.startswith("ModelEmaV3")


def test_what_averages_another_model_or_latent_weights_is_no_reason_for_a_warning():
    class Own(AveragedModel):
        """May average latent weights."""

    run = start()
    others = [AveragedModel(nn.Linear(5, 5)), Own(run.model)]
    average = feather.LatentAverage(run.sparsifier)
    assert warned(lambda: finish(run)) == []
    assert len(others) == 2
    assert average is not None


@pytest.mark.filterwarnings("ignore:AveragedModel averages")
def test_the_recipe_for_swa_delivers_exact_zeros():
    """Both averages have the same decay, and only one of them is sparse."""
    run = start()
    swa = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average = feather.LatentAverage(run.sparsifier, decay=0.5)
    for step in range(10):
        run.loop.step(step)
        swa.update_parameters(run.model)
        average.update()
    delivered = average.copy_to(copy.deepcopy(run.model))
    assert run.case.zeros(delivered) == run.zeros() == round(0.8 * run.case.size)
    assert run.case.zeros(swa.module) < run.zeros()
    assert not torch.equal(delivered[0].weight, run.model[0].weight)


@pytest.mark.apps
def test_the_recipe_for_diffusers_delivers_exact_zeros(tmp_path):
    training_utils = pytest.importorskip("diffusers.training_utils")
    from diffusers import UNet2DModel

    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
              "norm_num_groups": 8, "block_out_channels": (16, 16),
              "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
              "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    model = UNet2DModel(**config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ema = training_utils.EMAModel(model.parameters(), decay=0.9)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.9, total_steps=8)
    average = feather.LatentAverage(sparsifier, decay=0.9)

    def train():
        for _ in range(8):
            x = torch.randn(2, 1, 8, 8)
            (model(x, 5).sample - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            average.update()

    [text] = warned(train)
    assert text.startswith("EMAModel averages")
    averaged = average.copy_to(copy.deepcopy(model))
    averaged.save_pretrained(tmp_path)
    sparsifier.finalize()
    delivered = UNet2DModel.from_pretrained(tmp_path)
    assert feather.sparsity(delivered) == feather.sparsity(model) == pytest.approx(0.9, abs=1e-4)
    ema.copy_to(model.parameters())
    assert feather.sparsity(model) < 0.9
