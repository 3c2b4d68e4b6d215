"""The bandwidth a strategy needs to stay close to its compute floor: python -m benchmarks.bandwidth.

Down a ladder of rates, each strategy drops out at the first where its step takes more than --limit times that of no
communication, measured in rounds with it; then one more rate, between the last that held and the first that did not.
"""

import argparse
from dataclasses import asdict
from functools import partial

from .. import cells, records
from ..command import Parser, fail, number, terminal
from ..network.rates import UNLIMITED, bits
from ..stats import FLOOR
from ..store import Store
from ..training.experiment import experiment_options
from .measure import parts, run
from .show import show

LADDER = ["10gbit", "5gbit", "2500mbit", "1gbit", "500mbit", "250mbit", "125mbit", "62mbit"]
STRATEGIES = "ddp:2,ddp+fp16:1,ddp+fp16:4,dear,bf16:4,dear+acp:4,acp:4,topk:0.01,sign"


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    experiment_options(parser, strategies=STRATEGIES, rounds=5, warmup=1, steps=4)
    limit = partial(number, above=1)
    parser.add_argument("--limit", type=limit, default=1.15, help="step / compute floor that still holds")
    parser.set_defaults(rates=LADDER)
    given = parser.parse_args()
    given.strategies = [name for name in given.strategies if name != FLOOR]
    if UNLIMITED in given.rates:
        parser.error("a ladder of rates has no rung without a limit")
    given.rates = sorted(given.rates, key=bits, reverse=True)
    return given


def main() -> None:
    given, console = arguments(), terminal()
    counted = parts(given)
    header = records.header("bandwidth", {"workers": given.workers, "rates": given.rates, "limit": given.limit})
    with cells.ended_by_a_sentence(given.json):
        store = Store.open(header, given.json, given.resume)
        store.payload["needed"] = []
        for workers in given.workers:
            with cells.open_network(workers, given) as lab:
                if not lab.emulated:
                    fail("A ladder of rates needs the emulated network, which needs root and iproute2.")
                needed = run(given, lab, store, counted, console)
            store.payload["needed"] += [{"workers": workers, **asdict(one)} for one in needed]
            store.write()
            show(workers, given.limit, needed, console)
    if given.json:
        console.print(f"Raw times: {given.json}", highlight=False)


if __name__ == "__main__":
    main()
