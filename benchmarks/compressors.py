"""Every compression kernel: median time, bandwidth, and its share of the machine's copy bandwidth, beside plain torch.

The floor of a kernel is the bytes it must move: each input read once, each output written once, whatever it must keep
nowhere else. Per element, with float32 gradients g and error feedback e, one bit sent, density d:

    sign with error feedback   read g 4, read e 4, write e 4, write bits 1/8                    = 12.13 bytes
    top-k by threshold         read g 4, read e 4, write e 4, write d entries of 8              = 12 + 8 d
    exact threshold            read g 4 and e 4, once for each of three digits                  = 24
    sign decode                read bits 1/8, write g 4                                         = 4.13
    majority vote, P voters    read P/8, write 1/8
    average, P voters          read P/8 and e 4, write e 4 and 1/8
    top-k decode               read d entries of 8, write g 4
    kept threshold             read g 4 and e 4 of the sample
    low-rank, error feedback   read g 4, read e 4, write e 4, whichever factor is made         = 12 and the factors
    low-rank decode            write g 4                                                       = 4 and the factors
    dense in 16 bits           read g 4, write 2; with error feedback read e 4, write e 4     = 6, 14
    average of 16 bits, P      read 2 P, write 2; with error feedback read e 4, write e 4
    dense members, gathered    read g 4, write the message 4; the same when scattered          = 8

A copy of the same number of elements reads 4 and writes 4; the memory also reads the lines that a copy is about to
overwrite, which an update in place needs not, so a kernel can exceed 100% of it. Kernels, plain torch and the copy
take turns in every round, so that a noisy machine is equally noisy to all; the figures are medians over the rounds.

    python -m benchmarks.compressors --json benchmarks/results/compressors.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernels import Case, all_cases
from compress import ops


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(cases: list[Case], copy: Callable[[], object], rounds: int) -> list[float]:
    """Times all cases in turn, and the copy before each: one list of copies for all."""
    copies = []
    for turn in range(rounds + 1):  # the first round warms up, and is dropped
        for case in cases:
            copies.append(timed(copy))
            case.prepare()
            case.seconds.append(timed(case.run))
            # Where plain torch is very slow, fewer rounds give as good a median.
            if case.plain is not None and (turn % 3 == 0 or case.plain_seconds[-1] < 0.05):
                case.prepare()
                case.plain_seconds.append(timed(case.plain))
    for case in cases:
        del case.seconds[0], case.plain_seconds[:1]
    return copies[len(cases) :]


def facts(threads: int) -> dict[str, object]:
    """Where the numbers come from."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": f"{platform.machine()}, {models[0] if models else platform.processor()}, {len(models)} cores",
        "threads": threads,
        "kernel_threads": ops.kernel_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit.stdout.strip(),
        "load_average": os.getloadavg()[0],  # well above 1: others were working on the machine too
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numel", type=int, default=1 << 24, help="elements of the fusion group")
    parser.add_argument("--density", type=float, default=0.01, help="share of the elements that top-k sends")
    parser.add_argument("--rank", type=int, default=4, help="rank of the low-rank factors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the raw times")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    grad = torch.randn(options.numel) * 1e-3
    target = torch.empty_like(grad)
    cases = all_cases(grad, options.density, options.rank)
    copies = measure(cases, lambda: target.copy_(grad), options.rounds)
    copy = 8 * options.numel / statistics.median(copies)

    about = facts(options.threads)
    table = Table(
        title=f"{options.numel} elements; copy {copy / 1e9:.1f} GB/s; {about['machine']}; torch {about['torch']}"
    )
    for column in ("kernel", "ms", "GB/s", "of copy", "plain torch ms", "faster", "best against best"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    rows = []
    for case in cases:
        seconds = statistics.median(case.seconds)
        plain = statistics.median(case.plain_seconds) if case.plain_seconds else None
        rate = case.bytes / seconds
        table.add_row(
            case.name,
            f"{seconds * 1e3:.2f}",
            f"{rate / 1e9:.1f}",
            f"{rate / copy:.0%}",
            f"{plain * 1e3:.2f}" if plain else "",
            f"{plain / seconds:.1f}x" if plain else "",
            f"{min(case.plain_seconds) / min(case.seconds):.1f}x" if plain else "",
        )
        rows.append(
            {
                "name": case.name,
                "bytes": case.bytes,
                "median_s": seconds,
                "share_of_copy": rate / copy,
                "plain_median_s": plain,
                "best_s": min(case.seconds),
                "plain_best_s": min(case.plain_seconds, default=None),
                "seconds": case.seconds,
                "plain_seconds": case.plain_seconds,
            }
        )
    Console(width=150).print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            **about,
            "command": f"python -m benchmarks.compressors --numel {options.numel} --density {options.density} "
            f"--rank {options.rank} --threads {options.threads} --rounds {options.rounds}",
            "copy_bytes_per_s": copy,
            "copy_seconds": copies,
            "kernels": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
