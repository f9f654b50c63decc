"""docs/finetune_images.md: its commands run in order, and do what the page says."""

import importlib
import json
import re
import shlex
import signal
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from torch_feather.cli import main
from torch_feather.training import example
from torch_feather.training.config import load_config, resolve_config
from torch_feather.training.data.digits import read_digits
from torch_feather.training.errors import RunError

PAGE = Path(__file__).parents[2] / "docs" / "finetune_images.md"
COMMANDS = [
    shlex.split(line)
    for line in re.findall(r"^    (feather .*)$", PAGE.read_text(), re.MULTILINE)
    if "PHOTOS" not in line  # of the reader's own
]


@pytest.fixture
def feather(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(tmp_path / "cache"))

    def visit(url):
        """Drops an image on the page of `feather demo`, then presses Ctrl-C."""
        image = sorted(Path("first/photos/val/nine").iterdir())[0].read_bytes()
        request = urllib.request.Request(f"{url}/predict", image, method="POST")
        (tmp_path / "answers.json").write_bytes(urllib.request.urlopen(request, timeout=60).read())
        signal.raise_signal(signal.SIGINT)

    def open_page(url):
        threading.Thread(target=visit, args=(url,)).start()

    monkeypatch.setattr(importlib.import_module("torch_feather.cli.demo"), "open_page", open_page)

    def run(words):
        words = [*words, "--port", "0"] if words[1] == "demo" else words  # 7860 may be in use
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert not caught.value.code, captured.err
        return captured.out

    return run


def follow(feather, more=()):
    outputs = [feather([*words, *(more if words[1] == "train" else ())]) for words in COMMANDS]
    made, trained, asked, wrong, shown, exported, compiled = outputs
    page = PAGE.read_text()
    note = re.search(r"^    (network: its head .*)$", page, re.MULTILINE)[1]
    assert note in trained.splitlines()
    images = sorted(Path("first/photos/val/nine").iterdir())
    for output in (asked, compiled):
        lines = output.splitlines()
        assert [line.split(": ")[0] for line in lines] == list(map(str, images))
    assert all(len(line.split(", ")) == 2 for line in asked.splitlines())
    assert "first/photos" in made
    assert "test images of imagefolder: accuracy" in wrong
    assert wrong.splitlines()[-2:] == ["first/sparse/errors.html", "first/sparse/confusion.png"]
    assert all(Path(file).stat().st_size > 10_000 for file in wrong.splitlines()[-2:])
    assert "http://127.0.0.1:" in shown
    answers = json.loads(Path("answers.json").read_text())["answers"]
    assert [one["title"] for one in answers] == ["Sparse", "Dense computation"]
    assert "first/nine.safetensors" in exported
    return json.loads(Path("first/sparse/report.json").read_text()), asked


@pytest.mark.slow
def test_the_page_can_be_followed_with_few_images_and_steps(feather, monkeypatch):
    (pixels, labels), (test_pixels, test_labels) = read_digits(None)
    few = (pixels[:250], labels[:250]), (test_pixels[:60], test_labels[:60])
    monkeypatch.setattr(example, "read_digits", lambda path: few)
    config = example.example_config
    monkeypatch.setattr(example, "example_config", lambda path: replace(config(path), epochs=1))
    report, _ = follow(feather, more=("--epochs", "2"))
    assert report["report"]["sparsity"] == pytest.approx(0.9, abs=1e-4)
    chosen = load_config(Path("first/sparse/config.yaml"))
    assert (chosen.network, chosen.batch_size, chosen.optimizer.name) == ("resnet8", 8, "sgd")
    assert chosen.data.class_names == ["eight", "nine", "seven"]


@pytest.mark.slow
def test_the_page_as_it_stands(feather):
    report, asked = follow(feather)
    assert report["test_accuracy"] > 0.95
    answers = [line.split(": ")[1].startswith("nine") for line in asked.splitlines()]
    assert sum(answers) > 0.9 * len(answers)
    count = sum(1 for _ in Path("first/photos").rglob("*.png"))
    assert f"{count} images of three classes" in PAGE.read_text()


def test_the_table_of_the_page_is_that_of_the_recipe():
    page = PAGE.read_text().split("## What is chosen for you")[1].split("## Next")[0]
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    named = {key for row in rows for key in re.findall(r"`([\w.]+)`", row)}
    config = resolve_config("finetune")
    assert named == set(config.automatic)
    assert (config.sparsity, config.epochs, config.optimizer.warmup_fraction) == (0.9, 20, 0.1)


def test_the_code_of_the_page_moves_a_fifth_of_each_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = {"a": 10, "b c": 11}
    for name, count in counts.items():
        folder = tmp_path / "PHOTOS" / "train" / name
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i:02}.jpg").write_text(f"{name} {i}")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code, {})
    for name, count in counts.items():
        parts = {part: sorted((tmp_path / "PHOTOS" / part / name).iterdir()) for part in
                 ("train", "val")}  # fmt: skip
        assert len(parts["val"]) == -(-count // 5)
        texts = [path.read_text() for paths in parts.values() for path in paths]
        assert sorted(texts) == sorted(f"{name} {i}" for i in range(count))


def test_images_are_not_written_over_others(tmp_path):
    (tmp_path / "mine.png").touch()
    with pytest.raises(RunError, match="is not empty"):
        example.write_example_images(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]
