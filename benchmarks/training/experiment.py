"""What one cell of the training benchmark measures, and the options that say so."""

import argparse
from dataclasses import dataclass, field
from typing import Any

from .. import cells
from ..command import Parser, filled, positive
from .strategies import FORMS, StrategyError, parse_strategies
from .trainer import OPTIMIZERS
from .workloads import WORKLOADS


@dataclass(frozen=True)
class Experiment:
    """What one cell (one rate, one number of workers) measures."""

    strategies: list[str]
    optimizer: str = "sgd"
    rounds: int = 8
    warmup: int = 2
    steps: int = 6
    batch: int = 4  # examples per worker and step
    seed: int = 1
    workload: str = "gpt"
    backend: str = "gloo"
    device: str = "cpu"
    breakdown: bool = False
    traces: str = ""  # the folder for them
    excluded: dict[str, str] = field(default_factory=dict)  # strategy: why it is not run


def strategy_names(text: str) -> list[str]:
    """The names in a list of strategies, which must all be known."""
    try:
        return [one.name for one in parse_strategies(text)]
    except StrategyError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def experiment_options(parser: Parser, *, strategies: str, rounds: int, warmup: int, steps: int) -> None:
    """The options that make an Experiment, with these defaults."""
    parser.add_argument("--rounds", type=positive, default=rounds, help="in each of which every strategy is timed")
    parser.add_argument("--warmup", type=positive, default=warmup, help="steps before the timed ones of a round")
    training_options(parser, strategies=strategies, optimizer="sgd", steps=steps)


def training_options(parser: Parser, *, strategies: str, optimizer: str, steps: int) -> None:
    """The options of whatever trains strategies."""
    parser.add_argument("--strategies", type=strategy_names, default=strategies, help=f"comma-separated, of: {FORMS}")
    parser.add_argument("--workload", choices=WORKLOADS, default="gpt")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=optimizer)
    parser.add_argument("--steps", type=positive, default=steps, help="of each strategy, in each round")
    parser.add_argument("--batch", type=positive, help="examples per worker and step (default: the workload's)")
    cells.options(parser)


def experiment_of(given: argparse.Namespace, **more: Any) -> Experiment:
    """The experiment that experiment_options asked for."""
    return filled(Experiment, given, batch=given.batch or WORKLOADS[given.workload].batch, **more)
