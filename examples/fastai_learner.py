"""Sparse training with fastai: its Learner, its one-cycle schedule, its saved learners.

    python examples/fastai_learner.py

Trains a small network on scikit-learn's digits at 95% sparsity. fastai's own optimizers are not
those of PyTorch, so the Learner uses OptimWrapper.
Requires: pip install 'torch-feather[train]' fastai
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import combine_scheds  # noqa: F401 (adds fit_one_cycle)
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from sklearn.datasets import load_digits

import torch_feather as feather


class SeedEpochs(Callback):
    """Make the order of the images depend on the epoch alone, so that it is the same on resume."""

    def before_train(self):
        torch.manual_seed(self.epoch)
        self.dls.train.rng.seed(self.epoch)


def make_learner(folder: Path, epochs: int) -> tuple[Learner, feather.Sparsifier]:
    """Return an ordinary Learner; new lines are marked."""
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    data = list(zip(images, torch.tensor(y), strict=True))
    loaders = DataLoaders(
        DataLoader(data[:1400], bs=64, shuffle=True, num_workers=0),
        DataLoader(data[1400:], bs=512, num_workers=0),
        device=torch.device("cpu"),
    )
    learner = Learner(
        loaders,
        feather.models.resnet8(num_classes=10, in_channels=1),
        CrossEntropyLossFlat(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW),  # new
        metrics=accuracy,
        path=folder,
        cbs=[SeedEpochs, GradientClip(1.0)],
    )
    learner.create_opt()  # new
    sparsifier = feather.sparsify(  # new
        learner.model, learner.opt, sparsity=0.95, total_steps=epochs * len(loaders.train)
    )
    return learner, sparsifier


def train(
    folder: Path, epochs: int, stop: int | None = None
) -> tuple[torch.nn.Module, feather.Sparsifier]:
    """Train, from the Learner saved in `folder` if there is one; `stop` ends after that epoch."""
    torch.manual_seed(0)
    learner, sparsifier = make_learner(folder, epochs)
    begin, state = 0, folder / "models" / "last.pth"
    if state.exists():
        learner.load("last")  # model and optimizer
        begin = sparsifier.step_count // len(learner.dls.train)

    class Save(Callback):
        def after_epoch(self):
            self.learn.save("last")
            if self.epoch + 1 == stop:
                raise KeyboardInterrupt

    with learner.no_bar(), learner.no_logging():
        try:
            learner.fit_one_cycle(epochs, 0.02, start_epoch=begin, cbs=Save)
        except KeyboardInterrupt:
            return learner.model, sparsifier
    return sparsifier.finalize(), sparsifier  # new


def main(epochs: int = 6) -> None:
    """Train in two parts, then evaluate."""
    with TemporaryDirectory() as folder:
        train(Path(folder), epochs, stop=epochs // 2)
        model, _ = train(Path(folder), epochs)
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x[1400:], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    with torch.no_grad():
        right = (model.eval()(images).argmax(1) == torch.tensor(y[1400:])).float().mean()
    print(f"{right:.1%} accuracy, {feather.sparsity(model):.2%} of the weights are zero")


if __name__ == "__main__":
    main()
