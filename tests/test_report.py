"""The report: exact counts, multiply-adds and thresholds by layer, and a table that says them."""

import json
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torch_feather import available_methods, models, sparsify
from torch_feather.errors import ConfigurationError, fill_layers
from torch_feather.measure.flops import count_flops
from torch_feather.measure.report import macs_text, percent, report, sparsity
from torch_feather.methods import method_options


def network(density=0.3):
    model = models.resnet8(4, 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(torch.rand_like(p) < density)
    return model


def emptied(*names):
    model = network()
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).zero_()
    return model


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_zeros_are_counted_exactly(shapes, seed, dtype):
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Linear(i, o, dtype=dtype) for i, o in shapes)
    values = torch.tensor([0.0, -0.0, 1.0, torch.nan, torch.inf, torch.finfo(dtype).tiny / 2])
    drawn = [torch.randint(6, (o, i)) for i, o in shapes]
    with torch.no_grad():
        for layer, draw in zip(model, drawn, strict=True):
            layer.weight.copy_(values[draw].to(dtype))
            layer.bias.zero_()  # must not count
    # both zeros are zeros; NaN, infinities and the smallest numbers are not
    tiny_is_zero = values.to(dtype)[5] == 0
    zero = [(d < 2) | ((d == 5) & tiny_is_zero) for d in drawn]
    result = report(model)
    assert [layer.zeros for layer in result.layers] == [int(z.sum()) for z in zero]
    assert [layer.weights for layer in result.layers] == [i * o for i, o in shapes]
    assert result.zeros == sum(layer.zeros for layer in result.layers)
    assert result.weights == sum(layer.weights for layer in result.layers)
    assert sparsity(model) == result.sparsity == result.zeros / result.weights


@pytest.mark.parametrize(
    "choice",
    [{}, {"exclude": "conv1.weight"}, {"include": "layer?.*"}, {"include": nn.Linear}],
    ids=str,
)
def test_include_and_exclude_choose_the_same_layers_for_both(choice):
    model = network()
    result = report(model, **choice)
    assert sparsity(model, **choice) == result.sparsity
    assert {layer.name for layer in result.layers} <= dict(model.named_parameters()).keys()
    assert ("conv1.weight" in {layer.name for layer in result.layers}) is (not choice)
    for layer in result.layers:
        weight = model.get_parameter(layer.name)
        assert layer.shape == weight.shape
        assert layer.sparsity == (weight == 0).sum().item() / weight.numel()


@pytest.mark.parametrize("function", [report, sparsity])
@pytest.mark.parametrize(
    ("model", "choice"),
    [
        (nn.BatchNorm2d(3), {}),
        (nn.Linear(2, 2), {"exclude": "*"}),
        (nn.Linear(2, 2), {"include": lambda module, name: False}),
    ],
)
def test_nothing_prunable_is_an_error(function, model, choice):
    with pytest.raises(ConfigurationError, match="no prunable weight"):
        function(model, **choice)


def test_the_report_has_the_sparsity_of_prunable_weights_and_of_all_parameters():
    model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
    with torch.no_grad():
        model[0].weight[:5] = 0
        model[0].bias.zero_()  # no zero of a weight
    result = report(model)
    assert (result.weights, result.parameters) == (100, 130)
    assert (result.sparsity, result.sparsity_of_all) == (0.5, 50 / 130)
    assert result.to_dict()["sparsity_of_all"] == 50 / 130
    assert "Of all 130 parameters of the model, these zeros are 38.46 %." in str(result)


def test_multiply_adds_are_those_of_count_flops():
    model, example = network(), torch.randn(2, 1, 8, 8)
    flops = count_flops(model, example)
    result = report(model, example_input=example)
    assert (result.dense_macs, result.sparse_macs) == (flops.dense, flops.sparse)
    by_name = {layer.name: (layer.dense, layer.sparse) for layer in flops.layers}
    assert {n.name: (n.dense_macs, n.sparse_macs) for n in result.layers} == by_name


def test_totals_of_multiply_adds_are_those_of_the_whole_model():
    model, example = network(), torch.randn(2, 1, 8, 8)
    whole = report(model, example_input=example)
    part = report(model, exclude="conv1.weight", example_input=example)
    assert (part.dense_macs, part.sparse_macs) == (whole.dense_macs, whole.sparse_macs)
    assert "layers that are not listed" in str(part)
    assert "layers that are not listed" not in str(whole)


def test_without_example_there_are_no_multiply_adds():
    result = report(network())
    assert result.dense_macs is result.sparse_macs is None
    assert all(layer.dense_macs is layer.sparse_macs is None for layer in result.layers)
    assert "MACs" not in str(result)


class Unusual(nn.Module):
    """A tied weight that is used twice, and one that is used through a function."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.free = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return self.two(self.one(x)) @ self.free


def test_tied_weights_are_listed_once_with_the_cost_of_every_use():
    choice = ["*.weight", "free"]
    result = report(Unusual(), include=choice, example_input=torch.randn(3, 4))
    rows = {layer.name: layer for layer in result.layers}
    assert rows.keys() == {"one.weight", "free"}
    tied, free = rows["one.weight"], rows["free"]
    assert (tied.weights, tied.dense_macs) == (16, 32)
    assert (free.dense_macs, free.sparse_macs) == (None, None)


def test_attention_rows_have_their_multiply_adds():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    result = report(model, example_input=torch.randn(2, 5, 8))
    cost = {layer.name: layer.dense_macs for layer in result.layers}
    assert cost["self_attn.in_proj_weight"] == 5 * 3 * 64
    assert cost["self_attn.out_proj.weight"] == 5 * 64


def test_thresholds_are_listed_with_their_layers():
    thresholds = {"fc.weight": torch.tensor(0.125), "not.listed": torch.tensor(9.0)}
    result = report(network(), thresholds=thresholds)
    assert {layer.name: layer.threshold for layer in result.layers if layer.threshold} == {
        "fc.weight": 0.125
    }
    assert re.search(r"^fc\.weight .* 0\.125$", str(result), re.M)


@pytest.mark.parametrize(
    ("empty", "sentence"),
    [
        (["layer3.0.shortcut.0.weight"], "1 layer is EMPTY"),
        (["conv1.weight", "layer2.0.conv1.weight"], "2 layers are EMPTY"),
    ],
)
def test_empty_layers_are_marked(empty, sentence):
    result = report(emptied(*empty))
    assert result.empty_layers == empty
    *table, note = str(result).splitlines()
    marked = [line.split()[0] for line in table if line.endswith("<-- EMPTY")]
    assert marked == empty
    assert sentence in note
    assert fill_layers(empty) in note
    assert all(name in note for name in empty)
    assert [layer["name"] for layer in result.to_dict()["layers"] if layer["empty"]] == empty


def test_a_layer_with_one_weight_left_is_not_called_empty():
    model = emptied("conv1.weight")
    with torch.no_grad():
        model.conv1.weight[3, 0, 1, 1] = -1e-30
    assert report(model).empty_layers == []
    assert "EMPTY" not in str(report(model))


@pytest.mark.parametrize("with_macs", [False, True])
@pytest.mark.parametrize("with_thresholds", [False, True])
def test_table_is_aligned_and_has_a_row_for_each_layer(with_macs, with_thresholds):
    model = emptied("conv1.weight")
    result = report(
        model,
        example_input=torch.randn(1, 1, 8, 8) if with_macs else None,
        thresholds={"fc.weight": 0.5} if with_thresholds else None,
    )
    header, rule, *rows, second_rule, total, _, _ = str(result).splitlines()
    assert set(rule) == set(second_rule) == {"-"}
    assert [row.split()[0] for row in rows] == [layer.name for layer in result.layers]
    assert ("MACs" in header, "threshold" in header) == (with_macs, with_thresholds)
    end = header.index("sparsity") + len("sparsity")
    for line in (*rows, total):
        assert line[:end].endswith(" %")
        assert line[end : end + 1] in ("", " ")
    assert f"{result.weights:,}" in total
    assert f"{result.zeros:,}" in total


def test_to_dict_round_trips_through_json_and_is_complete():
    example = torch.randn(1, 1, 8, 8)
    result = report(network(), example_input=example, thresholds={"fc.weight": torch.tensor(0.5)})
    data = json.loads(json.dumps(result.to_dict()))
    for key in ("weights", "zeros", "sparsity", "dense_macs", "sparse_macs"):
        assert data[key] == getattr(result, key)
    for row, layer in zip(data["layers"], result.layers, strict=True):
        assert tuple(row.pop("shape")) == layer.shape
        assert all(value == getattr(layer, key) for key, value in row.items())


def test_a_report_changes_nothing():
    model = network().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    str(report(model, example_input=torch.randn(1, 1, 8, 8)))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(module.training for module in model.modules())


@given(whole=st.integers(1, 10**9), data=st.data())
def test_percent_is_0_or_100_only_where_exact(whole, data):
    part = data.draw(st.integers(0, whole))
    shown = float(percent(part, whole).removesuffix(" %"))
    assert (shown == 100) == (part == whole)
    assert (shown == 0) == (part == 0)
    assert abs(shown - 100 * part / whole) <= 0.0101


@pytest.mark.parametrize(
    ("macs", "text"),
    [
        (None, "-"),
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (999_994, "999.99 k"),
        (999_996, "1.00 M"),
        (162_378_240, "162.38 M"),
        (4_089_184_256, "4.09 G"),
        (10**22, "10000000.00 P"),
    ],
)
def test_multiply_adds_are_readable(macs, text):
    assert macs_text(macs) == text


@pytest.mark.parametrize("method", available_methods())
def test_every_method_takes_the_advice_for_an_empty_layer(method):
    """Not all methods take min_density, so the advice names it with feather."""
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 2))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"dense_below": 0} if "asl" in method else {}
    if method == "feather-flops":
        options["costs"] = {"0.weight": 1.0, "1.weight": 1.0}
    settings = {"sparsity": 0.9, "total_steps": 1} | options
    sparsifier = sparsify(model, optimizer, method, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        sparsifier.finalize()
    [emptied] = [str(w.message) for w in caught if "1.weight" in str(w.message)] or [
        fill_layers(["1.weight"])
    ]
    assert emptied.endswith(fill_layers(["1.weight"]))
    assert "feather with min_density=" in emptied
    assert "min_density" in method_options("feather")
