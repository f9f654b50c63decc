"""Activations in use at the same time do not overlap, and no other memory is accessed."""

import ctypes
import functools
import gc
import mmap
import os
import random
import signal
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runtime_cases import (
    TILE,
    TOLERANCE,
    compiled,
    conv,
    error,
    graph_of,
    pruned,
    run_layer,
    workspace_of_nan,
)
from torch import nn
from torch.fx import Graph

from torch_feather.runtime import kernels, module
from torch_feather.runtime import records as records_module
from torch_feather.runtime import taps as taps_module
from torch_feather.runtime import workspace as workspace_module
from torch_feather.runtime.layer import Layer, MaxPool
from torch_feather.runtime.plan import Copy, Plan, Pointwise, Sparse

aten = torch.ops.aten


def random_graph(rng, x):
    """Return a graph of layers and functions, some of which return views; and some layers."""
    graph = Graph()
    values = [graph.placeholder("x")]
    values[0].meta["val"] = x
    layers = []

    def call(function, *args):
        node = graph.call_function(function, args)
        given = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = function(*given)
        values.append(node)

    for i in range(24):
        value, other = rng.choice(values[-5:]), rng.choice(values)
        kind = rng.choice(
            ["conv", "conv", "add", "pool", "gelu", "sigmoid", "sum", "transpose", "slice"]
        )
        if kind in ("conv", "add"):
            layers.append(conv(4, 4, rng.choice([1, 3]), f"w{i}", padding=0, low=0.0))
            reach = layers[-1].weight.shape[-1] // 2
            layers[-1].padding = (reach, reach)
            call(layers[-1], value, *[other] * (kind == "add"))
        elif kind == "pool":
            layers.append(MaxPool.create(f"w{i}", 4, (3, 3), (1, 1), (1, 1), (1, 1)))
            call(layers[-1], value)
        elif kind == "transpose":  # a view, held until later
            call(aten.transpose.int, value, 2, 3)
            view = values.pop()
            call(aten.transpose.int, view, 2, 3)
        elif kind == "slice":
            call(aten.slice.Tensor, value, 1, 0, 2)
            part = values.pop()
            call(aten.cat.default, [part, part], 1)
        elif kind == "sum":
            call(aten.add.Tensor, value, other)
        else:
            call({"gelu": aten.gelu.default, "sigmoid": aten.sigmoid.default}[kind], value)
    graph.output(tuple(rng.sample(values, 4) + values[-1:]))
    return graph, [layer for layer in layers if rng.random() < 0.8]


def interpreted(graph, x):
    known = {}
    for node in graph.nodes:
        args = torch.fx.node.map_arg(node.args, lambda n: known[n])
        if node.op == "output":
            return args[0]
        known[node] = x if node.op == "placeholder" else node.target(*args)
    return None


def lifetimes(plan):
    """Return the first and last step that may access each activation."""
    steps, until = plan.steps, {}
    made = {step.out: i for i, step in enumerate(steps) if hasattr(step, "out")}
    for i, step in enumerate(steps):
        read = []
        if isinstance(step, Sparse):
            read = [step.x, step.residual]
        elif isinstance(step, Pointwise):
            read = step.x
        elif isinstance(step, Copy):
            read = [plan.planes.get(step.source)]
        until |= {planes: i for planes in read if planes is not None}
    outside = {step.node for step in steps if type(step).__name__ == "Torch"}
    for node, planes in plan.planes.items():
        if any(user in outside or user.op == "output" for user in node.users):
            until[planes] = len(steps)  # PyTorch may keep views
    return {planes: (made[planes], until.get(planes, made[planes])) for planes in made}


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs(seed):
    rng = random.Random(seed)
    x = torch.randn(2, 4, 6, 5)
    graph, sparse = random_graph(rng, x)
    plan = Plan.build(graph, sparse)
    tiles = {layer.name: rng.choice(kernels.tiles(kernels.host().widths)) for layer in sparse}
    workspace = workspace_of_nan(plan, 2, tiles)

    offsets = workspace.plan.offsets
    lives = [(*s, offsets[p], offsets[p] + p.size(2)) for p, s in lifetimes(plan).items()]
    for i, (first, last, start, end) in enumerate(lives):
        assert 0 <= start < end <= workspace.plan.size
        for made, until, other, other_end in lives[:i]:
            assert last < made or until < first or end <= other or other_end <= start

    results = workspace(x)
    workspace(torch.randn_like(x))  # must not change the results
    for result, expected in zip(results, interpreted(graph, x), strict=True):
        assert error(result, expected) < 20 * TOLERANCE


# Accesses outside of the memory


libc = ctypes.CDLL(None, use_errno=True)


def fenced(count, dtype=np.float32, at_end=True):
    """Return zeros next to a page that cannot be accessed, after (`at_end`) or before them."""
    size, page = count * np.dtype(dtype).itemsize, mmap.PAGESIZE
    room = -(-max(size, 1) // page) * page
    region = mmap.mmap(-1, room + 2 * page)
    KEPT.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for fence in (start, start + page + room):
        assert libc.mprotect(ctypes.c_void_p(fence), page, 0) == 0
    first = page + (room - size if at_end else 0)
    return np.frombuffer(region, np.uint8, size, first).view(dtype)


KEPT = []


def signal_of(function):
    """Return the signal that ends a process that calls this function; 0 if none does."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # no traceback
            function()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


LAYERS = {
    "3x3": lambda: (conv(5, 6, 3, padding=1), (7, 5)),
    "7x7 stride 2": lambda: (conv(3, 4, 7, padding=3, stride=2), (15, 13)),
    "valid": lambda: (conv(3, 4, 5), (9, 8)),
    "1x1": lambda: (conv(3, 4, 1), (4, 4)),
    "depthwise": lambda: (conv(5, 5, 3, padding=1, groups=5, stride=2), (9, 9)),
    "pool": lambda: (MaxPool.create("p", 3, (3, 3), (2, 2), (1, 1), (1, 1)), (9, 7)),
    "linear": lambda: (Layer("l", torch.randn(7, 21), torch.randn(7)), None),
}


@pytest.fixture
def fences(monkeypatch):
    def build(at_end):
        def aligned_zeros(count, dtype=np.float32):
            return fenced(count, dtype, at_end)

        for user in (workspace_module, taps_module, records_module):
            monkeypatch.setattr(user, "aligned_zeros", aligned_zeros)

    kernels.library()  # compile here, not in each child process
    yield build
    KEPT.clear()


def source(shape, last, at_end):
    memory = torch.from_numpy(fenced(shape.numel(), at_end=at_end))
    memory.copy_(torch.randn(shape.numel()))
    if len(shape) == 4 and last:
        return memory.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
    return memory.view(shape)


@pytest.mark.parametrize("at_end", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_memory_outside_is_accessed(name, at_end, fences):
    layer, size = LAYERS[name]()
    fences(at_end)

    def use():
        for batch, tile, last in ((1, (1, 8), False), (3, (6, 8), True), (2, (13, 8), False)):
            shape = (batch, 5, 21) if size is None else (batch, layer.channels[0], *size)
            run_layer(layer, source(torch.Size(shape), last, at_end), tile=tile)

    assert signal_of(use) == 0


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(20, 60), nn.Linear(20, 20)

    def forward(self, x, mask):
        q, k, v = (y.unflatten(-1, (2, 10)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("at_end", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("tokens", [3, 32, 145])
def test_attention_accesses_no_memory_outside(tokens, at_end, fences):
    """Queries are read and keys are computed in whole vectors and tiles, beyond the last one."""
    x, mask = torch.randn(2, tokens, 20), torch.randn(2, 1, tokens, tokens)
    network = compiled(pruned(SelfAttention()), (x, mask))
    expected = network(x, mask)
    network._runs.clear()
    fences(at_end)

    def use():
        assert torch.equal(network(x, mask), expected)

    assert signal_of(use) == 0


def test_an_access_outside_ends_the_process(fences):
    layer = conv(3, 4, 3, padding=1)
    x = torch.randn(1, 3, 9, 7)

    def use(beyond):
        fences(True)
        plan = Plan.build(graph_of(layer, x), [layer])
        plan.steps[-1].taps.dy[:] += beyond  # rows beyond the padding
        workspace_of_nan(plan, 1, {layer.name: TILE})(x)

    assert signal_of(lambda: use(0)) == 0
    assert signal_of(lambda: use(120)) == signal.SIGSEGV


# Lifetime of memory


def pool_of(network, batch):
    """Return the memory for a batch of the example's size."""
    sizes = tuple(torch.Size((batch, *shape)) for shape in network.inputs.shapes)
    return network._runs[sizes, network.threads].pool


def test_memory_is_freed_with_its_batch_size():
    """By reference counting: the garbage collector does not know the size of the memory."""
    network = compiled(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))
    gc.collect()
    gc.disable()
    try:
        used = []
        for batch in range(1, 12):
            network(torch.randn(batch, 3, 8, 8))
            used += [weakref.ref(w) for w in pool_of(network, batch).free]
        assert len(used) == 11
        assert sum(ref() is not None for ref in used) == module.MAX_SIZES
    finally:
        gc.enable()


def test_successive_calls_use_the_same_memory():
    network = compiled(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    for _ in range(20):
        network(x)
    assert len(pool_of(network, 2).free) == 1


def test_results_do_not_share_memory_with_later_calls():
    network = compiled(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    first = network(x)
    kept = first.clone()
    network(torch.randn(2, 3, 8, 8))
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(network(x), kept)


def test_memory_outlives_the_threads_that_use_it(monkeypatch):
    """Also if the call is interrupted before all threads were started."""
    monkeypatch.setattr(kernels.library(), "run_team", None)
    network = compiled(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8), threads=3)
    started = []

    def interrupted(submit, function, *args):
        if started:
            raise KeyboardInterrupt
        started.append(submit(lambda: (time.sleep(0.05), function(*args))))
        return started[-1]

    original = ThreadPoolExecutor.submit
    monkeypatch.setattr(
        ThreadPoolExecutor,
        "submit",
        lambda self, *args: interrupted(functools.partial(original, self), *args),
    )
    with pytest.raises(KeyboardInterrupt):
        network(torch.randn(2, 3, 8, 8))
    assert started[0].done()


def test_a_failed_call_does_not_affect_the_next(monkeypatch):
    network = compiled(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    expected = network(x)
    (workspace,) = pool_of(network, 2).free

    def interrupt(self, *inputs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(workspace_module.Workspace, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            network(x)
    assert torch.equal(network(x), expected)
    assert workspace not in pool_of(network, 2).free  # its threads may still run


def private_memory():
    """Return the bytes of this process that no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    found = dict(line.split()[:2] for line in lines[1:])
    return 1024 * (int(found["Private_Dirty:"]) + int(found["Private_Clean:"]))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_forked_processes_share_the_weights():
    """A child needs memory for its own activations, but has no copy of the weights."""
    x = torch.randn(1, 4096)
    network = compiled(nn.Linear(4096, 2048), x, threads=1)
    (step,) = [step for step in network.plan.steps if isinstance(step, Sparse)]
    tables = network.batch_plan(1).tables(step)
    expected, (read, write) = network(x), os.pipe()
    gc.collect()  # a collection in the child would write to all objects
    child = os.fork()
    if child == 0:
        before = private_memory()
        same = torch.equal(network(x), expected)
        os.write(write, f"{same} {private_memory() - before}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    same, growth = os.read(read, 100).split()
    assert same == b"True"
    assert 10 * int(growth) < sum(table.nbytes for table in tables.values())
