"""Names of modules and parameters as the user's own code has them, whatever the modules have been wrapped in.

``torch.compile``, activation checkpointing and FSDP put a module of their own around a module, and its name into those
of everything inside. What is drawn, saved or said by name must not depend on that: the same model is the same training.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["named_modules", "named_parameters", "plain"]

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def plain(name: str) -> str:
    """The name without those of wrappers.

    >>> plain("blocks.0._orig_mod.weight")
    'blocks.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(root: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """As the module's own, with plain names."""
    return ((plain(name), param) for name, param in root.named_parameters())


def named_modules(root: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The same of modules: a wrapper has the name of what it is around."""
    return ((plain(name), module) for name, module in root.named_modules())
