"""`method="auto"`: the rules, their evidence, the message, and states that keep their method."""

import copy
import io
import json
import re
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import torch_feather as feather
from torch_feather.errors import MethodChosen
from torch_feather.methods import build_method, choice, find_method
from torch_feather.methods.choice import CONVOLUTIONAL, DEPTHWISE, OTHER, Situation, choose
from torch_feather.methods.chosen import BYTES, Chosen
from torch_feather.prunable import find_prunable

ROOT = Path(__file__).parents[1]
STEPS = 8
LONG = 10**6  # steps: more than every rule asks for


def make(method="auto", sparsity=0.9, optimizer=torch.optim.SGD, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16))
    one = optimizer(model.parameters(), lr=0.01)
    return (
        model,
        one,
        feather.sparsify(model, one, method, sparsity=sparsity, total_steps=STEPS, **options),
    )


def advance(model, optimizer, steps):
    for i in range(*steps):
        x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(i))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    return lambda: torch.load(io.BytesIO(file.getvalue()))


def first_rule(monkeypatch, method="feather-ham", **options):
    """Let `auto` choose this method at all sparsities."""
    rule = choice.Rule(method, "of a test", "results/claims.md", options)
    monkeypatch.setattr(choice, "RULES", (rule, *choice.RULES))


# The rules


@pytest.mark.parametrize(
    ("sparsity", "network", "optimizer", "steps", "folder"),
    [
        (0.98, CONVOLUTIONAL, "SGD", 3910, "compare-small"),
        (0.99, CONVOLUTIONAL, "SGD", LONG, "compare-small"),
        (0.95, CONVOLUTIONAL, "SGD", LONG, "compare-small"),
        (0.90, CONVOLUTIONAL, "SGD", LONG, "cifar100-small"),
        (0.995, CONVOLUTIONAL, "SGD", LONG, "cifar100-small"),
        (0.941, DEPTHWISE, "SGD", 2346, "mobilenet-small"),
        (0.999, CONVOLUTIONAL, "SGD", LONG, None),
        (0.5, CONVOLUTIONAL, "SGD", LONG, None),
        (0.98, CONVOLUTIONAL, "AdamW", LONG, None),
        (0.98, CONVOLUTIONAL, "SGD and AdamW", LONG, None),
        (0.98, CONVOLUTIONAL, "SGD", 3909, None),
        (0.98, DEPTHWISE, "SGD", LONG, None),
        (0.95, OTHER, "SGD", LONG, None),
    ],
)
def test_the_rule_for_what_was_measured_applies(
    monkeypatch, sparsity, network, optimizer, steps, folder
):
    rules = tuple(rule for rule in choice.RULES if rule.method != "feather-ham")
    monkeypatch.setattr(choice, "RULES", rules)
    found = choose(Situation(sparsity, network, optimizer, steps))
    assert (found.method, found.options) == ("feather", {})
    assert found.evidence == (f"results/{folder}/table.md" if folder else "results/claims.md")
    assert ("default" in found.reason) == (folder is None)


def test_feather_ham_is_chosen_nowhere_before_its_comparison_ends():
    low, high = choice.HAM_SPARSITY
    if "No conclusion yet" in (ROOT / "results" / "beyond" / "table.md").read_text():
        assert low >= 1
    assert low >= 1 or 0.98 <= low <= high <= 0.999  # what the protocol compares
    grid = [*np.linspace(0, 0.9999, 200), 0.98, 0.99, 0.995, 0.999, 1 - 1e-12]
    for network in (CONVOLUTIONAL, DEPTHWISE, OTHER):
        for s in grid:
            expected = network == CONVOLUTIONAL and low <= s <= high
            method = choose(Situation(s, network, "SGD", LONG)).method
            assert method == ("feather-ham" if expected else "feather")


def test_one_pair_of_sparsities_enables_feather_ham(monkeypatch):
    (rule,) = (rule for rule in choice.RULES if rule.method == "feather-ham")
    assert rule.sparsity is choice.HAM_SPARSITY
    enabled = replace(rule, sparsity=(0.98, 0.995))
    rules = tuple(enabled if one is rule else one for one in choice.RULES)
    monkeypatch.setattr(choice, "RULES", rules)
    for s, method in {0.979: "feather", 0.98: "feather-ham", 0.995: "feather-ham"}.items():
        assert choose(Situation(s, CONVOLUTIONAL, "SGD", 3910)).method == method
    assert choose(Situation(0.996, CONVOLUTIONAL, "SGD", 3910)).method == "feather"
    for other in [(OTHER, "SGD", 3910), (CONVOLUTIONAL, "AdamW", 3910), (CONVOLUTIONAL, "SGD", 99)]:
        assert choose(Situation(0.98, *other)).method == "feather"
    assert choose(Situation(0.98, CONVOLUTIONAL, "SGD", 3910)).options == {"alpha": 40.0}


@pytest.mark.parametrize("rule", choice.RULES, ids=lambda rule: rule.evidence)
def test_a_rule_can_be_built_stored_and_looked_up(rule):
    assert build_method(rule.method, sparsity=0.9, **rule.options)
    text = (ROOT / rule.evidence).read_text()
    for number in re.findall(r"\d+(?:\.\d+)?%|n = \d", rule.reason):
        assert number in text, number
    for name in re.findall(
        r"hard-ste|soft-ste|st3-sigma|asl\+|gmp|str\b|st3|feather-ham", rule.reason
    ):
        assert name in text, name
    found = choice.Choice(rule.method, dict(rule.options), rule.reason, rule.evidence)
    chosen = Chosen(found, lambda choice: build_method(choice.method, sparsity=0.9))
    assert chosen.stored().shape == (BYTES,)  # not longer
    assert rule.reason == rule.reason.strip(".")  # one sentence within another


@pytest.mark.parametrize("rule", choice.RULES[:-1], ids=lambda rule: rule.evidence)
def test_a_rule_holds_from_the_length_of_its_runs(rule):
    rows = json.loads((ROOT / rule.evidence).with_name("runs.json").read_text())
    batches = -(-50_000 // 128)
    assert {row["config"]["batch_size"] for row in rows} == {128}
    assert rule.steps == max(row["epochs"] for row in rows) * batches
    assert {row["data"] for row in rows} == {"cifar100"}


def test_the_claims_of_the_rules_are_those_of_the_tables():
    table = (ROOT / "results" / "compare-small" / "table.md").read_text()
    above = re.findall(r"feather is significantly above (.+?) at (.+?) sparsity", table)
    others = {"feather-gmp", "feather-asl+", "feather-flops"}  # not published by others
    for s in ("98%", "99%"):
        names = {
            name.split(" (")[0]
            for text, sparsities in above
            for name in re.split(r", | and ", text)
            if s in sparsities
        }
        assert len(names - others) == 10
    means = re.findall(r"^\| (\S+).*? \| 95% \| ([\d.]+) ±", table, re.MULTILINE)
    assert len(means) == 14
    assert max(means, key=lambda row: float(row[1]))[0] == "feather"
    for name in ("hard-ste", "st3-sigma", "asl+"):
        assert f"feather and {name}: no significant difference at 95%" in table
    table = (ROOT / "results" / "cifar100-small" / "table.md").read_text()
    for name in ("hard-ste", "soft-ste"):
        (at,) = re.findall(rf"significantly above (?:.* and )?{name}\b.*? at (.+?) sparsity", table)
        assert {"90%", "99.5%"} <= set(re.findall(r"[\d.]+%", at))


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ("resnet8", CONVOLUTIONAL),
        ("densenet40_24", CONVOLUTIONAL),
        ("mobilenet_v1", DEPTHWISE),
        ("vit_small", OTHER),
        ("gpt_small", OTHER),
    ],
)
def test_kinds_of_networks(network, kind):
    with torch.device("meta"):
        model = feather.models.create(network, num_classes=10)
    assert choice.network_kind(find_prunable(model)) == kind


def test_one_group_of_a_convolution_with_one_channel_is_not_depthwise():
    assert choice.network_kind(find_prunable(nn.Conv2d(1, 8, 3))) == CONVOLUTIONAL


# The call


def test_the_choice_is_told_and_kept():
    with pytest.warns(MethodChosen) as caught:
        *_, sparsifier = make()
    assert len(caught) == 1
    text = str(caught[0].message)
    found = sparsifier.method.choice
    assert text.startswith(f"method='auto' chose feather: {found.reason} ({found.evidence}).")
    assert found.evidence == "results/claims.md"
    assert sparsifier.method.description == build_method("feather", sparsity=0.9)


@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_the_situation_is_that_of_the_call(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "torch_feather.attach.choose", lambda situation: seen.append(situation) or choose(situation)
    )
    make(sparsity=0.95, optimizer=torch.optim.AdamW)
    model = feather.models.resnet8(num_classes=10)
    groups = {"*conv*": 0.9, "*": 0.5}
    first, *others = model.parameters()
    both = [torch.optim.SGD([first], lr=0.1), torch.optim.AdamW(others)]
    sparsifier = feather.sparsify(model, both, "auto", sparsity=groups, total_steps=5)
    assert seen[0] == Situation(0.95, OTHER, "AdamW", STEPS)
    assert seen[1].optimizer == "SGD and AdamW"
    assert seen[1].sparsity == pytest.approx(sparsifier.target, abs=1e-4)
    assert 0.5 < seen[1].sparsity < 0.9


@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_auto_trains_as_the_method_does():
    models = []
    for method in ("auto", "feather"):
        model, optimizer, sparsifier = make(method)
        advance(model, optimizer, [0, STEPS])
        models.append(sparsifier.finalize())
    assert all(map(torch.equal, *(model.parameters() for model in models)))
    assert feather.sparsity(models[0]) == pytest.approx(0.9, abs=2e-3)


def test_options_belong_to_a_method_that_is_named():
    with pytest.raises(feather.ConfigurationError, match=r"got pattern, p\. Name the method"):
        make(pattern="2:4", p=2)
    assert "auto" not in feather.available_methods()
    with pytest.raises(feather.ConfigurationError, match="'auto' is no method: sparsify and"):
        find_method("auto")
    with pytest.raises(feather.ConfigurationError, match="'auto' is a method of torch-feather"):
        feather.register_method("auto", feather.methods.gmp)


# States


LOADED = {
    "after": lambda model, optimizer, sparsifier, state: (
        model.load_state_dict(state[0]),
        optimizer.load_state_dict(state[1]),
    ),
    "optimizer first": lambda model, optimizer, sparsifier, state: (
        optimizer.load_state_dict(state[1]),
        model.load_state_dict(state[0]),
    ),
}


@pytest.mark.parametrize("way", LOADED)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("feather-ham", {"alpha": 40.0}),  # a latent update
        ("gmp", {"allocation": "uniform"}),  # hooks on gradients
        ("st3", {"allocation": "erk"}),
        ("spartan", {}),  # state, and terms that need all gradients
        ("asl+", {"dense_below": 0}),  # parameters of its own
        ("probmask", {}),  # random numbers
    ],
)
@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_a_resumed_run_keeps_its_method(monkeypatch, method, options, way):
    with monkeypatch.context() as patch:
        first_rule(patch, method, **options)
        model, optimizer, sparsifier = make()
        advance(model, optimizer, [0, 5])
        state = saved(model, optimizer)
        advance(model, optimizer, [5, STEPS])
    again, other, resumed = make()
    assert resumed.method.choice.method == "feather"
    with pytest.warns(MethodChosen, match=rf"continues with {re.escape(method)}.* chose feather"):
        LOADED[way](again, other, resumed, state())
    assert resumed.method.choice == sparsifier.method.choice
    advance(again, other, [5, STEPS])
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    later = saved(again, other)()[1]  # keeps it too
    named = make(method, **options)
    named[1].load_state_dict(copy.deepcopy(later))
    for a, b in zip(
        resumed.latent_weights().values(), named[2].latent_weights().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert all(
        map(torch.equal, sparsifier.finalize().parameters(), resumed.finalize().parameters())
    )


@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_a_state_that_was_loaded_before_sparsify_keeps_its_method(monkeypatch):
    with monkeypatch.context() as patch:
        first_rule(patch, "gmp", allocation="uniform")
        model, optimizer, _ = make()
        advance(model, optimizer, [0, 5])
        state = saved(model, optimizer)()
        advance(model, optimizer, [5, STEPS])
    again, other, handle = make()
    handle.detach()
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    handle = feather.sparsify(again, other, "auto", sparsity=0.9, total_steps=STEPS)
    assert handle.method.choice.method == "gmp"
    advance(again, other, [5, STEPS])
    assert all(map(torch.equal, model.parameters(), again.parameters()))


@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_the_state_of_a_sparsifier_keeps_its_method(monkeypatch):
    with monkeypatch.context() as patch:
        first_rule(patch, "feather", p=2.0)
        model, optimizer, sparsifier = make()
        advance(model, optimizer, [0, 5])
        state = copy.deepcopy(sparsifier.state_dict())
    _, _, other = make()
    other.load_state_dict(state)
    assert other.method.choice.name == "feather (p=2.0)"
    assert other.step_count == 5
    assert all(map(torch.equal, sparsifier.masks().values(), other.masks().values()))


@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_states_of_named_methods_fit_if_the_method_is_the_same():
    model, optimizer, _ = make("feather")
    advance(model, optimizer, [0, 5])
    state = saved(model, optimizer)()[1]
    assert not any("feather_choice" in own for own in state["state"].values())
    _, other, sparsifier = make()
    other.load_state_dict(state)
    assert sparsifier.step_count == 5
    model, optimizer, _ = make("gmp", allocation="uniform")
    with pytest.raises(feather.StateError, match="its method or the method's options differ"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_a_state_that_does_not_fit_changes_no_method(monkeypatch):
    with monkeypatch.context() as patch:
        first_rule(patch, "gmp", allocation="uniform")
        _, optimizer, _ = make(sparsity=0.5)
        state = copy.deepcopy(optimizer.state_dict())
    model, other, sparsifier = make()
    with pytest.raises(feather.StateError, match=r"its sparsity is 0.5, now 0.9"):
        other.load_state_dict(state)
    assert sparsifier.method.choice.method == "feather"
    expected, second, _ = make("feather")
    for one in ((model, other), (expected, second)):
        advance(*one, [0, STEPS])
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def test_a_warning_that_is_raised_as_an_error_changes_no_method(monkeypatch):
    """The network stays as it was, instead of one method with the weights of another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MethodChosen)
        with monkeypatch.context() as patch:
            first_rule(patch, "gmp", allocation="uniform")
            _, optimizer, _ = make()
            state = copy.deepcopy(optimizer.state_dict())
        model, other, sparsifier = make()
        warnings.simplefilter("error", MethodChosen)
        with pytest.raises(MethodChosen, match="continues with gmp"):
            other.load_state_dict(state)
    assert sparsifier.method.choice.method == "feather"
    expected, second, _ = make("feather")
    for one in ((model, other), (expected, second)):
        advance(*one, [0, STEPS])
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_a_warning_that_sparsify_raises_leaves_the_model_dense(monkeypatch):
    with monkeypatch.context() as patch:
        first_rule(patch, "gmp", allocation="uniform")
        model, optimizer, sparsifier = make()
        advance(model, optimizer, [0, 5])
        state = copy.deepcopy(optimizer.state_dict())
        sparsifier.detach()
    optimizer.load_state_dict(state)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "method='auto' continues with gmp", MethodChosen)
        with pytest.raises(MethodChosen):
            feather.sparsify(model, optimizer, "auto", sparsity=0.9, total_steps=STEPS)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert (
        feather.sparsify(model, optimizer, "auto", sparsity=0.9, total_steps=STEPS).step_count == 5
    )


@pytest.mark.parametrize("method", ["spartan", "probmask"])  # with state of each weight
@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_the_method_of_a_state_is_that_of_the_weights_after_a_cast(monkeypatch, method):
    with monkeypatch.context() as patch:
        first_rule(patch, method)
        model, optimizer, _ = make()
        advance(model, optimizer, [0, 5])
        state = saved(model, optimizer)
    runs = []
    for name in ("auto", method):
        again, other, _ = make(name)
        again.double()
        other.load_state_dict(state()[1])
        for i in range(5, STEPS):
            x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(i)).double()
            again(x).square().mean().backward()
            other.step()
            other.zero_grad()
        runs.append(again)
    assert all(map(torch.equal, *(run.parameters() for run in runs)))


@pytest.mark.parametrize("damage", ["flip", "cut", "other", "types"])
@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_a_damaged_choice_is_an_error(damage):
    _, optimizer, sparsifier = make()
    state = copy.deepcopy(optimizer.state_dict())
    for own in state["state"].values():
        if "feather_choice" in own:
            data = own["feather_choice"]
            text = b'{"method": ["feather"], "options": {}, "reason": "", "evidence": ""}'
            types = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            changed = {"flip": data ^ 1, "cut": data[:20], "other": data / 3, "types": types}
            own["feather_choice"] = changed[damage]
    with pytest.raises(feather.StateError, match="method='auto' chose is damaged"):
        optimizer.load_state_dict(state)
    assert sparsifier.step_count == 0


@pytest.mark.filterwarnings("ignore")  # of PyTorch: one process, without a process group
def test_a_distributed_checkpoint_keeps_the_method(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        first_rule(patch, "feather-ham", alpha=40.0)
        model, optimizer, _ = make()
        advance(model, optimizer, [0, 5])
        checkpoint.save(
            dict(zip("mo", get_state_dict(model, optimizer), strict=True)), checkpoint_id=tmp_path
        )
        advance(model, optimizer, [5, STEPS])
    again, other, sparsifier = make()
    states = dict(zip("mo", get_state_dict(again, other), strict=True))
    checkpoint.load(states, checkpoint_id=tmp_path)  # into the tensors of the present states
    weights, state = states["m"], states["o"]
    set_state_dict(again, other, model_state_dict=weights, optim_state_dict=state)
    assert sparsifier.method.choice.name == "feather-ham (alpha=40.0)"
    advance(again, other, [5, STEPS])
    assert all(map(torch.equal, model.parameters(), again.parameters()))


@pytest.mark.parametrize("name", ["torch_feather.methods:gmp", "not-known", "auto"])
@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_a_state_imports_no_module(monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(
            "torch_feather.methods.chosen.asdict", lambda one: vars(one) | {"method": name}
        )
        _, optimizer, _ = make()
        state = copy.deepcopy(optimizer.state_dict())
    monkeypatch.setattr("torch_feather.methods.registry.import_object", pytest.fail)
    _, other, _ = make()
    with pytest.raises(feather.StateError, match=f"method '{name}', which .* does not exist here"):
        other.load_state_dict(state)


@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_an_option_of_another_version_is_an_error_of_the_state(monkeypatch):
    """Also before `sparsify`, which then leaves model and optimizer as they were."""
    with monkeypatch.context() as patch:
        later = {"method": "feather", "options": {"q": 1}, "reason": "", "evidence": ""}
        patch.setattr("torch_feather.methods.chosen.asdict", lambda one: later)
        model, optimizer, sparsifier = make()
        state = copy.deepcopy(optimizer.state_dict())
        sparsifier.detach()
    message = "method 'feather', which .* cannot be used here: .*'q'.*[^.]. Load another"
    optimizer.load_state_dict(state)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(feather.StateError, match=message):
        feather.sparsify(model, optimizer, "auto", sparsity=0.9, total_steps=STEPS)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    _, other, _ = make()
    with pytest.raises(feather.StateError, match=message):
        other.load_state_dict(state)


@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_a_moved_model_leaves_no_latent_weights_behind():
    model, optimizer, sparsifier = make()
    advance(model, optimizer, [0, 2])
    before = weakref.ref(sparsifier.step.training.weights)
    model.double()
    assert sparsifier.masks()["0.weight"].shape == (8, 2, 3, 3)
    assert before() is None


@pytest.mark.filterwarnings("ignore::torch_feather.errors.MethodChosen")
def test_with_several_optimizers_a_state_keeps_its_method(monkeypatch):
    def several():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        both = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
        return model, both, feather.sparsify(model, both, "auto", sparsity=0.8, total_steps=STEPS)

    def train(model, both, steps):
        for i in range(*steps):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
            model(x).square().mean().backward()
            for one in both:
                one.step()
                one.zero_grad()

    with monkeypatch.context() as patch:
        first_rule(patch, "spartan")
        model, both, _ = several()
        train(model, both, [0, 4])
        states = copy.deepcopy([one.state_dict() for one in both])
        weights = copy.deepcopy(model.state_dict())
        train(model, both, [4, STEPS])
    again, others, sparsifier = several()
    again.load_state_dict(weights)
    for one, state in zip(others, states, strict=True):
        one.load_state_dict(state)
    assert sparsifier.method.choice.method == "spartan"
    train(again, others, [4, STEPS])
    assert all(map(torch.equal, model.parameters(), again.parameters()))
