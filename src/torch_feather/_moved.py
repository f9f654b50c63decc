"""Names of version 0.1 that moved: they keep working for one release, with a DeprecationWarning."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .errors import warn

PACKAGE = "torch_feather"

MODULES = {
    "atomic": "files",
    "batchnorm": "measure.batchnorm",
    "flops": "measure.flops",
    "gradients": "gradient_rules",
    "header": "engine.checkpoint",
    "inner": "methods.own_parameters",
    "latent": "weights.latent",
    "learned": "methods.learned.base",
    "masks": "finetune",
    "methods.asl": "methods.learned.asl",
    "methods.asl_plus": "methods.learned.asl_plus",
    "methods.method": "methods.magnitude",
    "methods.str_": "methods.learned.str_",
    "noise": "methods.probmask.random_numbers",
    "probabilistic": "methods.probmask.masks",
    "projection": "methods.probmask.projection",
    "reparametrization": "methods.base",
    "sharding": "weights.shards",
    "slots": "engine.binding",
    "thresholded": "methods.magnitude",
    "transport": "methods.spartan.soft_top_k",
}

NAMES = {"ZeroKeeper": ("finetune", "FixedMask")}


def attribute(name: str) -> Any:
    """Return the object that now has the role of a moved attribute of the package.

    Args:
        name: name in version 0.1.

    Raises:
        AttributeError: no attribute of that name moved.

    Example:
        >>> attribute("nothing")
        Traceback (most recent call last):
        AttributeError: module 'torch_feather' has no attribute 'nothing'
    """
    if name in NAMES:
        module, new = NAMES[name]
        warn(f"torch_feather.{name} is now called {new}.", DeprecationWarning)
        return getattr(import_module(f"{PACKAGE}.{module}"), new)
    if name in MODULES:
        return import_module(f"{PACKAGE}.{name}")
    raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Imports a module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = fullname.removeprefix(f"{PACKAGE}.")
        return ModuleSpec(fullname, self) if name != fullname and name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        new = f"{PACKAGE}.{MODULES[name.removeprefix(f'{PACKAGE}.')]}"
        warn(f"{name} is now called {new}.", DeprecationWarning)
        sys.modules[name] = import_module(new)


sys.meta_path.append(_Finder())
