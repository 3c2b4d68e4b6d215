"""The table of what compressors cost in loss, from stored trainings: python -m benchmarks.convergence.table"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..losses import DENSE
from ..records import RESULTS
from .best import best

TABLE = Path(__file__).resolve().parent.parent.parent / "compress" / "losses.json"
SEEDS = 3  # of both a method and dense, at least
PLAIN = ("power", "acp", "topk", "sign", "bf16", "fp16", "int8", "fp8")  # methods that have a name of their own
#: Presets, as stored runs spell them, with a start of their warm-up's length.
PRESETS = {"int3:scale=element:start=150:first=int8": "safe", "fast:start=150": "fast"}


def trainings(results: Path) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Cells by what they train, over all files of the convergence benchmark."""
    found: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(results.glob("convergence*.json")):
        for cell in json.loads(path.read_text())["cells"]:
            experiment = cell["plan"]
            same = (
                experiment.get("workload") or "gpt",
                experiment["steps"],
                experiment.get("schedule"),
                experiment.get("held_out_examples"),
                cell["workers"],
            )
            found[same].append(cell)
    return found


def table(results: Path = RESULTS) -> dict[str, Any]:
    """By method: how far above dense it ended at worst, and in how many trainings it was compared."""
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    for cells in trainings(results).values():
        found = best(_once(cells))
        dense = {one.optimizer: one for one in found if one.strategy == DENSE}
        for one in found:
            method = _method(one.strategy)
            ratio = one.over(dense[one.optimizer], SEEDS) if one.optimizer in dense else None
            if ratio is not None and method is not None:
                ratios[method].append(ratio - 1)
    methods = {name: {"above": round(max(each), 4), "trainings": len(each)} for name, each in sorted(ratios.items())}
    return {"made by": "python -m benchmarks.convergence.table", "methods": methods}


def _method(strategy: str) -> str | None:
    """Its name in the table; None for what has none there."""
    kind, *options = strategy.split(":")
    return strategy if kind in PLAIN and len(options) < 2 else PRESETS.get(strategy)


def _once(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Files of one training repeat its dense runs."""
    keys = ("strategy", "optimizer", "learning_rate", "seed")
    return list({tuple(cell["plan"][key] for key in keys): cell for cell in cells}.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence.table", description=__doc__)
    parser.add_argument("--out", type=Path, default=TABLE, help="where it goes")
    given = parser.parse_args()
    given.out.write_text(json.dumps(table(), indent=1) + "\n")


if __name__ == "__main__":
    main()
