"""Cluster files that contradict themselves, sweeps, the memory of models, and what exchanges take of cores."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from planner import cluster, profile, sweep
from planner.__main__ import main
from planner.activations import kept_bytes
from planner.cluster import Cluster, ClusterError, described
from planner.codecs import Cost, codec, compressor
from planner.commands import probe
from planner.instruments import share_of_cores
from planner.machine import HOOK, Host
from planner.models import built_in
from planner.ranking import rank, ways
from planner.reading import parsed
from planner.simulate import Method, step
from planner.user_model import imported

LINK = {"latency": "30us", "bandwidth": "10Gbit"}
GOOD: dict[str, Any] = {"nodes": 4, "device": "v100", "link": LINK}
LINES = {"all_reduce": {"alpha": 3e-3, "beta": 3e-9}}
MIXED: dict[str, Any] = {"nodes": 3, "device": ["rtx3080", "rtx3080", "h100"], "link": LINK}

# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "nodes: 2\nlink: {latency: 1us, bandwidth: 1Gbit}\nnodes: 64\n"),
        ("c.yaml", "nodes: 2\nlink: {latency: 1us, bandwidth: 1Gbit, latency: 1ms}\n"),
        ("c.json", '{"nodes": 2, "link": {"latency": "1us", "bandwidth": "1Gbit"}, "nodes": 64}'),
    ],
)
def test_a_key_that_stands_twice_is_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ClusterError, match=r"'(nodes|latency)' stands twice in one mapping: leave one of them out"):
        cluster.read(tmp_path / name)


def test_a_key_may_stand_in_several_mappings_and_over_a_merged_one(tmp_path: Path) -> None:
    text = "x: &x {a: 1}\ny: &y {<<: *x, a: 2}\nz: [{<<: *y, a: 3}, {a: 4}]\n"
    assert parsed(text, is_json=False) == {"x": {"a": 1}, "y": {"a": 2}, "z": [{"a": 3}, {"a": 4}]}
    (tmp_path / "p.json").write_text('{"name": "a", "name": "b", "layers": []}')
    with pytest.raises(ValueError, match=r"is no profile \('name' stands twice"):
        profile.read(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inner": LINK}, "inner is between devices of a node, which has one: leave it out, or set devices_per_node"),
        ({"devices_per_node": 2, "inner": LINK, "link": None, "collectives": LINES}, "and link, between nodes, is not"),
        ({"collectives": LINES, "algorithm": "tree"}, "algorithm is of links, and collectives were measured"),
        ({"collectives": LINES, "measured_workers": 1}, "measured_workers must be a whole number, not 1"),
        ({"host": {"cores": 1}}, "host must have cores and exchange_cpu"),
        ({"host": {"cores": 0, "exchange_cpu": 1e-10}}, "which no machine is"),
        ({"host": {"cores": 1, "exchange_cpu": 1}}, "which no machine is"),
        ({"host": {"cores": 1, "exchange_cpu": 1e-10, "hook": 1}}, "1 is not a latency: write it like 30us"),
    ],
)
def test_a_cluster_that_contradicts_itself_is_refused(changes: dict[str, Any], says: str) -> None:
    entries = {key: value for key, value in (GOOD | changes).items() if value is not None}
    with pytest.raises(ClusterError, match=says):
        described(entries)


def test_inner_counts_inside_nodes_and_link_between_them_and_collectives_before_both() -> None:
    two = described(GOOD | {"devices_per_node": 2, "inner": {"latency": "1us", "bandwidth": "100Gbit"}})
    inside, between = two.network().phases["all_reduce"]
    assert inside.line.alpha == pytest.approx(2e-6) and between.line.alpha == pytest.approx(6 * 30e-6)
    found = described(GOOD | {"devices_per_node": 2, "inner": LINK, "collectives": LINES})
    assert [hop.line for hop in found.network().phases["all_reduce"]] == [found.collectives["all_reduce"]]
    with pytest.raises(ClusterError, match="device lists 3 entries for 5 nodes"):
        replace(described(MIXED), nodes=5)


# ------------------------------------------------------------------------------------------------------ probes


def test_measured_collectives_say_nothing_of_other_workers(tmp_path: Path) -> None:
    lines = {"all_reduce": cluster.AlphaBeta(3e-3, 3e-9)}
    probe.write(tmp_path / "c.yaml", 4, lines, "a100")
    written = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert described(written).workers == 4
    assert described({**written, "nodes": 2, "devices_per_node": 2}).workers == 4, "the same workers, on two nodes"
    for changes in ({"nodes": 64}, {"devices_per_node": 8}):
        with pytest.raises(ClusterError, match=r"measured among 4 workers: probe (64|32), or put link") as refused:
            described({**written, **changes})
    put = re.search(r"link: (\{.*?\})", str(refused.value))
    assert put is not None
    link = described({"nodes": 4, "link": yaml.safe_load(put[1])})
    (hop,) = link.network().phases["all_reduce"]
    assert (hop.line.alpha, hop.line.beta) == pytest.approx((3e-3, 3e-9), rel=1e-3), (
        "the link explains what was measured"
    )
    with pytest.raises(ClusterError, match=r"probe 64\.$"):
        described({"nodes": 64, "measured_workers": 2, "collectives": {"all_reduce": {"alpha": 1e-3, "beta": 0}}})


def test_what_exchanges_take_of_the_host_is_predicted(tmp_path: Path) -> None:
    lines = {"all_reduce": cluster.AlphaBeta(1e-4, 1e-9)}
    model, quiet = built_in("bert-base").profile(1.0), {"bf16": Cost(1e-10, 1e-10, 1e-10)}
    probe.write(tmp_path / "free.yaml", 2, lines, "a100", quiet)
    probe.write(tmp_path / "host.yaml", 2, lines, "a100", quiet, Host(1.0, 5e-10))
    free, host = cluster.read(tmp_path / "free.yaml"), cluster.read(tmp_path / "host.yaml")
    assert free.machine().cores is None and host.host == Host(1.0, 5e-10, HOOK)
    assert (host.machine().cores, host.machine().exchange_cpu, host.machine().hook) == (1.0, 5e-10, HOOK)
    assert host.machine().synchronous and host.machine().cost(codec("bf16")) == quiet["bf16"]

    def seconds(one: Cluster, schedule: str) -> float:
        return step(model, one.network(), one.machine(), Method(schedule, cap=25 * 2.0**20)).seconds

    for schedule in ("ddp", "sharded", "fsdp2"):
        assert seconds(host, schedule) > 1.05 * seconds(free, schedule), "exchanges take what computing needs"
    few = replace(host, host=Host(8.0, 5e-10))
    assert seconds(few, "sharded") < seconds(host, "sharded"), "where there are more cores, they take less"
    found = probe.account(2, {}, {}, quiet, Host(1.0, 5e-10))
    assert found["host"] == {"cores": 1.0, "exchange_cpu": 5e-10, "hook": HOOK}


def hosted(rank: int, world: int) -> Host | None:
    return probe.host()


def test_a_probe_measures_what_exchanges_take(pool2: Any) -> None:
    first, second = pool2.run(hosted)
    assert first == second and first.cores > 0 and 0 < first.exchange_cpu < 1e-3, "the same on every rank"


def test_a_core_that_several_ranks_run_on_is_shared() -> None:
    everyone = [("a", {0, 1}), ("a", {1}), ("b", {0, 1, 2, 3}), ("a", {2, 3})]
    assert [share_of_cores(everyone, each) for each in range(4)] == [1.5, 0.5, 4.0, 2.0]


# ------------------------------------------------------------------------------------------------------ sweeps


def test_a_sweep_shares_the_batch_as_the_plan_does() -> None:
    """At the bandwidth that the cluster has, a sweep says what the table says."""
    unequal, model = described(MIXED), built_in("bert-base").profile(0.3)
    swept = sweep.sweep("bandwidth", model, unequal, 32)
    at = {way: {round(bits): gain for bits, gain in pairs} for way, pairs in swept.items()}
    batch = sweep.Batch.even(unequal, 32, 0.0)
    for choice in rank(model, unequal, [way for way in ways() if way.name in sweep.SHOWN], batch, sweep.CAPS):
        assert at[choice.name][10**10] == pytest.approx(choice.speedup), choice.name
    (other,) = (pairs for way, pairs in sweep.sweep("bandwidth", model, unequal, 1).items() if way == "dear")
    assert other != swept["dear"], "one example each cannot be shared out evenly"


@pytest.mark.parametrize(
    ("over", "entries", "says"),
    [
        ("workers", MIXED, "--sweep workers changes how many nodes there are, and device lists one for each"),
        ("bandwidth", GOOD | {"collectives": LINES}, "this cluster has measured collectives"),
        ("workers", {"nodes": 4, "collectives": LINES}, "this cluster has measured collectives"),
        ("bandwidth", GOOD | {"nodes": 1, "devices_per_node": 4, "inner": LINK}, "one node alone has none"),
    ],
)
def test_what_cannot_be_swept_over_is_refused_before_anything_is_computed(
    over: str, entries: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(entries))
    with pytest.raises(SystemExit):
        main(["plan", "--model", "gpt", "--cluster", str(tmp_path / "c.yaml"), "--sweep", over])
    said = capsys.readouterr()
    assert says in said.err and len(said.err.splitlines()) == 1 and not said.out


# ------------------------------------------------------------------------------------------------------ memory


class Own(nn.Module):
    """Keeps its input, what the first layer gives (which the ReLU keeps, too), and nothing of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(values)))


def test_activations_of_ones_own_model_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        net, batch = Own().eval(), torch.empty(10, 8)
    assert kept_bytes(net, [batch]) == 10 * 4 * (8 + 16) and not net.training
    gpt = imported("benchmarks.training.gpt:GPT", ["128:int64"], 8)
    assert gpt.activations == pytest.approx(built_in("gpt").activations, rel=0.5), "the formula of the same model"
    given = ["plan", "--model", "benchmarks.training.gpt:GPT", "--step-ms", "500", "--compressors", ""]
    given += ["--workers", "4", "--bandwidth", "10Gbit", "--batch", "8"]
    memory = {}
    for name, more in (("with", ["--input", "128:int64"]), ("without", [])):
        main([*given, *more, "--json", str(tmp_path / name)])
        said = " ".join(capsys.readouterr().out.split())
        assert ("Activations are not counted: give the shape of one example as --input" in said) == (not more)
        found = json.loads((tmp_path / name).read_text())
        memory[name] = next(each["memory"] for each in found["choices"] if each["name"] == "ddp")
        assert (found["activation_bytes_by_example"] is None) == (not more)
    assert memory["with"] - memory["without"] == pytest.approx(8 * gpt.activations)


GPT = ["plan", "--model", "benchmarks.training.gpt:GPT", "--workers", "4", "--bandwidth", "10Gbit"]
BUILT_IN = ["plan", "--model", "gpt", "--workers", "4", "--bandwidth", "10Gbit"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*GPT, "--step-ms", "5", "--input", "wide"], "--input must be one example's shape"),
        ([*GPT, "--step-ms", "5", "--input", "8:int65"], "--input must be one example's shape"),
        ([*GPT, "--step-ms", "5", "--input", "8x8x8"], "change --input, or leave it out"),
        (GPT, "How long benchmarks.training.gpt:GPT computes is not known: give --step-ms"),
        ([*BUILT_IN, "--input", "8"], "--input is of a model of your own"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1


def test_options_that_the_file_or_the_profile_decides_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"nodes": 4, "collectives": LINES}))
    profile.write(built_in("gpt").profile(0.5), tmp_path / "p.json")
    here = ["--cluster", str(tmp_path / "c.yaml")]
    for arguments, says in (
        (["--model", "gpt", *here, "--latency", "1ms"], "leave --workers, --bandwidth and --latency out"),
        (["--model", "gpt", *here, "--handed", "8"], "--handed is for a pipeline"),
        (["--model", str(tmp_path / "p.json"), *here, "--step-ms", "8"], "--step-ms is what a profile says by itself"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", *arguments])
        assert says in capsys.readouterr().err


def test_exact_is_what_goes_as_it_is_and_error_feedback_counts_where_it_is() -> None:
    found = {way.name: way for way in ways(("bf16", "fp16", "int8", "sign", "topk:0.01", "power:4", "acp:4"))}
    assert {name for name, way in found.items() if way.exact} == {
        "ddp", "fsdp2", "dear", "dear:owned", "dear:replicated"
    }  # fmt: skip
    for name in (
        "bf16",
        "fp16",
        "int8",
        "fp8",
        "int4",
        "int3",
        "int2",
        "sign",
        "topk:0.01",
        "power:4",
        "acp:4",
        "exact",
        "safe",
        "fast",
    ):
        assert codec(name).keeps_error == compressor(name).error_feedback, name
