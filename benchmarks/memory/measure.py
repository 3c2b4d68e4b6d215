"""Inside a worker: trains one strategy for a few steps, and reads what the kernel and the allocator say of memory."""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..launch import run_or_tell
from ..network.lab import Lab, Loopback
from ..progress import Report
from ..training.gpt import GPT, VOCABULARY
from ..training.strategies import parse_strategy
from ..training.trainer import Trainer, optimizer_factory
from ..worker import Worker

TIMEOUT = 600
HEAD = 64  # width of an attention head


@dataclass(frozen=True)
class Load:
    """What one strategy trains."""

    strategy: str
    optimizer: str
    steps: int
    batch: int  # examples per worker and step
    length: int  # of an example, in bytes: activations are small beside what the model takes
    layers: int
    width: int
    views: bool = True  # DDP's gradient_as_bucket_view; False: DDP as torch builds it where nothing is said
    backend: str = "gloo"
    device: str = "cpu"


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ] + [("keepcost", ctypes.c_size_t)]


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process in memory: now (VmRSS), or at most since it began (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def allocated() -> int | None:
    """Bytes that the C library has given out and not had back, over all threads; None where it does not tell."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # no glibc, or one before 2.33
        return None
    ask.restype = _Mallinfo2
    told = ask()
    return int(told.uordblks + told.hblkhd)


def measure(worker: Worker, experiment: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one strategy; every number is that of the rank with most."""
    load = Load(**experiment)
    group = worker.group()
    numbers, failure = worker.attempt(lambda: _train(load, worker, group, report))
    everyones = [each for each in worker.gather(numbers) if each]
    most = {name: _most([each[name] for each in everyones]) for name in everyones[0]} if everyones else {}
    return {"plan": experiment, "workers": worker.world, "failure": failure, **most}


def _most(values: list[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _train(load: Load, worker: Worker, group: Any, report: Report) -> dict[str, int | None]:
    _warm_up(load)
    base, given_out = resident(), allocated()
    net = GPT(load.layers, load.width, load.width // HEAD)
    size = sum(param.nbytes for param in net.parameters())
    trainer = _build(load, net, group)
    most, most_allocated = 0, 0

    def look() -> None:
        nonlocal most, most_allocated
        most, most_allocated = max(most, resident()), max(most_allocated, allocated() or 0)

    for step in range(load.steps):
        inputs, targets = _examples(load)
        most, most_allocated = 0, 0
        loss = trainer.loss(trainer.model(inputs), targets)
        look()
        loss.backward()
        look()
        trainer.optimizer.step()
        look()
        trainer.optimizer.zero_grad()
        del loss
        if worker.rank == 0:
            report(step + 1, load.steps, f"training {load.strategy}")
    peak = resident("VmHWM")
    trainer.synchronize()
    trainer.close()
    return {
        "parameter_bytes": size,
        "base_bytes": base,  # of the process before there was a model
        "peak_bytes": peak - base,
        "steady_bytes": most - base,  # the most of three moments in the last step
        "allocated_bytes": None if given_out is None else most_allocated - given_out,
    }


def _build(load: Load, net: torch.nn.Module, group: Any) -> Trainer:
    optimizer = optimizer_factory(load.optimizer)
    if load.views:
        return parse_strategy(load.strategy).build(net, optimizer, group)
    model = DistributedDataParallel(net, process_group=group)
    return Trainer(model, optimizer(model))


def _warm_up(load: Load) -> None:
    """What the first step of any model loads into the process is none of the strategy's."""
    net = GPT(1, HEAD, 1)
    trainer = Trainer(net, optimizer_factory(load.optimizer)(net))
    trainer.step(*_examples(load))


def _examples(load: Load) -> torch.Tensor:
    """Inputs and targets: noise, since nothing of it is learnt."""
    return torch.randint(VOCABULARY, (2, load.batch, load.length))


def run_cell(lab: Lab | Loopback, load: Load, report: Report) -> dict[str, Any]:
    """One strategy."""
    return run_or_tell(lab, measure, load, report, TIMEOUT)
