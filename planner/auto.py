"""``compressor="auto"``: profiles the first steps, probes the network, tries what a simulation says is worth it, and
leaves the fastest in place; then watches, and chooses again where the step has changed for good.

Every rank runs the same course, a step boundary after the other; what a rank has measured goes to all of them, rank 0
decides, and tells. So no rank can differ, and none waits for another that does something else.

Note [Starts]
Some presets send more in their first steps, far more than all trials have. A trial is of what they send later. What is
settled on begins with its start, and does not begin with it again where training has been through it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from torch.nn.parallel import DistributedDataParallel as DDP

from compress import losses
from dear._backend_errors import naming
from dear.choosing import Setting, Steering

from . import codecs, plans
from .deciding import PLAIN, Predicted, Way, layout, predicted, reason, shortlist, simulated, sizes, ways
from .instruments import Instruments
from .profile import Profile
from .profiling import measured_profile, slowest
from .room import Room, ran_out, sentence, told
from .telling import line
from .trials import Trials, fastest
from .units import MIB
from .watching import changed

WARM_UP = 2  # steps before anything is measured
PROFILED = 4
MOST = 60  # steps in all
TRIED = 3  # ways
PHASES = ("all_reduce", "reduce_scatter", "all_gather")

log = logging.getLogger("dear")


class Auto:
    """What ``compressor="auto"`` and :func:`compress.auto` make. One serves one engine.

    Args:
        loss: how far above that of exact training the loss may end, as a fraction or as ``"1%"``. What a compressor
            costs is what stored runs of others' models say (:mod:`compress.losses`), not a promise for this one.
        plan: what ``engine.plan`` gave in an earlier run of the same model on as many ranks: training begins with it,
            and nothing is tried as long as a step takes what it takes in the beginning.
        instruments: what to measure with.

    Raises:
        ValueError: a loss that is none.
    """

    def __init__(
        self,
        loss: float | str = 0.0,
        plan: Mapping[str, Any] | None = None,
        *,
        instruments: Instruments | None = None,
    ) -> None:
        self.loss = _fraction(loss)
        self.plan: dict[str, Any] | None = None
        self._given = plan
        self._instruments = instruments or Instruments()
        self._steering: Steering | None = None
        self._course: Generator[None, None, None] = (_ for _ in ())
        self._searches = self._traces = False  # chooses now; has the engine trace steps
        self._unsent: dict[str, dict[str, Any]] = {}  # by method: the state of compressors that were tried
        self._now: tuple[Way, float] = Way(""), 0.0  # what is trained with, and its size in MiB
        self._steady = False  # what is trained with has no start, though it is a preset's: see Note [Starts]
        self._began: str | None = None  # the method that is in its start, or behind it
        self._foreseen: Callable[[Way, float], float] | None = None  # what is predicted, on rank 0

    # --- what dear.attach calls ---

    def check_new(self, model: DDP, caller: str) -> dict[str, Any]:
        if self._steering is not None:
            raise ValueError(f"This auto serves an engine already: make another one for {caller}.")
        try:
            _search()  # on every rank: it takes seconds, in which nobody shall wait later
        except ImportError as error:
            raise ValueError(
                'compressor="auto" searches with bayesian-optimization, which is not installed: install '
                "dear-torch[auto]."
            ) from error
        return {"the loss that may be lost": self.loss, "the plan": self._given}

    def first(self, steering: Steering) -> Setting | None:
        given, self._given, self.plan = self._given, None, None
        if given is None or not self._follows(steering, given):
            return None
        way, mib = self._planned(steering)
        return _setting(way, mib, steady=False)

    def begin(self, steering: Steering) -> None:
        self._steering = steering
        method = None if self.plan is None else self.plan["compressor"]
        self._now = Way(steering.setting.update, method), steering.setting.bucket_cap_mb
        self._began, self._steady = method, False
        self._course = self._run()
        next(self._course)

    def step_began(self) -> None:
        next(self._course, None)  # one that has failed does not go on

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.plan is None or self._searches else {"plan": self.plan}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        steering = self._steers
        if not self._follows(steering, state.get("plan")):
            return False
        self._leave_course()
        self._go(*self._planned(steering), settles=True)
        self._course = self._run()
        next(self._course)
        return True

    def release(self) -> None:
        """May serve another engine then, which begins with the plan."""
        self._leave_course()
        self._steering, self._given = None, self.plan

    # --- a plan ---

    def _follows(self, steering: Steering, plan: Any) -> bool:
        """Whether the plan can be followed here: it is the one that counts then. Else one warning says why not."""
        ground = steering.ground
        updates = {compresses: steering.updates(compresses) for compresses in (False, True)}
        why = plans.refusal(plan, ground.group.size(), _elements(ground.model), updates, losses.within(self.loss))
        if why is not None:
            self._warn(steering, f"The plan is left aside, since {why}; another one is chosen.")
            return False
        self.plan = dict(plan)
        return True

    def _planned(self, steering: Steering) -> tuple[Way, float]:
        """What the plan says, and how large groups are then."""
        assert self.plan is not None
        mib = self.plan["bucket_cap_mb"] if steering.tunes_cap else steering.setting.bucket_cap_mb
        return plans.way(self.plan), float(mib)

    def _leave_course(self) -> None:
        self._course.close()
        if self._traces:
            self._traces = False
            self._steers.engine._attached.scheduler.stop_trace()

    # --- the course: each yield waits for the next step boundary ---

    @property
    def _steers(self) -> Steering:
        assert self._steering is not None
        return self._steering

    @property
    def _decides(self) -> bool:
        return self._steers.ground.group.rank() == 0

    def _run(self) -> Generator[None, None, None]:
        yield  # begin() comes this far
        while self._steers.ground.group.size() < 2:
            yield
        if self.plan is None:
            yield from self._choose()
        while True:
            yield from self._watch()
            self._say("The steps have taken another time for a minute: choosing again.")
            yield from self._choose()

    def _choose(self) -> Iterator[None]:
        self._searches = True
        try:
            yield from self._choosing()
        finally:
            self._searches = False
            self._unsent.clear()

    def _choosing(self) -> Iterator[None]:
        steering, begun = self._steers, self._now
        start = steering.steps
        yield from _steps(WARM_UP)
        everyone, why = yield from self._profiled()
        listed: list[Predicted] = []
        if not why:
            listed, why = self._shortlist(everyone, begun)
        if not listed:
            self._warn(steering, f"Nothing is chosen, and training goes on as it did, since {why}.")
            return
        with told(lambda: None if self._now == begun else self._now[0]):
            yield from self._compared(slowest(everyone), listed, begun, start, why)

    def _compared(
        self, profile: Profile, listed: list[Predicted], begun: tuple[Way, float], start: int, why: str
    ) -> Iterator[None]:
        """The trials, since that step, and what they choose."""
        steering, room = self._steers, Room(self._steers, self._instruments)

        def go(way: Way, mib: float) -> None:
            if (way, mib) != self._now and (way != self._now[0] or way.method is not None or way.update == PLAIN):
                room.check(way)
            self._go(way, mib)

        trials = Trials(steering, self._instruments.clock, go, lambda said: self._warn(steering, said), self._foreseen)
        yield from trials.attempt(*begun)
        for one in listed:
            # The way that training began with, too: nothing says that it began with a good size.
            if one.way != begun[0] or layout(profile, *begun) != layout(profile, one.way, one.mib):
                yield from trials.attempt(one.way, one.mib)
        if steering.tunes_cap:
            yield from self._refine(trials, profile, MOST - (steering.steps - start))
        finalists = trials.finalists()
        if not finalists:
            self._go(*begun)
            self._warn(steering, "Nothing is chosen, and training goes on as it did, since no step could be timed.")
            return
        compared = yield from trials.finale(finalists, MOST - (steering.steps - start))
        best = fastest(compared)
        self._go(best.way, best.mib, settles=True)
        steering.settled()
        ground = steering.ground
        self.plan = plans.made(best.way, best.mib, best.seconds, ground.group.size(), _elements(ground.model))
        self._say(line(best, trials.made[0], compared, listed, steering.steps - start, why))

    def _refine(self, trials: Trials, profile: Profile, left: int) -> Iterator[None]:
        """Other sizes of the best way, in so many steps, the last comparison's among them."""
        search = None
        way = trials.best.way
        tried = trials.sizes(way)  # empty where no step could be timed
        if self._foreseen is not None and tried:  # rank 0
            groups, foreseen = partial(layout, profile, way), partial(self._foreseen, way)
            search = _search()(_mib(self._steers), tried, groups, foreseen)
        yield from trials.refine(search, left)

    def _profiled(self) -> Generator[None, None, tuple[list[Profile], str]]:
        """A few steps; returns every rank's profile, or what went wrong on one of them."""
        steering, instruments = self._steers, self._instruments
        ground, engine = steering.ground, steering.engine
        watch = instruments.stopwatch(ground.model, ground.device)
        engine.start_trace()
        self._traces = True
        begun = instruments.clock()
        try:
            for _ in range(PROFILED):
                watch.step_began()
                yield
        finally:
            watch.remove()
        events, self._traces = engine.stop_trace(), False
        seconds = (instruments.clock() - begun) / PROFILED

        def profile() -> Profile:
            return measured_profile(watch, seconds, events, PROFILED, engine.update, ground.group.size())

        return self._everyones(profile, "the profile of the model")

    def _everyones(self, measure: Callable[[], Any], what: str) -> tuple[list[Any], str]:
        """What each rank measures by itself; or nothing, and the first rank that could not, and why. Collective: a rank
        that has failed still answers the others."""
        try:
            mine, wrong = measure(), ""
        except Exception as error:
            mine, wrong = None, f"{type(error).__name__}: {error}".split("\n")[0]
        everyone = self._steers.everyones((mine, wrong), what)
        failed = next((rank for rank, (_, why) in enumerate(everyone) if why), None)
        if failed is not None:
            return [], f"rank {failed} could not measure {what} ({everyone[failed][1]})"
        return [found for found, _ in everyone], ""

    def _shortlist(self, everyone: list[Profile], begun: tuple[Way, float]) -> tuple[list[Predicted], str]:
        """What to try, and what decides; nothing, and why. Collective."""
        steering, ground = self._steers, self._steers.ground
        methods = losses.within(self.loss)
        compressing = steering.updates(compresses=True) if methods else []
        phases = [*PHASES, "all_to_all"] if compressing else PHASES
        lanes = steering.lanes(all_to_all=bool(compressing))
        what = f"A collective of the backend failed while the network was measured on rank {ground.group.rank()}"
        blamed = partial(naming, lanes["all_gather"], "all-reduce", "the probe", what)
        try:
            with blamed():
                network = self._instruments.network(ground.group, ground.device, phases, lanes)
        except ValueError as error:  # the same on every rank
            return [], str(error).rstrip(".")
        _, wrong = self._everyones(lambda: self._instruments.memory(ground.device), "its memory")
        if wrong:
            return [], wrong
        with blamed():
            machine = self._instruments.machine(ground.group, ground.device)
        del lanes, blamed
        shapes = [shape for layer in everyone[ground.group.rank()].layers for shape in layer.shapes]
        with suppress(Exception):  # on this rank alone: what cannot be timed stays predicted
            costs = self._instruments.codecs(ground.group, ground.device, methods if compressing else [], shapes)
            machine = replace(machine, costs={**machine.costs, **costs})
        found: tuple[list[Predicted], str] = [], ""
        if self._decides:
            try:
                profile = slowest(everyone)
                now, mib = begun
                chosen = ways(steering.updates(compresses=False), compressing, methods)
                caps = sizes(profile) if steering.tunes_cap else [mib]
                self._foreseen = partial(simulated, profile, network, machine)
                best = predicted(self._foreseen, list(dict.fromkeys([now, *chosen])), caps)
                found = shortlist(best, now, TRIED), reason(profile, network)
            except Exception as error:  # the other ranks wait for what is decided
                found = [], f"the prediction failed ({type(error).__name__}: {error})"
        return steering.tell(found, "what is worth trying")  # type: ignore[no-any-return]

    def _go(self, way: Way, mib: float, settles: bool = False) -> None:
        """Trains so from now on. settles: for good, with the start that a preset has. Collective.

        Raises:
            ValueError: the compressor cannot serve this model; the same on every rank, and nothing has been changed.
            RuntimeError: this rank has run out of memory, and cannot go back.
        """
        steering, (before, size) = self._steers, self._now
        is_new = way.codec.start > 0 and way.method != self._began  # see Note [Starts]
        steady = is_new and not settles
        if (way, mib, steady) == (before, size, self._steady):
            return
        setting, at_work = _setting(way, mib, steady), steering.engine.compressor
        if at_work is not None and before.method is not None:
            # What it has not sent yet is not lost, if it comes back.
            steering.engine.synchronize()
            self._unsent[before.method] = at_work.state_dict(gather=False)
        if setting.compressor is not None and way.method in self._unsent and steady == is_new:
            setting.compressor.load_state_dict(self._unsent[way.method])
        try:
            steering.switch(setting)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            raise RuntimeError(sentence(way)) from error
        self._now, self._steady = (way, mib), steady
        if settles:
            self._began = way.method

    def _watch(self) -> Iterator[None]:
        """Ends when steps have taken another time for a minute, on the slowest rank; a start is not looked at."""
        compressor: Any = self._steers.engine.compressor
        while compressor is not None and compressor.step < self._now[0].codec.start:
            yield
        yield from changed(self._instruments.clock, self._steers.everyones)

    # --- telling ---

    def _say(self, sentence: str) -> None:
        if self._decides:
            log.info(sentence)

    def _warn(self, steering: Steering, sentence: str) -> None:
        if steering.ground.group.rank() == 0:
            log.warning('compressor="auto": %s', sentence)


def _search() -> Any:
    """The class; it needs a library that nothing else does."""
    from .search import Search

    return Search


def _steps(count: int) -> Iterator[None]:
    for _ in range(count):
        yield


def _setting(way: Way, mib: float, steady: bool) -> Setting:
    return Setting(way.update, mib, None if way.method is None else codecs.compressor(way.method, steady))


def _elements(model: DDP) -> int:
    return sum(param.numel() for param in model.module.parameters() if param.requires_grad)


def _mib(steering: Steering) -> float:
    model = steering.ground.model.module
    return sum(param.nbytes for param in model.parameters() if param.requires_grad) / MIB


def _fraction(loss: Any) -> float:
    try:
        found = float(loss[:-1]) / 100 if isinstance(loss, str) and loss.endswith("%") else float(loss)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 <= found < 1:
        raise ValueError(f'loss must be a fraction from 0, such as 0.03, or "3%", not {loss!r}.')
    return found
