"""Files that together hold one part of a data set."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import DataError, printable

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")


def complete_shards(folder: Path, part: str, suffix: str) -> list[Path]:
    """Return the files `PART*.SUFFIX` of a folder, in the order of their names.

    Args:
        folder: where to look.
        part: start of their names.
        suffix: end of their names, such as `tar`.

    Raises:
        DataError: according to their names (`-of-N`), files are missing; or some are compressed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("train-1-of-2.tar", "train-0-of-2.tar", "val.tar"):
        ...         Path(folder, name).touch()
        ...     [file.name for file in complete_shards(Path(folder), "train", "tar")]
        ['train-0-of-2.tar', 'train-1-of-2.tar']
    """
    files = sorted(folder.glob(f"{part}*.{suffix}"))
    for file in files:
        numbered = re.search(rf"-of-(\d{{1,9}})\.{suffix}$", file.name)
        if numbered and int(numbered.group(1)) != len(files):
            raise DataError(
                f"{printable(folder)}: has {len(files)} of {int(numbered.group(1))} {part} files, "
                f"according to {printable(file.name)}. Download the missing files."
            )
    for file in sorted(folder.glob(f"{part}*")):
        if file.name.endswith((".tgz", *(f".{suffix}{end}" for end in COMPRESSED))):
            raise DataError(f"{printable(file)}: is compressed. Unpack it, or move it elsewhere.")
    return files
