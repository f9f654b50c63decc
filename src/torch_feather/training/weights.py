"""Weights of a trained network, read from a run directory or a file."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..export import SparseFile
from ..export.manifest import KEY
from .checkpoint import RunDirectory
from .errors import RunError


@dataclass(frozen=True)
class Weights:
    """The state dict of a trained network.

    Attributes:
        source: run directory or file.
        tensors: state dict, on the CPU.
        network: name of the network, for `models.create`; None if the source does not contain it.
    """

    source: Path
    tensors: dict[str, Tensor]
    network: str | None

    def fill(self, model: nn.Module) -> nn.Module:
        """Load the weights into a model.

        Returns:
            The model.

        Raises:
            ConfigurationError: the weights belong to another network.
        """
        try:
            model.load_state_dict(self.tensors)
        except RuntimeError as error:
            reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
            raise ConfigurationError(
                f"The weights of {self.source} do not fit {type(model).__name__}: {reasons}"
            ) from None
        return model


def read_weights(source: Path | str) -> Weights:
    """Read the weights of a completed run, a file of `feather export`, or any state dict.

    Args:
        source: a run directory; a `.safetensors` file, sparse or plain; or a file that `torch.save`
            wrote. The latter holds a state dict, or a checkpoint with a state dict as `model` or
            `state_dict`.

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
    path = Path(source)
    if path.is_dir():
        run = RunDirectory(path)
        config, _ = run.read_finished()  # raises RunError if not complete
        return Weights(path, _read_safetensors(run.model_file), config.network)
    if not path.exists():
        raise RunError(f"{path}: no such run directory or file")
    if path.suffix != ".safetensors":
        return Weights(path, _read_pickle(path), None)
    if not _is_sparse(path):
        return Weights(path, _read_safetensors(path), None)
    with SparseFile(path) as file:
        tensors = {name: file.tensor(name, limit=None) for name in file.entries}
    return Weights(path, tensors, file.metadata.get("network"))


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
            f"{path}: cannot be read as weights ({reason}). Restore it, or name another file."
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
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise RunError(f"{path}: holds no state dict, also not as 'model' or 'state_dict'")
    return state
