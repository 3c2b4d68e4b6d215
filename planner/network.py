"""What a collective costs on a network: lines over the bytes of the whole buffer, by phase and level.

Flat networks, trees and two levels differ in their lines alone, so what is simulated costs the same for 4 workers and
for 4,096. Sources of the formulas: Patarasu and Yuan, 2009 (ring); Thakur, Rabenseifner and Gropp, 2005 (recursive
halving and doubling; here "tree").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dear.cost_model import AlphaBeta

LINK = "link"  # the one of a flat network
PHASES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
ALGORITHMS = ("ring", "tree")


@dataclass(frozen=True)
class Hop:
    """One level's part of a collective: ``line`` over the buffer's bytes, of which beta occupies the link."""

    line: AlphaBeta
    link: str = LINK
    share: float = 1.0  # of the buffer, that a worker sends over the link


@dataclass(frozen=True)
class Network:
    """Lines of each phase among ``workers`` workers. bursts: by link, seconds of it that a shaper lets through at once
    after a pause."""

    workers: int
    phases: Mapping[str, tuple[Hop, ...]]
    bursts: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, phase: str, bytes_: float) -> float:
        """A collective by itself."""
        return sum(hop.line.seconds(bytes_) for hop in self.phases[phase]) if bytes_ else 0.0

    def sent(self, phase: str, bytes_: float) -> float:
        """Bytes that a worker sends."""
        return sum(hop.share for hop in self.phases[phase]) * bytes_


def slowest(links: Sequence[AlphaBeta]) -> AlphaBeta:
    """A ring is as slow as its slowest link, a tree as the slowest on its way: both meet every worker's."""
    if not links:
        raise ValueError("A network needs one link at least, and none was given.")
    return AlphaBeta(max(link.alpha for link in links), max(link.beta for link in links))


def flat(link: AlphaBeta, workers: int, algorithm: str = "ring") -> Network:
    """Workers at links of equal speed; see :func:`slowest` for unequal ones."""
    return Network(workers, _level(link, workers, algorithm, LINK, 1.0))


def two_level(inner: AlphaBeta, devices: int, outer: AlphaBeta, nodes: int, algorithm: str = "ring") -> Network:
    """Reduced inside each node first, then between nodes; gathered the other way round.

    inner: between two devices of a node. outer: of a node's network card, which its devices share: each carries its
    part of the buffer, and together all of it.
    """
    within = _level(inner, devices, algorithm, "inner", 1.0)
    between = _level(outer, nodes, algorithm, LINK, 1.0 / devices)
    return Network(devices * nodes, {phase: within[phase] + between[phase] for phase in PHASES})


def measured(workers: int, lines: Mapping[str, AlphaBeta]) -> Network:
    """Of fitted lines by phase. One that is missing follows from the others: an all-reduce is its two halves, a half
    is half an all-reduce, an all-to-all costs what a reduce-scatter does."""
    known = dict(lines)
    whole = known.get("all_reduce")
    for half in ("reduce_scatter", "all_gather"):
        if half not in known:
            if whole is None:
                raise ValueError(f"Neither {half} nor all_reduce was measured: give one of them.")
            known[half] = AlphaBeta(whole.alpha / 2, whole.beta / 2)
    first, second = known["reduce_scatter"], known["all_gather"]
    known.setdefault("all_reduce", AlphaBeta(first.alpha + second.alpha, first.beta + second.beta))
    known.setdefault("all_to_all", first)
    part = (workers - 1) / workers
    shares = {phase: part * (2 if phase == "all_reduce" else 1) for phase in PHASES}
    return Network(workers, {phase: (Hop(known[phase], share=shares[phase]),) for phase in PHASES})


def _level(link: AlphaBeta, workers: int, algorithm: str, name: str, each: float) -> dict[str, tuple[Hop, ...]]:
    """each: the part of the buffer that one worker takes part in, where several share the link."""
    if workers < 1:
        raise ValueError(f"A network has 1 worker or more, not {workers}.")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, not {algorithm!r}.")
    if workers == 1:
        return {phase: () for phase in PHASES}
    rounds = workers - 1 if algorithm == "ring" else math.ceil(math.log2(workers))
    part = (workers - 1) / workers
    half = Hop(AlphaBeta(rounds * link.alpha, part * link.beta), name, part * each)
    whole = Hop(AlphaBeta(2 * rounds * link.alpha, 2 * part * link.beta), name, 2 * part * each)
    direct = Hop(AlphaBeta((workers - 1) * link.alpha, part * link.beta), name, part * each)
    return {"all_reduce": (whole,), "reduce_scatter": (half,), "all_gather": (half,), "all_to_all": (direct,)}
