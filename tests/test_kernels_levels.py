"""Dense gradients in 2, 3 and 4 bits, against the golden model, bit for bit; and what the levels promise."""

import pytest
import torch
from kernel_cases import DEVICES, DTYPES, VALUES, counter, gradient, misaligned, same_bits
from torch import Tensor

from compress import ops, reference_levels
from compress.reference import to_gradient_type
from compress.reference_levels import LARGEST, SMALLEST, STEP_BLOCK, Levelled
from dear import _C

on_devices = pytest.mark.parametrize("device", DEVICES)
each_width = pytest.mark.parametrize("bits", [2, 3, 4])
feedback = pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
#: Around the block of a step, the unit of a shard and the block of a kernel.
LENGTHS = [1, 127, 128, 129, 512, 4095, 4096, 4097, 12_345]
KINDS = [*VALUES, "one large", "tiny"]


def values(kind: str, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Those of all kernels, and blocks of which one element is far larger; or too small to be sent."""
    if kind not in ("one large", "tiny"):
        return gradient(kind, n, dtype, seed)
    found = gradient("normal", n, torch.float32, seed)
    if kind == "tiny":
        found *= torch.where(torch.arange(n) < n // 2, SMALLEST / 8, SMALLEST)
    else:
        found[:: STEP_BLOCK + 1] *= 1000
    return found.to(dtype)


def rows(shard: int, count: int, bits: int, device: str, apart: int = 3) -> Tensor:
    """Rows of a payload, some words apart."""
    words = ops.levels_payload_numel(shard, bits)
    return torch.full((count, words + apart), -1, dtype=torch.int32, device=device)[:, :words]


def unit(numel: int, owners: int = 1) -> int:
    return -(-numel // (_C.SCALE_UNIT * owners)) * _C.SCALE_UNIT


def part(said: Levelled, begin: int, end: int) -> Levelled:
    return Levelled(said.levels[begin:end], said.steps[begin // STEP_BLOCK : -(-end // STEP_BLOCK)])


def check(said: Levelled, payload: Tensor, shard: int, bits: int) -> None:
    """Every word of the rows that stands for elements that exist."""
    n = said.levels.numel()
    for index, actual in enumerate(payload.cpu()):
        mine = part(said, index * shard, min(n, (index + 1) * shard))
        want, blocks = reference_levels.row(mine, bits, shard), mine.steps.numel()
        fields = blocks * STEP_BLOCK * bits // 32
        assert torch.equal(actual[:fields], want[:fields])
        halves, expected = (row[shard * bits // 32 :].contiguous().view(torch.int16) for row in (actual, want))
        assert torch.equal(halves[:blocks], expected[:blocks])


def check_encode(
    grad: Tensor,
    bits: int,
    feedback: bool,
    device: str,
    owners: int = 1,
    offset: int = 0,
    squares: Tensor | None = None,
) -> None:
    """squares: the elements have scales of their own."""
    n = grad.numel()
    error = gradient("normal", n, seed=1) if feedback else None
    own = None if error is None else misaligned(error, offset, device)
    scales = None if squares is None else reference_levels.scales_of(squares)
    shard, count = unit(n, owners), counter(1, device) + 2
    payload = rows(shard, owners, bits, device)
    own_squares = None if squares is None else misaligned(squares, offset, device)
    ops.levels_encode(misaligned(grad, offset, device), own, shard, payload, count, bits, own_squares)
    said, left, dropped = reference_levels.encode(grad, error, bits, scales)
    check(said, payload, shard, bits)
    assert count.item() == dropped + 2
    if own is not None:
        assert same_bits(own, left)
        assert own.isfinite().all()


def check_average(grads: list[Tensor], bits: int, feedback: bool, device: str, squares: Tensor | None = None) -> None:
    """Of what so many ranks sent one owner."""
    n = grads[0].numel()
    shard = unit(n)
    scales = None if squares is None else reference_levels.scales_of(squares)
    own_squares = None if squares is None else squares.to(device)
    sent, out = rows(shard, len(grads), bits, device), rows(shard, 1, bits, device)[0].clone()
    for row, grad in enumerate(grads):
        ops.levels_encode(grad.to(device), None, shard, sent[row : row + 1], None, bits, own_squares)
    error = gradient("normal", n, seed=9) if feedback else None
    own, count = None if error is None else error.clone().to(device), counter(1, device)
    ops.levels_average(sent, own, shard, out, n, count, bits, own_squares)
    payloads = [reference_levels.encode(grad, None, bits, scales)[0] for grad in grads]
    said, left, dropped = reference_levels.average(payloads, error, bits, scales)
    check(said, out[None], shard, bits)
    assert count.item() == dropped
    assert own is None or same_bits(own, left)


@on_devices
@feedback
@each_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_encode(kind: str, dtype: torch.dtype, bits: int, feedback: bool, device: str) -> None:
    check_encode(values(kind, 9_001, dtype), bits, feedback, device)


@on_devices
@each_width
@pytest.mark.parametrize("owners", [1, 3])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths_alignments_and_owners(n: int, offset: int, owners: int, bits: int, device: str) -> None:
    check_encode(gradient("normal", n), bits, True, device, owners, offset)


@on_devices
@feedback
@each_width
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_average(kind: str, ranks: int, bits: int, feedback: bool, device: str) -> None:
    check_average([values(kind, 5_001, seed=rank) for rank in range(ranks)], bits, feedback, device)


@on_devices
@each_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_decode(kind: str, dtype: torch.dtype, bits: int, device: str) -> None:
    n, owners = 9_001, 2
    shard = unit(n, owners)
    payload, out = rows(shard, owners, bits, device), misaligned(torch.full((n,), 7.0).to(dtype), 1, device)
    ops.levels_encode(values(kind, n).to(device), None, shard, payload, None, bits)
    ops.levels_decode(payload, shard, out, bits)
    golden = to_gradient_type(reference_levels.encode(values(kind, n), None, bits)[0].decoded(), dtype)
    assert torch.equal(out.cpu(), golden)


# What the levels promise


@pytest.mark.parametrize(("bits", "share"), [(2, 0.21), (3, 0.055), (4, 0.015)])
def test_of_a_normal_distribution_little_is_lost(bits: int, share: float) -> None:
    """Also where three blocks in four elements are zero, and where one element of a block is far larger."""
    n = 1 << 16
    normal = gradient("normal", n)
    sparse = torch.where(torch.arange(n) % 4 == 0, normal, 0.0)
    for grad, most in ((normal, share), (sparse, share), (values("one large", n), 0.05)):
        _, left, _ = reference_levels.encode(grad, None, bits)
        assert left.square().sum() < most * grad.square().sum()


@each_width
def test_nothing_is_lost_over_many_steps(bits: int) -> None:
    n = 3_000
    error, total, sent, out = torch.zeros(n), torch.zeros(n).double(), torch.zeros(n).double(), torch.empty(n)
    payload = rows(unit(n), 1, bits, "cpu")
    for step in range(50):
        grad = gradient("normal", n, seed=step) ** 3
        ops.levels_encode(grad, error, unit(n), payload, None, bits)
        ops.levels_decode(payload, unit(n), out, bits)
        total += grad.double()
        sent += out.double()
    assert torch.allclose(sent + error, total, rtol=0, atol=1e-3)
    assert error.abs().max() < 60, "single gradients reach 64"


@on_devices
@each_width
def test_what_could_overflow_is_dropped_and_counted(bits: int, device: str) -> None:
    grad = torch.tensor([3e38, -3e38, LARGEST, torch.inf, 1.0], device=device)
    for feedback in (False, True):
        error = torch.ones(5, device=device) if feedback else None
        payload, out, count = rows(512, 1, bits, device), torch.empty(5, device=device), counter(1, device)
        ops.levels_encode(grad, error, 512, payload, count, bits)
        ops.levels_decode(payload, 512, out, bits)
        assert count.item() == 3 and out.isfinite().all() and out[2] > LARGEST / 2
        assert error is None or error.isfinite().all()


def test_a_row_is_its_codes_and_its_steps() -> None:
    assert [ops.levels_payload_numel(4096, bits) * 32 / 4096 for bits in (2, 3, 4)] == [2.125, 3.125, 4.125]
    assert _C.SCALE_UNIT == 4 * STEP_BLOCK


def test_bad_calls_say_what_was_wrong() -> None:
    grad, payload = torch.zeros(600), rows(512, 2, 3, "cpu")
    with pytest.raises(ValueError, match="bits must be 2, 3 or 4, not 5"):
        ops.levels_encode(grad, None, 512, payload, None, 5)
    with pytest.raises(ValueError, match="multiple of 512"):
        ops.levels_encode(grad, None, 300, payload, None, 3)
    with pytest.raises(ValueError, match=r"\[rows, 50\]"):
        ops.levels_decode(payload[:, :40], 512, grad, 3)
    with pytest.raises(ValueError, match="make them equally long"):
        ops.levels_average(payload, torch.zeros(9), 512, payload[0].clone(), 10, None, 3)
