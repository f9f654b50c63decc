"""`feather export` writes the network of a run."""

import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from hub_server import serving

import torch_feather as feather
from torch_feather.cli import main
from torch_feather.export import SparseFile, hub
from torch_feather.export.onnx import _leave_zeros_out
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import resolve_config
from torch_feather.training.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a completed run."""
    folder = tmp_path_factory.mktemp("export") / "run"
    settings = {"epochs": 1, "batch_size": 512, "compare_dense": False, "options.min_density": 0.01}
    train(resolve_config("digits", None, settings), folder)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def export(monkeypatch, tmp_path, capsys):
    """Return a function that runs `feather export`: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["feather", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call


def network(run):
    model = feather.models.create("resnet8", 10, 1).eval()
    RunDirectory(run).load_model(model)
    return model


def test_the_sparse_file_loads_into_the_network_and_computes_its_logits(run, export):
    code, output, _ = export(run)
    file = run / "model.sparse.safetensors"
    assert code == 0
    size, dense = file.stat().st_size, (run / "model.safetensors").stat().st_size
    assert f"{file}: {size:,} bytes, 1/{dense / size:.1f} of the dense file ({dense:,})" in output
    assert "10 as gaps" in output
    assert "95.00% of the weights are zero" in output
    model = feather.load_sparse(file, feather.models.create("resnet8", 10, 1)).eval()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(model(x), network(run)(x))

    report = json.loads((run / "report.json").read_text())
    with SparseFile(file) as opened:
        assert opened.sparsity == report["report"]["sparsity"]
        metadata = opened.metadata
    assert (metadata["network"], metadata["classes"], metadata["input_shape"]) == (
        "resnet8",
        10,
        [1, 8, 8],
    )
    assert metadata["test_accuracy"] == report["test_accuracy"]
    assert metadata["config"]["method"] == "feather"
    assert metadata["config"]["data"]["path"] is None


def test_half_precision_is_smaller(run, export):
    export(run)
    code, output, _ = export(run, "--dtype", "float16", "--out", "half")
    assert code == 0
    assert output.startswith("half: ")
    with SparseFile("half") as half, SparseFile(run / "model.sparse.safetensors") as whole:
        assert half.path.stat().st_size < 0.7 * whole.path.stat().st_size
        assert half.entries["fc.weight"].dtype == torch.float16


def test_the_plain_file_equals_the_stored_one(run, export):
    code, output, _ = export(run, "--format", "safetensors", "--out", "plain")
    assert (code, "all zeros stored" in output) == (0, True)
    assert (run.parent / "plain").read_bytes() == (run / "model.safetensors").read_bytes()
    before = (run / "model.safetensors").read_bytes()
    assert export(run, "--format", "safetensors")[0] == 0
    assert (run / "model.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(("format", "name"), [("onnx", ""), ("onnx-sparse", ".sparse")])
def test_the_onnx_file_computes_the_logits_for_any_batch_size(run, export, format, name):
    import onnxruntime

    # Reports of early versions lack the input shape, which is then read from the data.
    report = json.loads((run / "report.json").read_text())
    del report["input_shape"], report["classes"]
    (run / "report.json").write_text(json.dumps(report))
    code, output, _ = export(run, "--format", format)
    assert (code, "all zeros stored" in output) == (0, format == "onnx")
    assert ("sparse initializers" in output) == (format == "onnx-sparse")
    session = onnxruntime.InferenceSession(run / f"model{name}.onnx")
    for batch in (1, 5):
        x = torch.randn(batch, 1, 8, 8)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), network(run)(x))


def test_initializers_of_mostly_zeros_are_stored_sparse():
    """ONNX Runtime reads the same weights, in two and four dimensions."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    shapes = {"dense": (9, 4), "sparse": (9, 4), "empty": (9, 4), "kernel": (2, 3, 4, 3)}
    weights = {n: random.standard_normal(shape, np.float32) for n, shape in shapes.items()}
    weights["sparse"].ravel()[11:], weights["empty"][:] = 0, -0.0
    weights["kernel"].ravel()[23:] = 0
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    for port in ports:
        port.name += " out"
    graph = helper.make_graph(
        [helper.make_node("Identity", [n], [f"{n} out"]) for n in shapes],
        *("weights", [], ports, [numpy_helper.from_array(w, n) for n, w in weights.items()]),
    )
    _leave_zeros_out(graph)
    assert [x.name for x in graph.initializer] == ["dense"]
    assert [x.values.name for x in graph.sparse_initializer] == ["sparse", "empty", "kernel"]
    assert [x.values.dims[0] for x in graph.sparse_initializer] == [11, 0, 23]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})
    for array, expected in zip(found, weights.values(), strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_native_library_computes_the_logits(run, export, tmp_path):
    code, output, _ = export(run, "--format", "native", "--target", "host", "--out", "library")
    size = (tmp_path / "library" / "model.o").stat().st_size
    assert code == 0
    assert f"model.o ({size:,} bytes)" in output
    command = ["gcc", "example.c", "model.o", "-o", "example", "-lm"]
    subprocess.run(command, cwd=tmp_path / "library", check=True)
    subprocess.run(["./example"], cwd=tmp_path / "library", check=True)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_c_source_computes_the_logits_and_its_sizes_are_printed(run, export, tmp_path):
    code, output, _ = export(run, "--format", "c")
    assert code == 0
    command = ["gcc", "-std=c99", "-Wall", "-Werror", "example.c", "model.c", "-o", "e", "-lm"]
    subprocess.run(command, cwd=run / "c", check=True)
    shown = subprocess.check_output(["./e"], cwd=run / "c", text=True)
    workspace, constants = map(int, re.findall(r"(\d+) bytes", shown))
    assert f"RAM: {workspace:,} bytes; flash: {constants:,} bytes of constants" in output
    assert workspace < 64 * 1024


def test_an_onnx_file_with_wrong_outputs_is_not_written(run, export, monkeypatch):
    import onnxruntime

    class Wrong:
        def __init__(self, *_, **__): ...

        def get_inputs(self):
            return [type("Input", (), {"name": "x"})]

        def run(self, _, inputs):
            return [torch.full((len(inputs["x"]), 10), 3.0).numpy()]

    class Program:
        class model_proto:  # noqa: N801
            SerializeToString = staticmethod(lambda: b"")

    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Program)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    code, _, errors = export(run, "--format", "onnx")
    assert code == 1
    assert re.search(r"differ from PyTorch's by .*model\.onnx was not written", errors)
    assert not (run / "model.onnx").exists()


# The hub


class Client:
    """A Hugging Face client that stores repositories in a folder."""

    def __init__(self, folder):
        import huggingface_hub

        self.folder = folder
        self.ModelCardData = huggingface_hub.ModelCardData
        self.EvalResult = huggingface_hub.EvalResult

    def create_repo(self, repo_id, *, exist_ok):
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)

    def hf_hub_download(self, repo_id, filename, *, revision):
        assert revision in (None, "v1")
        return str(self.folder / repo_id / filename)


def test_a_pushed_network_can_be_loaded_from_the_hub(run, export, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "import_huggingface_hub", lambda: Client(tmp_path / "hub"))
    for _ in range(2):  # the second time the repository exists
        code, output, _ = export(run, "--push", "me/small")
    assert (code, output.endswith("on the hub: hf://me/small\n")) == (0, True)
    folder = tmp_path / "hub" / "me" / "small"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.yaml",
        "model.sparse.safetensors",
    }
    for address in ("hf://me/small", "hf://me/small@v1"):
        model = feather.load_sparse(address, feather.models.create("resnet8", 10, 1))
        assert feather.sparsity(model) == feather.sparsity(network(run))

    card = (folder / "README.md").read_text()
    accuracy = json.loads((run / "report.json").read_text())["test_accuracy"]
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "torch-feather"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == accuracy
    assert f"test accuracy | {100 * accuracy:.2f}%" in card
    assert "95.00% of 306,720" in card
    assert "`feather`" in card
    assert str(tmp_path) not in card
    assert front["pipeline_tag"] == "image-classification"
    rows = re.findall(r"^\| (\S+\.weight) \| \S+ \| ([\d,]+) \| ([\d,]+) \|", card, re.MULTILINE)
    trained = network(run)
    assert {name: int(zeros.replace(",", "")) for name, _, zeros in rows} == {
        name: int((trained.get_parameter(name) == 0).sum()) for name, *_ in rows
    }
    assert sum(int(zeros.replace(",", "")) for *_, zeros in rows) == round(0.95 * 306720)
    assert "Classes, in the order of the outputs: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in card
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})  # the instructions work
    resolve_config("digits", folder / "config.yaml", {})  # the configuration is valid


@pytest.mark.slow
def test_the_real_client_uploads_and_downloads(run, tmp_path):
    """In a process of its own: the client reads the address of the hub when it is imported."""
    program = """if True:
        import os, sys
        import torch_feather as feather
        from torch_feather.cli import main
        sys.argv = ["feather", "export", "run", "--push", "me/small"]
        try:
            main()
        except SystemExit as stop:
            assert not stop.code
        model = feather.models.create("resnet8", 10, 1)
        feather.load_sparse("hf://me/small", model)
        print("loaded", feather.sparsity(model))
        try:
            feather.load_sparse("hf://me/absent", model)
        except feather.ConfigurationError as error:
            print("absent", error)
    """
    with serving(tmp_path / "hub") as (address, requests):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            **{"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_local"},
            **{"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        }
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, (done.stderr, requests)
    assert "on the hub: hf://me/small" in done.stdout
    assert f"loaded {feather.sparsity(network(run))}" in done.stdout
    assert "absent hf://me/absent: 404" in done.stdout
    assert "## Sparsity of each layer" in (tmp_path / "hub/me/small/README.md").read_text()


class AnswerError(OSError):
    """What the client raises if the hub answers that there is no such repository."""

    response = object()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (AnswerError("401 Client Error.\nRepository Not Found"), feather.ConfigurationError),
        (ValueError("Repo id must be"), feather.ConfigurationError),
        (KeyError("no such file"), feather.ConfigurationError),
        (ConnectionError("no network"), ConnectionError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_errors_of_the_hub(monkeypatch, raised, expected):
    def fail(*_, **__):
        raise raised

    client = types.SimpleNamespace(hf_hub_download=fail, create_repo=fail)
    monkeypatch.setattr(hub, "import_huggingface_hub", lambda: client)
    for action in (
        lambda: feather.load_sparse("hf://me/small", torch.nn.Linear(2, 2)),
        lambda: SparseFile("hf://me/small@v1"),
        lambda: hub.upload(None, "me/small"),
    ):
        with pytest.raises(expected) as caught:
            action()
        if expected is feather.ConfigurationError:
            assert "hf://me/small" in str(caught.value)
            assert "Pass hf://USER/NAME" in str(caught.value)


@pytest.mark.parametrize(
    "address", ["hf://", "hf://a/b/c", "hf://a b", "hf://@", "hf://..", "hf://\0"]
)
def test_invalid_addresses_are_errors_without_a_connection(address):
    with pytest.raises(feather.ConfigurationError, match="Pass hf://USER/NAME"):
        feather.load_sparse(address, torch.nn.Linear(2, 2))


# Errors


@pytest.mark.parametrize(
    ("arguments", "missing", "message"),
    [
        (
            ["--format", "onnx"],
            "onnxscript",
            "ONNX export requires onnxscript. Run pip install 'torch-feather[onnx]'",
        ),
        (
            ["--push", "me/x"],
            "huggingface_hub",
            "requires its client. Run pip install 'torch-feather[hub]'",
        ),
    ],
    ids=["onnx", "hub"],
)
def test_the_error_names_the_missing_package(run, export, monkeypatch, arguments, missing, message):
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, errors = export(run, *arguments)
    assert (code, message in errors) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onx"], "format 'onx' is not one of sparse, safetensors, onnx"),
        (
            ["--format", "onnx", "--dtype", "float16"],
            "dtype is supported for the sparse format only",
        ),
        (["--format", "onnx", "--push", "me/x"], "--push puts the format sparse on the hub"),
        (["--dtype", "int8"], "--dtype int8: float16, bfloat16 or float32"),
        (["--out", "nowhere/x"], "No such file or directory"),
        (["--format", "onnx", "--target", "host"], "target is supported for the native format"),
        (["--format", "native", "--target", "arm"], "unknown target 'arm'"),
    ],
    ids=["format", "dtype of onnx", "push of onnx", "dtype", "folder", "target of onnx", "target"],
)
def test_invalid_options_are_errors(run, export, arguments, message):
    code, _, errors = export(run, *arguments)
    assert code != 0
    assert message in errors


def test_an_incomplete_run_and_a_damaged_file_are_errors(run, export):
    (run / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors: cannot be read" in export(run)[2]
    (run / "report.json").unlink()
    assert "this run has not finished" in export(run)[2]
