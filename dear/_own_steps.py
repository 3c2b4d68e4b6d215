"""Optimizers whose ``step`` is not torch's code: what is not known about them, and what they must not do.

Note [Steps of one's own]
With ``update="owned"`` an optimizer's ``step`` is called once for each fusion group, on the parameters of one rank.
That is the update of plain DDP where it follows from a parameter, its gradient, its state and its group's options alone
(Note [Whole-matrix optimizers]). Torch's own code is known to be so, and was read. Of any other it is validated at each
call, not at the first ones alone: nothing else may be kept, drawn, or asked of other ranks. What can be seen of it is
compared around the call; what cannot be seen, that parameters depend on one another, is tried out now and then
(_joint_steps.py). An error is raised on the rank that finds it, before anything is sent.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import optim
from torch.distributed import distributed_c10d as c10d
from torch.utils._pytree import tree_leaves

from dear import _ddp, _joint_steps
from dear._layout import Segment
from dear._optimizer import PER_PARAMETER, Groups, UserOptimizer, check_draws, generators
from dear._own_parameters import State, lent
from dear._standing import memory_of

_KNOWN = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, __file__))
_found: weakref.WeakKeyDictionary[optim.Optimizer, bool] = weakref.WeakKeyDictionary()
_STRAYS = "changes parameters that it was not given, and it is called "
_REMEDY = 'once for each fusion group with update="owned": use update="replicated".'


def has_own_step(optimizer: optim.Optimizer) -> bool:
    """Whether ``optimizer.step()`` runs other code than torch's: that of a class of the user's, or what was put in the
    method's place. While the optimizer is attached, what was found before: who wraps the step then wraps ours."""
    if getattr(optimizer, _ddp.ENGINE, None) is None or optimizer not in _found:
        _found[optimizer] = not _is_known(optimizer.step) or not all(map(_adds_no_code, type(optimizer).__mro__))
    return _found[optimizer]


def _is_known(function: Any) -> bool:
    """Whether this is code of torch's or of this library, and whatever it wraps, too."""
    while function is not None:
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        if code is None or not os.path.abspath(code.co_filename).startswith(_KNOWN):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _adds_no_code(kind: type) -> bool:
    """Whether a class of an optimizer's is torch's, or has nothing that the step may call but what torch put there."""
    if kind.__module__.partition(".")[0] in ("torch", "builtins", "typing"):
        return True
    return not any(
        (callable(value) or isinstance(value, (property, classmethod, staticmethod))) and not _is_known(value)
        for name, value in vars(kind).items()
        if name not in ("__init__", "__module__", "__doc__") and not name.startswith("dear_")
    )


def refusal_of_own_step(optimizer: optim.Optimizer) -> str | None:
    """Why an optimizer's step cannot be called on some parameters at a time, as far as can be seen before; None where
    nothing is."""
    own = has_own_step(optimizer)
    if not own and type(optimizer) in PER_PARAMETER:
        return None
    attached = getattr(optimizer, _ddp.ENGINE, None) is not None  # its state is this library's then
    if own and not attached and any(not isinstance(key, torch.Tensor) for key in optimizer.state):
        return _sentence(optimizer, "keeps state of something else than its parameters, and it is called ")
    for name, value in _attributes(optimizer).items():
        parts = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
        if any(isinstance(part, optim.Optimizer) for part in parts):
            return _sentence(
                optimizer,
                f"may call the optimizer in its attribute {name}, which has all parameters, and it is called ",
            )
    return None


def _sentence(optimizer: optim.Optimizer, what: str) -> str:
    return f"{type(optimizer).__name__}.step() {what}{_REMEDY}"


GroupsOf = Callable[[Sequence[torch.Tensor]], Groups]  # the groups of one update of such tensors, one for each segment


class OwnStep:
    """Makes and validates the calls of one optimizer's step."""

    def __init__(self, user: UserOptimizer, names: Mapping[Any, str]) -> None:
        self._user, self._optimizer, self._names = user, user.optimizer, names
        self._begun = 0  # steps
        self._params: list[torch.Tensor] = []  # of the optimizer, in this step

    def begin(self) -> None:
        """A step begins, of several calls.

        Raises:
            RuntimeError: a parameter group has an option whose entries the step would take for those of other
                parameters.
        """
        self._begun += 1
        self._params = [param for group in self._optimizer.param_groups for param in group["params"]]
        for group in self._optimizer.param_groups:
            size = len(group["params"])
            for key, value in group.items():
                if key != "params" and isinstance(value, list) and len(value) == size > 1:
                    raise self._error(
                        f"may use the option {key} of a parameter group, which has an entry for each of its "
                        "parameters, and is given some of them alone, since it is called "
                    )

    def run(self, segments: Sequence[Segment], values: State, groups_of: GroupsOf, closure: bool) -> None:
        """One call, which updates these segments and their state in ``values``.

        closure: the user has given the step one.

        Raises:
            RuntimeError: it has done something else than updating parameters and their state; the sentence says what.
        """
        with lent(segments, values) as (tensors, state):
            groups = groups_of(tensors)
            with self._validated(groups, tensors, state, closure) as asked:
                self._user.run(groups, state, asked)
            if _joint_steps.is_tried(self._begun):
                self._check_apart(groups, state, closure)

    def _check_apart(self, groups: Groups, state: State, closure: bool) -> None:
        tensors = [tensor for group in groups for tensor in group["params"]]
        strays = False

        def run(some: Groups, states: State) -> None:
            nonlocal strays
            given = some[0]["params"]
            others = self._others({id(tensor) for tensor in given})
            versions = _versions(others)
            with _without_gradients(tensors, but=given):  # a step that has them from somewhere else leaves those out
                self._user.run(some, states, _Asked(given) if closure else None)
            strays |= _written(others, versions, given)

        joint = _joint_steps.find_joint(run, groups, state)
        if strays:
            raise self._error(_STRAYS)
        if joint is not None:
            name = self._names.get(joint, "a parameter")
            raise self._error(f"lets the update of {name} depend on the parameters beside it, and it is called ")

    @contextlib.contextmanager
    def _validated(
        self, groups: Groups, tensors: Sequence[torch.Tensor], state: State, closure: bool
    ) -> Iterator[Callable[[], Any] | None]:
        """Inside, the step is called with these groups and this state. Gives what is to be its closure, where the user
        has given one."""
        device = tensors[0].device
        known = {id(tensor) for tensor in tensors} | {id(key) for key in state}
        options = [_facts({key: value for key, value in group.items() if key != "params"}) for group in groups]
        kept, drawn, calls = _facts(_attributes(self._optimizer), but=known), generators(device), _collectives()
        others = self._others(known)
        versions, memory = _versions(others), {memory_of(each.grad) for each in tensors if each.grad is not None} - {0}
        asked = _Asked(tensors)
        yield asked if closure else None
        if closure and not asked.was_called_first_and_once:
            raise self._error("calls its closure other than once, before it updates anything, and it is called ")
        if options != [_facts({key: value for key, value in group.items() if key != "params"}) for group in groups]:
            raise self._error("changes options of its parameter groups, and it is called ")
        if _written(others, versions, tensors):
            raise self._error(_STRAYS)
        if kept != _facts(_attributes(self._optimizer), but=known):
            raise self._error("keeps something in the optimizer beside its state, and it is called ")
        if any(id(key) not in known for key in state):
            raise self._error("keeps state of something else than its parameters, and it is called ")
        if not memory.isdisjoint(map(memory_of, filter(torch.is_tensor, tree_leaves(list(state.values()))))):
            raise self._error("keeps a gradient itself in its state, whose memory is used again, and it is called ")
        if calls != _collectives():
            raise self._error("communicates with other ranks, which do not make the same calls, since it is called ")
        check_draws(self._optimizer, drawn, device)

    def _others(self, given: Collection[int]) -> list[torch.Tensor]:
        """The optimizer's parameters but those of these ids."""
        return [param for param in self._params if id(param) not in given]

    def _error(self, what: str) -> RuntimeError:
        return RuntimeError(_sentence(self._optimizer, what))


class OwnSteps:
    """The calls of the steps of an engine's optimizers, of which those that are not torch's are validated."""

    def __init__(self, users: Sequence[UserOptimizer], names: Mapping[Any, str]) -> None:
        self._users = users
        self._own = [OwnStep(user, names) if has_own_step(user.optimizer) else None for user in users]
        self.with_closure = False  #: the user has given the step a closure

    def begin(self, number: int) -> None:
        """As :meth:`OwnStep.begin`, of one of the optimizers: on every rank alike, whoever owns what."""
        own = self._own[number]
        if own is not None:
            own.begin()

    def run(self, number: int, segments: Sequence[Segment], values: State, groups_of: GroupsOf) -> None:
        """As :meth:`OwnStep.run`, of one of the optimizers."""
        own = self._own[number]
        if own is None:
            self._users[number].run(groups_of([segment.tensor for segment in segments]), values)
        else:
            own.run(segments, values, groups_of, self.with_closure)


#: What torch and this library keep there, or exchange for a call.
_OF_TORCH = {
    "param_groups", "state", "step", "zero_grad", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks",
    "_opt_called", "_step_count", "_need_device_dtype_check_for_fused", _ddp.ENGINE,
}  # fmt: skip


class _Asked:
    """What a step's closure is where the user's was called before: nobody knows the loss here, and none may be used."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors, self._versions = tensors, [tensor._version for tensor in tensors]
        self._calls: list[bool] = []

    def __call__(self) -> Any:
        self._calls.append(self._versions == [tensor._version for tensor in self._tensors])
        return _LOSS

    @property
    def was_called_first_and_once(self) -> bool:
        return self._calls == [True]


class _Loss:
    """The loss as a step of one's own gets it: to be returned."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(
            "The optimizer's step() uses the loss that its closure returns, which is one worker's, and it is called "
            + _REMEDY
        )

    def __getattr__(self, name: str) -> Any:
        return self.__torch_function__(None, ())


def _refuse(self: Any, *_: Any) -> Any:
    return self.__torch_function__(None, ())


for _name in (
    "float", "int", "bool", "lt", "le", "gt", "ge", "neg", "abs", *(f"{side}{name}" for side in ("", "r")
    for name in ("add", "sub", "mul", "truediv", "pow")),
):  # fmt: skip
    setattr(_Loss, f"__{_name}__", _refuse)
_LOSS = _Loss()


def _attributes(optimizer: optim.Optimizer) -> dict[str, Any]:
    return {name: value for name, value in vars(optimizer).items() if name not in _OF_TORCH}


def _versions(params: Sequence[torch.Tensor]) -> list[int]:
    with torch._C.DisableTorchFunctionSubclass():
        return [param._version for param in params]


def _written(others: Sequence[torch.Tensor], before: list[int], given: Sequence[torch.Tensor]) -> bool:
    """Whether any of these was written to since it had that version. Parameters that were made of one tensor's slices
    have one version among them, which then says nothing."""
    after = _versions(others)
    if after == before:
        return False
    suspects = [param for param, then, now in zip(others, before, after, strict=True) if now != then]
    versions = _versions(suspects)
    with torch._C.DisableTorchFunctionSubclass():
        for tensor in given:
            torch.autograd.graph.increment_version(tensor)
    return any(then == now for then, now in zip(versions, _versions(suspects), strict=True))


@contextlib.contextmanager
def _without_gradients(tensors: Sequence[torch.Tensor], but: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, ``.grad`` of these is None, but for some."""
    shown = {id(tensor) for tensor in but}
    hidden = [(tensor, tensor.grad) for tensor in tensors if id(tensor) not in shown]
    for tensor, _ in hidden:
        tensor.grad = None
    try:
        yield
    finally:
        for tensor, grad in hidden:
            tensor.grad = grad


def _collectives() -> list[int]:
    """How many collectives every process group has begun."""
    counts = []
    for group in list(c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # it does not count
            counts.append(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
    return counts


class _Same:
    """An object as such: equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    __hash__ = None  # type: ignore[assignment]


def _facts(value: Any, depth: int = 3, but: Collection[int] = ()) -> Any:
    """What can be compared later to see whether a value, or something inside it, was changed.

    but: by their ids, tensors whose values may change.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return type(value), value
    if isinstance(value, torch.Tensor):
        return _Same(value), None if id(value) in but else _versions([value])
    if depth and isinstance(value, dict):
        return [(_facts(key, 0, but), _facts(each, depth - 1, but)) for key, each in value.items()]
    if depth and isinstance(value, (list, tuple)):
        return [_facts(each, depth - 1, but) for each in value]
    return _Same(value)
