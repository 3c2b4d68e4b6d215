"""Whether an optimizer's step changes the gradients that it is given, as torch's foreach SGD with nesterov does.

Local gradients cannot follow such a change, so every rank must know of it before it adds to them. A rank that owns
nothing of a parameter group, or nothing that is used, sees nothing of its update.

- Torch's own steps change all gradients of a group or none, as its switches say. A rank that does not see it is told by
  the others, at the end of the group's first update, and again whenever one of the switches was set.
- Under GradScaler the fused ones divide gradients by the scale, all of them, which no version counter shows.
- A step of the user's own may do so at any time, on one rank alone, and through ``.data``, which no version counter
  shows. So it counts as changing all of them, each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dear import _ddp
from dear._attached import Attached
from dear._layout import Layout, Place, Segment
from dear._own_steps import has_own_step
from dear._sharded_gradients import ShardedGradients

_IDLE, _LEFT, _CHANGED = range(3)  # what this rank's part of an update did with a group's gradients


class ChangedGradients:
    """Watches the updates of one engine's optimizers."""

    def __init__(self, attached: Attached, gradients: ShardedGradients) -> None:
        self._attached, self._gradients = attached, gradients
        self._own = [has_own_step(user.optimizer) for user in attached.users]
        self._seen: dict[int, int] = {}  # by parameter group, in this step
        self._cut: Sequence[Segment] | None = None  # what the next one is of
        self._unseen: list[list[int]] = []  # by optimizer: its groups whose updates some rank may not see
        self._told: dict[tuple[int, int], tuple[dict[str, Any], bool]] = {}  # by optimizer and group: of which switches

    @contextlib.contextmanager
    def watch(self, number: int, segments: Sequence[Segment]) -> Iterator[None]:
        """Inside, an optimizer updates these segments."""
        if self._own[number]:
            with _kept_in_place(segments):
                yield
            return
        grads = [(segment.group, segment.tensor.grad) for segment in segments if segment.tensor.grad is not None]
        versions = [grad._version for _, grad in grads]
        yield
        for (group, grad), before in zip(grads, versions, strict=True):
            found = _LEFT if grad._version == before else _CHANGED
            self._seen[group] = max(found, self._seen.get(group, _IDLE))

    def conclude(self, number: int, segments: Sequence[Segment]) -> None:
        """One step of an optimizer has been made. Collective where a group's update is new.

        segments: all of this rank's, in a list that is never changed.
        """
        seen, self._seen = self._seen, {}
        groups = self._attached.users[number].optimizer.param_groups
        scaled = getattr(self._attached.users[number].optimizer, "grad_scale", None) is not None
        if self._own[number] or scaled:
            self._gradients.changed_otherwise({param for group in groups for param in group["params"]})
            return
        if self._cut is not segments:
            self._cut, self._unseen = segments, self._find_unseen()
        unseen = self._unseen[number]
        switches = {index: _switches(groups[index]) for index in unseen}
        new = [index for index in unseen if self._told.get((number, index), ({}, False))[0] != switches[index]]
        if new:
            mine = torch.tensor([float(seen.get(index, _IDLE)) for index in new], device=self._attached.device)
            found = self._gradients.gather(mine, "the gradients that the optimizer has changed").amax(0).tolist()
            for index, value in zip(new, found, strict=True):
                if value != _IDLE:
                    self._told[number, index] = switches[index], value == _CHANGED
        changed = {index for index, value in seen.items() if value == _CHANGED}
        changed.update(index for index in unseen if self._told.get((number, index), ({}, False))[1])
        if changed:
            self._gradients.changed_otherwise({param for index in changed for param in groups[index]["params"]})

    def _find_unseen(self) -> list[list[int]]:
        attached, layout = self._attached, self._attached.known_layout
        ranks = range(attached.world)
        everywhere = _ddp.tracks_unused(attached.model)  # a step may leave out all that a rank owns
        unseen = []
        for user in attached.users:
            owners: dict[int, set[int]] = {}
            group_of = {p: index for index, group in enumerate(user.optimizer.param_groups) for p in group["params"]}
            for place in layout.places:
                if place.param in group_of:
                    found = owners.setdefault(group_of[place.param], set())
                    found.update(rank for rank in ranks if rank not in found and _owns(layout, rank, place))
            unseen.append([index for index, found in owners.items() if everywhere or len(found) < attached.world])
        return unseen


@contextlib.contextmanager
def _kept_in_place(segments: Sequence[Segment]) -> Iterator[None]:
    """What a step inside puts in the place of a gradient goes into that gradient.

    Raises:
        RuntimeError: it has dropped one.
    """
    grads = [(segment.tensor, segment.tensor.grad) for segment in segments]
    dropped = False
    try:
        yield
    finally:
        for tensor, before in grads:
            now = tensor.grad
            if now is before or before is None:
                continue
            tensor.grad = before
            dropped |= now is None
            if now is not None:
                with torch.no_grad():
                    before.copy_(now)
    if dropped:
        raise RuntimeError(
            "An optimizer's step() has set the .grad of a parameter to None, which other ranks do not see with "
            'update="owned": leave that to optimizer.zero_grad(), or use update="replicated".'
        )


def _owns(layout: Layout, rank: int, place: Place) -> bool:
    ranges = layout.owners[place.bucket].ranges(rank)
    return any(begin < place.stop and place.start < end for begin, end in ranges)


def _switches(group: dict[str, Any]) -> dict[str, Any]:
    """The group's options by which an optimizer may choose another way to update: a number counts as zero or not, and
    one in a tensor, which may be on a GPU, as another."""

    def switch(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return True
        return value if value is None or isinstance(value, (bool, str)) else bool(value)

    plain = (bool, str, int, float, type(None), torch.Tensor)
    return {name: switch(value) for name, value in group.items() if name != "params" and isinstance(value, plain)}
