"""The commands that run every benchmark, at each size."""

import shlex
from dataclasses import dataclass
from pathlib import Path

PACKAGE = __name__.split(".")[0]  # as it is imported here: from a checkout or installed
JSON, FOLDER = "{json}", "{folder}"


@dataclass(frozen=True)
class Task:
    """One benchmark. `arguments` as typed, with {json} or {folder} where its results go."""

    name: str  # of its JSON
    module: str  # of this package
    arguments: str
    minutes: float  # expected, until the first ones are measured: it only weighs the tasks against each other
    resumable: bool = True

    def command(self, folder: Path, resume: bool = False) -> list[str]:
        places = {JSON: str(folder / f"{self.name}.json"), FOLDER: str(folder)}
        words = [places.get(word, word) for word in shlex.split(self.arguments)]
        return ["-m", f"{PACKAGE}.{self.module}", *words, *(["--resume"] if resume and self.resumable else [])]


OTHERS = (
    "fsdp2,dear,bf16:4,acp:4,power:4,topk:0.01,sign,dear+bf16,dear+acp:4,dear+power:4,dear+power:8,dear+sign,"
    "dear+topk:0.01"
)
# The best bucket size of DDP depends on the rate, and DDP is to have it: sizes that are left out were never the best in
# any run of benchmarks/results at such rates.
SLOW, MIDDLE, FAST = (
    f"none,{buckets},{OTHERS}"
    for buckets in (
        "ddp:1,ddp:2,ddp:4,ddp+fp16:1,ddp+fp16:4",
        "ddp:2,ddp:4,ddp:8,ddp+fp16:2,ddp+fp16:4,ddp+fp16:8",
        "ddp:2,ddp:4,ddp:8,ddp:25,ddp+fp16:4,ddp+fp16:25",
    )
)
DIGITS = "none,ddp:1,ddp:25,ddp+fp16:1,ddp+powersgd:4,dear,bf16,acp:4,power:4,topk:0.01,sign,dear+acp:4,dear+sign"
POWERSGD = "ddp+powersgd:4"  # torch's hook, which with four workers aborts
TURNS = "--rounds 4 --warmup 1 --steps 2"
FOUR = "--workers 4 --batch 2"
FAST_RATES = "2.5gbit,10gbit,unlimited"
COLLECTIVES = "-b 64K -e 64M -f 4 -n 3 --rounds 3"

SIZES: dict[str, tuple[Task, ...]] = {
    "small": (
        Task("kernels", "kernels", "--numel 4194304 --rounds 5 --json {json}", 0.1),
        Task("collectives", "collectives", "-b 1M -e 4M -f 4 -n 2 --rounds 2 --rates 1gbit --json {json}", 0.6),
        Task(
            "training",
            "training",
            "--strategies none,ddp:1,ddp:25,ddp+fp16:4,dear,bf16:4,acp:4,sign --rates 500mbit,1gbit "
            "--rounds 2 --warmup 1 --steps 2 --breakdown --json {json}",
            3.7,
        ),
        Task(
            "training-again",
            "training",
            "--strategies none,ddp:1,ddp+fp16:4,dear,acp:4 --rates 1gbit --rounds 2 --warmup 1 --steps 2 --json {json}",
            0.8,
        ),
        Task(
            "convergence",
            "convergence",
            "--strategies ddp,acp:4,sign --seeds 1 --steps 20 --held-out-every 5 --held-out-examples 16 --json {json}",
            0.9,
        ),
        Task(
            "bandwidth",
            "bandwidth",
            "--strategies ddp:1,acp:4 --rates 2.5gbit,500mbit --rounds 2 --steps 2 --json {json}",
            0.8,
        ),
    ),
    # A step of dense DDP takes four to six seconds at 100 Mbit/s, and differs little from the next: few will do.
    "full": (
        Task("kernels", "kernels", "--rounds 21 --json {json}", 0.7),
        Task(
            "collectives-slow",
            "collectives",
            "-b 64K -e 4M -f 4 -n 2 --rounds 3 --workers 2,4 --rates 100mbit,500mbit --json {json}",
            12,
        ),
        Task(
            "collectives", "collectives", f"{COLLECTIVES} --workers 2,4 --rates 1gbit,{FAST_RATES} --json {{json}}", 30
        ),
        Task("collectives-again", "collectives", f"{COLLECTIVES} --rates 1gbit --json {{json}}", 5),
        Task(
            "training-2-slow",
            "training",
            f"--strategies {SLOW},{POWERSGD} --rates 100mbit --rounds 4 --warmup 1 --steps 1 --json {{json}}",
            8,
        ),
        Task(
            "training-2",
            "training",
            f"--strategies {MIDDLE},{POWERSGD} --rates 500mbit,1gbit {TURNS} --breakdown --json {{json}}",
            13.5,
        ),
        Task(
            "training-2-fast",
            "training",
            f"--strategies {FAST},{POWERSGD} --rates {FAST_RATES} {TURNS} --json {{json}}",
            11.5,
        ),
        Task(
            "training-4-slow",
            "training",
            f"--strategies {SLOW} {FOUR} --rates 100mbit --rounds 3 --warmup 1 --steps 1 --json {{json}}",
            15,
        ),
        Task(
            "training-4",
            "training",
            f"--strategies {MIDDLE} {FOUR} --rates 500mbit,1gbit {TURNS} --breakdown --json {{json}}",
            16.5,
        ),
        Task(
            "training-4-fast",
            "training",
            f"--strategies {FAST} {FOUR} --rates {FAST_RATES} {TURNS} --json {{json}}",
            19,
        ),
        Task(
            "training-again",
            "training",
            f"--strategies {MIDDLE},{POWERSGD} --rates 1gbit {TURNS} --json {{json}}",
            5,
        ),
        Task(
            "digits",
            "training",
            f"--workload digits --strategies {DIGITS} --rates 100mbit,1gbit --seeds 1,2,3 --rounds 10 --warmup 2 "
            "--steps 10 --json {json}",
            3,
        ),
        Task(
            "convergence",
            "convergence",
            "--strategies ddp,bf16,acp:4,acp:8,power:4,power:8,topk:0.01,sign --seeds 1,2,3 --steps 300 --json {json}",
            65,
        ),
        Task("bandwidth", "bandwidth", f"{FOUR} --json {{json}}", 30),
        Task("demo", "demo", "--out {folder}", 3, resumable=False),
    ),
}


def example(benchmark: str, folder: Path = Path("out")) -> str:
    """A command that makes a benchmark's results, for people to copy."""
    task = next(task for task in SIZES["full"] if task.module == benchmark)
    return shlex.join(["python", *task.command(folder)])
