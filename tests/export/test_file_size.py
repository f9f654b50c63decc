"""The benchmark of file sizes runs and prints its measurements."""

import importlib
import json
import sys
from pathlib import Path


def test_file_size_measures_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    file_size = importlib.import_module("file_size")
    out = tmp_path / "sizes.json"
    options = ["--networks", "resnet8", "--sparsities", "0.95", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["file_size.py", *options, "--json", str(out)])
    file_size.main()
    (row,) = json.loads(out.read_text())["results"]
    printed = capsys.readouterr().out
    for kind in ("dense", "zlib", "classic", "ours", "half"):
        assert f"{row[f'{kind}_bytes']:,}" in printed
    assert row["half_bytes"] < row["ours_bytes"] < row["dense_bytes"] / 12
