"""Everything the report draws on, sorted once: the sources by benchmark, the training cells, and which losses held."""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import losses, records
from ..records import Source
from ..training import seeds
from . import comparison, sweeps, two_levels
from .comparison import Cell, Setting


@dataclass(frozen=True)
class Loss:
    """Held-out loss over dense's, and what was trained to find out."""

    ratio: float
    trained: str

    @property
    def holds(self) -> bool:
        return self.ratio <= losses.TOLERANCE


@dataclass(frozen=True)
class Evidence:
    """What was read. `chosen` holds one training cell for each setting and rate; `nodes` those whose workers share
    ports, which are in neither of the others."""

    sources: list[Source]
    cells: list[Cell]
    chosen: dict[tuple[Setting, str], Cell]
    nodes: list[Cell]

    @classmethod
    def of(cls, read: Sequence[Source]) -> "Evidence":
        found = comparison.cells(records.of(read, "training"))
        cells = [cell for cell in found if not two_levels.is_of_nodes(cell)]
        nodes = [cell for cell in found if two_levels.is_of_nodes(cell)]
        return cls(list(read), cells, comparison.chosen(cells), nodes)

    def of_benchmark(self, benchmark: str) -> list[Source]:
        """Its sources; without those of several learning rates, whose losses are no strategy's alone."""
        return [source for source in records.of(self.sources, benchmark) if not sweeps.is_sweep(source)]

    def swept(self) -> list[Source]:
        """The sources of the convergence benchmark that of_benchmark leaves out."""
        return [source for source in self.sources if sweeps.is_sweep(source)]

    @property
    def settings(self) -> list[Setting]:
        return sorted({setting for setting, _ in self.chosen})

    def of_setting(self, setting: Setting) -> list[Cell]:
        """Its chosen cells, slowest link first."""
        rates = comparison.by_rate(rate for one, rate in self.chosen if one == setting)
        return [self.chosen[setting, rate] for rate in rates]

    def curves(self, workload: str) -> list[dict[str, Any]]:
        """The cells of the convergence benchmark that trained this workload."""
        cells = [cell for source in self.of_benchmark("convergence") for cell in source.cells]
        return [cell for cell in cells if cell["plan"].get("workload", "gpt") == workload]

    @functools.cached_property
    def _seeded(self) -> dict[tuple[Setting, str], float]:
        """Held-out loss over DDP's by setting and kind, the mean over the seeds, where there were several."""
        found: dict[tuple[Setting, str], float] = {}
        for setting in {cell.setting for cell in self.cells}:
            for group in seeds.groups([cell.data for cell in self.cells if cell.setting == setting]):
                for row in seeds.rows(group):
                    if row.held_out_ratio is not None:
                        key = setting, comparison.kind(row.name)
                        found[key] = max(found.get(key, 0.0), statistics.mean(row.held_out_ratio.values))
        return found

    def loss(self, name: str, setting: Setting) -> Loss | None:
        """What is known of the loss with this strategy: from the setting's own runs with several seeds, or else from
        those of the convergence benchmark that trained as this strategy does; None where it was not measured."""
        if comparison.is_exact(name):
            return Loss(1.0, setting.workload)
        if (own := self._seeded.get((setting, comparison.kind(name)))) is not None:
            return Loss(own, f"{setting.workload} with {setting.optimizer}")
        curves = self.curves(setting.workload)
        alike = comparison.trains_like(name, curves)
        ratio = next((row.ratio for row in losses.rows(curves) if row.name == alike), None)
        trained = ", ".join(sorted({cell["plan"]["optimizer"] for cell in curves}))
        return None if ratio is None else Loss(ratio, f"{setting.workload} with {trained}")

    def is_barred(self, name: str, setting: Setting) -> bool:
        """Whether its loss was measured and did not hold: then its speed wins nothing."""
        known = self.loss(name, setting)
        return known is not None and not known.holds

    def inexact(self) -> list[tuple[str, Setting]]:
        """Kinds in the chosen cells that do not train exactly as DDP does, each with its setting."""
        found = {
            (comparison.kind(row.name), setting)
            for (setting, _), cell in self.chosen.items()
            for row in cell.finished
            if row.name != comparison.FLOOR and not comparison.is_exact(row.name)
        }
        return sorted(found)

    def about_losses(self) -> str:
        """Which methods the second map leaves out, and whose loss was not measured."""
        barred, unknown = set(), set()
        for name, setting in self.inexact():
            known = self.loss(name, setting)
            if known is None:
                unknown.add(f"{name} ({setting.workload})")
            elif not known.holds:
                barred.add(f"{name} ({known.trained}, {100 * (known.ratio - 1):+.1f}%)")
        parts = []
        if barred:
            above = f"{100 * (losses.TOLERANCE - 1):.0f}% above dense"
            parts.append(f"Left out of the second map, with a loss more than {above}: {', '.join(sorted(barred))}.")
        if unknown:
            parts.append(f"In it although their loss was not measured: {', '.join(sorted(unknown))}.")
        return " ".join(parts)


def origin(cells: Sequence[Cell]) -> list[str]:
    """Where the numbers of these cells come from."""
    return records.provenance([cell.source for cell in cells])
