"""What a compressor computes on this machine: encoding, merging and decoding, timed on gradients of given shapes.

Nothing is sent: what other ranks would send is taken to be what this one sends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from compress.exchange import Exchange
from compress.group import Group, Member, matrix_shape
from compress.groups import make_group, step_alone

from .codecs import Cost, compressor
from .profile import Shape

ELEMENTS = 1 << 20  # of a model's gradients, about: 4 MiB, more than a core's own caches hold
WARM_UP, STEPS = 2, 6
Clock = Callable[[], float]


def measured_costs(names: Iterable[str], group: dist.ProcessGroup, shapes: Sequence[Shape]) -> dict[str, Cost]:
    """Of the compressors of these names (see :func:`.codecs.codec`), on host tensors. Local: ``group`` says only among
    how many ranks they would work.

    shapes: of a model's gradients; the first ones are taken.

    Raises:
        ValueError: no such compressor.
    """
    taken, total = list[Shape](), 0
    for shape in shapes:
        taken.append(shape)
        total += math.prod(shape)
        if total >= ELEMENTS:
            break
    return {name: measured_cost(name, group, taken) for name in names}


def measured_cost(
    name: str, group: dist.ProcessGroup, shapes: Sequence[Shape], clock: Clock = time.perf_counter
) -> Cost:
    """Of one, on gradients of all these shapes, by the fastest of a few steps: what else the machine does is not the
    compressor's."""
    made = compressor(name)
    made.process_group = group
    generator = torch.Generator().manual_seed(group.rank())
    gradients = {f"parameter {index}": torch.randn(shape, generator=generator) for index, shape in enumerate(shapes)}
    made.choose(gradients)
    members, start = [], 0
    for title, gradient in gradients.items():
        members.append(Member(title, start, *matrix_shape(gradient)))
        start += gradient.numel()
    values = torch.cat([gradient.view(-1) for gradient in gradients.values()])
    own = make_group(made, members, values.dtype, values.device, "a probe")
    own.gradient = torch.empty_like(values)
    times = []
    for step in range(WARM_UP + STEPS):
        own.gradient.copy_(values)
        made.initial_step = step + 1  # the one that has begun
        times.append(_step(made, own, clock))
    return Cost(*(min(part) / values.nbytes for part in zip(*times[WARM_UP:], strict=True)))


def _step(made: object, own: Group, clock: Clock) -> tuple[float, float, float]:
    """Seconds of encoding, of what is computed between exchanges, and of decoding."""
    steps = step_alone(made, own)  # type: ignore[arg-type] # a compressor
    spans = []
    while True:
        begun = clock()
        exchange = next(steps, None)
        spans.append(clock() - begun)
        if exchange is None:
            return spans[0], sum(spans[1:-1]), spans[-1]
        _answer(exchange, own.rank, own.world)


def _answer(exchange: Exchange, rank: int, world: int) -> None:
    """As if all ranks had sent what this one does."""
    if exchange.kind == "all_to_all":
        assert exchange.received is not None
        exchange.received.copy_(exchange.tensor)
    elif exchange.kind == "all_gather" and exchange.tensor.numel() % world == 0:
        rows = exchange.tensor.view(world, -1)
        rows.copy_(rows[rank].clone().expand_as(rows))
