"""Tables of step times by method, for the results pages: every run of a setting, and how far the runs are apart."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..network.rates import show_rate
from ..spelling import split_name
from ..stats import paired_ratio, round_times
from ..training.summary import Row
from . import comparison
from .comparison import Cell, kind, median
from .evidence import Evidence
from .markdown import extent, number, table

# What the columns show: the fastest of these kinds.
DDP, HALF, DEAR = ("ddp",), ("ddp+fp16",), ("dear", "dear:sharded", "dear:owned", "dear:replicated")
METHODS: dict[str, tuple[str, ...]] = {
    "tuned DDP": DDP,
    "DDP, 16-bit hook": HALF,
    "FSDP2": ("fsdp2",),
    "DeAR": DEAR,
    "bf16": ("bf16", "dear+bf16"),
    "torch's PowerSGD hook, rank 4": ("ddp+powersgd:4",),
    "ACP-SGD, rank 4": ("acp:4",),
    "DeAR + ACP-SGD": ("dear+acp:4",),
    "Power-SGD, rank 4": ("power:4",),
    "EF-SignSGD": ("sign",),
    "Top-k 1%": ("topk:0.01",),
}


@dataclass(frozen=True)
class Took:
    """A method in one run: ms per step, and how many times as fast as the best DDP by pairs of rounds."""

    name: str
    ms: float
    ratio: float | None

    def __str__(self) -> str:
        return number(self.ms) + (f" ({self.ratio:.2f}×)" if self.ratio is not None else "")


def took(cell: Cell, kinds: Sequence[str], name: str = "") -> Took | None:
    """The fastest strategy of these kinds in a run, or the one of that name; None where none was measured."""
    rows = [row for row in cell.finished if kind(row.name) in kinds and name in ("", row.name)]
    best = min(rows, key=median, default=None)
    return None if best is None else Took(best.name, median(best), None if best.is_best_ddp else best.speedup)


def ratio(cell: Cell, ours: Row | Took, rival: Row | Took) -> float:
    """The rival's time over ours, median over the rounds."""
    return paired_ratio(*(round_times(cell.strategy(one.name)) for one in (ours, rival)))


def where(cell: Cell) -> str:
    return f"{cell.setting.workers} workers, {show_rate(cell.rate)}"


def run_name(cell: Cell) -> str:
    """The file that a run is in, by which the list of sources has it, and its date."""
    return f"{cell.source.name.removeprefix('training-')}, {cell.source.when[:10]}"


def by_setting(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The runs of each setting and rate, most workers first, then the slowest link, then the oldest run."""
    found: dict[tuple[comparison.Setting, str], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.source.when):
        found.setdefault((cell.setting, cell.rate), []).append(cell)
    rates = comparison.by_rate(rate for _, rate in found)
    return [found[key] for key in sorted(found, key=lambda key: (-key[0].workers, key[0], rates.index(key[1])))]


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    return [cell for runs in by_setting(cells) for cell in runs]


def all_runs(cells: Iterable[Cell], methods: Sequence[str]) -> str:
    """A row for each run; where a setting has several, a row more of how far they are apart."""
    rows = []
    for runs in by_setting(cells):
        found = [[took(cell, METHODS[method]) for method in methods] for cell in runs]
        for cell, times in zip(runs, found, strict=True):
            least = min((one.ms for one in times if one), default=None)
            shown = ["" if one is None else f"**{one}**" if one.ms == least else str(one) for one in times]
            rows.append([where(cell), run_name(cell), number(cell.floor), *shown])
        if len(runs) > 1:
            apart = [_spread(times) for times in zip(*found, strict=True)]
            rows.append(["", "*from – to*", f"*{extent(cell.floor for cell in runs)}*", *apart])
    return table(["link", "run", "compute floor", *methods], rows)


def every_strategy(cells: Iterable[Cell]) -> str:
    """A row for each strategy, a column for each run: ms per step, and how many times as fast as the best DDP."""
    runs = in_order(cells)
    names = dict.fromkeys(row.name for cell in runs for row in cell.finished)
    rows = [
        [f"`{name}`", *("" if (one := took(cell, (kind(name),), name)) is None else str(one) for cell in runs)]
        for name in names
    ]
    return table(["strategy", *(f"{cell.setting.workload}, {where(cell)}" for cell in runs)], rows)


def _spread(times: Sequence[Took | None]) -> str:
    known = [one for one in times if one]
    if len(known) < 2:
        return ""
    ratios = extent((one.ratio for one in known), ".2f", "×")
    return f"*{extent(one.ms for one in known)}{f' ({ratios})' if ratios else ''}*"


def dense_runs(cells: Iterable[Cell]) -> str:
    """DeAR against DDP at its best bucket size, in every run that has both; with the quartiles over the rounds."""
    rows = []
    for cell in in_order(cells):
        compared = comparison.compare(cell, lambda _, name: kind(name) in (*DDP, *DEAR))
        if compared is None or compared.ratio is None or compared.spread is None:
            continue
        ms = {row.name: row.median for row in cell.finished}
        times = [ms.get(name or "") for name in (compared.rival, "ddp:25", "fsdp2", compared.ours)]
        low, high = compared.spread
        won = f"{compared.ratio:.2f}× ({low:.2f}–{high:.2f})"
        about = [f"{where(cell)}, {cell.setting.optimizer}", run_name(cell)]
        rows.append([*about, *map(number, (cell.floor, *times)), won])
    methods = ["tuned DDP", "DDP, 25 MiB", "FSDP2", "DeAR"]
    return table(["link, optimizer", "run", "compute floor", *methods, "DeAR against tuned DDP"], rows)


def is_compressed(name: str) -> bool:
    return comparison.family(name) is comparison.COMPRESSED


def overview(evidence: Evidence, wanted: Callable[[Cell], bool]) -> str:
    """README's table: a row for each link rate, of the run that the map shows; ratios of all runs where they differ."""
    rows = []
    for runs in by_setting(cell for cell in evidence.cells if wanted(cell)):
        shown = evidence.chosen[runs[0].setting, runs[0].rate]
        if took(shown, HALF) is None or took(shown, DEAR) is None:
            continue
        ours = _fastest_compressor(shown)
        times = [took(shown, one) for one in (DDP, HALF, DEAR)]
        cells = [number(shown.floor), *(number(one.ms) if one else "" for one in times)]
        cells.append(f"{number(ours.ms)} ({_label(ours.name)})" if ours else "")
        cells.append(_with_range(shown, runs, lambda cell: _against(took(cell, DEAR), took(cell, DDP), cell)))
        cells.append(_with_range(shown, runs, _compressor_gain))
        processor = shown.setting.machine.partition(",")[0].replace("(R)", "").removesuffix(" Processor")
        rows.append([", ".join(filter(None, [where(shown), processor])), *cells])
    head = ["link", "compute floor", "tuned DDP", "DDP, 16-bit hook", "DeAR", "fastest compressor"]
    return table([*head, "DeAR: speed-up over tuned DDP", "compressor: speed-up over the faster DDP"], rows)


def _label(name: str) -> str:
    """A strategy with a compressor, for people."""
    schedule, _, compressor = name.rpartition("+")
    return ("DeAR + " if schedule else "") + split_name(compressor.split(":"))[0].label


def _fastest_compressor(cell: Cell) -> Took | None:
    return took(cell, [kind(row.name) for row in cell.finished if is_compressed(row.name)])


def _compressor_gain(cell: Cell) -> float | None:
    """Against DDP with the 16-bit hook or without, whichever is faster."""
    return _against(_fastest_compressor(cell), took(cell, (*DDP, *HALF)), cell)


def _against(ours: Took | None, rival: Took | None, cell: Cell) -> float | None:
    return None if ours is None or rival is None else ratio(cell, ours, rival)


def _with_range(shown: Cell, runs: Sequence[Cell], gain: Callable[[Cell], float | None]) -> str:
    one, found = gain(shown), [gain(cell) for cell in runs]
    if one is None:
        return ""
    several = len([each for each in found if each is not None]) > 1
    return f"{one:.2f}×" + (f" ({extent(found, '.2f')})" if several else "")
