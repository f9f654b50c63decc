"""What a study leaves: runs.json, table.md, its figures as PNG and SVG, and a page to open."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup

from ..methods import METHODS
from ..training.checkpoint import write_atomically, write_json
from ..training.config import DENSE
from ..training.errors import RunError
from .grid import Row
from .spread import ENOUGH, group, labels
from .study import Answer, Picture, Study, Table

# What a row has at least.
KEYS = (
    *("name", "label", "data", "amp", "select", "config", "network", "method", "seed", "epochs"),
    *("sparsity", "own_sparsity", "test_accuracy", "weights", "zeros", "macs", "dense_macs"),
    *("seconds", "curve", "commit", "versions", "hardware"),
)


@dataclass(frozen=True)
class Made:
    """How the numbers came about."""

    command: str  # that makes them again
    planned: int  # trainings of the whole study

    def facts(self, rows: Sequence[Row]) -> dict[str, str]:
        """What the numbers are of, by what it says; empty without runs."""
        if not rows:
            return {}

        def seen(key: str) -> str:
            return ", ".join(dict.fromkeys(str(row[key]) for row in rows))

        machines = {
            f"{h.get('gpu') or h['cpu']}, {h['threads']} thread(s)"
            for h in (row["hardware"] for row in rows)
        }
        versions = {f"{name} {v}" for row in rows for name, v in row["versions"].items()}
        seconds = sum(row["seconds"] for row in rows)
        precisions = {"bfloat16 autocast" if row["amp"] else "float32" for row in rows}
        epochs = {"last": "the last epoch", "best": "the epoch that held-out images chose"}
        chosen = " or ".join(sorted({epochs[row["select"]] for row in rows}))
        facts = {
            "Trained": f"{seen('network')} on {seen('data')}, {seen('epochs')} epochs, "
            f"{' and '.join(sorted(precisions))}, seeds {seen('seed')}; {len(rows)} trainings, "
            f"{seconds / 60:.0f} minutes in all",
            "Measured": f"test accuracy after {chosen}; no training looks at test images; "
            "± is the standard deviation over seeds",
            "Hardware": "; ".join(sorted(machines)),
            "Versions": ", ".join(sorted(versions)),
            "Commit": ", ".join(dict.fromkeys(_short(row["commit"]) for row in rows)),
        }
        if len(rows) < self.planned:
            facts["Not complete"] = f"{len(rows)} of {self.planned} trainings; the command goes on"
        return facts


def read_rows(file: Path) -> list[Row]:
    """The rows of a runs.json.

    Raises:
        RunError: it cannot be read, or is none.
    """
    try:
        rows = json.loads(file.read_text())
    except FileNotFoundError:
        raise RunError(f"{file}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read as the runs.json of a study ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RunError(f"{file}: is not the runs.json of a study")
    for row in rows:
        if missing := [key for key in KEYS if key not in row]:
            raise RunError(
                f"{file}: is not the runs.json of a study, or is one of an older version: a run "
                f"has no {', '.join(missing)}"
            )
    return rows


def write(study: Study, answer: Answer, rows: Sequence[Row], out: Path, made: Made) -> str:
    """Write all of it into `out`; returns what table.md holds."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "runs.json", list(rows))
    drawn = {}
    for picture in [*answer.ours.pictures, *answer.published.pictures]:
        png, svg = io.BytesIO(), io.BytesIO()
        picture.figure.savefig(png, format="png", dpi=150)
        # Dates and random names left out: the same numbers give the same file.
        with matplotlib.rc_context({"svg.hashsalt": picture.name}):
            picture.figure.savefig(svg, format="svg", metadata={"Date": None})
        _write(out / f"{picture.name}.png", png.getvalue())
        _write(out / f"{picture.name}.svg", svg.getvalue())
        drawn[picture.name] = svg.getvalue().decode()
    text = markdown(study, answer, rows, made)
    _write(out / "table.md", text.encode())
    _write(out / "index.html", page(study, answer, rows, made, drawn).encode())
    return text


def markdown(study: Study, answer: Answer, rows: Sequence[Row], made: Made) -> str:
    """Question, sentences and tables, those of others under a heading of their own."""
    blocks = [f"{study.question} ({study.source})"]
    blocks += ["\n".join(f"- {sentence}" for sentence in conclusions(answer, rows))]
    blocks += [_markdown_table(table) for table in answer.ours.tables]
    blocks += [f"{fact}: {text}" for fact, text in made.facts(rows).items()]
    blocks += [f"    {made.command}"]
    if answer.published.tables:
        blocks += ["Published, not measured here:"]
        blocks += [_markdown_table(table) for table in answer.published.tables]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.caption, ""] if table.caption else []
    lines += ["| " + " | ".join(row) + " |" for row in (table.head, ["---"] * len(table.head))]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table.rows)])


def conclusions(answer: Answer, rows: Sequence[Row]) -> Sequence[str]:
    """The answer's sentences, or why there is none."""
    if answer.sentences or not rows:
        return answer.sentences
    if len(labels(rows)) < 2:
        return ["No conclusion: there is nothing to compare yet."]
    if min(len(mine) for mine in group(rows).values()) >= ENOUGH:
        return ["No conclusion: all seeds give the same difference."]
    return [f"No conclusion yet: it takes {ENOUGH} seeds of each of what is compared."]


def _short(commit: str | None) -> str:
    """A `+` at its end says that the files were edited."""
    return "not known" if commit is None else commit[:10] + "+" * commit.endswith("+")


def page(
    study: Study, answer: Answer, rows: Sequence[Row], made: Made, drawn: dict[str, str]
) -> str:
    """A page that needs no other file and no network."""
    template = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")

    def inline(picture: Picture) -> Markup:
        """The bare element, with names of its own beside the other pictures of the page."""
        svg = drawn[picture.name]
        svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{picture.name}-", svg)
        return Markup(svg[svg.index("<svg") :])

    return template.render(
        study=study,
        answer=answer,
        names=names(rows),
        conclusions=conclusions(answer, rows),
        facts=made.facts(rows),
        command=made.command,
        inline=inline,
    )


def names(rows: Sequence[Row]) -> dict[str, str]:
    """What the methods of these runs are, in a line each."""
    used = dict.fromkeys(row["method"] for row in rows)
    about = {
        name: (build.__doc__ or "").replace("`", "").strip() for name, build in METHODS.items()
    }
    about[DENSE] = "The network as it is, trained on the same budget."
    return {name: about[name].splitlines()[0] for name in used}


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))
