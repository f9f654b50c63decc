"""Sparse training with skorch: a callback, within scikit-learn's pipelines and searches.

    python examples/skorch_classifier.py

`fit` creates model and optimizer again each time, so `sparsify` is called in `on_train_begin`.
Requires: pip install 'torch-feather[train]' skorch
"""

import math

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from torch import nn

import torch_feather as feather


class Sparse(Callback):
    """Makes the network of each `fit` sparse.

    After LoadInitState, skorch trains max_epochs more. To resume a run, set max_epochs to the
    epochs that remain, and `epochs` to those of the whole run.
    """

    def __init__(self, sparsity: float = 0.9, epochs: int | None = None):
        self.sparsity = sparsity
        self.epochs = epochs

    def on_train_begin(self, net, X=None, y=None, **_):
        batches = math.ceil(len(X) / net.batch_size)
        self.sparsifier_ = feather.sparsify(  # new
            net.module_, net.optimizer_, sparsity=self.sparsity,
            total_steps=(self.epochs or net.max_epochs) * batches,
        )  # fmt: skip

    def on_train_end(self, net, **_):
        self.sparsifier_.finalize()  # new


class Network(nn.Module):
    """Two layers."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.layers(x)


def make_classifier(epochs: int = 10, **options) -> NeuralNetClassifier:
    """Return a classifier; callbacks that load a checkpoint come after `Sparse`."""
    callbacks = [("sparse", Sparse()), *options.pop("callbacks", [])]
    return NeuralNetClassifier(
        Network, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, lr=0.01,
        max_epochs=epochs, batch_size=64, train_split=None, verbose=0, callbacks=callbacks,
        **options,
    )  # fmt: skip


def main(epochs: int = 10) -> None:
    """Cross-validate a pipeline, then fit it and say how sparse its network is."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32)
    pipeline = make_pipeline(MinMaxScaler(), make_classifier(epochs))
    scores = cross_val_score(pipeline, x, y, cv=3)
    network = pipeline.fit(x, y)[-1].module_
    zeros = feather.sparsity(network)
    print(f"{scores.mean():.1%} accuracy in 3 folds, {zeros:.2%} of the weights are zero")


if __name__ == "__main__":
    main()
