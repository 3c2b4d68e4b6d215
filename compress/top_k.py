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

#: A sample is one run of this many elements out of every stretch of 16 such runs.
RUN = 64
STRETCH = 16 * RUN
#: With fewer sampled elements above the threshold than this, the density would stray: those groups select exactly.
ENOUGH = 1000


@dataclass
class _Selection:
    """One selection, of a rank's gradient or of an owner's merge. Everything stays on the device."""

    k: int
    threshold: Tensor
    ties: Tensor
    stats: Tensor  # selected before capacities, dropped as not finite
    workspace: Tensor
    sampled: bool = False

    @classmethod
    def make(cls, k: int, numel: int, device: torch.device, sampled: bool = False) -> _Selection:
        counters = torch.zeros(3, dtype=torch.int32, device=device)
        workspace = torch.zeros(ops.topk_workspace_numel(numel), dtype=torch.int32, device=device)
        return cls(k, torch.zeros(1, device=device), counters[:1], counters[1:], workspace, sampled)

    def run(self, grad: Tensor | None, error: Tensor, shard: int, payload: Tensor) -> None:
        self.stats.zero_()
        if not self.sampled:
            ops.topk_threshold(grad, error, self.k, self.threshold, self.ties, self.workspace)
        ties = None if self.sampled else self.ties
        ops.topk_select(grad, error, self.threshold, ties, shard, payload, self.stats, self.workspace)

    def sample_threshold(self, grad: Tensor, error: Tensor, group: Group) -> None:
        """The threshold of a sixteenth of the elements, another one each step."""
        stretches = error.numel() // STRETCH
        begin = group.step % (STRETCH // RUN) * RUN
        samples = []
        for name, tensor in (("gradient", grad), ("error", error)):
            runs = tensor[: stretches * STRETCH].view(stretches, STRETCH)[:, begin : begin + RUN]
            samples.append(group.buffer(f"sample of {name}", runs.shape, tensor.dtype).copy_(runs).view(-1))
        k = round(self.k * samples[0].numel() / error.numel())
        ops.topk_threshold(samples[0], samples[1], k, self.threshold, self.ties, self.workspace)
        # Where most elements are zero, they are not to fill the slots.
        self.threshold.clamp_(min=torch.finfo(torch.float32).tiny)


class TopK(Compressor):
    """Each rank sends the k = density * n largest elements of g + e to the owners of their shards; each owner adds
    them up with its own error, and sends the k / P largest of its shard to all.

        rank:   c = g + e;  send S(c), the k largest of c;  e <- c - S(c)
        owner:  s = (sum of the ranks' S(c)) / P + ê;  send S(s), its share of k;  ê <- s - S(s)

    So a rank sends about 2 k entries, of 8 bytes, whatever the number of ranks. Slots for the owners are of fixed
    length, so that no length depends on data; what does not fit stays in the error.

    Args:
        density: k / n, in (0, 1]; smaller compresses more. n is the number of elements in a bucket.
        selection: ``"exact"`` finds the k-th largest of all elements; ``"sampled"`` that of a sixteenth of them, which
            costs little, and selects about k: within 10% of it. Small groups and owners select exactly.
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
        selection: Literal["exact", "sampled"] = "exact",
        slack: float = 1.25,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], the share of elements to send, not {density!r}.")
        if selection not in ("exact", "sampled"):
            raise ValueError(f'selection must be "exact" or "sampled", not {selection!r}.')
        if not slack >= 1:
            raise ValueError(f"slack must be 1 or more, not {slack!r}.")
        self.density, self.selection, self.slack = float(density), selection, float(slack)

    def options(self) -> dict[str, Any]:
        return {"density": self.density, "selection": self.selection, "slack": self.slack}

    def ratio(self, group: Group) -> float:
        return group.numel / (group.world * ops.topk_slot_numel(self._capacity(group)))

    def prepare(self, group: Group) -> None:
        super().prepare(group)
        begin, end = self.owned_range(group)
        k = self._k(group)
        own = max(1, k // self._owners(group))
        group.plan = (
            _Selection.make(k, group.numel, group.device, self._samples(group)),
            _Selection.make(min(own, max(1, end - begin)), end - begin, group.device),
        )

    def encode(self, group: Group) -> Tensor:
        payload = group.buffer("payload", (group.world, self._slot(group)), torch.int32)
        error = group.error if group.error is not None else group.buffer("corrected", (group.numel,)).zero_()
        selection: _Selection = group.plan[0]
        if selection.sampled:
            selection.sample_threshold(group.gradient, error, group)
        selection.run(group.gradient, error, self.shard_numel(group), payload)
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
            group.plan[1].run(None, total, end - begin, merged)
        return merged

    def decode(self, group: Group, payload: Tensor) -> None:
        slots = group.buffer("slots", payload.shape, torch.int32).copy_(payload)
        ops.topk_decode(slots, group.gradient, self.shard_numel(group))

    def _samples(self, group: Group) -> bool:
        return self.selection == "sampled" and self._k(group) * RUN >= ENOUGH * STRETCH

    def _k(self, group: Group) -> int:
        return max(1, round(self.density * group.numel))

    def _capacity(self, group: Group) -> int:
        """Entries in one owner's slot."""
        evenly = self._k(group) / self._owners(group)
        return min(self.shard_numel(group), group.numel, math.ceil(self.slack * evenly))

    def _owners(self, group: Group) -> int:
        """Ranks whose shard is not empty."""
        return -(-group.numel // self.shard_numel(group))

    def _slot(self, group: Group) -> int:
        return ops.topk_slot_numel(self._capacity(group))
