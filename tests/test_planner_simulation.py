"""The simulator: closed forms, another model's formulas, and what must hold of any step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dear import cost_model
from dear.cost_model import AlphaBeta, Exchange, Workload
from planner import network, profile
from planner.codecs import EXACT, Cost, codec
from planner.events import Simulation, Stage, Stuck, fair_level
from planner.machine import Machine
from planner.network import Network
from planner.profile import Layer, Profile
from planner.simulate import Method, step

MIB = 1 << 20
QUIET = Machine()
EXCHANGES = ("ddp", "hook", "sharded", "owned", "replicated")
times = st.floats(1e-4, 1.0)
latencies = st.floats(0, 0.02)
slownesses = st.floats(0, 1e-7)


def line(all_reduce: AlphaBeta) -> Network:
    return network.measured(4, {"all_reduce": all_reduce})


def seconds(schedule: str, of: Profile, on: Network, machine: Machine = QUIET, **more: object) -> float:
    return step(of, on, machine, Method(schedule, **more)).seconds  # type: ignore[arg-type]


def layers(count: int, forward: float, backward: float, update: float = 0.0) -> Profile:
    """Of one MiB each, so that each is a bucket and a fusion group of its own."""
    return profile.even("equal layers", count, count * MIB // 4, forward, backward, update)


# ------------------------------------------------------------------------------------------------------ closed forms


@given(times, times, st.floats(0, 0.1), latencies, slownesses)
@settings(max_examples=20, deadline=None)
def test_one_layer_overlaps_with_nothing(forward: float, backward: float, update: float, a: float, b: float) -> None:
    one, on = layers(1, forward, backward, update), line(AlphaBeta(a, b))
    whole = a + b * MIB
    for schedule in ("ddp", "hook", "replicated"):
        assert seconds(schedule, one, on) == pytest.approx(forward + backward + whole + update)
    assert seconds("sharded", one, on) == pytest.approx(forward + backward + whole + update / 4)
    assert seconds("fsdp2", one, on) == pytest.approx(forward + backward + whole + update / 4)


def test_a_free_network_leaves_computing() -> None:
    model, on = layers(8, 0.1, 0.2, 0.04), line(AlphaBeta(0, 0))
    for schedule in ("none", "ddp", "hook", "replicated"):
        assert seconds(schedule, model, on) == pytest.approx(0.34)
    for schedule in ("sharded", "fsdp2"):
        assert seconds(schedule, model, on) == pytest.approx(0.31)


@given(st.integers(1, 12), times, times, latencies, slownesses)
@settings(max_examples=30, deadline=None)
def test_equal_layers_agree_with_the_cost_model(
    count: int, forward: float, backward: float, a: float, b: float
) -> None:
    """Whose formulas are written independently, for the same assumptions."""
    model, workload = layers(count, forward, backward), Workload(forward, backward, (float(MIB),) * count)
    whole, half = AlphaBeta(a, b), AlphaBeta(a / 2, b / 2)
    on = line(whole)
    assert seconds("ddp", model, on, cap=MIB) == pytest.approx(cost_model.step_seconds(workload, Exchange(whole)))
    expected = cost_model.step_seconds(workload, Exchange(half, half))
    for schedule in ("sharded", "replicated"):
        assert seconds(schedule, model, on, cap=MIB) == pytest.approx(expected)


def test_collectives_agree_with_the_cost_model() -> None:
    link = AlphaBeta(1e-4, 1e-9)
    ring = network.flat(link, 8)
    for phase in ("all_reduce", "reduce_scatter", "all_gather"):
        formula = getattr(cost_model, phase)
        assert ring.seconds(phase, 1e7) == pytest.approx(formula(link, 8, 1e7))
    tree = network.flat(link, 8, "tree")
    assert tree.seconds("reduce_scatter", 1e7) == pytest.approx(3 * 1e-4 + 7 / 8 * 1e7 * 1e-9)
    levels = network.two_level(AlphaBeta(1e-6, 1e-11), 8, link, 4)
    assert levels.workers == 32
    assert levels.seconds("all_gather", 1e7) == pytest.approx(7e-6 + 7 / 8 * 1e-4 + 3e-4 + 3 / 4 * 1e-2)
    slow = network.slowest([link, AlphaBeta(5e-5, 4e-9)])
    assert slow == AlphaBeta(1e-4, 4e-9)


def test_communication_takes_cores_from_computing() -> None:
    """On one core, an exchange that wants half of it doubles the time of what computes beside it."""
    wire, taken = 0.1 / MIB, 0.05 / MIB
    one_core = Machine(cores=1.0, exchange_cpu=taken / (2 * 3 / 4))  # seconds for each byte that is sent
    on, model = line(AlphaBeta(0, wire)), layers(2, 0.0, 0.2)
    # The first all-reduce ends at 0.2, when half of the other layer's backward (0.05 of 0.1 s) is done.
    assert seconds("ddp", model, on, cap=MIB) == pytest.approx(0.1 + 0.1 + 0.1)
    assert seconds("ddp", model, on, one_core, cap=MIB) == pytest.approx(0.1 + 0.1 + 0.05 + 0.1)


def test_where_codecs_run() -> None:
    """Encoding holds up what computes; merging and decoding do not, except at the ends."""
    model, on = layers(4, 0.4, 0.4), line(AlphaBeta(0, 0))
    costs = {"bf16": Cost(encode=0.01 / MIB, merge=0.02 / MIB, decode=0.03 / MIB)}
    found = seconds("hook", model, on, Machine(costs=costs), codec=codec("bf16"), cap=MIB)
    assert found == pytest.approx(0.8 + 4 * 0.01 + 0.02 + 0.03)


def test_slow_workers_slow_every_step() -> None:
    model, on = layers(4, 0.1, 0.2), line(AlphaBeta(0, 0))
    assert seconds("ddp", model, on, Machine(straggler=2.0)) == pytest.approx(0.6)
    few, many = (Machine(jitter=0.1).slowest(workers) for workers in (4, 4096))
    assert 1.09 < few < 1.12 and 1.3 < many < 1.4  # the expected maxima of 4 and 4,096 normal deviations: 1.03, 3.6


def test_order_of_gradients_counts() -> None:
    big, small = Layer("big", ((4 * MIB,),), 0.1, 0.2), Layer("small", ((MIB // 4,),), 0.1, 0.2)
    on = line(AlphaBeta(0, 1e-8))
    usual, reverse = Profile("m", (big, small)), Profile("m", (big, small), order=(0, 1))
    assert seconds("ddp", reverse, on, cap=MIB) < seconds("ddp", usual, on, cap=MIB)


# -------------------------------------------------------------------------------------------------- what always holds


@st.composite
def models(draw: st.DrawFn) -> Profile:
    count = draw(st.integers(1, 8))
    made = tuple(
        Layer(f"layer {index}", ((draw(st.integers(1, 4)) * MIB // 4,),), draw(times), draw(times))
        for index in range(count)
    )
    return Profile("drawn", made, draw(st.floats(0, 0.2)))


@given(models(), latencies, slownesses, st.sampled_from(EXCHANGES), st.floats(1.0, 3.0))
@settings(max_examples=40, deadline=None)
def test_a_slower_network_never_helps(model: Profile, a: float, b: float, schedule: str, factor: float) -> None:
    found = seconds(schedule, model, line(AlphaBeta(a, b)), cap=MIB)
    assert seconds(schedule, model, line(AlphaBeta(a * factor, b)), cap=MIB) >= found - 1e-9
    assert seconds(schedule, model, line(AlphaBeta(a, b * factor)), cap=MIB) >= found - 1e-9


@given(models(), latencies, slownesses)
@settings(max_examples=40, deadline=None)
def test_a_step_is_bounded(model: Profile, a: float, b: float) -> None:
    """From below by computing and by communicating, from above by both one after the other."""
    on = line(AlphaBeta(a, b))
    moving = sum(on.seconds("all_reduce", group.bytes) for group in profile.buckets(model, MIB))
    for schedule in ("ddp", "replicated"):
        found = seconds(schedule, model, on, cap=MIB)
        assert max(model.compute, moving) - 1e-9 <= found <= model.compute + moving + 1e-9


@given(st.integers(1, 10), times, st.floats(0, 2), latencies, slownesses)
@settings(max_examples=60, deadline=None)
def test_decoupling_never_loses_where_the_update_is_free(
    count: int, forward: float, ratio: float, a: float, b: float
) -> None:
    """Of equal layers whose backward pass takes at most twice the forward pass, which is what is usual."""
    model, on = layers(count, forward, ratio * forward), line(AlphaBeta(a, b))
    for schedule in ("sharded", "replicated"):
        assert seconds(schedule, model, on, cap=MIB) <= seconds("ddp", model, on, cap=MIB) + 1e-9


def test_decoupling_can_lose_where_the_first_layers_forward_passes_are_short() -> None:
    """DDP hides all but its last all-reduce; the first gathers find no forward pass to hide under."""
    made = tuple(Layer(f"layer {index}", ((MIB // 4,),), forward, 1.0) for index, forward in enumerate((0.0, 0.0, 1.0)))
    model, on = Profile("a light start", made), line(AlphaBeta(0, 0.1 / MIB))
    assert seconds("ddp", model, on, cap=MIB) == pytest.approx(4.0 + 0.1)
    assert seconds("sharded", model, on, cap=MIB) == pytest.approx(4.0 + 0.05 + 3 * 0.05)


@given(models(), latencies, slownesses, st.floats(0.5, 4.0))
@settings(max_examples=30, deadline=None)
def test_scarce_cores_never_help(model: Profile, a: float, b: float, cores: float) -> None:
    on = line(AlphaBeta(a, b))
    for schedule in ("ddp", "sharded"):
        shared = seconds(schedule, model, on, Machine(cores=max(1.0, cores), exchange_cpu=b / 2), cap=MIB)
        assert shared >= seconds(schedule, model, on, cap=MIB) - 1e-9


# ---------------------------------------------------------------------------------------------------- the cost of it


def test_events_do_not_grow_with_the_workers() -> None:
    model = profile.even("1000 layers", 1000, 100_000_000, 0.1, 0.2, 0.01)
    link = AlphaBeta(3e-5, 8e-10)
    for schedule in EXCHANGES:
        few, many = (
            step(model, network.flat(link, workers, "tree"), QUIET, Method(schedule)).events for workers in (4, 4096)
        )
        assert many < 2 * few < 4000


# ---------------------------------------------------------------------------------------------------------- by itself


def test_fair_shares() -> None:
    assert fair_level([1.0, 1.0], 1.0) == 0.5
    assert fair_level([0.2, 1.0], 1.0) == pytest.approx(0.8)
    assert fair_level([0.2, 0.3], 1.0) == float("inf")


def test_queues_and_shared_resources() -> None:
    simulation = Simulation({"link": 1.0})
    link = (("link", 1.0),)
    first = simulation.add("first", "a", [Stage(1.0, link)])
    other = simulation.add("other", "b", [Stage(0.5), Stage(1.0, link)])
    last = simulation.add("last", "a", [Stage(1.0)], [other])
    assert simulation.run() == pytest.approx(3.0)
    # Both move from 0.5 on at half the speed: the first has 0.5 left, the other the whole.
    assert (first.end, other.end, last.start) == pytest.approx((1.5, 2.0, 2.0))


def test_tasks_that_wait_for_each_other_are_named() -> None:
    simulation = Simulation({})
    late = simulation.add("late", "a")
    early = simulation.add("early", "b", (), [late])
    late._waits += 1
    early._followers.append(late)
    with pytest.raises(Stuck, match="late, early"):
        simulation.run()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Method("sideways"), "schedule must be one of"),
        (lambda: Method("sharded", codec("sign")), "sends parameters, which sign would spoil"),
        (lambda: codec("power"), "Compressor 'power' is not known"),
        (lambda: codec("topk:much"), "Compressor 'topk:much' is not known"),
        (lambda: network.measured(2, {}), "Neither reduce_scatter nor all_reduce was measured"),
        (lambda: network.flat(AlphaBeta(0, 0), 2, "star"), "algorithm must be one of ring, tree"),
        (lambda: Profile("m", ()), "has no layers"),
        (lambda: Profile("m", (Layer("l", ((1,),), -1, 0),)), "negative time"),
        (lambda: Profile("m", (Layer("l", ((1,),), 1, 1),), order=(1,)), "order must name each of the 1 layers"),
    ],
)
def test_mistakes_get_one_sentence(make: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()  # type: ignore[operator]
    assert EXACT.rounds(()) == (0,)


def test_a_token_bucket_fills_up_while_its_link_is_idle() -> None:
    needs = (("link", 1.0),)
    simulation = Simulation({"link": 1.0}, {"link": 2.0})
    first = simulation.add("first", "lane", [Stage(3.0, needs)])
    second = simulation.add("second", "lane", [Stage(0.5, needs)])
    pause = simulation.add("pause", "compute", [Stage(1.0)], [second])
    third = simulation.add("third", "lane", [Stage(0.4, needs)], [pause])
    fourth = simulation.add("fourth", "lane", [Stage(1.0, needs)])
    simulation.run()
    assert first.end == pytest.approx(1.0), "two of its three seconds were in the bucket"
    assert second.end == pytest.approx(1.5), "which is empty then"
    assert third.start == third.end == pytest.approx(2.5), "and has one second after a pause of one"
    assert fourth.end == pytest.approx(2.9), "of which 0.6 are left"
    other = Simulation({"link": 1.0})
    assert other.add("alone", "lane", [Stage(3.0, needs)]) and other.run() == pytest.approx(3.0)
