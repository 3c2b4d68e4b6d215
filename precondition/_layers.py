"""Which layers can be preconditioned, and their gradients, inputs and output gradients as matrices.

Note [A layer as matrices]
A layer maps rows a of its input to rows of its output by one matrix W [out, in]. A convolution does so at every output
position: a is the patch under the kernel. With a bias, a has a 1 appended and W the bias as its last column. A grouped
convolution is several such maps side by side, its *blocks*. So everything here has the shape [blocks, rows, columns];
a linear layer has one block.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dear import _C
from dear._names import named_modules

CHUNK_BYTES = 4 << 20  # of a convolution's patches that are laid out at a time

_log = logging.getLogger(__name__)


class Layer(ABC):
    """A module that is preconditioned. See Note [A layer as matrices]."""

    blocks = 1

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.weight: nn.Parameter = module.weight  # type: ignore[assignment]
        bias = getattr(module, "bias", None)
        self.bias: nn.Parameter | None = bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None

    @property
    def params(self) -> tuple[nn.Parameter, ...]:
        """The weight, and the bias where it is trained."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def out_size(self) -> int:
        """Rows of a block's matrix."""
        return self.weight.shape[0] // self.blocks

    @property
    def in_size(self) -> int:
        """Columns of a block's matrix, the bias's included."""
        return math.prod(self.weight.shape[1:]) + (self.bias is not None)

    @property
    def sizes(self) -> tuple[int, int]:
        """``(in_size, out_size)``."""
        return self.in_size, self.out_size

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Tensors like the weight and the bias, such as their gradients, as one: [blocks, out, in]."""
        columns = weight.reshape(self.blocks, self.out_size, -1)
        if self.bias is None:
            return columns
        assert bias is not None
        return torch.cat([columns, bias.reshape(self.blocks, self.out_size, 1)], dim=2)

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`matrix` joined, in the shapes of :attr:`params`."""
        if self.bias is None:
            return (matrix.reshape(self.weight.shape),)
        return matrix[:, :, :-1].reshape(self.weight.shape), matrix[:, :, -1].reshape(self.bias.shape)

    @abstractmethod
    def samples(self, x: Tensor) -> int:
        """How many samples the input has: of those the loss is the mean."""

    @abstractmethod
    def windows(self, x: Tensor) -> Tensor:
        """The rows of the input as a view, [rows ..., blocks, columns ...] without the bias's 1.

        ``rows`` and ``columns`` may be several dimensions, as many as :attr:`row_dims` and the rest.
        """

    @property
    @abstractmethod
    def row_dims(self) -> int:
        """How many of the dimensions of :meth:`windows` count rows."""

    @abstractmethod
    def mean_row(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The mean of the rows of an input, without the bias's 1: flat, in the order of the weight's dimensions."""

    def input_rows(self, x: Tensor) -> Iterator[Tensor]:
        """The rows of the input without the bias's 1, [blocks, rows, columns], a part at a time, so that patches are
        never laid out all at once."""
        windows = self.windows(x)
        bytes_each = windows[:1].numel() * x.element_size()
        for part in windows.split(max(1, CHUNK_BYTES // max(bytes_each, 1))):
            columns = math.prod(self.weight.shape[1:])
            rows = part.reshape(*part.shape[: self.row_dims], self.blocks, columns).flatten(0, self.row_dims - 1)
            yield rows.transpose(0, 1)

    @abstractmethod
    def output_rows(self, grad: Tensor) -> Tensor:
        """The gradient of the output, [blocks, rows, out]."""


class LinearLayer(Layer):
    """``nn.Linear``: every index but the last counts rows."""

    row_dims = 1

    def samples(self, x: Tensor) -> int:
        return x.shape[0] if x.dim() > 1 else 1

    def windows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1, x.shape[-1])

    def mean_row(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.reshape(-1, x.shape[-1]).mean(0, dtype=dtype)

    def output_rows(self, grad: Tensor) -> Tensor:
        return grad.reshape(1, -1, grad.shape[-1])


class ConvLayer(Layer):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, with any stride, padding, dilation and groups."""

    module: nn.modules.conv._ConvNd

    def __init__(self, name: str, module: nn.modules.conv._ConvNd) -> None:
        super().__init__(name, module)
        self.blocks = module.groups
        self._spatial = len(module.kernel_size)

    @property
    def row_dims(self) -> int:
        return 1 + self._spatial

    def _is_batch(self, x: Tensor) -> bool:
        return x.dim() == self._spatial + 2

    def samples(self, x: Tensor) -> int:
        return x.shape[0] if self._is_batch(x) else 1

    def _padded(self, x: Tensor) -> Tensor:
        padding, mode = self.module._reversed_padding_repeated_twice, self.module.padding_mode
        return F.pad(x, padding, "constant" if mode == "zeros" else mode) if any(padding) else x

    def _counts(self, sizes: Sequence[int]) -> list[int]:
        """How many windows lie along each dimension of a padded image of these sizes."""
        conv = self.module
        reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(n - r) // s + 1 for n, r, s in zip(sizes, reach, conv.stride, strict=True)]

    def mean_row(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Patches are not laid out: all samples are averaged first, and then the windows of that one image."""
        image = x.mean(0, keepdim=True, dtype=dtype) if self._is_batch(x) else x[None].to(dtype)
        if not x.is_cpu:
            return self.windows(image).mean(list(range(self.row_dims))).flatten()
        conv, zeros = self.module, self.module.padding_mode == "zeros"
        image = (image if zeros else self._padded(image))[0].contiguous()
        sizes = image.shape[1:]
        padding = conv._reversed_padding_repeated_twice if zeros else [0] * (2 * len(sizes))
        before, after = padding[-2::-2], padding[::-2]
        counts = self._counts([n + b + a for n, b, a in zip(sizes, before, after, strict=True)])
        return _C.mean_of_windows(
            image, list(zip(before, conv.kernel_size, conv.dilation, conv.stride, counts, strict=True))
        )

    def windows(self, x: Tensor) -> Tensor:
        conv = self.module
        x = self._padded(x if self._is_batch(x) else x[None])
        samples, channels, *sizes = x.shape
        own, along, *steps = x.stride()
        counts = self._counts(sizes)
        groups = (self.blocks, channels // self.blocks)
        shape = (samples, *counts, *groups, *conv.kernel_size)
        strides = (
            own, *(step * s for step, s in zip(steps, conv.stride, strict=True)), along * groups[1], along,
            *(step * d for step, d in zip(steps, conv.dilation, strict=True)),
        )  # fmt: skip
        return x.as_strided(shape, strides)

    def output_rows(self, grad: Tensor) -> Tensor:
        if not self._is_batch(grad):
            grad = grad[None]
        places = math.prod(grad.shape[2:])  # not -1, which no batch of 0 samples could tell
        return grad.reshape(grad.shape[0], self.blocks, self.out_size, places).permute(1, 0, 3, 2).flatten(1, 2)


class EmbeddingLayer(Layer):
    """``nn.Embedding``: a linear layer of rows that are 1 at one place, whose weight lies the other way round."""

    MOST_ROWS = 4  # of the weight, for each column: a factor of more costs more than those of the layers behind it
    row_dims = 1
    module: nn.Embedding

    @classmethod
    def pays(cls, module: nn.Embedding) -> bool:
        """Whether it can be served, and costs no more than a wide linear layer."""
        odd = module.sparse or module.scale_grad_by_freq or module.max_norm is not None
        return not odd and module.num_embeddings <= cls.MOST_ROWS * module.embedding_dim

    @property
    def out_size(self) -> int:
        return self.weight.shape[1]

    @property
    def in_size(self) -> int:
        return self.weight.shape[0]

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        return weight.t()[None]

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return (matrix[0].t(),)

    def samples(self, x: Tensor) -> int:
        return x.shape[0] if x.dim() else 1

    def windows(self, x: Tensor) -> Tensor:
        rows = F.one_hot(x.reshape(-1), self.in_size)
        if self.module.padding_idx is not None:  # of which nothing is learnt
            rows[:, self.module.padding_idx] = 0
        return rows[:, None]

    def mean_row(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.windows(x).to(dtype).mean(0).flatten()

    def input_rows(self, x: Tensor) -> Iterator[Tensor]:
        for part in x.reshape(-1).split(max(1, CHUNK_BYTES // (8 * self.in_size))):
            yield self.windows(part).transpose(0, 1)

    def output_rows(self, grad: Tensor) -> Tensor:
        return grad.reshape(1, -1, grad.shape[-1])


#: Subclasses are served, too: they may compute what they like, as long as the output is that of the base class.
SERVED: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Conv3d: ConvLayer,
}


def find_layers(root: nn.Module, trained: set[nn.Parameter], embeddings: bool = False) -> list[Layer]:
    """The layers below ``root`` that can be preconditioned, in the model's order; ``embeddings``: those among them.

    trained: the parameters whose gradients count. A layer whose weight is not among them is none; nor is one that
    shares a parameter with another module, whose use of it nobody captures.
    """
    uses = Counter(param for module in root.modules() for param in module._parameters.values() if param is not None)
    layers: list[Layer] = []
    for name, module in named_modules(root):
        kind = next((layer for served, layer in SERVED.items() if isinstance(module, served)), None)
        if embeddings and isinstance(module, nn.Embedding) and EmbeddingLayer.pays(module):
            kind = EmbeddingLayer
        own = [module._parameters.get(each) for each in ("weight", "bias")]
        held = [param for param in own if isinstance(param, nn.Parameter) and param in trained]
        held = [param for param in held if param.numel()]
        if kind is not None and held and held[0] is own[0] and all(uses[param] == 1 for param in held):
            layers.append(kind(name, module))
    return layers


def left_out(root: nn.Module, layers: list[Layer], trained: set[nn.Parameter]) -> list[str]:
    """The names of the modules of ``root`` with a matrix that stays the optimizer's."""
    served = {param for layer in layers for param in layer.params}
    return [
        f"{name or type(root).__name__} ({type(module).__name__})"
        for name, module in named_modules(root)
        if any(p in trained and p not in served and p.dim() > 1 for p in module._parameters.values() if p is not None)
    ]


def name_left_out(root: nn.Module, layers: list[Layer], trained: set[nn.Parameter]) -> None:
    """One line of the log for all of them."""
    names = left_out(root, layers, trained)
    if names:
        _log.warning("These modules are not preconditioned, and left to the optimizer: %s.", ", ".join(names))
