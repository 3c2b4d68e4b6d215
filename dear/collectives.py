"""The halves of an all-reduce on their own, the all-to-all that compressors use, and the lanes they move in.

A flat tensor of n elements is cut among P ranks into chunks of ceil(n / P); rank r owns chunk r, and the last chunks
are short or empty (:func:`shard_range`). Two algorithms move it: ``"native"`` is the backend's own collective
(NCCL, MPI, UCC), ``"ring"`` is this library's segmented ring over TCP, for host tensors under gloo, which has no real
reduce-scatter; its all-to-alls take connections to every rank instead. Without a choice, the ring is taken for host
tensors of a gloo group and native otherwise.

The lanes of the ring read four variables of the environment when a process makes the first of them: the interface
(:mod:`dear._address`); ``DEAR_CHECKSUM=0`` leaves the contents of frames unchecked; ``DEAR_SHARED_KEY`` is a secret
without which nobody may join; ``DEAR_FLIGHT_RECORDER=path`` has each rank whose lanes fail write ``path.RANK``.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dear import _C
from dear._address import listening_address
from dear._native_groups import new_lane_group

Algorithm = Literal["ring", "native"]
_REDUCTIONS = {"sum": _C.Reduction.sum, "avg": _C.Reduction.average}
_lane_names: weakref.WeakKeyDictionary[dist.ProcessGroup, _LaneNames] = weakref.WeakKeyDictionary()
_peers: weakref.WeakKeyDictionary[dist.ProcessGroup, _C.Peers] = weakref.WeakKeyDictionary()
_shared_lanes: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, _C.Lane]] = weakref.WeakKeyDictionary()


class _LaneNames:
    """Names of lanes, which the ranks draw alike: who lags behind in a failure must not meet those who begin anew."""

    def __init__(self) -> None:
        self._beginning = 0
        self._numbers = itertools.count()

    def begin_anew(self) -> None:
        self._beginning += 1
        self._numbers = itertools.count()

    def draw(self, name: str) -> str:
        number = next(self._numbers)
        return f"{name}/{number}" if self._beginning == 0 else f"{name}/{self._beginning}.{number}"


class Work:
    """A collective under way. The tensors it was given must not be touched before :meth:`wait` has returned."""

    def __init__(self, exchanges: list[_C.Exchange], result: torch.Tensor) -> None:
        self._exchanges = exchanges
        self._result = result

    def wait(self) -> torch.Tensor:
        """Blocks until the result stands (device tensors: until the current stream is ordered behind it); returns it.

        Raises:
            RuntimeError: a peer has died, stalled for the group's timeout, or made another call; the sentence names
                the rank and the phase.
        """
        for exchange in self._exchanges:
            exchange.wait()
        return self._result

    def is_completed(self) -> bool:
        """True once nothing is in flight any more, also after a failure."""
        return all(exchange.done() for exchange in self._exchanges)


def shard_range(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """The half-open range of elements of a flat tensor of ``numel`` that ``rank`` owns."""
    return _C.shard_range(numel, world_size, rank)


def group_timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """The timeout the process group was made with."""
    return group._get_backend(device).options._timeout


def choose_algorithm(group: dist.ProcessGroup, device: torch.device, algorithm: str | None) -> Algorithm:
    """The algorithm for tensors on ``device``: the one asked for, else by backend.

    Raises:
        ValueError: an unknown name, or a ring of device tensors.
    """
    if algorithm not in (None, "ring", "native"):
        raise ValueError(f'algorithm must be "ring", "native" or None, not {algorithm!r}.')
    if algorithm == "ring" and device.type != "cpu":
        raise ValueError(f'algorithm "ring" moves host tensors and these are on {device}: use "native".')
    if algorithm is None:
        gloo = device.type == "cpu" and group._get_backend(device).name() == "gloo"
        return "ring" if gloo else "native"
    return "ring" if algorithm == "ring" else "native"


def make_lane(
    group: dist.ProcessGroup,
    name: str,
    algorithm: Algorithm,
    timeout: timedelta,
    *,
    all_to_all: bool = False,
    ranks: Sequence[int] = (),
) -> _C.Lane:
    """A new lane over the ranks of ``group``; every rank of it must make the same call in the same order.

    With ``all_to_all`` a lane for all-to-alls, which are not for a ring: instead of it, connections to every rank. With
    ``ranks`` a lane over these alone, which this rank is one of; every rank of the group makes the call with its own.
    """
    key = _lane_names.setdefault(group, _LaneNames()).draw(name)
    if algorithm == "native":
        return _C.NativeLane(new_lane_group(group, key, ranks, timeout))
    store = c10d._get_process_group_store(group)
    make = _C.MeshLane if all_to_all else _C.RingLane
    return make(_peers_of(group), store, key, timeout, list(ranks))


def begin_anew(group: dist.ProcessGroup) -> None:
    """What comes over this group's ranks meets nothing of before, when an engine was left by an error on all of them:
    each rank calls this as it leaves."""
    _peers.pop(group, None)
    _shared_lanes.pop(group, None)
    _lane_names.setdefault(group, _LaneNames()).begin_anew()


def _peers_of(group: dist.ProcessGroup) -> _C.Peers:
    """What the lanes over this group's ranks share; anew after a failure, of which the lanes of before have heard."""
    peers = _peers.get(group)
    if peers is None or peers.failed:
        checksum = os.environ.get("DEAR_CHECKSUM", "1")
        if checksum not in ("0", "1"):
            raise ValueError(f'DEAR_CHECKSUM must be "1" (the default) or "0", not "{checksum}": correct or unset it.')
        secret = os.environ.get("DEAR_SHARED_KEY", "")
        peers = _peers[group] = _C.Peers(
            group.rank(),
            group.size(),
            listening_address(os.environ),
            checksum=checksum == "1",
            key=hashlib.sha256(b"dear lanes\0" + secret.encode()).digest()[:16] if secret else b"",
            recorder=os.environ.get("DEAR_FLIGHT_RECORDER", ""),
        )
    return peers


def _lane(
    group: dist.ProcessGroup | None, device: torch.device, algorithm: str | None, *, all_to_all: bool = False
) -> _C.Lane:
    """The lane that the functions below share, one for each group and algorithm."""
    if not dist.is_initialized():
        raise RuntimeError("The default process group is not initialised: call dear.init_process_group() first.")
    group = group if group is not None else c10d._get_default_group()
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("This rank is not a member of the process group it passed: only members may call.")
    chosen = choose_algorithm(group, device, algorithm)
    lanes = _shared_lanes.setdefault(group, {})
    name = "mesh" if all_to_all and chosen == "ring" else chosen
    if name not in lanes:
        if chosen == "native":
            lanes[name] = _C.NativeLane(group)
        else:
            lanes[name] = make_lane(group, "calls", chosen, group_timeout(group, device), all_to_all=all_to_all)
    return lanes[name]


def _reduction(op: str) -> _C.Reduction:
    if op not in _REDUCTIONS:
        raise ValueError(f'op must be "sum" or "avg", not {op!r}.')
    return _REDUCTIONS[op]


def _flat(tensor: torch.Tensor, what: str) -> torch.Tensor:
    if tensor.layout != torch.strided:
        raise ValueError(f"The {what} of a collective must be dense, not {tensor.layout}: pass tensor.to_dense().")
    if tensor.is_complex():
        raise ValueError(f"The {what} of a collective must not be complex: pass torch.view_as_real(tensor).")
    if not tensor.is_contiguous():
        raise ValueError(f"The {what} of a collective must be contiguous: pass tensor.contiguous().")
    return tensor.detach().view(-1)


def reduce_scatter(
    input: torch.Tensor,
    output: torch.Tensor | None = None,
    op: str = "sum",
    group: dist.ProcessGroup | None = None,
    algorithm: str | None = None,
) -> Work:
    """Sums (or averages) ``input`` over the ranks and leaves each rank its chunk. Asynchronous.

    Args:
        input: any shape and length, dense and contiguous; float64, float32, float16, bfloat16 or an integer type.
            The same shape on every rank. 16-bit types are added in float32 and rounded at every hop; integers wrap,
            and their average is rounded towards zero. It is left as it was.
        output: flat, ``shard_range(input.numel(), P, rank)`` long; may be that very range of ``input``. Made when
            not given.
        op: ``"sum"`` or ``"avg"``.
        group: the default group when None.
        algorithm: ``"ring"``, ``"native"``, or None to choose by backend.

    Returns:
        A :class:`Work` whose ``wait()`` returns ``output``.

    Raises:
        ValueError: an argument is not of this form; the sentence says which and what to pass.
    """
    reduction = _reduction(op)
    full = _flat(input, "input")
    lane = _lane(group, full.device, algorithm)
    begin, end = shard_range(full.numel(), lane.world, lane.rank)
    shard = full.new_empty(end - begin) if output is None else _flat(output, "output")
    if shard.numel() != end - begin:
        raise ValueError(f"The output of this reduce-scatter must have {end - begin} elements, not {shard.numel()}.")
    return Work([lane.submit(_C.Phase.reduce_scatter, reduction, [(full, shard)], "a call")], shard)


def all_gather(
    input: torch.Tensor,
    output: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    algorithm: str | None = None,
) -> Work:
    """Collects every rank's chunk into ``output``. Asynchronous.

    Args:
        input: this rank's chunk, ``shard_range(output.numel(), P, rank)`` long; may be that very range of ``output``.
        output: any shape and length, dense and contiguous, of ``input``'s dtype; the same shape on every rank.
        group: the default group when None.
        algorithm: ``"ring"``, ``"native"``, or None to choose by backend.

    Returns:
        A :class:`Work` whose ``wait()`` returns ``output``.

    Raises:
        ValueError: an argument is not of this form; the sentence says which and what to pass.
    """
    shard, full = _flat(input, "input"), _flat(output, "output")
    lane = _lane(group, full.device, algorithm)
    begin, end = shard_range(full.numel(), lane.world, lane.rank)
    if shard.numel() != end - begin or shard.dtype != full.dtype:
        raise ValueError(
            f"The input of this all-gather must be {end - begin} elements of {full.dtype}, "
            f"not {shard.numel()} of {shard.dtype}."
        )
    mine = full[begin:end]
    if shard.data_ptr() != mine.data_ptr():
        mine.copy_(shard)
    return Work([lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(full, mine)], "a call")], output)


def all_reduce(
    tensor: torch.Tensor,
    op: str = "sum",
    group: dist.ProcessGroup | None = None,
    algorithm: str | None = None,
) -> Work:
    """Sums (or averages) ``tensor`` over the ranks in place: a reduce-scatter, then an all-gather. Asynchronous.

    Args, returns and raises as :func:`reduce_scatter`; ``wait()`` returns ``tensor``.
    """
    reduction = _reduction(op)
    full = _flat(tensor, "tensor")
    lane = _lane(group, full.device, algorithm)
    begin, end = shard_range(full.numel(), lane.world, lane.rank)
    pair = [(full, full[begin:end])]
    first = lane.submit(_C.Phase.reduce_scatter, reduction, pair, "a call")
    if isinstance(lane, _C.NativeLane):
        first.wait()  # the second half reads what the first one wrote
    second = lane.submit(_C.Phase.all_gather, _C.Reduction.sum, pair, "a call")
    return Work([first, second], tensor)


def all_to_all(
    input: torch.Tensor,
    output: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    algorithm: str | None = None,
) -> Work:
    """Sends rank r the r-th of P equal chunks of ``input``; the chunk from rank r becomes the r-th of ``output``.

    Asynchronous. Of host tensors under gloo each rank sends to one peer at a time, rank r first to r + 1, so that no
    port is shared by several streams.

    Args:
        input: any shape, dense and contiguous, its elements a multiple of P; the same shape on every rank.
        output: as many elements of the same dtype, in other memory.
        group: the default group when None.
        algorithm: ``"ring"`` (which for an all-to-all means this library's own), ``"native"``, or None to choose by
            backend.

    Returns:
        A :class:`Work` whose ``wait()`` returns ``output``.

    Raises:
        ValueError: an argument is not of this form; the sentence says which and what to pass.
    """
    sent, received = _flat(input, "input"), _flat(output, "output")
    lane = _lane(group, sent.device, algorithm, all_to_all=True)
    if received.numel() != sent.numel() or received.dtype != sent.dtype:
        raise ValueError(
            f"The output of this all-to-all must be {sent.numel()} elements of {sent.dtype}, "
            f"not {received.numel()} of {received.dtype}."
        )
    if sent.numel() % lane.world:
        raise ValueError(
            f"An all-to-all sends {lane.world} ranks chunks of the same size, and {sent.numel()} elements have none: "
            "pad the input to a multiple."
        )
    if sent.numel() and received.data_ptr() == sent.data_ptr():
        raise ValueError("The output of an all-to-all must not be its input: pass another tensor.")
    return Work([lane.submit(_C.Phase.all_to_all, _C.Reduction.sum, [(sent, received)], "a call")], output)
