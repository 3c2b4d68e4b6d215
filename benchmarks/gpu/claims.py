"""What is to be shown on a GPU, and which tasks of the command show it; the page of results lists it with their
commands."""

import shlex
from collections.abc import Collection
from dataclasses import dataclass

from .tasks import tasks


@dataclass(frozen=True)
class Claim:
    """One thing to show."""

    what: str
    tasks: tuple[str, ...]  # by name, each of which has a part of it


KERNELS = "tests/test_kernels_"
ALL_KERNELS = f"{KERNELS}*.py"
TRAINING = ("training-resnet50", "training-bert-base", "training-resnet50-4w", "training-bert-base-4w")

CLAIMS = (
    Claim("the kernels give the host's bits, or differ from them as each test says", ("tests-kernels",)),
    Claim(
        "two levels over NCCL: dense, compressed between nodes, and preconditioned",
        ("tests-two-levels",),
    ),
    Claim("preconditioners and Muon over NCCL train as their golden models and plain DDP", ("tests-second-order",)),
    Claim(
        "exactness, error feedback, clipping and resuming over NCCL; autocast, channels last and torch.compile",
        ("tests-nccl",),
    ),
    Claim(
        "the host of a step waits for no device, any number of streams may wait for an exchange, what is not finite is "
        "read once a step, and capture in a CUDA graph is refused",
        ("tests-nccl",),
    ),
    Claim(
        "share of the GPU's copy bandwidth: sign and top-k by threshold, with error feedback; low-rank encoding and "
        "decoding",
        ("kernels", "kernels-large"),
    ),
    Claim("sparse lists merged and decoded, beside plain torch", ("kernels", "kernels-large")),
    Claim("a step of ACP-SGD on BERT-Large's matrices, beside its least bytes and plain torch", ("kernels-step",)),
    Claim(
        "the exact k-th largest, beside torch.topk and CUB",
        ("kernels", "kernels-rare", "kernels-large", "kernels-top-k-large", "kernels-rare-large"),
    ),
    Claim("DeAR over NCCL beside tuned DDP, in 32 and in 16 bits", TRAINING),
    Claim("DeAR over NCCL beside FSDP2, in 32 and in 16 bits", ("fsdp2-bert-base",)),
    Claim("what the streams of a step do, by traces of the device", ("traces-bert-base",)),
    Claim("DeAR with ACP-SGD beside DDP with a 16-bit hook", TRAINING),
    Claim("what attaching costs a single rank, BERT-Base", ("alone-bert-base",)),
)


def not_run(stored: Collection[str]) -> list[tuple[Claim, list[str]]]:
    """The claims that have tasks whose results are not stored, and the names of these.

    stored: names of result files.
    """
    left = {task.name for task in tasks(dry_run=False) if task.results and task.results not in stored}
    rows = [(claim, [name for name in claim.tasks if name in left]) for claim in CLAIMS]
    return [(claim, names) for claim, names in rows if names]


def commands(rows: Collection[tuple[Claim, list[str]]]) -> list[str]:
    """Of each task that these claims need, the command that does it alone, in the order of worth."""
    needed = {name for _, names in rows for name in names}
    return [_by_hand(task.arguments) for task in tasks(dry_run=False) if task.name in needed]


def _by_hand(arguments: tuple[str, ...]) -> str:
    """As a person would type it: without pytest's plugins, of which one notes outcomes for the command, and with one
    word for all kernels' tests."""
    kept = ["python"]
    words = iter(arguments)
    for word in words:
        if word == "-p":
            next(words)
        else:
            kept.append(ALL_KERNELS if word.startswith(KERNELS) else shlex.quote(word))
    return " ".join(dict.fromkeys(kept) if ALL_KERNELS in kept else kept)
