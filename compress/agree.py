"""Every rank says what it is about to do, and all raise alike if one of them cannot, or means something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def agree(
    group: dist.ProcessGroup, facts: dict[str, Any], complaint: str | None = None, free: Sequence[str] = ()
) -> dict[str, Any]:
    """Exchanges facts and complaints; returns rank 0's facts. Collective. Facts named in ``free`` may differ.

    Raises:
        ValueError: on every rank, if any rank complains or its facts are not rank 0's.
    """
    everyone: list[tuple[dict[str, Any], str | None]] = [({}, None)] * group.size()
    dist.all_gather_object(everyone, (facts, complaint), group=group)
    for rank, (_, sentence) in enumerate(everyone):
        if sentence is not None:
            raise ValueError(f"{sentence} (Found on rank {rank}.)" if group.size() > 1 else sentence)
    first = everyone[0][0]
    for rank, (theirs, _) in enumerate(everyone):
        for name in first:
            if name not in free and theirs.get(name) != first[name]:
                raise ValueError(
                    f"Ranks 0 and {rank} disagree on {name} ({first[name]!r} and {theirs.get(name)!r}): configure the "
                    "compressor alike on every rank."
                )
    return first
