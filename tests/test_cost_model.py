"""The cost model: fits find the lines that points came from, and formulas agree with what was published.

The published numbers are of 32 GPUs, by the authors of DeAR and MG-WFBP: all-reduce fits, and samples per second.
"""

import random

import pytest

from dear import cost_model
from dear.cost_model import AlphaBeta, Exchange, Workload, fit, step_seconds

# t = alpha + beta bytes of an all-reduce, by workers.
TEN_GBE = {8: (5.23e-4, 8.57e-10), 16: (9.08e-4, 7.40e-10), 32: (4.04e-3, 8.64e-10), 64: (7.04e-3, 9.64e-10)}
INFINIBAND = {8: (9.75e-5, 3.06e-10), 16: (7.08e-4, 4.06e-10), 32: (4.06e-4, 4.91e-10), 64: (8.06e-4, 5.89e-10)}
PUBLISHED = [AlphaBeta(*pair) for lines in (TEN_GBE, INFINIBAND) for pair in lines.values()]
SIZES = [2.0**power for power in range(12, 28)]


@pytest.mark.parametrize("line", PUBLISHED, ids=str)
def test_a_fit_finds_the_line_the_points_came_from(line: AlphaBeta) -> None:
    found = fit(SIZES, [line.seconds(size) for size in SIZES])
    assert found.alpha == pytest.approx(line.alpha, rel=1e-6) and found.beta == pytest.approx(line.beta, rel=1e-6)


@pytest.mark.parametrize("line", PUBLISHED, ids=str)
def test_a_fit_withstands_noise_and_outliers(line: AlphaBeta) -> None:
    noise = random.Random(1)
    times = [line.seconds(size) * noise.uniform(0.98, 1.02) for size in SIZES]
    for outlier in (2, 5, 9, 12):
        times[outlier] *= 2
    times[7] /= 3
    found = fit(SIZES, times)
    assert found.alpha == pytest.approx(line.alpha, rel=0.05) and found.beta == pytest.approx(line.beta, rel=0.05)


def test_a_fit_has_no_negative_part() -> None:
    through_origin = fit([1000, 2000, 4000], [0.9, 2.0, 4.3])
    assert through_origin.alpha == 0 and through_origin.beta == pytest.approx(1e-3, rel=0.1)
    flat = fit([1000, 2000, 4000], [3.0, 2.9, 2.8])
    assert flat.beta == 0 and flat.alpha == pytest.approx(2.9, rel=0.05)
    with pytest.raises(ValueError, match="two sizes"):
        fit([1000, 1000], [1.0, 2.0])
    with pytest.raises(ValueError, match="above 0"):
        fit([1000, 2000], [0.0, 2.0])


def test_collectives_by_hand() -> None:
    """Four workers, a line of 1 s and 2 s per byte, 8 bytes: a ring passes 3 pieces of 2 bytes each way."""
    link = AlphaBeta(1, 2)
    assert cost_model.reduce_scatter(link, 4, 8) == cost_model.all_gather(link, 4, 8) == 3 * (1 + 2 * 2)
    assert cost_model.all_reduce(link, 4, 8) == 2 * 3 * 1 + 2 * 3 / 4 * 8 * 2
    assert cost_model.sign_all_gather(link, 4, 64) == 3 * (1 + 2 * 2)
    assert cost_model.sign_two_phases(link, 4, 64) == cost_model.all_reduce(link, 4, 2)
    assert cost_model.top_k_all_gather(link, 4, 100, 0.01) == 3 * (1 + 2 * 2)
    assert cost_model.top_k_two_phases(link, 4, 100, 0.01) == cost_model.all_reduce(link, 4, 2)
    assert cost_model.power_sgd(link, 4, 8, 16) == 4 * 3 * 1 + 2 * 3 / 4 * (8 + 16) * 2
    assert cost_model.acp_sgd(link, 4, 8, 8) == 2 * 3 * 1 + 2 * 3 / 4 * 8 * 2


def test_gathering_signs_from_everybody_scales_worse_than_two_phases() -> None:
    link, bytes_ = AlphaBeta(1e-5, 8e-10), 1e8
    several = [cost_model.sign_all_gather(link, workers, bytes_) for workers in (4, 32, 128)]
    assert several[2] > cost_model.all_reduce(link, 128, bytes_) > cost_model.sign_two_phases(link, 128, bytes_)
    assert several[0] < several[1] < several[2]


def test_steps_by_hand() -> None:
    """Two buckets of 2 s of backward each. The exchange of the first fits under the second's backward."""
    workload = Workload(forward=2, backward=4, buckets=(10, 10))
    assert step_seconds(workload, Exchange(AlphaBeta(1, 0.1))) == 2 + 4 + 2
    assert step_seconds(workload, Exchange(AlphaBeta(1, 0.4))) == 2 + 2 + 5 + 5  # the link is the bottleneck
    # DeAR, halves of 1 s: the last reduce-scatter ends at 5, the first gather at 6, and the second under a forward.
    assert step_seconds(workload, Exchange(AlphaBeta(0, 0.1), AlphaBeta(0, 0.1))) == 4 + 1 + 1 + 2
    # Halves of 4 s: scatters end at 2 + 8, gathers at 14 and 18, and half of the forward pass is left.
    assert step_seconds(workload, Exchange(AlphaBeta(0, 0.4), AlphaBeta(0, 0.4))) == 2 + 8 + 8 + 1
    # Unequal buckets: scattered at 2 and 7; the one delivered last is gathered first, at 13, and the other at 15.
    unequal = Workload(forward=4, backward=4, buckets=(10, 30))
    assert step_seconds(unequal, Exchange(AlphaBeta(0, 0.1), AlphaBeta(0, 0.2))) == pytest.approx(13 + 3 + 1)


def test_decoupling_gains_at_most_a_quarter_over_perfect_overlap() -> None:
    """With t_b = 2 t_f and free start-up: 1.25 where an all-reduce takes 2 t_b, and nothing where it is free."""
    gains = []
    for exchange in (0.001, 1.0, 2.0, 4.0, 8.0):
        workload = Workload(1, 2, (1.0,) * 1000)
        whole, half = AlphaBeta(0, exchange / 1000), AlphaBeta(0, exchange / 2000)
        gains.append(step_seconds(workload, Exchange(whole)) / step_seconds(workload, Exchange(half, half)))
    assert max(gains) == gains[3] == pytest.approx(1.25, rel=0.01)
    assert gains[0] == pytest.approx(1, rel=0.01) and all(gain >= 0.999 for gain in gains)


def test_fused_keeps_the_bytes() -> None:
    workload = Workload(1, 2, (3.0, 4.0, 5.0))
    assert workload.fused(5).buckets == (5, 5, 2) and workload.fused(4).buckets == (4, 4, 4)
    assert workload.fused(100).buckets == (12,)
    with pytest.raises(ValueError, match="more than 0 bytes"):
        Workload(1, 2, ())


# samples per second on one GPU, batch, bytes, tensors; measured on 32 GPUs with every tensor by itself and merged
MODELS = {
    "ResNet-50": (253.1, 64, 25.6e6 * 4, 161, {"10GbE": (5113, 6884)}),
    "BERT-Base": (212.8, 64, 110e6 * 4, 206, {"10GbE": (2013, 1926)}),
}


@pytest.mark.parametrize("model", MODELS)
def test_predictions_for_32_gpus_are_in_the_published_order(model: str) -> None:
    rate, batch, bytes_, tensors, published = MODELS[model]
    seconds = batch / rate
    workload = Workload(seconds / 3, 2 * seconds / 3, (bytes_ / tensors,) * tensors)

    def samples(line: AlphaBeta, cap: float | None, decoupled: bool = False) -> float:
        half = AlphaBeta(line.alpha / 2, line.beta / 2)
        exchange = Exchange(half, half) if decoupled else Exchange(line)
        return 32 * batch / step_seconds(workload.fused(cap) if cap else workload, exchange)

    slow, fast = AlphaBeta(*TEN_GBE[32]), AlphaBeta(*INFINIBAND[32])
    single, fused, quick = samples(slow, None), samples(slow, 25e6), samples(fast, 25e6)
    assert single < fused < quick < 32 * rate
    assert samples(slow, 25e6, decoupled=True) > fused
    # What was measured lies between the predictions for single tensors, one after another, and for no network at all.
    assert single < max(published["10GbE"]) < 32 * rate
