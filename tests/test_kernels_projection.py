"""The low-rank projection and decoding in one sweep, against the golden model."""

import pytest
import torch
from kernel_cases import DEVICES, DTYPES, VALUES, counter, gradient, misaligned, same_bits
from torch import Tensor

from compress import ops, reference

on_devices = pytest.mark.parametrize("device", DEVICES)
either_way = pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
#: batch, rows, columns, rank: around the tiles of ranks and rows, odd sizes, several parts, ranks of all tile counts.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 2),
    (3, 4, 4, 4),
    (5, 33, 17, 3),
    (3, 64, 300, 8),
    (2, 257, 31, 5),
    (1, 1030, 70, 4),
    (1, 5000, 7, 6),
    (1, 6, 5000, 4),
    (2, 90, 80, 70),
]


def problem(shape: tuple[int, int, int, int], transposed: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Error, fixed factor, and a place for the new one."""
    generator = torch.Generator().manual_seed(seed)
    batch, n, m, rank = shape
    error = torch.randn(batch, n, m, generator=generator)
    p, q = torch.randn(batch, n, rank, generator=generator), torch.randn(batch, m, rank, generator=generator)
    return error, p if transposed else q, torch.full_like(q if transposed else p, torch.nan)


def layout(shape: tuple[int, int, int, int], gap: int) -> tuple[list[int], int]:
    """Where the matrices begin when each has ``gap`` elements before it, the last matrix first; and the length."""
    batch, n, m, _ = shape
    return [(batch - 1 - b) * (n * m + gap) + gap for b in range(batch)], batch * (n * m + gap) + 2


def assert_factor(factor: Tensor, c: Tensor, fixed: Tensor, golden: Tensor) -> None:
    """To rounding: relative to the sum of the magnitudes of the products."""
    scale = c.double().abs() @ fixed.double().abs()
    assert ((factor.double() - golden.double()).abs() <= 2e-6 * scale).all()


@on_devices
@either_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gap", [0, 3])
def test_project(shape: tuple[int, int, int, int], dtype: torch.dtype, transposed: bool, gap: int, device: str) -> None:
    error, fixed, factor = problem(shape, transposed)
    starts, numel = layout(shape, gap)
    grad = misaligned(torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype), gap, device)
    golden, c, dropped = reference.low_rank_project(grad.cpu(), error, fixed, starts, transposed)

    actual, made, count = error.to(device).clone(), factor.to(device), counter(1, device)
    ops.low_rank_project(
        grad, actual, fixed.to(device), made, torch.tensor(starts, device=device), transposed, True, count
    )
    assert dropped == count.item() == 0
    assert_factor(made.cpu(), c.mT if transposed else c, fixed, golden)
    # The residual is that of the factor that is sent, not of the exact one: nothing is lost between the two.
    p, q = (fixed, made.cpu()) if transposed else (made.cpu(), fixed)
    residual, _ = reference.low_rank_residual(c, p, q)
    scale = c.double().abs() + p.double().abs() @ q.double().abs().mT
    assert ((actual.cpu().double() - residual.double()).abs() <= 1e-6 * scale).all()


@on_devices
@either_way
def test_without_residual_the_error_is_the_corrected_gradient(transposed: bool, device: str) -> None:
    shape = (3, 20, 30, 4)
    error, fixed, factor = problem(shape, transposed)
    grad, starts = torch.randn(3 * 600), torch.tensor([1200, 0, 600])
    golden, c, _ = reference.low_rank_project(grad, error, fixed, starts.tolist(), transposed)
    actual, made = error.to(device).clone(), factor.to(device)
    ops.low_rank_project(grad.to(device), actual, fixed.to(device), made, starts.to(device), transposed, False)
    assert same_bits(actual, c)
    assert_factor(made.cpu(), c.mT if transposed else c, fixed, golden)


@on_devices
@either_way
def test_without_gradient_nothing_is_added(transposed: bool, device: str) -> None:
    error, fixed, factor = problem((2, 20, 30, 4), transposed)
    actual, made = error.to(device).clone(), factor.to(device)
    ops.low_rank_project(None, actual, fixed.to(device), made, transposed=transposed, residual=False)
    assert same_bits(actual, error)
    golden, c, _ = reference.low_rank_project(None, error, fixed, [], transposed)
    assert_factor(made.cpu(), c.mT if transposed else c, fixed, golden)


@on_devices
@either_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VALUES)
def test_no_gradient_poisons_the_error(kind: str, dtype: torch.dtype, transposed: bool, device: str) -> None:
    shape = 2, 37, 45, 3
    batch, n, m, _ = shape
    error, fixed, factor = problem(shape, transposed)
    grad, starts = gradient(kind, batch * n * m, dtype), [n * m, 0]
    _, c, dropped = reference.low_rank_project(grad, error, fixed, starts, transposed)
    actual, made, count = error.to(device).clone(), factor.to(device), counter(1, device)
    ops.low_rank_project(
        grad.to(device), actual, fixed.to(device), made, torch.tensor(starts, device=device), transposed, True, count
    )
    assert actual.isfinite().all()
    assert made.isfinite().all()
    assert count.item() == dropped
    if kind == "huge" and dtype != torch.float16:  # finite, but their products would not be: all are dropped
        assert dropped == grad.numel()
        assert torch.equal(c, error)


@either_way
def test_bits_are_independent_of_threads_and_batch(transposed: bool) -> None:
    shape = (3, 2500, 70, 6)
    grad, starts = torch.randn(3 * 2500 * 70), torch.arange(3) * 2500 * 70
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            error, fixed, factor = problem(shape, transposed)
            ops.low_rank_project(grad, error, fixed, factor, starts, transposed)
            results.append((error, factor))
    finally:
        torch.set_num_threads(before)
    error, fixed, factor = problem(shape, transposed)
    for b in range(3):
        ops.low_rank_project(grad, error[b : b + 1], fixed[b : b + 1], factor[b : b + 1], starts[b : b + 1], transposed)
    for other_error, other_factor in results:
        assert same_bits(other_error, error)
        assert same_bits(other_factor, factor)


@on_devices
@either_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (9, 1024, 260, 4), (40, 64, 130, 8)])
def test_pending_factors_are_taken_out_on_the_way(
    shape: tuple[int, int, int, int], dtype: torch.dtype, transposed: bool, device: str
) -> None:
    """One sweep gives what subtracting them, and then a sweep, gives: bit for bit."""
    batch, n, m, rank = shape
    error, fixed, factor = (t.to(device) for t in problem(shape, transposed))
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.randn(batch, length, rank, generator=generator).to(device) for length in (n, m))
    starts, numel = layout(shape, 3)
    grad = misaligned(torch.randn(numel, generator=generator).to(dtype), 3, device)
    table = torch.tensor(starts, device=device)
    at_once, in_two, other = error.clone(), error.clone(), factor.clone()
    ops.low_rank_project(grad, at_once, fixed, factor, table, transposed, residual=False, pending=(p, q))
    ops.low_rank_subtract(in_two, p, q)
    golden, lost = reference.low_rank_residual(error.cpu(), p.cpu(), q.cpu())
    scale = error.cpu().double().abs() + p.cpu().double().abs() @ q.cpu().double().abs().mT
    assert lost == 0 and ((in_two.cpu().double() - golden.double()).abs() <= 1e-6 * scale).all()
    ops.low_rank_project(grad, in_two, fixed, other, table, transposed, residual=False)
    assert same_bits(at_once, in_two)
    assert same_bits(factor, other)


@on_devices
@either_way
def test_pending_factors_that_overflow_leave_the_error(transposed: bool, device: str) -> None:
    error, fixed, factor = (t.to(device) for t in problem((1, 9, 200, 3), transposed))
    p, q = torch.ones(1, 9, 3, device=device), torch.ones(1, 200, 3, device=device)
    p[0, 4], q[0, 7] = 3e38, 3e38
    before, count = error.clone(), counter(1, device)
    ops.low_rank_project(None, error, fixed, factor, None, transposed, False, count, (p, q))
    assert error.isfinite().all() and count.item() >= 1
    assert error[0, 4, 7] == before[0, 4, 7]


@on_devices
@either_way
def test_dropped_elements_are_added_to_the_count(transposed: bool, device: str) -> None:
    error, fixed, factor = (t.to(device) for t in problem((1, 3, 4, 1), transposed))
    grad = torch.zeros(12, device=device)
    grad[[2, 7]] = torch.inf
    count = counter(1, device) + 5
    ops.low_rank_project(grad, error, fixed, factor, torch.zeros(1, dtype=torch.int64, device=device), transposed,
                         True, count)  # fmt: skip
    assert count.item() == 7


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gap", [0, 3])
def test_decode(shape: tuple[int, int, int, int], dtype: torch.dtype, gap: int, device: str) -> None:
    batch, n, m, rank = shape
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(batch, n, rank, generator=generator), torch.randn(batch, m, rank, generator=generator)
    starts, numel = layout(shape, gap)
    before = torch.randn(numel, generator=generator).to(dtype)
    out = misaligned(before, gap, device)
    ops.low_rank_decode(p.to(device), q.to(device), out, torch.tensor(starts, device=device))
    golden = reference.low_rank_decode(p, q, before, starts)
    scale = reference.low_rank_decode(p.abs(), q.abs(), torch.zeros(numel), starts).double()
    # One rounding to the type may fall to the neighbour when the sum before it differs in its last bits.
    bound = (2e-6 + 2 * torch.finfo(dtype).eps * (dtype != torch.float32)) * scale
    touched = torch.zeros(numel, dtype=torch.bool)
    for start in starts:
        touched[start : start + n * m] = True
    assert ((out.cpu().double() - golden.double()).abs() <= bound)[touched].all()
    assert same_bits(out.cpu()[~touched], before[~touched])


def test_decoded_bits_are_those_of_single_operations() -> None:
    """No fused multiply-add: the sum that every processor can round alike."""
    p, q = torch.randn(2, 50, 4), torch.randn(2, 60, 4)
    out = torch.zeros(2 * 3000)
    ops.low_rank_decode(p, q, out, torch.tensor([0, 3000]))
    products = p[:, :, None, :] * q[:, None, :, :]
    expected = (products[..., 0] + products[..., 1]) + (products[..., 2] + products[..., 3])
    assert same_bits(out, expected.flatten())


@on_devices
def test_empty_batches_and_matrices(device: str) -> None:
    for batch, n, m in ((0, 5, 4), (2, 0, 4), (2, 5, 0)):
        nothing, starts = torch.zeros(0, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
        for transposed in (False, True):
            error, fixed, factor = (t.to(device) for t in problem((batch, n, m, 2), transposed))
            ops.low_rank_project(nothing, error, fixed, factor, starts, transposed)
            assert (factor == 0).all()
        p, q = torch.zeros(batch, n, 2, device=device), torch.zeros(batch, m, 2, device=device)
        ops.low_rank_decode(p, q, nothing, starts)


def test_bad_calls_say_what_was_wrong() -> None:
    error, fixed, factor = problem((2, 5, 6, 3), False)
    grad, starts = torch.zeros(60), torch.tensor([0, 30])
    with pytest.raises(ValueError, match="need each other"):
        ops.low_rank_project(grad, error, fixed, factor)
    with pytest.raises(ValueError, match=r"must be \[2, 5, 3\]"):
        ops.low_rank_project(grad, error, fixed, fixed, starts)
    with pytest.raises(ValueError, match=r"must be \[2, 5, 3\]"):
        ops.low_rank_project(grad, error, fixed, factor, starts, transposed=True)
    with pytest.raises(ValueError, match=r"the pending P must be \[2, 5, 3\]"):
        ops.low_rank_project(grad, error, fixed, factor, starts, pending=(fixed, fixed))
    with pytest.raises(ValueError, match="the pending factors need each other"):
        torch.ops.dear.low_rank_project(grad, error, fixed, factor, starts, False, True, None, factor, None)
    with pytest.raises(ValueError, match=r"Q must be \[2, 6, 3\]"):
        ops.low_rank_subtract(error, factor, factor)
    with pytest.raises(ValueError, match="matrices, rows, columns"):
        ops.low_rank_project(grad, error.flatten(), fixed, factor, starts)
    for wrong in ([0, 31], [-1, 30]):
        with pytest.raises(ValueError, match="pass the starts of this gradient"):
            ops.low_rank_project(grad, error, fixed, factor, torch.tensor(wrong))
        with pytest.raises(ValueError, match="pass the starts of this gradient"):
            ops.low_rank_decode(factor, fixed, grad, torch.tensor(wrong))
    with pytest.raises(ValueError, match="int64"):
        ops.low_rank_project(grad, error, fixed, factor, torch.tensor([0]))
    with pytest.raises(TypeError, match="convert"):
        ops.low_rank_project(grad, error, fixed, factor, starts.int())
    with pytest.raises(ValueError, match="the rank is 257"):
        ops.low_rank_decode(torch.zeros(1, 2, 257), torch.zeros(1, 2, 257), grad, torch.tensor([0]))
