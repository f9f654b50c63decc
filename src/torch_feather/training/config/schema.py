"""The fields of a configuration, with their defaults and limits."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...deprecation import renamed_fields
from ...errors import ConfigurationError, nearest, shorten
from ...import_path import is_import_path
from .checks import choice, finite, require, within
from .optimizer import MOST_EPOCHS, OptimizerConfig

DENSE = "dense"
AUTO = "auto"  # as in methods/choice.py, which imports PyTorch
PRETRAINED = "pretrained"  # value of `init`
LOSSES = ("cross-entropy", "binary")
DATASETS = ("digits", "cifar10", "cifar100", "imagefolder", "text")
MOST_IMAGES, MOST_PIXELS = 10**7, 10**5


def check_data_name(name: str) -> None:
    """Raise an error if no data set has this name.

    Args:
        name: the value of `--data`.

    Raises:
        ConfigurationError: the message says how to name a folder.

    Example:
        >>> try:
        ...     check_data_name("photos")
        ... except ConfigurationError as error:
        ...     print(error)
        there is no data set 'photos'. ... --data imagefolder --data-path FOLDER. ...
    """
    if name in DATASETS or is_import_path(name):
        return
    folder = "FOLDER"
    problem = f"there is no data set {shorten(name)}{nearest(name, DATASETS)}"
    if name and "\0" not in name and os.path.exists(name):
        folder = shlex.quote(name)
        kind = "folder" if os.path.isdir(name) else "file"
        problem = f"{shorten(name)} is a {kind}, not the name of a data set."
    raise ConfigurationError(
        f"{problem} There are {', '.join(DATASETS)}. For images of your own: "
        f"--data imagefolder --data-path {folder}. For a data set in Python: "
        "--data package.module:factory"
    )


@dataclass(frozen=True)
class DataConfig:
    """The data set, and how its images are prepared.

    Example:
        >>> DataConfig(name="imagefolder", path="DATA/flowers").title
        'flowers'
    """

    # digits, cifar10, cifar100, imagefolder, text, or package.module:factory
    name: str = "digits"
    # Folder of the files, a tar file, or the file of a text; not used for digits.
    path: str | None = None
    validation: float = 0.1  # fraction of the training set held out for validation; 0: none
    length: int = 128  # text: characters of a window, which the network sees at a time
    resolution: int | None = None  # height and width of the network's input; null: as stored
    crop: str = "shift"  # training crops: shift, or resized (random area and aspect ratio)
    shift: int = 4  # shift: padding in pixels before the random crop
    smallest_crop: float = 0.08  # resized: smallest crop as a fraction of the image's area
    flip: bool = True  # mirror each training image with probability 1/2
    # Center-crop fraction of the shorter side for imagefolder evaluation; null: 1.0 with
    # crop=shift, 0.875 with crop=resized.
    center: float | None = None
    # imagefolder: mean and standard deviation of each channel, of pixels scaled to [0, 1]; null:
    # those of ImageNet.
    mean: list[float] | None = None
    std: list[float] | None = None
    # Names of the classes, in the order of their labels; null: those of the data set.
    class_names: list[str] | None = None
    storage: str = "auto"  # imagefolder: memory (decoded once), stream (by workers), or auto
    drop_last: bool = False  # drop the last, smaller batch of an epoch
    randaugment: int | None = None  # magnitude of RandAugment, 0 to 30, usually 9; null: none
    mixup: float = 0.0  # alpha of Mixup, usually 0.2; 0: none. With cutmix, each batch takes one
    cutmix: float = 0.0  # alpha of CutMix, usually 1; 0: none

    @property
    def title(self) -> str:
        """Display name of the data set; for imagefolder and text the name of its path."""
        if self.name in ("imagefolder", "text") and self.path is not None:
            return Path(self.path).stem if self.name == "text" else Path(self.path).name
        if is_import_path(self.name):
            return self.name.partition(":")[2]
        return self.name

    def __post_init__(self) -> None:
        check_data_name(self.name)
        require(
            0 <= self.validation < 1,
            f"data.validation must be a fraction in [0, 1), got {self.validation}",
        )
        within("data.resolution", self.resolution, 1, MOST_PIXELS)
        within("data.length", self.length, 1, MOST_PIXELS)
        within("data.randaugment", self.randaugment, 0, 30)
        for key in ("mixup", "cutmix"):
            within(f"data.{key}", getattr(self, key), 0, 1000)
            finite(f"data.{key}", getattr(self, key))
        choice("data.crop", self.crop, ("shift", "resized"))
        choice("data.storage", self.storage, ("auto", "memory", "stream"))
        require(self.shift >= 0, f"data.shift must not be negative, got {shorten(self.shift)}")
        within("data.shift", self.shift, 0, MOST_PIXELS)
        for key in ("smallest_crop", "center"):
            fraction = getattr(self, key)
            require(
                fraction is None or 0 < fraction <= 1,
                f"data.{key} must be a fraction in (0, 1], got {fraction}",
            )
        require(
            (self.mean is None) == (self.std is None)
            and len(self.mean or ()) == len(self.std or ()),
            f"data.mean and data.std must have one number per channel, got {self.mean} and "
            f"{self.std}",
        )
        require(
            all(deviation > 0 for deviation in self.std or ()),
            f"data.std must be positive, got {self.std}",
        )
        names = self.class_names
        require(
            names is None or (len(set(names)) == len(names) > 0),
            f"data.class_names must be different names, got {names}",
        )


@dataclass(frozen=True)
class DistillationConfig:
    """Knowledge distillation from a trained teacher network (Hinton et al., 2015).

    Raises:
        ConfigurationError: a value out of range.

    Example:
        >>> DistillationConfig(teacher="runs/a/dense").temperature
        4.0
    """

    # A run directory, a file of weights, or timm/NAME with its published weights.
    teacher: str | None = None
    weight: float = 0.5  # weight of the teacher's loss; 1 - weight is that of the labels' loss
    temperature: float = 4.0  # divides the logits of teacher and student

    def __post_init__(self) -> None:
        require(
            0 <= self.weight <= 1,
            f"distillation.weight must be in [0, 1], got {self.weight}",
        )
        require(
            self.temperature > 0,
            f"distillation.temperature must be positive, got {self.temperature}",
        )
        finite("distillation.temperature", self.temperature)


@renamed_fields(graph="cuda_graph")
@dataclass(frozen=True)
class SystemConfig:
    """Device, speed and logging. Only these settings may change when a run is resumed.

    Raises:
        ConfigurationError: a value out of range.

    Example:
        >>> SystemConfig(device="cpu", threads=2).deterministic
        True
    """

    device: str = "auto"  # auto: cuda if available, otherwise cpu
    threads: int | None = None  # CPU threads; null: PyTorch's default
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = True  # memory format; faster convolutions on CPUs and with amp
    compile: bool = False  # torch.compile
    cuda_graph: bool = False  # replay each training step as one CUDA graph
    micro_batch: int | None = None  # images per forward pass and process; null: the whole batch
    workers: int | None = None  # processes that decode streamed images; null: 1 per core, at most 8
    deterministic: bool = True  # bitwise identical results for the same seed and machine
    checkpoint_seconds: float = 60.0  # time between two checkpoints
    checkpoint_steps: int | None = None  # also write a checkpoint every so many steps
    # Ctrl-C, SIGTERM: how long to wait for the end of the step, after which a checkpoint is
    # written. A longer step is abandoned; the run then resumes from the checkpoint before it.
    stop_seconds: float = 20.0
    # A resumed run continues on changed images if this is their digest, which the error names.
    accept_data: str | None = None
    tensorboard: bool = True  # log to TensorBoard if it is installed
    csv: bool = False  # write RUN/metrics.csv
    wandb: str | None = None  # Weights & Biases project to log to
    mlflow: str | None = None  # MLflow experiment to log to
    loggers: list[str] | None = None  # loggers of your own, package.module:Class

    def __post_init__(self) -> None:
        within("system.threads", self.threads, 1, 4096)
        within("system.micro_batch", self.micro_batch, 1, MOST_IMAGES)
        within("system.workers", self.workers, 0, 4096)
        within("system.checkpoint_steps", self.checkpoint_steps, 1, 2**53)
        within("system.stop_seconds", self.stop_seconds, 0, 86_400)
        require(
            self.checkpoint_seconds >= 0,
            f"system.checkpoint_seconds must not be negative, got {self.checkpoint_seconds}",
        )


@dataclass(frozen=True)
class Config:
    """The configuration of one training run.

    Raises:
        ConfigurationError: a value out of range, or values that exclude each other.

    Example:
        >>> config = Config(sparsity=0.9, epochs=10)
        >>> config.method, config.optimizer.lr
        ('feather', 0.1)
    """

    recipe: str | None = None  # name of the recipe that the settings started from; for reference
    # A name in torch_feather.models, timm/NAME, or package.module:factory.
    network: str = "resnet20"
    # See `feather methods`; package.module:factory; dense; or auto, which chooses when the training
    # starts.
    method: str = "feather"
    method_reason: str | None = None  # what auto chose, and why; written when it chooses
    sparsity: float = 0.95  # final fraction of prunable weights that are zero; dense: 0
    include: list[str] | None = None  # name patterns of prunable weights; null: the default choice
    exclude: list[str] | None = None  # name patterns of weights that stay dense
    # Initial weights: a run directory or a file; pretrained: those of timm; null: random.
    init: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the method, such as p or theta
    # cross-entropy; binary, for several labels per image; or package.module:function.
    loss: str = "cross-entropy"
    epochs: int = 160
    batch_size: int = 128
    seed: int = 0
    evaluate_every: int = 1  # epochs between two evaluations during training
    select: str = "last"  # last epoch; or best: by validation, among epochs at the final sparsity
    track_masks: bool = False  # store the mask after each epoch in RUN/masks
    compare_dense: bool = False  # then train a dense baseline with the same training budget
    # Keys whose values are chosen when the training starts, see the recipe finetune.
    automatic: list[str] | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    system: SystemConfig = field(default_factory=SystemConfig)

    def __post_init__(self) -> None:
        if self.method == DENSE:  # a dense run has a fixed target and needs no dense baseline
            object.__setattr__(self, "sparsity", 0.0)
            object.__setattr__(self, "compare_dense", False)
        require(
            0 <= self.sparsity < 1,
            f"sparsity must be a fraction in [0, 1), such as 0.95; got {self.sparsity}",
        )
        within("epochs", self.epochs, 1, MOST_EPOCHS)
        within("batch_size", self.batch_size, 1, MOST_IMAGES)
        within("evaluate_every", self.evaluate_every, 1, 2**53)
        require(self.seed >= 0, f"seed must not be negative, got {shorten(self.seed)}")
        within("seed", self.seed, 0, 2**63 - 1)
        choice("select", self.select, ("last", "best"))
        if not is_import_path(self.loss):
            choice("loss", self.loss, LOSSES, "package.module:function")
        require(
            self.distillation.teacher is None or self.loss == "cross-entropy",
            f"distillation.teacher requires loss=cross-entropy, got {self.loss}",
        )
        mixed = self.data.mixup or self.data.cutmix
        require(
            not mixed or not is_import_path(self.loss),
            "data.mixup and data.cutmix require loss=cross-entropy or binary",
        )
        require(
            self.select == "last" or self.data.validation > 0,
            "select=best requires validation images. Set data.validation above 0.",
        )
        require(
            not (self.method == DENSE and self.options),
            f"method dense has no options, got {', '.join(self.options)}",
        )
        require(
            not (self.method == AUTO and self.options),
            f"method auto chooses the options too, got {', '.join(self.options)}. Name the method "
            "that they belong to, such as method=feather, or leave them out",
        )

    def dense(self) -> Config:
        """Return the configuration of the dense baseline: the same training budget, no sparsity.

        Example:
            >>> Config(epochs=10).dense().method
            'dense'
        """
        return replace(self, method=DENSE, options={}, method_reason=None)

    def written_out(self) -> Config:
        """Return this configuration with the method's default options filled in.

        A stored configuration must not change its meaning when a later version changes a default.
        Defaults that a file cannot hold, such as objects, are left out.

        Raises:
            ConfigurationError: the method is not known or cannot be imported.

        Example:
            >>> Config(method="st3").written_out().options
            {'allocation': 'global', 'schedule': 'cubic', 'begin': 0}
        """
        from ...methods import method_options, unused_options  # imports PyTorch

        defaults = {} if self.method in (AUTO, DENSE) else method_options(self.method)
        defaults = {option: value for option, value in defaults.items() if _is_plain(value)}
        unused = unused_options(self.method, self.options)
        options = defaults | self.options
        return replace(self, options={o: v for o, v in options.items() if o not in unused})


def _is_plain(value: Any) -> bool:
    """Whether a YAML file can hold `value`; None is left out because it means the default."""
    return isinstance(value, bool | int | float | str)
