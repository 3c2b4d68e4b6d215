"""Python objects exchanged over a lane, so that a peer that dies meanwhile is named as in every other exchange.

Objects travel pickled: ranks trust each other, as with :mod:`torch.distributed`'s own object collectives.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch

from dear import _C
from dear.collectives import shard_range

__all__ = ["all_gather_object", "broadcast_object"]

_HOST = torch.device("cpu")


def all_gather_object(lane: _C.Lane, value: Any, label: str, device: torch.device = _HOST) -> list[Any]:
    """What every rank passed, by rank. Collective: every rank of ``lane`` must make the same call in its order.

    Args:
        lane: moves all-gathers.
        value: anything that can be pickled.
        label: names the exchange in errors: ``"the optimizer's state"``.
        device: of tensors that the lane moves.

    Raises:
        RuntimeError: a peer has died or stalled; the sentence names the rank and ``label``.
    """
    data = _pickled(value)
    sizes = _gather(lane, torch.tensor([data.numel()], device=device), lane.world, label)
    longest = int(sizes.max())
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: data.numel()] = data
    rows = _gather(lane, mine.to(device), lane.world * longest, label).cpu().view(lane.world, longest)
    return [_unpickled(row[:size]) for row, size in zip(rows, sizes.tolist(), strict=True)]


def broadcast_object(lane: _C.Lane, value: Any, label: str, device: torch.device = _HOST) -> Any:
    """What rank 0 passed. Otherwise as :func:`all_gather_object`; what other ranks pass is ignored.

    The object goes round in two halves, so that it crosses each connection once, whatever the number of ranks.
    """
    root = lane.rank == 0
    data = _pickled(value) if root else torch.empty(0, dtype=torch.uint8)
    sizes = _gather(lane, torch.tensor([data.numel()], device=device), lane.world, label)
    size = int(sizes[0])
    full = data.to(device) if root else torch.zeros(size, dtype=torch.uint8, device=device)
    begin, end = shard_range(size, lane.world, lane.rank)
    mine = full.new_empty(end - begin)
    lane.submit(_C.Phase.reduce_scatter, _C.Reduction.sum, [(full, mine)], label).wait()
    everything = _gather(lane, mine, size, label)
    return value if root else _unpickled(everything.cpu())


def _gather(lane: _C.Lane, mine: torch.Tensor, numel: int, label: str) -> torch.Tensor:
    full = mine.new_empty(numel)
    begin, end = shard_range(numel, lane.world, lane.rank)
    full[begin:end] = mine
    lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(full, full[begin:end])], label).wait()
    return full


def _pickled(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _unpickled(data: torch.Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())
