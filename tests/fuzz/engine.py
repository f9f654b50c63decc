"""One process that feeds inputs to the targets, guided by the lines that they reach."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from types import CodeType, FrameType, TracebackType
from typing import Any

from .limits import ExceededError, Limits, release_memory
from .targets import make_target
from .targets.base import Target

TURN = 1.0  # seconds of processor time until the next target
TRACED = 0.25  # fraction of inputs whose lines are recorded
CORPUS = 400  # inputs that are kept for each target


class Coverage:
    """The pairs of successive lines that inputs reached in some packages."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.parts = tuple(f"/{package}/" for package in packages)
        self.wanted: dict[CodeType, bool] = {}
        self.known: set[tuple[int, int, int]] = set()
        self.current: set[tuple[int, int, int]] = set()

    def start(self) -> None:
        """Record until `stop`."""
        self.current = set()
        sys.settrace(self._call)

    def stop(self) -> bool:
        """Return whether lines were reached that no input reached before."""
        sys.settrace(None)
        new = not self.current <= self.known
        self.known |= self.current
        return new

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        wanted = self.wanted.get(code)
        if wanted is None:
            wanted = any(part in code.co_filename for part in self.parts)
            self.wanted[code] = wanted
        if not wanted:
            return None
        number, previous = id(code), 0

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal previous
            if event == "line":
                self.current.add((number, previous, frame.f_lineno))
                previous = frame.f_lineno
            return line

        return line


class Fuzzer:
    """Inputs of one target.

    Args:
        target: the target.
        folder: corpus and findings; what is there is used again.
        rng: source of all randomness.
        limits: bounds of one input.
    """

    def __init__(self, target: Target, folder: Path, rng: Random, limits: Limits) -> None:
        self.target, self.rng, self.limits = target, rng, limits
        self.corpus_folder = folder / "corpus" / target.name
        self.findings = folder / "findings" / target.name
        for made in (self.corpus_folder, self.findings):
            made.mkdir(parents=True, exist_ok=True)
        self.coverage = Coverage(target.traced)
        self.counts = {"inputs": 0, "accepted": 0, "findings": 0}
        self.seconds = 0.0
        self.current = folder / f"current-{target.name}"
        self.corpus: list[bytes] = []

    def load(self) -> None:
        """Run the seeds and the corpus of earlier runs."""
        seeds = self.target.seeds()
        for content in seeds:  # imports and caches are not counted as memory of an input
            with contextlib.suppress(Exception):
                self.target.check(content)
        stored = [file.read_bytes() for file in sorted(self.corpus_folder.iterdir())]
        for content in [*seeds, *stored]:
            self.run(content, trace=True)
            self.corpus.append(content)

    def turn(self, until: float) -> None:
        """Run changed inputs for a turn, and not beyond a time."""
        start = time.process_time()
        while time.process_time() - start < TURN and time.monotonic() < until:
            content = self.target.mutate(self.rng, self.rng.choice(self.corpus), self.corpus)
            if self.run(content, trace=self.rng.random() < TRACED):
                self._keep(content)
        self.seconds += time.process_time() - start

    def _keep(self, content: bytes) -> None:
        self.corpus.append(content)
        files = sorted(self.corpus_folder.iterdir(), key=lambda file: file.stat().st_mtime)
        for old in files[: max(0, len(files) - CORPUS)]:
            old.unlink()
        (self.corpus_folder / digest(content)).write_bytes(content)

    def run(self, content: bytes, trace: bool = False) -> bool:
        """Run one input; return whether it reached new lines."""
        self.current.write_bytes(content)  # it is a finding if the process ends
        self.counts["inputs"] += 1
        new = False
        error = attempt(self.target, content, self.limits, self.coverage if trace else None)
        if trace:
            new = self.coverage.stop()
        if isinstance(error, BaseException):
            self.counts["findings"] += 1
            self._save(content, error)
        else:
            self.counts["accepted"] += error
        return new

    def _save(self, content: bytes, error: BaseException) -> None:
        place = signature(error)
        file = self.findings / digest(place.encode())
        if file.exists() and file.stat().st_size <= len(content):
            return
        if not file.exists():
            content = shortened(self.target, content, place, self.limits)
        file.write_bytes(content)
        text = "".join(traceback.format_exception(error))
        file.with_suffix(".txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def attempt(
    target: Target, content: bytes, limits: Limits, coverage: Coverage | None = None
) -> bool | BaseException:
    """Return whether the target accepted an input, or the error that is a finding."""
    try:
        with limits.bounded():
            if coverage is not None:
                coverage.start()
            try:
                return bool(target.check(content))
            finally:
                sys.settrace(None)
    except (Exception, ExceededError) as error:
        return error


def signature(error: BaseException) -> str:
    """Return the kind of an error and where it was raised, so that equal findings are kept once."""
    where = ""
    step: TracebackType | None = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if "torch_feather" in code.co_filename or "/fuzz/targets/" in code.co_filename:
            where = f"{Path(code.co_filename).name}:{code.co_name}"
        step = step.tb_next
    if isinstance(error, ExceededError):
        return f"{type(error).__name__} {str(error).split()[0]}"
    return f"{type(error).__name__} {where}"


def shortened(
    target: Target, content: bytes, place: str, limits: Limits, tries: int = 300
) -> bytes:
    """Return a shorter input with the same finding, by leaving out parts."""
    size = max(1, len(content) // 2)
    while size and tries > 0:
        at = 0
        while at < len(content) and tries > 0:
            shorter = content[:at] + content[at + size :]
            tries -= 1
            error = attempt(target, shorter, limits)
            if isinstance(error, BaseException) and signature(error) == place:
                content = shorter
            else:
                at += size
        size //= 2
    return content


def digest(content: bytes) -> str:
    """Return a short name for some bytes."""
    return hashlib.sha256(content).hexdigest()[:12]


def work(names: list[str], folder: Path, seed: int, seconds: float) -> None:
    """Feed the targets in turns, and print a line of JSON with the counts after each turn."""
    warnings_off()
    with tempfile.TemporaryDirectory() as scratch:
        targets = []
        for name in names:
            inside = Path(scratch) / name
            inside.mkdir()
            targets.append(make_target(name, inside))
        limits = Limits()
        fuzzers = [
            Fuzzer(target, folder, Random(f"{seed} {target.name}"), limits) for target in targets
        ]
        for fuzzer in fuzzers:
            with named(folder, fuzzer):
                fuzzer.load()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for fuzzer in fuzzers:
                with named(folder, fuzzer):
                    fuzzer.turn(end)
                release_memory()
            report = {
                f.target.name: {**f.counts, "seconds": f.seconds, "lines": len(f.coverage.known)}
                for f in fuzzers
            }
            line = {"targets": report, "slowest": limits.slowest, "largest": limits.largest}
            print(json.dumps(line), flush=True)


class named:  # noqa: N801  (a context manager)
    """Note in a file which target runs, for the case that the process ends."""

    def __init__(self, folder: Path, fuzzer: Fuzzer) -> None:
        self.file, self.name = folder / "running", fuzzer.target.name

    def __enter__(self) -> None:
        self.file.write_text(self.name)

    def __exit__(self, *_: object) -> None:
        self.file.unlink(missing_ok=True)


def warnings_off() -> None:
    """Ignore warnings, of which damaged files cause many."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def run_once(name: str, file: Path) -> None:
    """Run the input in a file within the bounds; what it raises is raised."""
    warnings_off()
    with tempfile.TemporaryDirectory() as scratch:
        target = make_target(name, Path(scratch))
        for content in target.seeds()[:1]:
            target.check(content)
        error = attempt(target, file.read_bytes(), Limits())
        if isinstance(error, BaseException):
            raise error


if __name__ == "__main__" and sys.argv[1] == "--once":
    run_once(sys.argv[2], Path(sys.argv[3]))
elif __name__ == "__main__":
    work(sys.argv[1].split(","), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
