"""Loggers: CSV files, TensorBoard, Weights & Biases, MLflow, and loggers of your own.

Their packages are not imported unless they are used. A run continues if logging fails.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

from ...deprecation import renamed_names
from ...errors import ConfigurationError, install_hint
from ...import_path import import_object, is_import_path
from ..callbacks import Callback
from ..config import Config
from .base import LoggedRun, Logger
from .callback import LoggerCallback
from .csv_file import CSVLogger
from .mlflow import MLflowLogger
from .tensorboard import TensorBoardLogger
from .wandb import WandbLogger

__all__ = [
    "CSVLogger",
    "LoggedRun",
    "Logger",
    "LoggerCallback",
    "MLflowLogger",
    "TensorBoardCallback",
    "TensorBoardLogger",
    "WandbCallback",
    "WandbLogger",
    "logging_callbacks",
]

__getattr__ = renamed_names(
    __name__,
    {
        "observers": "logging_callbacks",
        "TensorBoardWatch": "TensorBoardCallback",
        "WandbWatch": "WandbCallback",
    },
)


class TensorBoardCallback(LoggerCallback):
    """Writes the numbers of each epoch as scalars into event files in RUN/tensorboard.

    Example:
        >>> TensorBoardCallback().name
        'TensorBoardLogger'
    """

    def __init__(self) -> None:
        super().__init__(TensorBoardLogger)


class WandbCallback(LoggerCallback):
    """Logs the settings, the numbers of each epoch and the results to Weights & Biases.

    Args:
        project: the project to log to.

    Example:
        >>> WandbCallback("digits").project
        'digits'
    """

    def __init__(self, project: str) -> None:
        super().__init__(partial(WandbLogger, project), "WandbLogger")
        self.project = project


def logging_callbacks(config: Config) -> list[Callback]:
    """Return the callbacks that `config.system` requests.

    Args:
        config: the configuration of the run.

    Raises:
        ConfigurationError: a package is not installed, or a logger of the user cannot be imported
            or is no `Logger`.

    Example:
        >>> from ..config import SystemConfig
        >>> system = SystemConfig(tensorboard=False, csv=True)
        >>> [callback.name for callback in logging_callbacks(Config(system=system))]
        ['CSVLogger']
    """
    system = config.system
    found: list[Callback] = []
    if system.csv:
        found.append(LoggerCallback(CSVLogger))
    if system.tensorboard and find_spec("tensorboard") is not None:
        found.append(TensorBoardCallback())
    if system.wandb is not None:
        _require("wandb")
        found.append(WandbCallback(system.wandb))
    if system.mlflow is not None:
        _require("mlflow")
        found.append(LoggerCallback(partial(MLflowLogger, system.mlflow), "MLflowLogger"))
    for path in system.loggers or ():
        found.append(LoggerCallback(_own_logger(path), path))
    return found


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ConfigurationError(
            f"system.{package} is set, but {package} is not installed. Remove the setting, or "
            f"install it. {install_hint('logging')}"
        )


def _own_logger(path: str) -> type[Logger]:
    if not is_import_path(path):
        raise ConfigurationError(f"system.loggers: {path!r} must be package.module:Class")
    found = import_object(path, "Logger")
    if not (isinstance(found, type) and issubclass(found, Logger)):
        raise ConfigurationError(
            f"Logger {path!r} must be a subclass of torch_feather.training.Logger"
        )
    return found
