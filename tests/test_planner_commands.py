"""python -m dear: plans of built-in models and clusters, what is refused, the probe, and the trace's form."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dear
from dear.cost_model import AlphaBeta
from planner import cluster, profile, timeline, tracing
from planner.__main__ import main
from planner.cluster import ClusterError, described
from planner.codecs import Cost, codec
from planner.commands import info, probe
from planner.models import built_in
from planner.ranking import memory_bytes, rank, ways

PLAN = ["plan", "--model", "bert-base", "--compressors", "acp:4"]
OPTIONS = ["--workers", "64", "--bandwidth", "10Gbit", "--latency", "30us"]
RESULT = str(Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "collectives-500mbit.json")
GOOD: dict[str, Any] = {"nodes": 4, "device": "v100", "link": {"latency": "30us", "bandwidth": "10Gbit"}}


def test_a_plan_ranks_ways_and_labels_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    main([*PLAN, *OPTIONS, "--step-ms", "300", "--json", str(out)])
    assert "PREDICTED, not measured" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["label"].startswith("PREDICTED") and found["workers"] == 64
    assert found["compute_seconds"] == pytest.approx(0.3, rel=0.05)
    times = [each["step"]["seconds"] for each in found["choices"]]
    assert times == sorted(times) and min(times) > 0.3
    by_name = {each["name"]: each for each in found["choices"]}
    assert by_name["ddp+fp16"]["speedup"] == pytest.approx(1) and not by_name["acp:4"]["exact"]
    assert by_name["dear"]["code"].startswith('dear.attach(model, optimizer, update="sharded", bucket_cap_mb=')
    assert by_name["dear"]["memory"] < by_name["ddp"]["memory"]


def test_a_sweep_is_a_picture(tmp_path: Path) -> None:
    picture, out = tmp_path / "s.png", tmp_path / "s.json"
    main(
        [
            "plan",
            "--model",
            "gpt",
            "--compressors",
            "",
            *OPTIONS,
            "--sweep",
            "workers",
            "--picture",
            str(picture),
            "--json",
            str(out),
        ]
    )
    assert picture.read_bytes()[:4] == b"\x89PNG"
    speedups = json.loads(out.read_text())["sweep"]["speedups"]
    assert [at for at, _ in speedups["dear"]] == [2, 4, 8, 16, 32, 64, 128, 256]
    assert all(value == pytest.approx(1) for _, value in speedups["ddp+fp16"])


def test_what_does_not_fit_comes_last() -> None:
    model = built_in("llama-7b").profile(10.0)
    on = described({**GOOD, "nodes": 64})
    found = rank(model, on, [way for way in ways(()) if way.name in ("ddp", "fsdp2")], caps=[64 * 2.0**20])
    assert [(each.name, each.fits) for each in found] == [("fsdp2", True), ("ddp", False)]
    dense = next(way for way in ways(()) if way.name == "ddp")
    assert memory_bytes(dense, model, 64) == 16 * model.elements  # parameters, gradients, and Adam's two


def test_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--model", "benchmarks.training.gpt:GPT", "--step-ms", "500", "--compressors", "", *OPTIONS])
    assert "10.89 M parameters" in capsys.readouterr().out
    profile.write(built_in("gpt").profile(0.5, 0.01), tmp_path / "gpt.json")
    assert profile.read(tmp_path / "gpt.json") == built_in("gpt").profile(0.5, 0.01)
    main(["plan", "--model", str(tmp_path / "gpt.json"), "--compressors", "", *OPTIONS])
    assert "10.89 M parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (PLAN, "Nothing says what the cluster is"),
        (["plan", "--model", "vgg", *OPTIONS], "Model 'vgg' is not built in"),
        (["plan", "--model", "nowhere:Net", *OPTIONS], "Model nowhere:Net cannot be imported"),
        (["plan", "--model", "benchmarks.training.gpt:GPT", *OPTIONS, "--step-ms", "-1"], "must be above 0"),
        (["plan", "--model", "torch.nn:ReLU", *OPTIONS], "no parameters"),
        ([*PLAN, "--workers", "1", "--bandwidth", "10Gbit"], "2 workers or more"),
        ([*PLAN, "--workers", "4", "--bandwidth", "fast"], "'fast' is not a bandwidth"),
        ([*PLAN, *OPTIONS, "--latency", "30"], "'30' is not a latency"),
        ([*PLAN, *OPTIONS, "--device", "abacus"], "Device 'abacus' is not known"),
        ([*PLAN[:-1], "zip", *OPTIONS], "Compressor 'zip' is not known"),
        ([*PLAN, "--cluster", "nowhere.yaml"], "nowhere.yaml cannot be read as a cluster"),
        ([*PLAN, "--cluster", "x.yaml", *OPTIONS], "leave --workers, --bandwidth and --latency out"),
        (["trace", "nowhere.py"], "There is no script nowhere.py"),
        (["dance"], "invalid choice: 'dance'"),
        ([*PLAN, "--workers", "4", "--bandwidth", "-10Gbit"], "'-10Gbit' is not a bandwidth"),
        ([*PLAN, "--workers", "4", "--bandwidth", "1.2.3Gbit"], "'1.2.3Gbit' is not a bandwidth"),
        ([*PLAN, *OPTIONS, "--latency", "1e5s"], "A latency of 1e5s is that of no network"),
        ([*PLAN, *OPTIONS, "--step-ms", "inf"], "must be above 0, and finite"),
        ([*PLAN, *OPTIONS, "--sweep", "latency"], "invalid choice: 'latency'"),
        ([*PLAN, *OPTIONS, "--sweep", "workers", "--picture", "x.nope"], "--picture must be a file that ends with"),
        ([*PLAN, *OPTIONS, "--json", "/"], "--json / is a folder"),
        ([*PLAN, *OPTIONS, "--json", "/proc/no/such.json"], "--json /proc/no/such.json cannot be written"),
        ([*PLAN[:-1], "topk:2", *OPTIONS], "Compressor 'topk:2' is not known"),
        ([*PLAN[:-1], "acp:0", *OPTIONS], "Compressor 'acp:0' is not known"),
        ([*PLAN[:-1], "power:1.5", *OPTIONS], "Compressor 'power:1.5' is not known"),
        ([*PLAN, *OPTIONS, "--cell", "2"], "--cell is of a file that the collectives benchmark wrote"),
        ([*PLAN, *OPTIONS, "--handed", "-3"], "--handed must be 0 or more"),
        ([*PLAN, *OPTIONS[2:], "--workers", "100000000"], "no more than 1048576 are predicted"),
        ([*PLAN, *OPTIONS[2:], "--workers", "four"], "invalid int value: 'four'"),
        (
            [*PLAN, "--cluster", RESULT, "--cell", "7"],
            "it has no cell 7 with lines: choose one of 1 (2 workers",
        ),
        ([*PLAN, "--cluster", RESULT], "it has several cells: choose one by --cell, of 1 (2 workers, 500mbit)"),
        (["info", "--json", "/proc/x"], "--json /proc/x cannot be written"),
        (["trace", "--picture", "x.nope", __file__], "--picture must be a file that ends with"),
        (["trace", "--json", "/", __file__], "--json / is a folder"),
        (["probe"], "The probe could not begin"),
        (["probe", "--device", "abacus"], "Device 'abacus' is not known"),
        (["probe", "--seconds", "inf"], "--seconds must be above 0"),
        (["trace", "--steps", "0", __file__], "steps must be at least 1"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code in (1, 2) and says in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[1]", "no JSON", '{"layers": [{"name": "a"}]}',
        '{"name": "x", "layers": [{"name": "a", "shapes": [["x"]], "forward": 1, "backward": 1}]}',
    ],
)  # fmt: skip
def test_a_profile_that_is_none_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "it.json").write_text(text)
    with pytest.raises(SystemExit):
        main(["plan", "--model", str(tmp_path / "it.json"), *OPTIONS])
    said = capsys.readouterr().err
    assert "it.json is no profile (" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nodes": 0}, "nodes must be a whole number, not 0"),
        ({"nodes": True}, "nodes must be a whole number, not True"),
        ({"speed": 3}, "'speed' is no entry of a cluster"),
        ({"link": "10Gbit"}, "link must have a latency and a bandwidth"),
        ({"link": {"latency": "30us", "bandwidth": "-1Gbit"}}, "'-1Gbit' is not a bandwidth"),
        ({"link": [GOOD["link"]] * 3}, "link lists 3 entries for 4 nodes"),
        ({"algorithm": "star"}, "algorithm must be one of"),
        ({"straggler": 0.5}, "straggler must be 1 or more"),
        ({"straggler": float("nan")}, "straggler must be a number"),
        ({"device": {"name": "mine"}}, "device must be a name, or have exactly"),
        ({"collectives": {"gossip": {}}}, "collectives must name some of"),
        ({"collectives": {"all_gather": {"alpha": 1e-4, "beta": 0}}}, "must have all_reduce, or both"),
        ({"collectives": {"all_reduce": {"alpha": 0, "beta": 0}}}, "which no network does"),
        ({"collectives": {"all_reduce": {"alpha": "fast", "beta": 0}}}, "alpha must be a number, not 'fast'"),
        ({"collectives": {"all_reduce": {"alpha": 1, "beta": 8}}}, "which no network does"),
        ({"collectives": {"all_reduce": {"alpha": -1, "beta": 0}}}, "alpha must be a number, not -1"),
        ({"compressors": ["bf16"]}, "compressors must be a mapping"),
        ({"compressors": {"zip": {}}}, "compressors: compressor 'zip' is not known"),
        ({"compressors": {"bf16": {"encode": 1e-10}}}, "bf16 must have encode, merge and decode"),
        ({"compressors": {"bf16": {"encode": -1, "merge": 0, "decode": 0}}}, "encode must be a number, not -1"),
        ({"compressors": {"bf16": {"encode": 1, "merge": 0, "decode": 0}}}, "which no machine does"),
    ],
)
def test_a_cluster_that_lies_is_refused(changes: dict[str, Any], says: str) -> None:
    assert described(GOOD).workers == 4
    with pytest.raises(ClusterError, match=says):
        described(GOOD | changes)


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    found = described(GOOD | {"collectives": {"all_reduce": {"alpha": "1e-3", "beta": "1e-9"}}})
    assert found.collectives["all_reduce"] == AlphaBeta(1e-3, 1e-9)


def test_a_model_is_found_beside_the_command_and_one_that_exits_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("import torch\ndef make(): return torch.nn.Linear(4, 4)\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit('--data is required')\n")
    code = "import sys; sys.path.remove(''); from planner.user_model import imported; print(imported(sys.argv[1]).name)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    for name, says in (("beside:make", "beside:make"), ("exits:make", "cannot be imported and made (SystemExit")):
        command = [sys.executable, "-c", code, name]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert says in done.stdout + done.stderr


def test_where_nothing_fits_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--model", "llama-70b", *OPTIONS])
    assert "No way fits: the least needs" in capsys.readouterr().out


def test_the_slowest_link_counts(tmp_path: Path) -> None:
    slow = {"latency": "1ms", "bandwidth": "1Gbit"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(GOOD | {"link": [GOOD["link"]] * 3 + [slow]}))
    assert cluster.read(tmp_path / "c.yaml").link == cluster.link("1ms", "1Gbit")


def test_what_the_collectives_benchmark_wrote_is_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = cluster.read(Path(RESULT), 4)
    fits = json.loads(Path(RESULT).read_text())["cells"][3]["fits"]
    assert found.workers == 4 and found.collectives["reduce_scatter"].beta == fits["ring-rs"]["beta"]
    assert found.collectives["all_reduce"].alpha == fits["all_reduce"]["alpha"]
    main([*PLAN, "--cluster", RESULT, "--cell", "4", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["workers"] == 4 and plan["choices"], "--json alone prints nothing else"
    (tmp_path / "none.json").write_text('{"benchmark": "collectives", "cells": [{"workers": 2, "fits": {}}, 3]}')
    with pytest.raises(ClusterError, match="no cell of it has lines of an all-reduce"):
        cluster.read(tmp_path / "none.json")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(GOOD))
    with pytest.raises(ClusterError, match="leave --cell out"):
        cluster.read(tmp_path / "own.yaml", 1)


def test_a_probe_accounts_for_every_time() -> None:
    measured = {"all_reduce": ([10, 20], [1.0, 2.0])}
    found = probe.account(2, measured, probe.fitted(measured), {"bf16": Cost(1.0, 2.0, 3.0)})
    assert json.loads(json.dumps(found)) == found
    assert found["collectives"]["all_reduce"]["seconds"] == [1.0, 2.0]
    assert found["collectives"]["all_reduce"]["beta"] == pytest.approx(0.1)
    assert found["compressors"]["bf16"] == {"encode": 1.0, "merge": 2.0, "decode": 3.0}


def probed(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    probe.SIZES = (1 << 12, 1 << 16)  # type: ignore[assignment]
    return {phase: (line.alpha, line.beta) for phase, line in probe.fitted(probe.measure(1e9)).items()}


def test_a_probe_measures_every_phase_alike_on_every_rank(pool2: Any, tmp_path: Path) -> None:
    first, second = pool2.run(probed)
    assert first == second and set(first) == {"all_reduce", "reduce_scatter", "all_gather", "all_to_all"}
    lines = {phase: cluster.AlphaBeta(*line) for phase, line in first.items()}
    costs = {"bf16": Cost(1e-10, 2e-10, 3e-10), "topk:0.01": Cost(4e-10, 0.0, 1e-10)}
    probe.write(tmp_path / "c.yaml", 2, lines, "a100", costs)
    machine = cluster.read(tmp_path / "c.yaml").machine()
    assert machine.cost(codec("bf16")) == costs["bf16"] and machine.cost(codec("topk:0.01")) == costs["topk:0.01"]
    assert machine.cost(codec("sign")) == cluster.device("a100").costs()["sign"], "what was not measured is predicted"
    assert cluster.read(tmp_path / "c.yaml").network().phases["all_reduce"][0].line == lines["all_reduce"]


def test_times_that_follow_no_line_are_refused() -> None:
    sizes = [1 << power for power in (12, 15, 18, 20)]
    with pytest.raises(ValueError, match="The times of all_reduce follow no line"):
        probe.fitted({"all_reduce": (sizes, [5.0, 1e-4, 8.0, 1e-4])})


def test_a_link_that_stalls_in_the_probe_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stalls(budget: float) -> None:
        raise RuntimeError("Rank 1 is silent\nin all-gather.")

    monkeypatch.setattr(probe.dear, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(probe.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(probe, "measure", stalls)
    with pytest.raises(SystemExit):
        main(["probe", "--out", str(tmp_path / "c.yaml")])
    said = capsys.readouterr().err
    assert said.startswith("error: The network could not be measured (Rank 1 is silent in all-gather): see what stalls")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "c.yaml").exists()


def traced(rank: int, world: int, folder: str) -> str:
    torch.manual_seed(1)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dear.attach(model, optimizer)
    tracer = tracing.Tracer(engine, model, Path(folder) / "trace.json", steps=2, skip=2)
    for _ in range(6):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()
    assert tracer.done
    return str(tracer.path)


def test_a_trace_has_two_steps_of_compute_and_both_lanes(pool2: Any, tmp_path: Path) -> None:
    for path in pool2.run(traced, str(tmp_path)):
        events = json.loads(Path(path).read_text())["traceEvents"]
        shown = [event for event in events if event["ph"] == "X"]
        assert {"compute", "reduce-scatter", "all-gather"} <= {event["cat"] for event in shown}
        names = [event["name"] for event in shown]
        assert names.count("forward 0") == names.count("forward 2") == 2
        # A part's backward begins with the gradient of its output.
        assert names.count("backward 0") == names.count("backward 2") == 2
        assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in shown)


SCRIPT = """
import dear, torch
from torch.nn.parallel import DistributedDataParallel

torch.manual_seed(1)
model = DistributedDataParallel(torch.nn.Linear(8, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine = dear.attach(model, optimizer)
for _ in range(5):
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
engine.detach()
"""


def traced_script(rank: int, world: int, folder: str) -> list[str]:
    """The command in a script's place: only the first rank writes what is asked for beside the trace."""
    at = Path(folder)
    (at / f"train{rank}.py").write_text(SCRIPT)
    given = ["--steps", "2", "--skip", "1", "--picture", str(at / "t.svg"), "--json", str(at / f"t{rank}.json")]
    main(["trace", "--out", str(at / "trace.json"), *given, str(at / f"train{rank}.py")])
    return sorted(path.name for path in at.iterdir() if path.name.endswith(f"{rank}.json"))


def test_the_trace_of_a_script_has_its_numbers_and_its_picture(pool2: Any, tmp_path: Path) -> None:
    first, second = pool2.run(traced_script, str(tmp_path))
    assert first == ["t0.json"] and second == ["trace.rank1.json"]
    found = json.loads((tmp_path / "t0.json").read_text())
    assert found["steps"] == 2 and {"compute", "reduce-scatter", "all-gather"} <= set(found["ms_per_step"])
    assert (tmp_path / "trace.json").exists() and "<!-- reduce-scatter -->" in (tmp_path / "t.svg").read_text()


def test_a_timeline_has_a_row_for_each_lane(tmp_path: Path) -> None:
    spans = [
        {"lane": lane, "name": "", "start": start, "end": start + 2_000_000}
        for start, lane in enumerate(["reduce-scatter", "wait", "compute", "compute"])
    ]
    assert timeline.lanes(spans) == ["compute", "wait", "reduce-scatter"]
    assert timeline.busy(spans, steps=2) == {"compute": 2.0, "wait": 1.0, "reduce-scatter": 1.0}
    timeline.draw(spans, tmp_path / "t.svg")
    drawn = (tmp_path / "t.svg").read_text()
    assert drawn.count("<svg") == 1 and all(f"<!-- {lane} -->" in drawn for lane in timeline.lanes(spans))


def test_info_is_fit_for_a_bug_report(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__ and "gloo" in found["backends"]
    assert found == info.collected() and not any("/" in str(value) for value in found["packages"])
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", project.read_text(), re.DOTALL)
    assert extras is not None
    brought = set()
    for extra, packages in re.findall(r"^(\w+) = \[(.*)\]$", extras[1], re.MULTILINE):
        if extra not in ("rivals", "docs", "dev"):  # of this project's own benchmarks and pages
            brought |= {re.split(r"[\[><=]", package)[0] for package in re.findall(r'"([^"]+)"', packages)}
    assert "bayesian-optimization" in brought and brought <= set(info.PACKAGES), "each extra's packages are listed"


def test_info_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package-as-this"))
    installed = version("torch")  # which may leave out what torch calls itself: 2.11.0+cu130
    assert info.collected()["packages"] == [f"torch {installed}", "no-such-package-as-this not installed"]


@pytest.mark.slow
def test_the_command_starts_where_dear_is() -> None:
    found = subprocess.run([sys.executable, "-m", "dear", "--help"], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and all(name in found.stdout for name in ("plan", "info", "probe", "trace"))
