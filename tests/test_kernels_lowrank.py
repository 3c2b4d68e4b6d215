"""Batched orthogonalisation against the golden model, and one step of each low-rank algorithm."""

import pytest
import torch
from kernel_cases import DEVICES, DTYPES, LENGTHS, VALUES, counter, gradient, same_bits
from torch import Tensor

from compress import ops, reference

on_devices = pytest.mark.parametrize("device", DEVICES)
SHAPES = [
    (1, 1, 1),
    (3, 4, 4),
    (2, 7, 3),
    (5, 33, 5),
    (2, 129, 8),
    (3, 768, 16),
    (1, 1025, 32),
    (2, 3072, 4),
    (1, 300, 65),
]


def orthogonalized(matrices: Tensor, device: str = "cpu") -> Tensor:
    batch, rows, columns = matrices.shape
    q = matrices.clone().to(device)
    size = ops.orthogonalize_workspace_numel(batch, rows, columns)
    ops.orthogonalize(q, torch.full((size,), torch.nan, dtype=torch.float64, device=device))
    return q.cpu()


def assert_orthonormal(q: Tensor) -> None:
    gram = q.double().mT @ q.double()
    assert torch.linalg.matrix_norm(gram - torch.eye(q.shape[2]), ord=2).max() < 1e-5


@on_devices
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_golden_qr(shape: tuple[int, int, int], device: str) -> None:
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = orthogonalized(a, device)
    assert_orthonormal(q)
    golden = torch.stack([reference.orthogonalize(matrix) for matrix in a])
    # A square random matrix can be ill-conditioned: Q is then the less determined, by the condition number.
    torch.testing.assert_close(q, golden, rtol=0, atol=1e-5 if shape[1] > shape[2] else 1e-4)


@on_devices
@pytest.mark.parametrize("power", [1, 2, 3, 4, 5, 6, 7])
def test_ill_conditioned(power: int, device: str) -> None:
    """Singular values from 1 down to 10^-power: orthonormal all the way, and A stays in the span of Q."""
    generator = torch.Generator().manual_seed(power)
    u = torch.linalg.qr(torch.randn(2, 500, 8, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)).Q
    a = (u * torch.logspace(0, -power, 8, dtype=torch.float64) @ v.mT).float()
    q = orthogonalized(a, device)
    assert_orthonormal(q)
    outside = a.double() - q.double() @ (q.double().mT @ a.double())
    assert outside.abs().max() < 2e-7


@on_devices
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e18, 1e37])
def test_scale_does_not_matter(scale: float, device: str) -> None:
    a = torch.rand(2, 100, 6, generator=torch.Generator().manual_seed(0)) - 0.5
    a = a * torch.tensor([1.0, 1e-6, 1, 1e-3, 1, 1e-9] if scale > 1 else [1.0] * 6)
    assert_orthonormal(orthogonalized(a * scale, device))


def deficient_matrices() -> dict[str, Tensor]:
    a = torch.randn(4, 64, 5, generator=torch.Generator().manual_seed(0))
    repeated, zero_column, nearly, nonfinite = a.clone(), a.clone(), a.clone(), a.clone()
    repeated[:, :, 3] = repeated[:, :, 1]
    zero_column[1:3, :, 0] = 0
    nearly[:, :, 4] = nearly[:, :, 0] * (1 + 1e-7) + nearly[:, :, 2]
    nonfinite[:, 5, 1], nonfinite[:, 6, 2], nonfinite[0, :, 3] = torch.nan, torch.inf, torch.nan
    return {
        "zero": torch.zeros(3, 50, 4),
        "zero square": torch.zeros(1, 6, 6),
        "all equal": torch.ones(2, 200, 4),
        "one row": torch.eye(40)[:1].T.expand(40, 3)[None].contiguous(),
        "repeated column": repeated,
        "zero column": zero_column,
        "nearly dependent": nearly,
        "denormal": a * 1e-44,
        "nonfinite": nonfinite,
        "all nonfinite": torch.full((1, 9, 3), torch.nan),
        "outer product": torch.ones(1, 1500, 1) * torch.randn(1, 1, 7, generator=torch.Generator().manual_seed(1)),
    }


@on_devices
@pytest.mark.parametrize("kind", deficient_matrices())
def test_deficient_input_gives_orthonormal_columns(kind: str, device: str) -> None:
    a = deficient_matrices()[kind]
    q = orthogonalized(a, device)
    assert_orthonormal(q)
    assert same_bits(q, orthogonalized(a, device))
    # The first column never depends on one before it: it is the input's, or a unit vector.
    golden = torch.stack([reference.orthogonalize(matrix) for matrix in a])
    torch.testing.assert_close(q[:, :, 0], golden[:, :, 0], rtol=0, atol=1e-5)


@on_devices
def test_one_bad_matrix_does_not_touch_its_neighbours(device: str) -> None:
    a = torch.randn(5, 100, 4, generator=torch.Generator().manual_seed(0))
    clean = orthogonalized(a, device)
    bad = a.clone()
    bad[2] = 0
    q = orthogonalized(bad, device)
    assert_orthonormal(q)
    for matrix in (0, 1, 3, 4):
        assert same_bits(q[matrix], clean[matrix])


def test_bits_are_independent_of_threads_and_batch() -> None:
    a = torch.randn(3, 2500, 6, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = orthogonalized(a)
        torch.set_num_threads(2)
        two = orthogonalized(a)
    finally:
        torch.set_num_threads(before)
    assert same_bits(one, two)
    assert same_bits(one, torch.cat([orthogonalized(matrix[None]) for matrix in a]))


@on_devices
def test_empty_batch(device: str) -> None:
    assert orthogonalized(torch.zeros(0, 5, 2), device).shape == (0, 5, 2)


def test_bad_calls_say_what_was_wrong() -> None:
    with pytest.raises(ValueError, match="rank no larger"):
        orthogonalized(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="rank no larger"):
        ops.orthogonalize(torch.zeros(5, 2), torch.zeros(100, dtype=torch.float64))
    with pytest.raises(ValueError, match="workspace"):
        ops.orthogonalize(torch.zeros(1, 5, 2), torch.zeros(4, dtype=torch.float64))
    with pytest.raises(TypeError, match="convert"):
        orthogonalized(torch.zeros(1, 5, 2, dtype=torch.float16))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", VALUES)
def test_error_correct(kind: str, n: int, dtype: torch.dtype, device: str) -> None:
    grad, error = gradient(kind, n, dtype), gradient("normal", n, seed=1)
    expected, dropped = reference.correct(grad, error)
    actual, count = error.clone().to(device), counter(1, device)
    ops.error_correct(grad.to(device), actual, count)
    assert same_bits(actual, expected)
    assert count.item() == dropped


@pytest.mark.parametrize("algorithm", ["power", "acp"])
def test_reference_steps_conserve(algorithm: str) -> None:
    """What was applied plus what is kept is the sum of the gradients, and what is kept stays bounded."""
    generator = torch.Generator().manual_seed(0)
    world, n, m, r = 3, 24, 18, 2
    truth = torch.randn(n, 2, generator=generator) @ torch.randn(2, m, generator=generator)
    p, q = torch.randn(n, r, generator=generator), torch.randn(m, r, generator=generator)
    errors = [torch.zeros(n, m) for _ in range(world)]
    applied, total = torch.zeros(n, m), torch.zeros(n, m)
    for step in range(1, 9):
        grads = [truth * (rank + 1) for rank in range(world)]
        if algorithm == "power":
            update, q = reference.power_step(grads, errors, q)
        else:
            update, p, q = reference.acp_step(grads, errors, p, q, step)
        applied += update * world
        total += torch.stack(grads).sum(0)
    torch.testing.assert_close(applied + torch.stack(errors).sum(0), total, rtol=1e-4, atol=1e-3)
    assert all(error.norm() < (rank + 1) * truth.norm() for rank, error in enumerate(errors))
    if algorithm == "power":  # a gradient of the sketch's own rank is sent in full
        torch.testing.assert_close(update, truth * 2, rtol=1e-3, atol=1e-2)
