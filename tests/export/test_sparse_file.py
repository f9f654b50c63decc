"""Sparse files are lossless and small, and loading fails without side effects."""

import json
import os
import re
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_feather as feather
from torch_feather import ConfigurationError, FeatherWarning, FileFormatError, StateError
from torch_feather.export import SparseFile, manifest
from torch_feather.export.gaps import decode, encode
from torch_feather.prunable import find_prunable

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(BITS[tensor.dtype.itemsize])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def random_sparse(shape, density, dtype=torch.float32):
    values = torch.randn(shape) * (torch.rand(shape) < density)
    return (values + 0.0).to(dtype)  # adding 0.0 converts -0.0, which the mask produces


def prune(model, sparsity):
    """Prune by global magnitude."""
    weights = [item.parameter for item in find_prunable(model)]
    magnitudes = torch.cat([w.detach().abs().reshape(-1) for w in weights])
    tau = magnitudes.kthvalue(round(sparsity * len(magnitudes))).values
    with torch.no_grad():
        for w in weights:
            w.masked_fill_(w.abs() <= tau, 0.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def model():
    model = feather.models.create("resnet8", 10).eval()
    prune(model, 0.95)
    return model


# Gaps


@given(st.lists(st.integers(0, 200_000), unique=True).map(sorted), st.integers(0, 10))
def test_decoding_returns_the_encoded_positions(positions, beyond):
    positions = np.array(positions, dtype=np.int64)
    codes, width = encode(positions)
    size = (int(positions[-1]) + 1 if len(positions) else 0) + beyond
    assert np.array_equal(decode(codes, width, len(positions), size), positions)


@pytest.mark.parametrize("width", range(1, 17))
@pytest.mark.parametrize("largest", [False, True])
def test_codes_of_every_width_are_decoded_part_by_part(width, largest):
    """Three parts; the largest codes have the largest sum of a part."""
    escape = 2**width - 1
    codes = np.random.default_rng(width).integers(0, escape + 1, 70_001)
    if largest:
        codes[:-1] = escape - 1
    bits = (codes[:, None] >> np.arange(width)) & 1
    packed = np.packbits(bits.reshape(-1).astype(np.uint8), bitorder="little")
    if len(codes) * width % 8:
        packed[-1] |= 0xFF << len(codes) * width % 8 & 0xFF  # escapes
    is_value = codes != escape
    positions = (np.cumsum(codes + is_value) - 1)[is_value]
    found = decode(packed, width, len(positions), int(positions[-1]) + 1)
    assert np.array_equal(found, positions)


@pytest.mark.parametrize("width", [-1, 0, 17, 2**40])
def test_codes_of_other_widths_do_not_exist(width):
    with pytest.raises(ValueError, match=f"codes of {width} bits"):
        decode(np.zeros(8, np.uint8), width, 0, 8)


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2, 0.1, 0.05, 0.01, 0.001, 0.0001])
@pytest.mark.parametrize("rows", [1, 16, 1024])
def test_gaps_are_never_longer_than_a_bitmask_or_the_columns_of_csr(density, rows):
    mask = np.random.default_rng(0).random((rows, 2**18 // rows)) < density
    count = int(mask.sum())
    bitmask = mask.size // 8
    wide = 4 if mask.shape[1] > 2**16 else 2
    csr = wide * count + 4 * (rows + 1)
    assert len(encode(np.flatnonzero(mask))[0]) <= min(bitmask, csr)


def test_decoding_needs_little_more_memory_than_its_result():
    codes = np.full(2**20, 255, np.uint8)  # 8 million codes: nothing but zeros
    codes[-1] = 254
    tracemalloc.start()
    positions = decode(codes, 1, 1, 2**23)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert positions.tolist() == [2**23 - 8]
    assert peak < 4 * 2**20


# Round trips

SPECIAL = torch.tensor(
    [0x7FC00001, 0x7F800001, -1, 0x7F800000, -0x800000, -0x80000000, 1, 0], dtype=torch.int32
).view(torch.float32)  # NaNs with payloads, infinities, -0.0, the smallest number, 0.0

TENSORS = {
    "special values": torch.cat([SPECIAL, torch.zeros(600)]),
    "special values, dense": SPECIAL,
    "fp16": random_sparse((64, 64), 0.1, torch.float16),
    "bf16": random_sparse((64, 64), 0.1, torch.bfloat16),
    "fp64": random_sparse((64, 64), 0.1, torch.float64),
    "fp8": random_sparse((64, 64), 0.1, torch.float8_e4m3fn),
    "complex": random_sparse((64, 64), 0.1, torch.complex64),
    "bool": torch.rand(64, 64) < 0.02,
    "int8": (torch.rand(64, 64) < 0.02).to(torch.int8) * -3,
    "int64": (torch.rand(64, 64) < 0.02).long() * 2**40,
    "uint16": (torch.rand(64, 64) < 0.02).to(torch.uint16),
    "all zero": torch.zeros(1000, 1000),
    "no zero": torch.ones(30, 30),
    "one": torch.eye(1, 100_000),
    "last": torch.eye(1, 100_000).flip(1).contiguous(),
    "wide row": random_sparse((2, 70_000), 0.001),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(7),
    "scalar zero": torch.tensor(0.0),
    "channels last": random_sparse((32, 16, 3, 3), 0.05).to(memory_format=torch.channels_last),
    "transposed": random_sparse((300, 20), 0.05).T,
    "strided": random_sparse((64, 64), 0.05)[::2, ::3],
    "expanded": torch.zeros(1, 1).expand(100, 100),
    "1d": random_sparse((5000,), 0.01),
    "5d": random_sparse((8, 4, 3, 3, 3), 0.1),
}


def without_negative_zeros(tensor):
    wide = tensor.double() if tensor.is_floating_point() else tensor
    return torch.where(wide == 0, torch.zeros_like(tensor), tensor)


def test_every_tensor_is_bitwise_identical_except_for_signs_of_zeros(path):
    feather.save_sparse(TENSORS, path)
    with SparseFile(path) as file:
        assert file.entries.keys() == TENSORS.keys()
        for name, given in TENSORS.items():
            entry, tensor = file.entries[name], without_negative_zeros(given)
            assert same_bits(file.tensor(name), tensor), name
            assert (entry.shape, entry.dtype) == (tensor.shape, tensor.dtype)
            assert entry.nonzeros == bits(tensor).count_nonzero()
            if entry.layout == "gaps":
                assert entry.bytes < tensor.numel() * tensor.itemsize
            positions, values = file.nonzeros(name)
            assert torch.equal(positions, bits(tensor).ne(0).nonzero().flatten()), name
            assert same_bits(values, tensor.contiguous().reshape(-1)[positions]), name


def test_the_same_model_gives_the_same_file(model, path, tmp_path):
    feather.save_sparse(model, path, metadata={"a": 1, "b": 2})
    feather.save_sparse(model.state_dict(), tmp_path / "other", metadata={"a": 1, "b": 2})
    assert path.read_bytes() == (tmp_path / "other").read_bytes()


def test_a_loaded_model_has_identical_outputs(model, path):
    feather.save_sparse(model, path)
    other = feather.models.create("resnet8", 10).eval()
    assert feather.load_sparse(path, other) is other
    x = torch.randn(2, 3, 8, 8)
    assert same_bits(model(x), other(x))
    assert feather.sparsity(other) == feather.sparsity(model)


def test_a_model_with_an_attached_sparsifier_is_stored_sparse(path):
    model = nn.Linear(100, 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.9, total_steps=4)
    for _ in range(4):
        model(torch.randn(8, 100)).square().mean().backward()
        optimizer.step()
    feather.save_sparse(model, path)
    with SparseFile(path) as file:
        assert file.sparsity == file.entries["weight"].sparsity == 0.9
        assert file.entries["weight"].layout == "gaps"
        assert torch.equal(file.tensor("weight"), model.weight)
    with torch.no_grad():
        model.weight.zero_()
    feather.load_sparse(path, model)
    sparsifier.finalize()
    assert feather.sparsity(model) == 0.9


def test_storing_latent_weights_warns(path):
    with pytest.warns(FeatherWarning, match="not sparse: .* latent weights"):
        feather.save_sparse(nn.Linear(100, 100), path)
    with SparseFile(path) as file:
        assert file.sparsity == 0


def test_a_small_sparse_model_does_not_warn(path, recwarn):
    weight = random_sparse((5, 5), 0.0)
    weight[0, :2] = 1.0
    feather.save_sparse({"weight": weight}, path)
    with SparseFile(path) as file:
        assert file.entries["weight"].layout == "dense"  # the header would be larger than the zeros
        assert file.sparsity == 0.92
    assert not recwarn.list


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOATS += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("density", [0.05, 1.0])  # layouts gaps and dense
def test_the_sign_of_a_zero_changes_nothing(path, tmp_path, dtype, density, recwarn):
    keep, values = torch.rand(100, 100) < density, torch.randn(100, 100)
    keep[0, :9] = False
    product, other = values * keep, torch.where(keep, values, 0.0)  # -0.0 and 0.0; only 0.0
    assert not same_bits(product, other)
    model, plain = nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)
    model.weight.data, plain.weight.data = product.to(dtype), other.to(dtype)
    feather.save_sparse(model, path)
    feather.save_sparse(plain, tmp_path / "other")
    assert path.read_bytes() == (tmp_path / "other").read_bytes()
    assert same_bits(model.weight.detach(), product.to(dtype))  # the model is not changed
    with SparseFile(path) as file:
        entry = file.entries["weight"]
        assert entry.layout == ("gaps" if density < 1 else "dense")
        assert entry.nonzeros == len(file.nonzeros("weight")[0]) == (plain.weight != 0).sum()
    assert feather.load_sparse(path, model).weight.equal(plain.weight)
    assert not [w for w in recwarn.list if "not sparse" not in str(w.message)]


def test_negative_zeros_of_version_0_1_are_zeros(path):
    """Version 0.1 stored -0.0 in the layout gaps like nonzero values."""
    weight = torch.zeros(40, 50)
    weight[0, :3] = torch.tensor([-0.0, 2.0, -0.0])
    positions = np.array([0, 1, 2])
    codes, width = encode(positions)
    parts = {"w:values": weight[0, :3].clone(), "w:gaps": torch.from_numpy(codes)}
    crc = manifest.checksum(weight.dtype, weight.shape, parts.values())
    tensors = {"w": {"layout": "gaps", "crc": crc, "shape": [40, 50], "width": width}}
    path.write_bytes(save(parts, manifest.write(tensors, {}, 1999 / 2000, {})))
    with SparseFile(path) as file:
        assert file.sparsity == 1999 / 2000
        assert same_bits(file.tensor("w"), weight)
        found, values = file.nonzeros("w")
    assert (found.tolist(), values.tolist()) == ([1], [2.0])


# Loading into other types

NARROW = [
    (torch.float64, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float8_e4m3fn),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float8_e5m2),
]


class Holder(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.clone())


@pytest.mark.parametrize(("wide", "narrow"), NARROW, ids=str)
def test_no_nonzero_value_becomes_zero_in_a_narrower_type(path, wide, narrow):
    smallest = torch.finfo(wide).smallest_normal
    values = [[smallest, -smallest, 1.0, -0.5, torch.inf, torch.nan, 0.0, -0.0]]
    values = torch.tensor(values, dtype=wide)
    if narrow == torch.float8_e4m3fn:
        values[0, 4] = 2.0  # this type has no infinity
    feather.save_sparse({"weight": values, "bias": values[0]}, path)
    model = Holder(weight=values.to(narrow).zero_(), bias=values[0].to(narrow).zero_())
    feather.load_sparse(path, model)
    least = model.weight.new_zeros(1)
    bits(least)[0] = 1  # the smallest number of the type
    for found in (model.weight[0], model.bias):
        assert found.dtype == narrow
        expected = values[0].to(narrow).double()
        if expected[0] == 0:
            expected[0], expected[1] = least.double(), -least.double()
        assert torch.equal(found.double().nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(("wide", "narrow"), NARROW, ids=str)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_values_out_of_the_range_of_the_model_are_errors(path, wide, narrow, name):
    values = {"weight": torch.ones(3, 4, dtype=wide), "bias": torch.ones(3, dtype=wide)}
    values[name].view(-1)[1] = torch.finfo(wide).max
    feather.save_sparse(values, path)
    model = Holder(**{n: torch.zeros(v.shape).to(narrow) for n, v in values.items()})
    message = rf"does not fit Holder: {name} has values out of the range of {narrow}.*wider type"
    with pytest.raises(StateError, match=message):
        feather.load_sparse(path, model)
    assert not any(bits(tensor).any() for tensor in model.state_dict().values())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(100, 100, bias=False)
        self.two = nn.Linear(100, 100, bias=False)
        self.two.weight = self.one.weight


def test_tied_tensors_are_stored_once_and_load_into_tied_and_untied_models(path):
    model = Tied()
    model.one.weight.data = random_sparse((100, 100), 0.1)
    feather.save_sparse(model, path)
    with SparseFile(path) as file:
        assert file.entries["two.weight"] is file.entries["one.weight"]
        assert torch.equal(file.tensor("two.weight"), model.one.weight)
    assert path.stat().st_size < 6000
    untied = nn.ModuleDict({n: nn.Linear(100, 100, bias=False) for n in ("one", "two")})
    for other in (Tied(), untied):
        feather.load_sparse(path, other)
        assert torch.equal(other.state_dict()["two.weight"], model.one.weight)


def shared(**views):
    """Return a module whose buffers share memory."""
    model = nn.Module()
    for name, view in views.items():
        model.register_buffer(name, view)
    return model


BASE = torch.zeros(60, 60)
SHARED = {
    "the same": lambda x: {"a": x, "b": x},
    "transposed": lambda x: {"a": x, "b": x.T},
    "a part": lambda x: {"a": x, "b": x[20:40]},
    "reshaped": lambda x: {"a": x, "b": x.view(30, 120)},
    "overlapping": lambda x: {"a": x[:40], "b": x[20:]},
    "three": lambda x: {"a": x[:20], "b": x[40:], "c": x[10:50]},
    "other type": lambda x: {"a": x, "b": x.view(torch.int32)},
    "within itself": lambda x: {"a": x.view(-1).as_strided((50, 50), (2, 1)), "b": x[:0]},
}


@pytest.mark.filterwarnings("ignore:This model is not sparse")
@pytest.mark.parametrize("views", SHARED.values(), ids=SHARED)
def test_values_of_memory_that_a_model_shares_agree_or_are_errors(path, views):
    dense = views(torch.randn(60, 60))  # stored in the layout dense
    feather.save_sparse(dense, path)
    with SparseFile(path) as file:
        assert all(torch.equal(file.tensor(name), value) for name, value in dense.items())
    source = views(random_sparse((60, 60), 0.1))
    feather.save_sparse(source, path)
    tied = shared(**views(BASE.clone()))
    feather.load_sparse(path, tied)  # agrees: saved from such a model
    for name, value in source.items():
        assert torch.equal(tied.state_dict()[name], value), name

    separate = {n: random_sparse(v.shape, 0.1).to(v.dtype) for n, v in source.items()}
    separate = {n: v.masked_fill(v == 0, 3) for n, v in separate.items()}
    if views is SHARED["other type"]:
        separate["b"] += 1
    feather.save_sparse(separate, path)
    tied = shared(**views(BASE.clone()))
    with pytest.raises(StateError, match="share memory in the model, but have different values"):
        feather.load_sparse(path, tied)
    assert not any(tensor.any() for tensor in tied.state_dict().values())


@pytest.mark.filterwarnings("ignore:This model is not sparse")
def test_an_expanded_tensor_of_a_model_is_an_error_before_anything_is_loaded(path):
    feather.save_sparse({"a": torch.ones(9), "b": torch.ones(30, 30)}, path)
    model = shared(a=torch.zeros(9), b=torch.zeros(1, 1).expand(30, 30))
    with pytest.raises(StateError, match="b share memory"):
        feather.load_sparse(path, model)
    assert not model.a.any()


def test_parts_of_one_memory_that_do_not_overlap_are_loaded(path):
    source = {"a": random_sparse((60, 30), 0.1), "b": random_sparse((60, 30), 0.1)}
    feather.save_sparse(source, path)
    memory = BASE.clone()
    feather.load_sparse(path, shared(a=memory[:, :30], b=memory[:, 30:]))
    assert torch.equal(memory, torch.cat([source["a"], source["b"]], 1))


def test_conjugated_and_negated_views_are_not_tied_to_their_base(path):
    z = random_sparse((20, 20), 0.1, torch.complex64) * (1 + 2j)
    state = {"z": z, "conjugate": z.conj(), "negative": torch._neg_view(z), "both": z.conj().imag}
    feather.save_sparse(state, path)
    with SparseFile(path) as file:
        for name, tensor in state.items():
            assert torch.equal(file.tensor(name), tensor), name


def test_wrapped_models_have_plain_names(model, path):
    inner = nn.Sequential(torch.compile(nn.Linear(50, 50)), nn.ReLU())
    inner[0].weight.data = random_sparse((50, 50), 0.1)
    feather.save_sparse(torch.compile(inner), path)
    with SparseFile(path) as file:
        assert set(file.entries) == {"0.weight", "0.bias"}
    for other in (
        nn.Sequential(nn.Linear(50, 50)),
        torch.compile(nn.Sequential(nn.Linear(50, 50))),
    ):
        feather.load_sparse(path, other)
        assert torch.equal(other.state_dict().popitem(last=True)[1], inner[0].bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_converted_on_request(model, path, dtype):
    feather.save_sparse(model, path, dtype=dtype)
    with SparseFile(path) as file:
        assert file.entries["conv1.weight"].dtype == dtype
        assert file.entries["bn1.running_var"].dtype == torch.float32
    other = feather.load_sparse(path, feather.models.create("resnet8", 10))
    for name, value in other.state_dict().items():
        expected = model.state_dict()[name]
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected.to(dtype) if expected.dim() >= 2 else expected)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_weights_too_small_for_a_type_stay_nonzero(path, dtype):
    weight = random_sparse((60, 60), 0.1)
    weight[0, :3] = torch.tensor([1e-42, -1e-42, 0.5])
    feather.save_sparse({"weight": weight}, path, dtype=dtype)
    with SparseFile(path) as file:
        stored = file.tensor("weight").float()
        assert file.sparsity == 1 - int(weight.count_nonzero()) / 3600
    assert torch.equal(stored.sign(), weight.sign())
    assert stored[0, 0] == -stored[0, 1]
    assert stored[0, 0] <= torch.finfo(dtype).smallest_normal
    assert stored[0, 2] == 0.5


def test_names_may_look_like_those_of_parts(path):
    state = {
        "a": random_sparse((100, 100), 0.1),
        "a:values": torch.ones(3),
        "b:gaps": torch.ones(2),
    }
    feather.save_sparse(state, path)
    with SparseFile(path) as file:
        assert {entry.layout for entry in file.entries.values()} == {"dense"}
        assert all(torch.equal(file.tensor(name), value) for name, value in state.items())


@pytest.mark.gpu
def test_models_on_a_gpu(model, path):
    model.cuda()
    feather.save_sparse(model, path)
    for device in ("cpu", "cuda"):
        other = feather.load_sparse(path, feather.models.create("resnet8", 10).to(device))
        for name, value in other.state_dict().items():
            assert value.device.type == device
            assert torch.equal(value.cpu(), model.state_dict()[name].cpu())


# Sizes


@pytest.mark.parametrize("network", ["resnet20", "timm/resnet50"])
def test_files_are_as_small_as_promised(network, path):
    model = feather.models.create(network, 100)
    for tensor in model.state_dict().values():
        if tensor.dim() == 1:
            tensor.uniform_(0.1, 1)  # norms as after training, without zeros
    dense = sum(item.parameter.nbytes for item in find_prunable(model))
    others = sum(tensor.nbytes for tensor in model.state_dict().values()) - dense
    for sparsity, least in ((0.95, 12), (0.99, 45)):
        prune(model, sparsity)
        feather.save_sparse(model, path)
        assert path.stat().st_size - others <= dense / least  # including names and header


def test_the_header_has_shapes_sparsity_and_metadata(model, path, monkeypatch):
    feather.save_sparse(model, path, metadata={"method": "feather", "config": {"seed": 1}})
    monkeypatch.setattr(SparseFile, "_read", None)
    with SparseFile(path) as file:
        assert file.metadata == {"method": "feather", "config": {"seed": 1}}
        assert file.sparsity == feather.sparsity(model)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        assert {name: entry.shape for name, entry in file.entries.items()} == shapes
        for item in find_prunable(model):
            zeros = item.parameter.numel() - int(item.parameter.count_nonzero())
            entry = file.entries[item.name]
            assert entry.size - entry.nonzeros == zeros
            assert entry.sparsity == zeros / entry.size


# Errors


def edited(change):
    """Return a model that differs from the one in the file."""
    model = feather.models.create("resnet8", 10)
    change(model)
    return model


def integer_bias(model):
    del model.fc.bias
    model.fc.register_buffer("bias", torch.ones(10, dtype=torch.int64))


def shard(model):
    model.fc.weight = nn.Parameter(model.fc.weight.detach().as_subclass(Sharded))


class ExtraState(nn.Linear):
    def get_extra_state(self):
        return {}


MISFITS = {
    "sharded": (shard, r"fc\.weight is sharded in the model; load the file before"),
    "missing": (lambda m: m.register_buffer("extra", torch.ones(1)), r"missing key.*: extra"),
    "unexpected": (lambda m: m.__delattr__("bn1"), r"unexpected key.*: bn1\.bias, .*"),
    "shape": (
        lambda m: m.register_module("fc", nn.Linear(128, 7)),
        r"fc.weight has shape \[10, 128\] in the file, \[7, 128\] in the model",
    ),
    "kind": (
        integer_bias,
        r"fc\.bias is torch.float32 in the file, torch.int64 in the model",
    ),
    "meta": (lambda m: m.fc.to("meta"), r"fc\.(weight|bias) has no values in the model"),
    "layout": (
        lambda m: m.fc.register_parameter("weight", nn.Parameter(m.fc.weight.to_sparse())),
        r"fc\.weight has layout torch\.sparse_coo in the model",
    ),
    "extra state": (
        lambda m: setattr(m, "fc", ExtraState(128, 10)),
        r"missing key.*: fc\._extra_state",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_a_model_that_does_not_fit_is_not_changed(model, path, change, message):
    feather.save_sparse(model, path)
    other = edited(change)

    def values():
        tensors = {n: v for n, v in other.state_dict().items() if isinstance(v, torch.Tensor)}
        return {n: v.clone() for n, v in tensors.items() if not (v.is_meta or v.is_sparse)}

    before = values()
    with pytest.raises(StateError, match=message):
        feather.load_sparse(path, other)
    for name, value in values().items():
        assert same_bits(value, before[name])


def test_a_model_is_not_changed_if_one_tensor_of_the_file_is_damaged(model, path):
    feather.save_sparse(model, path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    offset = json.loads(data[8:start])["layer3.0.conv2.weight:gaps"]["data_offsets"][0]
    path.write_bytes(data[: start + offset] + bytes(8) + data[start + offset + 8 :])
    other = feather.models.create("resnet8", 10)
    before = {n: value.clone() for n, value in other.state_dict().items()}
    with pytest.raises(FileFormatError, match=r"conv2\.weight: the checksum of the data is wrong"):
        feather.load_sparse(path, other)
    assert all(same_bits(value, before[n]) for n, value in other.state_dict().items())


class Sharded(torch.Tensor):
    """Has the attribute by which a DTensor is recognized."""

    full_tensor = None


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, that supports nothing."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError("no detach")


def fake():
    with FakeTensorMode():
        return torch.ones(3)


BAD_INPUT = {
    "no model": ([1, 2], "requires a module or a state dict, got list"),
    "no tensor": ({"a": 3}, "'a' is of type int"),
    "no name": ({1: torch.ones(1)}, "1 is of type"),
    "meta": ({"a": torch.ones(2, device="meta")}, "a is on the meta device"),
    "sharded": ({"a": torch.ones(2).as_subclass(Sharded)}, "a is sharded. Gather the state first"),
    "layout": ({"a": torch.ones(2, 2).to_sparse()}, r"a is of layout torch\.sparse_coo"),
    "nested": (
        {"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        "a is nested: it has no dense values",
    ),
    "huge": (
        {"a": torch.ones(2**12, 1).expand(2**12, 2**40)},
        r"a cannot be stored \(.*memory",
    ),
    "fake": ({"a": fake()}, r"a cannot be stored \(aten"),
    "wrapper": ({"a": Wrapper(torch.ones(3))}, r"a cannot be stored \(no detach"),
    "many dimensions": ({"a": torch.ones([1] * 65)}, r"a.* cannot be stored"),
    "huge and empty": (
        {"a": torch.empty(0, 2**31, 2**31)},
        "cannot be stored: a: shape .* is too large for a tensor",
    ),
    "dtype": ({"a": torch.ones(2, dtype=torch.complex128)}, r"a is of torch\.complex128"),
    "name of the header": ({"__metadata__": torch.ones(2)}, "__metadata__: the name is not unique"),
    "surrogate": ({"\ud800": torch.ones(2)}, r"'\\ud800' is not valid Unicode .* Rename it"),
    "lazy": (nn.LazyLinear(3), "weight is of a lazy layer .* Call the model once"),
    "lazy state dict": (nn.LazyLinear(3).state_dict(), "weight is of a lazy layer"),
    "name twice": (
        {"a.w": torch.ones(2), "a._orig_mod.w": torch.zeros(2)},
        r"a\.w, a\._orig_mod\.w: the name is not unique",
    ),
}


@pytest.mark.parametrize(("given", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_unsupported_input_is_an_error_and_the_old_file_is_kept(given, message, path):
    path.write_text("old content")
    with pytest.raises(ConfigurationError, match=message):
        feather.save_sparse(given, path)
    assert path.read_text() == "old content"


def nested(depth):
    return {"a": nested(depth - 1)} if depth else {}


class Itself(dict):
    def __init__(self):
        self["self"] = self


BAD_METADATA = [{"a": torch.ones(1)}, {"a": float("nan")}, {1: "a"}, {"a": [{None: 1}]}]
BAD_METADATA += [{1: "a", "1": "b"}, [("a", 1)], "text", 3, {"a": 10**5000}, Itself()]
BAD_METADATA += [{"a": {1, 2}}, {"a": b"bytes"}, {"a": 1j}]


@pytest.mark.parametrize("metadata", BAD_METADATA, ids=range(len(BAD_METADATA)))
def test_metadata_must_consist_of_json_types(metadata, path):
    with pytest.raises(ConfigurationError, match="metadata must consist of JSON types"):
        feather.save_sparse({"a": random_sparse((99, 99), 0.1)}, path, metadata=metadata)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float32], ids=str)
def test_weights_out_of_the_range_of_a_type_are_errors(path, dtype):
    weight = random_sparse((99, 99), 0.1, torch.float64)
    weight[0, 0], weight[0, 1] = 1e60, torch.inf
    with pytest.raises(ConfigurationError, match=r"weight has weights out of the range"):
        feather.save_sparse({"weight": weight}, path, dtype=dtype)


@pytest.mark.parametrize("depth", [100, 900, 5000])
def test_metadata_can_be_read_or_is_an_error(path, depth):
    sys.setrecursionlimit(10**5)
    metadata = nested(depth)
    sys.setrecursionlimit(1000)
    with suppress(ConfigurationError):
        feather.save_sparse({"a": torch.eye(99)}, path, metadata=metadata)
        with SparseFile(path) as file:
            assert json.dumps(file.metadata) == json.dumps(metadata)
        return
    assert depth > 100
    assert not path.exists()


def test_metadata_is_returned_as_it_was(path):
    metadata = {"ü": ["\ud800", None, True, 1.5, -(10**40)], "": {"a": {}}, "\0": 1e-300}
    feather.save_sparse({"a": torch.eye(99)}, path, metadata=metadata)
    with SparseFile(path) as file:
        assert file.metadata == metadata


def test_a_header_too_large_to_be_read_is_an_error(path, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_HEADER", 10_000)
    with pytest.raises(ConfigurationError, match=r"at most 10,000 can be read\. Store less"):
        feather.save_sparse({"a": torch.eye(99)}, path, metadata={"a": "x" * 10_000})
    assert not path.exists()


BAD_DTYPES = ["float16", torch.int8, torch.complex64, torch.float8_e4m3fnuz, float, 16, [], {}]


@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=str)
def test_unsupported_types_are_errors(model, path, dtype):
    with pytest.raises(ConfigurationError, match=re.escape(f"cannot be stored as {dtype!r}")):
        feather.save_sparse(model, path, dtype=dtype)


def test_reading_from_a_closed_file_is_an_error(model, path):
    feather.save_sparse(model, path)
    with SparseFile(path) as file:
        pass
    file.close()
    with pytest.raises(StateError, match="is closed"):
        file.tensor("conv1.weight")


def test_a_full_disk_keeps_the_old_file_and_leaves_no_temporary_file(model, path, monkeypatch):
    path.write_text("old content")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        feather.save_sparse(model, path)
    assert path.read_text() == "old content"
    assert list(path.parent.iterdir()) == [path]


def test_the_error_names_the_missing_package(model, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'torch-feather\[files\]'"):
        feather.save_sparse(model, path)


BAD_PATHS = [None, 3, b"bytes", "", "a\0b", "\ud800", ["list"], torch.ones(1)]


@pytest.mark.parametrize("path", BAD_PATHS, ids=range(len(BAD_PATHS)))
def test_what_cannot_be_a_path_is_an_error(path):
    for call in (
        lambda: feather.save_sparse({"a": torch.eye(99)}, path),
        lambda: feather.load_sparse(path, nn.Linear(2, 2)),
        lambda: SparseFile(path),
    ):
        with pytest.raises(ConfigurationError, match="is not the path of a file"):
            call()


@pytest.mark.filterwarnings("ignore:This model is not sparse")
def test_a_lazy_model_is_an_error_and_can_be_loaded_after_a_call(path):
    feather.save_sparse(nn.Sequential(nn.Linear(50, 30)).apply(lambda m: None), path)
    model = nn.Sequential(nn.LazyLinear(30))
    with pytest.raises(StateError, match=r"0\.bias is of a lazy layer; call the model once"):
        feather.load_sparse(path, model)
    model(torch.zeros(1, 50))
    feather.load_sparse(path, model)


@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = {"directory": tmp_path, "pipe": tmp_path / "pipe", "device": Path("/dev/zero")}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(FileFormatError, match="not a regular file"):
        SparseFile(path)


@pytest.mark.filterwarnings("ignore:This model is not sparse")
def test_a_model_that_rejects_its_own_state_is_an_error(path):
    class Rejects(nn.Linear):
        def _load_from_state_dict(self, *_):
            raise ZeroDivisionError("no")

    feather.save_sparse(nn.Linear(9, 9), path)
    with pytest.raises(StateError, match="does not fit Rejects: no"):
        feather.load_sparse(path, Rejects(9, 9))


def test_a_missing_file_is_an_error(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        feather.load_sparse(tmp_path / "nothing", model)
