"""A model of the user's own, by the name it is imported under."""

from __future__ import annotations

import importlib
import os
import sys

from .models import Block, Model


def imported(name: str) -> Model:
    """Of MODULE:CALLABLE, which is called without arguments; on torch's meta device, so that no memory is needed.

    Each module that has parameters is a layer. Computing is shared out by parameters, since operations need inputs.

    Raises ValueError, of one sentence: it does not import, it is no module of torch, or it has no parameters.
    """
    import torch

    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # as with python -m, also where the command was started by its own name
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), attribute)
        with torch.device("meta"):
            net = make()
    except (Exception, SystemExit) as error:  # whatever a stranger's code raises: a script reads its command line, say
        raise ValueError(f"Model {name} cannot be imported and made ({type(error).__name__}: {error}).") from error
    if not isinstance(net, torch.nn.Module):
        raise ValueError(f"Model {name} makes a {type(net).__name__}, which is no torch.nn.Module.")
    blocks = []
    for path, part in net.named_modules():
        shapes = tuple(tuple(each.shape) for each in part.parameters(recurse=False) if each.requires_grad)
        if shapes:
            elements = sum(each.numel() for each in part.parameters(recurse=False) if each.requires_grad)
            blocks.append(Block(path or "model", shapes, float(elements)))
    if not blocks:
        raise ValueError(f"Model {name} has no parameters that need a gradient: there is nothing to exchange.")
    return Model(name, "computing shared out by parameters", tuple(blocks))
