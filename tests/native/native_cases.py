"""Helpers of the tests of native libraries: sparse networks, and running what was exported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

PACKAGE = Path(__file__).parents[2] / "packages/torch-feather-runtime/src"
if str(PACKAGE) not in sys.path:
    sys.path.insert(0, str(PACKAGE))

import torch_feather_runtime as runtime  # noqa: E402

import torch_feather as feather  # noqa: E402

TOLERANCE = 1e-5  # relative to the largest output
GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(GCC is None, reason="needs gcc")

NETWORKS = {
    "digits": ("resnet20", (1, 1, 8, 8), {}),
    "resnet": ("timm/resnet10t", (1, 3, 32, 32), {}),
    "mobilenet_v1": ("mobilenet_v1", (1, 3, 32, 32), {}),
    "densenet": ("densenet40_24", (1, 3, 16, 16), {}),
    "mobilenet_v3": ("timm/mobilenetv3_small_050", (1, 3, 64, 64), {}),
    "efficientnet": ("timm/efficientnet_lite0", (1, 3, 32, 32), {}),
    "ghostnet": ("timm/ghostnet_050", (1, 3, 32, 32), {}),
    "regnet": ("timm/regnety_002", (1, 3, 32, 32), {}),
    "convnext": ("timm/convnext_atto", (1, 3, 32, 32), {}),
    "deit": ("timm/deit_tiny_patch16_224", (1, 3, 64, 64), {"depth": 2, "img_size": 64}),
}


def pruned(model, sparsity=0.95, seed=0):
    """Return the model with sparse weights that keep the variance, and trained-like statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, _ConvNd | nn.Linear):
                kept = torch.rand(weight.shape, generator=generator) > sparsity
                weight.normal_(generator=generator).mul_(kept)
                weight.div_((weight[0].numel() * (1 - sparsity)) ** 0.5)
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def create(name):
    """Return an initialized network of `NETWORKS` and the shape of its input."""
    full_name, shape, options = NETWORKS[name]
    if full_name.startswith("timm/"):
        pytest.importorskip("timm")
        options = {"num_classes": 10, "in_chans": shape[1], **options}
        return feather.models.create_timm(full_name, **options), shape
    return feather.models.create(full_name, num_classes=10, in_channels=shape[1]), shape


def error(result, expected):
    """Return the largest difference relative to the largest expected number."""
    expected = expected.double()
    difference = (torch.as_tensor(result).double() - expected).abs().max()
    return float(difference / expected.abs().max())


def library(folder, name="model"):
    return runtime.load(Path(folder) / f"lib{name}.so")


def compile_and_run(folder, command, *sources, run=()):
    """Compile an exported example in its folder, run it, and return its output."""
    result = subprocess.run(
        [*command, *sources, "-o", "example_program", "-lm"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    program = str(Path(folder) / "example_program")
    done = subprocess.run([*run, program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
