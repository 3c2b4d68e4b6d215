"""The results pages and README's table: every number on them comes from the raw JSON by a template in pages/."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .. import losses, records
from ..command import show_size
from ..demo import show as demo
from ..gpu import claims, outcomes
from ..kernels.show import PLAIN
from ..records import Source, SourceError, load
from ..stats import is_plain_ddp
from . import bars, before_after, choosing, losses_figures, others, repeats, second_order, steps, sweeps, two_levels
from .comparison import Cell
from .evidence import Evidence, origin
from .markdown import extent, number, render
from .winners import draw_map

TEMPLATES = Path(__file__).with_name("pages")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PICTURES = ("map.png", "compression.png", "phases.png", "timeline.png", "losses.png")


class MarkersMissing(ValueError):
    """README has no place for the table; the message says what to do."""


class Facts:
    """What the templates ask for. `apart`: results that are no part of the map, by the folder that they are in."""

    def __init__(self, results: Path) -> None:
        self.results = results
        if not any(results.glob("*.json")):
            raise SourceError(f"{results} holds no results: name a folder of what --json wrote with --results.")
        self.evidence = Evidence.of(load(results.glob("*.json")))
        self.not_run_on_gpu = claims.not_run({path.name for path in (results / "gpu").glob("*")})
        self.gpu_commands = claims.commands(self.not_run_on_gpu)
        folders = [folder for folder in results.iterdir() if folder.is_dir()]
        self.apart = {folder.name: Evidence.of(load(folder.glob("*.json"))) for folder in folders}

    def of(self, benchmark: str, device: str = "cpu") -> list[Source]:
        found = self.evidence.of_benchmark(benchmark)
        return [one for one in found if (one.payload.get("settings", {}).get("device") == "cuda") == (device == "cuda")]

    def cells(self, workload: str = "gpt", optimizer: str = "", workers: int = 0) -> list[Cell]:
        return [
            cell
            for cell in self.evidence.cells
            if cell.setting.workload == workload
            and optimizer in ("", cell.setting.optimizer)
            and workers in (0, cell.setting.workers)
        ]

    def ms(self, run: str, name: str) -> float | None:
        """Of a step of one strategy in one run."""
        cells = [cell for cell in self.evidence.cells if cell.source.name == f"training-{run}"]
        return next((row.median for cell in cells for row in cell.rows if row.name == name), None)

    def overview(self) -> str:
        return steps.overview(self.evidence, lambda cell: cell in self.cells(optimizer="sgd"))

    def powersgd(self) -> str:
        runs = [cell for cell in self.cells() if any(row.name.startswith("ddp+powersgd") for row in cell.finished)]
        return steps.all_runs(runs, ["torch's PowerSGD hook, rank 4", "Power-SGD, rank 4"])

    def digits(self) -> list[Source]:
        return [one for one in self.of("training") if one.cells[0]["plan"].get("workload") == "digits"]

    def repeats(self) -> str:
        """How far the ratios of two runs are apart at the median: from, to."""
        return extent((one.off_by[0] for one in repeats.of(self.evidence)), ".1f", "%")

    def sweeps(self) -> list[sweeps.Sweep]:
        return sweeps.sweeps(self.evidence.swept())

    def machines(self, cells: list[Cell]) -> str:
        return "; ".join(dict.fromkeys(cell.source.machine for cell in cells))

    def gradients(self, workload: str) -> int:
        """Bytes of the model's gradients: what one of two workers sends of them by a ring."""
        cells = self.cells(workload, workers=2)
        return max(one["payload_bytes_per_step"] for one in cells[0].data["strategies"] if is_plain_ddp(one["name"]))

    def held(self) -> str:
        """What the convergence benchmark trained to within TOLERANCE of dense, in all its runs."""
        rows = [row for source in self.of("convergence") for row in losses.rows(source.cells) if row.ratio]
        worst = {name: max(row.ratio or 0.0 for row in rows if row.name == name) for name in (row.name for row in rows)}
        return ", ".join(
            f"`{name}`" for name in sorted(worst) if worst[name] <= losses.TOLERANCE and name != losses.DENSE
        )

    def slower_kernels(self, device: str) -> str:
        """The kernels that plain torch beats, by medians."""
        cells = [cell for source in self.of("kernels", device) for cell in source.cells]
        kernels = [one for cell in cells for one in cell["kernels"] if one.get("rival", PLAIN) == PLAIN]
        kernels = [one for one in kernels if one["median_s"] and one.get("plain_median_s")]
        slow = [one["name"] for one in kernels if one["plain_median_s"] < one["median_s"]]
        return "; ".join(slow) or "none"

    def gpu_tests(self, folder: str) -> dict[str, dict[str, Any]]:
        """What became of the tests of a run on a GPU, by task: also of those whose time was over."""
        files = (self.results / folder).glob("tests-*.jsonl")
        found = {path.stem: outcomes.summary(path) for path in files}
        cells = json.loads((self.results / folder / "gpu.json").read_text())["cells"]
        return {cell["task"]: cell for cell in cells} | found

    def one_pass(self) -> str:
        """How many times as fast low rank in one pass is as the passes apart, on the host."""
        cells = [cell for source in self.of("kernels") for cell in source.cells]
        kernels = [one for cell in cells for one in cell["kernels"] if one["name"].endswith("in one pass")]
        return extent((one["plain_median_s"] / one["median_s"] for one in kernels), ".2f", " times")

    @property
    def methods(self) -> list[str]:
        return [name for name in steps.METHODS if name not in ("FSDP2", "torch's PowerSGD hook, rank 4")]

    @property
    def limit(self) -> str:
        return extent((one.payload["settings"]["limit"] for one in self.of("bandwidth")), "g")

    def all_sources(self) -> list[Source]:
        return [*self.evidence.sources, *(one for apart in self.apart.values() for one in apart.sources)]

    def render(self, page: str) -> str:
        known = {"facts": self, "steps": steps, "others": others, "number": number, "show_size": show_size}
        known |= {
            "before_after": before_after,
            "choosing": choosing,
            "second_order": second_order,
            "sweeps": sweeps,
            "two_levels": two_levels,
            "tolerance": losses.TOLERANCE,
        }
        return render(f"pages/{page}", **known)


def pages(results: Path) -> dict[str, str]:
    """The text of each page, by its file's name."""
    facts = Facts(results)
    return {path.name: facts.render(path.name) for path in sorted(TEMPLATES.glob("*.md"))}


def readme_table(results: Path) -> str:
    return Facts(results).overview()


def with_table(readme: str, table: str) -> str:
    """README with the table between its two markers. Raises MarkersMissing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MarkersMissing(f"README.md has no place for the table: put {BEGIN} and {END} where it is to stand.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def pictures(results: Path, folder: Path) -> None:
    """Draws the pictures of the pages into the folder: map, compression, phases, losses and timeline."""
    facts = Facts(results)
    draw_map(facts.evidence, folder / "map.png")
    shown = [cell for cell in facts.cells(optimizer="sgd") if cell in facts.evidence.chosen.values()]
    four = [cell for cell in steps.in_order(shown) if cell.setting.workers == 4 and cell.rate in ("100mbit", "1gbit")]
    bars.step_parts(four, origin(four), folder / "compression.png")
    two = [cell for cell in steps.in_order(shown) if cell.setting.workers == 2 and bars.profiled(cell)]
    bars.by_phase(two, origin(two), folder / "phases.png")
    compared = [sweep for sweep in facts.sweeps() if sweep.compares]
    losses_figures.at_best_rates(compared, records.provenance(facts.evidence.swept()), folder / "losses.png")
    with tempfile.TemporaryDirectory() as scratch:
        for source in facts.of("demo"):
            demo.draw(source.payload, Path(scratch))
            shutil.copyfile(Path(scratch) / "timeline.png", folder / "timeline.png")


def build(results: Path, docs: Path, readme: Path) -> list[Path]:
    """Writes the pages, the pictures and README's table; returns what was written."""
    folder = docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    written = [readme]
    readme.write_text(with_table(readme.read_text(), readme_table(results)))
    for name, text in pages(results).items():
        (folder / name).write_text(text)
        written.append(folder / name)
    pictures(results, docs)
    return [*written, *(docs / name for name in PICTURES)]
