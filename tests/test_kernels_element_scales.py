"""A scale for each element of gradients in few bits, against the golden model, bit for bit; and what it promises."""

import pytest
import torch
from kernel_cases import DTYPES, counter, gradient, misaligned, same_bits
from test_kernels_levels import check_average, check_encode, each_width, feedback, on_devices, rows, unit
from torch import Tensor

from compress import ops, reference_levels
from compress.reference import to_gradient_type
from compress.reference_levels import LARGEST, LARGEST_RESULT, SMALLEST_SQUARE


def mean_squares(kind: str, n: int) -> Tensor:
    """Of elements that differ a little, by very much, hardly ever had a result, or have none yet."""
    spread = {"alike": 0.1, "apart": 3.0, "far apart": 20.0, "rare": 1.0, "none": 0.0}[kind]
    found = torch.exp(spread * gradient("normal", n, seed=5)).clamp(max=LARGEST_RESULT**2)
    if kind == "none":
        return torch.zeros(n)
    share = 97 if kind == "rare" else 3
    return torch.where((torch.arange(n) % share == 0) == (kind == "rare"), found, 0.0)


KINDS = ["alike", "apart", "far apart", "rare", "none"]


@on_devices
@feedback
@each_width
@pytest.mark.parametrize("kind", KINDS)
def test_encode(kind: str, bits: int, feedback: bool, device: str) -> None:
    grad = gradient("normal", 9_001) * mean_squares("apart", 9_001).sqrt()
    check_encode(grad, bits, feedback, device, owners=2, offset=1, squares=mean_squares(kind, 9_001))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 127, 128, 129, 4095, 4097])
def test_encode_lengths_and_types(n: int, dtype: torch.dtype, device: str) -> None:
    check_encode(gradient("normal", n, dtype), 3, True, device, offset=1, squares=mean_squares("apart", n))


@on_devices
@feedback
@each_width
@pytest.mark.parametrize("ranks", [1, 3])
def test_average(ranks: int, bits: int, feedback: bool, device: str) -> None:
    squares = mean_squares("apart", 5_001)
    grads = [gradient("normal", 5_001, seed=rank) * squares.sqrt() for rank in range(ranks)]
    check_average(grads, bits, feedback, device, squares)


@on_devices
@each_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_and_learn(kind: str, dtype: torch.dtype, bits: int, device: str) -> None:
    """The mean squares take in what was decoded, before it is rounded to the gradients' type."""
    n, owners = 9_001, 2
    shard, squares = unit(n, owners), mean_squares(kind, n)
    own, grad = misaligned(squares, 1, device), gradient("normal", n)
    payload, out = rows(shard, owners, bits, device), misaligned(torch.full((n,), 7.0).to(dtype), 1, device)
    ops.levels_encode(grad.to(device), None, shard, payload, None, bits, own)
    ops.levels_decode(payload, shard, out, bits, own)
    scales = reference_levels.scales_of(squares)
    golden = reference_levels.encode(grad, None, bits, scales)[0].decoded(scales)
    assert torch.equal(out.cpu(), to_gradient_type(golden, dtype))
    assert same_bits(own, reference_levels.learned(squares, golden))


# What the scales promise


def test_scales_are_powers_of_two_in_a_range() -> None:
    """The mean of 128 roots is at least the largest / 128, and no scale is below an eighth of it."""
    for kind in KINDS:
        scales = reference_levels.scales_of(mean_squares(kind, 1_000))
        assert torch.equal(scales, 2.0 ** scales.log2().round()) and scales.min() >= 1 and scales.max() <= 2**10
    one = torch.zeros(128)
    one[5] = 1
    assert reference_levels.scales_of(one)[5] == 2**10
    assert reference_levels.scales_of(torch.tensor([1.0, 4.0, 16.0])).tolist() == [8 / 2, 8, 8 * 2]


def test_a_small_element_is_rounded_as_finely_as_its_neighbours() -> None:
    """All lose the same part, where without scales the small ones lose nearly all."""
    n, small = 1 << 14, torch.arange(1 << 14) % 2 == 0
    deviation = torch.where(small, 1 / 16, 1.0)  # as small as scales still reach
    grad = gradient("normal", n) * deviation
    for scales, most in ((reference_levels.scales_of(deviation**2), 0.1), (None, 1.0)):
        _, left, _ = reference_levels.encode(grad, None, 3, scales)
        lost = [(left[of].square().sum() / grad[of].square().sum()).item() for of in (small, ~small)]
        assert lost[0] < most and (scales is not None or lost[0] > 0.9) and lost[1] < 0.1


def test_what_has_no_results_yet_counts_as_a_small_one() -> None:
    """And in a block without any, all are equal."""
    squares = mean_squares("rare", 1_000)
    scales = reference_levels.scales_of(squares)
    assert scales[squares > 0].min() > scales[squares == 0].max() == 1
    assert reference_levels.scales_of(torch.zeros(1_000)).unique().numel() == 1


def test_an_outlier_does_not_become_the_scale_of_its_neighbours() -> None:
    scales = reference_levels.scales_of(torch.tensor([1.0] * 127 + [2.0**16]))
    assert scales[0] == 4 and scales[-1] == 2**10, "the mean root is 3, so that the least scale is 1/4 of most roots"


def test_nothing_is_lost_over_many_steps() -> None:
    n = 3_000
    error, squares = torch.zeros(n), torch.zeros(n)
    total, sent, out = torch.zeros(n).double(), torch.zeros(n).double(), torch.empty(n)
    payload = rows(unit(n), 1, 3, "cpu")
    for step in range(50):
        grad = gradient("normal", n, seed=step) ** 3 * 2.0 ** (torch.arange(n) % 9)
        ops.levels_encode(grad, error, unit(n), payload, None, 3, squares)
        ops.levels_decode(payload, unit(n), out, 3, squares)
        total += grad.double()
        sent += out.double()
    assert torch.allclose(sent + error, total, rtol=0, atol=0.1), "of sums up to 10^5"
    assert squares.median() > 0


@on_devices
def test_nothing_overflows(device: str) -> None:
    """Whatever is beyond 2^100 once it is divided is dropped, so that a scale of 2^10 keeps it finite."""
    squares = torch.zeros(128, device=device)
    squares[0] = 1
    grad = torch.full((128,), LARGEST, device=device)
    grad[0] *= 2.0**10
    grad[1], grad[2] = 3e38, torch.inf
    error, count = torch.ones(128, device=device), counter(1, device)
    payload, out = rows(512, 1, 3, device), torch.empty(128, device=device)
    ops.levels_encode(grad, error, 512, payload, count, 3, squares)
    ops.levels_decode(payload, 512, out, 3, squares)
    assert count.item() == 2
    assert out.isfinite().all() and error.isfinite().all() and squares.isfinite().all() and out[0] > LARGEST * 2**9
    assert reference_levels.learned(torch.zeros(1), out[:1].cpu()) == LARGEST_RESULT**2 / 16


def test_what_decays_ends_at_zero() -> None:
    squares = torch.tensor([SMALLEST_SQUARE])
    assert reference_levels.learned(squares, torch.zeros(1)) == 0


def test_bad_calls_say_what_was_wrong() -> None:
    grad, payload = torch.zeros(600), rows(512, 2, 3, "cpu")
    with pytest.raises(ValueError, match="make them equally long"):
        ops.levels_encode(grad, None, 512, payload, None, 3, torch.zeros(599))
    with pytest.raises(TypeError, match="the mean squares must be Float"):
        ops.levels_decode(payload, 512, grad, 3, torch.zeros(600).double())
    with pytest.raises(ValueError, match="make them equally long"):
        ops.levels_average(payload, None, 512, payload[0].clone(), 10, None, 3, torch.zeros(9))
