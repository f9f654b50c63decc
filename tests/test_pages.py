"""Pages of studies, runs, demo and site in a real browser: both schemes, a desk and a phone.

    pip install '.[test,docs,browser]'
    python -m pytest -m apps tests/test_pages.py

Chromium is that of the system (`apt-get install chromium`), or of `playwright install chromium`.
"""

import base64
import io
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from torch_feather.analysis.confusion import ConfusionMatrix
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.demo import Demo, DemoNetwork
from torch_feather.training.demo_server import LIMIT, DemoServer
from torch_feather.training.mistakes import Mistake, Mistakes
from torch_feather.training.mistakes_page import write_mistakes
from torch_feather.training.network_info import NetworkInfo
from torch_feather.training.predict import Predictor

ROOT = Path(__file__).parents[1]
STUDIES = {
    "compare": ROOT / "results" / "compare-small" / "index.html",
    "flops": ROOT / "results" / "flops-small" / "index.html",
}
SITE = (
    *("README", "docs/quickstart", "docs/choose_method", "docs/choose_sparsity", "docs/deploy"),
    *("docs/migrate", "docs/troubleshooting", "docs/compatibility", "results/README"),
)
RUNS = {"errors-12": 12, "errors-100": 100}  # pages of errors, by the number of classes
PAGES = [*STUDIES, *RUNS, *SITE]
WIDTHS = {"desk": 1280, "phone": 375}

pytestmark = pytest.mark.apps


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("furo")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "-c", "docs", ".", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    random, folder, found = np.random.default_rng(0), tmp_path_factory.mktemp("runs"), {}
    for name, size in RUNS.items():
        names = [f"class <b>{i}</b> of {size}" for i in range(size)]
        counts = random.poisson(0.5, (size, size)) + np.diag(random.integers(1, 90, size))
        pixels, evidence = (
            random.integers(0, 255, (64, 48, 3), np.uint8),
            random.normal(size=(64, 48)),
        )
        path = "photos/" + 9 * "long-folder-name/" + "1.jpg"
        worst = [
            Mistake(path, names[i], names[i + 1], 0.9, 0.01, pixels, evidence) for i in range(6)
        ]
        matrix = ConfusionMatrix(tuple(names), counts)
        run = RunDirectory(folder / name)
        run.path.mkdir()
        found[name], _ = write_mistakes(run, Mistakes("photos", "test", matrix, worst, matrix))
    return found


@pytest.fixture
def visit(browser, request):
    contexts = []

    def open_page(name, scheme="light", width=1280):
        """Returns the page and the errors of its console, which may still grow."""
        if name.startswith("http"):
            address = name
        else:
            own = STUDIES | (request.getfixturevalue("runs") if name in RUNS else {})
            file = own.get(name) or request.getfixturevalue("site") / f"{name}.html"
            address = file.as_uri()
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        page, errors = context.new_page(), []
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        return page, errors

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_no_errors_fits_the_width_and_follows_the_scheme(visit, name, scheme, width):
    page, errors = visit(name, scheme, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"
    brightness = sum(page.evaluate(background)[:3]) / 3
    assert brightness < 60 if scheme == "dark" else brightness > 240
    sideways = """[...document.querySelectorAll("main *, article *")].filter(e =>
        e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX))
        .map(e => e.tagName + "." + e.className)"""
    if width == WIDTHS["phone"]:
        assert page.evaluate(sideways) == []
    assert len(page.screenshot(full_page=True)) > 20_000
    assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_fault_of_accessibility(visit, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page, _ = visit(name, scheme)
    part = "article" if name in SITE else "body"  # not the theme's navigation
    found = axe.Axe().run(page, context=part).response["violations"]
    faults = {fault["id"]: [node["html"][:200] for node in fault["nodes"]] for fault in found}
    assert faults == {}


@pytest.mark.parametrize(("name", "column"), [("compare", 2), ("README", 0)])
def test_a_header_sorts_its_table_with_mouse_and_keyboard(visit, name, column):
    page, _ = visit(name)
    table = page.locator("table").first
    button = table.locator("thead th").nth(column).locator("button")

    def cells():
        texts = table.locator(f"tbody tr td:nth-child({column + 1})").all_inner_texts()
        texts = [text.strip() for text in texts]
        return [float(t.split()[0]) for t in texts] if name == "compare" else texts

    before = sorted(cells())
    button.click()
    first = cells()
    button.focus()
    page.keyboard.press("Enter")
    assert {tuple(first), tuple(cells())} == {tuple(before), tuple(before[::-1])}
    assert table.locator("thead th").nth(column).get_attribute("aria-sort") in (
        *("ascending", "descending"),
    )


class Brightness(nn.Module):
    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


@pytest.fixture(scope="module")
def demo():
    info = NetworkInfo("example", ("<b>dark</b>", "light"), (3, 8, 8), (0.5,) * 3, (0.5,) * 3, 8)
    predictor = Predictor(Brightness(), info)
    networks = [DemoNetwork(title, "PyTorch", predictor) for title in ("Sparse", "Dense")]
    shown = Demo("runs/a", networks, ["90% of the weights are zero."])
    with DemoServer(shown, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    shown.close()


def image_file(color, name="image.png"):
    file = io.BytesIO()
    Image.new("RGB", (64, 48), color).save(file, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": file.getvalue()}


def drop(page, content):
    """Drops a file on the page, as a file manager does."""
    script = """content => {
        const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
        const data = new DataTransfer();
        if (bytes.length) data.items.add(new File([bytes], "dropped.png"));
        for (const kind of ["dragenter", "dragover", "drop"])
            document.getElementById("drop").dispatchEvent(
                new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(script, base64.b64encode(content).decode())


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_demo_answers_a_chosen_and_a_dropped_image(visit, demo, scheme, width):
    page, errors = visit(demo.url, scheme, width)
    page.set_input_files("input", image_file("white"))
    page.wait_for_selector("#answers h2")
    assert page.locator("#answers h2").all_inner_texts() == ["Sparse", "Dense"]
    assert all(text.endswith(" ms") for text in page.locator(".time").all_inner_texts())
    assert page.locator("#answers li span").first.inner_text() == "light"
    drop(page, image_file("black")["buffer"])
    page.locator("#status", has_text="<b>dark</b>").wait_for()
    assert page.locator("#answers li span").first.inner_text() == "<b>dark</b>"
    assert page.locator("#preview").is_visible()
    assert page.locator("#preview").get_attribute("alt") == "dropped.png"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"
    brightness = sum(page.evaluate(background)[:3]) / 3
    assert brightness < 60 if scheme == "dark" else brightness > 240
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    assert {fault["id"]: fault["nodes"][0]["html"][:200] for fault in found} == {}
    assert errors == []


def test_the_demo_shows_errors_in_words_and_goes_on(visit, demo):
    page, _ = visit(demo.url)
    status = page.locator("#status.error")
    drop(page, b"no image")
    status.wait_for()
    assert "This image cannot be used: not a file of JPEG" in status.inner_text()
    page.locator("#preview").wait_for(state="hidden")
    drop(page, b"")
    assert "This is no file" in status.inner_text()
    page.evaluate(f"ask(new File([new Uint8Array({LIMIT + 1})], 'large.png'))")
    assert f"at most {LIMIT} are accepted" in status.inner_text()
    page.set_input_files("input", image_file("white"))
    page.wait_for_selector("#answers h2")
    assert status.count() == 0
    page.route("**/predict", lambda route: route.abort())  # as if the server had ended
    page.set_input_files("input", image_file("black", "other.png"))
    status.wait_for()
    assert "Is feather demo still running?" in status.inner_text()
    assert page.locator("#answers h2").count() == 0
