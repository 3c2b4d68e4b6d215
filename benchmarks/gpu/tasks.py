"""What the command does, in the order of worth: for a GPU, and as a rehearsal on any machine."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..records import ROOT

PACKAGE = __name__.split(".")[0]  # as it is imported here: from a checkout or installed

# Every rank is a host of its own to NCCL (NCCL_HOSTID, set for each worker), connected by sockets.
SOCKETS = {"NCCL_NET": "Socket", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
AT_ONCE = ("-n", "4", "--dist", "worksteal")  # tests: each keeps the GPU busy for a small part of its time
ONE_RANK = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")  # a job of a single rank
# Queues for a process's streams. A process that has its GPU for itself gets as many where nothing is said; a client of
# MPS gets fewer, and streams wait in the queues of others: Note [Few streams] in pipeline.h.
QUEUES = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
STRATEGIES = "none,ddp:25,ddp:4,ddp+fp16:25,dear,bf16:25,dear+bf16,int8:25,dear+int8,dear+acp:4"
# All of them stay in memory: by an estimate, four times ten of BERT-Base are more than 80 GB have room for.
OF_FOUR = "none,ddp:25,ddp:4,ddp+fp16:25,dear,dear+bf16,dear+acp:4"


@dataclass(frozen=True)
class Task:
    """One command."""

    name: str
    arguments: tuple[str, ...]  # what Python is given
    minutes: float = 0.0  # that it takes; it is not begun where less is left
    share: float = 1.0  # of all the time of a call: then it is interrupted, and goes on in the next call
    results: str = ""  # the file that it writes into the output folder
    env: Mapping[str, str] = field(default_factory=dict)
    traces: bool = False  # it writes traces, too
    every_call: bool = False  # also if an earlier call has done it; nothing else can run where it fails

    @property
    def tests(self) -> bool:
        """Whether it runs tests, of which each is a step by itself."""
        return "pytest" in self.arguments

    def command(self, folder: Path, resume: bool) -> list[str]:
        """A benchmark gets its file, and is told to go on with it."""
        more: list[str] = []
        if self.results and not self.tests:
            more = ["--json", str(folder / self.results), *(["--resume"] if resume else [])]
        if self.traces:
            more += ["--traces", str(folder / self.name)]
        return [sys.executable, *self.arguments, *more]


def tasks(dry_run: bool) -> list[Task]:
    """All of them."""
    if not (ROOT / "CMakeLists.txt").exists():  # installed: there is nothing to build, and no test
        return _benchmarks(dry_run)
    build = ("-c", "import dear._C") if dry_run else ("-m", f"{PACKAGE}.gpu.build")
    return [Task("build", build, every_call=True), *_tests(dry_run), *_benchmarks(dry_run)]


def _tests(dry_run: bool) -> list[Task]:
    """The host's tests with CUDA tensors, and the kernels' tests: first what has never run on a GPU, then what has run
    there in part."""
    kernels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_kernels_*.py"))
    only = ("-k", "cuda")
    if dry_run:
        kernels, only = ["tests/test_kernels_ops.py"], ("-k", "cpu and opcheck and dense")
    pytest = ("-m", "pytest", "-p", f"{PACKAGE}.gpu.outcomes", "-p", "no:cacheprovider", *AT_ONCE)

    def task(name: str, share: float, *arguments: str) -> Task:
        return Task(f"tests-{name}", (*pytest, *arguments), share=share, results=f"tests-{name}.jsonl")

    return [
        task("two-levels", 0.3, "tests/test_cuda_two_levels.py"),
        task("second-order", 0.2, "tests/test_cuda_second_order.py"),
        task("kernels", 0.2, *only, *kernels, "tests/test_cub.py"),
        task("nccl", 0.3, "tests/test_cuda.py"),
    ]


def _benchmarks(dry_run: bool) -> list[Task]:
    if dry_run:
        digits = "--backend gloo --device cpu --workload digits --rates unlimited --rounds 1 --warmup 1 --steps 1"
        return [
            _benchmark("kernels", "kernels", "--device cpu --numel 4096 --rounds 1 --threads 1"),
            _benchmark("training-resnet50", "training", f"{digits} --strategies none,ddp:25,dear,dear+acp:4"),
            _benchmark("alone-bert-base", "training", f"{digits} --strategies ddp:25,dear", by=ONE_RANK),
            _benchmark("kernels-step", "kernels", "--device cpu --numel 4096 --rounds 1 --families 'ACP-SGD step'"),
            _benchmark("traces-bert-base", "training", f"{digits} --strategies ddp:25,dear", traces=True),
        ]
    rounds = "--backend nccl --device cuda --rates 10gbit --rounds 4 --strategies"
    training = f"{rounds} {STRATEGIES}"
    four = f"{rounds} {OF_FOUR} --workers 4 --batch 32"
    few = "--backend nccl --device cuda --rates 10gbit --rounds 2 --workload bert-base --strategies"
    alone = "--backend nccl --device cuda --rounds 8 --strategies ddp:25,dear"
    step = "--families 'ACP-SGD step' --numel 335544320 --rounds 5"
    rare = "--families top-k --density 0.001 --rounds 5 --numel"
    return [
        _benchmark("kernels", "kernels", "--device cuda", 0.2, share=0.3),
        _benchmark("training-resnet50", "training", f"{training} --workload resnet50", 1.5),
        _benchmark("training-bert-base", "training", f"{training} --workload bert-base", 2),
        _benchmark("alone-bert-base", "training", f"{alone} --workload bert-base", 0.7, by=ONE_RANK),
        _benchmark("kernels-large", "kernels", "--device cuda --numel 134217728 --rounds 5", 0.5),
        _benchmark("kernels-step", "kernels", f"--device cuda {step}", 0.5),
        _benchmark("kernels-rare", "kernels", f"--device cuda {rare} 16777216", 0.2),
        _benchmark("kernels-rare-large", "kernels", f"--device cuda {rare} 268435456", 0.5),
        _benchmark(
            "kernels-top-k-large", "kernels", "--device cuda --families top-k --numel 268435456 --rounds 5", 0.5
        ),
        _benchmark("training-resnet50-4w", "training", f"{four} --workload resnet50", 2),
        _benchmark("training-bert-base-4w", "training", f"{four} --workload bert-base", 3),
        _benchmark("fsdp2-bert-base", "training", f"{few} ddp:4,fsdp2,fsdp2+bf16,dear,dear+bf16", 1.2),
        _benchmark("traces-bert-base", "training", f"{few} ddp:4,dear,bf16:25,dear+bf16", 1.2, traces=True),
    ]


def _benchmark(
    name: str,
    module: str,
    arguments: str,
    minutes: float = 0,
    share: float = 1,
    by: tuple[str, ...] = (),
    traces: bool = False,
) -> Task:
    """by: what starts it, if it is not this command."""
    command = (*by, "-m", f"{PACKAGE}.{module}", *shlex.split(arguments))
    env = {**SOCKETS, **QUEUES} if module == "training" else {}
    return Task(name, command, minutes, share, f"{name}.json", env, traces)
