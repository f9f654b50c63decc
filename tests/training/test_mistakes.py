"""`feather report --errors`: where a network is wrong, compared with scikit-learn's counts."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from photos import COLORS, make_photos
from sklearn.metrics import confusion_matrix, recall_score
from torch import nn

from torch_feather import models
from torch_feather.analysis.confusion import ConfusionMatrix, plot_confusion
from torch_feather.analysis.occlusion import occlusion
from torch_feather.cli import main
from torch_feather.training.checkpoint import RunDirectory, write_json
from torch_feather.training.config import Config, DataConfig, SystemConfig
from torch_feather.training.data import eval_loader, load_dataset
from torch_feather.training.errors import RunError
from torch_feather.training.mistakes import Mistakes, find_mistakes
from torch_feather.training.mistakes_page import LARGEST, mistakes_page, write_mistakes
from torch_feather.training.schemas import example_results

CPU = SystemConfig(device="cpu", threads=1)


def make_run(folder, config, seed=0, classes=10, channels=1):
    """The directory of a run that did not train."""
    torch.manual_seed(seed)
    run = RunDirectory(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_config(config)
    run.save_model(models.create(config.network, classes, channels))
    write_json(run.report_file, example_results(network=config.network))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = Config(network="resnet8", system=CPU, data=DataConfig(validation=0.0))
    run = make_run(tmp_path_factory.mktemp("runs") / "run", config)
    make_run(run.path / "dense", config.dense(), seed=1)
    return run


@pytest.fixture(scope="module")
def found(run):
    return find_mistakes(run)


@pytest.fixture
def feather(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["feather", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()

    return call


def probabilities(run):
    """Probabilities and labels of the test images."""
    config = run.read_config()
    data = load_dataset(config.data, config.seed)
    model = models.create("resnet8", 10, 1).eval()
    run.load_model(model)
    with torch.no_grad():
        batches = eval_loader(data, data.test, config, torch.device("cpu"))
        return torch.cat([model(x).softmax(1) for x, _ in batches]).numpy(), data.test.labels


def test_counts_and_accuracies_are_those_of_scikit_learn(run, found):
    for matrix, of in ((found.matrix, run), (found.dense, run.dense_baseline())):
        p, labels = probabilities(of)
        expected = confusion_matrix(labels, p.argmax(1), labels=range(10))
        np.testing.assert_array_equal(matrix.counts, expected)
        recall = recall_score(labels, p.argmax(1), average=None, zero_division=0)
        assert [row.accuracy for row in matrix.by_class()] == pytest.approx(recall)
    assert (found.matrix.counts != found.dense.counts).any()


def test_the_worst_images_have_the_most_probable_wrong_answers(run, found):
    p, labels = probabilities(run)
    wrong = np.where(p.argmax(1) != labels.numpy(), p.max(1), 0.0)
    order = np.argsort(-wrong, kind="stable")[: len(found.worst)]
    assert len(order) == 12
    assert [one.image for one in found.worst] == [f"image {i}" for i in order]
    for one, i in zip(found.worst, order, strict=True):
        assert (int(one.label), int(one.answer)) == (labels[i], p[i].argmax())
        assert one.probability == pytest.approx(p[i].max(), abs=1e-5)
        assert one.label_probability == pytest.approx(p[i, labels[i]], abs=1e-5)
        assert one.pixels.shape == (8, 8, 1)


def test_the_accuracy_is_that_of_evaluate_and_the_json_has_every_image(run, feather):
    code, output, errors = feather("report", run.path, "--errors", "--device", "cpu", "--json")
    assert code == 0, errors
    found = json.loads(output)
    evaluated = json.loads(feather("evaluate", run.path, "--json", "--device", "cpu")[1])
    assert found["accuracy"] == pytest.approx(evaluated["accuracy"], abs=1e-9)
    assert (found["part"], found["images"]) == ("test", 359)
    assert sum(row["images"] for row in found["classes"]) == 359
    right = sum(row["correct"] for row in found["classes"])
    assert right + sum(one["images"] for one in found["confusions"]) == 359
    assert [run.path / name for name in ("errors.html", "confusion.png")] == [
        *map(type(run.path), found["files"])
    ]
    assert (run.path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_images_are_used_if_there_are_any(tmp_path, feather):
    make_run(tmp_path / "run", Config(network="resnet8", system=CPU))
    code, output, errors = feather("report", tmp_path / "run", "--errors")
    assert code == 0, errors
    first, _, header, *rest = output.splitlines()
    assert first.startswith("144 validation images of digits: accuracy ")
    assert header.split()[:4] == ["class", "images", "accuracy", "most"]
    shown = [float(line.split()[2]) for line in rest[:10]]
    assert shown == sorted(shown)
    assert sum(", answered " in line for line in rest) == 12
    assert rest[-2:] == [str(tmp_path / "run" / name) for name in ("errors.html", "confusion.png")]


def test_options_of_errors_and_an_unfinished_run_are_refused(run, tmp_path, feather):
    code, _, errors = feather("report", run.path, "--device", "cpu")
    assert code == 2
    assert "--errors only" in errors
    (tmp_path / "config.yaml").write_text("epochs: 1\n")
    code, _, errors = feather("report", tmp_path, "--errors")
    assert code == 1
    assert "has not finished" in errors
    assert not (tmp_path / "errors.html").exists()


def test_images_with_several_labels_are_refused(tmp_path):
    photos = make_photos(tmp_path / "photos", train=2, val=2)
    for part in ("train", "val"):
        lines = [f"{part}/{name}/0{i}.png,1,0" for name in COLORS for i in range(2)]
        (photos / f"{part}.csv").write_text("\n".join(["image,warm,cold", *lines]) + "\n")
    source = DataConfig("imagefolder", path=str(photos), validation=0.0, resolution=8)
    config = Config(network="resnet8", loss="binary", data=source, system=CPU)
    run = make_run(tmp_path / "run", config, classes=2, channels=3)
    with pytest.raises(RunError, match=r"several labels each.*feather evaluate"):
        find_mistakes(run)


def test_images_of_a_folder_are_named_by_their_files_and_shown_as_the_network_sees_them(tmp_path):
    photos = make_photos(tmp_path / "photos", train=2, val=4)
    names = {}
    for storage in ("memory", "stream"):
        source = DataConfig(
            "imagefolder", path=str(photos), validation=0.0, resolution=8, storage=storage
        )
        system = SystemConfig(device="cpu", threads=1, workers=0)
        config = Config(network="resnet8", data=source, system=system)
        run = make_run(tmp_path / storage, config, classes=3, channels=3)
        worst = find_mistakes(run).worst
        assert len(worst) >= 4  # two of three classes at least
        assert all(f"/val/{one.label}/" in one.image for one in worst)
        mean = [one.pixels.mean((0, 1)).argmax() for one in worst]
        assert mean == [("red", "green", "blue").index(one.label) for one in worst]
        names[storage] = {one.image for one in worst}
    assert names["memory"] == names["stream"]


OWN = """
import torch

def factory():
    images = [(torch.full((1, 8, 8), float(i)), i % 2) for i in range(8)]
    return {"train": images, "test": images}

def broken(num_classes, in_channels):
    class Network(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 2, 4, 4) if SHAPE else torch.full((len(x), 2), torch.nan)
    return Network()
"""


def test_images_of_an_own_data_set_and_networks_without_logits(tmp_path, monkeypatch):
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    source = DataConfig(f"{name}:factory", validation=0.0)
    config = Config(network="resnet8", data=source, system=CPU)
    found = find_mistakes(make_run(tmp_path / "run", config, classes=2))
    assert found.matrix.counts.sum() == 8
    assert len(found.worst) == 8 - found.matrix.counts.trace() > 0
    assert all(one.pixels.shape == (8, 8, 1) for one in found.worst)
    config = replace(config, network=f"{name}:broken")
    run = make_run(tmp_path / "broken", config, classes=2)
    module = sys.modules[name]
    for module.SHAPE, message in ((True, r"\(8, 2, 4, 4\).*one logit per class"), (False, "NaN")):
        with pytest.raises(RunError, match=message):
            find_mistakes(run)


def test_names_are_escaped_and_the_page_needs_no_other_file(tmp_path):
    names = ("<script>alert(1)</script>", 'a"b&c', "$x$ 猫")
    matrix = ConfusionMatrix(names, np.array([[3, 1, 0], [0, 4, 2], [1, 0, 0]]))
    run = RunDirectory(tmp_path)
    page, _ = write_mistakes(run, Mistakes("<i>pets</i>", "test", matrix, []))
    text = page.read_text()
    for name in (names[0], "<i>pets"):
        assert name not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "$x$ 猫" in text
    links = set(re.findall(r"""(?:src|href)=["']([^"']{1,40})""", text))
    assert all(link.startswith(("#", "data:")) for link in links), links


def test_a_hundred_classes_stay_readable():
    random = np.random.default_rng(0)
    counts = random.poisson(0.3, (100, 100)) + np.diag(random.integers(0, 50, 100))
    counts[7, 3] = 40
    counts[9] = 0  # a class without images
    names = tuple(f"class-{i}" for i in range(100))
    matrix = ConfusionMatrix(names, counts)
    (axes,) = plot_confusion(matrix).axes
    assert len(axes.texts) == 0
    assert not any("class-" in label.get_text() for label in axes.get_yticklabels())
    page = mistakes_page(Mistakes("many", "test", matrix, []), RunDirectory("runs/a").path)
    assert len(page) < 200_000
    table = page.split('aria-label="Largest confusions')[1].split("</table>")[0]
    rows = re.findall(r"<tr>\s*<td[^>]*>(.*?)</td>\s*<td[^>]*>(.*?)</td>", table)
    assert rows[0] == ("class-7", "class-3")
    assert len(rows) == LARGEST
    wrong = (counts * ~np.eye(100, dtype=bool) > 0).sum()
    assert f"({wrong - LARGEST} smaller ones are not listed)" in page


def test_occlusion_finds_the_part_that_decides_and_saturates_not():
    class Corner(nn.Module):
        """Its answer is the brightness of the lower left corner of 4x6 pixels."""

        def forward(self, x):
            z = 50 * x[:, 0, -4:, :6].mean((1, 2))
            return torch.stack([-z, z, torch.zeros_like(z)], 1)

    model = Corner().train()
    image = torch.ones(1, 3, 16, 24)
    found = occlusion(model, image, answer=1)
    assert model.training
    assert found.shape == (16, 24)
    rows, columns = divmod(int(found.argmax()), 24)
    assert rows >= 12
    assert columns < 6
    assert found[:8].abs().max() == 0
    assert found[:, 12:].abs().max() == 0
    # the probability is 1 in float32, of which hiding a pixel changes nothing
    assert model(image).softmax(1)[0, 1] == 1
    assert torch.equal(image, torch.ones_like(image))
