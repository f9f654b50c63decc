"""The recipe `finetune`: what is chosen for a folder of images, and how it is recorded."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from photos import COLORS, make_photos
from PIL import Image
from safetensors import safe_open
from training_callbacks import StopAt

from torch_feather import models
from torch_feather.cli import main
from torch_feather.errors import ConfigurationError
from torch_feather.export import SparseFile
from torch_feather.training import automatic
from torch_feather.training.automatic import choose_settings
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config, apply, default_recipe, load_config, resolve_config
from torch_feather.training.config import OptimizerConfig as Optimizer
from torch_feather.training.data import load_dataset
from torch_feather.training.distributed import Ranks
from torch_feather.training.errors import DataError, Interrupted
from torch_feather.training.evaluation import check_batches
from torch_feather.training.export_run import export_run
from torch_feather.training.loop import train
from torch_feather.training.network_info import read_network_info
from torch_feather.training.optimizer import check_warmup, learning_rate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def settings(photos, **changes):
    usual = {"network": "resnet8", "data.path": str(photos), "data.resolution": 16, "epochs": 4,
             "system.threads": 1, "system.workers": 0}  # fmt: skip
    return resolve_config(default_recipe("imagefolder"), overrides=usual | changes)


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(settings(photos), folder)
    return RunDirectory(folder)


# The choices


@pytest.mark.parametrize(
    ("images", "batch", "lr"),
    [(30, 8, 0.0025), (1_000, 16, 0.005), (9_469, 128, 0.04), (1_281_167, 256, 0.08)],
)
def test_batch_and_learning_rate_follow_the_size_of_the_data(
    photos, monkeypatch, tmp_path, images, batch, lr
):
    monkeypatch.setattr(automatic, "count_training_images", lambda config, seed: images)
    torch.save({}, tmp_path / "weights.pt")
    chosen = choose_settings(settings(photos, init=str(tmp_path / "weights.pt")), CPU)
    assert (chosen.batch_size, chosen.optimizer.lr) == (batch, lr)
    new = choose_settings(settings(photos), CPU)  # new weights need larger steps
    assert new.optimizer.lr == pytest.approx(5 * lr, rel=0.05)


@pytest.mark.parametrize(
    ("network", "name", "decay"),
    [("resnet8", "sgd", 5e-4), ("timm/resnet18", "sgd", 5e-4), ("timm/test_vit", "adamw", 0.05),
     ("timm/convnext_atto", "adamw", 0.05), ("timm/efficientnet_b0", "sgd", 5e-4)],
)  # fmt: skip
def test_the_optimizer_follows_the_network(photos, network, name, decay):
    chosen = choose_settings(settings(photos, network=network), CPU)
    assert (chosen.optimizer.name, chosen.optimizer.weight_decay) == (name, decay)


@pytest.mark.parametrize(
    ("capabilities", "amp"),
    [({"avx2": True, "avx512_f": True}, False), ({"amx_bf16": True}, True), ({"bf16": True}, True),
     ({"avx512_bf16": False}, False)],
)  # fmt: skip
def test_autocast_is_used_on_cpus_that_compute_in_bfloat16_only(
    photos, monkeypatch, capabilities, amp
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_settings(settings(photos), CPU).system.amp is amp


def test_size_and_normalization_are_those_of_the_published_weights(photos):
    network = "timm/vit_tiny_patch16_384"
    published = models.published_settings(network)
    config = resolve_config(
        "finetune", overrides={"network": network, "data.path": str(photos), "init": "pretrained"}
    )
    data = choose_settings(config, CPU).data
    assert data.resolution == 384
    assert data.mean == list(published["mean"]) == [0.5, 0.5, 0.5]
    assert data.std == list(published["std"])
    assert data.center == published["crop_pct"]
    pixels = load_dataset(data, 0).example()
    assert pixels.shape == (1, 3, 384, 384)
    assert pixels.abs().max() < 1 + 1e-6  # (x - 0.5) / 0.5


@pytest.mark.slow
def test_network_size_and_normalization_are_those_of_the_initial_weights(photos, run, tmp_path):
    config = resolve_config("finetune", overrides={"data.path": str(photos), "init": str(run.path)})
    other = {"data.mean": [0.1, 0.2, 0.3], "data.std": [0.4, 0.5, 0.6], "data.center": 0.5}
    train(settings(photos, epochs=1, **other), tmp_path / "run")
    file = export_run(RunDirectory(tmp_path / "run"))
    for source in (tmp_path / "run", file, tmp_path / "run" / "model.safetensors"):
        chosen = choose_settings(replace(config, init=str(source)), CPU)
        assert chosen.network == "resnet8"
        assert chosen.data.resolution == 16
        assert (chosen.data.mean, chosen.data.std) == (other["data.mean"], other["data.std"])
        assert chosen.data.center == 0.5


def test_what_the_user_sets_is_not_chosen(photos, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    given = {"batch_size": 5, "optimizer.lr": 0.3, "optimizer.name": "adamw", "system.amp": False}
    chosen = choose_settings(settings(photos, **given), CPU)
    assert (chosen.batch_size, chosen.system.amp) == (5, False)
    assert (chosen.optimizer.lr, chosen.optimizer.name) == (0.3, "adamw")
    assert chosen.optimizer.weight_decay == 0.05  # follows the optimizer
    assert chosen.automatic is None


def test_an_unknown_automatic_key_is_an_error_with_the_nearest_one():
    with pytest.raises(ConfigurationError, match="did you mean 'batch_size'"):
        choose_settings(Config(automatic=["batchsize"]), CPU)


# The training


def test_the_sparsity_rises_over_the_first_half(run):
    sparse = [line["sparsity"] for line in run.read_metrics()]
    weights = run.read_report()["report"]["weights"]
    assert 0.5 < sparse[0] < sparse[1] == sparse[2] == sparse[3]
    assert sparse[1] == round(0.9 * weights) / weights


def test_the_warm_up_is_a_fraction_of_the_training():
    options = Optimizer(lr=1.0, warmup_fraction=0.1)
    rates = [learning_rate(options, step, 200, 10) for step in range(200)]
    assert rates[0] == 1 / 20
    assert rates.index(max(rates)) == 19
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(("epochs", "fits"), [(5, False), (2, False), (6, True)])
def test_a_warm_up_that_does_not_fit_is_an_error(epochs, fits):
    config = Config(epochs=epochs, optimizer=Optimizer(warmup_epochs=5))
    if fits:
        check_warmup(config)
    else:
        with pytest.raises(ConfigurationError, match=f"takes 5 epochs .* has {epochs}"):
            check_warmup(config)
    with pytest.raises(ConfigurationError, match="both set the warm-up"):
        Optimizer(warmup_epochs=5, warmup_fraction=0.1)


@pytest.mark.slow
def test_a_run_with_adamw_resumes_bitwise(tmp_path):
    changes = {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.warmup_fraction": 0.2,
               "epochs": 2, "batch_size": 256, "compare_dense": False}  # fmt: skip
    config = apply(resolve_config("digits"), changes, "test")
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", callback=StopAt(3))
    train(config, tmp_path / "run", resume=True)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert files[0] == files[1]


# Names of classes


def test_names_of_classes_are_in_every_file(run, tmp_path):
    names = list(COLORS)
    assert load_config(run.config_file).data.class_names == names
    assert json.loads(run.report_file.read_text())["class_names"] == names
    with safe_open(run.model_file, "pt") as file:
        assert json.loads(file.metadata()["torch_feather.run"])["class_names"] == names
    with SparseFile(export_run(run)) as file:
        assert file.metadata["class_names"] == names
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = onnx.load(export_run(run, "onnx", tmp_path / "model.onnx"))
    found = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert found["class_names"] == names
    assert found["preprocessing"]["center_crop"] == [16, 16]


def test_every_file_describes_the_same_network(run, tmp_path):
    files = [run.path, run.model_file, export_run(run, out=tmp_path / "a.safetensors")]
    facts = {read_network_info(file) for file in files}
    assert len(facts) == 1
    (info,) = facts
    assert (info.side, info.input_shape) == (18, (3, 16, 16))  # 16 / 0.875


def test_known_data_sets_have_their_names_and_folders_theirs(photos):
    assert load_dataset(settings(photos).data, 0).names == tuple(COLORS)
    assert load_dataset(Config().data, 0).names == tuple("0123456789")


def test_settings_of_other_classes_are_an_error(photos, run, tmp_path):
    other = make_photos(tmp_path / "other", 2, 2, {"cat": (1, 2, 3), "dog": (9, 9, 9)})
    config = apply(load_config(run.config_file), {"data.path": str(other)}, "test")
    with pytest.raises(DataError, match=r"has blue, green, red, but other has cat, dog"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numbered_classes_can_be_given_names(tmp_path):
    root = make_photos(tmp_path, 2, 2, {"0": (1, 2, 3), "1": (9, 9, 9)})
    given = {"data.class_names": ["cat", "dog"], "data.path": str(root)}
    assert load_dataset(settings(root, **given).data, 0).names == ("cat", "dog")


# Errors that a newcomer meets


@pytest.fixture
def feather(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["feather", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()

    return call


FOLDER = ("train", "--data", "imagefolder", "--network", "resnet8", "--data-path")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--data", "flowers"), "'flowers' is a folder, not the name of a data set. "),
        (("train", "--data", "flowers"), "--data imagefolder --data-path flowers"),
        (("train", "--data", "imagenette"), "no data set 'imagenette'. There are digits"),
        (("train", "--network", "resnet18"), "did you mean 'timm/resnet18'?"),
        ((*FOLDER, "flowers"), "no images in val, valid, validation or test. Accuracy is measured"),
        ((*FOLDER, "flowers/train"), "has folders of images (rose, tulip), but not in train/"),
        ((*FOLDER, "single"), "only one class, 'cat'. A network learns to tell classes apart"),
        ((*FOLDER, "empty"), "no images in train/CLASS/"),
        (("train", "--optimizer.warmup_epochs", "30"), "the warm-up takes 30 epochs"),
        (("train", "--network", "timm/vit_tiny_patch16_224"), "does not accept images of 1x8x8"),
        (("train", "--pretrained"), "not for 'resnet8'. Use --init FILE"),
        (("train", "--init", "flowers"), "not a run directory"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(feather, tmp_path, arguments, message):
    make_photos(tmp_path / "flowers", 2, 0, {"rose": (1, 2, 3), "tulip": (9, 9, 9)})
    make_photos(tmp_path / "single", 2, 2, {"cat": (1, 2, 3)})
    (tmp_path / "empty" / "train").mkdir(parents=True)
    before = sorted(path for path in tmp_path.rglob("*"))
    code, _, errors = feather(*arguments)
    assert code == 1
    assert errors.count("\n") == 1
    assert message in errors
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_refused_run_leaves_folders_of_others(feather, tmp_path):
    out = tmp_path / "kept"
    out.mkdir()
    (out / "notes.txt").touch()
    feather("train", "--pretrained", "--out", out)
    assert (out / "notes.txt").exists()
    feather("train", "--pretrained", "--out", tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_a_path_without_a_data_set_is_an_error(feather):
    code, _, errors = feather("train", "--data-path", "photos")
    assert code == 2
    assert "--data-path requires --data" in " ".join(errors.split())
    given = ("train", "--data-path", "photos", "--data.name", "imagefolder")
    assert "photos: no such file or folder" in feather(*given)[2]


def test_a_last_batch_of_one_is_dropped_by_the_recipe(photos):
    chosen = choose_settings(settings(photos, batch_size=71), CPU)
    assert chosen.data.drop_last  # 72 images
    assert not choose_settings(settings(photos, batch_size=70), CPU).data.drop_last


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, "the last of 9 images is a batch of its own.*data.drop_last=true"),
        ({"batch_size": 1}, "a batch, or a part of it, has one image.*batch_size"),
        ({"batch_size": 3, "system.micro_batch": 2}, "has one image.*system.micro_batch"),
        ({"batch_size": 4, "data.drop_last": True}, None),
        ({"batch_size": 3}, None),
    ],
)
def test_a_batch_of_one_with_batch_norm_is_an_error_only_where_pytorch_cannot(changes, message):
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.BatchNorm2d(3))
    config, example = apply(Config(), changes, "test"), torch.zeros(1, 3, 8, 8)
    ranks = Ranks()
    if message is None:
        check_batches(model, example, config, 9, ranks)
    else:
        with pytest.raises(ConfigurationError, match=message):
            check_batches(model, example, config, 9, ranks)
    check_batches(models.create("resnet8", 3), torch.zeros(1, 3, 8, 8), config, 9, ranks)
    check_batches(torch.nn.Sequential(model[0]), example, config, 9, ranks)


def test_a_missing_extra_names_both_commands(feather, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, errors = feather("train", "--network", "timm/resnet18")
    assert code == 1
    assert "pip install 'torch-feather[vision]', or in a clone pip install -e '.[vision]'" in errors


def test_a_damaged_image_is_named(feather, tmp_path):
    root = make_photos(tmp_path / "photos", 4, 2)
    (root / "train" / "red" / "01.png").write_bytes(b"no image")
    code, _, errors = feather(*FOLDER, root, "--epochs", "1", "--data.resolution", "16")
    assert code == 1
    assert "train/red/01.png" in errors


def test_images_of_one_size_and_of_several_are_prepared_alike(tmp_path):
    """Images in memory and images decoded by workers: the recipe does not depend on which."""
    root = tmp_path / "photos"
    random = np.random.RandomState(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(3):
                path = root / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.randint(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    found = []
    for storage in ("memory", "stream"):
        data = settings(root, **{"data.storage": storage}).data
        found.append(load_dataset(data, 0).example())
    assert torch.equal(*found)
