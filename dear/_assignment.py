"""Which rank owns which parameters, where parameters must stay whole.

Note [Owners]
Each fusion group is shared out for itself, so that no group waits for one rank:
 1. Consecutive parameters of a bucket are joined to items, so that an item is worth a message of its own. What may be
    cut anywhere, and is long enough, is no item.
 2. The items of a team count as one, and go where one of them has gone before, in an earlier fusion group.
 3. Items go to the ranks by the rule of the longest processing time: the costliest first, each to the rank that has
    the least to do in this group, then to the one with the fewest bytes in it, then to the one with the least to do in
    all groups before. (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969: at most 4/3 - 1/(3P) of the best.)
 4. What may be cut fills up the ranks' chunks: water is poured onto the bytes that they have already.
All ranks compute the same, from what they have agreed on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from dear._fusion import ddp_bucket_bytes, default_group_bytes, fuse

SMALLEST_ITEM, LARGEST_ITEM = 16 << 10, 256 << 10  # bytes; the smallest and the largest frame of the ring
ITEMS_PER_RANK = 8  # that joining leaves in a fusion group: few enough for messages, enough for a balance

BALANCED = 1.05  # what the busiest link may carry over what it would with equal chunks
FIRST_BUCKET = 1 << 20  # bytes, of DDP's first

Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Unit:
    """A parameter's elements ``[start, stop)`` in the flat buffer of a bucket."""

    bucket: int
    start: int
    stop: int
    itemsize: int  # bytes of an element
    cost: float  # of its update; 0 where it may be cut
    whole: bool  # must not be cut
    team: int | None = None  # whose units one rank must own, wherever they stand

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.itemsize


class _Item:
    """Units that lie one after another, for one owner."""

    def __init__(self, unit: Unit) -> None:
        self.bucket, self.start, self.stop = unit.bucket, unit.start, unit.stop
        self.nbytes, self.cost, self.team = unit.nbytes, unit.cost, unit.team

    def take(self, unit: Unit) -> bool:
        """Adds the unit, if it follows."""
        if (unit.bucket, unit.start, unit.team) != (self.bucket, self.stop, self.team):
            return False
        self.stop, self.nbytes, self.cost = unit.stop, self.nbytes + unit.nbytes, self.cost + unit.cost
        return True


class Assignment:
    """Who owns what, fusion group by fusion group. See Note [Owners]."""

    def __init__(self, world: int) -> None:
        self._world = world
        self.costs = [0.0] * world  #: of each rank's whole parameters
        self.nbytes = [0] * world  #: of each rank's chunks
        self.teams: dict[int, int] = {}  #: the rank of each team
        self._ranges: dict[int, list[Ranges]] = {}  # by bucket, by rank

    def ranges(self, bucket: int) -> list[Ranges]:
        """By rank, what it owns of a bucket: ascending ranges, neighbours joined."""
        return [_joined(owned) for owned in self._ranges.get(bucket, [[] for _ in range(self._world)])]

    def add_group(self, units: Sequence[Unit]) -> None:
        """Shares out a fusion group, whose units are in the order of its buckets and of their buffers."""
        units = [unit for unit in units if unit.stop > unit.start]
        target = sum(unit.nbytes for unit in units) // (ITEMS_PER_RANK * self._world)
        items, loose = _items(units, min(max(target, SMALLEST_ITEM), LARGEST_ITEM))
        costs, nbytes = [0.0] * self._world, [0] * self._world
        for _, _, _, together in sorted(map(self._weighed, _together(items)), key=lambda each: each[:3]):  # stable
            team = together[0].team
            least = min(range(self._world), key=lambda rank: (costs[rank], nbytes[rank], self.costs[rank], rank))
            rank = least if team is None else self.teams.setdefault(team, least)
            for item in together:
                costs[rank] += item.cost
                nbytes[rank] += item.nbytes
                self._own(rank, item.bucket, item.start, item.stop)
        self._pour(loose, nbytes)
        for rank in range(self._world):
            self.costs[rank] += costs[rank]
            self.nbytes[rank] += nbytes[rank]

    def _weighed(self, items: list[_Item]) -> tuple[bool, float, int, list[_Item]]:
        """In which order items that go together are assigned: those whose rank is known come first."""
        free = items[0].team not in self.teams
        return free, -sum(item.cost for item in items), -sum(item.nbytes for item in items), items

    def _pour(self, loose: Sequence[Unit], nbytes: list[int]) -> None:
        """Shares out what may be cut, so that the ranks' bytes become as equal as they can."""
        level = _level(nbytes, sum(unit.nbytes for unit in loose))
        rank = 0
        for unit in loose:
            start = unit.start
            while start < unit.stop:
                room = max(0, -(-(level - nbytes[rank]) // unit.itemsize))
                if room == 0 and rank + 1 < self._world:
                    rank += 1
                    continue
                stop = unit.stop if rank + 1 == self._world else min(unit.stop, start + room)
                self._own(rank, unit.bucket, start, stop)
                nbytes[rank] += (stop - start) * unit.itemsize
                start = stop

    def _own(self, rank: int, bucket: int, start: int, stop: int) -> None:
        self._ranges.setdefault(bucket, [[] for _ in range(self._world)])[rank].append((start, stop))


def _together(items: Sequence[_Item]) -> list[list[_Item]]:
    """Items that one rank must own together."""
    teams: dict[int | None, list[_Item]] = {}
    for item in items:
        teams.setdefault(item.team, []).append(item)
    return [[item] for item in teams.pop(None, [])] + list(teams.values())


def _items(units: Sequence[Unit], target: int) -> tuple[list[_Item], list[Unit]]:
    """What is to be owned as one, and what may be cut anywhere."""
    items: list[_Item] = []
    loose: list[Unit] = []
    for run in _runs(units):
        if not run[0].whole and sum(unit.nbytes for unit in run) >= target:
            loose += run
            continue
        for unit in run:
            if not (items and items[-1].nbytes < target and items[-1].take(unit)):
                items.append(_Item(unit))
    return items, loose


def _runs(units: Sequence[Unit]) -> list[list[Unit]]:
    """Neighbours that are alike: whole or not."""
    runs: list[list[Unit]] = []
    for unit in units:
        if runs and runs[-1][-1].whole == unit.whole and _adjoin(runs[-1][-1], unit):
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return runs


def _adjoin(first: Unit, second: Unit) -> bool:
    return first.bucket == second.bucket and first.stop == second.start


def _level(nbytes: Sequence[int], poured: int) -> int:
    """How high ``poured`` bytes rise over ranks that have ``nbytes`` already."""
    filled = 0
    low = sorted(nbytes)
    for count, bottom in enumerate(low, start=1):
        filled += bottom
        level = -(-(filled + poured) // count)
        if count == len(low) or level <= low[count]:
            return level
    return 0


def _joined(ranges: Ranges) -> Ranges:
    joined: Ranges = []
    for start, stop in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def balanced_group_bytes(units: Sequence[Unit], world: int) -> int:
    """The size of fusion groups of these parameters, which are in backward order: the smallest one tried with which the
    ranks' chunks are balanced, or else that with which they are most.

    In a ring the link out of a rank carries a group's bytes but for one chunk, so the busiest one carries all but the
    shortest. Smaller groups overlap better, but hold too few matrices for all ranks to have their part.
    """
    total = sum(unit.nbytes for unit in units)
    smallest = default_group_bytes(total)
    best, best_load = smallest, float("inf")
    for factor in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0):
        size = int(smallest * factor)
        if world == 1 or (factor > 1 and size > total // 2):
            break
        load = _busiest_link(units, world, size) * world / ((world - 1) * total)
        if load < best_load:
            best, best_load = size, load
        if load <= BALANCED:
            break
    return best


def _busiest_link(units: Sequence[Unit], world: int, group_bytes: int) -> int:
    """Bytes over the busiest link in a half of an all-reduce, were every group to go round by itself."""
    buckets = _bucketed(units, ddp_bucket_bytes(group_bytes))
    sizes = fuse([sum(unit.nbytes for unit in bucket) for bucket in buckets], group_bytes)
    assignment, load, first = Assignment(world), 0, 0
    for size in sizes:
        before = list(assignment.nbytes)
        assignment.add_group([unit for bucket in buckets[first : first + size] for unit in bucket])
        chunks = [after - earlier for after, earlier in zip(assignment.nbytes, before, strict=True)]
        load += sum(chunks) - min(chunks)
        first += size
    return load


def _bucketed(units: Sequence[Unit], cap: int) -> list[list[Unit]]:
    """Buckets as DDP cuts them: each is closed by the parameter that fills it."""
    buckets: list[list[Unit]] = []
    room = at = 0
    for unit in units:
        if room <= 0:
            room, at = cap if buckets else min(cap, FIRST_BUCKET), 0
            buckets.append([])
        numel = unit.stop - unit.start
        buckets[-1].append(dataclasses.replace(unit, bucket=len(buckets) - 1, start=at, stop=at + numel))
        room, at = room - unit.nbytes, at + numel
    return buckets
