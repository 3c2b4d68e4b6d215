"""Accelerators by name: published peak rates, and what of them training is taken to sustain."""

from __future__ import annotations

from dataclasses import dataclass

from .codecs import Cost
from .units import GIB

SUSTAINED = 0.4  # of the peak, in forward and backward passes: an assumption; --step-ms takes its place

# Passes over a gradient's bytes in device memory: what each kernel must read and write at least. Source: the kernels'
# own documentation (docs/architecture.md, "A compressed step"), for gradients of 32 bits.
PASSES = {
    "bf16": Cost(encode=1.5, merge=1.0, decode=1.5),
    "fp16": Cost(encode=1.5, merge=0.0, decode=1.5),
    "int8": Cost(encode=3.25, merge=0.75, decode=1.25),
    "fp8": Cost(encode=3.25, merge=0.75, decode=1.25),
    # As in 8 bits, of which so many of 32 are sent.
    "int4": Cost(encode=3.125, merge=0.375, decode=1.125),
    "int3": Cost(encode=3.1, merge=0.3, decode=1.1),
    "int2": Cost(encode=3.07, merge=0.2, decode=1.07),
    "sign": Cost(encode=3.0, merge=0.1, decode=1.0),
    "topk": Cost(encode=4.0, merge=0.2, decode=1.0),
    "power": Cost(encode=3.0, merge=1.0, decode=1.0),
    "acp": Cost(encode=3.0, merge=0.0, decode=1.0),
}
PASSES |= {"exact": PASSES["bf16"], "safe": PASSES["int3"], "fast": PASSES["power"]}  # presets


@dataclass(frozen=True)
class Device:
    """operations: a second, at the peak of the type that is usual for training on it. memory: bytes. bandwidth: bytes
    a second, of its memory."""

    name: str
    operations: float
    memory: float
    bandwidth: float
    sustained: float = SUSTAINED

    def costs(self) -> dict[str, Cost]:
        """Of the codecs, bound by memory bandwidth."""
        each = 1 / self.bandwidth
        return {
            name: Cost(encode=each * passes.encode, merge=each * passes.merge, decode=each * passes.decode)
            for name, passes in PASSES.items()
        }


DEVICES = {
    device.name: device
    for device in (
        Device("rtx2080ti", 13.4e12, 11 * GIB, 616e9),  # 32-bit, as in the papers whose clusters had it
        Device("rtx3080", 59.5e12, 10 * GIB, 760e9),  # tensor cores, 16-bit with 32-bit sums
        Device("rtx4090", 165e12, 24 * GIB, 1008e9),
        Device("v100", 125e12, 32 * GIB, 900e9),
        Device("a100", 312e12, 80 * GIB, 2039e9),
        Device("h100", 756e12, 80 * GIB, 2000e9),  # the PCIe card, dense
        Device("h100-sxm", 989e12, 80 * GIB, 3350e9),
    )
}


def device(name: str) -> Device:
    """Raises ValueError, which names what there is."""
    if name not in DEVICES:
        raise ValueError(f"Device {name!r} is not known: name one of {', '.join(DEVICES)}, or give its tflops.")
    return DEVICES[name]
