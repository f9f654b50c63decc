"""Lightning with manual optimization: a GAN whose two networks have an optimizer each."""

import logging
import warnings

import lightning
import pytest
import torch
from example_cases import Killed, load

import torch_feather as feather

pytestmark = pytest.mark.apps
example = load("lightning_gan")
EPOCHS, BATCHES = 3, 4


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


class KillAt(lightning.Callback):
    def __init__(self, batch):
        self.left = batch

    def on_train_batch_end(self, *_):
        self.left -= 1
        if self.left == 0:
            raise Killed


def fit(folder, model, kill=0, resume=None, seed=0):
    lightning.seed_everything(seed, verbose=False)
    trainer = example.make_trainer(str(folder), EPOCHS, limit_train_batches=BATCHES)
    trainer.callbacks.append(KillAt(kill))
    model = model()
    if kill:
        with pytest.raises(Killed):
            trainer.fit(model, example.loader())
    else:
        trainer.fit(model, example.loader(), ckpt_path=resume)
    return model


def assert_same(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class Joint(example.GAN):
    """One sparsifier, and so one threshold, for both networks."""

    def configure_optimizers(self):
        optimizers, _ = super().configure_optimizers()
        for sparsifier in self.sparsifiers:
            sparsifier.detach()
        steps = int(self.trainer.estimated_stepping_batches)
        self.sparsifiers = [
            feather.sparsify(self, optimizers, sparsity=0.9, total_steps=steps, min_density=0.02)
        ]
        return optimizers, []


@pytest.mark.parametrize("model", [example.GAN, Joint], ids=["two sparsifiers", "one sparsifier"])
def test_both_networks_are_exactly_sparse_and_a_killed_run_resumes_bitwise(model, tmp_path):
    whole = fit(tmp_path / "whole", model)
    for sparsifier in whole.sparsifiers:
        assert sparsifier.step_count == sparsifier.total_steps == EPOCHS * BATCHES
        names = sparsifier.masks()
        size = sum(mask.numel() for mask in names.values())
        weights = [sparsifier.model.get_parameter(name) for name in names]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        assert zeros == round(0.9 * size)

    fit(tmp_path / "part", model, kill=2 * BATCHES + 1)
    resumed = fit(tmp_path / "part", model, resume=str(tmp_path / "part" / "last.ckpt"), seed=1)
    assert_same(whole, resumed)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example.main(epochs=2)
    assert capsys.readouterr().out.count("90.00% of the weights are zero") == 2
