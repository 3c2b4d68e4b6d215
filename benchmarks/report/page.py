"""The page: sections of pictures and tables, each with the files it comes from, drawn by the template beside this."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from ..records import Source
from .tables import HtmlTable

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Picture:
    """A PNG, which is put into the page itself."""

    title: str
    path: Path
    origin: list[str]
    note: str = ""

    @property
    def data(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class PlacedTable:
    """A table and where its numbers come from."""

    table: HtmlTable
    origin: list[str]


@dataclass(frozen=True)
class Missing:
    """Why a section is empty, and the command that fills it."""

    why: str
    command: str


@dataclass
class Section:
    """One question and what answers it. Folded: its tables are many, and shown on demand."""

    name: str
    title: str
    about: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[PlacedTable] = field(default_factory=list)
    missing: Missing | None = None
    folded: bool = False


def render(sections: Sequence[Section], sources: Sequence[Source]) -> str:
    """The page as text, complete in itself: no link leads out of it and nothing is loaded."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(sections=sections, sources=sources)
