import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import torch_feather as feather
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config
from torch_feather.training.console import ConsoleCallback, Pace, layer_table, percent


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.0, "0.00 %"),
        (1e-9, "0.01 %"),
        (0.95, "95.00 %"),
        (291_384 / 306_720, "95.00 %"),
        (0.99996, "99.99 %"),
        (1.0, "100.00 %"),
    ],
)
def test_a_fraction_is_shown_as_0_or_100_percent_only_if_it_is_exact(fraction, text):
    assert percent(fraction) == text


@pytest.mark.parametrize("thresholds", [None, {"0.weight": 1.234567e-5, "2.weight": 0.25}])
@pytest.mark.parametrize("example", [None, torch.zeros(1, 6)])
@pytest.mark.parametrize("own", [None, 0.25])
def test_the_table_of_a_stored_report_equals_that_of_the_report(thresholds, example, own):
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3), torch.nn.Linear(3, 2)
    )
    with torch.no_grad():
        model[0].weight[0] = 0
        model[2].weight.zero_()
    report = feather.report(model, example_input=example, thresholds=thresholds)
    report = replace(report, learned_sparsity=own)
    stream = io.StringIO()
    console = Console(file=stream, width=30)  # narrower than the table: lines are not wrapped
    console.print(layer_table(report.to_dict()), soft_wrap=True)
    assert stream.getvalue() == f"{report}\n"
    assert "<-- EMPTY" in stream.getvalue()


def test_empty_layers_stand_out_in_a_terminal():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.zero_()
    text = layer_table(feather.report(model).to_dict())
    red = [text.plain[span.start : span.end] for span in text.spans if "red" in str(span.style)]
    assert len(red) == 1
    assert red[0].startswith("1.weight")
    assert red[0].endswith("<-- EMPTY")


class Clock:
    """A clock that the test advances."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


class Run:
    """A run of ten epochs of 100 steps with a console callback, on its own clock."""

    def __init__(self, **options):
        self.clock, self.stream = Clock(), io.StringIO()
        console = Console(file=self.stream, width=120, _environ={"TERM": "xterm"}, **options)
        self.callback = ConsoleCallback(console, self.clock)

    def begin(self, done=0, method="feather", epochs=10):
        config = Config(method=method, epochs=epochs)
        self.callback.begin(config, 100 * epochs, done, RunDirectory("run"))

    def steps(self, number, seconds):
        for _ in range(number):
            self.clock.pass_by(seconds)
            self.callback.step(8)

    def epoch(self, number, images_per_s, **metrics):
        line = {"epoch": number, "train_loss": 1.25, "val_acc": 0.5, "sparsity": 0.75}
        self.callback.epoch(line | {"images_per_s": images_per_s} | metrics)

    def lines(self):
        return self.stream.getvalue().splitlines()

    def bar(self, number):
        return self.callback.progress.tasks[number]


def test_the_rate_is_that_of_recent_steps():
    pace = Pace(clock := Clock())
    for seconds in [0.1] * 1000 + [0.01] * 4000:
        clock.pass_by(seconds)
        pace.step(8)
    assert pace.rates() == pytest.approx((100, 800), rel=0.01)


def test_slow_steps_have_a_rate():
    pace = Pace(clock := Clock())
    for _ in range(3):
        clock.pass_by(2 * Pace.WINDOW)
        pace.step(8)
    assert pace.rates() == pytest.approx((1 / 60, 8 / 60))


def test_evaluation_adds_to_the_time_left_and_not_to_the_rate():
    pace = Pace(clock := Clock())
    for _ in range(3):
        for _ in range(100):
            clock.pass_by(0.05)
            pace.step(8)
        clock.pass_by(20)
        pace.end_epoch(images_per_s=160)
    assert pace.rates() == pytest.approx((20, 160))
    assert pace.seconds_left(steps=100) == pytest.approx(5)
    assert pace.seconds_left(steps=100, epoch_ends=1) == pytest.approx(25)


def test_steps_queued_on_the_device_do_not_count_as_done():
    pace = Pace(clock := Clock())
    for _ in range(5):
        for _ in range(100):  # queued in a tenth of their duration
            clock.pass_by(0.01)
            pace.step(8)
        clock.pass_by(9)
        pace.end_epoch(images_per_s=80)
        assert pace.rates() == pytest.approx((10, 80))
        assert pace.seconds_left(100, epoch_ends=1) == pytest.approx(10)


def test_there_is_no_rate_before_the_first_sample():
    pace = Pace(Clock())
    pace.end_epoch(images_per_s=0.0)  # a run resumed between an epoch's last step and its end
    assert pace.rates() is None
    assert pace.seconds_left(10) is None


def test_a_resumed_run_is_estimated_from_its_own_steps():
    run = Run(force_terminal=True)
    run.begin(done=930)
    run.steps(10, 2)
    assert run.bar(0).fields["left"] == "0:02:00 left"  # 60 steps of 2 seconds
    assert run.bar(1).fields["left"] == "0:02:00 left"
    assert (run.bar(1).description, run.bar(1).completed) == ("epoch 10", 40)
    assert run.bar(0).completed == pytest.approx(9.4)
    run.callback.end()


def test_a_second_run_starts_from_zero():
    run = Run()
    for method, seconds in (("feather", 1), ("dense", 0.5)):
        run.begin(method=method)
        run.steps(100, seconds)
        run.epoch(1, 8 / seconds)
        run.callback.end({"test_accuracy": 0.5})
    assert [line.split("  ")[-2:] for line in run.lines()] == [
        ["8 images/s", "0:15:00 left"],
        ["16 images/s", "0:07:30 left"],
    ]


def test_without_a_terminal_each_epoch_is_a_line():
    run = Run()
    run.callback.message("a [bold] word")
    run.begin(epochs=3)
    for number in (1, 2, 3):
        run.steps(100, 0.004)
        run.epoch(number, 2000, val_acc=None if number == 1 else 0.5)
    run.callback.end()
    assert run.lines() == [
        "a [bold] word",
        "feather  epoch 1/3  loss 1.250  sparsity 75.00 %  2,000 images/s  0:00:01 left",
        "feather  epoch 2/3  loss 1.250  val 50.00 %  sparsity 75.00 %"
        "  2,000 images/s  0:00:00 left",
        "feather  epoch 3/3  loss 1.250  val 50.00 %  sparsity 75.00 %"
        "  2,000 images/s  0:00:00 left",
    ]


def test_test_accuracy_is_shown_without_validation_images():
    run = Run()
    run.begin()
    run.steps(100, 0.01)
    run.epoch(1, 800, val_acc=None, test_acc=0.625)
    assert "  test 62.50 %  " in run.lines()[0]


def test_a_terminal_shows_the_run_and_the_epoch():
    run = Run(force_terminal=True)
    run.begin()
    run.steps(100, 0.02)
    run.epoch(1, 400)
    run.steps(50, 0.02)
    run.callback.end()
    shown = "".join(run.lines()[-3:])
    for part in ("feather ", " 1/10", "0:00:17 left", "400 images/s", "epoch 2 ", " 50/100"):
        assert part in shown
    assert "0:00:01 left" in shown
    assert "loss 1.250  val 50.00 %  sparsity 75.00 %" in shown


def test_the_last_accuracy_stays_visible_if_not_every_epoch_is_evaluated():
    run = Run(force_terminal=True)
    run.begin()
    run.epoch(1, 400, val_acc=0.5)
    run.epoch(2, 400, val_acc=None)
    assert "val 50.00 %" in run.bar(1).fields["note"]
    run.callback.end()


def test_most_steps_do_not_update_the_display(monkeypatch):
    run = Run(force_terminal=True)
    run.begin()
    shown = []
    monkeypatch.setattr(run.callback, "_show", lambda: shown.append(run.callback.done))
    run.steps(1000, 0.001)
    assert len(shown) <= 10
    assert run.callback.done == 1000
    monkeypatch.undo()
    run.callback.end()


def test_a_callback_can_end_without_a_begin():
    Run().callback.end()


SCRIPT = """
import os, sys, termios, time
from rich.console import Console
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.config import Config
from torch_feather.training.console import ConsoleCallback

def shown():
    return bool(termios.tcgetattr(0)[3] & termios.ECHOCTL)

before = shown()
callback = ConsoleCallback(Console(force_terminal=True))
callback.begin(Config(epochs=1), steps=4, done=0, run=RunDirectory("a"))
during = shown()
try:
    print("READY", flush=True)
    time.sleep(20)
except KeyboardInterrupt:
    callback.end()
print("STATES", before, during, shown(), flush=True)
"""


def test_ctrl_c_in_a_terminal_is_not_shown_within_the_bar():
    """`^C` behind a bar of the full width would begin a new line, and the bar be shown twice."""
    import contextlib
    import os
    import pty
    import signal
    import sys

    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", SCRIPT])
    output, sent = b"", False
    try:
        with contextlib.suppress(OSError):  # when the process has ended
            while chunk := os.read(terminal, 4096):
                output += chunk
                if b"READY" in output and not sent:
                    sent = True
                    os.write(terminal, b"\x03")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
    assert b"STATES True False True" in output
    assert b"^C" not in output
