"""The gradient compressors as the benchmarks' command lines name them: acp:4, topk:0.01, sign:majority, bf16."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Names that earlier versions wrote into results of the collectives, as they begin in JSON.
_EARLIER = {'"acpsgd:': '"acp:', '"powersgd:': '"power:', '"signsgd"': '"sign"'}

# `compress` is imported where a compressor is made: torch's own strategies can be measured where it is not built.

FORMS = "acp:RANK, power:RANK, topk:DENSITY, sign, sign:majority, bf16, fp16"


@dataclass(frozen=True)
class CompressorName:
    """A compressor with its option, not yet made: each model needs one of its own."""

    kind: str
    option: str | None = None

    def __str__(self) -> str:
        return self.kind if self.option is None else f"{self.kind}:{self.option}"

    def make(self, **more: Any) -> Any:
        """A new compressor, with `more` of its options. Raises ImportError where this library is not built."""
        import torch

        import compress

        makers: dict[str, Callable[[str], Any]] = {
            "acp": lambda rank: compress.ACPSGD(rank=int(rank), **more),
            "power": lambda rank: compress.PowerSGD(rank=int(rank), **more),
            "topk": lambda density: compress.TopK(density=float(density), **more),
            "sign": lambda vote: compress.SignSGD(vote="majority" if vote else "mean", **more),
            "bf16": lambda _: compress.Dense(torch.bfloat16, **more),
            "fp16": lambda _: compress.Dense(torch.float16, **more),
        }
        return makers[self.kind](self.option or "")


def is_compressor(kind: str) -> bool:
    """Whether a strategy's first word names a compressor."""
    return kind in _OPTIONS


def split_name(parts: Sequence[str]) -> tuple[CompressorName, list[str]]:
    """The compressor at the head of a strategy's parts, and the parts behind it.

    Raises ValueError where the option is missing or not one.
    """
    kind, *rest = parts
    needs = _OPTIONS[kind]
    if needs is None:
        return CompressorName(kind), rest
    if kind == "sign" and rest[:1] != ["majority"]:
        return CompressorName(kind), rest
    if not rest or not needs(rest[0]):
        raise ValueError(f"{':'.join(parts)!r} has no option that {kind} takes")
    return CompressorName(kind, rest[0]), rest[1:]


def whole(text: str) -> bool:
    """A rank: from 1 to 256."""
    return text.isdigit() and 1 <= int(text) <= 256


def _share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


# By kind: what its option must be; None where it takes none.
_OPTIONS: dict[str, Callable[[str], bool] | None] = {
    "acp": whole,
    "power": whole,
    "topk": _share,
    "sign": lambda text: text == "majority",
    "bf16": None,
    "fp16": None,
}


def of_today(text: str) -> str:
    """A result's JSON with the names of compressors as they are spelled today."""
    for earlier, today in _EARLIER.items():
        text = text.replace(earlier, today)
    return text
