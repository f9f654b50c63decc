"""Sparse training in Lightning: one line in configure_optimizers.

    python examples/lightning_module.py

Trains a small network on scikit-learn's digits at 95% sparsity, in bfloat16 with gradient
accumulation and clipping, keeps the best checkpoint, and loads it as a plain model.
Requires: pip install 'torch-feather[train,frameworks]'
"""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

import torch_feather as feather


class Digits(L.LightningModule):
    """An ordinary module; new lines are marked."""

    def __init__(self, sparsity: float = 0.95):
        super().__init__()
        self.save_hyperparameters()
        self.network = feather.models.resnet8(num_classes=10, in_channels=1)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        self.sparsifier = feather.sparsify(  # new
            self, optimizer, sparsity=self.hparams.sparsity, total_steps=steps
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        accuracy = (self(x).argmax(1) == y).float().mean()
        self.log("accuracy", accuracy, prog_bar=True)
        # Checkpoints before the final sparsity are denser and must not be chosen.
        self.log("final_accuracy", accuracy * self.sparsifier.at_target)  # new


class ManualDigits(Digits):
    """The same module with manual optimization."""

    def __init__(self, sparsity: float = 0.95):
        super().__init__(sparsity)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        x, y = batch
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        self.manual_backward(F.cross_entropy(self(x), y))
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def loaders():
    """Return loaders of training and validation images."""
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    data = TensorDataset(images, torch.tensor(y))
    train, validation = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    # Lightning sets the epoch of this sampler, which determines the order: a resumed run sees the
    # images in the same order.
    order = DistributedSampler(train, num_replicas=1, rank=0, seed=0)
    return DataLoader(train, 32, sampler=order), DataLoader(validation, 512)


def make_trainer(folder: str, epochs: int, **options) -> L.Trainer:
    """Return a Trainer that keeps the best epoch and the last one."""
    keep = ModelCheckpoint(folder, monitor="final_accuracy", mode="max", save_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[keep], num_sanity_val_steps=0,
        **quiet, **options,
    )  # fmt: skip


def main(epochs: int = 6) -> None:
    """Train, then load the best checkpoint."""
    L.seed_everything(0)
    model, (train, validation) = Digits(), loaders()
    trainer = make_trainer(
        "runs/lightning", epochs, precision="bf16-mixed", accumulate_grad_batches=2,
        gradient_clip_val=1.0,
    )  # fmt: skip
    # To resume: trainer.fit(..., ckpt_path="runs/lightning/last.ckpt")
    trainer.fit(model, train, validation)

    best = Digits.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    accuracy = float(trainer.checkpoint_callback.best_model_score)
    print(f"{accuracy:.1%} accuracy, {feather.sparsity(best.network):.2%} of the weights are zero")


if __name__ == "__main__":
    main()
