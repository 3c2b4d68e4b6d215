"""Dense gradients in 16 bits, against the golden model, bit for bit but for the bits inside a NaN."""

import pytest
import torch
from kernel_cases import DEVICES, DTYPES, LENGTHS, VALUES, counter, gradient, misaligned, same_bits, same_numbers
from torch import Tensor

from compress import ops, reference

on_devices = pytest.mark.parametrize("device", DEVICES)
narrow_types = pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
feedback = pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])


def check(
    golden: tuple[Tensor, Tensor | None, int], out: Tensor, error: Tensor | None, count: Tensor, before: int
) -> None:
    assert same_numbers(out, golden[0])
    assert count.item() == golden[2] + before
    if error is not None and golden[1] is not None:
        assert same_bits(error, golden[1])
        assert error.isfinite().all()
        assert out.isfinite().all()


def check_round(grad: Tensor, narrow: torch.dtype, feedback: bool, device: str, offset: int = 0) -> None:
    n = grad.numel()
    error = gradient("normal", n, seed=1) if feedback else None
    own = None if error is None else misaligned(error, offset, device)
    out, count = misaligned(torch.zeros(n, dtype=narrow), offset, device), counter(1, device) + 2
    ops.dense_round(misaligned(grad, offset, device), own, out, count)
    check(reference.dense_round(grad, error, narrow), out, own, count, 2)


@on_devices
@feedback
@narrow_types
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VALUES)
def test_round(kind: str, dtype: torch.dtype, narrow: torch.dtype, feedback: bool, device: str) -> None:
    check_round(gradient(kind, 9_001, dtype), narrow, feedback, device)


@on_devices
@feedback
@narrow_types
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths_and_alignments(n: int, offset: int, narrow: torch.dtype, feedback: bool, device: str) -> None:
    check_round(gradient("normal", n), narrow, feedback, device, offset)


@on_devices
@feedback
@narrow_types
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("kind", VALUES)
def test_average(kind: str, ranks: int, narrow: torch.dtype, feedback: bool, device: str) -> None:
    n = 9_001
    payloads = torch.stack([gradient(kind, n, narrow, seed=rank) for rank in range(ranks)])
    error = gradient("normal", n, seed=9) if feedback else None
    apart = torch.zeros(ranks, n + 5, dtype=narrow, device=device)
    apart[:, :n] = payloads
    own = None if error is None else error.clone().to(device)
    out, count = torch.zeros(n, dtype=narrow, device=device), counter(1, device)
    ops.dense_average(apart[:, :n], own, out, count)
    check(reference.dense_average(payloads, error), out, own, count, 0)


@on_devices
def test_what_is_out_of_range_is_sent_in_parts(device: str) -> None:
    error, out = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.float16, device=device)
    sent = 0.0
    for grad in (200_000.0, 0.0, 0.0, 0.0):
        ops.dense_round(torch.full((1,), grad, device=device), error, out)
        sent += out.item()
    assert sent + error.item() == 200_000


def test_bad_calls_say_what_was_wrong() -> None:
    grad, out = torch.zeros(4), torch.zeros(4, dtype=torch.float16)
    with pytest.raises(TypeError, match="Half or BFloat16"):
        ops.dense_round(grad, None, grad)
    with pytest.raises(ValueError, match="must hold 4 elements"):
        ops.dense_round(grad, None, out[:3])
    with pytest.raises(ValueError, match="equally long"):
        ops.dense_round(grad, grad[:3], out)
    with pytest.raises(ValueError, match=r"\[ranks, 4\]"):
        ops.dense_average(out, None, out)
    with pytest.raises(TypeError, match="one type"):
        ops.dense_average(torch.zeros(2, 4, dtype=torch.bfloat16), None, out)
