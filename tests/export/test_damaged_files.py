"""Whatever a file holds, reading it ends in an error that says so, or in what was written."""

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


def everything(path):
    """All that a reader can get from a file."""
    with SparseFile(path) as file:
        told = (file.sparsity, file.metadata, file.entries)
        tensors = {name: file.tensor(name, limit=LIMIT).tolist() for name in file.entries}
        positions = {name: file.nonzeros(name)[0].tolist() for name in file.entries}
    return told, tensors, positions


# Accidents


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
def test_a_damaged_file_is_refused_or_read_as_it_was(damage, whole, path):
    rng, data, expected = random.Random(0), whole.read_bytes(), everything(whole)
    refused = 0
    for _ in range(200):
        path.write_bytes(damage(data, rng))
        try:
            assert everything(path) == expected
        except FileFormatError as error:
            refused += str(path) in str(error)
    assert refused > 180


def test_a_truncated_file_is_refused(whole, path):
    data = whole.read_bytes()
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match="truncated"):
            SparseFile(path)


# Malice: checksums are right


def parsed(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + length])["__metadata__"][manifest.KEY]
    return json.loads(text[8:]), load_file(path)


def forge(path, document, parts):
    text = document if isinstance(document, str) else json.dumps(document)
    path.write_bytes(save(parts, {manifest.KEY: f"{zlib.crc32(text.encode()):08x}{text}"}))


def sign(document, parts):
    """Correct checksums for whatever the parts are now."""
    for name, description in document["tensors"].items():
        own = [parts[p] for p in (name, name + ":values", name + ":gaps") if p in parts]
        shape = description.get("shape", list(own[0].shape) if own else [])
        if own and isinstance(shape, list):
            description["crc"] = manifest.checksum(own[0].dtype, shape, own)


def at(*keys, value):
    """An edit of the document."""

    def edit(document, parts):
        inner = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return edit


def part(name, change):
    """An edit of the data."""

    def edit(document, parts):
        parts[name] = change(parts[name])

    return edit


ENTRY = ("tensors", "weight")
EDITS = {
    "future version": (at("version", value=2), "format version is 2, this library reads version 1"),
    "no version": (at("version", value=None), "format version None"),
    "true version": (at("version", value=True), "format version True"),
    "no tensors": (at("tensors", value=[]), "no object 'tensors'"),
    "no tied": (at("tied", value=None), "no object 'tied'"),
    "metadata": (at("metadata", value="x"), "no object 'metadata'"),
    "sparsity": (at("sparsity", value=7), "sparsity 7"),
    "description": (at(*ENTRY, value=3), "weight: its description is no object"),
    "layout": (at(*ENTRY, "layout", value="os.system"), "layout 'os.system', known are gaps"),
    "layout type": (at(*ENTRY, "layout", value=["gaps"]), "layout"),
    "other layout": (at(*ENTRY, "layout", value="dense"), "weight: its values are missing"),
    "negative shape": (at(*ENTRY, "shape", value=[-40, -50]), r"shape \[-40, -50\]"),
    "float shape": (at(*ENTRY, "shape", value=[40.0, 50]), r"shape \[40.0, 50\]"),
    "huge shape": (at(*ENTRY, "shape", value=[2**40, 2**40]), "more than a tensor can have"),
    "absurd shape": (at(*ENTRY, "shape", value=[10**4000] * 9), "more than a tensor can have"),
    "many dimensions": (at(*ENTRY, "shape", value=[1] * 10**5), "more than a tensor can have"),
    "large shape": (at(*ENTRY, "shape", value=[2**31, 2**31]), "would take 18,446,744,"),
    "small shape": (at(*ENTRY, "shape", value=[4, 50]), r"position \d+ in a tensor of 200"),
    "tiny shape": (at(*ENTRY, "shape", value=[2]), "more values than weights"),
    "width": (at(*ENTRY, "width", value=40), "width 40"),
    "zero width": (at(*ENTRY, "width", value=0), "width 0"),
    "other width": (at(*ENTRY, "width", value=1), "positions for 30 values"),
    "zeros": (at("tensors", "bias", "zeros", value=6), "zeros 6"),
    "tied to nothing": (at("tied", "x", value="y"), "x: tied to 'y'"),
    "tied to a tie": (at("tied", "x", value="again"), "x: tied to 'again'"),
    "tied twice": (at("tied", "bias", value="weight"), "bias: tied to 'weight'"),
    "no name": (at("tied", "x", value=[1]), "x: tied to"),
    "lost part": (lambda d, p: p.pop("weight:gaps"), "weight: its values or positions are missing"),
    "lost tensor": (lambda d, p: p.pop("bias"), "bias: its values are missing"),
    "unknown tensor": (lambda d, p: p.update(x=torch.ones(1)), "does not know: x"),
    "fewer values": (part("weight:values", lambda v: v[1:]), "30 positions for 29 values"),
    "more gaps": (part("weight:gaps", lambda g: torch.cat([g, 0 * g])), "positions for 30 values"),
    "gaps of floats": (part("weight:gaps", lambda g: g.float()), "positions of another type"),
    "gaps of rows": (part("weight:gaps", lambda g: g[None]), "positions of another type"),
    "rows of values": (part("weight:values", lambda v: v[None]), "more values than weights"),
    "strange truth": (
        part("mask", lambda m: torch.full((20,), 7, dtype=torch.uint8).view(torch.bool)),
        "a truth value that is neither 0 nor 1",
    ),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_a_forged_file_is_refused(edit, message, whole, path):
    document, parts = parsed(whole)
    edit(document, parts)
    if isinstance(document["tensors"], dict) and isinstance(document["tensors"]["weight"], dict):
        sign(document, parts)
    forge(path, document, parts)
    with pytest.raises(FileFormatError, match=message):
        everything(path)
    model = nn.Module()
    for name, value in MODEL.items():
        model.register_buffer(name, value.clone())
    model.bias.zero_()
    with pytest.raises((FileFormatError, StateError)):
        feather.load_sparse(path, model)
    assert not model.bias.any()


TEXTS = {
    "deep": ("[" * 10**5, "header cannot be read"),
    "twice": ('{"version":1,"version":1}', "version twice"),
    "infinite": ('{"version":Infinity}', "Infinity is no number"),
    "long number": ('{"version":' + "9" * 5000 + "}", "header cannot be read"),
    "list": ("[1]", "header is no object"),
    "nothing": ("", "header cannot be read"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_a_header_that_is_no_header_is_refused(text, message, path):
    forge(path, text, {"a": torch.ones(1)})
    with pytest.raises(FileFormatError, match=message):
        SparseFile(path)


NASTY = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, 1e308, "", "weight", "gaps", [], {}]
NASTY += [[0], [2**62], [40, 51], [[1]], {"weight": "weight"}, "\x00", "a" * 10**4]


def test_random_forgeries_are_refused_or_harmless(whole, path):
    rng, (document, parts) = random.Random(0), parsed(whole)
    refused = 0
    for _ in range(400):
        forged, data = copy.deepcopy(document), dict(parts)
        for _ in range(rng.randrange(1, 4)):
            inner = forged
            while isinstance(inner, dict) and inner and rng.random() < 0.8:
                key = rng.choice(list(inner))
                if not isinstance(inner[key], dict) or rng.random() < 0.1:
                    inner[key] = copy.deepcopy(rng.choice(NASTY))
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
            _, tensors, _ = everything(path)
            assert tensors.keys() >= {"weight"}
        except FileFormatError:
            refused += 1
    assert refused > 200


def test_a_plain_file_is_told_apart(path):
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(FileFormatError, match=r"none that save_sparse wrote; .*load_file"):
        SparseFile(path)


def test_memory_is_claimed_only_within_the_limit(path):
    with torch.no_grad():
        feather.save_sparse({"a": torch.eye(1, 10**7)}, path)
    assert path.stat().st_size < 1000
    with SparseFile(path) as file:
        with pytest.raises(FileFormatError, match=r"a would take 40,000,000 bytes .* limit=\.\.\."):
            file.tensor("a", limit=10**6)
        assert file.nonzeros("a")[0].tolist() == [0]
        assert file.tensor("a").shape == (1, 10**7)


def test_huge_claims_do_not_reach_a_model(whole, path):
    document, parts = parsed(whole)
    document["tensors"]["weight"]["shape"] = [2**31, 2**31]
    sign(document, parts)
    forge(path, document, parts)
    model = nn.Module()
    for name, value in MODEL.items():
        model.register_buffer(name, value)
    with pytest.raises(StateError, match=r"weight has shape \[2147483648, 2147483648\]"):
        feather.load_sparse(path, model)
