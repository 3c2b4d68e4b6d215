"""The command for a GPU: its order, its time, what it goes on with, and that it leaves nothing running."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import cuda, records
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import build, claims, measure, mps, outcomes
from benchmarks.gpu.tasks import Task, tasks
from benchmarks.store import Store

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["tests-two-levels", "tests-second-order", "tests-kernels", "tests-nccl"]  # those never run on a GPU are first


def call(folder: Path, some: list[Task], minutes: float = 5, resume: bool = False) -> dict[str, str]:
    store = Store.open(records.header("gpu", {}), folder / "gpu.json", resume)
    return measure.Call(some, minutes, folder, store, resume, Console(file=io.StringIO())).run()


def stored(folder: Path) -> list[str]:
    return [cell["task"] for cell in json.loads((folder / "gpu.json").read_text())["cells"]]


def script(name: str, text: str, **more: Any) -> Task:
    return Task(name, ("-c", text), **more)


def alive(mark: str) -> list[str]:
    """The command lines of the processes that have inherited this from their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def await_none(mark: str) -> None:
    deadline = time.monotonic() + 60
    while left := alive(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


# The tasks


def test_worth_decides_the_order() -> None:
    names = [task.name for task in tasks(dry_run=False)]
    first = ["build", *TESTS, "kernels", "training-resnet50", "training-bert-base"]
    assert names[:8] == first and len(set(names)) == len(names)
    rehearsed = [task.name for task in tasks(dry_run=True)]
    assert rehearsed == [name for name in names if name in rehearsed]


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_benchmark_understands_its_task(dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks = [task for task in tasks(dry_run) if task.results.endswith(".json")]
    assert benchmarks
    for task in benchmarks:
        command = task.command(tmp_path, resume=True)
        begin = len(command) - command[::-1].index("-m")  # behind what starts it
        module, *options = command[begin:]
        monkeypatch.setattr(sys, "argv", [module, *options])
        given = importlib.import_module(f"{module}.__main__").arguments()
        assert given.json == tmp_path / task.results and given.resume
        assert given.device == ("cpu" if dry_run else "cuda")


def test_what_is_to_be_shown_is_listed_until_its_results_are_stored() -> None:
    known = {task.name: task for task in tasks(dry_run=False) if task.results}
    assert {name for claim in claims.CLAIMS for name in claim.tasks} == known.keys()
    nothing = claims.not_run([])
    assert [claim for claim, _ in nothing] == list(claims.CLAIMS) and len(claims.commands(nothing)) == len(known)
    step = next(claim for claim in claims.CLAIMS if claim.tasks == ("kernels-step",))
    left = claims.not_run(["kernels-step.json", "kernels.json"])
    assert step not in [claim for claim, _ in left] and not any("kernels" in names for _, names in left)
    assert not [one for one in claims.commands(left) if "ACP-SGD step" in one]
    assert not claims.not_run([task.results for task in known.values()])
    assert not any(" -p " in command for command in claims.commands(nothing)), "pytest's plugins are for the command"


def test_an_installed_package_has_nothing_to_build_and_no_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.gpu.tasks.ROOT", tmp_path)
    assert next(task.name for task in tasks(dry_run=False)) == "kernels"


def test_the_build_is_for_one_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[tuple[list[str], str]] = []

    def run(argv: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        ran.append((argv, env["TORCH_CUDA_ARCH_LIST"]))
        return subprocess.CompletedProcess(argv, len(ran) // 2)

    monkeypatch.setattr(build.shutil, "which", lambda tool, path: tool)
    monkeypatch.setattr(build.subprocess, "run", run)
    monkeypatch.setattr(cuda, "query", lambda: {"compute_capability": "9.0"})
    with pytest.raises(SystemExit):
        build.main()
    assert [(argv[:2], arch) for argv, arch in ran] == [(["cmake", "-G"], "9.0"), (["cmake", "--build"], "9.0")]
    assert "compute capability 9.0 ended at: cmake --build" in capsys.readouterr().err


def test_a_package_that_tests_need_is_asked_for_before_the_build(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda tool, path: tool)
    monkeypatch.setattr(build, "find_spec", lambda name: None if name == "hypothesis" else name)
    monkeypatch.setattr(cuda, "query", lambda: {"compute_capability": "9.0"})
    with pytest.raises(SystemExit):
        build.main()
    assert "hypothesis is not installed, and the tests need it: pip install hypothesis" in capsys.readouterr().err


def test_without_a_gpu_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "query", dict)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        command.main()
    assert "rehearse it with --dry-run" in capsys.readouterr().err and not (tmp_path / "none").exists()


# Time, failures, and going on


def test_what_is_done_is_not_done_again_but_the_build(tmp_path: Path) -> None:
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write"
    some = [
        script("build", f"{note}('b')", every_call=True),
        script("one", f"{note}('1')"),
        script("two", f"{note}('2'); raise SystemExit('no luck')"),
        script("three", f"{note}('3')"),
    ]
    became = call(tmp_path, some)
    assert {name: why for name, why in became.items() if why} == {"two": "failed: no luck (all it said: two.log)"}
    assert stored(tmp_path) == ["build", "one", "three"]
    some[2] = script("two", f"{note}('4')")
    assert not any(call(tmp_path, some, resume=True).values())
    assert (tmp_path / "ran").read_text() == "b123" + "b4"
    assert stored(tmp_path) == ["one", "three", "build", "two"]


def test_nothing_runs_on_a_build_that_failed(tmp_path: Path) -> None:
    some = [script("build", "raise SystemExit(1)", every_call=True), script("one", "")]
    assert list(call(tmp_path, some)) == ["build"] and not (tmp_path / "gpu.json").exists()


def test_a_task_is_ended_when_its_share_is_over_and_others_are_not_begun_too_late(tmp_path: Path) -> None:
    some = [
        script("long", "import time; time.sleep(1000)", share=0.1),
        script("short", ""),
        script("needs more", "", minutes=60),
    ]
    became = call(tmp_path, some, minutes=0.7)
    assert became["long"] == "interrupted when its time was over" and became["short"] == ""
    assert became["needs more"].startswith("not begun: it takes 60 min, and there were 0.")
    assert stored(tmp_path) == ["short"]


def test_what_is_interrupted_ends_within_the_calls_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def run(_command: Any, log: Path, _report: Any, _show: Any, limit: float, _env: Any) -> measure.Ended:
        given.append(limit)
        return measure.Ended(0, "", log)

    monkeypatch.setattr(measure, "run", run)
    call(tmp_path, [script("one", "")], minutes=2)
    assert 85 < given[0] <= 120 - measure.SECONDS_TO_END


def test_a_test_is_run_once_and_its_failure_is_a_result(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): print('ran good')\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "def test_late(): open(__file__ + '.ran', 'a').write('x')\n"
    )
    noted = tmp_path / "noted.jsonl"
    noted.write_text(
        json.dumps({"test": "test_some.py::test_late", "outcome": "passed", "why": ""}) + '\n{"test": "cut'
    )
    noted.write_text(noted.read_text() + "\n")
    options = ("-c", "/dev/null", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-p", "benchmarks.gpu.outcomes")
    task = Task("tests", ("-m", "pytest", *options, str(tmp_path / "test_some.py")), results="noted.jsonl")
    assert call(tmp_path, [task], resume=True) == {"tests": ""}
    (cell,) = json.loads((tmp_path / "gpu.json").read_text())["cells"]
    assert (cell["passed"], cell["skipped"]) == (2, 1)
    assert cell["failed"] == {"test_some.py::test_wrong": "assert 1 == 2"}
    assert not (tmp_path / "test_some.py.ran").exists()
    assert outcomes.read(noted)["test_some.py::test_good"]["outcome"] == "passed"


def test_tests_in_several_processes_are_noted_once(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_wrong(): assert 1 == 2\n")
    options = ("-c", "/dev/null", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-p", "benchmarks.gpu.outcomes")
    arguments = ("-m", "pytest", *options, "-n", "2", str(tmp_path / "test_some.py"))
    assert call(tmp_path, [Task("tests", arguments, results="noted.jsonl")]) == {"tests": ""}
    lines = [json.loads(line) for line in (tmp_path / "noted.jsonl").read_text().splitlines()]
    assert sorted((one["test"], one["why"]) for one in lines) == [
        ("test_some.py::test_good", ""),
        ("test_some.py::test_wrong", "assert 1 == 2"),
    ]


def test_only_what_was_asked_for_is_done_behind_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "kernels,tests-nccl,build"])
    assert [task.name for task in command.chosen(command.arguments())] == ["build", "kernels", "tests-nccl"]
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert command.chosen(command.arguments()) == tasks(dry_run=False)


def test_what_a_rehearsal_has_not_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--only", "kernels,kernels-large"])
    with pytest.raises(SystemExit):
        command.chosen(command.arguments())
    assert "--only names kernels-large, which this call does not have" in " ".join(capsys.readouterr().err.split())


def test_where_no_test_ends_there_is_no_result(tmp_path: Path) -> None:
    for status in (1, 5):  # an interpreter without pytest, and a pytest that finds none
        ended = f"raise SystemExit({status})"
        assert "failed" in call(tmp_path, [Task("tests", ("-c", ended, "pytest"), results="noted.jsonl")])["tests"]
    assert not (tmp_path / "gpu.json").exists()


# MPS

CONTROL = """#!{python}
# Plays nvidia-cuda-mps-control: -d starts a daemon that answers until it is told to quit.
import os, subprocess, sys, time
pid = os.path.join(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nonexistent"), "pid")
if "-d" in sys.argv:
    daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    open(pid, "w").write(str(daemon.pid))
elif not os.path.exists(pid):
    raise SystemExit("Cannot find MPS control daemon process")
elif "quit" in sys.stdin.read() and not os.environ.get("STUBBORN"):
    os.kill(int(open(pid).read()), 9)
    os.remove(pid)
"""


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A program that plays MPS's control on the PATH, and what its processes carry in their environment."""
    program = tmp_path / mps.CONTROL
    program.write_text(CONTROL.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in (cuda.PIPE, mps.LOG):
        monkeypatch.delenv(name, raising=False)
    found = uuid.uuid4().hex
    monkeypatch.setenv("DEAR_TEST_TREE", found)
    return found


@pytest.mark.parametrize("stubborn", ["", "1"])
def test_mps_is_started_and_ended(mark: str, stubborn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mps, "TRIAL", [sys.executable, "-c", ""])
    monkeypatch.setenv("STUBBORN", stubborn)
    with pytest.raises(KeyboardInterrupt), mps.started() as sentence:
        assert sentence == "MPS was started." and cuda.settings()["mps"] and cuda.PIPE in os.environ
        raise KeyboardInterrupt
    assert cuda.PIPE not in os.environ and not cuda.mps_runs()
    await_none(mark)


def test_mps_that_refuses_clients_is_ended_before_anything_runs(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mps, "TRIAL", [sys.executable, "-c", "raise SystemExit('CUDA error 805')"])
    with mps.started() as sentence:
        assert sentence.endswith("it refuses clients (CUDA error 805).") and cuda.PIPE not in os.environ
        await_none(mark)


def test_mps_that_runs_is_left_running(mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.PIPE, str(tmp_path))
    subprocess.run([mps.CONTROL, "-d"], check=True)
    with mps.started() as sentence:
        assert sentence == "MPS runs already, and is left running."
    assert cuda.mps_runs()
    subprocess.run([mps.CONTROL], input=b"quit", check=True)
    await_none(mark)


def test_what_decides_results_is_in_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 9.0, 580.1, 345, 2619, 1980, 700.00, Default\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NCCL_PROTO", "Simple")
    found = cuda.settings()
    assert (found["compute_capability"], found["driver"], found["most_sm_mhz"]) == ("9.0", "580.1", "1980")
    assert found["nccl"]["NCCL_PROTO"] == "Simple" and "sm_mhz" not in found
    assert cuda.clocks() == {"sm_mhz": "345", "memory_mhz": "2619"}


# The whole command


def rehearse(folder: Path, *more: str, mark: str = "") -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(folder), *more]
    env = os.environ | {"DEAR_TEST_TREE": mark, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.timeout(600)  # two calls, of which each may take 200 s on a busy machine
def test_the_rehearsal_is_interrupted_and_goes_on_to_the_end(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    first = rehearse(tmp_path, mark=mark)
    assert first.stdout is not None
    for line in first.stdout:
        if "building dear" in line:  # its workers run
            first.send_signal(signal.SIGINT)
            break
    said = first.communicate(timeout=200)[0]
    assert first.returncode == 130 and "--resume goes on from there" in " ".join(said.split())
    await_none(mark)
    before = stored(tmp_path)
    assert before == ["build", *TESTS, "kernels"]
    second = rehearse(tmp_path, "--resume", mark=mark)
    said = second.communicate(timeout=200)[0]
    assert second.returncode == 0, said
    rest = ["training-resnet50", "alone-bert-base", "kernels-step", "traces-bert-base"]
    assert said.count(": resumed") == 5 and stored(tmp_path) == [*before[1:], "build", *rest]
    await_none(mark)
    training = json.loads((tmp_path / "training-resnet50.json").read_text())
    assert [one["failure"] for one in training["cells"][0]["strategies"]] == [None] * 4


NOTHING_BUILT = """
import sys

class Unbuilt:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dear", "compress", "precondition"):
            raise ImportError(f"{name} is not built")

sys.meta_path.insert(0, Unbuilt())
import benchmarks.gpu.__main__
import benchmarks.gpu.build
"""


def test_it_starts_where_nothing_is_built_yet() -> None:
    done = subprocess.run([sys.executable, "-c", NOTHING_BUILT], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
