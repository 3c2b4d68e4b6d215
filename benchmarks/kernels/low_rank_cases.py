"""The low-rank kernels that are measured, one by one and as a step."""

from collections import Counter
from functools import partial

import torch
from torch import Tensor

from compress import ops

from .case import Case


def low_rank_cases(grad: Tensor, rank: int, side: int = 1024) -> list[Case]:
    """All of the group as square matrices."""
    count = max(1, grad.numel() // side**2)
    used = count * side**2
    flat = grad if grad.numel() >= used else grad.repeat(-(-used // grad.numel()))[:used]
    starts, matrices = torch.arange(count) * side**2, flat[:used].view(count, side, side)
    fixed = torch.linalg.qr(torch.randn(count, side, rank)).Q.contiguous()
    factor, plain_factor = torch.empty(count, side, rank), torch.empty(count, side, rank)
    error, plain_error = torch.zeros(count, side, side), torch.zeros(count, side, side)
    held, last = torch.zeros(count, side, side), torch.randn(count, side, rank) * 1e-3
    out, plain_out = torch.empty(used), torch.empty(count, side, side)
    factors = 4 * (fixed.numel() + factor.numel())

    def plain(transposed: bool) -> Tensor:
        total = plain_error.add_(matrices)
        torch.bmm(total.mT if transposed else total, fixed, out=plain_factor)
        p, q = (fixed, plain_factor) if transposed else (plain_factor, fixed)
        return total.baddbmm_(p, q.mT, alpha=-1)

    return [
        *(
            Case(
                f"low-rank {name} = {product}, rank {rank}, error feedback",
                used * 12 + factors,
                partial(ops.low_rank_project, flat, error, fixed, factor, starts, way),
                partial(plain, way),
            )
            for name, product, way in (("P", "C Q", False), ("Q", "C^T P", True))
        ),
        *(
            Case(
                f"low-rank {name}, rank {rank}, the last factors pending",
                used * 12 + 2 * factors,
                partial(ops.low_rank_project, flat, held, fixed, factor, starts, way, False, None, (last, fixed)),
                partial(plain, way),
            )
            for name, way in (("P", False), ("Q", True))
        ),
        Case(
            f"low-rank decode, rank {rank}",
            used * 4 + factors,
            lambda: ops.low_rank_decode(factor, fixed, out, starts),
            lambda: torch.bmm(factor, fixed.mT, out=plain_out),
        ),
    ]


def low_rank_pass_cases(grad: Tensor, rank: int, side: int = 1024) -> list[Case]:
    """The four passes of a step beside its seven: encoding with the last factors pending, which reads g and e and
    writes e, beside three kernels of this library, which read g and e and write e; read e; read and write e."""
    count = max(1, grad.numel() // side**2)
    flat = grad.repeat(-(-count * side**2 // grad.numel()))[: count * side**2]
    starts, shape = torch.arange(count) * side**2, (count, side, side)
    fixed = torch.linalg.qr(torch.randn(count, side, rank)).Q.contiguous()
    factor, last = torch.empty(count, side, rank), torch.randn(count, side, rank) * 1e-3
    error, kept = torch.zeros(shape), torch.zeros(shape)

    def apart(transposed: bool) -> None:
        ops.error_correct(flat, kept.view(-1))
        ops.low_rank_project(None, kept, fixed, factor, None, transposed)
        p, q = (fixed, factor) if transposed else (factor, fixed)
        ops.low_rank_subtract(kept, p, q)

    return [
        Case(
            f"low-rank {name}, rank {rank}, in one pass",
            flat.numel() * 12 + 8 * (fixed.numel() + factor.numel()),
            partial(ops.low_rank_project, flat, error, fixed, factor, starts, way, False, None, (last, fixed)),
            partial(apart, way),
            rival="a pass each to correct, project, subtract",
        )
        for name, way in (("P", False), ("Q", True))
    ]


def bert_base_rows() -> Counter[int]:
    """Rows of the factors P of BERT-Base's matrices: rows [count]. Its 2 x 768 matrices are too small to compress."""
    layer = Counter({768: 4 + 1, 3072: 1})  # query, key, value, output and the two of the feed-forward part
    rows = Counter({size: 12 * count for size, count in layer.items()})
    rows.update({30522: 1, 512: 1, 768: 1})  # word and position embeddings, pooler
    return rows


def orthogonalize_case(rank: int) -> Case:
    sources = [torch.randn(count, rows, rank) for rows, count in bert_base_rows().items()]
    factors = [source.clone() for source in sources]
    scratch = [torch.empty(ops.orthogonalize_workspace_numel(*f.shape), dtype=torch.float64) for f in factors]

    def run() -> None:
        for factor, workspace in zip(factors, scratch, strict=True):
            ops.orthogonalize(factor, workspace)

    return Case(
        f"orthogonalise BERT-Base's matrices, rank {rank}",
        sum(factor.numel() for factor in factors) * 8,
        run,
        lambda: [torch.linalg.qr(matrix) for source in sources for matrix in source],
        lambda: [factor.copy_(source) for factor, source in zip(factors, sources, strict=True)],
    )


def transformer_matrices(numel: int) -> tuple[str, Counter[tuple[int, int]]]:
    """The matrices of BERT-Large, or of as much of it as has that many elements: how they are called, and shapes."""
    width = next((each for each in (1024, 512, 256, 128, 64) if 12 * each**2 <= numel), 32)
    layers = min(24, max(1, numel // (12 * width**2)))
    shapes = Counter({(width, width): 4 * layers, (4 * width, width): layers, (width, 4 * width): layers})
    if (layers, width) != (24, 1024):
        return f"{layers} layers of width {width}", shapes
    shapes.update({(30522, width): 1, (512, width): 1, (width, width): 1})  # embeddings, pooler
    return "BERT-Large", shapes


def acp_step_cases(grad: Tensor, rank: int) -> list[Case]:
    """All that ACP-SGD computes in a step: the fixed factor is orthogonalised; gradient and error become the other
    factor; both are decoded."""
    called, shapes = transformer_matrices(grad.numel())
    total = sum(count * rows * columns for (rows, columns), count in shapes.items())
    flat = grad.repeat(-(-total // grad.numel()))[:total]
    out, plain_out = torch.empty(total), torch.empty(total)
    batches, begin, factors = [], 0, 0
    for (rows, columns), count in shapes.items():
        size, tall = rows * columns, max(rows, columns)
        p, q = (torch.randn(count, side, rank) for side in (rows, columns))
        last = (torch.randn_like(p) * 1e-3, torch.linalg.qr(q).Q.contiguous())
        workspace = torch.empty(ops.orthogonalize_workspace_numel(count, tall, rank), dtype=torch.float64)
        error, kept = torch.zeros(count, rows, columns), torch.zeros(count, rows, columns)
        starts, part = begin + torch.arange(count) * size, slice(begin, begin + count * size)
        batches.append((p, q, last, workspace, error, kept, starts, part))
        begin, factors = begin + count * size, factors + p.numel() + q.numel()

    def ours(transposed: bool) -> None:
        for p, q, last, workspace, error, _, starts, _ in batches:
            fixed, factor = (p, q) if transposed else (q, p)
            ops.orthogonalize(fixed, workspace)
            ops.low_rank_project(flat, error, fixed, factor, starts, transposed, False, None, last)
            ops.low_rank_decode(p, q, out, starts)

    def plain(transposed: bool) -> None:
        for p, q, _, _, _, kept, _, part in batches:
            fixed, factor = (p, q) if transposed else (q, p)
            fixed.copy_(torch.linalg.qr(fixed).Q)
            corrected = kept.add_(flat[part].view(kept.shape))
            torch.bmm(corrected.mT if transposed else corrected, fixed, out=factor)
            corrected.baddbmm_(p, q.mT, alpha=-1)
            torch.bmm(p, q.mT, out=plain_out[part].view(kept.shape))

    return [
        Case(
            f"ACP-SGD step, {name}, {called}, rank {rank}",
            16 * total + 12 * factors,
            partial(ours, way),
            partial(plain, way),
        )
        for name, way in (("P", False), ("Q", True))
    ]
