"""Files of tuning results of `compile_sparse`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from torch_feather.errors import FileFormatError
from torch_feather.runtime.tuning import LayerTuning
from torch_feather.runtime.tuning_file import load_tuning, save_tuning

from ..mutate import mutate_bytes, mutate_tree
from .base import Target, refused


class Tuning(Target):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "tuning.json"

    def seeds(self) -> list[bytes]:
        layers = {
            "conv.weight": LayerTuning(True, (2, 8, 4), 0.9, 1.5, 0.25),
            "fc.weight": LayerTuning(False, (1, 16, 1), 0.0),
        }
        save_tuning(layers, self.path)
        return [self.path.read_bytes(), b"{}"]

    def mutate(self, rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
        try:
            if rng.random() < 0.7:
                return json.dumps(mutate_tree(rng, json.loads(content))).encode()
        except (ValueError, RecursionError):  # not JSON any more
            pass
        return mutate_bytes(rng, content, others)

    def check(self, content: bytes) -> bool:
        """What is accepted can be stored, and read again."""
        self.path.write_bytes(content)
        found = []
        if refused(lambda: found.append(load_tuning(self.path)), FileFormatError):
            return False
        save_tuning(found[0], self.path)
        assert load_tuning(self.path) == found[0]
        return True
