"""Weights that another training left: of a run directory, or of a file."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..export import manifest
from ..export.sparse_file import SparseFile
from .checkpoint import RunDirectory
from .errors import RunError


@dataclass(frozen=True)
class Weights:
    """What was stored of a network.

    Attributes:
        source: where it was read.
        tensors: by name, as in `state_dict()`, on the CPU.
        network: which it is of, as `models.create` knows it; None where that is not told.
    """

    source: Path
    tensors: dict[str, Tensor]
    network: str | None

    def fill(self, model: nn.Module) -> nn.Module:
        """Put them into `model`; `ConfigurationError` where it is another network."""
        try:
            model.load_state_dict(self.tensors)
        except RuntimeError as error:
            reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
            raise ConfigurationError(
                f"the weights of {self.source} do not fit {type(model).__name__}: {reasons}"
            ) from None
        return model


def read_weights(source: Path | str) -> Weights:
    """Weights of a finished run, of a file of `feather export`, or of any state dict.

    Args:
        source: a run directory; a `.safetensors` file, sparse or plain; or what `torch.save` wrote,
            a state dict or a checkpoint that holds one as `model` or `state_dict`.

    Raises:
        RunError: it does not exist, cannot be read, or the run has not finished.
        FileFormatError: a sparse file that is damaged.
    """
    path = Path(source)
    if path.is_dir():
        run = RunDirectory(path)
        config, _ = run.read_config(), run.read_report()  # an unfinished run says so itself
        return Weights(path, _safetensors(run.model_file), config.network)
    if not path.exists():
        raise RunError(f"{path}: no such run directory or file")
    if path.suffix != ".safetensors":
        return Weights(path, _pickled(path), None)
    if not _is_sparse(path):
        return Weights(path, _safetensors(path), None)
    with SparseFile(path) as file:
        tensors = {name: file.tensor(name, limit=None) for name in file.entries}
    return Weights(path, tensors, file.metadata.get("network"))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever bytes do to a reader, the answer is the same
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # which tells how to load without care
            reason = "it is damaged, or holds more than tensors"
        raise RunError(f"{path}: cannot be read as weights ({reason})") from None


def _is_sparse(path: Path) -> bool:
    from safetensors import safe_open

    with _reading(path), safe_open(path, framework="pt") as file:
        return manifest.KEY in (file.metadata() or {})


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with _reading(path):
        return load_file(path)


def _pickled(path: Path) -> dict[str, Tensor]:
    with _reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise RunError(f"{path}: holds no state dict, also not as 'model' or 'state_dict'")
    return state
