"""Every rank says what it is about to do, and all raise alike if one of them cannot, or means something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

# What a check raises. The exceptions themselves do not travel: they may hold anything.
_KINDS = (TypeError, ValueError, RuntimeError)
Refusal = tuple[type[Exception], str]


def agree(
    group: dist.ProcessGroup, look: Callable[[], dict[str, Any]], remedy: str, free: Sequence[str] = ()
) -> dict[str, Any]:
    """Exchanges what ``look`` returns on each rank, by name; returns rank 0's. Collective.

    Args:
        group: whose ranks must call this.
        look: checks what this rank was given, changes nothing, and says what it means to do. It must not communicate.
        remedy: what to do about a disagreement.
        free: names of what may differ.

    Raises:
        TypeError, ValueError, RuntimeError: ``look`` has raised it on some rank. Every rank raises that of the first
            one, and the sentence names that rank, unless all say the same.
        ValueError: ranks disagree; on every rank.
    """
    facts: dict[str, Any] = {}
    refusal: Refusal | None = None
    cause: Exception | None = None
    try:
        facts = look()
    except _KINDS as error:
        cause, refusal = error, (next(kind for kind in _KINDS if isinstance(error, kind)), str(error))
    everyone: list[tuple[dict[str, Any], Refusal | None]] = [({}, None)] * group.size()
    dist.all_gather_object(everyone, (facts, refusal), group=group)
    _raise_first([theirs for _, theirs in everyone], cause)
    first = everyone[0][0]
    for rank, (theirs, _) in enumerate(everyone):
        for name in first | theirs:
            if name not in free and theirs.get(name) != first.get(name):
                raise ValueError(
                    f"Ranks 0 and {rank} disagree on {name} ({first.get(name)!r} and {theirs.get(name)!r}): {remedy}."
                )
    return first


def _raise_first(refusals: list[Refusal | None], cause: Exception | None) -> None:
    for rank, refusal in enumerate(refusals):
        if refusal is None:
            continue
        kind, sentence = refusal
        if any(other != refusal for other in refusals):
            sentence = f"{sentence.removesuffix('.')} (on rank {rank})."
        raise kind(sentence) from cause
