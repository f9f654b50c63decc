"""The targets by name."""

from .archives import Archives
from .base import Target
from .images import Images
from .parquet import Parquet
from .run_directories import RunDirectories
from .settings import Settings
from .sparse_files import SparseFiles
from .states import States

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (SparseFiles, Settings, RunDirectories, Archives, Parquet, Images, States)
}
