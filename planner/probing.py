"""The network among a group's ranks: the time of each collective at several sizes, and the line through them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

import dear
from dear import _C, cost_model
from dear.collectives import shard_range
from dear.cost_model import AlphaBeta

#: Where a fitted line is off by this factor at two sizes, there is no line.
TOLERANCE = 4.0
LARGE = 1.25  # by what it may be off at the two largest sizes, where smaller ones passed in a burst

Measured = dict[str, tuple[list[int], list[float]]]


def measure(
    group: dist.ProcessGroup,
    device: torch.device,
    sizes: Sequence[int],
    phases: Sequence[str],
    budget: float,
    repeats: int,
    typical: Callable[[list[float]], float] = statistics.median,
    lanes: Mapping[str, _C.Lane] | None = None,
) -> Measured:
    """The slowest rank's ``typical`` seconds over repeats, by phase, at the sizes (bytes of the whole tensor) for which
    there is time. lanes: in which phases other than an all-reduce move, where there are some already. Collective.

    Every rank measures the same: rank 0's clock says when the budget of seconds is spent, and rank 0 tells.
    """
    world, rank = group.size(), group.rank()
    found: Measured = {}
    begun = time.perf_counter()
    for size in sizes:
        count = max(size // 4 // world, 1) * world
        full, other = torch.zeros(count, device=device), torch.zeros(count, device=device)
        begin, end = shard_range(count, world, rank)
        calls = _calls(group, full, other, torch.zeros(end - begin, device=device))
        calls |= _calls_in_lanes(lanes or {}, full, other, full[begin:end])
        for phase in phases:
            known, seconds = found.setdefault(phase, ([], []))
            known.append(4 * count)
            times = [_timed(group, calls[phase], device) for _ in range(repeats + 1)][1:]
            seconds.append(typical(_slowest(group, times, device)))
        stop = torch.tensor([float(time.perf_counter() - begun > budget)], device=device)
        dist.broadcast(stop, group=group, group_src=0)
        if stop.item() and len(found[phases[0]][0]) >= 2:
            break
    return found


def _calls(
    group: dist.ProcessGroup, full: torch.Tensor, other: torch.Tensor, shard: torch.Tensor
) -> dict[str, Callable[[], object]]:
    return {
        "all_reduce": lambda: dist.all_reduce(full, group=group),
        "reduce_scatter": lambda: dear.reduce_scatter(full, shard, group=group).wait(),
        "all_gather": lambda: dear.all_gather(shard, full, group=group).wait(),
        "all_to_all": lambda: dear.all_to_all(full, other, group=group).wait(),
    }


def _calls_in_lanes(
    lanes: Mapping[str, _C.Lane], full: torch.Tensor, other: torch.Tensor, mine: torch.Tensor
) -> dict[str, Callable[[], object]]:
    outputs = {"reduce_scatter": torch.zeros_like(mine), "all_gather": mine, "all_to_all": other}

    def call(phase: str, lane: _C.Lane) -> Callable[[], object]:
        parts = [(full, outputs[phase])]
        return lambda: lane.submit(getattr(_C.Phase, phase), _C.Reduction.sum, parts, "the probe").wait()

    return {phase: call(phase, lane) for phase, lane in lanes.items()}


def _timed(group: dist.ProcessGroup, call: Callable[[], object], device: torch.device) -> float:
    dist.barrier(group)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # which need not be the current one
    return time.perf_counter() - start


def _slowest(group: dist.ProcessGroup, seconds: list[float], device: torch.device) -> list[float]:
    """The slowest rank's time of each repeat."""
    each = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(each, dist.ReduceOp.MAX, group=group)
    return [float(one) for one in each.tolist()]


def fitted(measured: Measured) -> dict[str, AlphaBeta]:
    """A line for each phase. Raises ValueError where times follow none, as when a link stalls.

    Note [Bursts]
    A link that a token bucket limits lets some 100 KiB through at once after a pause, so small messages pass at the
    speed of the host. A line through all sizes follows these, and promises several times the rate. So where it misses
    the largest sizes, and smaller ones took less than the line through the larger ones says, that line counts. What the
    smallest message took, which waits for no token, is then its alpha.
    """
    return {phase: _line(phase, sizes, seconds) for phase, (sizes, seconds) in measured.items()}


def _line(phase: str, sizes: Sequence[int], seconds: Sequence[float]) -> AlphaBeta:
    whole = cost_model.fit(sizes, seconds)
    follows = sum(miss > TOLERANCE for miss in _misses(whole, sizes, seconds)) < 2
    if follows and _meets_largest(whole, sizes, seconds):
        return whole
    for start in range(1, len(sizes) - 1):  # see Note [Bursts]
        line = AlphaBeta(seconds[0], cost_model.fit(sizes[start:], seconds[start:]).beta)
        smaller = zip(sizes[:start], seconds[:start], strict=True)
        if all(took < line.seconds(size) for size, took in smaller) and _meets_largest(line, sizes, seconds):
            return line
    if not follows:
        raise ValueError(f"The times of {phase} follow no line over its sizes: probe again on a quiet network.")
    return whole


def _misses(line: AlphaBeta, sizes: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """By which factor it is off at each size."""
    ratios = [line.seconds(size) / each for size, each in zip(sizes, seconds, strict=True)]
    return [max(ratio, 1 / ratio) if ratio else math.inf for ratio in ratios]


def _meets_largest(line: AlphaBeta, sizes: Sequence[int], seconds: Sequence[float]) -> bool:
    return max(_misses(line, sizes, seconds)[-2:]) <= LARGE
