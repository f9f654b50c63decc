"""`feather predict`: answers with the names of classes, from runs and exported files."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from photos import COLORS, make_photos
from safetensors.torch import save_file

import torch_feather as library
from torch_feather import models
from torch_feather.cli import main
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import apply, resolve_config
from torch_feather.training.data import eval_loader, load_dataset
from torch_feather.training.errors import RunError
from torch_feather.training.export_run import export_run, load_network
from torch_feather.training.loop import train
from torch_feather.training.network_info import KEY
from torch_feather.training.predict import image_files, load_predictor


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    overrides = {"network": "resnet8", "data.path": str(photos), "data.resolution": 16, "epochs": 2,
                 "system.threads": 1, "system.workers": 0, "system.amp": False}  # fmt: skip
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(resolve_config("finetune", overrides=overrides), folder)
    return RunDirectory(folder)


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "run": run.path,
        "sparse": export_run(run, out=folder / "sparse.safetensors"),
        "safetensors": export_run(run, "safetensors", folder / "dense.safetensors"),
        "onnx": folder / "model.onnx",
    }


@pytest.fixture
def feather(monkeypatch, capsys):
    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        monkeypatch.setattr(sys, "argv", ["feather", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()

    return call


def expected(run):
    """The probabilities of the test images, by the loader and network of the evaluation."""
    config = run.read_config()
    data = load_dataset(config.data, config.seed)
    network, _ = load_network(run)
    network.eval()
    with torch.no_grad():
        batches = eval_loader(data, data.test, config, torch.device("cpu"))
        return torch.cat([network(x).softmax(1) for x, _ in batches])


@pytest.mark.slow
@pytest.mark.parametrize("source", ["run", "sparse", "safetensors", "onnx"])
@pytest.mark.parametrize("compiled", [False, True])
def test_answers_are_those_of_the_evaluation(run, photos, files, feather, source, compiled):
    if source == "onnx":
        if compiled:
            pytest.skip("onnxruntime has its own compiler")
        pytest.importorskip("onnxscript")
        export_run(run, "onnx", files["onnx"])
    if compiled:
        pytest.importorskip("llvmlite")
    options = ["--json", "--top", 5, *["--compiled"] * compiled]
    code, output, errors = feather("predict", files[source], photos / "val", *options)
    assert code == 0, errors
    answers = [json.loads(line) for line in output.splitlines()]
    assert [answer["image"] for answer in answers] == list(map(str, image_files(photos / "val")))
    names = list(COLORS)
    for answer, row in zip(answers, expected(run), strict=True):
        found = {one["class"]: one["probability"] for one in answer["predictions"]}
        torch.testing.assert_close(
            torch.tensor([found[name] for name in names]), row, rtol=1e-3, atol=1e-4
        )
        values = [one["probability"] for one in answer["predictions"]]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)


def test_the_accuracy_of_the_answers_is_that_of_the_report(run, photos):
    predictor = load_predictor(run.path)
    found = list(predictor.predict_files(image_files(photos / "val"), top=1))
    right = [one.classes[0] == one.image.split("/")[-2] for one in found]
    assert sum(right) / len(right) == run.read_report()["test_accuracy"]


def test_a_person_reads_one_line_per_image(run, photos, feather):
    image = photos / "val" / "red" / "00.png"
    code, output, _ = feather("predict", run.path, image, "--top", 2)
    assert code == 0
    (line,) = output.splitlines()
    first, second = line.removeprefix(f"{image}: ").split(", ")
    assert {first.split()[0], second.split()[0]} <= set(COLORS)
    assert first.endswith("%")
    code, piped, _ = feather("predict", run.path, "-", "--top", 2, stdin=image.read_bytes())
    assert code == 0
    assert piped == line.replace(str(image), "-") + "\n"


def test_images_that_cannot_be_read_are_named_and_the_others_answered(
    run, photos, feather, tmp_path
):
    (tmp_path / "b.png").write_bytes(b"no image")
    good = (photos / "val" / "red" / "00.png").read_bytes()
    for name in ("a.png", "c.PNG", ".hidden.png"):
        (tmp_path / name).write_bytes(good)
    code, output, _ = feather("predict", run.path, tmp_path)
    assert code == 1
    lines = output.splitlines()
    assert [line.split(":")[0].rpartition("/")[2] for line in lines] == ["a.png", "b.png", "c.PNG"]
    assert "b.png: not an image (not a file of JPEG" in lines[1]
    code, output, _ = feather("predict", run.path, tmp_path / "b.png", "--json")
    assert code == 1
    assert json.loads(output)["error"].startswith("not a file of")


def test_errors_say_what_is_missing(run, photos, feather, tmp_path):
    image = photos / "val" / "red" / "00.png"
    (tmp_path / "empty").mkdir()
    save_file(models.create("resnet8", 3).state_dict(), tmp_path / "plain.safetensors")
    torch.save({}, tmp_path / "plain.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    for source, what, message in (
        (tmp_path / "nowhere", image, "nowhere: no such run directory or file"),
        (tmp_path / "empty", image, "not a run directory"),
        (tmp_path / "plain.safetensors", image, "does not hold names of classes"),
        (tmp_path / "plain.pt", image, "does not hold names of classes"),
        (tmp_path / "broken.safetensors", image, "cannot be read"),
        (tmp_path / "broken.onnx", image, "cannot be read as ONNX"),
        (run.path, tmp_path / "nothing.png", "no such image or folder"),
        (run.path, tmp_path / "empty", "has no images"),
        (run.path, "-", "standard input: cannot be decoded"),
    ):
        code, output, errors = feather("predict", source, what)
        assert (code, output) == (1, "")
        assert message in errors
        assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [{"class_names": ["a"]}, {"input_shape": [3, 16]}, {"input_shape": [3, -1, 16]},
     {"classes": "3"}, {"preprocessing": {}}, {"network": 5}, {"class_names": [1, 2, 3]}],
)  # fmt: skip
def test_wrong_metadata_is_an_error_of_one_line(run, tmp_path, changes):
    facts = load_predictor(run.path).info.entries() | changes
    tensors = load_network(run)[0].state_dict()
    save_file(tensors, tmp_path / "wrong.safetensors", {KEY: json.dumps(facts)})
    with pytest.raises(RunError, match=r"wrong\.safetensors.* wrong values"):
        load_predictor(tmp_path / "wrong.safetensors")


def test_grey_images_and_a_sparse_file_without_class_names_of_version_0_1(tmp_path):
    config = apply(resolve_config("digits"), {"epochs": 1, "compare_dense": False}, "test")
    results = train(config, tmp_path / "run")
    path = export_run(RunDirectory(tmp_path / "run"))
    with library.export.SparseFile(path) as file:
        metadata = {
            k: v for k, v in file.metadata.items() if k not in ("class_names", "preprocessing")
        }
        metadata["config"]["data"].pop("class_names")
        tensors = {name: file.tensor(name) for name in file.entries}
    library.save_sparse(tensors, tmp_path / "old.safetensors", metadata=metadata)
    data = load_dataset(config.data, config.seed)
    predictor = load_predictor(tmp_path / "old.safetensors")
    images = [one.expand(-1, -1, 3).numpy() for one in data.test.pixels]
    found = predictor.predict([""] * len(images), images, top=1)
    right = sum(int(one.classes[0]) == y for one, y in zip(found, data.test.labels, strict=True))
    assert right / len(images) == pytest.approx(results["test_accuracy"], abs=1e-9)
