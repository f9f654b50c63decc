"""Images and batches of them.

Small images are decoded once into one uint8 tensor that stays on the device; large ones are
decoded and augmented by worker processes while the network trains.
"""

from .cache import cache_folder
from .dataset import Dataset, EncodedImages, Images
from .epochs import Batch
from .load import load_dataset
from .loaders import eval_loader, train_loader
from .memory import EvalLoader, TrainLoader
from .normalize import Normalize

__all__ = [
    "Batch",
    "Dataset",
    "EncodedImages",
    "EvalLoader",
    "Images",
    "Normalize",
    "TrainLoader",
    "cache_folder",
    "eval_loader",
    "load_dataset",
    "train_loader",
]
