"""Power-SGD by each rank alone: what it promises beyond what every compressor does."""

import pytest
import torch
from compressing import KINDS, Prescribed, attach, backward, everyones, gradients, kept
from test_compressors_golden import Local
from torch.nn.parallel import DistributedDataParallel as DDP

import compress

#: Matrices of one row, and of fewer columns than the rank; a convolution, vectors, and odd sizes.
UNEVEN = {
    "odd": (101, 37),
    "row": (1, 700),
    "narrow": (513, 2),
    "convolution": (17, 5, 3, 3),
    "vector": (333,),
    "scalar": (1,),
    "odd too": (101, 37),
}
DTYPES = [torch.float32, torch.bfloat16, torch.int8]
ONE_BUCKET = {"bucket_cap_mb": 100, "find_unused_parameters": True}  # which DDP does not rebuild


def conserved(rank: int, world: int, dtype: torch.dtype, columns: int) -> None:
    """Nothing is lost, and all ranks have the same bits, though their factors differ."""
    compressor = compress.LocalPowerSGD(rank=columns, factor_dtype=dtype, min_compression_ratio=0.1)
    model = attach(compressor, net=Prescribed(UNEVEN))
    left = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in UNEVEN.items()}
    for step in range(5):
        given = [gradients(r, step, UNEVEN) for r in range(world)]
        have = backward(model, given[rank])
        for other in everyones(have):
            assert all(torch.equal(other[name], have[name]) for name in UNEVEN), "replicas differ"
        errors = kept(compressor)
        assert {"odd", "narrow", "convolution", "odd too"} <= errors.keys()
        for name in UNEVEN:
            left[name] += sum(grads[name].double() for grads in given) - world * have[name].double()
            error = errors.get(name, torch.zeros(1)).view(-1)
            assert (left[name].view(-1) - error).abs().max() < 1e-4, (step, name)
    factors = everyones(compressor.own_state()["factors"]["odd"][1].cpu())
    assert world == 1 or not torch.equal(factors[0], factors[1])


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_nothing_is_lost_and_replicas_agree(pool1, pool2, pool3, pool4, world, dtype, columns):
    [pool1, pool2, pool3, pool4][world - 1].run(conserved, dtype, columns)


WIDE = {"first": (150, 140), "second": (150, 140), "vector": (40,)}


def many_columns(rank: int, world: int, dtype: torch.dtype, gradient: torch.dtype, columns: int) -> None:
    """The ranks' factors have more columns side by side than the kernels take."""
    assert world * columns > 256
    compressor = compress.LocalPowerSGD(rank=columns, factor_dtype=dtype, min_compression_ratio=0.1, seed=2)
    model = attach(compressor, net=Prescribed(WIDE, dtype=gradient), **ONE_BUCKET)
    golden = {
        name: Local(world, shape, torch.randn(shape[1], columns, generator=compressor.generator(name)))
        for name, shape in WIDE.items()
        if len(shape) == 2
    }
    for step in range(2):
        given = [{n: g.to(gradient) for n, g in gradients(r, step, WIDE).items()} for r in range(world)]
        have = backward(model, given[rank])
        for name, model_of in golden.items():
            want = model_of.step([grads[name].double() for grads in given])
            off = (have[name].double() - want).norm() / want.norm()
            assert off < (1e-5 if dtype == gradient == torch.float32 else 0.02), (step, name, float(off))
        for other in everyones(have):
            assert all(torch.equal(other[name], have[name]) for name in WIDE), "replicas differ"


@pytest.mark.parametrize("columns", [70, 100, 130])  # parts of three ranks, two and one
def test_more_columns_than_the_kernels_take(pool4, columns):
    pool4.run(many_columns, torch.float32, torch.float32, columns)
    pool4.run(many_columns, torch.bfloat16, torch.bfloat16, columns)


ONE = {"matrix": (64, 80), "vector": (2000,)}


def sent(rank: int, world: int, dtype: torch.dtype) -> None:
    """A row to each other rank, and the ratio is that to a dense all-reduce."""
    compressor = compress.LocalPowerSGD(rank=4, factor_dtype=dtype)
    model = attach(compressor, net=Prescribed(ONE), **ONE_BUCKET)
    for step in range(2):
        backward(model, gradients(rank, step, ONE))
    words = {
        torch.float32: 4 * 64 + 4 * 80,
        torch.bfloat16: (4 * 64 + 4 * 80) // 2,
        torch.int8: 2 * (512 // 4 + 512 // 512),  # P and Q are rounded apart
    }[dtype]
    row = words + 2000
    stats = compressor.stats()
    assert stats["bytes_sent"] == (world - 1) * 4 * (row + 1)  # how many elements were dropped
    (group,) = compressor.groups.values()
    assert compressor.ratio(group) == pytest.approx(stats["dense_bytes"] / ((world - 1) * 4 * row), rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_bytes_are_a_row_to_each_other_rank(pool2, pool3, world, dtype):
    (pool2 if world == 2 else pool3).run(sent, dtype)


LONG_VECTOR = {"matrix": (64, 80), "vector": (20_000,)}


def too_many(rank: int, world: int, compresses: bool, options: dict) -> None:
    """Where gathering sends more than an all-reduce, the bucket stays dense; it goes on once it has begun."""
    compressor = compress.LocalPowerSGD(rank=4, **options)
    model = attach(compressor, net=Prescribed(LONG_VECTOR), **ONE_BUCKET)
    backward(model, gradients(rank, 0, LONG_VECTOR))
    stats = compressor.stats()
    assert (stats["error_norm"] > 0) == compresses
    assert compresses or stats["bytes_sent"] == pytest.approx(stats["dense_bytes"], rel=1e-3)


def test_a_bucket_that_gains_nothing_stays_dense(pool2, pool3):
    pool2.run(too_many, True, {})
    pool3.run(too_many, False, {})
    pool3.run(too_many, True, {"min_compression_ratio": 0.5})


def times(rank: int, world: int) -> int:
    compressor = compress.LocalPowerSGD(rank="4x", min_compression_ratio=0.5)
    backward(attach(compressor, net=Prescribed({"matrix": (96, 96)}), **ONE_BUCKET), {"matrix": torch.randn(96, 96)})
    return compressor.own_state()["factors"]["matrix"][1].shape[1]


def test_4x_counts_the_ranks(pool2, pool3, pool4):
    for pool, world in ((pool2, 2), (pool3, 3), (pool4, 4)):
        assert set(pool.run(times)) == {96 * 96 // (4 * 192 * world // 2)}


def without_a_gradient(rank: int, world: int) -> None:
    """A rank whose gradient was zero for some steps learns again: its own factors are of nobody else."""
    compressor = compress.LocalPowerSGD(rank=2)
    model = attach(compressor, net=Prescribed({"matrix": (60, 50)}), **ONE_BUCKET)
    lasting = torch.Generator().manual_seed(rank)
    signal = torch.randn(60, 2, generator=lasting) @ torch.randn(2, 50, generator=lasting)
    for step in range(8):
        backward(model, {"matrix": signal if step not in (1, 2) else torch.zeros(60, 50)})
    owed = compressor.state_dict()["errors"]["matrix"]
    assert owed.norm() < 0.02 * signal.norm(), float(owed.norm() / signal.norm())


def test_factors_recover_from_nothing(pool2):
    pool2.run(without_a_gradient)


def large(rank: int, world: int) -> None:
    """Means are finite where their sums would not be."""
    compressor = compress.LocalPowerSGD(rank=2)
    model = attach(compressor, net=Prescribed({"matrix": (60, 50), "vector": (100,)}), **ONE_BUCKET)
    have = backward(model, {"matrix": torch.full((60, 50), 2.0**89), "vector": torch.full((100,), 3e38)})
    torch.testing.assert_close(have["vector"], torch.full((100,), 3e38))
    torch.testing.assert_close(have["matrix"], torch.full((60, 50), 2.0**89), rtol=0.02, atol=0)


def test_no_mean_overflows(pool3):
    pool3.run(large)


def states(rank: int, world: int) -> dict:
    compressor = KINDS["local"]()
    model = attach(compressor)
    for step in range(3):
        backward(model, gradients(rank, step))
    state = compressor.state_dict()
    assert state["named"] == {} and state["own"]["factors"].keys() == {"first", "second", "wide", "convolution"}
    return state


def loaded(rank: int, world: int, saved: list[dict]) -> None:
    """At another world size factors start anew, also where there were some; error feedback goes on."""
    fresh, used = KINDS["local"](), KINDS["local"]()
    backward(attach(used), gradients(rank, 9))
    used.load_state_dict(saved)
    fresh.load_state_dict(saved)
    assert used.own_state() == fresh.own_state() == {"factors": {}}
    vars(used)["binding"] = None
    want, have = (backward(attach(one), gradients(rank, 3)) for one in (fresh, used))
    assert all(torch.equal(want[name], have[name]) for name in want)


def test_at_another_world_size_factors_start_anew(pool2, pool3):
    pool3.run(loaded, pool2.run(states))


NODES = {"matrix": (150, 200), "other": (20, 900)}


def grown_in_nodes(rank: int, world: int, resumes: bool) -> None:
    """Ranks of a node, of which one compresses a matrix and the other reads it, agree on what goes on."""
    compressor, balance = compress.LocalPowerSGD(rank=2), torch.zeros(20, 900, dtype=torch.float64)

    def begin() -> DDP:
        model = DDP(Prescribed(NODES), **ONE_BUCKET)
        compress.register(model, compressor, hierarchy=2)
        return model

    model = begin()
    for step in range(9):
        if step % 3 == 0:
            compressor.rank = 20 if step == 3 else 2  # of 20 rows: it would not be worth it
        if step == 4 and resumes:
            state = compressor.state_dict()
            compressor = compress.LocalPowerSGD(rank=20)
            compressor.load_state_dict(state)
            model = begin()
        have = backward(model, gradients(rank, step, NODES))
        for other in everyones(have):
            assert all(torch.equal(other[name], have[name]) for name in NODES), "replicas differ"
        balance += torch.stack([gradients(r, step, NODES)["other"] for r in range(world)]).double().mean(0)
        balance -= have["other"].double()
    assert compressor.feedback.begun == {"matrix", "other"}
    assert len(compressor.feedback.errors) == 1, "error feedback exists once in a node"
    owed = [state["errors"]["other"] for state in everyones(compressor.state_dict()) if "other" in state["errors"]]
    assert (balance.view(-1) - sum(error.double() for error in owed) / 2).abs().max() < 1e-4


@pytest.mark.parametrize("resumes", [False, True])
def test_places_agree_on_what_goes_on(pool4, resumes):
    pool4.run(grown_in_nodes, resumes)


def loses_less(rank: int, world: int) -> list[float]:
    """How far three compressors of equal bytes are from the mean: gradients of each rank and step have directions of
    their own."""
    common = torch.Generator().manual_seed(3)
    lasting = torch.randn(80, 4, generator=common) @ torch.randn(4, 60, generator=common)
    off = []
    for compressor in (compress.LocalPowerSGD(rank=4), compress.PowerSGD(rank=4), compress.ACPSGD(rank=8)):
        model = attach(compressor, net=Prescribed({"matrix": (80, 60)}), **ONE_BUCKET)
        total = 0.0
        for step in range(12):
            own = torch.Generator().manual_seed(100 * step + rank)
            new = torch.randn(80, 2, generator=own) @ torch.randn(2, 60, generator=own)
            compressor.measure()
            backward(model, {"matrix": 0.3 * lasting + new})
            total += compressor.stats()["vnmse"]
        off.append(total)
    return off


def test_equal_bytes_say_more_of_what_this_step_brings(pool2):
    local, power, acp = pool2.run(loses_less)[0]
    assert local < power < acp, (local, power, acp)
