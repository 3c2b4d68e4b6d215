"""Decoupled all-reduce for PyTorch's DistributedDataParallel.

The reduce-scatter runs under the backward pass, the all-gather under the next forward pass.
"""

import torch  # noqa: F401 - the native module links against it

from dear.attaching import attach
from dear.collectives import Work, all_gather, all_reduce, all_to_all, reduce_scatter, shard_range
from dear.engine import Engine
from dear.launch import init_process_group
from dear.tuner import FusionTuner

__all__ = [
    "Engine",
    "FusionTuner",
    "Work",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "attach",
    "init_process_group",
    "reduce_scatter",
    "shard_range",
]
