"""What feeds a compressor: its native pipeline, and the relays that carry each group of a bucket through it.

The hook of :mod:`compress.comm_hook` is one driver, the DeAR schedule another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compress._state import check_parameters
from compress.checks import REMEDY, check_bucket, facts
from compress.compressor import Compressor
from compress.group import Group, Member, matrix_shape
from dear import _C
from dear._agree import agree
from dear.collectives import choose_algorithm, group_timeout, make_lane


@dataclass
class Bound:
    """A group in a bucket: where its members begin there, and the bucket's flat buffer before and after."""

    group: Group
    relay: _C.Relay
    begins: list[int]
    source: Tensor
    target: Tensor

    def result(self, index: int) -> Tensor:
        """The flat result of the group's member of that number."""
        return self._part(self.target, index)

    def gradient(self) -> Tensor:
        """This rank's flat gradient, copied."""
        return torch.cat([self._part(self.source, index) for index in range(len(self.begins))])

    def aggregate(self) -> Tensor:
        """The flat result, copied."""
        return torch.cat([self.result(index) for index in range(len(self.begins))])

    def _part(self, flat: Tensor, index: int) -> Tensor:
        begin = self.begins[index]
        return flat[begin : begin + self.group.members[index].numel]


class Driver:
    """A compressor's pipeline, and its groups by bucket."""

    def __init__(
        self,
        compressor: Compressor,
        device: torch.device,
        *,
        lanes: Sequence[_C.Lane] = (),
        algorithm: str | None = None,
    ) -> None:
        """Collective. ``lanes`` are those for the first stages that there are already."""
        ranks = compressor.ranks()
        timeout = group_timeout(ranks, device)
        chosen = choose_algorithm(ranks, device, algorithm)
        lanes = list(lanes)
        for stage in range(len(lanes), max(2, compressor.exchanges)):
            lanes.append(make_lane(ranks, f"compress {stage}", chosen, timeout))
        owners = None
        if compressor.exchange == "owners":
            owners = make_lane(ranks, "compress all-to-all", chosen, timeout, all_to_all=True)
        self.compressor = compressor
        self.pipeline = _C.Pipeline(lanes, owners, device)
        self.pipeline.steps = compressor.step
        self.bounds: dict[int, list[Bound]] = {}
        self._vnmse: float | None = None
        self._exact: list[tuple[Bound, Tensor]] = []

    # --- for the compressor ---

    def synchronize(self) -> None:
        """Waits until nothing is in flight."""

    def forget_groups(self) -> None:
        """The compressor has loaded a state: groups are to be made anew."""
        self.bounds.clear()

    def measure_next(self) -> None:
        """The next step is compared with a dense one."""

    def stats(self) -> dict[str, Any]:
        """The driver's part of :meth:`Compressor.stats`; nothing is in flight."""
        counts = self.pipeline.counts_of_step
        return {"bytes_sent": counts.bytes_sent, "vnmse": self._vnmse, **self.times(counts)}

    def times(self, counts: _C.PipelineCounts) -> dict[str, float]:
        """What was computed, in ms; nothing for device tensors, whose kernels nobody waits for."""
        if not self._on_host():
            return {}
        times = {"encode_ms": counts.encode_ns, "merge_ms": counts.between_ns, "decode_ms": counts.decode_ns}
        return {name: value / 1e6 for name, value in times.items()}

    def _on_host(self) -> bool:
        return all(bound.group.device.type == "cpu" for bounds in self.bounds.values() for bound in bounds)

    # --- groups ---

    def bind(
        self, index: int, names: list[str], params: Sequence[Tensor], grads: Sequence[Tensor], source: Tensor,
        target: Tensor,
    ) -> list[_C.Relay]:  # fmt: skip
        """Groups for the bucket of that number: gradients ``grads`` lie in ``source``, results go to ``target``, both
        flat and of one length. Collective, and raises on all ranks alike."""
        compressor = self.compressor
        sizes = {name: param.numel() for name, param in zip(names, params, strict=True)}

        def look() -> dict[str, Any]:
            check_bucket(names, params, source)
            check_parameters(compressor, sizes)
            return facts(compressor) | {"the parameters of a bucket": sizes, "seed": compressor.seed}

        compressor.seed = agree(compressor.ranks(), look, REMEDY, free=("seed",))["seed"]
        begins: dict[str, int] = {}
        shapes, offset = {}, source.storage_offset()
        for name, grad in zip(names, grads, strict=True):
            begins[name], shapes[name] = int(grad.storage_offset() - offset), matrix_shape(grad)
        bounds: list[Bound] = []
        for part in compressor.planned(sizes, source.device):
            members, start = [], 0
            for name in part:
                members.append(Member(name, start, *shapes[name]))
                start += sizes[name]
            label = f"bucket {index}" + (f", part {len(bounds)}" if len(part) < len(names) else "")
            group = compressor.make_group(members, source.dtype, source.device, label)
            group.label = label
            bounds.append(self._bound(group, [begins[name] for name in part], source, target))
        self.bounds[index] = bounds
        return [bound.relay for bound in bounds]

    def _bound(self, group: Group, begins: list[int], source: Tensor, target: Tensor) -> Bound:
        rolls_back = self.compressor.nonfinite != "raise"
        relay = _C.Relay(self.pipeline, group.codec, group.label, group.feedback, rolls_back)
        offsets = {begin - member.start for begin, member in zip(begins, group.members, strict=True)}
        runs = []
        if len(offsets) > 1:  # not in one run there, so it is copied
            runs = [(begin, m.start, m.numel) for begin, m in zip(begins, group.members, strict=True)]
        relay.bind(source, target, begins[0], group.numel, runs)
        return Bound(group, relay, begins, source, target)

    # --- a measured step ---

    def note_exact(self, index: int) -> None:
        """Reduces the bucket's gradients densely, before they go out compressed. Collective."""
        for bound in self.bounds[index]:
            exact = bound.gradient().double()
            dist.all_reduce(exact, group=self.compressor.ranks())
            self._exact.append((bound, exact.div_(bound.group.world)))

    def compare_exact(self) -> None:
        """Notes how far the results are from what :meth:`note_exact` said."""
        wrong = total = 0.0
        for bound, exact in self._exact:
            wrong += float((bound.aggregate().double() - exact).square().sum())
            total += float(exact.square().sum())
        if self._exact:
            self._vnmse = wrong / total if total else 0.0
        self._exact = []


def not_finite(bound: Bound) -> RuntimeError:
    """The error for a gradient that is not finite."""
    names = bound.group.names
    return RuntimeError(
        f"On some rank a gradient in {bound.group.label} (from {names[0]} to {names[-1]}) is not finite: look for the "
        'cause, or pass nonfinite="skip", or with a GradScaler nonfinite="propagate".'
    )
