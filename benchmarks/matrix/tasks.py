"""The commands that run every benchmark, at each size."""

import shlex
from dataclasses import dataclass
from pathlib import Path

PACKAGE = __name__.split(".")[0]  # as it is imported here: from a checkout or installed


@dataclass(frozen=True)
class Task:
    """One benchmark."""

    name: str  # of its JSON
    module: str  # of this package
    arguments: str  # as typed, without where its results go
    minutes: float  # expected, until the first ones are measured: it only weighs the tasks against each other

    def command(self, folder: Path, resume: bool = False) -> list[str]:
        results = ["--json", str(folder / f"{self.name}.json"), *(["--resume"] if resume else [])]
        if self.module == "demo":  # which writes pictures too, and is too short to resume
            results = ["--out", str(folder)]
        return ["-m", f"{PACKAGE}.{self.module}", *shlex.split(self.arguments), *results]


def _tasks(table: str, **words: str) -> tuple[Task, ...]:
    """From lines of name, module, minutes and arguments; {words} stand for what several lines share."""
    rows = [line.format(**words).split(maxsplit=3) for line in table.strip().splitlines()]
    return tuple(Task(name, module, "".join(rest), float(minutes)) for name, module, minutes, *rest in rows)


OTHERS = (
    "fsdp2,dear,bf16:4,acp:4,power:4,topk:0.01,sign,dear+bf16,dear+acp:4,dear+power:4,dear+power:8,dear+sign,"
    "dear+topk:0.01"
)
SIZES: dict[str, tuple[Task, ...]] = {
    "small": _tasks(
        """
kernels         kernels      0.1  --numel 4194304 --rounds 5
collectives     collectives  0.6  -b 1M -e 4M -f 4 -n 2 --rounds 2 --rates 1gbit
training        training     3.7  {some},ddp:25,bf16:4,sign --rates 500mbit,1gbit {rounds} --breakdown
training-again  training     0.8  {some} --rates 1gbit {rounds}
convergence     convergence  0.9  {losses} --seeds 1 --steps 20 --held-out-every 5 --held-out-examples 16
bandwidth       bandwidth    0.8  --strategies ddp:1,acp:4 --rates 2.5gbit,500mbit --rounds 2 --steps 2
""",
        some="--strategies none,ddp:1,ddp+fp16:4,dear,acp:4",
        rounds="--rounds 2 --warmup 1 --steps 2",
        losses="--strategies ddp,acp:4,sign",
    ),
    # A step of dense DDP takes four to six seconds at 100 Mbit/s, and differs little from the next: few will do.
    "full": _tasks(
        """
kernels            kernels      0.7   --rounds 21
collectives-slow   collectives  12    -b 64K -e 4M -f 4 -n 2 --rounds 3 --workers 2,4 --rates 100mbit,500mbit
collectives        collectives  30    {sizes} --workers 2,4 --rates 1gbit,{fast_rates}
collectives-again  collectives  5     {sizes} --rates 1gbit
training-2-slow    training     8     {slow},{torchs} --rates 100mbit --rounds 4 --warmup 1 --steps 1
training-2         training     13.5  {middle},{torchs} --rates 500mbit,1gbit {rounds} --breakdown
training-2-fast    training     11.5  {fast},{torchs} --rates {fast_rates} {rounds}
training-4-slow    training     15    {slow} {four} --rates 100mbit --rounds 3 --warmup 1 --steps 1
training-4         training     16.5  {middle} {four} --rates 500mbit,1gbit {rounds} --breakdown
training-4-fast    training     19    {fast} {four} --rates {fast_rates} {rounds}
training-again     training     5     {middle},{torchs} --rates 1gbit {rounds}
digits             training     3     {digits} --rates 100mbit,1gbit --seeds 1,2,3 --rounds 10 --steps 10
convergence        convergence  65    {losses} --seeds 1,2,3 --steps 300
bandwidth          bandwidth    30    {four}
demo               demo         3
""",
        sizes="-b 64K -e 64M -f 4 -n 3 --rounds 3",
        fast_rates="2.5gbit,10gbit,unlimited",
        rounds="--rounds 4 --warmup 1 --steps 2",
        four="--workers 4 --batch 2",
        # The best bucket size of DDP depends on the rate, and DDP is to have it: sizes that are left out were never the
        # best in any run of benchmarks/results at such rates.
        slow=f"--strategies none,ddp:1,ddp:2,ddp:4,ddp+fp16:1,ddp+fp16:4,{OTHERS}",
        middle=f"--strategies none,ddp:2,ddp:4,ddp:8,ddp+fp16:2,ddp+fp16:4,ddp+fp16:8,{OTHERS}",
        fast=f"--strategies none,ddp:2,ddp:4,ddp:8,ddp:25,ddp+fp16:4,ddp+fp16:25,{OTHERS}",
        torchs="ddp+powersgd:4",  # torch's hook, which with four workers aborts
        digits="--workload digits --strategies none,ddp:1,ddp:25,ddp+fp16:1,ddp+powersgd:4,dear,bf16,acp:4,power:4,"
        "topk:0.01,sign,dear+acp:4,dear+sign",
        losses="--strategies ddp,bf16,acp:4,acp:8,power:4,power:8,topk:0.01,sign",
    ),
}
