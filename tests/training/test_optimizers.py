"""Optimizers, schedules, settings by layer, losses and mixing of `feather train`."""

import importlib
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from training_callbacks import StopAt

from torch_feather import models
from torch_feather.cli.predict import _line
from torch_feather.cli.runs import evaluate as evaluate_command
from torch_feather.errors import ConfigurationError
from torch_feather.training.average_precision import mean_average_precision
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    apply,
    load_config,
    parse_assignments,
    to_yaml,
)
from torch_feather.training.console import percent, print_results
from torch_feather.training.data import Batch, load_dataset, train_loader
from torch_feather.training.distributed import Ranks
from torch_feather.training.errors import DataError, Interrupted
from torch_feather.training.evaluation import evaluate, f1_score
from torch_feather.training.loop import train
from torch_feather.training.losses import make_loss
from torch_feather.training.mixing import Mixing
from torch_feather.training.optimizer import learning_rate, make_optimizer, parameter_groups
from torch_feather.training.predict import load_predictor
from torch_feather.training.step import Step

QUICK = {"network": "resnet8", "sparsity": 0.5, "epochs": 2, "batch_size": 256,
         "system.threads": 1}  # fmt: skip


def config(**changes):
    return apply(Config(), QUICK | changes, "test")


def same_after_resume(settings, tmp_path):
    train(settings, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", callback=StopAt(3))
    train(settings, tmp_path / "run", resume=True)
    whole, resumed = (RunDirectory(tmp_path / name).model_file for name in ("whole", "run"))
    return whole.read_bytes() == resumed.read_bytes()


# --- optimizers


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.name": "torch.optim:RMSprop", "optimizer.arguments": {"alpha": 0.9}},
        {"optimizer.name": "timm/lion", "optimizer.lr": 0.001},
        {"optimizer.name": "adamw", "optimizer.layers": {"fc.*": {"lr": 5.0}}},
        {"optimizer.name": "torch.optim:SGD"},  # without momentum: no state
    ],
    ids=lambda changes: changes["optimizer.name"],
)
@pytest.mark.slow
def test_any_optimizer_trains_and_resumes_bitwise_identically(changes, tmp_path):
    assert same_after_resume(config(**{"optimizer.lr": 0.01, "epochs": 1} | changes), tmp_path)


def test_an_optimizer_gets_its_arguments_and_no_others():
    model = nn.Linear(3, 2)
    options = OptimizerConfig("torch.optim:RMSprop", lr=0.3, arguments={"alpha": 0.9})
    group = make_optimizer(model, options).param_groups[0]
    assert (group["lr"], group["alpha"], group["momentum"]) == (0.3, 0.9, 0)
    adam = OptimizerConfig("adamw", arguments={"betas": [0.5, 0.6], "eps": 1e-3})
    group = make_optimizer(model, adam).param_groups[0]
    assert (list(group["betas"]), group["eps"]) == ([0.5, 0.6], 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sgdm"}, "'sgdm' is not one of sgd, adamw, timm/NAME, package.module:Class"),
        ({"name": "torch.optim:RMSpro"}, "did you mean 'RMSprop'"),
        ({"name": "timm/lamp"}, "timm has no optimizer 'lamp'; did you mean 'lamb'"),
        ({"name": "builtins:dict"}, "builtins:dict"),
        ({"name": "adamw", "arguments": {"beta": 1}}, "unexpected keyword argument 'beta'"),
        ({"arguments": {"dampening": 2, "nesterov": True}}, "ampening"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"layers": {"fc2.*": {"lr": 2}}}, r"'fc2.\*' matches no parameter"),
        ({"layers": {"fc.*": {"rate": 2}}}, "must have lr, weight_decay or both"),
        ({"layers": {"fc.*": {"lr": "high"}}}, "lr must be a number"),
        ({"layers": {"fc.*": {"lr": -1}}}, "must be at least 0"),
        ({"milestones": [3.0, 1.0]}, "rising numbers of epochs"),
        ({"layer_decay": 0.0}, "layer_decay must be in"),
    ],
)
def test_wrong_settings_of_the_optimizer_are_one_line_errors(options, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        make_optimizer(models.create("resnet8", 10), OptimizerConfig(**options))
    assert "\n" not in str(caught.value)


def test_settings_by_layer_are_those_of_the_patterns():
    model = models.create("resnet8", 10)
    options = OptimizerConfig(
        weight_decay=0.1,
        layers={"fc.*": {"lr": 10}, "*.conv1.weight": {"weight_decay": 0.3}, "fc.bias": {"lr": 2}},
    )
    found = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(model, options)
        for p in group["params"]
    }
    named = {name: found[id(p)] for name, p in model.named_parameters()}
    assert named["fc.weight"] == (10, 0.1)
    assert named["fc.bias"] == (20, 0.0)
    assert named["layer1.0.conv1.weight"] == (1, 0.3)
    assert named["conv1.weight"] == (1, 0.1)
    assert named["bn1.weight"] == (1, 0.0)
    assert len(named) == len(found)


def test_the_rate_decays_over_the_blocks_as_in_timm():
    model = models.create("timm/resnet18", 10)
    groups = parameter_groups(model, OptimizerConfig(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    first, last = (scale[id(p)] for p in (model.conv1.weight, model.fc.weight))
    assert last == 1.0
    assert 0 < first < scale[id(model.layer3[0].conv1.weight)] < last
    assert len(scale) == sum(1 for _ in model.parameters())


def test_a_step_takes_the_rate_of_each_layer():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2))
    settings = config(**{"optimizer.layers": {"2.*": {"lr": 3}}})
    optimizer = make_optimizer(model, settings.optimizer)
    step = Step(model, optimizer, None, settings, torch.device("cpu"), Ranks())
    step(Batch(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]), total=3), lr=0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model[1].weight)] == 0.1
    assert rates[id(model[2].weight)] == pytest.approx(0.3)


def test_groups_of_usual_settings_are_those_of_earlier_checkpoints():
    for decay in (0.0, 5e-4):
        groups = parameter_groups(models.create("resnet8", 10), OptimizerConfig(weight_decay=decay))
        assert [group.keys() for group in groups] == [{"params", "weight_decay"}] * 2
        assert [group["weight_decay"] for group in groups] == [decay, 0.0]
        assert all(p.ndim > 1 for p in groups[0]["params"])


# --- schedules


def rates(**options):
    settings = OptimizerConfig(lr=1.0, **options)
    return [round(learning_rate(settings, step, 20, 5), 4) for step in range(20)]


def test_schedules_follow_their_definitions():
    assert rates(schedule="constant") == [1.0] * 20
    assert rates(schedule="step") == [1.0] * 10 + [0.1] * 5 + [0.01] * 5
    assert (
        rates(schedule="step", milestones=[1, 3], gamma=0.5) == [1.0] * 5 + [0.5] * 10 + [0.25] * 5
    )
    cosine = [round((1 + math.cos(math.pi * step / 20)) / 2, 4) for step in range(20)]
    assert rates() == cosine
    for schedule in ("cosine", "step", "constant"):
        assert rates(schedule=schedule, warmup_epochs=1)[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]


# --- settings


def test_mappings_of_settings_survive_yaml_and_the_command_line(tmp_path):
    given = parse_assignments(
        [
            "optimizer.name=adamw",
            "optimizer.arguments={betas: [0.9, 0.95]}",
            "optimizer.arguments.eps=1e-6",
            'optimizer.layers={"fc.*": {lr: 5e-1}}',
        ]
    )
    made = config(**given)
    assert made.optimizer.arguments == {"betas": [0.9, 0.95], "eps": 1e-6}
    assert made.optimizer.layers == {"fc.*": {"lr": 0.5}}
    (tmp_path / "config.yaml").write_text(to_yaml(made))
    assert load_config(tmp_path / "config.yaml") == made


# --- losses


@pytest.fixture
def own_losses(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(
        "import torch.nn.functional as F\n"
        "def focal(logits, labels):\n"
        "    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]\n"
        "    return ((1 - p) ** 2 * -p.log()).mean()\n"
        "def per_image(logits, labels): return F.cross_entropy(logits, labels, reduction='none')\n"
        "def wrong(logits): return logits.sum()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_losses", None)
    importlib.invalidate_caches()


def test_a_loss_of_the_user_is_what_is_trained_and_reported(own_losses, tmp_path):
    results = train(config(loss="own_losses:focal", epochs=1), tmp_path / "run")
    assert results["test_loss"] < train(config(epochs=1), tmp_path / "other")["test_loss"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_losses:focul", "did you mean 'focal'"),
        ("own_losses:per_image", "the function returned .* Return the mean loss"),
        ("own_losses:wrong", "the function failed .TypeError"),
        ("entropy", "not one of cross-entropy, binary, package.module:function"),
        ("binary", "requires several labels per image, but digits has one"),
    ],
)
def test_a_loss_that_cannot_be_used_is_a_one_line_error(own_losses, tmp_path, name, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        train(config(loss=name), tmp_path / "run")
    assert "\n" not in str(caught.value)


def labelled_folder(root, count=48):
    """Images with a bright left half, a bright right half, both or neither, listed in CSV files."""
    rng = np.random.RandomState(0)
    for part, size in (("train", count), ("val", 16)):
        lines = ["image,left,right"]
        for i in range(size):
            left, right = i % 2, i // 2 % 2
            pixels = rng.randint(0, 60, (8, 8, 3))
            pixels[:, :4] += 150 * left
            pixels[:, 4:] += 150 * right
            (root / "images").mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{part}{i}.png")
            lines.append(f"images/{part}{i}.png,{left},{right}")
        (root / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.slow
def test_several_labels_per_image_are_learned_resumed_and_predicted(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    settings = config(
        loss="binary",
        epochs=12,
        batch_size=16,
        **{"data.name": "imagefolder", "data.path": str(labelled_folder(folder)),
           "data.validation": 0.0, "data.shift": 0, "data.flip": False, "optimizer.lr": 0.05},
    )  # fmt: skip
    assert same_after_resume(settings, tmp_path)
    results = RunDirectory(tmp_path / "run").read_report()
    assert results["test_accuracy"] > 0.9  # mean average precision; 0.5 by chance
    assert results["test_f1"] > 0.9
    predictor = load_predictor(tmp_path / "run")
    images = [folder / "images" / f"val{i}.png" for i in range(4)]
    answers = list(predictor.predict_files(images))
    assert [set(answer.labels) for answer in answers] == [
        set(), {"left"}, {"right"}, {"left", "right"}
    ]  # fmt: skip
    found = answers[1].to_dict()
    assert found["labels"] == ["left"]
    assert [one["class"] for one in found["predictions"]] == ["left", "right"]
    lines = [_line(answer, above=True) for answer in answers]
    assert "no class above 50% (highest: " in lines[0]
    assert re.search(r"val1\.png: left \d+\.\d%$", lines[1])
    evaluate_command(tmp_path / "run", device="cpu")
    assert f"test images of imagefolder: mAP {percent(results['test_accuracy'])}" in (
        capsys.readouterr().out
    )
    print_results(Console(width=100), results, "run")
    assert "test mAP" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,cat\na.png,2\n", "line 2: a label must be 0 or 1, got '2'"),
        ("image,cat\na.png\n", "line 2: has 1 values, but the first line 2"),
        ("image,cat\n../a.png,1\n", "is no path within the folder"),
        ("image,cat\n/etc/passwd,1\n", "is no path within the folder"),
        ("image,cat\nc.png,1\n", "line 2: there is no image .*c.png"),
        ("image,cat\na.png,1\na.png,0\n", "line 3: a.png is listed twice, also in line 2 of tr"),
        ("image,cat\na.png,1\n./a.png,0\n", "line 3: a.png is listed twice"),
        ("image,cat\na.png,1\nb.png,0\n", "val.csv, line 2: b.png is listed twice, .*3 of train"),
        ("image,labels\na.png,cat;cat\n", "line 2: labels must be different names .* 'cat;cat'"),
        ("image,labels\na.png,cat;\n", "line 2: labels must be different names"),
        ("image,labels\na.png,\n", "no image has a label"),
        ("image,cat,cat\na.png,1,1\n", "names of the classes"),
        ("image,cat\n", "lists no images"),
        ("", "the first line must be"),
        ("image,dog\na.png,1\n", "different classes"),
    ],
)
def test_a_wrong_list_of_labels_is_an_error_that_names_the_line(text, message, tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "val.csv").write_text("image,cat\nb.png,1\n")
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(DataConfig("imagefolder", path=str(tmp_path), validation=0.0), seed=0)
    assert "\n" not in str(caught.value)


def listed(folder, train, val="image,labels\nb.png,cat\n"):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "train.csv").write_text(train)
    (folder / "val.csv").write_text(val)
    return DataConfig("imagefolder", path=str(folder), validation=0.0)


def test_labels_may_be_listed_in_one_column(tmp_path):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "more" / "c.png")
    data = load_dataset(listed(tmp_path, "image,labels\na.png,dog; cat\n./more/c.png,\n"), seed=0)
    assert data.names == ("cat", "dog")
    assert data.train.labels.tolist() == [[1, 1], [0, 0]]
    assert data.test.labels.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (
            "image,labels\na.png,dog\n",
            "image,labels\nb.png,dogs\n",
            "val.csv, line 2: no image of train.csv has the label 'dogs'; did you mean 'dog'",
        ),
        ("image,cat\na.png,1\n", "image,cat\nc.png,1\n", "val.csv, line 2: there is no image"),
        ("image,cat\nb.png,1\n", "image,cat\nc.png,1\n", "no CSV file lists a.png. Add"),
    ],
)
def test_a_wrong_list_of_evaluation_images_is_an_error(train, val, message, tmp_path):
    if "lists" in message:
        Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    with pytest.raises(DataError, match=message):
        load_dataset(listed(tmp_path, train, val), seed=0)


def test_images_of_an_unused_list_are_not_missing(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    (tmp_path / "test.csv").write_text("image,cat\nc.png,1\n")
    config = listed(tmp_path, "image,cat\na.png,1\n", "image,cat\nb.png,1\n")
    assert len(load_dataset(config, seed=0).test) == 1


def test_several_labels_require_a_loss_for_them(tmp_path):
    (tmp_path / "photos").mkdir()
    path = str(labelled_folder(tmp_path / "photos", 8))
    settings = config(**{"data.name": "imagefolder", "data.path": path, "data.validation": 0.0})
    with pytest.raises(ConfigurationError, match="Set loss=binary"):
        train(settings, tmp_path / "run")


def test_the_f1_score_agrees_with_scikit_learn():
    from sklearn import metrics

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images, labels = torch.randn(40, 1, 2, 2), torch.randint(2, (40, 3)).float()
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    expected = metrics.f1_score(labels.numpy(), (model(images) > 0).numpy(), average="micro")
    assert f1_score(model, batches) == pytest.approx(expected)


@pytest.mark.parametrize("levels", [3, 1000])  # with and without ties
def test_the_accuracy_of_several_labels_agrees_with_scikit_learn(levels):
    from sklearn import metrics

    torch.manual_seed(0)
    scores = torch.randint(levels, (200, 5)).float()
    labels = (torch.rand(200, 5) < torch.tensor([0.5, 0.1, 0.9, 0.01, 0.3])).float()
    labels[:, 3], labels[7, 3] = 0, 1
    expected = metrics.average_precision_score(labels.numpy(), scores.numpy(), average="macro")
    assert mean_average_precision(scores, labels) == pytest.approx(expected, abs=1e-12)
    # A class without images does not count.
    more = torch.cat([labels, torch.zeros(200, 1)], 1), torch.cat([scores, scores[:, :1]], 1)
    assert mean_average_precision(more[1], more[0]) == pytest.approx(expected, abs=1e-12)
    batches = list(zip(scores.split(64), labels.split(64), strict=True))
    model = nn.Sequential(nn.Linear(5, 5, bias=False))
    nn.init.eye_(model[0].weight)
    loss = make_loss(Config(loss="binary"))
    assert evaluate(model, batches, loss=loss)[1] == pytest.approx(expected, abs=1e-12)


def test_several_processes_measure_the_same_mean_average_precision():
    class Part(Ranks):
        """One of two ranks; the other one has no images."""

        def sum(self, tensor):
            return tensor

        def agree(self, *flags):
            return flags

        def gather(self, value):
            return [value, []]

    scores, labels = torch.rand(20, 3), torch.randint(2, (20, 3)).float()
    model = nn.Sequential(nn.Linear(3, 3))
    loss = make_loss(Config(loss="binary"))
    alone = evaluate(model, [(scores, labels)], loss=loss)
    assert evaluate(model, [(scores, labels)], ranks=Part(0, 2), loss=loss) == alone


# --- mixing and RandAugment


def test_mixed_batches_are_convex_combinations_with_the_labels_in_proportion():
    torch.manual_seed(1)
    images = torch.stack([torch.full((1, 8, 8), float(i)) for i in range(4)])
    batch = Batch(images, torch.arange(4), total=4)
    mixed = Mixing(DataConfig(mixup=1.0), 4, one_hot=False)(batch)
    assert torch.allclose(mixed.y @ torch.arange(4.0), mixed.x.mean((1, 2, 3)), atol=1e-5)
    cut = Mixing(DataConfig(cutmix=1.0), 4, one_hot=False)(batch)
    assert set(cut.x.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert torch.allclose(cut.y @ torch.arange(4.0), cut.x.mean((1, 2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"data.mixup": 0.2, "data.cutmix": 1.0},
        {"data.mixup": 0.2, "optimizer.label_smoothing": 0.1, "system.micro_batch": 100},
        {"data.randaugment": 9},
    ],
    ids=["both", "mixup", "randaugment"],
)
@pytest.mark.slow
def test_a_run_with_augmentation_resumes_bitwise_identically(changes, tmp_path):
    assert same_after_resume(config(epochs=1, **changes), tmp_path)


def test_several_labels_per_image_can_be_mixed():
    batch = Batch(torch.rand(4, 3, 8, 8), torch.eye(4), total=4)
    mixed = Mixing(DataConfig(mixup=1.0, cutmix=1.0), 4, one_hot=True)(batch)
    loss = make_loss(Config(loss="binary"))
    assert loss(torch.zeros(4, 4), mixed.y).item() == pytest.approx(math.log(2))


def test_randaugment_changes_training_images_alone_and_is_seeded():
    def first(**changes):
        settings = config(**{"data.shift": 0, "data.flip": False} | changes)
        data = load_dataset(settings.data, settings.seed)
        return next(iter(train_loader(data, settings, torch.device("cpu")))).x, data.example()

    plain, example = first()
    augmented, same = first(**{"data.randaugment": 9})
    again, _ = first(**{"data.randaugment": 9})
    assert torch.equal(augmented, again)
    assert torch.equal(example, same)
    assert plain.shape == augmented.shape
    assert not torch.equal(plain, augmented)


@pytest.mark.parametrize(
    ("key", "value"), [("data.mixup", -0.1), ("data.randaugment", 31), ("data.cutmix", math.inf)]
)
def test_augmentation_out_of_range_is_refused(key, value):
    with pytest.raises(ConfigurationError, match=key):
        config(**{key: value})
