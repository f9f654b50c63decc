"""The badges of the README, from pyproject.toml: python docs/badges.py"""

import re
import tomllib
from pathlib import Path

STATIC = Path(__file__).parent / "_static"
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{title}">
<title>{title}</title>
<rect width="{width}" height="20" rx="3" fill="#444"/>
<path d="M{middle} 0h{rest}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{rest}z" fill="#00568a"/>
<g fill="#fff" font-family="Verdana, DejaVu Sans, sans-serif" font-size="11">
<text x="6" y="14" textLength="{left}">{name}</text>
<text x="{at}" y="14" textLength="{right}">{value}</text>
</g>
</svg>
"""


def badges() -> dict[str, str]:
    """Return the badges as SVG by name of the file."""
    project = tomllib.loads((STATIC.parents[1] / "pyproject.toml").read_text())["project"]
    torch = next(d for d in project["dependencies"] if d.startswith("torch>="))
    (status,) = (c for c in project["classifiers"] if c.startswith("Development Status"))
    values = {
        "status": re.sub(r".* - ", "", status).lower(),
        "python": project["requires-python"].replace(">=", "") + "+",
        "PyTorch": torch.removeprefix("torch>=") + "+",
        "license": project["license"],
    }
    return {f"badge-{name.lower()}.svg": draw(name, value) for name, value in values.items()}


def draw(name: str, value: str) -> str:
    """Return one badge, with 6.5 pixels for each character."""
    left, right = round(6.5 * len(name)), round(6.5 * len(value))
    return SVG.format(
        title=f"{name}: {value}",
        name=name,
        value=value,
        left=left,
        right=right,
        middle=left + 12,
        at=left + 18,
        rest=right + 9,
        width=left + right + 24,
    )


if __name__ == "__main__":
    for file, svg in badges().items():
        (STATIC / file).write_text(svg)
        print(STATIC / file)
