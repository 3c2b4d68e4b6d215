"""Runs of a group gathered into one message and scattered back, against the golden model."""

import pytest
import torch
from kernel_cases import DEVICES, DTYPES, VALUES, counter, gradient, misaligned, same_bits
from torch import Tensor

from compress import ops, reference

on_devices = pytest.mark.parametrize("device", DEVICES)
#: Start, numel, position: out of order, with gaps, empty, shorter and longer than a block, at odd places.
TABLE = [(70_000, 1, 12_400), (3, 5, 0), (100, 0, 7), (20_001, 12_300, 9), (8, 31, 12_401), (60_000, 4096, 12_450)]
NUMEL, MESSAGE = 70_001, 16_600


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Equal bits, but for those inside a NaN: conversions differ in what they make of them."""
    a, b = a.cpu(), b.cpu()
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kind", VALUES)
def test_gather_and_scatter(kind: str, dtype: torch.dtype, offset: int, device: str) -> None:
    table = torch.tensor(TABLE, device=device)
    source = gradient(kind, NUMEL, dtype)
    before = torch.randn(MESSAGE, generator=torch.Generator().manual_seed(1))
    golden, bad = reference.gather_segments(source, TABLE, before)
    message, count = misaligned(before, offset, device), counter(1, device) + 3
    ops.gather_segments(misaligned(source, offset, device), table, message, count)
    assert same_numbers(message, golden)
    assert count.item() == bad + 3

    into = gradient("normal", NUMEL, dtype, seed=2)
    out = misaligned(into, offset, device)
    ops.scatter_segments(message, table, out)
    assert same_numbers(out, reference.scatter_segments(golden, TABLE, into))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_rounds_to_nearest(dtype: torch.dtype, device: str) -> None:
    message = torch.randn(MESSAGE, generator=torch.Generator().manual_seed(3))
    out = torch.zeros(NUMEL, dtype=dtype, device=device)
    ops.scatter_segments(message.to(device), torch.tensor(TABLE, device=device), out)
    assert same_bits(out, reference.scatter_segments(message, TABLE, torch.zeros(NUMEL, dtype=dtype)))


@on_devices
def test_an_empty_table_writes_nothing(device: str) -> None:
    message, source = torch.ones(5, device=device), torch.zeros(5, device=device)
    table = torch.zeros(0, 3, dtype=torch.int64, device=device)
    ops.gather_segments(source, table, message)
    ops.scatter_segments(message, table, source)
    assert (message == 1).all()
    assert (source == 0).all()


def test_the_counter_may_be_left_out() -> None:
    message = torch.zeros(4)
    ops.gather_segments(torch.tensor([1.0, torch.inf]), torch.tensor([[0, 2, 1]]), message)
    assert message.tolist() == [0, 1, torch.inf, 0]


@pytest.mark.parametrize("row", [(-1, 2, 0), (0, -1, 0), (0, 2, -1), (4, 2, 0), (0, 2, 3), (0, 2**62, 2**62)])
def test_segments_outside_are_refused(row: tuple[int, int, int]) -> None:
    table, source, message = torch.tensor([row]), torch.zeros(5), torch.zeros(4)
    with pytest.raises(ValueError, match="pass the table of this gradient"):
        ops.gather_segments(source, table, message)
    with pytest.raises(ValueError, match="pass the table of this gradient"):
        ops.scatter_segments(message, table, source)


def test_bad_calls_say_what_was_wrong() -> None:
    source, message = torch.zeros(5), torch.zeros(4)
    with pytest.raises(ValueError, match=r"must be \[segments, 3\]"):
        ops.gather_segments(source, torch.zeros(3, dtype=torch.int64), message)
    with pytest.raises(TypeError, match="convert"):
        ops.gather_segments(source, torch.zeros(1, 3, dtype=torch.int32), message)
    with pytest.raises(TypeError, match="convert"):
        ops.scatter_segments(message.half(), torch.zeros(1, 3, dtype=torch.int64), source)
