"""The compression kernels as torch operators, on CPU and CUDA: the typed Python face of ``torch.ops.dear``.

Every operator writes into buffers that its caller owns, allocates nothing, waits for no device, and returns None.
Gradients (``grad``) are float32, float16 or bfloat16; error feedback is float32; payloads are int32 words. All are
contiguous, on one device. Shapes are checked before anything is written: a mismatch raises ValueError, a wrong type
TypeError. :mod:`compress.reference` says in plain torch what each computes.

Non-finite values: where gradient + error is not finite, the error stands, the gradient element is dropped, and a
counter is raised. What overflows while it is encoded or merged is dropped and counted likewise. So the error feedback
is always finite, and so is every payload, but for a 16-bit one without error feedback. Averages are finite where their
terms are. Decoded values are held within the range of the gradients' type.

Counters are added to, not overwritten: zero them once per step and share them among groups.
"""

import torch
from torch import Tensor

from dear import _C  # loading it registers the operators

_ops = torch.ops.dear


def shard_numel(numel: int, owners: int) -> int:
    """Elements per owner when ``numel`` elements are shared out in whole blocks; the last shards may be short."""
    return max(1, -(-numel // (owners * _C.BLOCK))) * _C.BLOCK


def kernel_threads() -> int:
    """How many threads the CPU kernels run on: torch's number, or 1 where the extension was built without OpenMP."""
    return int(_ops.kernel_threads())


def error_correct(grad: Tensor, error: Tensor, dropped: Tensor | None = None) -> None:
    """``error += grad``. ``grad`` [n], ``error`` [n] float32, ``dropped`` int32 [1] counter or None."""
    _ops.error_correct(grad, error, dropped)


# --- Dense ------------------------------------------------------------------------------------------------------------


def dense_round(grad: Tensor, error: Tensor | None, out: Tensor, dropped: Tensor | None = None) -> None:
    """``out`` [n] float16 or bfloat16 = ``grad`` [n], rounded to nearest; ``dropped`` counts what is not finite in it.

    With ``error`` [n] instead: ``grad + error``, held within the range of out's type, is rounded, ``error`` becomes
    what rounding lost, and ``dropped`` counts the elements of the gradient that were dropped.
    """
    _ops.dense_round(grad, error, out, dropped)


def dense_average(payloads: Tensor, error: Tensor | None, out: Tensor, dropped: Tensor | None = None) -> None:
    """:func:`dense_round` of the mean over the ranks of ``payloads`` [ranks, n] into ``out`` [n] of the same type.

    Summed in float32, in order of the ranks; no sum overflows. Rows of the payloads may lie apart.
    """
    _ops.dense_average(payloads, error, out, dropped)


# --- Dense, in 8 bits -------------------------------------------------------------------------------------------------


def quantize_shard_numel(numel: int) -> int:
    """The smallest shard of at least so many elements that is whole words of codes and of scales."""
    return -(-numel // _C.SCALE_UNIT) * _C.SCALE_UNIT


def quantize_payload_numel(shard: int) -> int:
    """int32 words of an owner's row: the codes of ``shard`` elements, then a scale for each block of 128.

    A code is a byte, and so is a scale b, for 2^(b - 127). ``shard`` is a multiple of 512.
    """
    return _C.quantized_words(shard)


def quantize_encode(
    grad: Tensor,
    error: Tensor | None,
    shard: int,
    payload: Tensor,
    dropped: Tensor | None = None,
    floating: bool = False,
    key: int | None = None,
) -> None:
    """``payload`` [owners, quantize_payload_numel(shard)] = ``grad + error`` [n], in 8 bits.

    ``error`` becomes what that lost. Owner s holds elements [s * shard, (s + 1) * shard). Codes are int8, or where
    ``floating`` float8_e4m3fn. Rounded to nearest, or with a ``key`` (32 bits) stochastically, by a hash of the key and
    the element's index. Rows of the payload may lie apart. What is beyond 2^126 counts as not finite; without ``error``
    (None) that is sent as 0.
    """
    _ops.quantize_encode(grad, error, shard, payload, dropped, floating, key)


def quantize_average(
    payloads: Tensor,
    error: Tensor | None,
    shard: int,
    out: Tensor,
    numel: int,
    dropped: Tensor | None = None,
    floating: bool = False,
    key: int | None = None,
) -> None:
    """:func:`quantize_encode` of the mean of every rank's row for one shard, [ranks, words], into one row ``out``.

    ``numel`` is how many elements of the shard exist, and the length of the owner's ``error``. Summed in float32, in
    order of the ranks.
    """
    _ops.quantize_average(payloads, error, shard, out, numel, dropped, floating, key)


def quantize_decode(payload: Tensor, shard: int, out: Tensor, floating: bool = False) -> None:
    """``out`` [n] of a gradient type: what the owners' rows ``payload`` [owners, words] say."""
    _ops.quantize_decode(payload, shard, out, floating)


# --- Dense, in 2, 3 or 4 bits ----------------------------------------------------------------------------------------


def levels_payload_numel(shard: int, bits: int) -> int:
    """int32 words of an owner's row: the codes of ``shard`` elements, then 16 bits of a step for each block of 128.

    ``shard`` is a multiple of 512.
    """
    return _C.levelled_words(shard, bits)


def levels_encode(
    grad: Tensor,
    error: Tensor | None,
    shard: int,
    payload: Tensor,
    dropped: Tensor | None,
    bits: int,
    squares: Tensor | None = None,
) -> None:
    """``payload`` [owners, levels_payload_numel(shard, bits)] = ``grad + error`` [n], in 2, 3 or 4 ``bits``.

    ``error`` becomes what that lost. Owner s holds elements [s * shard, (s + 1) * shard). Levels are -k to k, k =
    2^(bits - 1) - 1, in 3 bits 0, ±1, ±2 and ±4, times the step of their block; what is beyond is cut off. Rows of the
    payload may lie apart. What is beyond 2^100 counts as not finite; without ``error`` (None) that is sent as 0.

    ``squares`` [n] float32, running means of the squares of past results: each element is divided by a scale of its
    own first, a power of two near the root of its mean, and multiplied by it when it is decoded. 2^100 is then of what
    is left. Every rank must pass equal ones, to all three.
    """
    _ops.levels_encode(grad, error, shard, payload, dropped, bits, squares)


def levels_average(
    payloads: Tensor,
    error: Tensor | None,
    shard: int,
    out: Tensor,
    numel: int,
    dropped: Tensor | None,
    bits: int,
    squares: Tensor | None = None,
) -> None:
    """:func:`levels_encode` of the mean of every rank's row for one shard, [ranks, words], into one row ``out``.

    ``numel`` is how many elements of the shard exist, and the length of the owner's ``error`` and of its part of
    ``squares``. Summed in float32, in order of the ranks.
    """
    _ops.levels_average(payloads, error, shard, out, numel, dropped, bits, squares)


def levels_decode(payload: Tensor, shard: int, out: Tensor, bits: int, squares: Tensor | None = None) -> None:
    """``out`` [n] of a gradient type: what the owners' rows ``payload`` [owners, words] say.

    ``squares`` [n] then take in the results, whose squares weigh 1/16.
    """
    _ops.levels_decode(payload, shard, out, bits, squares)


# --- Sign -------------------------------------------------------------------------------------------------------------


def sign_payload_numel(numel: int) -> int:
    """int32 words of the sign payload of ``numel`` elements: one scale and 128 words of bits per 4096 elements.

    A range of whole blocks of elements is a contiguous range of the payload, so the payload of a group of
    ``owners * shard_numel(n, owners)`` elements splits evenly by owner.
    """
    return _C.sign_payload_numel(numel)


def sign_encode(
    grad: Tensor, error: Tensor | None, payload: Tensor, dropped: Tensor | None = None, scaled: bool = True
) -> None:
    """Packs ``grad + error`` [n] to one bit per element and a scale per block; ``error`` becomes what is not sent.

    ``payload`` may be longer than ``sign_payload_numel(n)``: further blocks become zero. The scale is ``mean |c|`` of
    the block, or 1 where not ``scaled``. A bit is set where the sign bit of ``c`` is clear. Without ``error`` (None)
    non-finite elements count as 0.
    """
    _ops.sign_encode(grad, error, payload, dropped, scaled)


def sign_vote(payloads: Tensor, out: Tensor, tie_breaker: int = 0) -> None:
    """Majority vote of ``payloads`` [voters, words] into ``out`` [words], on packed words.

    When exactly half of the voters set a bit, the bit of voter ``tie_breaker`` wins (pass step % voters to favour
    none). The scale is the mean of the voters' scales.
    """
    _ops.sign_vote(payloads, out, tie_breaker)


def sign_average(
    payloads: Tensor, error: Tensor | None, out: Tensor, numel: int, dropped: Tensor | None = None
) -> None:
    """The mean of the decoded ``payloads`` [voters, words] plus the owner's ``error`` [numel], packed into ``out``.

    ``numel`` is how many elements of the shard exist; ``error`` becomes what ``out`` does not say.
    """
    _ops.sign_average(payloads, error, out, numel, dropped)


def sign_decode(payload: Tensor, out: Tensor) -> None:
    """``out`` [n] of a gradient type: plus or minus the block's scale."""
    _ops.sign_decode(payload, out)


# --- Top-k ------------------------------------------------------------------------------------------------------------


def topk_slot_numel(capacity: int) -> int:
    """int32 words of one owner's slot: the count, ``capacity`` indices, ``capacity`` float32 values."""
    return _C.topk_slot_numel(capacity)


def topk_workspace_numel(numel: int) -> int:
    """int32 elements of workspace for the selection among ``numel`` elements."""
    return _C.topk_workspace_numel(numel)


def topk_threshold(
    grad: Tensor | None, error: Tensor, k: int, threshold: Tensor, ties: Tensor, workspace: Tensor
) -> None:
    """The exact k-th largest ``|grad + error|`` into ``threshold`` (float32 [1]), by radix selection.

    ``ties`` (int32 [1]) becomes the number of elements of exactly that magnitude that belong to the k. ``grad`` None
    selects in ``error`` alone. Nothing but these two and the workspace is written.
    """
    _ops.topk_threshold(grad, error, k, threshold, ties, workspace)


def topk_refresh(
    grad: Tensor | None, error: Tensor, k: int, threshold: Tensor, ties: Tensor, workspace: Tensor, tolerance: float
) -> None:
    """Keeps the ``threshold`` that stands if it selects k elements of ``grad + error`` to within ``tolerance`` * k.

    Otherwise ``threshold`` and ``ties`` become those of :func:`topk_threshold`. Nothing waits for the device. Given a
    sample of a group and its share of k, a threshold serves for as many steps as the sample's density agrees with it.
    0 <= tolerance < 1; start with a threshold of 0.
    """
    _ops.topk_refresh(grad, error, k, threshold, ties, workspace, tolerance)


def topk_select(
    grad: Tensor | None,
    error: Tensor,
    threshold: Tensor,
    ties: Tensor | None,
    shard: int,
    payload: Tensor,
    stats: Tensor,
    workspace: Tensor,
) -> None:
    """``error += grad``, then elements with ``|error| >= threshold`` move to their owners' slots, leaving zeros.

    ``payload`` [owners, topk_slot_numel(capacity)]; owner s holds elements [s * shard, (s + 1) * shard), and ``shard``
    is a multiple of 4096 unless there is one owner. A slot lists indices within the shard in rising order; what
    does not fit stays in ``error``. With ``ties`` only that many elements equal to the threshold are taken, lowest
    indices first: with both results of :func:`topk_threshold` exactly k are selected. ``stats`` (int32 [2]) is
    raised by the number selected before capacities, and the number dropped as not finite.
    """
    _ops.topk_select(grad, error, threshold, ties, shard, payload, stats, workspace)


def topk_accumulate(payloads: Tensor, dense: Tensor, alpha: float, dropped: Tensor | None = None) -> None:
    """``dense`` [shard] float32 += ``alpha`` * value for every entry of ``payloads`` [lists, slot words], in order.

    The owner's merge: with ``dense`` its error feedback and ``alpha`` 1 / ranks, a :func:`topk_select` on the result
    with ``grad`` None compresses the mean again. Entries outside the shard are ignored.
    """
    _ops.topk_accumulate(payloads, dense, alpha, dropped)


def topk_decode(payloads: Tensor, out: Tensor, shard: int, alpha: float = 1.0) -> None:
    """``out`` [n] of a gradient type: zero, and ``alpha`` * value at the entries of the owners' slots."""
    _ops.topk_decode(payloads, out, shard, alpha)


# --- Runs of a group ------------------------------------------------------------------------------------------------


def gather_segments(source: Tensor, table: Tensor, message: Tensor, dropped: Tensor | None = None) -> None:
    """``message[position : position + numel] = source[start : start + numel]`` for each row of ``table``.

    ``table`` int64 [segments, 3] of start, numel and position, on the tensors' device; ``source`` flat of a gradient
    type, ``message`` flat float32. Elements that are not finite are copied as they are, and counted in ``dropped``.
    """
    _ops.gather_segments(source, table, message, dropped)


def scatter_segments(message: Tensor, table: Tensor, out: Tensor) -> None:
    """The way back: ``out[start : start + numel] = message[position : position + numel]``, rounded to out's type."""
    _ops.scatter_segments(message, table, out)


# --- Low rank ---------------------------------------------------------------------------------------------------------


def orthogonalize_workspace_numel(batch: int, rows: int, columns: int) -> int:
    """float64 elements of workspace: a Gram matrix for every 1024 rows, one more, and a status, for each matrix."""
    return _C.orthogonalize_workspace_numel(batch, rows, columns)


def orthogonalize(matrices: Tensor, workspace: Tensor) -> None:
    """Replaces each matrix of ``matrices`` [batch, rows, columns] float32 by an orthonormal basis of its columns.

    Cholesky-QR with a Gram matrix in float64, R with a positive diagonal; a second pass where the condition number
    asks for it, Gram-Schmidt where columns depend on each other (those become unit vectors made orthogonal, so zero
    matrices are fine too). Non-finite entries count as 0. Same input, same bits, whatever the number of threads.
    1 <= columns <= min(rows, 256).
    """
    _ops.orthogonalize(matrices, workspace)


def low_rank_project(
    grad: Tensor | None,
    error: Tensor,
    fixed: Tensor,
    factor: Tensor,
    starts: Tensor | None = None,
    transposed: bool = False,
    residual: bool = True,
    dropped: Tensor | None = None,
    pending: tuple[Tensor, Tensor] | None = None,
) -> None:
    """``error += grad``, then the other factor of all matrices, and what the two do not say, in one sweep.

    ``error`` [batch, n, m] float32; matrix b of ``grad`` (flat, any gradient type) begins at element ``starts[b]``
    (int64 [batch], on the same device). With C = error + grad, ``fixed`` and ``factor`` float32 of rank r:

        not transposed:  factor [batch, n, r] = C fixed,     fixed [batch, m, r]
        transposed:      factor [batch, m, r] = C^T fixed,   fixed [batch, n, r]

    ``residual``: ``error`` becomes C - P Q^T of the two factors, else C. So that nothing overflows, now or when factors
    are averaged and decoded, an element of the gradient is dropped where |C| would exceed 2^90, and an element of
    ``factor`` beyond 2^110 is zero; ``dropped`` counts both. ``grad`` and ``starts`` None: nothing is added.
    1 <= r <= 256.

    ``pending``: factors P [batch, n, r] and Q [batch, m, r] that are taken out of ``error`` before the gradient is
    added, as :func:`low_rank_subtract` would do, in the same sweep. So what the last step's factors do not say need not
    be written by itself.
    """
    pending_p, pending_q = pending or (None, None)
    _ops.low_rank_project(grad, error, fixed, factor, starts, transposed, residual, dropped, pending_p, pending_q)


def low_rank_subtract(error: Tensor, p: Tensor, q: Tensor, dropped: Tensor | None = None) -> None:
    """``error`` [batch, n, m] -= P Q^T of ``p`` [batch, n, r] and ``q`` [batch, m, r], where that is finite.

    ``dropped`` counts where it is not.
    """
    _ops.low_rank_subtract(error, p, q, dropped)


def low_rank_decode(p: Tensor, q: Tensor, out: Tensor, starts: Tensor) -> None:
    """The elements of ``out`` (flat, a gradient type) from ``starts[b]`` on become ``p[b]`` @ ``q[b]``^T, for all b.

    ``p`` [batch, n, r], ``q`` [batch, m, r] float32, ``starts`` int64 [batch]; the rest of ``out`` is left alone. Same
    factors, same bits, on every CPU.
    """
    _ops.low_rank_decode(p, q, out, starts)
