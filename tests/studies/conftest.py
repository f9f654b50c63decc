import pytest


@pytest.fixture
def row():
    """Makes the row of a finished run."""

    def make(method="feather", sparsity=0.9, seed=0, accuracy=0.5, **more):
        return {
            "name": f"{method}-{sparsity}-{seed}",
            "label": method,
            "method": method,
            "sparsity": 0.0 if method == "dense" else sparsity,
            "learned_sparsity": None,
            "seed": seed,
            "test_accuracy": accuracy,
            "test_loss": 2.0 - accuracy,
            "zeros": round(1000 * sparsity),
            "weights": 1000,
            "macs": 5_000_000,
            "dense_macs": 50_000_000,
            "milliseconds": 0.5,
            "pytorch_milliseconds": 2.0,
            "timed_on": "a cpu",
            "epochs": 3,
            "seconds": 60.0,
            "network": "resnet20",
            "data": "images",
            "amp": False,
            "select": "last",
            "curve": {
                "train_loss": [2.0, 1.0 - accuracy],
                "val_acc": [0.1, accuracy],
                "mask_correlation": [None, 0.5, 1.0],
            },
            "commit": "0123456789abc+",
            "versions": {"torch": "2"},
            "hardware": {"cpu": "a cpu", "threads": 1},
        } | more

    return make
