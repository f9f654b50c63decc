"""Sparse training of a GAN in Lightning: manual optimization, two networks, two optimizers.

    python examples/lightning_gan.py

Trains generator and discriminator on scikit-learn's digits, each at 90% sparsity, each with a
sparsifier of its own. Requires: pip install 'torch-feather[train,frameworks]'
"""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torch_feather as feather


class GAN(L.LightningModule):
    """An ordinary module with manual optimization; new lines are marked."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(16, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.Tanh()
        )
        self.discriminator = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))

    def configure_optimizers(self):
        options = {"lr": 2e-3, "betas": (0.5, 0.999)}
        generating = torch.optim.Adam(self.generator.parameters(), **options)
        judging = torch.optim.Adam(self.discriminator.parameters(), **options)
        steps = int(self.trainer.estimated_stepping_batches)
        # min_density: each layer keeps some weights, also the small last one of the discriminator.
        sparse = {"sparsity": 0.9, "total_steps": steps, "min_density": 0.02}
        self.sparsifiers = [
            feather.sparsify(self.generator, generating, **sparse),  # new
            feather.sparsify(self.discriminator, judging, **sparse),  # new
        ]
        return [generating, judging], []

    def training_step(self, batch, index):
        (images,) = batch
        generating, judging = self.optimizers()
        # Lightning does not store the random state. This noise is the same after a resume.
        seeded = torch.Generator().manual_seed(self.global_step)
        noise = torch.randn(len(images), 16, generator=seeded)

        self.toggle_optimizer(generating)
        self.manual_backward(F.softplus(-self.discriminator(self.generator(noise))).mean())
        generating.step()
        generating.zero_grad()
        self.untoggle_optimizer(generating)

        self.toggle_optimizer(judging)
        false = self.discriminator(self.generator(noise).detach())
        true = self.discriminator(images)
        self.manual_backward(F.softplus(false).mean() + F.softplus(-true).mean())
        judging.step()
        judging.zero_grad()
        self.untoggle_optimizer(judging)

    def on_train_end(self):
        for sparsifier in self.sparsifiers:
            sparsifier.finalize()  # new


def loader() -> DataLoader:
    """Return batches of images; the order depends on the epoch alone."""
    x, _ = load_digits(return_X_y=True)
    images = TensorDataset(torch.tensor(x, dtype=torch.float32) / 8 - 1)
    order = DistributedSampler(images, num_replicas=1, rank=0, seed=0)
    return DataLoader(images, 64, sampler=order, drop_last=True)


def make_trainer(folder: str, epochs: int, **options) -> L.Trainer:
    """Return a Trainer that keeps the last epoch."""
    keep = ModelCheckpoint(folder, save_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[keep], **quiet, **options)


def main(epochs: int = 6) -> None:
    """Train, and say how sparse both networks are."""
    L.seed_everything(0)
    model = GAN()
    # To resume: make_trainer(...).fit(model, loader(), ckpt_path="runs/gan/last.ckpt")
    make_trainer("runs/gan", epochs).fit(model, loader())
    for name in ("generator", "discriminator"):
        print(f"{name}: {feather.sparsity(getattr(model, name)):.2%} of the weights are zero")


if __name__ == "__main__":
    main()
