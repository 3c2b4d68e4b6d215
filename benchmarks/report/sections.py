"""The sections of the page: each makes its pictures and tables from the evidence, or says what is missing."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import show
from ..convergence import show as losses
from ..matrix.tasks import example
from ..records import Source, provenance
from . import contest, figures, losses_figures, phases, repeats, tables, winners
from .contest import Cell, Setting
from .evidence import Evidence, origin
from .page import Missing, Picture, PlacedTable, Section


def build(evidence: Evidence, out: Path) -> list[Section]:
    """Draws every picture into `out` and returns the sections."""
    makers = (  # in the order of the page
        where_each_wins,
        step_times,
        steps_in_parts,
        share_of_the_bound,
        price_of_compression,
        loss_over_time,
        convergence,
        bandwidth_needed,
        collectives,
        kernels,
        repeatability,
    )
    return [make(evidence, out) for make in makers]


def where_each_wins(evidence: Evidence, out: Path) -> Section:
    section = Section(
        "winners",
        "Where each method wins",
        "Each cell: the strategy with the shortest step at this link rate, and the best rival's step over the best "
        "of this library's (above 1: this library is faster), median over rounds. Rivals are torch's own: DDP at "
        "its best bucket size, its 16-bit and PowerSGD hooks at theirs, and FSDP2. A red frame: this library loses. "
        "Pale and ≈: the rounds do not agree on who is faster. †: what the method costs in loss was not measured. "
        "Both sides choose their best by the numbers they are compared with.",
    )
    if not evidence.chosen:
        return _without(section, "training")
    title = "The same training as DDP: float32, nothing rounded away"
    maps = [winners.Map(title, lambda _, name: contest.is_exact(name), lambda *_: False)]
    note = ""
    if inexact := evidence.inexact():

        def holds(cell: Cell, name: str) -> bool:
            return not evidence.is_barred(name, cell.setting)

        def unknown(cell: Cell, name: str) -> bool:
            return evidence.loss(name, cell.setting) is None

        maps.append(winners.Map("Any method, 16-bit and compressed ones too", holds, unknown))
        note = _about_losses(evidence, inexact)
    path = out / "map.png"
    about = origin(list(evidence.chosen.values()))
    winners.draw(evidence.chosen, maps, about, path)
    section.pictures.append(Picture(section.title, path, about, note))
    return section


def _about_losses(evidence: Evidence, inexact: Sequence[tuple[str, Setting]]) -> str:
    """Which methods the second map leaves out, and whose loss nobody has measured."""
    barred, unknown = set(), set()
    for name, setting in inexact:
        known = evidence.loss(name, setting)
        if known is None:
            unknown.add(f"{name} ({setting.workload})")
        elif not known.holds:
            barred.add(f"{name} ({known.trained}, {100 * (known.ratio - 1):+.1f}%)")
    parts = []
    if barred:
        limit = f"{100 * (losses.TOLERANCE - 1):.0f}%"
        parts.append(
            f"Left out of the second map, their loss being more than {limit} above dense: {', '.join(sorted(barred))}."
        )
    if unknown:
        parts.append(f"In it although their loss was not measured: {', '.join(sorted(unknown))}.")
    return " ".join(parts)


def step_times(evidence: Evidence, out: Path) -> Section:
    section = Section(
        "steps",
        "Step time",
        "Medians over rounds in which the strategies took turns, so that what drifts on the machine drifts for all."
        " The dotted line is max(compute floor, communication of float32 gradients): the floor is measured, the "
        "communication computed from bytes and rate. Only what sends fewer bytes can go below it. The tables below "
        "also break steps down by module and operator where that was measured.",
        folded=True,
    )
    if not evidence.cells:
        return _without(section, "training")
    _picture_per_setting(section, evidence, out, "step-time", figures.step_by_rate, lambda cell: bool(cell.finished))
    for source in evidence.of_benchmark("training"):
        _printed(section, source)
    return section


def steps_in_parts(evidence: Evidence, out: Path) -> Section:
    section = Section(
        "parts",
        "What a step consists of",
        "The compute floor is a step without communication; what is above it is whatever communication costs: "
        "waiting, and CPU time taken from compute. The black mark is as short as a step can be that sends what this"
        " strategy sends. By phase, where a breakdown was asked for: rank 0's training thread in a profiled run "
        "after the timed one, which is why its steps are longer. There strategies take no turns: compare the parts "
        "of a bar with each other, and bars by the medians above.",
    )
    has_parts = [cell for cell in evidence.chosen.values() if cell.floor is not None]
    if not has_parts:
        return _without(section, "training")
    _picture_per_setting(section, evidence, out, "step-parts", figures.step_parts, lambda cell: cell in has_parts)
    _picture_per_setting(section, evidence, out, "step-phases", phases.draw, phases.are_in)
    return section


def share_of_the_bound(evidence: Evidence, out: Path) -> Section:
    section = Section(
        "bound",
        "How close to the bound",
        "max(compute floor, own communication) over the measured step, in percent, each kind at its best size. A "
        "link carries frames, of which TCP leaves 95.6% for payload, so 95 to 96 is the most that can be reached "
        "where communication is the bound.",
    )
    return _table_per_setting(section, evidence, tables.bounds)


def price_of_compression(evidence: Evidence, out: Path) -> Section:
    section = Section(
        "price",
        "What compression costs, and what it saves",
        "Every strategy that sends fewer bytes, also where it loses. Communication saved is computed: bytes not "
        "sent, by the link's rate. Saved against best DDP is measured: how much shorter the step is. Red: it does "
        "not pay.",
    )
    return _table_per_setting(section, evidence, tables.price_of_compression)


def loss_over_time(evidence: Evidence, out: Path) -> Section:
    section = Section(
        "loss",
        "Loss over wall time",
        "Training loss against the time that each strategy itself has trained: measured together with the steps.",
    )
    if not evidence.cells and not evidence.of_benchmark("demo"):
        return _without(section, "training")
    _picture_per_setting(section, evidence, out, "loss", figures.loss_over_time, figures.has_losses)
    for source in evidence.of_benchmark("demo"):
        cell = contest.as_cell(source, source.payload["training"])
        path = out / f"loss-{Path(source.file).stem}.png"
        figures.loss_over_time([cell], provenance([source]), path)
        section.pictures.append(Picture("The demo", path, provenance([source])))
        _printed(section, source)
    return section


def convergence(evidence: Evidence, out: Path) -> Section:
    section = Section(
        "convergence",
        "Does the loss hold?",
        "The same model, text and learning rate for every strategy, several seeds. A ratio to dense above "
        f"{losses.TOLERANCE:g} is red: such a method's speed wins nothing.",
    )
    found = evidence.of_benchmark("convergence")
    if not found:
        return _without(section, "convergence")
    for source in found:
        _printed(section, source)
        path = out / f"{Path(source.file).stem}.png"
        losses_figures.by_step(source, provenance([source]), path)
        section.pictures.append(Picture("Held-out loss by step", path, provenance([source])))
        for setting in evidence.settings:
            _computed_times(section, source, evidence.of_setting(setting), out)
    return section


def _computed_times(section: Section, source: Source, cells: list[Cell], out: Path) -> None:
    """Losses over time and the time to a loss, where losses by step and step times were measured of the same work."""
    if not losses_figures.matches(source, cells):
        return
    both = provenance([source, *(cell.source for cell in cells)])
    path = out / f"{Path(source.file).stem}-time-{cells[0].setting.slug}.png"
    losses_figures.by_computed_time(source, cells, both, path)
    note = "Computed from two measurements: the losses by step, and the median step time at each rate."
    section.pictures.append(Picture("Held-out loss over computed time", path, both, note))
    for cell in cells:
        from_both = provenance([source, cell.source])
        section.tables += [PlacedTable(table, from_both) for table in tables.times_to_loss(cell, source.cells)]


def bandwidth_needed(evidence: Evidence, out: Path) -> Section:
    section = Section(
        "bandwidth",
        "How much bandwidth is needed",
        "The lowest link rate at which a step stays close to the compute floor, which was measured in turns with "
        "it: down a ladder of rates, then one rate in between.",
    )
    return _printed_benchmark(section, evidence, "bandwidth")


def collectives(evidence: Evidence, out: Path) -> Section:
    section = Section(
        "collectives",
        "The collectives alone",
        "Ways of reducing a tensor over all ranks, in the form of nccl-tests. Wrong is a count: inputs are such "
        "that sums are exactly predictable.",
        folded=True,
    )
    return _printed_benchmark(section, evidence, "collectives")


def kernels(evidence: Evidence, out: Path) -> Section:
    section = Section(
        "kernels",
        "The kernels alone",
        "Every compression kernel by itself, beside the plain-torch way. A table's title names the device.",
    )
    return _printed_benchmark(section, evidence, "kernels")


def repeatability(evidence: Evidence, out: Path) -> Section:
    section = Section(
        "repeatability",
        "Is it repeatable?",
        "The same table measured twice, in separate runs. × is the ratio to the baseline of the same run (the best "
        "DDP; the backend's all_reduce): what people take from a table, and what must come out again.",
        folded=True,
    )
    runs = repeats.of_training(evidence.cells) + repeats.of_collectives(evidence.of_benchmark("collectives"))
    for one in repeats.twice_measured(runs):
        placed = PlacedTable(tables.html_table(repeats.table(one)), provenance([one.first, one.second]))
        section.tables.append(placed)
    if not section.tables:
        why = "No table was measured twice."
        section.missing = Missing(why, f"{example('training')}, and again with another --json")
    return section


def _without(section: Section, benchmark: str) -> Section:
    """The section of which there is nothing to show."""
    why = f"There are no results of the {benchmark} benchmark among the files."
    section.missing = Missing(why, example(benchmark))
    return section


def _printed_benchmark(section: Section, evidence: Evidence, benchmark: str) -> Section:
    found = evidence.of_benchmark(benchmark)
    if not found:
        return _without(section, benchmark)
    for source in found:
        _printed(section, source)
    return section


def _printed(section: Section, source: Source) -> None:
    """The tables that `python -m benchmarks.show` prints of the file."""

    def printed(console: Console) -> None:
        show.TABLES[source.benchmark](source.payload, console)

    for table in tables.captured(printed).tables:
        section.tables.append(PlacedTable(table, provenance([source])))


def _picture_per_setting(
    section: Section,
    evidence: Evidence,
    out: Path,
    name: str,
    draw: Callable[[Sequence[Cell], Sequence[str], Path], None],
    usable: Callable[[Cell], bool],
) -> None:
    for setting in evidence.settings:
        cells = [cell for cell in evidence.of_setting(setting) if cell.best_of_each_kind() and usable(cell)]
        if cells:
            path = out / f"{name}-{setting.slug}.png"
            draw(cells, origin(cells), path)
            section.pictures.append(Picture(f"{section.title}: {setting.label}", path, origin(cells)))


def _table_per_setting(section: Section, evidence: Evidence, make: Callable[[Sequence[Cell]], Table | None]) -> Section:
    for setting in evidence.settings:
        cells = evidence.of_setting(setting)
        if (table := make(cells)) is not None:
            section.tables.append(PlacedTable(tables.html_table(table), origin(cells)))
    if not section.tables:
        return _without(section, "training")
    return section
