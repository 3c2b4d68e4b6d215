"""What feeds a compressor: its native pipeline, and the two-phase exchanges of the groups in each bucket.

There is one for DDP's own hook (:mod:`compress.hook_binding`), and one for the DeAR schedule
(:mod:`compress.schedule_binding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.bound import Bound
from compress.checks import REMEDY, check_bucket, facts
from compress.contract import Contract
from compress.group import Group, Member, matrix_shape
from compress.groups import make_group, parts_of_bucket
from compress.lanes import one_level_lanes, two_level_lanes
from compress.saved import check_nodes, check_parameters
from dear import _C
from dear._agree import agree
from dear._objects import all_gather_object
from dear.collectives import choose_algorithm, group_timeout, shard_range


class Binding:
    """A compressor at work: its pipeline, and its groups by bucket."""

    unit = "bucket"  # what is sent together, in errors
    between_passes = False  # groups are made after one pass for the next

    def __init__(
        self,
        compressor: Contract,
        device: torch.device,
        *,
        lanes: Sequence[_C.Lane] = (),
        algorithm: str | None = None,
    ) -> None:
        """Collective. ``lanes`` are those for the first stages that there are already; in two levels they are not
        used."""
        ranks = compressor.ranks()
        timeout = group_timeout(ranks, device)
        chosen = choose_algorithm(ranks, device, algorithm)
        if compressor.levels is None:
            made = one_level_lanes(compressor, lanes, chosen, timeout)
        else:
            made = two_level_lanes(compressor, chosen, timeout, compressor.levels.nodes)
        self.compressor = compressor
        self.pipeline = _C.Pipeline(made.by_stage, made.all_to_alls, device, ranks.rank())  # type: ignore[arg-type]  # None
        self._lane, self._device = made.everyone, device
        # A backend's lane may move no host tensors, of one level or of two, and names nobody who is missing.
        self._tells = made.everyone if chosen == "ring" else None
        self.pipeline.steps = compressor.initial_step
        self._measure = compressor.measure_first
        compressor.measure_first = False
        self.bounds: dict[int, list[Bound]] = {}
        self._vnmse: float | None = None
        self._exact: list[tuple[Bound, Tensor]] = []

    # --- for the compressor ---

    @property
    def steps(self) -> int:
        """How many have begun."""
        return int(self.pipeline.steps)

    def synchronize(self) -> None:
        """Waits until nothing is in flight."""

    def finish_step(self, raises: bool = True) -> None:
        """Does what a step that has been exchanged still leaves to be done; nothing is in flight. Collective.

        raises: False leaves a step out whose gradients are not finite, also where that would be an error.
        """

    def everyones(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's, by rank. Collective; nothing is in flight."""
        return all_gather_object(self._lane, state, "the compressor's state", self._device)

    def forget_groups(self, step: int) -> None:
        """The compressor has loaded a state of that step: groups are to be made anew."""
        self.bounds.clear()
        self.pipeline.steps = step

    def measure_next(self) -> None:
        """The next step is compared with a dense one."""
        self._measure = True

    def stats(self) -> dict[str, Any]:
        """The binding's part of :meth:`Compressor.stats`; nothing is in flight."""
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
    ) -> list[_C.TwoPhaseExchange]:  # fmt: skip
        """Groups for the bucket of that number: gradients ``grads`` lie in ``source``, results go to ``target``, both
        flat and of one length. Collective, and raises on all ranks alike."""
        compressor = self.compressor
        sizes = {name: param.numel() for name, param in zip(names, params, strict=True)}

        def look() -> dict[str, Any]:
            check_bucket(names, params, source)
            chosen = compressor.choose(dict(zip(names, params, strict=True)))
            check_nodes(compressor, compressor.loaded)
            check_parameters(compressor, sizes)
            return facts(compressor) | chosen | {"the parameters of a bucket": sizes, "seed": compressor.seed}

        compressor.seed = agree(compressor.ranks(), look, REMEDY, ("seed",), self._tells)["seed"]
        begins: dict[str, int] = {}
        shapes, offset = {}, source.storage_offset()
        for name, grad in zip(names, grads, strict=True):
            begins[name], shapes[name] = int(grad.storage_offset() - offset), matrix_shape(grad)
        bounds: list[Bound] = []
        for part in parts_of_bucket(compressor, sizes, source.device):
            members, start = [], 0
            for name in part:
                members.append(Member(name, start, *shapes[name]))
                start += sizes[name]
            place = f"{index}" + (f", part {len(bounds)}" if len(part) < len(names) else "")
            group = make_group(compressor, members, source.dtype, source.device, f"bucket {place}")
            group.label = f"bucket {place}"
            label = f"{self.unit} {place}"
            bounds.append(self._bound(group, label, [begins[name] for name in part], source, target))
        self.bounds[index] = bounds
        return [bound.exchange for bound in bounds]

    def _bound(self, group: Group, label: str, begins: list[int], source: Tensor, target: Tensor) -> Bound:
        rolls_back = self.compressor.nonfinite != "raise"
        exchange = _C.TwoPhaseExchange(self.pipeline, group.codec, label, group.feedback, rolls_back)
        offsets = {begin - member.start for begin, member in zip(begins, group.members, strict=True)}
        runs = []
        if len(offsets) > 1:  # not in one run there, so it is copied
            runs = [(begin, m.start, m.numel) for begin, m in zip(begins, group.members, strict=True)]
        exchange.bind(source, target, begins[0], group.numel, runs)
        return Bound(group, exchange, begins, source, target)

    # --- a measured step ---

    def note_exact(self, index: int) -> None:
        """Reduces the bucket's gradients densely, before they go out compressed. Collective."""
        lane = self._lane
        for bound in self.bounds[index]:
            exact = bound.gradient().double()
            begin, end = shard_range(exact.numel(), lane.world, lane.rank)
            for phase, reduction in (
                (_C.Phase.reduce_scatter, _C.Reduction.average), (_C.Phase.all_gather, _C.Reduction.sum)
            ):  # fmt: skip
                lane.submit(
                    phase, reduction, [(exact, exact[begin:end])], f"the exact gradients of bucket {index}"
                ).wait()
            self._exact.append((bound, exact))

    def compare_exact(self) -> None:
        """Notes how far the results are from what :meth:`note_exact` said."""
        wrong = total = 0.0
        for bound, exact in self._exact:
            wrong += float((bound.aggregate().double() - exact).square().sum())
            total += float(exact.square().sum())
        if self._exact:
            self._vnmse = wrong / total if total else 0.0
        self._exact = []
