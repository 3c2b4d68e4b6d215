"""Everything the report draws on, sorted once: the sources by benchmark, the training cells, and which losses held."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    @classmethod
    def of(cls, read: Sequence[Source]) -> "Evidence":
        cells = contest.cells(sources.of(read, "training"))
        return cls(list(read), cells, contest.chosen(cells))

    def of_benchmark(self, benchmark: str) -> list[Source]:
        return sources.of(self.sources, benchmark)

    @property
    def settings(self) -> list[Setting]:
        return sorted({setting for setting, _ in self.chosen})

    def of_setting(self, setting: Setting) -> list[Cell]:
        """Its chosen cells, slowest link first."""
        rates = contest.by_rate(rate for one, rate in self.chosen if one == setting)
        return [self.chosen[setting, rate] for rate in rates]

    def curves(self, workload: str) -> list[dict[str, Any]]:
        """The cells of the convergence benchmark that trained this workload."""
        cells = [cell for source in self.of_benchmark("convergence") for cell in source.cells]
        return [cell for cell in cells if cell["plan"].get("workload", "gpt") == workload]

    def loss_ratio(self, name: str, workload: str) -> float | None:
        """Held-out loss over dense's of what trains as this strategy does; None where that was not measured."""
        if contest.is_exact(name):
            return 1.0
        curves = self.curves(workload)
        alike = contest.trains_like(name, curves)
        return next((row.ratio for row in losses.rows(curves) if row.name == alike), None)

    def is_barred(self, name: str, workload: str) -> bool:
        """Whether its loss was measured and did not hold: then its speed wins nothing."""
        ratio = self.loss_ratio(name, workload)
        return ratio is not None and ratio > losses.TOLERANCE

    def inexact(self) -> list[tuple[str, str]]:
        """Kinds in the chosen cells that do not train exactly as DDP does, each with its workload."""
        found = {
            (contest.kind(row.name), setting.workload)
            for (setting, _), cell in self.chosen.items()
            for row in cell.finished
            if row.name != contest.FLOOR and not contest.is_exact(row.name)
        }
        return sorted(found)


def origin(cells: Sequence[Cell]) -> list[str]:
    """Where the numbers of these cells come from."""
    return sources.provenance([cell.source for cell in cells])
