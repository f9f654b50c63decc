"""What can go wrong around a run; each message says where, and what to do."""

from ..errors import FeatherError


class DataError(FeatherError):
    """Data that is missing, corrupt, truncated or of the wrong kind."""


class RunError(FeatherError):
    """A run directory, or a file in it, that cannot be used as asked."""


class CheckpointError(RunError):
    """A checkpoint that cannot be read, or belongs to another run."""


class TrainingDiverged(FeatherError):  # noqa: N818  (it names what happened)
    """The training loss became infinite or NaN."""


class InUse(RunError):  # noqa: N818
    """Another process is writing into this run directory."""


class Interrupted(RunError):  # noqa: N818
    """Ctrl-C or SIGTERM: a checkpoint was written, the run can be resumed."""
