import math
import os
from typing import get_args

import pytest

from torch_feather.errors import ConfigurationError, nearest
from torch_feather.methods import method_options
from torch_feather.recipes import available_recipes, recipe_values
from torch_feather.training.config import (
    Config,
    apply,
    flatten,
    known_keys,
    load_config,
    parse_assignments,
    resolve_config,
    to_dict,
    to_yaml,
)


@pytest.mark.parametrize("recipe", sorted(available_recipes()))
def test_every_recipe_survives_a_round_trip_through_yaml(recipe, tmp_path):
    config = resolve_config(recipe, None, {"options.p": 2, "data.path": "here"})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config


def test_every_known_key_is_in_the_resolved_configuration():
    assert {key for key, _ in known_keys()} - {"options"} == set(flatten(to_dict(Config())))


def test_later_layers_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\noptimizer: {lr: 0.3}\n")
    config = resolve_config("digits", file, {"epochs": 9})
    assert config.epochs == 9  # command line over file
    assert config.optimizer.lr == 0.3  # file over recipe
    assert config.batch_size == recipe_values("digits")["batch_size"]  # recipe over default
    assert config.optimizer.momentum == Config().optimizer.momentum


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("cifar100", ("resnet20", 160, 128, 0.1, 0.9, 5e-4, 3.0, 0.0, 4, None)),
        ("cifar10", ("resnet20", 160, 128, 0.1, 0.9, 5e-4, 3.0, 0.0, 4, None)),
        ("cifar100-small", ("resnet8", 10, 128, 0.1, 0.9, 5e-4, 3.0, 0.0, 2, 16)),
    ],
)
def test_recipes_are_the_published_settings(recipe, expected):
    c = resolve_config(recipe)
    o = c.optimizer
    assert expected == (
        c.network,
        c.epochs,
        c.batch_size,
        o.lr,
        o.momentum,
        o.weight_decay,
        o.clip,
        o.label_smoothing,
        c.data.shift,
        c.data.resolution,
    )
    assert not o.nesterov
    assert c.data.flip


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("epoch", "epochs"),
        ("lr", "optimizer.lr"),
        ("optimizer.learning_rate", "optimizer."),
        ("data.pth", "data.path"),
        ("optimiser.momentum", "optimizer.momentum"),
        ("weight-decay", "optimizer.weight_decay"),
        ("batchsize", "batch_size"),
        ("nestrov", "optimizer.nesterov"),
        ("system.lr", "optimizer.lr"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(key, nearest):
    with pytest.raises(ConfigurationError, match=f"{key!r}; did you mean '{nearest}") as caught:
        apply(Config(), {key: 1}, "the file")
    assert str(caught.value).startswith("the file: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 2.5}, "epochs must be an integer, got 2.5"),
        ({"epochs": True}, "epochs must be an integer"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"sparsity": 1.0}, "sparsity must be a fraction"),
        ({"sparsity": "much"}, "sparsity must be a number"),
        ({"exclude": [3]}, "exclude must be a string or a list of strings"),
        ({"data.flip": "yes please"}, "data.flip must be true or false"),
        ({"data.name": "mnist"}, r"there is no data set 'mnist'"),
        ({"data.validation": 1.0}, "must be a fraction in"),
        ({"data": 3}, "unknown key 'data'"),
        ({"optimizer.lr": None}, "optimizer.lr must be a number"),
        ({"optimizer.clip": 0}, "clip must be positive"),
        ({"optimizer": {"momentum": 0, "nesterov": True}}, "nesterov requires optimizer.momentum"),
        ({"select": "best", "data.validation": 0}, "requires validation images"),
        ({"method": "dense", "options.p": 2}, "dense has no options"),
        ({"system.checkpoint_steps": 0}, "at least 1"),
    ],
)
def test_a_wrong_value_is_an_error_that_says_where(values, message):
    with pytest.raises(ConfigurationError, match=message):
        apply(Config(), values, "here")


def test_a_dense_run_has_no_target_and_no_dense_baseline(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: dense\n")
    given = parse_assignments(["method=dense"])
    for config in (
        Config(method="dense", sparsity=0.5, compare_dense=True),
        resolve_config("digits", file),
        resolve_config("digits", None, given),
        resolve_config("digits").dense(),
    ):
        assert config.sparsity == 0.0
        assert not config.compare_dense


def test_numbers_that_yaml_reads_as_text_are_numbers():
    config = apply(Config(), {"optimizer.weight_decay": "5e-4", "options.theta": "5e-1"}, "x")
    assert config.optimizer.weight_decay == 5e-4
    assert config.options == {"theta": 0.5}


def test_null_disables_optional_settings():
    assert apply(Config(), {"optimizer.clip": None}, "x").optimizer.clip is None


def test_assignments_are_read_as_yaml():
    given = ["optimizer.lr=0.5", "data.flip=false", "optimizer.clip=null", "network=timm/a=b"]
    assert parse_assignments(given) == {
        "optimizer.lr": 0.5,
        "data.flip": False,
        "optimizer.clip": None,
        "network": "timm/a=b",
    }
    with pytest.raises(ConfigurationError, match="write key=value"):
        parse_assignments(["optimizer.lr"])


def test_patterns_and_globs_are_text():
    """YAML would read 2:4 as 2 minutes and 4 seconds, and *.fc as an alias."""
    given = parse_assignments(["options.pattern=2:4", "exclude=*.fc.*", 'include=[a, "*b"]'])
    config = apply(Config(), given, "command line")
    assert config.options == {"pattern": "2:4"}
    assert (config.include, config.exclude) == (["a", "*b"], ["*.fc.*"])


def test_a_schedule_of_an_option_stays_text(tmp_path):
    """The method parses it; the configuration stores it unchanged."""
    given = parse_assignments(["options.theta=linear(1, 0)", "options.p=3"])
    config = apply(Config(), given, "command line")
    assert config.options == {"theta": "linear(1, 0)", "p": 3}
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_a_mapping_as_value_of_an_option_survives_a_round_trip_through_yaml(tmp_path):
    config = apply(Config(), {"options": {"costs": {"conv1.weight": 2.0}}}, "test")
    assert config.options == {"costs": {"conv1.weight": 2.0}}
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "line 1: not valid YAML"), ("- 1", "expected keys and values"), (None, "no such")],
)
def test_an_unreadable_file_is_an_error_that_names_it(text, message, tmp_path):
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_an_unknown_recipe_is_an_error_that_names_the_nearest():
    for name in ("cifar-100", "xyz"):
        with pytest.raises(ConfigurationError) as caught:
            resolve_config(name)
        assert f"{name!r}{nearest(name, available_recipes())} " in str(caught.value)


ALIASES = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, r"line 2: aliases such as \*a are not supported"),
        ("a: &a\n  b: *a\n", r"line 2: aliases such as \*a"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n", r"aliases such as \*a"),
        ("seed: !!timestamp x\n", "line 1: the tag .*timestamp is not supported"),
        ("seed: !!python/object/apply:os.getcwd []\n", "the tag .* is not supported"),
        ("network: !!binary aGVsbG8=\n", "the tag .*binary is not supported"),
        ("epochs: " + "[" * 30_000 + "]" * 30_000, "line 1: nested more than 16 levels deep"),
        ("epochs: " + "{a: " * 9_000 + "}" * 9_000, "nested more than 16 levels deep"),
        ("# " + "x" * 200_000, "larger than 128 KiB"),
        ("epochs: 1\nepochs: 2\n", "line 2: the key 'epochs' occurs twice"),
        ("1: 2\n", "line 1: a key must be text"),
        ("? [a, b]\n: 1\n", "line 1: a key must be text"),
        (f"epochs: {'9' * 5000}\n", "not valid YAML: Exceeds the limit"),
        ("network: \xff".encode("latin-1"), "not valid YAML: 'utf-8' codec"),
        (b"\0\1\2", "not valid YAML: unacceptable character"),
    ],
)
def test_a_settings_file_is_plain_and_small_or_refused_in_one_line(text, message, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_value_on_the_command_line_has_the_same_limits():
    for text in ("epochs=[&a 1, *a]", "epochs=!!set {a}", "epochs=" + "[" * 1000):
        with pytest.raises(ConfigurationError) as caught:
            parse_assignments([text])
        assert len(str(caught.value)) < 400


def test_what_only_yaml_reads_as_a_date_or_an_operator_is_text(tmp_path):
    assert parse_assignments(["data.path=2020-01-01", "network=="]) == {
        "data.path": "2020-01-01",
        "network": "=",
    }


def test_a_named_pipe_is_no_settings_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="pipe: not a regular file"):
        load_config(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match=r"cannot be read|not a regular file"):
        load_config(tmp_path)


HUGE = (10**18, 10**400, 1e300, float("inf"), float("nan"))
NUMBERS = [key for key, kind in known_keys() if {int, float} & {kind, *get_args(kind)}]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [*HUGE, *(-v for v in HUGE)], ids=repr)
def test_every_number_is_finite_and_in_range_or_refused(key, value):
    """What is accepted can be computed with: as a count of steps, or as a float."""
    refused = ""
    try:
        config = apply(Config(), {key: value}, "here")
    except ConfigurationError as error:
        refused = str(error)
    if refused:
        assert key in refused
        assert len(refused) < 200
        return
    accepted = dict(flatten(to_dict(config)))[key]
    if isinstance(accepted, int):
        assert accepted * config.batch_size < 2**80
        assert (key in ("seed", "evaluate_every")) or accepted <= 2**53
    else:
        infinite = key in ("optimizer.clip", "system.checkpoint_seconds")
        assert math.isfinite(accepted) or infinite


WRONG = [{"a": 1}, [1], "text", True, float("nan"), 10**400, -(10**30), {}, []]


@pytest.mark.parametrize("method", ["feather", "feather-flops", "probmask", "str", "asl+"])
def test_an_option_of_another_type_is_refused_like_any_wrong_value(method):
    accepts_text = {"theta", "allocation", "schedule", "pattern"}
    for option in method_options(method).keys() - {"costs", "example_input"}:
        for value in WRONG:
            plain = isinstance(value, str) and option in accepts_text
            if plain or (value is True and option == "exact"):
                continue
            with pytest.raises(ConfigurationError) as caught:
                apply(Config(method=method), {"options": {option: value}}, "here")
            assert f"here: Option {option!r} of method {method!r}" in str(caught.value)


@pytest.mark.parametrize("value", [2, "text", True, [1], [{"p": 2}]])
def test_options_that_are_no_mapping_are_refused(value):
    for given in ({"options": value}, {"options.": value}):
        with pytest.raises(ConfigurationError, match="options"):
            apply(Config(), given, "here")


def test_text_that_names_no_file_is_refused():
    for text in ("a\0b", "a\ud800"):
        for key in ("data.path", "options.schedule", "include"):
            with pytest.raises(ConfigurationError, match=f"here: {key} must be text without"):
                apply(Config(), {key: text}, "here")


def test_a_budget_stands_in_place_of_the_default_bias(tmp_path):
    """Version 0.1 stored the default bias with a budget, and ignored it."""
    budget, bias = {"method": "feather-flops", "options": {"budget": 1e6}}, {"options.gamma": 0.25}
    given = apply(Config(), budget, "here")
    assert given.written_out().options.get("budget") == 1e6
    assert "gamma" not in given.written_out().options
    stored = apply(given, bias, "here")
    (tmp_path / "config.yaml").write_text(to_yaml(stored))
    assert load_config(tmp_path / "config.yaml").options == {"budget": 1e6}
    assert Config(method="feather-flops").written_out().options["gamma"] == 0.25
