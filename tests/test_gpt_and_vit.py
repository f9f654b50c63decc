"""The transformers: what they compute, and which of their weights are pruned."""

import pytest
import torch

import torch_feather as feather
from torch_feather import models
from torch_feather.errors import ConfigurationError
from torch_feather.models.transformer import GPT, ViT
from torch_feather.prunable import find_prunable


def gpt(**changes):
    torch.manual_seed(0)
    return GPT(**{"num_classes": 7, "depth": 2, "dim": 8, "heads": 2, "length": 12} | changes)


def vit(**changes):
    torch.manual_seed(0)
    sizes = {"depth": 2, "dim": 8, "heads": 2, "patch": 4, "length": 16}
    return ViT(5, 3, **sizes | changes)


def test_a_logit_depends_on_no_later_character():
    model, ids = gpt(), torch.tensor([[0, 1, 2, 3, 4, 5]])
    later = ids.clone()
    later[0, 3] = 6
    before, after = model(ids), model(later)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(2).all()


def test_a_vision_transformer_sees_all_patches_and_their_positions():
    model, x = vit(), torch.zeros(1, 3, 8, 8)
    outputs = []
    for row, column in ((0, 0), (0, 4), (4, 0), (4, 4)):
        x_one = x.clone()
        x_one[..., row, column] = 1.0
        outputs.append(model(x_one))
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_attention_equals_its_formula():
    attention, x = gpt().trunk.blocks[0].attn, torch.randn(3, 5, 8)
    q, k, v = attention.qkv(x).split(8, 2)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 2.0  # the root of 4
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(2) @ v[..., part])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, 2)))


def test_embeddings_positions_and_the_shared_head_stay_dense_by_default():
    blocks = {
        f"trunk.blocks.{i}.{layer}.weight"
        for i in range(2)
        for layer in ("attn.qkv", "attn.proj", "fc1", "fc2")
    }
    assert {item.name for item in find_prunable(gpt())} == blocks
    expected = blocks | {"patches.weight", "head.weight"}
    assert {item.name for item in find_prunable(vit())} == expected


@pytest.mark.parametrize("model", [gpt(), vit()], ids=["gpt", "vit"])
def test_every_prunable_weight_fits_two_of_four(model):
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = feather.sparsify(
        model,
        optimizer,
        sparsity=0.5,
        pattern="2:4",
        total_steps=1,
        schedule="constant",
        exclude=["embedding.weight"] if isinstance(model, GPT) else None,
    )
    for mask in sparsifier.masks().values():
        assert (mask.view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize(("name", "parameters"), [("gpt_small", 838_912), ("vit_small", 691_780)])
def test_the_small_networks_have_these_sizes(name, parameters):
    model = models.create(name, num_classes=100)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_more_positions_than_trained_are_an_error():
    with pytest.raises(ValueError, match="13 positions are more than the 12"):
        gpt()(torch.zeros(1, 13, dtype=torch.int64))


def test_sizes_are_checked():
    with pytest.raises(ConfigurationError, match="num_classes must be at least 1"):
        models.create("gpt_small", num_classes=0)


@pytest.mark.parametrize(
    ("model", "x"),
    [(gpt(), torch.tensor([[3, 1, 4, 1]])), (vit(), torch.ones(1, 3, 16, 16))],
    ids=["gpt", "vit"],
)
def test_a_compiled_transformer_computes_the_same(model, x):
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(feather.compile_sparse(model, x)(x), model(x))
