"""Every rank says what it is about to do, and all raise alike if one of them cannot, or means something else."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dear import _C
from dear._objects import all_gather_object
from dear.collectives import choose_algorithm, group_timeout, make_lane

# What a check raises. The exceptions themselves do not travel: they may hold anything.
_KINDS = (TypeError, ValueError, RuntimeError)
Refusal = tuple[type[Exception], str]
_HOST = torch.device("cpu")
_numbers: weakref.WeakKeyDictionary[dist.ProcessGroup, itertools.count[int]] = weakref.WeakKeyDictionary()
_devices: weakref.WeakKeyDictionary[dist.ProcessGroup, torch.device] = weakref.WeakKeyDictionary()


def meet_on(group: dist.ProcessGroup, device: torch.device) -> None:
    """Where a group has no host tensors, its ranks exchange what they say by this device, the model's.

    torch's own object collectives take the current device. That is the first one on every rank where a script names
    devices and never calls ``torch.cuda.set_device()``, as plain DDP allows; and NCCL refuses two ranks on one GPU.
    """
    _devices[group] = device


def agree(
    group: dist.ProcessGroup,
    look: Callable[[], dict[str, Any]],
    remedy: str,
    free: Sequence[str] = (),
    lane: _C.Lane | None = None,
) -> dict[str, Any]:
    """Exchanges what ``look`` returns on each rank, by name; returns rank 0's. Collective.

    Args:
        group: whose ranks must call this.
        look: checks what this rank was given, changes nothing, and says what it means to do. It must not communicate.
        remedy: what to do about a disagreement.
        free: names of what may differ.
        lane: a ring's, among these ranks, where there is one already.

    Raises:
        TypeError, ValueError, RuntimeError: ``look`` has raised it on some rank. Every rank raises that of the first
            one, and the sentence names that rank, unless all say the same.
        ValueError: ranks disagree; on every rank.
        RuntimeError: a peer has died or stalled, or does not make this call; the sentence names the rank.
    """
    facts: dict[str, Any] = {}
    refusal: Refusal | None = None
    cause: Exception | None = None
    try:
        facts = look()
    except _KINDS as error:
        cause, refusal = error, (next(kind for kind in _KINDS if isinstance(error, kind)), str(error))
    everyone = everyones(group, (facts, refusal), f"what each rank is about to do ({remedy})", lane)
    _raise_first([theirs for _, theirs in everyone], cause)
    first = everyone[0][0]
    for rank, (theirs, _) in enumerate(everyone):
        for name in first | theirs:
            if name not in free and theirs.get(name) != first.get(name):
                raise ValueError(
                    f"Ranks 0 and {rank} disagree on {name} ({first.get(name)!r} and {theirs.get(name)!r}): {remedy}."
                )
    return first


def everyones(group: dist.ProcessGroup, mine: Any, label: str, lane: _C.Lane | None = None) -> list[Any]:
    """What every rank of the group passes, by rank: by a lane of ours, which names a peer that is missing, wherever the
    group has host tensors. Collective.

    Raises:
        RuntimeError: a peer has died or stalled, or does not make this call; the sentence names the rank and ``label``.
    """
    if lane is not None:
        return all_gather_object(lane, mine, label)
    if _has_gloo(group):
        # A new one for each call: where a lane of before has failed, ranks do not hear of it at the same time.
        own = make_lane(group, "agreement", "ring", group_timeout(group, _HOST))
        return all_gather_object(own, mine, label)
    return _exchange_by_backend(group, mine, label)


def _has_gloo(group: dist.ProcessGroup) -> bool:
    try:
        return choose_algorithm(group, _HOST, None) == "ring"
    except RuntimeError:  # a group without a backend for host tensors
        return False


def _exchange_by_backend(group: dist.ProcessGroup, mine: Any, label: str) -> list[Any]:
    """As :func:`everyones`. The backend does not tell who is missing; the store knows who has come here."""
    store = c10d._get_process_group_store(group)
    number = next(_numbers.setdefault(group, itertools.count()))
    store.set(f"dear/agreement/{number}/{group.rank()}", "")
    everyone: list[Any] = [None] * group.size()
    device = _devices.get(group, _HOST)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            dist.all_gather_object(everyone, mine, group=group)
    except RuntimeError as error:
        ranks = range(group.size())
        missing = [str(rank) for rank in ranks if not store.check([f"dear/agreement/{number}/{rank}"])]
        who = f"Rank {' and rank '.join(missing)} did not come to" if missing else "The backend failed in"
        reason = str(error).partition("\n")[0]
        raise RuntimeError(f"{who} the all-gather of {label}, as rank {group.rank()} saw it ({reason}).") from error
    return everyone


def _raise_first(refusals: list[Refusal | None], cause: Exception | None) -> None:
    for rank, refusal in enumerate(refusals):
        if refusal is None:
            continue
        kind, sentence = refusal
        if any(other != refusal for other in refusals):
            sentence = f"{sentence.removesuffix('.')} (on rank {rank})."
        raise kind(sentence) from cause
