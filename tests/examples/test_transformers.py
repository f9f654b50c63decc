"""Transformers: the Trainer's checkpoints, gradient accumulation and best model."""

import pytest
import torch
from example_cases import Killed, load
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

import torch_feather as feather

pytestmark = pytest.mark.apps
example = load("transformers_trainer")
EPOCHS, STEPS = 4, 4  # 8 batches: two per step
MODELS = {"vit": example.vision_transformer, "bert": example.bert}


class SaveAndKill(TrainerCallback):
    """Saves a checkpoint within an epoch, and ends the run one step later."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_save = control.should_save or state.global_step == self.step

    def on_step_begin(self, args, state, control, **_):
        if self.step and state.global_step == self.step + 1:
            raise Killed


def make(folder, model, kill=0, seed=0, accuracies=None):
    set_seed(seed)
    network, train, validation = MODELS[model]()
    trainer, sparsifier = example.make_trainer(
        network, train[:256], validation[:64], str(folder), EPOCHS
    )
    trainer.add_callback(SaveAndKill(kill))
    if accuracies is not None:
        script = iter(accuracies)

        def measure(prediction):
            accuracy = next(script)
            return {"accuracy": accuracy, "final_accuracy": accuracy * sparsifier.at_target}

        trainer.compute_metrics = measure
    set_seed(0)
    return trainer, sparsifier


@pytest.mark.parametrize("model", MODELS)
def test_a_killed_run_resumes_bitwise_identically_from_its_last_checkpoint(model, tmp_path):
    """BERT has dropout, whose random state is part of the Trainer's checkpoint."""
    rising = [0.1, 0.2, 0.3, 0.4]
    whole, expected = make(tmp_path / "whole", model, accuracies=rising)
    whole.train()
    killed, _ = make(tmp_path / "run", model, kill=2 * STEPS + 1, accuracies=rising)
    with pytest.raises(Killed):
        killed.train()
    # Another seed: the new model must be replaced completely.
    resumed, sparsifier = make(tmp_path / "run", model, seed=1, accuracies=rising[2:])
    resumed.train(resume_from_checkpoint=True)
    assert sparsifier.step_count == expected.step_count == EPOCHS * STEPS == whole.state.max_steps
    latent = (s.latent_weights().values() for s in (sparsifier, expected))
    assert all(torch.equal(a, b) for a, b in zip(*latent, strict=True))
    states = [s.finalize().state_dict() for s in (sparsifier, expected)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    n = expected.step.training.weights.size
    assert feather.sparsity(whole.model) == round(0.9 * n) / n


def test_the_best_model_is_at_the_final_sparsity_and_stays_bitwise_identical(tmp_path):
    trainer, sparsifier = make(tmp_path, "vit", accuracies=[0.9, 0.8, 0.4, 0.3])
    trainer.train()
    assert trainer.state.best_global_step == 2 * STEPS  # the first at the final sparsity
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    model = sparsifier.finalize()
    n = sparsifier.step.training.weights.size
    assert feather.sparsity(model) == round(0.9 * n) / n
    assert set(best) == set(model.state_dict())
    assert all(torch.equal(best[name], value) for name, value in model.state_dict().items())


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example.main(epochs=2)
    assert "90.00% of the weights are zero" in capsys.readouterr().out
