"""docs/multi_label.md: its images and commands, in order."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from torch_feather.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "multi_label.md").read_text()
QUICK = ["--epochs", "1", "--batch-size", "64", "--data.resolution", "8", "--system.threads", "1"]


def test_the_page_can_be_followed_with_few_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(tmp_path / "cache"))
    (drawing,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(drawing.replace("400", "60").replace("100)", "12)"), {})
    commands = [shlex.split(line) for line in re.findall(r"^    (feather .*)$", PAGE, re.MULTILINE)]
    outputs = []
    for words in commands:
        monkeypatch.setattr(sys, "argv", [*words, *(QUICK if words[1] == "train" else ())])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert not caught.value.code, captured.err
        outputs.append(captured.out)
    trained, asked, asked_json = outputs
    assert "mAP" in trained
    answer = json.loads(asked_json)
    assert {one["class"] for one in answer["predictions"]} == {"circle", "cross", "square"}
    above = [one["class"] for one in answer["predictions"] if one["probability"] > 0.5]
    assert answer["labels"] == above
    expected = ", ".join(above) if above else "no class above 50%"
    assert re.sub(r" \d+\.\d%(?=,|$)", "", asked.strip()).startswith(
        f"shapes/images/val1.png: {expected}"
    )
