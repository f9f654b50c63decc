"""Web pages in Chromium: a trained network of digits, and a network of timm for photographs.

    pip install '.[test,browser]'
    npm install onnxruntime-web && export ONNXRUNTIME_WEB=node_modules/onnxruntime-web
    python -m pytest -m apps tests/native/test_web_browser.py

Without ONNXRUNTIME_WEB, the comparison is skipped.
"""

import base64
import functools
import http.server
import os
import threading

import numpy as np
import pytest
import torch
from native_cases import NETWORKS, TOLERANCE, create, error, pruned

import torch_feather as feather
from torch_feather.training import Config, train
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.export_run import export_run
from torch_feather.training.predict import load_predictor

pytestmark = pytest.mark.apps

ENGINE = os.environ.get("ONNXRUNTIME_WEB")
ANGLES = np.linspace(0, 2 * np.pi, 24)
ZERO = [(0.5 + 0.2 * np.cos(a), 0.5 + 0.33 * np.sin(a)) for a in ANGLES]
ONE = [(0.5, 0.15), (0.5, 0.85)]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name != "digits"]


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Be silent."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on digits that took seconds, and its page."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(network="resnet8", sparsity=0.95, epochs=12, compare_dense=False)
    train(config, folder)
    return folder, export_run(RunDirectory(folder), format="web", compare=ENGINE)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("photos")
    model = pruned(feather.models.create("timm/resnet10t", num_classes=5, in_channels=3))
    names = ["Apfel", "Birne", "Kirsche", "Pflaume", "Quitte"]
    more = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "side": 72}
    x = torch.zeros(1, 3, 64, 64)
    feather.export_web(model, x, folder, class_names=names, **more, compare=ENGINE)
    return model, folder


@pytest.fixture
def visit(browser):
    """Open the page of a folder: returns it, the errors of its console, and its requests."""
    opened = []

    def open_page(folder, scheme="light", width=1280):
        handler = functools.partial(Server, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        opened.append((server, context))
        page, errors, requests = context.new_page(), [], []
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector("html[data-state=ready]", state="attached")
        return page, errors, requests

    yield open_page
    for server, context in opened:
        context.close()
        server.shutdown()
        server.server_close()


def draw(page, points):
    box = page.locator("#pad").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=2)
    page.mouse.up()


def best(page):
    """Return the name of the most probable class that the page shows."""
    return page.locator("#classes li").first.inner_text().partition(":")[0]


def png(path, pixels):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(pixels).save(path)
    return path


def run_in(page, inputs):
    """Return the outputs of model.js in the page."""
    code = """async (inputs) => {
      const model = await (await import("./model.js")).load();
      return inputs.map((x) => Array.from(model.run(Float32Array.from(x)))); }"""
    return torch.tensor(page.evaluate(code, inputs.flatten(1).tolist()))


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 375)])
def test_a_drawn_digit_is_recognized(digits, visit, scheme, width):
    page, errors, requests = visit(digits[1], scheme, width)
    for name, points in (("0", ZERO), ("1", ONE)):
        draw(page, points)
        assert best(page) == name
        assert "One run takes" in page.locator("#time").inner_text()
        page.locator("#clear").click()
        assert page.locator("#classes li").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    color = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g)[0]")
    assert int(color) < 60 if scheme == "dark" else int(color) > 240
    assert errors == []
    served = page.url
    assert {url.removeprefix(served) for url in requests} <= {
        "",
        "model.js",
        "model.wasm",
        "data:,",
    }


def test_outputs_of_test_images_agree_with_pytorch(digits, visit):
    sklearn = pytest.importorskip("sklearn.datasets")
    folder, site = digits
    page, errors, _ = visit(site)
    pixels = np.round(sklearn.load_digits().images[-50:] / 16 * 255).astype(np.uint8)
    predictor = load_predictor(folder)
    x = torch.cat([predictor.prepare(np.stack([p] * 3, 2)) for p in pixels])
    with torch.no_grad():
        expected = predictor.network(x)
    assert error(run_in(page, x), expected) < TOLERANCE
    assert errors == []


def test_chosen_images_have_the_classes_of_feather_predict(digits, visit, tmp_path):
    sklearn = pytest.importorskip("sklearn.datasets")
    folder, site = digits
    page, errors, _ = visit(site)
    predictor = load_predictor(folder)
    for i, image in enumerate(sklearn.load_digits().images[:8]):
        pixels = np.kron(image / 16 * 255, np.ones((5, 5))).astype(np.uint8)
        file = png(tmp_path / f"{i}.png", pixels)
        (expected,) = predictor.predict_files([file], top=1)
        page.locator("#classes").evaluate("element => element.replaceChildren()")
        page.locator("#file").set_input_files(file)
        page.wait_for_selector("#classes li")
        text = f"{expected.classes[0]}: {100 * expected.probabilities[0]:.1f}%"
        assert page.locator("#classes li").first.inner_text().split("\n")[0] == text
    assert errors == []


def test_a_file_that_is_no_image_is_said(digits, visit, tmp_path):
    page, _, _ = visit(digits[1])
    (tmp_path / "a.png").write_text("no image")
    page.locator("#file").set_input_files(tmp_path / "a.png")
    page.wait_for_selector("#time:has-text('This did not work')")


def test_a_photograph(photos, visit, tmp_path):
    model, folder = photos
    page, errors, _ = visit(folder)
    assert not page.locator("#pad").is_visible()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = torch.cat([model(x[:1]), model(x[1:])])
    assert error(run_in(page, x), expected) < TOLERANCE
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (90, 150, 3)).astype(np.uint8)
    page.locator("#file").set_input_files(png(tmp_path / "a.png", pixels))
    page.wait_for_selector("#classes li")
    names = page.locator("#classes li").all_inner_texts()
    assert sorted(name.partition(":")[0] for name in names)[0] == "Apfel"
    assert errors == []


def test_a_dropped_photograph_has_the_answer_of_a_chosen_one(photos, visit, tmp_path):
    page, errors, _ = visit(photos[1])
    pixels = np.random.default_rng(1).integers(0, 256, (90, 150, 3)).astype(np.uint8)
    file = png(tmp_path / "a.png", pixels)
    page.locator("#file").set_input_files(file)
    page.wait_for_selector("#classes li")
    chosen = page.locator("#classes li").all_inner_texts()
    page.locator("#classes").evaluate("element => element.replaceChildren()")
    transfer = page.evaluate_handle(
        """(text) => {
          const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
          const transfer = new DataTransfer();
          transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
          return transfer; }""",
        base64.b64encode(file.read_bytes()).decode(),
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    assert page.locator("#drop.over").count() == 1
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    page.wait_for_selector("#classes li")
    assert page.locator("#classes li").all_inner_texts() == chosen
    assert page.locator("#drop.over").count() == 0
    assert errors == []


@pytest.mark.parametrize("name", ["digits", *SLOW])
def test_outputs_of_networks_agree_with_pytorch(name, visit, tmp_path):
    model, shape = create(name)
    feather.export_web(pruned(model, 0.9), torch.zeros(shape), tmp_path)
    page, errors, _ = visit(tmp_path)
    x = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(x)
    assert error(run_in(page, x), expected) < TOLERANCE
    assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["digits", "photos"])
def test_axe_finds_no_fault_of_accessibility(name, visit, scheme, request):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page, _, _ = visit(request.getfixturevalue(name)[1], scheme)
    if name == "digits":
        draw(page, ZERO)
    found = axe.Axe().run(page).response["violations"]
    assert {fault["id"]: [node["html"][:200] for node in fault["nodes"]] for fault in found} == {}


@pytest.mark.skipif(ENGINE is None, reason="ONNXRUNTIME_WEB is not set")
def test_the_page_times_both_networks(digits, visit):
    """The sparse network is more than ten times as fast, so 1.5 holds on a busy machine too."""
    page, errors, requests = visit(digits[1])
    draw(page, ZERO)
    page.locator("#compare").click()
    page.wait_for_selector("#result table", timeout=120_000)
    cells = page.locator("#result td").all_inner_texts()
    times = dict(zip(cells[::2], cells[1::2], strict=True))
    assert float(times["ratio"].removesuffix("×")) > 1.5
    difference = page.locator("#result p").inner_text().split("outputs: ")[1].split()[0]
    assert float(difference) < TOLERANCE
    assert all(url.startswith((page.url, "data:", "blob:")) for url in requests)
    assert errors == []
