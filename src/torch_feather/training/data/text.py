"""Texts for language models: one file, its characters as classes, and windows as batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigurationError
from ..config import DataConfig
from ..errors import DataError, printable
from .dataset import Dataset, Text
from .epochs import Epochs, InOrder
from .regular import read_regular

TEST = 0.1  # fraction of a text, at its end, that is the test set
LARGEST = 2**28  # bytes of a text
EVALUATED = 64  # windows per batch of an evaluation


def load_text(config: DataConfig) -> Dataset:
    """Return a text, divided by position: training, then validation, then a tenth for the test.

    The division depends on no seed. The classes are the different characters of the whole text, in
    the order of their code points.

    Args:
        config: the file, the characters of a window, and the fraction of the first nine tenths that
            is held out for validation.

    Raises:
        DataError: the file is missing, not UTF-8, or too short for one window of each part.
        ConfigurationError: a setting for images alone.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "letters.txt"
        >>> _ = path.write_text("abcab" * 100)
        >>> data = load_text(DataConfig("text", str(path), length=16))
        >>> data.names, [len(part.ids) for part in (data.train, data.validation, data.test)]
        (('a', 'b', 'c'), [405, 45, 50])
    """
    for key in ("randaugment", "mixup", "cutmix"):
        if getattr(config, key):
            raise ConfigurationError(f"data.{key} is for images, but data.name is text. Remove it.")
    points = np.frombuffer(_read(config.path).encode("utf-32-le"), np.uint32)
    characters, ids = np.unique(points, return_inverse=True)
    first = len(ids) - round(TEST * len(ids))
    held_out = round(config.validation * first)
    numbers = torch.from_numpy(ids.astype(np.int64).reshape(-1))
    sizes = [first - held_out, held_out, len(ids) - first]
    train, validation, test = (Text(part, config.length) for part in numbers.split(sizes))
    too_short = not (len(train) and len(test) and (len(validation) or not held_out))
    if len(characters) < 2 or too_short:
        raise DataError(
            f"{printable(str(config.path))}: {len(ids):,} characters, {len(characters)} of them "
            f"different, are too few for windows of {config.length} in training, validation and "
            "test. Use a longer text or a smaller data.length."
        )
    # Names are printable and different: a line feed is \n, and a backslash two.
    names = tuple(repr(chr(point))[1:-1] for point in characters.tolist())
    return Dataset("text", train, validation, test, len(names), (), (), names, prepared=True)


def _read(path: str | None) -> str:
    if path is None:
        raise DataError("text requires --data-path: a text file in UTF-8")
    file = Path(path).expanduser()
    try:
        return read_regular(file, LARGEST).decode()
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8. Convert the file first"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise DataError(f"{printable(str(file))}: {problem}.")


class TextTrainLoader(Epochs):
    """Shuffled windows of a text, which begin at other characters in each epoch.

    Arguments are as for `Epochs`.

    Example:
        >>> text = Text(torch.arange(9), length=2)
        >>> data = Dataset("count", text, text, text, 9, (), (), prepared=True)
        >>> loader = TextTrainLoader(data, DataConfig(), 3, 0, torch.device("cpu"))
        >>> batch = next(iter(loader))
        >>> batch.x.shape, bool((batch.y == batch.x + 1).all())
        (torch.Size([3, 2]), True)
    """

    def __init__(
        self,
        data: Dataset,
        config: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device,
        **options: Any,
    ) -> None:
        super().__init__(data, config, batch_size, seed, device, **options)
        assert isinstance(data.train, Text)
        self.text = Text(data.train.ids.to(device), data.train.length)

    def _draw(self) -> Tensor:
        """Draw the starts of the windows: every `length` characters, from a random one on."""
        offset = torch.randint(self.text.length, (), generator=self.generator)
        order = torch.randperm(self.count, generator=self.generator)
        return (offset + self.text.length * order) % (len(self.text.ids) - self.text.length)

    def _load(self, drawn: Tensor, parts: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        starts = drawn.to(self.text.ids.device)
        for part in parts:
            yield self.text.windows(starts[part]), self.text.windows(starts[part] + 1)


class TextEvalLoader(InOrder):
    """Windows of a text in order, without overlap; arguments as for `InOrder`.

    Example:
        >>> text = Text(torch.arange(8), length=3)
        >>> data = Dataset("count", text, text, text, 9, (), (), prepared=True)
        >>> loader = TextEvalLoader(data, text, torch.device("cpu"), batch_size=1)
        >>> [(x.tolist(), y.tolist()) for x, y in loader]
        [([[0, 1, 2]], [[1, 2, 3]]), ([[3, 4, 5]], [[4, 5, 6]])]
    """

    def __init__(
        self,
        data: Dataset,
        text: Text,
        device: torch.device,
        batch_size: int = EVALUATED,
        **options: Any,
    ) -> None:
        super().__init__(data, text, device, batch_size, **options)
        self.ids = text.ids[: len(text) * text.length].view(-1, text.length).to(device)

    def _load(self) -> Iterator[Tensor]:
        yield from (self.ids[part] for part in self.parts)
