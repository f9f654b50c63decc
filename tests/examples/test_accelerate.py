"""Accelerate: training what prepare() returned, and resuming from save_state()."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from example_cases import load, spy_on

import torch_feather as feather

pytestmark = pytest.mark.apps
example = load("accelerate_loop")
EPOCHS, STEPS = 4, 4  # 7 batches: two per step, and the last one alone


@pytest.fixture
def few_images(monkeypatch):
    images, labels = example.digits()
    monkeypatch.setattr(example, "digits", lambda: (images[:220], labels[:220]))


@pytest.fixture(autouse=True)
def forget_the_process():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_killed_run_resumes_bitwise_identically_from_its_state(
    precision, few_images, tmp_path, killed_at
):
    def train(folder):
        AcceleratorState._reset_state()
        return example.train(tmp_path / folder, EPOCHS, mixed_precision=precision)

    expected = train("whole")
    # Gradients are clipped once per step: this is within the third epoch.
    killed_at(Accelerator, "clip_grad_norm_", 2 * STEPS + 2, lambda: train("run"))
    with spy_on(Accelerator, "clip_grad_norm_") as clipped:
        resumed = train("run")
    assert clipped.call_count == 2 * STEPS  # only the last two epochs
    assert feather.sparsity(resumed) == feather.sparsity(expected) == round(0.95 * 306720) / 306720
    for (name, a), b in zip(
        expected.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_zeros_are_kept_through_the_wrapped_optimizer():
    model = torch.nn.Linear(8, 8)
    with torch.no_grad():
        model.weight[::2] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    feather.keep_zeros(model, optimizer)
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    assert not model.weight[::2].any()


def test_the_example_runs(capsys):
    example.main(epochs=2)
    assert "95.00% of the weights are zero" in capsys.readouterr().out
