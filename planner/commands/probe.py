"""python -m dear probe: under torchrun, mpirun or srun, measures each collective at several sizes; rank 0 writes the
cluster file that ``plan --cluster`` reads.

    torchrun --nproc-per-node 2 -m dear probe --out cluster.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dear
from dear.cost_model import AlphaBeta

from .. import probing
from ..codec_timing import measured_costs
from ..codecs import Cost
from ..devices import device
from ..instruments import cores, exchange_cpu
from ..machine import Host
from ..network import PHASES
from ..probing import Measured, fitted
from ..writing import HERE, check_json, check_writable, json_option, write_json

SIZES = tuple(1 << power for power in (12, 15, 18, 20, 22, 24))  # bytes of the whole tensor
REPEATS = 7
ATTEMPTS = 2  # what else a machine does may spoil one
COMPRESSORS = (
    "bf16", "fp16", "int8", "fp8", "int4", "int3", "int2", "sign", "topk:0.01", "power:4", "power:8", "acp:4",
)  # fmt: skip
SHAPES = ((768, 768), (768, 768), (768,))  # of what they are timed on: BERT-Base's attention
MOST_SECONDS = 3600.0
HOW_TO_START = "start it as torchrun --nproc-per-node 2 -m dear probe, or under mpirun or srun"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("cluster.yaml"), help="the cluster file (cluster.yaml)")
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long to measure (30)")
    parser.add_argument("--backend", help="of torch.distributed; NCCL where there is CUDA, else gloo")
    parser.add_argument("--device", default="a100", help="what plan takes the workers for, until you say otherwise")
    json_option(parser, "every time, and the lines through them")


def run(given: argparse.Namespace) -> None:
    if not 0 < given.seconds < MOST_SECONDS:
        raise ValueError(f"--seconds must be above 0, and below {MOST_SECONDS:.0f}.")
    device(given.device)  # plan shall know it
    check_writable("--out", given.out)
    check_json(given.json)
    try:
        dear.init_process_group(given.backend, timeout=timedelta(seconds=max(60.0, 4 * given.seconds)))
    except RuntimeError as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"The probe could not begin ({why}): {HOW_TO_START}.") from error
    try:
        measured = measure(given.seconds)
        costs, shared = compressors(), host()
        if dist.get_rank() == 0:
            lines = fitted(measured)
            write(given.out, dist.get_world_size(), lines, given.device, costs, shared)
            write_json(given.json, account(dist.get_world_size(), measured, lines, costs, shared))
            if given.json != HERE:
                print(f"The cluster file is {given.out}: python -m dear plan --cluster {given.out} --model NAME")
    except RuntimeError as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"The network could not be measured ({why}): see what stalls, and probe again.") from error
    finally:
        dist.destroy_process_group()


def measure(budget: float) -> Measured:
    """The slowest rank's median seconds over all ranks, by phase. Collective.

    Raises ValueError, on every rank, where times follow no line twice.
    """
    if dist.get_world_size() < 2:
        raise ValueError("A probe needs 2 workers or more: start it with torchrun, mpirun or srun.")
    place = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    group = dist.group.WORLD
    assert group is not None
    for attempt in range(ATTEMPTS):
        measured = probing.measure(group, place, SIZES, PHASES, budget / ATTEMPTS, REPEATS)
        try:
            fitted(measured)
            break
        except ValueError:  # the same on every rank
            if attempt == ATTEMPTS - 1:
                raise
    return measured


def compressors() -> dict[str, Cost]:
    """What each costs this rank, where gradients are host tensors; all ranks measure at once, as they train."""
    group = dist.group.WORLD
    assert group is not None
    return {} if dist.get_backend() == "nccl" else measured_costs(COMPRESSORS, group, SHAPES)


def host() -> Host | None:
    """What exchanging takes of the cores that compute, on the rank that has the least; None where gradients are no host
    tensors. Collective."""
    group = dist.group.WORLD
    assert group is not None
    if dist.get_backend() == "nccl":
        return None
    most = torch.tensor([exchange_cpu(group, REPEATS), 1 / cores(group)], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    busy, workers_a_core = most.tolist()
    return Host(1 / workers_a_core, busy)


def write(
    path: Path,
    workers: int,
    lines: dict[str, AlphaBeta],
    named: str,
    costs: Mapping[str, Cost] | None = None,
    shared: Host | None = None,
) -> None:
    import yaml

    collectives = {phase: {"alpha": float(line.alpha), "beta": float(line.beta)} for phase, line in lines.items()}
    described = {"nodes": workers, "measured_workers": workers, "device": named, "collectives": collectives}
    if costs:
        described["compressors"] = {name: asdict(cost) for name, cost in costs.items()}
    if shared is not None:  # the hook is no measurement
        described["host"] = {"cores": shared.cores, "exchange_cpu": shared.exchange_cpu}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Measured by python -m dear probe; seconds, and seconds per byte.\n{yaml.safe_dump(described)}")


def account(
    workers: int,
    measured: Measured,
    lines: Mapping[str, AlphaBeta],
    costs: Mapping[str, Cost],
    shared: Host | None = None,
) -> dict[str, Any]:
    """All that was measured: seconds of the slowest rank by size, the line through them, compressors, and what
    exchanges take of the host."""
    collectives = {
        phase: {
            "bytes": sizes,
            "seconds": seconds,
            "alpha": float(lines[phase].alpha),
            "beta": float(lines[phase].beta),
        }
        for phase, (sizes, seconds) in measured.items()
    }
    compressors = {name: asdict(cost) for name, cost in costs.items()}
    return {
        "label": "measured",
        "workers": workers,
        "collectives": collectives,
        "compressors": compressors,
        "host": asdict(shared) if shared is not None else None,
    }
