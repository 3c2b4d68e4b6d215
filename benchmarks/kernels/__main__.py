"""Every compression kernel by itself, beside the plain-torch way to the same end.

python -m benchmarks.kernels --json benchmarks/results/compressors.json
python -m benchmarks.kernels --device cuda --json benchmarks/results/compressors-h100.json
"""

import argparse
from dataclasses import asdict
from functools import partial

import torch

from compress import ops

from .. import cells, records
from ..command import Parser, fail, listed, number, one_of, positive, terminal
from ..progress import Part
from ..store import Store
from .cases import FAMILIES
from .measure import Experiment, measure_family
from .show import show


def need_gpu() -> None:
    """Ends the command with a sentence where the kernels cannot run on a GPU."""
    if not torch.cuda.is_available():
        fail("torch sees no GPU here: leave out --device cuda.")
    try:
        ops.error_correct(torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda"))
    except NotImplementedError:
        fail(
            "The kernels were built without CUDA: build them again where nvcc and a torch with CUDA are, or leave out "
            "--device cuda."
        )


def arguments() -> argparse.Namespace:
    parser = Parser(__package__, __doc__)
    parser.add_argument("--numel", type=positive, default=1 << 24, help="elements of the fusion group")
    parser.add_argument("--density", type=number, default=0.01, help="share of the elements that top-k sends")
    parser.add_argument("--rank", type=positive, default=4, help="rank of the low-rank factors")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument(
        "--families", type=listed(one_of(FAMILIES)), help=f"such as top-k,sign (default: all: {', '.join(FAMILIES)})"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where tensors live (default: cpu)")
    cells.file_options(parser)
    return parser.parse_args()


def main() -> None:
    given, console = arguments(), terminal()
    experiment = Experiment(given.numel, given.density, given.rank, given.threads, given.rounds, given.device)
    if experiment.device == "cuda":
        need_gpu()
    with cells.ended_by_a_sentence(given.json):
        store = Store.open(records.header("kernels", asdict(experiment), experiment.device), given.json, given.resume)
        families = given.families or list(FAMILIES)
        for index, family in enumerate(families, 1):
            part, measure = Part(index, len(families)), partial(measure_family, family, experiment)
            try:
                store.obtain({"family": family}, experiment, part, family, measure, console)
            except torch.OutOfMemoryError:
                fail(f"The GPU's memory does not hold the inputs of {family}: give a smaller --numel.")
    show(store.payload, console)


if __name__ == "__main__":
    main()
