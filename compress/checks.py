"""What is refused before a compressor is put to work, and what must be the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from compress.choices import check_matched
from compress.contract import Contract
from compress.model_group import check_loaded_for
from compress.saved import check_parameters
from dear import compression
from dear._names import named_parameters

#: What to do when ranks disagree.
REMEDY = "configure the compressor alike on every rank"


def check_new(compressor: Any, model: DDP, caller: str) -> dict[str, Any]:
    """Refuses what cannot become the compressor of this model; returns :func:`facts`.

    Raises:
        TypeError: it is no compressor.
        RuntimeError: it serves a model already.
        ValueError: it has loaded the state of another model, or for other ranks.
    """
    compression.check_kind(compressor, caller)
    if compressor.binding is not None:
        raise RuntimeError("This compressor serves a model already, and keeps its state: make another one.")
    params = dict(named_parameters(model.module))
    check_matched(compressor.patterns, params)
    sizes = {name: param.numel() for name, param in params.items() if param.requires_grad}
    compressor.choose({name: params[name] for name in sizes})
    check_parameters(compressor, sizes)
    check_loaded_for(compressor, model.process_group)
    return facts(compressor)


def facts(compressor: Contract) -> dict[str, Any]:
    """What must be the same on every rank, by what it is called in a sentence."""
    own = {
        **compressor.options(),
        "error_feedback": compressor.error_feedback,
        "start_step": compressor.start_step,
        "exempt": compressor.exempt.patterns,
        "min_compression_ratio": compressor.min_compression_ratio,
        "nonfinite": compressor.nonfinite,
        "step": compressor.step,
    }
    return {"the compressor": type(compressor).__name__, **{f"the compressor's {key}": own[key] for key in own}}


def check_bucket(names: Sequence[str], params: Sequence[Tensor], buffer: Tensor) -> None:
    """Refuses a bucket that cannot be compressed.

    Raises:
        ValueError: one sentence says which parameter, and why.
    """
    if buffer.layout != torch.strided:
        raise ValueError(
            f"The gradient of {names[0]} is sparse, and so compressed already: build its module with sparse=False."
        )
    for name, param in zip(names, params, strict=True):
        if not name:
            raise ValueError(
                "A bucket holds a parameter that the model did not have when the compressor was registered: register "
                "it when the model is complete."
            )
        if not param.is_floating_point():
            raise ValueError(
                f"The parameter {name} is {param.dtype}, whose gradient cannot be compressed: hold it as a real "
                "floating-point tensor, or set requires_grad=False."
            )
