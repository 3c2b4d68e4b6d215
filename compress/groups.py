"""Compression groups: how a bucket is cut into them, what one is made of, and a step of one alone."""

from __future__ import annotations

import torch

from compress.contract import Contract
from compress.exchange import Exchange, Steps
from compress.generated import GeneratedCodec
from compress.group import Group, Member, in_parts
from dear import _C


def parts_of_bucket(compressor: Contract, sizes: dict[str, int], device: torch.device) -> list[list[str]]:
    """How a bucket of these parameters (name: elements) is cut into groups: as a loaded state cut it, else by
    ``compressor.part_numel``. Exempt parameters are a group of their own, unless they travel with the others.

    DDP begins with one bucket and rebuilds it after the first pass; a resumed run begins with the groups it had.
    """
    saved = compressor.loaded["layout"] if compressor.loaded else []
    parts = [part for part in saved if set(part) <= set(sizes)]
    if sorted(name for part in parts for name in part) == sorted(sizes):
        return parts
    exempt = [] if compressor.carries_exempt else [name for name in sizes if name in compressor.exempted]
    rest = {name: size for name, size in sizes.items() if name not in exempt}
    if rest and compressor.part_numel is not None and device.type == "cpu":
        parts = in_parts(rest, compressor.part_numel)
    else:
        parts = [list(rest)]
    return [part for part in [*parts, exempt] if part]


def make_group(
    compressor: Contract, members: list[Member], dtype: torch.dtype, device: torch.device, label: str
) -> Group:
    """The group of these parameters, with what is known about them: from other groups, or from a loaded state."""
    key = tuple(member.name for member in members)
    if key in compressor.groups:
        return compressor.groups[key]
    for old in [old for old in compressor.groups if not set(old).isdisjoint(key)]:
        compressor.groups.pop(old).codec.settle()  # its error feedback moves to the new group
    ranks = compressor.ranks()
    group = Group(members, dtype, device, ranks.rank(), ranks.size(), label)
    if compressor.levels is None:
        compressor.feedback.world = ranks.size()
        _give_codec(compressor, group)
    else:
        compressor.levels.give_codec(compressor, group, _give_codec, _reader_of)
    compressor.groups[key] = group
    return group


def _give_codec(compressor: Contract, group: Group) -> None:
    if not _is_compressed(compressor, group):
        group.codec = _C.DenseCodec(group.device, group.rank, group.world)
        return
    compressor.prepare(group)
    codecs = compressor.natives(group) or [(0, GeneratedCodec(compressor, group).native())]
    first = compressor.before_start(group)
    group.codec = _C.StagedCodec(group.device, compressor.start.native, first, codecs)


def _is_compressed(compressor: Contract, group: Group) -> bool:
    """Equal on every rank, also on one that only reads the group."""
    if compressor.exempted.issuperset(group.names):
        return False
    return compressor.compresses(group) or not compressor.feedback.begun.isdisjoint(group.names)


def _reader_of(compressor: Contract, group: Group) -> _C.Codec | None:
    """A codec that reads what other ranks make of the group, and keeps nothing; None where there is none: what owners
    of shards send, or all gather, says all there is to know, a sum of factors does not."""
    if compressor.exchange == "sum" or not _is_compressed(compressor, group):
        return None
    compressor.prepare_reader(group)
    codecs = compressor.natives(group)
    first = compressor.before_start(group)
    return _C.StagedCodec(group.device, compressor.start.native, first, codecs) if codecs else None


def step_alone(compressor: Contract, group: Group) -> Steps:
    """One step of a group alone, the one that began last: from this rank's ``group.gradient`` to the mean over the
    ranks, by way of exchanges, each of which must have been made before the next is asked for.

    What comes before the last exchange is the first phase, that exchange and what follows is the second.
    """
    gradient, step = group.gradient.view(-1), max(0, compressor.step - 1)
    group.codec.bind(gradient, gradient)
    for stage in range(group.codec.stages(step)):
        yield Exchange.of(group.codec.advance(step, stage), group.world)
    group.codec.advance(step, group.codec.stages(step))
    group.nonfinite = group.codec.nonfinite()
