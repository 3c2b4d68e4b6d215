"""Gradients of whole layers, or the parts of them that a rank holds, corrected by one rank: G ← f · (G - w aᵀ).

Note [Parts of a matrix]
A layer's gradient is a matrix [groups, rows, columns] in the order of memory, and a column more where there is a bias;
only a grouped convolution has several groups. A rank may hold any run of its elements. A run is cut into rectangles:
the end of a row, whole rows, the beginning of a row. All that a correction by one rank asks of a gradient is linear in
it or a sum of squares: each rank computes it of its rectangles, and one small exchange adds up. So no rank needs the
matrix whole.

Note [Flat vectors]
The vectors of all layers lie one after another in two flat ones: *rows* has an element for each output of each layer,
*columns* one for each input of each layer and group, without the bias's, which is always 1. What is done to the vectors
is done to all layers by one operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dear import _C


@dataclass(frozen=True)
class Matrix:
    """The shape of a layer's gradient."""

    groups: int
    rows: int  # of a group
    columns: int  # of a group, without the bias's
    bias: bool


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """These numbers there, in stream order: what a GPU copies from pinned memory, the host need not wait for."""
    gpu = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=gpu).to(device, non_blocking=gpu)


class Vectors:
    """Where the rows and columns of each layer stand in the flat vectors (Note [Flat vectors]), and what is done to all
    layers at once. A *block* is a group of a layer.

    The lengths that sums go by are right, and are not checked ("unsafe"): a GPU would have to be asked, and waited for.
    """

    def __init__(self, matrices: Sequence[Matrix], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.matrices, self.dtype, self.device = list(matrices), dtype, device
        self.first_row = list(accumulate((each.groups * each.rows for each in matrices), initial=0))
        self.first_column = list(accumulate((each.groups * each.columns for each in matrices), initial=0))
        self.rows, self.columns = self.first_row[-1], self.first_column[-1]
        blocks = [each for each in matrices for _ in range(each.groups)]
        self.block_rows, self.block_columns = (
            torch.tensor(sizes, device=device)
            for sizes in ([each.rows for each in blocks], [each.columns for each in blocks])
        )
        self._ones = torch.tensor([float(each.bias) for each in blocks], dtype=dtype, device=device)
        self._blocks_of = torch.tensor([each.groups for each in matrices], device=device)
        self._layer_rows, self._layer_columns = (
            torch.tensor(sizes, device=device)
            for sizes in (
                [each.groups * each.rows for each in matrices],
                [each.groups * each.columns for each in matrices],
            )
        )
        # Where each block begins, or each layer's first one, and the last one ends: for native code.
        self.first_block = list(accumulate((each.groups for each in matrices), initial=0))
        self.first_row_of_block = list(accumulate((each.rows for each in blocks), initial=0))
        self.first_column_of_block = list(accumulate((each.columns for each in blocks), initial=0))

    def zeros(self, numel: int) -> Tensor:
        """So many zeros, of the vectors' type."""
        return torch.zeros(numel, dtype=self.dtype, device=self.device)

    def row_part(self, rows: Tensor, layer: int) -> Tensor:
        """A layer's part of such a flat vector, [groups, rows]."""
        matrix, at = self.matrices[layer], self.first_row[layer]
        return rows[at : at + matrix.groups * matrix.rows].view(matrix.groups, -1)

    def column_part(self, columns: Tensor, layer: int) -> Tensor:
        """The same of columns, [groups, columns]."""
        matrix, at = self.matrices[layer], self.first_column[layer]
        return columns[at : at + matrix.groups * matrix.columns].view(matrix.groups, -1)

    def sum_rows(self, rows: Tensor) -> Tensor:
        """Sums over each block's rows, [blocks]."""
        return torch.segment_reduce(rows, "sum", lengths=self.block_rows, unsafe=True)

    def dot_rows(self, rows: Tensor, others: Tensor) -> Tensor:
        """Products of two vectors of rows, by block, [blocks]."""
        if rows.is_cpu:
            return _C.dot_by_block(rows, others, self.first_row_of_block)
        return self.sum_rows(rows * others)

    def sum_columns(self, columns: Tensor) -> Tensor:
        """Sums over each block's columns, without the bias's, [blocks]."""
        return torch.segment_reduce(columns, "sum", lengths=self.block_columns, unsafe=True)

    def sum_blocks(self, blocks: Tensor) -> Tensor:
        """Sums over each layer's blocks, [layers]."""
        return torch.segment_reduce(blocks, "sum", lengths=self._blocks_of, unsafe=True)

    def square_norms(self, columns: Tensor) -> Tensor:
        """‖a‖² of each block, with the bias's 1, [blocks]."""
        if columns.is_cpu:
            return _C.dot_by_block(columns, columns, self.first_column_of_block) + self._ones
        return self.sum_columns(columns.square()) + self._ones

    def to_all_rows(self, layers: Tensor) -> Tensor:
        """One value a layer to each of its rows."""
        return layers.repeat_interleave(self._layer_rows, output_size=self.rows)

    def to_all_columns(self, layers: Tensor) -> Tensor:
        """One value a layer to each of its columns."""
        return layers.repeat_interleave(self._layer_columns, output_size=self.columns)

    def to_rows(self, blocks: Tensor) -> Tensor:
        """One value a block to each of its rows."""
        return blocks.repeat_interleave(self.block_rows, output_size=self.rows)

    def to_columns(self, blocks: Tensor) -> Tensor:
        """One value a block to each of its columns."""
        return blocks.repeat_interleave(self.block_columns, output_size=self.columns)


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of a layer's gradient: a view [rows, columns] of it, or [groups, rows, columns] over several groups.

    ``rows`` and ``columns`` say where it stands in the flat vectors; ``columns`` is None for the bias's column.
    """

    view: Tensor
    layer: int
    rows: slice
    columns: slice | None

    def add_products(self, columns: Tensor, sums: Tensor) -> None:
        """Adds G a to the rows of ``sums``."""
        view = self.view.to(sums.dtype)
        if self.columns is None:
            sums[self.rows] += view.flatten()
        elif view.dim() == 2:
            sums[self.rows].addmv_(view, columns[self.columns])
        else:
            a = columns[self.columns].view(view.shape[0], -1, 1)
            sums[self.rows].view(view.shape[0], -1, 1).baddbmm_(view, a)

    def add_column_sums(self, sums: Tensor) -> None:
        """Adds the sums of the columns to ``sums``."""
        assert self.columns is not None
        sums[self.columns] += self.view.sum(-2, dtype=sums.dtype).flatten()

    def subtract(self, rows: Tensor, columns: Tensor) -> None:
        """G ← G - rows columnsᵀ."""
        w = rows[self.rows].to(self.view.dtype)
        if self.columns is None:
            self.view.sub_(w.view_as(self.view))
            return
        a = columns[self.columns].to(self.view.dtype)
        if self.view.dim() == 2:
            self.view.addr_(w, a, alpha=-1)
        else:
            groups = self.view.shape[0]
            self.view.baddbmm_(w.view(groups, -1, 1), a.view(groups, 1, -1), alpha=-1)


def cut_weight(run: Tensor, start: int, layer: int, vectors: Vectors) -> Iterator[Rectangle]:
    """The rectangles of a run [n] of a layer's weight gradient, which begins at its element ``start``."""
    matrix = vectors.matrices[layer]
    size = matrix.rows * matrix.columns
    for begin, end in _cut(start, start + run.numel(), size):
        first, count = begin // size, (end - begin) // size
        if count > 1:
            rows = vectors.first_row[layer] + first * matrix.rows
            columns = vectors.first_column[layer] + first * matrix.columns
            yield Rectangle(
                run[begin - start : end - start].view(count, matrix.rows, matrix.columns),
                layer,
                slice(rows, rows + count * matrix.rows),
                slice(columns, columns + count * matrix.columns),
            )
            continue
        for left, right in _cut(begin, end, matrix.columns):
            row, column = divmod(left, matrix.columns)
            width = min(right - left, matrix.columns)
            rows = vectors.first_row[layer] + row
            columns = vectors.first_column[layer] + first * matrix.columns + column
            view = run[left - start : right - start].view(-1, width)
            yield Rectangle(view, layer, slice(rows, rows + len(view)), slice(columns, columns + width))


def cut_bias(run: Tensor, start: int, layer: int, vectors: Vectors) -> Rectangle:
    """The same of a run of its bias's gradient."""
    rows = vectors.first_row[layer] + start
    return Rectangle(run.view(-1, 1), layer, slice(rows, rows + run.numel()), None)


def _cut(start: int, stop: int, unit: int) -> Iterator[tuple[int, int]]:
    """Cuts a range into the end of a unit, whole units, and the beginning of one."""
    inner = min(stop, -(-start // unit) * unit)
    outer = max(inner, stop // unit * unit)
    for begin, end in ((start, inner), (inner, outer), (outer, stop)):
        if begin < end:
            yield begin, end


def add_products(parts: Iterable[Rectangle], columns: Tensor, sums: Tensor) -> None:
    """Adds G a, with the bias's 1, to ``sums`` [rows]: this rank's share of it."""
    for each in parts:
        each.add_products(columns, sums)


def add_products_and_squares(
    parts: Sequence[Rectangle], columns: Tensor, sums: Tensor, squares_: Tensor, vectors: Vectors
) -> None:
    """As :func:`add_products`; and adds ‖G‖² to ``squares_`` [layers]. On the host in one pass over the memory."""
    if sums.device.type == "cpu":
        _C.add_products(*_lists(parts), columns, sums, squares_)
    else:
        squares_ += squares(parts, norms(parts, vectors), vectors)
        add_products(parts, columns, sums)


def _lists(parts: Sequence[Rectangle]) -> tuple[list[Tensor], list[int], list[int], list[int]]:
    """The parts as native code takes them."""
    return (
        [each.view for each in parts],
        [each.layer for each in parts],
        [each.rows.start for each in parts],
        [-1 if each.columns is None else each.columns.start for each in parts],
    )


def add_column_sums(parts: Iterable[Rectangle], sums: Tensor) -> None:
    """Adds the sums of the columns but the biases' to ``sums`` [columns]: this rank's share of it."""
    for each in parts:
        each.add_column_sums(sums)


def norms(parts: Sequence[Rectangle], vectors: Vectors) -> list[Tensor]:
    """‖G‖ of each part."""
    return list(torch._foreach_norm([each.view for each in parts], 2, vectors.dtype)) if parts else []


def squares(parts: Sequence[Rectangle], norms: Sequence[Tensor], vectors: Vectors) -> Tensor:
    """‖G‖² of each layer [layers], from the norms of its parts: this rank's share of it."""
    sums = vectors.zeros(len(vectors.matrices))
    if not parts:
        return sums
    layers = to_device([each.layer for each in parts], torch.int64, sums.device)
    return sums.index_add_(0, layers, torch.stack(list(norms)).square_())


def subtract_on_host(parts: Sequence[Rectangle], rows: Tensor, columns: Tensor, factor: float) -> None:
    """G ← factor · G - rows columnsᵀ, in place."""
    _C.subtract_products(*_lists(parts), rows, columns, factor)


def subtract(parts: Sequence[Rectangle], rows: Tensor, columns: Tensor, factor: Tensor) -> None:
    """G ← factor · (G - rows columnsᵀ), in place; ``factor`` is one number for all."""
    if not parts:
        return
    rows = rows * factor
    if factor.device.type == "cpu":  # its value is at hand, and one pass over the memory is enough
        subtract_on_host(parts, rows, columns, float(factor))
        return
    torch._foreach_mul_([each.view for each in parts], factor)
    for each in parts:
        each.subtract(rows, columns)
