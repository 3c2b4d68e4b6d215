"""What the training benchmarks train: a model, its data and its loss, by name.

gpt and digits learn something real and need nothing but scikit-learn. The others are the models of the literature, for
GPUs: random weights and synthetic inputs, so their step times count and their losses do not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Examples, Noise, digits, standard_library
from .gpt import GPT, GPTConfig, language_loss

SYNTHETIC = "random weights, synthetic inputs"


class MissingPackage(ImportError):
    """The workload needs a package that is not installed; the message names it."""


@dataclass(frozen=True)
class Workload:
    """A model to train."""

    name: str
    about: str  # what it is, for tables
    package: str | None  # what it needs beside torch
    build: Callable[[], nn.Module]  # with weights from torch's generator; see build_seeded
    loss: Callable[[Any, Tensor], Tensor]  # of the model's output and the targets
    examples: Callable[[], Examples]
    batch: int  # examples per worker and step, unless told otherwise

    def build_seeded(self, seed: int) -> nn.Module:
        """The model with weights that depend on the seed alone. Raises MissingPackage."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._with_package(self.build)

    def data(self) -> Examples:
        """Its examples. Raises MissingPackage."""
        return self._with_package(self.examples)

    def _with_package(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except ImportError as error:
            raise MissingPackage(
                f"{self.name} needs the package {self.package}, which cannot be imported ({error}): "
                f"pip install {self.package}"
            ) from error


def parts(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model cut into its top-level blocks, in order, with their names: lists of blocks are opened, blocks not."""
    for name, child in net.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) or _holds_a_list(child):
            yield from ((f"{name}.{inner}", block) for inner, block in parts(child))
        else:
            yield name, child


def _holds_a_list(module: nn.Module) -> bool:
    return any(isinstance(each, nn.ModuleList) for each in module.modules())


def repeated_blocks(net: nn.Module) -> list[nn.Module]:
    """Of the parts, those that stand in a list: what a model is made of many of."""
    return [part for name, part in parts(net) if name.rpartition(".")[2].isdigit()]


def _classes_loss(output: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets)


def _masked_language_loss(output: Any, targets: Tensor) -> Tensor:
    return language_loss(output.logits, targets)


def _digits_net() -> nn.Module:
    """Two convolutions and two linear layers for images [1, 8, 8], 10 classes: 0.2 M parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 16, 160), nn.ReLU(), nn.Linear(160, 10),
    )  # fmt: skip


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None)

    return build


def _inception_v4() -> nn.Module:
    import timm

    return timm.create_model("inception_v4", pretrained=False)


def _bert(**shape: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        return BertForMaskedLM(BertConfig(**shape))

    return build


def _images(side: int) -> Callable[[], Examples]:
    return lambda: Noise((3, side, side), classes=1000)


def _tokens() -> Examples:
    return Noise((64,), classes=BERT_VOCABULARY, inputs_below=BERT_VOCABULARY)


BERT_VOCABULARY = 30522
_BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

WORKLOADS = {
    each.name: each
    for each in (
        Workload(
            "gpt", "byte-level GPT on the source of Python's standard library", None,
            GPT, language_loss, lambda: standard_library(GPTConfig().sequence), 4,
        ),
        Workload(
            "digits", "small ConvNet on scikit-learn's digits", "scikit-learn", _digits_net, _classes_loss, digits, 32,
        ),
        Workload(
            "resnet50", f"ResNet-50, {SYNTHETIC}", "torchvision", _torchvision("resnet50"), _classes_loss, _images(224),
            64,
        ),
        Workload(
            "densenet201", f"DenseNet-201, {SYNTHETIC}", "torchvision", _torchvision("densenet201"), _classes_loss,
            _images(224), 32,
        ),
        Workload(
            "inception-v4", f"Inception-v4, {SYNTHETIC}", "timm", _inception_v4, _classes_loss, _images(299), 64,
        ),
        Workload(
            "bert-base", f"BERT-Base, 64 tokens, {SYNTHETIC}", "transformers", _bert(), _masked_language_loss, _tokens,
            64,
        ),
        Workload(
            "bert-large", f"BERT-Large, 64 tokens, {SYNTHETIC}", "transformers", _bert(**_BERT_LARGE),
            _masked_language_loss, _tokens, 32,
        ),
    )
}  # fmt: skip
