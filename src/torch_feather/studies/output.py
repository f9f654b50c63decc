"""The files of a study: runs.json, table.md, figures as PNG and SVG, and index.html."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

from ..analysis.pages import inline_svgs, render_page
from ..analysis.plots import adapt_colours
from ..errors import ConfigurationError
from ..export.markdown import escape_markdown
from ..methods import describe_method
from ..training.checkpoint import write_atomically, write_json
from ..training.config import DENSE
from .comparison import MIN_SEEDS
from .metric import ACCURACY, metric_of
from .runs import Row
from .study import Answer, Study, Table
from .summary import group, labels, threads

PUBLISHED = "Published results, not measured in this study"


@dataclass(frozen=True)
class RunFacts:
    """Provenance of a study's numbers.

    Attributes:
        command: command that repeats the study.
        planned: number of runs of the complete study.
        failed: name to reason of each run that failed.

    Example:
        >>> row = {"network": "resnet20", "data": "digits", "epochs": 10, "seed": 0}
        >>> row |= {"select": "last", "seconds": 60.0, "amp": False, "commit": None}
        >>> row |= {"versions": {"torch": "2.9"}}
        >>> row |= {"hardware": {"cpu": "a CPU", "threads": 1}}
        >>> facts = RunFacts("feather study compare", planned=2).items([row])
        >>> facts["Hardware"], facts["Incomplete"]
        ('a CPU, 1 thread', '1 of 2 training runs; run the command again to continue')
    """

    command: str
    planned: int
    failed: Mapping[str, str] = field(default_factory=dict)

    def items(self, rows: Sequence[Row]) -> dict[str, str]:
        """Return training, metric, hardware, versions and commits by name; empty without runs."""
        if not rows:
            return {}

        def values(key: str) -> str:
            return ", ".join(dict.fromkeys(str(row[key]) for row in rows))

        seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
        machines = {
            f"{hardware.get('gpu') or hardware['cpu']}, {threads(hardware['threads'])}"
            for hardware in (row["hardware"] for row in rows)
        }
        versions = {f"{name} {v}" for row in rows for name, v in row["versions"].items()}
        seconds = sum(row["seconds"] for row in rows)
        precisions = {"bfloat16 autocast" if row["amp"] else "float32" for row in rows}
        epochs = {"last": "the last epoch", "best": "the epoch with the best validation accuracy"}
        selected = " or ".join(sorted({epochs[row["select"]] for row in rows}))
        metric = metric_of(rows)
        data = "images" if metric is ACCURACY else "text"
        facts = {
            "Training": f"{values('network')} on {values('data')}, {values('epochs')} epochs, "
            f"{' and '.join(sorted(precisions))}, seeds {seeds}; {len(rows)} training "
            f"runs, {seconds / 60:.0f} minutes in total",
            "Metric": f"{metric.name} after {selected}; no run uses test {data} for training or "
            "for choosing an epoch; ± is the standard deviation over seeds",
            "Hardware": "; ".join(sorted(machines)),
            "Versions": ", ".join(sorted(versions)),
            "Commit": ", ".join(dict.fromkeys(_short(row["commit"]) for row in rows)),
        }
        if len(rows) < self.planned:
            facts["Incomplete"] = (
                f"{len(rows)} of {self.planned} training runs; run the command again to continue"
            )
        if self.failed:
            facts["Failed"] = "; ".join(f"{name}: {why}" for name, why in self.failed.items())
        return facts


def write_study(
    study: Study, answer: Answer, rows: Sequence[Row], out: Path, facts: RunFacts
) -> str:
    """Write the page, tables, figures and rows of a study.

    Args:
        study: the study.
        answer: its answer for these rows.
        rows: rows of the finished runs.
        out: output directory.
        facts: provenance of the numbers.

    Returns:
        The text of table.md.

    Raises:
        RunError: a file cannot be written.

    Example:
        >>> import tempfile
        >>> from . import STUDIES
        >>> from .study import Section
        >>> study, answer = STUDIES["compare"], Answer(["feather is above gmp."], Section())
        >>> facts = RunFacts("feather study compare", planned=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = write_study(study, answer, [], Path(folder), facts)
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['index.html', 'runs.json', 'table.md']
        >>> "- feather is above gmp." in text
        True
    """
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "runs.json", list(rows))
    svgs = {}
    for figure in [*answer.measured.figures, *answer.published.figures]:
        png, svg = io.BytesIO(), io.BytesIO()
        figure.figure.savefig(png, format="png", dpi=150)
        # Without dates and random names, the same numbers give the same file.
        with matplotlib.rc_context({"svg.hashsalt": figure.name}):
            figure.figure.savefig(svg, format="svg", metadata={"Date": None})
        _write(out / f"{figure.name}.png", png.getvalue())
        svgs[figure.name] = adapt_colours(svg.getvalue().decode())
        _write(out / f"{figure.name}.svg", svgs[figure.name].encode())
    text = _markdown(study, answer, rows, facts)
    _write(out / "table.md", text.encode())
    _write(out / "index.html", _page(study, answer, rows, facts, svgs).encode())
    return text


def _markdown(study: Study, answer: Answer, rows: Sequence[Row], facts: RunFacts) -> str:
    """Return question, conclusions and tables as Markdown, published tables separately."""
    blocks = [f"{study.question} ({study.source})"]
    blocks += [
        "\n".join(f"- {escape_markdown(sentence)}" for sentence in _conclusions(answer, rows))
    ]
    blocks += [markdown_table(table) for table in answer.measured.tables]
    blocks += [f"{fact}: {escape_markdown(text)}" for fact, text in facts.items(rows).items()]
    blocks += [f"    {' '.join(facts.command.splitlines())}"]
    if answer.published.tables:
        blocks += [f"{PUBLISHED}:"]
        blocks += [markdown_table(table) for table in answer.published.tables]
    return "\n\n".join(block for block in blocks if block) + "\n"


def markdown_table(table: Table) -> str:
    """Return a table with its caption as Markdown.

    Args:
        table: the table.

    Example:
        >>> print(markdown_table(Table("", ["method", "n"], [["feather", "3"]])))
        | method | n |
        | --- | --- |
        | feather | 3 |
    """
    lines = [escape_markdown(table.caption), ""] if table.caption else []
    head = [escape_markdown(cell) for cell in table.head]
    rows = [[escape_markdown(cell) for cell in row] for row in table.rows]
    return "\n".join(
        [*lines, *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]
    )


def _conclusions(answer: Answer, rows: Sequence[Row]) -> Sequence[str]:
    """Return the answer's sentences, or the reason why there are none."""
    if answer.sentences or not rows:
        return answer.sentences
    if len(labels(rows)) < 2:
        return ["No conclusion: the runs have only one sparse method."]
    if min(len(mine) for mine in group(rows).values()) >= MIN_SEEDS:
        return ["No conclusion: the differences are the same for all seeds."]
    return [f"No conclusion yet: a comparison requires {MIN_SEEDS} seeds of each method."]


def _short(commit: str | None) -> str:
    """Shorten a commit; a final `+` marks edited files."""
    return "unknown" if commit is None else commit[:10] + "+" * commit.endswith("+")


def _page(
    study: Study,
    answer: Answer,
    rows: Sequence[Row],
    facts: RunFacts,
    svgs: Mapping[str, str],
) -> str:
    """Return the study as an HTML page that needs no other file and no network."""
    elements = inline_svgs(svgs)
    return render_page(
        __package__,
        "page.html.jinja",
        study=study,
        answer=answer,
        published=PUBLISHED,
        methods=describe_methods(rows),
        conclusions=_conclusions(answer, rows),
        facts=facts.items(rows),
        command=facts.command,
        inline=lambda figure: elements[figure.name],
    )


def describe_methods(rows: Sequence[Row]) -> dict[str, str]:
    """Return a one-line description of each method in the rows.

    Args:
        rows: the runs.

    Returns:
        Descriptions by name; empty for a method of a package that is not installed.

    Example:
        >>> describe_methods([{"method": "dense"}])
        {'dense': 'The unpruned network, trained with the same training budget.'}
    """
    return {name: _describe(name) for name in dict.fromkeys(row["method"] for row in rows)}


def _describe(method: str) -> str:
    if method == DENSE:
        return "The unpruned network, trained with the same training budget."
    try:
        return describe_method(method).replace("`", "")
    except ConfigurationError:  # of a package that is not installed
        return ""


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))
