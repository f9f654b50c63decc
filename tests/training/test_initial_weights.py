"""`--init` and `--pretrained` for networks with another head."""

import os
import subprocess
import sys
from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from torch_feather import models
from torch_feather.cli import main
from torch_feather.errors import ConfigurationError
from torch_feather.training.config import PRETRAINED
from torch_feather.training.initial_weights import initialize

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def publish(hub, name, state):
    """Put weights where the client of the hub stores downloads."""
    repository = models.published_settings(f"timm/{name}")["hf_hub_id"]
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    save_file(state, snapshot / "model.safetensors")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


@pytest.fixture(scope="module")
def published():
    """Stands for the published network: 1,000 classes and weights of its own."""
    torch.manual_seed(3)
    return timm.create_model("resnet18").state_dict()


@pytest.fixture
def hub(tmp_path, monkeypatch, published):
    import huggingface_hub.constants as constants

    folder = tmp_path / "hub"
    publish(folder, "resnet18", published)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def bodies_agree(model, given, prefix=""):
    state = model.state_dict()
    names = [name for name in state if not name.startswith("fc.")]
    return all(torch.equal(state[name], given[prefix + name]) for name in names)


def test_pretrained_loads_timms_weights_and_replaces_the_head(hub, published):
    torch.manual_seed(0)
    model = models.create("timm/resnet18", num_classes=3)
    head = model.fc.weight.clone()
    before = torch.get_rng_state()
    notes = initialize(model, PRETRAINED, "timm/resnet18")
    assert torch.equal(before, torch.get_rng_state())
    assert bodies_agree(model, published)
    assert torch.equal(model.fc.weight, head)
    assert notes == [
        "timm's weights of resnet18: its head (fc) has 1,000 outputs, this run 3 classes. "
        "The head starts anew."
    ]


def test_pretrained_keeps_a_head_of_the_same_size(hub, published):
    model = models.create("timm/resnet18", num_classes=1000)
    assert initialize(model, PRETRAINED, "timm/resnet18") == []
    assert torch.equal(model.fc.weight, published["fc.weight"])


def test_pretrained_converts_the_first_layer_to_grey_images(hub, published):
    model = models.create("timm/resnet18", num_classes=3, in_channels=1)
    notes = initialize(model, PRETRAINED, "timm/resnet18")
    assert len(notes) == 1  # the head
    expected = published["conv1.weight"].sum(1, keepdim=True)  # a grey image as three channels
    torch.testing.assert_close(model.conv1.weight.detach(), expected)


def test_pretrained_weights_that_cannot_be_had_are_an_error_that_names_init(hub):
    model = models.create("timm/resnet34", num_classes=3)
    with pytest.raises(ConfigurationError, match=r"weights of resnet34 cannot be loaded.*--init"):
        initialize(model, PRETRAINED, "timm/resnet34")
    with pytest.raises(ConfigurationError, match=r"networks of timm.*not for 'resnet8'.*--init"):
        initialize(models.create("resnet8", 3), PRETRAINED, "resnet8")
    model = models.create("timm/resnet10t", num_classes=3)
    with pytest.raises(ConfigurationError, match=r"no published weights of 'resnet10t\.none'"):
        initialize(model, PRETRAINED, "timm/resnet10t.none")


def torchvisions(state):
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.resnet18()
    network.load_state_dict(state)
    return network.state_dict()


FORMS = {
    "timm.safetensors": lambda state: state,
    "timm.pt": lambda state: state,
    "torchvision.pth": torchvisions,
    "parallel.pt": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "lightning.pt": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
    "tutorial.pt": lambda state: {"model_state_dict": state, "epoch": 3},
    "compiled.pt": lambda state: {
        "model": {f"module._orig_mod.{k}": v for k, v in state.items()},
    },
    "average.pt": lambda state: {
        "state_dict": {f"model.{k}": v for k, v in state.items()}
        | {f"average.{k}": v + 1 for k, v in state.items()}
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_file_gives_the_same_network(form, published, tmp_path):
    content, path = FORMS[form](published), tmp_path / form
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    model = models.create("timm/resnet18", num_classes=3)
    notes = initialize(model, str(path), "timm/resnet18")
    assert bodies_agree(model, published)
    assert notes[0].startswith(f"{form}: its head (fc) has 1,000 outputs, this run 3 classes")
    assert len(notes) == (2 if form == "average.pt" else 1)


def test_a_wrapped_network_of_the_same_classes_is_loaded_completely(published, tmp_path):
    torch.save({f"module.{name}": t for name, t in published.items()}, tmp_path / "ddp.pt")
    model = models.create("timm/resnet18", num_classes=1000)
    assert initialize(model, str(tmp_path / "ddp.pt"), "timm/resnet18") == []
    assert torch.equal(model.fc.weight, published["fc.weight"])


def test_weights_beyond_the_range_of_the_network_are_an_error(published, tmp_path):
    wide = {name: t.double() for name, t in published.items()}
    wide["conv1.weight"][0, 0, 0, 0] = 1e300
    torch.save(wide, tmp_path / "wide.pt")
    with pytest.raises(ConfigurationError, match=r"conv1\.weight has"):
        initialize(models.create("timm/resnet18", 1000), str(tmp_path / "wide.pt"), "timm/resnet18")


def test_what_does_not_fit_is_listed(published, tmp_path):
    other = dict(published) | {"extra.weight": torch.zeros(2)}
    del other["layer4.1.bn2.bias"]
    other["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(other, tmp_path / "other.pt")
    model = models.create("timm/resnet18", num_classes=1000)
    before = model.conv1.weight.clone()
    notes = initialize(model, str(tmp_path / "other.pt"), "timm/resnet18")
    assert notes == [
        "other.pt: of another shape and not loaded: conv1.weight ([64, 3, 3, 3] in the file, "
        "[64, 3, 7, 7] in the network)",
        "other.pt: not in the file, so these keep their initial values: layer4.1.bn2.bias",
        "other.pt: not in the network and not loaded: extra.weight",
    ]
    assert torch.equal(model.conv1.weight, before)
    assert torch.equal(model.fc.weight, published["fc.weight"])


def test_another_network_is_an_error_and_changes_nothing(published, tmp_path):
    torch.save(published, tmp_path / "resnet18.pt")
    for name in ("resnet8", "timm/resnet50"):
        model = models.create(name, 3)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(ConfigurationError, match=r"resnet18.pt do not fit ResNet.*trains"):
            initialize(model, str(tmp_path / "resnet18.pt"), name)
        assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def test_the_head_of_own_networks_and_of_two_heads_is_replaced(tmp_path):
    for name in (
        "resnet8",
        "mobilenet_v1",
        "densenet40_24",
        "timm/deit_tiny_distilled_patch16_224",
    ):
        source = models.create(name, 7)
        torch.save(source.state_dict(), tmp_path / "seven.pt")
        model = models.create(name, 3)
        (note,) = initialize(model, str(tmp_path / "seven.pt"), name)
        assert "has 7 outputs, this run 3 classes" in note
        heads = [k for k, t in model.state_dict().items() if t.shape[:1] == (3,) and t.dim() < 3]
        assert len(heads) == (4 if "distilled" in name else 2)
        stored = source.state_dict()
        assert all(
            torch.equal(t, stored[k]) for k, t in model.state_dict().items() if k not in heads
        )


def test_a_position_embedding_of_another_image_size_is_interpolated(tmp_path):
    source = timm.create_model("test_vit", num_classes=3, img_size=64)
    torch.save(source.state_dict(), tmp_path / "vit.pt")
    model = timm.create_model("test_vit", num_classes=3, img_size=96)
    assert initialize(model, str(tmp_path / "vit.pt"), "timm/test_vit") == []
    assert not torch.equal(model.pos_embed, timm.create_model("test_vit", img_size=96).pos_embed)
    assert torch.equal(model.head.weight, source.head.weight)


def test_a_file_with_more_than_tensors_is_an_error(tmp_path):
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "args": Namespace()}, tmp_path / "x.pt")
    with pytest.raises(Exception, match="holds more than tensors"):
        initialize(models.create("resnet8", 3), str(tmp_path / "x.pt"), "resnet8")


def test_pretrained_and_init_exclude_each_other(monkeypatch, capsys):
    arguments = ["feather", "train", "--pretrained", "--init", "x.pt"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "both name initial weights" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_command_says_in_one_line_that_the_head_is_replaced(hub, tmp_path):
    arguments = ["--pretrained", "--network", "timm/resnet18", "--data", "digits", "--epochs", "1",
                 "--batch-size", "512", "--no-compare-dense",
                 "--system.threads", "1"]  # fmt: skip
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch_feather.cli", "train", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("its head (fc) has 1,000 outputs" in line for line in lines) == 1
