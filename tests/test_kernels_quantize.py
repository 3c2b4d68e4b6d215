"""Dense gradients in 8 bits, against the golden model, bit for bit; and what the rounding promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICES, DTYPES, VALUES, counter, gradient, misaligned, same_bits
from torch import Tensor

from compress import ops, reference_quantize
from compress.reference import to_gradient_type
from compress.reference_quantize import LARGEST, SCALE_BLOCK, Quantized
from dear import _C

on_devices = pytest.mark.parametrize("device", DEVICES)
code_types = pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
roundings = pytest.mark.parametrize("key", [None, 0x9ABCDEF1], ids=["nearest", "stochastic"])
feedback = pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
#: Around the block of a scale, the unit of a shard and the block of a kernel.
LENGTHS = [1, 127, 128, 129, 512, 4095, 4096, 4097, 12_345]


def rows(shard: int, count: int, device: str, apart: int = 3) -> Tensor:
    """Rows of a payload, some words apart."""
    words = ops.quantize_payload_numel(shard)
    return torch.full((count, words + apart), -1, dtype=torch.int32, device=device)[:, :words]


def said(payload: Tensor, shard: int, numel: int) -> Quantized:
    """What the rows hold for the elements that exist."""
    data = payload.cpu().contiguous().view(torch.uint8).view(payload.shape[0], -1)
    scales = []
    for row in range(payload.shape[0]):
        exist = min(shard, max(0, numel - row * shard))
        scales.append(data[row, shard : shard + -(-exist // SCALE_BLOCK)])
    return Quantized(data[:, :shard].reshape(-1)[:numel], torch.cat(scales))


def unit(numel: int, owners: int = 1) -> int:
    return -(-numel // (_C.SCALE_UNIT * owners)) * _C.SCALE_UNIT


def check(
    golden: tuple[Quantized, Tensor, int], actual: Quantized, error: Tensor | None, count: Tensor, before: int
) -> None:
    assert torch.equal(actual.scales, golden[0].scales)
    assert torch.equal(actual.codes, golden[0].codes)
    assert count.item() == golden[2] + before
    if error is not None:
        assert same_bits(error, golden[1])
        assert error.isfinite().all()


def check_encode(
    grad: Tensor, code: torch.dtype, key: int | None, feedback: bool, device: str, owners: int = 1, offset: int = 0
) -> None:
    n = grad.numel()
    error = gradient("normal", n, seed=1) if feedback else None
    own = None if error is None else misaligned(error, offset, device)
    shard, count = unit(n, owners), counter(1, device) + 2
    payload = rows(shard, owners, device)
    ops.quantize_encode(misaligned(grad, offset, device), own, shard, payload, count, code.is_floating_point, key)
    golden = reference_quantize.encode(grad, error, code, key)
    check(golden, said(payload, shard, n), own, count, 2)


@on_devices
@feedback
@roundings
@code_types
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VALUES)
def test_encode(kind: str, dtype: torch.dtype, code: torch.dtype, key: int | None, feedback: bool, device: str) -> None:
    check_encode(gradient(kind, 9_001, dtype), code, key, feedback, device)


@on_devices
@roundings
@code_types
@pytest.mark.parametrize("owners", [1, 3])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths_alignments_and_owners(
    n: int, offset: int, owners: int, code: torch.dtype, key: int | None, device: str
) -> None:
    check_encode(gradient("normal", n), code, key, True, device, owners, offset)


@on_devices
@feedback
@roundings
@code_types
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("kind", VALUES)
def test_average(kind: str, ranks: int, code: torch.dtype, key: int | None, feedback: bool, device: str) -> None:
    n, shard = 5_001, unit(5_001)
    payloads = [reference_quantize.encode(gradient(kind, n, seed=r), None, code)[0] for r in range(ranks)]
    sent, out = rows(shard, ranks, device), rows(shard, 1, device)[0].clone()
    for row in range(ranks):
        ops.quantize_encode(
            gradient(kind, n, seed=row).to(device), None, shard, sent[row : row + 1], None, code.is_floating_point
        )
    error = gradient("normal", n, seed=9) if feedback else None
    own, count = None if error is None else error.clone().to(device), counter(1, device)
    ops.quantize_average(sent, own, shard, out, n, count, code.is_floating_point, key)
    golden = reference_quantize.average(payloads, error, code, key)
    check(golden, said(out[None], shard, n), own, count, 0)


@on_devices
@code_types
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VALUES)
def test_decode(kind: str, dtype: torch.dtype, code: torch.dtype, device: str) -> None:
    n, owners = 9_001, 2
    shard = unit(n, owners)
    payload, out = rows(shard, owners, device), misaligned(torch.full((n,), 7.0).to(dtype), 1, device)
    ops.quantize_encode(gradient(kind, n).to(device), None, shard, payload, None, code.is_floating_point)
    ops.quantize_decode(payload, shard, out, code.is_floating_point)
    golden = to_gradient_type(reference_quantize.encode(gradient(kind, n), None, code)[0].decoded(code), dtype)
    assert torch.equal(out.cpu(), golden)


# What the rounding promises


@given(
    values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=300),
    code=st.sampled_from([torch.int8, torch.float8_e4m3fn]),
    key=st.none() | st.integers(0, 2**32 - 1),
)
def test_an_element_is_off_by_less_than_the_distance_of_its_codes(
    values: list[float], code: torch.dtype, key: int | None
) -> None:
    grad = torch.tensor(values)
    n, shard = grad.numel(), unit(grad.numel())
    payload, out = rows(shard, 1, "cpu"), torch.empty(n)
    ops.quantize_encode(grad, None, shard, payload, None, code.is_floating_point, key)
    ops.quantize_decode(payload, shard, out, code.is_floating_point)
    largest = torch.stack([part.abs().max() for part in grad.split(SCALE_BLOCK)]).repeat_interleave(SCALE_BLOCK)[:n]
    # The scale is less than twice the smallest that would do; below the smallest normal float it is that one.
    tiny = torch.finfo(torch.float32).tiny
    if code == torch.int8:
        bound = (largest.double() * 2 / 127).clamp(min=tiny)
    else:
        bound = (grad.double().abs() / 8).maximum((largest.double() * 2 / 448 * 2**-9).clamp(min=tiny * 2**-9))
    assert ((out.double() - grad.double()).abs() <= bound * (1 if key is not None else 0.5)).all()


@code_types
def test_stochastic_rounding_is_right_in_the_mean_and_nearest_is_not(code: torch.dtype) -> None:
    """Each element alike, away from every code: the mean of many is off by their deviation alone."""
    n = 1 << 16
    grad = torch.full((n,), 0.3)
    grad[::SCALE_BLOCK] = 100.0  # of each block the largest, so that 0.3 lies between two codes
    payload, out = rows(unit(n), 1, "cpu"), torch.empty(n)
    others = torch.arange(n) % SCALE_BLOCK != 0

    def mean(key: int | None) -> float:
        ops.quantize_encode(grad, None, unit(n), payload, None, code.is_floating_point, key)
        ops.quantize_decode(payload, unit(n), out, code.is_floating_point)
        return float(out[others].double().mean())

    step = 1.0 if code == torch.int8 else 0.03125
    assert abs(mean(None) - 0.3) > 0.005
    means = [mean(key) for key in range(8)]
    assert all(abs(one - 0.3) < 5 * step / 2 / n**0.5 for one in means)
    assert len(set(means)) == len(means), "another key draws otherwise"


@code_types
def test_nothing_is_lost_over_many_steps(code: torch.dtype) -> None:
    n = 3_000
    error, total, sent, out = torch.zeros(n), torch.zeros(n).double(), torch.zeros(n).double(), torch.empty(n)
    payload = rows(unit(n), 1, "cpu")
    for step in range(50):
        grad = gradient("normal", n, seed=step) ** 3
        ops.quantize_encode(grad, error, unit(n), payload, None, code.is_floating_point)
        ops.quantize_decode(payload, unit(n), out, code.is_floating_point)
        total += grad.double()
        sent += out.double()
    assert torch.allclose(sent + error, total, rtol=0, atol=1e-4)
    assert error.abs().max() < 3


@on_devices
@code_types
def test_what_could_overflow_is_dropped_and_counted(code: torch.dtype, device: str) -> None:
    grad = torch.tensor([3e38, -3e38, LARGEST, torch.inf, 1.0], device=device)
    for feedback in (False, True):
        error = torch.ones(5, device=device) if feedback else None
        payload, out, count = rows(512, 1, device), torch.empty(5, device=device), counter(1, device)
        ops.quantize_encode(grad, error, 512, payload, count, code.is_floating_point)
        ops.quantize_decode(payload, 512, out, code.is_floating_point)
        assert count.item() == 3 and out.isfinite().all() and out[2] == LARGEST
        assert error is None or error.isfinite().all()


def test_a_row_is_its_codes_and_its_scales() -> None:
    assert ops.quantize_payload_numel(512) == 128 + 1
    assert ops.quantize_payload_numel(4096) * 4 / 4096 < 1.01  # a byte an element, and 0.8% for the scales
    assert _C.SCALE_UNIT == 4 * SCALE_BLOCK


def test_bad_calls_say_what_was_wrong() -> None:
    grad, payload = torch.zeros(600), rows(512, 2, "cpu")
    with pytest.raises(ValueError, match="multiple of 512"):
        ops.quantize_encode(grad, None, 300, payload)
    with pytest.raises(ValueError, match="the shards hold 512: give more rows"):
        ops.quantize_encode(grad, None, 512, payload[:1])
    with pytest.raises(TypeError, match="must be Int"):
        ops.quantize_encode(grad, None, 512, payload.float())
    with pytest.raises(ValueError, match=r"\[rows, 129\]"):
        ops.quantize_decode(payload[:, :100], 512, grad)
    with pytest.raises(ValueError, match="numel is 513, but the shard has 512"):
        ops.quantize_average(payload, None, 512, payload[0].clone(), 513)
    with pytest.raises(ValueError, match="make them equally long"):
        ops.quantize_average(payload, torch.zeros(9), 512, payload[0].clone(), 10)
    with pytest.raises(ValueError, match="must hold 129 words"):
        ops.quantize_average(payload, None, 512, payload[0, :9].clone(), 10)
