"""FSDP2 (``fully_shard``) over this library's connections: host tensors under gloo, with a narrower wire if wanted.

``use(model)`` after ``fully_shard`` gives every FSDP module of ``model`` an all-gather and a reduce-scatter of ours.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from dear import _C
from dear._names import named_modules
from dear.collectives import choose_algorithm, group_timeout, make_lane
from dear.integrations._wires import WIRES, Wire, make_wire

__all__ = ["GradientWire", "use"]

_HOST = torch.device("cpu")


def use(model: torch.nn.Module, wire: torch.dtype | None = None, error_feedback: bool = False) -> GradientWire:
    """Makes our collectives those of every FSDP module in ``model``. Every rank must call it alike.

    Without ``wire`` parameters and gradients are those of FSDP's own collectives: bit for bit with two ranks, to the
    rounding of another order of adding with more.

    Args:
        model: what ``fully_shard()`` was applied to, in whole or in part.
        wire: ``torch.bfloat16`` or ``torch.float16`` sends gradients in 16 bits, ``torch.int8`` or
            ``torch.float8_e4m3fn`` in 8, with a scale for each 128 elements; the owner of a shard adds them in float32.
            Parameters are sent as FSDP has them (``MixedPrecisionPolicy.param_dtype``).
        error_feedback: what rounding took from a gradient is added to the next one.

    Returns:
        What holds the error feedback: save its ``state_dict()`` on each rank, since each has its own.

    Raises:
        ValueError: ``model`` has no FSDP module, or ``wire`` is another type.
        RuntimeError: no group of host tensors under gloo.
    """
    modules = {name: module for name, module in named_modules(model) if isinstance(module, FSDPModule)}
    if not modules:
        raise ValueError("The model has no FSDP module: call torch.distributed.fsdp.fully_shard() first.")
    if wire is not None and wire not in WIRES:
        raise ValueError(f"wire must be one of {', '.join(map(str, WIRES))}, or None, not {wire}.")
    if error_feedback and wire is None:
        raise ValueError("error_feedback is for a wire of 16 or 8 bits: pass wire, or leave error_feedback out.")
    lanes = _Lanes()
    gather = _RingAllGather(lanes)
    scatters = {name: _RingReduceScatter(lanes, wire, error_feedback) for name in modules}
    for name, module in modules.items():
        module.set_custom_all_gather(gather)
        module.set_custom_reduce_scatter(scatters[name])
    return GradientWire(scatters)


class GradientWire:
    """The gradients' way in 16 or 8 bits: its error feedback, by FSDP module."""

    def __init__(self, scatters: dict[str, _RingReduceScatter]) -> None:
        self._scatters = scatters

    def state_dict(self) -> dict[str, Any]:
        """This rank's error feedback under ``"errors"``, by the name of the FSDP module: none without it, and before
        the first step."""
        errors = {
            name: scatter.wire.error
            for name, scatter in self._scatters.items()
            if scatter.wire is not None and scatter.wire.error is not None
        }
        return {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "errors": errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave on this rank.

        Raises:
            KeyError: the model has no FSDP module of such a name, or it is no such state.
            ValueError: gradients are sent whole, or it is another rank's, or of another number of ranks.
        """
        if "errors" not in state:
            raise KeyError('A gradient wire\'s state has the key "errors": pass what its state_dict() returned.')
        saved, here = (state["rank"], state["world_size"]), (dist.get_rank(), dist.get_world_size())
        if saved != here:
            raise ValueError(
                f"This is the error feedback of rank {saved[0]} of {saved[1]}, and here is rank {here[0]} of {here[1]}:"
                " load on each rank what it has saved, on as many ranks, or leave the error feedback out."
            )
        for name, error in state["errors"].items():
            if name not in self._scatters:
                raise KeyError(f'The model has no FSDP module "{name}": load the state into the model it was saved of.')
            wire = self._scatters[name].wire
            if wire is None:
                raise ValueError("Gradients are sent whole, without error feedback: pass wire to use().")
            wire.error = error.clone()


class _Done:
    """A handle of work that has ended."""

    def __init__(self, exchange: _C.Exchange | None = None, keep: Any = None) -> None:
        self._exchange, self._keep = exchange, keep

    def wait(self, timeout: Any = None) -> bool:
        """FSDP wants to be told that it ended."""
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = self._keep = None
        return True


class _Lanes:
    """Lanes by process group, made at the first call, which every rank makes in the same order."""

    def __init__(self) -> None:
        self._lanes: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, _C.Lane]] = weakref.WeakKeyDictionary()

    def get(self, group: dist.ProcessGroup, phase: str) -> _C.Lane:
        lanes = self._lanes.setdefault(group, {})
        if phase not in lanes:
            if choose_algorithm(group, _HOST, None) != "ring":
                raise RuntimeError(
                    "dear.integrations.fsdp2 moves host tensors under gloo: leave FSDP's own collectives in place with "
                    "other backends."
                )
            timeout = group_timeout(group, _HOST)
            lanes[phase] = make_lane(group, f"FSDP {phase}", "ring", timeout, all_to_all=phase == "all-to-all")
        return lanes[phase]


class _Buffers:
    """Memory as FSDP's own collectives allocate it."""

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(math.prod(int(n) for n in size), dtype=dtype, device=device)


class _RingAllGather(_Buffers, AllGather):
    def __init__(self, lanes: _Lanes) -> None:
        self._lanes = lanes

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        lane = self._lanes.get(group, "all-gather")
        mine = output_tensor.view(lane.world, -1)[lane.rank]
        if mine.data_ptr() != input_tensor.data_ptr():
            mine.copy_(input_tensor.view(-1))
        pairs = [(output_tensor.view(-1), mine)]
        work = _Done(lane.submit(_C.Phase.all_gather, _C.Reduction.sum, pairs, "FSDP's parameters"), output_tensor)
        if async_op:
            return work
        work.wait()
        return None


class _RingReduceScatter(_Buffers, ReduceScatter):
    def __init__(self, lanes: _Lanes, wire: torch.dtype | None, error_feedback: bool) -> None:
        self._lanes = lanes
        self.wire = None if wire is None else make_wire(wire, error_feedback)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        averages = op == dist.ReduceOp.AVG
        if not averages and op != dist.ReduceOp.SUM:
            raise ValueError(
                "dear.integrations.fsdp2 sums or averages gradients, and FSDP asks for something else: leave "
                "set_gradient_divide_factor() at the world size, or out."
            )
        if self.wire is None or output_tensor.dtype == self.wire.dtype:
            lane = self._lanes.get(group, "reduce-scatter")
            reduction = _C.Reduction.average if averages else _C.Reduction.sum
            pairs = [(input_tensor.view(-1), output_tensor.view(-1))]
            lane.submit(_C.Phase.reduce_scatter, reduction, pairs, "FSDP's gradients").wait()
        else:
            self._reduce_narrow(self.wire, output_tensor.view(-1), input_tensor.view(-1), group, averages)
        return _Done() if async_op else None

    def _reduce_narrow(
        self, wire: Wire, output: torch.Tensor, full: torch.Tensor, group: dist.ProcessGroup, averages: bool
    ) -> None:
        """Each owner gets everyone's part, and adds."""
        lane = self._lanes.get(group, "all-to-all")
        if wire.error is not None and wire.error.numel() != full.numel():
            raise ValueError(
                f"The error feedback that was loaded is of {wire.error.numel()} elements, and the FSDP module's "
                f"gradients are {full.numel()}: load what was saved of this model, or leave the error feedback out."
            )
        sent = wire.encode(full, lane.world)
        received = torch.empty_like(sent)
        lane.submit(
            _C.Phase.all_to_all, _C.Reduction.sum, [(sent.view(-1), received.view(-1))], "FSDP's gradients"
        ).wait()
        total = wire.add(received, output.numel())
        output.copy_(total / lane.world if averages else total)
