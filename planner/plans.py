"""A choice as JSON can hold it, to be saved and given next time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from . import codecs
from .deciding import Way

VERSION = 1


def made(way: Way, mib: float, seconds: float, workers: int, elements: int) -> dict[str, Any]:
    """seconds: of a measured step. workers, elements: what it was measured with."""
    return {
        "version": VERSION,
        "update": way.update,
        "compressor": way.method,
        "bucket_cap_mb": mib,
        "seconds": seconds,
        "workers": workers,
        "elements": elements,
    }


def refusal(
    plan: Any, workers: int, elements: int, updates: Mapping[bool, list[str]], methods: Collection[str]
) -> str | None:
    """Why a plan that was given cannot be followed here; None where it can.

    updates: the strategies that serve the optimizer, by whether gradients are compressed. methods: of compression, that
    lose no more than is allowed.
    """
    if not isinstance(plan, Mapping) or plan.get("version") != VERSION:
        return f"it is no plan of version {VERSION}, as engine.plan gives it"
    mib, method, update = plan.get("bucket_cap_mb"), plan.get("compressor"), plan.get("update")
    if not isinstance(mib, (int, float)) or isinstance(mib, bool) or not 0 < mib < float("inf"):
        return f"its bucket_cap_mb is {mib!r}, and must be a number of MiB"
    if (plan.get("workers"), plan.get("elements")) != (workers, elements):
        return (
            f"it was made for {plan.get('workers')} workers and {plan.get('elements')} elements of gradients, and here "
            f"are {workers} and {elements}"
        )
    if method is not None:
        try:
            codecs.compressor(str(method))
        except ValueError as error:
            return f"its compressor cannot be made ({str(error).rstrip('.')})"
        if method not in methods:
            return f"its compressor, {method}, may lose more than is allowed: pass a larger loss to compress.auto()"
    known = updates[method is not None]
    if update not in known:
        return f"its update {update!r} does not serve here, where {', '.join(known) or 'none'} would"
    return None


def way(plan: Mapping[str, Any]) -> Way:
    return Way(plan["update"], plan["compressor"])
