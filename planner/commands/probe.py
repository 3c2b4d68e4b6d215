"""python -m dear probe: under torchrun, mpirun or srun, measures each collective at several sizes; rank 0 writes the
cluster file that ``plan --cluster`` reads.

    torchrun --nproc-per-node 2 -m dear probe --out cluster.yaml
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import dear
from dear import cost_model
from dear.collectives import shard_range
from dear.cost_model import AlphaBeta

SIZES = tuple(1 << power for power in (12, 15, 18, 20, 22, 24))  # bytes of the whole tensor
REPEATS = 7
#: Where a fitted line is off by this factor at two sizes, there is no line.
TOLERANCE = 4.0

Measured = dict[str, tuple[list[int], list[float]]]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("cluster.yaml"), help="the cluster file (cluster.yaml)")
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long to measure (30)")
    parser.add_argument("--backend", help="of torch.distributed; NCCL where there is CUDA, else gloo")
    parser.add_argument("--device", default="a100", help="what plan takes the workers for, until you say otherwise")


def run(given: argparse.Namespace) -> None:
    if not given.seconds > 0:
        raise ValueError("--seconds must be above 0.")
    dear.init_process_group(given.backend, timeout=timedelta(seconds=max(60.0, 4 * given.seconds)))
    try:
        measured = measure(given.seconds)
        if dist.get_rank() == 0:
            write(given.out, dist.get_world_size(), fitted(measured), given.device)
            print(f"The cluster file is {given.out}: python -m dear plan --cluster {given.out} --model NAME")
    except RuntimeError as error:
        raise ValueError(f"The network could not be measured ({error}).") from error
    finally:
        dist.destroy_process_group()


def measure(budget: float) -> Measured:
    """The slowest rank's median seconds, by phase, at the sizes for which there is time. Collective.

    Every rank measures the same: rank 0's clock says when to stop, and rank 0 tells.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    world, rank = dist.get_world_size(), dist.get_rank()
    if world < 2:
        raise ValueError("A probe needs 2 workers or more: start it with torchrun, mpirun or srun.")
    found: Measured = {}
    begun = time.perf_counter()
    for size in SIZES:
        count = max(size // 4 // world, 1) * world
        full, other = torch.zeros(count, device=device), torch.zeros(count, device=device)
        begin, end = shard_range(count, world, rank)
        shard = torch.zeros(end - begin, device=device)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda full=full: dist.all_reduce(full),  # type: ignore[misc]
            "reduce_scatter": lambda full=full, shard=shard: dear.reduce_scatter(full, shard).wait(),  # type: ignore[misc]
            "all_gather": lambda full=full, shard=shard: dear.all_gather(shard, full).wait(),  # type: ignore[misc]
            "all_to_all": lambda full=full, other=other: dear.all_to_all(full, other).wait(),  # type: ignore[misc]
        }
        for phase, call in calls.items():
            sizes, seconds = found.setdefault(phase, ([], []))
            sizes.append(4 * count)
            seconds.append(_slowest([_timed(call, device) for _ in range(REPEATS + 1)][1:], device))
        stop = torch.tensor([float(time.perf_counter() - begun > budget)], device=device)
        dist.broadcast(stop, 0)
        if stop.item() and len(found["all_reduce"][0]) >= 2:
            break
    return found


def _timed(call: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _slowest(seconds: list[float], device: torch.device) -> float:
    """The median over repeats of the slowest rank's time."""
    each = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(each, dist.ReduceOp.MAX)
    return statistics.median(each.tolist())


def fitted(measured: Measured) -> dict[str, AlphaBeta]:
    """A line for each phase. Raises ValueError where times follow none, as when a link stalls."""
    lines = {}
    for phase, (sizes, seconds) in measured.items():
        line = lines[phase] = cost_model.fit(sizes, seconds)
        ratios = [line.seconds(size) / each for size, each in zip(sizes, seconds, strict=True)]
        if sum(max(ratio, 1 / ratio) > TOLERANCE for ratio in ratios if ratio) + ratios.count(0) >= 2:
            raise ValueError(f"The times of {phase} follow no line over its sizes: probe again on a quiet network.")
    return lines


def write(path: Path, workers: int, lines: dict[str, AlphaBeta], device: str) -> None:
    import yaml

    collectives = {phase: {"alpha": float(line.alpha), "beta": float(line.beta)} for phase, line in lines.items()}
    described = {"nodes": workers, "device": device, "collectives": collectives}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Measured by python -m dear probe; seconds, and seconds per byte.\n{yaml.safe_dump(described)}")
