"""Loops within other libraries: exact zeros, and a resume that nobody can tell from one run."""

import importlib.util
import re

import pytest
import torch
from example_cases import assert_same, expected_zeros, load, zeros_of

pytestmark = pytest.mark.apps

# Example, package that it needs, length of the run (steps or epochs), where it stops in between.
LOOPS = {
    "diffusers_unet": ("diffusers", 8, 3),
    "fastai_learner": ("fastai", 3, 1),
    "geometric_graph": ("torch_geometric", 12, 5),
    "gpt_loop": ("torch", 12, 5),
    "keras_model": ("keras", 3, 1),
    "litgpt_loop": ("litgpt", 12, 5),
    "monai_segmentation": ("monai", 8, 3),
    "torchrl_dqn": ("torchrl", 20, 7),
    "torchvision_detector": ("torchvision", 3, 1),
}


def example(name):
    if importlib.util.find_spec(LOOPS[name][0]) is None:
        pytest.skip(f"{LOOPS[name][0]} is not installed")
    return load(name)


def models(result):
    """The networks among the results of `train`."""
    found = result if isinstance(result, tuple) else (result,)
    return [one for one in found if isinstance(one, torch.nn.Module)]


@pytest.mark.parametrize("name", LOOPS)
def test_a_resumed_run_is_bitwise_identical_and_exactly_sparse(name, created, tmp_path):
    module, (_, length, stop) = example(name), LOOPS[name]
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = module.train(tmp_path / "whole", length)
    module.train(tmp_path / "parts", length, stop=stop)
    assert 0 < created[-1].step_count < created[-1].total_steps
    resumed = module.train(tmp_path / "parts", length)

    for one, other in zip(models(whole), models(resumed), strict=True):
        assert_same(one, other)
    for sparsifier in (created[0], created[-1]):
        assert sparsifier.step_count == sparsifier.total_steps
        assert zeros_of(sparsifier) == expected_zeros(sparsifier)


@pytest.mark.parametrize("name", LOOPS)
def test_the_example_runs(name, created, capsys):
    example(name).main(LOOPS[name][1])
    shown = re.search(r"([\d.]+)% of the weights are zero", capsys.readouterr().out)
    assert float(shown[1]) == pytest.approx(100 * created[-1].target, abs=0.02)
