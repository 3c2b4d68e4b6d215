"""Decoupled all-reduce for PyTorch's DistributedDataParallel.

The reduce-scatter runs under the backward pass, the all-gather under the next forward pass.
"""

# ruff: noqa: E402 - the check comes before anything loads the native module, which links against torch
from dear import _built

_built.check()

from dear._version import __version__
from dear.attaching import attach
from dear.collectives import Work, all_gather, all_reduce, all_to_all, reduce_scatter, shard_range
from dear.engine import Engine
from dear.launch import init_process_group
from dear.tuner import FusionTuner

__all__ = [
    "Engine",
    "FusionTuner",
    "Work",
    "__version__",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "attach",
    "init_process_group",
    "reduce_scatter",
    "shard_range",
]
