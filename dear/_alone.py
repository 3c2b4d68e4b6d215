"""The schedule of a single rank without a compressor: its own gradients are the averages, and nothing moves."""

from __future__ import annotations

from typing import ClassVar

from dear._attached import Attached
from dear._schedule import Schedule

__all__ = ["LoneSchedule", "is_alone"]


def is_alone(attached: Attached) -> bool:
    """Whether training is plain DDP's as it is: compressors and preconditioners change it on a single rank, too."""
    changes = attached.compression.compressor is not None or attached.preconditioning.preconditioner is not None
    return attached.world == 1 and not changes


class LoneSchedule(Schedule):
    """Leaves DDP's reducer and the forward pass alone. There never is a layout, so every step is the optimizer's own,
    at once."""

    watches_forward: ClassVar[bool] = False

    def _take_over(self) -> None:
        pass

    def release(self) -> None:
        """Nothing was taken over."""

    def restore_reducer(self) -> None:
        """DDP has it still."""
