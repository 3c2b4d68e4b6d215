"""Runs scenarios: processes, what befalls them, and the verdict."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer's first step imports it, which takes each rank a second: before they are forked
import torch.distributed as dist

from chaos.job import PATIENCE, TIMEOUT, train
from chaos.links import cut
from chaos.scenario import Scenario

SLACK = 30.0  # seconds beyond the group's timeout that a busy machine may take
BLAME = re.compile(r"Rank (\d+)(?: and rank (\d+) lost a connection between them)?")


@dataclasses.dataclass
class Ending:
    """How one rank ended: with a result, an error, or neither."""

    result: str | None = None
    error: str | None = None
    exitcode: int | None = None  # None: it had to be killed
    hung: bool = False


@dataclasses.dataclass
class Report:
    """What became of a scenario. ``resumed``: whether the resumed job ended with the right bits; None: not tried."""

    scenario: Scenario
    named: bool = True
    hung: bool = False
    crashed: bool = False
    resumed: bool | None = None
    undisturbed: bool = False  # it came too late to matter
    texts: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Report:
        """What :meth:`record` gave."""
        return cls(**record | {"scenario": Scenario(**record["scenario"])})


class Child:
    """A forked process that runs one rank; torch is loaded already."""

    def __init__(self, rank: int, scenario: Scenario, port: int, folder: Path, disturbed: bool) -> None:
        self.rank, self.ending = rank, Ending()
        self.connection, theirs = Pipe()
        self.log = folder / f"rank{rank}.log"
        self.pid = os.fork()
        if self.pid == 0:
            self.connection.close()
            _child(rank, scenario, port, folder, disturbed, theirs, self.log)
        theirs.close()

    def signal(self, number: int) -> None:
        """Sends a signal, if it lives."""
        if self.ending.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def reap(self, deadline: float) -> None:
        """Waits for its end; kills it at the deadline."""
        while self.ending.exitcode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ending.exitcode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                self.ending.hung = True
                self.signal(signal.SIGKILL)
                deadline = float("inf")
            else:
                time.sleep(0.01)


def _child(
    rank: int, scenario: Scenario, port: int, folder: Path, disturbed: bool, connection: Connection, log: Path
) -> None:
    """Never returns: ends by leaving the interpreter, as a script does."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    try:
        result = train(rank, scenario, port, folder, lambda *message: connection.send(message), disturbed)
        connection.send(("result", result))
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))
    connection.close()
    # As at the end of a script: threads are joined, atexit runs, what hangs in circles is freed. The interpreter's own
    # clean-up, which takes seconds where several processes share a core, is left out.
    gc.collect()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    os._exit(0)


class Store:
    """A process that holds the rendezvous store, and outlives every rank."""

    def __init__(self) -> None:
        ours, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            theirs.send(store.port)
            time.sleep(1000)
            os._exit(0)
        self.port = ours.recv()

    def end(self) -> None:
        """Ends it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def start(scenario: Scenario, folder: Path, disturbed: bool) -> list[Ending]:
    """One job from its start, or its checkpoint, to the end of all its ranks."""
    store = Store()
    children = [Child(rank, scenario, store.port, folder, disturbed) for rank in range(scenario.world)]
    try:
        _watch(scenario, children, disturbed)
    finally:
        for child in children:
            child.signal(signal.SIGKILL)
            child.reap(float("inf"))
        store.end()
    return [child.ending for child in children]


def _watch(scenario: Scenario, children: list[Child], disturbed: bool) -> None:
    victim = children[scenario.victim]
    gone = disturbed and scenario.event in ("kill", "stop")  # the victim tells no more
    due = disturbed and scenario.place == "any"
    open_ = {child.connection: child for child in children}
    deadline = time.monotonic() + 2 * (TIMEOUT if disturbed else PATIENCE) + SLACK
    while open_:
        if gone and all(child is victim for child in open_.values()) and victim.ending.result is None:
            break
        ready = wait(list(open_), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            child = open_[connection]
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionResetError):
                del open_[connection]
                continue
            if kind == "result":
                child.ending.result = value
            elif kind == "error":
                child.ending.error = value
            elif due and child is victim and value == scenario.step:
                due = False
                _strike(scenario, children)
    for child in children:
        if child is victim and gone and child.ending.result is None:
            continue
        child.ending.hung = child.connection in open_
        child.reap(time.monotonic() + (0.0 if child.ending.hung else SLACK))


def _strike(scenario: Scenario, children: list[Child]) -> None:
    time.sleep(scenario.delay)
    victim = children[scenario.victim]
    if scenario.event == "kill":
        victim.signal(signal.SIGKILL)
    elif scenario.event == "stop":
        victim.signal(signal.SIGSTOP)
    elif scenario.event == "pause":
        victim.signal(signal.SIGSTOP)
        time.sleep(0.3)
        victim.signal(signal.SIGCONT)
    else:
        cut(victim.pid, [child.pid for child in children if child is not victim])


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one scenario. tempfile's own class would remove it when a forked child ends, too."""
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Chaos:
    """Runs scenarios one after another; what an undisturbed job gives is found once for each kind of job."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()  # or every child would copy the pages that its collector looks at
        self._references: dict[tuple[int, str], str] = {}

    def reference(self, scenario: Scenario) -> str:
        """The hash with which an undisturbed job of this kind ends."""
        key = scenario.world, scenario.mode
        if key not in self._references:
            with scratch() as folder:
                endings = start(scenario, folder, disturbed=False)
            results = {ending.result for ending in endings}
            if len(results) > 1 or None in results:
                raise RuntimeError(f"An undisturbed job of {key} failed: {endings}.")
            (self._references[key],) = results
        return self._references[key]

    def run(self, scenario: Scenario) -> Report:
        """One scenario: the job is disturbed, and resumes from its last checkpoint."""
        want = self.reference(scenario)
        report, begin = Report(scenario), time.monotonic()
        with scratch() as folder:
            endings = start(scenario, folder, disturbed=True)
            self._validate(report, endings, want, folder)
            if not report.undisturbed and not report.hung:
                again = start(scenario, folder, disturbed=False)
                report.resumed = all(ending.result == want for ending in again)
                report.texts += [f"resumed: {e.error}" for e in again if e.error]
        report.seconds = round(time.monotonic() - begin, 2)
        return report

    def _validate(self, report: Report, endings: list[Ending], want: str, folder: Path) -> None:
        scenario = report.scenario
        if all(ending.result == want and ending.exitcode == 0 for ending in endings):
            report.undisturbed = True
            return
        for rank, ending in enumerate(endings):
            if rank == scenario.victim and scenario.event in ("kill", "stop"):
                continue
            if ending.hung:
                report.hung = True
                report.texts.append(f"rank {rank} hung: {_tail(folder / f'rank{rank}.log')}")
            elif ending.exitcode != 0:
                report.crashed = True
                report.texts.append(f"rank {rank} ended with {ending.exitcode}: {_tail(folder / f'rank{rank}.log')}")
            elif ending.error is not None:
                blamed = named(ending.error, both=scenario.event == "cut")
                right = scenario.victim in blamed or (rank == scenario.victim and bool(blamed))
                if not right or scenario.event == "pause":
                    report.named = False
                    report.texts.append(f"rank {rank}: {ending.error[:400]}")
            elif ending.result != want and ending.result is not None:
                report.resumed = False
                report.texts.append(f"rank {rank} ended with other bits")


def named(sentence: str, both: bool) -> set[int]:
    """Whom a sentence blames; ``both``: also the second of two ranks, where it says that their connection broke."""
    found = BLAME.search(sentence)
    if found is None:
        return set()
    return {int(rank) for rank in found.groups()[: 2 if both else 1] if rank is not None}


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:] if log.exists() else ""
