"""The version, from the installed package's metadata."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("torch-feather")
except PackageNotFoundError:  # run from a source folder that is not installed
    __version__ = "0+unknown"
