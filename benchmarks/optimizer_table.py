"""Sparse training under every optimizer of torch.optim, pytorch_optimizer and torchao.

For each optimizer a small network takes a few steps without and with `sparsify` (hard-ste, 50%,
from the first step on). Checked are, bit for bit:

trains     after each step exactly round(s N) weights are zero, and latent weights and biases equal
           those of a plain autograd program without torch-feather, in which the network uses
           w + (u - w).detach().
resumes    a run that is saved after half of its steps and loaded into a new network ends
           with the same weights, if the optimizer resumes exactly without sparsify too.
copies     a deep copy of model and optimizer raises at its first step, and trains on exactly after
           sparsify.

An optimizer that is refused must raise an error of torch-feather whose text is recorded. Run the
command again to resume: only missing optimizers, and those of another version, are tried.

    python benchmarks/optimizer_table.py --out results/optimizers
    python benchmarks/optimizer_table.py --out results/optimizers --only SPAM TRAC --again
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import inspect
import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # torchao compiles its step, which takes minutes

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.training.provenance import provenance

STEPS, HALF, SPARSITY = 12, 6, 0.5
PACKAGES = ["torch", "pytorch_optimizer", "torchao", "schedulefree", "prodigyopt"]
# Classes that are no optimizers, and optimizers that this loop cannot drive.
NOT_TRIED = {
    "DynamicLossScaler": "a loss scaler, not an optimizer",
    "RotoGrad": "a module, not an optimizer",
    "SparseAdam": "needs sparse gradients",
}


HEADER = """# Sparse training under every optimizer

    python benchmarks/optimizer_table.py --out results/optimizers

A network of two linear layers takes 12 steps with `hard-ste` at 50% from the first step on, on a
CPU, with the default options of each optimizer.

- **trains**: after each step exactly round(s N) weights are zero, and latent weights and biases
  equal those of an autograd program without torch-feather, bit for bit. *refused*: an error of
  torch-feather, which the note quotes.
- **resumes**: saved after 6 steps and loaded into a new network, the run ends with the same bits.
- **copies**: a deep copy of model and optimizer raises at its first step, and trains on with the
  same bits after `sparsify`.
- *no\\**: fails or differs without torch-feather too.
- torchao compiles its steps; this table ran them without `torch.compile`.
"""


@dataclass(frozen=True)
class Case:
    """An optimizer and how a training loop drives it."""

    package: str
    name: str
    make: Callable[[nn.Module], Any]
    closure: bool = False
    graph: bool = False  # backward(create_graph=True)


@dataclass
class Outcome:
    """One row of the table."""

    package: str
    name: str
    version: str
    feather: str
    trains: str
    resumes: str = ""
    copies: str = ""
    note: str = ""
    seconds: float = 0.0


def network() -> nn.Module:
    """Return the network; its first layer is large enough for states of 8 bits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    x = torch.randn(16, 64, generator=random)
    return x, torch.randint(10, (16,), generator=random)


# --- the optimizers -------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Yield every optimizer that is installed."""
    for package, module in [
        ("torch", "torch.optim"),
        ("pytorch_optimizer", "pytorch_optimizer.optimizer"),
        ("torchao", "torchao.optim"),
        ("schedulefree", "schedulefree"),
        ("prodigyopt", "prodigyopt"),
    ]:
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        names = getattr(found, "__all__", None) or dir(found)
        for name in sorted(set(names)):
            kind = getattr(found, name)
            optimizer = inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
            if not optimizer and name not in NOT_TRIED and not _steps(kind):
                continue
            if name == "Optimizer" or name.startswith("_") or _elsewhere(package, kind):
                continue
            yield Case(package, name, _maker(name, kind), *_driven(name))


def _steps(kind: Any) -> bool:
    return inspect.isclass(kind) and hasattr(kind, "step") and hasattr(kind, "zero_grad")


def _elsewhere(package: str, kind: type) -> bool:
    """Return whether a package only passes on an optimizer of PyTorch."""
    return package != "torch" and kind.__module__.startswith("torch.")


def _driven(name: str) -> tuple[bool, bool]:
    """Return whether the loop needs a closure, and create_graph."""
    closure = {"LBFGS", "BSAM", "GSAM", "SAM", "WSAM", "FriendlySAM", "LookSAM", "AliG"}
    return name in closure, name in {"SophiaH", "AdaHessian"}


def _maker(name: str, kind: Any) -> Callable[[nn.Module], Any]:
    """Return a function that creates the optimizer of a model."""

    def inner(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def make(model: nn.Module) -> Any:
        parameters = list(model.parameters())
        matrices = [p for p in parameters if p.dim() == 2]
        others = [p for p in parameters if p.dim() != 2]
        if name in ("SAM", "FriendlySAM", "LookSAM"):
            return kind(parameters, base_optimizer=torch.optim.SGD, lr=0.1, momentum=0.9)
        if name == "WSAM":
            return kind(model, parameters, base_optimizer=torch.optim.SGD, lr=0.1)
        if name == "GSAM":
            schedulers = importlib.import_module("pytorch_optimizer.lr_scheduler")
            base = inner(model)
            rho = schedulers.ProportionScheduler(
                torch.optim.lr_scheduler.StepLR(base, 100), max_lr=0.1, max_value=0.1
            )
            return kind(parameters, base_optimizer=base, model=model, rho_scheduler=rho)
        if name == "BSAM":
            return kind(parameters, num_data=16)
        if name in ("LOMO", "AdaLOMO", "AdamMini"):
            return kind(model)
        if name == "AliG":
            return kind(parameters, max_lr=0.1)
        if name == "Ranger21":
            return kind(parameters, num_iterations=STEPS)
        if name == "CPUOffloadOptimizer":
            return kind(parameters, torch.optim.SGD, lr=0.1)
        if name == "Muon" and kind.__module__.startswith("torch."):
            return [kind(matrices), torch.optim.AdamW(others)]
        if name == "SpectralSphere":
            return [kind(matrices), torch.optim.AdamW(others)]
        if name in ("ScheduleFreeWrapper", "ScheduleFreeWrapperReference"):
            return kind(inner(model))
        if "optimizer" in inspect.signature(kind).parameters:
            return kind(inner(model))
        try:
            return kind(parameters)
        except Exception:
            groups = [
                {"params": matrices, "use_muon": True},
                {"params": others, "use_muon": False},
            ]
            return kind(groups)

    return make


# --- training -------------------------------------------------------------------------------


class Run:
    """A network in training; `sparsify` adds torch-feather, `masked` the reference."""

    def __init__(self, case: Case, *, sparse: bool = False, masked: bool = False):
        self.case, self.model = case, network()
        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizer = case.make(self.model)
        for optimizer in self.optimizers:
            if hasattr(optimizer, "train"):  # schedule-free optimizers
                optimizer.train()
            if case.name == "GSAM":
                optimizer.model = _Forward(self.forward)
        self.masked, self.sparsifier = masked, None
        if sparse:
            self.sparsify()

    def sparsify(self) -> None:
        self.sparsifier = feather.sparsify(
            self.model, self.optimizer, "hard-ste",
            sparsity=SPARSITY, total_steps=STEPS, schedule="constant",
        )  # fmt: skip

    @property
    def optimizers(self) -> list[Any]:
        return self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]

    def forward(self, x: Tensor) -> Tensor:
        if not self.masked:
            return self.model(x)
        weights = [self.model[0].weight, self.model[2].weight]
        magnitudes = torch.cat([w.detach().abs().flatten() for w in weights])
        pruned = round(SPARSITY * magnitudes.numel())
        kept = torch.ones_like(magnitudes)
        kept[magnitudes.argsort(stable=True)[:pruned]] = 0.0  # of ties, the first are pruned
        masks = kept.split([w.numel() for w in weights])
        used = [
            w + (w * mask.view_as(w) - w).detach() for w, mask in zip(weights, masks, strict=True)
        ]
        names = ["0.weight", "2.weight"]
        return torch.func.functional_call(self.model, dict(zip(names, used, strict=True)), (x,))

    def step(self, number: int) -> None:
        x, y = batch(number)
        torch.manual_seed(number)  # some optimizers draw random numbers
        np.random.seed(number)

        def closure() -> Tensor:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss = F.cross_entropy(self.forward(x), y)
            loss.backward(create_graph=self.case.graph)
            return loss

        if self.case.name == "GSAM":
            self.optimizer.set_closure(F.cross_entropy, x, y)
            self.optimizer.step()
            return
        if self.case.closure:
            closure()  # SAM and similar optimizers start from gradients
            for optimizer in self.optimizers:
                optimizer.step(torch.enable_grad()(closure))
            return
        closure()
        for optimizer in self.optimizers:
            optimizer.step()

    def train(self, start: int, stop: int) -> Run:
        for number in range(start, stop):
            self.step(number)
        return self

    def latent(self) -> list[Tensor]:
        """Return what the optimizer trains: latent weights, biases."""
        own = {} if self.sparsifier is None else self.sparsifier.latent_weights()
        return [own.get(n, p.detach()).clone() for n, p in self.model.named_parameters()]

    def zeros(self) -> int:
        return sum(int((self.model[i].weight == 0).sum()) for i in (0, 2))

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save([self.model.state_dict(), *[o.state_dict() for o in self.optimizers]], file)
        return file.getvalue()

    def load(self, saved: bytes) -> Run:
        model, *optimizers = torch.load(io.BytesIO(saved), weights_only=False)
        self.model.load_state_dict(model)
        for optimizer, state in zip(self.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(state)
        return self


class _Forward(nn.Module):
    """The network, for optimizers that call it themselves."""

    def __init__(self, forward: Callable[[Tensor], Tensor]):
        super().__init__()
        self._call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- the checks -----------------------------------------------------------------------------


def check(case: Case) -> tuple[str, str, str, str]:
    """Return trains, resumes, copies and a note."""
    if case.name in NOT_TRIED:
        return "not tried", "", "", NOT_TRIED[case.name]
    try:
        dense = Run(case).train(0, STEPS).latent()
    except Exception as error:
        with contextlib.suppress(Exception):
            Run(case, sparse=True)
            return "not tried", "", "", f"fails without torch-feather: {text(error)}"
        dense = None
    try:
        sparse, reference = Run(case, sparse=True), Run(case, masked=True)
        for number in range(STEPS):
            sparse.step(number)
            reference.step(number)
            if sparse.zeros() != round(SPARSITY * (64 * 64 + 64 * 10)):
                return "no", "", "", f"{sparse.zeros()} zeros after step {number + 1}"
            if not same(sparse.latent(), reference.latent()):
                return "no", "", "", f"other weights than the reference after step {number + 1}"
    except feather.FeatherError as error:
        return "refused", "", "", text(error)
    except Exception as error:
        kind = "not tried" if dense is None else "no"
        return kind, "", "", text(error)
    if not all(p.isfinite().all() for p in sparse.latent()):
        return "no", "", "", "weights are not finite"
    if sparse.sparsifier.step_count != STEPS:
        return "no", "", "", f"counted {sparse.sparsifier.step_count} of {STEPS} steps"
    resumes, note = check_resume(case, sparse, dense)
    copies, other = check_copy(case, sparse)
    note = note or ("" if copies == "no*" else other)
    return "yes", resumes, copies, note


def check_resume(case: Case, whole: Run, dense: list[Tensor]) -> tuple[str, str]:
    try:
        saved = Run(case).train(0, HALF).save()
        resumed = Run(case).load(saved).train(HALF, STEPS).latent()
        if not same(resumed, dense):
            return "no*", "without torch-feather, a resumed run differs too"
    except Exception as error:
        return "no*", f"cannot be resumed without torch-feather: {text(error)}"
    try:
        saved = Run(case, sparse=True).train(0, HALF).save()
        resumed = Run(case, sparse=True).load(saved).train(HALF, STEPS).latent()
    except Exception as error:
        return "no", text(error)
    return ("yes", "") if same(resumed, whole.latent()) else ("no", "the resumed run differs")


def check_copy(case: Case, whole: Run) -> tuple[str, str]:
    try:
        plain = Run(case).train(0, HALF)
        expected = copy.deepcopy((plain.model, plain.optimizer))
        copied = Run(case)
        copied.model, copied.optimizer = expected
        if not same(copied.train(HALF, STEPS).latent(), plain.train(HALF, STEPS).latent()):
            return "no*", "without torch-feather, a copy trains otherwise too"
    except Exception as error:
        return "no*", f"cannot be copied without torch-feather: {text(error)}"
    run = Run(case, sparse=True).train(0, HALF)
    copied = Run(case)
    copied.model, copied.optimizer = copy.deepcopy((run.model, run.optimizer))
    try:
        copied.step(HALF)
    except feather.FeatherError:
        pass
    else:
        return "no", "a copy trains dense without an error"
    copied.model, copied.optimizer = copy.deepcopy((run.model, run.optimizer))
    try:
        copied.sparsify()
        ended = copied.train(HALF, STEPS).latent()
    except Exception as error:
        return "no", f"copy: {text(error)}"
    return ("yes", "") if same(ended, whole.latent()) else ("no", "the copy trains otherwise")


def text(error: BaseException) -> str:
    found = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}: {found if len(found) <= 300 else found[:300] + ' ...'}"


# --- the table ------------------------------------------------------------------------------


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def table(rows: list[Outcome]) -> str:
    lines = [
        "| package | optimizer | trains | resumes | copies | note |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        note = row.note.replace("|", "\\|").replace("<", "&lt;")
        cells = [row.package, f"`{row.name}`", row.trains, row.resumes, row.copies, note]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[Outcome]) -> str:
    lines = []
    for package in dict.fromkeys(row.package for row in rows):
        own = [row for row in rows if row.package == package]
        counts = {kind: sum(row.trains == kind for row in own) for kind in
                  ("yes", "refused", "no", "not tried")}  # fmt: skip
        found = ", ".join(f"{kind}: {n}" for kind, n in counts.items())
        resumed = sum(row.resumes == "yes" for row in own)
        lines.append(f"- {package} {own[0].version}: trains {found}; resumes: {resumed}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of table.md and outcomes.json")
    parser.add_argument("--only", nargs="*", help="names of optimizers")
    parser.add_argument("--again", action="store_true", help="repeat completed ones")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    done: dict[str, Outcome] = {}
    record = None if options.out is None else options.out / "outcomes.json"
    if record is not None and record.exists():
        rows = json.loads(record.read_text())["outcomes"]
        done = {f"{row['package']}.{row['name']}": Outcome(**row) for row in rows}
    order = []
    with one_process():
        for case in cases():
            key, number = f"{case.package}.{case.name}", installed(case.package)
            order.append(key)
            old = done.get(key)
            known = old is not None and (old.version, old.feather) == (number, feather.__version__)
            chosen = options.only is None or case.name in options.only
            if not chosen or (known and not options.again):
                continue
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = check(case)
            row = Outcome(case.package, case.name, number, feather.__version__, *found)
            row.seconds = round(time.perf_counter() - start, 2)
            done[key] = row
            print(f"{key:45} {row.trains:10} {row.resumes:4} {row.copies:4} "
                  f"{row.seconds:6.1f} s  {row.note[:110]}", flush=True)  # fmt: skip
            if record is not None:
                write(record, [done[key] for key in [*order, *done] if key in done])
    rows = [done[key] for key in order if key in done]
    print("\n" + summary(rows))


def write(record: Path, found: list[Outcome]) -> None:
    """Write outcomes.json and table.md."""
    rows = list({f"{row.package}.{row.name}": row for row in found}.values())
    record.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        "outcomes": [asdict(row) for row in rows],
        "provenance": provenance(torch.device("cpu")),
    }
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(kept, indent=1) + "\n")
    temporary.replace(record)
    text_of = f"{HEADER}\n{summary(rows)}\n\n{table(rows)}\n"
    (record.parent / "table.md").write_text(text_of)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Around the checks: a process group of one process, which DistributedMuon needs."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
