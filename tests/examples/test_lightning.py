"""Lightning: its checkpoints, automatic and manual optimization."""

import logging
import warnings

import lightning
import pytest
import torch
from example_cases import Killed, load

import torch_feather as feather

pytestmark = pytest.mark.apps
example = load("lightning_module")
EPOCHS, BATCHES = 4, 6
CLIPPED = {"gradient_clip_val": 1.0}
SETTINGS = {
    "automatic": (example.Digits, CLIPPED),
    "accumulated, bfloat16": (
        example.Digits,
        CLIPPED | {"accumulate_grad_batches": 2, "precision": "bf16-mixed"},
    ),
    "manual": (example.ManualDigits, {}),
}


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


def fit(folder, kind, options, kill=0, resume=None, seed=0):
    """Train in `folder`; `kill` ends the run after that many batches."""
    lightning.seed_everything(seed, verbose=False)
    trainer = example.make_trainer(
        folder, EPOCHS, limit_train_batches=BATCHES, limit_val_batches=1, **options
    )
    trainer.callbacks.append(KillAt(kill))
    model = kind()
    if kill:
        with pytest.raises(Killed):
            trainer.fit(model, *example.loaders())
    else:
        trainer.fit(model, *example.loaders(), ckpt_path=resume)
    return model, trainer


def assert_same(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    latent = zip(*(m.sparsifier.latent_weights().values() for m in (one, other)), strict=True)
    assert all(torch.equal(a, b) for a, b in latent)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = fit(str(tmp_path_factory.mktemp("whole")), *SETTINGS[name])
        return done[name]

    return get


@pytest.mark.parametrize("name", SETTINGS)
def test_a_killed_run_resumes_bitwise_identically_from_its_last_checkpoint(name, whole, tmp_path):
    fit(str(tmp_path), *SETTINGS[name], kill=2 * BATCHES + 3)  # within the third epoch
    last = str(tmp_path / "last.ckpt")
    # Another seed: the new model must be replaced completely.
    model, _ = fit(str(tmp_path), *SETTINGS[name], resume=last, seed=1)
    expected, _ = whole(name)
    assert model.sparsifier.step_count == expected.sparsifier.step_count
    assert feather.sparsity(model) == feather.sparsity(expected) == round(0.95 * 306720) / 306720
    assert_same(model, expected)


def test_automatic_and_manual_optimization_train_the_same_network(whole):
    assert_same(whole("automatic")[0], whole("manual")[0])


@pytest.mark.parametrize("name", SETTINGS)
def test_every_optimizer_step_counts_once(name, whole):
    model, trainer = whole(name)
    assert model.sparsifier.step_count == model.sparsifier.total_steps == trainer.global_step


def test_the_best_checkpoint_is_at_the_final_sparsity_and_a_plain_model(whole):
    _, trainer = whole("automatic")
    keep = trainer.checkpoint_callback
    best = example.Digits.load_from_checkpoint(keep.best_model_path)
    assert feather.sparsity(best.network) == round(0.95 * 306720) / 306720
    assert float(keep.best_model_score) > 0
    assert set(best.network.state_dict()) == set(
        feather.models.resnet8(num_classes=10, in_channels=1).state_dict()
    )


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example.main(epochs=2)
    assert "95.00% of the weights are zero" in capsys.readouterr().out
