"""Finite gradients so large that sums, products and roundings of them are not: counted, never sent, never kept."""

import pytest
import torch
from kernel_cases import DEVICES, counter, same_bits
from torch import Tensor

from compress import ops, reference
from dear import _C

on_devices = pytest.mark.parametrize("device", DEVICES)
either_way = pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
WORLD, ROWS, COLUMNS, RANK = 2, 24, 40, 3
N = ROWS * COLUMNS


@on_devices
@pytest.mark.parametrize(("narrow", "value"), [(torch.float16, 65504.0), (torch.bfloat16, 3.3e38)])
@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_an_average_is_in_the_range_of_its_terms(narrow: torch.dtype, value: float, ranks: int, device: str) -> None:
    payloads = torch.full((ranks, 5), value, device=device).to(narrow)
    for error in (None, torch.zeros(5, device=device)):
        out, count = torch.zeros(5, dtype=narrow, device=device), counter(1, device)
        ops.dense_average(payloads, error, out, count)
        assert torch.equal(out, payloads[0])
        assert count.item() == 0


@pytest.mark.parametrize("ranks", [2, 3, 5, 8, 100])
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e-38])
def test_scaling_before_the_sum_changes_no_bit(ranks: int, narrow: torch.dtype, scale: float) -> None:
    payloads = (torch.randn(ranks, 4099, generator=torch.Generator().manual_seed(ranks)) * scale).to(narrow)
    total = torch.zeros(4099)
    for payload in payloads:
        total += payload.float()
    out = torch.zeros(4099, dtype=narrow)
    ops.dense_average(payloads, None, out)
    assert same_bits(out, (total / ranks).to(narrow))


@on_devices
@either_way
@pytest.mark.parametrize("value", [1e28, 1e38, 3e38])
def test_elements_that_a_product_would_overflow_are_dropped(value: float, transposed: bool, device: str) -> None:
    error, fixed = torch.randn(1, 6, 8), torch.randn(1, 6 if transposed else 8, 2)
    grad = torch.randn(48)
    grad[[5, 17]] = torch.tensor([value, -value])
    golden, c, dropped = reference.low_rank_project(grad, error, fixed, [0], transposed)
    kept, factor, count = error.to(device), torch.full_like(golden, torch.nan, device=device), counter(1, device)
    ops.low_rank_project(grad.to(device), kept, fixed.to(device), factor, torch.zeros(1, dtype=torch.int64,
                         device=device), transposed, False, count)  # fmt: skip
    assert count.item() == dropped == 2
    assert same_bits(kept, c)
    torch.testing.assert_close(factor.cpu(), golden)


@on_devices
@either_way
@pytest.mark.parametrize("residual", [False, True])
def test_a_factor_beyond_the_bound_is_sent_as_zero_and_counted(transposed: bool, residual: bool, device: str) -> None:
    fixed = torch.randn(1, 6 if transposed else 8, 2)
    fixed[..., 0] *= 1e30  # as a factor that was not made orthonormal may be
    error = torch.full((1, 6, 8), 1e10)
    golden, _, dropped = reference.low_rank_project(None, error, fixed, [], transposed)
    assert 0 < dropped == golden[..., 0].numel()
    kept, factor, count = error.to(device), torch.full_like(golden, torch.nan, device=device), counter(1, device)
    ops.low_rank_project(None, kept, fixed.to(device), factor, transposed=transposed, residual=residual, dropped=count)
    assert count.item() == dropped
    assert not factor[..., 0].any()
    torch.testing.assert_close(factor.cpu(), golden)
    assert kept.isfinite().all()


@on_devices
def test_an_owners_merge_keeps_its_error_finite(device: str) -> None:
    payload = torch.zeros(2, ops.topk_slot_numel(2), dtype=torch.int32)
    for row in payload:
        row[:3] = torch.tensor([2, 0, 3])
        row[3:].view(torch.float32)[:] = torch.tensor([3e38, 1.0])
    dense, count = torch.full((5,), 3e38, device=device), counter(1, device) + 1
    ops.topk_accumulate(payload.to(device), dense, 0.5, count)
    assert torch.equal(dense.cpu(), torch.full((5,), 3e38))  # 1.0 is nothing beside it
    assert count.item() == 1 + 2


@on_devices
def test_an_owners_average_of_signs_keeps_its_error_finite(device: str) -> None:
    ballot = reference.sign_pack(reference.sign_compress(torch.full((40,), 3e38)))
    error, count = torch.full((40,), 3e38), counter(1, device)
    own, out = error.clone().to(device), torch.zeros_like(ballot, device=device)
    ops.sign_average(torch.stack([ballot, ballot]).to(device), own, out, 40, count)
    _, new_error, dropped = reference.sign_average([reference.sign_unpack(ballot, 40)] * 2, error)
    assert count.item() == dropped == 40
    assert own.isfinite().all()
    assert new_error.isfinite().all()


@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoded_values_are_held_within_the_range(dtype: torch.dtype, device: str) -> None:
    largest = torch.finfo(dtype).max
    big = torch.finfo(torch.float32).max if dtype == torch.bfloat16 else 1e5
    outs = [torch.zeros(4, dtype=dtype, device=device) for _ in range(3)]
    one = torch.ones(1, 1, 1, device=device)
    ops.low_rank_decode(one * big, one.expand(1, 4, 1).contiguous(), outs[0], counter(1, device).long())
    ops.sign_decode(reference.sign_pack(reference.sign_compress(torch.full((4,), big))).to(device), outs[1])
    slot = torch.zeros(1, ops.topk_slot_numel(4), dtype=torch.int32)
    slot[0, :5] = torch.tensor([4, 0, 1, 2, 3])
    slot[0, 5:].view(torch.float32)[:] = big
    ops.topk_decode(slot.to(device), outs[2], 4)
    for out in outs:
        assert (out == largest).all()


# --- One step of every native codec, on two ranks played in turn ---


def exchange(messages: list[_C.Message]) -> None:
    """What the lanes do, with averages as DDP makes them: divided first."""
    phase = messages[0].phase
    chunks = [message.full.chunk(WORLD) for message in messages]
    if phase == _C.Phase.all_to_all:
        for rank, message in enumerate(messages):
            message.shard.copy_(torch.cat([chunk[rank] for chunk in chunks]))
    elif phase == _C.Phase.reduce_scatter:
        mean = sum((message.full / WORLD for message in messages), torch.zeros_like(messages[0].full))
        for message in messages:
            message.full.copy_(mean)
    elif messages[0].full.dtype == torch.int32:  # the other phase's averages are on all ranks already
        whole = torch.cat([chunks[rank][rank] for rank in range(WORLD)])
        for message in messages:
            message.full.copy_(whole)


def run(codecs: list[_C.Codec], grads: list[Tensor], step: int) -> tuple[list[Tensor], list[int]]:
    """The ranks' results, and what each had dropped before anything was exchanged."""
    results = [torch.zeros(N) for _ in codecs]
    for codec, grad, result in zip(codecs, grads, results, strict=True):
        codec.bind(grad, result)
    dropped: list[int] = []
    for stage in range(codecs[0].stages(step)):
        messages = [codec.advance(step, stage) for codec in codecs]
        dropped = dropped or [int(codec.dropped()) for codec in codecs]
        exchange(messages)
    for codec in codecs:
        assert codec.advance(step, codec.stages(step)) is None
    return results, dropped


def low_rank(kind: str, rank: int, error: Tensor | None) -> _C.Codec:
    q = torch.randn(1, COLUMNS, RANK, generator=torch.Generator().manual_seed(3))
    batch = _C.MatrixBatch(
        starts=torch.zeros(1, dtype=torch.int64),
        error=None if error is None else error.view(1, ROWS, COLUMNS),
        p=torch.zeros(1, ROWS, RANK),
        q=q,
    )
    options = {"segments": torch.zeros(0, 3, dtype=torch.int64), "dense_numel": 0, "batches": [batch],
               "device": torch.device("cpu"), "rank": rank, "world": WORLD, "wire": None}  # fmt: skip
    if kind == "acp":
        return _C.AcpCodec(start=_C.StartStep(0), **options)
    return _C.LocalCodec(**options) if kind == "local" else _C.PowerCodec(**options)


def owner(kind: str, rank: int, error: Tensor | None, owner_error: Tensor | None) -> _C.Codec:
    shard = N // WORLD if kind in ("bf16", "fp16") else ops.shard_numel(N, WORLD)
    owned = max(0, min(shard, N - rank * shard))
    options = {"device": torch.device("cpu"), "rank": rank, "world": WORLD, "owned": owned, "error": error,
               "owner_error": None if owner_error is None else owner_error[:owned]}  # fmt: skip
    if kind == "sign":
        return _C.SignCodec(words=ops.sign_payload_numel(shard), scaled=True, **options)
    if kind in ("int8", "fp8"):
        return _C.QuantizedCodec(shard=shard, floating=kind == "fp8", seed=1, **options)
    if kind == "int3":
        return _C.LevelledCodec(shard=shard, bits=3, squares=None, **options)
    if kind == "topk":
        return _C.TopKCodec(numel=N, shard=shard, k=50, owner_k=50, capacity=60, stretch=0, **options)
    return _C.HalfCodec(shard=shard, dtype=torch.bfloat16 if kind == "bf16" else torch.float16, **options)


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "feedback"])
@pytest.mark.parametrize("value", [1e28, 1e38, 3e38])
@pytest.mark.parametrize("kind", ["acp", "power", "local", "bf16", "fp16", "int8", "fp8", "int3", "sign", "topk"])
def test_no_codec_makes_finite_gradients_infinite(kind: str, value: float, feedback: bool) -> None:
    errors = [torch.zeros(N) if feedback else None for _ in range(WORLD)]
    owner_errors = [torch.zeros(N) if feedback else None for _ in range(WORLD)]
    if kind in ("acp", "power", "local"):
        codecs = [low_rank(kind, rank, error) for rank, error in enumerate(errors)]
    else:
        codecs = [owner(kind, *parts) for parts in zip(range(WORLD), errors, owner_errors, strict=True)]
    ordinary = [torch.randn(N, generator=torch.Generator().manual_seed(rank)) for rank in range(WORLD)]
    spike = [grad.clone() for grad in ordinary]
    spike[1] = spike[1].sign() * value  # rank 1 alone: rank 0 must learn of it
    for step, grads in enumerate([ordinary, spike, spike, ordinary]):
        results, dropped = run(codecs, grads, step)
        bad = [bool(codec.nonfinite().ne(0).any()) for codec in codecs]
        assert bad[0] == bad[1]
        assert bad[0] == any(dropped) or kind in ("sign", "topk", "int8", "fp8", "int3")  # whose owners may drop too
        if kind in ("acp", "power", "local") or (kind == "fp16" and not feedback):
            assert dropped == ([0, 0] if grads is ordinary else [0, N])
        for error in (*errors, *owner_errors):
            assert error is None or error.isfinite().all()
        if not bad[0] or kind != "fp16":  # 16 bits without feedback carry what has overflowed, and say so
            for result in results:
                assert result.isfinite().all()
                assert same_bits(result, results[0])
