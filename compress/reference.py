"""Plain-torch golden model of every compression kernel and of one step of every compressor.

Written to be read beside the papers and to be compared with, not to be fast. Everything is float32 on one device,
without payload layouts (except :func:`sign_pack`, which defines one). Shapes: ``n`` elements of a flat group, ``B``
blocks of :data:`BLOCK` elements (the last may be short), ``V`` voters (ranks).
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: Elements that share one scale, and the unit in which a group is cut into shards. The golden model's own definition
#: of what ``layout.h`` says; tests compare the two.
BLOCK = 4096
WORD = 32
RECORD = 1 + BLOCK // WORD


# --- Error feedback ---------------------------------------------------------------------------------------------------


FLOAT_MAX = torch.finfo(torch.float32).max


def correct(grad: Tensor, error: Tensor | None, limit: float = FLOAT_MAX) -> tuple[Tensor, int]:
    """``grad + error`` [n], and how many elements were not finite, or larger than ``limit``: there the error stands and
    the gradient is dropped.

    No input can make the result, and so the error feedback, non-finite.
    """
    kept = torch.zeros(grad.shape, dtype=torch.float32) if error is None else error
    total = grad.float() + kept
    within = total.abs() <= limit
    return torch.where(within, total, kept), int((~within).sum())


def to_gradient_type(decoded: Tensor, dtype: torch.dtype) -> Tensor:
    """Decoded float32 values rounded to the gradients' type and held within its range; NaN stays NaN."""
    return decoded.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


# --- Dense ------------------------------------------------------------------------------------------------------------


def dense_round(grad: Tensor, error: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, int]:
    """The gradient [n] in 16 bits, the new error, and how many elements count.

    Without error those that are not finite after rounding. With it ``grad + error`` is held within the type's range,
    and those count whose gradient was dropped.
    """
    if error is None:
        out = grad.float().to(dtype)
        return out, None, int((~out.isfinite()).sum())
    corrected, dropped = correct(grad, error)
    out = corrected.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    return out, corrected - out.float(), dropped


def dense_average(payloads: Tensor, error: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """:func:`dense_round` of the mean of ``payloads`` [ranks, n], summed in float32 in order of the ranks.

    They are first multiplied by a power of two that is at most 1 / ranks, so that no sum overflows: no bits change.
    """
    ranks, total = payloads.shape[0], torch.zeros(payloads.shape[1])
    scale = 0.5 ** (ranks - 1).bit_length()
    for payload in payloads:
        total = total + payload.float() * scale
    return dense_round(total / (ranks * scale), error, payloads.dtype)


# --- Sign -------------------------------------------------------------------------------------------------------------


class Signs(NamedTuple):
    """What one sign payload says: ``bits`` [n] bool (True: sign bit clear) and ``scales`` [B] float32."""

    bits: Tensor
    scales: Tensor


def _per_element(scales: Tensor, n: int) -> Tensor:
    return scales.repeat_interleave(BLOCK)[:n]


def sign_compress(corrected: Tensor, scaled: bool = True) -> Signs:
    """``sign(c)`` and ``mean |c|`` of each block (1 where not ``scaled``), of a finite float32 [n].

    Source: EF-SignSGD (Karimireddy et al., ICML 2019), blockwise as in dist-EF-blockSGD (Zheng et al., NeurIPS 2019).
    """
    means = [block.abs().double().mean() for block in corrected.split(BLOCK)] if corrected.numel() else []
    scales = torch.tensor([float(mean) if scaled else 1.0 for mean in means], dtype=torch.float64)
    return Signs(~torch.signbit(corrected), scales.clamp(max=torch.finfo(torch.float32).max).float())


def sign_decode(signs: Signs) -> Tensor:
    """``+scale`` where the bit is set, ``-scale`` elsewhere: float32 [n]."""
    scale = _per_element(signs.scales, signs.bits.numel())
    return torch.where(signs.bits, scale, -scale)


def sign_encode(grad: Tensor, error: Tensor | None, scaled: bool = True) -> tuple[Signs, Tensor, int]:
    """One worker's payload, its new error ``c - decoded`` [n], and how many elements were dropped."""
    corrected, dropped = correct(grad, error)
    signs = sign_compress(corrected, scaled)
    return signs, corrected - sign_decode(signs), dropped


def sign_vote(ballots: list[Signs], tie_breaker: int = 0) -> Signs:
    """Majority vote per element; a tie goes to the bit of voter ``tie_breaker``. The scale is the voters' mean.

    Source: signSGD with majority vote (Bernstein et al., ICLR 2019); the tie rule is ours.
    """
    count = torch.stack([ballot.bits for ballot in ballots]).sum(0)
    tie = ballots[tie_breaker].bits & (2 * count == len(ballots))
    scales = torch.stack([ballot.scales for ballot in ballots]).double().mean(0).float()
    return Signs((2 * count > len(ballots)) | tie, scales)


def sign_average(ballots: list[Signs], error: Tensor | None) -> tuple[Signs, Tensor, int]:
    """The average of the decoded payloads, plus the owner's error, compressed again; the owner's new error; and how
    many elements of the average were dropped.

    Source: dist-EF-blockSGD, Algorithm 2, the server's side.
    """
    n = ballots[0].bits.numel()
    total = torch.zeros(n)
    for ballot in ballots:
        total += sign_decode(Signs(ballot.bits, ballot.scales / len(ballots)))
    return sign_encode(total, error)


def sign_pack(signs: Signs, blocks: int | None = None) -> Tensor:
    """The payload, int32 [blocks * RECORD]: per block the float32 scale, then bit j of word w for element 32 w + j.

    Bits behind element n, and blocks behind the last, are zero.
    """
    n, used = signs.bits.numel(), signs.scales.numel()
    payload = torch.zeros(used if blocks is None else blocks, RECORD, dtype=torch.int32)
    bits = torch.zeros(used * BLOCK, dtype=torch.int64)
    bits[:n] = signs.bits.long()
    words = (bits.view(used, BLOCK // WORD, WORD) << torch.arange(WORD)).sum(-1)
    payload[:used, 0] = signs.scales.view(torch.int32)
    payload[:used, 1:] = torch.where(words >= 2**31, words - 2**32, words).int()
    return payload.flatten()


def sign_unpack(payload: Tensor, n: int) -> Signs:
    """The inverse of :func:`sign_pack`, for the first ``n`` elements."""
    used = -(-n // BLOCK)
    records = payload.view(-1, RECORD)[:used]
    bits = (records[:, 1:, None].long() >> torch.arange(WORD)) & 1
    return Signs(bits.flatten()[:n].bool(), records[:, 0].contiguous().view(torch.float32))


def sign_step(grads: list[Tensor], errors: list[Tensor], server_error: Tensor) -> Tensor:
    """One step of EF-SignSGD with two-way compression: what every rank decodes, [n]. The errors change in place.

    Conserved: the sum of the gradients = V * (result + change of server error) + sum of the changes of the errors.
    """
    ballots = []
    for grad, error in zip(grads, errors, strict=True):
        signs, new_error, _ = sign_encode(grad, error)
        error.copy_(new_error)
        ballots.append(signs)
    result, new_server_error, _ = sign_average(ballots, server_error)
    server_error.copy_(new_server_error)
    return sign_decode(result)


# --- Top-k ------------------------------------------------------------------------------------------------------------


class Sparse(NamedTuple):
    """One owner's slot: ``indices`` [m] relative to the owner's shard, rising, and ``values`` [m] float32."""

    indices: Tensor
    values: Tensor


def topk_threshold(corrected: Tensor, k: int) -> tuple[float, int]:
    """The k-th largest magnitude, and how many elements of exactly that magnitude belong to the k."""
    magnitudes = corrected.abs()
    threshold = float(magnitudes.sort(descending=True).values[k - 1])
    return threshold, k - int((magnitudes > threshold).sum())


def topk_refresh(corrected: Tensor, k: int, threshold: float, ties: int, tolerance: float) -> tuple[float, int]:
    """The threshold and ties that stand, if they select k to within ``tolerance`` * k, else :func:`topk_threshold`."""
    selected = int((corrected.abs() >= threshold).sum())
    return (threshold, ties) if abs(selected - k) <= int(tolerance * k) else topk_threshold(corrected, k)


def topk_select(
    corrected: Tensor, threshold: float, ties: int | None, shard: int, owners: int, capacity: int
) -> tuple[list[Sparse], Tensor, int]:
    """The owners' slots, the new error [n], and how many elements passed the threshold before capacities.

    Of elements equal to the threshold the first ``ties`` are taken (None: all). Each owner's slot holds the first
    ``capacity`` of the elements selected in its shard; whatever is not sent stays in the error.
    """
    magnitudes = corrected.abs()
    equal = magnitudes == threshold
    if ties is not None:
        equal &= equal.cumsum(0) <= ties
    selected = (magnitudes > threshold) | equal
    error, slots = corrected.clone(), []
    for owner in range(owners):
        begin = min(owner * shard, corrected.numel())
        indices = selected[begin : begin + shard].nonzero().flatten()[:capacity]
        slots.append(Sparse(indices, corrected[begin + indices]))
        error[begin + indices] = 0
    return slots, error, int(selected.sum())


def topk_accumulate(lists: list[Sparse], dense: Tensor, alpha: float) -> tuple[Tensor, int]:
    """``dense`` [shard] plus ``alpha`` times every entry of the lists, added in list order: the owner's merge. And how
    many entries were dropped, because the sum was not finite."""
    result, dropped = dense.clone(), 0
    for entries in lists:
        total, lost = correct(torch.tensor(alpha) * entries.values, result[entries.indices])
        result[entries.indices] = total
        dropped += lost
    return result, dropped


def topk_decode(slots: list[Sparse], n: int, shard: int, alpha: float = 1.0) -> Tensor:
    """The dense float32 [n] that the owners' slots stand for, times ``alpha``."""
    result = torch.zeros(n)
    for owner, entries in enumerate(slots):
        result[owner * shard + entries.indices] = torch.tensor(alpha) * entries.values
    return result


def topk_step(grads: list[Tensor], errors: list[Tensor], server_error: Tensor, k: int, shard: int) -> Tensor:
    """One step of two-way top-k with exact selection, [n]: workers select k, each owner about k of its shard's merge.

    The errors change in place, and conserve as in :func:`sign_step`. Capacities do not bind here. Source: Top-k with
    memory (Stich et al., NeurIPS 2018); compressing again at the server as in DoubleSqueeze (Tang et al., ICML 2019).
    """
    n, world = grads[0].numel(), len(grads)
    owners = -(-n // shard)
    received: list[list[Sparse]] = [[] for _ in range(owners)]
    for grad, error in zip(grads, errors, strict=True):
        corrected, _ = correct(grad, error)
        slots, new_error, _ = topk_select(corrected, *topk_threshold(corrected, k), shard, owners, n)
        error.copy_(new_error)
        for owner, slot in enumerate(slots):
            received[owner].append(slot)
    results = []
    for owner, lists in enumerate(received):
        kept = server_error[owner * shard : (owner + 1) * shard]
        merged, _ = topk_accumulate(lists, kept, 1 / world)
        quota = min(max(1, k // owners), merged.numel())
        slots, new_error, _ = topk_select(merged, *topk_threshold(merged, quota), merged.numel(), 1, n)
        kept.copy_(new_error)
        results += slots
    return topk_decode(results, n, shard)


# --- Runs of a group ------------------------------------------------------------------------------------------------


def gather_segments(source: Tensor, table: list[tuple[int, int, int]], message: Tensor) -> tuple[Tensor, int]:
    """``message`` with the runs (start, numel, position) of ``source`` in place; how many elements are not finite."""
    result, bad = message.clone(), 0
    for start, numel, position in table:
        run = source[start : start + numel].float()
        result[position : position + numel] = run
        bad += int((~run.isfinite()).sum())
    return result, bad


def scatter_segments(message: Tensor, table: list[tuple[int, int, int]], out: Tensor) -> Tensor:
    """``out`` with the runs taken from ``message``, rounded to its type."""
    result = out.clone()
    for start, numel, position in table:
        result[start : start + numel] = message[position : position + numel].to(out.dtype)
    return result


# --- Low rank ---------------------------------------------------------------------------------------------------------


def orthogonalize(matrix: Tensor) -> Tensor:
    """Q [n, r] of the QR decomposition with a positive diagonal of R, by Gram-Schmidt in float64, for r <= n.

    Columns that depend on those before them, to 1e-6 of their norm, are replaced by the first unit vector that keeps
    at least half the mean share outside the span. Non-finite entries count as 0.
    """
    n, r = matrix.shape
    source = torch.where(torch.isfinite(matrix), matrix, 0.0).double()
    q = torch.zeros(n, 0, dtype=torch.float64)
    for column in range(r):
        v = source[:, column]
        norm = v.norm()
        for _ in range(2):
            v = v - q @ (q.T @ v)
        if not v.norm() > 1e-6 * norm:
            kept = 1 - q.square().sum(1)
            unit = int((kept >= 0.5 * (n - column) / n).nonzero()[0])
            v = torch.zeros(n, dtype=torch.float64)
            v[unit] = 1
            for _ in range(2):
                v = v - q @ (q.T @ v)
        q = torch.cat([q, (v / v.norm())[:, None]], dim=1)
    return q.float()


#: A matrix's element, with its error, beyond this is dropped; a factor's element beyond that is sent as zero. See
#: Note [Overflow in low-rank factors] in ``layout.h``.
LARGEST_ELEMENT, LARGEST_FACTOR = 2.0**90, 2.0**110


def low_rank_project(
    grad: Tensor | None, error: Tensor, fixed: Tensor, starts: list[int], transposed: bool
) -> tuple[Tensor, Tensor, int]:
    """The other factor of C = error + grad [B, n, m], C itself, and how many elements of gradient and factor were
    dropped.

    ``grad`` is flat, matrix b begins at ``starts[b]``. The factor is C ``fixed`` [B, n, r] or, transposed, C^T
    ``fixed`` [B, m, r], summed in float64.
    """
    corrected, dropped = error.clone(), 0
    if grad is not None:
        for matrix, start in zip(corrected, starts, strict=True):
            total, lost = correct(grad[start : start + matrix.numel()], matrix.flatten(), LARGEST_ELEMENT)
            matrix.copy_(total.view_as(matrix))
            dropped += lost
    c = corrected.double()
    factor = ((c.mT if transposed else c) @ fixed.double()).float()
    within = factor.abs() <= LARGEST_FACTOR
    return factor.where(within, 0.0), corrected, dropped + int((~within).sum())


def low_rank_residual(corrected: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, int]:
    """C - P Q^T [B, n, m], summed in float64, or C where that is not finite; and how many elements are not."""
    rest = (corrected.double() - p.double() @ q.double().mT).float()
    finite = torch.isfinite(rest)
    return torch.where(finite, rest, corrected), int((~finite).sum())


def low_rank_decode(p: Tensor, q: Tensor, out: Tensor, starts: list[int]) -> Tensor:
    """``out`` [n], with P Q^T of matrix b, rounded once from float64 and once to the type, from ``starts[b]`` on, and
    held within the type's range."""
    result = out.clone()
    for matrix, start in zip((p.double() @ q.double().mT).float(), starts, strict=True):
        result[start : start + matrix.numel()] = to_gradient_type(matrix.flatten(), out.dtype)
    return result


def power_step(grads: list[Tensor], errors: list[Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    """One step of Power-SGD: the mean gradient's low-rank approximation [n, m], and Q [m, r] for the next step.

    ``grads`` are the ranks' [n, m]; ``errors`` change in place. Source: Vogels et al., NeurIPS 2019, Algorithms 1, 2.
    """
    ms = [grad.float() + error for grad, error in zip(grads, errors, strict=True)]
    p = orthogonalize(torch.stack([m @ q for m in ms]).mean(0))
    qs = [m.T @ p for m in ms]
    for error, m, own in zip(errors, ms, qs, strict=True):
        error.copy_(m - p @ own.T)
    q = torch.stack(qs).mean(0)
    return p @ q.T, q


def acp_step(
    grads: list[Tensor], errors: list[Tensor], p: Tensor, q: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of ACP-SGD: the update [n, m], and P [n, r], Q [m, r] for the next step. ``errors`` change in place.

    Odd steps orthogonalise Q and send P; even steps the other way round: one factor per step.
    Source: ACP-SGD (Zhang, Shi, Li, ICDCS 2023), Algorithm 1.
    """
    ms = [grad.float() + error for grad, error in zip(grads, errors, strict=True)]
    if step % 2 == 1:
        q = orthogonalize(q)
        own = [m @ q for m in ms]
        residuals = [m - factor @ q.T for m, factor in zip(ms, own, strict=True)]
        p = torch.stack(own).mean(0)
    else:
        p = orthogonalize(p)
        own = [m.T @ p for m in ms]
        residuals = [m - p @ factor.T for m, factor in zip(ms, own, strict=True)]
        q = torch.stack(own).mean(0)
    for error, residual in zip(errors, residuals, strict=True):
        error.copy_(residual)
    return p @ q.T, p, q
