"""Moves groups through their exchanges, many at once, in the same order on every rank.

Note [One lane for each stage]
A compressor describes a group's step as a generator that yields the exchanges it needs. The first exchange of every
group goes through lane 0, the second through lane 1, and so on; in each lane groups follow each other in the order in
which DDP delivered their buckets. So no lane's order depends on when something happened to be ready, whatever the
number of buckets - which is what goes wrong when collectives are started inside future callbacks.

On the host, each stage has a thread that waits for its exchanges and resumes the generators. On a GPU there are no
threads: waiting is stream-ordered, so a generator is run to its end at once, on a stream of its group's own, and the
host never waits.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dear import _C
from dear.collectives import choose_algorithm, group_timeout, make_lane, shard_range


@dataclass(frozen=True)
class Exchange:
    """One collective on a flat tensor.

    ``"reduce_scatter"``: this rank's :func:`dear.shard_range` of ``tensor`` becomes the mean over the ranks.
    ``"all_gather"``: ``tensor`` is completed from every rank's range.
    ``"all_to_all"``: row r of ``tensor`` [ranks, n] goes to rank r; ``received`` [ranks, n] is what came.
    """

    kind: Literal["reduce_scatter", "all_gather", "all_to_all"]
    tensor: Tensor
    received: Tensor | None = None

    def bytes_sent(self, world: int) -> int:
        """What one rank must send."""
        return self.tensor.numel() * self.tensor.element_size() * (world - 1) // world


Steps = Iterator[Exchange]


@dataclass
class _Job:
    steps: Steps
    label: str
    done: Callable[[BaseException | None], None]
    wait: Callable[[], Any] | None = None


class Pipeline:
    """The lanes of one compressor. Jobs are submitted by one thread; ``done`` is called on a stage's thread."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, stages: int, all_to_all: bool) -> None:
        """Collective: every rank must make its pipeline at the same point."""
        self.rank, self.world = group.rank(), group.size()
        timeout = group_timeout(group, device)
        algorithm = choose_algorithm(group, device, None)
        self._lanes = [make_lane(group, f"compress {stage}", algorithm, timeout) for stage in range(stages)]
        self._scatter_group: dist.ProcessGroup | None = None
        if all_to_all and self.world > 1:
            ranks = dist.get_process_group_ranks(group)
            self._scatter_group = dist.new_group(
                ranks, timeout=timeout, use_local_synchronization=True, group_desc="compress all-to-all"
            )
        self._streams: list[Any] = []
        self._next_stream = 0
        self._queues: list[queue.SimpleQueue[_Job | None]] = []
        if device.type == "cuda":
            self._streams = [torch.cuda.Stream(device) for _ in range(4)]
            return
        self._queues = [queue.SimpleQueue() for _ in range(stages)]
        for stage, jobs in enumerate(self._queues):
            # The thread must not keep the pipeline alive: it ends when the compressor is dropped.
            arguments = (weakref.ref(self), jobs, stage)
            threading.Thread(target=_serve, args=arguments, name=f"compress stage {stage}", daemon=True).start()
        weakref.finalize(self, _stop, self._queues)

    def submit(self, steps: Steps, label: str, done: Callable[[BaseException | None], None]) -> None:
        """Runs ``steps`` up to its first exchange, and the rest as the exchanges end; then calls ``done``."""
        job = _Job(steps, label, done)
        if not self._streams:
            self.advance(job, 0)
            return
        stream = self._streams[self._next_stream]
        self._next_stream = (self._next_stream + 1) % len(self._streams)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            try:
                for stage, exchange in enumerate(steps):
                    self._start(exchange, stage, label)()
            except BaseException as error:
                done(error)
            else:
                done(None)

    def advance(self, job: _Job, stage: int) -> None:
        """Resumes a host job whose exchange of the stage before has ended, and hands it to its next stage."""
        try:
            exchange = next(job.steps)
            job.wait = self._start(exchange, stage, job.label)
        except StopIteration:
            job.done(None)
        except BaseException as error:
            job.done(error)
        else:
            self._queues[stage].put(job)

    def _start(self, exchange: Exchange, stage: int, label: str) -> Callable[[], Any]:
        """Starts one exchange; what it returns waits for its end."""
        if exchange.kind == "all_to_all":
            assert exchange.received is not None
            if self._scatter_group is None:
                exchange.received.copy_(exchange.tensor)
                return lambda: None
            work = dist.all_to_all_single(
                exchange.received.view(-1), exchange.tensor.view(-1), group=self._scatter_group, async_op=True
            )
            return lambda: _wait_all_to_all(work, label)
        flat = exchange.tensor.view(-1)
        begin, end = shard_range(flat.numel(), self.world, self.rank)
        phase = _C.Phase.reduce_scatter if exchange.kind == "reduce_scatter" else _C.Phase.all_gather
        return (
            self._lanes[stage].submit(phase, _C.Reduction.average, [(flat, flat[begin:end])], label).wait  # type: ignore[no-any-return]
        )


def _wait_all_to_all(work: Any, label: str) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise RuntimeError(f"The all-to-all of {label} failed, so a peer has died or stalled: {error}") from error


def _serve(owner: weakref.ref[Pipeline], jobs: queue.SimpleQueue[_Job | None], stage: int) -> None:
    while (job := jobs.get()) is not None:
        try:
            assert job.wait is not None
            job.wait()
        except BaseException as error:
            job.done(error)
            continue
        pipeline = owner()
        if pipeline is None:
            return
        pipeline.advance(job, stage + 1)
        del pipeline, job


def _stop(queues: list[queue.SimpleQueue[_Job | None]]) -> None:
    for jobs in queues:
        jobs.put(None)
