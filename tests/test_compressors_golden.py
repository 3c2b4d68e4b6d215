"""Every compressor, through DDP on two and four ranks, against what its paper says, computed beside it."""

import compressing
import pytest
import torch
from compressing import KINDS, SHAPES, attach, backward, gradients
from torch import Tensor

import compress
from compress import reference
from compress.group import in_parts
from compress.groups import parts_of_bucket

STEPS = 6
MATRICES = {"first": (300, 50), "second": (300, 50), "wide": (20, 900), "convolution": (32, 216)}


def orthonormal(matrix: Tensor) -> Tensor:
    q, r = torch.linalg.qr(matrix)
    return q * r.diagonal().sign()


class Acp:
    """ACP-SGD on one matrix in float64: the ranks' gradients in, the update out."""

    def __init__(self, world: int, shape: tuple[int, int], q: Tensor) -> None:
        self.errors = [torch.zeros(shape, dtype=torch.float64) for _ in range(world)]
        self.p, self.q, self.steps = torch.zeros(0), q.double(), 0

    def step(self, grads: list[Tensor]) -> Tensor:
        self.steps += 1
        ms = [grad.double() + error for grad, error in zip(grads, self.errors, strict=True)]
        if self.steps % 2 == 1:
            self.q = orthonormal(self.q)
            own = [m @ self.q for m in ms]
            self.errors = [m - p @ self.q.T for m, p in zip(ms, own, strict=True)]
            self.p = torch.stack(own).mean(0)
        else:
            self.p = orthonormal(self.p)
            own = [m.T @ self.p for m in ms]
            self.errors = [m - self.p @ q.T for m, q in zip(ms, own, strict=True)]
            self.q = torch.stack(own).mean(0)
        return self.p @ self.q.T


class Power(Acp):
    """Power-SGD likewise."""

    def step(self, grads: list[Tensor]) -> Tensor:
        ms = [grad.double() + error for grad, error in zip(grads, self.errors, strict=True)]
        p = orthonormal(torch.stack([m @ self.q for m in ms]).mean(0))
        own = [m.T @ p for m in ms]
        self.errors = [m - p @ q.T for m, q in zip(ms, own, strict=True)]
        self.q = torch.stack(own).mean(0)
        return p @ self.q.T


class Local(Acp):
    """Power-SGD by each rank alone, whose results are averaged."""

    def __init__(self, world: int, shape: tuple[int, int], q: Tensor) -> None:
        super().__init__(world, shape, q)
        self.own = [self.q] * world

    def step(self, grads: list[Tensor]) -> Tensor:
        results = []
        for rank, grad in enumerate(grads):
            m = grad.double() + self.errors[rank]
            p = orthonormal(m @ self.own[rank])
            self.own[rank] = m.T @ p
            results.append(p @ self.own[rank].T)
            self.errors[rank] = m - results[rank]
        return torch.stack(results).mean(0)


GOLDEN = {"acp": Acp, "power": Power, "local": Local}


def low_rank(rank: int, world: int, kind: str, error_feedback: bool) -> None:
    torch.manual_seed(rank)  # must not matter
    compressor = KINDS[kind](error_feedback=error_feedback, seed=5, factor_dtype=torch.float32)
    model = attach(compressor)
    golden: dict[str, Acp] = {}
    for name, shape in MATRICES.items():
        q = torch.randn(shape[1], 3, generator=compressor.generator(name))
        golden[name] = GOLDEN[kind](world, shape, q)
    for step in range(STEPS):
        grads = [gradients(r, step) for r in range(world)]
        have = backward(model, grads[rank])
        for name, shape in SHAPES.items():
            theirs = [grad[name] for grad in grads]
            if name not in MATRICES:  # dense, in the same message
                torch.testing.assert_close(have[name], torch.stack(theirs).mean(0))
                continue
            want = golden[name].step([grad.view(MATRICES[name]) for grad in theirs]).view(shape)
            torch.testing.assert_close(have[name].double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
            if not error_feedback:
                golden[name].errors = [torch.zeros_like(error) for error in golden[name].errors]


@pytest.mark.parametrize("error_feedback", [True, False])
@pytest.mark.parametrize("kind", GOLDEN)
@pytest.mark.parametrize("world", [2, 4])
def test_low_rank(pool2, pool4, world, kind, error_feedback):
    (pool2 if world == 2 else pool4).run(low_rank, kind, error_feedback)


def rounded(rank: int, world: int, kind: str, dtype: torch.dtype, share: float, most: float, off: float) -> None:
    """In fewer bits the same bytes say a larger rank, results are nearly those of float32, and nothing is lost."""
    halves, whole = (KINDS[kind](factor_dtype=one) for one in (dtype, torch.float32))
    one, two = attach(halves), attach(whole)
    given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for step in range(STEPS):
        have, want = backward(one, gradients(rank, step)), backward(two, gradients(rank, step))
        for name in SHAPES:
            mean = torch.stack([gradients(r, step)[name] for r in range(world)]).mean(0)
            given[name] += world * (mean.double() - have[name].double())
            if name not in MATRICES:
                torch.testing.assert_close(have[name], mean)
            else:
                assert not torch.equal(have[name], want[name])
                assert step > 0 or (have[name] - want[name]).norm() < off * want[name].norm(), (
                    name
                )  # then errors differ
        for name, error in compressing.kept(halves).items():
            assert (given[name].flatten() - error).abs().max() < 2e-4, (name, step)
    vectors = 2 * (world - 1) * 4 * sum(torch.Size(s).numel() for n, s in SHAPES.items() if n not in MATRICES) // world
    if halves.exchange == "gather":
        vectors = vectors * world // 2
    sent = [compressor.stats()["bytes_sent"] - vectors for compressor in (halves, whole)]
    assert share * sent[1] <= sent[0] < most * sent[1], sent


@pytest.mark.parametrize("kind", GOLDEN)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "share", "most", "off"),
    [
        # A share is off by at most 1/256 of itself, and so is the mean.
        (torch.bfloat16, 0.5, 0.52, 0.02),
        # Each is off by 1/127 of the largest in a block of 128, which is several times what they usually are. And an
        # owner has a multiple of 512 elements, which is much for factors as small as these.
        (torch.int8, 0.25, 0.6, 0.05),
    ],
)
def test_factors_in_fewer_bits(pool2, pool4, world, kind, dtype, share, most, off):
    (pool2 if world == 2 else pool4).run(rounded, kind, dtype, share, most, off)


ONE_BUCKET = {"matrix": (150, 200), "vector": (3000,)}


def flat_kinds(rank: int, world: int, kind: str) -> None:
    """Compressors whose result depends on how gradients lie in a bucket: one, that DDP does not rebuild."""
    make = {
        "topk": lambda: compress.TopK(density=0.02, slack=50, min_compression_ratio=0.1),
        "sign": compress.SignSGD,
        "majority": lambda: compress.SignSGD(vote="majority"),
    }
    compressor = make[kind]()
    model = attach(compressor, net=compressing.Prescribed(ONE_BUCKET), bucket_cap_mb=100, find_unused_parameters=True)
    n = sum(torch.Size(shape).numel() for shape in ONE_BUCKET.values())
    errors, owner_error = [torch.zeros(n) for _ in range(world)], torch.zeros(n)
    for step in range(STEPS):
        have = backward(model, gradients(rank, step, ONE_BUCKET))
        (group,) = compressor.groups.values()
        order = list(group.names)
        flat = []
        for r in range(world):
            grads = gradients(r, step, ONE_BUCKET)
            flat.append(torch.cat([grads[name].flatten() for name in order]))
        if kind == "topk":
            shard = compressor.shard_numel(group)
            want = reference.topk_step(flat, errors, owner_error, max(1, round(0.02 * n)), shard)
        elif kind == "sign":
            want = reference.sign_step(flat, errors, owner_error)
        else:
            ballots = [reference.sign_compress(grad, scaled=False) for grad in flat]
            want = reference.sign_decode(reference.sign_vote(ballots, step % world))
        result = torch.cat([have[name].flatten() for name in order])
        if kind == "topk":
            # Near ties may fall either way, so the sets are compared by size and the values where both selected.
            both = (want != 0) & (result != 0)
            assert both.sum() >= 0.98 * (want != 0).sum()
            torch.testing.assert_close(result[both], want[both])
        else:
            assert ((result - want).abs() <= 1e-5 * want.abs()).double().mean() > 0.999
        # What differs in a near tie would go on to differ: the golden model goes on from the errors as they are.
        states = compressing.everyones(compressor.state_dict())
        if kind != "majority":
            for r, state in enumerate(states):
                mine = torch.cat([state["errors"][name].cpu() for name in order])
                assert ((mine - errors[r]).abs() < 1e-4).double().mean() > 0.999
                errors[r].copy_(mine)
                start = 0
                for name in order:
                    first, values = state["owned"].get(name, (0, torch.zeros(0)))
                    owner_error[start + first : start + first + values.numel()] = values
                    start += state["errors"][name].numel()


@pytest.mark.parametrize("kind", ["topk", "sign", "majority"])
@pytest.mark.parametrize("world", [2, 4])
def test_flat_kinds(pool2, pool4, world, kind):
    (pool2 if world == 2 else pool4).run(flat_kinds, kind)


def sixteen_bits(rank: int, world: int, dtype: torch.dtype, part_numel: int | None) -> None:
    compressor = compress.Dense(dtype)
    compressor.part_numel = part_numel
    model = attach(compressor, **({"bucket_cap_mb": 25} if part_numel else {}))
    for step in range(3):
        grads = [gradients(r, step) for r in range(world)]
        have = backward(model, grads[rank])
        for name in SHAPES:
            total = torch.stack([grad[name].to(dtype).float() for grad in grads]).sum(0) / world
            assert torch.equal(have[name], total.to(dtype).float()), "rounded once by each rank and once by the owner"
    if part_numel:
        assert len(compressor.groups) == 3, "one bucket was to go out in three parts"
    stats = compressor.stats()
    assert stats["bytes_sent"] < 0.51 * stats["dense_bytes"]


@pytest.mark.parametrize("part_numel", [None, 15_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(pool4, dtype, part_numel):
    pool4.run(sixteen_bits, dtype, part_numel)


def test_parts_of_a_bucket():
    def sizes(*numels):
        return {f"p{i}": numel for i, numel in enumerate(numels)}

    def cut(*numels):
        return [[sizes(*numels)[name] for name in part] for part in in_parts(sizes(*numels), 100)]

    assert cut(199) == [[199]]
    assert cut(20, 30) == [[20, 30]]  # less than a part
    assert cut(100, 100, 100) == [[100], [100], [100]]
    assert cut(60, 60, 60, 60) == [[60, 60], [60, 60]]
    assert cut(1000, 1, 1, 1) == [[1000], [1, 1, 1]]  # no parameter is cut, and no part made of crumbs
    assert cut(5, 5, 1000) == [[5, 5], [1000]]
    assert cut(0, 0) == [[0, 0]]


def test_only_much_that_is_sent_from_a_host_goes_out_in_parts():
    bucket = {"first": 1 << 20, "second": 1 << 20}
    host, device = torch.device("cpu"), torch.device("cuda")
    assert parts_of_bucket(compress.Dense(), bucket, host) == [["first"], ["second"]]
    for compressor, where in [(compress.Dense(), device), (compress.SignSGD(), host), (compress.ACPSGD(), host)]:
        assert parts_of_bucket(compressor, bucket, where) == [["first", "second"]]


def other_types(rank: int, world: int) -> None:
    """16-bit gradients are compressed, float64 ones travel dense, in the same model."""
    for kind, make in KINDS.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            compressor = make()
            model = attach(compressor, net=compressing.Prescribed(dtype=dtype))
            for step in range(3):
                grads = [gradients(r, step) for r in range(world)]
                have = backward(model, grads[rank])
            same = compressing.everyones(have)
            assert all(torch.equal(same[0][name], other[name]) for other in same for name in SHAPES), (kind, dtype)
            if dtype == torch.float64:
                for name in SHAPES:
                    want = torch.stack([grad[name].to(dtype) for grad in grads]).mean(0)
                    torch.testing.assert_close(have[name], want, rtol=1e-14, atol=1e-14)
            else:
                assert any(group.codec.compresses(step) for group in compressor.groups.values()), (kind, dtype)


def test_other_types(pool2):
    pool2.run(other_types)


def ratios(rank: int, world: int) -> None:
    """What ratio() says is what is sent, both halves alike; over two steps, ACP-SGD's factors taking turns."""
    for kind, make in KINDS.items():
        compressor = make()
        model = attach(compressor)
        for step in range(2):
            backward(model, gradients(rank, step))
        sent = 0
        for step in range(2, 4):
            backward(model, gradients(rank, step))
            sent += compressor.stats()["bytes_sent"]
        payload = 0.0
        for group in compressor.groups.values():
            payload += 4 * group.numel / (compressor.ratio(group) if compressor.compresses(group) else 1)
        assert sent == pytest.approx(2 * 2 * payload * (world - 1) / world, rel=0.005), kind


def test_ratios_are_what_is_sent(pool4):
    pool4.run(ratios)


LARGE = {"first": (900, 800), "second": (500, 700), "vector": (50_000,)}


def density(rank: int, world: int) -> list[float]:
    """How many elements were selected, as a share of those that were to be."""
    compressor = compress.TopK(density=0.02, selection="threshold")
    model = attach(compressor, net=compressing.Prescribed(LARGE), bucket_cap_mb=100)
    selected = []
    for step in range(20):
        backward(model, gradients(rank, step, LARGE))
        (group,) = compressor.groups.values()
        if step:  # the first pass had DDP's first buckets, and other groups
            selected.append(int(group.private[0].selected) / (0.02 * group.numel))
    return selected


def test_a_threshold_keeps_the_density(pool2):
    for selected in pool2.run(density):
        assert all(0.9 < share < 1.1 for share in selected), selected
