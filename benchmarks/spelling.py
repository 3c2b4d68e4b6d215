"""The gradient compressors as command lines, results and tables name them: acp:4, topk:0.01, sign:majority, int8."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FORMS = (
    "acp:RANK, power:RANK, local:RANK, topk:DENSITY, sign, sign:majority, bf16, fp16, fp8, int8, int4, int3, int2, "
    "exact, safe, fast; RANK is a whole number, a fraction of the smaller side, or how many times fewer elements are "
    "sent, such as 4x; more options may follow: power:8:start=100:exempt=head+bytes, power:8:factors=int8, "
    "int3:scale=element, int3:start=100:first=int8"
)

# Names that earlier versions wrote into results of the collectives, as they begin in JSON.
_EARLIER = {'"acpsgd:': '"acp:', '"powersgd:': '"power:', '"signsgd"': '"sign"'}


@dataclass(frozen=True)
class CompressorName:
    """A compressor with its option, not yet made: each model needs one of its own."""

    kind: str
    option: str | None = None
    more: tuple[str, ...] = ()  # such as start=100; see _MORE

    def __str__(self) -> str:
        return ":".join([self.kind, *filter(None, [self.option]), *self.more])

    @property
    def label(self) -> str:
        """For people: ACP-SGD rank 4."""
        named = {
            "acp": "ACP-SGD rank",
            "power": "Power-SGD rank",
            "local": "local Power-SGD rank",
            "nystrom": "Nyström-SGD rank",
            "topk": "Top-k",
            "sign": "EF-SignSGD",
        }.get(self.kind)
        return " ".join(filter(None, [named or self.kind, self.option, *self.more]))

    @property
    def dense_steps(self) -> int | None:
        """With which it begins; None where that is the optimizer's to say."""
        start = dict(map(_read_more, self.more)).get("start_step")
        if start is None and self.kind in ("safe", "fast"):
            from compress.presets import START

            return START
        start = start or 0
        return start if isinstance(start, int) else None

    @property
    def bits_at_first(self) -> float:
        """Of an element, in these steps."""
        first, steps = dict(map(_read_more, self.more)).get("start_dtype"), self.dense_steps
        if self.kind == "fast" and steps:  # a few dense ones, and then half of the elements in factors of 8 bits
            from compress.presets import FAST_DENSE

            dense = min(FAST_DENSE, steps)
            return (32 * dense + _BITS_AT_FIRST["int8"] / 2 * (steps - dense)) / steps
        if self.kind == "safe":
            first = first or "int8"
        return 32.0 if first is None else _BITS_AT_FIRST[first]

    def make(self, **more: Any) -> Any:
        """A new compressor, with `more` of its options. Raises ImportError where this library is not built."""
        import torch

        import compress  # here, since torch's own strategies can be measured where it is not built

        more = dict(map(_read_more, self.more)) | more
        for option in ("start_dtype", "factor_dtype"):
            if option in more:
                more[option] = getattr(torch, _DENSE.get(more[option], more[option]))
        match self.kind:
            case "acp":
                return compress.ACPSGD(rank=_rank(self.option), **more)
            case "power":
                return compress.PowerSGD(rank=_rank(self.option), **more)
            case "local":
                return compress.LocalPowerSGD(rank=_rank(self.option), **more)
            case "exact" | "safe" | "fast":
                return compress.preset(self.kind, **more)
            case "topk":
                return compress.TopK(density=float(self.option or 0), **more)
            case "sign":
                return compress.SignSGD(vote="majority" if self.option else "mean", **more)
        return compress.Dense(getattr(torch, _DENSE[self.kind]), **more)


def split_name(parts: Sequence[str]) -> tuple[CompressorName, list[str]]:
    """The compressor at the head of a strategy's parts, and the parts behind it.

    Raises ValueError where the option is missing or not one.
    """
    kind, *rest = parts
    more = tuple(word for word in rest if "=" in word)
    for word in more:
        _read_more(word)
    rest = [word for word in rest if "=" not in word]
    accepts = _OPTIONS[kind]
    if rest and accepts(rest[0]):
        return CompressorName(kind, rest[0], more), rest[1:]
    if kind in ("acp", "power", "local", "topk"):
        raise ValueError(f"{':'.join(parts)!r} has no option that {kind} takes")
    return CompressorName(kind, None, more), rest


def _read_more(word: str) -> tuple[str, Any]:
    """An option of the compressor and its value, from a word such as start=100. Raises ValueError."""
    name, _, value = word.partition("=")
    if name not in _MORE or not value:
        raise ValueError(f"{word!r} is no option of a compressor here")
    option, read = _MORE[name]
    return option, read(value)


def whole(text: str) -> bool:
    """A rank: from 1 to 256."""
    return text.isdigit() and 1 <= int(text) <= 256


def _rank(text: str | None) -> int | float | str:
    if text is None or text.isdigit():
        return int(text or 0)
    return text if text.endswith("x") else float(text)


def _whole_or_share(text: str) -> bool:
    return whole(text) or (_share(text) and float(text) < 1) or re.fullmatch(r"\d+(\.\d+)?x", text) is not None


def _share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def _one_of(values: dict[str, Any]) -> Callable[[str], Any]:
    """Reads one of these words. Raises ValueError for any other."""

    def read(text: str) -> Any:
        if text not in values:
            raise ValueError(f"{text!r} is none of {', '.join(values)}")
        return values[text]

    return read


# Dense gradients by kind: what an element is on the wire.
_DENSE = {
    "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn",
    **{name: name for name in ("int8", "int4", "int3", "int2")},
}  # fmt: skip

# What the steps before start= may be sent in, and bits of an element then, its share of a scale among them.
_BITS_AT_FIRST = {"bf16": 16.0, "fp16": 16.0, "fp8": 8 + 8 / 128, "int8": 8 + 8 / 128}

# What any compressor takes, by the word before "=": its option, and what reads the value.
_MORE: dict[str, tuple[str, Callable[[str], Any]]] = {
    "start": ("start_step", lambda text: text if text == "warmup" else int(text)),
    "exempt": ("exempt", lambda text: text.split("+")),
    "feedback": ("error_feedback", _one_of({"yes": True, "no": False})),
    "scale": ("scale", _one_of({"block": "block", "element": "element"})),
    "first": ("start_dtype", _one_of({name: name for name in _BITS_AT_FIRST})),
    "factors": ("factor_dtype", _one_of({name: name for name in ("bf16", "int8", "float32")})),
}

# By kind: whether a word is an option of it.
_OPTIONS: dict[str, Callable[[str], bool]] = {
    "acp": _whole_or_share,
    "power": _whole_or_share,
    "local": _whole_or_share,
    "topk": _share,
    "sign": "majority".__eq__,
    **dict.fromkeys(_DENSE, lambda _: False),
    **dict.fromkeys(("exact", "safe", "fast"), lambda _: False),
}


def of_today(text: str) -> str:
    """A result's JSON with the names of compressors as they are spelled today."""
    for earlier, today in _EARLIER.items():
        text = text.replace(earlier, today)
    return text
