"""Run directories: atomic files, two checkpoints, one writer at a time.

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
from ..participants import remember_names
from .config import Config, flatten, load_config, to_dict, to_yaml
from .deprecation import renamed_names, warn_renamed
from .errors import CheckpointError, InUse, RunError

FORMAT = 2
DENSE_BASELINE = "dense"  # folder of the dense baseline within a run directory

__getattr__ = renamed_names(__name__, {"TWIN": "DENSE_BASELINE", "sweep": "remove_temporary_files"})


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file, force it to disk, then move it to `path`.

    If the disk is full, `path` keeps its old content. If the process is killed, the temporary file
    remains too; `remove_temporary_files` deletes it.

    Args:
        path: the file to replace or create.
        write: writes the new content into a binary file.

    Raises:
        RunError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_atomically(path, lambda file: file.write(b"95%"))
        >>> path.read_text()
        '95%'
    """
    try:
        replace_file(path, write)
    except (OSError, RuntimeError) as error:  # torch.save wraps OSError in RuntimeError
        raise RunError(
            f"{path}: cannot be written ({_reason(error)}); its old content is kept"
        ) from error


def remove_temporary_files(folder: Path) -> None:
    """Delete the temporary files of killed writers. No other process may write into `folder`.

    Args:
        folder: the folder; its subfolders stay as they are.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / ".report.json.1234.tmp").touch()
        >>> (folder / "report.json").touch()
        >>> remove_temporary_files(folder)
        >>> [file.name for file in folder.iterdir()]
        ['report.json']
    """
    for temporary in folder.glob(".*.[0-9]*.tmp"):
        with suppress(OSError):
            temporary.unlink()


def _reason(error: BaseException) -> str:
    if not isinstance(error, OSError) and error.__context__ is not None:
        return _reason(error.__context__)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full: free some space, then continue with --resume"
    return str(error).splitlines()[0]


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Args:
        path: the file to replace or create.
        value: nested dicts, lists, texts, numbers, booleans and None.

    Raises:
        RunError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.json"
        >>> write_json(path, {"sparsity": 0.95})
        >>> print(path.read_text())
        {
          "sparsity": 0.95
        }
    """
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _ignore(message: str) -> None:
    """Do nothing with a message."""


class RunDirectory:
    """The files of one run.

    Args:
        path: the directory; it need not exist.

    Example:
        >>> run = RunDirectory("runs/a")
        >>> run.report_file.as_posix(), run.dense_baseline().path.as_posix()
        ('runs/a/report.json', 'runs/a/dense')
    """

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
        """Lock the directory, and delete what killed writers left in it.

        The kernel holds the lock, so it ends with its process, however the process ends.

        Raises:
            InUse: another process holds the lock.
            RunError: the system has no such locks, or the directory cannot be created.
        """
        try:
            import fcntl
        except ImportError:
            raise RunError(
                f"{self.path}: run directories require a POSIX system (Linux, macOS, WSL)"
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
                    f"{self.path}: another process is training into this directory. Wait for it, "
                    "or choose another --out."
                ) from None
            for folder in (self.path, self.last.parent, self.path / "masks"):
                remove_temporary_files(folder)
            yield

    def dense_baseline(self) -> RunDirectory:
        """Return the directory of the dense baseline of this run."""
        return RunDirectory(self.path / DENSE_BASELINE)

    def dense_twin(self) -> RunDirectory:
        """Return `dense_baseline()`. Deprecated."""
        warn_renamed("RunDirectory.dense_twin", "dense_baseline")
        return self.dense_baseline()

    def resume_hint(self) -> str:
        """Return how to complete this run, as the end of a sentence.

        A dense baseline is completed by the run that it belongs to.

        Example:
            >>> RunDirectory("runs/a").resume_hint()
            "resume with 'feather train --resume --out runs/a'"
        """
        if self.path.name == DENSE_BASELINE and RunDirectory(self.path.parent).config_file.exists():
            return f"resume with 'feather train --resume --compare-dense --out {self.path.parent}'"
        return f"resume with 'feather train --resume --out {self.path}'"

    def go_on(self) -> str:
        """Return `resume_hint()`. Deprecated."""
        warn_renamed("RunDirectory.go_on", "resume_hint")
        return self.resume_hint()

    def begin(
        self, config: Config, resume: bool, warn: Callable[[str], object] = _ignore
    ) -> dict[str, Any] | None:
        """Check that `config` may train here, and load the checkpoint to resume from.

        Args:
            config: the configuration of the run.
            resume: whether the directory may hold a run already.
            warn: called with a message for each damaged checkpoint.

        Returns:
            The checkpoint; None if there is none, or if the run has finished.

        Raises:
            RunError: the directory holds a run and `resume` is false, or the run has other
                settings.
            CheckpointError: no checkpoint can be read.
        """
        if not self.holds_a_run():
            return None
        if not resume:
            raise RunError(
                f"{self.path}: already holds a run. Continue it with --resume, "
                "or choose another --out."
            )
        if differences := changed_keys(load_config(self.config_file), config):
            raise RunError(f"{self.path}: a resumed run keeps its settings; {differences}")
        return None if self.report_file.exists() else self.load(warn)

    def holds_a_run(self) -> bool:
        """Return whether the directory holds anything that a new run would overwrite."""
        return any(p.exists() for p in (*self._checkpoints(), self.metrics_file, self.report_file))

    def _checkpoints(self) -> list[Path]:
        # new.pt is complete if it exists: the process was killed between the renames of `save`.
        return [self.last.with_name("new.pt"), self.last, self.previous]

    def write_config(self, config: Config) -> None:
        """Write config.yaml, with the method's default options filled in."""
        text = to_yaml(config.written_out())
        write_atomically(self.config_file, lambda file: file.write(text.encode()))

    def save(self, state: dict[str, Any]) -> None:
        """Store `state` as the last checkpoint, and keep the one before it."""
        new = self.last.with_name("new.pt")
        new.parent.mkdir(exist_ok=True)
        write_atomically(new, lambda file: torch.save({"format": FORMAT, **state}, file))
        if self.last.exists():
            os.replace(self.last, self.previous)
        os.replace(new, self.last)

    def load(self, warn: Callable[[str], object] = _ignore) -> dict[str, Any] | None:
        """Return the newest readable checkpoint; None if there is none.

        Args:
            warn: called with a message for each damaged checkpoint.

        Raises:
            CheckpointError: all checkpoints are damaged, or one has an unknown format.
        """
        present = [path for path in self._checkpoints() if path.exists()]
        for path in present:
            try:
                with zipfile.ZipFile(path) as archive:  # torch.load does not verify checksums
                    if bad := archive.testzip():
                        raise zipfile.BadZipFile(bad)
                state = torch.load(path, map_location="cpu", weights_only=True)
                if state["format"] != FORMAT:
                    raise CheckpointError(
                        f"{path}: has format {state['format']}, but this version reads {FORMAT}"
                    )
            except CheckpointError:
                raise
            except Exception as error:  # damaged bytes may raise anything
                damage = f"{path}: damaged ({type(error).__name__})"
                if path == present[-1]:
                    raise CheckpointError(
                        f"{damage}, as are all other checkpoints. Start again in another --out."
                    ) from None
                warn(f"{damage}; resuming from the checkpoint before it")
                path.rename(path.with_suffix(".damaged"))
                continue
            return state
        return None

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl: one line of JSON per epoch."""
        lines = "".join(json.dumps(line) + "\n" for line in history)
        write_atomically(self.metrics_file, lambda file: file.write(lines.encode()))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl.

        Raises:
            RunError: the file cannot be read.
        """
        try:
            return [json.loads(line) for line in self.metrics_file.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise RunError(f"{self.metrics_file}: cannot be read ({error})") from None

    def read_report(self) -> dict[str, Any]:
        """Return the content of report.json.

        Raises:
            RunError: the run has not finished, or the file cannot be read.
        """
        try:
            return json.loads(self.report_file.read_text())
        except FileNotFoundError:
            raise RunError(self._unfinished()) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.report_file}: cannot be read ({error})") from None

    def read_config(self) -> Config:
        """Return the configuration of the run, from config.yaml.

        Raises:
            RunError: this is no run directory.
            ConfigurationError: the file cannot be read.
        """
        if not self.config_file.exists():
            raise RunError(self._unfinished())
        return load_config(self.config_file)

    def _unfinished(self) -> str:
        if not self.path.is_dir():
            return f"{self.path}: no such run directory"
        if not self.config_file.exists():
            return f"{self.path}: not a run directory (no config.yaml in it)"
        return f"{self.path}: this run has not finished; {self.resume_hint()}"

    def save_model(self, model: torch.nn.Module, metadata: dict[str, str] | None = None) -> None:
        """Write model.safetensors: the state dict with plain keys and dense tensors.

        Args:
            model: the network.
            metadata: texts to store in the header of the file.
        """
        from safetensors.torch import save

        tensors = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in model.state_dict().items()
        }
        write_atomically(self.model_file, lambda file: file.write(save(tensors, metadata)))

    def load_model(self, model: torch.nn.Module) -> None:
        """Load model.safetensors into `model`.

        Raises:
            RunError: the run has not finished, or the file is damaged or of another network.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self.model_file.exists():
            raise RunError(self._unfinished())
        try:
            model.load_state_dict(load_file(self.model_file))
        except (SafetensorError, RuntimeError, OSError) as error:
            first = str(error).splitlines()[0]
            raise RunError(f"{self.model_file}: damaged, or of another network ({first})") from None
        remember_names(model, self.prunable())

    def prunable(self) -> list[str] | None:
        """Return the names of the weights that took part in sparse training; None if unknown."""
        try:
            return [layer["name"] for layer in self.read_report()["report"]["layers"]]
        except (RunError, LookupError, TypeError):
            return None


def changed_keys(old: Config, new: Config) -> str:
    """Return the settings that differ and change the results, as text; empty if none differ.

    The machine, paths and the name of the recipe are ignored. Options that `old` does not name
    have their defaults: version 0.1 did not know them.

    Args:
        old: the stored configuration.
        new: the configuration to train with.

    Example:
        >>> changed_keys(Config(epochs=3), Config(epochs=5))
        'epochs was 3, not 5'
    """
    before, after = (flatten(to_dict(config.written_out())) for config in (old, new))
    return ", ".join(
        f"{key} was {before.get(key)!r}, not {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not key.startswith("system.")
        and key not in ("data.path", "recipe", "compare_dense", "track_masks", "automatic")
        and key != "data.class_names"  # the images are compared by class
        # A path, like data.path; the checkpoint identifies the teacher by a hash.
        and not (key == "distillation.teacher" and before[key] and after[key])
    )
