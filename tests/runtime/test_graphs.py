"""Fusion: one network of many parts, in which each part is compared with PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import TOLERANCE, compiled, error, pruned
from torch import nn

from torch_feather.runtime.plan import Plan

BATCHES = (2, 1, 3)


def conv(channels=4, out=4, kernel=3, padding=1, **options):
    return nn.Conv2d(channels, out, kernel, padding=padding, **options)


def parts(*modules):
    """Register a function of x, (batch, 4, 9, 7), and of these modules."""

    def register(function):
        PARTS[function.__name__] = (modules, function)
        return function

    return register


PARTS = {}
norm = nn.BatchNorm2d


@parts(conv(), norm(4))
def batch_norm(x, a, b):
    return b(a(x)).relu()


@parts(conv(bias=False), nn.BatchNorm2d(4, affine=False, eps=0.3))
def batch_norm_without_weights(x, a, b):
    return b(a(x))


@parts(conv(), nn.BatchNorm2d(4, track_running_stats=False))
def batch_norm_without_statistics(x, a, b):
    return b(a(x))


@parts(norm(4), conv(), norm(4), conv())
def norm_relu_conv(x, a, b, c, d):
    return x + d(c(b(a(x).relu())).relu())


@parts(conv(), norm(4), norm(4))
def two_norms_of_one_conv(x, a, b, c):
    y = a(x)
    return b(y) + c(y)


@parts(conv(), norm(4))
def norm_and_its_input(x, a, b):
    y = a(x)
    return b(y) + y


@parts(conv(), nn.ParameterList([torch.randn(4, 1, 1), torch.randn(1, 4, 1, 1)]))
def scale_by_channel(x, a, scales):
    return (a(x) * scales[0] * scales[1]).relu()


@parts(conv(), nn.ParameterList([torch.randn(7), torch.randn(1, 1, 4, 1, 1)]))
def scale_of_other_shapes(x, a, scales):
    return a(x) * scales[0], a(x) * scales[1]


@parts(conv(), nn.ParameterList([torch.randn(4, 1, 1)]))
def scale_after_a_residual(x, a, scales):
    return (a(x) + x) * scales[0]


@parts(nn.MaxPool2d(2), norm(4))
def norm_of_max_pooling(x, a, b):
    return b(a(x))


@parts(nn.MaxPool2d(3, 1, 1), nn.ParameterList([torch.randn(4, 1, 1)]))
def scale_of_max_pooling(x, a, scales):
    return (a(x) * scales[0]).relu()


@parts(nn.MaxPool2d(3, 1, 1), conv())
def max_pooling_and_residual(x, a, b):
    return (a(b(x)) + x).relu()


@parts(conv(), conv())
def residual_of_two_convs(x, a, b):
    return (a(x) + b(x)).relu()


@parts(conv())
def residual_with_a_factor(x, a):
    return torch.add(a(x), x, alpha=-2)


@parts(conv())
def residual_that_is_broadcast(x, a):
    return a(x) + x[:, :, :1] + x.mean((2, 3), keepdim=True)


@parts(conv())
def conv_with_two_users(x, a):
    y = a(x)
    return (y + x).relu(), y.relu() * 2


@parts(conv())
def relu_of_a_value_used_twice(x, a):
    y = a(x)
    return y.relu() - y


@parts(conv())
def added_to_itself(x, a):
    y = a(x)
    return y + y, y * y


@parts(conv(), conv())
def in_place(x, a, b):
    y = a(x).relu_()
    y += x
    z = b(y)
    z.mul_(2).clamp_(min=-1)
    return z, y.add_(1)


@parts(conv(), conv(), nn.ReLU(inplace=True))
def in_place_relu_of_two(x, a, b, relu):
    y = a(x)
    return b(relu(y)) + y


@parts(conv(), nn.ReLU6(), nn.Hardtanh(), nn.ReLU())
def bounds(x, a, b, c, d):
    y = a(x)
    return b(3 * a(x)), c(y), d(c(a(x))), a(x).clamp(max=0.1), a(x).clamp(-0.2, 0.3)


@parts(conv())
def used_twice_at_different_sizes(x, a):
    return a(F.avg_pool2d(a(x).relu(), 2))


@parts(conv(out=3), conv(out=5), conv(12, 4), norm(12))
def concatenation(x, a, b, c, d):
    return c(d(torch.cat([x, a(x), b(x).relu()], 1)).relu())


@parts(conv(), nn.Dropout(), nn.Dropout2d(), conv())
def dropout(x, a, b, c, d):
    return d(c(b(a(x)).relu()))


@parts(
    conv(), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 2, 1), conv()
)
def pools(x, a, b, c, d, e):
    return e(b(a(x) - 9)), e(c(a(x))), e(d(a(x))), F.adaptive_avg_pool2d(a(x), 1)


@parts(conv(), conv())
def pointwise_functions(x, a, b):
    y = a(x)
    return b(F.gelu(y)) + F.silu(y) * y.sigmoid() - F.hardswish(y), b(y * 0.5 + 1), y.exp()


@parts(conv(), nn.PixelShuffle(2), conv(1, 2), nn.ConvTranspose2d(2, 3, 2), conv(3, 4))
def other_functions_in_the_middle(x, a, b, c, d, e):
    return e(d(c(b(a(x)))).softmax(1)).logsumexp(1).sort(-1)[0]


@parts(conv(padding="same"), conv(kernel=4, padding="same"))
def paddings(x, a, b):
    return a(x), b(x)


@parts(*(conv(padding_mode=mode) for mode in ("reflect", "replicate", "circular")))
def paddings_of_other_modes(x, a, b, c):
    return a(x), b(x), c(x), c(a(x).relu()), F.pad(x, (2, 0, 9, 1), "circular")


@parts(conv(), nn.Linear(7, 6), nn.Linear(6, 7), nn.Linear(7, 7))
def linear_layers_of_rows(x, a, b, c, d):
    return a(c(b(a(x)).relu())), d(x) + a(x), d(a(x)) + a(x)


@parts(nn.Linear(63, 9), nn.Linear(9, 5), nn.LayerNorm(9), nn.Linear(4, 4))
def linear_layers_of_tokens(x, a, b, c, d):
    y = a(x.flatten(2)).relu()
    return b(c(y)) + b(y).mean(1, keepdim=True), d(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@parts(conv(), nn.Linear(252, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
def classifier(x, a, b, c, d):
    return d(c(b(a(x).flatten(1))).relu())


@parts(conv())
def strides_of_memory(x, a):
    y = a(x)
    return y.as_strided((2, 3), (5, 1)), (y.view(torch.int32) > 0).float()


@parts(conv())
def without_gradients_and_autocast(x, a):
    with torch.no_grad():
        y = a(x)
    with torch.autocast("cpu", enabled=False):
        return a(y).relu()


@parts(conv(), conv())
def branches(x, a, b):
    return torch.cond(x.sum() > 0, lambda x: a(x), lambda x: b(x), (x,))


@parts(conv())
def views_in_branches(x, a):
    def turned(y):
        return y.view(y.shape[0], -1).cos()

    def same(y):
        return y.view(y.shape[0], -1).sin()

    return torch.cond(x.sum() > 0, turned, same, (a(x),))


@parts(conv())
def weights_that_are_computed(x, a):
    weight = a.weight * (a.weight.abs() > 0.5)
    return F.conv2d(x, weight, padding=1), F.conv2d(x, x[:1].mean() * a.weight)


@parts(conv())
def input_and_intermediate_values(x, a):
    y = a(x)
    return {"input": x, "view": x[:, 1:], "y": y, "more": [y.relu(), (y[:, :2], y.transpose(1, 2))]}


@parts(conv())
def constants_only(x, a):
    return a.weight * 2


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.of = nn.ModuleDict({n: nn.ModuleList(modules) for n, (modules, _) in PARTS.items()})

    def forward(self, x):
        return {name: function(x, *self.of[name]) for name, (_, function) in PARTS.items()}


@pytest.fixture(scope="module")
def results():
    """Return the outputs of both networks, by tuning and batch size."""
    torch.manual_seed(1)
    model = pruned(Parts(), 0.5)
    inputs = {batch: torch.randn(batch, 4, 9, 7) for batch in BATCHES}
    found, network = {}, compiled(model, inputs[2])
    for tuning in ("sparse", "dense"):
        got = {batch: network(x.clone()) for batch, x in inputs.items()}
        with torch.no_grad():
            found |= {(tuning, batch): (model(x), got[batch]) for batch, x in inputs.items()}
        network.plan = Plan.build(
            network.plan.graph, []
        )  # capturing the model again would take seconds
        network._runs.clear()
    return found


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("tuning", ["sparse", "dense"])
@pytest.mark.parametrize("part", PARTS)
def test_parts(part, tuning, batch, results):
    """Also after later calls, which must not change earlier results."""
    expected, result = (r[part] for r in results[tuning, batch])
    expected, structure = torch.utils._pytree.tree_flatten(expected)
    result, same = torch.utils._pytree.tree_flatten(result)
    assert structure == same
    for got, correct in zip(result, expected, strict=True):
        assert error(got, correct) < 5 * TOLERANCE
