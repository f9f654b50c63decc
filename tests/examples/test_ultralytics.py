"""Ultralytics: what its trainer evaluates, saves and exports is sparse, and it resumes exactly."""

import copy

import pytest
import torch
from example_cases import load

import torch_feather as feather

pytestmark = pytest.mark.apps
pytest.importorskip("ultralytics")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("settings")))
        patch.setenv("YOLO_OFFLINE", "true")
        yield load("ultralytics_trainer")


def zeros(model: torch.nn.Module, names) -> int:
    return sum(int((model.get_parameter(name) == 0).sum()) for name in names)


def test_a_run_is_killed_resumed_evaluated_and_exported(example, tmp_path, killed_at):
    killed_at(example.SparseTrainer, "save_model", 3, lambda: example.train(tmp_path, 4))
    last = tmp_path / "run" / "weights" / "last.pt"
    stored = torch.load(last, weights_only=False)
    assert stored["epoch"] == 1

    begun = {}

    class Resumed(example.SparseTrainer):
        def resume_training(self, ckpt):
            super().resume_training(ckpt)
            state = {
                "step": self.sparsifier.step_count,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict()["state"],
                "ema": self.ema.state_dict(),
            }
            begun.update(copy.deepcopy(state))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "SparseTrainer", Resumed)
        trainer = example.train(tmp_path, 4, resume=True)

    exact = stored["sparse"]
    assert begun["step"] == 8  # two epochs of four batches
    assert all(torch.equal(v, begun["model"][name]) for name, v in exact["model"].items())
    for i, entries in exact["optimizer"]["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, begun["optimizer"][i][key]), key
    pairs = zip(exact["ema"]["average"]["latent"], begun["ema"]["average"]["latent"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    sparsifier = trainer.sparsifier
    assert sparsifier.step_count == sparsifier.total_steps == 16
    names = sparsifier.masks()
    expected = round(0.9 * sum(mask.numel() for mask in names.values()))
    assert zeros(trainer.model, names) == expected
    for file in (trainer.last, trainer.best):
        assert "sparse" not in torch.load(file, weights_only=False)
        assert zeros(example.YOLO(file).model, names) == expected
    assert not torch.equal(
        example.YOLO(last).model.state_dict()["model.0.conv.weight"],
        trainer.model.state_dict()["model.0.conv.weight"].half().float(),
    )  # the average, not the last weights

    model = example.YOLO(trainer.best)
    options = {"imgsz": 64, "device": "cpu"}
    metrics = model.val(data=trainer.args.data, plots=False, project=str(tmp_path), **options)
    assert 0 <= metrics.box.map50 <= 1
    exported = torch.jit.load(model.export(format="torchscript", **options))
    weights = [p for p in exported.parameters() if p.dim() == 4]
    kept = sum(int((p != 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    assert kept == pytest.approx(0.1, abs=0.02)  # one fixed layer of the head is dense


def test_the_own_average_of_ultralytics_is_not_sparse_and_a_warning_says_so(example, tmp_path):
    base = example.DetectionTrainer

    class Plain(example.SparseTrainer):
        def resume_training(self, ckpt):
            pass

        def save_model(self):
            return base.save_model(self)

        def _rewrite_last(self, change):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "SparseTrainer", Plain)
        with pytest.warns(feather.FeatherWarning, match=r"ModelEMA.*LatentAverage"):
            trainer = example.train(tmp_path, 2)
    names = trainer.sparsifier.masks()
    size = sum(mask.numel() for mask in names.values())
    # Its decay is small at first, so after eight steps only some thousand weights are revived.
    assert zeros(example.YOLO(trainer.last).model, names) < round(0.9 * size)
    assert zeros(trainer.model, names) == round(0.9 * size)


def test_the_batch_size_is_that_of_a_step(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example.DetectionTrainer, "train", lambda self: self._setup_train())
    build = example.SparseTrainer.build_optimizer

    def with_larger_steps(self, *args, **options):
        self.args.nbs = 64
        return build(self, *args, **options)

    monkeypatch.setattr(example.SparseTrainer, "build_optimizer", with_larger_steps)
    with pytest.raises(ValueError, match="nbs"):
        example.train(tmp_path, 1)


def test_the_example_runs(example, capsys):
    example.main(epochs=2)
    assert "90.00% of the weights are zero" in capsys.readouterr().out
