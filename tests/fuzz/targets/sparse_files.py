"""Sparse files, through `SparseFile`, `load_sparse` and the options that read weights."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

import torch_feather as feather
from torch_feather.errors import FileFormatError, StateError
from torch_feather.export import SparseFile, manifest
from torch_feather.training.weights import read_weights

from ..mutate import mutate_bytes, mutate_tree
from .base import Target, refused

LIMIT = 2**20


class _Network(nn.Module):
    """Tied and ordinary weights, a scalar, integers and an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 9)
        self.narrow = nn.Parameter(torch.zeros(4, 40, dtype=torch.float16))
        self.tied = nn.Linear(12, 9, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("mask", torch.ones(5, dtype=torch.bool))


class SparseFiles(Target):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "model.sparse.safetensors"
        self.model = _Network()
        self.zeros = {name: torch.zeros_like(t) for name, t in self.model.state_dict().items()}

    def seeds(self) -> list[bytes]:
        torch.manual_seed(0)
        found = []
        model = _Network()
        with torch.no_grad():
            model.first.weight[:, 1:] = 0
            model.narrow[::2, ::7] = 1
        states: list[Any] = [
            model,
            model.state_dict(),
            {"w": torch.zeros(3, 700).index_fill_(1, torch.tensor([5, 600]), 1.0)},
            {"w": torch.eye(40, dtype=torch.bfloat16), "v": torch.eye(30, dtype=torch.float64)},
            {"z": torch.zeros(2, 3), "s": torch.tensor(1.0), "i": torch.arange(9).int()},
        ]
        for state in states:
            feather.save_sparse(state, self.path, metadata={"network": "resnet8"})
            found.append(self.path.read_bytes())
        torch.save(model.state_dict(), self.path)
        return found

    def mutate(self, rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
        if rng.random() < 0.3:
            return mutate_bytes(rng, content, others)
        try:
            return _forge(rng, content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            return mutate_bytes(rng, content, others)

    def check(self, content: bytes) -> bool:
        self.path.write_bytes(content)
        doors = [
            (self._read, FileFormatError),
            (self._load, (FileFormatError, StateError)),
            (lambda: read_weights(self.path).tensors, feather.FeatherError),
        ]
        results = [refused(door, errors) for door, errors in doors]
        return not all(results)

    def _read(self) -> None:
        with SparseFile(self.path) as file:
            assert 0 <= file.sparsity <= 1
            for name, entry in file.entries.items():
                tensor = file.tensor(name, limit=LIMIT)
                assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype)
                positions, values = file.nonzeros(name)
                assert len(positions) == len(values) <= entry.size
                if len(positions):
                    assert 0 <= positions.min() <= positions.max() < entry.size

    def _load(self) -> None:
        """A file that is refused leaves the model as it was."""
        self.model.load_state_dict(self.zeros)
        try:
            feather.load_sparse(self.path, self.model)
        except feather.FeatherError:
            state = self.model.state_dict()
            assert all(torch.equal(state[name], value) for name, value in self.zeros.items())
            raise
        feather.save_sparse(self.model, self.folder / "again")
        again = feather.load_sparse(self.folder / "again", _Network()).state_dict()
        for name, value in self.model.state_dict().items():
            assert torch.equal(value.nan_to_num(), again[name].nan_to_num()), name


def _forge(rng: Random, content: bytes) -> bytes:
    """Change header, description or data of a file, and set the checksums of the result."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    document = json.loads(header["__metadata__"][manifest.KEY][8:])
    match rng.randrange(4):
        case 0:
            header = mutate_tree(rng, header)
        case 1:
            data = mutate_bytes(rng, data)
        case _:
            document = mutate_tree(rng, document)
    if rng.random() < 0.8:
        _sign(document, header, data)
    if isinstance(header.get("__metadata__"), dict):
        text = json.dumps(document)
        crc = f"{zlib.crc32(text.encode()):08x}"
        header["__metadata__"][manifest.KEY] = crc + text
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _sign(document: Any, header: Any, data: bytes) -> None:
    """Set the checksums of the tensors."""
    for name, description in document["tensors"].items():
        dense = name in header
        parts = [name] if dense else [name + manifest.VALUES, name + manifest.GAPS]
        if not isinstance(description, dict) or any(p not in header for p in parts):
            continue
        shape = header[name]["shape"] if dense else description.get("shape")
        dtype = str(manifest.DTYPES.get(header[parts[0]]["dtype"])).removeprefix("torch.")
        crc = zlib.crc32(f"{dtype} {list(shape)}".encode())
        for part in parts:
            begin, end = header[part]["data_offsets"]
            crc = zlib.crc32(data[begin:end], crc)
        description["crc"] = crc
