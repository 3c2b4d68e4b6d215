"""Ends what a lab started: every process that carries the lab's mark in its environment.

A mark in the environment is inherited by whatever a worker starts, so shells, launchers and daemons are found too,
and needs no rights beyond those of the user. Run as a program, it waits for its standard input to end, which happens
when the lab's owner exits in whatever way, `kill -9` included, and then ends the lab's processes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

MARK = "DEAR_LAB"


def marked(value: str) -> list[int]:
    """The processes whose environment holds MARK=value, zombies excepted (they have none)."""
    wanted = f"{MARK}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environ = (entry / "environ").read_bytes()
            except OSError:  # gone, or somebody else's
                continue
            if wanted in environ.split(b"\0"):
                found.append(int(entry.name))
    return found


def end_all(value: str) -> None:
    """Kills them until two looks in a row find none: a process being started takes the mark only when it runs."""
    quiet = 0
    while quiet < 2:
        pids = marked(value)
        quiet = 0 if pids else quiet + 1
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_all(sys.argv[1])


if __name__ == "__main__":
    main()
