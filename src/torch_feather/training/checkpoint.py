"""Run directories: atomic files, two checkpoints, one writer at a time.

config.yaml  metrics.jsonl  checkpoints/last.pt  checkpoints/previous.pt
model.safetensors  report.json  *.png  masks/*.npy
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..deprecation import renamed_names, warn_renamed
from ..errors import ConfigurationError, printable
from ..participants import remember_names
from .checkpoint_files import FORMAT, newest, set_aside, structure
from .config import Config, apply, flatten, load_config, to_dict, to_yaml, upgrade
from .content import read_json, read_json_lines
from .errors import CheckpointError, InUse, RunError
from .schemas import RESULTS, history
from .writing import remove_temporary_files, remove_unused, write_atomically, write_json

__all__ = [
    "DENSE_BASELINE",
    "RunDirectory",
    "changed_keys",
    "remove_temporary_files",
    "write_atomically",
    "write_json",
]

DENSE_BASELINE = "dense"  # folder of the dense baseline within a run directory

__getattr__ = renamed_names(__name__, {"TWIN": "DENSE_BASELINE", "sweep": "remove_temporary_files"})


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

        If the body raises before it wrote a file, a directory that was created for it is removed.
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
        created = [path for path in (self.path, *self.path.parents) if not path.exists()]
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
                if os.path.lexists(folder) and not folder.is_dir():
                    raise RunError(f"{folder}: is no folder. Move it away.")
                remove_temporary_files(folder)
            try:
                yield
            except BaseException:
                remove_unused(created, [".lock"])  # if the run did not begin
                raise

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
        return self.load(warn) if self.check(config, resume, warn) else None

    def check(self, config: Config, resume: bool, warn: Callable[[str], object] = _ignore) -> bool:
        """Check that `config` may train here, as `begin`, without reading a checkpoint.

        Returns:
            Whether the run continues from a checkpoint, if there is one.
        """
        if not self.holds_a_run():
            return False
        if not resume:
            raise RunError(
                f"{self.path}: already holds a run. Continue it with --resume, "
                "or choose another --out."
            )
        stored = self.stored_config(warn)
        if stored is not None and (differences := changed_keys(stored, config)):
            raise RunError(f"{self.path}: a resumed run keeps its settings; {differences}")
        if self.report_file.exists():
            return False
        if self.model_file.exists() and not self.present_checkpoints():
            raise RunError(
                f"{self.path}: holds {self.model_file.name} but no checkpoint and no report.json. "
                "Nothing can be resumed, and a new run would overwrite it. Choose another --out."
            )
        return True

    def holds_a_run(self) -> bool:
        """Return whether the directory holds anything that a new run would overwrite."""
        files = (self.metrics_file, self.report_file, self.model_file)
        return bool(self.present_checkpoints()) or any(os.path.lexists(file) for file in files)

    def present_checkpoints(self) -> list[Path]:
        """Return the checkpoints, the newest first."""
        return [path for path in self._checkpoints() if os.path.lexists(path)]

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
        state = {"format": FORMAT, **state}
        state["structure"] = structure(state)
        write_atomically(new, lambda file: torch.save(state, file))
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
        found = newest(self.present_checkpoints(), {})
        if found is None:
            return None
        set_aside(found.rejected, warn)
        return found.state

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl: one line of JSON per epoch."""
        lines = "".join(json.dumps(line) + "\n" for line in history)
        write_atomically(self.metrics_file, lambda file: file.write(lines.encode()))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl.

        Raises:
            RunError: the file cannot be read, or does not hold the metrics of a run.
        """
        return read_json_lines(self.metrics_file, history, self._rewrite_hint())

    def read_report(self) -> dict[str, Any]:
        """Return the content of report.json.

        Raises:
            RunError: the run has not finished, or the file cannot be read, or does not hold the
                results of a run.
        """
        if not self.path.is_dir():
            raise RunError(self._unfinished())
        try:
            return read_json(self.report_file, RESULTS, self._rewrite_hint())
        except FileNotFoundError:
            raise RunError(self._unfinished()) from None

    def read_config(self) -> Config:
        """Return the configuration of the run, from config.yaml.

        Raises:
            RunError: this is no run directory.
            ConfigurationError: the file cannot be read.
        """
        if not os.path.lexists(self.config_file):
            raise RunError(self._unfinished())
        try:
            return load_config(self.config_file)
        except ConfigurationError as error:
            remedy = "Correct the file."
            if self.present_checkpoints():
                remedy = (
                    "Correct the file; or move it away and "
                    f"{self.resume_hint()}, which restores it from the checkpoint."
                )
            raise ConfigurationError(f"{error}. {remedy}") from None

    def stored_config(self, warn: Callable[[str], object] = _ignore) -> Config | None:
        """Return the configuration from config.yaml; if it is missing, from a checkpoint.

        Args:
            warn: called with a message if config.yaml is missing.

        Returns:
            The configuration; None if neither holds it. Checkpoints of version 0.1 do not.

        Raises:
            ConfigurationError: config.yaml cannot be read.
            CheckpointError: config.yaml is missing, and no checkpoint can be read.
        """
        if os.path.lexists(self.config_file):
            return self.read_config()
        found = newest(self.present_checkpoints(), {})
        stored = found.state.get("config") if found is not None else None
        if found is None or not isinstance(stored, dict):
            return None
        warn(f"{self.config_file} is missing; its settings are taken from {found.path.name}")
        try:
            return apply(Config(), upgrade(stored), f"{found.path}: config")
        except ConfigurationError as error:
            raise CheckpointError(
                f"{error}. Write the settings of the run into {self.config_file}."
            ) from None

    def _rewrite_hint(self) -> str:
        """Return how report.json and metrics.jsonl can be written again, as sentences."""
        if self.present_checkpoints():
            return (
                f"Move report.json and metrics.jsonl away and {self.resume_hint()}: both are "
                "written again from the last checkpoint."
            )
        return "The run has no checkpoint to write it again: restore the file from a copy."

    def _unfinished(self) -> str:
        if not self.path.is_dir():
            wrong = "is a file, not a" if self.path.exists() else "no such"
            return f"{self.path}: {wrong} run directory"
        if not self.config_file.exists():
            if self.present_checkpoints():
                return f"{self.config_file}: missing; {self.resume_hint()}, which restores it"
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

        if not self.model_file.is_file():
            raise RunError(self._no_model())
        try:
            tensors = load_file(self.model_file)
            own = model.state_dict()
            other = [n for n, t in tensors.items() if n in own and t.dtype != own[n].dtype]
            if other:
                raise RuntimeError(f"the type of {other[0]} is {tensors[other[0]].dtype}")
            model.load_state_dict(tensors)
        except (SafetensorError, RuntimeError, OSError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(
                f"{self.model_file}: damaged, or not of the network in {self.config_file} "
                f"({reason}). "
                + self._rewrite_hint().replace("metrics.jsonl", self.model_file.name)
            ) from None
        remember_names(model, self.prunable())

    def prunable(self) -> list[str] | None:
        """Return the names of the weights that took part in sparse training; None if unknown."""
        try:
            return [layer["name"] for layer in self.read_report()["report"]["layers"]]
        except RunError:
            return None

    def _no_model(self) -> str:
        """Return why model.safetensors is missing, and what to do."""
        if self.report_file.exists() and self.config_file.exists():
            hint = self._rewrite_hint().replace("metrics.jsonl", "metrics.jsonl (if present)")
            return f"{self.model_file}: missing or not a regular file. {hint}"
        return self._unfinished()


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
        f"{printable(key)} was {before.get(key)!r}, not {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not key.startswith("system.")
        and key not in ("data.path", "recipe", "compare_dense", "track_masks", "automatic")
        and key not in ("data.class_names", "method_reason")  # the images are compared by class
        # A path, like data.path; the checkpoint identifies the teacher by a hash.
        and not (key == "distillation.teacher" and before[key] and after[key])
    )
