"""Web pages: the module and its interface in Node (skipped without it), and wrong arguments."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from native_cases import TOLERANCE, error, pruned
from torch import nn

import torch_feather as feather
from torch_feather.native import NativeExportError
from torch_feather.native.web import ENGINE
from torch_feather.native.webassembly import BROWSER, to_module
from torch_feather.runtime.kernels import compile_object
from torch_feather.training.checkpoint import RunDirectory, write_json
from torch_feather.training.config import Config
from torch_feather.training.export_run import export_run
from torch_feather.training.network_info import NetworkInfo
from torch_feather.training.predict import Predictor
from torch_feather.training.schemas import example_results

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node")
FILES = ["index.html", "model.js", "model.wasm"]


def ask(folder, **questions):
    """Return what model.js answers in Node."""
    command = [NODE, "--no-warnings", str(Path(__file__).parent / "web.mjs"), str(folder)]
    text = json.dumps(questions)
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rgba(pixels):
    """Return pixels (H, W, 3) as an ImageData has them."""
    opaque = np.full((*pixels.shape[:2], 1), 255, np.uint8)
    data = np.concatenate([pixels, opaque], 2).ravel().tolist()
    return {"data": data, "width": pixels.shape[1], "height": pixels.shape[0]}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The page of a run of `feather train` on digits."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    run.write_config(Config(network="resnet8"))
    model = pruned(feather.models.create("resnet8", num_classes=10, in_channels=1))
    run.save_model(model)
    report = example_results()
    (layer,) = report["report"]["layers"]
    names = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    report["report"]["layers"] = [layer | {"name": name} for name in names]
    write_json(run.report_file, report)
    return model, export_run(run, format="web")


@needs_node
def test_the_digits_network_agrees_with_pytorch(digits):
    model, folder = digits
    x = torch.randn(3, 1, 8, 8)
    answer = ask(folder, inputs=x.flatten(1).tolist())
    with torch.no_grad():
        expected = model(x)
    assert error(answer["outputs"], expected) < TOLERANCE
    for classes, row in zip(answer["classes"], expected.softmax(1), strict=True):
        values, order = row.sort(descending=True)
        assert [c["name"] for c in classes] == [str(i) for i in order.tolist()]
        assert np.allclose([c["probability"] for c in classes], values, atol=1e-5)
    assert answer["refused"] == "RangeError: expected 64 numbers, got 1"


@needs_node
@pytest.mark.parametrize(("channels", "side"), [(1, 9), (3, 11)])
def test_images_are_prepared_as_in_evaluation(channels, side, tmp_path):
    """Equal but for rounding: some pixels may differ by one of 255 levels."""
    mean, std = (0.3, 0.4, 0.5)[:channels], (0.2, 0.3, 0.25)[:channels]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 3))
    x = torch.zeros(1, channels, 8, 8)
    feather.export_web(model, x, tmp_path, mean=mean, std=std, side=side)
    info = NetworkInfo("mlp", ("a", "b", "c"), (channels, 8, 8), mean, std, side)
    random = np.random.default_rng(0)
    images = [
        np.asarray(random.integers(0, 256, (*size, 3)), np.uint8)
        for size in ((37, 20), (8, 8), (6, 5), (9, 31), (64, 64))
    ]
    answer = ask(tmp_path, images=[rgba(image) for image in images])
    for found, image in zip(answer["prepared"], images, strict=True):
        expected = Predictor(model, info).prepare(image).flatten()
        level = (1 / (255 * torch.tensor(std))).repeat_interleave(64)
        difference = (torch.tensor(found) - expected).abs() / level
        assert difference.max() < 1.01
        assert difference.mean() < 0.1


@needs_node
@pytest.mark.slow
def test_a_network_of_timm_agrees_with_pytorch(tmp_path):
    pytest.importorskip("timm")
    model = pruned(feather.models.create("timm/resnet10t", num_classes=5, in_channels=3))
    x = torch.randn(1, 3, 32, 32)
    feather.export_web(model, x, tmp_path)
    with torch.no_grad():
        assert error(ask(tmp_path, inputs=[x.flatten().tolist()])["outputs"], model(x)) < TOLERANCE


@needs_node
def test_functions_of_the_c_library(tmp_path):
    """log and pow come from JavaScript; exp, erf and tanh are in the module, which is faster."""

    class Smooth(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 6, 3), nn.Linear(216, 4)

        def forward(self, x):
            y = nn.functional.gelu(self.first(x))
            y = nn.functional.silu(y) + nn.functional.softplus(y) + y.tanh()
            return self.second(y.abs().pow(1.5).flatten(1)).log_softmax(1)

    model, x = pruned(Smooth(), 0.5), torch.randn(1, 1, 8, 8)
    feather.export_web(model, x, tmp_path)
    module = (tmp_path / "model.wasm").read_bytes()
    assert all(name in module for name in (b"logf", b"powf"))
    assert not any(name in module for name in (b"expf", b"erff", b"tanhf"))
    with torch.no_grad():
        assert error(ask(tmp_path, inputs=[x.flatten().tolist()])["outputs"], model(x)) < TOLERANCE


@needs_node
def test_exp_and_erf_of_any_number(tmp_path):
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)  # an export needs a weight

        def forward(self, x):
            x = x.flatten(1)
            return torch.cat([x.exp(), torch.erf(x), (x.abs() * 1e30).erf()], 1)

    x = torch.cat([torch.linspace(-87, 88.71, 1000), torch.linspace(-4, 4, 24)])
    feather.export_web(Functions(), torch.zeros(1, 1, 32, 32), tmp_path)
    found = torch.tensor(ask(tmp_path, inputs=[x.tolist()])["outputs"])
    expected = Functions()(x[None])
    assert torch.allclose(found[:, :1024], expected[:, :1024], rtol=1e-5, atol=0)
    assert torch.allclose(found[:, 1024:], expected[:, 1024:], rtol=0, atol=3e-7)


def test_the_page_of_a_run_has_its_classes_and_no_address_outside(digits):
    _, folder = digits
    assert sorted(file.name for file in folder.iterdir()) == FILES
    info = json.loads(re.search(r"info = (\{.*?\n\});", (folder / "model.js").read_text(), re.S)[1])
    assert info["classNames"] == [str(i) for i in range(10)]
    assert (info["mean"], info["std"], info["side"]) == ([0.288], [0.354], 8)
    assert info["sparsity"] == pytest.approx(0.95, abs=0.01)
    page = (folder / "index.html").read_text()
    assert "<title>digits: resnet8</title>" in page
    assert "//" not in re.sub(r"// .*|///? .*", "", page.replace("/**", ""))
    assert (folder / "model.wasm").stat().st_size < 120_000


def test_titles_and_names_are_escaped(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    x = torch.zeros(1, 1, 2, 2)
    feather.export_web(model, x, tmp_path, title="<b>&@INFO@", class_names=['"</script>'])
    assert "<title>&lt;b&gt;&amp;@INFO@</title>" in (tmp_path / "index.html").read_text()
    assert r'"\"</script>"' in (tmp_path / "model.js").read_text()


@pytest.mark.slow
def test_the_engine_is_copied_with_the_dense_network(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    engine = tmp_path / "node_modules/onnxruntime-web/dist"
    engine.mkdir(parents=True)
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm", "ort.js"):
        (engine / name).write_text(name)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.randn(1, 1, 2, 2)
    files = feather.export_web(model, x, tmp_path / "page", compare=tmp_path)
    names = [str(file.relative_to(tmp_path / "page")) for file in files]
    copied = [f"onnxruntime-web/{name}" for name in ENGINE]
    assert names == sorted(["compare.js", "dense.onnx", *FILES, *copied])
    assert '"compare": true' in (tmp_path / "page/model.js").read_text()
    session = onnxruntime.InferenceSession(tmp_path / "page/dense.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert error(found, model(x).detach()) < TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example_input": torch.zeros(2, 1, 2, 2)}, r"one square image.*\(2, 1, 2, 2\)"),
        ({"example_input": torch.zeros(1, 4)}, r"one square image.*\(1, 4\)"),
        ({"class_names": ["a"]}, "1 names for 3 outputs"),
        ({"mean": [0.0, 0.0]}, "mean and std need 1 numbers"),
        ({"std": [0.0]}, "above 0"),
        ({"side": 1}, "at least 2"),
        ({"compare": "absent"}, "absent: has no ort.*npm install onnxruntime-web"),
        ({"model": nn.Conv2d(1, 2, 1)}, r"\(1, classes\), but the outputs are \[\(1, 2, 2, 2\)\]"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    given = {"model": model, "example_input": torch.zeros(1, 1, 2, 2), "directory": tmp_path}
    with pytest.raises((feather.ConfigurationError, NativeExportError), match=message):
        feather.export_web(**(given | arguments))
    assert not list(tmp_path.iterdir())


def test_only_pages_compare(digits):
    with pytest.raises(feather.ConfigurationError, match="web format only"):
        export_run(RunDirectory(digits[1].parent), format="onnx", compare=Path())


def test_a_page_cannot_prepare_images_as_a_data_set_does(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_config(Config(network="resnet8"))
    run.save_model(feather.models.create("resnet8", num_classes=10, in_channels=1))
    write_json(run.report_file, example_results(preprocessing={"prepared_by": "my.data:load"}))
    with pytest.raises(feather.ConfigurationError, match=r"my.data:load, which a page cannot"):
        export_run(run, format="web")
    assert not (tmp_path / "web").exists()


FUNCTION_POINTER = """
@table = constant ptr @f
define i32 @f() { ret i32 5 }
"""
STACK = """
declare void @g(ptr)
define void @f() {
  %x = alloca i32
  call void @g(ptr %x)
  ret void
}
"""


@pytest.mark.parametrize(
    ("text", "message"), [(FUNCTION_POINTER, "relocation of kind 2"), (STACK, "kind 7|__stack")]
)
def test_code_that_needs_a_linker_is_named(text, message):
    with pytest.raises(NativeExportError, match=message):
        to_module(compile_object(BROWSER, text))


@needs_node
def test_only_public_functions_are_exported_and_data_is_where_code_reads_it(tmp_path):
    text = """
    @pad = internal constant [100 x i8] zeroinitializer, align 64
    @found = internal global [2 x i32] [i32 7, i32 9], align 64
    define internal i32 @hidden(i32 %i) noinline {
      %at = getelementptr i32, ptr @found, i32 %i
      %value = load i32, ptr %at
      ret i32 %value
    }
    define i32 @shown(i32 %i) {
      %value = call i32 @hidden(i32 %i)
      %p = ptrtoint ptr @pad to i32
      %sum = add i32 %value, %p
      ret i32 %sum
    }
    """
    (tmp_path / "a.wasm").write_bytes(to_module(compile_object(BROWSER, text)))
    code = (
        "const e = new WebAssembly.Instance(new WebAssembly.Module("
        "require('fs').readFileSync(process.argv[1]))).exports;"
        "console.log(Object.keys(e).join(), e.shown(1) - e.shown(0), e.__heap_base.value)"
    )
    command = [NODE, "-e", code, str(tmp_path / "a.wasm")]
    out = subprocess.check_output(command, text=True).split()
    assert out[0] == "shown,memory,__heap_base"
    assert out[1] == "2"
    assert int(out[2]) >= 8
