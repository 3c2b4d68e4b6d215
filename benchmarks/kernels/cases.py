"""The compression kernels that are measured, each beside the plain-torch way to the same end."""

from collections.abc import Callable

import torch
from torch import Tensor

from compress import ops

from . import cub
from .case import Case
from .low_rank_cases import acp_step_cases, low_rank_cases, low_rank_pass_cases, orthogonalize_case

VOTERS = 4


def sign_cases(grad: Tensor, dtype: torch.dtype) -> list[Case]:
    n, size = grad.numel(), grad.element_size()
    words = ops.sign_payload_numel(n)
    error, payload = torch.zeros(n), torch.empty(words, dtype=torch.int32)
    plain_error, out, ballots = torch.zeros(n), torch.empty_like(grad), torch.empty(VOTERS, words, dtype=torch.int32)
    for ballot in ballots:
        ops.sign_encode(torch.randn(n), None, ballot)
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    dense = torch.stack([torch.randn(n).sign().to(torch.int8) for _ in range(VOTERS)])
    kept = torch.zeros(n)

    def plain_encode() -> Tensor:
        corrected = plain_error.add_(grad)
        scale = corrected.abs().mean()
        positive = corrected >= 0
        packed = (positive.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
        corrected.sub_(torch.where(positive, scale, -scale))
        return packed

    name = str(dtype).removeprefix("torch.")
    cases = [
        Case(
            f"sign encode, error feedback, {name}",
            n * (size + 8) + words * 4,
            lambda: ops.sign_encode(grad, error, payload),
            plain_encode,
        ),
        Case(f"sign decode, {name}", n * size + words * 4, lambda: ops.sign_decode(payload, out), None),
    ]
    if dtype == torch.float32:
        cases += [
            Case(
                f"sign majority vote, {VOTERS} voters",
                (VOTERS + 1) * words * 4,
                lambda: ops.sign_vote(ballots, payload),
                lambda: dense.sum(0, dtype=torch.int8) >= 0,
            ),
            Case(
                f"sign average, {VOTERS} voters, error feedback",
                (VOTERS + 1) * words * 4 + 8 * n,
                lambda: ops.sign_average(ballots, kept, payload, n),
                None,
            ),
        ]
    return cases


def topk_cases(grad: Tensor, density: float) -> list[Case]:
    n, k, owners = grad.numel(), max(1, int(grad.numel() * density)), VOTERS
    shard, capacity = ops.shard_numel(n, owners), int(k / owners * 1.25) + 1
    before = torch.randn(n) * grad.float().std()
    error, plain_error, out = before.clone(), before.clone(), torch.empty_like(grad)
    threshold, ties = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    stats, scratch = torch.zeros(2, dtype=torch.int32), torch.empty(ops.topk_workspace_numel(n), dtype=torch.int32)
    slots = torch.zeros(owners, ops.topk_slot_numel(capacity), dtype=torch.int32)
    limit = torch.zeros(1)
    ops.topk_threshold(grad, before, k, limit, ties, scratch)
    dense, merged = torch.zeros(shard), torch.zeros(shard)

    def plain_select() -> tuple[Tensor, Tensor]:
        corrected = plain_error.add_(grad)
        indices = (corrected.abs() >= limit).nonzero().flatten()
        values = corrected[indices]
        corrected.index_fill_(0, indices, 0)
        return indices, values

    def plain_merge() -> None:
        for slot in slots:
            indices, values = slot[1 : 1 + capacity].long() % shard, slot[1 + capacity :].view(torch.float32)
            merged.index_add_(0, indices, values, alpha=0.25)

    def plain_decode() -> Tensor:
        indices, values = (slots[:, 1 : 1 + capacity].long() % n).flatten(), slots[:, 1 + capacity :].flatten()
        return out.zero_().index_copy_(0, indices, values.view(torch.float32).to(out.dtype))

    def exact() -> None:
        ops.topk_threshold(grad, before, k, threshold, ties, scratch)

    beside_cub = f"top-k exact threshold beside CUB, density {density:g}"
    return [
        Case(
            f"top-k by threshold, error feedback, density {density:g}",
            n * 12 + 8 * k,
            lambda: ops.topk_select(grad, error, limit, None, shard, slots, stats, scratch),
            plain_select,
            lambda: (error.copy_(before), plain_error.copy_(before)),
        ),
        Case(
            f"top-k exact threshold, density {density:g}",
            n * 8,  # once; by radix selection they are read three times
            exact,
            lambda: (before + grad).abs().topk(k).values[-1],
        ),
        *([cub.threshold_case(beside_cub, exact, grad, before, k)] if grad.is_cuda else []),
        Case(
            f"top-k merge of {owners} lists, density {density:g}",
            k * (8 + 8),
            lambda: ops.topk_accumulate(slots, dense, 0.25),
            plain_merge,
        ),
        Case(
            f"top-k decode, density {density:g}",
            n * 4 + 8 * k,
            lambda: ops.topk_decode(slots, out, shard),
            plain_decode,
        ),
    ]


def dense_cases(grad: Tensor, dtype: torch.dtype) -> list[Case]:
    n, name = grad.numel(), str(dtype).removeprefix("torch.")
    error, owner_error = torch.zeros(n), torch.zeros(n)
    plain_error, plain_owner_error = torch.zeros(n), torch.zeros(n)
    out, largest = torch.empty(n, dtype=dtype), torch.finfo(dtype).max
    payloads = grad.to(dtype).repeat(VOTERS, 1)

    def plain(values: Tensor, kept: Tensor) -> Tensor:
        total = kept.add_(values)
        out.copy_(total.clamp(-largest, largest))
        return total.sub_(out)

    return [
        Case(
            f"dense in {name}",
            n * 6,
            lambda: ops.dense_round(grad, None, out),
            lambda: (~out.copy_(grad).isfinite()).sum(),
        ),
        Case(
            f"dense in {name}, error feedback",
            n * 14,
            lambda: ops.dense_round(grad, error, out),
            lambda: plain(grad, plain_error),
        ),
        Case(
            f"average of {VOTERS} in {name}, error feedback",
            n * (2 * VOTERS + 10),
            lambda: ops.dense_average(payloads, owner_error, out),
            lambda: plain(payloads.sum(0, dtype=torch.float32).div_(VOTERS), plain_owner_error),
        ),
    ]


def quantize_cases(grad: Tensor, code: torch.dtype) -> list[Case]:
    """Dense gradients in 8 bits, with a scale for each block of elements."""
    n, name, floating = grad.numel(), str(code).removeprefix("torch.").removesuffix("_e4m3fn"), code.is_floating_point
    shard = ops.quantize_shard_numel(-(-n // VOTERS))
    words, own = ops.quantize_payload_numel(shard), min(shard, n)
    error, plain_error, owner_error, out = torch.zeros(n), torch.zeros(n), torch.zeros(own), torch.empty_like(grad)
    payload = torch.zeros(VOTERS, words, dtype=torch.int32)
    merged = torch.zeros(words, dtype=torch.int32)
    largest = 448.0 if floating else 127.0

    def plain_encode() -> Tensor:
        total = plain_error.add_(grad)
        scale = (total.abs().max() / largest).clamp(min=1e-38)
        scaled = total / scale
        codes = scaled.to(code) if floating else scaled.round_().to(code)
        total.sub_(codes.to(torch.float32) * scale)
        return codes

    return [
        Case(
            f"dense in {name}, error feedback",
            n * 12 + VOTERS * words * 4,
            lambda: ops.quantize_encode(grad, error, shard, payload, None, floating),
            plain_encode,
        ),
        Case(
            f"dense in {name}, stochastic",
            n * 4 + VOTERS * words * 4,
            lambda: ops.quantize_encode(grad, None, shard, payload, None, floating, 7),
            None,
        ),
        Case(
            f"average of {VOTERS} in {name}, error feedback",
            (VOTERS + 1) * words * 4 + own * 8,
            lambda: ops.quantize_average(payload, owner_error, shard, merged, own, None, floating),
            None,
        ),
        Case(
            f"decode of {name}",
            n * 4 + VOTERS * words * 4,
            lambda: ops.quantize_decode(payload, shard, out, floating),
            None,
        ),
    ]


def refresh_case(grad: Tensor, density: float) -> Case:
    """A threshold that holds for a sample of a sixteenth of the group."""
    sample = grad[: max(1, grad.numel() // 16)]
    n, k = sample.numel(), max(1, int(sample.numel() * density))
    error, threshold, ties = torch.zeros(n), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    scratch = torch.empty(ops.topk_workspace_numel(n), dtype=torch.int32)
    ops.topk_threshold(sample, error, k, threshold, ties, scratch)
    return Case(
        f"top-k threshold kept, sample of 1/16, density {density:g}",
        n * 8,
        lambda: ops.topk_refresh(sample, error, k, threshold, ties, scratch, 0.1),
        lambda: (error + sample).abs().topk(k).values[-1],
    )


def segment_cases(grad: Tensor, segments: int = 64) -> list[Case]:
    """Every second of so many runs of the group."""
    length = max(1, grad.numel() // (2 * segments))
    rows = [(2 * i * length, length, i * length) for i in range(segments) if (2 * i + 1) * length <= grad.numel()]
    table, used = torch.tensor(rows), len(rows) * length
    message, out, dropped = torch.empty(used), torch.empty_like(grad), torch.zeros(1, dtype=torch.int32)

    def plain_gather() -> Tensor:
        for start, numel, position in rows:
            message[position : position + numel].copy_(grad[start : start + numel])
        return dropped.add_((~message.isfinite()).sum())

    def plain_scatter() -> None:
        for start, numel, position in rows:
            out[start : start + numel].copy_(message[position : position + numel])

    return [
        Case(
            f"dense members gathered, {segments} runs",
            used * 8,
            lambda: ops.gather_segments(grad, table, message, dropped),
            plain_gather,
        ),
        Case(
            f"dense members scattered, {segments} runs",
            used * 8,
            lambda: ops.scatter_segments(message, table, out),
            plain_scatter,
        ),
    ]


#: Every kernel, by family, on a float32 gradient [n]; top-k at that density, low-rank factors of that rank. All other
#: tensors are made on torch's default device, which must be the gradient's: ``with torch.device(grad.device): ...``.
FAMILIES: dict[str, Callable[[Tensor, float, int], list[Case]]] = {
    "sign": lambda grad, density, rank: [
        case for dtype in (torch.float32, torch.bfloat16, torch.float16) for case in sign_cases(grad.to(dtype), dtype)
    ],
    "top-k": lambda grad, density, rank: [*topk_cases(grad, density), refresh_case(grad, density)],
    "low-rank": lambda grad, density, rank: low_rank_cases(grad, rank),
    "low-rank passes": lambda grad, density, rank: low_rank_pass_cases(grad, rank),
    "ACP-SGD step": lambda grad, density, rank: acp_step_cases(grad, rank),
    "dense": lambda grad, density, rank: [*segment_cases(grad), *dense_cases(grad, torch.bfloat16)],
    "8 bits": lambda grad, density, rank: [
        *quantize_cases(grad, torch.int8),
        *quantize_cases(grad, torch.float8_e4m3fn),
    ],
    "orthogonalise": lambda grad, density, rank: [orthogonalize_case(columns) for columns in (4, 8, 16, 32)],
}
