"""skorch: a callback attaches to each network that `fit` creates, and checkpoints resume."""

import numpy as np
import pytest
import torch
from example_cases import assert_same, expected_zeros, load, zeros_of
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV

pytestmark = pytest.mark.apps
skorch = pytest.importorskip("skorch")
callbacks = pytest.importorskip("skorch.callbacks")
EPOCHS = 3


@pytest.fixture(scope="module")
def example():
    return load("skorch_classifier")


@pytest.fixture(scope="module")
def data():
    x, y = load_digits(return_X_y=True)
    return x[:256].astype(np.float32) / 16, y[:256]


def test_every_network_of_a_search_is_exactly_sparse(example, data, created):
    net = example.make_classifier(EPOCHS)
    search = GridSearchCV(net, {"module__width": [16, 32]}, cv=2).fit(*data)
    assert len(created) == 5  # two widths in two folds, and the best one again
    for sparsifier in created:
        assert sparsifier.step_count == sparsifier.total_steps
        assert zeros_of(sparsifier) == expected_zeros(sparsifier)
    assert search.best_estimator_.module_ is created[-1].model


class Stop(callbacks.Callback):
    def on_epoch_end(self, net, **_):
        raise KeyboardInterrupt  # skorch ends training


def fit(example, data, extra, sparse, epochs=EPOCHS):
    torch.manual_seed(0)
    net = example.make_classifier(epochs, iterator_train__shuffle=False, callbacks=extra)
    return net.set_params(callbacks__sparse=sparse).fit(*data)


def test_a_run_resumes_bitwise_identically_from_skorchs_checkpoint(example, data, created):
    whole = fit(example, data, [], example.Sparse())
    each = callbacks.Checkpoint(dirname="run", monitor=None)
    keep = callbacks.TrainEndCheckpoint(dirname="run")

    class Unfinished(example.Sparse):
        def on_train_end(self, net, **_):
            pass

    fit(example, data, [each, Stop()], Unfinished())
    assert 0 < created[-1].step_count < created[-1].total_steps
    load = callbacks.LoadInitState(each)
    resumed = fit(example, data, [load, keep], example.Sparse(epochs=EPOCHS), EPOCHS - 1)
    assert created[-1].step_count == created[-1].total_steps == created[0].total_steps
    assert_same(whole.module_, resumed.module_)

    stored = example.make_classifier(EPOCHS).initialize()
    stored.load_params(f_params="run/train_end_params.pt")
    assert_same(stored.module_, whole.module_)
    assert zeros_of(created[-1], stored.module_) == expected_zeros(created[-1])


def test_the_example_runs(example, created, capsys):
    example.main(EPOCHS)
    assert "89.99% of the weights are zero" in capsys.readouterr().out
