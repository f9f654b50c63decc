"""Studies: training runs that answer one question, mostly a table or figure of the paper.

`STUDIES` holds them by name. It is made on first use, since it imports PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .descriptions import DESCRIPTIONS

if TYPE_CHECKING:
    from .study import Study

    STUDIES: dict[str, Study]

_CONSTANTS = {
    "recipe": "RECIPE",
    "threshold": "THRESHOLD",
    "stability": "STABILITY",
    "backbones": "BACKBONES",
    "mobilenet": "MOBILENET_STUDY",
    "flops": "FLOPS",
    "latency": "LATENCY",
    "networks": "NETWORKS_STUDY",
    "compare": "COMPARE",
    "beyond": "BEYOND",
    "transformers": "TRANSFORMERS",
}


def __getattr__(name: str) -> Any:
    if name != "STUDIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = {
        study: getattr(import_module(f".{study}", __name__), _CONSTANTS[study])
        for study in DESCRIPTIONS
    }
    return globals().setdefault(name, found)
