"""Attention that a model writes out: computed in planes if nothing but rounding changes."""

import math

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import compiled, pruned
from test_attention import Layer, check, in_pytorch
from torch import nn

from torch_feather.native import export_native
from torch_feather.runtime.steps import Attention

HEADS, DEPTH, T = 2, 16, 9
LOWEST = torch.finfo(torch.float32).min


class Written(Layer):
    """Self-attention of a function of queries, keys and values (batch, head, token, channel)."""

    def __init__(self, attend, kind="fused", **buffers):
        super().__init__(HEADS * DEPTH, HEADS, kind)
        self.attend = attend
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x, mask=None):
        q, k, v = self.split(x)
        y = self.attend(self, q, k, v, *([] if mask is None else [mask]))
        extra = ()
        if isinstance(y, tuple):
            y, *extra = y
        y = self.out(y.transpose(1, 2).reshape(x.shape)) + x
        return (y, *extra) if extra else y


def steps(network):
    return sum(isinstance(s, Attention) for s in network.plan.steps)


def scores(q, k):
    return q @ k.transpose(-2, -1) / math.sqrt(DEPTH)


def causal(n=T):
    return torch.ones(n, n).tril()[None, None]


def plain(layer, q, k, v):
    return F.softmax(scores(q, k), dim=-1) @ v


def scaled_queries(layer, q, k, v):
    return (q * DEPTH**-0.5 @ k.transpose(2, 3)).softmax(-1) @ v


def scaled_twice(layer, q, k, v):
    return (((q / 2) @ (k.mT * 0.7)) * 0.3).softmax(3) @ v


def typed(layer, q, k, v):
    p = F.softmax(scores(q, k), dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(p, 0.5, layer.training) @ v


def keys_of_permutation(layer, q, k, v):
    return (q @ k.transpose(1, 2).permute(0, 2, 3, 1)).softmax(-1) @ v


def batched(layer, q, k, v):
    """As in older models: heads are part of the batch."""
    b = q.shape[0]
    q, k, v = (x.reshape(b * HEADS, -1, DEPTH) for x in (q, k, v))
    p = torch.bmm(q * 0.25, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(p, v).view(b, HEADS, -1, DEPTH)


def batched_with_mask(layer, q, k, v):
    b, n = q.shape[0], q.shape[2]
    q, k, v = (x.reshape(b * HEADS, -1, DEPTH) for x in (q, k, v))
    s = torch.bmm(q, k.transpose(1, 2)).view(b, HEADS, n, n) + layer.bias
    return torch.bmm(s.view(b * HEADS, n, n).softmax(-1), v).view(b, HEADS, -1, DEPTH)


def sum_of_products(layer, q, k, v):
    b = q.shape[0]
    q, k, v = (x.reshape(b * HEADS, -1, DEPTH) for x in (q, k, v))
    s = torch.baddbmm(layer.shared, q, k.transpose(1, 2), alpha=0.25)
    return (s.softmax(-1) @ v).view(b, HEADS, -1, DEPTH)


def added(layer, q, k, v):
    return (layer.bias + scores(q, k)).softmax(-1) @ v


def filled(layer, q, k, v):
    """As in nanoGPT."""
    n = q.shape[2]
    return scores(q, k).masked_fill(layer.mask[:, :, :n, :n] == 0, -math.inf).softmax(-1) @ v


def chosen(layer, q, k, v):
    lowest = torch.full([], LOWEST, dtype=q.dtype)
    return torch.where(layer.mask > 0, scores(q, k), lowest).softmax(-1) @ v


def chosen_last(layer, q, k, v):
    return torch.where(layer.mask == 0, -math.inf, scores(q, k)).softmax(-1) @ v


def table(layer, q, k, v):
    """A bias that is looked up, and a mask, as in Swin."""
    bias = layer.numbers[layer.index.view(-1)].view(T, T, -1).permute(2, 0, 1).contiguous()
    s = q @ k.transpose(-2, -1) + bias.unsqueeze(0)
    return (s + torch.zeros(T, T).masked_fill(layer.index > 60, -100.0)).softmax(-1) @ v


def buffers():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(81, HEADS, generator=generator)
    index = torch.randperm(81, generator=generator).view(T, T)
    bias = numbers.T.reshape(1, HEADS, T, T)
    return {
        "mask": causal(), "bias": bias, "shared": bias[0, :1], "numbers": numbers, "index": index,
    }  # fmt: skip


FORMS = [
    *(plain, scaled_queries, scaled_twice, typed, keys_of_permutation, batched),
    *(batched_with_mask, sum_of_products, added, filled, chosen, chosen_last, table),
]


@pytest.mark.parametrize("kind", ["fused", "separate"])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_forms(form, kind):
    """Nothing is left in PyTorch, also of masks that are computed from constants."""
    network = check(Written(form, kind, **buffers()), torch.randn(2, T, HEADS * DEPTH))
    assert not in_pytorch(network)
    network = check(Written(form, kind, **buffers()), torch.randn(1, T, HEADS * DEPTH))
    assert not in_pytorch(network)


@pytest.mark.parametrize("form", [filled, chosen, chosen_last], ids=lambda f: f.__name__)
def test_causal_masks_need_no_memory(form):
    network = check(Written(form, **buffers()), torch.randn(2, T, HEADS * DEPTH))
    (step,) = (s for s in network.plan.steps if isinstance(s, Attention))
    assert step.is_causal
    assert step.mask is None


def test_masks_of_sequences_in_turn():
    """As in Swin: each sample consists of several sequences, which have masks of their own."""
    masks = torch.zeros(3, T, T)
    masks[1, :4, 5:], masks[2, 4:, :3] = -100.0, -100.0

    class Windows(Written):
        def forward(self, x):
            return super().forward(x.reshape(-1, T, HEADS * DEPTH)).reshape(x.shape)

    def windows(layer, q, k, v):
        s = scores(q, k) + layer.bias
        s = s.view(-1, 3, HEADS, T, T) + layer.masks.unsqueeze(1).unsqueeze(0)
        return s.view(-1, HEADS, T, T).softmax(-1) @ v

    for batch in (1, 2):
        layer = Windows(windows, masks=masks, bias=buffers()["bias"])
        network = check(layer, torch.randn(batch, 3 * T, HEADS * DEPTH))
        assert in_pytorch(network) <= {"aten.reshape.default"}  # of the input


def test_masks_as_inputs():
    """Numbers that are certainly finite are added; padding hides keys, even all of a sample."""

    def padded(layer, q, k, v, mask):
        lowest = torch.where(mask[:, None, None] > 0, 0.0, LOWEST)
        return (scores(q, k) + lowest).softmax(-1) @ v

    def filled_with_lowest(layer, q, k, v, mask):
        return scores(q, k).masked_fill(mask[:, None, None] == 0, LOWEST).softmax(-1) @ v

    mask = torch.ones(3, T)
    mask[1, 5:], mask[2] = 0, 0
    for form in (padded, filled_with_lowest):
        check(Written(form), torch.randn(3, T, HEADS * DEPTH), mask, batches=(2,))


def not_certain():
    def softmax_of_queries(layer, q, k, v):
        return scores(q, k).softmax(-2) @ v

    def double(layer, q, k, v):
        return F.softmax(scores(q, k), -1, dtype=torch.float64).float() @ v

    def returned(layer, q, k, v):
        p = scores(q, k).softmax(-1)
        return p @ v, p

    def read(layer, q, k, v):
        s = scores(q, k)
        return s.softmax(-1) @ v, s.amax()

    def row_without_keys(layer, q, k, v):
        return scores(q, k).masked_fill(layer.mask < 2, -math.inf).softmax(-1) @ v

    def mask_as_input(layer, q, k, v, mask):
        return scores(q, k).masked_fill(mask[:, None, None] == 0, -math.inf).softmax(-1) @ v

    def numbers_as_input(layer, q, k, v, mask):
        return (scores(q, k) + mask[:, None, None]).softmax(-1) @ v

    def scaled_after_mask(layer, q, k, v):
        return ((scores(q, k) + layer.bias) * 0.5).softmax(-1) @ v

    def filled_with_a_score(layer, q, k, v):
        return scores(q, k).masked_fill(layer.mask == 0, -1.0).softmax(-1) @ v

    def filled_after_infinity(layer, q, k, v):
        s = scores(q, k).masked_fill(layer.mask == 0, -math.inf)
        return s.masked_fill(layer.mask.mT == 0, LOWEST).softmax(-1) @ v

    def values_of_products(layer, q, k, v):
        return scores(q, k) @ v

    def one_more_key(layer, q, k, v):
        """As in attention with a sink."""
        s = F.pad(scores(q, k), (0, 1))
        return s.softmax(-1)[..., :-1] @ v

    def heads_in_turn(layer, q, k, v):
        return scores(q, k).softmax(-1).flip(1) @ v

    return list(locals().values())


@pytest.mark.parametrize("form", not_certain(), ids=lambda f: f.__name__)
def test_what_pytorch_computes(form):
    """Results that another function would not return, also of rows without keys, are kept."""
    given = [torch.randn(2, T, HEADS * DEPTH)]
    if form.__code__.co_argcount == 5:
        given.append(torch.ones(2, T))
        given[1][0, 5:], given[1][1] = 0, 0
    layer = pruned(Written(form, **buffers()), 0.6)
    network = compiled(layer, tuple(given))
    assert steps(network) == 0
    with torch.no_grad():
        for x in (given, [torch.cat([g, g])[:3] for g in given]):
            leaves = torch.utils._pytree.tree_leaves
            for a, b in zip(leaves(network(*x)), leaves(layer(*x)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_rows_without_keys_of_other_batch_sizes():
    """Other sizes are captured with the same masks: NaN is where it is in PyTorch."""
    mask = causal()
    mask[0, 0, 4] = 0
    layer = pruned(Written(filled, mask=mask), 0.6)
    network = compiled(layer, torch.randn(1, T, HEADS * DEPTH))
    for batch in (1, 3):
        x = torch.randn(batch, T, HEADS * DEPTH)
        assert network(x).isnan().sum() == layer(x).isnan().sum() == batch * HEADS * DEPTH


def test_results_share_no_memory_with_constants():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.table = nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            positions = self.table * 2
            return self.layer(x) + positions, positions[1:], self.table

    model = pruned(Positions())
    x = torch.randn(2, 4, 8)
    network = compiled(model, x)
    for value in network(x):
        value.zero_()
    for a, b in zip(network(x), model(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", [plain, added, filled, chosen], ids=lambda f: f.__name__)
def test_files(form, tmp_path):
    import torch_feather as feather

    network = compiled(pruned(Written(form, **buffers())), torch.randn(2, T, HEADS * DEPTH))
    feather.save_compiled(network, tmp_path / "net", batch_sizes=[1, 2])
    loaded = feather.load_compiled(tmp_path / "net")
    for batch in (2, 1):
        x = torch.randn(batch, T, HEADS * DEPTH)
        assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize("form", [plain, scaled_queries, added], ids=lambda f: f.__name__)
def test_native_libraries(form, tmp_path):
    """They have loops of their own; the export compares the library with PyTorch."""
    layer = pruned(Written(form, **buffers()))
    assert export_native(layer, torch.randn(2, T, HEADS * DEPTH), tmp_path)


def transformers_models():
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 60, "attn_implementation": "eager"}
    bert = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, **common
    )
    gpt = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=32, use_cache=False, bos_token_id=1,
        eos_token_id=1, **common,
    )  # fmt: skip
    return transformers.BertModel(bert), transformers.GPT2Model(gpt)


class Hidden(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def test_transformers():
    """BERT and GPT-2 in their eager form, with and without a mask of padding."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    for model in transformers_models():
        for given in ((torch.randint(60, (2, 9)),), (torch.randint(60, (2, 9)), mask)):
            hidden = Hidden(model)
            network = check(hidden, *given, steps=2, batches=(3,))
            left = in_pytorch(network)
            assert not left & {"aten.matmul.default", "aten.softmax.int"}
            if len(given) == 1:  # the mask is constant
                assert not left & {"aten.where.ScalarOther", "aten.arange.default"}
