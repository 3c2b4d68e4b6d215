"""Runs a command once per worker: python -m benchmarks.network --rate 1gbit -- python train.py."""

import argparse
import sys

from ..processes import TimedOut
from .lab import KINDS, describe, open_lab
from .namespaces import NetworkUnavailable
from .ranks import RankFailed


def main(arguments: list[str] | None = None) -> int:
    """Runs a command as every worker, its output passed through; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="how many")
    parser.add_argument("--rate", help="each port's bandwidth each way, such as 500mbit or 1gbit; None: no limit")
    parser.add_argument("--network", choices=KINDS, default="netns", help="auto: netns where it can be had")
    parser.add_argument("--timeout", type=float, help="seconds after which all workers are killed; None: never")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what to run, once per worker")
    options = parser.parse_args(arguments)
    try:
        with open_lab(options.workers, options.rate, options.network) as lab:
            print(describe(lab), file=sys.stderr)
            lab.run(options.command, timeout=options.timeout, capture=False)
    except RankFailed as error:
        print(error, file=sys.stderr)
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except (NetworkUnavailable, TimedOut, ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
