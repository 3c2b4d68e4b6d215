"""Dense gradients in 8 bits through DDP, against the golden model; what is sent, drawn and refused."""

import pytest
import torch
from compressing import Prescribed, attach, backward, everyones, gradients
from owners_golden import EightBits as Golden

import compress

code_types = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
LARGE = {"first": (900, 800), "second": (500, 700), "vector": (50_000,)}


def as_said(rank: int, world: int, dtype: torch.dtype) -> None:
    """Each rank rounds, the owner averages in float32 and rounds again; both keep what that lost."""
    compressor = compress.Dense(dtype, start_step=2)  # by then DDP has laid its buckets
    model = attach(compressor)
    golden: dict[tuple[str, ...], Golden] = {}
    compressed = 0
    for step in range(5):
        grads = [gradients(r, step) for r in range(world)]
        have = backward(model, grads[rank])
        for key, group in compressor.groups.items():
            if step < 2 or not compressor.compresses(group):
                continue
            if key not in golden:
                golden[key] = Golden(group.numel, compressor.shard_numel(group), world, dtype)
            want = golden[key].step([torch.cat([one[name].flatten() for name in key]) for one in grads])
            assert torch.equal(torch.cat([have[name].flatten() for name in key]), want), step
            compressed += 1
    assert compressed >= 6


@code_types
def test_against_the_golden_model(pool4, dtype):
    pool4.run(as_said, dtype)


def either_hook(rank: int, world: int, dtype: torch.dtype) -> None:
    results = []
    for named in (True, False):
        model = attach(compress.Dense(dtype), named=named)
        results.append([backward(model, gradients(rank, step)) for step in range(4)])
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@code_types
def test_ddps_own_call_gives_the_same(pool2, dtype):
    pool2.run(either_hook, dtype)


def bytes_sent(rank: int, world: int, dtype: torch.dtype) -> None:
    """Half of 16 bits, and less than 3% more for the scales, padding included."""
    sent = []
    for compressor in (compress.Dense(torch.bfloat16), compress.Dense(dtype)):
        model = attach(compressor, net=Prescribed(LARGE), bucket_cap_mb=25)
        for step in range(3):
            backward(model, gradients(rank, step, LARGE))
        sent.append(compressor.stats()["bytes_sent"])
    assert sent[0] / 2 < sent[1] < sent[0] / 2 * 1.03


@code_types
def test_bytes_sent(pool4, dtype):
    pool4.run(bytes_sent, dtype)


def drawn(rank: int, world: int, dtype: torch.dtype) -> None:
    """Without error feedback rounding is drawn: from the seed alone, alike on every rank, and right in the mean."""
    grads = [gradients(r, 0) for r in range(world)]
    runs = []
    for seed in (1, 1, 2):
        compressor = compress.Dense(dtype, error_feedback=False, seed=seed + 10 * rank)  # rank 0's counts
        model = attach(compressor)
        results = [backward(model, grads[rank]) for _ in range(60)]
        same = everyones(results[-1])
        assert all(torch.equal(one[name], same[0][name]) for one in same for name in same[0])
        runs.append(results)
    for name in runs[0][0]:
        again = [torch.equal(a[name], b[name]) for a, b in zip(runs[0], runs[1], strict=True)]
        assert all(again)
    mean = torch.stack([grad["first"] for grad in grads]).double().mean(0)
    results = [one["first"].double() for one in runs[0]]
    assert not torch.equal(results[5], results[6]), "the same gradients are rounded otherwise in another step"
    assert not torch.equal(results[5], runs[2][5]["first"].double()), "and by another seed"
    one_off = (results[5] - mean).norm()
    mean_off = (torch.stack(results[2:]).mean(0) - mean).norm()
    assert mean_off < one_off / 4, "58 draws are 7.6 times as near as one"


@code_types
def test_stochastic_rounding(pool2, dtype):
    pool2.run(drawn, dtype)


def test_error_feedback_is_the_default_in_eight_bits_alone():
    for dtype in (torch.int8, torch.float8_e4m3fn):
        assert compress.Dense(dtype).error_feedback and compress.Dense(dtype).usual_ratio == 4
        assert not compress.Dense(dtype, error_feedback=False).error_feedback
    assert not compress.Dense().error_feedback and compress.Dense().usual_ratio == 2
