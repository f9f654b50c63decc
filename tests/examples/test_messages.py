"""What does not work within a library says so, and says what works."""

import importlib.util
import warnings

import numpy as np
import pytest
import torch
from example_cases import load
from torch import nn
from torch.nn import functional as F

import torch_feather as feather

pytestmark = pytest.mark.apps


def needs(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def test_fastais_own_optimizer_is_an_error_that_names_the_wrapper():
    needs("fastai")
    from fastai.optimizer import Adam

    model = nn.Linear(8, 8)
    with pytest.raises(feather.ConfigurationError, match=r"opt_func=partial\(OptimWrapper"):
        feather.sparsify(model, Adam(model.parameters(), lr=0.1), sparsity=0.5, total_steps=1)


def test_a_learner_that_creates_its_optimizer_again_is_an_error(tmp_path):
    needs("fastai")
    example = load("fastai_learner")
    learner, sparsifier = example.make_learner(tmp_path, 1)
    error = pytest.raises(feather.StateError, match="sparsify")
    with learner.no_bar(), learner.no_logging(), error:
        learner.fit(1, reset_opt=True)
    assert sparsifier.step_count == 0


def test_the_optimizers_of_keras_are_an_error_that_names_the_alternative():
    needs("keras")
    example = load("keras_model")
    model = example.make_model()
    optimizer = example.keras.optimizers.Adam()
    with pytest.raises(feather.ConfigurationError, match=r"torch\.optim optimizer.*train_step"):
        feather.sparsify(model, optimizer, sparsity=0.5, total_steps=1, include="*kernel")


def test_the_weights_of_keras_must_be_named_and_the_error_names_them():
    needs("keras")
    model = load("keras_model").make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        feather.ConfigurationError, match=r"To prune them too, pass include=.*kernel"
    ):
        feather.sparsify(model, optimizer, sparsity=0.5, total_steps=1)


def test_a_keras_fit_with_its_own_optimizer_ends_in_an_error_that_names_the_cause():
    needs("keras")
    example = load("keras_model")
    model = example.make_model()
    plain = example.keras.Model(model.inputs, model.outputs)
    plain.compile("adam", "mse")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    sparsifier = feather.sparsify(plain, optimizer, sparsity=0.5, total_steps=8, include="*kernel")
    plain.fit(np.zeros((4, 8, 8, 1), "float32"), np.zeros((4, 10)), verbose=0)
    with pytest.raises(feather.StateError, match="No step of the optimizer"):
        sparsifier.finalize()


def test_sparsify_before_skorchs_fit_ends_in_an_error_that_names_the_cause():
    needs("skorch")
    from skorch import NeuralNetClassifier

    net = NeuralNetClassifier(
        nn.Linear(4, 2), criterion=nn.CrossEntropyLoss, max_epochs=1, verbose=0, train_split=None
    ).initialize()
    sparsifier = feather.sparsify(net.module_, net.optimizer_, sparsity=0.5, total_steps=8)
    # `fit` creates the network again unless warm_start is set.
    net.set_params(module=nn.Linear, module__in_features=4, module__out_features=2)
    net.fit(np.zeros((8, 4), "float32"), np.arange(8) % 2)
    with pytest.raises(feather.StateError, match="create model or optimizer again"):
        sparsifier.finalize()


@pytest.mark.parametrize("head", [True, False])
def test_layers_of_torch_geometric_that_stay_dense_are_named_with_the_filter(head):
    needs("torch_geometric")
    example = load("geometric_graph")
    model = example.Graph()
    if not head:
        model.head = nn.Identity()
    optimizer = torch.optim.Adam(model.parameters())
    if head:
        with pytest.warns(feather.FeatherWarning, match=r"first\.lin\.weight.*include="):
            feather.sparsify(model, optimizer, sparsity=0.5, total_steps=1)
    else:
        with pytest.raises(feather.ConfigurationError, match=r"first\.lin\.weight.*include="):
            feather.sparsify(model, optimizer, sparsity=0.5, total_steps=1)


def test_torchrls_loss_module_is_an_error_as_its_weights_are_those_of_the_policy():
    needs("torchrl")
    from torchrl.modules import MLP, QValueActor
    from torchrl.objectives import DQNLoss

    network = MLP(in_features=4, out_features=2, num_cells=[8])
    policy = QValueActor(network, in_keys=["observation"], action_space="categorical")
    loss = DQNLoss(policy, action_space="categorical")
    optimizer = torch.optim.Adam(loss.parameters())
    with pytest.raises(feather.ConfigurationError, match="no prunable weights"):
        feather.sparsify(loss, optimizer, sparsity=0.5, total_steps=1)


def test_the_average_of_diffusers_is_dense_and_a_warning_names_the_alternative(tmp_path):
    needs("diffusers")
    from diffusers.training_utils import EMAModel

    example = load("diffusers_unet")
    model = example.small_unet()
    average = EMAModel(model.parameters(), decay=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.9, total_steps=6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            x = torch.randn(2, 1, 8, 8)
            F.mse_loss(model(x, 5).sample, x).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.step(model.parameters())
    (text,) = [str(one.message) for one in caught if "EMAModel" in str(one.message)]
    assert "LatentAverage" in text
    sparsifier.finalize()
    average.copy_to(model.parameters())
    model.save_pretrained(tmp_path)
    names = sparsifier.masks()
    delivered = example.UNet2DModel.from_pretrained(tmp_path)
    zeros = sum(int((delivered.get_parameter(name) == 0).sum()) for name in names)
    assert zeros < 0.9 * sum(mask.numel() for mask in names.values())


def test_merging_a_dense_adapter_fills_the_zeros_and_the_report_says_so():
    needs("peft")
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        model, optimizer, sparsity=0.9, total_steps=1, schedule="constant"
    )
    model(torch.randn(8, 32)).sum().backward()
    optimizer.step()
    sparsifier.finalize()
    before = feather.sparsity(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    assert feather.sparsity(adapted.get_base_model()) == before
    assert feather.sparsity(adapted.merge_and_unload()) < 0.2
