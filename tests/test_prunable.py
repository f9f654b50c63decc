"""Filters choose what a reader of their text would choose, and say so where they choose nothing."""

import re

import pytest
import torch
import transformers
from torch import nn

from torch_feather import ConfigurationError
from torch_feather.prunable import find_prunable


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.bias_table = nn.Parameter(torch.randn(9, 2))
        self.proj = nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attn = attention
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class ViT(nn.Module):
    """Patches, positions, two kinds of attention, a head."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 8))
        self.patch_embed = nn.Conv2d(3, 8, 2)
        multihead = nn.MultiheadAttention(8, 2)
        self.blocks = nn.ModuleList([Block(Attention()), Block(multihead)])
        self.head = nn.Linear(8, 4)


class GPT(nn.Module):
    """Its head is its embedding, and its two blocks are one."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        block = Block(Attention())
        self.h = nn.ModuleList([block, block])
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight


OWN = ["blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"]
MULTIHEAD = ["blocks.1.attn.in_proj_weight", "blocks.1.attn.out_proj.weight"]
MLP = [f"blocks.{i}.mlp.{j}.weight" for i in (0, 1) for j in (0, 2)]
VIT = ["patch_embed.weight", *OWN, *MLP[:2], *MULTIHEAD, *MLP[2:], "head.weight"]
GPT_BLOCK = [f"h.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]


def without(*names: str) -> list[str]:
    return [name for name in VIT if name not in names]


def chosen(model: nn.Module, **filters) -> list[str]:
    return [item.name for item in find_prunable(model, **filters)]


CHOICES = {
    "nothing said": (ViT, {}, VIT),
    "a glob goes across dots": (ViT, {"include": "*.attn.*weight"},
                                [OWN[0], "blocks.0.attn.norm.weight", OWN[1], *MULTIHEAD]),
    "without one layer": (ViT, {"exclude": "head.*"}, VIT[:-1]),
    "a type is all within it": (ViT, {"exclude": Attention}, without(*OWN)),
    "PyTorch's attention too": (ViT, {"exclude": nn.MultiheadAttention}, without(*MULTIHEAD)),
    "of a type, its own matrices and the weights within": (
        ViT, {"include": Attention}, ["blocks.0.attn.bias_table", *OWN]),
    "of the model's own type, its weights and its own matrices": (
        ViT, {"include": ViT}, ["pos_embed", *VIT]),
    "types and names": (ViT, {"include": [nn.MultiheadAttention, "head.weight"]},
                        [*MULTIHEAD, "head.weight"]),
    "a regex is searched": (ViT, {"include": re.compile(r"mlp\.\d\.weight$")}, MLP),
    "a callable sees what holds the weight": (
        ViT,
        {"include": lambda m, name: getattr(m, "in_features", 0) == 16 and "weight" in name},
        [MLP[1], MLP[3]]),
    "a callable may find nothing to leave out": (
        ViT, {"exclude": lambda module, name: False}, VIT),
    "lists in lists, and generators": (
        ViT, {"exclude": (one for one in (["head.*", nn.Conv2d], re.compile("mlp")))},
        [*OWN, *MULTIHEAD]),
    "include and exclude": (ViT, {"include": Block, "exclude": [Attention, "*.2.weight"]},
                            [MLP[0], *MULTIHEAD, MLP[2]]),
    "an embedding and what is tied to it are none": (GPT, {}, GPT_BLOCK),
    "unless asked for, by either name": (
        GPT, {"include": "lm_head.weight"}, ["lm_head.weight"]),
    "left out by any of its names": (GPT, {"exclude": "h.1.mlp.*"}, GPT_BLOCK[:2]),
    "taken by any of its names": (GPT, {"include": "h.1.mlp.0.weight"}, ["h.1.mlp.0.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_filters_choose(case):
    model, filters, expected = CHOICES[case]
    assert chosen(model(), **filters) == expected


def test_a_tied_weight_is_excluded_by_either_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert chosen(model) == ["0.weight", "2.weight"]
    for name in ("0.weight", "1.weight"):
        assert chosen(model, exclude=name) == ["2.weight"]


def test_a_model_that_contains_itself_is_visited_once():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].parent = model
    assert chosen(model) == ["0.weight"]


def test_linear_layers_of_transformers_are_prunable():
    config = transformers.GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    found = chosen(transformers.GPT2LMHeadModel(config))
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert found == [f"transformer.h.0.{layer}.weight" for layer in layers]


@pytest.mark.parametrize("role", ["include", "exclude"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("head", r"did you mean 'head\.\*'"),
        ("blocks.0.attn", r"did you mean 'blocks\.0\.attn\.\*'"),
        ("attn", r"did you mean '\*attn\*'"),
        ("haed.weight", r"did you mean 'head\.weight'"),
        (["head.*", "blocks.0.mlp.1.weight"],
         r"'blocks\.0\.mlp\.1\.weight'.*did you mean '?blocks\.0\.mlp\.[02]\.weight"),
        ("zzz", r"There are pos_embed, patch_embed\.weight.* more"),
        (re.compile(r"^attn\."), r"did you mean '\*attn"),
        (nn.Conv1d, r"Conv1d holds no parameter.*Conv2d"),
    ],
    ids=str,
)  # fmt: skip
def test_a_filter_that_matches_nothing_is_an_error_that_names_the_nearest(role, given, words):
    with pytest.raises(ConfigurationError, match=f"^{role}: .*{words}"):
        find_prunable(ViT(), **{role: given})


@pytest.mark.parametrize("given", [3, ["*", 3], [None], nn.Linear(2, 2)], ids=str)
def test_an_invalid_filter_is_an_error(given):
    with pytest.raises(ConfigurationError, match="take a glob"):
        find_prunable(nn.Linear(2, 2), include=given)


NAMES = ["stage[0]", "stage[1]", "a[!b]", "[", "]", "x[]", "s*", "q?", "[[]", "plain"]


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_name_of_a_parameter_matches_itself(name):
    model = nn.ModuleDict({one: nn.Linear(2, 2, bias=False) for one in NAMES})
    exact = f"{name}.weight"
    assert exact in chosen(model, include=exact)
    assert exact not in chosen(model, exclude=exact)
    if not set(name) & set("*?"):  # these are wildcards as well
        assert chosen(model, include=exact) == [exact]
        assert chosen(model, exclude=exact) == [f"{n}.weight" for n in NAMES if n != name]


def test_brackets_are_sets_of_characters_too():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    assert chosen(model, include="[02].weight") == ["0.weight", "2.weight"]
    assert chosen(model, exclude="[!3].*") == ["3.weight"]


@pytest.mark.parametrize(
    "wrong",
    ["stage[0]", "stage[2].weight", "*stage[2]*", "age[0].weight", "[0]", "stage[0].wieght"],
)
def test_a_hint_matches_what_it_names(wrong):
    """Names have brackets, which a hint must not turn into a set of characters."""
    model = nn.ModuleDict({f"stage[{i}]": nn.Linear(2, 2) for i in range(2)})
    with pytest.raises(ConfigurationError, match="did you mean") as error:
        find_prunable(model, exclude=wrong)
    hints = re.findall(r"'([^']+)'", str(error.value).partition("did you mean")[2])
    assert hints
    for hint in hints:
        assert find_prunable(model, include=hint)


def test_an_exact_name_is_one_group_of_targets():
    from torch_feather.prunable import group_prunable

    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("s[0]", "s0", "s[1]")})
    found = find_prunable(model)
    assert group_prunable(model, found, ["s[0].weight", "*"]) == [0, 1, 1]
