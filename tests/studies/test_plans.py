"""Plans of studies: runs, their names and settings, and the commands of the documentation."""

import itertools
import math
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from torch_feather import cli
from torch_feather.errors import ConfigurationError
from torch_feather.studies import STUDIES
from torch_feather.studies.command import app
from torch_feather.studies.execute import base_config
from torch_feather.studies.planning import grid, run_name
from torch_feather.studies.study import GridAxes
from torch_feather.training.config import apply, resolve_config


def plan(name, *, recipe=None, settings=(), sparsities=None, seeds=(0, 1, 2), methods=None):
    study = STUDIES[name]
    config = base_config(study, recipe, None, None, list(settings))
    digits = config.data.name == "digits"
    text = study.digits_sparsities if digits else study.sparsities
    chosen = [float(s) for s in text.split(",")] if sparsities is None else sparsities
    methods = methods or (study.methods or "").split(",")
    return study.plan(config, GridAxes(chosen, seeds, methods))


def test_a_run_of_its_recipe_is_named_by_recipe_method_sparsity_and_seed():
    assert [run.name for run in plan("compare", recipe="cifar100-small", seeds=[0])] == [
        "cifar100-small-dense-0",
        *(
            f"cifar100-small-{method}-{sparsity}-0"
            for sparsity in (0.9, 0.95, 0.98, 0.99, 0.995)
            for method in ("feather", "hard-ste", "soft-ste")
        ),
    ]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "feather-0.98-3"),
        ({"network": "mobilenet_v1"}, "mobilenet_v1-feather-0.98-3"),
        ({"network": "timm/resnet18"}, "timm_resnet18-feather-0.98-3"),
        ({"data.name": "cifar10", "data.path": "x"}, "cifar10-feather-0.98-3"),
        ({"data.name": "imagefolder", "data.path": "a/birds"}, "birds-feather-0.98-3"),
        ({"options.p": 2, "options.theta": 0.5}, "feather-p2-theta0.5-0.98-3"),
        ({"options.p": math.inf}, "feather-pinf-0.98-3"),
        ({"optimizer.lr": 0.123456789}, "feather-lr0.123456789-0.98-3"),
        ({"optimizer.clip": None}, "feather-clipnone-0.98-3"),
        ({"epochs": 7, "data.flip": False}, "feather-epochs7-flipfalse-0.98-3"),
        ({"method": "dense"}, "dense-3"),
        ({"sparsity": 0.9}, "feather-0.9-3"),
        ({"system.amp": False}, "feather-ampfalse-0.98-3"),
        ({"system.micro_batch": 16}, "feather-micro_batch16-0.98-3"),
        ({"system.threads": 2, "track_masks": True, "compare_dense": True}, "feather-0.98-3"),
    ],
)
def test_a_name_shows_how_a_run_differs_from_its_recipe(changes, name):
    config = apply(resolve_config("cifar100-small"), {"seed": 3} | changes, "test")
    assert run_name(config) == f"cifar100-small-{name}"


@pytest.mark.slow
def test_no_two_recipes_share_a_run():
    names = [
        {run.name for run in plan(name, recipe=recipe, seeds=[0])}
        for name in STUDIES
        for recipe in ("digits", "cifar100-small", "cifar100", "imagenet")
    ]
    for i, (first, second) in itertools.product(
        range(len(STUDIES)), itertools.permutations(range(4), 2)
    ):
        assert not names[4 * i + first] & names[4 * i + second]


def test_an_explicit_default_does_not_make_another_run():
    (run,) = grid(
        resolve_config("cifar100-small"),
        {"p = 3": {"method": "feather", "options": {"p": 3.0}}},
        GridAxes([0.98], [0]),
    )
    assert (run.name, run.label, run.config.options) == (
        "cifar100-small-feather-0.98-0",
        "p = 3",
        {},
    )


def test_an_option_applies_to_the_methods_that_have_it():
    runs = plan("compare", settings=["options.p=2"], sparsities=[0.5], seeds=[0],
                methods=["dense", "feather", "gmp"])  # fmt: skip
    assert [run.config.options for run in runs] == [{}, {"p": 2.0}, {}]
    with pytest.raises(ConfigurationError, match="None of dense, gmp has an option 'p'"):
        plan("compare", settings=["options.p=2"], methods=["dense", "gmp"])


def test_a_method_is_also_planned_with_its_own_options():
    runs = plan("compare", recipe="cifar100-small", sparsities=[0.98], seeds=[0],
                methods=["feather", "feather:p=2:theta=1", "gmp"])  # fmt: skip
    assert [(run.label, run.name) for run in runs] == [
        ("feather", "cifar100-small-feather-0.98-0"),
        ("feather (p = 2, theta = 1)", "cifar100-small-feather-p2-theta1-0.98-0"),
        ("gmp", "cifar100-small-gmp-0.98-0"),
    ]


def test_methods_of_other_packages_are_named_by_module_and_factory():
    axes = GridAxes([0.9], [0], ["torch_feather.methods:gmp", "torch_feather.methods:gmp:every=2"])
    assert axes.variants == {
        "torch_feather.methods:gmp": {"method": "torch_feather.methods:gmp"},
        "torch_feather.methods:gmp (every = 2)": {
            "method": "torch_feather.methods:gmp",
            "options": {"every": 2},
        },
    }
    runs = grid(resolve_config("cifar100"), axes.variants, axes)
    assert [run.name for run in runs] == [
        "cifar100-torch_feather.methods_gmp-0.9-0",
        "cifar100-torch_feather.methods_gmp-every2-0.9-0",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [("gmp:p=2", "gmp has no option 'p'"), ("feather:p", "--methods 'p': write key=value")],
)
def test_an_option_of_one_method_is_checked_before_training(text, message):
    with pytest.raises(ConfigurationError, match=message):
        plan("compare", sparsities=[0.5], seeds=[0], methods=[text])


@pytest.mark.parametrize(
    ("name", "setting", "where"),
    [
        ("compare", "seed=5", "--seeds"),
        ("compare", "sparsity=0.5", "--sparsity"),
        ("compare", "method=gmp", "--methods"),
        ("threshold", "method=gmp", "the study"),
        ("mobilenet", "network=resnet20", "the study"),
        ("networks", "network=resnet8", "the study"),
    ],
)
def test_settings_without_effect_are_errors(name, setting, where):
    with pytest.raises(ConfigurationError, match=f"{where} determines"):
        plan(name, settings=[setting])


def test_no_study_trains_the_dense_network_at_several_sparsities():
    for name in STUDIES:
        runs = plan(name, seeds=[0])
        assert len({run.name for run in runs}) == len(runs)
        dense = [
            (run.label, run.config.network, run.config.seed)
            for run in runs
            if run.config.method == "dense"
        ]
        assert len(dense) == len(set(dense))


def test_studies_share_the_runs_that_they_have_in_common():
    names = {
        name: {run.name for run in plan(name, recipe="cifar100-small")}
        for name in ("compare", "threshold", "backbones", "flops")
    }
    small = "cifar100-small"
    feather = {f"{small}-feather-{s}-{i}" for s in (0.9, 0.95, 0.98, 0.99, 0.995) for i in range(3)}
    assert feather <= names["compare"] & names["threshold"] & names["flops"]
    assert {f"{small}-dense-{i}" for i in range(3)} <= set.intersection(*names.values())
    assert f"{small}-feather-flops-0.98-0" in names["flops"]  # with the method's own gamma


def test_masks_are_recorded_by_the_stability_study_only():
    for name in STUDIES:
        assert {run.config.track_masks for run in plan(name)} <= {name == "stability"}


def test_the_command_line_overrides_the_settings_for_the_digits():
    assert {run.config.epochs for run in plan("mobilenet")} == {8}
    assert {run.config.epochs for run in plan("mobilenet", settings=["epochs=2"])} == {2}
    assert {run.config.epochs for run in plan("mobilenet", recipe="cifar100-small")} == {10}


def test_on_image_folders_mobilenet_is_the_imagenet_variant():
    networks = [
        {run.config.network for run in plan("mobilenet", recipe=recipe)}
        for recipe in ("cifar100", "imagenet")
    ]
    assert networks == [{"mobilenet_v1"}, {"timm/mobilenetv1_100"}]


def test_all_networks_finish_their_first_seed_before_the_second():
    runs = plan("networks", seeds=[1, 0])
    assert [run.config.seed for run in runs] == sorted((r.config.seed for r in runs), reverse=True)
    assert len({run.config.network for run in runs[: len(runs) // 2]}) == 3


# Measured seconds of one core: an epoch on the digits, dense or sparse; everything else of a run.
EPOCH = {
    "resnet8": 0.5,
    "resnet20": 1.4,
    "mobilenet_v1": 2.5,
    "densenet40_24": 3.2,
    "vit_small": 1.0,
}
REST = 3.0


@pytest.mark.parametrize("name", STUDIES)
def test_on_the_digits_a_study_takes_at_most_ten_minutes_of_two_cores(name):
    seconds = sum(REST + EPOCH[run.config.network] * run.config.epochs for run in plan(name))
    assert seconds / 2 <= 600


DOCS = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
COMMANDS = [line.split("  #")[0] for line in DOCS.splitlines() if line[:18] == "    feather study "]


@pytest.mark.parametrize("line", COMMANDS, ids=[line[18:] for line in COMMANDS])
def test_the_commands_of_the_documentation_are_valid(line):
    words = shlex.split(line)[2:]
    if words == ["NAME"]:
        return
    group = typer.main.get_command(app)
    command = group.commands[words[0]]
    given = command.make_context(words[0], words[1:]).params
    study = STUDIES[words[0]]
    config = base_config(
        study, given["recipe"], given["data"], given["data_path"], given["settings"]
    )
    assert study.plan(config, GridAxes([0.9], [0], (study.methods or "").split(","))) or (
        words[0] == "recipe"
    )


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_documented_at_three_scales(name):
    _, _, rest = DOCS.partition(f"\n## `{name}`\n")
    commands = [line for line in rest.partition("\n## ")[0].splitlines() if "feather study" in line]
    assert all(f"feather study {name}" in line for line in commands)
    assert len(commands) == (1 if name == "recipe" else 3)


def test_help_lists_the_studies_and_their_options():
    listed = CliRunner().invoke(cli.make_app(), ["study", "--help"]).output
    assert all(name in listed for name in STUDIES)
    options = CliRunner().invoke(cli.make_app(), ["study", "threshold", "--help"]).output
    assert "--sparsity" in options
    assert "--methods" not in options  # the question fixes them


def test_help_shows_defaults():
    output = CliRunner().invoke(cli.make_app(), ["study", "mobilenet", "--help"]).output
    assert "[default: 0.89,0.941; digits: 0.89,0.941]" in " ".join(output.replace("│", "").split())
