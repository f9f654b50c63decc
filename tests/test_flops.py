"""Multiply-adds: published totals, the definition layer by layer, and a model left as it was."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import torch_feather as feather
from torch_feather import models
from torch_feather.errors import ConfigurationError
from torch_feather.measure.flops import count_flops
from torch_feather.prunable import find_prunable

# Published numbers; the two of ImageNet at 224x224, counted on the meta device.
PUBLISHED = {
    "resnet20": 162_378_240,
    "resnet8": 49_132_032,
    "mobilenet_v1": 46_446_592,
    "densenet40_24": 288_155_424,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_cifar_networks_cost_what_the_paper_says(name):
    flops = count_flops(models.create(name, 100), torch.randn(1, 3, 32, 32))
    assert flops.dense == flops.sparse == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "weights", "macs"),
    [("resnet50", 25_502_912, 4_089_184_256), ("mobilenetv1_100", 4_209_088, 568_740_352)],
)
def test_imagenet_networks_cost_what_is_published(name, weights, macs):
    with torch.device("meta"):
        model = models.create(f"timm/{name}", 1000)
        flops = count_flops(model, torch.zeros(2, 3, 224, 224))
    assert flops.dense == macs
    assert sum(torch.Size(layer.weight_shape).numel() for layer in flops.layers) == weights


# module, input without batch, multiply-adds of one sample
LAYERS = {
    "linear": (nn.Linear(5, 7), (5,), 35),
    "linear on a sequence": (nn.Linear(5, 7), (3, 5), 3 * 35),
    "conv1d": (nn.Conv1d(2, 3, 5), (2, 9), 5 * 2 * 3 * 5),
    "conv2d, padded": (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 6), 24 * 2 * 3 * 9),
    "conv2d, stride, dilation": (
        nn.Conv2d(2, 3, 3, stride=2, dilation=2),
        (2, 9, 11),
        3 * 4 * 2 * 3 * 9,
    ),
    "conv2d, depthwise": (nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5), 9 * 8 * 9),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 3, 3, 3), 8 * 2 * 3 * 8),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 4, stride=2), (2, 5), 5 * 2 * 3 * 4),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5), 25 * 4 * 3 * 9),
    "transposed 3d": (nn.ConvTranspose3d(1, 2, 2), (1, 2, 2, 2), 8 * 2 * 8),
    "Conv1D of Transformers": (Conv1D(16, 8), (3, 8), 3 * 128),
    "bias is free": (nn.Linear(5, 7, bias=True), (5,), 35),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_costs_its_positions_times_its_weights(layer, batch):
    module, shape, expected = LAYERS[layer]
    flops = count_flops(module, torch.randn(batch, *shape))
    assert flops.dense == expected
    (counted,) = flops.layers
    assert counted.name == "weight"
    assert counted.weight_shape == module.weight.shape
    assert counted.kind == type(module).__name__


def test_what_is_prunable_by_default_is_counted():
    model = nn.Sequential(Conv1D(16, 8), nn.ReLU(), nn.Linear(16, 4))
    counted = {layer.name: layer.dense for layer in count_flops(model, torch.randn(2, 8)).layers}
    assert counted == {item.name: item.parameter.numel() for item in find_prunable(model)}


def test_bilinear_counts_every_weight_once_per_output_position():
    inputs = (torch.randn(2, 3, 4), torch.randn(2, 3, 5))
    assert count_flops(nn.Bilinear(4, 5, 6), inputs).dense == 3 * 4 * 5 * 6


@pytest.mark.parametrize("layer", LAYERS)
def test_sparse_counts_only_nonzero_weights(layer):
    module, shape, dense = LAYERS[layer]
    kept = torch.rand(module.weight.shape) < 0.4
    with torch.no_grad():
        saved = module.weight.clone()
        module.weight.copy_(torch.where(kept, 1.0, -0.0))
    flops = count_flops(module, torch.randn(2, *shape))
    with torch.no_grad():
        module.weight.copy_(saved)
    assert flops.dense == dense
    assert flops.sparse == dense // kept.numel() * int(kept.sum())


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, query, key, value):
        return self.attention(query, key=key, value=value)[0]


def test_attention_projections_count_the_tokens_that_each_of_them_sees():
    model = Attention()
    with torch.no_grad():
        model.attention.in_proj_weight[:8] = 0  # query
        model.attention.in_proj_weight[8:16, 1:] = 0  # key: 1 of 8 columns left
    query, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    projections, output = count_flops(model, (query, memory, memory)).layers
    assert projections.name == "attention.in_proj_weight"
    assert projections.weight_shape == (24, 8)
    assert projections.dense == (3 + 5 + 5) * 64
    assert projections.sparse == 5 * 8 + 5 * 64
    assert (output.name, output.dense) == ("attention.out_proj.weight", 3 * 64)


def test_attention_with_its_own_key_and_value_widths():
    inputs = (torch.randn(2, 3, 8), torch.randn(2, 5, 4), torch.randn(2, 5, 6))
    flops = count_flops(Attention(kdim=4, vdim=6), inputs)
    assert {layer.name.removeprefix("attention."): layer.dense for layer in flops.layers} == {
        "q_proj_weight": 3 * 64,
        "k_proj_weight": 5 * 32,
        "v_proj_weight": 5 * 48,
        "out_proj.weight": 3 * 64,
    }


@pytest.mark.parametrize("fastpath", [True, False])
def test_fused_transformer_layers_are_counted_and_the_fast_path_is_restored(fastpath):
    block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    model = nn.TransformerEncoder(block, num_layers=2).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        flops = count_flops(model, torch.randn(4, 5, 8))
        assert torch.backends.mha.get_fastpath_enabled() is fastpath
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert flops.dense == 2 * 5 * (4 * 64 + 2 * 128)


def test_padding_mask_that_would_make_nested_tensors_of_the_fast_path():
    block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    padding = torch.tensor([[False, False, True], [False, True, True]])
    inputs = {"src": torch.randn(2, 3, 8), "src_key_padding_mask": padding}
    flops = count_flops(nn.TransformerEncoder(block, num_layers=1).eval(), inputs)
    assert flops.dense == 3 * (4 * 64 + 2 * 128)


class Calls(nn.Module):
    """Calls one layer several times, a tied one once, and one not at all."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.used.weight
        self.unused = nn.Linear(4, 9)

    def forward(self, x, repeats=1):
        for _ in range(repeats):
            x = self.used(input=x)
        return {"out": self.tied(x)}


@pytest.mark.parametrize("repeats", [1, 3])
def test_every_call_counts_and_tied_weights_at_each_use(repeats):
    flops = count_flops(Calls(), {"x": torch.randn(2, 4), "repeats": repeats})
    assert {layer.name: layer.dense for layer in flops.layers} == {
        "used.weight": 16 * repeats,
        "tied.weight": 16,
        "unused.weight": 0,
    }
    assert flops.dense == 16 * (repeats + 1)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: (x, 2),
        lambda x: [x, 2],
        lambda x: {"x": x, "repeats": 2},
        lambda x: {"repeats": 2, "x": x},
    ],
    ids=["tuple", "list", "dict", "dict, tensor last"],
)
def test_input_forms_are_equivalent(form):
    assert count_flops(Calls(), form(torch.randn(5, 4))).dense == 48


def test_subclasses_and_lazy_layers_count():
    class Normalised(nn.Conv2d):
        def forward(self, x):
            return super().forward(x / 2)

    model = nn.Sequential(Normalised(1, 2, 3), nn.Flatten(), nn.LazyLinear(3))
    flops = count_flops(model, torch.randn(1, 1, 4, 4))
    assert [layer.dense for layer in flops.layers] == [4 * 18, 8 * 3]


def snapshot(model):
    return (
        {name: module.training for name, module in model.named_modules()},
        {key: value.clone() for key, value in model.state_dict().items()},
        [len(module._forward_hooks) for module in model.modules()],
    )


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        raise RuntimeError(f"cannot run {self.norm(self.conv(x)).shape}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_unchanged(training, fails):
    model = nn.Sequential(models.resnet8(3, 1), Fails() if fails else nn.Identity())
    model.train(training)
    model[0].bn1.train(not training)  # a mode of its own, as of a frozen norm
    model[0].fc.register_forward_hook(lambda *_: None)
    modes, state, hooks = snapshot(model)
    if fails:
        with pytest.raises(RuntimeError):
            count_flops(model, torch.randn(2, 1, 8, 8))
    else:
        count_flops(model, torch.randn(2, 1, 8, 8))
    new_modes, new_state, new_hooks = snapshot(model)
    assert new_modes == modes
    assert new_hooks == hooks
    assert all(torch.equal(new_state[key], state[key]) for key in state)
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


class Watches(nn.Linear):
    """Notes in which state it runs, and does more in `train` than set its flag."""

    def __init__(self):
        super().__init__(4, 4)
        self.merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        self.seen = (self.training, torch.is_grad_enabled(), self.merged)
        return super().forward(x)


def test_the_pass_runs_in_eval_mode_without_gradients():
    model = Watches()
    count_flops(model, torch.randn(1, 4))
    assert model.seen == (False, False, True)
    assert (model.training, model.merged) == (True, False)


def test_compiled_models_count_as_the_plain_one_and_are_not_compiled_for_it():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    plain = models.resnet8(3, 1)
    expected = count_flops(plain, torch.randn(1, 1, 8, 8))
    inner = models.resnet8(3, 1)
    inner.layer1 = torch.compile(inner.layer1, backend=backend)
    for model in (torch.compile(plain, backend=backend), inner):
        assert count_flops(model, torch.randn(1, 1, 8, 8)) == expected
    assert not compiled


@pytest.mark.parametrize(
    "bad", [None, (), {}, 3, torch.tensor(1.0), torch.empty(0, 4), ("a", None)], ids=repr
)
def test_input_without_a_batch_is_an_error(bad):
    with pytest.raises(ConfigurationError, match="example_input"):
        count_flops(nn.Linear(4, 4), bad)


def test_nothing_to_count_is_an_error():
    with pytest.raises(ConfigurationError, match="nothing to count"):
        count_flops(nn.ReLU(), torch.randn(1, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("part", [False, True], ids=["model", "part"])
@pytest.mark.parametrize("door", [count_flops, feather.report, feather.sparsity])
@pytest.mark.parametrize("kind", ["script", "trace", "freeze"])
def test_torchscript_is_refused(kind, door, part):
    """It hides its layers, so all numbers would lack them."""
    x, model = torch.ones(1, 4), nn.Linear(4, 2).eval()
    made = torch.jit.trace(model, x) if kind == "trace" else torch.jit.script(model)
    made = torch.jit.freeze(made) if kind == "freeze" else made
    given = nn.Sequential(nn.Linear(4, 4), made) if part else made
    with pytest.raises(ConfigurationError, match=r"TorchScript module \(.*before torch\.jit"):
        door(*((given, x) if door is count_flops else (given,)))
