"""The benchmarks run and compute the numbers that they print; measured values are not tested."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_feather import available_methods

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# The interface of the official implementation with a minimal pruning method.
STAND_IN = """
import torch

class Pruner:
    def __init__(self, model, device, final_rate, nbatches, epochs):
        self.model, self.rate, self.step_idx, self.ends = model, final_rate, 0, 0
        self.weights = [
            m.weight for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
        ]
        self.prunable_weights_cnt = sum(w.numel() for w in self.weights)

    def update_thresh(self, end_of_batch=False):
        self.step_idx += not end_of_batch
        self.ends += end_of_batch

    @torch.no_grad()
    def desparsify(self):
        for w in self.weights:
            keep = w.abs() > w.abs().flatten().kthvalue(int(self.rate * w.numel())).values
            w.mul_(keep)
"""


@pytest.fixture
def step_overhead(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("step_overhead")


@pytest.fixture
def reference_accuracy(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return importlib.import_module("reference_accuracy")


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "official"
    folder.mkdir()
    (folder / "sparse_utils.py").write_text(STAND_IN)
    return folder


# Step overhead


def test_a_run_records_every_contestant(step_overhead, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_overhead.engine_cost, "CACHES", 1 << 16)
    monkeypatch.setattr(step_overhead.engine_cost, "REPEATS", 2)
    file = tmp_path / "results" / "overhead.json"
    command = "--network resnet8 --batch 2 --size 8 --steps 3 --threads 1 --theta 1 .5 --json"
    step_overhead.main([*command.split(), str(file)])
    record = json.loads(file.read_text())
    assert {"command", "date", "hardware", "versions", "commit", "settings", "runs"} <= set(record)
    (run,) = record["runs"]
    assert run["prunable"] == 318_816
    assert list(run["contestants"]) == ["dense", "control", "feather, θ 1", "feather, θ 0.5"]
    assert all(len(samples) == 3 for samples in run["samples_ms"].values())
    assert run["contestants"]["dense"]["ratio"] == 1.0
    for engine in run["engine"].values():
        assert set(engine["ms"]) == {"before", "after", "pull_back"}
        assert set(engine["parts_ms"]) == {"threshold", "effective_weights", "copy", "checks"}
        assert engine["memory"]["latent"] == engine["memory"]["weights"] == 4 * run["prunable"]
    printed = capsys.readouterr().out
    assert "a trial, not a measurement" in printed
    assert "feather, θ 0.5" in printed


@pytest.mark.slow
def test_every_method_is_measured_once(step_overhead, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_overhead.engine_cost, "CACHES", 1 << 16)
    monkeypatch.setattr(step_overhead.engine_cost, "REPEATS", 1)
    monkeypatch.setattr(step_overhead, "METHOD_LIMITS", {("resnet8", 2): 1.1})
    measure, ranges = step_overhead.engine_cost.measure, set()

    def measure_and_note(sparsifier, device):
        begin, total = sparsifier.step_count, sparsifier.total_steps
        row = measure(sparsifier, device)
        ranges.add((begin / total, sparsifier.step_count / total))
        return row

    monkeypatch.setattr(step_overhead.engine_cost, "measure", measure_and_note)
    file = tmp_path / "overhead.json"
    command = "--method all --network resnet8 --batch 2 --size 8 --steps 2 --threads 1 --json"
    step_overhead.main([*command.split(), str(file)])
    (run,) = json.loads(file.read_text())["runs"]
    names = [name.split(",")[0] for name in run["contestants"]]
    assert names == ["dense", "control", *available_methods()]
    assert set(run["engine"]) == set(run["contestants"]) - {"dense", "control"}
    kept = {
        name.split(",")[0]: round(row["memory"]["method"] / row["memory"]["weights"], 2)
        for name, row in run["engine"].items()
    }
    assert ranges == {(0.5, 0.75)}  # the earliest last phase begins at 0.8
    # probmask: probabilities, their two moments, the mask; spartan: the soft mask.
    assert kept == dict.fromkeys(available_methods(), 0) | {"probmask": 4, "spartan": 1}
    table = capsys.readouterr().out.split("engine ms\n")[-1].splitlines()
    assert len(table) == len(available_methods()) - 1  # feather has limits on other networks only


def test_limits(step_overhead):
    def limit(method, network, batch, theta, **options):
        arguments = step_overhead.parse([])
        vars(arguments).update(options)
        return step_overhead.limit(arguments, method, network, batch, theta)

    assert limit("feather", "resnet20", 128, 1.0) == 1.02
    assert limit("feather", "resnet20", 128, 0.5) is None
    assert limit("feather", "resnet8", 128, 1.0) is None
    assert limit("gmp", "resnet20", 128, None) == 1.1
    assert limit("spartan", "resnet20", 128, None) == 1.3
    assert limit("gmp", "resnet20", 16, None) is None
    assert limit("feather", "resnet20", 128, 1.0, device="cuda") == 1.10
    assert limit("feather", "resnet20", 128, 1.0, device="cuda", graph=True) == 1.04
    assert limit("feather", "timm/resnet50", 256, 1.0, device="cuda") == 1.01
    assert limit("gmp", "resnet20", 128, None, device="cuda") is None


@pytest.fixture
def small_suite(step_overhead, monkeypatch):
    """The suite with one network of each kind of input and small sizes."""
    suite, networks = step_overhead.step_suite, importlib.import_module("step_networks")
    image = networks.Network(networks.named("resnet8"), (4, 3, 8, 8), 2, networks.equal(1.5))
    text = networks.NETWORKS["transformer, 10 million, AdamW"]
    chosen = {"resnet8": image, "text": text._replace(shape=(2, 4))}
    for module in (suite, networks):
        monkeypatch.setattr(module, "NETWORKS", chosen)
    monkeypatch.setattr(suite, "QUICK_SIZES", (1000, 20_000))
    return suite


def test_the_suite_measures_networks_sizes_and_theta(
    step_overhead, small_suite, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "suite.json"
    command = ["--suite", "--quick", "--json", str(file)]
    facts = {"commit": "a", "versions": {}, "hardware": {"cpu": "b"}}
    monkeypatch.setattr(small_suite, "provenance", lambda _: facts)
    step_overhead.main(command)
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == [
        "resnet8", "text", "1,000 weights, 95%", "20,000 weights, 95%", "1,000 weights, 50%",
        "20,000 weights, 50%", "theta 0.5", "two threads",
    ]  # fmt: skip
    measured = importlib.import_module("step_turns").forms()
    assert list(parts["resnet8"]["contestants"]) == ["dense", "control", *measured]
    assert parts["resnet8"]["contestants"]["plain"]["limit"] == 1.5
    for part in list(parts.values())[2:-1]:
        assert list(part["added"]) == measured
    assert list(parts["two threads"]["gains"]) == ["copy", "dense", *measured]
    text = file.with_suffix(".txt").read_text()
    assert "is no measurement" in text
    assert "Controls outside of 1.00 ± 0.02: " in text
    assert file.with_suffix(".svg").read_text().startswith("<?xml")

    capsys.readouterr()
    removed = parts.pop("20,000 weights, 50%")
    record = json.loads(file.read_text()) | {"parts": parts}
    file.write_text(json.dumps(record))
    step_overhead.main(command)
    again = json.loads(file.read_text())["parts"]
    assert "7 completed parts are not repeated" in capsys.readouterr().out
    assert {name: again[name] for name in parts} == parts
    assert again["20,000 weights, 50%"]["weights"] == removed["weights"]
    record["commit"] = "c"
    assert small_suite.completed_parts(file, record) == {}  # of other code


def test_the_suite_measures_half_density_while_the_schedule_rises(step_overhead):
    turns = importlib.import_module("step_turns")
    sparse, optimizer = turns.contestants(turns.Weights(200_000), turns.sgd, 0.5)["plain"]
    zeros = []
    for _ in range(30):
        for p in sparse.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        zeros.append(sum(int((p == 0).sum()) for p in sparse.parameters()))
    assert zeros == sorted(zeros)
    assert zeros[-1] > zeros[0]
    assert zeros[0] / 200_000 == pytest.approx(0.5, abs=0.001)
    assert zeros[-1] / 200_000 == pytest.approx(0.5, abs=0.005)


def test_the_suite_tells_which_values_are_over_their_limits(step_overhead):
    suite = step_overhead.step_suite
    rows = {
        "control": {"ratio": 0.97, "limit": None},
        "plain": {"ratio": 1.03, "limit": 1.02},
        "compiled": {"ratio": 1.02, "limit": 1.02},
    }
    size = {"control": {"ratio": 1.02}, "added": {"plain": {"ns": 5.1, "limit": 5.0}}}
    gains = {"plain": {"ratio": 1.5, "aim": 1.6}, "compiled": {"ratio": 1.6, "aim": 1.6}}
    parts = {"a network": {"contestants": rows}, "a size": size, "threads": {"gains": gains}}
    over, below, controls = suite.verdicts({"parts": parts}).strip().splitlines()
    assert over == "Over their limit: a network, plain: 1.030 > 1.02; a size, plain: 5.100 > 5"
    assert below == "Below their aim: threads, plain: 1.50 < 1.6"
    assert controls == "Controls outside of 1.00 ± 0.02: a network: 0.970"
    assert suite.verdict(1.5, 1.5).strip() == "within 1.5"
    assert suite.verdict(1.51, 1.5).strip() == "OVER 1.5"


def test_the_suite_measures_a_part_again_only_while_its_control_shows_noise(step_overhead):
    suite = step_overhead.step_suite

    def part(control, plain):
        rows = {"control": {"ratio": control, "limit": None}}
        return {"contestants": rows, "added": {"plain": {"ns": plain, "limit": 5.0}}}

    attempts = iter([part(1.03, 1.0), part(0.99, 9.0), part(1.0, 1.0)])
    found = suite.measure_quietly(lambda: next(attempts), 3)
    assert found["added"]["plain"]["ns"] == 9.0  # over its limit, and not measured again
    assert found["discarded"] == [1.03]
    attempts = iter([part(1.05, 1.0), part(0.97, 2.0), part(1.04, 1.0)])
    found = suite.measure_quietly(lambda: next(attempts), 3)
    assert found["added"]["plain"]["ns"] == 2.0
    assert found["discarded"] == [1.05, 1.04]
    attempts = iter([{"gains": {}}])
    assert suite.measure_quietly(lambda: next(attempts), 3)["discarded"] == []


def test_commands_of_a_gpu_round_have_known_options(step_overhead, monkeypatch, tmp_path):
    round_ = importlib.import_module("gpu_round")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = argparse.Namespace(
        reference=None, data_path="DATA", out=tmp_path, runs=tmp_path, minutes=8, jobs=6
    )
    commands = {name: command for name, (_, command) in round_.parts(args, []).items()}
    for name in ("step_overhead", "step_graph", "resnet50"):
        found = step_overhead.parse(commands[name][1:])
        assert found.device == "cuda"
        assert not found.whole
        assert found.graph == (name == "step_graph")
        assert found.json == tmp_path / f"{name}.json"
    position = commands["recipe"].index("--system.cuda_graph")
    assert commands["recipe"][position + 1] == "true"


@pytest.mark.parametrize(
    "options", [["--graph"], ["--quick"], ["--suite", "--quick", "--reference=a"]]
)
def test_options_of_another_kind_of_run_are_errors(step_overhead, options):
    with pytest.raises(SystemExit):
        step_overhead.parse(options)


@pytest.mark.parametrize("at", ["end", "ramp"])
def test_all_contestants_start_equal_and_take_the_same_steps(step_overhead, checkout, at):
    command = f"--steps 4 --at {at} --reference {checkout}"
    arguments = step_overhead.parse(command.split())
    implementation = step_overhead.official.load_official(checkout)
    model, contestants = step_overhead.build(arguments, "resnet8", 2, implementation)
    assert list(contestants) == ["dense", "control", "feather, θ 1", "official"]
    for name in ("dense", "control", "official"):
        pairs = zip(model.parameters(), contestants[name].model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    latent = contestants["feather, θ 1"].sparsifier.latent_weights()
    assert all(torch.equal(w, model.get_parameter(name)) for name, w in latent.items())
    device = torch.device("cpu")
    step_overhead.time_steps(contestants, 4, (2, 3, 8, 8), device, False, seed=0)
    steps = step_overhead.WARMUP + 4
    assert contestants["feather, θ 1"].sparsifier.step_count == steps
    assert contestants["feather, θ 1"].sparsifier.sparsity == pytest.approx(0.95, abs=1e-5)
    # At the end its schedule starts in the half that is at the final sparsity.
    pruner = contestants["official"].before_forward.__self__
    assert pruner.step_idx == (2 * steps if at == "end" else steps)


def test_ratios_are_within_repetitions_where_common_noise_cancels_out(step_overhead):
    dense = np.random.default_rng(0).lognormal(3, 1, 41)
    compared = step_overhead.compare({"dense": dense.tolist(), "twice": (2 * dense).tolist()}, 0)
    assert compared["twice"]["ratio"] == pytest.approx(2)
    assert compared["twice"]["interval"] == pytest.approx([2, 2])
    assert compared["dense"]["median_ms"] == pytest.approx(sorted(dense)[20])


def test_ratios_above_their_limit_are_marked(step_overhead):
    row = {"ratio": 1.04, "limit": 1.03}
    rows = {"dense": {"ratio": 1.0, "limit": None}, "control": {"ratio": 1.01, "limit": None}}
    result = {
        "network": "resnet20",
        "batch": 128,
        "contestants": rows | {"feather, θ 1": row, "feather, θ 0.5": row | {"limit": 1.05}},
        "engine": {name: {"sum_ms": 2.5} for name in ("feather, θ 1", "feather, θ 0.5")},
    }
    _, over, within = step_overhead.limits_table([result]).strip().splitlines()
    assert "OVER" in over
    assert "within" in within


def test_recorded_commands_have_no_paths_of_this_machine(step_overhead):
    command = step_overhead.official.recorded_command(
        ["--reference", "/a/b", "--data-path=/b", "--json", "results/b"],
        {"/a/b": "OFFICIAL", "/b": "DATA"},
    )
    assert command.endswith("--reference OFFICIAL --data-path=DATA --json results/b")


def test_a_checkout_without_the_official_code_is_an_error(step_overhead, tmp_path):
    with pytest.raises(SystemExit, match=r"no sparse_utils\.py"):
        step_overhead.main(["--reference", str(tmp_path)])


def test_options_of_version_0_1_are_deprecated(step_overhead):
    with pytest.warns(DeprecationWarning, match="--peer is deprecated; use --reference"):
        assert step_overhead.parse(["--peer=a"]).reference == Path("a")
    with pytest.warns(DeprecationWarning, match="--peer is deprecated; use --reference"):
        assert step_overhead.parse(["--batch", "2", "--peer", "a"]).reference == Path("a")


# Accuracy of the official implementation


def row(who, seed, accuracy, sparsity=0.98, **changes):
    return {
        "implementation": who,
        "sparsity": sparsity,
        "seed": seed,
        "test_accuracy": accuracy,
        "train_loss": 1.5,
        "weights": 1000,
        "zeros": 980 if who == "ours" else 979,
        "seconds": 1.0,
        "peer_commit": None if who == "ours" else "b" * 40,
        "settings": {
            "network": "resnet8",
            "recipe": "digits",
            "epochs": 1,
            "data": {"name": "digits"},
        },
        "commit": "a" * 40,
        "versions": {"torch": "2"},
        "hardware": {"cpu": "a CPU", "threads": 1},
    } | changes


PAIRS = [
    *(row("ours", seed, value) for seed, value in enumerate([0.36, 0.37, 0.38])),
    *(row("official", seed, value) for seed, value in enumerate([0.35, 0.37, 0.36])),
]


def test_means_and_deviations_over_seeds(reference_accuracy):
    (entry,) = reference_accuracy.aggregate(PAIRS)
    assert entry["n"] == 3
    assert entry["ours"] == {
        "mean": pytest.approx(37),
        "deviation": pytest.approx(1),
        "zeros": [980],
    }
    assert entry["official"]["mean"] == pytest.approx(36)
    assert entry["difference"] == pytest.approx(1)
    # Differences 1, 0 and 2: 1 -+ 4.3027 / sqrt(3), at 2 degrees of freedom.
    assert entry["interval"] == pytest.approx([1 - 2.4841, 1 + 2.4841], abs=1e-3)


def test_only_seeds_of_both_implementations_are_averaged(reference_accuracy):
    rows = [*PAIRS, row("ours", 3, 0.99), row("ours", 0, 0.5, sparsity=0.95)]
    (entry,) = reference_accuracy.aggregate(rows)
    assert entry["seeds"] == [0, 1, 2]
    assert entry["ours"]["mean"] == pytest.approx(37)


@pytest.mark.parametrize("rows", [PAIRS[::3], [row("ours", 0, 0.5), row("official", 0, 0.5)]])
def test_one_pair_has_a_difference_without_an_interval(reference_accuracy, rows):
    (entry,) = reference_accuracy.aggregate(rows)
    assert entry["ours"]["deviation"] is None
    assert entry["interval"] is None


def test_the_table_shows_every_seed_and_missing_runs(reference_accuracy):
    text = reference_accuracy.table([*PAIRS, row("ours", 7, 0.4)], "python it")
    assert "| 98% | 37.00 ± 1.00 | 36.00 ± 1.00 | +1.00 (−1.48 to +3.48) | 3 | 980 | 979 |" in text
    assert "| 98% | 2 | 38.00 | 36.00 | +2.00 | 1.5000 | 1.5000 |" in text
    assert "| 98% | 7 | 40.00 |  |  | 1.5000 |  |" in text
    assert "bbbbbbbbbb" in text


DIGITS = ["--recipe", "digits", "--data", "digits", "--epochs", "2", "--sparsity", ".5"]


def test_both_implementations_use_the_same_trainer(reference_accuracy, checkout, monkeypatch):
    arguments = reference_accuracy.parse(
        [*DIGITS, "--reference", str(checkout), "--set", "batch_size=512"]
    )
    config = reference_accuracy.configuration(arguments, 0.5, seed=0)
    found = []

    class Watched(reference_accuracy.OfficialTask):
        def finish(self, run):
            found.append(self.pruner)
            return super().finish(run)

    monkeypatch.setattr(reference_accuracy, "OfficialTask", Watched)
    monkeypatch.setitem(
        sys.modules, "torch_feather.analysis.plots", None
    )  # plots take most of the time
    official = reference_accuracy.run("official", config, checkout)
    own = reference_accuracy.run("ours", config, checkout)
    (pruner,) = found
    assert pruner.step_idx == 2 * 3  # each step of two epochs of three batches
    assert pruner.ends == 2
    assert set(official) == set(own)
    assert official["settings"] == own["settings"]
    assert official["weights"] == own["weights"]
    assert official["zeros"] == pytest.approx(0.5 * official["weights"], rel=1e-3)
    # The stand-in trains dense weights; the copy that is measured after an epoch is sparse.
    assert official["curve"]["sparsity"] == pytest.approx([0.5, 0.5], abs=1e-3)


def test_completed_runs_are_read_and_not_repeated(reference_accuracy, checkout, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [*DIGITS, "--reference", str(checkout), "--seeds", "0", "--out", str(out)]
    config = reference_accuracy.configuration(reference_accuracy.parse(arguments), 0.5, seed=0)
    out.mkdir()
    for who in ("ours", "official"):
        done = row(who, 0, 0.4, sparsity=0.5, settings=reference_accuracy.settings(config))
        reference_accuracy.file_of(out, who, config).write_text(json.dumps(done))
    reference_accuracy.main(arguments)
    assert "2 completed runs found, 0 to train" in capsys.readouterr().out
    assert "| 50% | 40.00 | 40.00 | +0.00 | 1 |" in (out / "table.md").read_text()
    (entry,) = json.loads((out / "summary.json").read_text())
    assert entry["n"] == 1
    with pytest.raises(SystemExit, match="other settings"):
        reference_accuracy.main([*arguments, "--set", "optimizer.lr=0.2"])


def test_the_table_of_optimizers_tells_working_ones_from_others(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    table = importlib.import_module("optimizer_table")

    class Careless(torch.optim.SGD):
        """Changes a weight once, so that it differs from what autograd trains."""

        def step(self, closure=None):
            super().step(closure)
            model.append(0)
            if len(model) == 2 * table.STEPS:  # after the dense run
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1.0)

    model = []
    wrong = table.Case("torch", "Careless", lambda net: Careless(net.parameters(), lr=0.1))
    right = next(case for case in table.cases() if case.name == "SGD")
    late = next(case for case in table.cases() if case.name == "ScheduleFreeAdamW")
    monkeypatch.setattr(table, "cases", lambda: iter([right, wrong, late]))
    table.main(["--out", str(tmp_path)])
    rows = json.loads((tmp_path / "outcomes.json").read_text())["outcomes"]
    assert [row["trains"] for row in rows] == ["yes", "no", "refused"]
    assert rows[0]["resumes"] == rows[0]["copies"] == "yes"
    assert "other weights than the reference" in rows[1]["note"]
    assert "ScheduleFreeAdamW writes parameters" in rows[2]["note"]
    assert "| torch | `SGD` | yes | yes | yes |" in (tmp_path / "table.md").read_text()
    capsys.readouterr()
    table.main(["--out", str(tmp_path)])
    assert "SGD " not in capsys.readouterr().out  # completed ones are not repeated


def test_formats_are_judged_by_the_bytes_of_their_files(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    formats = importlib.import_module("formats")
    nonzero = torch.arange(1.0, 401)
    weight = nonzero * (torch.arange(400) % 4 == 0)
    for shift in range(4):  # a file need not align its tensors
        content = b"x" * shift + weight.numpy().tobytes()
        assert formats.zero_words(content) == 300
        assert formats.described(0, content, [weight]) == ("dense", 1.0)
    kept = weight[weight != 0].numpy().tobytes()
    assert formats.described(0, kept, [weight]) == ("unknown", 0.0)
    assert formats.described(3, kept, [weight]) == ("3 sparse tensors", 0.0)
    assert formats.described(0, nonzero.numpy().tobytes(), [nonzero]) == ("dense", None)
    assert formats.described(0, nonzero.half().numpy().tobytes(), [nonzero]) == ("unknown", None)

    model = torch.nn.Linear(20, 20).eval()
    with torch.no_grad():
        model.weight[::2] = 0.0
    assert formats.exported_program(model, torch.zeros(1, 20), tmp_path / "network") == 0
    content = (tmp_path / "network.pt2").read_bytes()
    assert formats.described(0, content, [model.weight])[0] == "dense"


def test_the_zoo_compares_pruned_networks_with_dense_systems(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    zoo = importlib.import_module("inference_zoo")

    def create(name):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d
        return torch.nn.Sequential(conv(3, 8, 3), torch.nn.SiLU(), conv(8, 8, 3)).eval(), (
            torch.randn(1, 3, 12, 12)
        )

    monkeypatch.setattr(zoo, "create", create)
    monkeypatch.setattr(
        zoo, "dense_systems", lambda model, x, **_: {"PyTorch": model, "onnxruntime": model}
    )
    row = zoo.measure("small", "mobile", [0.5, 0.95])
    assert set(row["dense_ms"]) == {"PyTorch", "onnxruntime"}
    for found in row["sparse"].values():
        assert found["error"] < 1e-5
        assert found["ms"] > 0
        assert found["layers"] == 2
        assert not found["empty"]
        assert sum(found["parts"].values()) == pytest.approx(1)
        assert "3x3" in found["parts"]
    row["dense_ms"] = {"PyTorch": 9.0, "onnxruntime": 3.0, "OpenVINO f32": 4.0}
    parts = {"3x3": 0.9, "copies": 0.06, "pooling": 0.03, "linear": 0.01}
    row["sparse"]["0.95"] |= {"ms": 2.5, "in_pytorch": "sort", "parts": parts}
    assert zoo.best_dense(row) == 3.0
    (line,) = zoo.below_goal(row, 3.0)
    assert line.startswith("below 1.5x at 95%")
    assert line.endswith("in PyTorch: sort; time: 3x3 90%, copies 6%, pooling 3%")
    del row["sparse"]["0.95"]["parts"]
    assert zoo.below_goal(row, 3.0)[0].endswith("in PyTorch: sort")  # a row of before
    assert "95%: 2.50 (1.20x)" in zoo.table([row])

    several = zoo.measure("small", "mobile", [0.95], batch=2)
    found = several["sparse"]["0.95"]
    assert all(found[form] > 0 for form in ("ms", "one_image_ms", "whole_ms"))
    found |= {"ms": 2.5, "one_image_ms": 2.4, "whole_ms": 5.0}
    assert "95%: 2.50 (1.20x) [2.40, 5.00]" in zoo.table([several | {"dense_ms": row["dense_ms"]}])
    assert zoo.below_goal(several, 3.0) == []


def test_kept_multiply_adds_are_counted_per_layer(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    kept = importlib.import_module("kept_multiply_adds")
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, bias=False), torch.nn.Flatten())
    model.append(torch.nn.Linear(8, 5, bias=False))
    with torch.no_grad():
        model[2].weight[:, 2:] = 0.0  # a quarter of 40 is kept; of the convolution, all 18
    monkeypatch.setattr(kept, "create", lambda _: (model, torch.ones(1, 1, 4, 4)))
    monkeypatch.setattr(kept, "pruned", lambda *_: (model, []))
    row = kept.measure("small", 0.8)
    assert row["dense"] == 4 * 18 + 40
    assert row["kept"] == 4 * 18 + 10
    assert row["in_dense_layers"] == 4 * 18
    assert kept.table([row]).endswith("73.2%                64.3%")


def test_the_zoo_times_other_engines_on_the_pruned_weights(monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.syspath_prepend(BENCHMARKS)
    zoo = importlib.import_module("inference_zoo")

    def create(name):
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(3, 64, 3), torch.nn.Flatten(), torch.nn.Linear(64, 16)
        return torch.nn.Sequential(*layers).eval(), torch.randn(1, 3, 3, 3)

    monkeypatch.setattr(zoo, "create", create)
    monkeypatch.setattr(zoo, "dense_systems", lambda model, x, **_: {"PyTorch": model})
    row = zoo.measure("small", "mobile", [0.9], pruned_engines=True)
    assert row["pruned_ms"]["0.9"]["onnxruntime, sparse"] > 0
    assert set(row["sparse"]["0.9"]) >= {"ms", "parts"}
    assert "weights of 90%: onnxruntime, sparse 0." in zoo.table([row])
    model, x = zoo.pruned("small", 0.9)[0], create("small")[1]
    run = zoo.engines_on_pruned_weights(model, x, threads=1)["onnxruntime, sparse"]
    torch.testing.assert_close(torch.tensor(run(x)[0]), model(x), rtol=1e-4, atol=1e-5)


def test_batches_of_the_zoo_have_files_of_their_own(monkeypatch, tmp_path, capsys):
    """Networks of a file with another batch would not be measured, and its heading would change."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    zoo = importlib.import_module("inference_zoo")
    name, measured = next(iter(zoo.NETWORKS["mobile"])), []

    def measure(name, kind, sparsities, narrow, batch, pruned_engines):
        measured.append(batch)
        found = {"ms": 1.0, "compile_s": 1.0, "error": 0.0, "empty": [], "in_pytorch": ""}
        row = {"network": name, "kind": kind, "batch": batch, "dense_ms": {"PyTorch": 9.0}}
        return row | {"sparse": {"0.95": found}}

    monkeypatch.setattr(zoo, "measure", measure)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    for batch in (1, 8, 8):  # the second time it is there
        command = ["", "--zoo", "--networks", name, "--batch", str(batch)]
        monkeypatch.setattr("sys.argv", command)
        zoo.main()
    assert measured == [1, 8]
    files = ["inference_zoo.json", "inference_zoo_batch8.json"]
    found = [json.loads((tmp_path / "results" / file).read_text())["rows"] for file in files]
    assert [row["batch"] for rows in found for row in rows] == [1, 8]
    monkeypatch.setattr("sys.argv", [*command, "--json", "results/inference_zoo.json"])
    with pytest.raises(SystemExit):
        zoo.main()
    assert "inference_zoo.json has another batch" in capsys.readouterr().err


def test_compile_times_come_from_processes_that_have_not_compiled(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    zoo = importlib.import_module("inference_zoo")
    times = iter(
        [
            *("2.0", "4.0", "3.0", "null", "0.2", "0.3", "0.1", "[30, 60]"),
            *("1.5", "1.5", "1.5", "null", "0.1", "0.1", "0.1", "[15, 60]"),
        ]
    )
    commands = []

    def run(command, **_):
        commands.append(command[-1])
        return subprocess.CompletedProcess(command, 0, f"a line\n{next(times)}\n")

    monkeypatch.setattr(zoo.subprocess, "run", run)
    monkeypatch.setattr(zoo.os, "access", lambda *_: True)
    row = zoo.compile_row("resnet18", [0.9, 0.95], repeats=3)
    assert row["compile_s"] == {"0.9": [2.0, 4.0, 3.0], "0.95": [1.5, 1.5, 1.5]}
    assert row["load_s"] == {"0.9": [0.2, 0.3, 0.1], "0.95": [0.1, 0.1, 0.1]}
    assert row["peak_mb"] == {"0.9": 30, "0.95": 15}
    functions = [c.split("z.")[1].split("(")[0] for c in commands[:8]]
    assert functions == [
        *["compile_seconds"] * 3,
        *("save_network", *["load_seconds"] * 3, "compile_memory"),
    ]
    assert commands[0].endswith("compile_seconds('resnet18', 0.9)))")
    table = zoo.compile_table([row])
    assert "90%: 3.00 s (2.00 to 4.00), load 0.20 s (to 0.30), 30 MB (0.50 x weights); " in table
    assert "95%: 1.50 s (1.50" in table


def test_the_report_of_pages_counts_networks_that_reach_the_aim(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    web = importlib.import_module("web")
    files = ("model.wasm", "dense.onnx", web.ENGINE)
    sizes = {file: {"bytes": 1000, "gzip": 10} for file in files}
    row = {"network": "a", "sparsity": 0.95, "sparse": [1.0, 2.0, 3.0], "dense": [8.0] * 3}
    row |= {"ratio": 4.0, "error": 1e-7, "sizes": sizes, "load_average": 1.0, "version": "1"}
    rows = [row, row | {"ratio": 1.9}, row | {"sparsity": 0.0, "ratio": 9.0}]
    facts = {"command": "", "commit": "", "chromium": "1", "rounds": 3}
    facts |= {"versions": {"torch": "2"}, "hardware": {"cpu": "CPU"}}
    text = web.report(rows, facts)
    assert "Reached by 1 of 2 networks" in text
    assert "| a | 95.0% | 2 (1 to 3) | 8 (8 to 8) | 4.0× | 1e-07 |" in text


def test_native_libraries_are_timed_in_turn_with_the_compiled_network(monkeypatch):
    pytest.importorskip("llvmlite")
    monkeypatch.syspath_prepend(BENCHMARKS)
    speed = importlib.import_module("native_speed")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight[:, 1:] = 0.0
    monkeypatch.setattr(speed, "create", lambda _: (model, torch.randn(1, 3, 9, 9)))
    monkeypatch.setattr(speed, "pruned", lambda *_: (model, []))
    try:
        row = speed.measure("small")
    except OSError:
        pytest.skip("no linker for libmodel.so")
    assert row["error"] < 1e-5
    times = row["compiled_ms"], row["library_ms"], row["library_with_measured_tiles_ms"]
    assert all(time > 0 for time in times)
    row |= {"compiled_ms": 1.0, "library_ms": 2.0, "library_with_measured_tiles_ms": 3.0}
    assert "1.00 ms   2.00 ms         3.00 ms" in speed.table([row])
