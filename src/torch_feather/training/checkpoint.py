"""A run directory that survives: atomic files, the previous checkpoint kept, one writer at a time.

config.yaml  metrics.jsonl  checkpoints/last.pt  checkpoints/previous.pt
model.safetensors  report.json  *.png  masks/*.npy
"""

from __future__ import annotations

import errno
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..files import replace_file
from .config import Config, flatten, load_config, to_dict, to_yaml
from .errors import CheckpointError, InUse, RunError

FORMAT = 2
TWIN = "dense"  # the folder, in a run's own, of the dense run that it is compared with


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file, force it to disk, then put it in place of `path`.

    A full disk leaves the old content, a kill also the temporary file (`sweep` removes it).
    `RunError` where it cannot be written.
    """
    try:
        replace_file(path, write)
    except (OSError, RuntimeError) as error:  # torch.save wraps OSError in RuntimeError
        raise RunError(f"{path}: cannot be written ({_reason(error)}); what it held is kept") from (
            error
        )


def sweep(folder: Path) -> None:
    """Remove the temporary files of killed writers; nobody else may be writing into `folder`."""
    for temporary in folder.glob(".*.[0-9]*.tmp"):
        with suppress(OSError):
            temporary.unlink()


def _reason(error: BaseException) -> str:
    if not isinstance(error, OSError) and error.__context__ is not None:
        return _reason(error.__context__)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full: free some space, then go on with --resume"
    return str(error).splitlines()[0]


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.last = self.path / "checkpoints" / "last.pt"
        self.previous = self.path / "checkpoints" / "previous.pt"
        self.model_file = self.path / "model.safetensors"
        self.report_file = self.path / "report.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory, swept of what killed writers left.

        The lock is the kernel's, so it ends with its process, however that ends.
        `RunError` where another process holds it, or where the system has no such locks.
        """
        try:
            import fcntl
        except ImportError:
            raise RunError(
                f"{self.path}: run directories need a POSIX system (Linux, macOS, WSL)"
            ) from None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / ".lock", "a")  # noqa: SIM115
        except OSError as error:
            raise RunError(f"{self.path}: cannot be used as a run directory ({error})") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InUse(
                    f"{self.path}: another process is training into it; wait for it, "
                    "or choose another --out"
                ) from None
            sweep(self.path)
            sweep(self.last.parent)
            sweep(self.path / "masks")
            yield

    def dense_twin(self) -> RunDirectory:
        """Where the dense run goes that this one is compared with."""
        return RunDirectory(self.path / TWIN)

    def go_on(self) -> str:
        """What to do to complete this run; a dense twin is completed by the run it belongs to."""
        if self.path.name == TWIN and RunDirectory(self.path.parent).config_file.exists():
            return f"go on with 'feather train --resume --compare-dense --out {self.path.parent}'"
        return f"go on with 'feather train --resume --out {self.path}'"

    def begin(
        self, config: Config, resume: bool, warn: Callable[[str], object] = lambda message: None
    ) -> dict[str, Any] | None:
        """Check that `config` may train here; the checkpoint to go on from, if there is one.

        A run that has finished needs none.
        """
        if not self.holds_a_run():
            return None
        if not resume:
            raise RunError(
                f"{self.path}: already holds a run; continue it with --resume, "
                "or choose another --out"
            )
        if differences := changed_keys(load_config(self.config_file), config.written_out()):
            raise RunError(f"{self.path}: a resumed run keeps its settings; {differences}")
        return None if self.report_file.exists() else self.load(warn)

    def holds_a_run(self) -> bool:
        """Whether there is anything here that a new run would overwrite."""
        return any(p.exists() for p in (*self._checkpoints(), self.metrics_file, self.report_file))

    def _checkpoints(self) -> list[Path]:
        # new.pt is whole whenever it exists: a kill came between the two renames of `save`
        return [self.last.with_name("new.pt"), self.last, self.previous]

    def write_config(self, config: Config) -> None:
        """Everything that decides what the run computes."""
        text = to_yaml(config.written_out())
        write_atomically(self.config_file, lambda file: file.write(text.encode()))

    def save(self, state: dict[str, Any]) -> None:
        """Make `state` the last checkpoint, and keep the one before."""
        new = self.last.with_name("new.pt")
        new.parent.mkdir(exist_ok=True)
        write_atomically(new, lambda file: torch.save({"format": FORMAT, **state}, file))
        if self.last.exists():
            os.replace(self.last, self.previous)
        os.replace(new, self.last)

    def load(self, warn: Callable[[str], object] = lambda message: None) -> dict[str, Any] | None:
        """The newest readable checkpoint, or None where there never was one."""
        present = [path for path in self._checkpoints() if path.exists()]
        for path in present:
            try:
                with zipfile.ZipFile(path) as archive:  # torch.load does not look at checksums
                    if bad := archive.testzip():
                        raise zipfile.BadZipFile(bad)
                state = torch.load(path, map_location="cpu", weights_only=True)
                if state["format"] != FORMAT:
                    raise CheckpointError(
                        f"{path}: format {state['format']}, this version reads {FORMAT}"
                    )
            except CheckpointError:
                raise
            except Exception as error:
                # Whatever bytes do to the reader, the answer is the same: use the one before.
                damage = f"{path}: damaged ({type(error).__name__})"
                if path == present[-1]:
                    raise CheckpointError(
                        f"{damage}, and so is every other one; start anew in another --out"
                    ) from None
                warn(f"{damage}; going on from the checkpoint before it")
                path.rename(path.with_suffix(".damaged"))
                continue
            return state
        return None

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """One JSON line per epoch, and never the same epoch twice."""
        lines = "".join(json.dumps(line) + "\n" for line in history)
        write_atomically(self.metrics_file, lambda file: file.write(lines.encode()))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        try:
            return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise RunError(f"{self.metrics_file}: cannot be read ({error})") from None

    def read_report(self) -> dict[str, Any]:
        """report.json of a finished run."""
        try:
            return json.loads(self.report_file.read_text())
        except FileNotFoundError:
            raise RunError(self._unfinished()) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.report_file}: cannot be read ({error})") from None

    def read_config(self) -> Config:
        """config.yaml of a run."""
        if not self.config_file.exists():
            raise RunError(self._unfinished())
        return load_config(self.config_file)

    def _unfinished(self) -> str:
        if not self.path.is_dir():
            return f"{self.path}: no such run directory"
        if not self.config_file.exists():
            return f"{self.path}: not a run directory (no config.yaml in it)"
        return f"{self.path}: this run has not finished; {self.go_on()}"

    def save_model(self, model: torch.nn.Module) -> None:
        """model.safetensors: plain keys, plain dense layout."""
        from safetensors.torch import save

        tensors = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in model.state_dict().items()
        }
        write_atomically(self.model_file, lambda file: file.write(save(tensors)))

    def load_model(self, model: torch.nn.Module) -> None:
        """Fill `model` from model.safetensors."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self.model_file.exists():
            raise RunError(self._unfinished())
        try:
            model.load_state_dict(load_file(self.model_file))
        except (SafetensorError, RuntimeError, OSError) as error:
            first = str(error).splitlines()[0]
            raise RunError(f"{self.model_file}: damaged, or of another network ({first})") from None


def changed_keys(old: Config, new: Config) -> str:
    """What differs between two configurations, machine and place aside; empty if nothing does."""
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    return ", ".join(
        f"{key} was {before.get(key)!r}, not {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not key.startswith("system.")
        and key not in ("data.path", "recipe", "compare_dense", "track_masks")
        # A place, like data.path; the checkpoint knows which teacher it was.
        and not (key == "distillation.teacher" and before[key] and after[key])
    )
