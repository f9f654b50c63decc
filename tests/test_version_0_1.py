"""States, sparse files and run directories of version 0.1 load, and resume to the same end.

Version 0.1 wrote `data/v0.1` with the loop, networks and settings of this module; the README there
says how. The cube root differs from that of version 0.1 in the last bits, and powers, logarithms
and fused multiply-adds differ between processors; sums are taken in another order. So ends that
depend on them are compared to 5e-5, and their zeros exactly: one bit of the latent weights moves
the end of `feather-asl+` by up to 3e-5. All other ends are compared bit for bit.
"""

import copy
import gzip
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.export import SparseFile
from torch_feather.methods import method_options

DATA = Path(__file__).parent / "data" / "v0.1"
TOTAL, SAVED = 16, 6
COSTS = {"stem.weight": 2.0, "body.weight": 3.0, "head.weight": 1.0}


@dataclass(frozen=True)
class Case:
    """Arguments of `sparsify`, and what the network and its optimizer are."""

    method: str = "feather"
    optimizer: str = "sgd"
    dtype: torch.dtype = torch.float32
    sparsity: float | dict[str, float] = 0.75
    options: dict = field(default_factory=dict)


STATES = {
    "feather": Case(),
    "feather-adamw": Case(optimizer="adamw"),
    "feather-bfloat16": Case(dtype=torch.bfloat16),
    "feather-float64": Case(dtype=torch.float64, optimizer="adamw", options={"theta": 0.5}),
    "feather-groups": Case(sparsity={"stem.*": 0.5, "*": 0.9}),
    "feather-nm": Case(sparsity=0.5, options={"pattern": "2:4"}),
    "feather-block": Case(options={"pattern": "4x4"}, optimizer="adamw"),
    "feather-erk": Case(options={"allocation": "erk", "schedule": "linear", "end": 12}),
    "feather-two-optimizers": Case(optimizer="two"),
    "feather-gmp": Case("feather-gmp"),
    "feather-flops": Case("feather-flops", options={"costs": COSTS}),
    "feather-flops-budget": Case("feather-flops", options={"costs": COSTS, "budget": 180.0}),
    "feather-asl-plus": Case("feather-asl+", options={"dense_below": 50}),
    "hard-ste": Case("hard-ste", optimizer="adamw"),
    "soft-ste": Case("soft-ste"),
    "gmp": Case("gmp", optimizer="adamw"),
    "gmp-every": Case("gmp", options={"every": 4}),
    "st3": Case("st3"),
    "st3-sigma": Case("st3-sigma", optimizer="adamw"),
    "probmask": Case("probmask", optimizer="adamw"),
    "probmask-rate": Case("probmask", options={"rate": 0.05, "epochs": 8, "finetune": 0.25}),
    "probmask-passes": Case("probmask", options={"passes": 2}),
    "spartan": Case("spartan"),
    "spartan-bfloat16": Case("spartan", dtype=torch.bfloat16, options={"freeze": 5}),
    "asl": Case("asl", options={"dense_below": 50}),
    "asl-rate": Case("asl", optimizer="adamw", options={"dense_below": 50, "rate": 0.5}),
    "asl-plus": Case("asl+", options={"dense_below": 50}),
    "str": Case("str"),
    "str-rate": Case("str", optimizer="adamw", options={"rate": 2.0}),
    "str-decay": Case("str", options={"decay": 0.3, "s_init": -5.0}),
}
# Training ends with the same bits on every processor.
EVERYWHERE = {
    *("feather-bfloat16", "soft-ste", "gmp-every", "spartan-bfloat16"),
}


class Training:
    """A network, its optimizers and a sparsifier, and the training loop.

    The loss is elementwise in the weights and needs no forward pass, whose sums would depend on
    the processor.
    """

    def __init__(self, case: Case, attach: bool = True):
        self.case, self.steps = case, 0
        self.model = network(case.dtype)
        self.optimizers = OPTIMIZERS[case.optimizer](self.model)
        if attach:
            self.attach()

    def attach(self) -> None:
        optimizers = self.optimizers if len(self.optimizers) > 1 else self.optimizers[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # options that were renamed
            self.sparsifier = feather.sparsify(
                self.model, optimizers, self.case.method, sparsity=self.case.sparsity,
                total_steps=TOTAL, **self.case.options,
            )  # fmt: skip

    def train(self, stop: int) -> "Training":
        for step in range(self.steps, stop):
            for share in self.sparsifier.passes():
                (share * self.loss(step)).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        self.steps = stop
        return self

    def loss(self, step: int) -> Tensor:
        return sum(
            (p - numbers(p, 7919 * (step % 5) + 12553 * i)).square().sum()
            for i, p in enumerate(self.model.parameters())
        )

    def load(self, state: dict, parts: Iterable[str] = ("model", "optimizers")) -> "Training":
        """Load the `parts` of a state in the given order."""
        for part in parts:
            if part == "model":
                self.model.load_state_dict(state["model"])
            if part == "optimizers":
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
        self.steps = SAVED
        return self

    def end(self) -> dict[str, Tensor]:
        """Return weights, latent weights and thresholds, each as one vector."""
        return {
            "model": flat(self.model.parameters()),
            "latent": flat(self.sparsifier.latent_weights().values()),
            "thresholds": flat(self.sparsifier.thresholds().values()),
        }


def network(dtype: torch.dtype) -> nn.Module:
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(4, 8, 1, bias=False))
    net.add_module("body", nn.Conv2d(8, 8, (3, 1), bias=False))
    net.add_module("head", nn.Linear(32, 8))
    net.to(dtype)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(numbers(p, 31337 * i + 5) / 2)
    return net


def numbers(like: Tensor, start: int) -> Tensor:
    """Return pseudo-random multiples of 2**-16 in [-1/2, 1/2], the same on every machine."""
    order = torch.arange(like.numel()) + start
    scattered = (order * 40503 + order.square() * 2749) % 65521 - 32760
    return (scattered.double() / 2**16).view(like.shape).to(like.dtype)


def sgd(model):
    return [torch.optim.SGD(model.parameters(), lr=1 / 16, momentum=0.5)]


def adamw(model):
    return [torch.optim.AdamW(model.parameters(), lr=1 / 64)]


def two(model):
    first, *others = model.parameters()
    return [
        torch.optim.AdamW([first], lr=1 / 8),
        torch.optim.SGD(others, lr=1 / 32, momentum=0.75),
    ]


OPTIMIZERS = {"sgd": sgd, "adamw": adamw, "two": two}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def plain(state: dict) -> dict:
    """Return an optimizer's state dict without the entries of the sparsifier."""
    entries = {
        key: {name: value for name, value in entry.items() if not name.startswith("feather_")}
        for key, entry in state["state"].items()
    }
    return {**state, "state": entries}


def read_state(name: str) -> dict:
    with gzip.open(DATA / "states" / f"{name}.pt.gz") as file:
        return torch.load(file, weights_only=True)


def assert_same_bits(found: Tensor, written: Tensor) -> None:
    assert found.dtype == written.dtype
    assert found.shape == written.shape
    assert torch.equal(as_bytes(found), as_bytes(written))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same_end(
    found: Mapping[str, Tensor], written: Mapping[str, Tensor], exact: bool
) -> None:
    for name, value in found.items():
        if exact:
            assert_same_bits(value, written[name])
        else:
            torch.testing.assert_close(value, written[name], rtol=0, atol=5e-5)
            assert torch.equal(value == 0, written[name] == 0)


def assert_resumes(training: Training, name: str) -> None:
    """Train to the end and compare it with the end in version 0.1."""
    written = read_state(name)["end"]
    exact = name in EVERYWHERE
    assert_same_end(training.train(TOTAL).end(), written, exact)
    training.sparsifier.finalize()
    assert_same_end({"model": flat(training.model.parameters())}, written, exact)


# Optimizer states


def test_there_is_a_state_of_every_method():
    methods = {case.method for case in STATES.values()}
    assert methods == {
        "feather", "feather-gmp", "feather-flops", "feather-asl+", "hard-ste", "soft-ste", "gmp",
        "st3", "st3-sigma", "probmask", "spartan", "asl", "asl+", "str",
    }  # fmt: skip
    assert methods <= set(feather.available_methods())


@pytest.mark.parametrize("order", [("model", "optimizers"), ("optimizers", "model")], ids="-".join)
@pytest.mark.parametrize("name", STATES)
def test_a_state_resumes_to_the_same_end(name, order):
    assert_resumes(Training(STATES[name]).load(read_state(name), order), name)


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_is_loaded_before_sparsify_resumes_to_the_same_end(name):
    training = Training(STATES[name], attach=False).load(read_state(name))
    training.attach()
    assert_resumes(training, name)


@pytest.mark.parametrize("name", STATES)
def test_a_loaded_state_is_the_one_that_was_saved(name):
    state = read_state(name)
    training = Training(STATES[name]).load(state)
    assert training.sparsifier.step_count == SAVED
    latent = flat(training.sparsifier.latent_weights().values())
    assert_same_bits(latent, flat(saved_latent_weights(state["optimizers"])))
    model = {"model": flat(training.model.parameters())}
    exact = name in EVERYWHERE
    assert_same_end(model, {"model": flat(state["model"].values())}, exact)
    for optimizer, saved in zip(training.optimizers, state["optimizers"], strict=True):
        found, written = plain(optimizer.state_dict()), plain(saved)
        assert found["state"].keys() == written["state"].keys()
        for key, entries in written["state"].items():
            assert found["state"][key].keys() == entries.keys()
            for entry, value in entries.items():
                assert_same_bits(found["state"][key][entry], value)


def saved_latent_weights(optimizers: Iterable[dict]) -> list[Tensor]:
    """Return those of all prunable weights in the order of the model."""
    entries = [entry for state in optimizers for entry in state["state"].values()]
    return [entry["feather_latent"] for entry in entries if entry["feather_latent"].dim() > 0]


def test_a_state_of_the_sparsifier_resumes_bit_for_bit():
    state, training = read_state("feather"), Training(STATES["feather"])
    training.load({**state, "optimizers": map(plain, state["optimizers"])}, ["model"])
    with training.sparsifier.relaxed_loading():
        training.optimizers[0].load_state_dict(plain(state["optimizers"][0]))
    training.sparsifier.load_state_dict(state["sparsifier"])
    assert_resumes(training, "feather")


def test_a_latent_average_resumes_bit_for_bit():
    state, training = read_state("feather"), Training(STATES["feather"])
    average = feather.LatentAverage(training.load(state).sparsifier)
    average.load_state_dict(state["average"])
    for step in range(SAVED, TOTAL):
        training.train(step + 1)
        average.update()
    found = flat(average.copy_to(copy.deepcopy(training.model)).parameters())
    assert_same_end({"average": found}, state["end"], exact=False)


RENAMED = {"asl-rate": "lr_multiplier", "str-rate": "lr_multiplier", "probmask-rate": "lr"}


@pytest.mark.parametrize("name", RENAMED)
def test_a_state_resumes_under_the_new_name_of_an_option(name):
    case = STATES[name]
    new = RENAMED[name] if RENAMED[name] in method_options(case.method) else "rate"
    options = {new if key == "rate" else key: value for key, value in case.options.items()}
    assert_resumes(Training(replace(case, options=options)).load(read_state(name)), name)


OTHERS = {
    "method": Case("hard-ste"),
    "option": Case(options={"theta": 0.25}),
    "sparsity": Case(sparsity=0.875),
    "pattern": Case(options={"pattern": "4x4"}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_state_of_other_settings_raises_and_loads_when_loading_is_relaxed(what):
    state, training = read_state("feather"), Training(OTHERS[what])
    training.load(state, ["model"])
    with pytest.raises(feather.StateError, match="does not belong to this sparsifier"):
        training.load(state, ["optimizers"])
    with training.sparsifier.relaxed_loading():
        training.load(state, ["optimizers"])
    latent = flat(training.sparsifier.latent_weights().values())
    assert_same_bits(latent, flat(saved_latent_weights(state["optimizers"])))
    assert training.sparsifier.step_count == SAVED


# Sparse files


def tied_network() -> nn.Module:
    """Return a network with tied weights, an integer buffer and a layer without zeros."""
    net = nn.ModuleDict({"first": nn.Linear(16, 16), "norm": nn.BatchNorm1d(16)})
    net["second"] = nn.Linear(16, 16, bias=False)
    net["second"].weight = net["first"].weight
    net["last"] = nn.Linear(16, 4)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(numbers(p, 31337 * i))
        net["first"].weight.masked_fill_(net["first"].weight.abs() < 0.4, 0.0)
        net["norm"].num_batches_tracked.fill_(2**40 + 1)
    return net


METADATA = {"accuracy": 0.5, "classes": ["zero", "one"], "about": {"year": 2025, "none": None}}


@dataclass(frozen=True)
class FileCase:
    """Arguments of `save_sparse`; `network` makes the model."""

    network: Callable[[], nn.Module]
    dtype: torch.dtype | None = None
    metadata: dict = field(default_factory=dict)


def finished(name: str) -> nn.Module:
    """Return the network at the end of a training run."""
    net = network(STATES[name].dtype)
    nn.utils.vector_to_parameters(read_state(name)["end"]["model"], net.parameters())
    return net


FILES = {
    "float32": FileCase(lambda: finished("feather"), metadata=METADATA),
    "bfloat16": FileCase(lambda: finished("feather-bfloat16")),
    "float32-as-float16": FileCase(lambda: finished("st3"), torch.float16),
    "tied": FileCase(tied_network),
}


@pytest.mark.parametrize("name", FILES)
def test_a_sparse_file_loads_bit_for_bit(name):
    case, path = FILES[name], DATA / "files" / f"{name}.safetensors"
    expected, net = case.network(), case.network()
    for value in net.state_dict().values():
        value.fill_(1)
    assert feather.load_sparse(path, net) is net
    for key, value in expected.state_dict().items():
        if case.dtype is not None and value.dim() > 1:
            value = value.to(case.dtype).to(value.dtype)
        assert_same_bits(net.state_dict()[key].reshape(-1), value.reshape(-1))
    with SparseFile(path) as file:
        assert file.metadata == case.metadata
        assert set(file.entries) == set(expected.state_dict())


# Run directories


class OrderedLinear(nn.Linear):
    """A linear layer that sums in the same order on every processor."""

    def forward(self, x: Tensor) -> Tensor:
        return OrderedProduct.apply(x, self.weight) + self.bias


class OrderedProduct(torch.autograd.Function):
    """Return x @ weight.T."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return ordered_sum(x[:, None] * weight, 2)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        gradient = gradient[:, :, None]
        return ordered_sum(gradient * weight, 1), ordered_sum(gradient * x[:, None], 0)


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """Add the second half to the first until one entry is left."""
    while (size := x.shape[dim]) > 1:
        half = (size + 1) // 2
        first, second = x.split([half, size - half], dim)
        if size % 2:
            second = torch.cat([second, torch.zeros_like(first.narrow(dim, 0, 1))], dim)
        x = first + second
    return x.squeeze(dim)


class Noise(nn.Module):
    """Zeros an eighth of the inputs at random while training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.randint(8, x.shape) > 0) if self.training else x


def tiny_digits(pretrained=False, num_classes: int = 10, in_chans: int = 1, **_) -> nn.Module:
    """Return a network of 888 weights for images of 8x8 pixels."""
    first, last = OrderedLinear(64 * in_chans, 12), OrderedLinear(12, num_classes)
    return nn.Sequential(nn.Flatten(), Noise(), first, nn.ReLU(), last)


@dataclass(frozen=True)
class RunCase:
    """Arguments of `feather train`, and the step at which it received SIGTERM."""

    method: str
    options: tuple[str, ...] = ()
    stopped: int | None = None

    @property
    def arguments(self) -> list[str]:
        return [
            *("--network", "timm/tiny_digits", "--method", self.method, "--sparsity", "0.75"),
            *("--epochs", "3", "--batch-size", "256"),
            *("--optimizer.clip", "null"),
            *("--system.tensorboard", "false", *self.options),
        ]  # fmt: skip


RUNS = {
    "finished": RunCase("feather", ("--compare-dense", "--track-masks")),
    "stopped-feather": RunCase("feather", ("--no-compare-dense", "--track-masks"), 8),
    "stopped-asl": RunCase("asl", ("--no-compare-dense", "--options.dense_below", "200"), 10),
    "stopped-probmask": RunCase("probmask", ("--no-compare-dense",), 8),
    "stopped-str": RunCase("str", ("--no-compare-dense", "--select", "best"), 13),
}
STOPPED = [name for name, case in RUNS.items() if case.stopped is not None]


@pytest.fixture(scope="module", autouse=True)
def registered_network():
    """Make `tiny_digits` available as `timm/tiny_digits`."""
    from timm.models import register_model

    register_model(tiny_digits)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Run the command `feather` in an empty folder and return its output."""
    from torch_feather.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FEATHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEATHER_TRACEBACK", "1")

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["feather", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code
        return capsys.readouterr().out

    return run


@pytest.fixture
def copy_run(tmp_path):
    """Copy a run directory of the data into an empty folder."""

    def copy_one(name: str) -> Path:
        return shutil.copytree(DATA / "runs" / name, tmp_path / name)

    return copy_one


def read_model(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_is_resumed_to_the_same_end(name, command, copy_run):
    run, end = copy_run(name), DATA / "runs" / f"{name}.end"
    output = command("train", "--resume", "--out", run)
    assert f"resuming {run} at step {RUNS[name].stopped} of 18" in " ".join(output.split())
    assert_same_end(
        read_model(run / "model.safetensors"), read_model(end / "model.safetensors"), exact=False
    )
    found, written = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, end)
    )
    assert len(found) == len(written) == 3
    for a, b in zip(found, written, strict=True):
        assert a.keys() >= b.keys()
        for key in ("epoch", "step", "lr", "sparsity", "macs"):
            assert a[key] == b[key]
        for key in ("train_loss", "val_loss", "val_acc"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_a_finished_run_is_evaluated(command, copy_run):
    report = json.loads((DATA / "runs" / "finished" / "report.json").read_text())
    output = command("evaluate", copy_run("finished"), "--device", "cpu")
    assert f"{100 * report['test_accuracy']:.2f}" in output
    assert f"{report['macs']['sparse']:,} of {report['macs']['dense']:,}" in output


def test_a_finished_run_is_reported(command, copy_run):
    run = copy_run("finished")
    report = json.loads((run / "report.json").read_text())
    output = command("report", run)
    for number in (report["test_accuracy"], report["dense"]["test_accuracy"]):
        assert f"{100 * number:.2f}" in output
    for layer in report["report"]["layers"]:
        assert layer["name"] in output
    assert json.loads(command("report", run, "--json")) == report


@pytest.mark.parametrize("format", ["sparse", "safetensors"])
def test_a_finished_run_is_exported(command, copy_run, format, tmp_path):
    run, file = copy_run("finished"), tmp_path / "exported.safetensors"
    command("export", run, "--format", format, "--out", file)
    expected = read_model(run / "model.safetensors")
    if format == "sparse":
        found = feather.load_sparse(file, tiny_digits()).state_dict()
    else:
        found = read_model(file)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(found[key], value)


def test_resuming_a_finished_run_changes_none_of_its_files(command, copy_run):
    run = copy_run("finished")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.suffix != ".png"}
    command("train", "--resume", "--out", run)
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_run_serves_as_start_and_teacher_of_another(command, copy_run, tmp_path):
    run, out = copy_run("finished"), tmp_path / "out"
    arguments = [*RUNS["stopped-feather"].arguments, "--epochs", 1, "--out", out]
    command("train", *arguments, "--init", run, "--teacher", run / "dense")
    teacher = json.loads((run / "report.json").read_text())["dense"]
    found = json.loads((out / "report.json").read_text())["teacher"]
    assert found["test_accuracy"] == pytest.approx(teacher["test_accuracy"])


@pytest.mark.parametrize("name", ["stopped-asl", "stopped-probmask"])
def test_config_yaml_of_a_run_starts_another(command, copy_run, tmp_path, name):
    run, out = copy_run(name), tmp_path / "out"
    command("train", "--config", run / "config.yaml", "--epochs", 1, "--out", out)
    assert json.loads((out / "report.json").read_text())["method"] == RUNS[name].method
