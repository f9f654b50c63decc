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

# Not here: modules whose names are attributes now. An import under the old name would replace them.
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
    "methods.method": "methods.magnitude",
    "noise": "methods.probmask.random_numbers",
    "probabilistic": "methods.probmask.masks",
    "projection": "methods.probmask.projection",
    "reparametrization": "methods.base",
    "sharding": "weights.shards",
    "slots": "engine.binding",
    "thresholded": "methods.magnitude",
    "transport": "methods.spartan.soft_top_k",
}

# Names that are not in the module that replaces the one they were in.
WITHIN = {
    "latent": {"Segment": ("weights.segments", "Segment")},
    "learned": {"Law": ("methods.learned.base", "ThresholdParametrization")},
    "masks": {"ZeroKeeper": ("finetune", "FixedMask")},
    "methods.method": {
        "ALLOCATIONS": ("methods.options", "ALLOCATIONS"),
        "PatternedMethod": ("methods.patterned", "PatternedMethod"),
        "SCHEDULES": ("methods.options", "SCHEDULES"),
        "make_allocation": ("methods.options", "make_allocation"),
        "make_method": ("methods.options", "make_method"),
        "make_schedule": ("methods.options", "make_schedule"),
    },
    "reparametrization": {"Setting": ("context", "MethodContext")},
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
        name = module.__name__.removeprefix(f"{PACKAGE}.")
        new = import_module(f"{PACKAGE}.{MODULES[name]}")
        warn(f"{module.__name__} is now called {new.__name__}.", DeprecationWarning)

        def find(attribute: str) -> Any:
            if attribute in WITHIN.get(name, {}):
                where, present = WITHIN[name][attribute]
                return getattr(import_module(f"{PACKAGE}.{where}"), present)
            return getattr(new, attribute)

        module.__dict__["__getattr__"] = find


sys.meta_path.append(_Finder())
