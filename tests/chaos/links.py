"""Cuts TCP connections between two processes of this machine, from outside."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket

_PIDFD_GETFD = 438  # the system call, the same number on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


def sockets(pid: int) -> dict[tuple[str, str], int]:
    """Established TCP connections of a process: (own address, the other's) to its descriptor."""
    inodes = {}
    with open(f"/proc/{pid}/net/tcp") as table:
        for line in list(table)[1:]:
            fields = line.split()
            if fields[3] == "01":  # established
                inodes[fields[9]] = (fields[1], fields[2])
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:[") and target[8:-1] in inodes:
                found[inodes[target[8:-1]]] = int(name)
    return found


def cut(victim: int, peers: list[int]) -> int:
    """Shuts down every connection between a process and some others; returns how many there were."""
    others = {address for pid in peers for address, _ in sockets(pid)}
    pidfd = os.pidfd_open(victim)
    count = 0
    try:
        for (_, remote), descriptor in sockets(victim).items():
            if remote not in others:
                continue
            copy = _libc.syscall(_PIDFD_GETFD, pidfd, descriptor, 0)
            if copy < 0:
                continue
            with socket.socket(fileno=copy) as connection, contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
                count += 1
    finally:
        os.close(pidfd)
    return count
