"""Weights that the default choice leaves dense are named once, with lines that work as given."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.func import functional_call

import torch_feather as feather
from torch_feather import ConfigurationError
from torch_feather.prunable import find_prunable

from conformance.methods import GlobalThreshold  # isort: skip


class ForeignLinear(nn.Module):
    """A layer of another library, which is no subclass of nn.Linear."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class GraphConvolution(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.lin = ForeignLinear(inputs, outputs)
        self.att_src = nn.Parameter(torch.randn(1, 2, outputs))
        self.att_vector = nn.Parameter(torch.randn(2 * outputs))
        self.att_bias = nn.Parameter(torch.zeros(outputs))


class Graph(nn.Module):
    def __init__(self, head: bool = True):
        super().__init__()
        self.convs = nn.ModuleList([GraphConvolution(8, 16), GraphConvolution(16, 16)])
        self.norm = nn.LayerNorm((4, 16))  # its weight has two dimensions
        self.head = nn.Linear(16, 4) if head else nn.Identity()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 8))
        self.gate = nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))


def recurrent() -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(20, 8), "rnn": nn.LSTM(8, 8, 2, bidirectional=True),
                          "cell": nn.GRUCell(8, 8), "head": nn.Linear(8, 4)})  # fmt: skip


def gpt() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_positions=9, n_embd=8, n_layer=2, n_head=2)
    )


GRAPH = [f"convs.{i}.{name}" for i in (0, 1) for name in ("lin.weight", "att_src", "att_vector")]
LSTM = [
    f"rnn.weight_{kind}_l{layer}{direction}"
    for layer in (0, 1)
    for direction in ("", "_reverse")
    for kind in ("ih", "hh")
]
CASES = {
    "layers and attention of another library": (Graph, GRAPH),
    "recurrent layers and embeddings": (
        recurrent, ["embed.weight", *LSTM, "cell.weight_ih", "cell.weight_hh"]),
    "embeddings of Transformers": (gpt, ["transformer.wte.weight", "transformer.wpe.weight"]),
    "experts": (Experts, ["experts"]),
}  # fmt: skip


def attach(model: nn.Module, **filters) -> tuple[set[str], list[str]]:
    """The names of the weights that are pruned, and the warnings."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparsifier = feather.sparsify(model, optimizer, sparsity=0.5, total_steps=4, **filters)
    texts = [str(w.message) for w in caught if issubclass(w.category, feather.FeatherWarning)]
    return set(sparsifier.masks()), texts


def line(text: str, name: str) -> list[str]:
    """The list that a message suggests for `include` or `exclude`."""
    return re.findall(r'"([^"]*)"', re.search(rf"{name}=\[(.*?\")\]", text)[1])


@pytest.mark.parametrize("case", CASES)
def test_the_weights_that_stay_dense_are_named_with_the_lines_that_work(case):
    build, left = CASES[case]
    default, [text] = attach(build())
    model = build()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    share = sum(sizes[name] for name in left) / sum(sizes.values())
    assert f"({share:.1%} of the trainable parameters) stay dense" in text
    assert text.startswith(max(left, key=sizes.__getitem__))
    assert attach(build(), include=line(text, "include")) == (default | set(left), [])
    assert attach(build(), exclude=line(text, "exclude")) == (default, [])


def test_a_filter_of_the_user_is_a_choice():
    assert attach(Graph(), include="head.weight") == ({"head.weight"}, [])
    _, [text] = attach(Graph(), exclude=["convs.0.*", "*.att_*"])
    assert text.startswith("convs.1.lin.weight (")


def test_small_parts_positions_and_frozen_weights_are_not_named():
    model = nn.Sequential(nn.Linear(100, 100), nn.Embedding(3, 8))  # 24 of 10,124
    assert attach(model)[1] == []
    frozen = nn.Sequential(nn.Linear(8, 8), nn.Embedding(99, 8).requires_grad_(False))
    assert attach(frozen)[1] == []
    vit = nn.ModuleDict({"mlp": nn.Linear(8, 8), "norm": nn.LayerNorm((8, 8))})
    vit.register_parameter("pos_embed", nn.Parameter(torch.randn(1, 64, 8)))
    vit.register_parameter("relative_position_bias_table", nn.Parameter(torch.randn(64, 8)))
    assert attach(vit)[1] == []


def test_weights_that_are_computed_are_not_named():
    for normed in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(normed(nn.Linear(8, 8)), nn.Linear(8, 8))
        assert attach(model, exclude="0.weight") == ({"1.weight"}, [])


def test_a_model_without_default_weights_is_an_error_with_the_line_that_works():
    model = Graph(head=False)
    with pytest.raises(
        ConfigurationError, match=r"no prunable weights: convs\.1\.lin\.weight"
    ) as error:
        attach(model)
    assert attach(model, include=line(str(error.value), "include")) == (set(GRAPH), [])


def test_the_word_default_stands_for_the_default_choice():
    names = lambda **filters: [p.name for p in find_prunable(recurrent(), **filters)]  # noqa: E731
    assert names(include="default") == ["head.weight"]
    assert names(include=["default", "cell.weight_ih"]) == ["cell.weight_ih", "head.weight"]
    assert names(include=["default", "embed.*"], exclude="head.*") == ["embed.weight"]
    with pytest.raises(ConfigurationError, match="exclude"):
        names(exclude="default")


# --- recurrent weights ----------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        layer = getattr(nn, kind)
        options = {} if "Cell" in kind else {"num_layers": 2, "batch_first": True}
        self.rnn, self.head = layer(6, 8, **options), nn.Linear(8, 4)
        self.is_cell = "Cell" in kind

    def forward(self, x):
        if self.is_cell:
            state = None
            for t in range(x.shape[1]):
                state = self.rnn(x[:, t], state)
            return self.head(state[0] if isinstance(state, tuple) else state)
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_recurrent_weights_take_the_steps_of_the_reference(kind):
    """The reference applies the operator within the network, through autograd."""
    torch.manual_seed(0)
    model = Recurrent(kind).double()
    other = Recurrent(kind).double()
    other.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9) for m in (model, other)]
    include = ["default", "rnn.weight_*"]
    settings = {"sparsity": 0.8, "total_steps": 10}
    sparsifier = feather.sparsify(
        model, optimizers[0], include=include, theta=0.5, **settings
    )  # fmt: skip
    names = list(sparsifier.masks())
    assert len(names) == (3 if "Cell" in kind else 5)
    reference = GlobalThreshold(other, names, theta=0.5, **settings)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 5, 6, generator=generator).double(), torch.arange(8) % 4
        for optimizer, network in zip(optimizers, (model, reference), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
        reference.advance()
        for name, w in sparsifier.latent_weights().items():
            torch.testing.assert_close(w, reference.latent[name].detach())
    effective = reference.effective()
    sparsifier.finalize()
    size = sum(model.get_parameter(name).numel() for name in names)
    assert sum(int((model.get_parameter(n) == 0).sum()) for n in names) == round(0.8 * size)
    torch.testing.assert_close(model(x), functional_call(other, effective, (x,)))


# --- adapters -------------------------------------------------------------------------------


class BaseTunerLayer:
    """Stands for that of PEFT, which is recognized by its name."""

    __module__, __qualname__ = "peft.tuners.tuners_utils", "BaseTunerLayer"


class Tuned(nn.Module, BaseTunerLayer):
    """As PEFT wraps a linear layer; `lokr_w1` stands for the names of its other adapters."""

    def __init__(self, first: str, second: str):
        super().__init__()
        self.base_layer = nn.Linear(16, 16).requires_grad_(False)
        self.first, self.second = first, second
        self.add_module(first, nn.ModuleDict({"default": nn.Linear(16, 4, bias=False)}))
        self.add_module(second, nn.ModuleDict({"default": nn.Linear(4, 16, bias=False)}))
        nn.init.zeros_(self.get_submodule(second)["default"].weight)

    def forward(self, x):
        low = self.get_submodule(self.first)["default"](x)
        return self.base_layer(x) + self.get_submodule(self.second)["default"](low)


def tuned(first: str = "lora_A", second: str = "lora_B") -> nn.Module:
    return nn.Sequential(Tuned(first, second), nn.ReLU(), Tuned(first, second), nn.Linear(16, 4))


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lokr_w1", "lokr_w2"), ("down", "up")])
def test_adapters_are_no_default_and_are_named(names):
    model = tuned(*names)
    default, [text] = attach(model)
    assert default == {"3.weight"}
    adapters = {f"{i}.{name}.default.weight" for i in (0, 2) for name in names}
    assert "Adapters (LoRA)" in text
    assert "docs/finetuning.md" in text
    assert attach(tuned(*names), include=line(text, "include"))[0] == default | adapters


def test_the_base_layer_of_an_adapter_is_prunable_when_it_trains():
    model = tuned().requires_grad_(True)
    assert attach(model)[0] == {"0.base_layer.weight", "2.base_layer.weight", "3.weight"}


@pytest.mark.apps
def test_layers_of_peft_are_recognized():
    peft = pytest.importorskip("peft")
    model = transformers.BertModel(transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=20,
    ))  # fmt: skip
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ConfigurationError, match=r"lora_A\.default\.weight.*Adapters") as error:
        attach(wrapped)
    assert len(attach(wrapped, include=line(str(error.value), "include"))[0]) == 2
