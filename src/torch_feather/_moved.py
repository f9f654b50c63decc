"""Modules of version 0.1 that moved: they keep working for one release.

The names in them give a DeprecationWarning when they are used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

from .deprecation import warn_renamed

PACKAGE = "torch_feather"

MODULES = {
    "atomic": "files",
    "batchnorm": "measure.batchnorm",
    "export.run": "training.export_run",
    "export.sparse_file": "export",
    "flops": "measure.flops",
    "gradients": "gradient_rules",
    "header": "engine.checkpoint",
    "host": "devices",
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
    "report": "measure.report",
    "rounds": "engine.step_in_backward",
    "scaling": "engine.loss_scale",
    "selection.cut": "selection.cutoff",
    "sharding": "weights.shards",
    "slots": "engine.binding",
    "thresholded": "methods.magnitude",
    "transport": "methods.spartan.soft_top_k",
    "writes": "weights.checksum",
}

# Names that are now called otherwise, or are not in the module that replaces the one they were in.
WITHIN = {
    "export.run": {"about": "training.export_run.run_metadata"},
    "host": {"waits_for": "devices.synchronizes"},
    "inner": {"no_rate": "methods.base.no_learning_rate"},
    "latent": {
        "Numbers": "weights.latent.PerTensor",
        "Segment": "weights.segments.Segment",
        "first_of_cut": "weights.segments.first_with_cutoff",
        "kept_image": "weights.kept.kept_values",
        "visible": "weights.kept.keep_nonzero",
    },
    "learned": {"Law": "methods.learned.base.ThresholdParametrization"},
    "masks": {"ZeroKeeper": "finetune.FixedMask"},
    "methods.asl": {
        "asl": "methods.asl",
        "spreads": "methods.learned.asl.standard_deviations",
    },
    "methods.asl_plus": {
        "asl_plus": "methods.asl_plus",
        "feather_asl_plus": "methods.feather_asl_plus",
    },
    "methods.method": {
        "ALLOCATIONS": "methods.options.ALLOCATIONS",
        "AnyMethod": "methods.base.AnyMethod",
        "ERK": "allocation.ERK",
        "PatternedMethod": "methods.patterned.PatternedMethod",
        "SCHEDULES": "methods.options.SCHEDULES",
        "make_allocation": "methods.options.make_allocation",
        "make_method": "methods.options.make_method",
        "make_schedule": "methods.options.make_schedule",
    },
    "methods.str_": {"str_": "methods.str_"},
    "reparametrization": {"Setting": "context.MethodContext"},
    "report": {"report": "report", "sparsity": "sparsity"},
    "rounds": {"Round": "engine.step_in_backward.InBackwardStep"},
    "selection.cut": {"Cut": "selection.cutoff.Cutoff"},
    "sharding": {
        "box_of": "weights.shards.local_box",
        "part_of": "weights.shards.local_part",
        "spread_like": "weights.shards.shard_like",
    },
    "slots": {
        "NOT_HANDLED": "engine.wrappers.UNSUPPORTED",
        "WRITE_OUTSIDE_STEP": "engine.wrappers.WRITE_OUTSIDE_STEP",
        "plain_optimizer": "engine.wrappers.plain_optimizer",
    },
    "transport": {
        "BLOCK": "weights.latent.BLOCK",
        "DEVICE_BLOCK": "weights.latent.DEVICE_BLOCK",
    },
}


class _Moved(ModuleType):
    """A module under its old name. Its names are looked up where they are now."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        old = self.__name__.removeprefix(f"{PACKAGE}.")
        new = f"{PACKAGE}.{WITHIN.get(old, {}).get(name, f'{MODULES[old]}.{name}')}"
        module, _, attribute = new.rpartition(".")
        found = getattr(import_module(module), attribute)
        warn_renamed(f"{self.__name__}.{name}", new)
        return found


class _Finder(MetaPathFinder, Loader):
    """Imports a module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = fullname.removeprefix(f"{PACKAGE}.")
        return ModuleSpec(fullname, self) if name != fullname and name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


_finder = _Finder()
sys.meta_path.append(_finder)
# These names are functions of the package now, as in version 0.1. An import of the module would
# put it in their place, but not of one that is imported already.
for _name in ("methods.asl", "methods.asl_plus", "methods.str_", "report"):
    _spec = ModuleSpec(f"{PACKAGE}.{_name}", _finder)
    sys.modules[_spec.name] = module_from_spec(_spec)
