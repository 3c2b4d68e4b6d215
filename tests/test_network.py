"""The lab: the rate is what was asked for, failures are told, and nothing is left behind however it ends."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from workers import alive

from benchmarks.network import namespaces as ns
from benchmarks.network.__main__ import main
from benchmarks.network.lab import Lab, Loopback, describe, open_lab
from benchmarks.network.namespaces import NetworkUnavailable
from benchmarks.network.ranks import RankFailed
from benchmarks.network.rates import parse_rate, show_rate
from benchmarks.processes import MARK, TimedOut, marked

ROOT = Path(__file__).resolve().parent.parent
PAYLOAD = 1448 / 1514  # of a full frame, with timestamps: what a TCP stream gets of a rate


def _why_no_lab() -> str:
    try:
        Lab(1).close()
    except (NetworkUnavailable, RuntimeError) as error:
        return str(error)
    return ""


NO_LAB = _why_no_lab()
needs_lab = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)
# Tests of processes, not of the network: on whichever lab there is.
labs = pytest.mark.parametrize("kind", [pytest.param(Lab, marks=needs_lab), Loopback])


def stream(rank: int, world_size: int, size: int) -> float:
    """Rank 1 sends `size` bytes to rank 0 over one TCP connection. Bits per second as rank 0 saw them arrive."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    skipped = 1 << 20  # the start: connection, slow start, a bucket full of credit
    if rank == 0:
        with socket.create_server(address) as server:
            connection, _ = server.accept()
        received, begin, start = 0, 0, 0.0
        with connection:
            while data := connection.recv(1 << 20):
                received += len(data)
                if not start and received >= skipped:
                    begin, start = received, time.perf_counter()
        assert received == size
        return (received - begin) * 8 / (time.perf_counter() - start)
    for _ in range(500):
        try:
            with socket.create_connection(address) as connection:
                connection.sendall(bytes(size))
                return 0.0
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise TimeoutError("nobody listens")


def both_ways(rank: int, world_size: int, size: int) -> float:
    """Both send `size` bytes at once; seconds until this rank has received them all."""
    import threading

    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        with socket.create_server(address) as server:
            connection, _ = server.accept()
    else:
        for _ in range(500):
            try:
                connection = socket.create_connection(address)
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
    start = time.perf_counter()
    sender = threading.Thread(target=connection.sendall, args=(bytes(size),))
    sender.start()
    received = 0
    while received < size:
        received += len(connection.recv(1 << 20))
    elapsed = time.perf_counter() - start
    sender.join()
    connection.close()
    return elapsed


def who(rank: int, world_size: int) -> tuple[int, int, str, str]:
    return rank, world_size, os.environ["MASTER_ADDR"], os.environ["GLOO_SOCKET_IFNAME"]


def leave_a_daemon(rank: int, world_size: int) -> int:
    """In a session of its own, so that no signal to the worker's process group reaches it."""
    return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid


def namespaces(processes: Iterable[int | str]) -> set[str]:
    """The network namespaces that these processes live in or hold open, other than our own."""
    found = set()
    for process in processes:
        for pattern in ("ns/net", "fd/*"):
            for link in Path(f"/proc/{process}").glob(pattern):
                with suppress(OSError):
                    found.add(os.readlink(link))
    return {name for name in found if name.startswith("net:")} - {os.readlink("/proc/self/ns/net")}


def freed(names: set[str]) -> bool:
    """Nobody holds them any more, which is when the kernel frees them and the links in them."""
    return until(lambda: not names & namespaces(name for name in os.listdir("/proc") if name.isdigit()))


def until(condition: Callable[[], bool], within: float = 60.0) -> bool:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# ------------------------------------------------------------------------------------------------- the network


def carries(measure: Callable[[], float], least: float, most: float = math.inf) -> bool:
    """Whether a link carries so many bits a second: on a busy machine a process may wait while bytes do not, or they
    for it, so in one of several attempts."""
    return any(least <= measure() <= most for _ in range(10))


def streamed(lab: Lab, size: int) -> float:
    return float(lab.call(stream, size, timeout=100)[0])


@pytest.mark.slow
@pytest.mark.alone
@needs_lab
def test_rate_is_enforced_and_can_be_changed() -> None:
    with Lab(2, "200mbit") as lab:
        for rate, size in (("200mbit", 10 << 20), ("1gbit", 40 << 20)):
            lab.set_rate(rate)
            wanted = parse_rate(rate)
            assert wanted is not None and lab.rate == wanted
            assert carries(partial(streamed, lab, size), 0.9 * wanted * PAYLOAD, 1.1 * wanted * PAYLOAD)
        lab.set_rate(None)
        assert carries(partial(streamed, lab, 100 << 20), 1.5e9)


@pytest.mark.slow
@pytest.mark.alone
@needs_lab
def test_link_carries_the_rate_both_ways_at_once() -> None:
    with Lab(2, "400mbit") as lab:
        wanted = pytest.approx([(20 << 20) * 8 / (400e6 * PAYLOAD)] * 2, rel=0.1)
        assert any(lab.call(both_ways, 20 << 20, timeout=100) == wanted for _ in range(10))


@pytest.mark.slow
@pytest.mark.alone
@needs_lab
def test_two_labs_at_once_do_not_touch_each_other() -> None:
    with Lab(2, "100mbit") as slow, Lab(2, "1gbit") as fast:
        job = [slow.spawn(r, ["sleep", "300"]) for r in range(2)]
        assert carries(partial(streamed, fast, 20 << 20), 8e8)
        assert carries(partial(streamed, slow, 4 << 20), 0, 1.1e8)
        assert all(child.process.poll() is None for child in job)


@needs_lab
def test_the_machine_sees_no_interface_of_the_lab() -> None:
    before = os.listdir("/sys/class/net")
    with Lab(3, "1gbit") as lab:
        assert os.listdir("/sys/class/net") == before
        own = os.readlink("/proc/self/ns/net")
        seen = [result.stdout.strip() for result in lab.run(["readlink", "/proc/self/ns/net"])]
        assert len({own, *seen}) == 4
        assert os.readlink("/proc/thread-self/ns/net") == own


@needs_lab
def test_network_is_gone_after_an_exception() -> None:
    before = namespaces(["self"])
    held: set[str] = set()
    with pytest.raises(KeyError), Lab(2, "1gbit") as lab:
        child = lab.spawn(1, ["sleep", "1000"])
        held = namespaces(["self"]) - before
        raise KeyError
    assert len(held) == 3
    assert child.process.returncode == -signal.SIGKILL
    assert freed(held)


@pytest.mark.slow
@needs_lab
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_nothing_is_left_when_the_owner_is_killed(number: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.network", "--", "sh", "-c", "setsid sleep 1000 & echo up; wait"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that started this suite in the background has had it ignore SIGINT, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert owner.stdout is not None and owner.stderr is not None
        assert owner.stdout.readline() + owner.stdout.readline() == b"up\nup\n"
        # Two shells and what they started. A process that is just being executed shows no environment.
        assert until(lambda: len(_workers_of(owner.pid)) >= 4)
        workers = _workers_of(owner.pid)
        assert until(lambda: len(namespaces([owner.pid])) == 3)  # it may be opening or closing files as we look
        held = namespaces([owner.pid])
        owner.send_signal(number)
        owner.wait(30)
        owner.stdout.close()
        owner.stderr.close()
        assert until(lambda: not any(map(alive, workers)))
        assert freed(held)
    finally:
        owner.kill()


def _workers_of(owner: int) -> list[int]:
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_worker_of(owner, pid)]


def _is_worker_of(owner: int, pid: int) -> bool:
    try:
        return f"\0{MARK}={owner}-".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


# ----------------------------------------------------------------------------------------- where it cannot be had


def test_refusal_names_root_and_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ns.shutil, "which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(ns.os, "geteuid", lambda: 1000)
    with pytest.raises(NetworkUnavailable, match=r"needs root .*user 1000.*--network loopback"):
        open_lab(2, "500mbit")
    with open_lab(2, "500mbit", network="auto") as lab:
        assert not lab.emulated and lab.rate is None and "loopback" in describe(lab)


def test_refusal_names_iproute2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ns.shutil, "which", lambda name: None)
    with pytest.raises(NetworkUnavailable, match=r"iproute2 \(not found: ip, tc\).*--network loopback"):
        open_lab(2)


@pytest.mark.parametrize("rate", ["fast", "10", "500mb", "-1mbit", "1bit", 0])
def test_bad_rate(rate: str | float) -> None:
    with pytest.raises(ValueError, match=r"mbit|kbit"):
        open_lab(2, rate, network="auto")


def test_rates_are_read_and_written() -> None:
    assert parse_rate("2.5Gbit/s") == parse_rate(2.5e9) == 2.5e9
    assert show_rate(5e8) == "500 Mbit/s" and show_rate(None) == "no rate limit"


def test_loopback_refuses_a_rate() -> None:
    with pytest.raises(ValueError, match="loopback interface cannot be limited"):
        open_lab(2, "1gbit", network="loopback")


# ----------------------------------------------------------------------------------------------- the processes


@labs
def test_ranks_are_told_who_they_are(kind: type[Lab | Loopback]) -> None:
    with kind(3) as lab:
        expected = [(rank, 3, lab.address(0), lab.interface()) for rank in range(3)]
        assert lab.call(who, timeout=100) == expected


@labs
def test_streams_run_on_either(kind: type[Lab | Loopback]) -> None:
    with kind(2) as lab:
        assert lab.call(stream, 20 << 20, timeout=100)[0] > 1e8


@labs
def test_failure_names_the_rank_and_ends_the_others(kind: type[Lab | Loopback]) -> None:
    script = "echo before >&2; [ $RANK = 1 ] && { echo the reason >&2; exit 7; }; sleep 1000"
    start = time.monotonic()
    with kind(3) as lab, pytest.raises(RankFailed, match=r"rank 1 failed with exit code 7(.|\n)*the reason") as caught:
        lab.run(["sh", "-c", script], timeout=100)
    assert time.monotonic() - start < 80
    assert [result.returncode for result in caught.value.results] == [-9, 7, -9]


@labs
def test_unchecked_run_returns_every_code(kind: type[Lab | Loopback]) -> None:
    lines: list[tuple[int, str]] = []
    with kind(2) as lab:
        results = lab.run(
            ["sh", "-c", "echo one; printf two; exit $RANK"],
            check=False,
            timeout=100,
            on_line=lambda rank, line: lines.append((rank, line)),
        )
    assert [result.returncode for result in results] == [0, 1]
    assert sorted(lines) == [(0, "one"), (0, "two"), (1, "one"), (1, "two")]


@labs
def test_timeout_names_the_ranks_even_if_they_chatter(kind: type[Lab | Loopback]) -> None:
    with kind(2) as lab, pytest.raises(TimedOut, match=r"ranks \[1\] had not finished after 3"):
        lab.run(["sh", "-c", "[ $RANK = 0 ] || exec yes"], timeout=3)


@labs
def test_what_workers_leave_running_ends_with_the_lab(kind: type[Lab | Loopback]) -> None:
    with kind(2) as lab:
        daemons = lab.call(leave_a_daemon, timeout=100)
        assert all(map(alive, daemons))
    assert until(lambda: not any(map(alive, daemons)))
    assert not marked(lab.mark)


@pytest.mark.slow
@labs
def test_what_a_launcher_started_ends_when_the_launcher_fails(kind: type[Lab | Loopback], tmp_path: Path) -> None:
    """Only rank 0 is started here; what it starts elsewhere, as mpirun does, is in a session of its own."""
    elsewhere = f"export UP={tmp_path}/$$; setsid sh -c 'touch $UP; exec sleep 60' &"
    command = ["sh", "-c", f'echo "rank $RANK"; {elsewhere} until [ -e $UP ]; do sleep 0.01; done; exit 3']
    with kind(2) as lab:
        (result,) = lab.run(command, ranks=[0], check=False)
        assert (result.stdout, result.returncode) == ("rank 0\n", 3)
        assert len(marked(lab.mark)) == 1
        with pytest.raises(RankFailed, match="rank 0 failed with exit code 3"):
            lab.run(command, ranks=[0])
        assert not marked(lab.mark)


def test_bad_calls_say_what_to_do() -> None:
    with Loopback(1) as lab:
        with pytest.raises(FileNotFoundError, match="no program 'no-such-program'"):
            lab.run(["no-such-program"])
        with pytest.raises(ValueError, match="top level of a module"):
            lab.call(lambda rank, world_size: None)
    with pytest.raises(ValueError, match="at least 1"):
        Loopback(0)


def test_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--network", "loopback", "--workers", "3", "--", "sh", "-c", "echo rank $RANK"]) == 0
    captured = capfd.readouterr()
    assert sorted(captured.out.splitlines()) == ["rank 0", "rank 1", "rank 2"]
    assert "loopback, 3 workers" in captured.err
    assert main(["--network", "loopback", "--", "sh", "-c", "exit 5"]) == 5
    assert main(["--network", "loopback", "--rate", "1gbit", "--", "true"]) == 2
