"""The network among a group's ranks: the time of each collective at several sizes, and the line through them."""

from __future__ import annotations

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
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _slowest(group: dist.ProcessGroup, seconds: list[float], device: torch.device) -> list[float]:
    """The slowest rank's time of each repeat."""
    each = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(each, dist.ReduceOp.MAX, group=group)
    return [float(one) for one in each.tolist()]


def fitted(measured: Measured) -> dict[str, AlphaBeta]:
    """A line for each phase. Raises ValueError where times follow none, as when a link stalls."""
    lines = {}
    for phase, (sizes, seconds) in measured.items():
        line = lines[phase] = cost_model.fit(sizes, seconds)
        ratios = [line.seconds(size) / each for size, each in zip(sizes, seconds, strict=True)]
        if sum(max(ratio, 1 / ratio) > TOLERANCE for ratio in ratios if ratio) + ratios.count(0) >= 2:
            raise ValueError(f"The times of {phase} follow no line over its sizes: probe again on a quiet network.")
    return lines
