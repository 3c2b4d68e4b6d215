"""Each compressor end to end: encode, exchange, decode, with what it sends and how far off its result is."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

import compress
import dear
from compress.exchange import Exchange
from compress.group import Group, Member
from compress.groups import make_group, step_alone

from .. import spelling
from .exact import Method, Place, Placement

SIDE = 1024  # of the matrices that the gradient is made of, as in a Transformer; smaller where the gradient is
SPECTRUM = 32  # singular values that all ranks share: of strength 1, 1/2, 1/3, ...
NOISE = 0.5  # standard deviation of what each rank adds of its own
ERROR_STEPS = 4  # Power-SGD and ACP-SGD find their subspace in the first few

INPUT = (
    f"matrices of up to {SIDE} x {SIDE}: a common part with {SPECTRUM} singular values 1/i of Gaussian vectors, plus "
    f"Gaussian noise of {NOISE} of each rank's own"
)


def members(count: int) -> list[Member]:
    """`count` elements as square matrices of one size, and the rest as a vector."""
    side = 1
    while side < SIDE and (2 * side) ** 2 <= count:
        side *= 2
    cut = [Member(f"matrix {i}", i * side * side, side, side) for i in range(count // (side * side))]
    rest = count - len(cut) * side * side
    return cut + ([Member("rest", count - rest, rest, 1)] if rest else [])


def gradient(cut: list[Member], rank: int) -> Tensor:
    """A rank's gradient [count] float32, with a spectrum that falls as real ones do (see INPUT)."""
    common = torch.Generator().manual_seed(1)
    own = torch.Generator().manual_seed(2 + rank)
    strengths = 1 / torch.arange(1, SPECTRUM + 1)
    made = []
    for member in cut:
        left = torch.randn(member.rows, SPECTRUM, generator=common) * strengths
        right = torch.randn(SPECTRUM, member.columns, generator=common)
        made.append(left @ right + NOISE * torch.randn(member.rows, member.columns, generator=own))
    return torch.cat([matrix.view(-1) for matrix in made])


class Compressed(Method):
    """One compressor on one fusion group, as it works in training: with error feedback, on a fresh gradient each run.

    encode is what is computed before the first exchange, decode all that is computed after it (Power-SGD's second
    factor and an owner's merging among it), communicate the exchanges themselves. On a GPU each part ends with a
    synchronisation, or its end could not be seen.
    """

    lossy = True
    placements = ("in_place",)
    compressor_name: ClassVar[spelling.CompressorName]

    def __init__(self, place: Place, group: dist.ProcessGroup, placement: Placement) -> None:
        super().__init__(place, group, placement)
        if place.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"gradients of {place.dtype} travel dense: choose float, half or bfloat16 with --dtype")
        self.cut = members(place.count)
        self.pristine = gradient(self.cut, place.worker.rank).to(self.data)
        self.compressor, self.work = self.build()
        self.series: dict[str, list[float]] = defaultdict(list)

    def build(self, **options: Any) -> tuple[compress.Compressor, Group]:
        compressor = self.compressor_name.make(process_group=self.group, **options)
        work = make_group(compressor, self.cut, self.place.dtype, self.place.worker.device, self.name)
        if not compressor.compresses(work):
            raise ValueError(f"a gradient of {self.place.count} elements would not shrink, and so travels dense")
        work.gradient = self.data
        return compressor, work

    def reset(self) -> None:
        self.data.copy_(self.pristine)

    prepare = reset

    def run(self) -> None:
        spent, _ = step(self.compressor, self.work, self.group, self.place.worker.synchronize)
        for name, seconds in spent.items():
            self.series[f"{name}_us"].append(round(seconds * 1e6, 1))

    def parts(self) -> dict[str, list[float]]:
        series, self.series = dict(self.series), defaultdict(list)
        return series

    def wrong(self) -> int:
        return 0

    def facts(self) -> dict[str, Any]:
        """Bytes of the gradient, bytes that one rank must send, and the relative error of one step.

        The error is |result - mean|² / |mean|² without error feedback, in the last of ERROR_STEPS steps on the same
        gradients: what one step loses, which error feedback then makes up for.
        """
        mean = dear.all_reduce(self.pristine.float(), op="avg", group=self.group).wait()
        compressor, work = self.build(error_feedback=False)
        for _ in range(ERROR_STEPS):
            self.reset()
            _, wire_bytes = step(compressor, work, self.group, self.place.worker.synchronize)
        lost = (self.data.double() - mean.double()).square().sum() / mean.double().square().sum()
        return {
            "raw_bytes": self.data.numel() * self.data.element_size(),
            "wire_bytes": wire_bytes,
            "vnmse": float(lost),
            "input": INPUT,
        }


def step(
    compressor: compress.Compressor, work: Group, group: dist.ProcessGroup, synchronize: Callable[[], None]
) -> tuple[dict[str, float], int]:
    """One step of one group alone: the seconds it spent encoding, communicating and decoding, and the bytes it sent."""
    compressor.initial_step += 1
    spent = {"encode": 0.0, "communicate": 0.0, "decode": 0.0}
    doing = "encode"
    mark = time.perf_counter()
    sent = 0

    def lap(name: str) -> None:
        nonlocal mark
        synchronize()
        now = time.perf_counter()
        spent[name] += now - mark
        mark = now

    for each in step_alone(compressor, work):
        lap(doing)
        exchange(each, group)
        sent += each.bytes_sent(group.size())
        lap("communicate")
        doing = "decode"
    lap(doing)
    return spent, sent


def exchange(wanted: Exchange, group: dist.ProcessGroup) -> None:
    """Performs one exchange by itself."""
    flat = wanted.tensor.view(-1)
    if wanted.kind == "all_to_all":
        assert wanted.received is not None
        dear.all_to_all(flat, wanted.received.view(-1), group=group).wait()
        return
    begin, end = dear.shard_range(flat.numel(), dist.get_world_size(group), dist.get_rank(group))
    if wanted.kind == "reduce_scatter":
        dear.reduce_scatter(flat, flat[begin:end], op="avg", group=group).wait()
    else:
        dear.all_gather(flat[begin:end], flat, group=group).wait()


def _method(name: str) -> type[Method]:
    compressor, _ = spelling.split_name(name.split(":"))
    return type(name, (Compressed,), {"name": name, "compressor_name": compressor})


COMPRESSORS = [_method(name) for name in ("bf16", "acp:4", "power:4", "topk:0.01", "sign")]
