"""Averaged gradients that exist in shards: what can be asked of them and done to them, with plain DDP's result.

Note [Asking for gradients in shards]
A norm is answered collectively: each rank computes it of its part of every gradient, all parts go round in one
exchange, and every rank then knows the norm of every gradient. So the first question after a backward pass must be
asked by every rank, and those that follow cost nothing. What changes each element by itself is done to this rank's
parts alone. GradScaler's check is both, and its verdict is every rank's. The local gradients, which autograd adds to if
they are not zeroed, follow when the next backward pass begins: many zero them between the two passes. A hook on the
outputs of the model tells; where it cannot (a loss of what is hidden beside other outputs, a compiled DDP module), the
first gradient that is added to is refused. Placeholders carry the dispatch key from the end of a backward pass on: so
what runs below Python is seen, too, such as a scripted function.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_iter

from dear import _C, _grads
from dear._attached import Attached, weakly
from dear._context import StepContext, ordinary
from dear._grad_operators import answer
from dear._grads import Grads
from dear._layout import Layout
from dear._placeholders import LocalGrad, local_grad

Norms = torch.Tensor  # one for each place of the layout


class ShardedGradients:
    """The averages of the last reduced backward pass; each question and each change is every rank's."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self._pass = -1  # the reduced backward pass that all that follows is of, by the scheduler's count
        self._norms: dict[float, tuple[Norms, set[int]]] = {}  # by order; which of them a change has made stale
        self._factors: dict[int, Any] = {}  # by place: the average is that of the local gradients times this
        self._changed: set[int] = set()  # places whose averages were changed otherwise
        self._hook: Any = None  # on the model, once something was changed

    # --- what placeholders ask for ---

    def placeholder(self, layout: Layout, index: int) -> LocalGrad:
        """What stands in ``.grad`` for the average of a place of a layout."""
        place = layout.places[index]
        view = place.view(layout.buckets[place.bucket].buffer.view(-1))
        return local_grad(view, index, self.before_zero(index), self.before_add(), self.answering())

    def answering(self) -> Callable[[Any, Any, Any], Any]:
        """What a placeholder asks. It keeps nothing alive: the native scheduler keeps placeholders, where the garbage
        collector sees no cycle."""
        held = weakref.ref(self)

        def ask(func: Any, args: Any, kwargs: Any) -> Any:
            alive = held()
            return NotImplemented if alive is None else answer(alive, func, args, kwargs)

        return ask

    def norms(self, grads: Sequence[LocalGrad], order: float) -> list[torch.Tensor]:
        """The norm of each of these averaged gradients. Collective, unless it is known."""
        at = self._find(grads)
        known, stale = self._norms.get(order, (None, set()))
        if known is None or stale.intersection(at):
            with ordinary(StepContext(self._attached.device, grad=False)):
                known = self._gather_norms(order)
            self._norms[order] = known, set()
        return [known[index].to(grad.dtype) for index, grad in zip(at, grads, strict=True)]

    def change(
        self, grads: Sequence[LocalGrad], operator: Callable[[list[torch.Tensor]], Any], factor: Any, what: Any
    ) -> None:
        """Applies an elementwise operator to this rank's parts of these gradients.

        factor: what the operator multiplies by, or None where it does something else. what: it is, in words and
        numbers; None where it changes nothing.
        """
        at = self._find(grads)
        if at and what is not None:
            self._attached.changes.note_at(at, self._pass, what)
        with ordinary(StepContext(self._attached.device, grad=False)):
            parts = [part for index in at for part in self._parts(index)]
            if parts:
                operator(parts)
        self._note(at, factor)

    def unscale(self, grads: Sequence[LocalGrad], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> None:
        """GradScaler's: multiplies by ``inv_scale``, and sets ``found_inf`` on every rank if any element of any of
        these gradients is not finite. Collective."""
        self.change(
            grads, lambda parts: torch._amp_foreach_non_finite_check_and_unscale_(parts, found_inf, inv_scale),
            inv_scale.clone(), "unscale",
        )  # fmt: skip
        with ordinary(StepContext(self._attached.device, grad=False)):
            found = self.gather(found_inf.view(1), "the overflow check of the gradients")
            found_inf.copy_(found.max())

    # --- what the update strategy tells ---

    def scaled(self, params: Collection[torch.nn.Parameter], factor: Any) -> None:
        """The averages of these parameters were multiplied by this."""
        self._look()
        places = enumerate(self._attached.known_layout.places)
        self._note([index for index, place in places if place.param in params], factor)

    def changed_otherwise(self, params: Collection[torch.nn.Parameter]) -> None:
        """Averages of these parameters are no longer those of the local gradients: the user has put others in their
        place, or an update has changed them, as torch's foreach SGD with nesterov does."""
        places = enumerate(self._attached.known_layout.places)
        self._note((index for index, place in places if place.param in params), None)

    def before_zero(self, index: int) -> Callable[[], None]:
        """What a placeholder calls before it is set to zero, which makes good whatever was done to it. It keeps nothing
        alive."""
        held = weakref.ref(self)

        def settle() -> None:
            alive = held()
            if alive is not None:
                alive._attached.scheduler.synchronize()
                for part in alive._parts(index):  # another step would use it
                    part.zero_()
                alive._changed.discard(index)
                alive._factors.pop(index, None)
                alive._watch((index,), False)

        return settle

    def before_add(self) -> Callable[[], None]:
        """What a placeholder calls before autograd adds to it. It keeps nothing alive."""
        return weakly(self, ShardedGradients._before_add)

    def release(self) -> None:
        """Takes the hook off the model."""
        if self._hook is not None:
            self._hook.remove()

    def _before_backward(self) -> None:
        """A backward pass begins, which adds to the local gradients that were not zeroed."""
        self._forget_earlier()
        attached = self._attached
        assert attached.layout is not None
        places = attached.layout.places
        noted = sorted(self._factors.keys() | self._changed)
        self._watch(noted, False)
        for index in noted:
            param = places[index].param
            with torch._C.DisableTorchFunctionSubclass():
                grad = param.grad
                if not isinstance(grad, LocalGrad):
                    continue
                if index in self._changed:
                    raise RuntimeError(
                        f"The .grad of {attached.names[param]} was changed other than by a factor, and not zeroed "
                        'before the next backward pass, which update="sharded" or "owned" cannot add to: call '
                        'optimizer.zero_grad(), or use dear.attach(..., update="replicated").'
                    )
                plain = torch.Tensor.as_subclass(grad, torch.Tensor)
                with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(plain):
                    plain.mul_(self._factors[index])
        self._factors.clear()
        self._changed.clear()

    def _before_add(self) -> None:
        """Autograd adds to gradients, which were not zeroed."""
        self._forget_earlier()
        if self._factors or self._changed:
            raise RuntimeError(
                "The .grad of a parameter was changed in place and not zeroed, and this backward pass adds to it "
                "without the outputs of the model, as under torch.compile(model): call optimizer.zero_grad() before "
                'backward(), or use dear.attach(..., update="replicated").'
            )
        self._watch(range(len(self._attached.placeholders)), False)  # those of the others would tell nothing new

    def averages(self) -> Grads:
        """Copies of the averaged gradients, whole, on every rank. Collective."""
        attached, layout = self._attached, self._attached.known_layout
        flats = [torch.empty_like(flat) for flat in layout.full]
        for bucket, (flat, shard) in enumerate(zip(flats, layout.shard, strict=True)):
            layout.unpack(bucket, attached.rank, shard, flat)
            layout.gather(attached.gather_lane, bucket, flat, "the gradients")
        return {place.param: place.view(flats[place.bucket]).clone() for place in layout.places}

    def gather(self, mine: torch.Tensor, label: str) -> torch.Tensor:
        """What each rank passed, a row for each rank. Collective, in the all-gather lane, so that a missing peer is
        named as everywhere."""
        attached = self._attached
        rows = mine.new_empty(attached.world, mine.numel())
        rows[attached.rank] = mine
        parts = [(rows.view(-1), rows[attached.rank])]
        attached.gather_lane.submit(_C.Phase.all_gather, _C.Reduction.sum, parts, label).wait()
        return rows

    # --- inside ---

    def _look(self) -> None:
        """Waits for the averages of the last backward pass.

        Raises:
            RuntimeError: the last one was not reduced, or gradients were written to since.
        """
        attached, scheduler = self._attached, self._attached.native
        attached.check_reduced()
        if scheduler.has_gradients():
            _grads.check_untouched(scheduler)
        scheduler.synchronize()
        self._forget_earlier()

    def _forget_earlier(self) -> None:
        """Forgets what is of an earlier backward pass, if another one was reduced since. Asked for wherever something
        is used or noted: steady state never enters Python where a backward pass ends."""
        passes = self._attached.scheduler.passes()
        if passes == self._pass:
            return
        self._pass = passes
        self._norms.clear()
        self._factors.clear()
        self._changed.clear()

    def _find(self, grads: Sequence[LocalGrad]) -> list[int]:
        """Where the gradients stand in the layout."""
        self._look()
        places = self._attached.known_layout.places
        with torch._C.DisableTorchFunctionSubclass():
            for grad in grads:
                if places[grad.place].param.grad is not grad:
                    raise _grads.superseded(self._attached.names[places[grad.place].param])
        return [grad.place for grad in grads]

    def _parts(self, index: int) -> list[torch.Tensor]:
        """This rank's parts of the average."""
        layout = self._attached.known_layout
        return layout.parts(layout.places[index], self._attached.rank)

    def _note(self, at: Iterable[int], factor: Any) -> None:
        self._forget_earlier()
        at = set(at)
        for _, stale in self._norms.values():
            stale |= at
        self._watch(at, True)
        if self._hook is None:
            self._hook = self._attached.model.register_forward_hook(_watching(weakref.ref(self)))
        if factor is None:
            self._changed |= at
            return
        for index in at:
            self._factors[index] = self._factors.get(index, 1.0) * factor

    def _watch(self, at: Iterable[int], on: bool) -> None:
        """Whether these places tell what happens to them below Python: by the dispatch key."""
        placeholders = self._attached.placeholders
        _C.set_python_dispatch([placeholders[index][1] for index in at], on)

    def _gather_norms(self, order: float) -> Norms:
        places = self._attached.known_layout.places
        nothing = float("inf") if order < 0 else 0.0
        mine = torch.full((len(places),), nothing, dtype=torch.float64, device=self._attached.device)
        for index in range(len(places)):
            parts = self._parts(index)
            if parts:
                wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
                each = [torch.linalg.vector_norm(part, order, dtype=wide) for part in parts]
                mine[index] = sum(each) if order == 0 else torch.linalg.vector_norm(torch.stack(each), order)
        everyones = self.gather(mine, "the norms of the gradients")
        return everyones.sum(0) if order == 0 else torch.linalg.vector_norm(everyones, order, dim=0)


def _watching(held: weakref.ref[ShardedGradients]) -> Callable[[Any, Any, Any], None]:
    """A forward hook that has :meth:`ShardedGradients._before_backward` called where local gradients must follow."""

    def after(module: Any, args: Any, output: Any) -> None:
        alive = held()
        if alive is None or not (alive._factors or alive._changed) or torch.compiler.is_compiling():
            return
        outputs = [value for value in tree_iter(output) if isinstance(value, torch.Tensor) and value.requires_grad]
        if outputs:
            gradients = alive  # for the type checker
            register_multi_grad_hook(outputs, lambda _: gradients._before_backward(), mode="any")
        elif torch.is_grad_enabled():  # in an object that cannot be searched
            alive._before_backward()

    return after
