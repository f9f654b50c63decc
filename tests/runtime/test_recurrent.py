"""LSTM and GRU layers run sparse: all steps in time in machine code."""

import itertools

import pytest
import torch
from runtime_cases import DENSE, TOLERANCE, check, compiled, error, pruned
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from torch_feather.runtime import CaptureError, kernels
from torch_feather.runtime.plan import Recurrence, Torch
from torch_feather.runtime.recurrent import Recurrent

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}


class Sequence(nn.Module):
    """Returns all that a recurrent layer returns."""

    def __init__(self, kind, features=5, units=7, **options):
        super().__init__()
        self.rnn = KINDS[kind](features, units, **options)
        self.time_first = not self.rnn.batch_first

    def forward(self, x):
        y, states = self.rnn(x.transpose(0, 1) if self.time_first else x)
        return y, states


def steps(network):
    return [s for s in network.plan.steps if isinstance(s, Recurrence)]


OPTIONS = {
    "one": {"batch_first": True},
    "time first": {},
    "no bias": {"batch_first": True, "bias": False},
    "two layers": {"batch_first": True, "num_layers": 2, "dropout": 0.5},
    "two directions": {"batch_first": True, "bidirectional": True},
    "all": {"num_layers": 3, "bidirectional": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", OPTIONS)
def test_layers(form, kind):
    options = OPTIONS[form]
    network = check(pruned(Sequence(kind, **options)), (9, 5), batches=(1, 2, 5, 16, 17))
    assert len(steps(network)) == options.get("num_layers", 1)
    assert list(network.tuning) == ["rnn"]


@pytest.mark.parametrize(("kind", "units"), list(itertools.product(KINDS, (1, 16, 33))))
def test_sizes(kind, units):
    for features, time in ((1, 1), (20, 40)):
        model = pruned(Sequence(kind, features, units, bidirectional=True, batch_first=True))
        check(model, (time, features), batches=(1, 3), threads=2)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_weights(kind):
    model = pruned(Sequence(kind, batch_first=True))
    model.rnn.weight_hh_l0.data[3:9] = 0
    model.rnn.weight_ih_l0.data[::2] = 0
    check(model, (6, 5), batches=(1, 2, 5))
    model.rnn.weight_hh_l0.data.zero_()
    check(model, (6, 5), batches=(1, 2, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_densely_if_this_is_faster(kind):
    network = check(pruned(Sequence(kind, num_layers=2)), (6, 5), (1, 2), DENSE)
    assert not steps(network)
    assert "rnn" in repr(network)
    assert not any(name in repr(network) for name in ("lstm.input", "gru.input"))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_timed(kind):
    network = compiled(pruned(Sequence(kind, 8, 32), 0.95), torch.randn(1, 6, 8), tuning=None)
    found = network.tuning["rnn"]
    assert min(found.dense_ms, found.sparse_ms) > 0
    assert found.sparsity == pytest.approx(0.95, abs=0.02)


class Decoder(nn.Module):
    """Initial states that are inputs, results of a layer, parameters, or shared."""

    def __init__(self):
        super().__init__()
        self.encode, self.embed = nn.Linear(6, 8), nn.Embedding(11, 5)
        self.lstm = nn.LSTM(5, 8, batch_first=True, bidirectional=True)
        self.gru, self.again = nn.GRU(16, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.start = nn.Parameter(torch.randn(2, 1, 8))
        self.head = nn.Linear(8, 11)

    def forward(self, tokens, state):
        first = self.start.expand(-1, tokens.shape[0], -1)
        y, (h, c) = self.lstm(self.embed(tokens), (first, -first))
        z, last = self.gru(y, self.encode(state).unsqueeze(0))
        z, _ = self.again(torch.relu(z) * 0.5, h[1:])
        z, _ = self.again(z, last)
        return self.head(z[:, -1]), self.head(z), c, last


def test_states_and_functions_around_it():
    model = pruned(Decoder())
    example = torch.randint(11, (1, 7)), torch.randn(1, 6)
    network = compiled(model, example)
    assert len(steps(network)) == 4
    assert {"again", "again@2"} <= set(network.tuning)
    for batch in (2, 1, 3):
        x = torch.randint(11, (batch, 7)), torch.randn(batch, 6)
        for _ in range(2):
            for found, expected in zip(network(*x), model(*x), strict=True):
                assert error(found, expected) < TOLERANCE


def test_states_that_layers_compute():
    """They are complete before the recurrent layer reads them, in whatever order of memory."""

    class Started(nn.Module):
        def __init__(self):
            super().__init__()
            self.h, self.c = nn.Linear(6, 32), nn.Linear(6, 32)
            self.lstm = nn.LSTM(5, 32, batch_first=True)

        def forward(self, x, state):
            return self.lstm(x, (self.h(state).unsqueeze(0), self.c(state)[None]))[0]

    model = pruned(Started())
    network = compiled(model, (torch.randn(1, 4, 5), torch.randn(1, 6)))
    for batch in (1, 3, 32):
        for x in ((torch.randn(batch, 4, 5), torch.randn(batch, 6)) for _ in range(2)):
            assert error(network(*x), model(*x)) < TOLERANCE


def test_values_that_are_not_finite():
    """They affect their sample alone, and no later call."""
    model = pruned(Sequence("lstm", batch_first=True), 0.0)
    network, x = compiled(model, torch.randn(3, 6, 5)), torch.randn(3, 6, 5)
    expected = network(x)[0]
    marked = x.clone()
    marked[1, 2] = torch.nan
    found = network(marked)[0]
    torch.testing.assert_close(found, model(marked)[0], equal_nan=True)
    assert found[1, 2:].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert torch.equal(network(x)[0], expected)


def test_layers_that_are_left_to_pytorch():
    for model, shape in (
        (nn.LSTM(5, 7, proj_size=3, batch_first=True), (6, 5)),
        (nn.RNN(5, 7, batch_first=True), (6, 5)),
    ):
        x = torch.randn(2, *shape)
        network = compiled(model.eval(), x)
        assert not network.tuning
        torch.testing.assert_close(network(x)[0], model(x)[0])


def test_packed_sequences_are_errors():
    """As documented: torch.export cannot capture them."""

    class Packed(nn.LSTM):
        def forward(self, x):
            packed = pack_padded_sequence(x, torch.tensor([6, 4]), batch_first=True)
            return pad_packed_sequence(super().forward(packed)[0], batch_first=True)[0]

    with pytest.raises(CaptureError, match="cannot capture Packed"):
        compiled(Packed(5, 7), torch.randn(2, 6, 5))


def test_samples_must_be_the_batch():
    """The first dimension of this model's input is time."""
    model, x = pruned(nn.LSTM(5, 7)), torch.randn(6, 2, 5)
    network = compiled(model, x)
    assert not steps(network)
    torch.testing.assert_close(network(x)[0], model(x)[0])


def test_the_table_of_a_direction_pads_its_rows():
    lstm = nn.LSTM(3, 5)
    lstm.weight_hh_l0.data.zero_()
    lstm.weight_hh_l0.data[2, [1, 3, 4]] = torch.tensor([1.0, 2.0, 3.0])
    weights = [w.detach() for w in lstm._flat_weights]
    layer = Recurrent("rnn", "lstm", weights, True, 1, False, False)
    tables = layer.parts[0][0].tables(lanes=8)
    assert list(tables["first"][:4]) == [0, 0, 0, kernels.UNROLL]
    assert list(tables["taps"][:, 0]) == [8, 24, 32, 48]  # the last one is a row of zeros


def test_long_sequences_do_not_drift():
    model = pruned(Sequence("gru", 3, 12, batch_first=True), 0.5)
    network, x = compiled(model, torch.randn(1, 500, 3)), torch.randn(1, 500, 3)
    exact = model.double()(x.double())[0]
    assert error(network(x)[0], exact) < 10 * TOLERANCE


def test_no_step_is_a_function_of_pytorch():
    network = compiled(pruned(Sequence("lstm", batch_first=True)), torch.randn(2, 6, 5))
    called = {str(s.node.target) for s in network.plan.steps if isinstance(s, Torch)}
    # Initial states are zeros; final states are returned.
    assert called <= {"aten.zeros.default", "<built-in function getitem>"}
