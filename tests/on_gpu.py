"""Runs functions of the host's tests as the ranks of an NCCL group, with CUDA tensors: for tests/test_cuda*.py.

Several workers share one GPU: to NCCL they are hosts of their own (see workers.py), which it connects by sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from workers import WorkerPool

Case = tuple[Callable[..., Any], tuple[Any, ...]]  # a function of the rank and the world, and its other arguments

NEEDED = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


def each_of(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Makes a test of each."""
    return pytest.mark.parametrize("case", cases, ids=_name_of)


def _name_of(case: Case) -> str:
    function, args = case
    return "-".join([function.__module__.removeprefix("test_"), function.__name__, *_words_of(args)])


def _words_of(argument: Any) -> Iterator[str]:
    if isinstance(argument, dict):
        yield " ".join(map(str, argument.values()))
    elif isinstance(argument, tuple):
        for each in argument:
            yield from _words_of(each)
    elif isinstance(argument, type):
        yield argument.__name__
    elif not callable(argument):
        yield str(argument)


def run(pool: WorkerPool, case: Case) -> None:
    """The case on a GPU."""
    pool.run(_on_the_gpu, *case, backend="nccl", timeout=100, group_timeout=60)


def _on_the_gpu(rank: int, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The case, where the same computation gives the same bits."""
    torch.cuda.set_device(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = _allocations()
    function(rank, world, *args)
    torch.cuda.synchronize()
    assert _allocations() > before, "nothing was on the GPU"


def _allocations() -> int:
    """How many there have been on the GPU."""
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))
