"""Corrections by one rank: what ranks compute of their parts is what is computed of whole matrices."""

import random
from itertools import pairwise

import pytest
import torch

from precondition import eva_parts, eva_reference
from precondition.eva_parts import Matrix, Vectors

LAYERS = [
    Matrix(1, 5, 7, True),
    Matrix(1, 4, 1, False),
    Matrix(3, 2, 4, True),  # a grouped convolution
    Matrix(6, 1, 9, False),  # a depthwise one
    Matrix(1, 1, 1, True),
]


def draw(layers, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def values(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [values(each.groups * each.rows * each.columns) for each in layers]
    biases = [values(each.groups * each.rows) if each.bias else None for each in layers]
    vectors = Vectors(layers, torch.float64)
    return vectors, weights, biases, values(vectors.rows), values(vectors.columns)


def shared_out(vectors, weights, biases, world, seed):
    """The rectangles of each rank, which has a run of every gradient, maybe an empty one."""
    chance = random.Random(seed)
    ranks = [[] for _ in range(world)]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        for tensor, cut in ((weight, eva_parts.cut_weight), (bias, eva_parts.cut_bias)):
            if tensor is None:
                continue
            bounds = sorted([0, len(tensor), *(chance.randint(0, len(tensor)) for _ in range(world - 1))])
            for rank, (start, stop) in enumerate(pairwise(bounds)):
                if start < stop:
                    found = cut(tensor[start:stop], start, layer, vectors)
                    ranks[rank].extend([found] if cut is eva_parts.cut_bias else found)
    return ranks


def whole(vectors, weights, biases, layer):
    """A layer's gradient [groups, rows, columns], the bias's column last."""
    matrix = vectors.matrices[layer]
    found = weights[layer].view(matrix.groups, matrix.rows, matrix.columns)
    if biases[layer] is None:
        return found
    return torch.cat([found, biases[layer].view(matrix.groups, matrix.rows, 1)], 2)


def with_one(vectors, columns, layer):
    part = vectors.column_part(columns, layer)
    return torch.cat([part, part.new_ones(len(part), int(vectors.matrices[layer].bias))], 1)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_parts_add_up(world):
    for seed in range(8):
        vectors, weights, biases, rows, columns = draw(LAYERS, seed)
        ranks = shared_out(vectors, weights, biases, world, seed)
        before = [whole(vectors, weights, biases, layer).clone() for layer in range(len(LAYERS))]
        product = vectors.zeros(vectors.rows)
        for parts in ranks:
            eva_parts.add_products(parts, columns, product)
        square = sum(eva_parts.squares(parts, eva_parts.norms(parts, vectors), vectors) for parts in ranks)
        factor = torch.tensor(0.7, dtype=torch.float64)
        for parts in ranks:
            eva_parts.subtract(parts, rows, columns, factor)
        for layer, matrix in enumerate(before):
            a, w = with_one(vectors, columns, layer), vectors.row_part(rows, layer)
            torch.testing.assert_close(vectors.row_part(product, layer), (matrix @ a.unsqueeze(2)).squeeze(2))
            torch.testing.assert_close(square[layer], matrix.square().sum())
            want = 0.7 * (matrix - w.unsqueeze(2) * a.unsqueeze(1))
            torch.testing.assert_close(whole(vectors, weights, biases, layer), want)


def test_column_sums_and_blocks():
    vectors, weights, _, rows, columns = draw(LAYERS)
    ranks = shared_out(vectors, weights, [None] * len(LAYERS), 3, 0)
    sums = vectors.zeros(vectors.columns)
    for parts in ranks:
        eva_parts.add_column_sums(parts, sums)
    at = 0
    for layer, matrix in enumerate(LAYERS):
        want = weights[layer].view(matrix.groups, matrix.rows, matrix.columns).sum(1)
        torch.testing.assert_close(vectors.column_part(sums, layer), want)
        blocks = slice(at, at + matrix.groups)
        at = blocks.stop
        part = vectors.row_part(rows, layer)
        torch.testing.assert_close(vectors.sum_rows(rows)[blocks], part.sum(1))
        norms = vectors.square_norms(columns)[blocks]
        torch.testing.assert_close(norms, with_one(vectors, columns, layer).square().sum(1))
        each = vectors.row_part(vectors.to_rows(vectors.square_norms(columns)), layer)
        assert torch.equal(each, norms.unsqueeze(1).expand(-1, matrix.rows))
    for spread, part in ((vectors.to_all_rows, vectors.row_part), (vectors.to_all_columns, vectors.column_part)):
        each = spread(torch.arange(5.0))
        assert all((part(each, layer) == layer).all() for layer in range(5))
    assert vectors.sum_blocks(torch.ones(12)).tolist() == [1, 1, 3, 6, 1]
    assert torch.equal(
        vectors.sum_columns(vectors.to_columns(torch.ones(12))), torch.tensor([7.0, 1, *[4] * 3, *[9] * 6, 1])
    )


def test_closed_forms_solve_the_systems():
    generator = torch.Generator().manual_seed(1)
    for rows, columns in ((3, 5), (1, 4), (6, 2)):
        matrix, b, a = (
            torch.randn(s, generator=generator, dtype=torch.float64) for s in ((rows, columns), rows, columns)
        )
        for damping in (0.03, 3.0):
            torch.testing.assert_close(
                eva_reference.eva_closed(matrix, a, b, damping), eva_reference.eva(matrix, a, b, damping)
            )
            torch.testing.assert_close(
                eva_reference.foof_closed(matrix, a, damping), eva_reference.foof(matrix, a, damping)
            )
