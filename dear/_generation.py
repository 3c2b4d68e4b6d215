"""A name that all ranks have in common, and that nobody has had before: of keys in a store that outlives its readers.

torchrun's agent serves the store, and starts all workers anew when one has died. The dead ones' addresses are still in
the store then, and a new worker that reads them calls somebody who is no longer there. So each generation of processes
has keys of its own. And a rank whose call of ``dear.attach()`` has failed, since another one did not make it, has left
keys that the other would read in its next call. So each such call has keys of its own, too.

Note [Generations]
A count of restarts is no name for a generation: each agent counts its own, as each rank counts its own calls. Nor is a
number of arrivals, since a worker may die before it arrives. So rank 0 draws the name, and the others ask for it:
 1. Each rank writes a random word under its rank, where an earlier generation's may stand.
 2. Rank 0 reads these words, and answers each under the word itself. What it answers to a dead one nobody reads.
 3. Whoever has its answer says so under the generation's name. Rank 0 goes on when all have.
An answer can only come from the rank 0 that has read this very word, and the last step only from a rank that lives
while it does.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

__all__ = ["Missing", "agree_on_generation", "store_outlives_us"]

_PAUSES = 0.001, 0.02  # seconds between two looks, at first and in the end
_ROOT = "dear/generation"


class Missing(RuntimeError):
    """Ranks have not come in time, as the text says: ``ranks``."""

    def __init__(self, ranks: list[int], timeout: timedelta) -> None:
        who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
        super().__init__(f"{who} not come within {timeout.total_seconds():g} s")
        self.ranks = ranks


def store_outlives_us(env: Mapping[str, str]) -> bool:
    """Whether an elastic agent serves the store that MASTER_ADDR and MASTER_PORT name."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agree_on_generation(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all processes of this generation have in common, and no other generation has. Collective.

    Raises:
        Missing: ranks have not come within ``timeout``.
    """
    wait = _Wait(timeout)
    if rank == 0:
        return _lead(store, world_size, wait)
    word = uuid.uuid4().hex
    store.set(f"{_ROOT}/word/{rank}", word)
    answer = f"{_ROOT}/answer/{word}"
    while not store.check([answer]):
        wait.pause([0])
    name = store.get(answer).decode()
    store.delete_key(answer)
    store.set(f"{_ROOT}/{name}/{rank}", "here")
    return name


def _lead(store: dist.Store, world_size: int, wait: _Wait) -> str:
    name = uuid.uuid4().hex
    answered: set[bytes] = set()
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:
            key = f"{_ROOT}/word/{rank}"
            word = store.get(key) if store.check([key]) else b""
            if word and word not in answered:
                answered.add(word)
                store.set(f"{_ROOT}/answer/{word.decode()}", name)
        missing = [rank for rank in missing if not store.check([f"{_ROOT}/{name}/{rank}"])]
        if missing:
            wait.pause(missing)
    for rank in range(1, world_size):
        store.delete_key(f"{_ROOT}/{name}/{rank}")
    return name


class _Wait:
    """Looks again and again, less and less often, until a deadline."""

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout.total_seconds()
        self._pause, self._longest = _PAUSES

    def pause(self, missing: list[int]) -> None:
        """Waits for these ranks a while."""
        if time.monotonic() >= self._deadline:
            raise Missing(missing, self._timeout)
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, self._longest)
