"""Tables, numbers and pages as Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is words and whose others are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def number(value: float | None) -> str:
    """Three figures, or all before the point; nothing where there is no number."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def extent(values: Iterable[float | None], form: str = "number", unit: str = "") -> str:
    """The smallest and the largest of the numbers, or the one there is; nothing where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    ends = (number(one) if form == "number" else f"{one:{form}}" for one in (min(known), max(known)))
    return "–".join(dict.fromkeys(ends)) + unit


def render(template: str, **known: Any) -> str:
    """A page from a template of this folder. Raises jinja2.UndefinedError for a name that is not known."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(known).rstrip() + "\n"
