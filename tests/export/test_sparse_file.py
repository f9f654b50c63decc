"""Sparse files are lossless and small, and loading fails without side effects."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torch_feather as feather
from torch_feather import ConfigurationError, FeatherWarning, FileFormatError, StateError
from torch_feather.export import SparseFile
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


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2, 0.1, 0.05, 0.01, 0.001, 0.0001])
@pytest.mark.parametrize("rows", [1, 16, 1024])
def test_gaps_are_never_longer_than_a_bitmask_or_the_columns_of_csr(density, rows):
    mask = np.random.default_rng(0).random((rows, 2**18 // rows)) < density
    count = int(mask.sum())
    bitmask = mask.size // 8
    wide = 4 if mask.shape[1] > 2**16 else 2
    csr = wide * count + 4 * (rows + 1)
    assert len(encode(np.flatnonzero(mask))[0]) <= min(bitmask, csr)


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


def test_every_tensor_is_bitwise_identical(path):
    feather.save_sparse(TENSORS, path)
    with SparseFile(path) as file:
        assert file.entries.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            entry = file.entries[name]
            assert same_bits(file.tensor(name), tensor), name
            assert (entry.shape, entry.dtype) == (tensor.shape, tensor.dtype)
            if entry.layout == "dense":
                assert entry.nonzeros == tensor.count_nonzero()
            else:
                assert entry.nonzeros == bits(tensor).count_nonzero()
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


def test_negative_zeros_are_kept_with_a_warning(path):
    weight = torch.randn(100, 100) * (torch.rand(100, 100) < 0.1)
    with pytest.warns(FeatherWarning, match=r"weight has .* zeros that are -0\.0"):
        feather.save_sparse({"weight": weight}, path)
    with SparseFile(path) as file:
        assert same_bits(file.tensor("weight"), weight)
        assert file.sparsity == 1 - int(weight.count_nonzero()) / 10_000


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
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_a_model_that_does_not_fit_is_not_changed(model, path, change, message):
    feather.save_sparse(model, path)
    other = edited(change)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(StateError, match=message):
        feather.load_sparse(path, other)
    assert all(
        value.is_meta or same_bits(value, before[name])
        for name, value in other.state_dict().items()
    )


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


BAD_INPUT = {
    "no model": ([1, 2], "requires a module or a state dict, got list"),
    "no tensor": ({"a": 3}, "'a' is of type int"),
    "no name": ({1: torch.ones(1)}, "1 is of type"),
    "meta": ({"a": torch.ones(2, device="meta")}, "a is on the meta device"),
    "sharded": ({"a": torch.ones(2).as_subclass(Sharded)}, "a is sharded. Gather the state first"),
    "layout": ({"a": torch.ones(2, 2).to_sparse()}, r"a is of layout torch\.sparse_coo"),
    "dtype": ({"a": torch.ones(2, dtype=torch.complex128)}, r"a is of torch\.complex128"),
    "name of the header": ({"__metadata__": torch.ones(2)}, "__metadata__: the name is not unique"),
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


@pytest.mark.parametrize("metadata", [{"a": torch.ones(1)}, {"a": float("nan")}])
def test_metadata_must_consist_of_json_types(metadata, path):
    with pytest.raises(ConfigurationError, match="metadata must consist of JSON types"):
        feather.save_sparse({"a": random_sparse((99, 99), 0.1)}, path, metadata=metadata)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float32], ids=str)
def test_weights_out_of_the_range_of_a_type_are_errors(path, dtype):
    weight = random_sparse((99, 99), 0.1, torch.float64)
    weight[0, 0], weight[0, 1] = 1e60, torch.inf
    with pytest.raises(ConfigurationError, match=r"weight has weights out of the range"):
        feather.save_sparse({"weight": weight}, path, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fnuz], ids=str)
def test_unsupported_types_are_errors(model, path, dtype):
    with pytest.raises(ConfigurationError, match=f"cannot be stored as {dtype}"):
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


def test_a_missing_file_is_an_error(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        feather.load_sparse(tmp_path / "nothing", model)
