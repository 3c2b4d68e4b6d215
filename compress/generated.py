"""A compressor written in Python, as the codec that the native pipeline drives."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from compress.contract import Contract
from compress.exchange import Steps
from compress.group import Group
from dear import _C
from dear._compiled import uncompiled


class GeneratedCodec:
    """Advances a compressor's generator of exchanges; called by the native ``PythonCodec``, with the GIL."""

    def __init__(self, compressor: Contract, group: Group) -> None:
        self._compressor = weakref.ref(compressor)  # which holds the group, which holds this
        self._group = group
        self._exchanges: Steps = iter(())
        self._source = torch.empty(0)

    def native(self) -> _C.Codec:
        """The codec for the pipeline."""
        return _C.PythonCodec(self._group.dropped, self)

    def stages(self, step: int) -> int:
        return self._alive().exchanges

    def all_to_all(self, step: int, stage: int) -> bool:
        return stage in self._alive().all_to_alls

    def compresses(self, step: int) -> bool:
        return True

    @uncompiled
    def bind(self, gradient: Tensor, result: Tensor) -> None:
        self._source, self._group.gradient = gradient, result

    @uncompiled
    def advance(self, step: int, stage: int) -> tuple[_C.Phase, Tensor, Tensor | None] | None:
        group = self._group
        if stage == 0:
            if self._source.data_ptr() != group.gradient.data_ptr():  # which a compressor may write to, and DDP's not
                group.gradient.copy_(self._source)
            group.step, group.nonfinite = step, None
            group.dropped.zero_()
            self._exchanges = self._alive().compressed_steps(group)
        exchange = next(self._exchanges, None)
        return None if exchange is None else exchange.message(group.rank, group.world)

    def nonfinite(self) -> Tensor | None:
        return self._group.nonfinite

    def _alive(self) -> Contract:
        compressor = self._compressor()
        if compressor is None:
            raise RuntimeError("The compressor was dropped while its model was training: keep a reference to it.")
        return compressor
