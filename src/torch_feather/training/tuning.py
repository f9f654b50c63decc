"""A search for settings such as the learning rate and theta, with Optuna.

Each trial is a training run of its own. The state of the search is a file beside them, so a search
that was stopped resumes: its unfinished trial too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from ..errors import ConfigurationError, install_hint
from ..files import replace_file
from ..methods import method_options
from .checkpoint import write_json
from .config import Config, apply, load_config, parse_assignments, to_yaml
from .config.schema import DENSE
from .distributed import Ranks
from .errors import RunError, TrainingDiverged
from .loop import chosen, train

STUDY = "feather"


@dataclass(frozen=True)
class Range:
    """Numbers between two limits; with `log`, those of equal ratios are equally likely.

    Example:
        >>> Range(0.01, 1.0, log=True)
        Range(low=0.01, high=1.0, log=True)
    """

    low: float
    high: float
    log: bool = False


Space = dict[str, Range | list[Any]]  # key of the configuration to its range, or its choices


def parse_space(texts: Sequence[str]) -> Space:
    """Parse `KEY=LOW:HIGH`, `KEY=LOW:HIGH:log` and `KEY=A,B,C`.

    Args:
        texts: such as `optimizer.lr=0.01:1:log`. Choices are YAML.

    Raises:
        ConfigurationError: a text has another form.

    Example:
        >>> parse_space(["optimizer.lr=0.01:1:log", "options.p=2,3"])
        {'optimizer.lr': Range(low=0.01, high=1.0, log=True), 'options.p': [2, 3]}
    """
    space: Space = {}
    for text in texts:
        key, _, value = text.partition("=")
        number = r"[-+.\deE]+"
        if limits := re.fullmatch(rf"({number}):({number})(:log)?", value):
            try:
                space[key] = _range(key, float(limits[1]), float(limits[2]), bool(limits[3]))
            except ValueError as error:
                raise ConfigurationError(f"--search {text}: {error}") from None
        elif key and value:
            parts = [f"{key}={part}" for part in value.split(",")]
            space[key] = [parse_assignments([part], "--search")[key] for part in parts]
        else:
            raise ConfigurationError(
                f"--search {text}: write KEY=LOW:HIGH, KEY=LOW:HIGH:log, or KEY=A,B,C, such as "
                "optimizer.lr=0.01:1:log"
            )
    return space


def _range(key: str, low: float, high: float, log: bool) -> Range:
    if not low < high or not math.isfinite(high - low):
        raise ValueError(f"the range of {key} is empty. Write the smaller limit first")
    if log and low <= 0:
        raise ValueError("a range with :log requires limits above 0")
    return Range(low, high, log)


def default_space(config: Config) -> Space:
    """Return the space for a configuration: a tenth to ten times its learning rate, and theta.

    Theta is left out if the method has no such option, or it is set in the configuration.

    Args:
        config: the configuration.

    Example:
        >>> default_space(Config(method="gmp"))
        {'optimizer.lr': Range(low=0.01, high=1.0, log=True)}
        >>> list(default_space(Config()))
        ['optimizer.lr', 'options.theta']
    """
    lr = config.optimizer.lr
    space: Space = {"optimizer.lr": Range(lr / 10, lr * 10, log=True)}
    options = {} if config.method == DENSE else method_options(config.method)
    if "theta" in options and "theta" not in config.options:
        space["options.theta"] = Range(0.0, 1.0)
    return space


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Attributes:
        number: from 0.
        values: key to value.
        accuracy: on the validation images; None if the training diverged.
        folder: the run directory.

    Example:
        >>> Trial(0, {"optimizer.lr": 0.1}, None, Path("a/trials/000")).accuracy is None
        True
    """

    number: int
    values: dict[str, Any]
    accuracy: float | None
    folder: Path


def tune(
    config: Config,
    out: Path | str,
    *,
    trials: int = 20,
    space: Space | None = None,
    minutes: float | None = None,
    on_end: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Search for the settings with the highest accuracy on the validation images.

    Call it again with the same arguments to resume, or with more trials to continue. A resumed
    search takes the trials that an uninterrupted one takes.

    Args:
        config: the settings that all trials share.
        out: folder of the search: study.log (Optuna's journal), trials/NNN (run directories),
            trials.json and best.yaml.
        trials: number of trials in all.
        space: what is searched. [default: see `default_space`]
        minutes: no trial begins after that time.
        on_end: called with each trial that ended.

    Returns:
        All trials that ended, the best one first.

    Raises:
        ConfigurationError: there are no validation images, or a key or value of the space
            is invalid.
        RunError: `out` holds a search with other settings.
        ImportError: Optuna is not installed.

    Example:
        >>> import tempfile
        >>> config = Config(network="resnet8", sparsity=0.5, epochs=1, batch_size=512)
        >>> found = tune(config, tempfile.mkdtemp(), trials=1)
        >>> list(found[0].values)
        ['optimizer.lr', 'options.theta']
    """
    if not config.data.validation:
        raise ConfigurationError(
            "A search requires validation images: chosen by test images, an accuracy on them would "
            "be too high. Set data.validation above 0."
        )
    # Settings that are chosen by the data are chosen once, and are then those of all trials.
    config = replace(chosen(config, Ranks()), compare_dense=False)
    space = default_space(config) if space is None else space
    for value in ("low", "high"):  # wrong keys and values are found before the first trial
        ends = {k: getattr(v, value) if isinstance(v, Range) else v[0] for k, v in space.items()}
        apply(config, ends, "--search")
    folder = Path(out)
    _check_same_search(folder, config, space)
    search = _Search(_import_optuna(), folder, config, space, on_end)
    end = math.inf if minutes is None else monotonic() + 60 * minutes
    while (number := search.next(trials)) is not None and monotonic() < end:
        search.run(number)
    return search.ended()


class _Search:
    """Optuna's study, and a run directory for each of its trials."""

    def __init__(
        self, optuna: Any, folder: Path, config: Config, space: Space, on_end: Callable
    ) -> None:
        self.optuna, self.folder, self.config, self.space = optuna, folder, config, space
        self.on_end = on_end
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
        self.study = optuna.create_study(
            study_name=STUDY,
            storage=optuna.storages.JournalStorage(backend),
            direction="maximize",
            load_if_exists=True,
        )

    def next(self, trials: int) -> int | None:
        """Return the number of the next trial: an unfinished one, or a new one; None at the end."""
        known = self.study.get_trials(deepcopy=False)
        for trial in known:
            if trial.state == self.optuna.trial.TrialState.RUNNING and trial.params.keys() == (
                self.space.keys()
            ):
                return trial.number
        if len([one for one in known if one.state.is_finished()]) >= trials:
            return None
        # The values depend on the trials before and the number alone, also after a resume.
        self.study.sampler = self.optuna.samplers.TPESampler(seed=self.config.seed + len(known))
        trial = self.study.ask()
        for key, values in self.space.items():
            if isinstance(values, Range):
                trial.suggest_float(key, values.low, values.high, log=values.log)
            else:
                trial.suggest_categorical(key, values)
        return trial.number

    def run(self, number: int) -> None:
        """Train a trial, from its checkpoint if there is one, and store its accuracy."""
        values = self.study.get_trials(deepcopy=False)[number].params
        config = apply(self.config, values, f"trial {number}")
        try:
            results = train(config, self._run_folder(number), resume=True)
        except TrainingDiverged:
            self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(number, results["validation_accuracy"])
        self._write()
        self.on_end(next(trial for trial in self.ended() if trial.number == number))

    def ended(self) -> list[Trial]:
        """Return the trials that ended, the best one first, diverged ones last."""
        found = [
            Trial(one.number, dict(one.params), one.value, self._run_folder(one.number))
            for one in self.study.get_trials(deepcopy=False)
            if one.state.is_finished() and one.params.keys() == self.space.keys()
        ]
        return sorted(found, key=lambda one: (one.accuracy is None, -(one.accuracy or 0.0)))

    def _run_folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:03}"

    def _write(self) -> None:
        """Write trials.json, and best.yaml for `feather train --config`."""
        trials = self.ended()
        rows = [
            {"trial": one.number, "values": one.values, "validation_accuracy": one.accuracy}
            for one in trials
        ]
        write_json(self.folder / "trials.json", rows)
        if trials and trials[0].accuracy is not None:
            best = apply(self.config, trials[0].values, "best trial")
            text = to_yaml(best).encode()
            replace_file(self.folder / "best.yaml", lambda file: file.write(text))


def _check_same_search(folder: Path, config: Config, space: Space) -> None:
    """Write the settings of a new search, or compare them with those of the one in the folder."""
    searched = {key: str(values) for key, values in space.items()}
    settings, described = folder / "config.yaml", folder / "space.json"
    if settings.exists() and described.exists():
        stored = replace(load_config(settings), system=config.system)
        if stored != config or json.loads(described.read_text()) != searched:
            raise RunError(
                f"{folder}: holds a search with other settings. Repeat its command to resume it, "
                "or choose another folder (--out)."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(settings, lambda file: file.write(to_yaml(config).encode()))
    write_json(described, searched)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"A search requires Optuna. {install_hint('tune')}") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def as_table(trials: Sequence[Trial], most: int = 10) -> str:
    """Return the best trials as lines of text.

    Args:
        trials: the best one first.
        most: number of trials that are shown.

    Example:
        >>> trial = Trial(3, {"optimizer.lr": 0.051234}, 0.9, Path("a"))
        >>> print(as_table([trial, Trial(0, {"optimizer.lr": 9.0}, None, Path("b"))]))
        trial  accuracy  optimizer.lr
            3    90.00%       0.05123
            0  diverged             9
    """
    if not trials:
        return "no trial has ended"
    keys = list(trials[0].values)
    rows = [["trial", "accuracy", *keys]]
    for one in trials[:most]:
        accuracy = "diverged" if one.accuracy is None else f"{one.accuracy:.2%}"
        rows.append([str(one.number), accuracy, *(_shown(one.values, key) for key in keys)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(lines)


def _shown(values: Mapping[str, Any], key: str) -> str:
    value = values[key]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
