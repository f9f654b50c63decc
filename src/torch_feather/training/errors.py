"""Errors of training runs. Each message says where the problem is and how to solve it."""

from ..errors import FeatherError


def printable(text: object) -> str:
    """Return the text of a path or name for messages: one line, without control characters.

    Example:
        >>> printable("a" + chr(10) + "b" + chr(0xDC80))
        'a\\\\nb\\\\udc80'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class DataError(FeatherError):
    """Data is missing, corrupt, truncated or of the wrong kind."""


class RunError(FeatherError):
    """A run directory, or a file in it, cannot be used as requested."""


class CheckpointError(RunError):
    """A checkpoint cannot be read, or belongs to another run."""


class DamagedCheckpoint(CheckpointError):  # noqa: N818
    """A checkpoint that is damaged, or whole with wrong contents; an older one may be right."""


class TrainingDiverged(FeatherError):  # noqa: N818  (the name describes the event)
    """The training loss became infinite or NaN."""


class InUse(RunError):  # noqa: N818
    """Another process is writing into this run directory."""


class Interrupted(RunError):  # noqa: N818
    """Ctrl-C or SIGTERM stopped the run; it can be resumed from its last checkpoint."""
