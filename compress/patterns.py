"""The exchanges of a compressed step, for compressors that are written in Python; native codecs make their own.

The last element of every message says how many gradient elements were dropped as non-finite: so all ranks know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.exchange import Exchange, Steps
from compress.group import Group


def steps(compressor: Any, group: Group) -> Steps:
    """One compressed step of ``compressor``, by its ``exchange``; each one is made before the next is asked for."""
    return {"sum": _sum, "owners": _owners, "gather": _gather}[compressor.exchange](compressor, group)


def _sum(compressor: Any, group: Group) -> Steps:
    payload = compressor.encode(group)
    message = group.buffer("message", (payload.numel() + 1,), payload.dtype)
    message[:-1].copy_(payload)
    message[-1:].copy_(group.dropped)
    yield Exchange("reduce_scatter", message)
    yield Exchange("all_gather", message)
    group.nonfinite = message[-1:]
    compressor.decode(group, message[:-1])


def _owners(compressor: Any, group: Group) -> Steps:
    payload = compressor.encode(group)
    words = payload.view(group.world, -1).view(torch.int32)
    message = group.buffer("message", (group.world, words.shape[1] + 1), torch.int32)
    received = group.buffer("received", message.shape, torch.int32)
    message[:, :-1].copy_(words)
    message[:, -1:].copy_(group.dropped.expand(group.world, 1))
    yield Exchange("all_to_all", message, received)
    group.dropped.zero_()  # from here on what the owner has to complain of
    merged = compressor.merge(group, received[:, :-1].view(payload.dtype))
    yield from _all_gather(compressor, group, merged, received[:, -1].sum() + group.dropped[0])


def _gather(compressor: Any, group: Group) -> Steps:
    payload = compressor.encode(group)
    yield from _all_gather(compressor, group, payload, group.dropped[0])


def _all_gather(compressor: Any, group: Group, payload: Tensor, dropped: Tensor) -> Steps:
    words = payload.view(-1).view(torch.int32)
    gathered = group.buffer("gathered", (group.world, words.numel() + 1), torch.int32)
    gathered[group.rank, :-1].copy_(words)
    gathered[group.rank, -1].copy_(dropped)
    yield Exchange("all_gather", gathered)
    group.nonfinite = gathered[:, -1]
    compressor.decode(group, gathered[:, :-1].view(payload.dtype))
