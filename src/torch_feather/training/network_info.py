"""What a program needs to use a network: its name, its classes, and the preparation of images.

Runs, sparse files and `model.safetensors` hold it as the configuration, names of classes and shape
of an image; ONNX files hold it as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import models
from ..errors import ConfigurationError
from ..export import SparseFile
from ..export.manifest import KEY as SPARSE_KEY
from ..export.packages import import_safetensors
from .checkpoint import RunDirectory
from .config import PRETRAINED, Config, apply, to_dict, upgrade
from .data import center_crop, normalization
from .errors import RunError, printable

KEY = "torch_feather.run"  # of the metadata of model.safetensors and of ONNX files


@dataclass(frozen=True)
class NetworkInfo:
    """Facts about a trained network.

    Attributes:
        network: its name, for `models.create`.
        class_names: names of the classes, in the order of the outputs.
        input_shape: shape of an image, (C, H, W).
        mean: mean per channel, of pixels scaled to [0, 1].
        std: standard deviation per channel.
        side: length in pixels to which the shorter side of an image is scaled before the center is
            cropped to (H, W).

    Example:
        >>> results = {"classes": 10, "input_shape": [1, 8, 8]}
        >>> info = network_info(Config(network="resnet8"), results, "example")
        >>> info.class_names[3], info.mean, info.side
        ('3', (0.288,), 8)
    """

    network: str
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int

    def preprocessing(self) -> dict[str, Any]:
        """Return the preparation of images as plain values, for other programs."""
        return {
            "resize_shorter_side": self.side,
            "center_crop": list(self.input_shape[1:]),
            "scale": "to [0, 1]",
            "mean": list(self.mean),
            "std": list(self.std),
        }


def network_info(config: Config, results: Mapping[str, Any], source: object) -> NetworkInfo:
    """Return the facts about the network of a run.

    Args:
        config: its configuration.
        results: its `report.json`, or metadata with the same keys.
        source: where both are from, for messages.

    Raises:
        RunError: `results` lacks the shape of an image, as early reports do, or has wrong values.
    """
    shape, classes = results.get("input_shape"), results.get("classes")
    if shape is None or classes is None:
        raise RunError(
            f"{source}: does not hold the shape of its images, as runs of early versions. Train it "
            "again to use this command."
        )
    names = results.get("class_names") or config.data.class_names
    if names is None:
        names = [str(label) for label in range(classes)] if type(classes) is int else []
    mean, std = normalization(config.data)
    if not (
        isinstance(shape, list)
        and len(shape) == 3
        and all(type(length) is int and 1 <= length <= 10**5 for length in shape)
        and shape[0] == len(mean)
        and isinstance(names, list)
        and len(names) == classes >= 1
        and all(isinstance(name, str) for name in names)
    ):
        raise RunError(f"{source}: input_shape, classes or class_names have wrong values")
    side = shape[1]
    if config.data.name == "imagefolder":
        side = center_crop(config.data, shape[1]).side
    shape = (shape[0], shape[1], shape[2])
    return NetworkInfo(config.network, tuple(map(printable, names)), shape, mean, std, side)


def read_network_info(source: Path) -> NetworkInfo | None:
    """Return the facts about the network in a run directory or file.

    Args:
        source: a completed run; or a `.safetensors` or `.onnx` file.

    Returns:
        The facts; None if a file does not hold them.

    Raises:
        FeatherError: the source cannot be read, or has wrong values.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> metadata = info_metadata(Config(), {"classes": 10, "input_shape": [1, 8, 8]})
        >>> save_file({"weight": torch.ones(1)}, path, metadata)
        >>> read_network_info(path).network
        'resnet20'
    """
    if source.is_dir():
        run = RunDirectory(source)
        return network_info(run.read_config(), run.read_report(), source)
    found = _file_metadata(source)
    config = found.get("config")
    if not isinstance(config, Mapping):
        return None
    try:
        settings = apply(Config(), upgrade(config), str(source))
    except (ConfigurationError, AttributeError, TypeError) as error:
        raise RunError(f"{source}: its metadata has other settings than a run ({error})") from None
    return network_info(settings, found, source)


def _file_metadata(source: Path) -> Mapping[str, Any]:
    """Return the metadata of a file that this package wrote; empty for others."""
    if source.suffix == ".safetensors":
        safe_open = import_safetensors().safe_open
        try:
            with safe_open(source, framework="pt") as file:
                metadata = file.metadata() or {}
        except Exception as error:  # of a damaged file
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(f"{source}: cannot be read ({first})") from None
        if SPARSE_KEY in metadata:
            with SparseFile(source) as sparse:
                return sparse.metadata
        return _parse(metadata.get(KEY), source)
    return {}


def _parse(text: str | None, source: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{source}: its metadata {KEY} is not a JSON object")
    return found


def info_metadata(config: Config, results: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a file with the network of a run, as text by name.

    Args:
        config: the configuration of the run.
        results: its `report.json`, or at least the facts about its classes and images.

    Example:
        >>> metadata = info_metadata(Config(), {"classes": 10, "input_shape": [1, 8, 8]})
        >>> json.loads(metadata["torch_feather.run"])["classes"]
        10
    """
    return {KEY: json.dumps(info_entries(config, results))}


def info_entries(config: Config, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of metadata that `read_network_info` reads, without paths of this machine.

    Args:
        config, results: as for `info_metadata`.

    Example:
        >>> entries = info_entries(Config(init="/home/me/runs/a"), {"classes": 10})
        >>> entries["config"]["init"]
        'a'
    """
    keys = ("network", "classes", "class_names", "input_shape")
    found = {key: results[key] for key in keys if key in results}
    if "input_shape" in found:
        found["preprocessing"] = network_info(config, results, "the run").preprocessing()
    return found | {"config": to_dict(without_local_paths(config))}


def without_local_paths(config: Config) -> Config:
    """Return a configuration with names of files in place of their paths.

    Example:
        >>> without_local_paths(Config(init="/home/me/runs/a")).init
        'a'
    """
    teacher = config.distillation.teacher
    if teacher is not None and not teacher.startswith(models.TIMM):
        teacher = Path(teacher).name
    init = config.init
    return replace(
        config,
        init=init if init is None or init == PRETRAINED else Path(init).name,
        data=replace(config.data, path=None),
        distillation=replace(config.distillation, teacher=teacher),
    )
