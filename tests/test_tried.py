"""Methods that were tried for their loss: what each makes of matrices that a test prescribes."""

import pytest
import torch
import torch.distributed as dist
from compressing import Prescribed
from torch.nn.parallel import DistributedDataParallel as DDP

from benchmarks.training.strategies import StrategyError, Tried, parse_strategy
from benchmarks.tried.hook import Hook, answered
from benchmarks.tried.messages import Answer, Message
from benchmarks.tried.method import orthonormal
from benchmarks.tried.naming import METHODS, Name
from benchmarks.tried.rounding import ON_THE_WIRE, rounded

ROWS, COLUMNS, RANK = 24, 40, 4
SHAPES = {"wide": (ROWS, COLUMNS), "tall": (60, 20), "convolution": (16, 4, 3, 3), "bias": (5,)}


def gradients(step, rank):
    seeded = torch.Generator().manual_seed(10 * step + rank)
    return {name: torch.randn(shape, generator=seeded) for name, shape in SHAPES.items()}


def mean_of(gradients_of_ranks):
    return {name: sum(one[name] for one in gradients_of_ranks) / len(gradients_of_ranks) for name in SHAPES}


def alone(method, matrices):
    """What one rank alone makes of these matrices, each with the error of the last ones; and the errors."""
    error, results, errors = torch.zeros(ROWS, COLUMNS), [], []
    for matrix in matrices:
        steps = method.exchange(matrix + error)
        message = next(steps)
        while True:
            try:
                answer = rounded(message.values, message.bits)
                message = steps.send(Answer(answer, answer))
            except StopIteration as end:
                result, own = end.value
                break
        error = matrix + error - own
        results.append(result)
        errors.append(error)
    return results, errors


def made(kind, rank=RANK, world=2, **options):
    method = METHODS[kind]
    return method(ROWS, COLUMNS, rank, world, method.choices(**options))


def matrix_of_rank(rank, seed=5):
    seeded = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, rank, generator=seeded) @ torch.randn(rank, COLUMNS, generator=seeded)


def matrix_with_singular_values(values):
    seeded = torch.Generator().manual_seed(6)
    left, right = (orthonormal(torch.randn(side, ROWS, generator=seeded)) for side in (ROWS, COLUMNS))
    return left @ values.diag() @ right.T


def trained(rank, world, words, steps):
    """The gradients that the hook leaves, by step, and the bytes that it says it sent."""
    net = Prescribed(SHAPES)
    model = DDP(net, bucket_cap_mb=4096)
    hook = Hook(Name.read(words.split(":")), dist.group.WORLD)
    model.register_comm_hook(hook, Hook.of_bucket)
    found = []
    for step in range(steps):
        model.zero_grad()
        model(gradients(step, rank)).backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters()})
    return found, hook.stats()["bytes_sent"]


def sums(rank, world, bits):
    values = torch.randn(3, 100, generator=torch.Generator().manual_seed(rank))
    (answer,) = answered([Message(values, bits)], dist.group.WORLD)
    return values, answer.result, answer.own


# --- one matrix ---


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_not_sent_is_sent_later(kind):
    matrices = [matrix_of_rank(12, seed) for seed in range(30)]
    method = made(kind)
    results, errors = alone(method, matrices)
    left = errors[-1] + getattr(method, "owners_error", 0)
    torch.testing.assert_close(sum(results) + left, sum(matrices), rtol=1e-3, atol=1e-3)
    assert errors[-1].norm() > 0.1  # there was something to lose


@pytest.mark.parametrize("kind", ["power", "nystrom"])
def test_a_matrix_of_that_rank_is_exact_at_once(kind):
    """The others send in a basis from the step before alone."""
    matrix = matrix_of_rank(RANK)
    (result,), _ = alone(made(kind), [matrix])
    torch.testing.assert_close(result, matrix, rtol=1e-3, atol=1e-3)


def test_power_sgd_is_the_published_algorithm():
    matrices = [matrix_of_rank(12, seed) for seed in range(4)]
    method = made("power")
    q, error = method.right.double(), torch.zeros(ROWS, COLUMNS).double()
    results, _ = alone(method, matrices)
    for matrix, result in zip(matrices, results, strict=True):
        corrected = matrix.double() + error
        p = orthonormal(corrected @ q)
        q = corrected.T @ p
        error = corrected - p @ q.T
        torch.testing.assert_close(result.double(), p @ q.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "rank", "least", "most"),
    [
        ("power", 4, 0.8, 1),
        ("local", 4, 0.8, 1),
        ("owner", 4, 0.8, 1),
        ("acp", 8, 0, 0.4),
        ("sketch", 4, 0, 0.4),
        ("average", 4, 0, 0.6),
    ],
)
def test_a_basis_older_than_the_step_misses_what_the_step_brings(kind, rank, least, most):
    """Why one message loses more: the argument on the page about compression."""
    lasting = matrix_with_singular_values(torch.tensor([0.7**power for power in range(ROWS)]))
    method = made(kind, rank)
    for _ in range(10):
        method.learn(lasting)
    new = [3 * lasting.norm() * one / one.norm() for one in (matrix_of_rank(1, seed) for seed in range(40))]
    results, _ = alone(method, [lasting + one for one in new])
    shares = [float((result * one).sum() / one.norm() ** 2) for result, one in zip(results, new, strict=True)]
    assert least < sum(shares) / len(shares) < most


def test_what_all_gather_has_fewer_columns_where_more_gather():
    assert [made("local", 8, world).right.shape[1] for world in (2, 4, 16, 64)] == [8, 4, 1, 1]
    assert made("owner", 8, 64).right.shape[1] == 8


def test_pairs_of_factors_take_turns():
    method = made("acp", pairs=2)
    alone(method, [matrix_of_rank(12)] * 2)
    first, second = method.bases
    alone(method, [matrix_of_rank(12)] * 2)
    assert torch.equal(method.bases[0], first) and not torch.equal(method.bases[1], second)


def test_a_basis_of_results_finds_what_lasts():
    matrix = matrix_of_rank(2)
    results, _ = alone(made("average"), [matrix] * 200)
    late = sum(results[-50:]) / 50
    assert (late - matrix).norm() < 0.1 * matrix.norm()


@pytest.mark.parametrize("kind", METHODS)
def test_dense_steps_teach_a_method_what_matters(kind):
    matrix = matrix_of_rank(RANK)
    method = made(kind)
    for _ in range(8):
        method.learn(matrix)
    (result,), _ = alone(method, [matrix])
    if kind == "average":  # a quarter of its columns search
        assert (result - matrix).norm() < 0.1 * matrix.norm()
    else:
        torch.testing.assert_close(result, matrix, rtol=1e-2, atol=1e-2)


# --- few bits ---


@pytest.mark.parametrize("bits", ON_THE_WIRE)
def test_answers_are_rounded_at_both_ends_and_nothing_is_lost(pool2, bits):
    (first, result, own), (second, same, other) = pool2.run(sums, bits)
    assert torch.equal(result, same)
    torch.testing.assert_close((own + other) / 2, result)
    off = (result - (first + second) / 2).norm() / result.norm()
    assert off < {32: 1e-6, 16: 0.01, 8: 0.02, 4: 0.2, 3: 0.4, 2: 0.8}[bits]
    assert off > {32: -1, 16: 1e-4, 8: 1e-3, 4: 0.02, 3: 0.05, 2: 0.1}[bits]


@pytest.mark.parametrize("unit", ["", "column", "element"])
def test_factors_in_few_bits_leave_the_rest_for_later(unit):
    matrices = [matrix_of_rank(12, seed) for seed in range(30)]
    results, errors = alone(made("power", p=8, q=4, lead=0.5, unit=unit), matrices)
    torch.testing.assert_close(sum(results) + errors[-1], sum(matrices), rtol=1e-3, atol=1e-3)
    exact, _ = alone(made("power"), matrices)
    assert not torch.equal(results[0], exact[0])


def test_bits_are_counted():
    power = METHODS["power"]
    assert power.bits(ROWS, COLUMNS, RANK, power.choices()) == 32 * RANK * (ROWS + COLUMNS)
    options = power.choices(p=8, q=4, lead=0.25)
    eight, four = ON_THE_WIRE[8], ON_THE_WIRE[4]
    assert power.bits(ROWS, COLUMNS, RANK, options) == ROWS * 4 * eight + COLUMNS * (1 * eight + 3 * four)
    for kind in ("acp", "sketch", "average"):
        own = METHODS[kind].bits(ROWS, COLUMNS, RANK, METHODS[kind].choices())
        assert own == 32 * RANK * (ROWS + COLUMNS) / (2 if kind == "acp" else 1)


# --- under DDP ---


def test_dense_steps_are_exact_and_vectors_always(pool2):
    (first, sent), (second, _) = pool2.run(trained, "power:2:start=2", 4)
    for step in range(4):
        mean = mean_of([gradients(step, rank) for rank in range(2)])
        for name, gradient in first[step].items():
            assert torch.equal(gradient, second[step][name])
            exact = torch.allclose(gradient, mean[name], atol=1e-6)
            assert exact == (step < 2 or name == "bias"), (step, name)
    ranks = (ROWS + COLUMNS) + (60 + 20) + (16 + 36)
    assert sent == int(32 * (2 * ranks + 5) / 8)  # 2 (P-1)/P is 1


@pytest.mark.parametrize("start", [0, 3])
def test_a_momentum_in_place_of_the_gradient_makes_the_momentum_of_the_result(pool2, start):
    (found, _), _ = pool2.run(trained, f"power:2:momentum=0.9:start={start}", 5)
    momentum = sum(0.9 ** (4 - step) * found[step]["wide"] for step in range(5))
    assert torch.linalg.matrix_rank(momentum, rtol=1e-3) == 2  # what was sent last, and nothing else
    (plain, _), _ = pool2.run(trained, f"power:2:start={start}", 5)
    assert torch.allclose(found[0]["wide"], plain[0]["wide"]) and not torch.allclose(found[4]["wide"], plain[4]["wide"])


def test_a_matrix_that_would_not_shrink_is_sent_as_it_is(pool2):
    (found, _), _ = pool2.run(trained, "power:6", 1)
    mean = mean_of([gradients(0, rank) for rank in range(2)])
    assert torch.allclose(found[0]["convolution"], mean["convolution"], atol=1e-6)  # 52 x 6 x 2 > 576
    assert not torch.allclose(found[0]["wide"], mean["wide"], atol=1e-3)


def test_methods_are_strategies():
    found = parse_strategy("tried:power:0.125:q=4:start=150:vectors=16")
    assert isinstance(found, Tried) and (found.method.start, found.method.vectors) == (150, 16)
    assert found.method.options.q == 4 and found.method.rank_of(64, 256) == 8
    assert parse_strategy("tried:acp:8").method.rank_of(4, 100) == 4


@pytest.mark.parametrize(
    "name",
    ["tried", "tried:power", "tried:cubes:4", "tried:power:0", "tried:power:x", "tried:power:4:q=5", "tried:acp:4:q=8",
     "tried:power:4:unit=row", "tried:power:4:start=-1", "tried:acp:4:momentum=1", "tried:power:4:vectors=7",
     "tried:power:4:lead"],
)  # fmt: skip
def test_other_names_are_refused(name):
    with pytest.raises(StrategyError, match=r"is not known: the forms are .*tried:power"):
        parse_strategy(name)
