"""What becomes of results that are not simply applied: after a non-finite gradient, and of unused parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from compress.bound import Bound
from compress.contract import NonFinite


def treat_nonfinite(
    policy: NonFinite,
    bounds: Sequence[Bound],
    params: Iterable[Tensor],
    spoil: Callable[[Bound], None],
) -> None:
    """Does what ``nonfinite`` says, once everything has been exchanged in a step in which some rank's gradient was not
    finite: in those of ``bounds``, all there are, whose results say so.

    ``params`` are all parameters; ``spoil`` makes the gradients of a group NaN.

    Raises:
        RuntimeError: the policy is ``"raise"``.
    """
    found = [bound for bound in bounds if bound.exchange.has_nonfinite()] or bounds
    if policy == "raise":
        names = found[0].group.names
        raise RuntimeError(
            f"On some rank a gradient in {found[0].group.label} (from {names[0]} to {names[-1]}) is not finite: look "
            'for the cause, or pass nonfinite="skip", or with a GradScaler nonfinite="propagate".'
        )
    for bound in bounds:
        bound.exchange.roll_back()
    if policy == "skip":
        for param in params:
            param.grad = None
        return
    for bound in found:
        spoil(bound)


def keep_unused(
    bounds: Iterable[Bound],
    unused: Callable[[str], bool],
    errors: dict[str, Tensor],
    put_back: Callable[[str], bool] = lambda name: False,
) -> None:
    """Adds the results for parameters that no rank has used, which nobody applies, to the error feedback.

    put_back: puts what of such a parameter stands in ``.grad``, and was sent although it is none of this pass, where
    the result lies; False where nothing stands.
    """
    for bound in bounds:
        if not bound.exchange.compressed():
            continue
        for index, member in enumerate(bound.group.members):
            error = errors.get(member.name)
            if error is not None and unused(member.name):
                error.add_(bound.result(index))
                if put_back(member.name):
                    error.sub_(bound.result(index))
