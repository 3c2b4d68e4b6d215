"""Inputs that the kernel tests share: lengths, gradient types, alignments and adversarial values."""

import torch
from torch import Tensor

#: Around the word, the block and the threads' grain, and none.
LENGTHS = [0, 1, 31, 32, 33, 4095, 4096, 4097, 3 * 4096 + 17, 70_001]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
VALUES = ["normal", "zero", "equal", "signed zero", "denormal", "huge", "nonfinite", "few", "all nonfinite"]


def gradient(kind: str, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A CPU gradient [n] of one adversarial kind."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=generator)
    index = torch.arange(n)
    values = {
        "normal": normal,
        "zero": torch.zeros(n),
        "equal": torch.where(index % 3 == 0, -0.5, 0.5),
        "signed zero": torch.where(index % 2 == 0, 0.0, -0.0),
        "denormal": normal * 1e-41,
        "huge": normal.sign() * (3e38 if dtype != torch.float16 else 65504.0),
        "nonfinite": torch.where(index % 7 == 3, torch.tensor([torch.inf, -torch.inf, torch.nan])[index % 3], normal),
        "few": (normal * 2).round() / 2,
        "all nonfinite": torch.full((n,), torch.nan),
    }
    return values[kind].to(dtype)


def misaligned(tensor: Tensor, offset: int, device: str = "cpu") -> Tensor:
    """A copy of the flat tensor that starts ``offset`` elements behind an allocation's start."""
    buffer = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
    view = buffer[offset:]
    view.copy_(tensor)
    return view


def counter(n: int, device: str) -> Tensor:
    return torch.zeros(n, dtype=torch.int32, device=device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells +0 from -0, and takes equal NaN as equal."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.cpu().contiguous().view(kind), b.cpu().contiguous().view(kind))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Equal bits, but for those inside a NaN: conversions differ in what they make of them."""
    a, b = a.cpu(), b.cpu()
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0))
