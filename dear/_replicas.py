"""Replicas compared: every so many steps, a checksum of each parameter and one of the optimizers' options go round, and
ranks that differ are named.

Replicas are equal by construction. What parts them comes from outside: a parameter changed on one rank only, a damaged
memory, a loaded checkpoint that was not the same everywhere, a learning rate that follows a loss of one rank's own.
Training goes on without an error then, and is of no use.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _C, _ddp
from dear._agree import agree
from dear._attached import Attached
from dear._context import StepContext, ordinary
from dear._objects import all_gather_object
from dear._options import options_of
from dear.collectives import shard_range


def check_interval(steps: Any) -> None:
    """Refuses what is no interval.

    Raises:
        ValueError: it is not an integer from 0.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"check_replicas must be a number of steps, or 0 for no check, not {steps!r}.")


def check_replicas(attached: Attached, step: int) -> None:
    """Compares the parameters of all ranks, after waiting for them, the options of their optimizers, and what was done
    to gradients in shards. Collective, at a step boundary.

    Raises:
        RuntimeError: they are not equal, bit for bit; on every rank. It names the ranks that differ from most of them,
            or from rank 0 where as many have one value as another, and the first such parameter or option. Or their
            scripts have changed gradients otherwise.
    """
    attached.synchronize()
    options = options_of([user.optimizer for user in attached.users])
    with ordinary(StepContext(attached.device, grad=False)):
        own = zlib.crc32(repr(options).encode()), attached.changes.total
        rows = _gather(attached, [*_C.checksums(attached.params), *own])
        if len({row[-2] for row in rows}) > 1:
            _raise_other_options(attached, options, step)
        _check_changes([row[-1] for row in rows], step)
    _check_rows(attached, rows, step)


def check_parameters(attached: Attached, step: int) -> None:
    """As :func:`check_replicas`, of the parameters alone, as another step is about to update them. For updates that
    hand each rank's part of the parameters to all: what one rank has changed is everybody's behind it, or nobody's."""
    attached.synchronize()
    with ordinary(StepContext(attached.device, grad=False)):
        rows = _gather(attached, _C.checksums(attached.params))
    _check_rows(attached, rows, step)


def _check_rows(attached: Attached, rows: Sequence[tuple[int, ...]], step: int) -> None:
    """Refuses ranks whose parameters' checksums differ."""
    common = Counter(rows).most_common(1)[0][0]  # the first of those that are as common
    others = [rank for rank, row in enumerate(rows) if row != common]
    if not others:
        return
    differing = [
        param for index, param in enumerate(attached.params) if any(row[index] != common[index] for row in rows)
    ]
    more = f" and {len(differing) - 1} others" if len(differing) > 1 else ""
    who = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(map(str, others))} have"
    raise RuntimeError(
        f"The replicas differ after step {step}: {who} another {attached.names[differing[0]]}{more} than the "
        "rest; load the same checkpoint on every rank, and look for code that changes parameters on some ranks only."
    )


def _check_changes(totals: Sequence[int], step: int) -> None:
    """Refuses ranks whose scripts have changed gradients in shards otherwise (:mod:`dear._changes`)."""
    for rank, total in enumerate(totals):
        if total != totals[0]:
            raise RuntimeError(
                f"Ranks 0 and {rank} have set, scaled or clamped gradients otherwise up to step {step}, and each its "
                "own part of the averages: change them alike on every rank, by what all ranks have, or use "
                'dear.attach(..., update="replicated").'
            )


def _raise_other_options(attached: Attached, options: dict[str, Any], step: int) -> None:
    """Collective."""
    everyone = all_gather_object(attached.gather_lane, options, "the options of the optimizers", attached.device)
    for rank, theirs in enumerate(everyone):
        for name in sorted(options.keys() | theirs.keys()):
            if theirs.get(name) != everyone[0].get(name):
                raise RuntimeError(
                    f"Ranks 0 and {rank} have another {name} after step {step} ({everyone[0].get(name)!r} and "
                    f"{theirs.get(name)!r}): set it alike on every rank, by what all ranks have, such as an averaged "
                    "loss."
                )


def _gather(attached: Attached, sums: list[int]) -> list[tuple[int, ...]]:
    """Every rank's checksums, by rank."""
    lane, count = attached.gather_lane, len(sums)
    full = torch.zeros(attached.world * count, dtype=torch.int64, device=attached.device)
    begin, end = shard_range(full.numel(), attached.world, attached.rank)
    full[begin:end] = torch.tensor(sums, dtype=torch.int64)
    lane.submit(_C.Phase.all_gather, _C.Reduction.sum, [(full, full[begin:end])], "the replica check").wait()
    return [tuple(row) for row in full.view(attached.world, count).tolist()]


def check_equal(model: DDP, optimizers: Sequence[Optimizer], remedy: str) -> None:
    """Refuses replicas that differ, in parameters or in the optimizers' state, before each rank's part is handed to
    all. Collective, with nothing in flight.

    Raises:
        ValueError: names a parameter, and the first rank whose values are not rank 0's; on every rank.
    """
    names: dict[Any, str] = dict(_ddp.parameter_names(model))
    params = _ddp.reduced_parameters(model)

    def sums() -> dict[str, Any]:
        tensors: dict[str, torch.Tensor] = {f"the values of the parameter {names[param]}": param for param in params}
        facts: dict[str, Any] = {}
        for what, value in _states(optimizers, names):
            if _has_bytes(value):
                tensors[what] = value.contiguous()
            elif isinstance(value, (int, float)) and what.startswith("the optimizer's step "):
                facts[what] = value  # other numbers may be each rank's own, as LBFGS's last loss
        return dict(zip(tensors, _C.checksums(list(tensors.values())), strict=True)) | facts

    agree(model.process_group, sums, remedy)


def _states(optimizers: Sequence[Optimizer], names: Mapping[Any, str]) -> Iterator[tuple[str, Any]]:
    """What the optimizers have for each parameter, in words; what they keep under other keys is their own."""
    for optimizer in optimizers:
        for param, state in optimizer.state.items():
            if param in names and isinstance(state, Mapping):
                for key, value in state.items():
                    yield f"the optimizer's {key} of {names[param]}", value


def _has_bytes(value: Any) -> bool:
    """Whether it is a tensor whose memory has all its values."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return value.layout == torch.strided and not value.is_meta and not value.is_quantized
