"""Recalibration: the mean of the batches' statistics; on any failure nothing has changed."""

import pytest
import torch
from torch import nn

from torch_feather import models
from torch_feather.errors import ConfigurationError
from torch_feather.measure.batchnorm import recalibrate_batchnorm


def loader(n=3, size=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 4, 4, generator=generator) * (i + 1) + i for i in range(n)]


def network():
    """Dropout at the front, so that it would disturb the statistics if it were active."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=0.3))
    model(torch.randn(8, 2, 4, 4) * 9)  # stale statistics
    return model


def snapshot(model):
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [getattr(module, "momentum", 0) for module in model.modules()],
    )


def same(a, b):
    return a[1:] == b[1:] and all(torch.equal(a[0][key], b[0][key]) for key in a[0])


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_the_mean_over_batches_and_nothing_else_changes(training):
    model = network().train(training)
    before = snapshot(model)
    recalibrate_batchnorm(model, loader())
    seen = [model[1](x).transpose(0, 1).flatten(1) for x in loader()]
    norm = model[2]
    torch.testing.assert_close(norm.running_mean, torch.stack([y.mean(1) for y in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([y.var(1) for y in seen]).mean(0))
    assert norm.num_batches_tracked == 3
    after = snapshot(model)
    assert after[1:] == before[1:]
    statistics = {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    changed = {key for key in before[0] if not torch.equal(before[0][key], after[0][key])}
    assert changed == statistics
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_after_recalibration_is_normalised():
    model = network()
    (x,) = loader(1)
    recalibrate_batchnorm(model, [x])
    y = model.eval()(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(1), torch.ones(3), atol=1e-3, rtol=0)


def test_old_statistics_have_no_effect():
    one, other = network(), network()
    other[2].running_mean.fill_(1e6)
    for model in (one, other):
        recalibrate_batchnorm(model, loader())
    assert same(snapshot(one), snapshot(other))


@pytest.mark.parametrize(
    "form",
    [
        lambda x: (x, torch.zeros(6)),
        lambda x: [x, "label"],
        lambda x: {"label": 1, "input": x},
        lambda x: {"pixel_values": x, "labels": torch.zeros(6)},
    ],
    ids=["tuple", "list", "dict with input", "dict"],
)
def test_batch_forms_are_equivalent(form):
    plain, other = network(), network()
    recalibrate_batchnorm(plain, loader())
    recalibrate_batchnorm(other, map(form, loader()))
    assert same(snapshot(plain), snapshot(other))


@pytest.mark.parametrize("batches", [1, 2, 99])
def test_batches_limits_what_is_read(batches):
    limited, expected, taken = network(), network(), []

    def counting():
        for x in loader():
            taken.append(x)
            yield x

    recalibrate_batchnorm(limited, counting(), batches=batches)
    recalibrate_batchnorm(expected, loader()[:batches])
    assert same(snapshot(limited), snapshot(expected))
    assert len(taken) == min(batches, 3)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(2), (5, 2, 3)),
        (nn.BatchNorm3d(2), (5, 2, 3, 3, 3)),
        (nn.LazyBatchNorm2d(), (5, 2, 3, 3)),
    ],
)
def test_every_kind_of_batchnorm_is_recalibrated(norm, shape):
    x = torch.randn(shape) + 4
    norm(x)
    recalibrate_batchnorm(norm, [x])
    torch.testing.assert_close(norm.running_mean, x.transpose(0, 1).flatten(1).mean(1))


class Watches(nn.Dropout):
    """Notes in which state it runs, and does more in `train` than set its flag."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        self.seen = (self.training, torch.is_grad_enabled(), self.merged)
        return x


def test_all_but_the_norms_run_in_eval_mode_without_gradients():
    model = network()
    model[0] = Watches()
    recalibrate_batchnorm(model, loader())
    assert model[0].seen == (False, False, True)
    assert (model[0].training, model[0].merged) == (True, False)


def test_frozen_norms_are_measured_and_stay_frozen():
    model = network().train()
    model[2].eval()
    recalibrate_batchnorm(model, loader())
    assert model[2].num_batches_tracked == 3
    assert not model[2].training
    assert model[0].training


def test_norm_that_no_batch_reaches_keeps_its_statistics():
    model = network()
    model[0].aside = nn.BatchNorm2d(3)
    model[0].aside.running_mean.fill_(7)
    recalibrate_batchnorm(model, loader())
    assert model[0].aside.running_mean.eq(7).all()
    assert model[2].num_batches_tracked == 3


def interrupted():
    yield from loader(2)
    raise KeyboardInterrupt


BAD = {
    "no batch": (lambda: [], {}, ConfigurationError, "no batch"),
    "limit of zero": (loader, {"batches": 0}, ConfigurationError, "batches"),
    "half a batch": (loader, {"batches": 1.5}, ConfigurationError, "batches"),
    "no loader": (lambda: None, {}, ConfigurationError, "DataLoader .* got NoneType"),
    "text as loader": (lambda: "abc", {}, ConfigurationError, "DataLoader .* got str"),
    "one tensor as loader": (lambda: loader()[0], {}, ConfigurationError, "one tensor"),
    "NaN in the last batch": (
        lambda: [*loader(), torch.full((6, 2, 4, 4), torch.nan)],
        {},
        ConfigurationError,
        "NaN or infinite statistics at 2",
    ),
    "wrong channels": (lambda: [*loader(), torch.randn(6, 5, 4, 4)], {}, RuntimeError, None),
    "one value per channel": (lambda: [*loader(), torch.randn(1, 2, 1, 1)], {}, ValueError, None),
    "not a tensor": (lambda: [*loader(), ("text", 1)], {}, ConfigurationError, "tuple holding str"),
    "empty tuple": (lambda: [()], {}, ConfigurationError, "batch must be"),
    "loader raises": (lambda: (x if i < 2 else 1 / 0 for i, x in enumerate(loader())), {},
                      ZeroDivisionError, None),
    "interrupted": (interrupted, {}, KeyboardInterrupt, None),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("training", [True, False])
def test_bad_input_is_an_error_and_loses_nothing(case, training):
    make, options, error, message = BAD[case]
    model = network().train(training)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        recalibrate_batchnorm(model, make(), **options)
    assert same(snapshot(model), before)


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2)]
)
def test_model_without_running_statistics_is_an_error(model):
    with pytest.raises(ConfigurationError, match="no BatchNorm"):
        recalibrate_batchnorm(model, loader())


def test_pruned_network_is_repaired():
    """What it is for: statistics of weights that are gone mislead, measured ones do not."""
    model = models.resnet8(10, 2)
    for x in loader(5, 16):
        model(x)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(p.abs() > p.abs().quantile(0.9))
    x = torch.cat(loader(5, 16))
    stale = model.eval()(x)
    expected = model.train()(x)  # normalised by its own batch
    recalibrate_batchnorm(model, [x])
    fresh = model.eval()(x)
    assert (fresh - expected).norm() < 0.1 * (stale - expected).norm()
