"""`feather demo`: plain HTTP requests. tests/test_pages.py opens its page in a browser."""

import http.client
import importlib
import io
import json
import signal
import socket
import struct
import sys
import threading
import urllib.request
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from torch_feather import models
from torch_feather.cli import main
from torch_feather.runtime.errors import CaptureError, RuntimeMissingError
from torch_feather.training import demo as demo_module
from torch_feather.training import demo_server
from torch_feather.training.checkpoint import RunDirectory, write_json
from torch_feather.training.config import Config
from torch_feather.training.demo import Demo, DemoNetwork, load_demo
from torch_feather.training.demo_server import LIMIT, DemoServer
from torch_feather.training.errors import RunError
from torch_feather.training.network_info import NetworkInfo
from torch_feather.training.predict import Predictor, load_predictor
from torch_feather.training.schemas import example_results

NAMES = ("<b>dark</b>", "light")
INFO = NetworkInfo("example", NAMES, (3, 8, 8), (0.5,) * 3, (0.5,) * 3, 8)


class Brightness(nn.Module):
    """Fails on red images, returns NaN for green ones."""

    def forward(self, x):
        red, green, _ = (float(value) for value in x.mean((0, 2, 3)))
        if red > 0.9 > green:
            raise RuntimeError("the layer\nfailed")
        if green > 0.9 > red:
            return torch.full((1, 2), torch.nan)
        mean = x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def png(color="white", size=(20, 12)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def huge():
    """A PNG of a few bytes that tells a size of 60,000 x 60,000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def server():
    networks = [
        DemoNetwork(title, "PyTorch", Predictor(Brightness(), INFO))
        for title in ("Sparse", "Dense")
    ]
    demo = Demo("runs/<i>a</i>", networks, ["90% zeros."])
    with DemoServer(demo, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    demo.close()


def ask(server, method="POST", path="/predict", body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.headers["Content-Type"] == "application/json":
        content = json.loads(content)
    return response.status, content, response.headers


def test_the_page_is_for_this_machine_and_escapes_names(server):
    assert server.server_address[0] == "127.0.0.1"
    status, page, headers = ask(server, "GET", "/")
    assert status == 200
    text = page.decode()
    assert "&lt;b&gt;dark" in text
    assert "&lt;i&gt;a" in text
    assert not any(name in text for name in ("<b>dark", "<i>a"))
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "http" not in text  # no other server
    assert ask(server, "GET", "/other")[0] == ask(server, path="/other", body=b"x")[0] == 404


def test_an_image_is_answered_by_both_networks_with_their_times(server):
    status, found, _ = ask(server, body=png("white"))
    assert status == 200
    assert [one["title"] for one in found["answers"]] == ["Sparse", "Dense"]
    for one in found["answers"]:
        assert one["predictions"][0]["class"] == "light"
        assert sum(entry["probability"] for entry in one["predictions"]) == pytest.approx(1)
        assert 0 < one["milliseconds"] < 1000
    assert ask(server, body=png("black"))[1]["answers"][0]["predictions"][0]["class"] == NAMES[0]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 422, "not a file of JPEG"),
        (b"no image", 422, "not a file of JPEG"),
        (png()[:60], 422, "This image cannot be used"),
        (huge(), 422, "3600000000 pixels"),
        (png("red"), 500, "The network failed on this image (RuntimeError: the layer)"),
        (png("lime"), 422, "returns NaN"),
    ],
    ids=["empty", "text", "truncated", "huge", "failure", "nan"],
)
def test_a_bad_image_is_an_error_in_words_and_the_next_one_is_answered(
    server, body, status, message
):
    found = ask(server, body=body)
    assert found[0] == status
    assert message in found[1]["error"]
    assert ask(server, body=png())[0] == 200


def test_uploads_are_bounded(server, monkeypatch):
    monkeypatch.setattr(demo_server, "LIMIT", 1000)
    monkeypatch.setattr(demo_server, "DISCARDED", 8000)
    status, found, headers = ask(server, body=bytes(5000))
    assert (status, headers["Connection"]) == (413, "close")
    assert "5,000 bytes, but at most 1,000" in found["error"]
    assert LIMIT == 32 * 2**20
    for length in ("-1", "ten", "", "1e3"):
        assert ask(server, headers={"Content-Length": length})[0] == 411
    assert ask(server, body=iter([png()]), headers={"Transfer-Encoding": "chunked"})[0] == 411


def test_interrupted_uploads_and_idle_connections_do_not_stop_the_server(server):
    address = "127.0.0.1", server.server_port
    idle = [socket.create_connection(address) for _ in range(5)]
    start = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    for _ in range(6):  # more than there may be uploads at a time
        with socket.create_connection(address) as half:
            half.sendall(start + b"x" * 10)
            half.shutdown(socket.SHUT_WR)
            assert b"The upload was interrupted." in half.makefile("rb").read()
    assert ask(server, body=png())[0] == 200
    for connection in idle:
        connection.close()


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Host": ""}, {"Origin": "http://evil.example"}, {"Origin": "null"}],
)
def test_pages_of_other_servers_are_refused(server, headers):
    status, found, _ = ask(server, body=png(), headers=headers)
    assert status == 403
    assert server.url in found["error"]
    own = {"Host": f"localhost:{server.server_port}", "Origin": server.url}
    assert ask(server, body=png(), headers=own)[0] == 200


def test_a_port_that_is_in_use_is_named(server):
    with pytest.raises(RunError, match=rf"port {server.server_port} of .* is in use\. Choose"):
        DemoServer(server.demo, server.server_port)


@pytest.fixture
def run(tmp_path):
    """A run and its dense baseline, which did not train."""
    config = Config(network="resnet8")
    run = RunDirectory(tmp_path / "run")
    for i, one in enumerate((run, run.dense_baseline())):
        torch.manual_seed(i)
        model = models.create("resnet8", 10, 1)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Conv2d) and one is run:
                    module.weight[::2] = 0
        one.path.mkdir()
        one.write_config(config)
        one.save_model(model)
        write_json(one.report_file, example_results())
    return run


def answers(demo):
    content = png("gray", (8, 8))
    try:
        return demo.answer(content)["answers"]
    finally:
        demo.close()


def expected(source):
    pixels = np.full((8, 8, 3), 128, np.uint8)
    (found,) = load_predictor(source).predict(["a"], [pixels], 5)
    return [(one["class"], one["probability"]) for one in found.to_dict()["predictions"]]


def test_the_sparse_network_is_compiled_and_compared_with_the_dense_baseline(run):
    pytest.importorskip("llvmlite")
    demo = load_demo(run.path)
    assert demo.notes[0].startswith("4")
    found = answers(demo)
    titles = [(one["title"], one["how"]) for one in found]
    assert titles == [("Sparse", "compiled for this CPU"), ("Dense baseline", "PyTorch")]
    for one, source in zip(found, (run.path, run.path / "dense"), strict=True):
        assert [p["class"] for p in one["predictions"]] == [name for name, _ in expected(source)]
        values = [value for _, value in expected(source)]
        assert [p["probability"] for p in one["predictions"]] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("error", [RuntimeMissingError, CaptureError])
def test_without_the_runtime_pytorch_answers_and_the_page_says_why(run, monkeypatch, error):
    def load(source, *, compiled=False, **options):
        if compiled:
            raise error("not possible here")
        return load_predictor(source, **options)

    monkeypatch.setattr(demo_module, "load_predictor", load)
    demo = load_demo(run.path)
    assert demo.notes[1] == "Not compiled: not possible here"
    assert [one["title"] for one in answers(demo)] == ["Sparse", "Dense baseline"]
    (alone,) = answers(load_demo(run.path / "dense"))
    assert (alone["title"], alone["how"][:7]) == ("Network", "PyTorch")


def test_ctrl_c_ends_the_command_cleanly(tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.safetensors"
    save_file(models.create("resnet8", 2).state_dict(), path, INFO_OF_RESNET.metadata())
    seen = []

    def open_page(url):
        def visit():
            request = urllib.request.Request(f"{url}/predict", png(), method="POST")
            seen.append(json.load(urllib.request.urlopen(request, timeout=20)))
            signal.raise_signal(signal.SIGINT)

        threading.Thread(target=visit).start()

    module = importlib.import_module("torch_feather.cli.demo")  # the package has the function
    monkeypatch.setattr(module, "open_page", open_page)
    monkeypatch.setattr(sys, "argv", ["feather", "demo", str(path), "--port", "0"])
    with pytest.raises(SystemExit) as caught:
        main()
    output, errors = capsys.readouterr()
    assert (caught.value.code or 0, errors) == (0, "")
    assert "http://127.0.0.1:" in output
    assert len(seen[0]["answers"]) == 2
    title, *_ = output.splitlines()
    assert title == "0.00 % of the weights are zero."


INFO_OF_RESNET = NetworkInfo("resnet8", ("cat", "dog"), (3, 32, 32), (0.5,) * 3, (0.2,) * 3, 32)
