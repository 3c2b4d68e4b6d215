"""What the training benchmarks train: a model, its data and its loss, by name.

gpt, gpt-small, digits and glyphs learn something real and need no download. The others are the models of the
literature, for GPUs: random weights and synthetic inputs, so their step times count and their losses do not.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Examples, Noise, digits, standard_library
from .glyphs import CHARACTERS, glyphs
from .gpt import GPT, SEQUENCE, language_loss

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
    examples: Callable[[], Examples]
    batch: int  # examples per worker and step, unless told otherwise
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy  # of the model's output and the targets

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
        holds_a_list = any(isinstance(each, nn.ModuleList) for each in child.modules())
        if holds_a_list or isinstance(child, nn.Sequential):
            yield from ((f"{name}.{inner}", block) for inner, block in parts(child))
        else:
            yield name, child


def repeated_blocks(net: nn.Module) -> list[nn.Module]:
    """Of the parts, those that stand in a list: what a model is made of many of."""
    return [part for name, part in parts(net) if name.rpartition(".")[2].isdigit()]


def _digits_net() -> nn.Module:
    """Two convolutions and two linear layers for images [1, 8, 8], 10 classes: 0.2 M parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 16, 160), nn.ReLU(), nn.Linear(160, 10),
    )  # fmt: skip


def _glyphs_net() -> nn.Module:
    """Two convolutions and two linear layers for images [1, 16, 16], 62 classes: 0.2 M parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 16, 160), nn.ReLU(), nn.Linear(160, len(CHARACTERS)),
    )  # fmt: skip


def _gpt_small() -> nn.Module:
    """0.14 M parameters, for thousands of steps on few cores."""
    return GPT(layers=2, width=64, heads=2)


def _image_model(name: str, title: str, package: str, make: str, side: int, batch: int) -> Workload:
    """make: the package's function, such as timm:create_model, that is given the name."""
    module, _, function = make.partition(":")

    def build() -> nn.Module:
        return getattr(importlib.import_module(module), function)(name.replace("-", "_"))  # type: ignore[no-any-return]

    noise = Noise((3, side, side), classes=1000)
    return Workload(name, f"{title}, {SYNTHETIC}", package, build, lambda: noise, batch)


def _bert(name: str, title: str, batch: int, **shape: int) -> Workload:
    def build() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **shape))

    def loss(output: Any, targets: Tensor) -> Tensor:
        return language_loss(output.logits, targets)

    noise = Noise((64,), classes=VOCABULARY, inputs_below=VOCABULARY)
    return Workload(name, f"{title}, 64 tokens, {SYNTHETIC}", "transformers", build, lambda: noise, batch, loss)


VOCABULARY = 30522  # BERT's
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_GPT = "byte-level GPT on the source of Python's standard library"

WORKLOADS = {
    each.name: each
    for each in (
        Workload("gpt", _GPT, None, GPT, lambda: standard_library(SEQUENCE), 4, language_loss),
        Workload("gpt-small", f"small {_GPT}", None, _gpt_small, lambda: standard_library(SEQUENCE), 2, language_loss),
        Workload("glyphs", "small ConvNet on rendered characters with noise", "matplotlib", _glyphs_net, glyphs, 16),
        Workload("digits", "small ConvNet on scikit-learn's digits", "scikit-learn", _digits_net, digits, 32),
        _image_model("resnet50", "ResNet-50", "torchvision", "torchvision.models:get_model", 224, 64),
        _image_model("densenet201", "DenseNet-201", "torchvision", "torchvision.models:get_model", 224, 32),
        _image_model("inception-v4", "Inception-v4", "timm", "timm:create_model", 299, 64),
        _bert("bert-base", "BERT-Base", 64),
        _bert("bert-large", "BERT-Large", 32, **_LARGE),
    )
}
