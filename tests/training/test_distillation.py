"""Knowledge distillation."""

import json
import math
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_distributed import NETWORKS, together
from torch._subclasses.fake_tensor import FakeTensorMode
from training_callbacks import StopAt

import torch_feather as feather
from torch_feather import models
from torch_feather.cli import main
from torch_feather.errors import ConfigurationError, FeatherError
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config, DistillationConfig, apply, resolve_config
from torch_feather.training.data import Batch, load_dataset
from torch_feather.training.distillation import Distillation, load_teacher
from torch_feather.training.distributed import Ranks
from torch_feather.training.errors import CheckpointError, Interrupted, RunError
from torch_feather.training.export_run import export_run, run_metadata
from torch_feather.training.loop import train
from torch_feather.training.step import Step
from torch_feather.training.task import make_optimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Small(torch.nn.Module):
    """With dropout, whose result depends on the order and number of random draws."""

    def __init__(self, classes, channels, width=8):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(width)
        self.dropout = torch.nn.Dropout(0.1)
        self.fc = torch.nn.Linear(width * 64, classes)

    def forward(self, x):
        return self.fc(self.dropout(torch.relu(self.norm(self.conv(x)))).flatten(1))


class Large(Small):
    def __init__(self, classes, channels):
        super().__init__(classes, channels, 16)


@pytest.fixture(autouse=True, scope="module")
def networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._MODELS, "small", Small)
        patch.setitem(models._MODELS, "large", Large)
        patch.setitem(models._MODELS, "plain", NETWORKS["plain"])
        yield


def digits(**changes):
    usual = {
        "network": "small",
        "epochs": 2,
        "batch_size": 128,
        "compare_dense": False,
        "system.threads": 1,
    }
    return apply(resolve_config("digits"), usual | changes, "test")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A finished dense run of another network."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(digits(network="large", method="dense", seed=7), folder)
    return folder


@pytest.fixture(scope="module")
def files(teacher, tmp_path_factory):
    """Files that a teacher can be read from."""
    folder = tmp_path_factory.mktemp("files")
    model = Large(10, 1)
    RunDirectory(teacher).load_model(model)
    with pytest.warns(feather.errors.FeatherWarning, match="not sparse"):
        export_run(RunDirectory(teacher), out=folder / "sparse.safetensors")
    save_file(model.state_dict(), folder / "plain.safetensors")
    torch.save(model.state_dict(), folder / "plain.pt")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "lightning.ckpt")
    return folder


def results_of(folder):
    run = RunDirectory(folder)
    return run.model_file.read_bytes(), [line["train_loss"] for line in run.read_metrics()]


def make_distillation(weight=0.3, temperature=3.0, compiled=False):
    torch.manual_seed(1)
    return Distillation(Large(10, 1), DistillationConfig("x", weight, temperature), compiled)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_is_that_of_the_published_loss(weight, temperature):
    """Hinton et al.: cross-entropy with soft targets has the gradient (q - p) / T."""
    distillation = make_distillation(weight, temperature)
    x, y = torch.randn(6, 1, 8, 8), torch.randint(10, (6,))
    logits = torch.randn(6, 10, requires_grad=True)
    distillation(torch.nn.functional.cross_entropy(logits, y), logits, x).backward()
    z, target = logits.detach(), distillation.teacher(x)
    soft = (z / temperature).softmax(1) - (target / temperature).softmax(1)
    hard = z.softmax(1) - torch.nn.functional.one_hot(y, 10)
    expected = ((1 - weight) * hard + weight * temperature * soft) / len(y)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-7)


def test_a_student_equal_to_its_teacher_has_zero_loss_and_gradient():
    distillation = make_distillation(weight=1.0)
    x = torch.randn(4, 1, 8, 8)
    logits = distillation.teacher(x).requires_grad_()
    loss = distillation(torch.ones(()), logits, x)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.slow
def test_weight_0_is_bitwise_identical_to_training_without_a_teacher(teacher, tmp_path):
    train(digits(), tmp_path / "plain")
    distillation = {"teacher": str(teacher), "weight": 0.0}
    train(digits(distillation=distillation), tmp_path / "distilled")
    assert results_of(tmp_path / "distilled") == results_of(tmp_path / "plain")
    # A larger weight gives another result.
    train(digits(distillation=distillation | {"weight": 0.1}), tmp_path / "other")
    assert results_of(tmp_path / "other") != results_of(tmp_path / "plain")


def test_a_resumed_run_is_bitwise_identical_if_its_teacher_has_moved(teacher, tmp_path):
    config = digits(**{"distillation.teacher": str(teacher), "system.micro_batch": 50})
    results = train(config, tmp_path / "whole")
    assert results["teacher"]["source"] == str(teacher)
    about = RunDirectory(teacher).read_report()
    assert results["teacher"]["test_accuracy"] == about["test_accuracy"]
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", callback=StopAt(9))
    moved = tmp_path / "moved"
    moved.symlink_to(teacher)
    elsewhere = apply(config, {"distillation.teacher": str(moved)}, "test")
    train(elsewhere, tmp_path / "run", resume=True)
    assert results_of(tmp_path / "run") == results_of(tmp_path / "whole")


def test_a_run_does_not_resume_with_another_teacher(teacher, files, tmp_path):
    config = digits(**{"distillation.teacher": str(teacher)})
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", callback=StopAt(5))
    torch.save(Small(10, 1).state_dict(), tmp_path / "other.pt")
    other = apply(config, {"distillation.teacher": str(tmp_path / "other.pt")}, "test")
    with pytest.raises(CheckpointError, match=r"another teacher.*other\.pt"):
        train(other, tmp_path / "run", resume=True)
    with pytest.raises(RunError, match=r"distillation\.teacher was .*, not None"):
        train(digits(), tmp_path / "run", resume=True)
    # Another file with the same weights is the same teacher.
    same = apply(config, {"distillation.teacher": str(files / "sparse.safetensors")}, "test")
    train(same, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "source", ["sparse.safetensors", "plain.safetensors", "plain.pt", "lightning.ckpt"]
)
def test_every_file_of_the_same_weights_is_the_same_teacher(teacher, files, source):
    config = digits(network="large")
    data = load_dataset(config.data, config.seed)
    x = torch.randn(3, 1, 8, 8)
    answers = []
    for path in (teacher, files / source):
        config = apply(config, {"distillation.teacher": str(path)}, "test")
        before = torch.get_rng_state()
        answers.append(load_teacher(config, data)(x))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*answers)


def test_a_timm_teacher_has_its_published_weights_and_normalization(tmp_path, monkeypatch):
    name, create = "test_vit", timm.create_model
    shape = {"num_classes": 10, "in_chans": 1, "img_size": 8, "patch_size": 4}
    published = create(name, **shape)
    save_file(published.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 10}
    overlay |= {"mean": (0.25,), "std": (0.5,), "input_size": (1, 8, 8)}

    def offline(name, pretrained):
        return create(name, pretrained, pretrained_cfg_overlay=overlay, **shape)

    monkeypatch.setattr(timm, "create_model", offline)
    config = digits(**{"distillation.teacher": f"timm/{name}"})
    data = load_dataset(config.data, config.seed)
    loaded = load_teacher(config, data)
    pixels = torch.rand(2, 1, 8, 8)
    given = (pixels - data.mean[0]) / data.std[0]
    expected = published.eval()((pixels - 0.25) / 0.5)
    torch.testing.assert_close(loaded(given), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_distill_the_same_network_as_one(tmp_path):
    train(digits(network="plain", method="dense", seed=7), tmp_path / "teacher")
    config = digits(network="plain", **{"distillation.teacher": str(tmp_path / "teacher")})
    codes, errors = together(config, tmp_path / "two")
    assert codes == [0, 0], errors
    train(config, tmp_path / "one")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=1e-3, atol=1e-4)
    teachers = [RunDirectory(tmp_path / name).read_report()["teacher"] for name in ("one", "two")]
    assert teachers[1] == pytest.approx(teachers[0])  # losses are summed in another order


def test_the_command_resolves_a_relative_path_of_the_teacher(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    quick = ["--network", "small", "--epochs", "1", "--batch-size", "256", "--no-compare-dense"]
    command = ["feather", "train", *quick, "--teacher", teacher.name, "--out", str(tmp_path / "a")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert RunDirectory(tmp_path / "a").read_config().distillation.teacher == str(teacher)
    # Published files contain no paths of this machine.
    run = RunDirectory(tmp_path / "a")
    assert str(teacher.parent) not in json.dumps(run_metadata(run))


def write_nothing(path):
    return path / "nowhere"


def write_unfinished_run(path):
    with RunDirectory(path / "run").locked():
        RunDirectory(path / "run").write_config(digits())
    return path / "run"


def write_noise(path):
    (path / "noise.pt").write_bytes(b"noise")
    return path / "noise.pt"


def write_text(path):
    (path / "notes.pt").write_text("hello world\n")
    return path / "notes.pt"


def write_object(path):
    torch.save(Small(10, 1), path / "object.pt")
    return path / "object.pt"


def write_damaged(path):
    (path / "weights.safetensors").write_bytes(b"\0" * 100)
    return path / "weights.safetensors"


def write_other_classes(path):
    torch.save(Small(7, 1).state_dict(), path / "seven.pt")
    return path / "seven.pt"


def write_other_input(path):
    torch.save(Small(10, 3).state_dict(), path / "colour.pt")
    return path / "colour.pt"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_nothing, "nowhere: no such run directory or file"),
        (write_unfinished_run, "this run has not finished"),
        (write_noise, r"noise\.pt: cannot be read as weights"),
        (write_text, r"notes\.pt: cannot be read as weights"),
        (write_object, r"object\.pt: .* \(it is damaged, or holds more than tensors\)"),
        (write_damaged, r"weights\.safetensors: cannot be read as weights"),
        (write_other_classes, r"seven\.pt do not fit Small: size mismatch for fc\.weight"),
        (write_other_input, r"colour\.pt do not fit Small: size mismatch for conv\.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_unusable_teacher_is_an_error_before_training(tmp_path, write, message):
    config = digits(**{"distillation.teacher": str(write(tmp_path))})
    with pytest.raises(FeatherError, match=message):
        train(config, tmp_path / "student")
    assert not RunDirectory(tmp_path / "student").holds_a_run()


@pytest.mark.parametrize(
    ("options", "mean", "message"),
    [
        ({"num_classes": 7}, (0.5,), "has 7 classes, but digits has 10"),
        ({"in_chans": 3}, (0.5,) * 3, "does not accept images of 1x8x8: it expects 3 channels"),
        ({"patch_size": 16}, (0.5,), "does not accept images of 1x8x8: Input height"),
    ],
    ids=["classes", "channels", "size"],
)
def test_an_unsuitable_timm_teacher_is_an_error_that_says_why(monkeypatch, options, mean, message):
    create = timm.create_model
    shape = {"num_classes": 10, "in_chans": 1, "img_size": 8, "patch_size": 4} | options
    shape["pretrained_cfg_overlay"] = {"mean": mean, "std": mean}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, **shape))
    config = digits(**{"distillation.teacher": "timm/test_vit"})
    with pytest.raises(ConfigurationError, match=rf"teacher: timm/test_vit {message}"):
        load_teacher(config, load_dataset(config.data, config.seed))


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", -0.1), ("weight", 1.1), ("weight", math.nan), ("temperature", 0.0)],
)
def test_settings_out_of_range_are_errors(key, value):
    with pytest.raises(ConfigurationError, match=rf"distillation\.{key}"):
        digits(**{f"distillation.{key}": value})


def one_step(**settings):
    """Return loss and weights after one step of distillation."""
    torch.manual_seed(3)
    config = apply(Config(), {"batch_size": 8, "method": "dense"} | settings, "test")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    distillation = make_distillation(compiled=config.system.compile)
    optimizer = make_optimizer(model, config.optimizer)
    step = Step(model, optimizer, None, config, CPU, Ranks(), distillation)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 8, 8, generator=generator)
    step(Batch(x, torch.randint(10, (8,), generator=generator), 8), 0.1)
    return step.loss_sum, model[1].weight.detach()


@pytest.mark.parametrize(
    ("switch", "tolerance"),
    [({"system.micro_batch": 3}, 1e-5), ({"system.amp": True}, 2e-2)],
    ids=["micro-batches", "amp"],
)
def test_every_switch_distills_the_same_network(switch, tolerance):
    for found, expected in zip(one_step(**switch), one_step(), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_compiled_teacher_gives_the_same_result():
    for found, expected in zip(one_step(**{"system.compile": True}), one_step(), strict=True):
        torch.testing.assert_close(found, expected)


def test_distillation_never_synchronizes_the_device(without_gpu, monkeypatch):
    """On fake CUDA tensors, reading a value raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr(
            "torch_feather.training.distillation._digest", lambda teacher: "read once, before"
        )
        with CUDA:
            distillation = make_distillation()
            logits = torch.randn(8, 10, requires_grad=True)
            x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
        loss = distillation(torch.nn.functional.cross_entropy(logits, y), logits, x)
        assert loss.device.type == "cuda"
