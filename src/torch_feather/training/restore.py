"""Restoring a task from a checkpoint whose contents may be wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .content import (
    ContentError,
    anything,
    integer,
    items,
    mapping,
    nullable,
    number,
    record,
    require,
    same_names,
    scalar,
    tensor,
    text,
)
from .errors import CheckpointError, DamagedCheckpoint
from .optimizer import changes_its_groups
from .schemas import count, fraction, history
from .task import Task

_BEST = record(
    {
        "epoch": integer(1),
        "val_acc": fraction,
        "model": mapping(tensor),
        "thresholds": mapping(scalar),
    }
)
_RANK = record({"rng": tensor, "cuda_rng": nullable(tensor), "loss_sum": scalar})
STATE = record(
    {
        "model": mapping(anything),
        "optimizer": record(
            {
                "state": mapping(mapping(anything)),
                "param_groups": items(record({"params": items(anything)})),
            }
        ),
        "loader": record({"generator": tensor, "position": count}),
        "ranks": items(_RANK, 1),
        "step": count,
        "epoch": count,
        "images": count,
        "seconds": number(0, 1e12),
        "history": history,
        "best": nullable(_BEST),
    },
    {"method": text, "teacher": nullable(text)},
)


def restore(task: Task, state: Any) -> None:
    """Load a checkpoint into a new task, and check that the task can continue from it.

    Args:
        task: the task; after an error it must not be used.
        state: what `Task.state_dict` returned, or anything else.

    Raises:
        DamagedCheckpoint: the contents are not those of a checkpoint of this task.
        CheckpointError: the checkpoint is of another run.

    Example:
        >>> from .config import Config
        >>> from .data import load_dataset
        >>> config = Config(network="resnet8", batch_size=512)
        >>> task = Task(config, load_dataset(config.data, seed=0), torch.device("cpu"))
        >>> try:
        ...     restore(task, {"step": 3})
        ... except DamagedCheckpoint as error:
        ...     print(error)
        lacks model, optimizer, loader, ranks, epoch, images, seconds, history, best
    """
    try:
        STATE(state, "")
        _check_tensors(state["model"], task.model.state_dict(), "model")
        groups = [dict(group) for group in task.optimizer.param_groups]
        task.load_state_dict(state)
        _check_progress(task, state)
        _check_optimizer(task, groups)
        _check_best(task)
    except (CheckpointError, torch.OutOfMemoryError, MemoryError):
        raise
    except ContentError as error:
        raise DamagedCheckpoint(str(error)) from None
    except Exception as error:  # wrong contents may raise anything in the code that loads them
        first = (str(error).splitlines() or [""])[0]
        raise DamagedCheckpoint(f"{type(error).__name__}: {first}") from None


def _check_tensors(found: Mapping[str, Tensor], own: Mapping[str, Any], at: str) -> None:
    """Check names, shapes and types; `load_state_dict` would cast other types silently."""
    same_names(found, own, at)
    for name, value in own.items():
        if isinstance(value, Tensor):
            saved = found[name]
            tensor(saved, f"{at}.{name}")
            expected = f"{value.dtype} of shape {tuple(value.shape)}"
            same = (saved.dtype, saved.shape) == (value.dtype, value.shape)
            got = f"{saved.dtype} of shape {tuple(saved.shape)}"
            require(same, f"{at}.{name}", expected, got)


def _check_progress(task: Task, state: Mapping[str, Any]) -> None:
    position, batches = int(state["loader"]["position"]), len(task.loader)
    require(task.epoch <= task.config.epochs, "epoch", f"<= {task.config.epochs}", task.epoch)
    require(position <= batches, "loader.position", f"<= {batches}", position)
    step = task.epoch * batches + position
    require(task.step == step, "step", f"{step}, after {task.epoch} epochs", task.step)
    require(len(task.history) == task.epoch, "history", f"{task.epoch} lines", len(task.history))
    images = min(position * task.config.batch_size, len(task.data.train))
    require(task.images == images, "images", f"{images}, after {position} steps", task.images)


def _check_optimizer(task: Task, before: list[dict[str, Any]]) -> None:
    """Check the groups' values and the shapes of the state.

    Optimizers load both unchecked, and would fail in their next step or compute something else.
    """
    for i, (group, fresh) in enumerate(zip(task.optimizer.param_groups, before, strict=True)):
        for key in fresh.keys() - {"params", "lr", "fused"}:
            own, value = fresh[key], group.setdefault(key, fresh[key])
            numbers = type(own) in (int, float) and type(value) in (int, float)
            # Another task may change its values with time, but not their kind.
            foreign = type(task) is not Task or changes_its_groups(task.config.optimizer)
            same = foreign and numbers and math.isfinite(value)
            at = f"optimizer.param_groups[{i}].{key}"
            require(same or (type(own) is type(value) and own == value), at, repr(own), value)
    keys: set[str] | None = None
    for parameter, own in task.optimizer.state.items():
        for key, value in own.items():
            if isinstance(value, Tensor):
                fits = value.ndim == 0 or value.shape == parameter.shape
                at = f"optimizer.state.{key}"
                require(fits, at, f"of shape {tuple(parameter.shape)}", tuple(value.shape))
        present = {f"{key} ({type(value).__name__})" for key, value in own.items()}
        keys = present if keys is None else keys
        same_names(present, keys, "an entry of optimizer.state")
    known = not changes_its_groups(task.config.optimizer)
    if task.step > 0 and task.config.optimizer.momentum > 0 and known:
        require(bool(keys), "optimizer.state", "the state after a step", {})


def _check_best(task: Task) -> None:
    best = task.best
    if best is None:
        due = task.config.select == "best" and task.epoch == task.config.epochs
        require(not due, "best", "the best epoch", None)
        return
    require(best["epoch"] <= task.epoch, "best.epoch", f"<= {task.epoch}", best["epoch"])
    _check_tensors(best["model"], task.model.state_dict(), "best.model")
    names = dict(task.model.named_parameters())
    unknown = [name for name in best["thresholds"] if name not in names]
    require(not unknown, "best.thresholds", "thresholds of the model's weights", unknown)
