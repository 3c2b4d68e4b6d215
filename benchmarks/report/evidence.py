"""Everything the report draws on, sorted once: the sources by benchmark, the training cells, and which losses held."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import losses
from benchmarks.report import contest, sources
from benchmarks.report.contest import Cell, Setting
from benchmarks.report.sources import Source


@dataclass(frozen=True)
class Evidence:
    """What was read. `chosen` holds one training cell for each setting and rate."""

    sources: list[Source]
    cells: list[Cell]
    chosen: dict[tuple[Setting, str], Cell]
    loss_rows: dict[str, losses.LossRow]  # by strategy of the convergence benchmark

    @classmethod
    def of(cls, read: Sequence[Source]) -> "Evidence":
        cells = contest.cells(sources.of(read, "training"))
        rows = losses.rows([cell for source in sources.of(read, "convergence") for cell in source.cells])
        return cls(list(read), cells, contest.chosen(cells), {row.name: row for row in rows})

    def of_benchmark(self, benchmark: str) -> list[Source]:
        return sources.of(self.sources, benchmark)

    @property
    def settings(self) -> list[Setting]:
        return sorted({setting for setting, _ in self.chosen})

    def of_setting(self, setting: Setting) -> list[Cell]:
        """Its chosen cells, slowest link first."""
        rates = contest.by_rate(rate for one, rate in self.chosen if one == setting)
        return [self.chosen[setting, rate] for rate in rates]

    def loss_of(self, name: str) -> losses.LossRow | None:
        """The measured losses of a strategy, or of one that trains alike: a schedule and a bucket size change nothing."""
        alike = losses.DENSE if contest.is_exact(name) else contest.kind(name).removeprefix("dear+")
        return self.loss_rows.get(alike)

    def is_barred(self, name: str) -> bool:
        """Whether its loss was measured and did not hold: then its speed wins nothing."""
        row = self.loss_of(name)
        return row is not None and row.ratio is not None and row.ratio > losses.TOLERANCE

    def compressed(self) -> list[str]:
        """Kinds in the chosen cells that do not train exactly as DDP."""
        names = {
            contest.kind(row.name) for cell in self.chosen.values() for row in cell.finished if row.name != contest.FLOOR
        }
        return sorted(name for name in names if not contest.is_exact(name))


def origin(cells: Sequence[Cell]) -> list[str]:
    """Where the numbers of these cells come from."""
    return sources.provenance([cell.source for cell in cells])
