"""How long exchanges and training steps should take: predictions, where measuring is not possible.

A line carries one message of n bytes in ``alpha + beta n`` seconds. From a line, the number of workers P and the bytes
N of a gradient follow the times of collectives ("alpha-beta model", Hockney 1994; for the ring: Patarasu and Yuan,
"Bandwidth optimal all-reduce algorithms", 2009; Thakur, Rabenseifner and Gropp, "Optimization of collective
communication operations in MPICH", 2005). A measured collective is fitted by a line of its own (:func:`fit`), which
then stands for all P workers together. From such lines follow step times (:func:`step_seconds`). ``python -m dear
plan`` simulates steps instead, with more of what a step is made of, and is tested against these formulas.

What the model leaves out: computing that is slowed down by communication, several exchanges at once, stragglers.
Whatever comes from here is predicted, and must be called so wherever it is shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AlphaBeta:
    """A time that grows with the bytes: ``alpha`` seconds and ``beta`` seconds per byte."""

    alpha: float
    beta: float

    def seconds(self, bytes_: float) -> float:
        return self.alpha + self.beta * bytes_


def fit(sizes: Sequence[float], seconds: Sequence[float], rounds: int = 20) -> AlphaBeta:
    """The line through measured times that errs least, relative to the times and robustly against outliers.

    Iteratively reweighted least squares with Huber's weights (Huber, "Robust estimation of a location parameter",
    1964) on relative residuals, since sizes span orders of magnitude. Neither alpha nor beta becomes negative.

    Args:
        sizes: bytes, of two sizes at least.
        seconds: the time at each, above 0.
        rounds: of reweighting.

    Raises:
        ValueError: fewer than two sizes, or a time that is not positive.
    """
    if len(sizes) != len(seconds) or len(set(sizes)) < 2:
        raise ValueError(f"A line needs times at two sizes or more, and got {len(set(sizes))}: measure more sizes.")
    if min(seconds) <= 0:
        raise ValueError(f"A time of {min(seconds)} s was given: times must be above 0.")
    weights = [1 / t**2 for t in seconds]
    line = _weighted_line(sizes, seconds, weights)
    for _ in range(rounds):
        errors = [abs(line.seconds(n) - t) / t for n, t in zip(sizes, seconds, strict=True)]
        # Huber's constant, in standard deviations; what is within 1% is no outlier, however well the others agree.
        tolerance = max(0.01, 1.345 * 1.4826 * statistics.median(errors))
        trust = [1.0 if error <= tolerance else tolerance / error for error in errors]
        line = _weighted_line(sizes, seconds, [w * each for w, each in zip(weights, trust, strict=True)])
    return line


def _weighted_line(sizes: Sequence[float], seconds: Sequence[float], weights: Sequence[float]) -> AlphaBeta:
    total = sum(weights)
    x = sum(w * n for w, n in zip(weights, sizes, strict=True)) / total
    y = sum(w * t for w, t in zip(weights, seconds, strict=True)) / total
    spread = sum(w * (n - x) ** 2 for w, n in zip(weights, sizes, strict=True))
    joint = sum(w * (n - x) * (t - y) for w, n, t in zip(weights, sizes, seconds, strict=True))
    beta = joint / spread if spread else 0.0
    if beta < 0:
        return AlphaBeta(y, 0.0)
    if y < beta * x:  # a line through the origin, then
        squares = sum(w * n * n for w, n in zip(weights, sizes, strict=True))
        return AlphaBeta(0.0, sum(w * n * t for w, n, t in zip(weights, sizes, seconds, strict=True)) / squares)
    return AlphaBeta(y - beta * x, beta)


# --------------------------------------------------------------------- collectives, from the line between two workers


def reduce_scatter(link: AlphaBeta, workers: int, bytes_: float) -> float:
    """Ring: (P-1) alpha + (P-1)/P N beta."""
    return (workers - 1) * (link.alpha + bytes_ / workers * link.beta)


def all_gather(link: AlphaBeta, workers: int, bytes_: float) -> float:
    """Ring, of N bytes in the end: the same as :func:`reduce_scatter`."""
    return reduce_scatter(link, workers, bytes_)


def all_reduce(link: AlphaBeta, workers: int, bytes_: float) -> float:
    """Ring: both halves, 2 (P-1) alpha + 2 (P-1)/P N beta."""
    return reduce_scatter(link, workers, bytes_) + all_gather(link, workers, bytes_)


def sign_all_gather(link: AlphaBeta, workers: int, bytes_: float) -> float:
    """One bit for each of N/4 float32 elements, gathered from everybody: (P-1)(alpha + N/32 beta).

    Source: signSGD with majority vote as ACP-SGD's authors model it (Zhang et al., "Evaluation and optimization of
    gradient compression for distributed deep learning", 2023).
    """
    return (workers - 1) * link.seconds(bytes_ / 32)


def sign_two_phases(link: AlphaBeta, workers: int, bytes_: float) -> float:
    """The same by way of owners, all-to-all and then all-gather: 2 (P-1) alpha + 2 (P-1)/P N/32 beta."""
    return all_reduce(link, workers, bytes_ / 32)


def top_k_all_gather(link: AlphaBeta, workers: int, bytes_: float, density: float) -> float:
    """A share ``density`` of the elements, with an index as wide as a value each: (P-1)(alpha + 2 d N beta)."""
    return (workers - 1) * link.seconds(2 * density * bytes_)


def top_k_two_phases(link: AlphaBeta, workers: int, bytes_: float, density: float) -> float:
    """The same by way of owners: 2 (P-1) alpha + 2 (P-1)/P 2 d N beta."""
    return all_reduce(link, workers, 2 * density * bytes_)


def power_sgd(link: AlphaBeta, workers: int, bytes_p: float, bytes_q: float) -> float:
    """Both factors, one after the other: 4 (P-1) alpha + 2 (P-1)/P (N_P + N_Q) beta (Vogels et al., 2019)."""
    return all_reduce(link, workers, bytes_p) + all_reduce(link, workers, bytes_q)


def acp_sgd(link: AlphaBeta, workers: int, bytes_p: float, bytes_q: float) -> float:
    """One factor a step, in turn: on average 2 (P-1) alpha + 2 (P-1)/P (N_P + N_Q)/2 beta (Zhang et al., 2023)."""
    return power_sgd(link, workers, bytes_p, bytes_q) / 2


# ------------------------------------------------------------------------------------------------- training steps


@dataclass(frozen=True)
class Workload:
    """A model's step on one worker by itself.

    forward, backward: seconds. buckets: bytes of the fusion groups, in the order in which backward delivers them.
    Computing is taken to be spread over the bytes evenly.
    """

    forward: float
    backward: float
    buckets: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.buckets or min(self.buckets) <= 0:
            raise ValueError(f"A workload needs buckets of more than 0 bytes, and got {self.buckets}.")

    @property
    def bytes(self) -> float:
        return sum(self.buckets)

    def fused(self, cap: float) -> Workload:
        """The same gradients in buckets of ``cap`` bytes; the last one delivered is as small as it comes out."""
        whole, rest = divmod(self.bytes, cap)
        return Workload(self.forward, self.backward, (cap,) * int(whole) + ((rest,) if rest else ()))


@dataclass(frozen=True)
class Exchange:
    """What one bucket costs, as lines over the bytes of its gradient; compression and decompression are part of it.

    first: what may run under backward: a whole all-reduce, or a reduce-scatter. second: what may wait for the next
    forward pass: an all-gather (DeAR); None where ``first`` is everything (DDP).
    """

    first: AlphaBeta
    second: AlphaBeta | None = None


def step_seconds(workload: Workload, exchange: Exchange) -> float:
    """The predicted time of a step.

    Exchanges of a kind follow each other; the first kind starts as its bucket's gradients are there. DDP, whose
    exchange has no second half, ends with the last one: t_f + max(t_b, t_ar), and the tail that cannot overlap. In
    DeAR the second halves follow in the order of the forward pass, which waits for each: close to max(t_b, t_rs) +
    max(t_f, t_ag), and the tails. Source: Zhang et al., "DeAR: accelerating distributed deep learning with
    fine-grained all-reduce pipelining", 2023.
    """
    computed = exchanged = 0.0
    for bucket in workload.buckets:
        computed += workload.backward * bucket / workload.bytes
        exchanged = max(computed, exchanged) + exchange.first.seconds(bucket)
    if exchange.second is None:
        return workload.forward + exchanged
    gathered = forward = exchanged
    for bucket in reversed(workload.buckets):
        gathered += exchange.second.seconds(bucket)
        forward = max(forward, gathered) + workload.forward * bucket / workload.bytes
    return forward
