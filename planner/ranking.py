"""Ways of training side by side: the time of a step, memory, and the line of code, the fastest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .batch import Batch
from .cluster import Cluster
from .codecs import EXACT, Codec, codec
from .profile import Profile
from .simulate import Method, Step, step
from .units import MIB

CAPS = tuple(MIB * size for size in (1, 4, 16, 25, 64))
BASELINE = "ddp+fp16"


@dataclass(frozen=True)
class Way:
    """A way of training as the table names it."""

    name: str
    schedule: str
    codec: Codec = EXACT
    tuned: bool = True  # over sizes of fusion groups

    @property
    def exact(self) -> bool:
        """Gradients go as they are, as with ``compressor="auto"`` where no loss is allowed: 16 bits are not."""
        return self.codec is EXACT

    def code(self, cap: float | None) -> str:
        size = "" if cap is None else f", bucket_cap_mb={cap / MIB:g}"
        match self.schedule:
            case "ddp":
                hook = "; model.register_comm_hook(None, fp16_compress_hook)" if self.codec is not EXACT else ""
                return f"model = DDP(net{size}){hook}"
            case "fsdp2":
                return "fully_shard(block, reshard_after_forward=False)"
            case "hook":
                return f"model = DDP(net{size}); compress.register(model, {self.codec.code})"
        chosen = f', update="{self.schedule}"' if self.codec is EXACT else f", compressor={self.codec.code}"
        return f"dear.attach(model, optimizer{chosen}{size})"


def ways(compressors: Sequence[str] = ("bf16", "power:4", "power:8", "acp:4", "topk:0.01", "sign")) -> list[Way]:
    found = [
        Way("ddp", "ddp"),
        Way(BASELINE, "ddp", codec("fp16")),
        Way("fsdp2", "fsdp2", tuned=False),
        Way("dear", "sharded"),
        Way("dear:owned", "owned"),
        Way("dear:replicated", "replicated"),
    ]
    for name in compressors:
        found += [Way(f"dear+{name}", "replicated", codec(name)), Way(name, "hook", codec(name))]
    return found


@dataclass(frozen=True)
class Choice:
    """Predicted. cap: of the fusion groups, None where there is none. speedup: over DDP with 16 bits at its best size.
    memory: bytes of the fullest worker. fits: in every device. exact: see :class:`Way`. rate: examples a second, while
    nothing fails."""

    name: str
    step: Step
    cap: float | None
    speedup: float
    memory: float
    fits: bool
    exact: bool
    code: str
    rate: float


def rank(
    profile: Profile,
    cluster: Cluster,
    chosen: Sequence[Way],
    batch: Batch | None = None,
    caps: Sequence[float] = CAPS,
) -> list[Choice]:
    """Every way at its best fusion size; those that fit come first, and of them the fastest.

    batch: one example of each worker without activations, where none is given.
    """
    batch = batch or Batch.even(cluster, 1, 0.0)
    network, machine = cluster.network(), cluster.machine()
    profile = batch.uneven(profile)

    def best(way: Way) -> tuple[Step, float | None]:
        sizes = [cap for cap in caps if cap <= max(MIB, profile.bytes)] if way.tuned else [None]
        tried = [(step(profile, network, machine, Method(way.schedule, way.codec, cap)), cap) for cap in sizes]
        return min(tried, key=lambda each: each[0].seconds)

    baseline, _ = best(Way(BASELINE, "ddp", codec("fp16")))
    made = []
    for way in chosen:
        found, cap = best(way)
        parameters = memory_bytes(way, profile, cluster.workers)
        memory = [parameters + batch.activations * own for own in batch.shares]
        fits = all(need <= device.memory for need, device in zip(memory, cluster.devices, strict=True))
        made.append(
            Choice(
                way.name, found, cap, baseline.seconds / found.seconds, max(memory), fits, way.exact, way.code(cap),
                batch.examples / found.seconds,
            )
        )  # fmt: skip
    return in_order(made)


def in_order(choices: Sequence[Choice]) -> list[Choice]:
    return sorted(choices, key=lambda each: (not each.fits, each.step.seconds))


def memory_bytes(way: Way, profile: Profile, workers: int, state: float = 2.0) -> float:
    """Parameters, gradients, optimizer state (``state`` numbers for each parameter, Adam's by default) and error
    feedback of one worker."""
    own = 1 / workers
    parameters = gradients = 1.0
    error = 1.0 if way.codec.keeps_error else 0.0
    if way.schedule == "fsdp2":
        parameters, gradients, state = 1.0 + own, own, state * own
    elif way.schedule in ("sharded", "owned"):
        gradients, state = 1.0 + own, state * own
    return (parameters + gradients + state + error) * profile.elements * 4
