"""Sparse training of a Keras model on PyTorch: fit() with an optimizer of PyTorch.

    python examples/keras_model.py

Keras' own optimizers are not those of PyTorch, so train_step steps one of torch.optim. The names of
Keras' weights end in "kernel". Requires: pip install 'torch-feather[train]' keras
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from keras import layers
from sklearn.datasets import load_digits

import torch_feather as feather

BATCH = 64


@keras.saving.register_keras_serializable()
class SparseModel(keras.Model):
    """A model that trains with an optimizer of PyTorch."""

    def attach(self, sparsity: float, total_steps: int) -> None:
        """Create optimizer and sparsifier. Call it before fit()."""
        self.torch_optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        self.sparsifier = feather.sparsify(  # new
            self, self.torch_optimizer, sparsity=sparsity, total_steps=total_steps,
            include="*kernel",
        )  # fmt: skip

    def train_step(self, data):
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        self.torch_optimizer.zero_grad()
        prediction = self(x, training=True)
        loss = self.compute_loss(x=x, y=y, y_pred=prediction, sample_weight=weights)
        loss.backward()
        self.torch_optimizer.step()
        self._loss_tracker.update_state(loss)
        return self.compute_metrics(x, y, prediction, sample_weight=weights)


def make_model() -> SparseModel:
    """Return a small convolutional network."""
    images = keras.Input((8, 8, 1))
    # Named, as Keras numbers other layers on: the keys of a state dict are these names.
    x = layers.Conv2D(16, 3, padding="same", name="first")(images)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.ReLU()(layers.Conv2D(32, 3, strides=2, name="second")(x))
    model = SparseModel(images, layers.Dense(10, name="head")(layers.Flatten()(x)))
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    return model


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels; the last 397 are for testing."""
    x, y = load_digits(return_X_y=True)
    return x.reshape(-1, 8, 8, 1).astype("float32") / 16, y


def train(folder: Path, epochs: int, stop: int | None = None) -> SparseModel:
    """Train, from the state in `folder` if it exists; `stop` ends the run after that epoch."""
    keras.utils.set_random_seed(0)
    x, y = digits()
    model = make_model()
    model.attach(0.9, epochs * -(-1400 // BATCH))
    begin, file = 0, folder / "state.pt"
    if file.exists():  # Keras' own checkpoints lack the optimizer of PyTorch
        state = torch.load(file)
        model.load_state_dict(state["model"])
        model.torch_optimizer.load_state_dict(state["optimizer"])
        begin = state["epoch"]
    for epoch in range(begin, epochs if stop is None else stop):
        order = np.random.default_rng(epoch).permutation(1400)  # the same after a resume
        model.fit(x[order], y[order], BATCH, initial_epoch=epoch, epochs=epoch + 1, shuffle=False,
                  verbose=0)  # fmt: skip
        state = {"model": model.state_dict(), "optimizer": model.torch_optimizer.state_dict()}
        torch.save(state | {"epoch": epoch + 1}, file)
    if stop is None:
        model.sparsifier.finalize()  # new
    return model


def main(epochs: int = 6) -> None:
    """Train in two parts, save the model as Keras does, and load it again."""
    x, y = digits()
    with TemporaryDirectory() as folder:
        train(Path(folder), epochs, stop=epochs // 2)
        train(Path(folder), epochs).save(Path(folder) / "model.keras")
        model = keras.saving.load_model(Path(folder) / "model.keras")
    _, accuracy = model.evaluate(x[1400:], y[1400:], verbose=0)
    zeros = feather.sparsity(model, include="*kernel")
    print(f"{accuracy:.1%} accuracy, {zeros:.2%} of the weights are zero")


if __name__ == "__main__":
    main()
