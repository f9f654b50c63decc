"""Errors of training runs. Each message says where the problem is and how to solve it."""

from ..errors import FeatherError
from ..errors import printable as printable


class DataError(FeatherError):
    """Data is missing, corrupt, truncated or of the wrong kind.

    Example:
        >>> from torch_feather.training.config import DataConfig
        >>> from torch_feather.training.data import load_dataset
        >>> try:
        ...     load_dataset(DataConfig("cifar10", path="DATA/absent"), seed=0)
        ... except DataError as error:
        ...     print(error)
        DATA/absent: no such folder. Set --data-path to the folder of cifar10.
    """


class RunError(FeatherError):
    """A run directory, or a file in it, cannot be used as requested.

    Example:
        >>> from torch_feather.training.checkpoint import RunDirectory
        >>> try:
        ...     RunDirectory("runs/absent").read_report()
        ... except RunError as error:
        ...     print(error)
        runs/absent: no such run directory
    """


class CheckpointError(RunError):
    """A checkpoint cannot be read, or belongs to another run.

    Example:
        >>> import tempfile
        >>> from torch_feather.training.checkpoint import RunDirectory
        >>> run = RunDirectory(tempfile.mkdtemp())
        >>> run.save({"step": 10})
        >>> _ = run.last.write_bytes(b"damaged")
        >>> try:
        ...     run.load()
        ... except CheckpointError as error:
        ...     print(error)
        /...checkpoints: no checkpoint can be used (last.pt: damaged (BadZipFile)). ...
    """


class DamagedCheckpoint(CheckpointError):  # noqa: N818
    """A checkpoint that is damaged, or whole with wrong contents; an older one may be right.

    Example:
        >>> issubclass(DamagedCheckpoint, CheckpointError)
        True
    """


class TrainingDiverged(FeatherError):  # noqa: N818  (the name describes the event)
    """The training loss became infinite or NaN.

    Example:
        >>> import tempfile
        >>> from torch_feather.training import Config, train
        >>> from torch_feather.training.config import OptimizerConfig
        >>> optimizer = OptimizerConfig(lr=1e30, clip=None)
        >>> config = Config(
        ...     network="resnet8", method="dense", epochs=1, batch_size=512, optimizer=optimizer
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:
        ...         train(config, folder)
        ...     except TrainingDiverged as error:
        ...         print(error)
        the training loss became nan in epoch 1. Try a smaller optimizer.lr or ...
    """


class InUse(RunError):  # noqa: N818
    """Another process is writing into this run directory.

    Example:
        >>> import tempfile
        >>> from torch_feather.training.checkpoint import RunDirectory
        >>> run = RunDirectory(tempfile.mkdtemp())
        >>> try:
        ...     with run.locked(), RunDirectory(run.path).locked():
        ...         pass
        ... except InUse as error:
        ...     print(error)
        /...: another process is training into this directory. Wait for it, or choose another --out.
    """


class Interrupted(RunError):  # noqa: N818
    """Ctrl-C or SIGTERM stopped the run; it can be resumed from its last checkpoint.

    Example:
        >>> import tempfile, torch
        >>> from torch_feather.training import Config
        >>> from torch_feather.training.callbacks import Callback
        >>> from torch_feather.training.checkpoint import RunDirectory
        >>> from torch_feather.training.data import load_dataset
        >>> from torch_feather.training.task import Task
        >>> config = Config(network="resnet8", sparsity=0.5, epochs=1, batch_size=512)
        >>> task = Task(config, load_dataset(config.data, seed=0), torch.device("cpu"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:
        ...         task.fit(RunDirectory(folder), Callback(), stop_requested=lambda: True)
        ...     except Interrupted as error:
        ...         print(error)
        stopped at step 1 of 3; resume with 'feather train --resume --out ...'
    """
