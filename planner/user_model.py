"""A model of the user's own, by the name it is imported under."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from .models import Block, Model


def imported(name: str, given: Sequence[str] = (), batch: int = 1) -> Model:
    """Of MODULE:CALLABLE, which is called without arguments; on torch's meta device, so that no memory is needed.

    Each module that has parameters is a layer. Computing is shared out by parameters: how long it takes is not known.

    given: shapes of one example's inputs, as :func:`planner.activations.inputs_of` takes them; of so many examples'
    forward pass activations are counted. Without them the model's are 0.

    Raises ValueError, of one sentence: it does not import, it is no module of torch, it has no parameters, or it cannot
    take these inputs.
    """
    import torch

    from .activations import inputs_of, kept_bytes

    inputs = inputs_of(given, batch)
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
    kept = 0.0
    if inputs:
        try:
            kept = kept_bytes(net, inputs) / batch
        except Exception as error:  # whatever a stranger's forward() raises
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(
                f"Model {name} does not take {', '.join(given)} on torch's meta device ({why}): "
                "change --input, or leave it out, and activations are not counted."
            ) from error
    return Model(name, "computing shared out by parameters", tuple(blocks), kept)
