"""Tensor fusion: which consecutive buckets travel together, and in which order the groups are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

MIB = 1 << 20


def check_cap(value: Any) -> None:
    """Raises ValueError unless ``value`` is a size in MiB."""
    if not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f'bucket_cap_mb must be "auto" or a positive number of MiB, not {value!r}.')


def default_group_bytes(gradient_bytes: int, ratio: float = 1.0) -> int:
    """The size of a fusion group when the user names none: a sixteenth of the gradients, from 1 to 25 MiB, and
    ``ratio`` times as much, to 25 MiB, where gradients shrink by that much.

    What cannot be hidden is about one group at each end of a pass, so groups should be few per cent of the model; they
    need not be smaller than what keeps the cost per message small.
    """
    return min(25 * MIB, int(max(MIB, gradient_bytes // 16) * ratio))


def ddp_bucket_bytes(group_bytes: int) -> int:
    """The size DDP's buckets should have for fusion groups of ``group_bytes``: finer, so that groups can be cut well.

    One MiB is fine enough: below it DDP's own work per bucket shows.
    """
    return min(group_bytes, max(MIB, group_bytes // 8))


def fuse(bucket_bytes: Sequence[int], group_bytes: int) -> list[int]:
    """Numbers of consecutive buckets, in backward order, that make groups of about ``group_bytes``.

    The last bucket belongs to the first layers: its reduce-scatter ends the backward pass and its all-gather begins
    the forward pass, and nothing hides either. So it stays a group of its own.

    >>> fuse([1, 1, 1, 1, 1], 2)
    [2, 2, 1]
    """
    sizes: list[int] = []
    size = total = 0
    for index, nbytes in enumerate(bucket_bytes):
        alone = index == len(bucket_bytes) - 1
        if size and (alone or total + nbytes > group_bytes):
            sizes.append(size)
            size = total = 0
        size += 1
        total += nbytes
    if size:
        sizes.append(size)
    return sizes


def gather_order(groups: Sequence[Sequence[torch.nn.Parameter]], position: dict[torch.nn.Parameter, int]) -> list[int]:
    """The groups in the order the forward pass first reads one of their parameters; those it never reads come last."""
    late = len(position)
    first = [min((position.get(param, late) for param in group), default=late) for group in groups]
    return sorted(range(len(groups)), key=lambda index: (first[index], -index))
