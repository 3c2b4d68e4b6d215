"""What a compressor saves beside its error feedback."""

from __future__ import annotations

from typing import Any


class Stateful:
    """The part of the contract that a subclass overrides where it has learned something."""

    def named_state(self) -> dict[str, Any]:
        """State by parameter name that is equal on all ranks, to be saved."""
        return {}

    def load_named_state(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`named_state` gave."""

    def own_state(self) -> Any:
        """State of this rank alone, to be saved; it is lost on resuming at another world size."""
        return {}

    def load_own_state(self, state: Any) -> None:
        """Takes what :meth:`own_state` gave."""

    def forget_own_state(self) -> None:
        """Begins without what :meth:`own_state` would have given: a state of another world size was loaded."""
