"""Functions that stay in planes: activations, squeeze-excite, concatenation, slices, layer norm."""

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import DENSE, SPARSE, TOLERANCE, compiled, error, pruned, sparse_layers
from torch import nn

from torch_feather import compile_sparse
from torch_feather.runtime import kernels
from torch_feather.runtime.steps import Copy, Operation, Sparse, Torch

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
}


class Net(nn.Module):
    """A function of an image and of some modules."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.parts)


def check(function, *modules, x=None, threads=1, any_batch=True):
    """Compare a network with PyTorch, for several batch sizes; return the compiled network."""
    model = pruned(Net(function, *modules), 0.6)
    x = torch.randn(2, 8, 9, 7) if x is None else x
    network = compiled(model, x, threads=threads)
    with torch.no_grad():
        others = (x[:1], torch.cat([x, 2 * x, -x])) if any_batch else ()
        for given in (x, *others, x):
            network(given)
            for workspace in network._for_sizes(
                given
            ).pool.free:  # nothing is read before it is written
                workspace.memory.fill_(torch.nan)
            result, expected = network(given), model(given)
            for a, b in zip(
                torch.utils._pytree.tree_leaves(result),
                torch.utils._pytree.tree_leaves(expected),
                strict=True,
            ):
                assert error(a, b) < 3 * TOLERANCE
    return network


def in_pytorch(network):
    return [s.node.name for s in network.plan.steps if isinstance(s, Torch)]


def conv(channels=8, out=8, kernel=3, **options):
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, **options)


def test_there_is_a_function_for_each_activation():
    assert set(ACTIVATIONS) == set(kernels.ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_fused_and_accurate(name):
    """Padding stays 0 although sigmoid(0) is not: the second convolution reads it."""
    activation = ACTIVATIONS[name]
    network = check(lambda x, a, b: b(activation(a(x))), conv(), conv())
    assert not in_pytorch(network)
    x = torch.cat([torch.randn(4000) * 4, torch.linspace(-90, 90, 500)]).view(1, 1, 60, 75)
    alone = compiled(Net(lambda x, a: activation(a(x)), identity()).eval(), x)(x).double()
    expected = activation(x.double())
    assert ((alone - expected).abs() <= 1e-6 * expected.abs() + 5e-7).all()


def test_tanh_is_accurate_near_0():
    x = torch.logspace(-30, 1, 4500).view(1, 1, 60, 75)
    found = compiled(Net(lambda x, a: a(x).tanh(), identity()).eval(), x)(x)
    torch.testing.assert_close(found.double(), x.double().tanh(), rtol=1e-6, atol=0)


def identity():
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    return layer


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_other_values(name):
    activation = ACTIVATIONS[name]
    network = check(lambda x, a, b: b(activation(a(x) * a(x))) + a(x), conv(), conv())
    assert [n for n in in_pytorch(network) if name[:4] in n] == []


def test_nan_stays_nan_in_its_sample():
    model = pruned(Net(lambda x, a, b: b(F.silu(a(x))), conv(), conv()))
    x = torch.randn(3, 8, 9, 7)
    x[1] = torch.nan
    found = compiled(model, x)(x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("threads", [1, 2])
def test_squeeze_excite_stays_in_planes(gate, threads):
    def excite(x, a, reduce, expand, b):
        y = F.silu(a(x))
        s = ACTIVATIONS[gate](expand(F.relu(reduce(y.mean((2, 3), keepdim=True)))))
        return b(y * s) + b(F.adaptive_avg_pool2d(y, 1) * y)

    parts = conv(), conv(8, 2, 1), conv(2, 8, 1), conv()
    assert not in_pytorch(check(excite, *parts, threads=threads))


def test_squeeze_excite_by_linear_layers():
    def excite(x, a, reduce, expand, b):
        y = a(x).relu()
        s = expand(reduce(y.mean((2, 3))).relu()).sigmoid()
        return b(y * s[:, :, None, None]), b(y * s.view(-1, 8, 1, 1))

    check(excite, conv(), nn.Linear(8, 4), nn.Linear(4, 8), conv())


def test_concatenation_of_growing_values_is_free():
    """As in DenseNet: each layer reads all values before it."""

    def dense(x, *layers):
        values = [layers[0](x)]
        for layer in layers[1:]:
            values.append(layer(torch.cat(values, 1)).relu())
        return torch.cat(values, 1).mean((2, 3)), values[1]

    network = check(dense, conv(8, 4), *(conv(4 * i, 4) for i in range(1, 5)))
    assert not in_pytorch(network)
    assert sum(isinstance(s, Copy) for s in network.plan.steps) == 1  # the input


CONCATENATIONS = {
    "order of use": lambda x, a, b: b(torch.cat([(y := a(x)), b(torch.cat([y, y], 1))], 1)[:, :16]),
    "twice": lambda x, a, b: b(torch.cat([(y := a(x).relu()), y], 1)) + b(torch.cat([y, x], 1)),
    "two places": lambda x, a, b: (
        b(torch.cat([(y := a(x)), (z := a(y))], 1)),
        b(torch.cat([z, y], 1)),
    ),
    "with the input": lambda x, a, b: b(torch.cat([x, a(x)], 1)),
    "read before it is complete": lambda x, a, b: b(
        torch.cat([a((z := a(x)).relu()) + z, a(a(z))], 1)
    ),
    "of slices": lambda x, a, b: b(torch.cat([a(x)[:, 4:], a(x)[:, :4], a(x)], 1)),
    "mostly in PyTorch": lambda x, a, b: b(torch.cat([x.exp(), a(x)[:, :2], x[:, 2:]], 1)),
}


@pytest.mark.parametrize("name", CONCATENATIONS)
def test_concatenations(name):
    check(CONCATENATIONS[name], conv(), conv(16, 8))


SLICES = {
    "slice": lambda x, a, b: b(a(x)[:, 2:6]) + b(a(x)[:, -4:]),
    "chunk": lambda x, a, b: torch.add(*(b(y) for y in a(x).chunk(2, 1))),
    "split": lambda x, a, b: [b(y.relu()) for y in a(x).split([4, 4], 1)],
    "uneven": lambda x, a, b: (b(a(x).split([3, 4, 1], 1)[1]), a(x).split(3, 1)[2]),
    "gated": lambda x, a, b: b(a(x)[:, :4] * a(x)[:, 4:].sigmoid()),
    "rows": lambda x, a, b: b(a(x)[:, :4, 1:5]),
    "steps": lambda x, a, b: b(a(x)[:, ::2]),
    "written": lambda x, a, b: b((a(x)[:, :4]).add_(1)),
}


@pytest.mark.parametrize("name", SLICES)
def test_slices(name):
    check(SLICES[name], conv(), conv(4, 8))


def test_average_pooling_is_a_layer():
    def pools(x, a, b):
        y = a(x)
        return b(F.avg_pool2d(y, 3, 1, 1)), F.avg_pool2d(y, 2).relu(), b(F.avg_pool2d(y, 3, 2)) + 1

    network = check(pools, conv(), conv())
    assert not any("avg_pool" in n for n in in_pytorch(network))
    check(lambda x, a: F.avg_pool2d(a(x), 3, 1, 1, count_include_pad=False), conv())
    check(lambda x, a: F.avg_pool2d(a(x), 2, ceil_mode=True), conv())


def test_layer_norm_of_images_stays_in_planes():
    """As in ConvNeXt: the channels of an image are the last dimension between permutations."""

    def block(x, depthwise, norm, first, second):
        x = depthwise(x)
        y = norm(depthwise(x).permute(0, 2, 3, 1))
        return x + second(F.gelu(first(y))).permute(0, 3, 1, 2)

    parts = conv(8, 8, 5, groups=8), nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
    assert not in_pytorch(check(block, *parts))


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_layers_of_tokens(tokens):
    """More and fewer tokens than numbers in a vector; the sequence may come first."""

    def function(x, norm, first, second):
        y = norm(first(x))
        return x + second(F.gelu(y)), second(y.transpose(0, 1)), y

    parts = nn.LayerNorm(48), nn.Linear(24, 48), nn.Linear(48, 24)
    check(function, *parts, x=torch.randn(2, tokens, 24), any_batch=False)


def test_residual_connections_of_tokens_stay_in_planes():
    """Although the first one begins with a value that PyTorch computed."""

    def function(x, norm, a, b):
        for _ in range(2):
            y = b(F.gelu(a(norm(x).reshape(-1, 24))))
            x = x + y.view(x.shape)
        return x

    parts = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24)
    network = check(function, *parts, x=torch.randn(2, 20, 24))
    assert not {n for n in in_pytorch(network) if "add" in n}


def test_gelu_that_is_written_out():
    def gelu(x):
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x.pow(3.0))))

    network = check(lambda x, a, b: b(gelu(a(x))) + gelu(x), conv(), conv())
    assert len(in_pytorch(network)) == 1  # GELU of the input
    check(lambda x, a: gelu(a(x)) + torch.tanh(x) * 0.5, conv())
    check(lambda x, a: 0.5 * (y := a(x)) * (1.0 + torch.tanh(y + 0.04 * y.pow(3.0))), conv())


def test_attention_projections_run_sparse():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=False)
    x = torch.randn(2, 20, 32)
    network = check(lambda x, a: a(x.transpose(0, 1)), layer, x=x, any_batch=False)
    assert {"in_proj_weight", "weight"} == {name.split(".")[-1] for name in network.tuning}
    assert len(network.tuning) == 4


def test_layers_are_timed_if_the_batch_is_not_their_first_dimension():
    """As in attention, whose tokens come first inside; another batch size stays possible."""
    torch.manual_seed(0)
    model = pruned(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 0.9).eval()
    network = compile_sparse(model, torch.randn(2, 5, 8))
    assert set(network.tuning) >= {"self_attn.in_proj_weight", "linear1.weight"}
    for batch in (2, 3):
        x = torch.randn(batch, 5, 8)
        with torch.no_grad():
            assert error(network(x), model(x)) < TOLERANCE


def shuffled(x, groups, transpose):
    b, c, h, w = x.shape
    x = x.reshape(b, groups, c // groups, h, w)
    x = x.transpose(1, 2) if transpose else x.permute(0, 2, 1, 3, 4).contiguous()
    return x.reshape(b, c, h, w)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("way", ["transpose", "permute", "module"])
def test_channel_shuffles_stay_in_planes(groups, way):
    def net(x, a, b):
        y = a(x)
        if way == "module":
            y = F.channel_shuffle(y, groups)
        else:
            y = shuffled(y, groups, way == "transpose")
        first, second = y.chunk(2, 1)
        return torch.cat([first, b(second)], 1)

    assert in_pytorch(check(net, conv(8, 12), conv(6, 6, 1))) == []


def test_channel_shuffles_that_run_densely_copy_channels():
    """A product with 0 would make infinity NaN."""
    model, x = nn.ChannelShuffle(2), torch.randn(2, 6, 3, 4)
    x[0, 1], x[1, 4] = torch.inf, torch.nan
    for tuning in (DENSE, SPARSE):
        network = compiled(model, x, tuning)
        torch.testing.assert_close(network(x), model(x), rtol=0, atol=0, equal_nan=True)
        assert not sparse_layers(network)


def test_other_transpositions_of_five_dimensions_are_no_shuffle():
    def net(x, a, b):  # spread over height and channels
        y = a(x)
        n, c, h, w = y.shape
        y = y.reshape(n, 2, c // 2, h, w).transpose(1, 2)
        return b(y.reshape(n, c // 2, 2 * h, w))

    assert in_pytorch(check(net, conv(8, 12), conv(6, 6, 1)))


@pytest.mark.parametrize("factor", [2, 3, 8, (2, 1), (3, 4)])
def test_nearest_neighbor_interpolation_stays_in_planes(factor):
    def net(x, a, b, c):
        up = F.interpolate(a(x), scale_factor=factor, mode="nearest")
        return b(up) + c(up)

    assert in_pytorch(check(net, conv(), conv(), conv(kernel=1))) == []


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 3), "dilation": (2, 1)},
    ],
    ids=str,
)
def test_max_pooling_with_windows_over_the_end_stays_in_planes(options):
    def net(x, a, b):
        return b(F.max_pool2d(a(x) - 9, ceil_mode=True, **options)) + 1

    for size in ((9, 7), (10, 8), (11, 12)):
        network = check(net, conv(), conv(), x=torch.randn(2, 8, *size))
        assert not any("pool" in name for name in in_pytorch(network))


@pytest.mark.parametrize("size", [(3, 7), (1, 7), 4])
def test_adaptive_average_pooling_is_a_layer_if_all_windows_are_alike(size):
    network = check(lambda x, a, b: b(F.adaptive_avg_pool2d(a(x), size)), conv(), conv())
    assert in_pytorch(network) == []
    pools = [s for s in network.plan.steps if isinstance(s, Sparse) if s.layer.pools]
    assert len(pools) == (size != 4)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm_stays_in_planes(groups):
    norm = nn.GroupNorm(groups, 8)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)

    def net(x, a, norm, b, c):
        y = a(x)
        return b(norm(y)), c(norm(y)), F.group_norm(a(x), groups)

    for kernel in (1, 3):  # without and with padding
        first = conv(kernel=kernel)
        nn.init.constant_(first.bias, 3.0)
        network = check(net, first, norm, conv(kernel=kernel), conv(kernel=kernel))
        assert not any("group_norm" in name for name in in_pytorch(network))


@pytest.mark.parametrize("padding", [1, (1, 0), 0], ids=str)
@pytest.mark.parametrize("stride", [None, 2])
def test_average_pooling_that_does_not_count_padding_stays_in_planes(stride, padding):
    def net(x, a, b):
        return b(F.avg_pool2d(a(x), 3, stride, padding, count_include_pad=False))

    network = check(net, conv(), conv())
    assert in_pytorch(network) == []
    scaled = [s for s in network.plan.steps if isinstance(s, Operation)]
    assert len(scaled) == (padding != 0)


def test_poolformer_block_stays_in_planes():
    factors = nn.Module()
    factors.scale = nn.Parameter(torch.randn(8, 1, 1))

    def net(x, a, norm, factors, b):
        x = a(x)
        y = norm(x)
        mixed = F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y
        return b(x + mixed * factors.scale)

    assert in_pytorch(check(net, conv(), nn.GroupNorm(1, 8), factors, conv())) == []


def test_squeeze_and_excitation_before_a_padded_convolution():
    """The factors are computed from pixels alone, and the padding around the product is 0."""

    def net(x, a, gate, b):
        y = a(x)
        return b(y * gate(y.mean((2, 3), keepdim=True)).sigmoid())

    for size in ((9, 7), (5, 5), (16, 16)):
        network = check(net, conv(), conv(kernel=1), conv(), x=torch.randn(2, 8, *size))
        assert in_pytorch(network) == []
