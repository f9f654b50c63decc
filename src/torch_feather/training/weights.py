"""Weights of a trained network, read from a run directory or a file."""

from __future__ import annotations

import os
import pickle
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, FileFormatError, StateError, printable
from ..export import Entry, SparseFile, load_sparse
from ..export.fitting import fitted, load
from ..export.manifest import KEY
from ..export.reader import LIMIT
from ..files import to_path
from .checkpoint import RunDirectory
from .config import Config
from .errors import RunError


@dataclass(frozen=True)
class Weights:
    """The state dict of a trained network.

    Attributes:
        source: run directory or file.
        stored: state dict, on the CPU. None for a sparse file, which may describe tensors of any
            size, and is read when its shapes are known to be those of a network.
        network: name of the network, for `models.create`; None if the source does not contain it.

    Example:
        >>> weights = Weights(Path("a.pt"), {"weight": torch.ones(1, 2)}, network=None)
        >>> weights.fill(nn.Linear(2, 1, bias=False)).weight.tolist()
        [[1.0, 1.0]]
    """

    source: Path
    stored: Mapping[str, Tensor] | None
    network: str | None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """State dict, on the CPU.

        Raises:
            FileFormatError: a sparse file is damaged, or describes tensors of more than 4 GiB.
        """
        if self.stored is not None:
            return self.stored
        with SparseFile(self.source) as file:
            size = sum(entry.dense_bytes for entry in file.entries.values())
            if size > LIMIT:
                raise FileFormatError(
                    f"{self.source}: its tensors require {size:,} bytes of memory, more than the "
                    f"limit of {LIMIT:,}. Read it with feather.load_sparse(path, model)."
                )
            return {name: file.tensor(name) for name in file.entries}

    def check(self, model: nn.Module) -> None:
        """Raise an error if a tensor of the model is missing or has another shape.

        Args:
            model: a network, which may be on the meta device.

        Raises:
            ConfigurationError: the weights belong to another network.
        """
        given: Mapping[str, Entry | Tensor]
        if self.stored is not None:
            given = self.stored
        else:
            with SparseFile(self.source) as file:
                given = file.entries
        for name, tensor in model.state_dict().items():
            if name not in given:
                if not name.endswith("num_batches_tracked"):  # may be missing in early files
                    raise self._misfit(model, f"missing key {name}")
            elif given[name].shape != tensor.shape:
                shapes = f"{list(given[name].shape)}, in the network {list(tensor.shape)}"
                raise self._misfit(model, f"size mismatch for {name}: {shapes}")

    def fill(self, model: nn.Module) -> nn.Module:
        """Load the weights into a model. They are converted to its types as by `load_sparse`.

        Returns:
            The model.

        Raises:
            ConfigurationError: the weights belong to another network, or its types cannot hold
                them.
            FileFormatError: a sparse file is damaged.
        """
        try:
            if self.stored is None:
                load_sparse(self.source, model)
            else:
                load(model, partial(self._fitted, self.stored, model.state_dict()), self.source)
        except StateError as error:
            prefix = f"{printable(self.source)} does not fit {type(model).__name__}: "
            raise self._misfit(model, str(error).removeprefix(prefix)) from None
        return model

    @staticmethod
    def _fitted(stored: Mapping[str, Tensor], state: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the state dict in the types of a model. `load_state_dict` checks the rest."""
        names = []
        for name, value in stored.items():
            if value.layout != torch.strided or value.is_meta or value.is_quantized:
                raise StateError(f"{name:.80} has no dense values in the file")
            own = state.get(name)
            if isinstance(own, Tensor) and own.shape == value.shape:
                names.append(name)
        values = copy(stored)  # with the versions of modules, an attribute of state dicts
        values.update(fitted(state, names, stored.__getitem__))  # type: ignore[attr-defined]
        return values

    def _misfit(self, model: nn.Module, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"The weights of {printable(self.source)} do not fit {type(model).__name__}: "
            f"{printable(reason)}"
        )


def read_finished(run: RunDirectory) -> tuple[Config, dict[str, Any]]:
    """Return the configuration and the results of a finished run.

    Args:
        run: the run directory.

    Raises:
        RunError: the run is not complete, or config.yaml and report.json are of different runs.
        ConfigurationError: config.yaml cannot be read.

    Example:
        >>> import tempfile
        >>> from .checkpoint import write_json
        >>> from .schemas import example_results
        >>> run = RunDirectory(tempfile.mkdtemp())
        >>> run.write_config(Config(network="resnet8"))
        >>> write_json(run.report_file, example_results(network="resnet8"))
        >>> read_finished(run)[1]["report"]["zeros"]
        50
    """
    config, results = run.read_config(), run.read_report()
    if config.network != results["network"]:
        raise RunError(
            f"{run.config_file}: names the network {config.network!r}, but report.json "
            f"{results['network']!r}. Restore the file of this run."
        )
    return config, results


def read_weights(source: Path | str) -> Weights:
    """Read the weights of a completed run, a file of `feather export`, or any state dict.

    Args:
        source: a run directory; a `.safetensors` file, sparse or plain; or a file that `torch.save`
            wrote. The latter holds a state dict, or a checkpoint with a state dict as `model`,
            `state_dict` or `model_state_dict`.

    Raises:
        RunError: the source does not exist or cannot be read, or the run is not complete.
        FileFormatError: a sparse file is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.pt"
        >>> torch.save(nn.Linear(3, 2).state_dict(), path)
        >>> list(read_weights(path).tensors)
        ['weight', 'bias']
    """
    path = to_path(source)
    with _read_errors(path):
        status = os.stat(path) if os.path.exists(path) else None
    if status is None:
        raise RunError(f"{path}: no such run directory or file")
    if stat.S_ISDIR(status.st_mode):
        run = RunDirectory(path)
        config, _ = read_finished(run)  # raises RunError if not complete
        return Weights(path, _read_safetensors(run.model_file), config.network)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
        raise RunError(f"{path}: neither a run directory nor a regular file")
    if path.suffix != ".safetensors":
        return Weights(path, _read_pickle(path), None)
    if not _is_sparse(path):
        return Weights(path, _read_safetensors(path), None)
    with SparseFile(path) as file:
        network = file.metadata.get("network")
    if not isinstance(network, str | None):
        raise FileFormatError(f"{path}: its metadata has the network {network!r:.40}, not a name")
    return Weights(path, None, network)


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Convert all errors that the contents of a file can cause into RunError."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        if isinstance(
            error, pickle.UnpicklingError
        ):  # its message explains how to load it unsafely
            reason = "it is damaged, or holds more than tensors"
        raise RunError(
            f"{printable(path)}: cannot be read as weights ({printable(reason)}). "
            "Restore it, or name another file."
        ) from None


def _is_sparse(path: Path) -> bool:
    from safetensors import safe_open

    with _read_errors(path), safe_open(path, framework="pt") as file:
        return KEY in (file.metadata() or {})


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise RunError(f"{path}: no such file, or not a regular one. Restore it from a copy.")
    with _read_errors(path):
        return load_file(path)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with _read_errors(path):
        _require_uncompressed(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise RunError(f"{path}: holds no state dict, also not as 'model' or 'state_dict'")
    return state


def _require_uncompressed(path: Path) -> None:
    """Raise ValueError if the content needs more memory than the file; `torch.save` stores it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > path.stat().st_size:
            raise ValueError("it is compressed; write it with torch.save")
