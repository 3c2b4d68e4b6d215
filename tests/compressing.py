"""A model whose gradients a test prescribes, so that what a compressor makes of them can be computed beside it."""

from typing import Any

import torch
import torch.distributed as dist
from place import place
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import compress

#: Two equal matrices, a wide one, a convolution, a long vector and a short one; several whole blocks for each owner.
SHAPES = {
    "first": (300, 50),
    "vector": (5000,),
    "second": (300, 50),
    "bias": (33,),
    "wide": (20, 900),
    "convolution": (32, 24, 3, 3),
}
SEVERAL_BUCKETS = {"bucket_cap_mb": 0.08}


class Prescribed(nn.Module):
    """Its output's derivative by each parameter is what it was called with."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * grads[name].to(p.dtype)).sum() for name, p in self.named_parameters()]).sum()


class Sometimes(Prescribed):
    """Uses the parameters only that it is called with gradients for."""

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * grads[n]).sum() for n, p in self.named_parameters() if n in grads]).sum()


def gradients(rank: int, step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Random gradients of a rank and step, with what ranks have in common and heavy tails."""
    common = torch.Generator().manual_seed(7_000 + step)
    own = torch.Generator().manual_seed(1_000 * rank + step)
    return {
        name: torch.randn(shape, generator=common) + 0.3 * torch.randn(shape, generator=own) ** 3
        for name, shape in shapes.items()
    }


def attach(compressor: compress.Compressor, named: bool = True, net: nn.Module | None = None, **ddp: Any) -> DDP:
    """A DDP module with the compressor as its hook."""
    model = DDP((net if net is not None else Prescribed()).to(place()), **(SEVERAL_BUCKETS | ddp))
    if named:
        compress.register(model, compressor)
    else:
        model.register_comm_hook(compressor, compress.comm_hook)
    return model


def backward(model: DDP, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """One backward pass; the aggregated gradients, on the host."""
    model.zero_grad()
    model({name: grad.to(place()) for name, grad in grads.items()}).backward()
    return {name: p.grad.cpu().clone() for name, p in model.module.named_parameters() if p.grad is not None}


def everyones(value: Any) -> list[Any]:
    """What each rank passed."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def kept(compressor: compress.Compressor) -> dict[str, Tensor]:
    """The error feedback of all ranks, in float64 and units of the sum of the gradients."""
    total: dict[str, Tensor] = {}
    for state in everyones(compressor.state_dict()):
        for name, error in state["errors"].items():
            error = error.cpu().double()
            first, values = state["owned"].get(name, (0, error[:0]))
            error[first : first + values.numel()] += state["world_size"] * values.cpu().double()
            total[name] = total.get(name, 0) + error
    return total


def dense_in_parts(part_numel: int, **options: Any) -> compress.Dense:
    """16 bits, with buckets that are cut into groups of about so many elements."""
    compressor = compress.Dense(torch.bfloat16, error_feedback=True, **options)
    compressor.part_numel = part_numel
    return compressor


KINDS = {
    "acp": lambda **o: compress.ACPSGD(rank=3, **o),
    "power": lambda **o: compress.PowerSGD(rank=3, **o),
    "local": lambda **o: compress.LocalPowerSGD(rank=3, **o),
    "power8": lambda **o: compress.PowerSGD(rank=3, **({"factor_dtype": torch.int8} | o)),
    "topk": lambda **o: compress.TopK(density=0.05, **o),
    "threshold": lambda **o: compress.TopK(density=0.7, selection="threshold", **({"min_compression_ratio": 0.1} | o)),
    "sign": lambda **o: compress.SignSGD(**o),
    "bf16": lambda **o: compress.Dense(torch.bfloat16, error_feedback=True, **o),
    "int8": lambda **o: compress.Dense(torch.int8, **({"min_compression_ratio": 0.2} | o)),
    "int3": lambda **o: compress.Dense(torch.int3, **({"min_compression_ratio": 0.2, "exempt": ()} | o)),
    # Not cut alike before and after DDP rebuilds the buckets of SHAPES.
    "parts": lambda **o: dense_in_parts(12_000, **o),
}
