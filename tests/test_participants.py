"""After training, `sparsity` is the number that was asked for, of the weights that took part."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as old_weight_norm

import torch_feather as feather
from torch_feather import ConfigurationError
from torch_feather.errors import FeatherWarning
from torch_feather.export import SparseFile
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.schemas import example_results


class Text(nn.Module):
    """An embedding, a recurrent layer and a classifier."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.rnn = nn.LSTM(32, 32, 2)
        self.out = nn.Linear(32, 50)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), nn.Linear(10, 10))


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


# model, filters, whether default weights took no part
CASES = {
    "all": (mlp, {}, False),
    "frozen": (frozen, {}, True),
    "excluded": (mlp, {"exclude": "2.*"}, True),
    "included": (Text, {"include": ["rnn.weight_*", "out.weight"]}, False),
    "included alone": (Text, {"include": ["rnn.weight_*", "embed.*"]}, True),
    "biases": (mlp, {"include": ["0.*", "2.*", "3.*"]}, False),
}


def trained(case: str, **options) -> nn.Module:
    make, filters, _ = CASES[case]
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    settings = {"sparsity": 0.9, "total_steps": 1, "schedule": "constant"} | options
    return feather.sparsify(model, optimizer, **settings, **filters).finalize()


def quiet_sparsity(model: nn.Module) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FeatherWarning)
        return feather.sparsity(model)


def size_of(model: nn.Module, case: str) -> int:
    filters = CASES[case][1]
    found = feather.prunable.find_prunable(model, **filters, frozen=False)
    return sum(item.parameter.numel() for item in found)


@pytest.mark.parametrize("case", CASES)
def test_the_sparsity_is_the_number_that_was_asked_for(case):
    model = trained(case)
    size = size_of(model, case)
    assert quiet_sparsity(model) == round(0.9 * size) / size
    report = feather.report(model)
    assert (report.weights, report.sparsity) == (size, quiet_sparsity(model))


@pytest.mark.parametrize("case", CASES)
def test_a_difference_from_the_whole_model_is_told_once_with_both_numbers(case):
    model, differs = trained(case), CASES[case][2]
    default = feather.prunable.find_prunable(copy.deepcopy(model))
    both = {item.name for item in default} | {row.name for row in feather.report(model).layers}
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in both)
    whole = zeros / sum(model.get_parameter(name).numel() for name in both)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        feather.sparsity(model)
        feather.sparsity(model)
    assert len(caught) == differs
    report = feather.report(model)
    assert report.sparsity_with_others == whole
    assert ("Not listed" in str(report)) == differs
    if differs:
        assert f"{whole:.6g}" in str(caught[0].message)
        assert report.others[0].name in str(caught[0].message)


@pytest.mark.parametrize("case", CASES)
def test_a_sparse_file_knows_which_weights_took_part(case, tmp_path):
    model = trained(case)
    feather.save_sparse(model, tmp_path / "model.safetensors")
    loaded = feather.load_sparse(tmp_path / "model.safetensors", CASES[case][0]())
    assert quiet_sparsity(loaded) == quiet_sparsity(model)
    with SparseFile(tmp_path / "model.safetensors") as file:
        assert file.prunable == [row.name for row in feather.report(model).layers]


def test_a_state_dict_says_which_weights_took_part_if_it_is_told(tmp_path):
    model = trained("excluded")
    state, path = model.state_dict(), tmp_path / "model.safetensors"
    feather.save_sparse(state, path)
    plain = feather.load_sparse(path, trained("frozen"))  # whose memory is another model's
    assert feather.sparsity(plain) == feather.report(copy.deepcopy(model)).sparsity < 0.9
    feather.save_sparse(state, path, prunable=["0.weight", "3.weight", "elsewhere.weight"])
    assert quiet_sparsity(feather.load_sparse(path, mlp())) == quiet_sparsity(model)


def test_invalid_names_in_a_file_are_an_error():
    from torch_feather.export import manifest

    for wrong in ("weight", [1], ["other"], {}):
        with pytest.raises(feather.FileFormatError, match="names of prunable weights"):
            manifest._prunable({"prunable": wrong}, {})


def test_a_run_directory_knows_which_weights_took_part(tmp_path):
    model, run = trained("excluded"), RunDirectory(tmp_path)
    run.save_model(model)
    results = example_results() | {"report": feather.report(model).to_dict()}
    run.report_file.write_text(json.dumps(results))
    loaded = mlp()
    run.load_model(loaded)
    assert quiet_sparsity(loaded) == quiet_sparsity(model)
    run.report_file.write_text("{}")
    run.load_model(loaded)
    assert feather.sparsity(loaded) < quiet_sparsity(model)


def test_the_last_call_of_sparsify_counts():
    model = trained("excluded")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.5, total_steps=1, include="2.weight")
    optimizer.step()
    assert quiet_sparsity(sparsifier.finalize()) == 0.5
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.5, total_steps=1, include="2.weight")
    dense = sparsifier.detach()  # the default choice again
    assert feather.sparsity(dense) == feather.report(copy.deepcopy(model)).sparsity


def test_an_average_of_latent_weights_knows_which_weights_took_part():
    model = frozen()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    sparsifier = feather.sparsify(
        model, optimizer, sparsity=0.9, total_steps=2, schedule="constant"
    )
    average = feather.LatentAverage(sparsifier)
    averaged = average.copy_to(copy.deepcopy(model))
    assert quiet_sparsity(averaged) == quiet_sparsity(model) == round(0.9 * 740) / 740


def test_nothing_of_it_is_in_the_model():
    model, plain = trained("excluded"), mlp()
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()


def test_filters_choose_among_the_weights_that_took_part():
    model = trained("excluded")
    assert [row.name for row in feather.report(model, exclude="3.*").layers] == ["0.weight"]
    assert [row.name for row in feather.report(model, include="2.weight").layers] == ["2.weight"]


# --- layers whose weights are computed from other parameters ---------------------------------

COMPUTED = {
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "old weight norm": old_weight_norm,
    "pruned by torch": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "lazy": lambda _: nn.LazyLinear(8),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("remembered", [True, False])
def test_what_sparsify_accepted_is_measured_and_kept(kind, remembered):
    model = nn.Sequential(COMPUTED[kind](nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    sparsifier = feather.sparsify(
        model, optimizer, sparsity=0.75, total_steps=1, exclude="0.*", schedule="constant"
    )
    sparsifier.finalize()
    if not remembered:
        feather.participants.forget(model)
        optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    assert feather.sparsity(model) == feather.report(model).sparsity == 0.75
    feather.keep_zeros(model, optimizer)
    for _ in range(2):
        model(torch.randn(2, 8)).square().mean().backward()
        optimizer.step()
    assert feather.sparsity(model, include="2.weight") == 0.75


@pytest.mark.parametrize("measure", [feather.sparsity, feather.report], ids=["sparsity", "report"])
def test_naming_a_computed_weight_is_still_an_error(measure):
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(ConfigurationError, match="computed from other parameters"):
        measure(model, include="0.weight")


def test_a_weight_that_took_part_and_is_computed_now_is_not_left_out_silently():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather.sparsify(model, optimizer, sparsity=0.5, total_steps=1).finalize(force=True)
    prune.random_unstructured(model[0], "weight", 0.5)
    for measure in (feather.sparsity, feather.report, lambda m: feather.keep_zeros(m, optimizer)):
        with pytest.raises(ConfigurationError, match=r"0\.weight is computed"):
            measure(model)
    assert feather.sparsity(model, exclude="0.*") == int((model[1].weight == 0).sum()) / 32
    prune.remove(model[0], "weight")
    assert feather.sparsity(model) == sum(int((m.weight == 0).sum()) for m in model) / 96


def test_measuring_does_not_change_a_parametrized_layer():
    """Spectral norm takes a power iteration whenever its weight is read in training mode."""
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    before = copy.deepcopy(model.state_dict())
    feather.sparsity(model)
    feather.report(model, example_input=torch.ones(1, 8))
    feather.count_flops(model, torch.ones(1, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- signs of zeros --------------------------------------------------------------------------


def test_a_zero_is_a_zero_whatever_its_sign():
    """`w.mul_(mask)` leaves -0.0 where a negative weight was."""
    model = nn.Linear(64, 64)
    mask = torch.rand(64, 64) < 0.1
    with torch.no_grad():
        model.weight.mul_(mask)
    assert torch.signbit(model.weight[~mask]).any()
    kept = int(mask.sum())
    assert feather.sparsity(model) == 1 - kept / 4096
    assert feather.report(model).zeros == 4096 - kept
    assert feather.count_flops(model, torch.ones(1, 64)).sparse == kept
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    fixed = feather.keep_zeros(model, optimizer)
    for _ in range(2):
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.weight != 0, mask)
    fixed.remove()
    with torch.no_grad():
        model.weight.mul_(-1.0)
    sparsifier = feather.sparsify(model, optimizer, sparsity=1 - kept / 4096, total_steps=2)
    assert sparsifier.sparsity == 1 - kept / 4096
    assert torch.equal(sparsifier.masks()["weight"], mask)
