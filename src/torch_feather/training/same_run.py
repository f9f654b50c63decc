"""Checks that a checkpoint is continued by the run that wrote it: same settings, same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConfigurationError, printable, warn
from .checkpoint import changed_keys
from .config import Config, apply, flatten, to_dict, upgrade
from .data import changed_data, identity_digest
from .errors import CheckpointError, DamagedCheckpoint, RunError


def run_identity(config: Config, data: Mapping[str, Any], batches: int) -> dict[str, Any]:
    """Return the entries of a checkpoint that identify its run.

    Args:
        config: the configuration of the run.
        data: the `data_identity` of its images.
        batches: steps per epoch.

    Example:
        >>> identity = run_identity(Config(), {}, 11)
        >>> identity["config"]["sparsity"], identity["batches"]
        (0.95, 11)
    """
    return {
        "config": flatten(to_dict(config.written_out())),
        "data": dict(data),
        "batches": batches,
    }


def check_same_run(
    state: Mapping[str, Any], config: Config, data: Mapping[str, Any], batches: int, ranks: int
) -> None:
    """Raise an error if a checkpoint is of a run with other settings or images.

    Checkpoints of version 0.1 do not hold this information. The number of processes may change:
    the batches are the same, but a warning says that the results are not bitwise identical.

    Args:
        state: the checkpoint.
        config: the configuration of the run. `system.accept_data` may accept changed images.
        data: the `data_identity` of its images.
        batches: steps per epoch.
        ranks: number of processes that train together.

    Raises:
        CheckpointError: settings or images differ; the message names them.
        DamagedCheckpoint: the settings or the identity of the images cannot be read.

    Example:
        >>> state = {**run_identity(Config(epochs=2), {}, 11), "ranks": [{}]}
        >>> check_same_run(state, Config(epochs=2), {}, 11, ranks=1)
        >>> check_same_run(state, Config(epochs=3), {}, 11, ranks=1)
        Traceback (most recent call last):
        ...
        torch_feather.training.errors.CheckpointError: ... other settings: epochs ...
    """
    if (saved := state.get("config")) is not None:
        try:
            # The initial weights are not needed any more.
            old = apply(Config(), {**upgrade(saved), "init": None}, "the checkpoint")
            differences = changed_keys(old, replace(config, init=None))
        except (ConfigurationError, AttributeError, TypeError) as error:
            raise DamagedCheckpoint(
                f"the settings in the checkpoint cannot be read: {error}"
            ) from None
        if differences:
            raise CheckpointError(
                f"the checkpoint is of a run with other settings: {differences}. Restore them in "
                "config.yaml, or start a new run in another --out."
            )
    try:
        changes = [printable(text)[:500] for text in changed_data(state.get("data", data), data)]
    except (AttributeError, TypeError):
        raise DamagedCheckpoint("the identity of the images in the checkpoint is damaged") from None
    if changes:
        differences = "; ".join(changes[:3])
        if len(changes) > 3:
            differences += f"; and {len(changes) - 3} more"
        _accept(config, differences, identity_digest(data), batches, state.get("batches"))
    if (before := len(state["ranks"])) != ranks:
        warn(
            f"The run was started with {before} processes and continues with {ranks}. It trains on "
            "the same batches, but is not bitwise identical to an uninterrupted run."
        )


def check_same_data(expected: str | None, data: Mapping[str, Any], config: Config) -> None:
    """Raise an error if a dense baseline would train on other images than its sparse run.

    Args:
        expected: the digest in report.json of the sparse run; None in version 0.1.
        data: the `data_identity` of the images now.
        config: the configuration. `system.accept_data` may accept changed images.

    Raises:
        RunError: the images have changed.

    Example:
        >>> images = {"train": {"images": 2}}
        >>> check_same_data(identity_digest(images), images, Config())
        >>> check_same_data(None, images, Config())  # a run of version 0.1
        >>> check_same_data(identity_digest({}), images, Config())
        Traceback (most recent call last):
        ...
        torch_feather.training.errors.RunError: the images have changed ...
    """
    digest = identity_digest(data)
    if expected not in (None, digest) and config.system.accept_data != digest:
        raise RunError(
            "the images have changed since the sparse run, so a dense baseline could not be "
            "compared with it. Restore them, or train on the changed images with "
            f"--set system.accept_data={digest}"
        )


def _accept(config: Config, differences: str, digest: str, batches: int, before: object) -> None:
    """Raise an error unless the user accepts the changed images, and the schedule allows it."""
    if batches != before:
        raise CheckpointError(
            f"the images have changed since the checkpoint: {differences}. An epoch has {batches} "
            f"steps now, not {printable(before)}, so the run cannot continue. Restore the images, "
            "or start a new run in another --out."
        )
    if config.system.accept_data != digest:
        raise CheckpointError(
            f"the images have changed since the checkpoint: {differences}. Restore them, or "
            f"continue on the changed images with --set system.accept_data={digest}"
        )
    warn(f"The run continues on changed images: {differences}.")
