"""What travels on our own connections: damage is noticed and named, whatever byte it hits; so is a false peer."""

import re
import socket
import struct
import threading
import time

import pytest
import torch
import torch.distributed as dist
from wire import HEADER, HELLO, Watched, changing, flip, hanging_up, in_ranks, lane_of, overwrite, peers, unchanged

from dear import _C

KINDS = {
    "reduce-scatter": (_C.RingLane, _C.Phase.reduce_scatter),
    "all-gather": (_C.RingLane, _C.Phase.all_gather),
    "all-to-all": (_C.MeshLane, _C.Phase.all_to_all),
}
NUMEL = 600_000
LANE_SECONDS = 2.0
PATIENCE = 5.0  # seconds, of a listener with who does not say who it is


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_checksum_is_the_same_in_every_way_this_processor_has():
    generator = torch.Generator().manual_seed(0)
    for size in [*range(300), 1000, 3071, 3072, 4097, 6200, 100_003]:
        data = bytes(torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).tolist())
        ways = dict(_C.checksum_each_way(data, 7))
        assert "table" in ways and set(ways.values()) == {_C.checksum(data, 7)}, (size, ways)
        assert size == 0 or _C.checksum(data, 7) != _C.checksum(data, 8)
        if size in (0, 1, 9, 299, 1000, 6200):
            assert _C.checksum(data) == crc32c(data), size
        # In two pieces.
        assert _C.checksum(data[size // 3 :], _C.checksum(data[: size // 3], 7)) == _C.checksum(data, 7), size


def test_the_checksum_notices_every_flipped_bit():
    data = bytearray(range(200))
    whole = _C.checksum(bytes(data))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert _C.checksum(bytes(data)) != whole, bit
        data[bit // 8] ^= 1 << bit % 8


def exchange(lane, phase, rank, world):
    full = torch.arange(float(NUMEL)) + rank
    if phase == _C.Phase.all_to_all:
        shard = torch.empty(NUMEL)
    else:
        chunk = NUMEL // world
        shard = full[rank * chunk : (rank + 1) * chunk] if phase == _C.Phase.all_gather else torch.empty(chunk)
    lane.submit(phase, _C.Reduction.sum, [(full, shard)], "fusion group 3").wait()
    return full if phase == _C.Phase.all_gather else shard


def run(name, world, store, times=1, **settings):
    kind, phase = KINDS[name]

    def work(rank):
        lane = lane_of(kind, store, "lane", 20, peers(rank, world, **settings))
        for _ in range(times):
            outcome = exchange(lane, phase, rank, world)
        return outcome

    return in_ranks(world, work)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("world", "victim"), [(2, 1), (4, 2)])
def test_a_flipped_byte_is_named_on_all_ranks(name, world, victim):
    header, payload = HELLO + 9, HELLO + HEADER + 12_345
    for place in (header, payload):
        # Twice: who has all it wants of the first exchange hears in the next one.
        outcomes = run(name, world, changing(victim, flip(place)), times=2)
        what = "damaged on the way" if place == payload else "stream is corrupt"
        for outcome in outcomes:
            assert isinstance(outcome, RuntimeError), (place, outcome)
            sentence = (
                rf"Rank \d sent bytes that .*{what}.* during the {name} of fusion group 3, as rank {victim} saw it"
            )
            assert re.search(sentence, str(outcome)), outcome
        assert len({str(outcome) for outcome in outcomes}) == 1


def test_without_checksums_a_flipped_byte_is_not_noticed():
    """What the test above would see if nothing were checked; headers are, always."""
    outcomes = run("all-gather", 2, changing(1, flip(HELLO + HEADER + 12_345)), checksum=False)
    assert not torch.equal(*outcomes)
    outcomes = run("all-gather", 2, changing(1, flip(HELLO + 9)), checksum=False)
    assert "stream is corrupt" in str(outcomes[1])


def frame(kind, text, blamed=0):
    header = struct.pack("<IHHIII", 0x52414544, kind, blamed, 0, 0, len(text))
    return header + struct.pack("<I", _C.checksum(header)) + text + struct.pack("<I", _C.checksum(text))


@pytest.mark.parametrize("name", KINDS)
def test_an_unknown_frame_is_refused(name):
    outcomes = run(name, 2, changing(1, overwrite(HELLO, frame(9, b"what is this?"))))
    assert "stream is corrupt" in str(outcomes[1]), outcomes[1]


@pytest.mark.parametrize("name", KINDS)
def test_a_text_that_is_not_utf8_can_be_read(name):
    text = b"Rank 0 failed: \xff\xfe \xc3\xa9 \xed\xa0\x80 \x07."
    outcomes = run(name, 2, changing(1, overwrite(HELLO, frame(3, text))))
    assert str(outcomes[1]) == "Rank 0 failed: ?? é ??? ?.", outcomes[1]


# ----------------------------------------------------------------------------------------------------- set-up


def test_settings_that_differ_are_refused():
    for settings, names in [
        (({"checksum": True}, {"checksum": False}), "disagree on DEAR_CHECKSUM"),
        (({"key": b"k" * 16}, {}), "DEAR_SHARED_KEY"),
        (({"key": b"k" * 16}, {"key": b"l" * 16}), "DEAR_SHARED_KEY is the same on every rank"),
    ]:
        store = dist.HashStore()

        def work(rank, store=store, settings=settings):
            return lane_of(_C.RingLane, store, "lane", 20, peers(rank, 2, **settings[rank]))

        for outcome in in_ranks(2, work):
            assert isinstance(outcome, RuntimeError) and names in str(outcome), outcome


def test_a_shared_key_lets_its_holders_in():
    outcomes = run("reduce-scatter", 3, dist.HashStore(), key=b"0123456789abcdef")
    assert all(isinstance(outcome, torch.Tensor) for outcome in outcomes), outcomes


@pytest.mark.parametrize("kind", [_C.RingLane, _C.MeshLane])
def test_silent_strangers_keep_nobody_waiting(kind):
    """One after another they would take five seconds each, more than there are."""
    silent = []

    def seen(rank, host, port):
        silent.extend(socket.create_connection((host, port)) for _ in range(20))
        return port

    store = Watched(dist.HashStore(), seen)
    outcomes = in_ranks(3, lambda rank: lane_of(kind, store, "lane", 30, peers(rank, 3)).rank)
    assert outcomes == [0, 1, 2], outcomes
    assert len(silent) == 60


@pytest.mark.parametrize("kind", [_C.RingLane, _C.MeshLane])
def test_a_caller_that_is_hung_up_on_calls_again(kind):
    """A listener hangs up on the oldest of many strangers, whoever that is."""
    store = hanging_up(2)
    outcomes = in_ranks(3, lambda rank: lane_of(kind, store, "lane", 30, peers(rank, 3)).rank)
    assert outcomes == [0, 1, 2], outcomes


def test_who_always_hangs_up_is_not_recognised():
    store = hanging_up(1000)
    outcomes = in_ranks(2, lambda rank: lane_of(_C.RingLane, store, "lane", 30, peers(rank, 2)))
    for outcome in outcomes:
        assert isinstance(outcome, RuntimeError) and "did not recognise each other" in str(outcome), outcome


def test_who_has_failed_is_heard_before_its_listener_is_found_closed():
    """A rank that gives up says why, hangs up, and listens no longer: who calls it again learns why it gave up."""
    words = "Rank 1 gave up, for a reason of its own."
    inner = dist.HashStore()

    def seen(rank, host, port):
        if rank == 0:
            return port
        failing = socket.create_server(("127.0.0.1", 0))

        def fail():
            caller, _ = failing.accept()
            inner.set("dear/lane/lane/failed/0", words)
            failing.close()
            caller.close()

        threading.Thread(target=fail, daemon=True).start()
        return failing.getsockname()[1]

    store = Watched(inner, seen)
    outcomes = in_ranks(2, lambda rank: lane_of(_C.RingLane, store, "lane", 20, peers(rank, 2)))
    assert [str(outcome) for outcome in outcomes] == [words, words], outcomes


def test_a_caller_that_is_late_calls_again():
    """As where a machine is so busy that a rank stands still for longer than strangers are listened to."""
    late = {"calls": 0}

    def change(at, data):
        if at == 0:
            late["calls"] += 1
            time.sleep(PATIENCE + 1 if late["calls"] == 1 else 0)

    store = changing(1, change)
    outcomes = in_ranks(2, lambda rank: lane_of(_C.RingLane, store, "lane", 60, peers(rank, 2)).rank)
    assert outcomes == [0, 1], outcomes
    assert late["calls"] == 2


def test_who_repeats_a_hello_takes_nobodys_place():
    """Somebody hears a rank's hello, repeats it on a connection of their own, and only then lets the true one pass."""
    impostors = []

    def seen(rank, host, port):
        def change(at, data):
            if at == 0 and rank == 1:
                impostor = socket.create_connection((host, port))
                impostor.sendall(data)
                impostor.settimeout(10)
                answers = [impostor.recv(24)]  # the challenge
                answers.append(impostor.recv(24))
                impostors.append(answers)

        from wire import Between

        return Between((host, port), change).port

    store = Watched(dist.HashStore(), seen)

    def work(rank):
        return exchange(lane_of(_C.RingLane, store, "lane", 20, peers(rank, 2)), _C.Phase.reduce_scatter, rank, 2)

    outcomes = in_ranks(2, work)
    assert all(isinstance(outcome, torch.Tensor) for outcome in outcomes), outcomes
    assert len(impostors) == 1
    challenge, answer = impostors[0]
    assert len(challenge) == 24
    assert answer == b"", "the impostor was welcomed"


def test_who_is_late_itself_does_not_give_up_what_stands():
    """A rank that stood still until its time was over, while the lane became ready."""
    inner = dist.HashStore()

    class Late(Watched):
        stood_still = False

        def check(self, keys):
            if not self.stood_still and any("/ready/" in key for key in keys):
                self.stood_still = True
                time.sleep(LANE_SECONDS + 0.5)
                return False
            return super().check(keys)

    stores = [inner, Late(inner, lambda rank, host, port: port)]
    outcomes = in_ranks(2, lambda rank: lane_of(_C.RingLane, stores[rank], "lane", LANE_SECONDS, peers(rank, 2)).rank)
    assert outcomes == [0, 1], outcomes


@pytest.mark.parametrize("kind", [_C.RingLane, _C.MeshLane])
def test_who_does_not_come_is_named_by_all(kind):
    store = dist.HashStore()
    outcomes = in_ranks(3, lambda rank: lane_of(kind, store, "all-gather/0", 1, peers(rank, 4)))
    for outcome in outcomes:
        sentence = r"Rank 3 did not join communication lane all-gather/0 within 1000 ms, as rank \d saw it: check"
        assert re.match(sentence, str(outcome)), outcome


SILENT = r"Rank [01] (did not (answer|connect)|joined communication lane lane and did not finish)"


def test_a_rank_that_answers_nobody_is_named():
    """Its address is there, and connections to it are taken, but nobody answers on them. So rank 0 cannot finish
    either, and whoever waits for it may say that first."""
    deaf = socket.create_server(("127.0.0.1", 0))
    store = Watched(dist.HashStore(), lambda rank, host, port: deaf.getsockname()[1] if rank == 1 else port)
    outcomes = in_ranks(3, lambda rank: lane_of(_C.RingLane, store, "lane", 2, peers(rank, 3)))
    for outcome in outcomes:
        assert isinstance(outcome, RuntimeError) and re.search(SILENT, str(outcome)), outcome


def test_bytes_pass_unchanged_through_who_is_between():
    """So that what the tests above see is the change."""
    outcomes = run("reduce-scatter", 2, changing(1, unchanged))
    assert all(isinstance(outcome, torch.Tensor) for outcome in outcomes), outcomes
