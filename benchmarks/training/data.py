"""Training data that needs no download: Python's standard library as bytes, scikit-learn's digits, and noise."""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT_EVERY = 20  # one file in twenty is kept for evaluation
HELD_OUT_DIGITS = 5  # one image in five
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Batch = tuple[Tensor, Tensor]  # inputs and targets


class Examples:
    """What a model is trained on. `digest` says of two runs whether they read the same."""

    digest: str = ""
    varies = True  # from step to step

    def batch(self, step: int, *, rank: int, world: int, batch: int, seed: int) -> Batch:
        """`batch` examples for one rank and step; what every rank gets depends on these numbers alone."""
        raise NotImplementedError

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


@lru_cache(maxsize=1)  # drawing it takes longer than reading a batch
def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


@dataclass(frozen=True)
class ByteText(Examples):
    """Two flat uint8 tensors of text, read in windows of `sequence` bytes that do not overlap.

    Inputs and targets are int64 [batch, sequence], the targets one byte further on.
    """

    train: Tensor
    evaluation: Tensor
    sequence: int
    digest: str = ""

    def batch(self, step: int, **where: int) -> Batch:
        windows = (len(self.train) - 1) // self.sequence
        return self._cut(self.train, places(windows, step, **where) * self.sequence)

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

    def batch(self, step: int, **where: int) -> Batch:
        images, labels = self.train
        chosen = places(len(images), step, **where)
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
def standard_library(sequence: int) -> ByteText:
    """Reads every .py file of the standard library in sorted order, without its tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root): path for path in root.rglob("*.py")}
    names = sorted((name for name in files if not SKIPPED_FOLDERS & set(name.parts)), key=Path.as_posix)
    train, held_out = bytearray(), bytearray()
    for index, name in enumerate(names):
        (held_out if index % HELD_OUT_EVERY == 0 else train).extend(files[name].read_bytes())
    if len(held_out) < 4096:
        raise RuntimeError(
            "The source of Python's standard library is missing or stripped here: "
            "use a Python whose .py files are installed."
        )
    train_text, held_out_text = (torch.frombuffer(text, dtype=torch.uint8) for text in (train, held_out))
    return ByteText(train_text, held_out_text, sequence, _digest(train, held_out))


@cache
def digits() -> Images:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, scaled to [0, 1]. Raises ImportError without it."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    kept = torch.arange(len(images)) % HELD_OUT_DIGITS == 0
    digest = _digest(images.numpy().tobytes(), labels.numpy().tobytes())
    return Images((images[~kept], labels[~kept]), (images[kept], labels[kept]), digest)


def _digest(*data: bytes | bytearray) -> str:
    return hashlib.sha256(b"".join(data)).hexdigest()[:16]
