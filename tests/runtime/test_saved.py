"""Files of compiled networks."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runtime_cases import DENSE, SPARSE, compiled, conv, error, pruned
from torch import nn

import torch_feather as feather
from torch_feather import ConfigurationError, FileFormatError, StateError
from torch_feather.runtime import InputError, saved
from torch_feather.runtime.kernels import build
from torch_feather.runtime.stored_weights import (
    check_dtype,
    load_taps,
    load_weight,
    store_taps,
    store_weight,
)
from torch_feather.runtime.taps import Taps


class Net(nn.Module):
    """Steps of every kind, dense and sparse layers, and two named results."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.c = nn.LayerNorm(8), nn.Linear(8, 8)
        self.other = nn.Conv2d(8, 4, 3)
        self.register_buffer("scale", torch.tensor([float("inf"), 2.0]))

    def forward(self, x):
        x = F.silu(self.a(x))
        y = F.max_pool2d(self.b(x) * x.mean((2, 3), keepdim=True).sigmoid(), 3, 1, 1)
        z = self.c(self.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        z = torch.cat([z, self.b(y)], 1)[:, 4:12] - y.tanh()
        return {"map": self.other(z).softmax(1), "rest": (z.flatten(1).clamp(max=self.scale[0]),)}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return compiled(pruned(Net()), torch.randn(2, 3, 12, 9))


def same(a, b):
    a, b = (torch.utils._pytree.tree_flatten(v) for v in (a, b))
    assert a[1] == b[1]
    for x, y in zip(a[0], b[0], strict=True):
        assert torch.equal(x, y)
        assert x.stride() == y.stride()


@pytest.fixture
def path(network, tmp_path):
    path = tmp_path / "net.compiled"
    feather.save_compiled(network, path, batch_sizes=[1, 2, 5])
    return path


def test_a_loaded_network_computes_the_same_bits(network, path):
    loaded = feather.load_compiled(path)
    for batch in (2, 1, 5):
        x = torch.randn(batch, 3, 12, 9)
        same(loaded(x), network(x))
    images = torch.randn(2, 3, 12, 9).to(memory_format=torch.channels_last)
    assert torch.equal(loaded(images)["map"], network(images)["map"])
    assert loaded.tuning == network.tuning
    assert repr(loaded) == repr(network)
    for batch in (3, 0):
        with pytest.raises(InputError, match="batch"):
            loaded(torch.randn(batch, 3, 12, 9))
    with pytest.raises(InputError, match=r"inputs \(batch, 3, 12, 9\)"):
        loaded(torch.randn(2, 3, 9, 12))


def test_a_loaded_network_can_be_saved(network, path, tmp_path):
    again = tmp_path / "again.compiled"
    feather.save_compiled(feather.load_compiled(path), again)
    x = torch.randn(1, 3, 12, 9)
    same(feather.load_compiled(again, threads=2)(x), network(x))


@pytest.mark.slow
def test_another_process_loads_without_compiling(path, network):
    """It neither exports the model nor calls LLVM's optimizer."""
    x = torch.linspace(-1, 1, 2 * 3 * 12 * 9).view(2, 3, 12, 9)
    code = f"""
import torch, torch_feather as feather
from torch_feather.runtime.kernels import build
def fail(*args): raise AssertionError
build._optimized = torch.export.export = fail
network = feather.load_compiled({str(path)!r})
x = torch.linspace(-1, 1, 2 * 3 * 12 * 9).view(2, 3, 12, 9)
print(float(network(x)["map"].double().sum()), float(network(x)["rest"][0].double().sum()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = network(x)
    expected = [float(found["map"].double().sum()), float(found["rest"][0].double().sum())]
    assert [float(n) for n in run.stdout.split()] == expected


def test_tokens_and_named_inputs(tmp_path):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 32), nn.Linear(32, 24)

        def forward(self, ids, mask):
            return self.out(self.embed(ids) * mask[..., None]).relu()

    given = {"ids": torch.randint(20, (2, 7)), "mask": torch.rand(2, 7)}
    network = compiled(pruned(Text()), given)
    feather.save_compiled(network, tmp_path / "text")
    loaded = feather.load_compiled(tmp_path / "text")
    assert torch.equal(loaded(**given), network(**given))
    with pytest.raises(InputError, match="ids, mask, by name"):
        loaded(given["ids"], given["mask"])


def change(path, function, damage):
    """Rewrite a file with another header, as another program would or as damage would leave it."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()[saved.KEY])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    function(header, arrays)
    if not damage:
        header["sha256"] = saved.checksum(header, arrays)
    save_file(arrays, path, {saved.KEY: json.dumps(header)})


UNFIT = {
    "another format": (lambda h, _: h.update(format=99), "format 99"),
    "another system": (
        lambda h, _: h.update(processor=["arm64-apple-macosx", "apple-m1", ""]),
        "machine code for apple-m1",
    ),
    "a newer processor": (
        lambda h, _: h["processor"].__setitem__(2, h["processor"][2] + ",+future"),
        "lacks future",
    ),
    "another version": (lambda h, _: h.update(fingerprint="0"), "another version"),
    "no plan": (lambda h, _: h.pop("plan"), "damaged"),
    "no processor": (lambda h, _: h.pop("processor"), "not a file of save_compiled"),
}
DAMAGE = {
    "other weights": lambda _, a: a["array.0"].fill(0),
    "other strides": lambda h, _: h["strides"].clear(),
    "another chunk size": lambda h, _: h.update(plan_chunk_size=77),
    "no plan": lambda h, _: h.pop("plan"),
    "another type": lambda _, a: a.update({"array.0": a["array.0"].view(np.int32)}),
    "another shape": lambda _, a: a.update({"array.0": a["array.0"].reshape(-1, 1)}),
}


@pytest.mark.parametrize("name", UNFIT)
def test_files_that_do_not_fit_are_rejected(name, path):
    function, message = UNFIT[name]
    change(path, function, damage=False)
    with pytest.raises(FileFormatError, match=message):
        feather.load_compiled(path)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_rejected(name, path):
    change(path, DAMAGE[name], damage=True)
    with pytest.raises(FileFormatError, match="checksum differs"):
        feather.load_compiled(path)


def test_files_of_an_application_without_source_files(monkeypatch, tmp_path):
    """Their fingerprint is that of the emitted functions."""
    monkeypatch.setattr(build.resources, "files", lambda _: tmp_path)
    found = build.fingerprint()
    assert found == build.fingerprint()
    monkeypatch.setattr(build, "emit_run", lambda _: iter(["; another function"]))
    assert found != build.fingerprint()


def test_line_ends_of_the_source_do_not_matter(monkeypatch, tmp_path):
    before = build.fingerprint()
    for file in build.resources.files(build.__package__).iterdir():
        if file.name.endswith(".py"):
            text = file.read_text("utf-8")
            (tmp_path / file.name).write_text(text, encoding="utf-8", newline="\r\n")
    monkeypatch.setattr(build.resources, "files", lambda _: tmp_path)
    assert build.fingerprint() == before


def test_numbers_without_dimensions_keep_their_shape(tmp_path):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = pruned(nn.Linear(8, 8))
            self.register_buffer("c", torch.tensor(2.0))

        def forward(self, x):
            return torch.sin(self.layer(x)), self.c * 3

    model, x = Constant().eval(), torch.randn(2, 8)
    feather.save_compiled(compiled(model, x), tmp_path / "x")
    found = feather.load_compiled(tmp_path / "x")(x)
    assert found[1].shape == ()
    assert float(found[1]) == 6.0


@pytest.mark.parametrize("threads", [0, -1, 1.5])
def test_threads_are_checked_before_the_file_is_read(threads):
    with pytest.raises(InputError, match="threads"):
        feather.load_compiled("missing", threads=threads)


def test_other_files_are_rejected(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        feather.load_compiled(path)
    path.write_bytes(b"no network")
    with pytest.raises(FileFormatError, match="not a file of save_compiled"):
        feather.load_compiled(path)


def test_networks_that_cannot_be_saved(network, tmp_path):
    with pytest.raises(StateError, match="requires a network of compile_sparse"):
        feather.save_compiled(nn.Linear(2, 2), tmp_path / "x")

    class Branches(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    with pytest.raises(StateError, match="cannot hold"):
        feather.save_compiled(compiled(Branches(), torch.ones(2, 3)), tmp_path / "x")
    fixed = compiled(pruned(nn.Linear(4, 4)), torch.ones(2, 4))
    with pytest.raises(InputError, match="does not accept a batch of 0"):
        feather.save_compiled(fixed, tmp_path / "x", batch_sizes=[0])
    assert not (tmp_path / "x").exists()


def test_the_file_names_its_kernels(path):
    """Only the kernels that the network calls are stored, besides the base functions."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()[saved.KEY])
        code = file.get_tensor("code.kernels").tobytes()
    assert 0 < len(header["kernels"]) < 12
    assert all(name.encode() in code for name in header["kernels"])


ROUNDING = {  # largest error relative to the weight; of int8: to the largest one of its channel
    torch.float32: 0.0,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.int8: 1 / 254,
}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["taps", "sparse", "dense"])
def test_stored_weights(kind, groups, dtype):
    """Zeros stay zeros, and values are rounded to the nearest number of the type."""
    torch.manual_seed(0)
    layer = conv(8, 6, (3, 2), groups=groups, sparsity=0.0 if kind == "dense" else 0.9)
    weight = layer.weight
    weight[1] *= 0.1
    weight[2, 0, 0, 0] = 0.0
    weight[3] *= kind == "dense"
    if kind == "taps":
        taps = load_taps(layer, store_taps(layer, Taps.from_layer(layer), dtype))
        expected = Taps.from_layer(layer)
        for name in ("starts", "key", "phase", "dy", "dx"):
            assert (getattr(taps, name) == getattr(expected, name)).all()
        found = torch.zeros_like(weight)
        found[weight != 0] = torch.from_numpy(taps.values)
    else:
        stored = store_weight("weight", weight.numpy(), dtype)
        assert ("positions" in stored.arrays) == (kind == "sparse")
        found = load_weight(tuple(weight.shape), stored)
    assert not found[weight == 0].any()
    scale = weight.abs()
    if dtype == torch.int8:
        scale = scale.amax((1, 2, 3), keepdim=True).expand_as(scale)
    assert ((found - weight).abs() <= ROUNDING[dtype] * scale * (1 + 1e-6)).all()
    if dtype != torch.float32:
        assert not torch.equal(found, weight)


def test_stored_weights_out_of_range():
    large = torch.tensor([[1e6, 1.0]])
    for weight, dtype in ((large, torch.float16), (large / 0, torch.int8)):
        with pytest.raises(ConfigurationError, match=r"head\.weight has weights"):
            store_weight("head.weight", weight.numpy(), dtype)
    for dtype in (torch.float64, torch.int32, "int8"):
        with pytest.raises(ConfigurationError, match="cannot be stored as"):
            check_dtype(dtype)
    tiny = torch.tensor([[1e-30, -1e-30]])
    found = load_weight((1, 2), store_weight("w", tiny.numpy(), torch.float16))
    assert torch.equal(found.sign(), tiny.sign())  # not 0


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(24, 48, 2, bidirectional=True)
        self.gru = nn.GRU(96, 40, batch_first=True)

    def forward(self, x):
        return self.gru(self.lstm(x.transpose(0, 1))[0].transpose(0, 1))[0]


NARROW = {
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)), (3, 9, 9)
    ),
    "recurrent": (Recurrent, (5, 24)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("tuning", [SPARSE, DENSE])
@pytest.mark.parametrize("name", NARROW)
def test_files_of_narrow_weights(name, tuning, dtype, tmp_path):
    """They are smaller, and compute what a model with rounded weights computes."""
    from safetensors.numpy import load_file

    torch.manual_seed(0)
    create, shape = NARROW[name]
    model, x = pruned(create()), torch.randn(2, *shape)
    network = compiled(model, x, tuning)
    feather.save_compiled(network, tmp_path / "exact")
    feather.save_compiled(network, tmp_path / "narrow", dtype=dtype)
    saving = (tmp_path / "exact").stat().st_size - (tmp_path / "narrow").stat().st_size
    weights = [w for w in model.parameters() if w.dim() > 1]
    nonzeros = sum(int(w.count_nonzero()) for w in weights)
    arrays = load_file(tmp_path / "exact").items()
    assert sum(a.nbytes for key, a in arrays if "code" not in key) < 5.5 * nonzeros + 8000
    rows = sum(len(w) for w in weights)  # each has a scale
    assert saving > 0.9 * nonzeros * (4 - dtype.itemsize) - 4 * rows - 1000
    with torch.no_grad():
        for w in weights:
            stored = store_weight("w", w.numpy(), dtype)
            w.copy_(load_weight(tuple(w.shape), stored))
    loaded = feather.load_compiled(tmp_path / "narrow")
    assert error(loaded(x), model(x)) < 1e-6
    feather.save_compiled(loaded, tmp_path / "again")
    assert torch.equal(feather.load_compiled(tmp_path / "again")(x), loaded(x))
