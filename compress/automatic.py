"""A compressor, or none, that is chosen while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dear import choosing


def auto(loss: float | str = 0.0, plan: Mapping[str, Any] | None = None) -> choosing.Chooser:
    """What ``dear.attach(model, optimizer, compressor=...)`` takes in the place of a compressor: update strategy, size
    of fusion groups, plain DDP or a compressor are chosen in the first 60 steps, by measuring.

    Args:
        loss: how far the loss may end above that of exact training, as a fraction or as ``"3%"``. At 0 all that is
            tried is exact: training is the same all the while. More opens the compressors that stayed below in every
            stored training of theirs with three seeds, which is no promise for another model.
        plan: ``engine.plan`` of an earlier run of this model on as many ranks: training begins with it, and nothing is
            tried.

    Raises:
        ValueError: the planner is not installed, or ``loss`` is no such number.
    """
    return choosing.auto(loss=loss, plan=plan)
