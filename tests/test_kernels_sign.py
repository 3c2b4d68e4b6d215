"""The sign kernels against the golden model, bit for bit except for the order in which a scale's sum is taken."""

import pytest
import torch
from kernel_cases import DEVICES, DTYPES, LENGTHS, VALUES, counter, gradient, misaligned, same_bits
from torch import Tensor

from compress import ops, reference
from compress.reference import Signs

on_devices = pytest.mark.parametrize("device", DEVICES)


def with_scales_of(signs: Signs, payload: Tensor) -> Signs:
    """The golden bits with the kernel's scales, after checking that those are close."""
    actual = reference.sign_unpack(payload, signs.bits.numel())
    torch.testing.assert_close(actual.scales, signs.scales, rtol=2e-6, atol=0)
    return Signs(signs.bits, actual.scales)


def check_encode(grad: Tensor, error: Tensor | None, device: str, offset: int = 0, scaled: bool = True) -> None:
    n = grad.numel()
    signs, _, dropped = reference.sign_encode(grad, error, scaled)
    payload = torch.full((ops.sign_payload_numel(n) + reference.RECORD,), -1, dtype=torch.int32, device=device)
    new_error = None if error is None else misaligned(error, offset, device)
    count = counter(1, device)
    ops.sign_encode(misaligned(grad, offset, device), new_error, payload, count, scaled)
    payload = payload.cpu()

    signs = with_scales_of(signs, payload)
    assert torch.equal(payload, reference.sign_pack(signs, payload.numel() // reference.RECORD))
    assert count.item() == dropped
    if error is not None and new_error is not None:
        corrected, _ = reference.correct(grad, error)
        assert same_bits(new_error, corrected - reference.sign_decode(signs))
        assert new_error.isfinite().all()


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_encode_lengths(n: int, dtype: torch.dtype, device: str) -> None:
    check_encode(gradient("normal", n, dtype), torch.randn(n), device)
    check_encode(gradient("normal", n, dtype), None, device)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VALUES)
def test_encode_adversarial(kind: str, dtype: torch.dtype, device: str) -> None:
    n = 2 * 4096 + 45
    for error in (torch.zeros(n), gradient("few", n, seed=1), None):
        check_encode(gradient(kind, n, dtype), error, device)
        check_encode(gradient(kind, n, dtype), error, device, scaled=False)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_encode_misaligned(offset: int, dtype: torch.dtype, device: str) -> None:
    check_encode(gradient("normal", 9_001, dtype), torch.randn(9_001), device, offset)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
def test_decode(n: int, dtype: torch.dtype, device: str) -> None:
    signs = reference.sign_compress(gradient("normal", n))
    out = torch.empty(n + 1, dtype=dtype, device=device)[1:]
    ops.sign_decode(reference.sign_pack(signs).to(device), out)
    assert same_bits(out, reference.sign_decode(signs).to(dtype))


def ballots_of(voters: int, n: int, kind: str = "normal") -> list[Signs]:
    return [reference.sign_compress(gradient(kind, n, seed=voter)) for voter in range(voters)]


def packed(ballots: list[Signs], device: str, apart: int = 0) -> Tensor:
    rows = torch.stack([reference.sign_pack(ballot) for ballot in ballots])
    buffer = torch.zeros(rows.shape[0], rows.shape[1] + apart, dtype=torch.int32, device=device)
    buffer[:, : rows.shape[1]] = rows.to(device)
    return buffer[:, : rows.shape[1]]


@on_devices
@pytest.mark.parametrize("voters", [1, 2, 3, 4, 5, 7, 8, 16, 33, 64])
def test_vote(voters: int, device: str) -> None:
    n = 4096 + 100
    ballots = ballots_of(voters, n)
    for tie_breaker in {0, voters // 2, voters - 1}:
        expected = reference.sign_vote(ballots, tie_breaker)
        payloads = packed(ballots, device, apart=3)
        out = torch.full((payloads.shape[1],), -1, dtype=torch.int32, device=device)
        ops.sign_vote(payloads, out, tie_breaker)
        assert torch.equal(out.cpu(), reference.sign_pack(with_scales_of(expected, out.cpu())))


@on_devices
def test_vote_ties_go_to_the_tie_breaker(device: str) -> None:
    for_, against = torch.ones(64, dtype=torch.bool), torch.zeros(64, dtype=torch.bool)
    ballots = [Signs(bits, torch.ones(1)) for bits in (for_, against, against, for_)]
    for tie_breaker, ballot in enumerate(ballots):
        out = torch.empty(reference.RECORD, dtype=torch.int32, device=device)
        ops.sign_vote(packed(ballots, device), out, tie_breaker)
        assert torch.equal(reference.sign_unpack(out.cpu(), 64).bits, ballot.bits)


@on_devices
@pytest.mark.parametrize("n", [n for n in LENGTHS if n > 0])
@pytest.mark.parametrize("voters", [1, 2, 3, 4, 9])
def test_average(voters: int, n: int, device: str) -> None:
    ballots = ballots_of(voters, n)
    for error in (None, torch.randn(n)):
        expected, _, _ = reference.sign_average(ballots, error)
        new_error = None if error is None else error.clone().to(device)
        payloads = packed(ballots, device)
        out = torch.full((payloads.shape[1],), -1, dtype=torch.int32, device=device)
        ops.sign_average(payloads, new_error, out, n)
        signs = with_scales_of(expected, out.cpu())
        assert torch.equal(out.cpu(), reference.sign_pack(signs))
        if error is not None and new_error is not None:
            total = sum((reference.sign_decode(Signs(b.bits, b.scales / voters)) for b in ballots), torch.zeros(n))
            assert same_bits(new_error, total + error - reference.sign_decode(signs))


@on_devices
def test_average_of_an_empty_shard(device: str) -> None:
    out = torch.full((reference.RECORD,), -1, dtype=torch.int32, device=device)
    payloads = torch.zeros(3, reference.RECORD, dtype=torch.int32, device=device)
    ops.sign_average(payloads, torch.zeros(0, device=device), out, 0)
    assert not out.any()


@on_devices
def test_two_way_exchange_is_the_reference_step_and_conserves(device: str) -> None:
    """Several steps of the algorithm by the kernels, shard by shard: applied + kept = the sum of the gradients."""
    world, n = 3, 2 * 4096 + 999
    shard = ops.shard_numel(n, world)
    words = ops.sign_payload_numel(shard)
    errors = [torch.zeros(n, device=device) for _ in range(world)]
    servers = [torch.zeros(max(0, min(shard, n - rank * shard)), device=device) for rank in range(world)]
    golden_errors, golden_server = [torch.zeros(n) for _ in range(world)], torch.zeros(n)
    applied, total = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for step in range(4):
        grads = [gradient("normal", n, seed=10 * step + rank) for rank in range(world)]
        sent = torch.zeros(world, world * words, dtype=torch.int32, device=device)
        for rank, grad in enumerate(grads):
            ops.sign_encode(grad.to(device), errors[rank], sent[rank])
        result = torch.empty(world * words, dtype=torch.int32, device=device)
        for rank in range(world):
            mine = slice(rank * words, (rank + 1) * words)
            ops.sign_average(sent[:, mine], servers[rank], result[mine], servers[rank].numel())
        out = torch.empty(n, device=device)
        ops.sign_decode(result, out)
        torch.testing.assert_close(
            out.cpu(), reference.sign_step(grads, golden_errors, golden_server), rtol=1e-5, atol=1e-6
        )
        applied += out.cpu().double()
        total += torch.stack(grads).double().sum(0)
    kept = torch.cat(servers).cpu().double() * world + torch.stack(errors).cpu().double().sum(0)
    torch.testing.assert_close(applied * world + kept, total, rtol=0, atol=1e-5)


def test_encode_is_independent_of_threads() -> None:
    grad, results = gradient("normal", 200_000), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            error, payload = torch.zeros(200_000), torch.empty(ops.sign_payload_numel(200_000), dtype=torch.int32)
            ops.sign_encode(grad, error, payload)
            results.append((error, payload))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][1], results[1][1])
    assert same_bits(results[0][0], results[1][0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.sign_encode(torch.zeros(5, dtype=torch.int64), None, counter(129, "cpu")), TypeError, "float32"),
        (lambda: ops.sign_encode(torch.zeros(5), torch.zeros(4), counter(129, "cpu")), ValueError, "equally long"),
        (lambda: ops.sign_encode(torch.zeros(5), torch.zeros(5).half(), counter(129, "cpu")), TypeError, "convert"),
        (lambda: ops.sign_encode(torch.zeros(4097), None, counter(129, "cpu")), ValueError, "sign_payload_numel"),
        (lambda: ops.sign_encode(torch.zeros(10)[::2], None, counter(129, "cpu")), ValueError, "contiguous"),
        (lambda: ops.sign_vote(counter(258, "cpu").view(2, 129), counter(129, "cpu"), 2), ValueError, "tie breaker"),
        (lambda: ops.sign_vote(counter(258, "cpu"), counter(129, "cpu"), 0), ValueError, "voters"),
        (lambda: ops.sign_decode(counter(129, "cpu"), torch.zeros(4097)), ValueError, "whole payload"),
    ],
)
def test_bad_calls_say_what_was_wrong(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
