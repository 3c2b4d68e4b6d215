"""Ranks in one process, each on a thread of its own, with somebody between them who may change what passes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dear import _C

# Gets the place in the stream of what passes towards the callee, and what passes; may alter it.
Change = Callable[[int, bytearray], None]

# What a caller sends before its first frame, and the length of a frame's header.
HELLO, HEADER = 40, 24


class Between:
    """Every connection to `port` goes on to `target`."""

    def __init__(self, target: tuple[str, int], change: Change) -> None:
        self._target, self._change = target, change
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                callee = socket.create_connection(self._target)
                self._ends += [caller, callee]
                for ends in ((caller, callee, self._change), (callee, caller, unchanged)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def cut(self) -> None:
        """Ends every connection, as seen from both of its ends."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket, change: Change) -> None:
        """Until one end hangs up, or ``change`` raises OSError: then both are. What a sink has sent before it hung up
        is passed all the same."""
        at = 0
        try:
            while data := bytearray(source.recv(1 << 16)):
                size = len(data)
                change(at, data)
                at += size
                try:
                    sink.sendall(data)
                except OSError:
                    return
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def unchanged(at: int, data: bytearray) -> None:
    """Lets everything pass."""


def flip(place: int) -> Change:
    """Flips a bit of the byte at `place`."""

    def change(at: int, data: bytearray) -> None:
        if at <= place < at + len(data):
            data[place - at] ^= 4

    return change


def overwrite(place: int, new: bytes) -> Change:
    def change(at: int, data: bytearray) -> None:
        for i, byte in enumerate(new):
            if at <= place + i < at + len(data):
                data[place + i - at] = byte

    return change


class Watched(dist.Store):
    """A store in which `seen` gets each rank's address as it is published, and returns the port to publish instead."""

    def __init__(self, inner: dist.Store, seen: Callable[[int, str, int], int]) -> None:
        super().__init__()
        self._inner, self._seen = inner, seen

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        if "/address/" in key:
            words = bytes(value).decode().split()
            words[2] = str(self._seen(int(key.rsplit("/", 1)[1]), words[1], int(words[2])))
            value = " ".join(words).encode()
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        return self._inner.get(key)

    def check(self, keys: list[str]) -> bool:
        return self._inner.check(keys)


def changing(victim: int, change: Change) -> dist.Store:
    """A store that puts somebody before rank `victim` who changes what it receives."""

    def seen(rank: int, host: str, port: int) -> int:
        return Between((host, port), change).port if rank == victim else port

    return Watched(dist.HashStore(), seen)


def hanging_up(times: int) -> dist.Store:
    """A store that puts somebody before every rank who hangs up on the first so many callers."""

    def seen(rank: int, host: str, port: int) -> int:
        left = [times]

        def change(at: int, data: bytearray) -> None:
            if at == 0 and left[0] > 0:
                left[0] -= 1
                raise OSError

        return Between((host, port), change).port

    return Watched(dist.HashStore(), seen)


class Links(Watched):
    """A store that puts somebody before every rank of every lane: what calls that rank can be cut."""

    def __init__(self) -> None:
        self._between: dict[int, list[Between]] = {}
        super().__init__(dist.HashStore(), self._put)

    def _put(self, rank: int, host: str, port: int) -> int:
        between = Between((host, port), unchanged)
        self._between.setdefault(rank, []).append(between)
        return between.port

    def cut(self, rank: int, lane: int | None = None) -> None:
        """Of ``lane``, by the order in which lanes were made, or of all."""
        for number, between in enumerate(self._between[rank]):
            if lane in (None, number):
                between.cut()


def peers(rank: int, world: int, **settings: Any) -> _C.Peers:
    return _C.Peers(rank, world, "127.0.0.1", **settings)


def in_ranks(world: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work` returns or raises for each rank."""

    def outcome(rank: int) -> Any:
        try:
            return work(rank)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(outcome, range(world)))


def lane_of(kind: Any, store: dist.Store, key: str, seconds: float, shared: _C.Peers) -> _C.Lane:
    return kind(shared, store, key, timedelta(seconds=seconds))
