"""Names of version 0.1 work for one release, with a DeprecationWarning that says what to use."""

import importlib
import pickle
import warnings

import pytest
import torch
from torch import nn

import torch_feather as feather
from torch_feather._moved import MODULES
from torch_feather.deprecation import renamed_names
from torch_feather.methods import build_method

# The public names of each module of version 0.1 that has another name now. Left out are those that
# CHANGELOG.md lists as removed.
NAMES = {
    "atomic": "replace_file",
    "batchnorm": "STATISTICS recalibrate_batchnorm",
    "export.run": "FORMATS export_run load_network about describe push",
    "export.sparse_file": "save_sparse load_sparse SparseFile",
    "flops": "LayerFlops Flops count_flops",
    "gradients": "GradientRule StraightThrough Masked",
    "header": "FORMAT Header to_bytes from_bytes digest",
    "host": "waits_for",
    "inner": "Momentum Adam no_rate write_if",
    "latent": "BLOCK DEVICE_BLOCK Segment Numbers "
    "LatentWeights first_of_cut copy_all kept_image visible",
    "learned": "Law Present LearnedMethod LearnedThresholds",
    "masks": "ZeroKeeper keep_zeros",
    "methods.asl": "EXACT_FROM asl StandardDeviations spreads",
    "methods.asl_plus": "EXACT_FROM feather_asl_plus "
    "LAPLACE_BELOW FittedDeviations log_density_slope",
    "methods.method": "Method PatternedMethod make_method AnyMethod "
    "ALLOCATIONS make_allocation SCHEDULES make_schedule ERK",
    "methods.str_": "str_ Sigmoid ControlledMethod ControlledThresholds",
    "noise": "uniform",
    "probabilistic": "DEVICE_BLOCK MARGIN BEGIN END BLOCK ProbabilisticMethod ProbabilisticMasks",
    "projection": "ITERATIONS project_",
    "reparametrization": "Setting",
    "report": "LayerReport Report report sparsity EMPTY_MARK percent macs_text",
    "rounds": "in_backward Round half_done incomplete",
    "scaling": "unscale_others",
    "selection.cut": "Cut",
    "sharding": "Box is_sharded local spread_like part_of box_of "
    "count_nonzero fsdp_units reshard gather Shards shards_of",
    "slots": "WRITE_OUTSIDE_STEP NOT_HANDLED bind plain_optimizer check_storage",
    "thresholded": "Thresholded Timetable",
    "transport": "BLOCK DEVICE_BLOCK PASSES SATURATED SoftTopK soft_top_k",
    "writes": "BLOCK checksum_of checksum partial_checksum",
}


def test_every_moved_module_is_listed():
    assert set(NAMES) == set(MODULES)


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module in NAMES for name in NAMES[module].split()]
)
def test_a_moved_name_is_the_object_that_its_warning_names(module, name):
    old = importlib.import_module(f"torch_feather.{module}")
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} is deprecated") as caught:
        found = getattr(old, name)
    new, _, attribute = str(caught[0].message).rpartition("Use ")[2].rstrip(".").rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the new name is not deprecated
        assert getattr(importlib.import_module(new), attribute) is found


@pytest.mark.parametrize("module", NAMES)
def test_a_moved_module_has_no_other_names(module):
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module(f"torch_feather.{module}").nothing  # noqa: B018


@pytest.mark.parametrize(
    "statement",
    [
        "import torch_feather.report",
        "import torch_feather.report as report",
        "from torch_feather.report import Report",
        "from torch_feather import report",
        "import torch_feather.methods.asl",
        "from torch_feather.methods.asl import StandardDeviations",
    ],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_the_import_of_a_moved_module_leaves_the_function_of_its_name_in_place(statement):
    names = {}
    exec(statement, names)
    assert feather.report(nn.Linear(2, 2)).weights == 4
    assert feather.methods.asl(sparsity=0.5).bind
    if "report" in names:
        assert names["report"] is feather.report


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_nested_module_is_found_by_attributes():
    names = {}
    exec("import torch_feather.methods.method", names)
    assert names["torch_feather"].methods.method.Method is feather.methods.Method


def test_an_object_that_version_0_1_pickled_is_read():
    by_old_name = b"ctorch_feather.report\nReport\n."
    with pytest.warns(DeprecationWarning, match=r"measure\.report\.Report"):
        found = pickle.loads(by_old_name)
    assert found is type(feather.report(nn.Linear(2, 2)))


def test_a_warning_points_at_the_line_that_uses_the_name():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from torch_feather.flops import count_flops  # noqa: F401

        feather.ZeroKeeper  # noqa: B018
        feather.sparsifier.sparsify  # noqa: B018
    assert [one.filename for one in caught] == [__file__] * 3


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("torch_feather", "ZeroKeeper", feather.FixedMask),
        ("torch_feather.sparsifier", "sparsify", feather.sparsify),
        ("torch_feather.selection", "Cut", feather.selection.Cutoff),
        ("torch_feather.runtime", "Choice", feather.runtime.LayerTuning),
    ],
)
def test_an_old_name_in_a_present_module_is_the_new_object(module, old, new):
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is deprecated"):
        assert getattr(importlib.import_module(module), old) is new


def test_a_sparsifier_has_its_old_property():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.5, total_steps=1)
    with pytest.warns(DeprecationWarning, match="learned_sparsity"):
        assert sparsifier.own_sparsity == sparsifier.learned_sparsity
    with pytest.raises(AttributeError):
        sparsifier.nothing  # noqa: B018


def test_present_names_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        build_method("str", sparsity=0.9, lr_multiplier=0.5)
        assert feather.FixedMask
        assert feather.operators.Power(2.0)  # version 0.1 imported all its modules


def test_a_package_has_no_other_names():
    for name in ("nothing", "_nothing", "not a name", "a.b"):
        assert not hasattr(feather, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        renamed_names("here", {})("nothing")
