"""Running all benchmarks: the commands, the progress over all of them, failures and interrupts."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import progress
from benchmarks.matrix import __main__ as command
from benchmarks.matrix import measure, show, tasks
from benchmarks.matrix.measure import Ended
from benchmarks.matrix.show import Overall
from benchmarks.matrix.tasks import Task
from benchmarks.progress import Part, Step

TASKS = tuple(Task(name, "none", "", minutes) for name, minutes in [("one", 1.0), ("two", 3.0)])
ROOT = Path(__file__).resolve().parent.parent


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize("size", tasks.SIZES)
def test_every_benchmark_understands_its_command(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tasks.SIZES[size]
    assert len({task.name for task in chosen}) == len(chosen)
    for task in chosen:
        module = importlib.import_module(f"benchmarks.{task.module}.__main__")
        command = task.command(tmp_path, resume=True)
        assert command[:2] == ["-m", f"benchmarks.{task.module}"] and "{" not in " ".join(command)
        monkeypatch.setattr(sys, "argv", ["it", *command[2:]])
        if hasattr(module.arguments, "cache_clear"):
            module.arguments.cache_clear()  # it was read before, in another test
        options = module.arguments()
        assert (options.out if task.module == "demo" else options.json) in (tmp_path / f"{task.name}.json", tmp_path)


def test_both_sizes_run_every_benchmark_but_the_demo() -> None:
    small, full = ({task.module for task in tasks.SIZES[size]} for size in ("small", "full"))
    assert small == full - {"demo"} == {"training", "collectives", "kernels", "convergence", "bandwidth"}


def test_progress_is_read_as_it_is_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in progress.as_json.items():
        monkeypatch.setenv(name, value)
    with progress.bar(quiet(), "2 workers, 1gbit", Part(2, 4)) as report:
        report(30, 60, "round 3 of 6: dear+acp:4")
    with progress.bar(quiet(), "demo") as report:
        report(2, 5, "acp:8, seed 2")
    progress.resumed(quiet(), "2 workers, 1gbit", Part(3, 4, most=True))
    first, second, third = map(progress.read, capsys.readouterr().out.splitlines())
    assert first and (first.share, first.doing, first.resumed) == (0.375, "round 3 of 6: dear+acp:4", False)
    assert second and (second.share, second.doing) == (0.4, "acp:8, seed 2")
    assert third and (third.share, third.resumed) == (0.75, True) and third.part == Part(3, 4, most=True)
    assert progress.read("held-out loss is 40% lower") is None
    assert str(Part(2, 4, most=True)) == "cell 2 of at most 4"


def test_what_remains_is_as_slow_as_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(show.time, "monotonic", lambda: now[0])
    console = quiet()
    overall = Overall(TASKS, console)
    overall.at(0)
    assert "about 4 min left" in console.file.getvalue()  # type: ignore[attr-defined]
    now[0] = 120.0  # the first, expected to take one minute, took two
    overall.at(1)
    assert "25% of all · about 6 min left" in console.file.getvalue()  # type: ignore[attr-defined]
    overall.at(1, Step(1, 2, "resumed", resumed=True))  # costs nothing and so tells nothing
    assert "62% of all · about 3 min left" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_failing_benchmark_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(command: list[str], log: Path, *_: Any) -> Ended:
        ran.append(log.stem)
        if log.stem in ("two", "report"):
            return Ended(0, "", log)
        return Ended(1, "error: no root here", log)

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setitem(tasks.SIZES, "small", TASKS)
    monkeypatch.setattr(sys, "argv", ["matrix", "--out", str(tmp_path)])
    (tmp_path / "two.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1 and ran == ["one", "two", "report"]
    assert "one failed: error: no root here" in " ".join(capsys.readouterr().out.split())


def test_a_command_is_followed_and_its_words_kept(tmp_path: Path) -> None:
    step = Step(1, 2, "half")
    script = (
        "from benchmarks.progress import *; write(Step(1, 2, 'half')); print('a table'); raise SystemExit('the end')"
    )
    told: list[Step] = []
    shown: list[str] = []
    log = tmp_path / "x.log"
    ended = measure.run([sys.executable, "-c", script], log, told.append, shown.append)
    assert (ended.status, ended.reason) == (1, "the end")
    assert told == [step] and shown == ["a table", "the end"]
    assert [progress.read(line) or line for line in log.read_text().splitlines()] == [step, "a table", "the end"]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_benchmark_once_and_says_how_to_go_on(sent: signal.Signals, tmp_path: Path) -> None:
    """The benchmark gets one SIGINT, has time to tidy, and nothing is left running."""
    benchmark = textwrap.dedent(
        f"""
        import os, pathlib, time
        notes = pathlib.Path({str(tmp_path)!r})
        try:
            (notes / "started").write_text(str(os.getpid()))  # from here on it may be interrupted
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.5)  # a second one would cut this short
            (notes / "tidied").touch()
        """
    )
    (tmp_path / "sleepy.py").write_text(benchmark)
    driver = textwrap.dedent(
        f"""
        import signal, sys
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
        from benchmarks.matrix import __main__ as matrix, tasks
        tasks.Task.command = lambda *_: [{str(tmp_path / "sleepy.py")!r}]
        sys.argv = ["matrix", "--only", "training", "--out", {str(tmp_path / "out")!r}]
        matrix.main()
        """
    )
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(sent)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and (tmp_path / "tidied").exists()
    assert f"--only training --out {tmp_path / 'out'} --resume" in " ".join(output.split())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "started").read_text()), 0)


def test_an_unknown_task_gets_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["matrix", "--only", "demo"])
    with pytest.raises(SystemExit):
        command.arguments()
    assert "'demo' is not in size small: choose from" in capsys.readouterr().err
