"""The autoencoder of the K-FAC papers, cut down to digits of 8 x 8 pixels.

Hinton and Salakhutdinov, 2006; Martens and Grosse, 2015: sigmoid-like layers that narrow to a code and widen again,
trained by the cross-entropy of pixels. There 784-1000-500-250-30 and back; here 64-256-128-64-12 and back.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ..training.data import Batch, Examples, Images, digits
from ..training.workloads import WORKLOADS, Workload

WIDTHS = (64, 256, 128, 64, 12, 64, 128, 256, 64)


def _net() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(WIDTHS):
        code = outputs == min(WIDTHS)
        layers += [nn.Linear(inputs, outputs)] + ([] if code else [nn.Tanh()])
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Itself(Examples):
    """Images whose targets are their own pixels."""

    images: Images

    @property
    def digest(self) -> str:  # type: ignore[override]
        """That of the images."""
        return self.images.digest

    def batch(self, step: int, **where: int) -> Batch:
        images, _ = self.images.batch(step, **where)
        return images, images.flatten(1)

    def held_out(self, count: int) -> Batch:
        images, _ = self.images.held_out(count)
        return images, images.flatten(1)


def _loss(logits: Tensor, pixels: Tensor) -> Tensor:
    """Cross-entropy, summed over pixels, in nats per image."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(pixels)


AUTOENCODER = Workload(
    "autoencoder", "K-FAC's autoencoder on scikit-learn's digits", "scikit-learn", _net, lambda: Itself(digits()), 32,
    _loss,
)  # fmt: skip
KNOWN = {"gpt": WORKLOADS["gpt"], "digits": WORKLOADS["digits"], "autoencoder": AUTOENCODER}
