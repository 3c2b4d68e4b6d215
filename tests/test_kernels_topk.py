"""The top-k kernels against the golden model, bit for bit."""

import pytest
import torch
from kernel_cases import DEVICES, DTYPES, LENGTHS, VALUES, counter, gradient, misaligned, same_bits
from torch import Tensor

from compress import ops, reference
from compress.reference import Sparse

on_devices = pytest.mark.parametrize("device", DEVICES)

MANY = (512 * 300, 512 * 300 + 259)  # whole stretches of those that a sample is taken of, and a rest


def workspace(n: int, device: str) -> Tensor:
    return torch.full((ops.topk_workspace_numel(n),), -1, dtype=torch.int32, device=device)


def slots_of(payload: Tensor) -> list[Sparse]:
    capacity = (payload.shape[1] - 1) // 2
    slots = []
    for row in payload.cpu():
        count = int(row[0])
        slots.append(Sparse(row[1 : 1 + count].long(), row[1 + capacity : 1 + capacity + count].view(torch.float32)))
    return slots


def packed(slots: list[Sparse], capacity: int, device: str) -> Tensor:
    payload = torch.full((len(slots), ops.topk_slot_numel(capacity)), -7, dtype=torch.int32)
    for row, slot in zip(payload, slots, strict=True):
        count = slot.indices.numel()
        row[0] = count
        row[1 : 1 + count] = slot.indices.int()
        row[1 + capacity : 1 + capacity + count] = slot.values.view(torch.int32)
    return payload.to(device)


def check_select(
    grad: Tensor | None,
    error: Tensor,
    device: str,
    k: int | None = None,
    threshold: float = 0.0,
    owners: int = 1,
    capacity: int = 64,
    offset: int = 0,
) -> None:
    """Exact selection of k, or by a given threshold; slots, new error and statistics must be the golden ones."""
    n = error.numel()
    shard = ops.shard_numel(n, owners)
    corrected, dropped = reference.correct(error if grad is None else grad, None if grad is None else error)
    own_grad = None if grad is None else misaligned(grad, offset, device)
    own_error = misaligned(error, offset, device)
    limit, ties = torch.full((1,), threshold, device=device), None
    golden_ties = None
    scratch = workspace(n, device)
    if k is not None:
        ties = counter(1, device)
        ops.topk_threshold(own_grad, own_error, k, limit, ties, scratch)
        threshold, golden_ties = reference.topk_threshold(corrected, k)
        assert limit.item() == threshold
        assert ties.item() == golden_ties
        assert same_bits(own_error, error)
    payload = torch.full((owners, ops.topk_slot_numel(capacity)), -7, dtype=torch.int32, device=device)
    stats = torch.tensor([1000, 2000], dtype=torch.int32, device=device)
    ops.topk_select(own_grad, own_error, limit, ties, shard, payload, stats, scratch)

    slots, new_error, found = reference.topk_select(corrected, threshold, golden_ties, shard, owners, capacity)
    for actual, expected in zip(slots_of(payload), slots, strict=True):
        assert torch.equal(actual.indices, expected.indices)
        assert same_bits(actual.values, expected.values)
    assert same_bits(own_error, new_error)
    assert stats.tolist() == [1000 + found, 2000 + dropped]


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths(n: int, dtype: torch.dtype, device: str) -> None:
    for owners in (1, 3):
        grad, error = gradient("normal", n, dtype), torch.randn(n)
        check_select(grad, error, device, threshold=1.5, owners=owners, capacity=2000)
        check_select(None, error, device, threshold=1.5, owners=owners, capacity=2000)
        for k in {1, max(1, n // 100), max(1, n // 2), n} if n else ():
            check_select(grad, error, device, k=k, owners=owners, capacity=n)
            check_select(None, error, device, k=k, owners=owners, capacity=n)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VALUES)
def test_adversarial(kind: str, dtype: torch.dtype, device: str) -> None:
    n = 2 * 4096 + 45
    for error in (torch.zeros(n), gradient("few", n, seed=1)):
        grad = gradient(kind, n, dtype)
        for k in (1, 77, 4100, n):
            check_select(grad, error, device, k=k, owners=2, capacity=n)
            check_select(grad, error, device, k=k, owners=2, capacity=50)
        for threshold in (0.0, 1e-45, 0.5, float("inf")):
            check_select(grad, error, device, threshold=threshold, owners=2, capacity=n)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("n", MANY)
def test_exact_selection_out_of_many(n: int, kind: str, dtype: torch.dtype, device: str) -> None:
    """So many that a CPU looks at a sample first: where it says enough (normal, few), and where it does not."""
    grad, error = gradient(kind, n, dtype), gradient("normal" if kind == "normal" else "few", n, seed=1)
    for k in (1, n // 1000, n // 100, n // 3):
        check_select(grad, error, device, k=k, owners=2, capacity=k)


@on_devices
@pytest.mark.parametrize("n", MANY)
def test_exact_selection_out_of_much_error(n: int, device: str) -> None:
    for k in (1, n // 1000, n // 100, n // 3):
        check_select(None, torch.randn(n), device, k=k, owners=2, capacity=k)


@on_devices
@pytest.mark.parametrize("inside", [4.0, 0.25])
def test_exact_selection_where_a_sample_misleads(inside: float, device: str) -> None:
    """Magnitudes differ just where a CPU looks, at kSampleRun elements of every stretch: it sees all that are large,
    and expects more of them than there are, or none."""
    runs, run, stride, wander = 512, 16, 32, 13  # as in kernels/cpu/topk.cpp
    values = torch.rand(runs, stride, run) + 1
    values[torch.arange(runs), torch.arange(runs) * wander % stride] *= inside
    values = values.flatten()
    values[::2] *= -1
    n = values.numel()
    for k in (1, n // 100, n // 33, n // 30, n // 10, n // 4):
        check_select(None, values, device, k=k, owners=2, capacity=k)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_misaligned(offset: int, dtype: torch.dtype, device: str) -> None:
    grad, error = gradient("normal", 9_001, dtype), torch.randn(9_001)
    check_select(grad, error, device, k=90, owners=2, capacity=90, offset=offset)


@on_devices
def test_ties_go_to_the_lowest_indices_across_blocks(device: str) -> None:
    n = 5 * 4096
    grad = torch.zeros(n)
    grad[::1000] = -1.0
    grad[500::1000] = 1.0
    for k in (1, 2, 5, 9, 10, 20, 41):
        check_select(grad, torch.zeros(n), device, k=k, owners=2, capacity=n)


@on_devices
@pytest.mark.parametrize("capacity", [1, 3, 40])
def test_what_does_not_fit_stays_in_the_error(capacity: int, device: str) -> None:
    check_select(gradient("normal", 30_000), torch.randn(30_000), device, threshold=1.0, owners=4, capacity=capacity)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("wanted", [10, 4_800, 5_000, 5_200, 5_600])
def test_a_threshold_is_kept_while_it_selects_about_k(wanted: int, kind: str, dtype: torch.dtype, device: str) -> None:
    """The threshold that stands is exact for ``wanted`` of the elements; 5000 are asked for, to within 10%."""
    n, k, tolerance = 70_001, 5_000, 0.1
    grad, error = gradient(kind, n, dtype), gradient("normal", n, seed=1)
    corrected, _ = reference.correct(grad, error)
    standing, _ = reference.topk_threshold(corrected, wanted)
    golden = reference.topk_refresh(corrected, k, standing, -5, tolerance)
    threshold, ties = torch.full((1,), standing, device=device), counter(1, device) - 5
    ops.topk_refresh(grad.to(device), error.to(device), k, threshold, ties, workspace(n, device), tolerance)
    assert (threshold.item(), ties.item()) == golden
    if kind == "normal":  # both ways are taken
        assert (golden[0] == standing) == (wanted in (4_800, 5_000, 5_200))


@on_devices
@pytest.mark.parametrize("standing", [0.0, torch.inf, torch.nan])
def test_a_threshold_that_means_nothing_is_replaced(standing: float, device: str) -> None:
    error = gradient("normal", 5_000).to(device)
    threshold, ties = torch.full((1,), standing, device=device), counter(1, device)
    ops.topk_refresh(None, error, 50, threshold, ties, workspace(5_000, device), 0.5)
    assert (threshold.item(), ties.item()) == reference.topk_threshold(error.cpu(), 50)


@on_devices
@pytest.mark.parametrize(("tolerance", "kept"), [(0.1, True), (0.09, False)])
def test_the_tolerance_is_a_share_of_k(tolerance: float, kept: bool, device: str) -> None:
    error = torch.arange(1.0, 101.0, device=device)
    threshold, ties = torch.full((1,), 80.0, device=device), counter(1, device)  # selects 21
    ops.topk_refresh(None, error, 20, threshold, ties, workspace(100, device), 0.0)
    assert threshold.item() == 81
    threshold.fill_(79)  # selects 22
    ops.topk_refresh(None, error, 20, threshold, ties, workspace(100, device), tolerance)
    assert threshold.item() == (79 if kept else 81)


def random_lists(lists: int, n: int, count: int) -> list[Sparse]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(lists):
        indices = torch.randperm(n, generator=generator)[:count].sort().values
        result.append(Sparse(indices, torch.randn(indices.numel(), generator=generator)))
    return result


@on_devices
@pytest.mark.parametrize(("n", "count"), [(1, 1), (4096, 0), (9_000, 100), (9_000, 9_000), (70_001, 700)])
@pytest.mark.parametrize("lists", [1, 2, 5])
def test_accumulate(lists: int, n: int, count: int, device: str) -> None:
    entries, dense = random_lists(lists, n, count), torch.randn(n)
    actual = dense.clone().to(device)
    ops.topk_accumulate(packed(entries, count + 2, device), actual, 1 / lists)
    torch.testing.assert_close(actual.cpu(), reference.topk_accumulate(entries, dense, 1 / lists)[0], rtol=0, atol=5e-7)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_decode(n: int, dtype: torch.dtype, device: str) -> None:
    owners = 3
    shard = ops.shard_numel(n, owners)
    slots = []
    for owner in range(owners):
        own = max(0, min(shard, n - owner * shard))
        slots += random_lists(1, own, own // 3)
    capacity = max(1, *(slot.indices.numel() for slot in slots))
    out = torch.full((n + 1,), 7.0, dtype=dtype, device=device)[1:]
    ops.topk_decode(packed(slots, capacity, device), out, shard, 0.25)
    assert same_bits(out, reference.topk_decode(slots, n, shard, 0.25).to(dtype))


@on_devices
def test_a_corrupt_payload_writes_nothing_outside(device: str) -> None:
    n, capacity = 5000, 10
    payload = torch.tensor([[2**30, *[-5, 3, n, 2**30, -(2**31)] * 2, *[1] * capacity]], dtype=torch.int32)
    guarded = torch.zeros(n + 200, device=device)
    ops.topk_accumulate(payload.to(device), guarded[100 : 100 + n], 1.0)
    ops.topk_decode(payload.to(device), guarded[100 : 100 + n], n)
    assert not guarded[:100].any()
    assert not guarded[100 + n :].any()


@on_devices
def test_two_way_exchange_is_the_reference_step_and_conserves(device: str) -> None:
    world, owners, shard = 3, 2, 4096
    n, k = owners * shard, 80
    errors = [torch.zeros(n, device=device) for _ in range(world)]
    golden_errors = [torch.zeros(n) for _ in range(world)]
    server, golden_server = torch.zeros(n, device=device), torch.zeros(n)
    applied, total = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    scratch, stats = workspace(n, device), counter(2, device)
    threshold, ties = torch.zeros(1, device=device), counter(1, device)
    for step in range(4):
        grads = [gradient("normal", n, seed=10 * step + rank) for rank in range(world)]
        sent = torch.zeros(world, owners, ops.topk_slot_numel(k), dtype=torch.int32, device=device)
        for rank, grad in enumerate(grads):
            ops.topk_threshold(grad.to(device), errors[rank], k, threshold, ties, scratch)
            ops.topk_select(grad.to(device), errors[rank], threshold, ties, shard, sent[rank], stats, scratch)
        result = torch.zeros(owners, ops.topk_slot_numel(k), dtype=torch.int32, device=device)
        for owner in range(owners):
            kept = server[owner * shard : (owner + 1) * shard]
            ops.topk_accumulate(sent[:, owner].contiguous(), kept, 1 / world)
            ops.topk_threshold(None, kept, k // owners, threshold, ties, scratch)
            ops.topk_select(None, kept, threshold, ties, shard, result[owner : owner + 1], stats, scratch)
        out = torch.empty(n, device=device)
        ops.topk_decode(result, out, shard)
        golden = reference.topk_step(grads, golden_errors, golden_server, k, shard)
        torch.testing.assert_close(out.cpu(), golden, rtol=0, atol=1e-6)
        applied += out.cpu().double()
        total += torch.stack(grads).double().sum(0)
    kept_sum = server.cpu().double() * world + torch.stack(errors).cpu().double().sum(0)
    torch.testing.assert_close(applied * world + kept_sum, total, rtol=0, atol=1e-5)


def test_selection_is_independent_of_threads() -> None:
    n, results = 200_000, []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            error, payload = gradient("few", n), torch.zeros(2, ops.topk_slot_numel(1500), dtype=torch.int32)
            threshold, ties, scratch = torch.zeros(1), counter(1, "cpu"), workspace(n, "cpu")
            ops.topk_threshold(None, error, 2000, threshold, ties, scratch)
            ops.topk_select(None, error, threshold, ties, 102_400, payload, counter(2, "cpu"), scratch)
            results.append((error, payload))
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_bad_calls_say_what_was_wrong() -> None:
    n = 5000
    error, one, ties, stats = torch.zeros(n), torch.zeros(1), counter(1, "cpu"), counter(2, "cpu")
    payload, scratch = torch.zeros(2, 9, dtype=torch.int32), workspace(n, "cpu")
    with pytest.raises(ValueError, match="density"):
        ops.topk_threshold(None, error, 0, one, ties, scratch)
    with pytest.raises(ValueError, match="density"):
        ops.topk_threshold(None, error, n + 1, one, ties, scratch)
    with pytest.raises(ValueError, match="multiple of 4096"):
        ops.topk_select(None, error, one, None, 2500, payload, stats, scratch)
    with pytest.raises(ValueError, match="do not cover"):
        ops.topk_select(None, error, one, None, 4096, payload[:1], stats, scratch)
    with pytest.raises(ValueError, match="workspace"):
        ops.topk_select(None, error, one, None, 4096, payload, stats, scratch[:10])
    with pytest.raises(TypeError, match="convert"):
        ops.topk_select(torch.zeros(n, dtype=torch.float64), error, one, None, 4096, payload, stats, scratch)
    for tolerance in (-0.1, 1.0, torch.nan):
        with pytest.raises(ValueError, match="share of k"):
            ops.topk_refresh(None, error, 1, one, counter(1, "cpu"), scratch, tolerance)
    with pytest.raises(ValueError, match="topk_slot_numel"):
        ops.topk_decode(torch.zeros(2, 8, dtype=torch.int32), error, 4096)
