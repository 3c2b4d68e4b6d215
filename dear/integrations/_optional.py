"""Base classes of frameworks that may not be installed."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["base_class", "missing"]


def missing(packages: str) -> ImportError:
    """The error for a framework that is not there."""
    return ImportError(
        f"{packages.split()[0]} is not installed, which this integration is for: pip install {packages}."
    )


def base_class(module: str, name: str, package: str) -> Any:
    """The class ``name`` of ``module``; where that is not installed, one whose construction says so."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:

        class Missing:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                raise missing(package)

        return Missing
