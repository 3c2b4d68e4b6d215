"""Training data that needs no download: Python's standard library as bytes, scikit-learn's digits, and noise."""

import hashlib
import sysconfig
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT_EVERY = 20  # one file in twenty is kept for evaluation
HELD_OUT_DIGITS = 5  # one image in five
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Batch = tuple[Tensor, Tensor]  # inputs and targets


class Examples(ABC):
    """What a model is trained on. `digest` says of two runs whether they read the same."""

    digest: str
    varies = True  # from step to step

    @abstractmethod
    def batch(self, step: int, *, rank: int, world: int, batch: int, seed: int) -> Batch:
        """`batch` examples for one rank and step; what every rank gets depends on these numbers alone."""

    def held_out(self, count: int) -> Batch | None:
        """The same examples, never trained on, for every caller; None where there is nothing to learn."""
        return None


def places(count: int, step: int, *, rank: int, world: int, batch: int, seed: int) -> Tensor:
    """Which of `count` examples one rank reads in one step, int64 [batch].

    They are shuffled anew in each epoch by (seed, epoch). The step takes the next world * batch of them and the rank
    its own part, so no two ranks, and no two steps of an epoch, see the same example.
    """
    epoch, position = divmod(step, count // (world * batch))
    first = (position * world + rank) * batch
    return shuffled(count, seed, epoch)[first : first + batch]


_orders: dict[tuple[int, int, int], Tensor] = {}


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch, kept because drawing it takes longer than reading a batch."""
    key = (count, seed, epoch)
    if key not in _orders:
        _orders.clear()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _orders[key] = torch.randperm(count, generator=generator)
    return _orders[key]


@dataclass(frozen=True)
class ByteText(Examples):
    """Two flat uint8 tensors of text, read in windows of `sequence` bytes that do not overlap.

    Inputs and targets are int64 [batch, sequence], the targets one byte further on.
    """

    train: Tensor
    evaluation: Tensor
    sequence: int
    digest: str = ""

    def batch(self, step: int, *, rank: int, world: int, batch: int, seed: int) -> Batch:
        windows = (len(self.train) - 1) // self.sequence
        chosen = places(windows, step, rank=rank, world=world, batch=batch, seed=seed)
        return self._cut(self.train, chosen * self.sequence)

    def held_out(self, count: int) -> Batch:
        """Evenly spaced windows of held-out text."""
        spread = (len(self.evaluation) - 1 - self.sequence) // count
        return self._cut(self.evaluation, torch.arange(count) * spread)

    def _cut(self, text: Tensor, starts: Tensor) -> Batch:
        rows = text[starts[:, None] + torch.arange(self.sequence + 1)].long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@dataclass(frozen=True)
class Images(Examples):
    """Small labelled images that fit in memory: float32 [n, channels, height, width], int64 [n]."""

    train: Batch
    evaluation: Batch
    digest: str = ""

    def batch(self, step: int, *, rank: int, world: int, batch: int, seed: int) -> Batch:
        images, labels = self.train
        chosen = places(len(images), step, rank=rank, world=world, batch=batch, seed=seed)
        return images[chosen], labels[chosen]

    def held_out(self, count: int) -> Batch:
        """The first `count` held-out images, or all, where there are fewer."""
        return self.evaluation[0][:count], self.evaluation[1][:count]


@dataclass(frozen=True)
class Noise(Examples):
    """Random inputs and labels of the right shape: good for step times, while losses mean nothing.

    shape: of one input; int64 below `inputs_below`, or normally distributed where that is 0. Targets are int64 below
    `classes`: one for each input, or, for int64 inputs, one for each of its elements.
    """

    shape: tuple[int, ...]
    classes: int
    inputs_below: int = 0
    digest: str = "synthetic"
    varies = False  # drawing costs time, and bringing it to a device

    def batch(self, step: int, *, rank: int, world: int, batch: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed * world + rank)
        if self.inputs_below:
            inputs = torch.randint(self.inputs_below, (batch, *self.shape), generator=generator)
            return inputs, torch.randint(self.classes, inputs.shape, generator=generator)
        inputs = torch.randn(batch, *self.shape, generator=generator)
        return inputs, torch.randint(self.classes, (batch,), generator=generator)


@cache
def standard_library(sequence: int, root: Path | None = None) -> ByteText:
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
    train_text, held_out_text = (torch.frombuffer(text, dtype=torch.uint8) for text in (train, held_out))
    return ByteText(train_text, held_out_text, sequence, digest)


@cache
def digits() -> Images:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, scaled to [0, 1]. Raises ImportError without it."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    kept = torch.arange(len(images)) % HELD_OUT_DIGITS == 0
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
    return Images((images[~kept], labels[~kept]), (images[kept], labels[kept]), digest)
