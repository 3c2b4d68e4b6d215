"""How a link's rate is written: 500mbit, 2.5gbit, unlimited."""

import math
import re

UNLIMITED = "unlimited"


def parse_rate(rate: str | float | None) -> float | None:
    """Bits per second from "500mbit", "2.5gbit", "100kbit" or a number of bits per second; None means no limit.

    Raises ValueError for anything else.
    """
    if rate is None or rate == UNLIMITED:
        return None
    if isinstance(rate, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)bit(?:/s)?", rate.strip().lower())
        if not match:
            raise ValueError(f"rate {rate!r} is not understood: write it like 500mbit or 1gbit, or {UNLIMITED}")
        rate = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]]
    if not 1e5 <= rate <= 1e12:
        raise ValueError(f"a rate of {rate:g} bit/s is out of range: give one from 100kbit to 1000gbit, or {UNLIMITED}")
    return float(rate)


def bits(rate: str) -> float:
    """Bits per second of a rate; infinite without a limit."""
    return parse_rate(rate) or math.inf


def show_rate(rate: str | float | None) -> str:
    """500000000.0 and "500mbit" give "500 Mbit/s"."""
    bits = parse_rate(rate)
    if bits is None:
        return "no rate limit"
    unit, name = next((u, n) for u, n in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")) if bits >= u)
    return f"{bits / unit:g} {name}"
