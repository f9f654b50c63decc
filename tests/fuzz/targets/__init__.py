"""The targets by name."""

import importlib
from pathlib import Path

from .base import Target

TARGETS = {
    "sparse": "sparse_files:SparseFiles",
    "settings": "settings:Settings",
    "runs": "run_directories:RunDirectories",
    "archives": "archives:Archives",
    "parquet": "parquet:Parquet",
    "images": "images:Images",
    "states": "states:States",
    "tuning": "tuning:Tuning",
}
# For the tests of the fuzzing itself.
OWN = {"broken": "broken:Broken", "silent": "broken:Silent", "three": "broken:Three"}


def make_target(name: str, folder: Path) -> Target:
    """Return a target.

    Args:
        name: a name of `TARGETS` or `OWN`.
        folder: an empty folder for its files.
    """
    module, _, cls = (TARGETS | OWN)[name].partition(":")
    target = getattr(importlib.import_module(f".{module}", __name__), cls)(folder)
    target.name = name
    return target
