"""The lanes in which a compressor's exchanges move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from compress.contract import Contract
from dear import _C
from dear._nodes import Nodes, make_lane_by_levels, timeout_after
from dear.collectives import Algorithm, make_lane


@dataclass(frozen=True)
class Lanes:
    """The lanes of a compressor by stage: of all-to-alls, None where there is none; and one over all ranks."""

    by_stage: list[_C.Lane]
    all_to_alls: list[_C.Lane | None]
    everyone: _C.Lane


def most_exchanges(compressor: Contract) -> int:
    """Of any step: a dense one makes two."""
    return max(2, compressor.exchanges)


def one_level_lanes(compressor: Contract, given: Sequence[_C.Lane], algorithm: Algorithm, timeout: timedelta) -> Lanes:
    """Lanes over all ranks; ``given`` are those for the first stages that there are already. Collective."""
    ranks, stages = compressor.ranks(), list(given)
    for stage in range(len(stages), most_exchanges(compressor)):
        stages.append(make_lane(ranks, f"compress {stage}", algorithm, timeout))
    all_to_alls: list[_C.Lane | None] = [None] * len(stages)
    for stage in compressor.all_to_alls:
        all_to_alls[stage] = make_lane(ranks, f"compress all-to-all {stage}", algorithm, timeout, all_to_all=True)
    return Lanes(stages, all_to_alls, stages[1])


def two_level_lanes(compressor: Contract, algorithm: Algorithm, timeout: timedelta, nodes: Nodes) -> Lanes:
    """A lane inside the node for the first and the last stage; between nodes those of the compressor. Collective."""
    ranks, inside, between = compressor.ranks(), nodes.inside, nodes.between
    second, third = (timeout_after(before, timeout) for before in (1, 2))
    stages = [make_lane(ranks, "compress in node", algorithm, timeout, ranks=inside)]
    for stage in range(most_exchanges(compressor)):
        stages.append(make_lane(ranks, f"compress between {stage}", algorithm, second, ranks=between))
    stages.append(make_lane(ranks, "compress to node", algorithm, third, ranks=inside))
    all_to_alls: list[_C.Lane | None] = [None] * len(stages)
    for stage in compressor.all_to_alls:
        all_to_alls[stage + 1] = make_lane(
            ranks, f"compress all-to-all {stage}", algorithm, second, all_to_all=True, ranks=between
        )
    return Lanes(stages, all_to_alls, make_lane_by_levels(ranks, "compress everyone", algorithm, timeout, nodes))
