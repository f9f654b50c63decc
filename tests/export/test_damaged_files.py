"""Reading a damaged or forged file raises FileFormatError or returns what was written."""

import copy
import json
import random
import zlib

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

import torch_feather as feather
from torch_feather import FileFormatError, StateError
from torch_feather.export import SparseFile, manifest

WEIGHT = torch.zeros(40, 50)
WEIGHT[::7, ::11] = torch.arange(1.0, 31).reshape(6, 5)
MASK = torch.ones(20, dtype=torch.bool)
MODEL = {"weight": WEIGHT, "bias": torch.ones(5), "mask": MASK, "again": WEIGHT}
LIMIT = 10**6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "file"
    feather.save_sparse(MODEL, path, metadata={"method": "feather"})
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def contents(path):
    """Return everything that a file contains."""
    with SparseFile(path) as file:
        header = (file.sparsity, file.metadata, file.entries)
        tensors = {name: file.tensor(name, limit=LIMIT).tolist() for name in file.entries}
        positions = {name: file.nonzeros(name)[0].tolist() for name in file.entries}
    return header, tensors, positions


# Accidental damage


def flip(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def overwrite(data, rng):
    at, count = rng.randrange(len(data)), rng.randrange(1, 40)
    return data[:at] + rng.randbytes(count) + data[at + count :]


def remove(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 40) :]


def repeat(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + data[max(0, at - rng.randrange(1, 40)) :]


@pytest.mark.parametrize("damage", [flip, overwrite, remove, repeat])
def test_a_damaged_file_is_rejected_or_read_correctly(damage, whole, path):
    rng, data, expected = random.Random(0), whole.read_bytes(), contents(whole)
    rejected = 0
    for _ in range(200):
        path.write_bytes(damage(data, rng))
        try:
            assert contents(path) == expected
        except FileFormatError as error:
            rejected += str(path) in str(error)
    assert rejected > 180


def test_a_truncated_file_is_rejected(whole, path):
    data = whole.read_bytes()
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match="truncated"):
            SparseFile(path)


# Forged files: checksums are correct


def parsed(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + length])["__metadata__"][manifest.KEY]
    return json.loads(text[8:]), load_file(path)


def forge(path, document, parts):
    text = document if isinstance(document, str) else json.dumps(document)
    path.write_bytes(save(parts, {manifest.KEY: f"{zlib.crc32(text.encode()):08x}{text}"}))


def sign(document, parts):
    """Set the checksums of the current parts."""
    for name, description in document["tensors"].items():
        own = [parts[p] for p in (name, name + ":values", name + ":gaps") if p in parts]
        shape = description.get("shape", list(own[0].shape) if own else [])
        crc = description.get("crc")
        forged = type(crc) is not int or crc >= 2**32
        if own and isinstance(shape, list) and not forged:
            description["crc"] = manifest.checksum(own[0].dtype, shape, own)


def at(*keys, value):
    """Return an edit of the header."""

    def edit(document, parts):
        inner = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return edit


def part(name, change):
    """Return an edit of the data."""

    def edit(document, parts):
        parts[name] = change(parts[name])

    return edit


def both(*edits):
    """Return several edits as one."""

    def edit(document, parts):
        for one in edits:
            one(document, parts)

    return edit


ENTRY = ("tensors", "weight")
EDITS = {
    "future version": (at("version", value=2), "format version 2 is newer than version 1"),
    "no version": (at("version", value=None), "invalid format version None"),
    "boolean version": (at("version", value=True), "invalid format version True"),
    "no tensors": (at("tensors", value=[]), "no object 'tensors'"),
    "no tied": (at("tied", value=None), "no object 'tied'"),
    "metadata": (at("metadata", value="x"), "no object 'metadata'"),
    "sparsity": (at("sparsity", value=7), "invalid sparsity 7"),
    "boolean sparsity": (at("sparsity", value=True), "invalid sparsity True"),
    "text as sparsity": (at("sparsity", value="0.9"), "invalid sparsity '0.9'"),
    "lower sparsity": (at("sparsity", value=0.9), "sparsity 0.9, but 1,970 of 2,000 weights"),
    "checksum": (at("tensors", "mask", "crc", value=2**32), "mask: invalid checksum 4294967296"),
    "boolean checksum": (at("tensors", "mask", "crc", value=True), "mask: invalid checksum True"),
    "description": (at(*ENTRY, value=3), "weight: the description is not an object"),
    "layout": (
        at(*ENTRY, "layout", value="os.system"),
        "unknown layout 'os.system'; known layouts: gaps",
    ),
    "layout type": (at(*ENTRY, "layout", value=["gaps"]), "layout"),
    "other layout": (at(*ENTRY, "layout", value="dense"), "weight: values are missing"),
    "negative shape": (at(*ENTRY, "shape", value=[-40, -50]), r"invalid shape \[-40, -50\]"),
    "float shape": (at(*ENTRY, "shape", value=[40.0, 50]), r"invalid shape \[40.0, 50\]"),
    "huge shape": (at(*ENTRY, "shape", value=[2**40, 2**40]), "too large for a tensor"),
    "absurd shape": (at(*ENTRY, "shape", value=[10**4000] * 9), "too large for a tensor"),
    "many dimensions": (at(*ENTRY, "shape", value=[1] * 10**5), "too large for a tensor"),
    "large shape": (
        both(at(*ENTRY, "shape", value=[2**20, 2**31]), at("sparsity", value=1.0)),
        "requires 9,007,199,",
    ),
    "larger shape": (at(*ENTRY, "shape", value=[2**30, 2**31]), "too large for a tensor"),
    "small shape": (at(*ENTRY, "shape", value=[4, 50]), r"position \d+ in a tensor of 200"),
    "tiny shape": (at(*ENTRY, "shape", value=[2]), "more values than weights"),
    "width": (at(*ENTRY, "width", value=40), "invalid width 40"),
    "zero width": (at(*ENTRY, "width", value=0), "invalid width 0"),
    "other width": (at(*ENTRY, "width", value=1), "positions for 30 values"),
    "zeros": (at("tensors", "bias", "zeros", value=6), "invalid number of zeros 6"),
    "too few zeros": (at("tensors", "bias", "zeros", value=5), "number of zeros is wrong"),
    "tied to nothing": (at("tied", "x", value="y"), "x: invalid tie to 'y'"),
    "tied to a tie": (at("tied", "x", value="again"), "x: invalid tie to 'again'"),
    "tied twice": (at("tied", "bias", value="weight"), "bias: invalid tie to 'weight'"),
    "no name": (at("tied", "x", value=[1]), "x: invalid tie to"),
    "lost part": (lambda d, p: p.pop("weight:gaps"), "weight: values or positions are missing"),
    "lost tensor": (lambda d, p: p.pop("bias"), "bias: values are missing"),
    "unknown tensor": (lambda d, p: p.update(x=torch.ones(1)), "does not describe: x"),
    "fewer values": (
        both(part("weight:values", lambda v: v[1:]), at("sparsity", value=1.0)),
        "more than 29 positions",
    ),
    "more gaps": (
        part("weight:gaps", lambda g: torch.cat([g, 0 * g[:4]])),
        "more than 30 positions",
    ),
    "too many gaps": (
        part("weight:gaps", lambda g: torch.cat([g, g, g])),
        "102 bytes of positions for 30 values in a tensor of 2,000 weights, which take 34 to 38",
    ),
    "too few gaps": (part("weight:gaps", lambda g: g[:33]), "33 bytes of positions for 30 values"),
    "a value of zero": (part("weight:values", lambda v: 0 * v), "weight: a stored value is 0"),
    "gaps of floats": (
        part("weight:gaps", lambda g: g.float()),
        "positions are not a uint8 vector",
    ),
    "gaps of rows": (part("weight:gaps", lambda g: g[None]), "positions are not a uint8 vector"),
    "rows of values": (part("weight:values", lambda v: v[None]), "more values than weights"),
    "invalid boolean": (
        part("mask", lambda m: torch.full((20,), 7, dtype=torch.uint8).view(torch.bool)),
        "a boolean that is neither 0 nor 1",
    ),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_a_forged_file_is_rejected(edit, message, whole, path):
    document, parts = parsed(whole)
    edit(document, parts)
    if isinstance(document["tensors"], dict) and isinstance(document["tensors"]["weight"], dict):
        sign(document, parts)
    forge(path, document, parts)
    with pytest.raises(FileFormatError, match=message):
        contents(path)
    model = nn.Module()
    for name, value in MODEL.items():
        model.register_buffer(name, value.clone())
    model.bias.zero_()
    with pytest.raises((FileFormatError, StateError)):
        feather.load_sparse(path, model)
    assert not model.bias.any()


TEXTS = {
    "deep": ("[" * 10**5, "header cannot be read"),
    "duplicate key": ('{"version":1,"version":1}', "duplicate key version"),
    "infinite": ('{"version":Infinity}', "Infinity is not a number"),
    "long number": ('{"version":' + "9" * 5000 + "}", "header cannot be read"),
    "list": ("[1]", "header is not an object"),
    "nothing": ("", "header cannot be read"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_an_invalid_header_is_rejected(text, message, path):
    forge(path, text, {"a": torch.ones(1)})
    with pytest.raises(FileFormatError, match=message):
        SparseFile(path)


REPLACEMENTS = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    "",
    "weight",
    "gaps",
    [],
    {},
]
REPLACEMENTS += [[0], [2**62], [40, 51], [[1]], {"weight": "weight"}, "\x00", "a" * 10**4]


def test_random_forgeries_are_rejected_or_harmless(whole, path):
    rng, (document, parts) = random.Random(0), parsed(whole)
    rejected = 0
    for _ in range(400):
        forged, data = copy.deepcopy(document), dict(parts)
        for _ in range(rng.randrange(1, 4)):
            inner = forged
            while isinstance(inner, dict) and inner and rng.random() < 0.8:
                key = rng.choice(list(inner))
                if not isinstance(inner[key], dict) or rng.random() < 0.1:
                    inner[key] = copy.deepcopy(rng.choice(REPLACEMENTS))
                inner = inner[key]
        name = rng.choice(list(data))
        noise = torch.randint(0, 256, (rng.randrange(0, 99),), dtype=torch.uint8)
        if name.endswith(":gaps") and rng.random() < 0.5:
            data[name] = noise
        if isinstance(forged.get("tensors"), dict) and rng.random() < 0.9:
            known = {n: d for n, d in forged["tensors"].items() if isinstance(d, dict)}
            sign({"tensors": known}, data)
        forge(path, forged, data)
        try:
            _, tensors, _ = contents(path)
            assert tensors.keys() >= {"weight"}
        except FileFormatError:
            rejected += 1
    assert rejected > 200


@pytest.mark.parametrize("name", ["\x1b[2J", "\udc80", "a\nb", "\u202ename"])
def test_names_in_a_file_cannot_write_to_a_terminal(name, whole, path):
    """A message shows them escaped, whatever is wrong with the tensor of this name."""
    document, parts = parsed(whole)
    entry = document["tensors"]["weight"]
    wrong = {
        "layout": {**entry, "layout": name},
        "no data": entry,
        "kind": name,
    }
    for cause, description in wrong.items():
        changed = copy.deepcopy(document)
        changed["tensors"][name] = description
        forge(path, changed, parts)
        for door in (SparseFile, lambda path: feather.load_sparse(path, nn.Linear(50, 40))):
            with pytest.raises(FileFormatError) as caught:
                door(path)
            assert str(caught.value).isprintable(), cause
    forge(path, {**document, "tied": {**document["tied"], name: "weight"}}, parts)
    with pytest.raises((FileFormatError, StateError)) as raised:
        feather.load_sparse(path, nn.Linear(50, 40))
    assert str(raised.value).isprintable()


def test_a_plain_safetensors_file_is_recognized(path):
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(FileFormatError, match=r"not written by save_sparse\. .*load_file"):
        SparseFile(path)


def test_memory_is_allocated_only_within_the_limit(path):
    with torch.no_grad():
        feather.save_sparse({"a": torch.eye(1, 10**7)}, path)
    assert path.stat().st_size < 1000
    with SparseFile(path) as file:
        with pytest.raises(FileFormatError, match=r"a requires 40,000,000 bytes .* limit=\.\.\."):
            file.tensor("a", limit=10**6)
        assert file.nonzeros("a")[0].tolist() == [0]
        assert file.tensor("a").shape == (1, 10**7)


def test_a_huge_shape_does_not_affect_a_model(whole, path):
    document, parts = parsed(whole)
    document["tensors"]["weight"]["shape"] = [2**20, 2**31]
    document["sparsity"] = 1.0
    sign(document, parts)
    forge(path, document, parts)
    model = nn.Module()
    for name, value in MODEL.items():
        model.register_buffer(name, value)
    with pytest.raises(StateError, match=r"weight has shape \[1048576, 2147483648\]"):
        feather.load_sparse(path, model)
