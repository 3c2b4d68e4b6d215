"""Top-k: the largest elements, by owner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compress import ops
from compress.compressor import Compressor
from compress.group import Group


@dataclass
class _Selection:
    """One selection, of a rank's gradient or of an owner's merge. Everything stays on the device."""

    k: int
    threshold: Tensor
    ties: Tensor
    stats: Tensor  # selected before capacities, dropped as not finite
    workspace: Tensor
    warm: bool = False  # the threshold is one of this group's

    @classmethod
    def make(cls, k: int, numel: int, device: torch.device) -> _Selection:
        counters = torch.zeros(3, dtype=torch.int32, device=device)
        workspace = torch.zeros(ops.topk_workspace_numel(numel), dtype=torch.int32, device=device)
        return cls(k, torch.zeros(1, device=device), counters[:1], counters[1:], workspace)

    def run(self, grad: Tensor | None, error: Tensor, shard: int, payload: Tensor, exact: bool) -> None:
        self.stats.zero_()
        if exact or not self.warm:
            ops.topk_threshold(grad, error, self.k, self.threshold, self.ties, self.workspace)
            ops.topk_select(grad, error, self.threshold, self.ties, shard, payload, self.stats, self.workspace)
            self.warm = True
            return
        ops.topk_select(grad, error, self.threshold, None, shard, payload, self.stats, self.workspace)
        # Too many: raise it; too few: lower it. In gradients' tails a count falls with about the fourth power.
        self.threshold.mul_((self.stats[:1] / self.k).clamp(0.25, 4.0).pow(0.25))


class TopK(Compressor):
    """Each rank sends the k = density * n largest elements of g + e to the owners of their shards; each owner adds
    them up with its own error, and sends the k / P largest of its shard to all.

        rank:   c = g + e;  send S(c), the k largest of c;  e <- c - S(c)
        owner:  s = (sum of the ranks' S(c)) / P + ê;  send S(s), its share of k;  ê <- s - S(s)

    So a rank sends about 2 k entries, of 8 bytes, whatever the number of ranks. Slots for the owners are of fixed
    length, so that no length depends on data; what does not fit stays in the error.

    Args:
        density: k / n, in (0, 1]; smaller compresses more. n is the number of elements in a bucket.
        selection: ``"exact"`` finds the k-th largest each step; ``"threshold"`` does so every ``refresh`` steps, and
            in between selects by the threshold in one pass, which follows the number selected.
        refresh: how many steps a threshold serves.
        slack: capacity of the slots, in multiples of what they hold when the selected elements spread evenly.
        Others: see :class:`compress.Compressor`.

    Source: Stich et al., "Sparsified SGD with Memory", NeurIPS 2018; compressing again at the owner: Tang et al.,
    "DoubleSqueeze", ICML 2019.
    """

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "owners"

    def __init__(
        self,
        density: float = 0.01,
        *,
        selection: Literal["exact", "threshold"] = "exact",
        refresh: int = 32,
        slack: float = 1.25,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], the share of elements to send, not {density!r}.")
        if selection not in ("exact", "threshold"):
            raise ValueError(f'selection must be "exact" or "threshold", not {selection!r}.')
        if refresh < 1:
            raise ValueError(f"refresh must be 1 step or more, not {refresh!r}.")
        if not slack >= 1:
            raise ValueError(f"slack must be 1 or more, not {slack!r}.")
        self.density, self.selection, self.refresh, self.slack = float(density), selection, int(refresh), float(slack)

    def options(self) -> dict[str, Any]:
        return {"density": self.density, "selection": self.selection, "refresh": self.refresh, "slack": self.slack}

    def ratio(self, group: Group) -> float:
        return group.numel / (group.world * ops.topk_slot_numel(self._capacity(group)))

    def prepare(self, group: Group) -> None:
        super().prepare(group)
        begin, end = self.owned_range(group)
        k = self._k(group)
        own = min(self._capacity(group), max(1, round(k * (end - begin) / group.numel)))
        group.plan = (
            _Selection.make(k, group.numel, group.device),
            _Selection.make(min(own, max(1, end - begin)), end - begin, group.device),
        )

    def encode(self, group: Group) -> Tensor:
        payload = group.buffer("payload", (group.world, self._slot(group)), torch.int32)
        error = group.error if group.error is not None else group.buffer("corrected", (group.numel,)).zero_()
        selection: _Selection = group.plan[0]
        selection.run(group.gradient, error, self.shard_numel(group), payload, self._exact(group))
        group.dropped.copy_(selection.stats[1:])
        return payload

    def merge(self, group: Group, received: Tensor) -> Tensor:
        merged = group.buffer("merged", (1, self._slot(group)), torch.int32)
        begin, end = self.owned_range(group)
        if begin < end:
            lists = group.buffer("lists", received.shape, torch.int32).copy_(received)
            total = group.owner_error
            if total is None:
                total = group.buffer("total", (end - begin,)).zero_()
            ops.topk_accumulate(lists, total, 1 / group.world)
            group.plan[1].run(None, total, end - begin, merged, self._exact(group))
        return merged

    def decode(self, group: Group, payload: Tensor) -> None:
        slots = group.buffer("slots", payload.shape, torch.int32).copy_(payload)
        ops.topk_decode(slots, group.gradient, self.shard_numel(group))

    def group_state(self, group: Group) -> dict[str, Tensor]:
        if group.plan is None:
            return {}
        return {f"threshold {i}": one.threshold.clone() for i, one in enumerate(group.plan) if one.warm}

    def load_group_state(self, group: Group, state: dict[str, Tensor]) -> None:
        for i, one in enumerate(group.plan):
            if f"threshold {i}" in state:
                one.threshold.copy_(state[f"threshold {i}"])
                one.warm = True

    def _exact(self, group: Group) -> bool:
        return self.selection == "exact" or (group.step - self.start_step) % self.refresh == 0

    def _k(self, group: Group) -> int:
        return max(1, round(self.density * group.numel))

    def _capacity(self, group: Group) -> int:
        """Entries in one owner's slot."""
        shard = self.shard_numel(group)
        owners = -(-group.numel // shard)
        return min(shard, group.numel, math.ceil(self.slack * self._k(group) / owners))

    def _slot(self, group: Group) -> int:
        return ops.topk_slot_numel(self._capacity(group))
