"""Tasks on queues that share resources, simulated by events.

A queue (the compute thread, a lane, a decoding thread) runs its tasks one after another, in the order in which they
were added; a task starts when it is at the head of its queue and everything it comes after has ended. A task passes
through stages. A stage lasts its ``seconds`` where it is alone. What it needs of a resource meanwhile is a share of
one unit: a thread that computes needs 1 of "cpu". Where running stages need more of a resource than there is, the
light ones get what they need and the others share the rest evenly (max-min fairness), as an operating system's
scheduler and TCP do; a stage is as slow as the scarcest of its resources makes it.

A resource may have a token bucket, as a link that a shaper limits: what it did not carry while it was idle, up to so
many seconds of it, it then carries at once.

The cost is that of the events, of which each stage has one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A part of a task: seconds where nothing else runs, and its share of each resource it needs."""

    seconds: float
    needs: tuple[tuple[str, float], ...] = ()


class Task:
    """Something that a queue does; ``start`` and ``end`` are seconds, known after :meth:`Simulation.run`."""

    __slots__ = ("_followers", "_left", "_next", "_waits", "end", "name", "queue", "stages", "start")

    def __init__(self, name: str, queue: str, stages: tuple[Stage, ...]) -> None:
        self.name, self.queue, self.stages = name, queue, stages
        self.start = self.end = float("nan")
        self._followers: list[Task] = []
        self._waits = 0  # tasks that it comes after and that have not ended
        self._next = 0  # of its stages
        self._left = 0.0  # seconds of the stage under way


class Stuck(RuntimeError):
    """Tasks wait for each other; the message names the heads of the queues."""


class Bucket:
    """Tokens of a resource, in seconds of it: they fill up while it is idle, and a stage takes what there is."""

    def __init__(self, size: float) -> None:
        self._size, self._tokens = size, size
        self._users, self._idle_since = 0, 0.0

    def take(self, seconds: float, now: float) -> float:
        """A stage begins that needs so much; returns what is left of it to be waited for."""
        if not self._users:
            self._tokens = min(self._size, self._tokens + now - self._idle_since)
        self._users += 1
        free = min(self._tokens, seconds)
        self._tokens -= free
        return seconds - free

    def end(self, now: float) -> None:
        self._users -= 1
        self._idle_since = now


class Simulation:
    """Queues of tasks over resources of limited capacity."""

    def __init__(self, capacity: Mapping[str, float], buckets: Mapping[str, float] | None = None) -> None:
        """capacity: units of each resource; one that is not named is unlimited. buckets: seconds of those that have
        one."""
        self.tasks: list[Task] = []
        self.events = 0  # how many there were
        self._capacity = dict(capacity)
        self._buckets = {name: Bucket(size) for name, size in (buckets or {}).items() if size > 0}
        self._queues: defaultdict[str, deque[Task]] = defaultdict(deque)

    def add(self, name: str, queue: str, stages: Iterable[Stage] = (), after: Iterable[Task] = ()) -> Task:
        """Appends a task to a queue."""
        task = Task(name, queue, tuple(stage for stage in stages if stage.seconds > 0))
        for earlier in after:
            earlier._followers.append(task)
            task._waits += 1
        self._queues[queue].append(task)
        self.tasks.append(task)
        return task

    def run(self) -> float:
        """Runs everything; returns when the last task ended. Raises Stuck."""
        now = 0.0
        running: list[Task] = []
        ready = deque(self._queues)
        while ready or running:
            self._start(ready, running, now)
            if not running:
                break
            speeds = self._speeds(running)
            step = min([task._left / speed for task, speed in zip(running, speeds, strict=True)])
            now += step
            self.events += 1
            still = []
            for task, speed in zip(running, speeds, strict=True):
                task._left -= step * speed
                if task._left > 1e-12:
                    still.append(task)
                    continue
                self._ended(task, now)
                if task._next < len(task.stages):
                    self._advance(task, now)
                    still.append(task)
                else:
                    self._finish(task, now, ready)
            running = still
        heads = [queue[0].name for queue in self._queues.values() if queue]
        if heads:
            raise Stuck(f"These tasks wait for each other: {', '.join(heads)}.")
        return now

    def _start(self, ready: deque[str], running: list[Task], now: float) -> None:
        """Starts the heads of queues that may have become ready; a task without stages ends at once."""
        while ready:
            queue = self._queues[ready.popleft()]
            if not queue or queue[0]._waits or queue[0].start == queue[0].start:  # NaN until it has started
                continue
            task = queue[0]
            task.start = now
            if task.stages:
                self._advance(task, now)
                running.append(task)
            else:
                self._finish(task, now, ready)

    def _advance(self, task: Task, now: float) -> None:
        stage = task.stages[task._next]
        task._left = stage.seconds
        task._next += 1
        for resource, _ in stage.needs if self._buckets else ():
            if resource in self._buckets:
                task._left = self._buckets[resource].take(task._left, now)

    def _ended(self, task: Task, now: float) -> None:
        """Of a stage."""
        for resource, _ in task.stages[task._next - 1].needs if self._buckets else ():
            if resource in self._buckets:
                self._buckets[resource].end(now)

    def _finish(self, task: Task, now: float, ready: deque[str]) -> None:
        task.end = now
        self._queues[task.queue].popleft()
        ready.append(task.queue)
        for follower in task._followers:
            follower._waits -= 1
            if not follower._waits:
                ready.append(follower.queue)

    def _speeds(self, running: list[Task]) -> list[float]:
        """At which each runs, 1 where nothing is scarce."""
        needs: dict[str, list[float]] = {}
        for task in running:
            for resource, share in task.stages[task._next - 1].needs:
                needs.setdefault(resource, []).append(share)
        level = {
            resource: fair_level(shares, limit)
            for resource, shares in needs.items()
            if (limit := self._capacity.get(resource)) is not None and sum(shares) > limit
        }
        if not level:
            return [1.0] * len(running)
        return [
            min([1.0, *[level[r] / share for r, share in task.stages[task._next - 1].needs if r in level]])
            for task in running
        ]


def fair_level(shares: Iterable[float], capacity: float) -> float:
    """The most that one may take of a resource so that all who want ``shares`` of it together take ``capacity``."""
    waiting = sorted(shares)
    for index, share in enumerate(waiting):
        level = capacity / (len(waiting) - index)
        if share >= level:
            return level
        capacity -= share
    return float("inf")
