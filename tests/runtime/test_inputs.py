"""Several inputs, integers and named inputs; functions that write into values."""

from contextlib import suppress

import pytest
import torch
from runtime_cases import TOLERANCE, compiled, error, pruned
from torch import nn

from torch_feather.runtime import InputError
from torch_feather.runtime.capture import capture
from torch_feather.runtime.in_place import may_write_into_input, without_writes


class Two(nn.Module):
    """An image and the numbers of tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, tokens):
        y = torch.relu(self.a(x) + self.embed(tokens))
        return {"y": self.b(y), "given": (x, [tokens])}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pruned(Two())


def example(batch):
    return torch.randn(batch, 8), torch.randint(9, (batch,))


def check(found, expected):
    a, b = (torch.utils._pytree.tree_flatten(v) for v in (found, expected))
    assert a[1] == b[1]
    for x, y in zip(a[0], b[0], strict=True):
        assert x.dtype == y.dtype
        assert error(x, y) < TOLERANCE


@pytest.mark.parametrize("named", [False, True])
def test_several_inputs(model, named):
    def form(batch):
        return dict(zip(("x", "tokens"), example(batch), strict=True)) if named else example(batch)

    network = compiled(model, form(3))
    for batch in (3, 1, 5):
        given = form(batch)
        call = (lambda f, g=given: f(**g)) if named else (lambda f, g=given: f(*g))
        with torch.no_grad():
            check(call(network), call(model))
    empty = form(3)
    if named:
        empty = {name: x[:0] for name, x in empty.items()}
        assert network(**empty)["y"].shape == (0, 4)
    assert network.inputs.shapes == ((8,), ())


def test_inputs_of_variable_number():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, *others, **named):
            return sum(map(self.layer, (x, *others, *named.values())))

    model, x = Sum().eval(), torch.randn(3, 4)
    network = compiled(model, (x[:1], x[1:2]))
    assert error(network(x, 2 * x), model(x, 2 * x)) < TOLERANCE
    network = compiled(model, {"x": x, "y": -x})
    assert error(network(x=x, y=2 * x), model(x, y=2 * x)) < TOLERANCE
    with suppress(InputError):  # guards of PyTorch 2.14 are wrong for named inputs of any number
        assert error(network(x=x[:2], y=x[:2]), model(x[:2], y=x[:2])) < TOLERANCE


WRONG = {
    "too few": (lambda x, t: ((x,), {}), "2 positional inputs, got 1"),
    "named": (lambda x, t: ((x,), {"tokens": t}), "got 1, tokens"),
    "float tokens": (lambda x, t: ((x, t.float()), {}), "compiled for int64 inputs"),
    "other batch": (lambda x, t: ((x, t[:1]), {}), "same number of samples, got 3, 1"),
    "swapped": (lambda x, t: ((t, x), {}), "compiled for float32 inputs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(model, name):
    network = compiled(model, example(3))
    function, message = WRONG[name]
    args, kwargs = function(*example(3))
    with pytest.raises(InputError, match=message):
        network(*args, **kwargs)


def test_wrong_examples(model):
    x, tokens = example(3)
    with pytest.raises(InputError, match="first dimension of all inputs must be the batch"):
        compiled(model, (x, tokens[:1]))
    with pytest.raises(InputError, match="at least one tensor"):
        compiled(model, ())


def test_chunks_of_several_inputs(model):
    from torch_feather.runtime import compile_sparse

    network = compile_sparse(model, example(2), threads=1, tuning={}, chunk_size=2)
    given = example(5)
    with torch.no_grad():
        assert error(network(*given)["y"], model(*given)["y"]) < TOLERANCE


@pytest.mark.slow
def test_language_models():
    """A GPT-2 and a BERT, whose layers run sparse."""
    transformers = pytest.importorskip("transformers")
    size = dict.fromkeys(("hidden_size", "intermediate_size"), 64)
    bert = transformers.BertModel(
        transformers.BertConfig(vocab_size=50, num_hidden_layers=1, num_attention_heads=4, **size)
    )
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=64, n_layer=1, n_head=4, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    ids = torch.randint(50, (2, 16))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    for model, given in (
        (bert, {"input_ids": ids, "attention_mask": mask}),
        (gpt, {"input_ids": ids}),
    ):
        model = pruned(model)
        network = compiled(model, given)
        with torch.no_grad():
            found, expected = network(**given), model(**given)
        assert type(found) is type(expected)
        assert error(found[0], expected[0]) < 5 * TOLERANCE
        assert sum(layer.sparse for layer in network.tuning.values()) >= 4


# Functions that write into values


def exported(function, *inputs):
    class Model(nn.Module):
        def forward(self, *given):
            return function(*given)

    return torch.export.export(Model(), inputs).module().graph


FUNCTIONAL = {
    "chain": lambda x: (x + 1).relu_().mul_(2).clamp_(max=1),
    "used before": lambda x: (y := x + 1) * (y * 2) + y.relu_(),
    "view that is used once": lambda x: (x + 1)[:, :2].add_(1),
    "copy": lambda x: torch.zeros_like(x).copy_(x),
    "list": lambda x: torch.cat([(y := x + 1).relu_(), y], 1),
}
OTHER = {
    "view that is used again": lambda x: (y := x + 1)[:, :2].add_(1) + y[:, :2],
    "its view is used": lambda x: (y := x + 1)[0] + y.relu_()[0],
    "promotion": lambda x: (x.int() + 1).mul_(2) + x,
    "input": lambda x: x.relu_() + 1,
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_writes_that_are_replaced(name):
    x = torch.randn(3, 4)
    graph = exported(FUNCTIONAL[name], x)
    assert without_writes(graph)
    graph.lint()
    assert not any(str(n.target).split(".")[-2:][0].endswith("_") for n in graph.nodes)
    function = FUNCTIONAL[name]
    assert torch.equal(torch.fx.GraphModule(nn.Module(), strip(graph))(x), function(x.clone()))


def strip(graph):
    """Return the graph without guards, and without the structure of inputs and outputs."""
    for node in list(graph.nodes):
        if node.op == "call_module":
            graph.erase_node(node)
    (result,) = (n for n in graph.nodes if n.op == "output")
    result.args = (result.args[0][0],)
    graph.set_codegen(torch.fx.graph.CodeGen())
    return graph


@pytest.mark.parametrize("name", OTHER)
def test_writes_that_are_left_to_pytorch(name):
    assert not without_writes(exported(OTHER[name], torch.randn(3, 4)))


@pytest.mark.parametrize("name", [n for n in (*FUNCTIONAL, *OTHER) if n != "input"])
def test_networks_with_writes(name):
    function = (FUNCTIONAL | OTHER)[name]

    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    x = torch.randn(3, 4)
    assert torch.equal(compiled(Model(), x)(x), function(x.clone()))


def test_writes_into_inputs_are_found():
    x = torch.randn(3, 4)
    for function in (
        lambda x: x.relu_(),
        lambda x: x[:1].t().add_(1),
        lambda x: torch.relu_(x.view(-1)),
    ):
        assert may_write_into_input(exported(function, x))
    for function in (lambda x: (x + 1).relu_(), lambda x: x.clone().relu_()):
        assert not may_write_into_input(exported(function, x))


def test_composite_functions_stay_whole():
    """`hardswish_` becomes one function, which is fused into the layer before it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(inplace=True)).eval()
    graph = capture(model, torch.ones(1, 3, 5, 5)).module.graph
    (layer,) = (n.target for n in graph.nodes if n.op == "call_function" and "layer" in n.name)
    assert layer.activation == "hardswish"
