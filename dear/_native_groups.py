"""The process groups in which the lanes of a backend's own collectives work, one for each lane.

Note [Names of groups]
Ranks find each other in the store by their group's name. torch's `new_group` among some of the ranks makes that of how
many groups a process has, which need not be the same on all of them: one rank has a group with a third one, or rank 0
has one by itself. They would then wait for each other in different places until the timeout. So a lane's group is named
after the group whose ranks it is over, which has one name on all of them, and what they draw alike. No public call
takes a name, but what `new_group` itself calls does.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dear._nccl import lane_options


def new_lane_group(group: dist.ProcessGroup, key: str, ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    """A process group of the kind of ``group``, over those of its ranks, or all; in the same order.

    ``key`` is equal on them, and new to ``group``. Where ranks of one call make several groups, no rank is in two.
    """
    everyone = dist.get_process_group_ranks(group)
    members = [everyone[rank] for rank in ranks] if ranks else everyone
    backend, default = _backend_of(group), c10d._get_default_group()
    options = lane_options(group, backend, timeout)
    if hasattr(default, "new_group") or backend == dist.Backend.MPI:  # made, or refused, in a way of its own
        own: Any = dist.new_group(  # this rank is in it, which torch 2.15's types leave open
            members, backend=backend, timeout=timeout, pg_options=options, use_local_synchronization=True,
            group_desc=f"dear {key}",
        )  # fmt: skip
        return own
    own, _ = c10d._new_process_group_helper(
        len(members), members.index(dist.get_rank()), members, dist.Backend(backend), c10d._world.pg_map[default][1],
        c10d.GroupName(f"{group.group_name}/dear {key}/{members[0]}"), backend_options=options, timeout=timeout,
        device_id=default.bound_device_id, group_desc=f"dear {key}",
    )  # fmt: skip
    c10d._world.pg_group_ranks[own] = {member: rank for rank, member in enumerate(members)}
    return own


def _backend_of(group: dist.ProcessGroup) -> str:
    """What makes another group of the same kind; left out, torch would take the default group's."""
    name = dist.get_backend(group)
    return dist.get_backend_config(group) if name == dist.Backend.UNDEFINED else name
