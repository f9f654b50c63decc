"""diffusers: a saved pipeline has exact zeros, and holds the average."""

import pytest
import torch
from example_cases import expected_zeros, load, zeros_of

pytestmark = pytest.mark.apps
diffusers = pytest.importorskip("diffusers")


def test_a_saved_pipeline_has_exact_zeros(created, tmp_path):
    example = load("diffusers_unet")
    model, averaged = example.train(tmp_path, 4)
    diffusers.DDPMPipeline(averaged, diffusers.DDPMScheduler(10)).save_pretrained("pipeline")
    unet = diffusers.DDPMPipeline.from_pretrained("pipeline").unet
    assert zeros_of(created[-1], unet) == expected_zeros(created[-1])
    assert not torch.equal(unet.conv_in.weight, model.conv_in.weight)
