"""Ranks that follow the matrix, parameters that are exempt, and what is chosen by name."""

import math

import pytest
import torch
from compressing import KINDS, SHAPES, Prescribed, attach, backward, gradients, kept
from place import place
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear

LOW_RANK = {"acp": compress.ACPSGD, "power": compress.PowerSGD, "local": compress.LocalPowerSGD}
each_low_rank = pytest.mark.parametrize("kind", LOW_RANK)


def ranks_of(compressor: compress.Compressor) -> dict[str, int]:
    """By name, the rank under which each parameter is compressed."""
    return {name: q.shape[1] for name, (_, q) in factors_of(compressor).items()}


def factors_of(compressor: compress.Compressor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By name; every rank's, or this rank's own."""
    return compressor.named_state() or compressor.own_state()["factors"]


def after_a_step(compressor: compress.Compressor, rank: int, steps: int = 1, **ddp: object) -> dict[str, torch.Tensor]:
    model = attach(compressor, **ddp)
    for step in range(steps):
        have = backward(model, gradients(rank, step))
    return have


def ranks_follow(rank: int, world: int, kind: str) -> None:
    smaller = {"first": 50, "second": 50, "wide": 20, "convolution": 32}
    for given, fraction in ((0.1, 0.1), ("auto", LOW_RANK[kind].auto)):
        compressor = LOW_RANK[kind](rank=given, min_compression_ratio=0.5)
        after_a_step(compressor, rank)
        assert ranks_of(compressor) == {name: max(1, round(fraction * size)) for name, size in smaller.items()}
    fewer = LOW_RANK[kind](rank="4x", min_compression_ratio=0.5)
    after_a_step(fewer, rank)
    for p, q in factors_of(fewer).values():  # one more column would be too many; the two sides count alike
        numel, each = p.shape[0] * q.shape[0], fewer.cost(p.shape[0], q.shape[0], 1)
        assert 4 * q.shape[1] * each <= numel < 4 * (q.shape[1] + 1) * each
    chosen = LOW_RANK[kind](rank=4, rank_of={"first": 7, "*on*": 0.5, "second": 9}, min_compression_ratio=0.5)
    after_a_step(chosen, rank)  # of several patterns that match, the first counts
    assert ranks_of(chosen) == {"first": 7, "second": 25, "wide": 4, "convolution": 16}
    called = LOW_RANK[kind](rank=2, rank_of=lambda name, param: 5 if param.dim() == 4 else None)
    after_a_step(called, rank)
    assert ranks_of(called) == {"first": 2, "second": 2, "wide": 2, "convolution": 5}


@each_low_rank
def test_ranks_follow_the_matrix_and_the_name(pool2, kind):
    pool2.run(ranks_follow, kind)


def exempt_is_exact(rank: int, world: int, kind: str, exempt: object, named: bool) -> None:
    """What is exempt is the mean, nothing else is changed of what is kept, and the state goes on bit for bit."""
    compressor = KINDS[kind](exempt=exempt)
    model = attach(compressor, named)
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    spared = ("second", "bias") if named else ("second", "first")  # names without a model are by order and shape
    for step in range(4):
        have = backward(model, gradients(rank, step))
        mean = {name: torch.stack([gradients(r, step)[name] for r in range(world)]).mean(0) for name in SHAPES}
        for name in spared:
            torch.testing.assert_close(have[name], mean[name], rtol=1e-6, atol=1e-6)
        for name in SHAPES:
            total[name] += world * (mean[name].double() - have[name].double())
    errors = kept(compressor)
    assert not any("second" in name or "300, 50" in name for name in errors), list(errors)
    if named:
        assert {"first", "wide"} <= errors.keys()
        for name, error in errors.items():
            assert (total[name].flatten() - error).abs().max() < 1e-3, name
    again = KINDS[kind](exempt=exempt)
    again.load_state_dict(compressor.state_dict(gather=True))
    resumed = attach(again, named)
    for step in range(4, 6):
        want, have = backward(model, gradients(rank, step)), backward(resumed, gradients(rank, step))
        assert all(torch.equal(want[name], have[name]) for name in SHAPES)


def second_and_bias(name: str, param: torch.Tensor) -> bool:
    return name in ("second", "bias")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exempt", [["sec*", "bias"], second_and_bias], ids=["names", "predicate"])
def test_exempt_parameters_are_exact(pool2, kind, exempt):
    pool2.run(exempt_is_exact, kind, exempt, True)


def matrices_of_fifty(name: str, param: torch.Tensor) -> bool:
    return param.shape == (300, 50)


@pytest.mark.parametrize("kind", ["acp", "topk"])
def test_a_predicate_needs_no_names(pool2, kind):
    pool2.run(exempt_is_exact, kind, matrices_of_fifty, False)


def under_the_schedule(rank: int, world: int, kind: str) -> None:
    """Under the schedule the exempt parameters take the exact step."""
    model = DDP(Prescribed().to(place()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = dear.attach(model, optimizer, compressor=KINDS[kind](exempt=("second", "bias")))
    for step in range(3):
        model({name: grad.to(place()) for name, grad in gradients(rank, step).items()}).backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()
    for name, param in model.module.named_parameters():
        exact = -sum(torch.stack([gradients(r, s)[name] for r in range(world)]).mean(0) for s in range(3))
        sent_exactly = name in ("second", "bias") or (kind == "acp" and exact.dim() < 2)
        assert torch.allclose(param.cpu(), exact, atol=1e-5) == sent_exactly, name


@pytest.mark.parametrize("kind", ["acp", "topk"])
def test_exempt_under_the_schedule(pool2, kind):
    pool2.run(under_the_schedule, kind)


def refused(rank: int, world: int) -> None:
    for wrong, named in ((compress.TopK(exempt=["first", "head.*"]), "exempt names 'head.*'"),
                         (compress.ACPSGD(rank_of={"frist": 2}), "rank_of names 'frist'")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{named.replace('*', '.')}.*matches no parameter"):
            attach(wrong)
        assert wrong.binding is None
    with pytest.raises(ValueError, match="exempt names 'second', which matches no parameter"):
        backward(attach(compress.TopK(exempt="second"), named=False), gradients(rank, 0))  # "parameter 2 [300, 50]"
    with pytest.raises(ValueError, match="disagree on the exempt parameters of a bucket"):
        backward(attach(compress.TopK(exempt=lambda name, _: name == "wide" and rank == 1)), gradients(rank, 0))
    compressor = compress.TopK(exempt="wide")
    after_a_step(compressor, rank)
    other = compress.TopK()
    other.load_state_dict(compressor.state_dict(gather=True))
    with pytest.raises(ValueError, match="has wide exempt: give exempt="):
        attach(other)


def test_what_fits_no_model_is_refused_on_every_rank(pool2):
    pool2.run(refused)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: compress.PowerSGD(rank=1.0), "rank must be a whole number"),
        (lambda: compress.PowerSGD(rank=True), "rank must be a whole number"),
        (lambda: compress.PowerSGD(rank="most"), "rank must be a whole number"),
        (lambda: compress.PowerSGD(rank="1x"), "how many times fewer elements are sent"),
        (lambda: compress.ACPSGD(rank="x"), "rank must be a whole number"),
        (lambda: compress.PowerSGD(rank=[]), "rank must be a value or a list"),
        (lambda: compress.PowerSGD(rank=[(5, 4)]), "rank must name rising steps and begin with step 0"),
        (lambda: compress.PowerSGD(rank=[(0, 4), (0, 5)]), "rank must name rising steps"),
        (lambda: compress.PowerSGD(rank=[(0, 4), (9, 0)]), "rank must be a whole number"),
        (lambda: compress.ACPSGD(rank_of={"a": 0}), "rank_of must be a whole number"),
        (lambda: compress.ACPSGD(rank_of=3), "rank_of must map names"),
        (lambda: compress.TopK(density=[(0, 0.1), (10, math.nan)]), "density must be in"),
        (lambda: compress.TopK(density="all"), "density must be in"),
        (lambda: compress.SignSGD(exempt=3), "exempt must be names"),
        (lambda: compress.SignSGD(exempt=[""]), "exempt must be names"),
        (lambda: compress.SignSGD(start_step="never"), "start_step must be"),
        (lambda: compress.SignSGD(start_step=-1), "start_step must be"),
        (lambda: compress.SignSGD(start_step=1.5), "start_step must be"),
        (lambda: compress.SignSGD(start_step=True), "start_step must be"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def presets(rank: int, world: int) -> None:
    """Bytes of a large matrix are what the preset says, against 16 bits; options of one's own count."""
    shapes = {"square": (256, 256), "wide": (128, 512)}
    dense = 2 * (world - 1) * 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) // world
    for name, fewer, options in (
        ("exact", 0.99, {}), ("safe", 1.9, {}), ("safe", 4.9, {"start_step": 0}), ("fast", 14.9, {"start_step": 0}),
    ):  # fmt: skip
        compressor = compress.preset(name, **options)
        model = attach(compressor, net=Prescribed(shapes))
        backward(model, gradients(rank, 0, shapes))
        sent = compressor.stats()["bytes_sent"]
        assert sent * fewer < dense, (name, sent, dense)
    spared = compress.preset("fast", exempt="square", rank=3, start_step=0)
    backward(attach(spared, net=Prescribed(shapes)), gradients(rank, 0, shapes))
    assert ranks_of(spared) == {"wide": 3}


def test_what_the_safe_preset_begins_with():
    assert compress.preset("safe").start_step == 1000 and compress.preset("safe").start_dtype == torch.int8
    assert compress.preset("safe", start_step="warmup").start_dtype == torch.int8
    assert compress.preset("safe", start_step=0).start_dtype is None


def test_what_the_fast_preset_begins_with():
    for start, steps in ((None, 1000), (150, 150)):
        given = {} if start is None else {"start_step": start}
        fast = compress.preset("fast", **given)
        assert fast.rank == [(0, "2x"), (steps, "8x")] and fast.start_step == 20
    assert compress.preset("fast", start_step=0).rank == "8x" and compress.preset("fast", start_step=5).start_step == 5
    warmed = compress.preset("fast", start_step="warmup")
    assert warmed.rank == "8x" and warmed.start_step == "warmup"
    own = compress.preset("fast", rank=4, start_step=20)
    assert own.rank == 4 and own.start_step == 20


def test_presets_send_as_few_bytes_as_they_say(pool2):
    pool2.run(presets)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r'preset must be one of "exact", "safe", "fast", not .best.'):
        compress.preset("best")
