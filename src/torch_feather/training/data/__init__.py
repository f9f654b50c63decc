"""Data sets and loaders.

Small data sets are decoded once into a uint8 tensor on the device. Images of large data sets are
decoded and augmented by worker processes during training.
"""

from .cache import cache_folder
from .dataset import Dataset, EncodedImages, Images, Text
from .epochs import Batch
from .identity import changed_data, data_identity, identity_digest
from .imagefolder import center_crop
from .load import class_names, count_training_images, load_dataset, normalization
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
    "Text",
    "TrainLoader",
    "cache_folder",
    "center_crop",
    "changed_data",
    "class_names",
    "count_training_images",
    "data_identity",
    "eval_loader",
    "identity_digest",
    "load_dataset",
    "normalization",
    "train_loader",
]
