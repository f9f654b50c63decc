"""Sparse training with Ultralytics: its trainer, its average of the weights, its checkpoints.

    python examples/ultralytics_trainer.py

Trains a small detector on images of squares at 90% sparsity. Ultralytics evaluates and saves an
average of the weights, so this average is the one that must be sparse.
Requires: pip install torch-feather ultralytics
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.torch_utils import ModelEMA, unwrap_model

import torch_feather as feather


class SparseEMA(ModelEMA):
    """Averages the latent weights; `ema` is the pruned average. Buffers are averaged as usual."""

    def __init__(self, model: torch.nn.Module, sparsifier: feather.Sparsifier):
        super().__init__(model)
        self.average = feather.LatentAverage(sparsifier)  # new
        self.buffers = {name: b.clone() for name, b in self.ema.named_buffers()}

    def update(self, model: torch.nn.Module) -> None:
        self.updates += 1
        self.average.decay = self.decay(self.updates)
        self.average.update()
        for name, buffer in unwrap_model(model).named_buffers():
            if buffer.is_floating_point():
                self.buffers[name].lerp_(buffer, 1 - self.average.decay)

    def update_attr(self, model, include=(), exclude=()) -> None:
        """Called before each validation: write the pruned average into `ema`."""
        super().update_attr(model, include, exclude)
        self.average.copy_to(self.ema)
        with torch.no_grad():
            for name, buffer in self.ema.named_buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.buffers[name])

    def state_dict(self) -> dict:
        return {"average": self.average.state_dict(), "buffers": self.buffers}

    def load_state_dict(self, state: dict) -> None:
        self.average.load_state_dict(state["average"])
        self.buffers = state["buffers"]


class SparseTrainer(DetectionTrainer):
    """Set `nbs` to the batch size: the schedule needs the number of optimizer steps."""

    sparsity = 0.9

    def build_optimizer(self, model, *args, iterations=0, **options) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(model, *args, iterations=iterations, **options)
        if self.args.nbs > self.batch_size:
            raise ValueError("Set nbs to the batch size. Otherwise the trainer skips steps.")
        self.sparsifier = feather.sparsify(  # new
            model, optimizer, sparsity=self.sparsity, total_steps=int(iterations), min_density=0.02
        )
        return optimizer

    def resume_training(self, ckpt) -> None:
        """Called after the trainer created its average, in new runs too."""
        # Ultralytics stores the optimizer in half precision and the model as its average. Neither
        # is exact, so `save_model` adds the exact state.
        super().resume_training(None if ckpt is None else {**ckpt, "optimizer": None})
        self.ema = SparseEMA(self.model, self.sparsifier)
        if self.resume:
            exact = ckpt["sparse"]
            unwrap_model(self.model).load_state_dict(exact["model"])
            self.optimizer.load_state_dict(exact["optimizer"])
            self.ema.load_state_dict(exact["ema"])
            self.ema.updates = ckpt["updates"]

    def validate(self):
        """A best checkpoint is chosen among those at the final sparsity."""
        metrics, fitness = super().validate()
        if fitness is not None and not self.sparsifier.at_target:
            fitness = self.best_fitness = 0.0
        return metrics, fitness

    def save_model(self) -> bool:
        saved = super().save_model()
        exact = {
            "model": unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }
        self._rewrite_last(lambda state: {**state, "sparse": exact})
        return saved

    def final_eval(self) -> None:
        self.sparsifier.finalize()  # new
        self._rewrite_last(
            lambda checkpoint: {k: v for k, v in checkpoint.items() if k != "sparse"}
        )
        super().final_eval()

    def _rewrite_last(self, change) -> None:
        new = self.last.with_suffix(".new")
        torch.save(change(torch.load(self.last, weights_only=False)), new)
        os.replace(new, self.last)


def draw_squares(folder: Path, count: int = 16, size: int = 64) -> Path:
    """Draw images with a bright square each; return the description of the data set."""
    random = np.random.default_rng(0)
    for i in range(count):
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        image = random.integers(0, 60, (size, size, 3), dtype=np.uint8)
        side = int(random.integers(size // 4, size // 2))
        x, y = random.integers(0, size - side, 2)
        image[y : y + side, x : x + side] = 220
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        box = [(x + side / 2) / size, (y + side / 2) / size, side / size, side / size]
        (folder / "labels" / f"{i}.txt").write_text(f"0 {' '.join(map(str, box))}\n")
    data = folder / "squares.yaml"
    data.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: square}}\n")
    return data


def train(folder: Path, epochs: int, resume: bool = False) -> SparseTrainer:
    """Train in `folder`, or resume the run there."""
    settings = {
        "model": "yolo11n.yaml",
        "data": str(draw_squares(folder / "data")),
        "project": str(folder),
        "name": "run",
        "epochs": epochs,
        "batch": 4,
        "nbs": 4,
        "imgsz": 64,
        "workers": 0,
        "device": "cpu",
        "amp": False,
        "plots": False,
        "verbose": False,
    }
    if resume:
        settings = {"resume": str(folder / "run" / "weights" / "last.pt")}
    trainer = SparseTrainer(overrides=settings)
    trainer.train()
    return trainer


def main(epochs: int = 4) -> None:
    """Train, then evaluate and export the saved model."""
    with TemporaryDirectory() as folder:
        trainer = train(Path(folder), epochs)
        model = YOLO(trainer.best)
        print(f"{feather.sparsity(model.model):.2%} of the weights are zero")
        metrics = model.val(data=trainer.args.data, imgsz=64, device="cpu", plots=False)
        exported = model.export(format="torchscript", imgsz=64, device="cpu")
        print(f"mAP50 {metrics.box.map50:.3f}; exported to {Path(exported).name}")


if __name__ == "__main__":
    main()
