"""The page: what every section shows, each part with the files that it comes from, drawn by the template beside this.

Titles and explanations of the sections are in the template.
"""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import jinja2
from rich.console import Console
from rich.table import Table

from .. import losses, show
from ..matrix.tasks import example
from ..records import Source, provenance
from . import bars, comparison, figures, losses_figures, repeats, winners
from .comparison import Cell
from .evidence import Evidence, origin

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Part:
    """A picture, or tables as the commands print them, and where they come from."""

    origin: list[str]
    picture: Path | None = None
    printed: str = ""  # HTML
    note: str = ""

    @property
    def data(self) -> str:
        """The PNG, which is put into the page itself."""
        return base64.b64encode(self.picture.read_bytes()).decode() if self.picture else ""


Make = Callable[[Evidence, Path], Iterator[Part]]  # draws its pictures into the folder
Draw = Callable[[Sequence[Cell], Sequence[str], Path], None]


def printed(what: Table | Callable[[Console], None], about: list[str]) -> Part:
    """A table, or all that something prints, in its colours."""
    console = Console(record=True, file=io.StringIO(), width=160, color_system="truecolor", highlight=False)
    console.print(what) if isinstance(what, Table) else what(console)
    return Part(about, printed=console.export_html(inline_styles=True, code_format="{code}"))


def draw_map(evidence: Evidence, out: Path) -> Path:
    """map.png: who wins where."""
    title = "The same training as DDP: float32, nothing rounded away"
    maps = [winners.Map(title, lambda _, name: comparison.is_exact(name), lambda *_: False)]
    if evidence.inexact():
        maps.append(
            winners.Map(
                "Any method, 16-bit and compressed ones too",
                lambda cell, name: not evidence.is_barred(name, cell.setting),
                lambda cell, name: evidence.loss(name, cell.setting) is None,
            )
        )
    winners.draw(evidence.chosen, maps, origin(list(evidence.chosen.values())), out / "map.png")
    return out / "map.png"


def the_map(evidence: Evidence, out: Path) -> Iterator[Part]:
    if evidence.chosen:
        about = origin(list(evidence.chosen.values()))
        yield Part(about, draw_map(evidence, out), note=evidence.about_losses())


def pictures(name: str, draw: Draw, usable: Callable[[Cell], bool]) -> Make:
    """A picture for each setting, of its cells that are of use."""

    def make(evidence: Evidence, out: Path) -> Iterator[Part]:
        for setting in evidence.settings:
            cells = [cell for cell in evidence.of_setting(setting) if cell.best_of_each_kind() and usable(cell)]
            if cells:
                path = out / f"{name}-{setting.slug}.png"
                draw(cells, origin(cells), path)
                yield Part(origin(cells), path)

    return make


def tables_of(benchmark: str) -> Make:
    """The tables that `show` prints of the files of a benchmark."""

    def make(evidence: Evidence, out: Path) -> Iterator[Part]:
        for source in evidence.of_benchmark(benchmark):
            yield printed(partial(show.TABLES[benchmark], source.payload), provenance([source]))

    return make


def the_demo(evidence: Evidence, out: Path) -> Iterator[Part]:
    for source in evidence.of_benchmark("demo"):
        path = out / f"loss-{source.name}.png"
        losses_figures.over_time([comparison.as_cell(source, source.payload["training"])], provenance([source]), path)
        yield Part(provenance([source]), path)


def curves(evidence: Evidence, out: Path) -> Iterator[Part]:
    for source in evidence.of_benchmark("convergence"):
        path = out / f"{source.name}.png"
        losses_figures.by_step(source, provenance([source]), path)
        yield Part(provenance([source]), path)


def repeated(evidence: Evidence, out: Path) -> Iterator[Part]:
    for one in repeats.of(evidence):
        yield printed(repeats.table(one), provenance([one.first, one.second]))


# By the name of the section: the benchmark that fills it, and what makes its parts.
SECTIONS: dict[str, tuple[str, list[Make]]] = {
    "winners": ("training", [the_map]),
    "steps": ("training", [pictures("step-time", figures.step_by_rate, lambda _: True), tables_of("training")]),
    "parts": (
        "training",
        [
            pictures("step-parts", bars.step_parts, lambda cell: cell.floor is not None),
            pictures("step-phases", bars.by_phase, lambda cell: bool(bars.profiled(cell))),
        ],
    ),
    "loss": (
        "training",
        [pictures("loss", losses_figures.over_time, losses_figures.are_in), the_demo, tables_of("demo")],
    ),
    "convergence": ("convergence", [tables_of("convergence"), curves]),
    "bandwidth": ("bandwidth", [tables_of("bandwidth")]),
    "collectives": ("collectives", [tables_of("collectives")]),
    "kernels": ("kernels", [tables_of("kernels")]),
    "repeatability": ("training", [repeated]),
}


def parts(evidence: Evidence, out: Path) -> dict[str, list[Part]]:
    """Draws every picture into `out`; what each section shows, nothing where nothing was measured."""
    return {name: list(chain(*(make(evidence, out) for make in makes))) for name, (_, makes) in SECTIONS.items()}


def render(shown: Mapping[str, Sequence[Part]], sources: Sequence[Source]) -> str:
    """The page as text, complete in itself: no link leads out of it and nothing is loaded."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    needs = {name: (benchmark, example(benchmark)) for name, (benchmark, _) in SECTIONS.items()}
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(parts=shown, sources=sources, needs=needs, tolerance=losses.TOLERANCE)
