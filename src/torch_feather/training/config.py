"""Everything that decides what a run computes, typed, validated, and written beside its results.

Values come in layers, later ones win: the defaults below, a recipe, a file, the command line.
A key is the dotted name of a field, such as `epochs` or `optimizer.lr`.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigurationError, nearest
from ..methods import method_options

DENSE = "dense"
DATASETS = ("digits", "cifar10", "cifar100", "imagefolder")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


def _choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigurationError(f"{key}: {value!r} is not one of {', '.join(known)}")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and what happens to them on the way to the network."""

    name: str = "digits"
    path: str | None = None  # folder of the files, or a tar file; digits needs none
    validation: float = 0.1  # share of the training set held out; 0: nothing is chosen
    resolution: int | None = None  # pixels a side that the network sees; null: as stored
    crop: str = "shift"  # of training images: shift, or resized (a random part, scaled)
    shift: int = 4  # shift: crop of the image padded with this many pixels
    smallest_crop: float = 0.08  # resized: the least share of the image's area
    flip: bool = True  # mirror half of the images
    # imagefolder, evaluation: the share of the shorter side that is seen; null: where training sees
    # whole images (shift) all, else 0.875
    center: float | None = None
    storage: str = "auto"  # imagefolder: memory (decoded once), stream (by workers), or auto
    drop_last: bool = False  # leave out an epoch's last, smaller batch

    @property
    def title(self) -> str:
        """What the data are called: folders of images by the folder's name."""
        if self.name == "imagefolder" and self.path is not None:
            return Path(self.path).name
        return self.name

    def __post_init__(self) -> None:
        _choice("data.name", self.name, DATASETS)
        _require(
            0 <= self.validation < 1,
            f"data.validation is a share in [0, 1), got {self.validation}",
        )
        _require(
            self.resolution is None or self.resolution >= 1,
            f"data.resolution must be at least 1, got {self.resolution}",
        )
        _choice("data.crop", self.crop, ("shift", "resized"))
        _choice("data.storage", self.storage, ("auto", "memory", "stream"))
        _require(self.shift >= 0, f"data.shift must not be negative, got {self.shift}")
        for key in ("smallest_crop", "center"):
            share = getattr(self, key)
            _require(
                share is None or 0 < share <= 1, f"data.{key} is a share in (0, 1], got {share}"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD with a learning rate that may warm up linearly and falls along a cosine, per step."""

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4  # on weights; norms and biases never decay
    clip: float | None = 3.0  # largest gradient norm; null: no clipping
    label_smoothing: float = 0.0
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optimizer.lr must be positive, got {self.lr}")
        _require(0 <= self.momentum < 1, f"optimizer.momentum is in [0, 1), got {self.momentum}")
        _require(
            not self.nesterov or self.momentum > 0, "optimizer.nesterov needs momentum above 0"
        )
        _require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay must not be negative, got {self.weight_decay}",
        )
        _require(
            self.clip is None or self.clip > 0,
            f"optimizer.clip must be positive, or null for none, got {self.clip}",
        )
        _require(
            0 <= self.label_smoothing < 1,
            f"optimizer.label_smoothing is in [0, 1), got {self.label_smoothing}",
        )
        _require(
            self.warmup_epochs >= 0,
            f"optimizer.warmup_epochs must not be negative, got {self.warmup_epochs}",
        )


@dataclass(frozen=True)
class DistillationConfig:
    """A trained network to learn from, beside the labels (Hinton et al., 2015)."""

    # a run directory; a file of weights; or timm/NAME, with the weights published for it
    teacher: str | None = None
    weight: float = 0.5  # the teacher's share in the loss; the labels have the rest
    temperature: float = 4.0  # logits are divided by it: the higher, the softer

    def __post_init__(self) -> None:
        _require(
            0 <= self.weight <= 1,
            f"distillation.weight is a share in [0, 1], got {self.weight}",
        )
        _require(
            self.temperature > 0,
            f"distillation.temperature must be positive, got {self.temperature}",
        )


@dataclass(frozen=True)
class SystemConfig:
    """Where and how fast; the one section that may differ when a run is resumed."""

    device: str = "auto"  # auto: cuda where there is one, else cpu
    threads: int | None = None  # CPU threads; null: PyTorch's choice
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = True  # faster convolutions on CPUs and with amp
    compile: bool = False  # torch.compile
    graph: bool = False  # on a GPU: whole steps replayed as one captured CUDA graph
    micro_batch: int | None = None  # images per forward pass and process; null: all of a step's
    workers: int | None = None  # processes that decode streamed images; null: one per core, up to 8
    deterministic: bool = True  # same seed, same machine, same bits
    checkpoint_seconds: float = 60.0  # at most this much work is lost when a run is killed
    checkpoint_steps: int | None = None  # and a checkpoint each so many steps
    tensorboard: bool = True  # write its event files where tensorboard is installed
    wandb: str | None = None  # Weights & Biases project to report to

    def __post_init__(self) -> None:
        for key, least in (("threads", 1), ("micro_batch", 1), ("workers", 0)):
            value = getattr(self, key)
            _require(
                value is None or value >= least,
                f"system.{key} must be at least {least}, got {value}",
            )
        _require(
            self.checkpoint_seconds >= 0,
            f"system.checkpoint_seconds must not be negative, got {self.checkpoint_seconds}",
        )
        _require(
            self.checkpoint_steps is None or self.checkpoint_steps >= 1,
            f"system.checkpoint_steps must be at least 1, got {self.checkpoint_steps}",
        )


@dataclass(frozen=True)
class Config:
    """One training run."""

    recipe: str | None = None  # where the settings came from; a name for humans
    network: str = "resnet20"  # torch_feather.models, or timm/NAME
    method: str = "feather"  # torch_feather.available_methods(), or dense
    sparsity: float = 0.95  # final share of prunable weights that are exactly zero; dense: 0
    include: list[str] | None = None  # globs of weights that take part; null: the usual choice
    exclude: list[str] | None = None  # globs of weights that do not
    init: str | None = None  # weights to start from: a run directory, or a file; null: random ones
    options: dict[str, Any] = field(default_factory=dict)  # of the method: p, theta, end, ...
    epochs: int = 160
    batch_size: int = 128
    seed: int = 0
    evaluate_every: int = 1  # epochs between two evaluations on the validation images
    select: str = "last"  # last epoch, or best: by validation, among epochs at final sparsity
    track_masks: bool = False  # keep the mask at the end of every epoch, in RUN/masks
    compare_dense: bool = False  # afterwards train the dense network with the same budget
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    system: SystemConfig = field(default_factory=SystemConfig)

    def __post_init__(self) -> None:
        if self.method == DENSE:  # its target is known, and it would be a twin of itself
            object.__setattr__(self, "sparsity", 0.0)
            object.__setattr__(self, "compare_dense", False)
        _require(
            0 <= self.sparsity < 1,
            f"sparsity is a share in [0, 1) such as 0.95, got {self.sparsity}",
        )
        for key in ("epochs", "batch_size", "evaluate_every"):
            _require(getattr(self, key) >= 1, f"{key} must be at least 1, got {getattr(self, key)}")
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _choice("select", self.select, ("last", "best"))
        _require(
            self.select == "last" or self.data.validation > 0,
            "select: best needs validation images: set data.validation above 0",
        )
        _require(
            not (self.method == DENSE and self.options),
            f"method dense has no options, got {', '.join(self.options)}",
        )

    def dense(self) -> Config:
        """The dense run of the same budget."""
        return replace(self, method=DENSE, options={})

    def written_out(self) -> Config:
        """The same, with the options that the method has by default: these may change one day."""
        usual = {} if self.method == DENSE else method_options(self.method)
        usual = {option: value for option, value in usual.items() if value is not None}
        return replace(self, options=usual | self.options)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optimizer": {"lr": 1}}` to `{"optimizer.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def known_keys(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its type, sections walked through."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from known_keys(hints[item.name], f"{item.name}.")
        else:
            yield f"{prefix}{item.name}", hints[item.name]


def apply(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """`config` with `values` (nested or dotted) laid over it.

    `where` names their source in messages. Raises `ConfigurationError` for a key that does not
    exist, naming the nearest one, and for a value of the wrong type or range.
    """
    types_of = dict(known_keys())
    changes: dict[str, Any] = {}
    for key, value in flatten(values).items():
        if key.startswith("options."):
            changes[key] = _number_like(value)
            continue
        if key not in types_of:
            raise ConfigurationError(f"{where}: unknown key {key!r}{_hint(key, types_of)}")
        if key == "options" and value in (None, {}):  # an empty mapping flattens to nothing else
            continue
        changes[key] = _convert(f"{where}: {key}", value, types_of[key])
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section:
            sections.setdefault(section, {})[name] = value
        else:
            top[key] = value
    try:
        for section, fields in sections.items():
            old = getattr(config, section)
            top[section] = old | fields if section == "options" else replace(old, **fields)
        return replace(config, **top)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None


def _hint(key: str, known: Collection[str]) -> str:
    """`nearest`, also for a key whose section is missing or another's; without one, all keys."""
    whole = {k.rpartition(".")[2]: k for k in known}
    leaf = key.rpartition(".")[2]
    hint = nearest(key, known)
    if leaf in whole or hint == ".":
        hint = re.sub("'(.+)'", lambda match: repr(whole[match[1]]), nearest(leaf, whole))
    return f"; known are {', '.join(known)}" if hint == "." else hint


def _convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type that its field declares: YAML reads 5e-4 as text and 1 as an int."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    kind = next(t for t in allowed if t is not type(None))
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if kind == list[str]:
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(one, str) for one in values):
            return values
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
             list[str]: "text, or a list of texts"}  # fmt: skip
    expected = names.get(kind, "a section with keys of its own")
    raise ConfigurationError(f"{key} must be {expected}, got {value!r}")


def _number_like(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, every field resolved."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved configuration; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f", line {line + 1}" if line is not None else ""
        raise ConfigurationError(f"{path}{place}: not valid YAML: {first}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: expected keys and values, such as 'epochs: 10'")
    return values


def load_config(path: Path) -> Config:
    """Read a configuration file alone, over the defaults."""
    return apply(Config(), read_yaml(path), str(path))


def resolve_config(
    recipe: str | None = None,
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Defaults, then the recipe, then the file, then the overrides."""
    from ..recipes import recipe_values

    config = Config()
    if recipe is not None:
        config = apply(config, recipe_values(recipe), f"recipe {recipe}")
        config = replace(config, recipe=recipe)
    if file is not None:
        config = apply(config, read_yaml(file), str(file))
    if overrides:
        config = apply(config, overrides, "command line")
    return config


def default_recipe(data: str | None) -> str:
    """The recipe for a data set where none is named; the digits where neither is."""
    return {"imagefolder": "imagenet", None: "digits"}.get(data, data or "digits")


def parse_assignments(assignments: list[str], source: str = "--set") -> dict[str, Any]:
    """`["optimizer.lr=0.05"]` to `{"optimizer.lr": 0.05}`; values are read as YAML."""
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigurationError(
                f"{source} {text!r}: write key=value, such as optimizer.lr=0.05"
            )
        # A pattern such as 2:4 or a glob such as *.mlp.*; YAML reads 124 seconds, and an alias.
        if re.fullmatch(r"\d+:\d+|\*.*", value):
            values[key.strip()] = value
            continue
        try:
            values[key.strip()] = yaml.safe_load(value) if value else None
        except yaml.YAMLError:
            raise ConfigurationError(f"{source} {text!r}: the value is not valid YAML") from None
    return values
