"""Clusters whose devices and links differ, pipelines over them, and workers that fail."""

from __future__ import annotations

import heapq
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.__main__ import main
from planner.batch import Batch
from planner.cluster import Cluster, ClusterError, described, link
from planner.devices import device
from planner.failures import Failures
from planner.models import built_in
from planner.pipelined import pipelined
from planner.profile import Layer, Profile
from planner.ranking import Choice, rank, ways
from planner.shares import shares, speeds, typical, unevenness

LINK = {"latency": "1ms", "bandwidth": "1Gbit"}
MIXED: dict[str, Any] = {"nodes": 3, "device": ["rtx3080", "rtx3080", "h100"], "link": LINK}

# ------------------------------------------------------------------------------------------------------ shares


@given(st.integers(0, 9), st.lists(st.floats(0.2, 5), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_no_sharing_ends_earlier(examples: int, fast: list[float]) -> None:
    found = shares(examples, fast)
    assert sum(found) == examples

    def ends(own: tuple[int, ...]) -> float:
        return max(each / speed for each, speed in zip(own, fast, strict=True))

    every = (own for own in product(range(examples + 1), repeat=len(fast)) if sum(own) == examples)
    assert ends(tuple(found)) == pytest.approx(min(map(ends, every)))


def test_shares_are_in_proportion_to_speed() -> None:
    assert shares(120, [1.0, 1.0, 4.0]) == [20, 20, 80] and unevenness(120, [1.0, 1.0, 4.0]) == 1.0
    assert unevenness(3, [1.0, 1.0]) == pytest.approx(2 / 1.5)
    one = typical([device("rtx3080"), device("h100")])
    assert one.operations * one.sustained == pytest.approx(sum(speeds([device("rtx3080"), device("h100")])) / 2)
    assert one.memory == device("rtx3080").memory and typical([device("h100")] * 2) == device("h100")
    with pytest.raises(ValueError, match="speed is above 0"):
        shares(3, [0.0])


def test_a_fast_worker_among_slow_ones_takes_more_of_the_batch() -> None:
    """As many examples a second as the devices have together, where the network costs next to nothing."""
    cluster = described(MIXED | {"link": {"latency": "0s", "bandwidth": "100Tbit"}})
    batch = Batch.even(cluster, 400, 0.0)
    assert sum(batch.shares) == 1200 and batch.shares[0] == batch.shares[1] < batch.shares[2]
    model = built_in("bert-base")
    each = 3 * model.operations
    profile = model.profile(400 * each / (cluster.device.operations * cluster.device.sustained))
    (found,) = rank(profile, cluster, [way for way in ways(()) if way.name == "ddp"], batch)
    assert found.rate == pytest.approx(sum(speeds(cluster.devices)) / each, rel=0.02)
    for index, device_of in ((0, "rtx3080"), (2, "h100")):
        full = Batch.even(cluster, 400, device(device_of).memory / batch.shares[index])
        assert not rank(profile, cluster, ways(())[:1], full)[0].fits, f"{device_of} must hold its share, too"


# ------------------------------------------------------------------------------------------------------ pipelines


def cluster_of(names: list[str], **more: Any) -> Cluster:
    return described({"nodes": len(names), "device": names, "link": LINK} | more)


def rows(count: int) -> Profile:
    return Profile("rows", tuple(Layer(str(i), ((1 << 10,),), 0.01, 0.02) for i in range(count)))


def cut_over(profile: Profile, cluster: Cluster, each: int, handed: float = 0.0) -> Choice:
    found = pipelined(profile, cluster, Batch.even(cluster, each, 0.0), handed, 1.0)
    assert found is not None
    return found


def test_a_pipeline_of_equal_devices_by_hand() -> None:
    """Four layers on two devices, a batch of 8: micro-batches of one fill and empty it for one of nine turns."""
    cluster = cluster_of(["a100", "a100"])
    found = cut_over(rows(4), cluster, 4)
    turn = 2 * 0.03 / 4  # two layers, one of the four examples that a profile's times are of
    assert found.step.seconds == pytest.approx(9 * turn) and found.rate == pytest.approx(8 / (9 * turn))
    assert found.code.endswith("2 stages, 8 micro-batches of 1")
    assert found.memory == 16 * 2 * 1024


def test_a_pipeline_waits_for_its_slowest_link_and_gives_fast_devices_more_layers() -> None:
    slow = {"latency": "1s", "bandwidth": "1Gbit"}
    quick, held = cluster_of(["a100"] * 3, link=[LINK] * 3), cluster_of(["a100"] * 3, link=[LINK, LINK, slow])
    times = [cut_over(rows(30), one, 4, handed=1e3).step.seconds for one in (quick, held)]
    assert times[1] > times[0]
    mixed = cluster_of(["rtx3080", "h100"])
    found = cut_over(rows(30), mixed, 64)
    even = cluster_of(["rtx3080", "rtx3080"])
    assert found.step.seconds < cut_over(rows(30), even, 64).step.seconds * 1.01
    assert found.memory > 16 * 1024 * 15, "one stage has more than half of the layers"


def test_where_handing_on_takes_longer_than_computing_there_is_no_pipeline() -> None:
    cluster = cluster_of(["a100", "a100"])
    assert pipelined(rows(4), cluster, Batch.even(cluster, 4, 0.0), 1e9, 1.0) is None


def test_a_pipeline_that_does_not_fit_says_so() -> None:
    big = Profile("big", (Layer("a", ((1 << 31,),), 0.01, 0.02), Layer("b", ((8,),), 0.01, 0.02)))
    cluster = cluster_of(["rtx3080", "rtx3080"])
    assert not cut_over(big, cluster, 4).fits
    cluster = cluster_of(["a100", "a100"])
    assert cut_over(big, cluster, 4).fits


# ------------------------------------------------------------------------------------------------------ failures


def counted(failures: Failures, workers: int, total: float, seed: int) -> float:
    """The useful share of the time of one random course. Repairs take exactly ``repair``."""
    draw = random.Random(seed)
    every, now, useful = failures.interval(workers), 0.0, 0.0
    back: list[float] = []  # when the broken ones are spares again
    loading = 0.0  # seconds of the restart under way
    while now < total:
        lives = draw.expovariate(workers / failures.mtbf)
        trained = max(0.0, lives - loading)
        useful += (trained // (every + failures.checkpoint)) * every
        now += lives
        heapq.heappush(back, now + failures.repair)
        while back and back[0] <= now:
            heapq.heappop(back)
        if len(back) > failures.spares:  # it waits for the first that comes back
            now = heapq.heappop(back)
        loading = failures.restart
    return useful / now


@pytest.mark.parametrize("spares", [0, 1, 4])
@pytest.mark.parametrize(("mtbf", "repair", "every"), [(400.0, 20.0, None), (5000.0, 800.0, 40.0), (200.0, 1.0, 10.0)])
def test_the_formula_is_what_random_courses_come_to(
    mtbf: float, repair: float, every: float | None, spares: int
) -> None:
    failures = Failures(mtbf, checkpoint=1.0, restart=4.0, repair=repair, spares=spares, every=every)
    assert counted(failures, 10, total=3e6 * mtbf / 400, seed=7) == pytest.approx(failures.useful(10), rel=0.02)


@given(st.floats(100, 1e6), st.floats(0.1, 50), st.floats(0, 100), st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_no_other_interval_is_better(mtbf: float, checkpoint: float, restart: float, workers: int) -> None:
    best = Failures(mtbf, checkpoint, restart)
    every = best.interval(workers)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert Failures(mtbf, checkpoint, restart, every=factor * every).trains(workers) <= best.trains(workers) + 1e-12


def test_failures_at_their_limits() -> None:
    assert Failures(1e15).useful(8) == pytest.approx(1, abs=1e-3)
    assert Failures(60.0, restart=600.0).useful(1000) == pytest.approx(0, abs=1e-9)
    few, many = (Failures(1e6, spares=count).waits(100) for count in (0, 20))
    assert many < 1e-3 < few, "spares take the place of the dead"


def test_a_plan_with_mixed_devices_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MIXED | {"failures": {"mtbf": "10d", "spares": 1}}))
    arguments = ["plan", "--model", "bert-large", "--compressors", "", "--cluster", str(tmp_path / "c.yaml")]
    main([*arguments, "--json", str(tmp_path / "p.json")])
    said, found = " ".join(capsys.readouterr().out.split()), json.loads((tmp_path / "p.json").read_text())
    assert "on rtx3080" in said and "on h100" in said and "of the time counts" in said and "pipeline" in said
    assert sum(found["batch_by_worker"]) == 96 and found["batch_by_worker"][2] > 60
    assert found["failures"]["useful"] == pytest.approx(Failures(864000.0, spares=1).useful(3))
    assert {"pipeline", "dear"} <= {each["name"] for each in found["choices"]}
    times = [each["step"]["seconds"] for each in found["choices"] if each["fits"]]
    assert times == sorted(times), "whichever is faster comes first"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device": ["h100"] * 2}, "device lists 2 entries for 3 nodes"),
        ({"device": ["h100", "h100", "abacus"]}, "Device 'abacus' is not known"),
        ({"failures": 3}, "failures must have an mtbf"),
        ({"failures": {"spares": 3}}, "failures must have an mtbf"),
        ({"failures": {"mtbf": "30d", "luck": 3}}, "may have checkpoint, restart"),
        ({"failures": {"mtbf": 30}}, "failures: mtbf is 30, which is no time"),
        ({"failures": {"mtbf": "-3d"}}, "failures: mtbf is '-3d', which is no time"),
        ({"failures": {"mtbf": "0s"}}, "failures: mtbf must be a time above 0"),
        ({"failures": {"mtbf": "3d", "every": "0s"}}, "failures: every must be a time above 0"),
        ({"failures": {"mtbf": "3d", "spares": -1}}, "spares must be a whole number, not -1"),
        ({"failures": {"mtbf": "3d", "spares": 1.5}}, "spares must be a whole number, not 1.5"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    assert described(MIXED).workers == 3 and described(MIXED).link == link("1ms", "1Gbit")
    with pytest.raises(ClusterError, match=says):
        described(MIXED | changes)
