"""The parts of ``auto``: what a stopwatch sees, what is listed, how sizes are searched, when steps have changed."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import training
from auto_instruments import FAST, SLOW
from bayes_opt import BayesianOptimization

import compress
import dear
from compress import losses
from dear import choosing
from dear.cost_model import AlphaBeta
from planner import codec_timing, deciding, probing, profile, profiling, watching
from planner.codecs import codec, compressor
from planner.deciding import Way
from planner.devices import PASSES
from planner.instruments import Instruments
from planner.machine import Machine
from planner.network import flat
from planner.profile import Piece
from planner.search import Search
from planner.stopwatch import Stopwatch
from planner.units import MIB


class Ticks:
    """A clock that says how often it was asked."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def timed(rank, world):
    model, opt = training.build("Tied", training.SGD, {})
    engine = dear.attach(model, opt)
    training.plain_step(model, opt, rank, 0)
    watch = Stopwatch(model, torch.device("cpu"), Ticks())
    engine.start_trace()
    for step in range(3):
        watch.step_began()
        training.plain_step(model, opt, rank, step)
    with torch.no_grad():
        training.loss_of(model, rank, 9)
    watch.remove()
    order, forward, backward = watch.times()
    names = [watch.layers[number][0] for number in order]
    found = profiling.measured_profile(watch, 1.0, engine.stop_trace(), 3, engine.update, world)
    engine.detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    return names, forward, backward, found


def test_a_stopwatch_sees_each_layer_once_and_no_wait(pool2):
    for names, forward, backward, found in pool2.run(timed):
        assert names == ["embed", "middle"], "the head's weight is the first layer's"
        # A stamp at each layer's hooks: one before and one behind what may wait, which is left out.
        assert forward == [1.0, 3.0], "its own, what is between, and the head, which has nothing of its own"
        assert backward == [1.0, 2.0], "a stamp for each gradient"
        assert [layer.shapes for layer in found.layers] == [((16, 16),), ((16, 16), (16,))]
        assert found.update > 0


def compiled(rank, world):
    model, _ = training.build("Mlp", training.SGD, {})
    model.module.second.compile(backend="eager")
    watch = Stopwatch(model, torch.device("cpu"), Ticks())
    assert not model.module.second._forward_pre_hooks
    trace = [{"lane": "wait", "start": 0, "end": int(2e9)}, {"lane": "update", "start": 0, "end": int(1e9)}]
    found = profiling.measured_profile(watch, 4.0, trace, 1, "replicated", world)
    watch.remove()
    return found


def test_where_code_is_compiled_computing_is_shared_out(pool2):
    found, _ = pool2.run(compiled)
    assert (found.forward, found.backward, found.update) == pytest.approx((1 / 3, 2 / 3, 1.0))
    assert found.layers[1].forward > found.layers[2].forward > 0


def test_ranks_must_have_measured_the_same():
    one = profile.even("one", 3, 300, 1.0, 2.0)
    assert profiling.slowest([one, one.scaled(2.0), one]).compute == 6.0
    with pytest.raises(ValueError, match="rank 1 has measured other layers than rank 0"):
        profiling.slowest([one, profile.even("two", 2, 300, 1.0, 2.0)])


def test_what_is_listed():
    layers = (profile.Layer("matrix", ((1024, 128),), 0.01, 0.02),) * 8
    model = profile.Profile("model", layers, 0.01)
    updates = ["sharded", "owned", "replicated", "ddp"]
    ways = deciding.ways(updates, ["replicated"], ["power:4"])
    assert Way("owned") not in ways and Way("owned") in deciding.ways(updates[1:], [], [])
    takes, caps = partial(deciding.simulated, model), deciding.sizes(model)
    slow = deciding.predicted(partial(takes, flat(SLOW, 2), Machine()), ways, caps)
    assert slow[0].way == Way("replicated", "power:4"), "where nothing moves, what sends least is the fastest"
    quick = deciding.predicted(partial(takes, flat(FAST, 2), Machine(hook=0.1)), ways, caps)
    assert quick[0].mib == pytest.approx(model.bytes / MIB), "where each message costs, one group is best"
    listed = deciding.shortlist(slow, Way("sharded"), 3)
    assert [one.way for one in listed] == [Way("sharded"), Way("ddp"), Way("replicated", "power:4")]


def alike(size: float) -> float:
    """What is predicted of any size."""
    return 1.0


@pytest.mark.parametrize("best", [0.7, 6.0, 33.0])
def test_the_search_finds_a_size(best):
    def takes(size: float) -> float:
        return 1.0 + 0.05 * abs(math.log2(size / best))

    search = Search(41.6, [(2.6, takes(2.6)), (10.4, takes(10.4))], float, alike)
    seen = [2.6, 10.4]
    for _ in range(5):
        seen.append(search.ask())
        search.tell(seen[-1], takes(seen[-1]))
    assert min(map(takes, seen)) < 1.04, seen
    ordered = sorted(seen)
    assert all(b / a >= 1.09 for a, b in pairwise(ordered)), "no size is tried twice"
    assert all(search.low <= size <= search.high for size in seen)


def test_the_search_asks_for_no_groups_that_were_tried():
    """Three tensors make four kinds of groups, whatever the size."""

    def groups(size: float) -> int:
        return sum(size >= edge for edge in (0.07, 0.25, 0.6))

    search, asked = Search(0.7, [(0.7, 2.0)], groups, alike), [0.7]
    while (size := search.ask()) is not None:
        asked.append(size)
        search.tell(size, 1.0 + abs(size - 0.3))
    assert sorted(map(groups, asked)) == [0, 1, 2, 3]


def test_the_search_asks_for_nothing_that_is_predicted_to_take_much_longer():
    search, asked = Search(40.0, [(2.0, 1.0)], float, lambda size: 1.0 if 1 < size < 6 else 1.2), []
    while (size := search.ask()) is not None:
        asked.append(size)
        search.tell(size, 0.9 if size > 5 else 1.0)
    assert len(asked) > 5 and all(1 < size < 6 for size in asked)


def test_groups_are_told_apart_as_the_engine_makes_them():
    layers = [profile.Layer("first", ((100,),), 0.1, 0.2), profile.Layer("last", ((300,), (50,)), 0.1, 0.2)]
    model = profile.Profile("model", tuple(layers))
    whole = model.bytes / MIB
    for way in (Way("sharded"), Way("ddp")):
        assert deciding.layout(model, way, whole) == deciding.layout(model, way, 2 * whole) == (1800,)
        assert deciding.layout(model, way, 1000 / MIB) == deciding.layout(model, way, 1390 / MIB) == (1400, 400)
        assert deciding.layout(model, way, 100 / MIB) == (200, 1200, 400)


def test_the_search_wakes_no_threads_that_would_spin(monkeypatch):
    from threadpoolctl import threadpool_info

    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    search, inside, suggest, before = (
        Search(40.0, [(2.0, 1.0)], float, alike),
        [],
        BayesianOptimization.suggest,
        threads(),
    )

    def looked_at(self):
        inside.extend(threads())
        return suggest(self)

    monkeypatch.setattr(BayesianOptimization, "suggest", looked_at)
    for _ in range(3):
        search.tell(search.ask(), 1.0)
    assert inside and set(inside) == {1}
    assert threads() == before, "the user's own work goes on as it was"


def boundaries_until_changed(times):
    """How many step boundaries it takes, with these seconds by step, until a change is seen."""
    now = 0.0
    course = watching.changed(lambda: now, lambda mine, label: [mine, mine / 2])
    for taken, seconds in enumerate(times):
        if next(course, "ended") == "ended":
            return taken
        now += seconds
    return None


def test_a_change_counts_after_a_minute():
    assert boundaries_until_changed([1.0] * 500) is None
    assert boundaries_until_changed([1.0] * 30 + [1.2] * 500) is None, "as a machine's load may do"
    for changed in (2.0, 1.41, 0.75, 0.5):  # 1.41: measured, as the link of four workers was cut to half
        taken = boundaries_until_changed([1.0] * 30 + [changed] * 500)
        assert 30 + 4 * 15 <= taken <= 30 + 5 * 15
    pauses = [1.0] * 14 + [100.0]
    assert boundaries_until_changed(pauses * 40) is None, "an evaluation now and then"


def test_losses_are_those_of_the_stored_runs():
    from benchmarks.convergence import table

    assert json.loads(losses.TABLE.read_text()) == table.table(), "run python -m benchmarks.convergence.table"
    assert losses.within(0.0) == [] and losses.above(None) == 0.0
    assert losses.within(0.001) == ["bf16", "int8"]
    presets = {"safe", "fast"}
    assert presets & set(losses.within(0.03)) == {"safe"}, "presets, by their worst training"
    assert presets <= set(losses.within(0.04)) and not presets & set(losses.within(0.01))
    assert "power:4.5x" in losses.within(0.03) and "power:4.5x" not in losses.within(0.01)


@pytest.mark.parametrize("name", losses.table())
def test_every_method_of_the_table_can_be_made_and_simulated(name):
    piece = Piece(0, (256, 512), 4 * 256 * 512)
    assert 0 < sum(codec(name).rounds([piece])) < piece.bytes
    assert hasattr(compressor(name), "bind_to_schedule")


@pytest.mark.parametrize("name", ["safe", "fast"])
def test_a_preset_is_tried_as_it_is_in_the_end_and_made_with_its_start(name):
    assert compressor(name).start.given == 0 and compressor(name).options() != {}
    made, preset = compressor(name, steady=False), compress.preset(name)
    assert made.options() == preset.options() and made.start.given == preset.start.given > 0
    assert codec(name).start == compress.presets.START and codec("int8").start == 0
    assert PASSES[name] != PASSES["sign"]


def test_a_low_rank_that_follows_the_matrix_sends_what_it_says():
    sent = sum(codec("power:4.5x").rounds([Piece(0, (512, 2048), 4 * 512 * 2048)]))
    assert sent == pytest.approx(2 * 512 * 2048 / 4.5, rel=0.03)


def measures(rank, world):
    instruments = Instruments()
    group, device = torch.distributed.group.WORLD, torch.device("cpu")
    machine = instruments.machine(group, device)
    network = instruments.network(group, device, ["all_reduce", "reduce_scatter", "all_gather"], {})
    return machine, network


@pytest.mark.slow
def test_this_machine_can_be_measured(pool2):
    (machine, network), (_, other) = pool2.run(measures)
    assert network.phases == other.phases, "the same lines on every rank"
    assert 0 < network.seconds("all_reduce", 1 << 20) < 60
    assert machine.cores and machine.exchange_cpu > 0 and machine.cost(codec("power:4")).encode > 0


@pytest.mark.parametrize(
    ("seconds", "rate"),
    [
        ([0.29e-3, 6.97e-3, 85.21e-3, 350.5e-3], 12e6),  # an all-reduce of two workers at 100 Mbit/s
        ([0.07e-3, 1.1e-3, 39.99e-3, 172.4e-3], 24.4e6),  # a reduce-scatter there
        ([0.08e-3, 0.24e-3, 8.07e-3, 34.72e-3], 121e6),  # at 500 Mbit/s
        ([0.17e-3, 0.25e-3, 4.18e-3, 17.61e-3], 238e6),  # at 1 Gbit/s
    ],
)
def test_what_a_token_bucket_lets_through_at_once_does_not_say_the_rate(seconds, rate):
    sizes = [1 << power for power in (14, 17, 20, 22)]
    line = probing.fitted({"all_reduce": (sizes, seconds)})["all_reduce"]
    assert 1 / line.beta == pytest.approx(rate, rel=0.06)
    assert line.alpha == seconds[0], "what a small message costs"
    with pytest.raises(ValueError, match="follow no line"):  # two sizes that stalled are no bursts
        probing.fitted({"all_reduce": (sizes, [1e-4, 4e-4, 0.203, 0.212])})
    steady = AlphaBeta(1e-4, 1e-9)
    found = probing.fitted({"all_reduce": (sizes, [steady.seconds(size) for size in sizes])})["all_reduce"]
    assert (found.alpha, found.beta) == pytest.approx((1e-4, 1e-9))


NAMES = ("bf16", "fp16", "int8", "fp8", "int4", "int3", "int2", "sign", "topk:0.01", "power:4", "power:4.5x", "acp:4")


class Steady:
    """A clock by which each stage of a compressor takes a second, whatever it does."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def timed_codecs(rank, world):
    group, shapes = torch.distributed.group.WORLD, [(64, 48), (48,), (32, 64)]
    costs = {name: codec_timing.measured_cost(name, group, shapes, Steady()) for name in NAMES}
    taken = codec_timing.measured_costs(["bf16"], group, shapes)
    return costs, taken


def test_every_compressor_can_be_timed_without_sending_anything(pool2):
    size = 4 * (64 * 48 + 48 + 32 * 64)
    for costs, taken in pool2.run(timed_codecs):
        for name, cost in costs.items():
            between = 3 if name.startswith("power") else 1
            assert [round(each * size) for each in (cost.encode, cost.merge, cost.decode)] == [1, between, 1], name
        assert min(taken["bf16"].encode, taken["bf16"].merge, taken["bf16"].decode) > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_compressor_has_a_cost_and_a_payload(name):
    wanted = {"int4": 4.125 / 32, "int3": 3.125 / 32, "int2": 2.125 / 32, "int8": 8.25 / 32, "bf16": 0.5}
    assert name.partition(":")[0] in PASSES and compressor(name)
    sent = sum(codec(name).rounds([Piece(0, (1024, 1024), 4 << 20)])) / (4 << 20)
    assert sent == pytest.approx(wanted.get(name, sent)) and sent <= 0.5


def test_the_planner_is_found_in_a_checkout_or_missed_in_one_sentence(monkeypatch):
    assert choosing.is_chooser(choosing.auto(loss="2%"))
    monkeypatch.setattr(choosing, "FALLBACK", ("no_such_planner.auto",))
    monkeypatch.setattr(choosing, "GROUP", "no.such.group")
    with pytest.raises(ValueError, match=r"needs the planner beside dear: install dear-torch\[auto\]"):
        choosing.auto()
