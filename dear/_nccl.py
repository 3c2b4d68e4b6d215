"""What NCCL is told of a lane's own communicator: the user's settings for the process group, and the library's own."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Fields of ncclConfig_t that say which network NCCL uses and how much of the GPU. Those left out are each group's own:
# `comm_name`; `blocking`, which torch decides by how the group begins; and `split_share`, which lets communicators
# share what lanes use at the same time. So are `split_from`, `split_color` and the names among the options themselves.
_TAKEN_OVER = (
    "cga_cluster_size", "collnet_enable", "cta_policy", "max_ctas", "min_ctas", "net_name", "nvls_ctas",
    "traffic_class",
)  # fmt: skip

# The variable that says how many hardware queues CUDA gives to a process's streams, read when CUDA starts.
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def lane_options(group: dist.ProcessGroup, backend: str, timeout: timedelta) -> Any:
    """The ``pg_options`` of a group of ``backend`` that a lane over the ranks of ``group`` gets; None without NCCL.

    NCCL's kernels get on streams of high priority, whatever the user's group has: what they move is waited for, and a
    GPU has queues of their own for such streams, in which nothing of the training stream waits behind them (Note [Few
    streams], pipeline.h).
    """
    nccl = getattr(dist, "ProcessGroupNCCL", None)  # torch may be built without
    backends = {each.rpartition(":")[2] for each in backend.split(",")}  # "nccl", or "cpu:gloo,cuda:nccl"
    if nccl is None or "nccl" not in backends or not backends <= {"nccl", "gloo"}:  # others want options of their own
        return None
    _warn_of_few_queues()
    options = nccl.Options(is_high_priority_stream=True)
    options._timeout = timeout
    _take_over(_config_of(group), getattr(options, "config", None))
    return options


def _warn_of_few_queues() -> None:
    """A process that says nothing has 8; under MPS fewer. Some scripts for tensor parallelism ask for a single one."""
    said = os.environ.get(_QUEUES, "")
    shared = bool(os.environ.get("CUDA_MPS_PIPE_DIRECTORY"))
    if (said.isdigit() and int(said) < 8) or (shared and not said):
        warnings.warn(
            f"{_QUEUES} is {said or 'not set under MPS'}, so streams of this process share hardware queues, and "
            "training stands still behind what waits for an exchange: set it to 8 or more before the process starts.",
            stacklevel=2,
        )


def _config_of(group: dist.ProcessGroup) -> Any:
    """NCCL's configuration of the user's group; None where torch or NCCL is too old to have one."""
    backend = group._get_backend(torch.device("cuda"))
    backend = getattr(backend, "wrapped_pg", backend)  # with TORCH_DISTRIBUTED_DEBUG=DETAIL
    return getattr(getattr(backend, "options", None), "config", None)


def _take_over(theirs: Any, ours: Any) -> None:
    """Field by field: in a copy of the whole, torch may have left the address of a name that is gone."""
    for name in _TAKEN_OVER:
        value = getattr(theirs, name, None)  # each version of NCCL has more of them
        if value is not None and hasattr(ours, name):  # a name that is not set must not be set: torch would copy it
            setattr(ours, name, value)
