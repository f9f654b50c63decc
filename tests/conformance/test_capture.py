"""A whole training step can be replayed as one captured graph, the sparsifier included."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import torch_feather as feather
from torch_feather import devices, launching
from torch_feather.engine import training

from .capture import Tape, reads_across
from .harness import TOTAL, assert_same, start
from .methods import METHODS, GlobalThreshold, MethodCase, resolved, some_costs
from .models import MODELS

REPLAYS = 50  # steps, far beyond the end of the schedule
BUDGET = "feather-flops within a budget"  # its bias is searched for after every step


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Take the path of an accelerator with CPU tensors, whose values the host can read."""
    monkeypatch.setattr(devices, "synchronizes", lambda _: True)
    monkeypatch.setattr(launching, "uses_triton", lambda device: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


class CapturedLoop:
    """Steps on static inputs: forward, backward, clip, optimizer, gradients dropped."""

    def __init__(self, name: str, model: str = "convnet", where: str = "cpu"):
        method, self.case = METHODS[name], MODELS[model]
        self.model = self.case.make().to(where)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), torch.tensor(0.1, device=where), 0.9, weight_decay=1e-3,
            fused=True,
        )  # fmt: skip
        self.sparsifier = feather.sparsify(
            self.model, self.optimizer, method.method, sparsity=method.sparsity,
            total_steps=TOTAL, **resolved(method.options, self.case),
        )  # fmt: skip
        self.method, self.where = method, where
        self.x, self.y = (t.to(where) for t in self.case.batch(0))

    def feed(self, number: int) -> None:
        for static, fresh in zip((self.x, self.y), self.case.batch(number), strict=True):
            static.copy_(fresh)

    def step(self) -> None:
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.sparsifier.complete_gradients()
        clipped = [*self.model.parameters(), *self.sparsifier.parameters()]
        nn.utils.clip_grad_norm_(clipped, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self, start: int, stop: int, step=None) -> "CapturedLoop":
        for number in range(start, stop):
            self.feed(number)
            (step or self.step)()
        return self

    def end(self) -> dict[str, object]:
        state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        return {
            "model": state,
            "latent": self.sparsifier.latent_weights(),
            "thresholds": self.sparsifier.thresholds(),
            "learned": [p.clone() for p in self.sparsifier.parameters()],
            "steps": self.sparsifier.step_count,
            "zeros": self.case.zeros(self.model),
        }


# --- memory that is read --------------------------------------------------------------------


def steps_on_fake_tensors(method: str):
    """A step on fake CUDA tensors, without data and hardware."""
    case = METHODS[method]
    like = {"device": "cuda"}
    model = nn.Sequential(nn.Linear(30, 40, **like), nn.ReLU(), nn.Linear(40, 20, **like))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    sparsifier = feather.sparsify(
        model, optimizer, case.method, sparsity=case.sparsity, total_steps=10,
        **resolved(case.options, MODELS["mlp"]),
    )  # fmt: skip

    def step() -> None:
        for p in model.parameters():  # autograd itself wants a device
            p.grad = torch.randn_like(p)
            for pull_back in (p._backward_hooks or {}).values():
                p.grad = pull_back(p.grad)
        sparsifier.complete_gradients()
        nn.utils.clip_grad_norm_([*model.parameters(), *sparsifier.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize("method", METHODS)
def test_no_step_reads_what_the_step_before_it_allocated(method, without_gpu):
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = steps_on_fake_tensors(method)
        for _ in range(2):  # the optimizer allocates its state
            step()
        assert reads_across(step) == []


def test_an_engine_that_keeps_new_memory_is_detected(without_gpu, monkeypatch):
    monkeypatch.setattr(training, "keep_memory", lambda old, new, device: new)
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = steps_on_fake_tensors("feather-theta")
        step()
        assert reads_across(step)


class Count(TorchDispatchMode):
    """Counts the operations on data that an accelerator would run."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["feather", "feather-ham"])
def test_a_step_takes_as_many_operations_for_many_tensors_as_for_few(method, as_on_a_device):
    """Each operation takes an accelerator microseconds, even for a small tensor."""
    counts = []
    for layers in (2, 20):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
        sparsifier = feather.sparsify(model, optimizer, method, sparsity=0.8, total_steps=10)
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        [one] = sparsifier.step.optimizers
        with torch.no_grad(), Count() as count:
            sparsifier.step.before(one, closure=False)
            sparsifier.step.after(one)
        counts.append(count.number)
    assert counts[0] == counts[1]


# --- results of a replay --------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, BUDGET])
def test_replayed_steps_equal_hooked_steps(method, as_on_a_device, monkeypatch):
    costs = {"costs": some_costs, "budget": 150.0}
    budget = MethodCase(BUDGET, "feather-flops", GlobalThreshold, options=costs)
    monkeypatch.setitem(METHODS, BUDGET, budget)
    hooked = CapturedLoop(method).train(0, 3 + REPLAYS).end()
    loop = CapturedLoop(method).train(0, 2)
    loop.feed(2)
    with Tape() as tape:  # unlike a capture this is a step itself
        loop.step()
    loop.train(3, 3 + REPLAYS, tape.replay)
    assert_same(loop.end(), hooked)
    assert loop.sparsifier.step_count == 3 + REPLAYS
    assert loop.case.zeros(loop.model) == round(loop.method.sparsity * loop.case.size)


@pytest.mark.parametrize("method", METHODS)
def test_replayed_and_eager_steps_can_alternate(method, as_on_a_device):
    """The last, smaller batch of an epoch runs eagerly."""
    hooked = CapturedLoop(method).train(0, 20).end()
    loop = CapturedLoop(method).train(0, 2)
    loop.feed(2)
    with Tape() as tape:
        loop.step()
    for number in range(3, 20):
        loop.train(number, number + 1, None if number % 4 == 0 else tape.replay)
    assert_same(loop.end(), hooked)


def test_a_replay_continues_from_a_loaded_state(as_on_a_device):
    loop = CapturedLoop("feather-theta").train(0, 3)
    with Tape() as tape:
        loop.step()
    state = loop.sparsifier.state_dict()
    tensors = [*loop.model.state_dict().values()]
    tensors += [entries["momentum_buffer"] for entries in loop.optimizer.state.values()]
    copies = [tensor.clone() for tensor in tensors]
    expected = loop.train(4, 8, tape.replay).end()
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.copy_(copy)
    loop.sparsifier.load_state_dict(state)
    assert loop.sparsifier.step_count == 4
    assert_same(loop.train(4, 8, tape.replay).end(), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_device_path_agrees_with_the_cpu_path(method, monkeypatch, request):
    on_cpu = start("convnet", method=METHODS[method].method, sparsity=METHODS[method].sparsity,
                   dtype=torch.float64, **METHODS[method].options).train(0, TOTAL)  # fmt: skip
    request.getfixturevalue("as_on_a_device")
    on_device = start("convnet", method=METHODS[method].method, sparsity=METHODS[method].sparsity,
                      dtype=torch.float64, **METHODS[method].options).train(0, TOTAL)  # fmt: skip
    for p, q in zip(on_cpu.model.parameters(), on_device.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)
    assert on_cpu.zeros() == on_device.zeros()


def test_spartan_on_a_device_freezes_the_mask_after_all_optimizers_stepped(request):
    """Another optimizer steps later than the first in the same step."""
    late = {"method": "spartan", "end": 3, "freeze": 5, "dtype": torch.float64}
    on_cpu = start("convnet", "muon+adamw", **late).train(0, TOTAL)
    request.getfixturevalue("as_on_a_device")
    on_device = start("convnet", "muon+adamw", **late).train(0, TOTAL)
    for p, q in zip(on_cpu.model.parameters(), on_device.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_captured_cuda_graph_equals_hooked_steps(method):
    hooked = CapturedLoop(method, "mlp", "cuda").train(0, 3 + REPLAYS).end()
    loop = CapturedLoop(method, "mlp", "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop.train(0, 3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop.step()
    for number in range(3, 3 + REPLAYS):
        eagerly = number % 10 == 9  # as the last, smaller batch of an epoch
        loop.train(number, number + 1, None if eagerly else graph.replay)
    replayed = loop.end()
    for key in ("model", "latent", "thresholds"):
        for name, value in hooked[key].items():
            torch.testing.assert_close(replayed[key][name], value, rtol=1e-3, atol=1e-4)
    assert replayed["steps"] == hooked["steps"] == 3 + REPLAYS
    assert replayed["zeros"] == hooked["zeros"] == round(loop.method.sparsity * loop.case.size)
