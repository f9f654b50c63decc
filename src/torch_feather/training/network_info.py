"""What a program needs to use a network: its name, its classes, and the preparation of images.

`report.json`, `model.safetensors`, sparse files and ONNX files hold it. For runs and files of
version 0.1, it follows from the configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import models
from ..errors import ConfigurationError, install_hint
from ..export import SparseFile
from ..export.manifest import KEY as SPARSE_KEY
from ..export.packages import import_safetensors
from ..import_path import is_import_path
from .checkpoint import RunDirectory
from .config import PRETRAINED, Config, apply, upgrade
from .data import Dataset, center_crop, normalization
from .errors import RunError, printable

KEY = "torch_feather.run"  # of the metadata of model.safetensors and of ONNX files


@dataclass(frozen=True)
class NetworkInfo:
    """Facts about a trained network.

    Attributes:
        network: its name, for `models.create`.
        class_names: names of the classes, in the order of the outputs.
        input_shape: shape of an image, (C, H, W); of a window of a text, (T,).
        mean: mean per channel, of pixels scaled to [0, 1].
        std: standard deviation per channel.
        side: length in pixels to which the shorter side of an image is scaled before the center is
            cropped to (H, W).
        prepared_by: the data set that prepared the images for the network itself; None if they are
            prepared as described here.
        multi_label: whether an image may have several classes; the probabilities are then those of
            a sigmoid for each class.

    Example:
        >>> results = {"classes": 10, "input_shape": [1, 8, 8]}
        >>> info = network_info(Config(network="resnet8"), results, "example")
        >>> info.class_names[3], info.mean, info.side
        ('3', (0.288,), 8)
    """

    network: str
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int
    prepared_by: str | None = None
    multi_label: bool = False

    def entries(self) -> dict[str, Any]:
        """Return the facts as plain values, as files hold them."""
        return {
            "network": self.network,
            "classes": len(self.class_names),
            "class_names": list(self.class_names),
            "input_shape": list(self.input_shape),
            **({"multi_label": True} if self.multi_label else {}),
            "preprocessing": {
                "resize_shorter_side": self.side,
                "center_crop": list(self.input_shape[1:]),
                "scale": "to [0, 1]",
                "mean": list(self.mean),
                "std": list(self.std),
                **({"prepared_by": self.prepared_by} if self.prepared_by else {}),
            },
        }

    def metadata(self) -> dict[str, str]:
        """Return the facts as the metadata of a file: texts by name."""
        return {KEY: json.dumps(self.entries())}


def network_info(config: Config, results: Mapping[str, Any], source: object) -> NetworkInfo:
    """Return the facts about the network of a run.

    Args:
        config: its configuration.
        results: its `report.json`, or metadata with the same keys.
        source: where both are from, for messages.

    Raises:
        RunError: `results` lacks the shape of an image, as early reports do, or has wrong values.

    Example:
        >>> network_info(Config(), {"classes": 10, "input_shape": [1, 8, 8]}, "example").network
        'resnet20'
    """
    shape, classes = results.get("input_shape"), results.get("classes")
    if shape is None or classes is None:
        raise RunError(
            f"{source}: does not hold the shape of its images, as runs of early versions. Train it "
            "again to use this command."
        )
    names = results.get("class_names") or config.data.class_names
    if names is None and type(classes) is int and 1 <= classes <= 10**6:
        names = [str(label) for label in range(classes)]
    channels = shape[0] if isinstance(shape, list) and shape else 3
    usable = type(channels) is int and 1 <= channels <= 10**5  # others are an error below
    mean, std = normalization(config.data, channels if usable else 3)
    length = shape[1] if isinstance(shape, list) and len(shape) > 1 else 0
    side = length or channels  # a text has no sides
    own = is_import_path(config.data.name)
    if (config.data.name == "imagefolder" or own) and type(length) is int:
        side = center_crop(config.data, length).side
    prepared = results.get("preprocessing")
    by = prepared.get("prepared_by") if isinstance(prepared, Mapping) else None
    several = results.get("multi_label") is True
    facts = (config.network, classes, names, shape, list(mean), list(std), side, by, several)
    return _checked(facts, source)


def info_of_data(config: Config, data: Dataset) -> NetworkInfo:
    """Return the facts about a network that is trained on a data set.

    Args:
        config: the configuration of the run.
        data: the data set.

    Example:
        >>> from .data import load_dataset
        >>> config = Config()
        >>> info_of_data(config, load_dataset(config.data, seed=0)).input_shape
        (1, 8, 8)
    """
    facts = {
        "classes": data.classes,
        "class_names": list(data.names),
        "input_shape": list(data.example().shape[1:]),
        "multi_label": data.multi_label,
        "preprocessing": {"prepared_by": data.name} if data.prepared else {},
    }
    return network_info(config, facts, data.name)


def _checked(values: Sequence[Any], source: object) -> NetworkInfo:
    """Return the facts if they have the right types and sizes."""
    network, classes, names, shape, mean, std, side, prepared_by, several = values
    lengths = [*shape, side] if isinstance(shape, list) else []
    numbers = [*mean, *std] if isinstance(mean, list) and isinstance(std, list) else []
    if not (
        isinstance(network, str)
        and isinstance(names, list)
        and len(names) == classes >= 1
        and all(isinstance(name, str) for name in names)
        and len(lengths) in (2, 4)
        and all(type(length) is int and 1 <= length <= 10**5 for length in lengths)
        and len(mean) == len(std) == (shape[0] if len(shape) == 3 else 0)
        and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        and all(number > 0 for number in std)
        and isinstance(prepared_by, str | None)
    ):
        raise RunError(
            f"{source}: its network, classes, class_names, input_shape or preprocessing has wrong "
            "values. Restore the file, or name another one."
        )
    names = tuple(map(printable, names))
    return NetworkInfo(
        network,
        names,
        tuple(shape),
        tuple(mean),
        tuple(std),
        side,
        prepared_by,
        several,
    )


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
        >>> info = network_info(Config(), {"classes": 10, "input_shape": [1, 8, 8]}, "example")
        >>> save_file({"weight": torch.ones(1)}, path, info.metadata())
        >>> read_network_info(path).network
        'resnet20'
    """
    if source.is_dir():
        run = RunDirectory(source)
        return network_info(run.read_config(), run.read_report(), source)
    return info_of_metadata(_file_metadata(source), source)


def info_of_metadata(found: Mapping[str, Any], source: object) -> NetworkInfo | None:
    """Return the facts in the metadata of a file; None if it does not hold them.

    Args:
        found: the metadata.
        source: the file, for messages.

    Raises:
        RunError: the metadata has wrong values.

    Example:
        >>> info_of_metadata({"what": "ones"}, "eye.safetensors") is None
        True
    """
    prepared, config = found.get("preprocessing"), found.get("config")
    if isinstance(prepared, Mapping):
        values = [found.get(key) for key in ("network", "classes", "class_names", "input_shape")]
        keys = ("mean", "std", "resize_shorter_side", "prepared_by")
        values += [*(prepared.get(key) for key in keys), found.get("multi_label") is True]
        return _checked(values, source)
    if not isinstance(config, Mapping):
        return None
    try:  # a file of version 0.1
        settings = apply(Config(), upgrade(config), str(source))
    except (ConfigurationError, AttributeError, TypeError) as error:
        raise RunError(f"{source}: its metadata has other settings than a run ({error})") from None
    return network_info(settings, found, source)


def check_trusted(network: str | None, source: Path, named: str | None) -> None:
    """Raise an error if a file names code to execute that the user did not name.

    Run directories are trusted: their config.yaml names methods and data in the same way.

    Args:
        network: the network that `source` names.
        source: a run directory or a file.
        named: the network that the user named.

    Raises:
        RunError: a file names a network by an import path, and the user did not.

    Example:
        >>> check_trusted("timm/resnet18", Path("a.safetensors"), None)
        >>> check_trusted("shutil:rmtree", Path("a.safetensors"), None)
        Traceback (most recent call last):
        torch_feather...RunError: a.safetensors: names its network by code, 'shutil:rmtree', ...
    """
    if not is_import_path(network) or source.is_dir() or network == named:
        return
    raise RunError(
        f"{printable(source)}: names its network by code, {network!r:.100}, which would be "
        "imported and executed. If you trust it, name it too: --network MODULE:FACTORY."
    )


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
    if source.suffix == ".onnx":
        return _parse(_onnx_metadata(source).get(KEY), source)
    return {}


def _onnx_metadata(source: Path) -> dict[str, str]:
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"ONNX files require onnx. {install_hint('onnx')}") from error
    try:
        model = onnx.load(source, load_external_data=False)
    except Exception as error:  # of a damaged file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{source}: cannot be read as ONNX ({first})") from None
    return {entry.key: entry.value for entry in model.metadata_props}


def _parse(text: str | None, source: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{source}: its metadata {KEY} is not a JSON object")
    return found


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
