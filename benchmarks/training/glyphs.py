"""Rendered characters: images that need no download, with noise that no step and no rank sees twice."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .data import Batch, Examples, places

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
FAMILIES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")
SIDE = 16  # pixels
SCALE = 4  # times as large they are drawn, before they are made small
DRAWINGS = 8  # of each character in each font, each turned, sized and shifted anew
HELD_OUT_EVERY = 8  # one drawing in eight is never trained on
NOISE = 0.2  # standard deviation, where ink is 1 and paper 0


@dataclass(frozen=True)
class Glyphs(Examples):
    """float32 images [n, 1, SIDE, SIDE] of one character each, and which it is, int64 [n]. Batches get fresh noise."""

    train: Batch
    evaluation: Batch
    digest: str = ""

    def batch(self, step: int, *, rank: int, world: int, batch: int, seed: int) -> Batch:
        images, labels = self.train
        chosen = places(len(images), step, rank=rank, world=world, batch=batch, seed=seed)
        return _noisy(images[chosen], (seed * 1_000_003 + step) * world + rank), labels[chosen]

    def held_out(self, count: int) -> Batch:
        """The first `count` held-out images, or all, where there are fewer; always with the same noise."""
        images, labels = (each[:count] for each in self.evaluation)
        return _noisy(images, 0), labels


def _noisy(images: Tensor, seed: int) -> Tensor:
    return images + NOISE * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


@cache
def glyphs() -> Glyphs:
    """The letters and digits in the fonts that come with matplotlib, in an order that mixes them. Raises
    ImportError without it."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [path for path in sorted(folder.glob("*.ttf")) if path.stem.startswith(FAMILIES) and _has_letters(path)]
    images = torch.stack([image for path in files for image in _drawings(path)])
    labels = torch.arange(len(CHARACTERS)).repeat_interleave(DRAWINGS).repeat(len(files))
    mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    held_out = mixed % HELD_OUT_EVERY == 0
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
    kept, trained = mixed[held_out], mixed[~held_out]
    return Glyphs((images[trained], labels[trained]), (images[kept], labels[kept]), digest)


def _has_letters(path: Path) -> bool:
    return not path.stem.endswith("Display")  # DejaVu's Display fonts hold few characters


def _drawings(path: Path) -> list[Tensor]:
    """Every character, DRAWINGS times, in the font of that file."""
    from PIL import Image, ImageDraw, ImageFont

    generator = torch.Generator().manual_seed(len(path.name))
    large, found = SIDE * SCALE, []
    for character in CHARACTERS:
        for turn, size, right, down in torch.rand(DRAWINGS, 4, generator=generator).tolist():
            font = ImageFont.truetype(str(path), round(large * (0.6 + 0.25 * size)))
            drawn = Image.new("L", (large, large))
            middle = large / 2 + SCALE * 3 * (right - 0.5), large / 2 + SCALE * 3 * (down - 0.5)
            ImageDraw.Draw(drawn).text(middle, character, fill=255, font=font, anchor="mm")
            small = drawn.rotate(30 * (turn - 0.5)).resize((SIDE, SIDE), Image.Resampling.BOX)
            found.append(torch.tensor(list(small.tobytes()), dtype=torch.float32).view(1, SIDE, SIDE) / 255)
    return found
