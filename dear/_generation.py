"""Which generation of a job's processes this one belongs to, where a store outlives the processes.

torchrun's agent serves the store, and starts all workers anew when one has died. The dead ones' addresses are still in
the store then, and a new worker that reads them calls somebody who is no longer there. So each generation has keys of
its own.

Note [Generations]
A count of restarts is no name for a generation: each agent counts its own. Nor is a number of arrivals, since a worker
may die before it arrives. So rank 0 draws the name, and the others ask for it:
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

__all__ = ["agree_on_generation", "store_outlives_us"]

_PAUSE = 0.02  # seconds between two looks
_ROOT = "dear/generation"


def store_outlives_us(env: Mapping[str, str]) -> bool:
    """Whether an elastic agent serves the store that MASTER_ADDR and MASTER_PORT name."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agree_on_generation(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all processes of this generation have in common, and no other generation has. Collective.

    Raises:
        RuntimeError: a rank has not come within ``timeout``; the sentence names it.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        return _lead(store, world_size, deadline, timeout)
    word = uuid.uuid4().hex
    store.set(f"{_ROOT}/word/{rank}", word)
    answer = f"{_ROOT}/answer/{word}"
    while not store.check([answer]):
        _pause(deadline, timeout, [0])
    name = store.get(answer).decode()
    store.delete_key(answer)
    store.set(f"{_ROOT}/{name}/{rank}", "here")
    return name


def _lead(store: dist.Store, world_size: int, deadline: float, timeout: timedelta) -> str:
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
            _pause(deadline, timeout, missing)
    return name


def _pause(deadline: float, timeout: timedelta, missing: list[int]) -> None:
    if time.monotonic() >= deadline:
        who = f"rank {missing[0]} has" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} have"
        raise RuntimeError(
            f"The process group could not be made, since {who} not come within {timeout.total_seconds():g} s: look for "
            "what those processes print, or pass a longer timeout to dear.init_process_group()."
        )
    time.sleep(_PAUSE)
