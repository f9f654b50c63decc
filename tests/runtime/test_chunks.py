"""Batches one sample at a time: only if no sample affects another one, and if that is faster."""

import json
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import DENSE, SPARSE, TOLERANCE, SameForAll, check, compiled, error, pruned
from torch import nn
from torch.utils._pytree import tree_leaves

import torch_feather as feather
from torch_feather import FileFormatError
from torch_feather.runtime import InputError, compile_sparse, forms
from torch_feather.runtime.capture import capture
from torch_feather.runtime.constants import constants_of_module
from torch_feather.runtime.independence import samples_of

SINGLE = replace(SPARSE, chunk_size=1)
N, K = 4, 4  # equal, so that the batch cannot be told from other dimensions by its size


class After(nn.Module):
    """A function of the result of a layer of (batch, K), and another layer if that is possible."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function = nn.Linear(K, K), function
        pruned(self, 0.5)

    def forward(self, x):
        return self.function(self.first(x))


def shown(model, x, any_batch=False):
    """Return whether the graph of a model shows that it keeps samples apart."""
    module = capture(model, x, any_batch=any_batch).module
    given = next(n for n in module.graph.nodes if n.op == "placeholder")
    batch = given.meta["val"].shape[0]
    assert any_batch != isinstance(batch, int)
    return samples_of(module.graph, constants_of_module(module), batch) is not None


def normed(y):
    return F.batch_norm(y, None, None, training=True)


MIXING = {
    "mean of the batch": lambda y: y - y.mean(0),
    "mean of the batch, kept": lambda y: y - y.mean(0, keepdim=True),
    "mean of everything": lambda y: y - y.mean(),
    "sum of everything": lambda y: y / y.abs().sum(),
    "largest of the batch": lambda y: y - y.amax(0),
    "largest of everything": lambda y: y - y.max(),
    "softmax over samples": lambda y: y.softmax(0),
    "softmax over samples, from the end": lambda y: y.softmax(-2),
    "flip": lambda y: y.flip(0),
    "flip of both": lambda y: y.flip((0, 1)),
    "cumulative sum": lambda y: y.cumsum(0),
    "first sample": lambda y: y + y[0],
    "first sample, kept": lambda y: y + y[:1],
    "last sample": lambda y: y + y[-1],
    "all but the first": lambda y: F.pad(y[1:], (0, 0, 0, 1)),
    "padding of the batch": lambda y: F.pad(y, (0, 0, 1, 0))[:N],
    "roll": lambda y: y.roll(1, 0),
    "roll of everything": lambda y: y.roll(1),
    "sort": lambda y: y.sort(0).values,
    "order": lambda y: y.argsort(0).float(),
    "transposed": lambda y: y.t(),
    "transposed, added": lambda y: y + y.t(),
    "transposed, after another dimension": lambda y: y + y[:, :, None].transpose(0, 1)[:, :, 0],
    "reshaped, then transposed": lambda y: y.reshape(K, N).t(),
    "reshaped into two groups": lambda y: y.reshape(2, N // 2, K).flip(0).reshape(N, K),
    "mean of two groups": lambda y: (y.view(2, -1, K) - y.view(2, -1, K).mean(1, True)).view(N, K),
    "one row": lambda y: y.reshape(1, N * K).softmax(1).reshape(N, K),
    "half rows": lambda y: y.reshape(N // 2, 2 * K).softmax(1).reshape(N, K),
    "products of samples": lambda y: y @ y.t(),
    "products of samples and weights": lambda y: y.t() @ y,
    "sum by a product": lambda y: torch.ones(N, N) @ y,
    "sum by an einsum": lambda y: torch.einsum("ik,jk->ij", y, y),
    "norm": lambda y: F.normalize(y, dim=0),
    "batch norm without statistics": normed,
    "layer norm over the batch": lambda y: F.layer_norm(y, (N, K)),
    "position in the batch": lambda y: y + torch.arange(N)[:, None],
    "values for each sample": lambda y: y * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None],
    "other order": lambda y: y[[1, 0, 3, 2]],
    "repeated": lambda y: y.repeat(2, 1)[1 : N + 1],
    "concatenated": lambda y: torch.cat([y, y])[2 : N + 2],
    "split": lambda y: torch.cat(y.split(2)[::-1]),
    "chunks": lambda y: y.chunk(2)[1].repeat(2, 1),
    "unbound": lambda y: torch.stack(y.unbind()[::-1]),
    "outer product": lambda y: y[:, None] * y[None],
    "attention between samples": lambda y: F.scaled_dot_product_attention(*[y[None]] * 3)[0],
    "convolution along samples": lambda y: F.conv1d(y[None], torch.ones(N, N, 1))[0],
    "pooling of samples": lambda y: F.avg_pool1d(y.t(), 3, 1, 1).t(),
    "pooling without a batch": lambda y: F.max_pool2d(y[None], 3, 1, 1)[0],
    "interpolation": lambda y: F.interpolate(y[None, None], scale_factor=1.0, mode="bicubic")[0, 0],
    "random": lambda y: F.dropout(y, 0.5, training=True),
    "noise": lambda y: y + torch.rand_like(y),
    "where": lambda y: torch.where(y > y.mean(0), y, 0.0),
    "sum of constants of the batch": lambda y: y + torch.ones(N, 1).cumsum(0),
    "no batch": lambda y: y.sum(0),
    "number": lambda y: y.sum(),
    "samples second": lambda y: y.t().contiguous(),
    "more rows": lambda y: y.reshape(2 * N, K // 2),
    "a constant": lambda y: (y, torch.ones(N, 2)),
}


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_samples_process_whole_batches(name):
    model, x = After(MIXING[name]).eval(), torch.randn(N, K)
    assert not shown(model, x)
    network = compile_sparse(model, x, threads=1, tuning=SameForAll(SINGLE))
    assert network.chunk_size is None
    if name not in ("random", "noise", "order"):
        for found, expected in zip(tree_leaves(network(x)), tree_leaves(model(x)), strict=True):
            assert error(found, expected) < 10 * TOLERANCE


BATCH_STATISTICS = {"track_running_stats": False}


class TimeFirst(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.BatchNorm2d(3, **BATCH_STATISTICS), (3, 5, 5)),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            (3, 5, 5),
        ),
        (TimeFirst(3, 5), (6, 3)),
        (nn.LSTM(3, 5, batch_first=True), (6, 3)),  # its final states are (layers, batch, units)
        (nn.Transformer(8, 2, 1, 1, 8, batch_first=False).encoder, (6, 8)),
        (nn.Conv1d(N, N, 3, padding=1), (7,)),  # samples are its channels
    ],
    ids=str,
)
def test_layers_that_mix_samples(model, shape):
    model, x = pruned(model), torch.randn(N, *shape)
    assert not shown(model, x)
    network = compile_sparse(model, x, threads=1, tuning=SameForAll(SINGLE))
    assert network.chunk_size is None
    for found, expected in zip(tree_leaves(network(x)), tree_leaves(model(x)), strict=True):
        assert error(found, expected) < 10 * TOLERANCE


class Tokens(nn.Module):
    """A small vision transformer: class token, positions, heads merged with samples, a mask."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 10, 8))
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(x), -1, -1), y], 1) + self.positions
        qkv = self.qkv(self.norm(y)).view(len(x), 10, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = (part.reshape(len(x) * 2, 10, 4) for part in qkv.unbind(0))
        p = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        y = y + self.out((p @ v).view(len(x), 2, 10, 4).transpose(1, 2).reshape(len(x), 10, 8))
        return {"class": self.out(y[:, 0]), "tokens": y[:, 1:].mean(1), "kind": "tokens"}


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1, groups=2)
        self.norm, self.scale = nn.BatchNorm2d(8), nn.Linear(8, 8)
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        y = F.relu(self.norm(self.a(x)))
        y = y * self.scale(y.mean((2, 3))).sigmoid()[:, :, None, None]
        y = torch.cat([F.max_pool2d(y, 2), self.b(y).roll(1, 2)], 1)
        return self.last(F.adaptive_avg_pool2d(y, 1).flatten(1)).log_softmax(1), y


class Sequences(nn.Module):
    """Initial states are constants that are the same for all samples."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, 2, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        states = torch.zeros(2, len(x), 5), torch.ones(2, len(x), 5)
        return self.head(self.lstm(x, states)[0][:, -1])


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(9, 6))

    def forward(self, x):
        n, h, w, c = x.shape
        y = x.view(n, h // 3, 3, w // 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, c)
        y = self.layer(y) * self.weight
        return y.view(n, h // 3, w // 3, 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)


INDEPENDENT = [
    (Images, (3, 8, 8)),
    (Windows, (6, 6, 6)),
    (lambda: nn.Conv1d(3, 4, 3), (3, 9)),
    (lambda: nn.Conv3d(2, 3, 3, padding=1), (2, 4, 5, 6)),
    (lambda: nn.ConvTranspose2d(3, 4, 2, 2), (3, 5, 5)),
    (lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), (6, 8)),
]


@pytest.mark.parametrize(("create", "shape"), INDEPENDENT)
def test_independent_samples_are_processed_one_at_a_time(create, shape):
    torch.manual_seed(0)
    model = pruned(create())
    assert shown(model, torch.randn(N, *shape))
    assert shown(model, torch.randn(N, *shape), any_batch=True)
    network = check(model, shape, batches=(4, 3, 1, 9), tuning=SINGLE)
    assert network.chunk_size == 1
    assert {run.pool.plan.batch for run in network._runs.values()} == {1}
    assert check(model, shape, batches=(4, 2), tuning=SPARSE).chunk_size is None


def test_states_of_recurrent_layers_are_the_same_for_all_samples():
    model, x = pruned(Sequences()), torch.randn(N, 6, 3)
    network = compiled(model, x, SINGLE)
    assert (network.chunk_size, network._for_sizes(x).pool.plan.batch) == (1, 1)
    assert error(network(x), model(x)) < TOLERANCE


def test_outputs_of_any_structure_are_concatenated():
    model, x = pruned(Tokens()), torch.randn(N, 3, 6, 6)
    network = compiled(model, x, SINGLE)
    assert network.chunk_size == 1
    found, expected = network(x), model(x)
    assert list(found) == list(expected)
    assert found["kind"] == "tokens"
    for name in ("class", "tokens"):
        assert error(found[name], expected[name]) < TOLERANCE
        assert found[name].stride() == expected[name].stride()


def test_a_factor_of_the_batch_size_keeps_the_batch_size_of_the_example():
    """The graph for one sample is that of the example: the model is not captured for one."""
    model = After(lambda y: y / y.shape[0] if y.shape[0] > 1 else y * 100).eval()
    network = compiled(model, torch.randn(N, K), SINGLE)
    assert network.chunk_size == 1
    for batch in (N, 3, 7, N):  # for other sizes, the factor depends on the batch
        x = torch.randn(batch, K)
        assert error(network(x), model(x)) < TOLERANCE
    assert network._for_sizes(torch.randn(N, K)).pool.plan.batch == 1
    assert network._for_sizes(torch.randn(7, K)).pool.plan.batch == 7


def test_all_batch_sizes_share_the_tables_of_one_sample():
    network = compiled(pruned(nn.Conv2d(3, 4, 3)), torch.randn(N, 3, 6, 6), SINGLE)
    pools = {id(network._for_sizes(torch.randn(batch, 3, 6, 6)).pool) for batch in (3, 7, 2, 32)}
    assert len(pools) == 1


def test_several_inputs_and_token_ids():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.layer = nn.Embedding(9, 6), nn.Linear(6, 6)

        def forward(self, ids, mask):
            y = self.layer(self.words(ids)).masked_fill(~mask[:, :, None].bool(), -1.0)
            return y.cumsum(1), (y * mask[:, :, None]).sum(1)

    model = pruned(Both())
    example = {"ids": torch.randint(9, (N, 5)), "mask": torch.randint(2, (N, 5))}
    network = compiled(model, example, SINGLE)
    assert network.chunk_size == 1
    for batch in (N, 3):
        given = {"ids": torch.randint(9, (batch, 5)), "mask": torch.randint(2, (batch, 5))}
        for found, expected in zip(network(**given), model(**given), strict=True):
            assert error(found, expected) < TOLERANCE


# Random functions

STEPS = [
    lambda y: y.relu(),
    lambda y: y + y.mean(-1, keepdim=True),
    lambda y: y - y.mean(0, keepdim=True),
    lambda y: y.softmax(0),
    lambda y: y.softmax(-1),
    lambda y: y.transpose(0, -1),
    lambda y: y.unsqueeze(1).expand(-1, 2, *[-1] * (y.dim() - 1)),
    lambda y: y.flatten(0, 1) if y.dim() > 1 else y,
    lambda y: y.unflatten(0, (2, -1)),
    lambda y: y.unflatten(0, (-1, 2)),
    lambda y: y.reshape(4, -1),
    lambda y: y.reshape(-1, 4),
    lambda y: y.reshape(2, -1, 4),
    lambda y: y.flip(0),
    lambda y: y.flip(-1),
    lambda y: y.roll(1, -1),
    lambda y: y @ torch.linspace(-1, 1, y.shape[-1] ** 2).reshape(y.shape[-1], -1),
    lambda y: (
        torch.linspace(-1, 1, y.shape[0] ** 2).reshape(y.shape[0], -1) @ y.reshape(len(y), -1)
    ),
    lambda y: torch.cat([y, y.sin()], 0),
    lambda y: torch.cat([y, torch.ones_like(y)], -1),
    lambda y: torch.stack([y, y * 2], 0),
    lambda y: torch.stack([y, y * 2], -1),
    lambda y: y.select(0, 1) if y.dim() > 1 else y,
    lambda y: y.select(-1, 1) if y.dim() > 1 else y,
    lambda y: y.sum(0) if y.dim() > 1 else y,
    lambda y: y.chunk(2, 0)[1],
    lambda y: y.chunk(2, -1)[0],
    lambda y: y.cumsum(-1),
    lambda y: y.sort(-1).values,
    lambda y: y * torch.linspace(0, 1, y.shape[0]).view(-1, *[1] * (y.dim() - 1)),
    lambda y: F.layer_norm(y, y.shape[-1:]),
]


class Program(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.layer, self.steps = nn.Linear(K, K), steps
        pruned(self, 0.5)

    def forward(self, x):
        y = self.layer(x)
        for step in self.steps:
            y = step(y)
        return y


@pytest.mark.parametrize("seed", range(4))
def test_random_functions_compute_the_same_one_sample_at_a_time(seed):
    """Whatever is accepted, also if the batch moves to another dimension and back."""
    choose, accepted = random.Random(seed), 0
    x = torch.randn(N, K)
    for _ in range(30):
        model = Program(choose.choices(STEPS, k=choose.randint(1, 5))).eval()
        try:
            expected = model(x)
            network = compiled(model, x, SINGLE)
        except (RuntimeError, IndexError):  # sizes do not fit
            continue
        if network.chunk_size == 1:
            accepted += 1
            assert error(network(x), expected) < 10 * TOLERANCE
    assert accepted > 1


# The choice


def convolutions():
    return pruned(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)))


@pytest.fixture
def pretended(monkeypatch):
    """Return a function that sets how long a batch takes, whole and one sample at a time."""

    def pretend(whole, single):
        def milliseconds(call, **_):
            call()
            is_run = isinstance(call, forms._Run)
            return 1.0 if not is_run else single if call.form.chunk_size == 1 else whole

        monkeypatch.setattr(forms, "milliseconds", milliseconds)

    return pretend


def test_the_faster_form_is_chosen_and_kept(pretended, tmp_path):
    model, x = convolutions(), torch.randn(N, 3, 8, 8)
    for single, size in ((2.0, 1), (8.0, None)):
        pretended(whole=4.0, single=single)
        network = compile_sparse(model, x, threads=1)
        assert network.chunk_size == size
        assert {layer.chunk_size for layer in network.tuning.values()} == {size}
        assert ("batches: in chunks of 1" in repr(network)) == (size == 1)
        assert error(network(x), model(x)) < TOLERANCE
        network.save_tuning(tmp_path / "tuning.json")
        feather.save_compiled(network, tmp_path / "network", batch_sizes=[N])
        pretended(whole=1.0, single=1.0)  # nothing is timed again
        again = compile_sparse(model, x, threads=1, tuning=tmp_path / "tuning.json")
        loaded = feather.load_compiled(tmp_path / "network")
        for other in (again, loaded):
            assert (other.chunk_size, other.tuning) == (size, network.tuning)
            assert repr(other) == repr(network)
            assert torch.equal(other(x), network(x))


def test_single_samples_are_not_timed_if_samples_are_mixed_or_the_size_is_given(pretended):
    pretended(whole=4.0, single=1.0)
    x = torch.randn(N, K)
    mixing = After(MIXING["mean of the batch"])
    assert compile_sparse(mixing, x, threads=1).chunk_size is None
    model = After(torch.relu)
    assert compile_sparse(model, x, threads=1).chunk_size == 1
    assert compile_sparse(model, x, threads=1, chunk_size=None).chunk_size is None
    assert compile_sparse(model, x, threads=1, chunk_size=3).chunk_size == 3
    assert compile_sparse(model, x[:1], threads=1).chunk_size is None
    with pytest.raises(InputError, match='a number, "auto" or None'):
        compile_sparse(model, x, threads=1, chunk_size="one")


def test_a_perceptron_processes_the_whole_batch():
    """A sparse kernel computes several samples at once, in the time of one."""
    model = pruned(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)), 0.95)
    assert compile_sparse(model, torch.randn(16, 1024), threads=1).chunk_size is None


def test_forms_whose_results_differ_are_not_chosen(pretended, monkeypatch):
    """The graph shows that they do not; this is a second barrier."""
    pretended(whole=4.0, single=1.0)
    mixed = samples_of

    def wrong(graph, constants, batch):
        for node in graph.nodes:
            if node.target is torch.ops.aten.softmax.int:
                node.args = (node.args[0], 1)
        found = mixed(graph, constants, batch)
        for node in graph.nodes:
            if node.target is torch.ops.aten.softmax.int:
                node.args = (node.args[0], 0)
        return found

    monkeypatch.setattr(forms, "samples_of", wrong)
    network = compile_sparse(After(lambda y: y.softmax(0)), torch.randn(N, K), threads=1)
    assert network.chunk_size is None


def test_tuning_results_of_single_samples_for_models_that_mix_them():
    """A result never overrides the graph."""
    network = compiled(After(MIXING["flip"]), torch.randn(N, K), SINGLE)
    assert network.chunk_size is None
    partly = {"first.weight": SINGLE, "other": SPARSE}
    assert compile_sparse(After(torch.relu), torch.randn(N, K), tuning=partly).chunk_size == 1
    both = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    for tuning in ({"0.weight": SINGLE, "1.weight": DENSE}, {"other": SINGLE}):
        assert compile_sparse(both, torch.randn(N, K), tuning=tuning).chunk_size is None


@pytest.mark.parametrize("size", [0, 2, -1, 1.0, True, "auto"])
def test_impossible_chunk_sizes_in_tuning_files(size, tmp_path):
    layer = {"sparse": True, "tile": [1, 8, 1], "sparsity": 0.5, "chunk_size": size}
    (tmp_path / "tuning.json").write_text(json.dumps({"first.weight": layer}))
    with pytest.raises(FileFormatError, match="tuning results"):
        compile_sparse(After(torch.relu), torch.randn(N, K), tuning=tmp_path / "tuning.json")
