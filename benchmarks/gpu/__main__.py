"""Everything that a short time on one GPU can show, in the order of worth: python -m benchmarks.gpu --minutes 9.

Builds the extension for the GPU that is here, runs the CUDA tests, measures the kernels and then training steps over
NCCL, with several ranks on the one GPU. What is finished is stored at once, and --resume goes on from there, so several
short calls make one result. Needs an NVIDIA GPU, nvcc, and torch with CUDA; no network. --dry-run rehearses it on any
machine, over gloo with host tensors and tiny sizes.
"""

import argparse
import shlex
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console

from .. import cuda, records
from ..command import Parser, fail, listed, number, one_of, terminal
from ..store import Store, ended_by_a_sentence
from . import mps
from .measure import Call
from .show import show
from .tasks import Task, tasks


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    parser.add_argument("--minutes", type=partial(number, above=0), default=9.0, help="of this call (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="where results go (default: out/gpu)")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier call stopped")
    names = [task.name for task in tasks(dry_run=False)]
    parser.add_argument(
        "--only", type=listed(one_of(names)), help="these tasks in this order, behind the build: kernels,tests-nccl"
    )
    parser.add_argument("--dry-run", action="store_true", help="rehearse without a GPU, with tiny sizes")
    return parser.parse_args()


def main() -> None:
    given, console = arguments(), terminal()
    if not given.dry_run and not cuda.query():
        fail("nvidia-smi names no GPU here: run this where there is one, or rehearse it with --dry-run.")
    some = chosen(given)
    given.out.mkdir(parents=True, exist_ok=True)
    with ended_by_a_sentence(given.out / "gpu.json"):
        about = nullcontext("MPS is not used in a rehearsal.") if given.dry_run else mps.started()
        with about as sentence:
            console.print(sentence, highlight=False)
            became = run(given, some, console)
    show(became, console)
    if any(became.values()):
        typed = [word for word in sys.argv[1:] if word != "--resume"]
        console.print(
            "Go on with: " + shlex.join(["python", "-m", str(__package__), *typed, "--resume"]), soft_wrap=True
        )
    raise SystemExit(1 if any(why.startswith("failed") for why in became.values()) else 0)


def run(given: argparse.Namespace, some: list[Task], console: Console) -> dict[str, str]:
    """These tasks, as far as the time goes; what became of each."""
    path = given.out / "gpu.json"
    header = records.header("gpu", {"dry_run": given.dry_run}, "cpu" if given.dry_run else "cuda")
    store = Store.open(header, path, given.resume)
    return Call(some, given.minutes, given.out, store, given.resume and path.exists(), console).run()


def chosen(given: argparse.Namespace) -> list[Task]:
    """The tasks of this call: all, or what nothing else can run without and those that were asked for.

    A rehearsal has not all of them, nor has an installed package: what it has not ends the command with a sentence.
    """
    every = {task.name: task for task in tasks(given.dry_run)}
    if given.only is None:
        return list(every.values())
    if missing := [name for name in given.only if name not in every]:
        fail(f"--only names {', '.join(missing)}, which this call does not have: choose from {', '.join(every)}.")
    first = [task for task in every.values() if task.every_call]
    return first + [every[name] for name in given.only if every[name] not in first]


if __name__ == "__main__":
    main()
