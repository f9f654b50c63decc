"""The networks that `feather demo` shows next to each other, and their answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FeatherError
from ..measure.report import sparsity
from ..runtime.errors import RuntimeMissingError
from ..runtime.timing import alternate
from .checkpoint import RunDirectory
from .console import percent
from .data.images import decode_image
from .errors import RunError, printable
from .predict import Predictor, load_predictor

ALONE = "PyTorch, which also multiplies by zeros"
ROUNDS = 3  # timed calls of each network
PYTORCH = "the same network in PyTorch, which also multiplies by zeros"


@dataclass(frozen=True)
class DemoNetwork:
    """A network that answers.

    Attributes:
        title: what it is.
        how: by what it is computed.
        predictor: the network.

    Example:
        >>> from .predict import Predictor
        >>> from .network_info import NetworkInfo
        >>> info = NetworkInfo("example", ("dark", "light"), (1, 2, 2), (0.5,), (0.5,), 2)
        >>> DemoNetwork("Dense", "PyTorch", Predictor(nn.Flatten(), info)).title
        'Dense'
    """

    title: str
    how: str
    predictor: Predictor


class Demo:
    """Networks that answer the same image, one image at a time.

    Args:
        name: the run or file.
        networks: the networks.
        notes: sentences about them.
        threads: CPU threads of PyTorch.
        top: number of classes to name.

    Example:
        >>> import io, numpy as np
        >>> from PIL import Image
        >>> from .network_info import NetworkInfo
        >>> info = NetworkInfo("example", ("dark", "light"), (1, 2, 2), (0.5,), (0.5,), 2)
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = network[1].weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (4, 4), "white").save(file, "PNG")
        >>> demo = Demo("a", [DemoNetwork("Dense", "PyTorch", Predictor(network, info))])
        >>> demo.answer(file.getvalue())["answers"][0]["predictions"][0]["class"]
        'light'
        >>> demo.close()
    """

    def __init__(
        self,
        name: str,
        networks: list[DemoNetwork],
        notes: list[str] | None = None,
        threads: int = 1,
        top: int = 5,
    ) -> None:
        self.name, self.networks, self.notes, self.top = name, networks, notes or [], top
        # One thread for all networks: concurrent calls would disturb each other's times.
        self.worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.networks[0].predictor.info.class_names

    def answer(self, content: bytes) -> dict[str, Any]:
        """Return the answers of all networks, and their times for this image.

        Args:
            content: the bytes of an image file.

        Returns:
            `answers`: for each network `title`, `how`, `milliseconds` and `predictions`. The time
            is that of the network alone, the median of three calls.

        Raises:
            ValueError: the image cannot be decoded.
            FeatherError: it cannot be prepared, or a network returns NaN.
        """
        return self.worker.submit(self._answer, content).result()

    @torch.inference_mode()
    def _answer(self, content: bytes) -> dict[str, Any]:
        pixels = decode_image(content)
        calls: list[Callable[[], object]] = []
        found = []
        for one in self.networks:
            x: Tensor = one.predictor.prepare(pixels)
            (prediction,) = one.predictor.predict(["image"], [pixels], self.top)
            if not all(map(math.isfinite, prediction.probabilities)):
                raise RunError(f"{one.title}: the network returns NaN for this image")
            calls.append(partial(one.predictor.network, x))
            found.append({"title": one.title, "how": one.how, **prediction.to_dict()})
        times = alternate(calls, rounds=ROUNDS, burst=1)
        for entry, time in zip(found, times, strict=True):
            del entry["image"]
            entry["milliseconds"] = time
        return {"answers": found}

    def close(self) -> None:
        """End the thread of the networks after its present image."""
        self.worker.shutdown(wait=False, cancel_futures=True)


def load_demo(source: Path, *, threads: int = 1, network: str | None = None, top: int = 5) -> Demo:
    """Load the network of a run or file, compiled if possible, and what to compare it with.

    Args:
        source: a run directory, or a file of `feather export`.
        threads: CPU threads.
        network: a network of the user's own that a file may name, see `load_predictor`.
        top: number of classes to name.

    Returns:
        The networks: the compiled one if the runtime is installed, and in PyTorch the dense
        baseline of the run, or the same network.

    Raises:
        FeatherError: the source cannot be read.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from .. import models
        >>> from .network_info import NetworkInfo
        >>> info = NetworkInfo("resnet8", ("cat", "dog"), (3, 32, 32), (0.5,) * 3, (0.2,) * 3, 32)
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file(models.create("resnet8", 2).state_dict(), path, info.metadata())
        >>> demo = load_demo(path)
        >>> [one.how for one in demo.networks][-1]
        'the same network in PyTorch, which also multiplies by zeros'
        >>> demo.close()
    """
    plain = load_predictor(source, network=network)
    title, notes = "Network", []
    if isinstance(plain.network, nn.Module):
        zeros = sparsity(plain.network)
        title = "Sparse" if zeros > 0 else "Network"
        notes.append(f"{percent(zeros)} of the weights are zero.")
    baseline = _baseline(source, plain)
    networks = []
    try:
        compiled = load_predictor(source, compiled=True, threads=threads, network=network)
        networks.append(DemoNetwork(title, "compiled for this CPU", compiled))
    except RuntimeMissingError as error:
        notes.append(f"Not compiled: {error}")
    except FeatherError as error:  # of a network or processor that the runtime does not support
        notes.append(f"Not compiled: {printable(error)}")
    if baseline is not None:
        if not networks:
            networks.append(DemoNetwork(title, ALONE, plain))
        networks.append(DemoNetwork("Dense baseline", "PyTorch", baseline))
    else:
        same = "Dense computation" if networks else title
        how = PYTORCH if networks else ALONE
        how = "ONNX Runtime" if source.suffix == ".onnx" else how
        networks.append(DemoNetwork(same, how, plain))
    return Demo(printable(source), networks, notes, threads, top)


def _baseline(source: Path, sparse: Predictor) -> Predictor | None:
    """Return the dense baseline of a run that was trained with --compare-dense."""
    if not source.is_dir():
        return None
    baseline = RunDirectory(source).dense_baseline()
    if not baseline.report_file.exists():
        return None
    found = load_predictor(baseline.path)
    return found if found.info.class_names == sparse.info.class_names else None
