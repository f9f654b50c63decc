"""The networks match the paper: exact counts, layers, initialization, and any input size."""

import math

import pytest
import torch
from torch import nn

from torch_feather import models
from torch_feather.errors import ConfigurationError, nearest

# number of parameters and of prunable weights with 100 classes, by name
COUNTS = {
    "resnet20": (1_096_196, 1_092_960),
    "resnet8": (320_260, 318_816),
    "mobilenet_v1": (3_315_428, 3_287_488),
    "densenet40_24": (714_196, 703_920),
}


def weighted_layers(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_every_model_has_counts():
    assert set(models.available_models()) == {*COUNTS, "gpt_small", "vit_small"}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_match_the_paper(name):
    model = models.create(name, num_classes=100)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(m.weight.numel() for m in weighted_layers(model))
    assert (parameters, weights) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_named_function_and_create_agree(name):
    torch.manual_seed(0)
    by_name = models.create(name, 7, 1).state_dict()
    torch.manual_seed(0)
    direct = getattr(models, name)(num_classes=7, in_channels=1).state_dict()
    assert by_name.keys() == direct.keys()
    assert all(torch.equal(by_name[k], direct[k]) for k in by_name)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16), (3, 33)])
def test_any_input_size_gives_logits_and_gradients_everywhere(name, channels, size):
    torch.manual_seed(0)
    model = models.create(name, 10, channels)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 10)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def layers_with_bias(model):
    return {name for name, m in model.named_modules() if getattr(m, "bias", None) is not None} - {
        name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)
    }


def test_only_the_classifier_has_a_bias_in_resnet_and_densenet():
    assert layers_with_bias(models.resnet20()) == {"fc"}
    assert layers_with_bias(models.densenet40_24()) == {"fc"}


def test_mobilenet_biases_are_the_classifier_and_the_pointwise_convolutions():
    expected = {"fc"} | {f"blocks.{i}.pointwise" for i in range(13)}
    assert layers_with_bias(models.mobilenet_v1()) == expected


def test_shortcuts_are_convolutions_exactly_if_the_shape_changes():
    model = models.resnet20()
    shortcuts = [
        n for n, m in model.named_modules() if n.endswith("shortcut") and len(list(m.children()))
    ]
    assert shortcuts == ["layer2.0.shortcut", "layer3.0.shortcut"]


def test_feature_map_sizes():
    seen = {}

    def record(name):
        return lambda module, inputs, output: seen.update({name: tuple(output.shape[1:])})

    for name, stages in (
        ("resnet20", {"layer1": (32, 32, 32), "layer2": (64, 16, 16), "layer3": (128, 8, 8)}),
        ("mobilenet_v1", {"stem": (32, 32, 32), "blocks.0": (64, 32, 32), "blocks": (1024, 2, 2)}),
        ("densenet40_24", {"stem": (48, 32, 32), "blocks.1": (96, 16, 16), "blocks": (264, 8, 8)}),
    ):
        model = models.create(name, 100).eval()
        seen.clear()
        for stage in stages:
            model.get_submodule(stage).register_forward_hook(record(stage))
        with torch.no_grad():
            model(torch.zeros(1, 3, 32, 32))
        assert seen == stages


def fan_out_std(conv):
    return math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))


@pytest.mark.parametrize("name", ["resnet20", "resnet8", "densenet40_24"])
def test_convolutions_are_initialized_normally_with_fan_out_variance(name):
    torch.manual_seed(0)
    scaled = [
        m.weight.flatten() / fan_out_std(m)
        for m in models.create(name, 100).modules()
        if isinstance(m, nn.Conv2d)
    ]
    every = torch.cat(scaled)  # N(0, 1) if the scale of each layer is correct
    standard_error = every.numel() ** -0.5
    assert abs(every.mean()) < 4 * standard_error
    assert abs(every.var() - 1) < 4 * 2**0.5 * standard_error
    # The fourth moment of a uniform distribution of variance 1 is 1.8.
    assert abs(every.pow(4).mean() - 3) < 4 * 96**0.5 * standard_error
    assert all(abs(s.std() - 1) < 4 / math.sqrt(2 * s.numel()) for s in scaled)


def test_the_resnet_classifier_is_initialized_small_without_bias():
    torch.manual_seed(0)
    fc = models.resnet20().fc
    assert abs(fc.weight.std() / 0.01 - 1) < 0.03
    assert abs(fc.weight.mean()) < 4e-4
    assert not fc.bias.any()


def test_mobilenet_has_the_initialization_of_pytorch():
    torch.manual_seed(0)
    for layer in weighted_layers(models.mobilenet_v1()):
        bound = layer.weight[0].numel() ** -0.5
        assert layer.weight.abs().max() <= bound
        if layer.weight.numel() > 10_000:  # U(-b, b) has standard deviation b / sqrt(3)
            assert layer.weight.std().item() / bound == pytest.approx(3**-0.5, rel=0.03)
        if layer.bias is not None:
            assert 0.8 * bound < layer.bias.abs().max() <= bound


def test_timm_models_are_created_by_name():
    model = models.create("timm/test_resnet", num_classes=5, in_channels=1)
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet2", "resnet20"),
        ("mobilenet", "mobilenet_v1"),
        ("xyz", "densenet40_24"),
        ("timm/resnet5", "resnet50"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name, hint):
    with pytest.raises(ValueError, match=hint):
        models.create(name, 10)


@pytest.mark.parametrize("name", ["resnet2", "xyz", "timm/resnet5", "timm/xyz"])
def test_the_suggestion_has_the_common_form(name):
    import timm

    known = timm.list_models() if name.startswith("timm/") else models.available_models()
    with pytest.raises(ConfigurationError) as caught:
        models.create(name, 10)
    short = name.removeprefix("timm/")
    assert f"{short!r}{nearest(short, known)} " in str(caught.value)


@pytest.mark.parametrize("counts", [{"num_classes": 0}, {"num_classes": 3, "in_channels": 0}])
def test_numbers_below_one_are_errors(counts):
    with pytest.raises(ValueError, match="at least 1"):
        models.create("resnet8", **counts)


def test_the_bias_of_densenets_classifier_starts_at_zero():
    """As in the public code of Feather's authors; the weight keeps PyTorch's default."""
    torch.manual_seed(0)
    model = models.densenet40_24()
    assert not model.fc.bias.any()
    assert 0 < model.fc.weight.abs().max() <= 1 / math.sqrt(model.fc.in_features)
