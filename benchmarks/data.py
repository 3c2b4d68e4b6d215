"""Training text that is on every machine: the source of Python's standard library, as bytes."""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT_EVERY = 20  # one file in twenty is kept for evaluation
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class ByteText:
    """The corpus: two flat uint8 tensors, and a digest that two runs compare to know they read the same text."""

    train: Tensor
    held_out: Tensor
    digest: str

    def batch(self, step: int, *, rank: int, world: int, batch: int, sequence: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [batch, sequence], for one rank and step.

        The text is cut into windows that do not overlap, shuffled anew in each epoch by (seed, epoch). The step takes
        the next world * batch of them and the rank its own part, so no two ranks, and no two steps of an epoch, see
        the same window.
        """
        windows = (len(self.train) - 1) // sequence
        steps_per_epoch = windows // (world * batch)
        epoch, position = divmod(step, steps_per_epoch)
        order = _window_order(windows, seed, epoch)
        first = (position * world + rank) * batch
        return _cut(self.train, order[first : first + batch] * sequence, sequence)

    def held_out_batch(self, batch: int, sequence: int) -> tuple[Tensor, Tensor]:
        """The same evenly spaced windows of held-out text for every caller: inputs and targets, int64."""
        spread = (len(self.held_out) - 1 - sequence) // batch
        return _cut(self.held_out, torch.arange(batch) * spread, sequence)


_orders: dict[tuple[int, int, int], Tensor] = {}


def _window_order(windows: int, seed: int, epoch: int) -> Tensor:
    """The shuffled windows of one epoch, kept because drawing it takes longer than reading a batch."""
    key = (windows, seed, epoch)
    if key not in _orders:
        _orders.clear()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _orders[key] = torch.randperm(windows, generator=generator)
    return _orders[key]


def _cut(text: Tensor, starts: Tensor, sequence: int) -> tuple[Tensor, Tensor]:
    """Windows of sequence + 1 bytes at `starts`, as (inputs, targets shifted by one byte)."""
    rows = text[starts[:, None] + torch.arange(sequence + 1)].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@cache
def standard_library(root: Path | None = None) -> ByteText:
    """Reads every .py file of the standard library in sorted order, without its tests and installed packages."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)),
        key=lambda path: path.relative_to(root).as_posix(),
    )
    train, held_out = bytearray(), bytearray()
    for index, path in enumerate(files):
        (held_out if index % HELD_OUT_EVERY == 0 else train).extend(path.read_bytes())
    if len(held_out) < 4096:
        raise RuntimeError(
            "The source of Python's standard library is missing or stripped here: "
            "use a Python whose .py files are installed."
        )
    digest = hashlib.sha256(bytes(train) + bytes(held_out)).hexdigest()[:16]
    return ByteText(torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8), digest)
