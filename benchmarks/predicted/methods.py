"""The benchmarks' strategies as the planner's methods."""

from planner.codecs import codec
from planner.profile import Profile
from planner.schedules import default_cap
from planner.simulate import Method
from planner.units import MIB

from ..spelling import CompressorName
from ..training.strategies import (
    DDP,
    FSDP2,
    Compressed,
    DDPHalf,
    Dear,
    DearCompressed,
    FSDP2Half,
    StrategyError,
    parse_strategy,
)

TIMED = ("bf16", "fp16", "acp", "power", "topk", "sign")  # codecs whose costs the lab has from a breakdown


def method_of(name: str, profile: Profile) -> Method | None:
    """The strategy of that name; None for one that the planner cannot predict, or not with what the lab has."""
    try:
        strategy = parse_strategy(name)
    except StrategyError:  # results of a version that knew others
        return None
    cap = None if strategy.bucket_cap_mb is None else strategy.bucket_cap_mb * MIB
    if isinstance(strategy, Compressed):
        if strategy.compressor.kind not in TIMED:
            return None
        schedule = "replicated" if isinstance(strategy, DearCompressed) else "hook"
        return Method(schedule, codec(_spelled(strategy.compressor)), cap)
    if isinstance(strategy, Dear):
        return Method("sharded" if strategy.update == "auto" else strategy.update, cap=cap or default_cap(profile))
    if isinstance(strategy, DDPHalf):
        return Method("ddp", codec("fp16"), cap)
    if isinstance(strategy, FSDP2) and not isinstance(strategy, FSDP2Half):
        return Method("fsdp2")
    return Method("ddp", cap=cap) if type(strategy) is DDP else None


def _spelled(compressor: CompressorName) -> str:
    """As the planner names it: without options that change no more than a few bytes, and without the vote."""
    option = None if compressor.kind == "sign" else compressor.option
    return ":".join(filter(None, [compressor.kind, option]))
