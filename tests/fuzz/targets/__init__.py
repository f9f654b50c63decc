"""The targets by name."""

from .archives import Archives
from .base import Target
from .images import Images
from .parquet import Parquet
from .sparse_files import SparseFiles
from .states import States

TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (SparseFiles, Archives, Parquet, Images, States)
}
