"""Outputs have the strides of the model's own outputs, for every layout of the input."""

import pytest
import torch
from runtime_cases import DENSE, TOLERANCE, SameForAll, compiled, error, pruned
from torch import nn
from torch.utils._pytree import tree_leaves

from torch_feather.runtime import CaptureError, InputError, compile_sparse, layer_milliseconds
from torch_feather.runtime.strides import with_strides

LAYOUTS = {  # inputs of shape (batch, 4, 9, 7)
    "contiguous": lambda batch: torch.randn(batch, 4, 9, 7),
    "channels last": lambda batch: torch.randn(batch, 9, 7, 4).permute(0, 3, 1, 2),
    "slice": lambda batch: torch.randn(batch, 9, 10, 8)[:, ::2, 1:, :7][:, :4],
    "transposed": lambda batch: torch.randn(7, 9, 4, batch).permute(3, 2, 1, 0),
    "expanded": lambda batch: torch.randn(batch, 1, 9, 1).expand(-1, 4, -1, 7),
}


class Many(nn.Module):
    """Returns tensors of many strides: of sparse layers, PyTorch's functions, and views."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 2)
        self.norm, self.line = nn.BatchNorm2d(4), nn.Linear(7, 5)
        self.tokens, self.head = nn.Linear(4, 4), nn.Linear(252, 3)

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        tokens = y.flatten(2).transpose(1, 2)
        mixed = self.tokens(tokens)
        return {
            "layers": [y, z, self.norm(y).relu(), self.line(x), mixed, self.head(y.flatten(1))],
            "residuals": [torch.add(y, x, alpha=0.3), x + y, y + x.sum((2, 3), keepdim=True)],
            "functions": [y.sigmoid(), y * y, torch.cat([x, y], 1), y.softmax(1)],
            "pools": [nn.functional.avg_pool2d(y, 2), nn.functional.max_pool2d(y, 3, 2, 1)],
            "views": [y.permute(0, 2, 3, 1), y.transpose(2, 3), y[:, 1:3], y[..., ::2], tokens],
            "overlaps": [y[:, :1].expand(-1, 5, -1, -1), y.unfold(3, 3, 1), y.unfold(2, 3, 2)],
            "turned": [mixed.transpose(1, 2).unflatten(2, (9, 7)), mixed.transpose(0, 1)],
            "of the input": [x, x[:, 1:], x.permute(1, 0, 2, 3), x.contiguous()],
            "copies": [y.clone(), y.contiguous(), y.contiguous(memory_format=torch.channels_last)],
        }


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(3)
    model = pruned(Many())
    for value in model.parameters():
        value.requires_grad_(False)
    x = LAYOUTS["contiguous"](2)
    return model, {"sparse": compiled(model, x), "dense": compiled(model, x, DENSE)}


def agree(results, expected):
    results, expected = tree_leaves(results), tree_leaves(expected)
    assert len(results) == len(expected)
    for i, (result, correct) in enumerate(zip(results, expected, strict=True)):
        assert error(result, correct) < 5 * TOLERANCE, i
        effective = [dim for dim, size in enumerate(correct.shape) if size > 1]
        assert [result.stride(d) for d in effective] == [correct.stride(d) for d in effective], i


@pytest.mark.parametrize("batch", [2, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tuning", ["sparse", "dense"])
def test_strides_of_outputs(tuning, layout, batch, networks):
    model, by_tuning = networks
    for _ in range(2):
        x = LAYOUTS[layout](batch)
        agree(by_tuning[tuning](x), model(x))


def test_examples_of_other_layouts(networks):
    """The strides follow the input, not the example."""
    model, _ = networks
    network = compiled(model, LAYOUTS["channels last"](2))
    for make in LAYOUTS.values():
        x = make(3)
        agree(network(x), model(x))


def test_outputs_can_be_viewed():
    class Block(nn.Conv2d):
        def forward(self, x):
            return torch.add(super().forward(x), x, alpha=0.3)

    model, x = pruned(Block(16, 16, 3, padding=1)), torch.randn(2, 16, 9, 11)
    assert torch.equal(compiled(model, x)(x).view(2, -1).view(2, 16, 9, 11), compiled(model, x)(x))


def test_batches_in_chunks(networks):
    class Turned(nn.Conv2d):
        def forward(self, x):
            y = super().forward(x)
            return y, y.permute(0, 2, 3, 1), y.transpose(0, 1).contiguous().transpose(0, 1)

    model = pruned(Turned(4, 4, 3))
    network = compile_sparse(
        model, LAYOUTS["contiguous"](2), threads=1, tuning=SameForAll(DENSE), chunk_size=2
    )
    for make in LAYOUTS.values():
        x = make(6)
        agree(network(x), [value.detach() for value in model(x)])


class Branching(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return torch.cond(y.sum() > 0, lambda y: y.cos(), lambda y: y.sin(), (y,))


class Writing(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        written = torch.zeros_like(y)
        written[:, ::2] += y[:, 1::2]
        return written


class Gating(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.factor = torch.randn(4, 1, 1)  # no buffer

    def forward(self, x):
        return super().forward(x.contiguous()) * self.factor


@pytest.mark.parametrize("kind", [Branching, Writing, Gating])
def test_other_models(kind):
    model = pruned(kind(4, 4, 3))
    network = compiled(model, LAYOUTS["contiguous"](2))
    for make in LAYOUTS.values():
        x = make(3)
        agree(network(x), model(x).detach())


def test_attention():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    result = compiled(model, x)(x)
    assert error(result, model(x).detach()) < 5 * TOLERANCE
    assert result.stride() == model(x).stride()


STRIDES = [
    (12, 4, 1),
    (1, 2, 6),
    (12, 1, 3),
    (100, 4, 1),
    (0, 4, 1),
    (1, 1, 1),
    (4, 4, 2),
    (0, 0, 0),
]


@pytest.mark.parametrize("strides", STRIDES, ids=str)
def test_with_strides(strides):
    expected = torch.randn(300).as_strided((2, 3, 4), strides)
    result = with_strides(expected.clone(), strides)
    assert torch.equal(result, expected)
    assert result.stride() == strides
    assert with_strides(expected, strides) is expected


def test_dimensions_of_one_are_not_copied():
    x = torch.randn(5, 7)[2:, None]
    result = with_strides(x, (7, 99, 1))
    assert (result.stride(), result.data_ptr()) == ((7, 99, 1), x.data_ptr())


# Functions that read memory in its order


class Reading(nn.Conv2d):
    def __init__(self, read):
        super().__init__(4, 4, 1)
        self.read = read

    def forward(self, x):
        return self.read(super().forward(x), x)


CONTIGUOUS = {
    "result": lambda y, x: y.as_strided((2, 3), (5, 1)),
    "input": lambda y, x: x.as_strided((5,), (2,)),
    "scattered": lambda y, x: torch.as_strided_scatter(y, torch.ones(2, 3), (2, 3), (60, 5), 7),
}


@pytest.mark.parametrize("read", CONTIGUOUS)
def test_as_strided_of_contiguous_tensors(read):
    model, x = pruned(Reading(CONTIGUOUS[read])), LAYOUTS["contiguous"](2)
    network = compiled(model, x)
    assert error(network(x), model(x)) < TOLERANCE
    for other in (LAYOUTS["channels last"](2), LAYOUTS["contiguous"](3)[1:]):
        with pytest.raises(InputError, match=r"calls as_strided.*Pass x\.clone"):
            network(other)
    with pytest.raises(CaptureError, match="example must be contiguous"):
        compiled(model, LAYOUTS["channels last"](2))


@pytest.mark.parametrize(
    "read",
    [
        lambda y, x: y.permute(0, 2, 3, 1).as_strided((2, 3), (5, 1)),
        lambda y, x: y[1:].as_strided((2, 3), (5, 1), 0),
        lambda y, x: torch.as_strided_scatter(y.mT, torch.ones(2, 3), (2, 3), (60, 5), 7),
    ],
)
def test_as_strided_of_other_tensors(read):
    """Its result depends on memory that a compiled network arranges in another way."""
    with pytest.raises(CaptureError, match="not contiguous, or a part of another"):
        compiled(pruned(Reading(read)), LAYOUTS["contiguous"](2))


# Writes into the input

WRITES = {
    "relu_": lambda x: torch.relu_(x),
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: (x[:, ::2].mul_(2), x)[1],
    "index_put_": lambda x: (x.__setitem__(x > 0, 0.0), x)[1],
    "copy_": lambda x: (x[:, 0].copy_(x[:, 1]), x)[1],
    "sigmoid_": lambda x: (x.detach().flatten(1).sigmoid_(), x)[1],
}


class InPlace(nn.Conv2d):
    def __init__(self, write):
        super().__init__(4, 4, 1)
        self.write = write

    def forward(self, x):
        return super().forward(self.write(x))


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("batch", [1, 2])
def test_writes_into_the_input(name, batch):
    x = LAYOUTS["contiguous"](batch)
    before = x.clone()
    for attempt in (compiled, lambda model, x: layer_milliseconds(model, x, 0.5)):
        with pytest.raises(CaptureError, match=rf"InPlace writes into its input in-place \({name}"):
            attempt(pruned(InPlace(WRITES[name])), x)
    assert torch.equal(x, before)
    copied = pruned(InPlace(lambda x: WRITES[name](x.clone())))
    assert error(compiled(copied, x)(x), copied(x)) < TOLERANCE


def test_the_message_names_the_layer():
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    with pytest.raises(CaptureError, match=r"\(relu_ in 1\).*inplace=False"):
        compiled(pruned(model), LAYOUTS["contiguous"](2))
