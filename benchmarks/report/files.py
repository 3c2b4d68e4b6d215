"""The report of any results: pictures of training, and each file's tables as its command prints them."""

import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .. import show
from ..records import Source, provenance
from . import bars, others, repeats, winners
from .evidence import Evidence, origin
from .markdown import render


def pictures(evidence: Evidence, out: Path) -> list[str]:
    """Draws the map, and for each setting what its steps consist of; the names of the files."""
    drawn = []
    if evidence.chosen:
        winners.draw_map(evidence, out / "map.png")
        drawn.append("map.png")
    for setting in evidence.settings:
        cells = evidence.of_setting(setting)
        for name, draw, usable in (
            ("step-parts", bars.step_parts, [cell for cell in cells if cell.floor and cell.best_of_each_kind()]),
            ("step-phases", bars.by_phase, [cell for cell in cells if bars.profiled(cell)]),
        ):
            if usable:
                drawn.append(f"{name}-{setting.slug}.png")
                draw(usable, origin(usable), out / drawn[-1])
    return drawn


def printed(source: Source) -> str:
    """What its command prints of a file."""
    console = Console(record=True, file=io.StringIO(), width=160)
    if source.benchmark not in show.TABLES:
        return "no table: read the file"
    show.TABLES[source.benchmark](source.payload, console)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()).strip("\n")


def build(sources: Sequence[Source], out: Path) -> Path:
    """Writes report.md and its pictures into the folder."""
    out.mkdir(parents=True, exist_ok=True)
    evidence = Evidence.of(sources)
    known = {"evidence": evidence, "others": others, "printed": printed, "provenance": provenance}
    text = render("report.md", **known, pictures=pictures(evidence, out), repeats=repeats.of(evidence))
    (out / "report.md").write_text(text)
    return out / "report.md"
