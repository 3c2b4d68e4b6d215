"""Runs a benchmark as a command: follows its progress, keeps all it says, and ends it properly on an interrupt."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from benchmarks.records import ROOT

# After an interrupt a benchmark ends its workers and takes the network down; that takes a second or two.
SECONDS_TO_END = 30

# What launch.progress_bar prints where there is no terminal: "cell 2 of 6: 2 workers, 1gbit · 35% · round 2".
_PROGRESS = re.compile(r"(?:cell (\d+) of (?:at most )?(\d+).*)? · +(\d+)% · ([^·]*)")
# And what cells.obtain says of a cell that it found finished.
_RESUMED = re.compile(r"cell (\d+) of (?:at most )?(\d+): .*: resumed")
RESUMED = "resumed"


@dataclass(frozen=True)
class Ended:
    """How a command ended. `reason` is the last thing that it said; empty if all went well."""

    status: int
    reason: str
    log: Path


def run(command: Sequence[str], log: Path, report: Callable[[float, str], None], show: Callable[[str], None]) -> Ended:
    """Runs the command from the root of this checkout's packages until it ends.

    Its standard output and error go to `log`, and line by line to `show`, those that tell its progress to `report`
    instead: (share done, what is being done). On KeyboardInterrupt, or a polite end of this process, the command is
    interrupted once, waited for, and KeyboardInterrupt raised.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    last = ""
    # SIGINT among them: a shell's background job inherits it as ignored, and would hand that on to the benchmark.
    with log.open("w") as kept, _interrupted_by(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process = subprocess.Popen(
            command,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C would reach it too, and a second one cut its tidying short
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                kept.write(line)
                progress = share_done(line)
                if progress:
                    report(*progress)
                    continue
                show(line.rstrip())
                last = line.strip() or last
            status = process.wait()
        except BaseException:
            _end(process)
            raise
    return Ended(status, last if status else "", log)


def share_done(line: str) -> tuple[float, str] | None:
    """The share of a whole command that a line of progress tells, and what is being done; None for any other line."""
    if resumed := _RESUMED.search(line):
        return int(resumed[1]) / int(resumed[2]), RESUMED
    found = _PROGRESS.search(line)
    if not found:
        return None
    cell, cells, percent, doing = found.groups()
    within = int(percent) / 100
    return ((int(cell) - 1 + within) / int(cells) if cell else within), doing.strip()


def _end(process: subprocess.Popen[Any]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its leader and whatever it left; its workers have their reaper
        process.wait()


@contextmanager
def _interrupted_by(*signals: signal.Signals) -> Iterator[None]:
    """Turns these signals into KeyboardInterrupt meanwhile."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = {one: signal.signal(one, interrupt) for one in signals}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
