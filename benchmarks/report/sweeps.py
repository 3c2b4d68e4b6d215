"""Losses of each method at its own best learning rate, and what they mean in time, for the results pages."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..convergence.best import Best, best, steps_to
from ..losses import DENSE
from ..network.rates import bits, show_rate
from ..records import Source
from ..stats import paired_ratio, round_times
from ..training.strategies import Compressed, StrategyError, Tried, parse_strategy
from ..training.summary import Row
from . import comparison
from .comparison import Cell
from .markdown import table

WITHIN = 1.005  # of dense's final loss: as good as dense, of means over three seeds
RATES = ("100mbit", "500mbit", "1gbit")
USUAL = 2  # workers, where a title does not say


def is_sweep(source: Source) -> bool:
    """Whether it is one of those in which each method has its own best learning rate: of several optimizers or rates,
    or with a schedule of the learning rate."""
    if source.benchmark != "convergence":
        return False
    experiments = [cell["plan"] for cell in source.cells]
    several = len({(experiment["optimizer"], experiment["learning_rate"]) for experiment in experiments}) > 1
    return several or any(experiment.get("schedule", "constant") != "constant" for experiment in experiments)


@dataclass(frozen=True)
class Sweep:
    """What was found of one workload, steps and workers under one optimizer, with one set of held-out examples.

    tried: methods that are not offered, which are not among the rows.
    """

    workload: str
    about: str
    steps: int
    optimizer: str
    rows: tuple[Best, ...]
    examples: int = 0  # held out, at most; 0 where all sweeps have the same
    tried: tuple[Best, ...] = ()
    workers: int = USUAL

    @property
    def title(self) -> str:
        examples = f", up to {self.examples} held-out examples" if self.examples else ""
        workers = f", {self.workers} workers" if self.workers != USUAL else ""
        return f"{self.workload}, {self.optimizer}, {self.steps} steps{workers}{examples}"

    @property
    def compares(self) -> bool:
        """Whether a method that is offered stands beside dense."""
        return len(self.rows) > 1

    @property
    def dense(self) -> Best | None:
        return next((one for one in self.rows if one.strategy == DENSE), None)

    def fewer(self, one: Best) -> float | None:
        """How many times fewer bytes than dense gradients in 16 bits, over the whole training: the dense steps with
        which a compressor begins are of 32, or as it says."""
        begins, bits = _at_first(one.strategy)
        if self.dense is None or not one.bytes_per_step or begins is None:
            return None
        dense, share = self.dense.bytes_per_step, min(1.0, begins / self.steps)
        return dense / 2 / (share * dense * bits / 32 + (1 - share) * one.bytes_per_step)

    def above(self, one: Best) -> float | None:
        """Its mean loss over dense's, of the seeds that both were trained with."""
        return None if self.dense is None else one.over(self.dense)

    def reached(self, one: Best, within: float) -> float | None:
        """At which step its curve is down to so many times dense's final loss; None where it never is, or where it was
        not trained with the same seeds."""
        if self.dense is None or one.seeds != self.dense.seeds:
            return None
        return steps_to(one.curve, within * self.dense.loss)


def _at_first(strategy: str) -> tuple[int | None, float]:
    """With how many steps it begins before it compresses, and bits of an element then."""
    found = parse_strategy(strategy)
    if isinstance(found, Tried):
        return found.method.start, 32.0
    if not isinstance(found, Compressed):
        return 0, 32.0
    return found.compressor.dense_steps, found.compressor.bits_at_first


def sweeps(sources: Iterable[Source]) -> list[Sweep]:
    """One for each workload, number of steps, held-out examples, workers and optimizer; files of one such count
    together."""
    cells: dict[tuple[str, str, int, int, int], list[dict[str, Any]]] = {}
    fewest: dict[str, int] = {}  # examples, by workload
    for source in sources:
        for cell in source.cells:
            experiment = cell["plan"]
            workload, examples = experiment["workload"], experiment.get("held_out_examples", 0)
            fewest[workload] = min(examples, fewest.get(workload, examples))
            same = (workload, cell.get("about", workload), experiment["steps"], examples, cell["workers"])
            cells.setdefault(same, []).append(cell)
    found = []
    for (workload, about, steps, examples, workers), own in sorted(cells.items(), key=lambda item: item[0]):
        rows = best(own)
        more = 0 if examples == fewest[workload] else examples
        for optimizer in sorted({one.optimizer for one in rows}):
            chosen = [one for one in rows if one.optimizer == optimizer]
            chosen.sort(key=lambda one: (-len(one.held_out), -one.bytes_per_step, one.strategy))
            offered, tried = (tuple(one for one in chosen if is_tried(one) == wanted) for wanted in (False, True))
            found.append(Sweep(workload, about, steps, optimizer, offered, more, tried, workers))
    return found


def is_tried(one: Best) -> bool:
    """Whether the library does not offer it."""
    return isinstance(parse_strategy(one.strategy), Tried)


def loss_table(sweep: Sweep) -> str:
    """Each method against dense, each at its own best learning rate."""
    rows = []
    for one in sweep.rows:
        low, high = min(one.held_out), max(one.held_out)
        fewer, above = sweep.fewer(one), sweep.above(one)
        same = sweep.dense is not None and one.seeds == sweep.dense.seeds
        rows.append([
            one.strategy, f"{one.learning_rate:g}", str(len(one.held_out)), f"{one.loss:.3f}",
            f"{low:.3f}–{high:.3f}" if len(one.held_out) > 1 else "",
            f"{100 * (above - 1):+.1f}%" if above else "",
            f"{fewer:.1f}×" if fewer else "", *(_step(sweep.reached(one, by)) if same else "" for by in (1, WITHIN)),
        ])  # fmt: skip
    head = ["strategy", "learning rate", "seeds", "held-out loss", "range", "to dense", "fewer bytes than 16 bits",
            "step at dense's loss", "step within 0.5%"]  # fmt: skip
    return table(head, rows)


def tried_table(sweep: Sweep) -> str:
    """Methods that are not offered, against dense: those that send most first."""
    rows = []
    for one in sweep.tried:
        above, dense = sweep.above(one), sweep.dense
        assert dense is not None
        rows.append([
            one.strategy, f"{one.learning_rate:g}", str(len(one.held_out)), f"{one.loss:.3f}",
            f"{min(one.held_out):.3f}–{max(one.held_out):.3f}" if len(one.held_out) > 1 else "",
            f"{100 * (above - 1):+.1f}%" if above else "", f"{dense.bytes_per_step / 2 / one.bytes_per_step:.1f}×",
        ])  # fmt: skip
    return table(["method", "learning rate", "seeds", "held-out loss", "range", "to dense", "fewer bytes"], rows)


def _step(found: float | None) -> str:
    return "never" if found is None else f"{found:.0f}"


@dataclass(frozen=True)
class Step:
    """One step of a method in one cell, beside the best DDP there."""

    text: str  # ms, and which strategy was measured, or that none was
    gain: float  # best DDP's step over it


def time_table(cells: Sequence[Cell], sweep: Sweep, strategy: str) -> str:
    """Combined from two sources: the steps of the loss curves, and step times of a larger model.

    The method's step is measured where a strategy that trains like it ran beside DDP; elsewhere it is predicted: the
    measured floor, and its bytes at the link's rate, none of which are hidden.
    """
    one = next((row for row in sweep.rows if row.strategy == strategy), None)
    head = ["link", "run", "best DDP, 16 bits or not: ms", f"{strategy}: ms", "by step", "by time"]
    rows = []
    for cell in sorted(cells, key=lambda cell: (RATES.index(cell.rate), cell.source.when)):
        rivals = [row for row in cell.finished if row.name.startswith("ddp") and "powersgd" not in row.name]
        if not rivals or one is None or sweep.dense is None:
            continue
        rival = min(rivals, key=comparison.median)
        step = _measured(cell, strategy, rival) or _predicted(cell, sweep.fewer(one), rivals)
        if step is None:
            continue
        ends, dense_ends = sweep.reached(one, WITHIN), sweep.reached(sweep.dense, WITHIN)
        by_time = f"{step.gain * dense_ends / ends:.2f}×" if ends and dense_ends else "never"
        run = cell.source.name.removeprefix("training-")
        rows.append([
            show_rate(cell.rate), run, f"{rival.median:.0f} ({rival.name})", step.text, f"{step.gain:.2f}×", by_time
        ])  # fmt: skip
    return table(head, rows)


def _measured(cell: Cell, strategy: str, rival: Row) -> Step | None:
    """Of the strategies that train like it, the one with the shortest step; the pairs of rounds give the gain."""
    own = [row for row in cell.finished if _later_steps(row.name) == _later_steps(strategy)]
    if not own:
        return None
    best_one = min(own, key=comparison.median)
    gain = paired_ratio(*(round_times(cell.strategy(row.name)) for row in (best_one, rival)))
    return Step(f"{best_one.median:.0f} ({best_one.name})", gain)


def _later_steps(name: str) -> tuple[Any, ...] | None:
    """The compressor of a strategy, without how it begins and which few parameters it leaves out: its steps take as
    long. None where there is none, or the name is of another version."""
    try:
        strategy = parse_strategy(name)
    except StrategyError:
        return None
    if not isinstance(strategy, Compressed):
        return None
    kept = [word for word in strategy.compressor.more if word.partition("=")[0] not in ("start", "first", "exempt")]
    return strategy.compressor.kind, strategy.compressor.option, *kept


def _predicted(cell: Cell, fewer: float | None, rivals: Sequence[Row]) -> Step | None:
    if cell.floor is None or not fewer:
        return None
    dense_bytes = max(cell.strategy(row.name)["payload_bytes_per_step"] for row in rivals)
    own = cell.floor + 8e3 * dense_bytes / 2 / fewer / bits(cell.rate)
    return Step(f"{own:.0f}, PREDICTED", min(map(comparison.median, rivals)) / own)


def with_floor(cells: Iterable[Cell]) -> list[Cell]:
    """Of four workers, at the rates that the table has, the runs with a floor and a DDP in 16 bits."""
    return [
        cell
        for cell in cells
        if cell.setting.workers == 4 and cell.rate in RATES and cell.floor is not None
        and any(comparison.kind(row.name) == "ddp+fp16" for row in cell.finished)
    ]  # fmt: skip
