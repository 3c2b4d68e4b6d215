"""A training job that saves checkpoints and resumes from them, as one rank runs it."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from owning import WholeAdamW
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear
from chaos.scenario import CHECKPOINT_EVERY, STEPS, TWO_LEVELS, Scenario

TIMEOUT = 4.0  # seconds of the process group, in a job that is disturbed
PATIENCE = 60.0  # and in one that is not, which must end whatever else the machine does
COMPRESSORS: dict[str, Callable[[], compress.Compressor]] = {
    "acp": lambda: compress.ACPSGD(rank=2),
    "power": lambda: compress.PowerSGD(rank=2),
    "local": lambda: compress.LocalPowerSGD(rank=2),
    "topk": lambda: compress.TopK(density=0.05),
    "sign": lambda: compress.SignSGD(),
    "bf16": lambda: compress.Dense(),
    "int8": lambda: compress.Dense(torch.int8),
}
Tell = Callable[..., None]


class Job:
    """Model, optimizer and what is attached to them."""

    def __init__(self, scenario: Scenario, at: Callable[[str], None]) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 8))
        self.model = DDP(net)
        kind, _, hook = ("sharded", "", "") if scenario.mode == TWO_LEVELS else scenario.mode.partition(" ")
        make = WholeAdamW if kind == "owned" else torch.optim.AdamW
        self.opt = make(self.model.parameters(), lr=0.001)
        at("setup")  # before it, DDP's own exchanges fail with an error of its own
        self.compressor = COMPRESSORS[kind]() if kind in COMPRESSORS else None
        self.engine: Any = None
        if hook:
            compress.register(self.model, self.compressor)
        else:
            update = "replicated" if self.compressor is not None else kind
            nodes = 2 if scenario.mode == TWO_LEVELS and scenario.world == 4 else None
            self.engine = dear.attach(
                self.model, self.opt, update=update, compressor=self.compressor, hierarchy=nodes, bucket_cap_mb=0.2
            )

    def state(self) -> dict[str, Any]:
        """Everything a job needs to go on. Every rank must ask."""
        if self.engine is not None:
            rest = self.engine.state_dict()
        else:
            rest = {"optimizer": self.opt.state_dict(), "compressor": self.compressor.state_dict(gather=True)}
        return {"model": self.model.module.state_dict(), **rest}

    def load(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave."""
        self.model.module.load_state_dict(state.pop("model"))
        if self.engine is not None:
            self.engine.load_state_dict(state)
        else:
            self.compressor.load_state_dict(state["compressor"])
            self.opt.load_state_dict(state["optimizer"])

    def step(self, rank: int, number: int, at: Callable[[str], None]) -> None:
        """One training step; ``at`` is told where it is."""
        generator = torch.Generator().manual_seed(1000 * number + rank)
        x, y = torch.randn(8, 16, generator=generator), torch.randn(8, 8, generator=generator)
        at("forward")
        output = self.model.module[1].register_forward_hook(
            lambda module, args, out: out.register_hook(lambda grad: at("backward")) and None
        )
        loss = F.mse_loss(self.model(x), y)
        output.remove()
        loss.backward()
        at("before step")
        self.opt.step()
        self.opt.zero_grad()
        at("after step")


def train(rank: int, scenario: Scenario, port: int, folder: Path, tell: Tell, disturbed: bool) -> str:
    """Trains to the end, or until something happens; returns a hash of the parameters."""
    limit = timedelta(seconds=TIMEOUT if disturbed else PATIENCE)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=scenario.world, timeout=limit)
    mine = disturbed and rank == scenario.victim and scenario.event in ("kill", "stop")

    def at(place: str, number: int = 0) -> None:
        if mine and number == scenario.step and place == scenario.place:
            end(scenario.event)

    job = Job(scenario, at)
    path, first = folder / "checkpoint.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=False)
        first = saved.pop("steps")
        job.load(saved)
    dist.barrier()
    for number in range(first, STEPS):
        tell("step", number)
        job.step(rank, number, functools.partial(at, number=number))
        if number % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1 and number < STEPS - 1:
            at("checkpoint", number)
            save(job.state(), number + 1, path, rank)
    values = [value.numpy().tobytes() for value in job.model.module.state_dict().values()]
    return hashlib.sha1(b"".join(values)).hexdigest()


def save(state: dict[str, Any], steps: int, path: Path, rank: int) -> None:
    """Rank 0 writes a checkpoint; there is a whole one at all times."""
    if rank == 0:
        torch.save({"steps": steps, **state}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def end(event: str) -> None:
    """This process is killed, or stops for good."""
    os.kill(os.getpid(), signal.SIGKILL if event == "kill" else signal.SIGSTOP)
    time.sleep(1000)
