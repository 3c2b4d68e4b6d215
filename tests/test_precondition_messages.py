"""Kronecker factors in a message: upper triangles, and what becomes of them."""

import pytest
import torch
from torch import nn

from dear import _C
from precondition._factors import message_size, pack, unpack
from precondition._layers import find_layers

SIZES = (1, 2, 31, 32, 33, 64, 65, 100)  # around the tiles that are mirrored at a time


def symmetric(blocks, n, dtype):
    made = torch.randn(blocks, n, n, dtype=dtype)
    return made + made.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_triangles_are_torchs_and_come_back(n, dtype):
    matrices = symmetric(3, n, dtype)
    triangles = torch.full((3 * n * (n + 1) // 2,), float("nan"), dtype=dtype)
    _C.write_triangles(matrices, triangles)
    rows, columns = torch.triu_indices(n, n)
    assert torch.equal(triangles, matrices[:, rows, columns].reshape(-1))
    assert torch.equal(_C.from_triangles(triangles, 3, n), matrices)


def test_triangles_of_a_view():
    matrices = symmetric(4, 10, torch.float32)
    triangles = torch.empty(2 * 55)
    _C.write_triangles(matrices[::2], triangles)
    assert torch.equal(_C.from_triangles(triangles, 2, 10), matrices[::2])


@pytest.mark.parametrize("counts", [0.0, 0.5, 1.0])
def test_the_mean_of_those_that_count(counts):
    net = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.Linear(7, 5).double())
    for layer in find_layers(net, set(net.parameters())):
        dtype = layer.weight.dtype
        factors = [symmetric(layer.blocks, n, dtype) for n in layer.sizes]
        message = torch.empty(message_size(layer), dtype=torch.float64)  # the widest of all layers'
        pack(*(factor * counts for factor in factors), torch.tensor(counts), message)
        *found, mean_count = unpack(layer, message)
        assert mean_count == counts
        for have, want in zip(found, factors, strict=True):
            assert have.dtype == dtype
            assert torch.equal(have, want if counts else torch.zeros_like(want))


@pytest.mark.parametrize(
    "call",
    [
        lambda: _C.write_triangles(torch.zeros(1, 3, 3), torch.zeros(5)),
        lambda: _C.write_triangles(torch.zeros(1, 3, 2), torch.zeros(6)),
        lambda: _C.write_triangles(torch.zeros(1, 3, 3), torch.zeros(6, dtype=torch.float64)),
        lambda: _C.from_triangles(torch.zeros(7), 1, 3),
    ],
)
def test_other_sizes_are_refused(call):
    with pytest.raises(ValueError, match="triangles must be packed host memory"):
        call()
