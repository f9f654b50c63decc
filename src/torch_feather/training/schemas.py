"""What the files of a run directory and of a study hold."""

from __future__ import annotations

from typing import Any

from .content import (
    Check,
    anything,
    below,
    boolean,
    integer,
    items,
    mapping,
    nullable,
    number,
    record,
    require,
    text,
)


def zeros_of_weights(check: Check) -> Check:
    """Return `check`, and that `zeros` is at most `weights`.

    Example:
        >>> zeros_of_weights(record({"zeros": count}))({"zeros": 2, "weights": 3}, "layer")
    """

    def check_both(value: Any, at: str) -> None:
        check(value, at)
        most = f"at most weights ({value['weights']})"
        require(value["zeros"] <= value["weights"], below(at, "zeros"), most, value["zeros"])

    return check_both


fraction = number(0, 1)
count = integer()
LOSS = number()  # of a network that diverged: infinite or NaN

_LAYER = zeros_of_weights(
    record(
        {
            "name": text,
            "shape": items(count),
            "weights": integer(1),
            "zeros": count,
            "threshold": nullable(number()),
            "dense_macs": nullable(count),
            "sparse_macs": nullable(count),
            "sparsity": fraction,
        }
    )
)
_REPORT = zeros_of_weights(
    record(
        {
            "weights": integer(1),
            "zeros": count,
            "sparsity": fraction,
            "layers": items(_LAYER, 1),
        },
        {
            "learned_sparsity": nullable(fraction),
            "own_sparsity": nullable(fraction),
            "parameters": nullable(integer(1)),
            "dense_macs": nullable(count),
            "sparse_macs": nullable(count),
            "others": items(_LAYER),
        },
    )
)
_MACS = record({"dense": count, "sparse": count})
_SECONDS = number(0, 1e12)
_HARDWARE = record({"cpu": text, "threads": integer(1)}, {"gpu": nullable(text)})
PROVENANCE = {"commit": nullable(text), "versions": mapping(text), "hardware": _HARDWARE}
EPOCHS = integer(1, 10**6)

# report.json, also of version 0.1.
RESULTS = record(
    {
        "network": text,
        "data": text,
        "method": text,
        "target_sparsity": fraction,
        "seed": count,
        "epochs": EPOCHS,
        "test_accuracy": fraction,
        "test_loss": LOSS,
        "train_loss": LOSS,
        "macs": _MACS,
        "seconds": _SECONDS,
        "report": _REPORT,
        **PROVENANCE,
    },
    {
        "data_digest": text,
        "method_reason": text,
        "classes": integer(1, 10**6),
        "class_names": items(text),
        "input_shape": items(integer(1, 10**5), 1),
        "learned_sparsity": nullable(fraction),
        "own_sparsity": nullable(fraction),
        "dense": record(
            {"test_accuracy": fraction, "test_loss": LOSS, "macs": _MACS, "seconds": _SECONDS}
        ),
    },
)
_METRICS_LINE = record(
    {
        "epoch": EPOCHS,
        "step": integer(1),
        "train_loss": LOSS,
        "val_acc": nullable(fraction),
        "sparsity": fraction,
    },
    {"test_acc": nullable(fraction)},
)


def history(value: Any, at: str) -> None:
    """Check the lines of metrics.jsonl: one for each epoch, in order.

    Example:
        >>> history([{"epoch": 1}], "")
        Traceback (most recent call last):
        torch_feather...ContentError: line 1 lacks step, train_loss, val_acc, sparsity
    """
    require(isinstance(value, list), at, "a list", value)
    for i, line in enumerate(value):
        position = f"{at}[{i}]" if at else f"line {i + 1}"
        _METRICS_LINE(line, position)
        require(line["epoch"] == i + 1, f"{position}.epoch", str(i + 1), line["epoch"])


def _select(value: Any, at: str) -> None:
    require(value in ("last", "best"), at, "last or best", value)


# A row of runs.json, with the keys of this version.
ROW = zeros_of_weights(
    record(
        {
            "name": text,
            "label": text,
            "data": text,
            "amp": boolean,
            "select": _select,
            "config": mapping(anything),
            "network": text,
            "method": text,
            "seed": count,
            "epochs": EPOCHS,
            "sparsity": fraction,
            "learned_sparsity": nullable(fraction),
            "test_accuracy": fraction,
            "weights": integer(1),
            "zeros": count,
            "macs": integer(1),
            "dense_macs": integer(1),
            "seconds": _SECONDS,
            "curve": record(
                {"train_loss": items(LOSS)}, {"mask_correlation": items(nullable(number(-1, 1)))}
            ),
            **PROVENANCE,
        }
    )
)
TIMING = record(
    {
        "weights": text,
        "cpu": text,
        "milliseconds": number(0, 1e9),
        "pytorch_milliseconds": number(0, 1e9),
    }
)


def example_results(weights: int = 100, zeros: int = 50, **changes: Any) -> dict[str, Any]:
    """Return the content of a small report.json, for examples and tests.

    Args:
        weights: number of weights.
        zeros: number of zeros among them.
        **changes: other values of keys.

    Example:
        >>> RESULTS(example_results(test_accuracy=0.8), "")
    """
    macs = {"dense": weights, "sparse": weights - zeros}
    counts = {"weights": weights, "zeros": zeros, "sparsity": zeros / weights}
    costs = {"dense_macs": macs["dense"], "sparse_macs": macs["sparse"]}
    layer = {"name": "fc.weight", "shape": [1, weights], "threshold": None, **counts, **costs}
    return {
        **{"network": "resnet8", "data": "digits", "classes": 10, "input_shape": [1, 8, 8]},
        **{"method": "feather", "target_sparsity": 0.5, "seed": 0, "epochs": 1},
        **{"test_accuracy": 0.5, "test_loss": 1.0, "train_loss": 1.0, "seconds": 1.0},
        **{"macs": macs, "report": {**counts, **costs, "layers": [layer]}},
        **{"commit": None, "versions": {}, "hardware": {"cpu": "CPU", "threads": 1}},
    } | changes
