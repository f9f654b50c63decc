"""Texts: windows, their division, bits per character, and runs that resume."""

import math
import random
from dataclasses import replace

import pytest
import torch
from training_callbacks import StopAt

import torch_feather as feather
from torch_feather import cli
from torch_feather.errors import ConfigurationError
from torch_feather.export.hub import model_card
from torch_feather.models.transformer import GPT
from torch_feather.training import train
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config, DataConfig, default_recipe, resolve_config
from torch_feather.training.console import percent
from torch_feather.training.data import data_identity, load_dataset, train_loader
from torch_feather.training.distillation import Distillation
from torch_feather.training.errors import CheckpointError, DataError, Interrupted, RunError
from torch_feather.training.evaluation import bits, evaluate
from torch_feather.training.export_run import export_run, load_network
from torch_feather.training.losses import make_loss
from torch_feather.training.mistakes import load_trained
from torch_feather.training.predict import load_predictor

CPU = torch.device("cpu")
LENGTH = 8


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    def tiny(num_classes, in_channels):
        assert in_channels == 1
        return GPT(num_classes, depth=1, dim=8, heads=2, length=LENGTH)

    monkeypatch.setitem(feather.models._MODELS, "tiny", tiny)


@pytest.fixture
def path(tmp_path):
    words, numbers = ["the", "cat", "sat\n", "on", "a", "mät"], random.Random(0)
    file = tmp_path / "cats.txt"
    file.write_text(" ".join(numbers.choice(words) for _ in range(300)), encoding="utf-8")
    return file


def settings(path, **changes):
    overrides = {
        **{"data.path": str(path), "data.length": LENGTH, "data.validation": 0.2},
        **{"network": "tiny", "epochs": 2, "sparsity": 0.5, "system.tensorboard": False},
    }
    return resolve_config("gpt-char", overrides=overrides | changes)


def decode(data, ids):
    return "".join(data.names[i] for i in ids.tolist()).replace("\\n", "\n")


@pytest.mark.parametrize("seed", [0, 7])
def test_a_text_is_divided_by_position_for_all_seeds(path, seed):
    data = load_dataset(settings(path).data, seed)
    parts = [decode(data, part.ids) for part in (data.train, data.validation, data.test)]
    text = path.read_text(encoding="utf-8")
    assert "".join(parts) == text
    assert len(parts[2]) == round(0.1 * len(text))
    assert len(parts[1]) == round(0.2 * (len(text) - len(parts[2])))
    assert list(data.names) == [repr(c)[1:-1] for c in sorted(set(text))]


def test_an_epoch_has_every_window_once_and_the_next_begins_elsewhere(path):
    config = settings(path)
    data = load_dataset(config.data, 0)
    loader = train_loader(data, config, CPU)
    text = decode(data, data.train.ids)
    epochs = []
    for _ in range(2):
        batches = list(loader)
        x, y = (torch.cat([getattr(b, name) for b in batches]) for name in "xy")
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert all(decode(data, torch.cat([a, b[-1:]])) in text for a, b in zip(x, y, strict=True))
        epochs.append([decode(data, window) for window in x])
    assert len(epochs[0]) == len(data.train) == (len(text) - 1) // LENGTH
    covered = sum(window in "".join(text) for window in epochs[0])
    assert covered == len(epochs[0])
    assert sorted(epochs[0]) != sorted(epochs[1])


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (None, {}, "cannot be read"),
        (b"\xff\xfe" * 100, {}, "byte 0 is not UTF-8"),
        (b"ab" * 20, {}, "40 characters, 2 of them different, are too few for windows of 8"),
        (b"a" * 400, {}, "1 of them different"),
        (b"ab" * 400, {"mixup": 0.2}, "data.mixup is for images"),
    ],
    ids=["missing", "bytes", "short", "one-character", "mixup"],
)
def test_texts_that_cannot_be_used_are_errors(tmp_path, content, changes, message):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises((DataError, ConfigurationError), match=message):
        load_dataset(DataConfig("text", str(file), length=LENGTH, **changes), 0)
    with pytest.raises(DataError, match="requires --data-path"):
        load_dataset(DataConfig("text"), 0)


def test_bits_per_character_equal_a_hand_computation():
    """A model that knows how often each of two letters follows each of them."""
    follows = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    text = torch.tensor([0, 1, 1, 0, 0, 1, 0])  # abbaaba
    model = torch.nn.Embedding.from_pretrained(follows.log(), freeze=False)
    # ab 0.75, bb 0.5, ba 0.5, aa 0.25, ab 0.75, ba 0.5
    by_hand = -math.log2(0.75 * 0.5 * 0.5 * 0.25 * 0.75 * 0.5) / 6
    batches = [(text[:4].view(2, 2), text[1:5].view(2, 2)), (text[4:6, None].T, text[5:7, None].T)]
    loss, accuracy = evaluate(model, batches, loss=make_loss(Config(), training=False))
    assert bits(loss) == pytest.approx(by_hand, abs=1e-6)
    # The answers: b after a, and a after b, the first of two equal ones.
    assert accuracy == pytest.approx(4 / 6)


def test_the_loss_of_a_text_is_the_mean_over_characters_and_that_of_images_is_unchanged():
    loss = make_loss(Config())
    logits, labels = torch.randn(3, 5, 4), torch.randint(4, (3, 5))
    expected = -logits.log_softmax(2).gather(2, labels[..., None]).mean()
    torch.testing.assert_close(loss(logits, labels), expected)
    images, classes = torch.randn(6, 4), torch.randint(4, (6,))
    plain = torch.nn.functional.cross_entropy
    assert torch.equal(loss(images, classes), plain(images, classes))
    mixed = torch.rand(6, 4)
    assert torch.equal(loss(images, mixed), plain(images, mixed))


def test_distillation_on_a_text_is_a_mean_over_characters():
    torch.manual_seed(0)
    teacher, ids = GPT(5, depth=1, dim=8, heads=2, length=6), torch.randint(5, (2, 6))
    logits = torch.randn(2, 6, 5)
    found = Distillation(teacher, replace(Config().distillation, weight=1.0))(
        torch.tensor(0.0), logits, ids
    )
    log_p = (teacher(ids) / 4).log_softmax(2)
    each = (log_p.exp() * (log_p - (logits / 4).log_softmax(2))).sum(2)
    torch.testing.assert_close(found, 16 * each.mean())


def test_a_run_resumes_bitwise_identically(path, tmp_path):
    config = settings(path)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", callback=StopAt(7))
    train(config, tmp_path / "run", resume=True)
    first, second = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "run")
    assert first.model_file.read_bytes() == second.model_file.read_bytes()
    losses = [[(m["train_loss"], m["val_loss"]) for m in r.read_metrics()] for r in (first, second)]
    assert losses[0] == losses[1]
    assert whole["test_bits_per_character"] == pytest.approx(whole["test_loss"] / math.log(2))
    assert whole["report"]["zeros"] == round(0.5 * whole["report"]["weights"])
    assert whole["class_names"][0] == "\\n"


def test_another_text_is_not_the_same_run(path, tmp_path):
    config = settings(path)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", callback=StopAt(3))
    text = path.read_text(encoding="utf-8")
    before = data_identity(load_dataset(config.data, 0))
    path.write_text(text.replace("cat", "act"), encoding="utf-8")
    assert data_identity(load_dataset(config.data, 0)) != before
    with pytest.raises(CheckpointError, match="class 'all'"):
        train(config, tmp_path / "run", resume=True)


def test_a_finished_language_model_is_loaded_exported_and_not_shown_as_images(
    path, tmp_path, capsys
):
    results = train(settings(path, epochs=1), tmp_path / "run")
    cli.evaluate(tmp_path / "run", device="cpu")
    shown = capsys.readouterr().out
    assert f"accuracy {percent(results['test_accuracy'])}" in shown
    assert f"({results['test_bits_per_character']:.4f} bits per character)" in shown
    run = RunDirectory(tmp_path / "run")
    model, example = load_network(run)
    assert (example.dtype, example.shape) == (torch.int64, (1, LENGTH))
    file = export_run(run, "sparse")
    names = list(model.state_dict())
    loaded = GPT(len(run.read_report()["class_names"]), depth=1, dim=8, heads=2, length=LENGTH)
    with pytest.MonkeyPatch.context() as patch:  # these are no characters
        patch.setattr(torch, "randn", lambda *size, **_: torch.full(size, -5.0))
        assert export_run(run, "onnx").exists()
    cli.bench(tmp_path / "run", batch=2)
    assert "PyTorch" in capsys.readouterr().out
    feather.load_sparse(file, loaded)
    assert all(torch.equal(loaded.state_dict()[n], model.state_dict()[n]) for n in names)
    for source in (run.path, file):
        with pytest.raises(RunError, match="is a language model"):
            load_predictor(source)
    with pytest.raises(DataError, match="a language model, but errors are shown on images"):
        load_trained(run).shown()


def test_a_text_has_its_own_recipe():
    assert default_recipe("text") == "gpt-char"
    assert DataConfig("text", "DATA/kjv.txt").title == "kjv"


def test_the_card_of_a_language_model_creates_it_as_it_was_trained():
    pytest.importorskip("huggingface_hub")
    run = {"network": "gpt_small", "data": "kjv", "classes": 80, "input_shape": [128]}
    run |= {"method": "feather", "test_accuracy": 0.5, "zeros": 9, "weights": 10}
    card = model_card("me/gpt", run | {"macs": {"dense": 40, "sparse": 4}}, "60 bytes")
    assert 'feather.models.create("gpt_small", 80, 1)' in card
    assert "text-generation" in card
