"""Parquet files of CIFAR."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from torch_feather.training.data.cifar import cifar
from torch_feather.training.errors import DataError

from .base import Target, refused


class Parquet(Target):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        pyarrow.set_cpu_count(1)
        pyarrow.set_io_thread_count(1)
        self.cache = folder / "cache"
        os.environ["TORCH_FEATHER_CACHE"] = str(self.cache)
        self.root = folder / "cifar"
        self.root.mkdir(exist_ok=True)
        self.read = cifar("cifar10", "label", 10)
        (self.root / "test.parquet").write_bytes(self.seeds()[0])
        self.time = 10**18

    def seeds(self) -> list[bytes]:
        cells = [{"bytes": _png(i), "path": None} for i in range(3)]
        table = pyarrow.table({"img": cells, "label": [0, 1, 2]})
        more = pyarrow.table({"img": [*cells, *cells] * 2, "label": [*range(10), 0, 1]})
        options: list[dict] = [
            {},
            {"compression": "none"},
            {"write_page_checksum": True},
            {"use_dictionary": False, "compression": "gzip"},
            {"use_dictionary": False, "data_page_version": "2.0", "compression": "zstd"},
            {"column_encoding": {"label": "DELTA_BINARY_PACKED"}, "use_dictionary": False},
            {"compression": "none", "row_group_size": 1, "store_schema": False},
        ]
        found = []
        for one in (table, more):
            for given in options:
                stream = io.BytesIO()
                pyarrow.parquet.write_table(one, stream, **given)
                found.append(stream.getvalue())
        return found

    def check(self, content: bytes) -> bool:
        file = self.root / "train.parquet"
        file.write_bytes(content)
        self.time += 1
        os.utime(file, ns=(self.time, self.time))
        try:
            return not refused(self._read, DataError)
        finally:
            for stored in self.cache.glob("*"):
                stored.unlink()

    def _read(self) -> None:
        for pixels, labels in self.read(str(self.root)):
            assert len(pixels) == len(labels) > 0
            assert pixels.dtype == np.uint8
            assert ((labels >= 0) & (labels < 10)).all()


def _png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()
