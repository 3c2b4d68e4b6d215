"""Whether all ranks were given the same."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def agree(group: dist.ProcessGroup, options: dict[str, Any], call: str) -> None:
    """Compares a call's options over the ranks; every rank of the group must call this.

    Raises:
        ValueError: two ranks have different ones; the same on every rank.
    """
    everyone: list[dict[str, Any]] = [{} for _ in range(group.size())]
    dist.all_gather_object(everyone, options, group=group)
    for name in options:
        for rank, other in enumerate(everyone):
            if other[name] != everyone[0][name]:
                raise ValueError(
                    f"Ranks 0 and {rank} disagree on {name} ({everyone[0][name]!r} and {other[name]!r}): every rank "
                    f"must call {call} with the same arguments."
                )
