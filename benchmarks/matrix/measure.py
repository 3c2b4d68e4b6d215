"""Runs a benchmark as a command: follows its progress, keeps all it says, and ends it properly on an interrupt."""

import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .. import progress
from ..processes import Processes, TimedOut, python_path

# After an interrupt a benchmark ends its workers and takes the network down; that takes a second or two.
SECONDS_TO_END = 30


@dataclass(frozen=True)
class Ended:
    """How a command ended. `reason` is the last thing that it said; empty if all went well."""

    status: int
    reason: str
    log: Path
    cut: bool = False  # it was interrupted, since its time was over


def run(
    command: Sequence[str],
    log: Path,
    report: Callable[[progress.Step], None],
    show: Callable[[str], None],
    limit: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Ended:
    """Runs the command until it ends, or is interrupted after `limit` seconds. env: added to the environment.

    Its standard output and error go to `log`, and line by line to `show`, those that tell its progress to `report`
    instead. On KeyboardInterrupt, or a polite end of this process, the command is interrupted once, waited for, and
    KeyboardInterrupt raised.
    """
    environment = {**python_path(), **progress.as_json, "PYTHONUNBUFFERED": "1", **(env or {})}
    last, cut = "", False
    # SIGINT among them: a shell's background job inherits it as ignored, and would hand that on to the benchmark.
    with (
        log.open("w") as file,
        _interrupted_by(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
        Processes() as processes,
    ):

        def follow(_: int, line: str) -> None:
            nonlocal last
            file.write(f"{line}\n")
            if step := progress.read(line):
                report(step)
            else:
                show(line.rstrip())
                last = line.strip() or last

        def wait(seconds: float | None) -> None:
            processes.wait([child], seconds, check=False, on_line=follow)

        def interrupt() -> None:
            if child.process.returncode is None:
                child.process.send_signal(signal.SIGINT)
                with suppress(TimedOut):
                    wait(SECONDS_TO_END)

        child = processes.start(command, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            wait(limit)
        except TimedOut:
            cut = True
            interrupt()
            child.end()
        except BaseException:
            interrupt()
            raise
    status = child.returncode
    return Ended(status, last if status else "", log, cut and status != 0)


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
