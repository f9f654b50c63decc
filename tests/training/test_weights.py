"""Weights from files of others: any wrong file is an error of the package, in little memory."""

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from pickle import dumps

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torch_feather as feather
from torch_feather.errors import ConfigurationError, FeatherError, FileFormatError, StateError
from torch_feather.export import SparseFile, hub
from torch_feather.training.config import apply, resolve_config
from torch_feather.training.data import load_dataset
from torch_feather.training.distillation import load_teacher
from torch_feather.training.errors import RunError
from torch_feather.training.weights import read_weights


def forged(path, tensors, metadata=None, sparsity=1.0):
    """Write a sparse file with valid checksums: (shape, width, values, codes) by name."""
    parts, described, data = {}, {}, b""
    for name, (shape, width, values, codes) in tensors.items():
        values = np.asarray(values, "<f4").tobytes()
        crc = zlib.crc32(codes, zlib.crc32(values, zlib.crc32(f"float32 {shape}".encode())))
        described[name] = {"layout": "gaps", "crc": crc, "shape": shape, "width": width}
        for suffix, kind, content in ((":values", "F32", values), (":gaps", "U8", codes)):
            length = len(content) // (4 if kind == "F32" else 1)
            offsets = [len(data), len(data) + len(content)]
            parts[name + suffix] = {"dtype": kind, "shape": [length], "data_offsets": offsets}
            data += content
    header = {"version": 1, "sparsity": sparsity, "tensors": described, "tied": {}}
    text = json.dumps(header | {"metadata": metadata or {}})
    parts["__metadata__"] = {"torch-feather": f"{zlib.crc32(text.encode()):08x}{text}"}
    start = json.dumps(parts).encode()
    path.write_bytes(struct.pack("<Q", len(start)) + start + data)
    return path


def net(*shape):
    """Return a layer whose weight has a shape."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(shape))
    return layer


# Files that ask for more memory than the limit: name, tensors, metadata
HUGE = [2**20, 2**25]
BOMBS = {
    "a huge tensor of zeros": ({"weight": (HUGE, 1, [], b"")}, {}),
    "many large tensors of zeros": ({f"w{i}": ([2**29], 1, [], b"") for i in range(99)}, {}),
    "more positions than weights": ({"weight": ([64, 10], 1, [1, 2], bytes(2**24))}, {}),
    "positions of nothing": ({"weight": ([64, 10], 1, [], b"\xff" * 2**24)}, {}),
    "a huge network": ({"weight": ([64, 10], 1, [], b"")}, {"network": "timm/resnet152"}),
    "a network of zeros": ({"weight": (HUGE, 1, [], b"")}, {"network": "resnet20"}),
}  # fmt: skip


def doors(path):
    """Return every way by which a file may be read, by name."""
    config = apply(resolve_config("digits"), {"distillation.teacher": str(path)}, "test")
    data = load_dataset(config.data, config.seed)
    hub.download = lambda _: path
    return {
        "load_sparse": lambda: feather.load_sparse(path, net(64, 10)),
        "the hub": lambda: feather.load_sparse("hf://USER/NAME", net(64, 10)),
        "tensor": lambda: list(map(SparseFile(path).tensor, SparseFile(path).entries)),
        "nonzeros": lambda: list(map(SparseFile(path).nonzeros, SparseFile(path).entries)),
        "init": lambda: read_weights(path).fill(net(64, 10)),
        "weights": lambda: read_weights(path).tensors,
        "teacher": lambda: load_teacher(config, data),
    }  # fmt: skip


def main(folder, limit):
    """Try each file at each door within the memory limit; print how it ended and the memory."""
    for name, (tensors, metadata) in BOMBS.items():
        path = forged(Path(folder) / f"{name}.safetensors", tensors, metadata)
        for door, action in doors(path).items():
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + limit, resource.RLIM_INFINITY))
            try:
                action()
                end = "read"
            except FeatherError as error:
                end = type(error).__name__
            except BaseException as error:
                end = f"{type(error).__name__}: {error}"
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            print(json.dumps([name, door, end]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.slow
def test_a_small_file_cannot_ask_for_much_memory_at_any_door(tmp_path):
    limit = 128 * 2**20
    run = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(limit)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    ends = {(name, door): end for name, door, end in map(json.loads, run.stdout.splitlines())}
    assert len(ends) == 7 * len(BOMBS)
    # Positions of zeros are none, and a tensor of the size of the file is no bomb.
    harmless = {(name, "nonzeros") for name in BOMBS if "positions" not in name}
    harmless |= {
        ("a huge network", door) for door in ("load_sparse", "the hub", "tensor", "init", "weights")
    }
    for key, end in ends.items():
        errors = ("FileFormatError", "StateError", "ConfigurationError")
        assert end == "read" if key in harmless else end in errors, key


# Other types


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_a_wider_type_do_not_vanish_or_overflow(tmp_path, suffix):
    path, layer = tmp_path / f"weights{suffix}", net(2, 2)
    weight = torch.tensor([[1e-300, -1e-300], [0.1, 0.0]], dtype=torch.float64)
    write(path, {"weight": weight})
    found = read_weights(path).fill(layer).weight
    assert torch.equal(found.sign().double(), weight.sign())
    assert found[1, 0] == torch.tensor(0.1)
    write(path, {"weight": weight.fill_(1e300)})
    with pytest.raises(ConfigurationError, match=r"weights.* do not fit Module: weight has values"):
        read_weights(path).fill(layer)
    assert layer.weight.abs().max() < 1


def write(path, tensors):
    (torch.save if path.suffix == ".pt" else save_file)(tensors, path)


KINDS = {
    "integers": (torch.tensor([[1, 2], [3, 4]]), True),
    "large integers": (torch.tensor([[1, 2], [3, 2**60 + 1]]), False),
    "booleans": (torch.tensor([[True, False], [False, True]]), True),
    "complex": (torch.tensor([[1, 2], [3, 4j]]), False),
    "real complex": (torch.tensor([[1, 2], [3, 4 + 0j]]), True),
    "8 bits": (torch.ones(2, 2).to(torch.float8_e5m2), True),
}


@pytest.mark.parametrize(("weight", "fits"), KINDS.values(), ids=KINDS)
def test_values_of_another_kind_are_exact_or_errors(tmp_path, weight, fits, recwarn):
    path = tmp_path / "weights.pt"
    torch.save({"weight": weight}, path)
    if fits:
        expected = weight.real if weight.is_complex() else weight
        assert torch.equal(read_weights(path).fill(net(2, 2)).weight, expected.float())
    else:
        with pytest.raises(ConfigurationError, match=r"cannot hold exactly"):
            read_weights(path).fill(net(2, 2))
    assert not [w for w in recwarn.list if "imaginary" in str(w.message)]


def test_fractions_in_place_of_integers_are_errors(tmp_path):
    norm = nn.BatchNorm2d(3)
    state = norm.state_dict()
    for count, fits in ((5.0, True), (5.5, False), (float("nan"), False)):
        torch.save(state | {"num_batches_tracked": torch.tensor(count)}, tmp_path / "norm.pt")
        if fits:
            read_weights(tmp_path / "norm.pt").fill(norm)
            assert norm.num_batches_tracked == 5
        else:
            with pytest.raises(ConfigurationError, match="num_batches_tracked has values"):
                read_weights(tmp_path / "norm.pt").fill(norm)


def test_tied_weights_agree_or_are_errors(tmp_path):
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    values = torch.randn(4, 4)
    torch.save({"0.weight": values, "1.weight": values.clone()}, tmp_path / "a.pt")
    assert torch.equal(read_weights(tmp_path / "a.pt").fill(tied)[0].weight, values)
    torch.save({"0.weight": values, "1.weight": values + 1}, tmp_path / "a.pt")
    with pytest.raises(ConfigurationError, match=r"0\.weight and 1\.weight share memory"):
        read_weights(tmp_path / "a.pt").fill(tied)
    assert torch.equal(tied[0].weight, values)


def test_states_of_early_versions_are_loaded(tmp_path):
    """Before PyTorch 0.4.1, norms had no num_batches_tracked."""
    norm = nn.BatchNorm2d(3)
    state = dict(norm.state_dict())
    del state["num_batches_tracked"]
    state["weight"] = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    torch.save(state, tmp_path / "norm.pt")
    assert read_weights(tmp_path / "norm.pt").fill(norm).weight.tolist() == [2.0] * 3


# Wrong files


def compressed(path):
    torch.save({"weight": torch.zeros(2**20)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def saved(value):
    return lambda path: torch.save(value, path)


WRONG = {
    "compressed": (compressed, r"cannot be read as weights \(it is compressed"),
    "pipe": (os.mkfifo, "neither a run directory nor a regular file"),
    "empty": (lambda path: path.touch(), "cannot be read as weights"),
    "other pickle": (lambda path: path.write_bytes(pickle.dumps({1, 2})), "cannot be read"),
    "names": (saved({1: torch.ones(2)}), "holds no state dict"),
    "numbers": (saved({"weight": 3}), "holds no state dict"),
    "list": (saved([torch.ones(2)]), "holds no state dict"),
    "meta": (saved({"weight": torch.ones(64, 10, device="meta")}), "no dense values"),
    "sparse": (saved({"weight": torch.ones(64, 10).to_sparse()}), "no dense values"),
    "quantized": (
        saved({"weight": torch.quantize_per_tensor(torch.ones(64, 10), 1, 0, torch.qint8)}),
        "no dense values",
    ),
    "expanded": (saved({"weight": torch.ones(1).expand(2**40)}), "size mismatch for weight"),
    "name of a network": (
        lambda path: forged(path, {"weight": ([64, 10], 1, [], b"")}, {"network": 3}),
        "metadata has the network 3, not a name",
    ),
    "unknown network": (
        lambda path: forged(path, {"weight": ([64, 10], 1, [], b"")}, {"network": "os.system"}),
        "unknown network 'os.system'",
    ),
}


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(dumps(value))])
def test_code_in_a_file_is_refused_and_not_executed(tmp_path, write):
    trace = tmp_path / "executed"
    pickle.loads(dumps(Code(trace)))  # what a reader must not do
    trace.unlink()
    write({"weight": torch.ones(2), "code": Code(trace)}, tmp_path / "a.pt")
    with pytest.raises(RunError, match="damaged, or holds more than tensors"):
        read_weights(tmp_path / "a.pt")
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:.*torch.sparse", "ignore:.*[qQ]uantiz")
@pytest.mark.parametrize(("create", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_an_error_of_the_package_that_names_it(tmp_path, create, message):
    path = tmp_path / ("a.safetensors" if "network" in message else "a.pt")
    create(path)
    config = apply(resolve_config("digits"), {"distillation.teacher": str(path)}, "test")
    data = load_dataset(config.data, config.seed)
    as_teacher = "network" in message
    with pytest.raises(FeatherError, match=message):
        load_teacher(config, data) if as_teacher else read_weights(path).fill(net(64, 10))


@pytest.mark.parametrize("source", ["a" * 300, "a/" * 3000])
def test_a_path_that_the_system_refuses_is_an_error(source):
    with pytest.raises(RunError):
        read_weights(source)


def test_a_damaged_sparse_file_is_an_error_at_each_door(tmp_path):
    path = tmp_path / "a.safetensors"
    feather.save_sparse({"weight": torch.eye(64, 10)}, path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x55
    path.write_bytes(data)
    for action in (
        lambda: feather.load_sparse(path, net(64, 10)),
        lambda: read_weights(path).fill(net(64, 10)),
        lambda: read_weights(path).tensors,
    ):
        with pytest.raises(FileFormatError, match=r"a\.safetensors: weight: the checksum"):
            action()


def test_a_state_error_of_a_sparse_file_names_the_file_once(tmp_path):
    path = tmp_path / "a.safetensors"
    feather.save_sparse({"weight": torch.eye(64, 10)}, path)
    with pytest.raises(StateError, match=r"^/.*/a\.safetensors does not fit Module: weight has"):
        feather.load_sparse(path, net(64, 11))
    with pytest.raises(ConfigurationError) as caught:
        read_weights(path).fill(net(64, 11))
    assert str(caught.value).count(str(path)) == 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
