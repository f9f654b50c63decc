import io

import pytest
import torch
from rich.console import Console

import torch_feather as feather
from torch_feather.training.console import layer_table, percent


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.00 %"),
        (1e-9, "0.01 %"),
        (0.95, "95.00 %"),
        (291_384 / 306_720, "95.00 %"),
        (0.99996, "99.99 %"),
        (1.0, "100.00 %"),
    ],
)
def test_a_share_is_0_or_100_percent_only_where_it_is_exactly(share, text):
    assert percent(share) == text


@pytest.mark.parametrize("thresholds", [None, {"0.weight": 1.234567e-5, "2.weight": 0.25}])
@pytest.mark.parametrize("example", [None, torch.zeros(1, 6)])
def test_the_table_of_a_stored_report_is_that_of_the_report(thresholds, example):
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3), torch.nn.Linear(3, 2)
    )
    with torch.no_grad():
        model[0].weight[0] = 0
        model[2].weight.zero_()
    report = feather.report(model, example_input=example, thresholds=thresholds)
    stream = io.StringIO()
    console = Console(file=stream, width=30)  # narrower than the table, which is not broken
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
