"""No training ends with a value that is not finite, without an error that names it."""

import warnings

import pytest
import torch
from torch import nn

import torch_feather as feather
from torch_feather import devices
from torch_feather.engine.health import Health
from torch_feather.errors import FeatherWarning, NonFiniteWeightError

TOTAL = 6


class Task:
    """A network with norms and biases, and with a frozen constant that is infinite."""

    def __init__(self, method: str = "feather", **options):
        torch.manual_seed(0)
        layers = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)
        self.model = nn.Sequential(*layers)
        self.model.mask = nn.Parameter(torch.full((3,), -torch.inf), requires_grad=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        if method.startswith("asl"):
            options["dense_below"] = 0
        self.sparsifier = feather.sparsify(
            self.model, self.optimizer, method, sparsity=0.5, total_steps=TOTAL, **options
        )

    def step(self, name: str | None = None, value: float = torch.nan) -> None:
        self.optimizer.zero_grad()
        x, y = torch.randn(8, 16), torch.randint(4, (8,))
        nn.functional.cross_entropy(self.model(x), y).backward()
        if name is not None:
            self.model.get_parameter(name).grad.fill_(value)
        self.optimizer.step()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias", "3.bias"])
def test_the_last_step_leaves_every_parameter_finite_or_raises(name, value):
    task = Task()
    for _ in range(TOTAL - 1):
        task.step()
    with pytest.raises(NonFiniteWeightError, match=name.replace(".", r"\.")):
        task.step(name, value)
    with pytest.raises(NonFiniteWeightError, match=name.replace(".", r"\.")):
        task.sparsifier.finalize(force=True)


@pytest.mark.parametrize("method", ["feather", "hard-ste", "gmp", "st3", "spartan", "asl"])
def test_an_infinite_weight_raises_with_every_kind_of_method(method):
    task = Task(method)
    for _ in range(TOTAL - 1):
        task.step()
    with pytest.raises(NonFiniteWeightError):
        task.step("0.weight", torch.inf)


def test_finalize_checks_what_changed_after_the_last_step():
    task = Task()
    for _ in range(TOTAL):
        task.step()
    with torch.no_grad():
        task.model[1].bias[0] = torch.inf
    with pytest.raises(NonFiniteWeightError, match=r"1\.bias"):
        task.sparsifier.finalize()
    with torch.no_grad():
        task.model[1].bias[0] = 0.0
    task.sparsifier.finalize()  # the error changed nothing


def test_a_frozen_constant_may_be_infinite():
    task = Task()
    for _ in range(TOTAL):
        task.step()
    assert task.sparsifier.finalize().mask.isinf().all()
    assert not task.model[0].weight.isinf().any()


def test_a_best_checkpoint_that_is_loaded_after_a_bad_end_is_kept():
    good = Task()
    for _ in range(TOTAL):
        good.step()
    state = good.sparsifier.finalize().state_dict()
    task = Task()
    for _ in range(TOTAL - 1):
        task.step()
    with pytest.raises(NonFiniteWeightError):
        task.step("0.weight", torch.inf)
    task.model.load_state_dict(state)
    model = task.sparsifier.finalize()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class Count:
    """Stands for a step count on a device; counts how often the host reads it."""

    def __init__(self):
        self.value = self.reads = 0

    def __int__(self) -> int:
        self.reads += 1
        return self.value


@pytest.mark.parametrize("skipped", [0, 1, 5, 40])
@pytest.mark.parametrize("start", [0, 60])
def test_on_a_device_the_count_is_read_at_the_end_alone(start, skipped, monkeypatch):
    """Skipped steps are known on the device only: each read finds how many are missing."""
    total, count = 100, Count()
    health = Health(nn.Linear(2, 2), ["weight"], total)
    count.value = start
    health.resume_at(start)
    last = []
    for call in range(total - start + skipped + 10):
        health._most_steps += 1
        count.value += call >= skipped  # the first steps overflow
        last.append(health._is_last(count))
        assert not count.reads or call + 1 >= total - start
    assert last.index(True) == total - start + skipped - 1
    assert sum(last) == 1
    assert count.reads <= 2 if skipped else count.reads == 1


def test_on_a_device_everything_is_checked_after_the_last_step_only(monkeypatch):
    checks = []
    original = Health.raise_if_not_finite
    monkeypatch.setattr(
        Health, "raise_if_not_finite", lambda *a, **k: (checks.append(1), original(*a, **k))[1]
    )
    monkeypatch.setattr(devices, "synchronizes", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    task = Task()
    for step in range(TOTAL):
        assert not checks
        task.step("0.bias" if step == TOTAL - 2 else None, 0.0)
    assert checks == [1]
    task = Task()
    for _ in range(TOTAL - 1):
        task.step()
    with pytest.raises(NonFiniteWeightError, match=r"3\.bias"):
        task.step("3.bias", torch.nan)


def test_a_resumed_run_is_checked_after_its_last_step(monkeypatch):
    monkeypatch.setattr(devices, "synchronizes", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    task, resumed = Task(), Task()
    for _ in range(TOTAL - 1):
        task.step()
    resumed.model.load_state_dict(task.model.state_dict())
    resumed.optimizer.load_state_dict(task.optimizer.state_dict())
    with pytest.raises(NonFiniteWeightError, match=r"0\.bias"):
        resumed.step("0.bias")


class Quantized(torch.Tensor):
    """A tensor that other code decodes; it has no operations but `detach`."""

    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (4, 4), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls()
        raise NotImplementedError(str(function))


def test_quantized_weights_are_not_checked():
    model = nn.Sequential(nn.Linear(8, 8))
    model.base = nn.Parameter(Quantized(), requires_grad=False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.5, total_steps=1)
    optimizer.step()
    assert sparsifier.finalize() is model


def test_statistics_that_are_not_finite_at_the_end_are_named_once():
    task = Task()
    task.model.register_buffer("bound", torch.tensor(torch.inf))  # as an attention mask
    task.sparsifier.detach()
    task.sparsifier = feather.sparsify(task.model, task.optimizer, sparsity=0.5, total_steps=TOTAL)
    for _ in range(TOTAL - 1):
        task.step()
    task.model[1].running_var[3] = torch.inf
    with pytest.warns(FeatherWarning, match=r"or infinite: 1\.running_var\. .*recalib"):
        task.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.sparsifier.finalize()
