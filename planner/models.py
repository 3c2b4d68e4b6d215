"""Built-in models, by formula from their published shapes: parameters and floating-point operations of each layer.

A model is a list of layers in forward order. Operations are those of one example's forward pass, a multiplication and
an addition being two; a backward pass is taken to cost twice as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .profile import Layer, Profile, Shape

BACKWARD = 2.0  # times the forward pass: gradients of the inputs and of the parameters
UPDATE_BYTES = 7 * 4  # that Adam moves for each element: reads four numbers, writes three


Kernel = int | tuple[int, int]


@dataclass(frozen=True)
class Block:
    """A layer: its parameters, and the operations of one example."""

    name: str
    shapes: tuple[Shape, ...]
    operations: float


@dataclass(frozen=True)
class Model:
    """about: what the shapes assume, such as the number of tokens of an example. activations: bytes that one example
    keeps from forward to backward, in 32 bits. handed: numbers of one example that a layer hands to the next, 0 where
    layers are not in a row."""

    name: str
    about: str
    blocks: tuple[Block, ...]
    activations: float = 0.0
    handed: float = 0.0

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for block in self.blocks for shape in block.shapes)

    @property
    def operations(self) -> float:
        return sum(block.operations for block in self.blocks)

    def profile(self, compute_seconds: float, update_seconds: float = 0.0, element_bytes: int = 4) -> Profile:
        """The step that takes ``compute_seconds`` forward and backward, shared out by operations."""
        each = compute_seconds / (1 + BACKWARD) / self.operations
        layers = (
            Layer(block.name, block.shapes, each * block.operations, BACKWARD * each * block.operations)
            for block in self.blocks
        )
        return Profile(self.name, tuple(layers), update_seconds, element_bytes=element_bytes)


def transformer(
    name: str,
    depth: int,
    width: int,
    vocabulary: int,
    tokens: int,
    *,
    hidden: int = 0,
    positions: int = 0,
    gated: bool = False,
    biases: bool = True,
    key_width: int = 0,
    extra_embeddings: int = 0,
    first_norm: bool = False,
    pooler: bool = False,
    head: bool = False,
    causal: bool = True,
) -> Model:
    """key_width: of keys and of values, where they have fewer heads than queries. head: an output layer with a weight
    of its own (one that is tied to the embedding has operations and no parameters). gated: an MLP of three matrices."""
    hidden, key_width = hidden or 4 * width, key_width or width
    norms = (2 if biases else 1) * ((width,),)

    def linear(label: str, ins: int, outs: int, more: float = 0.0, *before: Shape) -> Block:
        shapes = (*before, (outs, ins), *(((outs,),) if biases else ()))
        return Block(label, shapes, 2.0 * tokens * ins * outs + more)

    embeddings = ((vocabulary, width), *(((positions, width),) if positions else ()))
    embeddings += ((extra_embeddings, width),) if extra_embeddings else ()
    blocks = [Block("embeddings", embeddings + (norms if first_norm else ()), 0.0)]
    attention = 4.0 * tokens * tokens * width * (0.5 if causal else 1.0)  # scores, and their products with the values
    for number in range(depth):
        at = f"{number}."
        blocks.append(linear(at + "query, key, value", width, width + 2 * key_width, attention, *norms))
        blocks.append(linear(at + "projection", width, width))
        blocks.append(linear(at + "mlp in", width, (1 + gated) * hidden, 0.0, *norms))
        blocks.append(linear(at + "mlp out", hidden, width))
    output = (*(() if first_norm else norms), *(((vocabulary, width),) if head else ()))
    if pooler:
        blocks.append(linear("pooler", width, width))
    blocks.append(Block("output", output, 2.0 * tokens * width * vocabulary))
    kept = 4.0 * tokens * depth * (10 * width + (3 if gated else 2) * hidden)
    return Model(name, f"{tokens} tokens an example", tuple(blocks), kept, float(tokens * width))


@dataclass
class _Net:
    """A convolutional network as it is put together: remembers channels and the side of the picture."""

    side: int
    channels: int = 3
    blocks: list[Block] = field(default_factory=list)
    kept: float = 0.0

    def conv(
        self,
        outs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        ins: int = 0,
        padded: bool = True,
        norm: int = 0,
    ) -> int:
        """A convolution without bias, and its batch norm (over ``norm`` channels where it stands before).

        Returns its outputs."""
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        ins = ins or self.channels
        side = math.ceil(self.side / stride) if padded else (self.side - max(height, width)) // stride + 1
        normed = norm or outs
        operations = 2.0 * side * side * outs * ins * height * width
        shapes: tuple[Shape, ...] = ((outs, ins, height, width), (normed,), (normed,))
        self.blocks.append(Block(f"convolution {len(self.blocks)}", shapes, operations))
        self.kept += 4.0 * (side * side * outs * 2)
        return outs

    def branches(self, *branches: tuple[tuple[int, Kernel], ...]) -> None:
        """Several chains side by side, at full size."""
        for steps in branches:
            self.chain(*steps)

    def chain(self, *steps: tuple[int, Kernel], stride: int = 1, padded: bool = True) -> int:
        """Convolutions one after another on a branch, the last with that stride and padding; the branch's outputs."""
        ins = self.channels
        for index, (outs, kernel) in enumerate(steps):
            last = index == len(steps) - 1
            ins = self.conv(outs, kernel, stride if last else 1, ins, padded or not last)
        return ins

    def to(self, channels: int, shrink: int = 1, padded: bool = True) -> None:
        self.channels = channels
        if shrink > 1:
            self.side = math.ceil(self.side / shrink) if padded else (self.side - 3) // shrink + 1

    def finish(self, name: str, norm: bool = False, classes: int = 1000) -> Model:
        shapes: tuple[Shape, ...] = ((classes, self.channels), (classes,))
        if norm:
            shapes = ((self.channels,), (self.channels,), *shapes)
        self.blocks.append(Block("classes", shapes, 2.0 * classes * self.channels))
        return Model(name, "pictures of ImageNet's size", tuple(self.blocks), self.kept)


def resnet50() -> Model:
    net = _Net(224)
    net.conv(64, 7, 2)
    net.to(64, 4)
    for width, repeats, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(repeats):
            shrink = stride if index == 0 else 1
            net.conv(width, 1)
            net.conv(width, 3, shrink, width)
            before = net.side
            net.side = math.ceil(before / shrink)
            net.conv(4 * width, 1, 1, width)
            if index == 0:
                net.side = before
                net.conv(4 * width, 1, shrink)
                net.side = math.ceil(before / shrink)
            net.to(4 * width)
    return net.finish("resnet50")


def densenet201() -> Model:
    net = _Net(224)
    net.conv(64, 7, 2)
    net.to(64, 4)
    for number, repeats in enumerate((6, 12, 48, 32)):
        for _ in range(repeats):
            net.conv(128, 1, norm=net.channels)
            net.conv(32, 3, ins=128, norm=128)
            net.to(net.channels + 32)
        if number < 3:
            net.conv(net.channels // 2, 1, norm=net.channels)
            net.to(net.channels // 2, 2)
    return net.finish("densenet201", norm=True)


def inception_v4() -> Model:
    net = _Net(299)
    for outs, stride, padded in ((32, 2, False), (32, 1, False), (64, 1, True)):
        net.conv(outs, 3, stride, padded=padded)
        net.to(outs)
        net.side = net.side if padded else (net.side - 3) // stride + 1
    net.to(64 + net.conv(96, 3, 2, padded=False), 2, padded=False)
    across, down = (1, 7), (7, 1)
    width = net.chain((64, 1), (96, 3), padded=False)
    width += net.chain((64, 1), (64, across), (64, down), (96, 3), padded=False)
    net.to(width)
    net.side -= 2
    net.to(net.channels + net.conv(192, 3, 2, padded=False), 2, padded=False)
    for _ in range(4):
        net.branches(((96, 1),), ((64, 1), (96, 3)), ((64, 1), (96, 3), (96, 3)), ((96, 1),))
    width = net.chain((384, 3), stride=2, padded=False)
    width += net.chain((192, 1), (224, 3), (256, 3), stride=2, padded=False)
    net.to(net.channels + width, 2, padded=False)
    for _ in range(7):
        net.branches(((384, 1),), ((192, 1), (224, across), (256, down)), ((128, 1),))
        net.branches(((192, 1), (192, down), (224, across), (224, down), (256, across)))
    width = net.chain((192, 1), (192, 3), stride=2, padded=False)
    width += net.chain((256, 1), (256, across), (320, down), (320, 3), stride=2, padded=False)
    net.to(net.channels + width, 2, padded=False)
    across, down = (1, 3), (3, 1)
    for _ in range(3):
        net.branches(((256, 1),), ((256, 1),), ((384, 1), (256, across)))
        net.conv(256, down, ins=384)
        net.branches(((384, 1), (448, down), (512, across), (256, across)))
        net.conv(256, down, ins=512)
    return net.finish("inception_v4")


def _bert(name: str, depth: int, width: int) -> Model:
    shape = {"positions": 512, "extra_embeddings": 2, "first_norm": True, "pooler": True, "causal": False}
    return transformer(name, depth, width, 30522, 64, **shape)  # type: ignore[arg-type]


def _gpt2(name: str, depth: int, width: int) -> Model:
    return transformer(name, depth, width, 50257, 1024, positions=1024)


def _llama(name: str, depth: int, width: int, hidden: int, key_width: int = 0) -> Model:
    return transformer(
        name, depth, width, 32000, 2048, hidden=hidden, gated=True, biases=False, key_width=key_width, head=True
    )


def byte_gpt(tokens: int = 128) -> Model:
    """The GPT of this project's training benchmarks."""
    return transformer("gpt", 6, 384, 256, tokens, positions=128, head=True)


def digits_net() -> Model:
    """The small ConvNet of this project's training benchmarks."""
    shapes = (((32, 1, 3, 3), (32,)), ((64, 32, 3, 3), (64,)), ((160, 1024), (160,)), ((10, 160), (10,)))
    operations = (2.0 * 64 * 32 * 9, 2.0 * 64 * 64 * 32 * 9, 2.0 * 160 * 1024, 2.0 * 10 * 160)
    blocks = (Block(f"layer {i}", *each) for i, each in enumerate(zip(shapes, operations, strict=True)))
    return Model("digits", "pictures of 8 by 8", tuple(blocks))


MODELS: dict[str, Callable[[], Model]] = {
    "resnet50": resnet50,
    "densenet201": densenet201,
    "inception_v4": inception_v4,
    "bert-base": lambda: _bert("bert-base", 12, 768),
    "bert-large": lambda: _bert("bert-large", 24, 1024),
    "gpt2": lambda: _gpt2("gpt2", 12, 768),
    "gpt2-medium": lambda: _gpt2("gpt2-medium", 24, 1024),
    "gpt2-large": lambda: _gpt2("gpt2-large", 36, 1280),
    "gpt2-xl": lambda: _gpt2("gpt2-xl", 48, 1600),
    "llama-7b": lambda: _llama("llama-7b", 32, 4096, 11008),
    "llama-13b": lambda: _llama("llama-13b", 40, 5120, 13824),
    "llama-70b": lambda: _llama("llama-70b", 80, 8192, 28672, key_width=1024),
}
BENCHMARKED: dict[str, Callable[[], Model]] = {"gpt": byte_gpt, "digits": digits_net}


def built_in(name: str) -> Model:
    """Raises ValueError, which names what there is."""
    known = MODELS | BENCHMARKED
    if name not in known:
        raise ValueError(f"Model {name!r} is not built in: name one of {', '.join(known)}, or a class as MODULE:CLASS.")
    return known[name]()
