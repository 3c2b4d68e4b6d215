"""What is refused before a compressor is put to work."""

from __future__ import annotations

from typing import Any

from compress.compressor import Compressor


def check_kind(thing: Any, caller: str) -> None:
    """Refuses what is no compressor.

    Raises:
        TypeError: one sentence says what it is instead.
    """
    if isinstance(thing, type) and issubclass(thing, Compressor):
        name = f"compress.{thing.__name__}" if thing.__module__.startswith("compress.") else thing.__name__
        raise TypeError(f"{name} is a class; pass an instance, such as {name}().")
    if not isinstance(thing, Compressor):
        raise TypeError(f"{caller} needs a compressor, such as compress.ACPSGD(), not {type(thing).__name__}.")


def check_free(compressor: Compressor) -> None:
    """Refuses a compressor that is at work.

    Raises:
        RuntimeError: it serves a model.
    """
    if compressor.driver is not None:
        raise RuntimeError("This compressor serves a model already, and keeps its state: make another one.")
