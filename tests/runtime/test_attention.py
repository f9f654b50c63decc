"""Attention in planes: heads, masks, lengths, batches, and what PyTorch computes instead."""

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import TOLERANCE, compiled, error, pruned
from torch import nn

import torch_feather as feather
from torch_feather.runtime.steps import Attention, Copy, Torch

sdpa = F.scaled_dot_product_attention


class Layer(nn.Module):
    """Self-attention, in the ways of common implementations.

    Args:
        channels: of the tokens.
        heads: number of heads.
        kind: "fused" as in timm, "split" as in GPT-2, or "separate" as in BERT.
        options: function of (queries, keys, values) that returns options of the attention.
    """

    def __init__(self, channels=32, heads=2, kind="fused", options=lambda q, k, v: {}):
        super().__init__()
        self.heads, self.kind, self.options = heads, kind, options
        self.qkv = nn.ModuleList(
            [nn.Linear(channels, channels) for _ in range(3)]
            if kind == "separate"
            else [nn.Linear(channels, 3 * channels)]
        )
        self.out = nn.Linear(channels, channels)

    def split(self, x):
        batch, tokens, channels = x.shape
        depth = channels // self.heads
        if self.kind == "fused":
            parts = self.qkv[0](x).reshape(batch, tokens, 3, self.heads, depth)
            return parts.permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "split":
            parts = self.qkv[0](x).split(channels, dim=2)
        else:
            parts = [layer(x) for layer in self.qkv]
        return [p.view(batch, -1, self.heads, depth).transpose(1, 2) for p in parts]

    def forward(self, x, *masks):
        q, k, v = self.split(x)
        options = {"attn_mask": masks[0]} if masks else self.options(q, k, v)
        y = sdpa(q, k, v, **options).transpose(1, 2).reshape(x.shape)
        return x + self.out(y)


def check(model, *inputs, threads=1, steps=1, batches=(1, 3)):
    """Compare a network with PyTorch; return it.

    Args:
        steps: expected number of attention steps.
        batches: further batch sizes.
    """
    model = pruned(model, 0.6)
    network = compiled(model, inputs[0] if len(inputs) == 1 else inputs, threads=threads)
    others = [[x.repeat(n, *[1] * (x.dim() - 1))[:n] for x in inputs] for n in batches]
    with torch.no_grad():
        for given in ([*inputs], *others, [*inputs]):
            found, expected = network(*given), model(*given)
            leaves = torch.utils._pytree.tree_leaves
            for a, b in zip(leaves(found), leaves(expected), strict=True):
                assert error(a, b) < 3 * TOLERANCE
    assert sum(isinstance(s, Attention) for s in network.plan.steps) == steps
    return network


def in_pytorch(network):
    names = {str(s.node.target) for s in network.plan.steps if isinstance(s, Torch)}
    return names - {"aten.sym_size.int"}


@pytest.mark.parametrize("kind", ["fused", "split", "separate"])
def test_between_projections_nothing_is_copied(kind):
    network = check(Layer(kind=kind), torch.randn(2, 9, 32))
    assert not in_pytorch(network)
    assert sum(isinstance(s, Copy) for s in network.plan.steps) == 1  # the input


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 7, 16, 48, 49, 197, 300])
def test_lengths(tokens, threads):
    """More and fewer tokens than a vector, a block of queries, and a block of keys have."""
    check(Layer(), torch.randn(2, tokens, 32), threads=threads)


@pytest.mark.parametrize("depth", [1, 3, 8, 20, 64])
def test_channels_of_a_head(depth):
    check(Layer(3 * depth, heads=3), torch.randn(2, 19, 3 * depth))


def test_one_sample_that_is_fixed():
    """The number of samples is part of the graph."""

    class Fixed(Layer):
        def forward(self, x):
            return super().forward(x.view(1, 19, 32))

    check(Fixed(), torch.randn(1, 19, 32), batches=())


def masks(tokens):
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(3, 2, tokens, tokens, generator=generator) < 0.7
    some[1, 0, 3] = some[:, :, 4, 1:] = False  # a row without keys, and rows with one key
    numbers = torch.randn(3, 2, tokens, tokens, generator=generator)
    return {
        "all": some,
        "one head": some[:, :1],
        "keys": some[:, :1, :1],
        "numbers": numbers,
        "numbers and -inf": numbers.masked_fill(~some, -torch.inf),
        "lowest": torch.zeros(some.shape).masked_fill(~some, torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize("tokens", [9, 150])
@pytest.mark.parametrize("name", masks(9))
def test_masks_as_inputs(name, tokens):
    mask = masks(tokens)[name]

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x, mask):
            mask = mask > 0 if name in ("all", "one head", "keys") else mask
            return self.layers[1](self.layers[0](x, mask), mask)

    x = torch.randn(3, tokens, 32)
    network = check(Masked(), x, mask.float(), steps=2, batches=(2,))
    assert in_pytorch(network) <= {"aten.gt.Scalar"}


@pytest.mark.parametrize("tokens", [9, 60])
def test_masks_that_layers_compute(tokens):
    """They are in planes; a function between a layer and its use would be in planes, too."""

    class Biased(Layer):
        def __init__(self):
            super().__init__()
            self.bias, self.conv = nn.Linear(32, tokens), nn.Conv2d(1, 2, 1)

        def forward(self, x):
            mask = self.bias(x).unsqueeze(1)
            return super().forward(x, mask) + super().forward(x, self.conv(mask))

    check(Biased(), x_of(tokens), steps=2)


@pytest.mark.parametrize("tokens", [9, 60, 150])
def test_constant_masks(tokens):
    mask = masks(tokens)["numbers and -inf"]
    for given in (mask[0, 0], mask[:1], mask[0, 1] > 0):
        layer = Layer(options=lambda q, k, v, given=given: {"attn_mask": given})
        network = check(layer, x_of(tokens), batches=(3,))
        assert not in_pytorch(network)


def x_of(tokens):
    return torch.randn(2, tokens, 32)


@pytest.mark.parametrize("tokens", [1, 9, 60, 150, 300])
def test_causal(tokens):
    check(Layer(options=lambda q, k, v: {"is_causal": True}), x_of(tokens))


def test_scale():
    check(Layer(options=lambda q, k, v: {"scale": 0.3}), x_of(9))


def test_keys_of_another_length():
    """As in decoders; causal attention then begins with the first key."""

    class Cross(nn.Module):
        def __init__(self, is_causal):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
            self.out, self.is_causal = nn.Linear(32, 32), is_causal

        def forward(self, x, y):
            q, k, v = (
                layer(t).unflatten(-1, (4, 8)).transpose(1, 2)
                for layer, t in ((self.q, x), (self.k, y), (self.v, y))
            )
            z = sdpa(q, k, v, is_causal=self.is_causal)
            return self.out(z.transpose(1, 2).flatten(2))

    for causal in (False, True):
        check(Cross(causal), torch.randn(2, 9, 32), torch.randn(2, 150, 32))
        check(Cross(causal), torch.randn(2, 150, 32), torch.randn(2, 9, 32))


def test_values_that_pytorch_reads():
    """Heads that are results, too, or that other functions read."""

    class Results(Layer):
        def forward(self, x):
            q, k, v = self.split(x)
            y = sdpa(q, k, v).transpose(1, 2).flatten(2)
            return self.out(y), y, q, k.exp(), v.sum((1, 3))

    check(Results(), x_of(9))


def test_heads_that_leave_planes():
    """PyTorch computes attention whose result it reads as heads."""

    class Heads(Layer):
        def forward(self, x):
            q, k, v = self.split(x)
            y = sdpa(q, k, v)
            return self.out((y * y.sigmoid()).transpose(1, 2).flatten(2))

    check(Heads(), x_of(9), steps=0)


def test_heads_that_were_computed_in_pytorch():
    class Normed(Layer):
        def forward(self, x):
            q, k, v = self.split(x)
            y = sdpa(F.normalize(q, dim=-1), k, v)
            return self.out(y.transpose(1, 2).flatten(2))

    check(Normed(), x_of(9), steps=0)


def test_windows():
    """As in Swin: several sequences per sample."""

    class Windows(Layer):
        def forward(self, x):
            return super().forward(x.reshape(-1, 6, 32)).reshape(x.shape)

    check(Windows(), torch.randn(2, 24, 32))


class Encoder(nn.Module):
    """Layers of PyTorch, which put the sequence before the batch inside."""

    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **options) for _ in range(2)
        )

    def forward(self, x, **options):
        for layer in self.layers:
            x = layer(x, **options)
        return x


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layers_of_pytorch(norm_first, activation):
    """Tokens are permuted between their layers, but stay in planes in the order of memory."""
    encoder = Encoder(norm_first=norm_first, activation=activation)
    network = check(encoder, torch.randn(2, 21, 32), steps=2, batches=(3,))
    functions = {f for f in in_pytorch(network) if "aten" in f}
    assert functions <= {"aten.layer_norm.default", "aten.add.Tensor"}
    assert len(functions) == 0 or not norm_first


def test_encoder_layers_with_masks():
    class Masked(Encoder):
        def forward(self, x, padding):
            return super().forward(x, src_key_padding_mask=padding > 0)

    padding = torch.zeros(2, 9)
    padding[1, 6:] = 1
    check(Masked(), torch.randn(2, 9, 32), padding, steps=2, batches=(3,))


def test_sequences_before_the_batch():
    """The tokens of a sequence are not next to each other in memory then."""
    layer = nn.TransformerEncoderLayer(32, 4, 48)

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x.transpose(0, 1).relu())

    check(First(), torch.randn(2, 9, 32), steps=0, batches=())


def test_decoder_layers_of_pytorch():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)

        def forward(self, x, memory):
            mask = torch.full((9, 9), -torch.inf).triu(1)
            return self.layer(x, memory, tgt_mask=mask)

    check(Decoder(), torch.randn(2, 9, 32), torch.randn(2, 14, 32), steps=2, batches=(3,))


def test_results_of_permuted_layers_that_pytorch_reads():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 24), nn.Linear(24, 32)

        def forward(self, x):
            y = self.a(x.transpose(0, 1))
            return self.b(y).transpose(0, 1) + x, y.reshape(-1, 24).exp(), self.b(y.flatten(0, 1))

    check(Read(), torch.randn(2, 9, 32), steps=0, batches=(3,))


def test_nan_stays_in_its_sequence():
    x = torch.randn(3, 20, 32)
    x[1, 4, 5] = torch.nan
    network = compiled(pruned(Layer()), x)
    assert not network(x)[[0, 2]].isnan().any()
    assert network(x)[1].isnan().any()


def test_memory_before_it_is_written_does_not_matter():
    """Lanes behind the last token of a sequence are those of the next one, or are not used."""
    x = torch.randn(3, 19, 32)
    network = compiled(pruned(Layer()), x)
    expected = network(x)
    pool = network._for_sizes(x).pool
    pool.free[0].memory.fill_(torch.nan)
    assert torch.equal(network(x), expected)


def test_files(tmp_path):
    mask = masks(9)["numbers and -inf"]
    options = {"attn_mask": mask[2].clone()}

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Layer(), Layer(options=lambda q, k, v: options)

        def forward(self, x, mask):
            return self.b(self.a(x, mask))

    given = x_of(9), mask[:2]
    network = compiled(pruned(Masked()), given)
    feather.save_compiled(network, tmp_path / "net", batch_sizes=[1, 2])
    loaded = feather.load_compiled(tmp_path / "net")
    for batch in (2, 1):
        part = [x[:batch] for x in given]
        assert torch.equal(loaded(*part), network(*part))
